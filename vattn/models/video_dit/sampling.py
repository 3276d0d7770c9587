"""Clips of the length that a :class:`VideoDiT` was trained on, all frames of which lose their noise together.

    x_t = a_t x_0 + s_t e  ->  x_0 and e, as the model has them  ->  x_t' = a_t' x_0 + s_t' e

Song et al., "Denoising Diffusion Implicit Models" (ICLR 2021), without noise of its own; for flow it is Euler's method.
Longer videos are those of :mod:`vattn.models.fifo`.
"""

import torch
from torch import Tensor

from vattn import _checks
from vattn.models.draws import Randomness, draws_of
from vattn.models.sampling import progress_bar
from vattn.models.settings import number
from vattn.models.video_dit.model import VideoDiT


@torch.no_grad()
def generate(
    model: VideoDiT,
    batch: int = 1,
    *,
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    classes: Tensor | None = None,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    generator: Randomness = None,
    progress: bool = False,
) -> Tensor:
    """Clips from noise.

    Args:
        model: in evaluation mode.
        batch: B, how many.
        num_steps: how often the model is called; twice as often with guidance.
        guidance_scale: s of classifier-free guidance, ``u + s (c - u)`` of predictions c with and u without class and
            text. 1 is none.
        classes, text, text_mask: as in :class:`VideoDiT`.
        generator: a generator, or :class:`vattn.models.draws.Draws`; its seed decides the clips.
        progress: show a bar.

    Returns:
        ``(B, channels, T, height, width)``, of the dtype and on the device of the model.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.

    Source:
        Song et al., "Denoising Diffusion Implicit Models" (ICLR 2021); Ho and Salimans, "Classifier-Free Diffusion
        Guidance" (2022).

    Example:
        >>> model = VideoDiT(3, num_frames=2, size=8, dim=32, depth=1, num_heads=2, levels=(1,)).eval()
        >>> generate(model, 5, num_steps=2, generator=torch.Generator()).shape
        torch.Size([5, 3, 2, 8, 8])
    """
    if model.training:
        raise ValueError("generate: model must be in evaluation mode, got model.training=True")
    _checks.integer("generate", "batch", batch, least=0)
    _checks.integer("generate", "num_steps", num_steps, least=1)
    number("generate", "guidance_scale", guidance_scale, 0)
    places = model.places
    x = draws_of(generator).normal(batch, *model.shape, device=places.device).to(places.dtype)
    timesteps, a, s = model.noising.path(num_steps, places.device)
    for i in progress_bar(range(num_steps), "VideoDiT", progress):
        predicted = model(x, timesteps[i], classes=classes, text=text, text_mask=text_mask)
        if guidance_scale != 1 and (classes is not None or text is not None):
            free = model(x, timesteps[i])
            predicted = free + guidance_scale * (predicted - free)
        video, noise = model.noising.split(x, predicted, a[i].to(x.dtype), s[i].to(x.dtype))
        x = a[i + 1].to(x.dtype) * video + s[i + 1].to(x.dtype) * noise
    return x
