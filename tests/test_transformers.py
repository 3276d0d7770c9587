"""The attention implementations "vattn" and "vattn_leap" of transformers, on tiny random models."""

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import reference

transformers = pytest.importorskip("transformers", reason="the attention interface is that of transformers")

from vattn.integrations.transformers import (  # noqa: E402
    DENSE,
    LeapOfLayer,
    attention_layers,
    register,
    set_leap_attention,
)
from vattn.models.laps import video_from_image  # noqa: E402

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = SIZE | {"vocab_size": 50, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 49}


def make(name: str, **settings: Any) -> Any:
    """A model by the name of its class, in evaluation mode, from its configuration."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**settings)).eval()
    for parameter in model.parameters():  # some are zeros, and would hide a token from the output
        nn.init.normal_(parameter, std=0.3)
    return model


IMAGES: dict[str, Callable[[], Any]] = {
    "ViT": lambda: make("ViTForImageClassification", **SIZE, **IMAGE, num_labels=3),
    "SigLIP": lambda: make("SiglipVisionModel", **SIZE, **IMAGE),
    "DINOv3": lambda: make("DINOv3ViTModel", **SIZE, **IMAGE, num_register_tokens=2),
    "CLIP": lambda: make("CLIPVisionModel", **SIZE, **IMAGE),
}
VIDEOS: dict[str, Callable[[], Any]] = {
    "VideoMAE": lambda: make("VideoMAEModel", **SIZE, **IMAGE, num_frames=12),
    "ViViT": lambda: make("VivitModel", **SIZE, image_size=16, num_frames=12, tubelet_size=[2, 8, 8]),
}
MODELS = IMAGES | VIDEOS


def clip(name: str) -> Tensor:
    """Two videos of 6 frames, or of 12 in tubelets of 2, as the model takes them."""
    shape = (2 * 6, 3, 16, 16) if name in IMAGES else (2, 12, 3, 16, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(model: Any, *args: Any, **inputs: Any) -> list[Tensor]:
    model.zero_grad()
    out = model(*args, **inputs)[0]
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def attend(*args: Any, **options: Any) -> Tensor:
    """What a layer gets from "vattn": ``(B, Lq, H, D)``."""
    interface = transformers.AttentionInterface().get_interface(DENSE, None)
    return interface(*args, **options)[0]


class Layer(nn.Module):
    """A layer that calls the interface, as far as the interface looks at it."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.is_causal = is_causal


class TestDense:
    """ "vattn" is the attention that the models have."""

    @pytest.mark.parametrize("name", MODELS)
    def test_equals_the_stock_model(self, name: str) -> None:
        model = MODELS[name]()
        stock = outputs_and_gradients(model, clip(name))
        model.set_attn_implementation(DENSE)
        torch.testing.assert_close(outputs_and_gradients(model, clip(name)), stock, rtol=1e-5, atol=1e-5)

    def test_compiles_as_one_graph(self) -> None:
        model, video = VIDEOS["VideoMAE"](), clip("VideoMAE")
        model.set_attn_implementation(DENSE)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(video)[0], model(video)[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_padding_at_the_end(self, compiled: bool) -> None:
        model = make("BertModel", **TEXT)
        tokens, mask = torch.randint(1, 50, (3, 7)), torch.arange(7) < torch.tensor([[7], [2], [5]])
        stock = outputs_and_gradients(model, tokens, attention_mask=mask)
        model.set_attn_implementation(DENSE)
        call: Any = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        found = outputs_and_gradients(call, tokens, attention_mask=mask)
        torch.testing.assert_close(found, stock, rtol=1e-5, atol=1e-5)
        if compiled:
            with pytest.raises(RuntimeError, match=r"^Runtime assertion failed for expression"):
                call(tokens, attention_mask=mask.flip(1))

    def test_causal_text_with_padding_at_the_end(self) -> None:
        model = make("CLIPTextModel", **TEXT)
        tokens, mask = torch.randint(1, 49, (3, 7)), torch.arange(7) < torch.tensor([[7], [2], [5]])
        stock = model(tokens, attention_mask=mask)[0][mask]
        model.set_attn_implementation(DENSE)
        torch.testing.assert_close(model(tokens, attention_mask=mask)[0][mask], stock, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("key_heads", [1, 2, 4])
    def test_a_language_model_with_fewer_heads_of_keys(self, key_heads: int) -> None:
        model = make("LlamaForCausalLM", **TEXT | {"num_attention_heads": 4}, num_key_value_heads=key_heads)
        tokens = torch.randint(1, 49, (2, 70))
        stock = outputs_and_gradients(model, tokens[:, :20])
        text = model.generate(tokens[:, :5], max_new_tokens=6, do_sample=False)
        model.set_attn_implementation(DENSE)
        torch.testing.assert_close(outputs_and_gradients(model, tokens[:, :20]), stock, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(tokens[:, :5], max_new_tokens=6, do_sample=False), text)

    @pytest.mark.parametrize("lengths", [None, torch.tensor([3, 0])], ids=["all keys", "some keys"])
    @pytest.mark.parametrize("groups", [1, 3])
    @pytest.mark.parametrize(("queries", "keys", "causal"), [(5, 9, False), (1, 9, True), (130, 130, True)])
    def test_operator(self, queries: int, keys: int, causal: bool, groups: int, lengths: Tensor | None) -> None:
        query = torch.randn(2, queries, 6, 8).transpose(1, 2).requires_grad_()
        key, value = (torch.randn(2, 6 // groups, keys, 8, requires_grad=True) for _ in range(2))
        mask = None if lengths is None else (torch.arange(keys) < lengths[:, None])[:, None, None]
        all_keys, all_values = (x.repeat_interleave(groups, 1) for x in (key, value))
        is_causal = causal and queries > 1 and lengths is None
        expected = F.scaled_dot_product_attention(
            query, all_keys, all_values, attn_mask=mask, scale=0.3, is_causal=is_causal
        )
        expected = expected.transpose(1, 2).nan_to_num()
        out = attend(Layer(causal), query, key, value, lengths, scaling=0.3, dropout=0.0)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        weights = torch.randn_like(out)
        grads, expected_grads = (torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (out, expected))
        torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-5)

    def test_dropout_is_that_of_training(self) -> None:
        model = make("ViTModel", **SIZE, **IMAGE, attention_probs_dropout_prob=1.0)
        model.set_attn_implementation(DENSE)
        assert attention_layers(model.train())[0](torch.randn(1, 4, 16))[0].var(1).abs().max() < 1e-10
        assert attention_layers(model.eval())[0](torch.randn(1, 4, 16))[0].var(1).abs().max() > 1e-4


LEFT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


class TestDenseRefuses:
    """What "vattn" cannot compute is refused by name."""

    @pytest.mark.parametrize(
        ("name", "more", "inputs", "message"),
        [
            ("BertModel", {}, {"attention_mask": LEFT}, "attention_mask must be ones, then zeros"),
            ("LlamaModel", {}, {"attention_mask": LEFT}, "attention_mask must be ones, then zeros"),
            ("BertModel", {}, {"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask must .*\(2, 1, 4, 4\)$"),
            ("MistralModel", {"sliding_window": 2}, {}, "mask_function must be causal, .*got mask_function="),
            ("BertModel", {}, {"output_attentions": True}, "got output_attentions=True$"),
        ],
    )  # fmt: skip
    def test_models(self, name: str, more: dict[str, Any], inputs: dict[str, Any], message: str) -> None:
        model = make(name, **TEXT | more)
        model.set_attn_implementation(DENSE)
        with pytest.raises(ValueError, match=f"^vattn: .*{message}"):
            model(torch.randint(1, 49, (2, 4)), **inputs)

    def test_caches(self) -> None:
        model = make("LlamaForCausalLM", **TEXT)
        model.set_attn_implementation(DENSE)
        tokens = torch.randint(1, 49, (1, 4))
        message = r"^vattn: causal attention must be of all tokens, or of one after a cache that grows, got "
        with pytest.raises(ValueError, match=f"{message}q_length=4, kv_length=6$"):
            model.generate(tokens, max_new_tokens=3, cache_implementation="static")
        cache = model(tokens, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"{message}q_length=2, kv_length=6$"):
            model(tokens[:, :2], past_key_values=cache)

    def test_operator(self) -> None:
        query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
        with pytest.raises(ValueError, match=r"^vattn: key must .* query \(3\) .*, got key.shape=\(1, 2, 5, 4\)$"):
            attend(Layer(is_causal=True), query, key, key, None)
        with pytest.raises(ValueError, match=r"^vattn: attention must have no options .* got softcap, s_aux$"):
            attend(Layer(), query, key, key, None, softcap=30.0, s_aux=torch.zeros(2), sliding_window=None)
        with pytest.raises(ValueError, match=r"^latent_attention: head_dim must be between 1 and 256"):
            attend(Layer(), *[torch.zeros(1, 1, 2, 300)] * 3, None)


def masked(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: object, scaling: float, **__: object) -> Any:
    """Leap attention as a mask for PyTorch's, from its definition frame by frame."""
    part = module.vattn_leap
    rows, heads = query.shape[:2]
    T, G = part.num_frames, part.num_global
    if part.tokens_per_frame is None:  # (B * T, H, N, D) to (B, H, T * N, D)
        query, key, value = (x.unflatten(0, (-1, T)).transpose(1, 2).flatten(2, 3) for x in (query, key, value))
    N = (query.shape[2] - G) // T
    reads = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        span = part.leap * part.group_size
        base = t // span * span + t % part.leap
        reads[t, [s for s in range(base, base + span, part.leap) if s < T]] = True
    mask = F.pad(reads.repeat_interleave(N, 0).repeat_interleave(N, 1), (G, 0, G, 0), value=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    frames = out[:, :, G:].unflatten(2, (T, N))
    frames = reference.periodic_shift(frames, part.fold_div) if part.fold_div > 0 else frames
    if part.tokens_per_frame is None:
        return frames.permute(0, 2, 3, 1, 4).reshape(rows, N, heads, -1), None
    return torch.cat([out[:, :, :G], frames.flatten(2, 3)], 2).transpose(1, 2), None


class TestLeap:
    """ "vattn_leap" is the attention that a mask of the leap groups gives."""

    @pytest.mark.parametrize(
        "settings", [{}, {"levels": (None, 1, 2), "group_size": 3, "fold_div": 4}], ids=["pairs", "threes, shifted"]
    )
    @pytest.mark.parametrize("name", MODELS)
    def test_equals_the_masked_model(self, name: str, settings: dict[str, Any]) -> None:
        model = MODELS[name]()
        names = list(model.state_dict())
        set_leap_attention(model, num_frames=6 if name in IMAGES else None, **{"levels": (1, 2)} | settings)
        assert list(model.state_dict()) == names
        found = outputs_and_gradients(model, clip(name))
        transformers.AttentionInterface.register("masked", masked)
        model.set_attn_implementation("masked")
        expected = outputs_and_gradients(model, clip(name))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        model.set_attn_implementation("sdpa")
        assert not torch.allclose(model(clip(name))[0], found[0], atol=1e-3)

    @pytest.mark.parametrize("name", ["DINOv3", "VideoMAE", "ViViT"])
    def test_compiles_as_one_graph(self, name: str) -> None:
        model = MODELS[name]()
        set_leap_attention(model, num_frames=6 if name in IMAGES else None, levels=(1, 2), fold_div=4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(clip(name))[0], model(clip(name))[0], rtol=1e-5, atol=1e-5)

    def test_layers_have_levels_and_the_mode(self) -> None:
        model = VIDEOS["VideoMAE"]().train()
        set_leap_attention(model, levels=(1, None))
        parts: list[Any] = [module for module in model.modules() if isinstance(module, LeapOfLayer)]
        assert [(part.leap, part.group_size) for part in parts] == [(3, 2), (1, 1)]
        assert all(part.training for part in parts)
        assert "leap=3" in repr(model)

    def test_dropout_is_that_of_training(self) -> None:
        model = make("ViTModel", **SIZE, **IMAGE, attention_probs_dropout_prob=1.0)
        set_leap_attention(model, num_frames=2, levels=(1,))
        assert attention_layers(model.train())[0](torch.randn(2, 4, 16))[0].var(1).abs().max() < 1e-10
        assert attention_layers(model.eval())[0](torch.randn(2, 4, 16))[0].var(1).abs().max() > 1e-4

    @pytest.mark.parametrize("name", ["SigLIP", "VideoMAE"])
    def test_settings_are_saved_with_the_model(self, name: str, tmp_path: pathlib.Path) -> None:
        model, video = MODELS[name](), clip(name)
        set_leap_attention(model, num_frames=6 if name in IMAGES else None, levels=(2, None, 1), fold_div=2)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert not torch.allclose(loaded(video)[0], model(video)[0], atol=1e-3)
        set_leap_attention(loaded)
        assert torch.equal(loaded(video)[0], model(video)[0])
        set_leap_attention(loaded, fold_div=0)
        assert loaded.config.vattn_leap["levels"] == [2, None, 1]
        assert loaded.config.vattn_leap["fold_div"] == 0

    def test_the_vision_part_of_a_pair(self) -> None:
        part = {**SIZE, **IMAGE}
        model = make("SiglipForImageClassification", vision_config=part, text_config=TEXT, num_labels=3)
        set_leap_attention(model, num_frames=6, levels=(1, 2))
        found = model(clip("SigLIP"))[0]
        set_leap_attention(model.vision_model, num_frames=6, levels=(1, 2))
        assert torch.equal(model(clip("SigLIP"))[0], found)
        assert model.config.vision_config.vattn_leap["num_frames"] == 6


class TestLeapRefuses:
    """What cannot leap is refused by name."""

    @pytest.mark.parametrize(
        ("name", "config", "message"),
        [
            ("BertModel", TEXT, "model must be a model of images, got model=BertModel, which takes input_ids$"),
            ("TimesformerModel", SIZE | IMAGE, "model must have attention layers that use .*TimesformerModel with 0 "),
            ("BeitModel", SIZE | IMAGE | {"use_relative_position_bias": True}, "model must have no relative pos"),
            ("SwinModel", {"embed_dim": 16, "depths": [1], "num_heads": [2]} | IMAGE, "model must have no relative"),
            ("CLIPModel", {"vision_config": SIZE | IMAGE, "text_config": TEXT},
             "model must be a model of images, got model=CLIPModel, which takes input_ids$"),
            ("XCLIPVisionModel", SIZE | IMAGE | {"mit_hidden_size": 16, "mit_num_attention_heads": 2},
             "a model of videos must be one of videomae, vivit, got model=XCLIPVisionModel, which has num_frames$"),
            ("VideoMAEForPreTraining", SIZE | IMAGE | {"decoder_hidden_size": 12, "decoder_num_attention_heads": 2,
                                                       "decoder_num_hidden_layers": 1},
             "model must have .* of one configuration, got VideoMAEForPreTraining with 2 configurations"),
        ],
    )  # fmt: skip
    def test_models(self, name: str, config: dict[str, Any], message: str) -> None:
        model = make(name, **config)
        before = copy.deepcopy(model.config.to_dict())
        with pytest.raises(ValueError, match=f"^set_leap_attention: {message}"):
            set_leap_attention(model, num_frames=4, levels=(1,))
        assert model.config.to_dict() == before

    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("ViT", {}, "set_leap_attention: num_frames must be given for a model of images"),
            ("ViT", {"num_frames": 0}, "set_leap_attention: num_frames must be at least 1, got num_frames=0"),
            ("VideoMAE", {"num_frames": 4}, r"set_leap_attention: num_frames must be that of the configuration \(12\)"),
            ("VideoMAE", {"levels": (3,)}, r"set_leap_attention: num_frames // 2\*\*level must be at least 1"),
            ("VideoMAE", {"levels": ()}, "set_leap_attention: levels must have at least one element"),
            ("VideoMAE", {"levels": 1}, "set_leap_attention: levels must be a list or tuple of ints or None"),
            ("VideoMAE", {"levels": (1,), "group_size": 0}, "set_leap_attention: group_size must be at least 1"),
            ("VideoMAE", {"levels": (1,), "fold_div": -1}, "set_leap_attention: fold_div must be at least 0"),
        ],
    )
    def test_settings(self, name: str, settings: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            set_leap_attention(MODELS[name](), **settings)
        with pytest.raises(TypeError, match=r"^set_leap_attention: model must be a PreTrainedModel .*model=Linear$"):
            set_leap_attention(nn.Linear(1, 1))

    def test_calls(self) -> None:
        model = VIDEOS["ViViT"]()
        model.set_attn_implementation("vattn_leap")
        with pytest.raises(ValueError, match=r"^vattn_leap: a layer must have its settings .* VivitAttention without$"):
            model(clip("ViViT"))
        set_leap_attention(model, levels=(1,))
        with pytest.raises(ValueError, match=r"^vattn_leap: .* no masks .*, got attention_mask.shape=\(2, 25\)$"):
            model(clip("ViViT"), attention_mask=torch.ones(2, 25))
        with pytest.raises(ValueError, match=r"^vattn_leap: .* must have no options .*got attention_mask$"):
            model(clip("ViViT"), attention_mask=torch.ones(2, 1, 25, 25))

    def test_numbers_of_tokens(self) -> None:
        model = VIDEOS["VideoMAE"]()
        set_leap_attention(model, levels=(1,))
        some = (torch.arange(24) % 2 == 1).expand(2, 24)
        with pytest.raises(
            ValueError,
            match=r"^vattn_leap: query must have 24 tokens, 0 global ones and 6 frames of 4, got query.shape",
        ):
            model(clip("VideoMAE"), bool_masked_pos=some)
        image = IMAGES["ViT"]()
        set_leap_attention(image, num_frames=5, levels=(1,))
        with pytest.raises(ValueError, match=r"^attend_frames: the batch must be a multiple of num_frames=5"):
            image(clip("ViT"))

    def test_a_sequence_over_ranks(self) -> None:
        with pytest.raises(ValueError, match=r"^parallelize: leap attention over ranks must have its frames in"):
            LeapOfLayer(4, 2, 2, 0, tokens_per_frame=3)._refuse(None)
        LeapOfLayer(4, 2, 2, 0)._refuse(None)


@pytest.mark.parametrize("name", IMAGES)
def test_video_from_image_takes_what_the_interface_takes(name: str) -> None:
    image = IMAGES[name]()
    model = video_from_image(image, 6, levels=(1, 2), fold_div=4)
    assert {id(p) for p in model.parameters()} == {id(p) for p in image.parameters()}
    video = clip(name).unflatten(0, (2, 6))
    set_leap_attention(image, num_frames=6, levels=(1, 2), fold_div=4)
    frames = image(clip(name))[0].unflatten(0, (2, 6))
    assert torch.equal(model.forward_frames(video), frames)
    torch.testing.assert_close(model(video), frames.mean(1))
