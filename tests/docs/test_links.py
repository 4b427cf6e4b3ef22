"""Links, anchors and pictures of the project's pages, without a network."""

import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^( *)(```+).*?^\1\2 *$\n?", re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """The targets of links and pictures; what stands in code is none."""
    text = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "code", FENCED.sub("", text), flags=re.DOTALL)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    defined = re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", text, re.MULTILINE)
    html = re.findall(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"", text)
    return inline + defined + html


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found = set()
    for title in re.findall(r"^ {0,3}#{1,6}\s+(.*?)\s*#*$", FENCED.sub("", text), re.MULTILINE):
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        repeated = (f"{slug}-{i}" for i in itertools.count(1))
        found.add(next(s for s in itertools.chain([slug], repeated) if s not in found))
    return found


def mistake(page: Path, link: str) -> str:
    """What is wrong with a relative link; empty if it leads somewhere."""
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return f"{link}: there is no such file"
    if not anchor:
        return ""
    lines = re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor)
    if lines and target.suffix != ".md":
        last = int(lines[2] or lines[1])
        return "" if last <= len(target.read_text().splitlines()) else f"{link}: it is shorter"
    known = anchors(target.read_text()) if target.suffix == ".md" else ()
    return "" if anchor in known else f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_each_page_lead_somewhere(page):
    local = [link for link in links(page.read_text()) if not re.match(r"[a-z]+:", link)]
    assert not list(filter(None, (mistake(page, link) for link in local)))


def test_index_names_every_page():
    listed = {link.partition("#")[0] for link in links((ROOT / "docs" / "README.md").read_text())}
    pages = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")}
    assert pages - {"README.md"} <= listed


def test_broken_links_are_found(tmp_path):
    page = ROOT / "docs" / "page.md"
    assert mistake(page, "memory.md#planning") == "" == mistake(page, "../README.md#data")
    assert mistake(page, "../Makefile#L1-L9") == ""
    for broken in ("nothing.md", "memory.md#nothing", "../Makefile#L9999", "../../etc"):
        assert mistake(page, broken), broken


def test_anchors_are_those_of_github():
    text = "# Ce qui coûte : l'`état` (16 Go)\n## A_b\n```\n# none\n```\n## A_b\n## [T](x.md), 2.0"
    assert anchors(text) == {"ce-qui-coûte--létat-16-go", "a_b", "a_b-1", "t-20"}
    assert links('`[a](b)` [c](d.md "t") ![e](f.png)\n```\n[g](h)\n```\n') == ["d.md", "f.png"]
