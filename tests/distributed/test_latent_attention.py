"""Latent attention over ranks is latent attention: results, gradients, tangents, masks of dropout, and bytes."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.distributed.processes import Found, SentBytes, World, lengths_of, results, run_cases
from tests.distributed.simulated import run_ranks
from vattn import distributed, latent_attention
from vattn.distributed._ranks import PaperRanks

B, H, D = 2, 3, 8
WAYS: dict[str, Any] = {
    "keys": "keys",
    "queries": "queries",
    "latents and targets": ("replicated", "keys"),
    "two contexts": ("keys", "keys"),
}
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5}


class Call:
    """A call on one device, and the part of it that each rank makes."""

    def __init__(
        self, way: str, size: int, tokens: int, *, dtype: torch.dtype = torch.float64, grad: str = "full",
        dropout_p: float = 0.0, key_lengths: Sequence[int] | None = None, told: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        self.sharded, self.grad, self.size, self.told, self.seed = WAYS[way], grad, size, told, seed
        self.dropout_p = dropout_p
        generator = torch.Generator().manual_seed(seed)

        def draw(length: int) -> Tensor:
            return torch.randn(B, H, length, D, dtype=dtype, generator=generator).requires_grad_()

        kinds = [self.sharded] if isinstance(self.sharded, str) else self.sharded
        self.shards = ["queries" not in kinds and kind == "keys" for kind in kinds]
        counts = [tokens if shard else 5 for shard in self.shards]
        queries = tokens if way == "queries" else 5
        self.query, self.keys, self.values = draw(queries), [draw(n) for n in counts], [draw(n) for n in counts]
        self.lengths = [lengths_of(tokens, size, seed + i) for i, _ in enumerate(kinds)]
        self.key_lengths = None if key_lengths is None else torch.tensor(key_lengths)
        self.grads = (
            draw(queries).detach(),
            draw(queries).detach()[..., 0].to(torch.promote_types(dtype, torch.float32)),
        )

    @property
    def inputs(self) -> list[Tensor]:
        return [self.query, *self.keys, *self.values]

    def on_rank(self, rank: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The parts of `inputs` that a rank has."""
        at_query = self.sharded == "queries"
        query = inputs[0].split(self.lengths[0], 2)[rank] if at_query else inputs[0]
        rest = [
            x.split(of_ranks, 2)[rank] if shard else x
            for x, of_ranks, shard in zip(inputs[1:], self.lengths * 2, self.shards * 2, strict=True)
        ]
        return [query, *rest]

    def of(self, inputs: Sequence[Tensor], **distributed_by: Any) -> tuple[Tensor, Tensor]:
        """out and lse of the operator, on one device or over ranks."""
        count = len(self.keys)
        key, value = inputs[1 : 1 + count], inputs[1 + count :]
        settings: dict[str, Any] = {"dropout_p": self.dropout_p, "key_lengths": self.key_lengths, "return_lse": True}
        torch.manual_seed(self.seed)
        if not distributed_by:
            return latent_attention(inputs[0], key, value, **settings)  # type: ignore[return-value]
        settings |= {"sharded": self.sharded, "grad": self.grad, **distributed_by}
        if self.told:
            told = [of_ranks if shard else None for of_ranks, shard in zip(self.lengths, self.shards, strict=True)]
            settings["lengths"] = self.lengths[0] if self.sharded in ("keys", "queries") else told
        if isinstance(self.sharded, str):
            key, value = key[0], value[0]  # type: ignore[assignment]
        return distributed.latent_attention(inputs[0], key, value, **settings)  # type: ignore[return-value]

    def loss(self, out: Tensor, lse: Tensor, rank: int | None = None) -> Tensor:
        """A loss of the whole output; of a rank, its share of that where there are shares."""
        grads: list[Tensor] = list(self.grads)
        if rank is not None and self.sharded == "queries":
            grads = [x.split(self.lengths[0], 2)[rank] for x in grads]
        elif rank is not None and self.grad == "partial":
            grads = [x * (rank + 1) / sum(range(1, self.size + 1)) for x in grads]
        finite = torch.where(lse.isfinite(), lse, 0)
        return (out * grads[0]).sum() + (finite * grads[1]).sum()

    def errors(self, rank: int, group: Any, add_up: Any) -> dict[str, float]:
        """How far out, lse, and all gradients, of this rank are from those of one device."""
        out, lse = self.of(self.inputs)
        expected = torch.autograd.grad(self.loss(out, lse), self.inputs)
        mine = [x.detach().clone().requires_grad_() for x in self.on_rank(rank, self.inputs)]
        found = self.of(mine, group=group)
        grads = list(torch.autograd.grad(self.loss(*found, rank), mine))
        if self.grad == "partial":
            replicated = [self.sharded != "queries", *[not shard for shard in self.shards] * 2]
            grads = [add_up(x) if same else x for x, same in zip(grads, replicated, strict=True)]
        if self.sharded == "queries":
            out, lse = (x.split(self.lengths[0], 2)[rank] for x in (out, lse))
        pairs = {"out": (found[0], out), "lse": (found[1], lse)}
        expected_here = self.on_rank(rank, expected)
        pairs |= {f"gradient {i}": pair for i, pair in enumerate(zip(grads, expected_here, strict=True))}
        same_layout = found[0].transpose(1, 2).is_contiguous()
        return {name: _error(*pair) for name, pair in pairs.items()} | {"layout": 0.0 if same_layout else torch.inf}


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.equal(found.isinf(), expected.isinf())
    return torch.where(expected.isinf(), 0, found - expected).abs().max().item() if expected.numel() else 0.0


def of_world(world: World) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    found = {}
    products = itertools.product(WAYS, (0, 1, 63), BOUNDS, ("full", "partial"), (0.0, 0.4), (False, True))
    for i, (way, tokens, dtype, grad, dropout_p, told) in enumerate(products):
        if i % 5 == world.size:  # in a group of another size, others
            call = Call(way, world.size, tokens, dtype=dtype, grad=grad, dropout_p=dropout_p, told=told, seed=i)
            name = f"{way} {tokens} {dtype} {grad} {dropout_p} {told}"
            found[name] = call.errors(world.rank, world.group, world.add_up)
    for lengths in ((0, 63), (30, 40)):
        call = Call("keys", world.size, 63, key_lengths=lengths, seed=3)
        found[f"key_lengths {lengths} {torch.float64}"] = call.errors(world.rank, world.group, world.add_up)
    return found


def sent_by(world: World) -> dict[str, tuple[int, int, int]]:
    """For each way: bytes counted, said, and those of the formula."""
    found = {}
    for way, tokens in itertools.product(WAYS, (16, 1024)):
        call = Call(way, world.size, tokens, dtype=torch.float32, told=True)
        mine = [x.detach().clone().requires_grad_() for x in call.on_rank(world.rank, call.inputs)]
        with SentBytes() as counted:
            out, lse = call.of(mine, group=world.group)
            (out.sum() + lse.sum()).backward()
        paper = PaperRanks(world.rank, world.size)
        on_meta = [x.detach().to("meta").requires_grad_() for x in mine]
        out, lse = call.of(on_meta, group=paper)
        (out.sum() + lse.sum()).backward()
        rows = 0 if way == "queries" else B * H * 5
        entering = rows * D + sum(2 * B * H * 5 * D for shard in call.shards if not shard)
        found[f"{way} {tokens}"] = counted.total, paper.sent, 4 * (rows * (D + 2) + entering)
    return found


def tangents(world: World) -> dict[str, float]:
    """Forward mode, by torch.func.jvp."""
    found = {}
    for way, told in itertools.product(WAYS, (False, True)):
        call = Call(way, world.size, 20, dropout_p=0.3, told=told, seed=5)
        primals = [x.detach() for x in call.inputs]
        along = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9)) for x in primals]
        expected = torch.func.jvp(lambda *x, call=call: call.of(x), tuple(primals), tuple(along))[1]
        mine, mine_along = call.on_rank(world.rank, primals), call.on_rank(world.rank, along)
        over_ranks = functools.partial(call.of, group=world.group)
        got = torch.func.jvp(lambda *x, of=over_ranks: of(x), tuple(mine), tuple(mine_along))[1]
        if call.sharded == "queries":
            expected = tuple(x.split(call.lengths[0], 2)[world.rank] for x in expected)
        found[f"{way} {told}"] = max(_error(a, b) for a, b in zip(got, expected, strict=True))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    cases = {"all": of_world, "bytes": sent_by, "tangents": tangents}
    yield run_cases(cases, tmp_path_factory.mktemp("latent"))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_compute_what_one_device_does(size: int, found: Found) -> None:
    for errors in results(found, "all", size):
        assert len(errors) >= 40
        for case, of_case in errors.items():
            bound = next(bound for dtype, bound in BOUNDS.items() if str(dtype) in case)
            assert max(of_case.values()) <= bound, (case, of_case)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_are_those_said_and_do_not_grow_with_the_context(size: int, found: Found) -> None:
    for of_rank in results(found, "bytes", size):
        for case, (counted, said, formula) in of_rank.items():
            assert counted == said == formula, case


@pytest.mark.parametrize("size", [2, 3, 4])
def test_forward_mode(size: int, found: Found) -> None:
    for of_rank in results(found, "tangents", size):
        assert max(of_rank.values()) <= 1e-10, of_rank


@given(
    way=st.sampled_from(list(WAYS)), size=st.integers(1, 6), tokens=st.integers(0, 70),
    dropout_p=st.sampled_from([0, 0.5]), grad=st.sampled_from(["full", "partial"]), seed=st.integers(0, 10_000),
    data=st.data(),
)  # fmt: skip
def test_any_shards(
    way: str, size: int, tokens: int, dropout_p: float, grad: str, seed: int, data: st.DataObject
) -> None:
    key_lengths = data.draw(st.lists(st.integers(0, tokens), min_size=B, max_size=B)) if way == "keys" else None
    call = Call(
        way, size, tokens, dropout_p=dropout_p, grad=grad, seed=seed, key_lengths=key_lengths, told=dropout_p == 0
    )
    for errors in run_ranks(size, lambda ranks: call.errors(ranks.rank, ranks, ranks.add_up)):
        assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharded": "both"}, "where every rank would need the keys of all"),
        ({"sharded": "heads"}, "sharded must be keys, queries, or a tuple"),
        ({"sharded": ("keys",)}, "for each of 1 key tensors of a tuple"),
        ({"grad": "none"}, "grad must be one of full, partial"),
        ({"lengths": [3]}, "lengths must be one for each of 2 ranks"),
        ({"lengths": [4, 3]}, r"got lengths\[0\]=4, where this rank has 3"),
        ({"dropout_p": 2.0}, "dropout_p must be between 0 and 1"),
    ],
)
def test_a_wrong_call_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match=f"distributed.latent_attention: .*{message}"):
        run_ranks(2, lambda ranks: distributed.latent_attention(query, key, key, group=ranks, **change))


def _of_ranks(call: Any, ranks: Any) -> Any:
    return call(group=ranks)


@pytest.mark.parametrize("lengths", [3, "33", torch.tensor([3, 3]), {0: 3, 1: 3}, [3, 3.0], [3, None]])
def test_lengths_are_ints(lengths: Any) -> None:
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    for keys in (key, (key, key)):
        of_tuple = [lengths] * 2 if isinstance(keys, tuple) else lengths
        call = functools.partial(distributed.latent_attention, query, keys, keys, lengths=of_tuple)
        with pytest.raises(TypeError, match=r"distributed.latent_attention: lengths must be .*, got lengths="):
            run_ranks(2, functools.partial(_of_ranks, call))


def test_lengths_of_a_tuple_are_those_of_what_is_sharded() -> None:
    query, key = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    sharded = "keys", "replicated"
    for lengths in ([None, [3, 3]], [[3, 3], [3, 3]], [[3, 3]]):
        call = functools.partial(
            distributed.latent_attention, query, (key, key), (key, key), sharded=sharded, lengths=lengths
        )
        with pytest.raises(ValueError, match="lengths must be a list for each key tensor that is sharded"):
            run_ranks(2, functools.partial(_of_ranks, call))


def test_bytes_of_any_call() -> None:
    """Of dropout nothing is asked on paper; inference mode is as good as any; a rank is an int."""
    x, frames = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 3, 4)
    told: dict[str, Any] = {"rank": 0, "lengths": [4, 4], "backward": True}
    calls: dict[str, Any] = {"latent_attention": (x, x, x), "leap_attention": (frames, frames, frames, 3)}
    for op, inputs in calls.items():
        expected = distributed.bytes_sent(op, *inputs, size=2, **told)
        with torch.inference_mode():
            assert distributed.bytes_sent(op, *inputs, size=2, dropout_p=0.5, **told) == expected > 0
    with pytest.raises(TypeError, match="bytes_sent: size must be an int, got size='2'"):
        distributed.bytes_sent("latent_attention", x, x, x, size="2", **told)  # type: ignore[arg-type]
