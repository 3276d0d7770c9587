"""The video diffusion transformer: timesteps of frames, conditions, and the conventions of diffusers' schedulers."""

import pytest
import torch

from tests.model_zoo import MODELS, randomize
from vattn.models.draws import Draws
from vattn.models.fifo import FIFO, official_ddim
from vattn.models.video_dit import PREDICTIONS, VideoDiT, generate

SHAPE = (2, 3, 4, 6)


def seed(number=0):
    return torch.Generator().manual_seed(number)


def video(batch=2, number=1):
    return torch.randn(batch, *SHAPE, generator=seed(number))


def small(**settings):
    return VideoDiT(2, 3, (4, 6), dim=12, depth=2, num_heads=2, levels=(1, None), **settings)


def knows_all(model, truth, monkeypatch):
    """Let `model` predict what is right of noised versions of `truth`, whatever their noise is."""

    def forward(latents, timesteps, **conditions):
        a, s = model._shares(model._per_frame(timesteps, latents), latents)
        noise = (latents - a * truth) / s
        return model.noising.target(truth, noise, a, s)

    monkeypatch.setattr(model, "forward", forward)
    return model.eval()


@pytest.fixture
def model():
    return MODELS["VideoDiT"].make()


class TestTimesteps:
    """One for every frame."""

    @pytest.mark.parametrize("steps", [700, 700.0, torch.tensor(700), torch.tensor([700]), torch.full((2, 1), 700.0)])
    def test_one_number_is_that_of_all_frames(self, steps, model):
        assert torch.equal(model(video(), steps), model(video(), torch.full((2, 3), 700)))

    def test_one_number_for_each_sample(self, model):
        steps = torch.tensor([3, 600])
        assert torch.equal(model(video(), steps), model(video(), steps[:, None].expand(-1, 3)))

    def test_every_frame_knows_its_own(self, model):
        """With attention off, the prediction of a frame depends on its own timestep alone."""
        for block in model.blocks:
            for layer in (block.leap.proj, block.text.proj, block.time.fc):
                layer.weight.data.zero_()
        found = model(video(), torch.tensor([[10, 500, 900]]))
        for frame, step in enumerate((10, 500, 900)):
            torch.testing.assert_close(found[:, :, frame], model(video(), step)[:, :, frame])
            assert not torch.allclose(found[:, :, frame], model(video(), 300)[:, :, frame], atol=1e-2)

    def test_frames_see_each_other(self, model):
        x = video().requires_grad_()
        model(x, 500)[0, :, 1].sum().backward()
        assert x.grad[0].abs().amin() > 0 and not x.grad[1].any()

    @pytest.mark.parametrize("steps", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(2, 3, 1), torch.zeros(3, 3)])
    def test_other_shapes_are_refused(self, steps, model):
        with pytest.raises(ValueError, match=r"^VideoDiT: timesteps must be one number, or have shape \(2,\) or \(2, "):
            model(video(), steps)

    @pytest.mark.parametrize("steps", [True, torch.tensor(True), torch.tensor(1j)])
    def test_other_numbers_are_refused(self, steps, model):
        with pytest.raises(TypeError, match=r"^VideoDiT: timesteps must be real numbers, got timesteps.dtype=torch"):
            model(video(), steps)


class TestConditions:
    """Classes, texts, and going without."""

    @pytest.fixture
    def described(self):
        return {"classes": torch.tensor([2, 0]), "text": torch.randn(2, 4, 5, generator=seed(2))}

    def test_change_what_is_predicted(self, model, described):
        found = [model(video(), 500, **part) for part in ({}, described, *({k: described[k]} for k in described))]
        for i, one in enumerate(found):
            assert all(not torch.allclose(one, other, atol=1e-3) for other in found[:i])

    def test_hidden_ones_are_as_if_they_were_not_given(self, model, described):
        hidden = torch.tensor([True, False])
        mask = torch.tensor([[True, False, True, True]] * 2)
        for given in (described, described | {"text_mask": mask}):
            found = model(video(), 500, hidden=hidden, **given)
            torch.testing.assert_close(found[0], model(video(), 500)[0])
            torch.testing.assert_close(found[1], model(video(), 500, **given)[1])

    def test_words_that_are_masked_are_not_read(self, model, described):
        mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
        found = model(video(), 500, text_mask=mask, **described)
        shorter = described | {"text": described["text"][:, :2]}
        torch.testing.assert_close(found[0], model(video(), 500, **shorter)[0])
        torch.testing.assert_close(found[1], model(video(), 500, **described)[1])

    def test_a_text_without_words_is_none(self, model, described):
        text, mask = described["text"], torch.tensor([[False] * 4, [True] * 4])
        found, none = model(video(), 500, text=text, text_mask=mask), model(video(), 500)
        torch.testing.assert_close(found[0], none[0])
        torch.testing.assert_close(found[1], model(video(), 500, text=text)[1])
        assert torch.equal(model(video(), 500, text=text[:, :0]), none)

    def test_training_hides_them_from_some(self, model, described):
        seen = []
        model.register_forward_pre_hook(lambda _, args, given: seen.append(given["hidden"]), with_kwargs=True)
        for i in range(100):
            model.training_loss(video(), generator=seed(i), **described)
        assert 0.1 < torch.stack(seen).float().mean() < 0.3  # drop_conditions is 0.2

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"classes": torch.tensor([1])}, r"classes must have shape \(2,\), got classes.shape=\(1,\)"),
            (
                {"classes": torch.tensor([0, 9])},
                r"classes must be between 0 and \d, got values from classes=0 to classes=9",
            ),
            ({"text": torch.zeros(2, 4, 6)}, r"text must have shape \(2, words, 5\), got text.shape=\(2, 4, 6\)"),
            (
                {"text": torch.zeros(2, 4, 5), "text_mask": torch.ones(2, 4)},
                r"text_mask must be bool, of shape \(2, 4\), got text_mask of torch.float32, of shape \(2, 4\)",
            ),
            ({"hidden": torch.tensor([True])}, r"hidden must have shape \(2,\), got hidden.shape=\(1,\)"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, given, message, model):
        with pytest.raises(ValueError, match=f"^VideoDiT: {message}$"):
            model(video(), 500, **given)

    @pytest.mark.parametrize("name", ["classes", "text"])
    def test_of_a_model_without_them_are_refused(self, name, described):
        with pytest.raises(ValueError, match=f"^VideoDiT: {name} must not be given to a model without "):
            small()(video(), 500, **{name: described[name]})


class TestSchedulers:
    """What is right here is right for the schedulers of diffusers: timesteps, signs, shares of noise."""

    def scheduler(self, model, name):
        diffusers = pytest.importorskip("diffusers")
        return getattr(diffusers, name)(**model.scheduler_settings)

    @pytest.mark.parametrize("prediction", ["epsilon", "v"])
    def test_noise_is_that_of_ddpm(self, prediction):
        model, steps = small(prediction=prediction), torch.tensor([0, 999])
        expected = self.scheduler(model, "DDPMScheduler").add_noise(video(), video(2, 5), steps)
        torch.testing.assert_close(model.add_noise(video(), video(2, 5), steps), expected)

    def test_noise_is_that_of_flow_matching(self):
        model = small(prediction="flow")
        scheduler = self.scheduler(model, "FlowMatchEulerDiscreteScheduler")
        steps = scheduler.timesteps[[3, 700]]
        expected = scheduler.scale_noise(video(), steps, video(2, 5))
        torch.testing.assert_close(model.add_noise(video(), video(2, 5), steps), expected)

    @pytest.mark.parametrize(
        "prediction, name",
        [
            ("epsilon", "DDIMScheduler"),
            ("epsilon", "DPMSolverMultistepScheduler"),
            ("v", "DDIMScheduler"),
            ("v", "EulerDiscreteScheduler"),
            ("v", "UniPCMultistepScheduler"),
            ("flow", "FlowMatchEulerDiscreteScheduler"),
        ],
    )
    def test_the_right_predictions_lead_to_the_video(self, prediction, name, monkeypatch):
        truth = video(2, 7).clamp(-1, 1)
        model = knows_all(small(prediction=prediction), truth, monkeypatch)
        scheduler = self.scheduler(model, name)
        scheduler.set_timesteps(12)
        x = video() * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else video()
        for step in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, step) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(model(seen, step), step, x).prev_sample
        torch.testing.assert_close(x, truth, atol=2e-2, rtol=0)  # some schedulers leave a little noise

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_generation_finds_the_video(self, prediction, monkeypatch):
        truth = video(2, 7)
        model = knows_all(small(prediction=prediction), truth, monkeypatch)
        torch.testing.assert_close(generate(model, 2, num_steps=5), truth, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_generation_is_that_of_an_euler_scheduler(self, prediction):
        """Which takes the same steps, and divides a video by its share."""
        model = randomize(small(prediction=prediction))
        found = generate(model, 2, num_steps=4, generator=seed(3))
        steps, a, _ = model.noising.path(4, torch.device("cpu"))
        x = torch.randn(2, *SHAPE, generator=seed(3))
        if prediction == "flow":
            scheduler = self.scheduler(model, "FlowMatchEulerDiscreteScheduler")
            scheduler.set_timesteps(sigmas=(steps / 1000).tolist())
        else:
            scheduler = self.scheduler(model, "EulerDiscreteScheduler")
            scheduler.set_timesteps(4)
            x = x / a[0]
        torch.testing.assert_close(scheduler.timesteps.float(), steps)
        with torch.no_grad():
            for step in scheduler.timesteps:
                seen = x if prediction == "flow" else scheduler.scale_model_input(x, step)
                x = scheduler.step(model(seen, step), step, x).prev_sample
        torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


class TestDiagonalDenoising:
    """The model is the `denoise` of a FIFO."""

    LEVELS = 6

    def scheduler(self, prediction):
        if prediction == "epsilon":
            return official_ddim(self.LEVELS)
        diffusers = pytest.importorskip("diffusers")
        name = "FlowMatchEulerDiscreteScheduler" if prediction == "flow" else "DDIMScheduler"
        scheduler = getattr(diffusers, name)(**small(prediction=prediction).scheduler_settings)
        scheduler.set_timesteps(self.LEVELS)
        return scheduler

    @pytest.mark.parametrize("lookahead", [False, True])
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_the_right_predictions_lead_to_the_video(self, prediction, lookahead, monkeypatch):
        """Of a video that stands still: frames are at other places of the window in every step."""
        truth = video(2, 7)[:, :, :1].clamp(-1, 1).expand(-1, -1, 3, -1, -1)
        model = knows_all(small(prediction=prediction), truth[:, :, :1], monkeypatch)
        fifo = FIFO(model, self.scheduler(prediction), frames=3, partitions=2, lookahead=lookahead)
        fifo.start(truth, generator=seed())
        for frame in fifo.stream(8, generator=seed(1)):
            torch.testing.assert_close(frame, truth[:, :, 0], atol=0.1, rtol=0)  # DDIM leaves a little noise

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_conditions_and_guidance(self, prediction):
        model = randomize(small(prediction=prediction, num_classes=3))

        def run(scale, **conditions):
            scheduler = self.scheduler(prediction)
            fifo = FIFO(model, scheduler, frames=3, partitions=2, lookahead=True, guidance_scale=scale)
            fifo.start(video(), generator=seed())
            return torch.stack([*fifo.stream(4, generator=seed(1), **conditions)], 2)

        given = {"conditions": {"classes": torch.tensor([1, 2])}, "unconditional": {}}
        runs = [run(1.0), run(1.0, **given), run(3.0, **given)]
        assert all(x.shape == (2, 2, 4, 4, 6) and x.isfinite().all() for x in runs)
        assert not torch.allclose(runs[0], runs[1]) and not torch.allclose(runs[1], runs[2])


class TestTraining:
    """The loss."""

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_begins_at_the_best_linear_prediction(self, prediction):
        """Whose error is the unit of the loss; what a network adds to that blindly makes it worse by its square."""
        model, x = small(prediction=prediction, deviation=0.7), 0.7 * video(400)
        assert model.training_loss(x, per_frame=True, generator=seed()).item() == pytest.approx(1, rel=0.03)
        model.head.bias.data.fill_(0.5)
        assert model.training_loss(x, per_frame=True, generator=seed()).item() == pytest.approx(1.25, rel=0.03)

    @pytest.mark.parametrize("per_frame", [False, True])
    def test_frames_draw_timesteps_of_their_own(self, per_frame, model):
        seen = []
        model.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        model.training_loss(video(50), per_frame=per_frame, generator=seed())
        (steps,) = seen
        assert steps.shape == (50, 3) and steps.min() >= 0 and steps.max() <= 999
        assert bool((steps == steps[:, :1]).all()) is not per_frame
        assert len(steps[:, 0].unique()) > 40

    @pytest.mark.parametrize("prediction", ["v", "flow"])
    @pytest.mark.parametrize("per_frame", [False, True])
    def test_all_timesteps_are_as_likely(self, prediction, per_frame):
        noising = small(prediction=prediction).noising
        steps = noising.draw(Draws(seed()), 20000, 3, per_frame, torch.device("cpu"))
        for frame in steps.T:
            share = frame.histc(10, 0, 1000) / len(frame)
            torch.testing.assert_close(share, torch.full((10,), 0.1), atol=0.01, rtol=0)

    def test_windows_of_all_kinds_are_seen(self):
        """Those of much noise alone, of little alone, and of both."""
        steps = small().noising.draw(Draws(seed()), 20000, 3, True, torch.device("cpu"))
        low, high = steps.amin(1), steps.amax(1)
        for kind in (low > 850, high < 150, high - low > 700, high - low < 20):
            assert kind.float().mean() > 0.02

    def test_is_what_its_seed_says(self, model):
        losses = [model.training_loss(video(), generator=seed(i)) for i in (0, 0, 1)]
        assert losses[0] == losses[1] != losses[2]

    @pytest.mark.slow
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_a_few_steps_teach_what_is_always_there(self, prediction):
        torch.manual_seed(0)
        truth = video(1, 7).clamp(-1, 1)
        model = VideoDiT(2, 3, (4, 6), dim=32, depth=2, num_heads=2, levels=(1,), prediction=prediction)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            model.training_loss(truth.expand(16, -1, -1, -1, -1), per_frame=True).backward()
            optimizer.step()
        error = (generate(model.eval(), 4, num_steps=20, generator=seed(5)) - truth).square().mean()
        assert error < 0.15  # of noise it is near 2


def test_guidance_goes_beyond_the_condition():
    model = randomize(small(num_classes=3, prediction="flow"))
    classes, start = torch.tensor([1, 2]), torch.randn(2, *SHAPE, generator=seed())
    free, bound = model(start, 1000), model(start, 1000, classes=classes)
    for scale in (0.0, 1.0, 3.0):
        found = generate(model, 2, classes=classes, num_steps=1, guidance_scale=scale, generator=seed())
        torch.testing.assert_close(found, start - (free + scale * (bound - free)))


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"prediction": "x"}, ValueError, "prediction must be one of epsilon, v, flow, got prediction='x'"),
        ({"num_timesteps": 0}, ValueError, "num_timesteps must be at least 1, got num_timesteps=0"),
        ({"betas": (0.1, 1.0)}, ValueError, "betas must be at least 0 and at most 0.999, got betas=1.0"),
        ({"betas": (0.1,)}, ValueError, r"betas must be the first and the last one, got betas=\(0.1,\)"),
        ({"betas": (0.5, 0.9), "prediction": "epsilon"}, ValueError, "betas must leave some of the video, which eps"),
        ({"deviation": 0.0}, ValueError, "deviation must be above 0, got deviation=0.0"),
        ({"drop_conditions": 2}, ValueError, "drop_conditions must be at least 0 and at most 1, got drop_conditions=2"),
        ({"patch_size": 4}, ValueError, "width must be a multiple of patch_size=4, got width=6"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got num_classes=0"),
        ({"text_dim": 1.5}, TypeError, "text_dim must be an int, got text_dim=1.5"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be above 0, got mlp_ratio=0"),
    ],
)
def test_settings_that_do_not_fit(settings, error, message):
    with pytest.raises(error, match=f"^VideoDiT: {message}"):
        small(**settings)


def test_what_is_no_video():
    with pytest.raises(
        TypeError, match=r"^VideoDiT: latents must be a floating-point tensor, got latents=torch.uint8$"
    ):
        small()(video().byte(), 0)
    order = r"that is \(B, T, C, H, W\), of which latents.transpose\(1, 2\) has this order$"
    with pytest.raises(ValueError, match=rf"^VideoDiT: latents must have shape \(B, 2, 3, 4, 6\), got .*{order}"):
        small()(video().transpose(1, 2), 0)


def test_videos_of_another_dtype_are_refused_unless_autocast_casts_them(model):
    for other in (torch.bfloat16, torch.float64):
        message = rf"^VideoDiT: latents must have the dtype of the model \(torch.float32\), got latents.dtype={other}$"
        with pytest.raises(TypeError, match=message):
            model(video().to(other), 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(video().bfloat16(), 0).shape == video().shape


def test_a_text_is_embedded_already(model):
    with pytest.raises(TypeError, match=r"^VideoDiT: text must be a torch.Tensor, got text=str$"):
        model(video(), 500, text="a fox")


def test_generation_that_cannot_be(model):
    with pytest.raises(ValueError, match=r"^generate: model must be in evaluation mode, got model.training=True$"):
        generate(model.train())
    with pytest.raises(ValueError, match=r"^generate: num_steps must be at least 1, got num_steps=0$"):
        generate(model.eval(), num_steps=0)
