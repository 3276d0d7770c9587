"""Optional packages: whoever lacks one is told which extra brings it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(op: str, extra: str) -> Iterator[None]:
    """Around the imports of packages that `op` needs and that the extra `extra` brings.

    Raises:
        ImportError: one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "vattn":
            raise
        raise ImportError(
            f"{op}: {package} is needed: install vattn with the extra {extra!r}", name=error.name
        ) from error
