"""What tokenizers share: convolutions that keep the size of a video or divide it, and the way to codes and back.

z = W_pre encoder(video),  codes = nearest(z),  video = decoder(W_post e_codes)
loss = reconstruction_loss(decoder(W_post e_codes), video) + 0.25 mean (z - e_code)^2
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vattn.models.checkpoints import PretrainedModel, count_blocks, official_weights
from vattn.models.draws import Randomness
from vattn.models.pixels import CENTRED, require_pixels, warn_of_bytes
from vattn.models.vqvae.codebook import Codebook, Quantized

Size = tuple[int, int, int]


class SamePadConv3d(nn.Module):
    """A convolution that pads so that its output has ``1 / stride`` of the size of its input, in each dimension.

    Args:
        channels, new_channels: of input and output. kernel_size: in each dimension. stride: for each dimension.
        padding_mode: of :func:`torch.nn.functional.pad`. bias: whether there is one.

    Example:
        >>> SamePadConv3d(3, 8, 4, (1, 2, 2))(torch.randn(1, 3, 4, 6, 6)).shape
        torch.Size([1, 8, 4, 3, 3])
    """

    def __init__(
        self,
        channels: int,
        new_channels: int,
        kernel_size: int,
        stride: Size = (1, 1, 1),
        *,
        padding_mode: str = "replicate",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.padding, self.padding_mode = _same_padding(kernel_size, stride), padding_mode
        self.conv = nn.Conv3d(channels, new_channels, kernel_size, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding, mode=self.padding_mode))

    def extra_repr(self) -> str:
        return f"padding={self.padding}, padding_mode={self.padding_mode!r}"


class SamePadConvTranspose3d(nn.Module):
    """A transposed convolution whose output has `stride` times the size of its input, in each dimension.

    Args:
        channels, new_channels, kernel_size, stride, padding_mode, bias: as in :class:`SamePadConv3d`.

    Example:
        >>> SamePadConvTranspose3d(8, 3, 4, (1, 2, 2))(torch.randn(1, 8, 4, 3, 3)).shape
        torch.Size([1, 3, 4, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        new_channels: int,
        kernel_size: int,
        stride: Size = (1, 1, 1),
        *,
        padding_mode: str = "replicate",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.padding, self.padding_mode = _same_padding(kernel_size, stride), padding_mode
        self.convt = nn.ConvTranspose3d(channels, new_channels, kernel_size, stride, padding=kernel_size - 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convt(F.pad(x, self.padding, mode=self.padding_mode))

    def extra_repr(self) -> str:
        return f"padding={self.padding}, padding_mode={self.padding_mode!r}"


class Tokenizer(PretrainedModel):
    """A video to codes and back; a subclass makes the layers, under the names that official checkpoints have.

    A video is ``(B, C, T, H, W)``, channels in front of time, and its pixels are from -0.5 to 0.5, as official
    checkpoints have learned them. Bytes ``(B, T, H, W, C)`` become one by ``x.permute(0, 4, 1, 2, 3) / 255 - 0.5``.
    """

    encoder: nn.Module
    decoder: nn.Module
    pre_vq_conv: nn.Module
    post_vq_conv: nn.Module
    codebook: Codebook
    downsample: Size
    image_channels: int

    def encode(self, video: Tensor) -> Tensor:
        """A video to its codes, ``(B, T', H', W')`` int64."""
        return self.quantize(video).codes

    def quantize(self, video: Tensor, generator: Randomness = None) -> Quantized:
        """A video to its codes, these as vectors, and the loss of the codebook.

        Args:
            video: ``(B, C, T, H, W)``, floating-point, pixels from -0.5 to 0.5. The first one warns if it has others
                that must be those of 0 to 255.
            generator: see :class:`Codebook`.

        Raises:
            TypeError, ValueError: a video of another dtype or shape.
        """
        op = type(self).__name__
        require_pixels(op, "video", video, self.image_channels, CENTRED, self.downsample)
        warn_of_bytes(self, "video", video, CENTRED)
        return self.codebook(self.pre_vq_conv(self.encoder(video)), generator)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to a video."""
        dtype = next(self.post_vq_conv.parameters()).dtype
        return self.decoder(self.post_vq_conv(self.codebook.lookup(codes).to(dtype)))

    def forward(self, video: Tensor, generator: Randomness = None) -> tuple[Tensor, Quantized]:
        quantized = self.quantize(video, generator)
        return self.decoder(self.post_vq_conv(quantized.embeddings)), quantized

    def _usage(self) -> str:
        frames, height, width = (max(2, factor) * 2 for factor in self.downsample)
        return (
            f"video = torch.rand(1, {self.image_channels}, {frames}, {height}, {width}) - 0.5  # (B, C, T, H, W)\n"
            "codes = model.encode(video)\n"
            "reconstruction = model.decode(codes)"
        )

    def extra_repr(self) -> str:
        return f"downsample={self.downsample}, image_channels={self.image_channels}"

    def reconstruction_loss(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """The reconstruction error of a video."""
        raise NotImplementedError

    def training_loss(self, video: Tensor, generator: Randomness = None) -> Tensor:
        """The loss of one training step: that of the reconstruction, and the commitment of vectors to their codes.

        Args:
            video: ``(B, C, T, H, W)``, pixels from -0.5 to 0.5.
            generator: see :class:`Codebook`.
        """
        reconstruction, quantized = self(video, generator)
        return self.reconstruction_loss(reconstruction, video) + quantized.commitment_loss


def level_strides(downsample: Sequence[int]) -> list[Size]:
    """The strides of each level: 2 in a dimension until it has shrunk enough, then 1.

    Raises:
        ValueError: `downsample` is not three powers of 2.

    Example:
        >>> level_strides((2, 4, 4))
        [(2, 2, 2), (1, 2, 2)]
    """
    if len(downsample) != 3 or any(factor < 1 or factor & (factor - 1) for factor in downsample):
        raise ValueError(f"level_strides: downsample must be three powers of 2, got {downsample=}")
    levels = max(downsample).bit_length() - 1
    time, height, width = ([2 if factor >> level > 1 else 1 for level in range(levels)] for factor in downsample)
    return list(zip(time, height, width, strict=True))


def tokenizer_weights(
    op: str, state_dict: Mapping[str, Any], first: str, levels: str, downsample: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a tokenizer in a checkpoint, with what its codebook needs besides, and the sizes they tell.

    Args:
        op: for messages.
        state_dict: of the official tokenizer, or of a model that has one.
        first: the weight of the first convolution, whose name no other part of such a model has.
        levels: the encoder's list with one element for each level.
        downsample: what the levels must amount to.

    Raises:
        ValueError: the weights are not those of a tokenizer, or `downsample` has another number of levels.
    """
    book = "codebook.embeddings"
    weights = official_weights(op, state_dict, first, book)
    parts = ("encoder", "decoder", "pre_vq_conv", "post_vq_conv", "codebook")
    weights = {name: weight for name, weight in weights.items() if name.split(".")[0] in parts}
    found = count_blocks({name.removeprefix("encoder."): x for name, x in weights.items()}, levels)
    if found != len(level_strides(downsample)):
        raise ValueError(f"{op}: downsample must have {found} levels, got {downsample=}")
    # A codebook saved without the state of its training can be used, and trained from where it is.
    weights.setdefault("codebook.N", weights[book].new_ones(len(weights[book])))
    weights.setdefault("codebook.z_avg", weights[book])
    weights.setdefault("codebook.has_begun", weights["codebook.N"].any())
    (hidden, image_channels), (num_codes, code_dim) = weights[first].shape[:2], weights[book].shape
    sizes = {"num_codes": num_codes, "code_dim": code_dim, "hidden": hidden, "image_channels": image_channels}
    return weights, sizes


def _same_padding(kernel_size: int, stride: Sequence[int]) -> list[int]:
    """What :func:`torch.nn.functional.pad` wants, last dimension first; the larger half comes before."""
    return [half for step in reversed(stride) for half in ((kernel_size - step + 1) // 2, (kernel_size - step) // 2)]
