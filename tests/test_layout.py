"""Block layouts: their builders against loops over blocks, their transposes, masks and pictures, and their messages."""

import copy
import itertools
import math
import pickle
import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import vattn
from tests.layouts import layout_of, layouts
from vattn import BlockLayout


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def rows_of(layout: BlockLayout) -> list[list[int]]:
    """The rows of all samples and heads, as lists."""
    return [
        layout.columns[start:end].tolist()
        for head in layout.row_offsets.flatten(0, -2).tolist()
        for start, end in itertools.pairwise(head)
    ]


def blocks_of(layout: BlockLayout) -> list[list[int]]:
    """The tokens of each block, which count from the first global one."""
    size, tokens = layout.block_size, torch.arange(layout.num_tokens) if layout.order is None else layout.order
    blocks = [tokens[i * size : (i + 1) * size].tolist() for i in range(layout.num_blocks)]
    return [[layout.num_global + token for token in block if token >= 0] for block in blocks]


@pytest.mark.parametrize("wrap", [True, False], ids=["wrap", "clip"])
@pytest.mark.parametrize("num_local", [0, 1, 3, 5])
@pytest.mark.parametrize("blocks", [1, 2, 4, 9])
def test_local_random(blocks, num_local, wrap):
    """Neighbours in order, then the blocks with the largest draws, neighbours aside, in order."""
    num_random = min(blocks, 3)
    layout = BlockLayout.local_random(
        5 * blocks - 2, 5, num_local=num_local, num_random=num_random, wrap=wrap,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    draws = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(3))
    rows = rows_of(layout)
    reach = num_local // 2
    for i, row in enumerate(rows):
        near = [i + r for r in range(-reach, reach + 1)] if num_local else []
        near = [j % blocks for j in near] if wrap else [j for j in near if 0 <= j < blocks]
        local, random = row[: len(near)], row[len(near) :]
        assert local == near
        others = sorted(set(range(blocks)) - set(near), key=lambda j: -draws[i, j])[:num_random]
        assert random == sorted(random) and len(random) == num_random
        assert set(others) <= set(random)
        assert set(random) - set(others) <= set(near)  # only where there are not enough others
    assert (layout.num_tokens, layout.block_size, layout.num_global) == (5 * blocks - 2, 5, 1)


def test_a_random_layout_is_new_every_time_unless_seeded():
    def draw(seed: int | None = None) -> BlockLayout:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return BlockLayout.local_random(200, 10, generator=generator)

    assert draw() != draw()
    assert draw(1) == draw(1) != draw(2)
    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(5)
    assert draw() == first


def test_random_layouts_take_no_loop_over_blocks():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for blocks in (4, 64):
        with Count() as count:
            BlockLayout.local_random(blocks * 8, 8)
        counts.append(count.calls)
    assert counts[0] == counts[1] <= 20


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("num_local_blocks", [0, 1, 4])
@pytest.mark.parametrize(
    ("grid", "block_size", "blocks"),
    [
        ((4, 4, 4), 8, (4, 2)),
        ((2, 8, 4), 4, (2, 8)),
        ((2, 3, 4), 2, (2, 3, 2)),
        ((3, 8), 8, (3,)),  # an axis of one block is merged with the next
        ((24,), 4, (6,)),
        ((2, 2), 4, (1,)),
    ],
    ids=str,
)
def test_strided(grid, block_size, blocks, num_local_blocks, causal):
    layout = BlockLayout.strided(grid, block_size, num_local_blocks=num_local_blocks, causal=causal)
    places = [tuple(int(x) for x in torch.unravel_index(torch.tensor(i), blocks)) for i in range(math.prod(blocks))]
    for i, row in enumerate(rows_of(layout)):
        last = i if causal else i + num_local_blocks - 1
        expected = {j for j in range(len(places)) if i - num_local_blocks <= j <= last}
        for axis in range(len(blocks) - 1):  # none along the last axis
            for step in range(places[i][axis] + (0 if causal else blocks[axis] - places[i][axis])):
                expected.add(places.index((*places[i][:axis], step, *places[i][axis + 1 :])))
        assert row == sorted(expected)
    assert (layout.num_tokens, layout.num_global) == (math.prod(grid), 0)


def test_dense():
    layout = BlockLayout.dense(10, 4, num_global=2)
    assert rows_of(layout) == [[0, 1, 2]] * 3
    assert layout.to_mask().all() and layout.to_mask().shape == (12, 12)
    assert layout.density == 1.0


@settings(deadline=None, max_examples=60)
@given(layouts(heads=2, samples=3, orders=True))
def test_masks_transposes_and_densities(layout):
    counts = layout.token_counts()
    mask = layout.to_mask()
    G, M, length = layout.num_global, layout.num_blocks, layout.num_global + layout.num_tokens
    shape = (layout.num_samples, layout.num_heads, length, length)
    assert counts.shape == (shape if layout.num_samples > 1 else shape[1:])
    sets = counts.flatten(0, -3)
    blocks, rows = blocks_of(layout), rows_of(layout)
    assert sorted(itertools.chain(*blocks)) == list(range(G, length))
    for i, row in enumerate(rows):
        for j, keys in enumerate(blocks):
            found = sets[i // M][blocks[i % M]][:, keys]
            assert (found == row.count(j)).all()
    assert (sets[:, :G] == 1).all() and (sets[:, :, :G] == 1).all()
    assert torch.equal(mask.view_as(counts), counts > 0)
    assert mask.dim() == (4 if layout.num_samples > 1 else 3 if layout.num_heads > 1 else 2)
    if length > 0:
        assert math.isclose(layout.density, counts.double().mean())

    transposed = layout.transpose()
    assert torch.equal(transposed.block_counts(), layout.block_counts().mT)
    assert torch.equal(transposed.token_counts(), counts.mT)
    assert transposed.transpose().row_offsets.equal(layout.row_offsets)
    assert layout.transpose() is transposed  # built once
    assert pickle.loads(pickle.dumps(layout)) == layout

    if layout.order is None:
        single = BlockLayout.from_mask(mask, layout.block_size, layout.num_global)
        assert torch.equal(single.block_counts(), layout.block_counts().clamp(max=1))
        assert all(row == sorted(set(row)) for row in rows_of(single))


@pytest.mark.parametrize("batch", [None, 3], ids=["all samples", "per sample"])
@pytest.mark.parametrize("heads", [None, 2], ids=["all heads", "per head"])
@pytest.mark.parametrize("separate_full_blocks", [True, False])
def test_from_block_mask(batch, heads, separate_full_blocks):
    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= 20 + 40 * head + 15 * batch

    flex = create_block_mask(
        near, batch, heads, 100, 100, device="cpu", BLOCK_SIZE=16, separate_full_blocks=separate_full_blocks
    )
    layout = BlockLayout.from_block_mask(flex)
    assert (layout.num_tokens, layout.block_size, layout.num_global) == (100, 16, 0)
    assert (layout.num_samples, layout.num_heads) == (batch or 1, heads or 1)
    tokens, counts = torch.arange(100), layout.block_counts().view(batch or 1, heads or 1, 7, 7)
    for sample in range(layout.num_samples):
        for head in range(layout.num_heads):
            allowed = near(torch.tensor(sample), torch.tensor(head), tokens[:, None], tokens)
            touched = torch.zeros(7, 7, dtype=torch.bool)
            touched[tuple((allowed.nonzero() // 16).T)] = True
            assert torch.equal(counts[sample, head], touched.long())


def test_from_block_mask_reads_only_what_is_listed():
    """Behind their count, FlexAttention's rows hold anything."""
    flex = BlockMask.from_kv_blocks(
        torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[1, 1], [1, 0]]]], dtype=torch.int32), BLOCK_SIZE=8
    )
    assert rows_of(BlockLayout.from_block_mask(flex)) == [[1], [0, 1]]


def test_layouts_are_immutable():
    offsets, columns = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    layout = BlockLayout(3, 4, offsets, columns)
    with pytest.raises(AttributeError, match="a layout is immutable, got num_tokens=4"):
        layout.num_tokens = 4
    with pytest.raises(AttributeError, match="a layout is immutable"):
        del layout.columns
    columns += 7  # what has been checked does not change with the caller's tensors
    assert rows_of(layout) == [[0]]


def test_equal_layouts():
    layout = layout_of([[0, 1], [1]], 7, 4, num_global=1)
    for same in (
        layout_of([[0, 1], [1]], 7, 4, num_global=1),
        copy.deepcopy(layout),
        pickle.loads(pickle.dumps(layout)),
    ):
        assert same == layout and hash(same) == hash(layout)
    for other in (
        layout_of([[1, 0], [1]], 7, 4, num_global=1),
        layout_of([[0], [1, 1]], 7, 4, num_global=1),
        layout_of([[0, 1], [1]], 8, 4, num_global=1),
        layout_of([[0, 1], [1]], 7, 4),
        layout_of([[0, 1], [1]], 7, 4, num_global=1, order=torch.tensor([0, 1, 2, 3, 4, 5, 6, -1])),
        "a layout",
    ):
        assert other != layout
    swapped, kept = (
        layout_of([[0, 1], [1]], 3, 2, order=torch.tensor(order)) for order in ([1, 0, 2, -1], [0, 1, 2, -1])
    )
    assert swapped != kept and swapped == copy.copy(swapped)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_layouts_leave_plans_behind(copied):
    layout = layout_of([[0, 1], [1]], 7, 4)
    layout._plans.of_ranks = object()
    layout.transpose()
    found = copied(layout)
    assert vars(found._plans) == {} and "of_ranks" in vars(layout._plans)
    assert found == layout and found.transpose() == layout.transpose()


def test_to_a_device():
    layout = BlockLayout.dense(7, 4, num_global=1)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert (moved.device.type, moved.num_tokens, moved.num_global) == ("meta", 7, 1)
    assert moved.transpose().row_offsets.shape == (1, 3)
    moved = layout_of([[0], [0, 0]], 3, 4, samples=2, order=torch.tensor([2, 0, 1, -1])).to("meta")
    assert (moved.row_offsets.shape, moved.order.shape, moved.order.device.type) == ((2, 1, 2), (4,), "meta")


def test_repr_says_what_is_out_of_the_ordinary():
    layout = layout_of([[0], [0, 0]], 3, 4, samples=2, order=torch.tensor([2, 0, 1, -1]))
    sizes = "num_tokens=3, block_size=4, num_global=0, num_blocks=1, num_samples=2, num_heads=1, nnz=3, order=(4,)"
    assert repr(layout) == f"BlockLayout({sizes}, device=cpu)"


@pytest.mark.parametrize(
    "layout",
    [
        BlockLayout.local_random(50, 8),
        layout_of([[0], [], [1], [0, 0]], 7, 4, 0, sets=2),
        layout_of([[0, 1], [], [2]] * 4, 5, 4, 1, 2, 2, torch.tensor([4, 0, 1, -1, -1, -1, -1, -1, 3, 2, -1, -1])),
    ],
    ids=["plain", "heads", "samples and an order"],
)
def test_plot(layout, tmp_path):
    layout.plot(tmp_path / "layout.png")
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_a_new_layout_every_step_compiles_once(made):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: Tensor, layout: BlockLayout | None) -> Any:
        if layout is None:
            layout = BlockLayout.local_random(x.shape[2] - 1, 4, num_random=2)
        return vattn.edge_sparse_attention(x, x, x, layout), layout.transpose().columns

    x = torch.randn(1, 2, 31, 8, requires_grad=True)
    seen = []
    for _ in range(4):
        layout = None if made == "inside" else BlockLayout.local_random(30, 4, num_random=2)
        out, columns = step(x, layout)
        out.sum().backward()
        seen.append(columns)
    assert counter.frame_count == 1
    assert not all(torch.equal(seen[0], other) for other in seen[1:])


OFFSETS, COLUMNS, ORDER = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), torch.arange(6, -2, -1)
MASK = torch.ones(5, 5, dtype=torch.bool)
NEW = {"num_tokens": 7, "block_size": 4, "row_offsets": OFFSETS, "columns": COLUMNS}
RANDOM = {"num_tokens": 7, "block_size": 4, "num_random": 1}


@pytest.mark.parametrize(
    ("build", "arguments", "error", "must"),
    [
        ("", NEW | {"num_tokens": -1}, ValueError, "num_tokens must be at least 0, got num_tokens=-1"),
        ("", NEW | {"num_tokens": 7.0}, TypeError, "num_tokens must be an int, got num_tokens=7.0"),
        ("", NEW | {"block_size": 0}, ValueError, "block_size must be at least 1, got block_size=0"),
        ("", NEW | {"num_global": -1}, ValueError, "num_global must be at least 0, got num_global=-1"),
        (
            "",
            NEW | {"row_offsets": OFFSETS.float()},
            TypeError,
            "row_offsets must be an int32 or int64 tensor, got row_offsets.dtype=torch.float32",
        ),
        ("", NEW | {"columns": [0]}, TypeError, "columns must be an int32 or int64 tensor, got columns=[0]"),
        (
            "",
            NEW | {"row_offsets": OFFSETS[1:]},
            ValueError,
            "row_offsets must have shape (3,), (L, 3) or (S, L, 3), got row_offsets.shape=(2,)",
        ),
        (
            "",
            NEW | {"row_offsets": OFFSETS.new_zeros(0, 3)},
            ValueError,
            "row_offsets must have shape (3,), (L, 3) or (S, L, 3), got row_offsets.shape=(0, 3)",
        ),
        ("", NEW | {"columns": COLUMNS[None]}, ValueError, "columns must have shape (nnz,), got columns.shape=(1, 3)"),
        (
            "",
            NEW | {"columns": COLUMNS.to("meta")},
            ValueError,
            "columns must be on the device of row_offsets (cpu), got columns.device=meta",
        ),
        (
            "",
            NEW | {"row_offsets": torch.tensor([0, 3, 2])},
            ValueError,
            "row_offsets must grow from 0 to the number of columns (3), each head's from where the last one's ended, "
            "got row_offsets=[[0, 3, 2]]",
        ),
        (
            "",
            NEW | {"row_offsets": torch.tensor([[0, 1, 1], [2, 3, 3]])},
            ValueError,
            "row_offsets must grow from 0 to the number of columns (3), each head's from where the last one's ended, "
            "got row_offsets=[[0, 1, 1], [2, 3, 3]]",
        ),
        (
            "",
            NEW | {"columns": torch.tensor([0, -1, 1])},
            ValueError,
            "columns must be below the number of blocks (2), got columns[1]=-1",
        ),
        (
            "",
            NEW | {"columns": torch.tensor([0, 1, 2])},
            ValueError,
            "columns must be below the number of blocks (2), got columns[2]=2",
        ),
        (
            "",
            NEW | {"row_offsets": torch.tensor([[[0, 1, 1]], [[2, 3, 3]]])},
            ValueError,
            "row_offsets must grow from 0 to the number of columns (3), each head's from where the last one's ended, "
            "got row_offsets=[[[0, 1, 1]], [[2, 3, 3]]]",
        ),
        ("", NEW | {"order": [0]}, TypeError, "order must be an int32 or int64 tensor, got order=[0]"),
        (
            "",
            NEW | {"order": ORDER[:7]},
            ValueError,
            "order must have shape (M * block_size,), got order.shape=(7,) with block_size=4",
        ),
        (
            "",
            NEW | {"order": ORDER[None]},
            ValueError,
            "order must have shape (M * block_size,), got order.shape=(1, 8) with block_size=4",
        ),
        (
            "",
            NEW | {"order": torch.cat([ORDER, ORDER])},
            ValueError,
            "row_offsets must have shape (5,), (L, 5) or (S, L, 5), got row_offsets.shape=(3,)",
        ),
        (
            "",
            NEW | {"order": ORDER.to("meta")},
            ValueError,
            "order must be on the device of row_offsets (cpu), got order.device=meta",
        ),
        ("", NEW | {"order": ORDER + 1}, ValueError, "order must hold tokens below 7, or -1, got order[0]=7"),
        ("", NEW | {"order": ORDER - 1}, ValueError, "order must hold tokens below 7, or -1, got order[7]=-2"),
        ("", NEW | {"order": ORDER // 2}, ValueError, "order must hold every token once, got token 0 2 times"),
        (
            "",
            NEW | {"num_tokens": 8, "order": ORDER},
            ValueError,
            "order must hold every token once, got token 7 0 times",
        ),
        (
            "",
            NEW | {"order": ORDER.flip(0)},
            ValueError,
            "-1 must come last in a block of order, got order[1]=0 behind a -1",
        ),
        ("local_random", RANDOM | {"num_local": 2}, ValueError, "num_local must be 0 or odd, got num_local=2"),
        ("local_random", RANDOM | {"wrap": "x"}, TypeError, "wrap must be a bool, got wrap='x'"),
        ("local_random", RANDOM | {"draws": 3}, TypeError, "draws must be a torch.Tensor, got draws=3"),
        ("local_random", RANDOM | {"generator": 3}, TypeError, "generator must be a torch.Generator, got generator=3"),
        ("strided", {"grid": (2, 4), "block_size": 2, "causal": 1}, TypeError, "causal must be a bool, got causal=1"),
        ("local_random", RANDOM | {"num_local": -1}, ValueError, "num_local must be at least 0, got num_local=-1"),
        (
            "local_random",
            RANDOM | {"num_random": 3},
            ValueError,
            "num_random must be at most the number of blocks (2), got num_random=3",
        ),
        ("strided", {"grid": 4, "block_size": 2}, TypeError, "grid must be a tuple of at least one int, got grid=4"),
        (
            "strided",
            {"grid": (2, 0), "block_size": 2},
            ValueError,
            "grid[1] must be at least 1, got grid[1]=0",
        ),
        (
            "strided",
            {"grid": (2, 3, 3), "block_size": 2},
            ValueError,
            "block_size must divide the merged trailing axes (3,), got block_size=2",
        ),
        ("dense", {"num_tokens": 3, "block_size": 1.5}, TypeError, "block_size must be an int, got block_size=1.5"),
        (
            "from_mask",
            {"mask": MASK.int(), "block_size": 2},
            TypeError,
            "mask must be a bool tensor, got mask.dtype=torch.int32",
        ),
        (
            "from_mask",
            {"mask": MASK[:3], "block_size": 2},
            ValueError,
            "mask must have shape (G+N, G+N), (H, G+N, G+N) or (B, H, G+N, G+N), got mask.shape=(3, 5)",
        ),
        (
            "from_mask",
            {"mask": ~MASK, "block_size": 2, "num_global": 1},
            ValueError,
            "mask must be True for global tokens, got num_global=1",
        ),
        (
            "from_mask",
            {"mask": MASK, "block_size": 2, "num_global": 6},
            ValueError,
            "num_global must be at most the tokens of mask (5), got num_global=6",
        ),
        (
            "from_mask",
            {"mask": MASK, "block_size": 2, "num_global": "1"},
            TypeError,
            "num_global must be an int, got num_global='1'",
        ),
        (
            "from_mask",
            {"mask": MASK.tril(), "block_size": 2},
            ValueError,
            "mask must be constant within blocks, got a block of 2 that is not",
        ),
        ("from_block_mask", {"block_mask": MASK}, TypeError, "block_mask must be a BlockMask, got block_mask=Tensor"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) and " " in x else "",
)
def test_errors(build, arguments, error, must):
    call = getattr(BlockLayout, build) if build else BlockLayout
    with pytest.raises(error, match=f"^BlockLayout{'.' if build else ''}{build}: {re.escape(must)}$"):
        call(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [10, 2**31, 2**62, 2**63 - 1])
def test_a_block_of_any_size_is_all_tokens(block_size, dtype):
    layout, whole = (BlockLayout.dense(9, size, num_global=1) for size in (block_size, 9))
    assert torch.equal(layout.to_mask(), whole.to_mask()) and layout.density == whole.density == 1
    assert layout.transpose() == layout
    assert BlockLayout.from_mask(whole.to_mask(), block_size, num_global=1) == layout
    query = torch.randn(1, 2, 10, 4, dtype=dtype, requires_grad=True)
    out, expected = (vattn.edge_sparse_attention(query, query, query, x) for x in (layout, whole))
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(x.sum(), query)[0] for x in (out, expected)))


def test_a_block_must_be_countable():
    with pytest.raises(ValueError, match=r"^BlockLayout.dense: block_size must be less than 2\*\*63, got block_size="):
        BlockLayout.dense(9, 2**63)


@pytest.mark.parametrize(
    ("queries", "block", "must"),
    [
        (
            64,
            16,
            "block_mask.seq_lengths must be the same for queries and keys, got block_mask.seq_lengths=(64, 48)",
        ),
        (
            48,
            (8, 16),
            "block_mask.BLOCK_SIZE must be the same for queries and keys, got block_mask.BLOCK_SIZE=(8, 16)",
        ),
    ],
    ids=["lengths", "blocks"],
)
def test_errors_of_from_block_mask(queries, block, must):
    flex = create_block_mask(lambda b, h, q, k: q >= k, None, None, queries, 48, device="cpu", BLOCK_SIZE=block)
    with pytest.raises(ValueError, match=f"^BlockLayout.from_block_mask: {re.escape(must)}$"):
        BlockLayout.from_block_mask(flex)
