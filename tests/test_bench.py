"""The measuring of `make bench`: that the ways do what they are said to do, that the driver
keeps its rows, and faults. Nothing is timed here."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import measure
from measure import alone
from report import (
    FIELDS,
    beside,
    goals,
    growth_figure,
    rates,
    read_bench,
    straightness,
    throughput,
    write_bench,
)

BENCH = ROOT / "tests" / "bench"


def script(name):
    "One of the scripts as a module."
    spec = importlib.util.spec_from_file_location(
        f"bench_{name.strip('_')}", BENCH / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ways():
    sys.path.insert(0, str(BENCH))
    yield script("ways")
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def models(ways, tmp_path_factory):
    "A start, three models, and how many weights each has."
    folder = tmp_path_factory.mktemp("checkpoints")
    params = ways.write(str(folder), "small", 0, 2)["params"]
    ways.write(str(folder), "small", 2, 4)  # added later, as growth does
    start, *others = (str(folder / f"{i:02d}") for i in range(4))
    return SimpleNamespace(start=start, others=others, params=params)


on_devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
)


@on_devices
def test_all_ways_to_similarity_agree(ways, models, tmp_path, device):
    found = {}
    for way in (
        "similarity",
        "extended",
        "sketched",
        "load_stack_matmul",
        "streamed_loop",
        "cosines_float64",
    ):
        getattr(ways, way)(
            models.others,
            models.start,
            str(tmp_path / way),
            **({} if way == "cosines_float64" else {"device": device}),
        )
        found[way] = torch.load(tmp_path / way, weights_only=True)
    exact = found.pop("cosines_float64")
    for way in ("similarity", "extended"):
        assert (found.pop(way) - exact).abs().max() < 1e-12
    assert (found.pop("sketched") - exact).abs().max() < 6 / 64
    for way, cosines in found.items():
        torch.testing.assert_close(cosines, exact, rtol=0, atol=1e-5, msg=way)
    assert 0.0 < exact[0, 1].abs() < 0.1


def test_models_do_not_depend_on_when_they_are_written(ways, models, tmp_path):
    ways.write(str(tmp_path), "small", 0, 4)
    for i, here in enumerate([models.start, *models.others]):
        assert (tmp_path / f"{i:02d}" / "model.safetensors").read_bytes() == (
            Path(here) / "model.safetensors"
        ).read_bytes()


def test_parts_are_parts(ways, models):
    sizes = [ways.similarity(models.others, models.start, layers=k)["params"] for k in (1, 2)]
    assert (
        0 < sizes[0] == sizes[1] // 2
        and sizes[1] < ways.similarity(models.others, models.start)["params"] == models.params
    )


def test_all_averages_are_the_average(ways, models, tmp_path):
    for way in ("average", "load_and_add"):
        getattr(ways, way)(models.others, str(tmp_path / way))
        assert ways.average_error(str(tmp_path / way), models.others)["error"] < 3e-7
    (tmp_path / "wrong").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "wrong" / name).write_bytes((Path(models.start) / name).read_bytes())
    assert ways.average_error(str(tmp_path / "wrong"), models.others)["error"] > 1e-4


@on_devices
def test_all_points_are_the_point(ways, models, tmp_path, device):
    for way, more in (
        ("stand", {}),
        ("stand", {"held": False}),
        ("state_dicts", {}),
        ("state_dicts", {"copied": True}),
    ):
        spent = getattr(ways, way)(
            *models.others[:2], 4, str(tmp_path / "half"), **more, device=device
        )
        assert spent["seconds"] >= 0
        assert ways.line_error(str(tmp_path / "half"), *models.others[:2])["error"] < 3e-7
        assert (
            ways.line_error(str(tmp_path / "half"), models.others[0], models.others[2])["error"]
            > 1e-4
        )


def test_floors_touch_what_they_say(ways, models, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(ways, "BUFFER", 2**12)
    real = open

    def watched(file, *a, **k):
        f = real(file, *a, **k)
        if not str(file).endswith(".safetensors") or a[:1] != ("rb",):
            return f

        class Counted:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                f.close()

            def seek(self, at):
                f.seek(at)

            def readinto(self, view):
                read.append(f.readinto(view))

        return Counted()

    monkeypatch.setattr(ways, "open", watched, raising=False)
    ways.similarity_floor(models.others, models.start, models.params, "float64")
    assert 4 * 4 * models.params <= sum(read) <= 4 * 4 * models.params + 4 * 2**12
    read.clear()
    ways.average_floor(models.others, models.params, str(tmp_path / "floor"))
    assert (tmp_path / "floor" / "model.safetensors").stat().st_size == 4 * models.params
    assert 3 * 4 * models.params <= sum(read)


@on_devices
def test_ceilings_and_floors_take_time(ways, models, device):
    for what in ("read", "copy", "float64", "float32"):
        assert (
            ways.ceiling(models.others, models.start, models.params, what, device)["seconds"]
            > 0
        )
    assert (
        ways.similarity_floor(models.others, models.start, models.params, "float64", device)[
            "seconds"
        ]
        > 0
    )
    assert (
        ways.line_floor(models.params, 4, device)["seconds"]
        > 0
        < ways.evaluation(models.start, 4, device)["seconds"]
    )


def test_a_floor_adds_up_on_a_processor_and_overlaps_on_a_gpu(ways, models, monkeypatch):
    seconds = {"read": 1.0, "float32": 2.0, "copy": 4.0}
    monkeypatch.setattr(
        ways, "ceiling", lambda models, base, params, what, device: {"seconds": seconds[what]}
    )
    assert [
        ways.similarity_floor([], "", 1, "float32", device)["seconds"]
        for device in ("cpu", "cuda")
    ] == [3.0, 4.0]


@on_devices
def test_a_base_of_random_weights_is_probed(ways, tmp_path, device):
    base = ways.base_model("small", tmp_path, "random")
    found = [
        getattr(ways, way)(base, "small", device)
        for way in ("probe", "probe_by_sgd", "probe_floor")
    ]
    assert (
        found[0]["objective"] < found[1]["objective"] and len({f["params"] for f in found}) == 1
    )


def test_a_merge_and_how_far_another_is_from_it(ways, tmp_path):
    from safetensors.torch import load_file, save_file

    ways.write(str(tmp_path), "small", 0, 3)
    start, *models = (str(tmp_path / f"0{i}") for i in range(3))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ways.merge_by("ties", models, start, ours)
    assert ways.apart(ours, ours) == {"error": 0}
    shutil.copytree(ours, theirs)
    weights = load_file(theirs / "model.safetensors")
    n = sum(t.numel() for t in weights.values())
    weights["embeddings.word_embeddings.weight"][0, 0] += 1e-3
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    assert ways.apart(theirs, ours) == {"error": 1 / n}


def test_ways_to_a_zoo_differ_in_what_they_name(ways, tmp_path, monkeypatch):
    from transformers import Trainer

    from weightregions import building, finetuning

    seen = []

    def built(folder, base, corpora, recipe, seeds, workers=None):
        with finetuning.one_thread("cpu"):
            seen.append(
                (
                    torch.get_num_threads(),
                    finetuning.Bucketed._get_train_sampler is Trainer._get_train_sampler,
                    recipe.dtype,
                    workers,
                )
            )
        Path(folder).mkdir()

    monkeypatch.setattr(building, "build_zoo", built)
    torch.set_num_threads(2)
    for how in (
        {},
        {"workers": 1, "one_thread": False},
        {"workers": 1, "like_length": False},
        {"dtype": "bfloat16"},
        {},
    ):
        ways.zoo("base", "small", str(tmp_path / "zoo"), **how)
    assert seen == [
        (1, False, "auto", None),
        (2, False, "auto", 1),
        (1, True, "auto", 1),
        (1, False, "bfloat16", None),
        (1, False, "auto", None),
    ]


@pytest.fixture
def driver(ways, monkeypatch):
    "The driver, whose measurements are calls in this process."
    main = script("__main__")

    def call(self, way, script="ways.py", **arguments):
        found = getattr(ways, way)(**json.loads(json.dumps(arguments)))
        return found | {
            "process": 1.0,
            "process_cpu": 1.0,
            "peak_mb": 100.0,
            "device": arguments.get("device", "cpu"),
        }

    monkeypatch.setattr(main.Bench, "call", call)
    return main


def run(driver, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", "--size", "small", *map(str, arguments)])
    driver.main()


def test_driver_keeps_rows_and_removes_its_checkpoints(driver, monkeypatch, tmp_path, capsys):
    (tmp_path / "store").mkdir()
    run(
        driver,
        monkeypatch,
        "--only",
        "ceiling",
        "similarity",
        "average",
        "line",
        "growth",
        "--rounds",
        2,
        "--rows",
        tmp_path / "bench.csv",
        "--store",
        tmp_path / "store",
    )
    rows = read_bench(tmp_path / "bench.csv")
    assert not list((tmp_path / "store").iterdir())
    assert list(rows.operation.unique()) == [
        "ceiling",
        "similarity",
        "average of 5",
        "average of 5, with the start of Python",
        "a point on a line",
        "similarity, growing",
    ]
    assert (
        rows[rows.operation == "similarity, growing"].n.tolist(),
        rows[rows.operation == "similarity, growing"].params.nunique(),
    ) == ([2, 4, 6, 4, 4], 3)
    missing = rows[rows.subject.str.contains("mergekit|loss-landscapes")]
    assert (
        missing.subject.str.endswith(": not installed").all()
        and missing.seconds.isna().all()
        and len(missing) == 3
    )
    measured = rows[~rows.index.isin(missing.index)]
    assert (
        measured.seconds.notna().all()
        and (rows[rows.subject == "weightregions"].error.dropna() < 1e-6).all()
    )
    said = capsys.readouterr().out
    assert "peers not installed: make bench PEERS=1" in said and f"{len(rows)} rows in" in said
    assert "GFLOP/s" in said and "of earlier runs" not in said


@pytest.mark.cuda
def test_driver_says_what_a_gpu_computed(driver, monkeypatch, tmp_path):
    run(
        driver,
        monkeypatch,
        "--device",
        "cuda",
        "--only",
        "ceiling",
        "similarity",
        "average",
        "line",
        "probe",
        "--rounds",
        1,
        "--rows",
        tmp_path / "bench.csv",
        "--store",
        tmp_path,
    )
    rows = read_bench(tmp_path / "bench.csv")
    on_gpu = rows.device == torch.cuda.get_device_name()
    assert on_gpu[
        rows.operation.isin(["similarity", "a point on a line", "the probe"])
        & rows.seconds.notna()
    ].all()
    assert not on_gpu[
        rows.operation.str.startswith("average") | (rows.subject == "reading")
    ].any()


def test_a_device_reaches_the_ways_and_the_rows(driver, monkeypatch, tmp_path):
    asked, whole = (
        [],
        {
            "seconds": 1.0,
            "cpu": 1.0,
            "peak_mb": 1.0,
            "process": 1.0,
            "process_cpu": 1.0,
            "params": 9,
            "error": 0.0,
        },
    )

    def call(self, way, script="ways.py", **arguments):
        asked.append((way, arguments.get("device", "cpu")))
        return whole | {"device": asked[-1][1]}

    monkeypatch.setattr(driver.Bench, "call", call)
    monkeypatch.setattr(driver, "device_name", lambda kind="cpu": f"a {kind}")
    b = driver.Bench(
        SimpleNamespace(
            size="small",
            peers="",
            rounds=1,
            clock="wall",
            rows=tmp_path / "r.csv",
            device="cuda",
            base="minilm",
        ),
        tmp_path,
    )
    driver.line(b), driver.ceiling(b)
    assert {way for way, device in asked if device == "cpu"} == {
        "write",
        "line_error",
        "ceiling",
    } and ("stand", "cuda") in asked
    rows = read_bench(tmp_path / "r.csv")
    assert (
        rows[rows.seconds.notna()].device.tolist()
        == ["a cuda"] * 5 + ["a cpu"] + ["a cuda"] * 3
    )


def test_a_processes_environment_hides_the_gpu_from_what_runs_without(
    driver, ways, monkeypatch, tmp_path
):
    main, seen = script("__main__"), []

    def alone(command, env):
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        Path(command[-1]).write_text("{}")
        return SimpleNamespace(seconds=1.0, cpu_seconds=1.0, peak_mb=1.0)

    monkeypatch.setattr(main, "alone", alone)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    b = main.Bench(
        SimpleNamespace(
            size="small",
            peers="",
            rounds=1,
            clock="wall",
            rows=tmp_path / "r.csv",
            device="cuda",
            base="minilm",
        ),
        tmp_path,
    )
    b.call("average"), b.compute("similarity")
    assert seen == ["", "3"]


def test_impossible_devices_are_refused(driver, monkeypatch, capsys):
    for there, more, message in (
        (False, [], "torch finds no GPU"),
        (True, ["--clock", "cpu"], "a GPU's work does not show"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        with pytest.raises(SystemExit):
            run(driver, monkeypatch, "--device", "cuda", *more)
        assert message in capsys.readouterr().err


def test_rows_of_other_operations_stay_and_are_said_to_be_old(
    driver, monkeypatch, tmp_path, capsys
):
    before = write_bench(toy(operation="a model of a zoo"), tmp_path / "bench.csv").read_text()
    for _ in range(2):
        run(
            driver,
            monkeypatch,
            "--only",
            "line",
            "--rounds",
            1,
            "--rows",
            tmp_path / "bench.csv",
            "--store",
            tmp_path,
        )
    rows = read_bench(tmp_path / "bench.csv")
    assert (
        list(rows.operation.unique()) == ["a model of a zoo", "a point on a line"]
        and rows.subject.eq("weightregions").sum() == 4
    )
    assert (tmp_path / "bench.csv").read_text().startswith(before)
    new, old = (
        capsys.readouterr()
        .out.split("\nthis run\n")[-1]
        .split("of earlier runs, kept in the file\n")
    )
    assert (
        "a model of a zoo " not in new
        and "a model of a zoo " in old
        and "a point on a line" not in old
        and f"{len(rows)} rows in" in old
    )


def test_a_peer_that_fails_is_said_and_a_way_of_ours_that_fails_stops(
    driver, monkeypatch, tmp_path
):
    b = driver.Bench(
        SimpleNamespace(
            size="small",
            peers="",
            rounds=2,
            clock="wall",
            rows=tmp_path / "r.csv",
            device="cpu",
            base="minilm",
        ),
        tmp_path,
    )

    def broken():
        raise ValueError("no room")

    whole = lambda: {"seconds": 1.0, "cpu": 1.0, "peak_mb": 1.0}
    assert (
        b.rounds({"mergekit linear": broken, "weightregions": whole})["mergekit linear"]
        == "no room"
    )
    with pytest.raises(ValueError, match="weightregions: no room"):
        b.rounds({"weightregions": broken})


def test_medians_of_rounds_that_take_turns(driver, tmp_path):
    b, order = (
        driver.Bench(
            SimpleNamespace(
                size="small",
                peers="",
                rounds=3,
                clock="wall",
                rows=tmp_path / "r.csv",
                device="cpu",
                base="minilm",
            ),
            tmp_path,
        ),
        [],
    )
    seconds = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 5.0, 1.0])}

    def way(name):
        def one():
            order.append(name)
            return {"seconds": next(seconds[name])}

        return one

    found = b.rounds({name: way(name) for name in "ab"})
    assert {k: v["seconds"] for k, v in found.items()} == {"a": 2.0, "b": 5.0} and "".join(
        order
    ) == "abbaab"


@pytest.mark.slow
def test_the_whole_bench(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            BENCH,
            "--size",
            "small",
            "--rounds",
            "1",
            "--rows",
            tmp_path / "bench.csv",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    rows = read_bench(tmp_path / "bench.csv")
    assert {"the probe", "similarity"} <= set(rows.operation) and rows.operation.str.startswith(
        "a model of a zoo"
    ).sum() == 7
    assert rows.peak_mb.dropna().gt(50).all()


def test_peak_is_that_of_the_process(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(b"x" * 60_000_000)
    nothing = alone([sys.executable, "-c", "import time; time.sleep(1)"]).peak_mb
    read = alone(
        [
            sys.executable,
            "-c",
            (
                f"import time; f = open({str(file)!r}, 'rb', buffering=0); b ="
                " bytearray(2**16)\nwhile f.readinto(b): pass\ntime.sleep(1)"
            ),
        ]
    ).peak_mb
    made = alone(
        [sys.executable, "-c", "x = b'1' * 60_000_000; import time; time.sleep(1)"]
    ).peak_mb
    assert read - nothing < 10 < 55 < made - nothing


def test_an_interrupted_measurement_leaves_no_process(monkeypatch):
    seen = []

    def interrupted(pid, every):
        seen.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "_watched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        alone([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


MAPPED = """
import mmap, tempfile, time
with tempfile.TemporaryFile() as f:
    for _ in range(100): f.write(b"x" * 1_000_000)
    f.flush()
    pages = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    touched = sum(pages[::4096])
    time.sleep(1)
"""
CHILD = """
import subprocess, sys
code = "data = bytes([1]) * 100_000_000; import time; time.sleep(1.5)"
subprocess.run([sys.executable, "-c", code])
"""


def test_mapped_pages_do_not_count_and_children_do():
    sleep = "import time; time.sleep(1)"
    codes = (sleep, f"data = b'x' * 100_000_000; {sleep}", MAPPED)
    empty, held, mapped = (alone([sys.executable, "-c", code]).peak_mb for code in codes)
    assert 99 < held - empty < 110 and mapped - empty < 10
    assert alone([sys.executable, "-c", CHILD]).peak_mb > 100


def test_what_a_process_wrote_is_kept_and_its_failure_is_told():
    code = "print(1); import sys; print(2, file=sys.stderr)"
    assert sorted(alone([sys.executable, "-c", code]).output.split()) == ["1", "2"]
    for command, says in (
        ([sys.executable, "-c", "raise SystemExit('no checkpoint')"], "with 1: no checkpoint"),
        (["false"], "ended with 1: no message"),
        (["no-such-program"], "no-such-program: cannot be run"),
    ):
        with pytest.raises(ValueError, match=says):
            alone(command)


OURS = ["similarity", "weightregions", 12, 10**8, 2.0, 1.5, 600.0, 1e-9, "a CPU"]
USUAL = ["similarity", "load, stack, multiply", 12, 10**8, 20.0, 1.5, 12000.0, 2e-7, "a CPU"]
MISSING = ["average of 5", "mergekit linear: not installed", 5, 10**8]
SMALL = pd.DataFrame([OURS, USUAL, [*MISSING, nan, 0.5, nan, nan, "a CPU"]], columns=FIELDS)


def test_rows_that_are_no_rows_are_refused(tmp_path):
    pd.testing.assert_frame_equal(read_bench(write_bench(SMALL, tmp_path / "b.csv")), SMALL)
    for content, says in (
        ("operation,subject\n", "no column n, params, seconds"),
        (",".join(FIELDS) + "\na,b,3,5,fast,,,,CPU\n", "row 2: seconds is 'fast', no number"),
    ):
        (tmp_path / "odd.csv").write_text(content)
        with pytest.raises(ValueError, match=says):
            read_bench(tmp_path / "odd.csv")


def test_ratios_of_a_small_run():
    assert beside(SMALL)["of ours"].tolist() == ["1.00", "10.00", ""]
    assert beside(SMALL)["of the floor"][0] == "1.33" and "device" not in beside(SMALL)
    assert beside(SMALL.assign(device=["a CPU", "a GPU", "a CPU"])).device[1] == "a GPU"
    subjects = ["reading", "product in float64"]
    limits = SMALL[:2].assign(operation="ceiling", subject=subjects, seconds=[0.5, 1.0])
    shown = rates(pd.concat([SMALL, limits]))
    assert shown.rate.tolist() == ["10.4", "33.8"]  # 13 vectors of 0.4 GB; 2 * 13^2 * 10^8
    assert shown["of similarity"].tolist() == ["0.25", "0.50"] and not len(rates(SMALL))
    ways = ("weightregions", *(f"Trainer, float32, padded to the longest {w}" for w in PADDED))
    zoo = [["a model of a zoo", w, 8, 10**7, t] for w, t in zip(ways, (10.0, 20.0, 12.0))]
    made = pd.DataFrame([[*row, nan, 900.0, nan, "a CPU"] for row in zoo], columns=FIELDS)
    assert throughput(made)["models an hour"].tolist() == ["360", "180", "300"]
    assert throughput(made).iloc[0, 4:].tolist() == ["2.00", "1.20"] and not len(
        throughput(SMALL)
    )


PADDED = ("allowed", "of a batch")


def test_goals_of_a_small_run():
    met = goals(SMALL).set_index("goal").met
    assert met.tolist()[:4] == ["yes", "not measured", "yes", "yes"]
    mergekit = "average: at least 3 times faster than mergekit, process against process"
    assert met[mergekit] == "not measured"  # it is missing
    assert met["similarity: at most 1000 MB of its own"] == "yes"
    line = pd.DataFrame({"n": [1, 2, 4], "params": 10, "seconds": [2.0, 3.0, 5.0]})
    assert straightness(line) == pytest.approx((1, 0))
    bent = pd.DataFrame({"n": [1, 2, 3], "params": 10, "seconds": [1.0, 3.0, 2.0]})
    assert straightness(bent)[1] == pytest.approx(0.5)
    grown = SMALL[:1].assign(operation="similarity, growing")
    sketch = pd.concat([SMALL, grown, grown.assign(n=4, seconds=1.0)])
    assert [len(ax.lines) for ax in growth_figure(sketch)] == [3, 2]


def toy(**more):
    return pd.DataFrame(
        [
            dict(
                operation="similarity, growing",
                subject="weightregions",
                n=n,
                params=10**6,
                seconds=1.0 + n,
                floor_seconds=1.0,
                peak_mb=90.0,
                error=np.nan,
                device="CPU",
            )
            | more
            for n in (4, 8, 16)
        ]
    )


def test_rows_go_round(tmp_path):
    rows = toy()[FIELDS]
    file = write_bench(rows, tmp_path / "deep" / "bench.csv")
    pd.testing.assert_frame_equal(read_bench(file), rows)
    assert (
        file.read_bytes() == write_bench(read_bench(file), tmp_path / "again.csv").read_bytes()
    )


def test_ratios_and_goals():
    rows = pd.concat([toy(), toy(subject="a loop", seconds=10.0)], ignore_index=True)
    assert beside(rows)["of ours"].tolist()[3:] == ["2.00", "1.11", "0.59"]
    assert straightness(toy()) == pytest.approx((1, 0)) and isnan(straightness(toy()[:2])[0])
    found = goals(rows).set_index("goal").met
    met = found[found != "not measured"]
    assert met.eq("yes").all() and met.index.tolist() == [
        "similarity: seconds a straight line in N, R squared",
        "similarity: seconds a straight line in N, largest residual in %",
        "similarity, growing: at most 1000 MB of its own",
    ]
    assert goals(toy()[:0]).met.eq("not measured").all()


def test_mergekit_is_compared_like_for_like():
    name = "average of 5, with the start of Python"
    rows = pd.concat(
        [
            toy(operation=o, subject=s, seconds=t)[:1]
            for o, s, t in (
                ("average of 5", "weightregions", 1.0),
                ("average of 5", "mergekit linear", 2.0),
                (name, "weightregions", 2.0),
                (name, "mergekit linear", 7.0),
            )
        ]
    )
    found = goals(rows).set_index("goal")
    assert found.loc[
        "average: at least 3 times faster than mergekit, process against process"
    ].tolist() == ["3.5", "yes"]
    assert found.loc["average: the same, call against call"].tolist() == ["2", "no goal"]
    assert found.index.str.contains("mergekit").sum() == 1


def test_each_sweep_is_a_line_of_its_own():
    crooked = toy(params=10**5, n=8).assign(
        params=[10**5, 2 * 10**5, 4 * 10**5], seconds=[1.0, 5.0, 1.0]
    )
    found = goals(pd.concat([toy(), crooked])).set_index("goal").met
    assert found[
        [f"similarity: seconds a straight line in {what}, R squared" for what in "NP"]
    ].tolist() == ["yes", "no"]
    assert found[
        [
            f"similarity: seconds a straight line in {what}, largest residual in %"
            for what in "NP"
        ]
    ].tolist() == ["yes", "no"]


def test_memory_is_that_of_the_hungriest_of_our_ways():
    rows = pd.concat(
        [
            toy(operation="similarity"),
            toy(operation="similarity", subject="weightregions, sketch", peak_mb=2000.0),
            toy(operation="similarity", subject="a loop", peak_mb=9000.0),
        ]
    )
    assert goals(rows).set_index("goal").loc[
        "similarity: at most 1000 MB of its own"
    ].tolist() == ["2000", "no"]


def test_rates_and_throughput():
    rows = pd.concat(
        [
            toy(operation="similarity", seconds=4.0),
            toy(operation="ceiling", subject="product in float32")[:1],
        ]
    )
    assert rates(rows).iloc[0, 1:5].tolist() == ["5", "0.0", "GFLOP/s", "1.25"]
    zoo = [
        toy(operation="a model of a zoo, 2 cores", subject=s, seconds=t)[:1]
        for s, t in (
            ("weightregions", 5.0),
            ("Trainer, float32, padded to the longest allowed", 20.0),
            ("Trainer, bfloat16, padded to the longest allowed", 10.0),
        )
    ]
    assert throughput(pd.concat(zoo)).iloc[0, 2:].tolist() == ["5.00", "720", "2.00", ""]


def test_figure_of_a_sweep(tmp_path):
    time, memory = growth_figure(pd.concat([toy(), toy(params=10**5, n=8)]))
    assert [len(line.get_xdata()) for line in time.lines] == [3] * 3 + [4] * 3
    assert all((np.diff(line.get_xdata()) >= 0).all() for line in time.lines)
    with pytest.raises(ValueError, match="no rows of 'similarity, growing'"):
        growth_figure(toy(operation="similarity"))
