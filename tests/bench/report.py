"Rows of the bench, what one reads off them, and the goals that they are held to."

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from weightregions.files import read_table, write_whole

FIELDS = [
    "operation",
    "subject",
    "n",
    "params",
    "seconds",
    "floor_seconds",
    "peak_mb",
    "error",
    "device",
]


def device_name(
    kind: str = "cpu",  # "cpu" or "cuda"
) -> str:  # the processor and how many threads torch uses, or the GPU
    "What computes."
    if kind == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    threads = torch.get_num_threads()
    return f"{found[1] if found else 'CPU'}, {threads} thread{'s' * (threads > 1)}"


def write_bench(
    rows: pd.DataFrame,  # with the columns of FIELDS
    file: str | Path,  # a name that ends in .csv
) -> Path:
    "Keep rows, four digits of each measured number."
    measured = {
        c: rows[c].map(lambda v: "" if pd.isna(v) else f"{v:.4g}")
        for c in ("seconds", "floor_seconds", "peak_mb", "error")
    }
    write_whole(file, rows.assign(**measured)[FIELDS].to_csv(index=False, lineterminator="\n"))
    return Path(file)


def read_bench(
    file: str | Path,  # what `write_bench` wrote
) -> pd.DataFrame:  # a row a measurement: see FIELDS
    "The rows that were kept."
    rows = read_table(file, ("operation", "subject", "device"), FIELDS)
    measured = ["seconds", "floor_seconds", "peak_mb", "error"]
    return rows.astype(dict.fromkeys(measured, float))[FIELDS]


def _printed(table: pd.DataFrame, how: dict) -> pd.DataFrame:
    "Numbers of some columns as text, unknown ones empty."
    return table.assign(
        **{
            column: table[column].map(lambda v: "" if pd.isna(v) else form.format(v))
            for column, form in how.items()
        }
    )


def beside(
    rows: pd.DataFrame,  # with the columns of FIELDS
) -> (
    pd.DataFrame
):  # a row a measurement, as it is printed; with the device, if there are several
    "Rows with their ratios to the floor and to the package."
    key = ["operation", "n", "params"]
    ours = rows[rows.subject == "weightregions"].drop_duplicates(key).set_index(key).seconds
    own = rows[key].apply(tuple, axis=1).map(ours.to_dict()).astype(float)
    shown = rows[["operation", "subject", "n"]].assign(
        **{
            "M weights": rows.params / 1e6,
            "seconds": rows.seconds,
            "of the floor": rows.seconds / rows.floor_seconds,
            "of ours": rows.seconds / own,
            "peak MB": rows.peak_mb,
            "error": rows.error,
        }
    )
    if rows.device.nunique() > 1:
        shown["device"] = rows.device
    return _printed(
        shown,
        {
            "M weights": "{:.1f}",
            "seconds": "{:.3g}",
            "of the floor": "{:.2f}",
            "of ours": "{:.2f}",
            "peak MB": "{:.0f}",
            "error": "{:.1e}",
        },
    )


def _value(
    rows: pd.DataFrame, operation: str, subject: str, column: str = "seconds", **where
) -> float:
    """One number of the rows, of a subject or of what its name begins with; NaN if it was not
    measured."""
    found = rows[
        (rows.operation == operation)
        & ((rows.subject == subject) | rows.subject.str.startswith(f"{subject} "))
    ]
    for name, value in where.items():
        found = found[found[name] == value]
    return float(found[column].iloc[0]) if len(found) else nan


def rates(
    rows: pd.DataFrame,  # with the columns of FIELDS; those of "ceiling" are taken
) -> pd.DataFrame:  # one row per ceiling
    """How fast the machine reads, copies and multiplies.

    In GB/s, or GFLOP/s of a product; and the share of similarity's seconds that it takes alone.
    """
    found = rows[rows.operation == "ceiling"]
    vectors, product = found.n + 1, found.subject.str.startswith("product")
    work = (4 * vectors * found.params).where(~product, 2 * vectors**2 * found.params)
    shown = found[["subject", "seconds"]].assign(
        rate=work / 1e9 / found.seconds,
        unit=product.map({True: "GFLOP/s", False: "GB/s"}),
        **{
            "of similarity": found.seconds / _value(rows, "similarity", "weightregions"),
            "device": found.device,
        },
    )
    return _printed(
        shown, {"seconds": "{:.3g}", "rate": "{:.1f}", "of similarity": "{:.2f}"}
    ).reset_index(drop=True)


def throughput(
    rows: pd.DataFrame,  # with the columns of FIELDS; those of a zoo are taken
) -> pd.DataFrame:  # one row per way: models an hour, and times the fastest plain Trainer
    "Models an hour of each way to make a zoo."
    found = rows[rows.operation.str.startswith("a model of a zoo") & rows.seconds.notna()]
    shown = found[["operation", "subject", "seconds"]].assign(
        **{"models an hour": 3600 / found.seconds}
    )
    for padding in ("the longest allowed", "the longest of a batch"):
        plain = found[
            found.subject.str.startswith("Trainer")
            & found.subject.str.endswith(f"padded to {padding}")
        ]
        shown[f"of a Trainer padding to {padding}"] = (
            found.operation.map(plain.groupby("operation").seconds.min()).astype(float)
            / found.seconds
        )
    return _printed(
        shown, {c: "{:.0f}" if c == "models an hour" else "{:.2f}" for c in shown.columns[2:]}
    ).reset_index(drop=True)


def _sweeps(rows: pd.DataFrame) -> dict:
    """The two sweeps of similarity as it grows: over N, of whole models; and over P, of equally
    many models."""
    rows = rows[
        (rows.operation == "similarity, growing") & (rows.subject == "weightregions")
    ].sort_values(["n", "params"])
    whole = rows.params == rows.params.max()
    return {"N": rows[whole], "P": rows[rows.n.isin(rows.n[~whole])]}


def straightness(
    rows: pd.DataFrame,  # of one sweep, the package's
    column: str = "seconds",  # what grows
) -> tuple:  # R squared in N x P, and the largest residual's share; NaN below three points
    "How straight a line the cost is in the numbers read."
    x, y = (rows.n * rows.params).to_numpy(float), rows[column].to_numpy(float)
    if len(x) < 3:
        return nan, nan
    return float(np.corrcoef(x, y)[0, 1] ** 2), float(
        np.max(np.abs(1 - np.polyval(np.polyfit(x, y, 1), x) / y))
    )


@dataclass(frozen=True)
class Goal:
    "Something that was aimed at, and what was measured."

    name: str  # what is held to the bound
    value: float  # what was measured; NaN where it was not
    sign: str = ""  # "<=", ">=" or "<"; empty where nothing was aimed at
    bound: float = nan  # the bound

    def met(self) -> str:
        "yes, no, not measured, or no goal."
        if isnan(self.value):
            return "not measured"
        if not self.sign:
            return "no goal"
        compare = {"<=": operator.le, ">=": operator.ge, "<": operator.lt}[self.sign]
        return "yes" if compare(self.value, self.bound) else "no"

    def row(self) -> dict:
        "As it is printed."
        shown = f"{self.value:.0f}" if self.value >= 1000 else f"{self.value:.3g}"
        measured = "" if isnan(self.value) else shown
        return {"goal": self.name, "measured": measured, "met": self.met()}


OURS = "weightregions"
PROCESS = "average of 5, with the start of Python"
MOST = 1000  # MB of anonymous memory that an operation may take


def similarity_goals(rows: pd.DataFrame) -> list[Goal]:
    "Time against floors and the usual way, error, and straight lines."
    ours, floor = (_value(rows, "similarity", OURS, c) for c in ("seconds", "floor_seconds"))
    single = _value(rows, "similarity", "floor, product in float32")
    usual = _value(rows, "similarity", "load, stack, multiply")
    error = _value(rows, "similarity", OURS, "error")
    goals = [
        Goal(
            "similarity: at most 2 times reading and a product in float64",
            ours / floor,
            "<=",
            2,
        ),
        Goal(
            "similarity: at most 2 times reading and a product in float32",
            ours / single,
            "<=",
            2,
        ),
        Goal(
            "similarity: at least 5 times faster than load, stack, multiply",
            usual / ours,
            ">=",
            5,
        ),
        Goal("similarity: cosines within 1e-6 of float64", error, "<", 1e-6),
    ]
    lines = {what: straightness(part) for what, part in _sweeps(rows).items()}
    straight = "similarity: seconds a straight line in"
    for what, (square, _) in lines.items():
        goals.append(Goal(f"{straight} {what}, R squared", square, ">=", 0.95))
    for what, (_, residual) in lines.items():
        goals.append(
            Goal(f"{straight} {what}, largest residual in %", 100 * residual, "<=", 10)
        )
    return goals


def other_goals(rows: pd.DataFrame) -> list[Goal]:
    "Averages, points and the probe."
    average, point = "average of 5", "a point on a line"
    ours, floor = (_value(rows, average, OURS, c) for c in ("seconds", "floor_seconds"))
    process = _value(rows, PROCESS, "mergekit") / _value(rows, PROCESS, OURS)
    call = _value(rows, average, "mergekit") / ours
    error = _value(rows, average, OURS, "error")
    share = _value(rows, point, OURS) / _value(rows, point, "an evaluation")
    adam = _value(rows, "the probe", "a layer") / _value(rows, "the probe", OURS)
    adapters = _value(rows, "similarity of adapters", OURS, n=200)
    between = "a point between adapters, 2 layers"
    small = _value(rows, between, OURS) / _value(rows, between, "an evaluation")
    mergekit = "average: at least 3 times faster than mergekit, process against process"
    return [
        Goal("average: at most 2 times the floor", ours / floor, "<=", 2),
        Goal(mergekit, process, ">=", 3),
        Goal("average: the same, call against call", call),
        Goal("average: float32 rounding at most", error, "<=", 1.2e-7),
        Goal("a point: at most 1 % of an evaluation, in %", 100 * share, "<=", 1),
        Goal(f"{between}: at most 1 % of an evaluation, in %", 100 * small, "<=", 1),
        Goal("the probe: at least 10 times faster than by Adam", adam, ">=", 10),
        Goal("similarity of adapters: 200 of 1.1 B weights within 120 s", adapters, "<=", 120),
    ]


def memory_goals(rows: pd.DataFrame) -> list[Goal]:
    "The largest of all our ways to an operation."
    zoo = "a model of a zoo"
    zoo = next((o for o in rows.operation if o.startswith(zoo)), zoo)
    peaks = rows[rows.subject.str.startswith(OURS)].groupby("operation").peak_mb.max()
    operations = ["similarity", "similarity, growing", "average of 5", "the probe"]
    operations += ["similarity of adapters"]
    own = f"at most {MOST} MB of its own"
    goals = [
        Goal(f"{o}: {own}", float(peaks.get(o, nan)), "<=", MOST) for o in [*operations, zoo]
    ]
    for how, subject in (
        ("models held in memory", OURS),
        ("models read from their files", f"{OURS}, models read from their files"),
    ):
        peak = _value(rows, "a point on a line", subject, "peak_mb")
        goals.append(Goal(f"a point on a line, {how}: {own}", peak, "<=", MOST))
    return goals


COMMANDS = {"a mistyped folder": 0.3, "similarity": 4.5, "center": 3, "locate": 5}


def command_goals(rows: pd.DataFrame) -> list[Goal]:
    "Seconds of the processor that commands take, of seven checkpoints of MiniLM's size."
    spent = {name: _value(rows, f"process: {name}", OURS) for name in COMMANDS}
    goals = [
        Goal(f"{name}, a process: at most {most} s of the processor", spent[name], "<=", most)
        for name, most in COMMANDS.items()
    ]
    name = "process: import weightregions.zoo"
    ratio = _value(rows, name, OURS) / _value(rows, name, OURS, "floor_seconds")
    goals.append(Goal("import weightregions.zoo: at most 1.3 times torch", ratio, "<=", 1.3))
    before = {n: _value(rows, f"process: {n}", "before") / spent[n] for n in COMMANDS}
    known = {n: value for n, value in before.items() if not isnan(value)}
    return goals + [Goal(f"{n}: times faster than before", v) for n, v in known.items()]


def goals(
    rows: pd.DataFrame,  # with the columns of FIELDS
) -> pd.DataFrame:  # goal, measured, met
    "What was aimed at, and what was measured."
    every = [*similarity_goals(rows), *other_goals(rows), *memory_goals(rows)]
    every += command_goals(rows)
    return pd.DataFrame([goal.row() for goal in every])


def growth_figure(
    rows: pd.DataFrame,  # with the columns of FIELDS; those of "similarity, growing" are drawn
    axes: Sequence[Axes] | None = None,  # two, for time and memory
) -> Sequence[Axes]:  # the two
    """Seconds and peak memory of similarity against the numbers read, with the floor of each
    sweep."""
    sweeps = {what: part for what, part in _sweeps(rows).items() if len(part)}
    if not sweeps:
        raise ValueError("bench: no rows of 'similarity, growing' by weightregions")
    axes = plt.subplots(1, 2, figsize=(9.5, 3.8))[1] if axes is None else axes
    for (what, part), colour, marker in zip(sweeps.items(), ("#2a7f9e", "#d98c3f"), "os"):
        read, n, p = (
            part.n * part.params / 1e9,
            part.n.drop_duplicates(),
            (part.params / 1e6).drop_duplicates(),
        )
        label = f"N = {', '.join(map(str, n))}; P = {', '.join(f'{x:.0f}' for x in p)} million"
        for ax, column in zip(axes, ("seconds", "peak_mb")):
            ax.plot(read, part[column], marker, color=colour, label=label)
        for times, style, name in ((1, "--", "floor"), (2, ":", "twice the floor")):
            axes[0].plot(
                read,
                times * part.floor_seconds,
                style,
                color=colour,
                label=name if what == "N" else None,
            )
    axes[1].axhline(1000, ls=":", color="#888888", label="goal")
    for ax, title, what in zip(
        axes, ("Time", "Memory"), ("seconds", "peak of anonymous memory, MB")
    ):
        ax.set(
            title=title,
            xlabel="N x P, billions of weights",
            ylabel=what,
            xlim=(0, None),
            ylim=(0, None),
        )
        ax.set_ylim(0, 1.4 * ax.get_ylim()[1])  # room for the legend
        ax.legend(loc="upper left")
    return axes
