"""Links between the pages are valid, and every page can be reached from the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [path for path in sorted((ROOT / "launch").rglob("*")) if path.is_file() and path.suffix != ".pyc"]


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the files that a page links to, with the linked section."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    parts = [link.partition("#") for link in found if "://" not in link]
    return [((page.parent / path).resolve() if path else page, part) for path, _, part in parts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_existing_files_and_headings(page):
    for target, part in links(page):
        assert target.exists(), f"{page}: there is no {target}"
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert part in anchors, f"{page}: {target} has no heading #{part}"


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_and_programs_that_a_page_names_exist(page):
    named = re.findall(
        r"\b((?:tests|launch|ds_configs|bst_base|bst_dist|data_pipeline)/[\w/.-]+\w)(?:::(\w+))?", page.read_text()
    )
    for path, name in named:
        assert (ROOT / path).exists(), f"{page}: there is no {path}"
        assert not name or f"def {name}" in (ROOT / path).read_text(), f"{page}: {path} has no {name}"


def test_every_page_can_be_reached_from_the_index():
    reached = {target for target, _ in links(ROOT / "docs/README.md")}
    made = {ROOT / "docs/README.md", ROOT / "docs/study/report.md"}  # the report belongs to the study
    assert not set(PAGES) - reached - made
