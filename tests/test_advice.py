"Attacks on weightregions.advice and weightregions.contest: nothing of the target is used, the test split is never read, what was tried is not tried again."

import os
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from weightregions import contest as contests
from weightregions.advice import advised, candidates, held_out_losses, recommend
from weightregions.bases import tiny_base
from weightregions.contest import (
    ROLES,
    StartExperiment,
    compare_all_starts,
    prepare,
    regret,
    sharing,
    targets_of,
)
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe
from weightregions.probing import PENALTY
from weightregions.starting import Search
from weightregions.building import build_zoo
from weightregions.zoo import Zoo, open_zoo

pytestmark = pytest.mark.xdist_group(
    "advice"
)  # one process makes what all of these tests look at

BRIEF = StartExperiment(
    sizes=(24,),
    seeds=1,
    curve=(),
    recipe=Recipe(steps=4, batch_size=8, trains="bitfit"),
    search=Search(rates=(2e-2,), evaluations=2),
    sample=40,
    n_test=30,
)
ALONE = pd.DataFrame({"a": [], "b": [], "share": []})


@pytest.fixture(scope="module")
def corpora():
    return load_corpora(
        "builtin", names=["headlines", "lectures", "meals"], n_train=60, n_test=37
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_base(tmp_path_factory.mktemp("base") / "base", steps=2))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, base, corpora):
    return open_zoo(
        build_zoo(
            tmp_path_factory.mktemp("zoo") / "zoo",
            base,
            corpora,
            Recipe(steps=4, learning_rate=2e-3),
            seeds=[1, 2],
            workers=1,
        )
    )


@given(st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=10)
def test_losses_are_those_of_scikit_learn_on_the_same_folds(classes, seed):
    rng = np.random.default_rng(seed)
    y = np.arange(12 * classes) % classes
    x = rng.normal(size=(len(y), 5)) + np.eye(classes)[y] @ rng.normal(size=(classes, 5))
    from weightregions.advice import _folds

    fold, expected = _folds(y, 3, seed), np.empty(len(y))
    for k in range(3):
        scale = StandardScaler().fit(x[fold != k])
        theirs = LogisticRegression(
            C=1 / (PENALTY * (fold != k).sum()), tol=1e-9, max_iter=10_000
        ).fit(scale.transform(x[fold != k]), y[fold != k])
        expected[fold == k] = -theirs.predict_log_proba(scale.transform(x[fold == k]))[
            np.arange((fold == k).sum()), y[fold == k]
        ]
    if classes > 2:  # of two classes theirs has one weight vector, ours two: another penalty
        np.testing.assert_allclose(
            held_out_losses(x, y, classes, folds=3, seed=seed)[0], expected, atol=2e-4
        )
    assert sorted(np.bincount(fold)) == [4 * classes] * 3


def test_the_targets_own_models_are_never_offered(zoo, corpora, base):
    for name, corpus in corpora.items():
        offered = candidates(zoo, corpus, base)
        members = {
            c.name for start in offered.values() for c in getattr(start, "checkpoints", [start])
        }
        assert not [m for m in members if m.startswith(name)]
        assert len(offered["centroid"].checkpoints) == 4


def test_nor_under_another_name(zoo, corpora, base):
    with pytest.warns(UserWarning, match="headlines: the same data as mine under another name"):
        offered = candidates(zoo, replace(corpora["headlines"], name="mine"), base)
    assert not [n for n in offered if n.startswith("headlines")]


def test_the_test_split_is_never_read(zoo, corpora, base):
    corpus = corpora["headlines"]
    said = recommend(zoo, corpus, base, n=30).drop(columns="seconds")
    other = replace(
        corpus,
        test=corpus.test.assign(text=[f"something else {i}" for i in range(len(corpus.test))]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pd.testing.assert_frame_equal(
            recommend(zoo.where(dataset=["lectures", "meals"]), other, base, n=30).drop(
                columns="seconds"
            ),
            said,
        )


def test_more_rows_than_there_are_take_all(zoo, corpora, base):
    few = corpora["headlines"].subsample(20)
    pd.testing.assert_frame_equal(
        *(recommend(zoo, few, base, n=n).drop(columns="seconds") for n in (20, 5000))
    )


@pytest.mark.parametrize(
    "keep, message", [(lambda m: m.dataset == "headlines", "nothing is left without headlines")]
)
def test_a_zoo_of_the_target_alone_is_refused(zoo, corpora, base, keep, message):
    with pytest.raises(ValueError, match=message):
        recommend(Zoo("zoo", zoo.models[keep(zoo.models)]), corpora["headlines"], base)


def test_one_checkpoint_is_ranked_against_the_pretrained_model(zoo, corpora, base):
    said = recommend(zoo.where(dataset="meals", seed=1), corpora["headlines"], base, n=30)
    assert set(said.start) == {"pretrained", "meals/seed-1"} and said.over_centroid.isna().all()
    assert advised(said) == "pretrained"


def test_checkpoints_of_two_bases_are_refused(zoo, corpora, base, tmp_path):
    strange = str(tiny_base(tmp_path / "strange", seed=1, steps=2))
    other = open_zoo(
        build_zoo(
            tmp_path / "other",
            strange,
            {"meals": corpora["meals"]},
            Recipe(steps=2),
            seeds=[3],
            workers=1,
        )
    )
    mixed = Zoo(
        "mixed",
        pd.concat(
            [
                zoo.models[zoo.models.dataset == "lectures"],
                other.models.assign(model="meals/strange"),
            ]
        ),
    )
    with pytest.raises(ValueError, match="is not the base of"):
        recommend(mixed, corpora["headlines"], base)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["member", "family centroid"]), st.floats(0, 2), st.floats(0, 1)
        ),
        max_size=6,
    )
)
def test_no_member_is_advised_and_the_centroid_yields_only_to_what_is_surely_better(others):
    rows = [
        ("pretrained", "pretrained", 1.0, 0.5),
        ("centroid", "centroid", 0.9, 0.0),
        *((f"start {i}", *other) for i, other in enumerate(others)),
    ]
    ranking = pd.DataFrame(rows, columns=["start", "kind", "loss", "over_centroid"])
    found = ranking.set_index("start").loc[advised(ranking)]
    assert found.kind != "member"
    assert found.kind == "centroid" or found.over_centroid >= 0.975


def test_what_shares_sentences_is_in_no_start(zoo, corpora, base, tmp_path):
    starts, said = prepare(
        zoo, corpora["headlines"], base, tmp_path / "t", BRIEF, exclude=["lectures"]
    )
    assert (
        not [s for s in said.start if "lectures" in s]
        and "lectures" not in (tmp_path / "t" / "centroid" / "README.md").read_text()
    )
    assert list(starts) == ["pretrained", "centroid", "best member"]


def test_targets_share_nothing():
    models = pd.DataFrame(
        {"dataset": list("abcd"), "family": ["x", "x", "y", "y"], "n_train": [4, 3, 2, 1]}
    )
    pairs = pd.DataFrame({"a": ["a", "c"], "b": ["c", "d"], "share": [0.5, 0.005]})
    chosen = targets_of(models, pairs, 4)
    assert chosen[0] == "a" and "c" not in chosen and set(chosen) == {"a", "b", "d"}
    assert sharing(pairs, "c") == ["a"]


def test_a_contest_cut_short_goes_on_and_ends_the_same(
    zoo, corpora, base, tmp_path, monkeypatch
):
    targets = {n: corpora[n] for n in ("headlines", "meals")}
    whole, advice = compare_all_starts(
        zoo, targets, base, tmp_path / "whole", BRIEF, ALONE, workers=1
    )
    real, done = contests.compare_starts, []

    def cut(*args, **kwargs):
        rows = real(*args, **kwargs)
        done.append(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(contests, "compare_starts", cut)
    with pytest.raises(KeyboardInterrupt):
        compare_all_starts(
            zoo,
            {"headlines": corpora["headlines"]},
            base,
            tmp_path / "cut",
            BRIEF,
            ALONE,
            workers=1,
        )
    monkeypatch.setattr(contests, "compare_starts", real)
    written = (tmp_path / "cut" / "rows.csv").read_text()
    again, same = compare_all_starts(
        zoo, targets, base, tmp_path / "cut", BRIEF, ALONE, workers=1
    )
    pd.testing.assert_frame_equal(again, whole)
    pd.testing.assert_frame_equal(same.drop(columns="seconds"), advice.drop(columns="seconds"))
    assert (tmp_path / "cut" / "rows.csv").read_text().startswith(written), (
        "rows that were there were written anew"
    )
    assert len(done[0]) == (whole.target == "headlines").sum()


def test_a_centroid_that_was_half_written_is_made_again(zoo, corpora, base, tmp_path):
    starts, _ = prepare(zoo, corpora["headlines"], base, tmp_path / "t", BRIEF)
    before = (tmp_path / "t" / "centroid" / "model.safetensors").read_bytes()
    os.rename(tmp_path / "t" / "centroid", tmp_path / "t" / ".centroid-1-torn")
    again, _ = prepare(zoo, corpora["headlines"], base, tmp_path / "t", BRIEF)
    assert (
        again == starts
        and (tmp_path / "t" / "centroid" / "model.safetensors").read_bytes() == before
    )


def test_regret_by_hand():
    rows = pd.DataFrame(
        [
            dict(target="t", start=s, size="200", seed=seed, accuracy=a)
            for s, accuracies in {
                "pretrained": (0.5, 0.6),
                "centroid": (0.7, 0.7),
                "family centroid": (0.8, 0.7),
                "best member": (0.1, 0.2),
            }.items()
            for seed, a in enumerate(accuracies)
        ]
    )
    advice = pd.DataFrame(
        {
            "target": "t",
            "role": ROLES,
            "kind": ["pretrained", "centroid", "family centroid", "member"],
            "loss": [1.0, 0.9, 0.8, 0.1],
            "over_centroid": [0.1, 0.0, 0.9, 1.0],
        }
    )
    row = regret(rows, advice).iloc[0]
    assert (row.named, row.best, row.within) == ("centroid", "family centroid", False)
    np.testing.assert_allclose(
        row[["regret", "lowest loss", "always centroid", "always pretrained"]].astype(float),
        [5, 60, 5, 20],
    )


def test_a_target_needs_a_start_that_has_not_seen_its_sentences():
    models = pd.DataFrame({"dataset": list("ab"), "family": ["x", "y"], "n_train": [2, 1]})
    assert targets_of(models, pd.DataFrame({"a": ["a"], "b": ["b"], "share": [0.5]}), 4) == []
    assert targets_of(models, ALONE, 4) == ["a", "b"]


def test_targets_are_tried_at_the_sizes_they_have_rows_for(corpora):
    few = replace(corpora["meals"], train=corpora["meals"].train[:20])
    one_of_its_kind = lambda t: t.assign(label=[1, *[0] * (len(t) - 1)])
    rare = replace(
        corpora["lectures"],
        train=one_of_its_kind(corpora["lectures"].train),
        test=one_of_its_kind(corpora["lectures"].test),
    )
    found = contests._able(
        {"headlines": corpora["headlines"], "meals": few, "lectures": rare},
        (16, 24, 500, None),
        [1, 2],
        BRIEF.search,
    )
    assert found == {("headlines", "meals"): [16, None], ("headlines",): [24]}


@pytest.mark.parametrize("name", ["centroid", "pretrained"])
def test_a_model_that_is_called_like_another_start_is_refused(zoo, corpora, base, name):
    named = Zoo("heap", zoo.models.assign(model=lambda m: [name, *m.model[1:]]))
    with pytest.raises(ValueError, match=f"heap: a model is called '{name}'"):
        candidates(
            named,
            replace(corpora["meals"], name="new", train=corpora["meals"].train[::-1]),
            base,
        )


def test_all_starts_are_tuned_under_the_pooler_of_the_base(corpora, tmp_path):
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    folders = []
    for name in ("base", "member"):
        BertModel(config).save_pretrained(tmp_path / name)
        (tmp_path / name / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
        folders.append(tmp_path / name)
    base, member = folders
    start = contests.open_checkpoint(member, name="member")
    folder = contests._folder_of("best member", start, base, tmp_path, {"member": "1"})
    ours, theirs = (
        load_file(f"{folder}/model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    pooler = "pooler.dense.weight"
    assert ours[pooler].equal(theirs[pooler])  # a member brought its own before
    word = "embeddings.word_embeddings.weight"
    assert ours[word].equal(load_file(member / "model.safetensors")[word])


def test_the_advice_says_how_its_probes_were_made(zoo, corpora, base):
    from weightregions.probing import PENALTIES

    table = recommend(zoo, corpora["headlines"], base, n=40, n_boot=10, progress=False)
    assert set(table.pooling) == {"first"} and table.penalty.nunique() == 1
    assert table.penalty[0] in PENALTIES
    few = recommend(zoo, corpora["headlines"], base, n=9, n_boot=10, progress=False)
    assert set(few.penalty) == {PENALTY}  # too few rows to choose one


def test_why_a_start_gains_is_resumed_like_the_contest(zoo, corpora, base, tmp_path):
    contest = replace(BRIEF, budgets=(6,), budget_rows=24)
    ask = lambda: contests.explain_gains(
        zoo, {"headlines": corpora["headlines"]}, (base, base), tmp_path, contest, ALONE, 1
    )
    rows = ask()
    assert set(rows.explanation) == {"base", "search", "budget"}
    assert set(rows.start) == {"pretrained", "centroid", "pre-trained further"}
    files = {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("why-*.csv")}
    pd.testing.assert_frame_equal(ask(), rows)
    assert files == {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("why-*.csv")}


def test_a_rule_is_judged_on_targets_that_did_not_choose_it():
    rules = ["regret", "lowest loss", "always centroid", "always pretrained"]
    table = pd.DataFrame([[9, 0, 9, 9], [0, 9, 9, 9]] * 2, columns=rules).astype(float)
    halves = contests.rule_by_halves(table.assign(target=list("abcd")))
    assert halves["rule"].tolist() == ["lowest loss", "as advised"]
    assert halves["within a point"].tolist() == [0, 0]  # by hindsight it would be 1
