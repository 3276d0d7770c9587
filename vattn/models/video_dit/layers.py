"""The blocks of the video diffusion transformer, and the embeddings of timesteps and places.

    x = x + g1 leap_attention(scale1 LN(x) + shift1)      within pairs of frames
    x = x + latent_attention(LN(x), text)                 if the model reads texts
    x = x + g2 axial_attention(scale2 LN(x) + shift2)     along time
    x = x + g3 MLP(scale3 LN(x) + shift3)

Gates, scales and shifts are those of each frame: a linear layer makes them of its timestep and of the class. Its
weights begin as 0, and so do the gates.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023).
"""

import math

import torch
from torch import Tensor, nn

from vattn.nn import AxialAttention, LatentAttention, LeapAttention

WAVES = 256
"""Numbers that a timestep becomes, before the first layer."""


class Block(nn.Module):
    """A block, of tokens ``(B, T, N, C)`` and, for each frame, what conditions it ``(B, T, C)``.

    Args:
        dim, num_heads, hidden: channels, heads, and channels inside of the MLP.
        num_frames: T.
        leap: of the pairs of frames; None is attention within each frame.
        reads_text: whether it has the attention to texts.
    """

    def __init__(
        self, dim: int, num_heads: int, hidden: int, num_frames: int, leap: int | None, *, reads_text: bool
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(dim, 9 * dim)
        self.leap = LeapAttention(dim, num_heads, num_frames, leap, qkv_bias=True)
        self.text_norm = nn.LayerNorm(dim) if reads_text else None
        self.text = LatentAttention(dim, num_heads) if reads_text else None
        self.time = AxialAttention(dim, num_heads, axis=0)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor | None, text_bias: Tensor | None) -> Tensor:
        parts = self.modulation(condition)[:, :, None].chunk(9, -1)  # each (B, T, 1, C)
        batch, frames = x.shape[:2]
        leaped = self.leap(modulated(x, *parts[0:2]).flatten(0, 1)).unflatten(0, (batch, frames))
        x = x + parts[2] * leaped
        if self.text is not None and self.text_norm is not None and text is not None:
            (read,) = self.text([self.text_norm(x).flatten(1, 2)], [text], text_bias)
            x = x + read.view_as(x)
        x = x + parts[5] * self.time(modulated(x, *parts[3:5]))
        return x + parts[8] * self.mlp(modulated(x, *parts[6:8]))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x``, normalised over its channels, times ``1 + scale``, plus `shift`."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def waves(x: Tensor, channels: int, longest: float) -> Tensor:
    """Cosines and sines of numbers ``(...)``, whose wavelengths are 2 pi to 2 pi `longest`: ``(..., channels)``."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=x.device) / max(1, half)
    angles = x.float()[..., None] * (-math.log(longest) * exponents).exp()
    features = torch.cat([angles.cos(), angles.sin()], -1)
    return nn.functional.pad(features, (0, channels - 2 * half))


def places(rows: int, columns: int, channels: int) -> Tensor:
    """Waves of the row and of the column of each token, in raster order: ``(rows * columns, channels)`` float32."""
    row, column = (torch.arange(size, device="cpu") for size in (rows, columns))
    half = channels // 2
    along = waves(row, half, 100.0)[:, None].expand(-1, columns, -1)
    across = waves(column, channels - half, 100.0).expand(rows, -1, -1)
    return torch.cat([along, across], -1).flatten(0, 1)
