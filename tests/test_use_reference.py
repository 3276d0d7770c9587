"""Inside of ``vattn.use_reference`` every operator is its definition: PyTorch's own operators, in every direction."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError, checkpoint

import vattn
from tests.calls import DIFFERENTIABLE, OPERATORS, as_tuple, calls
from tests.model_zoo import MODELS, assert_same
from vattn import _library, distributed

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


class Seen(TorchDispatchMode):
    """The operators that run, and whether some are of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **kwargs or {})

    @property
    def kernels(self) -> list[str]:
        return [name for name in self.names if name.startswith("vattn::")]


def is_of_kernels(call: Any, *args: Any) -> bool:
    with Seen() as seen:
        call(*args)
    assert seen.names
    return bool(seen.kernels)


def assert_close(results: Any, expected: Any) -> None:
    for x, y in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def loss_of(function: Any) -> Any:
    return lambda *x: sum(y.square().sum() for y in as_tuple(function(*x)) if y.is_floating_point())


@pytest.mark.parametrize("op", OPERATORS)
def test_no_kernel_runs(op):
    """Forward and backward; outside of it, one does."""
    function, tensors = calls(torch.float32)[op]
    for inside in (False, True):
        with Seen() as seen:
            with vattn.use_reference() if inside else torch.enable_grad():
                results = as_tuple(function(*tensors))
            if op in DIFFERENTIABLE:
                torch.autograd.grad(sum(x.sum() for x in results if x.requires_grad), tensors)
        assert bool(seen.kernels) is not inside
        expected = as_tuple(function(*tensors))
        assert [x.dtype for x in results] == [x.dtype for x in expected]
        assert_close(results, expected)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_transforms(op):
    """As in float64, which runs the reference anyway; second derivatives, which kernels do not have, are among them."""
    function, tensors = calls(torch.float32)[op]
    x = tuple(y.detach() for y in tensors)
    along = tuple(torch.randn_like(y) for y in x)
    many = tuple(torch.stack([y, -y, 0.5 * y]) for y in x)
    every = tuple(range(len(x)))
    for transform in (
        lambda x, along, many: jvp(function, x, along),
        lambda x, along, many: grad(loss_of(function), every)(*x),
        lambda x, along, many: vmap(grad(loss_of(function), every))(*many),
        lambda x, along, many: jvp(grad(loss_of(function), every), x, along)[1],
    ):
        with vattn.use_reference(), Seen() as seen:
            found = transform(x, along, many)
        assert not seen.kernels
        expected = transform(*(tuple(y.double() for y in each) for each in (x, along, many)))
        for y, truth in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            torch.testing.assert_close(y.double(), truth.double(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("op", OPERATORS)
def test_autocast_has_the_dtypes_of_kernels(op):
    function, tensors = calls(torch.float32)[op]
    with torch.autocast("cpu", torch.bfloat16):
        expected = as_tuple(function(*tensors))
        with vattn.use_reference():
            results = as_tuple(function(*tensors))
    for x, y in zip(results, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        torch.testing.assert_close(x.double(), y.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("op", OPERATORS)
def test_exported(op, strict):
    function, tensors = calls(torch.float32)[op]

    class Call(nn.Module):
        def forward(self, *x: Tensor) -> Any:
            return function(*x)

    x = tuple(y.detach() for y in tensors)
    with vattn.use_reference():
        program = torch.export.export(Call(), x, strict=strict)
    assert not any("vattn" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(*x), function(*x))


class TestCompiled:
    """What is compiled inside has no kernels, and what is compiled outside has; one function may be both."""

    def setup_method(self) -> None:
        self.graphs: list[bool] = []
        self.q = torch.randn(1, 2, 4, 3, 8)

    def attend(self, x: Tensor) -> Any:
        return vattn.leap_attention(x, x, x, 2)

    def compile(self, function: Any) -> Any:
        def backend(graph: Any, _: Any) -> Any:
            self.graphs.append(any("vattn" in str(node.target) for node in graph.graph.nodes))
            return graph.forward

        return torch.compile(function, backend=backend, fullgraph=True)

    def test_called_inside_and_outside(self):
        compiled = self.compile(self.attend)
        expected = self.attend(self.q)
        for inside in (True, False, True, False):
            with vattn.use_reference() if inside else torch.enable_grad():
                torch.testing.assert_close(compiled(self.q), expected)
        assert self.graphs == [False, True]  # and each is found again

    @pytest.mark.parametrize("way", ["with", "decorated"])
    def test_inside_a_function(self, way):
        def entered(x: Tensor) -> Any:
            with vattn.use_reference():
                y = self.attend(x)
            return y

        part = entered if way == "with" else vattn.use_reference()(self.attend)
        torch.testing.assert_close(self.compile(part)(self.q), self.attend(self.q))
        assert self.graphs == [False]
        torch.testing.assert_close(self.compile(lambda x: part(x) + self.attend(x))(self.q), 2 * self.attend(self.q))
        assert self.graphs == [False, True]
        assert is_of_kernels(self.attend, self.q)


class TestWhereItCounts:
    def setup_method(self) -> None:
        self.q = torch.randn(1, 2, 4, 3, 8)

    def attend(self, x: Tensor) -> Any:
        return vattn.leap_attention(x, x, x, 2)

    def test_nested_and_left_by_an_error(self):
        with vattn.use_reference():
            with vattn.use_reference():
                assert not is_of_kernels(self.attend, self.q)
            assert not is_of_kernels(self.attend, self.q)
            with pytest.raises(ValueError, match=r"^leap_attention: leap must be at least 1, got leap=0$"):
                with vattn.use_reference():
                    vattn.leap_attention(self.q, self.q, self.q, 0)
            assert not is_of_kernels(self.attend, self.q)
        assert is_of_kernels(self.attend, self.q)

    def test_one_object_many_times(self):
        context = vattn.use_reference()
        with context:
            with context:
                pass
            assert not is_of_kernels(self.attend, self.q)
        assert is_of_kernels(self.attend, self.q)

    def test_decorator(self):
        @vattn.use_reference()
        def attend(x: Tensor, *, scale: float = 1.0) -> Any:
            """Of a test."""
            return scale * self.attend(x)

        assert attend.__name__ == "attend" and attend.__doc__ == "Of a test."
        assert not is_of_kernels(lambda: attend(self.q, scale=2.0))
        torch.testing.assert_close(attend(self.q, scale=2.0), 2 * self.attend(self.q))
        assert is_of_kernels(self.attend, self.q)

    def test_other_threads_have_their_own(self):
        found = []
        thread = threading.Thread(target=lambda: found.append(is_of_kernels(self.attend, self.q)))
        with vattn.use_reference():
            thread.start()
            thread.join()
        assert found == [True]

    @pytest.mark.parametrize("kind", ["a generator", "a coroutine", "a class", "no function"])
    def test_what_it_cannot_decorate(self, kind):
        def numbers() -> Any:
            yield 1

        async def later() -> None:
            pass

        function = {"a generator": numbers, "a coroutine": later, "a class": nn.Linear, "no function": 3}[kind]
        with pytest.raises(TypeError, match=r"^use_reference: function must be .*, got function="):
            vattn.use_reference()(function)

    def test_activation_checkpointing(self):
        """A decorated function runs the same way in backward; one inside of a with does not, which is noticed."""
        x = self.q.clone().requires_grad_()
        decorated = vattn.use_reference()(self.attend)
        found = torch.autograd.grad(checkpoint(decorated, x, use_reentrant=False).sum(), x)
        assert_close(found, torch.autograd.grad(self.attend(x).sum(), x))
        with vattn.use_reference():
            out = checkpoint(self.attend, x, use_reentrant=False)
        with pytest.raises(CheckpointError):
            torch.autograd.grad(out.sum(), x)

    def test_over_ranks(self):
        from vattn.distributed._ranks import PaperRanks

        group = PaperRanks(rank=0, size=1)
        attend = lambda x: distributed.leap_attention(x, x, x, 2, group=group)  # noqa: E731
        assert is_of_kernels(attend, self.q)
        with vattn.use_reference():
            assert not is_of_kernels(attend, self.q)


@pytest.mark.parametrize("name", ["LapsViT", "VideoEncoder", "VQVAE", "MeBT", "VideoGPT", "VideoDiT"])
def test_models(name):
    """Outputs, and gradients of weights."""
    entry = MODELS[name]
    model = entry.make()
    expected = entry.outputs(model)
    with vattn.use_reference(), Seen() as seen:
        found = entry.outputs(model)
    assert not seen.kernels
    assert_close(found, expected)
    assert_same(model.state_dict(), entry.make().state_dict())
