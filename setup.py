"""Builds `vattn` and, where a C++ compiler is at hand, its CPU kernels ``vattn._C``.

They use PyTorch's stable ABI of TORCH_TARGET: built with one PyTorch, they load in later ones. Where torch has CUDA and
nvcc is found, ``vattn._C_cuda`` has the CUDA C++ kernels.

An install never fails for want of a compiler: it says why there are no compiled kernels, and writes the
reason to ``vattn/_build.json``, where ``python -m vattn.info`` finds it. ``VATTN_BUILD_CPP=1`` makes a failure an
error, ``VATTN_BUILD_CPP=0`` leaves the extension out.
"""

import json
import os
import pathlib
import shutil
import warnings
from glob import glob
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None  # type: ignore[assignment]

BUILD_CPP = os.environ.get("VATTN_BUILD_CPP")
# Contracted multiply-adds, and vectorised loops without errno or traps; sums keep the order they are written in.
FLAGS = ["-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-fvisibility=hidden"]
SANITIZERS = ["-fsanitize=address,undefined"] if os.environ.get("VATTN_SANITIZE") == "1" else []  # `make sanitize`
if SANITIZERS:
    FLAGS += [*SANITIZERS, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g1"]
TORCH_TARGET = (2, 11)  # the oldest PyTorch that pyproject.toml promises
STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
# To compile only: linked in, it might bring a second OpenMP beside the one that torch carries.
OPENMP = ["-fopenmp"]


class BuildOrExplain(cpp_extension.BuildExtension if torch else build_ext):  # type: ignore[misc]
    """Compiles the extensions, or records why it could not."""

    record: dict[str, Any]

    def build_extensions(self) -> None:
        self.record = {"error": None, "flags": FLAGS, "torch": torch and torch.__version__, "cuda": False}
        compiler = self.compiler.compiler_cxx[0]
        reason = self.missing(compiler)
        if reason is None:
            self.record["compiler"] = compiler
            self.record["cuda"] = len(self.extensions) > 1
            try:
                super().build_extensions()
            except Exception as error:
                if BUILD_CPP == "1":
                    raise
                reason = f"the C++ compiler {compiler!r} failed ({error}); `pip install --verbose` shows what it said"
        elif BUILD_CPP == "1":
            raise SystemExit(f"VATTN_BUILD_CPP=1 was set, but {reason}")
        if reason is not None:
            self.record["error"] = reason
            warnings.warn(
                f"vattn is installed without compiled CPU kernels and will run its slower reference there: {reason}",
                stacklevel=1,
            )

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if BUILD_CPP == "1" or ext.name == "vattn._C":
                raise
            self.record["cuda"] = False
            warnings.warn(
                f"vattn is installed without CUDA C++ kernels, and PyTorch's operations take their place: {error}",
                stacklevel=1,
            )

    def missing(self, compiler: str) -> str | None:
        """What the build lacks, in words that a person can act upon; None if it may begin."""
        if BUILD_CPP == "0":
            return "VATTN_BUILD_CPP=0 was set"
        if torch is None:
            return "torch was not importable during the build; use `pip install --no-build-isolation`"
        if not self.extensions[0].sources:
            return "there are no C++ sources under csrc/"
        if shutil.which(compiler) is None:
            return f"no C++ compiler: {compiler!r} is not on the PATH; install one or set CXX"
        return None

    def run(self) -> None:
        super().run()
        built = pathlib.Path(self.build_lib, "vattn")
        package = pathlib.Path("vattn") if self.inplace else built
        if self.record["error"]:
            for outdated in {*built.glob("_C*.so"), *package.glob("_C*.so")}:
                outdated.unlink()
        (package / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")


def extensions() -> list[Extension]:
    """``vattn._C`` and, where torch has CUDA and nvcc is found, ``vattn._C_cuda``."""
    headers = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
    # As system headers, so that -Wextra speaks of our code and not of torch's.
    system = [flag for path in (cpp_extension.include_paths() if torch else []) for flag in ("-isystem", path)]
    flags = [*FLAGS, STABLE_ABI, *system]
    options: dict[str, Any] = {"include_dirs": ["csrc"], "depends": headers, "language": "c++", "optional": True}
    if torch is not None:  # of its libraries, those that have the stable ABI
        options |= {"library_dirs": cpp_extension.library_paths(), "libraries": ["torch_cpu"]}
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    built = flags + OPENMP
    found = [Extension("vattn._C", sources, extra_compile_args=built, extra_link_args=SANITIZERS, **options)]
    if torch is not None and torch.version.cuda and cpp_extension.CUDA_HOME:
        sources = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
        by_compiler = {"cxx": [*flags, "-DUSE_CUDA"], "nvcc": ["-O3", "-std=c++20"]}
        del options["library_dirs"], options["libraries"]
        found.append(cpp_extension.CUDAExtension("vattn._C_cuda", sources, extra_compile_args=by_compiler, **options))
    return found


setup(
    # The kernels are vattn.kernels and not a top-level module: Hugging Face owns the name `kernels`.
    packages=[*find_packages(include=["vattn", "vattn.*"]), "vattn.kernels"],
    package_dir={"vattn": "vattn", "vattn.kernels": "kernels"},
    package_data={"vattn": ["py.typed", "*.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOrExplain},
)
