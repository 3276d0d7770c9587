"""Attention operators for video transformers: Triton on the GPU, compiled C++ on the CPU.

Every operator is softmax attention on a graph of *segments* (a frame, a line of a grid, a block of
tokens, a set of latents): the edges say which key segments a query segment reads, and nothing is ever
permuted, concatenated or padded to get there. ``vattn.reference`` holds the same operators in plain
PyTorch: they are the definitions that the kernels are tested against.
"""

import pathlib

# In a checkout the Triton kernels lie beside this package, in ./kernels; installed, inside it.
_root = pathlib.Path(__file__).resolve().parent
if not (_root / "kernels").is_dir() and (_root.parent / "kernels" / "flash.py").is_file():
    __path__.append(str(_root.parent))

from vattn import nn, reference
from vattn._version import __version__
from vattn.layout import BlockLayout
from vattn.ops.axial_attention import axial_attention
from vattn.ops.edge_sparse_attention import edge_sparse_attention
from vattn.ops.latent_attention import latent_attention
from vattn.ops.leap_attention import leap_attention
from vattn.ops.merge_attention import merge_attention
from vattn.ops.nearest_code import nearest_code
from vattn.ops.node_sparse_attention import node_sparse_attention
from vattn.ops.periodic_shift import periodic_shift
from vattn.ops.select_tokens import select_tokens
from vattn.ops.token_importance import token_importance
from vattn.position_bias import RelativePositionBias3D

__all__ = [
    "BlockLayout",
    "RelativePositionBias3D",
    "__version__",
    "axial_attention",
    "edge_sparse_attention",
    "latent_attention",
    "leap_attention",
    "merge_attention",
    "nearest_code",
    "nn",
    "node_sparse_attention",
    "periodic_shift",
    "reference",
    "select_tokens",
    "token_importance",
]
