"""JupyterLab's settings: notebooks are cleaned as they are saved, so that a diff shows what was
written and nothing else."""

from nbdev.clean import clean_jupyter

c.FileContentsManager.pre_save_hook = clean_jupyter  # noqa: F821 (Jupyter hands in `c`)
