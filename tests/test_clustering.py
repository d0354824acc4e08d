"""Attacks on weightregions.clustering: invariances, parity with scikit-learn and brute force,
degenerate inputs."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.cluster import SpectralClustering
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    f1_score,
    normalized_mutual_info_score,
    precision_score,
    recall_score,
)

from weightregions.clustering import (
    bootstrap,
    bootstrap_f1,
    accuracy_gap,
    cluster_report,
    embed_map,
    exact_interval,
    f1_gap,
    gaussian_affinity,
    least_p,
    level_units,
    match_clusters,
    negative_share,
    outside_neighbour,
    permutation_p,
    score,
    share_interval,
    spectral_clusters,
    within_between,
)

FIGURES = ["n", "k", "accuracy", "ari", "nmi", "perfect"]


def labelled(values, names=None):
    names = names or [f"m{i:02d}" for i in range(len(values))]
    return pd.DataFrame(values, names, names)


def zoo(groups=4, models=5, cosine=0.3, dim=400, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(size=(groups, dim)), models, axis=0)
    rows = np.sqrt(cosine) * centres + np.sqrt(1 - cosine) * rng.normal(size=centres.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    matrix = labelled(rows @ rows.T)
    return matrix, pd.Series(np.repeat([f"d{g}" for g in range(groups)], models), matrix.index)


@st.composite
def partitions(draw):
    n = draw(st.integers(2, 14))
    clusters = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    groups = draw(st.lists(st.sampled_from("vwxyz"), min_size=n, max_size=n))
    index = [f"m{i}" for i in range(n)]
    return (
        pd.Series(clusters, index),
        pd.Series(groups, index),
        draw(st.permutations(range(n))),
        draw(st.permutations(range(5))),
    )


@settings(max_examples=60, deadline=None)
@given(partitions())
def test_scores_do_not_depend_on_labels_or_order(case):
    clusters, groups, order, numbers = case
    one = score(clusters, groups)
    other = score(clusters.map(dict(enumerate(numbers))).iloc[order], groups)
    assert {f: one.row()[f] for f in FIGURES} == pytest.approx(
        {f: other.row()[f] for f in FIGURES}, abs=1e-12
    )
    pd.testing.assert_frame_equal(
        one.table.drop(columns="cluster"), other.table.drop(columns="cluster")
    )


@settings(max_examples=60, deadline=None)
@given(partitions())
def test_accuracy_is_the_best_over_all_matchings(case):
    clusters, groups, _, _ = case
    counts = (
        pd.crosstab(clusters, groups)
        .reindex(index=range(5), columns=list("vwxyz"), fill_value=0)
        .to_numpy()
    )
    best = max(sum(counts[c, g] for c, g in enumerate(p)) for p in permutations(range(5)))
    assert score(clusters, groups).accuracy == pytest.approx(best / len(groups))


@settings(max_examples=40, deadline=None)
@given(partitions())
def test_parity_with_sklearn(case):
    clusters, groups, _, _ = case
    s = score(clusters, groups)
    found = clusters.map(s.matching).fillna("none")
    names = list(s.table.index)
    assert s.accuracy == accuracy_score(groups, found)
    assert s.ari == pytest.approx(adjusted_rand_score(groups, clusters))
    assert s.nmi == pytest.approx(normalized_mutual_info_score(groups, clusters))
    for name, metric in [
        ("precision", precision_score),
        ("recall", recall_score),
        ("f1", f1_score),
    ]:
        np.testing.assert_allclose(
            s.table[name], metric(groups, found, labels=names, average=None, zero_division=0)
        )
    matched = s.matching.dropna()
    assert matched.is_unique and len(matched) == min(clusters.nunique(), groups.nunique())


@settings(max_examples=30, deadline=None)
@given(partitions())
def test_bounds_and_perfection(case):
    clusters, groups, _, _ = case
    s = score(clusters, groups)
    low, high = bootstrap(clusters, groups, n=50)
    assert 0 <= low <= high <= 1 and (0 < low or s.accuracy < 1)
    assert 0 < permutation_p(clusters, groups, n=20) <= 1
    assert (
        score(pd.Series(pd.factorize(groups)[0], groups.index), groups).perfect
        == groups.nunique()
    )
    assert (s.perfect == groups.nunique()) == (s.ari == 1.0 and s.accuracy == 1.0)


def test_parity_with_sklearn_spectral_clustering():
    matrix, groups = zoo()
    ours = spectral_clusters(matrix, 4)
    theirs = SpectralClustering(
        4, affinity="precomputed", assign_labels="discretize", random_state=0
    ).fit_predict((1 + matrix) / 2)  # the authors' affinity, where a cosine is negative
    assert adjusted_rand_score(ours, theirs) == 1 == adjusted_rand_score(ours, groups)


@pytest.mark.parametrize("assign", ["discretize", "kmeans", "cluster_qr"])
def test_partition_does_not_depend_on_order_even_without_structure(assign):
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(24, 24))
    matrix = labelled(np.clip((noise + noise.T) / 20, -1, 1) + np.eye(24))
    one = spectral_clusters(matrix, 5, assign=assign)
    for seed in range(4):
        order = matrix.sample(frac=1, random_state=seed).index
        other = spectral_clusters(matrix.loc[order, order], 5, assign=assign)
        assert adjusted_rand_score(one, other.reindex(one.index)) == 1
        assert list(other.drop_duplicates()) == list(
            range(other.nunique())
        )  # numbered in order of appearance


@pytest.mark.parametrize("k", range(1, 7))
def test_small_and_disconnected_graphs(k):
    for values in (
        np.eye(6),
        np.kron(np.eye(3), np.ones((2, 2))),
        np.ones((6, 6)),
        -np.ones((6, 6)) + 2 * np.eye(6),
    ):
        assert 1 <= spectral_clusters(labelled(values), k).nunique() <= k


def test_no_warning_reaches_the_user(recwarn):
    cluster_report(labelled(np.kron(np.eye(3), np.ones((3, 3)))), list("aaabbbccc"), n=20)
    assert not recwarn.list


def test_k_other_than_the_number_of_groups():
    matrix, groups = zoo()
    many, few = (
        cluster_report(matrix, groups, k=6, n=20),
        cluster_report(matrix, groups, k=2, n=20),
    )
    assert many.accuracy < 1 and few.accuracy <= 0.5 and few.table["recall"].eq(0).sum() == 2
    assert many.matching.isna().sum() == many.k - 4


def test_permutation_p_is_uniform_without_structure():
    rng = np.random.default_rng(0)
    index = range(24)
    p = [
        permutation_p(
            pd.Series(rng.integers(3, size=24), index),
            pd.Series(np.repeat(list("abc"), 8), index),
            n=60,
            seed=s,
        )
        for s in range(80)
    ]
    assert np.mean(np.array(p) <= 0.1) < 0.2 and np.mean(p) > 0.4


def test_permutation_of_units_is_stricter_than_of_models():
    """Datasets that cluster but whose families do not: seeds shuffled one by one would see
    structure, datasets do not."""
    matrix, datasets = zoo(groups=8)
    families = datasets.map({f"d{i}": "even" if i % 2 == 0 else "odd" for i in range(8)})
    clusters = spectral_clusters(matrix, 8).map(
        {i: i // 4 for i in range(8)}
    )  # pairs of whole datasets, blind to the family
    assert permutation_p(clusters, families, n=200, by=datasets) > 0.3
    lucky = families.map({"even": 0, "odd": 1})
    assert (
        permutation_p(lucky, families, n=500)
        < 0.01
        < permutation_p(lucky, families, n=500, by=datasets)
        < 0.1
    )  # 2 of 70 splits


def test_bootstrap_against_the_binomial():
    index = range(200)
    groups = pd.Series(["a"] * 100 + ["b"] * 100, index)
    clusters = pd.Series([0] * 80 + [1] * 20 + [1] * 80 + [0] * 20, index)
    low, high = bootstrap(clusters, groups, n=4000)
    assert (low, high) == pytest.approx(
        tuple(binom.ppf([0.025, 0.975], 200, 0.8) / 200), abs=0.01
    )
    by = pd.Series(np.arange(200) // 20, index)  # ten units, two of them all wrong
    wide = bootstrap(clusters, groups, n=4000, by=by)
    assert wide.high - wide.low > 2 * (high - low)


def test_bootstrap_where_nothing_varies():
    groups = pd.Series(list("aabb"))
    assert bootstrap(pd.Series([0, 0, 1, 1]), groups) == pytest.approx((0.025**0.25, 1.0))
    assert bootstrap(pd.Series([0, 0, 1, 1]), groups, by=groups) == pytest.approx(
        (0.025**0.5, 1.0)
    )
    f1 = bootstrap_f1(pd.Series([0, 0, 1, 1]), groups)
    assert f1.f1_low.tolist() == pytest.approx([0.025**0.5] * 2) and (f1.f1_high == 1).all()


def test_everything_is_deterministic_for_a_seed():
    matrix, groups = zoo(cosine=0.03, dim=300)
    one, two = (
        cluster_report(matrix, groups, seed=5, n=50),
        cluster_report(matrix, groups, seed=5, n=50),
    )
    assert one.row() == two.row()
    pd.testing.assert_frame_equal(one.table, two.table)
    for kind in ("tsne", "mds"):
        pd.testing.assert_frame_equal(
            embed_map(matrix, kind, seed=5), embed_map(matrix, kind, seed=5)
        )


def test_maps_keep_groups_together():
    matrix, groups = zoo()
    distances = np.sqrt((2 - 2 * matrix).clip(lower=0))
    for kind, metric, m in [
        ("tsne", "cosine", matrix),
        ("mds", "cosine", matrix),
        ("mds", "euclidean", distances),
        ("tsne", "euclidean", distances),
    ]:
        xy = embed_map(m, kind, metric)
        assert list(xy.index) == list(m.index) and np.isfinite(xy.to_numpy()).all()
        assert xy.groupby(groups).std().mean(axis=None) < 0.5 * xy.std().mean()


def test_within_between_by_hand():
    m = labelled(
        np.array(
            [[1, 0.5, 0.1, 0.2], [0.5, 1, 0.3, 0.0], [0.1, 0.3, 1, 0.4], [0.2, 0.0, 0.4, 1]]
        )
    )
    t = within_between(m, list("aabb"))
    assert (
        t.loc["a", "within"] == pytest.approx(0.5)
        and t.loc["b", "between"] == pytest.approx(0.15)
        and t["neighbour"].eq(1).all()
    )


def test_gaussian_affinity_of_equal_points_names_the_width():
    with pytest.raises(ValueError, match="width"):
        gaussian_affinity(labelled(np.zeros((3, 3))))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda m, g: (m, g.drop("m03")), "'m03'"),
        (lambda m, g: (m, g.where(g.index != "m03")), "'m03'"),
        (lambda m, g: (m, pd.concat([g, g.iloc[:1]])), "'m00' occurs twice"),
        (
            lambda m, g: (
                m.where(
                    pd.DataFrame(
                        np.add.outer(m.index == "m03", m.index == "m03") == 0, m.index, m.index
                    )
                ),
                g,
            ),
            "'m03'",
        ),
        (lambda m, g: (m.iloc[:, 1:], g), "20 x 19"),
        (lambda m, g: (m.rename(index={"m03": "x"}), g), "same names"),
        (lambda m, g: (m.to_numpy(), g), "DataFrame"),
        (lambda m, g: (m, ["a"] * 3), "3 entries for 20 models"),
    ],
)
def test_faults_are_named(spoil, message):
    with pytest.raises(ValueError, match=message):
        cluster_report(*spoil(*zoo()))


def test_match_with_string_clusters_and_integer_groups():
    s = score(pd.Series(["p", "q", "q"]), pd.Series([7, 8, 8]))
    assert s.accuracy == 1 and match_clusters(s.clusters, s.groups).to_dict() == {
        "p": 7,
        "q": 8,
    }


@pytest.mark.parametrize(
    "sizes, least",
    [((3, 3), 1 / 10), ((2, 2, 2), 1 / 15), ((1, 4), 1 / 5), ((5, 5, 5), 1 / 1001)],
)
def test_the_least_p_counts_the_ways_to_deal(sizes, least):
    groups = pd.Series([f"g{i}" for i, n in enumerate(sizes) for _ in range(n)])
    assert least_p(groups) == pytest.approx(least)
    assert least_p(
        groups.repeat(3).reset_index(drop=True),
        by=pd.Series(np.repeat(np.arange(len(groups)), 3)),
    ) == pytest.approx(least)
    assert permutation_p(pd.Series(pd.factorize(groups)[0]), groups, n=2000) == pytest.approx(
        max(least, 1 / 2001), abs=0.04
    )


@pytest.mark.parametrize("negative", ["shift", "clip"])
@pytest.mark.parametrize("seed", range(3))
def test_neither_order_nor_names_change_a_report(negative, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(24, 24)) / 8
    values = np.clip((noise + noise.T) / 2, -1, 1)
    np.fill_diagonal(values, 1)
    matrix = labelled(values)
    groups = pd.Series(np.repeat(list("abcd"), 6), matrix.index)
    one = cluster_report(matrix, groups, negative=negative, n=20)
    for _ in range(3):
        order = rng.permutation(24)
        moved, dealt = matrix.iloc[order, order], groups.iloc[order]
        names = [f"x{i}" for i in rng.permutation(24)]
        moved.index = moved.columns = dealt.index = names
        other = cluster_report(moved, dealt, negative=negative, n=20)
        assert (other.mean, other.worst, other.best) == (one.mean, one.worst, one.best)
        assert other.accuracy == one.accuracy and other.states == 10


def test_the_affinity_is_the_authors():
    "Shifted and halved as soon as an entry is negative, else as it is."
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(20, 20)) / 10
    values = (noise + noise.T) / 2
    np.fill_diagonal(values, 1)
    signed = labelled(values)
    for matrix in (signed, signed.abs()):
        affinity = (1 + matrix) / 2 if (matrix < 0).any(axis=None) else matrix
        same = [spectral_clusters(m, 4) for m in (matrix, affinity)]
        assert adjusted_rand_score(*same) == 1
    off = signed.to_numpy()[~np.eye(20, dtype=bool)]
    assert negative_share(signed) == pytest.approx((off < 0).mean())
    assert negative_share(signed.abs()) == 0


def test_the_range_over_random_starts_holds_the_accuracy():
    matrix, groups = zoo(cosine=0.02, dim=200)
    report = cluster_report(matrix, groups, n=20)
    each = [score(spectral_clusters(matrix, 4, i), groups).accuracy for i in range(10)]
    assert (report.worst, report.best) == (min(each), max(each))
    assert report.mean == pytest.approx(np.mean(each))
    nearest = min(abs(a - report.mean) for a in each)
    assert abs(report.accuracy - report.mean) == pytest.approx(nearest)
    assert report.low <= report.mean <= report.high


@pytest.mark.parametrize("hits, n", [(0, 5), (5, 5), (3, 10), (99, 100)])
def test_the_exact_interval_is_scipys(hits, n):
    from scipy.stats import binomtest

    theirs = binomtest(hits, n).proportion_ci(method="exact")
    assert exact_interval(hits / n, n) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("true", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("units, each", [(4, 5), (9, 5), (15, 1)])
def test_a_share_is_covered_whatever_units_there_are(true, units, each):
    "Models of a unit agree or not: the interval covers at least as often as it says."
    rng, covered, by = np.random.default_rng(0), [], pd.Series(np.repeat(range(units), each))
    for i in range(150):
        whole = rng.random(units).repeat(each) < true
        alone = rng.random(units * each) < true
        right = pd.Series(whole if i % 2 else alone)
        low, high = share_interval(right, by, n=100, seed=i)
        covered.append(low <= true <= high)
    assert np.mean(covered) >= 0.93


def test_an_interval_shrinks_no_further_near_one():
    by = pd.Series(np.repeat(range(16), 5))
    wrong = [share_interval(pd.Series(np.arange(80) >= k), by).low for k in range(4)]
    assert wrong == sorted(wrong, reverse=True) and wrong[0] == pytest.approx(0.025 ** (1 / 16))
    none = bootstrap_f1(
        pd.Series([0, 0, 0, 1, 1, 1]), pd.Series(list("aabcca")), by=pd.Series(range(6))
    )
    assert (none.f1_high > none.f1_low).all() and none.f1_high["b"] > 0.8


def test_levelled_units_tell_nothing_but_the_others():
    rng = np.random.default_rng(1)
    families = rng.normal(size=(3, 2000)).repeat(3, axis=0)
    datasets = (0.7 * families + rng.normal(size=(9, 2000))).repeat(5, axis=0)
    rows = datasets + 0.2 * rng.normal(size=(45, 2000))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    matrix = labelled(rows @ rows.T)
    family = pd.Series(np.repeat(list("abc"), 15), matrix.index)
    dataset = pd.Series(np.repeat(range(9), 5), matrix.index)
    assert cluster_report(level_units(matrix, dataset), family, by=dataset, n=50).mean == 1
    near = outside_neighbour(matrix, family, dataset)
    assert (near.share == 1).all() and near.units.tolist() == [3, 3, 3, 9]
    assert near.low["all"] == pytest.approx(0.025 ** (1 / 9))
    shuffled = matrix.sample(frac=1, random_state=0).index
    again = outside_neighbour(matrix.loc[shuffled, shuffled], family, dataset)
    pd.testing.assert_frame_equal(near, again)


def test_gaps_have_the_sign_that_they_say():
    matrix, groups = zoo(groups=4, models=12)
    good = cluster_report(matrix, groups, n=50)
    mixed = good.clusters.copy()
    mixed[groups == "d0"] = np.arange(12) % 4
    worse = score(mixed, groups)
    gap = f1_gap(worse, "d0", ["d1", "d2", "d3"])
    assert gap.value < 0 and gap.high < 0 and gap.p < 0.05
    assert f1_gap(good, "d0", ["d1", "d2"]) == (0, 0, 0, 1)
    less = accuracy_gap(worse, good)
    assert less.value == pytest.approx(worse.accuracy - 1) and less.high < 0
    assert accuracy_gap(good, good).p == 1
