"""VideoGPT: a transformer that predicts the codes of a video one after the other, each from those before it.

    p(codes) = prod_i p(code_i | codes before i, class, first frames),   logits_i = W_out norm(stack(W_in e_codes))_i
    loss     = -mean_i log p(code_i)

Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021). Codes are those of a VQ-VAE
(:mod:`vattn.models.vqvae`), whose vectors e are what the transformer is given::

    codes    c0 c1 c2 c3 ...          in raster order: time, height, width
    input    s  c0 c1 c2 ...          shifted by one; s is learned
    output   c0 c1 c2 c3 ...

A class changes the gain and the bias of every norm. First frames, as pixels, go through a 3-D ResNet, whose features
every layer reads. The layers are in :mod:`vattn.models.videogpt.layers`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.models.checkpoints import PretrainedModel, count_blocks, official_weights, require_names
from vattn.models.layers import reduction
from vattn.models.pixels import CENTRED, require_pixels
from vattn.models.settings import Config, official_settings, probabilities, require_told
from vattn.models.videogpt.layers import AttentionStack, Decoding, GridEmbedding, LayerNorm
from vattn.models.videogpt.resnet import ResNet3d, resnet_settings
from vattn.models.vqvae.tokenizer import Tokenizer


class VideoGPT(PretrainedModel):
    """VideoGPT's prior: logits of each code of a video, given the codes before it.

    Settings default to the official ones, but for dropout (0.2, and 0.3 for attention weights).

    The vectors of the codes are the buffer `embeddings` ``(num_codes, code_dim)``: saved with the model, not trained.
    They are random at first; :meth:`for_tokenizer` takes those of a tokenizer.

    Args:
        num_codes, code_dim: of the codebook of the tokenizer.
        grid: sizes of the axes of a video in codes, such as (T, height, width).
        dim, num_heads, num_layers: channels, a multiple of heads and axes; heads; blocks.
        attention: "full", or "sparse" for near tokens and those in line.
        block_size, num_local_blocks: of the sparse layout, see :meth:`vattn.BlockLayout.strided`.
        num_classes: of videos; None for a model without classes.
        frame_shape: frames, height and width in pixels of the first frames; None for a model that is given none.
        resnet: settings of the :class:`ResNet3d` that makes features of them; None for the official ones.
        dropout: after attention and MLPs, in training. attn_drop: of attention weights, in training.

    Shape:
        codes ``(B, *grid)`` int64 to logits ``(B, *grid, num_codes)``. `classes` are ``(B,)`` int64, or weights
        ``(B, num_classes)`` of classes; `frames` are ``(B, 3, *frame_shape)``, pixels from -0.5 to 0.5 as the
        tokenizer has them.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.

    Source:
        Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).

    Example:
        >>> model = VideoGPT(10, 4, grid=(2, 3, 3), dim=12, num_heads=2, num_layers=1, num_classes=3)
        >>> codes, classes = torch.randint(10, (2, 2, 3, 3)), torch.tensor([2, 0])
        >>> model.training_loss(codes, classes=classes)
        tensor(2.3026, grad_fn=<NllLossBackward0>)
        >>> from vattn.models.videogpt import generate
        >>> generate(model.eval(), 2, classes=classes, generator=torch.Generator()).shape
        torch.Size([2, 2, 3, 3])
    """

    embeddings: Tensor
    resnet: ResNet3d | None

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        grid: Sequence[int],
        dim: int = 576,
        num_heads: int = 4,
        num_layers: int = 8,
        *,
        attention: str = "full",
        block_size: int = 32,
        num_local_blocks: int = 4,
        num_classes: int | None = None,
        frame_shape: Sequence[int] | None = None,
        resnet: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        for name, size in (("num_codes", num_codes), ("code_dim", code_dim)):
            _checks.integer("VideoGPT", name, size, least=1)
        probabilities("VideoGPT", dropout=dropout, attn_drop=attn_drop)
        if num_classes is not None:
            _checks.integer("VideoGPT", "num_classes", num_classes, least=1)
        if resnet is not None and frame_shape is None:
            raise ValueError(f"VideoGPT: frame_shape must be given with resnet, got frame_shape=None, {resnet=}")
        self.grid, self.num_classes = tuple(grid), num_classes
        self.frame_shape = None if frame_shape is None else tuple(frame_shape)
        self.register_buffer("embeddings", torch.randn(num_codes, code_dim))
        self.resnet, memory_dim = None, None
        if self.frame_shape is not None:
            self.resnet = ResNet3d(**resnet or {})
            factors, memory_dim = self.resnet.downsample, self.resnet.dim
            if any(size % factor for size, factor in zip(self.frame_shape, factors, strict=True)):
                raise ValueError(f"VideoGPT: frame_shape must be multiples of {factors}, got frame_shape={frame_shape}")
            features = [size // factor for size, factor in zip(self.frame_shape, factors, strict=True)]
            self.cond_pos_embd = GridEmbedding(features, memory_dim)
        self.fc_in = nn.Linear(code_dim, dim, bias=False)
        self.attn_stack = AttentionStack(
            grid, dim, num_heads, num_layers, attention=attention, block_size=block_size,
            num_local_blocks=num_local_blocks, num_classes=num_classes,
            memory_dim=memory_dim, dropout=dropout, attn_drop=attn_drop,
        )  # fmt: skip
        self.norm = LayerNorm(dim, num_classes)
        self.fc_out = nn.Linear(dim, num_codes, bias=False)
        nn.init.normal_(self.fc_in.weight, std=0.02)
        nn.init.zeros_(self.fc_out.weight)

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, grid: Sequence[int], **settings: Any) -> Self:
        """A new model of the codes of `tokenizer`, whose codebook is copied; `settings` are those of the constructor.

        Example:
            >>> from vattn.models.vqvae import VQVAE
            >>> tokenizer = VQVAE(num_codes=64, code_dim=8, hidden=16, num_blocks=1)
            >>> model = VideoGPT.for_tokenizer(tokenizer, (4, 8, 8), dim=24, num_heads=2, num_layers=1)
            >>> torch.equal(model.embeddings, tokenizer.codebook.embeddings)
            True
        """
        num_codes, code_dim = tokenizer.codebook.embeddings.shape
        model = cls(num_codes, code_dim, grid, **settings)
        model.embeddings.copy_(tokenizer.codebook.embeddings)
        return model

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> Self:
        """The model of an official checkpoint, in evaluation mode; its sizes and conditions are read from the weights.

        Args:
            state_dict: of ``VideoGPT`` in ``videogpt/gpt.py``, with or without the outer dict of a checkpoint. Of its
                tokenizer, only the codebook is used. It is copied; dtype and device stay.
            config: its arguments, of which ``heads``, ``attn_type`` and, if it has them, ``dropout`` and
                ``attn_dropout`` are read. Without ``attn_type``, weights that have masks are of full attention; sparse
                attention has none, but neither has a checkpoint whose masks were left out. Both checkpoints that its
                authors gave out have sparse attention.
            overrides: settings of this class, which win over `config` and what the weights tell; `num_heads`, and
                `attention` unless there are masks, must be among them if they are not in `config`.

        Raises:
            TypeError: `config` is not a mapping, or a setting has another type.
            ValueError: there is no such setting, or the weights and the settings do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op, book, first = "VideoGPT.from_official", "vqvae.codebook.embeddings", "attn_stack.right_shift.sos"
        cls._require_overrides(op, overrides)
        weights = official_weights(op, state_dict, first, book, "fc_in.weight", "fc_out.weight")
        embeddings = weights[book]
        masks = {name for name in weights if name.endswith(".attn.attn.mask")}
        weights = {name: x for name, x in weights.items() if not name.startswith("vqvae.") and name not in masks}
        weights["embeddings"] = embeddings
        settings: dict[str, Any] = {
            "num_codes": embeddings.shape[0],
            "code_dim": embeddings.shape[1],
            "grid": _grid(op, weights, "attn_stack.pos_embd"),
            "dim": len(weights[first]),
            "num_layers": count_blocks(_part(weights, "attn_stack."), "attn_nets"),
            "num_classes": weights["norm.w.weight"].shape[1] if "norm.w.weight" in weights else None,
        }
        if resnet_weights := _part(weights, "resnet."):
            settings["resnet"] = resnet_settings(op, resnet_weights)
            features, factors = _grid(op, weights, "cond_pos_embd", 3), settings["resnet"]["downsample"]
            settings["frame_shape"] = [size * factor for size, factor in zip(features, factors, strict=True)]
        if masks:  # which the official code has for full attention only
            settings["attention"] = "full"
        names = {"num_heads": "heads", "attention": "attn_type"}
        settings |= official_settings(op, config, cls, dropout="dropout", attn_drop="attn_dropout", **names)
        require_told(op, config, settings | overrides, **names)
        return cls._from_weights(weights, settings, overrides)

    def forward(self, codes: Tensor, *, classes: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
        if codes.shape[1:] != self.grid:
            raise ValueError(
                f"VideoGPT: codes must have shape (B, {', '.join(map(str, self.grid))}), "
                f"got codes.shape={tuple(codes.shape)}"
            )
        weights, memory = self._conditions(codes.shape[0], classes, frames)
        x = self.attn_stack(self._embed(codes.flatten(1)), weights, memory)
        return self.fc_out(self.norm(x, weights)).unflatten(1, self.grid)

    def training_loss(self, codes: Tensor, *, classes: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of codes ``(B, *grid)``, under the conditions of :meth:`forward`; 0 if B is 0."""
        logits = self(codes, classes=classes, frames=frames)
        return F.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction=reduction(codes))

    def begin(self, batch: int, *, classes: Tensor | None = None, frames: Tensor | None = None) -> Decoding:
        """Videos of which no code is known yet, for :meth:`step`."""
        return self.attn_stack.begin(*self._conditions(batch, classes, frames))

    def prefill(self, codes: Tensor, state: Decoding) -> None:
        """Read the first codes of each video, ``(B, n)``, all at once; :meth:`step` goes on with the last of them.

        Raises:
            ValueError: `state` is not that of :meth:`begin`, or they are more than a video has.

        Example:
            >>> model = VideoGPT(10, 4, grid=(2, 2, 2), dim=12, num_heads=2, num_layers=1).eval()
            >>> first, state = torch.tensor([[3, 1, 4]]), model.begin(1)
            >>> model.prefill(first, state)
            >>> logits = model.step(first[:, -1], state)                # of the fourth code
        """
        self.attn_stack.prefill(self._embed(codes), state)

    def step(self, codes: Tensor, state: Decoding) -> Tensor:
        """The logits ``(B, num_codes)`` of the next code of each video, from the last one, ``(B,)``.

        What `state` keeps of the codes before makes it the cost of one code. For the first code, `codes` are anything.

        Example:
            >>> model = VideoGPT(10, 4, grid=(2, 2, 2), dim=12, num_heads=2, num_layers=1).eval()
            >>> codes, state = torch.zeros(1, dtype=torch.int64), model.begin(1)
            >>> logits = model.step(codes, state)
            >>> logits = model.step(logits.argmax(-1), state)
        """
        x = self.attn_stack.step(self._embed(codes[:, None]), state)
        return self.fc_out(self.norm(x, state.classes))[:, 0]

    _usage_imports = ("generate",)

    def _usage(self) -> str:
        lines, given = [], ["model", "1"]
        if self.num_classes is not None:
            lines.append("classes = torch.tensor([0])")
            given.append("classes=classes")
        if self.frame_shape is not None:
            lines.append(f"frames = torch.rand(1, 3, {', '.join(map(str, self.frame_shape))}) - 0.5  # the first ones")
            given.append("frames=frames")
        codes = f"(1, {', '.join(map(str, self.grid))})"
        return "\n".join([*lines, f"codes = generate({', '.join(given)})  # {codes}, for a tokenizer"])

    def extra_repr(self) -> str:
        return f"grid={self.grid}, num_classes={self.num_classes}, frame_shape={self.frame_shape}"

    def _embed(self, codes: Tensor) -> Tensor:
        return self.fc_in(F.embedding(codes, self.embeddings).to(self.fc_in.weight.dtype))

    def _conditions(
        self, batch: int, classes: Tensor | None, frames: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Weights of classes ``(B, num_classes)``, and features of frames ``(B, M, C)``."""
        for name, given, known in (("classes", classes, self.num_classes), ("frames", frames, self.frame_shape)):
            if (given is None) != (known is None):
                must = "not be given to a model without them" if known is None else "be given"
                raise ValueError(f"VideoGPT: {name} must {must}, got {name}={'None' if given is None else 'a tensor'}")
        memory = None
        if classes is not None:
            if not classes.is_floating_point():
                classes = F.one_hot(classes, self.num_classes or -1).to(self.fc_in.weight.dtype)
            if classes.shape != (batch, self.num_classes):
                raise ValueError(
                    f"VideoGPT: classes must have shape ({batch},) or ({batch}, {self.num_classes}), "
                    f"got classes.shape={tuple(classes.shape)}"
                )
        if frames is not None and self.frame_shape is not None and self.resnet is not None:
            require_pixels("VideoGPT", "frames", frames, 3, CENTRED)
            if frames.shape != (batch, 3, *self.frame_shape):
                raise ValueError(
                    f"VideoGPT: frames must have shape {(batch, 3, *self.frame_shape)}, "
                    f"got frames.shape={tuple(frames.shape)}"
                )
            memory = self.resnet(frames).flatten(1, -2) + self.cond_pos_embd()
        return classes, memory


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def _grid(op: str, weights: Mapping[str, Tensor], name: str, axes: int = 1) -> list[int]:
    """The grid of a :class:`GridEmbedding`, which has at least so many `axes`."""
    tables = _part(weights, f"{name}.emb.")
    require_names(op, weights, *(f"{name}.emb.d_{i}" for i in range(max(len(tables), axes))))
    return [len(tables[f"d_{i}"]) for i in range(len(tables))]
