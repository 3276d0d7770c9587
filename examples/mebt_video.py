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
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples import clips, pictures
from examples.quality import peak_signal_to_noise
from examples.training import Training, code_batches, encode, write_losses
from vattn.models.mebt import MeBT, continue_video, generate, inpaint, split_positions
from vattn.models.vqvae import VQGAN

WINDOW = 16  # frames
DOWNSAMPLE = (4, 4, 4)
NUM_CODES = 128
MODES = ("latent_enc", "latent_enc", "latent_dec", "lt2l", "latent_dec")
RATIOS = (0.25, 0.5, 0.75)  # of the codes of a window, masked in the evaluation
EVALUATIONS = 8  # random masks for each window and ratio
SAMPLING: dict[str, Any] = {"num_steps": 12, "temperature": 0.9, "top_p": 0.95, "progress": True}


def train_tokenizer(training: Training, videos: Sequence[Tensor]) -> None:
    """Reconstruction and commitment; the codes follow the vectors that take them."""

    def loss_of(video: Tensor) -> Tensor:
        reconstruction, quantized = training.model(video)
        return F.l1_loss(reconstruction, video) + quantized.commitment_loss

    training.run(clips.window_batches(videos, WINDOW, count=1), loss_of)


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
        paths.append(outputs / f"mebt_{name}.gif")
        pictures.gif(columns, paths[-1])
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of training, for each of the two models")
    parser.add_argument("--size", type=int, default=32, help="of a frame in pixels, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the outputs")
    parser.add_argument("--outputs", type=pathlib.Path, default=pathlib.Path("outputs"))
    options = parser.parse_args(arguments)
    options.outputs.mkdir(parents=True, exist_ok=True)

    train, held_out = clips.split(options.size)
    torch.manual_seed(options.seed)
    tokenizer = VQGAN(NUM_CODES, code_dim=32, hidden=8, downsample=DOWNSAMPLE, groups=8)
    first = Training("tokenizer", tokenizer, options.steps, 2e-3, options.outputs / "mebt_tokenizer.pt")
    resumed = options.resume and first.resume() and first.step >= first.steps
    train_tokenizer(first, train)

    videos = torch.cat([clips.windows(video, WINDOW, every=2) for video in train])
    codes = encode(tokenizer, videos, "codes to train on")
    tests = [clips.windows(video, WINDOW, every=4) for video in held_out]
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
    labels = ("mean absolute error + commitment", "cross-entropy of masked codes")
    write_losses((first, second), labels, options.outputs / "mebt_loss.png")

    print()
    decibel = peak_signal_to_noise(torch.cat(tests), reconstruction)
    print(f"held out: the last {clips.HELD_OUT:.0%} of each clip, {len(held_out_codes)} windows of {WINDOW} frames")
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
