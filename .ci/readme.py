"""Write README.md from the executed nbs/index.ipynb; its figures go to nbs/figures/.

python .ci/readme.py            write them
python .ci/readme.py --check    write nothing, fail if they are out of date
"""

import re
import sys

from nbconvert import MarkdownExporter
from pages import CFG, NBS, ROOT, from_root, links, visible

SOURCE = NBS / CFG.readme_nb
HEAD = (
    f"<!-- Written by .ci/readme.py from {SOURCE.relative_to(ROOT)}: edit the notebook. -->\n\n"
)


def readme():
    "README.md's text, and its figures as a dict of paths and bytes."
    nb = visible(SOURCE, without=("export", "exporti", "default_exp", "book"))
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = links(cell.source, from_root(NBS))
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "text/html" in data:  # GitHub takes away what makes it worth looking at
                del data["text/html"]
            if "text/markdown" in data:
                data.pop("text/plain", None)
                data["text/markdown"] = links(data["text/markdown"], from_root(NBS))
    figures = (NBS / "figures").relative_to(ROOT).as_posix()
    text, resources = MarkdownExporter().from_notebook_node(
        nb, resources={"unique_key": "index", "output_files_dir": figures}
    )
    words = iter(alternatives(nb))
    text = re.sub(
        r"!\[png\]\(.*?/(index_\w+\.png)\)",
        lambda m: f"![{next(words)}]({figures}/{m[1]})",
        text,
    )
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"```python\s*```\n", "", text)  # an `echo: false` cell leaves an empty fence
    return HEAD + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", resources["outputs"]


def alternatives(nb):
    "What each figure of a notebook shows, in words."
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            if "image/png" in out.get("data", {}):
                yield out["metadata"].get("image/png", {}).get("alt", "").replace("]", ")")


def stale(text, figures):
    "The files that differ from what they should be."
    want = {"README.md": text.encode(), **figures}
    have = {p.relative_to(ROOT).as_posix() for p in (NBS / "figures").glob("index_*")}
    return sorted(
        (have - want.keys())
        | {
            name
            for name, data in want.items()
            if not (ROOT / name).exists() or (ROOT / name).read_bytes() != data
        }
    )


if __name__ == "__main__":
    text, figures = readme()
    old = stale(text, figures)
    if "--check" in sys.argv:
        if old:
            sys.exit(f"out of date, run `make prepare`: {', '.join(old)}")
    else:
        for figure in (NBS / "figures").glob("index_*"):
            figure.unlink()
        for name, data in {"README.md": text.encode(), **figures}.items():
            (ROOT / name).parent.mkdir(exist_ok=True)
            (ROOT / name).write_bytes(data)
        print(
            f"README.md: {len(text.splitlines())} lines, {len(figures)} figures, {len(old)}"
            " files changed"
        )
