"""Checkpoints in the shapes in which they lie on the hub: opened with AutoModel's numbers, or
refused with the reason."""

import json
import os

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_architectures import loaded, quiet  # noqa: F401

from weightregions.anatomy import is_pooler
from weightregions.bases import base_identity
from weightregions.checkpoints import open_checkpoint

SMALL = dict(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
)
DECODER = SMALL | dict(num_key_value_heads=2, pad_token_id=0)
POOLER = {"pooler.dense.weight": torch.zeros(16, 16), "pooler.dense.bias": torch.zeros(16)}


def saved(folder, model, architectures=None, edit=None):
    "A folder of a model with random weights, its declared classes and its tensors changed."
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.save_pretrained(folder)
    if architectures is not None:
        configure(folder, architectures=architectures)
    if edit:
        state = edit(load_file(folder / "model.safetensors"))
        state = {k: t.contiguous().clone() for k, t in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(folder, **values):
    "Change entries of a folder's configuration."
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def under(prefix, tensors):
    "An edit that adds tensors under a prefix."
    return lambda state: state | {f"{prefix}{name}": t for name, t in tensors.items()}


def older(state):
    "LayerNorm's first names."
    return {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for k, t in state.items()
    }


def bare(prefix):
    "An edit that takes a prefix away."
    return lambda state: {k.removeprefix(prefix): t for k, t in state.items()}


T5 = dict(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
STRAY = {
    "empty": torch.zeros(0),
    "steps": torch.tensor([3]),
    "state": torch.zeros(7, dtype=torch.uint8),
    "scale": torch.tensor(0.5),
}
CROSS = "decoder.block.0.layer.1.EncDecAttention"  # of a T5

MASKS = {
    f"h.{i}.attn.{name}": mask
    for i in range(2)
    for name, mask in (
        ("bias", torch.ones(1, 1, 20, 20).tril()),
        ("masked_bias", torch.tensor(-1e4)),
    )
}
FREQUENCIES = {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
NEOX = {
    f"gpt_neox.layers.{i}.attention.{name}": t
    for i in range(2)
    for name, t in (
        ("bias", torch.ones(1, 1, 20, 20).tril().bool()),
        ("masked_bias", torch.tensor(-1e9)),
        ("rotary_emb.inv_freq", torch.ones(2)),
    )
}
OPENED = {
    "masked LM with a pooler": lambda f: saved(
        f,
        hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**SMALL)),
        None,
        under("roberta.", POOLER),
    ),
    "classifier with a pooler": lambda f: saved(
        f,
        hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL)),
        None,
        under("roberta.", POOLER),
    ),
    "pretraining declared as masked LM, first names": lambda f: saved(
        f, hf.BertForPreTraining(hf.BertConfig(**SMALL)), ["BertForMaskedLM"], older
    ),
    "masked LM declared as the bare model": lambda f: saved(
        f, hf.BertForMaskedLM(hf.BertConfig(**SMALL)), ["BertModel"]
    ),
    "bare model declared as a classifier": lambda f: saved(
        f, hf.BertModel(hf.BertConfig(**SMALL)), ["BertForSequenceClassification"]
    ),
    "no class named": lambda f: saved(
        f, hf.AlbertForMaskedLM(hf.AlbertConfig(**SMALL, embedding_size=8)), []
    ),
    "a class that transformers has not": lambda f: saved(
        f, hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SMALL)), ["OurDebertaRanker"]
    ),
    "a discriminator's and a generator's heads": lambda f: saved(
        f,
        hf.ElectraForPreTraining(hf.ElectraConfig(**SMALL, embedding_size=8)),
        None,
        under("", {"generator_predictions.dense.weight": torch.zeros(8, 16)}),
    ),
    "masks without a prefix": lambda f: saved(
        f,
        hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=20)
        ),
        None,
        lambda s: bare("transformer.")(s) | MASKS,
    ),
    "masks and frequencies": lambda f: saved(
        f, hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)), None, lambda s: s | NEOX
    ),
    "rotary frequencies": lambda f: saved(
        f,
        hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER)),
        None,
        under("model.", FREQUENCIES),
    ),
    "more window layers than tensors": lambda f: saved(
        f, hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, max_window_layers=99))
    ),
    "a tied table stored again": lambda f: saved(
        f,
        hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, head_dim=8)),
        None,
        lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"]},
    ),
    "a classifier with a language model's head": lambda f: saved(
        f,
        hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**DECODER)),
        None,
        under("", {"lm_head.weight": torch.zeros(60, 16)}),
    ),
    "three copies of a shared table": lambda f: saved(
        f,
        hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        None,
        lambda s: (
            s
            | {
                name: s["shared.weight"]
                for name in (
                    "encoder.embed_tokens.weight",
                    "decoder.embed_tokens.weight",
                    "lm_head.weight",
                )
            }
        ),
    ),
    "a bias that T5 once had": lambda f: saved(
        f,
        hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
        None,
        lambda s: s | {f"{CROSS}.relative_attention_bias.weight": torch.zeros(32, 2)},
    ),
    "fused projections": lambda f: saved(f, hf.NomicBertModel(hf.NomicBertConfig(**SMALL))),
    "experts one by one": lambda f: saved(
        f,
        hf.MixtralForCausalLM(
            hf.MixtralConfig(**DECODER, num_local_experts=2, num_experts_per_tok=1)
        ),
    ),
    "a doubled prefix that the class has": lambda f: saved(
        f,
        hf.DPRQuestionEncoder(hf.DPRConfig(**SMALL)),
        None,
        under("question_encoder.bert_model.", POOLER),
    ),
    "a doubled prefix, half of it left out": lambda f: saved(
        f, hf.DPRQuestionEncoder(hf.DPRConfig(**SMALL)), None, bare("question_encoder.")
    ),
    "both halves of T5 declared as its encoder": lambda f: saved(
        f, hf.T5ForConditionalGeneration(hf.T5Config(**T5)), ["T5EncoderModel"]
    ),
    "a norm under its first name and today's": lambda f: saved(
        f, hf.BertForMaskedLM(hf.BertConfig(**SMALL)), None, lambda s: s | older(s)
    ),
    "a body with the prefix and without": lambda f: saved(
        f, hf.BertForMaskedLM(hf.BertConfig(**SMALL)), None, lambda s: s | bare("bert.")(s)
    ),
    "some tensors in half precision": lambda f: saved(
        f,
        hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
        None,
        lambda s: {k: t.half() if "query" in k else t for k, t in s.items()},
    ),
    "empty tensors, whole numbers and scalars": lambda f: saved(
        f,
        hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
        None,
        under("bert.encoder.layer.0.", STRAY),
    ),
    "a queue and a head of contrastive training": lambda f: saved(
        f,
        hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
        ["BertForCL"],
        under("", {"mlp.dense.weight": torch.zeros(16, 16), "queue": torch.zeros(16, 99)}),
    ),
    "three shards": lambda f: (
        hf.BertForMaskedLM(hf.BertConfig(**SMALL)).save_pretrained(f, max_shard_size="12KB"),
        f,
    )[1],
}


@pytest.mark.parametrize("shape", OPENED)
def test_a_public_shape_opens_with_the_same_numbers(shape, tmp_path, tried):
    folder = OPENED[shape](tmp_path / "model")
    theirs = {n: p for n, p in loaded(folder).items() if not is_pooler(n)}
    ours = open_checkpoint(folder)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=0, atol=0)
    assert len(base_identity(folder)["sha256"]) == 64
    tried(f"a public shape: {shape}", "checkpoints", 1, "opened with AutoModel's numbers")


def roberta(folder, edit=None):
    return saved(folder, hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL)), None, edit)


def llama(folder, edit=None):
    return saved(folder, hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), None, edit)


def without(name):
    return lambda state: {k: t for k, t in state.items() if k != name}


def eight_bits(dtype):
    return lambda state: {k: t.to(dtype) if "q_proj" in k else t for k, t in state.items()}


LAYER = "roberta.encoder.layer"
REFUSED = {
    "a layer too many": (
        lambda f: roberta(f, under(f"{LAYER}.2.", {"output.dense.bias": torch.zeros(16)})),
        "its configuration says fewer layers",
    ),
    "a layer too few": (
        lambda f: roberta(f, without(f"{LAYER}.1.output.dense.bias")),
        "lacks encoder.layer.1.output.dense.bias",
    ),
    "another shape": (
        lambda f: roberta(f, lambda s: s | {f"{LAYER}.1.output.dense.bias": torch.zeros(15)}),
        "encoder.layer.1.output.dense.bias has shape",
    ),
    "cross attention": (
        lambda f: roberta(
            f, under(f"{LAYER}.0.crossattention.self.", {"query.weight": torch.zeros(16, 16)})
        ),
        "layer.0.crossattention.self.query.weight is no part of",
    ),
    "a bias in attention": (
        lambda f: llama(
            f, under("model.layers.0.self_attn.", {"q_proj.bias": torch.zeros(16)})
        ),
        "attention_bias=True",
    ),
    "a norm of another architecture": (
        lambda f: llama(
            f, under("model.layers.1.self_attn.", {"q_norm.weight": torch.zeros(8)})
        ),
        "it is of another architecture",
    ),
    "an adapter's factors": (
        lambda f: llama(
            f, under("model.layers.0.self_attn.q_proj.lora_A.", {"weight": torch.zeros(2, 16)})
        ),
        "it is of another architecture",
    ),
    "a prefix that the class has not": (
        lambda f: saved(
            f,
            hf.BertModel(hf.BertConfig(**SMALL)),
            None,
            lambda s: under("question_encoder.bert_model.", s)({}),
        ),
        "holds no tensor of a BertModel",
    ),
    "the prefix of a wrapper": (
        lambda f: roberta(f, lambda s: under("module.", s)({})),
        "holds no tensor of a RobertaModel",
    ),
    "weights in eight bits": (
        lambda f: llama(f, eight_bits(torch.int8)),
        "is stored as torch.int8, not as floating-point numbers",
    ),
    "weights in eight floating bits": (
        lambda f: llama(f, eight_bits(torch.float8_e4m3fn)),
        "stores tensors as F8_E4M3",
    ),
    "two norms that differ": (
        lambda f: roberta(
            f, lambda s: s | {f"{LAYER}.0.output.LayerNorm.gamma": torch.zeros(16)}
        ),
        "stores encoder.layer.0.output.LayerNorm.weight twice, as .*gamma and as .*, which",
    ),
    "both with and without the prefix": (
        lambda f: roberta(
            f, lambda s: s | {"encoder.layer.1.output.dense.bias": torch.zeros(16)}
        ),
        "stores encoder.layer.1.output.dense.bias twice",
    ),
}


@pytest.mark.parametrize("shape", REFUSED)
def test_another_body_is_refused(shape, tmp_path, tried):
    make, reason = REFUSED[shape]
    folder = make(tmp_path / "model")
    with pytest.raises(ValueError, match=reason) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
    tried(f"another body: {shape}", "checkpoints", 1, "refused with the reason")


@pytest.mark.parametrize("number", ["num_hidden_layers", "num_hidden_groups", "n_layers"])
def test_a_configuration_that_builds_too_much_is_refused(number, tmp_path, tried):
    kinds = {
        "num_hidden_layers": hf.BertModel(hf.BertConfig(**SMALL)),
        "num_hidden_groups": hf.AlbertModel(hf.AlbertConfig(**SMALL, embedding_size=8)),
        "n_layers": hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
        ),
    }
    folder = saved(tmp_path / "model", kinds[number])
    configure(folder, **{number: 10**9})
    with pytest.raises(ValueError, match=f"{number} is 1000000000, but there are only"):
        open_checkpoint(folder)
    tried(f"a configuration of a billion {number}", "checkpoints", 1, "refused at once")


def pipe(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def device(file):
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def folder_there(file):
    file.unlink(missing_ok=True)
    file.mkdir()


def endless(file):
    with open(file, "wb") as f:
        f.truncate(2**40)


PLACES = [
    (name, put)
    for name in ("config.json", "model.safetensors", "tokenizer.json")
    for put in (pipe, device, folder_there, endless)
    if (name, put) != ("model.safetensors", endless)  # weights may be of any length
]


@pytest.mark.parametrize("name, put", PLACES)
def test_what_is_no_regular_file_is_refused_at_once(name, put, tmp_path, tried):
    base = open_checkpoint(roberta(tmp_path / "base"))
    (base.folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    folder = roberta(tmp_path / "model")
    put(folder / name)
    with pytest.raises((ValueError, OSError), match=name):
        open_checkpoint(folder).require_same_space(base)
    tried(f"{put.__name__} as {name}", "checkpoints", 1, "refused at once")


def test_other_weights_than_those_that_are_read_are_refused(tmp_path, tried):
    folder = roberta(tmp_path / "model")
    configure(folder, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match="names other weights, 'other.safetensors'"):
        open_checkpoint(folder)
    configure(folder, transformers_weights="model.safetensors")
    open_checkpoint(folder)
    tried(
        "a configuration that names other weights", "checkpoints", 1, "refused with the reason"
    )
