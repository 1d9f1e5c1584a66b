"""Proofs for both scripts: `pytest` runs them in under three minutes on two cores, without display, network or GPU.

A test's name is the sentence that it proves, and each compares with something independent: numbers recorded from the
author's code, torch.distributions, a naive loop, a closed form, a stream of integers, an environment whose optimum is
known. RUN_SLOW=1 adds further seeds of the learning tests; tests marked `cuda` run where there is a GPU.
"""
import ast
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import Categorical, Independent, kl_divergence
from torch.utils._pytree import tree_map

import dreamer as D
import dreamer_marl as M

torch.set_num_threads(1)  # tiny layers: a second thread costs twice the time, or more where cores are busy
D.SIZES["tiny"] = TINY = D.Size(64, 16, 5, 2, 16, latents=6)
slow = pytest.mark.skipif("RUN_SLOW" not in os.environ, reason="slow: set RUN_SLOW=1")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
VECTOR, CHOICE = Box(-np.inf, np.inf, (3,), np.float32), Discrete(4)


# -------------------------------------------------------------------------------------------------------------- helpers


def close(ours, theirs, rtol=1e-5, atol=1e-6):
    ours, theirs = torch.as_tensor(ours).detach().double().cpu(), torch.as_tensor(theirs).detach().double().cpu()
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def equal(ours, theirs):
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def make_agent(observations=VECTOR, actions=CHOICE, seed=1, perturb=0.0, **values):
    """A tiny agent; `perturb` adds noise to all weights, since heads that start at zero hide gradients and mistakes."""
    torch.manual_seed(seed)
    values = dict(size="tiny", cuda=False, compile=False, precision="float32", warmup=0, learning_rate=1e-3,
                  imagination_horizon=5, image_size=48, num_envs=2, batch_length=8) | values
    agent = D.Dreamer(observations, actions, D.Args(seed=seed, **values))
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(perturb * torch.randn(p.shape).to(p.device))
    return agent


class Loop:
    """The main loop in miniature: act, step, store, and update a few times. NEXT_STEP autoreset, as in main."""

    def __init__(self, agent, make, num_envs=2, capacity=4000, **dtypes):
        specs = {k: (shape, dtypes.get(k, dtype)) for k, (shape, dtype) in agent.replay_specs().items()}
        self.agent, self.state, n = agent, None, num_envs
        self.envs = gym.vector.SyncVectorEnv([make] * n, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
        self.replay = D.ReplayBuffer(capacity, n, agent.args.batch_length, specs, agent.args.seed)
        self.obs, _ = self.envs.reset(seed=agent.args.seed)
        self.arrived = dict(reward=np.zeros(n), is_first=np.ones(n, bool), is_last=np.zeros(n, bool),
                            is_terminal=np.zeros(n, bool))

    def step(self, updates=0, batch_size=8):
        """Rewards of one step of every environment."""
        actions, self.state = self.agent.act(self.obs, self.state, self.arrived["is_first"])
        rows = {k: self.state[k] for k in self.replay.data if k in self.state}
        self.replay.add({**rows, **self.arrived})
        self.obs, reward, terminated, truncated, _ = self.envs.step(actions)
        self.arrived = dict(reward=reward, is_first=self.arrived["is_last"], is_last=terminated | truncated,
                            is_terminal=terminated)
        for _ in range(updates if self.replay.count > 2 * self.replay.window else 0):
            batch = self.replay.sample(batch_size)
            self.agent.update(batch)
            self.replay.write_back(batch, deter=batch["deter"], stoch=batch["stoch"])
        return reward

    def fill(self, steps=30):
        for _ in range(steps):
            self.step()
        return self


class Random(gym.Env):
    """Draws observations and rewards at random, ends episodes after four steps, and insists on valid actions."""

    def __init__(self, observations=VECTOR, actions=CHOICE):
        self.observation_space, self.action_space = observations, actions

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.left = 4
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.left -= 1
        return self.observation_space.sample(), float(self.np_random.normal()), self.left == 0, False, {}


def batch_of(agent, seed=0, observations=VECTOR, actions=CHOICE, size=4):
    """A batch of a replay that `agent` filled itself."""
    loop = Loop(agent, lambda: Random(observations, actions)).fill()
    torch.manual_seed(seed)
    return loop.replay.sample(size)


def noise_of(agent, batch, seed=5):
    """The three tensors that Dreamer.update draws."""
    (b, t), h, latents = batch["reward"][:, 1:].shape, agent.args.imagination_horizon, TINY.latents
    shapes = (b, t, latents, 1), (h, b * t, latents, 1), (h + 1, b * t, agent.actions.noise)
    return agent.noise(torch.Generator().manual_seed(seed), *shapes)


# ------------------------------------------------------------------------------------- parity with the reference's code

GOLDEN = Path(__file__).parent / "benchmark" / "golden"


def official_names(agent):
    """Our parameter → (official parameter, how its axes are laid out); see benchmark/golden/README.md."""
    names = {}

    def linear(ours, official):
        names.update({f"{ours}.weight": (f"{official}/kernel", "IO"), f"{ours}.bias": (f"{official}/bias", "")})

    def blocks(ours, official):
        names.update({f"{ours}.weight": (f"{official}/kernel", ""), f"{ours}.bias": (f"{official}/bias", "")})

    def conv(ours, official, norm):
        names.update({f"{ours[0]}.conv.weight": (f"{official}/kernel", "HWIO"),
                      f"{ours[0]}.conv.bias": (f"{official}/bias", ""), f"{ours[1]}.weight": (f"{norm}/scale", "")})

    def layer(ours, official, norm=None):
        linear(f"{ours}.0", official)
        names[f"{ours}.1.weight"] = (f"{norm or official + 'norm'}/scale", "")

    def mlp(ours, official, layers):
        for i in range(layers):
            layer(f"{ours}.{i}", f"{official}/mlp/linear{i}", f"{official}/mlp/norm{i}")

    for i in range(3):
        layer(f"wm.encoder.mlp.{i}", f"enc/mlp{i}")
        layer(f"wm.rssm.{('deter_in', 'stoch_in', 'action_in')[i]}", f"dyn/dynin{i}")
    for i in range(4):
        conv([f"wm.encoder.{part}.{i}" for part in ("convs", "norms")], f"enc/cnn{i}", f"enc/cnn{i}norm")
        conv([f"wm.decoder.{part}.{i}" for part in ("convs", "norms")],
             f"dec/{('conv2', 'conv1', 'conv0', 'imgout')[i]}",
             f"dec/{('spnorm', 'conv2norm', 'conv1norm', 'conv0norm')[i]}")
    blocks("wm.rssm.hidden", "dyn/dynhid0")
    names["wm.rssm.hidden_norm.weight"] = ("dyn/dynhid0norm/scale", "")
    blocks("wm.rssm.gates", "dyn/dyngru")
    layer("wm.rssm.prior.0", "dyn/prior0")
    layer("wm.rssm.prior.1", "dyn/prior1")
    linear("wm.rssm.prior.2", "dyn/priorlogit")
    layer("wm.rssm.posterior.0", "dyn/obs0")
    linear("wm.rssm.posterior.1", "dyn/obslogit")
    mlp("wm.decoder.mlp", "dec", 3)
    linear("wm.decoder.outputs.0", "dec/vec/vector/pred")
    blocks("wm.decoder.from_deter", "dec/sp0")
    layer("wm.decoder.from_stoch.0", "dec/sp1")
    linear("wm.decoder.from_stoch.1", "dec/sp2")
    heads = (("wm.reward", "rew", 1, "logits"), ("wm.cont", "con", 1, "logit"), ("critic", "val", 3, "logits"),
             ("slow_critic", "slowval", 3, "logits"))
    for ours, official, layers, outputs in heads:
        mlp(ours, official, layers)
        linear(f"{ours}.{layers}", f"{official}/head/{outputs}")
    mlp("actor.mlp", "pol", 3)
    continuous = agent.actions.heads["obs"][0] == "continuous"
    for i, output in enumerate(("mean", "stddev") if continuous else ("logits",)):
        linear(f"actor.outputs.0.{i}", f"pol/head/action/{output}")
    return names


@pytest.mark.parametrize("case", ["tiny_vec_cont", "tiny_img_vec_disc"])
def test_losses_states_and_two_updates_are_those_of_the_official_code(case):
    z = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(GOLDEN / f"{case}.npz").items()}
    image = "data/image" in z
    spaces = {"vector": Box(-np.inf, np.inf, (5,), np.float32)}
    spaces |= {"image": Box(0, 255, (64, 64, 3), np.uint8)} if image else {}
    agent = make_agent(Dict(spaces), Discrete(5) if image else Box(-1, 1, (3,)), image_size=64, imagination_horizon=15)
    names, params = official_names(agent), dict(agent.named_parameters())
    order = {"IO": (1, 0), "HWIO": (3, 2, 0, 1)}

    def official(name, when):
        x = z[f"{when}/{names[name][0]}"]
        return x.permute(order[names[name][1]]) if names[name][1] else x

    def range_of(when):
        return torch.stack([z[f"{when}/retnorm/lo/value"], z[f"{when}/retnorm/hi/value"]])

    # every recorded weight has its place, and every place its weight
    state = {f"param/{k}/value" for k in ("retnorm/lo", "retnorm/hi", "slowval_count")}
    assert {k for k in z if k.startswith("param/")} - state == {f"param/{names[k][0]}" for k in params}
    with torch.no_grad():
        for name, p in params.items():
            assert p.shape == official(name, "param").shape, name
            p.copy_(official(name, "param"))
        agent.retnorm.range.copy_(range_of("param"))
    data = {"obs": {k: z[f"data/{k}"] for k in spaces}, "carry": (z["carry/deter"], z["carry/stoch"]),
            **{k: z[f"data/{k}"] for k in ("reward", "is_first", "is_last", "is_terminal")},
            "prev_action": F.one_hot(z["data/prevact"].long(), 5).float() if image else z["data/prevact"]}

    # states and every loss, element by element; modes stand for all random draws
    losses, (deter, stoch, logits), _ = agent.wm.loss(data, None, agent.args.gamma, agent.args.free_nats)
    imag, returns, _ = agent.imagination_loss(deter.flatten(0, 1), stoch.flatten(0, 1), None, None)
    agent.retnorm.range.copy_(range_of("param"))  # the first update comes below
    losses |= {k: x.mean(1).view(3, 8) for k, x in imag.items()}
    losses["repval"], _ = agent.replay_value_loss(data, D.features(deter, stoch), returns[:, 0].view(3, 8))
    recon = agent.wm.decoder(deter.flatten(0, 1), stoch.flatten(0, 1))
    parts = agent.wm.decoder.loss(recon, {k: x.flatten(0, 1) for k, x in data["obs"].items()})
    close(losses.pop("rec"), sum(z[f"out/losses/{k}"] for k in spaces), rtol=1e-4)
    losses |= {k: x.view(3, 8) for k, x in parts.items()}
    assert {f"out/losses/{k}" for k in losses} == {k for k in z if k.startswith("out/losses/")}
    for name, x in losses.items():
        close(x, z[f"out/losses/{name}"], rtol=1e-3 if name == "policy" else 1e-4, atol=1e-5)
    tokens = agent.wm.encode(data["obs"])
    for ours, name in ((deter, "deter"), (stoch, "stoch"), (logits, "logit"), (tokens, "tokens")):
        close(ours, z[f"out/{name}"], rtol=1e-4, atol=1e-5)

    # In tiny_vec_cont the loss does not depend on the mean head at all: actions are modes, and d ln N(a|μ)/dμ = 0 at
    # a = μ. The reference's first update of that head was therefore lr times the SIGN OF ITS ROUNDING NOISE, for LaProp
    # scales the smallest gradient to ±1. We read the sign from the recorded weights and make the same first move; then
    # everything else agrees. Of the head itself we can only ask that our gradient be zero too.
    noise_only = set() if image else {"actor.outputs.0.0.weight", "actor.outputs.0.0.bias"}
    for step in (1, 2):
        loss, metrics, _ = agent.loss(data, (None, None, None))
        if step == 1:
            close(agent.retnorm.range, range_of("out"), rtol=1e-4)
            for name in ("adv adv_std adv_mag rew con ret val tar weight slowval ret_min ret_max ret_rate").split():
                close(metrics[f"diagnostics/{name}"], z[f"out/metrics/{name}"], rtol=1e-3, atol=1e-5)
            entropies = {"prior_entropy": "dyn_ent", "posterior_entropy": "rep_ent", "policy_entropy": "ent/action"}
            for ours, name in entropies.items():
                close(metrics[f"diagnostics/{ours}"], z[f"out/metrics/{name}"], rtol=1e-3)
        agent.optimizer.zero_grad()
        loss.backward()
        assert all(params[k].grad.abs().max() < 1e-6 for k in noise_only)
        norms = agent.optimizer.step()
        close(loss, z[f"step{step}/loss"], rtol=1e-4)
        close(norms["grad_norm"], z[f"step{step}/grad_norm"], rtol=1e-4)
        with torch.no_grad():
            for k in noise_only if step == 1 else ():
                params[k].copy_(official(k, "param") + 1e-3 * (official(k, "step2") - official(k, "param")).sign())
        torch._foreach_lerp_(list(agent.slow_critic.parameters()), list(agent.critic.parameters()), agent.args.tau)
    close(agent.retnorm.range, range_of("step2"), rtol=1e-4)
    for name in params.keys() - noise_only:
        close(params[name], official(name, "step2"), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- robust predictions


def test_symexp_inverts_symlog():
    x = torch.tensor([-1e6, -3.0, -0.1, 0.0, 1e-3, 1.0, 250.0, 1e8], dtype=torch.float64)
    close(D.symexp(D.symlog(x)), x, rtol=1e-9)
    close(D.symlog(torch.tensor([np.e - 1, 1 - np.e])), [1.0, -1.0])


def test_two_hot_bins_are_antisymmetric_and_evenly_spaced_in_symlog():
    bins = D.SymexpTwoHot(torch.zeros(255)).bins
    equal(bins, -bins.flip(0))
    assert bins[127] == 0 and (bins.diff() > 0).all()
    close(D.symlog(bins.double()), torch.linspace(-20, 20, 255, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def two_hot(x, bins):
    """Target distribution by a loop: linear in raw space between the two neighbouring bins, clipped at the ends."""
    target, x = np.zeros(len(bins)), min(max(float(x), float(bins[0])), float(bins[-1]))
    for i in range(len(bins) - 1):
        if bins[i] <= x <= bins[i + 1]:
            target[:] = 0
            target[i] = (bins[i + 1] - x) / (bins[i + 1] - bins[i])
            target[i + 1] = 1 - target[i]
    return target


def test_two_hot_loss_is_cross_entropy_to_a_target_interpolated_in_raw_space():
    torch.manual_seed(0)
    x = torch.tensor([0.0, 0.01, -0.07, 1.0, -1.0, 3.7, -250.0, 12345.6, 4.8e8, -4.8e8, 1e12, -1e12])
    logits = torch.randn(len(x), 255, requires_grad=True)
    dist = D.SymexpTwoHot(logits)
    targets = torch.tensor(np.stack([two_hot(v, dist.bins.double().numpy()) for v in x]))
    loss = dist.loss(x)
    close(loss, -(targets * logits.double().log_softmax(-1)).sum(-1), rtol=1e-4)
    close(dist.loss(x, 2 * x, x.flip(0)), loss + dist.loss(2 * x) + dist.loss(x.flip(0)))
    loss.sum().backward()  # the gradient of a cross-entropy is p − target: the mass lies on at most two neighbours
    mass = logits.detach().softmax(-1) - logits.grad
    close(mass, targets, atol=1e-4)
    assert (mass.abs() > 1e-5).sum(-1).max() == 2
    inside = x.abs() < 1e8  # the target's own mean is the number that it stands for
    close((targets * dist.bins.double()).sum(-1)[inside], x[inside], rtol=1e-4)


def test_two_hot_mean_is_the_sum_over_bins_and_exactly_zero_for_zero_logits():
    torch.manual_seed(0)
    logits = torch.randn(7, 255) * 3
    logits[:, :64] -= 60  # without the outermost bins, whose size would hide all others
    logits[:, -64:] -= 60
    dist = D.SymexpTwoHot(logits)
    close(dist.pred(), (logits.double().softmax(-1) * dist.bins.double()).sum(-1), rtol=1e-4, atol=1e-2)
    equal(D.SymexpTwoHot(torch.zeros(5, 255)).pred(), torch.zeros(5))
    equal(D.SymexpTwoHot(torch.full((5, 255), 1.3)).pred(), torch.zeros(5))


def mixed(logits, unimix=0.01):
    """Categorical with a hundredth of the uniform distribution, by torch.distributions."""
    return Independent(Categorical(probs=(1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]), 1)


def test_kl_is_that_of_torch_distributions_with_free_nats_after_the_sum_over_latents():
    torch.manual_seed(0)
    rssm = D.RSSM(8, 3, TINY)
    scale = torch.tensor([0.05, 0.8, 1.0, 3.0, 30.0])[:, None, None]  # from below a free nat to far above
    post, prior = scale * torch.randn(5, 6, 5), scale * torch.randn(5, 6, 5)
    kl = kl_divergence(mixed(post), mixed(prior))
    assert kl[0] < 1 < kl[1] < 6  # here free nats before the sum would give another number
    for x in rssm.kl_loss(post, prior):
        close(x, kl.clamp(min=1), rtol=1e-4)
    close(rssm.kl_loss(post, prior, free=0.0)[0], kl, rtol=1e-4)
    assert rssm.kl_loss(1e4 * post, -1e4 * post)[0].isfinite().all()


def test_dyn_reaches_only_the_prior_and_rep_only_the_posterior_and_neither_below_the_free_nats():
    torch.manual_seed(0)
    rssm, post, prior = D.RSSM(8, 3, TINY), *(torch.randn(4, 6, 5, requires_grad=True) for _ in range(2))
    dyn, rep = rssm.kl_loss(post, prior)
    want_post, want_prior = torch.autograd.grad(kl_divergence(mixed(post), mixed(prior)).sum(), (post, prior))
    for loss, want in ((dyn, (None, want_prior)), (rep, (want_post, None))):
        for got, expected in zip(torch.autograd.grad(loss.sum(), (post, prior), allow_unused=True), want):
            assert (got is None or not got.any()) if expected is None else torch.allclose(got, expected, atol=1e-5)
    dyn, rep = rssm.kl_loss(0.01 * post, 0.01 * prior)
    assert not any(x.any() for x in torch.autograd.grad((dyn + rep).sum(), (post, prior)))


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.3])
def test_one_hot_samples_have_the_mixed_frequencies_and_a_straight_through_gradient(unimix):
    torch.manual_seed(0)
    logits = (2 * torch.randn(3, 5)).requires_grad_()
    reference, dist, n = mixed(logits, unimix).base_dist, D.OneHot(logits, unimix), 10_000
    uniform = ((torch.arange(n) + 0.5) / n)[:, None, None].expand(n, 3, 1)  # a fine grid: exact to 1/n
    sample = D.OneHot(logits.expand(n, 3, 5), unimix).sample(uniform)
    close(sample.mean(0), reference.probs, atol=2 / n)
    close(sample.sort(-1).values, torch.tensor([0.0, 0, 0, 0, 1]).expand(n, 3, 5), atol=1e-6)
    equal(dist.sample(None).argmax(-1), reference.probs.argmax(-1))
    equal(dist.sample(torch.zeros(3, 1)).argmax(-1), torch.zeros(3).long())
    equal(dist.sample(torch.full((3, 1), 1 - 2**-24)).argmax(-1), torch.full((3,), 4))  # rounding stays inside
    weights = torch.randn(3, 5)
    sample = dist.sample(torch.rand(3, 1))
    close(*(torch.autograd.grad((weights * x).sum(), logits)[0] for x in (sample, reference.probs)))
    index = torch.tensor([0, 4, 2])
    close(dist.log_prob(F.one_hot(index, 5).float()), reference.log_prob(index))
    close(dist.entropy(), reference.entropy())


def test_normal_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, std, x = torch.randn(4, 3), torch.rand(4, 3) + 0.1, torch.randn(4, 3)
    ours, reference = D.Normal(mean, std), torch.distributions.Normal(mean, std)
    close(ours.log_prob(x), reference.log_prob(x).sum(-1))
    close(ours.entropy(), reference.entropy().sum(-1))
    uniform = torch.rand(4, 3) * 0.98 + 0.01
    close(ours.sample(uniform), reference.icdf(uniform), rtol=1e-4, atol=1e-5)
    equal(ours.sample(None), mean)
    grid = ((torch.arange(100_000) + 0.5) / 100_000)[:, None, None].expand(-1, 4, 3)
    close(ours.sample(grid).mean(0), mean, atol=1e-3)
    close(ours.sample(grid).std(0), std, rtol=1e-2)
    assert ours.sample(torch.tensor([0.0, 0.5, 1.0]).expand(4, 3)).isfinite().all()


def test_an_action_distribution_samples_every_head_with_noise_of_its_own_and_sums_over_heads():
    space = Dict(a=Discrete(3), b=Box(-1, 1, (2,)), c=MultiDiscrete([2, 4]))
    agent = make_agent(actions=space, perturb=0.5)
    feat = torch.randn(5, 64 + 30)
    dist, x, uniform = agent.actor(feat), agent.actor.mlp(feat), torch.rand(5, agent.actions.noise)
    out = [[layer(x) for layer in layers] for layers in agent.actor.outputs]
    c = out[2][0].split([2, 4], -1)
    normal = torch.distributions.Normal(out[1][0].tanh(), 0.9 * (out[1][1] + 2).sigmoid() + 0.1)
    references = [Categorical(logits=out[0][0]), normal, Categorical(logits=c[0]), Categorical(logits=c[1])]
    action = dist.sample(uniform)
    choice, (a, b, *cs) = lambda x: x.argmax(-1), action.split([3, 2, 2, 4], -1)
    close(b, references[1].icdf(uniform[:, 1:3]), rtol=1e-4, atol=1e-5)
    for onehot, reference, u in zip((a, *cs), (references[0], *references[2:]), uniform[:, [0, 3, 4]].unbind(1)):
        equal(choice(onehot), (reference.probs.cumsum(-1) < u[:, None]).sum(-1))
    terms = [references[0].log_prob(choice(a)), references[1].log_prob(b).sum(-1)]
    close(dist.log_prob(action), sum(terms) + sum(r.log_prob(choice(x)) for r, x in zip(references[2:], cs)), atol=1e-5)
    close(dist.entropy(), sum(r.entropy().reshape(5, -1).sum(-1) for r in references), atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- returns


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_lambda_return_is_the_mixture_of_all_n_step_returns(lam):
    torch.manual_seed(0)
    reward, value, discount = torch.randn(3, 9), torch.randn(3, 9), torch.rand(3, 9)
    discount[0, 4] = 0  # a terminal in the middle: nothing after it may count
    returns = D.lambda_return(reward, value, discount, lam)
    for b, t in itertools.product(range(3), range(8)):
        steps, n_step, factor, collected = 8 - t, [], 1.0, 0.0
        for k in range(t + 1, 9):  # n-step return: rewards of n steps, then the value there
            collected, factor = collected + factor * reward[b, k], factor * discount[b, k]
            n_step.append(collected + factor * value[b, k])
        weights = [(1 - lam) * lam**n for n in range(steps - 1)] + [lam ** (steps - 1)]
        close(returns[b, t], sum(w * g for w, g in zip(weights, n_step)), rtol=1e-4, atol=1e-5)
    if lam == 0:  # one step of bootstrapping
        close(returns, (reward + discount * value)[:, 1:])


def test_nothing_after_a_terminal_or_truncated_step_enters_the_return_of_the_steps_before():
    torch.manual_seed(0)
    reward, value = torch.randn(1, 6), torch.randn(1, 6)
    discount, lam = torch.full((1, 6), 0.9), torch.full((1, 6), 0.95)
    lam[0, 3] = 0  # step 3 ends an episode by time limit: its value counts, what follows does not
    truncated = D.lambda_return(reward, value, discount, lam)
    close(truncated[0, 2], reward[0, 3] + 0.9 * value[0, 3])
    discount[0, 3] = 0  # or by a terminal: not even its value counts
    close(D.lambda_return(reward, value, discount, lam)[0, 2], reward[0, 3])
    reward[0, 4:], value[0, 4:] = 100, 100
    equal(D.lambda_return(reward, value, torch.full((1, 6), 0.9), lam)[0, :3], truncated[0, :3])


def test_return_range_is_a_moving_average_of_numpy_percentiles():
    norm, low, high = D.ReturnNormalizer(), 0.0, 0.0
    for i in range(5):
        x = np.random.default_rng(i).normal(100 * i, 300, (16, 15)).astype(np.float32)
        low, high = (0.99 * old + 0.01 * np.percentile(x, q) for old, q in ((low, 5), (high, 95)))
        close(norm(torch.from_numpy(x)), max(1.0, high - low), rtol=1e-4)
        close(norm.range, [low, high], rtol=1e-4, atol=1e-4)
    assert D.ReturnNormalizer()(torch.randn(9, 9)) == 1  # small returns are not blown up


@pytest.mark.parametrize("gamma", [None, 0.9])  # inside the continue prediction, or multiplied to it
def test_actor_and_critic_losses_are_those_of_a_naive_loop_over_dreams(gamma):
    agent = make_agent(**{"contdisc": False, "gamma": gamma} if gamma else {}, perturb=0.3, ent_coef=0.5)
    torch.manual_seed(3)
    n, h = 4, 5
    deter, stoch = torch.randn(n, 64).tanh(), F.one_hot(torch.randint(5, (n, 6)), 5).float()
    z_noise, a_noise = torch.rand(h, n, 6, 1), torch.rand(h + 1, n, 1)
    agent.retnorm.range.copy_(torch.tensor([-300.0, 900.0]))
    losses, returns, _ = agent.imagination_loss(deter, stoch, z_noise, a_noise)
    low, high = -300.0, 900.0
    low, high = (0.99 * old + 0.01 * np.percentile(returns, q) for old, q in ((low, 5), (high, 95)))
    with torch.no_grad():
        for i in range(n):
            d, z, feats, logps, entropies = deter[i : i + 1], stoch[i : i + 1], [], [], []
            for t in range(h + 1):
                feats.append(D.features(d, z))
                pi = Categorical(logits=agent.actor.outputs[0][0](agent.actor.mlp(feats[-1])))
                a = (pi.probs.cumsum(-1) < a_noise[t, i : i + 1]).sum(-1)  # inverse CDF
                logps.append(pi.log_prob(a))
                entropies.append(pi.entropy())
                d, z = agent.wm.rssm.img_step(d, z, F.one_hot(a, 4).float(), z_noise[min(t, h - 1), i : i + 1])
            mean = lambda logits: (logits.softmax(-1) * D.SymexpTwoHot(logits).bins).sum()
            reward, value = [mean(agent.wm.reward(f)) for f in feats], [agent.critic(f).pred()[0] for f in feats]
            cont = [agent.wm.cont(f).sigmoid()[0, 0] for f in feats]
            target = value[h]
            for t in reversed(range(h)):
                target = reward[t + 1] + (gamma or 1) * cont[t + 1] * (0.05 * value[t + 1] + 0.95 * target)
                weight = np.prod([float(c) for c in cont[: t + 1]]) * (gamma or 1) ** t
                critic, slow_mean = agent.critic(feats[t]), agent.slow_critic(feats[t]).pred()
                expected = {"policy": -weight * (logps[t] * (target - value[t]) / (high - low) + 0.5 * entropies[t]),
                            "value": weight * (critic.loss(target[None]) + critic.loss(slow_mean))}
                scale = float(max(abs(v) for v in (*value, *reward))) + 1  # bins of ±4.8e8 cancel in these means
                close(returns[i, t], target, rtol=1e-3, atol=1e-4 * scale)
                for name, x in expected.items():
                    close(losses[name][i, t], x[0], rtol=2e-3, atol=1e-4 + 1e-4 * scale / (high - low))


def test_replay_value_loss_is_that_of_a_naive_loop_and_zero_where_an_episode_ends():
    agent = make_agent(perturb=0.1)
    torch.manual_seed(3)
    data = {"reward": torch.randn(2, 7), "is_last": torch.zeros(2, 7, dtype=torch.bool),
            "is_terminal": torch.zeros(2, 7, dtype=torch.bool)}
    data["is_last"][0, 2] = data["is_last"][1, 4] = data["is_terminal"][1, 4] = True
    feat, boot = torch.randn(2, 7, 94), torch.randn(2, 7)
    loss, returns = agent.replay_value_loss(data, feat, boot)
    assert loss.shape == (2, 6) and loss[0, 2] == loss[1, 4] == 0
    for b in range(2):
        target = boot[b, 6]
        for t in reversed(range(6)):
            c = 0.95 * (1 - float(data["is_last"][b, t + 1]))
            gamma = (1 - 1 / 333) * (1 - float(data["is_terminal"][b, t + 1]))
            target = data["reward"][b, t + 1] + gamma * ((1 - c) * boot[b, t + 1] + c * target)
            critic = agent.critic(feat[b, t])
            expected = critic.loss(target) + critic.loss(agent.slow_critic(feat[b, t]).pred())
            close(loss[b, t], 0.0 if data["is_last"][b, t] else expected, rtol=1e-4)
            close(returns[b, t], target)


# --------------------------------------------------------------------------------------------------------------- layers


def test_rms_norm_divides_by_the_root_mean_square_in_float32():
    torch.manual_seed(0)
    norm, x = D.RMSNorm(12), torch.randn(5, 12)
    norm.weight.data.uniform_(0.5, 2)
    expected = x / ((x**2).mean(-1, keepdim=True) + 1e-4).sqrt() * norm.weight
    close(norm(x), expected)
    close(norm(torch.full((1, 12), 1e-3)), 1e-3 / (1e-6 + 1e-4) ** 0.5 * norm.weight[None])  # eps inside the root
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    equal(norm(x.bfloat16()), norm(x.bfloat16().float()).bfloat16())


def test_block_linear_is_separate_linear_layers_on_each_block_and_the_shared_inputs():
    torch.manual_seed(0)
    layer, x, shared = D.BlockLinear(24, 16, 8, shared=5), torch.randn(7, 24), torch.randn(7, 5)
    layer.bias.data.normal_()
    blocks = [torch.cat([own, shared], 1) @ weight + bias
              for own, weight, bias in zip(x.split(3, 1), layer.weight, layer.bias.split(2))]
    close(layer(x, shared), torch.cat(blocks, 1))
    with torch.no_grad():  # another way of computing it
        close(layer(x, shared), torch.cat(blocks, 1))
    plain = D.BlockLinear(24, 16, 8)
    close(plain(x), x @ torch.block_diag(*plain.weight), atol=1e-5)


def test_weights_start_as_truncated_normals_of_the_full_fan_in():
    torch.manual_seed(0)
    layers = {D.Linear(400, 300).weight: 400, D.BlockLinear(512, 512, 8, shared=192).weight: 512 + 8 * 192,
              D.Conv(32, 64).conv.weight: 25 * 32}
    for weight, fan_in in layers.items():  # 1.1368 is 1 / the standard deviation that truncation leaves, almost
        close(weight.std(), 1.1368 * 0.8796 / fan_in**0.5, rtol=1e-2)
        assert weight.abs().max() <= 2 * 1.1368 / fan_in**0.5 + 1e-7
    close(D.Linear(400, 300, outscale=0.01).weight.std(), 1e-2 / 20, rtol=2e-2)


def test_the_smallest_size_has_640867_trainable_parameters_on_walker():
    agent = D.Dreamer(Box(-np.inf, np.inf, (24,)), Box(-1, 1, (6,)), D.Args(size="1m", cuda=False))
    assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == 640_867


@pytest.mark.parametrize("size,millions", [("1m", 0.69), ("12m", 10.5), ("25m", 23.5), ("50m", 41.7), ("100m", 93.5),
                                           ("200m", 166.0), ("400m", 372.9)])
def test_every_size_has_the_published_number_of_parameters_for_images_and_18_actions(size, millions):
    dims = D.SIZES[size]
    feat = dims.deter + dims.latents * dims.classes
    with torch.device("meta"):  # shapes without memory
        leaf = D.Leaf("image", (64, 64, 3), 3)
        modules = (D.WorldModel({"obs": leaf}, 18, dims), D.Actor(feat, {"obs": ("discrete", (18,))}, dims.units),
                   D.Critic(feat, dims.units))
    count = sum(p.numel() for module in modules for p in module.parameters())
    assert round(count / 1e6, 2 if millions < 1 else 1) == millions, count


def test_rewards_and_values_are_exactly_zero_before_learning():
    agent = make_agent()
    feat = torch.randn(20, 94)
    equal(D.SymexpTwoHot(agent.wm.reward(feat)).pred(), torch.zeros(20))
    equal(agent.critic(feat).pred(), torch.zeros(20))
    equal(agent.slow_critic(feat).pred(), torch.zeros(20))


def test_upsampling_repeats_every_pixel_whether_it_is_compiled_or_not(monkeypatch):
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 8, 5)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        y = D.upsample(x.requires_grad_())
        assert np.array_equal(y.detach().numpy(), x.detach().numpy().repeat(2, 1).repeat(2, 2))
        gradient, = torch.autograd.grad((y * weight).sum(), x)
        close(gradient, weight.view(2, 3, 2, 4, 2, 5).sum((2, 4)))


# ---------------------------------------------------------------------------------------------------------- world model


def sequence(batch=3, length=9, tokens=8, actions=3, seed=0):
    """An RSSM with inputs for `observe`: initial state, tokens, previous actions, is_first, noise."""
    torch.manual_seed(seed)
    rssm = D.RSSM(tokens, actions, TINY)
    first = torch.zeros(batch, length, dtype=torch.bool)
    deter, stoch = torch.randn(batch, 64), F.one_hot(torch.randint(5, (batch, 6)), 5).float()
    return rssm, [deter, stoch, torch.randn(batch, length, tokens), 2 * torch.randn(batch, length, actions), first,
                  torch.rand(batch, length, 6, 1)]


def test_two_episodes_joined_by_is_first_equal_two_separate_runs():
    rssm, (deter, stoch, *x) = sequence()
    x[2][:, 5] = True
    joined = rssm.observe(deter, stoch, *x)
    before = rssm.observe(deter, stoch, *(v[:, :5] for v in x))
    after = [v[:, 5:].clone() for v in x]
    after[1][:, 0] = 0  # the first step of an episode has no previous action
    after[2][:] = False
    after = rssm.observe(*rssm.initial(3), *after)
    for whole, a, b in zip(joined, before, after):
        close(whole, torch.cat([a, b], 1))


def test_later_observations_actions_and_noise_cannot_change_earlier_states():
    rssm, (deter, stoch, *x) = sequence()
    base = rssm.observe(deter, stoch, *x)
    for i in (0, 1, 3):
        changed = [v.clone() for v in x]
        changed[i][:, 6:] = torch.rand_like(changed[i][:, 6:])
        for old, new in zip(base, rssm.observe(deter, stoch, *changed)):
            equal(old[:, :6], new[:, :6])
        assert not torch.equal(base[0], rssm.observe(deter, stoch, *changed)[0])


def test_an_action_outside_of_the_unit_interval_counts_as_its_sign_and_keeps_its_gradient_scale():
    rssm, _ = sequence()
    action = torch.tensor([[0.3, -5.0, 7.0]], requires_grad=True)
    unit = torch.tensor([[0.3, -1.0, 1.0]], requires_grad=True)
    embedded, expected, weights = rssm.embed(action), rssm.action_in(unit), torch.randn(1, 16)
    close(embedded, expected)
    got, want = (torch.autograd.grad((weights * x).sum(), a)[0] for x, a in ((embedded, action), (expected, unit)))
    close(got, want / torch.tensor([[1.0, 5.0, 7.0]]))  # no gradient through the denominator


def test_the_recurrence_is_the_block_gru_of_the_specification():
    rssm, (deter, stoch, *_) = sequence()
    action = torch.rand(3, 3)
    layer = lambda net, x: F.silu(net[1].weight * (y := net[0](x)) / (y.square().mean(-1, keepdim=True) + 1e-4).sqrt())
    nets = (rssm.deter_in, deter), (rssm.stoch_in, stoch.flatten(1)), (rssm.action_in, action)
    inputs = torch.cat([layer(net, x) for net, x in nets], 1)
    blocks = [torch.cat([deter[:, 8 * g : 8 * g + 8], inputs], 1) @ rssm.hidden.weight[g] for g in range(8)]
    x = torch.cat(blocks, 1)
    x = F.silu(x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt())
    for g in range(8):
        reset, cand, update = (x[:, 8 * g : 8 * g + 8] @ rssm.gates.weight[g]).split(8, -1)
        u = torch.sigmoid(update - 1)
        expected = u * torch.tanh(reset.sigmoid() * cand) + (1 - u) * deter[:, 8 * g : 8 * g + 8]
        close(rssm.core(deter, stoch, rssm.embed(action))[:, 8 * g : 8 * g + 8], expected, atol=1e-5)


def test_imagination_with_given_actions_is_the_prior_path():
    rssm, (deter, stoch, _, actions, _, noise) = sequence()
    deters, stochs, taken = rssm.imagine(deter, stoch, lambda h, z, t: actions[:, t], 9, noise.transpose(0, 1))
    equal(taken, actions.transpose(0, 1))
    equal(deters[0], deter)
    for t in range(9):
        deter = rssm.core(deter, stoch, rssm.embed(actions[:, t]))
        probs = mixed(rssm.prior(deter).view(3, 6, 5)).base_dist.probs
        stoch = F.one_hot((probs.cumsum(-1) < noise[:, t]).sum(-1), 5).float()
        close(deters[t + 1], deter)
        close(stochs[t + 1], stoch)


def test_dreaming_and_observing_share_one_recurrence():
    rssm, (deter, stoch, *x) = sequence()
    deters, stochs, _ = rssm.observe(deter, stoch, *x)
    for t in range(8):  # the next h depends on h, z and a alone
        close(rssm.img_step(deters[:, t], stochs[:, t], x[1][:, t + 1], None)[0], deters[:, t + 1])


def test_a_dream_reconstructs_its_context_and_then_sees_no_observation():
    agent = make_agent(perturb=0.1)
    data, noise = agent.prepare(batch_of(agent)), torch.rand(4, 8, 6, 1)
    data["is_first"] = torch.zeros_like(data["is_first"])
    dream = agent.wm.dream(data, 3, noise)["obs"]
    deter, stoch, _ = agent.wm.rssm.observe(*data["carry"], agent.wm.encode(data["obs"]), data["prev_action"],
                                            data["is_first"], noise)
    recon = agent.wm.decoder(deter.flatten(0, 1), stoch.flatten(0, 1))["obs"].view(dream.shape)
    close(dream[:, :3], recon[:, :3])
    assert not torch.allclose(dream[:, 3:], recon[:, 3:])
    deter, stoch = deter[:, 2], stoch[:, 2]
    for t in range(3, 8):
        deter, stoch = agent.wm.rssm.img_step(deter, stoch, data["prev_action"][:, t], noise[:, t])
        close(dream[:, t], agent.wm.decoder(deter, stoch)["obs"])
    data["obs"]["obs"][:, 3:] = 7.0
    equal(agent.wm.dream(data, 3, noise)["obs"], dream)
    data["prev_action"][:, 5] = 1 - data["prev_action"][:, 5]
    changed = agent.wm.dream(data, 3, noise)["obs"]
    equal(changed[:, :5], dream[:, :5])
    assert not torch.equal(changed[:, 5], dream[:, 5])


GRADIENTS = {  # loss: what it may move, through time and through the straight-through samples
    "rec": "encoder core posterior decoder", "rew": "encoder core posterior reward",
    "con": "encoder core posterior cont",
    "dyn": "encoder core posterior prior", "rep": "encoder core posterior", "policy": "actor", "value": "critic",
    "repval": "encoder core posterior critic",
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_each_loss_moves_its_modules_and_no_other(name):
    agent = make_agent(perturb=0.2)
    batch = batch_of(agent)
    data, noise = agent.prepare(batch), noise_of(agent, batch)
    losses, (deter, stoch, _), _ = agent.wm.loss(data, noise[0], agent.args.gamma, 0.0)
    imag, returns, _ = agent.imagination_loss(deter.flatten(0, 1), stoch.flatten(0, 1), *noise[1:])
    losses |= imag | {"repval": agent.replay_value_loss(data, D.features(deter, stoch), returns[:, 0].view(4, 8))[0]}
    assert losses.keys() == GRADIENTS.keys()
    wm, rssm = agent.wm, agent.wm.rssm
    modules = dict(encoder=wm.encoder, prior=rssm.prior, posterior=rssm.posterior, decoder=wm.decoder, reward=wm.reward,
                   cont=wm.cont, actor=agent.actor, critic=agent.critic, slow_critic=agent.slow_critic)
    modules["core"] = torch.nn.ModuleList([rssm.deter_in, rssm.stoch_in, rssm.action_in, rssm.hidden, rssm.gates])
    losses[name].mean().backward()
    grads = {k: [p.grad for p in module.parameters() if p.grad is not None] for k, module in modules.items()}
    assert {k for k, v in grads.items() if any(g.any() for g in v)} == set(GRADIENTS[name].split())


@pytest.mark.parametrize("values", [{}, {"rec_scale": 7.0, "rep_scale": 0.2, "dyn_scale": 3.0, "repval_scale": 5.0}])
def test_the_total_is_the_sum_of_the_mean_losses_times_their_scales(values):
    agent = make_agent(perturb=0.1, **values)
    batch = batch_of(agent)
    _, metrics, _ = agent.loss(agent.prepare(batch), noise_of(agent, batch))
    scales = dict(rec=1, rew=1, con=1, dyn=1, rep=0.1, policy=1, value=1, repval=0.3)
    scales |= {k.removesuffix("_scale"): v for k, v in values.items()}
    close(metrics["losses/total"], sum(v * metrics[f"losses/{k}"] for k, v in scales.items()), rtol=1e-5)


def test_dreams_from_the_last_steps_only_leave_the_world_models_loss_and_shorten_those_of_actor_and_critic():
    agent, short = make_agent(perturb=0.1), make_agent(perturb=0.1, imag_last=3)
    batch = batch_of(agent)
    data, (post, z, a) = agent.prepare(batch), noise_of(agent, batch)
    last = [x.unflatten(1, (4, 8))[:, :, -3:].flatten(1, 2) for x in (z, a)]
    (_, ours, _), (_, theirs, _) = short.loss(data, (post, *last)), agent.loss(data, (post, z, a))
    for name in ("rec", "rew", "con", "dyn", "rep"):
        equal(ours[f"losses/{name}"], theirs[f"losses/{name}"])
    deter, stoch, _ = agent.wm.loss(data, post, agent.args.gamma, 1.0)[1]
    agent.retnorm = type(agent.retnorm)()  # which moves with every call
    dreams, returns, _ = agent.imagination_loss(deter[:, 5:].flatten(0, 1), stoch[:, 5:].flatten(0, 1), *last)
    end = {k: data[k][:, 5:] for k in ("reward", "is_last", "is_terminal")}
    dreams["repval"], _ = agent.replay_value_loss(end, D.features(deter, stoch)[:, 5:], returns[:, 0].view(4, 3))
    for name, x in dreams.items():
        close(ours[f"losses/{name}"], x.mean())
    assert short.update(batch).keys() == agent.update(batch).keys()


@pytest.mark.parametrize("contdisc", [True, False])
def test_the_continue_target_holds_the_discount_only_with_contdisc(contdisc):
    agent = make_agent(contdisc=contdisc, gamma=0.9)
    batch = batch_of(agent)
    with torch.no_grad():
        for p in agent.wm.cont.parameters():
            p.zero_()
        list(agent.wm.cont.parameters())[-1].fill_(2.0)  # the bias of the logit
    terminal = batch["is_terminal"][:, 1:].float()
    assert 0 < terminal.mean() < 1
    yes, no = -F.logsigmoid(torch.tensor(2.0)), -F.logsigmoid(torch.tensor(-2.0))
    target = (1 - terminal) * (0.9 if contdisc else 1.0)
    _, metrics, _ = agent.loss(agent.prepare(batch), noise_of(agent, batch))
    close(metrics["losses/con"], (target * yes + (1 - target) * no).mean())


def test_image_vector_and_discrete_reconstruction_losses_are_sums_over_their_elements():
    space = Dict(camera=Box(0, 255, (48, 48, 3), np.uint8), speed=Box(-9, 9, (3,)), mode=MultiDiscrete([3, 4]))
    agent = make_agent(space)
    obs = agent.observations({"camera": np.random.randint(0, 256, (2, 48, 48, 3), np.uint8),
                              "speed": np.float32([[5, -2, 0], [1, 2, 3]]), "mode": np.array([[2, 3], [0, 1]])})
    obs = {k: torch.from_numpy(x) for k, x in obs.items()}
    recon = agent.wm.decoder(torch.randn(2, 64), torch.rand(2, 6, 5))
    losses = agent.wm.decoder.loss(recon, obs)
    close(losses["camera"], ((recon["camera"] - obs["camera"] / 255) ** 2).flatten(1).sum(1), rtol=1e-4)
    log = torch.sign(obs["speed"]) * torch.log(1 + obs["speed"].abs())
    close(losses["speed"], ((recon["speed"] - log) ** 2).sum(-1))
    logps = [Categorical(logits=x).log_prob(obs["mode"][:, i]) for i, x in enumerate(recon["mode"].split([3, 4], -1))]
    close(losses["mode"], -sum(logps))


# --------------------------------------------------------------------------------------------------------------- replay


def integers(capacity=60, envs=3, length=4, steps=0, seed=0):
    """A replay whose rows say where they come from: step t of environment e holds (e, t), its latent 1000·e + t."""
    specs = {"env_id": ((), torch.int64), "t": ((), torch.int64), "stoch": ((2,), torch.int64),
             "is_last": ((), torch.bool)}
    replay = D.ReplayBuffer(capacity, envs, length, specs, seed)
    for t in range(steps):
        add(replay, t)
    return replay


def add(replay, t):
    e = np.arange(replay.num_envs)
    replay.add({"env_id": e, "t": np.full(len(e), t), "stoch": np.stack([1000 * e + t] * 2, 1), "is_last": e < 0})


@pytest.mark.parametrize("steps", [5, 12, 20, 21, 33, 47])
def test_windows_are_consecutive_steps_of_one_environment_and_never_cross_the_write_head(steps):
    replay = integers(steps=steps)
    assert len(replay) == 3 * min(steps, 20)
    for _ in range(20):
        batch = replay.sample(16)
        equal(batch["t"].diff(dim=1), torch.ones(16, 4))
        assert (batch["env_id"] == batch["env"]).all()
        assert batch["t"].min() >= max(0, steps - 20) and batch["t"].max() <= steps - 1  # the last 20 steps, exactly


def test_uniform_draws_cover_all_windows_of_all_environments_evenly():
    replay, n = integers(steps=33), 6400
    replay.online.clear()
    batch = replay.sample(n)
    counts = torch.zeros(3, 33)
    counts.index_put_((batch["env"][:, 0], batch["t"][:, 0]), torch.ones(n), accumulate=True)
    assert not counts[:, :13].any() and not counts[:, 29:].any()  # 33 steps in 20 rows, windows of 5
    expected = n / (3 * 16)
    assert ((counts[:, 13:29] - expected) ** 2 / expected).sum() < 48 + 5 * (2 * 48) ** 0.5  # chi-square, 5 sigma
    assert not torch.equal(integers(steps=33, seed=1).sample(64)["t"], integers(steps=33, seed=2).sample(64)["t"])


def test_the_online_queue_serves_every_fresh_step_once_before_uniform_draws():
    replay, served = integers(capacity=300), []
    for t in range(50):
        add(replay, t)
        fresh = len(replay.online)
        if t % 7 == 6:
            batch = replay.sample(4)
            assert len(replay.online) == max(0, fresh - 4)
            served += [(int(e), int(t)) for e, row in zip(batch["env"][:fresh], batch["t"][:fresh]) for t in row]
    batch = replay.sample(len(replay.online) or 1)
    served += [(int(e), int(t)) for e, row in zip(batch["env"], batch["t"]) for t in row][: 150 - len(served)]
    assert sorted(served) == [(e, t) for e in range(3) for t in range(50)]


def test_fresh_windows_that_were_overwritten_before_their_turn_are_not_served():
    replay = integers(steps=48)  # nine windows of each environment queued, the last four steps open; 20 rows are left
    assert replay.sample(30)["t"].min() >= 28
    assert not replay.online


def test_write_back_changes_exactly_the_trained_rows_of_the_sampled_windows():
    replay = integers(steps=33)
    batch = replay.sample(6)
    replay.write_back(batch, stoch=-batch["stoch"][:, 1:])
    written = {(int(e), int(t)) for e, row in zip(batch["env"], batch["t"]) for t in row[1:]}
    for e, row in itertools.product(range(3), range(20)):
        t = int(replay.data["t"][e, row])
        sign = -1 if (e, t) in written else 1
        equal(replay.data["stoch"][e, row], torch.tensor([sign * (1000 * e + t)] * 2))


def test_a_saved_replay_takes_the_space_of_what_it_holds_and_a_full_one_is_not_copied(tmp_path):
    replay = integers(capacity=300_000, steps=20)
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    assert (tmp_path / "replay.pt").stat().st_size < 50_000
    full = integers(steps=33)
    saved = full.state_dict()["data"]
    assert all(x.data_ptr() == y.data_ptr() for k in saved for x, y in zip(saved[k], full.data[k], strict=True))


def test_a_restored_replay_draws_what_the_saved_one_would_have_drawn_and_ends_the_broken_episodes(tmp_path):
    replay = integers(steps=33)
    replay.sample(2)
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    restored = integers(seed=9)
    restored.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    assert len(restored) == len(replay) and restored.online == replay.online
    assert restored.data["is_last"].sum() == 3 and restored.data["is_last"][:, 32 % 20].all()
    for t in range(33, 60):
        for r in (replay, restored):
            add(r, t)
        a, b = replay.sample(3), restored.sample(3)
        assert all(torch.equal(a[k], b[k]) for k in a if k != "is_last")
    with pytest.raises(D.InputError, match="layout"):
        integers(capacity=90).load_state_dict(replay.state_dict())


# ------------------------------------------------------------------------------------------- from environment to update


class Echo(gym.Env):
    """Observes [action that led here, reward that came with it, terminated, truncated]; zeros after a reset."""
    observation_space = Box(-np.inf, np.inf, (6,), np.float32)
    action_space = Dict(c=Box(np.float32([-2, 0]), np.float32([4, 1])), d=Discrete(3, start=5))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length, self.limit = 0, self.np_random.integers(1, 6), self.np_random.random() < 0.5
        return np.zeros(6, np.float32), {}

    def step(self, action):
        self.t += 1
        reward, end = float(self.np_random.normal()), self.t == self.length
        obs = np.float32([*action["c"], action["d"], reward, end and not self.limit, end and self.limit])
        return obs, reward, bool(obs[4]), bool(obs[5]), {}


def test_observation_reward_flags_and_previous_action_of_a_trained_step_belong_together():
    agent = make_agent(Echo.observation_space, Echo.action_space, perturb=0.5)
    loop = Loop(agent, Echo, num_envs=3, capacity=150).fill(120)  # wraps around
    batch = loop.replay.sample(64)
    data = agent.prepare(batch)
    obs, first, last = data["obs"]["obs"].flatten(0, 1), data["is_first"].flatten(), data["is_last"].flatten()
    assert first.sum() > 20 and data["is_terminal"].sum() > 20 and (last & ~data["is_terminal"].flatten()).sum() > 20
    assert not obs[first].any()
    actions = agent.actions.decode(data["prev_action"].flatten(0, 1).numpy())
    for ours, theirs in ((actions["c"], obs[:, :2]), (actions["d"], obs[:, 2])):
        close(torch.as_tensor(ours)[~first], theirs[~first], atol=1e-5)
    close(data["reward"].flatten(), obs[:, 3])
    equal(data["is_terminal"].flatten(), obs[:, 4] > 0)
    equal(last, (obs[:, 4:] > 0).any(1))
    equal(batch["is_first"][:, 1:], batch["is_last"][:, :-1])  # a new episode follows the last step of another
    assert (batch["action"][..., :2].abs() > 1).any()  # raw samples are stored, unclipped


def test_acting_and_training_give_the_same_posterior_for_the_same_inputs_and_noise():
    agent = make_agent(Echo.observation_space, Echo.action_space, perturb=0.5)
    rng = torch.Generator().manual_seed(0)
    rng.set_state(agent.act_rng.get_state())
    loop = Loop(agent, Echo, capacity=200, deter=torch.float32).fill(60)  # float32, to compare to rounding
    z_noise = torch.cat([agent.noise(rng, (2, 1, 6, 1), (2, agent.actions.noise))[0] for _ in range(60)], 1)
    batch = loop.replay.sample(16)
    data, steps = agent.prepare(batch), batch["row"][:, 1:]
    noise = z_noise[batch["env"], steps]
    deter, stoch, _ = agent.wm.rssm.observe(*data["carry"], agent.wm.encode(data["obs"]), data["prev_action"],
                                            data["is_first"], noise)
    close(deter, batch["deter"][:, 1:], rtol=1e-4, atol=1e-5)
    equal(stoch.argmax(-1), batch["stoch"][:, 1:].long())


def test_update_hands_the_fresh_posterior_of_the_trained_steps_to_write_back():
    agent, reference = make_agent(perturb=0.3), make_agent(perturb=0.3)
    batch = batch_of(agent)
    data, noise = reference.prepare(batch), reference.noise(reference.learn_rng, (4, 8, 6, 1))[0]
    deter, stoch, _ = reference.wm.rssm.observe(*data["carry"], reference.wm.encode(data["obs"]), data["prev_action"],
                                                data["is_first"], noise)
    agent.update(batch)
    close(batch["deter"], deter)
    equal(batch["stoch"], stoch.argmax(-1))


OBSERVATIONS = {
    "vector": VECTOR, "float of no dimension": Box(-1, 1, ()), "float64 matrix": Box(-5, 5, (2, 3), np.float64),
    "integers": Box(-10, 10, (4,), np.int64), "bytes": Box(0, 255, (7,), np.uint8), "discrete": Discrete(4, start=-1),
    "multidiscrete": MultiDiscrete([[2, 3], [4, 5]]), "multibinary": MultiBinary((2, 2)),
    "gray image": Box(0, 255, (40, 30), np.uint8), "gray image with a channel": Box(0, 255, (48, 48, 1), np.uint8),
    "colour image": Box(0, 255, (96, 50, 3), np.uint8), "bool image": Box(0, 1, (20, 20), np.bool_),
    "nested dict with images": Dict({
        "eyes": Dict(left=Box(0, 255, (48, 48, 3), np.uint8), right=Box(0, 255, (9, 9), np.uint8)),
        "joints.x": Box(-1, 1, (2,)), "mode": Tuple([Discrete(2), MultiBinary(3)])}),
    "tuple": Tuple([Box(-1, 1, (2,)), Discrete(3, start=2)]),
}
ACTIONS = {
    "discrete": Discrete(4), "discrete with a start": Discrete(3, start=-7), "box": Box(-1, 1, (3,)),
    "asymmetric box": Box(np.float32([-2, 5]), np.float32([1, 6])), "float of no dimension": Box(0, 3, ()),
    "float64 matrix": Box(-1, 1, (2, 2), np.float64), "integer box": Box(0, 9, (2,), np.int32),
    "multidiscrete": MultiDiscrete([3, 2, 4]),
    "matrix of choices": MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, -2]]),
    "multibinary": MultiBinary(3), "binary matrix": MultiBinary((2, 2)),
    "nested dict": Dict(hand=Dict(grip=Discrete(2), move=Box(-1, 1, (2,))), legs=Tuple([MultiBinary(2), Discrete(3)])),
    "tuple": Tuple([Discrete(2, start=1), Box(-3, 0, (1,))]),
}


PAIRS = list(itertools.zip_longest(OBSERVATIONS, ACTIONS, fillvalue="discrete"))


@pytest.mark.parametrize("observations,actions", PAIRS)
def test_every_kind_of_space_acts_is_stored_and_learns(observations, actions):
    spaces = OBSERVATIONS[observations], ACTIONS[actions]
    agent = make_agent(*spaces)
    loop = Loop(agent, lambda: Random(*spaces), capacity=60).fill(20)  # Random insists on valid actions
    before = {k: p.clone() for k, p in agent.named_parameters()}
    loop.step(updates=2, batch_size=3)
    # the first update of heads that start at zero moves them alone; after two everything has moved
    for name, p in agent.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name


def test_keys_may_have_any_name():
    names = ["type", "values", "items", "training", "pop", "half", "a.b"]
    agent = make_agent(Dict({name: Box(-1, 1, (2,)) for name in names}))
    recon = agent.wm.decoder(torch.zeros(3, 64), torch.zeros(3, 6, 5))
    assert set(recon) == set(names) and all(x.shape == (3, 2) for x in recon.values())


def test_what_looks_like_an_image_but_is_none_is_taken_for_a_vector_with_a_warning():
    for space in (Box(0, 255, (4, 84, 84), np.uint8), Box(0, 1, (84, 84, 3))):
        with pytest.warns(UserWarning, match="taken for a vector"):
            assert D.ObservationCodec(space, 48).leaves["obs"].kind == "vector"


def test_observations_are_encoded_without_loss():
    codec = D.ObservationCodec(Dict(
        a=Discrete(4, start=-1), b=MultiDiscrete([[2, 3], [4, 5]]), c=Box(-9, 9, (2, 2), np.float64), d=Box(-1, 1, ()),
        e=MultiBinary(2), f=Tuple([Box(0, 255, (3, 5), np.uint8)])), 48)
    x = codec({"a": np.array([-1, 2]), "b": np.arange(8).reshape(2, 2, 2), "c": np.arange(8.0).reshape(2, 2, 2),
               "d": np.float32([0.5, -1]), "e": np.int8([[0, 1], [1, 1]]), "f": (np.full((2, 3, 5), 7, np.uint8),)})
    kinds = {k: leaf.kind for k, leaf in codec.leaves.items()}
    assert kinds == dict(a="discrete", b="discrete", c="vector", d="vector", e="discrete") | {"f/0": "vector"}
    for name, expected in dict(a=[[0], [3]], b=[[0, 1, 2, 3], [4, 5, 6, 7]], c=[[0, 1, 2, 3], [4, 5, 6, 7]],
                               d=[[0.5], [-1]], e=[[0, 1], [1, 1]]).items():
        assert np.array_equal(x[name], expected) and x[name].shape[1:] == codec.leaves[name].shape


def test_large_images_shrink_to_the_means_of_their_blocks_and_small_ones_repeat_their_pixels():
    x = np.random.default_rng(0).integers(0, 256, (2, 96, 144, 3), np.uint8)
    means = x.reshape(2, 48, 2, 48, 3, 3).mean((2, 4))
    assert np.abs(D.ObservationCodec(Box(0, 255, (96, 144, 3), np.uint8), 48)(x)["obs"] - means).max() <= 0.5
    small = x[:, :24, :16, :1]
    repeated = D.ObservationCodec(Box(0, 255, (24, 16, 1), np.uint8), 48)(small)["obs"]
    assert np.array_equal(repeated, small.repeat(2, 1).repeat(3, 2))
    same = x[:, :48, :48]
    assert np.array_equal(D.ObservationCodec(Box(0, 255, (48, 48, 3), np.uint8), 48)(same)["obs"], same)
    flags = D.ObservationCodec(Box(0, 1, (24, 24), np.bool_), 48)(x[:, :24, :24, 0] > 99)["obs"]
    assert np.array_equal(np.unique(flags), [0, 255]) and flags.shape == (2, 48, 48, 1)


def test_actions_fill_asymmetric_bounds_start_offsets_and_integer_boxes():
    codec = D.ActionCodec(Tuple([Box(np.float32([-2, 5]), np.float32([4, 6])), Discrete(3, start=5),
                                 Box(0, 10, (1,), np.int32), MultiDiscrete([2, 3], start=[0, -1])]))
    assert codec.size == 2 + 3 + 1 + 5 and codec.noise == 2 + 1 + 1 + 2
    flat = np.float32([[-1, 1, 0, 0, 1, 0.5, 0, 1, 1, 0, 0], [0, -9, 1, 0, 0, 3, 1, 0, 0, 0, 1]])
    box, choice, integer, several = codec.decode(flat)
    assert np.array_equal(box, [[-2, 6], [1, 5]]) and box.dtype == np.float32
    assert np.array_equal(choice, [7, 5]) and np.array_equal(several, [[1, -1], [0, 1]])
    assert np.array_equal(integer, [[8], [10]]) and integer.dtype == np.int32  # 7.5 rounds to even


# ------------------------------------------------------------------------------------------------------------- learning


def test_laprop_with_adaptive_clipping_and_warmup_is_that_of_a_naive_loop():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(3, 4)), 5 * rng.normal(size=5), np.zeros(2)]  # the last clips at 0.3 · 1e-3
    params = [torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for v in (*values, [1.0])]
    optimizer = D.LaProp(params, lr=0.01, warmup=4)
    m, v = ([np.zeros_like(x) for x in values] for _ in range(2))
    for t in range(1, 9):
        norms, moves = [], []
        for i, scale in enumerate((10.0, 0.1, 1.0)):
            g = scale * rng.normal(size=values[i].shape)
            params[i].grad = torch.tensor(g, dtype=torch.float32)
            norms.append(np.sqrt((g**2).sum()))
            g = g / max(1, norms[-1] / (0.3 * max(1e-3, np.sqrt((values[i] ** 2).sum()))))
            for j in np.ndindex(g.shape):
                v[i][j] = 0.999 * v[i][j] + 0.001 * g[j] ** 2
                m[i][j] = 0.9 * m[i][j] + 0.1 * g[j] / (np.sqrt(v[i][j] / (1 - 0.999**t)) + 1e-20)
            moves.append(0.01 * min(1, (t - 1) / 4) * m[i] / (1 - 0.9**t))
            values[i] = values[i] - moves[-1]
        metrics = optimizer.step()
        close(metrics["grad_norm"], np.sqrt(np.sum(np.square(norms))), rtol=1e-4)
        close(metrics["update_norm"], np.sqrt(sum((x**2).sum() for x in moves)), rtol=1e-4)
        for p, value in zip(params, values):
            close(p, value, rtol=1e-4, atol=1e-5)
    equal(params[3], torch.ones(1))  # no gradient, no move


def test_the_slow_critic_follows_the_critic_of_after_the_step():
    agent = make_agent(perturb=0.1)
    old = [p.clone() for p in agent.slow_critic.parameters()]
    agent.update(batch_of(agent))
    for before, fast, after in zip(old, agent.critic.parameters(), agent.slow_critic.parameters()):
        close(after, 0.98 * before + 0.02 * fast, rtol=1e-5, atol=1e-7)
        assert not after.requires_grad


def test_the_first_update_under_warmup_moves_nothing_and_the_second_does():
    agent = make_agent(perturb=0.1, warmup=10)
    before, batch = {k: p.clone() for k, p in agent.named_parameters()}, batch_of(agent)
    for moved in (False, True):
        agent.update(dict(batch))
        assert all(torch.equal(p, before[k]) != moved for k, p in agent.named_parameters() if "slow" not in k)


def test_update_is_a_function_of_state_and_batch_and_acting_does_not_change_it():
    a, b = make_agent(perturb=0.1), make_agent(perturb=0.1)
    batch = batch_of(make_agent(perturb=0.1))
    for _ in range(2):
        results = [agent.update(dict(batch)) for agent in (a, b)]
        b.act(np.ones((7, 3), np.float32), None, np.ones(7, bool))
        assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_a_saved_and_loaded_agent_makes_the_identical_next_update_and_action(tmp_path):
    agent, other = make_agent(perturb=0.1, warmup=5), make_agent(seed=7, warmup=5)
    batch, obs = batch_of(agent), np.ones((7, 3), np.float32)
    for _ in range(3):
        agent.update(dict(batch))
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    other.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    for _ in range(2):
        results = [x.update(dict(batch)) for x in (agent, other)]
        assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert all(torch.equal(x, y) for x, y in zip(agent.parameters(), other.parameters()))
    equal(agent.retnorm.range, other.retnorm.range)
    actions = [x.act(obs, None, np.ones(7, bool))[0] for x in (agent, other)]
    assert np.array_equal(*actions)


def test_deterministic_acting_takes_the_modes_and_uses_up_no_randomness_of_learning():
    agent, obs = make_agent(perturb=1.0), np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    learn_rng = agent.learn_rng.get_state()
    modes = [agent.act(obs, None, np.ones(50, bool), deterministic=True)[0] for _ in range(2)]
    assert np.array_equal(*modes)
    samples = [agent.act(obs, None, np.ones(50, bool))[0] for _ in range(2)]
    assert not np.array_equal(*samples)
    equal(agent.learn_rng.get_state(), learn_rng)


def test_what_was_before_is_first_has_no_influence_on_acting():
    agent, obs = make_agent(perturb=0.5), np.ones((2, 3), np.float32)
    _, state = agent.act(obs, None, np.ones(2, bool))
    _, fresh = agent.act(obs, None, np.ones(2, bool), deterministic=True)
    _, reset = agent.act(obs, state, np.array([True, False]), deterministic=True)
    close(reset["deter"][0], fresh["deter"][0])
    assert not torch.allclose(reset["deter"][1], fresh["deter"][1])


def test_bfloat16_losses_are_near_float32_and_every_parameter_gets_a_finite_gradient():
    space = Dict(image=Box(0, 255, (48, 48, 3), np.uint8), vector=VECTOR)
    high, low = (make_agent(space, precision=p, perturb=0.02) for p in ("float32", "bfloat16"))
    batch, metrics = batch_of(high, observations=space), []
    for agent in (high, low):
        loss, losses, (deter, _) = agent.loss(agent.prepare(batch), noise_of(agent, batch))
        loss.backward()
        metrics.append(losses)
        assert loss.dtype == torch.float32 and all(p.dtype == torch.float32 for p in agent.parameters())
    assert deter.dtype == torch.bfloat16
    for name in ("rec", "rew", "con", "dyn", "rep", "value", "repval"):
        close(metrics[1][f"losses/{name}"], metrics[0][f"losses/{name}"], rtol=0.1, atol=0.02)
    for (name, p), q in zip(high.named_parameters(), low.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert q.grad is None or (q.grad.isfinite().all() and q.grad.dtype == torch.float32), name
    low.update(dict(batch))
    assert all(p.isfinite().all() for p in low.parameters())


@cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_updates_on_the_gpu_give_the_losses_of_the_cpu(precision):
    cpu, gpu = make_agent(perturb=0.02), make_agent(perturb=0.02, cuda=True, precision=precision)
    gpu.load_state_dict({k: v for k, v in cpu.state_dict().items() if k != "_extra_state"}, strict=False)
    batch = batch_of(cpu)
    noise = noise_of(cpu, batch)
    losses = [agent.loss(agent.prepare(batch), [x.to(agent.device) for x in noise])[1] for agent in (cpu, gpu)]
    for name in ("rec", "rew", "con", "dyn", "rep", "value", "repval"):
        rtol, atol = (1e-3, 1e-3) if precision == "float32" else (0.1, 0.02)
        close(losses[1][f"losses/{name}"], losses[0][f"losses/{name}"], rtol, atol)
    Loop(gpu, Random).fill(20).step(updates=2)
    assert gpu.optimizer.param_groups[0]["updates"] == 2
    assert all(p.is_cuda and p.isfinite().all() for p in gpu.parameters())


# ---------------------------------------------------------------------------------------- environments of known optimum


class Probe(gym.Env):
    """A task in a few lines: `cue` is drawn at reset; `reward(action, cue, t)` and `see(cue, t)` are the task."""

    def __init__(self, reward, see, length=1, actions=Discrete(2)):
        self.reward, self.see, self.length, self.action_space = reward, see, length, actions
        self.observation_space = Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(2))
        return np.float32(self.see(self.cue, 0)), {}

    def step(self, action):
        reward = self.reward(action, self.cue, self.t)
        self.t += 1
        return np.float32(self.see(self.cue, self.t)), float(reward), self.t == self.length, False, {}


class Delayed(Probe):
    """Action 1 at the first of three steps is paid at the last; what was done is not seen in between."""

    def __init__(self):
        super().__init__(lambda a, cue, t: t == 2 and self.done == 1, lambda cue, t: (0, t / 3), length=3)

    def step(self, action):
        self.done = action if self.t == 0 else self.done
        return super().step(action)


PROBES = {  # the optimum is a return of 1 an episode, chance 0.5, or 0.1 for the continuous action
    "one action is right": lambda: Probe(lambda a, cue, t: a == 1, lambda cue, t: (0, 0)),
    "what is seen tells the right action": lambda: Probe(lambda a, cue, t: a == cue, lambda cue, t: (2 * cue - 1, 0)),
    "what was seen a step before tells the right action": lambda: Probe(  # at t = 1 nothing is seen: it must remember
        lambda a, cue, t: t == 1 and a == cue, lambda cue, t: ((2 * cue - 1) * (t == 0), t), length=2),
    "the first action decides and the third step pays": Delayed,
    "a continuous action has a best value": lambda: Probe(
        lambda a, cue, t: 1 - abs(a[0] + 0.7), lambda cue, t: (0, 0), actions=Box(-1, 1, (1,))),
}


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=slow) for seed in (2, 3))])
@pytest.mark.parametrize("name", PROBES)
def test_the_optimum_is_learned_within_600_updates_when(name, seed):
    make = PROBES[name]
    agent = make_agent(make().observation_space, make().action_space, seed=seed, learning_rate=3e-3, warmup=10,
                       ent_coef=1e-3, batch_length=4, imagination_horizon=3)
    loop, rewards, ends, score = Loop(agent, make, num_envs=4), [], [], 0.0
    optimum = 0.5 if "continuous" in name else 0.9  # of what it samples, exploration included
    for step in range(600):
        rewards.append(loop.step(updates=1, batch_size=16).sum())
        ends.append(loop.arrived["is_last"].sum())
        score = sum(rewards[-40:]) / max(1, sum(ends[-40:]))
        if step > 40 and score > optimum:
            return
    raise AssertionError(f"return {score} after {step + 1} updates")


# ----------------------------------------------------------------------------------------------- arguments and mistakes


def test_presets_are_those_of_the_reference_and_flags_override_them():
    for env_id, pixels, values in (
            ("ALE/Pong-v5", False, dict(size="200m", num_envs=1, train_ratio=256, total_timesteps=100_000)),
            ("dm_control/walker-walk-v0", False, dict(size="1m", num_envs=16, train_ratio=1024, total_timesteps=10**6)),
            ("dm_control/walker-walk-v0", True, dict(size="200m", num_envs=16, train_ratio=256, total_timesteps=10**6)),
            ("CartPole-v1", False, D.PRESETS["classic_control"])):
        args = D.Args.preset(env_id, pixels)
        assert {k: getattr(args, k) for k in values} == values and args.env_id == env_id and args.pixels == pixels
    args = D.Args.preset("ALE/Pong-v5", size="12m", seed=3)
    assert (args.size, args.seed, args.train_ratio) == ("12m", 3, 256)
    reference = dict(batch_size=16, batch_length=64, learning_rate=4e-5, warmup=1000, agc=0.3, imagination_horizon=15,
                     gamma=1 - 1 / 333, return_lambda=0.95, ent_coef=3e-4, tau=0.02, free_nats=1.0, dyn_scale=1.0,
                     rep_scale=0.1, repval_scale=0.3, buffer_size=5_000_000)
    assert {k: getattr(D.Args.preset("ALE/Pong-v5"), k) for k in reference} == reference
    for name in D.PRESETS:
        D.Args(**D.PRESETS[name]).check()
        assert D.PRESETS[name].keys() <= {f.name for f in dataclasses.fields(D.Args)}


def act_on(value, space=VECTOR):
    make_agent(space).act(np.full((1, *space.shape), value, np.float32), None, np.ones(1, bool))


@pytest.mark.parametrize("mistake,named", {
    "an unbounded action": (lambda: make_agent(actions=Box(-np.inf, 1, (2,))), "-inf"),
    "an unsupported action space": (lambda: make_agent(actions=gym.spaces.Text(5)), "Text"),
    "an empty action space": (lambda: make_agent(actions=Dict()), "empty"),
    "an unsupported observation space": (lambda: make_agent(Dict(a=gym.spaces.Sequence(VECTOR))), "Sequence"),
    "an empty observation": (lambda: make_agent(Dict(a=Box(-1, 1, (0,)))), r"\(0,\)"),
    "no observation": (lambda: make_agent(Dict()), "no usable key"),
    "a NaN observation": (lambda: act_on(np.nan), "nan"),
    "an infinite observation": (lambda: act_on(np.inf), "inf"),
    "batch_length beyond the buffer": (
        lambda: make_agent(buffer_size=100, num_envs=4, batch_length=25, batch_size=2), "batch_length 25.*100 to 104"),
    "a buffer in which no batch ever comes together": (
        lambda: D.Args.preset("CartPole-v1", num_envs=1, buffer_size=250).check(), "batch_size 16.*250 to 257"),
    "dreams from one step": (lambda: make_agent(imag_last=1), "imag_last 1 "),
    "dreams from fewer than no steps": (lambda: make_agent(imag_last=-1), "imag_last -1 "),
    **{f"{name} {value}": (lambda name=name, value=value: make_agent(**{name: value}), f"{name} {value} ")
       for name, value in dict(threads=-1, learning_rate=-1.0, gamma=1.5, return_lambda=3.0, tau=7.0, agc=0.0, seed=-1,
                               free_nats=-1.0, train_ratio=float("nan"), eval_every=-5, batch_length=1).items()},
    "to resume and to evaluate at once": (lambda: make_agent(resume="a", evaluate="b"), "resume 'a'.*evaluate 'b'"),
    "a replay on a GPU that is not used": (lambda: make_agent(buffer_device="cuda"), "buffer_device 'cuda'"),
    "an environment that does not render": (
        lambda: D.make_env("test/Lengths-v0", 0, False, "", pixels=True)(), "cannot be rendered"),
    "an environment of words": (
        lambda: make_agent(D.make_env("test/Words-v0", 0, False, "")().observation_space), "Text"),
    "a replay of too few rows": (lambda: D.ReplayBuffer(100, 4, 25, {}), "batch_length 25.*25 steps"),
    "a replay that no memory holds": (
        lambda: D.ReplayBuffer(10**13, 4, 8, {"obs": ((64, 64, 3), torch.uint8)}), "GiB.*--buffer-size to [0-9]+$"),
    "an early sample": (lambda: integers(steps=4).sample(1), "holds 4 steps"),
    "an unknown size": (lambda: D.Args(size="13m").check(), "13m.*12m"),
    "an image size that does not fit": (lambda: D.Args(image_size=40).check(), "image_size 40"),
    "no environments": (lambda: D.Args(num_envs=0).check(), "num_envs 0"),
    "an unknown environment": (lambda: D.make_env("NoSuchEnv-v0", 0, False, "")(), "NoSuchEnv-v0"),
    "an unknown module": (lambda: D.make_env("no_such_module:Env-v0", 0, False, "")(), "no_such_module"),
}.items(), ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_an_input_error_that_names_the_value(mistake, named):
    with pytest.raises(D.InputError, match=f"(?s){named[1]}"):
        named[0]()


@pytest.mark.parametrize("env_id,module,package", [
    ("ALE/Pong-v5", "ale_py", "ale-py"), ("dm_control/walker-walk-v0", "shimmy", "dm-control"),
    ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"), ("MinAtar/Breakout-v1", "minatar.gym", "minatar")])
def test_a_missing_package_is_an_input_error_with_the_line_that_installs_it(monkeypatch, env_id, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(D.InputError, match=f"pip install .*{package}"):
        D.make_env(env_id, 0, False, "")()


# ----------------------------------------------------------------------------------------------------------- whole runs


class Lengths(gym.Env):
    """Pays 1 a step in episodes of random length: returns are known from the seed."""
    observation_space, action_space = Box(-1, 1, (2,), np.float32), Discrete(2)
    reward = 1.0

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 12))
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.ones(2, np.float32), self.reward, self.left == 0, False, {}


class NaNReward(Lengths):
    reward = float("nan")


class Words(Echo):
    observation_space = Dict(mission=gym.spaces.Text(5))


gym.register("test/Words-v0", Words)
gym.register("test/Lengths-v0", Lengths)
gym.register("test/Echo-v0", Echo)
gym.register("test/NaNReward-v0", NaNReward)


# ------------------------------------------------------------------------------------------- compiled, captured, spread


def train_on_a_share(rank, ranks, folder):
    """Twenty updates of one of `ranks` processes on its share of a fixed batch and noise; saves what it learned."""
    batch = batch_of(make_agent(perturb=0.1), size=8)  # before the processes meet and get noise of their own
    if ranks > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    agent, rng = make_agent(), torch.Generator().manual_seed(3)
    agent.optimizer.param_groups[0]["eps"] = 1e-3  # or the sign of rounding would move weights without a gradient
    share = slice(4 * rank, 4 * rank + 4) if ranks > 1 else slice(None)
    data = agent.prepare({k: v[share] for k, v in batch.items()})
    for _ in range(20):
        shapes = (8, 8, TINY.latents, 1), (8, 8, 5, TINY.latents, 1), (8, 8, 6, agent.actions.noise)
        noise = [torch.rand(shape, generator=rng)[share] for shape in shapes]
        agent.learn(data, [noise[0], *(x.flatten(0, 1).transpose(0, 1) for x in noise[1:])])
    torch.save({**dict(agent.named_parameters()), "range": agent.retnorm.range}, f"{folder}/{ranks}.{rank}.pt")


def test_two_processes_learn_what_one_learns_from_both_their_batches_and_stay_identical(tmp_path):
    torch.multiprocessing.spawn(train_on_a_share, (2, str(tmp_path)), nprocs=2)
    train_on_a_share(0, 1, str(tmp_path))
    first, second, whole = (torch.load(tmp_path / f"{name}.pt") for name in ("2.0", "2.1", "1.0"))
    for name in whole:
        equal(first[name], second[name])
        close(first[name], whole[name], rtol=1e-4, atol=1e-5)
    alone = make_agent()
    assert max((whole[k] - p).abs().max() for k, p in alone.named_parameters()) > 5e-3  # and it had learned


def train_and_resume_in_two_processes(script, folder, *flags):
    """Yields the folder and the steps of a run under torchrun, first of 120 steps, then resumed up to 160."""
    flags = ["--size", "1m", "--num-envs", "2", "--batch-size", "2", "--batch-length", "8", "--eval-episodes", "2",
             "--threads", "1", "--no-cuda", "--no-compile", "--video-every", "0", *flags]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, *flags]
    for steps in (120, 160):
        done = subprocess.run([*torchrun, "--total-timesteps", str(steps)], capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr
        run, = (folder / "runs").iterdir()
        summary = json.loads((run / "summary.json").read_text())
        assert summary["global_step"] == steps and summary["ranks"] == 2 and len(summary["eval_returns"]) == 2
        yield run, steps
        torchrun += ["--resume", str(run)]


def test_torchrun_spreads_a_run_over_processes_and_only_as_many_resume_it(folder):
    flags = ["--env-id", "CartPole-v1", "--train-ratio", "4"]
    for run, steps in train_and_resume_in_two_processes(D.__file__, folder, *flags):
        replays = [D.load_file(run, name) for name in ("replay.pt", "replay1.pt")]
        assert [r["count"] for r in replays] == [steps // 4] * 2
        assert not torch.equal(*(torch.stack(r["data"]["obs/obs"]) for r in replays))
    with pytest.raises(D.InputError, match="2 processes"):
        D.main(D.parse_args(["--resume", str(run), "--total-timesteps", "200"]))


@slow
def test_compiled_updates_are_the_eager_ones():
    eager, compiled = (make_agent(perturb=0.1, compile=on) for on in (False, True))
    batch = batch_of(make_agent(perturb=0.1))
    for _ in range(20):
        results = [agent.update(dict(batch)) for agent in (eager, compiled)]
    for name in results[0]:
        close(results[1][name], results[0][name], rtol=1e-2, atol=1e-3)
    for a, b in zip(eager.parameters(), compiled.parameters()):
        close(b, a, rtol=1e-3, atol=1e-3)


def test_an_agent_saved_on_another_device_is_restored_but_for_its_generators():
    saved, agent = make_agent(perturb=0.1).state_dict(), make_agent(seed=7)
    state = agent.act_rng.get_state()
    saved["_extra_state"]["act_rng"] = torch.zeros(16, dtype=torch.uint8)  # so long is that of a GPU's generator
    agent.load_state_dict(saved)
    assert torch.equal(agent.actor.outputs[0][0].weight, saved["actor.outputs.0.0.weight"])
    assert torch.equal(agent.act_rng.get_state(), state)


Nothing = type("Nothing", (), dict.fromkeys(("__init__", "wait_stream", "replay"), lambda *_: None))


def stand_in_for_graphs(monkeypatch, graph):
    """Lets `Captured` work without a GPU; `graph` takes the place of the context in which it records."""
    for name, value in dict(graph=graph, CUDAGraph=Nothing, Stream=Nothing, current_stream=Nothing,
                            stream=lambda _: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_a_function_that_cannot_be_captured_is_run_as_it_is_with_one_warning(monkeypatch):
    class NoGraph:
        def __init__(self, graph):
            raise RuntimeError("operation not permitted")

    stand_in_for_graphs(monkeypatch, NoGraph)
    double = D.Captured(lambda tree, y: (2 * tree["x"], y + 1), on=True)
    with pytest.warns(UserWarning, match="not permitted") as warned:
        for i in range(5):
            a, b = double({"x": torch.tensor([float(i)])}, torch.tensor(i))
            assert (a.item(), b.item()) == (2 * i, i + 1)
    assert len(warned) == 1


def test_what_is_recorded_meets_the_tensors_that_it_was_warmed_up_with(monkeypatch):
    """Or torch.compile, which looks at strides, would compile anew in the middle of the recording, and fail."""
    stand_in_for_graphs(monkeypatch, lambda _: contextlib.nullcontext())
    seen = []
    function = D.Captured(lambda x: seen.append((x.data_ptr(), x.stride(), x.tolist())), on=True)
    for i in range(3):
        function(torch.arange(i, i + 6).view(2, 3)[:, 1:])  # a view, like what `prepare` makes
    assert [x for *_, x in seen] == [[[i + 1, i + 2], [i + 4, i + 5]] for i in range(3)]
    assert len({(address, stride) for address, stride, _ in seen}) == 1


@slow
def test_compiled_code_is_not_compiled_anew_when_it_is_recorded(monkeypatch):
    agent = make_agent(perturb=0.1, compile=True, precision="bfloat16")
    stand_in_for_graphs(monkeypatch, lambda _: torch.compiler.set_stance("fail_on_recompile"))
    agent.fast_learn.on = True
    for _ in range(3):
        metrics = agent.update(batch_of(agent))
    assert agent.fast_learn.on and all(x.isfinite() for x in metrics.values())


@cuda
def test_captured_updates_are_the_eager_ones_and_draw_new_noise_every_time():
    agents = [make_agent(perturb=0.1, cuda=True, compile=False, cuda_graph=on) for on in (False, True)]
    batch = {k: v.cpu() for k, v in batch_of(make_agent(perturb=0.1)).items()}
    for i in range(20):
        results = [agent.update(dict(batch)) for agent in agents]
    assert agents[1].fast_learn.on and "outputs" in next(iter(agents[1].fast_learn.graphs.values()))
    for name in results[0]:
        close(results[1][name], results[0][name], rtol=1e-3, atol=1e-4)
    for a, b in zip(*(agent.parameters() for agent in agents)):
        close(b, a, rtol=1e-3, atol=1e-4)
    obs = np.zeros((64, 3), np.float32)
    actions = [agents[1].act(obs, None, np.ones(64, bool))[0] for _ in range(8)]
    assert len({a.tobytes() for a in actions}) == 8


@cuda
@pytest.mark.parametrize("pixels", [False, True])
def test_compiled_updates_are_recorded_as_graphs_with_the_defaults_of_a_gpu(pixels):
    space = Box(0, 255, (48, 48, 3), np.uint8) if pixels else VECTOR
    agent = make_agent(space, cuda=True, compile=True, precision="bfloat16")
    for _ in range(4):
        metrics = agent.update(batch_of(make_agent(space), observations=space))
    assert agent.fast_learn.on and "outputs" in next(iter(agent.fast_learn.graphs.values()))
    assert all(x.isfinite() for x in metrics.values())


@cuda
def test_a_replay_on_the_gpu_gives_the_windows_of_one_on_the_cpu():
    specs = {"t": ((), torch.int64), "is_last": ((), torch.bool)}
    replays = [D.ReplayBuffer(60, 3, 4, specs, device=device) for device in ("cpu", "cuda")]
    for t in range(33):
        for replay in replays:
            replay.add({"t": np.full(3, t), "is_last": np.zeros(3, bool)})
    a, b = (replay.sample(16) for replay in replays)
    assert b["t"].is_cuda and torch.equal(a["t"], b["t"].cpu())


def run_args(**values):
    values = dict(env_id="test/Lengths-v0", size="tiny", cuda=False, compile=False, threads=1, num_envs=2,
                  total_timesteps=120, batch_size=4, batch_length=8, train_ratio=4, warmup=0, imagination_horizon=3,
                  eval_episodes=3, log_every=10, video_every=0, image_size=48, vectorization="sync") | values
    return D.Args(**values)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_evaluation_returns_are_the_first_episodes_of_environments_seeded_alike(folder):
    args = run_args()
    agent = make_agent(Lengths.observation_space, Lengths.action_space, env_id=args.env_id, seed=args.seed)
    expected = []
    for i in range(6):
        env = Lengths()
        env.reset(seed=args.seed + 10_000 + i)
        expected.append(float(env.left))
    assert D.evaluate(agent, args, 6, "eval") == expected
    assert len(set(expected)) > 1  # so that counting a second episode, or one for all, would be seen


def test_a_run_trains_at_its_ratio_logs_saves_resumes_and_is_evaluated(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = run_args()
    summary = D.main(args)
    run, = (folder / "runs").iterdir()
    credit = updates = 0
    for step in range(2, 122, 2):  # two environments; training starts at 4 · 8 steps in the replay
        credit += 2 * 4 / 32 if step >= 32 else 0
        updates, credit = updates + int(credit), credit - int(credit)
    assert (summary["global_step"], summary["updates"]) == (120, updates)
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["args"]["env_id"] == args.env_id and len(summary["eval_returns"]) == 3
    log = events.EventAccumulator(str(run)).Reload()
    for tag in ("charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/updates_per_second",
                "eval/episodic_return", *(f"losses/{k}" for k in GRADIENTS)):
        assert tag in log.Tags()["scalars"], tag
    returns, lengths = ([x.value for x in log.Scalars(f"charts/episodic_{k}")] for k in ("return", "length"))
    assert returns == lengths and len(returns) > 5  # a reward of 1 for every step

    evaluation = D.main(D.parse_args(["--evaluate", str(run), "--eval-episodes", "4"]))
    assert len(evaluation["eval_returns"]) == 4
    assert len(list((folder / "runs").iterdir())) == 1  # nothing new, and nothing lost
    saved = {k: x.clone() for k, x in D.load_file(run)["agent"].items() if torch.is_tensor(x)}
    D.main(dataclasses.replace(args, resume=str(run)))  # nothing left to do: all is as it was
    assert all(torch.equal(x, D.load_file(run)["agent"][k]) for k, x in saved.items())
    longer = D.main(D.parse_args(["--resume", str(run), "--total-timesteps", "160"]))
    assert longer["global_step"] == 160 and longer["updates"] == updates + 5
    assert D.load_file(run, "replay.pt")["count"] == 80


def test_the_main_loop_aligns_observation_reward_flags_and_previous_action(folder, monkeypatch):
    checked, update = [], D.Dreamer.update

    def check(agent, batch):
        data = agent.prepare(batch)
        obs, first = data["obs"]["obs"], data["is_first"]
        action = agent.actions.decode(data["prev_action"].flatten(0, 1).numpy())
        seen = np.concatenate([action["c"], action["d"][:, None]], 1).reshape(*first.shape, 3)
        close(torch.tensor(seen)[~first], obs[..., :3][~first], atol=1e-5)
        close(data["reward"], obs[..., 3])
        equal(data["is_terminal"], obs[..., 4] > 0)
        equal(data["is_last"], (obs[..., 4:] > 0).any(-1))
        assert not obs[first].any()
        checked.append(int(first.sum()))
        return update(agent, batch)

    monkeypatch.setattr(D.Dreamer, "update", check)
    D.main(run_args(env_id="test/Echo-v0", train_ratio=8))
    assert len(checked) > 15 and sum(checked) > 50


def test_two_runs_that_begin_in_the_same_second_do_not_share_a_folder(folder, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(D.time, "time", lambda: 1 + 1e-6 * next(ticks))
    D.main(run_args(total_timesteps=8, log_every=1000))
    with pytest.raises(D.InputError, match="another run's"):
        D.main(run_args(total_timesteps=8, log_every=1000))
    D.main(run_args(total_timesteps=8, exp_name="other"))
    assert len(list((folder / "runs").iterdir())) == 2


def test_an_interrupted_run_saves_and_can_be_resumed(folder, monkeypatch):
    update, calls = D.Dreamer.update, []

    def interrupted(agent, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return update(agent, batch)

    monkeypatch.setattr(D.Dreamer, "update", interrupted)
    summary = D.main(run_args())
    run, = (folder / "runs").iterdir()
    assert summary["interrupted"] and summary["updates"] == 4 and 0 < summary["global_step"] < 120
    assert D.load_file(run)["counters"]["updates"] == 4
    resumed = D.main(run_args(resume=str(run)))
    assert resumed["global_step"] == 120 and resumed["updates"] > 8 and not resumed["interrupted"]


def test_weights_that_became_nan_never_replace_a_healthy_checkpoint(folder, monkeypatch):
    update, calls = D.Dreamer.update, []

    def poisoned(agent, batch):
        calls.append(1)
        if len(calls) == 20:
            batch["reward"] *= float("nan")
        return update(agent, batch)

    monkeypatch.setattr(D.Dreamer, "update", poisoned)
    with pytest.raises(D.InputError, match="loss became nan"):
        D.main(run_args(train_ratio=16, checkpoint_every=2, log_every=60))
    run, = (folder / "runs").iterdir()
    saved = D.load_file(run)
    assert 10 < saved["counters"]["updates"] < 20 < len(calls)
    assert all(x.isfinite().all() for x in saved["agent"].values() if isinstance(x, torch.Tensor))


def test_evaluations_and_pictures_leave_the_run_as_it_would_have_been(folder):
    plain, watched = (D.main(run_args(exp_name=str(n), eval_every=n, video_every=n)) for n in (0, 20))
    weights = [D.load_file(next((folder / "runs").glob(f"*__{n}__*")))["agent"] for n in (0, 20)]
    assert plain["train_returns"] == watched["train_returns"] and plain["updates"] == watched["updates"] > 5
    for (name, a), b in zip(weights[0].items(), weights[1].values()):
        if isinstance(a, torch.Tensor):
            equal(a, b)


def test_a_final_evaluation_that_is_interrupted_still_leaves_a_summary(folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(D, "evaluate", interrupted)
    assert D.main(run_args())["eval_returns"] == []
    assert json.loads(next((folder / "runs").glob("*/summary.json")).read_text())["updates"] > 5


def test_a_file_that_cannot_be_read_is_an_input_error(folder):
    (folder / "damaged").mkdir()
    (folder / "damaged" / "agent.pt").write_bytes(b"nothing")
    with pytest.raises(D.InputError, match="damaged"):
        D.parse_args(["--resume", "damaged"])
    torch.save({"args": {"no_such_flag": 1}}, folder / "damaged" / "agent.pt")
    with pytest.raises(D.InputError, match="another script.*no_such_flag"):
        D.parse_args(["--evaluate", "damaged"])


def test_a_reward_that_is_not_finite_ends_the_run_with_an_input_error(folder):
    with pytest.raises(D.InputError, match="reward nan"):
        D.main(run_args(env_id="test/NaNReward-v0"))


def test_workers_in_other_processes_give_the_same_experience_as_this_process():
    streams = []
    for mode in ("sync", "async"):
        envs = D.make_vector_env(run_args(env_id="CartPole-v1", vectorization=mode), 2, "")
        obs, _ = envs.reset(seed=3)
        stream = [obs.copy()]
        for t in range(40):
            stream += [np.array(x) for x in envs.step(np.array([t % 2, 1]))[:4]]
        envs.close()
        streams.append(np.concatenate([x.ravel() for x in stream]))
    assert np.array_equal(*streams)


def test_dream_pictures_show_true_model_and_difference_for_every_key(folder):
    space = Dict(eye=Box(0, 255, (48, 48, 3), np.uint8), joints=VECTOR)
    agent = make_agent(space)
    loop = Loop(agent, lambda: Random(space)).fill()
    queue = len(loop.replay.online)
    pictures = D.draw_dreams(agent, loop.replay)
    assert len(pictures["eye"]) == 8 and {x.size for x in pictures["eye"]} == {(6 * 48, 3 * 48)}
    assert len(pictures["joints"]) == 1 and len(pictures["joints"][0].getcolors(10**6)) > 2
    assert len(loop.replay.online) == queue  # looking does not use up what is to be trained on


def test_the_command_line_takes_the_preset_of_the_environment_and_flags_on_top():
    assert D.parse_args([]) == D.Args.preset("CartPole-v1")
    assert D.parse_args(["--env-id", "ALE/Pong-v5", "--size", "12m"]) == D.Args.preset("ALE/Pong-v5", size="12m")
    walker = ["--env-id", "dm_control/walker-walk-v0", "--pixels", "--no-cuda"]
    assert D.parse_args(walker) == D.Args.preset("dm_control/walker-walk-v0", True, cuda=False)


def command(*flags):
    return subprocess.run([sys.executable, str(Path(D.__file__)), *flags], capture_output=True, text=True, timeout=170,
                          env={**os.environ, "COLUMNS": "200"})  # so that names in --help are not broken


def test_the_command_line_trains_and_writes_a_summary(folder):
    done = command("--size", "1m", "--total-timesteps", "120", "--num-envs", "2", "--batch-size", "2",
                   "--batch-length", "16", "--train-ratio", "4", "--eval-episodes", "2", "--threads", "1", "--no-cuda",
                   "--no-compile")
    assert done.returncode == 0, done.stderr
    summary, = (folder / "runs").glob("CartPole-v1__dreamer__1__*/summary.json")
    summary = json.loads(summary.read_text())
    assert summary["global_step"] == 120 and summary["updates"] > 0 and len(summary["eval_returns"]) == 2
    assert "global_step=" in done.stdout and "episodic_return=" in done.stdout


@pytest.mark.parametrize("flags,named", [
    (["--env-id", "NoSuchEnv-v0"], "NoSuchEnv-v0"), (["--evaluate", "no/such/run"], "no/such/run"),
    (["--batch-length", "999", "--buffer-size", "1000"], "999"), (["--size", "13m"], "13m")])
def test_the_command_line_answers_a_mistake_in_one_sentence_with_status_2_and_writes_nothing(folder, flags, named):
    done = command(*flags)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(folder.iterdir())


def test_help_explains_every_argument():
    text = command("--help").stdout.replace("\n", " ")
    for field in dataclasses.fields(D.Args):
        assert "--" + field.name.replace("_", "-") in text or "--no-" + field.name.replace("_", "-") in text, field.name
    lines = Path(D.__file__).read_text().split("class Args:")[1].split("@classmethod")[0].splitlines()
    fields = {f.name for f in dataclasses.fields(D.Args)}
    for above, line in zip(lines, lines[1:]):
        if line.strip().split(":")[0] in fields:  # a comment behind the field or above it
            fields.remove(line.strip().split(":")[0])
            comment = line.split("  # ")[1] if "  # " in line else above.strip().removeprefix("# ")
            assert len(comment.split()) > 2 and " ".join(comment.split()[:3]) in " ".join(text.split()), line
    assert not fields


@cuda
def test_a_run_on_the_gpu_ends_well(folder):
    summary = D.main(run_args(cuda=True))
    assert summary["global_step"] == 120 and summary["device"] != "cpu" and len(summary["eval_returns"]) == 3


# ======================================================================================== dreamer_marl.py: what it adds

M.SIZES["tiny"], TEAM = M.Size(*TINY), 2  # TEAM: latents of z_team in the tiny size, the last ones


def team_values(**values):
    return dict(size="tiny", team_latents=TEAM, cuda=False, compile=False, precision="float32", warmup=0,
                learning_rate=1e-3, imagination_horizon=4, image_size=48, num_envs=2, batch_length=8, batch_size=4,
                threads=1, train_ratio=4, vectorization="sync", video_every=0, eval_episodes=4, log_every=20) | values


def make_team(observations=VECTOR, actions=CHOICE, seats=3, seed=1, perturb=0.0, **values):
    """A tiny agent; `perturb` adds noise to all weights, since heads that start at zero hide gradients and mistakes."""
    torch.manual_seed(seed)
    agent = M.Dreamer(observations, actions, M.Args(seed=seed, **team_values(**values)), seats)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(perturb * torch.randn(p.shape).to(p.device))
    return agent


def team_batch(agent, b=4, t=8, seed=0):
    """A batch as the replay gives it, drawn at random: all in the game, one end inside, discrete actions."""
    rng = torch.Generator().manual_seed(seed)
    a, k = agent.actions.size, agent.seats

    def choices(*shape):
        return F.one_hot(torch.randint(a, shape, generator=rng), a).float()

    no = torch.zeros(b, t + 1, dtype=torch.bool)
    batch = {"obs/obs": torch.randn(b, t + 1, 3, generator=rng), "action": choices(b, t + 1),
             "teammates": choices(b, t + 1, k - 1), "reward": torch.randn(b, t + 1, generator=rng),
             "active": torch.ones(b, t + 1, k - 1, dtype=torch.bool), "valid": ~no, "is_first": no.clone(),
             "is_last": no.clone(), "is_terminal": no.clone(), "bayes": torch.full((b, t + 1, k - 1), float("nan")),
             "deter": torch.randn(b, t + 1, 64, generator=rng).tanh(),
             "stoch": torch.randint(5, (b, t + 1, 6), generator=rng).byte()}
    if t > 4:
        batch["is_last"][0, 4] = batch["is_terminal"][0, 4] = batch["is_first"][0, 5] = True
    return batch


def team_noise(agent, batch, seed=5):
    (b, t), h = batch["reward"][:, 1:].shape, agent.args.imagination_horizon
    shapes = (b, t, 6, 1), (h, b * t, 6, 1), (h + 1, b * t, agent.seats * agent.actions.noise)
    return agent.noise(torch.Generator().manual_seed(seed), *shapes)


def team_losses(agent, batch):
    """Every loss, and the gradient of their sum."""
    agent.retnorm.range.zero_()
    loss, report, _ = agent.loss(agent.prepare(batch), team_noise(agent, batch))
    agent.zero_grad()
    loss.backward()
    grads = {k: p.grad.clone() for k, p in agent.named_parameters() if p.grad is not None}
    return {k: x for k, x in report.items() if k.startswith("losses/")}, grads


class Toy:
    """A ParallelEnv whose observation tells who sees it, when, and everyone's last action; agent i leaves after
    `lives[i]` steps, by death if `lives[i]` < length. Rewards are 10 · time + number."""
    metadata, render_mode, scripts = {}, None, ()

    def __init__(self, lives=(6, 3, 6), length=6, truncate=False):
        self.lives, self.length, self.truncate = lives, length, truncate
        self.possible_agents = [f"agent_{i}" for i in range(len(lives))]

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (2 + len(self.lives),), np.float32)

    def action_space(self, agent):
        return Discrete(4)

    def see(self, agents, actions):
        last = [actions.get(name, -1) for name in self.possible_agents]
        return {a: np.array([self.possible_agents.index(a), self.t, *last], np.float32) for a in agents}

    def reset(self, seed=None, options=None):
        self.t, self.agents = 0, list(self.possible_agents)
        return self.see(self.agents, {}), {a: {} for a in self.agents}

    def step(self, actions):
        assert set(actions) == set(self.agents), (actions, self.agents)
        self.t += 1
        acted, over = self.agents, {a: self.t >= self.lives[self.possible_agents.index(a)] for a in self.agents}
        timeout = {a: self.truncate and over[a] and self.t >= self.length for a in acted}
        self.agents = [a for a in acted if not over[a]]
        return (self.see(acted, actions), {a: 10.0 * self.t + self.possible_agents.index(a) for a in acted},
                {a: over[a] and not timeout[a] for a in acted}, timeout, {a: {} for a in acted})


def play_team(make, steps, agent=None, num_envs=2, capacity=4000, pool=None, **values):
    """Plays `steps` steps in `num_envs` environments as main does; returns the table, the replay and the agent."""
    args = M.Args(**team_values(**values))
    envs = gym.vector.SyncVectorEnv([lambda: M.Seats(make(), M.scripts_of(args, make()))] * num_envs,
                                      autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    seats = M.Seats(make())
    space = Dict({**seats.seat_space.spaces, "seat": Discrete(len(seats.names))})
    torch.manual_seed(0)
    agent = agent or M.Dreamer(space, seats.seat_action, args, len(seats.names))
    table = M.Table(agent, num_envs, pool(agent) if pool else None)
    replay = M.ReplayBuffer(capacity, len(table.env), args.batch_length, agent.replay_specs(), 1)
    obs, _ = envs.reset(seed=1)
    first, done = np.ones(num_envs, bool), np.zeros(num_envs, bool)
    for _ in range(steps):
        joint, rows = table.act(obs, first)
        replay.add({k: rows[k] for k in replay.data})
        obs, _, ended, _, _ = envs.step(joint)
        first, done = done, ended
        for env in np.flatnonzero(done):
            table.finish(obs, env)
    return table, replay, agent


# ----------------------------------------------------------------------------------------------- shared with dreamer.py


def definitions(path):
    """name → source, for everything at the top of a file and for methods, in their order."""
    source, found = Path(path).read_text(), {}

    def text(node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        return source.splitlines()[first - 1 : node.end_lineno]

    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None))
        if name:
            found[name] = text(node)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef):
                found[f"{name}.{method.name}"] = text(method)
    return found


def test_shared_definitions_are_the_same_letter_for_letter_and_in_the_same_order():
    marl = Path(M.__file__)
    theirs, ours = definitions(marl.with_name("dreamer.py")), definitions(marl)
    for name in M.SHARED:
        assert ours[name] == theirs[name], f"{name} differs"
    for names in (list(theirs), list(ours)):
        places = [names.index(name) for name in M.SHARED]
        assert places == sorted(places)
    methods = {name for name in M.SHARED if "." in name}
    whole = {name for name in theirs if "." not in name and ours.get(name) == theirs[name]}
    assert whole == set(M.SHARED) - methods  # nothing that is the same is missing from the list
    assert "import dreamer" not in marl.read_text() and "from dreamer" not in marl.read_text()


# ---------------------------------------------------------------------------------------------------- teams: the method


def groups_of(stoch):
    return stoch[..., : 6 - TEAM, :], stoch[..., 6 - TEAM :, :]


@pytest.mark.parametrize("stop", [False, True])
def test_tom_gradient_reaches_z_team_h_and_the_head_but_neither_z_env_of_the_same_step_nor_the_actor(stop):
    agent = make_team(perturb=0.1, tom_stop_grad=stop)
    deter, stoch = torch.randn(2, 5, 64, requires_grad=True), torch.rand(2, 5, 6, 5, requires_grad=True)
    actions = F.one_hot(torch.randint(4, (2, 5, 2)), 4).float()
    agent.wm.tom_loss(deter, stoch, actions, torch.ones(2, 5, 2)).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in agent.wm.tom.parameters())
    for name, p in agent.named_parameters():
        assert p.grad is None or name.startswith("wm.tom."), name
    if stop:
        assert deter.grad is None and stoch.grad is None
    else:
        env, team = groups_of(stoch.grad)
        assert deter.grad.abs().min() > 0 and team.abs().min() > 0 and not env.any()


def test_tom_gradient_reaches_the_encoder_and_posterior_of_z_team_but_not_that_of_z_env_in_a_single_step():
    agent, batch = make_team(perturb=0.1), team_batch(make_team(), t=1)
    data = agent.prepare(batch)
    losses, *_ = agent.wm.loss(data, torch.rand(4, 1, 6, 1), 0.9, 1.0)
    losses["tom"].sum().backward()
    env, team = agent.wm.rssm.posterior.nets
    assert all(p.grad.abs().max() > 0 for p in team.parameters()) and all(p.grad is None or not p.grad.any()
                                                                       for p in env.parameters())
    assert all(p.grad.abs().max() > 0 for p in agent.wm.encoder.parameters())
    assert all(p.grad is None for p in agent.actor.parameters())


@pytest.mark.parametrize("arm", ["tom", "merged", "joint", "none"])
def test_kl_is_the_sum_over_both_groups_with_free_nats_for_each_or_over_one_merged_group(arm):
    torch.manual_seed(0)
    rssm = make_team(teammate_model=arm).wm.rssm
    scale = torch.tensor([0.05, 0.5, 1.0, 3.0])[:, None, None]
    post, prior = scale * torch.randn(4, 6, 5), scale * torch.randn(4, 6, 5)
    groups = list(zip(groups_of(post), groups_of(prior))) if arm == "tom" else [(post, prior)]
    expected = sum(kl_divergence(mixed(p), mixed(q)).clamp(min=1) for p, q in groups)
    assert expected[0] == len(groups)
    for x in rssm.kl_loss(post, prior):
        close(x, expected, rtol=1e-4)
    post.requires_grad_(), prior.requires_grad_()
    dyn, rep = rssm.kl_loss(3 * post, 3 * prior)
    for x, target in ((dyn, prior), (rep, post)):  # both groups are pushed
        env, team = groups_of(torch.autograd.grad(x[3], target, retain_graph=True)[0])
        assert env.abs().max() > 0 and team.abs().max() > 0


def test_the_two_groups_have_priors_and_posteriors_of_their_own():
    rssm = M.FactorisedRSSM(8, 12, TINY, TEAM)
    deter = torch.randn(2, 64)
    for heads, x in ((rssm.prior, deter), (rssm.posterior, torch.randn(2, 72))):
        env, team = groups_of(rssm.logits(heads, x))
        close(env.flatten(1), heads.nets[0](x))
        close(team.flatten(1), heads.nets[1](x))
        assert not set(heads.nets[0].parameters()) & set(heads.nets[1].parameters())


def test_the_tom_target_is_the_action_of_the_same_step_and_its_input_holds_no_action_of_that_step():
    agent, batch = make_team(perturb=0.2), team_batch(make_team())
    batch["is_last"][:], batch["is_terminal"][:], batch["is_first"][:] = False, False, False
    noise = torch.rand(4, 8, 6, 1)

    def run(batch):
        losses, (deter, stoch, _), _ = agent.wm.loss(agent.prepare(batch), noise, 0.9, 1.0)
        return losses["tom"], M.expected(agent.wm.teammates(deter, stoch))

    tom, probs = run(batch)
    close(tom, -(probs * batch["teammates"][:, 1:]).sum(-1).log().sum(-1), rtol=1e-4)
    changed = {k: x.clone() for k, x in batch.items()}
    changed["teammates"][:, 4] = changed["teammates"][:, 4].roll(1, -1)  # row 4 of the window is step 3 of the loss
    changed["action"][:, 4] = changed["action"][:, 4].roll(1, -1)
    tom2, probs2 = run(changed)
    equal(probs2[:, :4], probs[:, :4])  # no prediction up to that step sees it
    assert (probs2[:, 4] != probs[:, 4]).any() and (tom2[:, 3] != tom[:, 3]).all()
    equal(tom2[:, :3], tom[:, :3])
    close(tom2[:, 3], -(probs[:, 3] * changed["teammates"][:, 4]).sum(-1).log().sum(-1), rtol=1e-4)


def test_the_decoder_sees_h_and_z_env_only_and_reward_continue_actor_and_critic_see_all():
    agent = make_team(perturb=0.1)
    deter, stoch = torch.randn(3, 64), torch.rand(3, 6, 5, requires_grad=True)
    recon = agent.wm.decoder(deter, agent.wm.env_part(stoch))["obs"]
    env, team = groups_of(torch.autograd.grad(recon.sum(), stoch)[0])
    assert env.abs().min() > 0 and not team.any()
    feat = M.features(deter, stoch)
    outputs = agent.wm.reward(feat), agent.wm.cont(feat), agent.actor.mlp(feat), agent.critic(feat).logits
    for out in outputs:
        env, team = groups_of(torch.autograd.grad((out * torch.randn(out.shape)).sum(), stoch, retain_graph=True)[0])
        assert env.abs().max() > 0 and team.abs().max() > 0
    merged = make_team(perturb=0.1, teammate_model="merged")
    recon = merged.wm.decoder(deter, merged.wm.env_part(stoch))["obs"]
    assert groups_of(torch.autograd.grad(recon.sum(), stoch)[0])[1].abs().min() > 0


def test_swapping_two_teammates_changes_the_state_and_renaming_them_renames_the_predictions():
    agent = make_team(perturb=0.2, seats=4)
    own, mates = F.one_hot(torch.tensor([1]), 4).float(), F.one_hot(torch.tensor([[0, 2, 3]]), 4).float()
    joint = agent.wm.joint(own, mates)
    equal(joint, torch.cat([own, mates[:, 0], mates[:, 1], mates[:, 2]], -1))
    deter, stoch = torch.randn(1, 64), F.one_hot(torch.zeros(1, 6).long(), 5).float()
    joints = [agent.wm.joint(own, m) for m in (mates, mates[:, [1, 0, 2]])]
    states = [agent.wm.rssm.img_step(deter, stoch, joint, None)[0] for joint in joints]
    assert (states[0] - states[1]).abs().max() > 1e-3
    probs, order = M.expected(agent.wm.teammates(deter, stoch)), [2, 0, 1]
    team = torch.cat([deter, (stoch * agent.wm.team).flatten(1)], -1)
    ids = torch.eye(3)[order]
    renamed = torch.stack([M.expected(agent.wm.tom(torch.cat([team, i[None]], -1))) for i in ids], 1)
    close(renamed, probs[:, order])
    assert (probs[:, 0] - probs[:, 1]).abs().max() > 1e-3


def test_dreams_with_a_tom_head_forced_to_a_policy_are_that_policys_rollout():
    agent, n, h = make_team(perturb=0.1), 5, 4
    favourite = agent.wm.tom.outputs[0][0]
    with torch.no_grad():  # teammate 0 always plays 2, teammate 1 always 3, as the one-hot of their number says
        for layer in agent.wm.tom.mlp:
            layer[0].weight.zero_()
            layer[0].bias.zero_()
        first = agent.wm.tom.mlp[0][0]
        first.weight[0, -2], first.weight[1, -1] = 1.0, 1.0
        for layer in agent.wm.tom.mlp:
            layer[1].weight.fill_(1.0)
        for layer in list(agent.wm.tom.mlp)[1:]:
            layer[0].weight[:2, :2] = torch.eye(2)
        favourite.weight.zero_()
        favourite.bias.zero_()
        favourite.weight[2, 0] = favourite.weight[3, 1] = 100.0
    deter, stoch = torch.randn(n, 64).tanh(), F.one_hot(torch.randint(5, (n, 6)), 5).float()
    z_noise, a_noise = torch.rand(h, n, 6, 1), torch.rand(h + 1, n, 3)
    active = torch.ones(n, 2, dtype=torch.bool)
    active[0, 1] = False  # who is away stays away
    taken, imagine = [], agent.wm.rssm.imagine

    def recorded(deter, stoch, policy, horizon, noise):
        out = imagine(deter, stoch, policy, horizon, noise)
        taken.extend(out)
        return out

    agent.wm.rssm.imagine = recorded
    agent.imagination_loss(deter, stoch, active, z_noise, a_noise)
    deters, stochs, actions = taken
    mates = F.one_hot(torch.tensor([2, 3]), 4).float().expand(n, -1, -1) * active[..., None]
    equal(actions[..., 4:].unflatten(-1, (2, 4)), mates.expand(h, -1, -1, -1))
    for t in range(h):  # a naive rollout with that policy
        probs = agent.actor(M.features(deter, stoch)).dists[0].probs
        own = F.one_hot((probs.cumsum(-1) <= a_noise[t, :, :1]).sum(-1), 4).float()
        with torch.no_grad():
            deter, stoch = agent.wm.rssm.img_step(deter, stoch, torch.cat([own, mates.flatten(1)], -1), z_noise[t])
        close(deters[t + 1], deter, atol=1e-5)
        equal(stochs[t + 1], stoch)
        equal(actions[t, :, :4], own)


def test_policy_gradient_counts_the_own_action_alone():
    agent = make_team(perturb=0.3, ent_coef=0.5)
    n, h = 4, 4
    deter, stoch = torch.randn(n, 64).tanh(), F.one_hot(torch.randint(5, (n, 6)), 5).float()
    z_noise, a_noise = torch.rand(h, n, 6, 1), torch.rand(h + 1, n, 3)
    losses, returns, _ = agent.imagination_loss(deter, stoch, torch.ones(n, 2).bool(), z_noise, a_noise)
    with torch.no_grad():  # the first step of each dream, by torch.distributions
        feat = M.features(deter, stoch)
        pi = Categorical(logits=agent.actor.outputs[0][0](agent.actor.mlp(feat)))
        own = (pi.probs.cumsum(-1) <= a_noise[0, :, :1]).sum(-1)
        low, high = agent.retnorm.range
        advantage = (returns[:, 0] - agent.critic(feat).pred()) / max(1.0, float(high - low))
        weight = agent.wm.cont(feat)[:, 0].sigmoid()
        expected = -weight * (pi.log_prob(own) * advantage + 0.5 * pi.entropy())
        close(losses["policy"][:, 0], expected, rtol=1e-3, atol=1e-3)


def test_agents_that_are_away_contribute_nothing_to_any_loss():
    agent, batch = make_team(perturb=0.2), team_batch(make_team())
    batch["is_last"][1, 3] = batch["is_first"][1, 7] = True
    batch["valid"][1, 4:7] = False  # ego died at 3 and comes back at 7
    batch["active"][2, 2:, 1] = False  # a teammate leaves; whatever stands in its place is no target
    losses, grads = team_losses(agent, batch)
    changed = {k: x.clone() for k, x in batch.items()}
    for key in ("obs/obs", "reward"):
        changed[key][1, 4:7] = 77.0
    for key in ("action", "teammates"):
        changed[key][1, 4:7] = changed[key][1, 4:7].roll(1, -1)
    changed["is_terminal"][1, 5] = True
    changed["bayes"][:] = 0.3  # for comparison only
    losses2, grads2 = team_losses(agent, changed)
    for k in losses:
        equal(losses[k], losses2[k])
    assert grads.keys() == grads2.keys() and all(torch.equal(grads[k], grads2[k]) for k in grads)
    # means are over those who are there: the ToM loss is that of a naive loop
    data, noise = agent.prepare(batch), team_noise(agent, batch)
    _, (deter, stoch, _), _ = agent.wm.loss(data, noise[0], agent.args.gamma, 1.0)
    probs, total = M.expected(agent.wm.teammates(deter, stoch)), 0.0
    for b, t, j in itertools.product(range(4), range(8), range(2)):
        row = t + 1
        if batch["valid"][b, row] and batch["active"][b, row, j] and not batch["is_last"][b, row]:
            total -= float((probs[b, t, j] * batch["teammates"][b, row, j]).sum().log().detach())
    close(losses["losses/tom"], total / batch["valid"][:, 1:].sum(), rtol=1e-4)


def test_a_batch_in_which_nobody_is_there_teaches_nothing():
    agent, batch = make_team(perturb=0.2), team_batch(make_team())
    batch["valid"][:] = False
    losses, grads = team_losses(agent, batch)
    assert not any(x.any() for x in losses.values()) and not any(x.any() for x in grads.values())


@pytest.mark.parametrize("last", [0, 3])
def test_dreams_begin_where_ego_is_in_the_game_and_their_returns_come_back_to_those_steps(last, monkeypatch):
    agent, batch = make_team(perturb=0.2, imag_last=last), team_batch(make_team())
    batch["valid"][1, 4:7] = batch["valid"][3, 2:] = False
    seen, dream, value = {}, agent.imagination_loss, agent.replay_value_loss
    monkeypatch.setattr(agent, "imagination_loss", lambda *x: seen.setdefault("dreams", (x, dream(*x)))[1])
    monkeypatch.setattr(agent, "replay_value_loss", lambda *x: seen.setdefault("value", (x, value(*x)))[1])
    steps = last or 8
    data, noise = agent.prepare(batch), team_noise(agent, batch)
    noise[1:] = [x[:, : 4 * steps] for x in noise[1:]]
    _, report, (deter, _) = agent(data, noise)
    (starts, _, active, _, _), (losses, returns, _) = seen["dreams"]
    valid, places = data["valid"][:, -steps:], {}
    for i, h in enumerate(starts):  # which step each dream begins at; latents are continuous, so each has its own
        at, = (deter[:, -steps:] == h).all(-1).nonzero().tolist()
        assert valid[tuple(at)]
        places.setdefault(tuple(at), i)
    assert set(places) == {tuple(x) for x in valid.nonzero().tolist()}
    bootstrap = seen["value"][0][2]
    for at, i in places.items():
        equal(bootstrap[at], returns[i, 0])
    for name in ("policy", "value"):  # each step counts once
        close(report[f"losses/{name}"], torch.stack([losses[name][i] for i in places.values()]).mean())


@pytest.mark.parametrize("arm", ["tom", "none"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_part_of_learning_waits_for_the_device_or_has_a_shape_that_depends_on_data(arm, precision):
    agent, batch = make_team(teammate_model=arm, precision=precision), team_batch(make_team())
    batch["valid"][1, 4:7] = False
    inputs = agent.prepare(batch), team_noise(agent, batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # raises where a number of a tensor is asked for
        loss, report, _ = agent.loss(*tree_map(fake.from_tensor, inputs))
        assert loss.shape == () and all(x.shape == () for x in report.values())
        with pytest.raises(DataDependentOutputException):  # and it would
            bool(loss > 0)


# ------------------------------------------------------------------------------------------------------ teams: the arms


def test_all_arms_have_the_same_parameters_and_begin_with_the_same_weights():
    agents = {arm: make_team(teammate_model=arm) for arm in ("tom", "merged", "joint", "none")}
    tom = {k: p.clone() for k, p in agents["tom"].named_parameters()}
    for agent in agents.values():
        assert all(torch.equal(p, tom[k]) for k, p in agent.named_parameters())
        before = {k: p.clone() for k, p in agent.named_parameters()}
        agent.update(team_batch(agent))
        moved = {k for k, p in agent.named_parameters() if not torch.equal(p, before[k])}
        assert {k for k in before if k.startswith("wm.tom.outputs")} <= moved  # the head learns in each


def test_plain_dreamer_sees_own_actions_alone_and_its_probe_teaches_it_nothing():
    agent, batch = make_team(perturb=0.2, teammate_model="none"), team_batch(make_team())
    losses, grads = team_losses(agent, batch)
    changed = batch | {"teammates": batch["teammates"].roll(1, -1)}
    losses2, grads2 = team_losses(agent, changed)
    for k in losses:
        assert torch.equal(losses[k], losses2[k]) == (k not in ("losses/tom", "losses/total")), k
    for k in grads:
        assert torch.equal(grads[k], grads2[k]) == (not k.startswith("wm.tom.")), k


def test_the_joint_arm_imagines_teammates_by_their_marginal_whatever_the_state():
    agent = make_team(perturb=0.2, teammate_model="joint")
    probs = M.expected(agent.wm.teammates(torch.randn(7, 64), torch.rand(7, 6, 5)))
    close(probs, probs[:1].expand(7, -1, -1))
    assert (probs[0, 0] - probs[0, 1]).abs().max() > 1e-3  # one for each teammate
    batch = team_batch(agent)
    assert team_losses(agent, batch)[0]["losses/rew"] != team_losses(agent, batch | {
        "teammates": batch["teammates"].roll(1, -1)})[0]["losses/rew"]  # its dynamics take joint actions


def test_measures_of_a_batch_are_of_the_same_actions_as_the_loss():
    agent = make_team(perturb=0.3)
    batch = team_batch(agent)
    acts, metrics = agent.prepare(batch)["acts"], agent.update(dict(batch))
    close(metrics["tom/cross_entropy"] * acts.sum() / acts[..., 0].numel(), metrics["losses/tom"], rtol=1e-4)


def test_measures_of_the_head_are_those_of_a_naive_loop():
    torch.manual_seed(0)
    heads, shape = {"a": ("discrete", (3,)), "b": ("discrete", (2,))}, (5, 6, 2)
    a, b = torch.randint(3, shape) * torch.randint(2, shape), torch.randint(2, shape)
    actions = torch.cat([F.one_hot(a, 3), F.one_hot(b, 2)], -1).float()
    guess = torch.rand(*shape, 5)
    acts, nats, bayes = torch.rand(shape) < 0.7, torch.rand(shape) + 0.5, torch.rand(shape) / 2
    got = M.skill(heads, actions, acts, nats, bayes, guess)
    marginal = right = 0.0
    for j in range(2):
        for values, part, n in ((a, guess[..., :3], 3), (b, guess[..., 3:], 2)):
            x = values[..., j][acts[..., j]]
            p = np.bincount(x.numpy(), minlength=n) / len(x)
            marginal -= sum(np.log(p[int(v)]) for v in x) / acts.sum()
            right += (part.argmax(-1)[..., j][acts[..., j]] == x).float().sum() / 2 / acts.sum()
    ce, ideal = nats[acts].mean(), bayes[acts].mean()
    for name, value in dict(cross_entropy=ce, marginal=marginal, bayes=ideal, accuracy=right,
                            skill=(marginal - ce) / (marginal - ideal)).items():
        close(got[name], value, rtol=1e-4)
    unknown = M.skill(heads, actions, acts, nats, torch.full(shape, float("nan")), guess)
    assert unknown["bayes"] == 0
    close(unknown["skill"], (marginal - ce) / marginal, rtol=1e-4)
    x = torch.randn(4000, 1, 1, 2) * torch.tensor([1.0, 3.0])
    normal = M.skill({"a": ("continuous", 2)}, x, torch.ones(4000, 1, 1).bool(), *[torch.zeros(4000, 1, 1)] * 2, x)
    entropy = torch.distributions.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])).entropy().sum()
    close(normal["marginal"], entropy, rtol=2e-2)
    assert "skill" not in normal


# ---------------------------------------------------------------------------------- teams: seats, deaths and their rows


@pytest.mark.parametrize("lives,truncate", [((6, 3, 6), False), ((6, 6), True), ((2, 6, 3, 6), True), ((1, 2), False)])
def test_rows_hold_what_each_seat_saw_and_earned_and_all_did_until_it_left(lives, truncate):
    k, length = len(lives), max(lives)
    table, replay, agent = play_team(lambda: Toy(lives, length, truncate), 30)
    data = replay.data
    for stream, (env, seat) in enumerate(zip(table.env, table.seat)):
        mates = [j for j in range(k) if j != seat]
        for i in range(30):
            t = i % (length + 1)  # the step after the last is the reset
            row = {name: x[stream, i] for name, x in data.items()}
            here, last = t <= lives[seat], t == lives[seat]
            assert bool(row["valid"]) == here and bool(row["is_first"]) == (t == 0) and int(row["obs/seat"]) == seat
            assert bool(row["is_last"]) == last
            assert bool(row["is_terminal"]) == (last and not (truncate and lives[seat] == length))
            assert float(row["reward"]) == (10 * t + seat if here and t else 0)
            for slot, j in enumerate(mates):
                stays = t < lives[j] or (t == length == lives[j] and truncate)
                assert bool(row["active"][slot]) == stays
                theirs = data["action"][env * k + j, i]
                equal(row["teammates"][slot], theirs if stays else torch.zeros(4))
            if here and t:  # the last joint action is what the environment says it was
                before = data["action"][[env * k + j for j in range(k)], i - 1].argmax(-1).tolist()
                said = row["obs/obs"][2:].long().tolist()
                assert row["obs/obs"][:2].tolist() == [seat, t]
                assert said == [a if t <= lives[j] else -1 for j, a in enumerate(before)]
    batch = agent.prepare(replay.sample(8))
    assert not batch["acts"][batch["is_last"]].any()  # nobody acts after the end
    joint = torch.cat([batch["action"], batch["teammates"].flatten(-2)], -1)
    equal(batch["prev_action"][:, 1:], joint[:, :-1])
    assert agent.update(replay.sample(8))["losses/total"].isfinite()


class Uneven(Toy):
    """Two agents of different sizes."""

    def observation_space(self, agent):
        return Box(-1, 1, (2 + 3 * (agent == "agent_1"),), np.float32)

    def action_space(self, agent):
        return Discrete(3 + 2 * (agent == "agent_1"))

    def see(self, agents, actions):
        self.taken = actions
        return {a: np.full(self.observation_space(a).shape, 0.5, np.float32) for a in agents}


def test_spaces_of_different_sizes_are_padded_and_of_different_kinds_are_an_input_error():
    seats = M.Seats(Uneven((6, 6)))
    assert seats.seat_space["obs"].shape == (5,) and seats.seat_action == Discrete(5)
    obs, _ = seats.reset(seed=0)
    equal(obs["obs/obs"], np.array([[0.5, 0.5, 0, 0, 0], [0.5] * 5], np.float32))
    seats.step(np.eye(5, dtype=np.float32)[[4, 4]])
    assert seats.env.taken == {"agent_0": 1, "agent_1": 4}  # a choice that is not there stands for another
    table, replay, agent = play_team(lambda: Uneven((6, 6)), 20)
    assert agent.update(replay.sample(4))["losses/total"].isfinite()
    boxes = [Box(np.float32(-i - 1), np.float32(i + 2), (i + 1,), np.float32) for i in range(2)]
    merged = M.merge("action", boxes)
    assert merged.shape == (2,) and merged.low.min() == -2 and merged.high.max() == 3
    image = Box(0, 255, (4, 4, 3), np.uint8)
    for kinds in ([Discrete(2), VECTOR], [VECTOR, image], [Discrete(2), MultiDiscrete([2, 2])]):
        with pytest.raises(M.InputError, match="different kinds"):
            M.merge("obs", kinds)


@pytest.mark.parametrize("space", [Discrete(4, start=2), MultiDiscrete([2, 5]), Box(-3, 5, (2, 2)),
                                   Dict(a=Discrete(3), b=Box(-1, 1, (2,)))])
def test_an_encoded_action_is_decoded_to_itself(space):
    codec = M.ActionCodec(space)
    space.seed(0)
    for _ in range(5):
        action = space.sample()
        back = M.unbatch(codec.decode(M.encode_action(codec, action)[None]))
        for ours, theirs in zip(M.leaves(back).values(), M.leaves(action).values()):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_learner_sits_in_random_seats_and_scripts_are_drawn_anew_for_every_episode():
    seats, learners, scripts = M.Seats(M.HiddenMatch(), ("0", "1", "2", "3")), set(), set()
    for i in range(40):
        obs, _ = seats.reset(seed=i)
        learner = int(obs["learner"])
        assert obs["script"][learner] == -1 and not obs["play"][learner].any() and np.isnan(obs["bayes"][learner]).all()
        assert obs["play"][1 - learner].sum() == 1
        learners.add(learner)
        scripts.add(int(obs["script"][1 - learner]))
    assert learners == {0, 1} and scripts == {0, 1, 2, 3}


def test_partners_of_one_name_keep_their_number_so_that_the_oracle_reads_it_right():
    args = team_args(oracle=True)
    space, _, seats, _ = M.seat_spaces(args)
    assert seats == 2 and list(space["scripts"].nvec) == [6]  # five scripts, or none
    for number, name in enumerate(M.HiddenMatch.scripts):
        obs, _ = M.make_vector_env(args, 3, "", scripts=(name,)).reset(seed=0)
        view = M.seat_view(obs, np.arange(3), obs["learner"], oracle=True)
        assert (view["scripts"] == number + 1).all() and space.contains({k: x[0] for k, x in view.items()})


def test_workers_in_other_processes_play_the_same_games_as_this_process():
    streams = []
    for mode in ("sync", "async"):
        envs = M.make_vector_env(team_args(vectorization=mode), 2, "")
        obs, _ = envs.reset(seed=3)
        stream, joint = [obs], np.eye(4, dtype=np.float32)[[[0, 1], [2, 3]]]
        for _ in range(25):
            stream.append({k: x.copy() for k, x in envs.step(joint)[0].items()})
        envs.close()
        streams.append(np.concatenate([np.ravel(x[k]).astype(float) for x in stream for k in sorted(x)]))
    np.testing.assert_array_equal(*streams)


# ------------------------------------------------------------------------------------------------ games with an optimum


def hidden_match_values(epsilon):
    """Exact return and nats a step of who sees the partner's actions, by enumeration of what it may play."""
    ret = nats = 0.0
    likelihood = epsilon / 4 + (1 - epsilon) * np.eye(4)  # favourite → action
    frontier = {(0, 0, 0, 0): 1.0}  # counts of actions so far → probability
    for _ in range(10):
        after = {}
        for counts, p in frontier.items():
            belief = np.prod(likelihood ** np.array(counts), 1)
            predicted = belief / belief.sum() @ likelihood
            ret += p * predicted.max()
            nats -= p * (predicted * np.log(predicted.clip(1e-300))).sum() / 10
            for a in range(4):
                if predicted[a] > 0:
                    key = tuple(c + (i == a) for i, c in enumerate(counts))
                    after[key] = after.get(key, 0.0) + p * predicted[a]
        frontier = after
    return ret, nats


def rollout(env, choose, episodes, scripts):
    """Mean return of player_0 and nats a step of env.bayes, against scripts drawn at random."""
    rng, total, nats = np.random.default_rng(0), 0.0, []
    env.reset(seed=0)
    for _ in range(episodes):
        script = scripts[rng.integers(len(scripts))]
        obs, _ = env.reset()
        while env.agents:
            belief, theirs = env.bayes("player_1", scripts), env.play("player_1", script)
            nats.append(-np.log(belief[theirs]))
            obs, reward, *_ = env.step({"player_0": choose(env, belief, script), "player_1": theirs})
            total += reward["player_0"]
    return total / episodes, np.mean(nats)


@pytest.mark.parametrize("epsilon,bayes,oracle,ce", [(0.0, 9.25, 10.0, 0.139), (0.3, 6.73, 7.75, 0.918)])
def test_hidden_match_has_its_known_values(epsilon, bayes, oracle, ce):
    ret, nats = hidden_match_values(epsilon)
    assert abs(ret - bayes) < 0.006 and abs(nats - ce) < 0.001
    scripts = ("0", "1", "2", "3")
    seen, ce_seen = rollout(M.HiddenMatch(epsilon), lambda env, belief, script: belief.argmax(), 1500, scripts)
    assert abs(seen - ret) < 0.2 and abs(ce_seen - nats) < 0.03
    for choose, value, error in ((lambda env, belief, script: int(script), oracle, 0.15), (lambda *_: 1, 2.5, 0.4)):
        assert abs(rollout(M.HiddenMatch(epsilon), choose, 1500, scripts)[0] - value) < error


@pytest.mark.parametrize("q", [0.0, 0.4, 1.0])
def test_hidden_match_shows_the_partners_last_action_with_probability_q(q):
    env, shown, rng = M.HiddenMatch(0.3, q), [], np.random.default_rng(0)
    env.reset(seed=1)
    for _ in range(100):
        obs, _ = env.reset()
        assert set(obs.values()) == {4}
        while env.agents:
            actions = dict(zip(env.possible_agents, rng.integers(4, size=2)))
            obs, *_ = env.step(actions)
            for mine, other in (("player_0", "player_1"), ("player_1", "player_0")):
                assert obs[mine] in (4, actions[other])
                shown.append(obs[mine] != 4)
    assert abs(np.mean(shown) - q) < 0.05


def test_the_prisoners_dilemma_has_its_known_values():
    scripts, pay = M.PrisonersDilemma.scripts, [[3, 0], [5, 1]]

    def theirs(script, mine, t):
        return {"cooperate": 0, "defect": 1, "tit_for_tat": mine[-1] if mine else 0, "alternate": t % 2}[script]

    def value(types, mine):
        """Best expected return of who knows only that its opponent is one of `types`: all their moves are certain."""
        t = len(mine)
        if t == 10:
            return 0.0
        groups = {a: [s for s in types if theirs(s, mine, t) == a] for a in (0, 1)}
        return max(sum(len(g) / len(types) * (pay[m][a] + value(g, (*mine, m))) for a, g in groups.items() if g)
                   for m in (0, 1))

    assert np.mean([value([s], ()) for s in scripts]) == 30.5
    assert value(list(scripts), ()) == 29.25
    defect, _ = rollout(M.PrisonersDilemma(), lambda *_: 1, 400, scripts)
    assert abs(defect - 26.0) < 2.5
    env = M.PrisonersDilemma()
    for script in scripts:  # moves and payoffs, against a fixed sequence
        mine = np.random.default_rng(3).integers(2, size=10).tolist()
        env.reset(seed=0)
        for t, m in enumerate(mine):
            other = env.play("player_1", script)
            assert other == theirs(script, mine[:t], t)
            belief = env.bayes("player_1", scripts)
            assert belief[other] > 0
            _, reward, *_ = env.step({"player_0": m, "player_1": other})
            assert reward == {"player_0": pay[m][other], "player_1": pay[other][m]}


# ---------------------------------------------------------------------------------------------- teams: acting, the pool


def test_unseen_teammates_are_replaced_by_the_tom_heads_own_guess():
    agent = make_team(perturb=0.2, observe_teammates=False)
    x, none = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32), np.zeros(5, bool)
    rng = torch.Generator
    state = agent.act(x[0], None, ~none, rng=rng().manual_seed(1))[1]
    assert state["guess"].shape == (5, 2, 4) and (state["guess"].sum(-1) == 1).all()
    guessed = agent.act(x[1], state, none, rng=rng().manual_seed(2))[1]
    told = agent.act(x[1], state, none, teammates=state["guess"], rng=rng().manual_seed(2))[1]
    other = agent.act(x[1], state, none, teammates=state["guess"].roll(1, -1), rng=rng().manual_seed(2))[1]
    equal(guessed["deter"], told["deter"])
    assert (guessed["deter"] != other["deter"]).any()
    table, *_ = play_team(lambda: Toy((6, 6)), 4, observe_teammates=False)
    assert table.seen(table.env, table.seat) is None
    table, *_ = play_team(lambda: Toy((6, 6)), 4)
    equal(table.seen(table.env, table.seat)[:, 0], table.joint[table.env, 1 - table.seat])


def test_act_equals_observe_on_the_joint_actions_of_the_rows():
    table, replay, agent = play_team(lambda: Toy((6, 4, 6)), 14)
    data = {k: x[:, :14] for k, x in replay.data.items()}
    obs = {k[4:]: x for k, x in data.items() if k.startswith("obs/")}
    stoch = F.one_hot(data["stoch"].long(), 5).float()
    joint = agent.wm.joint(data["action"], data["teammates"])
    tokens = agent.wm.encode(obs)
    with torch.no_grad():
        for t in range(1, 14):  # one step from each stored state reaches the next
            args = data["deter"][:, t - 1].float(), stoch[:, t - 1], tokens[:, t : t + 1], joint[:, t - 1 : t]
            deter, *_ = agent.wm.rssm.observe(*args, data["is_first"][:, t : t + 1])
            close(deter[:, 0], data["deter"][:, t].float(), rtol=2e-2, atol=2e-2)  # bfloat16


def test_teammates_who_are_away_are_not_guessed_at():
    table, replay, agent = play_team(lambda: Toy((6, 2)), 4, observe_teammates=False)
    there = torch.as_tensor(table.mates(table.active))
    assert there.any() and not there.all()
    equal(table.state["guess"].sum(-1) == 1, there)


def test_a_compiled_step_of_the_learner_does_not_come_with_its_copies():
    agent = make_team(seats=2, perturb=0.2)
    for owner, name in agent.compiled():  # as torch.compile puts it: bound to the learner's weights
        setattr(owner, name, lambda *inputs, step=getattr(owner, name): step(*inputs))
    pool = pool_of(members=1, agent=agent)
    x, first = np.ones((2, 3), np.float32), np.ones(2, bool)
    before = pool.members[0].act(x, None, first, rng=torch.Generator().manual_seed(0))[1]["deter"]
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.3)
    equal(pool.members[0].act(x, None, first, rng=torch.Generator().manual_seed(0))[1]["deter"], before)


def test_a_loop_of_ten_lines_trains_both_seats_of_a_game_without_the_training_loop_of_the_file():
    env, agent = Toy((6, 6)), make_team(Box(-np.inf, np.inf, (4,), np.float32), seats=2)
    replay = M.ReplayBuffer(400, 2, 8, agent.replay_specs())
    obs, state, mates, first, no = env.reset()[0], None, np.zeros((2, 1, 4)), np.ones(2, bool), np.zeros(2, bool)
    arrived, here = dict(reward=np.zeros(2), is_last=no, is_terminal=no), dict(active=~no[:, None], valid=~no)
    for _ in range(30):
        actions, state = agent.act(np.stack([obs[a] for a in env.possible_agents]), state, first, teammates=mates)
        mates = np.stack([M.encode_action(agent.actions, a) for a in actions[::-1]])[:, None]
        unknown = dict(bayes=np.full((2, 1), np.nan), teammates=mates, is_first=first)
        replay.add({k: (arrived | here | unknown | state)[k] for k in replay.data})
        if (first := arrived["is_last"]).all():
            (obs, _), arrived = env.reset(), dict(reward=np.zeros(2), is_last=no, is_terminal=no)
            continue
        obs, reward, ended, _, _ = env.step(dict(zip(env.possible_agents, actions)))
        arrived = dict(reward=np.array(list(reward.values())), is_last=np.array(list(ended.values())),
                       is_terminal=np.array(list(ended.values())))
    data = agent.prepare(replay.sample(8))
    said = data["obs"]["obs"][..., 2:].long()  # the joint action before, as the game tells it
    own, theirs = (x.argmax(-1) for x in data["prev_action"].chunk(2, -1))
    going = (data["obs"]["obs"][..., 1] > 0)
    assert going.any() and (said.sort(-1).values == torch.stack([own, theirs], -1).sort(-1).values)[going].all()
    assert agent.update(replay.sample(8))["losses/total"].isfinite()


def pool_of(size=20, weighting="uniform", members=0, agent=None):
    pool, agent = M.Pool(size, weighting, 0), agent or make_team(seats=2)
    for _ in range(members):
        pool.add(agent)
    return pool


def test_the_pools_score_is_smoothed_and_decays():
    pool = pool_of(members=2, weighting="hard")
    for won in (1.0, 1.0, 0.0):
        pool.report(0, won)
    wins, games = 0.95 * (0.95 * 1 + 1) + 0, 0.95 * (0.95 + 1) + 1
    x = np.array([(1 + wins) / (2 + games), 0.5])
    expected = (1 - x) ** 2 + 1e-3
    np.testing.assert_allclose(pool.weights(), expected / expected.sum())
    pool.weighting = "even"
    expected = x * (1 - x) + 1e-3
    np.testing.assert_allclose(pool.weights(), expected / expected.sum())
    pool.report(77, 1.0)  # who is not there, or no longer
    pool.report(None, 1.0)
    assert set(pool.wins) == {0, 1}


@pytest.mark.parametrize("weighting", ["uniform", "hard", "even"])
@pytest.mark.parametrize("won", [0.0, 1.0])
def test_extreme_scores_give_neither_nan_nor_a_member_that_is_never_met(weighting, won):
    pool = pool_of(members=3, weighting=weighting)
    for number in range(3):
        pool.wins[number], pool.games[number] = won * 1e12, 1e12
    weights = pool.weights()
    assert np.isfinite(weights).all() and (weights > 0.3).all() and abs(weights.sum() - 1) < 1e-9
    drawn = [pool.draw() for _ in range(2000)]
    assert abs(drawn.count(None) / 2000 - 0.5) < 0.05
    assert all(abs(drawn.count(i) / 1000 - 1 / 3) < 0.07 for i in range(3))


def test_a_full_pool_keeps_the_oldest_and_the_newest_and_spreads_the_rest():
    pool, agent = pool_of(size=5), make_team(seats=2)
    for number in range(40):
        assert pool.add(agent) == number
        assert len(pool.members) <= 5 and 0 in pool.members and number in pool.members
        assert pool.members.keys() == pool.wins.keys() == pool.games.keys()
    gaps = np.diff(list(pool.members))
    assert gaps.max() <= 24 and sorted(pool.members) == list(pool.members)


def test_members_of_the_pool_share_no_tensors_with_the_learner_and_do_not_change_with_it():
    agent = make_team(seats=2)
    pool = M.Pool(3, "uniform", 0)
    member = pool.members[pool.add(agent)]
    ours = {p.data_ptr() for p in agent.parameters()} | {x.data_ptr() for x in agent.buffers()}
    assert not ours & ({p.data_ptr() for p in member.parameters()} | {x.data_ptr() for x in member.buffers()})
    assert member.optimizer is None and agent.optimizer is not None  # and the learner has lost nothing
    before = {k: p.clone() for k, p in member.named_parameters()}
    agent.update(team_batch(agent))
    assert all(torch.equal(p, before[k]) for k, p in member.named_parameters())
    x, first, rng = np.ones((2, 3), np.float32), np.ones(2, bool), torch.Generator().manual_seed(0)
    assert member.act(x, None, first, rng=rng)[1]["action"].shape == (2, 4)
    other = M.Pool(3, "uniform", 0)
    other.load_state_dict(pool.state_dict(), agent)
    for k, p in other.members[0].named_parameters():
        equal(p, before[k])
    assert other.draw() == pool.draw() and other.next == pool.next


class Numbered(Toy):
    """Also tells which environment it is."""
    numbers = itertools.count()

    def __init__(self):
        super().__init__((4, 4), 4)
        self.number = next(self.numbers)

    def see(self, agents, actions):
        return {a: np.array([self.possible_agents.index(a), self.t, self.number, 0], np.float32) for a in agents}


def test_partners_of_the_pool_keep_a_state_for_each_environment_that_begins_anew_with_each_episode(monkeypatch):
    def two_members(agent):
        pool = M.Pool(5, "uniform", 0)
        for _ in range(2):
            with torch.no_grad():
                for p in agent.parameters():
                    p.add_(0.3 * torch.randn(p.shape))
            pool.add(agent)
        return pool

    last, original, kept, begun = {}, M.Dreamer.act, [], []

    def checked(self, obs, state, is_first, deterministic=False, teammates=None, rng=None):
        out = original(self, obs, state, is_first, deterministic, teammates, rng)
        for i, (seat, t, number, _) in enumerate(obs["obs"].tolist() if rng is not None else ()):
            key = id(self), seat, number
            assert is_first[i] == (t == 0)
            begun.append(t == 0)
            if t > 0:  # what it knew after the step before, of this environment
                kept.append(last[key][0] == t - 1)
                for name, x in last[key][1].items():
                    equal(state[name][i], x)
            last[key] = t, {name: out[1][name][i].clone() for name in ("deter", "onehot", "action")}
        return out

    monkeypatch.setattr(M.Dreamer, "act", checked)
    table, *_ = play_team(Numbered, 40, pool=two_members, partners="pool", num_envs=3)
    assert all(kept) and len(kept) > 60 and sum(begun) > 15
    assert len({key[0] for key in last}) == 3  # both members, and the live policy
    assert len({key[2] for key in last}) == 3 and len(table.memory) <= 3


def test_partners_do_not_touch_the_learners_state_or_generator():
    def learner_rows(with_pool):
        agent = make_team(Dict(obs=Box(-np.inf, np.inf, (4,), np.float32), seat=Discrete(2)), seats=2, perturb=0.2,
                           partners="pool" if with_pool else "scripted")
        pool = M.Pool(3, "uniform", 0)
        pool.add(agent)
        table = M.Table(agent, 3, pool if with_pool else None)
        rng, first = np.random.default_rng(0), np.ones(3, bool)
        obs = {"obs/obs": rng.normal(size=(3, 2, 4)).astype(np.float32), "learner": np.array([0, 1, 0]),
               "play": np.zeros((3, 2, 4), np.float32), "reward": np.zeros((3, 2)), "script": np.zeros((3, 2), int),
               "bayes": np.full((3, 2, 4), np.nan), **{k: np.ones((3, 2), bool) for k in ("here", "active")},
               **{k: np.zeros((3, 2), bool) for k in ("last", "terminal")}}
        _, rows = table.act(obs, first)
        return rows, agent.act_rng.get_state(), agent.learn_rng.get_state()

    (ours, *ours_rng), (alone, *alone_rng) = learner_rows(True), learner_rows(False)
    for k in ("deter", "onehot", "action", "guess"):
        equal(ours[k], alone[k])
    for x, y in zip(ours_rng, alone_rng):
        equal(x, y)


# ---------------------------------------------------------------------------------------------------- teams: whole runs


def team_args(**values):
    return M.Args(**team_values(env_id="hidden_match", partners="scripted", total_timesteps=160) | values)


def test_saved_agent_and_replay_give_the_identical_next_update(tmp_path):
    table, replay, agent = play_team(lambda: Toy((6, 3)), 40)
    agent.update(replay.sample(4))
    M.save_run(tmp_path, agent, replay, {"global_step": 80})
    torch.manual_seed(9)
    loaded = M.Dreamer(Dict(obs=Box(-np.inf, np.inf, (4,), np.float32), seat=Discrete(2)), Discrete(4), agent.args, 2)
    assert M.restore(loaded, tmp_path) == {"global_step": 80}
    ring = M.ReplayBuffer(4000, 4, 8, loaded.replay_specs(), 3)
    ring.load_state_dict(M.load_file(tmp_path, "replay.pt"))
    replay.data["is_last"][:, replay.count - 1] = True  # a loaded replay marks where it broke off
    for _ in range(2):
        ours, theirs = agent.update(replay.sample(4)), loaded.update(ring.sample(4))
        assert all(torch.equal(ours[k], theirs[k]) or ours[k].isnan() for k in ours)
    assert all(torch.equal(p, q) for p, q in zip(agent.parameters(), loaded.parameters()))


@pytest.mark.parametrize("partners", ["self", "pool", "scripted"])
def test_a_run_trains_logs_saves_resumes_and_is_evaluated_with_partners(folder, partners):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    held = dict(held_out=("mixed",)) if partners == "scripted" else {}
    summary = M.main(team_args(partners=partners, pool_every=40, pool_size=3, video_every=100, **held))
    run, = (folder / "runs").iterdir()
    assert summary["global_step"] == 160 and summary["updates"] > 5 and len(summary["eval_returns"]) == 4
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    tags = events.EventAccumulator(str(run), size_guidance={"images": 9}).Reload().Tags()
    for tag in ("losses/tom", "tom/accuracy", "tom/cross_entropy", "tom/skill", "tom/marginal", "losses/policy",
                "charts/episodic_return", "eval/episodic_return", "eval/tom_skill"):
        assert tag in tags["scalars"], tag
    assert "dreams/teammates" in tags["images"]
    names = {"self": set(), "scripted": {"0", "1", "2", "3", "mixed"},
             "pool": {"live", "pool_0", "pool_3", "pool_4"}}[partners]
    assert set(summary["eval_partners"]) == names
    evaluation = M.main(M.parse_args(["--evaluate", str(run), "--eval-episodes", "3"]))
    assert len(evaluation["eval_returns"]) == 3 and set(evaluation["eval_partners"]) == names
    longer = M.main(M.parse_args(["--resume", str(run), "--total-timesteps", "200"]))
    assert longer["global_step"] == 200 and longer["updates"] > summary["updates"]
    saved = M.load_file(run)["pool"]
    assert (saved is not None) == (partners == "pool") and (not saved or saved["next"] == 6)


def test_returns_are_those_of_the_learner_and_of_the_team_and_lengths_those_of_the_episode(folder, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(M, "make_parallel", lambda args, render=False: Toy((6, 3, 6)))
    each = np.array([sum(10 * t + seat for t in range(1, lives + 1)) for seat, lives in enumerate((6, 3, 6))])
    summary = M.main(team_args(partners="self", total_timesteps=80))
    run, = (folder / "runs").iterdir()
    assert summary["eval_returns"] == [each.mean()] * 4 and summary["eval_team_return_mean"] == each.sum()
    assert summary["train_returns"] and set(summary["train_returns"]) == {each.mean()}
    log = events.EventAccumulator(str(run)).Reload()
    for tag, value in {"charts/team_return": each.sum(), "charts/episodic_length": 6}.items():
        assert {x.value for x in log.Scalars(tag)} == {value}
    pool = M.main(team_args(partners="pool", total_timesteps=80, pool_every=30))
    assert set(pool["eval_returns"]) | set(pool["train_returns"]) <= {float(x) for x in each}


def test_the_pool_counts_a_victory_for_who_earned_more_than_the_others(folder):
    table, *_ = play_team(lambda: Toy((4, 4)), 3, pool=lambda agent: pool_of(members=1, agent=agent), partners="pool")
    obs = {"reward": np.array([[5.0, 1.0]] * 3), "learner": np.array([0, 1, 0]), "script": np.full((3, 2), -1)}
    table.score, table.partners = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 4.0]]), [0, 0, 0]
    results = []
    for env in range(3):
        table.pool.wins[0], table.pool.games[0] = 0.0, 0.0
        own, name = table.finish(obs, env)
        results.append((own, name, table.pool.wins[0]))
    assert results == [(5.0, "pool_0", 1.0), (1.0, "pool_0", 0.0), (5.0, "pool_0", 0.5)]


def test_an_interrupted_run_keeps_its_pool_and_goes_on(folder, monkeypatch):
    update, calls = M.Dreamer.update, []

    def interrupted(agent, batch):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return update(agent, batch)

    monkeypatch.setattr(M.Dreamer, "update", interrupted)
    summary = M.main(team_args(partners="pool", pool_every=10, pool_size=4))
    run, = (folder / "runs").iterdir()
    assert summary["interrupted"] and summary["eval_returns"] == [] and 0 < summary["global_step"] < 160
    members = M.load_file(run)["pool"]["members"]
    assert 0 in members and len(members) == 4
    resumed = M.main(M.parse_args(["--resume", str(run)]))
    assert resumed["global_step"] == 160 and {"live", "pool_0"} < set(resumed["eval_partners"])


@slow
def test_torchrun_spreads_a_run_with_a_pool_over_processes(folder):
    flags = ["--partners", "pool", "--pool-every", "40"]
    assert len(list(train_and_resume_in_two_processes(M.__file__, folder, *flags))) == 2


@slow
def test_compiled_updates_of_teams_are_the_eager_ones():
    eager, compiled = (make_team(perturb=0.1, compile=on) for on in (False, True))
    batch = team_batch(eager)
    for _ in range(10):
        results = [agent.update(dict(batch)) for agent in (eager, compiled)]
    for name in results[0]:
        if results[0][name].isfinite():
            close(results[1][name], results[0][name], rtol=1e-2, atol=1e-3)


@cuda
def test_captured_updates_of_teams_are_the_eager_ones_and_a_run_with_a_pool_ends_well(folder):
    agents = [make_team(perturb=0.1, cuda=True, compile=False, cuda_graph=on) for on in (False, True)]
    batch = team_batch(agents[0])
    batch["valid"][1, 4:7] = False
    for _ in range(20):
        results = [agent.update(dict(batch)) for agent in agents]
    assert agents[1].fast_learn.on and "outputs" in next(iter(agents[1].fast_learn.graphs.values()))
    for name in results[0]:
        close(results[1][name], results[0][name], rtol=1e-3, atol=1e-4)
    assert M.main(team_args(partners="pool", pool_every=40, cuda=True))["global_step"] == 160


def test_pictures_show_what_the_head_expected_of_teammates_beside_what_they_did(monkeypatch):
    table, replay, agent = play_team(lambda: Toy((6, 3, 6)), 30)
    image, = M.draw_teammates(agent, replay, context=3)["teammates"]
    assert image.size == (8 * 14 + 1, 12 * 5 * 14) and len(image.getcolors(10**5)) > 5
    drawn = Toy((6, 3, 6))
    drawn.render_mode, drawn.render = "rgb_array", lambda: np.full((40, 60, 3), 10 * drawn.t, np.uint8)
    monkeypatch.setattr(M, "make_parallel", lambda args, render: drawn)
    frames = M.draw_game(agent, None)["game"]
    assert [f.getpixel((5, 5))[0] for f in frames] == [10 * t for t in range(6)]  # six steps before the end
    assert {f.size for f in frames} == {(60, 40 + 2 * 14 + 1)}
    framed = [[sum(f.getpixel((14 * a + 7, 40 + 14 * j + 1)) == (0, 0, 0) for a in range(4)) for j in range(2)]
              for f in frames]
    assert framed == [[1, 1]] * 3 + [[0, 1]] * 3  # one action each, none of who has left
    drawn.render_mode = None
    assert M.draw_game(agent, None) == {}


def test_agents_of_other_runs_join_the_pool(folder):
    M.main(team_args(partners="pool", seed=7))
    run, = (folder / "runs").iterdir()
    agent = M.Dreamer(*M.seat_spaces(team_args())[:2], team_args(), 2)
    pool = M.make_pool(agent, team_args(partners="pool", pool_checkpoints=(str(run),)), None)
    weights = M.load_file(run)["agent"]
    for k, p in pool.members[1].named_parameters():
        equal(p, weights[k])
    for k, p in pool.members[0].named_parameters():
        equal(p, dict(agent.named_parameters())[k])
    other = M.Dreamer(VECTOR, CHOICE, team_args(), 2)
    with pytest.raises(M.InputError, match="cannot join the pool"):
        M.make_pool(other, team_args(partners="pool", pool_checkpoints=(str(run),)), None)


@pytest.mark.parametrize("flags", [("--teammate-model", "none"), ("--teammate-model", "joint"),
                                   ("--teammate-model", "merged"), ("--tom-stop-grad",), ("--no-observe-teammates",),
                                   ("--oracle",), ("--env-id", "prisoners_dilemma")])
def test_every_arm_runs(folder, flags):
    args = dataclasses.replace(M.parse_args(list(flags)), **team_values(eval_episodes=1), total_timesteps=60)
    assert M.main(args)["updates"] > 0


def test_the_command_line_takes_the_preset_of_the_game_and_flags_on_top():
    assert M.parse_args([]) == M.Args.preset("hidden_match")
    mpe = M.parse_args(["--env-id", "mpe2.simple_spread_v3", "--num-envs", "3"])
    assert mpe == M.Args.preset("mpe2.simple_spread_v3", num_envs=3) and mpe.partners == "self"
    assert M.parse_args(["--scripted", "0", "1", "--q", "0.5"]).scripted == ("0", "1")
    for values in M.PRESETS.values():
        M.Args(**values).check()


def team_command(*flags):
    return subprocess.run([sys.executable, str(Path(M.__file__)), *flags], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "COLUMNS": "200"})


def test_the_command_line_answers_a_wrong_game_in_one_sentence_with_status_2_and_writes_nothing(folder):
    done = team_command("--env-id", "no_such_module.env_v0")
    assert done.returncode == 2 and "no_such_module.env_v0" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not list(folder.iterdir())


@pytest.mark.parametrize("values,named", [
    (dict(env_id="no_such_module.env_v0"), "no_such_module"), (dict(env_id="json"), "parallel_env"),
    (dict(epsilon=1.5), "epsilon 1.5"), (dict(q=-0.1), "q -0.1"), (dict(team_latents=6), "team_latents 6"),
    (dict(pool_size=2), "pool_size 2"), (dict(env_kwargs='{"epsilon": 5}'), "epsilon 5"), (dict(env_id=""), "no game"),
    (dict(env_id="hidden_match/x"), "hidden_match/x"), (dict(tom_scale=-1.0), "tom_scale -1"),
    (dict(partners="self", scripted=("0",)), "scripted"),
    (dict(scripted=("7",)), "'7'"), (dict(held_out=("nobody",)), "nobody"), (dict(env_kwargs="{"), "env_kwargs"),
    (dict(env_kwargs="[1]"), "JSON object"), (dict(env_kwargs='{"colour": 1}'), "colour"),
    (dict(capture_video=True), "hidden_match draws no frames"),
    (dict(held_out=("0", "1", "2", "3")), "all scripted partners are held out"),
    (dict(pool_checkpoints=("x",)), "pool_checkpoints"),
    (dict(partners="pool", pool_checkpoints=("no/such/run",)), "no/such/run")])
def test_bad_input_about_teams_is_an_input_error_that_names_the_value(folder, values, named):
    with pytest.raises(M.InputError, match=f"(?s){named}"):
        M.main(team_args(**values))
    assert not list(folder.iterdir())


@pytest.mark.parametrize("env_id,module,package", [
    ("mpe2.simple_spread_v3", "mpe2", "mpe2==1.1.1"),
    ("pettingzoo.butterfly.pistonball_v6", "pettingzoo", "pettingzoo"),
    ("overcooked/cramped_room", "overcooked_ai_py.agents", "overcooked-ai==1.1.0"),
    ("lbf/Foraging-8x8-2p-3f-v3", "lbforaging", "lbforaging==2.0.0"), ("hockey", "hockey", "Box2D==2.3.10")])
def test_a_missing_game_is_an_input_error_with_the_line_that_installs_it(monkeypatch, env_id, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(M.InputError, match=f"pip install .*{package}"):
        M.make_parallel(M.Args(env_id=env_id))


def test_one_seat_is_an_input_error():
    with pytest.raises(M.InputError, match="seats 1"):
        make_team(seats=1)


# ---------------------------------------------------------------------------------------------- games of other packages


@pytest.mark.parametrize("kwargs,seats", [
    pytest.param("{}", 3, marks=slow), ('{"N": 4, "continuous_actions": true}', 4)])
def test_self_play_in_mpe2_trains_on_the_streams_of_all_seats(folder, kwargs, seats):
    pytest.importorskip("mpe2")
    summary = M.main(team_args(env_id="mpe2.simple_spread_v3", partners="self", env_kwargs=kwargs))
    run, = (folder / "runs").iterdir()
    replay = M.load_file(run, "replay.pt")
    assert summary["updates"] > 0 and len(replay["data"]["reward"]) == 2 * seats
    assert replay["data"]["teammates"][0].shape[1] == seats - 1
    ends = {k: torch.stack(replay["data"][k]).any() for k in ("is_last", "is_terminal")}
    assert ends["is_last"] and not ends["is_terminal"]  # 25 steps, then truncated


def test_overcooked_pays_shaping_that_fades_and_its_greedy_partner_delivers_soup():
    pytest.importorskip("overcooked_ai_py")
    env = M.Overcooked("cramped_room", shaping_steps=1000)
    env.reset(seed=0)
    returns, shaped, t = 0.0, [], 0
    while env.agents:
        sparse = env.game.game_stats["cumulative_sparse_rewards_by_agent"].sum()
        _, reward, terminated, truncated, _ = env.step({a: env.play(a, "greedy") for a in env.possible_agents})
        soup = env.game.game_stats["cumulative_sparse_rewards_by_agent"].sum() - sparse
        extra = {a: r - soup for a, r in reward.items()}
        shaped += [x / (1 - t / 1000) for x in extra.values() if x > 1e-9]
        returns, t = returns + soup, t + 1
    assert t == 400 and all(truncated.values()) and not any(terminated.values())
    assert returns >= 100 and returns % 20 == 0
    assert shaped and set(np.round(shaped, 6)) <= {3.0, 5.0}
    env.reset(options={"steps": np.inf})
    _, reward, *_ = env.step({a: 4 for a in env.possible_agents})
    assert set(reward.values()) == {0.0}
    assert M.Overcooked("cramped_room", "lossless").observation_space("cook_0").shape == (5 * 4 * 26,)
    with pytest.raises(M.InputError, match="no_such_kitchen"):
        M.Overcooked("no_such_kitchen")


def test_foraging_pays_each_player_its_own_reward(folder):
    pytest.importorskip("lbforaging")
    env = M.Foraging("Foraging-8x8-2p-3f-v3")
    obs, _ = env.reset(seed=0)
    assert list(obs) == ["player_0", "player_1"] and obs["player_0"].shape == env.observation_space("player_0").shape
    rng, total = np.random.default_rng(0), 0.0
    for _ in range(3):
        env.reset(seed=1)
        while env.agents:
            _, reward, terminated, truncated, _ = env.step({a: int(rng.integers(6)) for a in env.agents})
            total += sum(reward.values())
    assert 0 <= total <= 3.0 and terminated.keys() == truncated.keys() == set(env.possible_agents)


class Rink:
    """What the adapter uses of hockey-env: 18 numbers, seen negated from the other side; after 3 steps, `winner`."""
    winner, observation_space, action_space = 1, Box(-np.inf, np.inf, (18,)), Box(-1, 1, (8,))

    def reset(self, one_starting=None, mode=None, seed=None, options=None):
        self.t = 0
        return np.arange(18.0), {}

    def obs_agent_two(self):
        return -np.arange(18.0) - self.t

    def get_info_agent_two(self):
        return {"winner": -self.winner * (self.t == 3), "reward_closeness_to_puck": -0.5}

    def step(self, action):
        self.t, self.action = self.t + 1, action
        info = {"winner": self.winner * (self.t == 3), "reward_closeness_to_puck": -0.25}
        return np.arange(18.0) + self.t, 99.0, self.t == 3, False, info

    def render(self, mode):
        return np.zeros((48, 60, 3), np.uint8)


class Bot:
    def __init__(self, weak):
        self.weak = weak

    def act(self, obs):
        return np.array([obs[1] / 100, 2.0, float(self.weak), 0.0])


@pytest.mark.parametrize("winner", [1, -1, 0])
def test_hockey_pays_the_winner_ends_draws_by_time_and_shows_each_player_its_own_side(monkeypatch, folder, winner):
    monkeypatch.setattr(Rink, "winner", winner)
    library = types.SimpleNamespace(HockeyEnv=Rink, BasicOpponent=Bot)
    monkeypatch.setitem(sys.modules, "hockey", types.SimpleNamespace(hockey_env=library))
    monkeypatch.setitem(sys.modules, "hockey.hockey_env", library)
    env = M.make_parallel(M.Args(env_id="hockey", shaping_steps=4, num_envs=1))
    obs, _ = env.reset(seed=0)
    rewards = []
    while env.agents:
        equal(obs["player_1"], -obs["player_0"])
        bots = env.play("player_0", "weak"), env.play("player_1", "strong")
        x = (1 + env.game.t) / 100
        np.testing.assert_allclose(bots, [[x, 1, 1, 0], [-x, 1, 0, 0]], atol=1e-6)
        assert all(env.action_space(a).contains(bot) for a, bot in zip(env.possible_agents, bots))
        obs, reward, terminated, truncated, _ = env.step(dict(zip(env.possible_agents, bots)))
        np.testing.assert_allclose(env.game.action, np.concatenate(bots))
        rewards.append(list(reward.values()))
    fade = np.array([1, 0.75, 0.5])[:, None] * [-0.25, -0.5]
    np.testing.assert_allclose(rewards, fade + np.array([[0, 0], [0, 0], [10 * winner, -10 * winner]]))
    assert set(terminated.values()) == {winner != 0} and set(truncated.values()) == {winner == 0}
    if winner == 1:
        summary = M.main(team_args(env_id="hockey", total_timesteps=80, video_every=60))
        assert set(summary["eval_partners"]) == {"weak", "strong"} and abs(summary["eval_returns"][0]) == 10


# ------------------------------------------------------------------------------------------------------ teams: learning


@slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hidden_match_is_played_as_well_as_can_be_and_not_without_a_model_of_the_teammate(folder, seed):
    tom = M.main(M.Args.preset("hidden_match", seed=seed, cuda=False, compile=False))
    assert tom["eval_return_mean"] >= 6.3 and tom["eval_tom"]["skill"] >= 0.9
    plain = M.main(M.Args.preset("hidden_match", seed=seed, cuda=False, compile=False, teammate_model="none"))
    assert plain["eval_return_mean"] <= 2.8


@slow
def test_where_the_partner_is_seen_plain_dreamer_does_as_well(folder):
    values = dict(q=1.0, cuda=False, compile=False)
    runs = [M.main(M.Args.preset("hidden_match", teammate_model=arm, **values)) for arm in ("tom", "none")]
    assert abs(runs[0]["eval_return_mean"] - runs[1]["eval_return_mean"]) <= 0.5
