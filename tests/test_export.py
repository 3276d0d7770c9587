"""``torch.export`` of every model, strict and not, with a batch of any size: what is saved and loaded is the model."""

import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import vattn
from tests import svitt_models as svitt
from tests.model_zoo import MODELS
from tests.programs import PROGRAMS, make
from vattn import _library

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")


def test_every_model_is_exported():
    assert set(PROGRAMS) == set(MODELS)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_exported_programs_are_the_model(name, strict):
    """For another batch than that of the example, and after a way through a file."""
    torch.manual_seed(0)
    program, example = make(name), PROGRAMS[name].inputs(2)
    batch = Dim("batch", min=1, max=64)
    shapes = (tuple({0: batch} for _ in example),)
    exported = torch.export.export(program, example, dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 5, 13):
        inputs = PROGRAMS[name].inputs(size)
        found = []
        for run in (program, loaded):
            torch.manual_seed(1)  # which decides what is drawn
            found.append(tree_leaves(run(*inputs)))
        assert len(found[0]) == len(found[1]) > 0
        for x, y in zip(*found, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_any_number_of_frames(strict):
    """Of an operator, whose tokens are as dynamic as its batch."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return vattn.leap_attention(x, x, x, 2, fold_div=2)

    frames = Dim("frames", min=2, max=64)
    exported = torch.export.export(
        Attention(), (torch.randn(2, 2, 5, 3, 8),), dynamic_shapes=({0: Dim("batch"), 2: frames},), strict=strict
    )
    for shape in ((3, 2, 7, 3, 8), (5, 2, 2, 3, 8)):
        x = torch.randn(shape)
        assert torch.equal(exported.module()(x), Attention()(x))


def test_words_that_are_hidden():
    """A mask is an input as well, of which the values are not those of the example."""
    model = svitt.text_encoder()
    words, mask = torch.randint(2, 29, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    exported = torch.export.export(model, (words, mask), dynamic_shapes=({0: Dim("batch")},) * 2)
    mask[1, 3:] = 0
    torch.testing.assert_close(exported.module()(words, mask), model(words, mask))


LOADED_ELSEWHERE = """
import json, pathlib, sys, torch

folder = pathlib.Path(sys.argv[1])
loaders = {
    "model.pt2": lambda path: torch.export.load(path).module(),
    "package.pt2": torch._inductor.aoti_load_package,
}
found = {}
for name, load in loaders.items():
    try:
        load(str(folder / name))
    except RuntimeError as error:
        found[name] = str(error)
assert "vattn" not in sys.modules
import vattn

video, logits = torch.load(folder / "expected.pt")
for name, load in loaders.items():
    torch.testing.assert_close(load(str(folder / name))(video), logits, rtol=1e-5, atol=1e-5)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_files_in_another_process():
    """Those of docs/export.md. Without vattn they say what is missing; with it they run, for another batch."""
    page = (ROOT / "docs" / "export.md").read_text()
    before, _, compiled = page.partition("## AOTInductor")
    programs = re.findall(r"```python\n(.*?)```", before, re.DOTALL)
    programs += re.findall(r"```py\n(.*?)```", compiled, re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        for program in programs:
            exec(program, names)
    folder, video = names["folder"], torch.randn(3, 2, 3, 8, 8)
    torch.save((video, names["model"](video).detach()), folder / "expected.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE, folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shutil.rmtree(folder)
    errors = json.loads(run.stdout.splitlines()[-1])
    for said in (errors["model.pt2"], errors["package.pt2"], "We failed to resolve torch.ops.vattn.leap_attention"):
        assert said.strip() in " ".join(page.split())
    assert "failed to resolve torch.ops.vattn.leap_attention.default to an operator" in run.stderr
    assert "Please import the custom op to register it before deserializing" in run.stderr
