"Regions of fine-tuned language models in weight space: the names that most users need, each imported when it is asked for."

from importlib import import_module

__version__ = "0.1.0"

_HOME = {  # name -> the module that it comes from
    "open_checkpoint": "checkpoints",
    "open_zoo": "zoo",
    "load_corpora": "corpora",
    "Columns": "corpora",
    "Recipe": "finetuning",
    "build_zoo": "building",
    "cosine_similarity": "similarity",
    "cluster_report": "clustering",
    "line": "traversal",
    "traverse": "traversal",
    "ScratchModel": "traversal",
    "Probing": "probing",
    "Target": "probing",
    "centroid_of": "centering",
    "leave_out": "centering",
    "save_centroid": "centering",
    "regions_of": "region",
    "locate": "region",
    "recommend": "advice",
    "continue_from": "continuing",
    "save_continued": "continuing",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    "Import a name from its module, once."
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
