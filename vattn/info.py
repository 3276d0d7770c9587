"""``python -m vattn.info``: versions, what was built, what each device will run, and why something is missing.

The question it answers is "why is this slow, or missing, here?", so every reference that stands in for a kernel
comes with its reason.
"""

import importlib.metadata
import pathlib
import platform
from typing import Any

import torch

import vattn
from vattn import _library

DEVICES = ("cpu", "cuda")
IN_CUDA_CPP = ("select_tokens",)  # operators whose kernel for a GPU is not Triton


def collect() -> dict[str, Any]:
    """All that :func:`main` prints, as plain values.

    Returns:
        A dict with the keys ``versions`` (name to version or None), ``extension`` (path or error of ``vattn._C``
        and how it was built), ``machine`` (processor, threads, GPUs) and ``operators`` (operator to device to
        what runs there).

    Example:
        >>> collect()["versions"]["torch"] == torch.__version__
        True
    """
    return {
        "versions": {
            "vattn": vattn.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "extension": _extension(),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "operators": {name: {device: _runs(name, device) for device in DEVICES} for name in vattn.ops.OPERATORS},
    }


def main() -> None:
    """Print :func:`collect` for a person."""
    found = collect()
    for title in ("versions", "machine", "extension"):
        print(title)
        for key, value in found[title].items():
            if isinstance(value, list):
                value = (", " if title == "machine" else " ").join(value)
            print(f"  {key:<14}{'none' if value in (None, '') else value}")
    print("operators       (float64 runs the reference on every device)")
    for name, devices in found["operators"].items():
        for device, what in devices.items():
            print(f"  {name:<23}{device:<6}{what}")


def _extension() -> dict[str, Any]:
    record = _library.build_record()
    cuda = _library._C_cuda.__file__ if _library._C_cuda else f"none: {_library.cuda_error}"
    if _library._C is None:
        return {"path": None, "error": _library.extension_error, "flags": record.get("flags"), "CUDA C++": cuda}
    return {
        "path": _library._C.__file__,
        "instructions": _library._C.cpu_capability(),
        "compiler": record.get("compiler"),
        "flags": record.get("flags"),
        "built with": f"torch {record.get('torch')}",
        "CUDA C++": cuda,
    }


def _runs(name: str, device: str) -> str:
    """What operator `name` runs on `device`: its kernel, or the reference and why."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return "no device: " + ("no GPU is visible" if torch.version.cuda else "this torch has no CUDA")
        if name in _library._with_cuda_cpp:
            return "kernel: CUDA C++"
        if name in IN_CUDA_CPP:
            return f"operations of PyTorch: {_library.cuda_error}"
        if device not in _library.KERNEL_DEVICES:
            return "reference: Triton is not installed"
        return f"kernel: Triton {_version('triton')}"
    if _library._C is None:
        return f"reference: {_library.extension_error}"
    if name in _library._without_cpu_kernel:
        return "reference: vattn._C was built before this operator; build it again"
    return f"kernel: C++, {_library._C.cpu_capability()}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # on Linux, platform.processor() is empty
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
