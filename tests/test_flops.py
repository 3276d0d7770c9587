"""What ``FlopCounterMode`` counts: multiplications and additions of the pairs of a query and a key that there are."""

import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vattn
from tests.calls import as_tuple
from tests.layouts import layout_of
from vattn import _library
from vattn.reference.leap_attention import leap_groups

pytestmark = pytest.mark.skipif("cpu" not in _library.KERNEL_DEVICES, reason="the extension is not built")
ROOT = pathlib.Path(__file__).parents[1]
B, H, D = 2, 2, 8
LAYOUT = layout_of([[0, 2, 2], [], [1, 0, 2]], num_tokens=5, block_size=2, num_global=1)  # the last block has a token
PER_HEAD = layout_of([[0, 2], [1], [2], [2, 2], [0], []], num_tokens=5, block_size=2, num_global=1, sets=2)
PER_SAMPLE = layout_of([[0, 2], [1], [2], [2, 2], [0], []], num_tokens=5, block_size=2, num_global=1, samples=2)
ORDERED = layout_of(
    [[0, 2, 2], [], [3, 0], [2]], 5, 2, num_global=1, order=torch.tensor([3, 0, -1, -1, 4, -1, 1, 2])
)  # a block has a token, and one has none
KEPT, LENGTHS = torch.tensor([[0, 2, 2], [5, 1, 0]]), torch.tensor([2, 5])


def edge_pairs(layout: vattn.BlockLayout) -> int:
    counts = layout.token_counts()
    return B * int(counts.sum()) * H // (layout.num_samples * layout.num_heads)


# Each with its inputs, and how many pairs meet.
Case = tuple[Callable[..., Any], list[tuple[int, ...]], int]
CASES: dict[str, Case] = {
    "leap_attention": (
        lambda q, k, v: vattn.leap_attention(q, k, v, 2),
        [(B, H, 5, 3, D)] * 3,
        B * H * 9 * sum(len(group) ** 2 for group in leap_groups(5, 2)),
    ),
    "latent_attention": (vattn.latent_attention, [(B, H, 3, D), *[(B, H, 6, D)] * 2], B * H * 18),
    "segments": (
        lambda q, k, v: vattn.latent_attention(q, [k, q], [v, q]),
        [(B, H, 3, D), *[(B, H, 6, D)] * 2],
        B * H * 3 * 9,
    ),
    "key_lengths": (
        lambda q, k, v: vattn.latent_attention(q, k, v, key_lengths=LENGTHS),
        [(B, H, 3, D), *[(B, H, 6, D)] * 2],
        H * 3 * 7,
    ),
    "axial_attention": (lambda q, k, v: vattn.axial_attention(q, k, v, 1), [(B, H, 2, 3, 4, D)] * 3, B * H * 24 * 3),
    "node_sparse_attention": (
        lambda q, k, v: vattn.node_sparse_attention(q, k, v, KEPT),
        [(B, H, 4, D), *[(B, H, 6, D)] * 2],
        B * H * 12,
    ),
    "kept_lengths": (
        lambda q, k, v: vattn.node_sparse_attention(q, k, v, KEPT, kept_lengths=torch.arange(B) + 1),
        [(B, H, 4, D), *[(B, H, 6, D)] * 2],
        H * 4 * B * (B + 1) // 2,
    ),
    "edge_sparse_attention": (
        lambda q, k, v: vattn.edge_sparse_attention(q, k, v, LAYOUT), [(B, H, 6, D)] * 3, edge_pairs(LAYOUT)
    ),
    "a layout per head": (
        lambda q, k, v: vattn.edge_sparse_attention(q, k, v, PER_HEAD), [(B, H, 6, D)] * 3, edge_pairs(PER_HEAD)
    ),
    "a layout per sample": (
        lambda q, k, v: vattn.edge_sparse_attention(q, k, v, PER_SAMPLE), [(B, H, 6, D)] * 3, edge_pairs(PER_SAMPLE)
    ),
    "an order": (
        lambda q, k, v: vattn.edge_sparse_attention(q, k, v, ORDERED), [(B, H, 6, D)] * 3, edge_pairs(ORDERED)
    ),
}  # fmt: skip


def count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def leaves(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_both_passes(name, compiled):
    """Two products forward, five in the backward and in the tangent."""
    function, shapes, pairs = CASES[name]
    inputs = leaves(shapes)
    torch._dynamo.reset()
    run = torch.compile(function, backend="aot_eager") if compiled else function
    run(*inputs)
    assert count(lambda: run(*inputs)) == 2 * 2 * pairs * D
    assert count(lambda: run(*inputs).sum().backward()) == 2 * 7 * pairs * D
    plain = tuple(x.detach() for x in inputs)
    with torch.inference_mode():
        assert count(lambda: run(*plain)) == 2 * 2 * pairs * D
    if not compiled:
        assert count(lambda: torch.func.jvp(function, plain, plain)) == 2 * 7 * pairs * D


def test_token_importance():
    query, key = torch.randn(B, H, 3, D), torch.randn(B, H, 6, D)
    assert count(lambda: vattn.token_importance(query, key)) == 2 * 2 * B * H * 18 * D
    assert count(lambda: vattn.token_importance(query, key, key_lengths=LENGTHS)) == 2 * 2 * H * 3 * 7 * D
    assert count(lambda: vattn.token_importance(query, key, lse=torch.zeros(B, H, 3))) == 2 * B * H * 18 * D


def test_nearest_code():
    assert count(lambda: vattn.nearest_code(torch.randn(5, 7, 4), torch.randn(9, 4))) == 2 * 35 * 9 * 4


def test_what_multiplies_nothing():
    x, lse, tokens = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 2, 3, 4), torch.randn(2, 7, 4)
    assert count(lambda: vattn.periodic_shift(x, 4)) == 0
    assert count(lambda: vattn.merge_attention([x, x], [lse, lse])) == 0
    assert count(lambda: vattn.select_tokens(tokens, torch.rand(2, 6), 3)) == 0


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_values(device):
    """What a layout or lengths hold is not known: blocks and segments count as whole ones."""
    layout = LAYOUT.to("meta")
    mode = torch._subclasses.FakeTensorMode() if device == "fake" else torch.device("meta")
    with mode:
        q = torch.randn(B, H, 6, D, device=None if device == "fake" else device)
        lengths = torch.ones(B, dtype=torch.int64)
        assert count(lambda: vattn.latent_attention(q, q, q, key_lengths=lengths)) == 2 * 2 * B * H * 36 * D
        if device == "meta":
            pairs = B * H * (6 * 2 * 2 + 6 + 5)
            assert count(lambda: vattn.edge_sparse_attention(q, q, q, layout)) == 2 * 2 * pairs * D


def test_a_graph_for_all_scales():
    q, factor = torch.randn(B, H, 6, D, requires_grad=True), torch.tensor(0.5, dtype=torch.float64)
    op = vattn.ops.OPERATORS["latent_attention"].traced.op
    assert count(lambda: op(q, [q], [q], None, 0 * factor, None, factor)[0].sum().backward()) == 2 * 7 * B * H * 36 * D


def test_layers_of_a_model():
    """The counter says which module does what."""
    model = nn.Sequential(vattn.nn.LeapAttention(16, 2, num_frames=4, leap=2), vattn.nn.AxialAttention(16, 2, axis=0))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(8, 5, 16)).sum().backward()
    counts = {name: {str(op): n for op, n in found.items()} for name, found in counter.get_flop_counts().items()}
    leap, axial = 2 * 2 * 2 * 2 * 4 * 2 * 25 * 8, 2 * 2 * 8 * 2 * 5 * 5 * 8
    assert counts["Sequential.0"]["vattn.leap_attention"] == leap
    assert counts["Sequential.0"]["vattn.leap_attention_backward"] == leap * 5 // 2
    assert counts["Sequential.1"]["vattn.axial_attention"] == axial
    assert "vattn.leap_attention" not in counts["Sequential.1"]
    assert counts["Global"]["vattn.axial_attention_backward"] == axial * 5 // 2


def test_the_op_by_the_names_of_its_arguments():
    q = torch.randn(1, 1, 2, 3, D)
    named = {"leap": 1, "group_size": 2, "fold_div": 0, "dropout_p": 0.0, "seed": None, "scale": 0.5}
    assert count(lambda: torch.ops.vattn.leap_attention(q, q, value=q, **named)) == 2 * 2 * 36 * D


ORDERS = {
    "before": "from torch.utils.flop_counter import FlopCounterMode\nimport vattn\n{counted}",
    "after": "import vattn\nfrom torch.utils.flop_counter import FlopCounterMode\n{counted}",
    "after a search": "import vattn, importlib.util\nimportlib.util.find_spec('torch.utils.flop_counter')\n"
    "from torch.utils.flop_counter import FlopCounterMode\n{counted}",
    "after a call": "import vattn\ncall()\nfrom torch.utils.flop_counter import FlopCounterMode\n{counted}",
    "while it counts": "from torch.utils.flop_counter import FlopCounterMode\n"
    "with FlopCounterMode(display=False) as counter:\n    import vattn\n    call()",
}
CALL = """
def call():
    import vattn
    vattn.leap_attention(q, q, q, 1)
    torch.ops.vattn.leap_attention(q, q, q, 1, 2, 0, 0.0, None, 0.5)
    with torch.inference_mode():
        torch.ops.vattn.leap_attention(q.clone(), q.clone(), q.clone(), 1, 2, 0, 0.0, None, 0.5)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_imports_in_any_order(order):
    """The function and the op, the op in inference mode, too."""
    counted = "with FlopCounterMode(display=False) as counter:\n    call()"
    program = (
        f"import sys, torch\nq = torch.randn(1, 1, 2, 3, 4)\n{CALL}\n{ORDERS[order].format(counted=counted)}\n"
        f"assert counter.get_total_flops() == {3 * 2 * 2 * 36 * 4}, counter\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_vattn_does_not_import_the_counter():
    program = (
        "import sys, vattn\nassert 'triton' not in sys.modules and 'torch.utils.flop_counter' not in sys.modules\n"
        "import torch.utils.flop_counter as f\nassert not any('vattn' in type(x).__module__ for x in sys.meta_path)\n"
        "assert torch.ops.vattn.leap_attention in f.flop_registry"
    )
    subprocess.run([sys.executable, "-c", program.replace("import sys,", "import sys, torch,")], check=True, cwd=ROOT)


def test_results_are_those_without_a_counter():
    q = torch.randn(B, H, 6, D)
    expected = as_tuple(vattn.latent_attention(q, q, q, return_lse=True))
    with FlopCounterMode(display=False):
        found = as_tuple(vattn.latent_attention(q, q, q, return_lse=True))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
