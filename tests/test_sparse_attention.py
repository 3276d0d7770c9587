"""Edge- and node-sparse attention through their public functions: who reads whom, biases, dropout, messages."""

import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vattn
from tests.layouts import bias_without_table, layout_of
from vattn import BlockLayout, RelativePositionBias3D, _library
from vattn.nn import SparseSelfAttention

needs_kernels = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
WIDE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [leaf(*shape, dtype=dtype) for _ in range(3)]


def random_bias(window: tuple[int, int, int], num_heads: int, num_global: int = 1) -> RelativePositionBias3D:
    bias = RelativePositionBias3D(window, num_heads, num_global)
    torch.nn.init.normal_(bias.table)
    return bias


# Two heads' rows: an empty one, blocks listed twice, each block of 3 but the last, which has 1.
ROWS = [[0, 2, 2], [], [1, 0], [1], [2], [0, 1, 2]]
PER_HEAD = layout_of(ROWS, num_tokens=7, block_size=3, num_global=2, sets=2)
SHARED = layout_of(ROWS[:3], num_tokens=7, block_size=3, num_global=2)
NO_GLOBAL = layout_of(ROWS[:3], num_tokens=7, block_size=3)
ORDER = torch.tensor([4, 0, 6, -1, -1, -1, 5, 3, -1, 1, 2, -1])  # the second block has no token
PER_SAMPLE = layout_of([*ROWS, *ROWS[::-1]], num_tokens=7, block_size=3, num_global=2, sets=2, samples=2)
ORDERED = layout_of([[0, 3, 3], [0], [2, 1, 0], []] * 2, 7, 3, num_global=2, samples=2, order=ORDER)
POSITIONS = torch.tensor([[0, 3, 4, 5, 9, 10, 11], [11, 2, 1, 0, 7, 6, 2]])
WINDOW = (3, 2, 2)


def keys_of(
    layout: BlockLayout, sample: int, head: int, query: int, positions: list[int] | None = None
) -> list[int]:  # fmt: skip
    """The keys that `query` reads, a block at a time; those whose position is not greater, if there are `positions`."""
    G, size = layout.num_global, layout.block_size
    if query < G:
        return list(range(G + layout.num_tokens))
    slots = list(range(layout.num_tokens)) if layout.order is None else layout.order.tolist()
    of_samples = layout.row_offsets.view(layout.num_samples, layout.num_heads, -1)
    offsets = of_samples[sample % layout.num_samples, head % layout.num_heads].tolist()
    row = slots.index(query - G) // size
    keys: list[int] = []
    for block in layout.columns[offsets[row] : offsets[row + 1]].tolist():
        keys += [G + token for token in slots[block * size : (block + 1) * size] if token >= 0]
    return [*range(G), *(key for key in keys if positions is None or positions[key - G] <= positions[query - G])]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("positions", [None, POSITIONS[0], POSITIONS], ids=["raster", "(N,)", "(B, N)"])
@pytest.mark.parametrize(
    "layout",
    [SHARED, PER_HEAD, NO_GLOBAL, PER_SAMPLE, ORDERED],
    ids=["shared", "per head", "no global", "per sample", "ordered"],
)
def test_the_definition_reads_what_it_should(layout, positions, causal):
    """The reference, against gathering the keys of each query."""
    G, total = layout.num_global, layout.num_global + layout.num_tokens
    query, key, value = qkv(2, 2, total, 4, dtype=WIDE)
    bias = random_bias(WINDOW, 2, G).double()
    out, lse, *importance = vattn.edge_sparse_attention(
        query, key, value, layout, position_bias=bias, positions=positions, causal=causal, return_lse=True,
        return_importance=G > 0,
    )  # fmt: skip
    at = torch.arange(7) if positions is None else positions
    dense = bias(at.expand(2, 7))
    for b in range(2):
        for h in range(2):
            for i in range(total):
                keys = keys_of(layout, b, h, i, at.expand(2, 7)[b].tolist() if causal else None)
                if not keys:
                    assert (out[b, h, i] == 0).all() and lse[b, h, i] == -torch.inf
                    continue
                scores = key[b, h, keys] @ query[b, h, i] / 2 + dense[b, h, i, keys]
                torch.testing.assert_close(out[b, h, i], scores.softmax(0) @ value[b, h, keys])
                torch.testing.assert_close(lse[b, h, i], scores.logsumexp(0))
    if G > 0:
        scores = torch.einsum("bhd,bhkd->bhk", query[:, :, 0], key) / 2 + dense[:, :, 0]
        torch.testing.assert_close(importance[0], scores.softmax(-1).mean(1)[:, G:].detach())


def test_a_dense_layout_is_dense_attention():
    query, key, value = qkv(2, 3, 1 + 20, 8)
    out = vattn.edge_sparse_attention(query, key, value, BlockLayout.dense(20, 6, num_global=1))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value))


def test_copies_of_a_key_are_dropped_together():
    """With values that tell keys apart, a dropped block is missing twice."""
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    value = torch.eye(2, 4)[None, None]
    layout = layout_of([[0, 0, 1], []], num_tokens=2, block_size=1)
    seen = set()
    for _ in range(40):
        out = vattn.edge_sparse_attention(query, key, value, layout, dropout_p=0.5)
        seen.add(tuple(round(float(x) * 3) for x in out[0, 0, 0, :2]))
        kept = vattn.node_sparse_attention(query[:, :, :1], key, value, torch.tensor([[0, 1, 0]]), dropout_p=0.5)
        seen.add(tuple(round(float(x) * 3) for x in kept[0, 0, 0, :2]))
    assert seen == {(0, 0), (4, 0), (0, 2), (4, 2)}  # doubled, as half of them are kept


def test_importance_is_the_same_with_dropout_and_has_no_gradient():
    query, key, value = qkv(2, 2, 9, 4)
    _, plain = vattn.edge_sparse_attention(query, key, value, SHARED, return_importance=True)
    _, dropped = vattn.edge_sparse_attention(query, key, value, SHARED, return_importance=True, dropout_p=0.9)
    assert torch.equal(plain, dropped)
    assert plain.dtype == torch.float32 and not plain.requires_grad


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("layout", [PER_HEAD, NO_GLOBAL, ORDERED], ids=["per head", "no global", "ordered"])
def test_gradcheck(layout, dropout_p, causal):
    B, G = layout.num_samples, layout.num_global
    bias = bias_without_table((2, 2, 3), num_heads=2, num_global=G)

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Any:
        torch.manual_seed(1)
        bias.table = table
        out, lse = vattn.edge_sparse_attention(
            query, key, value, layout, position_bias=bias, positions=POSITIONS[:B], causal=causal,
            dropout_p=dropout_p, return_lse=True,
        )  # fmt: skip
        return out, lse[lse.isfinite()]  # finite differences of -inf are NaN

    rows = 3 * 3 * 5 + 2 * G + G * G
    tensors = [*qkv(B, 2, G + 7, 2, dtype=WIDE), leaf(rows, 2, dtype=WIDE)]
    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)


@needs_kernels
@pytest.mark.parametrize("everything", [False, True], ids=["nothing", "everything"])
def test_opcheck_of_edges(everything):
    query, key, value = qkv(2, 2, 9, 6)
    given = ORDERED if everything else PER_HEAD
    layout = [given.row_offsets, given.columns, None, None, given.order, given.block_size, given.num_global]
    table = leaf(3 * 3 * 5 + 8, 2) if everything else None
    options = (
        [[2, 2, 3], POSITIONS, True, 0.2, torch.tensor([7]), 0.5] if everything else [[], None, False, 0.0, None, 1.0]
    )
    args = (query, key, value, *layout, table, *options, everything)
    torch.library.opcheck(torch.ops.vattn.edge_sparse_attention.default, args)
    query, key, value, *args = [x.detach() if isinstance(x, Tensor) else x for x in args[:-1]]
    out, lse, _ = torch.ops.vattn.edge_sparse_attention(query, key, value, *args, False)
    for grad_lse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.vattn.edge_sparse_attention_backward.default,
            (torch.randn_like(out), grad_lse, query, key, value, out, lse, *args, everything),
        )
    table_tangent = None if table is None else torch.randn_like(table.detach())
    tangents = [torch.randn_like(x) for x in (query, key, value)]
    torch.library.opcheck(
        torch.ops.vattn.edge_sparse_attention_jvp.default,
        (*tangents, table_tangent, query, key, value, out, lse, *args, everything),
    )


@needs_kernels
def test_opcheck_of_nodes():
    query, (key, value) = leaf(2, 2, 3, 6), qkv(2, 2, 5, 6)[:2]
    kept, lengths = torch.tensor([[0, 4, 4], [3, 1, -2]]), torch.tensor([3, 2])
    for kept_lengths, dropout_p, seed in ((lengths, 0.0, None), (lengths.int(), 0.2, torch.arange(1 + 4 + 3 + 5))):
        options = (kept, kept_lengths, dropout_p, seed, 0.5)
        torch.library.opcheck(torch.ops.vattn.node_sparse_attention.default, (query, key, value, *options))
        plain = [x.detach() for x in (query, key, value)]
        out, lse = torch.ops.vattn.node_sparse_attention(*plain, *options)
        for grad_lse in (None, torch.randn_like(lse)):
            args = (torch.randn_like(out), grad_lse, *plain, out, lse, *options)
            torch.library.opcheck(torch.ops.vattn.node_sparse_attention_backward.default, args)
        tangents = [torch.randn_like(x) for x in plain]
        torch.library.opcheck(
            torch.ops.vattn.node_sparse_attention_jvp.default, (*tangents, *plain, out, lse, *options)
        )


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, WIDE], ids=str)
def test_an_order_is_a_permutation_of_everything(dtype, dropout_p):
    """Tokens that are moved into the order give the same, but for the mask of dropout, which numbers them."""
    order = torch.randperm(60)
    inverse = torch.cat([torch.tensor([0]), 1 + order.argsort()])
    plain = BlockLayout.local_random(60, 12)
    layout = BlockLayout(60, 12, plain.row_offsets, plain.columns, num_global=1, order=order)
    inputs = qkv(2, 2, 61, 16, dtype=dtype)
    moved = [x[:, :, torch.cat([torch.tensor([0]), 1 + order])] for x in inputs]
    calls = []
    for tensors, of in ((inputs, layout), (moved, plain)):
        torch.manual_seed(3)
        out, lse, importance = vattn.edge_sparse_attention(
            *tensors, of, dropout_p=dropout_p, return_lse=True, return_importance=True
        )
        calls.append([out, lse, importance, *torch.autograd.grad(out.float().square().sum(), inputs)])
    (out, lse, importance, *grads), (moved_out, moved_lse, moved_importance, *moved_grads) = calls
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, WIDE: 1e-12}[dtype]
    torch.testing.assert_close(lse, moved_lse[:, :, inverse], rtol=0, atol=close)
    torch.testing.assert_close(importance, moved_importance[:, order.argsort()], rtol=0, atol=close)
    if dropout_p == 0:
        torch.testing.assert_close(out, moved_out[:, :, inverse], rtol=0, atol=close)
        for a, b in zip(grads, moved_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4 * close)


def test_blocks_of_an_order_move_no_bits_of_dropout():
    """Whichever way the tokens of the same blocks are ordered, the same weights are dropped."""
    inputs, slots = qkv(1, 2, 12, 8), torch.arange(12).view(3, 4)
    results = []
    for order in (None, slots.flip(1), slots[:, [2, 0, 3, 1]]):
        torch.manual_seed(3)
        layout = layout_of([[0, 2], [1], [2, 0]], 12, 4, order=None if order is None else order.flatten())
        results.append(vattn.edge_sparse_attention(*inputs, layout, dropout_p=0.4))
    for out in results[1:]:
        torch.testing.assert_close(out, results[0])


def test_padding_of_zeros_of_layouts_per_sample():
    """Each sample has the padding of its own rows; of an order no block is the last."""
    attention = SparseSelfAttention(8, 2, num_global=2, pad_keys="zero", window=(1, 1, 7))
    x = torch.randn(2, 9, 8)
    alone = [layout_of(rows, 7, 3, num_global=2, sets=2) for rows in (ROWS, ROWS[::-1])]
    expected = torch.cat([attention(x[i : i + 1], alone[i]) for i in range(2)])
    torch.testing.assert_close(attention(x, PER_SAMPLE), expected)
    message = r"^SparseSelfAttention: layout must have no order with pad_keys='zero', got layout=BlockLayout"
    with pytest.raises(ValueError, match=message):
        attention(x[:, :1], ORDERED)  # which attention would refuse for its length


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Queries, keys and values are cast, the table is not; float64 is not either."""
    query, key, value = leaf(2, 2, 9, 8), leaf(2, 2, 9, 8, dtype=dtype), leaf(2, 2, 9, 8)
    bias = random_bias((2, 2, 2), 2, num_global=2)
    kept = torch.tensor([[0, 4], [8, 1]])

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        out, lse, importance = vattn.edge_sparse_attention(
            q, k, v, SHARED, position_bias=bias, return_lse=True, return_importance=True
        )
        nodes, nodes_lse = vattn.node_sparse_attention(q, k, v, kept, return_lse=True)
        return out, nodes, lse, nodes_lse, importance

    with torch.autocast("cpu", dtype):
        results = run(query, key, value)
        assert vattn.edge_sparse_attention(*[query.double()] * 3, SHARED).dtype == WIDE
    assert [x.dtype for x in results] == [dtype] * 2 + [torch.float32] * 3
    for x, y in zip(results, run(*(x.to(dtype) for x in (query, key, value))), strict=True):
        assert torch.equal(x, y)
    leaves = [query, key, value, bias.table]
    grads = torch.autograd.grad(results[0].float().sum(), leaves)
    assert [g.dtype for g in grads] == [x.dtype for x in leaves]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_of_table(dtype):
    """The table has a dtype of its own, and its gradient has that."""
    query, key, value = qkv(1, 2, 9, 8, dtype=torch.bfloat16)
    bias = random_bias((2, 2, 2), 2, num_global=2).to(dtype)
    out = vattn.edge_sparse_attention(query, key, value, SHARED, position_bias=bias)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.table.grad is not None and bias.table.grad.dtype == dtype and bias.table.grad.isfinite().all()


@needs_kernels
def test_the_gradient_of_the_table_repeats_its_bits():
    query, key, value = qkv(2, 2, 1 + 400, 16)
    bias = random_bias((4, 10, 10), 2)
    layout = BlockLayout.local_random(400, 56)
    grads = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            out = vattn.edge_sparse_attention(query, key, value, layout, position_bias=bias)
            grads.append(torch.autograd.grad(out.square().sum(), bias.table)[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@needs_kernels
def test_layouts_of_samples_and_orders_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = torch.compile(vattn.edge_sparse_attention, fullgraph=True, backend=counter)
    inputs = qkv(2, 2, 21, 8)
    for _ in range(3):
        rows = torch.rand(2, 2, 5, 5) > 0.5
        ends = torch.nn.functional.pad(rows.sum(-1).flatten().cumsum(0), (1, 0))
        offsets = torch.stack([ends[i : i + 6] for i in range(0, 20, 5)]).view(2, 2, 6)
        layout = BlockLayout(
            20, 4, offsets, rows.nonzero()[:, -1], num_global=1, order=torch.randperm(20), check_values=False
        )
        out = attend(*inputs, layout)
        torch.testing.assert_close(out, vattn.edge_sparse_attention(*inputs, layout))
        expected = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=layout.to_mask())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@needs_kernels
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_random_layouts_and_lengths_compile_at_most_twice(backward):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    bias = random_bias((8, 10, 10), 2)

    @torch.compile(fullgraph=True, backend=counter)
    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layout = BlockLayout.local_random(query.shape[2] - 1, 16)
        out, importance = vattn.edge_sparse_attention(
            query, key, value, layout, position_bias=bias, dropout_p=0.1, return_importance=True
        )
        _, kept = vattn.select_tokens(out[:, 0], importance, 0.5)
        out = vattn.node_sparse_attention(out, key, value, kept)
        assert isinstance(out, Tensor)
        return out.movedim(1, -2).flatten(-2)

    for frames in (1, 2, 5, 8, 3):
        query, key, value = qkv(2, 2, 1 + 100 * frames, 8)
        out = layer(query, key, value)
        assert out.shape == (2, 1 + 100 * frames, 16)
        if backward:
            out.sum().backward()
            assert value.grad is not None and value.grad.isfinite().all()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("num_global", [0, 2])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_tokens_and_no_edges(num_tokens, num_global):
    blocks = -(-num_tokens // 3)
    layout = BlockLayout(num_tokens, 3, torch.zeros(blocks + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32),
                         num_global=num_global)  # fmt: skip
    for dtype in (torch.float32, WIDE):
        query, key, value = qkv(2, 3, num_global + num_tokens, 4, dtype=dtype)
        out, lse = vattn.edge_sparse_attention(query, key, value, layout, causal=True, return_lse=True)
        assert out.shape == query.shape and lse.shape == query.shape[:-1]
        if num_global == 0:
            assert (out == 0).all() and (lse == -torch.inf).all()
        out.sum().backward()
        assert query.grad is not None and query.grad.isfinite().all()


def test_no_kept_keys():
    query, key = leaf(2, 3, 4, 8), leaf(2, 3, 5, 8)
    out, lse = vattn.node_sparse_attention(query, key, key, torch.zeros(2, 0, dtype=torch.int64), return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out.sum().backward()
    assert key.grad is not None and (key.grad == 0).all()


def test_kept_keys_are_a_gather():
    query, key, value = leaf(2, 3, 4, 8), leaf(2, 3, 6, 8), leaf(2, 3, 6, 8)
    kept = torch.tensor([[5, 0, 3], [1, 1, 2]])
    gathered = kept[:, None, :, None].expand(2, 3, 3, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.gather(2, gathered), value.gather(2, gathered)
    )
    actual = vattn.node_sparse_attention(query, key, value, kept)
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual, expected)
    leaves = [query, key, value]
    for x, y in zip(
        torch.autograd.grad(actual.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(x, y)


def test_any_device_with_a_fake_kernel():
    query = torch.empty(2, 3, 9, 8, device="meta")
    results = vattn.edge_sparse_attention(
        query, query, query, SHARED.to("meta"), return_lse=True, return_importance=True
    )
    assert [tuple(x.shape) for x in results] == [(2, 3, 9, 8), (2, 3, 9), (2, 7)]
    assert results[0].movedim(1, -2).is_contiguous()
    nodes = vattn.node_sparse_attention(query, query, query, torch.empty(2, 4, dtype=torch.int64, device="meta"))
    assert isinstance(nodes, Tensor) and nodes.shape == query.shape


@pytest.mark.parametrize("dtype", [torch.float32, WIDE], ids=["kernel", "reference"])
@pytest.mark.parametrize("at", [-1, 8])
def test_what_is_out_of_range_is_an_error(at, dtype):
    query, key, value = qkv(1, 2, 9, 8, dtype=dtype)
    positions = torch.tensor([0, 1, 2, at, 4, 5, 6])
    with pytest.raises(ValueError, match="edge_sparse_attention: positions must be"):
        vattn.edge_sparse_attention(
            query, key, value, SHARED, position_bias=random_bias((2, 2, 2), 2, 2), positions=positions
        )
    for lengths in (None, torch.tensor([4])):
        with pytest.raises(ValueError, match="node_sparse_attention: kept must be"):
            vattn.node_sparse_attention(query, key[:, :, :8], value[:, :, :8], positions[None], kept_lengths=lengths)


Q = torch.zeros(1, 2, 9, 8)
BIAS = RelativePositionBias3D((2, 2, 2), 2, num_global=2)
AT = torch.arange(7)
DTYPES = "float32, bfloat16, float16 or float64"


@pytest.mark.parametrize(
    ("change", "error", "must", "got"),
    [
        ({"query": [1]}, TypeError, "query must be a torch.Tensor", "query=list"),
        ({"key": Q.int()}, TypeError, f"key must be {DTYPES}", "key.dtype=torch.int32"),
        ({"query": Q[0]}, ValueError, "query must have shape (B, H, G+N, D)", "query.shape=(2, 9, 8)"),
        (
            {"value": Q.half()},
            TypeError,
            "value must have the dtype of query (torch.float32)",
            "value.dtype=torch.float16",
        ),
        (
            {"value": Q[:, :, :8]},
            ValueError,
            "value must have the shape of query (1, 2, 9, 8)",
            "value.shape=(1, 2, 8, 8)",
        ),
        ({"query": Q[..., :0], "key": Q[..., :0], "value": Q[..., :0]}, ValueError,
         "head_dim must be between 1 and 256", "head_dim=0"),
        ({"layout": SHARED.to_mask()}, TypeError, "layout must be a BlockLayout", "layout=Tensor"),
        (
            {"layout": NO_GLOBAL},
            ValueError,
            "query must have as many tokens as layout (0 + 7)",
            "query.shape=(1, 2, 9, 8)",
        ),
        (
            {"layout": layout_of(ROWS[:3] * 3, 7, 3, 2, sets=3)},
            ValueError,
            "layout must be for all heads or for each of the 2 of query",
            "layout.num_heads=3",
        ),
        (
            {"layout": PER_SAMPLE},
            ValueError,
            "layout must be for all samples or for each of the 1 of query",
            "layout.num_samples=2",
        ),
        (
            {"layout": SHARED.to("meta")},
            ValueError,
            "layout must be on the device of query (cpu)",
            "layout.device=meta",
        ),
        (
            {"position_bias": BIAS.table},
            TypeError,
            "position_bias must be a RelativePositionBias3D",
            "position_bias=Parameter",
        ),
        (
            {"position_bias": RelativePositionBias3D((2, 2, 2), 3, 2)},
            ValueError,
            "position_bias.num_heads must be 2",
            "position_bias.num_heads=3",
        ),
        (
            {"position_bias": RelativePositionBias3D((2, 2, 2), 2)},
            ValueError,
            "position_bias.num_global must be 2",
            "position_bias.num_global=1",
        ),
        (
            {"position_bias": RelativePositionBias3D((2, 2, 2), 2, 2).to("meta")},
            ValueError,
            "position_bias.table.device must be cpu",
            "position_bias.table.device=meta",
        ),
        (
            {"position_bias": RelativePositionBias3D((1, 2, 3), 2, 2)},
            ValueError,
            "tokens without positions must be at most as many as position_bias.window has",
            "7 tokens, position_bias.window=(1, 2, 3)",
        ),
        ({"positions": [1]}, TypeError, "positions must be an int64 tensor", "positions=[1]"),
        ({"positions": AT.int()}, TypeError, "positions must be an int64 tensor", "positions.dtype=torch.int32"),
        (
            {"positions": torch.arange(9)},
            ValueError,
            "positions must have shape (7,) or (1, 7)",
            "positions.shape=(9,)",
        ),
        (
            {"positions": AT.to("meta")},
            ValueError,
            "positions must be on the device of the tokens (cpu)",
            "positions.device=meta",
        ),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1", "dropout_p=1.5"),
        ({"scale": "1"}, TypeError, "scale must be a float or None", "scale='1'"),
        (
            {"query": Q[:, :, 2:], "key": Q[:, :, 2:], "value": Q[:, :, 2:], "layout": NO_GLOBAL,
             "return_importance": True},
            ValueError,
            "return_importance needs a global token",
            "layout.num_global=0",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and "=" in x else "",
)  # fmt: skip
def test_errors_of_edges(change, error, must, got):
    with pytest.raises(error, match=f"^edge_sparse_attention: {re.escape(f'{must}, got {got}')}$"):
        vattn.edge_sparse_attention(**{"query": Q, "key": Q, "value": Q, "layout": SHARED, **change})


KEPT = torch.tensor([[0, 3]])


@pytest.mark.parametrize(
    ("change", "error", "must", "got"),
    [
        ({"query": None}, TypeError, "query must be a torch.Tensor", "query=NoneType"),
        ({"key": Q[0]}, ValueError, "key must have shape (B, H, Lk, D)", "key.shape=(2, 9, 8)"),
        ({"key": Q.to("meta")}, ValueError, "key must be on the device of query (cpu)", "key.device=meta"),
        (
            {"key": Q[..., :7]},
            ValueError,
            "key must have the batch, heads and head_dim of query (1, 2, 9, 8)",
            "key.shape=(1, 2, 9, 7)",
        ),
        (
            {"value": Q[:, :, :8]},
            ValueError,
            "value must have the shape of key (1, 2, 9, 8)",
            "value.shape=(1, 2, 8, 8)",
        ),
        ({"kept": [0]}, TypeError, "kept must be an int64 tensor", "kept=[0]"),
        ({"kept": KEPT.int()}, TypeError, "kept must be an int64 tensor", "kept.dtype=torch.int32"),
        ({"kept": KEPT[0]}, ValueError, "kept must have shape (1, K)", "kept.shape=(2,)"),
        ({"kept": KEPT.repeat(2, 1)}, ValueError, "kept must have shape (1, K)", "kept.shape=(2, 2)"),
        ({"kept": KEPT.to("meta")}, ValueError, "kept must be on the device of query (cpu)", "kept.device=meta"),
        ({"kept_lengths": [2]}, TypeError, "kept_lengths must be an int32 or int64 tensor", "kept_lengths=[2]"),
        ({"kept_lengths": KEPT}, ValueError, "kept_lengths must have shape (1,)", "kept_lengths.shape=(1, 2)"),
        (
            {"kept_lengths": KEPT[:, 0].to("meta")},
            ValueError,
            "kept_lengths must be on the device of query (cpu)",
            "kept_lengths.device=meta",
        ),
        ({"dropout_p": -0.5}, ValueError, "dropout_p must be between 0 and 1", "dropout_p=-0.5"),
        ({"scale": float("nan")}, ValueError, "scale must be finite", "scale=nan"),
    ],
    ids=lambda x: x if isinstance(x, str) and "=" in x else "",
)
def test_errors_of_nodes(change, error, must, got):
    with pytest.raises(error, match=f"^node_sparse_attention: {re.escape(f'{must}, got {got}')}$"):
        vattn.node_sparse_attention(**{"query": Q, "key": Q, "value": Q, "kept": KEPT, **change})


def test_a_layout_that_is_made_in_inference_mode_serves_in_training():
    with torch.inference_mode():
        layout = BlockLayout.sliding_tile((4, 4), (2, 2), (1, 1))
    q, k, v = (torch.randn(1, 1, 16, 8, requires_grad=True) for _ in range(3))
    vattn.edge_sparse_attention(q, k, v, layout).sum().backward()
    assert q.grad.isfinite().all()
