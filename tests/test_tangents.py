"""Forward mode of the C++ kernels: the operators vattn::X_jvp, against torch.func.jvp of the references."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.measure import peak_memory
from tests.layouts import bias_without_table, layout_of
from tests.utils import assert_within_budget, magnitude
from vattn import BlockLayout, _library, reference

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
OPS = torch.ops.vattn
SEED = torch.tensor([2**40 + 7])
Results = tuple[Tensor, Tensor]


class Problem(NamedTuple):
    """One call of an operator."""

    primals: list[Tensor]
    reference: Callable[..., Any]
    forward: Callable[..., Results]
    backward: Callable[..., Any]  # of (grad_out, grad_lse, primals, out, lse)
    jvp: Callable[..., Results]  # of (tangents, primals, out, lse)
    wide: int = 0  # how many of the primals, the last ones, are at least float32


def random(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def dropout(p: float) -> tuple[float, Tensor | None]:
    return p, SEED if p > 0 else None


def leap(
    B: int, H: int, T: int, N: int, D: int, step: int = 1, group_size: int = 2, fold_div: int = 0, p: float = 0.0
) -> Problem:
    p, seed = dropout(p)
    settings = (step, group_size, fold_div, p, seed, 0.3)
    keywords: dict[str, Any] = {
        "group_size": group_size,
        "fold_div": fold_div,
        "dropout_p": p,
        "scale": 0.3,
        "seed": seed,
    }
    return Problem(
        random(*[(B, H, T, N, D)] * 3),
        lambda q, k, v: reference.leap_attention(q, k, v, step, return_lse=True, **keywords),
        lambda *x: OPS.leap_attention(*x, *settings),
        lambda grad_out, grad_lse, x, *results: OPS.leap_attention_backward(
            grad_out, grad_lse, *x, *results, *settings
        ),
        lambda tangents, x, *results: OPS.leap_attention_jvp(*tangents, *x, *results, *settings),
    )


def axial(B: int, H: int, outer: int, line: int, inner: int, D: int, p: float = 0.0) -> Problem:
    p, seed = dropout(p)
    settings = (1, p, seed, 0.3)
    return Problem(
        random(*[(B, H, outer, line, inner, D)] * 3),
        lambda q, k, v: reference.axial_attention(q, k, v, 1, dropout_p=p, scale=0.3, seed=seed, return_lse=True),
        lambda *x: OPS.axial_attention(*x, *settings),
        lambda grad_out, grad_lse, x, *results: OPS.axial_attention_backward(
            grad_out, grad_lse, *x, *results, *settings
        ),
        lambda tangents, x, *results: OPS.axial_attention_jvp(*tangents, *x, *results, *settings),
    )


def node(
    B: int, H: int, Lq: int, Lk: int, D: int, kept: list[list[int]], p: float = 0.0, lengths: list[int] | None = None
) -> Problem:  # fmt: skip
    p, seed = dropout(p)
    index = torch.tensor(kept, dtype=torch.int64).view(B, -1)
    kept_lengths = None if lengths is None else torch.tensor(lengths)
    settings = (index, kept_lengths, p, seed, 0.3)
    return Problem(
        random((B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, D)),
        lambda q, k, v: reference.node_sparse_attention(
            q, k, v, index, kept_lengths=kept_lengths, dropout_p=p, scale=0.3, seed=seed, return_lse=True
        ),
        lambda *x: OPS.node_sparse_attention(*x, *settings),
        lambda grad_out, grad_lse, x, *results: OPS.node_sparse_attention_backward(
            grad_out, grad_lse, *x, *results, *settings
        ),
        lambda tangents, x, *results: OPS.node_sparse_attention_jvp(*tangents, *x, *results, *settings),
    )


def latent(
    B: int, H: int, Lq: int, Lks: list[int], D: int, key_lengths: list[int] | None = None, p: float = 0.0
) -> Problem:
    p, seed = dropout(p)
    lengths = None if key_lengths is None else torch.tensor(key_lengths)
    settings = (lengths, p, seed, 0.3)
    keywords: dict[str, Any] = {"key_lengths": lengths, "dropout_p": p, "scale": 0.3, "seed": seed}

    def split(x: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return x[0], list(x[1 : 1 + len(Lks)]), list(x[1 + len(Lks) :])

    def backward(grad_out: Tensor, grad_lse: Tensor, x: list[Tensor], *results: Tensor) -> list[Tensor]:
        query, keys, values = OPS.latent_attention_backward(grad_out, grad_lse, *split(x), *results, *settings)
        return [query, *keys, *values]

    return Problem(
        random((B, H, Lq, D), *[(B, H, Lk, D) for Lk in Lks * 2]),
        lambda *x: reference.latent_attention(*split(x), return_lse=True, **keywords),
        lambda *x: OPS.latent_attention(*split(x), *settings),
        backward,
        lambda tangents, x, *results: OPS.latent_attention_jvp(*split(tangents), *split(x), *results, *settings),
    )


def edge(
    B: int, H: int, D: int, layout: BlockLayout, window: tuple[int, int, int] | None = None, causal: bool = False,
    positions: Tensor | None = None, p: float = 0.0,
) -> Problem:  # fmt: skip
    p, seed = dropout(p)
    G, sizes = layout.num_global, [] if window is None else list(window)
    graph = (layout.row_offsets, layout.columns, None, None, layout.order)
    keywords: dict[str, Any] = {"positions": positions, "causal": causal, "dropout_p": p, "scale": 0.3, "seed": seed}
    end = (sizes, positions, causal, p, seed, 0.3)

    def table(x: Any) -> Tensor | None:
        return None if window is None else x[3]

    def bias(table: Any = None) -> Any:
        if window is None:
            return None
        module = bias_without_table(window, H, G)
        module.table = table
        return module

    def backward(grad_out: Tensor, grad_lse: Tensor, x: list[Tensor], *results: Tensor) -> list[Tensor]:
        settings = (*graph, layout.block_size, G, table(x), *end, False)
        grads = OPS.edge_sparse_attention_backward(grad_out, grad_lse, *x[:3], *results, *settings)
        return grads[: len(x)]

    def jvp(tangents: list[Tensor], x: list[Tensor], *results: Tensor) -> Results:
        middle = (*graph, layout.block_size, G, table(x))
        return OPS.edge_sparse_attention_jvp(*tangents[:3], table(tangents), *x[:3], *results, *middle, *end, False)

    shape = (B, H, G + layout.num_tokens, D)
    tables = []
    if window is not None:
        T, height, width = window
        tables = [((2 * T - 1) * (2 * height - 1) * (2 * width - 1) + 2 * G + G * G, H)]
    return Problem(
        random(*[shape] * 3, *tables),
        lambda q, k, v, *table: reference.edge_sparse_attention(
            q, k, v, layout, position_bias=bias(*table), return_lse=True, **keywords
        ),
        lambda *x: OPS.edge_sparse_attention(*x[:3], *graph, layout.block_size, G, table(x), *end, False)[:2],
        backward,
        jvp,
        wide=len(tables),
    )


def merge(parts: int, *shape: int, empty: int = 0) -> Problem:
    """The first `empty` rows have no keys in any part, as many after them none in the first part."""
    primals = random(*[shape] * parts, *[shape[:-1]] * parts)
    for i, lse in enumerate(primals[parts:]):
        lse.view(-1)[: empty if i else 2 * empty] = -torch.inf
    for out, lse in zip(primals[:parts], primals[parts:], strict=True):
        out[lse == -torch.inf] = 0

    def split(x: Any) -> tuple[list[Tensor], list[Tensor]]:
        return list(x[:parts]), list(x[parts:])

    def backward(grad_out: Tensor, grad_lse: Tensor, x: list[Tensor], *results: Tensor) -> list[Tensor]:
        outs, lses = OPS.merge_attention_backward(grad_out, grad_lse, *split(x), *results)
        return [*outs, *lses]

    return Problem(
        primals,
        lambda *x: reference.merge_attention(*split(x)),
        lambda *x: OPS.merge_attention(*split(x)),
        backward,
        lambda tangents, x, *results: OPS.merge_attention_jvp(*split(tangents), *split(x), *results),
        wide=parts,
    )


# Blocks without keys, listed twice, and a short last one; rows for each of two heads.
ROWS = [[0, 2, 2], [], [3, 1], [3], [1], [0, 1, 2, 3], [], [3, 3]]
PER_HEAD = layout_of(ROWS, num_tokens=98, block_size=30, num_global=2, sets=2)
LOCAL = layout_of([[0], [], [2, 0]], num_tokens=23, block_size=9)
SHUFFLED = torch.stack([torch.randperm(120, generator=torch.Generator().manual_seed(i))[:98] for i in range(2)])
EVERY_THIRD = [list(range(0, 200, 3)), list(range(199, 132, -1))]
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "leap: pairs": lambda: leap(2, 2, 4, 37, 32, step=2),
    "leap: shifted, a group is short": lambda: leap(1, 3, 5, 30, 24, step=2, fold_div=3),
    "leap: shifted beyond the channels": lambda: leap(1, 1, 3, 5, 5, fold_div=1),
    "leap: dropout": lambda: leap(1, 2, 3, 40, 33, group_size=3, fold_div=4, p=0.3),
    "leap: one token": lambda: leap(2, 1, 1, 1, 1),
    "leap: wide": lambda: leap(1, 1, 2, 130, 256),
    "leap: no tokens": lambda: leap(1, 2, 3, 0, 8),
    "axial: lines share a panel": lambda: axial(2, 2, 3, 5, 7, 24),
    "axial: long lines": lambda: axial(1, 2, 2, 70, 2, 40),
    "axial: dropout": lambda: axial(1, 2, 2, 4, 5, 8, p=0.4),
    "node: some keys": lambda: node(2, 2, 70, 200, 32, EVERY_THIRD),
    "node: a key twice": lambda: node(1, 2, 3, 4, 5, [[2, 0, 2]]),
    "node: dropout": lambda: node(2, 2, 70, 200, 72, EVERY_THIRD, p=0.2),
    "node: no keys": lambda: node(1, 2, 3, 4, 5, []),
    "latent: one segment": lambda: latent(2, 2, 65, [63], 64),
    "latent: three segments": lambda: latent(1, 2, 130, [70, 0, 65], 36),
    "latent: lengths": lambda: latent(3, 2, 20, [90], 16, key_lengths=[0, 90, 37]),
    "latent: dropout": lambda: latent(1, 2, 20, [50, 41], 16, p=0.5),
    "latent: keys split over threads": lambda: latent(1, 1, 3, [3000, 1500], 16),
    "latent: lengths split over threads": lambda: latent(3, 1, 2, [5000], 8, key_lengths=[0, 5000, 1100], p=0.1),
    "latent: no keys": lambda: latent(1, 2, 3, [0], 8),
    "edge: blocks": lambda: edge(2, 2, 32, PER_HEAD),
    "edge: no global token": lambda: edge(1, 2, 8, LOCAL),
    "edge: bias": lambda: edge(2, 2, 32, PER_HEAD, window=(2, 7, 7)),
    "edge: bias, causal, positions per sample": lambda: edge(
        2, 2, 16, PER_HEAD, window=(3, 5, 8), causal=True, positions=SHUFFLED
    ),
    "edge: causal": lambda: edge(1, 2, 16, LOCAL, causal=True),
    "edge: everything": lambda: edge(2, 2, 72, PER_HEAD, (3, 8, 5), causal=True, positions=SHUFFLED[0], p=0.2),
    "merge: three parts": lambda: merge(3, 2, 3, 20, 24),
    "merge: parts without keys": lambda: merge(2, 2, 3, 20, 33, empty=7),
    "merge: one part": lambda: merge(1, 5, 8),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def converted(problem: Problem, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    narrow = len(tensors) - problem.wide
    return [x.to(dtype if i < narrow else wide) for i, x in enumerate(tensors)]


def tangents_of(problem: Problem) -> list[Tensor]:
    return [torch.randn(x.shape) for x in problem.primals]


def check(problem: Problem, dtype: torch.dtype, tangents: list[Tensor] | None = None) -> Results:
    """The operator is within budget, given `tangents` as they lie; returns what it computed."""
    primals = converted(problem, problem.primals, dtype)
    tangents = converted(problem, tangents_of(problem), dtype) if tangents is None else tangents
    results = problem.forward(*primals)
    actual = problem.jvp(tangents, primals, *results)

    def formula(dtype: torch.dtype) -> Results:
        x, dx = (tuple(converted(problem, list(y), dtype)) for y in (primals, tangents))
        return torch.func.jvp(problem.reference, x, dx)[1]

    truth, plain = formula(torch.float64), formula(dtype)
    # lse' * out is taken from out' with the out that the forward has rounded.
    eps = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 4
    intermediate = magnitude(truth[1]) * magnitude(results[0]) * max(1.0, eps) if results[0].numel() else 0.0
    assert_within_budget(actual[0], truth[0], plain[0], "out_tangent", intermediate)
    assert_within_budget(actual[1], truth[1], plain[1], "lse_tangent")
    assert actual[0].stride() == results[0].stride()
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_tangents(name, dtype, four_threads):
    check(PROBLEMS[name](), dtype)


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_and_reverse_mode_agree(name):
    """<g, J t> = <J^T g, t>"""
    problem = PROBLEMS[name]()
    tangents, results = tangents_of(problem), problem.forward(*problem.primals)
    gradients = [torch.randn_like(x) for x in results]
    gradients[1][results[1] == -torch.inf] = 0
    forward = problem.jvp(tangents, problem.primals, *results)
    reverse = problem.backward(*gradients, problem.primals, *results)
    pairs = [(*zip(gradients, forward, strict=True),), (*zip(reverse, tangents, strict=True),)]
    left, right = (sum((x.double() * y.double()).sum() for x, y in each) for each in pairs)
    size = sum((x.double() * y.double()).square().sum() for each in pairs for x, y in each) ** 0.5
    assert abs(left - right) <= 1e-5 * size


SMALL = {
    "leap": lambda: leap(2, 2, 4, 9, 16, step=2, fold_div=4),
    "axial": lambda: axial(2, 2, 3, 5, 7, 16),
    "node": lambda: node(2, 2, 7, 200, 16, EVERY_THIRD),
    "latent": lambda: latent(2, 2, 7, [30, 40], 16),
    "edge": lambda: edge(2, 2, 16, PER_HEAD, window=(2, 7, 7)),
    "merge": lambda: merge(2, 2, 3, 5, 16),
}


@pytest.mark.parametrize(
    "lay",
    [
        pytest.param(lambda x: torch.randn(x.shape[::-1]).permute(*reversed(range(x.dim()))), id="turned around"),
        pytest.param(lambda x: torch.randn(*x.shape, 2)[..., 0], id="every other number"),
        pytest.param(lambda x: torch.randn(1).expand(x.shape), id="one number, expanded"),
        pytest.param(lambda x: torch.randn(x.shape[1:]).expand(x.shape), id="expanded over samples"),
        pytest.param(torch.zeros_like, id="zeros"),
    ],
)
@pytest.mark.parametrize("name", SMALL)
def test_tangents_that_are_not_contiguous(name, lay):
    problem = SMALL[name]()
    tangents = [lay(x) for x in problem.primals]
    actual = check(problem, torch.float32, tangents)
    dense = problem.jvp([x.contiguous() for x in tangents], problem.primals, *problem.forward(*problem.primals))
    assert all(torch.equal(x, y) for x, y in zip(actual, dense, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_every_element_is_written(name, monkeypatch):
    """What torch.empty returns is NaN here, and none of it is left; twice the same bits."""
    problem = SMALL[name]()
    results, tangents = problem.forward(*problem.primals), tangents_of(problem)
    plain = problem.jvp(tangents, problem.primals, *results)
    torch.use_deterministic_algorithms(True)  # fills uninitialized memory
    try:
        assert torch.empty(1).isnan().all()
        filled = problem.jvp(tangents, problem.primals, *results)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(plain, filled, strict=True))


def test_a_query_without_keys_has_no_tangent():
    for problem in (latent(2, 1, 3, [4], 5, key_lengths=[0, 4]), edge(1, 2, 8, LOCAL)):
        out, lse = problem.forward(*problem.primals)
        out_tangent, lse_tangent = problem.jvp(tangents_of(problem), problem.primals, out, lse)
        where = lse == -torch.inf
        assert where.any() and not where.all()
        assert (out_tangent[where] == 0).all() and (lse_tangent[where] == 0).all()
        assert (lse_tangent[~where] != 0).all()


def test_keys_that_are_not_read_may_have_any_tangent():
    """Beyond a sample's length nothing is read, and a key that causality forbids has no part in a query's lse."""
    problem = latent(2, 1, 3, [70], 5, key_lengths=[33, 70])
    tangents, results = tangents_of(problem), problem.forward(*problem.primals)
    clean = problem.jvp(tangents, problem.primals, *results)
    for x in tangents[1:]:
        x[0, :, 33:] = torch.nan
    assert all(torch.equal(x, y) for x, y in zip(problem.jvp(tangents, problem.primals, *results), clean, strict=True))

    problem = edge(1, 2, 16, LOCAL, causal=True)
    tangents, results = tangents_of(problem), problem.forward(*problem.primals)
    clean = problem.jvp(tangents, problem.primals, *results)[1]
    tangents[1][:, :, 5] = torch.nan
    lse_tangent = problem.jvp(tangents, problem.primals, *results)[1]
    assert torch.equal(lse_tangent[..., :5], clean[..., :5])
    assert lse_tangent[..., 5:9].isnan().all()


@pytest.mark.parametrize(
    "problem_of",
    [
        pytest.param(lambda L: leap(1, 1, 1, L, 8, fold_div=4), id="leap"),
        pytest.param(lambda L: axial(1, 1, 1, L, 1, 8), id="axial"),
        pytest.param(lambda L: node(1, 1, L, L, 8, [list(range(L))]), id="node"),
        pytest.param(lambda L: latent(1, 1, L, [L], 8), id="latent"),
        pytest.param(lambda L: latent(1, 1, 4, [L * 16], 8), id="latent, split"),
        pytest.param(lambda L: edge(1, 1, 8, layout_of([[0]], L, L), window=(1, 1, L)), id="edge"),
    ],
)
def test_memory_is_linear(problem_of, four_threads):
    """Four times the tokens need four times the memory at most, with a constant for the threads' workspaces."""
    peaks = []
    for length in (512, 2048):
        problem = problem_of(length)
        results, tangents = problem.forward(*problem.primals), tangents_of(problem)
        peaks.append(peak_memory(lambda: problem.jvp(tangents, problem.primals, *results), torch.device("cpu")))  # noqa: B023
    assert peaks[1] <= 4 * peaks[0]
    assert peaks[1] < 4 * 2048**2  # the scores


@pytest.mark.parametrize("name", SMALL)
def test_derivatives_of_tangents_raise(name):
    """Reverse mode and forward mode over it, for a tangent or a primal that is differentiated."""
    problem = SMALL[name]()
    results, tangents = problem.forward(*problem.primals), tangents_of(problem)
    for differentiated in (tangents, problem.primals):
        leaves = [x.clone().requires_grad_() for x in differentiated]
        args = (leaves, problem.primals) if differentiated is tangents else (tangents, leaves)
        out_tangent, _ = problem.jvp(*args, *results)
        with pytest.raises(RuntimeError, match=f"{name}.*_attention: second derivatives need float64"):
            out_tangent.sum().backward()

        def along(*x: Tensor, differentiated: list[Tensor] = differentiated) -> Results:
            args = (x, problem.primals) if differentiated is tangents else (tangents, x)
            return problem.jvp(*args, *results)

        with pytest.raises(RuntimeError, match=f"{name}.*_attention: torch.func transforms calls of vattn"):
            torch.func.jvp(along, tuple(differentiated), tuple(differentiated))


def wrong(tensors: list[Tensor], place: int, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [change(x) if i == place else x for i, x in enumerate(tensors)]


@pytest.mark.parametrize("error", [TypeError, ValueError])
@pytest.mark.parametrize(
    ("name", "place", "argument"),
    [
        ("leap", 0, "query_tangent"),
        ("leap", 1, "key_tangent"),
        ("leap", 2, "value_tangent"),
        ("axial", 1, "key_tangent"),
        ("node", 2, "value_tangent"),
        ("latent", 2, r"key_tangents\[1\]"),
        ("latent", 3, r"value_tangents\[0\]"),
        ("edge", 0, "query_tangent"),
        ("edge", 3, "table_tangent"),
        ("merge", 1, r"out_tangents\[1\]"),
        ("merge", 2, r"lse_tangents\[0\]"),
    ],
)
def test_tangents_must_fit_their_primals(name, place, argument, error):
    problem = SMALL[name]()
    results, tangents = problem.forward(*problem.primals), tangents_of(problem)
    change = Tensor.half if error is TypeError else lambda x: x[:-1]
    got = "dtype" if error is TypeError else "shape"
    with pytest.raises(error, match=rf"^{name}[a-z_]*_attention: {argument} must have .*, got {argument}\.{got}="):
        problem.jvp(wrong(tangents, place, change), problem.primals, *results)


def other_capabilities() -> list[str]:
    return _library._C.cpu_capabilities()[1:] if _library._C is not None else []


@pytest.mark.parametrize("capability", other_capabilities())
def test_other_instruction_sets(capability):
    """The tests above, for the instruction sets that this processor would not choose."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not instruction_sets", __file__],
        env=os.environ | {"VATTN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
