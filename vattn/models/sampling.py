"""What samplers share."""

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], title: str, shown: bool) -> Iterable[Item]:
    """`items`, with a progress bar if there shall be one."""
    if not shown:
        return items
    from tqdm.auto import tqdm  # not needed otherwise

    return tqdm(items, desc=title)
