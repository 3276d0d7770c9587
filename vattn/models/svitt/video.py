"""The video encoder of SViTT: a BEiT over the patches of all frames, with sparse edges and sparse nodes.

    x = x + scale_1 * attention(LN(x))        each block of tokens reads few blocks (edge sparsity)
    x = x + scale_2 * MLP(LN(x))
    x = x[most important]                     after some layers (node sparsity)

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023), on Bao et al., "BEiT: BERT
Pre-Training of Image Transformers" (ICLR 2022). Tokens are the patches of all frames, behind one that is global::

    4 frames of 14 x 14 patches     layer 3    6    9         keep=0.7: what the global token attends to most
    784 tokens, 14 blocks of 56         549  385  270         10, 7, 5 blocks

A model learns on few frames first, and goes on with more, and sparser: :func:`expand`.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn._over_ranks import OverRanks
from vattn.layout import BlockLayout
from vattn.models.cards import random_video
from vattn.models.checkpoints import LARGEST, Model, PretrainedModel, count_blocks, heads_or_default
from vattn.models.draws import Draws, Randomness
from vattn.models.layers import init_linear, named
from vattn.models.pixels import NORMALISED, require_frames, warn_of_bytes
from vattn.models.results import exportable
from vattn.models.seeded_draws import draws_in
from vattn.models.settings import Config, number, official_settings, override, probabilities
from vattn.models.svitt.orders import token_order
from vattn.models.svitt.sparsity import Sparsity, official_sparsity
from vattn.models.svitt.weights import video_weights
from vattn.models.tables import Table
from vattn.nn import SparseSelfAttention
from vattn.ops.select_tokens import select_tokens

if TYPE_CHECKING:
    from vattn.distributed._ranks import Ranks


@exportable
class VideoTokens(NamedTuple):
    """The tokens of a video.

    Attributes:
        tokens: ``(B, 1 + K, C)``: the global token, and the patches that are left.
        pooled: ``(B, C)``, one vector for the video.
        kept: for each pruning the raster indices ``(B, K)`` int64 of the patches that were left.
    """

    tokens: Tensor
    pooled: Tensor
    kept: tuple[Tensor, ...]


class SparseBlock(nn.Module):
    """A layer of the encoder: sparse attention, MLP, and, where :meth:`sparsify` asks for it, pruning.

    Shape:
        x ``(B, 1 + N, dim)``, its layout and its positions ``(N,)`` or ``(B, N)`` int64, or None for each, and over
        ranks the lengths of the shards (see :class:`vattn.nn.SparseSelfAttention`), to x ``(B, 1 + K, dim)`` and its
        positions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        window: tuple[int, int, int] | None,
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.attn = SparseSelfAttention(dim, num_heads, window=window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = named(fc1=nn.Linear(dim, mlp_dim), act=nn.GELU(), fc2=nn.Linear(mlp_dim, dim))
        self.scale1: nn.Parameter | None = None
        self.scale2: nn.Parameter | None = None
        if layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.sparsify(Sparsity(), keep=1.0)

    def sparsify(self, sparsity: Sparsity, keep: float) -> None:
        """Prune from now on down to a share of `keep`, and fill up blocks, as `sparsity` says."""
        self.keep = keep
        self.keep_by = sparsity.keep_by
        self.attn.pad_keys = sparsity.pad_keys

    def forward(
        self,
        x: Tensor,
        layout: BlockLayout | None = None,
        positions: Tensor | None = None,
        generator: Randomness = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        attended = self.attn(self.norm1(x), layout, positions, return_importance=self.keep < 1, lengths=lengths)
        attended, importance = attended if self.keep < 1 else (attended, None)
        x = x + self._residual(attended, self.scale1)
        x = x + self._residual(self.mlp(self.norm2(x)), self.scale2)
        if importance is None:
            return x, positions
        if self.keep_by == "random":
            batch, length = importance.shape
            draws = draws_in(self.training, generator)
            drawn = draws.uniforms(batch if self.training else 1, length, device=x.device)
            importance = drawn.expand(batch, -1)  # in evaluation a video is the same alone and in a batch
        return select_tokens(x, importance, self.keep, positions=positions)

    def _residual(self, y: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            y = scale * y
        if self.training and self.drop_path > 0:
            stays = torch.rand(y.shape[0], 1, 1, device=y.device, dtype=torch.float32) >= self.drop_path
            y = y * stays / max(1 - self.drop_path, 1e-9)  # where none stays, 0
        return y

    def extra_repr(self) -> str:
        return f"keep={self.keep}, keep_by={self.keep_by!r}, drop_path={self.drop_path}"


class VideoEncoder(PretrainedModel, OverRanks):
    """BEiT over the patches of all frames, with sparse edges and sparse nodes. Settings default to the official ones.

    Without sparsity, and with one frame, it is BEiT itself: an image checkpoint is loaded as one, and expanded.

    Args:
        num_frames: T.
        image_size: height and width of a frame, or one number for both.
        patch_size, dim, depth, num_heads, mlp_dim: as in any ViT.
        sparsity: what is read and kept, as a :class:`Sparsity` or a dict of its fields; None for the official one.
        order: of the tokens, and so which ones are a block, see :func:`vattn.models.svitt.token_order`.
        position_bias: whether each layer has a table of biases, one for each offset in time and space.
        layer_scale: the first value of the factors of each residual; None for no factors.
        mean_pooling: the vector of a video is the normalised mean of the patches that are left, and tokens are not
            normalised; otherwise they are, and it is the global token.
        drop_path: how likely the last layer's residuals are dropped in training, the first one's never.
        eval_seed: decides what is drawn in evaluation, so that a video is the same vector in each call.

    Shape:
        video ``(B, T, 3, height, width)``, frames in front of channels, its pixels normalised as those were on which
        the weights have learned, to :class:`VideoTokens`. `layouts`, one for each layer, on the device of the
        video, say who reads whom, and None among them that all read all. If they are not given, they are drawn, so that
        the seed of `generator` decides; without one it is torch's own in training, and `eval_seed` in evaluation.

        Over ranks (see :func:`vattn.distributed.parallelize`) all have the same video, layouts and draws. Each embeds
        the patches of its share of the blocks, and has the global token and these in `tokens`; `pooled` is that of all.
        Where all tokens read all, there are as many blocks as ranks.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers"; Bao et al., "BEiT: BERT Pre-Training of
        Image Transformers".

    Example:
        >>> sparsity = Sparsity(block_size=4, num_random=2, keep=0.5, prune_after=(0,))
        >>> size = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
        >>> encoder = VideoEncoder(num_frames=2, sparsity=sparsity, **size)
        >>> out = encoder(torch.randn(3, 2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        >>> out.tokens.shape, out.pooled.shape, out.kept[0].shape             # 16 of 32 patches are kept
        (torch.Size([3, 17, 32]), torch.Size([3, 32]), torch.Size([3, 16]))
        >>> clip = torch.randn(1, 2, 3, 32, 32)
        >>> torch.equal(encoder.eval()(clip).pooled, encoder(clip).pooled)
        True
    """

    added_settings = frozenset({"eval_seed"})

    def __init__(
        self,
        num_frames: int = 4,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        sparsity: Sparsity | Mapping[str, Any] | None = None,
        order: str = "raster",
        position_bias: bool = True,
        layer_scale: float | None = 0.1,
        mean_pooling: bool = True,
        drop_path: float = 0.0,
        eval_seed: int = 0,
    ) -> None:
        super().__init__()
        for name, setting, least in (
            ("num_frames", num_frames, 1), ("patch_size", patch_size, 1), ("depth", depth, 1), ("mlp_dim", mlp_dim, 1),
            ("eval_seed", eval_seed, 0),
        ):  # fmt: skip
            _checks.integer("VideoEncoder", name, setting, least=least)
        if eval_seed > LARGEST:
            raise ValueError(f"VideoEncoder: eval_seed must be at most {LARGEST}, got eval_seed={eval_seed}")
        probabilities("VideoEncoder", drop_path=drop_path)
        if layer_scale is not None:
            number("VideoEncoder", "layer_scale", layer_scale, -math.inf)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        window = (num_frames, height // patch_size, width // patch_size)
        self.order = order
        self.mean_pooling = mean_pooling
        self.eval_seed = eval_seed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(
            SparseBlock(
                dim, num_heads, mlp_dim, window=window if position_bias else None, layer_scale=layer_scale,
                drop_path=drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )  # fmt: skip
        self.norm = nn.Identity() if mean_pooling else nn.LayerNorm(dim, eps=1e-12)
        self.pool_norm = nn.LayerNorm(dim, eps=1e-12) if mean_pooling else nn.Identity()
        self.apply(init_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self._see(window, Sparsity(**sparsity) if isinstance(sparsity, Mapping) else sparsity or Sparsity())

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> "VideoEncoder":
        """The encoder of an official checkpoint, or of an image BEiT, in evaluation mode.

        Args:
            state_dict: of ``BeitModel`` in ``models/sparse_xbeit.py``, or of BEiT. It is copied; dtype and device stay.
            config: the official ``BeitConfig`` as a dict, of which ``image_size``, ``num_attention_heads`` and the
                settings of sparsity are read; the other sizes, frames among them, are those of the weights.
            overrides: settings of the constructor, which win over those of `config` and of the weights. For a model
                without position bias `num_frames` is needed.

        Raises:
            TypeError: `config` is not a mapping, or a setting has another type.
            ValueError: there is no such setting, or the weights or the configuration do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op = "VideoEncoder.from_official"
        cls._require_overrides(op, overrides)
        weights = video_weights(op, state_dict)
        return cls._from_weights(weights, video_settings(op, weights, config, overrides))

    def _usage(self) -> str:
        dim = self.cls_token.shape[2]
        return f"{random_video(self.config)}\nvector = model(video).pooled  # (1, {dim})"

    def forward(
        self,
        video: Tensor,
        layouts: Sequence[BlockLayout | None] | None = None,
        *,
        generator: Randomness = None,
    ) -> VideoTokens:
        draws = draws_in(self.training, generator, self.eval_seed)
        if layouts is not None and len(layouts) != len(self.blocks):
            raise ValueError(
                f"VideoEncoder: layouts must be one for each of {len(self.blocks)} layers, "
                f"got len(layouts)={len(layouts)}"
            )
        self._agree("VideoEncoder", lambda: self._checked(video))
        warn_of_bytes(self, "video", video, NORMALISED)
        lengths = None if self.ranks is None else self._lengths(self.ranks)
        positions = None if self._order is None else self._order.on(video.device)
        x = self._embed(video, positions, lengths)
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            layout = self._drawn(x, draws) if layouts is None else layouts[i]
            if layout is None and self.ranks is not None:
                from vattn.distributed._edge_plan import dense_layout

                layout = dense_layout(math.prod(self.window), self._block_size(self.ranks), x.device)
            x, positions = block(x, layout, positions, draws, lengths=lengths)
            if cast(SparseBlock, block).keep < 1:
                kept.append(cast(Tensor, positions))
        x = self.norm(x)
        return VideoTokens(x, self.pool_norm(self._mean(x)) if self.mean_pooling else x[:, 0], tuple(kept))

    @property
    def order_of_tokens(self) -> Tensor | None:
        """The raster indices of the tokens in the order in which they are read, ``(N,)``; None for raster order."""
        return None if self._order is None else self._order.made

    def _checked(self, video: Tensor) -> Mapping[str, Any]:
        """Check the video; returns what must be the same on all ranks, if there are any."""
        size = self.patch_embed.stride[0]
        frames, height, width = self.window
        require_frames("VideoEncoder", "video", video, (frames, 3, height * size, width * size))
        if not self._compares:
            return {}
        from vattn.distributed._checks import fingerprint

        return {"video": fingerprint(video)}

    def _embed(self, video: Tensor, order: Tensor | None, lengths: Sequence[int] | None) -> Tensor:
        """``(B, T, 3, height, width)`` to ``(B, 1 + N, dim)``, in the order of the tokens; over ranks this one's."""
        glob = self.cls_token.expand(video.shape[0], -1, -1)
        if self.ranks is None or lengths is None:
            patches = self.patch_embed(video.flatten(0, 1)).flatten(2).transpose(1, 2)  # (B * T, h * w, dim)
            patches = patches.unflatten(0, video.shape[:2]).flatten(1, 2)
            return torch.cat([glob, patches if order is None else patches[:, order]], 1)
        begin, size = sum(lengths[: self.ranks.rank]), self.patch_embed.stride[0]
        own = torch.arange(begin, begin + lengths[self.ranks.rank], device=video.device)
        t, h, w = torch.unravel_index(own if order is None else order[own], self.window)
        grid = video.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # (B, T, 3, h, size, w, size)
        pixels = grid.permute(0, 1, 3, 5, 2, 4, 6)[:, t, h, w]  # (B, N, 3, size, size)
        patches = self.patch_embed(pixels.flatten(0, 1)).flatten(1)
        return torch.cat([glob, patches.unflatten(0, pixels.shape[:2])], 1)

    def _mean(self, x: Tensor) -> Tensor:
        """Of all patches that are left, on any rank: ``(B, 1 + N, dim)`` to ``(B, dim)``."""
        if self.ranks is None:
            return x[:, 1:].mean(1)
        return self._sum(x[:, 1:].sum(1)) / math.prod(self.window)

    def _block_size(self, ranks: "Ranks") -> int:
        """Of the blocks that are shared out over ranks."""
        if self.sparsity.num_random is None:  # all tokens read all
            return -(-math.prod(self.window) // ranks.size)
        return self.sparsity.block_size

    def _lengths(self, ranks: "Ranks") -> list[int]:
        """How many patches each rank has: those of its share of the blocks."""
        num_tokens, size = math.prod(self.window), self._block_size(ranks)
        blocks = itertools.accumulate(ranks.shares(-(-num_tokens // size)), initial=0)
        ends = [min(block * size, num_tokens) for block in blocks]
        return [end - begin for begin, end in itertools.pairwise(ends)]

    def _require_all_tokens(self, op: str) -> None:
        """Raise ValueError if this rank has a share of the tokens only."""
        if self.ranks is not None and self.ranks.size > 1:
            must = "be over no ranks where texts read the tokens of videos, of which a rank has its share"
            raise ValueError(
                f"{op}: video must {must}, got one over {self.ranks.size}; its pooled vector is of all tokens"
            )

    def _refuse(self, ranks: "Ranks") -> None:
        if any(cast(SparseBlock, block).keep < 1 for block in self.blocks):
            must = "be 1 over ranks, each of which would keep another number of tokens of each video"
            raise ValueError(f"VideoEncoder: sparsity.keep must {must}, got {self.sparsity.keep}")

    def _drawn(self, x: Tensor, draws: Draws) -> BlockLayout | None:
        if self.ranks is None or self.sparsity.num_random is None:
            return self._draw(x, draws)
        return torch.compiler.disable(self._draw)(x, draws)  # which blocks are drawn says what is sent

    def _draw(self, x: Tensor, draws: Draws) -> BlockLayout | None:
        num_tokens = x.shape[1] - 1 if self.ranks is None else math.prod(self.window)
        layout = self.sparsity.layout(num_tokens, draws)
        return None if layout is None else layout.to(x.device)

    def _see(self, window: tuple[int, int, int], sparsity: Sparsity) -> None:
        """Be an encoder of videos of `window` patches from now on, of this sparsity; the tables are not changed."""
        depth = len(self.blocks)
        if sparsity.keep < 1 and not all(0 <= i < depth for i in sparsity.prune_after):
            raise ValueError(
                f"VideoEncoder: sparsity.prune_after must be layers from 0 to {depth - 1}, got {sparsity.prune_after}"
            )
        self.window = window
        self.sparsity = sparsity
        self._reconfigure(num_frames=window[0], sparsity=sparsity)
        order = token_order(self.order, window)
        self._order = None if order is None else Table(order)
        for i, block in enumerate(self.blocks):
            cast(SparseBlock, block).sparsify(sparsity, sparsity.keep if i in sparsity.prune_after else 1.0)
        if self.ranks is not None:
            self._refuse(self.ranks)

    def _expand(self, num_frames: int, sparsity: Sparsity | None = None) -> None:
        """What :func:`expand` does, to this encoder itself."""
        for block in self.blocks:
            attention = cast(SparseBlock, block).attn
            if attention.position_bias is not None:
                attention.position_bias = attention.position_bias.inflate(num_frames)
        self._see((num_frames, *self.window[1:]), sparsity or self.sparsity)

    def extra_repr(self) -> str:
        settings = f"order={self.order!r}, mean_pooling={self.mean_pooling}, eval_seed={self.eval_seed}"
        return f"window={self.window}, {settings}, {self.sparsity}"


def expand(model: Model, num_frames: int, sparsity: Sparsity | None = None) -> Model:
    """A copy of `model`, ready to go on learning from more frames, and sparser: a step of SViTT's curriculum.

    The biases of each offset in time are those of the nearest one before. An image model, which has one frame, becomes
    a video model that does not depend on the order of its frames yet.

    Args:
        model: a :class:`VideoEncoder`, or a model that has some.
        num_frames: T.
        sparsity: what is read and kept from now on; None for what was until now.

    Raises:
        ValueError: `model` has no video encoder, or the sparsity does not fit it.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers", on temporal sparse expansion.

    Example:
        >>> size = {"image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
        >>> encoder = VideoEncoder(num_frames=4, sparsity=Sparsity(keep=0.7, prune_after=(0,)), **size)
        >>> longer = expand(encoder, 8, Sparsity(keep=0.6, prune_after=(0,)))
        >>> longer(torch.randn(1, 8, 3, 16, 16)).tokens.shape                 # 20 of 32 patches are kept
        torch.Size([1, 21, 32])
    """
    _checks.integer("expand", "num_frames", num_frames, least=1)
    model = copy.deepcopy(model)
    encoders = [module for module in model.modules() if isinstance(module, VideoEncoder)]
    if not encoders:
        raise ValueError(f"expand: model must have a VideoEncoder, got model={type(model).__name__}")
    for encoder in encoders:
        encoder._expand(num_frames, sparsity)
    return model


def video_settings(
    op: str, weights: Mapping[str, Tensor], config: Config, overrides: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The settings of the :class:`VideoEncoder` that weights, under their names here, and a configuration make."""
    num_cls_tokens = official_settings(op, config, {"number": int}, number="num_cls_tokens").get("number", 1)
    if num_cls_tokens != 1:
        raise ValueError(f"{op}: config must have one class token, got {num_cls_tokens=}")
    dim, _, _, patch_size = weights["patch_embed.weight"].shape
    found = official_settings(
        op, config, VideoEncoder, image_size="image_size", order="token_3d_order", drop_path="drop_path_rate",
        num_heads="num_attention_heads",
    )  # fmt: skip
    size, order = found.get("image_size", 224), found.get("order", "none")
    height, width = (size, size) if isinstance(size, int) else size
    table = weights.get("blocks.0.attn.position_bias.table")
    settings: dict[str, Any] = found | {
        "image_size": (height, width),
        "patch_size": patch_size,
        "dim": dim,
        "depth": count_blocks(weights, "blocks"),
        "mlp_dim": weights["blocks.0.mlp.fc1.weight"].shape[0],
        "sparsity": dataclasses.asdict(official_sparsity(op, config)),
        "order": "raster" if order == "none" else order,
        "position_bias": table is not None,
        "layer_scale": 0.1 if "blocks.0.scale1" in weights else None,
        "mean_pooling": "norm.weight" not in weights,
    }
    if table is None:
        settings = override(settings, overrides or {})
        if "num_frames" not in settings:
            raise ValueError(f"{op}: num_frames must be given for weights without position bias, got no num_frames")
        return settings | {"num_heads": heads_or_default(op, settings.get("num_heads"), dim)}
    offsets_in_space = (2 * (height // patch_size) - 1) * (2 * (width // patch_size) - 1)
    offsets_in_time, rest = divmod(table.shape[0] - 3, offsets_in_space)
    if rest or offsets_in_time % 2 == 0:
        raise ValueError(
            f"{op}: config must have the image_size of the weights, whose table has {table.shape[0]} rows, "
            f"got image_size={size}"
        )
    settings |= {"num_frames": (offsets_in_time + 1) // 2, "num_heads": table.shape[1]}
    return override(settings, overrides or {})
