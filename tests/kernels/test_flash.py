"""The online-softmax core by itself: what it does with queries that may read no key."""

import pytest
import torch
import triton.language as tl

from tests.utils import assert_close
from vattn import reference
from vattn.kernels import flash, launch

pytestmark = pytest.mark.gpu

ROWS, D = 16, 16
SHAPE = flash.shape(D, 1)


@launch.kernel
def attend(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, allowed_ptr, out_ptr, lse_ptr, tiles, SHAPE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One tile of queries over `tiles` tiles of keys, of which each query reads those that are allowed."""
    lane = tl.arange(0, ROWS)
    offs, mask = lane * SHAPE.head_dim, lane < ROWS
    q = flash.load_rows(q_ptr, offs, mask, SHAPE)
    state = flash.forward_start(ROWS, SHAPE)
    for i in range(tiles):
        k = flash.load_rows(k_ptr + i * ROWS * SHAPE.head_dim, offs, None, SHAPE)
        v = flash.load_rows(v_ptr + i * ROWS * SHAPE.head_dim, offs, None, SHAPE)
        allowed = tl.load(allowed_ptr + lane[:, None] * ROWS * tiles + i * ROWS + lane[None, :])
        s = tl.where(allowed != 0, flash.scores(q, k, "ieee"), float("-inf"))
        state = flash.forward_step(state, s, 0.5, v, None, "ieee")
    out, lse = flash.forward_finish(state, 0.5, 1.0)
    flash.store_rows(out_ptr, offs, mask, out, SHAPE)
    tl.store(lse_ptr + lane, lse)


def test_queries_without_keys(device):
    """None at all; none in the first tile; none in the last one."""
    torch.manual_seed(0)
    tiles = 3
    q, k, v = torch.randn(3, tiles * ROWS, D, device=device)
    q = q[:ROWS].contiguous()
    allowed = torch.rand(ROWS, tiles * ROWS, device=device) < 0.5
    allowed[0] = False
    allowed[1, :ROWS] = False
    allowed[2, -ROWS:] = False
    out, lse = torch.empty(ROWS, D, device=device), torch.empty(ROWS, device=device)
    launch.launch(attend, 1, q, q, k, v, allowed.to(torch.int8), out, lse, tiles, SHAPE=SHAPE, ROWS=ROWS)
    expected = reference.attention(q, k, v, scale=0.5, bias=torch.where(allowed, 0.0, -torch.inf))
    assert (out[0] == 0).all() and lse[0] == -torch.inf
    assert_close(out, expected[0], 1e-5, "out")
    assert_close(lse, expected[1], 1e-5, "lse")


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [(1, [16]), (16, [16]), (17, [32]), (33, [32, 16]), (64, [64]), (72, [64, 16]), (80, [64, 16]), (96, [64, 32]),
     (97, [128]), (120, [128]), (144, [128, 16]), (160, [128, 32]), (192, [128, 64]), (193, [256]), (256, [256])],
)  # fmt: skip
def test_chunks_cover_the_head_dim_and_little_more(head_dim, widths):
    chunks = flash.shape(head_dim, 8).chunks
    assert [chunk.width for chunk in chunks] == widths
    assert [chunk.first for chunk in chunks] == [sum(widths[:i]) for i in range(len(widths))]
