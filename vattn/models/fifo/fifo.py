"""The queue: a step denoises all frames by one level, takes the clean one off the front and puts noise in at the back.

    front, clean                      back, noise
    [ x1 | x2 | x3 | ... | xS ]   ->  all one level cleaner   ->  x1 leaves, the others move up, noise enters

Each window of frames reads what stood in the queue before the step, so windows run in any order, or on several ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vattn import _checks
from vattn.models.draws import Draws, Randomness, draws_of
from vattn.models.fifo.per_frame import PerFrameScheduler
from vattn.models.fifo.ranks import Ranks
from vattn.models.fifo.saved import restored, saved
from vattn.models.fifo.schedulers import FrameScheduler, History
from vattn.models.fifo.windows import Window, context_frames, windows_of
from vattn.models.settings import number

Conditions = Mapping[str, Any] | Callable[[int], Mapping[str, Any]] | None
"""Arguments of the denoiser, or a function that gives those of a step, told which frame leaves in it."""


class Queue(NamedTuple):
    """What stands between two steps; a step makes a new one."""

    latents: Tensor
    """``(B, C, L, H, W)``, the cleanest frame first; with lookahead, frames that are done are in front."""
    steps: list[int]
    """How many steps each frame has taken."""
    histories: list[History]
    """What the scheduler remembers of each frame."""
    number: int
    """Of the frame that leaves in the next step, which is yielded from 0 on."""


class FIFO:
    """Endless video from a denoiser of short clips: a queue of ``frames * partitions`` frames, one level apart.

    Each step denoises every frame by one level, in windows of `frames` (diagonal denoising with latent partitioning).
    With lookahead, windows are half a window apart and each moves only its noisier half, at twice the cost.

    Args:
        denoise: ``denoise(latents (B, C, frames, H, W), timesteps (B, frames), **conditions)`` gives a prediction like
            `latents`, of whatever the scheduler expects. It must take a timestep per frame. Called without gradients.
        scheduler: :func:`official_ddim`, or a scheduler of diffusers that evaluates the denoiser once per step, after
            ``set_timesteps(frames * partitions)``. It is copied: each frame has a copy with its own history. For
            arguments of its step, such as ``eta``: :class:`PerFrameScheduler`.
        frames: f, how many frames the denoiser sees at once: the length of the clips that it was trained with.
        partitions: n; frames of a window are ``1 / n`` of the noise levels apart. More are
            closer to what the denoiser was trained with, one level per clip; a frame costs n evaluations.
        lookahead: whether windows overlap by half.
        guidance_scale: s of classifier-free guidance, ``u + s * (c - u)``, where `stream` is given `unconditional`;
            1 calls the denoiser once per window, others twice.
        group: a ProcessGroup or a one-dimensional DeviceMesh, whose ranks share the windows of a step, and all have the
            same queue, bit by bit; None is this process alone. All ranks make the same calls, with the same arguments
            and equal generators, in the same order; the denoiser draws nothing from these generators.

    Raises:
        TypeError, ValueError: an argument does not fit; a scheduler whose timesteps are not ``frames * partitions``, or
            that cannot step frames of a queue, is refused by name.

    Source:
        Kim et al., "FIFO-Diffusion: Generating Infinite Videos from Text without Training" (NeurIPS 2024,
        arXiv:2405.11473), sections 3.1 (diagonal denoising), 3.2 (latent partitioning) and 3.3 (lookahead denoising).

    Example:
        >>> from vattn.models.fifo import FIFO, official_ddim
        >>> fifo = FIFO(lambda latents, timesteps: 0.5 * latents, official_ddim(8), frames=4, partitions=2)
        >>> fifo.start(torch.zeros(1, 3, 4, 2, 2), generator=torch.Generator().manual_seed(0))
        >>> video = torch.stack(list(fifo.stream(10, generator=torch.Generator().manual_seed(1))), 2)
        >>> video.shape
        torch.Size([1, 3, 10, 2, 2])
    """

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
        if not callable(denoise):
            raise TypeError(f"{op}: denoise must be callable, got denoise={denoise!r}")
        _checks.integer(op, "frames", frames, least=1)
        _checks.integer(op, "partitions", partitions, least=1)
        if not isinstance(lookahead, bool):
            raise TypeError(f"{op}: lookahead must be a bool, got lookahead={lookahead!r}")
        number(op, "guidance_scale", guidance_scale, 0)
        self.denoise, self.frames, self.partitions = denoise, int(frames), int(partitions)
        self.lookahead, self.guidance_scale = lookahead, float(guidance_scale)
        self.scheduler = scheduler if isinstance(scheduler, FrameScheduler) else PerFrameScheduler(scheduler)
        levels = len(self.scheduler.timesteps)
        if levels != frames * partitions:
            raise ValueError(
                f"{op}: scheduler must have frames * partitions = {frames * partitions} timesteps (see its "
                f"set_timesteps), got len(scheduler.timesteps)={levels}"
            )
        self._windows = windows_of(self.frames, self.partitions, lookahead)
        self._context = context_frames(self.frames, lookahead)
        self._ready = [levels] * self._context + list(reversed(range(levels)))  # steps of the frames of a full queue
        self._ranks = Ranks(group)
        self._queue: Queue | None = None

    def start(
        self,
        latents: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: Randomness = None,
    ) -> None:
        """Fill the queue, and number frames from 0 again.

        From a clip or an image, which `stream` carries on: its first frame, repeated, stands before it in the queue,
        and these repetitions are never yielded. Or from noise: the first steps, which yield nothing, denoise it until
        the frames are one level apart; there are as many as the queue has levels, or one less without lookahead.

        Args:
            latents: ``(B, C, frames, H, W)`` clean latents of a clip, or ``(B, C, 1, H, W)`` of an image: float32,
                bfloat16, float16 or float64. The scheduler adds noise to them, by its ``add_noise`` or ``scale_noise``.
            shape: ``(B, C, frames, H, W)``, for noise instead.
            dtype, device: of noise; float32 and PyTorch's default.
            generator: see :class:`vattn.models.draws.Draws`. Numbers are drawn in the order of the official code.

        Raises:
            TypeError, ValueError: an argument does not fit; the scheduler cannot add noise to frames.
        """
        op = "FIFO.start"
        draws = draws_of(generator)
        if (latents is None) == (shape is None):
            raise ValueError(f"{op}: one of latents and shape must be given, got {'both' if shape else 'neither'}")
        levels, context = len(self.scheduler.timesteps), self._context
        with torch.no_grad():
            if latents is not None:
                self._require_clip(op, latents, dtype, device)
                clip = latents.detach().expand(-1, -1, self.frames, -1, -1)
                places = [max(0, i - context - levels + self.frames) for i in range(context + levels)]
                steps = list(self._ready)
                slots = [
                    self.scheduler.add_noise(clip[:, :, place], _noise(draws, clip[:, :, 0]), min(step, levels - 1))
                    for place, step in zip(places, steps, strict=True)
                ]
                first = self.frames - levels
            else:
                batch, channels, height, width = self._require_shape(op, shape)
                like = torch.empty(batch, channels, height, width, dtype=dtype or torch.float32, device=device)
                _checks.tensor(op, "dtype", like, meshes=False)
                steps = [0] * (context + levels)
                slots = [self.scheduler.enter(_noise(draws, like)) for _ in steps]
                first = -max(self._ready)
            self._queue = Queue(torch.stack(slots, 2), steps, [self.scheduler.history(step) for step in steps], first)

    def stream(
        self,
        num_frames: int | None = None,
        *,
        conditions: Conditions = None,
        unconditional: Conditions = None,
        generator: Randomness = None,
    ) -> Iterator[Tensor]:
        """The next frames of the video, one by one; the first call warms up first, a later one goes on at once.

        Memory does not grow with the number of frames, and a frame that is yielded is the caller's. The queue has moved
        on by then, so that its state can be saved, and the stream be closed, between any two frames.

        Args:
            num_frames: how many; None is endless.
            conditions: keyword arguments of the denoiser, in a dict; or a function that gives them, called once a step
                with the number of the frame that leaves in it: negative in the warm-up, and counted since `start`.
            unconditional: the same for the unconditional denoiser of classifier-free guidance. None: no guidance.
            generator: see :class:`vattn.models.draws.Draws`; for the noise of steps, and of frames that enter. It is no
                part of the state: the caller saves it. With :func:`official_ddim`, numbers are drawn in the order of
                the official code.

        Yields:
            latents ``(B, C, H, W)`` of a frame. With :func:`official_ddim` they keep the noise of timestep 0, as in the
            official code.

        Raises:
            TypeError, ValueError: an argument does not fit, or `start` was not called; while it runs: conditions that
                are no dict, a prediction of another shape, dtype or device than the latents, or ranks that differ.
            RuntimeError: a step failed on another rank.
            Exception: what the denoiser raises. The queue is then as it was before the step, but the generator may have
                drawn numbers: for the frames that there would have been, set it back to where it was, too.

        Example:
            >>> from vattn.models.fifo import FIFO, official_ddim
            >>> def conditions(frame):
            ...     return {"prompt": 0.0 if frame < 100 else 1.0}
            >>> denoise = lambda latents, timesteps, prompt: 0.1 * latents + prompt
            >>> fifo = FIFO(denoise, official_ddim(2), frames=2, partitions=1)
            >>> fifo.start(torch.zeros(1, 1, 1, 2, 2))  # an image
            >>> sum(1 for frame in fifo.stream(3, conditions=conditions))
            3
        """
        op = "FIFO.stream"
        if num_frames is not None:
            _checks.integer(op, "num_frames", num_frames, least=0)
        for name, value in {"conditions": conditions, "unconditional": unconditional}.items():
            if not (value is None or isinstance(value, Mapping) or callable(value)):
                raise TypeError(f"{op}: {name} must be a dict, a function or None, got {name}={value!r}")
        draws = draws_of(generator)
        self._begun(op)
        return self._frames(num_frames, conditions, unconditional, draws)

    def bytes_sent(self) -> int:
        """How many bytes this rank hands to collectives in a step, whatever its number; warm-up from noise may differ.

        Raises:
            ValueError: there is no queue yet, on whose shape it depends.
        """
        latents = self._begun("FIFO.bytes_sent").latents
        return self._ranks.bytes_sent(_written(latents, self._windows), latents.element_size())

    def state_dict(self) -> dict[str, Any]:
        """The queue, between any two frames: tensors, numbers, strings, and lists and dicts of them.

        ``torch.load(weights_only=True)`` reads it. The same on every rank. A generator is not in it.

        Raises:
            ValueError: there is no queue yet.
            TypeError: the scheduler remembers something else.
        """
        op = "FIFO.state_dict"
        return saved(op, self._begun(op)._asdict()) | {"settings": self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, in an object with the same settings, on the device of its tensors.

        Raises:
            TypeError, ValueError: `state` is no state, or one of other settings, which are named. Nothing changes then.
        """
        self._queue = restored("FIFO.load_state_dict", state, self._settings(), self._ready, Queue)

    def _begun(self, op: str) -> Queue:
        if self._queue is None:
            raise ValueError(f"{op}: start or load_state_dict must have been called, got no frames")
        return self._queue

    def _frames(
        self, num_frames: int | None, conditions: Conditions, unconditional: Conditions, draws: Draws
    ) -> Iterator[Tensor]:
        self._ranks.agree_on_settings({**self._settings(), "num_frames": num_frames})
        made = 0
        while num_frames is None or made < num_frames:
            frame = self._advance(conditions, unconditional, draws)
            if frame is not None:
                made += 1
                yield frame

    @torch.no_grad()
    def _advance(self, conditions: Conditions, unconditional: Conditions, draws: Draws) -> Tensor | None:
        """One step of the queue; the frame that leaves, unless this is a step of the warm-up."""
        latents, steps, histories, leaves = queue = self._begun("FIFO.stream")
        is_full = steps == self._ready
        windows = self._windows
        if is_full:
            moving = list(range(self._context, len(steps)))
        else:  # frames in front are not clean yet: the window of the cleanest writes them, too
            windows = [*windows[:-1], windows[-1]._replace(write=0)]
            moving = [i for i, step in enumerate(steps) if step < self._ready[i]]
        running = [window for window in windows if any(window.write <= i < window.stop for i in moving)]
        predictions, noise = self._predictions(queue, windows, running, conditions, unconditional, draws)
        of_frame = {
            window.write + i: frame
            for window, prediction in zip(running, predictions, strict=True)
            for i, frame in enumerate(prediction.unbind(2))
        }
        stepped, after = self.scheduler.step(
            torch.stack([of_frame[i] for i in moving], 2),
            latents[:, :, moving],
            [steps[i] for i in moving],
            [histories[i] for i in moving],
            None if noise is None else noise[:, :, moving],
            draws,
        )
        slots, histories, steps = list(latents.unbind(2)), list(histories), list(steps)
        for i, frame, history in zip(moving, stepped.unbind(2), after, strict=True):
            slots[i], histories[i], steps[i] = frame, history, steps[i] + 1
        leaving = slots[self._context].clone()
        if is_full:
            slots = [*slots[1:], self.scheduler.enter(_noise(draws, leaving))]
            histories, steps = [*histories[1:], self.scheduler.history(0)], [*steps[1:], 0]
        self._queue = Queue(torch.stack(slots, 2), steps, histories, leaves + 1)
        return leaving if leaves >= 0 else None

    def _predictions(
        self,
        queue: Queue,
        windows: Sequence[Window],
        running: Sequence[Window],
        conditions: Conditions,
        unconditional: Conditions,
        draws: Draws,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Predictions ``(B, C, stop - write, H, W)`` of windows that run, from all ranks; noise of all windows."""
        latents, noise, own, error = queue.latents, None, {}, None
        given: list[Mapping[str, Any] | None] = [None, None]
        try:
            given = [_now("conditions", conditions, queue.number), _now("unconditional", unconditional, queue.number)]
            noise = self.scheduler.draw(draws, windows, latents)
            seen = [min(step, len(self.scheduler.timesteps) - 1) for step in queue.steps]
            inputs = self.scheduler.model_input(latents, seen)
            timesteps = self.scheduler.timesteps[seen].to(latents.device).expand(len(latents), -1)
            for i in self._ranks.own(len(running)):
                own[i] = self._predict(inputs, timesteps, running[i], *given)
        except Exception as problem:  # the other ranks wait for this one
            error = problem
        self._ranks.agree(error, queue.number, latents, noise, *given)
        return self._ranks.share(own, _written(latents, running), latents), noise

    def _predict(
        self,
        inputs: Tensor,
        timesteps: Tensor,
        window: Window,
        conditions: Mapping[str, Any] | None,
        unconditional: Mapping[str, Any] | None,
    ) -> Tensor:
        """The prediction, with guidance, for the frames that a window writes."""
        start, write, stop = window

        def denoise(arguments: Mapping[str, Any] | None) -> Tensor:
            latents = inputs[:, :, start:stop].clone()  # the denoiser's own: it may write into it
            prediction = self.denoise(latents, timesteps[:, start:stop].clone(), **(arguments or {}))
            _require_prediction(prediction, inputs[:, :, start:stop])
            return prediction[:, :, write - start :].clone()  # the next call may return the same memory

        prediction = denoise(conditions)
        if unconditional is None or self.guidance_scale == 1:
            return prediction
        without = denoise(unconditional)
        return without + self.guidance_scale * (prediction - without)

    def _settings(self) -> dict[str, str]:
        own = {name: str(getattr(self, name)) for name in ("frames", "partitions", "lookahead", "guidance_scale")}
        return own | {f"scheduler.{name}": value for name, value in self.scheduler.settings().items()}

    def _require_clip(self, op: str, latents: Tensor, dtype: Any, device: Any) -> None:
        _checks.tensor(op, "latents", latents, meshes=False)
        _checks.rank(op, "latents", latents, "(B, C, frames, H, W)")
        if latents.shape[2] not in (1, self.frames):
            raise ValueError(
                f"{op}: latents must have frames={self.frames} frames, or one, got latents.shape={tuple(latents.shape)}"
            )
        if dtype is not None or device is not None:
            raise ValueError(f"{op}: dtype and device must be those of latents, got {dtype=}, {device=}")

    def _require_shape(self, op: str, shape: Any) -> tuple[int, int, int, int]:
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise TypeError(f"{op}: shape must be five ints (B, C, frames, H, W), got shape={shape!r}")
        for size in shape:
            _checks.integer(op, "shape", size, least=0)
        if len(shape) != 5 or shape[2] != self.frames:
            raise ValueError(f"{op}: shape must be (B, C, frames={self.frames}, H, W), got shape={tuple(shape)}")
        batch, channels, _, height, width = shape
        return batch, channels, height, width


def _noise(draws: Draws, like: Tensor) -> Tensor:
    return draws.normal(*like.shape, device=like.device).to(like.dtype)


def _now(name: str, conditions: Conditions, frame: int) -> Mapping[str, Any] | None:
    """The conditions of the step in which this frame leaves."""
    if conditions is None or isinstance(conditions, Mapping):
        return conditions
    given = conditions(frame)
    if not isinstance(given, Mapping):
        raise TypeError(f"FIFO.stream: {name} must give a dict, got {name}({frame})={given!r}")
    return given


def _written(latents: Tensor, windows: Sequence[Window]) -> list[torch.Size]:
    """The shapes of the predictions that windows write."""
    batch, channels, _, height, width = latents.shape
    return [torch.Size((batch, channels, stop - write, height, width)) for _, write, stop in windows]


def _require_prediction(prediction: object, latents: Tensor) -> None:
    op = "FIFO"
    if not isinstance(prediction, Tensor):
        raise TypeError(f"{op}: denoise must return a tensor, got {type(prediction).__name__}")
    if prediction.shape != latents.shape:
        raise ValueError(
            f"{op}: denoise must return the shape of its latents {tuple(latents.shape)}, "
            f"got prediction.shape={tuple(prediction.shape)}"
        )
    if prediction.dtype != latents.dtype:
        raise TypeError(
            f"{op}: denoise must return the dtype of its latents ({latents.dtype}), "
            f"got prediction.dtype={prediction.dtype}"
        )
    if prediction.device != latents.device:
        raise ValueError(
            f"{op}: denoise must return its prediction on the device of its latents ({latents.device}), "
            f"got prediction.device={prediction.device}"
        )
