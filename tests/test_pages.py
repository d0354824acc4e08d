"""Pages in a real browser: nothing fails, nothing comes from the network, controls change what
is shown."""

import ast
import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from weightregions.explore import (
    Page,
    heat_panel,
    line_page,
    line_panel,
    locate_page,
    map_panel,
    plane_panel,
    region_panel,
    similarity_page,
)
from weightregions.report import render, write_page

pytestmark = [pytest.mark.xdist_group("pages"), pytest.mark.timeout(600)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser():
    "Any Chromium or Chrome of this machine; in CI there must be one."
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium or Chrome: pages are untested")
        pytest.skip("no Chromium or Chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        window = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield window
        window.close()


def cosines_of(names):
    "Cosines of six made-up models, and their datasets."
    models = pd.Series({f"{d}/{s}": d for d in names for s in (1, 2, 3)}, name="dataset")
    same = models.to_numpy()[:, None] == models.to_numpy()
    values = np.where(np.eye(6, dtype=bool), 1.0, np.where(same, 0.4, 0.05))
    return pd.DataFrame(values, models.index, models.index), models


def a_page(names=("films", "meals")):
    "A page with every kind of panel."
    models = pd.DataFrame(
        [
            {"model": f"{d}/{s}", "dataset": d, "family": "toy", "accuracy": 0.8}
            for d in names
            for s in (1, 2, 3)
        ]
    ).set_index("model")
    cosine, _ = cosines_of(names)
    rng = np.random.default_rng(0)
    places = pd.DataFrame(rng.normal(size=(6, 2)), models.index, ["x", "y"])
    alphas = [-31, -3, 0, 0.5, 1, 4, 32]
    lines = pd.concat(
        pd.DataFrame(
            dict(
                line=line,
                target=target,
                alpha=alphas,
                loss=level + depth * np.abs(alphas),
                accuracy=0.7,
            )
        )
        for line, target, level, depth in (
            ("a and b", names[0], 0.4, 0.01),  # the deepest: shown first
            ("a and b", names[1], 0.6, 0.008),
            ("a and c", names[1], 0.5, 0.008),
        )
    )
    grid = pd.DataFrame([(x, y) for x in (0, 1, 2) for y in (0, 1, 2)], columns=["x", "y"])
    grid["loss"] = 0.4 + 0.1 * ((grid.x - 0.7) ** 2 + (grid.y - 0.7) ** 2)
    marks = pd.DataFrame({"name": ["a", "b", "c"], "x": [0, 2, 0], "y": [0, 0, 2]})
    panels = [
        heat_panel(cosine, models),
        map_panel(places, models),
        line_panel(lines, {names[0]: 0.57}),
        plane_panel(grid, marks),
        region_panel(cosine, models.dataset),
    ]
    return Page("Regions", panels, "What to see.", "index.html")


class Visit:
    "A page in a window, and what went wrong there."

    ready = "document.querySelectorAll('.plot svg').length >= 5"

    def __init__(self, browser, file, width, scheme="light"):
        self.page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.errors, self.requests = [], []
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(Path(file).resolve().as_uri())
        self.page.wait_for_function(self.ready)

    def remote(self):
        return [u for u in self.requests if not u.startswith(("file:", "data:", "blob:"))]

    def overflow(self):
        "Pixels by which the page is wider than its window."
        return self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_explore_page_is_whole(browser, tmp_path, width, scheme):
    visit = Visit(browser, a_page().write(tmp_path), width, scheme)
    assert not visit.errors and not visit.remote()
    assert visit.overflow() <= 0
    labels = visit.page.eval_on_selector_all(".plot", "ps => ps.map(p => p.ariaLabel)")
    assert len(labels) == 5 and all(labels)
    axes = ".xtitle, .ytitle, .cbtitle, .colorbar text"
    written = visit.page.eval_on_selector_all(axes, "ts => ts.map(t => t.textContent)")
    assert {"cosine", "loss", "loss (nats)", "mean cosine"} <= set(written)
    visit.page.close()


def test_slider_and_pickers_change_what_is_shown(browser, tmp_path):
    visit = Visit(browser, a_page().write(tmp_path), 1280)
    page = visit.page
    said = page.locator("#line-said")
    dot = (
        "() => [...document.querySelector('#line').data[1].x,"
        " document.querySelector('#line').data[1].y[0]]"
    )
    before, place = said.inner_text(), page.evaluate(dot)
    page.locator("#line-alpha").focus()
    page.keyboard.press("End")
    assert said.inner_text().startswith("alpha 32: loss 0.72") and said.inner_text() != before
    assert page.evaluate(dot) != place
    page.select_option("#line-target", "meals")
    assert "pretrained" not in said.inner_text()
    page.select_option("#line-line", "a and c")
    options = page.eval_on_selector_all("#line-target option", "os => os.map(o => o.value)")
    assert options == ["meals"]
    verdict = page.locator("#region-said").inner_text()
    page.select_option("#region-model", "meals/2")
    assert page.locator("#region-said").inner_text() != verdict
    assert not visit.errors
    page.close()


def test_hover_tells_the_two_models(browser, tmp_path):
    visit = Visit(browser, a_page().write(tmp_path), 1280)
    box = visit.page.locator("#heat-map .nsewdrag").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.1)
    visit.page.wait_for_selector("#heat-map .hovertext")
    assert "cosine" in visit.page.locator("#heat-map .hovertext").text_content()
    visit.page.close()


def test_names_from_a_table_are_drawn_and_run_nothing(browser, tmp_path):
    hostile = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>")
    visit = Visit(browser, a_page(hostile).write(tmp_path), 1280)
    assert not visit.errors and not visit.remote()
    assert visit.page.locator("img").count() == 0
    options = visit.page.eval_on_selector_all(
        "#line-target option", "os => os.map(o => o.value)"
    )
    assert options[0] == hostile[0]
    visit.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, tmp_path, scheme):
    from axe_playwright_python.sync_playwright import Axe

    visit = Visit(browser, a_page().write(tmp_path), 1280, scheme)
    found = Axe().run(visit.page).response["violations"]
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    assert not grave, [(v["id"], v["nodes"][0]["html"][:200]) for v in grave]
    visit.page.close()


def test_the_script_is_written_once(tmp_path):
    page = a_page()
    page.write(tmp_path)
    page.write(tmp_path, "lines.html")
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "explore.html",
        "lines.html",
        "plotly.min.js",
    ]
    assert 'src="plotly.min.js"' in (tmp_path / "lines.html").read_text()


# --- the book ---------------------------------------------------------------------------------

STORY = [f.stem for f in sorted((ROOT / "nbs" / "study").glob("[!_]*.ipynb"))]
PAGES = [
    "index",
    "study/c7_c11_lines",
    "study/c8_c10_hull",
    "00_space",
    "22_traversal",
    "24_comparison",
    "glossary",
    "making",
]
HIDDEN_SCROLL = "pre => pre.scrollWidth > pre.clientWidth + 1"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "The book, built once; a broken link fails it."
    folder = tmp_path_factory.mktemp("book") / "pages"
    done = subprocess.run(
        [sys.executable, ".ci/book.py", folder], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


class Reading(Visit):
    "A page of the book in a window."

    ready = "document.readyState === 'complete'"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_pages_of_the_book_are_whole(browser, book, page, scheme, width):
    visit = Reading(browser, book / f"{page}.html", width, scheme)
    assert not visit.errors and not visit.remote()
    assert visit.overflow() <= 0
    alts = visit.page.eval_on_selector_all("img", "is => is.map(i => i.alt)")
    assert all(alts), f"{page}: a figure without words"
    visit.page.close()


@pytest.mark.parametrize("page", PAGES[:5])
def test_axe_finds_nothing_serious_in_the_book(browser, book, page):
    from axe_playwright_python.sync_playwright import Axe

    visit = Reading(browser, book / f"{page}.html", 1280)
    inside = {"include": [["article"]]}
    found = Axe().run(visit.page, context=inside).response["violations"]
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    assert not grave, [(v["id"], v["nodes"][0]["html"][:200]) for v in grave]
    visit.page.close()


def test_no_page_is_wider_than_a_phone(browser, book):
    page, wide = browser.new_page(viewport={"width": 390, "height": 800}), {}
    for file in book.rglob("*.html"):
        page.goto(file.as_uri())
        over = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        wide |= {file.name: over} if over > 0 else {}
    page.close()
    assert not wide


def test_code_fits_the_page(browser, book):
    scrolls, blocks = 0, 0
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    for file in book.rglob("*.html"):
        page.goto(file.as_uri())
        each = page.eval_on_selector_all("pre", f"ps => ps.map({HIDDEN_SCROLL})")
        scrolls, blocks = scrolls + sum(each), blocks + len(each)
    page.close()
    assert blocks > 500 and scrolls <= 0.02 * blocks, f"{scrolls} of {blocks} scroll sideways"


def test_links_and_anchors_of_the_book_resolve(book):
    files = [f for f in book.rglob("*.html") if "_static" not in f.parts]
    texts = {f: f.read_text(encoding="utf-8") for f in files}
    names = {f: set(re.findall(r'\bid="([^"]+)"', text)) for f, text in texts.items()}
    for file, text in texts.items():
        for link in re.findall(r'<(?:a|link)\s[^<>]*?href="(?!\w+:)([^"]*)"', text):
            address, _, anchor = html.unescape(link).partition("#")
            there = (file.parent / address.partition("?")[0]).resolve() if address else file
            assert there.exists(), f"{file.name} links to {link}"
            if anchor and there in names:
                assert anchor in names[there], f"{file.name} links to {link}"


def test_every_chapter_on_a_concept_has_a_figure(book):
    for page in concepts():
        assert "<img" in (book / f"{page}.html").read_text(encoding="utf-8"), page


def concepts():
    "The chapters on concepts, as the book's builder lists them."
    tree = ast.parse((ROOT / ".ci" / "book.py").read_text(encoding="utf-8"))
    lists = [n for n in tree.body if isinstance(n, ast.Assign)]
    return next(ast.literal_eval(n.value) for n in lists if n.targets[0].id == "CONCEPTS")


def test_next_leads_through_the_story(book):
    page, seen = "index", []
    for _ in range(4):
        text = (book / f"{page}.html").read_text(encoding="utf-8")
        link = re.search(r'class="right-next"\s+href="([^"]+)"', text)[1]
        page = os.path.normpath(os.path.join(os.path.dirname(page), link)).removesuffix(".html")
        seen.append(page)
    assert all(page.startswith("study/") for page in seen), seen


def test_pages_have_a_title_a_description_and_an_icon(book):
    for page in PAGES:
        text = (book / f"{page}.html").read_text(encoding="utf-8")
        assert re.search(r"<title>[^<]{8,}</title>", text), page
        assert re.search(r'<meta name="description" content="[^"]{20,}"', text), page
        assert "favicon.svg" in text, page


@pytest.mark.parametrize(
    "file", sorted((ROOT / "nbs").rglob("[!_.]*.ipynb")), ids=lambda f: f.stem
)
def test_no_notebook_holds_a_widget(file):
    text = file.read_text(encoding="utf-8")
    assert "application/vnd.jupyter.widget" not in text, "its page would ask the network"


def headings(book):
    "The heading of every page that is a notebook."
    for file in (ROOT / "nbs").rglob("[!_.]*.ipynb"):
        page = file.relative_to(ROOT / "nbs").with_suffix(".html")
        text = (book / page).read_text(encoding="utf-8")
        yield file.stem, re.sub(r"<[^>]+>|#$", "", re.search(r"<h1>(.*?)</h1>", text, re.S)[1])


def test_headings_of_pages_are_more_than_a_word(book):
    short = [name for name, title in headings(book) if len(title.split()) < 3]
    assert sorted(short) == ["glossary", "index"]


def test_chapters_on_concepts_lead_to_the_glossary(book):
    for page in concepts():
        text = (book / f"{page}.html").read_text(encoding="utf-8")
        assert re.search(r'href="glossary\.html#[\w-]+"', text), page


@pytest.mark.parametrize("page", STORY)
def test_a_page_of_the_story_opens_with_its_box(browser, book, page):
    visit = Reading(browser, book / "study" / f"{page}.html", 1280)
    box = visit.page.locator("dl.facts").first
    assert box.is_visible() and "What was found" in box.inner_text()
    assert "See the verdict" not in box.inner_text()
    code = visit.page.locator("div.cell_input:visible").all()
    assert all(box.bounding_box()["y"] < cell.bounding_box()["y"] for cell in code)
    assert "<td>NaN</td>" not in visit.page.content()
    visit.page.close()


def test_machinery_is_folded(book):
    text = (book / "22_traversal.html").read_text(encoding="utf-8")
    assert text.count("tag_hide-input") >= 5


# --- the page of a study ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["whole", "early"])
def a_study(request, tmp_path_factory):
    "The page of a study at its end, and while only similarities are measured."
    out = tmp_path_factory.mktemp("study") / request.param
    shutil.copytree(ROOT / "nbs" / "study" / "recorded", out)
    (out / "zoo").mkdir()
    if request.param == "early":
        for name in ("points", "paths", "plane", "starts", "advice"):
            (out / "rows" / f"{name}.csv").unlink()
        shutil.rmtree(out / "claims")
        write_page(out, ("walks", "starts"))
    else:
        write_page(out)
    return out


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_study_is_whole(browser, a_study, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    visit = Reading(browser, a_study / "index.html", width, scheme)
    assert not visit.errors and not visit.remote() and visit.overflow() <= 0
    assert all(visit.page.eval_on_selector_all("img", "is => is.map(i => i.alt)"))
    assert visit.page.locator("img").count() >= 2
    assert visit.page.locator("article.card").count() == 13
    early = a_study.name == "early"
    assert (visit.page.get_by_text("The study is running").count() == 1) == early
    found = Axe().run(visit.page).response["violations"]
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    assert not grave, [(v["id"], v["nodes"][0]["html"][:200]) for v in grave]
    visit.page.close()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    "The pages of a study's notebooks, as they lie in its folder."
    folder = tmp_path_factory.mktemp("rendered") / "notebooks"
    folder.mkdir()
    (folder.parent / "index.html").write_text("<title>study</title>")
    for name in (*(f"study/{page}" for page in STORY), "glossary"):
        page = render(ROOT / "nbs" / f"{name}.ipynb")
        (folder / f"{Path(name).name}.html").write_text(page, encoding="utf-8")
    return folder


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", [*STORY, "glossary"])
def test_rendered_notebooks_are_whole(browser, rendered, page, width):
    visit = Reading(
        browser, rendered / f"{page}.html", width, "dark" if width < 500 else "light"
    )
    assert not visit.errors and not visit.remote() and visit.overflow() <= 0
    assert all(visit.page.eval_on_selector_all("img", "is => is.map(i => i.alt)"))
    text = visit.page.content()
    assert "<td>NaN</td>" not in text and "#| " not in text
    if page != "glossary":
        assert visit.page.locator("dl.facts").first.is_visible()
    visit.page.close()


def test_links_of_rendered_notebooks_resolve(rendered):
    test_links_and_anchors_of_the_book_resolve(rendered)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_a_rendered_notebook(browser, rendered, scheme):
    from axe_playwright_python.sync_playwright import Axe

    visit = Reading(browser, rendered / "c7_c11_lines.html", 1280, scheme)
    found = Axe().run(visit.page).response["violations"]
    grave = [v for v in found if v["impact"] in ("serious", "critical")]
    assert not grave, [(v["id"], v["nodes"][0]["html"][:200]) for v in grave]
    visit.page.close()


def test_pages_of_the_commands_are_whole(browser, tmp_path):
    panels = {p.name: p for p in a_page().panels}
    cosine, groups = cosines_of(("films", "meals"))
    pages = [
        similarity_page(cosine, groups),
        line_page(
            pd.DataFrame({"alpha": [0, 0.5, 1], "loss": [0.5, 0.4, 0.6]}), ["a", "b"], "t", 0.7
        ),
        locate_page(pd.DataFrame({"region": ["films", "meals"], "cosine": [0.1, 0.4]}), "mine"),
    ]
    for number, page in enumerate(pages):
        file = page.write(tmp_path, f"{number}.html")
        visit = Reading(browser, file, 1280)
        visit.page.wait_for_function("document.querySelectorAll('.plot svg').length >= 1")
        assert not visit.errors and not visit.remote()
        visit.page.close()
    assert set(panels) == {"heat-map", "map", "line", "plane", "region"}
