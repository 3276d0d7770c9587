"""Node-sparse attention, token importance and the selection of tokens over ranks, against one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import vattn
from tests.distributed.processes import Found, SentBytes, World, lengths_of, results, run_cases
from vattn import distributed

SIZES = (2, 3, 4)
EXACT = 1e-10
LENGTHS = (0, 1, 63)


def largest(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, where NaN and infinities must be the same."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    torch.testing.assert_close(found.isfinite(), wanted.isfinite())
    differences = torch.where(found.isfinite(), found - wanted, 0).detach().abs()
    return float(differences.amax()) if found.numel() > 0 else 0.0


def message(call: Callable[[], Any]) -> str:
    """What error a call raises."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class NodeSparse:
    """Queries, keys and kept ones, all of them, and what one process makes of them."""

    def __init__(self, world: World, length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.world, self.lengths = world, lengths_of(length, world.size, seed + length)
        self.inputs = [torch.randn(2, 3, n, 8, dtype=dtype).requires_grad_() for n in (5, length, length)]
        self.tangents = [torch.randn_like(x) for x in self.inputs]
        self.kept = torch.randint(max(length, 1), (2, 9 if length > 0 else 0))  # some more than once
        self.weights = torch.randn(world.size, 2, 3, 5, 9, dtype=dtype)

    def own(self, tensors: list[Tensor]) -> list[Tensor]:
        query, *rest = tensors
        mine = query.detach().clone().requires_grad_()
        return [mine, *(self.world.shard(x.detach().requires_grad_(), self.lengths, 2) for x in rest)]

    def packed(self, function: Any, inputs: list[Tensor], **settings: Any) -> Tensor:
        out, lse = function(*inputs, self.kept, return_lse=True, **settings)
        return torch.cat([out, lse.to(out.dtype).masked_fill(lse == -torch.inf, 0)[..., None]], -1)


def node_sparse(world: World) -> dict[str, float]:
    found: dict[str, float] = {}
    for length, grad, dropout_p, known in (
        (63, "full", 0.0, True), (63, "partial", 0.3, False), (1, "full", 0.3, False), (0, "full", 0.0, False),
    ):  # fmt: skip
        x = NodeSparse(world, length)
        weights = x.weights.sum(0)
        torch.manual_seed(7)
        wanted = x.packed(vattn.node_sparse_attention, x.inputs, dropout_p=dropout_p)
        truth = torch.autograd.grad(wanted, x.inputs, weights)
        own = x.own(x.inputs)
        settings = {"group": world.group, "grad": grad, "dropout_p": dropout_p}
        torch.manual_seed(7 + world.rank)  # the seed is that of rank 0
        out = x.packed(distributed.node_sparse_attention, own, lengths=x.lengths if known else None, **settings)
        grads = list(torch.autograd.grad(out, own, weights if grad == "full" else x.weights[world.rank]))
        if grad == "partial":
            grads[0] = world.add_up(grads[0])
        name = f"{length} {grad}"
        found[f"{name} out"] = largest(out, wanted)
        for i, (mine, whole) in enumerate(zip(grads, truth, strict=True)):
            found[f"{name} grad {i}"] = largest(mine, whole if i == 0 else world.shard(whole, x.lengths, 2))
        with forward_ad.dual_level():
            duals = list(map(forward_ad.make_dual, x.inputs, x.tangents))
            own_duals = list(map(forward_ad.make_dual, x.own(x.inputs), x.own(x.tangents)))
            torch.manual_seed(7)
            whole = x.packed(vattn.node_sparse_attention, duals, dropout_p=dropout_p)
            torch.manual_seed(7 + world.rank)
            mine = x.packed(distributed.node_sparse_attention, own_duals, **settings)
            found[f"{name} tangent"] = largest(*(forward_ad.unpack_dual(y).tangent for y in (mine, whole)))
    return found


def node_sparse_of_float32(world: World) -> dict[str, float]:
    x = NodeSparse(world, 40, torch.float32)
    own = x.own(x.inputs)
    with SentBytes() as sent:
        out = x.packed(distributed.node_sparse_attention, own, group=world.group)
        forward = sent.total
        torch.autograd.grad(out, own, x.weights[0])
    named: dict[str, Any] = {"rank": world.rank, "size": world.size, "lengths": x.lengths}
    inputs = [*(y.detach() for y in own), x.kept]
    return {
        "out": largest(out, x.packed(vattn.node_sparse_attention, x.inputs)),
        "forward bytes": forward, "bytes": sent.total,
        "forward formula": distributed.bytes_sent("node_sparse_attention", *inputs, **named),
        "formula": distributed.bytes_sent("node_sparse_attention", *inputs, backward=True, **named),
    }  # fmt: skip


def importance(world: World) -> dict[str, float]:
    found = {}
    for length, dtype in ((63, torch.float64), (63, torch.float32), (1, torch.float64), (0, torch.float64)):
        x = NodeSparse(world, length, dtype, seed=3)
        query, key, _ = x.inputs
        for some in (None, torch.tensor([length // 2, length])):
            wanted = vattn.token_importance(query, key, key_lengths=some)
            for lengths in (None, x.lengths):
                mine = distributed.token_importance(
                    query, x.own(x.inputs)[1], group=world.group, lengths=lengths, key_lengths=some
                )
                name = f"{length} {dtype} {'all' if some is None else 'some'} {lengths is None}"
                found[name] = largest(mine, world.shard(wanted, x.lengths, 1))
    return found


def importance_aside(world: World) -> dict[str, Any]:
    """What is sent, compiled calls, dual inputs, NaN, and what is refused."""
    x = NodeSparse(world, 40, torch.float32, seed=3)
    query, key, _ = x.own(x.inputs)
    with SentBytes() as sent:
        plain = distributed.token_importance(query, key, group=world.group)
    with forward_ad.dual_level():
        dual = distributed.token_importance(
            forward_ad.make_dual(query, query), forward_ad.make_dual(key, key), group=world.group
        )
        tangent = forward_ad.unpack_dual(dual).tangent
    broken = query.detach().clone()
    broken[0, 0, 0, 0] = torch.nan
    nan = distributed.token_importance(broken, key, group=world.group)
    bias: Any = vattn.RelativePositionBias3D((1, 1, 5), 3)
    return {
        "tangent": tangent is None, "gradient": plain.requires_grad, "nan": nan.isnan().any(1).tolist(),
        "bytes": sent.total, "keys": key.shape[2],
        "formula": distributed.bytes_sent(
            "token_importance", query.detach(), key.detach(), rank=world.rank, size=world.size, lengths=x.lengths
        ),
        "bias": message(lambda: distributed.token_importance(query, key, group=world.group, position_bias=bias)),
        "lengths": message(
            lambda: distributed.token_importance(query, key, group=world.group, key_lengths=torch.tensor([41, 0]))
        ),
    }  # fmt: skip


def compiled(world: World) -> dict[str, float]:
    """Without a break in the graph, where lengths are known."""
    found: dict[str, float] = {}
    if world.size != 2:
        return found
    x = NodeSparse(world, 40, torch.float32)
    more = {"group": world.group, "lengths": x.lengths}
    calls: list[list[Tensor]] = []
    for wrapped in (lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"), lambda f: f):
        own = x.own(x.inputs)
        out = wrapped(distributed.node_sparse_attention)(*own, x.kept, **more)
        importance = wrapped(distributed.token_importance)(*own[:2], **more)
        selected = wrapped(distributed.select_tokens)(own[1][:, 0], importance, 7, num_global=0, **more)[0]
        calls.append([out, importance, selected, *torch.autograd.grad(out.sum() + selected.sum(), own)])
    names = "out", "importance", "selected", "query", "key", "value"
    for name, mine, plain in zip(names, *calls, strict=True):
        found[name] = largest(mine, plain)
    return found


def selection(world: World) -> dict[str, float]:
    found: dict[str, float] = {}
    for (length, G), keep in ((pair, k) for pair in ((63, 1), (63, 0), (1, 3), (0, 2)) for k in (0.4, 0, 1, 1.0)):
        if isinstance(keep, int) and keep > length:
            continue
        for how in ("ties", "any", "not finite"):
            torch.manual_seed(length + G)
            tokens = torch.randn(3, G + length, 4, dtype=torch.float64, requires_grad=True)
            scores = torch.randint(4, (3, length)).float() if how == "ties" else torch.randn(3, length)
            if how == "not finite":
                odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
                scores = odd[torch.randint(4, (3, length))]
            positions = torch.randint(100, (3, length)) if how == "any" else None
            wanted, places = vattn.select_tokens(tokens, scores, keep, positions=positions, num_global=G)
            numbers = vattn.select_tokens(tokens, scores, keep, num_global=G)[1]
            weights = torch.randn_like(wanted)
            (truth,) = torch.autograd.grad(wanted, tokens, weights)

            lengths = lengths_of(length, world.size, length + G)
            begin = sum(lengths[: world.rank])
            end = begin + lengths[world.rank]
            own = torch.cat([tokens[:, :G], tokens[:, G + begin : G + end]], 1).detach().requires_grad_()
            kept, at, counts = distributed.select_tokens(
                own, scores[:, begin:end], keep, group=world.group, num_global=G,
                positions=positions[:, begin:end] if positions is not None and world.size == 3 else positions,
                lengths=None if how == "ties" else lengths,
            )  # fmt: skip
            grads = torch.zeros_like(kept)
            grads[:, :G] = weights[:, :G]
            name = f"{length} {G} {keep} {how}"
            found[f"{name} most"] = at.shape[1] - max(counts.tolist())
            for b in range(3):
                here, n = (numbers[b] >= begin) & (numbers[b] < end), int(counts[b])
                found[f"{name} {b} count"] = int(here.sum()) - n
                found[f"{name} {b} global"] = largest(kept[b, :G], wanted[b, :G])
                found[f"{name} {b} kept"] = largest(kept[b, G : G + n], wanted[b, G:][here])
                found[f"{name} {b} positions"] = largest(at[b, :n].double(), places[b][here].double())
                found[f"{name} {b} behind"] = float(kept[b, G + n :].abs().sum() + (at[b, n:] + 1).abs().sum())
                grads[b, G : G + n] = weights[b, G:][here]
            grads[:, G:][at == -1] = 1.0  # which reach no token
            (grad,) = torch.autograd.grad(kept, own, grads)
            found[f"{name} grad"] = largest(grad, torch.cat([truth[:, :G], truth[:, G + begin : G + end]], 1))
    return found


def selection_aside(world: World) -> dict[str, Any]:
    torch.manual_seed(0)
    lengths = lengths_of(30, world.size, 1)
    own = lengths[world.rank]
    tokens, scores = torch.randn(2, 1 + own, 4), torch.rand(2, own)
    with SentBytes() as sent:
        distributed.select_tokens(tokens, scores, 0.5, group=world.group)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tokens, 2 * tokens)
        kept, _, counts = distributed.select_tokens(dual, scores, 0.5, group=world.group)
        tangent = forward_ad.unpack_dual(kept).tangent
    return {
        "tangent": largest(tangent, 2 * kept), "bytes": sent.total, "longest": max(lengths),
        "counts": world.add_up(counts).tolist(),
        "formula": distributed.bytes_sent(
            "select_tokens", tokens, scores, 0.5, rank=world.rank, size=world.size, lengths=lengths
        ),
        "keep": message(lambda: distributed.select_tokens(tokens, scores, 31, group=world.group)),
        "other keep": message(lambda: distributed.select_tokens(tokens, scores, world.rank, group=world.group)),
        "dtype": message(lambda: distributed.select_tokens(tokens.int(), scores, 1, group=world.group)),
    }  # fmt: skip


def refused(world: World) -> dict[str, str]:
    x = NodeSparse(world, 12)
    query, key, value = x.own(x.inputs)

    def of(*inputs: Any, **settings: Any) -> str:
        return message(lambda: distributed.node_sparse_attention(*inputs, group=world.group, **settings))

    return {
        "far": of(query, key, value, torch.tensor([[0], [12]])),
        "other": of(query, key, value, torch.full((2, 1), world.rank)),
        "dtype": of(query, key, value, x.kept.int()),
        "grad": of(query, key, value, x.kept, grad="half"),
        "one rank": of(query, key if world.rank == 0 else key[:, :2], value, x.kept),
    }


CASES = {
    "node-sparse": node_sparse, "node-sparse of float32": node_sparse_of_float32, "importance": importance,
    "importance aside": importance_aside, "selection": selection, "selection aside": selection_aside,
    "compiled": compiled, "refused": refused,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_cases(CASES, Path(tmp_path_factory.mktemp("ranks")), SIZES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["node-sparse", "importance", "selection"])
def test_ranks_find_what_one_process_finds(case: str, size: int, found: Found) -> None:
    for differences in results(found, case, size):
        assert len(differences) > 10
        for name, difference in differences.items():
            assert difference < (1e-6 if "float32" in name else EXACT), name


@pytest.mark.parametrize("size", SIZES)
def test_node_sparse_kernels_and_bytes(size: int, found: Found) -> None:
    for result in results(found, "node-sparse of float32", size):
        assert result["out"] < 1e-5
        assert result["forward bytes"] == result["forward formula"] == 4 * 2 * 3 * 5 * (8 + 2)
        assert result["bytes"] == result["formula"] == 4 * 2 * 3 * 5 * (8 + 2 + 8)


def test_compiled_calls_are_the_same(found: Found) -> None:
    for differences in results(found, "compiled", 2):
        assert len(differences) == 6
        assert max(differences.values()) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_importance_has_no_gradient_and_sends_a_number_for_each_query(size: int, found: Found) -> None:
    for result in results(found, "importance aside", size):
        assert result["tangent"] and not result["gradient"]
        assert result["nan"] == [result["keys"] > 0, False]  # of the sample in which a query holds one
        assert result["bytes"] == result["formula"] == 4 * 2 * 2 * 3 * 5
        assert result["bias"] == (
            "ValueError: distributed.token_importance: position_bias must be None, for with a bias the queries are the "
            "keys, which lie on several ranks, got position_bias=RelativePositionBias3D"
        )
        assert "key_lengths must be between 0 and 40" in result["lengths"]


@pytest.mark.parametrize("size", SIZES)
def test_selection_sends_importance_alone(size: int, found: Found) -> None:
    for result in results(found, "selection aside", size):
        assert result["tangent"] == 0.0
        assert result["counts"] == [15, 15]
        assert result["bytes"] == result["formula"] == 4 * 2 * result["longest"]
        assert "keep must be between 0 and the number of tokens (30), got keep=31" in result["keep"]
        assert "keep must be the same on every rank, got rank 0: 0, rank 1: 1" in result["other keep"]
        assert result["dtype"].startswith("TypeError: distributed.select_tokens: tokens must be float32")


@pytest.mark.parametrize("size", SIZES)
def test_a_wrong_call_is_an_error_on_every_rank(size: int, found: Found) -> None:
    op = "distributed.node_sparse_attention"
    for rank, messages in enumerate(results(found, "refused", size)):
        assert messages["far"].startswith(f"ValueError: {op}: kept must be between 0 and 11")
        assert messages["other"].startswith(f"ValueError: {op}: kept must be the same on every rank, got rank 0: [[0]")
        assert messages["dtype"].startswith(f"TypeError: {op}: kept must be an int64 tensor")
        assert messages["grad"].startswith(f"ValueError: {op}: grad must be one of full, partial")
        own = f"{op}: key must have the batch, heads and head_dim of query"
        others = f"RuntimeError: {op}: the call must be right on every rank, got on rank 1 ValueError: {own}"
        assert messages["one rank"].startswith(f"ValueError: {own}" if rank > 0 else others)
