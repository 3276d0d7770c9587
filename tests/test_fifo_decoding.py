"""decode_stream: the pixels of the whole clip, from latents that come one by one."""

import gc
import weakref
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from tests.fifo_transformers import configuration
from tests.utils import assert_close
from vattn.models.fifo import decode_stream

STATISTICS = configuration(latents_mean=[0.1, -0.2], latents_std=[1.5, 0.7])
WAN = configuration(
    base_dim=4, z_dim=2, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], **STATISTICS
)
WAN_22 = WAN | configuration(
    temperal_downsample=[False, True], is_residual=True, patch_size=2, in_channels=12, out_channels=12
)
LTX = configuration(
    latent_channels=2, block_out_channels=(4, 4), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True), patch_size=1,
    decoder_spatio_temporal_scaling=(True, True), down_block_types=("LTXVideoDownBlock3D",) * 2,
    decoder_inject_noise=(False,) * 3, downsample_type=("conv",) * 2, upsample_residual=(False, False),
    upsample_factor=(1, 1), decoder_causal=True,
)  # fmt: skip
LTX_095 = LTX | configuration(
    block_out_channels=(4, 8, 8), decoder_block_out_channels=(16, 32), upsample_residual=(True, True),
    down_block_types=("LTXVideo095DownBlock3D",) * 2, downsample_type=("spatial", "temporal"),
    upsample_factor=(2, 2), timestep_conditioning=True, patch_size=2,
)  # fmt: skip
LTX_2 = configuration(
    latent_channels=2, block_out_channels=(4, 8, 8), down_block_types=("LTX2VideoDownBlock3D",) * 3,
    decoder_block_out_channels=(16, 32), layers_per_block=(1,) * 4, decoder_layers_per_block=(1,) * 3,
    spatio_temporal_scaling=(True, True, False), decoder_spatio_temporal_scaling=(True, True),
    decoder_inject_noise=(False,) * 3, downsample_type=("spatial", "temporal", "spatial"), patch_size=2,
    upsample_type=("spatiotemporal",) * 2, upsample_residual=(True, True), upsample_factor=(2, 2),
)  # fmt: skip
IMAGES = configuration(
    latent_channels=2, block_out_channels=(4, 4), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
TINY = configuration(
    latent_channels=2, encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
    num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
)  # fmt: skip
HUNYUAN = configuration(
    block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, up_block_types=("HunyuanVideoUpBlock3D",) * 2,
    down_block_types=("HunyuanVideoDownBlock3D",) * 2,
)  # fmt: skip

CASES = {
    "Wan 2.1": ("AutoencoderKLWan", WAN, {}),
    "Wan 2.2": ("AutoencoderKLWan", WAN_22, {}),
    "Qwen": ("AutoencoderKLQwenImage", WAN, {}),
    "LTX": ("AutoencoderKLLTXVideo", LTX, {}),
    "LTX 0.9.5": ("AutoencoderKLLTXVideo", LTX_095, {"temb": torch.tensor([0.05, 0.1])}),
    "LTX 2": ("AutoencoderKLLTX2Video", LTX_2, {}),
    "LTX 2, told": ("AutoencoderKLLTX2Video", LTX_2 | {"decoder_causal": False}, {"causal": True}),
}


def autoencoder(name: str, config: dict) -> nn.Module:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


def clip(length: int = 5, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 2, length, 6, 6, generator=torch.Generator().manual_seed(seed))


def tiled(vae: Any) -> None:
    """Tiles of 4 by 4 latents that overlap by one."""
    side, stride = 4 * vae.spatial_compression_ratio, 3 * vae.spatial_compression_ratio
    vae.enable_tiling(side, side)
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = stride


# diffusers cannot slice a batch for an LTX autoencoder with timesteps.
WAYS = [(name, way) for way in ("whole", "tiles", "slices") for name in CASES if (name, way) != ("LTX 0.9.5", "slices")]


@pytest.mark.parametrize(("name", "way"), WAYS, ids=map(", ".join, WAYS))
@torch.no_grad()
def test_frames_are_those_of_the_whole_clip(name, way):
    kind, config, arguments = CASES[name]
    vae = autoencoder(kind, config)
    if way == "tiles":
        tiled(vae)
    if way == "slices":
        vae.enable_slicing()
    expected = vae.decode(clip(), **arguments).sample
    frames = list(decode_stream(vae, iter(clip().unbind(2)), **arguments))
    assert expected.shape[2] > 5 and expected.std() > 0.1
    # LTX convolves a clip at once, in another order than its frames; Wan decodes latents one by one itself.
    assert_close(torch.stack(frames, 2), expected, 2e-6 if "LTX" in name else 0.0)


@pytest.mark.parametrize("name", ["Wan 2.1", "LTX"])
@torch.no_grad()
def test_streams_do_not_mix_and_leave_the_autoencoder_as_it_was(name):
    kind, config, _ = CASES[name]
    vae = autoencoder(kind, config)
    first, second = clip(seed=1), clip(seed=2)
    expected = [vae.decode(latents).sample for latents in (first, second)]
    before, modules = dict(vars(vae)), dict(vae.named_modules())
    own_caches = [key for key in before if key.startswith(("_feat", "_conv", "_enc"))]
    streams = [decode_stream(vae, latents.unbind(2)) for latents in (first, second)]
    pairs = []
    for frames in zip(*streams, strict=True):
        pairs.append(frames)
        if len(pairs) in (1, 4):  # and what others do in between is not disturbed, either
            assert torch.equal(vae.decode(first).sample, expected[0])
            vae.encode(expected[0][:, :, :5])
            before |= {key: vars(vae)[key] for key in own_caches}
    for frames, whole in zip(zip(*pairs, strict=True), expected, strict=True):
        assert_close(torch.stack(frames, 2), whole, 2e-6)
    assert vars(vae).keys() == before.keys() and all(vars(vae)[key] is before[key] for key in before)
    assert all(vae.get_submodule(path) is module for path, module in modules.items())


@torch.no_grad()
def test_a_stream_that_ends_early_leaves_caches_that_were_in_use():
    vae = autoencoder("AutoencoderKLWan", WAN)
    vae.clear_cache()
    vae._feat_map[0] = kept = torch.ones(1)  # as if a decoding of someone else were under way
    stream = decode_stream(vae, clip().unbind(2))
    next(stream)
    stream.close()
    failing = decode_stream(vae, iter([clip()[:, :, 0], clip(batch=1)[:, :, 0]]))
    with pytest.raises(ValueError, match=r"the shape of the first, \(2, 2, 6, 6\), got latents.shape=\(1, 2, 6, 6\)"):
        list(failing)
    assert vae._feat_map[0] is kept and all(cache is None for cache in vae._feat_map[1:])


@pytest.mark.parametrize("name", ["Wan 2.1", "Wan 2.2", "LTX 0.9.5"])
def test_what_is_carried_does_not_grow(name):
    kind, config, arguments = CASES[name]
    vae = autoencoder(kind, config)
    latents_alive, bytes_carried = [], []

    def latents():
        while True:
            latent = clip(length=1)[:, :, 0].clone()
            latents_alive.append(weakref.ref(latent))
            yield latent

    stream = decode_stream(vae, latents(), **arguments)
    for _ in stream:
        (caches,) = stream.gi_frame.f_locals["vae"].decoder.caches
        tensors = [x for x in (caches.values() if isinstance(caches, dict) else caches) if isinstance(x, Tensor)]
        bytes_carried.append(sum(x.untyped_storage().nbytes() for x in tensors))
        assert bytes_carried[-1] == sum(x.nbytes for x in tensors), "views would keep more"
        if len(latents_alive) == 12:
            break
    gc.collect()
    assert sum(latent() is not None for latent in latents_alive) <= 1
    assert bytes_carried[-1] == bytes_carried[len(bytes_carried) // 2] > 0


@torch.no_grad()
def test_images_are_decoded_one_by_one():
    image = autoencoder("AutoencoderKL", IMAGES)
    tiny = autoencoder("AutoencoderTiny", TINY)
    for vae in (image, tiny):
        frames = list(decode_stream(vae, clip().unbind(2)))
        assert len(frames) == 5
        for frame, latent in zip(frames, clip().unbind(2), strict=True):
            assert torch.equal(frame, vae.decode(latent).sample)


@torch.no_grad()
def test_normalized_latents_are_brought_back_as_the_pipelines_do():
    """The expected values are spelled out: mean and deviation of a channel, and one factor for all."""
    mean, std = (torch.tensor(STATISTICS[key])[None, :, None, None, None] for key in ("latents_mean", "latents_std"))
    wan = autoencoder("AutoencoderKLWan", WAN)
    ltx = autoencoder("AutoencoderKLLTXVideo", LTX | {"scaling_factor": 1.7})
    ltx.latents_mean, ltx.latents_std = mean.flatten(), std.flatten()
    for vae, latents in ((wan, clip() * std + mean), (ltx, clip() * std / 1.7 + mean)):
        frames = torch.stack(list(decode_stream(vae, clip().unbind(2), denormalize=True)), 2)
        assert_close(frames, vae.decode(latents).sample, 5e-6)
    image = autoencoder("AutoencoderTiny", TINY | configuration(scaling_factor=1.7, shift_factor=0.3))
    (frame,) = decode_stream(image, [clip()[:, :, 0]], denormalize=True)
    assert_close(frame, image.decode(clip()[:, :, 0] / 1.7 + 0.3).sample, 1e-6)


@torch.no_grad()
def test_an_autoencoder_may_be_compiled_and_of_another_dtype():
    vae = autoencoder("AutoencoderKLWan", WAN)
    expected = vae.decode(clip(3)).sample
    vae.decoder = torch.compile(vae.decoder)
    with torch.compiler.set_stance("force_eager"):  # what is around the modules counts, not what is made of them
        frames = list(decode_stream(torch.compile(vae), clip(3).unbind(2)))
    assert_close(torch.stack(frames, 2), expected, 1e-6)
    vae = autoencoder("AutoencoderKLWan", WAN).to(torch.bfloat16)
    vae.decode = None  # what is set on the autoencoder, such as a compiled method, knows nothing of the stream
    assert next(decode_stream(vae, clip().unbind(2))).dtype == torch.bfloat16


def test_gradients_are_those_of_the_caller_while_a_frame_is_out():
    vae = autoencoder("AutoencoderKLWan", WAN)
    for _ in decode_stream(vae, clip(2).unbind(2)):
        assert torch.is_grad_enabled()


def test_autoencoders_that_are_not_causal_are_refused_by_name():
    hunyuan = autoencoder("AutoencoderKLHunyuanVideo", HUNYUAN)
    for vae, got in ((hunyuan, "AutoencoderKLHunyuanVideo"), (nn.Linear(1, 1), "Linear"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"decode_stream: vae must be .*AutoencoderKLWan.*got vae={got}\. Decode"):
            decode_stream(vae, [])
    for config, message in (
        (LTX | {"decoder_causal": False}, r"AutoencoderKLLTXVideo must not read .*got decoder_causal=False\. Decode"),
        (LTX | {"decoder_inject_noise": (True, False, False)}, r"must not add noise .*decoder_inject_noise=\(True, "),
    ):
        with pytest.raises(ValueError, match=f"decode_stream: .*{message}"):
            decode_stream(autoencoder("AutoencoderKLLTXVideo", config), [])


def test_latents_come_one_by_one():
    vae = autoencoder("AutoencoderKLWan", WAN)
    with pytest.raises(TypeError, match=r"decode_stream: latents must be an iterable .*got latents=tensor of shape"):
        decode_stream(vae, clip())
    with pytest.raises(TypeError, match=r"decode_stream: latents must be an iterable .*got latents=object"):
        decode_stream(vae, object())
    for latent, error, message in (
        (clip(), ValueError, r"latents must have shape \(B, C, H, W\), got latents.shape=\(2, 2, 5, 6, 6\)"),
        (clip()[:, :, 0].long(), TypeError, r"latents must be float32, .*got latents.dtype=torch.int64"),
    ):
        with pytest.raises(error, match=f"decode_stream: {message}"):
            next(decode_stream(vae, [latent]))
    assert list(decode_stream(vae, [])) == []
