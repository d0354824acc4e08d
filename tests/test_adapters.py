"""Adapters: what PEFT writes is read as PEFT merges it, for encoders and decoders; products,
centroids, commands and faults."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from weightregions.adapters import adapter_centroid, as_checkpoint, save_adapter
from weightregions.bases import tiny_base
from weightregions.centering import centroid
from weightregions.checkpoints import open_checkpoint, updates_of
from weightregions.cli import main
from weightregions.corpora import load_corpora
from weightregions.identity import weights_sha256
from weightregions.many import cross_similarity, extend
from weightregions.results import Study
from weightregions.scales import SCALES
from weightregions.similarity import gram
from weightregions.study import begin, fine_tune_all, measure
from weightregions.study import start as base_of
from weightregions.traversal import ScratchModel, average, line
from weightregions.updates import Update
from weightregions.zoo import open_zoo

peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = dict(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
)
GPT2 = dict(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=20, pad_token_id=0)
KINDS = {
    "roberta": (RobertaConfig(**SMALL), RobertaForSequenceClassification, ["query", "value"]),
    "bert": (BertConfig(**SMALL), BertModel, ["query", "dense"]),
    "gpt2": (GPT2Config(**GPT2), GPT2LMHeadModel, ["c_attn", "c_proj", "wte"]),
    "gpt2-head": (GPT2Config(**GPT2), GPT2ForSequenceClassification, ["c_attn", "c_fc"]),
    "llama": (LlamaConfig(**SMALL, num_key_value_heads=1), LlamaForCausalLM, "all-linear"),
    "qwen": (
        Qwen2Config(**SMALL, num_key_value_heads=1, pad_token_id=0),
        Qwen2ForSequenceClassification,
        ["q_proj", "embed_tokens"],
    ),
    "gemma": (
        GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8),
        GemmaForCausalLM,
        ["q_proj", "v_proj"],
    ),
}
VARIANTS = {
    "plain": dict(r=4, lora_alpha=8),
    "rslora": dict(r=2, lora_alpha=3, use_rslora=True),
    "all biases": dict(r=4, bias="all"),
    "own biases": dict(r=3, bias="lora_only", lora_alpha=16),
    "patterns": dict(
        r=4,
        rank_pattern={"^.*1.*": 3},
        alpha_pattern={"query": 5, "q_proj": 7, "attn.c_attn": 9},
    ),
}


def task_of(cls):
    if "Sequence" in cls.__name__:
        return "SEQ_CLS"
    return "FEATURE_EXTRACTION" if cls is BertModel else "CAUSAL_LM"


def adapted(cls, folder, out, seed, **settings):
    "An adapter as PEFT writes it, moved at random; and the model as PEFT merges it."
    torch.manual_seed(seed)
    model = cls.from_pretrained(folder)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=task_of(cls), **settings))
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(out)
    return model.merge_and_unload()


@pytest.fixture(scope="module", params=KINDS)
def world(request, tmp_path_factory):
    "A base of one architecture, its adapters of every variant, and the merged models."
    root, (config, cls, targets) = tmp_path_factory.mktemp("adapters"), KINDS[request.param]
    torch.manual_seed(0)
    cls(config).save_pretrained(root / "base")
    base, opened, merged = open_checkpoint(root / "base", pooler="keep"), [], []
    for i, (name, settings) in enumerate(VARIANTS.items()):
        model = adapted(cls, root / "base", root / name, i, target_modules=targets, **settings)
        opened.append(open_checkpoint(root / name, base=base))
        merged.append(model)
    return root, cls, base, opened, merged


def exact(model, base):
    "The task vector in float64, from exact sums."
    parts = []
    for name, size in zip(base.layout.names, base.layout.sizes):
        stored = model._body[name]
        if isinstance(stored, Update):
            parts.append(stored.delta())
        else:
            parts.append(stored.read().double() - base.read(name).reshape(-1).double())
        assert len(parts[-1]) == size
    return torch.cat(parts)


def test_an_adapter_is_what_peft_merges(world):
    _, _, base, opened, merged = world
    for a, model in zip(opened, merged):
        whole = open_checkpoint(model, pooler="keep")
        a.require_same_space(base)
        assert a.layout == whole.layout
        for name in a.layout.names:
            torch.testing.assert_close(a[name], whole[name], rtol=1e-5, atol=1e-6)
        own = dict(model.named_parameters())
        for name in a.head.names:
            torch.testing.assert_close(a.read(name), own[name].detach())
        heads = {n for n in own if n in a.head.names}
        assert heads == set(a.head.names)


def test_reading_in_stretches_is_reading_whole(world):
    _, _, base, opened, _ = world
    for a in opened:
        for name in updates_of(a, base):
            whole, n = a.read(name).reshape(-1), a[name].numel()
            for first, stop in ((0, 1), (n // 3, n // 2 + 1), (n - 1, n)):
                part = a.read(name, first, stop)
                torch.testing.assert_close(part, whole[first:stop], rtol=0, atol=1e-7)


def test_products_without_weights_are_exact(world):
    _, _, base, opened, _ = world
    found = gram(opened, base, by=lambda n: n.split(".")[-1], progress=False)
    rows = torch.stack([*(exact(a, base) for a in opened), flat(base)])
    truth = (rows @ rows.T).numpy()
    np.testing.assert_allclose(found.products(), truth, rtol=1e-9, atol=1e-12)
    norms = np.sqrt(np.diag(truth)[:-1])
    cosines = truth[:-1, :-1] / np.outer(norms, norms)
    np.testing.assert_allclose(found.cosine(), cosines, rtol=1e-9, atol=1e-12)


def flat(base):
    return torch.cat([base.read(n).reshape(-1).double() for n in base.layout.names])


def test_adapters_among_whole_models_are_streamed(world, tmp_path):
    _, cls, base, opened, merged = world
    merged[0].save_pretrained(tmp_path / "whole")
    whole = open_checkpoint(tmp_path / "whole", pooler="keep")
    mixed = gram([whole, *opened[1:]], base, progress=False).cosine()
    alone = gram(opened, base, progress=False).cosine()
    np.testing.assert_allclose(mixed, alone, atol=1e-4)
    crossed = cross_similarity([whole], opened, base, progress=False)
    np.testing.assert_allclose(crossed.iloc[0], alone.iloc[0], atol=1e-4)
    added = gram(opened[:3], base, progress=False)
    more = extend(added, [whole, opened[3]], opened[:3], base, progress=False)
    assert more.names == (*added.names, "whole", opened[3].name)


@pytest.mark.parametrize("rank", [None, 3])
def test_peft_opens_the_centroid(world, tmp_path, rank):
    root, cls, base, opened, _ = world
    middle = adapter_centroid(opened, rank=rank)
    save_adapter(middle, tmp_path / "centroid")
    point, again = as_checkpoint(middle), open_checkpoint(tmp_path / "centroid", base=base)
    model = peft.PeftModel.from_pretrained(
        cls.from_pretrained(root / "base"), tmp_path / "centroid"
    )
    merged = open_checkpoint(model.merge_and_unload(), pooler="keep")
    mean = average(opened) if rank is None else point
    for name in base.layout.names:
        for other in (again, merged, mean):
            torch.testing.assert_close(other[name], point[name], rtol=1e-4, atol=1e-6)
    assert (middle.error == 0) == (rank is None)


def test_the_exact_centroid_has_all_digits(world):
    _, _, base, opened, _ = world
    weights = [1, 2, 0, 4, 3]
    middle = adapter_centroid(opened, weights)
    mean = sum(w * exact(a, base) for w, a in zip(weights, opened)) / sum(weights)
    for name, place in zip(base.layout.names, map(base.layout.slice, base.layout.names)):
        if name in middle.factors:
            left, right = middle.factors[name]
            torch.testing.assert_close(
                (left @ right).reshape(-1), mean[place], rtol=1e-9, atol=1e-14
            )
        elif name in middle.whole:
            moved = middle.whole[name].reshape(-1) - base.read(name).reshape(-1).double()
            torch.testing.assert_close(moved, mean[place], rtol=1e-9, atol=1e-14)
        else:
            assert not mean[place].any()


def test_a_line_between_adapters(world):
    _, _, base, opened, _ = world
    scratch = ScratchModel(base)
    for coordinates, point in line(opened[0], opened[1], [0.0, 0.5, 1.0, 2.0]):
        scratch.load(point)
        for name in base.layout.names:
            a, b = opened[0][name], opened[1][name]
            ours = a + coordinates["alpha"] * (b - a)
            torch.testing.assert_close(scratch.body[name].detach(), ours, rtol=1e-5, atol=1e-5)


# --- what is refused --------------------------------------------------------------------------

KEY = "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_B.weight"
A_KEY = KEY.replace("lora_B", "lora_A")
WORDS = "base_model.model.roberta.embeddings.word_embeddings.weight"


def tensors(change):
    "A fault in the tensors."

    def damage(folder):
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return damage


def settings(**changes):
    "A fault in the settings."

    def damage(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def cut(n):
    def damage(folder):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-n])

    return damage


def pop(*keys):
    return tensors(lambda state: [state.pop(key) for key in keys])


def both(*damages):
    def damage(folder):
        for one in damages:
            one(folder)

    return damage


FAULTS = {
    "another base": settings(base_model_name_or_path="{other}"),
    "a module that the base has not": tensors(
        lambda s: s.update(
            {k.replace("layer.1", "layer.9"): s.pop(k) for k in list(s) if "layer.1" in k}
        )
    ),
    "a decoder's module": tensors(
        lambda s: s.update(
            {
                k.replace("roberta.encoder.layer", "model.layers"): s.pop(k)
                for k in list(s)
                if "encoder" in k
            }
        )
    ),
    "a factor is missing": pop(KEY),
    "a module is missing": pop(KEY, A_KEY),
    "other sizes": tensors(lambda s: s.update({KEY: torch.randn(15, 4)})),
    "a factor of another rank": tensors(lambda s: s.update({KEY: torch.randn(16, 3)})),
    "another vocabulary": tensors(lambda s: s.update({WORDS: torch.randn(61, 16)})),
    "a factor that is no matrix": tensors(lambda s: s.update({KEY: torch.randn(64)})),
    "NaN": tensors(lambda s: s.update({KEY: torch.full((16, 4), torch.nan)})),
    "infinity": tensors(lambda s: s.update({A_KEY: torch.full((4, 16), torch.inf)})),
    "whole numbers": tensors(lambda s: s.update({KEY: torch.ones(16, 4, dtype=torch.int32)})),
    "a tensor of DoRA": tensors(
        lambda s: s.update(
            {KEY.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(16)}
        )
    ),
    "an empty file": tensors(lambda s: s.clear()),
    "cut by a byte": cut(1),
    "cut by many": cut(2000),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "no JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "rank 0": settings(r=0),
    "rank as text": settings(r="8"),
    "another rank than it says": settings(r=8),
    "alpha that is no number": settings(lora_alpha="16"),
    "an infinite alpha": settings(lora_alpha=float("inf")),
    "DoRA": settings(use_dora=True),
    "another method": settings(peft_type="IA3"),
    "no method": settings(peft_type=None),
    "PiSSA": settings(init_lora_weights="pissa_niter_4"),
    "replicated layers": settings(layer_replication=[[0, 2]]),
    "trained tokens": settings(trainable_token_indices=[1]),
    "a bias in a factor": settings(lora_bias=True),
    "tokens that are texts": settings(trainable_token_indices=["a"]),
    "an update that is not named": settings(target_modules=["query"]),
    "no module is named": settings(target_modules=[]),
    "a factor under two names": tensors(
        lambda s: s.update({A_KEY.replace(".weight", ".default.weight"): s[A_KEY] + 1})
    ),
    "a head under two names": tensors(
        lambda s: s.update(
            {"base_model.model.classifier.modules_to_save.dense.bias": torch.ones(16)}
        )
    ),
    "a module that was to be saved": settings(modules_to_save=["classifier", "LayerNorm"]),
    "a module is missing, of a pattern": both(
        settings(target_modules=r"roberta\..*layer\.(0|1)\..*(query|value)"), pop(KEY, A_KEY)
    ),
    "a module is missing, of a layer": both(settings(layers_to_transform=0), pop(KEY, A_KEY)),
    "an update of another layer": settings(layers_to_transform=[0], layers_pattern="layer"),
    "an update that is excluded": settings(exclude_modules=["value"]),
    "layers that are texts": settings(layers_to_transform=["0"]),
    "a pattern that is none": settings(rank_pattern={"(": 3}),
    "a pattern that takes for ever": settings(alpha_pattern={"(a+)+b": 3}),
    "a pattern with rank 0": settings(rank_pattern={"query": 0}),
    "patterns that are a list": settings(rank_pattern=["query"]),
}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    "A base, another start, and an adapter."
    root = tmp_path_factory.mktemp("example")
    config, cls, targets = KINDS["roberta"]
    for name in ("base", "other"):
        torch.manual_seed(len(name))
        cls(config).save_pretrained(root / name)
    adapted(cls, root / "base", root / "adapter", 1, target_modules=targets, r=4)
    adapted(cls, root / "base", root / "second", 2, target_modules=targets, r=2)
    return root


def test_faults_of_adapters_are_named(example, tmp_path, tried):
    base, second = open_checkpoint(example / "base"), None
    second = open_checkpoint(example / "second", base=base)
    for fault, damage in FAULTS.items():
        folder = tmp_path / "sick"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(example / "adapter", folder)
        damage(folder)
        file = folder / "adapter_config.json"
        file.write_text(file.read_text().replace("{other}", str(example / "other")))
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            gram([open_checkpoint(folder, base=base), second], base, progress=False)
        said = str(e.value)
        assert "sick" in said and "\n" not in said, f"{fault}: {said}"
    tried("an adapter's files and settings", "checkpoints", len(FAULTS), "named")


CHOICES = {
    "a pattern": dict(target_modules=r"(?:roberta\.)?encoder\.layer\.\d\..*(query|dense)"),
    "one layer": dict(target_modules=["query"], layers_to_transform=1),
    "layers by name": dict(
        target_modules=["query", "dense"], layers_to_transform=[0], layers_pattern=["layer"]
    ),
    "some excluded": dict(target_modules=["query", "value"], exclude_modules=r".*0.*value"),
    "one by its whole name": dict(target_modules=["roberta.encoder.layer.1.output.dense"]),
    "an optional part": dict(
        target_modules=["query", "value"], rank_pattern={r"(roberta\.)?.*layer\.1.*value": 3}
    ),
    "modules saved": dict(target_modules=["query"], modules_to_save=["LayerNorm"], bias="all"),
    "rows of tokens": dict(target_modules=["query"], trainable_token_indices=[7, 2, 59]),
    "rows by name": dict(
        target_modules=["query"], trainable_token_indices={"word_embeddings": [3]}
    ),
}


def test_modules_are_chosen_as_peft_chooses(example, tmp_path, tried):
    base = open_checkpoint(example / "base")
    for i, (name, choice) in enumerate(CHOICES.items()):
        cls = RobertaForSequenceClassification
        model = adapted(cls, example / "base", tmp_path / str(i), i, **choice)
        ours, theirs = open_checkpoint(tmp_path / str(i), base=base), open_checkpoint(model)
        for tensor in base.layout.names:
            torch.testing.assert_close(
                ours[tensor], theirs[tensor], rtol=1e-5, atol=1e-6, msg=f"{name}: {tensor}"
            )
        changed = [n for n in base.layout.names if not torch.equal(ours[n], base[n])]
        assert set(updates_of(ours, base)) == set(changed), name
    how = "opened with the numbers that PEFT merges"
    tried("a way to choose modules", "adapters", len(CHOICES), how)


def test_an_adapter_takes_its_base(example, tmp_path):
    with pytest.raises(ValueError, match="holds an adapter; give the model"):
        open_checkpoint(example / "adapter")
    with pytest.raises(ValueError, match="no module of the base|no tensor of the base"):
        config, cls, _ = KINDS["llama"]
        open_checkpoint(example / "adapter", base=cls(config))
    with pytest.raises(FileNotFoundError, match="no module|there is no such folder"):
        open_checkpoint(example / "adapter", base=tmp_path / "gone")


def test_adapters_of_two_bases(example, tmp_path, tried):
    for name, of in (
        ("adapter", "somebody/roberta-small"),
        ("second", "somebody/roberta-large"),
    ):
        shutil.copytree(example / name, tmp_path / name)
        settings(base_model_name_or_path=of)(tmp_path / name)
    base = open_checkpoint(example / "base")
    both = [open_checkpoint(tmp_path / n, base=base) for n in ("adapter", "second")]
    for refuse in (
        lambda: gram(both, base, progress=False),
        lambda: centroid(both),
        lambda: adapter_centroid(both),
        lambda: open_zoo(tmp_path, base=base),
    ):
        with pytest.raises(
            ValueError, match="roberta-small, second over roberta-large: two bases"
        ):
            refuse()
    tried("adapters of two bases", "similarity, centring and zoo", 4, "named")


NAMES = {
    "/gone/base": True,
    "C:\\models\\base": True,
    "somebody/base": True,
    "somebody/another": False,
    "/gone/another": False,
    None: True,
}


def test_a_base_of_which_nothing_is_known_is_said(example, tmp_path, tried):
    for name in ("adapter", "second"):
        shutil.copytree(example / name, tmp_path / name)
    for of, known in NAMES.items():
        for name in ("adapter", "second"):
            settings(base_model_name_or_path=of)(tmp_path / name)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            open_zoo(tmp_path, base=example / "base").checked(example / "base")
        texts = [str(w.message) for w in said]
        what = f"trained over {of}: nothing tells whether base is that model"
        assert texts == [] if known else len(texts) == 1 and what in texts[0], (of, texts)
    n = len(NAMES)
    tried("a base that may be another than the named one", "adapters", n, "said where it is")


def test_the_scale_is_part_of_the_hash(example, tmp_path):
    shutil.copytree(example / "adapter", tmp_path / "adapter")
    settings(lora_alpha=99)(tmp_path / "adapter")
    assert weights_sha256(tmp_path / "adapter") != weights_sha256(example / "adapter")


def test_a_pickled_adapter(example, tmp_path):
    shutil.copytree(example / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    base = open_checkpoint(example / "base")
    one, other = (open_checkpoint(r / "adapter", base=base) for r in (tmp_path, example))
    torch.testing.assert_close(one.state(), other.state(), rtol=0, atol=0)


# --- the commands -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    "Adapters of three datasets and a whole model, over a tiny base with a tokenizer."
    root = tmp_path_factory.mktemp("heap")
    base, cls = tiny_base(root / "base", steps=2), RobertaForSequenceClassification
    model = cls.from_pretrained(base)
    for i, dataset in enumerate(("films", "headlines", "meals")):
        for seed in (1, 2, 3):
            out = root / "zoo" / dataset / str(seed)
            targets = ["query", "value"]
            adapted(cls, base, out, 10 * i + seed, target_modules=targets, r=2 + seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(root / "whole" / "films" / "4")
    return root


def run(*words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main([str(w) for w in words])


def test_every_command_takes_adapters(heap, tmp_path, capsys):
    zoo, base, data = (
        heap / "zoo",
        ("--base", heap / "base"),
        ("--data", "builtin", "--target", "films"),
    )
    assert run("similarity", zoo, *base, "--out", tmp_path / "s") == 0
    assert (tmp_path / "s" / "similarity.csv").read_text().count("\n") == 10
    assert (
        run("locate", zoo / "films" / "1", "--zoo", zoo, *base, "--out", tmp_path / "l.csv")
        == 0
    )
    ends = zoo / "films" / "1", zoo / "meals" / "2"
    few = ("--rows", 20, "--points", 2, "--out", tmp_path / "t")
    assert run("traverse", *ends, *base, *data, *few) == 0
    small = ("--rows", 20, "--out", tmp_path / "r.csv")
    assert run("recommend", zoo, *base, *data, *small) == 0
    assert run("center", zoo, *base, "--out", tmp_path / "exact") == 0
    assert run("center", zoo, *base, "--out", tmp_path / "two", "--rank", 2) == 0
    assert "an adapter of rank 2, relative error 0." in capsys.readouterr().out
    assert (
        run("center", zoo, *base, "--out", tmp_path / "full", "--full", "--without", "films")
        == 0
    )
    start = open_checkpoint(heap / "base")
    exact, full = open_checkpoint(tmp_path / "exact", base=start), open_zoo(zoo, base=start)
    mean = centroid(full.checkpoints())
    for name in start.layout.names:
        torch.testing.assert_close(exact[name], mean[name], rtol=1e-4, atol=1e-6)
    assert open_checkpoint(tmp_path / "full").layout == start.layout


def test_a_centroid_of_adapters_is_a_start(heap, tmp_path, capsys, tried):
    base, data = ("--base", heap / "base"), ("--data", "builtin", "--target", "films")
    assert run("center", heap / "zoo", *base, "--out", tmp_path / "centre") == 0
    few = ("--rows", 40, "--steps", 1, "--method", "head", "--out", tmp_path / "next")
    start = ("finetune", "--start", tmp_path / "centre")
    assert run(*start, *data, *few) == 2
    assert "centre: holds an adapter; give the model it was" in capsys.readouterr().err
    assert run(*start, *base, *data, *few) == 0
    about = json.loads((tmp_path / "next" / "fine-tuning.json").read_text())
    assert about["start"] == {"name": "centre", "sha256": weights_sha256(tmp_path / "centre")}
    assert about["weights"]["sha256"] == weights_sha256(tmp_path / "next")
    below = open_checkpoint(heap / "base")
    centre = open_checkpoint(tmp_path / "centre", base=below)
    tuned = open_checkpoint(tmp_path / "next")
    for name in below.layout.names:  # the head alone was trained
        torch.testing.assert_close(tuned[name], centre[name], rtol=1e-5, atol=1e-6)
    tried("an adapter as a start", "finetune", 2, "put onto its base, or refused without one")


def test_no_bar_where_the_environment_wants_none(example, capsys):
    base = open_checkpoint(example / "base")
    gram([open_checkpoint(example / n, base=base) for n in ("adapter", "second")], base)
    assert capsys.readouterr().err == ""


def test_adapters_among_whole_models(heap, tmp_path, capsys):
    shutil.copytree(heap / "zoo", tmp_path / "zoo")
    shutil.copytree(heap / "whole" / "films" / "4", tmp_path / "zoo" / "films" / "4")
    base = ("--base", heap / "base")
    assert run("similarity", tmp_path / "zoo", *base, "--out", tmp_path / "s") == 0
    assert run("center", tmp_path / "zoo", *base, "--out", tmp_path / "c") == 0
    assert (tmp_path / "c" / "model.safetensors").exists()
    assert run("center", tmp_path / "zoo", *base, "--out", tmp_path / "d", "--rank", 2) == 2
    assert "some members are whole models" in capsys.readouterr().err


def test_without_a_base_adapters_are_left_out(heap, tmp_path):
    for name in ("1", "2"):
        shutil.copytree(heap / "whole" / "films" / "4", tmp_path / name)
    shutil.copytree(heap / "zoo" / "films" / "1", tmp_path / "lora")
    with pytest.warns(UserWarning, match="lora: an adapter, which takes its base"):
        assert len(open_zoo(tmp_path)) == 2
    assert len(open_zoo(tmp_path, base=heap / "base")) == 3


# --- zoos of adapters that are trained here ---------------------------------------------------

BUILD = """
import sys; from pathlib import Path
from weightregions.building import build_zoo
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe
corpora = load_corpora("builtin", names=["films", "headlines"], n_train=40, n_test=20)
recipe = Recipe(steps=3, batch_size=8, trains="lora", rank=2, modules=("key", "dense"))
build_zoo(Path(sys.argv[1]), sys.argv[2], corpora, recipe, [1, 2], workers=1)
"""


def built(zoo, base, hash_seed):
    "Build a zoo in a process of its own; the bytes of all that a reader looks at."
    env = os.environ | {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(zoo), str(base)]
    subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL)
    files = [f for f in zoo.rglob("*") if f.is_file() and f.suffix in (".json", ".safetensors")]
    return {f.relative_to(zoo).as_posix(): f.read_bytes() for f in files}


def test_a_zoo_of_adapters_resumes_to_the_same_bytes(heap, tmp_path, tried):
    base = heap / "base"
    whole = built(tmp_path / "one", base, 1)
    shutil.rmtree(tmp_path / "one" / "films" / "seed-2")
    (tmp_path / "one" / "headlines" / "seed-1" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "one" / "headlines" / "seed-1")
    assert built(tmp_path / "one", base, 2) == whole
    tried("an adapter of a zoo lost", "building a zoo", 2, "made again, to the byte")
    assert not any("README" in f or "model.safetensors" == f.split("/")[-1] for f in whole)
    settings = json.loads(whole["films/seed-1/adapter_config.json"])
    assert settings["target_modules"] == ["dense", "key"]
    assert settings["base_model_name_or_path"] == "base"


def test_peft_opens_what_is_trained_here(heap, tmp_path):
    base = heap / "base"
    built(tmp_path / "zoo", base, 1)
    zoo = open_zoo(tmp_path / "zoo", base=base).checked(base)
    zoo.verify()
    cls = RobertaForSequenceClassification
    for m, checkpoint in zip(zoo.models.itertuples(), zoo.checkpoints()):
        labels = len(json.loads((Path(m.path) / "manifest.json").read_text())["labels"])
        model = cls.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
        merged = peft.PeftModel.from_pretrained(model, m.path).merge_and_unload().state_dict()
        for name in checkpoint.layout.names:
            torch.testing.assert_close(checkpoint[name], merged[f"roberta.{name}"])
        head = {k: v for k, v in merged.items() if not k.startswith("roberta.")}
        assert head.keys() == {f"{n}" for n in checkpoint.head.names}


def test_the_command_trains_adapters(heap, tmp_path, capsys):
    few = ("--datasets", "films,headlines", "--rows", 40, "--steps", 6, "--seeds", 1)
    where = (heap / "base", "--data", "builtin", "--out", tmp_path / "zoo", "--workers", 1)
    lora = ("--trains", "lora", "--rank", 2, "--modules", "query")
    assert run("zoo", *where, *few, *lora) == 0
    assert run("similarity", tmp_path / "zoo", "--base", heap / "base", "--out", tmp_path) == 0
    capsys.readouterr()
    for words, problem in (
        (("--trains", "lora", "--modules", "quarry"), "no module quarry for LoRA"),
        (("--rank", 3), "--rank, --alpha and --modules are of --trains lora"),
        (("--trains", "lora", "--alpha", 0), "alpha must be a positive number"),
    ):
        elsewhere = (heap / "base", "--data", "builtin", "--out", tmp_path / "no")
        assert run("zoo", *elsewhere, *few, *words) == 2
        error = capsys.readouterr().err
        assert problem in error and error.count("\n") <= 2, error


def test_adapters_of_one_base_have_one_start_however_far_they_moved(heap, tmp_path):
    far = []
    for i in (1, 2):
        shutil.copytree(heap / "zoo" / "films" / str(i), tmp_path / str(i))
        settings = json.loads((tmp_path / str(i) / "adapter_config.json").read_text())
        settings["lora_alpha"] = 1e4 * i
        (tmp_path / str(i) / "adapter_config.json").write_text(json.dumps(settings))
        far.append(open_checkpoint(tmp_path / str(i), base=heap / "base", name=str(i)))
    assert centroid(far).keys() == set(far[0].layout.names)
    far[0].require_same_start(open_checkpoint(heap / "base"))


def test_a_study_of_adapters_has_its_rows(tmp_path):
    scale = SCALES["tiny"]
    recipe = replace(scale.recipe, steps=3, trains="lora", rank=2)
    scale = replace(scale, name="lora", recipe=recipe, seeds=3, sizes=(), started=0)
    corpora = load_corpora("builtin", ["films", "meals", "headlines"], n_train=60, n_test=20)
    base = base_of("tiny", tmp_path)
    begin(tmp_path, scale, "builtin", base, corpora)
    fine_tune_all(tmp_path, scale, base, corpora, workers=1)
    measure(tmp_path, scale, base)
    study = Study(tmp_path)
    factors, similar = study.rows("factors"), study.rows("similarity_main")
    assert len(factors) == len(similar) == 36
    torch.testing.assert_close(
        torch.tensor(factors.products), torch.tensor(similar.cosine), rtol=1e-3, atol=1e-4
    )
    assert "cosine of embeddings" not in similar  # no adapter changes them
    assert not (tmp_path / "rows" / "similarity_starts.csv").exists()
