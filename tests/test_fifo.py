"""The queue of FIFO-Diffusion: the official loop, warm-up, windows in any order, conditions, and state."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.svitt_models import seed
from vattn.models.fifo import FIFO, OfficialDDIM, official_ddim
from vattn.models.seeded_draws import SeededDraws

SIZES = {
    "f4 n2": (4, 2, False), "f4 n2 lookahead": (4, 2, True), "f5 n2 lookahead": (5, 2, True),
    "f3 n1 lookahead": (3, 1, True), "f1 n1": (1, 1, False), "f1 n3": (1, 3, False), "f1 n3 lookahead": (1, 3, True),
    "f5 n1": (5, 1, False), "f2 n1 lookahead": (2, 1, True),
}  # fmt: skip
"""Frames, partitions, lookahead."""

TABLE = torch.linspace(0.99, 0.1, 1000, dtype=torch.float64) ** 2
"""Products of ``1 - beta``, in which the coefficients of float64 are not rounded to float32."""


def denoise(latents: Tensor, timesteps: Tensor, cond: float = 0.0) -> Tensor:
    """Every frame depends on all of its window, on its place there, and on its timestep."""
    place = torch.arange(latents.shape[2], dtype=latents.dtype)[:, None, None]
    times = timesteps.to(latents.dtype)[:, None, :, None, None] / 1000
    return (0.3 * latents.roll(1, 1) + 0.2 * latents.mean(2, keepdim=True) + 0.1 * place + times + cond).sin()


def alone(latents: Tensor, timesteps: Tensor) -> Tensor:
    """Every frame depends on itself alone."""
    return (0.5 * latents + timesteps.to(latents.dtype)[:, None, :, None, None] / 2000).sin()


def queue_of(sizes: str = "f4 n2", model: Callable[..., Tensor] = denoise, eta: float = 1.0, **settings: Any) -> FIFO:
    frames, partitions, lookahead = SIZES[sizes]
    scheduler = official_ddim(frames * partitions, eta=eta)
    return FIFO(model, scheduler, frames=frames, partitions=partitions, lookahead=lookahead, **settings)


def clip(frames: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 2, frames, 3, 2, generator=seed(8)).to(dtype)


def started(sizes: str = "f4 n2", batch: int = 1, **settings: Any) -> FIFO:
    fifo = queue_of(sizes, **settings)
    fifo.start(clip(fifo.frames, batch), generator=seed(0))
    return fifo


def official_loop(
    video: Tensor, frames: int, partitions: int, lookahead: bool, eta: float, scale: float, new_frames: int
) -> Iterator[Tensor]:
    """The official loop, in its order and in place, with torch's own generator; odd windows as in its Open-Sora code.

    Windows run from the noisiest on: each writes what none of the later ones reads.
    """
    levels, half = frames * partitions, frames // 2
    times = [round(i * (999 / max(levels - 1, 1))) for i in range(levels)]
    alphas = TABLE[times]
    alphas_prev = torch.cat([TABLE[:1], alphas[:-1]])
    sigmas = eta * ((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev)).sqrt()
    indices = [0] * (half if lookahead else 0) + list(range(levels))
    context = len(indices) - levels
    queue = []
    for place, index in enumerate(indices):
        frame = video[:, :, max(0, place - context - (levels - frames))]
        a = alphas[index].item()
        queue.append(a**0.5 * frame + (1 - a) ** 0.5 * torch.randn(frame.shape).double())
    for _ in range(levels - frames + new_frames):
        for rank in reversed(range(2 * partitions if lookahead else partitions)):
            if lookahead:
                start = rank // 2 * frames + rank % 2 * half
                middle = start + half + (rank % 2) * (frames % 2)
            else:
                start = middle = rank * frames
            if middle == start + frames:
                continue
            window = torch.stack(queue[start : start + frames], 2)
            step_times = torch.tensor([times[i] for i in indices[start : start + frames]]).expand(len(video), -1)
            noise = denoise(window, step_times, 0.4)
            if scale != 1:
                without = denoise(window, step_times, 0.1)
                noise = without + scale * (noise - without)
            for i in range(start, start + frames):
                a, ap, s = (x[indices[i]].item() for x in (alphas, alphas_prev, sigmas))
                x, e = queue[i] if i < middle else window[:, :, i - start], noise[:, :, i - start]
                clean = (x - (1 - a) ** 0.5 * e) / a**0.5
                drawn = torch.randn(x.shape).double()
                if i >= middle:
                    queue[i] = ap**0.5 * clean + (1 - ap - s**2) ** 0.5 * e + s * drawn
        yield queue[context]
        queue = [*queue[1:], torch.randn(queue[0].shape).double()]


@pytest.mark.parametrize("eta, scale", [(0.0, 1.0), (1.0, 1.0), (0.5, 3.0)])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_seed_of_torch_makes_the_official_video(sizes: str, eta: float, scale: float) -> None:
    frames, partitions, lookahead = SIZES[sizes]
    video = clip(frames, batch=2, dtype=torch.float64)
    torch.manual_seed(5)
    expected = list(official_loop(video, frames, partitions, lookahead, eta, scale, new_frames=6))[-6:]
    scheduler = official_ddim(frames * partitions, eta=eta, alphas_cumprod=TABLE)
    fifo = FIFO(denoise, scheduler, frames=frames, partitions=partitions, lookahead=lookahead, guidance_scale=scale)
    torch.manual_seed(5)
    fifo.start(video)
    frames_made = list(fifo.stream(6, conditions={"cond": 0.4}, unconditional={"cond": 0.1}))
    torch.testing.assert_close(torch.stack(frames_made), torch.stack(expected), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("start", ["clip", "noise"])
@pytest.mark.parametrize("sizes", SIZES)
def test_partitions_run_in_any_order(sizes: str, start: str) -> None:
    frames = SIZES[sizes][0]

    def run(order: Callable[[int], Any] | None) -> Tensor:
        fifo = queue_of(sizes)
        if order is not None:
            fifo._ranks.own = order  # type: ignore[assignment, method-assign]
        start_of = {"latents": clip(frames)} if start == "clip" else {"shape": (1, 2, frames, 3, 2)}
        fifo.start(**start_of, generator=seed(0))
        return torch.stack(list(fifo.stream(5, generator=seed(1))))

    expected = run(None)
    assert torch.equal(run(lambda count: list(reversed(range(count)))), expected)
    assert torch.equal(run(lambda count: torch.randperm(count, generator=seed(count)).tolist()), expected)


def test_the_windows_of_lookahead_and_what_they_are_told() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def model(latents: Tensor, timesteps: Tensor) -> Tensor:
        calls.append((latents, timesteps))
        return denoise(latents, timesteps)

    fifo = queue_of("f5 n2 lookahead", model)
    fifo.start(clip(5), generator=seed(0))
    before = fifo.state_dict()["latents"]
    next(fifo.stream(1, generator=seed(1)))
    times = [0, 0, *official_ddim(10).timesteps.flip(0).tolist()]
    starts = [7, 5, 2, 0]
    for start, (latents, timesteps) in zip(starts, calls[: len(starts)], strict=True):
        assert timesteps.tolist() == [times[start : start + 5]]
        assert torch.equal(latents, before[:, :, start : start + 5])


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("frames, partitions", [(4, 2), (3, 2), (1, 3), (5, 1), (1, 1)])
def test_from_noise_each_frame_is_one_of_ordinary_sampling(frames: int, partitions: int, lookahead: bool) -> None:
    """A denoiser that sees single frames makes of each noise what DDIM alone makes of it."""
    levels, context = frames * partitions, frames // 2 if lookahead else 0
    scheduler = official_ddim(levels, eta=0.0)
    told: list[int] = []
    entered: list[Tensor] = []

    def conditions(frame: int) -> dict[str, Any]:
        told.append(frame)
        return {}

    def enter(noise: Tensor) -> Tensor:
        entered.append(noise)
        return noise

    scheduler.enter = enter  # type: ignore[method-assign]

    fifo = FIFO(alone, scheduler, frames=frames, partitions=partitions, lookahead=lookahead)
    fifo.start(shape=(2, 2, frames, 3, 2), dtype=torch.float64, generator=seed(0))
    warm_up = levels - 1 + (context > 0)
    video = list(fifo.stream(levels + 3, conditions=conditions, generator=seed(1)))
    assert told == list(range(-warm_up, levels + 3))
    for noise, frame in zip(entered[context:], video, strict=False):
        x = noise[:, :, None]
        for step, time in enumerate(scheduler.timesteps):
            x, _ = scheduler.step(alone(x, time.expand(2, 1)), x, [step])
        torch.testing.assert_close(frame, x[:, :, 0], atol=1e-12, rtol=1e-12)


class CountedSteps(OfficialDDIM):
    """Frames that are the number of steps they have taken."""

    def enter(self, noise: Tensor) -> Tensor:
        return torch.zeros_like(noise)

    def step(self, predictions: Tensor, latents: Tensor, steps: Any, *rest: Any) -> Any:
        return latents + 1, [{} for _ in steps]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_timestep_is_that_of_the_steps_which_a_frame_has_taken(sizes: str) -> None:
    frames, partitions, lookahead = SIZES[sizes]
    levels = frames * partitions

    def model(latents: Tensor, timesteps: Tensor) -> Tensor:
        taken = latents[0, 0, :, 0, 0].long().clamp(max=levels - 1)  # frames that are done stand by as context
        assert torch.equal(timesteps[0], scheduler.timesteps[taken])
        return latents

    scheduler = CountedSteps(official_ddim(levels).timesteps, TABLE, 1.0)
    fifo = FIFO(model, scheduler, frames=frames, partitions=partitions, lookahead=lookahead)
    fifo.start(shape=(1, 1, frames, 1, 1), generator=seed(0))
    assert [frame.item() for frame in fifo.stream(levels + 2, generator=seed(1))] == [levels] * (levels + 2)


def test_an_image_is_a_clip_that_repeats_it() -> None:
    image = clip(1)
    videos = []
    for latents in (image, image.expand(-1, -1, 4, -1, -1)):
        fifo = queue_of("f4 n2 lookahead")
        fifo.start(latents, generator=seed(0))
        videos.append(torch.stack(list(fifo.stream(4, generator=seed(1)))))
    assert torch.equal(*videos)


def test_conditions_switch_at_the_frame_that_leaves() -> None:
    told, used = [], []

    def model(latents: Tensor, timesteps: Tensor, prompt: str) -> Tensor:
        used.append(prompt)
        return 0.1 * latents

    def prompts(frame: int) -> dict[str, str]:
        told.append(frame)
        return {"prompt": "a lake" if frame < 3 else "a storm"}

    fifo = started("f4 n2", model=model)
    yielded = []
    for _ in fifo.stream(5, conditions=prompts, generator=seed(1)):
        yielded.append((told[-1], used[-1]))
    assert told == [-4, -3, -2, -1, 0, 1, 2, 3, 4]  # 8 levels, the last 4 of which the clip takes
    assert yielded == [(0, "a lake"), (1, "a lake"), (2, "a lake"), (3, "a storm"), (4, "a storm")]
    assert used == ["a lake"] * 14 + ["a storm"] * 4
    for _ in fifo.stream(2, conditions=prompts, generator=seed(1)):
        pass
    assert told[-2:] == [5, 6], "frames are counted on"


@pytest.mark.parametrize(
    "scale, unconditional, calls",
    [(1.0, {}, 1), (2.0, None, 1), (2.0, {}, 2), (0.0, {}, 2), (2.0, lambda frame: {}, 2)],
)
def test_guidance_is_skipped_where_it_does_nothing(scale: float, unconditional: Any, calls: int) -> None:
    count = 0

    def model(latents: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return 0.1 * latents

    fifo = started("f5 n1", model=model, guidance_scale=scale)
    next(fifo.stream(1, unconditional=unconditional, generator=seed(1)))
    assert count == calls


def test_a_second_stream_goes_on_without_warm_up() -> None:
    expected = list(started().stream(9, generator=seed(1)))
    fifo, generator = started(), seed(1)
    calls: list[Tensor] = []
    for num_frames in (0, 2, 3):
        calls += fifo.stream(num_frames, generator=generator)
    left = fifo.stream(generator=generator)  # endless
    calls += [next(left), next(left)]
    left.close()  # type: ignore[attr-defined]
    calls += fifo.stream(2, generator=generator)
    assert torch.equal(torch.stack(calls), torch.stack(expected))


def test_no_frames_are_no_steps() -> None:
    def model(latents: Tensor, timesteps: Tensor) -> Tensor:
        raise AssertionError("nothing was asked for")

    fifo = started(model=model)
    before = fifo.state_dict()
    assert list(fifo.stream(0)) == []
    assert torch.equal(fifo.state_dict()["latents"], before["latents"])


def test_start_begins_anew() -> None:
    fifo = started()
    first = list(fifo.stream(3, generator=seed(1)))
    fifo.start(clip(4), generator=seed(0))
    assert torch.equal(torch.stack(list(fifo.stream(3, generator=seed(1)))), torch.stack(first))


@pytest.mark.parametrize("how", ["raises", "shape", "not a tensor", "dtype", "conditions"])
def test_a_step_that_fails_changes_nothing(how: str) -> None:
    fails = False

    def model(latents: Tensor, timesteps: Tensor) -> Any:
        if not fails:
            return denoise(latents, timesteps)
        if how == "raises":
            raise KeyError("weights")
        return {"shape": latents[:, :, 1:], "not a tensor": (latents,), "dtype": latents.double()}[how]

    message = {
        "raises": (KeyError, "weights"),
        "shape": (ValueError, "FIFO: denoise must return the shape of its latents (1, 2, 4, 3, 2), got"),
        "not a tensor": (TypeError, "FIFO: denoise must return a tensor, got tuple"),
        "dtype": (TypeError, "FIFO: denoise must return the dtype of its latents (torch.float32), got"),
        "conditions": (TypeError, "FIFO.stream: conditions must give a dict, got conditions(2)=None"),
    }
    fifo = started(model=model)
    generator = seed(1)
    list(fifo.stream(2, generator=generator))
    state, drawn = fifo.state_dict(), generator.get_state()
    fails = how != "conditions"
    kind, text = message[how]
    with pytest.raises(kind, match=re.escape(text)):
        next(fifo.stream(conditions=(lambda frame: None) if how == "conditions" else None, generator=generator))  # type: ignore[arg-type,return-value]
    fails = False
    assert torch.equal(fifo.state_dict()["latents"], state["latents"])
    generator.set_state(drawn)
    expected = list(started().stream(4, generator=seed(1)))[2:]
    assert torch.equal(torch.stack(list(fifo.stream(2, generator=generator))), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    fifo = queue_of("f4 n2 lookahead")
    fifo.start(clip(4, dtype=dtype), generator=seed(0))
    video = torch.stack(list(fifo.stream(3, generator=seed(1))))
    assert video.dtype == dtype
    exact = queue_of("f4 n2 lookahead")
    exact.start(clip(4, dtype=dtype).double(), generator=seed(0))
    expected = torch.stack(list(exact.stream(3, generator=seed(1))))
    error = (video.double() - expected).abs().max() / expected.abs().max()
    assert error <= 20 * torch.finfo(dtype).eps


def test_the_device_of_latents_is_not_that_of_the_generator() -> None:
    fifo = queue_of("f4 n2 lookahead", alone)
    fifo.start(torch.empty(1, 2, 4, 3, 2, device="meta"), generator=seed(0))
    assert next(fifo.stream(generator=seed(1))).is_meta
    fifo.start(shape=(1, 2, 4, 3, 2), device="meta", dtype=torch.float16, generator=seed(0))
    frame = next(fifo.stream(generator=seed(1)))
    assert frame.is_meta and frame.dtype == torch.float16


@pytest.mark.parametrize("shape", [(0, 2, 4, 3, 2), (1, 2, 4, 0, 2)])
def test_empty_latents(shape: tuple[int, ...]) -> None:
    fifo = queue_of()
    fifo.start(torch.zeros(shape))
    assert next(fifo.stream()).shape == (*shape[:2], *shape[3:])


def test_seeds_and_other_draws() -> None:
    videos = []
    for _ in range(2):
        fifo = queue_of()
        fifo.start(clip(4), generator=SeededDraws(3))
        videos.append(torch.stack(list(fifo.stream(3, generator=SeededDraws(4)))))
    assert torch.equal(*videos)


def test_not_a_number_stays_with_its_frame() -> None:
    fifo = queue_of("f4 n2", alone)
    latents = clip(4)
    latents[:, :, 2] = torch.nan
    fifo.start(latents, generator=seed(0))
    finite = [bool(frame.isfinite().all()) for frame in fifo.stream(6, generator=seed(1))]
    assert finite == [True, True, False, True, True, True]


def test_no_graph_is_built_and_gradients_stay_on_outside() -> None:
    layer = nn.Conv3d(2, 2, 1)
    fifo = started(model=lambda latents, timesteps: layer(latents))
    latents = clip(4).requires_grad_()
    fifo.start(latents, generator=seed(0))
    for frame in fifo.stream(2, generator=seed(1)):
        assert torch.is_grad_enabled() and not frame.requires_grad
    assert not fifo.state_dict()["latents"].requires_grad
    with torch.inference_mode():
        list(fifo.stream(1, generator=seed(1)))
    assert not next(fifo.stream(generator=seed(1))).requires_grad


@pytest.mark.parametrize("sizes", ["f5 n1", "f4 n2 lookahead"])
def test_what_is_given_away_may_be_written_to(sizes: str) -> None:
    """The denoiser may write into its input, the caller into a frame; the latents of the caller are only read."""

    def careless(latents: Tensor, timesteps: Tensor) -> Tensor:
        prediction = denoise(latents, timesteps)
        latents.fill_(torch.nan)
        timesteps.fill_(-1)
        return prediction

    expected = list(started(sizes).stream(6, unconditional={}, generator=seed(1)))
    fifo = queue_of(sizes, careless, guidance_scale=1.0)
    latents = clip(fifo.frames)
    fifo.start(latents, generator=seed(0))
    for frame, other in zip(fifo.stream(6, unconditional={}, generator=seed(1)), expected, strict=True):
        assert torch.equal(frame, other)
        frame.fill_(torch.nan)
    assert torch.equal(latents, clip(fifo.frames))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_denoiser_may_return_the_same_memory_each_time(scale: float) -> None:
    """As a compiled one may, or one that writes into a buffer of its own."""
    buffer = torch.empty(1, 2, 4, 3, 2)

    def buffered(latents: Tensor, timesteps: Tensor, cond: float) -> Tensor:
        return buffer.copy_(denoise(latents, timesteps, cond))

    videos = []
    for model in (denoise, buffered):
        fifo = started("f4 n2 lookahead", model=model, guidance_scale=scale)
        frames = fifo.stream(4, conditions={"cond": 0.4}, unconditional={"cond": 0.1}, generator=seed(1))
        videos.append(torch.stack(list(frames)))
    assert torch.equal(*videos)


def test_the_queue_holds_no_more_than_its_frames() -> None:
    fifo = started("f4 n2 lookahead")
    stream = fifo.stream(generator=seed(1))
    for frame in itertools.islice(stream, 12):
        assert frame.untyped_storage().nbytes() == frame.numel() * 4
        latents = fifo._queue.latents  # type: ignore[union-attr]
        assert latents.untyped_storage().nbytes() == latents.numel() * 4


def test_the_state_is_that_of_the_settings() -> None:
    fifo = started()
    list(fifo.stream(2, generator=seed(1)))
    state = fifo.state_dict()
    other = queue_of("f4 n2", guidance_scale=1.0)
    other.load_state_dict(state)
    generators = []
    for queue in (fifo, other):
        generators.append(torch.stack(list(queue.stream(3, generator=seed(2)))))
    assert torch.equal(*generators)
    for sizes, settings, name in (
        ("f4 n2 lookahead", {}, "lookahead"),
        ("f1 n3", {}, "frames"),
        ("f4 n2", {"guidance_scale": 2.0}, "guidance_scale"),
        ("f4 n2", {"eta": 0.5}, "scheduler.eta"),
    ):
        with pytest.raises(ValueError, match=f"FIFO.load_state_dict: {name} must be .* as it is here, got {name}="):
            queue_of(sizes, **settings).load_state_dict(state)  # type: ignore[arg-type]


def test_a_state_may_be_written_to() -> None:
    fifo = started()
    state, expected = fifo.state_dict(), list(started().stream(3, generator=seed(1)))
    for _ in range(2):
        state["latents"].fill_(torch.nan)
        assert torch.equal(torch.stack(list(fifo.stream(3, generator=seed(1)))), torch.stack(expected))
        state = started().state_dict()
        fifo.load_state_dict(state)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"latents": None}, TypeError, "latents must be a torch.Tensor"),
        ({"latents": torch.zeros(1, 2, 7, 3, 2)}, ValueError, "latents must have L=8 frames"),
        ({"latents": torch.zeros(1, 2, 8, 3)}, ValueError, "latents must have shape"),
        ({"steps": [0] * 7}, ValueError, "steps must be a list of 8 of type int"),
        ({"steps": [9] * 8}, ValueError, "steps must be from 0 to"),
        ({"histories": [None] * 8}, ValueError, "histories must be a list of 8 of type dict"),
        ({"number": 1.5}, TypeError, "number must be an int"),
        ({"settings": 3}, TypeError, "settings must be a dict"),
    ],
)
def test_a_wrong_state_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    fifo = started()
    state = fifo.state_dict()
    with pytest.raises(error, match=f"FIFO.load_state_dict: {message}"):
        fifo.load_state_dict(state | change)
    for name in state:
        with pytest.raises(ValueError, match=f"FIFO.load_state_dict: state must have {name}, got "):
            fifo.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(TypeError, match="state must be a dict"):
        fifo.load_state_dict([state])  # type: ignore[arg-type]
    assert torch.equal(fifo.state_dict()["latents"], state["latents"])


def test_diffusers_is_imported_only_when_asked_for() -> None:
    program = "import sys, vattn.models.fifo; print([m for m in ('diffusers', 'torchvision') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
