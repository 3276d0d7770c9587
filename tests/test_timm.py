"""timm's own models with leap attention: `make test-timm` makes an environment in which timm imports."""

import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="timm needs torchvision, see `make test-timm`", exc_type=ImportError)

from tests import test_laps  # noqa: E402
from vattn.integrations.timm import leap_blocks  # noqa: E402
from vattn.models.laps import LapsViT, video_from_image  # noqa: E402
from vattn.nn import LeapAttention  # noqa: E402

VIT: dict[str, Any] = {
    "img_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2,
}  # fmt: skip


def vit(**settings: Any) -> Any:
    return test_laps.randomize(timm.models.VisionTransformer(**(VIT | settings)))


class TestVideoFromTimm(test_laps.TestVideoFromImage):
    """A video model from timm's image model."""

    @pytest.fixture(params=[{}, {"class_token": False, "global_pool": "avg", "reg_tokens": 2, "qk_norm": True}])
    def image(self, request: pytest.FixtureRequest) -> Any:
        return vit(**request.param)


def test_it_is_the_official_vit() -> None:
    image, video = vit(), torch.randn(2, 8, 3, 8, 8)
    official = LapsViT.from_official(image.state_dict(), num_heads=2)
    torch.testing.assert_close(video_from_image(image, 8)(video), official(video))


@pytest.mark.parametrize("setting", [{"qk_norm": True}, {"scale_attn_norm": True}, {"qkv_bias": False}])
def test_leap_attention_is_timms_attention_within_a_frame(setting: dict[str, Any]) -> None:
    image = vit(**setting)
    x = torch.randn(4, 5, 16, requires_grad=True)
    for block in image.blocks:
        ours = LeapAttention.from_attention(block.attn, num_frames=4, leap=None)
        expected, found = (torch.autograd.grad(f(x).square().sum(), [x, *f.parameters()]) for f in (block.attn, ours))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "works"), [("ParallelThingsBlock", True), ("ParallelScalingBlock", False)])
def test_parallel_blocks(name: str, works: bool) -> None:
    image, frames = vit(block_fn=getattr(timm.models.vision_transformer, name)), torch.randn(1, 4, 3, 8, 8)
    if not works:
        with pytest.raises(ValueError, match=r"^video_from_image: model must have attention layers"):
            video_from_image(image, 4, levels=(None,), fold_div=0)
        return
    model = video_from_image(image, 4, levels=(None,), fold_div=0)
    torch.testing.assert_close(model.forward_frames(frames)[0], image(frames[0]))


class TestLeapBlocks:
    """`block_fn=leap_blocks(...)` makes the model that video_from_image makes."""

    @pytest.mark.parametrize("block", [None, timm.models.vision_transformer.ResPostBlock])
    def test_equals_video_from_image(self, block: Callable[..., nn.Module] | None) -> None:
        image = vit() if block is None else vit(block_fn=block, init_values=1e-5)
        more = {} if block is None else {"init_values": 1e-5}
        model = vit(block_fn=leap_blocks(4, levels=(1, None, 2), fold_div=4, block_fn=block), **more)
        model.load_state_dict(image.state_dict())
        video = torch.randn(2, 4, 3, 8, 8)
        expected = video_from_image(image, 4, levels=(1, None, 2), fold_div=4).forward_frames(video)
        torch.testing.assert_close(model(video.flatten(0, 1)).unflatten(0, (2, 4)), expected)
        assert [block.attn.leap for block in model.blocks] == [2, None, 1]

    def test_by_the_name_of_a_model(self) -> None:
        model = timm.create_model("vit_tiny_patch16_224", block_fn=leap_blocks(2, levels=(1,)), img_size=32)
        assert model(torch.randn(4, 3, 32, 32)).shape == (4, 1000)

    def test_compiles_as_one_graph(self) -> None:
        model, frames = vit(block_fn=leap_blocks(4, levels=(1, 2), fold_div=4)), torch.randn(8, 3, 8, 8)
        compiled: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(frames), model(frames))

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"num_frames": 0}, ValueError, "leap_blocks: num_frames must be at least 1, got num_frames=0"),
            ({"num_frames": 4}, ValueError, r"leap_blocks: num_frames .* got level=3, num_frames=4"),
            ({"num_frames": 4, "levels": 1}, TypeError, "leap_blocks: levels must be a list or tuple"),
            ({"num_frames": 4, "levels": ()}, ValueError, "leap_blocks: levels must have at least one element"),
            ({"num_frames": 8, "fold_div": -1}, ValueError, "leap_blocks: fold_div must be at least 0"),
        ],
    )
    def test_settings_are_refused(self, settings: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=f"^{message}"):
            leap_blocks(**settings)

    @pytest.mark.parametrize("attention", ["diff", timm.layers.AttentionRope])
    def test_other_attentions_are_refused(self, attention: Any) -> None:
        with pytest.raises(ValueError, match=r"^LeapAttention.from_attention: attention must "):
            vit(block_fn=leap_blocks(2, levels=(1,)), attn_layer=attention)
        with pytest.raises(TypeError, match=r"^LeapAttention.from_attention: attention must have linear layers"):
            vit(block_fn=leap_blocks(2, levels=(1,), block_fn=timm.models.vision_transformer.ParallelThingsBlock))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "model must have no relative positions"),
        ("beit_base_patch16_224", "model must have no relative positions"),
        ("eva02_tiny_patch14_224", "attention must have parameters and buffers in .*, got EvaAttention with k_bias"),
        ("vit_base_patch16_rope_224", "attention must take its input, .* got AttentionRope with rope$"),
        ("resnet18", "model must have attention layers .* no attention$"),
    ],
)
def test_other_models_are_refused(name: str, message: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=f"^(video_from_image|LeapAttention.from_attention): {message}"):
        video_from_image(model, 4, levels=(1,))


def test_the_programs_of_the_page_run() -> None:
    names: dict[str, Any] = {}
    page = (pathlib.Path(__file__).parents[1] / "docs" / "timm.md").read_text()
    programs = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    for program in programs:
        exec(compile(program, "timm.md", "exec"), names)
    assert len(programs) == 3 and names["tokens"].shape == (16, 5, 192)
    assert names["model"].forward_features(names["frames"]).shape == (16, 5, 192)
