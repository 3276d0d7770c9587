"""Notebooks are kept as Markdown, which the tests run too; here they are executed, with what they print and draw."""

import pathlib
import re

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)


def executed(path: pathlib.Path) -> dict[str, str | bytes]:
    """Run the notebook at `path`; its page, its pictures and the notebook itself, by the names of their files."""
    notebook = jupytext.read(path)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    options = Config(KernelManager={"transport": "ipc"})  # no open port
    folder = {"metadata": {"path": str(path.parents[2])}}
    NotebookClient(notebook, timeout=600, resources=folder, config=options).execute()
    for cell in notebook.cells:  # of what libraries say to a terminal, nothing is of the notebook
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    # Outputs are indented blocks: as text they are neither highlighted as Python nor taken for a list.
    text = "".join(part if part.startswith("```") else OUTPUT.sub(_fenced, part) for part in FENCED.split(text))
    name = f"{path.stem}.ipynb"
    text = re.sub(r"\A(\s*# .*\n)", rf"\1\n[Download this notebook]({name})\n", text)
    files: dict[str, str | bytes] = {path.name: text, name: nbformat.writes(notebook)}
    return files | {pathlib.PurePosixPath(key).name: data for key, data in resources.get("outputs", {}).items()}


def _fenced(match: re.Match[str]) -> str:
    lines = [line.removeprefix("    ") for line in match[0].strip("\n").split("\n")]
    if not match[0].strip():
        return "\n"
    return "```text\n" + "\n".join(lines).rstrip() + "\n```\n"
