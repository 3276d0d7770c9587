"""The library's docstrings as Markdown: roles become links, literal blocks and examples what mkdocstrings knows."""

import importlib
import re
from typing import Any

import griffe

from docs._site.api import canonical, homes, page_modules

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring of a package when it has been loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        pending: list[griffe.Object] = [pkg]
        while pending:
            owner = pending.pop()
            if owner.docstring is not None:
                owner.docstring.value = as_markdown(owner.docstring.value, owner)
            pending += [member for member in owner.members.values() if isinstance(member, griffe.Object)]


def as_markdown(text: str, owner: griffe.Object) -> str:
    """A docstring of `owner`, as the parser of Google's style and Markdown read it."""
    text = ROLE.sub(lambda match: _link(match[1], owner), text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _link(name: str, owner: griffe.Object) -> str:
    for path in _candidates(name, owner):
        target = _documented(path)
        if target is not None:
            return f"[`{name}`][{target}]"
    return f"`{name}`"


def _candidates(name: str, owner: griffe.Object) -> list[str]:
    """The paths that a name in a docstring of `owner` may stand for."""
    found = [name]
    found += [f"{scope.path}.{name}" for scope in (owner, owner.parent) if isinstance(scope, griffe.Class)]
    first, _, rest = name.partition(".")
    try:
        found.append(".".join(filter(None, (owner.resolve(first), rest))))
    except griffe.NameResolutionError:
        pass
    return found


def _documented(path: str) -> str | None:
    """The anchor of the module, function, class or method that `path` names, if the site has it."""
    if path in {name for modules in page_modules().values() for name in modules}:
        return path
    found = _import(path)
    defined = canonical(found)
    if defined is None:
        return None
    if defined in homes():
        return homes()[defined]
    owner, _, name = defined.rpartition(".")
    is_shown = owner in homes() and not name.startswith("_") and name in vars(_import(owner))
    return defined if is_shown and name != "forward" else None


def _import(path: str) -> Any:
    """What a dotted path names, or None. A function hides the module of its name, as it does where it is imported."""
    parts = path.split(".")
    if parts[0] != "vattn":
        return None
    found: Any = importlib.import_module("vattn")
    for end, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:end]))
            except ImportError:
                return None
        found = getattr(found, part, None)
    return found
