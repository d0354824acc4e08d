"The study runs from nothing to its page, resumes, and refuses to be mixed with another."

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from weightregions.corpora import load_corpora
from weightregions.report import CAPTIONS
from weightregions.results import Study, square
from weightregions.scales import SCALES, check_classes
from weightregions.study import run_study
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


def test_the_page_shows_claims_figures_and_links_that_exist(out):
    page = (out / "index.html").read_text()
    for target in re.findall(r'(?:href|src)="([^"#]+)"', page):
        assert (out / target).is_file(), target
    assert page.count("<figure>") == len(CAPTIONS)
    assert page.index("<table>") < page.index("<figure>")
    assert "Traceback" not in "".join(f.read_text() for f in (out / "notebooks").glob("*.html"))


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
    "Two short datasets of no known family: what they cannot tell is left out or has no verdict, and the rest is there."
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
        "notebook c5_data_not_size: left out, it takes two datasets with more rows than a sub-sample"
        in done.stdout
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
