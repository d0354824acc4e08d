"""What the package costs, beside the floor and what a user would do today.

One run gives one table and one file of rows; `make bench` calls this. Each measurement is a
process of its own, so that its peak of anonymous memory is its own; the ways of one operation
take turns, and the medians are reported. Rows of operations that are not measured stay in the
file, and are said to be of earlier runs. Checkpoints are random, written once, into memory (a
tmpfs) where there is one with room, and removed at the end.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from math import nan
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from measure import alone
from report import (
    FIELDS,
    beside,
    device_name,
    goals,
    rates,
    read_bench,
    throughput,
    write_bench,
)

HERE = Path(__file__).resolve().parent
SIZES = {
    "base": dict(
        n=12, grown=(4, 8, 16, 32), layers=(3, 6, 12), points=8, sentences=500, adapters=200
    ),
    "small": dict(n=4, grown=(2, 4, 6), layers=(1, 2), points=4, sentences=50, adapters=6),
}


class Bench:
    "The state of one run: its folders, its settings, and the rows so far."

    def __init__(self, a, work):
        self.a, self.work, self.size, self.rows, self.written = a, work, SIZES[a.size], [], 0
        self.kept = (
            read_bench(a.rows) if Path(a.rows).exists() else pd.DataFrame(columns=FIELDS)
        )
        self.peers, self.device = (
            a.peers if a.peers and Path(a.peers).is_file() else None,
            a.device,
        )
        self.of = "" if a.base == "minilm" else ", of a RoBERTa of random weights"

    def models(self, n):
        "The start, and the first n models, written if they are not there."
        if n >= self.written:
            self.params = self.call(
                "write", folder=str(self.work), size=self.a.size, first=self.written, stop=n + 1
            )["params"]
            self.written = n + 1
        start, *others = (str(self.work / f"{i:02d}") for i in range(n + 1))
        return others, start

    def call(self, way, script="ways.py", **arguments):
        "One measurement: what the way says of itself, with its process's seconds and peak."
        result = self.work / "result.json"
        device, quiet = (
            arguments.get("device", "cpu"),
            {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        )
        run = alone(
            [
                self.peers if script == "peers.py" else sys.executable,
                str(HERE / script),
                way,
                json.dumps(arguments),
                str(result),
            ],
            env=os.environ | quiet | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        )
        found = json.loads(result.read_text())
        result.unlink()
        return found | {
            "process": run.seconds,
            "process_cpu": run.cpu_seconds,
            "peak_mb": run.peak_mb,
            "device": device,
        }

    def process(self, words, root):
        "A process of Python with the package of a checkout: its seconds and its peak."
        for left in self.work.glob("told*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        env = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(root)}
        run = alone(
            [sys.executable, "-P", *words],  # the current folder has a package of that name too
            env=os.environ | env | {"CUDA_VISIBLE_DEVICES": ""},
        )
        times = {"process": run.seconds, "process_cpu": run.cpu_seconds}
        return times | {"peak_mb": run.peak_mb, "device": "cpu"}

    def compute(self, way, script="ways.py", **arguments):
        "One measurement on the device that was asked for."
        return self.call(way, script, **arguments, device=self.device)

    def rounds(self, ways, rounds=None):
        """Subject -> medians of some measurements that take turns; of a peer that is missing or
        fails, what there is to say."""
        found = {subject: [] for subject in ways}
        for i in range(rounds or self.a.rounds):
            for subject, call in list(ways.items())[:: 1 if i % 2 == 0 else -1]:
                if isinstance(found[subject], str):
                    continue
                try:
                    found[subject].append(call())
                except ValueError as error:
                    found[subject] = str(error)
                if isinstance(found[subject], str) and subject.startswith(
                    ("weightregions", "floor")
                ):
                    raise ValueError(f"{subject}: {found[subject]}")
        return {
            subject: said
            if isinstance(said, str)
            else said[-1]
            | {k: median(s[k] for s in said) for k in said[0] if isinstance(said[0][k], float)}
            for subject, said in found.items()
        }

    def peer(self, name, **arguments):
        "A measurement of a peer, if it is there."
        if not self.peers:
            raise ValueError("not installed")
        return self.call(name, script="peers.py", **arguments)

    def add(self, operation, found, floor=None, errors=(), clock=None, n=None, params=None):
        """Rows of one operation; `clock` says which of the times that were measured, if not
        that of the operation."""
        clock = clock or {"wall": "seconds", "cpu": "cpu"}[self.a.clock]
        least, before = found[floor][clock] if floor else nan, len(self.rows)
        for subject, said in found.items():
            if subject == floor:
                continue
            row = dict(
                operation=operation,
                subject=subject,
                n=n,
                params=params or self.params,
                seconds=nan,
                floor_seconds=least,
                peak_mb=nan,
                error=nan,
                device=device_name(),
            )
            if isinstance(said, str):
                row["subject"] = f"{subject}: {said}"
            else:
                row |= dict(
                    n=said.get("n", n),
                    seconds=said[clock],
                    peak_mb=said["peak_mb"],
                    error=dict(errors).get(subject, nan),
                    device=device_name(said["device"]),
                )
            self.rows.append(row)
        rows = pd.DataFrame(self.rows, columns=FIELDS)
        kept = self.kept[~self.kept.operation.isin(rows.operation)]
        write_bench(pd.concat([kept, rows]) if len(kept) else rows, self.a.rows)
        print(beside(rows[before:]).to_string(index=False), flush=True)

    def error(self, way, file, **arguments):
        return self.call(way, out=str(file), **arguments)["error"]


def free_memory():
    "Bytes that are free for use, by the system's account."
    found = [
        line.split()[1]
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    ]
    return int(found[0]) * 1024


def said(why):
    "A measurement that is not made, and says why."

    def call():
        raise ValueError(why)

    return call


def ceiling(b):
    models, start = b.models(b.size["n"])
    ways = {
        "reading": "read",
        "copying to the device": "copy",
        "product in float64": "float64",
        "product in float32": "float32",
    }
    call = lambda what: b.call(
        "ceiling",
        models=models,
        base=start,
        params=b.params,
        what=what,
        device="cpu" if what == "read" else b.device,
    )
    b.add(
        "ceiling",
        b.rounds({subject: lambda what=what: call(what) for subject, what in ways.items()}),
        n=len(models),
    )


def similarity(b):
    n, file = b.size["n"], lambda way: str(b.work / f"{way}.pt")
    models, start = b.models(n)
    names = {
        "weightregions": "similarity",
        "weightregions, one model more": "extended",
        "weightregions, sketch of 4096 numbers": "sketched",
        "load, stack, multiply": "load_stack_matmul",
        "a streamed loop": "streamed_loop",
    }
    ways = {
        subject: lambda way=way: b.compute(way, models=models, base=start, out=file(way))
        for subject, way in names.items()
    }
    for dtype in ("float64", "float32"):
        ways[f"floor, product in {dtype}"] = lambda t=dtype: b.compute(
            "similarity_floor", models=models, base=start, params=b.params, dtype=t
        )
    if b.device == "cpu" and (need := 8 * n * b.params) > 0.9 * free_memory():
        ways["load, stack, multiply"] = said(
            f"not measured, it takes {need / 1e9:.1f} GB and {free_memory() / 1e9:.1f} GB are"
            " free"
        )
    found = b.rounds(ways)
    b.call("cosines_float64", models=models, base=start, out=file("exact"))
    exact = torch.load(file("exact"), weights_only=True)
    errors = {
        subject: float((torch.load(file(way), weights_only=True) - exact).abs().max())
        for subject, way in names.items()
        if not isinstance(found[subject], str)
    }
    b.add("similarity", found, "floor, product in float64", errors, n=n)


def average(b):
    models, start = b.models(b.size["n"])
    models, errors = models[:5], {}

    def written(subject, call):
        def one():
            out = b.work / "average"
            shutil.rmtree(out, ignore_errors=True)
            found = call(str(out))
            if subject != "floor" and subject not in errors:
                errors[subject] = b.error("average_error", out, models=models)
            shutil.rmtree(out)
            return found

        return one

    ways = {
        "weightregions": lambda out: b.call("average", models=models, out=out),
        "load, add, save": lambda out: b.call("load_and_add", models=models, out=out),
        "mergekit linear": lambda out: b.peer("merge", models=models, out=out),
        "floor": lambda out: b.call("average_floor", models=models, params=b.params, out=out),
    }
    found = b.rounds({subject: written(subject, call) for subject, call in ways.items()})
    b.add("average of 5", found, "floor", errors, n=5)
    b.add(
        "average of 5, with the start of Python",
        {k: found[k] for k in found if k != "floor"},
        None,
        errors,
        {"wall": "process", "cpu": "process_cpu"}[b.a.clock],
        n=5,
    )


METHODS = {  # of the package -> what mergekit calls it, and is told
    "task-arithmetic": dict(method="task_arithmetic"),
    "slerp": dict(method="slerp", each={}, t=0.5),
    "ties": dict(method="ties", each={"weight": 1.0, "density": 0.2}),
    "model-stock": dict(method="model_stock", each={}),
}


def merges(b):
    "Other methods than the mean, and the share of weights that mergekit has otherwise."
    models, start = b.models(4)
    for method, told in METHODS.items():
        members = models[:2] if method == "slerp" else models[:4]
        base = members[0] if method == "slerp" else start
        outs, errors = {s: str(b.work / s) for s in ("ours", "theirs")}, {}

        def call(subject, way):
            shutil.rmtree(outs[subject], ignore_errors=True)
            return way(out=outs[subject])

        ours = partial(b.call, "merge_by", method=method, models=members, base=start)
        theirs = partial(b.peer, "merge", models=members, base=base, **told)
        ways = {
            "weightregions": partial(call, "ours", ours),
            "mergekit": partial(call, "theirs", theirs),
        }
        found = b.rounds(ways)
        if not isinstance(found["mergekit"], str):
            errors["mergekit"] = b.error("apart", outs["theirs"], ours=outs["ours"])
        b.add(f"merge by {method}", found, None, errors, n=len(members))


def line(b):
    (first, second, *_), start = b.models(b.size["n"])
    points, errors = b.size["points"], {}

    def kept(subject, call):
        def one():
            found = call(str(b.work / "half.pt"))
            if subject not in errors:
                errors[subject] = b.error("line_error", b.work / "half.pt", a=first, b=second)
            return found

        return one

    ends = dict(a=first, b=second, points=points)
    ways = {
        "weightregions": lambda out: b.compute("stand", out=out, **ends),
        "weightregions, models read from their files": lambda out: b.compute(
            "stand", out=out, held=False, **ends
        ),
        "state dict, loaded": lambda out: b.compute("state_dicts", out=out, **ends),
        "model copied, state dict loaded": lambda out: b.compute(
            "state_dicts", out=out, copied=True, **ends
        ),
        "loss-landscapes": lambda out: b.peer("walk", out=out, device=b.device, **ends),
    }
    found = b.rounds(
        {subject: kept(subject, call) for subject, call in ways.items()}
        | {
            "floor": lambda: b.compute("line_floor", params=b.params, points=points),
            f"an evaluation of {b.size['sentences']} sentences": lambda: b.compute(
                "evaluation", a=first, sentences=b.size["sentences"]
            ),
        }
    )
    b.add("a point on a line", found, "floor", errors, n=2)


def growth(b):
    for n in b.size["grown"]:
        b.models(min(n, b.size["n"]))
        need, free = (n + 1 - b.written) * 4 * b.params, free_memory()
        if need > 0.8 * free:
            print(
                (
                    f"similarity of {n} models is left out: it takes {need / 1e9:.1f} GB more"
                    f" of checkpoints, and {free / 1e9:.1f} GB of memory are free"
                ),
                flush=True,
            )
        else:
            _grown(b, n)
    for layers in b.size["layers"]:
        _grown(b, 8 if b.a.size == "base" else 4, layers)


def _grown(b, n, layers=None):
    "Similarity of n models, or of their first layers."
    (models, start), last = b.models(n), {}

    def ours():
        last.update(found := b.compute("similarity", models=models, base=start, layers=layers))
        return found

    def floor():
        return b.compute(
            "similarity_floor",
            models=models,
            base=start,
            params=last["params"],
            dtype="float64",
        )

    found = b.rounds({"weightregions": ours, "floor": floor}, max(1, b.a.rounds - 1))
    b.add("similarity, growing", found, "floor", n=n, params=last["params"])


def probe(b):
    base = _base(b)
    names = {
        "weightregions": "probe",
        "a layer trained by Adam, rows encoded in each step": "probe_by_sgd",
        "floor": "probe_floor",
    }
    found = b.rounds(
        {
            subject: lambda way=way: b.compute(way, base=base, size=b.a.size)
            for subject, way in names.items()
        }
    )
    best = min(said["objective"] for said in found.values() if "objective" in said)
    b.add(
        f"the probe{b.of}",
        found,
        "floor",
        {k: said["objective"] - best for k, said in found.items() if "objective" in said},
        params=found["floor"]["params"],
    )


def zoo(b):
    from weightregions.finetuning import fast_bfloat16

    base, (fast, other) = (
        _base(b),
        ("float32", "bfloat16")[:: -1 if fast_bfloat16(b.device) else 1],
    )

    def ours(**how):
        return lambda: b.compute(
            "zoo", base=base, size=b.a.size, folder=str(b.work / "zoo"), **how
        )

    def plain(padding):
        return lambda: b.compute(
            "trainer",
            base=base,
            size=b.a.size,
            folder=str(b.work / "trained"),
            dtype=fast,
            padding=padding,
        )

    ways = {"weightregions": ours(), f"weightregions, {other}": ours(dtype=other)}
    one = "weightregions, one process" + (" of one thread" if b.device == "cpu" else "")
    if b.device == "cpu":
        ways |= {
            one: ours(workers=1),
            "weightregions, one process of all threads": ours(workers=1, one_thread=False),
        }
    ways |= {f"{one}, rows of any length in a batch": ours(workers=1, like_length=False)}
    ways |= {
        f"Trainer, {fast}, padded to the {padding}": plain(padding)
        for padding in ("longest allowed", "longest of a batch")
    }
    where = (
        f"{os.cpu_count()} cores" if b.device == "cpu" else f"{torch.cuda.device_count()} GPU"
    )
    b.add(
        f"a model of a zoo, {where}{b.of}",
        b.rounds(ways, 1),
        clock="seconds",
        params=b.call("probe_floor", base=base, size=b.a.size)["params"],
    )


PROGRAM = "import sys; from weightregions.cli import main; sys.exit(main())"


def command_lines(models, base, out):
    "Name -> what Python is called with."
    run, known = ["-c", PROGRAM], ["--base", base, "--out", str(out / "told")]
    typo = PROGRAM.replace("main())", "main() != 2)")
    return {
        "a mistyped folder": ["-c", typo, "similarity", "no/such/folder", *known],
        "similarity": [*run, "similarity", *models, *known],
        "center": [*run, "center", *models, *known],
        "locate": [*run, "locate", models[0], "--zoo", *models, *known[:-1], f"{out}/told.csv"],
        "import weightregions.zoo": ["-c", "import weightregions.zoo"],
    }


def commands(b):
    "Processes of commands on seven checkpoints, of this checkout and perhaps another."
    base = _base(b)
    made = b.call("noisy", base=base, folder=str(b.work / "noisy"), n=7)
    checkouts = {"weightregions": HERE.parent.parent}
    if b.a.before:
        checkouts["before"] = b.a.before
    for name, words in command_lines(made["models"], base, b.work).items():
        ways = {s: lambda root=root: b.process(words, root) for s, root in checkouts.items()}
        ways["floor, importing torch"] = lambda: b.process(["-c", "import torch"], HERE)
        found, floor = b.rounds(ways), "floor, importing torch"
        kind = {"clock": "process_cpu", "n": 7, "params": made["params"]}
        b.add(f"process: {name}", found, floor, **kind)


def adapters(b):
    """LoRA adapters of a decoder compared, and their centre. On disk, for merged models are
    large; the centre on two layers, for PEFT decomposes whole matrices."""
    rank, few = 16, 8
    with tempfile.TemporaryDirectory(dir=b.a.store or None) as work:
        all_layers, two = f"{work}/all", f"{work}/two"

        def call(way, folder, **arguments):
            return lambda: b.call(way, script="adapters.py", folder=folder, **arguments)

        about = dict(size=b.a.size, n=b.size["adapters"], rank=rank)
        params = call("write", all_layers, **about)()["params"]
        ways = {
            "weightregions": call("compare", all_layers, n=b.size["adapters"]),
            "merge each with PEFT, then compare": call("merge_and_compare", all_layers, n=2),
        }
        b.add("similarity of adapters", b.rounds(ways, 1), n=b.size["adapters"], params=params)
        shutil.rmtree(all_layers)
        params = call("write", two, **about | dict(n=few, layers=2))()["params"]
        ways = {
            "weightregions, exact": call("centre", two, n=few, rank=None),
            "PEFT, cat": call("add_weighted", two, n=few, how="cat", rank=rank),
            f"weightregions, rank {rank}": call("centre", two, n=few, rank=rank),
            f"PEFT, svd, rank {rank}": call("add_weighted", two, n=few, how="svd", rank=rank),
        }
        b.add("centre of adapters, 2 layers", b.rounds(ways), n=few, params=params)
        n = b.size["sentences"]
        ways = {
            "weightregions": call("between", two, points=b.size["points"]),
            f"an evaluation of {n} sentences": call("evaluation", two, sentences=n),
        }
        b.add("a point between adapters, 2 layers", b.rounds(ways), n=2, params=params)


def _base(b):
    "The encoder that is probed and fine-tuned."
    from ways import base_model

    return base_model(b.a.size, b.work, b.a.base)


PARTS = {
    "ceiling": ceiling,
    "similarity": similarity,
    "average": average,
    "merges": merges,
    "line": line,
    "growth": growth,
    "probe": probe,
    "zoo": zoo,
    "commands": commands,
    "adapters": adapters,
}


def room(size):
    "A folder in memory if there is one with room for the checkpoints, else on the disk."
    memory, need = (
        Path("/dev/shm"),
        1.1 * (SIZES[size]["n"] + 1) * (5e8 if size == "base" else 1e6),
    )
    return (
        str(memory)
        if os.access(memory, os.W_OK)
        and min(shutil.disk_usage(memory).free, free_memory()) > need
        else None
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--size",
        choices=SIZES,
        default="base",
        help="of the checkpoints: RoBERTa-base's, or two small layers",
    )
    p.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what multiplies, walks, encodes and trains",
    )
    p.add_argument(
        "--base",
        choices=("minilm", "random"),
        default="minilm",
        help=(
            "what is probed and fine-tuned: MiniLM, or a RoBERTa of random weights,"
            " RoBERTa-base's size if checkpoints have it"
        ),
    )
    p.add_argument(
        "--only",
        nargs="*",
        choices=PARTS,
        default=[],
        metavar="PART",
        help=f"what to measure, of {', '.join(PARTS)} (all)",
    )
    p.add_argument("--rows", type=Path, default=Path("out/bench.csv"), help="the file of rows")
    p.add_argument("--rounds", type=int, default=3, help="measurements of each way")
    p.add_argument(
        "--peers",
        default="",
        help="the interpreter that mergekit and loss-landscapes are installed for",
    )
    p.add_argument("--before", default="", help="another checkout, whose commands are measured")
    p.add_argument("--store", default="", help="the folder to put checkpoints in")
    p.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="seconds by the clock, or of the processor where a machine has other users",
    )
    a = p.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        p.error("torch finds no GPU")
    if a.device == "cuda" and a.clock == "cpu":
        p.error("a GPU's work does not show in the processor's seconds")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the checkpoints are removed
    with tempfile.TemporaryDirectory(
        prefix="weightregions-bench-", dir=a.store or room(a.size)
    ) as work:
        b = Bench(a, Path(work))
        place = "memory" if work.startswith("/dev/shm") else "a folder"
        devices = "; ".join(dict.fromkeys([device_name(), device_name(a.device)]))
        clock = "by the clock" if a.clock == "wall" else "of the processor"
        peers = "installed" if b.peers else "not installed: make bench PEERS=1"
        print(
            f"{a.size} checkpoints in {place}, {devices}, seconds {clock}; peers {peers}",
            flush=True,
        )
        for part, measure in PARTS.items():
            if part in a.only or not a.only:
                measure(b)
            if part == "growth":
                [shutil.rmtree(f) for f in b.work.glob("[0-9][0-9]")]
    rows, told = read_bench(a.rows), lambda table: f"{table.to_string(index=False)}\n"
    now = rows.operation.isin({row["operation"] for row in b.rows})
    print("\nthis run\n")
    for table in (beside, rates, throughput, goals):
        if len(table(rows[now])):
            print(told(table(rows[now])))
    if not now.all():
        print(f"of earlier runs, kept in the file\n\n{told(beside(rows[~now]))}")
    print(f"{len(rows)} rows in {a.rows}, {now.sum()} of them of this run")


if __name__ == "__main__":
    main()
