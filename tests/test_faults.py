"""Real faults at every stage: kills at each change of the disk, full and read-only disks,
damaged files, company, no network.

A stage is what writes: it is run in a process of its own, which is stopped, starved or
disturbed, and then run again; what it leaves must be the bytes of a run without a fault. What
was tried is counted, for the chapter on robustness: `pytest tests/test_faults.py
tests/test_fuzz.py tests/test_jobs.py --faults nbs/study/recorded/faults.csv`.
"""

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tqdm.auto import tqdm

from weightregions import contest, starting
from weightregions import building
from weightregions.advice import recommend
from weightregions.bases import base_identity, minilm, tiny_base
from weightregions.centering import centroid_of, save_centroid
from weightregions.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from weightregions.comparison import compare, measured
from weightregions.contest import StartExperiment, compare_all_starts
from weightregions.corpora import load_corpora
from weightregions.files import file_sha256
from weightregions.finetuning import Recipe, train
from weightregions.probing import Probing, Target, pooling_of
from weightregions.region import Region
from weightregions.similarity import gram, load_gram
from weightregions.starting import Search, Tuned
from weightregions.results import Study, write_rows
from weightregions.scales import SCALES
from weightregions.study import begin, similarity_rows
from weightregions.traversal import ScratchModel, load_in_memory, hull, read_rows, traverse
from weightregions.building import build_zoo
from weightregions.zoo import open_zoo

pytestmark = pytest.mark.xdist_group(
    "faults"
)  # one process makes what all of these tests look at

RECIPE = Recipe(steps=4, batch_size=8, learning_rate=2e-3)
LONG = Recipe(steps=20, batch_size=8, learning_rate=2e-3)
BRIEF = StartExperiment(
    sizes=(24,),
    seeds=1,
    curve=(),
    recipe=Recipe(steps=4, batch_size=8, trains="bitfit"),
    search=Search(rates=(2e-2,), evaluations=2),
    sample=30,
    n_test=20,
)
ALONE = pd.DataFrame({"a": [], "b": [], "share": []})


# --- what is run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, three datasets and a zoo; whoever trains what was trained before gets the same
    model again, so that it is the writing that is disturbed."""
    root, patch = tmp_path_factory.mktemp("world"), pytest.MonkeyPatch()
    base = str(tiny_base(root / "base", steps=2))
    corpora = load_corpora(
        "builtin", names=["films", "headlines", "meals"], n_train=30, n_test=20
    )
    seen = {}

    def remembered(base, corpus, recipe, seed):
        if (key := (corpus.sha256, seed)) not in seen:
            seen[key] = train(base, corpus, recipe, seed)
        return seen[key]

    def guessed(start, corpus, recipe, seed, search=None, device=None, method=None):
        a = (
            int(
                hashlib.sha256(f"{Path(start).name} {corpus.name} {seed}".encode()).hexdigest()[
                    :6
                ],
                16,
            )
            / 16**6
        )
        return Tuned(a, 1 - a, 0.01, 4, a, 24, 6, 20, method, None, None, None)

    patch.setattr(building, "train", remembered), patch.setattr(starting, "tune", guessed)
    build_zoo(root / "zoo", base, corpora, RECIPE, [1], workers=1)
    advice = recommend(open_zoo(root / "zoo"), corpora["headlines"], base, BRIEF.sample).assign(
        seconds=1.0
    )
    patch.setattr(contest, "recommend", lambda *_, **__: advice.copy())
    zoo, start = open_zoo(root / "zoo"), open_checkpoint(base, name="base")
    models = zoo.checkpoints()
    yield SimpleNamespace(
        root=root,
        base=base,
        corpora=corpora,
        zoo=zoo,
        models=models,
        start=start,
        members=[load_in_memory(m, head="drop") for m in models],
        scratch=ScratchModel(models[0], start),
        probing=Probing(Target(corpora["meals"], base, 16, 16, 16), pooling_of(base)),
        products=gram(models, start, by=lambda name: name.split(".")[0], progress=False),
    )
    patch.undo()


def a_zoo(world, folder):
    build_zoo(
        folder / "zoo", world.base, {"films": world.corpora["films"]}, RECIPE, [1], workers=1
    )


def some_products(world, folder):
    world.products.save(folder / "gram.npz")


def a_walk(world, folder):
    traverse(
        hull(world.members, 4),
        world.probing,
        world.scratch,
        folder / "rows.jsonl",
        progress=False,
    )


def many_losses(world, folder):
    loss = lambda name: [
        dict(
            target=t,
            loss=int(hashlib.sha256(f"{name} {t}".encode()).hexdigest()[:6], 16) / 16**6,
            remark=name * 900,
        )
        for t in "xy"
    ]
    compare(
        [("In", f"p{i}") for i in range(8)],
        loss,
        folder / "losses.csv",
        progress=False,
        identity={"probe": 1},
    )


def a_centroid(world, folder):
    save_centroid(centroid_of(world.zoo), folder / "centroid", world.base, overwrite=True)


def a_checkpoint(world, folder):
    write_checkpoint(world.models[0], world.models[0], folder / "written", overwrite=True)


def a_region(world, folder):
    if not (folder / "region").exists():
        Region.of(world.models, world.start, "all").save(folder / "region")


def a_contest(world, folder):
    compare_all_starts(
        world.zoo,
        {"headlines": world.corpora["headlines"]},
        world.base,
        folder / "starts",
        BRIEF,
        ALONE,
        workers=1,
    )


def a_study(world, folder):
    begin(folder, SCALES["tiny"], "builtin", world.base, world.corpora)
    write_rows(folder, "models", world.zoo.models.drop(columns="path"))
    similarity_rows(folder, "main", world.models, world.start)
    Study(folder).record(
        "page", [{"claim": "C1", "measure": "m", "ours": 0.5, "n": 3, "verdict": "holds"}]
    )


@dataclass(frozen=True)
class Stage:
    "Something that writes into a folder."

    name: str
    run: object


STAGES = [
    Stage("zoo", a_zoo),
    Stage("similarity", some_products),
    Stage("probing and traversal", a_walk),
    Stage("comparison", many_losses),
    Stage("centring", a_centroid),
    Stage("checkpoints", a_checkpoint),
    Stage("region", a_region),
    Stage("contest of starts", a_contest),
    Stage("study", a_study),
]
each_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
HEAVY = (
    "zoo",
    "centring",
    "checkpoints",
    "region",
    "contest of starts",
)  # write models, the others rows


def contents(folder):
    "SHA-256 of every file that can be seen, by relative path; logs tell the time and differ."
    found = {
        f.relative_to(folder): f
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != "log.jsonl"
    }
    return {
        str(name): file_sha256(f)
        for name, f in found.items()
        if not any(part.startswith(".") for part in name.parts)
    }


_UNBROKEN = {}


@pytest.fixture
def unbroken(world, stage, tmp_path_factory):
    """What a stage leaves when nothing happens; in this process, so that what it loads is at
    hand in its children."""
    if stage.name not in _UNBROKEN:
        folder = tmp_path_factory.mktemp("unbroken")
        stage.run(world, folder)
        _UNBROKEN[stage.name] = contents(folder)
    return _UNBROKEN[stage.name]


# --- processes that are disturbed -------------------------------------------------------------

CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
}


def changes(event, arguments, folder):
    """Whether an event of Python's audit changes what lies in a folder: names, or a file opened
    for writing."""
    if event == "open":
        written = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    else:
        written = event in CHANGES
    return bool(written) and any(
        isinstance(a, (str, os.PathLike)) and str(a).startswith(str(folder)) for a in arguments
    )


def apart(work, seconds=300, before=None):
    """Run `work` in a forked process: its exit code, minus the signal that ended it, and the
    one-line message of its error."""
    out, into = os.pipe()
    if not (child := os.fork()):
        try:
            os.close(out), signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.alarm(seconds)
            torch.set_num_threads(1)
            if before:
                before()
            code, said = 0, ""
            try:
                work()
            except (ValueError, OSError) as e:
                code, said = 1, str(e)
            except BaseException as e:
                code, said = 2, f"{type(e).__name__}: {e}"
            os.write(into, said.encode()[:4000])
        finally:
            os._exit(code)
    os.close(into)
    with open(out, "rb") as f:
        said = f.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def test_a_process_killed_while_it_draws_a_bar_keeps_no_other_waiting():
    def killed():
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    tqdm.get_lock()  # made before the fork
    assert apart(killed) == (-signal.SIGKILL, "")
    assert apart(lambda: list(tqdm([1], disable=True)), seconds=60) == (0, "")


def killed_at(n, folder):
    """A process that is killed, by itself and without warning, just before the n-th change that
    it would make to a folder."""

    def arm():
        left = iter(range(n - 1, -1, -1))

        def hook(event, arguments):
            if changes(event, arguments, folder) and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return arm


def killed_after(seconds):
    """A process that is killed by a child of its own, in the middle of whatever it does, such
    as writing a file in Rust."""

    def arm():
        victim = os.getpid()
        if os.fork():
            return
        time.sleep(seconds)
        if os.getppid() == victim:
            os.kill(victim, signal.SIGKILL)
        os._exit(0)

    return arm


def is_whole(folder, unbroken):
    """Whether all that can be seen is as an undisturbed run leaves it; of rows there may be
    fewer."""
    return all(
        digest == unbroken[name]
        for name, digest in contents(folder).items()
        if not name.endswith((".jsonl", ".csv"))
    )


@each_stage
def test_killed_before_every_change_of_the_disk(world, stage, unbroken, tmp_path, tried):
    n, ended = 0, None
    while ended != 0:
        n += 1
        folder = tmp_path / str(n)
        folder.mkdir()
        ended, said = apart(lambda: stage.run(world, folder), before=killed_at(n, folder))
        assert ended in (0, -signal.SIGKILL), said
        assert is_whole(folder, unbroken)
        assert apart(lambda: stage.run(world, folder)) == (0, "")
        assert contents(folder) == unbroken
        shutil.rmtree(folder)
    assert n > 2
    tried(
        "kill -9 before a change of the disk",
        stage.name,
        n - 1,
        "run again, it ends with the same bytes",
    )


@pytest.mark.parametrize("stage", [s for s in STAGES if s.name in HEAVY], ids=lambda s: s.name)
def test_killed_at_random_moments(world, stage, unbroken, tmp_path, tried):
    chance, folder, kills, start = random.Random(0), tmp_path / "here", 0, time.monotonic()
    assert apart(lambda: stage.run(world, tmp_path / "there")) == (0, "")
    longest = time.monotonic() - start
    while kills < 5:
        folder.mkdir(exist_ok=True)
        ended, said = apart(
            lambda: stage.run(world, folder), before=killed_after(chance.uniform(0, longest))
        )
        assert ended in (0, -signal.SIGKILL), said
        assert is_whole(folder, unbroken)
        kills += ended != 0
        if ended == 0:
            shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    assert apart(lambda: stage.run(world, folder)) == (0, "")
    assert contents(folder) == unbroken
    tried(
        "kill -9 at a random moment",
        stage.name,
        kills,
        "run again and again, it ends with the same bytes",
    )


def killed_in(owner, name, n):
    """A process that is killed, by itself and without warning, when it calls a method for the
    n-th time."""

    def arm():
        whole, left = getattr(owner, name), iter(range(n - 1, -1, -1))

        def counted(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(owner, name, counted)

    return arm


def a_fine_tuning(world, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "train", train)
        build_zoo(
            folder / "zoo", world.base, {"films": world.corpora["films"]}, LONG, [1], workers=1
        )


def some_inner_products(world, folder):
    gram(
        world.zoo.checkpoints(),
        world.start,
        by=lambda name: name.split(".")[0],
        block=1024,
        progress=False,
    ).save(folder / "gram.npz")


COMPUTES = {
    "zoo, while it fine-tunes": (a_fine_tuning, torch.optim.AdamW, "step", 20),
    "similarity, while it reads weights": (some_inner_products, Checkpoint, "read", 600),
}


@pytest.mark.parametrize("stage", COMPUTES)
def test_killed_while_it_computes(world, tmp_path, stage, tried):
    """Here nothing is remembered: a model is trained, and weights are read and multiplied, up
    to the kill and again after it."""
    work, owner, name, calls = COMPUTES[stage]
    chance, folder, kills, before = random.Random(0), tmp_path / "here", 8, contents(world.root)
    for there in (folder, tmp_path / "there"):
        there.mkdir()
    assert apart(lambda: work(world, tmp_path / "there")) == (0, "")
    for _ in range(kills):
        ended, said = apart(
            lambda: work(world, folder), before=killed_in(owner, name, chance.randint(1, calls))
        )
        assert ended == -signal.SIGKILL, said
        assert not [n for n in contents(folder) if n.endswith((".safetensors", ".npz"))], (
            "it was killed after its work"
        )
    assert apart(lambda: work(world, folder)) == (0, "")
    assert contents(folder) == contents(tmp_path / "there") and contents(world.root) == before
    tried("kill -9 while it computes", stage, kills, "run again, it ends with the same bytes")


@pytest.mark.parametrize(
    "stage",
    [s for s in STAGES if s.name in ("centring", "checkpoints", "study", "similarity")],
    ids=lambda s: s.name,
)
def test_killed_while_it_replaces_what_is_there(world, stage, unbroken, tmp_path, tried):
    n, ended, folder = 0, None, tmp_path / "here"
    folder.mkdir()
    stage.run(world, folder)
    while ended != 0:
        n += 1
        ended, said = apart(lambda: stage.run(world, folder), before=killed_at(n, folder))
        assert ended in (0, -signal.SIGKILL), said
        there = contents(folder)
        assert all(unbroken[name] == digest for name, digest in there.items())
        if (
            there != unbroken
        ):  # between two renames: the old and the new lie there whole, under hidden names
            hidden = [contents(f) for f in folder.iterdir() if f.name.startswith(".")]
            assert (
                len(
                    [
                        h
                        for h in hidden
                        if h and all(digest in unbroken.values() for digest in h.values())
                    ]
                )
                >= 2
            )
            assert apart(lambda: stage.run(world, folder)) == (0, "")
    assert contents(folder) == unbroken
    tried(
        "kill -9 while a result is replaced",
        stage.name,
        n - 1,
        "the old result or the new one, never a part",
    )


@pytest.mark.parametrize(
    "stage",
    [
        s
        for s in STAGES
        if s.name in ("probing and traversal", "comparison", "contest of starts")
    ],
    ids=lambda s: s.name,
)
def test_rows_cut_anywhere(world, stage, unbroken, tmp_path, tried):
    "What a power cut leaves: a file that ends anywhere."
    stage.run(world, tmp_path)
    file = next(
        f
        for f in sorted(tmp_path.rglob("*"))
        if f.name in ("rows.jsonl", "losses.csv", "rows.csv")
    )
    whole, chance = file.read_bytes(), random.Random(0)
    head = (
        0 if file.suffix == ".jsonl" else whole.index(b"\n", whole.index(b"\n") + 1) + 1
    )  # of a CSV file, identity and columns are written at once, beside and renamed
    cuts = [
        head,
        head + 1,
        len(whole) - 1,
        *(chance.randrange(head, len(whole)) for _ in range(9)),
    ]
    for cut in cuts:
        file.write_bytes(whole[:cut])
        stage.run(world, tmp_path)
        assert contents(tmp_path) == unbroken, cut
    tried(
        "rows that end anywhere, as after a power cut",
        stage.name,
        len(cuts),
        "the torn row is measured again, the same bytes",
    )


# --- disks that take no more ------------------------------------------------------------------


@contextmanager
def disk(folder, kilobytes):
    """A small disk of its own (tmpfs) at a folder, where this process may mount one; says
    whether it could."""
    folder.mkdir(exist_ok=True)
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder],
            capture_output=True,
        ).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def limited(n):
    "A process whose files may have n bytes: the full disk of those who may not mount one."

    def arm():
        (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)),
        )

    return arm


def clear(said, folder):
    "Whether a message of a disk that takes no more says what is wrong, and with which file."
    wrong = (
        any(
            os.strerror(e) in said
            for e in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES)
        )
        or "Read-only file system" in said
        or "No space left" in said
    )
    return wrong and str(folder) in said and "\n" not in said


@each_stage
def test_a_full_disk(world, stage, unbroken, tmp_path, tried):
    room, faults = 4096 if stage.name in HEAVY else 64, 0
    with disk(tmp_path / "disk", room) as mounted:
        for free in (0, 4, 40, 400, 900) if stage.name in HEAVY else (0, 4, 8, 16):
            folder = tmp_path / "disk" / "here"
            folder.mkdir()
            if mounted:
                status = os.statvfs(folder)
                (tmp_path / "disk" / "filler").write_bytes(
                    bytes(max(0, status.f_bavail * status.f_frsize - 1024 * free))
                )
            ended, said = apart(
                lambda: stage.run(world, folder),
                before=None if mounted else limited(1024 * free),
            )
            assert ended in (0, 1), said or f"ended by signal {-ended}"
            if ended:
                assert clear(said, tmp_path / "disk"), said
            assert not [f for f in folder.rglob(".*") if f.suffix != ".lock"], (
                "something half-written is left"
            )
            if mounted:
                (tmp_path / "disk" / "filler").unlink()
            assert apart(lambda: stage.run(world, folder)) == (0, "")
            assert contents(folder) == unbroken
            shutil.rmtree(folder)
            faults += ended
    assert faults
    tried(
        "a full disk",
        stage.name,
        faults,
        "an error that names the file; with room again, the same bytes",
        exact=False,
    )  # how much a file takes is the file system's affair


@contextmanager
def read_only(folder):
    """A folder in which nothing can be changed; root, whom permission bits do not stop, needs a
    disk that is mounted so."""
    mounted = os.path.ismount(folder)
    if not mounted and not os.geteuid():
        pytest.skip("root may write everywhere, and here it may not mount a disk")
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        else:
            folder.chmod(0o755)


@each_stage
def test_a_read_only_folder(world, stage, unbroken, tmp_path, tried):
    with disk(tmp_path / "disk", 4096):
        folder = tmp_path / "disk"
        with read_only(folder):
            ended, said = apart(lambda: stage.run(world, folder), seconds=20)
            assert ended == 1 and clear(said, folder), said or f"ended by {ended}"
        assert not list(folder.rglob("*"))
        stage.run(world, folder)
        assert contents(folder) == unbroken
        with read_only(
            folder
        ):  # finished work can be read, and where it would not be written again, asked for
            ended, said = apart(lambda: stage.run(world, folder), seconds=20)
            assert ended == 0 or clear(said, folder), said
            if stage.name in ("zoo", "probing and traversal"):
                assert ended == 0, said
        assert contents(folder) == unbroken
    tried(
        "a read-only folder",
        stage.name,
        2,
        "an error that names the file, nothing is changed; finished work can be read",
    )


# --- damage -----------------------------------------------------------------------------------


def damaged(world, folder, change):
    """A zoo of one model whose weights file was changed: the message with which it is refused,
    by opening it or by verifying it."""
    weights = folder / "zoo" / "films" / "seed-1" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(change(bytearray(whole)))
    try:
        zoo = open_zoo(folder / "zoo")
        zoo.checkpoints(), zoo.verify()
        return ""
    except ValueError as e:
        return str(e)
    finally:
        weights.write_bytes(whole)


def test_a_flipped_byte_anywhere_in_a_checkpoint(world, tmp_path, tried):
    a_zoo(world, tmp_path)
    weights, chance, n = (
        tmp_path / "zoo" / "films" / "seed-1" / "model.safetensors",
        random.Random(0),
        60,
    )
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    size = weights.stat().st_size
    places = [
        chance.randrange(header) if i % 2 else chance.randrange(header, size) for i in range(n)
    ]
    for place in places:
        bit = 1 << chance.randrange(8)

        def flip(data):
            data[place] ^= bit
            return data

        said = damaged(world, tmp_path, flip)
        assert "films/seed-1" in said and "\n" not in said, (place, said)
    tried(
        "a byte flipped in a checkpoint",
        "zoo",
        n,
        "refused when it is opened, or by verify(), with the model's name",
    )


def test_a_checkpoint_cut_anywhere(world, tmp_path, tried):
    a_zoo(world, tmp_path)
    before, model = contents(tmp_path), tmp_path / "zoo" / "films" / "seed-1"
    size, chance = (model / "model.safetensors").stat().st_size, random.Random(0)
    cuts = [0, 1, 7, 8, size - 1, *(chance.randrange(size) for _ in range(15))]
    for cut in cuts:
        said = damaged(world, tmp_path, lambda data: data[:cut])
        assert "films/seed-1/model.safetensors: damaged or truncated" in said, (cut, said)
    shutil.rmtree(model)  # what the message asks for
    a_zoo(world, tmp_path)
    assert contents(tmp_path) == before
    tried(
        "a checkpoint cut short",
        "zoo",
        len(cuts),
        (
            "refused when it is opened, with the file's name; removed and built again, the same"
            " bytes"
        ),
    )


# --- company ----------------------------------------------------------------------------------


def together(works):
    "Run several processes at once: how each ended and what it said."
    pipes, children = [], []
    for work in works:
        out, into = os.pipe()
        if not (child := os.fork()):
            code = 2
            try:
                (
                    signal.signal(signal.SIGALRM, signal.SIG_DFL),
                    signal.alarm(300),
                    torch.set_num_threads(1),
                )
                try:
                    work()
                    code = 0
                except (ValueError, OSError) as e:
                    code = 1
                    os.write(into, str(e).encode()[:4000])
                except BaseException as e:
                    os.write(into, repr(e).encode()[:4000])
            finally:
                os._exit(code)
        os.close(into), pipes.append(out), children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]
    return [(code, open(out, "rb").read().decode()) for code, out in zip(ended, pipes)]


@each_stage
def test_two_processes_at_once(world, stage, unbroken, tmp_path, tried):
    rounds = 3
    for i in range(rounds):
        folder = tmp_path / str(i)
        folder.mkdir()
        found = together([lambda: stage.run(world, folder)] * 2)
        assert 0 in [code for code, _ in found], found
        for code, said in found:
            assert code == 0 or code == 1 and str(folder) in said and "\n" not in said, said
        if stage.name in ("zoo", "probing and traversal", "comparison"):
            assert [code for code, _ in found] == [0, 0], found
        assert contents(folder) == unbroken
        if stage.name == "zoo":
            assert len((folder / "zoo" / "log.jsonl").read_text().splitlines()) == 1, (
                "a model was trained twice"
            )
    tried("two processes at once", stage.name, rounds, "no damage: the bytes of one")


# --- no network -------------------------------------------------------------------------------

ASKS = {
    "checkpoints": (lambda w: open_checkpoint("nobody/model-x"), "nobody/model-x"),
    "bases": (lambda w: minilm(), "all-MiniLM-L6-v2"),
    "zoo": (
        lambda w: build_zoo(
            w.root / "never", "nobody/model-x", w.corpora, RECIPE, [1], workers=1
        ),
        "nobody/model-x",
    ),
    "corpora": (lambda w: load_corpora("hub", names=["sst2"]), "sst2"),
}


@pytest.mark.parametrize("stage", ASKS)
def test_a_hub_out_of_reach(world, stage, tmp_path, tried):
    import huggingface_hub.constants as hub

    work, name = ASKS[stage]

    def cut_off(offline):
        def arm():
            from weightregions import bases

            bases.find_spec = lambda name: None  # as if the `offline` extra were not there
            time.sleep = lambda seconds: (
                None
            )  # the hub's client tries again after half a minute of waiting in all
            hub.HF_HUB_OFFLINE, hub.ENDPOINT, hub.HF_HUB_CACHE, hub.HF_HUB_ETAG_TIMEOUT = (
                offline,
                "http://127.0.0.1:9",
                str(tmp_path / "cache"),
                2,
            )
            hub.HUGGINGFACE_CO_URL_TEMPLATE = (
                hub.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
            )
            if "datasets" in sys.modules:
                (
                    sys.modules["datasets"].config.HF_HUB_OFFLINE,
                    sys.modules["datasets"].config.HF_ENDPOINT,
                ) = offline, hub.ENDPOINT

        return arm

    for offline in (True, False):
        ended, said = apart(lambda: work(world), 300, cut_off(offline))
        assert ended == 1 and name in said and "\n" not in said, (ended, said)
    assert not (world.root / "never").exists()
    tried(
        "a hub out of reach, or declared offline",
        stage,
        2,
        "an error that names what was asked for, and nothing is begun",
    )


def test_what_was_finished_is_read_back(world, tmp_path):
    "The bytes that all these tests compare mean something: every reader takes them."
    for stage in STAGES:
        stage.run(world, tmp_path)
    assert len(open_zoo(tmp_path / "zoo")) == 1 and load_gram(
        tmp_path / "gram.npz"
    ).names == tuple(world.zoo.models.model)
    assert (
        len(read_rows(tmp_path / "rows.jsonl")) == 4
        and len(measured(tmp_path / "losses.csv")) == 16
    )
    assert (
        open_checkpoint(tmp_path / "centroid").sha256()
        != open_checkpoint(tmp_path / "written").sha256()
    )
    assert Region.load(tmp_path / "region", world.start).name == "all" and base_identity(
        world.base
    )["sha256"] == file_sha256(Path(world.base) / "model.safetensors")
    assert (
        len(measured(tmp_path / "starts" / "rows.csv")) > 1
        and len(Study(tmp_path).matrix()) == 3
    )
