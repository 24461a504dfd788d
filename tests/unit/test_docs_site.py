"""docs/ builds as a site without a broken link, loads nothing from another host, and its generated pages are up to date."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.import_graph import ROOT

LOADS = re.compile(
    r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)
CSS_LOADS = re.compile(r"""(?:url\(|@import\s*)\s*["']?((?:https?:)?//[^"')\s]+)""")
SIZE = 200_000  # bytes of a picture, at most


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs`. Not --quiet: strict counts the warnings that are printed."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("link", ["cluster.md#nowhere", "nowhere.md", "images/nowhere.svg", "/cluster.md"])
def test_a_broken_link_is_found(link: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with open(tmp_path / "docs" / "index.md", "a", encoding="utf-8") as page:
        page.write(f"\n[broken]({link})\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and link.rpartition("/")[2].rpartition("#")[2] in done.stderr


def loaded(text: str) -> list[str]:
    """Addresses of other hosts that a browser would load."""
    return LOADS.findall(text) + CSS_LOADS.findall(text)


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    pages = [file for file in site.rglob("*") if file.suffix in (".html", ".css", ".svg")]
    assert {file.name: found for file in pages if (found := loaded(file.read_text(encoding="utf-8")))} == {}
    assert (site / "configuration.html").is_file() and (site / "images" / "loop.svg").is_file()


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js">',
        '<link rel=stylesheet href="//fonts.example/f.css">',
        "<img alt=x src=http://a.example/b.png>",
        "a { background: url(https://a.example/b.png) }",
        '@import "https://a.example/b.css";',
    ],
)
def test_what_is_loaded_is_found(text: str) -> None:
    assert len(loaded(text)) == 1


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently")
def test_generated_pages_are_up_to_date() -> None:
    """`python docs/generate.py` writes them."""
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
    for name, page in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page(), name


def test_links_of_the_readme_lead_somewhere() -> None:
    """mkdocs sees docs/ alone."""
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / unquote(link)).exists(), f"{page}: {link}"


def test_pictures_are_small() -> None:
    assert [file.name for file in (ROOT / "docs" / "images").iterdir() if file.stat().st_size > SIZE] == []
