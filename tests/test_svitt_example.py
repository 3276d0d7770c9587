"""The example of SViTT on video: it runs to its end, its captions say what clips show, and held-out frames stay so."""

import itertools
import re

import pytest
import torch

from examples import captions, svitt_retrieval
from examples.captions import Caption, Clips, MadePairs, Words
from examples.pairs import OwnPairs
from vattn.models.svitt import Ranking


@pytest.fixture
def one_video(monkeypatch):
    monkeypatch.setattr(captions.clips, "NAMES", ("carphone_pristine",))


@pytest.fixture
def numbered(one_video):
    """Clips of a video whose frame t has the value t everywhere."""
    data = Clips(16)
    data.videos = {name: torch.arange(120.0).view(-1, 1, 1, 1).expand(-1, 3, 18, 18) for name in data.videos}
    return data


@pytest.mark.slow
def test_runs_to_its_end_and_resumes(one_video, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(captions, "BATCH", 4)
    monkeypatch.setattr(captions, "HELD_OUT_CLIPS", 2)
    for name in ("edge-sparse", "node-sparse"):
        monkeypatch.delitem(svitt_retrieval.SETTINGS, name)
    monkeypatch.setattr(svitt_retrieval, "STAGES", ((2, 0.7), (4, 0.5)))
    arguments = ["--steps", "2", "--size", "16", "--outputs", str(tmp_path)]
    assert svitt_retrieval.main(arguments) == 1  # two steps are not enough
    for name in ("layout", "kept", "loss"):
        assert (tmp_path / f"svitt_{name}.png").stat().st_size > 0
    printed, error = capsys.readouterr()
    for name in ("chance", *svitt_retrieval.SETTINGS, "2 frames", "4 frames"):
        assert f"\n{name} " in printed
    assert "less than 4 times as much as chance" in error
    stage = torch.load(tmp_path / "svitt_4_frames.pt", weights_only=True)
    assert stage["step"] == 1
    svitt_retrieval.main([*arguments, "--resume"])
    assert without_costs(capsys.readouterr().out) == without_costs(printed)


CAPTIONS = """file,caption
right.mp4,A square moves to the right.
right.mp4,"to the right, again"
left.mp4,A square moves to the left.
"""


@pytest.mark.slow
def test_ones_own_videos_and_captions(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(svitt_retrieval, "TIMED_STEPS", 1)
    table = tmp_path / "captions.csv"
    table.write_text(CAPTIONS)
    arguments = ["--videos", str(videos), "--captions", str(table), "--steps", "2", "--size", "16"]
    arguments += ["--outputs", str(tmp_path)]
    assert svitt_retrieval.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "\nedge- and node-sparse " in printed and "\ndense " not in printed and "6 clips were held out" in printed
    assert svitt_retrieval.main([*arguments, "--resume", "--query", "the square, ten times"]) == 0
    printed = capsys.readouterr().out
    assert "no caption has these words, which are left out: ten, times\n" in printed
    ranked = re.findall(r"^ +-?\d+\.\d\d +-?\d+\.\d\d  (.*)$", printed, re.MULTILINE)
    assert sorted(ranked) == sorted(
        f"{name}.mp4, frame {first}" for name in ("right", "left") for first in (96, 104, 112)
    )


class TestOwnPairs:
    def test_pairs_of_a_batch_are_all_different(self, videos, tmp_path):
        (tmp_path / "captions.csv").write_text(CAPTIONS)
        data = OwnPairs(tmp_path / "captions.csv", videos, 16, None)
        assert data.right.int().tolist() == [[1, 1, 0]] * 3 + [[0, 0, 1]] * 3
        torch.manual_seed(0)
        for batch in itertools.islice(data.batches(4), 5):
            assert batch.video.shape == (2, 4, 3, 16, 16) and batch.pair_ids.tolist() == [0, 1]
            texts = {tuple(row.tolist()) for row in batch.ids}
            assert len(texts) == 2 and tuple(data.ids[2].tolist()) in texts
        guessed = svitt_retrieval.by_chance(data)
        assert guessed.captions == pytest.approx([(2 / 3 + 1 / 3) / 2, 1]) and guessed.told == {}

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ("name,caption\n", r"must begin with the columns file,caption, got name,caption"),
            ("", r"must begin with the columns file,caption, got $"),
            ("file,caption\nright.mp4,\n", r"must have a file and a caption in each line, got .* in 2"),
            ("file,caption\nright.mp4,a\nright.mp4,b\n", "two different videos .*, got 1 and 2"),
            ("file,caption\nright.mp4,a\nleft.mp4,a\n", "two different captions, or more, got 2 and 1"),
            ("file,caption\nnone.mp4,a\n", r"path must be a file, got path=.*none\.mp4"),
        ],
    )
    def test_what_is_refused(self, videos, tmp_path, table, message):
        (tmp_path / "captions.csv").write_text(table)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            OwnPairs(tmp_path / "captions.csv", videos, 16, None)


def test_a_query_of_unknown_words_is_not_answered(capsys, videos, tmp_path):
    (tmp_path / "captions.csv").write_text(CAPTIONS)
    data = OwnPairs(tmp_path / "captions.csv", videos, 16, None)
    capsys.readouterr()
    svitt_retrieval.search(None, data, "ten times", seed=0)
    assert capsys.readouterr().out == "\nno caption has these words, which are left out: ten, times\n"


def test_videos_need_captions(videos, capsys):
    with pytest.raises(SystemExit):
        svitt_retrieval.main(["--videos", str(videos)])
    assert "--videos needs --captions" in capsys.readouterr().err


def without_costs(printed):
    return re.sub(r" +\d+ ms +\d+ MiB", "", printed)


def test_captions_are_all_different():
    texts = [str(caption) for caption in captions.captions()]
    assert len(set(texts)) == len(texts) == 24
    words = Words(texts)
    ids = words.encode(texts)
    assert ids.max() == len(words) - 1 and bool((ids[:, 0] == captions.FIRST).all())
    assert not (ids == captions.MASK).any()
    shortest = min(range(24), key=lambda i: len(texts[i].split()))
    row = ids[shortest][ids[shortest] != captions.PAD]
    assert [words.known[i - captions.MASK - 1] for i in row[1:]] == texts[shortest].split()


def test_clips_are_what_their_captions_say(numbered):
    def frames(part, direction, speed):
        caption = Caption("carphone_pristine", part, direction, speed)
        return [int(frame.flatten()[0]) for frame in numbered.clip(caption, 8, numbered.ranges(caption)[0][0])]

    assert frames("early", "forwards", "slowly") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert frames("early", "backwards", "slowly") == [3, 3, 2, 2, 1, 1, 0, 0]
    fast = frames("late", "forwards", "fast")
    assert (fast[0], fast[-1]) == (60, 75)


def test_held_out_frames_are_not_trained_on(numbered):
    trained, tested = set(), set()
    torch.manual_seed(0)
    for parts in itertools.product(["carphone_pristine"], captions.PARTS, captions.DIRECTIONS, captions.SPANS):
        caption = Caption(*parts)
        for _ in range(100):
            trained |= set(numbered.random(caption, 16).flatten().tolist())
        held_out = numbered.held_out(caption, 16, 3)
        assert held_out.shape == (3, 16, 3, 16, 16)
        tested |= set(held_out.flatten().tolist())
    assert not trained & tested
    assert trained | tested == set(range(120))


def test_chance():
    assert svitt_retrieval.chance(1, 1, 24) == pytest.approx(1 / 24)
    assert svitt_retrieval.chance(3, 1, 24) == pytest.approx(3 / 24)
    assert svitt_retrieval.chance(2, 4, 8) == pytest.approx(1 - (4 / 8) * (3 / 7))


def test_a_perfect_model_is_right_about_everything(numbered, monkeypatch):
    """Where captions and clips are ranked by what they are, all numbers are 100 %."""
    data = MadePairs(16)
    right = data.right.float()
    for name, scores in (("rank_texts", right), ("rank_videos", right.T)):
        ranking = Ranking(scores.argsort(dim=1, descending=True, stable=True), scores, scores[:, :0])
        monkeypatch.setattr(svitt_retrieval, name, lambda *_, ranking=ranking, **__: ranking)
    model = svitt_retrieval.new_model(16, data, 2, svitt_retrieval.DENSE).eval()
    found = svitt_retrieval.evaluate(svitt_retrieval.Run(None, model), data, seed=0)
    told = dict.fromkeys(("video", "part", "direction", "speed"), 1.0)
    assert found == dict.fromkeys(("similarity", "matching"), svitt_retrieval.Found([1.0] * 2, [1.0] * 2, told))


def found(share, **told):
    return svitt_retrieval.Found([share] * 2, [share] * 2, told)


def test_what_was_not_learned_is_said():
    guessed = found(0.04, direction=0.5, speed=0.5)
    not_learned = svitt_retrieval.not_told(found(0.3, direction=0.61, speed=0.63), guessed, clips=72)
    assert not_learned == ["direction 61%"]  # two deviations of 72 guesses are 11.8 points


def test_margins(capsys):
    def missed(**shares):
        settings = {name: {"similarity": found(share)} for name, share in shares.items()}
        return svitt_retrieval.failures(settings, found(0.05))

    assert missed(dense=0.3, sparse=0.2) == []
    assert "-10.0 points from dense" in capsys.readouterr().out
    assert missed(dense=0.5, sparse=0.3) == ["sparse is more than 15 points behind dense"]
    assert missed(dense=0.19, sparse=0.2) == ["dense has 19.0%, less than 4 times as much as chance"]


def test_changes():
    video = torch.rand(2, 4, 3, 8, 8) / 100
    seen, grey = captions.with_changes(video), video.mean(2)
    assert seen.shape == video.shape
    torch.testing.assert_close(seen[:, :, 0], grey)
    torch.testing.assert_close(seen[:, 2, 1].atanh(), captions.AMPLIFIED * (grey[:, 2] - grey[:, 1]))
    torch.testing.assert_close(seen[:, :, 2].atanh(), captions.WARMTH * (video[:, :, 0] - video[:, :, 2]))
    assert not seen[:, 0, 1].any()
