"""Names and labels are text: hostile names are refused before anything is trained, or right to
the last page; labels are the same in all formats."""

import csv
import json
import re
import shutil
import warnings
from urllib.parse import unquote

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from hypothesis import given, settings
from hypothesis import strategies as st

from weightregions import corpora, plots
from weightregions.bases import tiny_base
from weightregions.cli import main
from weightregions.corpora import Corpus, load_corpora
from weightregions.files import check_name, read_table
from weightregions.registry import hub_entries
from weightregions.results import Study, write_rows
from weightregions.study import run_study
from weightregions.zoo import open_zoo

pytestmark = pytest.mark.xdist_group("names")
RIGHT = ["NA", "null", "None", "nan", "2015", "01", "1e5", "True", "Bücher", "ein_Name", "a b"]
RIGHT += ["Q&A (open)", "children's", "inf", "e\u0301tudes", "新聞", "pre-train.v2+"]
WRONG = ["", " ", " a", "a ", ".", "..", ".a", "a.", "a/b", "a\\b", "/etc", "a\nb", "a\x1b[31m"]
WRONG += [
    "models.csv",
    "Zoo.JSON",
    "checkpoint-20",
    "overall",
    "$\\frac$",
    "$x$",
    "<script>",
    "_a",
]
WRONG += [
    "a,b",
    'a"b',
    "a{1}",
    "100%",
    "a\u202eb",
    "a\u00a0b",
    "x" * 101,
    "ü" * 60,
    "a\udcff",
    "*",
]


def lamps(**changes):
    rows = pd.DataFrame({"text": ["It is lit.", "It is dark."] * 9, "label": [0, 1] * 9})
    kept = dict(name="x", family="y", labels=("a", "b"), train=rows, test=rows)
    return Corpus(**kept | changes)


def entries(name="x", family="y"):
    return [{"name": name, "family": family, "label_names": ["a", "b"]}]


def made_in(folder, content, ending="csv", test=None):
    "A folder with one dataset of files of these bytes."
    (folder / "x").mkdir(parents=True, exist_ok=True)
    for split, blob in (("train", content), ("test", content if test is None else test)):
        (folder / "x" / f"{split}.{ending}").write_bytes(blob)
    return folder


def read(folder):
    "The dataset x of a folder, and whether a warning was given beside that of equal rows."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        corpus = load_corpora(folder)["x"]
    return corpus, [str(w.message) for w in said if "training rows too" not in str(w.message)]


# Names


@pytest.mark.parametrize("name", RIGHT)
def test_names_that_look_like_something_else_are_names(name):
    assert lamps(name=name, family=name).name == name


def test_hostile_names_are_refused_wherever_they_enter(tmp_path, tried):
    for name in WRONG:
        (tmp_path / "datasets.json").write_text(json.dumps(entries(name)))
        (tmp_path / "families.csv").write_text("name,family\n", "utf-8")
        doors = [lambda: lamps(name=name), lambda: load_corpora(tmp_path)]
        if name.strip() == name != "":
            doors.append(lambda: lamps(family=name))
        for door in doors:
            with pytest.raises(ValueError) as caught:
                door()
            message = str(caught.value)
            assert message.isprintable() or "\udcff" in message, message
            assert "a name" in message or "uses this name" in message
    tried("a hostile name", "datasets and families", len(WRONG), "refused in one line")


def test_families_are_checked_before_anything_is_read(tmp_path):
    made_in(tmp_path, b"")
    (tmp_path / "families.csv").write_text("name,family\nx,<script>\n")
    with pytest.raises(ValueError, match="families.csv, row 1: family '<script>': a name"):
        load_corpora(tmp_path)
    (tmp_path / "datasets.json").write_text(json.dumps(entries(family="$x$")))
    with pytest.raises(ValueError, match=r"dataset x: family '\$x\$': a name"):
        load_corpora(tmp_path)


def test_the_registry_keeps_the_rule():
    for name, entry in hub_entries().items():
        assert check_name(name) and check_name(entry["family"], "family")


@pytest.mark.parametrize("pair", [("a b", "a-b"), ("Films", "films"), ("\u00e9", "e\u0301")])
def test_names_that_would_share_files_are_refused(tmp_path, pair):
    for name in pair:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="would share files: rename one of them"):
        load_corpora(tmp_path)


# Labels

VALUES = st.one_of(
    st.sampled_from(["01", "1", "1.0", "True", "true", "-0", "NA", "nan", "yes", "1e5", "007"]),
    st.integers(0, 10**20),
    st.booleans(),
    st.floats(allow_nan=False, min_value=0),
)


def in_csv(labels):
    return "text,label\n" + "".join(f"row {i},{label}\n" for i, label in enumerate(labels))


def in_jsonl(labels):
    lines = (json.dumps({"text": f"row {i}", "label": v}) for i, v in enumerate(labels))
    return "".join(line + "\n" for line in lines)


def in_parquet(labels):
    "One type per column, as Parquet has it: text where the labels are of several."
    same = len({type(v) for v in labels}) == 1 and not any(
        isinstance(v, int) and v >= 2**63 for v in labels
    )
    table = pa.table(
        {
            "text": [f"row {i}" for i in range(len(labels))],
            "label": labels if same else list(map(str, labels)),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "csv": lambda labels: in_csv(labels).encode(),
    "jsonl": lambda labels: in_jsonl(labels).encode(),
    "parquet": in_parquet,
}


@settings(max_examples=30, deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=6).filter(lambda v: len(set(map(str, v))) > 1))
def test_the_formats_give_the_same_classes(tmp_path_factory, labels):
    folder, found = tmp_path_factory.mktemp("labels"), {}
    for ending, write in WRITERS.items():
        found[ending], _ = read(made_in(folder / ending, write(labels), ending))
    assert len({corpus.sha256 for corpus in found.values()}) == 1
    corpus = found["csv"]
    assert [corpus.labels[i] for i in corpus.train["label"]] == [str(v) for v in labels]


TABLE = [
    (["01", "1", "2"], ("01", "1", "2")),
    (["10", "9", "1"], ("1", "9", "10")),
    ([True, False], ("False", "True")),
    ([1.0, 0.5], ("0.5", "1.0")),
    (["1.0", "1"], ("1", "1.0")),
    ([10**18, 2], ("2", str(10**18))),
    (["NA", "null"], ("NA", "null")),
]


def test_the_table_of_labels(tmp_path, tried):
    for i, (labels, classes) in enumerate(TABLE):
        for ending, write in WRITERS.items():
            corpus, said = read(made_in(tmp_path / f"{i}{ending}", write(labels), ending))
            assert corpus.labels == classes and not said
    tried(
        "a label that looks like another",
        "corpora",
        len(TABLE),
        "the same class in every format",
    )


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("none", [-1, "-1"])
def test_minus_one_is_no_label(tmp_path, ending, none, tried):
    labels = [type(none)(i % 3) for i in range(60)]
    corpus, said = read(made_in(tmp_path, WRITERS[ending]([*labels, none]), ending))
    assert corpus.labels == ("0", "1", "2") and len(corpus.train) == 60
    assert len(said) == 2 and "1 of 61 rows have the label -1" in said[0]
    many = WRITERS[ending]([*labels[:6], none])
    with pytest.raises(ValueError, match="x, file train.*1 of 7 rows have the label -1"):
        read(made_in(tmp_path, many, ending))
    (tmp_path / "datasets.json").write_text(json.dumps(entries()))
    with pytest.raises(ValueError, match="-1 is out of range"):
        read(
            made_in(
                tmp_path,
                WRITERS[ending]([*[type(none)(i % 2) for i in range(60)], none]),
                ending,
            )
        )


@pytest.mark.parametrize("ending", WRITERS)
def test_label_names_that_are_numbers(tmp_path, ending):
    def read_as(labels, names):
        (tmp_path / "datasets.json").write_text(
            json.dumps([entries()[0] | {"label_names": names}])
        )
        return (
            read(made_in(tmp_path, WRITERS[ending](labels), ending))[0].train["label"].tolist()
        )

    assert read_as([0, 1], ["1", "2"]) == [0, 1]
    assert read_as([1, 2], ["1", "2"]) == [0, 1]
    with pytest.raises(
        ValueError, match="dataset x: labels such as '0' may be names or numbers"
    ):
        read_as([0, 1], ["1", "0"])


# Files


def test_a_missing_column_lists_those_that_are_there(tmp_path):
    rows = [{"review": "good", "stars": 1}, {"review": "bad", "stars": 0}]
    table = pd.DataFrame(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    contents = {
        "csv": table.to_csv(index=False).encode(),
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "parquet": (tmp_path / "rows.parquet").read_bytes(),
    }
    for ending, content in contents.items():
        with pytest.raises(ValueError, match="'label' is missing; there are review, stars"):
            load_corpora(made_in(tmp_path / ending, content, ending))


def test_cells_of_any_length(tmp_path, tried):
    long = "word " * 300_000 + '\r\n"said", he'
    content = (
        b"\xef\xbb\xbf"
        + pd.DataFrame({"text": [long, "short"], "label": ["yes", "no"]})
        .to_csv(index=False, lineterminator="\r\n")
        .encode()
    )
    corpus, _ = read(made_in(tmp_path, content))
    assert corpus.train["text"].tolist() == [long, "short"]
    tried("a text of a million characters", "corpora", 1, "read in full")


def test_a_parquet_file_of_equal_rows_is_read(tmp_path, tried):
    table = pa.table(
        {"text": ["It is lit.", "It is dark."] * 100_000, "label": [1, 0] * 100_000}
    )
    pq.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    content = (tmp_path / "rows.parquet").read_bytes()
    assert len(content) < 100_000
    rows = corpora.read_parquet(tmp_path / "rows.parquet", "x")
    assert len(rows) == 200_000 and rows[200_000] == {"text": "It is dark.", "label": 0}
    assert len({id(row["text"]) for row in rows.values()}) == 2
    tried("a Parquet file of equal rows", "corpora", 1, "read in full")


# Tables


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*RIGHT, "NaN", "#N/A", "-inf", "1.50"]), min_size=1, max_size=8)
)
def test_names_come_back_from_tables_letter_by_letter(tmp_path_factory, names):
    file = tmp_path_factory.mktemp("tables") / "rows.csv"
    table = pd.DataFrame({"dataset": names, "seed": range(len(names)), "loss": 0.5})
    table.loc[0, "loss"] = np.nan
    table.to_csv(file, index=False)
    kept = read_table(file, ("dataset",), list(table))
    assert kept.dataset.tolist() == names and kept.seed.tolist() == list(range(len(names)))
    assert kept.loss.isna().tolist() == table.loss.isna().tolist()


def test_a_table_that_was_changed_names_file_and_row(tmp_path, tried):
    (tmp_path / "rows").mkdir()
    (tmp_path / "about.json").write_text(
        json.dumps(dict(scale="", data="", base={}, recipe={}, seeds=1, datasets={}))
    )
    study, faults = Study(tmp_path), 0
    pairs = pd.DataFrame({"a": ["NA/seed-1"], "b": ["2015/seed-1"], "cosine": [0.25]})
    write_rows(tmp_path, "similarity_main", pairs)
    assert study.matrix().loc["NA/seed-1", "2015/seed-1"] == 0.25
    for content, says in {
        "a,b\nx,y\n": "no column cosine; there are a, b",
        "a,b,cosine\nx,y,high\n": "row 2: cosine is 'high', no number",
        "a,b,cosine\nx,y,0.1\nx,z\n": "row 3: 2 cells for 3 columns",
        "": "is empty",
    }.items():
        (tmp_path / "rows" / "similarity_main.csv").write_text(content)
        (tmp_path / "rows" / "similarity_main.csv.made.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=f"similarity_main.csv.*{says}"):
            study.matrix()
        faults += 1
    tried(
        "a table that was changed", "study", faults, "refused in one line that names the file"
    )


# Figures


def test_names_are_drawn_letter_by_letter(tried):
    names = [r"$\frac$", "$x$", "a\\b", "<script>", "100% {1}", "$5", "plain"]
    models = [f"{n}/{i}" for n in names for i in range(2)]
    rng = np.random.default_rng(0)
    matrix = pd.DataFrame(np.corrcoef(rng.normal(size=(14, 30))), models, models)
    groups = pd.Series(np.repeat(names, 2), models)
    families = {n: n for n in names}
    places = pd.DataFrame(rng.normal(size=(14, 2)), models, ["x", "y"])
    rows = pd.DataFrame({"alpha": [0, 0.5, 1], "loss": [1, 0.5, 1.0], "target": names[0]})
    figures = [
        plots.similarity_heatmap(matrix, groups, families).figure,
        plots.similarity_heatmap(matrix, order="given").figure,
        plots.region_map(places, groups, families).figure,
        plots.loss_line(rows, ends=names[:2]).figure,
        plots.edges(rows, references={names[0]: 0.7}).figure,
    ]
    for figure in figures:
        figure.canvas.draw()
        shown = [t.get_text() for t in figure.findobj(plt.Text)]
        assert any(r"\$\frac\$" in text for text in shown)
    tried("a formula as a name", "figures", len(figures), "drawn letter by letter")


# To the last page


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A base, and texts whose datasets, families and labels have unlucky names."
    here = tmp_path_factory.mktemp("names")
    tiny_base(here / "base", steps=2)
    texts, rows = here / "texts", load_corpora("builtin", ["films"], n_train=60, n_test=40)
    for i, name in enumerate(FAMILIES):
        (texts / name).mkdir(parents=True)
        for split in ("train", "test"):
            part = getattr(rows["films"], split).assign(
                label=lambda r: r.label.map({0: "01", 1: "1"}),
                text=lambda r: r.text + f" {name}",
            )
            part.to_csv(texts / name / f"{split}.csv", index=False)
    table = pd.Series(FAMILIES, name="family").rename_axis("name")
    table.to_csv(texts / "families.csv")
    return here


FAMILIES = {"NA": "null", "2015": "null", "01": "Bücher", "nan": "True"}


def well(here, monkeypatch, capsys, *words):
    monkeypatch.chdir(here)
    code = main([*map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_unlucky_names_go_through_every_command(here, monkeypatch, capsys):
    run = lambda *words: well(here, monkeypatch, capsys, *words)
    out = "o{1} 5%"
    names = "NA,2015,01"
    recipe = "--steps 3 --batch-size 8 --workers 1 --seeds 3".split()
    run("zoo", "base", "--data", "texts", "--datasets", names, *recipe, "--out", f"{out}/zoo")
    zoo = open_zoo(here / out / "zoo")
    assert set(zoo.models.dataset) == set(names.split(","))
    table = read_table(here / out / "zoo" / "learned.csv", ("dataset", "family"))
    assert dict(zip(table.dataset, table.family)) == {
        n: FAMILIES[n].lower() for n in names.split(",")
    }
    run("similarity", f"{out}/zoo", "--base", "base", "--out", f"{out}/same")
    table = read_table(here / out / "same" / "similarity.csv", ("model",))
    assert sorted(table.model) == sorted(zoo.models.model)
    run("center", f"{out}/zoo", "--base", "base", "--without", "01", "--out", f"{out}/centre")
    members = read_table(here / out / "centre" / "members.csv", MEMBER_WORDS)
    assert set(members.model.str.split("/").str[0]) == {"NA", "2015"}
    on = ["--data", "texts", "--target", "nan", "--rows", "40"]
    line = ["zoo/NA/seed-1", "zoo/2015/seed-1"]
    run(
        "traverse", *(f"{out}/{m}" for m in line), "--base", "base", *on, "--out", f"{out}/walk"
    )
    rows = read_table(here / out / "walk" / "line.csv", POINT_WORDS)
    assert set(rows.target) == {"nan"} and np.isfinite(rows.loss).all()
    where = ["--zoo", f"{out}/zoo", "--base", "base", "--out", f"{out}/place.csv"]
    run("locate", f"{out}/zoo/01/seed-1", *where)
    table = read_table(here / out / "place.csv", PLACE_WORDS)
    assert {"NA", "2015"} <= set(table.region)
    run("recommend", f"{out}/zoo", "--base", "base", *on, "--out", f"{out}/advice.csv")
    table = read_table(here / out / "advice.csv", ("start", "kind", "pooling"))
    assert {"pretrained", "centroid", "null centroid"} <= set(table.start)


MEMBER_WORDS = ("model", "dataset", "family", "path", "revision", "sha256", "weights")
POINT_WORDS = ("point", "target", "note", "pooling")
PLACE_WORDS = ("note", "region", "name", "inside", "model")


@pytest.mark.slow
def test_unlucky_names_go_through_a_whole_study_to_the_last_page(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, old in (("NA", "films"), ("2015", "gadgets"), ("01", "headlines")):
        corpus = load_corpora("builtin", [old], n_train=300, n_test=100)[old]
        (tmp_path / "texts" / name).mkdir(parents=True)
        for split in ("train", "test"):
            part = getattr(corpus, split).assign(label=lambda r: "0" + r.label.astype(str))
            part.to_csv(tmp_path / "texts" / name / f"{split}.csv", index=False)
    shutil.copytree(tmp_path / "texts" / "NA", tmp_path / "texts" / "Bücher")
    (tmp_path / "texts" / "families.csv").write_text(
        "name,family\nNA,null\n2015,null\n01,Größe\nBücher,Größe\n", "utf-8"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = run_study("o{1} ü", "tiny", "texts", workers=1)
    study = Study(page.parent)
    assert set(study.models().dataset) == {"NA", "2015", "01", "Bücher"}
    assert set(study.models().family) == {"null", "größe"}
    text = page.read_text("utf-8")
    pages = [f for f in page.parent.rglob("*.html") if f != page]
    assert pages and "Bücher" in text + "".join(f.read_text("utf-8") for f in pages)
    for file in (page, *pages):
        links = re.findall('(?:href|src)="([^"#:?]+)"', file.read_text("utf-8"))
        lost = [n for n in links if not (file.parent / unquote(n)).exists()]
        assert not lost, (file.name, lost[:3])


# Models of others


@pytest.mark.parametrize("column", ["dataset", "family"])
def test_a_table_of_models_with_a_hostile_name_is_refused(here, tmp_path, column, tried):
    (
        shutil.copytree(here / "base", tmp_path / "a"),
        shutil.copytree(here / "base", tmp_path / "b"),
    )
    for name in filter(str.strip, WRONG):
        row = {"model": "b", "dataset": "x", "family": "y"} | {column: name}
        with open(tmp_path / "models.csv", "w", encoding="utf-8", errors="surrogatepass") as f:
            csv.writer(f).writerows([row, ["a", "x", "y"], row.values()])
        with pytest.raises(ValueError) as caught:
            open_zoo(tmp_path)
        message = str(caught.value)
        assert "models.csv" in message and ("row 3" in message or "UTF-8" in message)
    tried("a hostile name", "models.csv", len(WRONG) - 2, "refused in one line")


def test_folders_of_models_may_have_any_name_that_can_be_shown(
    here, tmp_path, monkeypatch, capsys
):
    names = {*RIGHT, "overall", r"$\frac$", "<script>", "a{1}", "a,b", '"', "100%", "x" * 120}
    for i, name in enumerate(names):
        moved(here / "base", tmp_path / "runs" / name, i)
    run = lambda *words: well(tmp_path, monkeypatch, capsys, *words, "--base", here / "base")
    out = "o{1}"
    run("similarity", "runs", "--out", f"{out}/s")
    assert set(read_table(tmp_path / out / "s" / "similarity.csv", ("model",)).model) == names
    run("center", "runs", "--out", f"{out}/c")
    members = read_table(tmp_path / out / "c" / "members.csv", MEMBER_WORDS)
    assert set(members.model) == names
    card = (tmp_path / out / "c" / "README.md").read_text("utf-8")
    assert "<script>" not in card and "| NA |" in card
    run("locate", "runs/NA", "--zoo", "runs", "--out", f"{out}/place.csv")
    assert len(read_table(tmp_path / out / "place.csv", PLACE_WORDS))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\u202eb", "a\udcff"])
def test_folders_of_models_whose_names_cannot_be_shown_are_refused(here, tmp_path, name, tried):
    for i, at in enumerate((name, "other")):
        moved(here / "base", tmp_path / "runs" / at, i)
    with pytest.raises(ValueError, match="a folder is called .* rename it") as caught:
        open_zoo(tmp_path / "runs")
    assert str(caught.value).isascii()
    tried("a hostile name", "folders of models", 1, "refused in one line")


def moved(base, folder, seed):
    "A copy of a model whose weights have moved."
    plain = shutil.copytree(base, folder.parent.parent / "plain")
    rng = torch.Generator().manual_seed(seed)
    state = load_file(plain / "model.safetensors")
    for name, tensor in state.items():
        state[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=rng)
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    folder.parent.mkdir(exist_ok=True)
    plain.rename(folder)
