"""Half precision, overflow and NaN: rounding is no movement, and what a sum cannot hold is
named."""

import warnings

import numpy as np
import pytest
import torch

from weightregions.centering import centroid
from weightregions.checkpoints import open_checkpoint
from weightregions.similarity import gram, rounding_norm

SHAPES = {"layer.0.weight": (64, 32), "layer.0.bias": (64,), "layer.1.weight": (32, 64)}


def start():
    torch.manual_seed(0)
    return {n: 0.05 * torch.randn(shape) for n, shape in SHAPES.items()}


def moved(base, size, seed, dtype=torch.float32, name=None):
    "A model that moved from the base in a random direction, stored in a data type."
    g = torch.Generator().manual_seed(seed)
    state = {
        n: (t + size * torch.randn(t.shape, generator=g)).to(dtype) for n, t in base.items()
    }
    return open_checkpoint(state, name=name or f"m{seed}")


def cosines(models, base):
    "The cosines, and what was warned of."
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        table = gram(models, open_checkpoint(base, name="base"), progress=False).cosine()
    return table, [str(m.message) for m in messages]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_that_explains_a_tenth_is_warned_of(dtype, tried):
    base = start()
    eps = torch.finfo(dtype).eps
    for size, warned in ((eps / 100, True), (eps / 3, True), (100 * eps, False)):
        models = [moved(base, 0.05 * size, seed, dtype) for seed in (1, 2)]
        _, messages = cosines(models, base)
        assert bool(messages) == warned, (size, messages)
        assert all("rounding may explain" in m and "is stored as" in m for m in messages)
        _, messages = cosines([moved(base, 0.05 * size, s) for s in (1, 2)], base)
        assert not messages  # in the base's own data type nothing is rounded
    tried(f"members in {dtype}".replace("torch.", ""), "similarity", 3, "rounding is named")


def test_the_share_is_that_of_a_model_that_hardly_moved():
    base = start()
    for dtype in (torch.bfloat16, torch.float16):
        model = moved(base, 1e-7, 1, dtype)
        exact = sum(float((model[n].double() - base[n].double()).square().sum()) for n in base)
        estimate = rounding_norm(open_checkpoint(base), model.layout.dtypes)
        assert estimate == pytest.approx(exact**0.5, rel=0.05)
    assert rounding_norm(open_checkpoint(base), open_checkpoint(base).layout.dtypes) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_base_has_not_moved(dtype, tried):
    base = start()
    rounded = open_checkpoint({n: t.to(dtype) for n, t in base.items()}, name="rounded")
    table, messages = cosines([moved(base, 0.01, 1), rounded, moved(base, 0.01, 2)], base)
    assert np.isnan(table.loc["rounded", "m1"]) and not np.isnan(table.loc["m1", "m2"])
    assert any("rounded has length 0 and no direction" in m for m in messages)
    tried(f"a base in {dtype}".replace("torch.", ""), "similarity", 1, "did not move")


BAD = {"NaN": torch.nan, "infinity": torch.inf, "1e200": 1e200, "1e308": 1e308}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_value_that_no_sum_holds_is_named_with_its_tensor(value, which, tried):
    base = {n: t.double() for n, t in start().items()}
    states = [{n: t + 0.01 * i for n, t in base.items()} for i in (1, 2, 3)]
    states[which]["layer.1.weight"] = states[which]["layer.1.weight"].clone()
    states[which]["layer.1.weight"][0, 0] = BAD[value]
    models = [open_checkpoint(s, name=f"m{i}") for i, s in enumerate(states)]
    with pytest.raises(ValueError, match=f"m{which}: layer.1.weight holds"):
        gram(models, open_checkpoint(base, name="base"), progress=False)
    with pytest.raises(ValueError, match=f"m{which}: layer.1.weight holds"):
        centroid(models)
    tried(f"{value} in model {which + 1} of 3", "similarity and centring", 2, "named")


def test_values_that_a_narrower_data_type_cannot_hold_are_named(tried):
    base = start()
    states = [dict(base), {n: t.clone() for n, t in base.items()}]
    states[1]["layer.0.bias"][3] = 1e30
    models = [open_checkpoint(s, name=f"m{i}") for i, s in enumerate(states)]
    with pytest.raises(
        ValueError, match="m1: layer.0.bias holds values that overflow as float16"
    ):
        centroid(models, dtype=torch.float16)
    tried("1e30 as float16", "centring", 1, "named")


def test_weights_whose_sum_overflows_are_shares_all_the_same(tried):
    base = start()
    models = [moved(base, 0.01, seed) for seed in (1, 2)]
    mean, huge = centroid(models), centroid(models, weights=[1.5e308, 1.5e308])
    for name in mean:
        torch.testing.assert_close(huge[name], mean[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="is no number from 0 up"):
        centroid(models, weights=[np.inf, 1.0])
    tried("shares of 1e308", "centring", 1, "no all-zero centroid")
