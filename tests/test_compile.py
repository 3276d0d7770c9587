"""``torch.compile`` of whole graphs with settings that differ from call to call: one graph does for all values."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import vattn
from tests.calls import as_tuple
from vattn import _library

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
LAYOUT = vattn.BlockLayout(11, 4, torch.tensor([0, 2, 3, 4]), torch.tensor([0, 2, 1, 1]), num_global=1)


def attentions(dtype: torch.dtype = torch.float32) -> dict[str, Callable[..., Any]]:
    """Every operator that has a scale, of it and of a probability of dropout."""
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=dtype) for _ in range(3))
    a, b, c = (x.unflatten(2, (4, 3)) for x in (q, k, v))  # video
    kept = torch.tensor([[1, 3, 5]])
    return {
        "axial_attention": lambda **s: vattn.axial_attention(a, b, c, 1, **s),
        "edge_sparse_attention": lambda **s: vattn.edge_sparse_attention(q, k, v, LAYOUT, **s),
        "latent_attention": lambda **s: vattn.latent_attention(q, k, v, **s),
        "leap_attention": lambda **s: vattn.leap_attention(a, b, c, 2, **s),
        "node_sparse_attention": lambda **s: vattn.node_sparse_attention(q, k, v, kept, **s),
        "token_importance": lambda **s: vattn.token_importance(q, k, **s),
    }


WITH_DROPOUT = [op for op in attentions() if op != "token_importance"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def count_graphs(function: Callable[..., Any], calls: Sequence[Any], **options: Any) -> int:
    """How many graphs are compiled for `calls`, which give what they give uncompiled, gradients among it."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(options.pop("backend", "aot_eager"))
    compiled = torch.compile(function, fullgraph=True, backend=counter, **options)
    for call in calls:
        found = []
        for run in (function, compiled):
            torch.manual_seed(1)
            inputs = call.detach().requires_grad_() if isinstance(call, Tensor) else call
            results = as_tuple(run(inputs))
            found.append([*results])
            if isinstance(inputs, Tensor):
                found[-1] += torch.autograd.grad(results[0].sin().sum(), inputs)
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    return counter.frame_count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", attentions())
def test_scales_that_change(op, dtype):
    """The first value is a constant of its graph; the second graph is for all."""
    function = attentions(dtype)[op]
    assert count_graphs(lambda scale: function(scale=scale), [0.1, 0.2, 0.35, 0.0, -0.7, 1.0, 1e-6]) == 2
    with pytest.raises(Exception, match=f"{op}: scale must be finite"):
        torch.compile(lambda scale: function(scale=scale), fullgraph=True, backend="aot_eager")(math.inf)


@pytest.mark.parametrize("op", WITH_DROPOUT)
def test_probabilities_of_dropout_that_change(op):
    """None at all is another graph. Whichever comes first, the others need no more."""
    function = attentions()[op]

    def drop(dropout_p: float) -> Any:
        return function(dropout_p=dropout_p, scale=0.5)

    def masks(count: int) -> int:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(drop, fullgraph=True, backend=counter)
        for dropout_p in ([0.1, 0.2, 0.35, 0.7, 1.0], [0.1, 0.0, 0.35, 0.7, 0.0, 0.2])[count - 2]:
            out = compiled(dropout_p)
            assert out.count_nonzero() == 0 if dropout_p == 1.0 else out.count_nonzero() > 0
            if dropout_p == 0.0:
                torch.testing.assert_close(out, drop(0.0))
        return counter.frame_count

    assert masks(2) == 2
    assert masks(3) == 3


def test_a_compiled_dropout_drops_its_share():
    q, k = (torch.zeros(1, 1, 1, 200, 4) for _ in range(2))
    v = torch.ones(1, 1, 1, 200, 4)
    compiled = torch.compile(
        lambda p: vattn.leap_attention(q, k, v, 1, dropout_p=p), fullgraph=True, backend="aot_eager"
    )
    for dropout_p in (0.1, 0.3, 0.5, 0.9):
        rows = compiled(dropout_p)[..., 0].flatten()  # the share of 200 keys that stay, divided by its expectation
        share = rows.mean() * (1 - dropout_p)
        assert abs(share - (1 - dropout_p)) < 0.02


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(lambda x: 1 / math.sqrt(x.shape[-1]), id="sqrt"),
        pytest.param(lambda x: x.shape[-1] ** -0.5, id="power"),
        pytest.param(lambda x: None, id="default"),
        pytest.param(lambda x: 1 / x.shape[-1], id="quotient"),
    ],
)
def test_scales_of_a_head_dim_that_changes(scale, dynamic):
    inputs = [torch.randn(1, 2, 4, 3, D) for D in (8, 16, 24, 40)]

    def attend(x: Tensor) -> Any:
        return vattn.leap_attention(x, x, x, 2, scale=scale(x))

    assert count_graphs(attend, inputs, dynamic=dynamic) <= 2


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_scale_of_a_dynamic_head_dim(strict):
    class Attend(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return vattn.leap_attention(x, x, x, 2, scale=2 * x.shape[-1] ** -0.5)

    small, large = torch.randn(1, 2, 4, 3, 8), torch.randn(1, 2, 4, 3, 24)
    sizes = {"x": {4: torch.export.Dim("head_dim", min=2, max=256)}}
    program = torch.export.export(Attend(), (small,), dynamic_shapes=sizes, strict=strict)
    torch.testing.assert_close(program.module()(large), Attend()(large))


def test_layers_of_different_scales():
    class Layer(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Any:
            return vattn.latent_attention(x, x, x, scale=self.scale)

    x = torch.randn(1, 2, 12, 8)
    model = torch.nn.Sequential(*(Layer(scale) for scale in (0.1, 0.3, 0.5, 0.7)))
    assert count_graphs(model, [x, 2 * x]) == 1
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    y = x
    for layer in model:  # one by one, as those of a model that is compiled in regions
        y = torch.compile(layer, fullgraph=True, backend=counter)(y)
    torch.testing.assert_close(y, model(x))
    assert counter.frame_count == 2


def test_ints_that_change():
    """None of these needs a graph for each value; 0, 1 and the number of tokens may have one of their own."""
    x = torch.randn(1, 2, 8, 3, 8)
    tokens, importance = torch.randn(2, 14, 4), torch.rand(2, 12)
    settings: dict[str, tuple[Callable[[int], Any], list[int]]] = {
        "leap": (lambda n: vattn.leap_attention(x, x, x, n), [2, 3, 4, 5, 7]),
        "group_size": (lambda n: vattn.leap_attention(x, x, x, 1, group_size=n), [2, 3, 4, 5, 7]),
        "fold_div": (lambda n: vattn.leap_attention(x, x, x, 1, fold_div=n), [2, 3, 4, 5, 7]),
        "fold_div of the shift": (lambda n: vattn.periodic_shift(x, n), [2, 3, 4, 5, 7]),
        "keep": (lambda n: vattn.select_tokens(tokens, importance, n, num_global=2), [2, 3, 4, 5, 7]),
        "num_global": (lambda n: vattn.select_tokens(tokens, importance[:, n - 2 :], 2, num_global=n), [2, 3, 4, 5]),
    }
    for name, (function, values) in settings.items():
        torch._dynamo.reset()
        assert count_graphs(function, values) <= 2, name


def test_inductor():
    """Gradients too, with the compiler that users have."""

    def attend(x: Tensor, scale: float) -> Any:
        return vattn.leap_attention(x, x, x, 2, scale=scale, fold_div=4)

    compiled = torch.compile(attend, fullgraph=True)
    for scale in (0.1, 0.2, 0.7):
        x = torch.randn(1, 2, 4, 3, 8, requires_grad=True)
        out, expected = compiled(x, scale), attend(x, scale)
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out.sin().sum(), x)[0], torch.autograd.grad(expected.sin().sum(), x)[0])


@pytest.mark.parametrize("op", attentions())
def test_the_op_of_a_graph_for_all_values(op):
    """With tensors in place of the floats, it is the same op."""
    operator = vattn.ops.OPERATORS[op]
    called: list[tuple[Any, ...]] = []
    run = operator.run
    operator.run = lambda *args: called.append(args) or run(*args)
    try:
        attentions()[op](scale=0.3)
    finally:
        del operator.run
    kinds = operator.arguments.values()
    traced = tuple(
        torch.tensor(x, dtype=torch.float64) if kind == "float" else x for x, kind in zip(called[0], kinds, strict=True)
    )
    for x, y in zip(as_tuple(operator.traced.op(*traced)), as_tuple(operator.op(*called[0])), strict=True):
        assert torch.equal(x, y)
    leaf = traced[0].clone().requires_grad_(op in WITH_DROPOUT)
    torch.library.opcheck(operator.traced.op, (leaf, *traced[1:]))
