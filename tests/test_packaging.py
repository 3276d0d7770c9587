"""What an install contains, what of PyTorch it relies on, and what it does where there is no compiler."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from typing import Any

import pytest
import torch

from tests import wheels
from vattn import _library

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("csrc", "kernels", "vattn", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


def build_wheel(folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel in `folder` from a copy of the sources, in which an earlier build has left an extension."""
    source = copy_sources(folder / "source")
    earlier = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "vattn"
    earlier.mkdir(parents=True)
    (earlier / "_C.earlier.so").touch()
    (earlier / "_C_cuda.earlier.so").touch()
    command = [sys.executable, "-m", "pip", "--verbose", "wheel", "--no-build-isolation", "--no-deps"]
    command += ["--wheel-dir", str(folder), str(source)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def copy_sources(source: pathlib.Path) -> pathlib.Path:
    """What a build needs of this tree, in the new folder `source`."""
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
            )
        else:
            shutil.copy(ROOT / name, source)
    return source


def unpack(folder: pathlib.Path) -> pathlib.Path:
    """The contents of the wheel in `folder`."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def python(installed: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where `vattn` is the one in `installed`, without site and so without an editable install."""
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    """An install on a machine whose compiler always fails, and what the build printed."""
    folder = tmp_path_factory.mktemp("without_compiler")
    result = build_wheel(folder, CC="false", CXX="false")
    assert result.returncode == 0, result.stdout
    return unpack(folder), result.stdout


def test_kernels_are_in_the_package_and_not_beside_it(without_compiler):
    installed, _ = without_compiler
    assert (installed / "vattn" / "kernels" / "flash.py").is_file()
    assert not (installed / "vattn" / "kernels" / "__init__.py").exists()
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"vattn"}
    imported = python(installed, "-c", "import vattn.kernels.flash as flash; print(flash.__file__)").stdout
    assert pathlib.Path(imported.strip()) == installed / "vattn" / "kernels" / "flash.py"


def test_what_is_installed(without_compiler):
    installed, _ = without_compiler
    assert wheels.wrong_with_contents(installed) == []
    assert wheels.wrong_with_metadata(installed) == []


def test_the_extension_of_an_earlier_build_is_not_installed(without_compiler):
    installed, _ = without_compiler
    assert list(installed.rglob("*.so")) == []


def test_a_failed_build_is_said_during_the_install(without_compiler):
    _, printed = without_compiler
    assert printed.count("vattn is installed without compiled CPU kernels") == 1


def test_without_kernels_the_reference_runs_and_says_so_once(without_compiler):
    installed, _ = without_compiler
    program = """
import torch, vattn
q = torch.randn(1, 2, 4, 3, 8)
for _ in range(2):
    out = vattn.leap_attention(q, q, q, leap=1)
    vattn.periodic_shift(q, 4)
assert torch.equal(out, vattn.reference.leap_attention(q, q, q, leap=1))
"""
    warned = python(installed, "-c", program).stderr
    assert warned.count("vattn has no compiled CPU kernels here") == 1


def test_info_explains_the_missing_kernels(without_compiler):
    installed, _ = without_compiler
    printed = python(installed, "-m", "vattn.info").stdout
    assert re.search(r"leap_attention +cpu +reference: the C\+\+ compiler 'false' failed", printed)


def test_the_source_distribution_has_what_a_build_needs(tmp_path):
    source = copy_sources(tmp_path / "source")
    expected = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, check=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {pathlib.Path(*pathlib.Path(name).parts[1:]) for name in archive.getnames()}
    assert expected <= found
    assert {path.parts[0] for path in found if len(path.parts) > 1} == {"csrc", "kernels", "vattn", "vattn.egg-info"}


@pytest.mark.skipif(_library._C is None, reason="the extension is not built")
def test_the_extension_is_for_every_python_torch_and_system():
    """Of PyTorch it needs C functions and no C++ symbol, which another version might not have."""
    assert wheels.wrong_with_extension(pathlib.Path(_library._C.__file__)) == []


def test_an_extension_for_one_python_and_one_system(monkeypatch):
    monkeypatch.setitem(wheels.MANYLINUX_2_28, "GLIBC", (2, 2, 4))
    faults = "\n".join(wheels.wrong_with_extension(pathlib.Path(torch._C.__file__)))
    assert "its name must end in .abi3.so" in faults
    assert "registers no operator" in faults
    assert re.search(r"GLIBC_2.2.5: newer than manylinux_2_28", faults)
    assert "libtorch_python.so is linked with it" in faults


# What an import is called where it is installed from, unless that is its name.
DISTRIBUTIONS = {"PIL": "pillow"}
IN_PYTHON_OR_HERE = {*sys.stdlib_module_names, "vattn"}


def imports(tree: ast.AST) -> set[str]:
    """The packages that a module imports, at any time."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


def test_the_package_imports_what_its_metadata_name_and_nothing_of_the_checkout():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    development = {"test", "dev"}
    extras = [x for name, xs in project["optional-dependencies"].items() if name not in development for x in xs]
    named = {re.match(r"[\w-]+", requirement)[0] for requirement in [*project["dependencies"], *extras]}
    found = set()
    for path in [*(ROOT / "vattn").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        found |= imports(ast.parse(path.read_text()))
    assert {"torch", "triton"} < found
    assert {DISTRIBUTIONS.get(name, name) for name in found - IN_PYTHON_OR_HERE} <= named


@pytest.mark.slow
def test_the_build_can_be_required(tmp_path):
    result = build_wheel(tmp_path, CC="false", CXX="no-such-compiler", VATTN_BUILD_CPP="1")
    assert result.returncode != 0
    assert "no C++ compiler: 'no-such-compiler' is not on the PATH" in result.stdout


@pytest.mark.slow
def test_the_build_can_be_left_out(tmp_path):
    build_wheel(tmp_path, VATTN_BUILD_CPP="0")
    installed = unpack(tmp_path)
    assert json.loads((installed / "vattn" / "_build.json").read_text())["error"] == "VATTN_BUILD_CPP=0 was set"
    assert list(installed.rglob("*.so")) == []


@pytest.mark.slow
def test_a_script_beside_an_editable_clone(tmp_path):
    """The clone, a folder named vattn without an __init__.py, is no package: the one in it is."""
    clone = copy_sources(tmp_path / "vattn")
    program = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    environment = {**os.environ, "VATTN_BUILD_CPP": "0"}
    subprocess.run([sys.executable, "-c", program], cwd=clone, env=environment, capture_output=True, check=True)
    installed = unpack(tmp_path)
    program = f"""
import site, sys
sys.path.insert(0, {str(tmp_path)!r})
site.addsitedir({str(installed)!r})
import vattn, vattn.kernels.flash
print(vattn.__file__, vattn.kernels.flash.__file__, vattn.leap_attention.__name__)
"""
    said = python(installed, "-W", "ignore", "-c", program).stdout.split()
    assert said == [str(clone / "vattn/__init__.py"), str(clone / "kernels/flash.py"), "leap_attention"]


# A build with a PyTorch that has CUDA, and a compiler that is not there or does not work: setup.py of this tree over
# sources of a few lines, with the stand-in nvcc that a test writes.
SETUP = """
import runpy, sys, torch
torch.version.cuda = "13.0"
from torch.utils import cpp_extension
cpp_extension.CUDA_HOME = "{home}"
torch.cuda.is_available = lambda: False
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
NVCC = """#!/bin/sh
echo "$@" >> {home}/calls
case "$*" in
  *--version*) echo "release {release}.0, V{release}.0.0" ;;
  *--dryrun*) echo "#$ TOP={home}" >&2 ;;
  *--list-gpu-arch*) echo compute_80; echo compute_90 ;;
  *) {compile} ;;
esac
"""


def build_with_cuda(folder: pathlib.Path, compile: str = "", release: int = 13, **environment: str) -> Any:
    """Run setup.py beside an nvcc that runs `compile`: what it printed, and the record of the build."""
    home, source = folder / "cuda", folder / "source"
    (home / "bin").mkdir(parents=True)
    for name in ("csrc/cuda", "vattn", "kernels"):
        (source / name).mkdir(parents=True)
    (source / "csrc/bindings.cpp").write_text('extern "C" int PyInit__C() { return 0; }')
    (source / "csrc/cuda/kernel.cu").write_text("")
    (source / "vattn/__init__.py").touch()
    (source / "vattn/_version.py").write_text('__version__ = "0"')
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    if compile:
        (home / "bin/nvcc").write_text(NVCC.format(home=home, release=release, compile=compile))
        (home / "bin/nvcc").chmod(0o755)
    removed = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "VATTN_BUILD_CPP", "VATTN_BUILD_CUDA")
    environment = {name: x for name, x in os.environ.items() if name not in removed} | environment
    done = subprocess.run(
        [sys.executable, "-c", SETUP.format(home=home)], cwd=source, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        assert list(source.glob("vattn/_C.*so")), done.stdout  # the CPU's, whatever becomes of CUDA's
        return done, json.loads((source / "vattn/_build.json").read_text())
    return done, None


@pytest.mark.slow
@pytest.mark.skipif(_library._C is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("compile", "release", "error"),
    [
        ("", 13, "nvcc was not found: install the toolkit of CUDA 13.0"),
        ("echo 'cuda_runtime.h: No such file' >&2; exit 1", 13, "fails (cuda_runtime.h: No such file): install the"),
        ("case $1 in -E) ;; *) exit 1 ;; esac", 13, "the CUDA compiler failed"),
        ("true", 12, "The detected CUDA version"),  # in the words of PyTorch
    ],
    ids=["no compiler", "no headers", "an error", "another release"],
)
def test_the_cpu_kernels_are_built_whatever_becomes_of_those_of_cuda(compile, release, error, tmp_path):
    done, record = build_with_cuda(tmp_path, compile, release)
    assert done.returncode == 0, done.stdout
    assert record["error"] is None
    assert error in record["cuda_error"]
    assert "vattn is installed without CUDA C++ kernels" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(_library._C is None, reason="no C++ compiler")
def test_architectures_where_no_gpu_is_in_sight(tmp_path):
    """Those of the table of kernels, as far as the compiler knows them."""
    build_with_cuda(tmp_path, "true")
    calls = (tmp_path / "cuda/calls").read_text()
    assert set(re.findall(r"-gencode=\S+", calls)) == {
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    }


@pytest.mark.slow
@pytest.mark.skipif(_library._C is None, reason="no C++ compiler")
def test_the_cuda_part_can_be_required(tmp_path):
    done, _ = build_with_cuda(tmp_path, VATTN_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "VATTN_BUILD_CUDA=1 was set, but nvcc was not found" in done.stdout
