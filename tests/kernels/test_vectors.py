"""The vectors of csrc/cpu by themselves, for every instruction set: conversions, lanes, powers, small products.

And leap attention on them where a processor has no instruction set of its own. `make arm64` runs those under an
emulator of another processor: CXX compiles for it, and EMULATOR runs what that has made.
"""

import os
import pathlib
import shutil
import subprocess

import pytest

from vattn import _library

ROOT = pathlib.Path(__file__).parents[2]
CXX = os.environ.get("CXX", "g++")
EMULATOR = os.environ.get("EMULATOR", "").split()
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {
    "generic": ["-DVATTN_VECTOR_BYTES=16"],
    "avx2": ["-DVATTN_VECTOR_BYTES=32", *AVX2],
    "avx512": ["-DVATTN_VECTOR_BYTES=64", *AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")


def capabilities() -> list[str]:
    """What this processor can run."""
    return _library._C.cpu_capabilities() if _library._C is not None else []


def check(name: str, folder: pathlib.Path, *flags: str) -> None:
    """Compile a program that says what is wrong, and run it."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler: {CXX}")
    source, program = ROOT / "tests/kernels/vectors_on_host" / f"{name}.cpp", folder / name
    built_with = [flag for flag in _library.build_record()["flags"] if not flag.startswith(("-O", "-fsanitize"))]
    command = [CXX, *built_with, "-O2", "-Werror", *flags, f"-I{ROOT / 'csrc/cpu'}", source, "-o", program]
    subprocess.run(command, check=True)
    finished = subprocess.run([*EMULATOR, program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("capability", [name for name in capabilities() if name in INSTRUCTION_SETS])
def test_vectors(capability, tmp_path):
    check("vectors", tmp_path, *INSTRUCTION_SETS[capability])


def test_attention_of_generic_vectors(tmp_path):
    check("attention", tmp_path)
