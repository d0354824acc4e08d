"""Every way that `make bench` measures, each called in a process of its own.

    python ways.py WAY ARGUMENTS RESULT        the arguments as JSON

A way returns seconds by the clock and of the processor, of the operation alone: not of starting
Python and importing. What a user would do today is written as a user would write it. A floor is
the least that any way has to do: read the bytes once, multiply once, write once. What computes
on a device takes its name, "cpu" or "cuda".
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from unittest.mock import patch

import torch
from peers import took

BUFFER = 2**20  # bytes that a floor reads or writes at a time
BLOCK = (
    2**18
)  # weights of each model that are copied to a device at a time, as the package does
THREADS = min(torch.get_num_threads(), 8)


def now(device="cpu"):
    """Where the clocks stand; what transformers imports late is imported before they start, and
    a GPU has started."""
    if "transformers" in sys.modules:
        from transformers import RobertaForMaskedLM, RobertaModel  # noqa: F401
    for dtype in (torch.float32, torch.float64):
        torch.ones(2, 2, dtype=dtype, device=device).mm(
            torch.ones(2, 2, dtype=dtype, device=device)
        ).sum().item()
    return perf_counter(), process_time()


def weights(folder):
    return Path(folder) / "model.safetensors"


def in_threads(work, tasks):
    """Call `work` for all tasks, in as many threads as the package would use, each computing in
    one."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, tasks))


# --- checkpoints ------------------------------------------------------------------------------

CONFIGS = {
    "base": dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "small": dict(
        vocab_size=2000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=130,
        type_vocab_size=1,
    ),
}


def write(folder, size, first, stop):
    """Random RoBERTas, number 0 the start, the others a little away from it in every weight; as
    masked-language models, which mergekit knows."""
    from safetensors.torch import save_file
    from transformers import RobertaConfig, RobertaForMaskedLM

    config, begin = RobertaConfig(**CONFIGS[size], architectures=["RobertaForMaskedLM"]), now()
    torch.manual_seed(0)
    model = RobertaForMaskedLM(config)
    start = {n: p.detach() for n, p in model.named_parameters()}
    for i in range(first, stop):
        (out := Path(folder) / f"{i:02d}").mkdir(parents=True, exist_ok=True)
        rng = torch.Generator().manual_seed(i)
        save_file(
            {
                n: t + 2e-3 * torch.randn(t.shape, generator=rng) * (i > 0)
                for n, t in start.items()
            },
            weights(out),
            metadata={"format": "pt"},
        )
        config.to_json_file(out / "config.json")
    return took(begin) | {
        "params": sum(t.numel() for n, t in start.items() if n.startswith("roberta."))
    }


def noisy(base, folder, n):
    "Copies of a model, moved a little in every weight of a body."
    from weightregions.checkpoints import open_checkpoint, write_checkpoint

    begin, start = now(), open_checkpoint(base)
    models = [str(Path(folder) / f"m{i}") for i in range(n)]
    for i, model in enumerate(models):
        rng = torch.Generator().manual_seed(i)
        moved = {k: t + 2e-3 * torch.randn(t.shape, generator=rng) for k, t in start.tensors()}
        write_checkpoint(moved, start, model, head="drop")
    return took(begin) | {"models": models, "params": start.layout.numel}


def first_layers(checkpoint, layers):
    "The first layers of a checkpoint as weights of their own."
    from weightregions.space import Weights, layer_of

    wanted, part = {f"layer {i}" for i in range(layers)}, Weights()
    part.name, part.read = checkpoint.name, checkpoint.read
    part.layout = checkpoint.layout.select(lambda n: layer_of(n) in wanted)
    return part


# --- (a) and (f): similarity ------------------------------------------------------------------


def similarity(models, base, out=None, layers=None, device="cpu"):
    "The package's."
    from weightregions.checkpoints import open_checkpoint
    from weightregions.similarity import gram

    begin = now(device)
    *opened, start = (
        c if layers is None else first_layers(c, layers)
        for c in map(open_checkpoint, [*models, base])
    )
    found = gram(opened, start, progress=False, device=device)
    spent = took(begin)
    if out:
        torch.save(torch.from_numpy(found.cosine().to_numpy().copy()), out)
    return spent | {"params": start.layout.numel}


def sketched(models, base, out, device="cpu"):
    "The package's random projection."
    from weightregions.checkpoints import open_checkpoint
    from weightregions.many import sketch

    begin = now(device)
    found = sketch(
        map(open_checkpoint, models), open_checkpoint(base), progress=False, device=device
    )
    cosines = found.cosine()
    spent = took(begin)
    torch.save(torch.from_numpy(cosines.to_numpy().copy()), out)
    return spent


def extended(models, base, out, device="cpu"):
    "The package's, of one model more than there were."
    from weightregions.checkpoints import open_checkpoint
    from weightregions.many import extend
    from weightregions.similarity import gram

    *opened, start = map(open_checkpoint, [*models, base])
    known = gram(opened[:-1], start, progress=False, device=device)
    begin = now(device)
    found = extend(known, opened[-1:], opened[:-1], start, progress=False, device=device)
    spent = took(begin)
    torch.save(torch.from_numpy(found.cosine().to_numpy().copy()), out)
    return spent


def body(file):
    return sorted(n for n in file.keys() if n.startswith("roberta."))


def load_stack_matmul(models, base, out, device="cpu"):
    "Load all models, stack them, subtract, normalise, multiply."
    from safetensors.torch import load_file

    def flat(folder):
        state = load_file(weights(folder), device=device)
        return torch.cat([state[n].flatten() for n in body(state)])

    begin = now(device)
    tvs = torch.stack([flat(m) for m in models]).sub_(flat(base))
    tvs.div_(tvs.norm(dim=1, keepdim=True))
    cosines = (tvs @ tvs.T).cpu()
    spent = took(begin)
    torch.save(cosines.double(), out)
    return spent


def streamed_loop(models, base, out, device="cpu"):
    "Tensor after tensor: stack, subtract, multiply, add up."
    from safetensors import safe_open

    begin = now(device)
    files = [safe_open(weights(m), "pt", device=device) for m in [*models, base]]
    products = torch.zeros(len(models), len(models), device=device)
    for name in body(files[0]):
        *tensors, start = (f.get_tensor(name).flatten() for f in files)
        tvs = torch.stack(tensors) - start
        products += tvs @ tvs.T
    norms = products.diag().sqrt()
    cosines = (products / norms.outer(norms)).cpu()
    spent = took(begin)
    torch.save(cosines.double(), out)
    return spent


def cosines_float64(models, base, out):
    "What the others are held against."
    from safetensors import safe_open

    files, begin = [safe_open(weights(m), "pt") for m in [*models, base]], now()
    products = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name in body(files[0]):
        for parts in zip(*(f.get_tensor(name).flatten().split(2**21) for f in files)):
            tvs = torch.stack([p.double() for p in parts[:-1]]) - parts[-1].double()
            products += tvs @ tvs.T
    norms = products.diag().sqrt()
    torch.save(products / norms.outer(norms), out)
    return took(begin)


def read_once(files, size):
    "Read the first `size` bytes of some files, in all threads."

    def one(task):
        file, start = task
        view = memoryview(bytearray(BUFFER))
        with open(file, "rb", buffering=0) as f:
            f.seek(start)
            for _ in range(start, min(start + 16 * BUFFER, size), BUFFER):
                f.readinto(view)

    in_threads(one, [(f, i) for f in files for i in range(0, size, 16 * BUFFER)])


def copy_once(n, params, device):
    "Copy n vectors to the device, to a GPU from pinned memory."
    stored, there = (
        torch.ones(n, BLOCK, pin_memory=device != "cpu"),
        torch.empty(n, BLOCK, device=device),
    )
    for _ in range(max(1, params // BLOCK)):
        there.copy_(stored, non_blocking=True)


def multiply_once(n, params, dtype, device="cpu"):
    "The products of n vectors, from numbers that lie in the processor's cache, or on the GPU."
    columns, threads = (2**12, THREADS) if device == "cpu" else (BLOCK, 1)

    def one(times):
        x, products = (
            torch.ones(n, columns, dtype=dtype, device=device),
            torch.zeros(n, n, dtype=dtype, device=device),
        )
        for _ in range(times):
            products.addmm_(x, x.T)

    in_threads(one, [params // columns // threads] * threads)


def ceiling(models, base, params, what, device="cpu"):
    "What similarity has to do, one thing alone: read, copy, or multiply in some type."
    n, begin = len(models) + 1, now(device)
    if what == "read":
        read_once([weights(m) for m in [*models, base]], 4 * params)
    elif what == "copy":
        copy_once(n, params, device)
    else:
        multiply_once(n, params, getattr(torch, what), device)
    return took(begin)


def similarity_floor(models, base, params, dtype, device="cpu"):
    "Read the bytes once and multiply once; with a GPU also copy them, all at the same time."
    alone = [
        ceiling(models, base, params, what, device)
        for what in ("read", dtype) + ("copy",) * (device != "cpu")
    ]
    return {k: (sum if device == "cpu" else max)(one[k] for one in alone) for k in alone[0]}


# --- (b): average -----------------------------------------------------------------------------


def average(models, out):
    "The package's."
    from weightregions.centering import centroid

    begin = now()
    centroid(models, out=out)
    return took(begin)


def load_and_add(models, out):
    "Load all, add, divide, save."
    from safetensors.torch import load_file, save_file

    begin = now()
    states = [load_file(weights(m)) for m in models]
    mean = {n: sum(s[n] for s in states) / len(states) for n in states[0]}
    Path(out).mkdir()
    save_file(mean, weights(out), metadata={"format": "pt"})
    spent = took(begin)
    (Path(out) / "config.json").write_bytes((Path(models[0]) / "config.json").read_bytes())
    return spent


def average_floor(models, params, out):
    "Read the members once and write as much as one of them, stretch by stretch."
    Path(out).mkdir()
    begin = now()
    with open(weights(out), "wb") as written:

        def one(start):
            view = memoryview(bytearray(BUFFER))
            for m in models:
                with open(weights(m), "rb", buffering=0) as f:
                    f.seek(start), f.readinto(view)
            os.pwrite(written.fileno(), view[: 4 * params - start], start)

        in_threads(one, range(0, 4 * params, BUFFER))
    return took(begin)


def average_error(out, models):
    "Largest difference from the average in float64, as a share of the tensor's largest weight."
    from weightregions.checkpoints import open_checkpoint

    found, members, worst = open_checkpoint(out), [open_checkpoint(m) for m in models], 0.0
    for name, size in zip(found.layout.names, found.layout.sizes):
        apart = most = 0.0
        for place in ((i, i + 2**19) for i in range(0, size, 2**19)):
            exact = sum(m.read(name, *place).double() for m in members) / len(members)
            apart, most = (
                max(apart, float((found.read(name, *place) - exact).abs().max())),
                max(most, float(exact.abs().max())),
            )
        worst = max(worst, apart / most)
    return {"error": worst}


def merge_by(method, models, base, out):
    "The package's point of another method than the mean, written as a checkpoint."
    from weightregions.checkpoints import open_checkpoint, write_checkpoint
    from weightregions.rivals import rival

    begin = now()
    point = rival(method, models, base)
    write_checkpoint(dict(point.tensors()), open_checkpoint(models[0]), out, head="drop")
    return took(begin)


def apart(out, ours):
    "Share of the weights that differ by more than 1e-5 of the largest of their tensor."
    from weightregions.checkpoints import open_checkpoint

    found, other, differ = open_checkpoint(out), open_checkpoint(ours), 0
    for name in found.layout.names:
        a, b = found.read(name), other.read(name)
        differ += int(((a - b).abs() > 1e-5 * b.abs().max()).sum())
    return {"error": differ / found.layout.numel}


# --- (c): a point on a line -------------------------------------------------------------------


def each(path, go, device):
    """Seconds of going to a point in the middle of a path, the median; the two ends are mere
    copies."""
    spent = []
    for place in path:
        begin = now(device)
        go(place)
        spent.append(took(begin))
    return {k: median(s[k] for s in spent[1:-1]) for k in spent[0]}


def keep(model, out):
    "Write the weights of a model without a copy of them."
    torch.save({n: p.detach() for n, p in model.named_parameters()}, out)


def stand(a, b, points, out, held=True, device="cpu"):
    """The package's: one scratch model, refilled in place from two models in memory, or from
    their files."""
    from weightregions.checkpoints import open_checkpoint
    from weightregions.traversal import ScratchModel, load_in_memory, line

    ends = [
        load_in_memory(c, head="drop", device=device) if held else c
        for c in map(open_checkpoint, (a, b))
    ]
    scratch = ScratchModel(ends[0], device=device)
    spent = each(
        [p for _, p in line(*ends, [i / points for i in range(points + 1)])],
        scratch.load,
        device,
    )
    keep(next(scratch.load(p) for _, p in line(*ends, [0.5])), out)
    return spent


def state_dicts(a, b, points, out, copied=False, device="cpu"):
    "A freshly computed state dict for each point, loaded into one model, or into a copy."
    from copy import deepcopy
    from transformers import AutoModel

    scratch, other = (
        AutoModel.from_pretrained(m, add_pooling_layer=False).to(device) for m in (a, b)
    )
    ends = [{n: t.clone() for n, t in m.state_dict().items()} for m in (scratch, other)]

    def go(alpha):
        model = deepcopy(scratch) if copied else scratch
        model.load_state_dict(
            {
                n: (1 - alpha) * t + alpha * ends[1][n] if t.is_floating_point() else t
                for n, t in ends[0].items()
            }
        )
        return model

    spent = each([i / points for i in range(points + 1)], go, device)
    keep(go(0.5), out)
    return spent


def line_floor(params, points, device="cpu"):
    "Stream two members through memory once, and write one."
    a, b, c = (
        torch.zeros(params, device=device),
        torch.ones(params, device=device),
        torch.empty(params, device=device),
    )
    return each(
        [i / points for i in range(points + 1)],
        lambda alpha: torch.lerp(a, b, alpha, out=c),
        device,
    )


def evaluation(a, sentences, device="cpu"):
    "A model that is loaded encodes sentences."
    from transformers import AutoModel

    model = AutoModel.from_pretrained(a, add_pooling_layer=False).eval().to(device)
    return encode(model, sentences, device)


def encode(model, sentences, device="cpu"):
    "Encode sentences of 24 tokens."
    ids = torch.randint(
        5, model.config.vocab_size, (sentences, 24), generator=torch.Generator().manual_seed(1)
    ).to(device)
    begin = now(device)
    with torch.inference_mode():
        for batch in ids.split(50):
            model(batch)
    return took(begin)


def line_error(out, a, b):
    "Largest difference from the middle in float64, as a share of the tensor's largest weight."
    from weightregions.checkpoints import open_checkpoint

    ends, found, worst = (
        [open_checkpoint(m) for m in (a, b)],
        torch.load(out, weights_only=True, map_location="cpu"),
        0.0,
    )
    for n in ends[0].layout.names:
        exact = sum(m.read(n).double() for m in ends).reshape(found[n].shape) / 2
        worst = max(worst, float((found[n].double() - exact).abs().max() / exact.abs().max()))
    return {"error": worst}


# --- (d): the probe ---------------------------------------------------------------------------


def base_model(size, folder, kind="minilm"):
    """MiniLM where it is to be had, else, or if small, the tiny base; or a RoBERTa of random
    weights, with its size; the folder."""
    from weightregions.bases import minilm, plain_texts, tiny_base, tiny_tokenizer

    if kind == "random":
        from transformers import RobertaConfig, RobertaForMaskedLM

        torch.manual_seed(0)
        for part in (
            RobertaForMaskedLM(RobertaConfig(**CONFIGS[size])),
            tiny_tokenizer(plain_texts(250)),
        ):
            part.save_pretrained(Path(folder) / "random")
        return str(Path(folder) / "random")
    if size != "small":
        try:
            return str(minilm())
        except FileNotFoundError:
            pass
    return str(tiny_base(Path(folder) / "tiny"))


def probed(base, size, device):
    "An encoder, and a target of 400 rows to fit on and 300 to test on."
    from transformers import AutoModel
    from weightregions.corpora import load_corpora
    from weightregions.probing import Target

    n_train, n_test = (60, 40) if size == "small" else (400, 300)
    corpus = load_corpora("builtin", names=["films"], n_train=n_train, n_test=n_test)["films"]
    model = AutoModel.from_pretrained(base).eval().to(device)
    return (
        model,
        Target(corpus, base),
        {"params": sum(p.numel() for p in model.parameters()), "n": n_train + n_test},
    )


def probe(base, size, device="cpu"):
    "The package's: encode once, then the optimum of a convex problem."
    from weightregions.probing import generalized_loss

    model, target, about = probed(base, size, device)
    begin = now(device)
    found = generalized_loss(model, target)
    return took(begin) | about | {"objective": found["objective"]}


def probe_by_sgd(base, size, device="cpu"):
    """A linear layer on the frozen encoder, trained by Adam on 200 batches of 32 rows, each
    encoded when it is its turn."""
    from weightregions.probing import sgd_probe

    model, target, about = probed(base, size, device)
    begin = now(device)
    found = sgd_probe(model, target, steps=10 if size == "small" else 200)
    return took(begin) | about | {"objective": found["objective"]}


def probe_floor(base, size, device="cpu"):
    "Encode all rows once."
    from weightregions.probing import encode

    model, target, about = probed(base, size, device)
    begin = now(device)
    for split in (target.train, target.test):
        encode(model, split)
    return took(begin) | about


# --- (e): a zoo -------------------------------------------------------------------------------

SEEDS = 1, 2


def recipe_of(size, dtype):
    from weightregions.finetuning import Recipe

    return Recipe(steps=4 if size == "small" else 60, dtype=dtype)


def corpora_of(size):
    from weightregions.corpora import load_corpora

    names = (
        ["films", "stays"] if size == "small" else ["films", "stays", "headlines", "questions"]
    )
    return load_corpora(
        "builtin",
        names=names,
        n_train=80 if size == "small" else 2000,
        n_test=40 if size == "small" else 300,
    )


def zoo(
    base,
    size,
    folder,
    dtype="auto",
    workers=None,
    one_thread=True,
    like_length=True,
    device="cpu",
):
    """The package's: batches of like length, several processes of one thread each; their start,
    once a zoo, is part of it. One process can do without either."""
    from shutil import rmtree
    from transformers import Trainer
    from weightregions import finetuning
    from weightregions.building import build_zoo

    corpora = corpora_of(size)
    threads = (
        nullcontext() if one_thread else patch.object(finetuning, "one_thread", nullcontext)
    )
    batches = (
        nullcontext()
        if like_length
        else patch.object(finetuning.Bucketed, "_get_train_sampler", Trainer._get_train_sampler)
    )
    begin = now(device)
    with threads, batches:
        build_zoo(folder, base, corpora, recipe_of(size, dtype), SEEDS, workers=workers)
    spent = took(begin)
    rmtree(folder)
    return per_model(spent, len(corpora) * len(SEEDS))


def trainer(base, size, folder, dtype, padding, device="cpu"):
    """A plain Trainer, one model after the other in all threads, rows padded to the longest
    allowed or to the longest of the batch."""
    from shutil import rmtree
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )
    from weightregions.finetuning import evaluate, quiet

    corpora, recipe, begin = corpora_of(size), recipe_of(size, dtype), now(device)
    tokenizer = AutoTokenizer.from_pretrained(base)

    class Rows(list):
        lengths = property(lambda self: [len(row["input_ids"]) for row in self])

    def rows(table):
        encoded = tokenizer(
            table["text"].tolist(),
            padding="max_length" if padding == "longest allowed" else False,
            truncation=True,
            max_length=recipe.max_length,
        )
        return Rows(
            {**{k: v[i] for k, v in encoded.items()}, "labels": y}
            for i, y in enumerate(table["label"].tolist())
        )

    for corpus, seed in product(corpora.values(), SEEDS):
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                base, num_labels=len(corpus.labels)
            )
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            seed=seed,
            bf16=dtype == "bfloat16",
            use_cpu=device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        t = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows(corpus.train),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        t.remove_callback(PrinterCallback)
        t.train()
        evaluate(model, rows(corpus.test), tokenizer)
        model.save_pretrained(Path(folder) / f"{corpus.name}-{seed}")
    spent = took(begin)
    rmtree(folder)
    return per_model(spent, len(corpora) * len(SEEDS))


def per_model(spent, models):
    "Seconds a model."
    return {k: v / models for k, v in spent.items()} | {"n": models}


if __name__ == "__main__":
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result))
