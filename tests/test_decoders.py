"""Decoders, as plain causal models and as classifiers: every command, the generalized loss at
the last token, and what is refused."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weightregions.bases import tiny_base
from weightregions.checkpoints import copy_tokenizer, open_checkpoint
from weightregions.cli import main
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe, train
from weightregions.loading import load_tokenizer
from weightregions.probing import Probing, Target, TextLoss, pooling_of
from weightregions.traversal import ScratchModel, line, traverse

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

WIDE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
WIDE |= dict(max_position_embeddings=64, num_key_value_heads=1)
KINDS = {
    "gpt2": lambda n: GPT2ForSequenceClassification(
        GPT2Config(vocab_size=n, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ),
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, **WIDE)),
    "llama, tied": lambda n: LlamaForCausalLM(
        LlamaConfig(vocab_size=n, tie_word_embeddings=True, **WIDE)
    ),
    "llama-head": lambda n: LlamaForSequenceClassification(LlamaConfig(vocab_size=n, **WIDE)),
    "qwen": lambda n: Qwen2ForCausalLM(Qwen2Config(vocab_size=n, **WIDE)),
    "gemma": lambda n: GemmaForCausalLM(GemmaConfig(vocab_size=n, head_dim=8, **WIDE)),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    "A folder with a tokenizer, and the number of its tokens."
    folder = tiny_base(tmp_path_factory.mktemp("words") / "base", steps=1)
    return folder, json.loads((folder / "config.json").read_text())["vocab_size"]


@pytest.fixture(scope="module", params=KINDS)
def world(request, words, tmp_path_factory):
    "A decoder without a padding token in its configuration, and models a little away from it."
    folder, n = words
    root = tmp_path_factory.mktemp("decoders")
    torch.manual_seed(0)
    model = KINDS[request.param](n)
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    places = [root / "base", *(root / "zoo" / d / str(i) for d in "abc" for i in range(3))]
    for place in places:
        model.save_pretrained(place)
        copy_tokenizer(folder, place)
        torch.manual_seed(len(place.parts) + ord(place.parent.name[-1]))
        towards = {k: torch.randn_like(p) for k, p in start.items()}
        with torch.no_grad():
            for k, p in model.named_parameters():
                p.copy_(start[k] + 0.003 * towards[k] + 0.003 * torch.randn_like(p))
    return root


def run(*words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main([str(w) for w in words])


def test_every_command_takes_decoders(world, tmp_path):
    zoo, base = world / "zoo", ("--base", world / "base")
    data = ("--data", "builtin", "--target", "films", "--rows", 20)
    ends = zoo / "a" / "1", zoo / "b" / "1"
    assert run("similarity", zoo, *base, "--out", tmp_path / "s") == 0
    assert run("center", zoo, *base, "--out", tmp_path / "c", "--without", "a") == 0
    assert run("locate", ends[0], "--zoo", zoo, *base, "--out", tmp_path / "l.csv") == 0
    assert run("traverse", *ends, *base, *data, "--points", 2, "--out", tmp_path / "t") == 0
    assert run("recommend", zoo, *base, *data, "--out", tmp_path / "r.csv") == 0
    mean = open_checkpoint(tmp_path / "c")
    members = [open_checkpoint(zoo / d / str(i)) for d in "bc" for i in range(3)]
    for name in mean.layout.names:
        exact = torch.stack([m[name].double() for m in members]).mean(0)
        torch.testing.assert_close(mean[name].double(), exact, rtol=1e-5, atol=1e-7)
    assert "wte.weight" in mean or "embed_tokens.weight" in mean
    assert not any("lm_head" in name or "score" in name for name in mean.layout.names)


def test_the_loss_reads_the_last_token_that_is_not_padding(world):
    corpus = load_corpora("builtin", names=["films"], n_train=30, n_test=20)["films"]
    assert pooling_of(world / "base") == "last"
    scratch = ScratchModel(open_checkpoint(world / "base"))
    alone, together = (
        Probing(Target(corpus, world / "base", 20, 20, batch_tokens=n), "last", bf16=False)
        for n in (1, 4096)
    )
    rows = [metric(scratch.model)[0] for metric in (alone, together)]
    assert np.isclose(rows[0]["loss"], rows[1]["loss"], rtol=1e-3)


def test_a_decoder_is_fine_tuned_although_it_names_no_padding(world):
    corpus = load_corpora("builtin", names=["films"], n_train=20, n_test=10)["films"]
    model, _, metrics = train(world / "base", corpus, Recipe(steps=2, batch_size=4), 1)
    assert metrics["n_test"] == 10 and np.isfinite(metrics["loss"])


def test_a_tokenizer_without_padding_is_one_line(world, words, tmp_path):
    open_checkpoint(world / "base")
    shutil.copytree(world / "base", tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    said = json.loads(file.read_text())
    for key in ("pad_token", "added_tokens_decoder", "extra_special_tokens"):
        said.pop(key, None)
    said["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(said))
    (tmp_path / "base" / "special_tokens_map.json").unlink(missing_ok=True)
    corpus = load_corpora("builtin", names=["films"], n_train=20, n_test=10)["films"]
    with pytest.raises(ValueError, match="no padding token|embeddings") as e:
        train(tmp_path / "base", corpus, Recipe(steps=2, batch_size=4), 1)
    assert "\n" not in str(e.value)


CAUSAL = ("llama", "llama, tied", "qwen", "gemma")


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_loss_of_the_next_token_along_a_line(kind, words, tmp_path):
    "What transformers says of each text alone; a tied head moves with the embeddings."
    folder, n = words
    torch.manual_seed(0)
    model = KINDS[kind](n)
    model.save_pretrained(tmp_path / "0")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "1")
    ends = [open_checkpoint(tmp_path / i) for i in "01"]
    texts = load_corpora("builtin", ["films"], 20, 20)["films"].test.text[:7].tolist()
    metric = TextLoss(texts, folder, max_length=12, batch_size=3)
    rows = traverse(line(*ends, [0.0, 0.5, 1.0]), metric, ScratchModel(ends[0], head="keep"))
    tokenizer, lost, tokens = load_tokenizer(folder), 0.0, 0
    first = type(model).from_pretrained(tmp_path / "0").eval()
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            lost += first(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert rows.tokens.tolist() == [tokens] * 3
    assert rows.loss[0] == pytest.approx(lost / tokens, rel=1e-4)
    assert rows.loss.nunique() == 3


def test_texts_that_a_causal_model_cannot_read_are_one_line(words):
    folder, n = words
    with pytest.raises(ValueError, match="a text of two tokens or more"):
        TextLoss([], folder)
    metric = TextLoss(["a good film"], folder)
    with pytest.raises(ValueError, match="another vocabulary"):
        metric(KINDS["llama"](4))
    with pytest.raises(ValueError, match="has no head that predicts tokens"):
        metric(KINDS["llama-head"](n))
