"""What the models of LAPS share: outputs per frame, and the pre-norm block."""

from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vattn.models.settings import Config, leaves, official_settings
from vattn.nn import leap_of_level

Levels = Sequence[int | None]


class FrameModel(nn.Module):
    """A model that has an output for every frame of a video, and for the video their mean."""

    num_frames: int

    def forward_frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the output of every frame, ``(B, T, ...)``."""
        raise NotImplementedError

    def forward(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the mean over frames, such as logits ``(B, num_classes)``."""
        return self.forward_frames(video).mean(1)

    def training_loss(self, video: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The cross-entropy of the video's logits.

        Args:
            video: ``(B, T, 3, H, W)``.
            labels: ``(B,)`` int64, or probabilities ``(B, num_classes)``.
            label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        """
        return F.cross_entropy(self(video), labels, label_smoothing=label_smoothing)

    def extra_repr(self) -> str:
        return f"num_frames={self.num_frames}"

    def frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to ``(B * T, 3, H, W)``."""
        if video.dim() != 5 or video.shape[1] != self.num_frames:
            raise ValueError(
                f"{type(self).__name__}: video must have shape (B, {self.num_frames}, 3, H, W), "
                f"got video.shape={tuple(video.shape)}"
            )
        return video.flatten(0, 1)

    def per_frame(self, x: Tensor) -> Tensor:
        """``(B * T, ...)`` to ``(B, T, ...)``."""
        return x.unflatten(0, (x.shape[0] // self.num_frames, self.num_frames))


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


def layer_leaps(op: str, levels: Levels, depth: int, num_frames: int) -> Iterator[int | None]:
    """The leap of each of `depth` layers, whose levels repeat, one after the other."""
    if not levels:
        raise ValueError(f"{op}: levels must have at least one element, got levels={levels!r}")
    return (leap_of_level(levels[i % len(levels)], num_frames) for i in range(depth))


def official_fold_div(op: str, config: Config) -> dict[str, int]:
    """The divisor of an official configuration, in whose code null is no shift; nothing if it says nothing."""
    is_null = dict(leaves(op, config)).get("FOLD_DIV", 0) is None
    return {"fold_div": 0} if is_null else official_settings(op, config, {"fold_div": int}, fold_div="FOLD_DIV")
