"""The operators: a file each, and the list of them that the package, documents, tests and benchmarks use."""

from vattn._operator import OPERATORS as OPERATORS
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

__all__ = [
    "axial_attention",
    "edge_sparse_attention",
    "latent_attention",
    "leap_attention",
    "merge_attention",
    "nearest_code",
    "node_sparse_attention",
    "periodic_shift",
    "select_tokens",
    "token_importance",
]
