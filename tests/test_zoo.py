"A zoo survives kills, damage and company."

import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from weightregions.bases import tiny_base
from weightregions.corpora import load_corpora
from weightregions.files import file_sha256
from weightregions.finetuning import Recipe, train
from weightregions.building import build_zoo, learned
from weightregions.zoo import gather, open_zoo

pytestmark = pytest.mark.xdist_group("zoo")  # one process makes what all of these tests look at

RECIPE = Recipe(steps=3, batch_size=8)
SEEDS = [1, 2]
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base", steps=2)


@pytest.fixture(scope="module")
def corpora():
    return load_corpora("builtin", names=["films", "headlines"], n_train=40, n_test=20)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, base, corpora):
    folder = tmp_path_factory.mktemp("unbroken") / "zoo"
    build_zoo(folder, base, corpora, RECIPE, SEEDS, workers=1)
    return folder


def contents(zoo):
    "SHA-256 of every file of a zoo but its log and what a kill left of zoo.json, by relative path; other hidden files are there to be seen too."
    return {
        str(f.relative_to(zoo)): file_sha256(f)
        for f in sorted(zoo.rglob("*"))
        if f.is_file()
        and f.name != "log.jsonl"
        and f.suffix != ".lock"
        and not f.name.startswith(".zoo.json-")
    }


def build(folder, base, corpora):
    torch.set_num_threads(1)
    build_zoo(folder, base, corpora, RECIPE, SEEDS, workers=1)


def test_killed_at_random_moments_a_zoo_resumes_to_the_same_bytes(
    tmp_path, base, corpora, unbroken
):
    chance, folder, kills = random.Random(0), tmp_path / "zoo", 0
    while kills < 20:
        child = fork.Process(target=build, args=(folder, base, corpora))
        child.start()
        child.join(chance.uniform(0.05, 1.5))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        for manifest in folder.glob(
            "*/seed-*/manifest.json"
        ):  # what is there is whole, at any moment
            name = str(manifest.parent.relative_to(folder) / "model.safetensors")
            assert file_sha256(folder / name) == contents(unbroken)[name]
        done = sorted(folder.glob("*/seed-*"))
        if len(done) == len(corpora) * len(SEEDS):
            shutil.rmtree(chance.choice(done))
    build(folder, base, corpora)
    assert contents(folder) == contents(unbroken)


def test_two_builders_at_once_do_no_damage(tmp_path, base, corpora, unbroken):
    folder = tmp_path / "zoo"
    builders = [fork.Process(target=build, args=(folder, base, corpora)) for _ in range(2)]
    for b in builders:
        b.start()
    for b in builders:
        b.join()
    assert [b.exitcode for b in builders] == [0, 0]
    assert contents(folder) == contents(unbroken)
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(corpora) * len(
        SEEDS
    )  # no model was trained twice


def test_processes_give_the_bytes_of_one(tmp_path, base, corpora, unbroken):
    build_zoo(tmp_path / "zoo", base, corpora, RECIPE, SEEDS, workers=2)
    assert contents(tmp_path / "zoo") == contents(unbroken)


def test_a_zoo_grows_without_touching_what_is_there(tmp_path, base, corpora, unbroken):
    build_zoo(tmp_path / "zoo", base, dict(list(corpora.items())[:1]), RECIPE, [2], workers=1)
    first = {f: f.stat().st_mtime_ns for f in (tmp_path / "zoo").rglob("*.safetensors")}
    build(tmp_path / "zoo", base, corpora)
    assert contents(tmp_path / "zoo") == contents(unbroken)
    assert all(f.stat().st_mtime_ns == then for f, then in first.items())


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"steps": 4}, "steps is 3 there and 4 here"),
        ({"learning_rate": 1e-3}, "learning_rate is 0.0002 there and 0.001 here"),
        ({"trains": "bitfit"}, "trains is 'all' there and 'bitfit' here"),
    ],
)
def test_another_recipe_is_refused(base, corpora, unbroken, change, problem):
    from dataclasses import replace

    before = contents(unbroken)
    with pytest.raises(ValueError, match=problem):
        build_zoo(unbroken, base, corpora, replace(RECIPE, **change), SEEDS, workers=1)
    assert contents(unbroken) == before


def test_another_base_is_refused(tmp_path, corpora, unbroken):
    other = tiny_base(tmp_path / "other", seed=1, steps=1)
    with pytest.raises(ValueError, match="a zoo of another base: sha256"):
        build_zoo(unbroken, other, corpora, RECIPE, SEEDS, workers=1)


def test_models_of_others_open_as_ours_do(tmp_path, unbroken):
    ours = open_zoo(unbroken)
    listed = ours.models.assign(
        model=[str(Path(p).relative_to(unbroken)) for p in ours.models.path]
    )[["model", "dataset", "family"]]
    shutil.copytree(
        unbroken,
        tmp_path / "theirs",
        ignore=shutil.ignore_patterns("zoo.json", "manifest.json"),
    )
    listed.to_csv(tmp_path / "theirs" / "models.csv", index=False)
    theirs = open_zoo(tmp_path / "theirs")
    assert [c.sha256() for c in theirs.checkpoints()] == [
        c.sha256() for c in ours.checkpoints()
    ]
    assert theirs.models.seed.tolist() == ours.models.seed.tolist()


def test_folders_without_a_table_open_too(tmp_path, base, unbroken, monkeypatch):
    shutil.copytree(
        unbroken,
        tmp_path / "runs",
        ignore=shutil.ignore_patterns("zoo.json", "manifest.json", ".*"),
    )
    (
        tmp_path / "runs" / "films" / "seed-1" / "checkpoint-2"
    ).mkdir()  # what lies in a checkpoint is not looked at
    shutil.copy(
        unbroken / "films" / "seed-1" / "config.json", tmp_path / "runs" / "films"
    )  # a configuration alone is no checkpoint
    shutil.copytree(base, tmp_path / "runs" / "alone")
    zoo, ours = open_zoo(tmp_path / "runs"), open_zoo(unbroken)
    assert zoo.models.model.tolist() == [
        "alone",
        *ours.models.model,
    ] and zoo.models.dataset.tolist() == ["alone", *ours.models.dataset]
    assert set(zoo.models.family) == {"unknown"} and zoo.models.seed.tolist() == [
        1,
        *ours.models.seed,
    ]
    assert [c.sha256() for c in zoo.checkpoints()[1:]] == [
        c.sha256() for c in ours.checkpoints()
    ]
    monkeypatch.chdir(tmp_path / "runs" / "films")
    assert gather(
        ["seed-2", "../films/seed-1", "../headlines/seed-1"]
    ).models.model.tolist() == ["films/seed-2", "films/seed-1", "headlines/seed-1"]
    assert (
        gather(".").models.model.tolist() == ["seed-1", "seed-2"]
        and gather(".").name == "films"
    )
    with pytest.raises(ValueError, match="films/seed-1: is given twice"):
        gather(["seed-1", "../films/seed-1", "../headlines/seed-1"])


def test_what_cannot_be_gathered_is_named(tmp_path, unbroken):
    shutil.copytree(
        unbroken, tmp_path / "runs", ignore=shutil.ignore_patterns("zoo.json", ".*")
    )
    film = tmp_path / "runs" / "films" / "seed-2"
    whole = (film / "manifest.json").read_text()
    (film / "manifest.json").write_text(whole[:40])
    with pytest.raises(ValueError, match="seed-2/manifest.json: not JSON"):
        gather(tmp_path / "runs")
    (film / "manifest.json").write_text("[]")  # of another tool
    assert gather(tmp_path / "runs").models.family.tolist() == [
        "sentiment",
        "unknown",
        "topic",
        "topic",
    ]
    (film / "config.json").write_text('{"model_type": "of my own"}')
    with pytest.raises(ValueError, match="seed-2/config.json: model_type 'of my own'"):
        gather(tmp_path / "runs")
    shutil.rmtree(film), shutil.rmtree(tmp_path / "runs" / "headlines")
    with pytest.raises(ValueError, match="seed-1: is the only checkpoint"):
        gather(tmp_path / "runs")
    shutil.rmtree(film.parent)
    with pytest.raises(FileNotFoundError, match="runs: no checkpoint"):
        gather(tmp_path / "runs")
    (tmp_path / "damaged" / "films" / "seed-1").mkdir(parents=True)
    for file in ("zoo.json", "films/seed-1/manifest.json"):
        (tmp_path / "damaged" / file).write_text("{}")
    with pytest.raises(ValueError, match="not the manifest of a model"):
        open_zoo(tmp_path / "damaged")


def test_a_flipped_weight_changes_the_hash(tmp_path, unbroken):
    shutil.copytree(unbroken, tmp_path / "zoo")
    model = open_zoo(tmp_path / "zoo").models.path[0]
    clean = open_zoo(tmp_path / "zoo").checkpoints()[0].sha256()
    weights = Path(model) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert open_zoo(tmp_path / "zoo").checkpoints()[0].sha256() != clean


def test_learned_needs_more_than_the_majority():
    import pandas as pd

    row = dict(dataset="coin", family="f", seed=1, majority=0.5, n_test=1000)
    assert not learned(pd.DataFrame([row | {"accuracy": 0.51}])).learned[0]
    assert learned(pd.DataFrame([row | {"accuracy": 0.54}])).learned[0]


def test_bases_come_from_the_hub_at_one_revision(tmp_path, monkeypatch):
    from weightregions.bases import REVISIONS, base_identity, pinned

    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision))
        (folder := tmp_path / "snapshots" / revision).mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    folder = pinned("FacebookAI/roberta-base")
    assert asked == [("FacebookAI/roberta-base", REVISIONS["FacebookAI/roberta-base"])]
    assert base_identity(folder)["name"] == "FacebookAI/roberta-base"

    def gone(*a, **k):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", gone)
    with pytest.raises(
        FileNotFoundError,
        match="FacebookAI/roberta-base: neither in the hub's cache nor to be downloaded",
    ):
        pinned("FacebookAI/roberta-base")


def test_other_data_of_the_same_name_are_refused(base, corpora, unbroken):
    before, others = (
        contents(unbroken),
        load_corpora("builtin", names=["films", "headlines"], n_train=41, n_test=20),
    )
    with pytest.raises(
        ValueError, match="films/seed-1 was fine-tuned on other data called films"
    ):
        build_zoo(unbroken, base, others, RECIPE, [*SEEDS, 3], workers=1)
    assert contents(unbroken) == before


def test_a_classifier_of_other_classes_is_a_base_like_any_other(tmp_path, corpora, unbroken):
    "Its head does not fit, and gives way to a fresh one; a body that does not fit its configuration is refused."
    start = unbroken / "films" / "seed-1"
    zoo = open_zoo(
        build_zoo(
            tmp_path / "zoo",
            start,
            {"headlines": corpora["headlines"]},
            RECIPE,
            [1, 2],
            workers=1,
        )
    )
    assert [c.config.num_labels for c in zoo.checkpoints()] == [
        len(corpora["headlines"].labels)
    ] * 2 and len(corpora["films"].labels) == 2
    torn = shutil.copytree(start, tmp_path / "torn")
    config = json.loads((torn / "config.json").read_text())
    (torn / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))
    with pytest.raises(
        ValueError,
        match="has no roberta.encoder.layer.0.intermediate.dense.bias that fits its configuration",
    ):
        train(torn, corpora["films"], RECIPE, 1)
