"""What a wheel and its extension must and must not contain.

``python -m tests.wheels dist/*.whl`` names what is wrong, and fails if anything is.
"""

import email
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = {"vattn": "vattn", "kernels": "vattn/kernels"}  # where their files come from, and where they go
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LIBRARIES = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}


def wrong_with_extension(path: pathlib.Path) -> list[str]:
    """What ties an extension to one version of PyTorch, of Python, or of the system."""
    faults = []
    if not path.name.endswith(".abi3.so"):
        faults.append(f"{path.name} is for one version of Python: its name must end in .abi3.so")
    needed = run("nm", "--dynamic", "--undefined-only", str(path))
    if "torch_library_impl" not in needed:
        faults.append("it registers no operator with PyTorch's stable ABI")
    symbols = [line.split()[-1] for line in needed.splitlines()]
    faults += [f"{x}: a C++ symbol of PyTorch" for x in symbols if re.match(r"_Z.*(2at|3c10|5torch)", x)]
    for symbol in symbols:
        version = re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", symbol)
        if version and tuple(map(int, version[2].split("."))) > MANYLINUX_2_28[version[1]]:
            faults.append(f"{symbol}: newer than manylinux_2_28 (see csrc/manylinux.cpp)")
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", str(path)))
    faults += [f"{library} is linked with it" for library in libraries if library not in LIBRARIES]
    if "libtorch_cpu.so" not in libraries:
        faults.append("libtorch_cpu.so is not linked with it: Python loads it where no other library sees it")
    return faults


def wrong_with_contents(installed: pathlib.Path) -> list[str]:
    """What is missing in an unpacked wheel, or too much."""
    faults = []
    for source, package in PACKAGES.items():
        for pattern in ("*.py", "*.pyi", "py.typed"):
            for path in sorted((ROOT / source).rglob(pattern)):
                name = path.relative_to(ROOT / source)
                if not (installed / package / name).is_file():
                    faults.append(f"{package}/{name} is missing")
    for path in sorted(installed.rglob("*")):
        name = path.relative_to(installed)
        known = name.parts[0] == "vattn" or name.parts[0].endswith(".dist-info")
        if not known or name.suffix in (".cpp", ".h", ".cu", ".cuh"):
            faults.append(f"{name} should not be there")
    return faults


def wrong_with_metadata(installed: pathlib.Path) -> list[str]:
    """What the metadata of an unpacked wheel should say, and does not."""
    (folder,) = installed.glob("*.dist-info")
    said = email.message_from_string((folder / "METADATA").read_text())
    version = re.search(r'__version__ = "(.*)"', (ROOT / "vattn/_version.py").read_text())
    expected = {
        "Name": "vattn",
        "Version": version and version[1],
        "License-Expression": "Apache-2.0",
        "Requires-Python": ">=3.11",
        "Description-Content-Type": "text/markdown",
    }
    faults = [f"{name} should be {x}, and is {said[name]}" for name, x in expected.items() if said[name] != x]
    needed = {x for x in said.get_all("Requires-Dist", ()) if "extra ==" not in x}
    if needed != {"torch>=2.11", 'triton>=3.6; platform_system == "Linux"'}:
        faults.append(f"it should need torch and Triton, and needs {needed}")
    if not (folder / "licenses/LICENSE").is_file():
        faults.append("the license is missing")
    tag = email.message_from_string((folder / "WHEEL").read_text())["Tag"]
    if not tag.startswith("cp311-abi3-"):
        faults.append(f"it should be for every Python from 3.11 on, and is for {tag}")
    return faults


def wrong_with_wheel(wheel: pathlib.Path) -> list[str]:
    """All of these, of a wheel with compiled kernels for many systems."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        installed = pathlib.Path(folder)
        faults = wrong_with_contents(installed) + wrong_with_metadata(installed)
        if "manylinux_2_28" not in wheel.name:
            faults.append(f"{wheel.name} is for one system: its name must have manylinux_2_28")
        extensions = sorted(str(path.relative_to(installed)) for path in installed.rglob("*.so*"))
        if extensions != ["vattn/_C.abi3.so"]:
            return [*faults, f"its only library should be vattn/_C.abi3.so, and there are {extensions}"]
        record = json.loads((installed / "vattn/_build.json").read_text())
        if record["error"]:
            faults.append(f"its record speaks of an error: {record['error']}")
        return faults + wrong_with_extension(installed / extensions[0])


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for wheel in map(pathlib.Path, sys.argv[1:]):
        faults = wrong_with_wheel(wheel)
        if faults:
            sys.exit("\n".join(f"{wheel.name}: {fault}" for fault in faults))
        print(f"{wheel.name}: nothing is wrong")
