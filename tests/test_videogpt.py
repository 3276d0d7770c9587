"""VideoGPT's prior: what a code depends on, and sampling code by code; its numbers are checked in tests/golden."""

import argparse
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vattn.models.videogpt import AttentionStack, ResNet3d, VideoGPT, generate
from vattn.models.videogpt.layers import GridEmbedding, LayerNorm
from vattn.models.vqvae import VQVAE
from vattn.nn import AxialAttention

GRID = (2, 4, 4)
FRAME_SHAPE = (1, 8, 8)
RESNET: dict[str, Any] = {"dim": 6, "num_blocks": (1, 2, 1, 1), "width": 4}
SPARSE: dict[str, Any] = {"attention": "sparse", "block_size": 4, "num_local_blocks": 1}
KINDS = [pytest.param({}, id="full"), pytest.param(SPARSE, id="sparse")]


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def small_model(*, with_frames: bool = False, **settings: Any) -> VideoGPT:
    torch.manual_seed(0)
    if with_frames:
        settings = {"resnet": RESNET, "frame_shape": FRAME_SHAPE} | settings
    model = VideoGPT(7, 5, GRID, dim=12, num_heads=2, num_layers=2, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
    return model


def random_codes(batch: int = 2) -> Tensor:
    return torch.randint(7, (batch, *GRID), generator=seed())


def conditions(model: VideoGPT, batch: int = 2) -> dict[str, Tensor]:
    given = {}
    if model.num_classes is not None:
        given["classes"] = torch.arange(batch) % model.num_classes
    if model.frame_shape is not None:
        given["frames"] = torch.randn(batch, 3, *model.frame_shape, generator=seed())
    return given


class TestLayers:
    """Norms, places, attention along an axis."""

    def test_norm_of_equal_numbers_is_its_bias(self) -> None:
        norm, x = LayerNorm(4), torch.full((2, 4), 3.0, requires_grad=True)
        nn.init.constant_(norm.b, 0.5)
        out = norm(x)
        assert torch.equal(out, torch.full((2, 4), 0.5))
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        assert gradient.abs().max() < 1e-3

    def test_norm_is_computed_in_float32(self) -> None:
        norm, x = LayerNorm(64), 200 + torch.randn(3, 64)
        low = norm(x.half())
        assert low.dtype == torch.float16
        torch.testing.assert_close(low, norm(x.half().float()).half(), rtol=0, atol=0)

    def test_each_place_has_its_own_vector(self) -> None:
        embedding = GridEmbedding((2, 3, 4), 6)
        table = embedding()
        assert table.shape == (24, 6) and len(table.unique(dim=0)) == 24
        assert torch.equal(torch.stack([embedding(i) for i in range(24)]), table)
        with pytest.raises(ValueError, match=r"^GridEmbedding: dim must be a multiple of the axes of the grid \(3\)"):
            GridEmbedding((2, 3, 4), 7)

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_axial_attention_stays_in_its_line(self, axis: int) -> None:
        attention, x = AxialAttention(8, 2, axis), torch.randn(1, 2, 3, 4, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(attention(x)[0, 1, 1, 1].sum(), x)
        reached = gradient[0].abs().sum(-1) > 0
        line = torch.zeros(2, 3, 4, dtype=torch.bool)
        line.movedim(axis, -1)[1, 1] = True
        assert torch.equal(reached, line)

    def test_axial_attention_errors(self) -> None:
        with pytest.raises(ValueError, match=r"^AxialAttention: dim must be a multiple of num_heads=3, got dim=8$"):
            AxialAttention(8, 3, 0)


class TestWhoReadsWhom:
    """What the logits of a code depend on."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_only_codes_before_it(self, kind: dict[str, Any]) -> None:
        model, codes = small_model(**kind), random_codes(1)
        before = model(codes).flatten(1, -2)
        for i in (0, 13, 31):
            changed = codes.flatten(1).clone()
            changed[0, i] = (changed[0, i] + 1) % 7
            differs = (model(changed.view_as(codes)).flatten(1, -2) != before).any(-1)[0]
            assert not differs[: i + 1].any() and (i == 31 or differs[i + 1])

    def test_sparse_layers_read_what_the_layout_has(self) -> None:
        stack = AttentionStack(GRID, 12, 2, 1, **SPARSE).double()
        x = torch.randn(1, 32, 12, dtype=torch.float64, requires_grad=True)
        assert stack.layout is not None
        reads = stack.layout.to_mask().tril()
        out = stack(x)[0].sum(-1)
        for i in range(32):
            (gradient,) = torch.autograd.grad(out[i], x, retain_graph=True)
            assert torch.equal(gradient[0, :-1].abs().sum(-1) > 0, reads[i, 1:])  # token j is where j - 1 was

    def test_classes_and_frames_change_what_it_says(self) -> None:
        model, codes = small_model(num_classes=3, with_frames=True), random_codes()
        given = conditions(model)
        logits = model(codes, **given)
        one_hot = torch.eye(3)[given["classes"]]
        assert torch.equal(model(codes, classes=one_hot, frames=given["frames"]), logits)
        for other in ({"classes": given["classes"] + 1}, {"frames": given["frames"] + 1}):
            assert not torch.allclose(model(codes, **given | other), logits)


class TestSampling:
    """One code after the other."""

    @pytest.mark.parametrize(
        "settings",
        [
            *KINDS,
            pytest.param({"num_classes": 3}, id="full, classes"),
            pytest.param({"with_frames": True}, id="full, frames"),
            pytest.param(SPARSE | {"num_classes": 3, "with_frames": True}, id="sparse, classes, frames"),
        ],
    )
    def test_steps_equal_the_whole(self, settings: dict[str, Any]) -> None:
        model, codes = small_model(**settings), random_codes()
        given, flat = conditions(model), codes.flatten(1)
        with torch.no_grad():
            state = model.begin(len(codes), **given)
            rows = [model.step(flat[:, max(i - 1, 0)], state) for i in range(flat.shape[1])]
            expected = model(codes, **given).flatten(1, -2)
        torch.testing.assert_close(torch.stack(rows, 1), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_step_computes_one_row(self, kind: dict[str, Any]) -> None:
        model = small_model(with_frames=True, **kind)
        state, rows = model.begin(2, **conditions(model)), []
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                module.register_forward_pre_hook(lambda _module, inputs: rows.append(tuple(inputs[0].shape[:2])))
        for _ in range(4):
            model.step(torch.zeros(2, dtype=torch.int64), state)
            assert rows and set(rows) == {(2, 1)}

    @pytest.mark.parametrize("kind", KINDS)
    def test_greedy_codes_are_the_most_likely(self, kind: dict[str, Any]) -> None:
        model = small_model(num_classes=2, **kind)
        classes = torch.tensor([0, 1])
        codes = generate(model, 2, classes=classes, temperature=0.0)
        assert torch.equal(codes, model(codes, classes=classes).argmax(-1))

    def test_seed(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = small_model()
        first, again, other = (generate(model, 2, generator=seed(number), progress=number == 1) for number in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert first.shape == (2, *GRID) and first.max() < 7
        assert "VideoGPT: 100%" in capsys.readouterr().err

    @pytest.mark.parametrize("kind", KINDS)
    def test_fewer_frames_are_the_first_ones(self, kind: dict[str, Any]) -> None:
        model = small_model(**kind)
        whole, part = (generate(model, shape, temperature=0.0) for shape in (2, (2, 1, 4, 4)))
        assert torch.equal(part, whole[:, :1])

    @pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 0, 4, 4), (2, 2, 4, 3), (2, 32)])
    def test_a_shape_that_is_no_part_of_the_grid(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"^generate: shape must be (B or \(B, 2, 4, 4\)|at least 1), got shape="):
            generate(small_model(), shape)

    def test_autocast(self) -> None:
        model = small_model(**SPARSE)
        with torch.autocast("cpu", torch.bfloat16):
            codes = generate(model, 1, generator=seed())
        assert codes.shape == (1, *GRID)

    def test_training_mode_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^generate: model must be in evaluation mode, got model.training=True$"):
            generate(small_model().train())


class TestModel:
    """Training, checkpoints, messages."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_training_lowers_the_loss(self, kind: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model = VideoGPT(7, 5, GRID, dim=24, num_heads=2, num_layers=1, dropout=0.1, attn_drop=0.1, **kind)
        codes, losses = random_codes(), []
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(60):
            loss = model.training_loss(codes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(torch.tensor(7.0).log().item())  # knows nothing
        assert losses[-1] < 0.5 * losses[0]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("settings", [{}, {"num_classes": 3, "with_frames": True}], ids=["plain", "conditions"])
    def test_official_state_dicts(self, kind: dict[str, Any], settings: dict[str, Any]) -> None:
        settings = settings | kind | ({"block_size": 32, "num_local_blocks": 4} if kind else {})
        model, codes = small_model(**settings), random_codes()
        tokenizer = VQVAE(7, 5, hidden=4, num_blocks=1).eval()
        tokenizer.codebook.embeddings.copy_(model.embeddings)
        weights = {name: x for name, x in model.state_dict().items() if name != "embeddings"}
        weights |= {f"vqvae.{name}": x for name, x in tokenizer.state_dict().items()}
        weights["attn_stack.attn_nets.0.attn.attn.mask"] = torch.ones(32, 32).tril()
        checkpoint = {"state_dict": weights, "epoch": 3}
        config = {"heads": 2, "attn_type": kind.get("attention", "full"), "dropout": 0.2, "attn_dropout": 0.3}
        loaded = VideoGPT.from_official(checkpoint, {"args": argparse.Namespace(**config)}, dropout=0.1)
        rates = {module.p for module in loaded.modules() if isinstance(module, nn.Dropout)}
        assert rates == {0.1, 0.3}
        assert not loaded.training and loaded.frame_shape == model.frame_shape
        given = conditions(model)
        assert torch.equal(loaded(codes, **given), model(codes, **given))
        video = torch.randn(1, 3, 4, 8, 8)
        assert torch.equal(VQVAE.from_official(checkpoint).encode(video), tokenizer.encode(video))

    def test_what_official_weights_do_not_show_is_asked_for(self) -> None:
        """Heads; and whether attention is full, unless there are the masks that the official code has for it."""
        op, model = "VideoGPT.from_official", small_model()
        weights = {name: x for name, x in model.state_dict().items() if name != "embeddings"}
        weights["vqvae.codebook.embeddings"] = model.embeddings
        with pytest.raises(ValueError, match=rf"^{op}: config must have heads, got nothing$"):
            VideoGPT.from_official(weights)
        with pytest.raises(ValueError, match=rf"^{op}: config must have heads, got attn_type$"):
            VideoGPT.from_official(weights, {"attn_type": "full"})
        with pytest.raises(ValueError, match=rf"^{op}: config must have attn_type, got heads$"):
            VideoGPT.from_official(weights, {"heads": 2})
        assert VideoGPT.from_official(weights, num_heads=2, attention="full").config["attention"] == "full"
        masks = {"attn_stack.attn_nets.0.attn.attn.mask": torch.ones(32, 32).tril()}
        assert VideoGPT.from_official(weights | masks, {"heads": 2}).config["attention"] == "full"

    def test_the_codebook_of_a_tokenizer_is_copied(self) -> None:
        tokenizer = VQVAE(7, 5, hidden=4, num_blocks=1)
        model = VideoGPT.for_tokenizer(tokenizer, GRID, dim=12, num_heads=2, num_layers=1)
        before = tokenizer.codebook.embeddings.clone()
        tokenizer.codebook.embeddings.zero_()
        assert torch.equal(model.embeddings, before)

    def test_checkpoints_hold_the_codebook(self) -> None:
        model, codes = small_model(), random_codes()
        other = VideoGPT(7, 5, GRID, dim=12, num_heads=2, num_layers=2).eval()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(other(codes), model(codes))

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"attention": "dense"}, "AttentionStack: attention must be 'full' or 'sparse', got attention='dense'"),
            ({"num_classes": 0}, "VideoGPT: num_classes must be at least 1, got num_classes=0"),
            (
                {"resnet": {"dim": 6}},
                "VideoGPT: frame_shape must be given with resnet, got frame_shape=None, resnet={'dim': 6}",
            ),
            (
                {"frame_shape": (1, 9, 8), "with_frames": True},
                r"VideoGPT: frame_shape must be multiples of \(1, 4, 4\), got frame_shape=\(1, 9, 8\)",
            ),
        ],
        ids=["attention", "classes", "ResNet without frames", "frame shape"],
    )
    def test_wrong_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            small_model(**settings)

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"codes": torch.zeros(2, 4, 4)}, r"codes must have shape \(B, 2, 4, 4\), got codes.shape=\(2, 4, 4\)"),
            ({"classes": None}, "classes must be given, got classes=None"),
            ({"frames": torch.zeros(2, 3, 1, 8, 8)}, "frames must not be given to a model without them, got frames="),
            (
                {"classes": torch.zeros(3, dtype=torch.int64)},
                r"classes must have shape \(2,\) or \(2, 3\), got classes.shape=\(3, 3\)",
            ),
        ],
        ids=["codes", "no classes", "frames", "classes"],
    )
    def test_wrong_inputs(self, given: dict[str, Any], message: str) -> None:
        inputs = {"codes": random_codes(), "classes": torch.zeros(2, dtype=torch.int64)} | given
        with pytest.raises(ValueError, match=f"^VideoGPT: {message}"):
            small_model(num_classes=3)(inputs.pop("codes"), **inputs)

    @pytest.mark.parametrize("num_frames", [1, 2])
    def test_resnet_in_bfloat16(self, num_frames: int) -> None:
        """Of one frame, too, which convolutions of bfloat16 on a CPU must not pad themselves."""
        resnet, frames = ResNet3d(dim=6, num_blocks=(1, 1, 1, 1), width=4), torch.randn(2, 3, num_frames, 8, 8)
        with torch.no_grad():
            exact = resnet(frames)
            found = resnet.bfloat16()(frames.bfloat16())
        torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)

    def test_resnet_of_four_levels_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^ResNet3d: downsample must be at most 8, got downsample=\(1, 16, 4\)$"):
            ResNet3d(downsample=(1, 16, 4))
