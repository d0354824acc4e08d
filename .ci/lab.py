"""JupyterLab's settings: a reader finds pages as in the book, plays, and leaves nothing behind.

Notebooks are cleaned as they are saved, so that a diff shows what was written and nothing else.
Hidden cells, imports and helpers are folded when a notebook is opened. Run All exports nothing:
the package is written by `make prepare`.
"""

import os
import platform
import sys
from pathlib import Path

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_jupyter

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pages import is_machinery, without_widgets  # noqa: E402 (the folder is known only now)

HERE = Path(__file__).resolve().parent
os.environ["IN_TEST"] = "1"  # read by nbdev_export in the kernels, which does nothing then
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no report at each model loaded
before = os.environ.get("JUPYTER_CONFIG_PATH", "")
os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(
    filter(None, [str(HERE / "jupyter"), before])
)
KERNEL = {  # what JupyterLab writes into a notebook when its kernel has started
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": platform.python_version(),
    },
}


class Folded(AsyncLargeFileManager):
    "Notebooks whose hidden cells, imports and helpers are folded as they are opened."

    async def get(self, path, content=True, **how):
        model = await super().get(path, content=content, **how)
        if content and model["type"] == "notebook":
            model["content"]["metadata"].update(KERNEL)  # else it counts as changed at once
            for cell in model["content"]["cells"]:
                if cell["cell_type"] == "code" and folded(cell["source"]):
                    cell["metadata"]["jupyter"] = {"source_hidden": True}
        return model


def folded(source):
    "Whether a cell is folded: hidden ones, and those that hold only imports, helpers or tests."
    aside = ("#| hide", "#| code-fold: true", "#| echo: false")
    return source.startswith(aside) or is_machinery(source)


def leave_nothing(model, **how):
    "Clean a notebook as it is saved, and take out what only this kernel can show."
    clean_jupyter(model=model, **how)
    if model["type"] != "notebook":
        return
    without_widgets(model["content"])
    for cell in model["content"]["cells"]:
        for out in cell.get("outputs", []):
            if "<iframe" in "".join(out.get("data", {}).get("text/html", "")):
                del out["data"]["text/html"]  # a page with a library of four megabytes


c.ServerApp.contents_manager_class = Folded  # noqa: F821 (Jupyter hands in `c`)
c.FileContentsManager.pre_save_hook = leave_nothing  # noqa: F821
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"  # noqa: F821
