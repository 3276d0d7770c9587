"""SViTT's language side: text that reads a video, losses, retrieval, answers; its numbers are in tests/golden."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.svitt_models import (
    DENSE,
    OFFICIAL_CONFIG,
    TEXT,
    VIDEO,
    answers_model,
    official_answers,
    official_checkpoint,
    official_svitt,
    random_video,
    random_words,
    randomize,
    seed,
    small_model,
    text_encoder,
    video_encoder,
)
from vattn.models import svitt
from vattn.models.svitt import Sparsity, SViTT, TextEncoder, VideoAnswers
from vattn.models.svitt.weights import head_weights


class TestTextEncoder:
    """BERT, and how it reads a video."""

    def test_text_layers_are_bert(self) -> None:
        transformers = pytest.importorskip("transformers")
        bert = randomize(transformers.BertModel(_bert_config(transformers), add_pooling_layer=False))
        encoder = TextEncoder.from_official(bert.state_dict(), {"num_attention_heads": 2})
        ids, mask = random_words(), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        expected = bert(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(encoder(ids, mask)[:, :4], expected[:, :4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder(ids), bert(ids).last_hidden_state, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
    def test_decoder_is_bert(self, masked: bool) -> None:
        transformers = pytest.importorskip("transformers")
        config = _bert_config(transformers, is_decoder=True, add_cross_attention=True)
        bert = randomize(transformers.BertModel(config, add_pooling_layer=False))
        decoder = TextEncoder.from_official(bert.state_dict(), {"num_attention_heads": 2}, causal=True)
        assert decoder.fusion_layer == 0
        ids, states = random_words(), torch.randn(2, 5, 24)
        mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0]]) if masked else None
        expected = bert(ids, encoder_hidden_states=states, encoder_attention_mask=mask).last_hidden_state
        found = decoder.fuse(decoder.embed(ids), None, states, mask).tokens
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_head_is_bert(self) -> None:
        transformers = pytest.importorskip("transformers")
        bert = randomize(transformers.BertForMaskedLM(_bert_config(transformers)))
        words = bert.bert.embeddings.word_embeddings.weight.detach()
        head, hidden = svitt.TokenHead(24, 30), torch.randn(2, 5, 24)
        official = {name.removeprefix("predictions."): weight for name, weight in bert.cls.state_dict().items()}
        head.load_state_dict(head_weights("test", official, words))
        torch.testing.assert_close(head(hidden, words), bert.cls(hidden), atol=1e-5, rtol=1e-5)

    def test_padding_is_not_read(self) -> None:
        encoder, video = text_encoder(), torch.randn(2, 9, 16)
        ids, mask = random_words(), torch.tensor([[1] * 4 + [0] * 2] * 2)
        other = torch.where(mask.bool(), ids, 7)
        for read in (encoder(ids, mask), encoder.fuse(encoder(ids, mask), mask, video).tokens):
            assert read.shape == (2, 6, 24)
        torch.testing.assert_close(encoder(ids, mask)[:, :4], encoder(other, mask)[:, :4])
        both = [encoder.fuse(encoder(words, mask), mask, video).tokens[:, :4] for words in (ids, other)]
        torch.testing.assert_close(*both)

    @pytest.mark.parametrize("keep_by", ["cls_attn", "avg_attn"])
    def test_pruning(self, keep_by: str) -> None:
        """The importance is the mean probability of the heads, and what is not kept is not read any more."""
        encoder = text_encoder(keep_by=keep_by, prune_after=(1, 2), keep=0.4)
        text, video = encoder(random_words()), torch.randn(2, 1 + 10, 16)
        layer: Any = encoder.layers[1]
        fused = encoder.fuse(text, None, video)
        read = layer.attn.residual(text, layer.attn.attend(*layer.attn.heads(text, text)))
        query, key, _ = layer.cross.heads(read, video)
        probabilities = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(1)
        importance = (probabilities[:, 0] if keep_by == "cls_attn" else probabilities.mean(1))[:, 1:]
        kept = importance.topk(4).indices.sort().values + 1
        assert torch.equal(fused.kept[0], F.pad(kept, (1, 0)))
        assert fused.kept[1].shape == (2, 3) and bool(torch.isin(fused.kept[1], fused.kept[0]).all())

    @pytest.mark.parametrize("readable", [None, torch.ones(1, 11)], ids=["operators", "fallback"])
    def test_one_video_for_all_texts(self, readable: Tensor | None) -> None:
        encoder = text_encoder(prune_after=(1, 2))
        text, video = encoder(random_words(3)), torch.randn(1, 11, 16)
        shared = encoder.fuse(text, None, video, readable)
        repeated = encoder.fuse(text, None, video.repeat(3, 1, 1))
        torch.testing.assert_close(shared.tokens, repeated.tokens)
        for kept, expected in zip(shared.kept, repeated.kept, strict=True):
            assert torch.equal(kept, expected)

    def test_masked_video_tokens_are_not_read(self) -> None:
        encoder = text_encoder(keep=0.3)
        text, video = encoder(random_words()), torch.randn(2, 11, 16)
        readable = torch.ones(2, 11)
        readable[:, 4:8] = 0
        changed = video.clone()
        changed[:, 4:8] = 9.0
        found = [encoder.fuse(text, None, x, readable) for x in (video, changed)]
        torch.testing.assert_close(found[0].tokens, found[1].tokens)
        assert not bool(torch.isin(found[0].kept[0], torch.arange(4, 8)).any())

    def test_dropout_only_in_training(self) -> None:
        encoder, ids, video = text_encoder(dropout=0.5), random_words(), torch.randn(2, 5, 16)
        assert torch.equal(
            encoder.fuse(encoder(ids), None, video).tokens, encoder.fuse(encoder(ids), None, video).tokens
        )
        encoder.train()
        assert not torch.equal(encoder(ids), encoder(ids))

    @pytest.mark.parametrize(
        "setting",
        [{"keep": x} for x in (float("nan"), 0, -1, 1.5, "1")]
        + [{"num_heads": x} for x in (float("nan"), 0, -1, 1.5)]
        + [{"dropout": x} for x in (float("nan"), -0.1, 1.5, None)],
    )
    def test_settings_are_checked(self, setting: dict[str, Any]) -> None:
        name = next(iter(setting))
        with pytest.raises((TypeError, ValueError), match=f"^TextEncoder: {name} must be .*, got {name}="):
            text_encoder(**setting)

    @pytest.mark.parametrize(
        "call, message",
        [
            (lambda: text_encoder(prune_after=(0,)), "prune_after must be layers from fusion_layer=1 to 2"),
            (lambda: text_encoder(keep_by="luck"), "keep_by must be one of cls_attn, avg_attn, got keep_by='luck'"),
            (lambda: text_encoder(num_heads=5), "dim must be a multiple of num_heads=5, got dim=24"),
            (lambda: text_encoder()(random_words(length=10)), r"ids must have shape \(B, L\), L up to 9"),
            (lambda: text_encoder().fuse(torch.randn(2, 3, 24), None, torch.randn(3, 5, 16)), "video must have shape"),
        ],
    )
    def test_refuses(self, call: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()


class TestLosses:
    """Against plain formulas."""

    def test_contrastive_is_the_cross_entropy_of_both_directions(self) -> None:
        similarity, diagonal = torch.randn(5, 5), torch.arange(5)
        expected = (F.cross_entropy(similarity, diagonal) + F.cross_entropy(similarity.T, diagonal)) / 2
        torch.testing.assert_close(svitt.contrastive_loss(similarity), expected)
        torch.testing.assert_close(svitt.contrastive_loss(similarity, diagonal + 7), expected)

    def test_contrastive_shares_targets_of_the_same_id(self) -> None:
        similarity, ids = torch.randn(4, 4), torch.tensor([3, 1, 3, 2])
        target = torch.eye(4)
        target[0, 2] = target[2, 0] = 1
        target = target / target.sum(1, keepdim=True)
        expected = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        torch.testing.assert_close(svitt.contrastive_loss(similarity, ids), expected)

    @pytest.mark.parametrize("hard", [True, False])
    def test_negatives_are_drawn_by_weight(self, hard: bool) -> None:
        similarity, ids = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 1.0], [1.0, 1.0, 0.0]]), torch.tensor([0, 1, 0])
        generator = seed()
        drawn = [svitt.draw_negatives(similarity, ids, hard=hard, generator=generator) for _ in range(1000)]
        for index, scores in ((0, similarity.T), (1, similarity)):
            weights = scores.exp() if hard else torch.ones(3, 3)
            weights = weights.masked_fill(ids[:, None] == ids, 0.0)
            counts = F.one_hot(torch.stack([negatives[index] for negatives in drawn]), 3).double().mean(0)
            torch.testing.assert_close(counts, (weights / weights.sum(1, keepdim=True)).double(), atol=0.05, rtol=0.0)

    def test_a_batch_without_negatives_is_refused(self) -> None:
        with pytest.raises(ValueError, match="each sample must have one of another id"):
            svitt.draw_negatives(torch.zeros(2, 2), torch.tensor([4, 4]))

    @pytest.mark.parametrize("hard", [True, False])
    def test_negatives_of_a_model_that_tells_all_pairs_apart(self, hard: bool) -> None:
        """Their weights are 0 in float32, and yet they are drawn in proportion to each other."""
        similarity = torch.tensor([[0.9, -0.2], [-0.2, 0.9]]) / 0.01
        assert [x.tolist() for x in svitt.draw_negatives(similarity, hard=hard)] == [[1, 0], [1, 0]]
        gap = torch.tensor(0.7)
        similarity = torch.diag(torch.tensor([500.0] * 3)) + torch.tensor([[0, 0, gap], [gap, 0, 0], [0, gap, 0]])
        generator = seed()
        drawn = [svitt.draw_negatives(similarity, hard=hard, generator=generator) for _ in range(1000)]
        nearer = torch.stack([x.text for x in drawn]).eq(torch.tensor([2, 0, 1])).double().mean(0)
        expected = gap.sigmoid().item() if hard else 0.5
        torch.testing.assert_close(nearer, torch.full((3,), expected, dtype=torch.float64), atol=0.05, rtol=0.0)

    def test_negatives_are_those_of_the_weights(self) -> None:
        similarity, generator = torch.randn(8, 8), seed()
        weights = svitt.negative_weights(similarity)
        noise = svitt.Draws(seed())
        expected = [(x / noise.exponential(8, 8, device=x.device)).argmax(1) for x in weights]
        found = svitt.draw_negatives(similarity, generator=generator)
        assert torch.equal(found.video, expected[0]) and torch.equal(found.text, expected[1])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_similarities_that_are_not_finite_are_named(self, value: float) -> None:
        similarity = torch.zeros(3, 3)
        similarity[0, 1] = value
        with pytest.raises(ValueError, match=r"^draw_negatives: similarity must be finite, got similarity=tensor"):
            svitt.draw_negatives(similarity)

    def test_no_pairs_have_no_loss(self) -> None:
        model = small_model().train()
        losses = model(random_video(3)[:0], random_words(3)[:0])
        assert losses == (0, 0, 0)
        losses.total.backward()

    def test_matching(self) -> None:
        logits = torch.randn(6, 2)
        log_p = logits.log_softmax(1)
        torch.testing.assert_close(svitt.matching_loss(logits), -(log_p[:2, 1].sum() + log_p[2:, 0].sum()) / 6)

    def test_masked_words(self) -> None:
        ids = torch.randint(2, 50, (200, 50), generator=seed())
        ids[:, 0], ids[:, 40:] = 1, 0
        read, labels = svitt.mask_words(ids, vocab_size=50, mask_id=60, never=(0, 1), share=0.3, generator=seed(1))
        chosen = labels != -100
        assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(read[~chosen], ids[~chosen])
        assert not chosen[:, 0].any() and not chosen[:, 40:].any()
        shares = [chosen[:, 1:40], read[chosen] == 60, (read == ids)[chosen]]
        found = [round(share.double().mean().item(), 1) for share in shares]
        assert found == [0.3, 0.8, 0.1]
        assert bool((read[chosen & (read != 60)] < 50).all())

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"share": 1.5}, "share must be at least 0 and at most 1, got share=1.5"),
            ({"vocab_size": 0}, "vocab_size must be at least 1, got vocab_size=0"),
            ({"mask_id": -1}, "mask_id must be at least 0, got mask_id=-1"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
    )
    def test_settings_of_masked_words(self, setting: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"^mask_words: {message}$"):
            svitt.mask_words(random_words(), **({"vocab_size": 30} | setting))

    def test_masked_word_loss(self) -> None:
        logits, labels = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([[-100, 4, 0], [-100, -100, 2]])
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(svitt.masked_word_loss(logits, labels), expected)
        nothing = svitt.masked_word_loss(logits, torch.full((2, 3), -100))
        assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().max() == 0

    def test_similarity_must_be_square(self) -> None:
        with pytest.raises(ValueError, match=r"similarity must have shape \(N, N\)"):
            svitt.contrastive_loss(torch.zeros(2, 3))


class TestModel:
    """The three losses of a step, and what learns from them."""

    def test_all_weights_learn(self) -> None:
        model = small_model(order="zcurve").train()
        losses = model(random_video(3), random_words(3), generator=seed())
        losses.total.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name

    def test_a_seed_reproduces(self) -> None:
        model = small_model()
        first, same, other = (model(random_video(3), random_words(3), generator=seed(i)) for i in (0, 0, 1))
        assert first == same and first != other

    def test_losses_are_those_of_the_parts(self) -> None:
        model, video, ids = small_model(sparsity=DENSE), random_video(3), random_words(3)
        losses = model(video, ids, generator=seed())
        seen, text = model.encode_video(video), model.text(ids)
        similarity = model.similarity(seen.pooled, text[:, 0])
        normalized = [F.normalize(x, dim=1) for x in (model.video_proj(seen.pooled), model.text_proj(text[:, 0]))]
        torch.testing.assert_close(similarity, normalized[0] @ normalized[1].T / model.temperature)
        torch.testing.assert_close(losses.contrastive, svitt.contrastive_loss(similarity))
        draws = svitt.Draws(seed())
        negatives = svitt.draw_negatives(similarity, generator=draws)
        pairs = [(i, i) for i in range(3)]
        pairs += [(int(negatives.video[i]), i) for i in range(3)] + [(i, int(negatives.text[i])) for i in range(3)]
        logits = torch.cat([model.match(seen.tokens[v : v + 1], text[t : t + 1]) for v, t in pairs])
        torch.testing.assert_close(losses.matching, svitt.matching_loss(logits))
        expected = model.masked_word_loss(seen.tokens, ids, generator=draws)
        torch.testing.assert_close(losses.masked_words, expected)

    def test_autocast(self) -> None:
        model, video, ids = small_model(), random_video(3), random_words(3)
        exact = model(video, ids, generator=seed())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(video, ids, generator=seed())
        rounded.total.backward()
        torch.testing.assert_close(rounded.total.float(), exact.total, atol=0.05, rtol=0.05)
        assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in model.parameters())

    @pytest.mark.parametrize(("value", "used"), [(-1.0, 0.001), (2.0, 0.5), (0.3, 0.3)])
    def test_temperature_is_used_within_its_range(self, value: float, used: float) -> None:
        """Beyond it, only a step that leads back has a gradient; and no forward changes the weight."""
        model, vectors = small_model(), (torch.randn(3, 16), torch.randn(3, 24))
        model.temperature.data.fill_(used)
        expected = model.similarity(*vectors)
        model.temperature.data.fill_(value)
        model(random_video(3), random_words(3))
        assert model.temperature.item() == pytest.approx(value)
        found = model.similarity(*vectors)
        torch.testing.assert_close(found, expected)
        (up,), (down,) = (
            torch.autograd.grad(model.similarity(*vectors).square().sum() * sign, model.temperature) for sign in (1, -1)
        )  # of which a step against the first makes the temperature larger
        assert up < 0 or used == 0.5
        assert down > 0 or used == 0.001

    def test_embeddings_are_reproducible_and_of_length_1(self) -> None:
        model, video, ids = small_model(), random_video(5), random_words(5)
        seen, read = model.embed_video(video), model.embed_text(ids)
        torch.testing.assert_close(seen.norm(dim=1), torch.ones(5))
        torch.testing.assert_close(read.norm(dim=1), torch.ones(5))
        assert torch.equal(model.embed_video(video), seen)
        torch.testing.assert_close(torch.cat([model.embed_video(x) for x in video.split(1)]), seen)
        torch.testing.assert_close(torch.cat([model.embed_text(x) for x in ids.split(2)]), read)
        similarity = model.similarity(model.encode_video(video).pooled, model.text(ids)[:, 0])
        torch.testing.assert_close(seen @ read.T / model.temperature, similarity)

    def test_losses_are_the_same_again_in_evaluation(self) -> None:
        model, inputs = small_model(), (random_video(3), random_words(3))
        assert model(*inputs) == model(*inputs)
        assert model.masked_word_loss(torch.ones(3, 2, 16), inputs[1]) == model.masked_word_loss(
            torch.ones(3, 2, 16), inputs[1]
        )
        model.train()
        assert model(*inputs) != model(*inputs)

    def test_checkpoints_with_a_scalar_as_temperature(self, tmp_path: pathlib.Path) -> None:
        """As older versions wrote them; and without the settings that came later."""
        from safetensors.torch import load_file, save_file

        model = small_model()
        old = model.state_dict() | {"temperature": model.temperature.detach().reshape(())}
        other = SViTT(VIDEO, TEXT, embed_dim=8)
        other.load_state_dict(old)
        assert other.temperature.shape == (1,) and other.temperature.item() == model.temperature.item()
        assert old["temperature"].shape == ()
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        save_file(weights | {"temperature": weights["temperature"].reshape(()).clone()}, tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["settings"]["video"].pop("eval_seed") == 0
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = SViTT.from_pretrained(tmp_path)
        torch.testing.assert_close(dict(found.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
        assert found.config == model.config

    def test_without_words(self) -> None:
        model = SViTT(VIDEO, TEXT, predict_words=False)
        assert model(random_video(), random_words()).masked_words == 0
        with pytest.raises(ValueError, match="predict_words=True"):
            model.masked_word_loss(torch.randn(2, 13, 16), random_words())

    def test_learns(self) -> None:
        torch.manual_seed(0)
        model = SViTT(VIDEO, TEXT, embed_dim=8, mask_id=29, never_masked=(0, 1))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        video, words, generator = random_video(4), random_words(4), seed()
        losses = []
        for _ in range(30):
            losses.append(model(video, words, generator=generator).total)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize("prefix", ["text_encoder.bert.", "text_encoder."], ids=["pretrained", "retrieval"])
    def test_official_checkpoint(self, prefix: str) -> None:
        """A pretrained one has a head for words, whose weights are also those of the words, and another prefix."""
        model, predicts = small_model(), "bert" in prefix
        found = SViTT.from_official({"model": official_svitt(model, prefix)}, OFFICIAL_CONFIG)
        assert (found.word_head is None) == (not predicts) and found.text.prune_after == {1}
        expected = {name: x for name, x in model.state_dict().items() if predicts or not name.startswith("word_head.")}
        torch.testing.assert_close(dict(found.state_dict()), expected, rtol=0, atol=0)
        kept = [one.encode_video(random_video(), generator=seed()).kept[0] for one in (model, found)]
        assert torch.equal(*kept)

    def test_overrides_win(self) -> None:
        overrides: Any = {
            "video": {"sparsity": {"keep": 0.25}, "drop_path": 0.1},
            "text": {"num_heads": 4},
            "mask_id": 5,
        }
        found = SViTT.from_official(official_svitt(small_model()), OFFICIAL_CONFIG, **overrides)
        assert found.video.sparsity == Sparsity(3, 1, 1, 0.25, (0,), pad_keys="zero")
        assert (found.config["video"]["drop_path"], found.config["text"]["num_heads"], found.mask_id) == (0.1, 4, 5)

    def test_the_configuration_has_two_sections(self) -> None:
        with pytest.raises(
            ValueError, match=r"^SViTT.from_official: config must have the sections video and text, got "
        ):
            SViTT.from_official(official_svitt(small_model()), {"image_size": 24})

    def test_channels_of_the_video_must_be_those_that_are_read(self) -> None:
        with pytest.raises(ValueError, match=r"^SViTT: text must read the 16 channels .*, got video_dim=8$"):
            SViTT(VIDEO, TEXT | {"video_dim": 8})
        with pytest.raises(TypeError, match=r"^SViTT: video must be a plain value .*, got VideoEncoder$"):
            SViTT(video_encoder(), TEXT)  # type: ignore[arg-type]

    def test_the_loss_of_training_is_the_sum(self) -> None:
        model, inputs = small_model(), (random_video(3), random_words(3))
        losses = model(*inputs, generator=seed())
        assert torch.equal(model.training_loss(*inputs, generator=seed()), sum(losses))

    def test_other_weights_of_words_are_refused(self) -> None:
        model = small_model()
        official = official_checkpoint(
            model, video="vision_encoder.", video_norm="vision_layernorm.", text="text_encoder."
        )
        official |= {
            "vision_proj.weight": torch.zeros(8, 16),
            "itm_head.weight": torch.zeros(2, 24),
            "temp": torch.ones(()),
        }
        official["text_encoder.cls.predictions.decoder.weight"] = torch.zeros(30, 24)
        with pytest.raises(ValueError, match="the weights of the words must be those that predict them"):
            SViTT.from_official(official, {"video": {"image_size": (8, 12)}, "text": {"num_attention_heads": 2}})


class TestRetrieval:
    """Rankings: by similarity, then by a closer look."""

    @pytest.fixture
    def model(self) -> SViTT:
        return small_model()

    @pytest.fixture
    def corpus(self, model: SViTT) -> tuple[svitt.VideoTokens, Tensor, Tensor]:
        mask = torch.ones(6, 6)
        mask[3:, 4:] = 0
        return model.encode_video(random_video(5), generator=seed()), model.text(random_words(6), mask), mask

    @pytest.mark.parametrize("rank", [svitt.rank_texts, svitt.rank_videos])
    def test_without_a_second_look_similarity_ranks(self, rank: Any, model: SViTT, corpus: Any) -> None:
        videos, texts, mask = corpus
        similarity = model.similarity(videos.pooled, texts[:, 0])
        scores = similarity if rank is svitt.rank_texts else similarity.T
        ranking = rank(model, videos, texts, mask, rerank=0)
        torch.testing.assert_close(ranking.similarity, scores.sort(1, descending=True).values)
        assert torch.equal(scores.gather(1, ranking.indices), ranking.similarity) and ranking.match.shape[1] == 0

    @pytest.mark.parametrize("rank", [svitt.rank_texts, svitt.rank_videos])
    @pytest.mark.parametrize("rerank", [3, 100])
    def test_the_best_ones_are_looked_at_again(self, rank: Any, rerank: int, model: SViTT, corpus: Any) -> None:
        videos, texts, mask = corpus
        similarity = model.similarity(videos.pooled, texts[:, 0])
        before = rank(model, videos, texts, mask, rerank=0).indices
        after, scores, match = rank(model, videos, texts, mask, rerank=rerank)
        assert torch.equal(before[:, rerank:], after[:, rerank:])
        assert torch.equal(before[:, :rerank].sort().values, after[:, :rerank].sort().values)
        assert torch.equal((similarity if rank is svitt.rank_texts else similarity.T).gather(1, after), scores)
        assert match.shape == (len(after), min(rerank, after.shape[1])) and bool((match.diff(dim=1) <= 0).all())
        for query, answers in enumerate(after[:, :rerank]):
            pairs = [(query, int(i)) if rank is svitt.rank_texts else (int(i), query) for i in answers]
            logits = [model.match(videos.tokens[v : v + 1], texts[t : t + 1], mask[t : t + 1])[0, 1] for v, t in pairs]
            torch.testing.assert_close(torch.stack(logits), match[query])

    @pytest.mark.parametrize("rank", [svitt.rank_texts, svitt.rank_videos])
    def test_how_many_are_looked_at_again_is_checked(self, rank: Any, model: SViTT, corpus: Any) -> None:
        with pytest.raises(ValueError, match=rf"^{rank.__name__}: rerank must be at least 0, got rerank=-1$"):
            rank(model, *corpus, rerank=-1)
        with pytest.raises(TypeError, match=rf"^{rank.__name__}: rerank must be an int, got rerank=2.0$"):
            rank(model, *corpus, rerank=2.0)

    def test_recall(self) -> None:
        ranking, right = torch.tensor([[2, 1, 0], [0, 1, 2], [1, 2, 0]]), torch.eye(3, dtype=torch.bool)
        assert [svitt.recall(ranking, right, k) for k in (1, 2, 3)] == pytest.approx([0, 2 / 3, 1])
        assert svitt.recall(svitt.Ranking(ranking, torch.zeros(3, 3), torch.zeros(3, 0)), right, 2) == pytest.approx(
            2 / 3
        )
        with pytest.raises(ValueError, match=r"^recall: k must be at least 1, got k=0$"):
            svitt.recall(ranking, right, 0)
        right[2, 1] = True  # two are right
        assert svitt.recall(ranking, right, 1) == pytest.approx(1 / 3)

    def test_training_mode_is_refused(self, model: SViTT, corpus: Any) -> None:
        with pytest.raises(ValueError, match="rank_texts: model must be in evaluation mode"):
            svitt.rank_texts(model.train(), *corpus)


class TestAnswers:
    """The decoder that says the answer."""

    @pytest.fixture
    def model(self) -> VideoAnswers:
        return answers_model()

    ANSWERS = torch.tensor([[1, 5, 2, 0], [1, 5, 7, 2], [1, 9, 2, 0]])
    MASK = (ANSWERS != 0).long()

    def test_log_probability_is_the_product_of_words(self, model: VideoAnswers) -> None:
        states = torch.randn(3, 6, 24)
        found = model.log_probability(states, None, self.ANSWERS, self.MASK)
        for i, answer in enumerate(self.ANSWERS):
            log_p = 0.0
            for end in range(1, int(self.MASK[i].sum())):
                read = model.answer.fuse(model.answer.embed(answer[None, :end]), None, states[i : i + 1]).tokens
                logits = model.word_head(read[0, -1], model.answer.word.weight)
                log_p += logits.log_softmax(0)[answer[end]].item()
            assert found[i].item() == pytest.approx(log_p, rel=1e-4)

    def test_loss_and_gradients(self, model: VideoAnswers) -> None:
        of, weights = torch.tensor([0, 0, 1]), torch.tensor([0.5, 0.25, 1.0])
        video, ids, mask = random_video(), random_words(), torch.tensor([[1] * 6, [1] * 5 + [0]])
        loss = model(video, ids, mask, self.ANSWERS, self.MASK, of, weights, generator=seed())
        states = model.states(video, ids, mask, generator=seed())
        log_p = model.log_probability(states[of], mask[of], self.ANSWERS, self.MASK)
        torch.testing.assert_close(loss, -(weights * log_p).sum() / 2)
        again = model.training_loss(video, ids, mask, self.ANSWERS, self.MASK, of, weights, generator=seed())
        assert torch.equal(again, loss)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

    @pytest.mark.parametrize("candidates", [2, 128])
    def test_ranks_by_log_probability(self, candidates: int, model: VideoAnswers) -> None:
        video, ids = random_video(), random_words()
        ranking, probabilities = model.rank(
            video, ids, None, self.ANSWERS, self.MASK, candidates=candidates, generator=seed()
        )
        assert ranking.shape == (2, min(candidates, 3)) and bool((probabilities.diff() <= 0).all())
        torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
        states = model.states(video, ids, None, generator=seed())
        for i, answers in enumerate(ranking):
            repeated = states[i : i + 1].expand(len(answers), -1, -1)
            log_p = model.log_probability(repeated, None, self.ANSWERS[answers], self.MASK[answers])
            torch.testing.assert_close(log_p.softmax(0), probabilities[i])

    def test_how_many_candidates_is_checked(self, model: VideoAnswers) -> None:
        with pytest.raises(ValueError, match=r"^VideoAnswers.rank: candidates must be at least 1, got candidates=-1$"):
            model.rank(random_video(), random_words(), None, self.ANSWERS, self.MASK, candidates=-1)

    def test_official_checkpoint(self, model: VideoAnswers) -> None:
        found = VideoAnswers.from_official(official_answers(model), OFFICIAL_CONFIG)
        torch.testing.assert_close(dict(found.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
        assert found.answer.causal and found.question.keep == 1.0  # the official code does not prune here

    def test_overrides_win(self, model: VideoAnswers) -> None:
        overrides: Any = {"video": {"sparsity": {"keep": 0.25}}, "question": {"keep": 0.5}, "answer": {"dropout": 0.3}}
        found = VideoAnswers.from_official(official_answers(model), OFFICIAL_CONFIG, **overrides)
        assert (found.video.sparsity.keep, found.video.sparsity.block_size) == (0.25, 3)
        assert (found.question.keep, found.answer.keep, found.answer.drop.p) == (0.5, 1.0, 0.3)

    def test_the_decoder_must_be_one(self) -> None:
        with pytest.raises(ValueError, match="answer must be causal and read the question in all layers"):
            VideoAnswers(VIDEO, TEXT, TEXT | {"video_dim": 24})


def _bert_config(transformers: Any, **settings: Any) -> Any:
    return transformers.BertConfig(
        **({"vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 9, "layer_norm_eps": 1e-12} | settings)
    )  # fmt: skip
