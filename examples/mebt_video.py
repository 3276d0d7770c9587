"""Video from codes: a small 3D VQGAN makes codes of real clips, and a small MeBT learns to predict masked ones.

    video (16 frames)  ->  codes (4, size / 4, size / 4)  ->  MeBT: masked codes from known ones  ->  video

Both train one after the other, from checkpoints where there are any. The last quarter of each clip is held out: on its
windows of 16 frames, the example prints how close the tokenizer comes to the pixels, and how often MeBT is right about
masked codes, beside answers that take no learning: the most frequent code, the last one known at the same place, and,
as if nothing were masked, the one before. With the clips that come along, and steps enough, it fails if MeBT does not
beat the first two. GIFs and MP4s show reconstruction, generation, continuation and inpainting next to the truth. Both
models are saved as folders, for `from_pretrained`.

    python -m examples.mebt_video
    python -m examples.mebt_video --resume            from the last checkpoint of a run with the same options
    python -m examples.mebt_video --videos FOLDER     learns from your own, of 64 frames or more each
"""

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import clips, pictures
from examples.options import Needs, parser, start, verdict
from examples.quality import peak_signal_to_noise
from examples.training import code_batches, encode, new_training, write_losses
from vattn.models.mebt import MeBT, continue_video, generate, inpaint, split_positions
from vattn.models.vqvae import VQGAN
from vattn.nn import LatentAttention

WINDOW = 16  # frames
DOWNSAMPLE = (4, 4, 4)
NUM_CODES = 128
NUM_WINDOWS = 1536  # of codes to train on
MODES = ("latent_enc", "latent_enc", "latent_dec", "lt2l", "latent_dec")
RATIOS = (0.25, 0.5, 0.75)  # of the codes of a window, masked in the evaluation
EVALUATIONS = 8  # random masks for each window and ratio
SHOWN = 3  # clips in a picture
NEEDS = Needs(minutes=4, memory=1.2, steps=800)
ENOUGH_STEPS = 150  # after which MeBT must beat the baselines
ANSWERS = ("MeBT", "most frequent code", "last known code", "true code before")
SAMPLING: dict[str, Any] = {"num_steps": 12, "temperature": 0.9, "top_p": 0.95, "progress": True}


@torch.no_grad()
def small_mebt(num_codes: int, grid: tuple[int, int, int]) -> MeBT:
    """A MeBT that begins by looking for codes near the masked one; it has half as many latents as there are codes.

    Positions are waves of time, row and column, and a latent begins between two frames of codes. Queries begin with the
    weights of the keys, so that what is near is read, and what is read comes out as it was: the projection begins as
    the inverse of the values, the head as the embedding of the codes. From small random weights it takes a MeBT far
    longer to find out which latent knows what about which position.

    Source:
        Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (ICML 2023).
    """
    dim = 128
    times, rows, columns = (torch.arange(size) + 0.5 for size in grid)
    codes, latents = torch.cartesian_prod(times, rows, columns), torch.cartesian_prod(times[::2] + 0.5, rows, columns)
    model = MeBT(num_codes, grid, dim, num_heads=4, modes=MODES, num_latents=len(latents))
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for attention in (module for module in model.modules() if isinstance(module, LatentAttention)):
        nn.init.orthogonal_(attention.key.weight, gain=2.0)
        attention.query.weight.copy_(attention.key.weight)
        nn.init.orthogonal_(attention.value.weight)
        attention.proj.weight.copy_(attention.value.weight.T)
    model.pos_emb.copy_(waves(codes, dim))
    model.sos_emb.copy_(waves(latents, dim))
    for embedding in (model.tok_emb.weight, model.mask_emb):
        nn.init.normal_(embedding, std=0.7)  # where a code is counts for more than which it is
    model.transformer.head.weight.copy_(model.tok_emb.weight * dim**-0.5)
    return model


def waves(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines of positions ``(N, 3)``, with wavelengths from 2 to 16 codes: ``(N, dim)``, of variance 1."""
    lengths = 2 ** torch.linspace(1, 4, dim // 6)
    angles = (2 * math.pi * positions[..., None] / lengths).flatten(1)
    features = math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)
    return F.pad(features, (0, dim - features.shape[1]))


def copies(codes: Tensor, context: Tensor, otherwise: int) -> Tensor:
    """For each code ``(B, T, height, width)`` the last one known at its place in its own frame or before.

    Args:
        context: the positions of codes that are known, ``(B, NC)``.
        otherwise: the answer where none is known.
    """
    known = torch.zeros_like(codes, dtype=torch.bool).flatten(1).scatter(1, context, True).view_as(codes)
    frames = torch.arange(codes.shape[1]).view(-1, 1, 1)
    last = torch.where(known, frames, -1).cummax(1).values
    return torch.where(last >= 0, codes.gather(1, last.clamp(min=0)), otherwise)


@torch.no_grad()
def accuracies(
    model: MeBT, codes: Tensor, frequent: int, ratios: Sequence[float], generator: torch.Generator
) -> dict[str, float]:
    """The share of masked codes that are predicted right, by MeBT and by baselines that learn nothing.

    Of the codes ``(4, height, width)`` of each window, a share is masked at random, for one of `ratios` after the
    other. Masked codes of the first frame are not counted, as there is no frame to copy from. MeBT predicts the most
    likely code for each, all in one pass, from the codes that are not masked. The baselines predict the code
    `frequent`; the last known code at the same place, and if there is none, `frequent`; and the true code at the same
    place in the frame before, masked or not, which no model can see.
    """
    flat, frame = codes.flatten(1), codes[0, 0].numel()
    right = dict.fromkeys(ANSWERS, 0)
    counted = 0
    for ratio in ratios:
        order = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in flat])
        context, target = split_positions(order, round(ratio * flat.shape[1]))
        truth, later = flat.gather(1, target), target >= frame
        answers = (
            model(flat, context, target).argmax(-1),
            torch.full_like(truth, frequent),
            copies(codes, context, frequent).flatten(1).gather(1, target),
            flat.gather(1, (target - frame).clamp(min=0)),
        )
        for name, answer in zip(ANSWERS, answers, strict=True):
            right[name] += int(((answer == truth) & later).sum())
        counted += int(later.sum())
    return {name: hits / counted for name, hits in right.items()}


def report(model: MeBT, codes: Tensor, held_out: Tensor, seed: int) -> bool:
    """Print how often masked codes are predicted right; whether MeBT beats the baselines that see what it sees.

    The last row decides: it has the ratios of the training, in which all are equally likely.
    """
    print("\nHow often masked codes are predicted right. MeBT sees the same codes as the two baselines beside it. The")
    print("true code before is no baseline: it reads masked codes, and says how often two successive frames are equal.")
    frequent = int(codes.flatten().mode().values)
    uniform = [(i + 0.5) / EVALUATIONS for i in range(EVALUATIONS)]
    print(f"{'masked':<8}", *(f"{name:>20}" for name in ANSWERS), f"{'MeBT, where trained':>20}")
    for title, ratios in [*((f"{ratio:.0%}", [ratio] * EVALUATIONS) for ratio in RATIOS), ("0-100%", uniform)]:
        generator = torch.Generator().manual_seed(seed)
        share = accuracies(model, held_out, frequent, ratios, generator)
        trained = accuracies(model, codes[: len(held_out)], frequent, ratios, generator)
        print(f"{title:<8}", *(f"{share[name]:>20.1%}" for name in ANSWERS), f"{trained['MeBT']:>20.1%}")
    return share["MeBT"] > max(share[name] for name in ANSWERS[1:3])


def write_videos(tokenizer: VQGAN, model: MeBT, videos: Tensor, outputs: pathlib.Path, seed: int) -> list[pathlib.Path]:
    """Reconstruction, generation, continuation and inpainting of one held-out window of each clip."""
    generator = torch.Generator().manual_seed(seed)
    codes = tokenizer.encode(videos)
    known = codes.shape[1] // 2
    hole = torch.zeros(codes.shape[1:], dtype=torch.bool)
    height, width = codes.shape[2:]
    hole[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = True
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
    for name, columns in shown.items():
        paths += pictures.side_by_side(columns, outputs / f"mebt_{name}.gif")
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    of_all = parser(__doc__, NEEDS)
    of_all.add_argument("--size", type=int, default=32, help="of a frame in pixels, a multiple of 4")
    of_all.add_argument("--resume", action="store_true", help="go on from the checkpoints in the outputs")
    options = of_all.parse_args(arguments)
    start(__doc__, options, NEEDS)

    size = options.size + options.size // 8  # room for random crops
    loaded = clips.load(size, options.videos, fps=options.fps, num_frames=clips.frames_to_split(WINDOW))
    train, held_out = clips.split([*loaded.values()])
    torch.manual_seed(options.seed)
    tokenizer = VQGAN(NUM_CODES, code_dim=32, hidden=8, downsample=DOWNSAMPLE, groups=8)
    first = new_training("tokenizer", tokenizer, options.steps, 2e-3, options.outputs / "mebt_tokenizer.pt")
    resumed = options.resume and first.resume() and first.step >= first.steps
    videos = clips.varied_batches(train, WINDOW, options.size)
    first.run(videos, tokenizer.training_loss)
    tokenizer.save_pretrained(options.outputs / "mebt_tokenizer")

    codes = encode(tokenizer, clips.take(videos, NUM_WINDOWS), "codes to train on")
    tests = clips.tested_windows(held_out, WINDOW, options.size)
    held_out_codes = encode(tokenizer, torch.cat(tests), "codes held out")

    torch.manual_seed(options.seed)
    model = small_mebt(NUM_CODES, (codes.shape[1], codes.shape[2], codes.shape[3]))
    second = new_training("MeBT", model, options.steps, 2e-3, options.outputs / "mebt_model.pt")
    if resumed:  # otherwise its codes would be those of another tokenizer
        second.resume()
    second.run(code_batches(codes, 8), model.training_loss)
    model.save_pretrained(options.outputs / "mebt_model")

    with torch.no_grad():
        reconstruction = tokenizer.decode(held_out_codes)
        shown = torch.stack([test[0] for test in tests[:SHOWN]])
        written = write_videos(tokenizer, model, shown, options.outputs, options.seed)
    labels = ("mean absolute error + commitment", "cross-entropy of masked codes")
    write_losses((first, second), labels, options.outputs / "mebt_loss.png")

    print()
    decibel = peak_signal_to_noise(torch.cat(tests), reconstruction)
    print(f"held out: the last {clips.HELD_OUT:.0%} of each clip, {len(held_out_codes)} windows of {WINDOW} frames")
    print(f"tokenizer: {decibel:.1f} dB PSNR; {len(codes.unique())} of {NUM_CODES} codes in use")
    beaten = report(model, codes, held_out_codes, options.seed)
    print(f"wrote {', '.join(map(str, [*written, options.outputs / 'mebt_loss.png']))}")
    shortfalls = [] if beaten else ["MeBT has not learned enough to beat the baselines"]
    return verdict(shortfalls, options, ENOUGH_STEPS)


if __name__ == "__main__":
    sys.exit(main())
