"""Own models and own data as people have them: every command ends with an answer, and every
snippet runs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest

import weightregions
from weightregions.bases import tiny_base
from weightregions.centering import centroid_of, model_card
from weightregions.checkpoints import open_checkpoint
from weightregions.cli import main, parser
from weightregions.corpora import Columns, load_corpora
from weightregions.files import file_sha256
from weightregions.zoo import open_zoo

pytestmark = pytest.mark.xdist_group("users")
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A base, a CSV file with columns of its own, and what two plain scripts made of them."
    here = tmp_path_factory.mktemp("users")
    tiny_base(here / "base", steps=2)
    films = load_corpora("builtin", "films", n_train=120, n_test=40)["films"].train
    table = pd.DataFrame(
        {
            "id": range(len(films)),
            "Review Text": films.text,
            "Sentiment": films.label.map({0: "no", 1: "yes"}),
            "rated by": "me",
        }
    )
    table.to_csv(here / "reviews.csv", index=False)
    for script, out in (("train.py", "runs"), ("adapt.py", "runs/lora")):
        words = [sys.executable, SCRIPTS / script, "base", "reviews.csv", out]
        done = subprocess.run(words, cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return here


def run(here, monkeypatch, capsys, line):
    "Exit code, standard output and standard error of a command."
    monkeypatch.chdir(here)
    code = main(shlex.split(line))
    out, err = capsys.readouterr()
    return code, out, err


DATA = "--data reviews.csv --text-column 'Review Text' --label-column Sentiment"
COMMANDS = {
    "similarity runs --base base --out sim --format svg": "models in",
    "similarity runs --base base --out sim-all --all-checkpoints": "models in",
    "similarity runs --base base --out sim-two --by cluster --clusters 2": "models in 2 clusters",
    "locate runs/run-3 --zoo runs --base base --out place.csv": "is nearest to cluster",
    "locate runs/run-4 --zoo runs/run-1 runs/run-3 --base base --out two.csv": "cannot be said",
    "center runs --base base --out centre": "their data are not recorded",
    "center runs --base base --out unseen --for reviews.csv --text-column 'Review Text'"
    " --label-column Sentiment": "or has a record of its data",
    f"recommend runs --base base {DATA} --rows 60 --out advice.csv": "advice: start from",
    f"traverse runs/run-3 runs/run-4 --base base {DATA} --rows 40 --points 4 --out walk": "4 points",
    f"finetune --start centre --base base {DATA} --method head --steps 6 --out next": "a gain of",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_ends_with_an_answer(here, monkeypatch, capsys, line):
    code, out, err = run(here, monkeypatch, capsys, line)
    assert code == 0 and COMMANDS[line] in out, err + out
    assert "nan" not in out.lower()
    if "zoo runs/" in line or "finetune" in line:
        return
    assert "an adapter" not in err, "it is a model like the others"
    if line.split()[0] in ("similarity", "center"):
        assert "lora" in out
    if "reviews.csv" in line:
        assert "are held out (seed 0)" in err


def test_the_steps_of_a_run_are_one_model(here):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zoo = open_zoo(here / "runs")
    assert zoo.models.model.tolist() == [
        "run-1/checkpoint-6",
        "run-2/checkpoint-6",
        "run-3",
        "run-4",
    ]
    assert {"lora", "run-1/checkpoint-3"} <= set(zoo.left_out.folder)


@pytest.mark.parametrize("line", COMMANDS)
def test_json_is_one_object_and_quiet_is_quiet(here, monkeypatch, capsys, line):
    for name in ("centre", "unseen", "next"):
        if f"--out {name}" in line:
            shutil.rmtree(here / name, ignore_errors=True)
    if "--start centre" in line:
        run(here, monkeypatch, capsys, "center runs --base base --out centre")
    code, out, err = run(here, monkeypatch, capsys, f"{line} --json --quiet")
    assert code == 0, err
    shown = json.loads(out, parse_constant=pytest.fail)
    assert shown["command"] == line.split()[0] and shown["written"]
    assert "written:" not in err
    assert all((here / file).exists() for file in shown["written"])


def test_figures_have_the_format_that_is_asked_for(here, monkeypatch, capsys):
    for ending, begins in {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}.items():
        made = set()
        for again in ("a", "b"):
            line = f"similarity runs --base base --out {ending}-{again} --format {ending}"
            assert run(here, monkeypatch, capsys, line)[0] == 0
            file = here / f"{ending}-{again}" / f"similarity.{ending}"
            assert file.read_bytes().startswith(begins)
            made.add(file_sha256(file))
        assert len(made) == 1, "the same figure has the same bytes"


# --- groups that nobody named -----------------------------------------------------------------


def test_too_few_models_for_a_p_value_are_told_so(here, monkeypatch, capsys, tried):
    line = "locate runs/run-4 --zoo runs/run-1 runs/run-3 --base base --out few.csv"
    assert run(here, monkeypatch, capsys, line)[0] == 0
    rows = pd.read_csv(here / "few.csv")
    assert rows.p.isna().all() and rows.inside.isna().all() and rows.cosine.notna().all()
    assert rows.note.str.contains("too few models|one model alone").all()
    line = "locate runs/run-4 --zoo runs/run-3 runs/run-4 --base base"
    code, _, err = run(here, monkeypatch, capsys, line)
    assert code == 2 and "there is one model; `weightregions similarity` tells" in err
    tried("too few models for a p-value", "locate", 2, "cosines and a sentence")


# --- tables of models -------------------------------------------------------------------------


def test_a_table_of_models_needs_one_column(here, tmp_path):
    for name in ("run-3", "run-4"):
        shutil.copytree(here / "runs" / name, tmp_path / "mine" / name)
    (tmp_path / "models.csv").write_text("model\nmine/run-3\nmine/run-4\n")
    zoo = open_zoo(tmp_path)
    assert zoo.models.dataset.tolist() == ["mine", "mine"] and set(zoo.models.family) == {
        "unknown"
    }
    card = model_card(centroid_of(zoo))
    assert "accuracy" not in card and "| - |" not in card
    (tmp_path / "models.csv").write_text("model,accuracy\nmine/run-3,\nmine/run-4,0.5\n")
    assert "| - |" in model_card(centroid_of(open_zoo(tmp_path)))


WRONG_TABLES = [
    ("model\nrun-3\nrun-5\n", "row 3: run-5: no such folder"),
    ("model\nrun-3\nmy runs/5\n", "row 3: my runs/5: there is no such folder"),
    ("model,Dataset\nrun-3,x\n", "a column is called 'Dataset'; write 'dataset'"),
    ("folder,dataset\nrun-3,x\n", "no column model; there are folder, dataset"),
    ("model,dataset\nrun-3,\n", "row 2: dataset must not be empty"),
    ("model,accuracy\nrun-3,89 %\n", "row 2: accuracy '89 %' is no number"),
]


def test_a_table_that_is_wrong_names_its_row(here, tmp_path, tried):
    shutil.copytree(here / "runs" / "run-3", tmp_path / "run-3")
    for text, problem in WRONG_TABLES:
        (tmp_path / "models.csv").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=problem):
            open_zoo(tmp_path)
    tried(
        "a wrong row or column",
        "models.csv",
        len(WRONG_TABLES),
        "refused, the row or column named",
    )


# --- what a card claims -----------------------------------------------------------------------


def test_a_card_claims_what_is_recorded(here, monkeypatch, capsys):
    shutil.rmtree(here / "centre", ignore_errors=True)
    assert run(here, monkeypatch, capsys, "center runs --base base --out centre")[0] == 0
    card = (here / "centre" / "README.md").read_text()
    assert "fine-tuned on" not in card.split("## Members")[0]
    assert "not recorded: named so by its folder" in card and "nan" not in card
    sha256 = file_sha256(here / "base" / "model.safetensors")
    assert f"base_model_sha256: {sha256}" in card and str(here) not in card


# --- data as people have them -----------------------------------------------------------------


def same(a, b):
    return a.sha256 == b.sha256


def write_as(table, path):
    ending = path.suffix[1:]
    if ending == "parquet":
        table.to_parquet(path)
    elif ending == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")


@pytest.fixture
def tables():
    films = load_corpora("builtin", "films", n_train=60, n_test=30)["films"]
    return films.train, films.test


def read(source, *names, **columns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        corpora = load_corpora(source, list(names) or None, columns=Columns(**columns))
    return corpora, " ".join(str(w.message) for w in caught)


def test_one_file_of_any_format_is_a_dataset(tmp_path, tables):
    found = {}
    for ending in ("csv", "tsv", "jsonl", "parquet"):
        write_as(tables[0], tmp_path / f"films.{ending}")
        corpora, said = read(tmp_path / f"films.{ending}")
        found[ending] = corpora["films"]
        assert "12 of 60 rows, 20% of each class, are held out (seed 0)" in said
    assert len({c.sha256 for c in found.values()}) == 1
    assert len(found["csv"].train) == 48 and found["csv"].test.label.value_counts().std() < 2


def test_a_folder_of_files_and_folders_of_either_kind(tmp_path, tables):
    import datasets

    for name in ("both-train", "both-test"):
        write_as(tables[name.endswith("test")], tmp_path / f"{name}.csv")
    write_as(tables[0], tmp_path / "one.jsonl")
    (tmp_path / "plain").mkdir()
    for split, table in zip(("train", "dev"), tables):
        write_as(table, tmp_path / "plain" / f"{split}.parquet")
    parts = {s: datasets.Dataset.from_pandas(t) for s, t in zip(("train", "test"), tables)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    parts["train"].save_to_disk(str(tmp_path / "single"))
    (tmp_path / "families.csv").write_text("name,family\none,sentiment\nsaved,sentiment\n")
    corpora, _ = read(tmp_path)
    assert list(corpora) == ["both", "one", "plain", "saved", "single"]
    assert same(corpora["both"], corpora["plain"]) and same(corpora["one"], corpora["single"])
    assert same(corpora["both"], corpora["saved"]) and corpora["one"].family == "sentiment"
    for name in ("plain", "saved", "single"):
        assert same(read(tmp_path / name)[0][name], corpora[name])


def test_the_files_of_a_clone_of_the_hub(tmp_path, tables):
    for split, table in zip(("train", "test"), tables):
        write_as(table, tmp_path / f"{split}-00000-of-00001.parquet")
    corpus = read(tmp_path)[0][tmp_path.name]
    assert (len(corpus.train), len(corpus.test)) == (60, 30)
    for part in (0, 1):
        (tmp_path / "more").mkdir(exist_ok=True)
        write_as(tables[0], tmp_path / "more" / f"train-0000{part}-of-00002.parquet")
    with pytest.raises(ValueError, match="train-00000-of-00002.parquet: is a part of a split"):
        read(tmp_path / "more")


def test_label_names_and_hidden_labels_of_saved_datasets(tmp_path, tables):
    import datasets

    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    part = lambda t: datasets.Dataset.from_pandas(t, features=features, preserve_index=False)
    hidden = tables[1].assign(label=-1)
    splits = {"train": part(tables[0]), "test": part(hidden), "validation": part(tables[1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "films"))
    corpus = read(tmp_path / "films")[0]["films"]
    assert corpus.labels == ("bad", "good") and len(corpus.test) == 30


GUESSED = [
    ({"text": "review", "label": "sentiment"}, {}),
    ({"text": "Sentence", "label": "Label"}, {}),
    ({"text": "my words", "label": "stars"}, {"text": "my words", "label": "stars"}),
    ({"text": "content", "label": "stars"}, {"label": "stars"}),
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("names, columns", GUESSED)
def test_columns_are_named_or_guessed_and_said(tmp_path, tables, names, columns, ending):
    write_as(tables[0].assign(extra=1.5), tmp_path / f"a.{ending}")
    plain = read(tmp_path / f"a.{ending}")[0]["a"]
    write_as(tables[0].assign(extra=1.5).rename(columns=names), tmp_path / f"a.{ending}")
    corpora, said = read(tmp_path / f"a.{ending}", **columns)
    assert same(corpora["a"], plain)
    for ours, theirs in names.items():
        assert (f"takes {theirs!r} as {ours}" in said or f"{theirs!r} as {ours}" in said) == (
            ours not in columns
        )


MISSING = [
    ({}, {"label": "stars"}, "column 'stars' is missing; there are text, label, extra"),
    ({}, {"text": "Text"}, "column 'Text' is missing"),
    ({}, {"pair": "b"}, "column 'b' is missing"),
    ({"text": "x1"}, {}, "column 'text' is missing; there are x1, label, extra"),
    (
        {"text": "headline", "extra": "body"},
        {},
        "column 'text' is missing; there are headline",
    ),
    ({"label": "stars"}, {}, "column 'label' is missing; there are text, stars"),
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_column_that_is_missing_lists_those_that_are_there(tmp_path, tables, ending, tried):
    for names, columns, problem in MISSING:
        table = tables[0][["text", "label"]].assign(extra="x").rename(columns=names)
        write_as(table, tmp_path / f"a.{ending}")
        with pytest.raises(ValueError, match=f"dataset a, file a.{ending}: {problem}"):
            read(tmp_path / f"a.{ending}", **columns)
    how = "refused, those there are listed"
    tried("a column that is missing", f"{ending} files", len(MISSING), how)


def test_pairs_are_guessed_or_named(tmp_path):
    rows = load_corpora("builtin", "scenes", n_train=60, n_test=30)["scenes"].train
    assert "text_pair" in rows
    write_as(rows, tmp_path / "a.csv")
    plain = read(tmp_path / "a.csv")[0]["a"]
    for names in (["premise", "hypothesis"], ["Sentence1", "Sentence2"]):
        write_as(rows.set_axis([*names, "label"], axis=1), tmp_path / "a.csv")
        corpora, said = read(tmp_path / "a.csv")
        assert same(corpora["a"], plain) and f"{names[1]!r} as text_pair" in said
    write_as(rows.set_axis(["one", "two", "label"], axis=1), tmp_path / "a.csv")
    assert same(read(tmp_path / "a.csv", text="one", pair="two")[0]["a"], plain)


def test_separators_and_quotes(tmp_path):
    rows = [('"So" it said', "b"), ("it; said, so", "a"), ('a "b', "a"), ("c", "b")] * 5
    table = pd.DataFrame(rows, columns=["text", "label"])
    table["text"] += [f" {i}" for i in range(20)]
    whole = {}
    for name, how in {
        "comma.csv": {},
        "semicolon.csv": {"sep": ";"},
        "tab.csv": {"sep": "\t"},
        "quoted.tsv": {"sep": "\t"},
    }.items():
        table.to_csv(tmp_path / name, index=False, **how)
        whole[name] = next(iter(read(tmp_path / name)[0].values())).sha256
    lines = "".join(f"{t}\t{l}\n" for t, l in zip(table.text, table.label))
    (tmp_path / "plain.tsv").write_text("text\tlabel\n" + lines)
    whole["plain.tsv"] = next(iter(read(tmp_path / "plain.tsv")[0].values())).sha256
    assert len(set(whole.values())) == 1, whole
    (tmp_path / "torn.tsv").write_text('text\tlabel\n"a\t1\nb"\t0\nc\t1\n')
    with pytest.raises(ValueError, match="quotes make 2 rows of 3 lines"):
        read(tmp_path / "torn.tsv")


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"text,label\n", "there are no rows|column 'text' is missing"),
        (b"", "column 'text' is missing; there are none"),
        (b"text,label\na,1\nb,1\n", "only one class occurs"),
        (b"text,label\na,1\nb,0\n", "2 rows are too few to hold out"),
        (b"text,label\na,1\nb,0\nc\n", "row 3: 1 cells, but the header has 2"),
    ],
)
def test_a_file_that_cannot_be_split_is_refused(tmp_path, content, problem):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"dataset a, file a.csv.*({problem})"):
        read(tmp_path / "a.csv")


def test_no_dataset_is_an_error_and_no_empty_table(here, tmp_path, monkeypatch, capsys):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="there are no datasets"):
        read(tmp_path / "none")
    code, out, err = run(here, monkeypatch, capsys, f"zoo base --data {tmp_path}/none --list")
    assert (code, out) == (2, "") and "there are no datasets" in err
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(ValueError, match="does not end in jsonl, json, csv, tsv, parquet"):
        read(tmp_path / "a.xlsx")


def test_each_class_keeps_a_row_to_train_with(tmp_path):
    labels = [0] * 30 + [1] * 9 + [2] * 2 + [3]
    table = pd.DataFrame({"text": [f"row {i}" for i in range(42)], "label": labels})
    write_as(table, tmp_path / "a.csv")
    corpus = read(tmp_path / "a.csv")[0]["a"]
    assert corpus.train.label.value_counts().sort_index().tolist() == [24, 7, 1, 1]
    assert corpus.test.label.value_counts().sort_index().tolist() == [6, 2, 1]


# --- in Python --------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "pandas", "numpy", "sklearn", "matplotlib", "datasets"}


def test_the_package_gives_its_names_and_imports_nothing_heavy():
    code = f"""import sys, weightregions as wr
assert not {HEAVY!r} & sys.modules.keys()
names = [n for n in dir(wr) if n in wr.__all__]
assert sorted(names) == sorted(wr.__all__)
assert not {HEAVY!r} & sys.modules.keys()
from weightregions import open_zoo, plots
assert "torch" in sys.modules and wr.open_zoo is open_zoo and wr.plots is plots
try: wr.opera
except AttributeError as e: assert "no attribute 'opera'" in str(e)
else: raise SystemExit(1)"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_the_package_is_there():
    for name in weightregions.__all__:
        thing = getattr(weightregions, name)
        assert name == "__version__" or thing.__module__.startswith("weightregions.")


def test_the_words_of_the_command_line_work_in_python():
    base = open_checkpoint("minilm")
    assert base.layout.numel == 22_565_376
    from weightregions.bases import base_identity
    from weightregions.loading import load_tokenizer

    assert len(load_tokenizer("minilm")) == 30522
    assert base_identity("minilm")["name"].startswith("sentence-transformers/")


# --- snippets ---------------------------------------------------------------------------------


def snippets(*languages):
    "Every snippet of the README and of the book's prose: where it stands, and its text."
    for path in [ROOT / "README.md", *sorted((ROOT / "nbs").rglob("*.ipynb"))]:
        if path.suffix == ".md":
            texts = [path.read_text("utf-8")]
        else:
            cells = json.loads(path.read_text("utf-8"))["cells"]
            texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        for text in texts:
            for language, body in re.findall(r"```(\w*)\n(.*?)```", text, re.S):
                if language in languages:
                    yield path.relative_to(ROOT).as_posix(), body


def test_every_command_of_the_book_is_one():
    lines = []
    for where, body in snippets("", "sh", "bash"):
        body = body.replace("\\\n", " ")
        for line in body.splitlines():
            if found := re.search(r"(?:^|no-python |-- |\d )weightregions (?!==)(.*)", line):
                lines.append(found[1])
                words = shlex.split(found[1], comments=True)
                try:
                    parser().parse_args(words)
                except SystemExit:
                    pytest.fail(f"{where}: {line}")
    assert len(lines) >= 8


def test_the_snippets_of_the_readme_run_as_they_are_written():
    ran = 0
    for where, body in snippets("python"):
        if where == "README.md":
            exec(compile(body, where, "exec"), {})
            ran += 1
    assert ran
