"""Transformers of diffusers as denoisers whose frames each have a timestep of their own.

Diagonal denoising gives the frames of one window different noise levels. A transformer can follow if its timestep
modulates tokens rather than clips, and each class of diffusers wants that timestep in another form:

    SkyReelsV2Transformer3DModel   (B, f), with diffusion forcing
    WanTransformer3DModel          (B, f * h * w): a timestep for each token
    LTXVideoTransformer3DModel     (B, f * h * w), and latents packed into tokens
    CosmosTransformer3DModel       (B, 1, f, 1, 1)
    SanaVideoTransformer3DModel    (B, f * h * w)
    AnyFlowTransformer3DModel      (B, f), twice: where a step begins and where it ends; frames before channels

Kim et al., "FIFO-Diffusion: Generating Infinite Videos from Text without Training", NeurIPS 2024 (arXiv:2405.11473),
section 3.1 (diagonal denoising).
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn.models.fifo.diffusers_models import known_class, unwrapped
from vattn.models.settings import number

OP = "denoise"

LIKE_THE_LATENTS = ("encoder_hidden_states", "encoder_hidden_states_image", "condition_mask", "padding_mask")
"""Conditions that the pipelines give in the dtype of the model."""


class Denoiser(ABC):
    """``denoise(latents, timesteps, **conditions)`` of one transformer, checks included.

    A class below says how its transformer is called (`predict`), and where its configuration is its own: `patch`
    and `channels`.
    """

    def __init__(self, model: nn.Module, timestep_scale: float) -> None:
        self.model = model
        self.module = unwrapped(model)  # the configuration and the dtype are here
        self.name = type(self.module).__name__
        self.timestep_scale = timestep_scale
        frames = self.patch()[0]
        if frames != 1:
            raise ValueError(
                f"adapt: a token of {self.name} must lie in one frame, so that each frame has its own timestep, "
                f"got patch_size={self.patch()}"
            )
        self.num_channels = self.channels()

    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a token."""
        frames, rows, columns = self.module.config.patch_size
        return frames, rows, columns

    def channels(self) -> int:
        """Channels of the latents."""
        config = self.module.config
        if config.out_channels not in (None, config.in_channels):
            raise ValueError(
                f"adapt: {self.name} must predict every channel that it reads, "
                f"got in_channels={config.in_channels} and out_channels={config.out_channels}. "
                f"The others hold the image of an image-to-video model, which would stay at the beginning of every "
                f"window. Use text-to-video weights, and begin from the image: fifo.start(latents)"
            )
        return config.in_channels

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The call of the transformer."""

    def __call__(self, latents: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
        self.check(latents, timesteps)
        text = conditions.get("encoder_hidden_states")
        if isinstance(text, Tensor) and len(text) != len(latents):
            raise ValueError(
                f"{OP}: encoder_hidden_states must have a text for each of {len(latents)} samples (negative ones are "
                f"for unconditional), got encoder_hidden_states.shape={tuple(text.shape)}"
            )
        dtype = self.module.dtype
        for name in LIKE_THE_LATENTS:
            if name in conditions:
                conditions[name] = _to(conditions[name], dtype)
        if self.timestep_scale != 1:
            timesteps = timesteps * self.timestep_scale
        return self.predict(latents.to(dtype), timesteps, conditions).to(latents.dtype)

    def check(self, latents: Tensor, timesteps: Tensor) -> None:
        _checks.tensor(OP, "latents", latents, meshes=False)
        _checks.rank(OP, "latents", latents, "(B, C, f, H, W)")
        batch, channels, frames, height, width = latents.shape
        if channels != self.num_channels:
            raise ValueError(
                f"{OP}: latents must have the {self.num_channels} channels of {self.name}, "
                f"got latents.shape={tuple(latents.shape)}"
            )
        _, rows, columns = self.patch()
        if height % rows or width % columns:
            raise ValueError(
                f"{OP}: height and width of latents must be multiples of {rows} and {columns}, the patches of "
                f"{self.name}, got latents.shape={tuple(latents.shape)}"
            )
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"{OP}: timesteps must be a torch.Tensor, got timesteps={type(timesteps).__name__}")
        if timesteps.shape != (batch, frames):
            raise ValueError(
                f"{OP}: timesteps must have shape (B, f)={(batch, frames)}, "
                f"got timesteps.shape={tuple(timesteps.shape)}"
            )
        if getattr(self.module, "is_cache_enabled", False):
            raise ValueError(
                f"{OP}: {self.name} must run without a cache of earlier steps, since the next call is another "
                f"window; call disable_cache(), got is_cache_enabled=True"
            )

    def tokens_of_a_frame(self, latents: Tensor) -> int:
        _, rows, columns = self.patch()
        return (latents.shape[3] // rows) * (latents.shape[4] // columns)


class SkyReels(Denoiser):
    def predict(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        if self.module.config.inject_sample_info:
            conditions["fps"] = _one_rate(conditions.get("fps"), self.name)
        return self.model(
            hidden_states=latents, timestep=timesteps, enable_diffusion_forcing=True, return_dict=False, **conditions
        )[0]


class Wan(Denoiser):
    def predict(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        timesteps = timesteps.repeat_interleave(self.tokens_of_a_frame(latents), dim=1)
        return self.model(hidden_states=latents, timestep=timesteps, return_dict=False, **conditions)[0]


class LTX(Denoiser):
    COMPRESSION = (8, 32, 32)
    """Frames, rows and columns of a latent of LTX's autoencoder, as in its pipeline."""

    def patch(self) -> tuple[int, int, int]:
        config = self.module.config
        return config.patch_size_t, config.patch_size, config.patch_size

    def channels(self) -> int:
        return super().channels() // self.module.config.patch_size**2

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        _, rows, columns = self.patch()
        frames, height, width = latents.shape[2], latents.shape[3] // rows, latents.shape[4] // columns
        frame_rate = conditions.pop("frame_rate", 25)
        if "video_coords" not in conditions:
            seconds, *pixels = self.COMPRESSION
            conditions.setdefault("rope_interpolation_scale", (seconds / frame_rate, *pixels))
        conditions.setdefault("encoder_attention_mask", None)
        blocks = latents.unflatten(4, (width, columns)).unflatten(3, (height, rows))  # (B, C, f, h, rows, w, columns)
        prediction = self.model(
            hidden_states=blocks.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3),
            timestep=timesteps.repeat_interleave(height * width, dim=1),
            num_frames=frames,
            height=height,
            width=width,
            return_dict=False,
            **conditions,
        )[0]
        blocks = prediction.unflatten(2, (-1, rows, columns)).unflatten(1, (frames, height, width))
        return blocks.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)


class Cosmos(Denoiser):
    def __init__(self, model: nn.Module, timestep_scale: float) -> None:
        super().__init__(model, timestep_scale)
        if self.module.config.concat_padding_mask and importlib.util.find_spec("torchvision") is None:
            raise ValueError(
                f"adapt: {self.name} resizes its padding mask with torchvision, which must be installed, in the build "
                f"that goes with your torch and from the index that torch is from, got concat_padding_mask=True"
            )

    def has_condition_mask(self) -> bool:
        """Whether a channel of the input marks the frames that are given."""
        config = self.module.config
        return config.in_channels == config.out_channels + 1

    def channels(self) -> int:
        return self.module.config.out_channels if self.has_condition_mask() else super().channels()

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        if self.has_condition_mask():  # 1 where a frame is given; here all are generated
            conditions.setdefault("condition_mask", torch.zeros_like(latents[:, :1]))
        if self.module.config.concat_padding_mask:
            conditions.setdefault("padding_mask", latents.new_zeros(1, 1, *latents.shape[3:]))
        timesteps = timesteps[:, None, :, None, None]
        return self.model(hidden_states=latents, timestep=timesteps, return_dict=False, **conditions)[0]


class SanaVideo(Denoiser):
    def channels(self) -> int:
        config = self.module.config
        return config.in_channels if config.out_channels == 2 * config.in_channels else super().channels()

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        tokens = self.tokens_of_a_frame(latents)
        if conditions.get("guidance") is not None:  # its embedding is added to that of the timesteps, token by token
            guidance = conditions["guidance"].expand(len(latents))
            conditions["guidance"] = guidance.repeat_interleave(timesteps.shape[1] * tokens)
        timesteps = timesteps.repeat_interleave(tokens, dim=1)
        prediction = self.model(hidden_states=latents, timestep=timesteps, return_dict=False, **conditions)[0]
        return prediction[:, : self.num_channels]  # what may follow is a variance, which no scheduler reads


class AnyFlow(Denoiser):
    def predict(self, latents: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor:
        end = conditions.pop("r_timestep", timesteps)
        prediction = self.model(
            hidden_states=latents.transpose(1, 2),
            timestep=timesteps,
            r_timestep=end(timesteps) if callable(end) else end,
            return_dict=False,
            **conditions,
        )[0]
        return prediction.transpose(1, 2)


DENOISERS: dict[str, type[Denoiser]] = {
    "AnyFlowTransformer3DModel": AnyFlow,
    "CosmosTransformer3DModel": Cosmos,
    "LTXVideoTransformer3DModel": LTX,
    "SanaVideoTransformer3DModel": SanaVideo,
    "SkyReelsV2Transformer3DModel": SkyReels,
    "WanTransformer3DModel": Wan,
}

ONE_TIMESTEP = ("CogVideoXTransformer3DModel", "HunyuanVideoTransformer3DModel")
"""Those that would take a vector of timesteps, as a batch, and return something of a wrong shape without an error."""


def adapt(model: nn.Module, *, timestep_scale: float = 1.0) -> Callable[..., Tensor]:
    """A denoiser for :class:`FIFO`, made of a video transformer of diffusers.

    Args:
        model: an AnyFlow, Cosmos, LTXVideo, SanaVideo, SkyReelsV2 or WanTransformer3DModel, or of a class derived from
            one, also inside ``torch.compile``, DistributedDataParallel or PEFT, and in any dtype. It is not
            changed, and stays in its mode (train or eval) and on its device.
        timestep_scale: factor of the timesteps that the model reads. Cosmos Predict2 and Predict2.5 read the noise
            level itself, so that a scheduler of 1000 timesteps needs 0.001; the others need 1, also the first Cosmos
            with its EDMEulerScheduler.

    Returns:
        ``denoise(latents, timesteps, **conditions)``. `latents` is a window ``(B, C, f, H, W)`` in the units of the
        model's pipeline, float32, bfloat16, float16 or float64; it is cast to the dtype of the model. `timesteps`
        ``(B, f)``, float or int, are those of the scheduler. `conditions` are what else the pipeline passes to the
        model, by the same names: ``encoder_hidden_states``, masks, ``fps``, ``guidance``. Some have a default or a
        meaning of their own here:

        - ``frame_rate`` (LTX, default 25) gives ``rope_interpolation_scale`` as the pipeline does, unless that or
          ``video_coords`` is there;
        - ``r_timestep`` (AnyFlow) is where a step ends: a tensor ``(B, f)`` or a function of the timesteps that returns
          one. Without it, the model predicts the velocity at the timestep;
        - ``condition_mask`` and ``padding_mask`` (Cosmos) are zeros unless given.

        It gives ``(B, C, f, H, W)`` in the dtype of `latents`: noise or velocity, whichever the model predicts. It
        raises TypeError or ValueError for latents of another number of channels, sizes that the patches do not divide,
        timesteps that are not ``(B, f)``, another number of texts than samples, and while a cache of diffusers is
        enabled, which would answer one window with another.

    Raises:
        TypeError: `model` is of any other class; the message says what to do instead.
        ValueError: a configuration that cannot have a timestep per frame: image-to-video weights with channels for the
            image, patches of more than one frame; or a Cosmos that needs torchvision, which is not installed.
        TypeError, ValueError: `timestep_scale` is no positive number.

    Source:
        Kim et al., "FIFO-Diffusion: Generating Infinite Videos from Text without Training" (NeurIPS 2024,
        arXiv:2405.11473), section 3.1 (diagonal denoising).

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        ...                               text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1)
        >>> denoise = adapt(model)
        >>> latents, timesteps = torch.randn(1, 4, 3, 8, 8), torch.tensor([[1, 334, 667]])
        >>> with torch.no_grad():
        ...     denoise(latents, timesteps, encoder_hidden_states=torch.randn(1, 5, 8)).shape
        torch.Size([1, 4, 3, 8, 8])
    """
    module = unwrapped(model)
    name = known_class(module, DENOISERS)
    if name is None:
        raise TypeError(_refusal(module))
    number("adapt", "timestep_scale", timestep_scale, 0, above=True)
    return DENOISERS[name](model, timestep_scale)


def _refusal(model: object) -> str:
    """Why `model` is not adapted, and what to do instead."""
    got = type(model).__name__
    if known_class(model, ONE_TIMESTEP):
        got += ", which modulates a clip by one timestep, and would take those of the frames for a batch"
    elif isinstance(getattr(model, "transformer", None), nn.Module):
        got += ", a pipeline: give adapt its transformer"
    return (
        f"adapt: model must be one of diffusers' {', '.join(DENOISERS)}, got model={got}. If a model of yours has a "
        f"timestep per frame, no adapter is needed. FIFO takes any function such as\n"
        f"    def denoise(latents, timesteps, **conditions):  # (B, C, f, H, W) and (B, f)\n"
        f"        return model(latents, timesteps, **conditions)  # (B, C, f, H, W)\n"
        f"    fifo = FIFO(denoise, scheduler, frames=16, partitions=4)"
    )


def _to(condition: Any, dtype: torch.dtype) -> Any:
    if isinstance(condition, tuple):
        return tuple(_to(part, dtype) for part in condition)
    return condition.to(dtype) if isinstance(condition, Tensor) and condition.is_floating_point() else condition


def _one_rate(fps: Any, name: str) -> list[int]:
    """The frame rate of all samples; SkyReels with diffusion forcing takes exactly one."""
    rates = fps.flatten().tolist() if isinstance(fps, Tensor) else fps if isinstance(fps, list | tuple) else [fps]
    if len(set(rates)) != 1 or rates[0] not in (0, 1):
        raise ValueError(
            f"{OP}: fps of {name} must be 0 (16 frames per second) or 1 (others), the same for all samples, "
            f"got fps={fps}"
        )
    return [int(rates[0])]
