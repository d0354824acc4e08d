"""Attacks on weightregions.similarity: float64 parity, additivity, determinism, bounded memory,
faults."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from weightregions.checkpoints import open_checkpoint
from weightregions.many import cross_similarity, extend, gram_in, load_sketch, sketch, sketch_in
from weightregions.similarity import (
    Gram,
    cosine_similarity,
    euclidean_distance,
    gram,
    load_gram,
)

SHAPES = {
    "embeddings.weight": (7, 5),
    "layer.0.attention.weight": (5, 5),
    "layer.0.dense.bias": (5,),
    "layer.1.attention.weight": (5, 5),
    "scale": (),
}


def state(rng, scale=1.0, dtype=torch.float32):
    return {
        n: torch.from_numpy(np.asarray(scale * rng.normal(size=s))).to(dtype)
        for n, s in SHAPES.items()
    }


def flat(checkpoint):
    return np.concatenate(
        [checkpoint[n].double().numpy().ravel() for n in checkpoint.layout.names]
    )


def zoo(n=4, seed=0, scale=0.1, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    start = state(rng)
    base = open_checkpoint({k: t.to(dtype) for k, t in start.items()}, name="base")
    models = [
        open_checkpoint(
            {k: (start[k] + d).to(dtype) for k, d in state(rng, scale).items()}, name=f"m{i}"
        )
        for i in range(n)
    ]
    return models, base


def reference(models, base):
    tau = np.stack([flat(m) - flat(base) for m in models])
    raw = np.stack([flat(m) for m in models])
    cos = lambda x: (x @ x.T) / np.outer(*[np.linalg.norm(x, axis=1)] * 2)
    return (
        cos(tau),
        cos(raw),
        np.linalg.norm(tau[:, None] - tau[None], axis=-1),
        np.linalg.norm(raw[:, None] - raw[None], axis=-1),
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 6),
    st.integers(0, 1000),
    st.sampled_from([1e-18, 1e-4, 1.0, 1e6]),
    st.integers(1, 60),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_parity_with_float64(n, seed, scale, block, dtype):
    models, base = zoo(n, seed, max(scale, 1e-2) if dtype == torch.bfloat16 else scale, dtype)
    if any((flat(m) == flat(base)).all() for m in models):
        return  # a step too small for the type leaves the base where it was
    g = gram(models, base, block=block, progress=False)
    cos, raw, tau_distance, raw_distance = reference(models, base)
    np.testing.assert_allclose(g.cosine(), cos, atol=1e-9)
    np.testing.assert_allclose(g.cosine_raw(), raw, atol=1e-9)
    np.testing.assert_allclose(
        tau_distance, raw_distance, rtol=1e-6, atol=1e-12 * np.abs(flat(base)).max()
    )
    np.testing.assert_allclose(
        g.euclidean(), tau_distance, rtol=1e-6, atol=1e-8 * g.norms().max()
    )
    assert list(g.cosine().index) == [m.name for m in models] == list(g.euclidean().columns)


def test_groups_add_up_to_the_whole():
    models, base = zoo()
    g = gram(models, base, by=lambda n: n, progress=False)
    np.testing.assert_allclose(sum(g.products(x) for x in g.groups), g.products(), rtol=1e-12)
    np.testing.assert_allclose(
        gram(models, base, progress=False).products(), g.products(), rtol=1e-12
    )
    for name in SHAPES:  # each group is the similarity of a model that has only that tensor
        part = [open_checkpoint({name: m[name]}, name=m.name) for m in [*models, base]]
        np.testing.assert_allclose(
            g.products(name), gram(part[:-1], part[-1], progress=False).products(), rtol=1e-12
        )
    squares = sum(g.euclidean(x).to_numpy() ** 2 for x in g.groups)
    np.testing.assert_allclose(squares, g.euclidean().to_numpy() ** 2, rtol=1e-9)


def test_permuting_models_permutes_rows():
    models, base = zoo(5)
    one, other = (cosine_similarity(m, base, progress=False) for m in (models, models[::-1]))
    assert_frame_equal(one, other.loc[one.index, one.columns])


def test_moving_base_and_models_together_changes_task_vectors_nothing():
    models, base = zoo(3, scale=1.0)
    shift = state(np.random.default_rng(9))
    moved = [
        open_checkpoint({n: m[n].double() + shift[n].double() for n in SHAPES}, name=m.name)
        for m in [*models, base]
    ]
    assert_frame_equal(
        cosine_similarity(models, base), cosine_similarity(moved[:-1], moved[-1]), atol=1e-7
    )
    assert_frame_equal(
        euclidean_distance(models, base), euclidean_distance(moved[:-1], moved[-1]), atol=1e-6
    )


def test_the_same_bits_for_any_number_of_threads():
    models, base = zoo(4)
    results = [
        gram(models, base, block=3, threads=t, progress=False).products() for t in (1, 2, 7)
    ]
    assert all((r == results[0]).all() for r in results)
    np.testing.assert_allclose(
        gram(models, base, progress=False).products(), results[0], rtol=1e-12
    )


def test_symmetric_with_exact_ones():
    c = cosine_similarity(*zoo(6), progress=False)
    assert (
        (np.diag(c) == 1).all()
        and (c.to_numpy() == c.to_numpy().T).all()
        and (c.abs() <= 1).all(axis=None)
    )


def test_opposite_and_identical_models():
    models, base = zoo(1)
    back = open_checkpoint(
        {n: 2 * base[n].double() - models[0][n].double() for n in SHAPES}, name="back"
    )
    twin = open_checkpoint({n: t for n, t in models[0].items()}, name="twin")
    g = gram([models[0], back, twin], base, progress=False)
    assert g.cosine().loc["m0", "back"] == pytest.approx(-1) and g.cosine().loc[
        "m0", "twin"
    ] == pytest.approx(1)
    assert g.euclidean().loc["m0", "twin"] == 0


def test_a_model_that_did_not_move_is_named():
    models, base = zoo(2)
    still = open_checkpoint(base.state(), name="still")
    with pytest.warns(UserWarning, match="task vector of still has length 0"):
        c = cosine_similarity([*models, still], base, progress=False)
    assert c.isna().loc["still"].all() and c.iloc[:2, :2].notna().all(axis=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model", "base"])
def test_weights_that_are_no_numbers_are_named(value, where):
    models, base = zoo(2)
    bad = (base if where == "base" else models[1]).state()
    bad["layer.1.attention.weight"][2, 3] = value
    bad = open_checkpoint(bad, name="bad")
    with pytest.raises(
        ValueError, match=r"bad: layer\.1\.attention\.weight holds NaN or infinite values"
    ):
        gram(models, bad, progress=False) if where == "base" else gram(
            [models[0], bad], base, progress=False
        )
    assert gram(
        models, base, progress=False
    )  # threads of the failed run are gone, and the next one works


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda m, b: (m[:1], b), "at least two checkpoints, not 1"),
        (lambda m, b: ([m[0], m[0]], b), "two checkpoints are called 'm0'"),
        (
            lambda m, b: (
                [
                    m[0],
                    open_checkpoint(
                        {k: t for k, t in m[1].items() if k != "scale"}, name="odd"
                    ),
                ],
                b,
            ),
            "odd lacks scale",
        ),
        (
            lambda m, b: (
                [m[0], open_checkpoint({**m[1].state(), "extra": torch.ones(2)}, name="odd")],
                b,
            ),
            "odd has extra too many",
        ),
        (
            lambda m, b: (
                [m[0], open_checkpoint({**m[1].state(), "scale": torch.ones(2)}, name="odd")],
                b,
            ),
            "odd: scale has shape",
        ),
    ],
)
def test_faults_are_named_before_anything_is_read(spoil, message, monkeypatch):
    checkpoints, base = spoil(*zoo(2))
    monkeypatch.setattr(
        "weightregions.similarity._stretch_products",
        lambda *a: pytest.fail("weights were read"),
    )
    with pytest.raises(ValueError, match=message):
        gram(checkpoints, base, progress=False)


def test_kept_products_come_back(tmp_path):
    models, base = zoo(3)
    g = gram(models, base, by=lambda n: [("kind", n.split(".")[-1]), n], progress=False)
    again = load_gram(g.save(tmp_path / "g.npz"))
    assert again.names == g.names and list(again.cells) == list(g.cells)
    assert all((again.cells[k] == g.cells[k]).all() for k in g.cells)
    with pytest.raises(FileNotFoundError):
        load_gram(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "g.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="cut.npz"):
        load_gram(tmp_path / "cut.npz")


def test_a_kept_sketch_comes_back_and_grows(tmp_path):
    models, base = zoo(4)
    few, file = sketch(models[:3], base, 256, progress=False), tmp_path / "s.npz"
    again = load_sketch(few.save(file))
    assert (
        again.names == few.names
        and (again.values == few.values).all()
        and (again.norms == few.norms).all()
        and (again.seed, again.base) == (few.seed, few.base)
    )
    whole = sketch(models, base, 256, progress=False)
    assert (
        again.joined(sketch(models[3:], base, 256, progress=False)).cosine() == whole.cosine()
    ).all(axis=None)
    with pytest.raises(ValueError, match="different base, seed or size"):
        again.joined(sketch(models[3:], base, 256, seed=1, progress=False))
    with pytest.raises(ValueError, match="both sketches hold 'm0'"):
        again.joined(few)
    with pytest.raises(FileNotFoundError):
        load_sketch(tmp_path / "none.npz")
    content = file.read_bytes()
    for cut in (0, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="s.npz: not a file of sketched task vectors"):
            load_sketch(file)
    for change in (
        dict(names='["a"]'),
        dict(names='["m0", "m0", "m1"]'),
        dict(norms=few.norms[:2]),
        dict(values=few.values.astype(str)),
        dict(seed="x"),
    ):
        np.savez(
            file,
            **dict(
                names=json.dumps(few.names), values=few.values, norms=few.norms, seed=0, base=""
            )
            | change,
        )
        with pytest.raises(ValueError, match="s.npz: not a file"):
            load_sketch(file)


def test_merge_and_select_commute():
    models, base = zoo(4)
    g = gram(models, base, by=lambda n: n, progress=False)
    layer = lambda n: n.rsplit(".", 1)[0]
    one, other = g.merge(layer).select(["m3", "m1"]), g.select(["m3", "m1"]).merge(layer)
    assert one.groups == other.groups and all(
        (one.cells[k] == other.cells[k]).all() for k in one.cells
    )
    assert isinstance(one, Gram) and list(one.cosine().index) == ["m3", "m1"]


def test_memory_does_not_grow_with_models_times_weights(tmp_path):
    "Twelve models of 32 MB on disk: less than two models' worth of memory is added."
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=250_000,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    for i, name in enumerate(("base", "m0")):
        torch.manual_seed(i)
        RobertaModel(config).save_pretrained(tmp_path / name)
    for i in range(1, 12):
        shutil.copytree(tmp_path / "m0", tmp_path / f"m{i}", copy_function=os.link)
    code = f"""
import resource
from weightregions.checkpoints import open_checkpoint
from weightregions.similarity import gram
models, base = [open_checkpoint({str(tmp_path)!r} + f"/m{{i}}") for i in range(12)], open_checkpoint({str(tmp_path / "base")!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak(); gram(models, base, progress=False, threads=2); print((peak() - before) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, f"{done.stdout} MB"


@pytest.mark.parametrize("many", [2, 33, 400, 1500])
@pytest.mark.parametrize("memory", [1e7, 1e8, 1e9])
def test_buffers_keep_to_their_memory_whatever_the_number_of_models(many, memory, monkeypatch):
    from weightregions import streaming

    base = open_checkpoint({"w": torch.zeros(2**16)}, name="base")
    models = [
        open_checkpoint({"w": torch.ones(1).expand(2**16)}, name=f"m{i}") for i in range(many)
    ]
    rooms, real = [], streaming.Buffer.__init__

    def watched(self, *a):
        real(self, *a)
        rooms.append(self.stored.nbytes + self.wide.nbytes)

    monkeypatch.setattr(streaming.Buffer, "__init__", watched)
    g = gram(models, base, progress=False, threads=8, memory=memory, block=2**13)
    each = max(rooms) + 16 * (many + 1) * max(
        many + 1, min(2**13, 2**26 // (8 * (many + 1)))
    )  # and the products of a stretch, with those of another that wait to be added
    assert len(rooms) == min(8, max(1, memory // each)) and max(rooms) <= 2 * 2**26
    assert (g.products()[:-1, :-1] == 2**16).all()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 100),
    st.sampled_from([3, 17, None]),
    st.permutations(range(4)),
)
def test_an_extended_matrix_is_the_whole_matrix(n, k, seed, block, order):
    models, base = zoo(n + k + 1, seed)
    known, new, by = models[: n + 1], models[n + 1 :], lambda name: [name.split(".")[0], name]
    shuffled = [known[i] for i in order if i <= n] + known[4:]
    small = gram(known, base, by=by, block=5, progress=False)
    grown, whole = (
        extend(small, new, shuffled, base, by=by, block=block, progress=False),
        gram(models, base, by=by, progress=False),
    )
    assert grown.names == whole.names
    for key in whole.cells:
        np.testing.assert_allclose(grown.cells[key], whole.cells[key], rtol=1e-9, atol=1e-12)
    assert all((cell == cell.T).all() for cell in grown.cells.values())
    np.testing.assert_allclose(
        cross_similarity(known, new, base, block=block, progress=False),
        whole.cosine().iloc[: n + 1, n + 1 :],
        atol=1e-9,
    )


def test_a_model_may_be_on_both_sides():
    models, base = zoo(3)
    c = cross_similarity(models[:2], models, base, progress=False)
    np.testing.assert_allclose(
        c, gram(models, base, progress=False).cosine().iloc[:2], atol=1e-12
    )
    assert cross_similarity(models[0:1], models, base, progress=False).shape == (1, 3)


def test_one_more_model_reads_the_others_but_does_not_multiply_them(monkeypatch):
    from weightregions import similarity

    models, base = zoo(6)
    known = gram(models[:5], base, progress=False)
    shapes, real = [], similarity._stretch_products

    def watched(*a):
        found = real(*a)
        shapes.append(found.shape)
        return found

    monkeypatch.setattr(similarity, "_stretch_products", watched)
    extend(known, models[5:], models[:5], base, progress=False)
    assert set(shapes) == {(2, 7)}  # a row, and the squares


def test_another_base_is_not_taken_for_the_one_that_was_used():
    models, base = zoo(4)
    known = gram(models[:3], base, progress=False)
    _, other = zoo(1, seed=5)
    with pytest.raises(ValueError, match="m0: is not the model whose products were taken"):
        extend(known, models[3:], models[:3], other, progress=False)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 100), st.sampled_from([256, 512]), st.sampled_from([1, 3]))
def test_a_sketch_depends_on_nothing_but_the_seed(seed, k, threads):
    rng = np.random.default_rng(seed)
    base = open_checkpoint({"w": torch.zeros(5000), "b": torch.zeros(7)}, name="base")
    models = [
        open_checkpoint(
            {"w": torch.from_numpy(rng.normal(size=5000)).float(), "b": torch.ones(7)},
            name=f"m{i}",
        )
        for i in range(3)
    ]
    whole, alone = (
        sketch(models, base, k, seed, progress=False, threads=threads),
        sketch(models[1:2], base, k, seed, progress=False),
    )
    np.testing.assert_allclose(whole.values[1], alone.values[0], rtol=1e-5, atol=1e-4)
    exact = gram(models, base, progress=False)
    np.testing.assert_allclose(whole.norms, exact.norms(), rtol=1e-6)
    assert (whole.cosine() - exact.cosine()).abs().max(axis=None) < 6 / np.sqrt(k)
    twice = sketch(
        [open_checkpoint({n: 2 * t for n, t in models[0].items()}, name="twice")],
        base,
        k,
        seed,
        progress=False,
    )
    np.testing.assert_allclose(twice.values[0], 2 * whole.values[0], rtol=1e-5, atol=1e-4)


def test_bits_do_not_depend_on_where_one_starts():
    from weightregions.many import _bits

    whole = _bits(12345, 0, 5000)
    for start in (0, 256, 1024, 4864):
        assert (_bits(12345, start, 5000 - start) == whole[start:]).all()
    assert 0.47 < whole.double().mean() < 0.53 and not (whole == _bits(12346, 0, 5000)).all()


@pytest.mark.cuda
def test_a_gpu_finds_the_same():
    models, base = zoo(5)
    here, there = (
        gram(models, base, by=lambda n: n, progress=False, device=d, threads=3)
        for d in ("cpu", "cuda")
    )
    for key in here.cells:
        np.testing.assert_allclose(there.cells[key], here.cells[key], rtol=1e-12)
    assert_frame_equal(
        *(
            cross_similarity(models[:2], models[2:], base, progress=False, device=d)
            for d in ("cpu", "cuda")
        )
    )
    np.testing.assert_allclose(
        *(sketch(models, base, 256, progress=False, device=d).values for d in ("cpu", "cuda")),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kept_in, size", [(gram_in, {}), (sketch_in, {"k": 256})])
def test_what_a_file_knows_is_taken_from_it(kept_in, size, tmp_path):
    models, base = zoo(6)
    file, quiet = tmp_path / "kept.npz", dict(progress=False)
    whole = kept_in(tmp_path / "whole.npz", models, base, **size, **quiet)
    for part in (models[:2], models[:5], models[1:2] + models[3:], models):
        some = kept_in(file, part, base, **size, **quiet)
        assert some.names == tuple(m.name for m in part)
        names = list(some.names)
        assert_frame_equal(some.cosine(), whole.cosine().loc[names, names], rtol=1e-9)


def test_a_sketch_in_a_file_is_of_the_weights_that_are_there(tmp_path, monkeypatch):
    from weightregions import many

    models, base = zoo(4)
    file, quiet = tmp_path / "s.npz", dict(progress=False)
    sketch_in(file, models[:3], base, 256, **quiet)
    read, real = [], many.sketch

    def watched(new, *a, **how):
        read.extend(m.name for m in new)
        return real(new, *a, **how)

    monkeypatch.setattr(many, "sketch", watched)
    other = open_checkpoint({n: t + 0.1 for n, t in models[1].items()}, name="m1")
    found = sketch_in(file, [models[0], other, models[3]], base, 256, **quiet)
    assert read == ["m1", "m3"] and load_sketch(file).names == ("m0", "m2", "m1", "m3")
    np.testing.assert_allclose(found.norms[1], gram([other, models[0]], base).norms()["m1"])
    with pytest.raises(ValueError, match="over another base or of another size"):
        sketch_in(file, models, base, 512, **quiet)
    load_sketch(file).select(["m0"]).save(file)
    file_of_others = sketch([models[2]], base, 256, **quiet).save(tmp_path / "old.npz")
    sketch_in(file_of_others, models[:2], base, 256, **quiet)  # without hashes: made anew
    assert load_sketch(file_of_others).names == ("m0", "m1")
