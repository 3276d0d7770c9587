"""What every public operator owes its caller, through the public functions: errors, gradients, compilation, autocast.

What the kernels compute is tested in tests/kernels, against the references; here it is how they are called.
"""

import functools
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import vattn
from benchmarks.registry import load_operator, operator_names
from tests.calls import DIFFERENTIABLE, OPERATORS, WITH_LSE, as_tuple, calls, leaves
from tests.kernels.operators import OPERATORS as KERNELS_UNDER_TEST
from tests.kernels.operators import over
from vattn import _library, reference

ROOT = pathlib.Path(__file__).parents[1]
needs_kernels = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def video(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value (B, H, T, N, D) that require gradients."""
    return leaves(*[shape] * 3, dtype=dtype)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op):
    function, tensors = calls(torch.float64)[op]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_gradcheck_with_dropout():
    def dropped(q, k, v):
        torch.manual_seed(1)
        return vattn.leap_attention(q, k, v, leap=1, dropout_p=0.4)

    assert torch.autograd.gradcheck(dropped, video(1, 2, 3, 2, 3, dtype=torch.float64))


def test_gradcheck_of_parts_without_keys():
    outs, lses = (leaves(*[shape] * 2, dtype=torch.float64) for shape in ((4, 3), (4,)))
    with torch.no_grad():
        lses[0][:2] = -torch.inf
        lses[1][1:3] = -torch.inf
    out, lse = vattn.merge_attention(outs, lses)
    assert lse[1] == -torch.inf and (out[1] == 0).all()
    grads = torch.autograd.grad([out, lse[[0, 2, 3]]], [*outs, *lses], [torch.ones_like(out), torch.ones(3).double()])
    assert all(g.isfinite().all() for g in grads)


@needs_kernels
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_float64_and_kernels_agree(op):
    """The kernels through the public function, autograd included, against the reference."""
    function, tensors = calls(torch.float32)[op]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    results, exact_results = as_tuple(function(*tensors)), as_tuple(function(*exact))
    gradients = [torch.randn_like(x) for x in results]
    for x, y in zip(
        [*results, *torch.autograd.grad(results, tensors, gradients)],
        [*exact_results, *torch.autograd.grad(exact_results, exact, [g.double() for g in gradients])],
        strict=True,
    ):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


class Recorded(TorchDispatchMode):
    """The calls of our ops, as the dispatcher sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vattn":
            self.calls[func] = args
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op):
    """Of the forward, the backward and the tangent, with the arguments that the public function gives them."""
    function, tensors = calls(torch.float32)[op]
    plain = [x.detach() for x in tensors]
    with Recorded() as recorded:
        results = [x for x in as_tuple(function(*tensors)) if x.requires_grad]
        if op in DIFFERENTIABLE:
            torch.autograd.grad(results, tensors, [torch.randn_like(x) for x in results])
            torch.func.jvp(function, tuple(plain), tuple(plain))
    assert len(recorded.calls) == (1 if op not in DIFFERENTIABLE else 3 if op in WITH_LSE else len(recorded.calls))
    for overload, args in recorded.calls.items():

        def leaf(x: Any, forward: bool = overload is vattn.ops.OPERATORS[op].op) -> Any:
            return x.detach().requires_grad_(forward and x.is_floating_point()) if isinstance(x, Tensor) else x

        torch.library.opcheck(overload, tree_map(leaf, args))


@needs_kernels
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_results_may_be_modified_in_place(op):
    """As those of PyTorch's attention: residuals are added to them."""
    function, tensors = calls(torch.float32)[op]
    grad = torch.randn_like(as_tuple(function(*tensors))[0])
    expected = torch.autograd.grad(as_tuple(function(*tensors))[0] * 3, tensors, grad, materialize_grads=True)
    out = as_tuple(function(*tensors))[0]
    out += 1
    assert out.grad_fn is not None and out._version == 1
    if op in WITH_LSE:  # their backward reads out
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        return
    out *= 3
    for x, y in zip(torch.autograd.grad(out, tensors, grad, materialize_grads=True), expected, strict=True):
        assert torch.equal(x, y)


@needs_kernels
def test_opcheck_with_dropout():
    q, k, v = video(1, 2, 5, 3, 6)
    torch.library.opcheck(torch.ops.vattn.leap_attention.default, (q, k, v, 2, 2, 3, 0.2, torch.tensor([7]), 0.5))
    torch.library.opcheck(torch.ops.vattn.leap_attention.default, (q, k, v, 1, 5, 0, 0.0, None, 0.5))


@needs_kernels
def test_floating_point_operations():
    """Products of matrices: two in the forward, five in the backward and in the tangent."""
    q, k, v = video(2, 3, 6, 5, 8)  # groups of frames 0 2, 1 3, 4, 5
    pairs = 2 * 3 * (4 + 4 + 1 + 1) * 5 * 5
    with FlopCounterMode(display=False) as counter:
        out = vattn.leap_attention(q, k, v, 2)
        assert counter.get_total_flops() == 2 * 2 * pairs * 8
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 7 * pairs * 8
    plain = [x.detach() for x in (q, k, v)]
    with FlopCounterMode(display=False) as counter:
        torch.func.jvp(lambda *x: vattn.leap_attention(*x, 2), tuple(plain), tuple(plain))
    assert counter.get_total_flops() == 2 * 7 * pairs * 8


COUNT = """
import sys
import torch, vattn
assert "triton" not in sys.modules and "torch.utils.flop_counter" not in sys.modules
q = torch.randn(1, 1, 2, 3, 4)
{before}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    vattn.leap_attention(q, q, q, 1)
assert counter.get_total_flops() == 2 * 2 * 6 * 6 * 4, counter.get_total_flops()
"""


@needs_kernels
@pytest.mark.parametrize("before", ["", "vattn.leap_attention(q, q, q, 1)"], ids=["first call", "second call"])
def test_the_counter_is_imported_after_vattn(before):
    subprocess.run([sys.executable, "-c", COUNT.format(before=before)], check=True, cwd=ROOT)


@needs_kernels
@pytest.mark.parametrize("name", operator_names())
def test_floating_point_operations_of_the_benchmarks(name):
    """What the operator counts is what the benchmark divides by."""
    operator = load_operator(name)
    case = operator.cases["quick"][0]
    provider = next(x for x in operator.providers if x.role == "vattn")
    run, leaves = provider.build(case, torch.device("cpu")), [torch.randn(shape) for shape in case.leaf_shapes]
    with FlopCounterMode(display=False) as counter:
        run(*leaves)
    assert counter.get_total_flops() == pytest.approx(case.forward_flops, rel=0.01)


@needs_kernels
@pytest.mark.parametrize("op", WITH_LSE)
def test_second_derivatives_of_kernels_raise(op):
    function, tensors = calls(torch.float32)[op]
    grads = torch.autograd.grad(function(*tensors)[0].sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: second derivatives need float64"):
        sum(g.sum() for g in grads).backward()


@needs_kernels
@pytest.mark.parametrize("op", WITH_LSE)
def test_gradient_of_lse_alone(op):
    function, tensors = calls(torch.float32)[op]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(function(*tensors)[1].sum(), tensors, materialize_grads=True)
    truth = torch.autograd.grad(function(*exact)[1].sum(), exact, materialize_grads=True)
    for x, y in zip(grads, truth, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compile_fullgraph(op):
    function, tensors = calls(torch.float32)[op]
    compiled = torch.compile(function, fullgraph=True)
    results, expected = as_tuple(compiled(*tensors)), as_tuple(function(*tensors))
    gradients = [torch.randn_like(x) for x in expected]
    for x, y in zip(
        [*results, *torch.autograd.grad(results, tensors, gradients)],
        [*expected, *torch.autograd.grad(expected, tensors, gradients)],
        strict=True,
    ):
        assert torch.equal(x, y)


@needs_kernels
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([(4, 7), (6, 7), (8, 7), (5, 7), (16, 7)], id="frames"),
        pytest.param([(4, 7), (4, 9), (4, 16), (4, 2), (4, 33)], id="tokens"),
        pytest.param([(4, 7), (6, 5), (8, 12), (5, 9), (16, 3)], id="both"),
    ],
)
def test_changing_lengths_compile_at_most_twice(lengths, backward):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q, k, v):
        out = vattn.leap_attention(q, k, v, q.shape[2] // 2, fold_div=4, dropout_p=0.1)
        return vattn.periodic_shift(out, 4).movedim(1, -2).flatten(-2)

    for frames, tokens in lengths:
        qkv = video(2, 2, frames, tokens, 8)
        out = layer(*qkv)
        assert out.shape == (2, frames, tokens, 16)
        if backward:
            out.sum().backward()
            assert all(x.grad is not None and x.grad.isfinite().all() for x in qkv)
    assert counter.frame_count <= 2


@needs_kernels
def test_compiled_dropout_repeats_its_mask_in_the_backward():
    """With values and output gradients of 1, dv of a key sums its column of the mask, and out its row."""
    q, k = (torch.zeros(1, 1, 2, 40, 4) for _ in range(2))
    v = torch.ones(1, 1, 2, 40, 4, requires_grad=True)
    out = torch.compile(functools.partial(vattn.leap_attention, leap=1, dropout_p=0.5), fullgraph=True)(q, k, v)
    out.sum().backward()
    assert v.grad is not None
    assert torch.isclose(out.sum(), v.grad.sum())
    assert len(v.grad.unique()) > 3  # a mask, and not its mean


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Inputs are cast as PyTorch's own attention casts them, also where their dtypes differ; float64 is not."""
    q, k, v = video(1, 2, 4, 5, 8)
    with torch.autocast("cpu", dtype):
        out, lse = vattn.leap_attention(q, k.to(dtype), v, 2, return_lse=True)
        assert torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == dtype
        assert vattn.periodic_shift(q, 4).dtype == dtype
        assert vattn.merge_attention([q, v], [lse, lse])[0].dtype == dtype
        assert vattn.leap_attention(q.double(), k.double(), v.double(), 2).dtype == torch.float64
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, vattn.leap_attention(q.to(dtype), k.to(dtype), v.to(dtype), 2))
    grads = torch.autograd.grad(out.float().sum(), [q, k, v], retain_graph=True)
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype):  # a backward meets the tensors of its forward, also in here
        for x, y in zip(grads, torch.autograd.grad(out.float().sum(), [q, k, v]), strict=True):
            assert torch.equal(x, y)


@needs_kernels
@pytest.mark.parametrize("op", OPERATORS)
def test_autocast_of_every_operator(op):
    """The same as with tensors of its dtype; gradients and tangents are float32, as the tensors are."""
    function, tensors = calls(torch.float32)[op]
    cast = {"merge_attention": 2, "edge_sparse_attention": 3}.get(op, len(tensors))  # but not lses, nor a table
    low = [x.detach().bfloat16() if i < cast else x.detach() for i, x in enumerate(tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        results = as_tuple(function(*tensors))
    if not vattn.ops.OPERATORS[op].autocast or op == "nearest_code":  # which reads float32
        low = tensors
    for x, y in zip(results, as_tuple(function(*low)), strict=True):
        assert torch.equal(x, y)
    if low is not tensors and op in DIFFERENTIABLE:
        assert results[0].dtype == torch.bfloat16
        gradients = torch.autograd.grad(results[0].float().sum(), tensors)
        assert all(x.dtype == torch.float32 for x in gradients)


@pytest.mark.parametrize("op", OPERATORS)
def test_a_wrong_tensor_is_explained(op):
    """Whichever it is: what is no tensor, integers, and one of another device."""
    function, tensors = calls(torch.float32)[op]
    tensors = [x.detach() for x in tensors]
    for i, x in enumerate(tensors):
        if op == "edge_sparse_attention" and i == 3:
            continue  # the table of a module, which has its own device and dtype
        for wrong, error in (("query", TypeError), (x.int(), TypeError), (x.to("meta"), ValueError)):
            if error is ValueError and len(tensors) == 1 and op != "select_tokens":
                continue  # nothing else is anywhere
            with pytest.raises(error, match=rf"^{op}: \w+(\[\d\])? must "):
                function(*tensors[:i], wrong, *tensors[i + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@over("empty", [op for op in KERNELS_UNDER_TEST if op.differentiable])
def test_what_is_empty_has_a_gradient(operator, sizes, dtype):
    """Of every input, where an axis of it is empty, or one of another."""
    case = operator.make("cpu", **sizes)
    leaves = {name: x.to(dtype).requires_grad_() for name, x in case.tensors.items()}
    found = operator.reference(leaves, case.settings)
    torch.autograd.grad([found[name].sum() for name in operator.results], list(leaves.values()))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_twice_the_same_bits(op):
    function, tensors = calls(torch.float32)[op]
    for _ in range(2):
        first, second = as_tuple(function(*tensors)), as_tuple(function(*tensors))
        grads = [torch.autograd.grad([x.sum() for x in results], tensors) for results in (first, second)]
        for x, y in zip([*first, *grads[0]], [*second, *grads[1]], strict=True):
            assert torch.equal(x, y)


def test_dropout_comes_from_torchs_generator():
    q, k, v = video(1, 2, 4, 9, 8)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(vattn.leap_attention(q, k, v, 2, dropout_p=0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    state = torch.get_rng_state()
    vattn.leap_attention(q, k, v, 2)
    assert torch.equal(state, torch.get_rng_state())  # none is drawn where none is needed


def test_dropout_keeps_its_share_of_rows_columns_and_pairs():
    bh, n = torch.arange(4).view(4, 1, 1), 512
    keep = reference.dropout_keep(
        torch.tensor([99]), bh, torch.arange(n).view(n, 1), torch.arange(n), dropout_p=0.25
    ).double()
    deviation = (0.25 * 0.75) ** 0.5
    for dims, count in (((1, 2), n * n), ((0, 1), 4 * n), ((0, 2), 4 * n)):
        assert ((keep.mean(dims) - 0.75).abs() < 5 * deviation / count**0.5).all()
    centred = (keep - 0.75) / deviation
    for a, b in [
        (centred[:, 1:], centred[:, :-1]),  # neighbouring queries
        (centred[:, :, 1:], centred[:, :, :-1]),  # neighbouring keys
        (centred[:, :, 64:], centred[:, :, :-64]),  # keys a tile apart
        (centred[1:], centred[:-1]),  # neighbouring heads
    ]:
        assert (a * b).mean().abs() < 5 / a.numel() ** 0.5


def test_any_device_with_a_fake_kernel():
    q, k, v = (torch.empty(2, 3, 4, 5, 8, device="meta") for _ in range(3))
    out, lse = vattn.leap_attention(q, k, v, 2, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    assert out.movedim(1, -2).is_contiguous()


Q = torch.zeros(1, 2, 4, 3, 8)
LSE = torch.zeros(1, 2, 4, 3)


def leap(query=Q, key=Q, value=Q, leap=1, **settings):
    return lambda: vattn.leap_attention(query, key, value, leap, **settings)


def shift(x=Q, fold_div=4):
    return lambda: vattn.periodic_shift(x, fold_div)


def merge(outs, lses):
    return lambda: vattn.merge_attention(outs, lses)


SIZES = "(1, 2, 4, 3, 8)"
DTYPES = "float32, bfloat16, float16 or float64"


@pytest.mark.parametrize(
    ("call", "error", "must", "got"),
    [
        (leap([1]), TypeError, "query must be a torch.Tensor", "query=list"),
        (leap(key=Q.int()), TypeError, f"key must be {DTYPES}", "key.dtype=torch.int32"),
        (
            leap(value=Q.half()),
            TypeError,
            "value must have the dtype of query (torch.float32)",
            "value.dtype=torch.float16",
        ),
        (leap(Q[0], Q[0], Q[0]), ValueError, "query must have shape (B, H, T, N, D)", "query.shape=(2, 4, 3, 8)"),
        (leap(key=Q[:, :1]), ValueError, f"key must have the shape of query {SIZES}", "key.shape=(1, 1, 4, 3, 8)"),
        (leap(key=Q.to("meta")), ValueError, "key must be on the device of query (cpu)", "key.device=meta"),
        (leap(*[Q[..., :0]] * 3), ValueError, "head_dim must be between 1 and 256", "head_dim=0"),
        (leap(*[Q.new_zeros(1, 1, 1, 1, 257)] * 3), ValueError, "head_dim must be between 1 and 256", "head_dim=257"),
        (leap(leap=0), ValueError, "leap must be at least 1", "leap=0"),
        (leap(leap=1.0), TypeError, "leap must be an int", "leap=1.0"),
        (leap(leap=True), TypeError, "leap must be an int", "leap=True"),
        (leap(group_size=0), ValueError, "group_size must be at least 1", "group_size=0"),
        (leap(fold_div=-1), ValueError, "fold_div must be at least 0", "fold_div=-1"),
        (leap(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1", "dropout_p=1.5"),
        (leap(dropout_p=float("nan")), ValueError, "dropout_p must be between 0 and 1", "dropout_p=nan"),
        (leap(dropout_p="0"), TypeError, "dropout_p must be a float", "dropout_p='0'"),
        (leap(scale="1"), TypeError, "scale must be a float or None", "scale='1'"),
        (leap(scale=float("inf")), ValueError, "scale must be finite", "scale=inf"),
        (shift(Q.tolist()), TypeError, "x must be a torch.Tensor", "x=list"),
        (shift(Q[0]), ValueError, "x must have shape (B, H, T, N, D)", "x.shape=(2, 4, 3, 8)"),
        (shift(fold_div=0), ValueError, "fold_div must be at least 1", "fold_div=0"),
        (shift(fold_div=2.0), TypeError, "fold_div must be an int", "fold_div=2.0"),
        (merge(Q, [LSE]), TypeError, "outs must be a list or tuple of tensors", "outs=Tensor"),
        (merge([], []), ValueError, "outs must have at least one element", "len(outs)=0"),
        (merge([Q, Q], [LSE]), ValueError, "lses must be as many as outs (2)", "len(lses)=1"),
        (
            merge([Q, Q[:, :1]], [LSE, LSE]),
            ValueError,
            f"outs[1] must have the shape of outs[0] {SIZES}",
            "outs[1].shape=(1, 1, 4, 3, 8)",
        ),
        (merge([Q], [LSE.half()]), TypeError, "lses[0] must be torch.float32", "lses[0].dtype=torch.float16"),
        (
            merge([Q], [LSE.to("meta")]),
            ValueError,
            "lses[0] must be on the device of outs[0] (cpu)",
            "lses[0].device=meta",
        ),
        (
            merge([Q], [LSE[0]]),
            ValueError,
            "lses[0] must have the shape of outs[0] without its last axis",
            f"lses[0].shape=(2, 4, 3), outs[0].shape={SIZES}",
        ),
        (
            merge([Q.new_zeros(2, 300)], [Q.new_zeros(2)]),
            ValueError,
            "head_dim must be between 1 and 256",
            "head_dim=300",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and "=" in x else "",
)
def test_errors(call, error, must, got):
    with pytest.raises(
        error, match=rf"^(leap_attention|merge_attention|periodic_shift): {re.escape(f'{must}, got {got}')}$"
    ):
        call()


@needs_kernels
def test_kernels_called_directly_check_what_they_need():
    """torch.ops bypasses the public checks; what would read past a tensor still raises."""
    op = torch.ops.vattn.leap_attention
    with pytest.raises(TypeError, match="float32, bfloat16 and float16"):
        op(*[Q.double()] * 3, 1, 2, 0, 0.0, None, 1.0)
    with pytest.raises(ValueError, match="key must have shape"):
        op(Q, Q[:, :, :2], Q, 1, 2, 0, 0.0, None, 1.0)
    with pytest.raises(ValueError, match="leap must be at least 1"):
        op(Q, Q, Q, 0, 2, 0, 0.0, None, 1.0)
    with pytest.raises(ValueError, match="dropout needs a seed"):
        op(Q, Q, Q, 1, 2, 0, 0.5, None, 1.0)
