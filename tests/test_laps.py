"""The LAPS models, and image models that become video models; their numbers are checked in tests/golden."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn.models.laps import LapsVisformer, LapsViT, video_from_image
from vattn.nn import LeapAttention

VIT: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "num_classes": 3, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0,
}  # fmt: skip
VISFORMER: dict[str, Any] = {
    "image_size": 32, "stem_channels": 4, "num_classes": 3, "embed_dim": 16, "depth": (1, 2, 2), "num_heads": 2,
    "mlp_ratio": 2.0,
}  # fmt: skip
MODELS: dict[str, Callable[..., Any]] = {
    "vit": lambda *settings, **more: LapsViT(*settings, **(VIT | more)),
    "visformer": lambda *settings, **more: LapsVisformer(*settings, **(VISFORMER | more)),
}
SIZES = {"vit": (8, 8), "visformer": (32, 32)}


def randomize(model: Any) -> Any:
    """Weights, norms and running statistics that are all different, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0.0 if "var" in name else 0.5))
    return model.eval()


class TestLaps:
    """What both official models have in common."""

    @pytest.fixture(params=["vit", "visformer"])
    def kind(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_video_is_the_mean_of_its_frames(self, kind: str) -> None:
        model, video = (
            randomize(MODELS[kind](4, fold_div=2, **_levels(kind, (1, 2)))),
            torch.randn(2, 4, 3, *SIZES[kind]),
        )
        logits = model.forward_frames(video)
        assert logits.shape == (2, 4, 3)
        torch.testing.assert_close(model(video), logits.mean(1))
        torch.testing.assert_close(model.head(model.features(video)), logits)

    @pytest.mark.parametrize(
        "levels, fold_div, seen",
        [
            pytest.param((None,), 0, [0], id="no leap, no shift: frames are images"),
            pytest.param((1,), 0, [0, 4], id="level 1: the pair"),
            pytest.param((1, 2), 0, [0, 2, 4, 6], id="levels 1 and 2: pairs of pairs"),
            pytest.param((3, 2, 1), 0, list(range(8)), id="three levels: the whole video"),
            pytest.param((None, None), 4, [0, 1, 2], id="two shifts: two neighbours"),
        ],
    )
    def test_what_frame_0_sees(self, kind: str, levels: tuple, fold_div: int, seen: list[int]) -> None:
        # All attention layers in one stage, so that the levels follow each other.
        sizes = {"depth": len(levels)} if kind == "vit" else {"depth": (1, len(levels), 0)}
        model = randomize(MODELS[kind](8, fold_div=fold_div, **_levels(kind, levels), **sizes))
        video = torch.randn(1, 8, 3, *SIZES[kind], requires_grad=True)
        model.forward_frames(video)[0, 0].sum().backward()
        assert video.grad is not None
        assert video.grad.abs().sum((0, 2, 3, 4)).nonzero().flatten().tolist() == seen

    @pytest.mark.parametrize("wrap", ["plain", "prefixed", "checkpoint"])
    def test_official_state_dicts(self, kind: str, wrap: str) -> None:
        levels = _levels(kind, (1, None))
        model, video = randomize(MODELS[kind](4, fold_div=4, **levels)), torch.randn(2, 4, 3, *SIZES[kind])
        weights: dict[str, Any] = model.state_dict()
        if wrap != "plain":
            weights = {f"module.base_model.{name}": weight for name, weight in weights.items()}
        if wrap == "checkpoint":
            weights = {"epoch": 3, "state_dict": weights}
        loaded = type(model).from_official(weights, num_frames=4, fold_div=4, num_heads=2, **levels)
        assert not loaded.training
        assert torch.equal(loaded(video), model(video))
        with torch.no_grad():
            loaded.head.bias.add_(1.0)  # a copy: the caller's weights stay
        assert not torch.equal(loaded.head.bias, model.head.bias)
        doubles = {name: w.double() if w.is_floating_point() else w for name, w in model.state_dict().items()}
        loaded = type(model).from_official(doubles, num_frames=4, num_heads=2, **levels)
        assert loaded.head.weight.dtype == torch.float64

    def test_official_state_dict_errors(self, kind: str) -> None:
        model = MODELS[kind](4, **_levels(kind, (1,)))
        op, weights = f"{type(model).__name__}.from_official", model.state_dict()
        with pytest.raises(ValueError, match=f"^{op}: num_heads must be given .*, got embed_dim=16$"):
            type(model).from_official(weights, num_frames=4)
        without_head = {name: weight for name, weight in weights.items() if "head" not in name}
        with pytest.raises(ValueError, match=f"^{op}: state_dict must have head.weight, got .* names: "):
            type(model).from_official(without_head, num_frames=4, num_heads=2)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*dist_token"):
            type(model).from_official(
                weights | {"dist_token": torch.zeros(1)}, num_frames=4, num_heads=2, **_levels(kind, (1,))
            )

    def test_video_errors(self, kind: str) -> None:
        model = MODELS[kind](4, **_levels(kind, (1,)))
        name = type(model).__name__
        for shape in ((2, 5, 3, *SIZES[kind]), (8, 3, *SIZES[kind])):
            with pytest.raises(
                ValueError, match=rf"^{name}: video must have shape \(B, 4, 3, H, W\), got video.shape="
            ):
                model(torch.zeros(shape))
        with pytest.raises(ValueError, match=f"^{name}: video must have frames .*, got video.shape="):
            model(torch.zeros(2, 4, 3, 64, 64))

    @pytest.mark.parametrize(
        "levels, message",
        [((), "levels must have at least one element"), ((3,), "got level=3, num_frames=4")],
    )
    def test_level_errors(self, kind: str, levels: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MODELS[kind](4, **_levels(kind, levels))

    def test_the_loss_of_training(self, kind: str) -> None:
        model = randomize(MODELS[kind](4, **_levels(kind, (1, 2))))
        video, labels = torch.randn(3, 4, 3, *SIZES[kind]), torch.tensor([0, 2, 1])
        torch.testing.assert_close(model.training_loss(video, labels), F.cross_entropy(model(video), labels))
        smooth = model.training_loss(video, labels, label_smoothing=0.1)
        torch.testing.assert_close(smooth, F.cross_entropy(model(video), labels, label_smoothing=0.1))

    @pytest.mark.slow
    def test_training_lowers_the_loss(self, kind: str) -> None:
        torch.manual_seed(0)
        assert_learns(MODELS[kind](4, **_levels(kind, (1, 2))), torch.randn(4, 4, 3, *SIZES[kind]))


def _levels(kind: str, levels: tuple) -> dict[str, Any]:
    return {"levels": levels if kind == "vit" else (levels, levels)}


def assert_learns(model: nn.Module, video: Tensor) -> None:
    """A few steps of training halve the loss on one batch."""
    labels = torch.arange(len(video)) % 3
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    model.train()
    for _ in range(30):
        loss = F.cross_entropy(model(video), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_levels_repeat_over_layers() -> None:
    model: Any = LapsViT(8, (1, 2, 3, None), **(VIT | {"depth": 6}))
    assert [block.attn.leap for block in model.blocks] == [4, 2, 1, None, 4, 2]
    visformer: Any = LapsVisformer(8, ((1, 2), (None, 3)), **(VISFORMER | {"depth": (1, 3, 2)}))
    assert [block.attn.leap for block in visformer.stage2] == [4, 2, 4]
    assert [block.attn.leap for block in visformer.stage3] == [None, 1]


@pytest.mark.parametrize("size", [(8, 12), 16])
def test_vit_frames_of_any_size(size: Any) -> None:
    model = randomize(LapsViT(2, (1,), **(VIT | {"image_size": size})))
    video = torch.randn(1, 2, 3, *(size if isinstance(size, tuple) else (size, size)))
    given: dict[str, Any] = {"image_size": size} if isinstance(size, tuple) else {}  # a square is seen
    loaded = LapsViT.from_official(model.state_dict(), num_frames=2, levels=(1,), num_heads=2, **given)
    assert torch.equal(loaded(video), model(video))


def test_vit_frames_of_another_shape_with_as_many_patches() -> None:
    """Positions number the patches of one grid: 2 x 3 patches are not 3 x 2."""
    model = LapsViT(2, (1,), image_size=(8, 12), patch_size=4, embed_dim=16, depth=1, num_heads=2)
    model(torch.zeros(1, 2, 3, 8, 12))
    with pytest.raises(ValueError, match=r"^LapsViT: video must have frames of 6 patches, 2 x 3, got video.shape="):
        model(torch.zeros(1, 2, 3, 12, 8))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"stem_channels": None}, id="no stem"),
        pytest.param({"groups": 1}, id="ungrouped 3x3 convolutions"),
        pytest.param({"spatial_conv": "011"}, id="3x3 convolutions in later stages"),
        pytest.param({"spatial_conv": "111"}, id="3x3 convolutions everywhere"),
        pytest.param({"attn_stage": "001"}, id="attention in stage 3 only"),
        pytest.param({"depth": (0, 1, 1)}, id="no stage 1"),
        pytest.param({"qkv_bias": True}, id="qkv with bias"),
        pytest.param({"mlp_ratio": 2.3}, id="a ratio that every stage rounds down"),
    ],
)
def test_visformer_structure_is_read_from_its_weights(settings: dict[str, Any]) -> None:
    model = randomize(LapsVisformer(2, ((1,), (1,)), **(VISFORMER | settings)))
    loaded = LapsVisformer.from_official(model.state_dict(), num_frames=2, levels=((1,), (1,)), num_heads=2)
    video = torch.randn(1, 2, 3, 32, 32)
    assert torch.equal(loaded(video), model(video))


@pytest.mark.parametrize("kind", MODELS)
def test_the_configuration_is_read_and_overridden(kind: str) -> None:
    model = MODELS[kind](8, fold_div=2)
    data = {"NUM_FRAMES": 8, "FOLD_DIV": None}
    config = {"DATA": data, "S2_SKIP_LEVEL": [3, 1], "S3_SKIP_LEVEL": [2], "num_heads": 2}
    found = type(model).from_official(model.state_dict(), config).config
    assert (found["num_frames"], found["fold_div"], found["num_heads"]) == (8, 0, 2)
    assert found["levels"] == ([3, 1] if kind == "vit" else [[3, 1], [2]])
    found = type(model).from_official(model.state_dict(), config, num_frames=16, num_heads=4, fold_div=8).config
    assert (found["num_frames"], found["fold_div"], found["num_heads"]) == (16, 8, 4)
    assert type(model).from_official(model.state_dict(), num_heads=2).config["fold_div"] == 4


@pytest.mark.parametrize("missing", ["NUM_FRAMES", "S2_SKIP_LEVEL", "S3_SKIP_LEVEL", "FOLD_DIV"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_configuration_says_all_that_weights_do_not_show(kind: str, missing: str) -> None:
    """No default is mixed in: what is missing is asked for, or overridden."""
    model = MODELS[kind](8)
    config = {"NUM_FRAMES": 8, "FOLD_DIV": 2, "S2_SKIP_LEVEL": [3, 1], "S3_SKIP_LEVEL": [2], "num_heads": 2}
    del config[missing]
    if (kind, missing) == ("vit", "S3_SKIP_LEVEL"):
        assert type(model).from_official(model.state_dict(), config).config["levels"] == [3, 1]
        return
    with pytest.raises(ValueError, match=rf"^{type(model).__name__}.from_official: config must have {missing}, got "):
        type(model).from_official(model.state_dict(), config)
    levels = (2,) if kind == "vit" else ((2,), (1,))
    overrides = {"NUM_FRAMES": {"num_frames": 8}, "FOLD_DIV": {"fold_div": 2}}.get(missing, {"levels": levels})
    type(model).from_official(model.state_dict(), config, **overrides)


def test_visformer_qk_scale_is_an_exponent_for_q_and_k_each() -> None:
    model: Any = LapsVisformer(2, ((1,), (1,)), **VISFORMER)
    loaded: Any = LapsVisformer.from_official(
        model.state_dict(), {"qk_scale": -0.5}, num_frames=2, levels=((1,), (1,)), fold_div=4, num_heads=2
    )
    assert [stage[0].attn.scale for stage in (loaded.stage2, loaded.stage3)] == [1 / 8, 1 / 16]
    assert [stage[0].attn.scale for stage in (model.stage2, model.stage3)] == [8**-0.5, 1 / 4]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attn_stage": "111"}, "stage 1 must have no attention, got attn_stage='111'"),
        ({"attn_stage": "01"}, 'attn_stage must be three of "0" and "1", got attn_stage=\'01\''),
        ({"spatial_conv": "1x0"}, 'spatial_conv must be three of "0" and "1", got spatial_conv=\'1x0\''),
        ({"levels": (1, 2, 3)}, "levels must be a list for stage 2 and one for stage 3, got levels="),
    ],
)
def test_visformer_setting_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^LapsVisformer: {message}"):
        LapsVisformer(**(VISFORMER | settings))


class TimmBlock(nn.Module):
    """A block of timm's ViT: its names, and how it calls its attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = LeapAttention(dim, num_heads, num_frames=1, leap=None, qkv_bias=True)  # timm's, for one frame
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    """timm's `VisionTransformer`, as far as its names go."""

    def __init__(self, dim: int = 16, num_heads: int = 2, depth: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 4, stride=4)})
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, 5, dim))
        self.blocks = nn.Sequential(*(TimmBlock(dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Transformers4Attention(nn.Module):
    """`ViTSelfAttention` of transformers 4: separate layers, a head mask, a tuple."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.scaling, self.dropout_prob = num_heads, (dim // num_heads) ** -0.5, 0.0
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(
        self, hidden_states: Tensor, head_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, None]:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None


class Transformers4Block(TimmBlock):
    """A block around such an attention, which leaves the projection back to the block."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.attention, self.output = Transformers4Attention(dim, num_heads), self.attn.proj
        del self.attn

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.output(self.attention(self.norm1(x), attn_mask, False)[0])
        return x + self.mlp(self.norm2(x))


def timm_vit() -> Any:
    return TimmViT()


def transformers_4_vit() -> Any:
    model = TimmViT()
    model.blocks = nn.Sequential(*(Transformers4Block(16, 2) for _ in range(3)))
    return model


def transformers_vit(classes: bool, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=3, **settings,
    )  # fmt: skip
    return (transformers.ViTForImageClassification if classes else transformers.ViTModel)(config)


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "timm's names": timm_vit,
    "transformers 4's names": transformers_4_vit,
    "transformers": lambda: transformers_vit(classes=True),
    "transformers eager": lambda: transformers_vit(classes=True, attn_implementation="eager"),
}


class TestVideoFromImage:
    """A video model from an image model."""

    @pytest.fixture(params=CLASSIFIERS)
    def image(self, request: pytest.FixtureRequest) -> Any:
        return randomize(CLASSIFIERS[request.param]())

    @pytest.fixture
    def video(self) -> Tensor:
        return torch.randn(2, 4, 3, 8, 8)

    def test_without_leap_and_shift_it_is_the_image_model(self, image: Any, video: Tensor) -> None:
        model = video_from_image(image, 4, levels=(None,), fold_div=0)
        torch.testing.assert_close(model(video), logits(image(video.flatten(0, 1))).unflatten(0, (2, 4)).mean(1))

    def test_no_parameter_is_added_and_all_are_shared(self, image: Any, video: Tensor) -> None:
        before = {name: id(parameter) for name, parameter in image.named_parameters()}
        types = [type(module) for module in image.modules()]
        expected = logits(image(video[:, 0]))
        model = video_from_image(image, 4, levels=(1, 2))
        assert {name: id(parameter) for name, parameter in model.image_model.named_parameters()} == before
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in image.parameters())
        # The image model is what it was.
        assert [type(module) for module in image.modules()] == types
        assert torch.equal(logits(image(video[:, 0])), expected)
        assert not torch.allclose(model.forward_frames(video)[:, 0], expected)

    def test_state_dicts_are_interchangeable(self, image: Any, video: Tensor) -> None:
        model = video_from_image(image, 4, levels=(1, 2))
        other = copy.deepcopy(image)
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        image.load_state_dict(model.image_model.state_dict())
        model.image_model.load_state_dict(other.state_dict())
        assert torch.equal(model(video), video_from_image(other, 4, levels=(1, 2))(video))

    def test_frames_meet_in_leap_pairs(self, image: Any) -> None:
        video = torch.randn(1, 8, 3, 8, 8, requires_grad=True)
        video_from_image(image, 8, levels=(1, None, 2), fold_div=0).forward_frames(video)[0, 0].sum().backward()
        assert video.grad is not None
        assert video.grad.abs().sum((0, 2, 3, 4)).nonzero().flatten().tolist() == [0, 2, 4, 6]

    @pytest.mark.slow
    def test_training_lowers_the_loss(self, image: Any) -> None:
        torch.manual_seed(0)
        assert_learns(video_from_image(image, 4, levels=(1, 2)), torch.randn(4, 4, 3, 8, 8))

    def test_mode_is_kept(self, image: Any) -> None:
        assert not video_from_image(image, 4, levels=(1,)).training
        model = video_from_image(image.train(), 4, levels=(1,))
        assert all(module.training for module in model.modules())

    def test_video_errors(self, image: Any) -> None:
        with pytest.raises(ValueError, match=r"^VideoFromImage: video must have shape \(B, 4, 3, H, W\)"):
            video_from_image(image, 4, levels=(1,))(torch.zeros(2, 3, 3, 8, 8))
        with pytest.raises(ValueError, match=r"^video_from_image: .* got level=3, num_frames=4$"):
            video_from_image(image, 4)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def test_timm_and_the_official_vit_agree() -> None:
    image, video = randomize(timm_vit()), torch.randn(2, 8, 3, 8, 8)
    official = LapsViT.from_official(image.state_dict(), num_heads=2)
    torch.testing.assert_close(video_from_image(image, 8)(video), official(video))


def test_transformers_and_timm_agree() -> None:
    timm, transformers = randomize(timm_vit()), transformers_4_vit().eval()
    weights: dict[str, Tensor] = {}
    for name, weight in timm.state_dict().items():
        block, _, kind = name.partition(".attn.qkv.")
        if kind:
            parts = zip(("query", "key", "value"), weight.chunk(3), strict=True)
            weights |= {f"{block}.attention.{part}.{kind}": w for part, w in parts}
        else:
            weights[name.replace("attn.proj", "output")] = weight
    transformers.load_state_dict(weights)
    video = torch.randn(2, 8, 3, 8, 8)
    torch.testing.assert_close(video_from_image(transformers, 8)(video), video_from_image(timm, 8)(video))


def test_hidden_states_of_a_model_without_classifier() -> None:
    image, video = randomize(transformers_vit(classes=False)), torch.randn(2, 4, 3, 8, 8)
    model = video_from_image(image, 4, levels=(None,), fold_div=0)
    hidden = image(video.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 4))
    torch.testing.assert_close(model(video), hidden.mean(1))
    assert model.forward_frames(video).shape == (2, 4, 5, 16)


def attentions(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".attention")]


def test_gradient_checkpointing() -> None:
    model, video = (
        video_from_image(transformers_vit(classes=True), 4, levels=(1, 2)).train(),
        torch.randn(2, 4, 3, 8, 8),
    )

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(video).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    kept = gradients()
    image: Any = model.image_model
    getattr(image, "activation_checkpointing_enable", image.gradient_checkpointing_enable)()
    calls: list[nn.Module] = []
    for module in attentions(model):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    torch.testing.assert_close(gradients(), kept)
    assert len(calls) == 6  # three layers, and again in the backward


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_attention_dropout_is_kept(p: float) -> None:
    image = transformers_vit(classes=True, attention_probs_dropout_prob=p)
    attention = attentions(video_from_image(image, 4, levels=(1, 2)).train())[0]
    first, second = (attention(torch.randn(4, 5, 16))[0] for _ in range(2))
    assert torch.equal(first, second) == (p == 1)


def test_masks_and_weights_are_refused() -> None:
    attention = attentions(video_from_image(transformers_4_vit(), 4, levels=(1,)))[0]
    x, position = torch.zeros(4, 5, 16), (torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match=r"^video_from_image: leap attention has no .*, got attention_mask, position$"):
        attention(x, torch.zeros(4, 1, 5, 5), position=position)
    with pytest.raises(ValueError, match=r", got output_attentions=True$"):
        attention(x, output_attentions=True)
    attention(x, None, output_attentions=False, output_hidden_states=True)


@pytest.mark.parametrize(
    ("name", "settings", "got"),
    [
        ("VideoMAE", {"num_frames": 4, "image_size": 16, "patch_size": 8}, "which has num_frames"),
        ("Vivit", {"num_frames": 4, "image_size": 16, "tubelet_size": [2, 8, 8]}, "which has num_frames"),
        ("Bert", {"vocab_size": 9}, "which takes input_ids"),
        ("AST", {"max_length": 32, "num_mel_bins": 32}, "which takes input_values"),
    ],
)
def test_models_of_something_else_are_refused(name: str, settings: dict[str, Any], got: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
    with pytest.raises(
        ValueError, match=f"^video_from_image: model must be a model of images, got model={name}Model, {got}"
    ):
        video_from_image(model, 4, levels=(1,))


@pytest.mark.parametrize("shared", [True, False])
def test_relative_positions_are_refused(shared: bool) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    config = transformers.BeitConfig(
        image_size=32, patch_size=16, use_relative_position_bias=not shared,
        use_shared_relative_position_bias=shared, **size,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"^video_from_image: .*, got model=BeitModel, which has .*relative_position_bias"
    ):
        video_from_image(transformers.BeitModel(config), 2, levels=(1,))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("classes", [True, False])
def test_a_converted_model_is_exported(classes: bool, strict: bool) -> None:
    model = video_from_image(randomize(transformers_vit(classes=classes)), 4, levels=(1, 2)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        model, (torch.randn(2, 4, 3, 8, 8),), dynamic_shapes=({0: batch},), strict=strict
    ).module()
    for size in (2, 3):
        video = torch.randn(size, 4, 3, 8, 8)
        torch.testing.assert_close(exported(video), model(video))


def test_a_mask_for_the_whole_model_is_refused() -> None:
    model = video_from_image(transformers_vit(classes=False), 4, levels=(1,))
    with pytest.raises(ValueError, match=r"^vattn_leap: .* no masks .*, got attention_mask.shape="):
        model.image_model(torch.zeros(4, 3, 8, 8), attention_mask=torch.ones(4, 5))


def test_unknown_models_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^video_from_image: .*, got TransformerEncoderLayer with MultiheadAttention \(out_proj\)$"
    ):
        video_from_image(nn.TransformerEncoderLayer(16, 2), 4, levels=(1,))
    with pytest.raises(ValueError, match=r"got Sequential with no attention$"):
        video_from_image(nn.Sequential(nn.Linear(1, 1), nn.Flatten()), 4, levels=(1,))
    for make in (timm_vit, transformers_4_vit):
        image = make()
        for name, module in image.named_modules():
            if name.endswith(("attn", "attention")):
                module.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        with pytest.raises(ValueError, match=r"relative_position_bias_table$"):
            video_from_image(image, 4, levels=(1,))
