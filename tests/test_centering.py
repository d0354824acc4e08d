"""Attacks on weightregions.centering: parity with float64, bounded memory, all or nothing,
nothing of the target."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from weightregions.bases import base_identity
from weightregions.centering import (
    Centroid,
    best_member,
    centroid,
    centroid_of,
    family_centroids,
    leave_out,
    medoid,
    model_card,
    save_centroid,
)
from weightregions.checkpoints import open_checkpoint
from weightregions.files import file_sha256
from weightregions.similarity import gram
from weightregions.zoo import open_zoo

SHAPES = {
    "embeddings.weight": (7, 5),
    "layer.0.attention.weight": (5, 5),
    "layer.0.dense.bias": (5,),
    "scale": (),
}


def models(n=3, seed=0, dtype=torch.float32, scale=0.01):
    rng = np.random.default_rng(seed)
    start = {k: rng.normal(size=s) for k, s in SHAPES.items()}
    return [
        open_checkpoint(
            {
                k: torch.from_numpy(np.asarray(v + scale * rng.normal(size=v.shape))).to(dtype)
                for k, v in start.items()
            },
            name=f"m{i}",
        )
        for i in range(n)
    ]


def tiny(num_labels=2, seed=0, moved=0):
    torch.manual_seed(seed)
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=20,
            num_labels=num_labels,
        )
    )
    torch.manual_seed(1000 + moved)
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-3 * torch.randn_like(p)
    return model.eval()


@pytest.fixture
def zoo(tmp_path):
    "A zoo as `build_zoo` leaves it, without the training: three datasets, two seeds."
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    identity = base_identity(tmp_path / "base")
    for i, (dataset, family) in enumerate(
        [("sst2", "sentiment"), ("mpqa", "sentiment"), ("trec", "topic")]
    ):
        for seed in (1, 2):
            folder = tmp_path / "zoo" / dataset / f"seed-{seed}"
            tiny(num_labels=2 + i, moved=10 * i + seed).save_pretrained(folder)
            about = {
                "dataset": dataset,
                "family": family,
                "seed": seed,
                "base": identity,
                "data": {"source": "folder data", "sha256": dataset * 3, "n_train": 10},
                "metrics": {
                    "accuracy": 0.5 + i / 10 + seed / 100,
                    "loss": 1.0,
                    "majority": 0.5,
                    "n_test": 10,
                },
                "weights": {"sha256": file_sha256(folder / "model.safetensors")},
            }
            (folder / "manifest.json").write_text(json.dumps(about))
    (tmp_path / "zoo" / "zoo.json").write_text(json.dumps({"base": identity}))
    return open_zoo(tmp_path / "zoo")


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 40),
    st.integers(1, 3),
    st.booleans(),
)
def test_parity_with_float64(n, seed, dtype, block, threads, weighted):
    found = models(n, seed, dtype)
    weights = np.random.default_rng(seed).uniform(size=n) if weighted else np.ones(n)
    state = Centroid("c", found, weights / weights.sum()).state(
        torch.float64, block=block, threads=threads
    )
    for name in SHAPES:
        exact = np.average([m[name].double().numpy() for m in found], axis=0, weights=weights)
        np.testing.assert_allclose(state[name].numpy(), exact, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            centroid(found, weights, block=block)[name],
            torch.from_numpy(np.asarray(exact)).float(),
            rtol=1e-6,
            atol=1e-8,
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(0, 100))
def test_copies_average_to_themselves_bit_for_bit(n, seed):
    one = models(1, seed)[0]
    state = centroid([open_checkpoint(one.state(), name=str(i)) for i in range(n)])
    assert all(torch.equal(state[k], one[k]) for k in SHAPES)


def test_order_and_threads_change_nothing():
    found = models(4)
    results = [centroid(found, block=b, threads=t) for b in (3, 2**18) for t in (1, 2, 7)]
    assert all(torch.equal(r[k], results[0][k]) for r in results for k in SHAPES)
    for k in SHAPES:
        torch.testing.assert_close(centroid(found[::-1])[k], results[0][k])


def test_one_weight_is_that_member_and_the_average_stays_in_the_hull():
    found = models(3)
    assert all(torch.equal(centroid(found, [0, 1, 0])[k], found[1][k]) for k in SHAPES)
    mean, parts = centroid(found), [m.state() for m in found]
    for k in SHAPES:
        stacked = torch.stack([p[k] for p in parts])
        assert (mean[k] >= stacked.amin(0)).all() and (mean[k] <= stacked.amax(0)).all()


def test_a_centroid_is_a_checkpoint_to_everything_else():
    found = models(3)
    base, mean = found.pop(), Centroid("mean", found, np.full(2, 0.5))
    g = gram([*found, mean], base, progress=False).products()
    np.testing.assert_allclose(
        g[2, :2], g[:2, :2].mean(0), rtol=1e-5
    )  # the gram reads it as float32
    assert (
        list(mean) == sorted(SHAPES)
        and "scale" in mean
        and len(mean) == 4
        and mean["scale"].shape == ()
    )


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda m: centroid([]), "at least two checkpoints, not 0"),
        (lambda m: centroid(m[:1]), "at least two checkpoints, not 1"),
        (lambda m: centroid([m[0], m[0]]), "two checkpoints are called 'm0'"),
        (lambda m: centroid(m, [1, 2]), "3 checkpoints take as many weights, not 2"),
        (lambda m: centroid(m, [1, -1, 1]), "the weight of 'm1'"),
        (lambda m: centroid(m, [1, 1, np.inf]), "the weight of 'm2'"),
        (lambda m: centroid(m, [0, 0, 0]), "all weights are 0"),
        (lambda m: centroid(m, {"m0": 1, "m1": 1, "m9": 1}), "'m2' is only in one of them"),
        (lambda m: centroid(m, block=0), "block must be at least 1"),
        (lambda m: centroid(m, dtype=torch.int64), "got torch.int64"),
        (lambda m: centroid([*m, models(1, seed=5)[0]]), "two checkpoints are called 'm0'"),
        (
            lambda m: centroid(
                [*m, open_checkpoint(models(1, seed=5)[0].state(), name="other")]
            ),
            "other and m0 come from different pretrained models",
        ),
        (
            lambda m: centroid(
                [
                    *m,
                    open_checkpoint(
                        {k: t for k, t in m[0].items() if k != "scale"}, name="short"
                    ),
                ]
            ),
            "short lacks scale",
        ),
    ],
)
def test_refused(bad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bad(models())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_and_nothing_is_left(tmp_path, value):
    found = [open_checkpoint(tiny(moved=i), name=f"m{i}") for i in range(3)]
    sick = found[1].state()
    sick["encoder.layer.0.output.dense.bias"][3] = value
    with pytest.raises(
        ValueError, match="sick: encoder.layer.0.output.dense.bias holds NaN or infinite"
    ):
        centroid(
            [found[0], open_checkpoint((found[0].config, sick), name="sick"), found[2]],
            out=tmp_path / "out",
        )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_survives(tmp_path):
    found = [open_checkpoint(tiny(moved=i), name=f"m{i}") for i in range(2)]
    folder = centroid(found, out=tmp_path / "mean")
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        centroid(found, out=folder)
    assert (folder / "mine.txt").exists()
    centroid(found, [1, 0], out=folder, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mean"]
    assert torch.equal(
        open_checkpoint(folder)["encoder.layer.0.output.dense.weight"],
        found[0]["encoder.layer.0.output.dense.weight"],
    )


def test_written_as_safetensors_and_transformers_read_it(tmp_path):
    found = [open_checkpoint(tiny(num_labels=5, moved=i), name=f"m{i}") for i in range(3)]
    state = centroid(found)
    for dtype in (torch.float32, torch.bfloat16):
        folder = centroid(found, out=tmp_path / str(dtype), dtype=dtype, block=37, threads=3)
        stored = load_file(folder / "model.safetensors")
        assert stored.keys() == state.keys()
        for k, t in stored.items():
            torch.testing.assert_close(
                t, state[k].to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=0
            )
    assert (tmp_path / "torch.float32" / "model.safetensors").read_bytes() == (
        centroid(found, out=tmp_path / "again") / "model.safetensors"
    ).read_bytes()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (
        config["architectures"] == ["RobertaModel"]
        and len(config["id2label"]) == 2
        and not config.get("_name_or_path")
    )
    model, info = AutoModel.from_pretrained(
        tmp_path / "again", add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again", num_labels=7)
    assert head.classifier.out_proj.out_features == 7 and torch.equal(
        head.roberta.embeddings.word_embeddings.weight,
        state["embeddings.word_embeddings.weight"],
    )


def test_a_pooler_that_was_left_out_is_written_as_the_base_has_it(tmp_path):
    sizes = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    found = []
    for i in range(2):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            model.bert.pooler.dense.weight += 1
            model.bert.encoder.layer[0].output.dense.weight += 0.01 * i
        found.append(open_checkpoint(model, name=f"m{i}"))
    base = AutoModel.from_pretrained(tmp_path / "base")
    centre = AutoModel.from_pretrained(
        centroid(found, out=tmp_path / "mean", like=tmp_path / "base")
    )
    assert torch.equal(centre.pooler.dense.weight, base.pooler.dense.weight)
    torch.testing.assert_close(
        centre.encoder.layer[0].output.dense.weight,
        base.encoder.layer[0].output.dense.weight + 0.005,
    )


MEMORY = """
import resource, sys, torch
from pathlib import Path
from weightregions.checkpoints import open_checkpoint
from weightregions.centering import centroid
k, folder = int(sys.argv[1]), Path(sys.argv[2])
found = [open_checkpoint(folder, name=str(i)) for i in range(k)]
centroid(found[:2], out=folder.parent / f"warm{k}", threads=2, block=1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
centroid(found, out=folder.parent / f"mean{k}", threads=2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_grows_neither_with_members_nor_with_weights(tmp_path):
    torch.manual_seed(0)
    RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=60_000,
            hidden_size=256,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
    ).save_pretrained(tmp_path / "m")
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "12", str(tmp_path / "m")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert size > 60e6 and int(done.stdout) < 0.5 * size, (
        f"{int(done.stdout):,} bytes for 12 members of {size:,}"
    )


# --- of a zoo ---------------------------------------------------------------------------------


def retold(zoo, model, **changes):
    "Change the manifest of a model."
    file = os.path.join(zoo.models.set_index("model").path[model], "manifest.json")
    with open(file) as f:
        about = json.load(f)
    for key, value in changes.items():
        about[key] |= value
    with open(file, "w") as f:
        json.dump(about, f)


def test_leave_out_by_name_and_by_hash(zoo):
    assert set(leave_out(zoo, "sst2").models.dataset) == {"mpqa", "trec"}
    for seed in (1, 2):
        retold(zoo, f"mpqa/seed-{seed}", data={"sha256": "sst2" * 3})
    with pytest.warns(UserWarning, match="mpqa: the same data as sst2 under another name"):
        assert set(leave_out(zoo, "sst2").models.dataset) == {"trec"}
    with pytest.raises(ValueError, match="sst2/seed-1 has seen sst2"):
        centroid_of(zoo.where(dataset=["mpqa", "sst2"]), target="sst2")


def test_the_last_dataset_cannot_be_left_out(zoo):
    with pytest.raises(ValueError, match="nothing is left without sst2"):
        leave_out(zoo.where(dataset="sst2"), "sst2")
    with pytest.raises(ValueError, match="no dataset 'imdb', only mpqa, sst2, trec"):
        leave_out(zoo, "imdb")


def test_a_centroid_that_saw_the_target_is_refused(zoo):
    for name in ("sst2", "SST-2"):  # the same letters are the same dataset
        with pytest.raises(ValueError, match="sst2/seed-1 has seen"):
            centroid_of(zoo, target=name)
    assert (
        "some of them have seen sst2"
        in centroid_of(zoo, target="sst2", saw_target=True).description
    )
    centre = centroid_of(leave_out(zoo, "sst2"), target="sst2")
    assert "none of them has seen sst2" in centre.description and set(
        centre.members.dataset
    ) == {"mpqa", "trec"}
    mean = centroid(leave_out(zoo, "sst2").checkpoints())
    assert all(torch.equal(mean[k], centre[k]) for k in mean)


def test_families_and_weights(zoo):
    found = family_centroids(zoo)
    assert {f: sorted(c.members.dataset.unique()) for f, c in found.items()} == {
        "sentiment": ["mpqa", "sst2"],
        "topic": ["trec"],
    }
    weighted = centroid_of(zoo, weights=dict.fromkeys(zoo.models.model, 1) | {"trec/seed-1": 0})
    assert weighted.members.set_index("model").weight[
        "trec/seed-1"
    ] == 0 and weighted.description.startswith("Weighted")
    with pytest.raises(
        ValueError, match="the centroid of sentiment takes at least two checkpoints, not 1"
    ):
        family_centroids(zoo.where(dataset=["mpqa", "trec"], seed=1))


def test_two_bases_are_refused(zoo):
    retold(zoo, "trec/seed-2", base={"sha256": "f" * 64})
    with pytest.raises(
        ValueError, match="mpqa/seed-1 and trec/seed-2 were fine-tuned from two bases"
    ):
        centroid_of(zoo)
    tiny(seed=5).save_pretrained(
        zoo.models.set_index("model").path["trec/seed-2"]
    )  # and without a manifest that tells, the weights do
    os.remove(os.path.join(zoo.models.set_index("model").path["trec/seed-2"], "manifest.json"))
    with pytest.raises(
        ValueError, match="trec/seed-2 and mpqa/seed-1 come from different pretrained models"
    ):
        centroid_of(zoo)


def test_a_damaged_manifest_is_named(zoo):
    with open(os.path.join(zoo.models.path[0], "manifest.json"), "w") as f:
        f.write("{")
    for bad in (lambda: centroid_of(zoo), lambda: leave_out(zoo, "sst2")):
        with pytest.raises(ValueError, match="mpqa/seed-1/manifest.json: not JSON"):
            bad()


def test_medoid_and_best_member(zoo):
    found, base = zoo.checkpoints(), open_checkpoint(tiny())
    distance = gram(found, base, progress=False).euclidean()
    assert (
        medoid(found, base)
        == distance.mean().idxmin()
        == medoid(gram(found, base, progress=False))
    )
    assert (
        best_member(zoo) == "trec/seed-2"
        and best_member(zoo, "accuracy", lowest=True) == "sst2/seed-1"
    )
    assert best_member(zoo, pd.Series(range(6), zoo.models.model[::-1])) == zoo.models.model[0]
    with pytest.raises(ValueError, match="no column 'f1'"):
        best_member(zoo, "f1")
    with pytest.raises(ValueError, match="mpqa/seed-1 has no score"):
        best_member(zoo, {"trec/seed-1": 1})
    with pytest.raises(ValueError, match="takes their base too"):
        medoid(found)


def test_the_card_renders_and_tells_no_paths(zoo, tmp_path):
    evaluation = pd.DataFrame({"target": ["sst2", "a|b"], "accuracy": [0.75, 0.5]})
    retold(zoo, "trec/seed-1", data={"source": "hub CogComp/trec/x@abc"})
    folder = save_centroid(
        centroid_of(leave_out(zoo, "sst2"), target="sst2"),
        tmp_path / "start",
        like=tmp_path / "base",
        evaluation=evaluation,
    )
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    about = yaml.safe_load(head)
    assert (
        about["library_name"] == "transformers"
        and about["datasets"] == ["CogComp/trec"]
        and "centroid" in about["tags"]
        and "base_model" not in about
    )
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert html.count("<table>") == 3 and "a|b" in html and html.count("<h2>") == 4
    for m in zoo.models[zoo.models.dataset != "sst2"].itertuples():
        assert file_sha256(os.path.join(m.path, "model.safetensors")) in text
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert str(tmp_path) not in file.read_text(), file.name
    assert not (
        save_centroid(centroid_of(zoo), tmp_path / "plain", like=tmp_path / "base", card=False)
        / "README.md"
    ).exists()


def test_hashes_are_computed_where_no_manifest_has_them(zoo, tmp_path):
    shutil.copytree(
        tmp_path / "zoo",
        tmp_path / "theirs",
        ignore=shutil.ignore_patterns("*.json.lock", "manifest.json", "zoo.json"),
    )
    (tmp_path / "theirs" / "models.csv").write_text(
        "model,dataset,family\nsst2/seed-1,sst2,sentiment\ntrec/seed-1,trec,topic\n"
    )
    theirs = open_zoo(tmp_path / "theirs")
    card = model_card(centroid_of(theirs))
    for m in theirs.models.itertuples():
        assert file_sha256(os.path.join(m.path, "model.safetensors")) in card
    with pytest.raises(ValueError, match="sst2/seed-1 has seen sst2"):
        centroid_of(theirs, target="sst2")
