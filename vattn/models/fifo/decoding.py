"""Latents to pixels, one latent at a time, where a latent is several frames.

A video autoencoder that is causal in time decodes a latent from itself and from those before it:

    latents        0      1          2          3
                   |      |          |          |
    frames         0   1 2 3 4    5 6 7 8    9 10 11 12

What it needs of those before is little: the last frames that went into each convolution. Carried from latent to latent,
they make a stream of any length cost the memory of one latent, and give the pixels of the whole clip.

A stream has caches of its own, and modules of its own where the autoencoder has no place for them. The autoencoder is
never changed: it can decode and encode while streams over it are under way.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn.models.fifo.diffusers_models import known_class, unwrapped

OP = "decode_stream"

CACHED = ("AutoencoderKLQwenImage", "AutoencoderKLWan")
"""Autoencoders whose decoder is given a list of caches."""
CAUSAL = ("AutoencoderKLLTX2Video", "AutoencoderKLLTXVideo")
"""Autoencoders whose configuration says whether the decoder is causal; it has no caches."""
IMAGES = ("AutoencoderDC", "AutoencoderKL", "AutoencoderTiny")
"""Autoencoders of images."""

CONVOLUTIONS = ("LTX2VideoCausalConv3d", "LTXVideoCausalConv3d")
UPSAMPLERS = ("LTX2VideoUpsampler3d", "LTXVideoUpsampler3d")

CHUNKS = "Decode it in chunks of latents that overlap instead, with vae.decode, and drop the frames decoded twice"
"""What to do with other autoencoders."""


def decode_stream(
    vae: nn.Module, latents: Iterable[Tensor], *, denormalize: bool = False, **arguments: Any
) -> Iterator[Tensor]:
    """Frames of a video, one by one, from its latents, one by one, in the memory of a single latent.

    Args:
        vae: an autoencoder of diffusers. It is not changed: any number of streams may be over it at once.

            - AutoencoderKLWan (also of SkyReels, AnyFlow and Cosmos Predict2) and AutoencoderKLQwenImage: the caches of
              their convolutions are carried from latent to latent;
            - AutoencoderKLLTXVideo and AutoencoderKLLTX2Video with a causal decoder (``decoder_causal=True`` in the
              configuration, or ``causal=True`` here for LTX 2): likewise;
            - AutoencoderKL, AutoencoderTiny and AutoencoderDC, which decode images: each latent is decoded alone.

            Tiles and slices (``vae.enable_tiling()``) are respected.
        latents: gives tensors ``(B, C, H, W)`` of one shape, float32, bfloat16, float16 or float64, such as
            ``fifo.stream(...)``, or ``clip.unbind(2)`` of a clip ``(B, C, T, H, W)``. They are cast to the dtype of
            `vae`.
        denormalize: latents are those of a denoiser, which are normalized, rather than what ``vae.decode`` takes: they
            are multiplied by ``latents_std`` and divided by ``scaling_factor``, and ``latents_mean`` or
            ``shift_factor`` is added, whichever `vae` has.
        arguments: of ``vae.decode``, such as ``temb`` for an LTX autoencoder with ``timestep_conditioning``.

    Yields:
        Frames ``(B, 3, height, width)`` with the values of ``vae.decode(clip).sample``, mostly in [-1, 1]; stacked
        along axis 2 they are that clip to rounding error. The first latent of a Wan autoencoder is one frame, and each
        other one four (LTX: one and eight). They have no gradient.

    Raises:
        TypeError: `vae` is of any other class, which is not known to be causal, or `latents` is one tensor.
        ValueError: an LTX autoencoder that is not causal, or that adds noise while it decodes.
        TypeError, ValueError: a latent of a wrong shape or dtype, when its turn comes.

    Source:
        Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models" (arXiv:2503.20314), on the feature cache
        of its autoencoder.

    Example:
        >>> from diffusers import AutoencoderKLWan
        >>> vae = AutoencoderKLWan(base_dim=4, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        ...                        latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0])
        >>> frames = decode_stream(vae, (torch.randn(1, 2, 4, 4) for _ in range(3)))
        >>> [tuple(frame.shape) for frame in frames]
        [(1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)]
    """
    if isinstance(latents, Tensor) or not isinstance(latents, Iterable):
        got = f"tensor of shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(
            f"{OP}: latents must be an iterable of tensors (B, C, H, W), such as fifo.stream(), or clip.unbind(2) of "
            f"a clip (B, C, T, H, W), got latents={got}"
        )
    module = unwrapped(vae)
    name = known_class(module, (*CACHED, *CAUSAL, *IMAGES))
    if name is None:
        raise TypeError(
            f"{OP}: vae must be one that decodes causally in time, {', '.join((*CACHED, *CAUSAL))}, or an autoencoder "
            f"of images, {', '.join(IMAGES)}, got vae={type(module).__name__}. {CHUNKS}"
        )
    if name in CAUSAL:
        _check_causal(module, name, arguments)
    if name not in IMAGES:
        module = _with_carried_caches(module, name)
    return _frames(module, name not in IMAGES, latents, denormalize, arguments)


def _check_causal(vae: Any, name: str, arguments: dict[str, Any]) -> None:
    if not (vae.config.decoder_causal or arguments.get("causal")):
        raise ValueError(
            f"{OP}: the decoder of {name} must not read latents that are still to come, "
            f"got decoder_causal=False. {CHUNKS}"
        )
    if any(vae.config.decoder_inject_noise):
        raise ValueError(
            f"{OP}: {name} must not add noise while it decodes, which would be another for each latent, "
            f"got decoder_inject_noise={vae.config.decoder_inject_noise}. {CHUNKS}"
        )


def _frames(
    vae: Any, video: bool, latents: Iterable[Tensor], denormalize: bool, arguments: dict[str, Any]
) -> Iterator[Tensor]:
    shape = None
    for latent in latents:
        _checks.tensor(OP, "latents", latent, meshes=False)
        _checks.rank(OP, "latents", latent, "(B, C, H, W)")
        shape = shape or latent.shape
        if latent.shape != shape:
            raise ValueError(
                f"{OP}: all latents must have the shape of the first, {tuple(shape)}, "
                f"got latents.shape={tuple(latent.shape)}"
            )
        if denormalize:
            latent = _denormalized(vae, latent)
        if video:
            vae.decoder.calls = 0
            latent = latent[:, :, None]
        with torch.no_grad():  # no wider: the caller's own mode holds while a frame is out
            # The method of the class: one that is set on the autoencoder, compiled or hooked, calls only that one.
            pixels = type(vae).decode(vae, latent.to(vae.dtype), **arguments).sample
        yield from pixels.unbind(2) if video else (pixels,)


def _denormalized(vae: Any, latent: Tensor) -> Tensor:
    """What a pipeline does to its latents before it decodes them."""

    buffers = dict(vae.named_buffers(recurse=False))

    def setting(name: str) -> Any:
        value = buffers.get(name, vae.config.get(name))
        if isinstance(value, Tensor | list | tuple):  # one for each channel
            return torch.as_tensor(value).to(latent)[:, None, None]
        return value

    mean, std = setting("latents_mean"), setting("latents_std")
    latent = latent / (setting("scaling_factor") or 1)
    if mean is not None and std is not None:
        return latent * std + mean
    return latent + (setting("shift_factor") or 0)


def _with_carried_caches(vae: Any, name: str) -> Any:
    """An autoencoder over the same weights as `vae`, with a decoder that goes on where its last latent ended."""
    twin = copy.copy(vae)
    vars(twin)["_modules"] = dict(vae._modules)
    twin.decoder = CachedDecoder(vae.decoder) if name in CACHED else CausalDecoder(unwrapped(vae.decoder))
    return twin


class CachedDecoder(nn.Module):
    """A decoder that takes its caches as a list, and here always finds those of the latent before.

    A latent may be several calls, one for each tile or slice, always in the same order: each has its own caches.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.calls = 0
        self.caches: list[list[Tensor | None]] = []

    def forward(self, x: Tensor, feat_cache: list[Tensor | None], feat_idx: list[int], **first_chunk: bool) -> Tensor:
        first = self.calls == len(self.caches)
        if first:
            self.caches.append(list(feat_cache))  # as long as it must be, and empty
        if first_chunk:
            first_chunk = {"first_chunk": first}
        self.calls += 1
        return self.decoder(x, feat_cache=self.caches[self.calls - 1], feat_idx=[0], **first_chunk)


class CausalDecoder(nn.Module):
    """A decoder of causal convolutions, each of which finds the frames that went into it for the latent before."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.carried = Carried()
        self.decoder = _carrying(decoder, self.carried)
        self.calls = 0
        self.caches: list[dict[nn.Module, Tensor]] = []

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        if self.calls == len(self.caches):
            self.caches.append({})
        self.carried.frames = self.caches[self.calls]
        self.calls += 1
        return self.decoder(*arguments, **keywords)


class Carried:
    """The last input frames of each convolution, for the tile or slice that is being decoded."""

    frames: dict[nn.Module, Tensor]


def _carrying(module: nn.Module, carried: Carried) -> nn.Module:
    """Modules of their own over the weights of `module`, whose convolutions and upsamplers go on in `carried`."""
    kind = type(module).__name__
    if kind in CONVOLUTIONS:
        return CarryingConvolution(module, carried)
    if kind in UPSAMPLERS:
        return CarryingUpsampler(module, carried)
    if not module._modules:
        return module
    twin = copy.copy(module)
    for bound_to_the_original in ("forward", "_compiled_call_impl"):
        vars(twin).pop(bound_to_the_original, None)
    vars(twin)["_modules"] = {name: part and _carrying(part, carried) for name, part in module._modules.items()}
    return twin


class CarryingConvolution(nn.Module):
    """A causal convolution. Before the first frame it sees that frame, as the original does, and then what it saw."""

    def __init__(self, original: Any, carried: Carried) -> None:
        super().__init__()
        self.conv, self.carried = original.conv, carried
        self.num_past = original.kernel_size[0] - 1

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        past = self.carried.frames.get(self)
        if past is None:
            past = x[:, :, :1].expand(-1, -1, self.num_past, -1, -1)
        x = torch.cat([past, x], dim=2)
        self.carried.frames[self] = x[:, :, x.shape[2] - self.num_past :].clone()  # a view would hold all of x
        return self.conv(x)


class CarryingUpsampler(nn.Module):
    """Channels to frames, rows and columns. The first frame of the video is one also after it, any other is several."""

    def __init__(self, original: Any, carried: Carried) -> None:
        super().__init__()
        self.conv, self.carried = CarryingConvolution(original.conv, carried), carried
        self.stride, self.residual = original.stride, original.residual
        self.copies = original.stride[0] * original.stride[1] * original.stride[2] // original.upscale_factor

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        first = self.conv not in self.carried.frames
        out = self.spread(self.conv(x))
        if self.residual:
            out = out + self.spread(x).repeat(1, self.copies, 1, 1, 1)
        return out[:, :, self.stride[0] - 1 :] if first else out

    def spread(self, x: Tensor) -> Tensor:
        """(B, C * t * h * w, T, H, W) to (B, C, T * t, H * h, W * w)."""
        x = x.unflatten(1, (-1, *self.stride))  # (B, C, t, h, w, T, H, W)
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6).flatten(4, 5).flatten(2, 3)
