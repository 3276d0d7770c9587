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

from vattn import nn, ops, reference
from vattn._library import use_reference
from vattn._version import __version__
from vattn.layout import BlockLayout
from vattn.ops import *  # noqa: F403
from vattn.position_bias import RelativePositionBias3D

__all__ = ["BlockLayout", "RelativePositionBias3D", "__version__", "nn", "reference", "use_reference"]
__all__ += ops.__all__
