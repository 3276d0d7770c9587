"""Which tokens are given and which are predicted: schedules, and partitions of the positions of a video.

    masked at time t of N tokens:   ceil(ratio(t) * N),   ratio falls from 1 at t = 0 to 0 at t = 1

MeBT: Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers" (CVPR 2023). Positions number the tokens of a video in raster order, time first. A partition is a pair of
int64 tensors, contexts ``(B, NC)`` and targets ``(B, NT)``, and sampling moves positions from right to left::

    contexts             targets
                         0 1 2 3 4 5 6 7        t = 0, nothing is given
    6 2                  0 1 3 4 5 7
    6 2 0 5 7            1 3 4
    6 2 0 5 7 3 1 4                             t = 1
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vattn.models.draws import Randomness, draws_of
from vattn.models.settings import number

SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda t: torch.cos(math.pi * t / 2),
    "cosine_plus": lambda t: (1 + torch.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "quadratic": lambda t: (1 - t) ** 2,
    "square": lambda t: 1 - t**2,
    "cube": lambda t: 1 - t**3,
    "sqrt": lambda t: 1 - t**0.5,
    "convex": lambda t: (1 - t) ** 3,
}
"""The ratio of masked tokens at time t, from 0 to 1, by the names of the official configurations."""

Partition = tuple[Tensor, Tensor]


def mask_ratio(schedule: str, t: Tensor) -> Tensor:
    """The ratio of masked tokens at the times `t`.

    Raises:
        ValueError: there is no such schedule.

    Source:
        Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022), section 3.3.

    Example:
        >>> mask_ratio("square", torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000, 0.7500, 0.0000])
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"mask_ratio: schedule must be one of {', '.join(SCHEDULES)}, got schedule={schedule!r}")
    return SCHEDULES[schedule](t)


def num_masked(schedule: str, t: float, num_tokens: int, *, official_rounding: bool = False) -> int:
    """How many of `num_tokens` tokens are masked at time `t`: all at 0, none at 1.

    Args:
        schedule: a name in ``SCHEDULES``. t: from 0 to 1.
        num_tokens: of which a ratio is masked, rounded up.
        official_rounding: round up what float32 makes of the product, as the official code does, so that a whole
            number may become the next one: ``(1 - 5/6) * 12`` becomes 3.

    Example:
        >>> [num_masked("cosine", t, 16) for t in (0.0, 0.5, 1.0)]
        [16, 12, 0]
    """
    dtype = torch.float32 if official_rounding else torch.float64
    ratio = mask_ratio(schedule, torch.tensor(t, dtype=dtype, device="cpu"))
    noise = 0.0 if official_rounding else 1e-6  # of float64: the cosine at t = 1 is above 0
    return min(max(int(torch.ceil(ratio * num_tokens - noise)), 0), num_tokens)


def split_positions(order: Tensor, masked: int, budget: int | None = None) -> Partition:
    """The contexts and targets of positions in random `order`: the last `masked` of them are masked.

    Args:
        order: positions ``(B, L)``, in an order of its own for every sample.
        masked: how many are not contexts, from 0 to L.
        budget: most targets; of more masked positions, only the last become targets.

    Raises:
        ValueError: `masked` or `budget` does not fit.

    Example:
        >>> split_positions(torch.tensor([[3, 0, 2, 1]]), 3, budget=2)
        (tensor([[3]]), tensor([[2, 1]]))
    """
    length = order.shape[1]
    if not 0 <= masked <= length:
        raise ValueError(f"split_positions: masked must be between 0 and {length}, got masked={masked}")
    if budget is not None and budget < 1:
        raise ValueError(f"split_positions: budget must be at least 1, got budget={budget}")
    num_targets = masked if budget is None else min(masked, budget)
    return order[:, : length - masked], order[:, length - num_targets :]


def frames_of(order: Tensor, start: int, num_frames: int, frame_tokens: int) -> Tensor:
    """The positions in `order` that lie in frames ``start`` to ``start + num_frames - 1``, in the order they are in.

    Every row of `order` is a permutation of the same positions.

    Example:
        >>> frames_of(torch.tensor([[3, 0, 2, 1]]), start=1, num_frames=1, frame_tokens=2)
        tensor([[3, 2]])
    """
    frame = order.div(frame_tokens, rounding_mode="floor")
    inside = (frame >= start) & (frame < start + num_frames)
    return order[inside].view(order.shape[0], num_frames * frame_tokens)


def complement(positions: Tensor, num_tokens: int) -> Tensor:
    """The positions below `num_tokens` that are not in `positions` ``(B, L)``, ascending, ``(B, num_tokens - L)``.

    Raises:
        ValueError: a sample has a position twice.

    Example:
        >>> complement(torch.tensor([[3, 0], [1, 2]]), 4)
        tensor([[1, 2],
                [0, 3]])
    """
    batch, length = positions.shape
    free = torch.ones(batch, num_tokens, dtype=torch.bool, device=positions.device).scatter(1, positions, False)
    if not bool((free.sum(1) == num_tokens - length).all()):
        raise ValueError("complement: positions must differ within each sample, got some of them twice")
    return free.nonzero()[:, 1].view(batch, num_tokens - length)


def require_part(op: str, grid: Sequence[int] | None, codes: Tensor) -> None:
    """Codes are those of whole frames of a video of `grid`, or the first of them in raster order: ``(B, N)``.

    A position is a number in the raster of the grid. Frames of another height or width would get the positions of
    other places, without a word. None is the grid of a model that has none.

    Raises:
        ValueError: they are not.

    Example:
        >>> require_part("generate", (4, 2, 2), torch.zeros(1, 3, 2, 2))
    """
    if grid is None:
        return
    frames, *frame = grid
    if codes.dim() == 2:
        if codes.shape[1] > math.prod(grid):
            raise ValueError(
                f"{op}: codes must be at most {math.prod(grid)} in a video of {tuple(grid)}, got {codes.shape[1]}"
            )
    elif codes.dim() != 1 + len(grid) or list(codes.shape[2:]) != frame or codes.shape[1] > frames:
        raise ValueError(
            f"{op}: codes must have shape (B, T, {', '.join(map(str, frame))}), T at most {frames}, for a model of "
            f"grid {tuple(grid)}, or (B, N), got codes.shape={tuple(codes.shape)}"
        )


def next_partition(
    context: Tensor,
    target: Tensor,
    score: Tensor,
    masked: int,
    *,
    context_temperature: float = 0.0,
    generator: Randomness = None,
) -> Partition:
    """The targets of the highest scores become contexts, until only `masked` targets are left.

    Args:
        context, target: positions ``(B, NC)`` and ``(B, NT)``.
        score: ``(B, NT)``, positive: how sure the model is of each target.
        masked: targets that stay; if there are no more than that, nothing changes and nothing is drawn.
        context_temperature: how much chance there is in the choice: 0 goes by the scores alone, and of equal scores
            the earlier one wins.
        generator: see :class:`vattn.models.draws.Draws`.

    Raises:
        TypeError, ValueError: `context_temperature` is not a number from 0.

    Returns:
        Contexts, old ones first, then new ones from the highest score down; and targets, also from there down.

    Source:
        Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022), section 3.2.

    Example:
        >>> context, target, score = torch.tensor([[1]]), torch.tensor([[0, 2, 3]]), torch.tensor([[0.2, 0.9, 0.5]])
        >>> next_partition(context, target, score, masked=1)
        (tensor([[1, 2, 3]]), tensor([[0]]))
    """
    number("next_partition", "context_temperature", context_temperature, 0)
    new = target.shape[1] - masked
    if new <= 0:
        return context, target
    exponential = draws_of(generator).exponential(*score.shape, device=score.device)
    # The logarithm of score / exponential ** context_temperature, which over- and underflows.
    order = (score.log() - context_temperature * exponential.log()).sort(dim=1, descending=True, stable=True).indices
    target = target.gather(1, order)
    return torch.cat([context, target[:, :new]], 1), target[:, new:]


def draft_partitions(context: Tensor, target: Tensor, num_steps: int) -> list[Partition]:
    """The steps of a draft: group by group, targets become contexts; all that remain are targets.

    Args:
        context, target: positions ``(B, NC)`` and ``(B, NT)``, the latter in the order in which they are found.
        num_steps: groups, as equal as they can be.

    Source:
        Lee et al., "Draft-and-Revise: Effective Image Generation with Contextual RQ-Transformer" (NeurIPS 2022).

    Example:
        >>> context, target = torch.empty(1, 0, dtype=torch.int64), torch.tensor([[2, 0, 1]])
        >>> draft_partitions(context, target, 2)
        [(tensor([], size=(1, 0), dtype=torch.int64), tensor([[2, 0, 1]])), (tensor([[2]]), tensor([[0, 1]]))]
    """
    starts = [start for start, _ in _groups("draft_partitions", target, num_steps)]
    return [(torch.cat([context, target[:, :start]], 1), target[:, start:]) for start in starts]


def revise_partitions(context: Tensor, target: Tensor, num_steps: int) -> list[Partition]:
    """The steps of a revision: each group of targets is found again, from the contexts and all other targets.

    Args:
        context, target, num_steps: as in :func:`draft_partitions`.

    Source:
        Lee et al., "Draft-and-Revise: Effective Image Generation with Contextual RQ-Transformer" (NeurIPS 2022).

    Example:
        >>> context, target = torch.empty(1, 0, dtype=torch.int64), torch.tensor([[2, 0, 1]])
        >>> revise_partitions(context, target, 2)
        [(tensor([[0, 1]]), tensor([[2]])), (tensor([[2]]), tensor([[0, 1]]))]
    """
    return [
        (torch.cat([context, target[:, end:], target[:, :start]], 1), target[:, start:end])
        for start, end in _groups("revise_partitions", target, num_steps)
    ]


def _groups(op: str, target: Tensor, num_steps: int) -> list[tuple[int, int]]:
    """The bounds of `num_steps` groups of targets, without those that are empty."""
    if num_steps < 1:
        raise ValueError(f"{op}: num_steps must be at least 1, got num_steps={num_steps}")
    bounds = [i * target.shape[1] // num_steps for i in range(num_steps + 1)]
    return [(start, end) for start, end in pairwise(bounds) if start < end]
