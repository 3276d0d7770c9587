"""DTensors in the public operators: results, gradients, placements, and what is sent, against plain tensors."""

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import vattn
from tests.calls import as_tuple
from tests.distributed.processes import SentBytes, World, results, run_cases
from tests.layouts import layout_of

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")


class Call(NamedTuple):
    """An operator on tensors of these shapes; what `also` gives beside them are plain tensors of integers."""

    function: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    axes: str  # of each tensor, as "BHLD"
    results: str  # of each result
    also: Callable[[], Sequence[Tensor]] = tuple
    gradients: int | None = None  # of how many tensors, if not of all
    more: Sequence[str] = ()  # other axes along which it mixes nothing
    tokens: Sequence[str] = ()  # and those of which functions over ranks take the parts; "." shards nothing
    sends: Sequence[str] = ()  # among those the ones that send something


def kept(batch: int, count: int, keys: int) -> Tensor:
    return torch.rand(batch, keys, generator=torch.Generator().manual_seed(5)).topk(count).indices


ROWS = [[0, 1], [1], [2], [0], [1, 2], [2, 0], [0], [0, 1], []]
PER_HEAD = layout_of(ROWS, 11, 4, 1, 3)
PER_SAMPLE = layout_of(
    [*ROWS, *ROWS[::-1], *ROWS[1:], []], 11, 4, 1, 3, 3, torch.tensor([4, 2, 10, -1, 0, 7, 9, 1, 3, 5, 6, 8])
)  # and per head, with an order


def edge(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, layout: vattn.BlockLayout = PER_HEAD,
    **settings: Any,
) -> Any:  # fmt: skip
    bias = vattn.RelativePositionBias3D((1, 3, 4), 3)
    del bias.table
    bias.table = table  # type: ignore[assignment]
    return vattn.edge_sparse_attention(
        q, k, v, layout, position_bias=bias, positions=positions, causal=True, return_lse=True, return_importance=True,
        **settings,
    )  # fmt: skip


def blocks(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **settings: Any) -> Any:
    """Shards of whole blocks, and no global token."""
    bias = vattn.RelativePositionBias3D((1, 3, 4), 3, num_global=0)
    del bias.table
    bias.table = table  # type: ignore[assignment]
    layout = layout_of([[0, 2], [3], [1, 2, 0], []], 12, 3, 0)
    return vattn.edge_sparse_attention(q, k, v, layout, position_bias=bias, return_lse=True, **settings)


def importance(q: Tensor, k: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    bias = vattn.RelativePositionBias3D((1, 3, 4), 3)
    del bias.table
    bias.table = table  # type: ignore[assignment]
    return vattn.token_importance(q, k, position_bias=bias, positions=positions)


def positions() -> list[Tensor]:
    return [torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:11] for i in range(3)])]


CALLS = {
    "latent": Call(
        lambda q, k, v, n, **settings: vattn.latent_attention(q, k, v, key_lengths=n, return_lse=True, **settings),
        [(3, 3, 5, 4), *[(3, 3, 7, 4)] * 2], "BHLD BHKD BHKD", "BHLD BHL", lambda: [torch.tensor([0, 7, 5])],
        tokens=["L", "K", "BK", "LH"], sends=["K", "BK"],
    ),
    "latent of two": Call(
        lambda q, a, b, c, d, **settings: vattn.latent_attention(q, (a, b), (c, d), return_lse=True, **settings),
        [(3, 3, 5, 4), (3, 3, 5, 4), (3, 3, 7, 4), (3, 3, 5, 4), (3, 3, 7, 4)], "BHLD BHJD BHKD BHJD BHKD", "BHLD BHL",
        tokens=["L", "K", "BJ", ".K"], sends=["K", "BJ", ".K"],
    ),
    "leap": Call(
        lambda q, k, v, **settings: vattn.leap_attention(q, k, v, 2, fold_div=4, return_lse=True, **settings),
        [(3, 3, 5, 2, 4)] * 3, "BHTND BHTND BHTND", "BHTND BHTN",
        tokens=["T", "TB", "HT"], sends=["T", "TB", "HT"],
    ),
    "axial": Call(
        lambda q, k, v, **settings: vattn.axial_attention(q, k, v, 1, return_lse=True, **settings),
        [(3, 3, 2, 3, 2, 4)] * 3, "BHTXYD BHTXYD BHTXYD", "BHTXYD BHTXY",
        tokens=["T", "X", "Y", "BX", "YH"], sends=["X", "BX"],
    ),
    "edge": Call(
        edge, [*[(3, 3, 12, 4)] * 3, (5 * 7 + 3, 3)], "BHLD BHLD BHLD RI", "BHLD BHL BN", positions,
    ),
    "edge per sample": Call(
        functools.partial(edge, layout=PER_SAMPLE), [*[(3, 3, 12, 4)] * 3, (5 * 7 + 3, 3)], "BHLD BHLD BHLD RI",
        "BHLD BHL BN", positions,
    ),
    "blocks": Call(
        blocks, [*[(3, 3, 12, 4)] * 3, (5 * 7, 3)], "BHLD BHLD BHLD RI", "BHLD BHL", tokens=["L", "LB", "HL"],
        sends=["L", "LB", "HL"],
    ),
    "node": Call(
        lambda *x, **settings: vattn.node_sparse_attention(*x, return_lse=True, **settings),
        [(3, 3, 5, 4), *[(3, 3, 7, 4)] * 2], "BHLD BHKD BHKD", "BHLD BHL", lambda: [kept(3, 4, 7)],
        tokens=["L", "K", "BL", "KH"], sends=["K", "KH"],
    ),
    "merge": Call(
        lambda a, b, c, d: vattn.merge_attention([a, b], [c, d]),
        [*[(3, 3, 5, 4)] * 2, *[(3, 3, 5)] * 2], "BHLD BHLD BHL BHL", "BHLD BHL", more=["L", "LB"],
    ),
    "shift": Call(
        lambda x: vattn.periodic_shift(x, 4), [(3, 3, 5, 2, 4)], "BHTND", "BHTND", more=["N", "NB"], tokens=["T", "BT"],
        sends=["T", "BT"],
    ),
    "importance": Call(
        lambda q, k, n: vattn.token_importance(q, k, key_lengths=n),
        [(3, 3, 5, 4), (3, 3, 7, 4)], "BHLD BHKD", "BK", lambda: [torch.tensor([1, 7, 5])], gradients=0,
        tokens=["L", "K", "LH", "BK"], sends=["K", "BK"],
    ),
    "importance of a given lse": Call(
        lambda q, k, lse: vattn.token_importance(q, k, lse=lse), [(3, 3, 5, 4), (3, 3, 7, 4), (3, 3, 5)],
        "BHLD BHKD BHL", "BK", gradients=0, tokens=["L", "K", "KH"],
    ),
    "importance with a bias": Call(
        importance, [*[(3, 3, 12, 4)] * 2, (5 * 7 + 3, 3)], "BHLD BHLD RI", "BL", positions, gradients=0,
    ),
    "select": Call(
        lambda x, n: vattn.select_tokens(x, n, 0.5), [(3, 12, 5), (3, 11)], "BLC BN", "BMC BM", gradients=1,
        more=["C", "BC"],
    ),
    "nearest": Call(
        vattn.nearest_code, [(3, 3, 5, 4), (6, 4)], "BHLC KD", "BHL", gradients=0, more=["L"]
    ),
}  # fmt: skip
BATCH_AND_HEADS = ("B", "H", "BB", "BH", "HB")
WITH_DROPOUT = ("latent", "latent of two", "leap", "axial", "edge", "blocks", "node")


def ways(name: str, dims: int) -> list[str]:
    """Which axis each dimension of a mesh shards."""
    call = CALLS[name]
    free = [way for way in BATCH_AND_HEADS if set(way) <= set(call.axes.split()[0])]
    return [way for way in (*free, *call.more, *call.tokens) if len(way) == dims]


def placements(axes: str, way: str) -> list[Placement]:
    return [Shard(axes.index(axis)) if axis in axes else Replicate() for axis in way]


def mesh_of(world: World) -> DeviceMesh:
    """Two ranks in a row, or four in a square."""
    return init_device_mesh("cpu", (2, 2)) if world.size == 4 else DeviceMesh.from_group(world.group, "cpu")


def difference(x: Tensor, y: Tensor) -> float:
    return float(torch.where(x == y, 0, (x - y).abs()).max())


def compare(call: Call, mesh: DeviceMesh, way: str, dropout_p: float) -> dict[str, Any]:
    settings = {"dropout_p": dropout_p} if dropout_p else {}
    torch.manual_seed(0)
    plain = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in call.shapes]
    torch.manual_seed(1)
    expected = as_tuple(call.function(*plain, *call.also(), **settings))
    along = [torch.randn(y.shape, dtype=torch.float64) for y in expected if y.requires_grad]
    parts = [
        distribute_tensor(x.detach(), mesh, placements(axes, way), src_data_rank=None).requires_grad_()
        for x, axes in zip(plain, call.axes.split(), strict=True)
    ]
    torch.manual_seed(1 + dist.get_rank())  # the seed of the first rank counts
    with SentBytes() as sent:
        results = cast(tuple[DTensor, ...], as_tuple(call.function(*parts, *call.also(), **settings)))
    result = {
        "placements": [x.placements for x in results],
        "metadata": [(x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(results, expected, strict=True)],
        "stride": results[0].stride() == expected[0].stride(),
        "errors": [difference(x.full_tensor().detach(), y.detach()) for x, y in zip(results, expected, strict=True)],
        "sent": sent.total,
    }
    if along:
        count = call.gradients
        some = [(x, y) for x, y in zip(results, expected, strict=True) if y.requires_grad]
        right = torch.autograd.grad([y for _, y in some], plain[:count], along)
        here = [
            distribute_tensor(g, mesh, x.placements, src_data_rank=None) for g, (x, _) in zip(along, some, strict=True)
        ]
        with SentBytes() as sent:
            grads = cast(tuple[DTensor, ...], torch.autograd.grad([x for x, _ in some], parts[:count], here))
        result["sent"] += sent.total
        result["errors"] += [difference(x.full_tensor(), y) for x, y in zip(grads, right, strict=True)]
    return result


def case(world: World, name: str) -> dict[tuple[str, float], Any]:
    """All ways to shard a call, with and without dropout."""
    mesh = mesh_of(world)
    return {
        (way, dropout_p): compare(CALLS[name], mesh, way, dropout_p)
        for way in ways(name, mesh.ndim)
        for dropout_p in ((0.0, 0.4) if name in WITH_DROPOUT else (0.0,))
    }


def refusals(world: World) -> dict[str, tuple[Any, str]]:
    """What is raised for calls that nothing is gathered for."""
    mesh, other = mesh_of(world), DeviceMesh.from_group(world.group, "cpu", mesh_dim_names=("other",))
    sharded = [Replicate()] * (mesh.ndim - 1)

    def placed(x: Tensor, *placements: Placement) -> DTensor:
        return distribute_tensor(x, mesh, [*sharded, *placements], src_data_rank=None)

    def partial(x: Tensor) -> DTensor:
        return DTensor.from_local(x, mesh, [*sharded, Partial()])

    x, video = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 3, 4, 4)

    def leap(x: Tensor) -> Any:
        return vattn.leap_attention(x, x, x, 1)

    def edges(x: Tensor, layout: vattn.BlockLayout) -> Any:
        return vattn.edge_sparse_attention(x, x, x, layout)

    batch, heads, rest = placed(x, Shard(0)), placed(x, Shard(1)), placed(x, Replicate())
    global_token, per_head = layout_of([[0], [0]], 5, 3, 1), layout_of([[0, 1], [1]], 6, 3, 0)
    calls: dict[str, Callable[[], Any]] = {
        "key is not sharded": lambda: vattn.latent_attention(batch, rest, rest),
        "value is sharded otherwise": lambda: vattn.latent_attention(batch, batch, placed(x, Shard(1))),
        "queries and keys": lambda: vattn.latent_attention(*[placed(x, Shard(2))] * 3),
        "channels": lambda: vattn.latent_attention(*[placed(x, Shard(3))] * 3),
        "channels from the back": lambda: leap(placed(video, Shard(-1))),
        "tokens of a frame": lambda: leap(placed(video, Shard(3))),
        "partial": lambda: vattn.latent_attention(partial(x), rest, rest),
        "plain key": lambda: vattn.latent_attention(batch, x, x),
        "plain query": lambda: vattn.latent_attention(x, batch, batch),
        "one of two keys": lambda: vattn.latent_attention(batch, (batch, x), (batch, x)),
        "another mesh": lambda: vattn.merge_attention([batch], [DTensor.from_local(x[..., 0], other, [Replicate()])]),
        "global tokens": lambda: edges(placed(x, Shard(2)), global_token),
        "half a block": lambda: edges(placed(torch.randn(1, 1, 5, 4), Shard(2)), layout_of([[0], [0], [1]], 5, 2, 0)),
        "shape": lambda: vattn.edge_sparse_attention(batch, batch, placed(x[:, :, :5], Shard(0)), per_head),
        "tokens to select": lambda: vattn.select_tokens(
            placed(x[:, 0], Shard(1)), placed(x[:, 0, :, 0], Shard(1)), 2, num_global=0
        ),
        "codes": lambda: vattn.nearest_code(batch, placed(x[0, 0], Shard(0))),
        "kept otherwise": lambda: vattn.node_sparse_attention(
            heads, heads, heads, placed(torch.zeros(2, 3, dtype=torch.int64), Shard(0))
        ),
        "over ranks": lambda: vattn.distributed.latent_attention(rest, rest, rest, group=world.group),
        "a table without a query": lambda: vattn.token_importance(x, x, position_bias=bias_of(placed)),
    }
    raised = {}
    for name, call in calls.items():
        sent = SentBytes()
        with sent if name != "over ranks" else contextlib.nullcontext():  # where the ranks tell each other
            try:
                raised[name] = type(call()), "nothing was raised"
            except (TypeError, ValueError) as error:
                raised[name] = type(error), str(error)
        assert sent.total == 0
    return raised


def bias_of(placed: Callable[..., DTensor]) -> vattn.RelativePositionBias3D:
    bias = vattn.RelativePositionBias3D((1, 1, 6), 2, 0)
    bias.table = torch.nn.Parameter(placed(bias.table.detach(), Replicate()))
    return bias


REFUSED = {
    "key is not sharded": (ValueError, r"latent_attention: key must be sharded as query is, .*got key.placements="),
    "value is sharded otherwise": (ValueError, r"latent_attention: value must be sharded as query is, .*got value.pl"),
    "queries and keys": (ValueError, r"latent_attention: query and key must not be sharded along their tokens by one"),
    "channels": (ValueError, r"latent_attention: query must be whole along its axis D on every rank, .*got query.pla"),
    "channels from the back": (ValueError, r"leap_attention: query must be whole along its axis D on every rank"),
    "tokens of a frame": (ValueError, r"leap_attention: query must be whole along its axis N on every rank, .*got"),
    "partial": (ValueError, r"latent_attention: query must be sharded or replicated along every dimension of its mesh"),
    "plain key": (TypeError, r"latent_attention: key must be a DTensor, as query is, got key=Tensor"),
    "plain query": (TypeError, r"latent_attention: query must be a DTensor, as key is, got query=Tensor"),
    "one of two keys": (TypeError, r"latent_attention: key\[1\] must be a DTensor, as query is, got key\[1\]=Tensor"),
    "another mesh": (ValueError, r"merge_attention: lses\[0\] must lie on the mesh .*got lses\[0\].device_mesh="),
    "global tokens": (ValueError, r"edge_sparse_attention: query must be whole along its axis L on every rank"),
    "half a block": (ValueError, r"distributed.edge_sparse_attention: .*block"),
    "shape": (ValueError, r"edge_sparse_attention: value must have the shape of query"),
    "tokens to select": (ValueError, r"select_tokens: tokens must be sharded as|select_tokens: tokens must be whole"),
    "codes": (ValueError, r"nearest_code: codebook must be replicated, or sharded as x is, got codebook.placements="),
    "kept otherwise": (ValueError, r"node_sparse_attention: kept must be replicated, or sharded as query is, got kept"),
    "over ranks": (TypeError, r"distributed.latent_attention: query must be a local tensor, see DTensor.to_local, got"),
    "a table without a query": (TypeError, r"RelativePositionBias3D: table must be a local tensor"),
}


class TensorParallel(torch.nn.Module):
    """Attention whose heads lie on the ranks, as PyTorch's own `parallelize_module` places them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 2)).movedim(-2, 1) for layer in (self.query, self.key, self.value))
        out = cast(Tensor, vattn.leap_attention(q, k, v, 1, fold_div=2))
        return self.proj(out.movedim(1, -2).flatten(-2))


def tensor_parallel(world: World) -> dict[str, float]:
    """The largest difference of the output and of every parameter's gradient, also under autocast."""
    torch.manual_seed(0)
    mesh = DeviceMesh.from_group(world.group, "cpu")
    x, model = torch.randn(2, 3, 5, 8), TensorParallel()
    parallel = copy.deepcopy(model)
    heads = {name: ColwiseParallel(use_local_output=False) for name in ("query", "key", "value")}
    parallelize_module(parallel, mesh, {**heads, "proj": RowwiseParallel()})
    errors = {}
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            with SentBytes() as sent:
                outs = [one(x) for one in (model, parallel)]
        errors[f"{dtype} sent"] = sent.total - outs[0].nbytes  # of the sum after the projection, and nothing else
        for one, out in zip((model, parallel), outs, strict=True):
            one.zero_grad()
            out.float().square().mean().backward()
        errors[f"{dtype} out"] = difference(*(out.detach().float() for out in outs))
        for (name, a), b in zip(model.named_parameters(), parallel.parameters(), strict=True):
            assert b.grad is not None and a.grad is not None
            whole = b.grad.full_tensor() if isinstance(b.grad, DTensor) else b.grad
            errors[f"{dtype} {name}"] = difference(a.grad, whole)
    return errors


def compiled(world: World) -> dict[str, float]:
    """One graph of every call, forward and backward, and what it gives."""
    mesh = DeviceMesh.from_group(world.group, "cpu")
    differences = {}
    for name, way in (("latent", "H"), ("latent", "K"), ("leap", "H"), ("node", "B")):
        torch._dynamo.reset()
        call = CALLS[name]
        torch.manual_seed(0)
        parts = [
            distribute_tensor(torch.randn(shape), mesh, placements(axes, way), src_data_rank=None).requires_grad_()
            for shape, axes in zip(call.shapes, call.axes.split(), strict=True)
        ]

        def step(*parts: Any, call: Call = call, also: Sequence[Tensor] = call.also()) -> Any:
            return call.function(*parts, *also)[0]

        results = []
        for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            out = function(*parts)
            results.append([out, *torch.autograd.grad(out, parts, torch.ones_like(out))])
        differences[f"{name} {way}"] = max(
            difference(x.detach().full_tensor(), y.detach().full_tensor()) for x, y in zip(*results, strict=True)
        )
    return differences


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases: dict[str, Callable[[World], Any]] = {name: functools.partial(case, name=name) for name in CALLS}
    cases |= {"refusals": refusals, "tensor_parallel": tensor_parallel, "compiled": compiled}
    return run_cases(cases, tmp_path_factory.mktemp("dtensor"), sizes=(2, 4))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_that_an_operator_is_what_it_is_on_one_device(found, name, size):
    call = CALLS[name]
    for result in results(found, name, size):
        assert {way for way, _ in result} == set(ways(name, 1 if size == 2 else 2))
        for (way, dropout_p), one in result.items():
            assert max(one["errors"]) < 1e-10, (way, dropout_p, one["errors"])
            assert all(one["metadata"]) and one["stride"], way
            for axes, placed in zip(call.results.split(), one["placements"], strict=True):
                summed = axes in ("BK", "BN", "BL") and name.startswith(("edge", "importance"))
                expected = [
                    Shard(axes.index(axis)) if axis in axes else Partial() if summed else Replicate() for axis in way
                ]
                assert list(placed) == expected, way
            assert (one["sent"] > 0) == (way in call.sends), way


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_nothing_is_sent(found, name, size):
    kind, message = REFUSED[name]
    for raised in results(found, "refusals", size):
        assert raised.keys() == REFUSED.keys()
        assert raised[name][0] is kind and re.match(message, raised[name][1]), raised[name]


@pytest.mark.parametrize("size", [2, 4])
def test_a_layer_that_pytorch_parallelizes(found, size):
    for errors in results(found, "tensor_parallel", size):
        for name, error in errors.items():
            assert error < (0 if "sent" in name else 2e-2 if "bfloat16" in name else 1e-6) or error == 0, name


def test_one_graph(found):
    for differences in results(found, "compiled", 2):
        assert max(differences.values()) < 1e-6, differences
