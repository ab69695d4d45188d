"""The site of the documentation has every page, in the reader's order, and no link on it leads nowhere."""

import importlib.util
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from tests.test_house import ROOT


def named(part) -> list[str]:
    """The pages of a part of the navigation."""
    if isinstance(part, str):
        return [part]
    return [page for inner in (part.values() if isinstance(part, dict) else part) for page in named(inner)]


def test_the_navigation_has_every_page_once():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = named(yaml.safe_load(settings)["nav"])
    assert len(pages) == len(set(pages))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {*pages}


def test_a_list_or_table_stands_alone_as_the_site_needs_it():
    """GitHub draws one that follows a line of text; the site takes it for that text's next line."""
    wrong = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "results.md"]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        wrong += [(page.name, two) for two in re.findall(r"^[^\s|#-][^\n]*\n(?:- |\|)[^\n]*", text, re.M)]
    assert not wrong


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_every_link_on_it_leads_somewhere(tmp_path):
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")):
        pytest.skip("what builds the site is not here (extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    wrong = []
    for page, text in pages.items():
        for link in re.findall(r'<(?:a|img|link|script)\b[^>]*?\s(?:href|src)="([^"]+)"', text):
            place, _, anchor = unquote(unescape(link)).partition("#")
            if "://" in place or place.startswith(("data:", "mailto:")):
                continue
            target = (page.parent / place).resolve() if place else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and target.suffix == ".html" and anchor not in anchors[target]):
                wrong.append(f"{page.relative_to(tmp_path)}: {link}")
    assert not wrong, wrong[:20]
    assert "the class that trains and generates" in pages[tmp_path / "api" / "model" / "index.html"]
    source = pages[tmp_path / "source" / "modeling_vlm" / "loss_vlm.py" / "index.html"]
    assert "token_costs" in re.sub(r"<[^>]+>", "", source)
    assert Path(tmp_path / "chat_page.png").is_file()
