"Pages in a real browser: nothing fails, nothing comes from the network, controls change what is shown."

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from weightregions.explore import (
    Page,
    heat_panel,
    line_panel,
    map_panel,
    plane_panel,
    region_panel,
)

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


def a_page(names=("films", "meals")):
    "A page with every kind of panel."
    models = pd.DataFrame(
        [
            {"model": f"{d}/{s}", "dataset": d, "family": "toy", "accuracy": 0.8}
            for d in names
            for s in (1, 2, 3)
        ]
    ).set_index("model")
    same = models.dataset.to_numpy()[:, None] == models.dataset.to_numpy()
    values = np.where(np.eye(6, dtype=bool), 1.0, np.where(same, 0.4, 0.05))
    cosine = pd.DataFrame(values, models.index, models.index)
    rng = np.random.default_rng(0)
    places = pd.DataFrame(rng.normal(size=(6, 2)), models.index, ["x", "y"])
    alphas = [-31, -3, 0, 0.5, 1, 4, 32]
    lines = pd.concat(
        pd.DataFrame(
            dict(
                line=line,
                target=target,
                alpha=alphas,
                loss=level + 0.01 * np.abs(alphas),
                accuracy=0.7,
            )
        )
        for line, target, level in (
            ("a and b", names[0], 0.4),
            ("a and b", names[1], 0.6),
            ("a and c", names[1], 0.5),
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

    def __init__(self, browser, file, width, scheme="light"):
        self.page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.errors, self.requests = [], []
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(Path(file).resolve().as_uri())
        self.page.wait_for_function("document.querySelectorAll('.plot svg').length >= 5")

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
    visit.page.close()


def test_slider_and_pickers_change_what_is_shown(browser, tmp_path):
    visit = Visit(browser, a_page().write(tmp_path), 1280)
    page = visit.page
    said = page.locator("#line-said")
    dot = "() => [...document.querySelector('#line').data[1].x, document.querySelector('#line').data[1].y[0]]"
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
