"""What MkDocs does not do by itself: generated pages, notebooks, links out of docs/, and no request to the net."""

import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs._site import api, benchmarks_page, notebooks

ROOT = pathlib.Path(__file__).parents[2]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"(?<![\[`])`(vattn\.[\w.]+)`(?![\]`])")
REQUEST = re.compile(r"<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
OUTSIDE = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "benchmarks/results/*.md", "benchmarks/results/*.png",
    "constraints.txt",
)  # fmt: skip
"""Files of the repository that pages link to, and that become a part of the site."""

GENERATED = {"benchmarks.md", *(f"api/{page}.md" for page in api.page_modules())}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    assert config.nav is not None
    config.nav = list(_existing(config.nav))
    return config


def _existing(entries: list[Any]) -> Iterator[Any]:
    """The entries of the navigation whose pages there are, or will be made."""
    for entry in entries:
        ((title, where),) = entry.items()
        if isinstance(where, list):
            kept = list(_existing(where))
            if kept:
                yield {title: kept}
        elif (ROOT / "docs" / where).is_file() or where in GENERATED or where.startswith("repository/"):
            yield entry


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = f"repository/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for name, text in api.pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    files.append(File.generated(config, "benchmarks.md", content=benchmarks_page.page()))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.md")):
        for name, content in notebooks.executed(path).items():
            uri = f"notebooks/{name}"
            if (old := files.get_file_from_path(uri)) is not None:
                files.remove(old)
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    here = _repository_path(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        address = urlsplit(match[2])
        if address.scheme or address.netloc or not address.path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), unquote(address.path)))
        site = target.removeprefix("docs/") if target.startswith("docs/") else f"repository/{target}"
        if target == "README.md":
            site = "index.md"
        relative = posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".")
        return match[1] + relative + (f"#{address.fragment}" if address.fragment else "") + match[3]

    has_api_links = not page.file.src_uri.startswith(("api/", "repository/CHANGELOG"))
    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(moved, _with_api_links(part) if has_api_links else part) for part in parts[::2]]
    return "".join(parts)


def _with_api_links(text: str) -> str:
    """Text in which public names in code, such as `vattn.leap_attention`, lead to their place in the API pages."""
    homes = set(api.homes().values())
    return NAME.sub(lambda match: f"[{match[0]}][{match[1]}]" if match[1] in homes else match[0], text)


def _repository_path(src_uri: str) -> str:
    if src_uri.startswith("repository/"):
        return src_uri.removeprefix("repository/")
    return f"docs/{src_uri}"


def on_post_build(config: MkDocsConfig) -> None:
    """No page may load anything from another host."""
    for path in pathlib.Path(config.site_dir).rglob("*.html"):
        found = REQUEST.findall(path.read_text())
        if found:
            raise PluginError(f"{path.name}: a page must load nothing from the net, got {found[0]}")
