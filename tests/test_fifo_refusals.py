"""What the queue of FIFO-Diffusion refuses, by name, and before anything runs."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.test_fifo import clip, denoise
from tests.test_fifo import started as started_queue
from vattn.models.fifo import FIFO
from vattn.models.fifo import official_ddim as ddim

official_ddim: Any = ddim


def started() -> Any:
    return started_queue()


def make(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "denoise": denoise,
        "scheduler": official_ddim(8),
        "frames": 4,
        "partitions": 2,
    } | changes
    return FIFO(arguments.pop("denoise"), arguments.pop("scheduler"), **arguments)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "denoise": (lambda: make(denoise=3), TypeError, "FIFO: denoise must be callable, got denoise=3"),
    "frames": (lambda: make(frames=0), ValueError, "FIFO: frames must be at least 1, got frames=0"),
    "frames type": (lambda: make(frames=4.0), TypeError, "FIFO: frames must be an int, got frames=4.0"),
    "partitions": (lambda: make(partitions=0), ValueError, "FIFO: partitions must be at least 1, got partitions=0"),
    "lookahead": (lambda: make(lookahead=1), TypeError, "FIFO: lookahead must be a bool, got lookahead=1"),
    "scale": (lambda: make(guidance_scale=float("nan")), ValueError, "FIFO: guidance_scale must be at least 0, got"),
    "scale type": (lambda: make(guidance_scale="2"), TypeError, "FIFO: guidance_scale must be a number, got"),
    "levels": (
        lambda: make(partitions=3),
        ValueError,
        "scheduler must have frames * partitions = 12 timesteps (see its set_timesteps), got",
    ),
    "no scheduler": (
        lambda: make(scheduler="ddim"),
        TypeError,
        "scheduler must be official_ddim(...) or a scheduler of diffusers after",
    ),
    "group": (lambda: make(group="world"), TypeError, "FIFO: group must be a ProcessGroup, a DeviceMesh or None, got"),
    "start": (lambda: make().start(), ValueError, "FIFO.start: one of latents and shape must be given, got neither"),
    "start both": (lambda: make().start(clip(4), shape=(1, 2, 4, 3, 2)), ValueError, "must be given, got both"),
    "clip type": (lambda: make().start([1.0]), TypeError, "FIFO.start: latents must be a torch.Tensor"),
    "clip dtype": (lambda: make().start(clip(4).int()), TypeError, "FIFO.start: latents must be float32, bfloat16"),
    "clip axes": (
        lambda: make().start(clip(4)[0]),
        ValueError,
        "FIFO.start: latents must have shape (B, C, frames, H, W)",
    ),
    "clip frames": (
        lambda: make().start(clip(5)),
        ValueError,
        "FIFO.start: latents must have frames=4 frames, or one, got latents.shape=(1, 2, 5, 3, 2)",
    ),
    "clip and dtype": (
        lambda: make().start(clip(4), dtype=torch.half),
        ValueError,
        "dtype and device must be those of",
    ),
    "shape": (
        lambda: make().start(shape=(1, 2, 5, 3, 2)),
        ValueError,
        "FIFO.start: shape must be (B, C, frames=4, H, W), got",
    ),
    "shape type": (lambda: make().start(shape=7), TypeError, "FIFO.start: shape must be five ints"),
    "shape size": (lambda: make().start(shape=(1, 2, 4, 3, -2)), ValueError, "FIFO.start: shape must be at least 0"),
    "noise dtype": (
        lambda: make().start(shape=(1, 2, 4, 3, 2), dtype=torch.int32),
        TypeError,
        "FIFO.start: dtype must be",
    ),
    "generator": (
        lambda: make().start(clip(4), generator=3),
        TypeError,
        "generator must be a torch.Generator, Draws or None",
    ),
    "no start": (lambda: make().stream(), ValueError, "FIFO.stream: start or load_state_dict must have been called"),
    "no state": (lambda: make().state_dict(), ValueError, "FIFO.state_dict: start or load_state_dict must have been"),
    "no bytes": (lambda: make().bytes_sent(), ValueError, "FIFO.bytes_sent: start or load_state_dict must have been"),
    "num_frames": (
        lambda: started().stream(-1),
        ValueError,
        "FIFO.stream: num_frames must be at least 0, got num_frames=-1",
    ),
    "num_frames type": (lambda: started().stream(2.0), TypeError, "FIFO.stream: num_frames must be an int, got"),
    "conditions": (
        lambda: started().stream(conditions=3),
        TypeError,
        "FIFO.stream: conditions must be a dict, a function or",
    ),
    "unconditional": (
        lambda: started().stream(unconditional=[]),
        TypeError,
        "FIFO.stream: unconditional must be a dict, a",
    ),
    "stream generator": (
        lambda: started().stream(generator=3),
        TypeError,
        "generator must be a torch.Generator, Draws or",
    ),
    "steps": (lambda: official_ddim(0), ValueError, "official_ddim: steps must be at least 1, got steps=0"),
    "eta": (lambda: official_ddim(8, eta=3.0), ValueError, "official_ddim: eta must add no more noise than there is"),
    "negative eta": (
        lambda: official_ddim(8, eta=-0.1),
        ValueError,
        "official_ddim: eta must be at least 0, got eta=-0.1",
    ),
    "betas": (
        lambda: official_ddim(8, linear_end=2),
        ValueError,
        "official_ddim: linear_end must be at least 0 and at most 1",
    ),
    "table": (
        lambda: official_ddim(8, alphas_cumprod=[1.0]),
        TypeError,
        "official_ddim: alphas_cumprod must be a torch.Tensor",
    ),
    "table axes": (
        lambda: official_ddim(8, alphas_cumprod=torch.ones(2, 2)),
        ValueError,
        "official_ddim: alphas_cumprod must have",
    ),
    "table without noise": (
        lambda: official_ddim(8, linear_start=0.0),
        ValueError,
        "official_ddim: alphas_cumprod, given or of linear_start and linear_end, must be above 0 and below 1, got",
    ),
    "table of nothing": (
        lambda: official_ddim(8, alphas_cumprod=torch.ones(0)),
        ValueError,
        "must be above 0 and below 1, got none",
    ),
    "table of NaN": (
        lambda: official_ddim(8, alphas_cumprod=torch.full((8,), torch.nan)),
        ValueError,
        "must be above 0 and below 1, got from nan to nan",
    ),
    "table that grows": (
        lambda: official_ddim(8, alphas_cumprod=torch.linspace(0.25, 0.75, 8)),
        ValueError,
        "alphas_cumprod must not grow with the timestep, got alphas_cumprod[0]=0.25 and alphas_cumprod[-1]=0.75",
    ),
    "noise": (
        lambda: official_ddim(2).step(clip(1), clip(1), [0]),
        ValueError,
        "OfficialDDIM.step: noise must be given unless eta is 0, got eta=1.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
