"""The nearest code of each vector: vector quantisation.

    index = argmin_k |x - c_k|^2        the lowest k on ties

van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017).
"""

import torch
from torch import Tensor

CODES = 256  # of which distances are held at once


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The definition of :func:`vattn.nearest_code`."""
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    vectors, codebook = x.detach()[None].flatten(0, -2).to(wide), codebook.detach().to(wide)
    nearest = vectors.new_full(vectors.shape[:1], torch.inf)
    index = torch.zeros(vectors.shape[:1], dtype=torch.int64, device=x.device)
    for first in range(0, len(codebook), CODES):
        distances = _distances(vectors, codebook[first : first + CODES])
        distance, code = distances.nan_to_num(torch.inf, torch.inf).min(1)
        nearer = distance < nearest
        nearest = torch.where(nearer, distance, nearest)
        index = torch.where(nearer, first + code, index)
    return index.view(x.shape[:-1])


def _distances(vectors: Tensor, codes: Tensor) -> Tensor:
    """Of differences: ``|c|^2 - 2 x c`` loses all digits where vectors are far from 0 and near each other."""
    if torch.compiler.is_exporting():  # other formats, ONNX among them, have no cdist
        return (vectors[:, None] - codes).square().sum(-1).sqrt()
    return torch.cdist(vectors, codes, compute_mode="donot_use_mm_for_euclid_dist")
