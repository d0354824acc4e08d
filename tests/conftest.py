"""How the tests are run: offline, seeded, one thread each; flagged notebook cells and GPU tests
are left out, and counted."""

import csv
import os
import random
import threading
from collections import Counter
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small matrices: more threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WEIGHTREGIONS_CACHE", "")  # every class is asked, as by a first command

import hypothesis
import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 10  # the longest that a test may take
DEEPER = 20  # times as many examples are drawn with --hypothesis-profile deep

hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile(
    "deep", deadline=None, max_examples=100 * DEEPER, print_blob=True
)
hypothesis.settings.load_profile("same")  # unless the command line names another


def is_deep(config):
    return config.getoption("--hypothesis-profile") == "deep"


def deepen():
    "Multiply the numbers of examples that tests ask for themselves."
    as_asked = hypothesis.settings.__init__

    def deeper(self, *args, **told):
        if "max_examples" in told:
            told["max_examples"] *= DEEPER
        as_asked(self, *args, **told)

    hypothesis.settings.__init__ = deeper


def own_lock():
    """Progress bars take turns by a lock that a fork does not share: a process killed while it
    holds its own keeps no other waiting."""
    tqdm.set_lock(threading.RLock())


own_lock(), os.register_at_fork(after_in_child=own_lock)


def pytest_addoption(parser):
    parser.addoption(
        "--flags",
        default="",
        help="run notebook cells with these flags too, such as 'slow cuda'",
    )
    parser.addoption(
        "--faults",
        metavar="FILE",
        help=(
            "write what the tests of faults tried to this CSV file, for the chapter on"
            " robustness"
        ),
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU")
    config.addinivalue_line("markers", "slow: takes minutes; run with --flags slow")
    if is_deep(config):
        deepen()


def has_gpu():
    """Whether this machine has a GPU; torch is imported where it is needed, so that pytest
    itself starts fast."""
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    items.sort(
        key=lambda item: (
            not item.get_closest_marker("xdist_group"),
            item.path.name != "test_notebooks.py",
        )
    )  # the longest first
    flags = config.getoption("--flags").split()
    for item in items:
        if not item.get_closest_marker("timeout"):
            item.add_marker(
                pytest.mark.timeout(60 * MINUTES * (6 if flags or is_deep(config) else 1))
            )
        if item.get_closest_marker("cuda") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        if item.get_closest_marker("slow") and "slow" not in flags:
            item.add_marker(pytest.mark.skip(reason="slow: --flags slow"))


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """Every test, and every notebook, starts from the same state, whatever ran before it in
    this process."""
    import matplotlib.pyplot as plt
    import numpy as np
    import torch

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv(
        "IN_TEST", raising=False
    )  # set by nbdev's runner for good; nbdev_export does nothing where it is set
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    torch.set_num_threads(1)
    (
        torch.set_grad_enabled(True),
        torch.set_default_dtype(torch.float32),
        torch.use_deterministic_algorithms(False),
    )
    with plt.rc_context():
        yield
    plt.close("all")


RECORDED = ROOT / "nbs" / "study" / "recorded" / "faults.csv"


@pytest.fixture
def tried(request, record_property):
    """Count a fault: `tried(fault, stage, times, outcome)`. The recorded table, which the book
    shows, must have its row; its number may differ where that is not `exact`."""

    def count(fault, stage, times, outcome, exact=True):
        record_property("fault", (fault, stage, times, outcome))
        if request.config.getoption("--faults"):
            return
        with open(RECORDED, encoding="utf-8", newline="") as f:
            rows = {(r[0], r[1], r[3]): r[2] for r in csv.reader(f)}
        recorded = rows.get((fault, stage, outcome))
        assert recorded, (
            f"{RECORDED.relative_to(ROOT)} lacks this fault: record it with --faults"
        )
        if exact and not is_deep(request.config):
            assert str(times) == recorded, (
                f"{fault}, {stage}: tried {times} times, and {recorded} times in"
                f" {RECORDED.relative_to(ROOT)}: record it with --faults"
            )

    return count


def write_faults(terminalreporter, file):
    "All faults that were tried, sorted."
    reports = [
        r
        for reports in terminalreporter.stats.values()
        for r in reports
        if getattr(r, "when", "") == "call"
    ]
    rows = sorted(
        tuple(value) for r in reports for key, value in r.user_properties if key == "fault"
    )
    with open(file, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(
            [("fault", "stage", "tried", "outcome"), *rows]
        )
    terminalreporter.write_sep(
        "-", f"faults: {sum(row[2] for row in rows)} of {len(rows)} kinds, written to {file}"
    )


def pytest_terminal_summary(terminalreporter, config):
    "Say how many notebook cells ran, and how many were left out for which flag."
    if config.getoption("--faults"):
        write_faults(terminalreporter, config.getoption("--faults"))
    cells = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            cells.update(
                dict(
                    value
                    for key, value in getattr(report, "user_properties", ())
                    if key == "cells"
                )
            )
    if not cells:
        return
    ran = cells.pop("ran")
    left = ", ".join(f"{n} {flag}" for flag, n in sorted(cells.items())) or "none"
    terminalreporter.write_sep("-", f"notebook cells: {ran} ran, left out: {left}")
