"""What can be said of models over ranks without other processes: what is refused, and what would be sent."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.test_parallelize import GRID, MODES, mebt
from vattn._over_ranks import Held
from vattn.distributed import parallelize
from vattn.distributed._edge_plan import plan_of
from vattn.distributed._ranks import PaperRanks
from vattn.layout import BlockLayout
from vattn.models.batch_norm import BatchNorm2d
from vattn.models.laps import LapsViT
from vattn.models.mebt import MeBT
from vattn.models.svitt import Sparsity, SViTT, VideoAnswers, VideoEncoder, expand


def test_what_mebt_sends_does_not_grow_with_the_video() -> None:
    sent = []
    for frames in (4, 64):
        with torch.device("meta"):
            model = MeBT(11, (frames, 8, 8), dim=16, num_heads=2, modes=MODES, num_latents=5)
            codes = torch.zeros(2, frames * 64, dtype=torch.int64)
            order = codes.expand(2, -1)
        ranks = PaperRanks(1, 4)
        logits = parallelize(model, ranks)(codes, order[:, : frames * 8], order[:, frames * 8 :])
        assert logits.shape[1] == frames * 56 // 4
        forward = ranks.sent
        logits.sum().backward()
        sent.append((forward, ranks.sent))
    reads = 4  # latents of sharded tokens: for each the peak, then out and weight
    numbers = 2 * 2 * 5 * (1 + 8 + 1)
    assert sent[0][0] == sent[1][0] == reads * numbers * 4
    assert sent[0] == sent[1]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "another model": (lambda: nn.Linear(2, 2), "parallelize: model must be MeBT, LapsViT, .*, got model=Linear"),
    "a wrapper": (
        lambda: nn.Sequential(mebt()), "parallelize: model must be .*, got model=Sequential, .* one as its part 0",
    ),
    "several parts": (lambda: nn.Sequential(mebt(), mebt()), "parallelize: model must be .*, got model=Sequential$"),
    "dropout": (lambda: mebt(proj_drop=0.1), r"parallelize: dropout must be 0 .*, got .*proj_drop\.p=0\.1"),
    "dropout of embeddings": (lambda: mebt(embed_drop=0.1), r"parallelize: dropout .*, got transformer\.drop\.p=0\.1"),
    "maskgit": (
        lambda: MeBT(11, GRID, 16, 2, ("latent_enc", "maskgit"), 5),
        "LatentBlock: mode must be another one over ranks: .*, got mode='maskgit'",
    ),
    "few frames": (
        lambda: LapsViT(2, (1,), image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2),
        "LapsViT: num_frames must be at least 3, one for each rank, got 2",
    ),
    "pruning": (
        lambda: VideoEncoder(2, image_size=8, patch_size=4, dim=8, depth=10, num_heads=2, mlp_dim=8),
        r"VideoEncoder: sparsity\.keep must be 1 over ranks, .*, got 0\.7",
    ),
    "dropped paths": (
        lambda: VideoEncoder(2, depth=2, dim=8, num_heads=2, mlp_dim=8, drop_path=0.2, sparsity=Sparsity(keep=1.0)),
        r"parallelize: dropout must be 0 .*, got blocks\.1\.drop_path=0\.2",
    ),
    "twice": (
        lambda: parallelize(mebt(), PaperRanks(0, 3)), "parallelize: model must be over no ranks yet, got one over 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    before = [getattr(module, "ranks", None) for module in model.modules()]
    with pytest.raises((TypeError, ValueError), match=message):
        parallelize(model, PaperRanks(1, 3))
    assert [getattr(module, "ranks", None) for module in model.modules()] == before


def test_what_needs_a_group_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"parallelize: torch\.distributed must be initialized"):
        parallelize(mebt())
    with pytest.raises(TypeError, match=r"parallelize: mesh must be .*DeviceMesh, a ProcessGroup or None, got mesh=3"):
        parallelize(mebt(), 3)


def test_refused_later() -> None:
    sparsity = Sparsity(block_size=4, keep=1.0)
    encoder = VideoEncoder(2, image_size=8, patch_size=4, dim=8, depth=10, num_heads=2, mlp_dim=8, sparsity=sparsity)
    parallelize(encoder, PaperRanks(0, 2))
    with pytest.raises(ValueError, match=r"VideoEncoder: sparsity\.keep must be 1 over ranks"):
        expand(encoder, 4, Sparsity(keep=0.5))
    block = parallelize(mebt(), PaperRanks(0, 2)).transformer.blocks[0]
    with pytest.raises(ValueError, match="LatentBlock: attn_bias must be None over ranks"):
        block(*torch.randn(3, 1, 5, 16, dtype=torch.float64), torch.zeros(1, 1, 5, 5))


def test_a_model_over_ranks_is_saved_and_copied_as_any_other(tmp_path: Path) -> None:
    model = parallelize(mebt(), PaperRanks(0, 1))
    model.save_pretrained(tmp_path)
    loaded = MeBT.from_pretrained(tmp_path)
    assert loaded.ranks is None and list(loaded.state_dict()) == list(model.state_dict())
    copied = copy.deepcopy(model)
    assert copied.transformer.blocks[0].ranks is copied.ranks is not None


def test_batch_norms_of_narrow_weights_sum_in_float32() -> None:
    x = (30 + torch.randn(60, 4, 15, 15, generator=torch.Generator().manual_seed(0))).bfloat16()
    wide, narrow = BatchNorm2d(4), BatchNorm2d(4).bfloat16()
    narrow._held = Held(PaperRanks(0, 1))
    torch.testing.assert_close(narrow(x).float(), wide(x.float()), rtol=2**-8, atol=2e-3)
    torch.testing.assert_close(narrow.running_mean, wide.running_mean, check_dtype=False, rtol=2**-8, atol=0)
    torch.testing.assert_close(narrow.running_var, wide.running_var, check_dtype=False, rtol=2**-8, atol=0)


def test_a_model_over_ranks_is_not_pickled() -> None:
    model = parallelize(mebt(), PaperRanks(0, 2))
    for way in (pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
        with pytest.raises(
            TypeError, match=r"parallelize: a model that is pickled must .*state_dict.*, got one over 2"
        ):
            way(model)


def test_texts_that_would_read_a_share_of_the_tokens_are_refused() -> None:
    small: dict[str, Any] = {
        "video": {
            "num_frames": 2, "image_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8,
            "sparsity": Sparsity(keep=1.0, prune_after=()),
        },
    }  # fmt: skip
    text = {"vocab_size": 9, "dim": 8, "num_heads": 2, "mlp_dim": 8, "max_length": 5}
    video, ids = torch.zeros(2, 2, 3, 8, 8), torch.ones(2, 3, dtype=torch.int64)
    model = SViTT(**small, text={**text, "depth": 2, "fusion_layer": 1}, embed_dim=4, mask_id=2)
    parallelize(model.video, PaperRanks(0, 2))
    with pytest.raises(ValueError, match=r"SViTT\.encode_video: video must be over no ranks .*, got one over 2"):
        model(video, ids)
    answers = VideoAnswers(**small, question={**text, "depth": 2, "fusion_layer": 1}, answer={**text, "depth": 1})
    parallelize(answers.video, PaperRanks(0, 2))
    with pytest.raises(ValueError, match=r"VideoAnswers: video must be over no ranks .*, got one over 2"):
        answers.states(video, ids, None)


def test_one_layout_with_several_settings_in_one_trace() -> None:
    layout = BlockLayout.local_random(32, 4, num_random=2, generator=torch.Generator().manual_seed(1))

    def sent(x: torch.Tensor) -> list[torch.Tensor]:
        plans = (plan_of(layout, [16, 16], 1, past_only, False, x.device) for past_only in (False, True))
        return [x + plan.sent_tokens.sum() for plan in plans]

    found = torch.compile(sent, fullgraph=True, backend="eager")(torch.zeros(1))
    assert found == sent(torch.zeros(1)) and found[0] != found[1]


def test_a_layout_that_a_trace_makes_is_refused() -> None:
    def sent(x: torch.Tensor) -> torch.Tensor:
        return x + plan_of(BlockLayout.dense(8, 4), [4, 4], 0, False, False, x.device).sent_tokens.sum()

    with pytest.raises(Exception, match="edge_sparse_attention: layout must be made before"):
        torch.compile(sent, fullgraph=True, backend="eager")(torch.zeros(1))
