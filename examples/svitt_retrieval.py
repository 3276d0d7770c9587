"""Finding videos by what is said of them: a small SViTT learns from real clips and captions, dense and sparse.

    caption: "a man talking in a car late in the video running backwards and fast"   <->   clips of 8 frames

Four models learn one after the other, alike but for what their video encoders read and keep: everything, few edges,
few nodes, few of both. For clips of frames that none has seen, the example prints how often the right caption is found
for a clip and a right clip for a caption, beside chance, with the time and the memory of a step. Then the sparsest one
learns again, with few frames first and more and sparser later. Pictures show who reads whom, and what is kept.

    python -m examples.svitt_retrieval
    python -m examples.svitt_retrieval --resume      from the last checkpoints of a run with the same options
"""

import argparse
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.measure import peak_memory
from examples.captions import FIRST, MASK, PAD, Caption, Clips, Words, captions
from examples.training import Training, write_losses
from vattn import RelativePositionBias3D
from vattn.models.svitt import (
    Sparsity,
    SViTT,
    TextEncoder,
    VideoEncoder,
    VideoTokens,
    expand,
    rank_texts,
    rank_videos,
    recall,
)

PATCH, DIM, DEPTH = 8, 64, 4
NUM_FRAMES = 8
BATCH, LEARNING_RATE = 12, 2e-3
HELD_OUT_CLIPS = 3  # for each caption
RECALLED = (1, 3)  # the first one is right, or one of the first three
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
    """A model in training, and how long its steps take."""

    training: Training
    model: SViTT
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def num_frames(self) -> int:
        return self.model.video.window[0]


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
        return torch.stack([self.clips.random(self.captions[i], num_frames) for i in chosen])

    def held_out(self, num_frames: int) -> Tensor:
        """``(captions * HELD_OUT_CLIPS, T, 3, size, size)``, those of the first caption first."""
        return torch.cat([self.clips.held_out(caption, num_frames, HELD_OUT_CLIPS) for caption in self.captions])


def new_model(size: int, num_words: int, num_frames: int, sparsity: Sparsity) -> SViTT:
    """A small SViTT; where the video encoder keeps few tokens, the last text layer reads half of these."""
    video = VideoEncoder(
        num_frames, image_size=size, patch_size=PATCH, dim=DIM, depth=DEPTH, num_heads=4, mlp_dim=4 * DIM,
        layer_scale=None, sparsity=sparsity,
    )  # fmt: skip
    text = TextEncoder(
        num_words, DIM, 4, 4, 4 * DIM, max_length=32, fusion_layer=2, video_dim=DIM, prune_after=(2,),
        keep=0.5 if sparsity.keep < 1 else 1.0, dropout=0.0,
    )  # fmt: skip
    model = SViTT(video, text, embed_dim=64, mask_id=MASK, never_masked=(PAD, FIRST), mask_share=0.3)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # what suits 768 channels is too little for these
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, RelativePositionBias3D):  # from 0, the order of frames would be learned late
            nn.init.normal_(module.table)
    return model


def step_loss(run: Run, data: Data, chosen: Tensor) -> Tensor:
    """The three losses of a batch."""
    video = data.videos(chosen, run.num_frames)
    return run.model(video, data.ids[chosen], data.mask[chosen], pair_ids=chosen).total


def train(run: Run, data: Data) -> None:
    """To the last step, with the time of each."""
    last = time.perf_counter()

    def loss_of(chosen: Tensor) -> Tensor:
        nonlocal last
        now = time.perf_counter()
        run.seconds.append(now - last)
        last = now
        return step_loss(run, data, chosen)

    run.training.run(data.batches(), loss_of)


@torch.no_grad()
def encode(model: SViTT, videos: Tensor, generator: torch.Generator) -> VideoTokens:
    """All videos, some at a time."""
    parts = [model.encode_video(part, generator=generator) for part in videos.split(16)]
    return VideoTokens(torch.cat([part.tokens for part in parts]), torch.cat([part.pooled for part in parts]), ())


@torch.no_grad()
def evaluate(run: Run, data: Data, seed: int) -> tuple[list[float], dict[str, float]]:
    """For clips that were held out: how often a right caption is found for a clip, and a right clip for a caption.

    Also, how often the first caption is right about each thing that it tells.
    """
    videos = encode(run.model, data.held_out(run.num_frames), torch.Generator().manual_seed(seed))
    texts = run.model.text(data.ids, data.mask)
    right = torch.eye(len(texts), dtype=torch.bool).repeat_interleave(HELD_OUT_CLIPS, 0)
    to_texts = rank_texts(run.model, videos, texts, data.mask, rerank=8)
    to_videos = rank_videos(run.model, videos, texts, data.mask, rerank=8 * HELD_OUT_CLIPS)
    shares = [recall(to_texts, right, k) for k in RECALLED] + [recall(to_videos, right.T, k) for k in RECALLED]
    told = [dataclasses.astuple(data.captions[i]) for i in to_texts[:, 0]]
    true = [dataclasses.astuple(caption) for caption in data.captions for _ in range(HELD_OUT_CLIPS)]
    hits = torch.tensor([[a == b for a, b in zip(*pair, strict=True)] for pair in zip(told, true, strict=True)])
    names = [field.name for field in dataclasses.fields(Caption)]
    return shares, dict(zip(names, hits.double().mean(0).tolist(), strict=True))


def memory_of_step(run: Run, data: Data) -> float:
    """MiB that a training step takes beyond the model, its gradients included."""
    chosen = next(data.batches())
    run.model.zero_grad()
    taken = peak_memory(lambda: step_loss(run, data, chosen).backward(), torch.device("cpu"))
    run.model.zero_grad()
    return taken / 2**20


def draw_kept(run: Run, data: Data, path: pathlib.Path, seed: int) -> None:
    """A clip of each video, and under it what is left after each pruning."""
    shown: dict[str, Caption] = {caption.video: caption for caption in data.captions}
    videos = torch.cat([data.clips.held_out(caption, run.num_frames, 1) for caption in shown.values()])
    with torch.no_grad():
        kept = run.model.encode_video(videos, generator=torch.Generator().manual_seed(seed)).kept
    frames, rows, columns = run.model.video.window
    figure = Figure(figsize=(1.2 * frames, 1.25 * len(videos) * (1 + len(kept))), layout="constrained")
    panels = figure.subplots(len(videos) * (1 + len(kept)), frames, squeeze=False)
    for i, (video, name) in enumerate(zip(videos, shown, strict=True)):
        pixels = ((video.permute(0, 2, 3, 1) + 1) / 2).clamp(0, 1)
        for stage in range(1 + len(kept)):
            left = torch.ones(frames * rows * columns, dtype=torch.bool)
            if stage:
                left = torch.zeros_like(left).scatter(0, kept[stage - 1][i], True)
            patches = left.view(frames, rows, columns, 1).float()
            light = patches.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2) * 0.85 + 0.15
            for t, axes in enumerate(panels[i * (1 + len(kept)) + stage]):
                axes.set(xticks=[], yticks=[])
                axes.imshow((pixels[t] * light[t]).numpy())
            panels[i * (1 + len(kept)) + stage][0].set_ylabel(f"after {stage}" if stage else name[:8], fontsize=8)
    figure.suptitle("patches that are left after each pruning", fontsize=10)
    figure.savefig(path, dpi=120)


def chance(k: int, right: int, answers: int) -> float:
    """How often one of the `right` answers is among `k` that were guessed."""
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def print_table(data: Data, runs: Sequence[Run], seed: int) -> None:
    """A row for each model, and one for chance."""
    count = len(data.captions)
    rows = {"chance": [chance(k, n, n * count) for n in (1, HELD_OUT_CLIPS) for k in RECALLED]}
    costs, told = {"chance": ""}, {}
    for run in runs:
        name, step = run.training.name, statistics.median(run.seconds) if run.seconds else math.nan
        rows[name], told[name] = evaluate(run, data, seed)
        costs[name] = f"{step * 1e3:>11.0f} ms{memory_of_step(run, data):>9.0f} MiB"
    names = [f"{name} R@{k}" for name in ("video-to-text", "text-to-video") for k in RECALLED]
    print(f"\n{'':<24}{''.join(f'{name:>19}' for name in names)}{'step':>14}{'memory':>13}")
    for name, shares in rows.items():
        print(f"{name:<24}{''.join(f'{share:>19.0%}' for share in shares)}{costs[name]}")
    for name, hits in told.items():
        print(f"{name:<24}first caption right about {', '.join(f'{what} {share:.0%}' for what, share in hits.items())}")


def train_settings(data: Data, options: argparse.Namespace) -> list[Run]:
    """The four settings, one after the other."""
    runs = []
    for name, sparsity in SETTINGS.items():
        torch.manual_seed(options.seed)
        model = new_model(options.size, len(data.words), NUM_FRAMES, sparsity)
        path = options.outputs / f"svitt_{name.replace(' ', '_')}.pt"
        run = Run(Training(name, model, options.steps, LEARNING_RATE, path), model)
        if options.resume:
            run.training.resume()
        train(run, data)
        runs.append(run)
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
        run = Run(Training(f"{num_frames} frames", model, options.steps // 2, LEARNING_RATE, path), model)
        if options.resume:
            run.training.resume()
        train(run, data)
        runs.append(run)
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of training, for each setting; half for each stage")
    parser.add_argument("--size", type=int, default=48, help=f"of a frame in pixels, a multiple of {PATCH}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the outputs")
    parser.add_argument("--outputs", type=pathlib.Path, default=pathlib.Path("outputs"))
    options = parser.parse_args(arguments)
    options.outputs.mkdir(parents=True, exist_ok=True)
    data = Data(options.size)

    runs = train_settings(data, options)
    print_table(data, runs, options.seed)
    stages = train_stages(data, options)
    print_table(data, stages, options.seed)

    model = runs[-1].model
    layout = model.video.sparsity.layout(NUM_FRAMES * (options.size // PATCH) ** 2, torch.Generator().manual_seed(0))
    assert layout is not None
    layout.plot(options.outputs / "svitt_layout.png")
    draw_kept(runs[-1], data, options.outputs / "svitt_kept.png", options.seed)
    trainings = [run.training for run in (*runs, *stages)]
    write_losses(
        trainings, ["contrastive + matching + masked words"] * len(trainings), options.outputs / "svitt_loss.png"
    )
    written = ", ".join(str(options.outputs / f"svitt_{name}.png") for name in ("layout", "kept", "loss"))
    print(f"\n{len(data.captions) * HELD_OUT_CLIPS} clips were held out; wrote {written}")


if __name__ == "__main__":
    main()
