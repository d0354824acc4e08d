"""Attacks on weightregions.comparison: P_B against scipy, its interval, odd tables, and
comparisons that are killed."""

import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm

from weightregions.comparison import (
    PAPER,
    Measurements,
    compare,
    comparison_table,
    groups_of,
    measured,
    probability_of_better,
    score_interval,
    sharing,
    summary,
)

losses = st.lists(
    st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 1.0, 7.0, np.inf]), min_size=1, max_size=12
)


def rows(values, target="t", name="p", **columns):
    return pd.DataFrame(
        dict(
            point=[f"{name}{i}" for i in range(len(values))],
            target=target,
            loss=values,
            note="",
            **columns,
        )
    )


def crossed(n, targets, shift=0.0, seed=0, name="p"):
    rng = np.random.default_rng(seed)
    return pd.concat(
        [rows(0.5 + shift + 0.1 * rng.normal(size=n), f"t{t}", name) for t in range(targets)],
        ignore_index=True,
    )


# --- the probability --------------------------------------------------------------------------


@settings(max_examples=60)
@given(losses, losses)
def test_agrees_with_mann_whitney(a, b):
    pb = probability_of_better(rows(a), rows(b), n_boot=20)
    finite = lambda x: [1e9 if np.isinf(v) else v for v in x]
    u = mannwhitneyu(finite(b), finite(a), method="asymptotic").statistic
    assert (
        pb.value
        == pytest.approx(u / (len(a) * len(b)), abs=1e-12)
        == pytest.approx(pb.pooled, abs=1e-12)
    )
    assert pb.pairs == len(a) * len(b) and (pb.n_a, pb.n_b) == (len(a), len(b))
    assert pb.ties == sum(x == y for x in a for y in b)


@settings(max_examples=40)
@given(losses, losses)
def test_complement_and_self(a, b):
    assert probability_of_better(rows(a), rows(b), n_boot=20).value + probability_of_better(
        rows(b), rows(a), n_boot=20
    ).value == pytest.approx(1)
    assert probability_of_better(rows(a), rows(a), n_boot=20).value == pytest.approx(0.5)


@settings(max_examples=40)
@given(losses, losses, st.integers(0, 99))
def test_order_of_rows_and_scale_of_losses_do_not_matter(a, b, seed):
    plain = probability_of_better(rows(a), rows(b), n_boot=50)
    assert plain == probability_of_better(
        rows(a).sample(frac=1, random_state=seed),
        rows(b).sample(frac=1, random_state=seed + 1),
        n_boot=50,
    )
    assert plain == probability_of_better(rows(np.log(a)), rows(np.log(b)), n_boot=50)


@settings(max_examples=60)
@given(losses, losses)
def test_interval_is_finite_and_holds_the_value(a, b):
    pb = probability_of_better(rows(a), rows(b), n_boot=100)
    assert 0 <= pb.low <= pb.value <= pb.high <= 1 and pb.high - pb.low > 0


def test_interval_widens_with_fewer_points():
    width = []
    for n in (40, 12, 5):
        pb = probability_of_better(crossed(n, 1), crossed(n, 1, 0.05, 1))
        width.append(pb.high - pb.low)
    assert width[0] < width[1] < width[2]
    certain = [
        probability_of_better(rows([0.1] * n), rows([0.2] * 50)).low for n in (40, 12, 5, 1)
    ]
    assert certain == sorted(certain, reverse=True)


def test_interval_covers_as_it_says():
    rng, hits = np.random.default_rng(3), 0  # true P_B of N(0, 1) against N(1, 1): 0.7602
    for _ in range(120):
        pb = probability_of_better(
            rows(rng.normal(size=15)), rows(1 + rng.normal(size=15)), n_boot=200
        )
        hits += pb.low <= 0.7602 <= pb.high
    assert 0.93 <= hits / 120 <= 0.99


@pytest.mark.parametrize("m, n", [(3, 16), (5, 15), (16, 16), (3, 13)])
@pytest.mark.parametrize("true", [0.5, 0.88, 0.97, 0.995])
def test_interval_covers_with_few_units_and_near_one(m, n, true):
    rng, hits, shift = np.random.default_rng(0), 0, norm.ppf(true) * np.sqrt(2)
    for _ in range(150):
        a, b = rows(rng.normal(size=m)), rows(rng.normal(shift, size=n))
        pb = probability_of_better(a, b, n_boot=100)
        hits += pb.low <= true <= pb.high
    assert hits / 150 >= 0.93


@settings(max_examples=60)
@given(st.floats(0, 1), st.integers(1, 40), st.integers(1, 40))
def test_score_interval_is_a_mirror_and_has_no_steps(value, m, n):
    low, high = score_interval(value, m, n)
    assert 0 <= low <= value <= high <= 1 and high - low > 0
    assert score_interval(1 - value, m, n) == pytest.approx((1 - high, 1 - low), abs=1e-6)
    near = score_interval(min(1, value + 1e-4), m, n)
    assert near == pytest.approx((low, high), abs=0.01)
    wider = score_interval(value, 2 * m, 2 * n)
    assert wider[1] - wider[0] < high - low


def test_almost_all_pairs_are_no_surer_than_all():
    "One pair of 75 lost must not raise the lower end; units, not pairs, are counted."
    ex = rows(np.linspace(0.5, 0.6, 15))
    lows = [
        probability_of_better(rows([0.1] * 4 + [last]), ex).low for last in (0.1, 0.505, 0.52)
    ]
    assert lows == sorted(lows, reverse=True) and lows[0] > 0.7
    assert probability_of_better(rows([0.1] * 5), ex).units == 5


def test_units_of_datasets_are_what_counts():
    a = rows([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dataset=list("xxyyzz"))
    pb = probability_of_better(a, rows([0.35] * 8, dataset=""), units="dataset")
    assert pb.units == 3 and pb.low < 0.1 and pb.high > 0.9


@pytest.mark.parametrize("share, near", [(0.0, False), (0.01, False), (0.011, True), (1, True)])
def test_one_answer_to_whether_two_datasets_share_sentences(share, near):
    shared = pd.DataFrame([dict(a="cr", b="sst2", share=share)])
    assert (sharing(shared, "sst2") == ["cr"]) == near
    table = models(sentiment="sst2 cr", nli="mnli")
    assert ("cr" in groups_of(table, "dataset", "sst2", twins=shared).left_out) == near


def test_targets_are_no_further_witnesses():
    a, b = crossed(8, 1), crossed(8, 1, 0.05, 1)
    many = [
        pd.concat([x.assign(target=f"t{i}") for i in range(50)], ignore_index=True)
        for x in (a, b)
    ]
    one, fifty = probability_of_better(a, b), probability_of_better(*many)
    assert (
        one[:3] == pytest.approx(fifty[:3])
        and fifty.pairs == 50 * one.pairs
        and (fifty.n_a, fifty.targets) == (8, 50)
    )


def test_points_of_their_own_targets_are_drawn_apart():
    a = pd.concat([rows([0.1, 0.3, 0.2], f"t{i}", f"a{i}-") for i in range(6)])
    b = pd.concat([rows([0.2, 0.25, 0.4], f"t{i}", f"b{i}-") for i in range(6)])
    alone = probability_of_better(a[a.target == "t0"], b[b.target == "t0"])
    together = probability_of_better(a, b)
    assert together.n_a == 18 and together.value == pytest.approx(alone.value)
    assert together.high - together.low < 0.6 * (
        alone.high - alone.low
    )  # eighteen witnesses tell more than three


def test_units_are_drawn_whole():
    rng = np.random.default_rng(0)
    effect = np.repeat(
        0.2 * np.linspace(-1, 1, 6), 5
    )  # five seeds of a dataset have much in common
    a = rows(
        0.5 + effect + 0.01 * rng.normal(size=30),
        dataset=np.repeat([f"d{i}" for i in range(6)], 5),
    )
    b = rows(0.5 + 0.1 * rng.normal(size=300), dataset="")
    by_point, by_unit = (
        probability_of_better(a, b),
        probability_of_better(a, b, units="dataset"),
    )
    assert by_point.value == by_unit.value and by_unit.high - by_unit.low > 1.3 * (
        by_point.high - by_point.low
    )


def test_same_seed_same_interval():
    a, b = crossed(9, 2), crossed(7, 2, 0.05, 1)
    assert (
        probability_of_better(a, b, seed=1)
        == probability_of_better(a, b, seed=1)
        != probability_of_better(a, b, seed=2)
    )


def test_mean_over_targets_and_pooled_differ():
    a = pd.concat([rows([0.1] * 9, "easy"), rows([0.9], "hard")])
    b = pd.concat([rows([0.2] * 9, "easy"), rows([0.2], "hard")])
    pb = probability_of_better(a, b)
    assert (pb.value, pb.pooled) == (0.5, 81 / 82)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r.assign(loss=[0.1, np.nan]), "the loss of 'p1' on 't' is NaN"),
        (lambda r: r.assign(target=["t", "u"]), "the target 'u' is measured in B only"),
        (lambda r: r.assign(point="p0"), "B: 'p0' is measured twice on 't'"),
        (lambda r: r.iloc[:0], "B has no rows"),
        (lambda r: r.drop(columns="loss"), "B: no column 'loss'"),
    ],
)
def test_odd_rows_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        probability_of_better(rows([0.1, 0.2]), change(rows([0.1, 0.2])))


def test_not_finite_is_worst_and_explained_nan_too():
    broken = rows([np.inf, -np.inf, np.nan]).assign(note="broke")
    assert probability_of_better(rows([1e300]), broken).value == 1
    assert probability_of_better(broken, broken).ties == 9


def test_table_repeats_the_probabilities():
    groups = {
        "In": crossed(5, 3, seed=1, name="i"),
        "In'": crossed(9, 3, -0.05, 2, "h"),
        "Ex": crossed(4, 3, 0.2, 3, "e"),
    }
    table = comparison_table(
        pd.concat([g.assign(group=n) for n, g in groups.items()]), paper=PAPER["task"]
    )
    assert (
        list(table.columns[:5]) == ["comparison", "target", "value", "low", "high"]
        and len(table) == 12
    )
    overall = table[table.target == "overall"].set_index("comparison")
    assert overall.paper.to_dict() == PAPER["task"]
    for name in ("In' > Ex", "In > Ex", "In' > In"):
        a, b = name.split(" > ")
        assert (
            tuple(overall.loc[name, ["value", "low", "high"]])
            == probability_of_better(groups[a], groups[b])[:3]
        )


def test_summary_counts_failures_apart():
    table = summary(
        pd.concat([rows([0.1, np.inf, 0.3]).assign(group="Ex"), rows([0.2]).assign(group="In")])
    )
    assert list(table.index) == [("t", "In"), ("t", "Ex")]
    assert tuple(table.loc[("t", "Ex"), ["points", "failed", "best"]]) == (
        3,
        1,
        0.1,
    ) and table.loc[("t", "Ex"), "mean"] == pytest.approx(0.2)


# --- groups -----------------------------------------------------------------------------------


def models(**families):
    return pd.DataFrame(
        [
            dict(model=f"{d}-{s}", dataset=d, family=f, seed=s)
            for f, ds in families.items()
            for d in ds.split()
            for s in (1, 2)
        ]
    )


@settings(max_examples=30)
@given(st.permutations(range(12)), st.sampled_from(["dataset", "task"]))
def test_in_and_ex_part_the_zoo_in_any_order(order, granularity):
    table = models(nli="mnli snli", topic="trec", sentiment="sst2 cr sst5").iloc[list(order)]
    trait = {"dataset": "snli", "task": "nli"}[granularity]
    g = groups_of(table, granularity, trait)
    assert sorted(g.In + g.Ex) == sorted(table.model) and not set(g.In) & set(g.Ex)
    assert sorted(g.targets) == {"dataset": ["snli"], "task": ["mnli", "snli"]}[granularity]
    assert groups_of(table.set_index("model"), granularity, trait) == g


def test_odd_indices_and_columns():
    table = models(nli="mnli", topic="trec").rename(index=lambda i: 100 - i)
    assert groups_of(table, "general").In == list(table.model)
    assert groups_of(
        table.assign(
            dataset=table.dataset.astype("category"), family=table.family.astype("category")
        ),
        "task",
        "nli",
    ).targets == ["mnli"]
    assert groups_of(table.drop(columns=["family", "seed"]), "dataset", "mnli").Ex == [
        "trec-1",
        "trec-2",
    ]
    with pytest.raises(ValueError, match="'mnli-1' is listed twice"):
        groups_of(pd.concat([table, table]), "general")
    with pytest.raises(ValueError, match="the family of the model 'trec-1' is not given"):
        groups_of(table.assign(family=["nli", "nli", "", "topic"]), "task", "nli")
    with pytest.raises(ValueError, match="no column 'dataset'"):
        groups_of(table.drop(columns="dataset"), "general")


def test_twins_are_left_out_either_way_round_and_said():
    table = models(sentiment="sst2 sst5 cr", nli="mnli")
    for pair in (dict(a="sst2", b="sst5"), dict(a="sst5", b="sst2")):
        g = groups_of(
            table,
            "dataset",
            "sst2",
            twins=pd.DataFrame(
                [
                    pair | dict(share=0.9),
                    dict(a="cr", b="sst2", share=0.01),
                    dict(a="gone", b="sst2", share=1),
                ]
            ),
        )
        assert g.left_out == {"sst5": ["sst5-1", "sst5-2"]} and "sst5" in repr(g)
        assert g.Ex == ["cr-1", "cr-2", "mnli-1", "mnli-2"]
    with pytest.raises(ValueError, match="no model is left"):
        groups_of(table[:4], "dataset", "sst2", twins=pd.DataFrame([pair | dict(share=0.9)]))


# --- files ------------------------------------------------------------------------------------

texts = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n"), max_size=12
)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, st.floats(allow_nan=False), texts), min_size=1, max_size=6))
def test_every_row_comes_back_exactly(tmp_path_factory, written):
    file = tmp_path_factory.mktemp("rows") / "rows.csv"
    store = Measurements(file, {"β": [1, 2]})
    for point, loss, note in written:
        store.append(dict(point=point, loss=loss, note=note))
    for read in (measured(file), Measurements(file, {"β": (1, 2)}).frame(), store.frame()):
        assert list(read.itertuples(index=False, name=None)) == written
    data = file.read_bytes()
    for cut in {
        len(data) - 1,
        len(data) - 2,
        data.rfind(b"\n", 0, -1) + 2,
    }:  # torn in the last line, perhaps within a letter
        file.write_bytes(data[:cut])
        again = Measurements(file, {"β": [1, 2]})
        again.append(dict(zip(("point", "loss", "note"), written[-1])))
        assert file.read_bytes() == data


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n\x00\xff\n", b"# {not json\na,b\n", b"no line ends here", b'a,"b\n'],
)
def test_foreign_files_are_refused_and_kept(tmp_path, content):
    file = tmp_path / "foreign.csv"
    file.write_bytes(content)
    for use in (
        Measurements,
        measured,
        lambda f: compare([("In", "a")], lambda p: 0.1, f, progress=False),
    ):
        with pytest.raises(ValueError, match="foreign.csv"):
            use(file)
    assert file.read_bytes() == content


def test_foreign_columns_are_refused_before_anything_is_measured(tmp_path):
    file = tmp_path / "other.csv"
    pd.DataFrame(dict(alpha=[0.5], loss=[0.1])).to_csv(file, index=False)
    with pytest.raises(ValueError, match="no column 'group'"):
        compare([("In", "a")], lambda p: 1 / 0, file, progress=False)
    compare(
        [("In", "a")],
        lambda p: dict(loss=1, n=3),
        good := tmp_path / "good.csv",
        progress=False,
    )
    with pytest.raises(ValueError, match="the column 'n' is in the rows before only"):
        compare([("In", "b")], lambda p: dict(loss=1), good, progress=False)


def test_other_members_weights_or_noise_are_refused(tmp_path):
    point = lambda weights=(0.5, 0.5), members="ab", noise=None: [
        (
            "In'",
            SimpleNamespace(name="hull-0", members=list(members), weights=weights, noise=noise),
        )
    ]
    compare(point(), lambda p: 0.1, file := tmp_path / "rows.csv", progress=False)
    compare(point(), lambda p: 1 / 0, file, progress=False)
    for other in (point((0.4, 0.6)), point(members="ac"), point(noise=("seed", 1))):
        with pytest.raises(
            ValueError, match="'hull-0' was measured with other members or weights"
        ):
            compare(other, lambda p: 0.1, file, progress=False)


def test_only_what_is_asked_for_comes_back_in_its_order(tmp_path):
    file = tmp_path / "rows.csv"
    metric = lambda p: [
        dict(target=t, loss=len(p) + i, accuracy=0.5) for i, t in enumerate("xy")
    ]
    compare([("In", "aa"), ("Ex", "b")], metric, file, progress=False)
    got = compare([("Ex", "ccc"), ("Ex", "b")], metric, file, progress=False)
    assert got.point.to_list() == ["ccc", "ccc", "b", "b"] and len(measured(file)) == 6
    assert got.equals(compare([("Ex", "ccc"), ("Ex", "b")], metric, progress=False))


def test_a_metric_that_fails_loses_nothing(tmp_path):
    file, points = tmp_path / "rows.csv", [("In", n) for n in "abc"]
    with pytest.raises(ZeroDivisionError):
        compare(points, lambda p: 1 / (p != "c"), file, progress=False)
    calls = []
    assert len(
        compare(points, lambda p: calls.append(p) or 1.0, file, progress=False)
    ) == 3 and calls == ["c"]


CHILD = """
import sys, time
from weightregions.comparison import compare
def metric(name):
    time.sleep(0.02)
    i = int(name[1:])
    loss = lambda t: float(f"0.{abs(i * 7919 + ord(t))}")
    note = "a, \\u00fc" * (i % 3 == 0)
    return [dict(target=t, loss=loss(t), accuracy=0.5, note=note) for t in "xyz"]
print("ready", flush=True)
points = [("In" if i % 2 else "Ex", f"p{i}") for i in range(40)]
compare(points, metric, sys.argv[1], progress=False, identity={"probe": 1})
print("done", flush=True)
"""


def child(file):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path):
    with child(tmp_path / "whole.csv") as whole:
        assert whole.communicate()[0] == "ready\ndone\n"
    rng, file, kills = random.Random(0), tmp_path / "killed.csv", 0
    for _ in range(4):
        with child(file) as run:
            assert run.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.01, 0.12))
            run.send_signal(signal.SIGKILL)
            kills += run.wait() == -signal.SIGKILL
        if file.exists() and rng.random() < 0.5:
            data = file.read_bytes()
            if data.count(b"\n") > 3:
                file.write_bytes(
                    data[: -rng.randrange(1, 30)]
                )  # the disk was slower than the process
    with child(file) as last:
        assert last.communicate()[0] == "ready\ndone\n"
    assert kills and file.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_processes_share_the_work_in_turn(tmp_path):
    file = tmp_path / "shared.csv"
    both = [child(file), child(file)]
    for run in both:
        with run:
            assert run.communicate()[0] == "ready\ndone\n"
    assert (
        len(measured(file)) == 120 and not measured(file).duplicated(["point", "target"]).any()
    )


@pytest.mark.parametrize(
    "n_a, n_b, least", [(1, 1, 1 / 2), (1, 8, 1 / 9), (5, 5, 1 / 252), (20, 20, 1 / 1001)]
)
def test_the_least_p_is_that_of_a_perfect_order(n_a, n_b, least):
    rows = lambda n, start: pd.DataFrame(
        {
            "target": "t",
            "point": [f"{start}{i}" for i in range(n)],
            "loss": start + np.arange(n),
        }
    )
    pb = probability_of_better(rows(n_a, 0), rows(n_b, 100))
    assert pb.value == 1 and pb.least == pytest.approx(least)
    assert pb.p >= 0.6 * least  # shuffles at random, not all deals
