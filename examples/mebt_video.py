"""Video from codes: a small 3D VQGAN makes codes of real clips, and a small MeBT learns to find those that are masked.

    video (16 frames)  ->  codes (4, size / 4, size / 4)  ->  MeBT: masked codes from known ones  ->  video

Both train one after the other, from checkpoints where there are any. The last quarter of each clip is held out: on its
windows of 16 frames, the example prints how close the tokenizer comes to the pixels, and how often MeBT is right about
masked codes, beside two baselines that have learned nothing. GIFs show reconstruction, generation, continuation and
inpainting next to the truth.

    python -m examples.mebt_video
    python -m examples.mebt_video --resume      from the last checkpoint of a run with the same options
"""

import argparse
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from examples import clips
from vattn.models.mebt import MeBT, continue_video, generate, inpaint, split_positions
from vattn.models.vqvae import VQGAN

WINDOW = 16  # frames
DOWNSAMPLE = (4, 4, 4)
HELD_OUT = 0.25  # of the frames of each clip, its last ones
NUM_CODES = 128
MODES = ("latent_enc", "latent_enc", "latent_dec", "lt2l", "latent_dec")
RATIOS = (0.25, 0.5, 0.75)  # of the codes of a window, masked in the evaluation
EVALUATIONS = 8  # random masks for each window and ratio
SAVE_EVERY = 100  # steps
SAMPLING: dict[str, Any] = {"num_steps": 12, "temperature": 0.9, "top_p": 0.95, "progress": True}


@dataclasses.dataclass
class Training:
    """A model in training, which can be saved and resumed at any step."""

    name: str
    model: nn.Module
    steps: int
    learning_rate: float
    path: pathlib.Path
    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)

    def run(self, batches: Iterator[Tensor], loss_of: Callable[[Tensor], Tensor], until: int | None = None) -> None:
        """Train up to step `until`, or to the last one."""
        self.model.train()
        end = self.steps if until is None else until
        with tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step") as bar:
            while self.step < end:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate * self._warm_and_cool()
                loss = loss_of(next(batches))
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.losses.append(loss.item())
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}")
                if self.step % SAVE_EVERY == 0 or self.step == end:
                    self.save()
        self.model.eval()

    def save(self) -> None:
        """Write a checkpoint; one that is interrupted leaves the last one as it was."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "random": torch.get_rng_state(),
        }
        unfinished = self.path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, self.path)

    def resume(self) -> bool:
        """Go on from the checkpoint, random numbers included, if there is one."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]
        torch.set_rng_state(state["random"])
        return True

    def _warm_and_cool(self) -> float:
        """The share of the learning rate: linear over the first twentieth of the steps, then half a cosine to 0."""
        warm = min(1.0, (self.step + 1) / (0.05 * self.steps))
        return warm * (1 + math.cos(math.pi * self.step / self.steps)) / 2


def split_clips(size: int) -> tuple[list[Tensor], list[Tensor]]:
    """For each clip the frames to train on, and those that are held out, ``(T, 3, size, size)`` in -1 to 1."""
    videos = [clips.to_model(clips.decode(name, size)) for name in clips.NAMES]
    ends = [round(len(video) * (1 - HELD_OUT)) for video in videos]
    parts = list(zip(videos, ends, strict=True))
    return [video[:end] for video, end in parts], [video[end:] for video, end in parts]


def windows(video: Tensor, every: int) -> Tensor:
    """The windows of a clip that begin at every `every`-th frame: ``(windows, 3, 16, size, size)``."""
    return video.unfold(0, WINDOW, every).movedim(-1, 2)


def video_batches(videos: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """Endless batches of random windows of each clip, half of them mirrored."""
    while True:
        chosen = []
        for video in [*videos] * count:
            start = int(torch.randint(len(video) - WINDOW + 1, ()))
            window = video[start : start + WINDOW].transpose(0, 1)
            chosen.append(window.flip(-1) if torch.rand(()) < 0.5 else window)
        yield torch.stack(chosen)


def code_batches(codes: Tensor, count: int) -> Iterator[Tensor]:
    """Endless batches of random windows of codes."""
    while True:
        yield codes[torch.randint(len(codes), (count,))]


@torch.no_grad()
def encode(tokenizer: VQGAN, videos: Tensor, title: str) -> Tensor:
    """The codes of windows, some at a time."""
    return torch.cat([tokenizer.encode(part) for part in tqdm(videos.split(8), desc=title, unit="batch")])


def train_tokenizer(training: Training, videos: Sequence[Tensor]) -> None:
    """Reconstruction and commitment; the codes follow the vectors that take them."""

    def loss_of(video: Tensor) -> Tensor:
        reconstruction, quantized = training.model(video)
        return F.l1_loss(reconstruction, video) + quantized.commitment_loss

    training.run(video_batches(videos, count=1), loss_of)


def peak_signal_to_noise(video: Tensor, reconstruction: Tensor) -> float:
    """In dB, for pixels from -1 to 1."""
    return 10 * math.log10(4 / F.mse_loss(reconstruction.clamp(-1, 1), video).item())


@torch.no_grad()
def accuracies(model: MeBT, codes: Tensor, frequent: int, ratio: float, generator: torch.Generator) -> dict[str, float]:
    """How often masked codes are found, by MeBT and by the baselines.

    Of all codes of each window ``(4, height, width)``, a share `ratio` chosen at random is masked. Those of the
    window's first frame of codes are masked, but not counted, as there is no frame to copy from. MeBT says its most
    likely code for each, all in one pass, from those that are not masked. The baselines are to say the code `frequent`,
    and to copy the true code at the same place one frame before, even where that is masked itself.
    """
    flat, frame = codes.flatten(1), codes[0, 0].numel()
    right = {"MeBT": 0, "most frequent": 0, "copy": 0}
    counted = 0
    for _ in range(EVALUATIONS):
        order = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in flat])
        context, target = split_positions(order, round(ratio * flat.shape[1]))
        truth, later = flat.gather(1, target), target >= frame
        answers = {
            "MeBT": model(flat, context, target).argmax(-1),
            "most frequent": torch.full_like(truth, frequent),
            "copy": flat.gather(1, (target - frame).clamp(min=0)),
        }
        for name, answer in answers.items():
            right[name] += int(((answer == truth) & later).sum())
        counted += int(later.sum())
    return {name: hits / counted for name, hits in right.items()}


def write_gif(path: pathlib.Path, columns: Mapping[str, Tensor]) -> None:
    """Videos ``(B, 3, T, H, W)`` in -1 to 1, side by side under their titles, the batch from top to bottom."""
    grid = torch.cat([torch.cat(list(videos), -2) for videos in columns.values()], -1)  # (3, T, B * H, columns * W)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    zoom, header = 4, 14
    height, width = (zoom * x for x in pixels.shape[1:3])
    frames = []
    for frame in pixels:
        picture = Image.new("RGB", (width, height + header))
        picture.paste(Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.NEAREST), (0, header))
        for column, title in enumerate(columns):
            ImageDraw.Draw(picture).text((column * width // len(columns) + 2, 1), title)
        frames.append(picture)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


def write_videos(tokenizer: VQGAN, model: MeBT, videos: Tensor, outputs: pathlib.Path, seed: int) -> list[pathlib.Path]:
    """Reconstruction, generation, continuation and inpainting of one held-out window of each clip."""
    generator = torch.Generator().manual_seed(seed)
    codes = tokenizer.encode(videos)
    known = codes.shape[1] // 2
    hole = torch.zeros(codes.shape[1:], dtype=torch.bool)
    rows, columns = codes.shape[2:]
    hole[:, rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4] = True
    covered = F.interpolate(hole[None, None].float(), scale_factor=DOWNSAMPLE) > 0
    continued = continue_video(model, codes[:, :known], codes.shape[1], generator=generator, **SAMPLING)
    found = inpaint(model, codes, hole, generator=generator, **SAMPLING)
    generated = generate(model, tuple(codes.shape), generator=generator, **SAMPLING)
    reconstruction = {"truth": videos, "reconstruction": tokenizer.decode(codes)}
    first = videos.clone()
    first[:, :, known * DOWNSAMPLE[0] :] = 0
    masked = videos.masked_fill(covered, 0)
    shown = {
        "reconstruction": reconstruction,
        "generation": {"truth": videos, "generation": tokenizer.decode(generated)},
        "continuation": {**reconstruction, "given": first, "continuation": tokenizer.decode(continued)},
        "inpainting": {**reconstruction, "given": masked, "inpainting": tokenizer.decode(found)},
    }
    paths = []
    for name, pictures in shown.items():
        paths.append(outputs / f"mebt_{name}.gif")
        write_gif(paths[-1], pictures)
    return paths


def write_losses(trainings: Sequence[Training], path: pathlib.Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    labels = ("mean absolute error + commitment", "cross-entropy of masked codes")
    for axes, training, label in zip(figure.subplots(1, 2), trainings, labels, strict=True):
        axes.plot(range(1, len(training.losses) + 1), training.losses, linewidth=0.8)
        axes.set(title=training.name, xlabel="step", ylabel=label)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of training, for each of the two models")
    parser.add_argument("--size", type=int, default=32, help="of a frame in pixels, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the outputs")
    parser.add_argument("--outputs", type=pathlib.Path, default=pathlib.Path("outputs"))
    options = parser.parse_args(arguments)
    options.outputs.mkdir(parents=True, exist_ok=True)

    train, held_out = split_clips(options.size)
    torch.manual_seed(options.seed)
    tokenizer = VQGAN(NUM_CODES, code_dim=32, hidden=8, downsample=DOWNSAMPLE, groups=8)
    first = Training("tokenizer", tokenizer, options.steps, 2e-3, options.outputs / "mebt_tokenizer.pt")
    resumed = options.resume and first.resume() and first.step >= first.steps
    train_tokenizer(first, train)

    videos = torch.cat([windows(video, every=2) for video in train])
    codes = encode(tokenizer, videos, "codes to train on")
    tests = [windows(video, every=4) for video in held_out]
    held_out_codes = encode(tokenizer, torch.cat(tests), "codes held out")

    torch.manual_seed(options.seed)
    frames, height, width = codes.shape[1:]
    model = MeBT(NUM_CODES, (frames, height, width), dim=128, num_heads=4, modes=MODES, num_latents=128)
    second = Training("MeBT", model, options.steps, 3e-3, options.outputs / "mebt_model.pt")
    if resumed:  # otherwise its codes would be those of another tokenizer
        second.resume()
    second.run(code_batches(codes, 8), model.training_loss)

    with torch.no_grad():
        reconstruction = tokenizer.decode(held_out_codes)
        shown = torch.stack([test[0] for test in tests])
        written = write_videos(tokenizer, model, shown, options.outputs, options.seed)
    write_losses((first, second), options.outputs / "mebt_loss.png")

    print()
    decibel = peak_signal_to_noise(torch.cat(tests), reconstruction)
    print(f"held out: the last {HELD_OUT:.0%} of each clip, {len(held_out_codes)} windows of {WINDOW} frames")
    print(f"tokenizer: {decibel:.1f} dB PSNR; {len(codes.unique())} of {NUM_CODES} codes in use")
    frequent = int(codes.flatten().mode().values)
    print(f"{'masked':<10}{'MeBT':>10}{'most frequent code':>22}{'code of the frame before':>28}")
    for ratio in RATIOS:
        share = accuracies(model, held_out_codes, frequent, ratio, torch.Generator().manual_seed(options.seed))
        print(f"{ratio:<10.0%}{share['MeBT']:>10.1%}{share['most frequent']:>22.1%}{share['copy']:>28.1%}")
        if share["MeBT"] <= max(share["most frequent"], share["copy"]):
            print(f"{'':<10}here MeBT has not learned enough to beat both baselines")
    print(f"wrote {', '.join(map(str, [*written, options.outputs / 'mebt_loss.png']))}")


if __name__ == "__main__":
    main()
