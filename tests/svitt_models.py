"""Small models of SViTT, and their inputs, for tests."""

import re
from typing import Any

import torch
from torch import Tensor

from vattn.models.svitt import Sparsity, SViTT, TextEncoder, VideoEncoder

DENSE = Sparsity(num_random=None, keep=1.0)
SPARSE = Sparsity(block_size=3, num_random=1, keep=0.5, prune_after=(0,))
VIDEO: dict[str, Any] = {
    "image_size": (8, 12), "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "sparsity": SPARSE,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 30, "dim": 24, "depth": 3, "num_heads": 2, "mlp_dim": 32, "max_length": 9, "fusion_layer": 1,
    "video_dim": 16, "keep": 0.5, "prune_after": (1,), "dropout": 0.0,
}  # fmt: skip


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def randomize(model: Any) -> Any:
    """Weights that are all different, in evaluation mode."""
    generator = seed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def video_encoder(num_frames: int = 4, **settings: Any) -> VideoEncoder:
    return randomize(VideoEncoder(num_frames, **(VIDEO | settings)))


def text_encoder(**settings: Any) -> TextEncoder:
    return randomize(TextEncoder(**(TEXT | settings)))


def small_model(**settings: Any) -> SViTT:
    model = randomize(SViTT(video_encoder(**settings), text_encoder(), embed_dim=8, mask_id=29, never_masked=(0, 1)))
    model.temperature.data.fill_(0.2)
    return model


def random_video(batch: int = 2, num_frames: int = 4) -> Tensor:
    return torch.randn(batch, num_frames, 3, 8, 12, generator=seed(1))


def random_words(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(2, 29, (batch, length), generator=seed(2))


OFFICIAL_NAMES = (
    (r"^(blocks|layers)\.", "encoder.layer."),
    (r"^cls_token", "embeddings.cls_token"),
    (r"^patch_embed\.", "embeddings.patch_embeddings.projection."),
    (r"^pool_norm\.", "pooler.layernorm."),
    (r"norm1\.", "layernorm_before."),
    (r"norm2\.", "layernorm_after."),
    (r"\.scale", ".lambda_"),
    (r"^word\.", "embeddings.word_embeddings."),
    (r"^position\.", "embeddings.position_embeddings."),
    (r"^kind\.", "embeddings.token_type_embeddings."),
    (r"^norm\.", "embeddings.LayerNorm."),
    (r"\.(attn|cross)\.norm\.", r".\1.output.LayerNorm."),
    (r"\.(attn|cross)\.proj\.", r".\1.output.dense."),
    (r"(\.\d+)\.norm\.", r"\1.output.LayerNorm."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
    (r"position_bias\.table", "relative_position_bias.relative_position_bias_table"),
    (r"\.cross\.", ".crossattention."),
    (r"\.attn\.", ".attention."),
)


def official_checkpoint(model: Any, **prefixes: str) -> dict[str, Tensor]:
    """The weights of parts of `model` under official names, each behind its prefix."""
    weights = {}
    for part, prefix in prefixes.items():
        inner = "self" if "text" in prefix else "attention"  # of BERT and of BEiT
        for name, weight in getattr(model, part).state_dict().items():
            if part != "video_norm":
                for ours, official in OFFICIAL_NAMES:
                    name = re.sub(ours, official, name)
                name = re.sub(r"attention\.(query|key|value|relative)", rf"attention.{inner}.\1", name)
            weights[prefix + name] = weight
    return weights


def official_head(head: Any, text: TextEncoder, prefix: str) -> dict[str, Tensor]:
    """The weights of a head for words, which repeat those of the words and its bias."""
    names = {"dense.": "transform.dense.", "norm.": "transform.LayerNorm.", "bias": "bias"}
    weights = {"decoder.weight": text.word.weight.detach(), "decoder.bias": head.bias.detach()}
    for name, weight in head.state_dict().items():
        ours = next(ours for ours in names if name.startswith(ours))
        weights[name.replace(ours, names[ours], 1)] = weight
    return {f"{prefix}cls.predictions.{name}": weight for name, weight in weights.items()}
