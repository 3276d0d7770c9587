"""Sampling the masked tokens of a video: MaskGIT, or draft and revise.

MeBT: Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers" (CVPR 2023). A sampler computes the logits of the targets, given the contexts, samples tokens for
all targets, and makes some of them contexts::

    maskgit    the surest targets become contexts       Chang et al., "MaskGIT" (CVPR 2022)
    draft      a random group of targets does           Lee et al., "Draft-and-Revise" (NeurIPS 2022)
    revise     a group at a time is sampled again, from all other tokens

:func:`inpaint` is what to do with them: a grid of codes and a mask make a video. Generation, continuation and
interpolation are inpainting with a certain mask.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn.models.draws import Draws, DrawsOfRows, Randomness, draws_of
from vattn.models.mebt.masks import (
    Partition,
    draft_partitions,
    next_partition,
    num_masked,
    require_part,
    revise_partitions,
)
from vattn.models.sampling import codes_shape, draw_tokens, progress_bar, require_valid
from vattn.models.settings import number

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A model: codes ``(B, N)``, contexts ``(B, NC)``, targets ``(B, NT)`` to the logits of the targets ``(B, NT, V)``.

One with a `grid`, as MeBT has, makes videos within that grid: see :func:`require_part`.
"""

STRATEGIES = ("maskgit", "random", "bootstrap")
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(t * math.pi / 2),
    "constant": lambda t: 1.0,
}


class Sample(NamedTuple):
    """Codes ``(B, N)``, and which of their positions a sampler considers found (context) and not (target)."""

    codes: Tensor
    context: Tensor
    target: Tensor


@torch.no_grad()
def maskgit(
    model: Logits,
    codes: Tensor,
    context: Tensor | None = None,
    target: Tensor | None = None,
    *,
    num_steps: int = 8,
    schedule: str = "cosine",
    strategy: str = "maskgit",
    context_temperature: float = 4.5,
    decay: str = "linear",
    start_anew: bool = False,
    official_rounding: bool = False,
    generator: Randomness = None,
    progress: bool = False,
    **sampling: Any,
) -> Sample:
    """Sample all targets, `num_steps` times; each time keep those with the highest probability.

    Args:
        model: gives the logits of targets; in evaluation mode, if it is a module.
        codes: ``(B, N)``, or with any axes instead of N; not changed.
        context, target: positions of what is known and of what is to be found; by default all is to be found.
        num_steps: times in which the `schedule` takes the ratio of masked tokens from 1 to 0.
        schedule: a name in :data:`vattn.models.mebt.SCHEDULES`.
        strategy: "maskgit" keeps what the model is surest of, "random" keeps anything, "bootstrap" keeps one
            random token a step.
        context_temperature: how much chance there is in what to keep, see :func:`vattn.models.mebt.next_partition`.
        decay: "linear" brings it to 0 at the last step, "cosine" later, "constant" never.
        start_anew: what the schedule is a ratio of: all N tokens, so that steps that would mask more than there are
            targets are left out, or (with True) the targets.
        official_rounding: see :func:`vattn.models.mebt.num_masked`.
        generator: a generator, or :class:`vattn.models.draws.Draws`; its seed decides the sample.
        progress: show a bar.
        sampling: `temperature`, `top_k` and `top_p` of :func:`sample_tokens`.

    Raises:
        ValueError: a setting that does not fit, or logits that are not finite.

    Source:
        Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022), section 3.2.

    Example:
        >>> def model(codes, context, target):  # any model: here it says 0, 1, 0, 1, ...
        ...     return torch.nn.functional.one_hot(target % 2, 2) * 100.0
        >>> maskgit(model, torch.zeros(1, 6, dtype=torch.int64), num_steps=3, generator=torch.Generator()).codes
        tensor([[0, 1, 0, 1, 0, 1]])
    """
    for name, setting, known in (("strategy", strategy, STRATEGIES), ("decay", decay, DECAYS)):
        if setting not in known:
            raise ValueError(f"maskgit: {name} must be one of {', '.join(known)}, got {name}={setting!r}")
    _checks.integer("maskgit", "num_steps", num_steps, least=1)
    number("maskgit", "context_temperature", context_temperature, 0)
    draws, valid = draws_of(generator), []
    codes, context, target = _start("maskgit", model, codes, context, target)
    total = target.shape[1] if start_anew else codes.shape[1]
    for step in progress_bar(range(1, num_steps + 1), "maskgit", progress):
        t = step / num_steps
        masked = num_masked(schedule, t, total, official_rounding=official_rounding)
        if target.shape[1] == 0 or masked > target.shape[1]:
            continue
        tokens, score, is_valid = _find(model, codes, context, target, draws, sampling)
        valid.append(is_valid)
        codes = codes.scatter(1, target, tokens)
        chance = context_temperature * DECAYS[decay](t)
        if strategy != "maskgit":
            score, chance = torch.ones_like(score), 1.0
        if strategy == "bootstrap":
            masked = target.shape[1] - 1
        context, target = next_partition(context, target, score, masked, context_temperature=chance, generator=draws)
    require_valid("maskgit", valid)
    return Sample(codes, context, target)


def draft(
    model: Logits,
    codes: Tensor,
    context: Tensor | None = None,
    target: Tensor | None = None,
    *,
    num_steps: int = 8,
    generator: Randomness = None,
    progress: bool = False,
    **sampling: Any,
) -> Sample:
    """Sample all targets, `num_steps` times; each time keep a random group of them.

    Args:
        num_steps: groups into which the targets are divided.
        model, codes, context, target, generator, progress, sampling: as in :func:`maskgit`.

    Raises:
        ValueError: a setting that does not fit, or logits that are not finite.

    Source:
        Lee et al., "Draft-and-Revise: Effective Image Generation with Contextual RQ-Transformer" (NeurIPS 2022).

    Example:
        >>> def model(codes, context, target):  # any model: here it says how many tokens it is given
        ...     return torch.nn.functional.one_hot(torch.full_like(target, context.shape[1]), 4) * 100.0
        >>> draft(model, torch.zeros(1, 4, dtype=torch.int64), num_steps=2).codes.sort().values
        tensor([[0, 0, 2, 2]])
    """
    return _by_group(draft_partitions, "draft", model, codes, context, target, num_steps, generator, progress, sampling)


def revise(
    model: Logits,
    codes: Tensor,
    context: Tensor | None = None,
    target: Tensor | None = None,
    *,
    num_steps: int = 8,
    generator: Randomness = None,
    progress: bool = False,
    **sampling: Any,
) -> Sample:
    """Sample each target once more, a random group of them at a time, from all other tokens.

    Args:
        codes: ``(B, N)``, whose targets have been found before.
        num_steps: groups into which the targets are divided.
        model, context, target, generator, progress, sampling: as in :func:`maskgit`.

    Raises:
        ValueError: a setting that does not fit, or logits that are not finite.

    Source:
        Lee et al., "Draft-and-Revise: Effective Image Generation with Contextual RQ-Transformer" (NeurIPS 2022).

    Example:
        >>> def model(codes, context, target):  # any model: here it says how many tokens it is given
        ...     return torch.nn.functional.one_hot(torch.full_like(target, context.shape[1]), 4) * 100.0
        >>> revise(model, torch.zeros(1, 4, dtype=torch.int64), num_steps=2).codes
        tensor([[2, 2, 2, 2]])
    """
    return _by_group(
        revise_partitions, "revise", model, codes, context, target, num_steps, generator, progress, sampling
    )


def draft_and_revise(
    model: Logits,
    codes: Tensor,
    context: Tensor | None = None,
    target: Tensor | None = None,
    *,
    draft_steps: int = 8,
    revise_steps: int = 2,
    num_revisions: int = 2,
    revise_contexts: bool = False,
    generator: Randomness = None,
    progress: bool = False,
    **sampling: Any,
) -> Sample:
    """A draft, then revisions of it, each with groups of its own.

    Args:
        draft_steps, revise_steps: `num_steps` of :func:`draft` and of each :func:`revise`.
        num_revisions: how often to revise.
        revise_contexts: whether revisions also find anew what was given.
        model, codes, context, target, generator, progress, sampling: as in :func:`maskgit`.

    Raises:
        ValueError: a setting that does not fit, or logits that are not finite.

    Source:
        Lee et al., "Draft-and-Revise: Effective Image Generation with Contextual RQ-Transformer" (NeurIPS 2022).
    """
    _checks.integer("draft_and_revise", "num_revisions", num_revisions, least=0)
    settings = sampling | {"generator": draws_of(generator), "progress": progress}
    sample = draft(model, codes, context, target, num_steps=draft_steps, **settings)
    if revise_contexts:
        context = target = None
    for _ in range(num_revisions):
        sample = revise(model, sample.codes, context, target, num_steps=revise_steps, **settings)
    return sample


def inpaint(
    model: Logits, codes: Tensor, mask: Tensor, *, sampler: Callable[..., Sample] | None = None, **settings: Any
) -> Tensor:
    """A video that keeps the codes outside the mask, and samples those inside.

    Args:
        model: as in :func:`maskgit`.
        codes: ``(B, T, height, width)`` int64, or any axes after B; values inside the mask do not matter.
        mask: bool, broadcastable to `codes`: True is to be found, as many in each sample.
        sampler: :func:`maskgit` (if None, with a schedule over the masked tokens), :func:`draft_and_revise`, or
            a function with the arguments of :func:`draft`.
        settings: of the sampler, such as `num_steps`, `temperature`, `generator` and `progress`.

    Returns:
        New codes, in the shape of `codes`.

    Raises:
        TypeError: `mask` is not a bool tensor, or `sampler` no function.
        ValueError: `mask` does not fit `codes`, or the samples have different numbers of masked tokens.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers", section 4.

    Example:
        >>> def model(codes, context, target):  # any model: here it says 7
        ...     return torch.nn.functional.one_hot(torch.full_like(target, 7), 8) * 100.0
        >>> codes = torch.zeros(1, 2, 1, 3, dtype=torch.int64)
        >>> inpaint(model, codes, torch.tensor([True, False, False]), generator=torch.Generator())
        tensor([[[[7, 0, 0]],
        <BLANKLINE>
                 [[7, 0, 0]]]])
    """
    if sampler is not None and not callable(sampler):
        raise TypeError(f"inpaint: sampler must be a function such as maskgit, got {sampler=}")
    if mask.dtype != torch.bool:
        raise TypeError(f"inpaint: mask must be a bool tensor, got mask.dtype={mask.dtype}")
    sizes = zip(reversed(mask.shape), reversed(codes.shape), strict=False)
    if mask.dim() > codes.dim() or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(
            f"inpaint: mask must be broadcastable to codes {tuple(codes.shape)}, got mask.shape={tuple(mask.shape)}"
        )
    require_part("inpaint", getattr(model, "grid", None), codes)
    inside = mask.expand_as(codes).flatten(1)
    counts = inside.sum(1)
    masked = int(counts.max()) if len(codes) else 0
    if len(codes) and int(counts.min()) != masked:
        raise ValueError(f"inpaint: mask must be as large in each sample, got mask.sum(...)={counts.tolist()}")
    order = inside.byte().argsort(dim=1, stable=True)
    known = order.shape[1] - masked
    sampler = partial(maskgit, start_anew=True) if sampler is None else sampler
    return sampler(model, codes, order[:, :known], order[:, known:], **settings).codes.view_as(codes)


def generate(
    model: Logits,
    shape: int | Sequence[int] = 1,
    *,
    device: torch.device | str | None = None,
    generator: Randomness = None,
    progress: bool = False,
    **settings: Any,
) -> Tensor:
    """Videos from nothing.

    Args:
        model: as in :func:`maskgit`.
        shape: of the codes, such as ``(B, T, height, width)``; or B, for so many videos of the model's own grid. A
            model with a `grid` makes frames of its own height and width, and at most as many as it has.
        device: of the codes; by default that of the model's parameters.
        generator: a generator, or :class:`vattn.models.draws.Draws`; its seed decides the sample.
        progress: show a bar.
        settings: of :func:`inpaint`: `sampler`, `num_steps`, `temperature`, `top_k`, `top_p` and others.

    Returns:
        Codes of `shape`, int64.

    Raises:
        ValueError: a setting that does not fit, or logits that are not finite.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers", section 4.

    Example:
        >>> def model(codes, context, target):  # any model: here it says 0, 1, 2, 3
        ...     return torch.nn.functional.one_hot(target, 4) * 100.0
        >>> generate(model, (1, 2, 2), num_steps=2, generator=torch.Generator())
        tensor([[[0, 1],
                 [2, 3]]])
    """
    if device is None and isinstance(model, nn.Module):
        device = next((parameter.device for parameter in model.parameters()), None)
    codes = torch.zeros(codes_shape("generate", model, shape), dtype=torch.int64, device=device)
    everything = torch.ones_like(codes, dtype=torch.bool)
    return inpaint(model, codes, everything, generator=generator, progress=progress, **settings)


def continue_video(model: Logits, first: Tensor, num_frames: int, **settings: Any) -> Tensor:
    """A video of `num_frames` frames that begins with the frames `first`, ``(B, T, height, width)``.

    Settings are those of :func:`inpaint`.

    Raises:
        ValueError: there are more frames than that already.
    """
    return interpolate(model, first, first[:, :0], num_frames, **settings)


def interpolate(model: Logits, first: Tensor, last: Tensor, num_frames: int, **settings: Any) -> Tensor:
    """A video of `num_frames` frames that begins with `first` and ends with `last`, both ``(B, T, height, width)``.

    Settings are those of :func:`inpaint`.

    Raises:
        ValueError: there are more frames than that already.

    Example:
        >>> def model(codes, context, target):  # any model: here it says 5
        ...     return torch.nn.functional.one_hot(torch.full_like(target, 5), 6) * 100.0
        >>> first, last = torch.zeros(1, 1, 2, dtype=torch.int64), torch.ones(1, 1, 2, dtype=torch.int64)
        >>> interpolate(model, first, last, 3, generator=torch.Generator())
        tensor([[[0, 0],
                 [5, 5],
                 [1, 1]]])
    """
    between = num_frames - first.shape[1] - last.shape[1]
    if between < 0:
        given = first.shape[1] + last.shape[1]
        raise ValueError(f"interpolate: num_frames must be at least {given}, got num_frames={num_frames}")
    unknown = first.new_zeros(first.shape[:1] + (between,) + first.shape[2:])
    parts = (first, unknown, last)
    mask = torch.cat([torch.full_like(part, part is unknown, dtype=torch.bool) for part in parts], 1)
    return inpaint(model, torch.cat(parts, 1), mask, **settings)


@torch.no_grad()
def _by_group(
    partitions: Callable[[Tensor, Tensor, int], list[Partition]],
    op: str,
    model: Logits,
    codes: Tensor,
    context: Tensor | None,
    target: Tensor | None,
    num_steps: int,
    generator: Randomness,
    progress: bool,
    sampling: dict[str, Any],
) -> Sample:
    """A draft or a revision: find the targets of each partition, over a random order of all targets."""
    draws, valid = draws_of(generator), []
    codes, context, target = _start(op, model, codes, context, target)
    target = target.gather(1, draws.permutation(len(target), target.shape[1], target.device))
    for known, wanted in progress_bar(partitions(context, target, num_steps), op, progress):
        tokens, _, is_valid = _find(model, codes, known, wanted, draws, sampling)
        codes = codes.scatter(1, wanted, tokens)
        valid.append(is_valid)
    require_valid(op, valid)
    return Sample(codes, torch.cat([context, target], 1), target[:, :0])


def _start(op: str, model: Logits, codes: Tensor, context: Tensor | None, target: Tensor | None) -> Sample:
    """The arguments of a sampler, checked and complete."""
    if getattr(model, "training", False):
        raise ValueError(f"{op}: model must be in evaluation mode, got model.training=True")
    if (context is None) != (target is None):
        raise ValueError(f"{op}: context and target must be given together, got {context=}, {target=}")
    require_part(op, getattr(model, "grid", None), codes)
    codes = codes.flatten(1)
    if context is None or target is None:
        target = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
        context = target[:, :0]
    return Sample(codes, context, target)


def _find(
    model: Logits, codes: Tensor, context: Tensor, target: Tensor, draws: Draws, sampling: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens for all targets, the probabilities ``(B, NT)`` of both, and whether the logits were valid.

    Over ranks each finds its own with the numbers that one process would draw for them; tokens and probabilities are
    gathered.
    """
    ranks = getattr(model, "ranks", None)
    own = draws if ranks is None else DrawsOfRows(draws, ranks.share(target.shape[1]), target.shape[1])
    tokens, probabilities, is_valid = draw_tokens(model(codes, context, target), **sampling, generator=own)
    score = probabilities.gather(-1, tokens[..., None])[..., 0]
    if ranks is None:
        return tokens, score, is_valid
    everywhere = ranks.wait(ranks.start_all_reduce(is_valid.int(), "min")).bool()
    return ranks.gather_shares(tokens, target.shape[1]), ranks.gather_shares(score, target.shape[1]), everywhere
