"""The VQ-VAE whose codes VideoGPT models.

    z = W_pre encoder(video),  codes = nearest(z),  video = decoder(W_post e_codes)
    loss = mean (video - reconstruction)^2 / variance + 0.25 mean (z - e_code)^2

Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021). Strided convolutions shrink the video;
then come residual blocks, in which each position attends along its three axes. With ``downsample`` = (4, 4, 4)::

    video  (3, 16, 128, 128) -> (n, 8, 64, 64) -> (n, 4, 32, 32)      4x4x4, stride 2
           residual blocks: 3x3x3, 1x1x1, attention along width + height + time
    codes  (4, 32, 32)
    video                                          the same way back

A dimension that is down to its size already keeps it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.models.batch_norm import BatchNorm3d
from vattn.models.checkpoints import count_blocks
from vattn.models.layers import reduction
from vattn.models.settings import Config, official_settings
from vattn.models.vqvae.codebook import Codebook
from vattn.models.vqvae.tokenizer import (
    SamePadConv3d,
    SamePadConvTranspose3d,
    Tokenizer,
    level_strides,
    tokenizer_weights,
)
from vattn.nn.axial import AxialAttention

PIXEL_VARIANCE = 0.06
"""The pixel variance of the official data, which normalises the loss: pixels are from -0.5 to 0.5."""


class AxialBlock(nn.Module):
    """The sum of attention along width, height and time, ``(B, C, T, H, W)`` to the same.

    Args:
        channels, num_heads: of each attention, see :class:`vattn.nn.AxialAttention`.

    Example:
        >>> AxialBlock(32, 2)(torch.randn(2, 32, 2, 4, 4)).shape
        torch.Size([2, 32, 2, 4, 4])
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.attn_w = AxialAttention(channels, num_heads, axis=2)
        self.attn_h = AxialAttention(channels, num_heads, axis=1)
        self.attn_t = AxialAttention(channels, num_heads, axis=0)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        return (self.attn_w(x) + self.attn_h(x) + self.attn_t(x)).movedim(-1, 1)


class AttentionResidualBlock(nn.Module):
    """``x + axial(...)`` behind two convolutions, of which the first halves the channels, each after norm and ReLU.

    Args:
        channels: an even number. num_heads: of the attention.
    """

    def __init__(self, channels: int, num_heads: int = 2) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *_norm_relu(channels),
            SamePadConv3d(channels, channels // 2, 3, padding_mode="constant", bias=False),
            *_norm_relu(channels // 2),
            SamePadConv3d(channels // 2, channels, 1, bias=False),
            *_norm_relu(channels),
            AxialBlock(channels, num_heads),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Encoder(nn.Module):
    """``(B, image_channels, T, H, W)`` to ``(B, hidden, T', H', W')``."""

    def __init__(
        self, hidden: int, num_blocks: int, downsample: Sequence[int], image_channels: int, num_heads: int
    ) -> None:
        super().__init__()
        strides = level_strides(downsample)
        channels = [image_channels, *[hidden] * len(strides)]
        self.convs = nn.ModuleList(
            SamePadConv3d(before, hidden, 4, stride, padding_mode="constant")
            for before, stride in zip(channels, strides, strict=False)
        )
        self.conv_last = SamePadConv3d(hidden, hidden, 3, padding_mode="constant")
        self.res_stack = _residual_stack(hidden, num_blocks, num_heads)

    def forward(self, video: Tensor) -> Tensor:
        x = video
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.res_stack(self.conv_last(x))


class Decoder(nn.Module):
    """``(B, hidden, T', H', W')`` to ``(B, image_channels, T, H, W)``."""

    def __init__(
        self, hidden: int, num_blocks: int, downsample: Sequence[int], image_channels: int, num_heads: int
    ) -> None:
        super().__init__()
        self.res_stack = _residual_stack(hidden, num_blocks, num_heads)
        strides = level_strides(downsample)
        channels = [*[hidden] * (len(strides) - 1), image_channels]
        self.convts = nn.ModuleList(
            SamePadConvTranspose3d(hidden, after, 4, stride, padding_mode="constant")
            for after, stride in zip(channels, strides, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_stack(x)
        for i, conv in enumerate(self.convts):
            x = conv(F.relu(x) if i else x)
        return x


class VQVAE(Tokenizer):
    """VideoGPT's VQ-VAE. Settings default to the official ones.

    Args:
        num_codes, code_dim: of the codebook.
        hidden: channels of all layers, an even multiple of `num_heads`.
        num_blocks: residual blocks of the encoder, and of the decoder.
        downsample: powers of 2 by which time, height and width shrink; one of them at least is above 1.
        num_heads: of the axial attention.
        image_channels: of the video.
        restart: see :class:`Codebook`.

    Shape:
        video ``(B, image_channels, T, H, W)``, pixels from -0.5 to 0.5, to the reconstructed video and its
        :class:`Quantized`; `encode` gives codes ``(B, T', H', W')`` and `decode` makes a video from them.

    Raises:
        TypeError, ValueError: a setting or a video that does not fit.

    Source:
        Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).

    Example:
        >>> tokenizer = VQVAE(num_codes=64, code_dim=8, hidden=16, num_blocks=1, downsample=(2, 4, 4))
        >>> video = torch.rand(1, 3, 4, 16, 16) - 0.5
        >>> tokenizer.training_loss(video).backward()
        >>> codes = tokenizer.eval().encode(video)
        >>> codes.shape, tokenizer.decode(codes).shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 3, 4, 16, 16]))
    """

    def __init__(
        self,
        num_codes: int = 2048,
        code_dim: int = 256,
        hidden: int = 240,
        num_blocks: int = 4,
        downsample: Sequence[int] = (4, 4, 4),
        *,
        num_heads: int = 2,
        image_channels: int = 3,
        restart: float | None = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"num_codes": num_codes, "code_dim": code_dim, "hidden": hidden, "image_channels": image_channels}
        for name, size in sizes.items():
            _checks.integer("VQVAE", name, size, least=1)
        _checks.integer("VQVAE", "num_blocks", num_blocks, least=0)
        if not level_strides(downsample):
            raise ValueError(f"VQVAE: downsample must have a number above 1, got {downsample=}")
        if hidden % 2:
            raise ValueError(f"VQVAE: hidden must be even, got hidden={hidden}")
        self.downsample = (downsample[0], downsample[1], downsample[2])
        self.image_channels = image_channels
        self.encoder = Encoder(hidden, num_blocks, downsample, image_channels, num_heads)
        self.decoder = Decoder(hidden, num_blocks, downsample, image_channels, num_heads)
        self.pre_vq_conv = SamePadConv3d(hidden, code_dim, 1)
        self.post_vq_conv = SamePadConv3d(code_dim, hidden, 1)
        self.codebook = Codebook(num_codes, code_dim, restart=restart)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> Self:
        """The tokenizer of an official checkpoint, in evaluation mode; its other sizes are read from the weights.

        Args:
            state_dict: of ``VQVAE`` in ``videogpt/vqvae.py``, or of a VideoGPT that has one, with or without the outer
                dict of a checkpoint. It is copied; dtype and device stay.
            config: its arguments, of which ``downsample`` is read; (4, 4, 4) without it.
            overrides: settings of this class, which win over `config` and what the weights tell.

        Raises:
            TypeError: `config` is not a mapping, or a setting has another type.
            ValueError: there is no such setting, or the weights do not make this tokenizer.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op, first = "VQVAE.from_official", "encoder.convs.0.conv.weight"
        cls._require_overrides(op, overrides)
        settings: dict[str, Any] = {"downsample": (4, 4, 4)} | official_settings(
            op, config, cls, downsample="downsample"
        )
        downsample = overrides.get("downsample", settings["downsample"])
        weights, sizes = tokenizer_weights(op, state_dict, first, "convs", downsample)
        for name in [name for name in weights if name.endswith("running_mean")]:
            weights.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
        stack = {name.removeprefix("encoder."): x for name, x in weights.items() if ".block." in name}
        sizes["num_blocks"] = count_blocks(stack, "res_stack")
        return cls._from_weights(weights, sizes | settings, overrides)

    def reconstruction_loss(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """The squared error over ``PIXEL_VARIANCE``, for pixels from -0.5 to 0.5."""
        return F.mse_loss(reconstruction, video, reduction=reduction(video)) / PIXEL_VARIANCE


def _residual_stack(channels: int, num_blocks: int, num_heads: int) -> nn.Sequential:
    blocks = (AttentionResidualBlock(channels, num_heads) for _ in range(num_blocks))
    return nn.Sequential(*blocks, *_norm_relu(channels))


def _norm_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    return BatchNorm3d(channels), nn.ReLU()
