"""How a command ends: by a signal, by two, with nobody who reads; and what the next one makes
of it."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers

from weightregions import checkpoints, cli, traversal
from weightregions.bases import tiny_base
from weightregions.building import build_zoo
from weightregions.cli import main
from weightregions.corpora import load_corpora
from weightregions.files import file_sha256
from weightregions.finetuning import Recipe
from weightregions.zoo import open_zoo

pytestmark = pytest.mark.xdist_group("endings")
PROGRAM = Path(sys.executable).with_name("weightregions")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with a base, texts and a zoo."
    here = tmp_path_factory.mktemp("endings")
    tiny_base(here / "base", steps=2)
    corpora = load_corpora("builtin", ["films", "headlines"], n_train=60, n_test=40)
    for name, corpus in corpora.items():
        (here / "texts" / name).mkdir(parents=True)
        corpus.train.to_csv(here / "texts" / name / "train.csv", index=False)
        corpus.test.to_csv(here / "texts" / name / "test.csv", index=False)
    recipe = Recipe(steps=3, batch_size=8)
    build_zoo(here / "zoo", here / "base", corpora, recipe, [1, 2], workers=1)
    return here


def at_rest():
    "Signals as a terminal leaves them: what runs in the background ignores some."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for end in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(end, signal.SIG_DFL)


def command(line, folder, out=None, before=lambda: None):
    "Run a command, as if it were the process's own, in a fork: its exit code and what it said."
    (folder / "err.txt").unlink(missing_ok=True)
    if not (child := os.fork()):
        code = 1
        try:
            os.chdir(folder)
            torch.set_num_threads(1)
            opened = os.open("err.txt", os.O_CREAT | os.O_WRONLY)
            if out is not None:
                os.dup2(out, 1)
            os.dup2(opened, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            sys.argv = ["weightregions", *line.split()]
            at_rest()
            before()
            code = main()
            sys.stdout.flush()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, (folder / "err.txt").read_text()


def at(owner, name, do):
    "Do something when a function is called, and then call it."
    whole = getattr(owner, name)

    def both(*args, **kwargs):
        do()
        return whole(*args, **kwargs)

    return lambda: setattr(owner, name, both)


# --- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_in_good_order(here, end, tried):
    first = iter([True])

    def now():
        if next(first, False):
            os.kill(os.getpid(), end)

    line = f"center zoo --base base --out signal-{end.name}"
    code, err = command(line, here, before=at(checkpoints, "write_at", now))
    assert code == 128 + end and "Traceback" not in err, err
    assert err.splitlines()[-1].endswith("run the same command again to go on")
    assert not list(here.glob(f"*{end.name}*")) and not list(here.glob(f".*{end.name}*"))
    assert command(line, here)[0] == 0
    tried(
        f"{end.name} to a command", "center", 1, "one line, exit code 128 + n, nothing is left"
    )


class Garbage:
    "What asks to end while Python clears it up, where exceptions are lost."

    def __init__(self, end):
        self.end = end

    def __del__(self):
        os.kill(os.getpid(), self.end)
        while True:  # the handler runs between two of these
            time.sleep(0.01)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_not_lost_where_exceptions_are(here, end, tried):
    def cleared_up(waits, after):
        Garbage(end)  # and away with it
        time.sleep(waits)
        (here / f"{after}.txt").touch()

    for waits, goes_on in ((60, False), (0, True)):  # interrupted, or ended when it is done
        out = f"lost-{end.name}-{goes_on}"
        clear_up = at(cli, "_opened", lambda: cleared_up(waits, out))
        code, err = command(f"center zoo --base base --out {out}", here, before=clear_up)
        assert code == 128 + end and "Traceback" not in err and "ignored" not in err, err
        assert err.splitlines()[-1].endswith("run the same command again to go on")
        assert goes_on or not (here / f"{out}.txt").exists()
        assert not list(here.glob(f".{out}*"))
    how = "one line, exit code 128 + n, as at any other moment"
    tried(f"{end.name} where exceptions are lost", "center", 2, how)


def test_a_second_interrupt_ends_a_command_at_once(here, tried):
    def twice():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            while True:  # the handler runs between two of these
                time.sleep(0.01)
        finally:  # while it clears up
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.01)

    line = "center zoo --base base --out twice"
    # in the main thread, which signals interrupt; the threads that write go on
    assert command(line, here, before=at(checkpoints, "tensors_file", twice)) == (130, "")
    assert list(here.glob(".twice-*.part")) and not (here / "twice").exists()
    assert command(line, here)[0] == 0 and not list(here.glob(".twice-*"))
    outcome = "no traceback, exit code 130; the next run removes what is left"
    tried("a second Ctrl-C while it clears up", "center", 1, outcome)


def test_a_command_that_ignores_hang_ups_goes_on(here):
    def ignored():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at(checkpoints, "write_at", lambda: os.kill(os.getpid(), signal.SIGHUP))()

    assert command("center zoo --base base --out nohup", here, before=ignored)[0] == 0


def children(pid):
    done = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(word) for word in done.stdout.split()]


def is_running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it may end at any moment
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("ends", [[signal.SIGKILL], [signal.SIGTERM], [signal.SIGINT] * 2])
def test_no_worker_goes_on_when_a_command_has_ended(here, ends, tried):
    "The program itself, while two workers train."
    shutil.rmtree(here / "long", ignore_errors=True)
    line = "zoo base --data texts --steps 20000 --seeds 2 --out long --workers 2"
    child = subprocess.Popen(
        [PROGRAM, *line.split()],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=at_rest,
    )
    while len(list(here.glob("long/*/.seed-*.lock"))) < 2:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    pids = children(child.pid)
    assert len(pids) >= 2
    for end in ends:
        child.send_signal(end)
        time.sleep(0.2)
    err = child.communicate(timeout=60)[1]
    assert child.returncode == (-9 if ends[0] == signal.SIGKILL else 128 + ends[0])
    assert "Traceback" not in err and "semlock" not in err, err
    while any(map(is_running, pids)):
        time.sleep(0.05)
    assert not list(here.glob("long/*/seed-*"))
    how = " and ".join(end.name for end in ends)
    tried(f"{how}, with workers", "zoo", 1, "no worker goes on, no traceback")


# --- a disk that is full, and signals, while models are made -------------------------------

LINES = {
    "finetune": "finetune --start base --data texts/films --method head --rows 40 --steps 2",
    "zoo": "zoo base --data texts --datasets films --seeds 1 --rows 40 --steps 2 --workers 1",
    "traverse": "traverse zoo/films/seed-1 zoo/films/seed-2 --base base --data texts/films"
    " --rows 20 --points 2",
    "study": "study --scale tiny --workers 1",
}
MOMENTS = {  # while it computes, and while it writes
    "finetune": [(transformers.Trainer, "training_step"), (os, "fsync")],
    "zoo": [(transformers.Trainer, "training_step"), (os, "replace"), (os, "rename")],
    "traverse": [(traversal.ScratchModel, "load"), (os, "replace")],
    "study": [(transformers.Trainer, "training_step"), (os, "fsync")],
}


def is_part(path):
    return path.suffix in (".part", ".old")


@pytest.mark.parametrize("name", LINES)
def test_a_command_that_cannot_end_leaves_no_half(here, name, tried):
    out = here / f"full-{name}"
    line, ways = f"{LINES[name]} --out {out.name}", 0
    for most in (100, 3000):
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        code, err = command(line, here, before=limit)
        assert code == 2 and (most == 100 or "File too large: " in err), err
        ways += 1
    for moment in MOMENTS[name]:
        first = iter([True])
        now = lambda: next(first, False) and os.kill(os.getpid(), signal.SIGTERM)
        code, err = command(line, here, before=at(*moment, now))
        last = "weightregions: ended by SIGTERM; run the same command again to go on"
        assert code == 143 and err.splitlines()[-1] == last, err
        ways += 1
    assert "Traceback" not in err and not [p for p in here.rglob(".*") if is_part(p)]
    assert not list(out.rglob("model.safetensors"))
    if name == "finetune":
        assert not out.exists()
    if name != "study":  # it takes half a minute, and others kill it
        assert command(line, here)[0] == 0
    how = "one line, the exit code, nothing that is half written"
    tried("a file that may not grow, or SIGTERM", name, ways, how)


# --- a run that was killed, and the next ------------------------------------------------------


def test_center_goes_on_after_kills(here, tried):
    "Twice while it writes the weights, once when only its table is missing."

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    line = "center zoo --base base --out again"
    for _ in range(2):
        assert (
            command(line, here, before=at(checkpoints, "write_at", kill))[0] == -signal.SIGKILL
        )
        assert len(list(here.glob(".again-*.part"))) == 1
    assert command(line, here, before=at(cli, "_write", kill))[0] == -signal.SIGKILL
    assert (here / "again").is_dir() and not list(here.glob(".again-*"))
    before = file_sha256(here / "again" / "model.safetensors")
    code, err = command(line, here)
    assert code == 0 and "again: is there already, of the same models" in err
    assert (here / "again" / "members.csv").is_file()
    assert file_sha256(here / "again" / "model.safetensors") == before
    for other in (" --without films", " --dtype bfloat16"):
        code, err = command(line + other, here)
        assert code == 2 and "again: exists already, and is another model" in err
    assert file_sha256(here / "again" / "model.safetensors") == before
    outcome = "the next run removes what is left, keeps what is whole, and ends well"
    tried("kill -9 of a command", "center", 3, outcome)


def test_similarity_goes_on_after_kills(here, tried):
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    line, kills = "similarity zoo --base base --out likeness", 4
    for n in range(1, kills + 1):
        left = iter(range(n - 1, -1, -1))
        flushed = at(os, "fsync", lambda: next(left) == 0 and kill())
        assert command(line, here, before=flushed)[0] == -signal.SIGKILL
        assert len(list((here / "likeness").glob(".*"))) == 1
    assert command(line, here)[0] == 0
    assert not list((here / "likeness").glob(".*"))
    outcome = "the next run removes what is left, keeps what is whole, and ends well"
    tried("kill -9 of a command", "similarity", kills, outcome)


# --- nobody reads -----------------------------------------------------------------------------

TABLES = {"similarity.csv", "groups.csv", "scores.csv", "similarity.png", "map.png"}
TABLES |= {"explore.html", "plotly.min.js"}  # the page to play with


def closed_pipe():
    out, into = os.pipe()
    os.close(out)
    return into


@pytest.mark.parametrize("output", ["closed pipe", "full disk", "closed"])
def test_output_that_breaks_loses_no_file(here, output, tried):
    shutil.rmtree(here / "unread", ignore_errors=True)
    into, before = None, lambda: None
    if output == "closed":
        before = closed_output
    elif output == "full disk":
        into = os.open("/dev/full", os.O_WRONLY)
    else:
        into = closed_pipe()
    line = "similarity zoo --base base --out unread"
    code, err = command(line, here, into, before)
    assert {f.name for f in (here / "unread").iterdir()} == TABLES
    assert len(pd.read_csv(here / "unread" / "groups.csv")) == len(open_zoo(here / "zoo"))
    assert "Traceback" not in err and "Broken" not in err
    assert code == (2 if output == "full disk" else 0), err
    last = "standard output: No space left on device; all files are written"
    assert (last in err) == (output == "full disk")
    tried(f"standard output: {output}", "similarity", 1, "all files are written, no traceback")


def closed_output():
    os.close(1)
    sys.stdout = None


def test_a_reader_who_has_enough(here):
    "The program itself: Python's own complaint comes when the process ends."
    shutil.rmtree(here / "unread", ignore_errors=True)
    with open(here / "errors.txt", "wb") as errors:
        child = subprocess.Popen(
            [PROGRAM, "similarity", "zoo", "--base", "base", "--out", "unread"],
            cwd=here,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        child.stdout.close()
        assert child.wait(timeout=120) == 0
    assert {f.name for f in (here / "unread").iterdir()} == TABLES
    assert "Broken" not in (here / "errors.txt").read_text()


def test_errors_that_nobody_reads(here):
    def no_errors():
        os.dup2(closed_pipe(), 2)

    assert command("center zoo --base base --out silent", here, before=no_errors)[0] == 0
    assert (here / "silent" / "members.csv").is_file()
