"""dreamer_v1.py and its world model, gaussian_model.py, against torch's own distributions, cells
and optimizer, and against finite differences."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from gymnasium.spaces import Box, Dict, Discrete
from torch import distributions

sys.path.insert(0, str(Path(__file__).resolve().parent))
import dreamer_v1
import gaussian_model
from test_variants import batch_of, make_agent, tiny  # noqa: F401

import dreamer

NUMBERS = Box(-2, 2, (2,))
MIXED = Dict(a=Discrete(3), b=Box(-1, 1, (2,)))

def v1(actions=NUMBERS, **values):
    return make_agent("dreamer_v1", actions=actions, **values)

def starts_and_noise(agent, n=3):
    """Random states (n, …), and noise for dreams that begin there."""
    size = agent.wm.size
    horizon = agent.args.imagination_horizon
    start = {"deter": torch.randn(n, size.deter).tanh(), "stoch": torch.randn(n, size.latents, 1)}
    return start, {"prior": torch.rand(n, horizon, size.latents, 1),
                   "action": torch.rand(n, horizon, agent.actions.noise_size)}

def gradients(module):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]

# the world model

def test_the_kl_of_gaussians_is_that_of_torch():
    torch.manual_seed(0)
    means = torch.randn(2, 5, 6, 1)
    stds = torch.rand(2, 5, 6, 1) + 0.2
    ours = gaussian_model.Gaussian(means[0], stds[0]).kl(
        gaussian_model.Gaussian(means[1], stds[1]))
    theirs = distributions.kl_divergence(distributions.Normal(means[0], stds[0]),
                                         distributions.Normal(means[1], stds[1]))
    torch.testing.assert_close(ours, theirs.sum(-1))

def test_a_latent_has_the_predicted_mean_and_a_deviation_above_a_tenth():
    rssm = make_agent("gaussian_model").wm.rssm
    logits = torch.tensor([[[0.5, -50.0], [-1.0, 0.0]]])
    latent = rssm.latent(logits)
    assert latent.mean.flatten().tolist() == [0.5, -1.0]
    torch.testing.assert_close(latent.std.flatten(), torch.tensor([0.1, 0.1 + np.log(2)]).float())

def test_the_replay_gives_a_latent_back_as_it_was():
    agent = make_agent("gaussian_model")
    stoch = torch.randn(3, 6, 1)
    stored = agent.wm.rssm.pack(stoch)
    shape, dtype = agent.replay_specs()["stoch"]
    assert (stored.shape[1:], stored.dtype) == (shape, dtype)
    assert torch.equal(agent.wm.rssm.unpack(stored), stoch)

def test_the_loss_of_a_number_is_minus_the_log_density_of_a_gaussian_of_variance_one():
    torch.manual_seed(0)
    mean, first, second = torch.randn(3, 4, 5)
    normal = distributions.Normal(mean, 1.0)
    number = gaussian_model.Number(mean[..., None], torch.ones(4, 5, 1))
    expected = -normal.log_prob(first) - normal.log_prob(second)
    torch.testing.assert_close(number.loss(first, second), expected)
    assert torch.equal(number.pred(), mean)
    wm = make_agent("gaussian_model").wm
    assert (wm.reward(torch.randn(7, wm.rssm.feat_size)).std == 1).all()

@pytest.mark.parametrize("core, twin, width", [("gru", nn.GRU, 64), ("lstm", nn.LSTM, 128)])
def test_the_core_is_torchs_own_and_starts_anew_where_an_episode_begins(core, twin, width):
    agent = make_agent("gaussian_model", core=core)
    rssm = agent.wm.rssm
    assert agent.replay_specs()["deter"][0] == (width,)
    tokens, action = torch.randn(2, 7, 16), torch.randn(2, 7, 4).clamp(-1, 1)
    first = torch.zeros(2, 7, dtype=torch.bool)
    first[:, 0] = True
    first[:, 4] = True
    states = rssm.observe(rssm.initial(2), tokens, action, first, torch.rand(2, 7, 6, 1))
    before = torch.cat([torch.zeros(2, 1, 6, 1), states["stoch"][:, :-1]], 1)
    network = twin(32, 64, batch_first=True)
    network.load_state_dict({f"{name}_l0": p for name, p in rssm.cell.state_dict().items()})
    for episode in (slice(0, 4), slice(4, 7)):
        z, a = before[:, episode].clone(), action[:, episode].clone()
        z[:, 0] = a[:, 0] = 0
        inputs = torch.cat([rssm.stoch_in(z.flatten(2)), rssm.action_in(a)], -1)
        outputs, last = network(inputs)
        torch.testing.assert_close(states["deter"][:, episode, :64], outputs)
    if core == "lstm":
        torch.testing.assert_close(states["deter"][:, -1, 64:], last[1][0])

# the actor

def test_the_policy_is_the_tanh_of_a_gaussian_with_a_mean_within_five():
    agent = v1()
    feat = torch.randn(8, agent.wm.rssm.feat_size)
    base = dreamer.Actor.forward(agent.actor, feat).parts[0]
    noise = torch.rand(8, 2) * 0.98 + 0.01
    squashed = distributions.TransformedDistribution(
        distributions.Normal(5 * base.mean, base.std), distributions.TanhTransform())
    torch.testing.assert_close(agent.actor(feat).sample(noise), squashed.icdf(noise))
    torch.testing.assert_close(agent.actor(feat).sample(None), torch.tanh(5 * base.mean))

@pytest.mark.parametrize("contdisc, normalize", [(True, False), (False, True)])
def test_the_actors_gradient_is_the_slope_of_the_dreamed_return(
        contdisc, normalize, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        agent = v1(contdisc=contdisc, gamma=0.9, normalize_returns=normalize)
        start, noise = starts_and_noise(agent)
        args, wm = agent.args, agent.wm
        gamma = 1.0 if contdisc else 0.9
        agent.retnorm.range.copy_(torch.tensor([0.0, 300.0]))

        def naive():
            """Returns and discounts of the dreams, step by step."""
            state, reward, value, discount = start, [], [], []
            for t in range(args.imagination_horizon + 1):
                feat = dreamer.features(state)
                reward.append(wm.reward(feat).pred())
                value.append(agent.critic(feat).pred())
                discount.append(gamma * torch.sigmoid(wm.cont(feat)[:, 0]))
                if t < args.imagination_horizon:
                    part = dreamer.Actor.forward(agent.actor, feat).parts[0]
                    normal = distributions.Normal(5 * part.mean, part.std)
                    action = torch.tanh(normal.icdf(noise["action"][:, t]))
                    state = wm.rssm.img_step(state, wm.rssm.embed(action), noise["prior"][:, t])
            returns = [value[-1]]
            for r, v, d in zip(reward[:0:-1], value[:0:-1], discount[:0:-1]):
                returns.insert(0, r + d * (0.05 * v + 0.95 * returns[0]))
            return torch.stack(returns[:-1], 1), torch.stack(discount, 1)

        with torch.no_grad():
            returns, discount = naive()
            weight = discount.cumprod(1)[:, :-1] / gamma
            losses, ours, _ = agent.judge(*agent.dream(start, noise))
        torch.testing.assert_close(ours, returns)
        agent.retnorm.range.copy_(torch.tensor([0.0, 300.0]))
        losses, _, _ = agent.judge(*agent.dream(start, noise))
        scale = float(agent.retnorm.range[1] - agent.retnorm.range[0]) if normalize else 1.0
        expected = -float((weight * returns).mean()) / scale
        assert float(losses["policy"].detach()) == pytest.approx(expected)
        losses["policy"].backward()
        params = list(agent.actor.parameters())
        for seed in range(3):
            torch.manual_seed(seed)
            direction = [torch.randn_like(p) for p in params]
            ends = []
            with torch.no_grad():
                for step in (1e-5, -2e-5, 1e-5):  # there, to the other side, and back
                    torch._foreach_add_(params, direction, alpha=step)
                    ends.append(float((weight * naive()[0]).mean()))
            slope = (ends[0] - ends[1]) / 2e-5
            expected = sum(float((d * p.grad).sum()) for d, p in zip(direction, params))
            assert abs(slope) > 1e-3 and -slope / scale == pytest.approx(expected, rel=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)

def test_the_losses_of_a_dream_move_actor_and_critic_each_alone():
    agent = v1()
    for name, moved in (("policy", agent.actor), ("value", agent.critic)):
        torch.manual_seed(0)
        agent.zero_grad()
        losses, _, _ = agent.judge(*agent.dream(*starts_and_noise(agent)))
        losses[name].mean().backward()
        for part in (agent.wm, agent.actor, agent.critic):
            total = sum(float(g.abs().sum()) for g in gradients(part))
            assert (total > 0) == (part is moved), (name, type(part))

def test_in_an_update_the_world_model_learns_from_experience_alone():
    agent = v1(rep_scale=1.0, dyn_scale=1.0, repval_scale=0.0)
    data = agent.training_data(batch_of(agent))
    noise = agent.learning_noise(data)
    agent.backward(data, noise)
    together = gradients(agent.wm)
    agent.zero_grad()
    losses, _ = agent.wm.losses(agent.wm.observe(data, noise["posterior"]), data)
    sum(x.mean() for x in losses.values()).backward()
    for ours, alone in zip(together, gradients(agent.wm)):
        torch.testing.assert_close(ours, alone)

def test_the_critic_learns_the_lambda_returns_of_dreams_by_squared_errors():
    agent = v1(contdisc=False, gamma=0.8)
    dream, action = agent.dream(*starts_and_noise(agent))
    losses, returns, _ = agent.judge(dream, action)
    feat = dreamer.features(dream)
    cont = torch.sigmoid(agent.wm.cont(feat)[..., 0])
    weight = torch.stack([0.8**t * cont[:, : t + 1].prod(1) for t in range(5)], 1)
    error = agent.critic(feat[:, :-1]).pred() - returns
    expected = weight * (0.5 * error.square() + 0.5 * np.log(2 * np.pi))
    torch.testing.assert_close(losses["value"], expected)

def test_choices_and_numbers_side_by_side_reach_the_actor():
    agent = v1(MIXED)
    losses, _, _ = agent.judge(*agent.dream(*starts_and_noise(agent)))
    losses["policy"].backward()
    for layers in agent.actor.outputs:
        assert all(layer.weight.grad.abs().sum() > 0 for layer in layers)

def test_accumulated_gradients_are_those_of_one_pass():
    results = []
    for accumulate in (1, 2):
        agent = v1(accumulate=accumulate, normalize_returns=True)
        data = agent.training_data(batch_of(agent))
        noise = agent.learning_noise(data)
        agent.backward(data, noise)
        results.append(gradients(agent))
    for once, twice in zip(*results):
        torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-5)

# learning and acting

def test_model_actor_and_critic_move_by_their_own_step_sizes():
    agent = v1(actor_lr=2e-3, critic_lr=4e-3, anneal_lr=True)
    parts = {agent.wm: 1e-3, agent.actor: 2e-3, agent.critic: 4e-3}
    assert sum(len(list(part.parameters())) for part in parts) == len(agent.learned)
    before = {part: [p.detach().clone() for p in part.parameters()] for part in parts}
    agent.update(batch_of(agent))
    for part, rate in parts.items():  # the first step of Adam has the length of its step size
        moves = [(p.detach() - old).abs().max() for p, old in zip(part.parameters(), before[part])]
        assert float(max(moves)) == pytest.approx(rate, rel=1e-3)
    agent.anneal(0.75)
    assert [float(g["lr"]) for g in agent.optimizer.param_groups] == pytest.approx(
        [2.5e-4, 2e-3, 4e-3])

def test_what_is_resumed_keeps_adams_averages_and_takes_the_step_sizes_of_the_flags():
    old, new = v1(actor_lr=2e-3), v1(actor_lr=5e-3)
    old.update(batch_of(old))
    state = old.state_dict()
    assert [float(g["lr"]) for g in new.optimizer.param_groups][1] == pytest.approx(5e-3)
    new.optimizer.param_groups[0]["capturable"] = True  # as on a GPU; the saved ones are not
    new.load_state_dict(state)
    assert [float(g["lr"]) for g in new.optimizer.param_groups][1] == pytest.approx(5e-3)
    assert [g["capturable"] for g in new.optimizer.param_groups] == [True, False, False]
    for p, q in zip(old.learned, new.learned):
        averages = old.optimizer.state[p]
        assert averages.keys() == new.optimizer.state[q].keys() >= {"exp_avg", "exp_avg_sq"}
        for name, x in averages.items():
            assert torch.equal(x, new.optimizer.state[q][name])

def test_adam_is_torchs_after_the_gradient_of_each_group_was_clipped():
    ours = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    theirs = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    adam = dreamer_v1.Adam([{"params": [p], "lr": 0.1} for p in ours])
    reference = torch.optim.Adam(theirs, lr=0.1)
    for large in (1000.0, 1.0, 300.0):  # clipped to 100, not, clipped
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = torch.tensor([0.0, 0.6, 0.8, 0.0]) * (large if i == 0 else 1.0)
            q.grad = p.grad * min(1.0, 100.0 / float(p.grad.norm()))
        norm = (large**2 + 1) ** 0.5
        assert float(adam.step()["grad_norm"]) == pytest.approx(norm)
        reference.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q)

def test_actions_get_noise_while_training_and_only_then():
    agent = v1(action_noise=0.3)
    obs, first = np.zeros((4000, 3), np.float32), np.ones(4000, bool)
    with agent.evaluating():
        assert not agent.acting_noise(4000)["exploration"].any()
        agent.act_rng.manual_seed(0)
        plain = agent.act(obs, None, first)[1]
    agent.act_rng.manual_seed(0)
    noisy = agent.act(obs, None, first)[1]
    agent.act_rng.manual_seed(0)  # from which all noise comes, so that runs can be repeated
    assert torch.equal(agent.act(obs, None, first)[1]["action"], noisy["action"])
    assert torch.equal(noisy["deter"], plain["deter"])
    assert torch.equal(noisy["stoch"], plain["stoch"])
    inside = (noisy["action"].abs() < 1) & (plain["action"].abs() < 0.1)
    added = (noisy["action"] - plain["action"])[inside]
    assert len(added) > 100 and float(added.std()) == pytest.approx(0.3, rel=0.1)
    assert noisy["action"].abs().max() == 1  # no action leaves its range
    still = agent.act(obs, None, first, deterministic=True)[1]["action"]
    assert torch.equal(still, agent.policy(agent.act(obs, None, first, True)[1], None))

@pytest.mark.parametrize("space", [Discrete(4), MIXED], ids=["choices", "mixed"])
def test_choices_get_no_noise(space):
    agent = v1(space)
    assert not agent.acting_noise(3)["exploration"].any()

def test_all_but_judge_is_compiled_as_in_the_base():
    agent = v1()
    names = [name for _, name in agent.compiled()]
    assert names == [name for _, name in dreamer.Dreamer.compiled(agent) if name != "judge"]

# values

def test_the_papers_values_come_before_the_suites_and_flags_before_both():
    args = dreamer.parse_args(["--env-id", "Pendulum-v1", "--gamma", "0.9"], dreamer_v1.Args)
    assert (args.learning_rate, args.actor_lr, args.critic_lr) == (6e-4, 8e-5, 8e-5)
    assert (args.batch_size, args.batch_length, args.imagination_horizon) == (50, 50, 15)
    assert (args.free_nats, args.dyn_scale, args.rep_scale, args.repval_scale) == (3, 1, 1, 0)
    assert (args.return_lambda, args.action_noise, args.contdisc) == (0.95, 0.3, False)
    assert dreamer_v1.Args.preset("Pendulum-v1").gamma == 0.99 and args.gamma == 0.9
    assert dreamer_v1.Args.preset("Pendulum-v1", gamma=0.8).gamma == 0.8
    assert args.rec_scale == dreamer.PRESETS["classic_control"]["rec_scale"]
    size = dreamer.SIZES[args.size]
    assert (size.deter, size.latents, size.hidden, size.units) == (200, 30, 200, 400)
    assert args.core == "gru" and not args.normalize_returns
    assert args.deterministic and not args.average and not args.anneal_lr

@pytest.mark.parametrize("flags", [["--size", "12m"], ["--core", "rnn"]])
def test_sizes_and_cores_that_do_not_exist_end_with_status_2(flags, capsys):
    with pytest.raises(SystemExit) as end:
        dreamer.parse_args(flags, dreamer_v1.Args)
    assert end.value.code == 2 and flags[1] in capsys.readouterr().err

def test_unbounded_actions_are_refused_in_a_sentence():
    with pytest.raises(dreamer.InputError, match="unbounded: give it bounds"):
        v1(Box(-np.inf, np.inf, (2,)))
