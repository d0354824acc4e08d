"The same jobs give the same bytes in this process, in many, and on a Ray cluster; whoever dies costs its own job only."

import hashlib
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
from queue import SimpleQueue

import pandas as pd
import pytest
import torch
from conftest import ROOT
from torch.optim.optimizer import register_optimizer_step_pre_hook

from weightregions import jobs
from weightregions import building
from weightregions.bases import tiny_base
from weightregions.contest import StartExperiment, compare_all_starts
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe
from weightregions.jobs import agreed, places, ranks, run_jobs
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
    in_order = lambda name, blob: (
        b"".join(sorted(blob.splitlines(True))) if name == "starts/rows.csv" else blob
    )  # its rows come as jobs end
    return {
        name: hashlib.sha256(in_order(name, blob)).hexdigest() for name, blob in files.items()
    }


def everything(folder, base, corpora, workers):
    "A tiny zoo, walk and contest: the bytes of all files, and what the calls give, in its order."
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
    ray.init(
        **{}
        if "RAY_ADDRESS" in os.environ
        else {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 10**8}
    )
    ray.cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # its workers do not have the folder of the tests in their path
    yield ray
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


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


# --- who dies --------------------------------------------------------------------------------------------------------


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


@pytest.mark.timeout(120)
def test_a_worker_that_dies_is_seen_where_an_idle_one_has_left(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_WORKERS", {}), monkeypatch.setattr(jobs, "IDLE", 1)
    free = SimpleQueue()
    free.put(places(1, [])[0])
    job = lambda function, *args: jobs._at_a_place(
        free, "films", str(tmp_path), function, args
    )[1]
    assert job(os.getpid) != os.getpid()
    [worker] = jobs._WORKERS.values()
    while worker._processes:
        time.sleep(0.1)
    with pytest.warns(RuntimeWarning, match="the worker of the job films died"):
        assert isinstance(job(signal.raise_signal, signal.SIGKILL), jobs._Died)


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
            for pid in list(worker._processes or ()):
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
import os, sys, time
sys.path.insert(0, {tests!r})
from test_jobs_work import work
from weightregions.jobs import run_jobs
for _ in run_jobs(work, {{str(i): ({folder!r}, i) for i in range(4)}}, workers=2): pass
"""


def test_an_interrupt_ends_all_workers_at_once(tmp_path):
    (tmp_path / "test_jobs_work.py").write_text(
        "import os, time\ndef work(folder, i):\n    open(f'{folder}/{i}.pid', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", LONG.format(tests=str(tmp_path), folder=str(tmp_path))],
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(pids := [p.read_text() for p in tmp_path.glob("*.pid") if p.read_text()]) < 2:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate(timeout=60)[1]
    assert child.returncode
    for pid in pids:
        while (
            Path(f"/proc/{pid}").exists()
            and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
        ):
            time.sleep(0.05)


# --- where they run --------------------------------------------------------------------------------------------------


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


# --- many processes, one fine-tuning ---------------------------------------------------------------------------------


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
    "Without dropout the weights differ by rounding alone: the batch, its order and the mean of its gradients are the same."
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
