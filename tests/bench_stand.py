"""What it costs to stand at a point, beside the ways that a user has today. Not a test: run it by hand.

    python tests/bench_stand.py [--loss-landscapes FOLDER] [--size roberta] [--sentences 500]

One process, one thread, processor time (a shared machine's wall clock tells of its other users; --wall for that). Every way measures the same path, and the losses that come out are compared. The time of standing at a point
and of the evaluation are taken side by side, point after point; the medians are reported, of standing without the two ends, which are mere copies.
"""
import argparse
import copy
import os
import sys
import time
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from weightregions.checkpoints import open_checkpoint
from weightregions.traversal import Stand, hold, hull, line

CLOCK = time.perf_counter if "--wall" in sys.argv else time.process_time
SIZES = {
    "minilm": lambda: BertForSequenceClassification(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
}


def models(size, n, words=1.0):
    "Models a little away from one random start in every weight, the hardest case; or with only a share of the words' vectors moved."
    torch.manual_seed(0)
    start, made = SIZES[size]().eval(), []
    for seed in range(n):
        made.append(copy.deepcopy(start))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in made[-1].parameters():
                moved = 2e-3 * torch.randn(p.shape, generator=generator)
                if words < 1 and len(p) == start.config.vocab_size: moved[torch.rand(len(p), generator=torch.Generator().manual_seed(9)) > words] = 0
                p += moved
    return made


class Evaluation:
    "The loss of a classifier on sentences of 24 random tokens; remembers the seconds of every call."
    def __init__(self, sentences, vocab):
        rng = torch.Generator().manual_seed(1)
        self.ids, self.labels = torch.randint(5, vocab, (sentences, 24), generator=rng), torch.randint(0, 2, (sentences,), generator=rng)
        self.seconds = []

    def __call__(self, model):
        begin, loss = CLOCK(), 0.0
        with torch.inference_mode():
            for i in range(0, len(self.ids), 50):
                loss += torch.nn.functional.cross_entropy(model(self.ids[i:i + 50]).logits, self.labels[i:i + 50], reduction="sum").item()
        self.seconds.append(CLOCK() - begin)
        return loss / len(self.ids)


def timed(path, go, evaluation):
    "Losses along a path, and seconds of each `go` to a point."
    losses, seconds = [], []
    for place in path:
        begin = CLOCK()
        model = go(place)
        seconds.append(CLOCK() - begin)
        losses.append(evaluation(model))
    return losses, seconds


def by_state_dict(made):
    "A freshly computed state dict, loaded into a model of one's own, for each point."
    a, b = (m.state_dict() for m in made[:2])
    scratch = copy.deepcopy(made[0])
    def go(alpha):
        state = {k: (1 - alpha) * a[k] + alpha * b[k] if a[k].is_floating_point() else a[k] for k in a}
        scratch.load_state_dict(state)
        return scratch
    return go


def by_deep_copy(made):
    "A copy of the model, with a freshly computed state dict, for each point."
    a, b = (m.state_dict() for m in made[:2])
    def go(alpha):
        model = copy.deepcopy(made[0])
        model.load_state_dict({k: (1 - alpha) * a[k] + alpha * b[k] if a[k].is_floating_point() else a[k] for k in a})
        return model
    return go


def by_loss_landscapes(made, folder, points, evaluation):
    "The package's own walk over copies of the two models, which leaves out the start; what is not evaluation is spent on standing."
    if folder: sys.path.insert(0, folder)
    try:
        import loss_landscapes
        from loss_landscapes.metrics.metric import Metric
    except ImportError as error:
        return f"not measured: {error}"

    class Loss(Metric):
        def __call__(self, wrapper): return evaluation(wrapper.modules[0].eval())

    before = len(evaluation.seconds)
    begin = CLOCK()
    losses = loss_landscapes.linear_interpolation(made[0], made[1], Loss(), points - 1, deepcopy_model=True)
    spent = CLOCK() - begin - sum(evaluation.seconds[before:])
    return [float("nan"), *losses], [spent / (points - 1)] * points


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--loss-landscapes", default="", help="folder that holds the package, if it is not installed")
    p.add_argument("--size", choices=SIZES, default="minilm")
    p.add_argument("--sentences", type=int, default=500)
    p.add_argument("--points", type=int, default=5, help="at least 3")
    p.add_argument("--wall", action="store_true", help="time by the wall clock")
    a = p.parse_args()
    torch.set_num_threads(1)
    made = models(a.size, 5)
    evaluation = Evaluation(a.sentences, made[0].config.vocab_size)
    alphas = [i / (a.points - 1) for i in range(a.points)]
    held = [hold(open_checkpoint(m, name=f"m{i}")) for i, m in enumerate(made)]
    usual = [hold(open_checkpoint(m, name=f"usual {i}")) for i, m in enumerate(models(a.size, 2, words=0.25))]
    stand = Stand(made[0], head="average")
    stand.at(held[0]), evaluation(stand.model)  # pages touched, kernels chosen
    evaluation.seconds.clear()
    ways = {"weightregions, in place": lambda: timed([p for _, p in line(held[0], held[1], alphas)], stand.at, evaluation),
            "state dict, loaded": lambda: timed(alphas, by_state_dict(made), evaluation),
            "model copied, state dict loaded": lambda: timed(alphas, by_deep_copy(made), evaluation),
            "loss-landscapes": lambda: by_loss_landscapes(made, a.loss_landscapes, a.points, evaluation),
            "weightregions, a quarter of the words moved": lambda: timed([p for _, p in line(*usual, alphas)], stand.at, evaluation),
            "weightregions, hull of 5 models": lambda: timed([p for _, p in hull(held, a.points)], stand.at, evaluation)}
    found = {name: way() for name, way in ways.items()}
    one = median(evaluation.seconds)
    rows = []
    for name, result in found.items():
        if isinstance(result, str):
            rows.append({"way": name, "seconds a point": result})
            continue
        losses, seconds = result
        same = "hull" not in name and "quarter" not in name  # the same models and places
        usual_cost = median(seconds[1:-1])
        row = {"way": name, "seconds a point": f"{usual_cost:.4f}", "first point": f"{seconds[0]:.4f}", "of an evaluation": f"{usual_cost / one:.2%}"}
        rows.append(row | ({f"loss at {x:g}": "not measured" if v != v else f"{v:.6f}" for x, v in zip(alphas, losses)} if same else {}))
    print(f"{a.size}: {sum(p.numel() for p in made[0].parameters()) / 1e6:.1f} M weights, {a.sentences} sentences of 24 tokens, "
          f"an evaluation takes {one:.2f} s (median of {len(evaluation.seconds)}), {torch.get_num_threads()} thread")
    print(pd.DataFrame(rows).fillna("").to_string(index=False))
    curves = [np.array(r[0]) for name, r in found.items() if not isinstance(r, str) and "hull" not in name and "quarter" not in name]
    print(f"largest difference between the losses of two ways: {max(np.nanmax(np.abs(c - curves[0])) for c in curves):.1e}")


if __name__ == "__main__": main()
