"""Attacks on weightregions.probing: parity with scikit-learn, invariances, families of models,
an untouched caller, faults."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
)

from weightregions.bases import plain_texts, tiny_tokenizer
from weightregions.corpora import Corpus, load_corpora
from weightregions.probing import (
    PENALTY,
    Probing,
    Split,
    Target,
    buckets,
    encode,
    fit_probe,
    generalized_loss,
    head_loss,
    pooling_of,
    sgd_probe,
)

V = 600
BODY = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
)
FAMILIES = {
    "roberta": (RobertaConfig(**BODY, max_position_embeddings=60), "first"),
    "bert": (BertConfig(**BODY), "first"),
    "distilbert": (
        DistilBertConfig(
            vocab_size=V, dim=32, n_layers=2, n_heads=2, hidden_dim=48, pad_token_id=1
        ),
        "first",
    ),
    "electra": (ElectraConfig(**BODY, embedding_size=16), "first"),
    "deberta": (
        DebertaV2Config(
            **BODY,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
        ),
        "first",
    ),
    "albert": (AlbertConfig(**BODY, embedding_size=16), "first"),
    "gpt2": (
        GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=2,
            n_head=2,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        ),
        "last",
    ),
    "llama": (LlamaConfig(**BODY), "last"),
    "t5": (
        T5Config(
            vocab_size=V,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            pad_token_id=1,
            eos_token_id=2,
        ),
        "mean",
    ),
    "bart": (
        BartConfig(
            vocab_size=V,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            max_position_embeddings=60,
        ),
        "mean",
    ),
}


def roberta(seed=0, classifier=False, **changes):
    torch.manual_seed(seed)
    build = AutoModelForSequenceClassification if classifier else AutoModel
    return build.from_config(RobertaConfig(**BODY | dict(max_position_embeddings=60) | changes))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(plain_texts(40), vocab_size=V)


@pytest.fixture(scope="module")
def corpora():
    return load_corpora("builtin", ["headlines", "scenes"], n_train=200, n_test=100)


@pytest.fixture(scope="module")
def target(corpora, tokenizer):
    return Target(corpora["headlines"], tokenizer, n_train=120, n_test=80)


# --- the probe --------------------------------------------------------------------------------


def cloud(seed, n, d, classes, spread=1.0):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.integers(classes, size=n - classes)])
    x = (
        rng.normal(size=(n, d)) * np.exp(spread * rng.normal(size=d))
        + 0.7 * rng.normal(size=(classes, d))[y]
        + 5 * rng.normal(size=d)
    )
    return x, y


def objective(probe, x, y, penalty):
    return probe.loss_accuracy(x, y)[0] + penalty / 2 * (probe.weight**2).sum()


@pytest.mark.parametrize("classes, d", [(2, 8), (2, 300), (3, 40), (6, 100)])
@pytest.mark.parametrize("penalty", [1e-3, 1e-1, 1.0])
def test_same_optimum_as_scikit_learn(classes, d, penalty):
    x, y = cloud(classes * d, 150, d, classes)
    probe = fit_probe(x, y, classes, penalty)
    z = (x - x.mean(0)) / x.std(0)
    other = LogisticRegression(
        C=(2 if classes == 2 else 1) / (len(y) * penalty), tol=1e-9, max_iter=20_000
    ).fit(z, y)
    weight, bias = (
        (
            np.vstack([-other.coef_ / 2, other.coef_ / 2]),
            np.r_[-other.intercept_, other.intercept_] / 2,
        )
        if classes == 2
        else (other.coef_, other.intercept_)
    )
    log_p = torch.from_numpy(z @ weight.T + bias).log_softmax(1).numpy()
    theirs = -log_p[np.arange(len(y)), y].mean() + penalty / 2 * (weight**2).sum()
    assert abs(objective(probe, x, y, penalty) - theirs) < 1e-6
    np.testing.assert_allclose(
        probe.logits(x) - probe.logits(x).mean(1, keepdims=True),
        (lg := z @ weight.T + bias) - lg.mean(1, keepdims=True),
        atol=1e-2,
    )


@settings(max_examples=40)
@given(
    st.integers(0, 10_000),
    st.integers(6, 80),
    st.integers(1, 60),
    st.integers(2, 5),
    st.sampled_from([1e-3, 1e-2, 0.1, 1, 10]),
    st.sampled_from([1e-8, 1.0, 1e8]),
)
def test_gradient_vanishes_at_the_probe(seed, n, d, classes, penalty, unit):
    x, y = cloud(seed, n, d, classes)
    x[:, 0] = 3.0  # a constant feature
    probe = fit_probe(unit * x, y, classes, penalty)
    z = torch.from_numpy((unit * x - probe.mean) / probe.scale)
    w, b = (torch.from_numpy(a).requires_grad_() for a in (probe.weight, probe.bias))
    (
        torch.nn.functional.cross_entropy(z @ w.T + b, torch.from_numpy(y))
        + penalty / 2 * w.square().sum()
    ).backward()
    assert max(w.grad.norm(), b.grad.norm()) < 1e-5
    assert probe.scale[0] == 1 and np.abs(probe.weight[:, 0]).max() < 1e-9


@settings(max_examples=20)
@given(st.integers(0, 1000), st.permutations(range(30)))
def test_probe_does_not_depend_on_row_order_units_or_offsets(seed, order):
    x, y = cloud(seed, 30, 12, 3)
    probe, other = fit_probe(x, y, 3), fit_probe(1e3 * x[order] - 7, y[order], 3)
    np.testing.assert_allclose(other.logits(1e3 * x - 7), probe.logits(x), atol=1e-4)


def test_probe_is_the_same_byte_for_byte():
    x, y = cloud(3, 90, 50, 4)
    a, b = (fit_probe(torch.from_numpy(x).float(), y, 4) for _ in range(2))
    assert a.weight.tobytes() == b.weight.tobytes() and a.bias.tobytes() == b.bias.tobytes()


def test_no_random_probe_is_better():
    x, y = cloud(5, 60, 10, 3)
    probe, rng = fit_probe(x, y, 3), np.random.default_rng(0)
    for _ in range(50):
        other = type(probe)(
            probe.weight + 0.01 * rng.normal(size=probe.weight.shape),
            probe.bias + 0.01 * rng.normal(size=3),
            probe.mean,
            probe.scale,
        )
        assert objective(other, x, y, PENALTY) >= objective(probe, x, y, PENALTY)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(y=np.array([0, 1])), "features for 2 labels"),
        (dict(x=np.zeros(4)), r"\(4,\) features for 4 labels"),
        (dict(x=np.zeros((0, 2)), y=np.zeros(0, int)), "there are no rows"),
        (
            dict(x=np.full((4, 2), np.inf)),
            "the features of 4 rows are not finite, the first of them row 0",
        ),
        (
            dict(y=np.array([0, 1, 2, 0])),
            "label 2 of row 2 is out of range: there are 2 classes",
        ),
        (dict(y=np.array([0, -1, 0, 0])), "label -1 of row 1 is out of range"),
        (dict(y=np.array([0.0, 1, 1, 0])), "labels are float64, not integers"),
        (dict(y=np.ones(4, int)), "all 4 rows are of class 1"),
        (dict(penalty=-1.0), "penalty must be positive, not -1.0"),
        (dict(penalty=float("nan")), "penalty must be positive, not nan"),
    ],
)
def test_bad_features_and_labels(change, message):
    good = dict(
        x=np.array([[0.0, 1], [1, 0], [1, 1], [0, 0]]), y=np.array([0, 1, 1, 0]), classes=2
    )
    fit_probe(**good)
    with pytest.raises(ValueError, match=message):
        fit_probe(**good | change)


# --- batches and targets ----------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_buckets_hold_every_row_once_and_keep_the_budget(lengths, budget):
    batches = buckets(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(np.array(lengths)[rows]) <= budget
    assert [lengths[i] for b in batches for i in b] == sorted(lengths)


def test_draws_are_nested_and_hold_every_class(corpora, tokenizer):
    texts = lambda split: {tuple(t.tolist()) for t in split.columns["input_ids"]}
    small, large = (Target(corpora["headlines"], tokenizer, n, n) for n in (20, 60))
    assert texts(small.train) <= texts(large.train) and texts(small.test) <= texts(large.test)
    assert set(Target(corpora["headlines"], tokenizer, 4).train.labels) == {0, 1, 2, 3}
    assert texts(Target(corpora["headlines"], tokenizer, 20, seed=1).train) != texts(
        small.train
    )
    assert (
        len(large.train),
        len(large.test),
        len(Target(corpora["headlines"], tokenizer).train),
    ) == (60, 60, 200)


def test_bad_targets(corpora, tokenizer):
    for arguments, message in (
        (dict(n_train=201), "target headlines, train: 201 rows asked for, there are 200"),
        (dict(n_test=101), "target headlines, test: 101 rows asked for"),
        (dict(n_train=3), "3 rows cannot hold its 4 classes"),
        (dict(n_test=0), "0 rows cannot hold"),
        (dict(max_length=0), "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Target(corpora["headlines"], tokenizer, **arguments)
    rows = pd.DataFrame({"text": ["a b", "c"], "label": [0, 0]})
    bare = lambda **changes: SimpleNamespace(
        **dict(
            name="bare",
            labels=("x", "y"),
            train=rows.assign(label=[0, 1]),
            test=rows.assign(label=[1, 0]),
        )
        | changes
    )
    Target(bare(), tokenizer)
    for change, message in (
        (dict(train=rows), "target bare, train: only one class occurs, 'x'"),
        (
            dict(train=rows.assign(label=[0, 5])),
            "target bare, train, row 1: label 5 is out of range",
        ),
        (dict(test=rows.iloc[:0]), "target bare, test: there are no rows"),
        (dict(test=rows), "target bare, test: only one class occurs"),
        (
            dict(test=rows.assign(label=[0, 9])),
            "target bare, test, row 1: label 9 is out of range",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Target(bare(**change), tokenizer)


def test_pairs_are_encoded_as_pairs(corpora, tokenizer):
    split = Split(corpora["scenes"].test.iloc[:5], tokenizer, max_length=200)
    row = corpora["scenes"].test.iloc[3]
    assert (
        split.columns["input_ids"][3].tolist()
        == tokenizer(row["text"], row["text_pair"])["input_ids"]
    )


# --- encoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_and_padding_changes_nothing(family, target):
    config, pooling = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    assert pooling_of(config) == pooling_of(model) == pooling
    x = encode(model, target.test, bf16=False)
    assert (
        x.shape == (80, 32)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.isfinite().all()
    )
    encoder = model.eval().get_encoder() if pooling == "mean" else model.eval()
    with torch.no_grad():
        for i in (0, 41, 79):
            hidden = encoder(
                input_ids=target.test.columns["input_ids"][i][None]
            ).last_hidden_state[0]
            alone = {"first": hidden[0], "mean": hidden.mean(0), "last": hidden[-1]}[pooling]
            torch.testing.assert_close(x[i], alone, atol=1e-5, rtol=1e-4)
    assert np.isfinite(generalized_loss(model, target)["loss"])


@pytest.mark.parametrize("family", ["roberta", "distilbert", "gpt2", "t5", "deberta"])
def test_a_classifier_encodes_as_its_body_does(family, target):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(FAMILIES[family][0])
    assert torch.equal(encode(model, target.test), encode(model.base_model, target.test))
    assert pooling_of(model) == FAMILIES[family][1]


def test_t5_without_its_decoder(target):
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(**FAMILIES["t5"][0].to_dict()))
    assert pooling_of(model) == "mean" and encode(model, target.test).shape == (80, 32)


def test_order_of_rows_and_size_of_batches_do_not_matter(corpora, tokenizer):
    model, rows = roberta(), corpora["headlines"].test
    encoded = partial(encode, bf16=False)
    x = encoded(model, Split(rows, tokenizer))
    for budget in (1, 60, 500, 10**6):
        torch.testing.assert_close(
            encoded(model, Split(rows, tokenizer, batch_tokens=budget)), x, atol=1e-5, rtol=1e-5
        )
    order = np.random.default_rng(0).permutation(len(rows))
    torch.testing.assert_close(
        encoded(model, Split(rows.iloc[order], tokenizer)), x[order], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "measure", [generalized_loss, head_loss, lambda m, t: sgd_probe(m, t, steps=3)]
)
def test_the_callers_model_is_untouched(measure, target):
    model = roberta(classifier=True, num_labels=4)
    model.train()
    model.base_model.encoder.layer[0].eval()
    model.classifier.weight_of_mine = 1
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    flags, rng = [m.training for m in model.modules()], torch.get_rng_state()
    first = measure(model, target)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert measure(model, target) == first or np.isnan(first["objective"])


def test_flags_come_back_after_an_error(target):
    model = roberta().train()
    model.embeddings.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(model, target.test)
    assert all(m.training for m in model.modules())


def test_models_that_cannot_be_measured(target):
    for model, message in (
        (roberta(vocab_size=300), "the tokenizer is not this RobertaModel's: token id"),
        (roberta(max_position_embeddings=12), "has places for 10; lower max_length"),
        (torch.nn.Linear(2, 2), "Linear is no transformers model"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(model, target.test, "first")
    with pytest.raises(ValueError, match="pooling must be one of first, mean, last, not 'cls'"):
        encode(roberta(), target.test, "cls")
    headless = roberta()
    headless.forward = lambda **_: SimpleNamespace(logits=1, keys=lambda: ["logits"])
    with pytest.raises(ValueError, match="gives no hidden states, only logits"):
        encode(headless, target.test)


# --- losses -----------------------------------------------------------------------------------


def test_weights_that_are_not_finite_make_a_row_with_a_note(target):
    model = roberta(classifier=True, num_labels=4)
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.weight[3, 3] = float("inf")
    for row in (generalized_loss(model, target), head_loss(model, target)):
        assert (
            row["loss"] == float("inf")
            and np.isnan(row["accuracy"])
            and "not finite" in row["note"]
        )


def test_every_row_has_the_same_columns(target):
    model = roberta(classifier=True, num_labels=4)
    rows = [
        generalized_loss(model, target),
        head_loss(model, target),
        sgd_probe(model, target, steps=2),
        *Probing([target])(model),
    ]
    assert {tuple(r) for r in rows} == {
        (
            "target",
            "loss",
            "accuracy",
            "train_loss",
            "objective",
            "n_train",
            "n_test",
            "pooling",
            "penalty",
            "note",
        )
    }
    assert rows[3] == rows[0] and rows[1]["n_train"] == 0


def test_head_loss_is_that_of_the_head(target):
    model = roberta(classifier=True, num_labels=4).eval()
    with torch.no_grad():
        logits = model(**{k: v for k, v in target.test.padded(np.arange(80)).items()}).logits
    y = torch.from_numpy(target.test.labels)
    row = head_loss(model, target)
    assert abs(row["loss"] - torch.nn.functional.cross_entropy(logits, y).item()) < 1e-5
    assert row["accuracy"] == (logits.argmax(1) == y).double().mean().item()
    with pytest.raises(ValueError, match="has a head for 2 classes, target headlines has 4"):
        head_loss(roberta(classifier=True), target)
    with pytest.raises(ValueError, match="RobertaModel has no head that gives 4 logits a row"):
        head_loss(roberta(num_labels=4), target)
    names = dict(enumerate(target.labels[::-1]))
    with pytest.raises(ValueError, match="has them in the order"):
        head_loss(
            roberta(classifier=True, id2label=names, label2id={v: k for k, v in names.items()}),
            target,
        )


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_stochastic_gradients_do_no_better(pooling, target):
    model = roberta()
    ours = generalized_loss(model, target, pooling)
    for steps in (20, 160):
        theirs = sgd_probe(model, target, steps=steps, pooling=pooling)
        assert ours["objective"] <= theirs["objective"] + 1e-9
    assert theirs["objective"] < ours["objective"] + 0.02, (
        "the reference must be on its way to the same optimum"
    )
    assert ours["loss"] <= theirs["loss"] + 0.05


def test_a_representation_that_knows_the_class_has_a_low_loss(tokenizer):
    rng = np.random.default_rng(0)
    words = {0: ["film", "actor", "scene"], 1: ["goal", "team", "match"]}
    rows = lambda n: pd.DataFrame(
        [{"text": " ".join(rng.choice(words[i % 2], 3)), "label": i % 2} for i in range(n)]
    )
    target = Target(Corpus("words", "topic", ("a", "b"), rows(80), rows(60)), tokenizer)
    good = generalized_loss(roberta(), target, "mean")
    assert good["accuracy"] > 0.95 and good["loss"] < 0.3
    shuffled = Target(
        Corpus(
            "words",
            "topic",
            ("a", "b"),
            rows(80).assign(label=rng.permutation(np.arange(80) % 2)),
            rows(60),
        ),
        tokenizer,
    )
    assert generalized_loss(roberta(), shuffled, "mean")["loss"] > 0.5


@pytest.mark.cuda
def test_on_a_gpu_the_models_device_decides(target):
    model = roberta()
    x = encode(model, target.test)
    on_gpu = encode(model.cuda(), target.test, bf16=False)
    assert on_gpu.device.type == "cpu"
    torch.testing.assert_close(on_gpu, x, atol=1e-3, rtol=1e-3)
    assert (
        abs(
            generalized_loss(model, target)["loss"]
            - generalized_loss(model.cpu(), target)["loss"]
        )
        < 0.05
    )


def test_the_penalty_is_chosen_from_the_probes_own_rows():
    from weightregions.probing import PENALTIES, choose_penalty

    rng = np.random.default_rng(0)
    for n in (30, 300):
        y = rng.integers(3, size=n)
        x = rng.normal(size=(n, 40)) + 2 * np.eye(40)[y]
        assert choose_penalty(x, y, 3) in PENALTIES
        assert choose_penalty(x, y, 3) == choose_penalty(x, y, 3)
        assert choose_penalty(3 * x + 7, y, 3) == choose_penalty(x, y, 3)  # standardised
    noise = rng.normal(size=(60, 40)), rng.integers(2, size=60)
    assert choose_penalty(*noise, 2) == max(PENALTIES)
    rare = np.array([0] * 20 + [1] * 20 + [2])  # a class of a single row
    assert choose_penalty(rng.normal(size=(41, 4)), rare, 3) in PENALTIES
    with pytest.raises(ValueError, match="8 rows are too few for 5 folds"):
        choose_penalty(noise[0][:8], noise[1][:8], 2)


def test_a_study_pools_by_the_heads_token_and_the_mean_in_one_pass(target, monkeypatch):
    from weightregions import probing as p

    model = roberta()
    alone = {name: encode(model, target.test, name) for name in p.POOLINGS}
    passes = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k)
    )
    together = p.encode_all(model, target.test, p.POOLINGS)
    assert len(passes) == len(target.test.batches)
    assert all(torch.equal(alone[name], x) for name, x in zip(p.POOLINGS, together))


def test_one_penalty_holds_for_all_models_of_a_target(target, corpora, tokenizer):
    from weightregions import probing as p

    other = Target(corpora["scenes"], tokenizer, 60, 40)
    pretrained, tuned = roberta(), roberta()
    settings = [r for t in (target, other) for r in p.probe_settings(pretrained, t, ("first",))]
    chosen = {(r["target"], r["pooling"]): r["penalty"] for r in settings}
    x = encode(pretrained, target.train, "first")
    assert chosen[target.name, "first"] == p.choose_penalty(
        x, target.train.labels, len(target.labels)
    )
    for model in (pretrained, tuned):
        rows = Probing([target, other], "first", chosen)(model)
        assert {(r["target"], "first"): r["penalty"] for r in rows} == chosen
    # no test row has a say
    shuffled = Target(corpora["scenes"], tokenizer, 60, 20)
    again = p.probe_settings(pretrained, shuffled, ("first",))[0]
    assert again["penalty"] == chosen["scenes", "first"]


def test_a_constant_answer_has_the_loss_of_the_classes_shares():
    from weightregions.probing import constant_answer

    y = np.repeat([0, 1], [750, 250])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert constant_answer(y, y, 2) == pytest.approx(entropy, abs=1e-4)
    assert np.isfinite(constant_answer(y, np.array([2]), 3))  # a class without training rows
