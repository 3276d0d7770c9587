"""Videos of any length from MeBT, window by window: each is a continuation of the last frames before it.

Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional Transformers"
(CVPR 2023): the official code extrapolates so, with 12 of 16 frames as context and MaskGIT over the others.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vattn.models import extension
from vattn.models.draws import Randomness, draws_of
from vattn.models.mebt.sampling import Logits, continue_video, draft, draft_and_revise, inpaint, maskgit, revise
from vattn.models.sampling import draw_tokens

SAMPLERS = (maskgit, draft, revise, draft_and_revise)


def stream_video(
    model: Logits,
    codes: Tensor,
    *,
    context_frames: int | None = None,
    window: int | None = None,
    generator: Randomness = None,
    **settings: Any,
) -> Iterator[Tensor]:
    """The codes that follow on `codes`, window by window, without end and in constant memory.

    Args:
        model, codes, context_frames, window, generator, settings: as in :func:`extend_video`.

    Returns:
        An iterator of the new frames of each window, ``(B, t, height, width)``, int64.

    Raises:
        TypeError, ValueError: an argument that does not fit, at once; or logits that are not finite.

    Example:
        >>> def model(codes, context, target):  # any model: here it says 5
        ...     return torch.nn.functional.one_hot(torch.full_like(target, 5), 6) * 100.0
        >>> windows = stream_video(model, torch.zeros(1, 2, 3, dtype=torch.int64), window=4, context_frames=2)
        >>> next(windows)
        tensor([[[5, 5, 5],
                 [5, 5, 5]]])
    """
    window, context_frames = extension.sizes("stream_video", model, codes, context_frames, window)
    return extension.slide(codes, context_frames, _complete("stream_video", model, window, generator, settings))


def extend_video(
    model: Logits,
    codes: Tensor,
    num_frames: int,
    *,
    context_frames: int | None = None,
    window: int | None = None,
    generator: Randomness = None,
    progress: bool = False,
    **settings: Any,
) -> Tensor:
    """A video of any number of frames that begins with those given: a window slides over the codes.

    Each window is a :func:`continue_video` of the last frames before it. All windows are whole, and what is too much of
    the last one is cut off, so that a longer video of the same seed begins with a shorter one.

    Args:
        model: as in :func:`maskgit`.
        codes: ``(B, T, height, width)`` int64, or any axes after T, which is from 0 up.
        num_frames: of the result, at least T.
        context_frames: frames of codes that a window begins with; None for three quarters of it, as in the official
            code.
        window: frames of codes, at most, and if None, those of the model.
        generator: a generator, or :class:`vattn.models.draws.Draws`; its seed decides the sample.
        progress: show a bar, a step of which is a window.
        settings: of :func:`inpaint`: `sampler`, `num_steps`, `temperature`, `top_k`, `top_p` and others.

    Returns:
        Codes ``(B, num_frames, height, width)`` int64, which begin with `codes`.

    Raises:
        TypeError, ValueError: an argument that does not fit, or logits that are not finite.

    Source:
        ``extrapolate`` in the official ``sample_vqgan_transformer_videos.py``, which cuts off pixels, not codes.

    Example:
        >>> def model(codes, context, target):  # any model: here it says how many codes it is given
        ...     return torch.nn.functional.one_hot(torch.full_like(target, context.shape[1]), 9) * 100.0
        >>> codes = torch.zeros(1, 1, 2, dtype=torch.int64)
        >>> extend_video(model, codes, 6, window=3, context_frames=2, num_steps=1)
        tensor([[[0, 0],
                 [2, 2],
                 [2, 2],
                 [4, 4],
                 [4, 4],
                 [4, 4]]])
    """
    window, context_frames = extension.sizes("extend_video", model, codes, context_frames, window)
    complete = _complete("extend_video", model, window, generator, settings)
    return extension.extend("extend_video", codes, num_frames, window, context_frames, complete, progress)


def _complete(
    op: str, model: Logits, window: int, generator: Randomness, settings: dict[str, Any]
) -> extension.Complete:
    """A window from the codes that it begins with."""
    sampler = settings.get("sampler") or maskgit
    if sampler in SAMPLERS:  # what another one takes, it says itself
        extension.require_names(op, settings, inpaint, sampler, draw_tokens)
    draws = draws_of(generator)
    return lambda known: continue_video(model, known, window, generator=draws, **settings)
