"""Videos of any length from a model of short ones: a window slides over the codes, and begins with what is known.

    given       0 1 2 3
    window 1        2 3 | 4 5           the last `context_frames` are known, and the rest of the window is found
    window 2            4 5 | 6 7

Each window has the positions of a video's beginning, so that no length is new to the model, and what it costs does not
grow with what came before it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks
from vattn.models.sampling import progress_bar

Complete = Callable[[Tensor], Tensor]
"""Codes ``(B, t, ...)`` that a window begins with to those of the whole window."""


def sizes(op: str, model: Any, codes: Tensor, context_frames: int | None, window: int | None) -> tuple[int, int]:
    """How many frames a window has, and how many of them the one before it had, checked; so are `model` and `codes`.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    if getattr(model, "training", False):
        raise ValueError(f"{op}: model must be in evaluation mode, got model.training=True")
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
        got = f"codes.dtype={codes.dtype}" if isinstance(codes, Tensor) else f"codes={type(codes).__name__}"
        raise TypeError(f"{op}: codes must be an int64 tensor, got {got}")
    grid: Sequence[int] | None = getattr(model, "grid", None)
    if codes.dim() < 2 or (grid is not None and tuple(codes.shape[2:]) != tuple(grid[1:])):
        axes = "..." if grid is None else ", ".join(map(str, grid[1:]))
        raise ValueError(f"{op}: codes must have shape (B, T, {axes}), got codes.shape={tuple(codes.shape)}")
    if window is None:
        if grid is None:
            raise TypeError(f"{op}: window must be given for a model without a grid, got window=None")
        window = grid[0]
    _checks.integer(op, "window", window, least=2)
    if grid is not None and window > grid[0]:
        raise ValueError(f"{op}: window must be at most the frames of the model ({grid[0]}), got window={window}")
    if context_frames is None:
        context_frames = max(1, window * 3 // 4)
    _checks.integer(op, "context_frames", context_frames, least=1)
    if context_frames >= window:
        raise ValueError(
            f"{op}: context_frames must be less than those of a window ({window}), got context_frames={context_frames}"
        )
    return window, context_frames


def require_names(op: str, settings: Mapping[str, Any], *functions: Callable[..., Any]) -> None:
    """Each of `settings` is a keyword of one of `functions`.

    Raises:
        TypeError: one is not.
    """
    parameters = [x for function in functions for x in inspect.signature(function).parameters.values()]
    names = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY}
    for name, value in settings.items():
        if name not in names:
            raise TypeError(f"{op}: settings must be among {', '.join(sorted(names))}, got {name}={value!r}")


def slide(codes: Tensor, context_frames: int, complete: Complete) -> Iterator[Tensor]:
    """The frames that follow on `codes`, window by window, without end."""
    known = codes[:, max(codes.shape[1] - context_frames, 0) :]
    while True:
        video = complete(known)
        new = video[:, known.shape[1] :]
        known = video[:, video.shape[1] - context_frames :].clone()  # whatever becomes of what is yielded
        yield new


def extend(
    op: str, codes: Tensor, num_frames: int, window: int, context_frames: int, complete: Complete, progress: bool
) -> Tensor:
    """`codes`, and as many of the frames that follow on them as make `num_frames`.

    Raises:
        TypeError, ValueError: `num_frames` is no number of so many frames.
    """
    _checks.integer(op, "num_frames", num_frames, least=codes.shape[1])
    missing = num_frames - codes.shape[1]
    known = min(codes.shape[1], context_frames)
    later = -(-(missing - (window - known)) // (window - context_frames))  # windows behind the first one
    count = 1 + max(later, 0) if missing > 0 else 0
    windows = slide(codes, context_frames, complete)
    parts = [codes, *(next(windows) for _ in progress_bar(range(count), op, progress))]
    return torch.cat(parts, 1)[:, :num_frames]
