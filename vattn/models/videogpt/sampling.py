"""Videos code by code, each drawn from what VideoGPT says after those before it.

Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).
"""

from typing import Any

import torch
from torch import Tensor

from vattn.models._common import progress_bar
from vattn.models._draws import Randomness, draws_of
from vattn.models.sampling import sample_tokens
from vattn.models.videogpt.model import VideoGPT


@torch.no_grad()
def generate(
    model: VideoGPT,
    batch: int = 1,
    *,
    classes: Tensor | None = None,
    frames: Tensor | None = None,
    generator: Randomness = None,
    progress: bool = False,
    **sampling: Any,
) -> Tensor:
    """Videos from nothing, or from their class and first frames, code by code.

    Args:
        model: in evaluation mode.
        batch: how many videos.
        classes, frames: as in :class:`VideoGPT`.
        generator: a generator, or :class:`vattn.models.mebt.Draws`; its seed decides the sample.
        progress: show a bar.
        sampling: `temperature`, `top_k` and `top_p` of :func:`vattn.models.mebt.sample_tokens`.

    Returns:
        Codes ``(batch, *grid)`` int64.

    Raises:
        ValueError: a setting that does not fit.

    Source:
        Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).
    """
    if model.training:
        raise ValueError("generate: model must be in evaluation mode, got model.training=True")
    draws, state = draws_of(generator), model.begin(batch, classes=classes, frames=frames)
    codes = [torch.zeros(batch, dtype=torch.int64, device=model.embeddings.device)]  # comes before the first one
    for _ in progress_bar(range(torch.Size(model.grid).numel()), "VideoGPT", progress):
        codes.append(sample_tokens(model.step(codes[-1], state), **sampling, generator=draws)[0])
    return torch.stack(codes[1:], 1).unflatten(1, model.grid)
