"""How close a video comes to another."""

import math

import torch.nn.functional as F
from torch import Tensor


def peak_signal_to_noise(video: Tensor, reconstruction: Tensor) -> float:
    """In dB, for pixels from -1 to 1."""
    return 10 * math.log10(4 / F.mse_loss(reconstruction.clamp(-1, 1), video).item())
