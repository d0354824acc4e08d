"""Files as strangers have them: what two readers would read differently is refused by name, and
what one library opens whole is opened."""

import csv
import gzip
import json
import random
import warnings

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weightregions import corpora
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
        {"train.arrow": b"ARROW1", "test.xlsx": b"PK"},
        "no datasets; test.xlsx, train.arrow: only jsonl, json, csv, tsv, parquet, jsonl.gz",
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


# Quotes

ENDS = {
    "labels last": CSV,
    "labels first": TABLE[["label", "text"]].to_csv(index=False),
    "labels between": TABLE.assign(id=range(100, 140))[["id", "label", "text"]].to_csv(
        index=False
    ),
}


def strayed(content, delimiter, opens, closes):
    "A table in whose texts two quotes stand: before that of one row, behind that of another."
    lines = content.replace(",", delimiter).splitlines()
    at = lines[0].split(delimiter).index("text")
    cells = [line.split(delimiter) for line in lines]
    cells[opens][at] = '"' + cells[opens][at]
    cells[closes][at] += '"'
    return [delimiter.join(row) for row in cells]


def test_a_stray_quote_never_swallows_rows(tmp_path, tried):
    rng, n = random.Random(0), 0
    for table, content in ENDS.items():
        for ending, delimiter in (("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")):
            for end in ("\n", "\r\n", "\r"):
                opens, closes = sorted(rng.sample(range(1, 41), 2))
                lines = strayed(content, delimiter, opens, closes)
                data = (end.join(lines) + end).encode("utf-8-sig")
                here, n = tmp_path / f"{n}", n + 1
                fault = f"quotes make {40 - closes + opens} rows of 40 lines: write it as CSV"
                if ending == "csv":
                    fault = "the quote that opens a cell takes in rows: close"
                with pytest.raises(ValueError, match=f"line {opens + 1}: {fault}") as error:
                    read(here, {f"a.{ending}": data})
                assert "\n" not in str(error.value)
    tried(
        "a quote that is closed some rows later",
        "corpora",
        n,
        "refused, the line is named",
    )


UNCLOSED = {
    "at the end": (CSV + '"never closed,1\nx,0\n', r"line 42"),
    "before a quoted cell": (
        CSV.replace("bad film 2", '"bad') + '"a, b",1\n',
        r"line 4",
    ),
    "behind a backslash": (
        CSV.replace("good film 7", r'"he said \"so\""'),
        r"line 9",
    ),
    "behind a blank line": ("\n".join(["text,label", "", "x,1", '"y,0']), r"line 4"),
    "in the header": ('"text,label\nx,1\n', r"line 1"),
}


TAKEN = {
    "all rows of a class": 'text,label\nx,1\n"y,0\nz,0\nv",1\n',
    "rows of more cells": CSV.replace("film 2,", '"a,').replace("m 5,", "m, 5,"),
    "rows behind a blank line": CSV.replace("film 2,", '"a,').replace("bad film 4,", "\nb,"),
    "rows from a backslash on": CSV.replace("film 2,", r'"so \"",'),
}
TAKEN = {
    what: content.replace('bad "', '"').replace("film 9,", 'film 9",')
    for what, content in TAKEN.items()
}


def test_rows_are_missed_whatever_else_is_in_them(tmp_path, tried):
    for i, content in enumerate(TAKEN.values()):
        with pytest.raises(ValueError, match=r"line \d: the quote .* takes in rows"):
            read(tmp_path / str(i), {"a.csv": content})
    tried("a quote that takes in rows of any kind", "corpora", len(TAKEN), "the line is named")


def test_a_quote_that_is_not_closed_names_its_line(tmp_path, tried):
    for i, (what, (content, place)) in enumerate(UNCLOSED.items()):
        problem = (
            f"a.csv, {place}: a quote is not closed where its cell ends .*: close it, double"
        )
        with pytest.raises(ValueError, match=problem) as error:
            read(tmp_path / str(i), {"a.csv": content})
        assert "\n" not in str(error.value), what
    tried("a quote that is not closed", "corpora", len(UNCLOSED), "refused, the line is named")


LONG = [
    f'{i}, a review.\n\nIt was "{text}", they said;\nOh,no\n- salt, pepper\n'
    for i, (text, _) in enumerate(ROWS)
]
DIALECTS = [{}, {"sep": ";"}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\r\n"}]


def test_texts_of_several_lines_are_read_letter_by_letter(tmp_path, tried):
    table = TABLE.assign(text=LONG, label=TABLE.label.map({0: "no", 1: "yes"}))
    contents = {f"a{i}.csv": table.to_csv(index=False, **how) for i, how in enumerate(DIALECTS)}
    contents["b.tsv"] = table.to_csv(index=False, sep="\t")
    contents["c.csv"] = table[["label", "text"]].to_csv(index=False)
    contents["stars.csv"] = TABLE.assign(text=table.text + "Stars: 0,1").to_csv(index=False)
    # lines that are rows are no stray ones where every text stands in quotes
    rows = table.assign(text=[f"{text}\nOh,no" for text, _ in ROWS])
    contents["d.csv"] = rows.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    for name, corpus in read(tmp_path / "long", contents).items():
        texts = {"d": rows.text, "stars": table.text + "Stars: 0,1"}.get(name, table.text)
        assert sorted([*corpus.train.text, *corpus.test.text]) == sorted(texts), name
    tried("texts of several lines", "corpora", len(contents), "read letter by letter")


GLUE = [  # as in the files of GLUE, where a quote is a letter
    '" It was good , he said .',
    '"Never" again',
    'the so-called " art',
    'they left at 5 "',
    '""',
]


def test_quotes_are_letters_in_files_of_tabs_where_they_do_not_fit(tmp_path, tried):
    texts = GLUE + [text for text, _ in ROWS]
    lines = ["id\tsentence\tlabel", *(f"{i}\t{t}\t{i % 2}" for i, t in enumerate(texts))]
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        [corpus] = load_corpora(tmp_path).values()
    assert sorted([*corpus.train.text, *corpus.test.text]) == sorted(texts)
    [message] = [str(w.message) for w in caught if "quote" in str(w.message)]
    assert "a.tsv, line 2: " in message and "quotes are text in all rows" in message
    ragged = "\n".join([*lines[:9], "8\tno label", *lines[9:]])
    problem = r"line 2.*; with quotes as text, row 9: 2 cells, but the header has 3"
    with pytest.raises(ValueError, match=problem):
        read(tmp_path / "ragged", {"a.tsv": ragged})
    tried("lone quotes in a file of tabs", "corpora", 2, "text, the first row is named")


# Labels that differ in case


def test_labels_that_differ_in_case_are_named(tmp_path, tried):
    table = TABLE.assign(label=["Yes", "no", "yes", ' "no"'] * 10)
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "c.parquet")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = load_corpora(tmp_path)
    assert all(corpus.labels == (' "no"', "Yes", "no", "yes") for corpus in made.values())
    for file in ("a.csv", "b.jsonl", "c.parquet"):
        for pair in ("' \"no\"' and 'no'", "'Yes' and 'yes'"):
            line = f"file {file}: labels {pair} differ in case or quotes only, and are"
            assert sum(line in str(w.message) for w in caught) == 1, line
    tried("labels that differ in case or quotes only", "corpora", 6, "named with a warning")


# JSON, and files that are packed

RECORDS = TABLE.to_json(orient="records")
SAME = {
    "a.csv": CSV,
    "b.tsv": CSV.replace(",", "\t"),
    "c.jsonl": JSONL,
    "d.json": RECORDS,
    "e.json": json.dumps(json.loads(RECORDS), indent=2),
    "f.json": JSONL,
    "g.json": "\ufeff" + JSONL.replace("\n", "\r\n\r\n"),
    "h.json": f'{{"version": 1, "data": {RECORDS}}}',
    "i.parquet": parquet(pa.Table.from_pandas(TABLE)),
}
PACKED = {f"p{name}.gz": text for name, text in SAME.items() if isinstance(text, str)}
PACKED = {name: gzip.compress(text.encode()) for name, text in PACKED.items()}


def test_every_ending_gives_the_same_rows(tmp_path, tried):
    two = gzip.compress(CSV[:99].encode()) + gzip.compress(CSV[99:].encode())
    made = read(tmp_path / "all", SAME | PACKED | {"q.CSV.GZ": two})
    assert len(made) == len(SAME) + len(PACKED) + 1
    assert len({corpus.sha256 for corpus in made.values()}) == 1
    halves = {"x/train.json": RECORDS, "x/test.csv.gz": PACKED["pa.csv.gz"]}
    halves |= {"films-train.json.gz": PACKED["pd.json.gz"], "films-test.csv": CSV}
    for corpus in read(tmp_path / "halves", {"x/note.txt": "", **halves}).values():
        assert (len(corpus.train), len(corpus.test)) == (40, 40)
    tried("one table in every ending", "corpora", len(made) + 2, "the same rows")


BROKEN = {
    "a key twice": (
        RECORDS[:-1] + ',{"text":"x","label":0,"label":1}]',
        "row 41: the key 'label'",
    ),
    "a key twice in lines": (
        JSONL + '{"text":"x","label":0,"label":1}',
        "row 41: the key 'label'",
    ),
    "a key twice around rows": (
        f'{{"data": [], "data": {RECORDS}}}',
        "a.json: the key 'data' is",
    ),
    "cut short": (RECORDS[:-9], "row 40: not JSON"),
    "cut short in lines": (JSONL[:-9], "row 40: not a line of JSON"),
    "a comma too many": (RECORDS[:-1] + ",]", "row 41: not JSON"),
    "more behind the end": (RECORDS + "{}", "row 40: not JSON"),
    "two arrays": (RECORDS + RECORDS, "row 40: not JSON"),
    "a number among rows": (RECORDS[:-1] + ",3]", "row 41: a JSON int, not an object"),
    "not a number": (RECORDS[:-1] + ',{"text":"x","label":NaN}]', "row 41: label is missing"),
    "no label": (RECORDS[:-1] + ',{"text":"x"}]', "row 41: label is missing"),
    "a list as label": (RECORDS[:-1] + ',{"text":"x","label":[1]}]', "row 41: label"),
    "columns": (TABLE.to_json(), "one JSON object, no rows: write an array"),
    "columns and rows apart": (
        TABLE.to_json(orient="split"),
        "row 1: a JSON list, not an object",
    ),
    "two lists": (f'{{"data": {RECORDS}, "rows": []}}', "one JSON object, no rows"),
    "nothing": ("[ ]", "there are no rows"),
    "deep": ("[" * 100_000, "row 1: not JSON"),
    "not UTF-8": (RECORDS.encode("utf-16"), "not UTF-8 at byte"),
    "a blank that JSON does not know": ("\u00a0" + RECORDS, "row 1: not a line of JSON"),
    "a word": ("null", "a JSON NoneType, not an object"),
}


def test_broken_json_is_refused(tmp_path, tried):
    for i, (what, (content, problem)) in enumerate(BROKEN.items()):
        (tmp_path / f"{i}").mkdir()
        (file := tmp_path / f"{i}" / "a.json").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        with pytest.raises(ValueError, match=problem) as error:
            load_corpora(file)
        assert "a.json" in str(error.value) and "\n" not in str(error.value), what
    tried("a JSON file that is no table", "corpora", len(BROKEN), "refused in one line")


def test_other_json_files_of_a_folder_are_left_out(tmp_path, tried):
    others = {"names.json": '{"0": "bad", "1": "good"}', "list.json": '["bad", "good"]'}
    others |= {"config.json": json.dumps({"a": [1], "b": {"c": 2}}, indent=1)}
    for name, content in (others | {"a.csv": CSV, "b.json": RECORDS}).items():
        (tmp_path / name).write_text(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(load_corpora(tmp_path)) == ["a", "b"]
    left_out = [str(w.message) for w in caught if "is left out" in str(w.message)]
    assert len(left_out) == len(others) and all(
        any(f"{name}: does not begin as rows do" in line for line in left_out)
        for name in others
    )
    tried("a JSON file beside data", "corpora", len(others), "left out, with a warning")


ZIPPED = gzip.compress(CSV.encode())
DAMAGED = {
    "cut short": ZIPPED[:-3],
    "the head alone": ZIPPED[:12],
    "not packed": CSV.encode(),
    "more behind it": ZIPPED + b"x",
    "another sum": ZIPPED[:-8] + bytes(8),
    "changed within": ZIPPED[:40] + b"zz" + ZIPPED[42:],
}


def test_damaged_gzip_files_are_refused(tmp_path, tried):
    for i, (what, content) in enumerate(DAMAGED.items()):
        with pytest.raises(ValueError, match="file a.csv.gz: not a whole gzip file"):
            read(tmp_path / str(i), {"a.csv.gz": content})
    tried("a damaged gzip file", "corpora", len(DAMAGED), "refused in one line")


def test_a_gzip_file_is_not_unpacked_beyond_the_limit(tmp_path, monkeypatch, tried):
    monkeypatch.setattr(corpora, "MOST_MEMORY", 2**21)
    large = gzip.compress(bytes(2**24))
    kept = []
    monkeypatch.setattr(corpora.gzip, "decompress", kept.append)
    for name, content in {"a.csv.gz": large, "b.json.gz": large + large}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"file {name}: unpacks to more than 2,097,152"):
            load_corpora(tmp_path / name)
    assert not kept, "nothing was kept"
    tried("a gzip file that unpacks to very much", "corpora", 2, "refused, nothing is kept")
