"""Small models of SViTT, and their inputs, for tests."""

import re
from typing import Any

import torch
from torch import Tensor

from vattn.models.svitt import Sparsity, SViTT, TextEncoder, VideoAnswers, VideoEncoder

DENSE = Sparsity(num_random=None, keep=1.0)
SPARSE = Sparsity(block_size=3, num_random=1, keep=0.5, prune_after=(0,))
VIDEO: dict[str, Any] = {
    "num_frames": 4, "image_size": (8, 12), "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32,
    "sparsity": SPARSE,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 30, "dim": 24, "depth": 3, "num_heads": 2, "mlp_dim": 32, "max_length": 9, "fusion_layer": 1,
    "video_dim": 16, "keep": 0.5, "prune_after": (1,), "dropout": 0.0,
}  # fmt: skip
ANSWER = TEXT | {"depth": 2, "fusion_layer": 0, "keep": 1.0, "causal": True, "video_dim": 24}


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def randomize(model: Any) -> Any:
    """Weights that are all different, in evaluation mode."""
    generator = seed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def video_encoder(**settings: Any) -> VideoEncoder:
    return randomize(VideoEncoder(**(VIDEO | settings)))


def text_encoder(**settings: Any) -> TextEncoder:
    return randomize(TextEncoder(**(TEXT | settings)))


def small_model(**settings: Any) -> SViTT:
    model = randomize(SViTT(VIDEO | settings, TEXT, embed_dim=8, mask_id=29, never_masked=(0, 1)))
    model.temperature.data.fill_(0.2)
    return model


def answers_model() -> VideoAnswers:
    return randomize(VideoAnswers(VIDEO, TEXT, ANSWER))


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


def official_svitt(model: SViTT, prefix: str = "text_encoder.bert.") -> dict[str, Tensor]:
    """The weights of `model` under official names; with its head for words, unless `prefix` is "text_encoder."."""
    weights = official_checkpoint(model, video="vision_encoder.", video_norm="vision_layernorm.", text=prefix)
    for ours, theirs in (("video_proj", "vision_proj"), ("text_proj", "text_proj"), ("match_head", "itm_head")):
        weights |= {f"{theirs}.{name}": x for name, x in getattr(model, ours).state_dict().items()}
    weights["temp"] = model.temperature.detach()
    return weights | (official_head(model.word_head, model.text, "text_encoder.") if "bert" in prefix else {})


def official_answers(model: VideoAnswers) -> dict[str, Tensor]:
    """The weights of `model` under official names."""
    weights = official_checkpoint(
        model, video="vision_encoder.", video_norm="vision_layernorm.", question="text_encoder.",
        answer="text_decoder.bert.",
    )  # fmt: skip
    return weights | official_head(model.word_head, model.answer, "text_decoder.")


OFFICIAL_CONFIG: dict[str, Any] = {
    "video": {
        "image_size": (8, 12), "token_keep_rate": 0.5, "token_drop_loc": [0], "attn_block_size": 3,
        "sparse_local_attn": 1, "sparse_random_attn": 1,
    },
    "text": {"num_attention_heads": 2, "token_keep_rate": 0.5, "token_drop_loc": [0, 1]},
}  # fmt: skip
"""What the official code calls the settings of these models."""


def official_head(head: Any, text: TextEncoder, prefix: str) -> dict[str, Tensor]:
    """The weights of a head for words, which repeat those of the words and its bias."""
    names = {"dense.": "transform.dense.", "norm.": "transform.LayerNorm.", "bias": "bias"}
    weights = {"decoder.weight": text.word.weight.detach(), "decoder.bias": head.bias.detach()}
    for name, weight in head.state_dict().items():
        ours = next(ours for ours in names if name.startswith(ours))
        weights[name.replace(ours, names[ours], 1)] = weight
    return {f"{prefix}cls.predictions.{name}": weight for name, weight in weights.items()}
