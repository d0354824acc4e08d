"""Cards, boxes, README and the text of figures: no more than the rows say, and nothing a reader
cannot see."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from weightregions.cards import (
    CLAIMS,
    NOTHING,
    SIGNS,
    as_figure,
    card_html,
    cards_html,
    cards_markdown,
    cards_of,
    claims_table,
    dot,
    in_words,
    verdict_of,
)
from weightregions.plots import alt_text, edges, loss_line, similarity_heatmap
from weightregions.report import formula, with_mathml
from weightregions.results import Study
from weightregions.verdicts import (
    AUTHORS,
    CLAIM_COLUMNS,
    HOLDS,
    IN_PART,
    NOT_HERE,
    NOT_MEASURABLE,
    OURS,
    TOO_FEW,
)

VERDICTS = [HOLDS, IN_PART, NOT_HERE, NOT_MEASURABLE, TOO_FEW]


@pytest.fixture(scope="module")
def claims():
    return Study(ROOT / "nbs" / "study" / "recorded").claims()


def a_row(verdict, measure="P_B(In' > In), dataset films", **more):
    row = dict(claim="C8", measure=measure, paper=0.88, ours=0.7, low=0.5, high=0.9)
    row |= dict(p=0.01, n=8, unit="models", criterion="at least 0.88", models=OURS)
    return row | {"verdict": verdict} | more


def card_of(rows):
    table = pd.DataFrame(rows, columns=CLAIM_COLUMNS)
    return next(c for c in cards_of(table) if c.claim.id == "C8")


def test_every_claim_has_a_card_and_every_card_a_page(claims):
    cards = cards_of(claims)
    assert [c.claim.id for c in cards] == [f"C{i}" for i in range(1, 14)]
    for card in cards:
        assert (ROOT / "nbs" / "study" / f"{card.claim.page}.ipynb").exists()
        kind, sign = SIGNS[card.verdict]
        page = card_html(card, "{}.html")
        assert kind in page and sign in page and card.verdict in page


def test_no_symbol_is_shown_before_it_was_said(claims):
    for card in cards_of(claims):
        words = f"{card.claim.short} {card.claim.sentence} {card.reason}"
        assert not re.search(r"P_B|\bIn'?\b|\bEx\b|C\d", words), words


@pytest.mark.parametrize("one", VERDICTS)
def test_tests_that_agree_give_their_verdict(one):
    assert verdict_of([one]) == verdict_of([one, one]) == one


@pytest.mark.parametrize("cannot", [NOT_MEASURABLE, TOO_FEW])
@pytest.mark.parametrize("can", [HOLDS, IN_PART, NOT_HERE])
def test_tests_that_cannot_tell_do_not_count(can, cannot):
    assert verdict_of([cannot, can]) == verdict_of([can, cannot]) == can
    assert card_of([a_row(cannot, ours=0.1), a_row(can)]).row.ours == 0.7


def test_a_claim_that_fails_somewhere_does_not_hold_and_says_where():
    card = card_of([a_row(HOLDS), a_row(NOT_HERE, "P_B(In' > In), dataset meals", ours=0.4)])
    assert card.verdict == IN_PART
    assert "Not so: how often averages beat the models, dataset meals" in card.reason


def test_values_without_a_verdict_have_none():
    card = card_of([a_row(None), a_row(None)])
    assert card.verdict == NOTHING and "too small to judge" in card.reason


def test_the_authors_models_are_on_no_card():
    assert card_of([a_row(HOLDS, models=AUTHORS)]).row is None


def test_what_is_not_there_yet_is_said():
    cards = cards_of(pd.DataFrame(columns=CLAIM_COLUMNS), "still to come")
    assert cards_html(cards).count("still to come") == len(CLAIMS)


@pytest.mark.parametrize("value", [np.nan, None])
def test_a_missing_figure_is_left_out(value):
    row = pd.Series(a_row(HOLDS, paper=value, low=value, high=value))
    assert "nan" not in dot(row).lower() and as_figure(value, "percent") == ""
    assert "nan" not in claims_table(pd.DataFrame([row])).lower()


def test_names_of_datasets_run_nothing():
    row = a_row(HOLDS, "P_B(In' > In), dataset <script>alert(1)</script>")
    page = cards_html([card_of([row])]) + claims_table(pd.DataFrame([row]))
    assert "<script>" not in page


def test_marks_stay_inside_their_box(claims):
    for card in cards_of(claims):
        places = re.findall(r'cx="([-\d.]+)"|M([-\d.]+) ', dot(card.row))
        assert all(0 <= float(a or b) <= 220 for a, b in places)


def test_the_table_of_readme_is_the_cards(claims):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in cards_markdown(cards_of(claims), "nbs/study/{}.ipynb").splitlines()[2:]:
        assert line in readme


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sum(bool(re.search(r"\w", word)) for word in text.split()) <= 900


@pytest.mark.parametrize(
    "measure", ["P_B(In > Ex), task nli, on sick", "P_B(ends > points past them), general"]
)
def test_measures_are_spelled_out(measure):
    assert "P_B" not in in_words(measure) and "how often the models beat" in in_words(measure)


FORMULAS = [r"\arg\min_x f", r"\arg \max_x f", r"\Bigl\{ s \in \{1\} \Bigr\}", r"\#\{i\}"]


@pytest.mark.parametrize("tex", FORMULAS)
def test_formulas_leave_no_command_behind(tex):
    assert "\\" not in formula(tex) and "$" not in with_mathml(f"where ${tex}$ is")


@pytest.mark.parametrize("prose", ["from $5 to $6", "`$x$`", "```\n$x$\n```", "a $ b $ c"])
def test_what_is_no_formula_stays(prose):
    assert with_mathml(prose) == prose


# --- figures in words -------------------------------------------------------------------------


def line(ends=(0.5, 0.5)):
    return pd.DataFrame({"alpha": [0, 0.5, 1], "loss": [ends[0], 0.4, ends[1]], "target": "t"})


def test_two_ends_of_one_name_have_two_names_in_the_legend():
    ax = loss_line(line(), ends=("films", "films"))
    labels = ax.get_legend_handles_labels()[1]
    assert len(labels) == len(set(labels))


def test_a_scale_that_ends_before_the_values_says_so():
    values = np.full((20, 20), 0.1)
    values[0, 1] = values[1, 0] = 0.9
    names = [f"m{i}" for i in range(20)]
    grid = similarity_heatmap(pd.DataFrame(values, names, names))
    assert "0.90" in grid.ax_cbar.get_title(loc="left")


def test_figures_say_what_their_rows_say():
    assert "0.400 at 0.5" in alt_text(loss_line(line()))
    broken = line().assign(loss=[np.inf, 0.4, 0.5])
    assert "inf" not in alt_text(edges(broken))
