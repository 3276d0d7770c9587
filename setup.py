"""Builds `vattn` and, where a C++ compiler is at hand, its CPU kernels ``vattn._C``.

They use PyTorch's stable ABI of TORCH_TARGET and Python's of PYTHON_TARGET: built with one PyTorch and one Python, they
load in later ones. Where torch has CUDA and nvcc works, ``vattn._C_cuda`` has the CUDA C++ kernels.

An install never fails for want of a compiler: it says why there are no compiled kernels, and writes the
reason to ``vattn/_build.json``, where ``python -m vattn.info`` finds it. ``VATTN_BUILD_CPP=1`` makes a failure of the
CPU kernels an error, ``VATTN_BUILD_CPP=0`` leaves all compiled kernels out; ``VATTN_BUILD_CUDA`` does so for those of
CUDA alone.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
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
BUILD_CUDA = os.environ.get("VATTN_BUILD_CUDA")
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0")  # where no GPU is visible, nor TORCH_CUDA_ARCH_LIST set
# Contracted multiply-adds, and vectorised loops without errno or traps; sums keep the order they are written in.
FLAGS = ["-O3", "-g0", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-fvisibility=hidden"]
SANITIZERS = ["-fsanitize=address,undefined"] if os.environ.get("VATTN_SANITIZE") == "1" else []  # `make sanitize`
if SANITIZERS:
    FLAGS += [*SANITIZERS, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g1"]
TORCH_TARGET = (2, 11)  # the oldest PyTorch that pyproject.toml promises
STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
PYTHON_TARGET = "cp311"  # the oldest Python, likewise: see csrc/bindings.cpp
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # which has no stable ABI yet
# To compile only: linked in, it might bring a second OpenMP beside the one that torch carries.
OPENMP = ["-fopenmp"]


class BuildOrExplain(cpp_extension.BuildExtension if torch else build_ext):  # type: ignore[misc]
    """Compiles the extensions, or records why it could not."""

    extensions: list[Extension]
    record: dict[str, Any]
    built: list[Extension]

    def build_extensions(self) -> None:
        self.record = {"error": None, "flags": FLAGS, "torch": torch and torch.__version__, "cuda_error": None}
        extensions, self.built = self.extensions, []
        compiler = self.compiler.compiler_cxx[0]
        reason = self.missing(compiler)
        if reason is None:
            self.record["compiler"] = compiler
            reason = self.build(extensions[:1], f"the C++ compiler {compiler!r} failed", BUILD_CPP == "1")
        elif BUILD_CPP == "1":
            raise SystemExit(f"VATTN_BUILD_CPP=1 was set, but {reason}")
        if reason is not None:
            self.record["error"] = reason
            warnings.warn(
                f"vattn is installed without compiled CPU kernels and will run its slower reference there: {reason}",
                stacklevel=1,
            )
        # By itself, and after the CPU's: what PyTorch finds wrong with CUDA must not cost these.
        without_cuda = NO_CUDA or (reason and "the C++ compiler is missing or failed")
        if without_cuda is None:
            without_cuda = self.build(extensions[1:], "the CUDA compiler failed", BUILD_CUDA == "1")
        elif BUILD_CUDA == "1":
            raise SystemExit(f"VATTN_BUILD_CUDA=1 was set, but {without_cuda}")
        self.record["cuda_error"] = without_cuda
        if without_cuda and torch and torch.version.cuda:
            warnings.warn(
                "vattn is installed without CUDA C++ kernels, and operations of PyTorch take their place on a GPU: "
                f"{without_cuda}",
                stacklevel=1,
            )
        self.extensions = self.built  # those that are copied and installed

    def build(self, extensions: list[Extension], failure: str, required: bool) -> str | None:
        """Build some extensions; what went wrong, in words, if anything did and they are not `required`."""
        self.extensions = extensions
        try:
            super().build_extensions()
        except Exception as error:
            if required:
                raise
            return f"{failure} ({error}); `pip install --verbose` shows what it said"
        self.built += extensions
        return None

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
        current = {pathlib.Path(self.get_ext_filename(extension.name)).name for extension in self.built}
        for path in {*built.glob("_C*.so"), *package.glob("_C*.so")}:
            if path.name not in current:  # of an earlier build, under a name that Python may prefer
                path.unlink()
        (package / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")


def cuda_missing() -> str | None:
    """What the CUDA part lacks, in words that a person can act upon; None if it may begin, with PyTorch told how."""
    if BUILD_CPP == "0":
        return "VATTN_BUILD_CPP=0 was set"
    if BUILD_CUDA == "0":
        return "VATTN_BUILD_CUDA=0 was set"
    if torch is None or not torch.version.cuda:
        return "this torch has no CUDA"
    wanted = f"the toolkit of CUDA {torch.version.cuda}, with its compiler and its headers"
    nvcc = cpp_extension.CUDA_HOME and shutil.which(os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"))
    if not nvcc:
        return f"nvcc was not found: install {wanted}, or set CUDA_HOME to it"
    # It includes cuda_runtime.h by itself, and tells where its own files are: what is on the PATH may be a script.
    command = [nvcc, "-E", "-x", "cu", os.devnull]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        said = (probe.stderr or probe.stdout).strip().splitlines() or ["no word"]
        return f"{nvcc} fails ({said[0]}): install {wanted}, or set CUDA_HOME to it"
    dry_run = subprocess.run([*command, "--dryrun"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if top and not {"CUDA_HOME", "CUDA_PATH"} & set(os.environ):
        cpp_extension.CUDA_HOME = os.path.realpath(top[1])
    if not torch.cuda.is_available():  # or PyTorch takes the architectures of the GPUs that it sees
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
        known = [arch for arch in CUDA_ARCHITECTURES if "compute_" + arch.replace(".", "") in listed]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(known) + "+PTX")
    return None


def extensions() -> list[Extension]:
    """``vattn._C`` and, where CUDA's compiler works, ``vattn._C_cuda``."""
    headers = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
    # As system headers, so that -Wextra speaks of our code and not of torch's.
    system = [flag for path in (cpp_extension.include_paths() if torch else []) for flag in ("-isystem", path)]
    flags = [*FLAGS, STABLE_ABI, *system]
    options: dict[str, Any] = {"include_dirs": ["csrc"], "depends": headers, "language": "c++"}
    if torch is not None:  # of its libraries, those that have the stable ABI
        options |= {"library_dirs": cpp_extension.library_paths(), "libraries": ["torch_cpu"]}
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    built = flags + OPENMP
    linked: dict[str, Any] = {"extra_link_args": SANITIZERS, "py_limited_api": LIMITED_API}
    found = [Extension("vattn._C", sources, extra_compile_args=built, **linked, **options)]
    if NO_CUDA is None:
        sources = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
        by_compiler = {"cxx": [*flags, "-DUSE_CUDA"], "nvcc": ["-O3", "-std=c++20"]}
        del options["library_dirs"], options["libraries"]
        found.append(cpp_extension.CUDAExtension("vattn._C_cuda", sources, extra_compile_args=by_compiler, **options))
    return found


NO_CUDA = cuda_missing()
EDITABLE = "editable_wheel" in sys.argv
# The tag of a wheel. The CUDA part is for one version of Python and one of PyTorch.
ONE_FOR_ALL = {"bdist_wheel": {"py_limited_api": PYTHON_TARGET}} if LIMITED_API and NO_CUDA else {}

setup(
    # The kernels are vattn.kernels and not a top-level module: Hugging Face owns the name `kernels`.
    # An editable install is no more than the checkout on Python's path, where vattn/__init__.py finds ./kernels: the
    # modules that setuptools makes for other layouts come after a folder named vattn beside a script, such as a clone.
    packages=find_packages(include=["vattn", "vattn.*"]) + ([] if EDITABLE else ["vattn.kernels"]),
    package_dir={"": "."} if EDITABLE else {"vattn": "vattn", "vattn.kernels": "kernels"},
    package_data={"vattn": ["py.typed", "*.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOrExplain},
    options=ONE_FOR_ALL,
)
