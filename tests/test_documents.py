"""The programs in the documents run, and their links lead somewhere."""

import pathlib
import re
from urllib.parse import unquote, urlsplit

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
DOCUMENTS = [ROOT / "README.md", *PAGES]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks" / "results").glob("*.md"))]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: pathlib.Path) -> set[str]:
    """The anchors of the headings of a page, as Markdown makes them; the second of equal ones gets a number."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).strip().lower()
        anchor = slug = re.sub(r"[-\s]+", "-", words)
        count = 0
        while anchor in found:
            count += 1
            anchor = f"{slug}_{count}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if "```python" in path.read_text()], ids=name)
def test_programs_run(path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    for program in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(program, path.name, "exec"), names)


@pytest.mark.parametrize("path", [*DOCUMENTS, *OTHERS], ids=name)
def test_links_lead_somewhere(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", path.read_text())):
        address = urlsplit(link)
        if address.scheme or address.netloc:
            continue
        target = path.parent / unquote(address.path) if address.path else path
        is_there = target.exists() and (not address.fragment or address.fragment in anchors(target))
        if not is_there:
            broken.append(link)
    assert broken == []


def test_a_wrong_link_is_seen(tmp_path):
    (tmp_path / "page.md").write_text("# One\n## Two words, `code`\n## One\n```\n# not a heading\n```\n")
    assert anchors(tmp_path / "page.md") == {"one", "two-words-code", "one_1"}


def test_pictures_say_what_they_show():
    unsaid = [
        (name(path), picture)
        for path in DOCUMENTS
        for said, picture in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", path.read_text())
        if not said
    ]
    assert unsaid == []
