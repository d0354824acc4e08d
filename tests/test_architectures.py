"""Every sequence classifier that the installed transformers can build: a folder is read as
`AutoModel` reads it."""

import logging
from functools import partial

import pytest
import torch
import transformers
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS

from weightregions.anatomy import is_pooler
from weightregions.checkpoints import open_checkpoint

same = partial(torch.testing.assert_close, rtol=0, atol=0)

SIZES = (
    ("vocab_size", 64),
    *((name, 16) for name in ("hidden_size", "d_model", "dim", "n_embd", "embedding_size")),
    *((name, 16) for name in ("emb_dim", "word_embed_proj_dim", "d_latents")),
    *((name, 24) for name in ("intermediate_size", "ffn_dim", "d_ff", "d_inner", "hidden_dim")),
    *((name, 24) for name in ("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size")),
    *((name, 2) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
    *((name, 2) for name in ("encoder_layers", "decoder_layers", "num_decoder_layers")),
    *((name, 2) for name in ("num_attention_heads", "n_head", "n_heads", "num_heads")),
    *((name, 2) for name in ("encoder_attention_heads", "decoder_attention_heads")),
    *((name, 2) for name in ("num_key_value_heads", "num_experts", "num_local_experts")),
    *((name, 8) for name in ("d_kv", "d_head", "head_dim", "moe_intermediate_size")),
    ("cross_attention_hidden_size", 16),
    *((name, 32) for name in ("max_position_embeddings", "n_positions")),
    *((name, 64) for name in ("entity_vocab_size", "pronunciation_vocab_size")),
    *((name, 64) for name in ("shape_vocab_size", "max_xpath_tag_unit_embeddings")),
    ("n_routed_experts", 4),
    ("pad_token_id", 0),
    ("bos_token_id", 1),
    ("eos_token_id", 2),
)
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")


def shrunk(config):
    "A configuration, and those that it holds, with small sizes and two layers."
    values = config.to_dict()
    for name, size in SIZES:
        is_size = isinstance(values.get(name), int) and not isinstance(values[name], bool)
        if is_size or name in TOKENS:
            setattr(config, name, size)
    for name in values:
        inner = getattr(config, name, None)
        if isinstance(inner, transformers.PretrainedConfig):
            shrunk(inner)
        if name in LISTS and isinstance(inner, list):
            setattr(config, name, inner[:2])
    return config


def tiny(config_class):
    "A tiny classifier with random weights in every parameter; None if it cannot be built so."
    model_class = CLASSIFIERS[config_class]
    config = shrunk(config_class())
    config.num_labels = 3
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > 5_000_000:
        raise ValueError(f"{size:,} weights")
    config_class.from_dict(config.to_dict())  # sizes that do not go together are refused
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    return model


def loaded(folder):
    "The parameters that AutoModel fills from a folder, by name."
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    missing = set(info["missing_keys"])
    assert {n for n in missing if not is_pooler(n)} <= set(model.all_tied_weights_keys)
    names = {n for n, _ in model.named_parameters()} - missing
    return {n: p.detach() for n, p in model.named_parameters() if n in names}


def check(model, folder):
    "A folder opens as AutoModel loads it, and as the live model does."
    model.save_pretrained(folder)
    ours, live = open_checkpoint(folder), open_checkpoint(model)
    ours.layout.require_same(live.layout)
    theirs = {n: p for n, p in loaded(folder).items() if not is_pooler(n)}
    assert set(ours) == set(theirs)
    for name in ours:
        same(ours[name].float(), theirs[name].float())
        same(ours[name].float(), live[name].float())


FAMILIES = {c.model_type: c for c in CLASSIFIERS if getattr(c, "model_type", "")}
SAMPLE = (
    "bert roberta distilbert deberta-v2 electra gpt2 llama qwen3 gemma2 t5 bart modernbert "
)
SAMPLE += "nomic_bert gte mixtral jamba albert xlnet mpnet bloom opt gpt_neox phi3 mistral xlm"
NOT_BUILT = {  # and what it would take
    "gpt_neo": "attention types for each of its layers",
    "cohere_compass_text": "layer types for each of its layers",
    "esm": "a vocabulary that its configuration does not state",
    "hunyuan_v1_dense": "a rotary base that its configuration does not state",
    "hunyuan_v1_moe": "a rotary base that its configuration does not state",
    "layoutlmv2": "detectron2",
    "ministral": "a rotary base that its configuration does not state",
    "nemotron": "a head size that its configuration does not state",
    "reformer": "axial positions that multiply to its length",
}
OTHER_BODY = {  # AutoModel does not build the body that the classifier has
    "funnel": "the classifier has no decoder, AutoModel's model has one",
    "perceiver": "the classifier's body has a decoder, AutoModel's model has none",
}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("family", [f for f in SAMPLE.split() if f in FAMILIES])
def test_a_classifier_is_read_as_transformers_reads_it(family, tmp_path):
    check(tiny(FAMILIES[family]), tmp_path / family)


@pytest.mark.slow
def test_every_classifier_is_read_as_transformers_reads_it(tmp_path, tried):
    wrong, failed = {}, {}
    for family, config_class in sorted(FAMILIES.items()):
        try:
            model = tiny(config_class)
        except Exception as error:
            failed[family] = str(error)
            continue
        try:
            check(model, tmp_path / family)
        except Exception as error:
            wrong[family] = f"{type(error).__name__}: {str(error)[:200]}"
    assert set(failed) <= set(NOT_BUILT), {k: failed[k] for k in set(failed) - set(NOT_BUILT)}
    assert set(wrong) <= set(OTHER_BODY), {k: wrong[k] for k in set(wrong) - set(OTHER_BODY)}
    opened = len(FAMILIES) - len(failed) - len(wrong)
    tried("a family of classifiers", "checkpoints", opened, "read as transformers reads it")
