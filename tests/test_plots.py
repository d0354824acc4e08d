"""Attacks on weightregions.plots: colours, label placement, and figures of awkward data."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightregions.clustering import cluster_report, score
from weightregions.comparison import PAPER, comparison_table
from weightregions.plots import (
    FAMILY_HUES,
    GROUP_HUES,
    _from_middle,
    _move_apart,
    _palette_png,
    _to_alpha,
    confusion,
    edges,
    f1_bars,
    group_colours,
    group_strip,
    loss_line,
    part_accuracy,
    pb_matrix,
    plane_map,
    region_map,
    scores_table,
    similarity_heatmap,
    small_figures,
    use_theme,
)


@pytest.fixture(autouse=True)
def closed():
    before = dict(matplotlib.rcParams)
    use_theme()
    yield
    plt.close("all")
    matplotlib.rcParams.update(before)


def zoo(groups, models=3, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.normal(size=(len(groups), 50)), models, axis=0) + 0.5 * rng.normal(
        size=(len(groups) * models, 50)
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"{g}-{s}" for g in groups for s in range(models)]
    return pd.DataFrame(rows @ rows.T, names, names), pd.Series(
        np.repeat(groups, models), names, name="dataset"
    )


@pytest.mark.parametrize("n", [1, 2, 8, 9, 29, 60])
def test_every_group_has_a_colour_of_its_own(n):
    names = [f"d{i}" for i in range(n)]
    for families in (None, {d: f"f{i % 5}" for i, d in enumerate(names)}):
        colours = group_colours(names, families)
        assert len({tuple(np.round(c, 3)) for c in colours.values()}) == n == len(colours)
        assert colours == group_colours(names[::-1], families)


def simulate(colour, kind):
    "What a dichromat sees (Vienot, Brettel and Mollon, 1999), in linear RGB."
    linear = np.array(colour) ** 2.2
    matrix = {
        "protan": [[0.1124, 0.8876, 0], [0.1124, 0.8876, 0], [0.0040, -0.0040, 1]],
        "deutan": [[0.2927, 0.7073, 0], [0.2927, 0.7073, 0], [-0.0223, 0.0223, 1]],
    }[kind]
    return np.clip(np.array(matrix) @ linear, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_families_stay_apart_for_dichromats(kind):
    seen = [simulate(matplotlib.colors.to_rgb(h), kind) for h in FAMILY_HUES.values()]
    gaps = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(gaps) > 0.12


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 300), st.floats(0, 200), st.floats(10, 80)),
        min_size=2,
        max_size=14,
    )
)
def test_names_do_not_cover_one_another(boxes):
    boxes = np.array([[x, y, w, 14] for x, y, w in boxes])
    at = _move_apart(boxes)
    overlap = (boxes[:, None, 2:] + boxes[None, :, 2:]) / 2 - np.abs(at[:, None] - at[None])
    np.fill_diagonal(overlap[..., 0], -1)
    assert np.isfinite(at).all() and overlap.min(axis=2).max() < 4  # a few pixels at the most


def test_labels_of_29_datasets_fit_on_one_map():
    matrix, groups = zoo([f"dataset {i}" for i in range(29)])
    rng = np.random.default_rng(0)
    places = pd.DataFrame(rng.normal(size=(len(groups), 2)), groups.index, ["x", "y"])
    ax = region_map(places, groups)
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert len(boxes) == 29
    hidden = sum(
        a.overlaps(b)
        and min(a.x1, b.x1) - max(a.x0, b.x0) > 6
        and min(a.y1, b.y1) - max(a.y0, b.y0) > 6
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )
    assert hidden <= 2


@pytest.mark.parametrize("order", ["group", "cluster", "given"])
@pytest.mark.parametrize("names", [["a"], ["a", "b"], list("abcdefghijkl")])
def test_heatmaps_of_any_size(order, names):
    matrix, groups = zoo(names)
    grid = similarity_heatmap(matrix, groups, {n: "nli" for n in names}, order=order)
    assert len(grid.data2d) == len(matrix)
    assert {t.get_text() for t in grid.ax_heatmap.get_yticklabels()} == set(names)


def test_heatmap_in_order_of_group_keeps_families_together():
    matrix, groups = zoo(["a", "b", "c", "d"])
    grid = similarity_heatmap(
        matrix.sample(frac=1, random_state=0).loc[:, lambda m: m.index],
        groups,
        {"a": "x", "b": "y", "c": "x", "d": "y"},
    )
    assert [t.get_text() for t in grid.ax_heatmap.get_yticklabels()] == ["a", "c", "b", "d"]


def test_confusion_shows_every_model_and_a_diagonal_if_perfect():
    matrix, groups = zoo(list("abcd"))
    report = cluster_report(matrix, groups, n=20)
    counts = [t.get_text() for t in confusion(report).texts]
    assert report.accuracy == 1 and counts == ["3"] * 4
    lost = score(pd.Series(0, groups.index), groups)
    assert sum(int(t.get_text()) for t in confusion(lost).texts) == 12
    many = score(pd.Series(range(12), groups.index), groups)
    assert len(confusion(many).get_yticklabels()) == 12


def test_bars_and_table():
    matrix, groups = zoo(list("abcd"))
    report = cluster_report(matrix, groups, n=20)
    ax = f1_bars(report, paper={"a": 0.5, "z": 0.1})
    assert len(ax.patches) == 4 and [t.get_text() for t in ax.get_yticklabels()] == list("dcba")
    f1_bars(score(report.clusters, groups))  # without intervals
    table = scores_table({"one": report, "two": score(report.clusters, groups)})
    assert table.loc["one", "accuracy"] == 100.0 and np.isnan(table.loc["two", "low"])


def test_parts_in_natural_order():
    rows = pd.DataFrame(
        [
            dict(part=p, accuracy=0.5, low=0.4, high=0.6)
            for p in ["layer 10", "layer 2", "embeddings", "whole model"]
        ]
    )
    assert [t.get_text() for t in part_accuracy(rows).get_yticklabels()] == [
        "whole model",
        "embeddings",
        "layer 2",
        "layer 10",
    ]


def test_nothing_is_left_changed():
    matrix, groups = zoo(list("ab"))
    before = matrix.copy()
    similarity_heatmap(matrix, groups)
    pd.testing.assert_frame_equal(matrix, before)
    assert matplotlib.rcParams["figure.constrained_layout.use"]


# --- walks and groups -------------------------------------------------------------------------


def walk(alphas=np.linspace(0, 1, 5), lines=3, target="sst2"):
    return pd.DataFrame(
        [
            dict(
                line=f"l{i}", alpha=a, target=target, loss=0.4 + 0.01 * i + 0.1 * (a - 0.5) ** 2
            )
            for i in range(lines)
            for a in alphas
        ]
    )


def legend(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def all_inside(ax):
    "Whether everything that is drawn in data coordinates lies within the limits of the axes."
    (x0, x1), (y0, y1) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    data = [l.get_xydata() for l in ax.lines if l.get_transform() == ax.transData] + [
        np.asarray(c.get_offsets())
        for c in ax.collections
        if c.get_offset_transform() == ax.transData and len(c.get_offsets()) > 1
    ]
    points = np.concatenate(data)
    points = points[np.isfinite(points).all(axis=1)]
    return (
        (points[:, 0] >= x0).all()
        and (points[:, 0] <= x1).all()
        and (points[:, 1] >= y0).all()
        and (points[:, 1] <= y1).all()
    )


def test_line_marks_the_ends_and_the_lowest_mean():
    ax = loss_line(walk(), ends=("mnli/seed-1", "mnli/seed-2"))
    assert ax.get_ylabel() == "generalized loss on sst2 (nats)" and all_inside(ax)
    assert [t.get_text() for t in ax.get_xticklabels()][-2:] == [
        "0\nmnli/seed-1",
        "1\nmnli/seed-2",
    ]
    assert legend(ax) == [
        "3 lines",
        "one standard deviation",
        "mean",
        "mnli/seed-1 alone",
        "mnli/seed-2 alone",
        "lowest, alpha = 0.5",
    ]
    assert "lines" not in " ".join(legend(loss_line(walk(lines=1).drop(columns="line"))))


def test_line_of_the_same_places_in_other_floats():
    rows = pd.concat([walk([0, 0.1 + 0.2, 1], 1), walk([0, 0.3, 1], 1).assign(line="other")])
    ax = loss_line(rows)
    assert max(len(line.get_xdata()) for line in ax.lines) == 3


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_is_marked_and_spoils_no_mean(bad):
    steps = [-31, -3, 0, 0.5, 1, 4, 32]
    rows = walk(steps)
    rows.loc[(rows.line == "l0") & (rows.alpha == 32), "loss"] = bad
    ax = edges(rows, references={"pretrained": 0.7, "chance": 0.69})
    assert (
        "not finite" in legend(ax)
        and {"pretrained", "chance"} <= set(legend(ax))
        and all_inside(ax)
    )
    mean = max(ax.lines, key=lambda line: line.get_linewidth()).get_ydata()
    assert len(mean) == 7 and np.isnan(mean[-1]) and np.isfinite(mean[:-1]).all()


def test_edges_are_drawn_to_a_scale_that_is_even_to_both_sides():
    assert _from_middle(0.5) == 0 and np.allclose(
        _from_middle([-31, 0, 0.25]), -_from_middle([32, 1, 0.75])
    )
    x = np.linspace(-200, 200, 101)
    assert np.allclose(_to_alpha(_from_middle(x)), x) and (np.diff(_from_middle(x)) > 0).all()
    ax = edges(walk(np.linspace(-31, 32, 9)))
    low, high = ax.get_xlim()
    assert low < -31 and high > 32 and low + high == pytest.approx(1)


def test_huge_losses_stand_on_a_logarithmic_axis():
    rows = walk([-3, 0, 0.5, 1, 4])
    assert edges(rows).get_yscale() == "linear"
    assert (
        edges(rows.assign(loss=np.where(rows.alpha > 3, 1e9, rows.loss))).get_yscale() == "log"
    )


def test_long_names_break_the_label():
    assert (
        max(
            map(
                len,
                loss_line(walk(target="tweet_eval_stance_abortion")).get_ylabel().split("\n"),
            )
        )
        <= 44
    )


@pytest.mark.parametrize("figure", [loss_line, edges])
def test_rows_of_several_targets_are_not_mixed(figure):
    rows = pd.concat([walk(), walk(target="cr")])
    with pytest.raises(ValueError, match="several targets, sst2, cr"):
        figure(rows)
    with pytest.raises(ValueError, match="no row is of the target 'trec'"):
        figure(rows, target="trec")
    assert figure(rows, target="cr").get_ylabel() == "generalized loss on cr (nats)"
    with pytest.raises(ValueError, match="no row has a finite alpha and loss"):
        figure(walk().assign(loss=np.inf))


def groups(targets=("sst2", "cr"), seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            dict(group=g, point=f"{g}{i}", target=t, loss=0.5 + 0.1 * j + 0.02 * rng.normal())
            for t in targets
            for j, g in enumerate(("In'", "In", "Ex"))
            for i in range(5)
        ]
    )


def test_strip_shows_every_point():
    for rows, columns in (
        (groups(), 2),
        (groups(("sst2",)), 1),
        (groups([f"a long name {i}" for i in range(12)]), 12),
    ):
        ax = group_strip(rows)
        assert sum(
            len(c.get_offsets()) for c in ax.collections if len(c.get_offsets()) == 5
        ) == len(rows) and all_inside(ax)
        assert legend(ax) == list(GROUP_HUES) and len(ax.get_xticks()) == columns
    assert (
        group_strip(groups()).get_ylabel().split()[-7:]
        == "loss less the mean of In (nats)".split()
    )
    assert group_strip(groups(), target="cr").get_ylabel() == "generalized loss on cr (nats)"
    assert (
        legend(
            group_strip(groups().assign(loss=lambda r: r.loss.where(r.group != "Ex", np.inf)))
        ).count("not finite")
        == 1
    )


def test_matrix_tells_ours_and_the_papers():
    table = comparison_table(groups(), n_boot=20)
    ax = pb_matrix(table, PAPER["task"])
    told = [t.get_text() for t in ax.texts]
    assert (
        len(told) == 18
        and sum("paper" in t for t in told) == 3
        and any(t.endswith("paper 75.3") for t in told)
    )
    levels = pd.concat([table[table.target == "overall"].assign(granularity=g) for g in PAPER])
    assert (
        sum("paper" in t.get_text() for t in pb_matrix(levels, PAPER, by="granularity").texts)
        == 7
    )
    assert not any("paper" in t.get_text() for t in pb_matrix(table).texts)


@pytest.mark.parametrize("full", [True, False])
def test_plane_marks_what_it_is_given(full):
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [
            dict(x=x, y=y, target="sst2", loss=x * x + y * y)
            for x in np.linspace(-2, 2, 9)
            for y in np.linspace(-1, 3, 8)
        ]
    )
    if not full:
        rows = rows[rng.random(len(rows)) < 0.5]
    marks = pd.DataFrame(
        dict(name=["a", "b", "pretrained"], x=[-1, 1, 5.0], y=[0, 0, -4.0], distance=[0, 0, 1])
    )
    ax = plane_map(rows.assign(loss=rows.loss.where(rows.x < 2, np.inf)), marks)
    assert [t.get_text() for t in ax.texts if t.get_text()] == [
        "a",
        "b",
        "pretrained",
    ] and "not finite" in legend(ax)
    assert ax.get_xlim()[1] >= 5 and ax.get_ylim()[0] <= -4 and ax.get_aspect() == 1
    plane_map(rows, marks.iloc[:0]), plane_map(rows)
    with pytest.raises(ValueError, match="not on a line"):
        plane_map(rows[rows.y == rows.y.iloc[0]])


def test_small_figures_are_small_and_the_same_bytes():
    small_figures()  # no notebook: nothing happens
    ax = plane_map(
        pd.DataFrame([dict(x=x, y=y, loss=x * y) for x in range(9) for y in range(9)])
    )
    png = _palette_png(ax.figure)
    data, about = png
    assert png == _palette_png(ax.figure) and data.startswith(b"\x89PNG") and len(data) < 40_000
    assert about["alt"] and about["width"] > 300
