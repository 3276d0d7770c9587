"""SViTT's video side: its attention, its orders of tokens, its encoder; its numbers are checked in tests/golden."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.svitt_models import DENSE, SPARSE, random_video, random_words, randomize, seed, small_model, video_encoder
from vattn import BlockLayout
from vattn.models.svitt import Sparsity, VideoEncoder, expand, token_order
from vattn.nn import SparseSelfAttention


class TestSparseSelfAttention:
    """The formula, and what fills up a short block."""

    WINDOW = (2, 3, 3)

    def attention(self, **settings: Any) -> SparseSelfAttention:
        return randomize(SparseSelfAttention(8, 2, **({"window": self.WINDOW} | settings))).double()

    def formula(self, attention: SparseSelfAttention, x: Tensor, times: Tensor, bias: Any = 0.0) -> tuple[Tensor, ...]:
        """The output for keys that are read `times`, and the probabilities."""
        q, k, v = (
            y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (attention.query(x), attention.key(x), attention.value(x))
        )
        weights = times * (q @ k.mT / 2 + bias).exp()
        probabilities = weights / weights.sum(-1, keepdim=True)
        return attention.proj((probabilities @ v).transpose(1, 2).flatten(2)), probabilities

    def test_formula(self) -> None:
        attention, x = self.attention(), torch.randn(2, 1 + 18, 8).double()
        layout = BlockLayout.local_random(18, 4, num_random=2, generator=seed())
        out, importance = attention(x, layout, return_importance=True)
        assert attention.position_bias is not None
        expected, probabilities = self.formula(attention, x, layout.to_mask().double(), attention.position_bias())
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(importance, probabilities[:, :, 0, 1:].mean(1))

    def test_without_a_layout_all_read_all(self) -> None:
        attention, x = self.attention(window=None), torch.randn(2, 1 + 18, 8).double()
        torch.testing.assert_close(attention(x), self.formula(attention, x, torch.ones(19, 19).double())[0])

    def test_positions_are_those_of_the_bias(self) -> None:
        attention, x = self.attention(), torch.randn(2, 1 + 5, 8).double()
        positions = torch.stack([torch.randperm(18, generator=seed(i))[:5] for i in range(2)])
        assert attention.position_bias is not None
        expected, _ = self.formula(attention, x, torch.ones(6, 6).double(), attention.position_bias(positions))
        torch.testing.assert_close(attention(x, None, positions), expected)

    @pytest.mark.parametrize("window", [WINDOW, None], ids=["bias", "no bias"])
    def test_zeros_fill_up_the_last_block(self, window: Any) -> None:
        """As if there were tokens without key and value, which the blocks read that read the last one."""
        attention = self.attention(window=window, pad_keys="zero")
        x = torch.randn(2, 1 + 18, 8).double().requires_grad_()
        layout = BlockLayout(18, 5, torch.tensor([0, 2, 3, 5, 8]), torch.tensor([0, 3, 1, 3, 3, 2, 3, 0]), num_global=1)
        times = torch.zeros(21, 21).double()
        times[0, :19] = times[:, 0] = 1
        for block, columns in enumerate([[0, 3], [1], [3, 3], [2, 3, 0]]):
            for column in columns:
                times[1 + 5 * block : 6 + 5 * block, 1 + 5 * column : 6 + 5 * column] += 1
        bias = torch.zeros(2, 21, 21).double()
        if attention.position_bias is not None:
            bias[:, :19, :19] = attention.position_bias()
            bias[:, 1:, 19:] = attention.position_bias()[:, 1:2, :1]  # from a token to the global one
        q, k, v = (
            F.pad(y, (0, 0, 0, 2)).unflatten(-1, (2, 4)).transpose(1, 2)
            for y in (attention.query(x), attention.key(x), attention.value(x))
        )
        weights = times * (q @ k.mT / 2 + bias).exp()
        expected = attention.proj((weights / weights.sum(-1, keepdim=True) @ v)[:, :, :19].transpose(1, 2).flatten(2))
        out = attention(x, layout)
        torch.testing.assert_close(out, expected)
        inputs = [x, *attention.parameters()]
        for actual, wanted in zip(
            torch.autograd.grad(out.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(actual, wanted)

    def test_zeros_change_nothing_where_blocks_are_full(self) -> None:
        attention, x = self.attention(), torch.randn(2, 1 + 18, 8).double()
        layout = BlockLayout.dense(18, 6, num_global=1)
        masked = attention(x, layout)
        attention.pad_keys = "zero"
        assert torch.equal(attention(x, layout), masked)

    def test_dropout_only_in_training(self) -> None:
        attention, x = self.attention(attn_drop=0.5, proj_drop=0.5), torch.randn(2, 1 + 18, 8).double()
        assert torch.equal(attention(x), attention(x))
        attention.train()
        assert not torch.equal(attention(x), attention(x))

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"num_heads": 3}, "dim must be a multiple of num_heads=3, got dim=8"),
            ({"pad_keys": "none"}, "pad_keys must be one of mask, zero, got pad_keys='none'"),
            ({"num_global": 0, "pad_keys": "zero"}, "needs a global token"),
        ],
    )
    def test_refuses(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SparseSelfAttention(**({"dim": 8, "num_heads": 2} | settings))


class TestTokenOrder:
    """Curves through a grid."""

    @pytest.mark.parametrize("window", [(4, 4, 4), (1, 5, 3), (3, 1, 7), (2, 2, 1)], ids=str)
    @pytest.mark.parametrize("order", ["zcurve", "hilbert"])
    def test_is_a_permutation(self, order: str, window: tuple[int, int, int]) -> None:
        found = token_order(order, window)
        assert found is not None and torch.equal(found.sort().values, torch.arange(math.prod(window)))

    def test_hilbert_steps_to_neighbours(self) -> None:
        found = token_order("hilbert", (8, 8, 8))
        assert found is not None
        steps = torch.stack(torch.unravel_index(found, (8, 8, 8))).diff().abs().sum(0)
        assert bool((steps == 1).all())

    def test_zcurve_goes_through_boxes(self) -> None:
        found = token_order("zcurve", (4, 4, 4))
        assert found is not None
        boxes = torch.stack(torch.unravel_index(found, (4, 4, 4))).view(3, 8, 8)  # 8 boxes of 2 x 2 x 2
        assert bool((boxes // 2 == boxes[:, :, :1] // 2).all())

    def test_raster_moves_nothing(self) -> None:
        assert token_order("raster", (2, 3, 4)) is None

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="order must be one of raster, zcurve, hilbert, got order='spiral'"):
            token_order("spiral", (2, 2, 2))
        with pytest.raises(ValueError, match="window must be at least 1"):
            token_order("hilbert", (2, 0, 2))


class TestSparsity:
    """Who reads whom."""

    def test_dense_needs_no_layout(self) -> None:
        assert DENSE.layout(100) is None

    def test_layout_is_drawn_from_the_generator(self) -> None:
        sparsity = Sparsity(block_size=5, num_local=3, num_random=2)
        first, same, other = (sparsity.layout(98, seed(number)) for number in (0, 0, 1))
        assert first is not None and same is not None and other is not None
        assert first.columns.numel() == 20 * 5 and first.num_global == 1
        assert torch.equal(first.columns, same.columns) and not torch.equal(first.columns, other.columns)

    @pytest.mark.parametrize("num_tokens", [0, 1, 8, 9, 10])
    def test_few_blocks_read_each_other_once(self, num_tokens: int) -> None:
        layout = Sparsity(block_size=5, num_local=1, num_random=1).layout(num_tokens)
        assert layout is not None
        assert torch.equal(layout.block_counts(), torch.ones_like(layout.block_counts()))

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"num_local": 2}, "num_local must be odd or 0, got num_local=2"),
            ({"keep": 0.0}, "keep must be above 0 and at most 1, got keep=0.0"),
            ({"block_size": 0}, "block_size must be at least 1"),
            ({"keep_by": "luck"}, "keep_by must be one of cls_attn, random, got keep_by='luck'"),
        ],
    )
    def test_refuses(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Sparsity(**settings)


class TestVideoEncoder:
    """Edges, nodes, orders, and more frames."""

    def test_one_dense_frame_is_beit(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.BeitConfig(
            image_size=12, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, use_mask_token=False, use_relative_position_bias=True, layer_norm_eps=1e-12,
        )  # fmt: skip
        beit = randomize(transformers.BeitModel(config))
        state = {_beit_name(name): weight for name, weight in beit.state_dict().items()}
        encoder = VideoEncoder.from_official(state, {"image_size": 12})
        assert encoder.window == (1, 3, 3)
        image = torch.randn(2, 3, 12, 12, generator=seed())
        expected, seen = beit(image), encoder(image[:, None])
        torch.testing.assert_close(seen.tokens, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen.pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)

    def test_prunes_at_the_official_rates(self) -> None:
        sparsity = Sparsity(keep=0.6, prune_after=(0, 1, 2))
        encoder = video_encoder(image_size=14, patch_size=1, depth=3, dim=4, sparsity=sparsity)
        seen = encoder(torch.randn(1, 4, 3, 14, 14), generator=seed())
        assert [kept.shape[1] for kept in seen.kept] == [471, 283, 170]  # of 784
        assert seen.tokens.shape == (1, 171, 4)
        for before, after in zip(seen.kept, seen.kept[1:], strict=False):
            assert bool(torch.isin(after, before).all()) and bool((after.diff() > 0).all())

    @pytest.mark.parametrize("keep_by", ["cls_attn", "random"])
    def test_a_seed_reproduces(self, keep_by: str) -> None:
        encoder, video = video_encoder(sparsity=dataclasses.replace(SPARSE, keep_by=keep_by)), random_video()
        first, same, other = (encoder(video, generator=seed(number)) for number in (0, 0, 1))
        assert torch.equal(first.tokens, same.tokens) and torch.equal(first.kept[0], same.kept[0])
        assert not torch.equal(first.pooled, other.pooled)

    @pytest.mark.parametrize("keep_by", ["cls_attn", "random"])
    def test_evaluation_draws_the_same_again(self, keep_by: str) -> None:
        """In each call, alone and in a batch; another seed draws otherwise, and so does training."""
        sparsity = dataclasses.replace(SPARSE, keep_by=keep_by)
        encoder, video = video_encoder(sparsity=sparsity), random_video(3)
        seen, again = encoder(video), encoder(video)
        assert torch.equal(seen.tokens, again.tokens) and torch.equal(seen.pooled, again.pooled)
        alone = [encoder(x) for x in video.split(1)]
        assert torch.equal(torch.cat([x.kept[0] for x in alone]), seen.kept[0])
        torch.testing.assert_close(torch.cat([x.pooled for x in alone]), seen.pooled)
        assert not torch.equal(video_encoder(sparsity=sparsity, eval_seed=1)(video).pooled, seen.pooled)
        encoder.train()
        assert not torch.equal(encoder(video).pooled, encoder(video).pooled)

    def test_layers_draw_different_layouts(self) -> None:
        encoder, layouts = video_encoder(sparsity=dataclasses.replace(SPARSE, keep=1.0)), []
        for block in encoder.blocks:
            block.register_forward_pre_hook(lambda _block, inputs: layouts.append(inputs[1]))
        encoder(random_video())
        encoder(random_video())
        assert layouts[0] != layouts[1] and layouts[:2] == layouts[2:]

    def test_the_seed_of_evaluation_is_checked(self) -> None:
        for value, message in ((-1, "at least 0"), (2**16 + 1, "at most 65536")):
            with pytest.raises(
                ValueError, match=rf"^VideoEncoder: eval_seed must be {message}, got eval_seed={value}$"
            ):
                video_encoder(eval_seed=value)

    def test_an_exported_encoder_draws_what_it_draws_in_evaluation(self) -> None:
        encoder, video = video_encoder(), random_video()
        program = torch.export.export(encoder, (video,)).module()
        expected = encoder(video)
        for _ in range(2):
            torch.testing.assert_close(program(video).pooled, expected.pooled)

    def test_a_path_that_is_always_dropped(self) -> None:
        encoder = video_encoder(drop_path=1.0, sparsity=DENSE).train()
        seen = encoder(random_video())
        seen.pooled.sum().backward()
        assert bool(seen.pooled.isfinite().all())
        assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in encoder.parameters())

    def test_layouts_can_be_given(self) -> None:
        encoder, video = video_encoder(sparsity=dataclasses.replace(SPARSE, keep=1.0)), random_video()
        generator = seed()
        layouts = [encoder.sparsity.layout(24, generator) for _ in range(2)]
        torch.testing.assert_close(encoder(video, layouts).tokens, encoder(video, generator=seed()).tokens)
        dense = video_encoder(sparsity=DENSE)
        torch.testing.assert_close(encoder(video, [None, None]).tokens, dense(video).tokens)

    @pytest.mark.parametrize("order", ["zcurve", "hilbert"])
    def test_order_only_reorders_what_is_dense(self, order: str) -> None:
        raster, curve = (video_encoder(sparsity=DENSE, order=name)(random_video()) for name in ("raster", order))
        permutation = token_order(order, (4, 2, 3))
        torch.testing.assert_close(curve.tokens[:, 1:], raster.tokens[:, 1:][:, permutation])
        torch.testing.assert_close(curve.pooled, raster.pooled)

    def test_positions_follow_the_order(self) -> None:
        seen = video_encoder(order="hilbert")(random_video(), generator=seed())
        order = token_order("hilbert", (4, 2, 3))
        assert order is not None
        place = order.argsort()[seen.kept[0]]
        assert bool((place.diff() > 0).all())  # kept tokens stay in the order of the curve

    def test_random_keeps_any(self) -> None:
        encoder = video_encoder(sparsity=dataclasses.replace(SPARSE, keep_by="random"))
        kept = torch.cat([encoder(random_video(), generator=seed(number)).kept[0] for number in range(20)])
        assert len(kept.unique()) == 24

    def test_global_token_without_mean_pooling(self) -> None:
        encoder = video_encoder(mean_pooling=False)
        seen = encoder(random_video(), generator=seed())
        assert torch.equal(seen.pooled, seen.tokens[:, 0])
        assert isinstance(encoder.norm, nn.LayerNorm)

    def test_drops_paths_only_in_training(self) -> None:
        encoder, video = video_encoder(sparsity=DENSE, drop_path=0.5), random_video()
        assert torch.equal(encoder(video).pooled, encoder(video).pooled)
        encoder.train()
        torch.manual_seed(0)
        assert not torch.equal(encoder(video).pooled, encoder(video).pooled)

    def test_a_dropped_path_leaves_the_sample(self) -> None:
        encoder, video = video_encoder(sparsity=DENSE, drop_path=1 - 1e-9), random_video()
        embedded = []
        encoder.blocks[1].register_forward_pre_hook(lambda _block, inputs: embedded.append(inputs[0]))
        seen = encoder.train()(video)
        assert torch.equal(seen.tokens, embedded[0])  # the last layer has added nothing

    @pytest.mark.parametrize(
        "call, message",
        [
            pytest.param(
                lambda m: m(torch.randn(2, 4, 3, 8, 8)), r"video must have shape \(B, 4, 3, 8, 12\)", id="video"
            ),
            pytest.param(lambda m: m(random_video(), [None]), "layouts must be one for each of 2 layers", id="layouts"),
            pytest.param(
                lambda m: expand(m, 4, Sparsity(prune_after=(2,))), "prune_after must be layers from 0 to 1", id="layer"
            ),
            pytest.param(lambda m: expand(nn.Linear(2, 2), 4), "model must have a VideoEncoder", id="none"),
        ],
    )
    def test_refuses(self, call: Callable[[VideoEncoder], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call(video_encoder())

    @pytest.mark.parametrize(
        "config, message",
        [
            ({"image_size": 24}, "config must have the image_size of the weights"),
            ({"num_cls_tokens": 2}, "class token"),
        ],
        ids=["image_size", "num_cls_tokens"],
    )
    def test_checkpoint_refuses(self, config: dict[str, Any], message: str) -> None:
        weights = {
            "embeddings.cls_token": torch.zeros(1, 1, 16),
            "embeddings.patch_embeddings.projection.weight": torch.zeros(16, 3, 4, 4),
            "encoder.layer.0.intermediate.dense.weight": torch.zeros(32, 16),
            "encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table": torch.zeros(
                28, 2
            ),
        }
        with pytest.raises(ValueError, match=message):
            VideoEncoder.from_official(weights, config)


@pytest.mark.parametrize(
    "setting", [{"keep": x} for x in (math.nan, 0, -1.0, 1.5, "1", True)] + [{"pad_keys": "none"}, {"keep_by": "luck"}]
)
def test_sparsity_refuses(setting: dict[str, Any]) -> None:
    name = next(iter(setting))
    with pytest.raises((TypeError, ValueError), match=f"^Sparsity: {name} must be .*, got {name}="):
        Sparsity(**setting)


@pytest.mark.parametrize("setting", [{"drop_path": math.nan}, {"drop_path": 2}, {"layer_scale": math.inf}])
def test_encoder_refuses(setting: dict[str, Any]) -> None:
    name = next(iter(setting))
    with pytest.raises(ValueError, match=f"^VideoEncoder: {name} must be .*, got {name}="):
        video_encoder(**setting)


class TestExpand:
    """More frames, and sparser."""

    @pytest.mark.parametrize("position_bias", [True, False])
    def test_frames_are_checked(self, position_bias: bool) -> None:
        with pytest.raises(ValueError, match=r"^expand: num_frames must be at least 1, got num_frames=0$"):
            expand(video_encoder(position_bias=position_bias), 0)

    def test_biases_are_inflated(self) -> None:
        encoder = video_encoder()
        longer = expand(encoder, 6)
        assert longer.window == (6, 2, 3)
        blocks: Any = zip(encoder.blocks, longer.blocks, strict=True)
        for block, longer_block in blocks:
            assert torch.equal(longer_block.attn.position_bias.table, block.attn.position_bias.inflate(6).table)

    def test_from_an_image_model_all_frames_are_alike(self) -> None:
        video, encoder = random_video(num_frames=3), expand(video_encoder(num_frames=1, sparsity=DENSE), 3)
        torch.testing.assert_close(encoder(video).pooled, encoder(video[:, [2, 0, 1]]).pooled)

    def test_as_many_frames_are_the_same_model(self) -> None:
        encoder, video = video_encoder(), random_video()
        torch.testing.assert_close(
            expand(encoder, 4)(video, generator=seed()).tokens, encoder(video, generator=seed()).tokens
        )

    def test_curriculum(self) -> None:
        model = small_model(order="hilbert")
        before = copy.deepcopy(model.state_dict())
        for num_frames, keep in ((8, 0.4), (16, 0.3)):
            model_now = expand(model, num_frames, dataclasses.replace(SPARSE, keep=keep))
            seen = model_now.encode_video(random_video(num_frames=num_frames), generator=seed())
            assert seen.tokens.shape[1] == 1 + math.ceil(keep * 6 * num_frames)
            losses = model_now.train()(random_video(num_frames=num_frames), random_words(), generator=seed())
            losses.total.backward()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def _beit_name(name: str) -> str:
    """A name of BEiT's weights in transformers 5, as it is in checkpoints."""
    for new, old in (
        ("layers.", "encoder.layer."), (".relative_position_bias.", ".attention.attention.relative_position_bias."),
        (".attention.q_proj.", ".attention.attention.query."), (".attention.k_proj.", ".attention.attention.key."),
        (".attention.v_proj.", ".attention.attention.value."), (".attention.o_proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
    ):  # fmt: skip
        name = name.replace(new, old)
    return name
