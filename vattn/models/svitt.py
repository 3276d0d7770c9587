"""SViTT: which text tells what happens in which video, at a cost that few tokens and few edges make small.

    video  (B, T, 3, H, W) -> video encoder -> tokens, few of them  -> one vector -+-> similarity: contrastive loss
    text   words           -> text encoder  -> tokens               -> first one  -+
                                                 +-- reads the video's tokens -> first one: do they belong together?
                                                                              -> masked words

SViTT: Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023). To find a text for a video
or a video for a text, similarity ranks all, and the encoder that reads both ranks the best ones again: the second is
right more often, and costs a pass for each pair.

The parts have files of their own, and all names are here, too: the video encoder in :mod:`vattn.models.svitt_video`,
the text encoder in :mod:`vattn.models.svitt_text`, losses in :mod:`vattn.models.svitt_losses`, retrieval in
:mod:`vattn.models.svitt_retrieval`, answers to questions in :mod:`vattn.models.svitt_answers`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn.layout import BlockLayout
from vattn.models._svitt_weights import head_weights, part, text_weights, video_weights
from vattn.models.checkpoints import load, official_weights
from vattn.models.draws import Draws, Randomness, draws_of
from vattn.models.layers import init_linear
from vattn.models.svitt_answers import VideoAnswers
from vattn.models.svitt_losses import (
    Negatives,
    contrastive_loss,
    draw_negatives,
    mask_words,
    masked_word_loss,
    matching_loss,
    negative_weights,
)
from vattn.models.svitt_retrieval import rank_texts, rank_videos, recall
from vattn.models.svitt_text import Fused, TextEncoder, TokenHead, text_settings
from vattn.models.svitt_video import SparseBlock, Sparsity, VideoEncoder, VideoTokens, expand, video_settings
from vattn.models.token_order import TOKEN_ORDERS, token_order

__all__ = [
    "TOKEN_ORDERS",
    "Draws",
    "Fused",
    "Losses",
    "Negatives",
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


class Losses(NamedTuple):
    """The losses of one training step, scalars; `masked_words` is 0 without a head for words."""

    contrastive: Tensor
    matching: Tensor
    masked_words: Tensor

    @property
    def total(self) -> Tensor:
        return self.contrastive + self.matching + self.masked_words


class SViTT(nn.Module):
    """A video encoder and a text encoder, which tell alone and together whether a video and a text belong together.

    Args:
        video, text: the encoders; the text encoder's `video_dim` are the channels of the video encoder.
        embed_dim: channels in which videos and texts are compared.
        temperature: what similarities are divided by, at first; it is learned.
        predict_words: whether there is a head for masked words.
        mask_id, never_masked, mask_share: see :func:`vattn.models.svitt_losses.mask_words`.

    Shape:
        video ``(B, T, 3, H, W)``, ids ``(B, L)`` int64 and mask ``(B, L)``, 0 for padding, or None, to :class:`Losses`.
        Pairs of the same `pair_ids` ``(B,)`` belong to each other. The seed of `generator` decides who reads whom,
        which negatives are tried and which words are masked.

    Raises:
        ValueError: encoders that do not fit, or a batch without negatives.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers".

    Example:
        >>> video = VideoEncoder(2, image_size=16, patch_size=8, dim=32, depth=2, num_heads=2, mlp_dim=64,
        ...                      sparsity=Sparsity(block_size=4, num_random=1, keep=0.5, prune_after=(0,)))
        >>> text = TextEncoder(110, 32, 2, 2, 64, fusion_layer=1, video_dim=32, keep=0.5, prune_after=())
        >>> model = SViTT(video, text, embed_dim=16)
        >>> losses = model(torch.randn(3, 2, 3, 16, 16), torch.randint(1, 100, (3, 5)), generator=torch.Generator())
        >>> losses.total.backward()
    """

    def __init__(
        self,
        video: VideoEncoder,
        text: TextEncoder,
        *,
        embed_dim: int = 256,
        temperature: float = 0.07,
        predict_words: bool = True,
        mask_id: int = 103,
        never_masked: Collection[int] = (0, 101),
        mask_share: float = 0.5,
    ) -> None:
        super().__init__()
        width, dim = video.cls_token.shape[2], text.word.embedding_dim
        self.mask_id, self.never_masked, self.mask_share = mask_id, tuple(never_masked), mask_share
        self.video = video
        self.video_norm = nn.LayerNorm(width, eps=1e-12)
        self.text = text
        self.video_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(dim, embed_dim)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.match_head = nn.Linear(dim, 2)
        self.word_head = TokenHead(dim, text.word.num_embeddings) if predict_words else None
        for layer in (self.video_proj, self.text_proj, self.match_head):
            init_linear(layer)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Any],
        video_config: Mapping[str, Any],
        text_config: Mapping[str, Any],
        **settings: Any,
    ) -> "SViTT":
        """The model of an official checkpoint, pretrained or fine-tuned for retrieval, in evaluation mode.

        Args:
            state_dict: of ``Singularity`` in ``models/model_pretrain.py`` or ``models/model_retrieval.py``, with or
                without the outer dict of a checkpoint. It is copied; dtype and device stay.
            video_config, text_config: see :meth:`VideoEncoder.from_official` and :meth:`TextEncoder.from_official`.
                What the official YAML files have as ``vision_encoder_args`` and ``text_encoder_args`` belongs to them;
                their ``joint_encoder_args`` the official code does not read.
            settings: of the constructor.

        Raises:
            ValueError: the weights or the configuration do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op = "SViTT.from_official"
        official = official_weights(op, state_dict, "vision_layernorm.weight", "vision_proj.weight", "itm_head.weight")
        video = video_weights(op, part(official, "vision_encoder."))
        text = text_weights(op, part(official, "text_encoder."))
        text = {name: x for name, x in text.items() if not name.startswith("cls.")}
        head = part(official, "text_encoder.cls.predictions.")
        weights = {
            "temperature": official["temp"],
            **{f"video.{name}": x for name, x in video.items()},
            **{f"text.{name}": x for name, x in text.items()},
            **{f"word_head.{name}": x for name, x in head_weights(op, head, text["word.weight"]).items()},
        }
        for name, theirs in (
            ("video_norm", "vision_layernorm"), ("video_proj", "vision_proj"), ("text_proj", "text_proj"),
            ("match_head", "itm_head"),
        ):  # fmt: skip
            weights |= {f"{name}.{end}": x for end, x in part(official, f"{theirs}.").items()}
        return load(
            weights,
            lambda: cls(
                VideoEncoder(**video_settings(video, video_config)),
                TextEncoder(**text_settings(text, text_config)),
                embed_dim=len(official["vision_proj.weight"]),
                predict_words=bool(head),
                **settings,
            ),
        )

    def forward(
        self,
        video: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        pair_ids: Tensor | None = None,
        hard_negatives: bool = True,
        generator: Randomness = None,
    ) -> Losses:
        draws = draws_of(generator)
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        seen, text = self.encode_video(video, generator=draws), self.text(ids, mask)
        similarity = self.similarity(seen.pooled, text[:, 0])
        negatives = draw_negatives(similarity, pair_ids, hard=hard_negatives, generator=draws)
        masked_words = similarity.new_zeros(())
        if self.word_head is not None:
            masked_words = self.masked_word_loss(seen.tokens, ids, mask, generator=draws)
        return Losses(
            contrastive_loss(similarity, pair_ids),
            matching_loss(self.match_negatives(seen.tokens, text, mask, negatives)),
            masked_words,
        )

    def encode_video(
        self,
        video: Tensor,
        layouts: Sequence[BlockLayout | None] | None = None,
        *,
        generator: Randomness = None,
    ) -> VideoTokens:
        """What the text encoder reads of a video, and the vector it is found by; see :class:`VideoEncoder`."""
        seen = self.video(video, layouts, generator=generator)
        return cast(VideoTokens, seen._replace(tokens=self.video_norm(seen.tokens)))

    def similarity(self, videos: Tensor, texts: Tensor) -> Tensor:
        """The similarity of vectors of videos ``(V, C)`` and first tokens of texts ``(T, C)``, ``(V, T)``."""
        videos, texts = F.normalize(self.video_proj(videos), dim=-1), F.normalize(self.text_proj(texts), dim=-1)
        return videos @ texts.T / self.temperature

    def match(self, video: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whether each text belongs to its video: the logits of no and yes, ``(B, 2)``.

        Args:
            video: tokens of :meth:`encode_video`, ``(B, 1 + K, C)``, or ``(1, 1 + K, C)`` for one video.
            text, mask: tokens of the text encoder, ``(B, L, C)``, and what is not padding.
        """
        return self.match_head(self.text.fuse(text, mask, video).tokens[:, 0])

    def match_negatives(self, video: Tensor, text: Tensor, mask: Tensor | None, negatives: Negatives) -> Tensor:
        """The logits ``(3N, 2)`` of N pairs, of their texts with wrong videos, of their videos with wrong texts."""
        videos = torch.cat([video, video[negatives.video], video])
        texts = torch.cat([text, text, text[negatives.text]])
        return self.match(videos, texts, None if mask is None else torch.cat([mask, mask, mask[negatives.text]]))

    def masked_word_loss(
        self, video: Tensor, ids: Tensor, mask: Tensor | None = None, *, generator: Randomness = None
    ) -> Tensor:
        """The loss of words that are masked, given the others and the tokens of the video."""
        if self.word_head is None:
            raise ValueError("SViTT.masked_word_loss: the model must have predict_words=True, got no head for words")
        words = self.text.word.weight
        masked, labels = mask_words(
            ids, vocab_size=len(words), mask_id=self.mask_id, never=self.never_masked, share=self.mask_share,
            generator=generator,
        )  # fmt: skip
        fused = self.text.fuse(self.text(masked, mask), mask, video)
        return masked_word_loss(self.word_head(fused.tokens, words), labels)
