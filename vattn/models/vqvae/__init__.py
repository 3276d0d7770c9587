"""Tokenizers: a video becomes a grid of codes, and codes become a video.

z = W_pre encoder(video),  codes = nearest(z),  video = decoder(W_post e_codes)

tokenizer.py  what both share: convolutions that divide the size of a video, the way to codes and back, the loss
codebook.py   codes, and how they follow the vectors that they stand for
vqvae.py      VideoGPT's: strided convolutions, then residual blocks with axial attention
vqgan.py      MeBT's: convolutions only
"""

import torch

from vattn.models.vqvae.codebook import Codebook, Quantized
from vattn.models.vqvae.tokenizer import SamePadConv3d, SamePadConvTranspose3d, Tokenizer, level_strides
from vattn.models.vqvae.vqgan import VQGAN
from vattn.models.vqvae.vqvae import PIXEL_VARIANCE, VQVAE, AttentionResidualBlock, AxialBlock

__all__ = [
    "PIXEL_VARIANCE",
    "VQGAN",
    "VQVAE",
    "AttentionResidualBlock",
    "AxialBlock",
    "Codebook",
    "Quantized",
    "SamePadConv3d",
    "SamePadConvTranspose3d",
    "Tokenizer",
    "level_strides",
]

torch.serialization.add_safe_globals([Quantized])
