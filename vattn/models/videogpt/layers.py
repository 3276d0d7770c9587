"""The layers of VideoGPT's prior, which read a video token by token, in raster order.

    x = right_shift(x) + positions
    x = x + W_fc causal_attention(norm(x)),  x = x + cross_attention(norm(x), frames),  x = x + MLP(norm(x))    a block

Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021). A token reads itself and all before it;
in sparse layers, only those of some blocks (Child et al., "Generating Long Sequences with Sparse Transformers", 2019).
With blocks of a line each::

    line       0  1  2  3
    frame 0    .  .  s  .        s  blocks in line with q, along every axis of the grid of blocks but the last
    frame 1    .  l  q  .        l  the last `num_local_blocks` before q, which also reads itself

Token by token, each layer keeps keys and values, so that one more token costs one row of each layer.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.layout import BlockLayout
from vattn.models.tables import Table
from vattn.nn.axial import MultiHeadAttention
from vattn.nn.sdpa import scaled_dot_product_attention
from vattn.ops.edge_sparse_attention import edge_sparse_attention
from vattn.ops.node_sparse_attention import node_sparse_attention

KeyValue = tuple[Tensor, Tensor]

MOST_BLOCKS = 2**14
"""Of a grid of sparse attention."""


class LayerNorm(nn.Module):
    """``(x - mean) * (eps + 1 / std) * g + b``, with `g` and `b` learned, or those of a class: ``1 + W c`` and ``V c``.

    It is computed in float32 at least. Unlike in PyTorch, eps is added to what the standard deviation divides; a row of
    equal numbers becomes `b`, where the official code makes it NaN.

    Args:
        dim: channels C. num_classes: channels of a class, None for a norm without classes.

    Shape:
        ``(B, ..., C)``, and the class ``(B, num_classes)`` or None, to the same.

    Example:
        >>> LayerNorm(3)(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.2248,  0.0000,  1.2248]], grad_fn=<AddBackward0>)
    """

    EPS = 1e-5

    def __init__(self, dim: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.is_conditional = num_classes is not None
        if num_classes is None:
            self.g = nn.Parameter(torch.ones(dim))
            self.b = nn.Parameter(torch.zeros(dim))
        else:
            self.w = nn.Linear(num_classes, dim, bias=False)
            nn.init.constant_(self.w.weight, num_classes**-0.5)
            self.wb = nn.Linear(num_classes, dim, bias=False)

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        if self.is_conditional:
            wide = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
            g, b = (layer(classes).view(wide) for layer in (self.w, self.wb))
            g = 1 + g
        else:
            g, b = self.g, self.b
        centered = x.to(torch.promote_types(x.dtype, torch.float32))
        centered = centered - centered.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        tiny = torch.finfo(variance.dtype).tiny
        inverse = torch.where(variance > tiny, variance.clamp(min=tiny).rsqrt(), 0.0)
        return (centered * (self.EPS + inverse) * g + b).to(x.dtype)

    def extra_repr(self) -> str:
        return f"is_conditional={self.is_conditional}"


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)" (2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class RightShift(nn.Module):
    """Each token ``(B, N, C)`` becomes the one before it, and the first one a learned start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sos = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        start = self.sos.to(x.dtype).expand(x.shape[0], 1, -1)
        return torch.cat([start, x[:, :-1]], 1)


class GridEmbedding(nn.Module):
    """A learned vector for each place of a grid: one for its index in each axis, side by side.

    Args:
        grid: sizes of the axes. dim: channels C, a multiple of their number.

    Shape:
        ``()`` gives ``(N, C)``, in raster order, and ``(position)`` the row ``(C,)`` of it.

    Example:
        >>> embedding = GridEmbedding((2, 3), dim=4)
        >>> embedding().shape, torch.equal(embedding(4), embedding()[4])
        (torch.Size([6, 4]), True)
    """

    def __init__(self, grid: Sequence[int], dim: int) -> None:
        super().__init__()
        for size in grid:
            _checks.integer("GridEmbedding", "grid", size, least=1)
        if dim % len(grid):
            raise ValueError(f"GridEmbedding: dim must be a multiple of the axes of the grid ({len(grid)}), got {dim=}")
        self.grid = tuple(grid)
        self.emb = nn.ParameterDict(
            {f"d_{i}": nn.Parameter(0.01 * torch.randn(size, dim // len(grid))) for i, size in enumerate(grid)}
        )

    def forward(self, position: int | None = None) -> Tensor:
        tables = [self.emb[f"d_{i}"] for i in range(len(self.grid))]
        if position is not None:
            indices = torch.unravel_index(torch.tensor(position, device="cpu"), self.grid)
            return torch.cat([table[index] for table, index in zip(tables, indices, strict=True)])
        last = len(self.grid) - 1
        wide = [table.view(-1, *[1] * (last - i), table.shape[1]) for i, table in enumerate(tables)]
        return torch.cat([table.expand(*self.grid, -1) for table in wide], -1).flatten(0, -2)

    def extra_repr(self) -> str:
        return f"grid={self.grid}"


@dataclasses.dataclass
class KeyValueCache:
    """The keys and values of the tokens so far, ``(B, H, N, D)`` with room for all N."""

    num_tokens: int
    length: int = 0
    key: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    value: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add those of the next tokens, ``(B, H, tokens, D)``."""
        if self.length == 0:
            B, H, _, D = key.shape
            self.key, self.value = (x.new_zeros(B, H, self.num_tokens, D) for x in (key, value))
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end


class CausalAttention(MultiHeadAttention):
    """Multi-head self-attention in which a token reads itself and those before it, if `layout` has them.

    Args:
        dim, num_heads, num_layers: see :class:`vattn.nn.MultiHeadAttention`.
        attn_drop: probability of dropping an attention weight, in training.

    Shape:
        ``(B, N, C)`` to the same; a `cache` gets the keys and values of all. `step` takes tokens one by one,
        ``(B, 1, C)``; `visible` ``(tokens,)`` int64 are those that this one reads, None for all so far.
    """

    def __init__(self, dim: int, num_heads: int, *, num_layers: int = 1, attn_drop: float = 0.0) -> None:
        super().__init__(dim, num_heads, num_layers=num_layers)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, x: Tensor, layout: BlockLayout | None = None, cache: KeyValueCache | None = None) -> Tensor:
        query, key, value = (self.heads(layer, x) for layer in (self.w_qs, self.w_ks, self.w_vs))
        if cache is not None:
            cache.append(key, value)
        dropout_p = self.attn_drop.p if self.training else 0.0
        if layout is None:
            return self.merge(scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True))
        out = edge_sparse_attention(query, key, value, layout, causal=True, dropout_p=dropout_p)
        return self.merge(cast(Tensor, out))

    def step(self, x: Tensor, cache: KeyValueCache, visible: Tensor | None = None) -> Tensor:
        query, key, value = (self.heads(layer, x) for layer in (self.w_qs, self.w_ks, self.w_vs))
        cache.append(key, value)
        if visible is None:
            key, value = (x[:, :, : cache.length] for x in (cache.key, cache.value))
            return self.merge(scaled_dot_product_attention(query, key, value))
        out = node_sparse_attention(query, cache.key, cache.value, visible.expand(x.shape[0], -1))
        return self.merge(cast(Tensor, out))


class CrossAttention(MultiHeadAttention):
    """Multi-head attention of tokens ``(B, N, C)`` over others, whose keys and values are computed once, by `read`."""

    def read(self, memory: Tensor) -> KeyValue:
        """``(B, M, source_dim)`` to keys and values."""
        return self.heads(self.w_ks, memory), self.heads(self.w_vs, memory)

    def forward(self, x: Tensor, memory: KeyValue) -> Tensor:
        return self.merge(scaled_dot_product_attention(self.heads(self.w_qs, x), *memory))


class AttentionBlock(nn.Module):
    """Causal attention, cross-attention to frames if there are any, and an MLP, each after a norm and with a residual.

    Args:
        dim, num_heads, num_layers: see :class:`vattn.nn.MultiHeadAttention`.
        num_classes: of the norms, see :class:`LayerNorm`.
        memory_dim: channels of what the cross-attention reads; None for none.
        dropout: after each of the three, in training. attn_drop: see :class:`CausalAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_layers: int = 1,
        num_classes: int | None = None,
        memory_dim: int | None = None,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.pre_attn_norm = LayerNorm(dim, num_classes)
        self.attn = CausalAttention(dim, num_heads, num_layers=num_layers, attn_drop=attn_drop)
        self.has_memory = memory_dim is not None
        if memory_dim is not None:
            self.pre_enc_norm = LayerNorm(dim, num_classes)
            self.enc_attn = CrossAttention(dim, num_heads, source_dim=memory_dim, num_layers=num_layers)
        self.pre_fc_norm = LayerNorm(dim, num_classes)
        self.fc_block = nn.Sequential(nn.Linear(dim, 4 * dim), QuickGELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, classes: Tensor | None, memory: Tensor | None, layout: BlockLayout | None = None
    ) -> Tensor:
        return self.prefill(x, classes, self.read(memory), None, layout)

    def prefill(
        self,
        x: Tensor,
        classes: Tensor | None,
        memory: KeyValue | None,
        cache: KeyValueCache | None,
        layout: BlockLayout | None = None,
    ) -> Tensor:
        """All tokens at once, whose keys and values go into `cache`."""
        x = x + self.drop(self.attn(self.pre_attn_norm(x, classes), layout, cache))
        return self._rest(x, classes, memory)

    def step(
        self,
        x: Tensor,
        classes: Tensor | None,
        memory: KeyValue | None,
        cache: KeyValueCache,
        visible: Tensor | None = None,
    ) -> Tensor:
        """The next token, see :class:`CausalAttention`."""
        return self._rest(x + self.attn.step(self.pre_attn_norm(x, classes), cache, visible), classes, memory)

    def read(self, memory: Tensor | None) -> KeyValue | None:
        """What the cross-attention needs of ``memory (B, M, memory_dim)``."""
        return self.enc_attn.read(memory) if self.has_memory and memory is not None else None

    def _rest(self, x: Tensor, classes: Tensor | None, memory: KeyValue | None) -> Tensor:
        if memory is not None:
            x = x + self.drop(self.enc_attn(self.pre_enc_norm(x, classes), memory))
        return x + self.drop(self.fc_block(self.pre_fc_norm(x, classes)))

    def extra_repr(self) -> str:
        return f"has_memory={self.has_memory}"


@dataclasses.dataclass
class Decoding:
    """A video that is being read token by token: what each layer keeps of the tokens so far, and the conditions."""

    position: int
    classes: Tensor | None
    memories: list[KeyValue | None]
    caches: list[KeyValueCache]


class AttentionStack(nn.Module):
    """The blocks, behind a shift by one token and the embedding of places. Parameters have the official names.

    Args:
        grid: sizes of the axes of a video in tokens, N in all.
        dim, num_heads, num_classes, memory_dim, dropout, attn_drop: see :class:`AttentionBlock`.
        num_layers: how many blocks.
        attention: "full" or "sparse".
        block_size, num_local_blocks: of the sparse layout, see :meth:`vattn.BlockLayout.strided`.

    Shape:
        tokens ``(B, N, C)``, class ``(B, num_classes)``, memory ``(B, M, memory_dim)`` to ``(B, N, C)``: row i depends
        on tokens up to i - 1.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.

    Example:
        >>> stack = AttentionStack((2, 4, 4), dim=12, num_heads=2, num_layers=1, attention="sparse", block_size=8)
        >>> stack(torch.randn(1, 32, 12)).shape
        torch.Size([1, 32, 12])
    """

    def __init__(
        self,
        grid: Sequence[int],
        dim: int,
        num_heads: int,
        num_layers: int,
        *,
        attention: str = "full",
        block_size: int = 32,
        num_local_blocks: int = 4,
        num_classes: int | None = None,
        memory_dim: int | None = None,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if attention not in ("full", "sparse"):
            raise ValueError(f"AttentionStack: attention must be 'full' or 'sparse', got {attention=}")
        _checks.integer("AttentionStack", "num_layers", num_layers, least=1)
        _checks.integer("AttentionStack", "block_size", block_size, least=1)
        self.grid, self.attention = tuple(grid), attention
        self.block_size, self.num_local_blocks = block_size, num_local_blocks
        self.layout: BlockLayout | None = None
        self._layout: Table[BlockLayout] | None = None
        if attention == "sparse":
            num_blocks = math.prod(self.grid) // block_size
            if num_blocks > MOST_BLOCKS:  # a layout begins as a matrix of them
                raise ValueError(
                    f"AttentionStack: grid must have at most {MOST_BLOCKS} blocks, got {grid=}, {block_size=}"
                )
            self.layout = BlockLayout.strided(self.grid, block_size, num_local_blocks=num_local_blocks)
            self._layout = Table(self.layout)
            self._visible_blocks = _rows(self.layout)
        self.right_shift = RightShift(dim)
        self.pos_embd = GridEmbedding(self.grid, dim)
        self.attn_nets = nn.ModuleList(
            AttentionBlock(
                dim, num_heads, num_layers=num_layers, num_classes=num_classes, memory_dim=memory_dim,
                dropout=dropout, attn_drop=attn_drop,
            )
            for _ in range(num_layers)
        )  # fmt: skip

    def forward(self, x: Tensor, classes: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        layout = None if self._layout is None else self._layout.on(x.device)
        x = self.right_shift(x) + self.pos_embd()
        for net in self._blocks:
            x = net(x, classes, memory, layout)
        return x

    def extra_repr(self) -> str:
        sparse = f", block_size={self.block_size}, num_local_blocks={self.num_local_blocks}"
        return f"grid={self.grid}, attention={self.attention!r}" + (sparse if self.attention == "sparse" else "")

    def begin(self, classes: Tensor | None = None, memory: Tensor | None = None) -> Decoding:
        """A video of which no token has been read."""
        memories = [net.read(memory) for net in self._blocks]
        caches = [KeyValueCache(math.prod(self.grid)) for _ in self._blocks]
        return Decoding(0, classes, memories, caches)

    def prefill(self, x: Tensor, state: Decoding) -> None:
        """Read the first tokens of a video, ``(B, n, C)``, all at once, as `step` would one by one but for the last.

        The last one is what the next `step` is given. A sparse stack computes all N rows for it.
        """
        length = x.shape[1]
        if state.position > 0 or length > math.prod(self.grid):
            raise ValueError(
                f"AttentionStack.prefill: tokens must be the first of a video, at most {math.prod(self.grid)}, "
                f"got {length} of them behind {state.position}"
            )
        if length == 0:
            return
        x, layout = self.right_shift(x) + self.pos_embd()[:length], None
        if self._layout is not None:  # which is one of N rows: those behind the tokens are read by none of them
            x, layout = F.pad(x, (0, 0, 0, math.prod(self.grid) - length)), self._layout.on(x.device)
        for net, memory, cache in zip(self._blocks, state.memories, state.caches, strict=True):
            x = net.prefill(x, state.classes, memory, cache, layout)
            cache.length = length
        state.position = length

    def step(self, x: Tensor, state: Decoding) -> Tensor:
        """The next row of the output, ``(B, 1, C)``, given the token before it; the first row does not depend on it."""
        if state.position == 0:
            x = self.right_shift(x)
        x = x + self.pos_embd(state.position)
        visible = None if self.layout is None else self._visible(state.position).to(x.device)
        for net, memory, cache in zip(self._blocks, state.memories, state.caches, strict=True):
            x = net.step(x, state.classes, memory, cache, visible)
        state.position += 1
        return x

    @property
    def _blocks(self) -> list[AttentionBlock]:
        return cast(list[AttentionBlock], list(self.attn_nets))

    def _visible(self, position: int) -> Tensor:
        """The tokens ``(K,)`` that the one at `position` reads: in the blocks of its row, and not after it."""
        assert self.layout is not None
        size = self.layout.block_size
        tokens = (self._visible_blocks[position // size][:, None] * size + torch.arange(size, device="cpu")).flatten()
        return tokens[tokens <= position]


def _rows(layout: BlockLayout) -> list[Tensor]:
    """The blocks that each block reads."""
    return list(layout.columns.long().tensor_split(layout.row_offsets[0, 1:-1].long()))
