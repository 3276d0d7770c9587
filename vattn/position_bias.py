"""A learned bias for every offset between two tokens of a video, in time, height and width.

A token at raster position p of the grid (T, H, W) has the coordinates (t, h, w), and

    bias[i, j] = table[(t_i - t_j + T - 1, h_i - h_j + H - 1, w_i - w_j + W - 1)]      query i, key j

The rows of the table, with S = (2T-1)(2H-1)(2W-1) offsets and G global tokens, which have no place in the grid::

    0 .. S             offsets, raster order
    S .. S + G         global query a -> any other key           S + a
    .. S + 2G          other query -> global key b               S + G + b
    .. S + 2G + G*G    global query a -> global key b            S + 2G + a * G + b

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023); the table is that of BEiT
with a temporal axis.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vattn import _checks

BiasTable = tuple[Tensor, Sequence[int]]
"""A table and its window, for those who have them without the module."""


class RelativePositionBias3D(nn.Module):
    """The bias table of one attention layer.

    :func:`vattn.edge_sparse_attention` and :func:`vattn.token_importance` look it up inside their kernels;
    :meth:`forward` writes it out, for looking and for tests.

    Args:
        window: ``(T, H, W)``, the full grid of tokens.
        num_heads: number of attention heads.
        num_global: how many global tokens stand before those of the grid.

    Attributes:
        table: ``(R, num_heads)``, ``R = (2T-1)(2H-1)(2W-1) + 2G + G*G``, zeros at first.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a size that cannot be.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers".

    Example:
        >>> bias = RelativePositionBias3D((2, 3, 3), num_heads=4)
        >>> bias.table.shape
        torch.Size([78, 4])
        >>> bias().shape                                # (heads, queries, keys): 1 global token and 18 others
        torch.Size([4, 19, 19])
    """

    def __init__(self, window: Sequence[int], num_heads: int, num_global: int = 1) -> None:
        super().__init__()
        op = type(self).__name__
        self.window = check_window(op, window)
        _checks.integer(op, "num_heads", num_heads, least=1)
        _checks.integer(op, "num_global", num_global, least=0)
        self.num_heads, self.num_global = num_heads, num_global
        self.table = nn.Parameter(torch.zeros(num_offsets(self.window) + num_global * (2 + num_global), num_heads))

    def forward(self, positions: Tensor | None = None, *, as_table: bool = False) -> Tensor:
        """The bias of every query and key, ``(H, G+N, G+N)``, or ``(B, H, G+N, G+N)`` for positions per sample.

        Args:
            positions: ``(N,)`` or ``(B, N)`` int64, the raster index of each token; None for the full grid.
            as_table: give the table instead, as a copy in float32 (float64 if that is its dtype), for those who look it
                up; a DTensor of one. A module whose weights are sharded has all of them in its forward only, hence the
                call, and the copy.
        """
        _checks.dense(type(self).__name__, "table", self.table, meshes=as_table)  # here one that FSDP shards is whole
        if as_table:
            return self.table.to(torch.promote_types(self.table.dtype, torch.float32), copy=True)
        if positions is None:
            positions = torch.arange(math.prod(self.window), device=self.table.device)
        return dense_bias((self.table, self.window), self.num_global, positions)

    @property
    def _look(self) -> tuple[Any, ...]:
        """See :mod:`vattn._looks`."""
        return tuple(self.window), self.num_heads, self.num_global, self.table.device

    @classmethod
    def from_2d(cls, table: Tensor, window: Sequence[int]) -> "RelativePositionBias3D":
        """The bias of a video model from that of an image model: every frame is biased as the image is.

        Args:
            table: ``(R, num_heads)``, ``R = (2H-1)(2W-1) + 2G + G*G``, rows in the order of this module's, such as
                BEiT's, which has G = 1.
            window: ``(T, H, W)``.

        Example:
            >>> RelativePositionBias3D.from_2d(torch.randn(25 + 3, 4), (2, 3, 3)).table.shape
            torch.Size([78, 4])
        """
        op = f"{cls.__name__}.from_2d"
        T, H, W = check_window(op, window)
        _checks.tensor(op, "table", table, meshes=False)
        _checks.rank(op, "table", table, "(R, num_heads)")
        rest = table.shape[0] - num_offsets((1, H, W))
        num_global = math.isqrt(max(rest + 1, 0)) - 1  # rest = 2G + G*G = (G + 1)**2 - 1
        if num_global < 0 or (num_global + 1) ** 2 != rest + 1:
            raise ValueError(
                f"{op}: table must have (2H-1)(2W-1) + 2G + G*G rows for window={tuple(window)} and some G, "
                f"got table.shape={tuple(table.shape)}"
            )
        offsets, of_global = table.detach().split([table.shape[0] - rest, rest])
        return cls._of(torch.cat([offsets.repeat(2 * T - 1, 1), of_global]), (T, H, W), num_global)

    def inflate(self, num_frames: int) -> "RelativePositionBias3D":
        """The bias for clips of `num_frames`: each offset in time takes the rows of the nearest one of this table.

        Example:
            >>> RelativePositionBias3D((2, 3, 3), num_heads=4).inflate(4)
            RelativePositionBias3D((4, 3, 3), num_heads=4, num_global=1)
        """
        _checks.integer("RelativePositionBias3D.inflate", "num_frames", num_frames, least=1)
        T, H, W = self.window
        S = num_offsets(self.window)
        offsets, of_global = self.table.detach().split([S, self.table.shape[0] - S])
        offsets = offsets.view(1, 2 * T - 1, -1).transpose(1, 2)  # time last, as interpolate has it
        nearest = torch.nn.functional.interpolate(offsets, size=2 * num_frames - 1, mode="nearest")
        offsets = nearest.transpose(1, 2).reshape(-1, self.num_heads)
        return self._of(torch.cat([offsets, of_global]), (num_frames, H, W), self.num_global)

    @classmethod
    def _of(cls, table: Tensor, window: tuple[int, int, int], num_global: int) -> "RelativePositionBias3D":
        bias = cls(window, table.shape[1], num_global)
        bias.table = nn.Parameter(table)
        return bias

    def extra_repr(self) -> str:
        return f"{self.window}, num_heads={self.num_heads}, num_global={self.num_global}"


def check_window(op: str, window: object) -> tuple[int, int, int]:
    """`window` as three positive ints."""
    if not isinstance(window, (list, tuple)):
        raise TypeError(f"{op}: window must be (T, H, W), got window={window!r}")
    if len(window) != 3:
        raise ValueError(f"{op}: window must be (T, H, W), got window={tuple(window)}")
    for axis, size in zip("THW", window, strict=True):
        _checks.integer(op, f"window's {axis}", size, least=1)
    return tuple(window)


def check_bias(op: str, bias: object, query: Tensor, num_global: int, positions: Tensor | None) -> None:
    """`bias` fits the heads and the tokens of `query`, of which `num_global` are global."""
    if not isinstance(bias, RelativePositionBias3D):
        got = type(bias).__name__
        raise TypeError(f"{op}: position_bias must be a RelativePositionBias3D, got position_bias={got}")
    for name, own, wanted in (
        ("num_heads", bias.num_heads, query.shape[1]),
        ("num_global", bias.num_global, num_global),
        ("table.device", bias.table.device, query.device),
    ):
        if own != wanted:
            raise ValueError(f"{op}: position_bias.{name} must be {wanted}, got position_bias.{name}={own}")
    tokens = query.shape[2] - num_global
    if positions is None and tokens > math.prod(bias.window):
        raise ValueError(
            f"{op}: tokens without positions must be at most as many as position_bias.window has, "
            f"got {tokens} tokens, position_bias.window={bias.window}"
        )


def check_table(op: str, table: Tensor | None, window: Sequence[int], num_global: int) -> None:
    """`window` has three sizes if there is a `table`, which then has their rows, and none if there is not."""
    if len(window) != (0 if table is None else 3):
        raise ValueError(
            f"{op}: window must be (T, H, W) with a bias_table, and () without, got window={tuple(window)}"
        )
    rows = 0 if table is None else num_offsets(window) + num_global * (2 + num_global)
    if table is not None and (table.shape[0] != rows or rows >= 2**31):
        raise ValueError(
            f"{op}: bias_table must have {rows} rows, fewer than 2**31, got bias_table.shape={tuple(table.shape)}"
        )


def table_of(position_bias: RelativePositionBias3D | BiasTable | None) -> tuple[Tensor | None, Sequence[int]]:
    """The float32 table for kernels and its window, or None and none."""
    if position_bias is None:
        return None, []
    if isinstance(position_bias, tuple):
        table, window = position_bias
    else:
        table = position_bias.table if _is_plain(position_bias) else position_bias(as_table=True)
        window = position_bias.window
        _checks.dense(type(position_bias).__name__, "table", table)
    return table if table.dtype == torch.float32 else table.float(), window


def dense_bias(position_bias: RelativePositionBias3D | BiasTable, num_global: int, positions: Tensor) -> Tensor:
    """The bias of every query and key, ``(..., H, G+N, G+N)`` for `positions` ``(..., N)``."""
    if not isinstance(position_bias, tuple):
        return position_bias(positions)
    table, window = position_bias
    return table[relative_position_index(window, num_global, positions)].movedim(-1, -3)


def num_offsets(window: Sequence[int]) -> int:
    """How many offsets two tokens of the grid can have: the rows of the table that come first."""
    return math.prod([2 * size - 1 for size in window])


def relative_position_index(window: Sequence[int], num_global: int, positions: Tensor) -> Tensor:
    """The row of the table for every query and key: ``(..., G+N, G+N)`` int64 for `positions` ``(..., N)``."""
    G, S = num_global, num_offsets(window)
    _, H, W = window
    t, h, w = positions // (H * W), positions // W % H, positions % W
    code = (t * (2 * H - 1) + h) * (2 * W - 1) + w
    # Nothing is written in place: transforms of PyTorch that fold constants would lose it.
    batch, tokens = positions.shape[:-1], torch.arange(G, device=positions.device)
    among_tokens = code[..., :, None] - code[..., None, :] + (S - 1) // 2
    among_globals = S + 2 * G + tokens[:, None] * G + tokens
    of_globals = torch.cat([among_globals, (S + tokens)[:, None].expand(G, code.shape[-1])], -1).expand(*batch, -1, -1)
    of_tokens = torch.cat([(S + G + tokens).expand(*code.shape, G), among_tokens], -1)
    return torch.cat([of_globals, of_tokens], -2)


def _is_plain(module: RelativePositionBias3D) -> bool:
    """Whether a call of it does no more than its class says, which costs a third of that of a small operator.

    A module whose weights are sharded has hooks, and its weights in its forward alone.
    """
    if type(module) is not RelativePositionBias3D or "forward" in vars(module):
        return False
    hooks = (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
        or nn.modules.module._has_any_global_hook()
    )  # fmt: skip
    return not hooks
