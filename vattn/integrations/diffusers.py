"""Attention of vattn in the video transformers of diffusers.

An attention layer of these models is five steps. All are kept but the fourth, which :func:`set_attention` sets:

    project   q, k, v = W_q x, W_k y, W_v y       x: tokens of the video; y: the same, or the text, or an image
    norm      q, k = norm_q(q), norm_k(k)         where the model has norms
    rotate    q, k = rotary embedding             where the model has one, for tokens of the video
    attend    pattern(q, k, v, grid)              for text and image: latent_attention
    out       W_out [heads merged]

Patterns need the grid (T, H, W) of the tokens. A forward pre-hook reads it from the arguments of each call.
"""

import importlib
import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vattn import _checks
from vattn._extras import needs
from vattn.layout import BlockLayout
from vattn.models.fifo.diffusers_models import known_class, unwrapped
from vattn.nn.heads import merge_heads
from vattn.ops.axial_attention import axial_attention
from vattn.ops.edge_sparse_attention import edge_sparse_attention
from vattn.ops.latent_attention import latent_attention
from vattn.ops.leap_attention import leap_attention

__all__ = ["AttentionSetting", "Axial", "Dense", "Leap", "Pattern", "Sparse", "set_attention"]

OP = "set_attention"
Grid = tuple[int, int, int]


class Pattern(ABC):
    """Which tokens of a video a token attends to. Derive from it for a pattern of your own."""

    needs_grid = True

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        """The attention of ``(B, H, T * height * width, D)``, of the same shape; `grid` is ``(T, height, width)``."""

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, frames: int) -> Tensor:
        """The same where blocks of `frames` frames must not attend to later ones."""
        raise ValueError(
            f"{type(self).__name__}: the model must not be causal among blocks of frames (Dense and Sparse support "
            f"that), got num_frame_per_block={frames}"
        )


@dataclass(frozen=True)
class Dense(Pattern):
    """All tokens attend to all tokens: what the model does without a pattern, by the library's kernels."""

    needs_grid = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        return cast(Tensor, latent_attention(query, key, value))

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, frames: int) -> Tensor:
        size = frames * grid[1] * grid[2]
        ends = range(size, query.shape[2] + 1, size)
        outs = [latent_attention(query[:, :, x - size : x], key[:, :, :x], value[:, :, :x]) for x in ends]
        return torch.cat(cast(list[Tensor], outs), 2)


@dataclass(frozen=True)
class Leap(Pattern):
    """Tokens attend within a few frames that lie `leap` apart, see :func:`vattn.leap_attention`."""

    leap: int
    group_size: int = 2

    def __post_init__(self) -> None:
        _checks.integer("Leap", "leap", self.leap, least=1)
        _checks.integer("Leap", "group_size", self.group_size, least=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        query, key, value = (x.unflatten(2, (grid[0], grid[1] * grid[2])) for x in (query, key, value))
        return cast(Tensor, leap_attention(query, key, value, self.leap, group_size=self.group_size)).flatten(2, 3)


@dataclass(frozen=True)
class Axial(Pattern):
    """Tokens attend along one axis: 0 is time, 1 a column, 2 a row, see :func:`vattn.axial_attention`."""

    dim: int

    def __post_init__(self) -> None:
        _checks.integer("Axial", "dim", self.dim, least=-3)
        if self.dim > 2:
            raise ValueError(f"Axial: dim must be less than the axes of the grid (3), got dim={self.dim}")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        query, key, value = (x.unflatten(2, grid) for x in (query, key, value))
        return cast(Tensor, axial_attention(query, key, value, self.dim)).flatten(2, 4)


@dataclass(frozen=True, eq=False)
class Sparse(Pattern):
    """Tokens attend to the blocks of tokens that a layout lists, see :func:`vattn.edge_sparse_attention`.

    Args:
        layout: a layout, or a function of the grid ``(T, height, width)`` that returns one. It is called once for each
            grid. A layout is copied to the device of the tokens once.
    """

    layout: BlockLayout | Callable[[Grid], BlockLayout]
    _made: SimpleNamespace = field(default_factory=SimpleNamespace, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.layout, BlockLayout) and not callable(self.layout):
            raise TypeError(
                f"Sparse: layout must be a BlockLayout or a function of the grid, got layout={self.layout!r}"
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> Tensor:
        return cast(Tensor, edge_sparse_attention(query, key, value, self._on(grid, query.device)))

    def attend_causally(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, frames: int) -> Tensor:
        layout = self._on(grid, query.device)
        if layout.num_global > 0:
            raise ValueError(
                f"Sparse: layout must have no global tokens where blocks of frames are causal "
                f"(num_frame_per_block={frames}), got layout.num_global={layout.num_global}"
            )
        block = torch.arange(layout.num_tokens, device=query.device) // (frames * grid[1] * grid[2])
        return cast(Tensor, edge_sparse_attention(query, key, value, layout, causal=True, positions=block))

    def _on(self, grid: Grid, device: torch.device) -> BlockLayout:
        # A layout belongs to one grid: in a trace, operator.index makes a constant of a size that may vary.
        name = _make_layout(self, tuple(operator.index(size) for size in grid), device)
        return cast(BlockLayout, getattr(self._made, name))


@torch.compiler.assume_constant_result
def _make_layout(pattern: Sparse, grid: Grid, device: torch.device) -> str:
    """Where in `pattern` its layout for `grid` and `device` is: a trace runs this, and remembers the name."""
    name = f"{grid} on {device}"
    if not hasattr(pattern._made, name):
        # It is for later calls, too: with values, though a trace or an export has none, and also for training.
        with _disable_current_modes(), torch.inference_mode(False):
            layout = pattern.layout if isinstance(pattern.layout, BlockLayout) else pattern.layout(grid)
            if not isinstance(layout, BlockLayout):
                raise TypeError(f"Sparse: layout must return a BlockLayout, got layout{grid}={layout!r}")
            setattr(pattern._made, name, layout.to(device))
    return name


class VideoAttnProcessor:
    """The processor of one attention layer of diffusers.

    Args:
        setting: of the model, which has the grid of the current call.
        pattern: for tokens of the video; None in a layer that attends to text.
        axes: of the grid, those on which the tokens of this layer lie.
    """

    def __init__(self, setting: "AttentionSetting", pattern: Pattern | None, axes: Sequence[int]) -> None:
        self.setting, self.pattern, self.axes = setting, pattern, axes

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        text, image, lengths = encoder_hidden_states, None, None
        if text is not None and getattr(attn, "add_k_proj", None) is not None:
            image, text = _image_and_text(text)
        if text is not None and attention_mask is not None:
            text, lengths = _kept_first(text, attention_mask)

        query, key, value = self._project(attn, hidden_states, text)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))  # (B, N, H, D)
        if rotary_emb is not None:
            query, key = (_rotate(x, *rotary_emb) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))

        if text is None:
            out = self._attend(query, key, value, attention_mask)
        else:
            out = cast(Tensor, latent_attention(query, key, value, key_lengths=lengths))
        if image is not None:
            key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in self._project_image(attn, image))
            out = out + cast(Tensor, latent_attention(query, key, value))
        return cast(Tensor, attn.to_out[1](attn.to_out[0](merge_heads(out))))

    def _project(self, attn: Any, tokens: Tensor, text: Tensor | None) -> Sequence[Tensor]:
        if not (self.setting.kind.fuses and attn.fused_projections):
            read = tokens if text is None else text
            return attn.to_q(tokens), attn.to_k(read), attn.to_v(read)
        if text is None:
            return cast(Sequence[Tensor], attn.to_qkv(tokens).chunk(3, -1))
        return attn.to_q(tokens), *attn.to_kv(text).chunk(2, -1)

    def _project_image(self, attn: Any, image: Tensor) -> Sequence[Tensor]:
        if attn.fused_projections:
            key, value = attn.to_added_kv(image).chunk(2, -1)
        else:
            key, value = attn.add_k_proj(image), attn.add_v_proj(image)
        return attn.norm_added_k(key), value

    def _grid(self, num_tokens: int) -> Grid:
        """The grid of the `num_tokens` tokens of this layer."""
        setting = self.setting
        if setting.grid is None:
            raise ValueError(
                f"{setting.name}: num_frames, height and width must be given for a pattern that needs the grid, "
                "got grid=None"
            )
        frames, height, width = (size if axis in self.axes else 1 for axis, size in enumerate(setting.grid))
        if frames * height * width != num_tokens:
            raise ValueError(
                f"{setting.name}: hidden_states must have the tokens of the grid {(frames, height, width)}, "
                f"got hidden_states with tokens={num_tokens}"
            )
        return frames, height, width

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The attention of tokens of the video to each other."""
        setting, pattern = self.setting, cast(Pattern, self.pattern)
        frames = setting.frames_per_block
        if mask is not None and frames == 1:
            raise ValueError(
                f"{setting.name}: attention_mask of tokens of the video must be None, "
                f"got attention_mask.shape={tuple(mask.shape)}"
            )
        grid = self._grid(query.shape[2]) if pattern.needs_grid or frames > 1 else (0, 0, 0)
        if frames > 1:
            return pattern.attend_causally(query, key, value, grid, frames)
        return pattern.attend(query, key, value, grid)


def _image_and_text(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The models with image conditioning append 512 tokens of text to those of the image."""
    if tokens.shape[1] < 512:
        raise ValueError(
            f"{OP}: encoder_hidden_states must have 512 tokens of text behind those of the image, "
            f"got encoder_hidden_states.shape={tuple(tokens.shape)}"
        )
    return tokens[:, :-512], tokens[:, -512:]


def _kept_first(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`text (B, L, C)` with the tokens that are kept in front, and how many they are, ``(B,)``.

    The order of keys means nothing to attention, so that a mask of keys becomes a number of keys.
    """
    is_bias = mask.is_floating_point()  # LTX makes one of its mask: 0, or -10000
    keeps = (mask == 0 if is_bias else mask != 0).reshape(-1, text.shape[1])
    keeps = keeps.repeat_interleave(text.shape[0] // keeps.shape[0], 0)  # Latte repeats a text for each frame
    lengths = keeps.sum(1)
    if is_bias:  # the same bias on all keys changes nothing
        lengths = lengths.where(lengths > 0, text.shape[1])
    order = keeps.int().argsort(dim=1, descending=True, stable=True)
    return text.gather(1, order[..., None].expand_as(text)), lengths


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels of ``(B, N, H, D)``. `cos`, `sin` are ``(1, N, 1, D)``, or ``(B, N, H * D)`` (LTX)."""
    cos, sin = (y if y.dim() == 4 else y.unflatten(-1, x.shape[2:]) for y in (cos, sin))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


@dataclass(frozen=True)
class _Kind:
    """What differs among the models.

    Attributes:
        grid: of the model and its arguments: the grid of tokens, or None where they do not say it.
        axes: for layers whose names begin so, the axes of the grid on which their tokens lie.
        fuses: whether its own processors use fused projections.
    """

    grid: Callable[[Any, Mapping[str, Any]], Grid | None]
    axes: Mapping[str, Sequence[int]]
    fuses: bool = False


def _of_latents(model: Any, inputs: Mapping[str, Any]) -> Grid:
    patch = model.config.patch_size
    patch = (1, patch, patch) if isinstance(patch, int) else patch
    frames, height, width = inputs["hidden_states"].shape[2:]
    return frames // patch[0], height // patch[1], width // patch[2]


def _of_packed_tokens(model: Any, inputs: Mapping[str, Any]) -> Grid | None:
    sizes = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
    return None if None in sizes else cast(Grid, sizes)


MODELS: dict[str, _Kind] = {
    "LatteTransformer3DModel": _Kind(
        _of_latents, {"transformer_blocks.": (1, 2), "temporal_transformer_blocks.": (0,)}
    ),
    "LTXVideoTransformer3DModel": _Kind(_of_packed_tokens, {"transformer_blocks.": (0, 1, 2)}),
    "SkyReelsV2Transformer3DModel": _Kind(_of_latents, {"blocks.": (0, 1, 2)}, fuses=True),
    "WanTransformer3DModel": _Kind(_of_latents, {"blocks.": (0, 1, 2)}, fuses=True),
}


class AttentionSetting:
    """What :func:`set_attention` has set. :meth:`remove`, or the end of a ``with``, gives the model its own back.

    Attributes:
        patterns: by the names of layers, how tokens of the video attend to each other.
        grid: ``(T, height, width)`` of the tokens in the latest call of the model.
    """

    def __init__(self, model: Any, kind: _Kind, patterns: Mapping[str, Pattern], cross_attention: bool) -> None:
        self.name, self.kind, self.patterns = type(model).__name__, kind, dict(patterns)
        self.cross_attention = cross_attention
        self.grid: Grid | None = None
        self.frames_per_block = 1
        self._arguments = list(inspect.signature(type(model).forward).parameters)[1:]
        self._model, self._own = model, {}
        for name, axes in _layers(model, kind).items():
            if name in patterns or (cross_attention and not axes):
                self._own[name] = model.get_submodule(name).processor
                model.get_submodule(name).set_processor(VideoAttnProcessor(self, patterns.get(name), axes))
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def remove(self) -> None:
        """Give the layers back the processors that they had; once is enough."""
        self._hook.remove()
        while self._own:
            name, processor = self._own.popitem()
            self._model.get_submodule(name).set_processor(processor)

    def _look(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a call says about its tokens."""
        inputs = dict(zip(self._arguments, args, strict=False)) | kwargs
        parallel = getattr(model, "_parallel_config", None)
        if parallel is not None and parallel.context_parallel_config is not None:
            raise ValueError(
                f"{self.name}: context parallelism must be off with set_attention, since each layer needs the tokens "
                f"of the whole video, got context_parallel_config={parallel.context_parallel_config}"
            )
        mask = inputs.get("encoder_attention_mask")
        if mask is not None and self.cross_attention:
            if mask.dim() != 2 or mask.is_floating_point():
                raise ValueError(
                    f"{self.name}: encoder_attention_mask must be bool or int and have shape (B, tokens of the text), "
                    f"or cross_attention must be off in set_attention, "
                    f"got encoder_attention_mask.shape={tuple(mask.shape)} and dtype={mask.dtype}"
                )
            if mask.dtype != torch.bool:
                _checks.in_range(self.name, "encoder_attention_mask", mask, 2)
        self.grid = self.kind.grid(model, inputs)
        self.frames_per_block = max(1, getattr(model.config, "num_frame_per_block", 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _layers(model: nn.Module, kind: _Kind) -> dict[str, Sequence[int]]:
    """The axes of the tokens of each attention layer, by its name; none where they attend to text."""
    layers: dict[str, Sequence[int]] = {}
    for name, module in model.named_modules():
        axes = [axes for start, axes in kind.axes.items() if name.startswith(start)]
        if axes and hasattr(module, "set_processor"):
            layers[name] = axes[0] if name.endswith(".attn1") else ()
    return layers


def set_attention(
    model: nn.Module,
    pattern: Pattern | Mapping[str, Pattern | None] | Callable[[str], Pattern | None],
    *,
    cross_attention: bool = True,
) -> AttentionSetting:
    """Make a video transformer of diffusers attend by a pattern, with the operators of vattn.

    Projections, norms, rotary embeddings and the output layer stay those of the model; its weights stay where they are,
    so that it is trained, saved and given LoRA weights as before. A pattern never adds to what a layer reads: the
    layers of Latte, of which each reads either one frame or one position in all frames, apply it within that.
    A second call replaces what the first has set, also for a compiled model, which compiles again.

    Args:
        model: a Wan, SkyReelsV2, LTXVideo or LatteTransformer3DModel, or of a class derived from one, also inside
            ``torch.compile``, DistributedDataParallel or PEFT.
        pattern: ``Dense()``, ``Leap(leap, group_size)``, ``Axial(dim)``, ``Sparse(layout)`` or a :class:`Pattern` of
            your own, for all layers in which tokens of the video attend to each other; or one for each, as a dict by
            their names (such as ``"blocks.0.attn1"``) or a function of the name. Layers without an entry, or with None,
            stay as they are.
        cross_attention: whether the layers that attend to text (and images) do so by :func:`vattn.latent_attention`;
            otherwise they stay as they are. A mask of the text must then be ``(B, tokens)``, bool or int (0 and 1); any
            tokens may be masked.

    Returns:
        What was set: its ``patterns`` by the names of layers, and ``remove()``, which undoes it.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: `model` is of another class, or `pattern` is none.
        ValueError: `pattern` names a layer that `model` does not have.

    When it is called, the model raises ValueError for a mask among tokens of the video or one of the text that is none
    of the above, for sizes that do not fit the tokens, and under context parallelism. Where SkyReels-V2 is causal among
    blocks of frames, ``Dense`` and ``Sparse`` are, too; the others raise.

    Example:
        >>> import math
        >>> from diffusers import WanTransformer3DModel
        >>> from vattn.integrations.diffusers import Leap, Sparse
        >>> model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        ...                               text_dim=8, freq_dim=8, ffn_dim=16, num_layers=2)
        >>> inputs = {"hidden_states": torch.randn(1, 4, 8, 8, 8), "timestep": torch.tensor([500]),
        ...           "encoder_hidden_states": torch.randn(1, 5, 8)}
        >>> setting = set_attention(model, Leap(leap=4))
        >>> model(**inputs).sample.shape
        torch.Size([1, 4, 8, 8, 8])
        >>> setting.grid                                           # a token is 2 x 2 latents
        (8, 4, 4)
        >>> def local(grid):
        ...     return vattn.BlockLayout.local_random(math.prod(grid), block_size=16, num_local=3, num_global=0)
        >>> with set_attention(model, {"blocks.1.attn1": Sparse(local)}):
        ...     out = model(**inputs)
    """
    module = unwrapped(model)
    known = known_class(module, MODELS)
    if known is None:
        with needs(OP, "diffusers"):
            importlib.import_module("diffusers")
        got = type(module).__name__
        if isinstance(getattr(module, "transformer", None), nn.Module):
            got += ", a pipeline: give set_attention its transformer"
        raise TypeError(f"{OP}: model must be one of diffusers' {', '.join(MODELS)}, got model={got}")
    patterns = _by_layer(pattern, [name for name, axes in _layers(module, MODELS[known]).items() if axes])
    for layer in module.modules():
        processor = getattr(layer, "processor", None)
        if isinstance(processor, VideoAttnProcessor):
            processor.setting.remove()
    return AttentionSetting(module, MODELS[known], patterns, cross_attention)


def _by_layer(pattern: Any, names: Sequence[str]) -> dict[str, Pattern]:
    """The pattern of each layer that has one."""
    if isinstance(pattern, Pattern):
        return dict.fromkeys(names, pattern)
    if isinstance(pattern, Mapping):
        unknown = [name for name in pattern if name not in names]
        if unknown:
            raise ValueError(
                f"{OP}: pattern must name layers of the model ({', '.join(names)}), got pattern={{{unknown[0]!r}: ...}}"
            )
        chosen = dict(pattern)
    elif callable(pattern) and not isinstance(pattern, type):
        chosen = {name: pattern(name) for name in names}
    else:
        raise TypeError(
            f"{OP}: pattern must be a Pattern such as Dense(), a dict of them by the names of layers, or a function of "
            f"the name, got pattern={pattern!r}"
        )
    for name, one in chosen.items():
        if one is not None and not isinstance(one, Pattern):
            raise TypeError(
                f"{OP}: pattern must have a Pattern such as Dense(), or None, for each layer, "
                f"got pattern[{name!r}]={one!r}"
            )
    return {name: one for name, one in chosen.items() if one is not None}
