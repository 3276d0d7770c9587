"""Tile sizes: a table by architecture, head dim and pass, never a run-time search."""
import torch
from torch import Tensor

def tiles(phase: str, like: Tensor) -> dict[str, int]:
    if like.device.type == "cpu":
        return {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
