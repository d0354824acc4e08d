"""Rivals of the mean, each against its public definition written down plainly; stretches,
seeds, adapters, bad members."""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from transformers import RobertaConfig, RobertaForSequenceClassification

from weightregions.bases import tiny_base
from weightregions.building import build_zoo
from weightregions.checkpoints import open_checkpoint, write_checkpoint
from weightregions.cli import main
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe
from weightregions.rivals import (
    ALONE,
    MERGES,
    PAIRED_MERGES,
    RIVALS,
    RivalSettings,
    compare_rivals,
    measurable_targets,
    rival,
    rival_table,
)
from weightregions.traversal import ScratchModel
from weightregions.zoo import open_zoo

transformers.logging.set_verbosity_error()
SMALL = dict(
    vocab_size=70,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A base and five models a little away from it, in folders."
    root = tmp_path_factory.mktemp("rivals")
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**SMALL))
    model.save_pretrained(root / "base")
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    common = {k: torch.randn_like(p) for k, p in start.items()}
    for i in range(5):
        with torch.no_grad():
            for k, p in model.named_parameters():
                p.copy_(start[k] + 0.008 * common[k] + 0.008 * torch.randn_like(p))
        model.save_pretrained(root / f"{i}")
    base = open_checkpoint(root / "base")
    return base, [open_checkpoint(root / f"{i}") for i in range(5)]


def vectors(world, name):
    base, models = world
    start = base[name].double()
    return start, torch.stack([m[name].double() - start for m in models])


def by_task_arithmetic(start, moved, s):
    return start + s.strength * moved.sum(0)


def by_ties(start, moved, s):
    "Trim, elect sign, disjoint mean: algorithm 1 of the paper, per tensor."
    flat = moved.reshape(len(moved), -1).clone()
    k = max(1, int(s.density * flat.shape[1]))
    for row in flat:
        row[row.abs() < row.abs().sort(descending=True).values[k - 1]] = 0
    sign = torch.sign(flat.sum(0))
    made = torch.zeros(flat.shape[1], dtype=torch.float64)
    for p in range(flat.shape[1]):
        same = [float(v) for v in flat[:, p] if v != 0 and torch.sign(v) == sign[p]]
        made[p] = np.mean(same) if same else 0
    return start + s.strength * made.view(start.shape)


def by_model_stock(start, moved, s):
    "Equation (5) and section 4 of the paper, with the mean of the angles' cosines."
    flat, k = moved.reshape(len(moved), -1), len(moved)
    cosines = [
        float(torch.nn.functional.cosine_similarity(flat[i], flat[j], dim=0))
        for i in range(k)
        for j in range(i)
    ]
    cosine = np.mean(cosines)
    t = k * cosine / (1 + (k - 1) * cosine)
    return t * (start + moved.mean(0)) + (1 - t) * start


@pytest.mark.parametrize(
    "method, truth",
    [
        ("task-arithmetic", by_task_arithmetic),
        ("ties", by_ties),
        ("model-stock", by_model_stock),
    ],
)
@pytest.mark.parametrize("strength, density", [(1.0, 0.2), (0.4, 0.7), (1.0, 1.0)])
def test_against_the_definition(world, method, truth, strength, density):
    base, models = world
    settings = RivalSettings(strength=strength, density=density)
    point = rival(method, models, base, settings)
    for name in base.layout.names:
        ours = truth(*vectors(world, name), settings)
        torch.testing.assert_close(point[name].double(), ours, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("t", [0, 0.3, 0.5, 1])
def test_slerp(world, t):
    base, models = world
    point = rival("slerp", models[:2], base, RivalSettings(t=t))
    for name in base.layout.names:
        a, b = (m[name].double().reshape(-1) for m in models[:2])
        u, v = a / a.norm(), b / b.norm()
        dot = float(u @ v)
        if abs(dot) > 0.9995:
            ours = (1 - t) * a + t * b
        else:
            angle = np.arccos(dot)
            ours = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        torch.testing.assert_close(point[name].double().reshape(-1), ours, rtol=1e-5, atol=1e-6)


def test_dare_drops_and_enlarges(world):
    """Of each task vector a random share stays, divided by the share; its mean over seeds is
    the mean."""
    base, models = world
    name, density = "embeddings.word_embeddings.weight", 0.3
    start, moved = vectors(world, name)
    points = [
        rival("dare", models[:2], base, RivalSettings(density=density, seed=s))[name].double()
        for s in range(60)
    ]
    allowed = torch.stack([moved[0] * i + moved[1] * j for i in (0, 1) for j in (0, 1)])
    made = 2 * density * (points[0] - start)
    assert ((allowed - made).abs().min(0).values < 1e-5).all()
    kept = ((points[0] - start).abs() > 1e-9).double().mean()
    assert abs(kept - (1 - (1 - density) ** 2)) < 0.06
    bias = torch.stack(points).mean(0) - start - moved[:2].mean(0)
    assert bias.abs().mean() < 0.03
    again = rival("dare", models[:2], base, RivalSettings(density=density, seed=0))[name]
    assert torch.equal(again.double(), points[0]) and not torch.equal(points[0], points[1])


@pytest.mark.parametrize("method", RIVALS)
def test_a_rival_is_a_checkpoint(world, tmp_path, method):
    base, models = world
    point = rival(method, models[:2], base)
    whole = {n: point[n] for n in base.layout.names}
    for name, size in zip(base.layout.names, base.layout.sizes):
        part = point.read(name, size // 3, size // 2 + 1)
        assert torch.equal(part, whole[name].reshape(-1)[size // 3 : size // 2 + 1])
    write_checkpoint(point, base, tmp_path / "written", head="drop")
    torch.testing.assert_close(open_checkpoint(tmp_path / "written").state(), whole)
    scratch = ScratchModel(base)
    scratch.load(point)
    for name in base.layout.names:
        torch.testing.assert_close(scratch.body[name].detach(), whole[name])


@pytest.mark.parametrize("method", RIVALS)
def test_bad_members_are_named(world, method):
    base, models = world
    sick = {n: t.clone() for n, t in models[0].state().items()}
    sick["encoder.layer.1.output.dense.weight"][0, 0] = torch.nan
    sick = open_checkpoint((base.config, sick), name="sick")
    with pytest.raises(ValueError) as e:
        point = rival(method, [sick, models[1]], base)
        point.state()
    assert "encoder.layer.1.output.dense.weight" in str(e.value) and "\n" not in str(e.value)
    wide = RobertaForSequenceClassification(RobertaConfig(**SMALL | {"vocab_size": 71}))
    with pytest.raises(ValueError, match="vocabulary of 71"):
        rival(method, [open_checkpoint(wide), models[1]], base)


def test_center_writes_what_a_method_makes(world, tmp_path, capsys):
    base, models = world
    folders = [str(m.folder) for m in models]
    said = ["--base", str(base.folder), "--out"]
    assert main(["center", *folders, *said, str(tmp_path / "t"), "--method", "ties"]) == 0
    point = rival("ties", models, base)
    torch.testing.assert_close(open_checkpoint(tmp_path / "t").state(), point.state())
    words = ["--method", "dare", "--density", "0"]
    assert main(["center", *folders, *said, str(tmp_path / "d"), *words]) == 2
    assert "density is a share" in capsys.readouterr().err
    assert main(["center", *folders, *said, str(tmp_path / "s"), "--method", "slerp"]) == 2
    assert "between two models, not 5" in capsys.readouterr().err


def test_merges_of_half_a_zoo_are_measured_on_the_other_half(tmp_path):
    names = ["films", "meals", "headlines", "questions"]
    corpora = load_corpora("builtin", names, n_train=60, n_test=40)
    base = str(tiny_base(tmp_path / "base", steps=2))
    build_zoo(tmp_path / "zoo", base, corpora, Recipe(steps=3, learning_rate=2e-3), [1, 2], 1)
    close = pd.DataFrame({"a": ["films"], "b": ["headlines"], "share": [0.3]})
    how = (open_zoo(tmp_path / "zoo"), corpora, base, tmp_path, close, (40, 40))
    rows = compare_rivals(*how)
    assert set(rows[rows.half == 1].target).isdisjoint(rows[(rows.half == 2)].target)
    for half in (1, 2):
        here = rows[rows.half == half]
        assert set(here.target).isdisjoint(here[here.kind == "model"].point)
    assert {"films", "headlines"} in [set(rows[rows.half == h].target) for h in (1, 2)]
    table = rival_table(rows)
    assert set(table.point) == {*MERGES, *PAIRED_MERGES, *ALONE} - {"mean", "mean of two"}
    assert (table.targets == 4).all() and (table.low <= table.saved + 1e-9).all()
    assert set(measurable_targets(rows)) <= set(names) and (rows.constant > 0).all()
    assert measurable_targets(rows.assign(constant=9.0)) != []
    assert measurable_targets(rows.assign(constant=0.0)) == []
    before = [f.read_bytes() for f in sorted(tmp_path.glob("half-*.jsonl"))]
    assert compare_rivals(*how).equals(rows)  # from its files, point by point
    assert [f.read_bytes() for f in sorted(tmp_path.glob("half-*.jsonl"))] == before
