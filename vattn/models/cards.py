"""Model cards: the README.md of a saved model, which the Hugging Face Hub shows, and reads for its search.

    ---
    library_name: vattn        what the Hub reads: YAML, between two lines of dashes
    ---
    # LapsViT                  what a person reads: what it is, how to use it, its settings

The program in a card runs as it is.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vattn._version import __version__

CARD = "README.md"


def card(
    model: nn.Module,
    name: str,
    imports: Sequence[str],
    usage: str,
    config: Mapping[str, Any],
    facts: Mapping[str, str],
) -> str:
    """The card of `model`.

    Args:
        name: that it is loaded by.
        imports: what `usage` needs of the package that the class is in.
        usage: lines of Python behind the one that loads it, in which `model` is used.
        config: its settings.
        facts: of the front matter, such as its license, by the names that the Hub has for them.
    """
    kind, module = type(model), type(model).__module__
    parts = module.split(".")
    ours = parts[:2] == ["vattn", "models"]
    tags = ["vattn", "video", *([parts[2]] if ours else [])]
    front = ["library_name: vattn", *(f"{key}: {json.dumps(value)}" for key, value in facts.items())]
    front += ["tags:", *(f"- {tag}" for tag in tags)]
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in model.parameters() if x.is_floating_point()})
    loaded = f"model = {kind.__name__}.from_pretrained({json.dumps(name)})"
    if dtypes not in ([], ["float32"]):
        loaded += f".float()  # saved as {', '.join(dtypes)}"
    names = ", ".join([kind.__name__, *imports])
    lines = ["import torch", "", f"from {'.'.join(parts[:3]) if ours else module} import {names}"]
    document = inspect.getdoc(kind) or ""
    summary = document.partition("\n\n")[0]
    source = re.search(r"^Source:\n((?:    .*\n?)+)", document, re.MULTILINE)
    number = sum(x.numel() for x in model.parameters())
    paragraphs = [
        "\n".join(["---", *front, "---"]),
        f"# {kind.__name__}",
        summary,
        f"A model of `vattn` {__version__}, with {number:,} parameters ({', '.join(dtypes) or 'none'}).",
        "## How to use it",
        "Install `vattn` with the extra `models`.",
        "\n".join(["```python", *lines, "", loaded, *usage.splitlines(), "```"]),
        "## Settings",
        "\n".join(f"- `{setting}`: `{json.dumps(value)}`" for setting, value in config.items()),
    ]
    if source is not None:
        paragraphs += ["## Source", inspect.cleandoc(source[1])]
    return "\n\n".join(paragraphs) + "\n"


def random_video(config: Mapping[str, Any]) -> str:
    """A line that makes a video of frames for a model with such settings."""
    size = config["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = f"1, {config['num_frames']}, 3, {height}, {width}"
    return f"video = torch.randn({shape})  # (B, T, 3, height, width), pixels normalised as in training"
