"""Selection of tokens: the most important ones stay, in their old order.

    importance   .1 .4 .2 .4 .3         keep=3: tokens 1, 3 and 4

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023), on node sparsity.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks, reference
from vattn._library import runs_reference
from vattn._meshes import on_mesh, over_mesh
from vattn._operator import Operator


def select_tokens(
    tokens: Tensor,
    importance: Tensor,
    keep: float,
    *,
    positions: Tensor | None = None,
    num_global: int = 1,
) -> tuple[Tensor, Tensor]:
    """Keep the global tokens and the most important of the others, in their old order.

    Of equally important tokens the first are kept. A NaN is more important than any number, as for `torch.topk`;
    infinities are numbers like others.

    Args:
        tokens: ``(B, G+N, C)``, float32, bfloat16, float16 or float64, any strides: G = `num_global` tokens that
            always stay, then the others. The gradient flows to the tokens that are kept.
        importance: ``(B, N)``, float32, bfloat16, float16 or float64, without gradient.
        keep: how many of the N stay: an int, or a float between 0 and 1 for ``ceil(keep * N)``.
        positions: ``(N,)`` or ``(B, N)`` int64, the positions of the N tokens; None for 0 .. N-1.
        num_global: G.

    Returns:
        The kept tokens ``(B, G+K, C)``, and the positions ``(B, K)`` int64 of those that are not global.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape or a value that does not fit.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on node sparsity.

    Example:
        >>> tokens = torch.arange(6.0).view(1, 6, 1)                            # a global token and 5 others
        >>> kept, positions = select_tokens(tokens, torch.tensor([[0.1, 0.4, 0.2, 0.4, 0.3]]), keep=0.6)
        >>> kept.flatten(), positions
        (tensor([0., 2., 4., 5.]), tensor([[1, 3, 4]]))
    """
    op = "select_tokens"
    length = check_inputs(op, tokens, importance, num_global)
    keep = count(op, keep, length)
    if positions is not None:
        _checks.positions(op, positions, tokens, tokens.shape[0], length)

    importance = importance.detach()
    if on_mesh(tokens, importance, positions):
        return over_mesh(
            op, tokens=tokens, importance=importance, keep=keep, positions=positions, num_global=num_global
        )
    if runs_reference(tokens, op) or importance.dtype == torch.float64:
        return reference.select_tokens(tokens, importance, keep, positions=positions, num_global=num_global)
    kept_tokens, kept_positions, _ = _select(tokens, importance.float(), keep, positions, num_global)
    return kept_tokens, kept_positions


def check_inputs(op: str, tokens: Tensor, importance: Tensor, num_global: int) -> int:
    """`importance` is that of the tokens which are not global; returns how many these are."""
    _checks.tensor(op, "tokens", tokens)
    _checks.rank(op, "tokens", tokens, "(B, G+N, C)")
    _checks.integer(op, "num_global", num_global, least=0)
    _checks.tensor(op, "importance", importance)
    batch, length = tokens.shape[0], tokens.shape[1] - num_global
    if importance.shape != (batch, length):
        raise ValueError(
            f"{op}: importance must have shape ({batch}, {length}), got importance.shape={tuple(importance.shape)}"
        )
    if importance.device != tokens.device:
        raise ValueError(
            f"{op}: importance must be on the device of tokens ({tokens.device}), "
            f"got importance.device={importance.device}"
        )
    return length


def count(op: str, keep: Any, length: int) -> int:
    """How many of `length` tokens `keep` means."""
    if isinstance(keep, float):
        if not 0.0 <= keep <= 1.0:
            raise ValueError(f"{op}: keep as a share must be between 0.0 and 1.0, got keep={keep}")
        return math.ceil(keep * length)
    whole = isinstance(keep, (numbers.Integral, torch.SymInt)) and not isinstance(keep, bool)
    if not whole:
        raise TypeError(f"{op}: keep must be an int or a float, got keep={keep!r}")
    if not 0 <= keep <= length:
        raise ValueError(f"{op}: keep must be between 0 and the number of tokens ({length}), got keep={keep}")
    return keep


def _fake(
    tokens: Tensor, importance: Tensor, keep: int, positions: Tensor | None, num_global: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, C = tokens.shape
    kept = tokens.new_empty(B, keep, dtype=torch.int64)
    return tokens.new_empty(B, num_global + keep, C), kept, torch.empty_like(kept)


def _fake_backward(grad_kept: Tensor, kept_index: Tensor, num_tokens: int, num_global: int) -> Tensor:
    return grad_kept.new_empty(grad_kept.shape[0], num_global + num_tokens, grad_kept.shape[2])


def _gather(tokens: Tensor | None, kept_index: Tensor, num_global: int) -> Tensor | None:
    if tokens is None:
        return None
    rows = (num_global + kept_index)[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :num_global], tokens.gather(1, rows)], 1)


def _check_count(kept_index: Tensor, num_tokens: int, **others: Any) -> None:
    if num_tokens < kept_index.shape[1]:
        raise ValueError(
            f"select_tokens: num_tokens must be at least those that were kept ({kept_index.shape[1]}), "
            f"got num_tokens={num_tokens}"
        )


def _backward(saved: dict[str, Any], grads: Sequence[Any]) -> dict[str, Any]:
    if grads[0] is None:
        return {}
    return {"tokens": _put_back(grads[0], saved["kept_index"], saved["importance"][1], saved["num_global"])}


# The selection is linear in the tokens: the tangent of the kept ones is that of those, at the same indices, and the
# backward puts gradients back there.
_put_back: Operator = Operator(
    "select_tokens_backward(Tensor grad_kept, Tensor kept_index, SymInt num_tokens, SymInt num_global) "
    "-> Tensor grad_tokens",
    takes={"grad_kept": "B G+K C", "kept_index": "B K: int64", "num_tokens": ">= 0", "num_global": "G"},
    also=_check_count,
    fake=_fake_backward,
    launch="select_tokens.backward",
    backward=lambda saved, grads: {"grad_kept": _gather(grads[0], saved["kept_index"], saved["num_global"])},
    jvp=lambda saved, tangents: (
        _put_back(tangents["grad_kept"], saved["kept_index"], saved["num_tokens"], saved["num_global"]),
    ),
    keeps=("kept_index",),
    public=False,
)
_select = Operator(
    "select_tokens(Tensor tokens, Tensor importance, SymInt keep, Tensor? positions, SymInt num_global) "
    "-> (Tensor kept_tokens, Tensor kept_positions, Tensor kept_index)",
    takes={
        "tokens": "B G+N C",
        "importance": "B N: float32",
        "keep": "0 .. N",
        "positions": "N | B N: int64",
        "num_global": "G",
    },
    fake=_fake,
    backward=_backward,
    jvp=lambda saved, tangents: (_gather(tangents["tokens"], saved["kept_index"], saved["num_global"]), None, None),
    keeps=("kept_index",),
    sizes_of=("importance",),
    constant=("kept_positions", "kept_index"),
)
