"""What comparing many adapters of a large decoder costs, beside merging each one first: python tests/bench/adapters.py [--n 200] [--rank 16] [--all-linear].

The shapes are those of a decoder with 1.1 billion weights (22 layers, 2048 wide). The base is written once in bfloat16, the adapters in float32, all with random numbers. Each
measurement is a process of its own. Merging is measured on two adapters, and told for all of them: each costs the same, and so do the products of two whole models.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import save_file

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


def targets_of(config, everything):
    "Modules of a layer that have an update, with their outputs and inputs."
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    some = {"self_attn.q_proj": (d, d), "self_attn.v_proj": (kv, d)}
    rest = {"self_attn.k_proj": (kv, d), "self_attn.o_proj": (d, d)}
    rest |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    return some | rest if everything else some


def write(root, config, n, rank, everything):
    "The base and its adapters."
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaConfig(**config, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in LlamaForCausalLM(made).state_dict().items()}
    (root / "base").mkdir(parents=True)
    state = {k: (torch.randn(s) / 50).to(torch.bfloat16) for k, s in shapes.items()}
    save_file(state, root / "base" / "model.safetensors", metadata={"format": "pt"})
    made.to_json_file(root / "base" / "config.json")
    targets = targets_of(config, everything)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    said["target_modules"] = [t.split(".")[1] for t in targets]
    for i in range(n):
        (out := root / f"{i:03d}").mkdir()
        adapter = {}
        for layer in range(config["num_hidden_layers"]):
            for t, (rows, columns) in targets.items():
                name = f"base_model.model.model.layers.{layer}.{t}"
                adapter[f"{name}.lora_A.weight"] = torch.randn(rank, columns) / 50
                adapter[f"{name}.lora_B.weight"] = torch.randn(rows, rank) / 50
        save_file(adapter, out / "adapter_model.safetensors", metadata={"format": "pt"})
        (out / "adapter_config.json").write_text(json.dumps(said))


def compare(root, n):
    "Cosines of adapters, by the package."
    from weightregions.checkpoints import open_checkpoint
    from weightregions.similarity import gram

    begin = perf_counter()
    base = open_checkpoint(root / "base")
    adapters = [open_checkpoint(root / f"{i:03d}", base=base) for i in range(n)]
    gram(adapters, base, progress=False).cosine()
    return perf_counter() - begin


def merge_and_compare(root, n):
    "Each merged by PEFT and written, then compared as whole models."
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from weightregions.checkpoints import open_checkpoint
    from weightregions.similarity import gram

    begin = perf_counter()
    for i in range(n):
        model = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, root / f"{i:03d}").merge_and_unload()
        merged.save_pretrained(root / f"merged-{i}")
    merging = perf_counter() - begin
    base = open_checkpoint(root / "base")
    gram(
        [open_checkpoint(root / f"merged-{i}") for i in range(n)], base, progress=False
    ).cosine()
    return merging, perf_counter() - begin - merging


def alone(way, root, n):
    "One way in a process of its own: what it says, and its peak of memory in MB."
    code = (
        f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import"
        " adapters, resource; from pathlib import Path; import torch,"
        " weightregions.similarity; before ="
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; said ="
        f" adapters.{way}(Path({str(root)!r}), {n}); print(json.dumps([said,"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--n", type=int, default=200)
    a.add_argument("--rank", type=int, default=16)
    a.add_argument("--all-linear", action="store_true")
    a.add_argument("--small", action="store_true", help="a small decoder, to try the script")
    a.add_argument("--no-merge", action="store_true", help="leave out the merging")
    a.add_argument("--dir", default=None, help="where to write")
    a = a.parse_args()
    root = Path(tempfile.mkdtemp(dir=a.dir))
    try:
        write(root, SMALL if a.small else SHAPE, a.n, a.rank, a.all_linear)
        own = sum(f.stat().st_size for f in root.glob("*/adapter_model.safetensors"))
        seconds, peak = alone("compare", root, a.n)
        print(
            f"{a.n} adapters of rank {a.rank} ({own / 1e9:.2f} GB): {seconds:.1f} s,"
            f" peak {peak:.0f} MB, {torch.get_num_threads()} threads"
        )
        if not a.no_merge:
            (merging, comparing), peak = alone("merge_and_compare", root, 2)
            told = merging / 2 * a.n
            print(
                f"merged first, measured on 2: {merging:.0f} s to merge, {comparing:.0f} s to"
                f" compare, peak {peak:.0f} MB; the merging of {a.n} would take"
                f" {told / 60:.0f} minutes, to which their comparison comes"
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
