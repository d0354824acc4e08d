"""Build the browsable book from the executed notebooks: python .ci/book.py [_book]

Nothing is run. The pages are the notebooks less their hidden cells; names of the package become
links to where they are defined; a reference lists them all. Sphinx with `-W`: a broken link or
picture fails the build.
"""

import ast
import html
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbdev.doclinks import nbglob
from pages import CFG, NBS, ROOT, directives, from_root, links, visible
from sphinx.cmd.build import main as sphinx

from weightregions.explore import study_page
from weightregions.report import with_columns, without_gaps
from weightregions.results import Study

HERE = Path(__file__).resolve().parent / "book"
EXPLORE = '<p><a href="explore.html">Explore the recorded run interactively</a></p>\n\n'
DEFINES = (ast.FunctionDef, ast.ClassDef)


def natural_key(path):
    "A key that sorts c12 after c2."
    return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", path.as_posix())]


CONCEPTS = (  # chapters on what the paper is about, by number; all others are engineering
    "00_space",
    "04_similarity",
    "05_many",
    "06_clustering",
    "20_probing",
    "22_traversal",
    "24_comparison",
    "30_centering",
    "32_region",
    "34_starting",
    "36_advice",
)


def parts(pages):
    "The parts of the book: what was found, what it rests on, how it is built."
    chapters = [page for page in pages if page[0].isdigit()]
    return {
        "story": [page for page in pages if page.startswith("study/")],
        "concepts": [page for page in chapters if page in CONCEPTS],
        "engineering": [page for page in chapters if page not in CONCEPTS],
    }


def notebooks():
    "The notebooks in reading order, by their address in the book without suffix."
    found = {
        p.relative_to(NBS).with_suffix("").as_posix(): p
        for p in sorted(nbglob(as_path=True), key=natural_key)
    }
    first = {"index": found.pop("index"), "glossary": found.pop("glossary")}
    order = [page for part in parts(found).values() for page in part]
    return first | {page: found[page] for page in order} | found


def doc(node):
    "The first line of a definition's docstring."
    return (ast.get_docstring(node) or "").split("\n")[0]


def symbols(cell):
    """The public functions, classes and methods that a cell exports: name -> first line of the
    docstring."""
    found = {}
    if not directives(cell).keys() & {"export", "exports"}:
        return found
    for node in ast.parse(cell.source).body:
        if not isinstance(node, DEFINES) or node.name.startswith("_"):
            continue
        if any(
            isinstance(d, ast.Name) and d.id.startswith("patch") for d in node.decorator_list
        ):
            found[f"{ast.unparse(node.args.args[0].annotation)}.{node.name}"] = doc(node)
            continue
        found[node.name] = doc(node)
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, DEFINES) and not method.name.startswith("_") and doc(method):
                found[f"{node.name}.{method.name}"] = doc(method)
    return found


def defined_in(path):
    "All that the notebook at `path` exports."
    return {
        name: what
        for cell in nbformat.read(path, as_version=4).cells
        for name, what in symbols(cell).items()
    }


def link(page, name, home):
    "HTML that leads from `page` to the definition of `name` on the page `home`."
    address = os.path.relpath(home, Path(page).parent)
    return f'<a class="symbol" href="{address}.html#{name}"><code>{name}</code></a>'


WIDE = 800  # pixels; a wider figure is moved sideways on a phone


def with_words(out, path, prose):
    """An output whose figure has its alternative text, and whose links lead to pages; gaps in a
    table are left empty, unless the prose above speaks of NaN."""
    data, about = out.get("data", {}), out.get("metadata", {}).get("image/png", {})
    if "image/png" in data:
        alt = html.escape(about.get("alt") or f"figure of {path.stem}")
        width = f' width="{about["width"]}"' if "width" in about else ""
        source = f"data:image/png;base64,{data['image/png'].strip()}"
        image = f'<img src="{source}" alt="{alt}"{width}>'
        if about.get("width", 0) > WIDE:
            image = f'<div class="wide-figure" tabindex="0">{image}</div>'
        out["data"] = {"text/html": image}
    elif "text/html" in data:
        page = re.sub(r'href="([^":]+)\.ipynb', r'href="\1.html', data["text/html"])
        out["data"] = {
            "text/html": with_columns(page if "NaN" in prose else without_gaps(page))
        }
    return out


def describe(dest, pages):
    "Give each page the description that search engines and messengers show: its subtitle."
    for page, path in pages.items():
        file = dest / f"{page}.html"
        cells = nbformat.read(path, as_version=4).cells
        prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        subtitle = re.search(r"^> (.+)$", prose, flags=re.M)
        about = html.escape(re.sub(r"[`*$]", "", subtitle[1])) if subtitle else CFG.title
        text = file.read_text(encoding="utf-8")
        tag = f'<meta name="description" content="{about}">'
        file.write_text(text.replace("</head>", f"{tag}</head>", 1), encoding="utf-8")


def dress(nb, page, path, homes):
    """Make one visible notebook a page: names and addresses become links, definitions get
    anchors."""

    def there(address):
        target = from_root(path.parent)(address)
        return (
            address
            if target.startswith(f"{NBS.name}/")
            else f"{CFG.git_url}/blob/{CFG.branch}/{target}"
        )

    def named(match):
        home = homes.get(match[1])
        return link(page, match[1], home) if home else match[0]

    def prose(text):
        parts = re.split(
            r"(^```.*?^```|^#+ .*?$)", links(text, there), flags=re.M | re.S
        )  # not in code, not in headings
        return "".join(
            p if i % 2 else re.sub(r"(?<!`)`([\w.]+)(?:\(\))?`(?!`)", named, p)
            for i, p in enumerate(parts)
        )

    cells, above = [], ""
    for cell in nb.cells:
        shown = [
            out["data"]["text/markdown"]
            for out in cell.get("outputs", [])
            if "text/markdown" in out.get("data", {})
        ]
        grid = any("text/html" in out.get("data", {}) for out in cell.get("outputs", []))
        if cell.cell_type == "code":
            cell.outputs = [with_words(out, path, above) for out in cell.outputs]
        if cell.cell_type == "markdown":
            above = cell.source
            cell.source = prose(cell.source)
        elif (
            shown and not cell.source and not grid
        ):  # a table that a hidden piece of code wrote: prose
            cell = nbformat.v4.new_markdown_cell(prose("\n\n".join(shown)))
        elif not cell.source:
            cell.metadata["tags"], cell.source = ["remove-input"], "pass"
        elif page.startswith("study/"):  # a reader comes for what was found
            cell.metadata["tags"] = ["hide-input"]
        anchors = "".join(f'<span id="{name}"></span>' for name in cell.get("defines", []))
        if anchors:
            cells.append(nbformat.v4.new_markdown_cell(anchors))
        cell.pop("defines", None)
        cells.append(cell)
    nb.cells = cells
    return nb


def contents(pages):
    "The table of contents, filled into contents.md: the story, the concepts, the engineering."
    part = parts(pages)
    text = (HERE / "contents.md").read_text(encoding="utf-8")
    return re.sub(r"^\{(\w+)\}$", lambda m: "\n".join(part[m[1]]), text, flags=re.M)


def reference(pages, defined):
    "The page that lists every public name of the package, by chapter."
    text = [
        "# Reference",
        "",
        "Every public function and class of the package, and the chapter that builds it.",
    ]
    for page, names in defined.items():
        if not names:
            continue
        rows = [f"| {link('reference', name, page)} | {what} |" for name, what in names.items()]
        module = next(
            line.split()[-1]
            for c in nbformat.read(pages[page], as_version=4).cells
            for line in c.source.splitlines()
            if line.startswith("#| default_exp")
        )
        text += [
            "",
            f"## {CFG.lib_name}.{module}",
            "",
            "| name | what it is |",
            "|---|---|",
            *rows,
        ]
    return "\n".join(text) + "\n"


def write_pages(source, pages):
    "Write what Sphinx reads to `source`: the book's settings, and a page for each notebook."
    leave_out = shutil.ignore_patterns("contents.md", "__pycache__")
    shutil.copytree(HERE, source, ignore=leave_out, dirs_exist_ok=True)
    defined = {page: defined_in(path) for page, path in pages.items()}
    homes = {name: page for page, names in defined.items() for name in names}
    for page, path in pages.items():
        nb = dress(visible(path, note=symbols), page, path, homes)
        if page == "index":
            install = [c.source.startswith("## Install") for c in nb.cells].index(True)
            nb.cells.insert(install, nbformat.v4.new_markdown_cell(EXPLORE))
            nb.cells.append(nbformat.v4.new_markdown_cell(contents(pages)))
        file = source / f"{page}.ipynb"
        file.parent.mkdir(exist_ok=True)
        nbformat.write(nb, file)
    (source / "reference.md").write_text(reference(pages, defined), encoding="utf-8")


def build(dest):
    "Make the book in `dest` by Sphinx, from a folder of this build alone; its exit code."
    pages = notebooks()
    shutil.rmtree(dest, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="_proc_", dir=ROOT) as source:
        write_pages(Path(source), pages)
        options = ["-W", "--keep-going", "-q", "-b", "html", "-d", f"{source}/.doctrees"]
        code = sphinx([*options, source, str(dest)])
    shutil.rmtree(dest.parent / "jupyter_execute", ignore_errors=True)
    describe(dest, pages)
    study_page(Study(NBS / "study" / "recorded"), "index.html").write(dest)
    return code


if __name__ == "__main__":
    os.chdir(ROOT)
    dest = Path(sys.argv[1] if len(sys.argv) > 1 else "_book").resolve()
    code = build(dest)
    if code == 0:
        print(f"{dest / 'index.html'}: {len(list(dest.rglob('*.html')))} pages")
    sys.exit(code)
