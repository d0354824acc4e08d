"""Attacks on weightregions.starting: no start is favoured, the test split is looked at once, a
killed comparison goes on, counts and tests by hand."""

import multiprocessing
import os
import random
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, wilcoxon
from transformers import AutoModel, RobertaConfig, RobertaModel

from weightregions import starting
from weightregions.bases import tiny_base
from weightregions import comparison
from weightregions.comparison import measured
from weightregions.corpora import Corpus, load_corpora
from weightregions.finetuning import Recipe, Tokenized, evaluate, train
from weightregions.starting import (
    METHODS,
    Search,
    classifier_from,
    compare_starts,
    gains,
    sign_flips,
    split_validation,
    start_table,
    tune,
)

pytestmark = pytest.mark.xdist_group(
    "starting"
)  # one process makes what all of these tests look at

RECIPE = Recipe(steps=6, batch_size=8, trains="bitfit")
SEARCH = Search(rates=(1e-3, 2e-2), evaluations=3)
HERE = [m for m in METHODS if m != "lora" or find_spec("peft")]
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base", steps=2)


@pytest.fixture(scope="module")
def corpus():
    return load_corpora("builtin", names=["headlines"], n_train=60, n_test=37)["headlines"]


@pytest.fixture(scope="module")
def other(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("other") / "other"
    model, tokenizer, _ = train(
        base,
        load_corpora("builtin", names=["lectures"], n_train=60, n_test=20)["lectures"],
        Recipe(steps=4, learning_rate=2e-3),
        seed=1,
    )
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(base, other, corpus):
    return dict(
        starts={"pretrained": base, "other": other},
        corpora={"headlines": corpus},
        sizes=(24, None),
        seeds=(1, 2),
        recipe=RECIPE,
        search=replace(SEARCH, rates=(2e-2,)),
        workers=1,
    )


@pytest.fixture(scope="module")
def unbroken(arguments):
    torch.set_num_threads(1)
    return compare_starts(**arguments)


def refused(*args, **kwargs):
    raise AssertionError("a job was started")


# --- the validation part ----------------------------------------------------------------------


def made(counts):
    "A corpus with so many training rows of each class."
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    random.Random(0).shuffle(labels)
    rows = lambda y, split: pd.DataFrame(
        {"text": [f"{split} {i}" for i in range(len(y))], "label": y}
    )
    present = [c for c, n in enumerate(counts) if n]
    return Corpus(
        "made",
        "topic",
        tuple(f"class {c}" for c in range(len(counts))),
        rows(labels, "train"),
        rows(present, "test"),
    )


@given(
    st.lists(st.integers(2, 40), min_size=2, max_size=5),
    st.floats(0.01, 0.99),
    st.integers(1, 4),
    st.integers(0, 3),
)
@settings(max_examples=60)
def test_validation_is_a_stratified_part_of_train(counts, share, at_least, seed):
    corpus = made(counts)
    if min(counts) <= at_least:
        with pytest.raises(
            ValueError,
            match="dataset made: class 'class .' has .* training rows, too few to hold back",
        ):
            split_validation(corpus, share, at_least, seed)
        return
    part, held = split_validation(corpus, share, at_least, seed)
    assert sorted([*part.train.text, *held.text]) == sorted(corpus.train.text)
    assert part.test.equals(corpus.test)
    for label, n in enumerate(counts):
        mine = (held.label == label).sum()
        assert at_least <= mine < n
        assert mine in (at_least, 1, n - 1, round(share * n))
    assert split_validation(corpus, share, at_least, seed)[1].equals(held)


def test_a_rare_class_may_go_without():
    with pytest.raises(
        ValueError, match="class 'class 1' has 1 of 12 training rows, too few to hold back 1"
    ):
        split_validation(made([6, 1, 5]))
    part, held = split_validation(made([6, 1, 5]), at_least=0)
    assert set(held.label) == {0, 2} and set(part.train.label) == {0, 1, 2}
    with pytest.raises(ValueError, match="too few for a validation part of two classes"):
        split_validation(made([9, 1]), at_least=0)


# --- one start --------------------------------------------------------------------------------


def test_the_same_rates_and_head_for_every_start(base, other, corpus):
    looks = [
        tune(start, corpus, RECIPE, 1, SEARCH).history[["rate", "step"]]
        for start in (base, other)
    ]
    assert looks[0].equals(looks[1])
    a, b = (classifier_from(start, corpus.labels, seed=3)[0] for start in (base, other))
    assert all(
        torch.equal(v, b.classifier.state_dict()[k])
        for k, v in a.classifier.state_dict().items()
    )
    body = AutoModel.from_pretrained(other, add_pooling_layer=False).state_dict()
    assert all(torch.equal(v, b.base_model.state_dict()[k]) for k, v in body.items())


def test_a_rate_does_not_depend_on_the_rates_tried_before(base, corpus):
    both, alone = (
        tune(base, corpus, RECIPE, 1, replace(SEARCH, rates=rates)).history
        for rates in ((1e-3, 2e-2), (2e-2,))
    )
    assert both[both.rate == 2e-2].reset_index(drop=True).equals(alone)


def test_the_test_split_is_looked_at_once_and_last(monkeypatch, base, corpus):
    looks, read = [], []

    def spy(model, data, tokenizer, *args):
        looks.append(len(data))
        return evaluate(model, data, tokenizer, *args)

    class Read(Tokenized):
        def __init__(self, rows, *args):
            read.append(set(rows["text"]))
            super().__init__(rows, *args)

    monkeypatch.setattr(starting, "evaluate", spy)
    monkeypatch.setattr(starting, "Tokenized", Read)
    t = tune(base, corpus, RECIPE, 1, SEARCH)
    assert looks.count(37) == 1 and looks[-1] == 37 and set(looks[:-1]) == {t.n_validation}
    assert len(looks) == len(t.history) + 1
    assert len(read) == 3 and read[2] == set(corpus.test.text)
    assert (
        not read[0] & read[1]
        and not (read[0] | read[1]) & read[2]
        and read[0] | read[1] == set(corpus.train.text)
    )


@pytest.mark.parametrize(
    "search",
    [SEARCH, Search(rates=(3e-2,), evaluations=6, patience=1)],
    ids=["patient", "impatient"],
)
def test_the_best_weights_come_back(base, corpus, search):
    recipe = replace(RECIPE, trains="all", steps=12)
    t = tune(base, corpus, recipe, 1, search)
    held = split_validation(corpus, search.share, search.at_least, 1)[1]
    found = evaluate(t.model, Tokenized(held, t.tokenizer, recipe.max_length), t.tokenizer)
    best = t.history.sort_values(
        ["accuracy", "loss"], ascending=[False, True], kind="stable"
    ).iloc[0]
    assert (t.rate, t.steps, t.validation) == (best.rate, best.step, best.accuracy)
    assert found["accuracy"] == best.accuracy and found["loss"] == pytest.approx(
        best.loss, rel=1e-6
    )
    for _, run in t.history.groupby(
        "rate"
    ):  # no run goes on after `patience` looks without a new best
        score = list(zip(run.accuracy, -run.loss))
        since = [i - max(range(i + 1), key=lambda j: (score[j], -j)) for i in range(len(score))]
        assert max(since) <= search.patience and (
            since[-1] == search.patience or run.step.iloc[-1] == recipe.steps
        )


@pytest.mark.parametrize("method", HERE)
def test_only_what_the_method_names_moves(base, corpus, method):
    before = AutoModel.from_pretrained(base, add_pooling_layer=False).state_dict()
    t = tune(base, corpus, RECIPE, 1, replace(SEARCH, rates=(2e-2,)), method=method)
    after = {
        k.replace(".base_layer", ""): v for k, v in t.model.base_model.state_dict().items()
    }
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    if method == "bitfit":
        assert moved and all(k.endswith("bias") for k in moved)
    if method == "all":
        assert any(k.endswith("query.weight") for k in moved)
    if method in ("head", "lora"):
        assert not moved
    assert any("lora_B" in k and v.any() for k, v in after.items()) == (method == "lora")
    assert t.model.classifier.out_proj.weight.any() and t.method == method


def test_same_seed_same_bytes(base, corpus):
    a, b, c = (tune(base, corpus, replace(RECIPE, rows=24), seed, SEARCH) for seed in (1, 1, 2))
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())
    assert a.history.equals(b.history) and a.loss == b.loss and a.loss != c.loss


def test_a_loss_that_is_not_finite_is_never_best(monkeypatch, base, corpus):
    def broken(model, data, tokenizer, *args):
        found = evaluate(model, data, tokenizer, *args)
        return (
            found
            if len(seen) >= 3
            else seen.append(found) or found | {"accuracy": 1.0, "loss": np.nan}
        )

    seen = []  # the first rate's looks
    monkeypatch.setattr(starting, "evaluate", broken)
    assert tune(base, corpus, RECIPE, 1, SEARCH).rate == 2e-2
    seen.clear()
    with pytest.raises(
        ValueError,
        match="on headlines: the loss is not finite at any of the learning rates 0.001",
    ):
        tune(base, corpus, RECIPE, 1, replace(SEARCH, rates=(1e-3,)))


def test_without_peft_lora_says_what_it_takes(monkeypatch, base, corpus, arguments):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(starting, "classifier_from", refused)
    with pytest.raises(ImportError, match="pip install peft"):
        tune(base, corpus, RECIPE, 1, SEARCH, method="lora")
    with pytest.raises(ImportError, match="pip install peft"):
        compare_starts(**arguments, method="lora")


# --- starts, compared -------------------------------------------------------------------------


def test_every_start_sees_the_same_rows_and_fewer_are_a_part_of_more(monkeypatch, arguments):
    seen = {}

    def spy(start, corpus, recipe, seed, search, method=None):
        given = corpus if recipe.rows is None else corpus.subsample(recipe.rows, seed)
        seen.setdefault((seed, recipe.rows), []).append(frozenset(given.train.text))
        return tune(
            start,
            corpus,
            replace(recipe, steps=1),
            seed,
            replace(search, rates=(1e-3,)),
            method=method,
        )

    monkeypatch.setattr(starting, "tune", spy)
    compare_starts(**arguments | {"sizes": (16, 32)})
    assert all(len(v) == 2 and len(set(v)) == 1 for v in seen.values())
    for seed in (1, 2):
        few, more = seen[seed, 16][0], seen[seed, 32][0]
        assert few < more and len(few) == 16 and len(more) == 32
    assert seen[1, 32] != seen[2, 32]


def test_rows_are_whole(unbroken):
    assert unbroken.groupby(["size", "seed", "start"], sort=False).ngroups == len(unbroken) == 8
    assert set(unbroken.n_train) == {24, 60} and set(unbroken.n_test) == {37}
    assert set(unbroken.rate) <= set(SEARCH.rates) and unbroken.accuracy.between(0, 1).all()


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"sizes": (24, 61)}, "dataset headlines: 61 training rows asked for, there are 60"),
        ({"sizes": (1,)}, "dataset headlines: 1 training rows cannot hold its 4 classes"),
        ({"sizes": (4,)}, "has 1 of 4 training rows, too few to hold back 1"),
        ({"sizes": (24.0,)}, "a size is a number of rows"),
        ({"seeds": ()}, "there are no seeds"),
        ({"starts": lambda target: {}}, "headlines: there are no starts"),
        ({"method": "prompt"}, "method must be one of"),
    ],
)
def test_what_cannot_work_is_refused_at_once(monkeypatch, arguments, changes, problem):
    monkeypatch.setattr(starting, "tune", refused)
    with pytest.raises(ValueError, match=problem):
        compare_starts(**arguments | changes)


def test_starts_of_another_shape_are_refused(monkeypatch, tmp_path, arguments):
    monkeypatch.setattr(starting, "tune", refused)
    RobertaModel(
        RobertaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="odd has a vocabulary of 50 tokens"):
        compare_starts(
            **arguments | {"starts": arguments["starts"] | {"odd": tmp_path / "odd"}}
        )


def killed_after(rows, arguments, file):
    "Compare, in a process that is killed, by itself and without warning, after some rows."
    torch.set_num_threads(1)
    lines, append = iter(range(rows - 1, -1, -1)), comparison.append_line

    def counted(*words):
        append(*words)
        if next(lines) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    comparison.append_line = counted
    compare_starts(**arguments, file=file)


def test_killed_a_comparison_goes_on_to_the_same_rows(tmp_path, arguments, unbroken):
    file, before = tmp_path / "rows.csv", 0
    for _ in range(2):
        child = fork.Process(target=killed_after, args=(3, arguments, file))
        child.start(), child.join()
        assert child.exitcode == -signal.SIGKILL
        before, kept = len(measured(file)), before
        assert before == kept + 3 < len(unbroken)
    file.write_bytes(file.read_bytes() + b"headlines,other,al")  # a row torn by the kill
    rows = compare_starts(**arguments, file=file)
    pd.testing.assert_frame_equal(rows, unbroken)
    assert len(measured(file)) == len(unbroken)


def test_a_finished_file_starts_no_job_and_two_processes_give_the_same(
    monkeypatch, tmp_path, arguments, unbroken
):
    file = tmp_path / "rows.csv"
    pd.testing.assert_frame_equal(
        compare_starts(**arguments | {"workers": 2}, file=file), unbroken
    )
    monkeypatch.setattr(starting, "tune", refused)
    pd.testing.assert_frame_equal(compare_starts(**arguments, file=file), unbroken)
    part = compare_starts(**arguments | {"sizes": (None,), "seeds": (2,)}, file=file)
    assert part["size"].tolist() == ["all", "all"] and part.start.tolist() == [
        "pretrained",
        "other",
    ]
    swapped = dict(zip(arguments["starts"], reversed(arguments["starts"].values())))
    with pytest.raises(
        ValueError,
        match="headlines from '(pretrained|other)' was measured with other weights or data",
    ):
        compare_starts(**arguments | {"starts": swapped}, file=file)
    fewer = replace(
        arguments["corpora"]["headlines"], test=arguments["corpora"]["headlines"].test.iloc[1:]
    )
    with pytest.raises(ValueError, match="was measured with other weights or data"):
        compare_starts(**arguments | {"corpora": {"headlines": fewer}}, file=file)
    with pytest.raises(ValueError, match="holds other measurements: recipe"):
        compare_starts(**arguments | {"recipe": replace(RECIPE, steps=7)}, file=file)


# --- gains and tables -------------------------------------------------------------------------


def told(gain, seeds=(1, 2), size="all"):
    "Rows of two starts on targets of which the second gains so many points."
    return pd.DataFrame(
        [
            dict(
                target=f"t{t}",
                start=start,
                size=size,
                seed=seed,
                method="bitfit",
                accuracy=0.5 + seed / 50 + (g / 100 if start == "centroid" else 0),
            )
            for t, g in enumerate(gain)
            for start in ("pretrained", "centroid")
            for seed in seeds
        ]
    )


@given(st.lists(st.integers(-30, 30), min_size=2, max_size=8), st.sampled_from([0, 0.5, 2]))
@settings(max_examples=25)
def test_counts_and_tests_by_other_means(points, tie):
    d = np.array(points, float)
    row = start_table(told(points), tie=tie, n_boot=200).iloc[0]
    assert (row.wins, row.losses) == (
        sum(g > 0 and g >= tie for g in points),
        sum(g < 0 and -g >= tie for g in points),
    )
    assert row.wins + row.ties + row.losses == row.targets == len(points)
    assert (
        row.gain == pytest.approx(d.mean(), abs=1e-9)
        and row.low <= row.gain + 1e-9
        and row.gain - 1e-9 <= row.high
    )
    assert row.p_signs == pytest.approx(
        permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    )
    if d.any():
        assert row.p_wilcoxon == pytest.approx(wilcoxon(d).pvalue)


def test_gains_pair_seeds_whatever_their_order():
    rows = told([3, -1], seeds=(1, 2, 3))
    shuffled = rows.sample(frac=1, random_state=0)
    wanted = gains(rows).set_index("target")
    pd.testing.assert_frame_equal(gains(shuffled).set_index("target").loc[wanted.index], wanted)
    assert (
        wanted.gain.tolist() == pytest.approx([3, -1])
        and wanted.sd.tolist() == pytest.approx([0, 0], abs=1e-9)
        and set(wanted.seeds) == {3}
    )
    both = pd.concat([rows, told([5, 5], seeds=(1,), size=50)])
    assert start_table(both)[["size", "gain"]].round(6).values.tolist() == [
        ["all", 1.0],
        ["50", 5.0],
    ]


def test_gains_of_a_file_are_those_of_the_frame(tmp_path, arguments, unbroken):
    for row in unbroken.to_dict("records"):
        (store := starting.Measurements(tmp_path / "rows.csv")).append(row | {"recipe": ""})
    assert len(store) == 8
    pd.testing.assert_frame_equal(gains(measured(tmp_path / "rows.csv")), gains(unbroken))


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda r: r.drop(columns="seed"), "no column 'seed'"),
        (
            lambda r: r[r.start != "pretrained"],
            "no row starts from 'pretrained', only from centroid",
        ),
        (
            lambda r: r.iloc[1:],
            "t0 from centroid, size all, seed 1: not measured from pretrained",
        ),
        (
            lambda r: pd.concat([r, r.iloc[[2]]]),
            "t0 from centroid, size all, seed 1: was measured twice",
        ),
        (
            lambda r: r.assign(accuracy=r.accuracy.where(r.index != 3)),
            "t0 from centroid, size all, seed 2: has no finite accuracy",
        ),
    ],
)
def test_rows_that_cannot_be_paired_are_named(change, problem):
    with pytest.raises(ValueError, match=problem):
        start_table(change(told([1, 2])))


def test_many_targets_flip_at_random_but_the_same():
    d = np.random.default_rng(0).normal(0.3, 1, 30)
    assert sign_flips(d, seed=1) == sign_flips(d, seed=1)
    assert sign_flips(d) == pytest.approx(
        permutation_test((d,), np.sum, permutation_type="samples", n_resamples=50_000).pvalue,
        abs=0.02,
    )
    assert sign_flips([0.1, 0.2, 0.3]) == 0.25  # 0.1 + 0.2 is not 0.3: rounding decides nothing
