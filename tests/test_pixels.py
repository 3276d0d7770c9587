"""Models say which pixels and which order of axes they take, where it can be seen that a video is another."""

import warnings
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from tests.model_zoo import MODELS

FRAMES_FIRST = ["LapsViT", "LapsVisformer", "VideoEncoder"]


def model_and_video(name: str) -> tuple[Any, torch.Tensor]:
    """A small model, and noise of the size that it takes."""
    model = MODELS[name].make()
    size = MODELS[name].settings["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    frames = MODELS[name].settings["num_frames"]
    return model, torch.rand(1, frames, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FRAMES_FIRST)
def test_what_is_no_video(name: str) -> None:
    model, video = model_and_video(name)
    with pytest.raises(
        TypeError, match=rf"^{name}: video must be a floating-point tensor, of normalised pixels .*uint8"
    ):
        model(video.byte())
    order = r"that is \(B, C, T, H, W\), of which video.transpose\(1, 2\) has this order$"
    with pytest.raises(ValueError, match=rf"^{name}: video must have shape \(B, {video.shape[1]}, 3, .*{order}"):
        model(video.transpose(1, 2))


@pytest.mark.parametrize("name", FRAMES_FIRST)
def test_bytes_are_noticed_once(name: str) -> None:
    model, video = model_and_video(name)
    with pytest.warns(UserWarning, match=rf"^{name}: video must have normalised pixels .*, got some of magnitude 25\d"):
        model(video * 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(video * 255)  # nothing waits for a GPU but the first one
        model_and_video(name)[0](video * 4 - 2)


@pytest.mark.parametrize("name", FRAMES_FIRST)
def test_a_trace_has_no_pixels_to_look_at(name: str) -> None:
    model, video = model_and_video(name)
    traced = make_fx(lambda video: tree_leaves(model(video))[0])(video)
    torch.testing.assert_close(traced(video), tree_leaves(model(video))[0])
