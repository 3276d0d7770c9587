"""What partitioning and lookahead do for FIFO-Diffusion, on a small denoiser of real clips.

    python -m benchmarks.fifo_quality              train, generate, print, append benchmarks/results/fifo_quality.jsonl
    python -m benchmarks.fifo_quality --table      print the stored lines of the last run

The denoiser is the small one of `examples.fifo_long_video`, for the same clips. It learns once from clips whose
frames all have the same noise, as pretrained models do, and once with noise of its own for every frame; each for every
seed, which also draws the noise of the queue. A video of each clip is made in five ways, and measured from the
64th frame on, eight times the length of training::

    distance    of the statistics of its frames to those of the clip's, see `examples.quality.frechet_distance`
    jump        the mean change of a pixel to the next frame, in percent of the range
    largest     the mean of the largest eighth of these

All are means over the clips. Clips put one after another take as many steps each as FIFO with partitions does.
"""

import argparse
import dataclasses
import datetime
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import records
from examples import clips
from examples.fifo_long_video import NAMES, PARTITIONS, PATCH, SMALLER, WINDOW, queue, train
from examples.quality import frame_statistics, frechet_distance, jumps
from vattn.models.video_dit import VideoDiT, generate

NAME = "fifo_quality"
TRAININGS = {"equal": "the same noise in all frames", "per frame": "noise of its own for every frame"}
METHODS: dict[str, dict[str, Any] | None] = {
    "FIFO, plain": {"partitions": 1, "lookahead": False},
    "FIFO, lookahead": {"partitions": 1, "lookahead": True},
    "FIFO, partitions": {"partitions": PARTITIONS, "lookahead": False},
    "FIFO, both": {"partitions": PARTITIONS, "lookahead": True},
    "clips one after another": None,
}
MEASURES = ("distance", "jump", "largest")


@dataclasses.dataclass(frozen=True)
class Line(records.Origin):
    """One way to make videos, of one denoiser.

    Attributes:
        training: a key of `TRAININGS`; "none" for the clips themselves.
        first, last: the frames that are measured.
        measures: of `MEASURES`, the mean over the clips.
    """

    training: str
    steps: int
    seed: int
    method: str
    first: int
    last: int
    measures: dict[str, float]


@torch.no_grad()
def videos_of(model: VideoDiT, method: str, first: int, last: int, seed: int) -> Tensor:
    """Frames from `first` up to `last` of a video of every class, ``(B, 3, last - first, size, size)``."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(model.num_classes or 0)
    settings, steps = METHODS[method], WINDOW * PARTITIONS
    if settings is None:
        count = (last - first) // WINDOW
        made = [
            generate(model, len(classes), classes=classes, num_steps=steps, generator=generator)
            for _ in tqdm(range(count), desc=method, unit="clip", leave=False)
        ]
        return torch.cat(made, 2)
    fifo = queue(model, **settings)
    fifo.start(
        generate(model, len(classes), classes=classes, num_steps=steps, generator=generator), generator=generator
    )
    frames = fifo.stream(last, conditions={"classes": classes}, generator=generator)
    kept = [frame for i, frame in enumerate(tqdm(frames, method, last, leave=False, unit="frame")) if i >= first]
    return torch.stack(kept, 2)


def measure(videos: Sequence[Tensor], real: Sequence[Tensor]) -> dict[str, float]:
    """Of videos ``(3, T, size, size)``, beside the clips that they should be like; see the top."""
    found = []
    for video, clip in zip(videos, real, strict=True):
        change = 50 * jumps(video.clamp(-1, 1))
        largest = change.sort(descending=True).values[: max(1, len(change) // 8)]
        distance = frechet_distance(frame_statistics(video.clamp(-1, 1)), frame_statistics(clip))
        found.append((distance, float(change.mean()), float(largest.mean())))
    return dict(zip(MEASURES, np.mean(found, 0).tolist(), strict=True))


def run(options: argparse.Namespace) -> None:
    """Train, generate, and store a line for every way."""
    shared = {
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **records.environment(torch.device("cpu")),
        "steps": options.steps,
        "first": options.first,
        "last": options.last,
    }
    trained, held_out = clips.split([*clips.load(options.size, names=NAMES).values()])
    real = [video.transpose(0, 1) for video in trained]
    store(options, [Line(**shared, training="none", seed=0, method="the clips", measures=measure(real, real))])
    rest = [video.transpose(0, 1) for video in held_out]
    store(options, [Line(**shared, training="none", seed=0, method="their last quarter", measures=measure(rest, real))])
    options.outputs.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for training in TRAININGS:
            path = options.outputs / f"fifo_quality_{training.replace(' ', '_')}_{seed}.pt"
            per_frame = training == "per frame"
            model, _ = train(
                trained, SMALLER, options.steps, path, per_frame=per_frame, seed=seed, resume=options.resume
            )
            for method in METHODS:
                videos = videos_of(model, method, options.first, options.last, seed)
                line = Line(**shared, training=training, seed=seed, method=method, measures=measure([*videos], real))
                store(options, [line])
                print(f"seed {seed}, {training}, {method}: {line.measures}", flush=True)


def store(options: argparse.Namespace, lines: Sequence[Line]) -> None:
    records.append(options.results / f"{NAME}.jsonl", map(dataclasses.asdict, lines))


def load(folder: pathlib.Path) -> list[Line]:
    """The lines of the last run."""
    lines = [Line(**fields) for fields in records.read(folder / f"{NAME}.jsonl", f"python -m benchmarks.{NAME}")]
    return [line for line in lines if line.run == lines[-1].run]


def table(lines: Sequence[Line]) -> list[str]:
    """Means over seeds with their standard deviation, in the form of Markdown."""
    header = ["| noise in training | frames | distance | jump, % | largest jumps, % |", "|---|---|---|---|---|"]
    groups = dict.fromkeys((line.training, line.method) for line in lines)
    rows = []
    for training, method in groups:
        chosen = [line.measures for line in lines if (line.training, line.method) == (training, method)]
        cells = []
        for name in MEASURES:
            values = np.array([measures[name] for measures in chosen])
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{spread}")
        rows.append(f"| {'' if training == 'none' else training} | {method} | {' | '.join(cells)} |")
    return [*header, *rows]


def judge(lines: Sequence[Line]) -> list[str]:
    """For each training, what partitioning and lookahead change, each with and without the other, seed by seed."""
    values = {(x.training, x.method, x.seed): x.measures for x in lines}
    seeds = sorted({x.seed for x in lines})
    pairs = (
        ("partitioning", "FIFO, plain", "FIFO, partitions"),
        ("partitioning with lookahead", "FIFO, lookahead", "FIFO, both"),
        ("lookahead", "FIFO, plain", "FIFO, lookahead"),
        ("lookahead with partitions", "FIFO, partitions", "FIFO, both"),
    )
    text = []
    for training in dict.fromkeys(x.training for x in lines if x.training != "none"):
        for title, before, after in pairs:
            found = []
            for name in MEASURES:
                old, new = ([values[training, method, seed][name] for seed in seeds] for method in (before, after))
                lower = sum(b < a for a, b in zip(old, new, strict=True))
                found.append(
                    f"{name} {np.mean(old):.2f} -> {np.mean(new):.2f}, lower for {lower} of {len(seeds)} seeds"
                )
            text.append(f"{TRAININGS[training]}, {title}: {'; '.join(found)}")
    return text


def document(lines: Sequence[Line]) -> str:
    """A page with the table, where it was measured, and what it says."""
    first = lines[0]
    where = (
        f"{first.machine}, {first.threads} threads, torch {first.versions['torch']}, vattn {first.versions['vattn']}"
    )
    title = (
        f"`python -m benchmarks.{NAME}` on {first.run[:10]} at {first.commit[:9]}: {where}. {first.steps} steps of "
        f"training, frames {first.first} to {first.last}, windows of {WINDOW} frames, {PARTITIONS} partitions."
    )
    return "\n".join([title, "", *table(lines), "", *(f"- {sentence}" for sentence in judge(lines)), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="of training, for each denoiser")
    parser.add_argument("--size", type=int, default=16, help=f"of a frame in pixels, a multiple of {PATCH}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=8 * WINDOW, help="frame that is measured")
    parser.add_argument("--last", type=int, default=24 * WINDOW, help="frame that is not measured any more")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints of training in the outputs")
    parser.add_argument("--outputs", type=pathlib.Path, default=pathlib.Path("outputs"))
    parser.add_argument("--results", type=pathlib.Path, default=records.RESULTS, help="folder of the stored lines")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    if not options.table:
        run(options)
    lines = load(options.results)
    name = re.sub(r"[^a-z0-9]+", "-", f"{NAME} {lines[0].machine}".lower()).strip("-")
    page = options.results / f"{name}.md"
    page.write_text(document(lines))
    print(page.read_text())
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
