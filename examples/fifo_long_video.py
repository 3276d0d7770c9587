"""Endless video from a small denoiser of short clips: FIFO-Diffusion, with no model but the one that is trained here.

    clips of 8 frames  ->  VideoDiT, every frame with noise of its own  ->  FIFO  ->  videos as long as one likes

The denoiser learns from windows of real clips, or of the videos of a folder, and is told which of them it sees. A queue
of frames then makes a video of each, sixteen times as long as the windows or longer, and one whose prompt changes on
the way from one to the next. What they look like far beyond the length of training is held against the frames of the
clips: the example fails if these are farther from the videos than other clips are. It draws the queue, and the memory
of the process at every frame.

    python -m examples.fifo_long_video
    python -m examples.fifo_long_video --resume            from the last checkpoint of a run with the same options
    python -m examples.fifo_long_video --videos FOLDER     learns from your own, of 8 frames or more each
    python -m examples.fifo_long_video --short             a small model, and a shorter video, which may be a bad one
"""

import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm import tqdm

from benchmarks.steps import resident
from examples import clips, pictures
from examples.options import Needs, parser, start, verdict
from examples.quality import frame_statistics, frechet_distance, jumps
from examples.training import new_training, write_losses
from vattn.models.fifo import FIFO
from vattn.models.video_dit import VideoDiT, generate
from vattn.training import Training

NAMES = ("carphone_pristine", "bigbuckbunny")  # the third clip of `clips.NAMES` is one of many cuts
WINDOW = 8  # frames
BATCH = 6
PATCH = 4  # pixels
PARTITIONS = 4
GUIDANCE = 3.0  # without any, frames that are there already win over a prompt that changes
SHOWN = 3  # videos, and one more that goes through all of them
NEEDS, SHORT_NEEDS = Needs(minutes=15, memory=1.1, steps=1500), Needs(minutes=1, memory=0.6, steps=400)


class Size(NamedTuple):
    """Of the denoiser."""

    dim: int
    depth: int


SMALL, SMALLER = Size(128, 6), Size(96, 4)


def denoiser(num_classes: int, size: int, of: Size) -> VideoDiT:
    """Of videos of `size` pixels a side, each of which has a class of its own."""
    return VideoDiT(
        3, WINDOW, size, PATCH, of.dim, of.depth, num_heads=4, levels=(1, 2, 3), num_classes=num_classes,
        prediction="flow",
    )  # fmt: skip


def batches(videos: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random windows ``(BATCH, 3, WINDOW, size, size)``, and which video each of them is of."""
    while True:
        classes = torch.randint(len(videos), (BATCH,))
        chosen = []
        for i in classes.tolist():
            start = int(torch.randint(len(videos[i]) - WINDOW + 1, ()))
            chosen.append(videos[i][start : start + WINDOW].transpose(0, 1))
        yield torch.stack(chosen), classes


def train(
    videos: Sequence[Tensor], of: Size, steps: int, path: pathlib.Path, *, per_frame: bool, seed: int, resume: bool
) -> tuple[VideoDiT, Training]:
    """A denoiser that has learned from windows of `videos` ``(T, 3, size, size)``, or that goes on to."""
    torch.manual_seed(seed)
    model = denoiser(len(videos), videos[0].shape[-1], of)
    training = new_training("denoiser", model, steps, 3e-3, path)
    if resume:
        training.resume()
    training.run(batches(videos), lambda batch: model.training_loss(batch[0], classes=batch[1], per_frame=per_frame))
    model.save_pretrained(path.with_suffix(""))
    return model, training


def queue(model: VideoDiT, partitions: int, lookahead: bool, guidance_scale: float = 1.0) -> FIFO:
    """One that moves from noise to video in ``WINDOW * partitions`` equal steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(**model.scheduler_settings)
    levels = WINDOW * partitions
    scheduler.set_timesteps(sigmas=[1 - i / levels for i in range(levels)])
    return FIFO(
        model, scheduler, frames=WINDOW, partitions=partitions, lookahead=lookahead, guidance_scale=guidance_scale
    )


class Streamed(NamedTuple):
    """What comes out of a queue: bytes, of which videos ``(B, 3, frames, size, size)`` are made, and what it took.

    Attributes:
        memory: of the process, when each frame was there, in bytes.
        seconds: for each frame of all videos.
        latents, levels: the queue in the end, and the share of noise in each of its frames.
    """

    videos: Tensor
    memory: list[int]
    seconds: float
    latents: Tensor
    levels: list[float]


def stream(model: VideoDiT, classes: Tensor, num_frames: int, partitions: int, generator: torch.Generator) -> Streamed:
    """A video of each class, and one that goes through all of them, each for as many frames.

    Args:
        classes: ``(B - 1,)`` int64.
    """
    fifo = queue(model, partitions, lookahead=True, guidance_scale=GUIDANCE)

    def conditions(frame: int) -> dict[str, Tensor]:
        now = max(0, frame) * len(classes) // num_frames
        return {"classes": torch.cat([classes, classes[now : now + 1]])}

    steps, first = WINDOW * partitions, conditions(0)["classes"]
    base = generate(model, len(first), classes=first, num_steps=steps, guidance_scale=GUIDANCE, generator=generator)
    fifo.start(base, generator=generator)
    frames: list[Tensor] = []
    memory: list[int] = []
    start = time.perf_counter()
    latents = fifo.stream(num_frames, conditions=conditions, unconditional={}, generator=generator)
    for latent in tqdm(latents, desc="FIFO", total=num_frames, unit="frame"):
        frames.append(((latent.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        memory.append(resident("VmRSS"))
    seconds = (time.perf_counter() - start) / num_frames
    left, levels = fifo.state_dict()["latents"], [0.0] * (WINDOW // 2)
    levels += [(i + 1) / steps for i in range(steps)]
    return Streamed(torch.stack(frames, 2), memory, seconds, left, levels)


def report(names: Sequence[str], videos: Sequence[Tensor], made: Tensor) -> bool:
    """Print how far the frames of each clip and of each video are from those of a clip; whether videos are nearest.

    Args:
        videos: of the clips, ``(T, 3, size, size)``.
        made: a video of each of them, in the same order, ``(B, 3, frames, size, size)``.
    """
    real = [frame_statistics(video.transpose(0, 1)) for video in videos]
    print("\nhow far frames of each generated video, and of other clips, are from those of its clip (lower is closer)")
    print(f"{'distance of frame statistics':<32}{'first frames':>14}{'last frames':>14}{'nearest other clip':>20}")
    good = True
    for i, video in enumerate(made):
        ends = [
            frechet_distance(frame_statistics(x), real[i]) for x in (video[:, : 2 * WINDOW], video[:, -8 * WINDOW :])
        ]
        other = min((frechet_distance(x, real[i]) for j, x in enumerate(real) if j != i), default=float("inf"))
        print(f"{names[i]:<32}{ends[0]:>14.2f}{ends[1]:>14.2f}{other:>20.2f}")
        good &= ends[1] < other
    print(f"\n{'mean change to the next frame':<32}{'clip':>14}{'video':>14}")
    for name, clip, video in zip(names, videos, made, strict=False):
        print(f"{name:<32}{50 * jumps(clip.transpose(0, 1)).mean():>13.2f}%{50 * jumps(video).mean():>13.2f}%")
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    of_all = parser(__doc__, NEEDS)
    of_all.add_argument("--frames", type=int, default=16 * WINDOW, help=f"of a video; {WINDOW} are those of training")
    of_all.add_argument("--size", type=int, default=32, help=f"of a frame in pixels, a multiple of {PATCH}")
    of_all.add_argument("--short", action="store_true", help="a small model, two partitions; any video is good enough")
    of_all.add_argument("--resume", action="store_true", help="go on from the checkpoint in the outputs")
    options = of_all.parse_args(arguments)
    start(__doc__, options, SHORT_NEEDS if options.short else NEEDS)

    loaded = clips.load(options.size, options.videos, fps=options.fps, num_frames=WINDOW, names=NAMES)
    videos = {name: clips.to_model(video) for name, video in loaded.items()}
    real = [*videos.values()]
    path, partitions = options.outputs / "fifo_denoiser.pt", PARTITIONS // 2 if options.short else PARTITIONS
    of = SMALLER if options.short else SMALL
    model, training = train(real, of, options.steps, path, per_frame=True, seed=options.seed, resume=options.resume)

    generator = torch.Generator().manual_seed(options.seed)
    names = [*videos][:SHOWN]
    made = stream(model, torch.arange(len(names)), options.frames, partitions, generator)
    written = [options.outputs / f"fifo_{name}.png" for name in ("queue", "memory", "loss")]
    pixels = made.videos.float() / 127.5 - 1
    columns = dict(zip([*names, "one after another"], pixels[:, None], strict=True))
    pictures.queue(dict(zip(columns, made.latents, strict=True)), made.levels, WINDOW, written[0])
    pictures.memory(made.memory, WINDOW, written[1])
    write_losses([training], ["squared error of the flow"], written[2])
    written += pictures.side_by_side(columns, options.outputs / "fifo_videos.gif")

    good = report(names, real, pixels[: len(names)])
    print(f"\n{options.frames} frames, {options.frames / WINDOW:.3g} times the length of training")
    print(f"{made.seconds:.2f} s for a frame of {len(columns)} videos")
    first, last = (x / 2**20 for x in (made.memory[0], made.memory[-1]))
    print(f"memory of the process: {first:.0f} MiB at the first frame, {last:.0f} MiB at the last")
    print(f"wrote {', '.join(map(str, written))}")
    if good or options.short:
        return 0
    shortfall = "frames far beyond the length of training are farther from their clip than others"
    return verdict([shortfall], options, NEEDS.steps)


if __name__ == "__main__":
    sys.exit(main())
