"""What the models share: outputs per frame, the pre-norm block, and reading official checkpoints."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vattn.nn import leap_of_level

Levels = Sequence[int | None]
Model = TypeVar("Model", bound=nn.Module)
Item = TypeVar("Item")


class FrameModel(nn.Module):
    """A model that has an output for every frame of a video, and for the video their mean."""

    num_frames: int

    def forward_frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the output of every frame, ``(B, T, ...)``."""
        raise NotImplementedError

    def forward(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to the mean over frames, such as logits ``(B, num_classes)``."""
        return self.forward_frames(video).mean(1)

    def frames(self, video: Tensor) -> Tensor:
        """``(B, T, 3, H, W)`` to ``(B * T, 3, H, W)``."""
        if video.dim() != 5 or video.shape[1] != self.num_frames:
            raise ValueError(
                f"{type(self).__name__}: video must have shape (B, {self.num_frames}, 3, H, W), "
                f"got video.shape={tuple(video.shape)}"
            )
        return video.flatten(0, 1)

    def per_frame(self, x: Tensor) -> Tensor:
        """``(B * T, ...)`` to ``(B, T, ...)``."""
        return x.unflatten(0, (len(x) // self.num_frames, self.num_frames))


class Block(nn.Module):
    """``x + attn(norm1(x))``, unless there is no attention, then ``x + mlp(norm2(x))``."""

    def __init__(self, norm: Callable[[], nn.Module], attn: nn.Module | None, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = None if attn is None else norm()
        self.attn = attn
        self.norm2 = norm()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        if self.norm1 is not None and self.attn is not None:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def named(**modules: nn.Module) -> nn.Sequential:
    """A sequence of modules with names, which are those of an official checkpoint."""
    return nn.Sequential(OrderedDict(modules))


def hidden_size(dim: int, ratio: float) -> int:
    """The channels inside an MLP, rounded down, but not below a whole number for the error of a quotient."""
    return int(dim * ratio + 1e-6)


def init_linear(module: nn.Module) -> None:
    """The initialization of vision transformers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def layer_leaps(op: str, levels: Levels, depth: int, num_frames: int) -> list[int | None]:
    """The leap of each of `depth` layers, whose levels repeat."""
    if not levels:
        raise ValueError(f"{op}: levels must have at least one element, got levels={levels!r}")
    return [leap_of_level(levels[i % len(levels)], num_frames) for i in range(depth)]


def official_weights(op: str, state_dict: Mapping[str, Any], *needed: str) -> dict[str, Tensor]:
    """The weights of a checkpoint under their own names: without an outer dict, and without prefixes.

    A training script saves ``{"epoch": ..., "state_dict": {"module.base_model.head.weight": ...}}``. `needed`
    are names that the weights must have; the first one tells what the prefix is.
    """
    for outer in ("state_dict", "model"):
        if isinstance(state_dict.get(outer), Mapping):
            state_dict = state_dict[outer]
    ends = [name.removesuffix(needed[0]) for name in state_dict if name.endswith(needed[0])]
    prefix = next((end for end in ends if end == "" or end.endswith(".")), "")
    weights = {name.removeprefix(prefix): weight for name, weight in state_dict.items()}
    for name in needed:
        if name not in weights:
            raise ValueError(
                f"{op}: state_dict must have {name}, got {len(weights)} names: {', '.join(sorted(weights)[:8])}"
            )
    return weights


def count_blocks(weights: Mapping[str, Tensor], stage: str) -> int:
    """How many ``<stage>.<i>.`` there are."""
    return len({name.split(".")[1] for name in weights if name.startswith(f"{stage}.")})


def heads_or_default(op: str, num_heads: int | None, embed_dim: int) -> int:
    """`num_heads`, which weights do not show, or heads of 64 channels."""
    if num_heads is None and embed_dim % 64:
        raise ValueError(f"{op}: num_heads must be given unless embed_dim is a multiple of 64, got {embed_dim=}")
    return num_heads or embed_dim // 64


def load(weights: Mapping[str, Tensor], build: Callable[[], Model]) -> Model:
    """The model that `build` makes, in evaluation mode, with copies of `weights` that keep dtype and device."""
    with torch.device("meta"):
        model = build()
    model.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()}, assign=True)
    return model.eval()


def progress_bar(items: Iterable[Item], title: str, shown: bool) -> Iterable[Item]:
    """`items`, with a progress bar if there shall be one."""
    if not shown:
        return items
    from tqdm.auto import tqdm  # not needed otherwise

    return tqdm(items, desc=title)
