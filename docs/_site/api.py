"""API pages: every public name of every public module, as `__all__` lists them.

A name is documented once, in the module that is nearest to its definition; others link to it.
"""

import functools
import importlib
import importlib.util
import inspect
import pkgutil
from typing import Any

PAGES = {
    "vattn": ("vattn",),
    "nn": ("vattn.nn",),
    "laps": ("vattn.models.laps",),
    "mebt": ("vattn.models.mebt",),
    "svitt": ("vattn.models.svitt",),
    "vqvae": ("vattn.models.vqvae",),
    "videogpt": ("vattn.models.videogpt",),
    "video_dit": ("vattn.models.video_dit",),
    "fifo": ("vattn.models.fifo",),
    "models": ("vattn.models", "vattn.models.checkpoints", "vattn.models.draws", "vattn.models.sampling"),
    "distributed": ("vattn.distributed",),
    "reference": ("vattn.reference",),
    "info": ("vattn.info",),
}
"""The modules of each page; another public package gets a page of its own."""

SHARED = {
    "vattn.models": (),
    "vattn.models.checkpoints": ("PretrainedModel",),
    "vattn.models.draws": ("Draws",),
    "vattn.models.sampling": ("sample_tokens",),
}
"""What is public of modules that have no `__all__` and hold more than that."""

NOT_PAGES = ("vattn.ops", "vattn.kernels")
"""Packages whose names are those of `vattn`, or nobody's to import."""

MODULE_OPTIONS = "    options:\n      members: false\n      show_root_heading: false\n"


def public_names(module_name: str) -> list[str]:
    """What a module offers: its `__all__`, or else the functions and classes that it defines; no modules.

    Classes come first and constants last; of `vattn` itself, the operators come first.
    """
    module = importlib.import_module(module_name)
    names = SHARED.get(module_name, getattr(module, "__all__", None))
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (inspect.isclass(value) or inspect.isfunction(value))
            and value.__module__ == module_name
        ]
    names = [name for name in names if not inspect.ismodule(getattr(module, name)) and not name.startswith("__")]
    first, second = (
        (inspect.isfunction, inspect.isclass) if module_name == "vattn" else (inspect.isclass, inspect.isfunction)
    )
    return sorted(names, key=lambda name: (not first(getattr(module, name)), not second(getattr(module, name))))


def public_packages() -> list[str]:
    """Every public package of vattn, and every public module of ``vattn.integrations``."""
    found = []
    for parent in ("vattn", "vattn.models", "vattn.integrations"):
        if importlib.util.find_spec(parent) is None:
            continue
        package = importlib.import_module(parent)
        for module in pkgutil.iter_modules(package.__path__[:1], f"{parent}."):  # the rest is the checkout's root
            is_public = not module.name.rpartition(".")[2].startswith("_") and module.name not in NOT_PAGES
            if is_public and (module.ispkg or parent == "vattn.integrations"):
                found.append(module.name)
    return found


@functools.cache
def page_modules() -> dict[str, tuple[str, ...]]:
    """The modules of every page, by the page's name."""
    placed = {name for modules in PAGES.values() for name in modules}
    added: dict[str, list[str]] = {}
    for name in public_packages():
        if name not in placed:
            added.setdefault(name.split(".")[1], []).append(name)
    return PAGES | {name: tuple(modules) for name, modules in added.items()}


def canonical(value: Any) -> str | None:
    """Where a function or a class is defined; None for a constant."""
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    return None


@functools.cache
def homes() -> dict[str, str]:
    """Where each public function and class is documented, by where it is defined: the nearest module that offers it."""
    found: dict[str, str] = {}
    for modules in page_modules().values():
        for module_name in modules:
            module = importlib.import_module(module_name)
            for name in public_names(module_name):
                defined = canonical(getattr(module, name))
                if defined is None:
                    continue
                best = found.get(defined)
                is_nearer = best is None or (
                    defined.startswith(f"{module_name}.") and len(module_name) > len(best.rpartition(".")[0])
                )
                if is_nearer:
                    found[defined] = f"{module_name}.{name}"
    return found


def pages() -> dict[str, str]:
    """Markdown for mkdocstrings, by the name of the page."""
    texts = {}
    for page, modules in page_modules().items():
        parts = []
        for module_name in modules:
            module = importlib.import_module(module_name)
            parts.append(f"# {module_name} {{#{module_name}}}\n\n::: {module_name}\n{MODULE_OPTIONS}")
            for name in public_names(module_name):
                path, defined = f"{module_name}.{name}", canonical(getattr(module, name))
                if defined is None or defined == path:
                    parts.append(f"::: {path}\n")
                elif homes()[defined] == path:
                    parts.append(f"[](){{#{path}}}\n\n::: {defined}\n")
                else:
                    parts.append(f"## {name} {{#{path}}}\n\nSee [`{homes()[defined]}`][{homes()[defined]}].\n")
        texts[page] = "\n".join(parts)
    return texts
