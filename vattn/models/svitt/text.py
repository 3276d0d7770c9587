"""The text encoder of SViTT: a BERT whose last layers also read a video, and prune most of its tokens.

    x = LN(x + W_proj attention(x, x))         every layer
    x = LN(x + W_proj attention(x, video))     from `fusion_layer` on
    x = LN(x + MLP(x))

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023), on Devlin et al., "BERT:
Pre-training of Deep Bidirectional Transformers for Language Understanding" (NAACL 2019). After a layer that prunes,
later ones read only the video tokens that it attended to most::

    video tokens        g  0  1  2  3  4  5  6  7        g is global, and always stays
    layer 9 reads       x  x  x  x  x  x  x  x  x        prunes with keep=0.5
    layers 10, 11       x  .  x  x  .  .  x  .  x
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.models.checkpoints import PretrainedModel, heads_or_default
from vattn.models.layers import init_linear, named
from vattn.models.results import exportable
from vattn.models.settings import Config, number, official_settings, override, probabilities
from vattn.models.svitt.weights import text_weights
from vattn.nn import merge_heads, split_heads
from vattn.nn.sdpa import scaled_dot_product_attention
from vattn.ops.latent_attention import latent_attention
from vattn.ops.node_sparse_attention import node_sparse_attention
from vattn.ops.select_tokens import select_tokens
from vattn.ops.token_importance import token_importance

KEEP_BY = ("cls_attn", "avg_attn")


@exportable
class Fused(NamedTuple):
    """Text that has read a video: its tokens ``(B, L, C)``, and for each pruning the video tokens that were kept.

    The latter are ``(B, 1 + K)`` int64, indices in the video sequence, 0 of which is the global token.
    """

    tokens: Tensor
    kept: tuple[Tensor, ...]


class TextEncoder(PretrainedModel):
    """BERT with cross-attention to a video in its last layers. Settings default to the official ones.

    Args:
        vocab_size, dim, depth, num_heads, mlp_dim, max_length: as in any BERT.
        fusion_layer: the first layer that reads the video.
        video_dim: channels of a video token.
        keep: share of the video tokens that a pruning layer leaves to the next ones.
        prune_after: layers, counted from 0, after whose cross-attention video tokens are pruned, if `keep` is below 1.
        keep_by: "cls_attn" keeps what the first text token attends to, "avg_attn" what all text tokens do on average,
            padding among them.
        causal: a text token reads no later one, as in a decoder.
        dropout: of embeddings, attention weights and outputs of layers, in training.

    Shape:
        ids ``(B, L)`` int64 and mask ``(B, L)``, 0 for padding, or None, to text tokens ``(B, L, dim)``: the first
        `fusion_layer` layers. :meth:`fuse` is the others.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers"; Devlin et al., "BERT: Pre-training of
        Deep Bidirectional Transformers for Language Understanding".

    Example:
        >>> size = {"dim": 32, "depth": 4, "num_heads": 2, "mlp_dim": 64, "video_dim": 48}
        >>> encoder = TextEncoder(100, **size, fusion_layer=2, keep=0.25, prune_after=(2,))
        >>> text = encoder(torch.randint(100, (3, 7)))
        >>> fused = encoder.fuse(text, None, torch.randn(3, 1 + 20, 48))
        >>> fused.tokens.shape, fused.kept[0].shape
        (torch.Size([3, 7, 32]), torch.Size([3, 6]))
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        max_length: int = 512,
        *,
        fusion_layer: int = 9,
        video_dim: int = 768,
        keep: float = 1.0,
        prune_after: Collection[int] = (9,),
        keep_by: str = "cls_attn",
        causal: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for name, setting, least in (
            ("vocab_size", vocab_size, 1), ("depth", depth, 1), ("fusion_layer", fusion_layer, 0),
            ("mlp_dim", mlp_dim, 1), ("max_length", max_length, 1), ("video_dim", video_dim, 1), ("dim", dim, 1),
            ("num_heads", num_heads, 1),
        ):  # fmt: skip
            _checks.integer(op, name, setting, least=least)
        for i in prune_after:
            _checks.integer(op, "prune_after", i, least=0)
        number(op, "keep", keep, 0, 1, above=True)
        probabilities(op, dropout=dropout)
        if keep_by not in KEEP_BY:
            raise ValueError(f"{op}: keep_by must be one of {', '.join(KEEP_BY)}, got keep_by={keep_by!r}")
        if keep < 1 and not all(fusion_layer <= i < depth for i in prune_after):
            raise ValueError(
                f"{op}: prune_after must be layers from fusion_layer={fusion_layer} to {depth - 1}, got {prune_after=}"
            )
        self.fusion_layer = fusion_layer
        self.video_dim = video_dim
        self.keep = keep
        self.prune_after = frozenset(prune_after)
        self.keep_by = keep_by
        self.causal = causal
        self.word = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_length, dim)
        self.kind = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            TextLayer(dim, num_heads, mlp_dim, video_dim if i >= fusion_layer else None, dropout) for i in range(depth)
        )
        self.apply(init_linear)
        for embedding in (self.word, self.position, self.kind):
            nn.init.normal_(embedding.weight, std=0.02)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> "TextEncoder":
        """The encoder of an official checkpoint, or of BERT itself with cross-attention, in evaluation mode.

        Args:
            state_dict: of ``BertModel`` in ``models/sparse_xbert.py``. It is copied; dtype and device stay.
            config: the official ``BertConfig`` as a dict, of which ``num_attention_heads``, ``fusion_layer``,
                ``token_keep_rate``, ``token_drop_loc`` (layers without a video are left out, as in the official code),
                ``token_keep_strategy`` and ``hidden_dropout_prob`` are read; sizes are those of the weights.
            overrides: settings of the constructor, which win over those of `config` and of the weights.

        Raises:
            TypeError: `config` is not a mapping, or a setting has another type.
            ValueError: there is no such setting, or the weights or the configuration do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op = "TextEncoder.from_official"
        cls._require_overrides(op, overrides)
        weights = text_weights(op, state_dict)
        return cls._from_weights(weights, text_settings(op, weights, config, overrides))

    def _usage(self) -> str:
        words, dim = self.word.weight.shape
        return (
            f"ids = torch.randint({words}, (1, {min(8, self.position.num_embeddings)}))  # of words, from a tokenizer\n"
            f"states = model(ids)  # (1, {min(8, self.position.num_embeddings)}, {dim})"
        )

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        text, visible = self.embed(ids), self._visible(mask, ids)
        for layer in list(self.layers)[: self.fusion_layer]:
            text, _ = layer(text, visible)
        return text

    def embed(self, ids: Tensor) -> Tensor:
        """``(B, L)`` int64 to ``(B, L, dim)``, what the first layer reads."""
        if ids.dim() != 2 or ids.shape[1] > self.position.num_embeddings:
            raise ValueError(
                f"{type(self).__name__}: ids must have shape (B, L), L up to {self.position.num_embeddings}, "
                f"got ids.shape={tuple(ids.shape)}"
            )
        x = self.word(ids) + self.kind.weight[0] + self.position.weight[: ids.shape[1]]
        return self.drop(self.norm(x))

    def fuse(self, text: Tensor, mask: Tensor | None, video: Tensor, video_mask: Tensor | None = None) -> Fused:
        """Text tokens that have read a video.

        Without a `video_mask`, keys are read where they lie, also after pruning; with one, attention falls back on
        :func:`torch.nn.functional.scaled_dot_product_attention`, with copies of what was kept.

        Args:
            text: ``(B, L, dim)``, as :meth:`forward` gives it.
            mask: ``(B, L)``, 0 for padding, or None.
            video: ``(B, 1 + N, video_dim)``, the first token global, or ``(1, 1 + N, video_dim)``, one video for all
                texts: then it is projected only once.
            video_mask: ``(B, 1 + N)`` or ``(1, 1 + N)``, 0 for padding, or None.
        """
        if video.dim() != 3 or video.shape[0] not in (1, text.shape[0]):
            raise ValueError(
                f"{type(self).__name__}: video must have shape ({text.shape[0]} or 1, 1 + N, C), "
                f"got video.shape={tuple(video.shape)}"
            )
        visible = self._visible(mask, text)
        readable = None if video_mask is None else video_mask.bool().expand(text.shape[0], -1)[:, None, None]
        kept: list[Tensor] = []
        for i, layer in list(enumerate(self.layers))[self.fusion_layer :]:
            last = kept[-1] if kept else None
            keep = self.keep if i in self.prune_after else 1.0
            text, chosen = layer(text, visible, video, readable, last, keep, self.keep_by)
            if chosen is not None and chosen is not last:
                kept.append(chosen)
        return Fused(text, tuple(kept))

    def _visible(self, mask: Tensor | None, text: Tensor) -> Tensor | None:
        """Who reads whom, for all heads: bool ``(B or 1, 1, L or 1, L)``; None is everyone."""
        length = text.shape[1]
        visible = None if mask is None else mask.bool()[:, None, None]
        if not self.causal:
            return visible
        past = torch.ones(length, length, dtype=torch.bool, device=text.device).tril()[None, None]
        return past if visible is None else past & visible

    def extra_repr(self) -> str:
        return (
            f"fusion_layer={self.fusion_layer}, keep={self.keep}, prune_after={sorted(self.prune_after)}, "
            f"keep_by={self.keep_by!r}, causal={self.causal}, video_dim={self.video_dim}"
        )


class TextLayer(nn.Module):
    """A layer of BERT, normalised after each residual; with `video_dim` it can read a video between its two halves.

    Shape:
        text ``(B, L, dim)``, and the video if it is to be read, to text and to the video tokens that later layers read,
        ``(B, 1 + K)`` int64, None for all. Whatever the layer does it does in its forward, which is where FSDP and
        hooks expect its weights to be used.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, video_dim: int | None, dropout: float) -> None:
        super().__init__()
        self.attn = TextAttention(dim, num_heads, dim, dropout)
        self.cross = None if video_dim is None else TextAttention(dim, num_heads, video_dim, dropout)
        self.mlp = named(fc1=nn.Linear(dim, mlp_dim), act=nn.GELU(), fc2=nn.Linear(mlp_dim, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        text: Tensor,
        visible: Tensor | None,
        video: Tensor | None = None,
        readable: Tensor | None = None,
        kept: Tensor | None = None,
        keep: float = 1.0,
        keep_by: str = "cls_attn",
    ) -> tuple[Tensor, Tensor | None]:
        text = self.attn.residual(text, self.attn.attend(*self.attn.heads(text, text), visible))
        if video is not None:
            assert self.cross is not None
            query, key, value = self.cross.heads(text, video)
            text = self.cross.residual(text, self.cross.attend(query, key, value, readable, kept))
            if keep < 1:
                judges = query[:, :, :1] if keep_by == "cls_attn" else query
                importance = _importance(judges, key, readable, kept)
                _, chosen = select_tokens(importance[..., None], importance[:, 1:], keep)
                chosen = F.pad(chosen + 1, (1, 0))  # the global token stays
                kept = chosen if kept is None else kept.gather(1, chosen)
        return self.norm(text + self.drop(self.mlp(text))), kept


class TextAttention(nn.Module):
    """``LN(x + W_proj attention(x, source))``, in three steps, as pruning needs to look between them."""

    def __init__(self, dim: int, num_heads: int, source_dim: int, dropout: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"TextEncoder: dim must be a multiple of num_heads={num_heads}, got dim={dim}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(source_dim, dim)
        self.value = nn.Linear(source_dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)

    def heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, ``(B, H, tokens, D)``; one source for all samples is projected once."""
        query, key, value = (
            split_heads(y, self.num_heads).expand(x.shape[0], -1, -1, -1)
            for y in (self.query(x), self.key(source), self.value(source))
        )
        return query, key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """``(B, H, Lq, D)``: over the kept keys, if not over all, and of these those that the mask does not hide."""
        dropout_p = self.drop.p if self.training else 0.0
        if mask is not None:
            if kept is not None:
                key, value, mask = (_gather(x, kept, dim) for x, dim in ((key, 2), (value, 2), (mask, 3)))
            return scaled_dot_product_attention(query, key, value, mask, dropout_p)
        if kept is not None:
            return cast(Tensor, node_sparse_attention(query, key, value, kept, dropout_p=dropout_p))
        return cast(Tensor, latent_attention(query, key, value, dropout_p=dropout_p))

    def residual(self, x: Tensor, out: Tensor) -> Tensor:
        return self.norm(x + self.drop(self.proj(merge_heads(out))))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


@torch.no_grad()
def _importance(query: Tensor, key: Tensor, mask: Tensor | None, kept: Tensor | None) -> Tensor:
    """``(B, keys that are left)``: the probability of each, averaged over heads and queries; below 0 what is hidden."""
    if kept is not None:
        key = _gather(key, kept, 2)
        mask = None if mask is None else _gather(mask, kept, 3)
    if mask is None:
        return token_importance(query, key)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).mean((1, 2)).masked_fill(~mask[:, 0, 0], -1.0)  # below what is visible and rounds to 0


def _gather(x: Tensor, kept: Tensor, dim: int) -> Tensor:
    """The entries ``kept (B, K)`` of each sample along `dim` of ``x (B, ., ., .)``."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = kept.shape
    return x.take_along_dim(kept.view(shape), dim)


class TokenHead(nn.Module):
    """Logits of words from text tokens: BERT's head for masked words. Its weights are those of the word embeddings.

    Shape:
        ``(B, L, dim)`` and the weights ``(vocab_size, dim)`` to ``(B, L, vocab_size)``.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(init_linear)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), weight, self.bias)


def text_settings(
    op: str, weights: Mapping[str, Tensor], config: Config, overrides: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The settings of the :class:`TextEncoder` that weights, under their names here, and a configuration make."""
    vocab_size, dim = weights["word.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    fusion_layer = min((i for i in range(depth) if f"layers.{i}.cross.key.weight" in weights), default=depth)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": dim,
        "depth": depth,
        "mlp_dim": weights["layers.0.mlp.fc1.weight"].shape[0],
        "max_length": weights["position.weight"].shape[0],
        "fusion_layer": fusion_layer,
    }
    if fusion_layer < depth:
        settings["video_dim"] = weights[f"layers.{fusion_layer}.cross.key.weight"].shape[1]
    settings |= official_settings(
        op, config, TextEncoder, num_heads="num_attention_heads", keep="token_keep_rate",
        prune_after="token_drop_loc", keep_by="token_keep_strategy", dropout="hidden_dropout_prob",
    )  # fmt: skip
    settings["prune_after"] = tuple(i for i in settings.get("prune_after", (9,)) if fusion_layer <= i < depth)
    settings = override(settings, overrides or {})
    return settings | {"num_heads": heads_or_default(op, settings.get("num_heads"), dim)}
