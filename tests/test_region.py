"""Attacks on weightregions.region: parity with task vectors, the rate of false alarms, folders,
bad company."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import RobertaConfig, RobertaModel

from weightregions.centering import Centroid
from weightregions.checkpoints import open_checkpoint
from weightregions.region import (
    Region,
    locate,
    locate_from_gram,
    locate_unseen,
    location_rates,
    p_value,
    pooled,
    regions_of,
    shape_of,
)
from weightregions.similarity import Gram, gram
from weightregions.space import TaskVector
from weightregions.zoo import open_zoo

SHAPES = {
    "embeddings.weight": (40, 8),
    "layer.0.attention.weight": (8, 8),
    "layer.0.dense.bias": (8,),
    "scale": (),
}


def state(rng, scale=1.0):
    return {
        k: torch.from_numpy(np.asarray(scale * rng.normal(size=s))).float()
        for k, s in SHAPES.items()
    }


def world(groups=3, n=4, seed=0, noise=1.0, scale=1e-3):
    "A base, and groups of models, each around a direction of its own."
    rng = np.random.default_rng(seed)
    start, found = state(rng), {}
    for g in range(groups):
        along = state(rng)
        found[f"g{g}"] = [
            open_checkpoint(
                {k: start[k] + scale * (along[k] + noise * own[k]) for k in start},
                name=f"g{g}-{i}",
            )
            for i, own in enumerate(state(rng) for _ in range(n))
        ]
    return open_checkpoint(start, name="base"), found


def synthetic(groups, n, seed, dim=300, noise=1.5):
    "A Gram matrix of groups of vectors, and the group of each."
    rng = np.random.default_rng(seed)
    tv = np.concatenate(
        [rng.normal(size=dim) + noise * rng.normal(size=(n, dim)) for _ in range(groups)]
        + [np.ones((1, dim))]
    )
    labels = [g for g in range(groups) for _ in range(n)]
    return Gram(tuple(f"{g}-{i}" for i, g in enumerate(labels)), {("all",): tv @ tv.T}), labels


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 6), st.integers(0, 1000), st.sampled_from([1e-6, 1e-3, 1e-1]))
def test_parity_with_task_vectors(n, seed, scale):
    base, groups = world(2, n, seed, scale=scale)
    region, query = Region.of(groups["g0"], base), groups["g1"][0]
    tvs = [TaskVector.between(base, m, torch.float64) for m in groups["g0"]]
    centre = sum(tvs) / n
    assert region.contains(query).cosine == pytest.approx(
        TaskVector.between(base, query, torch.float64).cos(centre), abs=1e-9
    )
    assert region.shape.length == pytest.approx(centre.norm(), rel=1e-9)
    for tv, row in zip(tvs, region.members.itertuples()):
        others = (centre * n - tv) / (n - 1)
        assert row.norm == pytest.approx(tv.norm(), rel=1e-9) and row.cosine == pytest.approx(
            tv.cos(centre), abs=1e-9
        )
        assert row.loo == pytest.approx(
            tv.cos(others) * others.norm() / centre.norm(), abs=1e-9
        )


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 8), st.integers(0, 1000))
def test_shape_knows_no_order_and_no_unit(n, seed):
    tv = np.random.default_rng(seed).normal(size=(n, 50)) + 1
    one, order = shape_of(tv @ tv.T), np.random.default_rng(seed).permutation(n)
    other = shape_of((1e-4 * tv[order]) @ (1e-4 * tv[order]).T)
    np.testing.assert_allclose(other.loo, one.loo[order], rtol=1e-9)
    assert other.spread == pytest.approx(one.spread) and other.level == pytest.approx(one.level)
    cosines = np.linspace(-1, 1, 50)
    p = [p_value(c, one) for c in cosines]
    assert all(a <= b for a, b in zip(p, p[1:])) and p_value(one.level, one) == pytest.approx(
        0.5
    )


def test_one_more_member_has_the_level_that_the_members_tell():
    rng, gaps = np.random.default_rng(0), []
    for _ in range(400):
        tv = rng.normal(size=200) + 1.5 * rng.normal(size=(6, 200))
        shape = shape_of(tv[:5] @ tv[:5].T)
        gaps.append(tv[5] @ tv[:5].mean(0) / np.linalg.norm(tv[5]) / shape.length - shape.level)
    assert (
        abs(np.mean(gaps)) < 3 * np.std(gaps) / 20
    )  # the plain leave-one-out cosine would be off by several of these


@pytest.mark.parametrize("n", [4, 6])
def test_the_rate_of_false_alarms_is_kept_and_outsiders_are_found(n):
    tables = [locate_from_gram(*synthetic(8, n, seed)) for seed in range(6)]
    rates = np.mean([location_rates(t).rate for t in tables], axis=0)
    assert (
        rates[0] > 0.99 and 0.01 < rates[1] < 0.10 and rates[2] > 0.99
    )  # named right, false alarms at 0.05, outsiders found
    strict = locate_from_gram(*synthetic(8, n, 0), alpha=0.001)
    assert (strict.named == tables[0].named).all() and (
        strict.inside >= tables[0].inside
    ).all()  # a lower rate takes in more, and names alike


def test_a_group_without_a_direction_says_so():
    rng = np.random.default_rng(0)
    tv = rng.normal(size=(20, 300))
    tv[:15] += np.repeat(rng.normal(size=(3, 300)), 5, axis=0)  # the last five share nothing
    found = Gram(tuple(map(str, range(20))), {("all",): np.pad(tv @ tv.T, (0, 1))})
    table = locate_from_gram(found, [i // 5 for i in range(20)])
    assert not table.directed[table.named == 3].any()
    assert table.directed[table.named < 3].all()
    assert table[table.seen & (table.true < 3)].right.all()
    assert table[~table.seen & table.directed].right.all()


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("noise", [1.0, 6.0])
def test_inside_is_the_p_value_and_nothing_else(alpha, noise):
    found, labels = synthetic(6, 5, 0, noise=noise)
    table = locate_from_gram(found, labels, alpha=alpha)
    assert (table.inside == (table.p >= alpha)).all()
    assert location_rates(table).rate["false alarm"] == (table.p[table.seen] < alpha).mean()


def of_families(datasets, seeds, families=2, dim=400, seed=0):
    "A Gram matrix of families of datasets that differ in how far they lie from their family."
    rng, tv, groups, units = np.random.default_rng(seed), [], [], []
    for f in range(families):
        family = rng.normal(size=dim)
        for d in range(datasets):
            dataset = family + rng.exponential() * 1.5 * rng.normal(size=dim)
            tv += [dataset + rng.normal(size=dim) for _ in range(seeds)]
            groups += [f] * seeds
            units += [f"{f}-{d}"] * seeds
    tv = np.array([*tv, np.ones(dim)])
    names = tuple(map(str, range(len(groups))))
    return Gram(names, {("all",): tv @ tv.T}), groups, units


@pytest.mark.parametrize("seed", range(2))
def test_calibrated_on_datasets_the_stated_rate_is_kept(seed):
    rates = location_rates(locate_from_gram(*of_families(25, 2, seed=seed), alpha=0.1)).rate
    assert rates["false alarm"] <= 0.16 and rates["outsider found"] > 0.8
    assert rates["region named right"] > 0.9


@pytest.mark.parametrize("alpha, takes", [(0.05, 20), (0.1, 10), (0.3, 3)])
def test_too_few_datasets_are_refused_with_a_sentence(alpha, takes):
    found, groups, units = of_families(takes - 1 + 1, 2)  # one is left out in turn
    table = locate_from_gram(found, groups, units, alpha=alpha)
    assert table.inside[table.seen].isna().all() and table.p[table.seen].isna().all()
    assert location_rates(table).models["false alarm"] == 0
    assert np.isnan(location_rates(table).rate["false alarm"])
    assert location_rates(table).models["region named right"] == table.seen.sum()
    found, groups, units = of_families(takes + 1, 2)
    table = locate_from_gram(found, groups, units, alpha=alpha)
    assert table.inside[table.seen].notna().all()
    base, models = world(1, 6)
    region = Region.of(models["g0"], base, "g0", units=list("aabbcc"))
    with pytest.raises(ValueError, match="region g0: 3 datasets are too few for a p-value"):
        region.contains(models["g0"][0])
    row = locate(models["g0"][0], [region]).iloc[0]
    assert np.isnan(row.p) and "it takes 20" in row.note
    assert isinstance(region.contains(models["g0"][0], alpha=0.3).inside, bool)


def test_a_region_of_datasets_is_kept_with_its_units(tmp_path):
    base, models = world(1, 6)
    region = Region.of(models["g0"], base, "g0", units=list("aabbcc"))
    again = Region.load(region.save(tmp_path / "g0"), base)
    assert again.shape.units.tolist() == [0, 0, 1, 1, 2, 2]
    query = models["g0"][1]
    assert again.contains(query, 0.3).p == region.contains(query, 0.3).p


def test_located_by_weights_as_by_the_gram_matrix():
    base, groups = world(3, 4)
    query = groups["g1"].pop()
    regions = [Region.of(models, base, name) for name, models in groups.items()]
    shapes = pooled({r.name: r.shape for r in regions})
    by_weights = locate(query, [replace(r, shape=shapes[r.name]) for r in regions])
    everything = [m for models in groups.values() for m in models] + [query]
    table = locate_from_gram(
        gram(everything, base, progress=False), {m.name: m.name[:2] for m in everything}
    )
    row = table[(table.model == query.name) & table.seen].iloc[0]
    assert by_weights.region[0] == row.named == "g1" and row.inside == by_weights.inside[0]
    assert by_weights.cosine[0] == pytest.approx(row.cosine, abs=1e-9) and by_weights.p[
        0
    ] == pytest.approx(row.p, rel=1e-6)


def test_units_are_left_out_whole():
    rng = np.random.default_rng(1)
    family = rng.normal(size=400)
    datasets = [family + 1.5 * rng.normal(size=400) for _ in range(4)]
    tv = np.concatenate(
        [d + rng.normal(size=(3, 400)) for d in datasets]
        + [rng.normal(size=(3, 400)) + 2 * rng.normal(size=400) for _ in range(4)]
    )
    units = [f"d{i // 3}" for i in range(24)]
    whole, models = shape_of(tv[:12] @ tv[:12].T, units[:12]), shape_of(tv[:12] @ tv[:12].T)
    assert (
        whole.n == 4 and whole.level < models.level
    )  # seeds of one dataset no longer vouch for each other
    found = Gram(tuple(map(str, range(24))), {("all",): np.pad(tv @ tv.T, (0, 1))})
    table = locate_from_gram(found, ["a"] * 12 + ["b"] * 12, units)
    assert table[table.seen & (table.true == "a")].right.all()


def test_a_saved_region_answers_alike_and_holds_a_plain_file(tmp_path):
    base, groups = world()
    region, query = Region.of(groups["g0"], base, "g0"), groups["g1"][0]
    again = Region.load(region.save(tmp_path / "g0"), base)
    for m in (query, *groups["g0"]):
        assert again.contains(m).cosine == pytest.approx(region.contains(m).cosine, abs=1e-7)
    assert (
        again.members.equals(region.members)
        and again.spread == region.spread
        and again.base_identity == region.base_identity
    )
    stored, centre = (
        load_file(tmp_path / "g0" / "centre.safetensors"),
        Centroid("c", groups["g0"], np.full(4, 0.25)),
    )
    for k in SHAPES:
        torch.testing.assert_close(
            stored[k],
            (
                centre.read(k, 0, None, out=torch.empty(base[k].numel(), dtype=torch.float64))
                - base[k].double().reshape(-1)
            )
            .float()
            .reshape(base[k].shape),
        )
    assert locate(query, [again]).cosine[0] == again.contains(query).cosine


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "region.json").write_text("{"), "not a region"),
        (lambda f: (f / "region.json").write_text('{"members": []}'), "not a region"),
        (lambda f: os.truncate(f / "centre.safetensors", 200), "centre.safetensors"),
        (
            lambda f: (f / "centre.safetensors").write_bytes(
                (f / "centre.safetensors").read_bytes()[:-1] + b"\x00"
            ),
            "not the centre that region.json speaks of",
        ),
        (lambda f: (f / "centre.safetensors").unlink(), "centre.safetensors"),
        (lambda f: (f / "region.json").unlink(), "no region is there"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    base, groups = world()
    folder = Region.of(groups["g0"], base, "g0").save(tmp_path / "g0")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Region.load(folder, base)


def leaves(value, path=()):
    "Every field of a JSON object, with its way there."
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in inner:
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from leaves(part, (*path, key))


STRANGE = [None, "x", "", -1, True, 1e308, [], {}, [1], "NaN"]


def test_every_field_of_a_kept_region_is_checked(tmp_path, tried):
    base, groups = world(1, 3)
    folder = Region.of(groups["g0"], base, "g0").save(tmp_path / "g0")
    file, times = folder / "region.json", 0
    good = json.loads(file.read_text())
    for path in leaves(good):
        for strange in [*STRANGE, "gone", "nearly"]:
            about = json.loads(json.dumps(good))
            inside = about
            for key in path[:-1]:
                inside = inside[key]
            old = inside[path[-1]]
            if strange == "gone":
                del inside[path[-1]]
            elif strange == "nearly":
                if not isinstance(old, float):
                    continue
                inside[path[-1]] = old * (1 + 1e-9)
            elif old == strange:
                continue
            else:
                inside[path[-1]] = strange
            file.write_text(json.dumps(about))
            with pytest.raises(ValueError, match="is missing or was changed") as e:
                Region.load(folder, base)
            said = str(e.value).split("saved here, ")[1]
            assert path[0] == "digests" or said.startswith(str(path[0])), (path, strange, said)
            times += 1
    file.write_text(json.dumps(good))
    assert Region.load(folder, base).name == "g0"
    tried("a field of region.json changed", "regions", times, "the field is named")


@pytest.mark.parametrize("kind", ["fifo", "large", "folder"])
def test_only_a_regular_file_of_bounded_size_is_read(tmp_path, kind):
    base, groups = world(1, 3)
    folder = Region.of(groups["g0"], base, "g0").save(tmp_path / "g0")
    file = folder / "region.json"
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        with open(file, "w") as f:
            f.truncate(2**30)
    with pytest.raises(ValueError, match="region.json: not a re"):
        Region.load(folder, base)
    file.unlink() if kind != "folder" else file.rmdir()


def test_saving_is_all_or_nothing(tmp_path):
    base, groups = world()
    region = Region.of(groups["g0"], base, "g0")

    def broken(name, start, stop):
        raise ValueError("no disk")

    region.centre.read = broken
    with pytest.raises(ValueError, match="no disk"):
        region.save(tmp_path / "g0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            lambda b, g: Region.of(g["g0"][:2], b, "two"),
            "region two: takes at least three checkpoints, not 2",
        ),
        (
            lambda b, g: Region.of([*g["g0"], open_checkpoint(b.state(), name="still")], b),
            "still equals base",
        ),
        (
            lambda b, g: Region.of(
                [*g["g0"], open_checkpoint(state(np.random.default_rng(9)), name="far")], b
            ),
            "far was not fine-tuned from base",
        ),
        (
            lambda b, g: Region.of(g["g0"], b).contains(
                open_checkpoint(state(np.random.default_rng(9)), name="far")
            ),
            "far was not fine-tuned from base",
        ),
        (
            lambda b, g: Region.of(g["g0"], b).contains(
                open_checkpoint({k: t for k, t in b.items() if k != "scale"}, name="short")
            ),
            "short lacks scale",
        ),
        (
            lambda b, g: Region.of(g["g0"], b).contains(
                open_checkpoint(b.state() | {"scale": torch.tensor(float("nan"))}, name="sick")
            ),
            "sick: scale holds NaN",
        ),
        (
            lambda b, g: Region.of(
                [open_checkpoint(g["g0"][0].state(), name=str(i)) for i in range(3)], b
            ),
            "are they copies of one model?",
        ),
        (lambda b, g: Region.of(g["g0"], b).contains(g["g1"][0], alpha=0), "alpha is a rate"),
        (lambda b, g: locate(g["g1"][0], {}), "there are no regions"),
        (
            lambda b, g: locate_from_gram(
                gram(g["g0"] + g["g1"], b, progress=False), ["x"] * 7
            ),
            "7 groups for 8 models",
        ),
        (
            lambda b, g: locate_from_gram(
                gram(g["g0"][:2] + g["g1"], b, progress=False), ["x"] * 2 + ["y"] * 4
            ),
            "region x: a region takes at least two units",
        ),
    ],
)
def test_refused(bad, message):
    base, groups = world()
    with pytest.raises(ValueError, match=re.escape(message)):
        bad(base, groups)


def test_of_a_zoo_in_one_pass(tmp_path):
    torch.manual_seed(0)
    base = RobertaModel(
        RobertaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=20,
        ),
        add_pooling_layer=False,
    )
    base.save_pretrained(tmp_path / "base")
    start = {k: t.clone() for k, t in base.state_dict().items()}
    rows, families = [], {"a": "f", "b": "f", "c": "f", "d": "h", "e": "h", "k": "h"}
    for g, (dataset, family) in enumerate(families.items()):
        for seed in (1, 2, 3):
            moved = {}
            for i, (k, t) in enumerate(start.items()):
                draw = lambda s: (
                    torch.randn(t.shape, generator=torch.Generator().manual_seed(1000 * i + s))
                    if t.is_floating_point()
                    else 0
                )
                moved[k] = (
                    t + 1e-3 * (draw(ord(family)) + draw(g) + draw(100 + 10 * g + seed))
                    if t.is_floating_point()
                    else t
                )
            base.load_state_dict(moved)
            base.save_pretrained(tmp_path / dataset / str(seed))
            rows.append(f"{dataset}/{seed},{dataset},{family}")
    (tmp_path / "models.csv").write_text("model,dataset,family\n" + "\n".join(rows) + "\n")
    zoo, start = open_zoo(tmp_path), open_checkpoint(tmp_path / "base")
    regions = regions_of(zoo, start)
    assert list(regions) == list(families) and len({r.spread for r in regions.values()}) == 1
    for m in zoo.checkpoints():
        assert locate(m, regions).region[0] == m.name[0]
    by_family = regions_of(zoo, start, by="family")
    assert {f: r.shape.n for f, r in by_family.items()} == {"f": 3, "h": 3}
    for m in zoo.checkpoints():
        assert locate(m, by_family).region[0] == families[m.name[0]]
        assert by_family[families[m.name[0]]].contains(m, alpha=0.3)
    kept = {
        name: Region.load(r.save(tmp_path / "kept" / name), start)
        for name, r in regions.items()
    }
    assert [locate(m, kept).region[0] for m in zoo.checkpoints()] == [
        m.name[0] for m in zoo.checkpoints()
    ]
    assert json.loads((tmp_path / "kept" / "a" / "region.json").read_text())["base"] == {
        "name": "base",
        "sha256": start.sha256(),
    }
    with pytest.raises(
        ValueError, match="a region takes at least two datasets, and no family has them"
    ):
        regions_of(zoo.where(dataset=["a", "d"]), start, by="family")


def test_of_a_single_region_nobody_is_judged_without_it():
    base, groups = world()
    table = locate_from_gram(
        gram(groups["g0"], base, progress=False), ["x"] * len(groups["g0"])
    )
    assert table.seen.all() and len(table) == len(groups["g0"])
    rates = location_rates(table)
    assert (
        rates.models["outsider found"] == 0
        and rates.loc["outsider found", ["rate", "low", "high"]].isna().all()
    )


def test_models_that_are_alone_make_no_region(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    model = RobertaModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "base")
    for name in ("a/1", "a/2", "a/3", "b/1"):
        with torch.no_grad():
            [p.add_(1e-3 * torch.randn_like(p)) for p in model.parameters()]
        model.save_pretrained(tmp_path / "zoo" / name)
    with pytest.warns(UserWarning, match="b: only one model, and no region"):
        assert list(
            regions_of(open_zoo(tmp_path / "zoo"), tmp_path / "base", progress=False)
        ) == ["a"]
    (tmp_path / "zoo" / "flat").mkdir()
    for i in (1, 2):
        (tmp_path / "zoo" / "a" / str(i)).rename(tmp_path / "zoo" / "flat" / f"run-{i}")
    with pytest.raises(
        ValueError,
        match=(
            "flat: a region takes at least two models, and no dataset has them; models of one"
            " dataset lie together in a folder DATASET/NAME"
        ),
    ):
        regions_of(open_zoo(tmp_path / "zoo" / "flat"), tmp_path / "base", progress=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_zoo_keeps_the_stated_rate_on_seeds_that_it_never_saw(seed):
    found, labels = synthetic(30, 6, seed, noise=1.0)
    numbered = enumerate(zip(found.names, labels))
    early = [n for i, (n, g) in numbered if i % 6 < 3 and g < 20]
    table = locate_unseen(found, labels, early, alpha=0.1)
    assert set(table.model) == set(found.names) - set(early)
    assert (table.seen == (table.true < 20)).all()
    rates = location_rates(table)
    assert rates.low["false alarm"] <= 0.1 <= rates.high["false alarm"]
    assert rates.rate["outsider found"] > 0.9


def test_a_zoo_and_what_it_never_saw_are_both_needed():
    found, labels = synthetic(3, 4, 0)
    for zoo in ([], found.names):
        with pytest.raises(ValueError, match="some models must make the zoo"):
            locate_unseen(found, labels, zoo)
