"The book's Sphinx settings; the pages are made by .ci/book.py."

from configparser import ConfigParser
from pathlib import Path

from docutils import nodes

from weightregions.report import formula

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

project = html_title = cfg["title"]
author, release = cfg["author"], cfg["version"]
copyright = cfg["copyright"]
language = "en"
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "code", "code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type"]
html_theme = "sphinx_book_theme"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "repository_url": cfg["git_url"],
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "show_toc_level": 2,
}
html_favicon = "static/favicon.svg"
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"


def mathml(self, node):
    """Formulas as MathML, which browsers draw by themselves: no script from elsewhere, and the
    book reads offline."""
    block = isinstance(node, nodes.math_block)
    drawn = formula(node.astext(), block)
    self.body.append(f'<div class="formula">{drawn}</div>' if block else drawn)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
