"""Names in the official checkpoints of SViTT, and in those of BEiT and BERT, and what they are here."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vattn.models.checkpoints import official_weights
from vattn.models.settings import Config, section

VIDEO_NAMES = (
    ("relative_position_bias.relative_position_bias_table", "position_bias.table"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.patch_embeddings.projection.", "patch_embed."),
    ("encoder.layer.", "blocks."),
    ("attention.attention.", "attn."),
    ("attention.output.dense.", "attn.proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("lambda_", "scale"),
    ("pooler.layernorm.", "pool_norm."),
    ("layernorm.", "norm."),
)
"""Parts of names in BEiT, and what takes their place, one after the other."""

TEXT_NAMES = (
    ("embeddings.word_embeddings.", "word."),
    ("embeddings.position_embeddings.", "position."),
    ("embeddings.token_type_embeddings.", "kind."),
    ("embeddings.LayerNorm.", "norm."),
    ("encoder.layer.", "layers."),
    ("crossattention.self.", "cross."),
    ("crossattention.output.dense.", "cross.proj."),
    ("crossattention.output.LayerNorm.", "cross.norm."),
    ("attention.self.", "attn."),
    ("attention.output.dense.", "attn.proj."),
    ("attention.output.LayerNorm.", "attn.norm."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("output.LayerNorm.", "norm."),
)
"""The same in BERT."""

HEAD_NAMES = (("transform.dense.", "dense."), ("transform.LayerNorm.", "norm."))
"""The same in BERT's head for masked words, after ``cls.predictions.``."""

CONSTANTS = ("relative_position_index", "position_ids", "token_order")
"""Ends of the names of what checkpoints hold without its being learned."""

Names = Iterable[tuple[str, str]]


def renamed(name: str, names: Names) -> str:
    """An official name, as it is here."""
    for official, ours in names:
        name = name.replace(official, ours)
    return name


def learned(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """What is learned, under its names here."""
    return {renamed(name, names): x for name, x in weights.items() if not name.endswith(CONSTANTS)}


def video_weights(op: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a ``BeitModel``."""
    first = "encoder.layer.0.intermediate.dense.weight"
    needed = "embeddings.patch_embeddings.projection.weight", "embeddings.cls_token", first
    return learned(official_weights(op, state_dict, *needed), VIDEO_NAMES)


def text_weights(op: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a ``BertModel``."""
    first = "encoder.layer.0.intermediate.dense.weight"
    needed = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", first
    return learned(official_weights(op, state_dict, *needed), TEXT_NAMES)


def head_weights(op: str, weights: Mapping[str, Tensor], embedding: Tensor) -> dict[str, Tensor]:
    """The weights of ``cls.predictions``, whose last matrix is that of the words' embedding, which it must equal."""
    weights = dict(weights)
    decoder = weights.pop("decoder.weight", embedding)
    if not torch.equal(decoder, embedding):
        raise ValueError(
            f"{op}: the weights of the words must be those that predict them, got decoder.weight.shape="
            f"{tuple(decoder.shape)} with other values than word_embeddings.weight"
        )
    weights.pop("decoder.bias", None)  # another name of the bias
    return learned(weights, HEAD_NAMES)


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def sections(op: str, config: Config) -> tuple[Config, Config]:
    """The configurations of the video encoder and of the text encoder."""
    found = section(op, config)
    if set(found) - {"video", "text"}:
        raise ValueError(f"{op}: config must have the sections video and text, got {', '.join(map(str, found))}")
    return found.get("video"), found.get("text")
