"""Functions over ranks that PyTorch compiles, differentiates in every mode, checkpoints, and runs in other dtypes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.distributed.processes import World, results, run_cases
from tests.layouts import layout_of
from vattn import distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
LENGTHS = [4, 2]
LAYOUT = layout_of([[0, 2], [1, 0], [2]], 6, 2, 1)


Step = Callable[..., Tensor]


def by_keys(group: Any, lengths: Any, q: Tensor, x: Tensor) -> Tensor:
    return distributed.latent_attention(q, x, x.sin(), group=group, lengths=lengths)  # type: ignore[return-value]


def by_queries(group: Any, lengths: Any, q: Tensor, x: Tensor) -> Tensor:
    return distributed.latent_attention(x, q, q.sin(), group=group, sharded="queries", lengths=lengths)  # type: ignore[return-value]


def of_two(group: Any, lengths: Any, q: Tensor, x: Tensor) -> Tensor:
    lengths = None if lengths is None else [None, lengths]
    how = ("replicated", "keys")
    return distributed.latent_attention(q, (q, x), (q.sin(), x), group=group, sharded=how, lengths=lengths)  # type: ignore[return-value]


def frames(group: Any, lengths: Any, q: Tensor, x: Tensor) -> Tensor:
    x = x[:, :, :, None] + q.sum()
    return distributed.leap_attention(x, x.sin(), x, 2, group=group, fold_div=4, lengths=lengths)  # type: ignore[return-value]


def lines(group: Any, lengths: Any, q: Tensor, x: Tensor) -> Tensor:
    x = x + q.sum()
    return distributed.axial_attention(x, x.sin(), x, 0, group=group, lengths=lengths)  # type: ignore[return-value]


def blocks(group: Any, lengths: Any, q: Tensor, x: Tensor) -> Tensor:
    x = torch.cat([q[:, :, :1], x], 2)
    return distributed.edge_sparse_attention(x, x.sin(), x, LAYOUT, group=group, lengths=lengths)  # type: ignore[return-value]


def nodes(group: Any, lengths: Any, q: Tensor, x: Tensor) -> Tensor:
    kept = torch.tensor([[0, 5, 3], [4, 4, 1]])
    return distributed.node_sparse_attention(q, x, x.sin(), kept, group=group, lengths=lengths)  # type: ignore[return-value]


STEPS: dict[str, Step] = {step.__name__: step for step in (by_keys, by_queries, of_two, frames, lines, blocks, nodes)}


def inputs(world: World, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What is replicated, and this rank's shard."""
    generator = torch.Generator().manual_seed(0)
    q, x = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64).to(dtype) for n in (3, 6))
    return [q.requires_grad_(), world.shard(x, LENGTHS, 2).requires_grad_()]


def grads_of(function: Callable[..., Tensor], tensors: Sequence[Tensor], **how: Any) -> list[Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out.square().sum(), tensors, **how)]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((x - y).detach().abs().double().max()) for x, y in zip(found, expected, strict=True) if x.numel())


def compiled(world: World, name: str, known: bool) -> dict[str, Any]:
    """One step of training, compiled, against the same step without."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tensors = inputs(world, torch.float32)
    step = functools.partial(STEPS[name], world.group, LENGTHS if known else None)

    def layer(q: Tensor, x: Tensor) -> Tensor:
        return step(q * 2, x.cos()).tanh()

    expected = grads_of(layer, tensors)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=known)
    found = [error(grads_of(compiled, tensors), expected) for _ in range(2)]
    reasons = torch._dynamo.utils.counters["graph_break"]
    return {
        "error": max(found),
        "breaks": list(reasons),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def derivatives(world: World, name: str) -> dict[str, float]:
    """Errors of derivatives of every kind, against what reverse mode says."""
    step = functools.partial(STEPS[name], world.group, None)
    tensors = inputs(world)
    directions = [x.detach().sin() for x in tensors]
    _, *grads = grads_of(step, tensors)

    def total(q: Tensor, x: Tensor) -> Tensor:
        """The sum over all ranks; what is replicated counts once, but for what each rank takes for itself."""
        whole = torch.stack([q.sum(), x.sum()]).detach()
        if name not in ("frames", "lines"):
            whole[0] /= world.size
        dist.all_reduce(whole, group=world.group)
        return whole.sum()

    found = {}
    along = torch.func.jvp(step, tuple(x.detach() for x in tensors), tuple(directions))[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), t) for x, t in zip(tensors, directions, strict=True)]
        found["forward mode"] = error([forward_ad.unpack_dual(step(*duals)).tangent], [along])
    h = 1e-6
    ahead, behind = (step(*(x.detach() + s * t for x, t in zip(tensors, directions, strict=True))) for s in (h, -h))
    found["jvp and differences"] = error([(ahead - behind) / (2 * h)], [along]) / 1e4  # which are good to 1e-8
    of_func = torch.func.grad(lambda *x: step(*x).square().sum(), argnums=(0, 1))(*(x.detach() for x in tensors))
    found["torch.func.grad"] = error(of_func, grads)
    again = grads_of(step, tensors, create_graph=True)[1:]
    second = torch.autograd.grad([y.square().sum() for y in again], tensors)

    def gradients(*x: Tensor) -> list[Tensor]:
        some = [y.detach().requires_grad_() for y in x]
        return grads_of(step, some)[1:]

    # d/dt |grad(x + t v)|^2 = v . second
    moved = [
        total(*(y.square() for y in gradients(*(x + s * t for x, t in zip(tensors, directions, strict=True)))))
        for s in (h, -h)
    ]
    slope = (moved[0] - moved[1]) / (2 * h)
    product = total(*(x * t for x, t in zip(second, directions, strict=True)))
    found["second derivatives"] = float((slope - product).abs() / product.abs()) / 1e4
    return found


def modes(world: World, name: str) -> dict[str, float]:
    """Errors of a step that is checkpointed, without gradients, in other dtypes; bits that differ between two runs."""
    step = functools.partial(STEPS[name], world.group, None)
    tensors = inputs(world, torch.float32)
    expected = grads_of(step, tensors)
    found = {}
    for reentrant in (False, True):
        tried = grads_of_backward(lambda *x: checkpoint(step, *x, use_reentrant=reentrant), tensors)  # noqa: B023
        found[f"checkpoint, reentrant={reentrant}"] = error(tried, expected)
    with torch.no_grad():
        found["no_grad"] = error([step(*tensors)], expected[:1])
    with torch.inference_mode():
        found["inference_mode"] = error([step(*tensors)], expected[:1])
    torch.use_deterministic_algorithms(True)
    found["deterministic"] = error(grads_of(step, tensors), expected)
    torch.use_deterministic_algorithms(False)
    for dtype in (torch.float16, torch.bfloat16):
        low = inputs(world, dtype)
        tried = grads_of(lambda *x: step(*x).float(), low)
        assert [x.dtype for x in tried] == [torch.float32, dtype, dtype]
        size = max(float(x.detach().abs().max()) for x in expected)
        found[f"{dtype}"] = error(tried, expected) / size / 1e4
    with torch.autocast("cpu", torch.bfloat16):
        tried = grads_of(lambda *x: step(*x).float(), tensors)
    assert [x.dtype for x in tried] == [torch.float32] * 3
    found["autocast"] = error(tried, expected) / size / 1e4
    return found


def grads_of_backward(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """As :func:`grads_of`, for what `torch.autograd.grad` refuses."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    out.square().sum().backward()
    return [out, *(x.grad for x in leaves if x.grad is not None)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases: dict[str, Callable[[World], Any]] = {}
    for name in STEPS:
        cases[f"compiled {name}"] = functools.partial(compiled, name=name, known=True)
        cases[f"derivatives {name}"] = functools.partial(derivatives, name=name)
        cases[f"modes {name}"] = functools.partial(modes, name=name)
    for name in ("by_keys", "frames"):
        cases[f"asking {name}"] = functools.partial(compiled, name=name, known=False)
    return run_cases(cases, tmp_path_factory.mktemp("compile"), sizes=(2,))


@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_of_training(found, name):
    """With known lengths it is one graph."""
    for one in results(found, f"compiled {name}", 2):
        assert one["error"] < 1e-6 and one["graphs"] == 1 and not one["breaks"]


@pytest.mark.parametrize("name", ["by_keys", "frames"])
def test_a_graph_break_where_the_ranks_ask_each_other_only(found, name):
    for one in results(found, f"asking {name}", 2):
        assert one["error"] < 1e-6
        assert len(one["breaks"]) == 1 and "_handshake" in one["breaks"][0], one["breaks"]


@pytest.mark.parametrize("name", STEPS)
def test_derivatives_of_every_kind(found, name):
    for errors in results(found, f"derivatives {name}", 2):
        assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("name", STEPS)
def test_modes(found, name):
    for errors in results(found, f"modes {name}", 2):
        assert max(errors.values()) < 1e-5, errors
