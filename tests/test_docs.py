"""README and docs: links lead somewhere, files that they name exist, options are those of the command line."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import typer

from slrc.cli import app
from slrc.config import TABLES, CompileConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w./~<-])((?:slrc|passes|backends|tests|benchmarks|examples|docs)/[\w./-]*\w)")
"""A file or folder of this repository, as a page may name it."""
PLACEHOLDER = re.compile(r"NAME|ROOM|verb_noun")
MOST_LINES = 80
NAMES_WIDTH = 31
"""Of the names in the picture of the rooms."""
WIDTH = 120


def anchors(page: Path) -> set[str]:
    """Return what can be linked to in a page, made of its headings as GitHub makes it."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_are_pages_and_links_to_check() -> None:
    assert len(PAGES) >= 5
    assert sum(len(LINK.findall(page.read_text())) for page in PAGES) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"https?://\S+", "", page.read_text())
    named = [name for name in NAMED.findall(text) if not PLACEHOLDER.search(name)]
    assert not [name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "results.md"])
def test_lines_can_be_read_in_an_editor(page: Path) -> None:
    prose = [line for line in page.read_text().splitlines() if not re.match(r"\||Measured on: |    |\d\. `", line)]
    assert not [line for line in prose if len(line) > WIDTH]


def commands() -> dict[str, typer.core.TyperCommand]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_guide_has_every_option_and_no_other() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    known = {name for command in commands().values() for p in command.params for name in [*p.opts, *p.secondary_opts]}
    options = {name for name in known if name.startswith("--")}
    shown = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", guide))
    assert not options - shown - {"--help"}
    others = {"--version"}  # of the command without a name
    others |= {
        "--nproc",
        "--use",
        "--fsdp",
        "--nnodes",
        "--max-restarts",
        "--rdzv",
    }  # of launchers, cut at an underscore
    assert not shown - options - others


def test_the_reference_has_a_line_for_every_option_of_a_compile_and_a_sweep() -> None:
    """Those of a sweep that a compile has too stand there; the text before the table names those that it has not."""
    guide, names = (ROOT / "docs" / "guide.md").read_text(), ("compile", "sweep")
    part = {name: guide.partition(f"### Options of a {name}\n")[2].partition("\n### ")[0] for name in names}
    listed, taken = {}, {}
    for name in names:
        rows = re.findall(r"^\| (`--[^|]*)\|", part[name], re.MULTILINE)
        listed[name] = {option for row in rows for option in re.findall(r"`(--.*?)`", row)}
        flags = {flag for p in commands()[name].params for flag in [*p.opts, *p.secondary_opts]}
        taken[name] = {flag for flag in flags if flag.startswith("--")} - {"--help", "--debug"}
    left_out = set(re.findall(r"`(--.*?)`", part["sweep"].partition("| option")[0]))
    assert listed["compile"] == taken["compile"]
    assert listed["sweep"] | (listed["compile"] - left_out) == taken["sweep"]
    assert left_out <= taken["compile"] - taken["sweep"]
    assert listed["sweep"] >= taken["sweep"] - taken["compile"]


def test_the_architecture_draws_every_room_in_its_place() -> None:
    """The picture has a name or two a line, then what they are for."""
    listed = re.search(r"ROOMS = \((.*?)\)", (ROOT / "tests" / "test_architecture.py").read_text(), flags=re.DOTALL)
    assert listed
    picture = re.search(r"## The rooms.*?\n\n(    .*?)\n\n", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert picture
    drawn = [name for line in picture[1].splitlines() for name in line[4 : 4 + NAMES_WIDTH].split()]
    assert drawn == re.findall(r'"(\w+)"', listed[1])


def test_the_guide_has_every_command() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert not [name for name in commands() if f"slrc {name}" not in guide]


def test_the_guide_has_every_setting_of_a_configuration_file() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    fields = [name.replace("_", "-") for name in CompileConfig.model_fields if name not in TABLES]
    assert not [name for name in fields if f"`{name}`" not in guide and f"`--{name}`" not in guide]
    for table, settings in TABLES.items():
        names = [name.replace("_", "-") for name in settings.model_fields]
        assert not [name for name in names if f"`{name}`" not in guide], table


def test_the_picture_shows_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "images"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    make = importlib.import_module("make")
    row = make.rows_of(make.file_of("front_page"))[make.CASES[0].command]
    picture = make.PICTURE.read_text()
    for title, dense, compiled, words, remark in make.panels(row):
        for text in (title, words.format(dense), words.format(compiled), remark):
            assert text in picture, f"`python docs/images/make.py` draws it anew: {text}"
