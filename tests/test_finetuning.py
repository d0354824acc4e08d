"""A fine-tuning ends when its recipe says: after so many steps or epochs, or early, the same
for every process that shares it."""

import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from weightregions import finetuning
from weightregions.bases import tiny_base
from weightregions.corpora import Corpus
from weightregions.finetuning import Recipe, train
from weightregions.registry import dev_rows
from weightregions.building import build_zoo, settle
from weightregions.zoo import open_zoo

EASY = Recipe(steps=400, batch_size=4, learning_rate=2e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base", steps=2)


def moods(n=100, told=True):
    "A dataset that one word gives away, or that nothing does."
    rows = pd.DataFrame(
        {
            "text": [
                ("good " if told and i % 2 else "bad ") * (1 + i % 3) + str(i) for i in range(n)
            ],
            "label": [i % 2 for i in range(n)],
        }
    )
    return Corpus(
        "moods",
        "sentiment",
        ("bad", "good"),
        rows,
        rows.assign(text=rows.text + " indeed")[:20],
    )


def same(a, b):
    return all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


@pytest.mark.parametrize("told", [True, False])
def test_it_stops_when_nothing_is_gained(base, told):
    "The first look is at step 50; what is learned by then, or never, ends one patience later."
    model, _, metrics = train(
        base,
        moods(told=told),
        replace(
            EASY,
            learning_rate=2e-3 if told else 1e-9,
            head_rate=5e-3 if told else 1e-9,
            patience=400,
        ),
        1,
    )
    assert metrics["steps"] == 50 + 100 and metrics["n_test"] == 20
    if told:
        assert metrics["accuracy"] == 1


def test_the_same_seed_stops_at_the_same_weights(base):
    a, b = (train(base, moods(), replace(EASY, patience=200), 3)[0] for _ in range(2))
    assert same(a, b)


def test_neither_test_rows_nor_too_many_are_looked_at(base, monkeypatch):
    corpus, seen = moods(), []
    made = finetuning.Tokenized
    monkeypatch.setattr(
        finetuning,
        "Tokenized",
        lambda rows, *rest: seen.append(rows.text.tolist()) or made(rows, *rest),
    )
    train(base, corpus, replace(EASY, patience=200), 1)
    trained, held, tested = map(set, seen)
    at = dev_rows(100)
    assert (
        held == set(corpus.train.text[at])
        and trained == set(corpus.train.text) - held
        and tested == set(corpus.test.text)
    )
    seen.clear()
    train(
        base, corpus, replace(EASY, steps=100, patience=200), 1
    )  # its end comes before it could be stopped
    assert set(seen[0]) == set(corpus.train.text) and len(seen) == 2


@pytest.mark.parametrize(
    "epochs, rows, steps", [(1, 100, 25), (3, 100, 75), (0.5, 100, 13), (2, 10, 6), (1, 1, 1)]
)
def test_epochs_count_batches(epochs, rows, steps):
    assert replace(EASY, epochs=epochs).steps_on(rows) == steps


def test_epochs_pass_over_what_is_there(base):
    assert train(base, moods(), replace(EASY, epochs=2), 1)[2]["steps"] == 50
    assert train(base, moods(), replace(EASY, epochs=2, rows=40), 1)[2]["steps"] == 20
    one, other = (
        train(base, moods(), replace(EASY, epochs=0.2), 1),
        train(base, moods(), replace(EASY, steps=5), 1),
    )
    assert same(one[0], other[0]) and "steps" not in other[2]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"epochs": 0}, "epochs must be a positive number"),
        ({"epochs": float("nan")}, "epochs must be"),
        ({"epochs": float("inf")}, "epochs must be"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"rows": 0}, "rows must be at least 1"),
    ],
)
def test_recipes_that_cannot_be(change, problem):
    with pytest.raises(ValueError, match=problem):
        Recipe(**change)


def test_zoos_of_before_are_taken_and_others_refused(tmp_path):
    identity = {"name": "b", "sha256": "0" * 64}
    settle(tmp_path, identity, EASY)
    written = (tmp_path / "zoo.json").read_text()
    assert "epochs" not in written and "patience" not in written
    settle(tmp_path, identity, EASY)
    with pytest.raises(
        ValueError, match="a zoo of another recipe: patience is None there and 800 here"
    ):
        settle(tmp_path, identity, replace(EASY, patience=800))
    (tmp_path / "zoo.json").write_text(written.replace('"rows"', '"epochs": null, "rows"'))
    settle(tmp_path, identity, EASY)
    (tmp_path / "longer").mkdir()
    settle(tmp_path / "longer", identity, replace(EASY, epochs=2))
    settle(
        tmp_path / "longer", identity, replace(EASY, epochs=2, steps=7)
    )  # steps are of no matter there
    with pytest.raises(ValueError, match="epochs is 2 there and None here"):
        settle(tmp_path / "longer", identity, EASY)


def test_a_zoo_of_epochs_and_patience_is_resumed(tmp_path, base):
    from weightregions.files import file_sha256

    recipe = replace(EASY, epochs=4, patience=100)
    zoo = open_zoo(
        build_zoo(tmp_path / "zoo", base, {"moods": moods()}, recipe, [1, 2], workers=1)
    )
    weights = tmp_path / "zoo" / "moods" / "seed-2" / "model.safetensors"
    before, told = file_sha256(weights), (weights.parent / "manifest.json").read_bytes()
    assert b'"steps": 100' in told or b'"steps": 90' in told
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    build_zoo(tmp_path / "zoo", base, {"moods": moods()}, recipe, [1, 2], workers=1)
    assert (
        file_sha256(weights) == before
        and (weights.parent / "manifest.json").read_bytes() == told
        and len(zoo) == 2
    )


TOGETHER = """
import sys; sys.path.insert(0, {tests!r})
from test_finetuning import EASY, moods, replace, train
from weightregions.jobs import ranks
recipe = replace(EASY, patience=200, dtype="float32")
steps = train({base!r}, moods(), recipe, 1, "cpu")[2]["steps"]
open({out!r} + str(ranks()[0]), "w").write(str(steps))
"""


def test_processes_that_share_a_fine_tuning_stop_together(tmp_path, base, request):
    (tmp_path / "together.py").write_text(
        TOGETHER.format(
            tests=str(request.path.parent), out=str(tmp_path / "steps-"), base=str(base)
        )
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(tmp_path / "together.py"),
        ],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in (0, 1)] == ["100", "100"]


@pytest.mark.parametrize(
    ("amx", "instructions", "processor", "fast"),
    [
        (True, True, "GenuineIntel", True),
        (False, True, "AuthenticAMD", True),
        (False, True, "GenuineIntel", False),
        (False, False, "AuthenticAMD", False),
    ],
)
def test_bfloat16_is_taken_where_it_is_faster(monkeypatch, amx, instructions, processor, fast):
    "Intel's instructions without AMX are slower than float32, and AMD's are faster."
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(finetuning, "_is_amd", lambda: processor == "AuthenticAMD")
    assert finetuning.fast_bfloat16() is fast


def test_a_processor_is_known_by_the_file_that_describes_it(tmp_path):
    file = tmp_path / "cpuinfo"
    assert finetuning._is_amd(file) is False
    file.write_text("vendor_id\t: GenuineIntel\n")
    assert finetuning._is_amd(file) is False
    file.write_text("vendor_id\t: AuthenticAMD\n")
    assert finetuning._is_amd(file) is True
