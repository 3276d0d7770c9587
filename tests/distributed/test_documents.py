"""The program of docs/distributed.md, as its reader runs it: by torchrun, on two ranks."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_the_program_runs_under_torchrun(tmp_path: pathlib.Path) -> None:
    program = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)[0]
    (tmp_path / "context.py").write_text(program)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "context.py")], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    said = sorted(re.findall(r"rank (\d) of 2: norm of the output ([\d.]+), (\d+) bytes sent", done.stdout))
    assert [rank for rank, *_ in said] == ["0", "1"]
    assert said[0][1:] == said[1][1:] and said[0][2] == "1064960"
