"""The kernels of edge-sparse attention, called directly: Triton on a GPU or interpreted on the CPU, and C++.

Truth is the reference in float64; the budget is twice the error of the reference in the kernel's own dtype.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.utils import assert_within_budget, far_apart, magnitude
from vattn import BlockLayout, RelativePositionBias3D, reference
from vattn.kernels import configs, edge_sparse_attention
from vattn.position_bias import num_offsets
from vattn.reference.dropout import dropout_keep

pytestmark = pytest.mark.gpu

SEED = 0x123456789ABCDEF
BLOCK_Q, BLOCK_K = configs.INTERPRETER.BLOCK_Q, configs.INTERPRETER.BLOCK_K
WINDOW = (2, 3, 4)
TOKENS = 24


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None
    layout: BlockLayout
    table: Tensor | None
    window: tuple[int, ...]


def layout_of(heads, block_size, num_tokens, num_global, device):
    """The layout of lists of blocks: `heads[h][i]` is what block i reads for head h."""
    blocks = -(-num_tokens // block_size)
    lists = [row for rows in heads for row in rows]
    ends = torch.tensor([0, *(len(row) for row in lists)]).cumsum(0)
    starts = torch.stack([ends[blocks * h : blocks * (h + 1) + 1] for h in range(len(heads))])
    columns = torch.tensor([block for row in lists for block in row], dtype=torch.int32)
    return BlockLayout(num_tokens, block_size, starts, columns, num_global=num_global).to(device)


def inputs(rows, block_size, device, *more, N=TOKENS, G=1, B=1, H=1, D=16, dtype=torch.float32, window=WINDOW):
    """Random tensors for a layout: `rows` of all heads, or those of the first and `more`. No window means no bias."""

    def some(*shape):
        return torch.randn(B, H, G + N, *shape, device=device)

    layout = layout_of([rows, *more], block_size, N, G, device)
    table = torch.randn(num_offsets(window) + 2 * G + G * G, H, device=device) if window else None
    return Inputs(*(some(D).to(dtype) for _ in range(4)), some(), layout, table, window)


def formula(x, dtype, positions, causal, dropout_p, seed, scale):
    """out, lse, importance and gradients by the reference in `dtype`."""
    tensors = [y.detach().to(dtype).requires_grad_() for y in x[:3]]
    bias = None
    if x.table is not None:
        bias = RelativePositionBias3D(x.window, x.query.shape[1], x.layout.num_global).to(x.table)
        bias.table.data = x.table.to(torch.promote_types(dtype, torch.float32))
        tensors.append(bias.table)
    results = reference.edge_sparse_attention(
        *tensors[:3], x.layout, position_bias=bias, positions=positions, causal=causal, dropout_p=dropout_p,
        scale=scale, seed=seed, return_lse=True, return_importance=x.layout.num_global > 0,
    )  # fmt: skip
    out, lse, *_ = results
    outputs, grads = [out], [x.grad_out.to(dtype)]
    if x.grad_lse is not None:
        outputs, grads = [out, lse], [*grads, x.grad_lse.to(lse.dtype)]
    return *results, *torch.autograd.grad(outputs, tensors, grads, materialize_grads=True)


def run(x, positions=None, causal=False, dropout_p=0.0, seed=None, scale=0.3, deterministic=False):
    """out, lse, importance (with a global token) and gradients (of a table, if there is one) by the kernels."""
    layout, transposed = x.layout, x.layout.transpose()
    settings = (
        layout.row_offsets, layout.columns, transposed.row_offsets, transposed.columns, layout.block_size,
        layout.num_global, x.table, x.window, positions, causal, dropout_p, seed, scale,
    )  # fmt: skip
    importance = layout.num_global > 0
    out, lse, *rest = edge_sparse_attention.forward(*x[:3], *settings, importance)
    grads = edge_sparse_attention.backward(x.grad_out, x.grad_lse, *x[:3], out, lse, *settings, deterministic)
    if not importance:
        assert rest.pop().shape == (0,)
    if x.table is None:
        assert grads[-1].shape == (0,)
        grads = grads[:-1]
    return out, lse, *rest, *grads


def check(x, positions=None, causal=False, dropout_p=0.0, seed=None, scale=None, deterministic=False):
    """The kernels are within budget, forward and backward; returns what they computed."""
    scale = x.query.shape[-1] ** -0.5 if scale is None else scale
    settings = (positions, causal, dropout_p, seed, scale)
    actual = run(x, *settings, deterministic)
    truth, plain = formula(x, torch.float64, *settings), formula(x, x.query.dtype, *settings)
    names = ["out", "lse", *["importance"] * (x.layout.num_global > 0), "dq", "dk", "dv", *["dtable"] * bool(x.window)]
    # As for latent attention: what a score and lse are used for again carries their rounding, and that of out.
    rounded = torch.finfo(x.query.dtype).eps / torch.finfo(torch.float32).eps / 4
    largest = max(1.0, magnitude(truth[1]))
    grads = magnitude(*truth[names.index("dq") :]) * max(largest, rounded)
    intermediate = {"importance": largest, "dq": grads, "dk": grads, "dv": grads, "dtable": grads}
    for name, a, t, p in zip(names, actual, truth, plain, strict=True):
        assert_within_budget(a, t, p, name, intermediate.get(name, 0.0))
    return actual


SOME = [[0, 2], [1, 3, 0], [3], [2, 2, 1]]  # of four blocks, the last of which may be short


@pytest.mark.parametrize("head_dim", [1, 16, 33, 64, 72, 80, 96, 120, 128, 144, 256])
def test_head_dims(head_dim, device):
    """Whole, split and masked columns."""
    check(inputs([[0, 0]], 11, device, N=11, D=head_dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_dtypes(dtype, head_dim, device):
    check(inputs([[0, 0]], 11, device, N=11, D=head_dim, dtype=dtype))


@pytest.mark.parametrize(("num_global", "window"), [(0, WINDOW), (1, ()), (3, WINDOW)], ids=["0", "1 plain", "3"])
@pytest.mark.parametrize(
    "rows",
    [SOME, [[3, 1], [], [3, 0, 3], []], [[], [], [], []], [[0, 1, 2, 3]] * 4],
    ids=["some", "empty rows, and a short block first", "nothing", "everything"],
)
def test_layouts(rows, num_global, window, device):
    """Duplicates, empty rows, and a short last block anywhere in a row."""
    check(inputs(rows, 7, device, N=23, G=num_global, window=window))


def test_a_layout_per_head(device):
    check(inputs(SOME, 6, device, [[], [0, 1, 2, 3], [1], [3]], H=2))


@pytest.mark.parametrize("block_size", sorted({1, *(b + i for b in (BLOCK_Q, BLOCK_K) for i in (-1, 0, 1))}))
def test_block_sizes(block_size, device):
    """Blocks of as many tokens as a tile has, and one more or less; of one token; and larger than all."""
    tokens = 6 if block_size == 1 else min(2 * block_size - 3, 35)
    blocks = -(-tokens // block_size)
    rows = [[i, (i + 1) % blocks] for i in range(blocks)]
    check(inputs(rows, block_size, device, N=tokens, G=2, window=(5, 7, 1)))


@pytest.mark.parametrize("num_global", [BLOCK_Q + 3, BLOCK_K + 1])
def test_many_global_tokens(num_global, device):
    """More than a tile has, and more than a block has: the list of a row begins with several blocks of them."""
    check(inputs([[0], [0, 1]], 5, device, N=9, G=num_global))


def test_global_tokens_alone(device):
    check(inputs([], 5, device, N=0, G=3))


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("kind", ["full", "shared", "of samples"])
@pytest.mark.parametrize("window", [WINDOW, ()], ids=["bias", "plain"])
def test_positions(window, kind, causal, device):
    """Tokens anywhere in the grid, two of them in one place."""
    x = inputs([[0, 2], [1, 0], [2, 1]], 6, device, N=17, B=2, window=window)
    positions = torch.stack([torch.randperm(TOKENS, device=device)[:17] for _ in range(2)])
    positions[:, 4] = positions[:, 11]
    check(x, {"full": None, "shared": positions[0], "of samples": positions}[kind], causal)


def test_causal_queries_without_keys(device):
    """The first tokens of all read later blocks only, and there is no global token."""
    out, lse, *_ = check(inputs([[1], [0]], 5, device, N=10, G=0), causal=True)
    assert (out[:, :, :5] == 0).all() and (lse[:, :, :5] == -torch.inf).all()


@pytest.mark.parametrize("window", [(1, 1, TOKENS), (TOKENS, 1, 1), (1, 5, 5)], ids=str)
def test_windows(window, device):
    check(inputs([[0, 1], [1]], 12, device, G=2, window=window), deterministic=True)


def test_positions_out_of_the_window(kernels, device):
    """A GPU would have to wait for an error, so they are clamped."""
    x = inputs([[0, 1], [1]], 12, device)
    wrong, clamped = torch.arange(TOKENS, device=device), torch.arange(TOKENS, device=device)
    wrong[3], wrong[5], clamped[3], clamped[5] = -7, 2**40, 0, TOKENS - 1
    if kernels == "cpp":
        with pytest.raises(ValueError, match=f"positions must be from 0 to below {TOKENS}"):
            run(x, wrong)
        return
    for a, e in zip(run(x, wrong, deterministic=True), run(x, clamped, deterministic=True), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
@pytest.mark.parametrize("window", [WINDOW, ()], ids=["bias", "plain"])
def test_scale(window, scale, device):
    check(inputs([[0, 1], [1]], 7, device, N=13, window=window), scale=scale)


def test_large_scores_do_not_overflow(device):
    x = inputs([[0, 1], [1]], 7, device, N=13)
    check(x._replace(query=x.query * 100, key=x.key * 100, table=x.table * 100))


def test_gradient_of_out_only(device):
    check(inputs([[0, 1], [1]], 7, device, N=13)._replace(grad_lse=None), deterministic=True)


@pytest.mark.parametrize("dropout_p", [0.2, 1.0])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_dropout(deterministic, dropout_p, device):
    x = inputs([[0, 1], [1, 1]], 9, device, N=17, H=2, G=2)
    check(x, dropout_p=dropout_p, seed=torch.tensor([SEED], device=device), deterministic=deterministic)


@pytest.mark.parametrize("seed", [0, -1, SEED])
def test_dropout_mask_is_that_of_the_reference(seed, device):
    """Bit by bit, forward and backward: with equal scores and unit vectors for values, out shows the mask.

    Tokens count from the first global one.
    """
    G, N, block_size, dropout_p = 2, 30, 8, 0.3
    x = inputs([[0, 3], [2], [1, 0], [3]], block_size, device, N=N, G=G, H=2, D=G + N, window=())
    units = torch.eye(G + N, device=device).expand_as(x.query)
    x = x._replace(query=torch.zeros_like(units), value=units, grad_out=units, grad_lse=None)
    seed = torch.tensor([seed], device=device)
    out, _, _, _, _, dv = run(x, None, False, dropout_p, seed)
    bh, tokens = torch.arange(2, device=device).view(1, 2, 1, 1), torch.arange(G + N, device=device)
    keep = dropout_keep(seed, bh, tokens[:, None], tokens, dropout_p) & x.layout.to_mask()
    assert torch.equal(out > 0, keep)
    assert torch.equal(dv > 0, keep.mT)


LONG = 2 * configs.TILES_WORTH_A_SPLIT * BLOCK_K + 5  # two splits


def test_this_length_is_split():
    assert configs.splits(1, -(-LONG // BLOCK_K), torch.empty(0)) == 2


def test_splits_of_global_tokens(device):
    """What global queries read, and who reads global keys, is shared out among programs."""
    x = inputs([[], []], LONG - 20, device, N=LONG - 2, G=2, window=(1, 9, 29))
    check(x, dropout_p=0.2, seed=torch.tensor([SEED], device=device), deterministic=True)


@pytest.mark.parametrize("layout", ["qkv", "heads first", "broadcast", "last axis", "slices"])
def test_strides(layout, device):
    """Inputs and output gradients as views; each means what its contiguous copy means."""
    B, H, L, D = shape = (2, 2, 9, 16)
    x = inputs([[0], [0]], 5, device, N=L - 1, B=B, H=H)
    query, key, value, grad_out, grad_lse, *rest = x
    if layout == "qkv":
        query, key, value = torch.randn(B, L, 3, H, D, device=device).permute(2, 0, 3, 1, 4)
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
        grad_lse = grad_lse.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "heads first":
        query, key, value, grad_out = (
            y.transpose(0, 1).contiguous().transpose(0, 1) for y in (query, key, value, grad_out)
        )
    elif layout == "broadcast":
        query, key, value = query[:, :1].expand(shape), key[:1].expand(shape), value[:, :, :1].expand(shape)
        one = torch.ones((), device=device)
        grad_out, grad_lse = one.expand(shape), one.expand(shape[:-1])
    elif layout == "last axis":
        query, key, value, grad_out = (y.mT.contiguous().mT for y in (query, key, value, grad_out))
    else:
        query, key, grad_out = torch.randn(3, B, H, L + 1, D + 3, device=device)[..., 1:, 1:-2]
    check(Inputs(query, key, value, grad_out, grad_lse, *rest))


def test_strided_table_and_positions(device):
    x = inputs([[0, 1], [1]], 7, device, N=13, B=2, H=2)
    positions = torch.randint(0, TOKENS, (13, 2), device=device).T
    check(x._replace(table=x.table.T.contiguous().T), positions)


def test_outputs_merge_heads_without_a_copy(device):
    x = inputs([[0, 1], [1]], 7, device, N=13, H=2)
    out, lse, importance, *grads, dtable = run(x)
    for y in (out, *grads):
        assert y.movedim(1, -2).flatten(-2).data_ptr() == y.data_ptr()
    for y in (lse, importance, dtable):
        assert y.is_contiguous() and y.dtype == torch.float32


@pytest.mark.parametrize(("num_tokens", "dtype"), [(13, torch.float32), (LONG, torch.bfloat16)], ids=str)
def test_every_element_is_written(num_tokens, dtype, device):
    """What torch.empty returns is NaN here, and none of it is left: one program for global tokens, and splits."""
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        assert torch.empty(1, device=device).isnan().all()
        window = (1, 1, num_tokens)
        actual = check(inputs([[], []], num_tokens // 2 + 1, device, N=num_tokens, D=24, dtype=dtype, window=window))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(y.isnan().any() for y in actual)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}, {"N": 0, "G": 0}], ids=["B", "H", "L"])
def test_empty(sizes, device):
    x = inputs([] if "N" in sizes else [[0]], 5, device, **{"N": 4, **sizes})
    out, lse, *_, dtable = run(x)
    assert out.shape == x.query.shape and lse.shape == x.query.shape[:-1]
    assert dtable.shape == x.table.shape and (dtable == 0).all()


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_twice_the_same_bits(causal, device):
    """The table's gradient too where it was asked for."""
    x = inputs([[1, 0], [1]], 7, device, N=13, B=2, D=24)
    settings = (None, causal, 0.2, torch.tensor([SEED], device=device), 0.3, True)
    for first, second in zip(run(x, *settings), run(x, *settings), strict=True):
        assert torch.equal(first, second)


def test_deterministic_table_gradient_with_large_gradients(device):
    """The unit follows the inputs: nothing overflows, and nothing is lost."""
    x = inputs([[0, 1], [1]], 7, device, N=13)
    for factor in (1e-20, 1e15):
        check(x._replace(grad_out=x.grad_out * factor, grad_lse=x.grad_lse * factor), deterministic=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_deterministic_table_gradient_is_nan_where_a_gradient_is(device):
    """And nothing is written beside the table."""
    x = inputs([[0, 1], [1]], 7, device, N=13)
    x.grad_out[0, 0, 3, 2] = torch.inf
    assert run(x, deterministic=True)[-1].isnan().any()


def test_importance_is_a_distribution(device):
    """Before dropout; what is missing goes to the global tokens."""
    x = inputs([[1, 0], [1]], 7, device, N=13, G=2, B=2)
    importance = run(x, None, False, 0.5, torch.tensor([SEED], device=device))[2]
    torch.testing.assert_close(importance, run(x)[2])
    assert (importance > 0).all() and (importance.sum(1) < 1).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that is mapped and not there")
@pytest.mark.parametrize("axis", range(3), ids=["B", "H", "L"])
def test_offsets_beyond_int32(axis):
    x = inputs([[0]], 2, "cpu", N=1, G=1, B=2, H=2)
    check(x._replace(**dict(zip(("query", "key", "value", "grad_out"), far_apart(list(x[:4]), axis), strict=True))))
