"""plan2explore.py: whom the ensemble learns from, what its disagreement pays, and when."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary

sys.path.insert(0, str(Path(__file__).resolve().parent))
import plan2explore
from test_variants import batch_of, make_agent, tiny  # noqa: F401

import dreamer

def observed(agent, batch):
    """Data and posterior states of a batch, at the modes of the latents."""
    data = agent.training_data(batch)
    return data, agent.wm.observe(data, None)

def dream_of(agent, batch):
    """States and actions of dreams with noise."""
    data, states = observed(agent, batch)
    noise = agent.learning_noise(data)
    with torch.no_grad():
        return agent.dream(agent.dream_starts(states, data), noise)

def gradients(agent, loss):
    """Names of the parameters that a loss moves."""
    agent.zero_grad()
    loss.mean().backward(retain_graph=True)
    return {name for name, p in agent.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0}

# disagreement

def test_equal_members_do_not_disagree():
    agent = make_agent("plan2explore")
    for member in agent.wm.ensemble:
        member.load_state_dict(agent.wm.ensemble[0].state_dict())
    dream, action = dream_of(agent, batch_of(agent))
    assert torch.equal(agent.wm.disagreement(dream, action), torch.zeros(action.shape[:2]))

def test_disagreement_is_numpys_variance_of_the_members_and_grows_with_their_differences():
    agent = make_agent("plan2explore")
    dream, action = dream_of(agent, batch_of(agent))
    x = torch.cat([dreamer.features(dream)[:, :-1], action], -1)
    each = np.stack([member(x).detach().numpy() for member in agent.wm.ensemble])
    first = agent.wm.disagreement(dream, action)
    np.testing.assert_allclose(first.detach(), each.var(0).mean(-1), rtol=1e-4)
    with torch.no_grad():  # one member says the same, 1 higher: the variances of a constant rise
        for member in agent.wm.ensemble:
            member.load_state_dict(agent.wm.ensemble[0].state_dict())
        agent.wm.ensemble[0][-1].bias += 1
        one = agent.wm.disagreement(dream, action)
        agent.wm.ensemble[0][-1].bias += 1
        two = agent.wm.disagreement(dream, action)
    k = agent.args.members
    np.testing.assert_allclose(one, 1 / k - 1 / k**2 + torch.zeros_like(one), rtol=1e-4)
    np.testing.assert_allclose(two, 4 * one, rtol=1e-4)

def test_actions_beyond_one_count_as_one_as_in_the_dynamics():
    agent = make_agent("plan2explore", actions=Box(-1, 1, (2,)))
    dream, action = dream_of(agent, batch_of(agent))
    far = agent.wm.disagreement(dream, 3 * torch.ones_like(action))
    assert torch.equal(far, agent.wm.disagreement(dream, torch.ones_like(action)))

# whom the ensemble learns from

def test_from_a_state_and_its_action_the_members_learn_the_tokens_of_the_next_step():
    agent = make_agent("plan2explore")
    batch = batch_of(agent)
    batch["is_first"][:, 1:] = False
    batch["is_first"][2, 4] = True  # of sequence 2, trained step 3 begins an episode
    data, states = observed(agent, batch)
    loss = agent.wm.extra_losses(states, data)["ensemble"]
    feat = dreamer.features(states)
    for b in range(4):
        for t in range(agent.args.batch_length - 1):
            x = torch.cat([feat[b, t], batch["action"][b, t + 1]])  # row t + 1 is trained step t
            x[len(feat[b, t]):] /= batch["action"][b, t + 1].abs().clamp(min=1)
            errors = [(member(x) - states["tokens"][b, t + 1]).square().mean().item()
                      for member in agent.wm.ensemble]
            expected = 0.0 if (b, t + 1) == (2, 3) else np.mean(errors)
            assert loss[b, t].item() == pytest.approx(expected, rel=1e-4)

def test_the_ensemble_moves_nothing_but_itself_and_nothing_else_moves_it():
    agent = make_agent("plan2explore")
    data, states = observed(agent, batch_of(agent))
    moved = gradients(agent, agent.wm.extra_losses(states, data)["ensemble"])
    assert moved and all(name.startswith("wm.ensemble.") for name in moved)
    losses, _, _ = agent.judge(*dream_of(agent, batch_of(agent)))
    for name, prefix in {"policy": "actor.", "value": "critic.",
                         "intrinsic_value": "intrinsic_critic."}.items():
        moved = gradients(agent, losses[name])
        assert moved and all(x.startswith(prefix) for x in moved), name

def test_where_the_members_have_learned_they_agree_and_elsewhere_they_do_not():
    agent = make_agent("plan2explore")
    batch = batch_of(agent)
    data, states = observed(agent, batch)
    states = {name: x.detach() for name, x in states.items()}
    action = data["prev_action"][:, 1:]
    new = {name: states[name].flip(0) for name in ("deter", "stoch")} | {"deter": -states["deter"]}
    optimizer = torch.optim.Adam(agent.wm.ensemble.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        agent.wm.extra_losses(states, data)["ensemble"].mean().backward()
        optimizer.step()
    known = agent.wm.disagreement(states, action)[~data["is_first"][:, 1:]].mean()
    assert 10 * known.item() < agent.wm.disagreement(new, action).mean().item()

# what the actor learns

@pytest.mark.parametrize("weights, exploring", [((0.0, 1.0), True), ((1.0, 0.0), False)])
def test_without_weight_or_after_exploring_the_actors_loss_is_that_of_the_plain_agent(
        weights, exploring):
    agent = make_agent("plan2explore")
    agent.args.intrinsic_weight, agent.args.task_weight = weights
    agent.exploring.fill_(exploring)
    dream, action = dream_of(agent, batch_of(agent))
    ours, returns, _ = agent.judge(dream, action)
    agent.retnorm.range.zero_()
    plain, plain_returns, _ = dreamer.Dreamer.judge(agent, dream, action)
    assert torch.equal(ours["policy"], plain["policy"])
    assert torch.equal(ours["value"], plain["value"]) and torch.equal(returns, plain_returns)

@pytest.mark.parametrize("contdisc, gamma", [(True, 1.0), (False, 0.9)])
def test_the_actors_loss_is_that_of_the_weighted_advantages_of_two_critics(contdisc, gamma):
    """Against a naive computation, dream by dream."""
    agent = make_agent("plan2explore", intrinsic_weight=3.0, task_weight=1.0, ent_coef=0.1,
                       contdisc=contdisc, gamma=0.9)
    near_zero = -0.5 * (torch.arange(255) - 127).abs()  # else values dwarf the rewards
    with torch.no_grad():
        for head in (agent.critic, agent.intrinsic_critic, agent.wm.reward):
            head[-1].bias += near_zero
    dream, action = dream_of(agent, batch_of(agent, size=2))
    losses, _, _ = agent.judge(dream, action)
    lam, horizon = agent.args.return_lambda, action.shape[1]
    feat = dreamer.features(dream)
    with torch.no_grad():
        cont = gamma * agent.wm.cont(feat)[..., 0].sigmoid()
        found = torch.cat([torch.zeros(len(feat), 1), agent.wm.disagreement(dream, action)], 1)
        policy = agent.actor(feat[:, :-1])
        logp, entropy = policy.log_prob(action), policy.entropy()
        advantages = []
        for reward, critic in ((agent.wm.reward(feat).pred(), agent.critic),
                               (found, agent.intrinsic_critic)):
            value = critic(feat).pred()
            future, returns = value[:, -1], []
            for t in reversed(range(horizon)):
                mixed = (1 - lam) * value[:, t + 1] + lam * future
                future = reward[:, t + 1] + cont[:, t + 1] * mixed
                returns.insert(0, future)
            returns = torch.stack(returns, 1)
            low, high = np.percentile(returns.numpy(), [5, 95])
            # the task's range moves by 1%, and counts at least 1; the other is that of the moment
            scale = max(1.0, 0.01 * (high - low)) if critic is agent.critic else high - low
            advantages.append((returns - value[:, :-1]) / scale)
        mixed = 0.25 * advantages[0] + 0.75 * advantages[1]
        weight = cont.cumprod(1)[:, :-1] / gamma
        expected = -weight * (mixed * logp + 0.1 * entropy)
        slow = agent.slow_intrinsic(feat).pred()[:, :-1]
        values = weight * agent.intrinsic_critic(feat[:, :-1]).loss(returns, slow)
    np.testing.assert_allclose(losses["policy"].detach(), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(losses["intrinsic_value"].detach(), values, rtol=1e-3, atol=1e-4)

def test_critics_and_normalisers_are_separate():
    agent = make_agent("plan2explore")
    before = {name: x.clone() for name, x in agent.named_parameters()}
    agent.update(batch_of(agent))
    assert not torch.equal(agent.retnorm.range, agent.intrinsic_norm.range)
    for name, x in agent.slow_intrinsic.named_parameters():  # a tau of the way to the new critic
        old = before[f"slow_intrinsic.{name}"]
        new = agent.intrinsic_critic.get_parameter(name)
        torch.testing.assert_close(x, old + agent.args.tau * (new - old))
        assert not x.requires_grad

def test_small_disagreements_are_scaled_up():
    norm = plan2explore.RangeNormalizer(rate=1.0)
    returns = torch.rand(1000)
    scales = [float(norm(returns * size)) for size in (1.0, 1e-4)]
    assert scales[0] == pytest.approx(np.diff(np.percentile(returns, [5, 95]))[0], rel=1e-4)
    assert scales[1] == pytest.approx(1e-4 * scales[0], rel=1e-4)

# when

def test_the_switch_to_the_task_comes_with_the_step_that_was_named():
    agent = make_agent("plan2explore", total_timesteps=3000, explore_steps=1000)
    for step, exploring in ((0, 1), (999, 1), (1000, 0), (2999, 0)):
        for progress in (0.1, 0.9):  # which a run that was made longer reaches at another step
            agent.anneal(progress, step)
            assert float(agent.exploring) == exploring

# action noise

def test_noisy_choices_have_the_policys_probabilities_mixed_with_uniform_ones():
    agent = make_agent("plan2explore", actions=Dict(a=Discrete(3), b=MultiBinary(2)),
                       intrinsic_weight=0.0, action_noise=0.4)
    assert type(agent) is plan2explore.Explorer and not hasattr(agent.wm, "ensemble")
    one = {"deter": torch.randn(1, 64), "stoch": agent.wm.rssm.initial(1)["stoch"]}
    many = {name: x.expand(40_000, *x.shape[1:]) for name, x in one.items()}
    chosen = agent.choose_action(many, torch.rand(40_000, 3)).mean(0)
    probs = torch.cat([part.probs[0] for part in agent.actor(dreamer.features(one)).parts])
    uniform = torch.tensor([1 / 3] * 3 + [1 / 2] * 4)
    torch.testing.assert_close(chosen, 0.6 * probs + 0.4 * uniform, atol=0.012, rtol=0)

def test_noise_on_numbers_adds_its_variance_and_ends_with_exploring_and_in_evaluations():
    agent = make_agent("plan2explore", actions=Box(-1, 1, (2,)), intrinsic_weight=0.0,
                       action_noise=2.0)
    one = {"deter": torch.randn(1, 64), "stoch": agent.wm.rssm.initial(1)["stoch"]}
    many = {name: x.expand(40_000, *x.shape[1:]) for name, x in one.items()}
    policy, = agent.actor(dreamer.features(one)).parts
    noise = torch.rand(40_000, 2)
    deviation = agent.choose_action(many, noise).std(0)
    torch.testing.assert_close(deviation, (policy.std[0]**2 + 4).sqrt(), rtol=0.03, atol=0)
    with agent.evaluating():
        torch.testing.assert_close(agent.choose_action(many, noise), policy.sample(noise))
    assert float(agent.exploring) == 1
    agent.anneal(1.0, step=10_000)
    torch.testing.assert_close(agent.choose_action(many, noise), policy.sample(noise))

def test_a_chance_above_one_is_refused_where_there_are_choices():
    spaces = dict(actions=Dict(a=Discrete(3), b=Box(-1, 1, (2,))), intrinsic_weight=0.0)
    assert make_agent("plan2explore", action_noise=1.0, **spaces)
    with pytest.raises(dreamer.InputError, match="action_noise 1.5 is a chance"):
        make_agent("plan2explore", action_noise=1.5, **spaces)

def test_an_ensemble_of_one_is_refused_in_a_sentence():
    with pytest.raises(dreamer.InputError, match="members 1 cannot disagree: take 2 or more"):
        make_agent("plan2explore", members=1)

def test_values_that_no_run_could_use_are_refused_as_in_the_base():
    with pytest.raises(dreamer.InputError, match="gamma"):
        make_agent("plan2explore", gamma=2.0)
