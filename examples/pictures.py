"""Pictures: losses, videos side by side, patches that are kept, and what a patch of a LAPS model attends to."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw
from torch import Tensor, nn

import vattn
from vattn.training import write_video

Heat = dict[int, Tensor]  # frame -> (rows, columns) of patches: the attention that each one gets


def loss_curves(losses: Mapping[str, Sequence[float]], path: pathlib.Path, title: str) -> None:
    """One curve per name over the steps, dashed after the first, as they should lie on top of each other."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for style, (name, values) in zip(itertools.chain("-", itertools.repeat("--")), losses.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, style, label=name)
    axes.set(xlabel="step", ylabel="cross-entropy", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def side_by_side(columns: Mapping[str, Tensor], path: pathlib.Path) -> list[pathlib.Path]:
    """Videos ``(B, 3, T, H, W)`` in -1 to 1, side by side under their titles, the batch from top to bottom.

    Returns:
        The files that were written: `path`, which ends with .gif, and an MP4 beside it.
    """
    grid = torch.cat([torch.cat(list(videos), -2) for videos in columns.values()], -1)  # (3, T, B * H, columns * W)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    zoom, header = max(4, 128 * len(columns) // pixels.shape[2]), 14  # titles need room
    height, width = (zoom * x for x in pixels.shape[1:3])
    frames = []
    for frame in pixels:
        picture = Image.new("RGB", (width, height + header))
        picture.paste(Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.NEAREST), (0, header))
        for column, title in enumerate(columns):
            ImageDraw.Draw(picture).text((column * width // len(columns) + 2, 1), title)
        frames.append(torch.from_numpy(np.array(picture)))
    written = [path, path.with_suffix(".mp4")]
    for file in written:
        write_video(file, torch.stack(frames))
    return written


def smooth_losses(panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, path: pathlib.Path) -> None:
    """A panel per title, in it a curve per name: the mean loss of a twentieth of the steps, up to each step."""
    figure = Figure(figsize=(5.5 * len(panels), 3.8), layout="constrained")
    for axes, (title, losses) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in losses.items():
            width = max(1, len(values) // 20)
            means = torch.tensor(values).unfold(0, width, 1).mean(1)
            axes.plot(range(width, len(values) + 1), means.numpy(), label=name)
        axes.set(title=title, xlabel="step", ylabel=label)
        axes.legend()
    figure.savefig(path, dpi=120)


def queue(rows: Mapping[str, Tensor], levels: Sequence[float], window: int, path: pathlib.Path) -> None:
    """The frames of queues ``(3, L, S, S)`` under each other, and below them the share of noise in each.

    Args:
        rows: RGB in -1 to 1, with noise, the clean end first.
        levels: L of them, from 0 to 1; frames before the first noise are context for a lookahead.
        window: how many frames are denoised together; colours change with each window from the noisy end on.
    """
    places = range(len(levels))
    figure = Figure(figsize=(0.45 * len(levels) + 1.5, 0.5 * len(rows) + 2), layout="constrained")
    pixels, bars = figure.subplots(2, 1, height_ratios=(len(rows), 2.5), sharex=True)
    frames = [torch.cat(list(row.transpose(0, 1)), -1) for row in rows.values()]
    grid = ((torch.cat(frames, -2).permute(1, 2, 0) + 1) / 2).clamp(0, 1)
    pixels.imshow(grid.cpu().numpy(), extent=(-0.5, len(levels) - 0.5, len(rows) - 0.5, -0.5), aspect="auto")
    pixels.set_yticks(range(len(rows)), rows)
    pixels.set_title("the queue: a clean frame leaves on the left, and noise enters on the right")
    pixels.tick_params(bottom=False, labelbottom=False)
    colours = [f"C{(len(levels) - 1 - place) // window}" for place in places]
    bars.bar(places, levels, color=colours, width=0.9)
    bars.set(xlabel="place in the queue", ylabel="share of noise", xlim=(-0.5, len(levels) - 0.5))
    figure.savefig(path, dpi=120)


def memory(resident: Sequence[int], window: int, path: pathlib.Path) -> None:
    """What a process holds in bytes at each frame of a video, of which models have seen `window` frames at once."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(resident) + 1), [size / 2**20 for size in resident], label="the process")
    axes.axvline(window, color="gray", linestyle="--", label="length of training")
    axes.set(xlabel="frame", ylabel="resident memory, MiB", ylim=(0, 1.2 * max(resident) / 2**20))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def kept_patches(
    clips: Mapping[str, Tensor], kept: Sequence[Tensor], window: tuple[int, int, int], path: pathlib.Path
) -> None:
    """Clips ``(T, 3, S, S)`` under their names, and below each what is left of it after each pruning, the rest dark.

    Args:
        clips: RGB in -1 to 1.
        kept: for each pruning the raster indices ``(clips, K)`` of the patches in `window`, frames x rows x columns.
    """
    num_frames, rows, columns = window
    figure = Figure(figsize=(1.1 * num_frames + 0.8, (1.15 * (1 + len(kept)) + 0.5) * len(clips)), layout="constrained")
    parts = figure.subfigures(len(clips), 1, squeeze=False)[:, 0]
    for i, (part, (name, clip)) in enumerate(zip(parts, clips.items(), strict=True)):
        part.suptitle(name, fontsize=10)
        pixels = ((clip.permute(0, 2, 3, 1) + 1) / 2).clamp(0, 1)
        total = num_frames * rows * columns
        left = [torch.arange(total), *(indices[i] for indices in kept)]
        for panels, indices in zip(part.subplots(len(left), num_frames, squeeze=False), left, strict=True):
            light = torch.full((total,), 0.15).index_fill(0, indices, 1.0).view(num_frames, rows, columns, 1)
            light = light.repeat_interleave(clip.shape[2] // rows, 1).repeat_interleave(clip.shape[3] // columns, 2)
            for axes, frame in zip(panels, pixels * light, strict=True):
                _frame(axes, "").imshow(frame.numpy())
            panels[0].set_ylabel(f"{len(indices)} of {total}\npatches", fontsize=8)
    figure.savefig(path, dpi=120)


def attention(model: nn.Module, video: Tensor, path: pathlib.Path) -> None:
    """What the patch that moves most attends to, in every layer of `model`, on a clip ``video (T, 3, S, S)``.

    A column is a frame; under the clip, a row is a layer. The frames that the patch may read, its own and its
    leap partner, carry their share of its attention and a heat map, from the least to the most attended patch of
    the layer; the others are faint.
    """
    num_frames, size = video.shape[0], video.shape[-1]
    query_frame = num_frames // 2
    layers, patch = _attention_of_layers(model, video, query_frame)
    grid = next(iter(layers[0][1].values())).shape[0]
    row, column = divmod(patch, grid)
    side = size / grid

    pixels = ((video.permute(0, 2, 3, 1).cpu() + 1) / 2).clamp(0, 1)
    figure = Figure(figsize=(1.5 * num_frames, 1.6 * (len(layers) + 1)), layout="constrained")
    rows = figure.subplots(len(layers) + 1, num_frames, squeeze=False)
    for t, axes in enumerate(rows[0]):
        _frame(axes, f"frame {t}").imshow(pixels[t])
    for (leap, heat), panels in zip(layers, rows[1:], strict=True):
        low, high = (float(x) for x in torch.stack(list(heat.values())).aminmax())
        for t, axes in enumerate(panels):
            _frame(axes, f"{heat[t].sum():.0%}" if t in heat else "")
            axes.imshow(pixels[t].mean(-1), cmap="gray", vmin=0, vmax=1, alpha=1.0 if t in heat else 0.3)
            if t in heat:
                axes.imshow(heat[t], cmap="inferno", vmin=low, vmax=high, alpha=0.6, extent=(0, size, size, 0))
        panels[0].set_ylabel(f"leap {leap}")
    for axes in rows[:, query_frame]:
        axes.add_patch(Rectangle((column * side, row * side), side, side, fill=False, color="cyan", linewidth=1.5))
    figure.suptitle("what the marked patch attends to, in its own frame and across the leap (mean over heads)")
    figure.savefig(path, dpi=120)


def _frame(axes: Axes, title: str) -> Axes:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9)
    return axes


@torch.no_grad()
def _attention_of_layers(model: nn.Module, video: Tensor, query_frame: int) -> tuple[list[tuple[int, Heat]], int]:
    """For every layer its leap and the attention that one patch of `query_frame` pays; and which patch it is."""
    calls: list[tuple[Tensor, Tensor, int, dict[str, Any]]] = []

    def record(query: Tensor, key: Tensor, value: Tensor, leap: int, **settings: Any) -> Any:
        calls.append((query, key, leap, settings))
        return vattn.leap_attention(query, key, value, leap, **settings)

    with mock.patch("vattn.nn.leap.leap_attention", record):
        model(video[None])

    num_frames, num_tokens = calls[0][0].shape[2:4]
    grid = math.isqrt(num_tokens)
    first_patch = num_tokens - grid * grid  # after the class token
    motion = (video[query_frame] - video[query_frame - 1]).abs().mean(0)
    patch = int(motion.unflatten(0, (grid, -1)).unflatten(2, (grid, -1)).mean((1, 3)).argmax())

    layers = []
    for query, key, leap, settings in calls:
        groups = vattn.reference.leap_groups(num_frames, leap, settings["group_size"])
        frames = next(group for group in groups if query_frame in group)
        q, k = query[0, :, query_frame, first_patch + patch], key[0, :, frames]  # (H, D), (H, frames, N, D)
        scale = q.shape[-1] ** -0.5 if settings["scale"] is None else settings["scale"]
        scores = torch.einsum("hd,hfnd->hfn", q, k) * scale
        weights = scores.flatten(1).softmax(-1).view_as(scores).mean(0).cpu()  # (frames, N)
        maps = weights[:, first_patch:].unflatten(1, (grid, grid))
        layers.append((leap, dict(zip(frames, maps, strict=True))))
    return layers, patch
