"""Latent attention, in a block that updates some streams of tokens from others.

    x       = LN_1(reader) + W_proj latent_attention(reader, sources)  the residual is of the normalised tokens
    reader  = x + MLP(LN_2(x))

MeBT: Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers" (CVPR 2023). Few latents stand between many contexts, which are known, and many targets, which are not::

    contexts --latent_enc-> latents --latent_dec-> targets
                            latents <---lt2l------ targets
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn._over_ranks import OverRanks
from vattn.nn.heads import merge_heads, split_heads
from vattn.nn.sdpa import scaled_dot_product_attention
from vattn.ops.latent_attention import latent_attention

if TYPE_CHECKING:
    from vattn.distributed._ranks import Ranks


class LatentAttention(nn.Module):
    """Multi-head attention of tokens that read over tokens that are read, each in any number of tensors.

    Its parameters have the names that the official MeBT code gives them.

    Args:
        dim: channels C of input and output.
        num_heads: heads H, which divide `dim`.
        attn_drop: probability of dropping an attention weight, in training.
        proj_drop: dropout after the output projection, in training.

    Shape:
        readers and sources, lists of ``(B, tokens, C)``, to a list of the shapes of the readers. `attn_bias` is added
        to the scaled scores, and is broadcastable to ``(B, H, all readers, all sources)``. `attend` is another function
        with the arguments of :func:`vattn.latent_attention`, for what has no bias.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting that does not fit.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers".

    Example:
        >>> attention = LatentAttention(dim=64, num_heads=4)
        >>> latents, targets = torch.randn(2, 16, 64), torch.randn(2, 1000, 64)
        >>> [out.shape for out in attention([latents], [latents, targets])]
        [torch.Size([2, 16, 64])]
    """

    def __init__(self, dim: int, num_heads: int, *, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        op = type(self).__name__
        for name, setting in (("dim", dim), ("num_heads", num_heads)):
            _checks.integer(op, name, setting, least=1)
        if dim % num_heads:
            raise ValueError(f"{op}: dim must be a multiple of num_heads={num_heads}, got dim={dim}")
        self.num_heads = num_heads
        self.key = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        readers: Sequence[Tensor],
        sources: Sequence[Tensor],
        attn_bias: Tensor | None = None,
        *,
        attend: Callable[..., Any] = latent_attention,
    ) -> list[Tensor]:
        key, value = ([split_heads(layer(x), self.num_heads) for x in sources] for layer in (self.key, self.value))
        lengths = [x.shape[1] for x in readers]
        biases: Sequence[Tensor | None] = [None] * len(lengths)
        if attn_bias is not None and sum(x.shape[2] for x in key) > 0:
            biases = attn_bias.expand(-1, -1, sum(lengths), -1).split(lengths, 2)
        dropout_p = self.attn_drop.p if self.training else 0.0
        outs = []
        for reader, bias in zip(readers, biases, strict=True):
            query = split_heads(self.query(reader), self.num_heads)
            if bias is None:
                out = cast(Tensor, attend(query, key, value, dropout_p=dropout_p))
            else:  # the operator has no bias
                out = scaled_dot_product_attention(query, torch.cat(key, 2), torch.cat(value, 2), bias, dropout_p)
            outs.append(self.proj_drop(self.proj(merge_heads(out))))
        return outs

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


LATENT_MODES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "latent_enc": (("latents",), ("contexts",)),
    "latent_self": (("latents",), ("latents",)),
    "latent_dec": (("targets",), ("latents",)),
    "lt2l": (("latents",), ("latents", "targets")),
    "maskgit": (("contexts", "targets"), ("contexts", "targets")),
}
"""The modes of a :class:`LatentBlock`: who reads, and is updated, and who is read."""


class LatentBlock(nn.Module, OverRanks):
    """A block of MeBT: one of five ways in which latents, contexts and targets read each other.

    The residual of the attention is of the normalised reader, as in the official code: a stream is normalised each
    time that it reads. Parameters have the official names.

    Args:
        dim: channels C.
        num_heads: heads H, which divide `dim`.
        mode: one of ``LATENT_MODES``, which tell who reads whom.
        mlp_ratio: channels inside the MLP, in multiples of `dim`.
        attn_drop: probability of dropping an attention weight, in training.
        proj_drop: dropout after the attention's projection and after the MLP, in training.

    Shape:
        latents ``(B, NS, C)``, contexts ``(B, NC, C)``, targets ``(B, NT, C)``, of any lengths, 0 among them, to the
        same three. `attn_bias`, if given, is added to the scaled scores: ``(B or 1, H or 1, readers, sources)``.
        Over ranks (see :func:`vattn.distributed.parallelize`) latents are the same on all, contexts and targets are
        shards. `lengths` are those of all ranks' "contexts" and "targets"; without them the ranks ask each other.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting that does not fit, or a bias over ranks.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers".

    Example:
        >>> block = LatentBlock(dim=64, num_heads=4, mode="latent_enc")
        >>> latents, contexts, targets = (torch.randn(2, tokens, 64) for tokens in (16, 900, 100))
        >>> new_latents, same_contexts, same_targets = block(latents, contexts, targets)
        >>> new_latents.shape, same_contexts is contexts
        (torch.Size([2, 16, 64]), True)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mode: str,
        *,
        mlp_ratio: int = 4,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in LATENT_MODES:
            raise ValueError(f"LatentBlock: mode must be one of {', '.join(LATENT_MODES)}, got mode={mode!r}")
        _checks.integer("LatentBlock", "mlp_ratio", mlp_ratio, least=1)
        self.mode = mode
        self.attn = LatentAttention(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop)
        self.ln1 = nn.LayerNorm(dim)
        self.ln2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim), nn.Dropout(proj_drop)
        )

    def _refuse(self, ranks: "Ranks") -> None:
        if self.mode == "maskgit":
            must = "be another one over ranks: in it sharded tokens read sharded tokens"
            raise ValueError(f"LatentBlock: mode must {must}, got mode={self.mode!r}")

    def forward(
        self,
        latents: Tensor,
        contexts: Tensor,
        targets: Tensor,
        attn_bias: Tensor | None = None,
        *,
        lengths: Mapping[str, Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if attn_bias is not None and self.ranks is not None:
            raise ValueError(
                f"LatentBlock: attn_bias must be None over ranks, got attn_bias.shape={tuple(attn_bias.shape)}"
            )
        streams = {"latents": latents, "contexts": contexts, "targets": targets}
        readers, sources = LATENT_MODES[self.mode]
        normed = {name: self.ln1(streams[name]) for name in dict.fromkeys((*readers, *sources))}
        attended = self.attn(
            [normed[name] for name in readers], [normed[name] for name in sources], attn_bias,
            attend=self._attend(lengths),
        )  # fmt: skip
        for name, y in zip(readers, attended, strict=True):
            x = normed[name] + y
            streams[name] = x + self.mlp(self.ln2(x))
        return streams["latents"], streams["contexts"], streams["targets"]

    def _attend(self, lengths: Mapping[str, Sequence[int]] | None) -> Callable[..., Any]:
        """The operator, on one process or over ranks."""
        readers, sources = LATENT_MODES[self.mode]
        draws = self.training and self.attn.attn_drop.p > 0
        if self.ranks is None or (readers == sources and not draws):  # latents read latents: each rank has all
            return latent_attention
        from vattn.distributed.latent_attention import latent_attention as over_ranks

        sharded: Any = tuple("replicated" if name == "latents" else "keys" for name in sources)
        of_shards: Any = None if lengths is None else [lengths.get(name) for name in sources]
        if readers == ("targets",):
            sharded, of_shards = "queries", None if lengths is None else lengths["targets"]
        return partial(over_ranks, group=self.ranks, sharded=sharded, grad="partial", lengths=of_shards)

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"
