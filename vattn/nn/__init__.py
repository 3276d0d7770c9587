"""Attention modules: projections to q, k and v, an operator, a projection back."""

from vattn.nn.axial import AxialAttention, MultiHeadAttention
from vattn.nn.heads import merge_heads, split_heads
from vattn.nn.latent import LATENT_MODES, LatentAttention, LatentBlock
from vattn.nn.leap import LeapAttention, LeapAttention2d, attend_frames, leap_of_level, require_only
from vattn.nn.sparse import SparseSelfAttention

__all__ = [
    "LATENT_MODES",
    "AxialAttention",
    "LatentAttention",
    "LatentBlock",
    "LeapAttention",
    "LeapAttention2d",
    "MultiHeadAttention",
    "SparseSelfAttention",
    "attend_frames",
    "leap_of_level",
    "merge_heads",
    "require_only",
    "split_heads",
]
