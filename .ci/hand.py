"""How the code reads, in numbers: exported cells, long lines, private names that cross modules.

python .ci/hand.py [FOLDER]        a checkout of the project; this one if not given
"""

import ast
import json
import re
import sys
from pathlib import Path
from statistics import median

WIDTH = 96


def code_cells(notebook):
    "The code cells of a notebook, as text."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def is_exported(cell):
    "Whether a cell goes into the package."
    return bool(re.match(r"#\| exporti?\b", cell))


def is_hidden(cell):
    "Whether a reader does not see a cell."
    return cell.startswith("#| hide")


def lines_of(cell):
    "The lines of a cell without its directives."
    return [line for line in cell.splitlines() if not line.startswith("#|")]


def defines(cell):
    "Whether a cell defines a function or a class: imports and constants need no run."
    return bool(re.search(r"^(?:def|class) ", cell, flags=re.M))


def shown(cells):
    "Of the exported cells that define something: whether the next visible code cell is a run."
    visible = [c for c in cells if not is_hidden(c)] + ["#| export"]
    pairs = zip(visible, visible[1:])
    return [
        not is_exported(after) for cell, after in pairs if is_exported(cell) and defines(cell)
    ]


def private_imports(module):
    "Private names that a module takes from other modules of the package."
    tree = ast.parse(module.read_text(encoding="utf-8"))
    inner = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    inner = [n for n in inner if n.level or (n.module or "").startswith("weightregions")]
    names = {((n.module or "").split(".")[-1], a.name) for n in inner for a in n.names}
    return {(where, name) for where, name in names if re.match(r"_(?!_)", name)}


def long_lines(file):
    "How many lines of a notebook's code, or of a Python file, are longer than `WIDTH`."
    cells = code_cells(file) if file.suffix == ".ipynb" else [file.read_text(encoding="utf-8")]
    return sum(len(line) > WIDTH for cell in cells for line in cell.splitlines())


def statement_lines(module):
    """Lines on which a statement, an argument or an element begins: a formatter's own breaks do
    not count."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return len({n.lineno for n in ast.walk(tree) if isinstance(n, (ast.stmt, ast.arg))})


def figures(root):
    "Name -> number, for a checkout."
    notebooks = sorted((root / "nbs").glob("*.ipynb"))
    modules = [m for m in (root / "weightregions").glob("*.py") if m.stem != "_modidx"]
    cells = {n: code_cells(n) for n in notebooks}
    sizes = sorted(len(lines_of(c)) for n in cells for c in cells[n] if is_exported(c))
    lines = [line for n in cells for c in cells[n] for line in c.splitlines()]
    runs = [seen for n in cells for seen in shown(cells[n])]
    private = {(m.stem, *name) for m in modules for name in private_imports(m)}
    text = [m.read_text(encoding="utf-8").splitlines() for m in modules]
    return {
        "exported cells": len(sizes),
        "lines of an exported cell, median": median(sizes),
        "lines of an exported cell, nine of ten": sizes[int(0.9 * len(sizes))],
        "lines of an exported cell, most": sizes[-1],
        "definitions followed by a visible run, %": round(100 * sum(runs) / len(runs)),
        f"code lines over {WIDTH} characters": sum(len(line) > WIDTH for line in lines),
        "longest code line": max(map(len, lines)),
        "private names across modules": len({name[1:] for name in private}),
        "package lines": sum(map(len, text)),
        "package lines where a statement or argument begins": sum(
            map(statement_lines, modules)
        ),
    }


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    for name, value in figures(Path(sys.argv[1]) if len(sys.argv) > 1 else here).items():
        print(f"{name}: {value:,}")
