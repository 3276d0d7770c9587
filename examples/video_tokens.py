"""Video out of video: a small VQ-VAE makes codes of real clips, and two priors over them make new ones.

    video (16 frames)  ->  codes (4, size / 4, size / 4)  ->  VideoGPT: each code from those before it   ->  video
                                                          ->  MeBT: all masked codes, a few times over   ->  video

All three train one after the other, from checkpoints where there are any. The last quarter of each clip is held out: on
its windows of 16 frames, the example prints how close the VQ-VAE comes to the pixels, beside videos that are shrunk to
as many numbers as there are codes, and enlarged again; how many bits the codes are worth; and what a video costs each
prior. It fails if the VQ-VAE does not come closer than these. GIFs and MP4s show
reconstructions and samples.

    python -m examples.video_tokens
    python -m examples.video_tokens --resume            from the last checkpoint of a run with the same options
    python -m examples.video_tokens --videos FOLDER     learns from your own, of 64 frames or more each
    python -m examples.video_tokens --short             only the VQ-VAE, which need not come closer
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import clips, pictures
from examples.mebt_video import DOWNSAMPLE, NUM_WINDOWS, SAMPLING, SHOWN, WINDOW, small_mebt
from examples.options import Needs, parser, start, verdict
from examples.quality import peak_signal_to_noise, shrink_and_enlarge, structural_similarity
from examples.training import code_batches, encode, new_training, write_losses
from vattn.models import mebt, videogpt
from vattn.models.vqvae import VQVAE
from vattn.training import Training

NUM_CODES = 256
CHANNELS = 3
NEEDS, SHORT_NEEDS = Needs(minutes=4, memory=1.2, steps=600), Needs(minutes=1, memory=0.6, steps=400)


def small_videogpt(tokenizer: VQVAE, grid: Sequence[int], attention: str) -> videogpt.VideoGPT:
    """A VideoGPT whose inputs begin as large as what attention adds to them.

    As the official code begins, codes and places are small beside it, and take longer to be found.
    """
    sizes: dict[str, Any] = {"dim": 96, "num_heads": 4, "num_layers": 4}
    model = videogpt.VideoGPT.for_tokenizer(tokenizer, grid, **sizes, attention=attention, dropout=0.1)
    nn.init.normal_(model.fc_in.weight, std=1 / model.embeddings.norm(dim=1).mean().item())
    for places in model.attn_stack.pos_embd.parameters():
        nn.init.normal_(places, std=0.5)
    return model


def baselines(videos: Tensor, codes: int) -> dict[str, Tensor]:
    """Videos shrunk, and enlarged again: to a colour for each code, and to as many numbers as there are codes.

    For the latter, time may shrink by any factor: it is the one that comes closest to the truth.
    """
    grid = [size // factor for size, factor in zip(videos.shape[2:], DOWNSAMPLE, strict=True)]
    fewer = [(frames, math.isqrt(codes // (CHANNELS * frames))) for frames in range(1, WINDOW + 1)]
    tried = [shrink_and_enlarge(videos, (frames, side, side)) for frames, side in fewer if side > 0]
    best = max(tried, key=lambda video: peak_signal_to_noise(videos, video))
    return {
        f"bilinear, {codes * CHANNELS} numbers": shrink_and_enlarge(videos, grid),
        f"bilinear, {codes} numbers": best,
    }


def bits(model: videogpt.VideoGPT, codes: Tensor, seen: Tensor) -> tuple[float, float]:
    """What a held-out code costs: under the model, and under how often each code was `seen`, plus once."""
    frequencies = seen.flatten().bincount(minlength=NUM_CODES) + 1.0
    alone = F.cross_entropy(frequencies.log().expand(codes.numel(), -1), codes.flatten())
    with torch.no_grad():
        return model.training_loss(codes).item() / math.log(2), alone.item() / math.log(2)


def time_sampling(sample: Callable[[], Tensor], head: nn.Module) -> tuple[Tensor, float, int]:
    """Codes of new videos, the seconds that each of them took, and how often `head` was asked."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook, start = head.register_forward_hook(count), time.perf_counter()
    codes = sample()
    seconds = (time.perf_counter() - start) / len(codes)
    hook.remove()
    return codes, seconds, calls


def report_tokenizer(tokenizer: VQVAE, videos: Tensor, codes: Tensor) -> tuple[Tensor, bool]:
    """Print what becomes of held-out `videos`, whose codes are `codes`; it, and whether it beats the baselines."""
    with torch.no_grad():
        reconstruction = torch.cat([2 * tokenizer.decode(part) for part in codes.split(8)])
    print("how close reconstructions are to the video (higher is closer), beside videos shrunk and enlarged again")
    print(f"{'':<24}{'PSNR':>10}{'SSIM':>8}")
    shown = {f"VQ-VAE, {codes[0].numel()} codes": reconstruction, **baselines(videos, codes[0].numel())}
    decibels = [peak_signal_to_noise(videos, video) for video in shown.values()]
    for (name, video), decibel in zip(shown.items(), decibels, strict=True):
        print(f"{name:<24}{decibel:>7.2f} dB{structural_similarity(videos, video):>8.3f}")
    frequencies = codes.flatten().bincount(minlength=NUM_CODES) / codes.numel()
    entropy = -(frequencies * (frequencies + 1e-10).log2()).sum().item()
    per_pixel = codes[0].numel() / videos[0, 0].numel()
    print(
        f"codebook: perplexity {2**entropy:.0f} of {NUM_CODES}; {per_pixel * math.log2(NUM_CODES):.3f} bits per pixel, "
        f"{per_pixel * entropy:.3f} if frequent codes are shorter"
    )
    return reconstruction, decibels[0] > max(decibels[1:])


def report_priors(
    gpt: videogpt.VideoGPT, bidirectional: mebt.MeBT, seen: Tensor, held_out: Tensor, count: int, seed: int
) -> dict[str, Tensor]:
    """Print what each prior has learned, and what `count` samples cost it; their codes."""
    learned, alone = bits(gpt, held_out, seen)
    print(f"VideoGPT: {learned:.2f} bits per held-out code; its frequency alone: {alone:.2f}")
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    chance = {name: SAMPLING[name] for name in ("temperature", "top_p", "progress")}
    samplers: dict[str, tuple[Callable[[], Tensor], nn.Module]] = {
        "VideoGPT": (lambda: videogpt.generate(gpt, count, generator=generators[0], **chance), gpt.fc_out),
        "MeBT": (
            lambda: mebt.generate(bidirectional, (count, *gpt.grid), generator=generators[1], **SAMPLING),
            bidirectional.transformer.head,
        ),
    }
    samples, lines = {}, []
    for name, (sample, head) in samplers.items():
        samples[name], seconds, calls = time_sampling(sample, head)
        lines.append(f"{name:<24}{calls:>14}{seconds:>19.2f}")
    print(f"{'sampling ' + str(count) + ' videos':<24}{'network calls':>14}{'seconds per video':>19}", *lines, sep="\n")
    return samples


def train_prior(
    prior: videogpt.VideoGPT | mebt.MeBT, rate: float, codes: Tensor, options: argparse.Namespace, resume: bool
) -> Training:
    """To the last step, on random windows of `codes`."""
    name = type(prior).__name__
    path = options.outputs / f"tokens_{name.lower()}.pt"
    training = new_training(name, prior, options.steps, rate, path)
    if resume:
        training.resume()
    training.run(code_batches(codes, 8), prior.training_loss)
    prior.save_pretrained(path.with_suffix(""))
    return training


def main(arguments: Sequence[str] | None = None) -> int:
    of_all = parser(__doc__, NEEDS)
    of_all.add_argument("--size", type=int, default=32, help="of a frame in pixels, a multiple of 4")
    of_all.add_argument("--attention", choices=("full", "sparse"), default="full", help="of VideoGPT")
    of_all.add_argument("--short", action="store_true", help="only the VQ-VAE, which need not beat its baselines")
    of_all.add_argument("--resume", action="store_true", help="go on from the checkpoints in the outputs")
    options = of_all.parse_args(arguments)
    start(__doc__, options, SHORT_NEEDS if options.short else NEEDS)

    size = options.size + options.size // 8  # room for random crops
    loaded = clips.load(size, options.videos, fps=options.fps, num_frames=clips.frames_to_split(WINDOW))
    train, held_out = clips.split([*loaded.values()])
    torch.manual_seed(options.seed)
    tokenizer = VQVAE(NUM_CODES, code_dim=64, hidden=64, num_blocks=1, downsample=DOWNSAMPLE)
    trainings = [new_training("VQ-VAE", tokenizer, options.steps, 3e-3, options.outputs / "tokens_vqvae.pt")]
    resumed = options.resume and trainings[0].resume() and trainings[0].step >= options.steps
    batches = clips.varied_batches(train, WINDOW, options.size)
    trainings[0].run(batches, lambda video: tokenizer.training_loss(video / 2))
    tokenizer.save_pretrained(options.outputs / "tokens_vqvae")

    tests = clips.tested_windows(held_out, WINDOW, options.size)
    videos = torch.cat(tests)
    held_out_codes = encode(tokenizer, videos / 2, "codes held out")
    print(f"\nheld out: the last {clips.HELD_OUT:.0%} of each clip, {len(videos)} windows of {WINDOW} frames")
    reconstruction, beaten = report_tokenizer(tokenizer, videos, held_out_codes)
    firsts = torch.tensor([0, *map(len, tests[:-1])]).cumsum(0)[:SHOWN]  # a window of each clip
    shown = {"truth": videos, "VQ-VAE": reconstruction, **baselines(videos, held_out_codes[0].numel())}
    columns = {name: video[firsts] for name, video in shown.items()}
    written = pictures.side_by_side(columns, options.outputs / "tokens_reconstruction.gif")

    if not options.short:
        codes = encode(tokenizer, clips.take(batches, NUM_WINDOWS) / 2, "codes")
        torch.manual_seed(options.seed)
        grid = (codes.shape[1], codes.shape[2], codes.shape[3])
        gpt = small_videogpt(tokenizer, grid, options.attention)
        bidirectional = small_mebt(NUM_CODES, grid)
        for prior, rate in ((gpt, 4e-3), (bidirectional, 2e-3)):
            # Priors resume only if the tokenizer was done: otherwise their codes were those of another one.
            trainings.append(train_prior(prior, rate, codes, options, resumed))
        samples = report_priors(gpt, bidirectional, codes, held_out_codes, len(firsts), options.seed)
        with torch.no_grad():
            generated = {name: 2 * tokenizer.decode(sample) for name, sample in samples.items()}
        columns = {"truth": videos[firsts], **generated}
        written += pictures.side_by_side(columns, options.outputs / "tokens_samples.gif")

    labels = ("squared error + commitment", "cross-entropy of codes", "cross-entropy of masked codes")
    written.append(options.outputs / "tokens_loss.png")
    write_losses(trainings, labels[: len(trainings)], written[-1])
    print(f"wrote {', '.join(map(str, written))}")
    if beaten:
        return 0
    failure = "the VQ-VAE has not learned enough to beat both baselines"
    if options.short:
        print(f"{failure}, which takes more steps than these {options.steps}")
        return 0
    return verdict([failure], options, NEEDS.steps)


if __name__ == "__main__":
    sys.exit(main())
