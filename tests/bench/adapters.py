"""Adapters of a large decoder: compared and averaged by their factors, beside merging each
first and beside PEFT. Called by the bench as `ways.py` is.

The shapes are those of a decoder with 1.1 billion weights (22 layers, 2048 wide). The base is
written once in bfloat16, the adapters in float32, all with random numbers. Merging is measured
on two adapters: each costs the same, and so do the products of two whole models.
"""

import json
import sys
from pathlib import Path

import torch
from peers import took
from safetensors.torch import save_file
from ways import each, encode, now

SHAPE = dict(
    vocab_size=32000,
    hidden_size=2048,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    intermediate_size=5632,
    tie_word_embeddings=False,
)
SMALL = SHAPE | dict(hidden_size=64, num_hidden_layers=2, intermediate_size=176, vocab_size=500)
TARGETS = ("q_proj", "v_proj")


def config_of(size, layers=None):
    "The configuration of the base."
    from transformers import LlamaConfig

    shape = dict(SHAPE if size == "base" else SMALL)
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    return LlamaConfig(**shape, architectures=["LlamaForCausalLM"])


def write(folder, size, n, rank, layers=None):
    "The base and its adapters; how many weights it has."
    from transformers import LlamaForCausalLM

    root, config = Path(folder), config_of(size, layers)
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in LlamaForCausalLM(config).state_dict().items()}
    (root / "base").mkdir(parents=True)
    state = {k: (torch.randn(s) / 50).to(torch.bfloat16) for k, s in shapes.items()}
    save_file(state, root / "base" / "model.safetensors", metadata={"format": "pt"})
    config.to_json_file(root / "base" / "config.json")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM"}
    about |= {"target_modules": TARGETS, "base_model_name_or_path": None}
    for i in range(n):
        (out := root / f"{i:03d}").mkdir()
        save_file(factors(shapes, rank), out / "adapter_model.safetensors", {"format": "pt"})
        (out / "adapter_config.json").write_text(json.dumps(about))
    return {"params": sum(s.numel() for s in shapes.values())}


def factors(shapes, rank):
    "The matrices of one adapter."
    state = {}
    for name, (rows, columns) in ((k, s) for k, s in shapes.items() if len(s) == 2):
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            key = f"base_model.model.{module}"
            state[f"{key}.lora_A.weight"] = torch.randn(rank, columns) / 50
            state[f"{key}.lora_B.weight"] = torch.randn(rows, rank) / 50
    return state


def opened(folder, n):
    "The base and n adapters, as the package opens them."
    from weightregions.checkpoints import open_checkpoint

    base = open_checkpoint(Path(folder) / "base")
    return base, [open_checkpoint(Path(folder) / f"{i:03d}", base=base) for i in range(n)]


def compare(folder, n):
    "Cosines of adapters, by the package."
    from weightregions.similarity import gram

    begin = now()
    base, adapters = opened(folder, n)
    gram(adapters, base, progress=False).cosine()
    return took(begin) | {"n": n}


def merge_and_compare(folder, n):
    "Each merged by PEFT and written, then compared as whole models."
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from weightregions.checkpoints import open_checkpoint
    from weightregions.similarity import gram

    root, begin = Path(folder), now()
    for i in range(n):
        model = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, root / f"{i:03d}").merge_and_unload()
        merged.save_pretrained(root / f"merged-{i}")
    models = [open_checkpoint(root / f"merged-{i}") for i in range(n)]
    gram(models, open_checkpoint(root / "base"), progress=False).cosine()
    return took(begin) | {"n": n}


def centre(folder, n, rank):
    "The centroid of n adapters as an adapter on disk; exact where the rank is None."
    from peft import PeftModel  # noqa: F401  all ways have imported it when they begin
    from transformers import LlamaForCausalLM  # noqa: F401

    from weightregions.adapters import adapter_centroid, save_adapter

    begin = now()
    made = adapter_centroid(opened(folder, n)[1], rank=rank)
    save_adapter(made, Path(folder) / "centre", overwrite=True)
    return took(begin) | {"n": n}


def add_weighted(folder, n, how, rank):
    "The same by PEFT."
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    root, begin = Path(folder), now()
    names = [f"{i:03d}" for i in range(n)]
    model = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, root / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(root / name, name)
    model.add_weighted_adapter(names, [1 / n] * n, "centre", how, svd_rank=rank)
    model.save_pretrained(root / "peft", selected_adapters=["centre"])
    return took(begin) | {"n": n}


def between(folder, points):
    "One scratch model, refilled in place at each point between two adapters."
    from weightregions.traversal import ScratchModel, line

    base, adapters = opened(folder, 2)
    places = [i / points for i in range(points + 1)]
    return each([p for _, p in line(*adapters, places)], ScratchModel(base).load, "cpu")


def evaluation(folder, sentences):
    "The base encodes sentences."
    from weightregions.traversal import ScratchModel

    base, _ = opened(folder, 0)
    return encode(ScratchModel(base).load(base), sentences)


if __name__ == "__main__":
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result))
