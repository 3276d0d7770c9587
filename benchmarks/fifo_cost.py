"""What a frame of an endless video costs: time and memory as the video grows, and the speed on two processes.

    python -m benchmarks.fifo_cost            measure, print, append benchmarks/results/fifo_cost.jsonl

The denoiser is three convolutions over 8 frames of ``4 x 32 x 32`` latents, with a queue of 4 partitions and lookahead.
Every length has a process of its own, so that the peak of its memory is its own, too: it is that of all frames, with
the warm-up, where glibc's allocator is told to give back what is freed. The speed is that of one process with one
thread, and of two gloo processes with one thread each, in turn, in the same two processes, with a denoiser that is
eight times as wide, so that a window takes a tenth of a second: what ranks wait for each other is some milliseconds.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import records
from benchmarks.steps import Cost, cost_apart, cost_of
from vattn.models.fifo import FIFO, official_ddim

NAME = "fifo_cost"
LENGTHS = (16, 64, 256, 1024)
SCHEDULERS = ("official_ddim", "UniPC")
FRAMES, PARTITIONS, CHANNELS, SIZE = 8, 4, 4, 32


class Convolutions(nn.Module):
    """Of all frames of a window; the timestep is a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(CHANNELS + 1, width, 3, padding=1), nn.ReLU(), nn.Conv3d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv3d(width, CHANNELS, 3, padding=1),
        )  # fmt: skip

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        times = timesteps.to(latents.dtype)[:, None, :, None, None].expand_as(latents[:, :1]) / 1000
        return self.layers(torch.cat([latents, times], 1))


def queue(scheduler: str, width: int, group: Any = None) -> FIFO:
    """A queue that has started."""
    torch.manual_seed(0)
    levels = FRAMES * PARTITIONS
    if scheduler == "official_ddim":
        steps: Any = official_ddim(levels)
    else:
        from diffusers import UniPCMultistepScheduler  # an extra

        steps = UniPCMultistepScheduler()
        steps.set_timesteps(levels)
    fifo = FIFO(Convolutions(width), steps, frames=FRAMES, partitions=PARTITIONS, lookahead=True, group=group)
    fifo.start(torch.randn(1, CHANNELS, FRAMES, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    return fifo


def measure(scheduler: str, frames: int, width: int) -> Cost:
    """Make so many frames, in this process; the time is that of a frame."""
    stream = queue(scheduler, width).stream(frames, generator=torch.Generator().manual_seed(2))
    return cost_of(lambda: next(stream), frames - 1, float("inf"))


def _speeds(rank: int, width: int, frames: int, rounds: int, folder: str) -> None:
    """What one of two processes does: alone, where it is the first, and together, in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    queues = {"alone": queue("official_ddim", width), "together": queue("official_ddim", width, dist.group.WORLD)}
    generators = {name: torch.Generator().manual_seed(2) for name in queues}
    speeds: dict[str, list[float]] = {name: [] for name in queues}
    for i in range(rounds + 1):
        for name, fifo in queues.items():
            dist.barrier()
            if rank == 0 or name == "together":
                start = time.perf_counter()
                for _ in fifo.stream(frames, generator=generators[name]):
                    pass
                if i:  # the first round warms up
                    speeds[name].append(frames / (time.perf_counter() - start))
    if rank == 0:
        result = speeds | {"bytes": queues["together"].bytes_sent()}
        pathlib.Path(folder, "speeds.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def speeds(width: int, frames: int, rounds: int) -> dict[str, Any]:
    """Frames per second of each round, "alone" and "together", and the "bytes" that a rank sends in a step."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_speeds, (width, frames, rounds, folder), nprocs=2)
        return json.loads(pathlib.Path(folder, "speeds.json").read_text())


def run(lengths: Sequence[int], schedulers: Sequence[str], width: int, rounds: int, folder: pathlib.Path) -> None:
    shared = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **records.environment(torch.device("cpu")),
        "width": width,
    }
    path = folder / f"{NAME}.jsonl"
    print(f"{shared['machine']}\n\n| scheduler | frames | ms per frame | p20 .. p80 | peak, MiB | of the frames, MiB |")
    print("|---|---|---|---|---|---|")
    for scheduler in schedulers:
        for frames in lengths:
            settings = {"schedulers": scheduler, "lengths": frames, "width": width}
            cost = cost_apart(f"benchmarks.{NAME}", settings, {"MALLOC_MMAP_THRESHOLD_": str(2**16)})
            records.append(
                path, [shared | {"scheduler": scheduler, "frames": frames, "cost": dataclasses.asdict(cost)}]
            )
            median, p20, p80 = (1e3 * x for x in (cost.median, cost.p20, cost.p80))
            peak, of_frames = cost.peak / 2**20, (cost.peak - cost.before) / 2**20
            print(f"| {scheduler} | {frames} | {median:.1f} | {p20:.1f} .. {p80:.1f} | {peak:.1f} | {of_frames:.1f} |")
    found = speeds(8 * width, 6, rounds)
    records.append(path, [shared | {"scheduler": "official_ddim", "speeds": found}])
    alone, together = (np.median(found[name]) for name in ("alone", "together"))
    print(
        f"\none process with one thread {alone:.2f} frames/s, two with one each {together:.2f}: {together / alone:.2f} "
        f"times, median of {rounds} rounds; a rank sends {found['bytes']} bytes per frame"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=SCHEDULERS)
    parser.add_argument("--width", type=int, default=8, help="of the denoiser")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed on one process and on two")
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS, help="folder of the stored lines")
    parser.add_argument("--here", action="store_true", help="one length, in this process, which prints it as JSON")
    options = parser.parse_args(arguments)
    if options.here:
        torch.set_num_threads(1)
        print(json.dumps(dataclasses.asdict(measure(options.schedulers[0], options.lengths[0], options.width))))
        return
    run(options.lengths, options.schedulers, options.width, options.rounds, options.results)


if __name__ == "__main__":
    main()
