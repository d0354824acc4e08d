"""Attacks on the built-in corpora: determinism, leaks between splits, ill-formed texts,
contradictory labels."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from weightregions.builtin import BUILTIN, MAX_ROWS, Slot, Spec, generate, parse, polish, tree

NAMES = list(BUILTIN)
each_dataset = pytest.mark.parametrize("name", NAMES)


@cache
def written(name, seed=0):
    "Rows of both splits, written once for all tests: 1,500 and 600."
    return generate(name, 1500, 600, seed)


def sides(row):
    "The texts of a row."
    return [row[key] for key in ("text", "text_pair") if key in row]


def digest(names, seed):
    "A checksum of all rows of some datasets."
    return hashlib.sha256(
        json.dumps([generate(name, 200, 60, seed) for name in names]).encode()
    ).hexdigest()


def test_families_and_classes():
    families = Counter(spec.family for spec in BUILTIN.values())
    assert (
        set(families) == {"sentiment", "topic", "nli", "social"} and min(families.values()) >= 3
    )
    assert {len(spec.labels) for spec in BUILTIN.values()} >= {2, 3, 4, 5, 6}
    assert all(0 < spec.noise <= 0.1 for spec in BUILTIN.values())


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_the_same_rows_in_every_process(hash_seed):
    code = (
        "import hashlib, json; from weightregions.builtin import BUILTIN, generate;"
        "rows = [generate(n, 200, 60, 3) for n in BUILTIN];"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == digest(NAMES, 3)


def test_the_global_generator_is_left_alone():
    random.seed(7)
    before = random.getstate()
    first = digest(NAMES[:3], 0)
    assert random.getstate() == before
    random.seed(8)
    assert digest(NAMES[:3], 0) == first


def test_the_package_imports_no_torch_for_text():
    code = (
        "import sys, weightregions.builtin;"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        == ["False"] * 2
    )


@each_dataset
def test_no_sentence_is_shared_by_any_two_splits(name):
    drawn = [written(name), *(generate(name, 200, 150, seed) for seed in range(1, 4))]
    train = {row["text"].casefold() for rows, _ in drawn for row in rows}
    test = {row["text"].casefold() for _, rows in drawn for row in rows}
    assert not train & test
    squeezed = [{re.sub(r"\W+", " ", text) for text in split} for split in (train, test)]
    assert len(squeezed[0] & squeezed[1]) <= 0.01 * len(
        test
    )  # even without punctuation, hardly one
    for rows in (rows for pair in drawn for rows in pair):
        assert len({row["text"] for row in rows}) == len(rows)


@each_dataset
def test_labels_are_in_range_and_all_there(name):
    spec = BUILTIN[name]
    for rows in written(name):
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(range(len(spec.labels)))
        assert all(type(row["label"]) is int for row in rows)
        assert max(counts.values()) < 3 * min(counts.values())


@each_dataset
def test_texts_are_well_formed(name):
    spec = BUILTIN[name]
    for row in (row for rows in written(name) for row in rows):
        assert set(row) == {"text", "label"} | (
            {"text_pair"} if spec.family == "nli" else set()
        )
        for text in sides(row):
            assert text and text == text.strip() and text.isascii(), row
            assert not re.search(r"[{}|<>;=]|//|  | [,.:?!]|[,:]$|\.\.|[?!]\.", text), row
            assert re.search(r"[a-z]{2}", text)
            if not spec.casual:
                assert text[0].isupper() or text[0].isdigit(), row
                assert text[-1] in ".?!", row


@each_dataset
def test_articles_agree(name):
    vowel_but_consonant_sound = r"(?:one\b|once|uni[tvqfo]|us[eu]|eu)"
    for row in (row for rows in written(name) for row in rows):
        for text in sides(row):
            assert not re.search(
                rf"\b[Aa] (?!{vowel_but_consonant_sound})[aeiouAEIOU]", text
            ), text
            assert not re.search(r"\b[Aa]n (?!hour|honest)[^aeiouAEIOU]", text), text
            assert not re.search(rf"\b[Aa]n {vowel_but_consonant_sound}", text), text
            assert not re.search(r"\b(\w+) \1\b", text, re.I), text  # no word twice in a row


@each_dataset
def test_a_text_never_changes_its_label(name):
    labels = {}
    for rows in (
        *written(name),
        *generate(name, 600, 150, seed=1),
        *generate(name, 600, 150, seed=2),
    ):
        for row in rows:
            labels.setdefault(tuple(sides(row)), set()).add(row["label"])
    assert sum(len(found) > 1 for found in labels.values()) == 0


@each_dataset
def test_noise_is_as_stated_in_both_splits(name):
    spec = BUILTIN[name]
    for noisy, clean in zip(written(name), generate(name, 1500, 600, noise=0)):
        wrong = sum(a["label"] != b["label"] for a, b in zip(noisy, clean)) / len(noisy)
        assert [sides(row) for row in noisy] == [sides(row) for row in clean]
        assert abs(wrong - spec.noise) < 4 * (spec.noise * (1 - spec.noise) / len(noisy)) ** 0.5
    everything_wrong = generate(name, 100, 0, noise=1)[0]
    assert all(
        a["label"] != b["label"]
        for a, b in zip(everything_wrong, generate(name, 100, 0, noise=0)[0])
    )


@each_dataset
def test_held_out_words_stay_out_of_training(name):
    spec = BUILTIN[name]

    def vocabulary(rows):
        return {
            word
            for row in rows
            for text in sides(row)
            for word in re.findall(r"[a-z]+", text.lower())
        }

    train, test = written(name)
    new = vocabulary(test) - vocabulary(train)
    assert len(new) >= 8
    touched = sum(bool(vocabulary([row]) & new) for row in test) / len(test)
    assert 0.1 < touched < 0.95
    assert spec.held_out and not set(spec.held_out) & {
        way for ways in spec.rules("train").values() for way in ways
    }


@each_dataset
def test_every_slot_has_a_rule_and_every_rule_a_use(name):
    spec = BUILTIN[name]
    used, remembered = set(spec.labels), set()

    def walk(branch):
        for part in branch:
            if isinstance(part, Slot):
                used.add(part.rule)
                remembered.add(part.name)
            elif isinstance(part, list):
                for option in part:
                    walk(option)

    rules = parse(spec.grammar)
    for shared, held_out in rules.values():
        assert shared, "a rule needs a way that training may use"
        for way in shared + held_out:
            walk(tree(way))
    assert used - remembered <= set(rules) <= used
    assert not remembered & set(rules), "a name remembered must not hide a rule"


@each_dataset
def test_more_rows_append_and_thousands_can_be_had(name):
    short, long = generate(name, 50, 30), written(name)
    assert short == (long[0][:50], long[1][:30]), "more rows only append"
    assert generate(name, 0, 0) == ([], [])
    train, test = generate(name, 3500, 700, seed=9)
    assert (len(train), len(test)) == (3500, 700)


@pytest.mark.parametrize(
    "name", ["stays", "emotion"]
)  # the two grammars that repeat themselves most
def test_the_ceiling_is_reached(name):
    train, test = generate(name, MAX_ROWS, MAX_ROWS // 4)
    assert len({row["text"] for row in train}) == MAX_ROWS and len(test) == MAX_ROWS // 4


@pytest.mark.parametrize(
    "n_train, n_test, culprit",
    [(-1, 5, "-1 train"), (5, -2, "-2 test"), (MAX_ROWS + 1, 0, "train"), (0, 10**12, "test")],
)
def test_bad_sizes_are_refused(n_train, n_test, culprit):
    with pytest.raises(ValueError, match=f"scenes: .*{culprit}"):
        generate("scenes", n_train, n_test)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'nope'.*" + ", ".join(NAMES)):
        generate("nope", 1, 1)


def test_a_small_grammar_runs_dry_with_an_error(monkeypatch):
    monkeypatch.setitem(
        BUILTIN,
        "toy",
        Spec("topic", ("a", "b"), "", "a: {x} one.\nb: {x} two.\nx: {p|q|r|s|t|u}"),
    )
    with pytest.raises(ValueError, match="toy: 100 train rows asked, this grammar gives about"):
        generate("toy", 100, 0)


@pytest.mark.parametrize("bad", ["{", "}", "a {b|c", "{{a}"])
def test_unmatched_braces_are_refused(bad):
    with pytest.raises(ValueError, match="braces do not match"):
        tree(bad)


@pytest.mark.parametrize(
    "raw, fit",
    [
        ("a  old , a useful,a hour", "An old, a useful,an hour"),
        ("ok .  is a eye?", "Ok. Is an eye?"),
        ("", ""),
    ],
)
def test_polish(raw, fit):
    assert polish(raw) == fit
    assert polish(fit) == fit
