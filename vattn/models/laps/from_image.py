"""An image ViT becomes a video model: its attention layers leap, and not one parameter is added.

    image model    blocks.0.attn            blocks.1.attn            blocks.2.attn           ...
    video model    leap T // 2**levels[0]   leap T // 2**levels[1]   leap T // 2**levels[2]  ...

LAPS: Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification" (ACM MM 2022).
A model of transformers leaps through its attention interface, see :mod:`vattn.integrations.transformers`. In any other
model an attention is known by the names of its layers: those of timm, or of transformers. timm is not imported.
"""

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from vattn._over_ranks import OverRanks
from vattn.models.laps.frames import FrameModel, Levels, layer_leaps
from vattn.nn import LeapAttention, attend_frames, require_only, split_heads


class SplitNames(NamedTuple):
    """What an attention with separate query, key and value layers calls its parts."""

    query: str
    key: str
    value: str
    output: str | None  # None: the projection back is somebody else's
    num_heads: str
    scale: str
    dropout_p: str

    @property
    def layers(self) -> list[str]:
        return [name for name in (self.query, self.key, self.value, self.output) if name is not None]

    def fit(self, attention: nn.Module) -> bool:
        """Whether `attention` has these parts."""
        return all(isinstance(getattr(attention, name, None), nn.Linear) for name in self.layers) and all(
            hasattr(attention, name) for name in (self.num_heads, self.scale, self.dropout_p)
        )


TRANSFORMERS = (
    SplitNames("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", "scaling", "attention_dropout"),  # 5
    SplitNames("query", "key", "value", None, "num_attention_heads", "scaling", "dropout_prob"),  # 4.48 and later
)


class SplitLeapAttention(nn.Module, OverRanks):
    """Leap attention through the layers of a transformers attention: its names, its arguments, its results."""

    def __init__(
        self, attention: nn.Module, names: SplitNames, num_frames: int, leap: int | None, fold_div: int
    ) -> None:
        super().__init__()
        require_only("video_from_image", attention, names.layers)
        for name in names.layers:
            self.add_module(name, attention.get_submodule(name))
        self.names = names
        self.num_heads: int = getattr(attention, names.num_heads)
        self.scale: float = getattr(attention, names.scale)
        self.dropout_p: float = getattr(attention, names.dropout_p)
        self.num_frames = num_frames
        self.leap = leap
        self.fold_div = fold_div
        self.train(attention.training)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        output_attentions: bool = False,
        **options: object,
    ) -> tuple[Tensor, None]:
        given = {"attention_mask": attention_mask, **options}
        unsupported = [name for name, value in given.items() if isinstance(value, (Tensor, tuple))]
        if unsupported or output_attentions:
            raise ValueError(
                "video_from_image: leap attention has no masks, no positions and no weights to return, got "
                + ", ".join([*unsupported, *(["output_attentions=True"] if output_attentions else [])])
            )
        query, key, value = (
            split_heads(self.get_submodule(name)(hidden_states), self.num_heads) for name in self.names[:3]
        )
        out = attend_frames(
            query, key, value, num_frames=self.num_frames, leap=self.leap, fold_div=self.fold_div,
            dropout_p=self.dropout_p if self.training else 0.0, scale=self.scale, ranks=self.ranks,
        )  # fmt: skip
        if self.names.output is not None:
            out = self.get_submodule(self.names.output)(out)
        return out, None


class VideoFromImage(FrameModel):
    """What :func:`video_from_image` returns: `image_model` on the frames of a video, then the mean over frames.

    `image_model` has the names and the parameters of the model that it was made from, so that their state
    dicts are interchangeable: ``video.image_model.load_state_dict(image.state_dict())``. It has no settings of its own,
    and is saved as the image model is, by the library that made that.
    """

    def __init__(self, image_model: nn.Module, num_frames: int) -> None:
        super().__init__()
        self.image_model = image_model
        self.num_frames = num_frames

    def forward_frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the image model's logits, or else hidden states, of every frame."""
        output: Any = self.image_model(self.frames(video))
        if not isinstance(output, Tensor):
            logits = getattr(output, "logits", None)
            output = output[0] if logits is None else logits
        return self.per_frame(output)


def video_from_image(
    model: nn.Module, num_frames: int, levels: Levels = (1, 2, 3, 1), fold_div: int = 4
) -> VideoFromImage:
    """Turn an image ViT of transformers or timm into a video model, with zero new parameters.

    Args:
        model: an image model of transformers that uses the attention interface, such as ``ViTForImageClassification``,
            ``DINOv3ViTModel`` or ``SiglipVisionModel``, or timm's ``VisionTransformer``. It stays an image model: the
            video model is new, but shares its parameters, so that training one trains the other.
        num_frames: T, frames of a video.
        levels: attention layer i, in the order of ``model.named_modules()``, has the level
            ``levels[i % len(levels)]``, see :func:`vattn.nn.leap_of_level`; None is attention within each frame.
        fold_div: divisor of the periodic shift, 0 for none.

    Returns:
        A model from ``(B, T, 3, H, W)`` to the mean over frames of the logits ``(B, num_classes)``, or, of a
        model without a classifier, of what it returns first, such as hidden states ``(B, N, C)``.
        `forward_frames` gives them for every frame.

    Raises:
        ValueError: `model` takes something else than images, or has relative positions or windows; it has no attention
            layer that is known, or one with parameters that leap attention would leave out; a level that does not fit.

    Source:
        Zhang et al., "Long-term Leap Attention, Short-term Periodic Shift for Video Classification", on
        adapting an image model.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=16, num_labels=5)
        >>> video_model = video_from_image(ViTForImageClassification(config), num_frames=8)
        >>> video_model(torch.randn(2, 8, 3, 32, 32)).shape
        torch.Size([2, 5])
    """
    op = "video_from_image"
    require_pixels(op, model)
    if sign := sign_of_video(model):
        raise ValueError(f"{op}: model must be a model of images, got model={type(model).__name__}, which has {sign}")
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    image_model = copy.deepcopy(model, cast("dict[int, Any]", shared))
    if hasattr(image_model, "set_attn_implementation"):
        from vattn.integrations.transformers import attention_layers, let_leap

        if attention_layers(image_model):
            let_leap(op, image_model, {"num_frames": num_frames, "levels": levels, "fold_div": fold_div})
            return VideoFromImage(image_model, num_frames).train(model.training)
    found = {name: change for name, module in image_model.named_modules() if (change := _leaping(module))}
    if not found:
        raise ValueError(
            f"{op}: model must have attention layers that use transformers' attention interface, or with the names of "
            f"timm (qkv, proj) or of transformers (query, key, value or q_proj, k_proj, v_proj, o_proj), got "
            f"{_describe(model)}"
        )
    leaps = layer_leaps(op, levels, len(found), num_frames)
    for (name, change), leap in zip(found.items(), leaps, strict=True):
        parent, _, child = name.rpartition(".")
        setattr(image_model.get_submodule(parent), child, change(num_frames, leap, fold_div))
    return VideoFromImage(image_model, num_frames).train(model.training)


def require_pixels(op: str, model: nn.Module) -> None:
    """Raise for a model of text, sound or pairs, as far as it tells, and for relative positions and windows."""
    kind, takes = type(model).__name__, getattr(model, "main_input_name", "pixel_values")
    if takes != "pixel_values":
        raise ValueError(f"{op}: model must be a model of images, got model={kind}, which takes {takes}")
    biases = [name for name, _ in model.named_parameters() if "relative_position" in name]
    if biases:  # which transformers hands to its attentions as masks
        raise ValueError(f"{op}: model must have no relative positions, got model={kind}, which has {biases[0]}")
    if window := getattr(getattr(model, "config", None), "window_size", 0):
        raise ValueError(f"{op}: model must have no windows within a frame, got model={kind} with window_size={window}")


def sign_of_video(model: nn.Module) -> str | None:
    """What tells that a model takes videos; None of a model of images."""
    config = getattr(model, "config", None)
    signs = [name for name in ("num_frames", "tubelet_size", "frames_per_clip") if hasattr(config, name)]
    signs += [name for name, module in model.named_modules() if isinstance(module, nn.Conv3d)]
    return signs[0] if signs else None


def _leaping(attention: nn.Module) -> Callable[[int, int | None, int], nn.Module] | None:
    """How to make `attention` leap, given (num_frames, leap, fold_div); None if it is not an attention we know."""
    if all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("qkv", "proj")):
        return lambda num_frames, leap, fold_div: LeapAttention.from_attention(
            attention, num_frames, leap, fold_div=fold_div
        )
    for names in TRANSFORMERS:
        if names.fit(attention):
            return lambda num_frames, leap, fold_div: SplitLeapAttention(attention, names, num_frames, leap, fold_div)
    return None


def _describe(model: nn.Module) -> str:
    """The attention-like modules of `model` and their layers, for an error message."""
    kinds = {
        f"{type(module).__name__} ({', '.join(child for child, _ in module.named_children())})"
        for name, module in model.named_modules()
        if any(word in f"{name.rpartition('.')[2]} {type(module).__name__}".lower() for word in ("attn", "attention"))
    }
    return f"{type(model).__name__} with {', '.join(sorted(kinds)) or 'no attention'}"
