"""The kernels of latent attention, called directly: Triton on a GPU or interpreted on the CPU, and C++.

Truth is the reference in float64; the budget is twice the error of the reference in the kernel's own dtype.
"""

from typing import NamedTuple

import pytest
import torch
import triton
from torch import Tensor

from tests.utils import assert_within_budget, far_apart, magnitude
from vattn import reference
from vattn.kernels import configs, latent_attention
from vattn.reference.dropout import dropout_keep

pytestmark = pytest.mark.gpu

SEED = 0x123456789ABCDEF
BLOCK_Q, BLOCK_K = configs.INTERPRETER.BLOCK_Q, configs.INTERPRETER.BLOCK_K
CPP_TILE = 64  # csrc/cpu/flash.h


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Inputs(NamedTuple):
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    grad_out: Tensor
    grad_lse: Tensor | None


def inputs(queries, segments, device, B=1, H=1, D=16, dtype=torch.float32):
    """Random tensors for `queries` queries over keys in `segments` of these lengths."""

    def some(length):
        return torch.randn(B, H, length, D, device=device).to(dtype)

    keys, values = ([some(length) for length in segments] for _ in range(2))
    return Inputs(some(queries), keys, values, some(queries), torch.randn(B, H, queries, device=device))


def formula(x, dtype, key_lengths, dropout_p, seed, scale):
    """out, lse and gradients by the reference in `dtype`."""
    tensors = [y.detach().to(dtype).requires_grad_() for y in (x.query, *x.keys, *x.values)]
    keys, values = tensors[1 : 1 + len(x.keys)], tensors[1 + len(x.keys) :]
    out, lse = reference.latent_attention(
        tensors[0], keys, values, key_lengths=key_lengths, dropout_p=dropout_p, scale=scale, return_lse=True, seed=seed
    )
    results, grads = [out], [x.grad_out.to(dtype)]
    if x.grad_lse is not None:
        results, grads = [out, lse], [*grads, x.grad_lse.to(lse.dtype)]
    return out, lse, *torch.autograd.grad(results, tensors, grads, materialize_grads=True)


def run(x, *settings):
    """out, lse and gradients by the kernels; `settings` as the launchers take them, from `key_lengths` on."""
    out, lse = latent_attention.forward(x.query, x.keys, x.values, *settings)
    grads = latent_attention.backward(x.grad_out, x.grad_lse, x.query, x.keys, x.values, out, lse, *settings)
    return out, lse, grads[0], *grads[1], *grads[2]


def check(x, key_lengths=None, dropout_p=0.0, seed=None, scale=None):
    """The kernels are within budget, forward and backward; returns what they computed."""
    scale = x.query.shape[-1] ** -0.5 if scale is None else scale
    settings = (key_lengths, dropout_p, seed, scale)
    actual = run(x, *settings)
    truth, plain = formula(x, torch.float64, *settings), formula(x, x.query.dtype, *settings)
    # The backward finds weights again as exp(s - lse), which the rounding of lse in float32 changes by its own
    # size; ds = p * (dp - delta), which may be 0, is the difference of numbers as large as other gradients; and the
    # out in delta has been rounded, so that where they cancel half a unit in the last place of the terms is left.
    rounded = torch.finfo(x.query.dtype).eps / torch.finfo(torch.float32).eps / 4
    intermediate = magnitude(*truth[2:]) * max(1.0, magnitude(truth[1]), rounded) if x.query.numel() else 0.0
    segments = range(len(x.keys))
    names = ["out", "lse", "dq", *(f"dk[{i}]" for i in segments), *(f"dv[{i}]" for i in segments)]
    for name, a, t, p in zip(names, actual, truth, plain, strict=True):
        assert_within_budget(a, t, p, name, intermediate if name.startswith("d") else 0.0)
    return actual


@pytest.mark.parametrize("head_dim", [1, 16, 33, 64, 72, 80, 96, 120, 128, 144, 256])
def test_head_dims(head_dim, device):
    """Whole, split and masked columns."""
    check(inputs(19, [37], device, D=head_dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_dtypes(dtype, head_dim, device):
    check(inputs(23, [10, 40], device, H=2, D=head_dim, dtype=dtype))


@pytest.mark.parametrize("length", sorted({1, 2, *(b + i for b in (BLOCK_Q, BLOCK_K, CPP_TILE) for i in (-1, 0, 1))}))
def test_tile_edges(length, device):
    """As many keys, or queries, as a tile has, and one more or less."""
    check(inputs(3, [length], device))
    check(inputs(length, [3], device))


@pytest.mark.parametrize(
    "segments",
    [(5, 33), (33, 5), (BLOCK_K, BLOCK_K), (0, 40), (40, 0), (31, 0, 70), (1, 1, 1, 1), (3, 64, 0, 32)],
    ids=str,
)
def test_segments(segments, device):
    """Keys in several tensors mean what they mean concatenated."""
    check(inputs(20, segments, device, B=2, H=2))


@pytest.mark.parametrize("segments", [(0,), (0, 0)], ids=str)
def test_no_keys(segments, device):
    out, lse, dq, *_ = check(inputs(20, segments, device, H=2))
    assert (out == 0).all() and (lse == -torch.inf).all() and (dq == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_key_lengths(dtype, device):
    check(inputs(18, [70], device, B=5, H=2), torch.tensor([0, 1, 32, 65, 70], dtype=dtype, device=device))


def test_what_lies_behind_a_key_length_is_not_read(device):
    lengths = torch.tensor([0, 33, 5], device=device)
    x = inputs(18, [70], device, B=3, H=2)
    expected = run(x, lengths, 0.0, None, 0.3)
    for b, length in enumerate(lengths.tolist()):
        x.keys[0][b, :, length:] = x.values[0][b, :, length:] = torch.nan
    actual = run(x, lengths, 0.0, None, 0.3)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    for grad in actual[3:]:
        assert all((grad[b, :, length:] == 0).all() for b, length in enumerate(lengths.tolist()))


def test_key_lengths_out_of_range(kernels, device):
    """A GPU would have to wait for an error, so the lengths are clamped."""
    x, wrong = inputs(3, [40], device, B=2), torch.tensor([-7, 2**40], device=device)
    if kernels == "cpp":
        with pytest.raises(ValueError, match=r"key_lengths must be between 0 and the number of keys \(40\)"):
            run(x, wrong, 0.0, None, 0.3)
        return
    clamped = torch.tensor([0, 40], device=device)
    for a, e in zip(run(x, wrong, 0.0, None, 0.3), run(x, clamped, 0.0, None, 0.3), strict=True):
        assert torch.equal(a, e)


def test_strided_key_lengths(device):
    lengths = torch.tensor([[3, 0], [40, 0], [17, 0]], device=device)[:, 0]
    check(inputs(3, [40], device, B=3), lengths)


LONG = 4 * configs.TILES_WORTH_A_SPLIT * BLOCK_K + 5  # four splits


def test_these_lengths_are_split():
    """What the tests of splits mean to test happens in the interpreter."""
    assert configs.splits(1, triton.cdiv(LONG, BLOCK_K), torch.empty(0)) == 4
    assert configs.splits(2, triton.cdiv(LONG, BLOCK_K), torch.empty(0)) == 4
    assert configs.splits(8, triton.cdiv(LONG, BLOCK_K), torch.empty(0)) == 1


@pytest.mark.parametrize("head_dim", [16, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_and_many_keys(dtype, head_dim, device):
    check(inputs(5, [LONG], device, D=head_dim, dtype=dtype))


@pytest.mark.parametrize("segments", [(200, LONG - 200), (7, 0, LONG - 7)], ids=str)
def test_splits_of_segments(segments, device):
    """Splits that begin in the middle of a segment, and end in another one."""
    check(inputs(9, segments, device))


def test_splits_without_keys(device):
    """A short sample in a batch with a long one, and one with none: its splits have nothing to read."""
    check(inputs(4, [LONG], device, B=3), torch.tensor([0, 33, LONG], device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_queries_and_few_keys(dtype, device):
    """The gradients of few keys are sums over splits of the queries."""
    check(inputs(LONG // 2, [5, 3], device, dtype=dtype))


DECODE_Q, DECODE_K = configs.INTERPRETER_DECODE[:2]
WALK = 9 * DECODE_Q + 3  # queries of one head: programs walk over two tiles, but the last ones over less


def test_these_lengths_are_decoded():
    """What the tests of one tile mean to test happens in the interpreter."""
    tiles = {keys: configs.decode_tiles(torch.empty(16), False, keys) for keys in (0, 1, 128, 129, 255, 256, 257)}
    assert [keys for keys, found in tiles.items() if found is not None] == [129, 255, 256]
    assert configs.walk(triton.cdiv(WALK, DECODE_Q), torch.empty(0)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [DECODE_K + i for i in (-DECODE_K // 2, 1 - DECODE_K // 2, -1, 0, 1)])
def test_keys_that_fill_one_tile(keys, dtype, device):
    check(inputs(WALK, [keys], device, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_head_dims_of_one_tile(head_dim, device):
    check(inputs(19, [DECODE_K], device, D=head_dim, dtype=torch.float16))


@pytest.mark.parametrize(
    "segments", [(100, 156), (0, 200), (200, 0, 55), (1, 254, 1), (64, 64, 64, 64)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_segments_of_one_tile(segments, dropout_p, device):
    check(inputs(WALK, segments, device, H=2), dropout_p=dropout_p, seed=torch.tensor([SEED], device=device))


def test_key_lengths_of_one_tile(device):
    """Of a sample that reads no keys, too."""
    lengths = torch.tensor([0, 1, 129, 255, 256], device=device)
    x = inputs(DECODE_Q + 1, [DECODE_K], device, B=5, H=2)
    out, lse, *_ = check(x, lengths)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    poisoned = x._replace(values=[x.values[0].clone()])
    poisoned.values[0][1, :, 1:] = torch.nan
    assert torch.equal(run(poisoned, lengths, 0.0, None, 0.25)[0], run(x, lengths, 0.0, None, 0.25)[0])


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-4, 5.0])
def test_scale(scale, device):
    check(inputs(13, [9, 30], device), scale=scale)
    check(inputs(13, [DECODE_K], device), scale=scale)


def test_large_scores_do_not_overflow(device):
    x = inputs(20, [40], device)
    check(x._replace(query=x.query * 100, keys=[x.keys[0] * 100]))


def test_gradient_of_out_only(device):
    check(inputs(13, [9, 30], device)._replace(grad_lse=None))


@pytest.mark.parametrize("dropout_p", [0.2, 0.9, 1.0])
def test_dropout(dropout_p, device):
    seed = torch.tensor([SEED], device=device)
    check(inputs(18, [5, 0, 40], device, B=2, H=2), dropout_p=dropout_p, seed=seed)
    check(inputs(3, [40], device, B=2), torch.tensor([40, 33], device=device), dropout_p, seed)


def test_dropout_of_splits(device):
    check(inputs(3, [7, LONG - 7], device), dropout_p=0.4, seed=torch.tensor([SEED], device=device))


@pytest.mark.parametrize("seed", [0, -1, SEED])
@pytest.mark.parametrize("segments", [(64,), (10, 0, 54)], ids=str)
def test_dropout_mask_is_that_of_the_reference(seed, segments, device):
    """Bit by bit, forward and backward: with equal scores and unit vectors for values, out shows the mask.

    Keys count through the segments.
    """
    B, H, L, dropout_p = 2, 2, 64, 0.3
    units = torch.eye(L, device=device).expand(B, H, L, L)
    values = list(units.split(segments, 2))
    x = Inputs(torch.zeros(B, H, L, L, device=device), [torch.zeros_like(v) for v in values], values, units, None)
    settings = (None, dropout_p, torch.tensor([seed], device=device), 1.0)
    out, _, _, *grads = run(x, *settings)
    bh, tokens = torch.arange(B * H, device=device).view(B, H, 1, 1), torch.arange(L, device=device)
    keep = dropout_keep(settings[2], bh, tokens[:, None], tokens, dropout_p)
    assert torch.equal(out > 0, keep)
    assert torch.equal(torch.cat(grads[len(segments) :], 2) > 0, keep.mT)


@pytest.mark.parametrize("layout", ["qkv", "heads first", "broadcast", "last axis", "slices"])
def test_strides(layout, device):
    """Inputs and output gradients as views; each means what its contiguous copy means."""
    B, H, L, D = shape = (2, 2, 35, 16)
    x = inputs(L, [L, 20], device, B, H, D)
    query, (key, context), (value, context_value), grad_out, grad_lse = x
    if layout == "qkv":
        query, key, value = torch.randn(B, L, 3, H, D, device=device).permute(2, 0, 3, 1, 4)
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
        grad_lse = grad_lse.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "heads first":
        query, key, context_value, grad_out = (
            y.transpose(0, 1).contiguous().transpose(0, 1) for y in (query, key, context_value, grad_out)
        )
    elif layout == "broadcast":
        query, key, value = query[:, :1].expand(shape), key[:1].expand(shape), value[:, :, :1].expand(shape)
        one = torch.ones((), device=device)
        grad_out, grad_lse = one.expand(shape), one.expand(shape[:-1])
    elif layout == "last axis":
        query, value, context, grad_out = (y.mT.contiguous().mT for y in (query, value, context, grad_out))
    else:
        query, key, grad_out = torch.randn(3, B, H, L + 1, D + 3, device=device)[..., 1:, 1:-2]
    check(Inputs(query, [key, context], [value, context_value], grad_out, grad_lse))


def test_outputs_merge_heads_without_a_copy(device):
    for queries, segments in ((20, [5, 9]), (3, [LONG]), (LONG, [3]), (WALK, [200])):
        x = inputs(queries, segments, device, H=2)
        out, lse, *grads = run(x, None, 0.0, None, 0.3)
        for y in (out, *grads):
            assert y.movedim(1, -2).flatten(-2).data_ptr() == y.data_ptr()
        assert lse.is_contiguous() and lse.dtype == torch.float32


@pytest.mark.parametrize(("queries", "segments"), [(20, [0, 37]), (20, [0]), (3, [LONG]), (WALK, [200])], ids=str)
def test_every_element_is_written(queries, segments, device):
    """What torch.empty returns is NaN here, and none of it is left."""
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        assert torch.empty(1, device=device).isnan().all()
        assert torch.empty_like(torch.ones(1, device=device)).isnan().all()
        actual = check(inputs(queries, segments, device, H=2, D=24))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(y.isnan().any() for y in actual)


@pytest.mark.parametrize("axis", range(3), ids=["B", "H", "Lq"])
def test_empty(axis, device):
    """Keys that nobody reads have a gradient of 0."""
    shape = [2, 2, 3]
    shape[axis] = 0
    B, H, queries = shape
    x = inputs(queries, [4, 0], device, B, H)
    out, lse, dq, *grads = run(x, None, 0.0, None, 1.0)
    assert out.shape == dq.shape == x.query.shape and lse.shape == x.query.shape[:-1]
    for grad, y in zip(grads, [*x.keys, *x.values], strict=True):
        assert grad.shape == y.shape and (grad == 0).all()


@pytest.mark.parametrize(
    ("queries", "segments"), [(20, [30, 9]), (3, [LONG]), (LONG // 2, [3]), (WALK, [200, 9])], ids=str
)
def test_twice_the_same_bits(queries, segments, device):
    x = inputs(queries, segments, device, D=24)
    settings = (None, 0.2, torch.tensor([SEED], device=device), 0.3)
    for first, second in zip(run(x, *settings), run(x, *settings), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
@pytest.mark.parametrize("axis", range(3), ids=["B", "H", "L"])
def test_offsets_beyond_int32(axis):
    x = inputs(2, [2], "cpu", B=2, H=2)
    query, key, value, grad_out = far_apart([x.query, *x.keys, *x.values, x.grad_out], axis)
    check(Inputs(query, [key], [value], grad_out, x.grad_lse))
