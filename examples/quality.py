"""How close a video comes to another, and what a video of fewer numbers would come to."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def peak_signal_to_noise(video: Tensor, reconstruction: Tensor) -> float:
    """In dB, for pixels from -1 to 1."""
    return 10 * math.log10(4 / F.mse_loss(reconstruction.clamp(-1, 1), video).item())


def structural_similarity(video: Tensor, reconstruction: Tensor) -> float:
    """SSIM, the mean over frames, channels and places, for videos ``(B, C, T, H, W)`` with pixels from -1 to 1.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004): means, variances and
    the covariance are those under a Gaussian window of 11 x 11 pixels.
    """
    bell = torch.exp(-(torch.arange(11) - 5.0).square() / (2 * 1.5**2))
    window = (bell.outer(bell) / bell.sum() ** 2)[None, None]
    x, y = ((frames.flatten(0, 2)[:, None] + 1) / 2 for frames in (video, reconstruction.clamp(-1, 1)))
    mean_x, mean_y, xx, yy, xy = (F.conv2d(image, window) for image in (x, y, x * x, y * y, x * y))
    variances, covariance = xx - mean_x**2 + yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean().item()


def shrink_and_enlarge(videos: Tensor, grid: Sequence[int]) -> Tensor:
    """Videos ``(B, C, T, H, W)`` at the size of `grid`, by averages, and back at their own size, linearly."""
    small = F.interpolate(videos, tuple(grid), mode="area")
    return F.interpolate(small, videos.shape[2:], mode="trilinear")
