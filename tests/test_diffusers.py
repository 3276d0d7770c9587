"""set_attention: the patterns of vattn in transformers of diffusers, against their own processors."""

import copy
import math
from types import SimpleNamespace

import diffusers
import pytest
import torch

import vattn
from tests.fifo_transformers import CASES, TEXT, TEXT_MASK, Case, configuration, ltx_call, plain_call
from tests.utils import assert_close
from vattn import BlockLayout
from vattn.integrations.diffusers import Axial, Dense, Leap, Pattern, Sparse, set_attention
from vattn.models.fifo import adapt

LATTE = configuration(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=24,
    attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
    norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=8, video_length=5,
)  # fmt: skip
MODELS = {
    "Wan": CASES["WanTransformer3DModel"],
    "SkyReels": CASES["SkyReelsV2Transformer3DModel"],
    "LTX": CASES["LTXVideoTransformer3DModel"],
    "Latte": Case("LatteTransformer3DModel", LATTE, plain_call),
}
every_model = pytest.mark.parametrize("name", MODELS)


def local(grid):
    """Blocks of 3 tokens, of which each reads itself and one drawn for the grid."""
    generator = torch.Generator().manual_seed(math.prod(grid))
    return BlockLayout.local_random(math.prod(grid), 3, num_random=1, num_global=0, generator=generator)


def same_group(grid, pattern):
    """The frames of a leap group, by the formula of the paper."""
    stride = pattern.leap * pattern.group_size
    frame = torch.arange(math.prod(grid)) // (grid[1] * grid[2])
    group = frame // stride * stride + frame % pattern.leap
    return group[:, None] == group


def same_line(grid, pattern):
    """Tokens that differ in one coordinate only."""
    places = torch.stack(torch.unravel_index(torch.arange(math.prod(grid)), grid))
    differs = places[:, :, None] != places[:, None]
    differs[pattern.dim] = False
    return ~differs.any(0)


PATTERNS = {
    "leap 2": (Leap(2), same_group),
    "leap 1 x 3": (Leap(1, group_size=3), same_group),
    "time": (Axial(0), same_line),
    "column": (Axial(1), same_line),
    "row": (Axial(2), same_line),
    "sparse": (Sparse(local), lambda grid, pattern: pattern.layout(grid).to_mask()),
}


def video(frames=5, height=4, width=6):
    return torch.randn(2, 4, frames, height, width, generator=torch.Generator().manual_seed(1))


def call(case, model, latents=None, **conditions):
    latents = video() if latents is None else latents
    return case.scalar_call(model, latents, torch.tensor([700.0, 12.0]), {**case.conditions, **conditions})


def grid_of(name, layer="attn1", latents=None):
    """The grid of tokens that a layer sees."""
    frames, height, width = (video() if latents is None else latents).shape[2:]
    if name != "LTX":
        height, width = height // 2, width // 2
    if name == "Latte":
        return (frames, 1, 1) if layer.startswith("temporal") else (1, height, width)
    return frames, height, width


class Masked:
    """The processor of a layer, given a mask among tokens of the video."""

    def __init__(self, own, mask):
        self.own, self.mask = own, mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        many = len(hidden_states)
        mask = self.mask if attn.norm_q is not None and not isinstance(attn, LTX_ATTENTION) else self.mask.expand(many, -1, -1)
        rotary = [] if rotary_emb is None else [rotary_emb]
        return self.own(attn, hidden_states, None, mask, *rotary)


LTX_ATTENTION = type(MODELS["LTX"].model().transformer_blocks[0].attn1)


def set_masks(name, model, pattern, mask_of, latents=None):
    """The reference: the model's own attention with the mask of `pattern`."""
    for layer, module in model.named_modules():
        if layer.endswith("attn1"):
            module.set_processor(Masked(module.processor, mask_of(grid_of(name, layer, latents), pattern)))


def output_and_gradients(case, model, **conditions):
    """By the name of the parameter, and of what the model gives."""
    model.zero_grad()
    out = call(case, model, **conditions)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    return {"output": out.detach()} | copy.deepcopy(grads)


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(actual[key], value, tolerance * max(1.0, float(value.abs().max())), key)


# What the models compute


@every_model
def test_dense_is_the_model_itself(name):
    case = MODELS[name]
    model = case.model(num_layers=2)
    expected = output_and_gradients(case, model)
    set_attention(model, Dense())
    assert_same(output_and_gradients(case, model), expected)


@every_model
@pytest.mark.parametrize("kind", PATTERNS)
def test_a_pattern_is_the_model_with_a_mask(name, kind):
    case, (pattern, mask_of) = MODELS[name], PATTERNS[kind]
    model, reference = case.model(num_layers=2), case.model(num_layers=2)
    set_masks(name, reference, pattern, mask_of)
    set_attention(model, pattern)
    assert_same(output_and_gradients(case, model), output_and_gradients(case, reference))
