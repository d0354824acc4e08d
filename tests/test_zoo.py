"""A folder of models: what is a model of it, what is left out, and which bytes the numbers
belong to."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from weightregions.advice import candidates, recommend
from weightregions.bases import base_identity, tiny_base
from weightregions.building import build_zoo
from weightregions.centering import centroid_of, save_centroid
from weightregions.checkpoints import copy_tokenizer, open_checkpoint, write_checkpoint
from weightregions.contest import StartExperiment, compare_all_starts
from weightregions.corpora import load_corpora
from weightregions.files import file_sha256
from weightregions.finetuning import Recipe
from weightregions.identity import model_identity, seen_sha256, weights_sha256
from weightregions.region import regions_of
from weightregions.zoo import gather, open_zoo, read_manifest

pytestmark = pytest.mark.xdist_group("zoo")  # one process makes what all of these tests look at

RECIPE = Recipe(steps=3, batch_size=8)
SEEDS = [1, 2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base", steps=2)


@pytest.fixture(scope="module")
def corpora():
    return load_corpora("builtin", names=["films", "headlines"], n_train=40, n_test=20)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, base, corpora):
    folder = tmp_path_factory.mktemp("unbroken") / "zoo"
    build_zoo(folder, base, corpora, RECIPE, SEEDS, workers=1)
    return folder


def test_models_of_others_open_as_ours_do(tmp_path, unbroken):
    ours = open_zoo(unbroken)
    listed = ours.models.assign(
        model=[str(Path(p).relative_to(unbroken)) for p in ours.models.path]
    )[["model", "dataset", "family"]]
    shutil.copytree(
        unbroken,
        tmp_path / "theirs",
        ignore=shutil.ignore_patterns("zoo.json", "manifest.json"),
    )
    listed.to_csv(tmp_path / "theirs" / "models.csv", index=False)
    theirs = open_zoo(tmp_path / "theirs")
    assert [c.sha256() for c in theirs.checkpoints()] == [
        c.sha256() for c in ours.checkpoints()
    ]
    assert theirs.models.seed.tolist() == ours.models.seed.tolist()


def test_folders_without_a_table_open_too(tmp_path, base, unbroken, monkeypatch):
    shutil.copytree(
        unbroken,
        tmp_path / "runs",
        ignore=shutil.ignore_patterns("zoo.json", "manifest.json", ".*"),
    )
    (
        tmp_path / "runs" / "films" / "seed-1" / "checkpoint-2"
    ).mkdir()  # what lies in a checkpoint is not looked at
    shutil.copy(
        unbroken / "films" / "seed-1" / "config.json", tmp_path / "runs" / "films"
    )  # a configuration alone is no checkpoint
    shutil.copytree(base, tmp_path / "runs" / "alone")
    zoo, ours = open_zoo(tmp_path / "runs"), open_zoo(unbroken)
    assert zoo.models.model.tolist() == [
        "alone",
        *ours.models.model,
    ] and zoo.models.dataset.tolist() == ["alone", *ours.models.dataset]
    assert set(zoo.models.family) == {"unknown"} and zoo.models.seed.tolist() == [
        1,
        *ours.models.seed,
    ]
    assert [c.sha256() for c in zoo.checkpoints()[1:]] == [
        c.sha256() for c in ours.checkpoints()
    ]
    monkeypatch.chdir(tmp_path / "runs" / "films")
    assert gather(
        ["seed-2", "../films/seed-1", "../headlines/seed-1"]
    ).models.model.tolist() == ["films/seed-2", "films/seed-1", "headlines/seed-1"]
    assert (
        gather(".").models.model.tolist() == ["seed-1", "seed-2"]
        and gather(".").name == "films"
    )
    with pytest.raises(ValueError, match="films/seed-1: is given twice"):
        gather(["seed-1", "../films/seed-1", "../headlines/seed-1"])


def test_what_cannot_be_gathered_is_named(tmp_path, unbroken):
    shutil.copytree(
        unbroken, tmp_path / "runs", ignore=shutil.ignore_patterns("zoo.json", ".*")
    )
    film = tmp_path / "runs" / "films" / "seed-2"
    whole = (film / "manifest.json").read_text()
    (film / "manifest.json").write_text(whole[:40])
    with pytest.raises(ValueError, match="seed-2/manifest.json: not JSON"):
        gather(tmp_path / "runs")
    (film / "manifest.json").write_text("[]")  # of another tool
    assert gather(tmp_path / "runs").models.family.tolist() == [
        "sentiment",
        "unknown",
        "topic",
        "topic",
    ]
    (film / "config.json").write_text('{"model_type": "of my own"}')
    with pytest.raises(ValueError, match="seed-2/config.json: model_type 'of my own'"):
        gather(tmp_path / "runs")
    shutil.rmtree(film), shutil.rmtree(tmp_path / "runs" / "headlines")
    with pytest.raises(ValueError, match="seed-1: is the only checkpoint"):
        gather(tmp_path / "runs")
    shutil.rmtree(film.parent)
    with pytest.raises(FileNotFoundError, match="runs: no checkpoint"):
        gather(tmp_path / "runs")
    (tmp_path / "damaged" / "films" / "seed-1").mkdir(parents=True)
    shutil.copy(unbroken / "zoo.json", tmp_path / "damaged")
    (tmp_path / "damaged" / "films" / "seed-1" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not the manifest of a model"):
        open_zoo(tmp_path / "damaged")


def test_a_flipped_weight_changes_the_hash(tmp_path, unbroken):
    shutil.copytree(unbroken, tmp_path / "zoo")
    model = open_zoo(tmp_path / "zoo").models.path[0]
    clean = open_zoo(tmp_path / "zoo").checkpoints()[0].sha256()
    weights = Path(model) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert open_zoo(tmp_path / "zoo").checkpoints()[0].sha256() != clean


# --- what is left out -------------------------------------------------------------------------

CONFIG = transformers.BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=32,
)


def bert(folder, seed=None, dtype=torch.float32, kind=transformers.BertModel):
    "A small model; with a seed it moved a little from the one without."
    torch.manual_seed(0)
    model = kind(CONFIG)
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for p in model.base_model.parameters() if seed is not None else ():
            p += 1e-3 * torch.randn(p.shape, generator=generator)
    model.to(dtype).save_pretrained(folder)
    return Path(folder)


@pytest.fixture
def heap(tmp_path):
    "Two models, a and b, in a folder, and their base beside it."
    bert(tmp_path / "base")
    for i, name in enumerate("ab"):
        bert(tmp_path / "heap" / name, seed=i + 1)
    return tmp_path / "heap"


def silently(opened, *args, **how):
    "A zoo, and what was said of it."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zoo = opened(*args, **how)
    return zoo, [str(w.message) for w in caught]


LEFT_OUT = {  # what lies in a folder, and a word of the reason
    "weights without a configuration": (["model.safetensors"], "without config.json"),
    "shards without a configuration": (
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
        "without config.json",
    ),
    "a PEFT adapter": (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
    "an adapter with a configuration": (["adapter_model.bin", "config.json"], "adapter"),
    "an adapter beside weights": (
        ["adapter_config.json", "model.safetensors", "config.json"],
        "adapter",
    ),
    "TensorFlow": (["tf_model.h5", "config.json"], "TensorFlow"),
    "TensorFlow's first checkpoints": (["bert_model.ckpt.index"], "TensorFlow"),
    "Flax": (["flax_model.msgpack", "config.json"], "Flax"),
    "GGUF": (["model.Q4_K_M.gguf"], "GGUF"),
    "ONNX": (["model.onnx", "config.json"], "ONNX"),
    "weights of another name": (["consolidated.00.pth", "config.json"], "consolidated.00.pth"),
    "shards without an index": (
        ["model-00001-of-00002.safetensors", "config.json"],
        "model-00001-of-00002.safetensors",
    ),
    "a configuration without weights": (
        ["config.json", "training_args.bin"],
        "without weights",
    ),
}


def filled(folder, files):
    "A folder with files of these names."
    folder.mkdir(parents=True)
    for file in files:
        text = '{"model_type": "bert"}' if file == "config.json" else "x"
        if file.endswith("index.json"):
            text = json.dumps({"weight_map": {"x": files[1]}})
        (folder / file).write_text(text)


def test_weights_that_are_not_taken_are_named(heap, tried):
    places = ["c", "d/c", "a/c", ".c", "d/e/f/c"]
    for place in places:
        for files, reason in LEFT_OUT.values():
            filled(heap / place, files)
            zoo, lines = silently(gather, heap)
            assert zoo.models.model.tolist() == ["a", "b"]
            assert zoo.left_out.folder.tolist() == [place] and reason in zoo.left_out.reason[0]
            assert len(lines) == 1 and f"left out: {place}: " in lines[0] and reason in lines[0]
            shutil.rmtree(heap / place)
    tried(
        "adapters, other formats, weights without a configuration",
        "folder of models",
        len(places) * len(LEFT_OUT),
        "left out by name, with the reason",
    )


@pytest.mark.parametrize(
    "place, reason",
    [
        ("a/c", "inside of the model a"),
        (".c", "starts with a dot"),
        ("d/e/c", "deeper than two levels"),
        ("d/e/f/c", "deeper than two levels"),
    ],
)
def test_a_checkpoint_in_another_place_is_named(heap, place, reason):
    bert(heap / place, seed=7)
    zoo, lines = silently(gather, heap)
    assert zoo.models.model.tolist() == ["a", "b"] and len(lines) == 1
    assert zoo.left_out.folder.tolist() == [place] and reason in zoo.left_out.reason[0]


def test_what_leaves_nothing_is_said_in_the_error(heap):
    for name in "ab":
        (heap / name / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="no checkpoint .* a, b: weights without config"
    ):
        gather(heap)


def test_folders_that_a_table_does_not_list_are_named(heap, unbroken, tmp_path):
    (heap / "models.csv").write_text("model,dataset,family\na,x,f\nb,y,f\n")
    bert(heap / "c", seed=3)
    zoo, lines = silently(open_zoo, heap)
    assert (
        zoo.left_out.values.tolist() == [["c", "not listed in models.csv"]] and len(lines) == 1
    )
    assert len(open_zoo(heap / "models.csv").left_out) == 0  # the table alone, no folder
    shutil.copytree(unbroken, tmp_path / "zoo")
    (tmp_path / "zoo" / "films" / "seed-2" / "manifest.json").unlink()
    zoo, lines = silently(open_zoo, tmp_path / "zoo")
    assert zoo.left_out.values.tolist() == [["films/seed-2", "no finished model of this zoo"]]


def steps(heap, run, *numbers):
    for n in numbers:
        bert(heap / run / f"checkpoint-{n}", seed=n)


def test_the_steps_of_a_run_are_one_model(heap, tried):
    steps(heap, "run", 9, 20, 100)
    steps(heap, "deep/run", 7)
    zoo, lines = silently(gather, heap)
    assert zoo.models.model.tolist() == [
        "a",
        "b",
        "deep/run/checkpoint-7",
        "run/checkpoint-100",
    ]
    assert set(zoo.left_out.folder) == {"run/checkpoint-9", "run/checkpoint-20"}
    assert len(lines) == 1 and "--all-checkpoints" in lines[0]
    assert len(open_zoo(heap, all_checkpoints=True)) == 6
    bert(heap / "run", seed=1000)  # the final model
    zoo, _ = silently(gather, heap)
    assert zoo.models.model.tolist()[-1] == "run" and len(zoo.left_out) == 3
    assert len(gather(heap, all_checkpoints=True)) == 7
    (heap / "run" / "config.json").unlink()
    (heap / "run" / "checkpoint-100" / "model.safetensors").unlink()  # torn: the one before
    zoo, _ = silently(gather, heap)
    assert zoo.models.model.tolist()[-1] == "run/checkpoint-20"
    assert "run/checkpoint-100" in zoo.left_out.folder.tolist()
    tried("several checkpoints of one run", "folder of models", 4, "one model, the last")


def test_a_run_among_several_paths_is_its_last_step(heap):
    steps(heap, "run", 9, 20)
    zoo, lines = silently(gather, [heap / "a", heap / "run"])
    assert [Path(p).name for p in zoo.models.path] == ["a", "checkpoint-20"] and len(lines) == 1
    both = [heap / "run" / "checkpoint-9", heap / "run" / "checkpoint-20"]
    assert len(gather(both)) == 2  # these were asked for
    with pytest.raises(ValueError, match="only checkpoint.*checkpoint-9.*--all-checkpoints"):
        gather(heap / "run")
    assert len(gather(heap / "run", all_checkpoints=True)) == 2


LINKS = {
    "to a folder": lambda heap: (heap / "c").symlink_to("a"),
    "absolute": lambda heap: (heap / "c").symlink_to(heap / "a"),
    "that comes first": lambda heap: (heap / "Z").symlink_to("a"),
    "from a folder": lambda heap: ((heap / "d").mkdir(), (heap / "d" / "c").symlink_to("../a")),
    "of the weights": lambda heap: linked(heap, os.symlink),
    "hard, of the weights": lambda heap: linked(heap, os.link),
}


def linked(heap, link):
    (heap / "c").mkdir()
    shutil.copy(heap / "a" / "config.json", heap / "c")
    link(heap / "a" / "model.safetensors", heap / "c" / "model.safetensors")


@pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)
def test_a_link_to_a_model_does_not_count_twice(heap, make):
    make(heap)
    zoo, lines = silently(gather, heap)
    assert zoo.models.model.tolist() == ["a", "b"]
    assert zoo.left_out.reason.tolist() == ["the same files as a"] and len(lines) == 1
    other = heap / zoo.left_out.folder[0]
    assert silently(gather, [heap / "a", heap / "b", other])[0].models.model.tolist() == [
        "a",
        "b",
    ]
    (heap / "models.csv").write_text(
        f"model,dataset,family\na,x,f\n{zoo.left_out.folder[0]},x,f\nb,y,f\n"
    )
    assert silently(open_zoo, heap)[0].models.model.tolist() == ["a", "b"]


def test_links_in_a_circle_come_to_an_end(heap):
    (heap / "a" / "round").symlink_to("..")
    (heap / "up").symlink_to("../..")
    assert gather(heap).models.model.tolist() == ["a", "b"]


# --- the base among the models ----------------------------------------------------------------


STILL = {
    "the same folder": lambda heap: (heap / "c").symlink_to("../base"),
    "a copy": lambda heap: shutil.copytree(heap.parent / "base", heap / "c"),
    "with a head": lambda heap: bert(
        heap / "c", kind=transformers.BertForSequenceClassification
    ),
    "in bfloat16": lambda heap: bert(heap / "c", dtype=torch.bfloat16),
    "in float64": lambda heap: bert(heap / "c", dtype=torch.float64),
}


@pytest.mark.parametrize("make", STILL.values(), ids=STILL)
def test_the_base_among_the_models_is_left_out(heap, make):
    make(heap)
    base = heap.parent / "base"
    if (heap / "c").is_dir() and not (heap / "c").is_symlink():
        write_checkpoint(
            dict(open_checkpoint(base).state(open_checkpoint(heap / "c").layout.dtypes[0])),
            open_checkpoint(heap / "c"),
            heap / "c",
            overwrite=True,
        )
    zoo, lines = silently(gather(heap).checked, base)
    assert zoo.models.model.tolist() == ["a", "b"] and zoo.left_out.folder.tolist() == ["c"]
    assert len(lines) == 1 and "c: the base" in lines[0]
    assert zoo.checked(base) is zoo


def test_a_zoo_of_nothing_but_its_base_is_refused(heap):
    for name in "ab":
        shutil.rmtree(heap / name)
        shutil.copytree(heap.parent / "base", heap / name)
    with pytest.raises(ValueError, match="heap: no model remains; left out: a, b: the base"):
        gather(heap).checked(heap.parent / "base")


# --- identity ---------------------------------------------------------------------------------


def moved(folder, scale=0.3):
    "Add noise to the weights of a folder."
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name, t in state.items():
        if t.is_floating_point() and t.numel() > 1:
            state[name] = t + scale * t.std() * torch.randn(t.shape, generator=generator)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def other_words(folder):
    "Swap two tokens of a tokenizer."
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(tokenizer))


USES = {
    "checked": lambda zoo, base, corpora: zoo.checked(base),
    "candidates": lambda zoo, base, corpora: candidates(zoo, corpora["meals"], base),
    "recommend": lambda zoo, base, corpora: recommend(zoo, corpora["meals"], base, 20),
    "regions_of": lambda zoo, base, corpora: regions_of(zoo, base, progress=False),
    "compare_all_starts": lambda zoo, base, corpora: compare_all_starts(
        zoo, corpora, base, Path(base).parent / "starts", StartExperiment(), None, workers=1
    ),
}


@pytest.mark.parametrize(
    "what, change", [("noise on its weights", moved), ("another tokenizer", other_words)]
)
def test_another_base_is_refused(tmp_path, base, unbroken, what, change, tried):
    shutil.copytree(base, tmp_path / "base")
    change(tmp_path / "base")
    corpora = load_corpora("builtin", names=["meals"], n_train=40, n_test=20)
    problem = (
        "is not the base of unbroken|is not the base of zoo|other tokens in its vocabulary"
    )
    for zoo in (open_zoo(unbroken), gather(unbroken)):  # zoo.json, and manifests alone
        for use in USES.values():
            with pytest.raises(ValueError, match=problem):
                use(zoo, tmp_path / "base", corpora)
    tried(f"a base with {what}", "functions of a zoo", 2 * len(USES), "refused")


def damaged(folder):
    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if n.endswith("query.weight"))
    state[name] = state[name].roll(1)
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "model.safetensors")


def as_pickle(folder):
    "The same weights, in another file than the one of the manifest."
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "what, change",
    [("a model that was replaced", damaged), ("a pickle in place of safetensors", as_pickle)],
)
def test_a_model_of_other_bytes_is_named(tmp_path, base, unbroken, what, change, tried):
    shutil.copytree(unbroken, tmp_path / "zoo")
    change(tmp_path / "zoo" / "films" / "seed-2")
    corpora = load_corpora("builtin", names=["meals"], n_train=40, n_test=20)
    for name, use in USES.items():
        with pytest.raises(ValueError, match="films/seed-2: the weights in .* manifest.json"):
            use(open_zoo(tmp_path / "zoo"), base, corpora)
    centre = centroid_of(open_zoo(tmp_path / "zoo"))
    with pytest.raises(ValueError, match="films/seed-2: its weights are not those"):
        save_centroid(centre, tmp_path / "centre", base)
    assert not (tmp_path / "centre").exists()
    tried(what, "functions of a zoo", len(USES) + 1, "refused by name")


def test_a_card_has_the_hashes_of_the_bytes_that_were_read(tmp_path, base, unbroken):
    zoo = open_zoo(unbroken).checked(base)
    save_centroid(centroid_of(zoo), tmp_path / "centre", base)
    card = (tmp_path / "centre" / "README.md").read_text()
    assert all(file_sha256(Path(p) / "model.safetensors") in card for p in zoo.models.path)


def test_a_hash_is_computed_again_when_a_file_changes(tmp_path):
    file = tmp_path / "model.safetensors"
    for text in (b"one", b"two", b"six"):
        file.write_bytes(text)
        os.utime(file, ns=(10**18, 10**18))  # the same size and time
        assert seen_sha256(file) == weights_sha256(tmp_path) == file_sha256(file)


def test_an_identity_is_the_one_that_a_zoo_records(base):
    recorded = base_identity(base)
    ours = model_identity(base)
    assert {k: ours[k] for k in recorded if k != "name"} == {
        k: v for k, v in recorded.items() if k != "name"
    }


# --- tables and manifests ---------------------------------------------------------------------


def not_regular(file, kind):
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        with open(file, "wb") as f:
            f.truncate(2**40)


@pytest.mark.timeout(60)
def test_only_regular_files_of_some_size_are_read(tmp_path, unbroken, tried):
    tables, kinds = ["zoo.json", "films/seed-1/manifest.json", "models.csv"], 4
    for name in tables:
        for kind in ("pipe", "device", "folder", "a million megabytes"):
            zoo = shutil.copytree(unbroken, tmp_path / "zoo")
            if name == "models.csv":
                (zoo / "zoo.json").unlink()
                (zoo / "models.csv").write_text("")
            not_regular(zoo / name, kind)
            with pytest.raises(ValueError, match=f"{name}: (is no regular file|has more than)"):
                open_zoo(zoo)
            shutil.rmtree(zoo)
    tried(
        "a pipe, a device, a folder, a huge file",
        "zoo.json, manifest.json, models.csv",
        len(tables) * kinds,
        "refused at once in one line that names the file",
    )


VALUES = [None, "", 7, -1, 1.5, True, [], {}, "x" * 64, float("nan"), "\x1b[31m"]
FIELDS = {
    "dataset": {"x" * 64},
    "family": {"x" * 64},
    "seed": {7},
    "base": set(),
    "base.sha256": set(),
    "data.source": {"x" * 64, "\x1b[31m"},
    "data.n_train": {7},
    "metrics": set(),
    "metrics.accuracy": set(),
    "metrics.majority": set(),
    "metrics.n_test": {7},
    "weights": set(),
    "weights.sha256": set(),
}


def test_the_fields_of_a_manifest_are_checked(tmp_path, unbroken, tried):
    whole, wrong = read_manifest(unbroken / "films" / "seed-1"), 0
    for key, right in FIELDS.items():
        *outer, last = key.split(".")
        for value in VALUES:
            about = json.loads(json.dumps(whole))
            (about[outer[0]] if outer else about)[last] = value
            (tmp_path / "manifest.json").write_text(json.dumps(about))
            if type(value) in (str, int) and value in right:
                assert read_manifest(tmp_path)
                continue
            with pytest.raises(ValueError, match=f"manifest.json: {key}.* is not a"):
                read_manifest(tmp_path)
            wrong += 1
    tried("a field of another kind", "manifest.json", wrong, "refused, the field named")


@pytest.mark.parametrize(
    "row, problem",
    [
        ("a,x,f,1,good", "accuracy 'good' is no number"),
        ("a,x,f,one,0.5", "the seed 'one' is no number"),
        (",x,f,1,0.5", "must not be empty"),
        ("../a,x,f,1,0.5", "points outside the folder"),
    ],
)
def test_the_cells_of_a_table_are_checked(heap, row, problem):
    file = heap / "models.csv"
    file.write_text(f"model,dataset,family,seed,accuracy\nb,y,f,1,\n{row}\n")
    with pytest.raises(ValueError, match=f"models.csv, row 3: .*{problem}"):
        open_zoo(heap)


# --- what goes with the weights ---------------------------------------------------------------


def test_a_centroid_takes_no_code_and_nothing_from_elsewhere(tmp_path, base, unbroken, tried):
    start = shutil.copytree(base, tmp_path / "base")
    (start / "tokenization_evil.py").write_text("raise SystemExit")
    (start / "vocab.py").write_text("raise SystemExit")
    for name in ("config.json", "tokenizer_config.json"):
        about = json.loads((start / name).read_text()) | {"auto_map": {"AutoTokenizer": "x.Y"}}
        (start / name).write_text(json.dumps(about))
    save_centroid(centroid_of(open_zoo(unbroken)), tmp_path / "centre", start)
    written = {f.name: f.read_bytes() for f in (tmp_path / "centre").iterdir()}
    assert not [name for name in written if name.endswith(".py")]
    assert not [name for name, data in written.items() if b"auto_map" in data]
    assert written["tokenizer.json"] == (base / "tokenizer.json").read_bytes()
    (tmp_path / "secret").write_text("secret")
    (start / "vocab.txt").symlink_to(tmp_path / "secret")
    for write in (
        lambda out: save_centroid(centroid_of(open_zoo(unbroken)), out, start),
        lambda out: write_checkpoint(open_checkpoint(start), open_checkpoint(start), out),
    ):
        with pytest.raises(ValueError, match="vocab.txt: is a link out of its folder"):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    tried("code and links beside a tokenizer", "center", 4, "not copied")


def test_the_links_of_a_hub_snapshot_are_followed(tmp_path, base):
    repo = tmp_path / "models--some--base"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, repo / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(snapshot, tmp_path / "copy")
    for file in (tmp_path / "copy").iterdir():
        assert file.read_bytes() == (base / file.name).read_bytes()
    assert (tmp_path / "copy" / "tokenizer.json").exists()
    (snapshot / "merges.txt").unlink(missing_ok=True)
    (snapshot / "merges.txt").symlink_to("../../../elsewhere")
    (tmp_path / "elsewhere").write_text("secret")
    with pytest.raises(ValueError, match="merges.txt: is a link out of its folder"):
        copy_tokenizer(snapshot, tmp_path / "copy")
