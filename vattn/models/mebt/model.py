"""MeBT: a transformer that predicts the masked tokens of a video from the others, at a cost linear in their number.

    contexts = tokens[codes] + positions,  targets = mask + positions,  latents: learned
    logits   = W_head LN(targets)          after the blocks, see :class:`vattn.nn.LatentBlock`
    loss     = -sum log p(code of target) / (number of masked tokens)

MeBT: Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
Transformers" (CVPR 2023). Contexts and targets never read each other, but latents, of which there are few::

    block        1 .. 12                       13           14          15 .. 24
    mode         latent_enc, latent_self, ...  latent_enc   latent_dec  lt2l, latent_dec, ...
    latents      read contexts, each other     contexts                 targets, each other
    targets                                                 latents     latents
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn._over_ranks import OverRanks
from vattn.models.checkpoints import PretrainedModel, count_blocks, official_weights
from vattn.models.draws import Randomness
from vattn.models.layers import init_linear
from vattn.models.mebt.masks import require_part
from vattn.models.mebt.training import draw_partition, masked_loss
from vattn.models.settings import Config, official_settings, probabilities, require_told
from vattn.nn import LatentBlock

OFFICIAL_MODES = (
    *("latent_enc", "latent_self") * 6,
    *("latent_enc", "latent_dec"),
    *("lt2l", "latent_dec") * 5,
)
"""The 24 layers of the official configurations."""

OFFICIAL_NAMES = {
    "num_heads": "n_head",
    "modes": "mode",
    "grid": "shape",
    "embed_drop": "embd_pdrop",
    "attn_drop": "attn_pdrop",
    "proj_drop": "resid_pdrop",
}
"""What the official configurations call the settings of :class:`MeBT`."""


class LatentTransformer(nn.Module):
    """The blocks of MeBT, and the logits of its targets: ``GPT`` in the official code, with its parameter names.

    Args:
        vocab_size: logits of a target.
        dim, num_heads, modes: of the blocks, see :class:`vattn.nn.LatentBlock`; a mode for each block.
        embed_drop, attn_drop, proj_drop: dropout in training, of inputs, attention weights and outputs of layers.

    Shape:
        latents ``(B, NS, C)``, contexts ``(B, NC, C)`` and targets ``(B, NT, C)`` to logits ``(B, NT, vocab_size)``.
        `lengths`: see :class:`vattn.nn.LatentBlock`.

    Raises:
        TypeError, ValueError: a setting that does not fit.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers".

    Example:
        >>> transformer = LatentTransformer(100, dim=32, num_heads=2, modes=("latent_enc", "latent_dec"))
        >>> transformer(torch.randn(2, 4, 32), torch.randn(2, 0, 32), torch.randn(2, 60, 32)).shape
        torch.Size([2, 60, 100])
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 1024,
        num_heads: int = 16,
        modes: Sequence[str] = OFFICIAL_MODES,
        *,
        embed_drop: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(embed_drop)
        self.blocks = nn.ModuleList(
            LatentBlock(dim, num_heads, mode, attn_drop=attn_drop, proj_drop=proj_drop) for mode in modes
        )
        self.ln_f = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.apply(init_linear)

    def forward(
        self,
        latents: Tensor,
        contexts: Tensor,
        targets: Tensor,
        *,
        lengths: Mapping[str, Sequence[int]] | None = None,
    ) -> Tensor:
        latents, contexts, targets = (self.drop(x) for x in (latents, contexts, targets))
        for block in self.blocks:
            latents, contexts, targets = block(latents, contexts, targets, lengths=lengths)
        return self.head(self.ln_f(targets))


class MeBT(PretrainedModel, OverRanks):
    """MeBT: logits of the codes at some positions of a video, given the codes at others.

    Settings default to the official model for 16 frames of 128 x 128 pixels, in codes of 4 x 8 x 8 pixels each.

    Args:
        vocab_size: how many codes there are.
        grid: frames, height and width of a video in codes; a shorter video is a part of it.
        dim, num_heads, modes: of the blocks, see :class:`vattn.nn.LatentBlock`; a mode for each block.
        num_latents: how many latents there are between contexts and targets.
        embed_drop, attn_drop, proj_drop: dropout in training, of inputs, attention weights and outputs of layers.

    Shape:
        codes ``(B, T, height, width)`` int64, T up to that of the grid, or the first of them in raster order,
        ``(B, N)``; contexts ``(B, NC)`` and targets ``(B, NT)`` int64, which
        number codes in raster order, to logits ``(B, NT, vocab_size)``. Codes outside the contexts are not looked at.
        Over ranks (see :func:`vattn.distributed.parallelize`) all have the same codes, contexts and targets, which are
        integers; embeddings, activations and logits are those of this rank's share of contexts and targets.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.

    Source:
        Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional
        Transformers".

    Example:
        >>> model = MeBT(10, (2, 2, 2), dim=32, num_heads=2, modes=("latent_enc", "latent_dec"), num_latents=4)
        >>> codes = torch.randint(10, (1, 2, 2, 2))
        >>> model(codes, context=torch.tensor([[0, 5]]), target=torch.tensor([[7, 1, 2]])).shape
        torch.Size([1, 3, 10])
        >>> from vattn.models.mebt import continue_video
        >>> continue_video(model.eval(), codes[:, :1], num_frames=2, num_steps=2).shape
        torch.Size([1, 2, 2, 2])
    """

    def __init__(
        self,
        vocab_size: int = 16384,
        grid: tuple[int, int, int] = (4, 16, 16),
        dim: int = 1024,
        num_heads: int = 16,
        modes: Sequence[str] = OFFICIAL_MODES,
        num_latents: int = 256,
        *,
        embed_drop: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        names = ("frames", "height", "width")
        sizes = (("vocab_size", vocab_size), ("num_latents", num_latents), *zip(names, grid, strict=True))
        for name, size in sizes:
            _checks.integer("MeBT", name, size, least=1)
        probabilities("MeBT", embed_drop=embed_drop, attn_drop=attn_drop, proj_drop=proj_drop)
        self.grid = (grid[0], grid[1], grid[2])
        self.transformer = LatentTransformer(
            vocab_size, dim, num_heads, modes, embed_drop=embed_drop, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.tok_emb = nn.Embedding(vocab_size, dim)
        self.mask_emb = nn.Parameter(torch.empty(1, 1, dim))
        self.sos_emb = nn.Parameter(torch.empty(1, num_latents, dim))
        self.pos_emb = nn.Parameter(torch.empty(1, grid[0] * grid[1] * grid[2], dim))
        for embedding in (self.tok_emb.weight, self.mask_emb, self.sos_emb, self.pos_emb):
            nn.init.normal_(embedding, std=0.02)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> Self:
        """The model of an official checkpoint, in evaluation mode.

        Args:
            state_dict: of ``Net2NetTransformer`` in ``mebt/transformer.py``, with or without the outer dict of a
                checkpoint. Its tokenizer (``first_stage_model``) is left out. It is copied; dtype and device stay.
            config: the official configuration, whole or in part, of which ``n_head``, ``mode``, ``shape`` and, if it
                has them, ``embd_pdrop``, ``attn_pdrop`` and ``resid_pdrop`` are read; sizes are those of the weights.
                As in the official code, blocks that ``mode`` does not name are of the mode "maskgit".
            overrides: settings of this class, which win over `config` and what the weights tell; without `config`,
                `num_heads`, `modes` and `grid` must be among them.

        Raises:
            TypeError: `config` is not a mapping, or a setting has another type.
            ValueError: there is no such setting, or the weights or the configuration do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op = "MeBT.from_official"
        cls._require_overrides(op, overrides)
        weights = official_weights(op, state_dict, "tok_emb.weight", "pos_emb", "sos_emb", "transformer.head.weight")
        weights = {name: x for name, x in weights.items() if not name.startswith("first_stage_model.")}
        vocab_size, dim = weights["tok_emb.weight"].shape
        sizes = {"vocab_size": vocab_size, "dim": dim, "num_latents": weights["sos_emb"].shape[1]}
        settings = sizes | official_settings(op, config, cls, **OFFICIAL_NAMES) | overrides
        require_told(op, config, settings, **{name: OFFICIAL_NAMES[name] for name in ("num_heads", "modes", "grid")})
        depth = count_blocks({name.removeprefix("transformer."): x for name, x in weights.items()}, "blocks")
        settings["modes"] = [*settings["modes"], *["maskgit"] * (depth - len(settings["modes"]))]
        return cls._from_weights(weights, settings)

    def forward(self, codes: Tensor, context: Tensor, target: Tensor) -> Tensor:
        self._agree("MeBT", lambda: self._checked(codes, context, target))
        codes = codes.reshape(codes.shape[0], math.prod(codes.shape[1:]))
        lengths = None
        if self.ranks is not None:
            lengths = {"contexts": self.ranks.shares(context.shape[1]), "targets": self.ranks.shares(target.shape[1])}
            context, target = self._own(context), self._own(target)
        contexts = self.tok_emb(codes.gather(1, context)) + F.embedding(context, self.pos_emb[0])
        targets = self.mask_emb + F.embedding(target, self.pos_emb[0])
        over_ranks = {} if lengths is None else {"lengths": lengths}  # another transformer may stand in its place
        return self.transformer(self.sos_emb.expand(codes.shape[0], -1, -1), contexts, targets, **over_ranks)

    def _checked(self, codes: Tensor, context: Tensor, target: Tensor) -> Mapping[str, Any]:
        """Check the inputs; returns what must be the same on all ranks, if there are any."""
        require_part("MeBT", self.grid, codes)
        for name, positions in (("context", context), ("target", target)):
            if positions.dim() != 2 or positions.shape[0] != codes.shape[0]:
                must = f"have shape ({codes.shape[0]}, tokens)"
                raise ValueError(f"MeBT: {name} must {must}, got {name}.shape={tuple(positions.shape)}")
        if not self._compares:
            return {}
        from vattn.distributed._checks import fingerprint

        given = {"codes": codes, "context": context, "target": target}
        return {f"{name} (or its generator)": fingerprint(x) for name, x in given.items()}

    def _own(self, positions: Tensor) -> Tensor:
        """Of positions ``(B, tokens)`` this rank's share: all of them where there are no ranks."""
        if self.ranks is None:
            return positions
        share = self.ranks.share(positions.shape[1])
        return positions[:, share.start : share.stop]

    _usage_imports = ("generate",)

    def _usage(self) -> str:
        return f"codes = generate(model, 1, num_steps=8)  # (1, {', '.join(map(str, self.grid))}), for a tokenizer"

    def extra_repr(self) -> str:
        return f"grid={self.grid}"

    def training_loss(
        self,
        codes: Tensor,
        *,
        schedule: str = "linear",
        budget: int | None = None,
        prior: str = "longest",
        step: int = 0,
        average: float = 1.0,
        label_smoothing: float = 0.0,
        generator: Randomness = None,
    ) -> Tensor:
        """The loss of one training step, with contexts and targets drawn by :func:`draw_partition`.

        Over ranks this is the part of this rank's targets, and the sum over the ranks is the loss.

        Args:
            codes: ``(B, T, height, width)`` int64.
            schedule, budget, prior, step, generator: see :func:`draw_partition`.
            average, label_smoothing: see :func:`masked_loss`.

        Raises:
            ValueError: `codes` is not a batch of whole videos, or a setting does not fit.

        Example:
            >>> model = MeBT(10, (2, 2, 2), dim=32, num_heads=2, modes=("latent_enc", "latent_dec"), num_latents=4)
            >>> loss = model.training_loss(torch.randint(10, (3, 2, 2, 2)), generator=torch.Generator())
            >>> loss.backward()
        """
        if tuple(codes.shape[1:]) != self.grid:
            raise ValueError(
                f"MeBT.training_loss: codes must have shape (B, {', '.join(map(str, self.grid))}), "
                f"got codes.shape={tuple(codes.shape)}"
            )
        (context, target), num_tokens = draw_partition(
            codes.shape[0], self.grid, schedule=schedule, budget=budget, prior=prior, step=step, generator=generator,
            device=codes.device,
        )  # fmt: skip
        return masked_loss(
            self(codes, context, target), codes.flatten(1).gather(1, self._own(target)), num_tokens - context.shape[1],
            num_tokens, average=average, label_smoothing=label_smoothing,
        )  # fmt: skip
