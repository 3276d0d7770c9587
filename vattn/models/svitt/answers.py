"""Answers to questions about a video: a text encoder reads question and video, a decoder generates the answer.

    question -> text encoder, which reads the video -> states -> decoder: log p(answer) = sum log p(word | words before)

Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023); Li et al., "Align before Fuse:
Vision and Language Representation Learning with Momentum Distillation" (NeurIPS 2021), whose decoder this is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vattn import _checks
from vattn.models.cards import random_video
from vattn.models.checkpoints import PretrainedModel, official_weights
from vattn.models.draws import Randomness
from vattn.models.settings import Config
from vattn.models.svitt.text import TextEncoder, TokenHead, text_settings
from vattn.models.svitt.video import VideoEncoder, video_settings
from vattn.models.svitt.weights import head_weights, part, sections, text_weights, video_weights


class VideoAnswers(PretrainedModel):
    """A model that answers questions about videos.

    Args:
        video, question: settings of the encoders, as `video` and `text` in :class:`vattn.models.svitt.SViTT`.
        answer: settings of the decoder: a :class:`TextEncoder` that is causal and reads the question in all layers
            (``causal=True, fusion_layer=0``), `video_dim` being the channels of the question.

    Shape:
        video ``(B, T, 3, H, W)``, question ids ``(B, L)`` int64 and mask, answers ``(A, M)`` int64 and mask, the
        question ``of (A,)`` int64 that each one answers, and weights ``(A,)``, to a scalar: the weighted sum of
        -log p(answer), over B. Masks are 0 for padding, or None.

    Raises:
        ValueError: a decoder that is not one.

    Source:
        Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers".

    Example:
        >>> size = {"dim": 32, "num_heads": 2, "mlp_dim": 64}
        >>> video = {"num_frames": 2, "image_size": 16, "patch_size": 8, "depth": 1, "sparsity": {"keep": 1.0}, **size}
        >>> question = {"vocab_size": 50, "depth": 2, "fusion_layer": 1, **size}
        >>> model = VideoAnswers(video, question, answer={"vocab_size": 50, "depth": 1, **size}).eval()
        >>> clip, ask, answers = torch.randn(1, 2, 3, 16, 16), torch.tensor([[1, 7, 8]]), torch.tensor([[1, 5], [1, 6]])
        >>> ranking, probabilities = model.rank(clip, ask, None, answers, None)
        >>> ranking.shape, bool(torch.isclose(probabilities.sum(), torch.tensor(1.0)))
        (torch.Size([1, 2]), True)
    """

    video: VideoEncoder
    question: TextEncoder
    answer: TextEncoder

    def __init__(
        self,
        video: Mapping[str, Any] | None = None,
        question: Mapping[str, Any] | None = None,
        answer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.video = VideoEncoder(**(video or {}))
        self.video.pool_norm = nn.Identity()  # nothing asks for the vector of a video
        width = self.video.cls_token.shape[2]
        self.video_norm = nn.LayerNorm(width, eps=1e-12)
        self.question = TextEncoder(**{"video_dim": width, **(question or {})})
        words = self.question.word.embedding_dim
        self.answer = TextEncoder(**{"video_dim": words, "fusion_layer": 0, "causal": True, **(answer or {})})
        if not self.answer.causal or self.answer.fusion_layer != 0:
            raise ValueError(
                "VideoAnswers: answer must be causal and read the question in all layers, "
                f"got answer.causal={self.answer.causal}, answer.fusion_layer={self.answer.fusion_layer}"
            )
        for name, encoder, channels in (("question", self.question, width), ("answer", self.answer, words)):
            if encoder.video_dim != channels:
                raise ValueError(
                    f"VideoAnswers: {name} must read {channels} channels, got {name}.video_dim={encoder.video_dim}"
                )
        self.word_head = TokenHead(self.answer.word.embedding_dim, self.answer.word.num_embeddings)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], config: Config = None, **overrides: Any) -> "VideoAnswers":
        """The model of an official checkpoint, in evaluation mode. As in the official code, no text layer prunes.

        Args:
            state_dict: of ``Singularity`` in ``models/model_vqa.py``, with or without the outer dict of a checkpoint.
                It is copied; dtype and device stay.
            config: the official configurations in two sections, ``video`` and ``text``, see
                :meth:`VideoEncoder.from_official` and :meth:`TextEncoder.from_official`; the decoder has the heads of
                the text encoder.
            overrides: settings of the constructor, which win over those of `config` and of the weights; in `video`,
                `question` and `answer` one by one.

        Raises:
            TypeError: `config` is not a mapping, or a setting has another type.
            ValueError: there is no such setting, or the weights or the configuration do not make this model.
            RuntimeError: PyTorch's own, on missing and unexpected names and on shapes.
        """
        op = "VideoAnswers.from_official"
        cls._require_overrides(op, overrides)
        official = official_weights(op, state_dict, "vision_layernorm.weight")
        of_video, of_text = sections(op, config)
        video = video_weights(op, part(official, "vision_encoder."))
        question = text_weights(op, part(official, "text_encoder."))
        answer = text_weights(op, part(official, "text_decoder.bert."))
        head = head_weights(op, part(official, "text_decoder.cls.predictions."), answer["word.weight"])
        parts = {"video": video, "question": question, "answer": answer, "word_head": head}
        weights = {f"{name}.{end}": x for name, these in parts.items() for end, x in these.items()}
        weights |= {f"video_norm.{end}": x for end, x in part(official, "vision_layernorm.").items()}
        settings = {
            "video": video_settings(op, video, of_video, overrides.get("video")),
            "question": text_settings(op, question, of_text, overrides.get("question")) | {"keep": 1.0},
            "answer": text_settings(op, answer, of_text, overrides.get("answer")) | {"keep": 1.0, "causal": True},
        }
        return cls._from_weights(weights, settings, overrides)

    def _usage(self) -> str:
        words = self.question.word.num_embeddings
        return (
            f"{random_video(self.video.config)}\n"
            f"question = torch.randint({words}, (1, 4))  # of words, from a tokenizer\n"
            f"answers = torch.randint({self.answer.word.num_embeddings}, (3, 4))\n"
            "ranking, probabilities = model.rank(video, question, None, answers, None)"
        )

    def forward(
        self,
        video: Tensor,
        question: Tensor,
        question_mask: Tensor | None,
        answers: Tensor,
        answers_mask: Tensor | None,
        of: Tensor,
        weights: Tensor,
        *,
        generator: Randomness = None,
    ) -> Tensor:
        states = self.states(video, question, question_mask, generator=generator)
        mask = None if question_mask is None else question_mask[of]
        return -(weights * self.log_probability(states[of], mask, answers, answers_mask)).sum() / max(video.shape[0], 1)

    def training_loss(
        self,
        video: Tensor,
        question: Tensor,
        question_mask: Tensor | None,
        answers: Tensor,
        answers_mask: Tensor | None,
        of: Tensor,
        weights: Tensor,
        *,
        generator: Randomness = None,
    ) -> Tensor:
        """The loss of one training step, which is what the model gives: see :class:`VideoAnswers`."""
        return self(video, question, question_mask, answers, answers_mask, of, weights, generator=generator)

    def states(self, video: Tensor, question: Tensor, mask: Tensor | None, *, generator: Randomness = None) -> Tensor:
        """The tokens ``(B, L, C)`` of questions that have read their videos."""
        self.video._require_all_tokens("VideoAnswers")
        tokens = self.video_norm(self.video(video, generator=generator).tokens)
        return self.question.fuse(self.question(question, mask), mask, tokens).tokens

    def log_probability(
        self, states: Tensor, states_mask: Tensor | None, answers: Tensor, mask: Tensor | None
    ) -> Tensor:
        """``log p(answer)`` of ``(A, M)`` answers to as many questions, ``(A,)``: of all their words but the first."""
        log_p = self._words(states, states_mask, answers, mask)[:, :-1].log_softmax(-1)
        log_p = log_p.gather(-1, answers[:, 1:, None])[..., 0]
        return (log_p if mask is None else log_p.masked_fill(mask[:, 1:] == 0, 0.0)).sum(1)

    @torch.no_grad()
    def rank(
        self,
        video: Tensor,
        question: Tensor,
        question_mask: Tensor | None,
        answers: Tensor,
        answers_mask: Tensor | None,
        *,
        candidates: int = 128,
        generator: Randomness = None,
    ) -> tuple[Tensor, Tensor]:
        """The best of A answers to each question, the best one first.

        Those with the most likely second word are looked at whole, the first one being the same for all. They are
        ranked by log p; the official code counts their second word twice.

        Args:
            video, question, question_mask: of B questions, as in :class:`VideoAnswers`.
            answers, answers_mask: ``(A, M)`` int64, and what of it is not padding, or None.
            candidates: how many answers to each question are looked at whole.
            generator: see :class:`vattn.models.svitt.VideoEncoder`.

        Returns:
            ``(B, K)`` int64, the numbers of K = min(candidates, A) answers, and their probabilities among them.
        """
        _checks.integer("VideoAnswers.rank", "candidates", candidates, least=1)
        states = self.states(video, question, question_mask, generator=generator)
        B, K = len(states), min(candidates, len(answers))
        start = self._words(states, question_mask, answers[:1, :1].expand(B, 1), None)[:, 0]
        likely = start[:, answers[:, 1]].argsort(dim=1, descending=True, stable=True)[:, :K]
        mask = None if question_mask is None else question_mask.repeat_interleave(K, 0)
        chosen = likely.flatten()
        chosen_mask = None if answers_mask is None else answers_mask[chosen]
        log_p = self.log_probability(states.repeat_interleave(K, 0), mask, answers[chosen], chosen_mask).view(B, K)
        probabilities, order = log_p.softmax(1).sort(descending=True, stable=True)
        return likely.gather(1, order), probabilities

    def _words(self, states: Tensor, states_mask: Tensor | None, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The logits ``(A, M, V)`` of the word that follows each word."""
        read = self.answer.fuse(self.answer.embed(ids), mask, states, states_mask)
        return self.word_head(read.tokens, self.answer.word.weight)
