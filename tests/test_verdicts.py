"""One rule for every claim: each step of it, on tables made for that step, and on the recorded
run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from weightregions.clustering import Gap
from weightregions.comparison import probability_of_better
from weightregions.verdicts import (
    AUTHORS,
    CLAIM_COLUMNS,
    HOLDS,
    IN_PART,
    NOT_HERE,
    NOT_MEASURABLE,
    OURS,
    TOO_FEW,
    TOO_SMALL,
    Quantity,
    claim_row,
    constant_loss,
    least_of_signs,
    measurable,
    of_gains,
    of_gap,
    of_pb,
    value_row,
    verdict,
    without_verdicts,
)

RECORDED = Path(__file__).resolve().parent.parent / "nbs" / "study" / "recorded"


@pytest.mark.parametrize(
    "met, p, least, can, expected",
    [
        (True, 0.01, 0, True, HOLDS),
        (False, 0.01, 0, True, IN_PART),
        (True, 0.049, 0, True, HOLDS),
        (True, 0.05, 0, True, NOT_HERE),  # p < 0.05, not at most
        (False, 0.2, 0, True, NOT_HERE),
        (True, np.nan, 0, True, NOT_HERE),  # no p-value is no evidence
        (True, 0.01, 0, False, NOT_MEASURABLE),
        (False, 0.9, 0, False, NOT_MEASURABLE),  # never "does not hold"
        (True, 0.01, 0.05, True, TOO_FEW),
        (False, 0.9, 0.2, False, TOO_FEW),  # before any other
    ],
)
def test_the_rule(met, p, least, can, expected):
    assert verdict(met, p, least, can) == expected


def test_a_scale_too_small_gives_values_alone():
    rows = pd.DataFrame([claim_row("C1", "m", Quantity(1.0, p=0.001, n=9), paper=0.98)] * 2)
    rows.loc[1, "models"] = AUTHORS
    for scale in TOO_SMALL:
        assert without_verdicts(rows, scale).verdict.isna().tolist() == [True, False]
        assert without_verdicts(rows, scale).ours.tolist() == [1.0, 1.0]
    for scale in ("laptop", "full", "paper"):
        assert without_verdicts(rows, scale).verdict.tolist() == [HOLDS, HOLDS]


@pytest.mark.parametrize("n, few", [(1, True), (2, True), (5, True), (6, False), (8, False)])
def test_few_units_are_too_few_however_many_pairs_they_make(n, few):
    assert (least_of_signs(n) >= 0.05) == few
    row = claim_row("C7", "m", of_gains([1.0] * n, (1, 1), "lines"), criterion="up", met=True)
    assert (row["verdict"] == TOO_FEW) == few and row["n"] == n and row["unit"] == "lines"


def test_units_not_pairs_make_a_probability_certain():
    rows = lambda losses, name, unit: pd.DataFrame(
        {
            "point": [f"{name}{i}" for i in range(len(losses))],
            "target": "t",
            "loss": losses,
            "dataset": unit,
        }
    )
    a = rows(np.linspace(0.1, 0.2, 30), "a", ["x"] * 30)  # thirty models of one dataset
    b = rows(np.linspace(0.5, 0.6, 8), "b", list("pqrstuvw"))
    by_model = claim_row("C9", "m", of_pb(probability_of_better(a, b), "models"), paper=1.0)
    pb = probability_of_better(a, b, units="dataset")
    by_dataset = claim_row("C9", "m", of_pb(pb, "datasets"), paper=1.0)
    assert (by_model["verdict"], by_dataset["verdict"]) == (HOLDS, TOO_FEW)
    assert by_dataset["n"] == 1 and by_dataset["low"] < by_model["low"]


def test_without_a_figure_nothing_holds_by_default():
    sure = Quantity(1.0, 0.9, 1.0, p=0.001, n=20)
    assert claim_row("C6", "m", sure)["verdict"] is None
    assert value_row("C6", "m", sure, paper=0.9)["verdict"] is None
    with pytest.raises(ValueError, match="C6, m: say whether the criterion is met"):
        claim_row("C6", "m", sure, criterion="in every pair")
    stated = claim_row("C6", "m", sure, criterion="in every pair", met=True)
    assert stated["verdict"] == HOLDS and stated["criterion"] == "in every pair"
    assert claim_row("C1", "m", sure, paper=0.98)["criterion"] == "at least 0.98"


def test_an_interval_across_zero_is_not_in_part():
    gains = [0.03, -0.01, 0.02, -0.02, 0.01, -0.01, 0.02, 0.0]
    row = claim_row(
        "C7", "m", of_gains(gains, (-0.01, 0.02), "lines"), criterion="up", met=False
    )
    assert row["p"] > 0.05 and row["verdict"] == NOT_HERE
    worse = claim_row(
        "C7", "m", of_gains([-1.0] * 9, (-1, -1), "lines"), criterion="up", met=False
    )
    assert worse["verdict"] == NOT_HERE  # surely on the wrong side
    wrong = of_gap(Gap(0.4, 0.3, 0.5, 0.001), 12, "datasets")
    assert claim_row("C2", "m", wrong, criterion="down", met=False)["verdict"] == NOT_HERE


def test_the_constant_answer_is_the_entropy_of_the_shares():
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        shares = rng.dirichlet(np.ones(classes))
        table = pd.DataFrame({"classes": [classes], "majority": [shares.max()]}, index=["t"])
        entropy = -(shares * np.log(shares)).sum()
        at_most = constant_loss(table)["t"]
        assert entropy - 1e-9 <= at_most <= np.log(classes) + 1e-9
        assert classes > 2 or at_most == pytest.approx(entropy)


def test_measurable_goes_by_the_groups_compared():
    rows = pd.DataFrame(
        {
            "target": ["a"] * 4 + ["b"] * 4 + ["c"] * 2,
            "group": ["In", "In", "Ex", "Ex"] * 2 + ["In", "In"],
            "loss": [0.5, 0.6, 0.9, 0.9, 0.65, 0.8, 0.9, np.inf, np.nan, 0.1],
        }
    )
    constant = pd.Series({"a": 0.69, "b": 0.69, "c": 0.69})
    assert measurable(rows, constant) == {"a": True, "b": False, "c": False}
    with pytest.raises(ValueError, match="'c' is not known"):
        measurable(rows, constant.drop("c"))


def test_the_recorded_claims_follow_the_rule():
    claims = pd.read_csv(RECORDED / "claims.csv")
    assert list(claims.columns) == CLAIM_COLUMNS and set(claims.models) == {OURS, AUTHORS}
    judged = claims[claims.verdict.notna()]
    assert judged.criterion.notna().all() and judged.unit.notna().all() and (judged.n > 0).all()
    assert claims.verdict[claims.criterion.isna()].isna().all()
    assert (judged.p[judged.verdict.isin([HOLDS, IN_PART])] < 0.05).all()
    numbers = judged[judged.paper.notna() & judged.criterion.str.startswith("at least")]
    reached = numbers.ours >= numbers.paper - 1e-4
    assert (numbers.verdict[~reached] != HOLDS).all()
    known = claims.dropna(subset=["low", "high"])
    assert (known.low < known.high).all()  # no interval without a width
    assert (known.low <= known.ours + 1e-9).all() and (known.ours <= known.high + 1e-9).all()
