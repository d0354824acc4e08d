"""Run notebooks in place, each in a kernel of its own, and keep their outputs.

Cells that nbdev_test would skip (`#| slow`, `#| cuda`, ...) are left alone with the outputs
they have, so a figure made on a GPU outlives a run on a CPU. A notebook that fails is not
written.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbglob
from pages import CFG, ROOT, directives, without_widgets


class Client(NotebookClient):
    """A notebook client that passes over what is no code, the export at the tail, and cells
    with one of `flags`."""

    def __init__(self, nb, flags, **kwargs):
        super().__init__(nb, **kwargs)
        self.flags = flags

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        said = directives(cell)
        if (
            cell.cell_type != "code"
            or "nbdev_export(" in cell.source
            or said.get("eval:") == ["false"]
            or self.flags & said.keys()
        ):
            return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def execute(path, flags, timeout):
    "Execute one notebook, write it back, clean it; the seconds it took."
    nb = nbformat.read(path, as_version=4)
    start = time.time()
    Client(
        nb,
        flags,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    ).execute()
    without_widgets(nb)
    nbformat.write(nb, path)
    nbdev_clean.__wrapped__(str(path))
    return time.time() - start


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all of nbs/)")
    p.add_argument(
        "--flags", default="", help="run cells with these flags too, such as 'slow cuda'"
    )
    p.add_argument("--timeout", type=int, default=1200, help="seconds for one cell")
    a = p.parse_args()
    quiet = {
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # progress bars print times,
        "TRANSFORMERS_VERBOSITY": "error",  # load reports print paths:
        "PYTHONHASHSEED": "0",
    }  # a new diff at every run
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    skip = set(CFG.tst_flags.split()) - set(a.flags.split())
    failed = []
    for path in a.paths or sorted(nbglob(as_path=True)):
        path = path.resolve()
        try:
            print(
                f"{path.relative_to(ROOT)}: {execute(path, skip, a.timeout):.1f} s", flush=True
            )
        except CellExecutionError as error:
            failed.append(path.name)
            print(f"{path.relative_to(ROOT)}: FAILED, not written\n{error}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} notebooks failed: {' '.join(failed)}")
