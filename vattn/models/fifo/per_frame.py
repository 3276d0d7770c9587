"""Schedulers of diffusers, which step all frames at one level, for frames at different levels: each has its own copy.

    a fresh copy + what the frame remembers  ->  step  ->  what differs from a fresh copy is what the frame remembers

A frame that starts within the schedule (of a base clip) has the index of its first step, and an empty history, as
diffusers' own image-to-image pipelines have it.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vattn.models.draws import Draws
from vattn.models.fifo.schedulers import FrameScheduler, History

OP = "FIFO"
_TWICE = "evaluates the denoiser more than once per step, while a frame of the queue moves on after one evaluation"
_TOKENS = "steps tokens, not latents"
_ONE_MORE = "has one timestep more than it has steps"
_STAGES = "needs more for a step than a prediction of the latents' shape"
_BACK = "goes from clean frames to noise"
REFUSED = {
    "HeunDiscreteScheduler": _TWICE, "FlowMatchHeunDiscreteScheduler": _TWICE, "PNDMScheduler": _TWICE,
    "KDPM2DiscreteScheduler": _TWICE, "KDPM2AncestralDiscreteScheduler": _TWICE, "DPMSolverSDEScheduler": _TWICE,
    "KarrasVeScheduler": _TWICE, "ScoreSdeVeScheduler": _TWICE,
    "ScoreSdeVpScheduler": "has no method step",
    "CosineDPMSolverMultistepScheduler": "draws from a noise sampler of its own, which does not follow a generator",
    "DDIMInverseScheduler": _BACK, "DPMSolverMultistepInverseScheduler": _BACK,
    "AmusedScheduler": _TOKENS, "BlockRefinementScheduler": _TOKENS, "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS, "VQDiffusionScheduler": _TOKENS,
    "DDPMWuerstchenScheduler": _ONE_MORE, "SCMScheduler": _ONE_MORE,
    "ConsistencyDecoderScheduler": _STAGES, "HeliosScheduler": _STAGES, "HeliosDMDScheduler": _STAGES,
    "PiflowScheduler": _STAGES, "RePaintScheduler": _STAGES, "RFD4ProteinaScheduler": _STAGES,
}  # fmt: skip
"""Why schedulers of diffusers, and their subclasses, cannot step the frames of a queue."""
_OURS = (
    "model_output", "timestep", "sample", "generator", "variance_noise", "return_dict",
    "old_pred_original_sample", "timestep_back", "prev_timestep", "per_token_timesteps",
)  # fmt: skip
"""Arguments of a step that the queue itself gives, or has no use for (timesteps per token)."""


class PerFrameScheduler(FrameScheduler):
    """A scheduler of diffusers, of which each frame owns a copy; :class:`FIFO` makes one of a scheduler by itself.

    Each step equals that of the scheduler alone, for one frame ``(B, C, 1, H, W)``; where it draws noise, the numbers
    are those of the generator of `FIFO.stream`, frame by frame from the clean end on.

    Args:
        scheduler: it evaluates the denoiser once per step, and ``set_timesteps`` was called, but no step made since. It
            is copied, and never changed.
        settings: arguments of its ``step``, such as ``eta`` of DDIM or ``s_churn`` of Euler.

    Raises:
        TypeError: `scheduler` is none of diffusers, or `settings` are not of its step.
        ValueError: the scheduler cannot step frames of a queue, or it has been used.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> ddim = DDIMScheduler()
        >>> ddim.set_timesteps(8)
        >>> PerFrameScheduler(ddim, eta=1.0).timesteps
        tensor([875, 750, 625, 500, 375, 250, 125,   0])
    """

    def __init__(self, scheduler: Any, **settings: Any) -> None:
        self.name = type(scheduler).__name__
        if (why := _refusal(scheduler)) is not None:
            raise ValueError(
                f"{OP}: scheduler must be one whose frames can be a step apart, got {self.name}, which {why}"
            )
        if not callable(getattr(scheduler, "step", None)) or not isinstance(
            getattr(scheduler, "timesteps", None), Tensor
        ):
            raise TypeError(
                f"{OP}: scheduler must be official_ddim(...) or a scheduler of diffusers after set_timesteps, "
                f"got scheduler={self.name}"
            )
        self._parameters = dict(inspect.signature(scheduler.step).parameters)
        for name, value in settings.items():
            if name not in self._parameters or name in _OURS:
                raise TypeError(f"{OP}: settings must be arguments of {self.name}.step, got {name}={value!r}")
        count = getattr(scheduler, "num_inference_steps", None)
        if count is not None and count != len(scheduler.timesteps):
            raise ValueError(
                f"{OP}: scheduler must have a timestep for each step, got {self.name} with "
                f"num_inference_steps={count} and len(timesteps)={len(scheduler.timesteps)}"
            )
        if getattr(scheduler, "step_index", None) is not None:
            raise ValueError(
                f"{OP}: scheduler must not have been used since its set_timesteps, "
                f"got {self.name} with step_index={scheduler.step_index}"
            )
        self._step_settings = settings
        self._fresh = copy.deepcopy(scheduler)
        if hasattr(scheduler, "is_scale_input_called"):  # it warns otherwise, in copies that only step
            self._fresh.is_scale_input_called = True
        if hasattr(scheduler, "get_lms_coefficient"):  # a numerical integral, the same for all frames at a level
            self._fresh.get_lms_coefficient = functools.cache(copy.copy(self._fresh).get_lms_coefficient)
        self.timesteps: Tensor = self._fresh.timesteps
        self._times = list(self.timesteps.unbind())
        self._scales = self._scales_input()

    def settings(self) -> dict[str, str]:
        config = {
            name: value for name, value in dict(getattr(self._fresh, "config", {})).items() if not name.startswith("_")
        }
        sigmas = getattr(self._fresh, "sigmas", None)
        return {
            "class": self.name,
            "config": str(sorted(config.items())),
            "settings": str(sorted(self._step_settings.items())),
            "timesteps": str(self.timesteps.tolist()),
            "sigmas": str(sigmas.tolist() if isinstance(sigmas, Tensor) else None),
        }

    def add_noise(self, frame: Tensor, noise: Tensor, step: int) -> Tensor:
        scheduler, timesteps = self._frame(self.history(step)), self._times[step].expand(len(frame))
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(frame, timesteps, noise).to(frame.dtype)
        if hasattr(scheduler, "add_noise"):
            return scheduler.add_noise(frame, noise, timesteps).to(frame.dtype)
        raise ValueError(
            f"{OP}.start: scheduler must have add_noise or scale_noise to start from latents (shape=... starts from "
            f"noise), got {self.name}"
        )

    def enter(self, noise: Tensor) -> Tensor:
        return (noise * getattr(self._fresh, "init_noise_sigma", 1.0)).to(noise.dtype)

    def history(self, step: int) -> History:
        return {"_begin_index": step} if hasattr(self._fresh, "set_begin_index") else {}

    def model_input(self, latents: Tensor, steps: Sequence[int]) -> Tensor:
        if not self._scales:
            return latents
        frames = [
            self._frame(self.history(step)).scale_model_input(latents[:, :, i : i + 1], self._times[step])
            for i, step in enumerate(steps)
        ]
        return torch.cat(frames, 2).to(latents.dtype)

    def step(
        self,
        predictions: Tensor,
        latents: Tensor,
        steps: Sequence[int],
        histories: Sequence[History],
        noise: Tensor | None,
        draws: Draws,
    ) -> tuple[Tensor, list[History]]:
        frames, after = [], []
        with _Drawn(draws) if "generator" in self._parameters else contextlib.nullcontext():
            for i, (step, history) in enumerate(zip(steps, histories, strict=True)):
                scheduler = self._frame(history)
                # Clones: some schedulers keep what they are given, and a view would keep all frames of the queue.
                sample, prediction = (x[:, :, i : i + 1].clone() for x in (latents, predictions))
                arguments = self._step_settings | self._of_history(scheduler, step)
                result = scheduler.step(
                    model_output=prediction, timestep=self._times[step], sample=sample, return_dict=False, **arguments
                )
                frames.append(result[0].to(latents.dtype))
                if "old_pred_original_sample" in arguments:
                    scheduler.old_pred_original_sample = result[1]
                after.append(self._remembered(scheduler))
        return torch.cat(frames, 2), after

    def _of_history(self, scheduler: Any, step: int) -> dict[str, Any]:
        """Arguments of a step with which the caller passes a scheduler its history, or the next timestep."""
        arguments: dict[str, Any] = {}
        if "old_pred_original_sample" in self._parameters:  # CogVideoX's DPM: its history is the caller's
            old = getattr(scheduler, "old_pred_original_sample", None)
            arguments["old_pred_original_sample"] = old
            arguments["timestep_back"] = None if old is None else self._times[step - 1]
        if hasattr(scheduler, "get_lms_coefficient"):  # the index alone would give an order for which steps are missing
            order = self._step_settings.get("order", self._parameters["order"].default)
            arguments["order"] = min(order, len(scheduler.derivatives) + 1)
        if "prev_timestep" in self._parameters:  # unCLIP takes it for the timestep less one
            arguments["prev_timestep"] = self._times[step + 1] if step + 1 < len(self._times) else None
        return arguments

    def _frame(self, history: History) -> Any:
        """The copy of a frame, which may change it."""
        scheduler = _copy(self._fresh)
        vars(scheduler).update({name: list(x) if isinstance(x, list) else x for name, x in history.items()})
        return scheduler

    def _remembered(self, scheduler: Any) -> History:
        fresh = vars(self._fresh)
        return {name: x for name, x in vars(scheduler).items() if name not in fresh or not _same(x, fresh[name])}

    def _scales_input(self) -> bool:
        if not hasattr(self._fresh, "scale_model_input"):
            return False
        probe = torch.zeros(1, 1, 1, 1, 1)
        return self._frame(self.history(0)).scale_model_input(probe, self._times[0]) is not probe


class _Drawn(TorchFunctionMode):
    """Inside, normal numbers are those of `draws`: schedulers draw with ``torch.randn`` and ``torch.randn_like``."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            shape = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            numbers = self.draws.normal(*shape, device=torch.device(kwargs.get("device") or "cpu"))
            return numbers.to(kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.randn_like:
            return self.draws.normal(*args[0].shape, device=args[0].device).to(kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


def _refusal(scheduler: Any) -> str | None:
    """Why a scheduler cannot step the frames of a queue."""
    for kind in type(scheduler).__mro__:
        if kind.__name__ in REFUSED:
            return REFUSED[kind.__name__]
    if getattr(scheduler, "order", 1) not in (None, 1):
        return _TWICE
    return None


def _copy(scheduler: Any) -> Any:
    """A copy with lists of its own: a step puts other tensors in their places, and changes lists."""
    twin = copy.copy(scheduler)
    vars(twin).update({name: list(x) for name, x in vars(twin).items() if isinstance(x, list)})
    return twin


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b
