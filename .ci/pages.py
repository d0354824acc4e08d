"What a reader sees of a notebook, shared by the README and the book."

import ast
import os
import re
from pathlib import Path

import nbformat
from nbdev.config import get_config
from nbdev.process import extract_directives

CFG = get_config(path=Path(__file__).resolve().parent.parent)
ROOT, NBS = CFG.config_path, CFG.nbs_path
LINK = re.compile(
    r"(!?\[[^\]]*\]\()(?!\w+:|#)([^)#\s]+)"
)  # [text](relative/path, the address up to its # or bracket


def directives(cell):
    "The `#|` lines of a code cell, as a dict; nothing for other cells."
    return (
        extract_directives(nbformat.from_dict(dict(cell)), remove=False)
        if cell.cell_type == "code"
        else {}
    )


def is_machinery(source):
    "Whether a cell of code holds nothing but imports, private helpers, or tests: it is folded."
    try:
        body = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body
    except SyntaxError:
        return False
    return bool(body) and all(map(_aside, body))


def _aside(node):
    "Whether a statement is an import, a private name, or a test."
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert)):
        return True
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name.startswith("_")
    if isinstance(node, ast.Assign):
        names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        return all(name.startswith("_") for name in names)
    call = node.value if isinstance(node, ast.Expr) else None
    name = (
        call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
    )
    return name.startswith("test_") or name in ("use_theme", "small_figures")


def without_widgets(nb):
    "Take out of a notebook what lives only as long as its kernel, such as progress bars."
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = [out for out in cell["outputs"] if not _is_widget(out)]


def _is_widget(output):
    "Whether an output is a place for a widget."
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def visible(path, without=(), note=lambda cell: {}):
    """The notebook at `path` less its hidden cells, those with a directive in `without`, and
    all `#|` lines; `note(cell)` is kept as `defines`."""
    nb = nbformat.read(path, as_version=4)
    keep = []
    for cell in nb.cells:
        said = directives(cell)
        if said.keys() & {"hide", *without}:
            continue
        if cell.cell_type == "code":
            cell.defines = list(note(cell))
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
            if said.get("echo:") == ["false"]:
                cell.source = ""
            if said.get("code-fold:") == ["true"] or is_machinery(cell.source):
                cell.metadata["tags"] = ["hide-input"]
        if cell.source or cell.get("outputs"):
            keep.append(cell)
    nb.cells = keep
    nb.metadata["language_info"] = {
        "name": "python",
        "pygments_lexer": "ipython3",
    }  # nbdev_clean drops it
    return nb


def links(markdown, there):
    """`markdown` with the address of every relative link and image given to `there`, and what
    it returns put in."""
    return LINK.sub(lambda m: m[1] + there(m[2]), markdown)


def from_root(folder):
    "A function for `links`: addresses relative to `folder` become relative to the repository."
    return lambda address: Path(
        os.path.normpath(Path(folder).relative_to(ROOT) / address)
    ).as_posix()
