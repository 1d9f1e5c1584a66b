"""variants/masked.py: against torch.distributions over the allowed choices, and in a game that does
not forgive a forbidden one."""
import dataclasses
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from torch.distributions import Categorical

sys.path.insert(0, str(Path(__file__).resolve().parent))
import masked
import test_variants
from test_variants import batch_of, tiny  # noqa: F401, the fixture gives a tiny size

import dreamer

CHOICES = 7
SPACE = Dict({"action_mask": MultiBinary(CHOICES), "x": Box(-1, 1, (3,))})

class Strict(gym.Env):
    """Three random choices are allowed at a time; any other one is an error."""
    observation_space = SPACE
    action_space = Discrete(CHOICES)

    def look(self):
        self.allowed = np.zeros(CHOICES, np.int8)
        self.allowed[self.np_random.choice(CHOICES, 3, replace=False)] = 1
        return {"action_mask": self.allowed, "x": self.np_random.random(3, np.float32)}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def step(self, action):
        assert self.allowed[action], "a forbidden choice"
        self.t += 1
        return self.look(), float(action), self.t == 6, False, {}

@pytest.fixture(autouse=True)
def strict(monkeypatch):
    spec = gym.envs.registration.EnvSpec("Strict-v0", Strict)
    monkeypatch.setitem(gym.registry, "Strict-v0", spec)

def make_agent(observations=SPACE, actions=Discrete(CHOICES), **values):
    return test_variants.make_agent("masked", observations, actions, kind=masked.Masked, **values)

def random_masks(*shape):
    """bool (…, C), with at least one choice allowed."""
    allowed = torch.rand(*shape, CHOICES) < 0.4
    allowed[..., 2] |= ~allowed.any(-1)
    return allowed

def dreams_of(agent):
    """A dream, its actions, and what the decoder says about its mask (N, H + 1, C)."""
    data = agent.training_data(batch_of(agent))
    noise = agent.learning_noise(data)
    with torch.no_grad():
        states = agent.wm.observe(data, noise["posterior"])
        dream, action = agent.dream(agent.dream_starts(states, data), noise)
        logits = agent.wm.decode(dream)["action_mask"]  # the decoder as a whole
    allowed = logits.reshape(*logits.shape[:2], -1, 2).argmax(-1).bool()
    return dream, action, allowed | ~allowed.any(-1, keepdim=True)

# ------------------------------------------------------------------------------ the distribution

def test_log_probabilities_entropies_and_gradients_are_those_of_the_allowed_choices_alone():
    torch.manual_seed(0)
    logits = (3 * torch.randn(20, CHOICES)).requires_grad_()
    allowed = random_masks(20)
    ours = masked.MaskedOneHot(logits, allowed)
    for i in range(20):
        names = allowed[i].nonzero()[:, 0]
        expected = Categorical(logits=logits[i, names])
        onehot = torch.eye(CHOICES)[names]
        row = masked.MaskedOneHot(logits[i], allowed[i])
        for now, then in ((row.log_prob(onehot), expected.log_prob(torch.arange(len(names)))),
                          (row.entropy(), expected.entropy())):
            torch.testing.assert_close(now, then)
            gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]
                         for x in (now, then)]
            torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
        assert (ours.probs[i] == 0).tolist() == (~allowed[i]).tolist()

def test_no_noise_and_no_mode_takes_a_forbidden_choice_and_samples_have_the_right_frequencies():
    torch.manual_seed(0)
    logits = torch.randn(2000, CHOICES)
    logits[:, 0] += 5  # forbidden below: the best and the last choice, and whatever else
    allowed = random_masks(2000)
    allowed[:, [0, CHOICES - 1]] = False
    allowed[:, 2] = True
    policy = masked.MaskedOneHot(logits, allowed)
    for noise in (0.0, 1 - 2**-24, 1 - 2**-23, None):  # uniform numbers are below 1
        noise = None if noise is None else torch.full((2000, 1), noise)
        assert not policy.sample(noise)[~allowed].any()
        assert (policy.sample(noise).sum(-1) == 1).all()
    one = masked.MaskedOneHot(logits[:1].expand(100_000, -1), allowed[:1].expand(100_000, -1))
    frequency = one.sample(torch.rand(100_000, 1)).mean(0)
    expected = Categorical(logits=logits[0].masked_fill(~allowed[0], -torch.inf)).probs
    torch.testing.assert_close(frequency, expected, atol=6e-3, rtol=0)

def test_where_nothing_is_allowed_everything_is():
    logits = torch.randn(5, CHOICES)
    policy = masked.MaskedOneHot(logits, torch.zeros(5, CHOICES, dtype=torch.bool))
    torch.testing.assert_close(policy.entropy(), Categorical(logits=logits).entropy())

def test_a_choice_whose_prediction_rounds_to_the_other_side_has_the_probability_it_had():
    logits = torch.randn(CHOICES)
    allowed = torch.arange(CHOICES) < 3
    before = masked.MaskedOneHot(logits, allowed | (torch.arange(CHOICES) == 5))
    after = masked.MaskedOneHot(logits, allowed)
    onehot = torch.eye(CHOICES)[5]
    torch.testing.assert_close(after.log_prob(onehot), before.log_prob(onehot))

# ------------------------------------------------------------------------------------- the agent

@pytest.mark.parametrize("deterministic", [False, True])
def test_when_acting_only_the_true_mask_counts(deterministic):
    agent = make_agent(scale=1.0)
    assert agent.actions.decode(torch.eye(CHOICES).numpy()).tolist() == list(range(CHOICES))
    state = None
    wrong = 0
    for t in range(15):
        mask = random_masks(8)
        obs = {"action_mask": mask.numpy().astype(np.int8), "x": np.zeros((8, 3), np.float32)}
        agent.act_rng.manual_seed(t)
        action, state = agent.act(obs, state, np.zeros(8, bool), deterministic)
        agent.act_rng.manual_seed(t)
        noise = None if deterministic else agent.acting_noise(8)["action"]
        policy = agent.actor(dreamer.features(state), mask)
        assert policy.sample(noise).argmax(-1).tolist() == action.tolist()
        chosen = torch.from_numpy(action)[:, None]
        assert mask.gather(1, chosen).all()
        predicted = agent.predicted_mask(dreamer.features(state))
        wrong += int((~predicted.gather(1, chosen)).sum())
    assert wrong > 0  # the untrained model would have forbidden some of them

@pytest.mark.parametrize("actions", [Discrete(CHOICES), MultiDiscrete([3, 4])])
def test_in_dreams_only_choices_are_taken_that_the_decoder_expects_to_be_allowed(actions):
    agent = make_agent(actions=actions, scale=0.5)
    _, action, allowed = dreams_of(agent)
    widths = [3, 4] if isinstance(actions, MultiDiscrete) else [CHOICES]
    forbidden = 0
    for taken, mask in zip(action.split(widths, -1), allowed[:, :-1].split(widths, -1)):
        mask = mask | ~mask.any(-1, keepdim=True)
        assert (taken.sum(-1) == 1).all() and not taken[~mask].any()
        forbidden += int((~mask).sum())
    assert forbidden > 100

def test_dreams_are_judged_by_the_distribution_that_their_actions_were_drawn_from():
    agent = make_agent(scale=0.3, ent_coef=0.5)
    dream, action, allowed = dreams_of(agent)
    losses, returns, _ = agent.judge(dream, action)
    agent.retnorm.range.zero_()
    feat = dreamer.features(dream)
    logits = agent.actor.outputs[0][0](agent.actor.mlp(feat)).masked_fill(~allowed, -torch.inf)
    policy = Categorical(logits=logits)
    wrapped = Reference(policy)
    with torch.no_grad():
        reward = agent.wm.reward(feat).pred()
        cont = agent.wm.cont(feat)[..., 0].sigmoid()
        slow = agent.slow_critic(feat).pred()
    expected, _, _ = dreamer.imagination_loss(
        wrapped, action, agent.critic(feat), slow, reward, cont, agent.retnorm, 1.0,
        agent.args.return_lambda, 0.5)
    torch.testing.assert_close(losses["policy"], expected["policy"])
    assert (~allowed).any()

class Reference:
    """torch's Categorical with the methods that the loss asks for."""
    def __init__(self, policy):
        self.policy = policy

    def log_prob(self, onehot):
        return self.policy.log_prob(onehot.argmax(-1))

    def entropy(self):
        p = self.policy.probs
        return -(p * p.clamp(min=1e-30).log()).sum(-1)

def test_the_actor_does_not_move_the_decoder_and_the_mask_is_learned_like_any_observation():
    agent = make_agent(rec_scale=10.0)
    dream, action, _ = dreams_of(agent)
    losses, _, _ = agent.judge(dream, action)
    losses["policy"].sum().backward()
    assert all(p.grad is None for p in agent.wm.parameters())
    assert agent.actor.mlp[0][0].weight.grad.abs().sum() > 0
    agent.optimizer.zero_grad()
    batch = batch_of(agent)
    batch["obs/action_mask"][:] = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    agent.optimizer.param_groups[0]["lr"].fill_(1e-2)
    for _ in range(12):
        agent.update(batch)
    states = agent.wm.observe(agent.training_data(batch), None)
    predicted = agent.predicted_mask(dreamer.features(states))
    assert (predicted.flatten(0, 1) == torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool()).all()

@pytest.mark.parametrize("observations, actions", [
    (Box(-1, 1, (3,)), Discrete(4)),
    (Dict(action_mask=MultiBinary(5)), Discrete(4)),
    (Dict(action_mask=Box(0, 1, (4,))), Discrete(4)),
    (Dict(action_mask=MultiBinary(4)), Box(-1, 1, (4,)))])
def test_other_spaces_are_refused_with_what_is_needed(observations, actions):
    with pytest.raises(dreamer.InputError, match="'action_mask', a MultiBinary with one entry"):
        make_agent(observations, actions)

def test_a_saved_and_loaded_masked_agent_makes_the_identical_next_update():
    agent, other = make_agent(), make_agent(seed=2)
    batch = batch_of(agent)
    agent.update(batch)
    other.load_state_dict(agent.state_dict())
    for ours, theirs in zip(agent.update(batch), other.update(batch)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)

def test_it_trains_saves_resumes_and_is_evaluated_without_one_forbidden_choice(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = masked.Args.preset("Strict-v0", size="tiny", cuda=False, compile=False, threads=1,
                              batch_size=2, batch_length=8, num_envs=2, total_timesteps=60,
                              eval_episodes=2, imagination_horizon=5,
                              train_ratio=4)
    first = dreamer.main(args, masked.Masked)
    assert first["updates"] > 0
    run, = (str(path) for path in Path("runs").iterdir())
    assert "masked" in run
    more = dataclasses.replace(args, resume=run, total_timesteps=80)
    second = dreamer.main(more, masked.Masked)
    assert second["global_step"] == 80 and second["updates"] > first["updates"]
    played = dreamer.main(dataclasses.replace(args, evaluate=run), masked.Masked)
    assert np.isfinite(played["eval_return_mean"])
