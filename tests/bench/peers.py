"""What the peers do, run by the interpreter of their own environment: python peers.py WAY
ARGUMENTS, the arguments as JSON."""

import json
import sys
import time
from pathlib import Path


def merge(models, out, method="linear", base=None, each=None, **parameters):
    """mergekit's merge of some checkpoints, all with the same weight; `each` holds what it is
    told of every model, the other parameters belong to the whole."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    each = {"weight": 1.0} if each is None else each
    config = MergeConfiguration.model_validate(
        {
            "merge_method": method,
            "dtype": "float32",
            "base_model": base,
            "models": [{"model": m, "parameters": each} for m in models],
            "parameters": parameters,
        }
    )
    begin = time.perf_counter(), time.process_time()
    run_merge(
        config, out, MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    )
    return took(begin)


def walk(a, b, points, out, device="cpu"):
    """loss-landscapes' walk from one model to another, with a metric that costs nothing; a
    second walk keeps what it passes at half way."""
    import loss_landscapes
    import torch
    from loss_landscapes.metrics.metric import Metric
    from transformers import AutoModel

    class Nothing(Metric):
        def __call__(self, wrapper):
            return 0.0

    class Half(Metric):
        seen = 0

        def __call__(self, wrapper):
            self.seen += 1
            if self.seen == points // 2:
                torch.save(
                    {n: p.detach() for n, p in wrapper.modules[0].named_parameters()}, out
                )
            return 0.0

    first, second = (
        AutoModel.from_pretrained(m, add_pooling_layer=False).to(device) for m in (a, b)
    )
    torch.ones(1, device=device).sum().item()
    begin = time.perf_counter(), time.process_time()
    loss_landscapes.linear_interpolation(first, second, Nothing(), points, deepcopy_model=True)
    spent = took(begin)
    loss_landscapes.linear_interpolation(first, second, Half(), points, deepcopy_model=True)
    return {k: v / points for k, v in spent.items()}


def took(begin):
    """Seconds by the clock, and of the processor, since `begin`; what a GPU was asked to do is
    done."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - begin[0], "cpu": time.process_time() - begin[1]}


if __name__ == "__main__":
    ways = {"merge": merge, "walk": walk}
    found = ways[sys.argv[1]](**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(found))
