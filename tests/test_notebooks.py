"Every notebook runs from top to bottom: one test each, in this process, by nbdev's own runner."

import nbformat
import pytest
from conftest import ROOT, has_gpu
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives
from nbdev.test import (
    test_nb as run_notebook,
)  # under its own name pytest would take it for a test

CFG = get_config(path=ROOT)
NOTEBOOKS = sorted(nbglob(CFG.nbs_path, as_path=True))


def flags_of(cell):
    "The flags of a code cell that settings.ini names."
    if cell.cell_type != "code":
        return set()
    return extract_directives(nbformat.from_dict(dict(cell)), remove=False).keys() & set(
        CFG.tst_flags.split()
    )


def count(notebook, skip):
    "Pairs of: `ran` or the flags for which cells are left out, and how many cells."
    counts = {"ran": 0}
    for cell in nbformat.read(notebook, as_version=4).cells:
        left = " ".join(sorted(flags_of(cell) & skip))
        if cell.cell_type == "code":
            counts[left or "ran"] = counts.get(left or "ran", 0) + 1
    return counts


@pytest.mark.parametrize(
    "notebook", NOTEBOOKS, ids=lambda p: p.relative_to(CFG.nbs_path).with_suffix("").as_posix()
)
def test_notebook(notebook, request, record_property, capfd):
    run = set(request.config.getoption("--flags").split()) | ({"cuda"} if has_gpu() else set())
    skip = set(CFG.tst_flags.split()) - run
    for flag, cells in count(notebook, skip).items():
        record_property("cells", (flag, cells))
    well, _ = run_notebook(notebook.absolute(), skip_flags=sorted(skip), basepath=ROOT)
    assert well, capfd.readouterr().err
