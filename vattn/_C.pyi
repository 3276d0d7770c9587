"""The compiled CPU kernels: importing this module registers them with PyTorch's dispatcher."""

def cpu_capability() -> str:
    """The instruction set that the kernels were chosen for: "amx", "avx512", "avx2" or "generic"."""

def cpu_capabilities() -> list[str]:
    """The instruction sets that they could use on this processor, the fastest first."""

def kinds_of_arguments(name: str, /) -> str:
    """What an operator takes, such as "Tensor, int"; nothing for one that is not here."""
