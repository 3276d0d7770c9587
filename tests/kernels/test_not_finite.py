"""What is not finite: NaN and infinities reach what the plain formula over the keys that are read lets them reach.

Truth is the reference in float64. Of five samples one is sound, three have one element that is NaN, inf or -inf, and
the last one is NaN.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import BACKENDS, Backend
from tests.kernels.cases import Case, Operator, Sizes, Tensors
from tests.kernels.checks import formula, formula_jvp, run, run_jvp
from tests.kernels.operators import OPERATORS, over
from tests.utils import assert_close, magnitude

NAN, INF = float("nan"), float("inf")
SAMPLES = 5
LENGTHS = torch.tensor([9, 0, 13, 20, 9])
SIZES: dict[str, dict[str, Sizes]] = {
    "axial_attention": {
        "short lines": {"outer": 2, "line": 3, "inner": 3, "dropout_p": 0.4},
        "long lines": {"line": 20, "inner": 1},
    },
    "edge_sparse_attention": {
        "plain": {"rows": [[0, 1], [1]], "block_size": 7, "N": 13, "window": ()},
        "bias": {"rows": [[0, 1], [1, 1]], "block_size": 7, "N": 13},
        "deterministic": {"rows": [[0], [1, 1]], "block_size": 7, "N": 13, "deterministic": True},
        "causal": {"rows": [[1, 0], [1]], "block_size": 7, "N": 13, "causal": True},
        "queries without keys": {"rows": [[1], [0, 1]], "block_size": 7, "N": 13, "G": 0, "causal": True},
    },
    "latent_attention": {
        "segments": {"queries": 19, "keys": (5, 30)},
        "key lengths": {"queries": 5, "keys": (20,), "key_lengths": LENGTHS},
        "one tile of keys": {"queries": 5, "keys": (120, 30)},
    },
    "leap_attention": {
        "dropout": {"T": 2, "N": 11, "dropout_p": 0.4},
        "shift": {"T": 3, "N": 5, "leap": 2, "fold_div": 4},
    },
    "merge_attention": {"parts": {"count": 3}},
    "node_sparse_attention": {"duplicates": {"queries": 5, "keys": 20, "count": 11, "duplicates": True}},
    "token_importance": {
        "plain": {"queries": 5, "keys": 20},
        "bias": {"queries": 20, "keys": 20, "G": 1, "window": (1, 1, 19)},
        "key lengths": {"queries": 5, "keys": 20, "key_lengths": LENGTHS},
    },
}


def test_every_operator_is_here():
    assert set(SIZES) == {op.name for op in OPERATORS if not op.exact}


def sized(*, differentiable: bool) -> pytest.MarkDecorator:
    """Parametrize by the operators above, or those with derivatives, and their sizes."""
    found = [dataclasses.replace(op, cases=SIZES[op.name]) for op in OPERATORS if op.name in SIZES]
    return over("cases", [op for op in found if op.differentiable or not differentiable])


# The interpreter takes minutes for what another dtype does not change; a GPU does not.
DTYPES = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(name, dtype, marks=pytest.mark.gpu if name == "triton" else ())
        for name in ("triton", "cpp")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if name == "cpp" or dtype == torch.float32 or torch.cuda.is_available()
    ],
    indirect=["backend"],
    ids=str,
)


def case_of(operator: Operator, sizes: Sizes, dtype: torch.dtype, backend: Backend) -> Case:
    lengths = {"key_lengths": sizes["key_lengths"].to(backend.device)} if "key_lengths" in sizes else {}
    return operator.make(backend.device, dtype, **sizes | lengths)


def faults(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """`tensors` with one of them at fault; of one that all samples share, an element of each kind in turn."""
    for name, x in tensors.items():
        if name != "table":
            bad = x.clone(memory_format=torch.contiguous_format)
            for sample, value in zip(bad[1:], (NAN, INF, -INF), strict=False):
                sample.view(-1)[sample.numel() // 2] = value
            bad[-1] = NAN
            yield name, tensors | {name: bad}
            continue
        for value in (NAN, INF, -INF):
            bad = x.clone()
            bad[len(x) // 2] = value
            yield f"{name} with {value}", tensors | {name: bad}


def spreads(case: Case, backend: Backend) -> bool:
    """Whether more may turn NaN than what the formula says: see "What is not finite" in docs/numerics.md."""
    short_lines = case.operator.name == "axial_attention" and case.tensors["query"].shape[3] < 8
    settings = case.settings
    return backend.name == "triton" and (
        short_lines or settings.get("causal", False) or settings.get("deterministic", False)
    )


def kinds(x: Tensor, apart: bool) -> Tensor:
    """0 where `x` is finite, and 1 elsewhere; or, taken `apart`, 1, 2 and 3 where it is NaN, inf and -inf."""
    if not apart:
        return (~x.isfinite()).int()
    return x.isnan() + 2 * (x == INF) + 3 * (x == -INF)


def assert_same_kinds(case: Case, backend: Backend, fault: str, found: Tensors, truth: Tensors) -> None:
    """NaN and infinities are where they are in `truth`, and what is finite is about right.

    Derivatives are differences of such numbers: whether they are NaN or infinite depends on the order of sums.
    """
    more = spreads(case, backend)
    assert list(found) == list(truth)
    for name, x in found.items():
        apart = name in case.operator.results and not more
        expected = truth[name].to(x.device)
        kind, expected_kind = kinds(x, apart), kinds(expected, apart)
        wrong = expected_kind > kind if more else kind != expected_kind
        if more and name != "dtable" and "table" not in fault:
            wrong[0] = kind[0] != expected_kind[0]  # not into another sample
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{fault}: {name} is {x[index]} at {index}, expected {expected[index]}; so are {int(wrong.sum())}"
            )
        about = 64 * torch.finfo(case.dtype).eps * max(1.0, magnitude(*truth.values()))
        finite, expected_finite = (torch.where(kind == 0, y, 0.0) for y in (x, expected))
        assert_close(finite, expected_finite, about, f"{fault}: {name}")


def check(backend: Backend, case: Case, fault: str) -> None:
    truth, gradients = formula(case, torch.float64)
    assert_same_kinds(case, backend, fault, run(backend, case), truth | gradients)


def check_jvp(backend: Backend, case: Case, tangents: Tensors, fault: str) -> None:
    found = {f"tangent of {name}": x for name, x in run_jvp(backend, case, tangents).items()}
    truth = {f"tangent of {name}": x for name, x in formula_jvp(case, tangents, torch.float64)[1].items()}
    assert_same_kinds(case, backend, fault, found, truth)


@sized(differentiable=False)
@DTYPES
def test_inputs(operator, sizes, dtype, backend):
    """Results and gradients, also of importance and of the table of biases."""
    case = case_of(operator, {"B": SAMPLES} | sizes, dtype, backend)
    for fault, tensors in faults(case.tensors):
        check(backend, dataclasses.replace(case, tensors=tensors), fault)


@sized(differentiable=True)
@DTYPES
def test_gradients_of_results(operator, sizes, dtype, backend):
    case = case_of(operator, {"B": SAMPLES} | sizes, dtype, backend)
    for fault, grads in faults(case.grads):
        check(backend, dataclasses.replace(case, grads=grads), f"gradient of {fault}")


@sized(differentiable=True)
@DTYPES
def test_tangents(operator, sizes, dtype, backend):
    """Of inputs that are not finite, and tangents that are not."""
    case = case_of(operator, {"B": SAMPLES} | sizes, dtype, backend)
    tangents = case.random_tangents()
    for fault, tensors in faults(case.tensors):
        check_jvp(backend, dataclasses.replace(case, tensors=tensors), tangents, fault)
    for fault, of_inputs in faults(tangents):
        check_jvp(backend, case, of_inputs, f"tangent of {fault}")


def test_every_kind_of_nan(backend):
    """Of any sign and payload: the bits of a weight are put together from those of a polynomial and of an integer."""
    payloads = torch.cat(
        [torch.arange(1, 520), 2 ** torch.arange(23), 2**22 + torch.arange(520), 2**23 - 1 - torch.arange(520)]
    )
    bits = 0x7F800000 + payloads.unique()
    bits = torch.cat([bits, bits - 2**31]).to(torch.int32)
    operator = next(op for op in OPERATORS if op.name == "latent_attention")
    case = operator.make(backend.device, queries=len(bits), keys=(2,), D=1)
    found = run(backend, case.replace(query=bits.view(torch.float32).view(1, 1, -1, 1).to(backend.device)))
    assert all(x.isnan().all() for x in found.values())


def test_very_small_weights(backend):
    """Down to those of scores that no float32 has a power of."""
    scores = -torch.cat([torch.linspace(0, 130, 400), 2.0 ** torch.arange(8, 127), torch.tensor([torch.inf])])
    operator = next(op for op in OPERATORS if op.name == "latent_attention")
    case = operator.make(backend.device, keys=(len(scores),), D=1, scale=1.0).replace(
        query=torch.ones(1, 1, 2, 1, device=backend.device),
        **{"keys[0]": scores.view(1, 1, -1, 1).to(backend.device)},
    )
    found, (truth, _) = run(backend, case), formula(case, torch.float64)
    torch.testing.assert_close(found["out"].double(), truth["out"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["lse"].double(), truth["lse"], rtol=1e-6, atol=1e-6)


APART: dict[str, dict[str, Sizes]] = {
    "axial_attention": {"lines longer than any tile": {"line": 70, "inner": 2}},
    "edge_sparse_attention": {
        "blocks": {"rows": [[0], [1], [0, 2]], "block_size": 7, "N": 18, "G": 0, "window": (1, 1, 18)},
        "order": {"rows": [[1], [0, 2], [1]], "blocks": [3, 4, 6], "block_size": 7, "N": 13, "G": 0, "window": ()},
    },
    "latent_attention": {"key lengths": {"B": 2, "queries": 5, "keys": (70,), "key_lengths": torch.tensor([67, 3])}},
    "leap_attention": {"leaps": {"T": 5, "N": 5, "leap": 2}},
    "node_sparse_attention": {"kept": {"B": 2, "queries": 5, "keys": 30, "count": 25}},
}
IN_A_TILE: dict[str, dict[str, Sizes]] = {
    "axial_attention": {"short lines": {"B": 2, "outer": 2, "line": 3, "inner": 3}},
    "edge_sparse_attention": {
        "causal": {"rows": [[0], [0, 1]], "block_size": 7, "N": 13, "causal": True},
        "causal without bias": {"rows": [[0, 0], [0, 1]], "block_size": 7, "N": 13, "causal": True, "window": ()},
        "causal in an order": {
            "rows": [[1, 0], [1], [0, 2]],
            "blocks": [6, 3, 4],
            "block_size": 7,
            "N": 13,
            "causal": True,
        },
    },
}


def unread(sizes: dict[str, dict[str, Sizes]]) -> pytest.MarkDecorator:
    """Parametrize by the attention operators of which queries leave keys unread."""
    found = [dataclasses.replace(op, cases=sizes[op.name]) for op in OPERATORS if op.name in sizes]
    return over("cases", found)


VALUES = pytest.mark.parametrize("value", [NAN, INF], ids=str)


@unread(APART)
@VALUES
def test_unread_keys(operator, sizes, value, backend):
    unread_keys_do_not_matter(case_of(operator, sizes, torch.float32, backend), value, backend)


@unread(IN_A_TILE)
@VALUES
def test_unread_keys_in_a_tile(operator, sizes, value):
    unread_keys_do_not_matter(operator.make("cpu", **sizes), value, BACKENDS["cpp"])


@unread(APART)
@VALUES
def test_queries_that_do_not_read(operator, sizes, value, backend):
    queries_that_do_not_read_do_not_matter(case_of(operator, sizes, torch.float32, backend), value, backend)


@unread(IN_A_TILE)
@VALUES
def test_queries_that_do_not_read_in_a_tile(operator, sizes, value):
    queries_that_do_not_read_do_not_matter(operator.make("cpu", **sizes), value, BACKENDS["cpp"])


def unread_keys_do_not_matter(case: Case, value: float, backend: Backend) -> None:
    """Whatever they hold, a query has the bits that it has with zeros, in results, gradient and tangents."""
    names = [name for name in case.tensors if name.startswith(("key", "value"))]
    values = {name: case.tensors[name].double().requires_grad_() for name in names if name.startswith("value")}
    out = case.operator.reference({name: x.double() for name, x in case.tensors.items()} | values, case.settings)["out"]
    row = out[..., 0].numel() // 2
    found = torch.autograd.grad(rows(out)[row].sum(), list(values.values()))
    read = {name: (grad != 0).any(-1) for name, grad in zip(values, found, strict=True)}
    assert any(not mask.all() for mask in read.values())
    tangents = case.random_tangents()

    def with_unread(value: float) -> Tensors:
        held, moved = dict(case.tensors), dict(tangents)
        for name in names:
            mask = read[name.replace("key", "value")][..., None]
            held[name], moved[name] = (torch.where(mask, x, value) for x in (held[name], moved[name]))
        changed = dataclasses.replace(case, tensors=held)
        results = run(backend, changed)
        of_query = {name: results[name] for name in ("out", "lse", "dquery")}
        return of_query | {f"tangent of {name}": x for name, x in run_jvp(backend, changed, moved).items()}

    plain, changed = with_unread(0), with_unread(value)
    for name, x in plain.items():
        query, same = (rows(y)[row] if y.ndim == out.ndim else y.reshape(-1)[row] for y in (x, changed[name]))
        assert torch.equal(query, same), f"{name}: {same}, expected {query}"


def queries_that_do_not_read_do_not_matter(case: Case, value: float, backend: Backend) -> None:
    """Whatever they and their gradients hold, the gradients of a key are what they are with zeros."""
    key, of_value = (next(name for name in case.tensors if name.startswith(kind)) for kind in ("key", "value"))
    row = case.tensors[key][..., 0].numel() // 3
    tangents = {name: torch.zeros_like(x) for name, x in case.tensors.items()}
    rows(tangents[of_value])[row] = 1
    read = (formula_jvp(case, tangents, torch.float64)[1]["out"] != 0).any(-1)  # the queries that read this key
    assert read.any() and not read.all()

    def with_others(value: float) -> Tensors:
        tensors = case.tensors | {"query": torch.where(read[..., None], case.tensors["query"], value)}
        grads = {"out": torch.where(read[..., None], case.grads["out"], value)}
        grads["lse"] = torch.where(read, case.grads["lse"], value)
        return run(backend, dataclasses.replace(case, tensors=tensors, grads=grads))

    plain, changed = with_others(0), with_others(value)
    for name in (f"d{key}", f"d{of_value}"):
        torch.testing.assert_close(rows(changed[name])[row], rows(plain[name])[row])


def rows(x: Tensor) -> Tensor:
    """Its rows, in one axis."""
    return x.reshape(-1, x.shape[-1])
