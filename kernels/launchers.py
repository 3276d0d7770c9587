"""The launchers of an operator whose programs read all that they read in one go, for one query, key and value."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vattn._library import empty_rows
from vattn.kernels import attention


class Launchers:
    """The launchers of an operator whose programs read all that they read, without splits.

    Args:
        part: of a :class:`attention.Call`, the name of a pass and the operator's settings: the one launch of the pass.
    """

    def __init__(self, part: Callable[..., attention.Part]) -> None:
        self.part = part

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        """out, laid out as :func:`empty_rows`, and the float32 lse; the last settings are dropout_p, seed and scale."""
        out, lse = attention.empty_results(query)
        if lse.numel() > 0:
            call = attention.Call(query, [key], [value], *settings[-3:])
            call.forward(self.part(call, "forward", *settings[:-3]), out[None], lse[None])
        return out, lse

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
        lse: Tensor, *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of query, key and value; memory beyond them is `delta`, as large as lse."""
        dq, dk, dv, delta = empty_rows(query), empty_rows(key), empty_rows(value), torch.empty_like(lse)
        if lse.numel() > 0:
            call = attention.Call(query, [key], [value], *settings[-3:])
            part = self.part(call, "backward_query", *settings[:-3])
            call.backward_query(part, grad_out, grad_lse, out, lse, delta, dq[None])
            part = self.part(call, "backward_key", *settings[:-3])
            call.backward_key(part, grad_out, lse, delta, dk[None], dv[None])
        return dq, dk, dv

    def jvp(
        self, query_tangent: Tensor, key_tangent: Tensor, value_tangent: Tensor, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, lse: Tensor, *settings: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The tangents of out and lse."""
        dout, dlse = attention.empty_results(query)
        if lse.numel() > 0:
            call = attention.Call(query, [key], [value], *settings[-3:])
            part = self.part(call, "jvp", *settings[:-3])
            call.jvp(part, query_tangent, [key_tangent], [value_tangent], out, lse, dout[None], dlse[None])
        return dout, dlse
