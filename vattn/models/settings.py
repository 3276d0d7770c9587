"""Settings of models: plain values that JSON can hold, and checks of those that are read from a file."""

import argparse
import dataclasses
import functools
import inspect
import math
import numbers
import os
import pathlib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import Any


def override(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with `overrides` applied; dicts are merged entry by entry.

    Example:
        >>> override({"dim": 8, "video": {"dim": 4, "depth": 2}}, {"video": {"depth": 3}})
        {'dim': 8, 'video': {'dim': 4, 'depth': 3}}
    """
    merged = dict(settings)
    for name, value in overrides.items():
        old = merged.get(name)
        merged[name] = override(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def plain(name: str, value: object) -> Any:
    """`value` as JSON has it: lists for tuples and sets, dicts for dataclasses.

    Raises:
        TypeError: it is none of these, nor a number, a string, a bool or None.

    Example:
        >>> plain("levels", ((1, 2), None))
        [[1, 2], None]
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(name, getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(name, key): plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, Set):
        return plain(name, sorted(value))
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(name, item) for item in value]
    raise TypeError(
        f"{name} must be a plain value (numbers, strings, bools, None, lists, tuples and dicts of them), "
        f"got {type(value).__name__}"
    )


def _key(name: str, key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{name} must have strings as keys, got key={key!r}")
    return key


Config = Mapping[str, Any] | argparse.Namespace | None
"""An official configuration: a mapping, or what a command line is parsed to, with sections of either."""


def section(op: str, config: object) -> dict[str, Any]:
    """The entries of a configuration, which are settings and sections; none if there is no configuration.

    Raises:
        TypeError: `config` is no configuration.
    """
    if not isinstance(config, (Mapping, argparse.Namespace, types.NoneType)):
        raise TypeError(f"{op}: config must be a mapping, got config={config!r}")
    return dict(vars(config) if isinstance(config, argparse.Namespace) else config or {})


def leaves(op: str, config: Config) -> Iterator[tuple[str, Any]]:
    """The settings of a configuration, without the sections they are in.

    Example:
        >>> dict(leaves("Model.from_official", {"model": {"n_head": 2}, "shape": [4, 16, 16]}))
        {'n_head': 2, 'shape': [4, 16, 16]}
    """
    for name, value in section(op, config).items():
        if isinstance(value, (Mapping, argparse.Namespace)):
            yield from leaves(op, value)
        else:
            yield name, value


def official_settings(op: str, config: Config, kinds: type | Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The settings that a configuration has, in whatever sections, under official names: ``ours="official"``.

    What is null is as if it were not there.

    Args:
        op: for messages.
        config: a configuration.
        kinds: the types of our settings: a class whose constructor has them, or types by name.
        names: official names.

    Raises:
        TypeError: `config` is no configuration, or a setting is of another type.

    Example:
        >>> config = {"DATA": {"NUM_FRAMES": 8}}
        >>> official_settings("Model.from_official", config, {"num_frames": int}, num_frames="NUM_FRAMES", drop="DROP")
        {'num_frames': 8}
    """
    hints = _hints(kinds.__init__) if isinstance(kinds, type) else kinds  # type: ignore[misc]
    found = dict(leaves(op, config))
    settings = {ours: found[official] for ours, official in names.items() if found.get(official) is not None}
    for ours, value in settings.items():
        _require_type(op, names[ours], plain(f"{op}: {names[ours]}", value), hints.get(ours, Any))
    return settings


def require_told(op: str, config: Config, settings: Mapping[str, Any], **names: str) -> None:
    """`settings` have these, which weights do not show, and for which a configuration has official names.

    Raises:
        ValueError: they have not.
    """
    for ours, official in names.items():
        if ours not in settings:
            had = ", ".join(str(name) for name, _ in leaves(op, config)) or "nothing"
            raise ValueError(f"{op}: config must have {official}, got {had}")


def tuples(value: Any) -> Any:
    """`value` with tuples, which constructors are used to, for the lists of JSON."""
    if isinstance(value, list):
        return tuple(tuples(item) for item in value)
    return {name: tuples(item) for name, item in value.items()} if isinstance(value, dict) else value


def require_settings(
    op: str, cls: type, settings: Mapping[str, Any], parts: type, path: str = "", *, complete: bool = True
) -> None:
    """`settings`, as JSON has them, are those of the constructor of `cls`, and of the types it wants.

    Args:
        op: for messages.
        parts: a class. Settings with the name of a part, which `cls` annotates as one of such a class, are settings of
            that part.
        path: of `settings` in those of a whole model, such as "video.".
        complete: whether none may be missing, also not one that has a default, but for the ``added_settings`` of `cls`,
            which files of older versions do not have.

    Raises:
        TypeError, ValueError: they are not.
    """
    constructor: Any = cls.__init__  # type: ignore[misc]
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    names, annotated, hints = [p.name for p in parameters], _hints(cls), _hints(constructor)
    for name, value in settings.items():
        if name not in names:
            raise ValueError(f"{op}: settings must be among {', '.join(names)}, got {path}{name}={value!r}")
        hint, part = hints.get(name, Any), annotated.get(name)
        is_part = isinstance(part, type) and issubclass(part, parts)
        if complete and is_part and value is None:  # would be one of default settings
            raise TypeError(f"{op}: {path}{name} must be an object, got {path}{name}=None")
        _require_type(op, f"{path}{name}", value, hint)
        for kind in (part, *typing.get_args(part), hint, *typing.get_args(hint)):
            has_settings = isinstance(kind, type) and (issubclass(kind, parts) or dataclasses.is_dataclass(kind))
            if has_settings and isinstance(value, dict):
                require_settings(op, kind, value, parts, f"{path}{name}.", complete=complete)
    for name in names if complete else ():
        if name not in settings and name not in getattr(cls, "added_settings", ()):
            raise ValueError(f"{op}: settings must have {path}{name}, got {', '.join(settings) or 'none'}")


def require_numbers(op: str, value: Any, most: int, path: str = "settings") -> None:
    """The numbers in settings, as JSON has them, are finite, and whole ones are not above `most`.

    Raises:
        ValueError: they are not.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            require_numbers(op, item, most, name if path == "settings" else f"{path}.{name}")
    elif isinstance(value, list):
        for item in value:
            require_numbers(op, item, most, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{op}: {path} must be finite, got {path}={value}")
    elif isinstance(value, int) and abs(value) > most:
        raise ValueError(f"{op}: {path} must be at most {most}, got {path}={value}")


def require_path(op: str, name: str, value: object) -> pathlib.Path:
    """`value`, which is a string or a path, and not the empty one, which would be the current folder.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, str) or (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)):
        if os.fspath(value) == "":
            raise ValueError(f"{op}: {name} must not be empty, got {name}=''")
        return pathlib.Path(value)
    raise TypeError(f"{op}: {name} must be a string or a path, got {name}={value!r}")


def number(op: str, name: str, value: object, least: float, most: float = math.inf, *, above: bool = False) -> None:
    """`value` is a finite number from `least`, or above it, up to `most`.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {name}={value!r}")
    x: Any = value
    if not (least < x if above else least <= x) or not x <= most or not math.isfinite(x):
        wanted = f"{'above' if above else 'at least'} {least:g}{'' if most == math.inf else f' and at most {most:g}'}"
        raise ValueError(f"{op}: {name} must be {wanted}, got {name}={value}")


def probabilities(op: str, **values: object) -> None:
    """All are numbers from 0 to 1.

    Raises:
        TypeError, ValueError: one is not.
    """
    for name, value in values.items():
        number(op, name, value, 0, 1)


def _require_type(op: str, name: str, value: Any, hint: Any) -> None:
    """`value`, as JSON has it, is of the type `hint`."""
    if not _fits(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("collections.abc.", "")
        raise TypeError(f"{op}: {name} must be {wanted}, got {name}={value!r}")


@functools.cache
def _hints(annotated: Any) -> dict[str, Any]:
    """The types of a class or of a function; none if they cannot be known here."""
    try:
        return typing.get_type_hints(annotated)
    except NameError:  # of a type that is not imported
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is one of the type `hint`; unknown types are left to the constructor."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if hint in (None, types.NoneType):
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if isinstance(origin, type) and issubclass(origin, Collection):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if dataclasses.is_dataclass(hint):
        fields = _hints(hint)  # type: ignore[arg-type]
        return isinstance(value, dict) and all(n in fields and _fits(item, fields[n]) for n, item in value.items())
    return True
