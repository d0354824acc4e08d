"""Hostile files for every reader: each is read, or refused by one line that names the file;
nothing hangs, grows, runs, unpickles or writes elsewhere.

While a reader works, an audit of the interpreter watches what it does; its time and its memory
are limited. What was tried is counted, see `test_faults.py`.
"""

import copy
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_faults import apart
from transformers import RobertaConfig, RobertaForSequenceClassification

from weightregions.centering import centroid_of
from weightregions.checkpoints import open_checkpoint
from weightregions.comparison import compare, measured
from weightregions.corpora import load_corpora
from weightregions.files import as_json, file_sha256
from weightregions.finetuning import Recipe
from weightregions.region import Region
from weightregions.many import load_sketch, sketch
from weightregions.similarity import gram, load_gram
from weightregions.results import Study
from weightregions.traversal import ScratchModel, hull, read_rows, traverse
from weightregions.building import settle
from weightregions.zoo import gather, open_zoo

pytestmark = pytest.mark.xdist_group(
    "fuzz"
)  # one process makes what all of these tests look at

SECONDS, MEGABYTES = 10, 256  # that a reader may take, for files of some kilobytes


# --- the watch --------------------------------------------------------------------------------


class Hangs(BaseException):
    "Not an Exception, which a reader might take for the file's fault."


BARRED = {
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
}
WATCH = {"folder": None, "seen": []}


def audit(event, arguments):
    """Note what no reader may do: start a process, unpickle, connect, and write or remove
    outside of its folder."""
    if WATCH["folder"] is None:
        return
    if event in BARRED:
        WATCH["seen"].append((event, *map(str, arguments[:2])))
    flags = (
        arguments[2]
        if event == "open"
        else os.O_WRONLY
        if event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")
        else 0
    )
    if (
        isinstance(flags, int)
        and flags & (os.O_WRONLY | os.O_RDWR)
        and isinstance(arguments[0], (str, os.PathLike))
    ):
        where = os.path.abspath(arguments[0])
        if not where.startswith(f"{WATCH['folder']}{os.sep}") and not where.startswith(
            ("/dev/", "/proc/")
        ):
            WATCH["seen"].append((event, where))


sys.addaudithook(audit)


@contextmanager
def watched(folder):
    "Limit time and memory, and see that nothing barred is done."

    def late(*_):
        raise Hangs(f"longer than {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    WATCH.update(folder=str(folder), seen=[])
    left, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)  # of the whole test's time
    resource.setrlimit(resource.RLIMIT_AS, (now + MEGABYTES * 2**20, limits[1]))
    try:
        yield
    finally:
        (
            signal.signal(signal.SIGALRM, before),
            signal.setitimer(signal.ITIMER_REAL, left),
            resource.setrlimit(resource.RLIMIT_AS, limits),
        )
        WATCH["folder"] = None
    assert not WATCH["seen"], WATCH["seen"]


def refused(read, folder, name):
    "Whether a reader refuses, in the one way that it may."
    with watched(folder):
        try:
            read()
        except (ValueError, FileNotFoundError) as e:
            said = str(e)
        else:
            return False
    assert name in said and "\n" not in said and len(said) < 2000, said
    return True


# --- hostile bytes, hostile JSON --------------------------------------------------------------

HOSTILE = (
    st.sampled_from(
        [
            None,
            True,
            False,
            -1,
            0,
            1,
            2**31,
            2**63,
            10**30,
            0.5,
            float("nan"),
            float("inf"),
            "",
            "x",
            "../../x",
            "/etc/passwd",
            "a\nb",
            "\0",
            "é" * 300,
            [],
            {},
            [[]],
            [1, "a"],
            {"a": {"b": []}},
            "1",
            "NaN",
        ]
    )
    | st.integers()
    | st.text(max_size=8)
)


def places(value, path=()):
    "The paths of all values in a JSON value."
    yield path
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield from places(inner, (*path, key))


@st.composite
def json_like(draw, text):
    "A JSON value with one to three places removed, or filled with something else."
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            return copy.deepcopy(draw(HOSTILE))
        at = value
        for key in path[:-1]:
            at = at[key]
        if draw(st.integers(0, 3)) == 0:
            del at[path[-1]]
        else:
            at[path[-1]] = copy.deepcopy(draw(HOSTILE))
    return value


@st.composite
def bytes_like(draw, whole):
    "Bytes that were cut, flipped, doubled, or filled with something else."
    blob = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, max(len(blob) - 1, 0))), draw(st.integers(1, 16))
        what = draw(st.sampled_from(["flip", "cut", "remove", "double", "fill", "insert"]))
        if what == "flip" and blob:
            blob[at] ^= 1 << draw(st.integers(0, 7))
        if what == "cut":
            del blob[at:]
        if what == "remove":
            del blob[at : at + n]
        if what == "double":
            blob[at:at] = blob[at : at + n]
        if what in ("fill", "insert"):
            blob[at : at + n * (what == "fill")] = draw(
                st.binary(max_size=n)
                | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\n", b'"', b",", b"{", b"9" * 30])
            )
    return bytes(blob)


# --- the readers ------------------------------------------------------------------------------


def tiny(folder, seed=0):
    "A checkpoint of a few kilobytes."
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=20,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=4,
            max_position_embeddings=8,
        )
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {f"t{i}": i for i in range(20)}}})
    )
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Whole files of every kind that the package reads."
    root = tmp_path_factory.mktemp("whole")
    about = {
        "base": {"name": "b", "sha256": "0" * 64},
        "recipe": {"steps": 1},
        "data": {"source": "s", "sha256": "0" * 64, "n_train": 4, "n_test": 2},
        "labels": ["a", "b"],
        "metrics": {"accuracy": 0.5, "loss": 0.7, "majority": 0.5, "n_test": 2},
        "versions": {},
    }
    for i, name in enumerate(("films", "meals", "news")):
        folder = tiny(root / "zoo" / name / "seed-1", i)
        (folder / "manifest.json").write_text(
            as_json(
                about
                | {
                    "dataset": name,
                    "family": "f",
                    "seed": 1,
                    "weights": {"sha256": file_sha256(folder / "model.safetensors")},
                }
            )
        )
    (root / "zoo" / "zoo.json").write_text(
        as_json({"base": about["base"], "recipe": {"steps": 1}})
    )
    one = root / "zoo" / "films" / "seed-1"
    for name, save in (
        ("bin", torch.save),
        (
            "legacy",
            lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
        ),
    ):
        shutil.copytree(
            one, root / name, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json")
        )
        save(load_file(one / "model.safetensors"), root / name / "pytorch_model.bin")
    shutil.copytree(one, root / "shards", ignore=shutil.ignore_patterns("manifest.json"))
    (root / "shards" / "model.safetensors").rename(root / "shards" / "part-1.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(one / "model.safetensors"), "part-1.safetensors"),
    }
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(
        root / "zoo",
        root / "listed",
        ignore=shutil.ignore_patterns("zoo.json", "manifest.json"),
    )
    (root / "listed" / "models.csv").write_text(
        "model,dataset,family,seed\nfilms/seed-1,films,f,1\nmeals/seed-1,meals,f,2\n"
    )
    for ending in ("jsonl", "json", "csv", "csv.gz", "parquet"):
        lamps(root / ending, ending)
    (root / "csv" / "families.csv").write_text("name,family\nlamps,general\n")
    models, base = (
        open_zoo(root / "zoo").checkpoints(),
        open_checkpoint(tiny(root / "base", 9), name="base"),
    )
    (root / "gram").mkdir(), (root / "rows").mkdir(), (root / "study").mkdir()
    gram(models, base, by=lambda n: n.split(".")[0], progress=False).save(
        root / "gram" / "gram.npz"
    )
    sketch(models, base, 256, progress=False).save(root / "gram" / "sketch.npz")
    walk(models, root / "rows")
    losses(root / "rows")
    Region.of(models, base, "all").save(root / "region")
    (root / "study" / "about.json").write_text(
        as_json(
            {
                "scale": "tiny",
                "datasets": {"films": "0"},
                "data": "builtin",
                "seeds": 1,
                "base": about["base"],
                "reach": {"same": 1},
            }
        )
    )
    return root


def lamps(folder, ending):
    "A folder with one dataset."
    (folder / "lamps").mkdir(parents=True)
    for stem, n in (("train", 8), ("validation", 4)):
        rows = [
            {"text": f"{stem} lamp {i}", "text_pair": f"and {i}", "label": i % 2}
            for i in range(n)
        ]
        file = folder / "lamps" / f"{stem}.{ending}"
        if ending == "jsonl":
            file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        elif ending == "json":
            file.write_text(json.dumps(rows))
        elif ending.startswith("csv"):
            pd.DataFrame(rows).to_csv(file, index=False)
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)
    if ending == "jsonl":
        (folder / "datasets.json").write_text(
            json.dumps(
                [
                    {
                        "name": "lamps",
                        "family": "general",
                        "label_names": ["off", "on"],
                        "n_train": 8,
                        "n_validation": 4,
                    }
                ]
            )
        )


def walk(models, folder):
    return traverse(
        hull(models, 3), nothing, ScratchModel(models[0]), folder / "rows.jsonl", progress=False
    )


def nothing(model):
    return {"loss": 0.5, "n": 1}


def losses(folder):
    return compare(
        [("In", f"p{i}") for i in range(3)],
        lambda p: [{"target": t, "loss": 0.5} for t in "xy"],
        folder / "losses.csv",
        progress=False,
        identity={"probe": 1},
    )


def whole_checkpoint(folder):
    opened = open_checkpoint(folder, name=folder.name)
    opened.check_finite()
    return opened.sha256()


def whole_zoo(folder):
    zoo = open_zoo(folder)
    zoo.checkpoints(), zoo.verify(), repr(zoo)
    return zoo


def whole_gram(folder):
    kept = load_gram(folder / "gram.npz")
    return kept.products(), kept.groups, repr(kept), kept.euclidean(), kept.norms()


def whole_sketch(folder):
    kept = load_sketch(folder / "sketch.npz")
    return kept.cosine(), repr(kept)


def whole_region(folder):
    region = Region.load(folder)
    return region.centre.read(region.centre.layout.names[0], 0, 1), repr(region)


# what is read: folder, file, the kind of damage, the reader of the folder, and what its message
# must name
READERS = {
    "safetensors header": (
        "zoo/films/seed-1",
        "model.safetensors",
        "header",
        whole_checkpoint,
        "seed-1",
    ),
    "safetensors bytes": (
        "zoo/films/seed-1",
        "model.safetensors",
        "bytes",
        whole_checkpoint,
        "seed-1",
    ),
    "config.json": ("zoo/films/seed-1", "config.json", "json", whole_checkpoint, "seed-1"),
    "tokenizer.json": (
        "zoo/films/seed-1",
        "tokenizer.json",
        "json",
        lambda f: open_checkpoint(f, name=f.name).require_same_space(
            open_checkpoint(f.parent.parent / "meals" / "seed-1")
        ),
        "seed-1",
    ),
    "index of shards": (
        "shards",
        "model.safetensors.index.json",
        "json",
        whole_checkpoint,
        "shards",
    ),
    "pickle in a zip": ("bin", "pytorch_model.bin", "bytes", whole_checkpoint, "bin"),
    "pickle of old": ("legacy", "pytorch_model.bin", "bytes", whole_checkpoint, "legacy"),
    "manifest.json": (
        "zoo",
        "films/seed-1/manifest.json",
        "json",
        lambda f: (gather(f), whole_zoo(f)),
        "seed-1",
    ),
    "manifest.json of a member": (
        "zoo",
        "films/seed-1/manifest.json",
        "json",
        lambda f: centroid_of(open_zoo(f)),
        "seed-1",
    ),
    "zoo.json": (
        "zoo",
        "zoo.json",
        "json",
        lambda f: settle(f, {"name": "b", "sha256": "0" * 64}, Recipe(steps=1)),
        "zoo",
    ),
    "models.csv": ("listed", "models.csv", "bytes", whole_zoo, ""),
    "datasets.json": ("jsonl", "datasets.json", "json", load_corpora, ""),
    "rows in JSON lines": ("jsonl", "lamps/train.jsonl", "lines", load_corpora, "lamps"),
    "rows in JSON": ("json", "lamps/train.json", "json", load_corpora, "lamps"),
    "rows in CSV": ("csv", "lamps/train.csv", "bytes", load_corpora, "lamps"),
    "rows in packed CSV": ("csv.gz", "lamps/train.csv.gz", "bytes", load_corpora, "lamps"),
    "rows in Parquet": ("parquet", "lamps/train.parquet", "bytes", load_corpora, "lamps"),
    "families.csv": ("csv", "families.csv", "bytes", load_corpora, "families.csv"),
    "rows of a traversal": (
        "rows",
        "rows.jsonl",
        "lines",
        lambda f: read_rows(f / "rows.jsonl"),
        "rows.jsonl",
    ),
    "rows of a traversal, resumed": (
        "rows",
        "rows.jsonl",
        "lines",
        lambda f: walk(MODELS(f), f),
        "rows.jsonl",
    ),
    "measurements": (
        "rows",
        "losses.csv",
        "bytes",
        lambda f: measured(f / "losses.csv"),
        "losses.csv",
    ),
    "measurements, resumed": ("rows", "losses.csv", "bytes", losses, "losses.csv"),
    "inner products": ("gram", "gram.npz", "bytes", whole_gram, "gram.npz"),
    "sketch": ("gram", "sketch.npz", "bytes", whole_sketch, "sketch.npz"),
    "region.json": ("region", "region.json", "json", whole_region, "region"),
    "centre of a region": (
        "region",
        "centre.safetensors",
        "bytes",
        whole_region,
        "centre.safetensors",
    ),
    "about.json": ("study", "about.json", "json", lambda f: repr(Study(f)), "study"),
}

_OPEN = {}


def MODELS(folder):
    "The checkpoints that a walk's rows were measured on."
    root = next(p for p in _OPEN)
    return _OPEN[root]


@pytest.mark.parametrize("what", READERS)
def test_a_reader_takes_or_refuses_hostile_files(root, what, tmp_path, tried):
    part, name, kind, read, says = READERS[what]
    _OPEN.setdefault(root, open_zoo(root / "zoo").checkpoints())
    top = part.split("/")[0]
    whole, found = (root / part / name).read_bytes(), []
    if kind == "header":
        n = int.from_bytes(whole[:8], "little")
        damage = json_like(whole[8 : 8 + n]).map(
            lambda v: (
                (text := json.dumps(v).encode())
                and len(text).to_bytes(8, "little") + text + whole[8 + n :]
            )
        )
    elif kind == "json":
        damage = json_like(whole).map(lambda v: json.dumps(v).encode()) | bytes_like(whole)
    elif kind == "lines":
        lines = whole.splitlines()
        damage = bytes_like(whole) | st.integers(0, len(lines) - 1).flatmap(
            lambda i: json_like(lines[i]).map(
                lambda v: b"\n".join([*lines[:i], json.dumps(v).encode(), *lines[i + 1 :], b""])
            )
        )
    else:
        damage = bytes_like(whole)
    shutil.copytree(root / top, tmp_path / top)

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(damage)
    def attack(blob):
        (tmp_path / part / name).write_bytes(blob)
        found.append(refused(lambda: read(tmp_path / part), tmp_path, says))

    attack()
    assert sum(found) > 5, "the damage is too mild to tell anything"
    tried(
        "hostile bytes and values",
        what,
        len(found),
        (
            "read, or refused in one line that names the file; no hang, no growth, no process,"
            " no pickle, no write elsewhere"
        ),
    )


# --- claims -----------------------------------------------------------------------------------


def swap_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def header(file, change):
    blob = file.read_bytes()
    n = int.from_bytes(blob[:8], "little")
    value = json.loads(blob[8 : 8 + n])
    change(value)
    text = json.dumps(value).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + n :])


def zipped(file, change, zeros=0):
    """Write the members of a zip anew, each as `change(name, bytes)` gives it; of those that it
    changes, the end may be megabytes of zeros, packed."""
    with zipfile.ZipFile(file) as z:
        held = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(
        file, "w", zipfile.ZIP_DEFLATED if zeros else zipfile.ZIP_STORED, compresslevel=1
    ) as z:
        for name, blob in held.items():
            with z.open(name, "w") as f:
                f.write(made := change(name, blob))
                for _ in range(zeros * (made != blob)):
                    f.write(bytes(2**20))


def array_claims(shape):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<f8", "fortran_order": False, "shape": shape}
    )
    return out.getvalue() + bytes(64)


def many_rows(file, n):
    "A small Parquet file with very many rows, all alike."
    table = pa.table(
        {
            "text": pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(n, np.int8)), pa.array(["a"])
            ),
            "label": pa.array(np.zeros(n, np.int8)),
        }
    )
    pq.write_table(table, file, compression="zstd")


FIRST = "classifier.dense.bias"
CLAIMS = {
    "a header of 2**63 bytes": (
        "safetensors header",
        lambda f: f.write_bytes((2**63).to_bytes(8, "little") + f.read_bytes()[8:]),
    ),
    "a header of a terabyte": (
        "safetensors header",
        lambda f: f.write_bytes((10**12).to_bytes(8, "little") + f.read_bytes()[8:]),
    ),
    "a header of 99 megabytes": (
        "safetensors header",
        lambda f: f.write_bytes((99 * 10**6).to_bytes(8, "little") + f.read_bytes()[8:]),
    ),
    "a tensor of a terabyte": (
        "safetensors header",
        lambda f: header(
            f, lambda v: v[FIRST].update(data_offsets=[0, 10**12], shape=[10**12 // 4])
        ),
    ),
    "a tensor whose size overflows": (
        "safetensors header",
        lambda f: header(f, lambda v: v[FIRST].update(shape=[2**32, 2**32, 2**32])),
    ),
    "a billion layers": ("config.json", lambda f: swap_json(f, num_hidden_layers=10**9)),
    "a million layers": ("config.json", lambda f: swap_json(f, num_hidden_layers=10**6)),
    "a billion labels": (
        "config.json",
        lambda f: swap_json(f, num_labels=10**9, id2label=None),
    ),
    "a vocabulary of 10**15": ("config.json", lambda f: swap_json(f, vocab_size=10**15)),
    "layers of 10**15": ("config.json", lambda f: swap_json(f, hidden_size=10**15)),
    "a pickle that unpacks to 300 megabytes": (
        "pickle in a zip",
        lambda f: zipped(
            f, lambda name, blob: blob + b"0" if name.endswith("data.pkl") else blob, 300
        ),
    ),
    "a storage of a terabyte": (
        "pickle in a zip",
        lambda f: zipped(
            f,
            lambda name, blob: (
                blob.replace(pickle.dumps(4, 2)[2:-1], pickle.dumps(2**38, 2)[2:-1])
                if name.endswith("data.pkl")
                else blob
            ),
        ),
    ),
    "a storage of a terabyte, of old": (
        "pickle of old",
        lambda f: f.write_bytes(
            f.read_bytes().replace(
                b"K\x04N", b"\x8a\x05" + (2**38).to_bytes(5, "little") + b"N"
            )
        ),
    ),
    "products of a terabyte": (
        "inner products",
        lambda f: zipped(
            f, lambda name, blob: array_claims((10**6, 10**5)) if name == "cells.npy" else blob
        ),
    ),
    "products of objects": (
        "inner products",
        lambda f: np.savez(
            f, names=np.array([{}], dtype=object), labels="[]", cells=np.zeros(1)
        ),
    ),
    "products that unpack to 300 megabytes": (
        "inner products",
        lambda f: zipped(
            f,
            lambda name, blob: array_claims((300, 2**17)) if name == "cells.npy" else blob,
            300,
        ),
    ),
    "50 million rows in some kilobytes": (
        "rows in Parquet",
        lambda f: many_rows(f, 50_000_000),
    ),
}
DEEP = [
    "config.json",
    "tokenizer.json",
    "index of shards",
    "manifest.json",
    "manifest.json of a member",
    "zoo.json",
    "datasets.json",
    "rows in JSON lines",
    "rows in JSON",
    "rows of a traversal",
    "measurements",
    "region.json",
    "about.json",
]


def hostile(root, what, tmp_path, make):
    "Make one file hostile and have it refused."
    part, name, _, read, says = READERS[what]
    top = part.split("/")[0]
    shutil.copytree(root / top, tmp_path / top)
    make(tmp_path / part / name)
    assert refused(lambda: read(tmp_path / part), tmp_path, says), "was read"


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_are_checked_before_memory_is_taken(root, claim, tmp_path, tried):
    what, make = CLAIMS[claim]
    hostile(root, what, tmp_path, make)
    tried(
        "a size that is claimed",
        f"{what}: {claim}",
        1,
        "refused at once, with less than 256 MB",
    )


@pytest.mark.parametrize("what", DEEP)
def test_nesting_without_end(root, what, tmp_path, tried):
    deep = (
        b'{"model": ' + b'{"a": ' * 100_000
        if what != "measurements"
        else b"# " + b'{"a": ' * 100_000 + b"\n"
    )
    hostile(
        root,
        what,
        tmp_path,
        lambda f: f.write_bytes(
            deep + b"\n" + (f.read_bytes() if what == "rows in JSON lines" else b"")
        ),
    )
    tried(
        "JSON nested a hundred thousand deep",
        what,
        1,
        "refused in one line that names the file",
    )


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["bin", "legacy", "plain pickle", "in a list", "products"])
def test_nothing_is_unpickled(root, kind, tmp_path, tried):
    trap = tmp_path / "sprung"
    what = {"legacy": "pickle of old", "products": "inner products"}.get(
        kind, "pickle in a zip"
    )

    def arm(file):
        if kind == "products":
            np.savez(
                file, names=np.array([Bomb(trap)], dtype=object), labels="[]", cells=np.zeros(1)
            )
        elif kind == "plain pickle":
            file.write_bytes(pickle.dumps({"w": Bomb(trap)}))
        else:
            torch.save(
                [Bomb(trap)] if kind == "in a list" else {"w": Bomb(trap)},
                file,
                _use_new_zipfile_serialization=kind != "legacy",
            )

    hostile(root, what, tmp_path, arm)
    assert not trap.exists()
    tried("a pickle that would run a command", f"{what}: {kind}", 1, "refused; nothing runs")


@pytest.mark.parametrize("what", ["safetensors bytes", "pickle in a zip", "pickle of old"])
def test_a_file_that_shrinks_while_it_is_open(root, what, tmp_path, tried):
    part, name, *_ = READERS[what]
    shutil.copytree(root / part, tmp_path / "here")

    def read():
        opened = open_checkpoint(tmp_path / "here")
        os.truncate(tmp_path / "here" / name, 1000)
        opened.sha256()

    ended, said = apart(read)
    assert ended >= 0, f"the interpreter died of signal {-ended}"
    assert ended == 1 and name in said if what != "pickle of old" else ended in (0, 1), said
    tried(
        "a file cut while it is open",
        what,
        1,
        "an error that names the file, or what was read before; the interpreter lives",
    )


def test_the_watch_sees(tmp_path):
    """The audit itself: it would see a process, an unpickling, a write elsewhere, a hang and
    growth."""
    for bad in (
        lambda: os.system("true"),
        lambda: pickle.loads(pickle.dumps(Path("x"))),
        lambda: open(tmp_path.parent / "elsewhere", "w").close(),
    ):
        with pytest.raises(AssertionError), watched(tmp_path):
            bad()
    (tmp_path.parent / "elsewhere").unlink()
    with pytest.raises(MemoryError), watched(tmp_path):
        bytearray(2**30)
    with watched(tmp_path):
        (tmp_path / "inside").write_text("fine")
