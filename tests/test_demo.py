"""The demo compares like with like, and notices what is off."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vattn
from examples import clips, demo
from examples.options import parser, verdict


@pytest.mark.parametrize("leap", [1, 2, 4])
def test_the_plain_formula_is_leap_attention(leap):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 2, 8, 5, 8, dtype=torch.float64, generator=generator) for _ in range(3)]
    settings = {"group_size": 2, "fold_div": 4, "scale": 0.3}
    expected = vattn.leap_attention(*inputs, leap, **settings)
    torch.testing.assert_close(demo.plain_leap_attention(*inputs, leap, **settings), expected)


def test_runs_to_its_end_on_ones_own_videos(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "IMAGE_SIZE", 32)
    assert demo.main(["--videos", str(videos), "--steps", "4", "--device", "cpu", "--outputs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "training on (4, 8, 3, 32, 32)" in printed
    for part in ("vattn ", "PyTorch ", "Same result: gradients differ by at most", "over plain PyTorch: "):
        assert f"\n{part}" in printed or part in printed
    assert all((tmp_path / f"demo_{name}.png").stat().st_size > 0 for name in ("loss", "attention"))


def test_a_run_must_have_steps_that_are_timed(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", "2"])
    assert "--steps must be at least 3, as 2 are not timed, got --steps 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "failed"), [([], True), (["--steps", "29"], False), (["--videos", "x", "--steps", "90"], False)]
)
def test_only_the_clips_that_come_along_must_be_learned(capsys, given, failed):
    options = parser("", demo.NEEDS).parse_args(given)
    assert verdict([], options, demo.NEEDS.steps) == 0
    assert verdict(["too bad"], options, demo.NEEDS.steps) == int(failed)
    printed, error = capsys.readouterr()
    assert ("FAILED: too bad\n" == error and not printed) if failed else ("too bad; " in printed and not error)


@pytest.mark.parametrize(("seconds", "slower"), [((1.0, 1.5), False), ((1.5, 1.0), True)])
def test_a_loss_in_speed_is_said(capsys, seconds, slower):
    runs = [demo.Run(name, nn.Linear(1, 1), vattn.leap_attention) for name in ("vattn", "PyTorch")]
    for run, taken in zip(runs, seconds, strict=True):
        run.losses, run.seconds = [2.0, 1.0], [taken] * 4
    demo.report(*runs, [2**20, 2**21], {"attention": 0.2, "linear layers": 0.8}, 1e-6)
    printed = capsys.readouterr().out
    assert f"over plain PyTorch: {seconds[1] / seconds[0]:.2f}x." in printed
    assert ("So vattn is slower here." in printed) is slower


class Classifier(nn.Linear):
    def training_loss(self, x, labels):
        return F.cross_entropy(self(x), labels)


def test_a_gradient_that_is_off_is_noticed():
    model = Classifier(4, 2)
    runs = [demo.Run(name, copy.deepcopy(model), vattn.leap_attention) for name in ("ours", "plain")]
    for run in runs:
        run.gradients(torch.ones(3, 4), torch.tensor([0, 1, 1]))
    assert demo.gradient_difference(*runs) == 0
    runs[1].model.bias.grad *= 1.5
    assert demo.gradient_difference(*runs) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("last", "learned"), [(0.5, True), (0.9, False), (float("nan"), False)])
def test_a_loss_that_does_not_fall_is_noticed(last, learned):
    run = demo.Run("ours", nn.Linear(1, 1), vattn.leap_attention, losses=[1.0] * 5 + [last] * 5)
    assert run.learned() is learned


def test_batches_play_both_ways():
    frames = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    video, label = next(clips.batches([frames, frames], 3, 2, torch.Generator().manual_seed(0)))
    assert video.shape == (4, 3, 3, 2, 2)
    assert label.tolist() == [0, 1, 2, 3]
    step = video[:, 1:, 0, 0, 0] - video[:, :-1, 0, 0, 0]
    assert torch.equal(step.sign(), torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 2))


def test_the_shares_of_a_step():
    run = demo.Run("vattn", Classifier(64, 32), vattn.leap_attention)
    shares = demo.shares_of_step(run, torch.randn(4096, 64), torch.zeros(4096, dtype=torch.long))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["attention"] == 0 < shares["linear layers"] < 1
