"""Calls on parts of a batch, of heads and of tokens: with the numbers of these behind the seed, they draw one mask."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.layouts import bias_without_table, layout_of
from vattn.ops.axial_attention import attend as axial
from vattn.ops.edge_sparse_attention import attend as edges
from vattn.ops.latent_attention import attend as latent
from vattn.ops.leap_attention import attend as leaps
from vattn.ops.node_sparse_attention import attend as nodes
from vattn.reference.leap_attention import leap_groups

SEED, P, SCALE = torch.tensor([2**40 + 7]), 0.4, 0.3
B, H, D = 2, 3, 5
Results = tuple[Tensor, ...]
few = settings(max_examples=25)
both_ways = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "reference"])


def numbers(heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The seed, and what its parts have in the whole; tokens of a grid in its shape."""
    return torch.cat([SEED, heads.flatten(), queries.flatten(), keys.flatten()])


def assert_same(part: Callable[..., Results], whole: Callable[..., Results], tensors: list[Tensor]) -> None:
    """Both give the same results, gradients and tangents."""
    tolerance = 1e-11 if tensors[0].dtype == torch.float64 else 2e-5
    along, found = tuple(map(torch.randn_like, tensors)), []
    for function in (part, whole):
        torch.manual_seed(1)
        leaves = [x.requires_grad_() for x in tensors]
        results = function(*leaves)
        random = [torch.randn(x.shape, dtype=x.dtype) for x in results]
        grads = torch.autograd.grad(results, leaves, random, materialize_grads=True)
        tangents = torch.func.jvp(function, tuple(x.detach() for x in tensors), along)[1]
        found.append([*results, *grads, *tangents])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def rows(*tokens: int, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    return [torch.randn(B, H, *tokens, D, dtype=dtype) for _ in range(count)]


def some(draw: Any, count: int, label: str) -> Tensor:
    """Any of `count` things, in any order."""
    chosen = draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1), label=label)
    return torch.tensor(chosen)


HEADS = torch.arange(B * H).view(B, H)


@both_ways
@few
@given(data=st.data())
def test_of_latent_attention(dtype, data):
    """Any heads and queries; keys in parts, each in one or two tensors, which are merged."""
    Lq, Lk = 7, 20
    torch.manual_seed(0)
    query, (key, value) = rows(Lq, dtype=dtype)[0], rows(Lk, dtype=dtype)[:2]
    heads, queries = some(data.draw, H, "heads"), some(data.draw, Lq, "queries")
    ends = [0, *sorted(data.draw(st.lists(st.integers(0, Lk), max_size=3), label="ends")), Lk]

    def part(q: Tensor, k: Tensor, v: Tensor) -> Results:
        q, k, v = (x[:, heads] for x in (q[:, :, queries], k, v))
        results = []
        for begin, end in itertools.pairwise(ends):
            middle = (begin + end) // 2
            keys, values = ([x[:, :, begin:middle], x[:, :, middle:end]] for x in (k, v))
            seed = numbers(HEADS[:, heads], queries, torch.arange(begin, end))
            results.append(latent(q, keys, values, None, P, seed, SCALE))
        return vattn.merge_attention(*map(list, zip(*results, strict=True)))

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Results:
        results = latent(q, [k], [v], None, P, SEED, SCALE)
        return tuple(x[:, heads][:, :, queries] for x in results)

    assert_same(part, whole, [query, key, value])


@both_ways
@few
@given(data=st.data())
def test_of_leap_attention(dtype, data):
    """Any leap group alone, whose frames are neighbours then."""
    T, N = 5, 3
    leap, group_size = (data.draw(st.integers(1, T), label=name) for name in ("leap", "group_size"))
    frames = torch.tensor(data.draw(st.sampled_from(leap_groups(T, leap, group_size)), label="group"))
    torch.manual_seed(0)

    def part(q: Tensor, k: Tensor, v: Tensor) -> Results:
        tokens = torch.arange(T * N).view(T, N)[frames]
        q, k, v = (x[:, :, frames] for x in (q, k, v))
        return leaps(q, k, v, 1, len(frames), 0, P, numbers(HEADS, tokens, tokens), SCALE)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Results:
        results = leaps(q, k, v, leap, group_size, 0, P, SEED, SCALE)
        return tuple(x[:, :, frames] for x in results)

    assert_same(part, whole, rows(T, N, dtype=dtype))


@both_ways
@few
@given(data=st.data())
def test_of_axial_attention(dtype, data):
    """Any samples and lines; those of one axis lie in any order."""
    grid, dim = (3, 4, 2), data.draw(st.integers(0, 2), label="dim")
    at = [some(data.draw, size, "places") if axis != dim else torch.randperm(size) for axis, size in enumerate(grid)]
    samples = some(data.draw, B, "samples")
    torch.manual_seed(0)

    def pick(x: Tensor) -> Tensor:
        return x[samples][:, :, at[0][:, None, None], at[1][:, None], at[2]]

    def part(q: Tensor, k: Tensor, v: Tensor) -> Results:
        tokens = torch.arange(24).view(grid)[at[0][:, None, None], at[1][:, None], at[2]]
        seed = numbers(HEADS[samples], tokens, tokens)
        return axial(pick(q), pick(k), pick(v), dim, P, seed, SCALE)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Results:
        return tuple(map(pick, axial(q, k, v, dim, P, SEED, SCALE)))

    assert_same(part, whole, rows(*grid, dtype=dtype))


@both_ways
@few
@given(data=st.data())
def test_of_edge_sparse_attention(dtype, data):
    """Blocks that no other block reads, with the global tokens as keys; the bias is a table without its module."""
    size, G, heads = 2, 1, some(data.draw, H, "heads")
    lists = [data.draw(st.lists(st.sampled_from([0, 2, 4]), max_size=4), label="reads") for _ in range(3)]
    layout = layout_of([lists[0], [1, 3], lists[1], [], lists[2]], 5 * size, size, G)
    of_part = layout_of([[i // 2 for i in row] for row in lists], 3 * size, size, G)
    places = torch.tensor([0, 1, 4, 5, 8, 9])  # of the tokens of those blocks
    tokens = torch.cat([torch.arange(G), G + places])
    window, causal = (1, 2, 5), data.draw(st.booleans(), label="causal")
    torch.manual_seed(0)
    table = torch.randn(bias_rows(window, G), H, dtype=dtype)

    def part(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Results:
        q, k, v = (x[:, heads][:, :, tokens] for x in (q, k, v))
        bias, seed = (table[:, heads], window), numbers(HEADS[:, heads], tokens, tokens)
        found = edges(q, k, v, of_part, bias, places, causal, P, seed, SCALE, False)
        return tuple(x[:, :, G:] for x in found[:2])  # global tokens read all blocks

    def whole(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Results:
        bias = table, window
        found = edges(q, k, v, layout, bias, None, causal, P, SEED, SCALE, False)
        return tuple(x[:, heads][:, :, tokens][:, :, G:] for x in found[:2])

    assert_same(lambda *x: finite(part(*x)), lambda *x: finite(whole(*x)), [*rows(G + 5 * size, dtype=dtype), table])


def bias_rows(window: tuple[int, int, int], num_global: int) -> int:
    return vattn.RelativePositionBias3D(window, 1, num_global).table.shape[0]


def finite(results: Results) -> Results:
    """Without the lse of -inf of queries that read nothing, of which gradients make no sense."""
    return tuple(torch.where(x == -torch.inf, 0.0, x) for x in results)


@both_ways
@few
@given(data=st.data())
def test_of_node_sparse_attention(dtype, data):
    """Any queries; keys in parts, of which each reads those of the kept ones that it has, which are merged."""
    Lq, Lk, K = 6, 12, 9
    queries = some(data.draw, Lq, "queries")
    ends = [0, *sorted(data.draw(st.lists(st.integers(0, Lk), max_size=3), label="ends")), Lk]
    torch.manual_seed(data.draw(st.integers(0, 9), label="seed"))
    query, (key, value) = rows(Lq, dtype=dtype)[0], rows(Lk, dtype=dtype)[:2]
    kept = torch.randint(0, Lk, (B, K))

    def part(q: Tensor, k: Tensor, v: Tensor) -> Results:
        results = []
        for begin, end in itertools.pairwise(ends):
            here = (begin <= kept) & (kept < end)
            own = (kept - begin).gather(1, (~here).int().argsort(dim=1, stable=True))
            lengths, seed = here.sum(1), numbers(HEADS, queries, torch.arange(begin, end))
            of_part = q[:, :, queries], k[:, :, begin:end], v[:, :, begin:end]
            results.append(nodes(*of_part, own, lengths, P, seed, SCALE))
        return vattn.merge_attention(*map(list, zip(*results, strict=True)))

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Results:
        results = nodes(q, k, v, kept, None, P, SEED, SCALE)
        return tuple(x[:, :, queries] for x in results)

    assert_same(part, whole, [query, key, value])


def test_a_bias_is_its_table():
    """attend takes a module, or its table and window."""
    layout, window = layout_of([[0, 1], [1]], 5, 3, 1), (1, 1, 5)
    bias = bias_without_table(window, H)
    tensors = [*rows(6, dtype=torch.float32), torch.randn(bias_rows(window, 1), H)]

    def of_module(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Results:
        bias.table = table
        found = edges(q, k, v, layout, bias, None, False, 0.0, None, SCALE, True)
        return found[:2]

    def of_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Results:
        return edges(q, k, v, layout, (table, window), None, False, 0.0, None, SCALE, True)[:2]

    assert_same(of_table, of_module, tensors)


@both_ways
def test_shares_of_importance_add_up(dtype):
    """Parts of the keys, given the lse of all, receive their parts of the probability."""
    query, key = rows(7, dtype=dtype)[0], rows(20, dtype=dtype)[0]
    lse = latent(query, [key], [key], None, 0.0, None, SCALE)[1]
    whole = vattn.token_importance(query, key, scale=SCALE)
    shares = [vattn.token_importance(query, part, lse=lse, scale=SCALE) for part in key.split((0, 3, 16, 1), 2)]
    torch.testing.assert_close(torch.cat(shares, 1), whole, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat(shares, 1).sum(1), torch.ones(B, dtype=dtype))
