"""Reading official configurations."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any


def official_settings(op: str, config: Mapping[str, Any] | None, **names: str) -> dict[str, Any]:
    """The settings of a constructor that an official configuration has, under their own names.

    Args:
        op: for messages.
        config: a mapping, which may have sections, or the namespace of a command line; None is an empty one.
        names: what the configuration calls each setting.

    Example:
        >>> official_settings("", {"model": {"n_head": 4, "width": 3}}, num_heads="n_head", modes="mode")
        {'num_heads': 4}
    """
    found = dict(_leaves(op, {} if config is None else config))
    return {name: found[theirs] for name, theirs in names.items() if theirs in found}


def _leaves(op: str, config: object) -> Iterator[tuple[str, Any]]:
    """The settings of a configuration, without the sections they are in."""
    if isinstance(config, Namespace):
        config = vars(config)
    if not isinstance(config, Mapping):
        raise TypeError(f"{op}: config must be a mapping, got config={config!r}")
    for name, value in config.items():
        if isinstance(value, (Mapping, Namespace)):
            yield from _leaves(op, value)
        else:
            yield name, value
