"""set_attention: the patterns of vattn in transformers of diffusers, against their own processors."""

import copy
import math
from types import SimpleNamespace

import diffusers
import pytest
import torch

import vattn
from tests.fifo_transformers import CASES, TEXT, TEXT_MASK, Case, configuration, plain_call
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
WITH_HEADS = ("Wan", "SkyReels")  # their masks have an axis for heads
every_model = pytest.mark.parametrize("name", MODELS)


def local(grid):
    """Blocks of 3 tokens, of which each reads itself and one drawn for the grid."""
    generator = torch.Generator().manual_seed(math.prod(grid))
    return BlockLayout.local_random(math.prod(grid), 3, num_random=1, num_global=0, generator=generator)


def tiles(grid):
    """Tiles of up to 2 x 2 x 2 tokens, which are not consecutive: what windows of up to 3 x 3 x 3 touch."""
    window, tile = (tuple(min(size, most) for size in grid) for most in (3, 2))
    return BlockLayout.neighborhood(grid, window, tile=tile)


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
    "tiles": (Sparse(tiles), lambda grid, pattern: pattern.layout(grid).to_mask()),
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
    """The own processor of a layer, given a mask among tokens of the video."""

    def __init__(self, own, mask):
        self.own, self.mask = own, mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *rotary):
        return self.own(attn, hidden_states, None, self.mask.expand(len(hidden_states), *self.mask.shape[1:]), *rotary)


def set_masks(name, model, pattern, mask_of, latents=None):
    """The reference: the model's own attention with the mask of `pattern`."""
    for layer, module in model.named_modules():
        if layer.endswith("attn1"):
            mask = mask_of(grid_of(name, layer, latents), pattern)
            module.set_processor(Masked(module.processor, mask[None, None] if name in WITH_HEADS else mask[None]))


def output_and_gradients(case, model, latents=None, **conditions):
    """By the name of the parameter, and of what the model gives."""
    model.zero_grad()
    out = call(case, model, latents, **conditions)
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


# Text and images


MASKS = {
    "at the end": TEXT_MASK,
    "anywhere": torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 1]]),
    "everything": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_text_of_ltx_is_not_read(mask):
    case = MODELS["LTX"]
    model = case.model(num_layers=2)
    expected = output_and_gradients(case, model, encoder_attention_mask=mask)
    set_attention(model, Dense())
    # Where all is masked, the scores of the model itself are rounded to thousandths: it adds -10000 to them.
    tolerance = 1e-5 if mask.any(1).all() else 2e-3
    for dtype in (torch.int64, torch.bool):
        assert_same(output_and_gradients(case, model, encoder_attention_mask=mask.to(dtype)), expected, tolerance)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_text_of_latte_is_not_read(mask):
    """Its own processor takes a mask for each frame only."""
    case = MODELS["Latte"]
    model = case.model(num_layers=2)
    expected = output_and_gradients(case, model, encoder_attention_mask=mask.bool().repeat_interleave(5, 0))
    set_attention(model, Dense())
    for given in (mask, mask.bool(), mask.bool().repeat_interleave(5, 0)):
        assert_same(output_and_gradients(case, model, encoder_attention_mask=given), expected)


@pytest.mark.parametrize("name", WITH_HEADS)
@pytest.mark.parametrize("fused", [False, True], ids=["as loaded", "fused"])
def test_an_image_is_read_beside_the_text(name, fused):
    case = MODELS[name]
    model = case.model(image_dim=8, added_kv_proj_dim=24)
    if fused:
        model.fuse_qkv_projections()
    draws = torch.Generator().manual_seed(2)
    text, image = torch.randn(2, 512, 8, generator=draws), torch.randn(2, 7, 8, generator=draws)
    conditions = {"encoder_hidden_states": text, "encoder_hidden_states_image": image}
    expected = output_and_gradients(case, model, **conditions)
    set_attention(model, Dense())
    assert_same(output_and_gradients(case, model, **conditions), expected)
    with pytest.raises(ValueError, match="512 tokens of text"):
        call(case, model, encoder_hidden_states=text[:, :500], encoder_hidden_states_image=image)


@pytest.mark.parametrize("name", ["Wan", "SkyReels", "LTX"])
def test_projections_are_those_that_the_model_uses_after_fusing(name):
    """LTX fuses them without using what it has fused."""
    case = MODELS[name]
    model = case.model()
    model.fuse_qkv_projections()
    with torch.no_grad():
        for layer, module in model.named_modules():
            if layer.endswith(("to_q", "to_qkv")):
                module.weight *= 1.5 if layer.endswith("to_q") else 2.0
    expected = output_and_gradients(case, model)
    set_attention(model, Dense())
    assert_same(output_and_gradients(case, model), expected)


# Blocks of frames that are causal


def test_skyreels_stays_causal_among_blocks_of_frames():
    case, latents = MODELS["SkyReels"], video(frames=6)
    model, reference = (case.model(num_layers=2, num_frame_per_block=2) for _ in range(2))
    expected = call(case, reference, latents)
    with set_attention(model, Dense()):
        assert_close(call(case, model, latents), expected, 1e-5)
    assert_close(call(case, model, latents), expected, 0)

    frame = torch.arange(36) // 6
    past = frame[:, None] // 2 >= frame // 2
    for layout in (local, tiles):
        masked = copy.deepcopy(reference)
        mask = past & layout((6, 2, 3)).to_mask()
        set_masks("SkyReels", masked, None, lambda grid, _, mask=mask: mask, latents)
        with set_attention(model, Sparse(layout)):
            assert_close(call(case, model, latents), call(case, masked, latents), 1e-5)
    with set_attention(model, Leap(2)), pytest.raises(ValueError, match="got num_frame_per_block=2"):
        call(case, model, latents)
    with_global = Sparse(BlockLayout.dense(35, 5, num_global=1))
    with set_attention(model, with_global), pytest.raises(ValueError, match=r"got layout.num_global=1"):
        call(case, model, latents)


# Grids


@every_model
def test_the_grid_is_that_of_each_call(name):
    case = MODELS[name]
    model, reference = case.model(), case.model()
    pattern, mask_of = PATTERNS["sparse"]
    setting = set_attention(model, pattern)
    for latents in (video(height=4, width=6), video(height=6, width=4), video(height=2, width=2)):
        with_masks = copy.deepcopy(reference)
        set_masks(name, with_masks, pattern, mask_of, latents)
        assert_close(call(case, model, latents), call(case, with_masks, latents), 1e-5)
        assert math.prod(setting.grid) == math.prod(grid_of("LTX" if name == "LTX" else "Wan", latents=latents))


def test_a_layout_is_made_once_for_each_grid():
    made = []

    def layout(grid):
        made.append(grid)
        return local(grid)

    case = MODELS["Wan"]
    model = case.model(num_layers=2)
    set_attention(model, Sparse(layout))
    for height in (4, 4, 6):
        call(case, model, video(height=height))
    assert made == [(5, 2, 3), (5, 3, 3)]


def test_a_copy_of_a_model_has_a_grid_of_its_own():
    case = MODELS["Wan"]
    model = case.model()
    setting = set_attention(model, Leap(2))
    copied = copy.deepcopy(model)
    assert_close(call(case, copied, video(height=6)), call(case, model, video(height=6)), 0)
    call(case, copied, video(height=2))
    assert setting.grid == (5, 3, 3)


# Training


def test_a_layout_made_without_values_or_gradients_serves_later():
    """An export has tensors without values, and what inference mode makes is refused by autograd."""
    case = MODELS["Wan"]
    expected = output_and_gradients(case, case.model())
    arguments = {"hidden_states": video(), "timestep": torch.tensor([700.0, 12.0]), "return_dict": False}
    model = case.model()
    set_attention(model, Sparse(lambda grid: BlockLayout.dense(math.prod(grid), 3)))
    program = torch.export.export(model, (), {**arguments, **case.conditions}, strict=False).module()
    with torch.inference_mode():
        call(case, model, video(height=6))
    assert_same(output_and_gradients(case, model), expected)
    assert_close(program(**arguments, **case.conditions)[0], expected["output"], 1e-5)
    output_and_gradients(case, model, latents=video(height=6))


@pytest.mark.parametrize("name", ["Wan", "LTX"])
def test_recomputed_blocks_have_the_same_gradients(name):
    case = MODELS[name]
    model = case.model(num_layers=2).train()
    set_attention(model, Leap(2))
    expected = output_and_gradients(case, model)
    model.enable_gradient_checkpointing()
    assert_same(output_and_gradients(case, model), expected, 1e-6)


def test_projections_may_be_replaced():
    """As PEFT does for LoRA: the gradient arrives at the weights of low rank, and of the frozen ones nowhere."""
    case = MODELS["Wan"]
    model = case.model().requires_grad_(False)
    set_attention(model, Leap(2))
    before = call(case, model)
    attn = model.blocks[0].attn1
    attn.to_k = LowRank(attn.to_k)
    out = call(case, model)
    assert_close(out, before, 0)
    out.square().sum().backward()
    assert attn.to_k.up.weight.grad.abs().max() > 0
    assert all(x.grad is None for key, x in model.named_parameters() if ".up." not in key and ".down." not in key)


class LowRank(torch.nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own = own
        self.down = torch.nn.Linear(own.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, own.out_features, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.own(x) + self.up(self.down(x))


@every_model
@torch.no_grad()
def test_in_bfloat16_the_error_is_that_of_the_model(name):
    case = MODELS[name]
    truth = call(case, case.model())
    model = case.model().to(torch.bfloat16)
    conditions = {"encoder_hidden_states": TEXT.bfloat16()}
    own = call(case, model, video().bfloat16(), **conditions)
    set_attention(model, Dense())
    ours = call(case, model, video().bfloat16(), **conditions)
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().max() <= 2 * (own - truth).abs().max()


# One graph


def compiled(function, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("SkyReels", "time"), ("LTX", "leap 2"), ("Latte", "tiles")])
@torch.no_grad()
def test_a_model_is_one_graph(name, kind):
    """With the code around it, too: the hook that reads the grid is traced."""
    case = MODELS[name]
    model = case.model()
    setting = set_attention(model, PATTERNS[kind][0])
    expected, setting.grid = call(case, model), None
    assert_close(compiled(lambda latents: call(case, model, latents))(video()), expected, 1e-5)
    assert math.prod(setting.grid) > 0


@pytest.mark.slow
@torch.no_grad()
def test_each_pattern_has_one_graph_and_each_grid_of_a_layout():
    graphs = []

    def backend(graph, inputs):
        if any(
            "attention" in str(node.target) for node in graph.graph.nodes
        ):  # not that of the hook, which has sizes only
            graphs.append(graph)
        return graph.forward

    case = MODELS["Wan"]
    model, patterns = case.model(), (Dense(), Sparse(local))
    fast = compiled(model, backend)
    for pattern in (*patterns, *patterns):
        set_attention(model, pattern)
        assert_close(call(case, fast), call(case, model), 1e-5)
    assert len(graphs) == 2
    assert_close(call(case, fast, video(height=6)), call(case, model, video(height=6)), 1e-5)
    assert len(graphs) == 3


@pytest.mark.slow
def test_gradients_of_one_graph():
    case = MODELS["Wan"]
    model = case.model()
    set_attention(model, Leap(2))
    expected = output_and_gradients(case, model)
    actual = output_and_gradients(case, compiled(model, "aot_eager"))
    assert_same({key.removeprefix("_orig_mod."): value for key, value in actual.items()}, expected)


# What is set


def test_layers_may_have_patterns_of_their_own():
    case = MODELS["Wan"]
    model, reference = case.model(num_layers=3), case.model(num_layers=3)
    leap, mask_of = PATTERNS["leap 2"]
    own = reference.blocks[1].attn1.processor
    set_masks("Wan", reference, leap, mask_of)
    reference.blocks[1].attn1.set_processor(own)
    expected = call(case, reference)

    chosen = {"blocks.0.attn1": leap, "blocks.2.attn1": leap, "blocks.1.attn1": None}
    for pattern in (chosen, chosen.get):
        setting = set_attention(model, pattern)
        assert setting.patterns == {"blocks.0.attn1": leap, "blocks.2.attn1": leap}
        assert_close(call(case, model), expected, 1e-5)


def test_a_pattern_may_be_ones_own():
    class EveryOther(Pattern):
        def attend(self, query, key, value, grid):
            return vattn.latent_attention(query, key[:, :, ::2], value[:, :, ::2])

    case = MODELS["Wan"]
    model, reference = case.model(), case.model()
    set_masks("Wan", reference, None, lambda grid, _: (torch.arange(30) % 2 == 0).expand(30, 30))
    set_attention(model, EveryOther())
    assert_close(call(case, model), call(case, reference), 1e-5)


@every_model
def test_the_model_gets_its_own_back(name):
    case = MODELS[name]
    model = case.model(num_layers=2)
    own = {layer: module.processor for layer, module in model.named_modules() if hasattr(module, "processor")}

    def changed():
        return {layer for layer, processor in own.items() if model.get_submodule(layer).processor is not processor}

    first = set_attention(model, Dense())
    assert changed() == set(own)
    second = set_attention(model, Leap(2), cross_attention=False)
    assert changed() == {layer for layer in own if layer.endswith("attn1")}
    first.remove()  # what it had set is not there any more
    assert changed() == {layer for layer in own if layer.endswith("attn1")}
    second.remove()
    assert changed() == set() and not model._forward_pre_hooks
    with pytest.raises(ZeroDivisionError), set_attention(model, Dense()):
        1 / 0  # noqa: B018
    assert changed() == set()


@torch.no_grad()
def test_fifo_generates_with_it():
    case, timesteps = MODELS["Wan"], torch.tensor([[900.0, 500.0, 100.0, 50.0, 1.0]]).repeat(2, 1)
    model, reference = case.model(), case.model()
    set_masks("Wan", reference, *PATTERNS["leap 2"])
    set_attention(model, PATTERNS["leap 2"][0])
    actual, expected = (adapt(x)(video(), timesteps, **case.conditions) for x in (model, reference))
    assert_close(actual, expected, 1e-5)


# What is refused


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"LTXVideoTransformer3DModel, SkyReels.* got model=CosmosTransformer3DModel"):
        set_attention(CASES["CosmosTransformer3DModel"].model(), Dense())
    pipeline = SimpleNamespace(transformer=MODELS["Wan"].model())
    with pytest.raises(TypeError, match="a pipeline: give set_attention its transformer"):
        set_attention(pipeline, Dense())


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        (Dense, TypeError, "a Pattern such as Dense"),
        ("leap", TypeError, "got pattern='leap'"),
        (
            {"blocks.7.attn1": Dense()},
            ValueError,
            r"layers of the model \(blocks.0.attn1\), got pattern={'blocks.7.attn1': ...}",
        ),
        ({"blocks.0.attn2": Dense()}, ValueError, r"got pattern={'blocks.0.attn2'"),
        (lambda name: "dense", TypeError, r"pattern must have a Pattern .*, got pattern\['blocks.0.attn1'\]='dense'"),
    ],
    ids=["a class", "a string", "no such layer", "attends to text", "gives a string"],
)
def test_what_is_no_pattern_is_refused(pattern, error, message):
    model = MODELS["Wan"].model()
    setting = set_attention(model, Leap(2))
    with pytest.raises(error, match=message):
        set_attention(model, pattern)
    assert model.blocks[0].attn1.processor.setting is setting  # nothing has changed


@pytest.mark.parametrize(
    ("pattern", "settings", "error", "message"),
    [
        (Leap, (0,), ValueError, "Leap: leap must be at least 1, got leap=0"),
        (Leap, (2, 1.5), TypeError, "Leap: group_size must be an int"),
        (Axial, (3,), ValueError, "got dim=3"),
        (Axial, ("time",), TypeError, "Axial: dim must be an int"),
        (Sparse, (torch.ones(4, 4),), TypeError, "Sparse: layout must be a BlockLayout or a function"),
    ],
)
def test_settings_of_patterns_are_checked(pattern, settings, error, message):
    with pytest.raises(error, match=message):
        pattern(*settings)


def test_sizes_that_do_not_fit_are_refused():
    case = MODELS["Wan"]
    model = case.model()
    with set_attention(model, Sparse(BlockLayout.dense(29, 3))), pytest.raises(ValueError, match=r"\(0 \+ 29\)"):
        call(case, model)
    with set_attention(model, Sparse(lambda grid: grid)), pytest.raises(TypeError, match=r"layout\(5, 2, 3\)"):
        call(case, model)

    model = MODELS["LTX"].model()
    inputs = {"encoder_hidden_states": TEXT, "timestep": torch.tensor([1.0, 2.0]), "encoder_attention_mask": None}
    set_attention(model, Leap(2))
    with pytest.raises(ValueError, match="num_frames, height and width must be given"):
        model(torch.randn(2, 24, 4), video_coords=torch.rand(2, 3, 24), **inputs)
    with pytest.raises(ValueError, match=r"the grid \(2, 3, 4\), got hidden_states with tokens=25"):
        model(torch.randn(2, 25, 4), video_coords=torch.rand(2, 3, 25), num_frames=2, height=3, width=4, **inputs)
    set_attention(model, Dense())  # needs no grid
    assert model(torch.randn(2, 25, 4), video_coords=torch.rand(2, 3, 25), **inputs).sample.shape == (2, 25, 4)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.zeros(2, 1, 5), r"shape=\(2, 1, 5\)"),
        (torch.full((2, 5), 0.5), "dtype=torch.float32"),
        (torch.full((2, 5), 2), "encoder_attention_mask=2"),
    ],
    ids=["biases", "fractions", "other numbers"],
)
def test_masks_of_text_that_are_none_are_refused(mask, got):
    case = MODELS["LTX"]
    model = case.model()
    setting = set_attention(model, Leap(2))
    with pytest.raises(ValueError, match=f"LTXVideoTransformer3DModel: encoder_attention_mask .*{got}"):
        call(case, model, encoder_attention_mask=mask)
    setting.remove()
    set_attention(model, Leap(2), cross_attention=False)
    assert call(case, model, encoder_attention_mask=mask).isfinite().all()


def test_masks_among_tokens_of_the_video_are_refused():
    model = MODELS["Wan"].model()
    set_attention(model, Dense())
    with pytest.raises(ValueError, match=r"attention_mask of tokens of the video must be None, .*\(30, 30\)"):
        model.blocks[0].attn1(torch.randn(2, 30, 24), None, torch.ones(30, 30, dtype=torch.bool))


def test_context_parallelism_is_refused():
    case = MODELS["Wan"]
    model = case.model()
    set_attention(model, Dense())
    model._parallel_config = SimpleNamespace(context_parallel_config="ulysses")
    with pytest.raises(ValueError, match=r"context parallelism must be off .*got context_parallel_config=ulysses"):
        call(case, model)


def test_derived_models_are_known():
    class Mine(diffusers.WanTransformer3DModel):
        pass

    model = Mine(**MODELS["Wan"].config)
    assert list(set_attention(model, Dense()).patterns) == ["blocks.0.attn1"]
