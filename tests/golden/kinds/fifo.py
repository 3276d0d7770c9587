"""The kinds ``fifo_*``: vectors of the official code of FIFO-Diffusion, with a toy denoiser."""

import itertools
import re
from typing import Any

import torch
from torch import Tensor

from tests.golden.replay import Replay
from vattn.models.fifo import FIFO, OfficialDDIM, official_ddim

BETAS = {"vc2": (0.00085, 0.012), "default": (1e-4, 2e-2)}
"""Of VideoCrafter2, whose betas the vectors with frames have, and of the function that makes them."""


class _Enough(Exception):
    """The official loop ends here."""


class _Denoiser:
    """``A x + m mean_over_frames(x) + t / 1000 b + cond``, which remembers what it was called with."""

    def __init__(self, golden: Any) -> None:
        self.A, self.m, self.b = golden["A"], golden["m"], golden["b"]
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Tensor) -> Tensor:
        self.calls.append((latents, timesteps))
        in_time = timesteps.to(latents.dtype)[:, None, :, None, None] / 1000 * self.b[:, None, None, None]
        mixed = torch.einsum("dc,bcfhw->bdfhw", self.A, latents)
        return mixed + self.m * latents.mean(2, keepdim=True) + in_time + cond

    def guided(self, latents: Tensor, timesteps: Tensor, conditions: "_Conditions") -> Tensor:
        prediction = self(latents, timesteps, conditions.cond)
        if conditions.scale == 1 or conditions.uncond is None:
            return prediction
        without = self(latents, timesteps, conditions.uncond)
        return without + conditions.scale * (prediction - without)


class _Conditions:
    def __init__(self, golden: Any, cond: Tensor, scale: float | None) -> None:
        self.cond, self.scale = cond, 1.0 if scale is None else scale
        uncond = golden["uncond"] if "uncond" in golden.arrays else None
        self.uncond = None if uncond is None or not uncond.numel() else uncond  # an empty array stands for None


def fifo_schedule(golden: Any) -> None:
    for name in golden.names():
        match = re.fullmatch(r"(\w+)/n(\d+)/eta([\d.]+)/(sigmas|alphas|alphas_prev)", name)
        if match:
            model, steps, eta, array = match.groups()
            assert int(steps) in golden.meta["nsteps"] and float(eta) in golden.meta["etas"]
            table = torch.from_numpy(golden.arrays[f"{model}/alphas_cumprod"])
            scheduler = official_ddim(int(steps), eta=float(eta), alphas_cumprod=table)
            golden.close(name, getattr(scheduler, array).flip(0), atol=1e-9)
        elif match := re.fullmatch(r"\w+/n(\d+)/timesteps", name):
            golden.equal(name, official_ddim(int(match[1])).timesteps.flip(0))
        elif match := re.fullmatch(r"(\w+)/(?:betas|alphas_cumprod)", name):
            _check_table(golden, match[1])


def _check_table(golden: Any, model: str) -> None:
    """Betas, and their products, of a model; the file may have none of some."""
    betas, products = golden[f"{model}/betas"], golden.arrays.get(f"{model}/alphas_cumprod")
    if not len(betas):
        assert products is None
        return
    if model in BETAS:
        start, end = BETAS[model]
        levels = len(betas)
        scheduler = official_ddim(levels, eta=0.0, linear_start=start, linear_end=end, num_train_timesteps=levels)
        golden.close(f"{model}/alphas_cumprod", scheduler.alphas.flip(0), atol=1e-7)  # of a model, which has float32
    own = (1 - torch.from_numpy(golden.arrays[f"{model}/betas"])).cumprod(0)
    golden.close(f"{model}/alphas_cumprod", own, atol=1e-9)


def fifo_base_ddim(golden: Any) -> None:
    meta = golden.meta
    scheduler = official_ddim(meta["S"], eta=meta["eta"] or 0.0)
    _check_coefficients(golden, scheduler)
    denoise = _Denoiser(golden)
    conditions = _Conditions(golden, torch.tensor(meta["cond"], dtype=golden.dtype), meta["cfg"])
    latents, noises = golden["x_T"], golden["noise"]
    scales = _scales(golden, scheduler) if meta.get("use_scale") else None
    for step, time in enumerate(scheduler.timesteps):
        timesteps = time.expand(latents.shape[0], latents.shape[2])
        prediction = denoise.guided(latents, timesteps, conditions)
        noise = noises[step] if noises.numel() else torch.zeros_like(latents)
        steps = [step] * latents.shape[2]
        after, _ = scheduler.step(prediction, latents, steps, noise=noise)
        if scales is not None:
            now, later = (scale[step] for scale in scales)
            clean = scheduler.clean(prediction, latents, steps)
            after = after + (later / now - 1) * scheduler.alphas_prev[step].sqrt().to(golden.dtype) * clean
        latents = after
    golden.close("out", latents, atol=1e-5 if golden.dtype == torch.float64 else _tolerance(golden, "out"))


def _scales(golden: Any, scheduler: OfficialDDIM) -> tuple[Tensor, Tensor]:
    """What VideoCrafter's sampler divides clean latents by, and multiplies them with: the queue does neither."""
    if "ddim_scale_arr" in golden.arrays:
        return golden["ddim_scale_arr"].flip(0), golden["ddim_scale_arr_prev"].flip(0)
    if "scale_arr" in golden.arrays:
        table = golden["scale_arr"]
    else:  # of VideoCrafter2
        table = torch.cat([torch.linspace(1.0, 0.7, 400), torch.full((600,), 0.7)]).to(golden.dtype)
    times = scheduler.timesteps
    return table[times], table[torch.cat([times[1:], times[-1:]])]


def fifo_queue(golden: Any) -> None:
    meta = golden.meta
    frames, levels, iterations = meta["f"], meta["f"] * meta["n"], meta["iterations"]
    scheduler = official_ddim(levels, eta=meta["eta"] or 0.0)
    _check_coefficients(golden, scheduler)
    conditions, denoise = _Conditions(golden, golden["cond"], meta["cfg_scale"]), _Denoiser(golden)
    guidance = {} if meta["cfg_scale"] is None else {"guidance_scale": meta["cfg_scale"]}
    fifo = FIFO(denoise, scheduler, frames=frames, partitions=meta["n"], lookahead=bool(meta["lookahead"]), **guidance)
    video, parts, noises = golden["video"], golden["part_indices"], golden["step_noise"]
    if not noises.numel():  # drawn, and multiplied by 0
        noises = torch.zeros(iterations, len(parts), *video.shape, dtype=video.dtype)
    of_steps = [list(noises[i].movedim(3, 1).flatten(0, 1)) for i in range(iterations)]
    entering = golden["enqueued_noise"]
    recorded = Replay(
        normals=[
            *golden["init_noise"].unbind(2),
            *itertools.chain(*([*of_steps[i], entering[i]] for i in range(iterations))),
        ]
    )
    tolerance = _tolerance(golden, "queue_after_denoise")
    fifo.start(video, generator=recorded)
    queue = fifo.state_dict()["latents"]
    golden.close("init_latents", queue, atol=_tolerance(golden, "init_latents"))

    step, moved = scheduler.step, []

    def record(*arguments: Any) -> Any:
        result = step(*arguments)
        moved.append(result[0])
        return result

    scheduler.step = record  # type: ignore[assignment, method-assign]
    told: list[int] = []

    def until_the_end(frame: int) -> dict[str, Tensor]:
        if len(told) == iterations:
            raise _Enough
        told.append(frame)
        return {"cond": conditions.cond}

    yielded = []
    unconditional = None if conditions.uncond is None else {"cond": conditions.uncond}
    try:
        for latent in fifo.stream(conditions=until_the_end, unconditional=unconditional, generator=recorded):
            yielded.append(latent)
    except _Enough:
        pass
    recorded.assert_used_up("the queue")
    scheduler.step = step  # type: ignore[method-assign]
    assert told == list(range(frames - levels, frames - levels + iterations))

    after, context = [], queue.shape[2] - levels
    front = queue[:, :, :context]
    for frames_of_step in moved:
        after.append(torch.cat([front, frames_of_step], 2))
        front = after[-1][:, :, 1 : context + 1]
    golden.close("queue_after_denoise", torch.stack(after), atol=tolerance)
    golden.close("dequeued", torch.stack([x[:, :, context] for x in after], 2), atol=tolerance)
    assert len(yielded) == max(0, iterations - levels + frames)
    for expected, latent in zip(after[levels - frames :], yielded, strict=True):
        assert torch.equal(latent, expected[:, :, context])

    per_part = len(denoise.calls) // (iterations * len(parts))
    first = [timesteps for _, timesteps in denoise.calls[: len(parts) * per_part : per_part]]
    for timesteps, of_part in zip(first, golden["part_timesteps"], strict=True):
        assert torch.equal(timesteps, of_part.expand_as(timesteps))
    assert torch.equal(golden["ddim_timesteps"][parts], golden["part_timesteps"])
    for name in golden.names():
        if match := re.fullmatch(r"iter(\d+)/part(\d+)/in", name):
            i, part = int(match[1]), int(match[2])
            golden.close(name, denoise.calls[(i * len(parts) + part) * per_part][0], atol=tolerance)
            _check_part(
                golden, f"iter{i}/part{part}/", scheduler, denoise, conditions, part, noises[i, part], tolerance
            )


def _tolerance(golden: Any, name: str) -> float:
    """1e-9 in float64, and 1e-5 in float32, of the largest value."""
    return (1e-9 if golden.dtype == torch.float64 else 1e-5) * float(golden[name].abs().max())


def _check_part(
    golden: Any, prefix: str, scheduler: OfficialDDIM, denoise: _Denoiser, conditions: _Conditions, part: int,
    noise: Tensor, tolerance: float,
) -> None:  # fmt: skip
    """All frames of a window, also those that the queue does not take."""
    latents, timesteps = golden[f"{prefix}in"], golden["part_timesteps"][part]
    prediction = denoise.guided(latents, timesteps.expand(len(latents), -1), conditions)
    steps = (len(scheduler.timesteps) - 1 - golden["part_indices"][part]).tolist()
    golden.close(f"{prefix}out", scheduler.step(prediction, latents, steps, noise=noise)[0], atol=tolerance)
    golden.close(f"{prefix}pred_x0", scheduler.clean(prediction, latents, steps), atol=tolerance)


def _check_coefficients(golden: Any, scheduler: OfficialDDIM) -> None:
    golden.equal("ddim_timesteps", scheduler.timesteps.flip(0))
    for name in ("alphas", "alphas_prev", "sigmas", "sqrt_one_minus_alphas"):
        if f"ddim_{name}" in golden.arrays:
            golden.close(f"ddim_{name}", getattr(scheduler, name).flip(0), atol=1e-12)
