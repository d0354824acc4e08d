"""The commands: each once, as a process of its own; what they refuse, and what an interrupt
leaves."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from weightregions.advice import advised
from weightregions.bases import tiny_base
from weightregions.centering import centroid, leave_out
from weightregions.checkpoints import open_checkpoint
from weightregions.cli import main
from weightregions.corpora import load_corpora
from weightregions.files import file_sha256
from weightregions.finetuning import Recipe
from weightregions.region import locate, regions_of
from weightregions.similarity import cosine_similarity
from weightregions.zoo import open_zoo

pytestmark = pytest.mark.xdist_group("cli")
PROGRAM = Path(sys.executable).with_name("weightregions")
fork = multiprocessing.get_context("fork")
RECIPE = "--steps 3 --batch-size 8 --workers 1"


def _child(words, folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    with (
        open("out.txt", "w") as out,
        open("err.txt", "w") as err,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = main(words)
    os._exit(code)


def cli(line, folder):
    """Exit code, standard output and standard error of a command, run in a folder by a fork of
    this process."""
    child = fork.Process(target=_child, args=(line.split(), folder))
    child.start()
    child.join()
    return child.exitcode, (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


def well(line, folder):
    "What a command says that must end well."
    code, out, err = cli(line, folder)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with two bases, texts, a zoo, and copies of its models of which nothing is told."
    here = tmp_path_factory.mktemp("cli")
    tiny_base(here / "base", steps=2), tiny_base(here / "other", seed=1, steps=1)
    for name, c in load_corpora(
        "builtin", ["films", "headlines", "meals"], n_train=60, n_test=40
    ).items():
        (here / "texts" / name).mkdir(parents=True)
        for split in ("train", "test"):
            getattr(c, split).to_csv(here / "texts" / name / f"{split}.csv", index=False)
    (here / "texts" / "families.csv").write_text(
        "name,family\nfilms,sentiment\nmeals,sentiment\nheadlines,topic\n"
    )
    out = well(f"zoo base --data texts --datasets films,headlines {RECIPE}", here)
    assert "films/seed-3" in out and "learned" in out
    for i, path in enumerate(open_zoo(here / "zoo").models.path):
        shutil.copytree(
            path, here / "heap" / f"run-{i}", ignore=shutil.ignore_patterns("manifest.json")
        )
    return here


def test_help_needs_nothing_heavy():
    code = (
        "import sys, weightregions.cli as c; c.parser().format_help(); assert not {'torch',"
        " 'pandas', 'numpy', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [PROGRAM, "traverse", "--help"], capture_output=True, text=True, check=True
    )
    assert "--beyond" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "name",
    ["zoo", "similarity", "traverse", "center", "locate", "recommend", "finetune", "study"],
)
def test_every_option_is_explained(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "None" not in text


def test_as_a_program(here):
    done = subprocess.run(
        [PROGRAM, "similarity", "zoo", "--base", "base", "--out", "program"],
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "Scores of 6 models in 2 clusters" in done.stdout
        and "written: program/similarity.csv" in done.stderr
        and "Warning" not in done.stderr
    )
    zoo = open_zoo(here / "zoo")
    ours, theirs = (
        pd.read_csv(here / "program" / "similarity.csv", index_col="model"),
        cosine_similarity(zoo.checkpoints(), open_checkpoint(here / "base"), progress=False),
    )
    pd.testing.assert_frame_equal(ours, theirs, check_names=False, rtol=1e-12)
    groups = pd.read_csv(here / "program" / "groups.csv")
    assert groups.model.tolist() == zoo.models.model.tolist() and set(groups.found) <= {
        "films",
        "headlines",
    }
    assert {"scores.csv", "similarity.png", "map.png"} <= {
        f.name for f in (here / "program").iterdir()
    }


@pytest.mark.parametrize("how, error", [("", 1e-9), (" --sketch 1024", 0.15)])
def test_a_zoo_that_grows_is_measured_where_it_grew(here, how, error):
    exact = "similarity heap --base base --out exact"
    well(exact, here)
    few = "similarity heap/run-0 heap/run-1 heap/run-2 --base base --keep kept.npz --out few"
    (here / "kept.npz").unlink(missing_ok=True)
    well(few + how, here)
    well(f"similarity heap --base base --keep kept.npz --out grown{how}", here)
    one, other = (
        pd.read_csv(here / out / "similarity.csv", index_col=0) for out in ("exact", "grown")
    )
    assert one.index.tolist() == other.index.tolist()
    assert (one - other).abs().max(axis=None) < error


def test_models_of_which_nothing_is_told(here):
    out = well("similarity heap --base base --out untold", here)
    groups = pd.read_csv(here / "untold" / "groups.csv")
    assert (
        groups.model.tolist() == [f"run-{i}" for i in range(6)]
        and 1 < groups.cluster.nunique() < 6
        and "Scores" not in out
    )
    assert (
        not (here / "untold" / "scores.csv").exists()
        and (here / "untold" / "map.png").is_file()
    )
    well("similarity heap --base base --out three --clusters 3", here)
    assert pd.read_csv(here / "three" / "groups.csv").cluster.nunique() == 3
    same = pd.read_csv(here / "three" / "similarity.csv", index_col=0).to_numpy()
    well("similarity heap/run-4 heap/run-1 --base base --out two", here)
    np.testing.assert_allclose(
        pd.read_csv(here / "two" / "similarity.csv", index_col=0),
        same[np.ix_([4, 1], [4, 1])],
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    "words, kind, n",
    [
        ("zoo/films/seed-1 zoo/films/seed-2 --points 3", "line", 3),
        ("zoo/films/seed-1 zoo/films/seed-2 --points 2 --beyond 4", "beyond", 15),
        ("heap/run-0 heap/run-1 heap/run-3 --points 2", "plane", 4),
        ("zoo --hull 2", "hull", 8),
    ],
)
def test_traverse(here, words, kind, n):
    line = f"traverse {words} --base base --data texts --target meals --rows 40 --out walk"
    (page := here / "walk" / "explore.html").unlink(missing_ok=True)
    assert "pretrained model on meals (folder texts): loss " in well(line, here)
    rows, kept = (
        pd.read_csv(here / "walk" / f"{kind}.csv"),
        (here / "walk" / f"{kind}.jsonl").read_bytes(),
    )
    assert (
        len(rows) == n
        and np.isfinite(rows.loss).all()
        and (here / "walk" / f"{kind}.png").is_file()
    )
    assert page.is_file() == (kind != "hull")
    if kind != "line":
        return
    (here / "walk" / f"{kind}.jsonl").write_bytes(
        kept[:-20]
    )  # the last point is torn, as by a kill
    well(line, here)
    assert (here / "walk" / f"{kind}.jsonl").read_bytes() == kept
    pd.testing.assert_frame_equal(pd.read_csv(here / "walk" / f"{kind}.csv"), rows)


def test_center(here):
    well("center zoo --base base --without films --out centre", here)
    zoo = open_zoo(here / "zoo")
    rest = leave_out(zoo, "films").checkpoints()
    for name, tensor in centroid(rest).items():
        torch.testing.assert_close(
            open_checkpoint(here / "centre")[name], tensor, rtol=0, atol=0
        )
    assert (
        "# Centroid" in (here / "centre" / "README.md").read_text()
        and len(pd.read_csv(here / "centre" / "members.csv")) == 3
    )
    well(
        (
            "center zoo --base base --for texts:meals --weights accuracy --dtype bfloat16 --out"
            " weighted"
        ),
        here,
    )
    assert {t.dtype for _, t in open_checkpoint(here / "weighted").tensors()} == {
        torch.bfloat16
    }
    weight = pd.read_csv(here / "weighted" / "members.csv").weight
    np.testing.assert_allclose(weight, zoo.models.accuracy / zoo.models.accuracy.sum())
    assert "some of them have seen films" in well(
        "center zoo --base base --for texts:films --saw-target --family sentiment --out seen",
        here,
    )


def test_locate(here):
    well("locate heap/run-0 --zoo zoo --base base --out place.csv", here)
    theirs = locate(here / "heap" / "run-0", regions_of(open_zoo(here / "zoo"), here / "base"))
    written = pd.read_csv(here / "place.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(written, theirs, check_dtype=False)
    code, _, err = cli("locate zoo/films/seed-1 --zoo zoo --base base --out own.csv", here)
    assert code == 0 and "zoo/films/seed-1 is a model of zoo, and left out of its region" in err
    assert (
        pd.read_csv(here / "own.csv").set_index("region").cosine["films"]
        < theirs.set_index("region").cosine["films"]
    )


def test_recommend(here):
    out = well(
        "recommend zoo --base base --data texts --target meals --rows 40 --write best", here
    )
    rows = pd.read_csv(here / "recommend.csv")
    assert {"pretrained", "centroid"} <= set(rows.start) and rows.loss.is_monotonic_increasing
    name = advised(rows)
    assert (
        f"{name} (best)" in out if "centroid" in name else f"advice: start from {name}" in out
    )
    assert (here / "best").exists() == ("centroid" in name)
    if "centroid" in name:
        open_checkpoint(here / "best")


def test_models_that_saw_the_targets_sentences_are_left_out(here):
    "As in the contest: a dataset of other name with the target's sentences is in no start."
    for name in ("headlines", "films"):
        shutil.copytree(here / "texts" / name, here / "shared" / name)
    (here / "shared" / "reviews").mkdir()
    for split in ("train", "test"):
        films, meals = (
            pd.read_csv(here / "texts" / n / f"{split}.csv") for n in ("films", "meals")
        )
        rows = pd.concat([films.iloc[:5], meals.assign(label=films.label.iloc[: len(meals)])])
        rows.to_csv(here / "shared" / "reviews" / f"{split}.csv", index=False)
    line = "zoo --base base --data shared --target reviews --rows 40 --out apart.csv"
    code, _, err = cli(f"recommend {line}", here)
    assert code == 0 and "films: left out, more than 1 % of the sentences" in err
    assert not pd.read_csv(here / "apart.csv").start.str.contains("films").any()
    code, _, err = cli("center zoo --base base --for shared:reviews --out apart", here)
    assert code == 0 and "films: left out" in err
    assert set(pd.read_csv(here / "apart" / "members.csv").dataset) == {"headlines"}
    shutil.rmtree(here / "shared" / "headlines")
    code, _, err = cli("center zoo --base base --for shared:reviews --out apart2", here)
    assert code == 0 and "headlines: not in shared, and not checked" in err
    line = "center zoo --base base --for shared:reviews --saw-target --out apart3"
    code, _, err = cli(line, here)
    assert code == 0 and "left out" not in err


def test_the_whole_recipe_can_be_given(here):
    well(
        "zoo base --data texts --datasets films --seeds 1 --out told --workers 1 --epochs 2 --patience 256000 --batch-size 8 --learning-rate 5e-5 --head-rate 5e-5 "
        "--weight-decay 0.01 --warmup 0.06 --max-length 30 --head random",
        here,
    )
    assert (
        json.loads((here / "told" / "zoo.json").read_text())["recipe"]
        == Recipe(
            epochs=2,
            patience=256_000,
            batch_size=8,
            learning_rate=5e-5,
            head_rate=5e-5,
            weight_decay=0.01,
            warmup=0.06,
            max_length=30,
            head="random",
        ).as_dict()
    )
    assert (
        json.loads((here / "told" / "films" / "seed-1" / "manifest.json").read_text())[
            "metrics"
        ]["steps"]
        == 16
    )


def test_roberta_stands_beside_what_was_published(here):
    assert "published" not in pd.read_csv(here / "zoo" / "learned.csv")
    shutil.copytree(here / "base", here / "roberta-base")
    (
        shutil.copytree(here / "texts" / "films", here / "more" / "rte"),
        shutil.copytree(here / "texts" / "meals", here / "more" / "meals"),
    )
    well(f"zoo roberta-base --data more --seeds 1 --out reference {RECIPE}", here)
    table = pd.read_csv(here / "reference" / "learned.csv").set_index("dataset")
    assert table.published["rte"] == pytest.approx(0.724) and pd.isna(table.published["meals"])


def test_a_dry_run_tells_the_plan_and_makes_nothing(here):
    out = well("study --scale paper --out planned --dry-run", here)
    assert (
        "35 datasets (hub) x 5 seeds" in out
        and "10 epochs" in out
        and "hours of one H100" in out
        and not (here / "planned").exists()
    )
    assert out == well(
        "study --scale paper --data hub --dry-run", here
    ) and "(builtin)" in well("study --dry-run", here)
    assert (
        "measured: " in well("study --scale tiny --measure --out planned", here)
        and not (here / "planned").exists()
    )
    assert cli("study --dry-run --device abacus", here)[0] == 2
    assert "give one of them" in cli("study --measure --device H100", here)[2]


COMMANDS = {  # each command that takes a zoo: its line, and the tables that it writes
    "similarity": ("similarity {zoo} --base {base} --out o", "o/left_out.csv"),
    "traverse": (
        "traverse {zoo} --base {base} --data texts --target meals --rows 40 --hull 1 --out o",
        "o/left_out.csv",
    ),
    "center": ("center {zoo} --base {base} --out o", "o/left_out.csv"),
    "locate": ("locate heap/run-0 --zoo {zoo} --base {base} --out l.csv", "l-left_out.csv"),
    "recommend": (
        "recommend {zoo} --base {base} --data texts --target meals --rows 40 --out r.csv",
        "r-left_out.csv",
    ),
}


@pytest.fixture
def mixed(here):
    "The models of the zoo beside their base, an adapter, and an early step of a run."
    folder = shutil.copytree(
        here / "zoo", here / "mixed", ignore=shutil.ignore_patterns("*.json", "*.csv")
    )
    for file in (here / "zoo").glob("*/*/*.json"):
        shutil.copy(file, folder / file.relative_to(here / "zoo"))
    shutil.copytree(here / "base", folder / "pretrained-copy")
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text("{}")
    for n in (20, 100):
        shutil.copytree(here / "heap" / "run-1", folder / "headlines" / f"checkpoint-{n}")
    yield folder
    shutil.rmtree(folder), forget(here)


def forget(here):
    for name in ("o", "l.csv", "r.csv", "l-left_out.csv", "r-left_out.csv"):
        shutil.rmtree(here / name) if (here / name).is_dir() else (here / name).unlink(True)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_left_out_is_said_and_written(here, mixed, command):
    line, table = COMMANDS[command]
    code, out, err = cli(line.format(zoo="mixed", base="base"), here)
    assert code == 0, err
    for name, reason in [
        ("lora", "an adapter"),
        ("pretrained-copy", "the base"),
        ("headlines/checkpoint-20", "--all-checkpoints"),
    ]:
        said = [text for text in err.splitlines() if f"left out: {name}: " in text]
        assert len(said) == 1 and reason in said[0], err
    rows = pd.read_csv(here / table).set_index("folder")
    assert set(rows.index) == {"lora", "pretrained-copy", "headlines/checkpoint-20"}
    assert "pretrained-copy" not in out
    if command == "center":
        members = pd.read_csv(here / "o" / "members.csv").model.tolist()
        assert len(members) == 7 and "pretrained-copy" not in members
        assert "| pretrained-copy |" not in (here / "o" / "README.md").read_text()
    forget(here)
    if command == "similarity":
        well(line.format(zoo="mixed", base="base") + " --all-checkpoints", here)
        assert len(pd.read_csv(here / "o" / "groups.csv")) == 8
        well(line.format(zoo="zoo", base="base"), here)
        assert not (here / table).exists()  # of the run before
        forget(here)


def test_a_zoo_is_held_against_its_base_and_its_manifests(here, tried):
    noisy = shutil.copytree(here / "base", here / "noisy")
    state = load_file(noisy / "model.safetensors")
    for name, t in state.items():
        state[name] = t + 0.3 * torch.nan_to_num(t.std(), 0) * torch.randn_like(t)
    save_file(state, noisy / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(here / "zoo", here / "torn-zoo")
    weights = here / "torn-zoo" / "headlines" / "seed-2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for zoo, base, problem in [
        ("zoo", "noisy", "noisy: is not the base of zoo: the SHA-256 of its weights is not"),
        ("torn-zoo", "base", "headlines/seed-2: the weights in"),
    ]:
        for line, _ in COMMANDS.values():
            code, out, err = cli(line.format(zoo=zoo, base=base), here)
            assert (code, out) == (2, "") and problem in err.splitlines()[-1], err
    assert not any((here / name).exists() for name in ("o", "l.csv", "r.csv"))
    shutil.rmtree(noisy), shutil.rmtree(here / "torn-zoo")
    tried("another base, a model that was replaced", "commands", 2 * len(COMMANDS), "refused")


@pytest.mark.parametrize(
    "line, problem",
    [
        ("similarity no/such/folder --base base", "no/such/folder: there is no such folder"),
        ("similarity nowhere --base base", "nowhere: there is no such folder"),
        ("center base ./nowhere --base base --out o", "./nowhere: there is no such folder"),
        ("center base nowhere --base base --out o", "nowhere: no such folder, and not in the"),
        ("locate ./nowhere --zoo zoo --base base", "./nowhere: there is no such folder"),
        ("locate base --zoo zoo --base no/where/there", "no/where/there: there is no such"),
        ("traverse base base --base base --data gone --target x", "source 'gone' is neither"),
        ("recommend zoo --base base --data gone --target x", "source 'gone' is neither"),
        ("center zoo --base base --for gone:x --out o", "source 'gone' is neither"),
        ("center zoo --base base --out texts", "texts: exists already"),
        ("zoo /no/base --data builtin", "/no/base: there is no such folder"),
        ("finetune --start ./no --data builtin --target x", "./no: there is no such folder"),
        ("finetune --start base --data no/where", "and no dataset in the hub's cache"),
        ("study --data gone", "source 'gone' is neither"),
    ],
)
def test_a_mistyped_folder_is_noticed_before_torch_is_imported(here, line, problem):
    code = (
        "import sys; from weightregions.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'pandas', 'numpy', 'transformers'} & sys.modules.keys();"
        "sys.exit(code if not heavy else 99)"
    )
    words = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True)
    assert done.returncode == 2 and problem in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_threads_that_wait_leave_the_cores_to_others(here, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    line = ["similarity", str(here / "nowhere"), "--base", str(here / "base")]
    assert main(line) == 2 and os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert main(line) == 2 and os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize(
    "line, problem",
    [
        ("zoo nowhere --data texts --datasets films", "nowhere"),
        ("zoo base --data nowhere", "source 'nowhere' is neither"),
        (
            "zoo base --data texts --datasets films,opera --out new",
            "no dataset 'opera' in texts: there are films",
        ),
        (
            "zoo base --data texts --out new --rows 61",
            "dataset films: 61 training rows asked for, there are 60",
        ),
        ("zoo base --data texts --out new --seeds 0", "no seeds"),
        (
            "zoo base --data texts --out new --epochs nan",
            "recipe: epochs must be a positive number, not nan",
        ),
        (
            "zoo base --data texts --out new --patience 0",
            "recipe: patience must be at least 1, not 0",
        ),
        (
            "zoo base --data texts --out new --weight-decay -1",
            "recipe: weight_decay must not be below 0",
        ),
        (
            "zoo base --data texts --steps 4",
            "zoo is a zoo of another recipe: steps is 3 there and 4 here",
        ),
        ("zoo other --data texts --steps 3 --batch-size 8", "zoo is a zoo of another base"),
        ("similarity nowhere --base base", "nowhere: there is no such folder"),
        (
            "similarity heap --base base --keep kept.csv",
            "--keep takes a file that ends in .npz",
        ),
        ("similarity heap --base base --sketch 1000", "k must be a multiple of 256, not 1000"),
        ("similarity texts --base base", "texts: no checkpoint"),
        ("similarity zoo --base nowhere", "nowhere"),
        ("similarity heap/run-0 --base base", "heap/run-0: is the only checkpoint"),
        ("similarity heap/run-0 heap/run-0 --base base", "run-0: is given twice"),
        (
            "similarity heap/run-0 other --base base --out bad",
            "come from different pretrained models",
        ),
        (
            "similarity heap/run-0 heap/run-1 --base other --out bad",
            "run-0 was not fine-tuned from other",
        ),
        (
            "similarity heap/run-0 base --base base --out bad",
            "takes at least two checkpoints, not 1",
        ),
        (
            "similarity heap --base base --clusters 9 --out bad",
            "k must lie between 1 and the number of models, 6",
        ),
        ("similarity torn --base base", "torn/run-1/model.safetensors: damaged or truncated"),
        (
            "traverse heap/run-0 --base base --data texts --target films",
            "is the only checkpoint",
        ),
        (
            "traverse heap/run-0 other --base base --data texts --target films --out bad",
            "other was not fine-tuned from base",
        ),
        (
            "traverse zoo --base base --data texts --target films",
            "a line takes two checkpoints and a plane three, not 6",
        ),
        (
            "traverse heap/run-0 heap/run-1 --base base --data texts --target opera",
            "no dataset 'opera'",
        ),
        (
            "traverse heap/run-0 heap/run-1 --base base --data texts --target films --hull 0",
            "--hull takes the number of points, at least 1, not 0",
        ),
        (
            (
                "traverse heap/run-0 heap/run-1 --base base --data texts --target films --hull 2"
                " --beyond"
            ),
            "--hull and --beyond are two kinds of path",
        ),
        (
            (
                "traverse heap/run-0 heap/run-1 heap/run-2 --base base --data texts --target films"
                " --beyond 4"
            ),
            "--beyond goes along a line",
        ),
        (
            "traverse heap/run-0 heap/run-1 --base base --data texts --target films --beyond 0",
            "goes beyond 1",
        ),
        (
            "locate heap/run-0 --zoo heap --base base --by dataset",
            "a region takes at least two models, and no dataset has them",
        ),
        ("center zoo --base base --out texts", "texts: exists already"),
        ("center zoo --base other --out new", "films/seed-1 was not fine-tuned from other"),
        (
            "center zoo --base base --out new --without opera",
            "no dataset 'opera', only films, headlines",
        ),
        (
            "center zoo --base base --out new --for texts:films",
            "films/seed-1 has seen films; --without leaves it out, --saw-target allows it",
        ),
        ("center zoo --base base --out new --for films", "source 'films' is neither"),
        ("center zoo --base base --out new --for texts", "texts has 3 datasets; name one"),
        ("locate nowhere --zoo zoo --base base", "nowhere"),
        ("locate other --zoo zoo --base base", "other was not fine-tuned from base"),
        ("locate base --zoo zoo --base base", "base equals base"),
        ("recommend zoo --base base --data texts --target opera", "no dataset 'opera'"),
        (
            "recommend zoo --base base --data texts --target meals --write texts",
            "texts: exists already",
        ),
        ("study --data nowhere --out new", "source 'nowhere' is neither"),
    ],
)
def test_what_can_be_mended_is_one_line(here, line, problem):
    if "torn" in line:
        shutil.copytree(here / "heap", here / "torn")
        (here / "torn" / "run-1" / "model.safetensors").write_bytes(b"\0" * 9)
    before = {f: file_sha256(f) for f in (here / "zoo").rglob("*.safetensors")}
    code, _, err = cli(line, here)
    last = err.splitlines()[-1]
    assert (
        code == 2
        and last.startswith("weightregions: ")
        and problem in last
        and "Traceback" not in err
    ), err
    assert {f: file_sha256(f) for f in (here / "zoo").rglob("*.safetensors")} == before
    assert not any(
        (here / name / f).exists()
        for name in ("new", "bad")
        for f in ("config.json", "similarity.csv", "zoo.json")
    )
    assert not any(f.name.startswith(".") for f in here.iterdir())


def test_an_interrupt_loses_nothing(here):
    (here / "long" / "films").mkdir(parents=True)
    last = FileLock(here / "long" / "films" / ".seed-6.lock")  # as if another process had it
    last.acquire()
    line = "zoo base --data texts --datasets films --out long --seeds 6 --steps 12 --workers 1".split()
    child = subprocess.Popen(
        [PROGRAM, *line],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # in the background a shell has it ignored
    while (
        child.poll() is None and len(list((here / "long").glob("*/seed-*/manifest.json"))) < 1
    ):
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    _, err = child.communicate()
    last.release()
    assert (
        child.returncode == 130
        and err.splitlines()[-1]
        == "weightregions: interrupted; run the same command again to go on"
    ), err
    assert "Traceback" not in err
    done = {f: file_sha256(f) for f in (here / "long").glob("*/seed-*/model.safetensors")}
    assert 1 <= len(done) < 6
    assert not [f for f in (here / "long").glob("*/.seed-*") if f.is_dir()], (
        "a half-written model is left"
    )
    well(" ".join(line), here)
    assert len(open_zoo(here / "long")) == 6 and {f: file_sha256(f) for f in done} == done
