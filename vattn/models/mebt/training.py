"""The training loss of MeBT: how much of a video is masked, where, and how the cross-entropy is normalised.

    loss = -sum log p(code of target) / (number of masked tokens)

MeBT: Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers" (CVPR 2023).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vattn.models.draws import Randomness, draws_of
from vattn.models.mebt.masks import Partition, frames_of, num_masked, split_positions

PRIORS: dict[str, float | None] = {"uniform": 0.0, "longest": None, "gaussian2": 3e4, "gaussian100000_2": 1e5}
"""How many frames to train on: training steps for each frame more, 0 for any number, None for all frames."""


def masked_loss(
    logits: Tensor,
    codes: Tensor,
    masked: int,
    num_tokens: int,
    *,
    average: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross-entropy of targets, summed, over ``B * num_tokens * (masked / num_tokens) ** average``.

    Args:
        logits: ``(B, NT, V)``. codes: ``(B, NT)`` int64.
        masked: masked tokens of a sample, also those that a budget has left out of the targets.
        num_tokens: masked tokens and contexts of a sample.
        average: 1 is the mean over masked tokens; 0 is the sum over them in relation to all tokens, which gives
            lightly masked samples less weight.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.

    Returns:
        A scalar; 0 if nothing is masked, or B is 0.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers".

    Example:
        >>> masked_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), masked=3, num_tokens=8)
        tensor(1.3863)
    """
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum", label_smoothing=label_smoothing)
    ratio = max(masked, 1) / num_tokens
    return loss / (max(len(logits), 1) * num_tokens * ratio**average)


def frame_weights(prior: str, num_frames: int, step: int) -> Tensor:
    """The probabilities of training on 1, 2, ... `num_frames` frames at training step `step`, float64.

    The Gaussian priors begin with short videos: length L is most likely at step ``(L - 1) * PRIORS[prior]``.

    Raises:
        ValueError: there is no such prior.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers", section 4.1.

    Example:
        >>> [frame_weights("gaussian2", 4, step).argmax().item() + 1 for step in (0, 30_000, 90_000)]
        [1, 2, 4]
    """
    if prior not in PRIORS:
        raise ValueError(f"frame_weights: prior must be one of {', '.join(PRIORS)}, got prior={prior!r}")
    steps = PRIORS[prior]
    before = torch.arange(num_frames, dtype=torch.float64, device="cpu")  # frames before the last one
    if steps is None:
        return (before == num_frames - 1).double()
    if steps == 0:
        return torch.ones_like(before) / num_frames
    return (-((step - before * steps) ** 2) / (2 * (2 * steps) ** 2)).softmax(0)


def draw_partition(
    batch: int,
    grid: tuple[int, int, int],
    *,
    schedule: str = "linear",
    budget: int | None = None,
    prior: str = "longest",
    step: int = 0,
    generator: Randomness = None,
    device: torch.device | str = "cpu",
) -> tuple[Partition, int]:
    """Contexts and targets for a training step: a random part of the frames, a random time, random orders.

    Args:
        batch: B. grid: frames, height and width of a video in codes.
        schedule: a name in ``SCHEDULES``; the time is drawn between 0 and 1, one for the batch.
        budget: most targets of a sample.
        prior, step: how many frames the part has, see :func:`frame_weights`; it is the same for the batch.
        generator: see :class:`Draws`.
        device: where the result is wanted.

    Returns:
        Contexts ``(B, NC)`` and targets ``(B, NT)``, and how many tokens the part has.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers".

    Example:
        >>> (context, target), num_tokens = draw_partition(2, (4, 2, 2), budget=3, generator=torch.Generator())
        >>> num_tokens, target.shape[1] <= 3
        (16, True)
    """
    draws, frame_tokens = draws_of(generator), grid[1] * grid[2]
    order = draws.permutation(batch, grid[0] * frame_tokens, torch.device("cpu"))  # nothing waits for a GPU
    # What lies below a uniform number falls on a length as often as its weight says.
    below = frame_weights(prior, grid[0], step).cumsum(0) <= draws.uniform()
    num_frames = min(int(below.sum()) + 1, grid[0])
    if num_frames < grid[0]:
        start = int(draws.uniform() * (grid[0] - num_frames + 1))
        order = frames_of(order, start, num_frames, frame_tokens)
    masked = num_masked(schedule, draws.uniform(), order.shape[1])
    context, target = split_positions(order, masked, budget)
    return (context.to(device), target.to(device)), order.shape[1]
