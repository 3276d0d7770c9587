"""How operators are registered with PyTorch's dispatcher: the parts that all of them share.

An operator is one ``torch.library`` schema. Its kernels hang on dispatch keys:

    CPU          C++, registered by the compiled extension ``vattn._C``
    CUDA         Triton, launched from ``vattn.kernels``, or CUDA C++ of ``vattn._C_cuda``
    Autocast*    casts to the autocast dtype, as PyTorch's own attention does

so that choosing a backend is the dispatcher's business, not ours. Where there is no kernel (float64, a
device without one, an install without a compiler), and inside :class:`use_reference`, the public function
runs the reference, under PyTorch's own autograd.
"""

import functools
import importlib
import importlib.util
import inspect
import json
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor


def build_record() -> dict[str, Any]:
    """What the install wrote down about the build of ``vattn._C``; empty if there was none."""
    path = pathlib.Path(__file__).with_name("_build.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _load_extension(name: str = "vattn._C", error_name: str = "error") -> tuple[Any, str | None]:
    """A compiled extension, which registers kernels as it loads; or None, and why there is none."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError:
        return None, build_record().get(error_name) or f"the extension {name} was never built"
    except ImportError as error:
        built_with = build_record().get("torch")
        return None, f"the extension was built with torch {built_with}, this is torch {torch.__version__}: {error}"


_C, extension_error = _load_extension()
_C_cuda, cuda_error = _load_extension("vattn._C_cuda", "cuda_error")

AUTOCAST_DEVICES = ("cpu", "cuda")
KERNEL_DEVICES = {"meta"}
if _C is not None:
    KERNEL_DEVICES.add("cpu")
if importlib.util.find_spec("triton") is not None:
    KERNEL_DEVICES.add("cuda")

library = torch.library.Library("vattn", "DEF")
_without_cpu_kernel: set[str] = set()  # operators without a kernel in the extension, which is older than they are
_with_cuda_cpp: set[str] = set()  # operators that vattn._C_cuda has a kernel for


def note_compiled_kernels(name: str, kinds: Iterable[str]) -> None:
    """Remember an operator without a CPU kernel, as is one that is newer than the extension, or with a CUDA one.

    A CPU kernel must take arguments of these `kinds`, which are those of the schema: PyTorch does not compare them.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vattn::{name}", "CPU"):
        _without_cpu_kernel.add(name)
    elif _C is not None:
        takes, built = ", ".join(kinds).replace("SymInt", "int"), _C.kinds_of_arguments(name)
        if takes != built:
            raise ImportError(
                f"{name}: vattn._C was built for another version of vattn: build it again "
                f"(it takes {built}, and this version gives {takes})"
            )
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"vattn::{name}", "CUDA"):
        _with_cuda_cpp.add(name)


class _Threads(threading.local):
    """Of each thread: how many :class:`use_reference` it is inside of."""

    depth = 0


_threads = _Threads()
_Function = TypeVar("_Function", bound=Callable[..., Any])


class use_reference:
    """Inside, every operator runs its definition in plain PyTorch: for other formats, and to compare with.

    A context manager, and a decorator of functions. It counts for the thread that enters it, may be nested, and is seen
    by ``torch.compile`` and ``torch.export``: what they trace inside holds PyTorch's own operators alone, so that
    ``torch.onnx.export`` can translate it. Gradients, forward mode and ``torch.func`` are PyTorch's own.

    A definition holds all scores in memory, and is slower than a kernel. Programs that were exported before, and calls
    of ``torch.ops.vattn``, remain as they are.

    A forward that activation checkpointing runs again, in backward, must run the same way both times: checkpoint a
    function that is decorated, or call ``backward`` inside, too.

    Raises:
        TypeError: what it decorates is not a function, or gives a generator or a coroutine, which would run outside.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4, 6, 8)
        >>> with use_reference():
        ...     expected = vattn.leap_attention(q, k, v, leap=2)
        >>> torch.allclose(vattn.leap_attention(q, k, v, leap=2), expected, atol=1e-5)
        True
    """

    def __enter__(self) -> None:
        _threads.depth += 1

    def __exit__(self, *error: object) -> None:
        _threads.depth -= 1

    def __call__(self, function: _Function) -> _Function:
        if not callable(function) or isinstance(function, type):
            raise TypeError(f"use_reference: function must be a function, got function={function!r}")
        late = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(runs_later(function) for runs_later in late):
            raise TypeError(
                f"use_reference: function must be neither a generator nor a coroutine, got function={function!r}"
            )

        @functools.wraps(function)
        def decorated(*args: Any, **settings: Any) -> Any:
            with use_reference():
                return function(*args, **settings)

        return decorated  # type: ignore[return-value]


def runs_reference(x: Tensor, op: str | None = None) -> bool:
    """Whether operator `op` on `x` runs the reference rather than a kernel; said once if that is a surprise."""
    if _threads.depth > 0:
        return True
    if x.dtype == torch.float64:  # which autocast leaves alone
        return True
    if not x.is_cpu:
        return x.device.type not in KERNEL_DEVICES
    if "cpu" in KERNEL_DEVICES and op not in _without_cpu_kernel:
        return False
    reason = extension_error or f"the extension vattn._C is older than vattn.{op}: build it again"
    # The default filter shows a warning once for each place that raises it and each text, and this is one place.
    warnings.warn(
        f"vattn has no compiled CPU kernels here and runs its reference instead, which is right but slow ({reason}); "
        "`python -m vattn.info` says more",
        stacklevel=1,
    )
    return True


def run_reference(definition: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    """What `definition` gives, under autocast as the kernels: in the dtype of :func:`compute_dtype`.

    `inputs` are cast, tensors and those in lists; `settings` are not.
    """
    first = next(x if isinstance(x, Tensor) else x[0] for x in inputs if isinstance(x, (Tensor, list, tuple)))
    device_type = first.device.type
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return definition(*inputs, **settings)

    def cast(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [cast(y) for y in x]
        return x.to(compute_dtype(x)) if isinstance(x, Tensor) and x.is_floating_point() else x

    inputs = tuple(map(cast, inputs))
    with torch.autocast(device_type, enabled=False):
        return definition(*inputs, **settings)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the operator will run in: that of `x`, or autocast's."""
    device_type = x.device.type
    if x.dtype != torch.float64 and device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def empty_rows(like: Tensor) -> Tensor:
    """An empty tensor of the shape ``(B, H, *tokens, D)`` of `like`, laid out so that merging heads is a view."""
    return torch.empty_like(like.movedim(1, -2), memory_format=torch.contiguous_format).movedim(-2, 1)
