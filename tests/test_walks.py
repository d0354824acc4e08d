"Walks visit what the claims ask for, whoever takes them and however often they are stopped."

import multiprocessing
import os
import signal

import pandas as pd
import pytest
import torch
from conftest import ROOT

from weightregions.bases import tiny_base
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe
from weightregions.results import Study
from weightregions.walks import (
    PERTURBED,
    edge_targets,
    of_pooling,
    probes_of,
    TraversalBudget,
    PathSpec,
    line_losses,
    group_losses,
    groups_in,
    path_table,
    paths_as_csv,
    read_paths,
    gain_interval,
    granularities,
    inside_gain,
    leading,
    lines_of,
    one_each,
    pairs,
    plan_paths,
    measure_paths,
)
from weightregions.building import build_zoo
from weightregions.zoo import open_zoo

pytestmark = pytest.mark.xdist_group(
    "walks"
)  # one process makes what all of these tests look at

RECORDED = ROOT / "nbs" / "study" / "recorded"
BUDGET = TraversalBudget(
    same=1,
    hull=2,
    perturbed=1,
    targets=2,
    lines=1,
    inside=1,
    extended=1,
    line_targets=2,
    grid=2,
    n_train=30,
    n_test=30,
)
fork = multiprocessing.get_context("fork")


def table(
    datasets=("mnli", "rte", "sst2", "imdb", "news"),
    families=("nli", "nli", "sentiment", "sentiment", "topic"),
    seeds=5,
):
    return pd.DataFrame(
        [
            {
                "model": f"{d}/seed-{s}",
                "dataset": d,
                "family": f,
                "seed": s,
                "n_train": 1000 - i,
            }
            for i, (d, f) in enumerate(zip(datasets, families))
            for s in range(1, seeds + 1)
        ]
    ).set_index("model")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A tiny zoo, its models, its base and its corpora."
    here = tmp_path_factory.mktemp("walks")
    base = str(tiny_base(here / "base", steps=2))
    corpora = load_corpora(
        "builtin", names=["films", "stays", "headlines"], n_train=40, n_test=30
    )
    build_zoo(
        here / "zoo",
        base,
        corpora,
        Recipe(steps=6, batch_size=8, learning_rate=2e-3),
        [1, 2, 3],
        workers=1,
    )
    return open_zoo(here / "zoo").models.set_index("model"), base, corpora


def walked(made, folder, workers=1):
    models, base, corpora = made
    torch.set_num_threads(1)
    return measure_paths(
        plan_paths(models, BUDGET),
        folder,
        models.path.to_dict(),
        base,
        corpora,
        BUDGET,
        workers,
    )


@pytest.fixture(scope="module")
def unbroken(made, tmp_path_factory):
    return walked(made, tmp_path_factory.mktemp("unbroken"))


def test_a_plan_depends_on_names_alone():
    models = table()
    walks = plan_paths(models, TraversalBudget())
    assert walks == plan_paths(models.assign(accuracy=0.5), TraversalBudget())
    assert len({w.name for w in walks}) == len(walks)
    assert {w.kind for w in walks} == {
        "models",
        "hull",
        "line",
        "edges",
        "plane",
        *PERTURBED,
    }


def test_in_and_ex_share_no_model_and_every_loss_is_asked_for():
    models, budget = table(), TraversalBudget(targets=3)
    asked = {
        w.targets[0]: set(w.members) for w in plan_paths(models, budget) if w.kind == "models"
    }
    for g in granularities(models, budget):
        assert not set(g.In) & set(g.Ex)
        for t in g.targets:
            assert {*g.In, *g.Ex} <= asked[t]
    for ends, targets in lines_of(models, budget).values():
        for t in targets:
            assert {m for pair in ends for m in pair} <= asked[t]


def test_twins_of_a_target_are_no_strangers():
    twins = pd.DataFrame([{"a": "sst2", "b": "mnli", "share": 0.5}])
    mnli = next(
        g for g in granularities(table(), TraversalBudget(same=1), twins) if g.trait == "mnli"
    )
    assert not any(m.startswith("sst2") for m in mnli.Ex)


def test_what_was_not_learned_comes_last():
    models = table()
    assert leading(models, 2) == ["mnli", "sst2"]
    assert leading(models.assign(learned=models.dataset != "mnli"), 9)[-1] == "mnli"
    assert leading(models.assign(learned=False), 1) == [
        "mnli"
    ]  # where nothing was learned, everything is as good


@pytest.mark.parametrize("known", [[], ["mnli"], ["news"], ["mnli", "rte"], ["sst2", "news"]])
def test_a_plan_can_be_made_however_little_was_learned(known):
    models = table(seeds=3).assign(learned=lambda m: m.dataset.isin(known))
    walks = plan_paths(models, TraversalBudget(same=1, targets=3))
    assert {"dataset", "task", "general"} == {
        g.granularity for g in granularities(models, TraversalBudget(same=1, targets=3))
    }
    assert {"models", "hull", "line", "edges", "perturbations"} <= {w.kind for w in walks}


@pytest.mark.parametrize("seeds", [1, 2, 5])
@pytest.mark.parametrize("twins", [None, [{"a": "sst2", "b": "mnli", "share": 0.5}]])
def test_the_design_is_read_as_it_was_written(tmp_path, seeds, twins):
    "Groups and lines come out of the file as they were planned, those left out too."
    models, budget = table(seeds=seeds), TraversalBudget(same=3)
    twins = None if twins is None else pd.DataFrame(twins)
    groups, specs = granularities(models, budget, twins), plan_paths(models, budget, twins)
    (tmp_path / "paths.csv").write_text(paths_as_csv(path_table(specs, groups)))
    paths = read_paths(tmp_path / "paths.csv")
    assert [str(g) for g in groups_in(paths, models).values()] == [str(g) for g in groups]
    lines = paths[paths.kind == "line"]
    planned = {
        name: (pairs, targets) for name, (pairs, targets) in lines_of(models, budget).items()
    }
    assert set(lines.group) == {name for name, (pairs, _) in planned.items() if pairs}
    for name, these in lines.groupby("group"):
        assert these.ends.tolist() == planned[name][0]
        assert set(these.targets) == {tuple(planned[name][1])}


def test_the_recorded_design_is_the_one_that_was_measured():
    study = Study(RECORDED)
    paths, points = study.paths(), study.points()
    measured = paths[~paths.kind.isin(["outside", "left out"])]
    assert set(measured.path) == set(points.walk) and measured.path.is_unique
    for path in measured.itertuples():
        assert set(points.target[points.walk == path.path]) == set(path.targets)


def test_pairs_and_single_models():
    models = table(seeds=5)
    assert len(pairs(models, "mnli", "mnli", 99)) == 10  # the paper's ten MNLI-MNLI pairs
    assert len(set(pairs(models, "mnli", "rte", 99))) == 25
    assert one_each(models).dataset.tolist() == models.dataset.unique().tolist()


def test_all_that_was_planned_was_measured(made, unbroken):
    models, rows = made[0], of_pooling(unbroken[0])
    assert rows.loss.notna().all()
    paths = path_table(plan_paths(models, BUDGET), granularities(models, BUDGET))
    assert groups_in(paths, models) == {
        f"{g.granularity} {g.trait}".strip(): g for g in granularities(models, BUDGET)
    }
    for name, g in groups_in(paths, models).items():
        found = group_losses(rows, paths, name)
        assert set(found.group) == {"In", "In'", "Ex"}
        assert set(found.point[found.group == "In"]) == set(g.In)
    for granularity, (ends, targets) in lines_of(models, BUDGET).items():
        on = line_losses(rows, paths, granularity)
        assert set(on.target) == set(targets) and {0, 1} <= set(on.alpha)
        assert on.alpha.min() == -31 and on.alpha.max() == 32
        gains = inside_gain(on)
        mean, low, high = gain_interval(gains)
        assert (
            low <= mean + 1e-12
            and mean <= high + 1e-12
            and len(gains) == len(ends) * len(targets)
        )


def test_two_at_a_time_find_the_same(made, unbroken, tmp_path):
    rows, marks = walked(made, tmp_path, workers=2)
    pd.testing.assert_frame_equal(rows, unbroken[0])
    pd.testing.assert_frame_equal(marks, unbroken[1])


def test_killed_walks_go_on_to_the_same_rows(made, unbroken, tmp_path):
    for seconds in (0.3, 0.6, 1.2):
        child = fork.Process(target=walked, args=(made, tmp_path))
        child.start()
        child.join(seconds)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
    pd.testing.assert_frame_equal(walked(made, tmp_path)[0], unbroken[0])


def test_rows_of_another_reach_are_refused(made, tmp_path):
    models, base, corpora = made
    walks = [w for w in plan_paths(models, BUDGET) if w.kind == "hull"][:1]
    measure_path = lambda budget: measure_paths(
        walks, tmp_path, models.path.to_dict(), base, corpora, budget, 1
    )
    measure_path(BUDGET)
    with pytest.raises(ValueError, match="probes of 20 rows"):
        measure_path(TraversalBudget(n_train=20, n_test=30))


def test_of_one_family_no_line_leads_out_of_it():
    models = table(("films", "meals"), ("unknown", "unknown"), seeds=3)
    assert set(lines_of(models, TraversalBudget())) == {"dataset", "task"}
    assert plan_paths(models, TraversalBudget(same=1, targets=2))


def test_where_all_share_sentences_no_dataset_has_strangers():
    models, twins = (
        table(seeds=3),
        pd.DataFrame(
            [{"a": "mnli", "b": d, "share": 0.5} for d in ("rte", "sst2", "imdb", "news")]
        ),
    )
    found = {
        g.trait
        for g in granularities(models, TraversalBudget(same=5), twins)
        if g.granularity == "dataset"
    }
    assert found == {"rte", "sst2", "imdb", "news"}
    assert {
        g.granularity
        for g in granularities(
            table(("mnli", "rte"), ("nli", "nli"), seeds=3), TraversalBudget(), twins
        )
    } == {"general"}


def test_what_was_not_learned_is_in_no_task():
    models = table(
        ("mnli", "rte", "wnli", "sst2"), ("nli", "nli", "nli", "sentiment"), seeds=3
    ).assign(learned=lambda m: m.dataset != "wnli")
    nli = next(g for g in granularities(models, TraversalBudget()) if g.granularity == "task")
    assert nli.targets == ["mnli", "rte"] and not any(
        m.startswith("wnli") for m in [*nli.In, *nli.Ex]
    )


def test_walks_that_would_share_a_file_are_refused(tmp_path):
    walks = [
        PathSpec(f"models on {name}", "models", ("m",), (name,)) for name in ("a b", "a-b")
    ]
    with pytest.raises(
        ValueError, match="'models on a b' and 'models on a-b' would share a file"
    ):
        measure_paths(walks, tmp_path, {"m": "m"}, "base", {}, TraversalBudget())


def test_a_task_without_strangers_is_left_out():
    models = table(("mnli", "rte", "wnli"), ("nli",) * 3, seeds=3).assign(
        learned=lambda m: m.dataset != "wnli"
    )
    assert {g.granularity for g in granularities(models, TraversalBudget())} == {
        "dataset",
        "general",
    }


def test_members_that_stay_in_their_files_give_the_same_rows(
    made, unbroken, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "weightregions.walks.load_what_fits", lambda members, **options: members
    )
    pd.testing.assert_frame_equal(walked(made, tmp_path)[0], unbroken[0])


def test_both_poolings_are_measured_and_one_penalty_holds_on_a_target(made, unbroken):
    rows = unbroken[0]
    assert list(dict.fromkeys(rows.pooling)) == ["first", "mean"]
    main, mean = of_pooling(rows), of_pooling(rows, "mean")
    assert main.point.tolist() == mean.point.tolist() and set(main.pooling) == {"first"}
    assert (rows.groupby(["target", "pooling"]).penalty.nunique() == 1).all()
    with pytest.raises(ValueError, match="by the last token"):
        of_pooling(rows, "last")


def test_the_penalty_is_part_of_what_kept_rows_depend_on(made, tmp_path, monkeypatch):
    from weightregions import probing, walks as w

    models, base, corpora = made
    some = [p for p in plan_paths(models, BUDGET) if p.kind == "hull"][:1]
    ask = lambda: measure_paths(
        some, tmp_path, models.path.to_dict(), base, corpora, BUDGET, 1
    )[0]
    before = ask()
    monkeypatch.setattr(w, "probe_settings", lambda *a: probing.probe_settings(*a))
    pd.testing.assert_frame_equal(ask(), before)
    file = tmp_path / "targets.csv"
    table = probes_of(some, tmp_path, base, corpora, BUDGET, 1)
    assert table.penalty.isin(probing.PENALTIES).all() and (table.constant > 0).all()
    # another penalty than the kept one: the rows are not taken for its own
    other = lambda *a: [r | {"penalty": 7.0} for r in probing.probe_settings(*a)]
    monkeypatch.setattr(w, "probe_settings", other)
    file.unlink()
    with pytest.raises(ValueError, match="penalty 7 on"):
        ask()


@pytest.mark.parametrize("kind", PERTURBED)
def test_each_kind_of_perturbation_is_an_ex_of_its_own(made, unbroken, kind):
    models, *_ = made
    design = path_table(plan_paths(models, BUDGET), granularities(models, BUDGET))
    losses = group_losses(of_pooling(unbroken[0]), design, "general", kind)
    ex = losses[losses.group == "Ex"]
    assert set(ex.kind) == {kind} and len(ex) and ex.loss.notna().all()


def test_edges_are_judged_on_the_datasets_of_their_ends_whatever_the_loss():
    models, budget = table(), TraversalBudget(line_targets=4, extended=6)
    design = path_table(plan_paths(models, budget), granularities(models, budget))
    named = edge_targets(design, models)
    assert named["general"] == ["mnli", "sst2"] and named["task"] == ["mnli", "rte"]
    edges = design[design.kind == "edges"]
    assert (edges.groupby("group").size() >= 6).all()
    assert all(list(e.targets) == named[e.group] for e in edges.itertuples())


def test_the_runs_on_strength_differ_in_their_training_alone():
    short, long = Study(RECORDED).trainings("strength").values()
    differ = {k for k in short.about if short.about[k] != long.about.get(k)}
    assert differ == {"recipe"} and short.about.keys() == long.about.keys()
    pd.testing.assert_frame_equal(short.paths(), long.paths())
    for table in ("targets", "datasets"):
        pd.testing.assert_frame_equal(short.rows(table), long.rows(table))
    key = ["kind", "walk", "target", "pooling"]
    assert short.points().groupby(key).size().equals(long.points().groupby(key).size())


def test_how_often_a_group_is_better_counted_pair_by_pair():
    study = Study(RECORDED)
    paths, points, shares = study.paths(), study.points(), study.better()
    general = shares[(shares.region == "general") & (shares.comparison == "In' > Ex")]
    counted = {}
    for target in paths.set_index("path").targets["hull, general"]:
        on = points[points.target == target]
        hull = on[on.walk == "hull, general"].loss
        others = on[on.walk == "perturbations"].loss
        wins = [(a < b) + (a == b) / 2 for a in hull for b in others]
        counted[target] = sum(wins) / len(wins)
    counted["overall"] = sum(counted.values()) / len(counted)
    assert dict(zip(general.target, general.value)) == pytest.approx(counted)
