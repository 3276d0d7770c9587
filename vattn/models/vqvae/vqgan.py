"""The 3D VQGAN, whose codes MeBT models.

    z = W_pre encoder(video),  codes = nearest(z),  video = decoder(W_post e_codes)
    loss = mean |video - reconstruction| + 0.25 mean (z - e_code)^2

Ge et al., "Long Video Generation with Time-Agnostic VQGAN and Time-Sensitive Transformer" (ECCV 2022). It is
convolutions only, with ``downsample`` = (4, 8, 8)::

    video  (3, 16, 128, 128) -> (n, ...)           convolution 3x3x3
           (2n, 8, 64, 64) -> (4n, 4, 32, 32) -> (8n, 4, 16, 16)      4x4x4, then a residual block, each
    codes  (4, 16, 16)
    video                                          the same way back, with two residual blocks each

A dimension that is down to its size already keeps it: the first levels shrink time, too, the last ones only space.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.models.layers import named, reduction
from vattn.models.settings import Config, official_settings
from vattn.models.vqvae.codebook import Codebook
from vattn.models.vqvae.tokenizer import (
    SamePadConv3d,
    SamePadConvTranspose3d,
    Tokenizer,
    level_strides,
    tokenizer_weights,
)

PADDING_MODES = ("constant", "reflect", "replicate", "circular")
"""Those of :func:`torch.nn.functional.pad`."""


class ResidualBlock(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups)
        self.conv1 = SamePadConv3d(channels, channels, 3)
        self.norm2 = _norm(channels, groups)
        self.conv2 = SamePadConv3d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Encoder(nn.Module):
    """``(B, image_channels, T, H, W)`` to ``(B, hidden * 2**levels, T', H', W')``."""

    def __init__(
        self, hidden: int, downsample: Sequence[int], image_channels: int, groups: int, padding_mode: str
    ) -> None:
        super().__init__()
        self.conv_first = SamePadConv3d(image_channels, hidden, 3, padding_mode=padding_mode)
        self.conv_blocks = nn.ModuleList()
        for stride in level_strides(downsample):
            down = SamePadConv3d(hidden, 2 * hidden, 4, stride, padding_mode=padding_mode)
            hidden = 2 * hidden
            self.conv_blocks.append(named(down=down, res=ResidualBlock(hidden, groups)))
        self.final_block = nn.Sequential(_norm(hidden, groups), nn.SiLU())

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv_first(video)
        for block in self.conv_blocks:
            x = block(x)
        return self.final_block(x)


class Decoder(nn.Module):
    """``(B, hidden * 2**levels, T', H', W')`` to ``(B, image_channels, T, H, W)``; its "final block" comes first."""

    def __init__(self, hidden: int, downsample: Sequence[int], image_channels: int, groups: int) -> None:
        super().__init__()
        strides = level_strides(downsample)
        channels = hidden * 2 ** len(strides)
        self.final_block = nn.Sequential(_norm(channels, groups), nn.SiLU())
        self.conv_blocks = nn.ModuleList()
        for level, stride in enumerate(strides):
            new_channels = hidden * 2 ** (len(strides) - level)
            self.conv_blocks.append(
                named(
                    up=SamePadConvTranspose3d(channels, new_channels, 4, stride),
                    res1=ResidualBlock(new_channels, groups),
                    res2=ResidualBlock(new_channels, groups),
                )
            )
            channels = new_channels
        self.conv_last = SamePadConv3d(channels, image_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.final_block(x)
        for block in self.conv_blocks:
            x = block(x)
        return self.conv_last(x)


class VQGAN(Tokenizer):
    """The 3D VQGAN tokenizer. Settings default to the official one of MeBT.

    Args:
        num_codes, code_dim: of the codebook.
        hidden: channels of the first convolution; each level doubles them.
        downsample: powers of 2 by which time, height and width shrink.
        image_channels: of the video.
        groups: of the group norms, which divide the channels of each level.
        padding_mode: of the encoder's convolutions outside its residual blocks; all others replicate.
        restart: see :class:`Codebook`.

    Shape:
        video ``(B, image_channels, T, H, W)``, pixels from -0.5 to 0.5, to the reconstructed video and its
        :class:`Quantized`; `encode` gives codes ``(B, T', H', W')`` and `decode` makes a video from them.

    Raises:
        TypeError, ValueError: a setting or a video that does not fit.

    Source:
        Ge et al., "Long Video Generation with Time-Agnostic VQGAN and Time-Sensitive Transformer", section 3.1.

    Example:
        >>> tokenizer = VQGAN(num_codes=64, code_dim=8, hidden=8, downsample=(2, 4, 4), groups=4)
        >>> video = torch.randn(1, 3, 4, 16, 16)
        >>> tokenizer.training_loss(video).backward()
        >>> codes = tokenizer.eval().encode(video)
        >>> codes.shape, tokenizer.decode(codes).shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 3, 4, 16, 16]))
    """

    def __init__(
        self,
        num_codes: int = 16384,
        code_dim: int = 256,
        hidden: int = 32,
        downsample: Sequence[int] = (4, 8, 8),
        *,
        image_channels: int = 3,
        groups: int = 32,
        padding_mode: str = "replicate",
        restart: float | None = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"num_codes": num_codes, "code_dim": code_dim, "hidden": hidden, "groups": groups}
        for name, size in (sizes | {"image_channels": image_channels}).items():
            _checks.integer("VQGAN", name, size, least=1)
        levels = len(level_strides(downsample))
        if levels == 0:
            raise ValueError(f"VQGAN: downsample must have a number above 1, got {downsample=}")
        if 2 * hidden % groups:
            raise ValueError(f"VQGAN: 2 * hidden must be a multiple of groups={groups}, got hidden={hidden}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"VQGAN: padding_mode must be one of {', '.join(PADDING_MODES)}, got padding_mode={padding_mode!r}"
            )
        inner = hidden * 2**levels
        self.downsample = (downsample[0], downsample[1], downsample[2])
        self.image_channels = image_channels
        self.encoder = Encoder(hidden, downsample, image_channels, groups, padding_mode)
        self.decoder = Decoder(hidden, downsample, image_channels, groups)
        self.pre_vq_conv = SamePadConv3d(inner, code_dim, 1, padding_mode=padding_mode)
        self.post_vq_conv = SamePadConv3d(code_dim, inner, 1)
        self.codebook = Codebook(num_codes, code_dim, restart=restart)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> Self:
        """The tokenizer of an official checkpoint, in evaluation mode; its other sizes are read from the weights.

        Args:
            state_dict: of ``VQGAN`` in ``mebt/vqgan.py``, or of a MeBT that has one, with or without the outer dict of
                a checkpoint. Discriminators and the perceptual model are left out. It is copied; dtype and device stay.
            config: its arguments, of which ``downsample``, ``padding_type``, ``restart_thres`` and
                ``no_random_restart`` are read; without them, the official defaults.
            overrides: settings of this class, which win over `config` and what the weights tell.

        Raises:
            TypeError: `config` is not a mapping, or a setting has another type.
            ValueError: there is no such setting, or the weights do not make this tokenizer.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op, first = "VQGAN.from_official", "encoder.conv_first.conv.weight"
        cls._require_overrides(op, overrides)
        settings: dict[str, Any] = {"downsample": (4, 8, 8)} | official_settings(
            op, config, cls, downsample="downsample", padding_mode="padding_type", restart="restart_thres"
        )
        if any(official_settings(op, config, {"off": bool}, off="no_random_restart").values()):
            settings["restart"] = None
        downsample = overrides.get("downsample", settings["downsample"])
        weights, sizes = tokenizer_weights(op, state_dict, first, "conv_blocks", downsample)
        return cls._from_weights(weights, sizes | settings, overrides)

    def reconstruction_loss(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """The mean absolute error. The official training adds perceptual and adversarial losses, which are not here."""
        return F.l1_loss(reconstruction, video, reduction=reduction(video))


def _norm(channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels, eps=1e-6)
