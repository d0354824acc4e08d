"Packaging. Every value lives in settings.ini, the file that nbdev 2 reads too."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def words(key):
    "The space-separated words of one settings.ini key."
    return cfg.get(key, "").split()


class SdistWithSettings(sdist):
    "A source distribution that carries settings.ini, without which this file cannot run."

    def make_distribution(self):
        self.filelist.append("settings.ini")
        super().make_distribution()


extras = {
    extra: words(f"{extra}_requirements")
    for extra in ("dev", "offline", "study", "docs", "explore", "ray", "lora")
}
extras["all"] = sorted({word for part in extras.values() for word in part})
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {v}" for v in words("python_versions")),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["py.typed", "*.json"]},
    zip_safe=False,
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"sdist": SdistWithSettings},
)
