"""Finding videos by what is said of them: a small SViTT learns from real clips and captions, dense and sparse.

    caption: "a man talking in a car late in the video running backwards and fast"   <->   clips of 8 frames

Four models learn one after the other, alike but for what their video encoders read and keep: everything, few edges,
few nodes, few of both. For clips of frames that none has seen, the example prints how often the right caption is found
for a clip and a right clip for a caption, by similarity alone and ranked again by matching, beside chance; how often
the first caption is right about each thing that it tells; and the time and the memory of a step. It fails if a setting
does not beat chance by far, or a sparse one falls far behind the dense one. Then the sparsest one learns again, with
few frames first and more and sparser later. Pictures show who reads whom, what is kept, and the losses.

    python -m examples.svitt_retrieval
    python -m examples.svitt_retrieval --resume      from the last checkpoints of a run with the same options
"""

import argparse
import dataclasses
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_memory
from examples import pictures
from examples.captions import FIRST, MASK, PAD, Caption, Clips, Words, captions, with_changes
from examples.training import Training
from vattn import RelativePositionBias3D
from vattn.models.svitt import (
    Sparsity,
    SViTT,
    VideoTokens,
    expand,
    rank_texts,
    rank_videos,
    recall,
)

PATCH, DIM, DEPTH = 8, 64, 4
NUM_FRAMES = 8
BATCH, LEARNING_RATE = 12, 2e-3
EASY = 0.5  # of the steps: matching begins with any wrong pairs, as it learns nothing from hard ones at first
HELD_OUT_CLIPS = 3  # for each caption
RECALLED = (1, 5)  # the first one is right, or one of the first five
RERANKED = 8  # captions of each clip, and clips of as many captions
TIMED_STEPS = 7
TIMES_CHANCE = 4.0  # the mean R@1 of every setting is at least this many times that of chance
BEHIND_DENSE = 0.15  # and that of a sparse one at most this much below the dense one
PRUNE_AFTER = (0, 2)
DENSE = Sparsity(block_size=18, num_random=None, keep=1.0, prune_after=PRUNE_AFTER)
SETTINGS = {
    "dense": DENSE,
    "edge-sparse": dataclasses.replace(DENSE, num_random=3),
    "node-sparse": dataclasses.replace(DENSE, keep=0.6),
    "edge- and node-sparse": dataclasses.replace(DENSE, num_random=3, keep=0.6),
}
STAGES = ((4, 0.7), (8, 0.6), (16, 0.5))  # frames, and the share that is kept each time


@dataclasses.dataclass
class Run:
    """A model in training."""

    training: Training
    model: SViTT

    @property
    def name(self) -> str:
        return self.training.name

    @property
    def num_frames(self) -> int:
        return self.model.video.window[0]


class Found(NamedTuple):
    """How often what was looked for is among the first of a ranking, for each number in `RECALLED`.

    Attributes:
        captions: the caption of a clip.
        clips: a clip of a caption.
        told: how often the first caption of a clip is right about each thing that it tells.
    """

    captions: list[float]
    clips: list[float]
    told: dict[str, float]

    @property
    def mean(self) -> list[float]:
        return [(a + b) / 2 for a, b in zip(self.captions, self.clips, strict=True)]


class Data:
    """Batches, for training and for the test."""

    def __init__(self, size: int) -> None:
        self.clips = Clips(size)
        self.captions = captions()
        texts = [str(caption) for caption in self.captions]
        self.words = Words(texts)
        self.ids = self.words.encode(texts)
        self.mask = (self.ids != PAD).long()

    def batches(self) -> Iterator[Tensor]:
        """Endless batches of numbers of captions, all different."""
        while True:
            yield torch.randperm(len(self.captions))[:BATCH]

    def videos(self, chosen: Tensor, num_frames: int) -> Tensor:
        return with_changes(torch.stack([self.clips.random(self.captions[i], num_frames) for i in chosen]))

    def held_out(self, num_frames: int) -> Tensor:
        """``(captions * HELD_OUT_CLIPS, T, 3, size, size)``, those of the first caption first."""
        found = [self.clips.held_out(caption, num_frames, HELD_OUT_CLIPS) for caption in self.captions]
        return with_changes(torch.cat(found))


def new_model(size: int, num_words: int, num_frames: int, sparsity: Sparsity) -> SViTT:
    """A small SViTT; where the video encoder keeps few tokens, the last text layer reads half of these."""
    width = {"dim": DIM, "depth": DEPTH, "num_heads": 4, "mlp_dim": 4 * DIM}
    video = {
        "num_frames": num_frames, "image_size": size, "patch_size": PATCH, "layer_scale": None, "sparsity": sparsity,
    }  # fmt: skip
    text = {
        "vocab_size": num_words, "max_length": 32, "fusion_layer": 2, "prune_after": (2,),
        "keep": 0.5 if sparsity.keep < 1 else 1.0, "dropout": 0.0,
    }  # fmt: skip
    model = SViTT(video | width, text | width, embed_dim=64, mask_id=MASK, never_masked=(PAD, FIRST), mask_share=0.3)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # what suits 768 channels is too little for these
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, RelativePositionBias3D):  # from 0, the order of frames would be learned late
            nn.init.normal_(module.table)
    return model


def step_loss(run: Run, data: Data, chosen: Tensor) -> Tensor:
    """The three losses of a batch."""
    video, hard = data.videos(chosen, run.num_frames), run.training.step >= EASY * run.training.steps
    return run.model.training_loss(video, data.ids[chosen], data.mask[chosen], pair_ids=chosen, hard_negatives=hard)


def train(run: Run, data: Data, resume: bool) -> None:
    """To the last step, from the last checkpoint if there is one to `resume` from."""
    if resume:
        run.training.resume()
    run.training.run(data.batches(), lambda chosen: step_loss(run, data, chosen))


@torch.no_grad()
def encode(model: SViTT, videos: Tensor, generator: torch.Generator) -> VideoTokens:
    """All videos, some at a time."""
    parts = [model.encode_video(part, generator=generator) for part in videos.split(16)]
    return VideoTokens(torch.cat([part.tokens for part in parts]), torch.cat([part.pooled for part in parts]), ())


@torch.no_grad()
def evaluate(run: Run, data: Data, seed: int) -> dict[str, Found]:
    """What is found among held-out clips, by similarity alone, and where matching ranks the best ones again."""
    videos = encode(run.model, data.held_out(run.num_frames), torch.Generator().manual_seed(seed))
    texts = run.model.text(data.ids, data.mask)
    right = torch.eye(len(texts), dtype=torch.bool).repeat_interleave(HELD_OUT_CLIPS, 0)
    true = [dataclasses.astuple(caption) for caption in data.captions for _ in range(HELD_OUT_CLIPS)]
    names = [field.name for field in dataclasses.fields(Caption)]
    found = {}
    for name, again in (("similarity", 0), ("matching", RERANKED)):
        to_texts = rank_texts(run.model, videos, texts, data.mask, rerank=again)
        to_videos = rank_videos(run.model, videos, texts, data.mask, rerank=again * HELD_OUT_CLIPS)
        told = [dataclasses.astuple(data.captions[i]) for i in to_texts.indices[:, 0]]
        hits = torch.tensor([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(told, true, strict=True)])
        found[name] = Found(
            [recall(to_texts, right, k) for k in RECALLED],
            [recall(to_videos, right.T, k) for k in RECALLED],
            dict(zip(names, hits.double().mean(0).tolist(), strict=True)),
        )
    return found


def by_chance(data: Data) -> Found:
    """What guesses find."""
    count = len(data.captions)
    shares = [[chance(k, n, n * count) for k in RECALLED] for n in (1, HELD_OUT_CLIPS)]
    told = {
        field.name: 1 / len({getattr(caption, field.name) for caption in data.captions})
        for field in dataclasses.fields(Caption)
    }
    return Found(shares[0], shares[1], told)


def chance(k: int, right: int, answers: int) -> float:
    """How often one of the `right` answers is among `k` that were guessed."""
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def cost_of_step(run: Run, data: Data) -> str:
    """The time of a training step, and the memory that it takes beyond the model, its gradients included."""
    chosen = next(data.batches())

    def step() -> None:
        run.model.zero_grad()
        step_loss(run, data, chosen).backward()

    taken = peak_memory(step, torch.device("cpu"))
    seconds = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    run.model.zero_grad()
    return f"{statistics.median(seconds) * 1e3:>8.0f} ms{taken / 2**20:>6.0f} MiB"


def report(data: Data, runs: Sequence[Run], seed: int) -> dict[str, dict[str, Found]]:
    """Print what each run finds, beside chance, and what its steps cost; what it finds."""
    guessed = by_chance(data)
    names = [f"R@{k}" for k in RECALLED]
    print(f"\n{'held-out clips':<34}{'caption of clip':>18}{'clip of caption':>18}{'mean':>9}", end="")
    print(f"{'the first caption is right about':>40}")
    print(f"{'':<24}{'ranked by':<10}", *(f"{name:>5}" for name in 3 * names), end="  ")
    print("".join(f"{name:>10}" for name in guessed.told), f"{'step':>10}{'memory':>10}")
    print_row("chance", "", guessed)
    found = {}
    for run in runs:
        found[run.name] = evaluate(run, data, seed)
        for ranked_by, row in found[run.name].items():
            first = ranked_by == "similarity"
            print_row(run.name if first else "", ranked_by, row, cost_of_step(run, data) if first else "")
    for name, rankings in found.items():
        guesses = not_told(rankings["similarity"], guessed, len(data.captions) * HELD_OUT_CLIPS)
        if guesses:
            print(f"{name} has not learned, as guesses may be as often right: {', '.join(guesses)}")
    return found


def print_row(name: str, ranked_by: str, found: Found, cost: str = "") -> None:
    shares = [*found.captions, *found.clips, *found.mean]
    cells = [*(f"{share:>5.0%}" for share in shares), " ", *(f"{share:>9.0%}" for share in found.told.values())]
    print(f"{name:<24}{ranked_by:<10}", *cells, cost)


def not_told(found: Found, guessed: Found, clips: int) -> list[str]:
    """What the first caption is not right about more often than guesses may be: by two of their standard deviations."""
    return [
        f"{name} {share:.0%}"
        for name, share in found.told.items()
        if share < guessed.told[name] + 2 * math.sqrt(guessed.told[name] * (1 - guessed.told[name]) / clips)
    ]


def failures(found: Mapping[str, Mapping[str, Found]], guessed: Found) -> list[str]:
    """Print how far each setting is above chance and below the dense one; the margins that are missed."""
    dense = found["dense"]["similarity"].mean[0]
    missed = []
    print("\nmean R@1, by similarity")
    for name, rankings in found.items():
        share = rankings["similarity"].mean[0]
        times = share / guessed.mean[0]
        print(f"{name:<24}{share:>6.1%}{times:>6.1f}x chance{100 * (share - dense):>+8.1f} points from dense")
        if times < TIMES_CHANCE:
            missed.append(f"{name} finds {share:.1%}, less than {TIMES_CHANCE:g} times as much as chance")
        if share < dense - BEHIND_DENSE:
            missed.append(f"{name} is more than {100 * BEHIND_DENSE:.0f} points behind dense")
    return missed


def train_settings(data: Data, options: argparse.Namespace) -> list[Run]:
    """The four settings, one after the other."""
    runs = []
    for name, sparsity in SETTINGS.items():
        torch.manual_seed(options.seed)
        model = new_model(options.size, len(data.words), NUM_FRAMES, sparsity)
        path = options.outputs / f"svitt_{name.replace(' ', '_')}.pt"
        runs.append(Run(Training(name, model, options.steps, LEARNING_RATE, path), model))
        train(runs[-1], data, options.resume)
    return runs


def train_stages(data: Data, options: argparse.Namespace) -> list[Run]:
    """Few frames first, then more and sparser: each stage goes on with the model of the one before."""
    runs: list[Run] = []
    torch.manual_seed(options.seed)
    for num_frames, keep in STAGES:
        sparsity = dataclasses.replace(SETTINGS["edge- and node-sparse"], keep=keep)
        if runs:
            model = expand(runs[-1].model, num_frames, sparsity)
        else:
            model = new_model(options.size, len(data.words), num_frames, sparsity)
        path = options.outputs / f"svitt_{num_frames}_frames.pt"
        runs.append(Run(Training(f"{num_frames} frames", model, options.steps // 2, LEARNING_RATE, path), model))
        train(runs[-1], data, options.resume)
    return runs


def draw(data: Data, runs: Sequence[Run], stages: Sequence[Run], options: argparse.Namespace) -> list[pathlib.Path]:
    """Who reads whom and what is kept, in the last of `runs`; and all losses."""
    written = [options.outputs / f"svitt_{name}.png" for name in ("layout", "kept", "loss")]
    encoder = runs[-1].model.video
    layout = encoder.sparsity.layout(math.prod(encoder.window), torch.Generator().manual_seed(options.seed))
    assert layout is not None
    layout.plot(written[0])
    shown = {caption.video: caption for caption in data.captions if caption.direction == "forwards"}
    clips = torch.cat([data.clips.held_out(caption, NUM_FRAMES, 1) for caption in shown.values()])
    with torch.no_grad():
        kept = encoder(with_changes(clips), generator=torch.Generator().manual_seed(options.seed)).kept
    pictures.kept_patches(dict(zip(map(str, shown.values()), clips, strict=True)), kept, encoder.window, written[1])
    pictures.smooth_losses(
        {
            "8 frames, dense and sparse": {run.name: run.training.losses for run in runs},
            "edge- and node-sparse, more frames each time": {run.name: run.training.losses for run in stages},
        },
        "contrastive + matching + masked words",
        written[2],
    )
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of training, for each setting; half for each stage")
    parser.add_argument("--size", type=int, default=48, help=f"of a frame in pixels, a multiple of {PATCH}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the outputs")
    parser.add_argument("--outputs", type=pathlib.Path, default=pathlib.Path("outputs"))
    options = parser.parse_args(arguments)
    options.outputs.mkdir(parents=True, exist_ok=True)
    data = Data(options.size)

    runs = train_settings(data, options)
    missed = failures(report(data, runs, options.seed), by_chance(data))
    stages = train_stages(data, options)
    report(data, stages, options.seed)
    written = draw(data, runs, stages, options)
    print(f"\n{len(data.captions) * HELD_OUT_CLIPS} clips were held out; wrote {', '.join(map(str, written))}")
    for margin in missed:
        print(f"FAILED: {margin}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
