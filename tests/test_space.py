"""Attacks on weight space: round trips, vector-space laws, precision, and everything that must
be refused."""

import math
import pickle
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightregions.space import (
    BLOCK,
    Layout,
    TaskVector,
    dot,
    flatten,
    kind_of,
    layer_of,
    unflatten,
)

same = partial(torch.testing.assert_close, rtol=0, atol=0)
quick = settings(max_examples=40, deadline=None)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("a", "b.0.w", "b.10.w", "b.2.w", "B", "c.weight", "c.bias", "c", "_", "d.e.f.g")
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def state_dicts(draw, dtypes=DTYPES):
    """Tensors of random names, shapes (scalars and empty ones too) and data types, over many
    orders of magnitude."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = 10.0 ** draw(st.integers(-6, 3))
    return {
        n: (torch.randn(draw(shapes), generator=rng) * scale).to(draw(st.sampled_from(dtypes)))
        for n in draw(names)
    }


def vectors(n=3):
    "A list of n float64 task vectors of one layout."

    def make(seed, shape):
        rng = torch.Generator().manual_seed(seed)
        layout = Layout(("a", "b"), (shape, (3,)), (torch.float32,) * 2)
        return [
            TaskVector(torch.randn(layout.numel, generator=rng, dtype=torch.float64), layout)
            for _ in range(n)
        ]

    return st.builds(
        make, st.integers(0, 2**31), st.tuples(st.integers(1, 5), st.integers(1, 5))
    )


# flatten and unflatten


@quick
@given(state_dicts())
def test_round_trip_is_exact_in_float64(sd):
    layout = Layout.of(sd)
    same(unflatten(flatten(sd, layout, torch.float64), layout), dict(sorted(sd.items())))


@quick
@given(state_dicts(DTYPES[:3]), st.sampled_from([torch.float32, torch.float64]))
def test_round_trip_is_exact_whenever_the_type_holds_the_tensors(sd, dtype):
    layout = Layout.of(sd)
    vector = flatten(sd, layout, dtype)
    assert vector.dtype == dtype and vector.shape == (sum(t.numel() for t in sd.values()),)
    same(unflatten(vector, layout), dict(sorted(sd.items())))
    assert {t.dtype for t in unflatten(vector, layout, torch.bfloat16).values()} == {
        torch.bfloat16
    }


@quick
@given(state_dicts([torch.float32]))
def test_offsets_and_slices_are_those_of_the_concatenation(sd):
    layout = Layout.of(sd)
    assert list(layout.names) == sorted(sd)
    same(flatten(sd, layout), torch.cat([sd[n].reshape(-1) for n in sorted(sd)]))
    vector = flatten(sd, layout)
    for name, offset, size in zip(layout.names, layout.offsets, layout.sizes):
        assert layout.slice(name) == slice(offset, offset + size)
        same(vector[layout.slice(name)], sd[name].reshape(-1))


@quick
@given(state_dicts(), st.randoms())
def test_layout_does_not_depend_on_the_order_of_the_state_dict(sd, random):
    shuffled = list(sd.items())
    random.shuffle(shuffled)
    assert Layout.of(dict(shuffled)) == Layout.of(sd)
    assert hash(Layout.of(dict(shuffled))) == hash(Layout.of(sd))


@quick
@given(state_dicts(), st.data())
def test_selection_keeps_order_and_content(sd, data):
    layout = Layout.of(sd)
    keep = data.draw(st.lists(st.sampled_from(layout.names), min_size=1, unique=True))
    part = layout.select(keep)
    assert part == layout.select(lambda n: n in keep) == Layout.of({n: sd[n] for n in keep})
    same(
        flatten(sd, part, torch.float64, partial=True),
        flatten({n: sd[n] for n in keep}, part, torch.float64),
    )


def test_parity_with_torch():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16)
    params = dict(model.named_parameters())
    flat = flatten(params, Layout.of(params))
    assert not flat.requires_grad
    same(flat, nn.utils.parameters_to_vector(params[n] for n in sorted(params)).detach())
    other = nn.TransformerEncoderLayer(8, 2, 16)
    own = dict(other.named_parameters())
    nn.utils.vector_to_parameters(flat, (own[n] for n in sorted(own)))
    same(unflatten(flat, Layout.of(params)), {n: own[n].detach() for n in sorted(own)})


def test_noncontiguous_and_shared_memory():
    base = torch.arange(12.0).reshape(3, 4)
    sd = {"t": base.T, "s": base[:, ::2]}
    layout = Layout.of(sd)
    vector = flatten(sd, layout)
    same(unflatten(vector, layout), {"s": base[:, ::2].contiguous(), "t": base.T.contiguous()})
    back = unflatten(vector, layout)
    back["s"].zero_()
    same(vector, flatten(sd, layout))
    vector.zero_()
    assert base.sum() == 66


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"a": torch.ones(2)}, "the state dict lacks b"),
        ({"a": torch.ones(2), "b": torch.ones(1), "c": torch.ones(1)}, "has c too many"),
        ({"a": torch.ones(2, 1), "b": torch.ones(1)}, r"a has shape \(2, 1\), expected \(2,\)"),
        ({"a": torch.ones(2), "b": torch.tensor([math.nan])}, "b holds NaN"),
        ({"a": torch.tensor([1, -math.inf]), "b": torch.ones(1)}, "a holds NaN or infinite"),
        ({"a": torch.ones(2, dtype=torch.int64), "b": torch.ones(1)}, "a is torch.int64"),
        ({"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(1)}, "a is torch.bool"),
    ],
)
def test_flatten_refuses(bad, says):
    layout = Layout(("a", "b"), ((2,), (1,)), (torch.float32,) * 2)
    with pytest.raises(ValueError, match=says) as error:
        flatten(bad, layout)
    assert "\n" not in str(error.value)


def test_overflow_of_the_data_type_is_refused():
    sd = {"big": torch.tensor([1e5])}
    with pytest.raises(ValueError, match=r"big holds .*as torch.float16"):
        flatten(sd, Layout.of(sd), torch.float16)
    same(flatten(sd, Layout.of(sd), torch.bfloat16), sd["big"].bfloat16())


@pytest.mark.parametrize("vector", [torch.ones(4), torch.ones(2), torch.ones(3, 1)])
def test_unflatten_refuses_another_length(vector):
    with pytest.raises(ValueError, match="does not fit"):
        unflatten(vector, Layout(("a", "b"), ((2,), (1,)), (torch.float32,) * 2))


def test_layout_is_immutable_hashable_picklable():
    layout = Layout.of({"a": torch.ones(2), "b": torch.ones(3)})
    assert layout.offsets == (0, 2)  # cached before pickling
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert len({layout, Layout.of({"b": torch.ones(3), "a": torch.zeros(2)})}) == 1
    with pytest.raises(FrozenInstanceError):
        layout.names = ()


def test_require_same_names_the_culprits():
    def of(**sizes):
        return Layout.of({n: torch.ones(s) for n, s in sizes.items()})

    with pytest.raises(ValueError, match="it lacks b and has c instead"):
        of(a=1, b=1).require_same(of(a=1, c=1), "it")
    with pytest.raises(ValueError, match="it has b too many"):
        of(a=1).require_same(of(a=1, b=1), "it")
    with pytest.raises(ValueError, match=r"it: a has shape \(2,\), expected \(1,\)"):
        of(a=1, b=3).require_same(of(a=2, b=3), "it")
    of(a=1).require_same(of(a=1))


# precision


def test_dot_against_exact_summation():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3 * BLOCK + 17, generator=rng) for _ in range(2))
    exact = math.fsum((a.double() * b.double()).tolist())
    assert dot(a, b) == pytest.approx(exact, rel=1e-12, abs=1e-9)


def test_norm_where_float32_gives_up():
    "2^24 and then ones: a running float32 sum loses every single one of them."
    vector = torch.ones(BLOCK + 5)
    vector[0] = 2.0**12
    tv = TaskVector(vector, Layout(("a",), ((len(vector),),), (torch.float32,)))
    assert tv.norm() ** 2 == pytest.approx(2**24 + BLOCK + 4, rel=1e-15)


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1.0, 1e15])
def test_cosine_of_nearly_parallel_and_tiny_vectors(scale):
    n, eps = 10_000, 1e-4
    rng = torch.Generator().manual_seed(1)
    layout = Layout(("a",), ((n,),), (torch.float32,))
    a = torch.randn(n, generator=rng)
    b = a + eps * torch.randn(n, generator=rng)
    want = float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
    got = TaskVector(a.double() * scale, layout).cos(TaskVector(b.double() * scale, layout))
    assert got == pytest.approx(want, abs=1e-13) and 1 - got == pytest.approx(
        eps**2 / 2, rel=0.1
    )


# task vectors


@quick
@given(vectors(), st.floats(-8, 8), st.floats(-8, 8))
def test_vector_space_laws(tvs, x, y):
    a, b, c = tvs
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(((a + b) + c).vector, (a + (b + c)).vector)
    close((a + b).vector, (b + a).vector)
    close((x * (a + b)).vector, (x * a + x * b).vector)
    close(((x + y) * a).vector, (x * a + a * y).vector)
    same((a - b).vector, (a + -b).vector)
    close((sum(tvs) / 3).vector, torch.stack([t.vector for t in tvs]).mean(0))
    assert (a - a).norm() == 0


@quick
@given(vectors(2), st.floats(0.01, 100))
def test_norm_and_cosine(tvs, x):
    a, b = tvs
    assert a.cos(b) == pytest.approx(b.cos(a), abs=1e-14)
    assert (
        (x * a).cos(b)
        == pytest.approx(a.cos(b), abs=1e-12)
        == pytest.approx(-(-x * a).cos(b), abs=1e-12)
    )
    assert a.cos(a) == pytest.approx(1, abs=1e-12)
    assert (x * a).norm() == pytest.approx(x * a.norm(), rel=1e-12)
    assert (a - b).norm() ** 2 == pytest.approx(
        a.norm() ** 2 + b.norm() ** 2 - 2 * a.norm() * b.norm() * a.cos(b), rel=1e-9
    )
    want = torch.nn.functional.cosine_similarity(a.vector, b.vector, dim=0).item()
    assert a.cos(b) == pytest.approx(want, abs=1e-12)


@quick
@given(state_dicts([torch.float32]), st.integers(0, 2**31))
def test_there_and_back(base, seed):
    rng = torch.Generator().manual_seed(seed)
    fine_tuned = {
        n: t + 0.01 * t * torch.randn(t.shape, generator=rng) for n, t in base.items()
    }
    tv = TaskVector.between(base, fine_tuned, torch.float64)
    same(
        tv.apply_to(base), dict(sorted(fine_tuned.items()))
    )  # float64 holds the difference of two nearby float32 exactly
    same((-tv).apply_to(fine_tuned), dict(sorted(base.items())))
    same((0 * tv).apply_to(base), dict(sorted(base.items())))
    moved = TaskVector.between(base, fine_tuned).apply_to(base)
    torch.testing.assert_close(moved, dict(sorted(fine_tuned.items())), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_keeps_the_types_of_the_base(dtype):
    base, fine_tuned = (
        {"a": torch.ones(3, dtype=dtype)},
        {"a": torch.full((3,), 3.0, dtype=torch.float32)},
    )
    tv = TaskVector.between(base, fine_tuned)
    assert tv.vector.dtype == torch.float32
    same(tv.apply_to(base), {"a": torch.full((3,), 3.0, dtype=dtype)})


def test_task_vectors_are_immutable():
    given_vector = torch.ones(2)
    layout = Layout(("a",), ((2,),), (torch.float32,))
    tv, other = TaskVector(given_vector, layout), TaskVector(torch.tensor([1.0, -1.0]), layout)
    given_vector.zero_()
    same(tv.vector, torch.ones(2))
    with pytest.raises(FrozenInstanceError):
        tv.vector = given_vector
    with pytest.raises(FrozenInstanceError):
        del tv.layout
    for result in (tv + other, tv - other, 2 * tv, tv / 2, -tv, sum([tv, other])):
        result.vector.zero_()
    same((tv.vector, other.vector), (torch.ones(2), torch.tensor([1.0, -1.0])))
    base = {"a": torch.zeros(2)}
    tv.apply_to(base)["a"].fill_(9.0)
    same((base["a"], tv.vector), (torch.zeros(2), torch.ones(2)))
    copied = pickle.loads(pickle.dumps(tv))
    same(copied.vector, tv.vector)
    augmented = tv
    augmented += other
    same(tv.vector, torch.ones(2))


def test_task_vectors_of_different_spaces_do_not_mix():
    a = TaskVector(torch.ones(2), Layout(("a",), ((2,),), (torch.float32,)))
    b = TaskVector(torch.ones(2), Layout(("b",), ((2,),), (torch.float32,)))
    c = TaskVector(torch.ones(2), Layout(("a",), ((1, 2),), (torch.float32,)))
    for f in (lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x.cos(y)):
        with pytest.raises(ValueError, match="lacks a and has b instead"):
            f(a, b)
        with pytest.raises(ValueError, match=r"a has shape \(1, 2\), expected \(2,\)"):
            f(a, c)
    for wrong in (
        lambda: a * a,
        lambda: a + 1,
        lambda: 1 - a,
        lambda: a - "b",
        lambda: a / a,
        lambda: a + a.vector,
        lambda: [] + a,
    ):
        with pytest.raises(TypeError):
            wrong()
    for factor in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"times {factor}"):
            factor * a
    with pytest.raises(ValueError, match="norm 0"):
        a.cos(a - a)


@pytest.mark.parametrize(
    "vector, error",
    [
        (torch.ones(2, dtype=torch.float16), TypeError),
        (torch.ones(2, dtype=torch.int64), TypeError),
        ([1.0, 1.0], TypeError),
        (torch.ones(3), ValueError),
        (torch.ones(2, 1), ValueError),
    ],
)
def test_task_vector_refuses(vector, error):
    with pytest.raises(error, match="a task vector of"):
        TaskVector(vector, Layout(("a",), ((2,),), (torch.float32,)))


# names


@pytest.mark.parametrize(
    "name, layer, kind",
    [
        ("embeddings.LayerNorm.bias", "embeddings", "bias"),
        ("embeddings.word_embeddings.weight", "embeddings", "embeddings"),
        ("encoder.layer.10.attention.output.LayerNorm.weight", "layer 10", "norm"),
        ("encoder.layer.0.intermediate.dense.weight", "layer 0", "feed-forward"),
        ("encoder.rel_embeddings.weight", "embeddings", "embeddings"),
        ("transformer.layer.5.attention.q_lin.weight", "layer 5", "attention"),
        ("transformer.layer.5.sa_layer_norm.weight", "layer 5", "norm"),
        ("h.3.attn.c_attn.weight", "layer 3", "attention"),
        ("ln_f.weight", "embeddings", "norm"),
        (
            "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder 1",
            "attention",
        ),
        ("decoder.block.1.layer.2.DenseReluDense.wo.weight", "decoder 1", "feed-forward"),
        ("decoder.final_layer_norm.weight", "embeddings", "norm"),
        ("decoder.layers.7.fc1.bias", "decoder 7", "bias"),
    ],
)
def test_layer_and_kind(name, layer, kind):
    assert (layer_of(name), kind_of(name)) == (layer, kind)
