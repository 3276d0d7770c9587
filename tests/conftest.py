"""One set of kernel tests for both worlds: Triton on a GPU, or its interpreter where there is none.

The interpreter runs a kernel as numpy, on the CPU. It has two gaps, which are filled
here so that the tests mean what they say: it multiplies bfloat16 matrices by their bits, and rounds float32 to bfloat16
towards zero. And it wastes most of its time: it patches ``triton.language`` again for each helper that a kernel calls,
and copies the memory behind every argument onto itself at the end, all of it, also when a test maps gigabytes and
touches little.
"""

import os
from pathlib import Path

import pytest
import torch
import torch._functorch.config
from hypothesis import settings

# A run of the tests says what the change did, and not what was drawn; `--hypothesis-profile=random` looks for more.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", derandomize=False, deadline=None)
settings.register_profile("fuzz", deadline=None, max_examples=int(os.environ.get("EXAMPLES", 10_000)), print_blob=True)
settings.load_profile("repeatable")

# torch.compile finds a backward on disk by the forward's graph: that of a version with another schema would be called.
torch._functorch.config.enable_autograd_cache = False

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its decorators look


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _complete_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # no Triton for this platform
        return
    builder = interpreter.InterpreterBuilder
    dot, cast, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang
    patched: set[int] = set()  # modules, by their globals, whose view of the language this launch has patched

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    class Launch:
        """The patches of one launch, undone at its end."""

        def __init__(self, scope):
            self.scope = scope

        def restore(self) -> None:
            patched.clear()
            self.scope.restore()

    def patch_lang(fn):
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return Launch(patch(fn))

    builder.create_dot, builder.cast_impl, interpreter._patch_lang = create_dot, cast_impl, patch_lang
    if not torch.cuda.is_available():
        interpreter.GridExecutor._restore_args_dev = lambda *args: None


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two short videos, in which a light square moves: one's own, for the examples."""
    from vattn.training import write_video

    folder = tmp_path_factory.mktemp("videos")
    for name, step in (("right.mp4", 1), ("left.mp4", -1)):
        frames = torch.full((128, 24, 32, 3), 40, dtype=torch.uint8)
        for number, frame in enumerate(frames):
            left = (12 + step * number) % 24
            frame[8:16, left : left + 8] = 220
        write_video(folder / name, frames)
    return folder
