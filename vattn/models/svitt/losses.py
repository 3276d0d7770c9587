"""The losses of SViTT: which text belongs to which video, and which words are missing.

    contrastive    cross-entropy of similarity[v, t] over t, and over v                      all pairs of a batch, cheap
    matching       cross-entropy of "do they belong together?"                               pairs and hard negatives
    masked words   cross-entropy of words that were masked, given the others and the video

Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation" (NeurIPS 2021),
whose three losses these are; Li et al., "SViTT: Temporal Learning of Sparse Video-Text Transformers" (CVPR 2023).
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vattn import _checks
from vattn.models.draws import Randomness, draws_of
from vattn.models.results import exportable
from vattn.models.settings import probabilities

IGNORED = -100
"""The label of words that no loss asks for, as in :func:`torch.nn.functional.cross_entropy`."""


@exportable
class Losses(NamedTuple):
    """The losses of one training step, scalars; `masked_words` is 0 without a head for words."""

    contrastive: Tensor
    matching: Tensor
    masked_words: Tensor

    @property
    def total(self) -> Tensor:
        return self.contrastive + self.matching + self.masked_words


@exportable
class Negatives(NamedTuple):
    """For each text a video that is not its own, and for each video a text, ``(N,)`` int64 each."""

    video: Tensor
    text: Tensor


def contrastive_loss(similarity: Tensor, ids: Tensor | None = None) -> Tensor:
    """The contrastive loss: videos retrieve their texts and texts their videos, among those of a batch.

    Args:
        similarity: ``(N, N)``, of video i and text j, divided by a temperature.
        ids: ``(N,)``: pairs of the same id belong to each other, and share the target; None if only i and i do.

    Returns:
        A scalar, the mean of both directions.

    Source:
        Li et al., "Align before Fuse", on image-text contrastive learning.

    Example:
        >>> contrastive_loss(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))
        tensor(0.0001)
    """
    same = _same(similarity, ids)
    target = same / same.sum(1, keepdim=True)
    log_p = target * (similarity.log_softmax(1) + similarity.T.log_softmax(1))
    return log_p.sum() / (-2 * max(len(similarity), 1))


def negative_weights(similarity: Tensor, ids: Tensor | None = None, *, hard: bool = True) -> tuple[Tensor, Tensor]:
    """How likely each video is to be a text's negative, ``(texts, videos)``, and each text a video's.

    Weights are not normalised. Those of `hard` negatives grow with their similarity; otherwise all are equal.

    Example:
        >>> negative_weights(torch.zeros(2, 2), hard=False)[0]
        tensor([[0., 1.],
                [1., 0.]])
    """
    log_weights = _log_weights(similarity, ids, hard)
    return log_weights[0].exp(), log_weights[1].exp()


def draw_negatives(
    similarity: Tensor, ids: Tensor | None = None, *, hard: bool = True, generator: Randomness = None
) -> Negatives:
    """A video for each text and a text for each video that do not belong together.

    They are drawn by the logarithms of :func:`negative_weights`: a model that tells all pairs apart leaves weights that
    are 0 in float32.

    Args:
        similarity, ids: as in :func:`contrastive_loss`.
        hard: draw similar ones more often.
        generator: its seed decides; None is torch's own.

    Raises:
        ValueError: a sample has no other one of another id in the batch, or a similarity is not finite.

    Source:
        Li et al., "Align before Fuse", on hard negatives for image-text matching.

    Example:
        >>> draw_negatives(torch.zeros(2, 2))
        Negatives(video=tensor([1, 0]), text=tensor([1, 0]))
    """
    draws = draws_of(generator)
    log_weights = _log_weights(similarity, ids, hard)
    if len(similarity) == 0:
        return Negatives(*(torch.zeros(0, dtype=torch.int64, device=similarity.device) for _ in log_weights))
    lonely = log_weights[0].eq(-torch.inf).all(1).any()
    is_finite, is_lonely = torch.stack([similarity.detach().isfinite().all(), lonely]).tolist()  # one wait for a GPU
    if not is_finite:
        raise ValueError(f"draw_negatives: similarity must be finite, got similarity={similarity.detach()}")
    if is_lonely:
        raise ValueError(f"draw_negatives: each sample must have one of another id, got ids={ids}")
    return Negatives(
        *((x - draws.exponential(*x.shape, device=x.device).log()).argmax(1) for x in log_weights)  # likely, or lucky
    )


def matching_loss(logits: Tensor) -> Tensor:
    """The matching loss: classifies pairs and negatives.

    Args:
        logits: ``(3N, 2)``, of no and yes: N pairs, then N texts with a wrong video, then N videos with a wrong text.

    Returns:
        A scalar, the mean over all.

    Source:
        Li et al., "Align before Fuse", on image-text matching.

    Example:
        >>> matching_loss(torch.tensor([[0.0, 9.0], [9.0, 0.0], [9.0, 0.0]]))
        tensor(0.0001)
    """
    belongs = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    belongs[: len(logits) // 3] = 1
    return F.cross_entropy(logits, belongs, reduction="sum") / max(len(logits), 1)


def mask_words(
    ids: Tensor,
    *,
    vocab_size: int,
    mask_id: int = 103,
    never: Collection[int] = (0, 101),
    share: float = 0.5,
    generator: Randomness = None,
) -> tuple[Tensor, Tensor]:
    """Hide some words: of those that are chosen, 80 % become `mask_id`, 10 % a random word, 10 % stay.

    Args:
        ids: ``(B, L)`` int64; not changed.
        vocab_size: random words are below.
        mask_id, never: of the tokenizer, the word that stands for a masked one, and words that are not chosen, such as
            padding and the first token; they default to those of BERT's.
        share: how likely a word is chosen.
        generator: its seed decides; None is torch's own.

    Returns:
        The ids to read, and the labels: the ids of the words that were chosen, -100 elsewhere.

    Raises:
        TypeError, ValueError: a setting that cannot be.

    Source:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", section 3.1.

    Example:
        >>> ids, labels = mask_words(torch.tensor([[101, 7, 8, 0]]), vocab_size=200, share=1.0)
        >>> labels
        tensor([[-100,    7,    8, -100]])
    """
    for name, setting, least in (("vocab_size", vocab_size, 1), ("mask_id", mask_id, 0)):
        _checks.integer("mask_words", name, setting, least=least)
    probabilities("mask_words", share=share)
    choice, fate, words = draws_of(generator).uniforms(3, *ids.shape, device=ids.device)
    chosen = choice < share
    for special in never:
        chosen &= ids != special
    words = (words * vocab_size).long()
    read = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, words, ids))
    return torch.where(chosen, read, ids), torch.where(chosen, ids, IGNORED)


def masked_word_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of the words that were masked, averaged over them; 0 if there are none.

    Args:
        logits: ``(B, L, V)``. labels: ``(B, L)`` int64, -100 where no word was masked.

    Example:
        >>> masked_word_loss(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, -100]]))
        tensor(1.3863)
    """
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / (labels != IGNORED).sum().clamp(min=1)


def _log_weights(similarity: Tensor, ids: Tensor | None, hard: bool) -> tuple[Tensor, Tensor]:
    """The logarithms of :func:`negative_weights`, float32 or wider: -inf for what belongs together."""
    same = _same(similarity, ids).bool()
    scores = similarity.detach().to(torch.promote_types(similarity.dtype, torch.float32))
    videos, texts = (
        (x.log_softmax(1) if hard else torch.zeros_like(x)).masked_fill(same, -torch.inf) for x in (scores.T, scores)
    )
    return videos, texts


def _same(similarity: Tensor, ids: Tensor | None) -> Tensor:
    """1 where a video and a text belong together, in the dtype of `similarity`."""
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must have shape (N, N), got similarity.shape={tuple(similarity.shape)}")
    if ids is None:
        return torch.eye(len(similarity), dtype=similarity.dtype, device=similarity.device)
    return (ids[:, None] == ids).to(similarity.dtype)
