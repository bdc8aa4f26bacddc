"""The documentation: its links and paths exist, the README keeps its form, tables and figures are those that were made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from sodaprof.cli import app
from sodaprof.compiler.policies import POLICIES

from .studies.cli_page import page
from .studies.policies_page import knobs_table, policies_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("docs/**/*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:sodaprof|tests|docs)/[\w./-]*)`")
MODULE = re.compile(r"-m (tests(?:\.\w+)+)")
PEERS = ROOT / "docs" / "studies" / "peers.md"  # holds commands of the commits at which it was measured


def read(*path: str) -> str:
    return ROOT.joinpath(*path).read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Returns a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Returns the anchors that a page's headings get: lower case, spaces to hyphens, other punctuation dropped."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Returns the links of a page, those to other sites left out, whose file or anchor does not exist."""
    dead = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link or link.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(path):
    assert dead_links(path) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Some heading, 2\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](gone.md) [c](other.md#some-heading-2) [d](other.md#gone) [e](#gone) `[f](code.md)`"
    )
    assert dead_links(page) == ["gone.md", "other.md#gone", "#gone"]


def missing_files(text: str) -> list[str]:
    """Returns the paths in back-quotes and the modules after `-m` that are not in the repository."""
    modules = {module: module.replace(".", "/") for module in MODULE.findall(text)}
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    return missing + [m for m, path in modules.items() if not any((ROOT / p).exists() for p in (f"{path}.py", path))]


@pytest.mark.parametrize("path", [page for page in PAGES if page != PEERS], ids=name_of)
def test_files_that_a_page_names_exist(path):
    assert missing_files(path.read_text(encoding="utf-8")) == []


def test_a_missing_file_is_found():
    text = "`sodaprof/cli` `sodaprof/gone.py` `tests/test_docs.py` python -m tests.gpu, -m tests.gone, -m tests.studies.page"
    assert missing_files(text) == ["sodaprof/gone.py", "tests.gone"]


def test_the_policies_page_has_the_tables_of_the_registry():
    text = read("docs", "policies.md")
    assert policies_table() in text
    assert [name for name in POLICIES if knobs_table(name) not in text] == []


def test_every_page_is_in_the_index():
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(read("docs", "index.md"))}
    assert {*ROOT.glob("docs/**/*.md")} - linked == {ROOT / "docs" / "index.md"}


def test_the_readme_is_four_screens():
    sections = re.split(r"^## ", read("README.md"), flags=re.MULTILINE)
    assert len(sections) == 4
    assert max(len(section.splitlines()) for section in sections) <= 40


def test_the_readmes_figures_are_in_the_results():
    results = read("docs", "studies", "results.md")
    rows = re.findall(r"^\| [^|]+ \| (\d+\.\d / .*) \|$", read("README.md"), flags=re.MULTILINE)
    assert 1 <= len(rows) <= 6
    assert [row for row in rows if f"| {row} |" not in results] == []


@pytest.mark.parametrize("text", [read("docs", "cli.md"), page()], ids=["committed", "made"])
def test_the_command_line_page_has_every_command_and_option(text):
    sections = dict(section.split("\n", 1) for section in text.split("\n## ")[1:])
    commands = typer.main.get_command(app).commands
    assert set(sections) == set(commands)
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert [option for option in options - {"--help"} if option not in sections[name]] == []
