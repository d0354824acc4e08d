"""Half precision, overflow and NaN: rounding is no movement, and what a sum cannot hold is
named."""

import warnings

import numpy as np
import pytest
import torch

from weightregions.centering import centroid
from weightregions.checkpoints import open_checkpoint, write_checkpoint
from weightregions.many import cross_similarity, extend, sketch
from weightregions.region import locate, region_of, shape_of
from weightregions.similarity import Gram, gram, load_gram, rounding_norm
from weightregions.space import TaskVector, unflatten
from weightregions.traversal import (
    ScratchModel,
    average,
    line,
    load_in_memory,
    perturbations,
    save_point,
)

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_a_base_is_warned_of(dtype, tried):
    "Members in float32 of a base that is stored in half precision have one move in common."
    whole, eps = start(), torch.finfo(dtype).eps
    base = {n: t.to(dtype) for n, t in whole.items()}
    for size, warned in ((eps / 3, True), (100 * eps, False)):
        models = [moved(whole, 0.05 * size, seed) for seed in (1, 2)]
        table, messages = cosines(models, base)
        assert bool(messages) == warned, (size, messages)
        assert all("the base of m" in m and "rounding may explain" in m for m in messages)
        assert (table.loc["m1", "m2"] > 0.2) == warned
    table, _ = cosines([open_checkpoint(whole, name="still"), *models], base)
    assert np.isnan(table.loc["still", "m1"]) and not np.isnan(table.loc["m1", "m2"])
    kind = str(dtype).removeprefix("torch.")
    tried(f"float32 members of a base in {kind}", "similarity", 3, "rounding is named")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_a_base_is_estimated(dtype):
    whole = start()
    base = open_checkpoint({n: t.to(dtype) for n, t in whole.items()})
    exact = sum(float((whole[n].double() - base[n].double()).square().sum()) for n in base)
    estimate = rounding_norm(base, open_checkpoint(whole).layout.dtypes)
    assert estimate == pytest.approx(exact**0.5, rel=0.05)


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


def located(models, base):
    "The last of five models, among regions of the others."
    wide = open_checkpoint(SAME["base"], name="base")
    region = region_of([moved(SAME["base"], 0.01, seed) for seed in (7, 8, 9)], wide)
    region = type(region)(**vars(region) | {"base": base, "base_identity": {"sha256": ""}})
    return locate(models[-1], [region])


SAME = {"base": {n: t.double() for n, t in start().items()}}
QUIET = dict(progress=False)
SUMS = {
    "similarity": lambda models, base: gram(models, base, **QUIET),
    "similarity, extended": lambda models, base: extend(
        SAME["gram"], models, SAME["kept"], base, **QUIET
    ),
    "similarity of two zoos": lambda models, base: cross_similarity(
        models[:1], models[1:], base, **QUIET
    ),
    "sketch": lambda models, base: sketch(models, base, 256, **QUIET),
    "the start of a model": lambda models, base: models[-1].require_same_start(base),
    "location": located,
    "perturbation": lambda models, base: perturbations(base, models[-1], 1),
}


@pytest.fixture
def kept():
    "Products of two more models, to be extended."
    base = SAME["base"]
    SAME["kept"] = [moved(base, 0.01, seed, torch.float64) for seed in (5, 6)]
    SAME["gram"] = gram(SAME["kept"], open_checkpoint(base, name="base"), **QUIET)


def spoilt(state, places):
    "A copy of a state dict with some values in place of the first of a tensor."
    state = {n: t.clone() for n, t in state.items()}
    for name, value in places.items():
        state[name].view(-1)[0] = value
    return state


def three(base, which, places):
    "Three models and their base, of which one is spoilt."
    states = [{n: t + 0.001 * i for n, t in base.items()} for i in (1, 2, 3)]
    names = ["m0", "m1", "m2", "base"]
    states.append(base)
    states[which] = spoilt(states[which], places)
    *models, base = (open_checkpoint(s, name=n) for s, n in zip(states, names))
    return models, base, names[which]


@pytest.mark.parametrize("stage", SUMS)
def test_every_sum_names_model_and_tensor(stage, kept, tried):
    base, n = SAME["base"], 0
    for value in BAD.values():
        for which in (2, 3):  # the last model, and the base
            models, start, who = three(base, which, {"layer.1.weight": value})
            with pytest.raises(ValueError, match=f"^{who}: layer.1.weight holds"):
                SUMS[stage](models, start)
            n += 1
    tried("NaN, infinity, 1e200 or 1e308 in a model or the base", stage, n, "named")


@pytest.mark.parametrize("stage", SUMS)
def test_a_total_that_overflows_although_its_parts_do_not_is_named(stage, kept, tried):
    places = dict.fromkeys(("layer.0.weight", "layer.1.weight"), 1.1e154)
    models, base, who = three(SAME["base"], 2, places)
    with pytest.raises(ValueError, match=f"^{who}: .* overflows at layer.[01].weight$"):
        SUMS[stage](models, base)
    tried("squares that overflow together", stage, 1, "named")


def test_products_that_overflow_where_groups_are_added_are_named(tmp_path, tried):
    half = np.diag([1.0, 1e308, 1.0])
    g = Gram(("a", "b"), {("x",): half, ("y",): half})
    assert g.cosine("x").shape == (2, 2)
    for table in (g.products, g.cosine, g.cosine_raw, g.euclidean, g.norms):
        with pytest.raises(ValueError, match="^b: the sum of its squared weights overflows"):
            table()
    with pytest.raises(ValueError, match="inner products overflows"):
        shape_of(np.full((3, 3), 1e308))
    bad = Gram(("a", "b"), {("x",): np.full((3, 3), np.nan)})
    with pytest.raises(ValueError, match="g.npz: not a file of inner products"):
        load_gram(bad.save(tmp_path / "g.npz"))
    tried("groups of tensors that overflow together", "similarity", 5, "named")
    tried("NaN in kept products", "similarity", 1, "the file is named")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", [s for s in SUMS if s not in ("the start of a model",)])
def test_rounding_is_no_movement_in_any_sum(stage, dtype, tried):
    base = start()
    SAME["kept"] = [moved(base, 0.01, seed) for seed in (5, 6)]
    SAME["gram"] = gram(SAME["kept"], open_checkpoint(base, name="base"), **QUIET)
    near = moved(base, 1e-6, 3, dtype, "near")
    with pytest.warns(UserWarning, match="near is stored as .*: rounding may explain"):
        SUMS[stage]([moved(base, 0.01, 4), near], open_checkpoint(base, name="base"))
    rounded = open_checkpoint({n: t.to(dtype) for n, t in base.items()}, name="rounded")
    check_rounded(stage, rounded, base)
    kind = str(dtype).removeprefix("torch.")
    tried(f"a base in {kind}, or a model that hardly moved", stage, 2, "did not move, or named")


def check_rounded(stage, rounded, base):
    "A base that was rounded has no direction, whatever sum it takes part in."
    models, start = [moved(base, 0.01, 4), rounded], open_checkpoint(base, name="base")
    if stage in ("location", "perturbation"):
        with pytest.raises(ValueError, match="rounded.*(has no direction|did not move)"):
            SUMS[stage](models, start)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = SUMS[stage](models, start)
    table = result if stage == "similarity of two zoos" else result.cosine()
    assert table["rounded"].isna().all() and table.drop(columns="rounded").notna().any().all()


def test_a_matrix_with_a_rounded_base_in_it_can_be_extended():
    base = open_checkpoint(start(), name="base")
    known = [moved(start(), 0.01, 1), open_checkpoint(base.state(torch.bfloat16), name="still")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        g = gram(known, base, **QUIET)
        grown = extend(g, [moved(start(), 0.01, 2)], known, base, **QUIET)
    assert np.isnan(grown.cosine().loc["still", "m2"]) and grown.norms()["still"] == 0
    assert grown.cosine().loc["m1", "m2"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_points_of_members_that_are_no_numbers_are_refused(value, tried):
    base = start()
    models = [open_checkpoint(base, name="a")]
    bad = spoilt(base, {"layer.0.bias": value})
    models.append(open_checkpoint(bad, name="bad"))
    point = average(models)
    for read in (
        lambda: point["layer.0.bias"],
        lambda: point.read("layer.0.bias", 0, 3),
        point.state,
        point.sha256,
        lambda: load_in_memory(point),
        lambda: ScratchModel(models[0]).load(point) if models[0].config else point.state(),
    ):
        with pytest.raises(ValueError, match="^bad: layer.0.bias holds NaN or infinite"):
            read()
    assert point["layer.1.weight"].isfinite().all()
    tried(f"{value} in a member", "a point", 6, "named")


def test_a_point_far_outside_that_overflows_is_named(tried):
    ends = ({n: torch.full_like(t, x) for n, t in start().items()} for x in (-3e37, 3e37))
    a, b = (open_checkpoint(state, name=n) for state, n in zip(ends, "ab"))
    (_, near), (_, far) = line(a, b, [2, 32])
    assert near["layer.0.bias"].isfinite().all()
    with pytest.raises(ValueError, match="^a: the point a to b, alpha 32.0 overflows at layer"):
        far["layer.0.bias"]
    tried("a point at 32 times 3e37", "a point", 1, "named")


def test_another_data_type_that_cannot_hold_a_value_is_named(tried):
    states = {n: torch.full_like(t, 1e30) for n, t in start().items()}
    model = open_checkpoint(states, name="wide")
    tv = TaskVector.between({n: torch.zeros_like(t) for n, t in states.items()}, model)
    small = {n: torch.zeros_like(t).half() for n, t in states.items()}
    for narrow in (
        lambda: model.state(torch.float16),
        lambda: average([model]).state(torch.float16),
        lambda: unflatten(tv.vector, tv.layout, torch.float16),
        lambda: tv.apply_to(small),
    ):
        with pytest.raises(
            ValueError, match="layer.0.bias holds values that overflow as float"
        ):
            narrow()
    for grow in (lambda: 1e10 * tv, lambda: sum([tv * 3e8] * 2), lambda: -1e9 * tv):
        with pytest.raises(ValueError, match="^a task vector: layer.0.bias overflows"):
            grow()
    long = TaskVector(torch.full((tv.layout.numel,), 1e200, dtype=torch.float64), tv.layout)
    for product in (long.norm, lambda: long.cos(long)):
        with pytest.raises(
            ValueError, match="the sum of its squares overflows at layer.0.bias"
        ):
            product()
    tried("1e30 as float16", "state, point, vector, base", 4, "named")
    tried("a multiple, a sum or a length that overflows", "task vector", 5, "named")


def test_a_region_that_float32_cannot_hold_is_not_saved(tmp_path, tried):
    base = {n: t.double() * 1e45 for n, t in start().items()}
    steps = [moved(base, 1.0, seed, torch.float64).state() for seed in (1, 2, 3)]
    for seed, state in enumerate(steps):
        g = torch.Generator().manual_seed(seed)
        for tensor in state.values():
            tensor += 1e43 * torch.randn(tensor.shape, generator=g, dtype=torch.float64)
    models = [open_checkpoint(state, name=f"m{i}") for i, state in enumerate(steps)]
    region = region_of(models, open_checkpoint(base, name="base"), "wide")
    with pytest.raises(ValueError, match="layer.0.bias holds values that overflow as float32"):
        region.save(tmp_path / "region")
    assert not list(tmp_path.iterdir())
    tried("a centre of 1e38 and more", "region, saved", 1, "named, nothing is left")


def test_what_is_written_is_finite_and_names_the_model(tmp_path, tried):
    import test_pins

    like = open_checkpoint(test_pins.classifier(0), name="like")
    name = like.layout.names[0]
    sick = open_checkpoint(spoilt(like.state(), {name: torch.nan}), name="sick")
    with pytest.raises(ValueError, match=f"^sick: {name} holds NaN"):
        write_checkpoint(sick, like, tmp_path / "body")
    live = test_pins.classifier(0)
    with torch.no_grad():
        live.classifier.out_proj.bias[0] = torch.inf
    like = open_checkpoint(live, name="like")
    for write in (
        lambda: write_checkpoint(like.state(), like, tmp_path / "head"),
        lambda: save_point(like, tmp_path / "head", head="first"),
    ):
        with pytest.raises(ValueError, match="^like: classifier.out_proj.bias holds NaN"):
            write()
    assert not list(tmp_path.iterdir())
    tried("NaN in body or head", "checkpoint, written", 3, "named, nothing is left")
