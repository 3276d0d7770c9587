"""The benchmark harness: what it compares, what it refuses to time, what it stores and draws."""

import dataclasses
import functools
import json
import re

import pytest
import torch

import vattn
from benchmarks import harness, plots, records, report, tangents
from benchmarks import measure as measuring
from benchmarks.__main__ import main
from benchmarks.gate import Gate
from benchmarks.harness import Session
from benchmarks.registry import Provider, load_operator, operator_names
from vattn._library import KERNEL_DEVICES

CPU = torch.device("cpu")
PASSES = ["forward", "forward+backward"]


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    """No test looks at how long something took."""
    monkeypatch.setattr(measuring, "SECONDS_PER_ROUND", 1e-4)
    monkeypatch.setitem(measuring.MM_SIZE, "cpu", 64)
    monkeypatch.setitem(measuring.COPY_BYTES, "cpu", 2**16)


@pytest.fixture(scope="module")
def leap():
    return load_operator("leap_attention")


def measure(operator, provider_names=None, passes=PASSES, dtype=torch.float32):
    session = Session(operator, dtype, CPU, provider_names, rounds=1)
    return [line for lines in session.measure(operator.cases["quick"][0], passes) for line in lines]


def with_provider(operator, name, role, build):
    """`operator` with the provider `name` replaced, or added."""
    others = [provider for provider in operator.providers if provider.name != name]
    return dataclasses.replace(operator, providers=[*others, Provider(name, role, build)])


def off_by(operator, amount):
    """The official formula, its output off by a share `amount` where it matters least: in the last sample's end."""
    (official,) = (provider for provider in operator.providers if provider.name == "official")

    def build(case, device):
        run = official.build(case, device)

        def wrong(qkv):
            factors = torch.ones(case.output_shape)
            factors[-1, -1, -1, -1] += amount
            return run(qkv) * factors

        return wrong

    return build


@pytest.mark.parametrize("name", operator_names())
def test_an_operator_is_complete(name):
    operator = load_operator(name)
    assert operator.name == name
    assert {"default", "gpu", "quick"} <= operator.cases.keys()
    assert [provider.role for provider in operator.providers].count("vattn") == 1
    assert any(provider.role == "peer" for provider in operator.providers)
    provider_names = [provider.name for provider in operator.providers]
    assert len(set(provider_names)) == len(provider_names)
    for cases in operator.cases.values():
        assert len({case.name for case in cases}) == len(cases) > 0


@pytest.mark.parametrize("name", operator_names())
def test_a_case_describes_its_reference(name):
    for case in load_operator(name).cases["quick"]:
        out = case.reference(*(torch.randn(shape) for shape in case.leaf_shapes))
        assert tuple(out.shape) == case.output_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_eager_providers_agree(leap, dtype):
    eager = ["vattn", "sdpa", "official", "sdpa-pregathered"]
    lines = measure(leap, eager, dtype=dtype)
    assert [(line.pass_name, line.provider) for line in lines] == [(p, name) for p in PASSES for name in eager]
    for line in lines:
        assert line.reason is None
        assert line.measured is not None
        assert 0 < line.error <= line.budget


@pytest.mark.slow
@pytest.mark.parametrize("case", load_operator("edge_sparse_attention").cases["quick"], ids=lambda case: case.name)
def test_sparse_and_dense_providers_do_their_own_work_right(case):
    """The gradient of the table is that of all samples, and dense ones are judged by dense definitions."""
    operator = load_operator("edge_sparse_attention")
    eager = [p.name for p in operator.providers if p.name != "flex" and "cpu" in p.devices]
    for lines in Session(operator, torch.float32, CPU, eager, rounds=1).measure(case, PASSES):
        assert [(line.provider, line.reason) for line in lines] == [(name, None) for name in eager]
        text = "\n".join(operator.remarks(lines))
        for name in ("dense", "dense+bias"):
            assert f"times {case.density:.1%} of {name}\n" in text + "\n"
        assert ("a new layout takes" in text) == (lines[0].pass_name == "forward")


@pytest.mark.parametrize("name", ["axial_attention", "nearest_code"])
def test_providers_of_further_operators_agree(name):
    """What has no gradient is measured forward only."""
    operator = load_operator(name)
    eager = [p.name for p in operator.providers if p.name != "flex" and "cpu" in p.devices]
    for case in operator.cases["quick"]:
        passes = PASSES if case.output_dtype is None else PASSES[:1]
        measured = Session(operator, torch.float32, CPU, eager, rounds=1).measure(case, PASSES)
        assert [[(line.pass_name, line.provider, line.reason) for line in lines] for lines in measured] == [
            [(pass_name, provider, None) for provider in eager] for pass_name in passes
        ]


@pytest.mark.parametrize("case", load_operator("nearest_code").cases["quick"], ids=lambda case: case.name)
def test_the_formula_finds_the_nearest_codes_of_the_definition(case):
    x, codebook = (torch.randn(shape, dtype=torch.float64) for shape in case.leaf_shapes)
    assert torch.equal(case.reference(x, codebook), vattn.reference.nearest_code(x, codebook))


@pytest.mark.parametrize(
    ("codes", "error"),
    [
        pytest.param([0, 0], 0.0, id="lowest"),
        pytest.param([1, 0], 0.0, id="equally near"),
        pytest.param([0, 2], 2.0, id="farther"),
    ],
)
def test_a_code_must_be_as_near_as_any(codes, error):
    case = dataclasses.replace(load_operator("nearest_code").cases["quick"][0], B=1, N=2, C=1, K=3)
    leaves = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[1.0], [-1.0], [3.0]])
    gate = Gate(case, leaves, torch.zeros(case.output_shape), type(case).reference)
    verdict = gate.judge(torch.tensor([codes]))
    assert verdict.error == error
    assert (verdict.complaint is None) == (error == 0)


def test_a_limit_that_does_the_wrong_work_is_red():
    operator = load_operator("edge_sparse_attention")
    (dense,) = (provider for provider in operator.providers if provider.name == "dense+bias")
    sparse = dataclasses.replace(dense, name="sparse", build=operator.providers[0].build)
    operator = dataclasses.replace(operator, providers=[*operator.providers, sparse])
    (line,) = measure(operator, ["sparse"], passes=["forward"])
    assert line.reason.startswith("red at the gate: output is off by")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        pytest.param({"block_size": 55}, "block_size must divide T \\* side \\* side=784", id="short block"),
        pytest.param({"num_random": 14}, "num_random must be below the number of blocks, 14", id="few blocks"),
    ],
)
def test_an_edge_case_is_one_that_every_provider_can_compute(sizes, message):
    case = load_operator("edge_sparse_attention").cases["default"][0]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(case, **sizes)


def test_one_wrong_element_is_red_and_not_timed(leap):
    lines = measure(with_provider(leap, "wrong", "peer", off_by(leap, 1e-3)), ["vattn", "wrong"])
    vattn, wrong = lines[:2]
    assert wrong.measured is None
    assert wrong.reason.startswith("red at the gate: output is off by")
    assert wrong.error > wrong.budget
    assert vattn.best_peer is None
    assert vattn.measured.speedup is None


def test_a_wrong_gradient_is_red_in_the_backward_only(leap):
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    (official,) = (provider for provider in leap.providers if provider.name == "official")

    def build(case, device):
        run = official.build(case, device)
        return lambda qkv: Forward.apply(run(qkv))

    forward, backward = measure(with_provider(leap, "wrong", "peer", build), ["wrong"])
    assert forward.measured is not None
    assert backward.measured is None
    assert backward.reason.startswith("red at the gate: gradient 0 is off by")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda out: out * torch.nan, "output is off by nan", id="nan"),
        pytest.param(lambda out: out.transpose(0, 1), "output must be contiguous", id="not ready for the next layer"),
        pytest.param(lambda out: [][0], "unavailable: IndexError", id="raises"),
    ],
)
def test_an_unusable_output_is_not_timed(leap, change, reason):
    (official,) = (provider for provider in leap.providers if provider.name == "official")

    def build(case, device):
        run = official.build(case, device)
        return lambda qkv: change(run(qkv))

    (line,) = measure(with_provider(leap, "wrong", "peer", build), ["wrong"], passes=["forward"])
    assert line.measured is None
    assert reason in line.reason


def test_a_provider_that_cannot_be_built_says_why(leap):
    def build(case, device):
        raise RuntimeError("not here")

    lines = measure(with_provider(leap, "absent", "other", build), ["vattn", "absent"])
    assert [line.reason for line in lines] == [None, "unavailable: RuntimeError: not here"] * 2


def test_the_best_peer_is_the_one_compared_with(leap):
    vattn, sdpa, official = measure(leap, ["vattn", "sdpa", "official"], passes=["forward"])
    fastest = min((sdpa, official), key=lambda line: line.measured.median)
    assert vattn.best_peer == fastest.provider
    assert vattn.measured.speedup == pytest.approx(fastest.measured.median / vattn.measured.median)
    assert f"best peer / vattn: geometric mean {vattn.measured.speedup:.2f}x" in report.summary([vattn, sdpa, official])


def test_peak_memory_counts_what_is_freed_on_the_way():
    x = torch.ones(1000)
    y = [torch.ones(500)]

    def function():
        y.clear()  # was there before: giving it back does not lower the peak
        scratch = torch.empty(3000)
        result = -x
        del scratch
        return result + torch.empty(1000)

    assert measuring.peak_memory(function, CPU) == 4 * (3000 + 1000)


def test_extra_memory_shows_a_formula_that_keeps_the_scores(leap):
    case = dataclasses.replace(leap.cases["quick"][0], N=65)
    operator = dataclasses.replace(leap, cases={"quick": [case]})
    (official,) = measure(operator, ["official"], passes=["forward"])
    scores = case.B * case.H * case.T * case.N * 2 * case.N * 4
    assert official.measured.extra_memory >= scores


@pytest.fixture
def two_threads():
    """Each thread has its own scratch, and the kernels cut their work by the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def scratch(attend, pass_name, *axes):
    """Bytes beyond output and lse, or in the backward beyond the gradients and one buffer like lse."""
    q, k, v = (torch.randn(1, *axes, 1, 64).movedim(-2, 1).requires_grad_() for _ in range(3))
    rows = q[..., 0].nbytes
    with torch.set_grad_enabled(pass_name != "forward"):
        if pass_name == "forward":
            return measuring.peak_memory(functools.partial(attend, q, k, v), CPU) - q.nbytes - rows
        out = attend(q, k, v)
        backward = functools.partial(torch.autograd.grad, out, (q, k, v), torch.randn(q.shape))
        return measuring.peak_memory(backward, CPU) - 3 * q.nbytes - rows


shifted_leap_attention = functools.partial(vattn.leap_attention, leap=1, fold_div=4)
compiled_kernels = pytest.mark.skipif("cpu" not in KERNEL_DEVICES, reason="the reference keeps the scores")


@compiled_kernels
@pytest.mark.parametrize("pass_name", PASSES)
def test_leap_attention_holds_nothing_that_grows_with_the_frames(two_threads, pass_name):
    small, large = (scratch(shifted_leap_attention, pass_name, frames, 50) for frames in (8, 16))
    assert small == large


@compiled_kernels
def test_the_forward_of_leap_attention_holds_nothing_that_grows_with_the_tokens(two_threads):
    small, large = (scratch(shifted_leap_attention, "forward", 2, tokens) for tokens in (1024, 2048))
    assert small == large


@compiled_kernels
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("pass_name", PASSES)
def test_axial_attention_holds_nothing_that_grows_with_the_grid(two_threads, pass_name, dim):
    attend = functools.partial(vattn.axial_attention, dim=dim)
    small, large = (scratch(attend, pass_name, *grid) for grid in ((8, 16, 16), (8, 32, 32)))
    assert small == large


@compiled_kernels
def test_nearest_code_holds_a_number_for_each_code(two_threads):
    x = torch.randn(1024, 64)
    small, large = (
        measuring.peak_memory(functools.partial(vattn.nearest_code, x, torch.randn(codes, 64)), CPU)
        for codes in (256, 4096)
    )
    assert large - small == 4 * (4096 - 256)


def test_stored_lines_come_back_and_are_drawn(leap, tmp_path):
    lines = measure(leap, ["vattn", "sdpa"])
    path = records.store(lines, tmp_path)
    records.store([dataclasses.replace(lines[0], reason="red at the gate", measured=None)], tmp_path)
    assert records.load("leap_attention", tmp_path)[:-1] == lines

    first, *_, last = map(json.loads, path.read_text().splitlines())
    assert first.keys() == {field.name for field in dataclasses.fields(records.Line)}
    assert first["measured"].keys() == {field.name for field in dataclasses.fields(records.Measured)}
    assert first["sizes"] == dataclasses.asdict(leap.cases["quick"][0])
    assert first["versions"].keys() == {"python", "torch", "triton", "vattn"}
    assert last["measured"] is None

    pictures = plots.plot("leap_attention", tmp_path)
    assert [picture.name.rsplit("-", 2)[1:] for picture in pictures] == [
        ["float32", "speed.png"],
        ["float32", "memory.png"],
    ]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_a_plot_shows_the_last_run_only(leap, tmp_path, monkeypatch):
    (line,) = measure(leap, ["vattn"], passes=["forward"])
    records.store([dataclasses.replace(line, run="2001-01-01T00:00:00+00:00", provider="older"), line], tmp_path)
    drawn = []
    monkeypatch.setattr(plots, "_draw", lambda group, value, label, path: drawn.append(group))
    plots.plot("leap_attention", tmp_path)
    assert drawn[0] == {("forward", line.case): [line]}


def test_nothing_stored_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `python -m benchmarks leap_attention` first"):
        plots.plot("leap_attention", tmp_path)


def test_the_command_line_refuses_no_rounds(capsys):
    with pytest.raises(SystemExit):
        main(["leap_attention", "--device", "cpu", "--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err


def test_the_command_line_prints_stores_and_draws(tmp_path, capsys):
    arguments = ["leap_attention", "--device", "cpu", "--cases", "quick", "--rounds", "1", "--results", str(tmp_path)]
    assert main([*arguments, "--providers", "vattn", "sdpa"]) == 0
    assert "best peer / vattn: geometric mean" in capsys.readouterr().out
    assert len(records.load("leap_attention", tmp_path)) == 4
    assert main(["plot", "leap_attention", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(path) for path in sorted(tmp_path.glob("*.png"), reverse=True)]


@pytest.mark.skipif("cpu" not in KERNEL_DEVICES, reason="the extension is not built")
def test_the_table_of_tangents(capsys):
    """Of one operator, printed; a tangent that is wrong is refused."""
    tangents.main(["--device", "cpu", "--operators", "node_sparse_attention", "--rounds", "1"])
    title, name, cells = capsys.readouterr().out.splitlines()
    assert name == "node_sparse_attention B=1 Lq=512 Lk=3137 K=1000 H=12 D=64 float32"
    assert len(cells.split("  ")) >= len(tangents.COLUMNS) and "speedup" in title

    (example,) = (x for x in tangents.examples(torch.float32, CPU) if x.name.startswith("node"))
    wrong = dataclasses.replace(example, attend=lambda *inputs: 1.01 * example.attend(*inputs))
    with pytest.raises(RuntimeError, match=r"node_sparse_attention .*: the tangent is off by .*, allowed"):
        tangents.measure(wrong, CPU, rounds=1)


def test_a_case_and_a_provider_of_ones_own(tmp_path, capsys):
    """Neither needs a change to the repository; a wrong provider is named in the table and in the plot."""
    (tmp_path / "mine.py").write_text(
        "def zeros(case, device):\n    return lambda qkv: qkv.new_zeros(case.output_shape)\n"
    )
    arguments = ["leap_attention", "--device", "cpu", "--rounds", "1", "--results", str(tmp_path)]
    arguments += ["--case", "T=4,N=5,H=1,leap=2", "--provider", f"{tmp_path / 'mine.py'}:zeros", "--providers", "vattn"]
    assert main(arguments) == 0
    lines = records.load("leap_attention", tmp_path)
    assert [line.provider for line in lines] == ["vattn", "zeros"]
    assert {line.case for line in lines} == {"B=1 T=4 N=5 H=1 D=64 leap=2 fold_div=4"}
    assert lines[1].reason.startswith(harness.RED)
    assert f"zeros  {harness.RED}" in capsys.readouterr().out
    group = {("forward", lines[0].case): [dataclasses.replace(line, dirty=True) for line in lines]}
    figure = plots.figure_of(group, lambda line, lines: line.measured and line.measured.median, "seconds")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "vattn",
        "zeros: wrong in 1 of 1 cases, not timed there",
    ]
    assert "with uncommitted changes" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--case", "X=3"], "sizes of latent_attention are mode, B, .*, got 'X=3'", id="size"),
        pytest.param(["--case", "B=x"], "B must be int, got 'x'", id="value"),
        pytest.param(["--case", "H=0"], "--case: H must be at least 1, got H=0", id="no heads"),
        pytest.param(["--case", "Lk=8+0"], "--case: Lk must be at least 1, got Lk=8\\+0", id="no keys"),
        pytest.param(["--case", "Lk=8+y"], "Lk must be .*, got '8\\+y'", id="tuple"),
        pytest.param(["--provider", "nowhere.py:f"], "must be file.py:function, with a file that exists", id="file"),
        pytest.param(["--provider", f"{__file__}:nothing"], "has no function 'nothing'", id="function"),
    ],
)
def test_the_command_line_refuses_what_it_does_not_know(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["latent_attention", "--device", "cpu", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_no_shift_is_a_case_of_leap_attention_only(tmp_path, capsys):
    arguments = ["--device", "cpu", "--rounds", "1", "--no-store", "--case"]
    names = ["vattn", "sdpa", "official"]
    assert main(["leap_attention", *arguments, "T=4,N=5,H=1,D=8,leap=2,fold_div=0", "--providers", *names]) == 0
    assert "Error" not in capsys.readouterr().out
    for operator, case, message in (
        ("periodic_shift", "fold_div=0", "ShiftCase: fold_div must be at least 1, got fold_div=0"),
        ("leap_attention", "fold_div=-1", "--case: fold_div must be at least 0, got fold_div=-1"),
        ("axial_attention", "dim=3", "AxialCase: dim must be 0, 1 or 2, got dim=3"),
    ):
        with pytest.raises(SystemExit):
            main([operator, *arguments, case])
        assert message in capsys.readouterr().err


def test_help_says_what_a_provider_is_given(capsys):
    with pytest.raises(SystemExit):
        main(["leap_attention", "--help"])
    printed = capsys.readouterr().out
    assert "run(*leaves) is then given (1, 8, 197, 3, 12, 64)\n  and returns (1, 8, 197, 768)" in printed


def test_every_column_of_the_table_is_explained():
    assert ["provider", *report.MEANINGS] == list(report.COLUMNS)
