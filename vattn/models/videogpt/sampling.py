"""Videos code by code, each drawn from what VideoGPT says after those before it; and longer ones, window by window.

Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn.models import extension
from vattn.models.draws import Randomness, draws_of
from vattn.models.sampling import codes_shape, draw_tokens, progress_bar, require_valid
from vattn.models.videogpt.model import VideoGPT

Frames = Callable[[Tensor], Tensor]
"""Codes ``(B, t, height, width)`` that a window begins with to the first frames in pixels, as :class:`VideoGPT` has."""


@torch.no_grad()
def generate(
    model: VideoGPT,
    shape: int | Sequence[int] | None = None,
    *,
    first: Tensor | None = None,
    classes: Tensor | None = None,
    frames: Tensor | None = None,
    generator: Randomness = None,
    progress: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Videos from nothing, from their first codes, or from their class and first frames.

    Args:
        model: in evaluation mode.
        shape: of the codes, ``(B, *grid)``, where the first axis may be shorter than the model's: it costs less; or B,
            for so many videos of the model's own grid. None for one video, or as many as `first` has.
        first: int64, codes that the videos begin with: of whole frames, ``(B, t, *grid[1:])``, or any number of them
            in raster order, ``(B, n)``. They are read all at once.
        classes, frames: as in :class:`VideoGPT`.
        generator: a generator, or :class:`vattn.models.draws.Draws`; its seed decides the sample.
        progress: show a bar.
        temperature, top_k, top_p: see :func:`vattn.models.sampling.sample_tokens`.

    Returns:
        Codes of `shape`, int64, which begin with `first`.

    Raises:
        TypeError: `first` is no int64 tensor.
        ValueError: a setting that does not fit, or logits that are not finite.

    Source:
        Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).

    Example:
        >>> model = VideoGPT(10, 4, grid=(2, 3, 3), dim=12, num_heads=2, num_layers=1).eval()
        >>> generate(model, 5, generator=torch.Generator()).shape, generate(model, (5, 1, 3, 3)).shape
        (torch.Size([5, 2, 3, 3]), torch.Size([5, 1, 3, 3]))
        >>> codes = generate(model, first=torch.tensor([[3, 1, 4, 1]]))
        >>> codes.shape, codes.flatten()[:4]
        (torch.Size([1, 2, 3, 3]), tensor([3, 1, 4, 1]))
    """
    if model.training:
        raise ValueError("generate: model must be in evaluation mode, got model.training=True")
    if shape is None:
        shape = 1 if first is None else len(first)
    batch, *grid = codes_shape("generate", model, shape)
    if len(grid) != len(model.grid) or not 1 <= grid[0] <= model.grid[0] or tuple(grid[1:]) != model.grid[1:]:
        raise ValueError(f"generate: shape must be B or (B, {', '.join(map(str, model.grid))}), got {shape=}")
    known = _first_codes(model, batch, grid, first)
    draws, state = draws_of(generator), model.begin(batch, classes=classes, frames=frames)
    model.prefill(known, state)
    valid: list[Tensor] = []
    # What comes before the first one does not matter.
    codes = [*known.unbind(1)] if known.shape[1] else [known.new_zeros(batch)]
    for _ in progress_bar(range(known.shape[1], math.prod(grid)), "VideoGPT", progress):
        logits = model.step(codes[-1], state)
        tokens, _, is_valid = draw_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=draws)
        codes.append(tokens)
        valid.append(is_valid)
    require_valid("generate", valid)
    return torch.stack(codes[-math.prod(grid) :], 1).unflatten(1, grid)


def stream_video(
    model: VideoGPT,
    codes: Tensor,
    *,
    context_frames: int | None = None,
    window: int | None = None,
    classes: Tensor | None = None,
    frames: Frames | None = None,
    generator: Randomness = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """The codes that follow on `codes`, window by window, without end and in constant memory.

    Args:
        model, codes, context_frames, window, classes, frames, generator, sampling: as in :func:`extend_video`.

    Returns:
        An iterator of the new frames of each window, ``(B, t, *grid[1:])``, int64.

    Raises:
        TypeError, ValueError: an argument that does not fit, at once; or logits that are not finite.

    Example:
        >>> model = VideoGPT(10, 4, grid=(2, 3, 3), dim=12, num_heads=2, num_layers=1).eval()
        >>> windows = stream_video(model, torch.randint(10, (1, 1, 3, 3)), generator=torch.Generator())
        >>> next(windows).shape, next(windows).shape
        (torch.Size([1, 1, 3, 3]), torch.Size([1, 1, 3, 3]))
    """
    window, context_frames = extension.sizes("stream_video", model, codes, context_frames, window)
    complete = _complete("stream_video", model, window, classes, frames, generator, sampling)
    return extension.slide(codes, context_frames, complete)


def extend_video(
    model: VideoGPT,
    codes: Tensor,
    num_frames: int,
    *,
    context_frames: int | None = None,
    window: int | None = None,
    classes: Tensor | None = None,
    frames: Frames | None = None,
    generator: Randomness = None,
    progress: bool = False,
    **sampling: Any,
) -> Tensor:
    """A video of any number of frames that begins with those given: a window slides over the codes.

    Each window begins with the last frames before it, as :func:`generate` with `first`. All windows are whole, and what
    is too much of the last one is cut off, so that a longer video of the same seed begins with a shorter one.

    Args:
        model: in evaluation mode.
        codes: ``(B, T, *grid[1:])`` int64, T from 0 up.
        num_frames: of the result, at least T.
        context_frames: frames of codes that a window begins with; None for three quarters of it.
        window: frames of codes, at most, and if None, those of the model.
        classes: as in :class:`VideoGPT`, for all windows.
        frames: for a model with `frame_shape`: a function that gives, of the codes that a window begins with, its first
            frames in pixels, such as ``lambda codes: tokenizer.decode(codes)[:, :, :1]``.
        generator: a generator, or :class:`vattn.models.draws.Draws`; its seed decides the sample.
        progress: show a bar, a step of which is a window.
        sampling: `temperature`, `top_k` and `top_p` of :func:`vattn.models.sampling.sample_tokens`.

    Returns:
        Codes ``(B, num_frames, *grid[1:])`` int64, which begin with `codes`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or logits that are not finite.

    Example:
        >>> model = VideoGPT(10, 4, grid=(2, 3, 3), dim=12, num_heads=2, num_layers=1).eval()
        >>> codes = torch.randint(10, (1, 1, 3, 3))
        >>> video = extend_video(model, codes, 5, generator=torch.Generator())
        >>> video.shape, torch.equal(video[:, :1], codes)
        (torch.Size([1, 5, 3, 3]), True)
    """
    window, context_frames = extension.sizes("extend_video", model, codes, context_frames, window)
    complete = _complete("extend_video", model, window, classes, frames, generator, sampling)
    return extension.extend("extend_video", codes, num_frames, window, context_frames, complete, progress)


def _complete(
    op: str,
    model: VideoGPT,
    window: int,
    classes: Tensor | None,
    frames: Frames | None,
    generator: Randomness,
    sampling: dict[str, Any],
) -> extension.Complete:
    """A window from the codes that it begins with."""
    if frames is not None and not callable(frames):
        raise TypeError(f"{op}: frames must be a function of codes, got frames={type(frames).__name__}")
    extension.require_names(op, sampling, draw_tokens)
    draws = draws_of(generator)

    def complete(known: Tensor) -> Tensor:
        pixels = None if frames is None else frames(known)
        shape = (len(known), window, *known.shape[2:])
        return generate(model, shape, first=known, classes=classes, frames=pixels, generator=draws, **sampling)

    return complete


def _first_codes(model: VideoGPT, batch: int, grid: Sequence[int], first: Tensor | None) -> Tensor:
    """The codes ``(batch, n)`` that videos of `grid` begin with, in raster order."""
    if first is None:
        return torch.zeros(batch, 0, dtype=torch.int64, device=model.embeddings.device)
    if not isinstance(first, Tensor) or first.dtype != torch.int64:
        got = f"first.dtype={first.dtype}" if isinstance(first, Tensor) else f"first={type(first).__name__}"
        raise TypeError(f"generate: first must be an int64 tensor, got {got}")
    is_whole = first.dim() == 1 + len(grid) and list(first.shape[2:]) == list(grid[1:])
    if len(first) != batch or not (is_whole or first.dim() == 2) or math.prod(first.shape[1:]) > math.prod(grid):
        raise ValueError(
            f"generate: first must have shape ({batch}, t, {', '.join(map(str, grid[1:]))}) or ({batch}, n), up to "
            f"the {math.prod(grid)} codes of a video, got first.shape={tuple(first.shape)}"
        )
    return first.reshape(batch, math.prod(first.shape[1:]))
