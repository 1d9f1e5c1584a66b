"""What the variants change, each against something independent of their code."""
import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

sys.path.insert(0, str(Path(__file__).resolve().parent))
import decoder_free
import dreamer_v1
import gaussian_model
import plan2explore
import planning

import dreamer

VARIANTS = {"decoder_free": decoder_free.DecoderFree,
            "dreamer_v1": dreamer_v1.DreamerV1, "gaussian_model": gaussian_model.GaussianDreamer,
            "plan2explore": plan2explore.make_agent, "planning": planning.Planner}
SMALL = {"dreamer_v1": dict(batch_length=16),  # what else keeps a test short
         "planning": dict(plan_horizon=2, plan_candidates=8)}

@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(dreamer.SIZES, "tiny", dreamer.Size(64, 16, 5, 2, 16, latents=6))

def make_agent(name, observations=Box(-1, 1, (3,)), actions=Discrete(4), kind=None, scale=0.1,
               **values):
    """A tiny agent of a variant, whose class is `kind` where VARIANTS does not have it, with noise
    of `scale` on its weights, which else would begin with zeros."""
    torch.manual_seed(1)
    args = importlib.import_module(name).Args(
        size="tiny", cuda=False, compile=False, warmup=0, learning_rate=1e-3, num_envs=2,
        batch_length=8, imagination_horizon=5, image_size=48, **values)
    agent = (kind or VARIANTS[name])(observations, actions, args)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(scale * torch.randn(p.shape))
    return agent

def batch_of(agent, size=4):
    """Random rows of the shapes that the agent stores."""
    rng = torch.Generator().manual_seed(3)
    batch = {}
    for name, (shape, dtype) in agent.replay_specs().items():
        shape = (size, agent.args.batch_length + 1, *shape)
        x = torch.rand(shape, generator=rng)
        spec = agent.observations.specs.get(name.removeprefix("obs/"))
        top = min(spec.classes) if spec and spec.classes else 4
        batch[name] = x < 0.1 if dtype == torch.bool else (top * x).to(dtype)
    return batch

@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_and_loaded_variant_makes_the_identical_next_update(name):
    agent, other = make_agent(name), make_agent(name, seed=2)
    batch = batch_of(agent)
    agent.update(batch)
    other.load_state_dict(agent.state_dict())
    metrics, latents = agent.update(batch)
    same_metrics, same_latents = other.update(batch)
    for ours, theirs in ((metrics, same_metrics), (latents, same_latents)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert all(map(torch.equal, agent.parameters(), other.parameters()))

@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_saves_resumes_and_is_evaluated_by_the_code_of_the_base(
        name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = importlib.import_module(name).Args.preset(
        "CartPole-v1", size="tiny", cuda=False, threads=1, batch_size=2, num_envs=2,
        total_timesteps=60, eval_episodes=1, imagination_horizon=3, **SMALL.get(name, {}))
    first = dreamer.main(args, VARIANTS[name])
    assert first["updates"] > 0
    run, = (str(path) for path in Path("runs").iterdir())
    more = dataclasses.replace(args, resume=run, total_timesteps=80)
    second = dreamer.main(more, VARIANTS[name])
    assert second["global_step"] == 80 and second["updates"] > first["updates"]
    played = dreamer.main(dataclasses.replace(args, evaluate=run), VARIANTS[name])
    assert np.isfinite(played["eval_return_mean"])

def test_a_variant_takes_every_flag_of_the_base_and_its_own():
    args = dreamer.parse_args(["--env-id", "CartPole-v1", "--seed", "7", "--redundancy", "0.1"],
                              decoder_free.Args)
    assert (args.seed, args.redundancy, args.rec_scale) == (7, 0.1, 100.0)  # preset included
    assert isinstance(args, decoder_free.Args)

# decoder_free

def test_the_barlow_loss_is_that_of_numpys_correlation_matrix():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4))
    y = x @ rng.normal(size=(4, 4)) + 3
    c = np.corrcoef(x.T, y.T)[:4, 4:] * 49 / 50  # a deviation over N - 1 and a mean over N
    expected = sum((1 - c[i, i]) ** 2 for i in range(4))
    expected += 0.01 * sum(c[i, j] ** 2 for i in range(4) for j in range(4) if i != j)
    ours = decoder_free.barlow_loss(torch.from_numpy(x), torch.from_numpy(y), 0.01)
    assert float(ours) == pytest.approx(expected)

def test_without_a_decoder_the_state_learns_from_tokens_that_are_not_moved_towards_it():
    agent = make_agent("decoder_free")
    assert not [name for name, _ in agent.named_parameters() if "decoder" in name]
    data = agent.training_data(batch_of(agent))
    states = agent.wm.observe(data, None)
    states["tokens"].retain_grad()
    tokens = states["tokens"]
    loss = agent.wm.extra_losses(dict(states, deter=states["deter"].detach(),
                                      stoch=states["stoch"].detach()), data)["barlow"]
    loss.backward()
    assert tokens.grad is None  # as targets they have no gradient
    agent.wm.extra_losses(agent.wm.observe(data, None), data)["barlow"].backward()
    assert agent.wm.rssm.posterior[0][0].weight.grad.abs().sum() > 0
    assert agent.wm.encoder.mlp[0][0].weight.grad.abs().sum() > 0  # through the posterior

def test_the_weight_of_the_loss_is_the_argument_of_its_name():
    totals = []
    for scale in (0.0, 1.0):
        agent = make_agent("decoder_free", barlow_scale=scale)
        metrics, _ = agent.update(batch_of(agent))
        totals.append(metrics)
    assert "losses/rec" not in totals[0]
    difference = totals[1]["losses/total"] - totals[0]["losses/total"]
    assert float(difference) == pytest.approx(float(totals[1]["losses/barlow"]), rel=1e-4)
