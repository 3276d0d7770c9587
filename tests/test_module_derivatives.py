"""Derivatives through every module, in both modes and whatever is switched on around: never a silent zero."""

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils._pytree import tree_map

import vattn
from vattn import _library

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
LAYOUT = vattn.BlockLayout(24, 7, torch.tensor([0, 2, 3, 5, 6]), torch.tensor([0, 2, 1, 3, 1, 3]), num_global=1)


class Entry(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[..., Tensor] = lambda module, x: module(x)


MODULES: dict[str, Entry] = {
    "LeapAttention": Entry(lambda: vattn.nn.LeapAttention(16, 2, num_frames=4, leap=2, fold_div=4), (8, 5, 16)),
    "LeapAttention2d": Entry(lambda: vattn.nn.LeapAttention2d(16, 2, num_frames=4, leap=2), (8, 16, 3, 3)),
    "LatentAttention": Entry(
        lambda: vattn.nn.LatentAttention(16, 2), (2, 5, 16), lambda module, x: module([x], [x, x.flip(1)])[0]
    ),
    "LatentBlock": Entry(
        lambda: vattn.nn.LatentBlock(16, 2, "lt2l"), (2, 5, 16), lambda module, x: module(x, x.flip(0), 0.5 * x)[0]
    ),
    "AxialAttention": Entry(lambda: vattn.nn.AxialAttention(16, 2, axis=1), (2, 3, 4, 16)),
    "SparseSelfAttention": Entry(
        lambda: vattn.nn.SparseSelfAttention(16, 2, window=(2, 3, 4)), (2, 25, 16), lambda module, x: module(x, LAYOUT)
    ),
    "padded keys": Entry(
        lambda: vattn.nn.SparseSelfAttention(16, 2, window=(2, 3, 4), pad_keys="zero"),
        (2, 25, 16),
        lambda module, x: module(x, LAYOUT),
    ),
}
AROUND: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def make(name: str, dtype: torch.dtype = torch.float32, frozen: bool = False) -> tuple[nn.Module, nn.Module, Tensor]:
    """A module, the same in float64, which runs the references, and an input of `dtype`."""
    torch.manual_seed(0)
    module = MODULES[name].make()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
        p.requires_grad_(not frozen)
    module = module.to(dtype)
    return module, copy.deepcopy(module).double(), torch.randn(MODULES[name].shape).to(dtype)


def assert_near(x: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """As a whole: single elements of a module in a narrow dtype are anything."""
    error = (x.double() - truth).norm() / truth.norm()
    assert truth.norm() > 0 and error <= TOLERANCE[dtype], f"{error:.3g}"


def test_every_module():
    of_module = {type(entry.make()).__name__ for entry in MODULES.values()}
    layers = {name for name in vattn.nn.__all__ if isinstance(getattr(vattn.nn, name), type)}
    assert layers - {"MultiHeadAttention"} == of_module  # which has no forward


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_forward_mode(name, dtype, frozen, around):
    module, exact, x = make(name, dtype, frozen)
    call, dx = MODULES[name].call, torch.randn(MODULES[name].shape).to(dtype)
    truth = jvp(lambda y: call(exact, y), (x.double(),), (dx.double(),))[1]
    with AROUND[around]():
        out, along = jvp(lambda y: call(module, y), (x,), (dx,))
    assert_near(along, truth, dtype)
    assert out.dtype == along.dtype == dtype


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_of_parameters(name, dtype):
    """grad of torch.func, backward, vjp and jvp by the parameters, against float64."""
    module, exact, x = make(name, dtype)
    call = MODULES[name].call

    def loss(which: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        def of(parameters: dict[str, Tensor]) -> Tensor:
            return call(lambda *args: functional_call(which, parameters, args), x).double().sin().sum()

        return of

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    wide, wide_tangents = (tree_map(Tensor.double, found) for found in (parameters, tangents))
    truth = grad(loss(exact, x.double()))(wide)
    call(module, x).double().sin().sum().backward()
    for found in (
        grad(loss(module, x))(parameters),
        vjp(loss(module, x), parameters)[1](torch.ones((), dtype=torch.float64))[0],
        {name: p.grad for name, p in module.named_parameters()},
    ):
        everything, true = (torch.cat([g[name].double().flatten() for name in parameters]) for g in (found, truth))
        assert_near(everything, true, dtype)
    _, along = jvp(loss(module, x), (parameters,), (tangents,))
    _, true_along = jvp(loss(exact, x.double()), (wide,), (wide_tangents,))
    torch.testing.assert_close(along, true_along, rtol=TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", MODULES)
def test_of_each_sample(name):
    module, exact, x = make(name)
    call = MODULES[name].call
    many = torch.stack([x, -x, 0.5 * x])
    found = vmap(grad(lambda y: call(module, y).sin().sum()))(many)
    truth = torch.stack([grad(lambda y: call(exact, y).sin().sum())(y) for y in many.double()])
    assert_near(found, truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_autocast(name, dtype):
    module, exact, x = make(name)
    call, dx = MODULES[name].call, torch.randn(MODULES[name].shape)
    truth = jvp(lambda y: call(exact, y), (x.double(),), (dx.double(),))[1]
    true_gradient = grad(lambda y: call(exact, y).sin().sum())(x.double())
    with torch.autocast("cpu", dtype):
        along = jvp(lambda y: call(module, y), (x,), (dx,))[1]
        gradient = grad(lambda y: call(module, y).float().sin().sum())(x)
    assert_near(along, truth, dtype)
    assert_near(gradient, true_gradient, dtype)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("name", MODULES)
def test_compiled(name):
    """The backward of a compiled module, frozen or not; forward mode around one, and in one, which never is 0."""
    module, exact, x = make(name)
    call = MODULES[name].call
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: call(module, y), backend="aot_eager", fullgraph=True)
    for frozen in (False, True):
        module.requires_grad_(not frozen)
        y, z = x.clone().requires_grad_(), x.double().requires_grad_()
        assert_near(
            torch.autograd.grad(compiled(y).sin().sum(), y)[0],
            torch.autograd.grad(call(exact, z).sin().sum(), z)[0],
            torch.float32,
        )
    truth = jvp(lambda y: call(exact, y), (x.double(),), (x.double(),))[1]
    inside = torch.compile(lambda y: jvp(lambda z: call(module, z), (y,), (y,))[1], backend="aot_eager")
    with torch._C._PreserveDispatchKeyGuard():
        for run in (lambda: jvp(compiled, (x,), (x,))[1], lambda: inside(x)):
            try:
                along = run()
            except Exception as error:
                assert "forward mode" in str(error) or "forward AD" in str(error) or "jvp" in str(error), error
            else:
                assert_near(along, truth, torch.float32)
        gc.collect()  # where Dynamo fails inside of a jvp, its guards change dispatch keys when they are collected
