"""MeBT: its blocks, its masks, its training and its samplers; their numbers are checked in tests/golden."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from vattn.models import mebt
from vattn.models.mebt import MeBT
from vattn.nn import LATENT_MODES, LatentAttention, LatentBlock

GRID = (3, 2, 2)
TOKENS = 12
MODES = ("latent_enc", "latent_self", "latent_dec", "lt2l", "latent_dec")


def small_model(modes: tuple[str, ...] = MODES, **settings: Any) -> MeBT:
    torch.manual_seed(0)
    model = MeBT(7, GRID, dim=16, num_heads=2, modes=modes, num_latents=3, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)
    return model


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def random_codes(batch: int = 2, number: int = 0) -> Tensor:
    return torch.randint(7, (batch, *GRID), generator=seed(number))


class TestLatentBlock:
    """The five modes."""

    @pytest.fixture
    def streams(self) -> dict[str, Tensor]:
        return {name: torch.randn(2, i, 8) for i, name in enumerate(("latents", "contexts", "targets"), 3)}

    @pytest.mark.parametrize("mode", LATENT_MODES)
    def test_who_is_updated_and_from_whom(self, mode: str, streams: dict[str, Tensor]) -> None:
        readers, sources = LATENT_MODES[mode]
        for stream in streams.values():
            stream.requires_grad_()
        block = LatentBlock(8, 2, mode)
        outs = dict(zip(streams, block(*streams.values()), strict=True))
        for name, out in outs.items():
            if name not in readers:
                assert out is streams[name]
                continue
            gradients = torch.autograd.grad(
                out.square().sum(), [*streams.values()], retain_graph=True, allow_unused=True
            )
            needed = {stream for stream, gradient in zip(streams, gradients, strict=True) if gradient is not None}
            assert needed == {name, *sources}

    @pytest.mark.parametrize("mode", LATENT_MODES)
    def test_formula(self, mode: str, streams: dict[str, Tensor]) -> None:
        readers, sources = LATENT_MODES[mode]
        block = LatentBlock(8, 2, mode)
        read = block.ln1(torch.cat([streams[name] for name in sources], 1))
        for name, out in zip(streams, block(*streams.values()), strict=True):
            if name not in readers:
                continue
            query = block.ln1(streams[name])
            q, k, v = (
                layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
                for layer, x in ((block.attn.query, query), (block.attn.key, read), (block.attn.value, read))
            )
            weights = (q @ k.mT / 2).softmax(-1)
            x = query + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            torch.testing.assert_close(out, x + block.mlp(block.ln2(x)))

    @pytest.mark.parametrize("mode", LATENT_MODES)
    def test_bias_is_added_to_the_scores(self, mode: str, streams: dict[str, Tensor]) -> None:
        readers, sources = LATENT_MODES[mode]
        block = LatentBlock(8, 2, mode)
        queries, keys = (sum(streams[name].shape[1] for name in names) for names in (readers, sources))
        for new, old in zip(block(*streams.values(), torch.zeros(1, 1, 1, 1)), block(*streams.values()), strict=True):
            torch.testing.assert_close(new, old)
        bias = torch.zeros(2, 2, queries, keys)
        bias[..., -1] = -torch.inf  # is as if the last source were not there
        fewer = streams | {sources[-1]: streams[sources[-1]][:, :-1]}
        name = readers[0]
        biased = block(*streams.values(), bias)[list(streams).index(name)]
        short = block(*fewer.values())[list(streams).index(name)]
        torch.testing.assert_close(biased[:, : short.shape[1]], short)

    @pytest.mark.parametrize("bias", [None, torch.zeros(1, 2, 3, 0)], ids=["no bias", "bias"])
    def test_empty_context_reads_nothing(self, streams: dict[str, Tensor], bias: Tensor | None) -> None:
        block = LatentBlock(8, 2, "latent_enc")
        out, _, _ = block(streams["latents"], streams["contexts"][:, :0], streams["targets"], bias)
        x = block.ln1(streams["latents"]) + block.attn.proj.bias
        torch.testing.assert_close(out, x + block.mlp(block.ln2(x)))

    def test_dropout_only_in_training(self, streams: dict[str, Tensor]) -> None:
        for block in (LatentBlock(8, 2, "lt2l", attn_drop=0.5), LatentBlock(8, 2, "lt2l", proj_drop=0.5)):
            plain = LatentBlock(8, 2, "lt2l").eval()
            plain.load_state_dict(block.state_dict())
            expected = plain(*streams.values())[0]
            assert not torch.equal(block(*streams.values())[0], expected)
            assert torch.equal(block.eval()(*streams.values())[0], expected)

    def test_official_names(self) -> None:
        layers = [f"attn.{name}" for name in ("key", "query", "value", "proj")] + ["ln1", "ln2", "mlp.0", "mlp.2"]
        names = {f"{layer}.{parameter}" for layer in layers for parameter in ("weight", "bias")}
        assert set(LatentBlock(8, 2, "maskgit").state_dict()) == names

    def test_one_graph_for_all_lengths(self) -> None:
        block, counter = LatentBlock(8, 2, "lt2l"), torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
        for length in (2, 5, 11, 23):
            inputs = [torch.randn(1, tokens, 8) for tokens in (3, 4, length)]
            torch.testing.assert_close(compiled(*inputs)[0], block(*inputs)[0])
        assert counter.frame_count <= 2

    @pytest.mark.parametrize(
        "make, error, message",
        [
            (lambda: LatentBlock(8, 2, "latent"), ValueError, "LatentBlock: mode must be one of .*, got mode='latent'"),
            (lambda: LatentBlock(8, 2, "lt2l", mlp_ratio=0), ValueError, "LatentBlock: mlp_ratio must be at least 1"),
            (lambda: LatentBlock(8, 3, "lt2l"), ValueError, "dim must be a multiple of num_heads=3, got dim=8"),
            (
                lambda: LatentAttention(8, True),
                TypeError,
                "LatentAttention: num_heads must be an int, got num_heads=True",
            ),
        ],
    )
    def test_errors(self, make: Callable[[], Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make()


class TestMasks:
    """Schedules and partitions."""

    @pytest.mark.parametrize("schedule", mebt.SCHEDULES)
    @pytest.mark.parametrize("tokens", [1, 7, 16, 65536])
    def test_schedules_mask_all_first_and_nothing_last(self, schedule: str, tokens: int) -> None:
        numbers = [mebt.num_masked(schedule, step / 16, tokens) for step in range(17)]
        assert (numbers[0], numbers[-1]) == (tokens, 0)
        assert numbers == sorted(numbers, reverse=True)

    def test_rounding(self) -> None:
        assert [mebt.num_masked("linear", i / 6, 12) for i in range(7)] == [12, 10, 8, 6, 4, 2, 0]
        assert mebt.num_masked("cosine", 2 / 3, 16) == 8
        assert mebt.num_masked("linear", 5 / 6, 12, official_rounding=True) == 3
        assert mebt.num_masked("cosine", 1.0, 65536, official_rounding=True) == 0

    def test_split(self) -> None:
        order = torch.stack([torch.randperm(TOKENS) for _ in range(3)])
        for masked in range(TOKENS + 1):
            context, target = mebt.split_positions(order, masked)
            assert target.shape == (3, masked)
            assert torch.equal(torch.cat([context, target], 1), order)
            assert mebt.split_positions(order, masked, budget=4)[1].shape == (3, min(masked, 4))

    def test_frames(self) -> None:
        order = torch.stack([torch.randperm(TOKENS) for _ in range(3)])
        part = mebt.frames_of(order, start=1, num_frames=2, frame_tokens=4)
        assert part.sort().values.tolist() == [list(range(4, 12))] * 3
        for row, whole in zip(part.tolist(), order.tolist(), strict=True):
            assert row == [position for position in whole if 4 <= position < 12]

    def test_equal_scores_keep_their_order(self) -> None:
        target = torch.randperm(100)[None]
        context, rest = mebt.next_partition(target[:, :0], target, torch.ones(1, 100), masked=60)
        assert torch.equal(torch.cat([context, rest], 1), target)

    def test_context_temperature_is_chance(self) -> None:
        target, score = torch.arange(50)[None], torch.linspace(0.1, 0.9, 50)[None]
        greedy, _ = mebt.next_partition(target[:, :0], target, score, masked=40)
        assert greedy[0].tolist() == list(range(49, 39, -1))
        hot = partial(mebt.next_partition, target[:, :0], target, score, 40, context_temperature=3.0)
        assert len({tuple(hot(generator=seed(i))[0][0].tolist()) for i in range(3)}) == 3

    @pytest.mark.parametrize("steps", [1, 3, 5, 12, 20])
    def test_groups_cover_all_targets_once(self, steps: int) -> None:
        context, target = torch.tensor([[12, 13]]), torch.randperm(TOKENS)[None]
        revisions = mebt.revise_partitions(context, target, steps)
        assert torch.equal(torch.cat([group for _, group in revisions], 1), target)
        assert max(group.shape[1] for _, group in revisions) == -(-TOKENS // steps)
        for known, group in [*revisions, *mebt.draft_partitions(context, target, steps)]:
            assert torch.cat([known, group], 1).sort().values.tolist() == [list(range(14))]

    @pytest.mark.parametrize(
        "call, message",
        [
            (lambda x: mebt.num_masked("ar", 0.5, 4), "mask_ratio: schedule must be one of .*, got schedule='ar'"),
            (lambda x: mebt.split_positions(x, 5), "masked must be between 0 and 4, got masked=5"),
            (lambda x: mebt.split_positions(x, 2, budget=0), "budget must be at least 1, got budget=0"),
            (lambda x: mebt.complement(x * 0, 8), "complement: positions must differ within each sample"),
            (lambda x: mebt.draft_partitions(x[:, :0], x, 0), "num_steps must be at least 1, got num_steps=0"),
            (lambda x: mebt.frame_weights("short", 4, 0), "prior must be one of .*, got prior='short'"),
        ],
    )
    def test_errors(self, call: Callable[[Tensor], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call(torch.arange(4)[None])


class TestTraining:
    """The loss, and what it is taken of."""

    @pytest.mark.slow
    @pytest.mark.parametrize("modes", [MODES, ("maskgit", "maskgit")], ids=["latents", "maskgit"])
    def test_a_few_steps_lower_the_loss(self, modes: tuple[str, ...]) -> None:
        torch.manual_seed(0)
        model = MeBT(7, GRID, dim=16, num_heads=2, modes=modes, num_latents=3)
        optimizer, codes, generator = torch.optim.AdamW(model.parameters(), 1e-2), random_codes(1), seed()
        losses = []
        for _ in range(60):
            loss = model.training_loss(codes, prior="uniform", generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    def test_loss_is_the_mean_over_masked_tokens(self) -> None:
        logits, codes = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
        mean = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        torch.testing.assert_close(mebt.masked_loss(logits, codes, 5, 12), mean)
        torch.testing.assert_close(mebt.masked_loss(logits, codes, 5, 12, average=0.0), mean * 5 / 12)
        torch.testing.assert_close(mebt.masked_loss(logits, codes, 10, 12), mean / 2)  # a budget left out half

    def test_nothing_masked_is_no_loss(self) -> None:
        model, every = small_model(), torch.arange(TOKENS)[None]
        logits = model(random_codes(1), every, every[:, :0])
        assert logits.shape == (1, 0, 7)
        loss = mebt.masked_loss(logits, every[:, :0], 0, TOKENS)
        loss.backward()
        assert loss.item() == 0.0

    def test_partition_is_a_part_of_the_frames(self) -> None:
        lengths, generator = set(), seed()
        for _ in range(40):
            (context, target), tokens = mebt.draw_partition(2, GRID, prior="uniform", budget=3, generator=generator)
            positions = torch.cat([context, target], 1)
            assert target.shape[1] <= 3 and positions.shape[1] <= tokens
            assert all(len(set(row)) == len(row) for row in positions.tolist())
            assert int(positions.max() // 4 - positions.min() // 4) < tokens // 4
            lengths.add(tokens)
        assert lengths == {4, 8, 12}

    @pytest.mark.parametrize("prior", mebt.PRIORS)
    def test_frame_weights_are_probabilities(self, prior: str) -> None:
        for step in (0, 10_000, 10**9):
            weights = mebt.frame_weights(prior, 5, step)
            assert weights.sum().item() == pytest.approx(1.0)
        assert mebt.frame_weights(prior, 5, 10**9).argmax().item() == (0 if prior == "uniform" else 4)

    def test_a_seed_reproduces_the_loss(self) -> None:
        model, codes = small_model(), random_codes()
        losses = [model.training_loss(codes, generator=seed(number)).item() for number in (3, 3, 4)]
        assert losses[0] == losses[1] != losses[2]


class TestModel:
    """Logits, and official checkpoints."""

    def test_only_contexts_are_looked_at(self) -> None:
        model, codes, order = small_model(), random_codes(1), torch.randperm(TOKENS)[None]
        context, target = order[:, :5], order[:, 5:]
        logits = model(codes, context, target)
        changed = codes.flatten(1).scatter(1, target, 0)
        assert torch.equal(model(changed, context, target), logits)
        changed = codes.flatten(1).scatter(1, context[:, :1], (codes.flatten(1).gather(1, context[:, :1]) + 1) % 7)
        assert not torch.allclose(model(changed, context, target), logits)

    def test_order_does_not_matter(self) -> None:
        model, codes, order = small_model(), random_codes(1), torch.randperm(TOKENS)[None]
        logits = model(codes, order[:, :5], order[:, 5:])
        torch.testing.assert_close(model(codes, order[:, :5].flip(1), order[:, 5:].flip(1)).flip(1), logits)

    @pytest.mark.parametrize("wrap", ["plain", "checkpoint"])
    def test_official_state_dicts(self, wrap: str) -> None:
        model = small_model((*MODES, "maskgit"))
        weights: dict[str, Any] = model.state_dict()
        config: dict[str, Any] = {"n_head": 2, "mode": list(MODES), "shape": list(GRID)}
        drops = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3} if wrap == "checkpoint" else {}
        if wrap == "checkpoint":
            weights = {"epoch": 1, "state_dict": weights | {"first_stage_model.encoder.weight": torch.zeros(1)}}
            params, mask = {"n_head": 2, "mode": list(MODES)} | drops, {"params": {"shape": list(GRID)}}
            config = {"model": {"params": params, "mask": mask}}
        before = copy.deepcopy(config)
        loaded = MeBT.from_official(weights, config)
        assert not loaded.training
        rates = {module.p for module in loaded.modules() if isinstance(module, nn.Dropout)}
        assert rates == (set(drops.values()) or {0.0})
        every = torch.arange(TOKENS).expand(2, -1)
        inputs = random_codes(), every[:, :3], every[:, 3:]
        assert torch.equal(loaded(*inputs), model(*inputs))
        assert config == before
        settings: dict[str, Any] = {"num_heads": 2, "modes": MODES, "grid": GRID}
        for other in (MeBT.from_official(weights, **settings), MeBT.from_official(weights, {"n_head": 1}, **settings)):
            assert torch.equal(other(*inputs), model(*inputs))

    def test_official_state_dict_errors(self) -> None:
        weights = small_model().state_dict()
        with pytest.raises(ValueError, match=r"^MeBT.from_official: config must have shape, got n_head, mode$"):
            MeBT.from_official(weights, {"n_head": 2, "mode": MODES})
        with pytest.raises(ValueError, match=r"^MeBT.from_official: state_dict must have pos_emb, got "):
            MeBT.from_official({name: x for name, x in weights.items() if name != "pos_emb"}, {})
        with pytest.raises(ValueError, match=r"^MeBT.from_official: config must have n_head, got nothing$"):
            MeBT.from_official(weights)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
            MeBT.from_official(weights | {"extra": weights["pos_emb"]}, {"n_head": 2, "mode": MODES, "shape": GRID})

    def test_official_layers(self) -> None:
        assert [mebt.OFFICIAL_MODES[i - 1] for i in (1, 12, 13, 14, 15, 24)] == [
            "latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_dec",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "codes, context, target, message",
        [
            ((2, 12), (2, 3), (1, 3), r"target must have shape \(2, tokens\), got target.shape=\(1, 3\)"),
            ((2, 12), (3,), (2, 3), r"context must have shape \(2, tokens\), got context.shape=\(3,\)"),
            ((2, 13), (2, 3), (2, 3), r"codes must be at most 12 in a video of \(3, 2, 2\), got 13"),
        ],
    )
    def test_input_errors(self, codes: Any, context: Any, target: Any, message: str) -> None:
        with pytest.raises(ValueError, match=f"^MeBT: {message}$"):
            small_model()(*(torch.zeros(shape, dtype=torch.int64) for shape in (codes, context, target)))

    def test_training_needs_whole_videos(self) -> None:
        with pytest.raises(ValueError, match=r"codes must have shape \(B, 3, 2, 2\), got codes.shape=\(2, 12\)"):
            small_model().training_loss(random_codes().flatten(1))


class TestTokenSampling:
    """From logits to tokens."""

    def test_greedy_takes_the_first_of_the_largest(self) -> None:
        logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
        for number in range(3):
            assert mebt.sample_tokens(logits, temperature=0.0, generator=seed(number))[0].tolist() == [1, 0]

    def test_frequencies_are_the_probabilities(self) -> None:
        logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
        tokens, probabilities = mebt.sample_tokens(logits, temperature=0.8, generator=seed())
        torch.testing.assert_close(probabilities, (logits / 0.8).softmax(-1))
        frequencies = tokens.bincount(minlength=3) / len(tokens)
        torch.testing.assert_close(frequencies, probabilities[0], atol=0.015, rtol=0.0)

    def test_filters(self) -> None:
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        for filters, expected in (
            ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
            ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
            ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
            ({"top_p": 0.1}, [1, 0, 0, 0]),
            ({"top_k": 3, "top_p": 0.75}, [4 / 7, 3 / 7, 0, 0]),
        ):
            _, probabilities = mebt.sample_tokens(logits, **filters, generator=seed())
            torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float32))
        ties = torch.tensor([1.0, 2.0, 2.0, 2.0])
        assert mebt.sample_tokens(ties, top_k=1, generator=seed())[1].count_nonzero() == 3

    @pytest.mark.parametrize(
        "setting",
        [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
        + [{name: value} for name in ("temperature", "top_k", "top_p") for value in (float("nan"), "1", True)],
    )
    def test_errors(self, setting: dict[str, Any]) -> None:
        name = next(iter(setting))
        with pytest.raises((TypeError, ValueError), match=f"^sample_tokens: {name} must be .*, got {name}="):
            mebt.sample_tokens(torch.zeros(3), **setting)


SAMPLERS: dict[str, Callable[..., mebt.Sample]] = {
    "maskgit": partial(mebt.maskgit, num_steps=4),
    "maskgit over the targets": partial(mebt.maskgit, num_steps=4, start_anew=True),
    "random": partial(mebt.maskgit, num_steps=4, strategy="random"),
    "bootstrap": partial(mebt.maskgit, num_steps=4, strategy="bootstrap"),
    "draft": partial(mebt.draft, num_steps=5),
    "revise": partial(mebt.revise, num_steps=5),
    "draft and revise": partial(mebt.draft_and_revise, draft_steps=3, revise_steps=2),
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
class TestSamplers:
    """What every sampler does."""

    def test_a_seed_reproduces_a_sample(self, sampler: Callable[..., mebt.Sample]) -> None:
        model, codes = small_model(), random_codes()
        samples = [sampler(model, codes, generator=seed(number)).codes.tolist() for number in (1, 1, 2)]
        assert samples[0] == samples[1] != samples[2]

    def test_what_is_known_stays_and_positions_stay_complete(self, sampler: Callable[..., mebt.Sample]) -> None:
        codes, order = random_codes(), torch.randperm(TOKENS).expand(2, -1)
        context, target = order[:, :5], order[:, 5:]
        before = codes.clone()
        sample = sampler(small_model(), codes, context, target, generator=seed(), temperature=2.0)
        assert torch.equal(codes, before)
        assert torch.equal(sample.codes.gather(1, context), codes.flatten(1).gather(1, context))
        assert torch.equal(torch.cat([sample.context, sample.target], 1).sort().values, order.sort().values)
        assert torch.equal(sample.context[:, :5], context)

    def test_nothing_to_find(self, sampler: Callable[..., mebt.Sample]) -> None:
        codes, every = random_codes(), torch.arange(TOKENS).expand(2, -1)
        assert torch.equal(sampler(small_model(), codes, every, every[:, :0]).codes, codes.flatten(1))

    def test_progress_bar(self, sampler: Callable[..., mebt.Sample], capsys: pytest.CaptureFixture[str]) -> None:
        sampler(small_model(), random_codes(), generator=seed(), progress=True)
        assert "100%" in capsys.readouterr().err

    def test_errors(self, sampler: Callable[..., mebt.Sample]) -> None:
        with pytest.raises(ValueError, match=r"model must be in evaluation mode, got model.training=True$"):
            sampler(small_model().train(), random_codes())
        with pytest.raises(ValueError, match=r"context and target must be given together, got "):
            sampler(small_model(), random_codes(), torch.zeros(2, 0, dtype=torch.int64))
        with pytest.raises(TypeError, match="topk"):
            sampler(small_model(), random_codes(), topk=3)


def surest_last(codes: Tensor, context: Tensor, target: Tensor) -> Tensor:
    """A model that is the surer the higher the position, and says how many contexts it has been given."""
    says = F.one_hot(torch.full_like(target, context.shape[1]), TOKENS + 1)
    return says * (7.0 + 0.9 * target[..., None])


def test_maskgit_keeps_the_surest() -> None:
    codes = torch.zeros(1, TOKENS, dtype=torch.int64)
    settings: dict[str, Any] = {"num_steps": 3, "schedule": "linear", "context_temperature": 0.0, "generator": seed()}
    sample = mebt.maskgit(surest_last, codes, **settings)
    assert sample.context.tolist() == [list(reversed(range(TOKENS)))]
    assert sample.codes.tolist() == [[8] * 4 + [4] * 4 + [0] * 4]


def test_maskgit_joins_the_schedule_or_starts_anew() -> None:
    codes, every = torch.full((1, TOKENS), 99), torch.arange(TOKENS)[None]
    settings: dict[str, Any] = {
        "context": every[:, :6],
        "target": every[:, 6:],
        "schedule": "linear",
        "context_temperature": 0.0,
    }
    joined = mebt.maskgit(surest_last, codes, num_steps=6, generator=seed(), **settings).codes
    assert joined.tolist() == [[99] * 6 + [10, 10, 8, 8, 6, 6]]
    anew = mebt.maskgit(surest_last, codes, num_steps=6, start_anew=True, generator=seed(), **settings).codes
    assert anew.tolist() == [[99] * 6 + [11, 10, 9, 8, 7, 6]]


def test_bootstrap_keeps_one_token_a_step() -> None:
    codes = torch.zeros(1, TOKENS, dtype=torch.int64)
    settings: dict[str, Any] = {"num_steps": 5, "strategy": "bootstrap", "schedule": "linear", "generator": seed()}
    sample = mebt.maskgit(surest_last, codes, **settings)
    assert sample.context.shape == (1, 5)
    assert sorted(sample.codes[0].tolist()) == [0, 1, 2, 3] + [4] * 8


def test_random_keeps_anything() -> None:
    codes = torch.zeros(1, TOKENS, dtype=torch.int64)
    kept = {
        tuple(mebt.maskgit(surest_last, codes, num_steps=2, strategy="random", generator=seed(i)).context[0].tolist())
        for i in range(4)
    }
    assert len(kept) == 4


def test_greedy_sampling_is_well_defined() -> None:
    def sure_of_nothing(codes: Tensor, context: Tensor, target: Tensor) -> Tensor:
        return torch.zeros(*target.shape, 4)

    codes = torch.ones(1, TOKENS, dtype=torch.int64)
    sample = mebt.maskgit(sure_of_nothing, codes, num_steps=3, temperature=0.0, context_temperature=0.0)
    assert sample.codes.tolist() == [[0] * TOKENS]
    assert sample.context.tolist() == [list(range(TOKENS))]


def test_revision_of_contexts() -> None:
    every, codes = torch.arange(TOKENS)[None], torch.full((1, TOKENS), 99)
    settings: dict[str, Any] = {"context": every[:, :6], "target": every[:, 6:], "draft_steps": 2, "generator": seed()}
    kept = mebt.draft_and_revise(surest_last, codes, **settings)
    assert kept.codes[0, :6].tolist() == [99] * 6
    revised = mebt.draft_and_revise(surest_last, codes, **settings, revise_contexts=True)
    assert 99 not in revised.codes[0].tolist()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strategy": "ar"}, "strategy must be one of maskgit, random, bootstrap, got strategy='ar'"),
        ({"decay": "square"}, "decay must be one of linear, cosine, constant, got decay='square'"),
        ({"num_steps": 0}, "num_steps must be at least 1, got num_steps=0"),
    ],
)
def test_maskgit_setting_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^maskgit: {message}$"):
        mebt.maskgit(small_model(), random_codes(), **settings)


class TestVideos:
    """Generation, continuation, interpolation and inpainting."""

    @pytest.mark.parametrize("sampler", [None, mebt.draft_and_revise, mebt.draft], ids=["maskgit", "revised", "draft"])
    def test_inpainting_keeps_what_is_given(self, sampler: Callable[..., mebt.Sample] | None) -> None:
        codes = random_codes()
        mask = torch.rand(GRID, generator=seed()) < 0.5
        made = mebt.inpaint(small_model(), codes, mask, sampler=sampler, generator=seed(), temperature=2.0)
        assert made.shape == codes.shape
        assert torch.equal(made[:, ~mask], codes[:, ~mask])
        assert not torch.equal(made[:, mask], codes[:, mask])
        # What is inside the mask does not matter.
        other = codes.masked_fill(mask, 0)
        again = mebt.inpaint(small_model(), other, mask, sampler=sampler, generator=seed(), temperature=2.0)
        assert torch.equal(made, again)

    def test_a_mask_for_each_sample(self) -> None:
        codes = random_codes()
        mask = torch.zeros(2, *GRID, dtype=torch.bool)
        mask[0, 0], mask[1, 2] = True, True
        made = mebt.inpaint(small_model(), codes, mask, generator=seed())
        assert torch.equal(made[~mask], codes[~mask])

    def test_generation(self) -> None:
        made = mebt.generate(small_model(), (2, *GRID), num_steps=4, generator=seed())
        assert made.shape == (2, *GRID) and made.dtype == torch.int64
        assert 0 <= int(made.min()) and int(made.max()) < 7 and len(made.unique()) > 1
        assert torch.equal(mebt.generate(small_model(), 2, num_steps=4, generator=seed()), made)
        with pytest.raises(TypeError, match=r"^generate: shape must be that of the codes for a model without a grid"):
            mebt.generate(surest_last, 2)

    @pytest.mark.parametrize(
        "shape", [-1, 1.5, True, None, "a", (2,), (), (-1, 3, 2, 2), (2, 0, 2, 2), (2, 3, 2.0, 2), (True, 3)]
    )
    def test_what_is_no_shape(self, shape: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=r"^generate: shape must be .*, got shape="):
            mebt.generate(small_model(), shape)

    def test_what_is_no_generator_and_no_sampler(self) -> None:
        with pytest.raises(TypeError, match=r"^Draws: generator must be a torch.Generator, Draws or None, got .*=3$"):
            mebt.generate(small_model(), generator=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^inpaint: sampler must be a function .*, got sampler='maskgit'$"):
            mebt.generate(small_model(), sampler="maskgit")

    def test_continuation_and_interpolation(self) -> None:
        model, codes = small_model(), random_codes()
        longer = mebt.continue_video(model, codes[:, :1], 3, generator=seed())
        assert longer.shape == (2, *GRID) and torch.equal(longer[:, :1], codes[:, :1])
        assert mebt.continue_video(model, codes[:, :1], 2, generator=seed()).shape == (2, 2, 2, 2)
        between = mebt.interpolate(model, codes[:, :1], codes[:, 2:], 3, generator=seed())
        assert torch.equal(between[:, ::2], codes[:, ::2])

    def test_errors(self) -> None:
        model, codes = small_model(), random_codes()
        with pytest.raises(TypeError, match=r"^inpaint: mask must be a bool tensor, got mask.dtype=torch.int64$"):
            mebt.inpaint(model, codes, torch.ones_like(codes))
        with pytest.raises(ValueError, match=r"^inpaint: mask must be as large in each sample, got .*\[12, 0\]$"):
            mebt.inpaint(model, codes, torch.tensor([True, False]).view(2, 1, 1, 1))
        with pytest.raises(ValueError, match=r"^inpaint: mask must be broadcastable to codes .*, got mask.shape="):
            mebt.inpaint(model, codes[:1], torch.ones(2, 1, 1, 1, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"^interpolate: num_frames must be at least 3, got num_frames=2$"):
            mebt.continue_video(model, codes, 2)
