"""Derivatives in every direction, through the public functions: the kernels against float64, which runs the reference.

What has no derivative raises; nothing gives a silent zero.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import vattn
from tests.calls import DIFFERENTIABLE, OPERATORS, WITH_LSE, as_tuple, calls
from tests.layouts import layout_of
from vattn import _library

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
LINEAR = [op for op in DIFFERENTIABLE if op not in WITH_LSE]  # they have all higher derivatives
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


class Problem:
    """A call of an operator in float32 and in float64, with tangents, and three of each for vmap."""

    def __init__(self, op: str) -> None:
        torch.manual_seed(0)
        (self.function, tensors), (self.exact_function, _) = calls(torch.float32)[op], calls(torch.float64)[op]
        self.tensors = [x.detach() for x in tensors]
        self.tangents = [torch.randn_like(x) for x in tensors]
        self.many = [torch.stack([x, 0.5 * x, -x]) for x in self.tensors]
        self.many_tangents = [torch.randn_like(x) for x in self.many]
        self.places = tuple(range(len(tensors)))

    def check(self, transform: Callable[..., Any], *args: Any) -> None:
        """`transform` of the function and of `args` is, of the kernels, what it is of the reference in float64."""
        actual = transform(self.function, *args)
        truth = transform(self.function, *tree_map(lambda x: x.double() if x.is_floating_point() else x, args))
        pairs = list(zip(tree_leaves(actual), tree_leaves(truth), strict=True))
        assert any(y.count_nonzero() for _, y in pairs)
        for x, y in pairs:
            assert x.dtype != torch.float64 or y.dtype == x.dtype
            torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=2e-5)


def differentiable(results: Any) -> list[Tensor]:
    return [x for x in as_tuple(results) if x.is_floating_point()]


def loss_of(function: Function) -> Function:
    return lambda *x: torch.stack([y.square().sum().double() for y in differentiable(function(*x))]).sum()


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_jvp(op):
    problem = Problem(op)
    problem.check(lambda f, x, dx: jvp(f, tuple(x), tuple(dx)), problem.tensors, problem.tangents)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_jvp_of_one_input(op):
    """The others have no tangent."""
    problem = Problem(op)
    for i in problem.places:
        problem.check(
            lambda f, x, dx, i=i: jvp(lambda y: f(*x[:i], y, *x[i + 1 :]), (x[i],), (dx[i],)),
            problem.tensors,
            problem.tangents,
        )


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_grad_and_vjp(op):
    problem = Problem(op)
    problem.check(lambda f, x: grad(loss_of(f), problem.places)(*x), problem.tensors)

    def pulled_back(function: Function, x: Sequence[Tensor]) -> Any:
        out, pull, *_ = vjp(lambda *y: tuple(differentiable(function(*y))), *x)
        return out, pull(tree_map(torch.cos, out))

    problem.check(pulled_back, problem.tensors)


@pytest.mark.parametrize("op", OPERATORS)
def test_vmap(op):
    problem = Problem(op)
    problem.check(lambda f, x: vmap(f)(*x), problem.many)
    last = [x.movedim(0, -1) for x in problem.many]
    problem.check(lambda f, x: vmap(f, in_dims=-1, out_dims=0)(*x), last)
    twice = [torch.stack([x, 2 * x]) for x in problem.many]
    problem.check(lambda f, x: vmap(vmap(f))(*x), twice)


@pytest.mark.parametrize("op", OPERATORS)
def test_vmap_of_one_input(op):
    """The others are the same for all."""
    problem = Problem(op)
    for i in problem.places:
        in_dims = tuple(0 if j == i else None for j in problem.places)
        mixed = [problem.many[j] if j == i else problem.tensors[j] for j in problem.places]
        problem.check(lambda f, x, in_dims=in_dims: vmap(f, in_dims)(*x), mixed)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_of_each_sample(op):
    problem = Problem(op)
    problem.check(lambda f, x: vmap(grad(loss_of(f), problem.places))(*x), problem.many)
    in_dims = (0, *[None] * (len(problem.places) - 1))
    mixed = [problem.many[0], *problem.tensors[1:]]
    problem.check(lambda f, x: vmap(grad(loss_of(f), problem.places), in_dims)(*x), mixed)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_jvp_and_vmap(op):
    problem = Problem(op)
    along = [*problem.many, *problem.many_tangents]
    n = len(problem.places)
    problem.check(lambda f, x: vmap(lambda *y: jvp(f, y[:n], y[n:]))(*x), along)
    problem.check(lambda f, x, dx: jvp(vmap(f), tuple(x), tuple(dx)), problem.many, problem.many_tangents)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_jacobians(op):
    problem = Problem(op)

    def of_first(function: Function, x: Sequence[Tensor]) -> Function:
        return lambda y: differentiable(function(y, *x[1:]))[0].sum((-1, -2))

    problem.check(lambda f, x: jacrev(of_first(f, x))(x[0]), problem.tensors)
    problem.check(lambda f, x: jacfwd(of_first(f, x))(x[0]), problem.tensors)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_dual_numbers(op, mode):
    problem = Problem(op)

    def tangents(function: Function, x: Sequence[Tensor], dx: Sequence[Tensor]) -> list[Tensor]:
        with forward_ad.dual_level(), mode():
            out = function(*map(forward_ad.make_dual, x, dx))
            return [y for y in (forward_ad.unpack_dual(y).tangent for y in differentiable(out)) if y is not None]

    problem.check(tangents, problem.tensors, problem.tangents)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_no_grad_and_inference_mode_around_jvp(op):
    problem = Problem(op)
    for mode in (torch.no_grad, torch.inference_mode):

        def inside(function: Function, x: Sequence[Tensor], dx: Sequence[Tensor], mode: Any = mode) -> Any:
            with mode():
                return jvp(function, tuple(x), tuple(dx))

        problem.check(inside, problem.tensors, problem.tangents)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_inference_mode_never_loses_a_tangent(op):
    """Inside of it PyTorch's own functions lose theirs; what has none may run."""
    problem = Problem(op)

    def inferred(*x: Tensor) -> Any:
        with torch.inference_mode():
            return problem.function(*x)

    ours = f"^{op}: inference mode turns forward mode off"
    with pytest.raises(RuntimeError, match=f"{ours}|inference tensor"):  # or of the views before
        jvp(inferred, tuple(problem.tensors), tuple(problem.tangents))
    with forward_ad.dual_level():
        duals = list(map(forward_ad.make_dual, problem.tensors, problem.tangents))
        with pytest.raises(RuntimeError, match=ours):
            inferred(*duals)
        plain = inferred(*problem.tensors)
    for x, y in zip(as_tuple(plain), as_tuple(problem.function(*problem.tensors)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_reverse_mode_over_a_detached_tangent(op):
    """The loss of one-step models: the tangent is part of a target."""
    problem = Problem(op)

    def step(function: Function, x: Sequence[Tensor], dx: Sequence[Tensor]) -> Any:
        weights = [torch.full_like(y, 0.7).requires_grad_() for y in x]

        def model(*y: Tensor) -> tuple[Tensor, ...]:
            return tuple(differentiable(function(*(w * z for w, z in zip(weights, y, strict=True)))))

        out, along, *_ = jvp(model, tuple(x), tuple(dx))
        loss = torch.stack([(a - b.detach()).square().sum().double() for a, b in zip(out, along, strict=True)]).sum()
        return torch.autograd.grad(loss, weights)

    problem.check(step, problem.tensors, problem.tangents)

    def functional(function: Function, x: Sequence[Tensor], dx: Sequence[Tensor]) -> Any:
        def loss(*weights: Tensor) -> Tensor:
            def model(*y: Tensor) -> tuple[Tensor, ...]:
                return tuple(differentiable(function(*(w * z for w, z in zip(weights, y, strict=True)))))

            out, along, *_ = jvp(model, tuple(x), tuple(dx))
            terms = [(a - b.detach()).square().sum().double() for a, b in zip(out, along, strict=True)]
            return torch.stack(terms).sum()

        return grad(loss, problem.places)(*(0.7 * torch.ones_like(y) for y in x))

    problem.check(functional, problem.tensors, problem.tangents)


SECOND = {
    "reverse over reverse": lambda f, x, dx: grad(lambda y: grad(loss_of(f))(y).sum())(x),
    "forward over reverse": lambda f, x, dx: jvp(grad(loss_of(f)), (x,), (dx,)),
    "reverse over forward": lambda f, x, dx: grad(lambda y: loss_of(lambda z: jvp(f, (z,), (dx,))[1])(y))(x),
    "forward over forward": lambda f, x, dx: jvp(lambda y: jvp(f, (y,), (dx,))[1], (x,), (dx,)),
}


@pytest.mark.parametrize("order", SECOND)
@pytest.mark.parametrize("op", WITH_LSE)
def test_second_derivatives_raise(op, order):
    problem = Problem(op)
    with pytest.raises(RuntimeError, match=f"^{op}: second derivatives need float64"):
        SECOND[order](lambda y: problem.function(y, *problem.tensors[1:]), problem.tensors[0], problem.tangents[0])


@pytest.mark.parametrize("order", SECOND)
@pytest.mark.parametrize("op", LINEAR)
def test_second_derivatives_of_linear_operators(op, order):
    problem = Problem(op)
    actual, truth = (
        SECOND[order](lambda y, f=f: differentiable(f(y))[0], x, dx)
        for f, x, dx in (
            (problem.function, problem.tensors[0], problem.tangents[0]),
            (problem.function, problem.tensors[0].double(), problem.tangents[0].double()),
        )
    )
    for x, y in zip(tree_leaves(actual), tree_leaves(truth), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", WITH_LSE)
def test_a_backward_inside_a_dual_level_raises(op):
    """The gradients would have tangents, which are second derivatives."""
    problem = Problem(op)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.clone().requires_grad_(), dx) for x, dx in zip(problem.tensors, problem.tangents, strict=True)]  # fmt: skip # noqa: E501
        with pytest.raises(RuntimeError, match=f"^{op}: second derivatives need float64"):
            torch.autograd.grad(differentiable(problem.function(*duals))[0].sum(), duals)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_ops_called_directly(op):
    """Below the public function it is too late for torch.func; dual numbers and reverse mode work."""
    problem = Problem(op)
    called: list[tuple[Any, tuple[Any, ...]]] = []
    operator = vattn.ops.OPERATORS[op]
    run = operator.run
    operator.run = lambda *args: called.append((operator.op, args)) or run(*args)
    try:
        problem.function(*problem.tensors)
    finally:
        del operator.run
    (function, args) = called[0]
    first = operator.tensors(args)[0]

    def direct(x: Tensor) -> Any:
        replaced = tree_map(lambda y: x if y is first else y, list(args))
        return tuple(differentiable(function(*replaced)))

    for transform in (grad(loss_of(direct)), lambda x: jvp(direct, (x,), (x,))):
        with pytest.raises(RuntimeError, match=f"^{op}: torch.func transforms calls of vattn.{op}"):
            transform(first)
    with forward_ad.dual_level():
        out = direct(forward_ad.make_dual(first, first))[0]
        assert forward_ad.unpack_dual(out).tangent.count_nonzero() > 0
    mapped = vmap(direct)(torch.stack([first, 2 * first]))
    torch.testing.assert_close(mapped[0][1], direct(2 * first)[0])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiled(op):
    """vmap compiles; forward mode inside raises rather than losing tangents, and so does grad of torch.func."""
    problem = Problem(op)

    def compiled(function: Function) -> Function:
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    mapped = vmap(lambda *x: problem.function(*x, *problem.tensors[len(x) :]))
    args = problem.many[:3]  # but not a table, which would be left in its module
    for x, y in zip(tree_leaves(compiled(mapped)(*args)), tree_leaves(mapped(*args)), strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(Exception, match=f"{op}: there is no forward mode inside a function that is compiled"):
        compiled(lambda x, dx: jvp(problem.function, tuple(x), tuple(dx)))(problem.tensors, problem.tangents)

    def dual(x: Sequence[Tensor], dx: Sequence[Tensor]) -> Any:
        with forward_ad.dual_level():
            out = differentiable(problem.function(*map(forward_ad.make_dual, x, dx)))[0]
            return forward_ad.unpack_dual(out).tangent

    of_views = "forward differentiable view"  # an error of PyTorch's
    with pytest.raises(
        Exception, match=f"{op}: there is no forward mode inside a function that is compiled|{of_views}"
    ):
        compiled(dual)(problem.tensors, problem.tangents)
    with pytest.raises(Exception, match=f"{op}: torch.func transforms calls of vattn.{op}"):
        compiled(grad(loss_of(problem.function)))(*problem.tensors)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiled_functions_take_dual_numbers(op):
    """PyTorch runs them uncompiled."""
    problem = Problem(op)

    def tangents(function: Function, x: Sequence[Tensor], dx: Sequence[Tensor]) -> list[Tensor]:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager")
        with forward_ad.dual_level():
            out = function(*map(forward_ad.make_dual, x, dx))
            return [y for y in (forward_ad.unpack_dual(y).tangent for y in differentiable(out)) if y is not None]

    problem.check(tangents, problem.tensors, problem.tangents)


def test_dropout_has_the_mask_of_its_primal():
    """In both modes: the same seed makes the same mask, and float64 runs the reference."""
    x, dx = torch.randn(2, 3, 1, 2, 4, 5, 8)

    def pushed(x: Tensor, dx: Tensor) -> Any:
        torch.manual_seed(3)
        return jvp(lambda q, k, v: vattn.leap_attention(q, k, v, 1, dropout_p=0.4), tuple(x), tuple(dx))

    for actual, truth in zip(pushed(x, dx), pushed(x.double(), dx.double()), strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPERATORS)
def test_nothing_to_map(op):
    """vmap over no samples, and Jacobians of empty tensors, have the shapes that others would give."""
    problem = Problem(op)
    none = [x[:0] for x in problem.many]
    for x, y in zip(
        as_tuple(vmap(problem.function)(*none)), as_tuple(vmap(problem.function)(*problem.many)), strict=True
    ):
        assert x.shape == (0, *y.shape[1:]) and x.dtype == y.dtype


def test_jacobians_of_no_tokens():
    q = torch.randn(1, 2, 0, 3, 4)
    for jacobian in (jacrev, jacfwd):
        assert jacobian(lambda q: vattn.leap_attention(q, q, q, 1))(q).shape == (*q.shape, *q.shape)


@pytest.mark.parametrize("op", [op for op in OPERATORS if op not in DIFFERENTIABLE])
def test_constants_in_forward_mode(op):
    """As a VQ-VAE has them: they have no tangent, and stop no other."""
    problem = Problem(op)

    def through(*x: Tensor) -> Tensor:
        return x[0] + as_tuple(problem.function(*x))[0].double().sum().to(x[0].dtype)

    out, along, *_ = jvp(through, tuple(problem.tensors), tuple(problem.tangents))
    assert torch.equal(along, problem.tangents[0])
    assert torch.equal(out, through(*problem.tensors))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return (None,) * len(grads)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_no_gradient_from_behind(op):
    """What is given none passes none on."""
    problem = Problem(op)
    x = [y.requires_grad_() for y in problem.tensors]
    out = NoGradient.apply(*differentiable(problem.function(*x)))
    (sum(y.sum() for y in out) + x[0].sum()).backward()
    assert torch.equal(x[0].grad, torch.ones_like(x[0]))
    assert all(y.grad is None or not y.grad.any() for y in x[1:])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_linearize_and_functionalize(op):
    problem = Problem(op)

    def of_first(x: Tensor) -> list[Tensor]:
        return differentiable(problem.function(x, *problem.tensors[1:]))

    _, push = torch.func.linearize(of_first, problem.tensors[0])
    truth = jvp(of_first, (problem.tensors[0],), (problem.tangents[0],))[1]
    for x, y in zip(push(problem.tangents[0]), truth, strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(torch.func.functionalize(of_first)(problem.tensors[0]), of_first(problem.tensors[0]), strict=True):
        assert torch.equal(x, y)


def test_linearize_a_bias():
    bias = vattn.RelativePositionBias3D((2, 2, 3), 2)

    def looked_up(table: Tensor) -> Tensor:
        return functional_call(bias, {"table": table}, ())

    tangent = torch.randn_like(bias.table)
    assert torch.equal(torch.func.linearize(looked_up, bias.table.detach())[1](tangent), looked_up(tangent))


@pytest.mark.parametrize("op", WITH_LSE)
def test_batched_gradients(op):
    """PyTorch's older vmap maps a backward; it has no rule for lists of tensors."""
    problem = Problem(op)
    x = [y.requires_grad_() for y in problem.tensors]
    out = differentiable(problem.function(*x))[0]
    grads = torch.randn(3, *out.shape)
    if "Tensor[]" in vattn.ops.OPERATORS[op].arguments.values():
        with pytest.raises(RuntimeError, match=f"^{op}: batched gradients"):
            torch.autograd.grad(out, x, grads, is_grads_batched=True)
        return
    batched = torch.autograd.grad(out, x[:3], grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for a, b in zip(batched, torch.autograd.grad(out, x[:3], grads[i], retain_graph=True), strict=True):
            torch.testing.assert_close(a[i], b)


def test_tracing():
    module, x = vattn.nn.LeapAttention(8, 2, 2, 1), torch.randn(4, 3, 8)
    traced = torch.jit.trace(module, (x,))
    assert torch.equal(traced(x), module(x))
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    for a, b in zip(torch.autograd.grad(traced(x).sum(), list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_randomness_of_vmap():
    """As of PyTorch's own dropout: an error unless it is said what to draw."""
    x = torch.randn(3, 3, 1, 2, 4, 5, 8)

    def drop(x: Tensor) -> Any:
        q, k, v = x
        return vattn.leap_attention(q, k, v, 1, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(drop)(x)
    same = vmap(drop, randomness="same")(x[:1].expand(3, *x.shape[1:]))
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    different = vmap(drop, randomness="different")(x[:1].expand(3, *x.shape[1:]))
    assert not torch.equal(different[0], different[1])


def test_layouts_of_samples_under_vmap():
    """Samples of a call are those of the layout, in each of the calls that are mapped."""
    order = torch.tensor([4, 2, 0, -1, 3, 1])
    layout = layout_of([[0, 2], [], [1, 0], [2], [0, 1], [1]], 5, 2, 1, samples=2, order=order)
    x = torch.randn(3, 2, 2, 6, 4)

    def attend(x: Tensor) -> Any:
        return vattn.edge_sparse_attention(x, x, x, layout)

    for y in (x, x.double()):
        torch.testing.assert_close(vmap(attend)(y), torch.stack([attend(one) for one in y]))
        grads = vmap(grad(lambda x: attend(x).square().sum()))(y)
        for i in range(3):
            torch.testing.assert_close(grads[i], grad(lambda x: attend(x).square().sum())(y[i]))


def test_what_samples_share_may_differ_under_vmap():
    """A bias, positions and kept keys of each sample; a layout is one for all."""
    layout = layout_of([[0, 2, 2], [], [1, 0]], num_tokens=5, block_size=2, num_global=1)
    bias = vattn.RelativePositionBias3D((1, 2, 4), num_heads=2)
    q = torch.randn(3, 1, 2, 6, 4)
    positions = torch.stack([torch.randperm(8)[:5] for _ in range(3)])
    tables = torch.randn(3, *bias.table.shape)

    def attend(table: Tensor, q: Tensor, positions: Tensor) -> Any:
        call = {"position_bias": bias, "positions": positions}
        with torch.nn.utils.stateless._reparametrize_module(bias, {"table": table}):
            return vattn.edge_sparse_attention(q, q, q, layout, **call)

    together = vmap(attend)(tables, q, positions)
    for i in range(3):
        torch.testing.assert_close(together[i], attend(tables[i], q[i], positions[i]))
    kept = torch.stack([torch.randperm(6)[None, :3] for _ in range(3)])
    together = vmap(vattn.node_sparse_attention)(q, q, q, kept)
    for i in range(3):
        torch.testing.assert_close(together[i], vattn.node_sparse_attention(q[i], q[i], q[i], kept[i]))
    lengths = torch.tensor([[0], [1], [3]])

    def short(q: Tensor, kept: Tensor, lengths: Tensor) -> Any:
        return vattn.node_sparse_attention(q, q, q, kept, kept_lengths=lengths)

    for x in (q, q.double()):
        of_lengths = vmap(short)(x, kept, lengths)
        for i in range(3):
            torch.testing.assert_close(of_lengths[i], short(x[i], kept[i], lengths[i]))
    exact = vmap(vattn.node_sparse_attention)(q.double(), q.double(), q.double(), kept)
    torch.testing.assert_close(together.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, dx = torch.randn(2, 3, 1, 2, 4, 5, 8)
    with torch.autocast("cpu", dtype):
        out, along = jvp(lambda q, k, v: vattn.leap_attention(q, k, v, 1), tuple(x), tuple(dx))
        gradient = grad(lambda q: vattn.leap_attention(q, x[1], x[2], 1).float().sum())(x[0])
    low = [y.to(dtype) for y in (*x, *dx)]
    expected = jvp(lambda q, k, v: vattn.leap_attention(q, k, v, 1), tuple(low[:3]), tuple(low[3:]))
    assert out.dtype == along.dtype == dtype and gradient.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(along, expected[1])


def test_functional_call_of_an_ensemble():
    """Parameters of several models, stacked; gradients of each."""
    models = [vattn.nn.LatentAttention(8, 2) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 7, 8)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(models[0], parameters, ([x], [x, y]))[0].square().mean()

    together = vmap(grad(loss), (0, None))(stacked, x)
    for i, model in enumerate(models):
        loss(dict(model.named_parameters()), x)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        for name, g in grad(loss)(parameters, x).items():
            torch.testing.assert_close(together[name][i], g, rtol=1e-4, atol=1e-6)
