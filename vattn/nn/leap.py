"""Leap attention, with its shift, for frames that lie in the batch.

    q, k, v = W_qkv x                                                  three views of one tensor
    y       = W_proj merge_heads(shift(leap_attention(q, k, v)))       merging heads is a view, too

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022).
The frames of a video lie behind each other in the batch, where an image model wants them::

    row of x      0   1   2   3 | 4   5   6   7        x (B*T, N, C), here T = 4
    video         0   0   0   0   1   1   1   1
    frame         0   1   2   3   0   1   2   3
    leap = 2      A   B   A   B   C   D   C   D        who attends to whom
"""

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn._over_ranks import OverRanks
from vattn.nn.heads import merge_heads, split_heads
from vattn.ops.leap_attention import leap_attention

if TYPE_CHECKING:
    from vattn.distributed._ranks import Ranks


def leap_of_level(level: int | None, num_frames: int) -> int | None:
    """The leap of a LAPS level: ``num_frames // 2**level``. None, which means no leap, stays None.

    Raises:
        TypeError: `level` is neither an int nor None.
        ValueError: `level` is negative, or so large that the leap is 0.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on leap attention.

    Example:
        >>> [leap_of_level(level, num_frames=8) for level in (1, 2, 3, None)]
        [4, 2, 1, None]
    """
    return leap_for("leap_of_level", level, num_frames)


def leap_for(op: str, level: int | None, num_frames: int) -> int | None:
    """:func:`leap_of_level` for the function `op`."""
    _checks.integer(op, "num_frames", num_frames, least=1)
    if level is None:
        return None
    _checks.integer(op, "level", level, least=0)
    leap = num_frames >> level
    if leap == 0:
        raise ValueError(f"{op}: num_frames // 2**level must be at least 1, got level={level}, num_frames={num_frames}")
    return leap


def attend_frames(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_frames: int,
    leap: int | None,
    group_size: int = 2,
    fold_div: int = 0,
    dropout_p: float = 0.0,
    scale: float | None = None,
    ranks: "Ranks | None" = None,
) -> Tensor:
    """Leap attention for frames that lie in the batch, heads merged: what the modules here share.

    Args:
        query, key, value: ``(B * num_frames, H, N, D)``, batch-major, then time; any strides.
        num_frames: frames of a video.
        leap: as in :func:`vattn.leap_attention`; None means attention within each frame.
        group_size, fold_div, dropout_p, scale: as in :func:`vattn.leap_attention`.
        ranks: over which the frames of a video are spread; this one has its share of them.

    Returns:
        ``(B * num_frames, N, H * D)``, a view of the operator's output.

    Raises:
        TypeError, ValueError: what does not fit, as :func:`vattn.leap_attention` says it.
    """
    rows, frames = query.shape[0], num_frames if ranks is None else len(ranks.share(num_frames))
    if rows % frames:
        raise ValueError(f"attend_frames: the batch must be a multiple of num_frames={frames}, got batch={rows}")
    video = (rows // frames, frames)
    query, key, value = (x.unflatten(0, video).transpose(1, 2) for x in (query, key, value))
    attend: Callable[..., Any] = leap_attention
    if ranks is not None:
        from vattn.distributed.leap_attention import leap_attention as over_ranks

        attend = partial(over_ranks, group=ranks, lengths=ranks.shares(num_frames))
    out = attend(
        query, key, value, 1 if leap is None else leap, group_size=1 if leap is None else group_size,
        fold_div=fold_div, dropout_p=dropout_p, scale=scale,
    )  # fmt: skip
    return merge_heads(cast(Tensor, out)).flatten(0, 1)


class LeapAttention(nn.Module, OverRanks):
    """Multi-head self-attention within leap pairs of frames: timm's ``Attention``, for video.

    It takes and gives ``(B * num_frames, N, C)``, as an image model's blocks do, and its parameters have the
    names that timm and the official LAPS code give them, so that their state dicts load unchanged.
    :meth:`from_attention` takes over the layers of an attention that exists already.

    Args:
        dim: channels C of input and output.
        num_heads: heads H.
        num_frames: frames of a video; the batch is a multiple of it.
        leap: distance of a frame to its partner (see :func:`leap_of_level`); None means attention within each
            frame.
        fold_div: if positive, the periodic shift with this divisor is applied to the output of the attention.
        head_dim: channels of a head, ``dim // num_heads`` if None.
        qkv_bias, proj_bias: whether the projections have a bias.
        scale: factor of the scores; None means ``head_dim ** -0.5``.
        attn_drop: probability of dropping an attention weight, in training.
        proj_drop: dropout after the output projection, in training.

    Shape:
        ``(B * num_frames, N, C)``, batch-major, then time, to the same.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting or an input that does not fit, or an attention mask.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on leap attention
        and on the periodic shift.

    Example:
        >>> attention = LeapAttention(dim=64, num_heads=4, num_frames=8, leap=2, fold_div=4)
        >>> attention(torch.randn(2 * 8, 50, 64)).shape
        torch.Size([16, 50, 64])
    """

    _projection: Callable[..., nn.Module] = nn.Linear

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_frames: int,
        leap: int | None,
        *,
        fold_div: int = 0,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for name, setting, least in (
            ("dim", dim, 1),
            ("num_heads", num_heads, 1),
            ("num_frames", num_frames, 1),
            ("leap", 1 if leap is None else leap, 1),
            ("fold_div", fold_div, 0),
            ("head_dim", 1 if head_dim is None else head_dim, 1),
        ):
            _checks.integer(op, name, setting, least=least)
        if head_dim is None and dim % num_heads:
            raise ValueError(f"{op}: dim must be a multiple of num_heads={num_heads}, got dim={dim}")
        inner = num_heads * (head_dim or dim // num_heads)
        self.num_heads = num_heads
        self.num_frames = num_frames
        self.leap = leap
        self.fold_div = fold_div
        self.scale = scale
        self.qkv = self._projection(dim, 3 * inner, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm: nn.Module = nn.Identity()
        self.proj = self._projection(inner, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    @classmethod
    def from_attention(
        cls, attention: nn.Module, num_frames: int, leap: int | None, *, fold_div: int = 0
    ) -> "LeapAttention":
        """Leap attention through the very layers of a timm ``Attention``, which are shared, not copied.

        Raises:
            TypeError: `attention` has no linear layers ``qkv`` and ``proj``.
            ValueError: `attention` has parameters or buffers that leap attention would not use, such as a
                relative position bias, or its forward takes more than a mask, such as rotary positions.

        Example:
            >>> attention = LeapAttention(dim=64, num_heads=4, num_frames=1, leap=None)    # or timm's Attention
            >>> video_attention = LeapAttention.from_attention(attention, num_frames=8, leap=4, fold_div=4)
            >>> video_attention.qkv is attention.qkv
            True
        """
        op = f"{cls.__name__}.from_attention"
        num_heads = cast(int, getattr(attention, "num_heads", None))
        if not all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("qkv", "proj")):
            raise TypeError(f"{op}: attention must have linear layers qkv and proj, got {type(attention).__name__}")
        _checks.integer(op, "num_heads", num_heads, least=1)
        layers = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
        require_only(op, attention, layers)
        takes = list(inspect.signature(attention.forward).parameters)[1:]
        if more := [name for name in takes if name not in ("attn_mask", "is_causal")]:
            raise ValueError(
                f"{op}: attention must take its input, attn_mask and is_causal only, "
                f"got {type(attention).__name__} with {', '.join(more)}"
            )
        with torch.device("meta"):  # every layer of it is replaced below
            new = cls(num_heads, num_heads, num_frames, leap, fold_div=fold_div)
        new.scale = getattr(attention, "scale", None)
        for name in layers:
            if hasattr(attention, name):
                setattr(new, name, getattr(attention, name))
        return new.train(attention.training)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError(
                f"{type(self).__name__}: attn_mask must be None and is_causal False, "
                f"got attn_mask={attn_mask}, is_causal={is_causal}"
            )
        return cast(Tensor, self.proj_drop(self.proj(self.norm(self._attend(self.qkv(x))))))

    def _attend(self, qkv: Tensor) -> Tensor:
        """``(B * num_frames, N, 3 * H * D)`` to ``(B * num_frames, N, H * D)``."""
        query, key, value = (split_heads(x, self.num_heads) for x in qkv.chunk(3, -1))
        return attend_frames(
            self.q_norm(query), self.k_norm(key), value, num_frames=self.num_frames, leap=self.leap,
            fold_div=self.fold_div, dropout_p=self.attn_drop.p if self.training else 0.0, scale=self.scale,
            ranks=self.ranks,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_frames={self.num_frames}, leap={self.leap}, fold_div={self.fold_div}, "
            f"scale={self.scale}"
        )


class LeapAttention2d(LeapAttention):
    """:class:`LeapAttention` on feature maps, between 1x1 convolutions, as Visformer has it.

    A map in ``torch.channels_last`` format is read and written where it lies; any other costs a copy.

    Shape:
        ``(B * num_frames, C, H, W)``, batch-major, then time, to the same, in channels_last format.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on the
        backbone of Chen et al., "Visformer: The Vision-friendly Transformer" (ICCV 2021).

    Example:
        >>> attention = LeapAttention2d(dim=64, num_heads=4, num_frames=8, leap=2, proj_bias=False)
        >>> maps = torch.randn(2 * 8, 64, 7, 7).contiguous(memory_format=torch.channels_last)
        >>> attention(maps).shape
        torch.Size([16, 64, 7, 7])
    """

    _projection = partial(nn.Conv2d, kernel_size=1)

    def _attend(self, qkv: Tensor) -> Tensor:
        """``(B * num_frames, 3 * H * D, height, width)`` to ``(B * num_frames, H * D, height, width)``."""
        out = super()._attend(qkv.permute(0, 2, 3, 1).flatten(1, 2))
        return out.unflatten(1, qkv.shape[-2:]).permute(0, 3, 1, 2)


def require_only(op: str, attention: nn.Module, layers: Collection[str]) -> None:
    """Raise if `attention` has state outside its children `layers`: leaving it out would change its meaning."""
    state = [*attention.state_dict(), *(name for name, _ in attention.named_buffers())]
    strange = sorted({name for name in state if name.split(".")[0] not in layers})
    if strange:
        raise ValueError(
            f"{op}: attention must have parameters and buffers in {', '.join(layers)} only, "
            f"got {type(attention).__name__} with {', '.join(strange)}"
        )
