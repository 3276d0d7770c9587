"""Patterns of layouts against dense masks that are made token by token, as the papers define them."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vattn
from tests.layouts import layout_of, random_order
from vattn import BlockLayout, _layout_patterns

Sizes = tuple[int, ...]


def places_of(grid: Sequence[int]) -> list[Sizes]:
    """The coordinates of each token, in raster order."""
    return list(itertools.product(*map(range, grid)))


def tiles_of(grid: Sequence[int], tile: Sequence[int]) -> list[Sizes]:
    """The coordinates of each token's tile."""
    return [tuple(x // size for x, size in zip(place, tile, strict=True)) for place in places_of(grid)]


def mask_of(places: Sequence[Sizes], reads: Callable[[Sizes, Sizes], bool]) -> Tensor:
    return torch.tensor([[reads(query, key) for key in places] for query in places])


def spread_over_blocks(mask: Tensor, block_of: Sequence[Any]) -> Tensor:
    """True for all pairs of tokens of two blocks if it is for one of them."""
    names = sorted(set(block_of))
    member = torch.tensor([[name == block for name in names] for block in block_of]).float()  # (N, M)
    return member @ (member.T @ mask.float() @ member).clamp(max=1) @ member.T > 0


def with_global(mask: Tensor, num_global: int) -> Tensor:
    return F.pad(mask, (num_global, 0, num_global, 0), value=True)


@st.composite
def grids(draw: st.DrawFn, most: int = 7) -> Sizes:
    """Grids of at most a hundred tokens, axes of a single token among them."""
    axes = draw(st.integers(1, 3))
    return tuple(draw(st.integers(1, most if axes < 3 else 5)) for _ in range(axes))


def sizes(grid: Sizes, most: int) -> st.SearchStrategy[Sizes]:
    return st.tuples(*(st.integers(1, most) for _ in grid))


def natten_window(index: int, length: int, window: int, stride: int) -> range:
    """What a token reads along an axis, as NATTEN's kernels count it (their `neighborhood_atten_get_window_start`)."""
    left, right = window // 2, window // 2 + window % 2 - 1
    leader = min(index // stride * stride + stride // 2, length - 1)
    start = max(leader - left, 0) + (leader + right >= length) * (length - right - leader - 1)
    return range(start, start + window)


def natten_mask(grid: Sizes, window: Sizes, stride: Sizes) -> Tensor:
    def reads(query: Sizes, key: Sizes) -> bool:
        axes = zip(query, key, grid, map(min, window, grid), stride, strict=True)
        return all(k in natten_window(q, n, w, s) for q, k, n, w, s in axes)

    return mask_of(places_of(grid), reads)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_neighborhood_is_the_tiles_that_the_windows_of_natten_touch(data):
    grid = data.draw(grids(), label="grid")
    window, tile = data.draw(sizes(grid, 8), label="window"), data.draw(sizes(grid, 4), label="tile")
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    num_global = data.draw(st.integers(0, 2), label="num_global")
    layout = BlockLayout.neighborhood(grid, window, tile=tile, stride=stride, num_global=num_global)
    expected = natten_mask(grid, window, stride)
    expected = spread_over_blocks(expected, tiles_of(grid, tile))
    assert torch.equal(layout.to_mask(), with_global(expected, num_global))
    check_that_rows_are_ascending(layout)


@pytest.mark.parametrize(
    ("grid", "window", "tile"),
    [((12,), (12,), (3,)), ((8, 9), (6, 3), (2, 3)), ((4, 6, 4), (4, 2, 2), (2, 2, 1)), ((3, 5), (1, 4), (1, 1))],
    ids=str,
)
def test_neighborhood_is_exact_where_tiles_share_whole_windows(grid, window, tile):
    window = tuple(w if w == n else t * (w // t // 2 * 2 + 1) for w, n, t in zip(window, grid, tile, strict=True))
    layout = BlockLayout.neighborhood(grid, window, tile=tile, stride=tile)
    assert torch.equal(layout.to_mask(), natten_mask(grid, window, tile))
    in_tiles = tuple(w // t for w, t in zip(window, tile, strict=True))
    assert layout == BlockLayout.sliding_tile(grid, tile, in_tiles)


@pytest.mark.parametrize(("grid", "tile"), [((200,), 64), ((20, 17), (8, 8)), ((9, 6, 5), (4, 4, 4))], ids=str)
def test_the_tile_of_a_neighborhood(grid, tile):
    tile = tile if isinstance(tile, tuple) else (tile,)
    assert BlockLayout.neighborhood(grid, (3,) * len(grid)) == BlockLayout.neighborhood(
        grid, (3,) * len(grid), tile=tile
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_sliding_tile_is_the_mask_of_the_official_code(data):
    """Its windows are odd, and clamped by their middle: see `sta_mask_3d` of FastVideo."""
    grid = data.draw(grids(), label="grid")
    tile = data.draw(sizes(grid, 3), label="tile")
    window = tuple(2 * x - 1 for x in data.draw(sizes(grid, 4), label="half the window"))
    num_global = data.draw(st.integers(0, 2), label="num_global")
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]

    def reads(query: Sizes, key: Sizes) -> bool:
        centres = [min(max(q, w // 2), n - 1 - w // 2) for q, n, w in zip(query, counts, window, strict=True)]
        return all(abs(c - k) <= w // 2 for c, k, w in zip(centres, key, window, strict=True))

    layout = BlockLayout.sliding_tile(grid, tile, window, num_global=num_global)
    assert torch.equal(layout.to_mask(), with_global(mask_of(tiles_of(grid, tile), reads), num_global))
    check_that_rows_are_ascending(layout)


@settings(deadline=None, max_examples=30)
@given(grids(), st.data())
def test_every_tile_reads_as_many_tiles(grid, data):
    tile, window = data.draw(sizes(grid, 3), label="tile"), data.draw(sizes(grid, 5), label="window")
    layout = BlockLayout.sliding_tile(grid, tile, window)
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    assert set(layout.row_offsets.diff().flatten().tolist()) == {math.prod(map(min, window, counts))}
    assert layout.block_counts().diagonal(dim1=1, dim2=2).eq(1).all()  # itself among them


@settings(deadline=None, max_examples=60)
@given(
    frames=st.integers(1, 24),
    frame=st.sampled_from([(), (1,), (5,), (3, 2), (2, 4)]),
    block_size=st.integers(1, 4),
    decay=st.sampled_from([0.3, 0.5, 1.0, 1.7]),
    sink=st.booleans(),
    num_global=st.integers(0, 2),
)
def test_radial(frames, frame, block_size, decay, sink, num_global):
    """The paper's definition of its mask; a block for a token."""
    size = math.prod(frame)
    block_size = min(block_size, size)
    blocks = -(-size // block_size)

    def reads(query: Sizes, key: Sizes) -> bool:
        (i, k), (j, l) = query, key
        distance = abs(i - j)
        band = 2 ** math.floor(math.log2(max(distance, 1)))
        return (
            (band <= decay * blocks and abs(k - l) + 1 <= decay * blocks / band)
            or (k == l and distance % math.ceil(band / (decay * blocks)) == 0)
            or distance <= 1
            or (sink and j == 0)
        )

    layout = BlockLayout.radial((frames, *frame), block_size, decay=decay, sink=sink, num_global=num_global)
    expected = mask_of(tiles_of((frames, size), (1, block_size)), reads)
    assert torch.equal(layout.to_mask(), with_global(expected, num_global))
    assert (layout.num_tokens, layout.num_blocks) == (frames * size, frames * blocks)
    check_that_rows_are_ascending(layout)


def test_radial_grows_as_n_log_n():
    """Twice the frames make a little more than twice the entries; all pairs would be four times as many."""
    entries = [BlockLayout.radial((frames, 64), 4, sink=False).columns.numel() for frames in (64, 128, 256, 512)]
    assert all(after < 2.4 * before for before, after in itertools.pairwise(entries))


def check_that_rows_are_ascending(layout: BlockLayout) -> None:
    offsets = layout.row_offsets.flatten(0, -2)
    for row in offsets:
        for start, end in itertools.pairwise(row.tolist()):
            columns = layout.columns[start:end].tolist()
            assert columns == sorted(set(columns))


@settings(deadline=None, max_examples=60)
@given(grids(), st.data())
def test_tile_order(grid, data):
    tile = data.draw(sizes(grid, 8), label="tile")
    order = BlockLayout.tile_order(grid, tile).view(-1, math.prod(tile)).tolist()
    tile_of = tiles_of(grid, tile)
    expected = [
        [token for token, its_tile in enumerate(tile_of) if its_tile == name] for name in sorted(set(tile_of))
    ]  # fmt: skip
    assert order == [tokens + [-1] * (math.prod(tile) - len(tokens)) for tokens in expected]


@pytest.mark.parametrize(
    ("grid", "tile"), [((6, 4), (2, 4)), ((7, 4), (2, 4)), ((1, 7), (1, 3)), ((3, 4, 4), (1, 4, 4))], ids=str
)
def test_tiles_of_consecutive_tokens_need_no_order(grid, tile):
    layout = BlockLayout.sliding_tile(grid, tile, (1,) * len(grid))
    ordered = layout_of(
        [[i] for i in range(layout.num_blocks)], math.prod(grid), math.prod(tile),
        order=BlockLayout.tile_order(grid, tile),
    )  # fmt: skip
    assert layout.order is None
    assert torch.equal(layout.to_mask(), ordered.to_mask())


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    block_size=st.integers(1, 5),
    num_global=st.integers(0, 2),
    own=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    data=st.data(),
)
def test_top_k(batch, heads, block_size, num_global, own, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    if data.draw(st.booleans(), label="order"):
        counts = data.draw(st.lists(st.integers(0, block_size), max_size=5), label="tokens of blocks")
        order = random_order(counts, block_size)
        blocks = [[t for t in block if t >= 0] for block in order.view(-1, block_size).tolist()]
        num_tokens = sum(counts)
    else:
        order, num_tokens = None, data.draw(st.integers(0, 12), label="num_tokens")
        blocks = [list(block) for block in torch.arange(num_tokens).split(block_size)] if num_tokens else []
    shape = (batch, heads, num_global + num_tokens, 6)
    query, key = (torch.randn(shape).to(dtype) for _ in range(2))
    k = data.draw(st.integers(int(own and len(blocks) > 0), len(blocks)), label="k")

    layout = BlockLayout.top_k(query, key, block_size, k, own=own, num_global=num_global, order=order)
    assert (layout.num_samples, layout.num_heads, layout.num_blocks) == (batch, heads, len(blocks))
    assert (layout.num_tokens, layout.num_global, layout.block_size) == (num_tokens, num_global, block_size)
    assert (layout.order is None) == (order is None)
    reads = layout.block_counts().view(batch, heads, len(blocks), len(blocks))
    assert (reads.sum(-1) == k).all() and not (reads > 1).any()
    if k == 0:
        return
    means = (x.detach()[:, :, num_global:].double() for x in (query, key))
    queries, keys = (torch.stack([x[:, :, block].sum(2) / max(1, len(block)) for block in blocks], 2) for x in means)
    scores = queries @ keys.mT
    scores[..., [i for i, block in enumerate(blocks) if len(block) == 0]] = -math.inf
    if own:
        assert (reads.diagonal(dim1=-2, dim2=-1) == 1).all()
        scores.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    least = scores.masked_fill(reads == 0, math.inf).amin(-1)  # of those that are read
    most = scores.masked_fill(reads == 1, -math.inf).amax(-1)  # of the others
    assert (least >= most - 1e-5).all()
    check_that_rows_are_ascending(layout)


@pytest.mark.parametrize("factor", [torch.nan, 1e20], ids=["nan", "overflow"])
def test_top_k_has_its_own_block_whatever_the_scores_are(factor):
    query = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0))
    key = query.clone()
    key[0, 0, 20] *= factor
    assert BlockLayout.top_k(query * 1e20, key, 16, 1, own=True).columns.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"^BlockLayout.top_k: k must be at least 1, got k=0"):
        BlockLayout.top_k(query, key, 16, 0, own=True)


def test_top_k_in_pieces(monkeypatch):
    """However few scores are held at a time, the choice is the same."""
    query, key = torch.randn(2, 2, 3, 8 * 9, 16, generator=torch.Generator().manual_seed(0))
    order = BlockLayout.tile_order((8, 9), (2, 4))
    whole = [BlockLayout.top_k(query, key, 8, 3, order=x, own=True) for x in (None, order)]
    monkeypatch.setattr(_layout_patterns, "AT_ONCE", 150)
    assert whole == [BlockLayout.top_k(query, key, 8, 3, order=x, own=True) for x in (None, order)]


def test_top_k_compiles_and_has_no_gradient():
    @torch.compile(fullgraph=True, backend="eager")
    def choose(x: Tensor) -> Tensor:
        return BlockLayout.top_k(x, x, 8, 2, num_global=1, order=order, check_values=False).columns

    order = BlockLayout.tile_order((4, 9), (2, 4))
    x = torch.randn(2, 2, 37, 8, requires_grad=True)
    columns = BlockLayout.top_k(x, x, 8, 2, num_global=1, order=order).columns
    assert torch.equal(choose(x), columns)
    assert not columns.requires_grad


def test_top_k_scores_in_float32_under_autocast():
    query, key = torch.randn(2, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    expected = BlockLayout.top_k(query, key, 2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert BlockLayout.top_k(query, key, 2, 5) == expected


def test_per_head():
    layouts = [BlockLayout.sliding_tile((4, 6), (2, 3), (1, w), num_global=1) for w in (1, 2)]
    layouts += [BlockLayout.neighborhood((4, 6), (3, 3), tile=(2, 3), num_global=1)]
    layout = BlockLayout.per_head(layouts)
    assert (layout.num_heads, layout.num_samples) == (3, 1)
    assert torch.equal(layout.to_mask(), torch.stack([one.to_mask() for one in layouts]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: BlockLayout.neighborhood((3, 5, 4), (3, 3, 2), tile=(2, 2, 3), num_global=1),
        lambda: BlockLayout.sliding_tile((3, 5, 4), (2, 2, 3), (1, 3, 1), num_global=1),
        lambda: BlockLayout.radial((6, 2, 5), 4, num_global=1),
        lambda: BlockLayout.top_k(torch.randn(2, 2, 61, 8), torch.randn(2, 2, 61, 8), 8, 3, num_global=1),
    ],
    ids=["neighborhood", "sliding_tile", "radial", "top_k"],
)
def test_attention_is_that_of_the_mask(build):
    torch.manual_seed(0)
    layout = build()
    query, key, value = torch.randn(3, 2, 2, 61, 8, requires_grad=True)
    found = vattn.edge_sparse_attention(query, key, value, layout)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.to_mask())
    torch.testing.assert_close(found, expected)


FULL = (29, 45, 80)


@pytest.mark.parametrize(
    "build",
    [
        lambda: BlockLayout.neighborhood(FULL, (13, 25, 25)),
        lambda: BlockLayout.sliding_tile(FULL, (6, 8, 8), (3, 3, 3)),
        lambda: BlockLayout.radial(FULL, 64, decay=0.5),
    ],
    ids=["neighborhood", "sliding_tile", "radial"],
)
def test_a_full_size_video_takes_memory_of_blocks_and_entries(build, tmp_path):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (list, tuple)) else [result]:
                self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
            return result

    with Largest() as largest:
        layout = build()
    assert layout.num_tokens == math.prod(FULL)
    assert largest.numel <= max(layout.columns.numel(), layout.order.numel())
    assert layout.columns.numel() < layout.num_blocks**2 / 3
    layout.plot(tmp_path / "layout.png")
    assert (tmp_path / "layout.png").stat().st_size < 2**20


@pytest.mark.parametrize(
    ("layout", "grid"),
    [
        (BlockLayout.sliding_tile((11, 4, 6), (2, 2, 3), (3, 1, 1), num_global=1), (11, 4, 6)),
        (BlockLayout.neighborhood((6, 7), (3, 3), tile=(2, 2)), (6, 7)),
        (BlockLayout.dense(9, 3), (9,)),
    ],
    ids=["3 axes", "2 axes", "1 axis"],
)
@pytest.mark.parametrize("query", [None, 5])
def test_pictures_of_what_a_query_reads(layout, grid, query, tmp_path):
    layout.plot(tmp_path / "layout.png", grid=grid, query=query)
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


NEAR = {"grid": (4, 6), "window": (3, 3)}
TILES = {"grid": (4, 6), "tile": (2, 2), "window": (1, 1)}
RADIAL = {"grid": (4, 6), "block_size": 2}
X = torch.zeros(2, 3, 11, 8)
TOP = {"query": X, "key": X, "block_size": 4, "k": 1}
ONE = BlockLayout.dense(8, 4)


@pytest.mark.parametrize(
    ("build", "arguments", "error", "must"),
    [
        ("neighborhood", NEAR | {"grid": ()}, TypeError, "grid must be a tuple of at least one int, got grid=()"),
        (
            "neighborhood",
            NEAR | {"grid": (4, 0)},
            ValueError,
            "grid[1] must be at least 1, got grid[1]=0",
        ),
        ("neighborhood", NEAR | {"window": 3}, TypeError, "window must be a tuple of 2 ints, got window=3"),
        (
            "neighborhood",
            NEAR | {"window": (3,)},
            ValueError,
            "window must have one int per axis of grid (2), got window=(3,)",
        ),
        (
            "neighborhood",
            NEAR | {"window": (3, 0)},
            ValueError,
            "window[1] must be at least 1, got window[1]=0",
        ),
        (
            "neighborhood",
            NEAR | {"stride": (4, 1)},
            ValueError,
            "stride must be at most window (3, 3), got stride=(4, 1)",
        ),
        (
            "neighborhood",
            {"grid": (2,) * 4, "window": (1,) * 4},
            ValueError,
            "tile must be given for a grid of more than three axes, got grid=(2, 2, 2, 2)",
        ),
        (
            "sliding_tile",
            TILES | {"tile": (2.0, 2)},
            TypeError,
            "tile[0] must be an int, got tile[0]=2.0",
        ),
        ("sliding_tile", TILES | {"window": None}, TypeError, "window must be a tuple of 2 ints, got window=None"),
        ("radial", RADIAL | {"block_size": 0}, ValueError, "block_size must be at least 1, got block_size=0"),
        ("radial", RADIAL | {"decay": "1"}, TypeError, "decay must be a float, got decay='1'"),
        ("radial", RADIAL | {"decay": 0.0}, ValueError, "decay must be positive and finite, got decay=0.0"),
        ("radial", RADIAL | {"decay": math.nan}, ValueError, "decay must be positive and finite, got decay=nan"),
        ("tile_order", {"grid": (4, 6), "tile": (2, 0)}, ValueError, "tile[1] must be at least 1, got tile[1]=0"),
        ("top_k", TOP | {"key": X[:, :1]}, ValueError, "key must have the shape of query (2, 3, 11, 8)"),
        (
            "top_k",
            TOP | {"query": X[:0], "key": X[:0]},
            ValueError,
            "query must have samples and heads, got query.shape=(0, 3, 11, 8)",
        ),
        ("top_k", TOP | {"k": 4}, ValueError, "k must be at most the number of blocks (3), got k=4"),
        ("top_k", TOP | {"own": 2}, TypeError, "own must be a bool, got own=2"),
        ("radial", RADIAL | {"sink": "no"}, TypeError, "sink must be a bool, got sink='no'"),
        ("top_k", TOP | {"k": -1}, ValueError, "k must be at least 0, got k=-1"),
        (
            "top_k",
            TOP | {"num_global": 12},
            ValueError,
            "num_global must be at most the number of tokens (11), got num_global=12",
        ),
        (
            "top_k",
            TOP | {"order": torch.arange(11)},
            ValueError,
            "order must have shape (M * block_size,), got order.shape=(11,) with block_size=4",
        ),
        (
            "top_k",
            TOP | {"order": torch.arange(12)},
            ValueError,
            "order must hold tokens below 11, or -1, got order[11]=11",
        ),
        (
            "top_k",
            TOP | {"order": torch.arange(12, device="meta")},
            ValueError,
            "order must be on the device of query (cpu), got order.device=meta",
        ),
        ("per_head", {"layouts": ONE}, TypeError, "layouts must be a list or tuple of layouts, got layouts=Block"),
        ("per_head", {"layouts": []}, ValueError, "layouts must have at least one element, got len(layouts)=0"),
        (
            "per_head",
            {"layouts": [ONE, BlockLayout.per_head([ONE, ONE])]},
            ValueError,
            "layouts must be for all heads and samples, got layouts[1]=BlockLayout(",
        ),
        (
            "per_head",
            {"layouts": [ONE, BlockLayout.dense(8, 2)]},
            ValueError,
            "layouts must have the blocks of layouts[0]=BlockLayout(",
        ),
        (
            "per_head",
            {"layouts": [ONE, BlockLayout(8, 4, ONE.row_offsets, ONE.columns, order=torch.arange(8).flip(0))]},
            ValueError,
            "layouts must have the blocks of layouts[0]=BlockLayout(",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(build, arguments, error, must):
    with pytest.raises(error, match=re.escape(f"BlockLayout.{build}: {must}")):
        getattr(BlockLayout, build)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "must"),
    [
        ({"query": 3}, ValueError, "query must come with a grid, got query=3"),
        ({"grid": 8}, TypeError, "grid must be a tuple of at least one int, got grid=8"),
        (
            {"grid": (2, 3)},
            ValueError,
            "grid must have at most three axes and the layout's 8 tokens, got grid=(2, 3)",
        ),
        ({"grid": (1, 2, 2, 2)}, ValueError, "grid must have at most three axes"),
        ({"grid": (2, 4), "query": 8}, ValueError, "query must be below 8, got query=8"),
        ({"grid": (2, 4), "query": -1}, ValueError, "query must be at least 0, got query=-1"),
    ],
)
def test_wrong_pictures(arguments, error, must, tmp_path):
    with pytest.raises(error, match=re.escape(f"BlockLayout.plot: {must}")):
        ONE.plot(tmp_path / "layout.png", **arguments)
    assert not (tmp_path / "layout.png").exists()
