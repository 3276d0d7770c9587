"""VideoGPT's prior: codes of a video one after the other, each from those before it.

    model.py     VideoGPT: codes, classes and first frames to logits
    layers.py    the blocks: norms, causal attention full and sparse, cross-attention, kept keys and values
    resnet.py    the 3-D ResNet that sees the first frames
    sampling.py  generation, code by code, from first codes, and longer than the model's grid

Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).
"""

import torch

from vattn.models.videogpt.layers import AttentionStack, Decoding, KeyValueCache
from vattn.models.videogpt.model import VideoGPT
from vattn.models.videogpt.resnet import ResNet3d
from vattn.models.videogpt.sampling import extend_video, generate, stream_video

__all__ = [
    "AttentionStack",
    "Decoding",
    "KeyValueCache",
    "ResNet3d",
    "VideoGPT",
    "extend_video",
    "generate",
    "stream_video",
]

torch.serialization.add_safe_globals([Decoding, KeyValueCache])
