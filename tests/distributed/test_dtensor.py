"""DTensors in the public operators: results, gradients, placements, and what is sent, against plain tensors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

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


def edge(q: Tensor, k: Tensor, v: Tensor, table: Tensor, positions: Tensor, **settings: Any) -> Any:
    bias = vattn.RelativePositionBias3D((1, 3, 4), 3)
    del bias.table
    bias.table = table
    layout = layout_of([[0, 1], [1], [2], [0], [1, 2], [2, 0], [0], [0, 1], []], 11, 4, 1, 3)
    return vattn.edge_sparse_attention(
        q, k, v, layout, position_bias=bias, positions=positions, causal=True, return_lse=True, return_importance=True,
        **settings,
    )  # fmt: skip


def blocks(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **settings: Any) -> Any:
    """Shards of whole blocks, and no global token."""
    bias = vattn.RelativePositionBias3D((1, 3, 4), 3, num_global=0)
    del bias.table
    bias.table = table
    layout = layout_of([[0, 2], [3], [1, 2, 0], []], 12, 3, 0)
    return vattn.edge_sparse_attention(q, k, v, layout, position_bias=bias, return_lse=True, **settings)


def importance(q: Tensor, k: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    bias = vattn.RelativePositionBias3D((1, 3, 4), 3)
    del bias.table
    bias.table = table
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
        lambda *x, **settings: vattn.leap_attention(*x, 2, fold_div=4, return_lse=True, **settings),
        [(3, 3, 5, 2, 4)] * 3, "BHTND BHTND BHTND", "BHTND BHTN",
        tokens=["T", "TB", "HT"], sends=["T", "TB", "HT"],
    ),
    "axial": Call(
        lambda *x, **settings: vattn.axial_attention(*x, 1, return_lse=True, **settings),
        [(3, 3, 2, 3, 2, 4)] * 3, "BHTXYD BHTXYD BHTXYD", "BHTXYD BHTXY",
        tokens=["T", "X", "Y", "BX", "YH"], sends=["X", "BX"],
    ),
    "edge": Call(
        edge, [*[(3, 3, 12, 4)] * 3, (5 * 7 + 3, 3)], "BHLD BHLD BHLD RI", "BHLD BHL BN", positions,
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
    "shift": Call(lambda x: vattn.periodic_shift(x, 4), [(3, 3, 5, 2, 4)], "BHTND", "BHTND", more=["N", "NB"], tokens=["T", "BT"], sends=["T", "BT"]),
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
        distribute_tensor(x.detach(), mesh, placements(axes, way)).requires_grad_()
        for x, axes in zip(plain, call.axes.split(), strict=True)
    ]
    torch.manual_seed(1 + dist.get_rank())  # the seed of the first rank counts
    with SentBytes() as sent:
        results = as_tuple(call.function(*parts, *call.also(), **settings))
    result = {
        "placements": [x.placements for x in results],
        "metadata": [(x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype) for x, y in zip(results, expected)],
        "errors": [difference(x.detach().full_tensor(), y.detach()) for x, y in zip(results, expected, strict=True)],
        "sent": sent.total,
    }
    if along:
        count = call.gradients
        some = [(x, y) for x, y in zip(results, expected, strict=True) if y.requires_grad]
        right = torch.autograd.grad([y for _, y in some], plain[:count], along)
        here = [distribute_tensor(g, mesh, x.placements) for g, (x, _) in zip(along, some, strict=True)]
        with SentBytes() as sent:
            grads = torch.autograd.grad([x for x, _ in some], parts[:count], here)
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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = {name: functools.partial(case, name=name) for name in CALLS}
    return run_cases(cases, tmp_path_factory.mktemp("dtensor"), sizes=(2, 4))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_that_an_operator_is_what_it_is_on_one_device(found, name, size):
    call = CALLS[name]
    for result in results(found, name, size):
        assert set(way for way, _ in result) == set(ways(name, 1 if size == 2 else 2))
        for (way, dropout_p), one in result.items():
            assert max(one["errors"]) < 1e-10, (way, dropout_p, one["errors"])
            assert all(one["metadata"]), way
            for axes, placed in zip(call.results.split(), one["placements"], strict=True):
                summed = axes in ("BK", "BN", "BL") and name.startswith(("edge", "importance"))
                expected = [
                    Shard(axes.index(axis)) if axis in axes else Partial() if summed else Replicate() for axis in way
                ]
                assert list(placed) == expected, way
            assert (one["sent"] > 0) == (way in call.sends), way
