"""The pictures of docs/layouts.md, drawn by the layouts themselves.

python -m docs._site.layouts        draws docs/pictures/layout-*.png
"""

import pathlib

import torch

from vattn import BlockLayout

FOLDER = pathlib.Path(__file__).parents[1] / "pictures"
GRID = (8, 16, 24)
LONG = (16, 16, 24)


def layouts() -> dict[str, tuple[BlockLayout, tuple[int, ...]]]:
    """The patterns and their grids, by the names of their pictures."""
    generator = torch.Generator().manual_seed(0)
    # Tokens that resemble each other the more, the nearer they are.
    places = torch.cartesian_prod(*(torch.arange(float(size)) for size in GRID)) / 8
    tokens = (places @ torch.randn(3, 64, generator=generator)).cos()[None, None]
    tiles = BlockLayout.tile_order(GRID, (2, 4, 4))
    return {
        "neighborhood": (BlockLayout.neighborhood(GRID, window=(3, 5, 11), tile=(2, 4, 4)), GRID),
        "sliding-tile": (BlockLayout.sliding_tile(GRID, tile=(2, 4, 4), window=(3, 3, 3)), GRID),
        "radial": (BlockLayout.radial(LONG, block_size=24), LONG),
        "strided": (BlockLayout.strided(GRID, block_size=24, num_local_blocks=2, causal=False), GRID),
        "local-random": (BlockLayout.local_random(3072, 32, num_random=6, num_global=0, generator=generator), GRID),
        "top-k": (BlockLayout.top_k(tokens, tokens, 32, 16, own=True, order=tiles), GRID),
    }


def draw() -> list[pathlib.Path]:
    """Draw all pictures; returns the files written."""
    FOLDER.mkdir(exist_ok=True)
    written = []
    for name, (layout, grid) in layouts().items():
        for suffix, frames in (("", grid), ("-blocks", None)):
            path = FOLDER / f"layout-{name}{suffix}.png"
            layout.plot(path, grid=frames)
            written.append(path)
    return written


if __name__ == "__main__":
    for path in draw():
        print(path)
