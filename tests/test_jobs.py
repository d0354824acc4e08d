"""The same jobs give the same bytes in this process, in many, and on a Ray cluster; whoever
dies costs its own job only."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from torch.optim.optimizer import register_optimizer_step_pre_hook

from weightregions import jobs
from weightregions import building
from weightregions.bases import tiny_base
from weightregions.contest import StartExperiment, compare_all_starts
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe
from weightregions.jobs import agreed, places, ranks, run_jobs, start_ray
from weightregions.starting import Search
from weightregions.walks import TraversalBudget, PathSpec, measure_paths
from weightregions.building import build_zoo
from weightregions.zoo import open_zoo

pytestmark = pytest.mark.xdist_group(
    "jobs"
)  # one process makes what all of these tests look at
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason='no Ray: pip install "weightregions[ray]"'
)
every_backend = pytest.mark.parametrize(
    "backend", ["processes", pytest.param("ray", marks=needs_ray)]
)

RECIPE = Recipe(steps=3, batch_size=8)
BUDGET = TraversalBudget(inside=1, n_train=24, n_test=20)
BRIEF = StartExperiment(
    sizes=(24,),
    seeds=1,
    curve=(),
    recipe=Recipe(steps=3, batch_size=8, trains="bitfit"),
    search=Search(rates=(2e-2,), evaluations=1),
    sample=30,
    n_test=20,
)
ALONE = pd.DataFrame({"a": [], "b": [], "share": []})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_base(tmp_path_factory.mktemp("base") / "base", steps=2))


@pytest.fixture(scope="module")
def corpora():
    return load_corpora("builtin", names=["films", "headlines"], n_train=40, n_test=20)


TIMED = ("log.jsonl", "advice.csv")  # files that say how long something took


def contents(folder):
    "SHA-256 of every file of a folder but locks and those that hold times, by relative path."
    files = {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name not in TIMED and f.suffix != ".lock"
    }
    for name in files:
        if name.endswith("advice.csv.made.json"):  # its hash is that of a file with times
            files[name] = json.dumps(json.loads(files[name])["made_of"]).encode()
    in_order = lambda name, blob: (
        b"".join(sorted(blob.splitlines(True))) if name == "starts/rows.csv" else blob
    )  # its rows come as jobs end
    return {
        name: hashlib.sha256(in_order(name, blob)).hexdigest() for name, blob in files.items()
    }


def everything(folder, base, corpora, workers):
    """A tiny zoo, walk and contest: the bytes of all files, and what the calls give, in its
    order."""
    torch.set_num_threads(1)
    zoo = open_zoo(build_zoo(folder / "zoo", base, corpora, RECIPE, [1, 2], workers))
    paths = zoo.models.set_index("model").path.to_dict()
    first, *_, last = paths
    walks = [
        PathSpec("line", "line", (first, last), ("films",), 1),
        PathSpec("models", "models", tuple(paths), ("headlines",), 0),
    ]
    points, _ = measure_paths(walks, folder / "walks", paths, base, corpora, BUDGET, workers)
    rows, advice = compare_all_starts(
        zoo, corpora, base, folder / "starts", BRIEF, ALONE, workers
    )
    return contents(folder), points, rows, advice.drop(columns="seconds")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base, corpora):
    return everything(tmp_path_factory.mktemp("alone"), base, corpora, workers=1)


@pytest.fixture(scope="module")
def zoo_alone(alone):
    return {name: digest for name, digest in alone[0].items() if name.startswith("zoo/")}


@pytest.fixture(scope="module")
def cluster():
    "A real Ray cluster on this machine, or that of RAY_ADDRESS."
    ray = pytest.importorskip("ray")
    here = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 10**8}
    start_ray(**{} if "RAY_ADDRESS" in os.environ else here)
    ray.cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # its workers do not have the folder of the tests in their path
    yield ray
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


@pytest.mark.parametrize("slow", range(4))
def test_a_slow_start_of_ray_is_tried_again(monkeypatch, slow, tried):
    ray, starts = pytest.importorskip("ray"), []

    def init():
        starts.append(1)
        if len(starts) <= slow:
            raise Exception("The current node timed out during startup. This could happen")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if slow < 3:
        start_ray()
    else:
        with pytest.raises(
            ConnectionError, match="^Ray did not start on this machine: The cur"
        ):
            start_ray()
    assert len(starts) == min(slow + 1, 3)
    stage, outcome = f"after {slow} slow starts", "tried again; one line after three times"
    tried("Ray is slow to start", stage, 1, outcome)


@every_backend
def test_the_same_bytes_come_out(tmp_path, base, corpora, alone, backend, monkeypatch, request):
    if backend == "ray":
        request.getfixturevalue("cluster")
    monkeypatch.setenv("WEIGHTREGIONS_BACKEND", backend)
    files, *tables = everything(tmp_path, base, corpora, workers=2)
    assert files == alone[0] and {name.split("/")[0] for name in files} == {
        "zoo",
        "walks",
        "starts",
    }
    for ours, theirs in zip(tables, alone[1:], strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


# --- who dies ---------------------------------------------------------------------------------


def killed(file, times):
    "Kill the process that runs this, so many times; then say how often it was tried."
    with open(file, "a") as f:
        f.write("x")
    if os.path.getsize(file) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.path.getsize(file)


@every_backend
@pytest.mark.parametrize("workers", [2, 3])
def test_a_worker_that_dies_costs_its_own_job_only(tmp_path, backend, workers, request):
    if backend == "ray":
        request.getfixturevalue("cluster")
    deaths, found = {"films": 0, "headlines": 1, ("meals", 1): 9, ("meals", 2): 0}, {}
    with (
        pytest.warns(RuntimeWarning, match="the worker of the job headlines died"),
        pytest.raises(ChildProcessError, match="the worker died twice in meals 1 "),
    ):
        for name, tries in run_jobs(
            killed,
            {name: (str(tmp_path / str(i)), n) for i, (name, n) in enumerate(deaths.items())},
            workers,
            backend,
        ):
            found[name] = tries
    assert found == {"films": 1, "headlines": 2, ("meals", 2): 1}
    assert (tmp_path / "2").stat().st_size == 2


@pytest.fixture
def a_place(monkeypatch, tmp_path):
    "A place of its own: `job(function, ...)` runs a job there."
    monkeypatch.setattr(jobs, "_WORKERS", {})
    workers = jobs._Processes(places(1, []))

    def job(function, *args):
        call = jobs._Call("films", str(tmp_path), function, args)
        [(_, result)] = jobs._deal([call], workers, 1)
        return result

    yield job
    workers.close(kill=True)


@pytest.mark.timeout(120)
def test_a_worker_that_dies_is_seen_where_an_idle_one_has_left(a_place, monkeypatch):
    monkeypatch.setattr(jobs, "IDLE", 1)
    assert a_place(os.getpid) != os.getpid()
    [worker] = jobs._WORKERS.values()
    while worker._processes:
        time.sleep(0.1)
    with (
        pytest.warns(RuntimeWarning, match="the worker of the job films died"),
        pytest.raises(ChildProcessError, match="the worker died twice in films "),
    ):
        a_place(signal.raise_signal, signal.SIGKILL)


def test_a_worker_that_dies_idle_costs_no_try(a_place, tmp_path):
    os.kill(first := a_place(os.getpid), signal.SIGKILL)
    [worker] = jobs._WORKERS.values()
    while worker._flags.broken is None:
        time.sleep(0.05)
    with pytest.warns(RuntimeWarning, match="the worker of the job films died"):
        assert a_place(killed, str(tmp_path / "tries"), 1) == 2
    assert a_place(os.getpid) != first


def killed_in_a_step(*job):
    "A job of a zoo; the first worker of each model is killed in an optimiser step."
    *_, corpus, _, seed, zoo = job
    died, steps = zoo.parents[1] / f"{corpus.name}-{seed}.died", []

    def count(*_):
        steps.append(1)
        if len(steps) == 2:
            died.touch(), os.kill(os.getpid(), signal.SIGKILL)

    if not died.exists():
        register_optimizer_step_pre_hook(count)
    return building._job(*job)


@every_backend
def test_workers_killed_while_they_fine_tune_leave_the_same_bytes(
    tmp_path, base, corpora, zoo_alone, backend, monkeypatch, request, tried
):
    if backend == "ray":
        request.getfixturevalue("cluster")
    monkeypatch.setenv("WEIGHTREGIONS_BACKEND", backend)
    monkeypatch.setattr(building, "_job", killed_in_a_step)
    with pytest.warns(RuntimeWarning, match="the worker of the job .* died") as told:
        build_zoo(tmp_path / "here" / "zoo", base, corpora, RECIPE, [1, 2], workers=2)
    assert (
        len(list(tmp_path.glob("*.died"))) == sum("died" in str(w.message) for w in told) == 4
    )
    assert contents(tmp_path / "here") == zoo_alone
    tried(
        "a worker killed in an optimiser step",
        f"zoo, {backend.replace('ray', 'Ray')}",
        4,
        "its job alone is done again, the same bytes as of one process",
    )


def test_a_zoo_whose_workers_are_killed_at_once_ends_with_the_same_bytes(
    tmp_path, base, corpora, zoo_alone
):
    def kill():
        while not list(tmp_path.glob("zoo/*/.seed-1.lock")):
            time.sleep(0.01)
        for worker in list(jobs._WORKERS.values()):
            for pid in list(dict(worker._processes or {})):
                with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # whether a worker was at work or idle when it was killed is chance
        build_zoo(tmp_path / "zoo", base, corpora, RECIPE, [1, 2], workers=2)
    killer.join()
    assert contents(tmp_path) == zoo_alone
    for file in tmp_path.glob("zoo/*/*/tokenizer_config.json"):
        assert "local" not in file.read_text()  # a zoo made offline is that made online


LONG = """
import os, signal, sys, time
from weightregions.jobs import run_jobs
from test_jobs_work import work
if __name__ == "__main__":
    for _ in run_jobs(work, {str(i): ("FOLDER", i) for i in range(4)}, workers=2): pass
"""
WORK = """
import os, signal, time
def work(folder, i):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(f"{folder}/{i}.pid", "w").write(str(os.getpid()))
    time.sleep(60)
    open(f"{folder}/{i}.done", "w").write("")
    time.sleep(600)
"""


def is_running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it may end at any moment
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(tmp_path, end, tried):
    (tmp_path / "test_jobs_work.py").write_text(WORK)
    (tmp_path / "long.py").write_text(LONG.replace("FOLDER", str(tmp_path)))
    child = subprocess.Popen(
        [sys.executable, tmp_path / "long.py"],
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(pids := [p.read_text() for p in tmp_path.glob("*.pid") if p.read_text()]) < 2:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(end)
    said = child.communicate(timeout=60)[1]
    assert child.returncode and ("KeyboardInterrupt" in said) == (end == signal.SIGINT)
    while any(map(is_running, pids)):
        time.sleep(0.05)
    assert len(list(tmp_path.glob("*.pid"))) == 2 and not list(tmp_path.glob("*.done"))
    outcome = "its workers end at once, and write nothing more"
    tried(f"the parent of workers ended by {end.name}", "jobs", len(pids), outcome)


# --- where they run ---------------------------------------------------------------------------


def seen(_):
    return (
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        os.environ["OMP_NUM_THREADS"],
        "torch" in sys.modules and torch.get_num_threads(),
        time.sleep(0.2),
    )


@pytest.mark.parametrize(
    "gpus, expected",
    [(None, ["4", "GPU-7"]), (0.5, ["4", "4", "GPU-7", "GPU-7"]), (0, ["", ""])],
)
def test_a_process_a_gpu(monkeypatch, gpus, expected):
    monkeypatch.setattr(jobs, "gpus_here", lambda: ["4", "GPU-7"])
    taken = []
    monkeypatch.setattr(
        jobs,
        "_processes",
        lambda calls, n, here: (
            taken.extend(dict(p).get("CUDA_VISIBLE_DEVICES") for p in places(n, here))
            or iter(())
        ),
    )
    list(
        run_jobs(
            seen, {str(i): (i,) for i in range(8)}, gpus=gpus, workers=None if gpus != 0 else 2
        )
    )
    assert sorted(taken) == expected


def test_a_worker_sees_its_gpu_and_no_other(monkeypatch):
    monkeypatch.setattr(jobs, "gpus_here", lambda: ["4", "GPU-7"])
    found = {visible for _, (visible, *_) in run_jobs(seen, {str(i): (i,) for i in range(4)})}
    assert found == {"4", "GPU-7"}


def test_relative_paths_mean_the_same_in_a_worker(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    for name in "ab":  # in the second round the workers are those of the first
        monkeypatch.chdir(tmp_path / name)
        assert dict(run_jobs(_read, {"1": ("x",), "2": ("x",)}, workers=2)) == {
            "1": name,
            "2": name,
        }


def _read(file):
    return Path(file).read_text()


@pytest.mark.parametrize(
    "arguments, variables, problem",
    [
        ({"workers": 0}, {}, "workers must be at least 1, not 0"),
        ({"backend": "dask"}, {}, "the backend must be one of processes, ray, not 'dask'"),
        (
            {},
            {"WEIGHTREGIONS_BACKEND": "slurm"},
            "the backend must be one of processes, ray, not 'slurm'",
        ),
        ({"gpus": -1}, {}, "gpus: a job takes 0 to 1 GPUs, not -1"),
        (
            {},
            {"WEIGHTREGIONS_GPUS": "all"},
            "WEIGHTREGIONS_GPUS: a job takes 0 to 1 GPUs, not 'all'",
        ),
        (
            {},
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
            "torchrun is for fine-tuning a zoo",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments, variables, problem, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=problem):
        run_jobs(seen, {"1": (1,)}, **arguments)


@needs_ray
def test_what_a_cluster_lacks_is_refused(cluster):
    with pytest.raises(ValueError, match="a job asks for 1 GPU, and the Ray cluster has 0"):
        run_jobs(seen, {"1": (1,)}, backend="ray", gpus=1)


@needs_ray
def test_a_lone_job_runs_on_the_cluster_too(cluster):
    assert dict(run_jobs(os.getpid, {"1": ()}, backend="ray"))["1"] != os.getpid()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install \"weightregions\[ray\]\""):
        run_jobs(seen, {"1": (1,)}, backend="ray")


# --- a cluster that does not answer -----------------------------------------------------------


def stuck(file, times):
    "Wait for ever in a lock, so many times; then say how often it was tried."
    with open(file, "a") as f:
        f.write("x")
    if os.path.getsize(file) <= times:
        lock = threading.Lock()
        lock.acquire(), lock.acquire()
    return os.path.getsize(file)


@needs_ray
def test_a_job_that_stands_still_on_a_cluster_is_dealt_out_again(
    cluster, tmp_path, monkeypatch, tried
):
    monkeypatch.setattr(jobs, "SILENT", 5), monkeypatch.setattr(jobs, "PULSE", 0.2)
    times, found = {"films": 0, "headlines": 1, ("meals", 1): 9, "plots": 0}, {}
    calls = {name: (str(tmp_path / str(i)), n) for i, (name, n) in enumerate(times.items())}
    with (
        pytest.warns(RuntimeWarning, match="the worker of the job headlines did nothing for"),
        pytest.raises(ChildProcessError, match="did nothing for .* twice in meals 1;"),
    ):
        for name, tries in run_jobs(stuck, calls, workers=2, backend="ray"):
            found[name] = tries
    assert found == {"films": 1, "headlines": 2, "plots": 1}
    assert (tmp_path / "2").stat().st_size == 2
    outcome = "dealt out again, and named if it stands still again"
    tried("a job that waits for ever in a lock", "jobs, Ray", 3, outcome)


def stopped(file):
    "A worker that does not answer, not even to the cluster: the first one stops itself."
    if not os.path.exists(file):
        Path(file).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return os.getpid()


@needs_ray
def test_a_worker_that_does_not_answer_is_given_up(cluster, tmp_path, monkeypatch, tried):
    monkeypatch.setattr(jobs, "SILENT", 5), monkeypatch.setattr(jobs, "PULSE", 0.2)
    (tmp_path / "b").write_text("")
    calls = {name: (str(tmp_path / name),) for name in "ab"}
    with pytest.warns(RuntimeWarning, match="the worker of the job a did no"):
        results = dict(run_jobs(stopped, calls, workers=2, backend="ray"))
    first = int((tmp_path / "a").read_text())
    assert results["a"] != first and results.keys() == {"a", "b"}
    with contextlib.suppress(ProcessLookupError):  # Ray may have ended it by now
        os.kill(first, signal.SIGKILL)
    outcome = "its job is dealt out again"
    tried("a worker that does not answer", "jobs, Ray", 1, outcome)


@needs_ray
def test_a_job_waits_for_a_cluster_that_others_fill(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "SILENT", 5), monkeypatch.setattr(jobs, "PULSE", 0.2)
    other = cluster.remote(num_cpus=2)(jobs._Worker).remote()
    cluster.get(other.pulse.remote())
    warn = jobs._warn_of_wait
    monkeypatch.setattr(jobs, "_warn_of_wait", lambda name: (warn(name), cluster.kill(other)))
    with pytest.warns(RuntimeWarning, match="the job films waits for room on the Ray cluster"):
        job = {"films": (str(tmp_path / "tries"), 0)}
        assert dict(run_jobs(stuck, job, backend="ray")) == {"films": 1}


@needs_ray
def test_fewer_places_than_promised_are_enough(cluster, tmp_path):
    "Another job of the cluster has a core: two workers take turns at the other one."
    other = cluster.remote(num_cpus=1)(jobs._Worker).remote()
    cluster.get(other.pulse.remote())
    names = {str(i): (str(tmp_path / str(i)), 0) for i in range(4)}
    assert dict(run_jobs(stuck, names, workers=2, backend="ray")) == dict.fromkeys(names, 1)
    cluster.kill(other)


def refuse(row):
    raise ValueError(f"row {row}: no label")


@every_backend
def test_an_error_in_a_job_is_raised_as_it_is(backend, request):
    if backend == "ray":
        request.getfixturevalue("cluster")
    with pytest.raises(ValueError) as e:
        list(run_jobs(refuse, {("films", 1): (7,), "b": (7,)}, workers=2, backend=backend))
    assert str(e.value) == "row 7: no label"
    assert e.value.__notes__[0] in ("in the job films 1", "in the job b")


# --- many processes, one fine-tuning ----------------------------------------------------------


def test_alone_there_is_nothing_to_agree_on(monkeypatch):
    assert ranks() == (0, 1) and agreed([("films", 1)]) == [("films", 1)]
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert ranks() == (3, 4)
    monkeypatch.delenv("LOCAL_RANK")  # a scheduler's, not torchrun's
    assert ranks() == (0, 1)


TOGETHER = """
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe
from weightregions.building import build_zoo
corpora = load_corpora("builtin", names=["films", "headlines"], n_train=40, n_test=20)
build_zoo({zoo!r}, {base!r}, corpora, Recipe(steps=3, batch_size=8, dtype="float32"), [1])
"""


def test_torchrun_trains_the_model_that_one_process_does(tmp_path, base):
    """Without dropout the weights differ by rounding alone: the batch, its order and the mean
    of its gradients are the same."""
    from safetensors.torch import load_file

    still = Path(shutil.copytree(base, tmp_path / "base"))
    config = (still / "config.json").read_text()
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        assert f'"{name}": 0.1' in config
        config = config.replace(f'"{name}": 0.1', f'"{name}": 0.0')
    (still / "config.json").write_text(config)
    for way, run in {
        "one": [sys.executable],
        "two": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ],
    }.items():
        (tmp_path / f"{way}.py").write_text(
            TOGETHER.format(zoo=str(tmp_path / way), base=str(still))
        )
        done = subprocess.run(
            [*run, str(tmp_path / f"{way}.py")], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (
        len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 2
    )  # rank 0 alone writes
    for name in ("films", "headlines"):
        one, two = (
            load_file(tmp_path / way / name / "seed-1" / "model.safetensors")
            for way in ("one", "two")
        )
        start = load_file(still / "model.safetensors")
        moved = max((one[k] - start[k]).abs().max().item() for k in one.keys() & start.keys())
        torch.testing.assert_close(two, one, rtol=0, atol=moved / 50)


def test_a_long_wait_for_another_process_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "LONG", 0.05)
    held, ended = threading.Event(), []

    def other():
        with FileLock(tmp_path / ".rows.csv.lock"):
            held.set()
            time.sleep(0.5)
            ended.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    with pytest.warns(RuntimeWarning, match="rows.csv: another process is at work on it"):
        with jobs.alone(tmp_path / "rows.csv"):
            assert ended
    thread.join()


def test_a_lock_that_is_free_is_taken_without_a_word(tmp_path, recwarn):
    for _ in range(2):
        with jobs.alone(tmp_path / "new" / "rows.csv"):
            pass
    assert not recwarn.list
