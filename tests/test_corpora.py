"""Attacks on weightregions.corpora and weightregions.registry: hostile files, bad rows,
properties of draws, the hub registry."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightregions import corpora, registry
from weightregions.corpora import (
    Corpus,
    describe,
    hub_corpus,
    hub_split,
    letters,
    load_corpora,
    overlap,
)
from weightregions.registry import hub_entries, hub_names

FEW = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GOOD = [
    {"text": f"Lamp {i} is {'lit' if i % 2 else 'dark'}.", "label": i % 2} for i in range(20)
]
FRESH = [
    {"text": f"Candle {i} is {'lit' if i % 2 else 'dark'}.", "label": i % 2} for i in range(6)
]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def frame(rows):
    return pd.DataFrame(rows)


def lamps(**changes):
    "A sound corpus, with changes."
    return Corpus(
        **{
            "name": "lamps",
            "family": "General",
            "labels": ("dark", "lit"),
            "train": frame(GOOD),
            "test": frame(FRESH),
        }
        | changes
    )


def folder(root, train=GOOD, test=FRESH, listed=True, ending="jsonl", name="lamps", **entry):
    "A folder with one dataset; train and test are rows or raw bytes."
    (root / name).mkdir(parents=True, exist_ok=True)
    for stem, rows in (("train", train), ("validation", test)):
        (root / name / f"{stem}.{ending}").write_bytes(
            rows if isinstance(rows, bytes) else jsonl(rows)
        )
    if listed:
        (root / "datasets.json").write_text(
            json.dumps(
                [{"name": name, "family": "General", "label_names": ["dark", "lit"]} | entry]
            )
        )
    return root


def attempt(root):
    "Load; either a corpus or a ValueError that names the dataset."
    try:
        return load_corpora(root)["lamps"]
    except ValueError as error:
        assert "lamps" in str(error) and "\n" not in str(error), error
        return None


# Files of any bytes


@FEW
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_as_jsonl(tmp_path, blob, listed):
    attempt(folder(tmp_path, blob, listed=listed))


@FEW
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_as_csv(tmp_path, blob, header):
    root = folder(
        tmp_path,
        b"text,label\n" + blob if header else blob,
        b"text,label\na,1\nb,0\n",
        False,
        "csv",
    )
    attempt(root)


@settings(FEW, max_examples=40)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_as_parquet(tmp_path, blob, framed):
    attempt(
        folder(tmp_path, b"PAR1" + blob + b"PAR1" if framed else blob, b"", False, "parquet")
    )


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["text", "text_pair", "label", "idx"]), VALUES, max_size=4)
    | VALUES,
    max_size=6,
)


@FEW
@given(ROWS, st.booleans())
def test_any_json_rows(tmp_path, rows, listed):
    attempt(folder(tmp_path, rows, listed=listed))


@FEW
@given(
    st.lists(
        st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=2, max_size=3),
        max_size=6,
    )
)
def test_any_csv_cells(tmp_path, cells):
    import csv, io

    out = io.StringIO()
    csv.writer(out).writerows([["text", "label"], *cells])
    corpus = attempt(
        folder(tmp_path, out.getvalue().encode(), b"text,label\na,1\nb,0\n", False, "csv")
    )
    if corpus is not None:
        assert [c[0] for c in cells] == corpus.train["text"].tolist()


@FEW
@given(VALUES | st.binary(max_size=60))
def test_any_list_of_datasets(tmp_path, value):
    folder(tmp_path)
    (tmp_path / "datasets.json").write_bytes(
        value if isinstance(value, bytes) else json.dumps(value).encode()
    )
    try:
        load_corpora(tmp_path)
    except ValueError as error:
        assert "datasets.json" in str(error) or "dataset" in str(error)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_truncated_file_is_refused(tmp_path, cut):
    with pytest.raises(
        ValueError,
        match=r"dataset lamps, file train.jsonl(, row (19|20): not a line of JSON|: 19 rows)",
    ):
        load_corpora(folder(tmp_path, jsonl(GOOD)[: -cut - 1], n_train=20))


def test_a_whole_missing_line_is_noticed_by_the_count(tmp_path):
    with pytest.raises(
        ValueError, match="file train.jsonl: 19 rows, but datasets.json says 20"
    ):
        load_corpora(folder(tmp_path, GOOD[:19], n_train=20))
    with pytest.raises(
        ValueError, match="file validation.jsonl: 6 rows, but datasets.json says 7"
    ):
        load_corpora(folder(tmp_path, n_validation=7))


def test_deep_nesting_and_long_numbers(tmp_path):
    for line in (
        b"[" * 200_000,
        b'{"label": ' + b"9" * 6000 + b"}",
        b'{"text": "a", "label": 1e999}',
    ):
        with pytest.raises(ValueError, match="lamps, file train.jsonl, row 21"):
            load_corpora(folder(tmp_path, jsonl(GOOD) + line))


# Every bad row is refused, with dataset, file and row


@pytest.mark.parametrize(
    "row, says",
    [
        ({"text": "", "label": 0}, "text is empty"),
        ({"text": " \t\u00a0", "label": 0}, "text is empty"),
        ({"text": None, "label": 0}, "text is missing"),
        ({"label": 0}, "text is missing"),
        ({"text": 3, "label": 0}, "text is of type int"),
        ({"text": ["a"], "label": 0}, "text is of type list"),
        ({"text": "half \ud83d", "label": 0}, "surrogate"),
        ({"text": "a"}, "label is missing"),
        ({"text": "a", "label": 2}, "label 2 is out of range"),
        ({"text": "a", "label": -1}, "label -1 is out of range"),
        ({"text": "a", "label": 10**400}, "out of range"),
        ({"text": "a", "label": 1.0}, "label '1.0' is not among the label names dark, lit"),
        ({"text": "a", "label": True}, "label 'True' is not among the label names dark, lit"),
        ({"text": "a", "label": float("nan")}, "label is missing"),
        ({"text": "a", "label": "Lit"}, "'Lit' is not among the label names dark, lit"),
        ({"text": "a", "label": [1]}, "label .1. is not an integer"),
        ({"text": "a", "text_pair": "b", "label": 1}, "row 1: text_pair is missing"),
        ([1], "a JSON list, not an object"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_bad_row(tmp_path, row, says, split):
    rows = {"train": GOOD, "validation": FRESH}
    rows[split] = [*rows[split], row]
    at = "1" if "text_pair" in says else str(len(rows[split]))
    with pytest.raises(
        ValueError,
        match=rf"dataset lamps, file {split}.jsonl, row {at}: .*{says.split(': ')[-1]}",
    ):
        load_corpora(folder(tmp_path, rows["train"], rows["validation"]))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"train": b""}, "file train.jsonl: column 'text' is missing"),
        ({"test": b"\n\n"}, "file validation.jsonl: column 'text' is missing"),
        ({"train": [{"text": "a"}, {"text": "b"}]}, "column 'label' is missing"),
        (
            {"train": [r for r in GOOD if r["label"]]},
            "file train.jsonl: only one class occurs, 'lit'",
        ),
        (
            {"test": [r for r in FRESH if r["label"]]},
            "file validation.jsonl: only one class occurs",
        ),
        (
            {"test": [r | {"text_pair": "x"} for r in FRESH]},
            "only one of train and test has text_pair",
        ),
        (
            {
                "label_names": ["dark", "lit", "odd"],
                "test": [*FRESH, {"text": "a", "label": 2}],
            },
            "label 'odd' occurs in test but never in train",
        ),
        ({"label_names": None}, "label_names is missing"),
        ({"label_names": []}, "label_names is missing"),
        ({"label_names": "dark"}, "label_names is missing"),
        ({"label_names": ["dark", "dark"]}, "holds a name twice"),
        ({"family": 3}, "family is not a string"),
        ({"family": " "}, "family is missing"),
    ],
)
def test_bad_dataset(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        load_corpora(folder(tmp_path, **changes))
    assert "lamps" in str(caught.value)


@pytest.mark.parametrize("name", ["../lamps", "a/b", "a\\b", "/etc", "..", "", "a\n", " a"])
def test_name_with_a_path(tmp_path, name):
    folder(tmp_path)
    (tmp_path / "datasets.json").write_text(
        json.dumps([{"name": name, "label_names": ["a", "b"]}])
    )
    with pytest.raises(ValueError, match="holds no path"):
        load_corpora(tmp_path)
    with pytest.raises(ValueError, match="holds no path"):
        lamps(name=name)


def test_missing_files_folders_and_names(tmp_path):
    folder(tmp_path)
    with pytest.raises(
        ValueError, match=f"no dataset 'lamp' in {tmp_path.name}: there are lamps"
    ):
        load_corpora(tmp_path, names=["lamps", "lamp"])
    with pytest.raises(ValueError, match="no dataset 'x' in hub"):
        load_corpora("hub", names="x")
    with pytest.raises(FileNotFoundError, match="neither 'builtin' nor 'hub' nor a folder"):
        load_corpora(tmp_path / "nowhere")
    (tmp_path / "lamps" / "validation.jsonl").unlink()
    folder(tmp_path, n_validation=7)
    (tmp_path / "lamps" / "validation.jsonl").unlink()
    with pytest.raises(
        FileNotFoundError, match="dataset lamps: there is no file test or validation"
    ):
        load_corpora(tmp_path)
    (tmp_path / "lamps" / "train.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="train.jsonl and train.csv: keep one"):
        load_corpora(tmp_path)
    (tmp_path / "datasets.json").write_text(
        json.dumps([{"name": "gone", "label_names": ["a", "b"]}])
    )
    with pytest.raises(FileNotFoundError, match="dataset gone"):
        load_corpora(tmp_path)


# Layouts that work


def test_the_three_formats_give_the_same_corpus(tmp_path):
    rows = [
        r
        | {
            "text": r["text"] + ' "so",\nsaid she \u2028 caf\u00e9 \U0001f56f',
            "text_pair": f"{i}, yes",
        }
        for i, r in enumerate(GOOD)
    ]
    for ending in ("jsonl", "csv", "parquet"):
        (tmp_path / ending / "lamps").mkdir(parents=True)
        for stem, part in (("train", rows[:14]), ("test", rows[14:])):
            table, path = frame(part), tmp_path / ending / "lamps" / f"{stem}.{ending}"
            if ending == "jsonl":
                path.write_bytes(jsonl(part))
            if ending == "csv":
                table.to_csv(path, index=False, encoding="utf-8-sig")
            if ending == "parquet":
                table.set_index(table.index * 7).to_parquet(path)
    made = {
        ending: load_corpora(tmp_path / ending)["lamps"]
        for ending in ("jsonl", "csv", "parquet")
    }
    assert len({corpus.sha256 for corpus in made.values()}) == 1
    assert (
        made["csv"].train["text"].tolist() == [r["text"] for r in rows[:14]]
        and made["csv"].pair
    )
    assert made["csv"].labels == ("0", "1") and made["csv"].family == "unknown"


def test_string_labels_families_and_order(tmp_path):
    names = [r | {"label": ["low", "high"][r["label"]]} for r in GOOD]
    for name in ("b", "a"):
        folder(tmp_path, names, names[:6], False, name=name)
    (tmp_path / "families.csv").write_text("name,family\na,Topic\n")
    with warnings.catch_warnings(record=True) as said:
        made = load_corpora(tmp_path)
    assert [str(w.message) for w in said] == [
        f"dataset {name}: 6 of 6 test rows are training rows too" for name in "ab"
    ]
    assert list(made) == ["a", "b"] and [c.family for c in made.values()] == [
        "topic",
        "unknown",
    ]
    assert made["a"].labels == ("high", "low") and made["a"].train["label"].tolist() == [
        1 - r["label"] for r in GOOD
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(load_corpora(tmp_path, names=["b", "a"])) == ["b", "a"] and list(
            load_corpora(tmp_path, names="b")
        ) == ["b"]


def test_label_numbers_are_never_mistaken_for_places(tmp_path):
    five = [r | {"label": r["label"] + 5} for r in GOOD]
    made = load_corpora(
        folder(tmp_path, five, [r | {"label": r["label"] + 5} for r in FRESH], False)
    )["lamps"]
    assert made.labels == ("5", "6") and set(made.train["label"]) == {0, 1}
    with pytest.raises(ValueError, match="row 1: label '0' is not among the label names 5, 6"):
        load_corpora(folder(tmp_path, five, FRESH, False))


def test_a_training_label_may_be_absent_from_test():
    corpus = lamps(
        labels=("dark", "lit", "odd"), train=frame([*GOOD, {"text": "What lamp?", "label": 2}])
    )
    assert len(corpus.labels) == 3


# The corpus


def test_digest_does_not_depend_on_index_dtype_or_extra_columns():
    one = lamps()
    for change in (
        lambda t: t.set_index(np.arange(len(t)) * 3 + 5),
        lambda t: t.astype(object),
        lambda t: t.assign(idx=1),
        lambda t: t[["label", "text"]],
        lambda t: t.astype({"label": "int8"}),
        lambda t: t.astype({"text": "string"}),
    ):
        assert lamps(train=change(frame(GOOD)), test=change(frame(FRESH))).sha256 == one.sha256
    assert (
        lamps(labels=("lit", "dark")).sha256 != one.sha256
        and lamps(train=frame(GOOD[::-1])).sha256 != one.sha256
    )
    assert lamps(train=frame(GOOD + FRESH[:2]), test=frame(FRESH[2:])).sha256 != one.sha256
    assert one.sha256 == "35b02f3706e081b77ebb135499df160d0080efbd74f6c8cfbadb27692e95c674"


def test_the_callers_frames_stay_as_they_were():
    mine = frame(GOOD).set_index(np.arange(20) + 100)
    before = mine.copy()
    corpus = lamps(train=mine)
    corpus.train.loc[0, "text"] = "changed"
    pd.testing.assert_frame_equal(mine, before)


def test_a_corpus_is_frozen():
    with pytest.raises(AttributeError):
        lamps().name = "x"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(0, 5), st.data())
def test_draws_are_nested_and_stratified(sizes, seed, data):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    large = data.draw(st.integers(1, len(y)))
    small = data.draw(st.integers(1, large))
    kept, fewer = corpora.draw(y, large, seed), corpora.draw(y, small, seed)
    assert len(kept) == large == len(set(kept)) and set(fewer) <= set(kept)
    counts = np.bincount(y[kept], minlength=len(sizes))
    assert (counts <= np.array(sizes) * large / len(y) + 1).all()
    if large >= len(sizes):
        assert counts.min() >= 1
    assert (kept == corpora.draw(y, large, seed)).all()


def test_subsample():
    corpus = lamps()
    small, large = corpus.subsample(4, seed=3), corpus.subsample(12, seed=3)
    assert (
        set(small.train["text"]) < set(large.train["text"])
        and small.train["label"].tolist().count(1) == 2
    )
    assert (
        small.test.equals(corpus.test)
        and small.sha256
        == corpus.subsample(4, seed=3).sha256
        != corpus.subsample(4, seed=4).sha256
    )
    assert corpus.subsample(20).sha256 == corpus.sha256
    for n, says in (
        (21, "21 training rows asked for, there are 20"),
        (1, "cannot hold its 2 classes"),
        (0, "cannot hold"),
        (-3, "cannot hold"),
    ):
        with pytest.raises(ValueError, match=says):
            corpus.subsample(n)


def test_letters_and_overlap():
    assert letters("It 's  NOT, n't caf\u00e9!") == letters("it's not; n't Cafe\u0301")
    assert letters("\U0001f56f\U0001f56f") != letters("\U0001f56f") and letters(
        "a b"
    ) != letters("a c")
    loud = lamps(
        name="loud",
        train=frame([r | {"text": r["text"].upper().replace(" ", "  ")} for r in GOOD]),
        test=frame([r | {"text": "x" + r["text"]} for r in FRESH]),
    )
    assert overlap(lamps(), loud) == overlap(loud, lamps()) == 20 and overlap(loud, loud) == 26
    pairs = lamps(
        name="pairs",
        train=frame(
            [{"text": "New.", "text_pair": r["text"], "label": r["label"]} for r in GOOD]
        ),
        test=frame(
            [{"text": "Newer.", "text_pair": r["text"], "label": r["label"]} for r in FRESH]
        ),
    )
    assert overlap(lamps(), pairs) == 26 and corpora.shared_rows(pairs) == 0


def test_describe():
    table = describe({"lamps": lamps()})
    assert table.columns.tolist() == [
        "name",
        "family",
        "classes",
        "n_train",
        "n_test",
        "majority",
        "words",
    ]
    assert table.iloc[0].tolist() == ["lamps", "general", 2, 20, 6, 0.5, 4]


# The hub

FIELDS = {
    "id",
    "config",
    "revision",
    "train",
    "dev",
    "test",
    "rows",
    "text",
    "label",
    "label_names",
    "tokens",
    "licence",
}


def test_registry_holds_the_authors_list_without_stsb():
    entries, listed = hub_entries(), [e for e in hub_entries().values() if e["authors"]]
    lines = (registry.files("weightregions") / "hub_datasets.json").read_text("utf-8")
    assert len(entries) == len(json.loads(lines)) == lines.count("\n") - 2
    assert len(listed) == 35 == len({e["authors"] for e in listed}) and "stsb" not in {
        e["authors"] for e in listed
    }
    assert {e["authors"]: e["family"] for e in listed} == {
        **dict.fromkeys("cola mrpc qqp boolq cb copa multirc wic wsc".split(), "general"),
        **dict.fromkeys(
            "ag_news isear yahoo_answers dbpedia 20_newsgroup trec_fine trec_coarse".split(),
            "topic",
        ),
        **dict.fromkeys(
            (
                "poem_sentiment imdb rotten_tomatoes sst_5bins sst2 amazon_reviews_multi"
                " financial_phrasebank"
            ).split(),
            "sentiment",
        ),
        **dict.fromkeys(
            (
                "tweet_ev_emoji tweet_ev_emotion tweet_ev_hate tweet_ev_irony"
                " tweet_ev_offensive tweet_ev_sentiment"
            ).split(),
            "twitter",
        ),
        **dict.fromkeys("mnli qnli rte wnli esnli anli".split(), "nli"),
    }


@pytest.mark.parametrize("name", hub_entries())
def test_registry_entry(name):
    entry = hub_entries()[name]
    corpora.check_name(name)
    corpora.check_labels(entry["label_names"], name)
    assert (
        entry["id"].count("/") == 1
        and entry["licence"]
        and entry["train"]
        and entry["text"]
        and entry["label"]
    )
    assert len(entry["label_names"]) >= 2 and set(entry["train"]).isdisjoint(entry["test"])
    assert entry["revision"] in (None, "refs/convert/parquet") or (
        len(entry["revision"]) == 40 and int(entry["revision"], 16)
    )
    assert (
        entry["id"] not in ("nyu-mll/glue", "aps/super_glue")
        or entry["test"][0].startswith("validation")
        or name == "mrpc"
    )
    assert (
        set(entry["train"] + entry["test"]).isdisjoint(entry["dev"])
        and list(entry["rows"]) == entry["train"] + entry["dev"] + entry["test"]
    )
    assert (
        all(isinstance(n, int) and n > 0 for n in entry["rows"].values())
        and 5 <= entry["tokens"] <= 250
    )
    assert bool(entry["authors"]) == (entry["published"] is not None) and (
        entry["published"] is None or 40 < entry["published"] < 100
    )
    said = [field for fields in entry["checked"].values() for field in fields]
    fields = FIELDS | ({"published"} if entry["authors"] else set())
    assert (
        set(said) == fields
        and len(said) == len(fields)
        and set(entry["checked"])
        <= {
            "seen",
            "measured",
            "remembered",
            "estimated",
            "chosen",
            "doubtful",
            "branch",
            "short",
        }
    )
    assert ("revision" in entry["checked"]["seen"]) == (len(entry["revision"] or "") == 40), (
        "seen is what is pinned"
    )
    assert "tokens" in entry["checked"].get("measured", []) + entry["checked"].get(
        "estimated", []
    )


def test_hidden_labels_are_never_tested_on():
    "GLUE and SuperGLUE hide the labels of test, but for MRPC; what tests is never trained on."
    for name, entry in hub_entries().items():
        hidden = entry["id"] in ("nyu-mll/glue", "aps/super_glue") and name != "mrpc"
        assert not hidden or (
            entry["dev"] == [] and not any(split.startswith("test") for split in entry["test"])
        ), name


def test_extras_of_the_issue_are_there():
    assert {
        "snli",
        "scitail",
        "sick",
        "cr",
        "mpqa",
        "subj",
        "yelp_polarity",
        "yelp_full",
        "amazon_polarity",
    } | {
        f"tweet_stance_{about}" for about in "abortion atheism climate feminist hillary".split()
    } == set(hub_names(extras=True)) - set(hub_names())


def test_published_figures_average_to_the_published_average():
    "76.22 over the 36, STS-B's 89.9 among them; each is rounded to a tenth."
    figures = [hub_entries()[name]["published"] for name in hub_names()]
    assert abs((sum(figures) + 89.9) / 36 - 76.22) < 0.05


def test_stsb_is_refused_with_its_reason(monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("nothing may be loaded")
    )
    for ask in (
        lambda: load_corpora("hub", ["rte", "stsb"]),
        lambda: registry.hub_sizes("stsb"),
        lambda: registry.entry_of("stsb"),
    ):
        with pytest.raises(
            ValueError, match="^dataset stsb: left out of the registry: it predicts a number"
        ):
            ask()


@given(st.integers(3, 10**7))
def test_dev_rows(n):
    at = registry.dev_rows(n)
    assert (
        len(set(at)) == len(at) == 2 * max(1, min(n // 20, 500))
        and at[0] == 0
        and at[-1] == n - 1
        and list(at) == sorted(at)
    )
    assert sorted(n - 1 - at) == list(at), "as many from either end"


@pytest.mark.parametrize("name", hub_entries())
def test_dev_part_is_held_back(name):
    entry = hub_entries()[name]
    data = stand_in(entry, 100)
    corpus, dev = hub_split(entry, data)
    columns = [c for c in ("text", "text_pair") if c in corpus.train]
    texts = {
        part: set(map(tuple, rows[columns].to_numpy()))
        for part, rows in (("train", corpus.train), ("dev", dev), ("test", corpus.test))
    }
    assert not texts["dev"] & texts["train"] and not texts["dev"] & texts["test"] and len(dev)
    trained, rows = (
        sum(len(data[s]) for s in entry["train"]),
        len(corpus.train) + len(dev) + len(corpus.test),
    )
    assert rows == trained + sum(len(data[s]) for s in entry["dev"] + entry["test"])
    assert (
        list(dev.columns) == list(corpus.train.columns)
        and dev["label"].dtype == "int64"
        and dev["label"].between(0, len(corpus.labels) - 1).all()
    )
    if not entry["dev"] and entry["test"]:
        first = entry["text"][0]
        assert dev["text"].iloc[0].startswith(f"{entry['train'][0]} {first} 0") and len(
            dev
        ) == len(registry.dev_rows(trained))


def test_dev_labels_are_checked():
    import datasets

    entry = hub_entries()["esnli"]
    data = stand_in(entry)
    features = data["validation"].features.copy()
    features["label"] = datasets.Value("int32")
    data["validation"] = (
        data["validation"]
        .cast(features)
        .map(lambda row, i: row | {"label": 7 if i == 5 else row["label"]}, with_indices=True)
    )
    with pytest.raises(ValueError, match="dataset esnli, dev: label 7 is out of range"):
        hub_split(entry, data)


def test_against_published():
    models = pd.DataFrame({"dataset": ["mnli", "mnli", "weather"], "accuracy": [0.8, 0.9, 0.5]})
    table = registry.against_published(models)
    assert table.index.tolist() == ["mnli"] and table.loc["mnli"].tolist() == pytest.approx(
        [2, 85, 87.0, -2]
    )
    with pytest.raises(ValueError, match="none of the datasets weather"):
        registry.against_published(models[2:])
    with pytest.raises(ValueError, match="no column 'dataset'"):
        registry.against_published(models.drop(columns="dataset"))


def test_registry_alone_is_light():
    "The facts can be read without torch, transformers or datasets."
    code = (
        "import sys, weightregions.registry as r; r.hub_table(); print({'torch',"
        " 'transformers', 'datasets'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def stand_in(entry, n=60):
    """A real DatasetDict with the columns, label names and splits of an entry, and sentences of
    our own."""
    import datasets

    labels, textual = entry["label_names"], entry["name"] in ("isear", "scitail")
    kind = datasets.Value("string") if textual else datasets.ClassLabel(names=labels)
    columns = entry["text"] + entry["text_pair"]
    features = datasets.Features(
        {c: datasets.Value("string") for c in columns}
        | {entry["label"]: kind, "idx": datasets.Value("int32")}
    )
    n = max(n, 3 * len(labels))
    rows = lambda split: (
        {c: [f"{split} {c} {i}" for i in range(n)] for c in columns}
        | {
            entry["label"]: [
                labels[i % len(labels)] if textual else i % len(labels) for i in range(n)
            ],
            "idx": list(range(n)),
        }
    )
    return datasets.DatasetDict(
        {s: datasets.Dataset.from_dict(rows(s), features=features) for s in entry["rows"]}
    )


@pytest.mark.parametrize("name", hub_entries())
def test_every_entry_reads_its_columns(name, monkeypatch):
    import datasets

    entry, asked = hub_entries()[name], []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return stand_in(entry)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", f"dataset {name}: the revision of .* is not pinned")
        corpus = load_corpora("hub", names=[name])[name]
    assert asked == [((entry["id"], entry["config"]), {"revision": entry["revision"]})]
    assert (
        corpus.family == entry["family"]
        and corpus.labels == tuple(entry["label_names"])
        and corpus.pair == bool(entry["text_pair"])
    )
    first = corpus.train["text"][0]
    assert first.count(corpora.SEP) == len(entry["text"]) - 1 and first.startswith(
        f"{entry['train'][0]} {entry['text'][0]}"
    )
    assert entry["id"] in corpus.source and (entry["revision"] or "main")[:12] in corpus.source
    if entry["test"]:
        assert len(corpus.test) == len(entry["test"]) * len(stand_in(entry)[entry["test"][0]])
    else:
        assert not set(corpus.train["text"]) & set(corpus.test["text"])


def test_hub_all_means_the_authors(monkeypatch):
    import datasets

    by_place = {}
    for e in hub_entries().values():
        by_place.setdefault((e["id"], e["config"]), []).append(e)

    def load_dataset(place, config, revision=None):
        found = by_place[place, config]
        made = stand_in(found[0])
        for e in found[1:]:
            for split in made:
                made[split] = (
                    made[split]
                    .add_column(
                        e["label"], [i % len(e["label_names"]) for i in range(len(made[split]))]
                    )
                    .cast_column(e["label"], datasets.ClassLabel(names=e["label_names"]))
                )
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert set(load_corpora("hub")) == {
        name for name, e in hub_entries().items() if e["authors"]
    }


def test_hub_rows_without_text_or_label():
    import datasets

    entry = hub_entries()["snli"]
    data = stand_in(entry, 100)
    spoil = lambda bad: lambda row, i: row | ({"label": -1} if i in bad else {})
    holes = datasets.DatasetDict(
        {split: rows.map(spoil({3, 7}), with_indices=True) for split, rows in data.items()}
    )
    with warnings.catch_warnings(record=True) as said:
        corpus = hub_corpus(entry, holes)
    assert [str(w.message) for w in said] == [
        f"dataset snli, {split}: 2 of 100 rows lack a text or a label and are left out"
        for split in ("train", "test", "validation")
    ]
    assert len(corpus.train) == len(corpus.test) == 98
    worse = datasets.DatasetDict(
        {split: rows.map(spoil(range(20)), with_indices=True) for split, rows in data.items()}
    )
    with pytest.raises(ValueError, match="dataset snli, train: 20 of 100 rows lack"):
        hub_corpus(entry, worse)
    empty = datasets.DatasetDict(
        {
            split: rows.map(
                lambda row, i: row | ({"premise": [None, " "][i % 2]} if i < 2 else {}),
                with_indices=True,
            )
            for split, rows in data.items()
        }
    )
    with pytest.warns(UserWarning, match="2 of 100"):
        assert len(hub_corpus(entry, empty).train) == 98


def test_hub_label_names_of_the_hub_win():
    import datasets

    entry = hub_entries()["rte"]
    data = stand_in(entry).cast_column(
        "label", datasets.ClassLabel(names=["not_entailment", "entailment"])
    )
    with pytest.warns(UserWarning, match="the hub names its labels not_entailment, entailment"):
        corpus = hub_corpus(entry, data)
    assert corpus.labels == ("not_entailment", "entailment")


def test_hub_failures_name_the_dataset(monkeypatch):
    import datasets

    entry = hub_entries()["rte"]
    with pytest.raises(ValueError, match="dataset rte: no split 'validation', there are train"):
        hub_corpus(entry, {"train": stand_in(entry)["train"]})
    with pytest.raises(ValueError, match="dataset rte, split train: no column 'sentence2'"):
        hub_corpus(entry, stand_in(entry).remove_columns("sentence2"))

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no way\nout")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        OSError,
        match="^dataset rte: nyu-mll/glue could not be loaded: ConnectionError: no way$",
    ):
        load_corpora("hub", ["rte"])


def test_parquet_branch_layout_reads_without_a_config(tmp_path, monkeypatch):
    "The hub's own conversions have one folder a split and no card."
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    entry = hub_entries()["trec_fine"]
    for split, rows in stand_in(entry).items():
        (tmp_path / "trec/default" / split).mkdir(parents=True)
        rows.to_parquet(tmp_path / "trec/default" / split / "0000.parquet")
    corpus = corpora.from_hub(entry | {"id": str(tmp_path / "trec")})
    assert (
        corpus.labels == tuple(entry["label_names"])
        and corpus.sha256 == hub_corpus(entry, stand_in(entry)).sha256
    )


# Built in


def test_builtin():
    name, *_ = corpora.BUILTIN
    one = load_corpora("builtin", [name], seed=1, n_train=40, n_test=20)[name]
    assert (len(one.train), len(one.test), one.source) == (40, 20, "builtin, seed 1")
    assert (
        one.sha256
        == load_corpora("builtin", [name], seed=1, n_train=40, n_test=20)[name].sha256
        != load_corpora("builtin", [name], seed=2, n_train=40, n_test=20)[name].sha256
    )
    with pytest.raises(ValueError, match="no dataset 'x' in builtin"):
        load_corpora("builtin", ["x"])


def test_at_most_keeps_the_rows_that_a_target_draws():
    from weightregions.probing import _rows

    corpus = load_corpora("builtin", names=["films"], n_train=40, n_test=30)["films"]
    few = corpora.at_most(corpus, 30, 12)
    for split, n in (("train", 30), ("test", 12)):
        pd.testing.assert_frame_equal(
            getattr(few, split), _rows(corpus, split, n, 0).reset_index(drop=True)
        )
    assert corpora.at_most(corpus, 1000) is corpus
