"""Schedulers of diffusers, which step all frames at one level, for frames at different levels: each has its own copy.

    copy = fresh scheduler + what the frame remembers  ->  step  ->  what the copy has become, other than fresh
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vattn.models.draws import Draws
from vattn.models.fifo.schedulers import FrameScheduler, History

OP = "FIFO"
TWICE = "evaluates the denoiser twice at a timestep, and frames of a queue move on after one evaluation"
REFUSED = {
    "HeunDiscreteScheduler": TWICE,
    "FlowMatchHeunDiscreteScheduler": TWICE,
    "PNDMScheduler": TWICE,
    "KDPM2DiscreteScheduler": TWICE,
    "KDPM2AncestralDiscreteScheduler": TWICE,
    "DPMSolverSDEScheduler": TWICE,
    "KarrasVeScheduler": TWICE,
    "CosineDPMSolverMultistepScheduler": "draws noise from a sampler of its own",
    "DDIMInverseScheduler": "goes from clean frames to noise",
    "DPMSolverMultistepInverseScheduler": "goes from clean frames to noise",
}


class PerFrameScheduler(FrameScheduler):
    """Any scheduler of diffusers with one evaluation per step."""

    def __init__(self, scheduler: Any, **settings: Any) -> None:
        self.name = type(scheduler).__name__
        parameters = inspect.signature(scheduler.step).parameters
        for kind in type(scheduler).__mro__:
            if kind.__name__ in REFUSED:
                raise ValueError(f"{OP}: scheduler must fit a queue, got {self.name}, which {REFUSED[kind.__name__]}")
        self._fresh = _copy(scheduler)
        self._parameters = parameters
        self._settings = settings
        if hasattr(scheduler, "is_scale_input_called"):
            self._fresh.is_scale_input_called = True
        self.timesteps: Tensor = scheduler.timesteps
        self._timesteps = list(scheduler.timesteps.unbind())
        self._unchanged = dict(vars(self._fresh))

    def settings(self) -> dict[str, str]:
        config = {name: value for name, value in dict(self._fresh.config).items() if not name.startswith("_")}
        return {"class": self.name, "config": str(sorted(config.items())), "timesteps": str(self.timesteps.tolist())}

    def add_noise(self, frame: Tensor, noise: Tensor, step: int) -> Tensor:
        scheduler = self._frame(self.history(step))
        timesteps = self._timesteps[step].expand(len(frame))
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(frame, timesteps, noise).to(frame.dtype)
        return scheduler.add_noise(frame, noise, timesteps).to(frame.dtype)

    def enter(self, noise: Tensor) -> Tensor:
        return (noise * getattr(self._fresh, "init_noise_sigma", 1.0)).to(noise.dtype)

    def history(self, step: int) -> History:
        return {"_begin_index": step} if hasattr(self._fresh, "set_begin_index") else {}

    def model_input(self, latents: Tensor, steps: Sequence[int]) -> Tensor:
        if not hasattr(self._fresh, "scale_model_input"):
            return latents
        frames = [
            self._frame(self.history(step)).scale_model_input(latents[:, :, i : i + 1], self._timesteps[step])
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
        with _Drawn(draws):
            for i, (step, history) in enumerate(zip(steps, histories, strict=True)):
                scheduler = self._frame(history)
                # Some keep what they are given: as a view, it would keep the whole queue.
                sample, prediction = (x[:, :, i : i + 1].clone() for x in (latents, predictions))
                result = scheduler.step(
                    prediction, self._timesteps[step], sample, return_dict=False, **self._arguments(scheduler, step)
                )
                frames.append(result[0].to(latents.dtype))
                after.append(self._remembered(scheduler))
        return torch.cat(frames, 2), after

    def _arguments(self, scheduler: Any, step: int) -> dict[str, Any]:
        arguments = dict(self._settings)
        if "order" in self._parameters:  # of LMS, which thinks that there is a history as soon as there was a step
            arguments["order"] = min(arguments.get("order", 4), len(scheduler.derivatives) + 1)
        if "prev_timestep" in self._parameters:  # of unCLIP, which otherwise thinks that timesteps are one apart
            arguments["prev_timestep"] = self._timesteps[step + 1] if step + 1 < len(self._timesteps) else None
        return arguments

    def _frame(self, history: History) -> Any:
        scheduler = _copy(self._fresh)
        vars(scheduler).update({name: list(x) if isinstance(x, list) else x for name, x in history.items()})
        return scheduler

    def _remembered(self, scheduler: Any) -> History:
        return {name: x for name, x in vars(scheduler).items() if not _same(x, self._unchanged.get(name, _Drawn))}


class _Drawn(TorchFunctionMode):
    """Inside of it, normal numbers come from `draws`, whatever generator is named."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            shape = args if args and isinstance(args[0], int) else (*args, *([kwargs["size"]] if "size" in kwargs else []))[0]
            numbers = self.draws.normal(*shape, device=torch.device(kwargs.get("device") or "cpu"))
            return numbers.to(kwargs.get("dtype") or torch.get_default_dtype())
        if func is torch.randn_like:
            like = args[0]
            return self.draws.normal(*like.shape, device=like.device).to(kwargs.get("dtype") or like.dtype)
        return func(*args, **kwargs)


def _copy(scheduler: Any) -> Any:
    """A copy with lists of its own: schedulers replace tensors, and change lists."""
    twin = copy.copy(scheduler)
    vars(twin).update({name: list(x) for name, x in vars(twin).items() if isinstance(x, list)})
    return twin


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b
