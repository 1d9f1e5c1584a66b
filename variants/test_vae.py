"""The VAE, against closed forms."""
import math
import re
import runpy
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributions as D
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent))
import vae

import dreamer

class Squares(gym.Env):
    """Images of a bright square that jumps about. The action is how bright it is."""
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def __init__(self):
        self.action_space = gym.spaces.Discrete(3)  # with a generator of its own

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.image(0), {}

    def image(self, action):
        x = np.zeros((64, 64, 3), np.uint8)
        i, j = self.np_random.integers(48, size=2)
        x[i : i + 16, j : j + 16] = 100 + 50 * action
        return x

    def step(self, action):
        return self.image(action), 0.0, False, False, {}

gym.register("Squares-v0", Squares)

class LinearVAE(vae.VAE):
    """x̂ = W·z + b with orthogonal columns of W: then p(x) and p(z | x) are known, and p(z | x) has
    independent dimensions. Images are (N, 1, 1, n), the posterior is given by the test."""
    def __init__(self, n, latents):
        torch.nn.Module.__init__(self)
        orthogonal, _ = torch.linalg.qr(torch.randn(n, latents, dtype=torch.double))
        self.w = orthogonal * torch.linspace(0.5, 2, latents, dtype=torch.double)
        self.b = torch.randn(n, dtype=torch.double)

    def true_posterior(self, x):
        """Of a Gaussian prior and a Gaussian likelihood of variance ½."""
        precision = torch.eye(self.w.shape[1], dtype=torch.double) + 2 * self.w.T @ self.w
        covariance = torch.linalg.inv(precision)
        mean = 2 * (x - self.b) @ self.w @ covariance
        return mean, covariance.diagonal().sqrt().expand_as(mean)

    def encode(self, x):
        return self.q[0], self.q[1].log()

    def decode(self, z):
        return (z @ self.w.T + self.b)[:, None, None]

@pytest.fixture
def linear():
    """A LinearVAE, points x (5, n), their evidence, and noise whose mean is that of all noise for
    anything quadratic: its mean is 0 and its covariance I."""
    torch.manual_seed(0)
    n, latents = 6, 3
    model = LinearVAE(n, latents)
    x = torch.randn(5, n, dtype=torch.double)
    evidence = D.MultivariateNormal(model.b, model.w @ model.w.T + torch.eye(n) / 2).log_prob(x)
    noise = math.sqrt(latents) * torch.cat([torch.eye(latents), -torch.eye(latents)]).double()
    return model, x, evidence, noise

def expected_elbo(model, x, noise):
    losses = []
    for e in noise:
        rec, kl = model(255 * x[:, None, None], e.expand(len(x), -1))
        losses.append(rec + kl)
    return -torch.stack(losses).mean(0) - x.shape[1] / 2 * math.log(math.pi)

def test_with_the_true_posterior_the_elbo_is_the_evidence(linear):
    model, x, evidence, noise = linear
    model.q = model.true_posterior(x)
    torch.testing.assert_close(expected_elbo(model, x, noise), evidence)

def test_with_another_posterior_the_elbo_lacks_the_kl_to_the_true_one(linear):
    model, x, evidence, noise = linear
    mean, std = model.true_posterior(x)
    model.q = mean + 0.3 * torch.randn_like(mean), std * torch.rand_like(std).add(0.5)
    gap = D.kl_divergence(D.Normal(*model.q), D.Normal(mean, std)).sum(1)
    assert (gap > 0.05).all()
    torch.testing.assert_close(expected_elbo(model, x, noise), evidence - gap)

def make_vae(shape=(64, 64, 3), latents=4):
    torch.manual_seed(0)
    return vae.VAE(shape, latents, dreamer.SIZES["1m"])

def images(n=3):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 64, 64, 3), generator=rng, dtype=torch.uint8)

def test_the_losses_are_those_of_torchs_distributions():
    model = make_vae()
    x = images()
    noise = torch.randn(3, 4)
    mean, log_std = model.encode(x)
    posterior = D.Independent(D.Normal(mean, log_std.exp()), 1)
    prior = D.Independent(D.Normal(torch.zeros(3, 4), torch.ones(3, 4)), 1)
    recon = model.decode(mean + noise * posterior.stddev)
    pixels = D.Independent(D.Normal(recon, math.sqrt(0.5)), 3)
    rec, kl = model(x, noise)
    n = 64 * 64 * 3
    torch.testing.assert_close(kl, D.kl_divergence(posterior, prior))
    likelihood = pixels.log_prob(x / 255)
    torch.testing.assert_close(rec, -likelihood - n / 2 * math.log(math.pi), rtol=1e-3, atol=1e-2)

def test_the_gradients_of_both_losses_reach_mean_and_deviation_as_finite_differences_say(linear):
    model, x, _, noise = linear

    def losses(mean, std):
        model.q = mean, std
        return model(255 * x[:3, None, None], noise[:3])

    q = [y[:3].clone().requires_grad_() for y in model.true_posterior(x)]
    assert torch.autograd.gradcheck(losses, q)
    for gradient in torch.autograd.grad(losses(*q)[0].sum(), q):
        assert (gradient != 0).any(1).all()

def test_collected_images_are_those_that_a_random_agent_saw_and_have_seeds_of_their_own():
    args = dreamer.Args(env_id="Squares-v0")
    first, again, other = (vae.collect(args, 40, name) for name in ("learn", "learn", "test"))
    assert first.shape == (40, 64, 64, 3) and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)
    # all three actions are taken, and each is kept for 8 steps
    brightness = first.flatten(1).amax(1)
    kept = brightness[1:33].view(4, 8)
    assert (kept == kept[:, :1]).all()
    assert len(set(kept[:, 0].tolist())) > 1
    # positions differ, so no observation is stored twice
    assert len(first.flatten(1).unique(dim=0)) == 40

def losses_in(text):
    return [float(x) for x in re.findall(r"(?:rec|kl) (\S+)", text)]

def test_the_losses_fall_pictures_are_saved_and_a_loaded_model_has_the_same_losses(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vae.main(vae.Args(env_id="Squares-v0", total_timesteps=30, epochs=2, batch_size=3))
    out = losses_in(capsys.readouterr().out)
    rec, kl = out[::2], out[1::2]
    assert len(rec) == len(kl) == 3 and rec[-1] < 0.3 * rec[0] and kl[-1] < kl[1]
    run, = Path("runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    for name, values in (("rec", rec), ("kl", kl)):
        logged = events.Scalars(f"losses/{name}")
        assert [x.step for x in logged] == [0, 1, 2]
        assert [x.value for x in logged] == pytest.approx(values, abs=0.01)
    pictures = sorted((run / "dreams").iterdir())
    assert [x.name for x in pictures] == [f"vae_{epoch:09d}.png" for epoch in range(3)]
    vae.main(vae.Args(evaluate=str(run)))
    assert losses_in(capsys.readouterr().out) == out[-2:]

def test_every_step_has_the_gradient_of_its_own_batch_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    norms = []

    def record(optimizer, *_):
        bias = next(p for p in optimizer.param_groups[0]["params"] if p.shape == (3,))  # colours
        norms.append(float(bias.grad.norm()))

    monkeypatch.setattr(torch.optim.Adam, "step", record)  # weights stay, so gradients do
    vae.main(vae.Args(env_id="Squares-v0", total_timesteps=8, epochs=3, batch_size=8))
    assert len(norms) == 3 and max(norms) < 1.4 * min(norms)

@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_shows_images_above_their_reconstructions_above_samples(tmp_path, channels):
    model = make_vae((64, 64, channels))
    x = images(20)[..., :channels]
    noise = torch.randn(20, 4)
    with SummaryWriter(str(tmp_path)) as writer:
        vae.report(model, x, noise, writer, 7)
    picture = np.asarray(Image.open(tmp_path / "dreams" / "vae_000000007.png"))
    assert picture.shape == (3 * 64, 10 * 64, 3)
    with torch.no_grad():
        mean, _ = model.encode(x[6:7])
        expected = [x[6], 255 * model.decode(mean)[0], 255 * model.decode(noise[3:4])[0]]
    for row, image in enumerate(expected):  # in column 3: every second of 20 images is drawn
        cell = picture[64 * row : 64 * (row + 1), 64 * 3 : 64 * 4].astype(float)
        np.testing.assert_allclose(cell, image.expand(64, 64, 3).numpy(), atol=1.01)

@pytest.mark.parametrize("values, complaint", [
    (dict(env_id="CartPole-v1"), "no images"), (dict(latents=0), "positive"),
    (dict(epochs=0), "positive"), (dict(learning_rate=-1.0), "positive"),
    (dict(evaluate="nowhere"), "vae.pt"), (dict(env_id="Nowhere-v0"), "Nowhere")])
def test_bad_input_is_refused_with_a_sentence(values, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dreamer.InputError, match=complaint):
        vae.main(vae.Args(**values))
    assert not list(tmp_path.iterdir())

def test_as_a_program_bad_input_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vae.py", "--env-id", "CartPole-v1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(vae.__file__, run_name="__main__")
    assert end.value.code == 2
    expected = "error: CartPole-v1 has no images: add --pixels for rendered frames\n"
    assert capsys.readouterr().err == expected
