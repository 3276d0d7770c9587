"""Sparse self-attention: each block of tokens reads some blocks, with a bias for every offset in time and space.

    q, k, v = W_q x + b_q, W_k x, W_v x + b_v
    y       = W_proj merge_heads(edge_sparse_attention(q, k, v, layout, position_bias))

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023). Tokens may have left the
network before; those that are left are cut into blocks anew, and keep their positions::

    position   g | 0  2  3  5 | 6  7  8 11 |12 13 15       blocks of 4, the last one short
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn._over_ranks import OverRanks
from vattn.layout import BlockLayout
from vattn.nn.heads import merge_heads, split_heads
from vattn.ops.edge_sparse_attention import edge_sparse_attention
from vattn.position_bias import RelativePositionBias3D, num_offsets

PAD_KEYS = ("mask", "zero")


class SparseSelfAttention(nn.Module, OverRanks):
    """Multi-head self-attention over the edges of a block layout, with a relative position bias.

    Args:
        dim: channels C of input and output.
        num_heads: heads H, which divide `dim`.
        window: ``(T, H, W)``, the full grid of tokens, for a bias of its offsets; None for no bias.
        num_global: how many global tokens stand before those of the grid.
        pad_keys: what fills up a last block that is short. "mask" is nothing. "zero" is keys and values of 0, which are
            read like others, with the bias of a global key, as in the official code: for checkpoints that were trained
            with it. It costs an elementwise pass over the output.
        attn_drop: probability of dropping an attention weight, in training.
        proj_drop: dropout after the output projection, in training.

    Shape:
        x ``(B, G+N, C)`` to the same. `layout` is a :class:`vattn.BlockLayout` of these tokens, on the device of x;
        without one all read all. `positions`, ``(N,)`` or ``(B, N)`` int64, are raster indices in `window`, 0 .. N-1 if
        None. With `return_importance` also ``(B, N)``: how much the first global token attends to each other token.
        Over ranks (see :func:`vattn.distributed.parallelize`) x has the global tokens and this rank's; `layout`, which
        must be given, and `positions` are those of all tokens, and so are `lengths`, of which each rank has one.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a setting or an input that does not fit.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers".

    Example:
        >>> attention = SparseSelfAttention(dim=64, num_heads=4, window=(2, 6, 6))
        >>> layout = vattn.BlockLayout.local_random(72, block_size=16, num_random=2)
        >>> attention(torch.randn(2, 1 + 72, 64), layout).shape
        torch.Size([2, 73, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: tuple[int, int, int] | None = None,
        num_global: int = 1,
        pad_keys: str = "mask",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for name, setting, least in (("dim", dim, 1), ("num_heads", num_heads, 1), ("num_global", num_global, 0)):
            _checks.integer(op, name, setting, least=least)
        if dim % num_heads:
            raise ValueError(f"{op}: dim must be a multiple of num_heads={num_heads}, got dim={dim}")
        if pad_keys not in PAD_KEYS:
            raise ValueError(f"{op}: pad_keys must be one of {', '.join(PAD_KEYS)}, got pad_keys={pad_keys!r}")
        if pad_keys == "zero" and num_global == 0:
            raise ValueError(f"{op}: pad_keys='zero' needs a global token, whose bias its keys have, got num_global=0")
        self.num_heads = num_heads
        self.num_global = num_global
        self.pad_keys = pad_keys
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.position_bias = None if window is None else RelativePositionBias3D(window, num_heads, num_global)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj: nn.Module = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        layout: BlockLayout | None = None,
        positions: Tensor | None = None,
        *,
        return_importance: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.pad_keys == "zero" and layout is not None and layout.order is not None:
            raise ValueError(f"SparseSelfAttention: layout must have no order with pad_keys='zero', got {layout=}")
        attend, begin = self._attend(layout, lengths)
        if layout is None:
            length = x.shape[1] - self.num_global
            layout = BlockLayout.dense(length, max(length, 1), num_global=self.num_global).to(x.device)
        query, key, value = (split_heads(layer(x), self.num_heads) for layer in (self.query, self.key, self.value))
        out, lse, *importance = attend(
            query, key, value, layout, position_bias=self.position_bias, positions=positions, return_lse=True,
            return_importance=return_importance, dropout_p=self.attn_drop.p if self.training else 0.0,
        )  # fmt: skip
        if self.pad_keys == "zero" and layout.num_tokens % layout.block_size:
            out = out * self._share_of_tokens(lse, layout, begin).to(out.dtype)[..., None]
        out = self.proj_drop(self.proj(merge_heads(out)))
        return (out, importance[0]) if return_importance else out

    def _attend(self, layout: BlockLayout | None, lengths: Sequence[int] | None) -> tuple[Callable[..., Any], int]:
        """The operator, on one process or over ranks, and the number of its first token that is not global."""
        if self.ranks is None:
            return edge_sparse_attention, 0
        if layout is None or lengths is None:
            raise ValueError(f"SparseSelfAttention: layout and lengths must be given over ranks, got {lengths=}")
        from vattn.distributed.edge_sparse_attention import edge_sparse_attention as over_ranks

        told = None if self._compares else lengths  # None: the ranks also compare their layouts
        return partial(over_ranks, group=self.ranks, grad="partial", lengths=told), sum(lengths[: self.ranks.rank])

    def _share_of_tokens(self, lse: Tensor, layout: BlockLayout, begin: int) -> Tensor:
        """The probability that is left to the tokens of ``lse (B, H, G+N)`` when there are also keys of padding.

        All of these have the same score, the bias, so that they take ``exp(bias)`` each, where the tokens that are read
        take ``exp(lse)`` together; and their values are 0. Token 0 that is not global is number `begin` of the layout.
        """
        padding = -layout.num_tokens % layout.block_size
        times = layout.block_counts()[..., -1].repeat_interleave(layout.block_size, -1)
        times = times[..., begin : begin + lse.shape[2] - self.num_global]
        log_mass = (padding * times).to(lse.dtype).log()  # (..., L, N), -inf where the last block is not read
        if self.position_bias is not None:
            row = num_offsets(self.position_bias.window) + self.num_global
            log_mass = log_mass + self.position_bias(as_table=True)[row, :, None]
        share = torch.sigmoid(lse[..., self.num_global :] - log_mass)
        return F.pad(share, (self.num_global, 0), value=1.0)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_global={self.num_global}, pad_keys={self.pad_keys!r}"
