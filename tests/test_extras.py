"""Where an optional package is missing, the error names the extra that brings it."""

import subprocess
import sys

CALLS = {
    "vattn.training": "av",
    "vattn.integrations.transformers": "transformers",
    "set_attention": "diffusers",
    "leap_blocks": "timm",
    "BlockLayout.plot": "matplotlib",
}
EXTRAS = {"av": "training", "matplotlib": "plot"}  # of the others: as the package

PROGRAM = f"""
import importlib, sys
for package in {[*CALLS.values()]}:
    sys.modules[package] = None
import torch
import vattn
from vattn.integrations import diffusers, timm

calls = (
    lambda: importlib.import_module("vattn.training"),
    lambda: importlib.import_module("vattn.integrations.transformers"),
    lambda: diffusers.set_attention(torch.nn.Linear(1, 1), diffusers.Dense()),
    lambda: timm.leap_blocks(8),
    lambda: vattn.BlockLayout.dense(4, 2).plot("never.png"),
)
for call in calls:
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_a_missing_package_is_named_with_its_extra():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        f"{op}: {package} is needed: install vattn with the extra {EXTRAS.get(package, package)!r}"
        for op, package in CALLS.items()
    ]
