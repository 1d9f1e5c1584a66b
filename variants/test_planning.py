"""planning.py: plans against naive returns, the actor's own dreams, and models of known optimum."""
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary

sys.path.insert(0, str(Path(__file__).resolve().parent))
import planning
from test_variants import make_agent, tiny  # noqa: F401

import dreamer

MIXED = Dict(a=Discrete(3), b=MultiBinary(2), c=Box(-1, 1, (2,)))

def planner(actions=MIXED, **values):
    small = dict(plan_horizon=4, plan_candidates=12, plan_elites=3)
    return make_agent("planning", actions=actions, **small | values).requires_grad_(False)

def states_of(agent, n, seed=5):
    rng = torch.Generator().manual_seed(seed)
    stoch = agent.wm.rssm.latent(torch.randn(n, 6, 5, generator=rng)).sample(None)
    return {"deter": torch.randn(n, 64, generator=rng).tanh(), "stoch": stoch}

def naive_return(agent, state, actions, prior):
    """Return of one sequence (L, A) from one state, step by step, by the heads' definitions."""
    total, discount = 0.0, 1.0
    state = {name: x[None] for name, x in state.items()}
    for action, noise in zip(actions, prior):
        state = agent.wm.rssm.img_step(state, agent.wm.rssm.embed(action[None]), noise[None])
        feat = dreamer.features(state)
        total += discount * agent.wm.reward(feat).pred().item()
        discount *= torch.sigmoid(agent.wm.cont(feat)).item()
        discount *= 1.0 if agent.args.contdisc else agent.args.gamma
    return total + discount * agent.critic(feat).pred().item()

@pytest.mark.parametrize("contdisc", [True, False])
def test_a_score_is_the_mean_return_of_dreams_with_noise_that_all_sequences_share(contdisc):
    agent = planner(plan_dreams=2, contdisc=contdisc, gamma=0.9)
    states = states_of(agent, 3)
    noise = agent.planning_noise(3, agent.act_rng)
    plans = agent.actor_plans(states, noise)
    scores = agent.score(states, plans, noise["prior"])
    for n, p in ((0, 0), (1, 5), (2, 11)):
        state = {name: x[n] for name, x in states.items()}
        returns = [naive_return(agent, state, plans[n, p], noise["prior"][n, m]) for m in range(2)]
        assert scores[n, p].item() == pytest.approx(np.mean(returns), rel=1e-3, abs=1e-4)
    assert scores.std() > 0.01
    twice = torch.cat([plans, plans], 1)
    torch.testing.assert_close(agent.score(states, twice, noise["prior"]),
                               torch.cat([scores, scores], 1))

@pytest.mark.parametrize("iterations", [0, 3])
def test_in_the_model_a_plan_is_never_worse_than_what_the_actor_does_with_the_same_noise(
        iterations):
    better = 0
    for seed in range(2):
        agent = planner(plan_iterations=iterations)
        states = states_of(agent, 2, seed)
        noise = agent.planning_noise(2, agent.act_rng.manual_seed(seed))
        _, scores = agent.plan(states, noise)
        assert (scores.diff(dim=1) <= 0).all()  # best first
        for n in range(2):  # the actor's dreams from state n
            uniform = noise["actor"][12 * n : 12 * (n + 1)]
            dream, _ = agent.wm.rssm.imagine(
                {name: torch.stack(12 * [x[n]]) for name, x in states.items()},
                lambda s, t: agent.actor(dreamer.features(s)).sample(uniform[:, t]),
                4, torch.stack(12 * [noise["prior"][n, 0]]))
            feat = dreamer.features(dream)
            own = dreamer.lambda_return(
                agent.wm.reward(feat).pred(), agent.critic(feat).pred(),
                agent.wm.cont(feat)[..., 0].sigmoid(), 1.0)[:, 0]
            assert scores[n, 0] >= own.max() - 1e-4 * own.abs().max()
            better += scores[n, 0] > own.max() + 1e-4 * own.abs().max()
    assert (better > 0) == (iterations > 0)

def test_the_plan_reaches_the_optimum_of_a_model_that_the_actor_does_not_know():
    """A point that an action moves by at most 1 a step shall go from 0 to 1.5: 1, ½, 0, 0 is best.
    The second number of an action costs its square."""
    agent = planner(actions=Box(-1, 1, (2,)), plan_candidates=64, plan_elites=8,
                    plan_iterations=12)
    rssm = agent.wm.rssm
    rssm.embed = lambda action: action
    rssm.img_step = lambda state, action, noise: {
        "deter": torch.cat([state["deter"][:, :1] + action[:, :1], action[:, 1:],
                            state["deter"][:, 2:]], 1), "stoch": state["stoch"]}
    agent.dream_reward = lambda dream: -(
        (dream["deter"][..., 0] - 1.5) ** 2 + dream["deter"][..., 1] ** 2)
    agent.wm.cont[-1].weight.zero_()
    agent.wm.cont[-1].bias.fill_(30.0)
    agent.critic[-1].weight.zero_()
    agent.critic[-1].bias.zero_()
    states = rssm.initial(2)
    noise = agent.planning_noise(2, agent.act_rng)
    plans, scores = agent.plan(states, noise)
    assert torch.equal(agent.choose_action(states, noise), plans[:, 0, 0])
    assert not torch.equal(plans[:, 0, 0], plans[:, -1, 0])
    best = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(plans[:, 0], best.expand(2, -1, -1), atol=0.15, rtol=0)
    assert (scores[:, 0] > -0.25 - 0.05).all()  # that of the best is −(½)²

def test_the_plan_finds_the_one_sequence_of_choices_that_pays():
    """3^6 sequences: one choice of each step pays, and the actor hardly ever takes it."""
    agent = planner(actions=Discrete(3), plan_horizon=6, plan_candidates=40, plan_elites=6,
                    plan_iterations=10)
    agent.actor.outputs[0][0].weight.zero_()
    agent.actor.outputs[0][0].bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
    secret = torch.tensor([1, 2, 1, 1, 2, 2])
    agent.score = lambda state, plans, prior: (plans * F.one_hot(secret, 3)).sum((2, 3))
    plans, scores = agent.plan(states_of(agent, 3), agent.planning_noise(3, agent.act_rng))
    assert (plans[:, 0].argmax(-1) == secret).all() and (scores[:, 0] == 6).all()

def test_a_dream_of_the_actor_that_nothing_surpasses_is_kept_to_the_end():
    agent = planner(plan_iterations=3)
    states = states_of(agent, 1)
    noise = agent.planning_noise(1, agent.act_rng)
    pays = agent.actor_plans(states, noise)[:, 7:8]
    agent.score = lambda state, plans, prior: (plans == pays).all(-1).all(-1).float()
    plans, scores = agent.plan(states, noise)
    assert torch.equal(plans[:, 0], pays[:, 0]) and scores[0, 0] == 1

def test_drawn_sequences_have_the_frequencies_means_and_deviations_of_the_elites():
    agent = planner(plan_candidates=20_000, plan_horizon=1)
    rng = torch.Generator().manual_seed(2)
    one_hots = [F.one_hot(torch.randint(n, (1, 3, 1), generator=rng), n) for n in (3, 2, 2)]
    elites = torch.cat([*one_hots, torch.rand(1, 3, 1, 2, generator=rng)], -1)
    elites[..., -1] = 0.4  # all elites agree
    drawn = agent.fit(elites).sample(torch.rand(1, 20_000, 1, 5))[0, :, 0]
    chance = torch.tensor([1 / 3] * 3 + [1 / 2] * 4)
    expected = 0.9 * elites[0, :, 0, :7].mean(0) + 0.1 * chance
    torch.testing.assert_close(drawn[:, :7].mean(0), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn[:, 7:].mean(0), elites[0, :, 0, 7:].mean(0), atol=0.01, rtol=0)
    deviation = torch.tensor([elites[0, :, 0, 7].std(correction=0), 0.1])
    torch.testing.assert_close(drawn[:, 7:].std(0), deviation, atol=0, rtol=0.03)
    assert (drawn[:, :3].sum(1) == 1).all() and (drawn[:, 3:5].sum(1) == 1).all()

def test_streams_are_planned_for_independently():
    agent = planner(plan_dreams=2)
    states = states_of(agent, 3)
    noise = agent.planning_noise(3, agent.act_rng)
    together, scores = agent.plan(states, noise)
    for n in range(3):
        mine = {name: x.unflatten(0, (3, -1))[n] for name, x in noise.items()}
        alone, score = agent.plan({name: x[n : n + 1] for name, x in states.items()}, mine)
        torch.testing.assert_close(score[0], scores[n])
        torch.testing.assert_close(alone[0], together[n])

def test_with_one_candidate_and_no_iteration_it_acts_like_the_actor():
    agent = planner(plan_candidates=1, plan_elites=1, plan_iterations=0, actions=Discrete(4))
    states = states_of(agent, 50)
    noise = agent.planning_noise(50, agent.act_rng)
    plain = dreamer.Dreamer.choose_action(agent, states, noise["actor"][:, 0])
    assert torch.equal(agent.choose_action(states, noise), plain)

def test_without_noise_the_same_state_gets_the_same_action_and_numbers_stay_in_range():
    agent = planner()
    states = states_of(agent, 4)
    first = agent.choose_action(states, None)
    agent.act_rng.manual_seed(9)
    assert torch.equal(first, agent.choose_action(states, None))
    assert first[:, -2:].abs().max() <= 1
    plans = agent.actor_plans(states, agent.planning_noise(4, agent.act_rng))[..., -2:]
    assert plans.abs().max() == 1 and plans.abs().min() < 1
    obs = np.zeros((4, 3), np.float32)
    ones = np.ones(4, bool)
    actions = [agent.act(obs, None, ones, deterministic=True)[0] for _ in range(2)]
    assert all((actions[0][name] == actions[1][name]).all() for name in "abc")

def test_a_saved_run_of_dreamer_is_played_by_planning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = dreamer.Args.preset("CartPole-v1", size="tiny", cuda=False, threads=1, batch_size=2,
                               num_envs=2, total_timesteps=40, eval_episodes=1)
    with monkeypatch.context() as patch:
        patch.setattr(dreamer.Run, "evaluate", lambda run: None)  # takes time, and shows nothing
        dreamer.main(args)
    run, = (str(path) for path in Path("runs").iterdir())
    saved = planning.Args(**dreamer.load_file(run)["args"])  # as parse_args makes them
    saved = dataclasses.replace(saved, evaluate=run, plan_candidates=8, plan_horizon=2)
    assert dreamer.main(saved, planning.Planner)["eval_return_mean"] >= 1

@pytest.mark.parametrize("values, words", [
    (dict(plan_elites=9, plan_candidates=8), "plan_elites 9 are more than plan_candidates 8"),
    (dict(plan_horizon=0), "plan_horizon 0: take 1 or more"),
    (dict(plan_dreams=0), "plan_dreams 0: take 1 or more"), (dict(gamma=2.0), "gamma")])
def test_plans_that_cannot_be_made_are_refused_in_a_sentence(values, words):
    with pytest.raises(dreamer.InputError, match=words):
        planner(**values)
