"The study runs from nothing to its page, resumes, and refuses to be mixed with another."

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest

from weightregions.corpora import load_corpora
from weightregions.files import append_line, file_sha256
from weightregions.report import CAPTIONS
from weightregions.building import build_zoo
from weightregions.results import Study, square, write_rows, families_by_size, from_own_starts
from weightregions.scales import SCALES, check_classes
from weightregions.study import measure, run_study, try_starts, walk
from weightregions.verdicts import AUTHORS, CLAIM_COLUMNS, OURS

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.xdist_group("study"),
    pytest.mark.timeout(1200),
]  # one process makes what all of these tests look at, which takes minutes


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    environment = {
        k: v for k, v in os.environ.items() if k not in ("IN_TEST", "WEIGHTREGIONS_OUT")
    }
    done = subprocess.run(
        [
            Path(sys.executable).with_name("weightregions"),
            "study",
            "--scale",
            "tiny",
            "--out",
            os.path.relpath(folder, ROOT),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_claim_has_a_criterion_and_a_tiny_run_no_verdict(out):
    claims = pd.read_csv(out / "claims.csv")
    assert list(claims.columns) == CLAIM_COLUMNS
    judged, ours = claims[claims.verdict.notna()], claims[claims.models == OURS]
    assert {f"C{i}" for i in range(1, 12)} <= set(ours.claim)
    assert set(judged.models) == {AUTHORS}  # a scale too small to judge gives values alone
    stated = ours.claim[ours.criterion.notna()]
    assert {f"C{i}" for i in range(1, 12)} <= set(stated)
    assert list(claims.models == AUTHORS) == sorted(claims.models == AUTHORS)
    assert (claims.n[claims.criterion.notna()] > 0).all()
    known = claims.dropna(subset=["low"])
    assert (known.low <= known.ours + 1e-9).all() and (known.ours <= known.high + 1e-9).all()


# --- a number belongs to the bytes it was made from -------------------------------------------

FEW = replace(
    SCALES["tiny"],
    budget=replace(
        SCALES["tiny"].budget, hull=2, targets=1, lines=1, inside=1, line_targets=1, grid=2
    ),
    contest=replace(SCALES["tiny"].contest, targets=1, sizes=(50,), curve=(), budgets=()),
)


def measured(folder, corpora):
    "Measure what is not measured yet; the warnings."
    base = str(folder / "base")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        measure(folder, FEW, base)
        walk(folder, FEW, base, corpora, workers=1)
        try_starts(folder, FEW, base, corpora, workers=1)
    return " ".join(str(w.message) for w in seen if "again" in str(w.message))


def results(folder):
    "Every table, walk and start of a study, line by line, without the seconds that it took."
    lines = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or not name.startswith(("rows/", "walks/", "starts/")):
            continue
        if name.endswith("advice.csv"):
            text = pd.read_csv(file).drop(columns="seconds").to_csv()
        elif file.suffix in (".csv", ".jsonl"):
            text = file.read_text()
        elif file.suffix == ".safetensors":
            text = file_sha256(file)
        else:
            continue
        lines[name] = text.splitlines()
    return lines


def unordered(lines):
    "Files that grow row by row may have other orders."
    grows = lambda name: name.startswith(("walks/", "starts/rows", "starts/why"))
    return {name: sorted(t) if grows(name) else t for name, t in lines.items()}


def copied(folder, to, parts):
    "Copy some parts of a study."
    for part in parts:
        shutil.copytree(folder / part, to / part)
    shutil.copy(folder / "about.json", to)
    return to


MODELS = ("base", "second-start", "zoo", "zoo-second-start", "zoo-50-rows", "zoo-100-rows")


@pytest.fixture(scope="module")
def replaced(out, tmp_path_factory):
    "A study before and after one of its models was trained anew, and one of the new models."
    root, scale = tmp_path_factory.mktemp("replaced"), SCALES["tiny"]
    names = list(Study(out).about["datasets"])
    corpora = load_corpora("builtin", n_train=scale.n_train, n_test=scale.n_test)
    corpora = {name: corpora[name] for name in names}
    old = copied(out, root / "old", MODELS)
    (old / "rows").mkdir()
    for name in ("shared_texts", "datasets"):
        write_rows(old, name, pd.read_csv(out / "rows" / f"{name}.csv"))
    measured(old, corpora)
    build_zoo(root / "other", old / "base", {"films": corpora["films"]}, scale.recipe, [9], 1)
    model, place = root / "other" / "films" / "seed-9", Path("zoo") / "films" / "seed-1"
    manifest = json.loads((model / "manifest.json").read_text()) | {"seed": 1}
    (model / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(old, root / "resumed")
    shutil.rmtree(root / "resumed" / place)
    shutil.copytree(model, root / "resumed" / place)
    fresh = copied(root / "resumed", root / "fresh", MODELS)
    (fresh / "rows").mkdir()
    for name in ("shared_texts", "datasets"):
        write_rows(fresh, name, pd.read_csv(out / "rows" / f"{name}.csv"))
    measured(fresh, corpora)
    return SimpleNamespace(
        old=old, resumed=root / "resumed", fresh=fresh, corpora=corpora, place=place
    )


def test_a_replaced_model_is_measured_again_and_nothing_else(replaced, monkeypatch, tried):
    appended = Counter()

    def counted(file, line):
        appended[Path(file).parent.name] += 1
        return append_line(file, line)

    for module in ("traversal", "comparison"):
        monkeypatch.setattr(f"weightregions.{module}.append_line", counted)
    before, fresh = results(replaced.old), results(replaced.fresh)
    warned = measured(replaced.resumed, replaced.corpora)
    assert unordered(results(replaced.resumed)) == unordered(fresh)
    for folder in ("walks", "starts"):
        old, new = (
            {(n, line) for n, t in of.items() if n.startswith(folder) for line in t}
            for of in (before, fresh)
        )
        grow = re.compile(r".*(\.jsonl|/rows\.csv|/why-[^/]*\.csv)")  # tables of one line each
        lines = {(n, x) for n, x in new - old if grow.fullmatch(n)}
        assert 0 < len(lines) < len(new) and appended[folder] == len(lines)
    for file in ("similarity_main.csv", "similarity_sizes.csv", "location.csv", "models-on"):
        assert file in warned
    appended.clear()
    assert not measured(replaced.resumed, replaced.corpora) and not appended
    tried("a model of the zoo replaced", "study", 1, "what depends on it is measured again")


def spoilt(text, column, value):
    "A table with one cell changed."
    table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    table.loc[1, column] = value
    return table.to_csv(index=False)


def a_flipped_byte(file):
    "Change one byte of some weights."
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def without_a_line(file):
    "Take a line out of a table."
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2] + lines[3:]))


def a_jsonl_cell(change):
    "Change the row of the first point."

    def spoil(file):
        head, line, *rest = file.read_text().splitlines(keepends=True)
        line = json.loads(line)
        change(line["rows"][0])
        file.write_text("".join([head, json.dumps(line) + "\n", *rest]))

    return spoil


def a_cell(column, value):
    "Change one cell of a table."
    return lambda file: file.write_text(spoilt(file.read_text(), column, value))


def a_row_of_starts(file):
    "Change an accuracy."
    lines = file.read_text().splitlines(keepends=True)
    cells = lines[2].split(",")
    cells[5] = "0.123"
    file.write_text("".join([*lines[:2], ",".join(cells), *lines[3:]]))


SPOILT = [  # file, what is done to it, what that is called
    ("rows/similarity_main.csv", a_cell("cosine", "0.5"), "a cell changed"),
    ("rows/similarity_starts.csv", without_a_line, "a pair missing"),
    ("rows/similarity_sizes.csv", a_cell("distance", ""), "a cell emptied"),
    ("rows/location.csv", without_a_line, "a row missing"),
    ("walks/hull-general.jsonl", a_jsonl_cell(lambda r: r.update(loss=0.1)), "a loss changed"),
    ("walks/perturbations.jsonl", a_jsonl_cell(lambda r: r.pop("loss")), "a loss missing"),
    ("starts/*/advice.csv", a_cell("loss", ""), "a loss missing"),
    ("starts/*/centroid/model.safetensors", a_flipped_byte, "a byte changed"),
    ("starts/rows.csv", a_row_of_starts, "an accuracy changed"),
]


def test_what_was_changed_by_hand_is_named_and_measured_again(replaced, tmp_path, tried):
    spoilt_study = tmp_path / "spoilt"
    shutil.copytree(replaced.fresh, spoilt_study)
    for name, spoil, _ in SPOILT:
        file = next(spoilt_study.glob(name))
        before = file.read_bytes()
        spoil(file)
        assert file.read_bytes() != before
    with pytest.raises(ValueError, match="similarity_main.csv was changed after it was made"):
        Study(spoilt_study).matrix()
    warned = measured(spoilt_study, replaced.corpora)
    for name, *_ in SPOILT:
        part = name.removesuffix("/model.safetensors").split("/")[-1]
        assert part in warned, part
    assert unordered(results(spoilt_study)) == unordered(results(replaced.fresh))
    for kind in sorted({kind for *_, kind in SPOILT}):
        number = sum(kind == other for *_, other in SPOILT)
        tried(f"kept table: {kind}", "study", number, "the file is named and measured again")


@pytest.mark.parametrize("name", ["learned", "shared_texts", "models", "points", "datasets"])
def test_a_table_that_was_changed_is_not_read(replaced, tmp_path, name):
    folder = copied(replaced.fresh, tmp_path, ["rows"])
    Study(folder).rows(name)
    with open(folder / "rows" / f"{name}.csv", "a") as f:
        f.write("\n")
    with pytest.raises(ValueError, match=f"{name}.csv was changed after it was made"):
        Study(folder).rows(name)


def test_the_page_shows_claims_figures_and_links_that_exist(out):
    page = (out / "index.html").read_text()
    assert 'href="explore.html"' in page and (out / "explore.html").is_file()
    assert (out / "plotly.min.js").is_file()
    for target in re.findall(r'(?:href|src)="(?!data:)([^"#]+)"', page):
        assert (out / target).is_file(), target
    assert page.count("<figure>") == len(CAPTIONS) + 2  # and heat map and basin, and the map
    assert page.index("<figure>") < page.index("<article") < page.index("<details>")
    assert page.count("<article") == 13 and "still to come" not in page.lower()
    pages = "".join(f.read_text() for f in (out / "notebooks").glob("*.html"))
    assert "Traceback (most recent" not in pages


def test_rows_are_enough_to_draw_again(out, tmp_path):
    study = Study(out)
    m = study.matrix()
    assert (m.values == m.values.T).all() and (m.values.diagonal() == 1).all()
    assert list(m.index) == list(study.models().index)
    with pytest.raises(ValueError, match="no column 'tangent'"):
        study.matrix(column="tangent")
    with pytest.raises(FileNotFoundError, match="no rows/weather.csv"):
        study.rows("weather")


def test_what_was_learned_is_told(out):
    table = pd.read_csv(out / "rows" / "learned.csv")
    assert (
        set(table.dataset) == set(Study(out).about["datasets"]) and "published" not in table
    )  # the base is not RoBERTa
    assert "for 60 steps of 16 rows" in (out / "index.html").read_text()


@pytest.mark.parametrize("scale, asked", [("paper", "hub"), ("tiny", "builtin")])
def test_the_data_follow_the_scale(tmp_path, monkeypatch, scale, asked):
    def loaded(source, **how):
        raise LookupError(source)

    monkeypatch.setattr("weightregions.study.load_corpora", loaded)
    with pytest.raises(LookupError, match=asked):
        run_study(tmp_path / "out", scale)
    with pytest.raises(LookupError, match="mine"):
        run_study(tmp_path / "out", scale, "mine")
    assert not (tmp_path / "out").exists()


def test_another_study_is_not_mixed_in(out):
    with pytest.raises(ValueError, match="a study of another scale"):
        run_study(out, scale="laptop")
    about = json.loads((out / "about.json").read_text())
    assert about["scale"] == "tiny"


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--scale", "huge"], "invalid choice: 'huge'"),
        (["--min-rows", "1000000"], "at least two datasets"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, problem):
    done = subprocess.run(
        [
            Path(sys.executable).with_name("weightregions"),
            "study",
            "--scale",
            "tiny",
            "--out",
            tmp_path / "o",
            *words,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert problem in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_square_is_the_inverse_of_pairs():
    pairs = pd.DataFrame({"a": list("xxy"), "b": list("yzz"), "cosine": [0.1, 0.2, 0.3]})
    m = square(pairs, "cosine")
    assert m.loc["z", "y"] == m.loc["y", "z"] == 0.3


def test_data_of_ones_own(tmp_path):
    """Two short datasets of no known family: what they cannot tell is left out or has no
    verdict, and the rest is there."""
    for name, n in (("films", 120), ("meals", 45)):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for split, rows in zip(
            ("train", "test"),
            (lambda c: (c.train, c.test))(
                load_corpora("builtin", names=[name], n_train=n, n_test=60)[name]
            ),
        ):
            rows.to_csv(tmp_path / "texts" / name / f"{split}.csv", index=False)
    done = subprocess.run(
        [
            Path(sys.executable).with_name("weightregions"),
            "study",
            "--scale",
            "tiny",
            "--data",
            tmp_path / "texts",
            "--out",
            tmp_path / "out",
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("IN_TEST", "WEIGHTREGIONS_OUT")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "notebook c3_c4_same_task: left out, it takes two task families" in done.stdout
    assert (
        "notebook c5_data_not_size: left out, it takes two datasets with more rows than a"
        " sub-sample" in done.stdout
    )
    claims = pd.read_csv(tmp_path / "out" / "claims.csv")
    assert {"C1", "C2", "C6", "C7", "C8", "C10", "C11", "C12"} <= set(claims.claim) and not {
        "C3",
        "C4",
        "C5",
        "C9",
    } & set(claims.claim)
    assert claims.verdict[claims.models == OURS].isna().all()
    assert "Traceback" not in done.stderr and (tmp_path / "out" / "index.html").is_file()


def test_a_notebook_that_fails_is_named_and_the_page_is_there(out, tmp_path, monkeypatch):
    from weightregions import report

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(nb, tmp_path / "broken.ipynb")
    monkeypatch.setenv("WEIGHTREGIONS_OUT", str(out))
    assert report.run_notebook(tmp_path / "broken.ipynb", tmp_path) is False
    assert "ZeroDivisionError" in (tmp_path / "notebooks" / "broken.ipynb").read_text()


def test_more_classes_than_rows_are_refused_before_anything_is_made():
    corpora = load_corpora("builtin", names=["films", "meals"], n_train=60, n_test=40)
    many = replace(corpora["meals"], labels=tuple(f"class {i}" for i in range(51)))
    check_classes(corpora, SCALES["tiny"])
    with pytest.raises(
        ValueError, match="dataset meals has 51 classes, and scale tiny has parts with 50 rows"
    ):
        check_classes({"films": corpora["films"], "meals": many}, SCALES["tiny"])


# --- a start of one's own, a short training beside, sizes of a zoo ----------------------------


@pytest.mark.parametrize("seed", range(3))
def test_task_vectors_from_their_own_start(seed):
    rng = np.random.default_rng(seed)
    moved, way = rng.normal(size=(4, 60)), 30 * rng.normal(size=60)
    vectors = np.array([*moved, *(moved + way), way])
    ours = from_own_starts(vectors @ vectors.T, [None] * 4 + [8] * 5)
    direct = np.vstack([moved, moved])
    norms = np.linalg.norm(direct, axis=1)
    expected = direct @ direct.T / np.outer(norms, norms)
    np.testing.assert_allclose(ours[:8, :8], expected, atol=1e-6)
    assert np.isnan(ours[8]).all()  # the second start has not moved from itself
    # as measured before, from the first start, the way between the starts hides the data
    first = vectors[:8] / np.linalg.norm(vectors[:8], axis=1)[:, None]
    assert (first @ first.T)[0, 4] < 0.5 < ours[0, 4]


def test_a_short_training_stands_beside_a_run(tmp_path):
    from weightregions.verdicts import Quantity, claim_row

    about = dict(scale="full", data="d", base={}, recipe={}, seeds=1, datasets={})
    for folder, value, counts in ((tmp_path / "short", 0.5, 1), (tmp_path, 0.9, 2)):
        folder.mkdir(exist_ok=True)
        (folder / "about.json").write_text(json.dumps(about))
        row = claim_row(
            "C12", f"gain (points); wins {counts}", Quantity(value, p=0.01, n=9), 0.7
        )
        shown = Study(folder).record("c12_c13_centre", [row])
    assert shown["short training"].tolist() == [0.5] and shown.ours.tolist() == [0.9]
    assert shown["short verdict"].tolist() == ["holds in part"]
    assert "short training" not in Study(tmp_path / "short").record("c1", [row])


def test_more_seeds_of_a_dataset_can_drown_its_family():
    rng = np.random.default_rng(0)
    family = {"a": rng.normal(size=80), "b": rng.normal(size=80)}
    vectors, rows = [], []
    for f, along in family.items():
        for d in range(3):
            dataset = 2 * along + 3 * rng.normal(size=80)
            for s in range(3):
                vectors.append(dataset + rng.normal(size=80))
                rows.append(dict(model=f"{f}{d}-{s}", dataset=f"{f}{d}", family=f, seed=s))
    models = pd.DataFrame(rows).set_index("model")
    unit = np.array(vectors) / np.linalg.norm(vectors, axis=1)[:, None]
    cosines = pd.DataFrame(unit @ unit.T, models.index, models.index)
    table = families_by_size(cosines, models, "b", draws=2)
    assert len(table) == 3 * 3 * 2 and table.accuracy.between(0.5, 1).all()
    assert table.equals(families_by_size(cosines, models, "b", draws=2))
