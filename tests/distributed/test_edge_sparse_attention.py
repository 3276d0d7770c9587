"""Edge-sparse attention over ranks, against one process; and the plan of what is sent."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vattn
from tests.distributed.processes import Found, SentBytes, World, results, run_cases
from tests.distributed.simulated import run_ranks
from tests.layouts import layout_of, layouts
from vattn import BlockLayout, RelativePositionBias3D, distributed
from vattn.distributed._edge_plan import make_plan, plan_of
from vattn.distributed.edge_sparse_attention import OP

SIZES = (2, 3, 4)
EXACT = 1e-10


@dataclasses.dataclass
class Problem:
    """A call on all tokens, and the shards of its blocks."""

    layout: BlockLayout
    lengths: Sequence[int]
    window: tuple[int, int, int] | None = None
    positions: Tensor | None = None
    causal: bool = False
    dropout_p: float = 0.0
    grad: str = "full"
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        torch.manual_seed(self.layout.num_tokens)
        self.G, length = self.layout.num_global, self.layout.num_global + self.layout.num_tokens
        self.inputs = [torch.randn(2, 3, length, 8, dtype=self.dtype, requires_grad=True) for _ in range(3)]
        self.tangents = [torch.randn_like(x) for x in self.inputs]
        self.bias = None
        if self.window is not None:
            self.bias = RelativePositionBias3D(self.window, 3, self.G).to(self.dtype)
            torch.nn.init.normal_(self.bias.table)
        self.weights = torch.randn(len(self.lengths), 2, 3, length, 9, dtype=self.dtype)
        if self.grad == "full":
            self.weights[1:, :, :, : self.G] = 0
        for rank in range(len(self.lengths)):  # each for its own tokens
            begin, end = self.ends(rank)
            self.weights[rank, :, :, self.G : self.G + begin] = 0
            self.weights[rank, :, :, self.G + end :] = 0

    def ends(self, rank: int) -> tuple[int, int]:
        return sum(self.lengths[:rank]), sum(self.lengths[: rank + 1])

    def part(self, x: Tensor, rank: int) -> Tensor:
        """What a rank has of tokens, along the third axis."""
        begin, end = self.ends(rank)
        return torch.cat([x[:, :, : self.G], x[:, :, self.G + begin : self.G + end]], 2)

    def call(self, function: Any, inputs: Sequence[Tensor], bias: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
        """Out beside lse, and importance where there is a global token."""
        out, lse, *importance = function(
            *inputs, self.layout, position_bias=bias, positions=self.positions, causal=self.causal,
            dropout_p=self.dropout_p, return_lse=True, return_importance=self.G > 0, **more,
        )  # fmt: skip
        lse = torch.where(lse == -torch.inf, 7.0, lse)
        return torch.cat([out, lse[..., None]], -1), importance[0] if importance else None

    @functools.cached_property
    def truth(self) -> dict[str, Any]:
        torch.manual_seed(7)
        out, importance = self.call(vattn.edge_sparse_attention, self.inputs, self.bias)
        leaves = [*self.inputs, *([] if self.bias is None else [self.bias.table])]
        grads = torch.autograd.grad(out, leaves, self.weights.sum(0), materialize_grads=True)
        return {"out": out.detach(), "importance": importance, "grads": grads}

    def differences(self, rank: int, group: Any, add_up: Any, known: bool = False) -> dict[str, float]:
        """How far the results of a rank are from those of one process."""
        wanted = self.truth
        own = [self.part(x, rank).detach().requires_grad_() for x in self.inputs]
        bias = self.bias
        more = {"group": group, "grad": self.grad, "lengths": list(self.lengths) if known else None}
        torch.manual_seed(7 + rank)
        out, importance = self.call(distributed.edge_sparse_attention, own, bias, **more)
        leaves = [*own, *([] if bias is None else [bias.table])]
        weights = self.weights.sum(0) if self.grad == "full" else self.weights[rank]
        grads = list(torch.autograd.grad(out, leaves, self.part(weights, rank)))
        found = {"out": largest(out, self.part(wanted["out"], rank))}
        if importance is not None:
            begin, end = self.ends(rank)
            found["importance"] = largest(importance, wanted["importance"][:, begin:end])
        for i, (mine, whole) in enumerate(zip(grads, wanted["grads"], strict=True)):
            if self.grad == "partial":
                mine = add_up(mine) if i == 3 else torch.cat([add_up(mine[:, :, : self.G]), mine[:, :, self.G :]], 2)
            found[f"grad of {'query key value table'.split()[i]}"] = largest(
                mine, whole if i == 3 else self.part(whole, rank)
            )
        return found

    def difference_of_tangents(self, rank: int, group: Any) -> float:
        with forward_ad.dual_level():
            pairs = list(zip(self.inputs, self.tangents, strict=True))
            duals = [forward_ad.make_dual(x, tangent) for x, tangent in pairs]
            own = [forward_ad.make_dual(self.part(x, rank), self.part(tangent, rank)) for x, tangent in pairs]
            torch.manual_seed(7)
            whole, _ = self.call(vattn.edge_sparse_attention, duals, self.bias)
            torch.manual_seed(7 + rank)
            mine, _ = self.call(distributed.edge_sparse_attention, own, self.bias, group=group, grad=self.grad)
            found, wanted = (forward_ad.unpack_dual(x).tangent for x in (mine, whole))
        assert found is not None and wanted is not None
        return largest(found, self.part(wanted, rank))

    def along_tangents(self, rank: int, group: Any) -> float:
        inputs, tangents = (tuple(x.detach() for x in some) for some in (self.inputs, self.tangents))
        own = [tuple(self.part(x, rank) for x in some) for some in (inputs, tangents)]
        torch.manual_seed(7)
        function = functools.partial(self.call, vattn.edge_sparse_attention)
        wanted = torch.func.jvp(lambda *x: function(x, self.bias)[0], inputs, tangents)[1]
        torch.manual_seed(7 + rank)
        function = functools.partial(self.call, distributed.edge_sparse_attention, group=group)
        found = torch.func.jvp(lambda *x: function(x, self.bias)[0], *own)[1]
        return largest(found, self.part(wanted, rank))


def largest(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found - wanted).detach().abs().amax()) if found.numel() > 0 else 0.0


def shards(layout: BlockLayout, blocks: Sequence[int]) -> list[int]:
    """The tokens of each rank, of so many blocks each."""
    ends = [min(sum(blocks[: i + 1]) * layout.block_size, layout.num_tokens) for i in range(len(blocks))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    layout = draw(layouts(heads=3, max_blocks=6, max_block_size=4, samples=2), label="layout")
    size = draw(st.sampled_from(SIZES), label="ranks")
    cuts = sorted(draw(st.lists(st.integers(0, layout.num_blocks), min_size=size - 1, max_size=size - 1)))
    blocks = [b - a for a, b in zip([0, *cuts], [*cuts, layout.num_blocks], strict=True)]
    window = draw(st.sampled_from([None, (2, 3, 4)]), label="window")
    positions = None
    if draw(st.booleans(), label="positions"):
        shape = draw(st.sampled_from([(layout.num_tokens,), (2, layout.num_tokens)]))
        positions = torch.randint(24, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return Problem(
        layout, shards(layout, blocks), window, positions, causal=draw(st.booleans(), label="causal"),
        dropout_p=draw(st.sampled_from([0.0, 0.4]), label="dropout_p"),
        grad=draw(st.sampled_from(["full", "partial"]), label="grad"),
    )  # fmt: skip


@settings(max_examples=60)
@given(problems())
def test_ranks_find_what_one_process_finds(problem: Problem) -> None:
    assert problem.truth  # found before threads share torch's generator

    def one(ranks: Any) -> dict[str, float]:
        return problem.differences(ranks.rank, ranks, ranks.add_up)

    for found in run_ranks(len(problem.lengths), one):
        assert max(found.values()) < EXACT, found


def row_of_blocks(num_tokens: int, block_size: int, num_global: int) -> BlockLayout:
    """Each block reads itself, one far away and that one again; the second one reads nothing."""
    M = -(-num_tokens // block_size)
    rows = [[i, (i + M // 2) % M, (i + M // 2) % M] if i != 1 else [] for i in range(M)]
    return layout_of(rows, num_tokens, block_size, num_global)


def problem_of(name: str, size: int) -> Problem:
    """Calls that are tried in processes."""
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(64, (2, 63), generator=generator)
    if name == "random, bias":
        layout = BlockLayout.local_random(63, 5, num_global=1, generator=generator)
        return Problem(layout, shards(layout, [13 // size] * (size - 1) + [20]), (4, 4, 4), dropout_p=0.3)
    if name == "random, parts, positions":
        layout = BlockLayout.local_random(63, 5, num_global=3, num_random=1, generator=generator)
        return Problem(
            layout,
            shards(layout, {2: [0, 13], 3: [6, 0, 7], 4: [0, 6, 0, 7]}[size]),
            (4, 4, 4),
            places,
            True,
            grad="partial",
        )
    if name == "strided, causal":
        layout = BlockLayout.strided((4, 4, 4), 4, num_local_blocks=2)
        return Problem(layout, shards(layout, [7, 5, 2, 2][: size - 1] + [20]), causal=True, dropout_p=0.3)
    if name == "per head, the last block short":
        mask = (torch.rand(3, 9, 9, generator=generator) > 0.6).repeat_interleave(7, 1).repeat_interleave(7, 2)
        layout = BlockLayout.from_mask(mask[:, :61, :61], 7)
        return Problem(layout, shards(layout, {2: [6, 3], 3: [5, 1, 3], 4: [5, 1, 3, 0]}[size]), grad="partial")
    if name == "one token":
        layout = row_of_blocks(1, 4, 1)
        return Problem(layout, shards(layout, [0, 1, 0, 0][:size]), (1, 1, 1))
    if name == "global tokens alone":
        return Problem(row_of_blocks(0, 4, 2), [0] * size, (1, 1, 1), grad="partial")
    assert name == "no tokens"
    return Problem(row_of_blocks(0, 4, 0), [0] * size)


NAMES = [
    "random, bias", "random, parts, positions", "strided, causal", "per head, the last block short", "one token",
    "global tokens alone", "no tokens",
]  # fmt: skip


def in_processes(world: World) -> dict[str, float]:
    found: dict[str, float] = {}
    for i, name in enumerate(NAMES):
        problem = problem_of(name, world.size)
        differences = problem.differences(world.rank, world.group, world.add_up, known=i % 2 == 0)
        differences["tangent"] = problem.difference_of_tangents(world.rank, world.group)
        found |= {f"{name}: {what}": difference for what, difference in differences.items()}
    return found


def of_float32(world: World) -> dict[str, float]:
    """The kernels."""
    found: dict[str, float] = {}
    for name in ("random, bias", "strided, causal"):
        problem = dataclasses.replace(problem_of(name, world.size), dtype=torch.float32)
        along = problem.along_tangents(world.rank, world.group)  # makes the plan, inside of torch.func
        differences = problem.differences(world.rank, world.group, world.add_up) | {"torch.func": along}
        differences["tangent"] = problem.difference_of_tangents(world.rank, world.group)
        found |= {f"{name}: {what}": difference for what, difference in differences.items()}
    return found


def sent(world: World) -> dict[str, tuple[int, int, int]]:
    """Of calls: what is handed over, what the paper says, and the formula."""
    found = {}
    B, H, D = 2, 3, 8
    for name in ("random, bias", "per head, the last block short", "blocks of a rank"):
        for backward in (False, True):
            if name == "blocks of a rank":
                rows = [[i - i % 2, i - i % 2 + 1] for i in range(2 * world.size)]
                layout = layout_of(rows, 8 * world.size, 4, num_global=1)
                problem = Problem(layout, [8] * world.size, dtype=torch.float32)
            else:
                problem = dataclasses.replace(problem_of(name, world.size), dtype=torch.float32, grad="full")
            q, k, v = (problem.part(x, world.rank).detach().requires_grad_(backward) for x in problem.inputs)
            G, bias = problem.G, problem.bias
            with SentBytes() as counted:
                out = distributed.edge_sparse_attention(q, k, v, problem.layout, group=world.group, position_bias=bias)
                if backward:
                    assert isinstance(out, Tensor)
                    out.backward(torch.ones_like(out))
            plan = make_plan(problem.layout, problem.lengths, world.rank)
            formula = 4 * (sum(plan.sent) * 2 * B * H * D + B * H * G * (D + 2))
            if backward:
                table = 0 if bias is None else bias.table.numel()
                formula += 4 * (sum(plan.received) * 2 * B * H * D + 3 * B * H * G * D + table)
            if name == "blocks of a rank" and not backward:
                assert formula == 4 * B * H * G * (D + 2)
            said = distributed.bytes_sent(
                "edge_sparse_attention", q, k, v, problem.layout, rank=world.rank, size=world.size, backward=backward,
                lengths=problem.lengths, position_bias=bias,
            )  # fmt: skip
            found[f"{name} {backward}"] = counted.total, said, formula
    return found


def compiled(world: World) -> dict[str, float]:
    found: dict[str, float] = {}
    if world.size != 2:
        return found
    function = torch.compile(distributed.edge_sparse_attention, fullgraph=True, backend="aot_eager")
    for name in ("random, bias", "strided, causal"):  # another layout is compiled again
        problem = dataclasses.replace(problem_of(name, 2), dtype=torch.float32, dropout_p=0.0)
        results = []
        for call in (function, distributed.edge_sparse_attention):
            own = [problem.part(x, world.rank).detach().requires_grad_() for x in problem.inputs]
            out, _ = problem.call(call, own, problem.bias, group=world.group, lengths=problem.lengths)
            leaves = [*own, *([] if problem.bias is None else [problem.bias.table])]
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        for what, mine, plain in zip(("out", "query", "key", "value", "table"), *results, strict=False):
            found[f"{name}: {what}"] = largest(mine, plain)
    return found


def refused(world: World) -> dict[str, str]:
    layout, other = (BlockLayout.local_random(24, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    x = torch.randn(1, 2, 1 + (24 if world.rank == 0 else 0), 8)
    bias, small = RelativePositionBias3D((2, 3, 4), 2), RelativePositionBias3D((1, 1, 4), 2)
    cut = torch.randn(1, 2, 1 + [6, 18, 0, 0][world.rank], 8)

    def of(x: Any, layout: Any, **settings: Any) -> str:
        try:
            distributed.edge_sparse_attention(x, x, x, layout, group=world.group, **settings)
        except (TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return {
        "whole blocks": of(cut, layout),
        "the tokens": of(x[:, :, :5], layout),
        "layout must be the same": of(x, layout if world.rank == 0 else other),
        "layout must be a BlockLayout": of(x, None),
        "layout must be for all heads": of(x[:, :1].expand(-1, 3, -1, -1), layout_of([[0]] * 12, 24, 4, 1, sets=2)),
        "layout must be for all samples": of(x, layout_of([[0]] * 12, 24, 4, 1, samples=2)),
        "layout must have blocks of consecutive tokens": of(x, layout_of([[0]] * 6, 24, 4, 1, order=torch.arange(24))),
        "the global tokens of layout": of(x[:, :, :0], layout),
        "positions must have shape": of(x, layout, positions=torch.arange(23)),
        "positions must be between 0 and 23": of(x, layout, positions=torch.arange(24) + 1, position_bias=bias),
        "tokens without positions": of(x, layout, position_bias=small),
        "position_bias.num_heads must be 2": of(x, layout, position_bias=RelativePositionBias3D((2, 3, 4), 5)),
        "return_importance needs a global token": of(x[:, :, 1:], layout_of([[0]] * 6, 24, 4), return_importance=True),
        "causal must be the same": of(x, layout, causal=world.rank == 0),
        "lengths must be": of(x, layout, lengths=[12] * world.size),
    }


CASES = {
    "in processes": in_processes, "of float32": of_float32, "sent": sent, "compiled": compiled, "refused": refused,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_cases(CASES, Path(tmp_path_factory.mktemp("ranks")), SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_processes_find_what_one_finds(size: int, found: Found) -> None:
    for differences in results(found, "in processes", size):
        assert len(differences) == 43
        for name, difference in differences.items():
            assert difference < EXACT, name


@pytest.mark.parametrize("size", SIZES)
def test_kernels_find_what_one_process_finds(size: int, found: Found) -> None:
    for differences in results(found, "of float32", size):
        assert len(differences) == 14
        for name, difference in differences.items():
            assert difference < 1e-5, name


@pytest.mark.parametrize("size", SIZES)
def test_only_missing_blocks_are_sent(size: int, found: Found) -> None:
    for cases in results(found, "sent", size):
        for name, (counted, said, formula) in cases.items():
            assert counted == said == formula, name


def test_a_compiled_call_is_the_same(found: Found) -> None:
    for differences in results(found, "compiled", 2):
        assert len(differences) == 9
        assert max(differences.values()) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_what_does_not_fit_is_an_error_on_every_rank(size: int, found: Found) -> None:
    for messages in results(found, "refused", size):
        for must, message in messages.items():
            assert f"Error: {OP}: " in message and must in message, message


def test_a_loss_of_lse_alone_and_what_lies_in_memory() -> None:
    """Rank 0 sends and receives nothing back; its backward takes part all the same."""
    layout = layout_of([[0], [0, 1]], 8, 4, num_global=0)
    x = torch.randn(1, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    lse = vattn.edge_sparse_attention(x, x, x, layout, return_lse=True)[1]
    (wanted,) = torch.autograd.grad(lse.square().sum(), x)

    def one(ranks: Any) -> float:
        own = x[:, :, 4 * ranks.rank :][:, :, :4].detach().requires_grad_()
        out, lse = distributed.edge_sparse_attention(own, own, own, layout, group=ranks, return_lse=True)
        assert out.transpose(1, 2).is_contiguous()
        (grad,) = torch.autograd.grad(lse.square().sum(), own)
        return largest(grad, wanted[:, :, 4 * ranks.rank :][:, :, :4])

    assert max(run_ranks(2, one)) < EXACT


@settings(max_examples=60)
@given(problems(), st.booleans())
def test_plans_of_ranks_fit_each_other(problem: Problem, apart: bool) -> None:
    """What is sent is what is received; and what ranks read, in numbers of all tokens, is what the layout says."""
    layout, lengths, G = problem.layout, problem.lengths, problem.G
    past_only = problem.causal
    plans = [make_plan(layout, lengths, rank, past_only=past_only, apart=apart) for rank in range(len(lengths))]
    assert len({plan.exchanges for plan in plans}) == 1
    assert plans[0].exchanges == any(sum(plan.sent) > 0 for plan in plans)
    wanted = layout.token_counts()[..., G:, G:]
    read = torch.zeros_like(wanted)
    for rank, plan in enumerate(plans):
        begin, end = problem.ends(rank)
        assert plan.received == [other.sent[rank] for other in plans]
        assert plan.sent[rank] == 0 and sum(plan.sent) == len(plan.sent_tokens)
        assert plan.local.num_global == G
        read[..., begin:end, begin:end] += plan.local.token_counts()[..., G:, G:]
        if plan.fetched is None:
            assert sum(plan.received) == 0
            continue
        assert plan.query_tokens is not None and plan.key_tokens is not None
        came = [
            problem.ends(other)[0] + tokens
            for other, theirs in enumerate(plans)
            for tokens in theirs.sent_tokens.split(theirs.sent)[rank].tolist()
        ]
        assert len(set(came)) == len(came)
        assert plan.key_tokens[plan.first_key :][: len(came)].tolist() == came
        assert plan.query_tokens[: end - begin].tolist() == list(range(begin, end))
        assert not apart or (plan.first_key >= end - begin and plan.fetched.num_tokens == plan.first_key + len(came))
        counts = plan.fetched.token_counts()[..., : end - begin, :]
        of_fetched = counts[..., plan.first_key :][..., : len(came)]
        assert counts.sum() == of_fetched.sum()
        read[..., begin:end, came] += of_fetched
    if past_only:
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        wanted = wanted * (owner[None, :] <= owner[:, None])
    torch.testing.assert_close(read, wanted)


def test_a_plan_is_made_once_for_a_layout() -> None:
    layout = BlockLayout.local_random(24, 4)
    arguments = [12, 12], 0, False, True, torch.device("cpu")
    with torch.inference_mode():
        plan = plan_of(layout, *arguments)
    assert plan_of(layout, *arguments) is plan
    assert not plan.sent_tokens.is_inference()
    assert plan_of(layout, [16, 8], *arguments[1:]) is not plan_of(layout, *arguments)
