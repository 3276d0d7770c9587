"""Retrieval of texts for videos and of videos for texts: by similarity, then the best ones ranked again.

    similarity          5.1  4.9  4.8 | 3.0  2.2        of all, from one vector each
    candidates            b    e    a |   c    d
    do they match?      0.3  2.1  0.9 |                 of the first three, from all tokens of both
    ranking               e    a    b |   c    d

Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation" (NeurIPS 2021).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vattn import _checks
from vattn.models.sampling import progress_bar
from vattn.models.svitt.model import SViTT
from vattn.models.svitt.video import VideoTokens


class Ranking(NamedTuple):
    """Answers to each query, the best one first, and the scores that ranked them.

    Attributes:
        indices: ``(queries, answers)`` int64, the numbers of all answers.
        similarity: ``(queries, answers)``, of these: the cosine over the temperature.
        match: ``(queries, K)``, of the first K, which were looked at again: the logit that they belong together.
    """

    indices: Tensor
    similarity: Tensor
    match: Tensor


@torch.no_grad()
def rank_texts(
    model: SViTT,
    videos: VideoTokens,
    texts: Tensor,
    mask: Tensor | None = None,
    *,
    rerank: int = 128,
    progress: bool = False,
) -> Ranking:
    """For each video all texts, the best one first.

    The tokens of a video are projected once for all texts that are looked at again.

    Args:
        model: in evaluation mode.
        videos: what `model.encode_video` gave for V videos.
        texts, mask: what `model.text` gave for T texts, ``(T, L, C)``, and what of it is not padding.
        rerank: how many texts of each video are looked at again, 0 for none.
        progress: show a bar.

    Returns:
        The numbers of texts ``(V, T)`` int64, and their scores: the first ones are ranked by `match`, the others, which
        come after all of these, by `similarity`.

    Raises:
        TypeError, ValueError: `model` is in training mode, or an argument does not fit.

    Source:
        Li et al., "Align before Fuse", on image-text retrieval.

    Example:
        >>> size = {"dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
        >>> video = {"num_frames": 2, "image_size": 16, "patch_size": 8, "sparsity": {"keep": 1.0}, **size}
        >>> model = SViTT(video, text={"vocab_size": 100, "fusion_layer": 1, **size}).eval()
        >>> videos, texts = model.encode_video(torch.randn(3, 2, 3, 16, 16)), model.text(torch.randint(100, (4, 6)))
        >>> ranking = rank_texts(model, videos, texts, rerank=2)
        >>> ranking.indices.shape, ranking.similarity.shape, ranking.match.shape
        (torch.Size([3, 4]), torch.Size([3, 4]), torch.Size([3, 2]))
    """
    ranking = _start("rank_texts", model, model.similarity(videos.pooled, texts[:, 0]), rerank)
    for i in progress_bar(range(_again(ranking)), "rank texts", progress):
        best = ranking.indices[i, : ranking.match.shape[1]]
        logits = model.match(videos.tokens[i : i + 1], texts[best], None if mask is None else mask[best])
        _look_again(ranking, i, logits[:, 1])
    return ranking


@torch.no_grad()
def rank_videos(
    model: SViTT,
    videos: VideoTokens,
    texts: Tensor,
    mask: Tensor | None = None,
    *,
    rerank: int = 128,
    progress: bool = False,
) -> Ranking:
    """For each text all videos, the best one first: ``(T, V)`` int64 and scores, as :func:`rank_texts` otherwise."""
    ranking = _start("rank_videos", model, model.similarity(videos.pooled, texts[:, 0]).T, rerank)
    for i in progress_bar(range(_again(ranking)), "rank videos", progress):
        best = ranking.indices[i, : ranking.match.shape[1]]
        text = texts[i].expand(len(best), -1, -1)
        logits = model.match(videos.tokens[best], text, None if mask is None else mask[i].expand(len(best), -1))
        _look_again(ranking, i, logits[:, 1])
    return ranking


def recall(ranking: Ranking | Tensor, right: Tensor, k: int) -> float:
    """The share of queries that have a right answer among their first `k`.

    Args:
        ranking: a ranking, or its indices ``(queries, answers)`` int64, the best one first.
        right: bool ``(queries, answers)``: whether an answer, by its number, is right.
        k: how many answers count.

    Example:
        >>> indices = torch.tensor([[1, 0, 2], [0, 2, 1]])
        >>> [round(recall(indices, torch.eye(3, dtype=torch.bool)[:2], k), 2) for k in (1, 2, 3)]
        [0.0, 0.5, 1.0]
    """
    _checks.integer("recall", "k", k, least=1)
    indices = ranking.indices if isinstance(ranking, Ranking) else ranking
    return right.gather(1, indices[:, :k]).any(1).double().mean().item()


def _start(op: str, model: SViTT, similarity: Tensor, rerank: int) -> Ranking:
    """The ranking by similarity, with room for the scores of those that are looked at again."""
    _checks.integer(op, "rerank", rerank, least=0)
    if model.training:
        raise ValueError(f"{op}: model must be in evaluation mode, got model.training=True")
    ordered, indices = similarity.sort(dim=1, descending=True, stable=True)
    return Ranking(indices, ordered, similarity.new_zeros(len(similarity), min(rerank, similarity.shape[1])))


def _again(ranking: Ranking) -> int:
    """How many queries have answers that are looked at again."""
    return len(ranking.match) if ranking.match.shape[1] else 0


def _look_again(ranking: Ranking, query: int, match: Tensor) -> None:
    """Order the first answers of a query by these logits."""
    ordered, order = match.sort(descending=True, stable=True)
    ranking.match[query] = ordered
    for row in (ranking.indices[query], ranking.similarity[query]):
        row[: len(order)] = row[: len(order)][order]
