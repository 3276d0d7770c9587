"""Views of every kind, equal to the tensor (B, H, *tokens, D) of which they are made; what lies between is NaN."""

from collections.abc import Callable

import torch
from torch import Tensor


def projected(x: Tensor, i: int) -> Tensor:
    """As the heads of a projection to query, key and value lie: (B, *tokens, 3, H, D)."""
    rows = x.movedim(1, -2)  # (B, *tokens, H, D)
    memory = x.new_full((*rows.shape[:-2], 3, *rows.shape[-2:]), torch.nan)
    memory.select(-3, i % 3).copy_(rows)
    return memory.select(-3, i % 3).movedim(-2, 1)


def heads_first(x: Tensor, i: int) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def broadcast(x: Tensor, i: int) -> Tensor:
    """Of stride 0 along one axis, another one for each tensor."""
    return x.narrow(i % (x.ndim - 1), 0, 1).expand_as(x)


def last_axis(x: Tensor, i: int) -> Tensor:
    """With a last axis that is not contiguous."""
    return x.mT.contiguous().mT


def sliced(x: Tensor, i: int) -> Tensor:
    """From the middle of a larger tensor, at an odd address."""
    *outer, tokens, D = x.shape
    memory = x.new_full((*outer, tokens + 1, D + 3), torch.nan)
    return memory[..., 1:, 1:-2].copy_(x)


def everywhere(x: Tensor, i: int) -> Tensor:
    """One number, as the gradient of a sum is."""
    return x.flatten()[0].expand_as(x)


STRIDES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "projected": projected,
    "heads first": heads_first,
    "broadcast": broadcast,
    "last axis": last_axis,
    "slices": sliced,
    "mixed": lambda x, i: [last_axis, projected, sliced, heads_first][i % 4](x, i),
}


# A gradient of a sum is one number.
STRIDES_OF_GRADIENTS = STRIDES | {"broadcast": everywhere}


def restrided(tensors: dict[str, Tensor], view: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    """`tensors` of three or more axes as views; an lse, which has no last axis D, as if it had one."""
    views = dict(tensors)
    for i, (name, x) in enumerate(tensors.items()):
        if name.startswith("ls"):
            views[name] = view(x[..., None], i)[..., 0]
        elif x.ndim >= 3:
            views[name] = view(x, i)
    return views
