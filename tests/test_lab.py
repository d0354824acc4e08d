"""JupyterLab in a real browser: pages open folded and unchanged, run to their end, and leave
nothing behind."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_pages import browser  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.xdist_group("pages"), pytest.mark.timeout(900)]

PAGES = ["index", "22_traversal", "study/c7_c11_lines"]


def git(folder, *words):
    "What git says about a folder."
    name = ["-c", "user.name=reader", "-c", "user.email=reader@example.org"]
    done = subprocess.run(
        ["git", *name, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A repository with the files of this one as they stand, all committed."
    folder = tmp_path_factory.mktemp("clone") / "project"
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "as it stands")
    return folder


def serve(clone, home):
    "JupyterLab as `make lab` starts it, for a reader without settings of their own."
    folders = {
        name: str(home / name.lower())
        for name in (
            "HOME",
            "IPYTHONDIR",
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
        )
    }
    ours = ("TQDM_DISABLE", "MPLBACKEND")  # set for tests, not by a reader
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyter", "lab", "--config", "../.ci/lab.py"),
            *("--no-browser", "--allow-root", "--port", "0", "--expose-app-in-browser"),
            *("--ip", "127.0.0.1", "--IdentityProvider.token", "reader"),
        ],
        cwd=clone / "nbs",
        env=environment | folders | {"PYTHONPATH": str(clone)},
        stdout=(home / "log").open("w"),
        stderr=subprocess.STDOUT,
    )


def address(server, home):
    "Where a server listens, as it writes when it is ready."
    for _ in range(600):
        for file in (home / "jupyter_runtime_dir").glob("jpserver-*.json"):
            text = file.read_text()
            if text.rstrip().endswith("}"):
                return json.loads(text)["url"]
        if server.poll() is not None:
            break
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start: {(home / 'log').read_text()[-2000:]}")


@pytest.fixture(scope="module")
def lab(clone, tmp_path_factory):
    "The address of a running JupyterLab."
    home = tmp_path_factory.mktemp("home")
    server = serve(clone, home)
    try:
        yield address(server, home)
    finally:
        server.terminate()
        server.wait(60)


OPENED = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  const panel = app.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await panel.revealed;
  const kernel = panel.sessionContext.session.kernel;
  await kernel.info;
  const cells = panel.content.widgets.map(cell => ({
    source: cell.model.sharedModel.getSource(),
    folded: cell.model.type === 'code' && cell.inputHidden}));
  return {dirty: panel.context.model.dirty, cells};
}"""
RAN = """async () => {
  const app = window.jupyterapp, panel = app.shell.currentWidget;
  await app.commands.execute('notebook:run-all-cells');
  await app.commands.execute('docmanager:save');
  const outputs = [...panel.content.model.cells].filter(cell => cell.type === 'code')
    .flatMap(cell => cell.outputs.toJSON());
  return {
    errors: outputs.filter(out => out.output_type === 'error').map(out => out.evalue),
    pink: outputs.filter(out => out.name === 'stderr').map(out => out.text),
    dirty: panel.context.model.dirty};
}"""


@pytest.fixture(scope="module")
def window(browser, lab):  # noqa: F811
    "A window in which one page after the other is opened."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    yield page
    page.close()


def changed(clone, page):
    "What a reader of one page has changed, its outputs aside: a figure may differ by a pixel."
    status = git(clone, "status", "--porcelain").splitlines()
    others = [line for line in status if line != f" M nbs/{page}.ipynb"]
    now = json.loads((clone / "nbs" / f"{page}.ipynb").read_text(encoding="utf-8"))
    before = json.loads(git(clone, "show", f"HEAD:nbs/{page}.ipynb"))
    for notebook in (now, before):
        for cell in notebook["cells"]:
            cell.pop("outputs", None)
    return others if now == before else [*others, page]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_folded_and_runs_to_its_end(window, lab, clone, page):
    window.goto(f"{lab}lab/tree/{page}.ipynb?token=reader&reset")
    window.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext")
    seen = window.evaluate(OPENED)
    assert not seen["dirty"], "a page counts as changed before anything was done"
    hidden = [c for c in seen["cells"] if c["source"].startswith("#| hide")]
    assert all(c["folded"] for c in hidden)
    assert any(c["folded"] for c in seen["cells"])
    ran = window.evaluate(RAN)
    assert not ran["errors"] and not ran["pink"] and not ran["dirty"]
    assert window.locator(".Toastify__toast").count() == 0
    assert not changed(clone, page)
    git(clone, "checkout", "-q", "--", f"nbs/{page}.ipynb")
