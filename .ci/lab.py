"""JupyterLab's settings: a reader finds pages as in the book, plays, and leaves nothing behind.

Notebooks are cleaned as they are saved, so that a diff shows what was written and nothing else.
Hidden cells, imports and helpers are folded when a notebook is opened. Run All exports nothing:
the package is written by `make prepare`.
"""

import os
import sys
from pathlib import Path

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_jupyter

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pages import is_machinery  # noqa: E402 (the folder is known only now)

os.environ["IN_TEST"] = "1"  # read by nbdev_export in the kernels, which does nothing then


class Folded(AsyncLargeFileManager):
    "Notebooks whose hidden cells, imports and helpers are folded as they are opened."

    async def get(self, path, content=True, **how):
        model = await super().get(path, content=content, **how)
        if content and model["type"] == "notebook":
            for cell in model["content"]["cells"]:
                if cell["cell_type"] == "code" and folded(cell["source"]):
                    cell["metadata"]["jupyter"] = {"source_hidden": True}
        return model


def folded(source):
    "Whether a cell is folded: hidden ones, and those that hold only imports, helpers or tests."
    return source.startswith("#| hide") or is_machinery(source)


c.ServerApp.contents_manager_class = Folded  # noqa: F821 (Jupyter hands in `c`)
c.FileContentsManager.pre_save_hook = clean_jupyter  # noqa: F821
c.LabApp.news_url = None  # noqa: F821
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"  # noqa: F821
announcements = "@jupyterlab/apputils-extension:announcements"
c.LabApp.page_config_data = {"disabledExtensions": {announcements: True}}  # noqa: F821
