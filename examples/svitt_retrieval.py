"""Text-to-video retrieval: a small SViTT learns from real clips and captions, dense and sparse.

    caption: "a man talking in a car late in the video running backwards and fast"   <->   clips of 8 frames

Four models are trained one after the other, which differ in what their video encoders read and keep: everything, few
edges, few nodes, few of both. The example retrieves captions for held-out clips and clips for captions, ranked by
similarity alone and again by matching, and prints how often the first answers are right, beside chance; how often the
first caption is right about each thing that it tells; and the time and the memory of a step. It fails if a setting is
not far above chance, or a sparse one far behind the dense one. Then the sparsest one learns again, with few frames
first and more and sparser later. Pictures show the block layout, what is kept, and the losses.

With a CSV file of one's own videos and captions, see `examples.pairs`, the sparsest setting alone is trained, and
nothing fails. Each video must have 64 frames or more; its last quarter is held out.

    python -m examples.svitt_retrieval
    python -m examples.svitt_retrieval --resume      from the last checkpoints of a run with the same options
    python -m examples.svitt_retrieval --captions captions.csv --videos FOLDER
    python -m examples.svitt_retrieval --captions captions.csv --videos FOLDER --resume --query "a dog at the sea"
"""

import argparse
import dataclasses
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_memory
from examples import pictures
from examples.captions import FIRST, HELD_OUT_CLIPS, MASK, PAD, Batch, MadePairs, Pairs, with_changes
from examples.options import Needs, parser, start
from examples.pairs import OwnPairs
from examples.training import new_training
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
from vattn.training import Training

PATCH, DIM, DEPTH = 8, 64, 4
NUM_FRAMES = 8
LEARNING_RATE = 2e-3
EASY = 0.5  # of the steps: matching begins with any wrong pairs, as it learns nothing from hard ones at first
RECALLED = (1, 5)  # the first one is right, or one of the first five
RERANKED = 8  # captions of each clip, and clips of as many captions
TIMED_STEPS = 7
TIMES_CHANCE = 4.0  # the mean R@1 of every setting is at least this many times that of chance
BEHIND_DENSE = 0.15  # and that of a sparse one at most this much below the dense one
NEEDS, OWN_NEEDS = Needs(minutes=11, memory=0.9, steps=400), Needs(minutes=2, memory=0.9, steps=400)
PRUNE_AFTER = (0, 2)
DENSE = Sparsity(block_size=18, num_random=None, keep=1.0, prune_after=PRUNE_AFTER)
SETTINGS = {
    "dense": DENSE,
    "edge-sparse": dataclasses.replace(DENSE, num_random=3),
    "node-sparse": dataclasses.replace(DENSE, keep=0.6),
    "edge- and node-sparse": dataclasses.replace(DENSE, num_random=3, keep=0.6),
}
SPARSEST = "edge- and node-sparse"
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


def new_model(size: int, data: Pairs, num_frames: int, sparsity: Sparsity) -> SViTT:
    """A small SViTT; where the video encoder keeps few tokens, the last text layer reads half of these."""
    width = {"dim": DIM, "depth": DEPTH, "num_heads": 4, "mlp_dim": 4 * DIM}
    video = {
        "num_frames": num_frames, "image_size": size, "patch_size": PATCH, "layer_scale": None, "sparsity": sparsity,
    }  # fmt: skip
    text = {
        "vocab_size": len(data.words), "max_length": max(32, data.ids.shape[1]), "fusion_layer": 2, "prune_after": (2,),
        "keep": 0.5 if sparsity.keep < 1 else 1.0, "dropout": 0.0,
    }  # fmt: skip
    model = SViTT(video | width, text | width, embed_dim=64, mask_id=MASK, never_masked=(PAD, FIRST), mask_share=0.3)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # what suits 768 channels is too little for these
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, RelativePositionBias3D):  # from 0, the order of frames would be learned late
            nn.init.normal_(module.table)
    return model


def step_loss(run: Run, batch: Batch) -> Tensor:
    """The three losses of a batch."""
    hard = run.training.step >= EASY * run.training.steps
    return run.model.training_loss(batch.video, batch.ids, batch.mask, pair_ids=batch.pair_ids, hard_negatives=hard)


def train(run: Run, data: Pairs, resume: bool) -> None:
    """To the last step, from the last checkpoint if there is one to `resume` from."""
    if resume:
        run.training.resume()
    run.training.run(data.batches(run.num_frames), lambda batch: step_loss(run, batch))
    run.model.save_pretrained(run.training.path.with_suffix(""))


@torch.no_grad()
def encode(model: SViTT, videos: Tensor, generator: torch.Generator) -> VideoTokens:
    """All videos, some at a time."""
    parts = [model.encode_video(part, generator=generator) for part in videos.split(16)]
    return VideoTokens(torch.cat([part.tokens for part in parts]), torch.cat([part.pooled for part in parts]), ())


@torch.no_grad()
def evaluate(run: Run, data: Pairs, seed: int) -> dict[str, Found]:
    """What is retrieved of held-out clips, by similarity alone, and where matching ranks the best ones again."""
    videos = encode(run.model, with_changes(data.held_out(run.num_frames)), torch.Generator().manual_seed(seed))
    texts = run.model.text(data.ids, data.mask)
    found = {}
    for name, again in (("similarity", 0), ("matching", RERANKED)):
        to_texts = rank_texts(run.model, videos, texts, data.mask, rerank=again)
        to_videos = rank_videos(run.model, videos, texts, data.mask, rerank=again * HELD_OUT_CLIPS)
        told = [data.told[i] for i in to_texts.indices[:, 0]]
        hits = [[a == b for a, b in zip(*both, strict=True)] for both in zip(told, data.shown, strict=True)]
        found[name] = Found(
            [recall(to_texts, data.right, k) for k in RECALLED],
            [recall(to_videos, data.right.T, k) for k in RECALLED],
            dict(zip(data.aspects, torch.tensor(hits).double().mean(0).tolist(), strict=True)),
        )
    return found


def by_chance(data: Pairs) -> Found:
    """How often guesses are right."""
    shares = [
        [statistics.fmean(chance(min(k, len(row)), int(row.sum()), len(row)) for row in right) for k in RECALLED]
        for right in (data.right, data.right.T)
    ]
    told = {name: 1 / len(set(values)) for name, values in zip(data.aspects, zip(*data.told, strict=True), strict=True)}
    return Found(shares[0], shares[1], told)


def chance(k: int, right: int, answers: int) -> float:
    """How often one of the `right` answers is among `k` that were guessed."""
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def cost_of_step(run: Run, data: Pairs) -> str:
    """The time of a training step, and the memory that it takes beyond the model, its gradients included."""
    batches = data.batches(run.num_frames)

    def step() -> None:
        run.model.zero_grad()
        step_loss(run, next(batches)).backward()

    taken = peak_memory(step, torch.device("cpu"))
    seconds = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    run.model.zero_grad()
    return f"{statistics.median(seconds) * 1e3:>8.0f} ms{taken / 2**20:>6.0f} MiB"


def report(data: Pairs, runs: Sequence[Run], seed: int) -> dict[str, dict[str, Found]]:
    """Print what each run retrieves, beside chance, and what its steps cost; what it retrieves."""
    guessed = by_chance(data)
    names = [f"R@{k}" for k in RECALLED]
    print("\nR@k: how often a right answer is among the first k")
    print(f"{'held-out clips':<34}{'caption of clip':>18}{'clip of caption':>18}{'mean':>9}", end="")
    print(f"{'the first caption is right about' if guessed.told else '':>40}")
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
        guesses = not_told(rankings["similarity"], guessed, len(data.right))
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
            missed.append(f"{name} has {share:.1%}, less than {TIMES_CHANCE:g} times as much as chance")
        if share < dense - BEHIND_DENSE:
            missed.append(f"{name} is more than {100 * BEHIND_DENSE:.0f} points behind dense")
    return missed


def train_settings(data: Pairs, names: Sequence[str], options: argparse.Namespace) -> list[Run]:
    """Some of the settings, one after the other."""
    runs = []
    for name in names:
        torch.manual_seed(options.seed)
        model = new_model(options.size, data, NUM_FRAMES, SETTINGS[name])
        path = options.outputs / f"svitt_{name.replace(' ', '_')}.pt"
        runs.append(Run(new_training(name, model, options.steps, LEARNING_RATE, path), model))
        train(runs[-1], data, options.resume)
    return runs


def train_stages(data: Pairs, options: argparse.Namespace) -> list[Run]:
    """Few frames first, then more and sparser: each stage goes on with the model of the one before."""
    runs: list[Run] = []
    torch.manual_seed(options.seed)
    for num_frames, keep in STAGES:
        sparsity = dataclasses.replace(SETTINGS[SPARSEST], keep=keep)
        if runs:
            model = expand(runs[-1].model, num_frames, sparsity)
        else:
            model = new_model(options.size, data, num_frames, sparsity)
        path = options.outputs / f"svitt_{num_frames}_frames.pt"
        runs.append(Run(new_training(f"{num_frames} frames", model, options.steps // 2, LEARNING_RATE, path), model))
        train(runs[-1], data, options.resume)
    return runs


def draw(data: Pairs, runs: Sequence[Run], stages: Sequence[Run], options: argparse.Namespace) -> list[pathlib.Path]:
    """The block layout and what is kept, of the last of `runs`; and all losses."""
    written = [options.outputs / f"svitt_{name}.png" for name in ("layout", "kept", "loss")]
    encoder = runs[-1].model.video
    layout = encoder.sparsity.layout(math.prod(encoder.window), torch.Generator().manual_seed(options.seed))
    assert layout is not None
    layout.plot(written[0])
    clips = data.held_out(NUM_FRAMES)[[*data.pictured]]
    with torch.no_grad():
        kept = encoder(with_changes(clips), generator=torch.Generator().manual_seed(options.seed)).kept
    titles = [data.titles[i] for i in data.pictured]
    pictures.kept_patches(dict(zip(titles, clips, strict=True)), kept, encoder.window, written[1])
    panels = {"8 frames": runs, f"{SPARSEST}, more frames each time": stages}
    losses = {title: {run.name: run.training.losses for run in panel} for title, panel in panels.items() if panel}
    pictures.smooth_losses(losses, "contrastive + matching + masked words", written[2])
    return written


@torch.no_grad()
def search(run: Run, data: Pairs, query: str, seed: int) -> None:
    """Print the held-out clips that answer a query best."""
    known = [word for word in data.words.split(query) if word in data.words.numbers]
    unknown = [word for word in data.words.split(query) if word not in data.words.numbers]
    if unknown:
        print(f"\nno caption has these words, which are left out: {', '.join(unknown)}")
    if not known:
        return
    videos = encode(run.model, with_changes(data.held_out(run.num_frames)), torch.Generator().manual_seed(seed))
    ranking = rank_videos(run.model, videos, run.model.text(data.words.encode([" ".join(known)])), rerank=RERANKED)
    print(f"\nclips for {query!r}, the first ones ranked by matching")
    print(f"{'similarity':>10}{'match':>8}  clip")
    for clip, similarity, match in zip(*(row[0].tolist() for row in ranking), strict=False):
        print(f"{similarity:>10.2f}{match:>8.2f}  {data.titles[clip]}")


def main(arguments: Sequence[str] | None = None) -> int:
    of_all = parser(__doc__, NEEDS)
    of_all.add_argument("--captions", type=pathlib.Path, help="a CSV file with the columns file,caption of your videos")
    of_all.add_argument("--query", help="a text to search the held-out clips for, after training")
    of_all.add_argument("--size", type=int, default=48, help=f"of a frame in pixels, a multiple of {PATCH}")
    of_all.add_argument("--resume", action="store_true", help="go on from the checkpoints in the outputs")
    options = of_all.parse_args(arguments)
    if options.videos is not None and options.captions is None:
        of_all.error("--videos needs --captions")
    own = options.captions is not None
    start(__doc__, options, OWN_NEEDS if own else NEEDS)
    own_pairs = (options.captions, options.videos, options.size, options.fps)
    data: Pairs = OwnPairs(*own_pairs) if own else MadePairs(options.size)

    runs = train_settings(data, [SPARSEST] if own else [*SETTINGS], options)
    if not own:
        print(
            "\nSparse settings read less of a clip than the dense one: they trade recall for time and memory of a step."
        )
    found = report(data, runs, options.seed)
    missed = [] if own else failures(found, by_chance(data))
    stages = [] if own else train_stages(data, options)
    if stages:
        report(data, stages, options.seed)
    written = draw(data, runs, stages, options)
    print(f"\n{len(data.right)} clips were held out; wrote {', '.join(map(str, written))}")
    if options.query:
        search(runs[-1], data, options.query, options.seed)
    for margin in missed:
        print(f"FAILED: {margin}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
