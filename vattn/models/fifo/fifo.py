"""The queue: every step denoises all frames by one level, takes a clean one off the front, and puts noise in at the back.

    front: clean                       back: noise
    [ x_1 | x_2 | ... ... | x_S ]  ->  denoise all  ->  x_1 leaves, all move up, noise enters
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vattn import _checks
from vattn.models.draws import Draws, Randomness, draws_of
from vattn.models.fifo.per_frame import PerFrameScheduler
from vattn.models.fifo.schedulers import FrameScheduler, History
from vattn.models.fifo.windows import Window, context_frames, windows_of
from vattn.models.settings import number

Conditions = Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None


class FIFO:
    def __init__(
        self,
        denoise: Callable[..., Tensor],
        scheduler: Any,
        *,
        frames: int,
        partitions: int,
        lookahead: bool = False,
        guidance_scale: float = 1.0,
        group: Any = None,
    ) -> None:
        op = "FIFO"
        _checks.integer(op, "frames", frames, least=1)
        _checks.integer(op, "partitions", partitions, least=1)
        number(op, "guidance_scale", guidance_scale, -float("inf"))
        self.denoise = denoise
        self.scheduler = scheduler if isinstance(scheduler, FrameScheduler) else PerFrameScheduler(scheduler)
        self.frames, self.partitions, self.lookahead = frames, partitions, lookahead
        self.guidance_scale = float(guidance_scale)
        levels = frames * partitions
        if len(self.scheduler.timesteps) != levels:
            raise ValueError(
                f"{op}: scheduler must have frames * partitions = {levels} timesteps, "
                f"got len(scheduler.timesteps)={len(self.scheduler.timesteps)}"
            )
        self.context = context_frames(frames, lookahead)
        self.windows = windows_of(frames, partitions, lookahead)
        self._ready = [levels] * self.context + list(reversed(range(levels)))
        self._latents: Tensor | None = None
        self._histories: list[History] = []
        self._steps: list[int] = []
        self._number = 0

    def start(
        self,
        latents: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        generator: Randomness = None,
    ) -> None:
        draws = draws_of(generator)
        levels, context = len(self.scheduler.timesteps), self.context
        with torch.no_grad():
            if latents is None:
                like = torch.empty(*shape[:2], *shape[3:], dtype=dtype or torch.float32, device=device)
                steps = [0] * (context + levels)
                slots = [self.scheduler.enter(self._noise(draws, like)) for _ in steps]
                self._number = -max(self._ready)
            else:
                latents = latents.detach()
                steps = list(self._ready)
                slots = []
                for place, step in enumerate(steps):
                    frame = latents[:, :, max(0, place - context - levels + self.frames) if latents.shape[2] > 1 else 0]
                    noise = self._noise(draws, frame)
                    slots.append(self.scheduler.add_noise(frame, noise, min(step, levels - 1)))
                self._number = self.frames - levels
            self._steps, self._histories = steps, [self.scheduler.history(step) for step in steps]
            self._latents = torch.stack(slots, 2)

    def stream(
        self,
        num_frames: int | None = None,
        *,
        conditions: Conditions = None,
        unconditional: Conditions = None,
        generator: Randomness = None,
    ) -> Iterator[Tensor]:
        draws = draws_of(generator)
        if self._latents is None:
            raise ValueError("FIFO.stream: start must have been called, got a queue that is empty")
        return self._frames(num_frames, conditions, unconditional, draws)

    def _frames(
        self, num_frames: int | None, conditions: Conditions, unconditional: Conditions, draws: Draws
    ) -> Iterator[Tensor]:
        made = 0
        while num_frames is None or made < num_frames:
            frame = self._advance(conditions, unconditional, draws)
            if frame is not None:
                made += 1
                yield frame

    def _advance(self, conditions: Conditions, unconditional: Conditions, draws: Draws) -> Tensor | None:
        """One step of the queue; the frame that leaves, unless it is warming up."""
        latents, steps = self._latents, self._steps
        filling = steps != self._ready
        windows = self.windows
        if filling:  # the frames in front are not clean yet: the last window writes them, too
            windows = [*windows[:-1], windows[-1]._replace(write=0)]
        moving = [i for i, (step, ready) in enumerate(zip(steps, self._ready, strict=True)) if step < ready]
        if not filling:
            moving = list(range(self.context, len(steps)))
        with torch.no_grad():
            noise = self.scheduler.draw(draws, windows, latents)
            seen = [min(step, len(self.scheduler.timesteps) - 1) for step in steps]
            inputs = self.scheduler.model_input(latents, seen)
            timesteps = self.scheduler.timesteps[seen].to(latents.device)
            given = [_conditions(c, self._number) for c in (conditions, unconditional)]
            predictions = {w: self._predict(inputs, timesteps, w, *given) for w in windows}
            of_all = torch.cat([predictions[w] for w in sorted(windows)], 2)
            of_all = torch.cat([latents[:, :, : len(steps) - of_all.shape[2]], of_all], 2)
            stepped, histories = self.scheduler.step(
                of_all[:, :, moving], latents[:, :, moving], [steps[i] for i in moving],
                [self._histories[i] for i in moving], None if noise is None else noise[:, :, moving], draws,
            )
            slots, new_histories, new_steps = list(latents.unbind(2)), list(self._histories), list(steps)
            for i, frame, history in zip(moving, stepped.unbind(2), histories, strict=True):
                slots[i], new_histories[i], new_steps[i] = frame, history, steps[i] + 1
            leaving = None
            if not filling:
                leaving = slots[self.context].clone()
                slots = [*slots[1:], self.scheduler.enter(self._noise(draws, leaving))]
                new_histories = [*new_histories[1:], self.scheduler.history(0)]
                new_steps = [*new_steps[1:], 0]
            self._latents, self._histories, self._steps = torch.stack(slots, 2), new_histories, new_steps
            self._number += 1
            return leaving if self._number > 0 else None

    def _predict(
        self,
        inputs: Tensor,
        timesteps: Tensor,
        window: Window,
        conditions: Mapping[str, Any] | None,
        unconditional: Mapping[str, Any] | None,
    ) -> Tensor:
        start, write, stop = window
        x = inputs[:, :, start:stop]
        t = timesteps[start:stop].expand(len(x), -1)
        prediction = self.denoise(x, t, **(conditions or {}))
        if self.guidance_scale != 1 and unconditional is not None:
            without = self.denoise(x, t, **unconditional)
            prediction = without + self.guidance_scale * (prediction - without)
        return prediction[:, :, write - start :]

    @staticmethod
    def _noise(draws: Draws, like: Tensor) -> Tensor:
        return draws.normal(*like.shape, device=like.device).to(like.dtype)


def _conditions(conditions: Conditions, frame: int) -> Mapping[str, Any] | None:
    return conditions(frame) if callable(conditions) else conditions
