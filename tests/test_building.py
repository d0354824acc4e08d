"A zoo survives kills, damage and company."

import json
import multiprocessing
import os
import random
import shutil
import signal

import pytest
import torch

from weightregions.bases import tiny_base
from weightregions.corpora import load_corpora
from weightregions.files import file_sha256
from weightregions.finetuning import Recipe, train
from weightregions.building import build_zoo, learned
from weightregions.zoo import open_zoo

pytestmark = pytest.mark.xdist_group(
    "building"
)  # one process makes what all of these tests look at

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
    """SHA-256 of every file of a zoo but its log and what a kill left of zoo.json, by relative
    path; other hidden files are there to be seen too."""
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
        (folder / "config.json").write_text("{}")
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
    """Its head does not fit, and gives way to a fresh one; a body that does not fit its
    configuration is refused."""
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
        match="encoder.layer.0.intermediate.dense.bias has shape",
    ):
        train(torn, corpora["films"], RECIPE, 1)
