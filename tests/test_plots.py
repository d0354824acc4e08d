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
from weightregions.plots import (FAMILY_HUES, _move_apart, confusion, f1_bars, group_colours, part_accuracy, region_map, scores_table, similarity_heatmap,
                                 use_theme)


@pytest.fixture(autouse=True)
def closed():
    before = dict(matplotlib.rcParams)
    use_theme()
    yield
    plt.close("all")
    matplotlib.rcParams.update(before)


def zoo(groups, models=3, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.normal(size=(len(groups), 50)), models, axis=0) + 0.5 * rng.normal(size=(len(groups) * models, 50))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"{g}-{s}" for g in groups for s in range(models)]
    return pd.DataFrame(rows @ rows.T, names, names), pd.Series(np.repeat(groups, models), names, name="dataset")


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
    matrix = {"protan": [[0.1124, 0.8876, 0], [0.1124, 0.8876, 0], [0.0040, -0.0040, 1]],
              "deutan": [[0.2927, 0.7073, 0], [0.2927, 0.7073, 0], [-0.0223, 0.0223, 1]]}[kind]
    return np.clip(np.array(matrix) @ linear, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_families_stay_apart_for_dichromats(kind):
    seen = [simulate(matplotlib.colors.to_rgb(h), kind) for h in FAMILY_HUES.values()]
    gaps = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(gaps) > 0.12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200), st.floats(10, 80)), min_size=2, max_size=14))
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
    hidden = sum(a.overlaps(b) and min(a.x1, b.x1) - max(a.x0, b.x0) > 6 and min(a.y1, b.y1) - max(a.y0, b.y0) > 6 for i, a in enumerate(boxes) for b in boxes[:i])
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
    grid = similarity_heatmap(matrix.sample(frac=1, random_state=0).loc[:, lambda m: m.index], groups, {"a": "x", "b": "y", "c": "x", "d": "y"})
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
    rows = pd.DataFrame([dict(part=p, accuracy=0.5, low=0.4, high=0.6) for p in ["layer 10", "layer 2", "embeddings", "whole model"]])
    assert [t.get_text() for t in part_accuracy(rows).get_yticklabels()] == ["whole model", "embeddings", "layer 2", "layer 10"]


def test_nothing_is_left_changed():
    matrix, groups = zoo(list("ab"))
    before = matrix.copy()
    similarity_heatmap(matrix, groups)
    pd.testing.assert_frame_equal(matrix, before)
    assert matplotlib.rcParams["figure.constrained_layout.use"]
