"""An image transformer becomes a video model (LAPS) and learns from real clips, with vattn and with plain PyTorch.

Three clips are played forwards and backwards; the model is to say which clip it is and which way it runs. It
trains once with ``vattn.leap_attention`` and once with what one would write in plain PyTorch (frames permuted
into pairs, scaled dot product attention, frames permuted back, channels shifted), from the same weights, on the
same batches. The demo fails if the gradients differ or a loss does not fall.

    python -m examples.demo
    python -m examples.demo --videos FOLDER     learns from your own, of 24 frames or more each
"""

import copy
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification

import vattn
from benchmarks.measure import peak_memory
from examples import clips, pictures
from examples.options import Needs, parser, start, verdict
from vattn.models.laps import VideoFromImage, video_from_image

NUM_FRAMES = 8
LEVELS = (1, 2, 3, 1)
FOLD_DIV = 4
IMAGE_SIZE = 160
STRIDE = 3  # every third frame of a clip
SHOWN = "carphone_pristine"  # in a picture, or the first one of one's own
WARMUP = 2  # steps left out of the timing
GRADIENT_TOLERANCE = 1e-4  # float32, summed in another order; 1e-6 is typical
LOSS_TOLERANCE = 0.8  # the last losses are at most this share of the first ones
NEEDS = Needs(minutes=0.75, memory=1.3, steps=30)

Attention = Callable[..., Tensor | tuple[Tensor, Tensor]]


def plain_leap_attention(
    query: Tensor, key: Tensor, value: Tensor, leap: int, *, group_size: int, fold_div: int, scale: float, **_: object
) -> Tensor:
    """Leap attention and periodic shift without vattn, for clips that are made of whole groups."""
    frames = value.movedim(1, 3).shape  # (B, T, N, H, D)

    def pair(x: Tensor) -> Tensor:
        spans = x.movedim(1, 3).unflatten(1, (-1, group_size, leap))  # (B, T / span, group, leap, N, H, D)
        return spans.transpose(2, 3).flatten(0, 2).flatten(1, 2).transpose(1, 2)  # (B * T / group, H, group * N, D)

    out = F.scaled_dot_product_attention(pair(query), pair(key), pair(value), scale=scale).transpose(1, 2)
    spans = out.reshape(frames[0], -1, leap, group_size, *frames[2:])
    out = spans.transpose(2, 3).reshape(frames)
    fold = frames[-1] // fold_div
    shifted = torch.zeros_like(out)
    shifted[:, :-1, ..., :fold] = out[:, 1:, ..., :fold]
    shifted[:, 1:, ..., fold : 2 * fold] = out[:, :-1, ..., fold : 2 * fold]
    shifted[..., 2 * fold :] = out[..., 2 * fold :]
    return shifted.movedim(3, 1)


@dataclasses.dataclass
class Run:
    """One model in training, and the attention that it runs."""

    name: str
    model: VideoFromImage
    attention: Attention
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, weight_decay=0.05)

    def gradients(self, video: Tensor, label: Tensor) -> Tensor:
        """Set the gradients of the model, and return the loss."""
        self.model.zero_grad()
        with mock.patch("vattn.nn.leap.leap_attention", self.attention):
            loss = self.model.training_loss(video, label)
            loss.backward()
        return loss.detach()

    def step(self, video: Tensor, label: Tensor) -> None:
        start = now(video.device)
        loss = self.gradients(video, label)
        self.optimizer.step()
        self.seconds.append(now(video.device) - start)
        self.losses.append(loss.item())

    @property
    def step_time(self) -> float:
        return statistics.median(self.seconds[WARMUP:])

    def learned(self) -> bool:
        return statistics.mean(self.losses[-5:]) < LOSS_TOLERANCE * statistics.mean(self.losses[:5])


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gradient_difference(first: Run, second: Run) -> float:
    """The largest difference between gradients of the two models, relative to each parameter's largest gradient."""
    gradients = ([x.grad for x in run.model.parameters() if x.grad is not None] for run in (first, second))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*gradients, strict=True))


def shares_of_step(run: Run, video: Tensor, label: Tensor) -> dict[str, float]:
    """Which share of the time of a training step its attention takes, its linear layers, and all else."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if video.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run.gradients(video, label)
        run.optimizer.step()
    shares = {"attention": 0.0, "linear layers": 0.0, "the rest": 0.0}
    for event in profile.key_averages():
        time = event.self_device_time_total if video.is_cuda else event.self_cpu_time_total
        if event.key.startswith("vattn::"):
            shares["attention"] += time
        elif event.key in ("aten::mm", "aten::addmm"):
            shares["linear layers"] += time
        else:
            shares["the rest"] += time
    total = sum(shares.values())
    return {name: time / total for name, time in shares.items()}


def video_model(num_classes: int) -> VideoFromImage:
    """A small image ViT with random weights, turned into a video model."""
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=16,
        hidden_size=192,
        num_hidden_layers=len(LEVELS),
        num_attention_heads=3,
        intermediate_size=768,
        # The gradient of a key bias is 0, as softmax ignores what all keys have in common: nothing to compare.
        qkv_bias=False,
        num_labels=num_classes,
    )
    image_model = ViTForImageClassification(config)
    return video_from_image(image_model, num_frames=NUM_FRAMES, levels=LEVELS, fold_div=FOLD_DIV)


def report(ours: Run, plain: Run, memory: Sequence[float], shares: Mapping[str, float], difference: float) -> None:
    """Print what was measured, and what it means."""
    print(
        "\nThe same model was trained twice, from the same weights and on the same batches. Only the attention differs:"
    )
    print("vattn.leap_attention, or plain PyTorch (permute frames into pairs, attend, permute back, shift channels).\n")
    print(f"{'':<12}{'first loss':>12}{'last loss':>12}{'step':>12}{'extra memory':>16}")
    for run, size in zip((ours, plain), memory, strict=True):
        print(
            f"{run.name:<12}{run.losses[0]:>12.3f}{run.losses[-1]:>12.3f}{run.step_time * 1e3:>9.0f} ms"
            f"{size / 2**20:>12.0f} MiB"
        )
    print(f"\nSame result: gradients differ by at most {difference:.1e} of the largest one of their parameter.")
    speedup = plain.step_time / ours.step_time
    print(f"Speedup of a training step of the whole model over plain PyTorch: {speedup:.2f}x.")
    if speedup < 1:
        print("So vattn is slower here. On a busy machine, a difference of a few percent may be chance: run it again.")
    spent = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    print(f"Of the step with vattn: {spent}. Only attention can be faster:")
    print("the others are the same code in both models.")


def main(arguments: Sequence[str] | None = None) -> int:
    of_all = parser(__doc__, NEEDS)
    of_all.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = of_all.parse_args(arguments)
    if options.steps <= WARMUP:
        of_all.error(f"--steps must be at least {WARMUP + 1}, as {WARMUP} are not timed, got --steps {options.steps}")
    start(__doc__, options, NEEDS)
    device = torch.device(options.device)
    torch.manual_seed(options.seed)

    span = NUM_FRAMES * STRIDE
    videos = clips.load(IMAGE_SIZE, options.videos, fps=options.fps, num_frames=span)
    generator = torch.Generator().manual_seed(options.seed)
    batches = clips.batches([*videos.values()], NUM_FRAMES, STRIDE, generator)
    model = video_model(2 * len(videos)).to(device)
    ours = Run("vattn", model, vattn.leap_attention)
    plain = Run("PyTorch", copy.deepcopy(model), plain_leap_attention)
    runs = (ours, plain)

    video, label = (x.to(device) for x in next(batches))
    for run in runs:
        run.gradients(video, label)
    difference = gradient_difference(ours, plain)

    print(f"training on {tuple(video.shape)} (clips, frames, channels, height, width), {device}")
    bar = tqdm(range(options.steps), unit="step")
    for index in bar:
        for run in runs if index % 2 else reversed(runs):  # in turns, so that neither always runs on a warm cache
            run.step(video, label)
        bar.set_postfix({f"loss {run.name}": f"{run.losses[-1]:.3f}" for run in runs})
        video, label = (x.to(device) for x in next(batches))
    shares = shares_of_step(ours, video, label)
    memory = [peak_memory(functools.partial(run.gradients, video, label), device) for run in runs]

    curves, attended = (options.outputs / f"demo_{name}.png" for name in ("loss", "attention"))
    pictures.loss_curves({run.name: run.losses for run in runs}, curves, "which clip, and which way does it run?")
    clip = videos[SHOWN] if SHOWN in videos else next(iter(videos.values()))
    pictures.attention(ours.model, clips.to_model(clip[:span:STRIDE]).to(device), attended)

    report(ours, plain, memory, shares, difference)
    print(f"wrote {curves} and {attended}")

    if not difference <= GRADIENT_TOLERANCE:
        print(f"FAILED: the gradients differ by {difference:.1e}, more than {GRADIENT_TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return verdict([f"the loss of {run.name} did not fall" for run in runs if not run.learned()], options, NEEDS.steps)


if __name__ == "__main__":
    sys.exit(main())
