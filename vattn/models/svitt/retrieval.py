"""Finding texts for videos and videos for texts: similarity first, then a closer look at the best ones.

    similarity          5.1  4.9  4.8 | 3.0  2.2        of all, from one vector each
    candidates            b    e    a |   c    d
    do they match?      0.3  2.1  0.9 |                 of the first three, from all tokens of both
    ranking               e    a    b     c    d

Li et al., "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation" (NeurIPS 2021).
"""

import torch
from torch import Tensor

from vattn.models.sampling import progress_bar
from vattn.models.svitt.model import SViTT
from vattn.models.svitt.video import VideoTokens


@torch.no_grad()
def rank_texts(
    model: SViTT,
    videos: VideoTokens,
    texts: Tensor,
    mask: Tensor | None = None,
    *,
    rerank: int = 128,
    progress: bool = False,
) -> Tensor:
    """For each video all texts, the best one first.

    The tokens of a video are projected once for all texts that are looked at again.

    Args:
        model: in evaluation mode.
        videos: what `model.encode_video` gave for V videos.
        texts, mask: what `model.text` gave for T texts, ``(T, L, C)``, and what of it is not padding.
        rerank: how many texts of each video are looked at again, 0 for none.
        progress: show a bar.

    Returns:
        ``(V, T)`` int64, numbers of texts.

    Raises:
        ValueError: `model` is in training mode.

    Source:
        Li et al., "Align before Fuse", on image-text retrieval.

    Example:
        >>> size = {"dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
        >>> video = {"num_frames": 2, "image_size": 16, "patch_size": 8, "sparsity": {"keep": 1.0}, **size}
        >>> model = SViTT(video, text={"vocab_size": 100, "fusion_layer": 1, **size}).eval()
        >>> videos, texts = model.encode_video(torch.randn(3, 2, 3, 16, 16)), model.text(torch.randint(100, (4, 6)))
        >>> rank_texts(model, videos, texts).shape, rank_videos(model, videos, texts, rerank=2).shape
        (torch.Size([3, 4]), torch.Size([4, 3]))
    """
    ranking = _start("rank_texts", model, model.similarity(videos.pooled, texts[:, 0]))
    for i in progress_bar(range(len(ranking) if rerank else 0), "rank texts", progress):
        best = ranking[i, :rerank]
        logits = model.match(videos.tokens[i : i + 1], texts[best], None if mask is None else mask[best])
        ranking[i, :rerank] = best[_descending(logits[:, 1])]
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
) -> Tensor:
    """For each text all videos, the best one first: ``(T, V)`` int64, as :func:`rank_texts` otherwise."""
    ranking = _start("rank_videos", model, model.similarity(videos.pooled, texts[:, 0]).T)
    for i in progress_bar(range(len(ranking) if rerank else 0), "rank videos", progress):
        best = ranking[i, :rerank]
        text = texts[i].expand(len(best), -1, -1)
        logits = model.match(videos.tokens[best], text, None if mask is None else mask[i].expand(len(best), -1))
        ranking[i, :rerank] = best[_descending(logits[:, 1])]
    return ranking


def recall(ranking: Tensor, right: Tensor, k: int) -> float:
    """The share of queries that have a right answer among their first `k`.

    Args:
        ranking: ``(queries, answers)`` int64, the best one first.
        right: bool ``(queries, answers)``: whether an answer, by its number, is right.
        k: how many answers count.

    Example:
        >>> ranking = torch.tensor([[1, 0, 2], [0, 2, 1]])
        >>> [round(recall(ranking, torch.eye(3, dtype=torch.bool)[:2], k), 2) for k in (1, 2, 3)]
        [0.0, 0.5, 1.0]
    """
    return right.gather(1, ranking[:, :k]).any(1).double().mean().item()


def _start(op: str, model: SViTT, similarity: Tensor) -> Tensor:
    if model.training:
        raise ValueError(f"{op}: model must be in evaluation mode, got model.training=True")
    return _descending(similarity)


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True)
