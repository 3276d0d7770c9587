import pytest
import torch

import vattn
from benchmarks import host_cost
from vattn import reference


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_run_is_stored_and_shown(tmp_path, capsys):
    host_cost.main(["--cases", "leap_attention", "--turns", "1", "--results", str(tmp_path)])
    shown = capsys.readouterr().out
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith(("| leap", f"| {host_cost.PEER}"))]
    assert [len(row) for row in rows] == [1 + len(host_cost.PASSES)] * 2
    host_cost.main(["--show", "--results", str(tmp_path)])
    assert capsys.readouterr().out == shown


def test_the_way_to_the_kernels_ends():
    x = torch.randn(1, 2, 2, 1, 8)
    with host_cost.to_kernels():
        vattn.leap_attention(x, x, x, 1)
    torch.testing.assert_close(vattn.leap_attention(x, x, x, 1), reference.leap_attention(x, x, x, 1))
