"""SViTT: matches texts and videos, with sparse edges and sparse nodes that keep the cost small.

    video  (B, T, 3, H, W) -> video encoder -> tokens, few of them  -> one vector -+-> similarity: contrastive loss
    text   words           -> text encoder  -> tokens               -> first one  -+
                                                 +-- reads the video's tokens -> first one: do they belong together?
                                                                              -> masked words

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023). To find a text for a video
or a video for a text, similarity ranks all, and the encoder that reads both ranks the best ones again: the second is
right more often, and costs a pass for each pair.

:class:`SViTT` is the whole model, and :class:`VideoAnswers` one that answers questions. Their parts are a
:class:`VideoEncoder`, with its :class:`Sparsity`, and :class:`TextEncoder`. What they give is saved by
:func:`torch.save`, and read by :func:`torch.load` with ``weights_only=True`` wherever this package was imported.
"""

import torch

from vattn.models.draws import Draws
from vattn.models.svitt.answers import VideoAnswers
from vattn.models.svitt.losses import (
    Losses,
    Negatives,
    contrastive_loss,
    draw_negatives,
    mask_words,
    masked_word_loss,
    matching_loss,
    negative_weights,
)
from vattn.models.svitt.model import SViTT
from vattn.models.svitt.orders import TOKEN_ORDERS, token_order
from vattn.models.svitt.retrieval import Ranking, rank_texts, rank_videos, recall
from vattn.models.svitt.sparsity import Sparsity
from vattn.models.svitt.text import Fused, TextEncoder, TokenHead
from vattn.models.svitt.video import SparseBlock, VideoEncoder, VideoTokens, expand

__all__ = [
    "TOKEN_ORDERS",
    "Draws",
    "Fused",
    "Losses",
    "Negatives",
    "Ranking",
    "SViTT",
    "SparseBlock",
    "Sparsity",
    "TextEncoder",
    "TokenHead",
    "VideoAnswers",
    "VideoEncoder",
    "VideoTokens",
    "contrastive_loss",
    "draw_negatives",
    "expand",
    "mask_words",
    "masked_word_loss",
    "matching_loss",
    "negative_weights",
    "rank_texts",
    "rank_videos",
    "recall",
    "token_order",
]

torch.serialization.add_safe_globals([Fused, Losses, Negatives, Ranking, Sparsity, VideoTokens])
