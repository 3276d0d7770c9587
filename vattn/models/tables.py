"""Tables that a model computes when it is made: an order of tokens, a layout.

They are no buffers. A buffer loses its values on the way through the device "meta", and what is not in a checkpoint
does not come back with its weights.
"""

from typing import Any, Generic, Protocol, TypeVar

import torch


class _Movable(Protocol):
    def to(self, device: torch.device, /) -> Any: ...


T = TypeVar("T", bound=_Movable)


class Table(Generic[T]):
    """Something on the CPU, and copies of it on the devices that have used it."""

    def __init__(self, made: T) -> None:
        self.made = made
        self._copies: dict[torch.device, T] = {}

    def on(self, device: torch.device) -> T:
        """It on `device`."""
        if device.type == "cpu":
            return self.made
        if device in self._copies:
            return self._copies[device]
        with torch.inference_mode(False):  # a copy may serve in training later
            copy: T = self.made.to(device)
        if _holds_values(device):
            self._copies[device] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and saved: a device may not be there later."""
        return {"made": self.made, "_copies": {}}


def _holds_values(device: torch.device) -> bool:
    """Whether tensors that are made now will have values: not those of a trace."""
    if device.type == "meta" or torch.compiler.is_exporting():
        return False
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0
