"""The windows of the queue over ranks: the same frames bit by bit, bytes that are counted, and differences named.

Four processes run all cases, alone and in groups of two and four, and write what they found; the tests look at that.
"""

import contextlib
import datetime
import itertools
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.svitt_models import seed
from tests.test_fifo import SIZES, clip, denoise, queue_of
from vattn.distributed._checks import fingerprint
from vattn.models.fifo import FIFO, PerFrameScheduler

WORLD = 4
CASES = ("f4 n2", "f4 n2 lookahead", "f5 n2 lookahead", "f1 n3", "f5 n1")
"""More windows than ranks, fewer, and numbers that ranks do not divide."""
STARTS = ("clip", "noise")
GROUPS = (1, 2, 4)


class Euler:
    """A scheduler in the manner of diffusers, whose frames remember a derivative, and draw noise in their steps."""

    def __init__(self, levels: int) -> None:
        self.timesteps = torch.linspace(900, 100, levels)
        self.derivatives: list[Tensor] = []

    def add_noise(self, frame: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return frame + noise * timesteps.view(-1, 1, 1, 1) / 1000

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        self.derivatives.append(model_output)
        mean = sum(self.derivatives[-2:]) / len(self.derivatives[-2:])
        noise = torch.randn(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        del self.derivatives[:-1]
        return (sample - 0.2 * mean + 0.05 * noise,)


def queue(sizes: str, scheduler: str, group: Any) -> FIFO:
    frames, partitions, lookahead = SIZES[sizes]
    if scheduler == "official":
        return queue_of(sizes, guidance_scale=2.0, group=group)
    one = PerFrameScheduler(Euler(frames * partitions))
    return FIFO(denoise, one, frames=frames, partitions=partitions, lookahead=lookahead, group=group)


def video(fifo: FIFO, start: str, seeds: tuple[int, int] = (0, 1), **arguments: Any) -> dict[str, Tensor]:
    if start == "clip":
        fifo.start(clip(fifo.frames, batch=2), generator=seed(seeds[0]))
    else:
        fifo.start(shape=(2, 2, fifo.frames, 3, 2), generator=seed(seeds[0]))
    given: dict[str, Any] = {"conditions": {"cond": 0.3}, "unconditional": {"cond": torch.tensor(0.1)}} | arguments
    frames = list(fifo.stream(5, generator=seed(seeds[1]), **given))
    return {"frames": torch.stack(frames), "queue": fifo.state_dict()["latents"]}


@contextlib.contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes of each tensor that is handed to all_gather."""
    gather, sent = dist.all_gather, []

    def all_gather(tensors: Any, tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return gather(tensors, tensor, *arguments, **settings)

    dist.all_gather = all_gather  # type: ignore[assignment]
    yield sent
    dist.all_gather = gather


def sent_in_steps(group: Any) -> dict[str, Any]:
    """What a queue says that a step sends, and what each step does."""
    found = {}
    for sizes in CASES:
        fifo = queue(sizes, "official", group)
        fifo.start(clip(fifo.frames, batch=2), generator=seed(0))
        stream = fifo.stream(generator=seed(1))
        next(stream)
        steps = []
        for _ in range(3):
            with counted_bytes() as sent:
                next(stream)
            steps.append(sum(sent))
        found[sizes] = (fifo.bytes_sent(), steps)
    return found


def fails_on(rank: int) -> Any:
    def model(latents: Tensor, timesteps: Tensor, cond: Any = 0.0) -> Tensor:
        if dist.get_rank() == rank:
            raise FloatingPointError("overflow")
        return denoise(latents, timesteps, cond)

    return model


def differences(group: Any) -> dict[str, str]:
    """What ranks 0 and 1 are told where their inputs differ."""
    rank, found = dist.get_rank(), {}

    def case(name: str, run: Any) -> None:
        try:
            run()
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    def of(**settings: Any) -> FIFO:
        return queue_of("f4 n2", group=group, **settings)

    case("seed of start", lambda: video(of(), "clip", seeds=(rank, 1)))
    case("seed of stream", lambda: video(of(), "clip", seeds=(0, rank)))
    case("seed of stream, drawn in steps", lambda: video(queue("f4 n2", "euler", group), "clip", seeds=(0, rank)))
    case("settings", lambda: video(of(guidance_scale=1.0 + rank), "clip"))
    case("scheduler", lambda: video(of(eta=rank / 2), "clip"))
    case("conditions", lambda: video(of(), "clip", conditions={"cond": float(rank)}))
    case("unconditional", lambda: video(of(), "clip", unconditional={"cond": torch.tensor(float(rank))}))
    case("denoiser", lambda: video(of(model=fails_on(1)), "clip"))

    def other_counts() -> None:
        fifo = of()
        fifo.start(clip(4), generator=seed(0))
        list(fifo.stream(2 + rank, generator=seed(1)))

    def other_places() -> None:
        fifo = of()
        fifo.start(clip(4), generator=seed(0))
        fifo._queue = fifo._queue._replace(number=-rank)  # type: ignore[union-attr]
        list(fifo.stream(2, generator=seed(1)))

    case("num_frames", other_counts)
    case("frames that have left", other_places)
    case("nothing", lambda: video(of(), "clip"))
    return found


def run_all(rank: int, folder: str) -> None:
    """What one of four processes does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    found: dict[str, Any] = {}
    pair = dist.new_group([0, 1])
    groups = {1: None, 2: pair, 4: init_device_mesh("cpu", (WORLD,))}
    try:
        for sizes, scheduler, start, size in itertools.product(CASES, ("official", "euler"), STARTS, GROUPS):
            if rank < size:
                found[f"{sizes} {scheduler} {start} {size}"] = video(queue(sizes, scheduler, groups[size]), start)
        if rank < 2:
            found["bytes"] = sent_in_steps(pair)
            found["differences"] = differences(pair)
        else:
            with pytest.raises(ValueError, match="this process must be in group"):
                queue("f4 n2", "official", pair)  # this process is not in it
    except Exception:
        found["error"] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.set_forkserver_preload([__name__])  # what all processes import, once
    torch.multiprocessing.start_processes(run_all, (str(folder),), nprocs=WORLD, start_method="forkserver")
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for result in results:
        assert "error" not in result, result["error"]
    return results


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scheduler", ["official", "euler"])
@pytest.mark.parametrize("sizes", CASES)
def test_ranks_make_the_frames_of_one_process(
    sizes: str, scheduler: str, start: str, found: list[dict[str, Any]]
) -> None:
    expected = found[0][f"{sizes} {scheduler} {start} 1"]
    assert expected["frames"].isfinite().all()
    for size in GROUPS:
        for rank in range(size):
            made = found[rank][f"{sizes} {scheduler} {start} {size}"]
            assert torch.equal(made["frames"], expected["frames"]) and torch.equal(made["queue"], expected["queue"])


@pytest.mark.parametrize("sizes", CASES)
def test_a_step_sends_the_bytes_that_it_says(sizes: str, found: list[dict[str, Any]]) -> None:
    frames, partitions, lookahead = SIZES[sizes]
    for rank in range(2):
        said, steps = found[rank]["bytes"][sizes]
        assert steps == [said] * 3
    windows = partitions * (2 if lookahead and frames > 1 else 1)
    written = (frames + 1) // 2 if lookahead else frames
    assert said == 8 * 6 + (windows + 1) // 2 * written * (2 * 2 * 3 * 2 * 4)


def test_one_process_sends_nothing() -> None:
    fifo = queue_of()
    fifo.start(clip(4))
    assert fifo.bytes_sent() == 0


DIFFERENCES = {
    "seed of start": "ValueError: FIFO: the queue (what it was started with, or a generator) must be the same",
    "seed of stream": "ValueError: FIFO: the noise of a step (or a generator) must be the same on every rank",
    "seed of stream, drawn in steps": "ValueError: FIFO: the queue (what it was started with, or a generator) must be",
    "settings": "ValueError: FIFO: guidance_scale must be the same on every rank, got rank 0: 1.0, rank 1: 2.0",
    "scheduler": "ValueError: FIFO: scheduler.eta must be the same on every rank, got rank 0: 0.0, rank 1: 0.5",
    "conditions": "ValueError: FIFO: conditions must be the same on every rank, got",
    "unconditional": "ValueError: FIFO: unconditional must be the same on every rank, got",
    "num_frames": "ValueError: FIFO: num_frames must be the same on every rank, got rank 0: 2, rank 1: 3",
    "frames that have left": "ValueError: FIFO: the number of the frame that leaves must be the same on every rank",
    "nothing": "nothing",
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_ranks_that_differ_are_told_so(case: str, found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert found[rank]["differences"][case].startswith(DIFFERENCES[case])


def test_a_denoiser_that_fails_on_one_rank_fails_on_all(found: list[dict[str, Any]]) -> None:
    other, failed = (found[rank]["differences"]["denoiser"] for rank in range(2))
    assert failed == "FloatingPointError: overflow"
    assert other == (
        "RuntimeError: FIFO: a step must succeed on every rank, got FloatingPointError('overflow') on rank 1"
    )


def test_ranks_notice_values_in_another_order() -> None:
    for shape, axis in (((4,), 0), ((2, 3), 0), ((2, 3), 1), ((2, 3, 2), 1), ((2, 2, 3, 2), 0)):
        values = torch.randn(shape, generator=seed(0))
        assert fingerprint(values) == fingerprint(values.clone())
        assert fingerprint(values) != fingerprint(values.flip(axis))
    fingerprint(torch.tensor(1.0)), fingerprint(torch.zeros(2, 0)), fingerprint(torch.zeros(0, 2, dtype=torch.bool))
