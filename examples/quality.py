"""How close a video comes to another, or its frames to those of others; what a video of fewer numbers would come to."""

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


def frame_statistics(video: Tensor) -> Tensor:
    """What is in each frame of a video ``(C, T, H, W)``: ``(T, 8 C)`` float64.

    Of each channel the mean of every quarter of the frame, and how much pixels differ in it: the standard deviation,
    the mean difference of neighbours in a column and in a row, and that of frames half as large.
    """
    frames = video.double().transpose(0, 1)
    small = F.avg_pool2d(frames, 2)
    steps = [x.diff(dim=dim).abs().mean((2, 3)) for x, dim in ((frames, 2), (frames, 3), (small, 2))]
    return torch.cat([F.adaptive_avg_pool2d(frames, 2).flatten(1), frames.flatten(2).std(2), *steps], 1)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Between the normal distributions with the means and the covariances of samples ``(N, F)`` and ``(M, F)``.

    The square root of what Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), give for images.
    """
    roots = []
    for samples in (x, y):
        values, vectors = torch.linalg.eigh(samples.T.cov(correction=0))
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    shared = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    spread = sum(root.square().sum() for root in roots) - 2 * shared
    return math.sqrt(max(0.0, ((x.mean(0) - y.mean(0)).square().sum() + spread).item()))


def jumps(video: Tensor) -> Tensor:
    """The mean change of a pixel from each frame of a video ``(C, T, H, W)`` to the next: ``(T - 1,)``."""
    return video.diff(dim=1).abs().mean((0, 2, 3))
