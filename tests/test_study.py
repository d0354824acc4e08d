"The study runs from nothing to its page, resumes, and refuses to be mixed with another."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from weightregions.study import CAPTIONS, CLAIM_COLUMNS, HOLDS, IN_PART, NOT_HERE, Study, run_study, square

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.xdist_group("study")  # one process makes what all of these tests look at


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    environment = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "WEIGHTREGIONS_OUT")}
    done = subprocess.run([Path(sys.executable).with_name("weightregions"), "study", "--scale", "tiny", "--out", os.path.relpath(folder, ROOT)],
                          cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_claim_is_judged(out):
    claims = pd.read_csv(out / "claims.csv")
    assert list(claims.columns) == CLAIM_COLUMNS
    judged = claims[claims.verdict.notna()]
    assert {f"C{i}" for i in range(1, 12)} <= set(judged.claim)
    assert set(judged.verdict) <= {HOLDS, IN_PART, NOT_HERE}
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


def test_another_study_is_not_mixed_in(out):
    with pytest.raises(ValueError, match="a study of another scale"):
        run_study(out, scale="laptop")
    about = json.loads((out / "about.json").read_text())
    assert about["scale"] == "tiny"


@pytest.mark.parametrize("words, problem", [
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--scale", "huge"], "invalid choice: 'huge'"),
    (["--min-rows", "1000000"], "at least two datasets"),
])
def test_mistakes_are_one_line(tmp_path, words, problem):
    done = subprocess.run([Path(sys.executable).with_name("weightregions"), "study", "--scale", "tiny", "--out", tmp_path / "o", *words],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert problem in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_square_is_the_inverse_of_pairs():
    pairs = pd.DataFrame({"a": list("xxy"), "b": list("yzz"), "cosine": [0.1, 0.2, 0.3]})
    m = square(pairs, "cosine")
    assert m.loc["z", "y"] == m.loc["y", "z"] == 0.3
