"""The operators as attention implementations of Hugging Face's transformers.

    register()                                    once
    model.set_attn_implementation("vattn")        dense attention by the library's kernels
    set_leap_attention(model, num_frames=8)       leap attention in every layer; no parameter is added

Models that use transformers' attention interface call one function for their attention, chosen by name. Two names are
registered: "vattn", the same attention as "sdpa", and "vattn_leap", that of LAPS (Zhang et al., "Long-term Leap
Attention, Short-term Periodic Shift for Video Classification", ACM MM 2022), whose settings differ between layers.

Where the frames of a video lie::

    image models      (B * T, tokens, C)           a frame is a row of the batch, with its own class and register tokens
    video models      (B, G + T * N, C)            G global tokens, which read all and are read by all; then the frames
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn._extras import needs
from vattn._layout_tiles import ends
from vattn._over_ranks import OverRanks
from vattn.layout import BlockLayout
from vattn.models.laps.frames import Levels, layer_leaps
from vattn.models.laps.from_image import require_pixels, sign_of_video
from vattn.models.tables import Table
from vattn.nn import attend_frames
from vattn.ops.edge_sparse_attention import edge_sparse_attention
from vattn.ops.latent_attention import latent_attention
from vattn.ops.leap_attention import leap_attention
from vattn.ops.periodic_shift import periodic_shift

with needs("vattn.integrations.transformers", "transformers"):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
    from transformers.utils.import_utils import torch_compilable_check

__all__ = ["register", "set_leap_attention"]

DENSE = "vattn"
LEAP = "vattn_leap"
CAUSAL_BLOCK = 64  # tokens; 128 or 256 are as fast on a CPU, 16 are slower

UNSUPPORTED = (
    "attention_mask", "softcap", "position_bias", "s_aux", "sinks", "cu_seq_lens_q", "cu_seq_lens_k", "indices",
    "block_indices",
)  # fmt: skip
"""What models hand to an attention function that changes its result, and that no operator here has."""

GLOBAL_TOKENS = {"videomae": 0, "vivit": 1}
"""Video models by their `model_type`, and how many tokens lie before those of the frames."""

DEFAULTS: dict[str, Any] = {"num_frames": None, "levels": (1, 2, 3, 1), "group_size": 2, "fold_div": 0}


def register() -> None:
    """Make "vattn" and "vattn_leap" attention implementations of transformers. Calling it again changes nothing.

    "vattn" is dense attention: bidirectional or causal, of queries to their own or to other keys, with fewer heads of
    keys than of queries, with dropout and any scale. Of masks it takes those that only hide padding behind each sample.
    There a causal model's outputs are those of the real tokens; behind them they differ from those of "sdpa".

    "vattn_leap" needs settings first: :func:`set_leap_attention` chooses it too.

    Raises:
        ValueError: later, in the forward: a mask of another kind, padding in front, a static cache, more than one query
            after a cache; an option that changes the scores, such as `softcap`; attention weights are asked for.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> register()
        >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                            image_size=32, patch_size=16))
        >>> model.set_attn_implementation("vattn")
        >>> model(torch.randn(2, 3, 32, 32)).last_hidden_state.shape
        torch.Size([2, 5, 32])
    """
    AttentionInterface.register(DENSE, _dense_attention)
    AttentionMaskInterface.register(DENSE, _key_lengths)
    AttentionInterface.register(LEAP, _leap_attention)
    AttentionMaskInterface.register(LEAP, _no_mask)


def set_leap_attention(
    model: nn.Module,
    *,
    num_frames: int | None = None,
    levels: Levels | None = None,
    group_size: int | None = None,
    fold_div: int | None = None,
) -> None:
    """Let the attention layers of a transformers model leap, with zero new parameters.

    The settings are kept in ``model.config.vattn_leap``, which is saved with the model. After loading it,
    ``set_leap_attention(model)`` uses them again: what is None is taken from there, and otherwise has its default.
    ``model.set_attn_implementation("sdpa")`` turns leaping off.

    Args:
        model: a model of images, such as ViT, DeiT, DINOv2, DINOv3, CLIP's or SigLIP's vision model, which is then
            given ``(B * T, 3, H, W)``: the frames of a video one after the other. Each frame has class and register
            tokens of its own, which leap like the others. Or VideoMAE or ViViT, whose "frames" are tubelets; ViViT's
            class token attends to all tokens, and all attend to it. Of a model of pairs take the vision part, such as
            ``model.vision_model``.
        num_frames: T. It must be given for a model of images; the others have it in their configuration.
        levels: layer i has the level ``levels[i % len(levels)]``, see :func:`vattn.nn.leap_of_level`: the leap is
            ``T // 2**level`` frames, or tubelets. None is attention within each frame. Default: ``(1, 2, 3, 1)``,
            for which there must be at least 8 of them.
        group_size: how many frames form a group. Default: 2.
        fold_div: divisor of the periodic shift, 0 for none, which is the default. Global tokens are not shifted.

    Raises:
        TypeError: a setting of the wrong type, or a model that is not one of transformers.
        ValueError: a setting that does not fit; the model takes something else than pixels, has no layer that uses the
            attention interface, has relative positions or windows, or is a video model of another type. Later, in the
            forward: a mask, or a number of tokens that does not fit, such as that of a masked VideoMAE.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on leap attention
        and on adapting an image model.

    Example:
        >>> from transformers import VideoMAEConfig, VideoMAEModel
        >>> config = VideoMAEConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                         image_size=32, patch_size=16, num_frames=8)             # 4 tubelets of 2 x 2 tokens
        >>> model = VideoMAEModel(config)
        >>> set_leap_attention(model, levels=(1, 2), fold_div=4)
        >>> model(torch.randn(2, 8, 3, 32, 32)).last_hidden_state.shape
        torch.Size([2, 16, 32])
    """
    given = {"num_frames": num_frames, "levels": levels, "group_size": group_size, "fold_div": fold_div}
    let_leap("set_leap_attention", model, given)


def let_leap(op: str, model: Any, given: dict[str, Any]) -> None:
    """:func:`set_leap_attention` for the function `op`, with those of its settings that are not None."""
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"{op}: model must be a PreTrainedModel of transformers, got model={type(model).__name__}")
    require_pixels(op, model)
    layers = attention_layers(model)
    configs = {id(layer.config): layer.config for layer in layers}
    if len(configs) != 1:
        raise ValueError(
            f"{op}: model must have attention layers that use transformers' attention interface, all of one "
            f"configuration, got {type(model).__name__} with {len(configs)} configurations of such layers"
        )
    (config,) = configs.values()
    settings = DEFAULTS | getattr(config, LEAP, {}) | {name: x for name, x in given.items() if x is not None}
    frames, tokens, num_global = _frames(op, model, config, settings["num_frames"])
    group_size, fold_div = settings["group_size"], settings["fold_div"]
    _checks.integer(op, "group_size", group_size, least=1)
    _checks.integer(op, "fold_div", fold_div, least=0)
    leaps = list(layer_leaps(op, settings["levels"], len(layers), frames))
    register()
    model.set_attn_implementation(LEAP)
    if config._attn_implementation != LEAP:
        raise ValueError(f"{op}: model must let its attention be set, got {type(model).__name__}")
    for layer, leap in zip(layers, leaps, strict=True):
        part = LeapOfLayer(frames, leap, group_size, fold_div, tokens, num_global)
        layer.add_module(LEAP, part.train(layer.training))
    setattr(config, LEAP, settings | {"levels": list(settings["levels"])})


def attention_layers(model: nn.Module) -> list[Any]:
    """The layers that call transformers' attention interface, which reads these attributes of theirs."""
    return [module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "config")]


class LeapOfLayer(nn.Module, OverRanks):
    """What :func:`set_leap_attention` adds to an attention layer: its settings, and no parameter.

    Args:
        num_frames: T.
        leap, group_size, fold_div: as in :func:`vattn.leap_attention`; the leap None is attention within each frame.
        tokens_per_frame: N of a sequence of T * N tokens; None where the frames lie in the batch.
        num_global: G, tokens before those of the frames.
    """

    def __init__(
        self,
        num_frames: int,
        leap: int | None,
        group_size: int,
        fold_div: int,
        tokens_per_frame: int | None = None,
        num_global: int = 0,
    ) -> None:
        super().__init__()
        self.num_frames, self.fold_div = num_frames, fold_div
        self.leap, self.group_size = (1, 1) if leap is None else (leap, group_size)
        self.tokens_per_frame, self.num_global = tokens_per_frame, num_global
        self._layout: Table[BlockLayout] | None = None
        if tokens_per_frame is not None and num_global > 0:
            self._layout = Table(_leap_layout(num_frames, tokens_per_frame, num_global, self.leap, self.group_size))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None) -> Tensor:
        """``(B * T, H, N, D)`` or ``(B, H, G + T * N, D)`` to the same with heads behind tokens."""
        settings: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
        if self.tokens_per_frame is None:
            out = attend_frames(
                query, key, value, num_frames=self.num_frames, leap=self.leap, group_size=self.group_size,
                fold_div=self.fold_div, ranks=self.ranks, **settings,
            )  # fmt: skip
            return out.unflatten(-1, (query.shape[1], query.shape[3]))
        frames = (self.num_frames, self.tokens_per_frame)
        tokens = self.num_global + frames[0] * frames[1]
        if query.shape[2] != tokens:
            raise ValueError(
                f"{LEAP}: query must have {tokens} tokens, {self.num_global} global ones and {frames[0]} frames of "
                f"{frames[1]}, got query.shape={tuple(query.shape)}"
            )
        if self._layout is None:
            query, key, value = (x.unflatten(2, frames) for x in (query, key, value))
            out = cast(
                Tensor,
                leap_attention(
                    query, key, value, self.leap, group_size=self.group_size, fold_div=self.fold_div, **settings
                ),
            )
            return out.flatten(2, 3).transpose(1, 2)
        out = cast(Tensor, edge_sparse_attention(query, key, value, self._layout.on(query.device), **settings))
        if self.fold_div > 0:
            first, rest = out.split((self.num_global, frames[0] * frames[1]), 2)
            out = torch.cat([first, periodic_shift(rest.unflatten(2, frames), self.fold_div).flatten(2, 3)], 2)
        return out.transpose(1, 2)

    def _refuse(self, ranks: object) -> None:
        if self.tokens_per_frame is not None:
            raise ValueError("parallelize: leap attention over ranks must have its frames in the batch, got a sequence")

    def extra_repr(self) -> str:
        names = ("num_frames", "leap", "group_size", "fold_div", "tokens_per_frame", "num_global")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _leap_layout(num_frames: int, tokens_per_frame: int, num_global: int, leap: int, group_size: int) -> BlockLayout:
    """A block is a frame, and reads the frames of its leap group; on the CPU."""
    frame = torch.arange(num_frames, device="cpu")
    group = frame // (leap * group_size) * leap + frame % leap
    reads = group[:, None] == group
    offsets = ends(reads.sum(1))
    return BlockLayout(
        num_frames * tokens_per_frame, tokens_per_frame, offsets, reads.nonzero()[:, 1], num_global=num_global
    )


def _frames(op: str, model: nn.Module, config: Any, num_frames: int | None) -> tuple[int, int | None, int]:
    """T, N (None where the frames lie in the batch) and G of a model, see :class:`LeapOfLayer`."""
    kind, sign = type(model).__name__, sign_of_video(model)
    if sign is None:
        if num_frames is None:
            raise ValueError(f"{op}: num_frames must be given for a model of images, got num_frames=None for {kind}")
        _checks.integer(op, "num_frames", num_frames, least=1)
        return num_frames, None, 0
    if config.model_type not in GLOBAL_TOKENS:
        raise ValueError(
            f"{op}: a model of videos must be one of {', '.join(GLOBAL_TOKENS)}, got model={kind}, which has {sign}"
        )
    if num_frames not in (None, config.num_frames):
        raise ValueError(
            f"{op}: num_frames must be that of the configuration ({config.num_frames}), got num_frames={num_frames}"
        )
    tubelet = config.tubelet_size
    depth, *patch = tubelet if isinstance(tubelet, Iterable) else [tubelet, *_pair(config.patch_size)]
    height, width = _pair(config.image_size)
    tokens = (height // patch[0]) * (width // patch[1])
    return config.num_frames // depth, tokens, GLOBAL_TOKENS[config.model_type]


def _pair(size: int | Sequence[int]) -> list[int]:
    return list(size) if isinstance(size, Iterable) else [size, size]


def _dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``query (B, H, Lq, D)``, ``key, value (B, H / G, Lk, D)`` to ``(B, Lq, H, D)``; the mask is of `_key_lengths`."""
    _refuse(DENSE, options)
    if attention_mask is not None and (attention_mask.dim() != 1 or attention_mask.is_floating_point()):
        raise ValueError(
            f"{DENSE}: attention_mask must be None or hide padding at the end, (B, Lk), before transformers makes "
            f"another of it, got attention_mask.shape={tuple(attention_mask.shape)}"
        )
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if is_causal and attention_mask is None and queries > 1:
        if queries != keys:
            raise ValueError(
                f"{DENSE}: key must have as many tokens as query ({queries}) in causal attention, "
                f"got key.shape={tuple(key.shape)}"
            )
        if groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        layout = _causal_layout(queries, query.device)
        out = edge_sparse_attention(query, key, value, layout, causal=True, dropout_p=dropout, scale=scaling)
        return cast(Tensor, out).transpose(1, 2), None
    if groups > 1:  # The queries of a group read the same keys, as if they were further tokens.
        query = query.unflatten(1, (-1, groups)).flatten(2, 3)
    out = latent_attention(query, key, value, key_lengths=attention_mask, dropout_p=dropout, scale=scaling)
    out = cast(Tensor, out)
    if groups == 1:
        return out.transpose(1, 2), None
    return out.unflatten(2, (groups, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3), None


def _leap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """``(B, H, tokens, D)`` to ``(B, tokens, H, D)``, as the layer's :class:`LeapOfLayer` has it."""
    _refuse(LEAP, options | {"attention_mask": attention_mask})
    part = getattr(module, LEAP, None)
    if part is None:
        raise ValueError(
            f"{LEAP}: a layer must have its settings from vattn.integrations.transformers.set_leap_attention, "
            f"got {type(module).__name__} without"
        )
    return part(query, key, value, dropout, scaling), None


def _refuse(name: str, options: dict[str, Any]) -> None:
    """Raise for options that change what attention gives."""
    found = [option for option in UNSUPPORTED if options.get(option) is not None]
    if options.get("output_attentions"):
        found.append("output_attentions=True")
    if found:
        raise ValueError(f"{name}: attention must have no options that it does not support, got {', '.join(found)}")


def _causal_layout(num_tokens: int, device: torch.device) -> BlockLayout:
    """Every block reads itself and those before it. It takes 20 microseconds: a cache would do no better."""
    blocks = -(-num_tokens // CAUSAL_BLOCK)
    row = torch.arange(blocks + 1, device=device)
    columns = torch.tril_indices(blocks, blocks, device=device)[1]
    return BlockLayout(num_tokens, CAUSAL_BLOCK, row * (row + 1) // 2, columns, check_values=False)


def _key_lengths(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """What "vattn" is given for a mask: how many keys each sample has, ``(B,)``, or None for all of them.

    The padding of causal attention lies behind the tokens that could see it, and needs no mask.
    """
    causal = mask_function is causal_mask_function
    kinds = (causal_mask_function, bidirectional_mask_function)
    if mask_function not in kinds or not (allow_is_causal_skip if causal else allow_is_bidirectional_skip):
        name = getattr(mask_function, "__qualname__", mask_function)
        raise ValueError(f"{DENSE}: mask_function must be causal, or of padding, or both, got mask_function={name}")
    if causal and (isinstance(q_offset, Tensor) or kv_length != q_offset + q_length or (q_length > 1 and q_offset > 0)):
        raise ValueError(
            f"{DENSE}: causal attention must be of all tokens, or of one after a cache that grows, "
            f"got q_length={q_length}, kv_length={kv_length}"
        )
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    torch_compilable_check(
        attention_mask[:, 1:] <= attention_mask[:, :-1],
        f"{DENSE}: attention_mask must be ones, then zeros for padding at the end, got a one after a zero",
    )
    return None if causal and q_length > 1 else attention_mask.sum(1)


def _no_mask(attention_mask: Tensor | None = None, mask_function: Any = None, **options: Any) -> None:
    if attention_mask is not None or mask_function is not bidirectional_mask_function:
        if attention_mask is not None:
            got = f"attention_mask.shape={tuple(attention_mask.shape)}"
        else:
            got = f"mask_function={getattr(mask_function, '__qualname__', mask_function)}"
        raise ValueError(f"{LEAP}: the model must use no masks with leap attention, got {got}")
