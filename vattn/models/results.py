"""Results of models that are named tuples, in exported programs."""

from typing import TypeVar

from torch.utils import _pytree

Result = TypeVar("Result", bound=tuple)


def exportable(kind: type[Result]) -> type[Result]:
    """Let :func:`torch.export.save` write named tuples of this `kind`, which whoever loads them must have imported."""
    _pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return kind
