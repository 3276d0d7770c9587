"""What a command line chooses beyond the repository's own cases and providers: sizes by name, and code by file."""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

from benchmarks.registry import Case, Operator, Provider

LEAST = {"dim": 0, "fold_div": 0, "num_random": 0}
"""What numbers of a case must be at least, where it is not 1."""


def case_of(operator: Operator[Any], text: str) -> Case:
    """The case of ``N=197,T=16``: sizes that are not named are those of the first default case.

    Raises:
        ValueError: a name that the operator's cases do not have, or a value that does not fit.
    """
    first = operator.cases["default"][0]
    types = get_type_hints(type(first))
    names = [field.name for field in dataclasses.fields(first)]
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--case: sizes of {operator.name} are {', '.join(names)}, got {part!r}")
        sizes[name] = _parsed(name, value, types[name])
    return dataclasses.replace(first, **sizes)


def _parsed(name: str, value: str, wanted: Any) -> Any:
    """A number, a word, or numbers joined by "+" where a case has a tuple of them."""
    parsed: Any
    try:
        if wanted is int or wanted is float:
            parsed = wanted(value)
        elif wanted is str:
            return value
        else:
            parsed = tuple(int(part) for part in value.split("+"))
    except ValueError:
        raise ValueError(f"--case: {name} must be {getattr(wanted, '__name__', wanted)}, got {value!r}") from None
    least = LEAST.get(name, 1)
    if min(parsed if isinstance(parsed, tuple) else (parsed,)) < least:
        raise ValueError(f"--case: {name} must be at least {least}, got {name}={value}")
    return parsed


def provider_of(text: str) -> Provider[Any]:
    """The provider of ``file.py:function``: ``function(case, device)`` returns ``run(*leaves) -> output``.

    Raises:
        ValueError: no such file, or nothing of that name in it that can be called.
    """
    file, colon, name = text.rpartition(":")
    path = pathlib.Path(file)
    if not colon or not path.is_file():
        raise ValueError(f"--provider: must be file.py:function, with a file that exists, got {text!r}")
    spec = importlib.util.spec_from_file_location(f"benchmarks_provider_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--provider: must be a file of Python, got {file!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch.compile look their module up by name
    spec.loader.exec_module(module)
    build: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(build):
        raise ValueError(f"--provider: {file} has no function {name!r}")
    return Provider(name, "other", build)
