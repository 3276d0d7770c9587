"""The state of a queue as plain values, which ``torch.load(weights_only=True)`` reads, and back."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from vattn import _checks

Q = TypeVar("Q")
FIELDS = ("latents", "steps", "histories", "number")


def saved(op: str, value: Any) -> Any:
    """`value` as tensors, numbers, strings, None, and lists and dicts of them: tuples become lists.

    Raises:
        TypeError: it has something else in it.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Tensor):
        return value.clone()  # without what else is in its storage
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): saved(op, item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [saved(op, item) for item in value]
    raise TypeError(f"{op}: a scheduler must remember tensors, numbers and lists, got {type(value).__name__}")


def restored(op: str, state: object, settings: Mapping[str, str], ready: list[int], queue: Callable[..., Q]) -> Q:
    """The queue that was saved with the same `settings`; `ready` are the steps of its frames when it is full.

    Raises:
        TypeError, ValueError: `state` is not that.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{op}: state must be a dict, got state={type(state).__name__}")
    length = len(ready)
    missing = [name for name in ("settings", *FIELDS) if name not in state]
    if missing:
        raise ValueError(f"{op}: state must have {missing[0]}, got {', '.join(map(str, state)) or 'none'}")
    theirs = state["settings"]
    if not isinstance(theirs, Mapping):
        raise TypeError(f"{op}: settings must be a dict, got settings={type(theirs).__name__}")
    for name in (*settings, *theirs):
        if settings.get(name) != theirs.get(name):
            raise ValueError(f"{op}: {name} must be {settings.get(name)} as it is here, got {name}={theirs.get(name)}")
    latents, steps, histories, number = (state[name] for name in FIELDS)
    _checks.tensor(op, "latents", latents, meshes=False)
    _checks.rank(op, "latents", latents, "(B, C, L, H, W)")
    if latents.shape[2] != length:
        raise ValueError(f"{op}: latents must have L={length} frames, got latents.shape={tuple(latents.shape)}")
    for name, kind in {"steps": int, "histories": dict}.items():
        values = state[name]
        is_list = isinstance(values, list) and all(type(value) is kind for value in values)
        if not is_list or len(values) != length:
            raise ValueError(f"{op}: {name} must be a list of {length} of type {kind.__name__}, got {name}={values!r}")
    if not all(0 <= step <= most for step, most in zip(steps, ready, strict=True)):
        raise ValueError(f"{op}: steps must be from 0 to {ready}, got steps={steps}")
    _checks.integer(op, "number", number, least=-length)
    return queue(*saved(op, [latents, steps, histories, number]))
