"""How an operator meets PyTorch's dispatcher: the parts that are alike for all of them.

An operator is one ``torch.library`` schema. Its kernels hang on dispatch keys:

    CPU          C++, registered by the compiled extension ``vattn._C``
    CUDA         Triton, launched from ``vattn.kernels``, or CUDA C++ of ``vattn._C_cuda``
    Autocast*    casts to the autocast dtype, as PyTorch's own attention does

so that choosing a backend is the dispatcher's business, not ours. Where there is no kernel (float64, a
device without one, an install without a compiler) the public function runs the reference, under PyTorch's
own autograd.
"""

import functools
import importlib.util
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves


def build_record() -> dict[str, Any]:
    """What the install wrote down about the build of ``vattn._C``; empty if there was none."""
    path = pathlib.Path(__file__).with_name("_build.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _load_extension(name: str = "vattn._C") -> tuple[Any, str | None]:
    """A compiled extension, which registers kernels as it loads; or None, and why there is none."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError:
        return None, build_record().get("error") or f"the extension {name} was never built"
    except ImportError as error:
        built_with = build_record().get("torch")
        return None, f"the extension was built with torch {built_with}, this is torch {torch.__version__}: {error}"


_C, extension_error = _load_extension()
_load_extension("vattn._C_cuda")

AUTOCAST_DEVICES = ("cpu", "cuda")
KERNEL_DEVICES = {"meta"}
if _C is not None:
    KERNEL_DEVICES.add("cpu")
if importlib.util.find_spec("triton") is not None:
    KERNEL_DEVICES.add("cuda")

library = torch.library.Library("vattn", "DEF")
_without_cpu_kernel: set[str] = set()  # operators that the extension does not know: it is older than they are
_with_cuda_cpp: set[str] = set()  # operators that vattn._C_cuda has a kernel for


def define(schema: str, cuda: Callable[..., Any], autocast: int = 0) -> None:
    """Define an operator by its `schema`, with its CUDA launcher; the CPU kernel is in ``vattn._C``.

    A CUDA kernel of ``vattn._C_cuda`` comes before the launcher.

    Under autocast its first `autocast` arguments, tensors or lists of them, are cast. A backward has none to cast:
    it gets what its forward saved, also where autocast is still on around it.
    """
    library.define(schema)
    name = schema.split("(")[0]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vattn::{name}", "CPU"):
        _without_cpu_kernel.add(name)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"vattn::{name}", "CUDA"):
        _with_cuda_cpp.add(name)
    else:
        library.impl(name, cuda, "CUDA")
    for device_type in AUTOCAST_DEVICES if autocast else ():
        rule = functools.partial(_run_autocast, name, autocast, device_type)
        library.impl(name, rule, f"Autocast{device_type.upper()}")


def runs_reference(x: Tensor, op: str | None = None) -> bool:
    """Whether operator `op` on `x` runs the reference rather than a kernel; said once if that is a surprise."""
    if compute_dtype(x) == torch.float64:
        return True
    if x.device.type == "cpu" and _C is None:
        # The default filter shows a warning once for each place that raises it, and this is one place.
        warnings.warn(
            "vattn has no compiled CPU kernels here and runs its reference instead, which is right but slow "
            f"({extension_error}); `python -m vattn.info` says more",
            stacklevel=1,
        )
    return x.device.type not in KERNEL_DEVICES or (x.device.type == "cpu" and op in _without_cpu_kernel)


def no_second_derivatives(*names: str) -> None:
    """Make differentiating these derivatives of an operator, in either mode, an error rather than a silent zero."""
    for name in names:
        op = name.rpartition("_")[0]

        def refuse(*args: Any, op: str = op) -> None:
            raise RuntimeError(
                f"{op}: second derivatives need float64 inputs, which run the reference; the kernels have first "
                "derivatives only"
            )

        reverse_mode = make_autograd_impl(getattr(torch.ops.vattn, name).default, Info(refuse, None))
        rule = functools.partial(_run_without_tangents, reverse_mode, refuse)
        library.impl(name, rule, "Autograd", with_keyset=True)


def _run_without_tangents(run: Callable[..., Any], refuse: Callable[[], None], keyset: Any, *args: Any) -> Any:
    # Forward mode has no entry in torch.library: what has a tangent would lose it.
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tree_leaves(args) if isinstance(x, Tensor)
    ):
        refuse()
    return run(keyset, *args)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the operator will run in: that of `x`, or autocast's."""
    device_type = x.device.type
    if x.dtype != torch.float64 and device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def empty_rows(like: Tensor) -> Tensor:
    """An empty tensor of the shape ``(B, H, *tokens, D)`` of `like`, laid out so that merging heads is a view."""
    return torch.empty_like(like.movedim(1, -2), memory_format=torch.contiguous_format).movedim(-2, 1)


def _run_autocast(name: str, count: int, device_type: str, *args: Any) -> Any:
    def cast(x: Any) -> Any:
        return x.to(compute_dtype(x)) if isinstance(x, Tensor) else [cast(y) for y in x]

    args = tuple(cast(x) for x in args[:count]) + args[count:]
    with torch.autocast(device_type, enabled=False):
        return getattr(torch.ops.vattn, name)(*args)
