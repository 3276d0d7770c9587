"""The table of position biases: what its rows mean, and how it grows from images to clips and to longer clips."""

import contextlib
import itertools
import re

import pytest
import torch
from torch import nn

import vattn
from vattn import RelativePositionBias3D

GRID = (3, 2, 4)


def numbered(window: tuple[int, int, int] = GRID, heads: int = 2, num_global: int = 1) -> RelativePositionBias3D:
    """A bias whose table holds the number of each row, and its negative."""
    bias = RelativePositionBias3D(window, heads, num_global)
    rows = torch.arange(bias.table.shape[0], dtype=torch.float32)
    bias.table = nn.Parameter(torch.stack([rows, -rows], 1)[:, :heads])
    return bias


@pytest.mark.parametrize("num_global", [0, 1, 3])
def test_rows_of_the_table(num_global):
    T, H, W = GRID
    S = (2 * T - 1) * (2 * H - 1) * (2 * W - 1)
    dense = numbered(num_global=num_global)()
    assert torch.equal(dense[1], -dense[0])
    tokens = [None] * num_global + list(itertools.product(range(T), range(H), range(W)))
    assert dense.shape == (2, len(tokens), len(tokens))
    for (a, query), (b, key) in itertools.product(enumerate(tokens), repeat=2):
        if query is None and key is None:
            row = S + 2 * num_global + a * num_global + b
        elif query is None:
            row = S + a
        elif key is None:
            row = S + num_global + b
        else:
            row = 0
            for i, j, size in zip(query, key, GRID, strict=True):
                row = row * (2 * size - 1) + i - j + size - 1
        assert dense[0, a, b] == row


def test_the_table_starts_at_zero_and_has_a_gradient():
    bias = RelativePositionBias3D(GRID, num_heads=3)
    assert (bias.table == 0).all() and bias.table.requires_grad
    assert bias.table.shape == (5 * 3 * 7 + 2 + 1, 3)
    bias().sum().backward()
    assert bias.table.grad is not None and bias.table.grad[:, 0].sum() == 25**2  # every pair once


def test_positions_pick_their_rows_and_columns():
    bias = numbered()
    positions = torch.tensor([[5, 0, 23, 7], [1, 2, 3, 11]])
    dense = bias()
    picked = bias(positions)
    assert picked.shape == (2, 2, 5, 5)
    for b in range(2):
        ids = torch.cat([torch.zeros(1, dtype=torch.int64), positions[b] + 1])
        assert torch.equal(picked[b], dense[:, ids[:, None], ids])
        assert torch.equal(bias(positions[b]), picked[b])


def test_from_2d_biases_every_frame_as_the_image():
    image = numbered((1, 3, 4))
    video = RelativePositionBias3D.from_2d(image.table, (2, 3, 4))
    assert video.window == (2, 3, 4) and video.num_global == 1
    dense, of_image = video(), image()
    for f, g in itertools.product(range(2), repeat=2):
        assert torch.equal(dense[:, 1 + 12 * f :, 1 + 12 * g :][:, :12, :12], of_image[:, 1:, 1:])
    assert torch.equal(video.table[-3:], image.table[-3:])


@pytest.mark.parametrize("num_global", [0, 1, 2])
def test_from_2d_finds_the_number_of_global_tokens(num_global):
    table = RelativePositionBias3D((1, 3, 3), 2, num_global).table
    assert RelativePositionBias3D.from_2d(table, (4, 3, 3)).num_global == num_global


def test_inflate_takes_the_nearest_offset_in_time():
    bias = numbered((2, 1, 1))
    assert bias.table[:, 0].tolist() == [0, 1, 2, 3, 4, 5]  # offsets -1, 0, 1, then those of the global token
    inflated = bias.inflate(4)
    assert inflated.window == (4, 1, 1)
    assert inflated.table[:, 0].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4, 5]
    assert torch.equal(bias.inflate(2).table, bias.table)
    assert bias.inflate(1).table[:, 0].tolist() == [0, 3, 4, 5]


def test_inflate_makes_another_module():
    bias = numbered().bfloat16()
    inflated = bias.inflate(6)
    assert inflated.table.dtype == torch.bfloat16 and inflated.table.requires_grad
    assert bias.window == GRID
    inflated.load_state_dict(inflated.state_dict())


def attend(bias, q):
    layout = vattn.BlockLayout.local_random(q.shape[2] - 1, block_size=8, num_random=1, num_global=1)
    return vattn.edge_sparse_attention(q, q, q, layout, position_bias=bias)


@pytest.mark.parametrize(
    "register",
    [
        lambda bias, hook: bias.register_forward_pre_hook(hook),
        lambda bias, hook: bias.register_forward_hook(hook),
        lambda bias, hook: bias.register_full_backward_hook(hook),
        lambda bias, hook: nn.modules.module.register_module_forward_hook(hook),
    ],
    ids=["before", "after", "backward", "of all modules"],
)
def test_hooks_run(register):
    called = []
    bias, q = RelativePositionBias3D(GRID, 2, 1), torch.randn(1, 2, 25, 8, requires_grad=True)
    handle = register(bias, lambda *args: called.append(args[0]))
    with contextlib.ExitStack() as stack:
        stack.callback(handle.remove)
        attend(bias, q).sum().backward()
    assert called[0] is bias


def test_a_wrapped_bias_is_refused_whatever_came_before():
    """A wrapper has the attributes of what it wraps."""
    bias, q = RelativePositionBias3D(GRID, 2, 1), torch.randn(1, 2, 25, 8)
    attend(bias, q)
    with pytest.raises(TypeError, match="position_bias must be a RelativePositionBias3D"):
        attend(torch.compile(bias), q)


@pytest.mark.parametrize(
    ("call", "error", "must"),
    [
        (
            lambda: RelativePositionBias3D(3, 2),  # type: ignore[arg-type]
            TypeError,
            ": window must be (T, H, W), got window=3",
        ),
        (lambda: RelativePositionBias3D((3, 2), 2), ValueError, ": window must be (T, H, W), got window=(3, 2)"),
        (lambda: RelativePositionBias3D((3, 0, 2), 2), ValueError, ": window's H must be at least 1, got window's H=0"),
        (lambda: RelativePositionBias3D(GRID, 0), ValueError, ": num_heads must be at least 1, got num_heads=0"),
        (lambda: RelativePositionBias3D(GRID, 2, -1), ValueError, ": num_global must be at least 0, got num_global=-1"),
        (lambda: numbered().inflate(0), ValueError, ".inflate: num_frames must be at least 1, got num_frames=0"),
        (
            lambda: RelativePositionBias3D.from_2d(torch.zeros(30, 2), (2, 3, 3)),
            ValueError,
            ".from_2d: table must have (2H-1)(2W-1) + 2G + G*G rows for window=(2, 3, 3) and some G, "
            "got table.shape=(30, 2)",
        ),
        (
            lambda: RelativePositionBias3D.from_2d(torch.zeros(3, 2), (2, 3, 3)),
            ValueError,
            ".from_2d: table must have (2H-1)(2W-1) + 2G + G*G rows for window=(2, 3, 3) and some G, "
            "got table.shape=(3, 2)",
        ),
        (
            lambda: RelativePositionBias3D.from_2d(torch.zeros(28), (2, 3, 3)),
            ValueError,
            ".from_2d: table must have shape (R, num_heads), got table.shape=(28,)",
        ),
    ],
    ids=lambda x: x[2:40] if isinstance(x, str) else "",
)
def test_errors(call, error, must):
    with pytest.raises(error, match=f"^RelativePositionBias3D{re.escape(must)}$"):
        call()
