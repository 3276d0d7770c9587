"""A small video diffusion transformer, for those who have no pretrained denoiser.

    noise.py     shares of video and noise at every timestep, and what is predicted: epsilon, v or flow
    layers.py    the blocks: leap attention, attention along time, to texts, and what conditions them
    model.py     VideoDiT: noised frames, each with its timestep, to predictions; the training loss
    sampling.py  clips of the length that it was trained on

Longer videos are made by :mod:`vattn.models.fifo`, whose `denoise` a :class:`VideoDiT` is.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023); Chen et al., "Diffusion Forcing: Next-token
Prediction Meets Full-Sequence Diffusion" (NeurIPS 2024).
"""

from vattn.models.video_dit.layers import Block
from vattn.models.video_dit.model import VideoDiT
from vattn.models.video_dit.noise import PREDICTIONS
from vattn.models.video_dit.sampling import generate

__all__ = ["PREDICTIONS", "Block", "VideoDiT", "generate"]
