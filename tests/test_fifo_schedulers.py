"""Schedulers of diffusers in the queue: each frame steps as the scheduler alone steps it, with its own history."""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.svitt_models import seed
from vattn.models.draws import Draws
from vattn.models.fifo import FIFO, PerFrameScheduler, official_ddim
from vattn.models.fifo.per_frame import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, in diffusers

FRAMES, PARTITIONS = 4, 2
LEVELS = FRAMES * PARTITIONS
SHAPE = (2, 3, 2, 2)
"""Batch, channels, height and width."""


def made(name: str, **config: Any) -> Callable[[], Any]:
    """A maker of schedulers, with as many timesteps as the queue has levels."""

    def make() -> Any:
        scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
        sizes = {"MiniMaxH3": LEVELS + 1}  # which counts the clean end
        arguments = {"mu": 0.7} if config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(sizes.get(name, LEVELS), **arguments)
        return scheduler

    return make


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "CM": made("CMStochasticIterative"), "CogVideoXDDIM": made("CogVideoXDDIM"), "CogVideoXDPM": made("CogVideoXDPM"),
    "DDIM": made("DDIM"), "DDIM clipped v": made("DDIM", prediction_type="v_prediction", clip_sample_range=0.5),
    "DDIM zero SNR": made(
        "DDIM", timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"
    ),
    "DDIMParallel": made("DDIMParallel"), "DDPM": made("DDPM"), "DDPMParallel": made("DDPMParallel"),
    "DEIS": made("DEISMultistep", solver_order=3), "DPMSolver++": made("DPMSolverMultistep"),
    "DPMSolver++ 3": made("DPMSolverMultistep", solver_order=3, use_karras_sigmas=True),
    "DPMSolver++ repeated timesteps": made("DPMSolverMultistep", num_train_timesteps=10, use_karras_sigmas=True),
    "DPMSolver++ SDE": made("DPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
    "DPMSolver++ flow": made("DPMSolverMultistep", prediction_type="flow_prediction", use_flow_sigmas=True),
    "DPMSolver single": made("DPMSolverSinglestep", lower_order_final=True),
    "DPMSolver single SDE": made("DPMSolverSinglestep", algorithm_type="sde-dpmsolver++", lower_order_final=True),
    "EDMDPM": made("EDMDPMSolverMultistep"), "EDMEuler": made("EDMEuler"), "Euler": made("EulerDiscrete"),
    "Euler Karras": made("EulerDiscrete", use_karras_sigmas=True, prediction_type="v_prediction"),
    "EulerAncestral": made("EulerAncestralDiscrete"), "FlowMap": made("FlowMapEulerDiscrete"),
    "FlowMatch": made("FlowMatchEulerDiscrete", shift=3.0),
    "FlowMatch dynamic": made("FlowMatchEulerDiscrete", use_dynamic_shifting=True),
    "FlowMatch stochastic": made("FlowMatchEulerDiscrete", stochastic_sampling=True),
    "FlowMatchLCM": made("FlowMatchLCM"), "IPNDM": made("IPNDM"), "LCM": made("LCM"), "LMS": made("LMSDiscrete"),
    "LTX": made("LTXEulerAncestralRF"), "MiniMaxH3": made("MiniMaxH3"), "SASolver": made("SASolver"),
    "TCD": made("TCD"), "UnCLIP": made("UnCLIP"), "UniPC": made("UniPCMultistep"),
    "UniPC 3 flow": made("UniPCMultistep", solver_order=3, prediction_type="flow_prediction", use_flow_sigmas=True),
}  # fmt: skip
NO_CLIPS = {"IPNDM", "LTX"}
"""They cannot add noise to frames."""


class Numbers(Draws):
    """Draws that are given."""

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        super().__init__()
        self.numbers = iter(numbers)

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        numbers = next(self.numbers)
        assert numbers.shape == shape
        return numbers


class Same(Draws):
    """The same numbers each time, for each frame."""

    def normal(self, *shape: int, device: torch.device) -> Tensor:
        return torch.randn(SHAPE, generator=seed(9)).view(shape)


class Noise(TorchFunctionMode):
    """What a scheduler draws with torch.randn is what `given` makes of its shape."""

    def __init__(self, given: Callable[[Sequence[int]], Tensor]) -> None:
        super().__init__()
        self.given = given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return self.given(args[0])
        return self.given(args[0].shape) if func is torch.randn_like else func(*args, **(kwargs or {}))


def step_alone(scheduler: Any, prediction: Tensor, step: int, sample: Tensor, **state: Any) -> Tensor:
    """One step as a pipeline makes it; CogVideoX's DPM and unCLIP get what their pipelines give them."""
    times, name = scheduler.timesteps, type(scheduler).__name__
    prediction, sample = prediction.clone(), sample.clone()
    if name == "CogVideoXDPMScheduler":
        old = getattr(scheduler, "old", None)
        back = None if old is None else times[step - 1]
        sample, scheduler.old = scheduler.step(prediction, old, times[step], back, sample, return_dict=False)
        return sample
    if name == "UnCLIPScheduler":
        state["prev_timestep"] = times[step + 1] if step + 1 < len(times) else None
    return scheduler.step(prediction, times[step], sample, return_dict=False, **state)[0]


def scaled(scheduler: Any, sample: Tensor, step: int) -> Tensor:
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    return scheduler.scale_model_input(sample, scheduler.timesteps[step])


def denoise(latents: Tensor, timesteps: Tensor) -> Tensor:
    """A prediction of each frame by itself."""
    times = timesteps.to(latents.dtype)[:, None, :, None, None] / 1000
    return (0.7 * latents + times).sin()


def test_there_are_at_least_25_of_them() -> None:
    assert len({type(make()).__name__ for make in SCHEDULERS.values()}) >= 25


@pytest.mark.parametrize("name", SCHEDULERS)
def test_frames_at_equal_levels_step_as_the_scheduler_alone(name: str) -> None:
    batch, channels, height, width = SHAPE
    shape = (batch, channels, 3, height, width)
    one, frames = SCHEDULERS[name](), PerFrameScheduler(SCHEDULERS[name]())
    latents = torch.randn(shape, generator=seed(1))
    histories = [frames.history(0)] * 3
    drawn: list[Tensor] = []

    def draw(wanted: Sequence[int]) -> Tensor:
        drawn.append(torch.randn(tuple(wanted), generator=seed(len(drawn))))
        return drawn[-1]

    whole = latents
    for step in range(LEVELS):
        assert torch.equal(frames.model_input(latents, [step] * 3), scaled(one, whole, step))
        prediction = torch.randn(shape, generator=seed(100 + step))
        drawn.clear()
        with Noise(draw):
            whole = step_alone(one, prediction, step, whole)
        numbers = [noise[:, :, i : i + 1] for i in range(3) for noise in drawn]
        frames.step(prediction, latents, [step] * 3, histories, None, Numbers(numbers))  # which changes nothing
        draws = Numbers(numbers)
        latents, histories = frames.step(prediction, latents, [step] * 3, histories, None, draws)
        assert next(draws.numbers, None) is None, "all of the noise is used"
        assert torch.equal(latents, whole), f"step {step}"


def test_every_scheduler_of_diffusers_is_tried_or_refused() -> None:
    names = {name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")}
    tried = {type(make()).__name__ for make in SCHEDULERS.values()}
    assert sorted(names - tried - set(REFUSED)) == []
    assert not tried & set(REFUSED)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_frames_at_staggered_levels_step_as_if_alone(name: str, lookahead: bool) -> None:
    """From noise: each frame of the video is what its scheduler alone makes of the noise that it was."""
    fifo = FIFO(denoise, SCHEDULERS[name](), frames=FRAMES, partitions=PARTITIONS, lookahead=lookahead)
    entered: list[Tensor] = []
    enter = fifo.scheduler.enter

    def recorded(noise: Tensor) -> Tensor:
        entered.append(enter(noise))
        return entered[-1]

    fifo.scheduler.enter = recorded  # type: ignore[method-assign]
    batch, channels, height, width = SHAPE
    fifo.start(shape=(batch, channels, FRAMES, height, width), generator=seed(2))
    video = list(fifo.stream(LEVELS, generator=Same()))
    sigma = getattr(SCHEDULERS[name](), "init_noise_sigma", 1.0)
    assert torch.equal(entered[0], torch.randn(SHAPE, generator=seed(2)) * sigma)
    for i in (0, 1, LEVELS - 1):
        one, sample = SCHEDULERS[name](), entered[i + (FRAMES // 2 if lookahead else 0)][:, :, None]
        with Noise(lambda shape: Same().normal(*shape, device=torch.device("cpu"))):
            for step in range(LEVELS):
                prediction = denoise(scaled(one, sample, step), one.timesteps[step].expand(batch, 1))
                sample = step_alone(one, prediction, step, sample)
        assert torch.equal(video[i], sample[:, :, 0]), f"frame {i}"


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in NO_CLIPS])
def test_frames_of_a_clip_enter_with_noise_and_without_history(name: str) -> None:
    """As image-to-image pipelines have it: noise of the level, the index of the first step, lower orders at first."""
    fifo = FIFO(denoise, SCHEDULERS[name](), frames=FRAMES, partitions=PARTITIONS)
    clip = torch.randn(2, 3, FRAMES, 2, 2, generator=seed(3))
    noises = [torch.randn(SHAPE, generator=seed(i)) for i in range(LEVELS)]
    fifo.start(clip, generator=Numbers(noises))
    queue = fifo.state_dict()["latents"]
    video = list(fifo.stream(FRAMES, generator=Same()))
    for place in range(LEVELS):
        one, first = SCHEDULERS[name](), LEVELS - 1 - place
        if hasattr(one, "set_begin_index"):
            one.set_begin_index(first)
        frame, times = clip[:, :, max(0, place - LEVELS + FRAMES)], one.timesteps[first].expand(2)
        if hasattr(one, "scale_noise"):
            sample = one.scale_noise(frame, times, noises[place])
        else:
            sample = one.add_noise(frame, noises[place], times)
        assert torch.equal(queue[:, :, place], sample)
        if place < LEVELS - FRAMES:
            continue
        sample = sample[:, :, None]
        with Noise(lambda shape: Same().normal(*shape, device=torch.device("cpu"))):
            for step in range(first, LEVELS):
                prediction = denoise(scaled(one, sample, step), one.timesteps[step].expand(2, 1))
                order = {"order": min(4, step - first + 1)} if name == "LMS" else {}
                sample = step_alone(one, prediction, step, sample, **order)
        assert torch.equal(video[place - LEVELS + FRAMES], sample[:, :, 0])


def test_the_first_step_of_lms_within_the_schedule_is_eulers() -> None:
    """By itself it would take coefficients of an order for which it has no derivatives yet."""
    steps = {}
    sample, prediction = torch.randn(2, *SHAPE, generator=seed(1))[:, :, :, None]
    for name in ("LMS", "Euler"):
        frames = PerFrameScheduler(SCHEDULERS[name]())
        steps[name], _ = frames.step(prediction, sample, [5], [frames.history(5)], None, Draws())
    torch.testing.assert_close(steps["LMS"], steps["Euler"])


def test_flow_match_of_tokens_would_take_the_negated_output() -> None:
    sample, output = torch.randn(2, *SHAPE, generator=seed(1))[:, :, :, None]
    frames = PerFrameScheduler(SCHEDULERS["FlowMatch"]())
    after, _ = frames.step(output, sample, [3], [frames.history(3)], None, Draws())
    tokens = [x.flatten(2).transpose(1, 2) for x in (-output, sample)]
    one = SCHEDULERS["FlowMatch"]()
    times = one.timesteps[3].expand(tokens[0].shape[:2])
    other = one.step(tokens[0], one.timesteps[3], tokens[1], per_token_timesteps=times, return_dict=False)[0]
    torch.testing.assert_close(after, other.transpose(1, 2).unflatten(2, (1, 2, 2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["UniPC", "DPMSolver single", "SASolver", "LMS"])
def test_histories_keep_their_frames_alone(name: str) -> None:
    """Neither a view of the queue, which would keep all of it, nor of the predictions."""
    fifo = FIFO(denoise, SCHEDULERS[name](), frames=FRAMES, partitions=PARTITIONS)
    fifo.start(torch.zeros(2, 3, FRAMES, 2, 2), generator=seed(0))
    held = []
    for _ in fifo.stream(20, generator=seed(1)):
        tensors = [
            x
            for history in fifo._queue.histories  # type: ignore[union-attr]
            for value in history.values()
            for x in (value if isinstance(value, list) else [value])
            if isinstance(x, Tensor) and x.dim()
        ]
        assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in tensors)
        held.append(sum(x.numel() for x in tensors))
    assert len(set(held[8:])) == 1


def test_the_scheduler_of_the_caller_is_not_changed() -> None:
    scheduler = SCHEDULERS["UniPC"]()
    before = copy.deepcopy(vars(scheduler))
    fifo = FIFO(denoise, scheduler, frames=FRAMES, partitions=PARTITIONS)
    fifo.start(torch.zeros(2, 3, FRAMES, 2, 2), generator=seed(0))
    video = list(fifo.stream(2, generator=seed(1)))
    assert str(before) == str(vars(scheduler))
    scheduler.set_timesteps(3)
    video += fifo.stream(2, generator=seed(2))
    again = FIFO(denoise, SCHEDULERS["UniPC"](), frames=FRAMES, partitions=PARTITIONS)
    again.start(torch.zeros(2, 3, FRAMES, 2, 2), generator=seed(0))
    expected = [*again.stream(2, generator=seed(1)), *again.stream(2, generator=seed(2))]
    assert torch.equal(torch.stack(video), torch.stack(expected))


@pytest.mark.parametrize("name", ["UniPC", "LMS", "DDIM"])
def test_a_scheduler_is_copied_with_its_numbers(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    frames = PerFrameScheduler(scheduler)
    for value in vars(scheduler).values():
        if isinstance(value, Tensor):
            value.zero_()
    expected = PerFrameScheduler(SCHEDULERS[name]())
    assert frames.settings() == expected.settings()
    sample, prediction = torch.randn(2, *SHAPE, generator=seed(1))[:, :, :, None]
    steps = [one.step(prediction, sample, [2], [one.history(2)], None, Draws())[0] for one in (frames, expected)]
    assert torch.equal(*steps)


@pytest.mark.parametrize("name", ["UniPC", "LMS", "official"])
def test_a_copy_of_a_queue_goes_on_by_itself(name: str) -> None:
    fifo = queue_for_state(name)
    fifo.start(torch.ones(2, 3, FRAMES, 2, 2), generator=seed(0))
    list(fifo.stream(2, generator=seed(1)))
    twin = copy.deepcopy(fifo)
    videos = [torch.stack(list(one.stream(3, generator=seed(2)))) for one in (fifo, twin)]
    assert torch.equal(*videos)


@pytest.mark.parametrize(
    "name, settings", [("DDIM", {"eta": 1.0}), ("EDMEuler", {"s_churn": 2.0}), ("LMS", {"order": 2})]
)
def test_settings_of_a_step(name: str, settings: dict[str, Any]) -> None:
    frames = PerFrameScheduler(SCHEDULERS[name](), **settings)
    one = SCHEDULERS[name]()
    whole = latents = torch.randn(2, *SHAPE, generator=seed(1))[0][:, :, None]
    histories = [frames.history(0)]
    for step in range(3):
        prediction = torch.randn(latents.shape, generator=seed(step))
        scaled(one, whole, step)
        whole = one.step(prediction, one.timesteps[step], whole, return_dict=False, **settings, **(
            {} if name == "LMS" else {"generator": seed(50 + step)}
        ))[0]  # fmt: skip
        latents, histories = frames.step(prediction, latents, [step], histories, None, Draws(seed(50 + step)))
        assert torch.equal(latents, whole)
    plain, _ = PerFrameScheduler(SCHEDULERS[name]()).step(prediction, latents, [3], histories, None, Draws(seed(1)))
    changed, _ = frames.step(prediction, latents, [3], histories, None, Draws(seed(1)))
    assert not torch.equal(plain, changed)


class NoiseLikeTheSample(diffusers.DDIMScheduler):
    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        return (sample + torch.randn_like(sample),)


def test_schedulers_of_others_may_draw_noise_like_the_sample() -> None:
    one = NoiseLikeTheSample()
    one.set_timesteps(LEVELS)
    noises = [torch.randn(SHAPE, generator=seed(i))[:, :, None] for i in range(2)]
    sample = torch.randn(2, 3, 2, 2, 2, generator=seed(2)).half()
    after, _ = PerFrameScheduler(one).step(sample, sample, [3, 0], [{}, {}], None, Numbers(noises))
    assert torch.equal(after, sample + torch.cat(noises, 2).half())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DDIM", "Euler", "UniPC", "FlowMatch", "DPMSolver++ SDE", "DDPM"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    fifo = FIFO(denoise, SCHEDULERS[name](), frames=FRAMES, partitions=PARTITIONS, lookahead=True)
    fifo.start(torch.zeros(2, 3, FRAMES, 2, 2, dtype=dtype), generator=seed(0))
    for frame in fifo.stream(3, generator=seed(1)):
        assert frame.dtype == dtype and frame.isfinite().all()


def refused(name: str, **config: Any) -> Any:
    """A scheduler that has timesteps, without those of its class, which some cannot make."""
    scheduler = getattr(diffusers, f"{name}Scheduler")
    one = scheduler.__new__(scheduler)
    vars(one)["timesteps"] = torch.arange(LEVELS)
    return one


@pytest.mark.parametrize(
    "name, why",
    [
        *((name, "evaluates the denoiser more than once per step") for name in (
            "HeunDiscrete", "FlowMatchHeunDiscrete", "PNDM", "KDPM2Discrete", "KDPM2AncestralDiscrete", "KarrasVe",
        )),
        ("DDIMInverse", "goes from clean frames to noise"),
        ("DPMSolverMultistepInverse", "goes from clean frames to noise"),
        ("RePaint", "needs more for a step"), ("Helios", "needs more for a step"), ("Piflow", "needs more for a step"),
        ("DDPMWuerstchen", "has one timestep more"), ("SCM", "has one timestep more"),
        ("Amused", "steps tokens, not latents"), ("VQDiffusion", "steps tokens, not latents"),
    ],
)  # fmt: skip
def test_refused_by_name(name: str, why: str) -> None:
    message = f"got {name}Scheduler, which {why}"
    with pytest.raises(ValueError, match=f"FIFO: scheduler must be one whose frames can be a step apart, {message}"):
        FIFO(denoise, refused(name), frames=FRAMES, partitions=PARTITIONS)


class Twice(diffusers.HeunDiscreteScheduler):
    pass


class AnotherOrder(diffusers.DDIMScheduler):
    order = 2


@pytest.mark.parametrize("kind", [Twice, AnotherOrder])
def test_schedulers_of_others_that_evaluate_twice_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=f"got {kind.__name__}, which evaluates the denoiser more than once"):
        FIFO(denoise, kind(), frames=FRAMES, partitions=PARTITIONS)


def test_refused_settings() -> None:
    def message(error: type[Exception], text: str) -> Any:
        return pytest.raises(error, match=re.escape(text))

    ddim = SCHEDULERS["DDIM"]()
    with message(ValueError, "must have frames * partitions = 12 timesteps (see its set_timesteps), got"):
        FIFO(denoise, ddim, frames=4, partitions=3)
    with message(ValueError, "must have frames * partitions = 8 timesteps (see its set_timesteps), got"):
        FIFO(denoise, diffusers.DDIMScheduler(), frames=4, partitions=2)
    with message(TypeError, "after set_timesteps, got scheduler=MiniMaxH3Scheduler"):
        FIFO(denoise, diffusers.MiniMaxH3Scheduler(), frames=4, partitions=2)
    with message(ValueError, "must have a timestep for each step, got DDIMScheduler with num_inference_steps=8 and"):
        ddim.timesteps = ddim.timesteps[:-1]
        FIFO(denoise, ddim, frames=4, partitions=2)
    used = SCHEDULERS["Euler"]()
    used.scale_model_input(torch.zeros(1), used.timesteps[0])
    with message(ValueError, "must not have been used since its set_timesteps, got EulerDiscreteScheduler with"):
        FIFO(denoise, used, frames=4, partitions=2)
    for name in ("eat", "generator", "per_token_timesteps"):
        with message(TypeError, f"settings must be arguments of FlowMatchEulerDiscreteScheduler.step, got {name}=1"):
            PerFrameScheduler(SCHEDULERS["FlowMatch"](), **{name: 1})
    fifo = FIFO(denoise, SCHEDULERS["IPNDM"](), frames=4, partitions=2)
    with message(ValueError, "FIFO.start: scheduler must have add_noise or scale_noise to start from latents"):
        fifo.start(torch.zeros(1, 1, 4, 1, 1))


def queue_for_state(name: str) -> FIFO:
    scheduler = official_ddim(LEVELS) if name == "official" else SCHEDULERS[name]()
    return FIFO(denoise, scheduler, frames=FRAMES, partitions=PARTITIONS, lookahead=True)


STATES = {"official": "clip", **{name: "noise" if name in NO_CLIPS else "clip" for name in SCHEDULERS}}


def until_the_third_step(frame: int) -> dict[str, Any]:
    """In the warm-up, whose steps have negative numbers from one below the number of levels on."""
    if frame > 2 - LEVELS:
        raise InterruptedError
    return {}


def go_on(rank: int, folder: str) -> None:
    """What a new process makes of the states."""
    torch.set_num_threads(1)
    videos = {}
    for name in STATES:
        fifo = queue_for_state(name)
        fifo.load_state_dict(torch.load(f"{folder}/{name}.pt", weights_only=True))
        videos[name] = torch.stack(list(fifo.stream(6, generator=seed(6))))
    torch.save(videos, f"{folder}/videos.pt")


def test_a_new_process_goes_on_from_the_state(tmp_path: Path) -> None:
    """In the warm-up from noise, or in the middle of a video."""
    expected = {}
    for name, start in STATES.items():
        fifo = queue_for_state(name)
        if start == "clip":
            fifo.start(torch.randn(2, 3, FRAMES, 2, 2, generator=seed(4)), generator=seed(5))
            list(fifo.stream(3, generator=seed(6)))
        else:
            fifo.start(shape=(2, 3, FRAMES, 2, 2), generator=seed(5))
            with pytest.raises(InterruptedError):
                next(fifo.stream(conditions=until_the_third_step, generator=seed(6)))
        torch.save(fifo.state_dict(), tmp_path / f"{name}.pt")
        expected[name] = torch.stack(list(fifo.stream(6, generator=seed(6))))
    torch.multiprocessing.spawn(go_on, (str(tmp_path),), nprocs=1)
    videos = torch.load(tmp_path / "videos.pt", weights_only=True)
    assert [name for name in STATES if not torch.equal(videos[name], expected[name])] == []


def test_a_state_of_another_scheduler_is_refused() -> None:
    fifo = queue_for_state("UniPC")
    fifo.start(torch.zeros(2, 3, FRAMES, 2, 2), generator=seed(0))
    state = fifo.state_dict()
    for other, name in (("DDIM", "class"), ("UniPC 3 flow", "config"), ("official", "class")):
        with pytest.raises(ValueError, match=f"scheduler.{name} must be .* as it is here, got scheduler.{name}="):
            queue_for_state(other).load_state_dict(state)
