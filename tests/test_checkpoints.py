"""Attacks on checkpoints: seven architectures, every way of saving them, laziness, faults, and
writing that leaves nothing half done."""

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
)

from weightregions.anatomy import anatomy, body_parameters
from weightregions.checkpoints import open_checkpoint, write_checkpoint
from weightregions.space import TaskVector, flatten, unflatten

same = partial(torch.testing.assert_close, rtol=0, atol=0)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = dict(
    vocab_size=40,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=16,
)
CONFIGS = {
    "roberta": lambda: RobertaConfig(**SMALL),
    "xlm-roberta": lambda: XLMRobertaConfig(**SMALL),
    "bert": lambda: BertConfig(**SMALL),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=40, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16
    ),
    "deberta-v2": lambda: DebertaV2Config(
        **SMALL, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"]
    ),
    "electra": lambda: ElectraConfig(**SMALL, embedding_size=4),
    "gpt2": lambda: GPT2Config(
        vocab_size=40,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "t5": lambda: T5Config(
        vocab_size=40,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    ),
}
MASKED = [k for k in CONFIGS if k not in ("gpt2", "t5")]


def classifier(kind, seed=0, labels=2, **changes):
    torch.manual_seed(seed)
    config = type(CONFIGS[kind]()).from_dict(
        {**CONFIGS[kind]().to_dict(), "num_labels": labels, **changes}
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def body_of(model):
    """The expected body, from transformers alone: parameters of the base model, tied ones once,
    without pooler."""
    return {
        n: p.detach().clone()
        for n, p in sorted(model.base_model.named_parameters())
        if not n.startswith("pooler.")
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A saved RoBERTa classifier; tests copy the folder before they damage it."
    folder = tmp_path_factory.mktemp("zoo") / "sst2-0"
    classifier("roberta").save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "rte-3"))


def refused(source, says, error=ValueError, **kwargs):
    "The one-line message with which opening `source` fails."
    with pytest.raises(error, match=says) as info:
        open_checkpoint(source, **kwargs)
    assert "\n" not in str(info.value), str(info.value)
    return str(info.value)


def resave(folder, change, file="model.safetensors"):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / file, metadata={"format": "pt"})


# architectures


@pytest.mark.parametrize("kind", CONFIGS)
def test_body_is_the_base_model_whatever_was_saved(kind, tmp_path):
    model = classifier(kind)
    want = body_of(model)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "bare")
    torch.manual_seed(7)
    states = [
        open_checkpoint(s)
        for s in (
            tmp_path / "whole",
            tmp_path / "bare",
            model,
            model.base_model,
            (model.config, model.state_dict()),
        )
    ]
    for opened in states:
        same(opened.state(), want)
        assert [*opened.layout.names] == sorted(want)
        assert opened.sha256() == states[0].sha256()
        opened.check_finite()
    heads = {
        n: p.detach()
        for n, p in model.named_parameters()
        if not n.startswith(model.base_model_prefix + ".")
    }
    same(states[0].head_state(), dict(sorted(heads.items())))
    assert not states[1].head and not states[3].head
    for opened in (states[0], states[2], states[4]):
        assert set(opened.head.names) == set(heads)
    assert AutoModel.from_config(model.config).state_dict().keys() >= set(want)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_masked_language_model_and_classifier_share_a_space(kind, file, tmp_path):
    torch.manual_seed(3)
    base = AutoModelForMaskedLM.from_config(CONFIGS[kind]())
    if file == "safetensors":
        base.save_pretrained(tmp_path / "base")
    else:  # torch files hold tied weights under every name
        base.config.architectures = [type(base).__name__]
        base.config.save_pretrained(tmp_path / "base")
        torch.save(base.state_dict(), tmp_path / "base/pytorch_model.bin")
    opened = open_checkpoint(tmp_path / "base")
    opened.require_same_space(open_checkpoint(classifier(kind)))
    same(opened.state(), body_of(base))
    body = {id(p) for p in base.base_model.parameters()}
    head = sum(p.numel() for p in base.parameters() if id(p) not in body)
    assert opened.head.numel == head  # neither decoder.weight nor decoder.bias counted again
    if file == "bin" and kind != "electra":
        assert any(why.startswith("tied to") for why in opened.aside.values())


def test_t5_ties_are_counted_once_and_restored(tmp_path):
    model = classifier("t5")
    opened = open_checkpoint(model)
    assert opened.layout.numel == sum(p.numel() for p in model.base_model.parameters())
    assert opened.aside == {
        f"{stack}.embed_tokens.weight": "tied to shared.weight"
        for stack in ("encoder", "decoder")
    }
    doubled = {n: 2 * t for n, t in opened.tensors()}
    again = AutoModelForSequenceClassification.from_pretrained(
        write_checkpoint(doubled, opened, tmp_path / "doubled")
    ).transformer
    assert (
        again.encoder.embed_tokens.weight
        is again.decoder.embed_tokens.weight
        is again.shared.weight
    )
    same(again.shared.weight.detach(), 2 * model.transformer.shared.weight.detach())


def test_t5_variants_agree_on_the_body(tmp_path):
    torch.manual_seed(0)
    generator = T5ForConditionalGeneration(CONFIGS["t5"]())
    generator.save_pretrained(tmp_path / "lm")
    lm = open_checkpoint(tmp_path / "lm")
    lm.require_same_space(open_checkpoint(classifier("t5")))
    assert not lm.head
    state = {n: t.clone() for n, t in generator.state_dict().items()}
    state["lm_head.weight"] = torch.randn_like(
        state["lm_head.weight"]
    )  # as in T5 1.1, where input and output words are apart
    untied = open_checkpoint((generator.config, state))
    assert untied.layout == lm.layout and untied.head.names == ("lm_head.weight",)
    asked = transformers.T5ForQuestionAnswering(
        CONFIGS["t5"]()
    )  # its own base model, with a head on top
    asked.save_pretrained(tmp_path / "qa")
    for qa in (open_checkpoint(asked), open_checkpoint(tmp_path / "qa")):
        assert qa.layout == lm.layout and qa.head.names == (
            "qa_outputs.bias",
            "qa_outputs.weight",
        )
    again = open_checkpoint(write_checkpoint(qa, qa, tmp_path / "again"))
    same((again.state(), again.head_state()), (qa.state(), qa.head_state()))
    dropped = AutoModel.from_pretrained(
        write_checkpoint(qa, qa, tmp_path / "dropped", head="drop")
    )
    same(body_of(dropped), qa.state())
    encoder = open_checkpoint(T5EncoderModel(CONFIGS["t5"]()))
    assert set(encoder) == {n for n in lm if not n.startswith("decoder.")}
    assert not encoder.is_same_space(lm)


def test_tied_weight_stored_under_its_second_name_only(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIGS["gpt2"]())
    model.save_pretrained(tmp_path / "lm")
    resave(
        tmp_path / "lm",
        lambda state: state.__setitem__("lm_head.weight", state.pop("transformer.wte.weight")),
    )
    opened = open_checkpoint(tmp_path / "lm")
    same(opened["wte.weight"], model.transformer.wte.weight.detach())
    assert not opened.head
    same(opened.state(), open_checkpoint(model).state())


def test_pooler_policy(tmp_path):
    model = classifier("bert")
    model.save_pretrained(tmp_path / "c")
    dropped, kept = (
        open_checkpoint(tmp_path / "c"),
        open_checkpoint(tmp_path / "c", pooler="keep"),
    )
    assert (
        set(kept) - set(dropped)
        == {"pooler.dense.weight", "pooler.dense.bias"}
        == set(dropped.aside)
        == set(body_parameters(model, "keep")) - set(body_parameters(model))
    )
    assert set(dropped.aside.values()) == {"pooler"} and not kept.aside
    with pytest.raises(KeyError, match="left aside .pooler"):
        dropped["pooler.dense.bias"]
    with pytest.raises(ValueError, match="pooler"):
        dropped.require_same_space(kept)
    written = write_checkpoint(dropped, dropped, tmp_path / "written")
    same(
        load_file(written / "model.safetensors")["bert.pooler.dense.weight"],
        model.bert.pooler.dense.weight.detach(),
    )
    refused(tmp_path / "c", "pooler policy 'mean' is not one of drop, keep", pooler="mean")
    refused(model, "pooler policy None", pooler=None)
    assert (
        "pooler.dense.weight" in open_checkpoint(classifier("deberta-v2")).head
    )  # outside of its base model: head


@pytest.mark.parametrize("kind", CONFIGS)
def test_flattening_agrees_with_torch(kind):
    model = classifier(kind)
    opened, live = open_checkpoint(model), body_parameters(model)
    assert list(live) == list(opened.layout.names)
    vector = flatten(opened, opened.layout)
    same(vector, nn.utils.parameters_to_vector(live.values()).detach())
    twin = classifier(kind, seed=1)
    nn.utils.vector_to_parameters(vector, body_parameters(twin).values())
    same(open_checkpoint(twin).state(), opened.state())
    assert all(
        p is q for p, q in zip(live.values(), body_parameters(model).values(), strict=True)
    )


def test_bitfit_freezing_and_building_do_not_change_the_layout():
    model = classifier("roberta")
    before, rng = open_checkpoint(model).layout, torch.get_rng_state()
    for n, p in model.named_parameters():
        p.requires_grad_(n.endswith("bias"))
    assert open_checkpoint(model).layout == before
    open_checkpoint(
        (
            RobertaConfig(
                **SMALL, num_labels=9, architectures=["RobertaForSequenceClassification"]
            ),
            model.state_dict(),
        )
    )
    same(torch.get_rng_state(), rng)  # building on the meta device draws no random numbers


# ways of saving


def legacy(state, file):
    torch.save(state, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, legacy])
def test_pickled_checkpoints(save, copied):
    want, digest, state = (
        open_checkpoint(copied).state(),
        open_checkpoint(copied).sha256(),
        load_file(copied / "model.safetensors"),
    )
    os.remove(copied / "model.safetensors")
    save(
        {**state, "roberta.embeddings.position_ids": torch.arange(16)[None]},
        copied / "pytorch_model.bin",
    )
    opened = open_checkpoint(copied)
    same(opened.state(), want)
    assert opened.sha256() == digest and opened.aside == {"embeddings.position_ids": "buffer"}


def test_sharded_checkpoints(tmp_path):
    model = classifier("roberta")
    model.save_pretrained(tmp_path / "s", max_shard_size="2KB")
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 2
    opened = open_checkpoint(tmp_path / "s")
    same(opened.state(), body_of(model))
    digest = opened.sha256()
    where = json.loads((tmp_path / "s/model.safetensors.index.json").read_text())["weight_map"]
    for file in set(where.values()):
        torch.save(
            load_file(tmp_path / "s" / file),
            tmp_path / "s" / file.replace(".safetensors", ".bin"),
        )
        os.remove(tmp_path / "s" / file)
    os.remove(tmp_path / "s/model.safetensors.index.json")
    (tmp_path / "s/pytorch_model.bin.index.json").write_text(
        json.dumps(
            {"weight_map": {n: f.replace(".safetensors", ".bin") for n, f in where.items()}}
        )
    )
    assert open_checkpoint(tmp_path / "s").sha256() == digest


def test_older_names_and_float_leftovers():
    model = AutoModelForMaskedLM.from_config(BertConfig(**SMALL))
    state = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in model.state_dict().items()
    }
    same(open_checkpoint((model.config, state)).state(), body_of(model))
    gpt = classifier("gpt2")
    opened = open_checkpoint(
        (gpt.config, {**gpt.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)})
    )
    assert opened.aside == {"h.0.attn.bias": "not used by GPT2Model"} and set(opened) == set(
        body_of(gpt)
    )


def test_state_dicts_and_modules_without_configuration():
    linear = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    linear[1].weight = nn.Parameter(linear[0].weight.detach().T.contiguous())
    opened = open_checkpoint(linear, name="small")
    same(opened.state(), {n: p.detach() for n, p in sorted(linear.named_parameters())})
    assert opened.aside == {
        "2.num_batches_tracked": "buffer",
        "2.running_mean": "buffer",
        "2.running_var": "buffer",
    }
    shared = torch.randn(3)
    plain = open_checkpoint({"a": shared, "b": shared, "n": torch.tensor(3), "c": shared[:2]})
    assert set(plain) == {"a", "c"} and plain.aside == {"b": "tied to a", "n": "buffer"}
    refused({"a": 3.0}, "a is no tensor")
    refused(42, "not a int", TypeError)
    refused((CONFIGS["bert"](), [1]), "not a list", TypeError)
    refused(({"model_type": "mine"}, {"a": shared}), "model_type 'mine' is not in transformers")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, saved, copied):
    base = open_checkpoint(saved)
    resave(copied, lambda state: state.update({n: t.to(dtype) for n, t in state.items()}))
    opened = open_checkpoint(copied)
    assert set(opened.layout.dtypes) == {dtype}
    opened.require_same_space(base)
    same(opened.state(torch.float32), {n: t.to(dtype).float() for n, t in base.tensors()})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    same(unflatten(flatten(opened, opened.layout, wide), opened.layout), opened.state())
    assert opened.sha256() != base.sha256()
    written = open_checkpoint(write_checkpoint(opened, base, copied.parent / "w"))
    assert written.sha256() == opened.sha256()


# reading


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranges_and_buffers(saved, data):
    opened = open_checkpoint(saved)
    name = data.draw(st.sampled_from(opened.layout.names))
    whole = opened[name].reshape(-1)
    start, stop = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole)))
    same(opened.read(name, start, stop), whole[start:stop])
    same(opened.read(name, start), whole[start:])
    live = open_checkpoint(opened.state())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for source in (opened, live):
            buffer = torch.full((3, max(0, stop - start)), 7.0, dtype=dtype)
            source.read(name, start, stop, out=buffer[1])
            same(buffer[1], whole[start:stop].to(dtype))
            assert (buffer[0] == 7).all() and (buffer[2] == 7).all()
            with pytest.raises(ValueError, match="do not fit a buffer"):
                source.read(name, start, stop, out=torch.empty(max(0, stop - start) + 1))


def test_what_is_read_belongs_to_the_reader(copied):
    model = classifier("roberta")
    for source in (copied, model):
        opened = open_checkpoint(source)
        before = opened.sha256()
        for tensor in opened.state().values():
            tensor.zero_()
        opened["embeddings.word_embeddings.weight"].fill_(3.0)
        assert opened.sha256() == before == open_checkpoint(source).sha256()


def test_checkpoints_travel_to_other_processes(saved):
    opened = pickle.loads(pickle.dumps(open_checkpoint(saved)))
    assert (
        opened.sha256() == open_checkpoint(saved).sha256()
        and len(pickle.dumps(opened)) < 50_000
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda f: os.truncate(f, 6000),
        lambda f: f.write_bytes(f.read_bytes()[::-1]),
        lambda f: f.write_bytes(f.read_bytes() * 2),
    ],
)
def test_a_file_that_changes_after_opening(change, copied):
    opened = open_checkpoint(copied)
    change(copied / "model.safetensors")
    os.utime(copied / "model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match="model.safetensors: changed since it was opened"):
        opened.state()
    with pytest.raises(FileNotFoundError):
        os.remove(copied / "model.safetensors"), opened.sha256()


def hollow(folder, config):
    "RoBERTa-base as a sparse file: true header, true length, no data."
    with torch.device("meta"):
        state = AutoModelForSequenceClassification.from_config(config).state_dict()
    header, at = {}, 0
    for n, t in state.items():
        if t.is_floating_point():
            header[n] = {
                "dtype": "F32",
                "shape": list(t.shape),
                "data_offsets": [at, at := at + 4 * t.numel()],
            }
    text = json.dumps(header).encode()
    config.save_pretrained(folder)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    return 8 + len(text) + at


@pytest.mark.skipif(
    not Path("/proc/thread-self/io").exists(), reason="counts bytes where Linux does"
)
def test_opening_reads_only_the_header(tmp_path):
    config = RobertaConfig(architectures=["RobertaForSequenceClassification"])
    size = hollow(tmp_path / "big", config)
    assert size > 490e6

    def counts():
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        io = dict(
            line.split(":") for line in Path("/proc/thread-self/io").read_text().splitlines()
        )
        return int(status["VmHWM"].split()[0]) * 1024, int(io["rchar"])

    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak starts anew from what is resident now
    memory, read = counts()
    opened = open_checkpoint(tmp_path / "big")
    assert opened.layout.numel == 124_054_272 and len(opened.head) == 4
    more_memory, more_read = counts()
    assert more_memory - memory < 60e6 and more_read - read < 5e6
    one = opened.read("embeddings.word_embeddings.weight", 10, 20)
    same(one, torch.zeros(10))
    assert counts()[0] - memory < 60e6


# the same space


def test_spaces(saved, tmp_path):
    base = open_checkpoint(saved, name="base")
    good = open_checkpoint(classifier("roberta", labels=7, seed=1))
    good.require_same_space(base)
    assert good.is_same_space(base) and good.is_same_space(base.state())
    cases = {
        "a is a bert model, base a roberta model": classifier("bert"),
        "a has a vocabulary of 41 tokens, base one of 40": classifier("roberta", vocab_size=41),
        "a lacks encoder.layer.1.": classifier("roberta", num_hidden_layers=1),
        "a has encoder.layer.2.* too many": classifier("roberta", num_hidden_layers=3),
        r"a: encoder.layer.0.intermediate.dense.bias has shape \(13,\), expected \(12,\)": classifier(
            "roberta", intermediate_size=13
        ),
    }
    for says, model in cases.items():
        other = open_checkpoint(model, name="a")
        assert not other.is_same_space(base)
        for attempt in (
            lambda: other.require_same_space(base),
            lambda: TaskVector.between(base, other),
        ):
            with pytest.raises(ValueError, match=says) as error:
                attempt()
            assert "\n" not in str(error.value)


def test_other_tokens_of_the_same_number(saved, tmp_path):
    def with_tokens(name, model):
        folder = Path(shutil.copytree(saved, tmp_path / name))
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "truncation": name}))
        return open_checkpoint(folder)

    a, b = (
        with_tokens("a", {"vocab": {"x": 0, "y": 1}}),
        with_tokens("b", {"vocab": {"y": 1, "x": 0}}),
    )
    c, pieces = (
        with_tokens("c", {"vocab": {"x": 1, "y": 0}}),
        with_tokens("d", {"vocab": [["x", -1.5], ["y", -2.0]]}),
    )
    a.require_same_space(b)
    a.require_same_space(pieces)
    a.require_same_space(open_checkpoint(saved))  # no tokenizer beside it: nothing to compare
    with pytest.raises(ValueError, match="a has other tokens in its vocabulary than c"):
        a.require_same_space(c)


def test_strangers(saved):
    base = open_checkpoint(saved)
    near = open_checkpoint(
        {n: t + 0.3 * t.std().nan_to_num(0) * torch.randn_like(t) for n, t in base.tensors()}
    )
    assert 0.9 < near.require_started_from(base) < 1
    assert near.require_started_from(base.state()) == near.require_started_from(base)
    stranger = open_checkpoint(classifier("roberta", seed=5), name="stranger")
    stranger.require_same_space(base)
    with pytest.raises(ValueError, match="stranger was not fine-tuned from sst2-0"):
        stranger.require_started_from(base)
    assert abs(stranger.require_started_from(base, least=-1)) < 0.3


# faults

QUERY = "roberta.encoder.layer.0.attention.self.query.weight"


def test_folders_that_are_none(tmp_path, copied):
    refused(tmp_path / "gone", "gone: there is no such folder", FileNotFoundError)
    refused(str(tmp_path / "gone"), "gone: there is no such folder", FileNotFoundError)
    refused("../../gone", "gone: there is no such folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty: is an empty folder", FileNotFoundError)
    refused(copied / "config.json", "config.json: is a file")
    refused(copied, "a local folder, which has no revision main", revision="main")
    os.remove(copied / "model.safetensors")
    refused(copied, "rte-3: no weights", FileNotFoundError)
    (copied / "adapter_config.json").write_text("{}")
    refused(copied, "holds an adapter")


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "config.json: not JSON"),
        ("{", "config.json: not JSON"),
        ("[" * 100_000, "config.json: not JSON"),
        ("[1]", "a JSON list, not an object"),
        ("\ufeff{}", "config.json: not JSON"),
        ("{}", "model_type None is not in transformers"),
        ('{"model_type": "mine"}', "model_type 'mine'"),
        ('{"model_type": ["roberta"]}', "config.json: model_type"),
        ('{"model_type": "roberta", "hidden_size": 9, "num_attention_heads": 2}', "rte-3: "),
        ('{"model_type": "roberta", "vocab_size": "many"}', "config"),
        ('{"model_type": "gpt2", "n_layer": 1}', "holds no tensor of a GPT2Model"),
    ],
)
def test_configurations(text, says, copied):
    (copied / "config.json").write_text(text)
    refused(copied, says)
    os.remove(copied / "config.json")
    refused(copied, "config.json: there is no such file", FileNotFoundError)


def test_binary_configuration(copied):
    (copied / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(copied, "config.json: is not UTF-8")


def test_architectures_of_another_kind_or_unknown_are_not_trusted(copied):
    want, raw = open_checkpoint(copied), json.loads((copied / "config.json").read_text())
    for odd in (["GPT2LMHeadModel"], ["Mine"], ["Trainer"], "RobertaModel", [None], None, []):
        (copied / "config.json").write_text(
            json.dumps({**raw, "architectures": odd, "auto_map": {"AutoModel": "mine.Model"}})
        )
        assert open_checkpoint(copied).layout == want.layout


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_a_file_goes_unnoticed_or_ends_in_a_traceback(
    saved, tmp_path_factory, data
):
    """Cut or overwrite anything before the weights: a one-line ValueError, or the very same
    weights."""
    blob = (saved / "model.safetensors").read_bytes()
    data_starts = 8 + int.from_bytes(blob[:8], "little")
    if data.draw(st.booleans()):
        blob = blob[: data.draw(st.integers(0, len(blob) - 1))]
    else:
        at = data.draw(st.integers(0, 7))
        blob = (
            blob[:at]
            + bytes([data.draw(st.integers(0, 255).filter(lambda b: b != blob[at]))])
            + blob[at + 1 :]
        )
    folder = tmp_path_factory.mktemp("cut")
    shutil.copy(saved / "config.json", folder)
    (folder / "model.safetensors").write_bytes(blob)
    assert data_starts < len((saved / "model.safetensors").read_bytes())
    refused(folder, "model.safetensors: damaged or truncated")


def header_of(file):
    blob = file.read_bytes()
    n = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + n]), blob[8 + n :]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(data_offsets=[0, 10**12]),
        lambda t: t.update(data_offsets=[-4, 252]),
        lambda t: t.update(shape=[8, 9]),
        lambda t: t.update(shape=[-8, -8]),
        lambda t: t.update(dtype="F99"),
        lambda t: t.pop("shape"),
        lambda t: t.update(shape="big"),
        lambda t: t.update(data_offsets=[0, 256]),
    ],
)
def test_headers_that_lie(change, copied):
    header, weights = header_of(copied / "model.safetensors")
    change(header[QUERY])
    text = json.dumps(header).encode()
    (copied / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + weights)
    refused(copied, "model.safetensors: damaged or truncated")


def test_tensors(copied, saved):
    def case(change, says):
        shutil.copy(saved / "model.safetensors", copied)
        resave(copied, change)
        return refused(copied, says)

    short = QUERY.removeprefix("roberta.")
    case(lambda s: s.pop(QUERY), f"rte-3: lacks {short} of a RobertaModel")
    case(
        lambda s: s.update({"roberta.encoder.layer.2.output.dense.bias": torch.ones(8)}),
        "encoder.layer.2.output.dense.bias is no part of a RobertaModel",
    )
    case(
        lambda s: s.update({QUERY: torch.ones(8, 9)}),
        r"query.weight has shape \(8, 9\), its configuration says \(8, 8\)",
    )
    case(
        lambda s: s.update({QUERY: torch.ones(8, 8, dtype=torch.int8)}),
        "lacks|is stored as torch.int8",
    )
    case(
        lambda s: [s.pop(n) for n in list(s) if n.startswith("roberta")],
        "holds no tensor of a RobertaModel",
    )
    case(
        lambda s: s.update({QUERY: torch.ones(8, 8).to(torch.float8_e4m3fn)}),
        "stores tensors as F8_E4M3",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [QUERY, "classifier.dense.bias"])
def test_not_finite(value, name, copied):
    resave(copied, lambda s: s[name].view(-1)[3:5].fill_(value))
    opened = open_checkpoint(copied)
    with pytest.raises(
        ValueError, match=f"rte-3: {name.removeprefix('roberta.')} holds 2 NaN or infinite"
    ):
        opened.check_finite()
    if name == QUERY:
        for attempt in (
            lambda: flatten(opened, opened.layout),
            lambda: TaskVector.between(opened, opened),
            lambda: write_checkpoint(opened, opened, copied / "w"),
        ):
            with pytest.raises(ValueError, match="query.weight holds NaN"):
                attempt()
        assert not (copied / "w").exists()


def shard(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name, where",
    [
        ("../sst2-0/model.safetensors", "outside of the folder"),
        ("/etc/passwd", "outside of the folder"),
        ("sub/part.safetensors", "not beside it"),
        ("..", "outside of the folder"),
        ("..\\part.safetensors", "not beside it"),
        ("./part.safetensors", "not beside it"),
        ("", "outside of the folder"),
    ],
)
def test_an_index_that_points_outside(name, where, copied):
    shard(
        copied,
        {
            **dict.fromkeys(load_file(copied / "model.safetensors"), "part.safetensors"),
            QUERY: name,
        },
    )
    refused(copied, f"lies {where}")


def test_indices(copied):
    all_here = dict.fromkeys(load_file(copied / "model.safetensors"), "part.safetensors")
    shard(copied, {**all_here, QUERY: "part-2.safetensors"})
    refused(copied, "shard 'part-2.safetensors' is missing", FileNotFoundError)
    index = copied / "model.safetensors.index.json"
    for weight_map, says in (
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(copied, says)
    index.write_text("{")
    refused(copied, "index.json: not JSON")
    unlisted = {n: f for n, f in all_here.items() if n != QUERY}
    for weight_map in (all_here, {**all_here, "roberta.more": "part.safetensors"}, unlisted):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert len(open_checkpoint(copied)) == 37  # what the shards hold counts


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    "save",
    [torch.save, legacy, lambda state, file: file.write_bytes(pickle.dumps(state, protocol=2))],
)
def test_pickles_never_run(save, copied, tmp_path):
    os.remove(copied / "model.safetensors")
    save({QUERY: torch.ones(2), "w": Bomb(tmp_path / "ran")}, copied / "pytorch_model.bin")
    message = refused(
        copied, "pytorch_model.bin: (refused, its pickle asks for more than tensors|damaged)"
    )
    assert not (tmp_path / "ran").exists(), message


def test_other_torch_files(copied):
    os.remove(copied / "model.safetensors")
    file = copied / "pytorch_model.bin"
    torch.save({"a": 3.0}, file)
    refused(copied, "not a state dict, a is no tensor")
    torch.save([torch.ones(1)], file)
    refused(copied, "holds a list, not a state dict")
    torch.save(classifier("roberta"), file)
    refused(copied, "refused, its pickle asks for more than tensors")
    torch.save(classifier("roberta").state_dict(), file)
    blob = file.read_bytes()
    for part in (
        blob[: len(blob) // 2],
        blob[:100],
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        file.write_bytes(part)
        refused(copied, "pytorch_model.bin: (damaged|refused)")


# writing


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("head", ["keep", "drop"])
def test_written_folders_open_everywhere(kind, head, tmp_path):
    like, tensors = (
        open_checkpoint(classifier(kind)),
        open_checkpoint(classifier(kind, seed=1)).state(),
    )
    folder = write_checkpoint(tensors, like, tmp_path / "deep" / "w", head=head)
    opened = open_checkpoint(folder)
    same(opened.state(), tensors)
    same(opened.head_state(), like.head_state() if head == "keep" else {})
    auto = AutoModelForSequenceClassification if head == "keep" else AutoModel
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert (
        not info["unexpected_keys"]
        and not info["mismatched_keys"]
        and all(n.startswith("pooler.") for n in info["missing_keys"])
    ), info
    same(body_of(model), tensors)
    if head == "keep":
        ids = torch.tensor([[3, 4, 5, 1]])
        reference = classifier(kind)
        for n, p in body_parameters(reference).items():
            p.data.copy_(tensors[n])
        torch.testing.assert_close(model.eval()(ids).logits, reference(ids).logits)
    assert (folder / "model.safetensors").read_bytes() == (
        write_checkpoint(tensors, like, tmp_path / "w2", head=head) / "model.safetensors"
    ).read_bytes()


def test_saved_buffers_travel_along(tmp_path):
    """I-BERT keeps its quantisation ranges in buffers: no weights, but its folder is not whole
    without them."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(transformers.IBertConfig(**SMALL))
    with torch.no_grad():
        model.ibert.embeddings.LayerNorm.activation.x_max.fill_(3.0)
    like = open_checkpoint(model)
    assert (
        not [n for n in like if "x_max" in n]
        and like.aside["embeddings.LayerNorm.activation.x_max"] == "buffer"
    )
    for head, auto in (("keep", AutoModelForSequenceClassification), ("drop", AutoModel)):
        again, info = auto.from_pretrained(
            write_checkpoint(like, like, tmp_path / head, head=head), output_loading_info=True
        )
        assert not info["unexpected_keys"] and all(
            n.startswith("pooler.") for n in info["missing_keys"]
        ), info
        assert again.base_model.embeddings.LayerNorm.activation.x_max.item() == 3


def test_tokenizer_travels_along(copied, tmp_path):
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "notes.md",
        "optimizer.bin",
    ):
        (copied / file).write_text("{}")
    opened = open_checkpoint(copied)
    written = write_checkpoint(opened, opened, tmp_path / "w")
    assert sorted(f.name for f in written.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_a_killed_write_leaves_nothing(copied, tmp_path, monkeypatch):
    opened = open_checkpoint(copied)
    old = open_checkpoint(write_checkpoint(opened, opened, tmp_path / "w")).sha256()
    doubled = {n: 2 * t for n, t in opened.tensors()}

    def killed(file, weights, place):
        os.pwrite(file, b"half", place)
        raise KeyboardInterrupt

    monkeypatch.setattr("weightregions.checkpoints.write_at", killed)
    for target in ("w", "new"):
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(doubled, opened, tmp_path / target, overwrite=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["rte-3", "w"]
    assert open_checkpoint(tmp_path / "w").sha256() == old
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="w: exists already"):
        write_checkpoint(doubled, opened, tmp_path / "w")
    write_checkpoint(doubled, opened, tmp_path / "w", overwrite=True)
    same(open_checkpoint(tmp_path / "w").state(), doubled)


def test_a_checkpoint_can_overwrite_itself(copied):
    opened = open_checkpoint(copied)
    before = opened.sha256()
    write_checkpoint(opened, opened, copied, overwrite=True)
    assert open_checkpoint(copied).sha256() == before


def test_writing_refuses(saved, tmp_path):
    opened = open_checkpoint(saved)
    state = opened.state()
    gone = state.pop("embeddings.LayerNorm.bias")
    with pytest.raises(ValueError, match="the body to write lacks embeddings.LayerNorm.bias"):
        write_checkpoint(state, opened, tmp_path / "w")
    with pytest.raises(ValueError, match="too many"):
        write_checkpoint(
            {**state, "embeddings.LayerNorm.bias": gone, "x": gone}, opened, tmp_path / "w"
        )
    with pytest.raises(ValueError, match="head policy 'none'"):
        write_checkpoint(opened, opened, tmp_path / "w", head="none")
    with pytest.raises(ValueError, match="has no configuration"):
        write_checkpoint(state, open_checkpoint(state), tmp_path / "w")
    assert not list(tmp_path.iterdir())


def test_task_vectors_of_checkpoints(saved, tmp_path):
    base, fine_tuned = (
        open_checkpoint(saved),
        open_checkpoint(classifier("roberta", seed=4, labels=6)),
    )
    tv = TaskVector.between(base, fine_tuned, torch.float64)
    written = open_checkpoint(write_checkpoint(tv.apply_to(base), base, tmp_path / "end"))
    same(written.state(), fine_tuned.state())
    assert tv.norm() == pytest.approx(
        (flatten(fine_tuned, base.layout) - flatten(base, base.layout)).double().norm().item(),
        rel=1e-6,
    )


# the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub cache with one repository and no network."
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub/models--me--rte"
    for commit, seed in (("a" * 40, 1), ("b" * 40, 2)):
        classifier("roberta", seed=seed).save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("b" * 40)
    (repo / "refs/v1").write_text("a" * 40)
    return repo


def test_hub_ids_and_revisions(hub):
    newest, first = open_checkpoint("me/rte"), open_checkpoint("me/rte", revision="v1")
    assert (newest.name, newest.source, first.source) == (
        "me/rte",
        f"me/rte@{'b' * 40}",
        f"me/rte@{'a' * 40}",
    )
    same(newest.state(), body_of(classifier("roberta", seed=2)))
    same(first.state(), body_of(classifier("roberta", seed=1)))
    refused(
        "me/sst2", "me/sst2: no such folder, and not to be had from the hub", FileNotFoundError
    )
    refused("me/rte", "not to be had from the hub", FileNotFoundError, revision="v9")


def test_hub_downloads_one_form_of_the_weights(tmp_path, monkeypatch):
    asked = []

    def snapshot(repo, revision=None, allow_patterns=(), ignore_patterns=()):
        asked.append([p for p in allow_patterns if p.endswith((".safetensors", ".bin"))])
        assert (
            revision == "v2"
            and ignore_patterns == ["*/*"]
            and not any("py" in p.split(".")[-1] for p in allow_patterns)
        )
        model = classifier("roberta")
        model.save_pretrained(tmp_path / "snap")
        if has_safetensors:
            return str(tmp_path / "snap")
        torch.save(
            load_file(tmp_path / "snap/model.safetensors"), tmp_path / "snap/pytorch_model.bin"
        )
        os.remove(tmp_path / "snap/model.safetensors")
        return str(tmp_path / "snap")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for has_safetensors, want in (
        (True, [["model*.safetensors"]]),
        (False, [["model*.safetensors"], ["pytorch_model*.bin"]]),
    ):
        asked.clear()
        assert len(open_checkpoint("me/rte", revision="v2")) == 37
        assert asked == want


def test_anatomy_knows_no_names():
    "A class that nobody listed, with another prefix and a head called after nothing."

    class Odd(transformers.BertPreTrainedModel):
        base_model_prefix = "trunk"

        def __init__(self, config):
            super().__init__(config)
            self.trunk, self.zigzag = transformers.BertModel(config), nn.Linear(8, 3)
            self.post_init()

    model = Odd(BertConfig(**SMALL))
    opened = open_checkpoint(model)
    assert (
        opened.head.names == ("zigzag.bias", "zigzag.weight")
        and anatomy(model).prefix == "trunk"
    )
    opened.require_same_space(open_checkpoint(classifier("bert")))


def descriptors(folder):
    "The files under a folder that this process has open."
    links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
    return sorted(
        os.readlink(l)
        for l in links
        if os.path.lexists(l) and os.readlink(l).startswith(str(folder))
    )


@pytest.mark.parametrize("most", [256, 1, 0])
def test_a_pass_keeps_files_open_no_more_than_there_may_be_and_closes_them(
    saved, tmp_path, monkeypatch, most
):
    from weightregions import stored

    monkeypatch.setattr(stored.reading, "most", most)
    models = [open_checkpoint(shutil.copytree(saved, tmp_path / f"m{i}")) for i in range(3)]
    name = models[0].layout.names[0]
    assert descriptors(tmp_path) == []
    with stored.reading.stay_open():
        for m in models:
            same(m.read(name, 1, 5), m[name].reshape(-1)[1:5])
        assert len(descriptors(tmp_path)) == min(most, 3)
        with stored.reading.stay_open():
            pass
        assert len(descriptors(tmp_path)) == min(most, 3)
    assert descriptors(tmp_path) == []
    with pytest.raises(RuntimeError), stored.reading.stay_open():
        models[0].read(name)
        raise RuntimeError
    assert descriptors(tmp_path) == []


def test_a_file_that_changes_during_a_pass_fails_it(saved, tmp_path):
    from weightregions import stored

    opened = open_checkpoint(shutil.copytree(saved, tmp_path / "m"))
    with (
        pytest.raises(ValueError, match="model.safetensors: changed since it was opened"),
        stored.reading.stay_open(),
    ):
        opened.read(opened.layout.names[0])
        os.utime(tmp_path / "m/model.safetensors", (1, 1))
        opened.read(opened.layout.names[1])
    with (
        pytest.raises(ValueError, match="model.safetensors: ends early"),
        stored.reading.stay_open(),
    ):
        again = open_checkpoint(tmp_path / "m")
        again.read(again.layout.names[0])
        os.truncate(tmp_path / "m/model.safetensors", 100)
        again.read(again.layout.names[1])
    assert descriptors(tmp_path) == []


def test_passes_and_single_reads_of_many_threads_do_not_close_each_others_files(
    saved, tmp_path
):
    from concurrent.futures import ThreadPoolExecutor
    from weightregions import stored

    opened = [open_checkpoint(shutil.copytree(saved, tmp_path / f"m{i}")) for i in range(2)]
    expected = [c.state() for c in opened]

    def one(i):
        c, want = opened[i % 2], expected[i % 2]
        if i % 3:
            for n in c.layout.names:
                same(c.read(n), want[n])
        else:
            with stored.reading.stay_open():
                for n in c.layout.names:
                    same(c.read(n), want[n])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(60)))
    assert stored.reading.users == 0 and descriptors(tmp_path) == []


def test_what_a_class_says_of_itself_is_asked_once(saved, tmp_path, monkeypatch, tried):
    from weightregions import checkpoints

    def opened():
        checkpoints._anatomy_of.cache_clear()
        return open_checkpoint(saved)

    def built(config):
        asked.append(config)
        return real(config)

    asked, real, first = [], checkpoints.built, opened()
    monkeypatch.setenv("WEIGHTREGIONS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "built", built)
    for again in (opened(), opened()):
        assert again.anatomy == first.anatomy and again.sha256() == first.sha256()
        assert again.layout == first.layout and again.aside == first.aside
    assert len(asked) == 1
    (file,) = (tmp_path / "cache" / "anatomy").iterdir()
    whole, damages = file.read_text(), 0
    for damaged in ("", "[]", "{}", whole[:40], whole.replace("weight", "wait"), "\0"):
        file.write_text(damaged)
        assert opened().anatomy == first.anatomy and file.read_text() == whole
        damages += 1
    assert len(asked) == 1 + damages
    monkeypatch.setattr(checkpoints, "version", lambda name: "0")
    opened()
    assert len(asked) == 2 + damages
    monkeypatch.setenv("WEIGHTREGIONS_CACHE", str(saved / "config.json"))  # no folder
    assert opened().anatomy == first.anatomy
    checkpoints._anatomy_of.cache_clear()
    tried(
        "a kept anatomy that is damaged or outdated", "checkpoints", damages + 1, "made again"
    )
