"""The pictures of docs/pictures: which token reads which, for every pattern.

    python -m docs._site.pictures

What is drawn is asked of the operators themselves: with the rows of a unit matrix as values, the output of a query is
its attention weights, and what it reads are those above 0.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import vattn

FOLDER = pathlib.Path(__file__).parents[1] / "pictures"
QUERY, READ, REST, LINE, TEXT = "#d1495b", "#2e86ab", "#e4e8ec", "#8a94a0", "#24292f"
SHIFTED = {0: REST, 1: READ, -1: "#edae49"}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """An attention pattern: its masks ``(queries, keys)``, how its tokens are drawn, and what is said of it.

    Attributes:
        query_grid, key_grid: frames, height and width of the queries and of the keys; None for the queries are the
            keys.
        query: the number of the query that is drawn.
        global_tokens: the first tokens, which are drawn beside the grid.
    """

    name: str
    title: str
    text: str
    mask: Tensor
    grid: tuple[int, int, int]
    query: int
    key_grid: tuple[int, int, int] | None = None
    global_tokens: int = 0
    labels: tuple[str, str] = ("queries", "keys")


def weights(attention: Callable[..., Any], *, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
    """``(queries, keys)``, the weights of one head; both axes of tokens are given as the operator has them."""
    count = math.prod(keys)
    query, key = torch.zeros(1, 1, *queries, count), torch.zeros(1, 1, *keys, count)
    value = torch.eye(count).view(1, 1, *keys, count)
    return attention(query, key, value)[0, 0].reshape(math.prod(queries), count)


def patterns() -> list[Pattern]:
    """In the order of the page "Which operator do I need?"."""
    frames, side = 8, 3
    clip = (frames, side * side)
    leap = weights(lambda q, k, v: vattn.leap_attention(q, k, v, leap=2), queries=clip, keys=clip)
    context = (4, 4, 4)
    latent = weights(vattn.latent_attention, queries=(6,), keys=(64,))
    grid = (4, 5, 5)
    axial = weights(lambda q, k, v: vattn.axial_attention(q, k, v, dim=1), queries=grid, keys=grid)
    layout = vattn.BlockLayout.local_random(
        64, 8, num_local=1, num_random=2, num_global=1, generator=torch.Generator().manual_seed(3)
    )
    edge = weights(lambda q, k, v: vattn.edge_sparse_attention(q, k, v, layout), queries=(65,), keys=(65,))
    kept = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:20].sort().values
    node = weights(lambda q, k, v: vattn.node_sparse_attention(q, k, v, kept[None]), queries=(6,), keys=(64,))
    return [
        Pattern("leap", "leap attention", "frames that are `leap` apart", leap, (frames, side, side), 4),
        Pattern("axial", "axial attention", "a line of the grid", axial, grid, 37),
        Pattern(
            "edge-sparse", "edge-sparse attention", "listed blocks, global tokens", edge, context, 1 + 16,
            global_tokens=1,
        ),
        Pattern(
            "latent", "latent attention", "few latents, long context", latent, (1, 6, 1), 2, key_grid=context,
            labels=("latents", "context"),
        ),
        Pattern(
            "node-sparse", "node-sparse attention", "the kept keys alone", node, (1, 6, 1), 2, key_grid=context,
            labels=("words", "video"),
        ),
    ]  # fmt: skip


def draw_tokens(axes: Axes, grid: tuple[int, int, int], colors: Sequence[str], left: float = 0.0) -> float:
    """Frames of squares side by side, each with the colour of its token; returns where the last one ends."""
    frames, height, width = grid
    squares = []
    for _ in range(frames):
        for row in range(height):
            for column in range(width):
                squares.append(Rectangle((left + column + 0.06, -row - 0.94), 0.88, 0.88))
        left += width + 0.7
    axes.add_collection(PatchCollection(squares, facecolors=list(colors), edgecolors="none"))
    return left - 0.7


def draw_reading(axes: Axes, pattern: Pattern, anchor: str = "C") -> None:
    """The tokens of a pattern: the query, what it reads, and the rest."""
    read = pattern.mask[pattern.query] > 0
    colors = [READ if reads else REST for reads in read.tolist()]
    left = 0.0
    if pattern.key_grid is None:
        colors[pattern.query] = QUERY
        if pattern.global_tokens:
            count = pattern.global_tokens
            left = draw_tokens(axes, (1, count, 1), colors[:count]) + 1.2
            axes.text(0.5, 0.35, "global", ha="center", va="bottom", fontsize=8, color=TEXT)
        left = draw_tokens(axes, pattern.grid, colors[pattern.global_tokens :], left)
        height = pattern.grid[1]
    else:
        queries = [REST] * pattern.mask.shape[0]
        queries[pattern.query] = QUERY
        first = draw_tokens(axes, pattern.grid, queries)
        left = draw_tokens(axes, pattern.key_grid, colors, first + 2.4)
        height = max(pattern.grid[1], pattern.key_grid[1])
        axes.text(first / 2, 0.35, pattern.labels[0], ha="center", va="bottom", fontsize=8, color=TEXT)
        axes.text((first + 2.4 + left) / 2, 0.35, pattern.labels[1], ha="center", va="bottom", fontsize=8, color=TEXT)
    axes.set_xlim(-0.6, left + 0.6)
    axes.set_ylim(-height - 0.4, 1.6)
    axes.set_aspect("equal", anchor=anchor)
    axes.axis("off")


def draw_mask(axes: Axes, pattern: Pattern) -> None:
    """The mask of all queries and keys, with the drawn query marked."""
    rows, columns = pattern.mask.shape
    pixels = torch.ones(rows, columns, 3)
    pixels[pattern.mask > 0] = torch.tensor(matplotlib.colors.to_rgb(READ))
    own = pattern.mask[pattern.query] > 0
    pixels[pattern.query, own] = torch.tensor(matplotlib.colors.to_rgb(QUERY))
    axes.imshow(pixels.numpy(), interpolation="none", aspect="equal" if rows == columns else "auto")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(pattern.labels[1], fontsize=8, color=TEXT)
    axes.set_ylabel(pattern.labels[0], fontsize=8, color=TEXT)
    for spine in axes.spines.values():
        spine.set_color(LINE)


def draw_shift(axes: Axes, frames: int = 6, channels: int = 8, fold_div: int = 4) -> None:
    """From which frame every channel comes after :func:`vattn.periodic_shift`."""
    number = torch.arange(1.0, 1 + frames)
    x = number.view(1, 1, frames, 1, 1).expand(1, 1, frames, 1, channels).contiguous()
    source = vattn.periodic_shift(x, fold_div)[0, 0, :, 0]  # (T, D), 0 for frames that do not exist
    for t in range(frames):
        for channel in range(channels):
            came_from = int(source[t, channel])
            color = SHIFTED[came_from - t - 1] if came_from else "white"
            axes.add_patch(Rectangle((t + 0.06, -channel - 0.94), 0.88, 0.88, facecolor=color, edgecolor=LINE, lw=0.4))
            axes.text(t + 0.5, -channel - 0.5, str(came_from - 1) if came_from else "0s", ha="center", va="center",
                      fontsize=6.5, color="white" if color == READ else TEXT)  # fmt: skip
    axes.text(frames / 2, 0.2, "frames", ha="center", va="bottom", fontsize=8, color=TEXT)
    axes.text(-0.25, -channels / 2, "channels of a head", ha="right", va="center", rotation=90, fontsize=8, color=TEXT)
    axes.set_xlim(-1, frames + 0.2)
    axes.set_ylim(-channels - 0.2, 1.2)
    axes.set_aspect("equal", anchor="N")
    axes.axis("off")


def save(figure: Figure, name: str) -> pathlib.Path:
    """Write a picture whose file depends on what it shows alone."""
    path = FOLDER / f"{name}.svg"
    with matplotlib.rc_context({"svg.hashsalt": "vattn", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    return path


def draw() -> list[pathlib.Path]:
    """Draw all pictures; returns the files written."""
    written = []
    FOLDER.mkdir(exist_ok=True)
    everything = Figure(figsize=(11, 4), layout="constrained")
    panels = everything.subplots(2, 3).flatten()
    for axes, pattern in zip(panels, patterns(), strict=False):
        draw_reading(axes, pattern, anchor="N")
        axes.set_title(f"{pattern.title}\n{pattern.text.replace('`', '')}", fontsize=11, color=TEXT)
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        reading, mask = figure.subplots(1, 2, width_ratios=(2.6, 1))
        draw_reading(reading, pattern)
        draw_mask(mask, pattern)
        written.append(save(figure, pattern.name))
    draw_shift(panels[5])
    panels[5].set_title("periodic shift\nchannels of neighbouring frames", fontsize=11, color=TEXT)
    written.append(save(everything, "patterns"))
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    draw_shift(figure.subplots())
    written.append(save(figure, "periodic-shift"))
    return written


if __name__ == "__main__":
    for path in draw():
        print(path.relative_to(pathlib.Path.cwd()))
