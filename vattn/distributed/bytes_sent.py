"""How many bytes a call sends, without a group: the function runs on meta tensors, over simulated ranks."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import vattn.distributed
from vattn import _checks
from vattn.distributed._ranks import PaperRanks

NOT_OPERATORS = {"bytes_sent", "parallelize", "share_of"}


def bytes_sent(op: str, *inputs: Any, rank: int, size: int, backward: bool = False, **settings: Any) -> int:
    """The bytes of payload that one rank hands to collectives in a call of :mod:`vattn.distributed`.

    The handshake of integers is not counted, nor are seeds of dropout.

    Args:
        op: the name of a function, such as "latent_attention".
        inputs: its arguments on that rank: the shapes and dtypes of tensors count, on any device, "meta" too.
        rank, size: which of how many ranks.
        backward: whether to count a backward as well, to all inputs of floats.
        settings: its other arguments; `lengths` of the shards must be among them where the function takes them.

    Raises:
        TypeError: `rank` or `size` is no int, or the call does not fit.
        ValueError: there is no such function, no such rank, or the call does not fit.

    Example:
        >>> latents, context = torch.empty(1, 8, 256, 64), torch.empty(1, 8, 32_000, 64)
        >>> arguments = latents, context, context
        >>> bytes_sent("latent_attention", *arguments, rank=0, size=2, lengths=[32_000, 32_000])
        540672
        >>> 8 * 256 * (64 + 2) * 4                                # heads, latents, numbers of each, bytes of a number
        540672
    """
    names = [name for name in vattn.distributed.__all__ if name not in NOT_OPERATORS]
    if op not in names:
        raise ValueError(f"bytes_sent: op must be one of {', '.join(names)}, got op={op!r}")
    _checks.integer("bytes_sent", "size", size, least=1)
    _checks.integer("bytes_sent", "rank", rank, least=0)
    if rank >= size:
        raise ValueError(f"bytes_sent: rank must be between 0 and {size - 1}, got rank={rank}")
    return sum(handed for _, handed in calls(op, *inputs, rank=rank, size=size, backward=backward, **settings))


def calls(
    op: str, *inputs: Any, rank: int, size: int, backward: bool = False, **settings: Any
) -> list[tuple[str, int]]:
    """The collectives of a call, and the bytes that this rank hands to each."""
    paper = PaperRanks(rank, size)
    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        on_meta = [_without_data(x, backward) for x in inputs]
        settings = {name: _without_data(x, backward) for name, x in settings.items()}
        results = getattr(vattn.distributed, op)(*on_meta, group=paper, **settings)
    if backward:
        outs = [x for x in _tensors(results) if x.requires_grad]
        torch.autograd.backward(outs, [torch.empty_like(x) for x in outs])
    return paper.calls


def _without_data(x: Any, requires_grad: bool) -> Any:
    if isinstance(x, Tensor):
        empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return empty.requires_grad_(requires_grad and x.is_floating_point())
    if isinstance(x, torch.nn.Module):
        return copy.deepcopy(x).to("meta")
    if isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x):
        return [_without_data(y, requires_grad) for y in x]
    return x


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)
