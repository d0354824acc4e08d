"""Attacks on weightregions.traversal: exact ends, float64 parity, untouched inputs,
architectures, random directions, kill and resume."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from weightregions import sums, traversal
from weightregions.checkpoints import open_checkpoint
from weightregions.similarity import gram
from weightregions.space import TaskVector
from weightregions.traversal import (
    Point,
    ScratchModel,
    average,
    extrapolation,
    load_in_memory,
    load_what_fits,
    hull,
    line,
    perturbations,
    plane,
    ray,
    read_rows,
    save_point,
    traverse,
)

SMALL = dict(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=24,
)
KINDS = {
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL)),
    "roberta-mlm": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=60,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=24,
        )
    ),
    "deberta": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=24)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=60,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ),
}
IDS = torch.arange(4, 20).reshape(2, 8)


def live(kind="roberta", seed=0):
    torch.manual_seed(seed)
    return KINDS[kind]().eval()


def members(n=3, kind="roberta", dtype=torch.float32):
    made = [open_checkpoint(live(kind, seed).to(dtype), name=f"m{seed}") for seed in range(n)]
    for m in made:
        m.config.architectures = [m.anatomy.model]
    return made


def small(n, size=40, seed=0, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    return [
        open_checkpoint(
            {
                "w": torch.tensor(1 + 1e-3 * rng.normal(size=(size // 4, 4)), dtype=dtype),
                "b": torch.tensor(rng.normal(size=3), dtype=dtype),
            },
            name=f"s{i}",
        )
        for i in range(n)
    ]


def bytes_of(module):
    digest = hashlib.sha256()
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(
            name.encode()
            + t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def same_bits(a, b):
    return torch.equal(
        a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8)
    )


def output(model, kind):
    with torch.no_grad():
        extra = {"decoder_input_ids": IDS} if kind == "t5" else {}
        out = model(input_ids=IDS, **extra)
    return out.logits if "logits" in out else out.last_hidden_state


# --- arithmetic -------------------------------------------------------------------------------

affine = st.lists(st.floats(-40, 40), min_size=1, max_size=6).map(lambda w: [*w, 1 - sum(w)])


@given(
    affine,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 5),
)
def test_parity_with_float64(weights, dtype, seed):
    parts = small(len(weights), seed=seed, dtype=dtype)
    point = Point(parts, weights)
    for name in point:
        exact = sum(w * m[name].double() for w, m in zip(point.weights, parts))
        largest = max(float(m[name].double().norm()) for m in parts)
        moved = sum(
            abs(w) * float((m[name].double() - parts[0][name].double()).norm())
            for w, m in zip(weights, parts)
        )
        assert float((point[name].double() - exact).norm()) <= 1e-6 * (
            float(exact.norm()) + moved + 1e-3 * largest
        )
        assert point[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.permutations(range(6)))
def test_order_of_members_is_irrelevant(weights, order):
    weights = [w / sum(weights) for w in weights]
    parts, order = small(len(weights)), [i for i in order if i < len(weights)]
    one, other = (
        Point(parts, weights),
        Point([parts[i] for i in order], [weights[i] for i in order]),
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_hull_weights_are_a_distribution(m, n, seed):
    found = list(hull(small(m), n, seed))
    assert len(found) == n
    for coordinates, p in found:
        assert (
            list(coordinates.values()) == list(p.weights)
            and min(p.weights) >= 0
            and sum(p.weights) == pytest.approx(1)
        )
    assert [p.weights for _, p in found] == [p.weights for _, p in hull(small(m), n, seed)]


def test_hull_is_uniform_on_the_simplex():
    w = np.array([p.weights for _, p in hull(small(4), 5000, seed=3)])
    np.testing.assert_allclose(w.mean(0), 1 / 4, atol=0.01)
    np.testing.assert_allclose(
        np.cov(w.T), (np.eye(4) / 4 - 1 / 16) / 5, atol=0.004
    )  # of the flat Dirichlet distribution
    assert np.mean((w > 0.5).any(1)) == pytest.approx(
        4 * 0.5**3, abs=0.03
    )  # a corner of half size has an eighth of the volume


@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_exact_and_a_line_to_itself_does_not_move(kind):
    a, b, _ = members(kind=kind)
    scratch = ScratchModel(a)
    for alpha, end in ((0, a), (1, b), (0, a)):
        ((_, p),) = line(a, b, [alpha])
        scratch.load(p)
        for name in end:
            assert same_bits(scratch.body[name], end[name]) and same_bits(p[name], end[name])
    twin = open_checkpoint(a.state(), name="twin")
    for other in (a, twin):
        for _, p in line(a, other, [-31, 0.3, 0.5, 7.7, 32]):
            for name in a:
                assert same_bits(p[name], a[name])
    mixed = average([a, load_in_memory(a), load_in_memory(b)])
    scratch.load(mixed)
    for name in a:
        assert same_bits(scratch.body[name], mixed[name])


def test_negative_zeros_survive():
    a = open_checkpoint({"w": torch.tensor([-0.0, 1.0])}, name="a")
    assert same_bits(Point((a, load_in_memory(a)), (0.3, 0.7))["w"], a["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_members_of_other_precision(dtype):
    a, b, _ = members(dtype=dtype)
    scratch, held = ScratchModel(a), [load_in_memory(a), load_in_memory(b)]
    for _, p in line(a, b, [0, 0.3, 1]):
        scratch.load(p)
        for name, q in scratch.body.items():
            assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert same_bits(q, p[name]) and same_bits(q, Point(held, p.weights)[name])
    half = live().to(torch.bfloat16)
    with torch.no_grad():
        for name, q in ScratchModel(half).body.items():
            assert q.dtype == torch.bfloat16  # a live model keeps its own
    scratch = ScratchModel(half)
    scratch.load(average(held))
    for name, q in scratch.body.items():
        assert same_bits(q, average(held)[name].to(torch.bfloat16))


@pytest.mark.parametrize("room", [2**22, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_members_in_files_give_the_same_points_piece_by_piece(
    tmp_path, monkeypatch, room, dtype
):
    for i, seed in enumerate((0, 1, 2)):
        live(seed=seed).to(dtype).save_pretrained(tmp_path / f"m{i}")
    (
        monkeypatch.setattr(sums, "ROOM", room),
        monkeypatch.setattr(sums, "STRETCH", 16),
    )
    filed = [open_checkpoint(tmp_path / f"m{i}") for i in range(3)]
    held, some = (
        [load_in_memory(m, head="drop") for m in filed],
        load_what_fits(filed, memory=4 * filed[0].layout.numel, head="drop"),
    )
    assert [m is f for m, f in zip(some, filed)] == [False, True, True]
    scratch, longest = ScratchModel(filed[0]), []
    real = sums.combine

    def watched(tensors, weights, out):
        longest.append(len(tensors) * len(out))
        return real(tensors, weights, out)

    for module in (sums, traversal):
        monkeypatch.setattr(module, "combine", watched)
    for (_, p), (_, q), (_, r) in zip(hull(filed, 3), hull(held, 3), hull(some, 3)):
        wanted = {name: q[name] for name in q}
        longest.clear()
        for point in (p, r, p):
            scratch.load(point)
            for name, body in scratch.body.items():
                assert same_bits(body.detach(), wanted[name].to(body.dtype)) and same_bits(
                    point[name], wanted[name]
                )
        assert max(longest) <= max(room, 3 * 16)
    assert traversal._keys(list(hull(filed, 3))) == traversal._keys(list(hull(held, 3)))
    whole = average([filed[0], filed[0]])
    assert all(same_bits(whole[name], filed[0][name].to(whole[name].dtype)) for name in whole)


def test_points_serve_where_checkpoints_do():
    a, b, c = members()
    centroid = average([a, b, c], name="centroid")
    distances = gram([centroid, b], a, progress=False).euclidean()
    assert distances.iloc[0, 1] == pytest.approx(
        TaskVector.between(b, load_in_memory(centroid)).norm(), rel=1e-6
    )
    halfway = Point((centroid, a), (0.5, 0.5))
    for name in a:
        torch.testing.assert_close(
            halfway[name], (a[name] * 2 / 3 + b[name] / 6 + c[name] / 6), rtol=1e-5, atol=1e-6
        )
    for name in a:
        torch.testing.assert_close(
            next(ray(a, centroid, [1.0]))[1][name], centroid[name], rtol=1e-6, atol=1e-7
        )
    ((_, noisy),) = perturbations(a, b, 1)
    for start in (0, 3):
        assert same_bits(
            noisy.read("embeddings.word_embeddings.weight", start, 40),
            noisy["embeddings.word_embeddings.weight"].reshape(-1)[start:40],
        )


# --- planes -----------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_plane_passes_through_its_models(seed, scale):
    rng = np.random.default_rng(seed)
    start = rng.normal(size=30)
    a, b, c, d = (
        open_checkpoint(
            {"w": torch.tensor(start + scale * rng.normal(size=30) * (i > 0))}, name=n
        )
        for i, n in enumerate("abcd")
    )
    found = plane(a, b, c)
    marks = found.marks({"d": d}).set_index("name")
    for m in (a, b, c):
        assert same_bits(found.at(marks.x[m.name], marks.y[m.name])["w"], m["w"])
        x, y, distance = found.project(m)
        np.testing.assert_allclose(
            [x, y, distance], [marks.x[m.name], marks.y[m.name], 0], atol=1e-6 * scale
        )
    length = lambda p, q: float((p["w"].double() - q["w"].double()).norm())
    for p, q in ((a, b), (a, c), (b, c)):
        assert np.hypot(
            marks.x[p.name] - marks.x[q.name], marks.y[p.name] - marks.y[q.name]
        ) == pytest.approx(length(p, q), rel=1e-6)
    shadow = found.at(marks.x["d"], marks.y["d"])
    assert length(shadow, d) == pytest.approx(marks.distance["d"], rel=1e-6)
    for m in (b, c):
        assert float((d["w"] - shadow["w"]) @ (m["w"] - a["w"])) == pytest.approx(
            0, abs=1e-6 * scale**2
        )


# --- random directions ------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["model", "tensor"])
def test_perturbations_are_as_long_as_the_task_vector(per):
    a, b, _ = members()
    scratch, wanted = ScratchModel(a), TaskVector.between(a, b)
    norms = [float((b[n].double() - a[n].double()).norm()) for n in a]
    for _, p in perturbations(a, b, 3, seed=5, per=per):
        scratch.load(p)
        moved = [float((scratch.body[n].detach().double() - a[n].double()).norm()) for n in a]
        assert np.linalg.norm(moved) == pytest.approx(wanted.norm(), rel=1e-6)
        if per == "tensor":
            np.testing.assert_allclose(moved, norms, rtol=1e-6)
        for n in a:
            assert same_bits(scratch.body[n], p[n])


def _two():
    "Two checkpoints with matrices and vectors."
    rng = torch.Generator().manual_seed(0)
    shapes = {"embeddings.weight": (30, 8), "dense.weight": (12, 8), "dense.bias": (12,)}
    return [
        open_checkpoint(
            {k: torch.randn(size, generator=rng) for k, size in shapes.items()}, name=name
        )
        for name in "ab"
    ]


def test_perturbations_keep_the_spectrum_and_nothing_else():
    a, b = _two()
    spectrum = lambda t: torch.linalg.svdvals(t.double())
    for _, p in perturbations(a, b, 2, seed=5, per="spectrum"):
        for name, shape in zip(a.layout.names, a.layout.shapes):
            ours, theirs = p[name] - a[name], b[name] - a[name]
            torch.testing.assert_close(ours.norm(), theirs.norm(), rtol=1e-4, atol=1e-6)
            if len(shape) == 2 and min(shape) > 1:
                torch.testing.assert_close(
                    spectrum(ours), spectrum(theirs), rtol=1e-4, atol=1e-5
                )
                cosine = (ours * theirs).sum() / (ours.norm() * theirs.norm())
                assert abs(cosine) < 0.5


def test_perturbations_are_seeded_and_independent():
    a, b, _ = members()
    draw = lambda seed: [TaskVector.between(a, p) for _, p in perturbations(a, b, 4, seed=seed)]
    one, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(x.vector, y.vector) for x, y in zip(one, again))
    cosines = [abs(x.cos(y)) for i, x in enumerate(one + other) for y in (one + other)[:i]]
    assert max(cosines) < 6 / len(one[0].vector) ** 0.5
    assert (
        abs(float(one[0].vector.double().mean())) * len(one[0].vector) ** 0.5
        < 5 * one[0].norm() / len(one[0].vector) ** 0.5
    )
    torch.manual_seed(1)
    state = torch.get_rng_state()
    draw(2), ScratchModel(a)
    assert torch.equal(
        state, torch.get_rng_state()
    )  # the caller's random numbers are the caller's


# --- standing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_standing_model_computes_what_the_member_does(kind):
    a, b, _ = members(kind=kind)
    models = [live(kind, seed) for seed in (0, 1)]
    bare, full = ScratchModel(a), ScratchModel(a, head="average")
    for model, m in zip(models, (a, b)):
        base = model.base_model if kind != "t5" else model.get_encoder()
        assert torch.equal(output(full.load(m), kind), output(model, kind))
        found = bare.load(m) if kind != "t5" else bare.load(m).get_encoder()
        with torch.no_grad():
            assert torch.equal(
                found(input_ids=IDS).last_hidden_state, base(input_ids=IDS).last_hidden_state
            )
    reference = live(kind)
    with torch.no_grad():
        for p, x, y in zip(reference.parameters(), *(m.parameters() for m in models)):
            p.copy_((x.double() * 0.3 + y.double() * 0.7).float())
    torch.testing.assert_close(
        output(full.load(Point((a, b), (0.3, 0.7))), kind),
        output(reference, kind),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_callers_model_and_the_members_are_untouched(kind):
    model, parts = live(kind).train(), [load_in_memory(m) for m in members(kind=kind)]
    before, hashes = bytes_of(model), [m.sha256() for m in parts]
    scratch = ScratchModel(model, head="average")
    for _, p in [
        *extrapolation(*parts[:2], steps=3),
        *hull(parts, 3),
        *perturbations(parts[0], parts[1], 1),
        *plane(*parts, grid=2),
    ]:
        output(scratch.load(p), kind)
    assert (
        bytes_of(model) == before and model.training and [m.sha256() for m in parts] == hashes
    )
    assert not {t.data_ptr() for t in model.parameters()} & {
        t.data_ptr() for t in scratch.model.parameters()
    }
    given_away = ScratchModel(model, scratch=True)
    assert given_away.load(parts[1]) is model and bytes_of(model) != before


def test_ties_stay_ties_and_buffers_stay():
    for kind in ("gpt2", "t5", "roberta-mlm"):
        a, b, _ = members(kind=kind)
        scratch = ScratchModel(a, head="average")
        model = scratch.load(average([a, b]))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert len(scratch.body) == len({id(p) for p in scratch.body.values()})
    scratch = ScratchModel(members()[0])
    assert torch.equal(
        scratch.load(members()[1]).embeddings.position_ids,
        live().roberta.embeddings.position_ids,
    )


def test_pooler_in_the_body_beside_it_and_with_the_head():
    models = [live("bert", seed) for seed in (0, 1)]
    kept = [open_checkpoint(m, name=str(i), pooler="keep") for i, m in enumerate(models)]
    dropped = [open_checkpoint(m, name=str(i)) for i, m in enumerate(models)]
    assert ScratchModel(dropped[0]).load(dropped[1]).pooler is None
    with torch.no_grad():
        assert torch.equal(
            ScratchModel(kept[0]).load(kept[1])(IDS).pooler_output,
            models[1].bert(IDS).pooler_output,
        )
    with pytest.raises(ValueError, match="pooler"):
        ScratchModel(kept[0]).load(dropped[1])
    with pytest.raises(ValueError, match="pooler"):
        Point((kept[0], dropped[1]), (0.5, 0.5))
    assert torch.equal(
        output(ScratchModel(models[0], pooler="keep", head="average").load(kept[1]), "bert"),
        output(models[1], "bert"),
    )


def test_only_what_differs_is_written_again():
    base = live()
    wide = RobertaConfig(**SMALL | {"vocab_size": 6000})
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(wide).eval()
    parts = []
    for seed in range(3):
        model = RobertaForSequenceClassification(wide)
        model.load_state_dict(base.state_dict())
        with torch.no_grad():
            model.roberta.embeddings.word_embeddings.weight[seed:50] += 0.1 * seed + 0.1
            model.roberta.encoder.layer[0].output.dense.bias += seed
        parts.append(load_in_memory(open_checkpoint(model, name=f"m{seed}")))
    scratch = ScratchModel(base)
    points = [
        *hull(parts, 4),
        *line(parts[0], parts[1], [0, 0.4, 1]),
        *perturbations(parts[0], parts[1], 1),
        *hull(parts, 2),
    ]
    for _, p in points:
        scratch.load(p)
        for name, q in scratch.body.items():
            assert same_bits(q, p[name]), name
    assert sum(d is not False for d in scratch._differ.values()) == 2
    index, _ = scratch._differ["embeddings.word_embeddings.weight"]
    assert index.tolist() == list(range(50))
    for spoil in (
        "embeddings.word_embeddings.weight",
        "encoder.layer.1.output.dense.weight",
    ):  # somebody else wrote there
        with torch.no_grad():
            scratch.body[spoil].mul_(2)
        scratch.load(p)
        for name, q in scratch.body.items():
            assert same_bits(q, p[name]), name
    scratch.model.double()  # moved to other memory
    scratch.load(p)
    for name, q in scratch.body.items():
        torch.testing.assert_close(q.detach(), p[name].double())


def test_long_tensors_take_the_same_path_in_stretches():
    parts = small(4, size=4 * 70_000)
    w = (0.1, 0.2, 0.3, 0.4)
    exact = sum(x * m["w"].double() for x, m in zip(w, parts))
    torch.testing.assert_close(Point(parts, w)["w"].double(), exact, rtol=1e-6, atol=0)


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda a: {k: t for k, t in a.state().items() if k != "embeddings.LayerNorm.bias"},
            "odd lacks embeddings.LayerNorm.bias",
        ),
        (
            lambda a: {**a.state(), "embeddings.LayerNorm.bias": torch.ones(3)},
            r"odd: embeddings.LayerNorm.bias has shape \(3,\)",
        ),
    ],
)
def test_strangers_are_named(spoil, message):
    a = members()[0]
    odd = open_checkpoint(spoil(a), name="odd")
    for make in (
        lambda: Point((a, odd), (0.5, 0.5)),
        lambda: line(a, odd),
        lambda: hull([a, odd], 2),
        lambda: ScratchModel(a).load(odd),
        lambda: perturbations(a, odd, 1),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="distilbert"):
        line(a, members(kind="distilbert")[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(value):
    a, bad = load_in_memory(members()[0]), load_in_memory(members()[1])
    bad.name = "bad"
    bad._body["encoder.layer.1.output.dense.weight"].tensor[1, 2] = value
    for do in (
        lambda: ScratchModel(a).load(average([a, bad])),
        lambda: load_in_memory(bad),
        lambda: plane(a, members()[1], bad),
        lambda: perturbations(a, bad, 1),
    ):
        with pytest.raises(
            ValueError,
            match=r"bad.*encoder\.layer\.1\.output\.dense\.weight holds NaN or infinite",
        ):
            do()
    scratch = ScratchModel(a)
    with pytest.raises(ValueError):
        scratch.load(bad)
    assert same_bits(
        next(iter(scratch.load(a).parameters())), a["embeddings.word_embeddings.weight"]
    )  # and it goes on


def test_an_overflow_is_a_row_with_a_note():
    a = open_checkpoint(live(), name="a")
    b = load_in_memory(a)
    for held in b._body.values():
        held.tensor.mul_(1e37)
    b.name = "b"

    def loss(model):
        return {"loss": model(IDS).last_hidden_state.detach().mean()}

    found = traverse(line(a, b, [0, 32]), loss, ScratchModel(a), progress=False)
    assert found.note.tolist()[0] == "" and found.note.tolist()[1] == "loss is nan"


# --- rows on disk -----------------------------------------------------------------------------


def spread(model):
    with torch.no_grad():
        return [
            {"target": t, "loss": float(model(IDS).last_hidden_state[i].std()), "n": i}
            for i, t in enumerate("xy")
        ]


def test_any_cut_of_the_file_is_resumed_to_the_same_bytes(tmp_path):
    parts = [load_in_memory(m) for m in members()]
    scratch, path, file = ScratchModel(parts[0]), list(hull(parts, 4)), tmp_path / "rows.jsonl"
    table = traverse(path, spread, scratch, rows=file, progress=False)
    assert_frame_equal(table, traverse(path, spread, scratch, progress=False))
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for cut in [0, 1, len(whole) - 1, *rng.integers(0, len(whole), 12)]:
        file.write_bytes(whole[:cut])
        assert_frame_equal(traverse(path, spread, scratch, rows=file, progress=False), table)
        assert file.read_bytes() == whole
    calls = []
    traverse(
        path, lambda m: calls.append(1), scratch, rows=tmp_path / "other.jsonl", progress=False
    )
    traverse(
        path, lambda m: calls.append(1), scratch, rows=tmp_path / "other.jsonl", progress=False
    )
    assert len(calls) == 4  # measured once
    lines = whole.splitlines(keepends=True)
    file.write_bytes(lines[0] + b"{broken\n" + b"".join(lines[2:]))
    with pytest.raises(ValueError, match="is no file of a traversal, or damaged"):
        traverse(path, spread, scratch, rows=file, progress=False)
    file.write_bytes(whole)
    other = [
        load_in_memory(open_checkpoint(live(seed=9), name="m0")),
        *parts[1:],
    ]  # the same names, other weights
    with pytest.raises(ValueError, match="holds 4 points that are not on this path"):
        traverse(hull(other, 4), spread, scratch, rows=file, progress=False)
    with pytest.raises(ValueError, match="not on this path"):
        traverse(hull(parts, 4, seed=1), spread, scratch, rows=file, progress=False)
    assert file.read_bytes() == whole
    assert_frame_equal(read_rows(file), table)


def test_numbers_come_back_from_the_file(tmp_path):
    a, values = members()[0], iter([float("inf"), float("nan"), 0.1 + 0.2, 1e-300])
    metric = lambda model: {
        "loss": next(values),
        "k": np.int64(3),
        "half": np.float32(0.1),
        "text": "ä",
        "none": None,
    }
    path = list(line(a, a, [0, 0.1, 0.2, 0.3]))
    first = traverse(path, metric, ScratchModel(a), rows=tmp_path / "r.jsonl", progress=False)
    assert_frame_equal(
        first,
        traverse(path, metric, ScratchModel(a), rows=tmp_path / "r.jsonl", progress=False),
    )
    assert first.note.tolist() == ["loss is inf", "loss is nan", "", ""]


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_traversal import load_in_memory, hull, members, spread, ScratchModel, traverse
points = []
def slow(model):
    points.append(model)
    if len(points) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return spread(model)
parts = [load_in_memory(m) for m in members()]
traverse(hull(parts, 30), slow, ScratchModel(parts[0]), rows={file!r}, progress=False)
"""


def test_killed_in_the_middle_and_resumed(tmp_path):
    file, tests = tmp_path / "rows.jsonl", os.path.dirname(__file__)
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(tests=tests, file=str(file))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == -signal.SIGKILL
    assert file.read_bytes().count(b"\n") == 6  # what it is about, and five points
    parts = [load_in_memory(m) for m in members()]

    def slow(model):
        return spread(model)

    table = traverse(
        hull(parts, 30), slow_named(slow), ScratchModel(parts[0]), rows=file, progress=False
    )
    assert_frame_equal(
        table, traverse(hull(parts, 30), slow, ScratchModel(parts[0]), progress=False)
    )
    assert (
        len({json.loads(line)["key"] for line in file.read_text().splitlines()[1:]})
        == 30
        == file.read_bytes().count(b"\n") - 1
    )


def slow_named(f):
    f.__qualname__ = "slow"
    return f


# --- written points ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("gpt2", "t5", "roberta-mlm")])
def test_saved_points_open_everywhere(kind, tmp_path):
    a, b, _ = members(kind=kind)
    point = Point((a, b), (0.3, 0.7), "between")
    bare, full = (
        save_point(point, tmp_path / "bare"),
        save_point(point, tmp_path / "full", head="average"),
    )
    scratch = ScratchModel(a, head="average")
    assert torch.equal(
        output(AutoModelForSequenceClassification.from_pretrained(full).eval(), kind),
        output(scratch.load(point), kind),
    )
    assert torch.equal(
        output(AutoModel.from_pretrained(bare).eval(), kind),
        output(ScratchModel(a).load(point), kind),
    )
    for folder in (bare, full):
        assert open_checkpoint(folder).sha256() == load_in_memory(point).sha256()
    assert ScratchModel(full, head="keep").load(full) is not None and torch.equal(
        output(ScratchModel(full, head="keep").load(full), kind),
        output(scratch.load(point), kind),
    )


def test_members_from_files_are_read_and_not_held(tmp_path):
    parts = members()
    folders = [save_point(m, tmp_path / m.name, head="average") for m in parts]
    scratch = ScratchModel(folders[0], base=folders[1])
    for (_, p), (_, q) in zip(hull(folders, 3), hull(parts, 3)):
        scratch.load(p)
        for name in q:
            assert same_bits(scratch.body[name], q[name])


@pytest.mark.cuda
def test_the_same_points_on_a_gpu():
    a, b, c = (load_in_memory(m) for m in members())
    device = [load_in_memory(m, device="cuda") for m in (a, b, c)]
    for where in ([a, b, c], device):
        there, here = ScratchModel(a, device="cuda"), ScratchModel(a)
        for (_, p), (_, q) in zip(
            [*hull(where, 3), *line(*where[:2]), *perturbations(where[0], where[1], 1)],
            [*hull([a, b, c], 3), *line(a, b), *perturbations(a, b, 1)],
        ):
            there.load(p), here.load(q)
            for name in a:
                torch.testing.assert_close(
                    there.body[name].detach().cpu(),
                    here.body[name].detach(),
                    rtol=1e-6,
                    atol=1e-7,
                )


def test_a_plane_is_the_same_where_sums_come_out_otherwise(tmp_path, monkeypatch):
    """Another machine adds in another order: the last digits of lengths differ, and a file of
    points must still be taken for the same path."""
    from weightregions.traversal import Plane, _keys

    models = [
        open_checkpoint(
            {"w": torch.randn(50, generator=torch.Generator().manual_seed(i))}, name=f"m{i}"
        )
        for i in range(3)
    ]
    exact = Plane._products
    here = list(plane(*models, 4))
    monkeypatch.setattr(
        Plane, "_products", lambda self, *others: exact(self, *others) * (1 + 3e-16)
    )
    there = list(plane(*models, 4))
    assert _keys(here) == _keys(there) and [p.name for _, p in here] == [
        p.name for _, p in there
    ]
