"""Edge-sparse attention as SViTT uses it, between the query, key and value projections and the output projection.

    leaves  query, key and value (B, 1 + N, H * D), as linear layers leave them; the table of biases (R, H)
    output  (B, 1 + N, H * D)

A global token, and N = T * side * side others in blocks, each of which reads itself and some random ones. The bias of
a query and a key is the row of the table for the offset between the two: vattn looks it up inside its kernel,
FlexAttention inside what it compiles, and the others gather it before, and scatter its gradient back.

The limits read what the sparse ones do not: dense attention of the same tokens, with and without the bias.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

import vattn
from benchmarks import sdpa
from benchmarks.records import Line
from benchmarks.registry import Case, Operator, Provider, Run
from vattn.position_bias import num_offsets, relative_position_index

# Blocks of FlexAttention's mask. They do not lie as those of the layout do, and what one overlaps it reads whole: on a
# CPU the small ones were the fastest of 16, 24, 32, 56, 64 and 128.
FLEX_BLOCK = {"cpu": 16, "cuda": 128}


@dataclasses.dataclass(frozen=True)
class EdgeCase(Case):
    """B clips of T frames of side * side tokens, H heads of size D, in blocks that read `num_random` others."""

    B: int
    T: int
    side: int = 14
    H: int = 12
    D: int = 64
    block_size: int = 56
    num_random: int = 3

    num_parameters: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.N % self.block_size:
            raise ValueError(
                f"EdgeCase: block_size must divide T * side * side={self.N} (the official formula reads zeros where "
                f"the last block is short), got block_size={self.block_size}"
            )
        if self.num_random >= self.N // self.block_size:
            raise ValueError(
                f"EdgeCase: num_random must be below the number of blocks, {self.N // self.block_size} (no mask can "
                f"say that a block is read twice), got num_random={self.num_random}"
            )

    @property
    def window(self) -> tuple[int, int, int]:
        """The grid of the tokens."""
        return (self.T, self.side, self.side)

    @property
    def N(self) -> int:
        """How many tokens are not global."""
        return math.prod(self.window)

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        return [self.output_shape] * 3 + [(num_offsets(self.window) + 3, self.H)]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.B, 1 + self.N, self.H * self.D)

    @property
    def num_rows(self) -> int:
        return self.B * self.H * (1 + self.N)

    @property
    def density(self) -> float:
        """The share of the pairs of tokens that are read."""
        return self.layout(torch.device("cpu")).density

    @property
    def forward_flops(self) -> int:
        return round(2 * 2 * self.num_rows * (1 + self.N) * self.density * self.D)

    def layout(self, device: torch.device) -> vattn.BlockLayout:
        """Who reads whom: drawn, but always the same."""
        return self.draw(torch.Generator().manual_seed(0)).to(device)

    def draw(self, generator: torch.Generator) -> vattn.BlockLayout:
        return vattn.BlockLayout.local_random(self.N, self.block_size, num_random=self.num_random, generator=generator)

    def rows(self, device: torch.device) -> Tensor:
        """The row of the table for every query and key, ``(1 + N, 1 + N)``."""
        return relative_position_index(self.window, 1, torch.arange(self.N, device=device))

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views (B, H, 1 + N, D)."""
        query, key, value = (x.unflatten(-1, (self.H, self.D)).transpose(1, 2) for x in (query, key, value))
        return query, key, value

    def reference(self, *leaves: Tensor) -> Tensor:
        return self.biased(self.layout(leaves[0].device), *leaves)

    def biased(self, layout: vattn.BlockLayout, *leaves: Tensor) -> Tensor:
        """The definition over any layout of the tokens."""

        def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
            bias = vattn.RelativePositionBias3D(self.window, 1)
            out = vattn.reference.edge_sparse_attention(query, key, value, layout, position_bias=_set(bias, table))
            assert isinstance(out, Tensor)
            return out

        return self._by_head(attend, *leaves)

    def unbiased(self, *leaves: Tensor) -> Tensor:
        """The definition of dense attention without the table."""

        def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
            out = vattn.reference.latent_attention(query, key, value)
            assert isinstance(out, Tensor)
            return out

        return self._by_head(attend, *leaves)

    def _by_head(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, table: Tensor
    ) -> Tensor:
        """`attend` head by head, and each again in the backward, since the scores of all are gigabytes in float64."""
        heads = zip(*(x.split(1, 1) for x in (*self.heads(query, key, value), table)), strict=True)
        return _merge(torch.cat([checkpoint(attend, *head, use_reentrant=False) for head in heads], 1))


def _set(bias: vattn.RelativePositionBias3D, table: Tensor) -> vattn.RelativePositionBias3D:
    """`bias` with this very tensor as its table, which as a parameter it could not be."""
    bias._parameters.pop("table", None)
    bias.table = table  # type: ignore[assignment]
    return bias


def _merge(out: Tensor) -> Tensor:
    """From (B, H, 1 + N, D) to the output."""
    return out.transpose(1, 2).flatten(-2)


def _without_table(case: EdgeCase, query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    return query, key, value


def _over(case: EdgeCase, layout: vattn.BlockLayout) -> Run:
    bias = vattn.RelativePositionBias3D(case.window, case.H)

    def run(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        query, key, value = case.heads(query, key, value)
        out = vattn.edge_sparse_attention(query, key, value, layout, position_bias=_set(bias, table))
        assert isinstance(out, Tensor)
        return _merge(out)

    return run


def _everything(case: EdgeCase, device: torch.device) -> vattn.BlockLayout:
    return vattn.BlockLayout.dense(case.N, case.N, num_global=1).to(device)


def _vattn(case: EdgeCase, device: torch.device) -> Run:
    return _over(case, case.layout(device))


def _dense_biased(case: EdgeCase, device: torch.device) -> Run:
    return _over(case, _everything(case, device))


def _dense_biased_definition(case: EdgeCase, *leaves: Tensor) -> Tensor:
    return case.biased(_everything(case, leaves[0].device), *leaves)


def _dense(case: EdgeCase, device: torch.device) -> Run:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = vattn.latent_attention(*case.heads(query, key, value))
        assert isinstance(out, Tensor)
        return _merge(out)

    return run


def _dense_sdpa(case: EdgeCase, device: torch.device, backend: SDPBackend) -> Run:
    attend = sdpa.attention(backend)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _merge(attend(*case.heads(query, key, value)))

    return run


def _dense_definition(case: EdgeCase, *leaves: Tensor) -> Tensor:
    return case.unbiased(*leaves)


def _gather(table: Tensor, rows: Tensor) -> Tensor:
    """The biases ``(H, *rows.shape)``, in the way that is fastest there and back."""
    return table.t().index_select(1, rows.flatten()).unflatten(1, rows.shape)


def _sdpa(case: EdgeCase, device: torch.device) -> Run:
    """Dense attention with one tensor that holds the bias where a key is read, and -inf where it is not."""
    rows = case.rows(device)
    hidden = ~case.layout(device).to_mask()

    def run(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        query, key, value = case.heads(query, key, value)
        mask = _gather(table, rows).masked_fill(hidden, -torch.inf)
        return _merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None]))

    return run


def _official(case: EdgeCase, device: torch.device) -> Run:
    """The formula of the authors' code without its loops: every block's keys are copied beside each other."""
    layout = case.layout(device)
    blocks = layout.num_blocks
    reads = layout.columns.long().view(blocks, -1)  # (M, 1 + num_random)
    tokens = 1 + torch.arange(case.N, device=device).view(blocks, -1)  # (M, block_size)
    keys = F.pad(tokens[reads].flatten(1), (1, 0))  # (M, 1 + (1 + num_random) * block_size): the global one first
    rows = case.rows(device)
    rows_of_first, rows_of_blocks = rows[:1], rows[tokens[:, :, None], keys[:, None, :]]
    scale = case.D**-0.5

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return (query @ key.transpose(-2, -1) * scale + bias).softmax(-1) @ value

    def gather(x: Tensor) -> Tensor:
        """``(B, H, 1 + N, D)`` to ``(B, H, M, keys, D)``."""
        local = x[:, :, 1:].unflatten(2, (blocks, -1))[:, :, reads].flatten(3, 4)
        return torch.cat([x[:, :, None, :1].expand(-1, -1, blocks, -1, -1), local], 3)

    def run(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        query, key, value = case.heads(query, key, value)
        first = attend(query[:, :, :1], key, value, _gather(table, rows_of_first))
        local = query[:, :, 1:].unflatten(2, (blocks, -1))
        local = attend(local, gather(key), gather(value), _gather(table, rows_of_blocks))
        return _merge(torch.cat([first, local.flatten(2, 3)], 2))

    return run


def _flex(case: EdgeCase, device: torch.device) -> Run:
    """FlexAttention with the bias as a modification of scores. On a CPU it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    reads = case.layout(device).block_counts()[0] > 0
    # The row of an offset is the difference of two tokens' codes, from the middle on; the global token's come last.
    offsets = num_offsets(case.window)
    codes = F.pad(case.rows(device)[1:, 1] - (offsets - 1) // 2, (1, 0))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block_of_query, block_of_key = ((x - 1).clamp(min=0) // case.block_size for x in (query, key))
        return (query == 0) | (key == 0) | reads[block_of_query, block_of_key]

    mask = create_block_mask(
        visible, None, None, 1 + case.N, 1 + case.N, device=device, BLOCK_SIZE=FLEX_BLOCK[device.type]
    )

    def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = codes[query] - codes[key] + (offsets - 1) // 2
            row = torch.where(key == 0, offsets + 1, row)
            row = torch.where(query == 0, torch.where(key == 0, offsets + 2, offsets), row)
            return score + table[row, head]

        return flex_attention(query, key, value, score_mod=add_bias, block_mask=mask)

    torch.compiler.reset()  # each case compiles the same code: do not run into the limit of recompilations
    # The template for the CPU takes the shape of what a query is a view of for the query's own: the view stays outside.
    compiled = torch.compile(attend, fullgraph=True, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        return _merge(compiled(*case.heads(query, key, value), table))

    return run


def _remarks(lines: Sequence[Line]) -> list[str]:
    """How near the time is to its share of a dense one, and what another layout costs."""
    case = EdgeCase(**lines[0].sizes)
    seconds = {line.provider: line.measured.median for line in lines if line.measured is not None}
    if "vattn" not in seconds:
        return []
    text = [
        f"  vattn takes {seconds['vattn'] / (case.density * seconds[name]):.2f} times {case.density:.1%} of {name}"
        for name in ("dense", "dense+bias")
        if name in seconds
    ]
    if lines[0].pass_name == "forward":
        timer = Timer(
            "case.draw(generator)",
            globals={"case": case, "generator": torch.Generator(lines[0].device)},
            num_threads=torch.get_num_threads(),
        )
        new_layout = timer.blocked_autorange().median
        text.append(f"  a new layout takes {new_layout * 1e3:.3f} ms, {new_layout / seconds['vattn']:.2%} of vattn")
    return text


OPERATOR = Operator(
    name="edge_sparse_attention",
    cases={
        "default": [EdgeCase(1, T) for T in (4, 8, 16)],
        "gpu": [EdgeCase(1, T) for T in (4, 8, 16, 32, 64)],
        "quick": [EdgeCase(1, 4, H=2), EdgeCase(2, 2, H=1, block_size=28, num_random=2)],
    },
    providers=[
        Provider("vattn", "vattn", _vattn),
        Provider("sdpa", "peer", _sdpa),
        Provider("official", "peer", _official),
        Provider("flex", "peer", _flex),
        Provider("dense+bias", "limit", _dense_biased, definition=_dense_biased_definition),
        Provider("dense", "limit", _dense, before=_without_table, definition=_dense_definition),
        *(
            Provider(
                f"dense-{name}",
                "limit",
                functools.partial(_dense_sdpa, backend=backend),
                devices=("cuda",),
                before=_without_table,
                definition=_dense_definition,
            )
            for name, backend in sdpa.BACKENDS.items()
        ),
    ],
    remarks=_remarks,
)
