"""The site: every page is in the menu, none is too long, and nothing comes from elsewhere."""

import re
from pathlib import Path

import pytest

import pararnn

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
SETTINGS = (ROOT / "mkdocs.yml").read_text()
MENU = re.findall(r"^ +- (?:.*: )?([\w/-]+\.md)$", SETTINGS, re.MULTILINE)
LONGEST = 1_200  # words of a page that is read from top to bottom
TO_LOOK_UP = ("reference/", "results/")  # pages that are not


def words(page):
    """Those of the text, without code."""
    text = (DOCS / page).read_text()
    return len(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).split())


@pytest.mark.parametrize("page", [p for p in PAGES if not p.startswith(TO_LOOK_UP)])
def test_pages_are_short(page):
    assert words(page) <= LONGEST


def test_every_page_is_in_the_menu_once():
    assert sorted(MENU) == PAGES


def test_nothing_is_fetched_from_elsewhere():
    assert "http" not in SETTINGS
    assert "font: false" in SETTINGS
    for file in (DOCS / "assets").iterdir():
        assert not re.search(r"https?://|@import", file.read_text()), file


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_its_title_and_has_no_other(page):
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


@pytest.mark.parametrize("page", PAGES)
def test_rows_of_a_table_have_as_many_cells_as_its_header(page):
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {row.count("|") - row.count("\\|") for row in table.splitlines()}
        assert len(cells) == 1, table


def test_every_cell_is_in_the_gallery():
    gallery = (DOCS / "gallery.md").read_text()
    cells = [name for name in vars(pararnn.cells) if name.endswith("Cell")]
    assert len(cells) > 15
    assert [name for name in cells if f"`{name}`" not in gallery] == []


def test_every_example_is_on_its_page():
    page = (DOCS / "examples.md").read_text()
    files = {file.name for file in (ROOT / "examples").glob("[!_]*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)`", page, re.MULTILINE)) == files
