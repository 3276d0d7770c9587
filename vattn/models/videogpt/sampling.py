"""Videos code by code, each drawn from what VideoGPT says after those before it.

Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vattn.models.draws import Randomness, draws_of
from vattn.models.sampling import codes_shape, draw_tokens, progress_bar, require_valid
from vattn.models.videogpt.model import VideoGPT


@torch.no_grad()
def generate(
    model: VideoGPT,
    shape: int | Sequence[int] = 1,
    *,
    classes: Tensor | None = None,
    frames: Tensor | None = None,
    generator: Randomness = None,
    progress: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Videos from nothing, or from their class and first frames.

    Args:
        model: in evaluation mode.
        shape: of the codes, ``(B, *grid)``, where the first axis may be shorter than the model's: it costs less; or B,
            for so many videos of the model's own grid.
        classes, frames: as in :class:`VideoGPT`.
        generator: a generator, or :class:`vattn.models.draws.Draws`; its seed decides the sample.
        progress: show a bar.
        temperature, top_k, top_p: see :func:`vattn.models.sampling.sample_tokens`.

    Returns:
        Codes of `shape`, int64.

    Raises:
        ValueError: a setting that does not fit, or logits that are not finite.

    Source:
        Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).

    Example:
        >>> model = VideoGPT(10, 4, grid=(2, 3, 3), dim=12, num_heads=2, num_layers=1).eval()
        >>> generate(model, 5, generator=torch.Generator()).shape, generate(model, (5, 1, 3, 3)).shape
        (torch.Size([5, 2, 3, 3]), torch.Size([5, 1, 3, 3]))
    """
    if model.training:
        raise ValueError("generate: model must be in evaluation mode, got model.training=True")
    batch, *grid = codes_shape("generate", model, shape)
    if len(grid) != len(model.grid) or not 1 <= grid[0] <= model.grid[0] or tuple(grid[1:]) != model.grid[1:]:
        raise ValueError(f"generate: shape must be B or (B, {', '.join(map(str, model.grid))}), got {shape=}")
    draws, state = draws_of(generator), model.begin(batch, classes=classes, frames=frames)
    valid: list[Tensor] = []
    codes = [torch.zeros(batch, dtype=torch.int64, device=model.embeddings.device)]  # comes before the first one
    for _ in progress_bar(range(math.prod(grid)), "VideoGPT", progress):
        logits = model.step(codes[-1], state)
        tokens, _, is_valid = draw_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=draws)
        codes.append(tokens)
        valid.append(is_valid)
    require_valid("generate", valid)
    return torch.stack(codes[1:], 1).unflatten(1, grid)
