"""adapt: transformers of diffusers get a timestep for each frame, each in its own form."""

import importlib.util
import types

import diffusers
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.fifo_transformers import CASES, TEXT, WAN, configuration, of_one_sample, without_mixing
from tests.utils import assert_close
from vattn.models.fifo import FIFO, adapt

every_class = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
wan = CASES["WanTransformer3DModel"]


def video(frames: int = 3, batch: int = 2, channels: int = 4) -> torch.Tensor:
    """Frames of 4 rows and 6 columns, so that a mistaken axis is noticed."""
    return torch.randn(batch, channels, frames, 4, 6, generator=torch.Generator().manual_seed(1))


# What the models compute


@every_class
@torch.no_grad()
def test_equal_timesteps_are_the_call_of_the_model_itself(case):
    model, latents = case.model(), video()
    timestep = torch.tensor([700.0, 12.0])
    expected = case.scalar_call(model, latents, timestep, case.conditions)
    actual = adapt(model)(latents, timestep[:, None].repeat(1, 3), **case.conditions)
    assert_close(actual, expected, 1e-5)


@every_class
@torch.no_grad()
def test_every_frame_is_modulated_by_its_own_timestep(case):
    """Where frames cannot see each other, each is what the model makes of it at its timestep."""
    model, latents = without_mixing(case.model()), video()
    timesteps = torch.tensor([[999.0, 500.0, 3.0], [40.0, 800.0, 41.0]])
    actual = adapt(model)(latents, timesteps, **case.conditions)
    for frame in range(3):
        alone = case.scalar_call(model, latents, timesteps[:, frame], case.conditions)
        assert_close(actual[:, :, frame], alone[:, :, frame], 1e-5, f"frame {frame}")


@every_class
@torch.no_grad()
def test_a_timestep_is_noticed_by_its_frame_first(case):
    """Of the frames that attend to each other, a changed timestep changes all, and one of them without attention."""
    latents, timesteps = video(), torch.tensor([[900.0, 500.0, 100.0]]).repeat(2, 1)
    other = timesteps.clone()
    other[:, 1] = 20.0
    for model, changed in ((case.model(), [True] * 3), (without_mixing(case.model()), [False, True, False])):
        denoise = adapt(model)
        apart = denoise(latents, timesteps, **case.conditions) - denoise(latents, other, **case.conditions)
        assert [bool(apart[:, :, frame].abs().max() > 1e-6) for frame in range(3)] == changed


@every_class
@torch.no_grad()
def test_timesteps_may_be_integers(case):
    denoise, timesteps = adapt(case.model()), torch.tensor([[900, 500, 100]]).repeat(2, 1)
    as_floats = denoise(video(), timesteps.float(), **case.conditions)
    assert_close(denoise(video(), timesteps, **case.conditions), as_floats, 1e-6)


@every_class
@torch.no_grad()
def test_in_bfloat16_latents_keep_their_dtype(case):
    denoise = adapt(case.model().to(torch.bfloat16))
    prediction = denoise(video(), torch.tensor([[900, 500, 100]]).repeat(2, 1), **case.conditions)
    assert prediction.dtype == torch.float32 and prediction.isfinite().all()


# A queue of each


def schedulers(name: str) -> dict[str, object]:
    flow = {
        "flow Euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "UniPC": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        "DDIM": diffusers.DDIMScheduler(prediction_type="v_prediction"),
        "DPM++": diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }
    if name == "CosmosTransformer3DModel":  # what its pipeline has
        flow["DDIM"] = diffusers.EDMEulerScheduler(sigma_max=80, sigma_min=0.002, sigma_data=0.5)
    return flow


@every_class
def test_a_queue_of_three_windows_runs_with_four_schedulers(case):
    denoise, conditions = adapt(case.model()), of_one_sample(case.conditions)
    for name, scheduler in schedulers(case.name).items():
        scheduler.set_timesteps(6)
        fifo = FIFO(denoise, scheduler, frames=2, partitions=3, lookahead=True, guidance_scale=2.0)
        fifo.start(video(frames=2, batch=1), generator=torch.Generator().manual_seed(0))
        without = {**conditions, "encoder_hidden_states": torch.zeros(1, 5, 8)}
        frames = list(fifo.stream(3, conditions=conditions, unconditional=without))
        assert [frame.shape for frame in frames] == [(1, 4, 4, 6)] * 3, name
        assert all(frame.isfinite().all() for frame in frames), name


# What is peculiar to one of them


@torch.no_grad()
def test_patches_of_ltx_are_packed_as_its_pipeline_packs_them():
    model = CASES["LTXVideoTransformer3DModel"].model(in_channels=16, out_channels=16, patch_size=2)
    latents, conditions = video(), {"encoder_hidden_states": TEXT, "encoder_attention_mask": None}
    pipeline = diffusers.LTXPipeline
    tokens = pipeline._pack_latents(latents, patch_size=2)
    size = {"num_frames": 3, "height": 2, "width": 3, "rope_interpolation_scale": (8 / 24, 32, 32)}
    out = model(hidden_states=tokens, timestep=torch.tensor([700.0, 12.0]), **size, **conditions).sample
    timesteps = torch.tensor([[700.0], [12.0]]).repeat(1, 3)
    actual = adapt(model)(latents, timesteps, encoder_hidden_states=TEXT, frame_rate=24)
    assert_close(actual, pipeline._unpack_latents(out, 3, 2, 3, patch_size=2), 1e-5)


@torch.no_grad()
def test_rope_of_ltx_follows_the_frame_rate_unless_it_is_given():
    denoise, timesteps = adapt(CASES["LTXVideoTransformer3DModel"].model()), torch.full((2, 3), 500.0)

    def predict(**conditions):
        return denoise(video(), timesteps, encoder_hidden_states=TEXT, **conditions)

    assert torch.equal(predict(frame_rate=25), predict())
    assert torch.equal(predict(rope_interpolation_scale=(8 / 30, 32, 32)), predict(frame_rate=30))
    assert not torch.equal(predict(frame_rate=30), predict())


@torch.no_grad()
def test_anyflow_is_told_where_the_step_ends():
    model, timesteps = CASES["AnyFlowTransformer3DModel"].model(), torch.tensor([[900.0, 500.0, 100.0]]).repeat(2, 1)
    denoise, end = adapt(model), timesteps - 50
    inputs = {"hidden_states": video().transpose(1, 2), "encoder_hidden_states": TEXT}
    expected = model(timestep=timesteps, r_timestep=end, **inputs).sample.transpose(1, 2)
    assert_close(denoise(video(), timesteps, encoder_hidden_states=TEXT, r_timestep=end), expected, 1e-6)
    by_function = denoise(video(), timesteps, encoder_hidden_states=TEXT, r_timestep=lambda t: t - 50)
    assert_close(by_function, expected, 1e-6)
    assert not torch.equal(by_function, denoise(video(), timesteps, encoder_hidden_states=TEXT))


@torch.no_grad()
def test_sana_may_know_the_guidance_and_predict_a_variance():
    case = CASES["SanaVideoTransformer3DModel"]
    model, timestep = case.model(guidance_embeds=True, out_channels=8), torch.tensor([700.0, 12.0])
    guidance = torch.tensor([3.0, 5.0])
    expected = model(video(), TEXT, timestep, guidance=guidance).sample[:, :4]
    denoise, timesteps = adapt(model), timestep[:, None].repeat(1, 3)
    assert_close(denoise(video(), timesteps, encoder_hidden_states=TEXT, guidance=guidance), expected, 1e-5)
    of_all = denoise(video(), timesteps, encoder_hidden_states=TEXT, guidance=torch.tensor([3.0]))
    assert_close(of_all[0], expected[0], 1e-5)
    assert not torch.equal(of_all[1], expected[1])


@torch.no_grad()
def test_skyreels_takes_one_frame_rate():
    model = CASES["SkyReelsV2Transformer3DModel"].model(inject_sample_info=True)
    denoise, timesteps = adapt(model), torch.tensor([[700.0], [12.0]]).repeat(1, 3)
    expected = model(video(), timesteps[:, 0], TEXT, fps=[1, 1]).sample
    for fps in (1, [1], [1, 1], torch.tensor([1])):
        assert_close(denoise(video(), timesteps, encoder_hidden_states=TEXT, fps=fps), expected, 1e-5)
    for fps in ([0, 1], 24, None):
        with pytest.raises(ValueError, match=r"denoise: fps of SkyReelsV2Transformer3DModel must be 0 .*got fps="):
            denoise(video(), timesteps, encoder_hidden_states=TEXT, fps=fps)


@torch.no_grad()
def test_cosmos_generates_all_frames_unless_told_which_are_given():
    model = CASES["CosmosTransformer3DModel"].model(in_channels=5)
    denoise, timesteps = adapt(model, timestep_scale=0.001), torch.tensor([[700.0], [12.0]]).repeat(1, 3)
    mask = torch.zeros(2, 1, 3, 4, 6)
    expected = model(video(), timesteps[:, 0] / 1000, TEXT, condition_mask=mask).sample
    assert_close(denoise(video(), timesteps, encoder_hidden_states=TEXT), expected, 1e-5)
    mask[:, :, 0] = 1
    given = denoise(video(), timesteps, encoder_hidden_states=TEXT, condition_mask=mask)
    assert_close(given, model(video(), timesteps[:, 0] / 1000, TEXT, condition_mask=mask).sample, 1e-5)
    assert not torch.equal(given, expected)


@torch.no_grad()
def test_cosmos_pads_nothing_unless_told(monkeypatch):
    """Its padding mask is resized by torchvision, which stands beside few builds of torch: a stand-in does it here."""
    model = CASES["CosmosTransformer3DModel"].model(concat_padding_mask=True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    with pytest.raises(ValueError, match=r"adapt: CosmosTransformer3DModel .*torchvision.*concat_padding_mask=True"):
        adapt(model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("torch"))
    resize = types.SimpleNamespace(resize=lambda x, size, interpolation: nn.functional.interpolate(x, size))
    stand_in = types.SimpleNamespace(functional=resize, InterpolationMode=types.SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(diffusers.models.transformers.transformer_cosmos, "transforms", stand_in, raising=False)
    denoise, timestep = adapt(model), torch.tensor([700.0, 12.0])
    for mask in (torch.zeros(1, 1, 32, 48), torch.ones(1, 1, 32, 48)):
        expected = model(video(), timestep, TEXT, padding_mask=mask).sample
        conditions = {"encoder_hidden_states": TEXT} | ({"padding_mask": mask} if mask.any() else {})
        assert_close(denoise(video(), timestep[:, None].repeat(1, 3), **conditions), expected, 1e-5)


# What is around a model


class Fine(diffusers.WanTransformer3DModel):
    """A class of one's own."""


class Peft(nn.Module):
    """What PEFT puts around a model, as far as adapt sees it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *arguments, **keywords):
        return self.base_model(*arguments, **keywords)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@torch.no_grad()
def test_a_model_may_be_derived_compiled_distributed_or_in_peft(process_group):
    model, timesteps = wan.model(), torch.tensor([[900.0, 500.0, 100.0]]).repeat(2, 1)
    derived = Fine(**WAN)
    derived.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    expected = adapt(model)(video(), timesteps, encoder_hidden_states=TEXT)
    for other in (derived, compiled, DistributedDataParallel(model), Peft(model), DistributedDataParallel(Peft(model))):
        called = []
        other.register_forward_hook(lambda *_, called=called: called.append(True))
        assert_close(adapt(other)(video(), timesteps, encoder_hidden_states=TEXT), expected, 1e-5)
        assert called, f"{type(other).__name__} was passed by"


# What is refused


def test_classes_of_one_timestep_are_refused_by_name():
    heads = configuration(num_attention_heads=2, num_layers=1, in_channels=4)
    cog = diffusers.CogVideoXTransformer3DModel(
        attention_head_dim=16, sample_width=4, sample_height=4, text_embed_dim=8, **heads
    )
    hunyuan = diffusers.HunyuanVideoTransformer3DModel(
        attention_head_dim=10, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4), **heads
    )  # fmt: skip
    for model in (cog, hunyuan):
        with pytest.raises(TypeError, match=rf"(?s)got model={type(model).__name__}, which .*timestep.*def denoise"):
            adapt(model)


def test_any_other_class_is_refused_with_those_that_work():
    class WanTransformer3DModel(nn.Module):
        """The name alone does not make it one of diffusers."""

    pipeline = types.SimpleNamespace(transformer=wan.model())
    works = ", ".join(CASES)
    for model, got in ((nn.Linear(1, 1), "Linear"), (WanTransformer3DModel(), "WanTransformer3DModel"), (3, "int"),
                       (pipeline, "SimpleNamespace, a pipeline: give adapt its transformer")):  # fmt: skip
        with pytest.raises(TypeError, match=rf"(?s)adapt: model must be one of diffusers' {works}, got model={got}"):
            adapt(model)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("WanTransformer3DModel", {"in_channels": 9}, r"in_channels=9 and out_channels=4.*fifo\.start"),
        ("SkyReelsV2Transformer3DModel", {"in_channels": 8}, r"in_channels=8 and out_channels=4"),
        ("CosmosTransformer3DModel", {"in_channels": 8}, r"in_channels=8 and out_channels=4"),
        ("WanTransformer3DModel", {"patch_size": (2, 2, 2)}, r"patch_size=\(2, 2, 2\)"),
        ("LTXVideoTransformer3DModel", {"patch_size_t": 2}, r"patch_size=\(2, 1, 1\)"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_configurations_without_a_timestep_per_frame_are_refused_by_name(name, overrides, message):
    with pytest.raises(ValueError, match=rf"(?s)adapt: .*{name}.*got .*{message}"):
        adapt(CASES[name].model(**overrides))


def test_a_scale_is_a_positive_number():
    for scale, error, message in ((0, ValueError, "above 0, got timestep_scale=0"), ("1", TypeError, "a number, got")):
        with pytest.raises(error, match=f"adapt: timestep_scale must be {message}"):
            adapt(wan.model(), timestep_scale=scale)


@every_class
def test_a_wrong_window_is_refused_before_the_model_runs(case):
    model = case.model()
    model.forward = None  # not to be called
    denoise, timesteps = adapt(model), torch.zeros(2, 3)
    rows = denoise.patch()[1]
    shape = r"timesteps must have shape \(B, f\)=\(2, 3\), got timesteps.shape="
    for latents, times, error, message in (
        (video(channels=5), timesteps, ValueError, rf"latents must have the 4 channels of {case.name}, got latents"),
        (video()[0], timesteps, ValueError, r"latents must have shape \(B, C, f, H, W\), got latents.shape="),
        (video().long(), timesteps, TypeError, r"latents must be float32, .*got latents.dtype=torch.int64"),
        (video(), timesteps[:, 0], ValueError, rf"{shape}\(2,\)"),
        (video(), timesteps[:1], ValueError, rf"{shape}\(1, 3\)"),
        (video(), [0, 0, 0], TypeError, r"timesteps must be a torch.Tensor, got timesteps=list"),
        (
            video()[..., :5],
            timesteps,
            ValueError,
            rf"multiples of 2 and 2, the patches of {case.name}, got latents",
        ),
    ):
        if "multiples" in message and rows == 1:
            continue
        with pytest.raises(error, match=f"denoise: .*{message}"):
            denoise(latents, times, **case.conditions)


def test_a_cache_of_earlier_steps_is_refused():
    model = wan.model(num_layers=2)
    denoise = adapt(model)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"denoise: WanTransformer3DModel .*disable_cache\(\), got is_cache_en"):
        denoise(video(), torch.zeros(2, 3), encoder_hidden_states=TEXT)
    model.disable_cache()
    assert denoise(video(), torch.zeros(2, 3), encoder_hidden_states=TEXT).shape == video().shape


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("texts", [1, 4])
def test_a_text_for_each_sample(case, texts):
    denoise = adapt(case.model())
    conditions = {name: x.repeat(2, 1, 1)[:texts] if x is TEXT else x for name, x in case.conditions.items()}
    with pytest.raises(ValueError, match=rf"denoise: encoder_hidden_states must .* 2 samples.*got .*\({texts}, 5, 8\)"):
        denoise(video(), torch.zeros(2, 3), **conditions)


@pytest.mark.parametrize("scale, error", [("1", TypeError), (0, ValueError), (float("nan"), ValueError)])
def test_a_scale_of_timesteps_is_a_number_above_zero(scale, error):
    with pytest.raises(error, match="adapt: timestep_scale must be "):
        adapt(wan.model(), timestep_scale=scale)
