"""What sampling from models has in common: tokens from logits, and how many codes are wanted.

p(token) = top_p(softmax(top_k(logits / temperature))),   token = argmax p / q,  q ~ Exp(1)
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from vattn import _checks
from vattn._extras import needs
from vattn.models.draws import Randomness, draws_of
from vattn.models.settings import number

Item = TypeVar("Item")


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Randomness = None,
) -> tuple[Tensor, Tensor]:
    """A token for each row of logits.

    Args:
        logits: ``(..., V)``; the computation is in float32.
        temperature: divides the logits; at 0 the largest is taken, and of equal ones the first.
        top_k: only the k largest logits count, and those equal to the last of them.
        top_p: only the largest probabilities count, up to and including the one with which their sum reaches p.
        generator: see :class:`vattn.models.draws.Draws`.

    Returns:
        tokens ``(...)`` int64, and the probabilities ``(..., V)`` they were drawn with.

    Raises:
        TypeError, ValueError: a setting that does not fit.
        ValueError: a row of logits has no finite maximum: it has NaN or infinity, or is -infinity throughout.

    Source:
        Holtzman et al., "The Curious Case of Neural Text Degeneration" (ICLR 2020), section 3, for `top_p`.

    Example:
        >>> logits = torch.tensor([0.1, 2.0, 1.0])
        >>> tokens, probabilities = sample_tokens(logits, temperature=0.5, top_k=2, generator=torch.Generator())
        >>> probabilities
        tensor([0.0000, 0.8808, 0.1192])
    """
    tokens, probabilities, valid = draw_tokens(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
    )
    require_valid("sample_tokens", [valid])
    return tokens, probabilities


def draw_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Randomness = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sample_tokens`, which does not wait for a GPU: whether the logits are valid comes back as a bool tensor.

    A loop collects these, for :func:`require_valid` at its end.
    """
    op, vocabulary = "sample_tokens", logits.shape[-1]
    if vocabulary == 0:
        raise ValueError(f"{op}: logits must have shape (..., V), V at least 1, got logits.shape={tuple(logits.shape)}")
    number(op, "temperature", temperature, 0)
    if top_k is not None:
        _checks.integer(op, "top_k", top_k, least=1)
    if top_p is not None:
        number(op, "top_p", top_p, 0, 1, above=True)
    logits = logits.float()
    largest = logits.amax(-1, keepdim=True)  # NaN if there is one
    if temperature == 0:
        probabilities = torch.nn.functional.one_hot(logits.argmax(-1), vocabulary).float()
    else:
        if top_k is not None:
            smallest = logits.topk(min(top_k, vocabulary)).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        # From the largest on, so that no temperature makes infinity of it.
        cold = max(float(temperature), torch.finfo(torch.float32).tiny)
        probabilities = ((logits - largest) / cold).softmax(-1)
        if top_p is not None:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            reached = ordered.cumsum(-1) >= top_p
            reached = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
            probabilities = probabilities.masked_fill(reached.scatter(-1, order, reached), 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    exponential = draws_of(generator).exponential(*logits.shape, device=logits.device)
    return (probabilities / exponential).argmax(-1), probabilities, largest.isfinite().all()


def require_valid(op: str, valid: Sequence[Tensor]) -> None:
    """Logits were valid each time that :func:`draw_tokens` was called.

    Raises:
        ValueError: they were not.
    """
    for call, is_valid in enumerate(torch.stack(list(valid)).tolist() if valid else []):
        if not is_valid:
            raise ValueError(
                f"{op}: logits must have a finite maximum in each row, got NaN, infinity, or -infinity throughout, "
                f"in call {call} of the model"
            )


def codes_shape(op: str, model: Any, shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of the codes that are to be generated: `shape`, or so many videos of the grid of `model`.

    Raises:
        TypeError, ValueError: it is no shape.
    """
    is_sequence = isinstance(shape, Sequence) and not isinstance(shape, (str, bytes))
    for i, size in enumerate(cast(Sequence[int], shape) if is_sequence else (shape,)):
        _checks.integer(op, "shape", size, least=1 if i else 0)  # there may be no video, but none of no frames
    if is_sequence:
        sizes = tuple(cast(Sequence[int], shape))
        if len(sizes) < 2:
            raise ValueError(f"{op}: shape must be those of B videos of codes, (B, ...), got shape={sizes}")
        return sizes
    grid = getattr(model, "grid", None)
    if grid is None:
        raise TypeError(f"{op}: shape must be that of the codes for a model without a grid, got shape={shape}")
    return (cast(int, shape), *grid)


def progress_bar(items: Iterable[Item], title: str, shown: bool) -> Iterable[Item]:
    """`items`, with a progress bar if there shall be one."""
    if not shown:
        return items
    with needs(title, "models"):
        from tqdm.auto import tqdm  # not needed otherwise

    return tqdm(items, desc=title)
