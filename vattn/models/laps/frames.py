"""What the models of LAPS share: outputs per frame, and the pre-norm block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from vattn._over_ranks import OverRanks
from vattn.models.layers import reduction
from vattn.models.pixels import NORMALISED, require_frames, warn_of_bytes
from vattn.models.settings import Config, leaves, official_settings
from vattn.nn.leap import leap_for

if TYPE_CHECKING:
    from vattn.distributed._ranks import Ranks

Levels = Sequence[int | None]


class FrameModel(nn.Module, OverRanks):
    """A model that has an output for every frame of a video, and for the video their mean.

    A video is ``(B, T, 3, H, W)``, frames in front of channels, and its pixels are normalised as those were on which
    the weights have learned: from 0 to 1, minus a mean, over a deviation. The first video warns of pixels of 0 to 255.

    Over ranks (see :func:`vattn.distributed.parallelize`) each is given its share of the frames, and has the outputs of
    these; their mean is that of all frames, the same on every rank.
    """

    num_frames: int

    def forward_frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the output of every frame, ``(B, T, ...)``."""
        raise NotImplementedError

    def forward(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the mean over frames, such as logits ``(B, num_classes)``."""
        outputs = self.forward_frames(video)
        return outputs.mean(1) if self.ranks is None else self._sum(outputs.sum(1)) / self.num_frames

    def training_loss(self, video: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The cross-entropy of the video's logits, 0 if B is 0; over ranks this rank's part of it: they sum up to it.

        Args:
            video: ``(B, T, 3, H, W)``, over ranks this rank's frames.
            labels: ``(B,)`` int64, or probabilities ``(B, num_classes)``.
            label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        """
        loss = F.cross_entropy(self(video), labels, label_smoothing=label_smoothing, reduction=reduction(labels))
        return loss if self.ranks is None else loss / self.ranks.size

    def _refuse(self, ranks: "Ranks") -> None:
        if self.num_frames < ranks.size:
            op = type(self).__name__
            raise ValueError(
                f"{op}: num_frames must be at least {ranks.size}, one for each rank, got {self.num_frames}"
            )

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}"

    def frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to ``(B * T, 3, H, W)``."""
        op = type(self).__name__

        def check() -> Mapping[str, Any]:
            require_frames(op, "video", video, (self._own_frames, 3, "H", "W"))
            return {"the shape of a video of one frame": (video.shape[0], *video.shape[2:]), "video.dtype": video.dtype}

        self._agree(op, check)
        warn_of_bytes(self, "video", video, NORMALISED)
        return video.flatten(0, 1)

    def per_frame(self, x: Tensor) -> Tensor:
        """``(B * T, ...)`` to ``(B, T, ...)``."""
        return x.unflatten(0, (x.shape[0] // self._own_frames, self._own_frames))

    @property
    def _own_frames(self) -> int:
        return self.num_frames if self.ranks is None else len(self.ranks.share(self.num_frames))


class Block(nn.Module):
    """``x + attn(norm1(x))``, unless there is no attention, then ``x + mlp(norm2(x))``."""

    def __init__(self, norm: Callable[[], nn.Module], attn: nn.Module | None, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = None if attn is None else norm()
        self.attn = attn
        self.norm2 = norm()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        if self.norm1 is not None and self.attn is not None:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def hidden_size(dim: int, ratio: float) -> int:
    """The channels inside an MLP, rounded down, but not below a whole number for the error of a quotient."""
    return int(dim * ratio + 1e-6)


def layer_leaps(op: str, levels: Levels, depth: int | None, num_frames: int) -> Iterator[int | None]:
    """The leap of each of `depth` layers, whose levels repeat, one after the other; None is a layer for each level."""
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise TypeError(f"{op}: levels must be a list or tuple of ints or None, got levels={levels!r}")
    if not levels:
        raise ValueError(f"{op}: levels must have at least one element, got levels={levels!r}")
    return (leap_for(op, levels[i % len(levels)], num_frames) for i in range(len(levels) if depth is None else depth))


def official_fold_div(op: str, config: Config) -> dict[str, int]:
    """The divisor of an official configuration, in whose code null is no shift; nothing if it says nothing."""
    is_null = dict(leaves(op, config)).get("FOLD_DIV", 0) is None
    return {"fold_div": 0} if is_null else official_settings(op, config, {"fold_div": int}, fold_div="FOLD_DIV")
