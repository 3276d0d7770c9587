"""A tiny model of every kind, for tests of what all models have in common: an entry of `MODELS` puts it under them.

Run as a program, it loads every model of a folder in a process of its own, and writes what they give.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import svitt_models as svitt
from vattn.models.checkpoints import PretrainedModel
from vattn.models.laps import LapsVisformer, LapsViT
from vattn.models.mebt import MeBT
from vattn.models.svitt import SViTT, TextEncoder, VideoAnswers, VideoEncoder
from vattn.models.video_dit import VideoDiT
from vattn.models.videogpt import ResNet3d, VideoGPT
from vattn.models.vqvae import VQGAN, VQVAE, Tokenizer


class Official(NamedTuple):
    """A checkpoint as the official code writes it, and what `from_official` needs besides."""

    state_dict: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    overrides: Mapping[str, Any] = {}


class Entry(NamedTuple):
    """A model, and what to do with it.

    Attributes:
        kind: its class.
        settings: of its constructor.
        run: what it gives, given nothing but a generator.
        official: its weights under official names; None if there is no official code.
    """

    kind: type[Any]
    settings: Mapping[str, Any]
    run: Callable[[Any, torch.Generator], tuple[Tensor, ...]]
    official: Callable[[Any], Official] | None

    def make(self) -> Any:
        return randomize(self.kind(**self.settings))

    def outputs(self, model: PretrainedModel) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.run(model, torch.Generator().manual_seed(5))


def randomize(model: Any) -> Any:
    """Weights, buffers of floating-point numbers among them, that are all different, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0.0 if "var" in name else 0.5))
    return model.eval()


def assert_same(found: Any, expected: Any) -> None:
    """Tensors, in order or by name, are the same, bit by bit."""
    pairs = [(found[name], expected[name]) for name in expected] if isinstance(expected, dict) else []
    for one, other in pairs or zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert len(found) == len(expected)


def _video(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


LAPS: dict[str, Any] = {
    "num_frames": 4, "fold_div": 2, "num_classes": 3, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0,
}  # fmt: skip
LAPS_CONFIG = {"NUM_FRAMES": 4, "FOLD_DIV": 2, "num_heads": 2}


def _encode(model: VideoEncoder, generator: torch.Generator) -> tuple[Tensor, ...]:
    seen = model(svitt.random_video(), generator=generator)
    return (seen.tokens, seen.pooled, *seen.kept)


def _read(model: TextEncoder, generator: torch.Generator) -> tuple[Tensor, ...]:
    text = model(svitt.random_words())
    fused = model.fuse(text, None, torch.randn(2, 9, 16, generator=generator))
    return (text, fused.tokens, *fused.kept)


def _answer(model: VideoAnswers, generator: torch.Generator) -> tuple[Tensor, ...]:
    answers = torch.tensor([[1, 5, 2, 0], [1, 5, 7, 2], [1, 9, 2, 0]])
    return model.rank(svitt.random_video(), svitt.random_words(), None, answers, None, generator=generator)


TOKENIZER: dict[str, Any] = {"num_codes": 12, "code_dim": 4, "hidden": 4, "downsample": (2, 4, 4)}
RESNET: dict[str, Any] = {"dim": 6, "num_blocks": (1, 2, 1, 1), "width": 4}


def _tokenize(model: Tokenizer, generator: torch.Generator) -> tuple[Tensor, ...]:
    reconstruction, quantized = model(_video(generator, 1, 3, 4, 16, 16))
    return reconstruction, *quantized


def _official_tokenizer(model: Tokenizer, part: str = "") -> dict[str, Tensor]:
    """Its weights, where another model may have it; the official code does not save whether its codebook has begun."""
    model.codebook.has_begun.fill_(True)  # as it has in every checkpoint
    return {f"{part}{name}": x for name, x in model.state_dict().items() if name != "codebook.has_begun"}


def _find_codes(model: MeBT, generator: torch.Generator) -> tuple[Tensor, ...]:
    codes, order = torch.randint(7, (2, 3, 2, 2), generator=generator), torch.arange(12).expand(2, -1)
    return (model(codes, order[:, :5], order[:, 5:]),)


def _denoise(model: VideoDiT, generator: torch.Generator) -> tuple[Tensor, ...]:
    """With a class and a text, the second of fewer words, and without."""
    latents, text = _video(generator, 2, 2, 3, 4, 6), _video(generator, 2, 4, 5)
    steps, words = 999 * torch.rand(2, 3, generator=generator), torch.tensor([[4], [1]]) > torch.arange(4)
    described = model(latents, steps, classes=torch.tensor([2, 0]), text=text, text_mask=words)
    return described, model(latents, 500), model.add_noise(latents, latents.sin(), steps)


def _next_codes(model: VideoGPT, generator: torch.Generator) -> tuple[Tensor, ...]:
    codes = torch.randint(7, (2, 2, 4, 4), generator=generator)
    return (model(codes, classes=torch.tensor([2, 0]), frames=_video(generator, 2, 3, 1, 8, 8)),)


def _official_videogpt(model: VideoGPT) -> dict[str, Tensor]:
    """Its weights, with a tokenizer whose codebook is what it has learned from."""
    tokenizer = VQVAE(7, 5, hidden=4, num_blocks=1)
    tokenizer.codebook.embeddings.copy_(model.embeddings)
    weights = {name: x for name, x in model.state_dict().items() if name != "embeddings"}
    return weights | _official_tokenizer(tokenizer, "vqvae.")


MODELS: dict[str, Entry] = {
    "LapsViT": Entry(
        LapsViT,
        LAPS | {"levels": (1, None, 2), "image_size": (8, 12), "patch_size": 4, "depth": 3},
        lambda model, generator: (model(_video(generator, 2, 4, 3, 8, 12)),),
        lambda model: Official(
            model.state_dict(), {"DATA": LAPS_CONFIG, "S2_SKIP_LEVEL": [1, None, 2], "img_size": [8, 12]}
        ),
    ),
    "LapsVisformer": Entry(
        LapsVisformer,
        LAPS | {"levels": ((1, 2), (None,)), "image_size": 32, "stem_channels": 4, "depth": (1, 2, 2)},
        lambda model, generator: (model(_video(generator, 2, 4, 3, 32, 32)),),
        lambda model: Official(model.state_dict(), LAPS_CONFIG | {"S2_SKIP_LEVEL": [1, 2], "S3_SKIP_LEVEL": [None]}),
    ),
    "VideoEncoder": Entry(
        VideoEncoder,
        svitt.VIDEO | {"order": "zcurve"},
        _encode,
        lambda model: Official(
            svitt.official_checkpoint(torch.nn.ModuleDict({"video": model}), video=""),
            svitt.OFFICIAL_CONFIG["video"] | {"token_3d_order": "zcurve"},
            {"sparsity": {"pad_keys": "mask"}},
        ),
    ),
    "TextEncoder": Entry(
        TextEncoder,
        svitt.TEXT,
        _read,
        lambda model: Official(
            svitt.official_checkpoint(torch.nn.ModuleDict({"text": model}), text="text_encoder."),
            svitt.OFFICIAL_CONFIG["text"],
        ),
    ),
    "SViTT": Entry(
        SViTT,
        {"video": svitt.VIDEO | {"order": "hilbert"}, "text": svitt.TEXT, "embed_dim": 8, "mask_id": 29},
        lambda model, generator: model(svitt.random_video(3), svitt.random_words(3), generator=generator),
        lambda model: Official(
            svitt.official_svitt(model), svitt.OFFICIAL_CONFIG, {"video": {"order": "hilbert"}, "mask_id": 29}
        ),
    ),
    "VideoAnswers": Entry(
        VideoAnswers,
        {"video": svitt.VIDEO, "question": svitt.TEXT, "answer": svitt.ANSWER},
        _answer,
        lambda model: Official(svitt.official_answers(model), svitt.OFFICIAL_CONFIG),
    ),
    "VQVAE": Entry(
        VQVAE,
        TOKENIZER | {"num_blocks": 1},
        _tokenize,
        lambda model: Official(
            _official_tokenizer(model, "vqvae."), {"args": argparse.Namespace(downsample=[2, 4, 4])}
        ),
    ),
    "VQGAN": Entry(
        VQGAN,
        TOKENIZER | {"groups": 2, "padding_mode": "circular", "restart": None},
        _tokenize,
        lambda model: Official(
            _official_tokenizer(model, "first_stage_model."),
            {"downsample": [2, 4, 4], "padding_type": "circular", "no_random_restart": True},
            {"groups": 2},
        ),
    ),
    "MeBT": Entry(
        MeBT,
        {"vocab_size": 7, "grid": (3, 2, 2), "dim": 16, "num_heads": 2, "num_latents": 3, "proj_drop": 0.1}
        | {"modes": ("latent_enc", "latent_self", "latent_dec", "lt2l", "maskgit")},
        _find_codes,
        lambda model: Official(
            model.state_dict(),
            {
                "model": {"n_head": 2, "mode": ["latent_enc", "latent_self", "latent_dec", "lt2l"], "resid_pdrop": 0.1},
                "mask": {"shape": [3, 2, 2]},
            },
        ),
    ),
    "VideoGPT": Entry(
        VideoGPT,
        {"num_codes": 7, "code_dim": 5, "grid": (2, 4, 4), "dim": 12, "num_heads": 2, "num_layers": 2}
        | {"attention": "sparse", "block_size": 4, "num_local_blocks": 1, "num_classes": 3}
        | {"frame_shape": (1, 8, 8), "resnet": RESNET},
        _next_codes,
        lambda model: Official(
            _official_videogpt(model),
            {"heads": 2, "attn_type": "sparse", "n_cond_frames": 1},
            {"block_size": 4, "num_local_blocks": 1},
        ),
    ),
    "VideoDiT": Entry(
        VideoDiT,
        {"channels": 2, "num_frames": 3, "size": (4, 6), "dim": 12, "depth": 2, "num_heads": 2, "levels": (1, None)}
        | {"num_classes": 3, "text_dim": 5, "drop_conditions": 0.2, "prediction": "epsilon"},
        _denoise,
        None,
    ),
    "ResNet3d": Entry(ResNet3d, RESNET, lambda model, generator: (model(_video(generator, 1, 3, 2, 8, 8)),), None),
}


def main(folder: pathlib.Path) -> None:
    """Load each model of `folder`, one in a folder of its name, and write what it gives beside it."""
    from safetensors.torch import save_file

    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        entry = MODELS[path.name]
        found = entry.outputs(entry.kind.from_pretrained(path))
        save_file({str(i): x.contiguous().clone() for i, x in enumerate(found)}, folder / f"{path.name}.outputs")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
