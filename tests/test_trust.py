"""What a stranger tries: each input ends with the right value, or with one line that says why
not."""

import json
import math
import os
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_architectures import loaded, quiet  # noqa: F401
from test_shapes import DECODER, SMALL, configure

from weightregions.anatomy import is_pooler
from weightregions.bases import tiny_base
from weightregions.building import build_zoo
from weightregions.checkpoints import copy_tokenizer, open_checkpoint
from weightregions.cli import main
from weightregions.comparison import Measurements, compare
from weightregions.corpora import load_corpora
from weightregions.files import file_sha256, read_json, read_table
from weightregions.finetuning import Recipe, Tokenized, evaluate, train
from weightregions.loading import load_tokenizer
from weightregions.many import load_sketch, sketch
from weightregions.similarity import gram, load_gram
from weightregions.traversal import ScratchModel, line, read_rows, traverse
from weightregions.zoo import open_zoo


def resaved(folder, edit):
    "The tensors of a folder, changed."
    state = {k: t.contiguous().clone() for k, t in edit(load_file(folder)).items()}
    save_file(state, folder, metadata={"format": "pt"})


def one_line(error, *parts):
    "An error's message: one line that holds these parts."
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text


# --- shards that disagree with their index ----------------------------------------------------


def sharded(folder):
    hf.BertForMaskedLM(hf.BertConfig(**SMALL)).save_pretrained(folder, max_shard_size="12KB")
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    return index, where, [folder / name for name in sorted(set(where.values()))]


def not_listed(index, where, shards):
    resaved(shards[0], lambda s: s | {"bert.embeddings.position_ids": torch.arange(20)[None]})


def body_not_listed(index, where, shards):
    where.pop("bert.encoder.layer.0.output.dense.bias")


def listed_but_absent(index, where, shards):
    where["cls.seq_relationship.weight"] = shards[0].name


def in_two_shards(index, where, shards):
    name = next(n for n, shard in where.items() if shard == shards[0].name)
    twice = load_file(shards[0])[name] + 1
    resaved(shards[-1], lambda s: s | {name: twice})


@pytest.mark.parametrize(
    "change", [not_listed, body_not_listed, listed_but_absent, in_two_shards]
)
def test_shards_are_read_as_transformers_reads_them(change, tmp_path, tried):
    index, where, shards = sharded(tmp_path / "model")
    change(index, where, shards)
    index.write_text(json.dumps({"weight_map": where, "metadata": {}}))
    theirs = {n: p for n, p in loaded(tmp_path / "model").items() if not is_pooler(n)}
    ours = open_checkpoint(tmp_path / "model")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    what = change.__name__.replace("_", " ")
    tried(f"shards and index: {what}", "checkpoints", 1, "opened with AutoModel's numbers")


# --- a zoo, its base, and what is done to them ------------------------------------------------


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "A base and a zoo of two datasets with two seeds."
    root = tmp_path_factory.mktemp("trust")
    tiny_base(root / "base", steps=2)
    corpora = load_corpora("builtin", ["films", "meals"])
    build_zoo(root / "zoo", root / "base", corpora, Recipe(steps=3, rows=50), range(1, 3), 1)
    return root


@pytest.fixture
def here(made, tmp_path):
    shutil.copytree(made, tmp_path / "w")
    return tmp_path / "w"


def command(capsys, *words):
    "Exit code and all that was printed."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(list(map(str, words)))
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def centre(capsys, here, *words):
    folders = "center", here / "zoo", "--base", here / "base", "--out", here / "c"
    return command(capsys, *folders, *words)


def similarity(capsys, here):
    folders = "similarity", here / "zoo", "--base", here / "base", "--out", here / "s"
    return command(capsys, *folders)


def moved(state):
    name = next(n for n in state if n.endswith("query.weight"))
    return state | {name: state[name] + 0.01}


def other_tokens(file):
    file.write_text(file.read_text() + "\n")


CENTRES = {
    "weights that moved": ("model.safetensors", lambda f: resaved(f, moved)),
    "another configuration": (
        "config.json",
        lambda f: configure(f.parent, num_attention_heads=1),
    ),
    "another tokenizer": ("tokenizer.json", other_tokens),
    "no tokenizer": ("tokenizer.json", os.remove),
}


@pytest.mark.parametrize("what", CENTRES)
def test_a_centroid_that_was_changed_is_not_taken_for_the_same(what, here, capsys, tried):
    assert centre(capsys, here)[0] == 0
    code, said = centre(capsys, here)
    assert code == 0 and "is there already, of the same models" in said
    name, change = CENTRES[what]
    change(here / "c" / name)
    code, said = centre(capsys, here)
    assert code == 2 and f"its {name} is not what these models make" in said
    assert not list(here.glob(".c-*"))
    tried(f"a centroid with {what}", "center", 1, "refused in one line that names the file")


SETTINGS = [("num_attention_heads", 1), ("hidden_act", "relu"), ("layer_norm_eps", 0.5)]


@pytest.mark.parametrize("field, value", SETTINGS)
def test_models_that_compute_differently_are_refused(field, value, here, capsys, tried):
    configure(here / "zoo" / "films" / "seed-1", **{field: value})
    code, said = similarity(capsys, here)
    assert code == 2 and f"compute differently: {field} is {value!r} and" in said
    tried(f"a model with another {field}", "similarity", 1, "refused with the reason")


def test_settings_that_change_no_number_may_differ(here, capsys):
    changes = dict(architectures=["RobertaModel"], hidden_dropout_prob=0.5, use_cache=False)
    configure(here / "zoo" / "films" / "seed-1", **changes, classifier_dropout=0.1)
    assert similarity(capsys, here)[0] == 0


@pytest.mark.parametrize("place", ["base", "zoo/films/seed-1"])
def test_an_adapter_beside_weights_is_named(place, here, capsys, tried):
    (here / place / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for run in (similarity, centre):
        code, said = run(capsys, here)
        assert code == 2 and "an adapter lies beside the weights" in said
    tried("an adapter beside whole weights", "similarity and center", 2, "refused in one line")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["base", "zoo/films/seed-1"])
def test_what_is_no_number_is_named_before_strangers_are(value, place, here, tried):
    def spoilt(state):
        name = next(n for n in state if n.endswith("query.weight"))
        state[name][0, 3] = value
        return state

    resaved(here / place / "model.safetensors", spoilt)
    base, model = (open_checkpoint(here / p) for p in ("base", "zoo/films/seed-1"))
    with pytest.raises(ValueError) as error:
        model.require_started_from(base)
    one_line(error, f"{place.split('/')[-1]}: encoder.layer.0.attention.self.query.weight")
    tried("a value that is no number", "started from", 1, "model and tensor are named")


@pytest.mark.parametrize("word", ["--base", "--out", "--data", "--target"])
def test_an_empty_word_is_no_folder(word, here, capsys, tried):
    words = {"--base": here / "base", "--data": "builtin", "--target": "films", "--out": "t"}
    pairs = [w for pair in (words | {word: ""}).items() for w in pair]
    code, said = command(capsys, "recommend", here / "zoo", *pairs)
    assert code == 2 and f"{word[2:]}: is empty" in said
    tried("an empty word for a folder", "recommend", 1, "refused in one line")


# --- texts and tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_without_room_for_a_text_is_refused(length, here, tried):
    films = load_corpora("builtin", ["films"])["films"]
    with pytest.raises(ValueError) as error:
        train(here / "base", films, Recipe(steps=1, rows=20, max_length=length), 1)
    one_line(error, f"max_length {length} leaves no token of a text beside the 2 special ones")
    tried("a length without room for a text", "tokens", 1, "refused in one line")


ESCAPED = '"auto\\u005fmap": {"AutoTokenizer": ["code.Tokenizer", null]}'
PLAIN = '"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}'


@pytest.mark.parametrize("words", [PLAIN, ESCAPED])
def test_no_tokenizer_is_copied_with_the_name_of_its_code(words, here, tmp_path, tried):
    file = here / "base" / "tokenizer_config.json"
    file.write_text(f"{file.read_text().rstrip()[:-1]}, {words}}}")
    assert "auto_map" in read_json(file)
    (tmp_path / "there").mkdir()
    copy_tokenizer(here / "base", tmp_path / "there")
    copied = read_json(tmp_path / "there" / file.name)
    assert copied == {k: v for k, v in read_json(file).items() if k != "auto_map"}
    tried("code named in a tokenizer's settings", "copy of a tokenizer", 1, "left out")


def decoder(folder, config, model):
    "A decoder that names no padding token, with the tokenizer of another model."
    model(config).save_pretrained(folder, save_original_format=True)
    configure(folder, pad_token_id=None)


SIZES = DECODER | {"vocab_size": 2000, "max_position_embeddings": 64}
BASES = {
    "a model that gives tuples": (
        lambda f: configure(f, return_dict=False),
        "RobertaForSequenceClassification: AttributeError",
    ),
    "too few positions": (
        lambda f: (
            configure(f, max_position_embeddings=8),
            resaved(
                f / "model.safetensors",
                lambda s: {
                    n: t[:8] if n.endswith("position_embeddings.weight") else t
                    for n, t in s.items()
                },
            ),
        ),
        "RobertaForSequenceClassification: ",
    ),
}


@pytest.mark.parametrize("what", BASES)
def test_a_base_that_cannot_be_trained_is_one_line(what, here, tried):
    make, says = BASES[what]
    make(here / "base")
    films = load_corpora("builtin", ["films"])["films"]
    with pytest.raises(ValueError) as error:
        train(here / "base", films, Recipe(steps=1, rows=40), 1)
    one_line(error, here / "base", "cannot be trained as", says)
    tried(what, "fine-tuning", 1, "refused in one line that names the folder")


def test_a_base_that_once_predicted_numbers_tells_classes(here, tried):
    configure(here / "base", problem_type="regression", id2label={"0": "score"})
    films = load_corpora("builtin", ["films"])["films"]
    model, _, metrics = train(here / "base", films, Recipe(steps=1, rows=40), 1)
    assert model.config.problem_type == "single_label_classification"
    assert metrics["loss"] < 1
    tried("a base that predicted numbers", "fine-tuning", 1, "trained on classes")


# --- files ------------------------------------------------------------------------------------


def pipe(file):
    os.mkfifo(file)


def nowhere(file):
    file.symlink_to("nowhere")


def endless(file):
    with open(file, "wb") as f:
        f.truncate(2**40)


def folder_there(file):
    file.mkdir()


def datasets(file):
    folder = file.parent
    (folder / "x").mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = folder / "x" / f"{split}.csv"
        if not os.path.lexists(rows):
            rows.write_text("text,label\na,0\nb,1\n")
    return load_corpora(folder)


READ = {
    "datasets.json": datasets,
    "families.csv": datasets,
    "line.jsonl": read_rows,
    "measurements.csv": Measurements,
    "products.npz": load_gram,
    "table.csv": read_table,
    "some.json": read_json,
}


@pytest.mark.parametrize("put", [pipe, folder_there, endless])
@pytest.mark.parametrize("name", READ)
def test_every_reader_refuses_what_is_no_regular_file(name, put, tmp_path, tried):
    if (name, put) == ("products.npz", endless):
        pytest.skip("of an archive only its end is read")
    put(tmp_path / name)
    with pytest.raises((ValueError, OSError)) as error:
        READ[name](tmp_path / name)
    one_line(error, name)
    tried(f"{put.__name__} as a file", name, 1, "refused in one line that names the file")


@pytest.mark.parametrize("name", ["datasets.json", "families.csv"])
def test_a_list_that_leads_nowhere_is_not_passed_over(name, tmp_path, tried):
    nowhere(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=name):
        datasets(tmp_path / name)
    tried("a link that leads nowhere", name, 1, "refused in one line that names the file")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rows_without_end_are_refused(ending, tmp_path, tried):
    datasets(tmp_path / "datasets.list")
    (tmp_path / "x" / "train.csv").unlink()
    endless(tmp_path / "x" / f"train.{ending}")
    with pytest.raises((ValueError, OSError)) as error:
        load_corpora(tmp_path)
    one_line(error, f"train.{ending}: has more than")
    tried("a terabyte of rows", f"rows in {ending}", 1, "refused at once")


def test_a_number_of_thousands_of_digits_is_named(tmp_path, tried):
    (tmp_path / "a.json").write_text('{"n": %s}' % ("9" * 5000))
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "a.json")
    one_line(error, tmp_path / "a.json", "thousands of digits")
    tried("a number of 5,000 digits", "JSON", 1, "refused in one line that names the file")


NESTED = {
    "lists": pa.array([[0], [1]] * 4),
    "structs": pa.array([{"a": 1}, {"a": 2}] * 4),
}


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("kind", NESTED)
def test_nested_columns_are_named(kind, column, tmp_path, tried):
    flat = {"text": list("abcdefgh"), "label": np.arange(8) % 2}
    (tmp_path / "x").mkdir()
    for split in ("train", "test"):
        table = pa.table(flat | {column: NESTED[kind]})
        pq.write_table(table, tmp_path / "x" / f"{split}.parquet")
    with pytest.raises(ValueError) as error:
        load_corpora(tmp_path)
    one_line(error, "train.parquet", f"column {column!r} is of type")
    tried(f"{kind} in a Parquet column", "corpora", 1, "refused in one line that names it")


# --- kept tables ------------------------------------------------------------------------------


def one_cell(arrays):
    name = "cells" if "cells" in arrays else "values"
    changed = arrays[name].copy()
    changed.reshape(-1)[1] *= 1.5
    return {name: changed}


def other_names(arrays):
    return {"names": json.dumps(json.loads(str(arrays["names"]))[::-1])}


@pytest.mark.parametrize("change", [one_cell, other_names])
@pytest.mark.parametrize("measure, load", [(gram, load_gram), (sketch, load_sketch)])
def test_products_that_were_changed_are_refused(measure, load, change, here, tmp_path, tried):
    base = open_checkpoint(here / "base")
    models = [open_checkpoint(here / "zoo" / "films" / s) for s in ("seed-1", "seed-2")]
    file = measure(models, base, progress=False).save(tmp_path / "kept.npz")
    load(file)
    arrays = dict(np.load(file, allow_pickle=False))
    np.savez(file, **arrays | change(arrays))
    with pytest.raises(ValueError) as error:
        load(file)
    one_line(error, file, "was changed after it was measured")
    what = change.__name__.replace("_", " ")
    tried(f"{what} in kept products", measure.__name__, 1, "refused in one line")


def former(file, **arrays):
    "A kept file as former versions wrote it: without a digest."
    kept = dict(np.load(file, allow_pickle=False)) | arrays
    np.savez(file, **{name: array for name, array in kept.items() if name != "sha256"})


@pytest.mark.parametrize("measure, load", [(gram, load_gram), (sketch, load_sketch)])
def test_products_without_a_digest_are_refused(measure, load, here, tmp_path, tried):
    base = open_checkpoint(here / "base")
    models = [open_checkpoint(here / "zoo" / "films" / s) for s in ("seed-1", "seed-2")]
    file = measure(models, base, progress=False).save(tmp_path / "kept.npz")
    former(file)
    with pytest.raises(ValueError) as error:
        load(file)
    one_line(error, file, "has no digest")
    tried("no digest in kept products", measure.__name__, 1, "refused in one line")


def walked(file, value=0.5):
    "Points of a line, measured into a file."
    ends = [open_checkpoint({"w": torch.full((4, 4), float(i))}, name=str(i)) for i in (1, 2)]
    points = line(*ends, [0.0, 0.5, 1.0])
    live = torch.nn.Module()
    live.w = torch.nn.Parameter(torch.zeros(4, 4))
    return traverse(points, lambda m: value, ScratchModel(live), file, progress=False)


def compared(file):
    return compare([("a", "x"), ("a", "y")], lambda p: 0.5, file, progress=False)


@pytest.mark.parametrize("measure", [walked, compared])
def test_rows_without_digests_are_named(measure, tmp_path, tried):
    file = tmp_path / ("rows.jsonl" if measure is walked else "rows.csv")
    before = measure(file)
    if measure is walked:
        head, *lines = map(json.loads, file.read_text().splitlines())
        lines = [{k: x[k] for k in ("key", "rows")} for x in lines]
        file.write_text("".join(json.dumps(x) + "\n" for x in (head, *lines)))
    else:
        rows = [x.rpartition(",")[0] for x in file.read_text().splitlines()]
        file.write_text("".join(f"{row}\n" for row in rows))
    with pytest.warns(UserWarning, match=f"{file.name}: has no digests"):
        assert measure(file).equals(before)
    tried("rows without digests", f"rows that were {measure.__name__}", 1, "named")


def test_a_line_without_its_digest_is_no_former_version(tmp_path, tried):
    file = tmp_path / "rows.jsonl"
    walked(file)
    head, first, *rest = map(json.loads, file.read_text().splitlines())
    first = {"key": first["key"], "rows": [first["rows"][0] | {"value": 0.1}]}
    file.write_text("".join(json.dumps(x) + "\n" for x in (head, first, *rest)))
    with pytest.raises(ValueError) as error:
        walked(file)
    one_line(error, file, "line 2: was changed after it was measured")
    tried("a digest taken out of one line", "rows that were walked", 1, "refused in one line")


def test_a_zoo_that_does_not_say_its_tokenizer_is_named(here, capsys, tried):
    for file in [here / "zoo" / "zoo.json", *here.glob("zoo/*/*/manifest.json")]:
        about = json.loads(file.read_text())
        about["base"] = {k: about["base"][k] for k in ("name", "sha256")}
        file.write_text(json.dumps(about))
    code, said = similarity(capsys, here)
    line = "zoo: does not record the tokenizer and the configuration of its base"
    assert code == 0 and said.count(line) == 1
    tried("a zoo of a former version", "similarity", 1, "named")


# --- accuracies -------------------------------------------------------------------------------

NUMBERS = [
    ("accuracy", "52"),
    ("accuracy", "-0.1"),
    ("accuracy", "inf"),
    ("accuracy", "1.0001"),
    ("majority", "50"),
    ("loss", "-inf"),
    ("n_train", "-3"),
]


def listed(here, column, value):
    "A table of models in which one cell has a value."
    rows = [f"films/seed-1,0.5,{value}", "films/seed-2,0.5,0.5", "meals/seed-1,0.5,0.5"]
    file = here / "zoo" / "models.csv"
    (here / "zoo" / "zoo.json").unlink(missing_ok=True)
    file.write_text("\n".join([f"model,seen,{column}", *rows, ""]))
    return file


@pytest.mark.parametrize("column, value", NUMBERS)
def test_numbers_out_of_their_span_are_refused(column, value, here, capsys, tried):
    file = listed(here, column, value)
    for run in (similarity, centre):
        code, said = run(capsys, here)
        assert code == 2 and f"{file}, row 2: {column} {value!r} is not between 0 and" in said
    tried(f"{column} {value}", "models.csv", 2, "refused in one line that names the row")


@pytest.mark.parametrize("value", ["0", "1", "", "nan", "0.52", "1e-1", " .5 "])
def test_numbers_in_their_span_are_taken(value, here, capsys):
    listed(here, "accuracy", value)
    assert similarity(capsys, here)[0] == 0


@pytest.mark.parametrize("column", ["accuracy", "majority"])
def test_an_accuracy_in_per_cent_is_refused_in_every_table(column, tmp_path, tried):
    file = tmp_path / "rows.csv"
    file.write_text(f"start,{column}\na,\nb,0.5\nc,52.1\n")
    with pytest.raises(ValueError) as error:
        read_table(file, text=["start"])
    one_line(error, file, f"row 4: {column} 52.1 is not between 0 and 1")
    tried(f"{column} in per cent", "tables of ours", 1, "refused in one line that names it")


# --- tables of models -------------------------------------------------------------------------

TABLES = {
    "a column twice": (
        "model,dataset,dataset\nfilms/seed-1,a,b\nmeals/seed-1,b,a\n",
        "a column is there twice",
    ),
    "the column of models twice": (
        "model,model\nfilms/seed-1,meals/seed-1\nmeals/seed-1,films/seed-1\n",
        "a column is there twice",
    ),
    "a folder in two words": (
        "model\nfilms/seed-1\n./films/seed-1\nmeals/seed-1\n",
        "films/seed-1 and ./films/seed-1 are one folder",
    ),
    "a folder and its whole path": (
        "model\nfilms/seed-1\n{zoo}/films/seed-1\nmeals/seed-1\n",
        "are one folder",
    ),
}


@pytest.mark.parametrize("what", TABLES)
def test_a_table_of_models_that_says_two_things_is_refused(what, here, capsys, tried):
    (here / "zoo" / "zoo.json").unlink()
    content, problem = TABLES[what]
    (here / "zoo" / "models.csv").write_text(content.format(zoo=here / "zoo"))
    code, said = similarity(capsys, here)
    assert code == 2 and "models.csv" in said and problem in said
    tried(what, "models.csv", 1, "refused in one line that names the file")


def test_whole_paths_have_the_dataset_of_their_folder(here, tried):
    (here / "zoo" / "zoo.json").unlink()
    folders = [here / "zoo" / d / "seed-1" for d in ("films", "meals")]
    (here / "zoo" / "models.csv").write_text("\n".join(["model", *map(str, folders), ""]))
    assert list(open_zoo(here / "zoo").models.dataset) == ["films", "meals"]
    tried("whole paths", "models.csv", 1, "the dataset is that of the folder")


# --- merges, run again ------------------------------------------------------------------------

METHODS = ("task-arithmetic", "ties", "dare", "model-stock")


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_goes_on_where_its_table_is_missing(method, here, capsys, tried):
    run = "--method", method
    assert centre(capsys, here, *run)[0] == 0
    (here / "c" / "members.csv").unlink()
    before = file_sha256(here / "c" / "model.safetensors")
    code, said = centre(capsys, here, *run)
    assert code == 0 and "is there already, of the same models" in said, said
    assert (here / "c" / "members.csv").is_file()
    resaved(here / "c" / "model.safetensors", moved)
    code, said = centre(capsys, here, *run)
    assert code == 2 and "its model.safetensors is not what these models make" in said
    shutil.rmtree(here / "c")
    (here / "c").mkdir()
    code, said = centre(capsys, here, *run)
    assert code == 2 and "c: exists already" in said
    assert before and not list(here.glob(".c-*"))
    tried(f"a merge by {method} without its table", "center", 3, "goes on, or refused")


# --- what was replaced between two commands ---------------------------------------------------


def tuned(capsys, here, start):
    words = "--data", "builtin", "--target", "films", "--rows", 40, "--steps", 1
    return command(capsys, "finetune", "--start", start, *words, "--out", here / "tuned")


def located(capsys, here, model):
    words = "--zoo", here / "zoo", "--base", here / "base", "--out", here / "l.csv"
    return command(capsys, "locate", model, *words)


@pytest.mark.parametrize("run", [tuned, located])
def test_a_model_that_is_no_longer_its_manifests_is_named(run, here, capsys, tried):
    model = shutil.copytree(here / "zoo" / "films" / "seed-1", here / "mine")
    resaved(model / "model.safetensors", moved)
    code, said = run(capsys, here, model)
    assert code == 2 and "mine: the weights in" in said
    assert "are not those of its manifest.json" in said and not (here / "tuned").exists()
    tried("a start or a query that was replaced", run.__name__, 1, "named")


def traversed(capsys, here):
    ends = here / "zoo" / "films" / "seed-1", here / "zoo" / "meals" / "seed-1"
    words = "--data", "builtin", "--target", "films", "--rows", 40, "--out", here / "t"
    return command(capsys, "traverse", *ends, "--base", here / "base", *words)


def test_points_are_those_of_one_tokenizer(here, capsys, tried):
    for file in here.glob("zoo/*/*/manifest.json"):
        file.unlink()
    assert traversed(capsys, here)[0] == traversed(capsys, here)[0] == 0
    for folder in (here / "base", *here.glob("zoo/*/*/")):
        other_tokens(folder / "tokenizer.json")
    code, said = traversed(capsys, here)
    assert code == 2 and "line.jsonl: was measured with" in said
    tried("a base whose tokenizer was replaced", "traverse", 1, "refused in one line")


def written_with(folder):
    file = folder / "fine-tuning.json"
    return json.loads(file.read_text())["weights"]["sha256"]


def test_a_tuned_model_that_was_replaced_is_named(here, capsys, tried):
    assert tuned(capsys, here, here / "zoo" / "meals" / "seed-1")[0] == 0
    model = here / "tuned"
    assert written_with(model) == file_sha256(model / "model.safetensors")
    assert located(capsys, here, model)[0] == 0
    resaved(model / "model.safetensors", moved)
    problem = "tuned: the weights in .* are not those of its fine-tuning.json"
    with pytest.raises(ValueError, match=problem):
        open_zoo([here / "zoo" / "films" / "seed-1", model]).checked(here / "base")
    code, said = located(capsys, here, model)
    assert code == 2 and "are not those of its fine-tuning.json" in said
    file = model / "fine-tuning.json"
    file.write_text(file.read_text().replace(written_with(model), "none"))
    code, said = located(capsys, here, model)
    assert code == 2 and "fine-tuning.json: weights.sha256 is not a SHA-256" in said
    tried("a tuned model that was replaced", "zoo and locate", 3, "named")


# --- the same weights twice -------------------------------------------------------------------


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


COPIES = {
    "the same files": lambda folder: None,
    "in another format": pickled,
    "with other metadata": lambda f: save_file(
        load_file(f / "model.safetensors"), f / "model.safetensors", metadata={"by": "me"}
    ),
}


def test_a_copy_is_named(here, capsys, tried):
    names = ("films/seed-1", "films/seed-2", "meals/seed-1")
    for i, name in enumerate(names):
        shutil.copytree(here / "zoo" / name, here / "heap" / f"m{i}")
        (here / "heap" / f"m{i}" / "manifest.json").unlink()
    for what, change in COPIES.items():
        copy = shutil.copytree(here / "heap" / "m1", here / "heap" / "n")
        change(copy)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            zoo = open_zoo(here / "heap").checked(here / "base")
        assert len(zoo) == 4, what
        assert [str(w.message) for w in said] == ["heap: n is a copy of m1, and both count"]
        shutil.move(copy, here / "n")
        words = "--zoo", here / "heap", "--base", here / "base", "--out", here / "l.csv"
        code, shown = command(capsys, "locate", here / "n", *words)
        assert code == 0 and "n is a copy of m1, which is in heap" in shown, what
        shutil.rmtree(here / "n")
    tried("a copy of a model", "zoo and locate", 2 * len(COPIES), "named")


def test_a_line_from_the_base_is_refused(here, capsys, tried):
    ends = here / "zoo" / "films" / "seed-1", here / "base"
    words = "--data", "builtin", "--target", "films", "--out", here / "t"
    code, said = command(capsys, "traverse", *ends, "--base", here / "base", *words)
    assert code == 2 and "a line takes two checkpoints that moved away from" in said
    tried("the base as an end of a line", "traverse", 1, "refused in one line")


def test_a_centroid_among_the_models_is_left_out(here, capsys, tried):
    for file in here.glob("zoo/**/*.json"):
        if file.name in ("manifest.json", "zoo.json"):
            file.unlink()
    for i, words in enumerate([(), ("--method", "task-arithmetic")]):
        out = ("--out", here / "zoo" / f"c{i}")
        folders = here / "zoo", "--base", here / "base"
        assert command(capsys, "center", *folders, *out, *words)[0] == 0
        assert (here / "zoo" / f"c{i}" / "members.csv").read_text().count("\n") == 5
    (here / "zoo" / "c0" / "members.csv").unlink()  # its card remains
    with pytest.warns(UserWarning, match="left out: c0, c1: an average of models; name it"):
        assert len(open_zoo(here / "zoo")) == 4
    films = here / "zoo" / "films" / "seed-1"
    assert len(open_zoo([films, here / "zoo" / "c0"]).checked(here / "base")) == 2
    tried("a centroid among the models", "zoo and centring", 2, "left out by name")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
WEIGHTS = "model.safetensors", "pytorch_model.bin"


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_pointer_in_place_of_weights_is_called_so(name, here, tried):
    (here / "base" / "model.safetensors").unlink()
    (here / "base" / name).write_bytes(POINTER)
    with pytest.raises(ValueError) as error:
        open_checkpoint(here / "base")
    one_line(error, name, "a Git LFS pointer: `git lfs pull` fetches the file")
    tried(f"a Git LFS pointer as {name}", "checkpoints", 1, "called so in one line")


# --- numbers that mean nothing ----------------------------------------------------------------

MEANT = {
    ("center", "--strength", 3): "--strength is of task-arithmetic, ties, dare, not of mean",
    ("center", "--seed", 4): "--seed is of dare, not of mean",
    ("center", "--density", 0.3): "--density is of ties, dare, not of mean",
    ("center", "--method", "model-stock", "--density", 0.3): "not of model-stock",
    ("center", "--method", "ties", "--seed", 1): "--seed is of dare, not of ties",
    ("traverse", "--beyond", 1e300): "are not all finite in single precision",
    ("traverse", "--beyond", "inf"): "are not all finite",
    ("finetune", "--seed", -1): "a seed lies between 0 and 2**32 - 1, not -1",
    ("finetune", "--seed", 10**20): "a seed lies between 0 and 2**32 - 1",
    ("zoo", "--weight-decay", "inf"): "weight_decay must not be below 0 or infinite",
}


def test_a_number_that_would_mean_nothing_is_refused(here, capsys, tried):
    data, base, out = ("--data", "builtin"), ("--base", here / "base"), ("--out", here / "new")
    films, rows = ("--target", "films"), ("--rows", 40)
    ends = here / "zoo" / "films" / "seed-1", here / "zoo" / "meals" / "seed-1"
    lines = {
        "center": (here / "zoo", *base),
        "traverse": (*ends, *base, *data, *films, *rows, "--points", 2),
        "finetune": ("--start", here / "base", *data, *films, *rows, "--steps", 1),
        "zoo": (here / "base", *data, "--datasets", "films", "--steps", 1),
    }
    for (name, *words), problem in MEANT.items():
        code, said = command(capsys, name, *lines[name], *out, *words)
        assert code == 2 and problem in said, (words, said)
        assert not list((here / "new").glob("*.safetensors")), words
    tried("a number that would mean nothing", "commands", len(MEANT), "refused in one line")


LOST = {"accuracy": 0.7, "loss": math.nan, "n_test": 40}


def test_a_model_that_is_lost_is_not_written(here, capsys, monkeypatch, tried):
    monkeypatch.setattr("weightregions.finetuning.evaluate", lambda *_: LOST)
    words = "--data", "builtin", "--rows", 40, "--steps", 1, "--out", here / "new"
    words += "--datasets", "films", "--workers", 1, "--seeds", 1
    code, said = command(capsys, "zoo", here / "base", *words)
    assert code == 2 and "dataset films, seed 1: the fine-tuning diverged" in said, said
    assert not list((here / "new").rglob("model.safetensors"))
    tried("a fine-tuning that diverged", "zoo", 1, "named, nothing is written")


def test_a_row_does_not_depend_on_those_beside_it(here, tried):
    file = here / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    tokenizer = load_tokenizer(here / "base", padding=True)
    sizes = dict(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    config = hf.GPT2Config(**sizes, num_labels=2, pad_token_id=tokenizer.pad_token_id)
    model = hf.GPT2ForSequenceClassification(config)
    for p in model.parameters():
        p.data.normal_(std=0.5)
    rows = load_corpora("builtin", "films", n_train=20, n_test=40)["films"].test
    data = Tokenized(rows, tokenizer, 40)
    alone, together = (evaluate(model, data, tokenizer, n) for n in (1, 40))
    assert alone["loss"] == pytest.approx(together["loss"], rel=1e-4)
    tried("a tokenizer that pads on the left", "fine-tuning", 1, "padded on the right")
