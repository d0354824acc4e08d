"""Files as strangers have them: what two readers would read differently is refused by name, and
what one library opens whole is opened."""

import json
import warnings

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weightregions.corpora import Columns, load_corpora

ROWS = [(f"{'good' if i % 2 else 'bad'} film {i}", i % 2) for i in range(40)]
TABLE = pd.DataFrame(ROWS, columns=["text", "label"])
CSV = TABLE.to_csv(index=False)
WORDS = TABLE.assign(label=TABLE.label.map({0: "no", 1: "yes"})).to_csv(index=False)
JSONL = "".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in ROWS)


def read(folder, files):
    "The datasets of a folder with these files."
    folder.mkdir()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_corpora(folder)


def parquet(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def listed(entry):
    return {"datasets.json": f"[{entry}]", "x/train.csv": CSV, "x/test.csv": CSV}


RATINGS = TABLE.assign(label=[round(i % 12 * 0.37, 2) for i in range(40)]).to_csv(index=False)
TWO_THINGS = {
    "a key twice in a line": (
        {"a.jsonl": JSONL + '{"text": "x", "label": 0, "label": 1}\n'},
        "file a.jsonl, row 41: the key 'label' is there twice",
    ),
    "a key twice in a line, deep": (
        {"a.jsonl": JSONL + '{"text": "x", "label": 0, "by": {"n": 1, "n": 1}}\n'},
        "file a.jsonl, row 41: the key 'n' is there twice",
    ),
    "a key twice in the list": (
        listed('{"name": "x", "label_names": ["a", "b"], "label_names": ["b", "a"]}'),
        "datasets.json: the key 'label_names' is there twice",
    ),
    "a blank behind a label": (
        {"a.csv": WORDS.replace("film 7,yes", "film 7,yes ")},
        "dataset a: labels 'yes' and 'yes ' look the same but differ",
    ),
    "a blank behind a number": (
        {"a.jsonl": JSONL + '{"text": "x", "label": "1 "}\n'},
        "dataset a: labels '1' and '1 ' look the same",
    ),
    "a blank that is none": (
        {"a.tsv": WORDS.replace(",", "\t").replace("film 7\tyes", "film 7\tyes\u00a0")},
        r"labels 'yes' and 'yes\\xa0' look the same",
    ),
    "accents in two ways": (
        {"a.csv": WORDS.replace("yes", "\u00e9").replace("7,\u00e9", "7,e\u0301")},
        "look the same but differ",
    ),
    "a mark that is not seen": (
        {"a.csv": WORDS.replace("film 7,yes", "film 7,\ufeffyes")},
        "look the same but differ",
    ),
    "two files put together": ({"a.csv": CSV + CSV}, "row 41: repeats the header"),
    "measurements as labels": ({"a.csv": RATINGS}, "12 labels such as 0.37 are measurements"),
    "a column twice": (
        {"a.csv": "text,label,label\nx,1,0\n"},
        "file a.csv: the header holds a name twice, 'label'",
    ),
    "splits that both test": (
        {"test.csv": CSV, "validation.csv": CSV},
        "there is test.csv, but no file train",
    ),
    "the same split in two cases": (
        {"train.csv": CSV, "Train.csv": CSV, "test.csv": CSV},
        "Train.csv and train.csv: keep one of them|train.csv and Train.csv: keep one of them",
    ),
    "no rows in Parquet": (
        {"a.parquet": parquet(pa.Table.from_pandas(TABLE[:0]))},
        "dataset a, file a.parquet: there are no rows",
    ),
    "no rows in CSV": ({"a.csv": "text,label\n"}, "file a.csv: there are no rows"),
    "a column with a blank": (
        {"a.csv": CSV.replace("text,label", "text, label")},
        "column 'label' is missing; there are text, ' label'",
    ),
    "only files that are not read": (
        {"train.json": JSONL, "test.xlsx": b"PK"},
        "there are no datasets; test.xlsx, train.json: only jsonl, csv, tsv, parquet are read",
    ),
}


def test_files_that_say_two_things_or_nothing_are_refused(tmp_path, tried):
    for i, (fault, (files, problem)) in enumerate(TWO_THINGS.items()):
        with pytest.raises((ValueError, FileNotFoundError), match=problem) as error:
            read(tmp_path / str(i), files)
        assert "\n" not in str(error.value), fault
    how = "refused in one line that names file, row or label"
    tried("files that say two things, or nothing", "corpora", len(TWO_THINGS), how)


@pytest.mark.parametrize("part", ["label", "pair"])
def test_one_column_is_not_two_things(tmp_path, part, tried):
    TABLE.to_csv(tmp_path / "a.csv", index=False)
    columns = Columns(**{"text": "text", part: "text"})
    problem = "a, file a.csv: column 'text' cannot be two things"
    with pytest.raises(ValueError, match=problem):
        load_corpora(tmp_path / "a.csv", columns=columns)
    tried(f"the texts named as {part} too", "corpora", 1, "refused in one line")


def test_splits_of_saved_data_that_name_their_labels_differently(tmp_path, tried):
    import datasets

    def part(*names):
        kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        return datasets.Dataset.from_pandas(TABLE, features=datasets.Features(kinds))

    parts = {"train": part("bad", "good"), "test": part("good", "bad")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "films"))
    problem = r"films: the label names of train \(bad, good\) and test \(good, bad\) differ"
    with pytest.raises(ValueError, match=problem):
        load_corpora(tmp_path / "films")
    how = "refused in one line that names both"
    tried("label names that differ from split to split", "corpora", 1, how)


BOTH = [("Train.csv", "Test.csv"), ("train.CSV", "TEST.csv"), ("TRAIN.jsonl", "Dev.jsonl")]
BOTH += [("training.csv", "testing.csv"), ("train_films.csv", "test_films.csv")]
BOTH += [("films_Train.csv", "films_Valid.csv"), ("train.csv", "Validation.csv")]
EDGES = {
    "empty columns": "text,label,,\n" + "".join(f"{t},{y},,\n" for t, y in ROWS),
    "lines of old": CSV.replace(",", ";").replace("\n", "\r"),
    "halves": TABLE.assign(label=TABLE.label / 2).to_csv(index=False),
}


def test_splits_are_found_whatever_the_case(tmp_path, tried):
    for i, (train, test) in enumerate(BOTH):
        of = {name: JSONL if name.endswith("jsonl") else CSV for name in (train, test)}
        [corpus] = read(tmp_path / str(i), of).values()
        assert (len(corpus.train), len(corpus.test)) == (40, 40), (train, test)
    for name, content in EDGES.items():
        [corpus] = read(tmp_path / name, {"a.csv": content}).values()
        assert (len(corpus.train), len(corpus.test)) == (32, 8), name
    alone = read(tmp_path / "alone", {"train_stations.csv": CSV, "test_of_time.csv": CSV})
    assert sorted(alone) == ["test_of_time", "train_stations"]
    n = len(BOTH) + len(EDGES) + 1
    tried("files in other spellings", "corpora", n, "one dataset, its splits told apart")
