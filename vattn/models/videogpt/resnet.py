"""The 3-D ResNet through which VideoGPT sees the frames that a video is to begin with.

    stem 3x3x3, then four groups of residual blocks; all but the first may shrink time, height and width by 2

Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021); He et al., "Deep Residual Learning for
Image Recognition" (CVPR 2016). Norms are over channels, at each position.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.models.checkpoints import PretrainedModel, count_blocks, require_names
from vattn.models.pixels import CENTRED, require_pixels, warn_of_bytes
from vattn.models.vqvae.tokenizer import Size, level_strides

OFFICIAL_BLOCKS = (3, 4, 6, 3)
"""Those of a ResNet-34."""


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of ``(B, C, T, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class NormReLU(nn.Module):
    """A :class:`ChannelNorm`, and a ReLU unless `relu` is off."""

    def __init__(self, channels: int, *, relu: bool = True) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.relu(x) if self.relu else x

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class ResidualBlock(nn.Module):
    """``relu(shortcut(x) + bnr2(conv2(bnr1(conv1(x)))))``; the shortcut is a 1x1x1 convolution where sizes change."""

    def __init__(self, channels: int, new_channels: int, stride: Size, *, use_projection: bool) -> None:
        super().__init__()
        self.use_projection = use_projection
        if use_projection:
            self.proj_conv = nn.Conv3d(channels, new_channels, 1, stride, bias=False)
            self.proj_bnr = NormReLU(new_channels, relu=False)
        self.conv1 = nn.Conv3d(channels, new_channels, 3, stride, padding=1, bias=False)
        self.bnr1 = NormReLU(new_channels)
        self.conv2 = nn.Conv3d(new_channels, new_channels, 3, padding=1, bias=False)
        self.bnr2 = NormReLU(new_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.proj_bnr(self.proj_conv(x)) if self.use_projection else x
        return F.relu(shortcut + self.bnr2(self.conv2(self.bnr1(self.conv1(x)))))

    def extra_repr(self) -> str:
        return f"use_projection={self.use_projection}"


class BlockGroup(nn.Module):
    """Residual blocks of one size: the first one comes to it."""

    def __init__(self, channels: int, new_channels: int, num_blocks: int, stride: Size) -> None:
        super().__init__()
        self.start_block = ResidualBlock(channels, new_channels, stride, use_projection=True)
        self.blocks = nn.Sequential(
            *(ResidualBlock(new_channels, new_channels, (1, 1, 1), use_projection=False) for _ in range(1, num_blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.start_block(x))


class ResNet3d(PretrainedModel):
    """A video to a grid of features. Settings default to the official ones; parameters have the official names.

    Args:
        dim: channels of the features.
        num_blocks: of each of the four groups.
        downsample: powers of 2 up to 8 by which time, height and width shrink.
        width: channels of the first group; the second has twice, the third four times as many.

    Shape:
        ``(B, 3, T, H, W)``, pixels from -0.5 to 0.5, to ``(B, T', H', W', dim)``.

    Raises:
        TypeError, ValueError: `downsample` is not three powers of 2 up to 8, or a video does not fit.

    Source:
        Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).

    Example:
        >>> resnet = ResNet3d(dim=24, num_blocks=(1, 1, 1, 1), width=8)
        >>> resnet(torch.randn(1, 3, 2, 16, 16)).shape
        torch.Size([1, 2, 4, 4, 24])
    """

    def __init__(
        self,
        dim: int = 240,
        num_blocks: Sequence[int] = OFFICIAL_BLOCKS,
        downsample: Sequence[int] = (1, 4, 4),
        *,
        width: int = 64,
    ) -> None:
        super().__init__()
        strides = level_strides(downsample)
        if len(strides) > 3:
            raise ValueError(f"ResNet3d: downsample must be at most 8, got {downsample=}")
        if len(num_blocks) != 4:
            raise ValueError(f"ResNet3d: num_blocks must be four numbers, got {num_blocks=}")
        for name, size in (("dim", dim), ("width", width), *(("num_blocks", number) for number in num_blocks)):
            _checks.integer("ResNet3d", name, size, least=1)
        strides = [(1, 1, 1), *strides, *[(1, 1, 1)] * (3 - len(strides))]
        self.dim, self.downsample = dim, (downsample[0], downsample[1], downsample[2])
        self.stem = nn.Sequential(nn.Conv3d(3, width, 3, padding=(0, 1, 1), bias=False), NormReLU(width))
        channels = (width, width, 2 * width, 4 * width, dim)
        self.group1, self.group2, self.group3, self.group4 = (
            BlockGroup(channels[i], channels[i + 1], num_blocks[i], strides[i]) for i in range(4)
        )

    def forward(self, video: Tensor) -> Tensor:
        require_pixels("ResNet3d", "video", video, 3, CENTRED)
        warn_of_bytes(self, "video", video, CENTRED)
        # Time is padded here: oneDNN's convolution in bfloat16 gives garbage for one frame that it pads itself.
        x = self.stem(F.pad(video, (0, 0, 0, 0, 1, 1)))
        for group in (self.group1, self.group2, self.group3, self.group4):
            x = group(x)
        return x.movedim(1, -1)

    def _usage(self) -> str:
        frames, height, width = (max(2, factor) * 2 for factor in self.downsample)
        return (
            f"video = torch.rand(1, 3, {frames}, {height}, {width}) - 0.5  # (B, 3, T, H, W)\n"
            f"features = model(video)  # (1, T', H', W', {self.dim})"
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, downsample={self.downsample}"


def resnet_settings(op: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of the :class:`ResNet3d` that has such weights, and shrinks videos as the official one."""
    require_names(op, weights, "stem.0.weight", "group4.start_block.conv1.weight")
    groups = [{name.removeprefix(f"group{i}."): x for name, x in weights.items()} for i in range(1, 5)]
    return {
        "dim": len(groups[3]["start_block.conv1.weight"]),
        "num_blocks": [1 + count_blocks(group, "blocks") for group in groups],
        "downsample": [1, 4, 4],
        "width": len(weights["stem.0.weight"]),
    }
