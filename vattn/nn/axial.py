"""Axial attention, and the projections that VideoGPT has around each of its attentions.

    y = W_fc merge_heads(axial_attention(W_q x, W_k x, W_v x))

Ho et al., "Axial Attention in Multidimensional Transformers" (2019), as VideoGPT has it: Yan et al., "VideoGPT: Video
Generation using VQ-VAE and Transformers" (2021).
"""

from typing import cast

from torch import Tensor, nn

from vattn import _checks
from vattn.nn.heads import merge_heads, split_heads
from vattn.ops.axial_attention import axial_attention


class MultiHeadAttention(nn.Module):
    """Projections to the queries of H heads, their keys and values, and from what they attend to back.

    Parameters have the names and the initialization of the official VideoGPT code.

    Args:
        dim: channels C of the tokens that read, and of the output; a multiple of `num_heads`.
        num_heads: heads H.
        source_dim: channels of the tokens that are read, C if None; values have ``source_dim // num_heads`` a head.
        num_layers: in how many layers the output is added up, which makes it start smaller.

    Raises:
        TypeError, ValueError: a setting that does not fit.

    Source:
        Yan et al., "VideoGPT: Video Generation using VQ-VAE and Transformers" (2021).
    """

    def __init__(self, dim: int, num_heads: int, *, source_dim: int | None = None, num_layers: int = 1) -> None:
        super().__init__()
        op, source_dim = type(self).__name__, dim if source_dim is None else source_dim
        sizes = {"dim": dim, "num_heads": num_heads, "num_layers": num_layers}
        for name, size in sizes.items():
            _checks.integer(op, name, size, least=1)
        _checks.integer(op, "source_dim", source_dim, least=num_heads)
        if dim % num_heads:
            raise ValueError(f"{op}: dim must be a multiple of num_heads={num_heads}, got dim={dim}")
        self.num_heads = num_heads
        inner = num_heads * (source_dim // num_heads)
        self.w_qs = nn.Linear(dim, dim, bias=False)
        self.w_ks = nn.Linear(source_dim, dim, bias=False)
        self.w_vs = nn.Linear(source_dim, inner, bias=False)
        self.fc = nn.Linear(inner, dim)
        for layer in (self.w_qs, self.w_ks, self.w_vs):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.fc.weight, std=(dim * num_layers) ** -0.5)

    def heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``(B, ..., C)`` through `layer` to ``(B, H, ..., D)``, a view."""
        return split_heads(layer(x), self.num_heads)

    def merge(self, out: Tensor) -> Tensor:
        """``(B, H, ..., D)`` to ``(B, ..., C)``."""
        return self.fc(merge_heads(out))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class AxialAttention(MultiHeadAttention):
    """Multi-head self-attention along one axis of a grid of tokens.

    Args:
        dim: channels C of input and output, a multiple of `num_heads`.
        num_heads: heads H.
        axis: of the grid, see :func:`vattn.axial_attention`: -1 is the last one.

    Shape:
        ``(B, *grid, C)`` to the same.

    Raises:
        TypeError, ValueError: a setting or an input that does not fit.

    Source:
        Ho et al., "Axial Attention in Multidimensional Transformers" (2019), as Yan et al., "VideoGPT: Video Generation
        using VQ-VAE and Transformers" (2021), use it.

    Example:
        >>> along_time = AxialAttention(dim=64, num_heads=2, axis=0)
        >>> along_time(torch.randn(2, 4, 16, 16, 64)).shape
        torch.Size([2, 4, 16, 16, 64])
    """

    def __init__(self, dim: int, num_heads: int, axis: int) -> None:
        super().__init__(dim, num_heads)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.heads(layer, x) for layer in (self.w_qs, self.w_ks, self.w_vs))
        return self.merge(cast(Tensor, axial_attention(query, key, value, self.axis)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}"
