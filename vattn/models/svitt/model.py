"""SViTT itself: a video encoder and a text encoder, three losses to learn from, and the scores of pairs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vattn import _checks
from vattn.layout import BlockLayout
from vattn.models.cards import random_video
from vattn.models.checkpoints import PretrainedModel, official_weights
from vattn.models.draws import Randomness
from vattn.models.layers import init_linear
from vattn.models.seeded_draws import draws_in
from vattn.models.settings import Config, number, probabilities
from vattn.models.svitt.losses import (
    Losses,
    Negatives,
    contrastive_loss,
    draw_negatives,
    mask_words,
    masked_word_loss,
    matching_loss,
)
from vattn.models.svitt.text import TextEncoder, TokenHead, text_settings
from vattn.models.svitt.video import VideoEncoder, VideoTokens, video_settings
from vattn.models.svitt.weights import head_weights, part, sections, text_weights, video_weights


class SViTT(PretrainedModel):
    """A video encoder and a text encoder, which score pairs of a video and a text, separately and jointly.

    Args:
        video, text: settings of the :class:`VideoEncoder` and of the :class:`TextEncoder`, whose `video_dim` are the
            channels of the video encoder; None for the official ones.
        embed_dim: channels in which videos and texts are compared.
        temperature: what similarities are divided by, at first; it is learned, and used from 0.001 to 0.5.
        predict_words: whether there is a head for masked words.
        mask_id, never_masked, mask_share: see :func:`vattn.models.svitt.mask_words`.

    Shape:
        video ``(B, T, 3, H, W)``, ids ``(B, L)`` int64 and mask ``(B, L)``, 0 for padding, or None, to :class:`Losses`.
        Pairs of the same `pair_ids` ``(B,)`` belong to each other. The seed of `generator` decides who reads whom,
        which negatives are tried and which words are masked; without one it is torch's own in training, and in
        evaluation the `eval_seed` of the video encoder.

    Raises:
        ValueError: encoders that do not fit, or a batch without negatives.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers".

    Example:
        >>> size = {"dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
        >>> sparsity = {"block_size": 4, "num_random": 1, "keep": 0.5, "prune_after": (0,)}
        >>> model = SViTT(
        ...     video={"num_frames": 2, "image_size": 16, "patch_size": 8, "sparsity": sparsity, **size},
        ...     text={"vocab_size": 110, "fusion_layer": 1, **size},
        ...     embed_dim=16,
        ... )
        >>> video, ids = torch.randn(3, 2, 3, 16, 16), torch.randint(1, 100, (3, 5))
        >>> losses = model(video, ids, generator=torch.Generator())
        >>> model.training_loss(video, ids, generator=torch.Generator()).backward()         # losses.total
    """

    video: VideoEncoder
    text: TextEncoder

    def __init__(
        self,
        video: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        *,
        embed_dim: int = 256,
        temperature: float = 0.07,
        predict_words: bool = True,
        mask_id: int = 103,
        never_masked: Collection[int] = (0, 101),
        mask_share: float = 0.5,
    ) -> None:
        super().__init__()
        for name, setting, least in (("embed_dim", embed_dim, 1), ("mask_id", mask_id, 0)):
            _checks.integer("SViTT", name, setting, least=least)
        number("SViTT", "temperature", temperature, 0, above=True)
        probabilities("SViTT", mask_share=mask_share)
        self.mask_id, self.never_masked, self.mask_share = mask_id, tuple(never_masked), mask_share
        self.video = VideoEncoder(**(video or {}))
        width = self.video.cls_token.shape[2]
        self.video_norm = nn.LayerNorm(width, eps=1e-12)
        self.text = TextEncoder(**{"video_dim": width, **(text or {})})
        dim = self.text.word.embedding_dim
        if self.text.video_dim != width:
            raise ValueError(
                f"SViTT: text must read the {width} channels of the video encoder, got video_dim={self.text.video_dim}"
            )
        self.video_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(dim, embed_dim)
        self.temperature = nn.Parameter(torch.tensor([float(temperature)]))  # FSDP2 shards no scalar
        self.match_head = nn.Linear(dim, 2)
        self.word_head = TokenHead(dim, self.text.word.num_embeddings) if predict_words else None
        for layer in (self.video_proj, self.text_proj, self.match_head):
            init_linear(layer)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> "SViTT":
        """The model of an official checkpoint, pretrained or fine-tuned for retrieval, in evaluation mode.

        Args:
            state_dict: of ``Singularity`` in ``models/model_pretrain.py`` or ``models/model_retrieval.py``, with or
                without the outer dict of a checkpoint. It is copied; dtype and device stay.
            config: the official configurations in two sections, ``video`` and ``text``, see
                :meth:`VideoEncoder.from_official` and :meth:`TextEncoder.from_official`. What the official YAML files
                have as ``vision_encoder_args`` and ``text_encoder_args`` belongs to them; their ``joint_encoder_args``
                the official code does not read.
            overrides: settings of the constructor, which win over those of `config` and of the weights; in `video` and
                `text` one by one.

        Raises:
            TypeError: `config` is not a mapping, or a setting has another type.
            ValueError: there is no such setting, or the weights or the configuration do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op = "SViTT.from_official"
        cls._require_overrides(op, overrides)
        official = official_weights(
            op, state_dict, "vision_layernorm.weight", "vision_proj.weight", "itm_head.weight", "temp"
        )
        of_video, of_text = sections(op, config)
        video = video_weights(op, part(official, "vision_encoder."))
        text = text_weights(op, part(official, "text_encoder."))
        text = {name: x for name, x in text.items() if not name.startswith("cls.")}
        head = part(official, "text_encoder.cls.predictions.")
        weights = {
            "temperature": official["temp"].reshape(1),
            **{f"video.{name}": x for name, x in video.items()},
            **{f"text.{name}": x for name, x in text.items()},
            **{f"word_head.{name}": x for name, x in head_weights(op, head, text["word.weight"]).items()},
        }
        for name, theirs in (
            ("video_norm", "vision_layernorm"), ("video_proj", "vision_proj"), ("text_proj", "text_proj"),
            ("match_head", "itm_head"),
        ):  # fmt: skip
            weights |= {f"{name}.{end}": x for end, x in part(official, f"{theirs}.").items()}
        settings = {
            "video": video_settings(op, video, of_video, overrides.get("video")),
            "text": text_settings(op, text, of_text, overrides.get("text")),
            "embed_dim": len(official["vision_proj.weight"]),
            "predict_words": bool(head),
        }
        return cls._from_weights(weights, settings, overrides)

    def _usage(self) -> str:
        words = self.text.word.num_embeddings
        return (
            f"{random_video(self.video.config)}\n"
            f"ids = torch.randint({words}, (1, 4))  # of words, from a tokenizer\n"
            "seen, text = model.encode_video(video), model.text(ids)\n"
            "similarity = model.similarity(seen.pooled, text[:, 0])  # of each video and each text"
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
        draws = draws_in(self.training, generator, self.video.eval_seed)
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

    def training_loss(
        self,
        video: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        pair_ids: Tensor | None = None,
        hard_negatives: bool = True,
        generator: Randomness = None,
    ) -> Tensor:
        """The sum of the :class:`Losses` of one training step, which :meth:`forward` gives one by one.

        Args:
            video, ids, mask, pair_ids, generator: see :class:`SViTT`.
            hard_negatives: see :func:`vattn.models.svitt.draw_negatives`.
        """
        return self(video, ids, mask, pair_ids=pair_ids, hard_negatives=hard_negatives, generator=generator).total

    def encode_video(
        self,
        video: Tensor,
        layouts: Sequence[BlockLayout | None] | None = None,
        *,
        generator: Randomness = None,
    ) -> VideoTokens:
        """The tokens of a video that the text encoder reads, and its vector; see :class:`VideoEncoder`."""
        self.video._require_all_tokens("SViTT.encode_video")
        seen = self.video(video, layouts, generator=generator)
        return cast(VideoTokens, seen._replace(tokens=self.video_norm(seen.tokens)))

    def embed_video(self, video: Tensor, *, generator: Randomness = None) -> Tensor:
        """The vector of each video ``(B, T, 3, H, W)``, of length 1: ``(B, embed_dim)``.

        In evaluation a video has the same vector in each call, alone and in any batch, up to rounding. The products
        with the vectors of :meth:`embed_text` are cosines, which rank as :meth:`similarity` does.
        """
        return F.normalize(self.video_proj(self.video(video, generator=generator).pooled), dim=-1)

    def embed_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The vector of each text ``(B, L)``, of length 1: ``(B, embed_dim)``."""
        return F.normalize(self.text_proj(self.text(ids, mask)[:, 0]), dim=-1)

    def similarity(self, videos: Tensor, texts: Tensor) -> Tensor:
        """The similarity of vectors of videos ``(V, C)`` and first tokens of texts ``(T, C)``, ``(V, T)``."""
        videos, texts = F.normalize(self.video_proj(videos), dim=-1), F.normalize(self.text_proj(texts), dim=-1)
        return videos @ texts.T / _within(self.temperature, 0.001, 0.5)

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
            generator=draws_in(self.training, generator, self.video.eval_seed),
        )  # fmt: skip
        fused = self.text.fuse(self.text(masked, mask), mask, video)
        return masked_word_loss(self.word_head(fused.tokens, words), labels)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}temperature"
        if name in state_dict and state_dict[name].dim() == 0:  # as in older checkpoints
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _renewed(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.reshape(1) if name == "temperature" and x.dim() == 0 else x for name, x in weights.items()}

    def extra_repr(self) -> str:
        return f"mask_id={self.mask_id}, never_masked={self.never_masked}, mask_share={self.mask_share}"


def _within(x: Tensor, least: float, most: float) -> Tensor:
    """`x` between two bounds. Beyond one, its gradient is left out unless a step against it leads back.

    So a weight that a step has brought outside comes back as soon as the loss asks for it, and goes no further; and the
    weight itself is not changed, which other passes through the model may still need for their backward.
    """
    bounded = (x - x.detach()) + x.detach().clamp(least, most)
    if bounded.requires_grad:
        outwards = torch.stack([x.detach() < least, x.detach() > most])
        bounded.register_hook(lambda grad: grad.masked_fill((outwards & torch.stack([grad > 0, grad < 0])).any(0), 0))
    return bounded
