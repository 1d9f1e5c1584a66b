"""Proofs for both scripts, in the order in which dreamer.py is read; what takes long stands last.
`pytest` runs them in minutes on two cores, without display, network or GPU.

A test's name is the sentence that it proves, and each compares with something independent: numbers
recorded from the author's code, torch.distributions, a naive loop, a closed form, a stream of
integers, an environment whose optimum is known. Tests of what both scripts have take the fixture
`script`, and run once with each. RUN_SLOW=1 adds further seeds and torch.compile; tests marked
`cuda` run where there is a GPU.
"""
import ast
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
import types
import warnings
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tqdm
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import Categorical, Independent, kl_divergence
from torch.utils._pytree import tree_map

import dreamer as D
import dreamer_marl as M

torch.set_num_threads(1)  # the layers are tiny: a second thread costs more than it brings
D.SIZES["tiny"] = TINY = D.Size(64, 16, 5, 2, 16, latents=6)  # feat has 64 + 6 · 5 = 94 numbers
M.SIZES["tiny"], TEAM = M.Size(*TINY), 2  # TEAM: latents of z_team, the last ones
slow = pytest.mark.skipif("RUN_SLOW" not in os.environ, reason="slow: set RUN_SLOW=1")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
VECTOR, CHOICE = Box(-np.inf, np.inf, (3,), np.float32), Discrete(4)
NEXT_STEP = gym.vector.AutoresetMode.NEXT_STEP

# --------------------------------------------------------------------------------------- helpers

def close(ours, theirs, rtol=1e-5, atol=1e-6):
    ours = torch.as_tensor(ours).detach().double().cpu()
    theirs = torch.as_tensor(theirs).detach().double().cpu()
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)

def equal(ours, theirs):
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))

def same(ours, theirs):
    """Two dicts hold the same tensors, bit by bit."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)

def onehots(classes, *shape):
    return F.one_hot(torch.randint(classes, shape), classes).float()

def weights(agent):
    return {name: p.detach().clone() for name, p in agent.named_parameters()}

SMALL = dict(  # values of a run that takes a second
    size="tiny", cuda=False, compile=False, threads=1, precision="float32", num_envs=2,
    total_timesteps=120, batch_size=4, batch_length=8, train_ratio=4, warmup=0, learning_rate=1e-3,
    imagination_horizon=4, image_size=48, eval_episodes=3, log_every=10, video_every=0,
    vectorization="sync")

def args_of(args_class=D.Args, **values):
    return args_class(**{"env_id": "test/Lengths-v0", **SMALL, **values})

def team_args(**values):
    return M.SocialArgs(**{"env_id": "hidden_match", "team_latents": TEAM, **SMALL, **values})

def perturbed(agent, scale):
    """Adds noise to all weights, because heads that begin at zero hide gradients and mistakes."""
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(scale * torch.randn(p.shape).to(p.device))
    return agent

def make_agent(observations=VECTOR, actions=CHOICE, perturb=0.0, agent_class=D.Dreamer, **values):
    args = args_of(**values)
    torch.manual_seed(args.seed)
    return perturbed(agent_class(observations, actions, args), perturb)

def make_team(observations=VECTOR, actions=CHOICE, seats=3, perturb=0.0, **values):
    args = team_args(**values)
    torch.manual_seed(args.seed)
    return perturbed(M.SocialDreamer(observations, actions, args, seats), perturb)

class Random(gym.Env):
    """Draws observations and rewards, ends after four steps, and insists on valid actions."""
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
        reward = float(self.np_random.normal())
        return self.observation_space.sample(), reward, self.left == 0, False, {}

class Loop:
    """The loop of `main` without the run around it: act, store, step, learn."""
    def __init__(self, agent, make, num_envs=2, capacity=4000, **dtypes):
        specs = {name: (shape, dtypes.get(name, dtype))
                 for name, (shape, dtype) in agent.replay_specs().items()}
        self.agent, self.state = agent, None
        self.envs = D.SyncVectorEnv([make] * num_envs, autoreset_mode=NEXT_STEP)
        self.replay = D.ReplayBuffer(capacity, num_envs, agent.args.batch_length, specs)
        self.obs, _ = self.envs.reset(seed=agent.args.seed)
        no = np.zeros(num_envs, bool)
        self.arrived = dict(reward=np.zeros(num_envs), is_first=~no, is_last=no, is_terminal=no)

    def step(self, updates=0, batch_size=8):
        """Rewards of one step of every environment."""
        action, self.state = self.agent.act(self.obs, self.state, self.arrived["is_first"])
        self.replay.add(self.arrived | self.agent.row(self.state))
        self.obs, reward, terminated, truncated, _ = self.envs.step(action)
        self.arrived = dict(reward=reward, is_first=self.arrived["is_last"],
                            is_last=terminated | truncated, is_terminal=terminated)
        for _ in range(updates if self.replay.count > 2 * self.replay.window else 0):
            batch = self.replay.sample(batch_size)
            _, latents = self.agent.update(batch)
            self.replay.write_back(batch, **latents)
        return reward

    def fill(self, steps=30):
        for _ in range(steps):
            self.step()
        return self

def batch_of(agent, observations=VECTOR, actions=CHOICE, size=4):
    """A batch of a replay that `agent` filled itself."""
    return Loop(agent, lambda: Random(observations, actions)).fill().replay.sample(size)

def learning_inputs(agent, batch, seed=5):
    """What the objective is computed from: data, and the noise of a generator of our own."""
    agent.learn_rng.manual_seed(seed)
    data = agent.training_data(batch)
    return data, agent.learning_noise(data)

class Lengths(gym.Env):
    """Pays 1 a step in episodes of random length: returns are known from the seed."""
    observation_space, action_space = Box(-1, 1, (2,), np.float32), Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 12))
        return self.see(), {}

    def see(self):
        return np.ones(2, np.float32)

    def pay(self):
        return 1.0

    def step(self, action):
        self.left -= 1
        return self.see(), self.pay(), self.left == 0, False, {}

def register(name, env):
    gym.register(f"test/{name}-v0", env)
    return env

register("Lengths", Lengths)

def beside(test):
    """Marks a test that takes long: a second process runs it while the others run here, and in its
    own turn it is only waited for."""
    test.beside = True
    return test

def run_beside(name, folder, values):
    """In the second process: the error of a test with `values` of its parameters, if it fails."""
    os.chdir(folder)
    test, script = globals()[name], SCRIPTS.get(values.get("script"))
    given = {**values, "script": script, "folder": folder, "tmp_path": folder}
    try:
        test(**{name: given[name] for name in inspect.signature(test).parameters})
    except BaseException:  # as those of pytest are
        return traceback.format_exc()

def wait_for(result, **_):
    if error := result.result():
        pytest.fail(error, pytrace=False)

@pytest.fixture(scope="session", autouse=True)
def second_process(request, tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for item in request.session.items:
            skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
            if hasattr(item.obj, "beside") and not skipped:
                values = item.callspec.params if hasattr(item, "callspec") else {}
                folder = tmp_path_factory.mktemp("beside")
                result = pool.submit(run_beside, item.originalname, folder, values)
                item.obj = functools.partial(wait_for, result)
        yield
        pool.shutdown(cancel_futures=True)

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def run_of(folder):
    """The folder of the only run."""
    run, = (folder / "runs").iterdir()
    return run

def summary_of(run):
    return json.loads((run / "summary.json").read_text())

# ---------------------------------------------------------------------------- time and alignment

class Echo(gym.Env):
    """Observes [action that led here, reward that came with it, terminated, truncated]; zeros
    after a reset."""
    observation_space = Box(-np.inf, np.inf, (6,), np.float32)
    action_space = Dict(c=Box(np.float32([-2, 0]), np.float32([4, 1])), d=Discrete(3, start=5))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, self.np_random.integers(1, 6)
        self.limit = self.np_random.random() < 0.5
        return np.zeros(6, np.float32), {}

    def step(self, action):
        self.t += 1
        reward, end = float(self.np_random.normal()), self.t == self.length
        flags = end and not self.limit, end and self.limit
        obs = np.float32([*action["c"], action["d"], reward, *flags])
        return obs, reward, bool(flags[0]), bool(flags[1]), {}

register("Echo", Echo)

def test_the_main_loop_aligns_observation_reward_flags_and_previous_action(folder):
    counts = []

    class Checked(D.Dreamer):
        def update(self, batch):
            data = self.training_data(batch)
            obs, first = data["obs"]["obs"], data["is_first"]
            action = self.actions.decode(data["prev_action"].flatten(0, 1).numpy())
            seen = np.concatenate([action["c"], action["d"][:, None]], 1).reshape(*first.shape, 3)
            close(torch.tensor(seen)[~first], obs[..., :3][~first], atol=1e-5)
            close(data["reward"], obs[..., 3])
            equal(data["is_terminal"], obs[..., 4] > 0)
            equal(data["is_last"], (obs[..., 4:] > 0).any(-1))
            assert not obs[first].any()
            equal(batch["is_first"][:, 1:], batch["is_last"][:, :-1])  # no step lies in between
            raw = batch["action"][..., :2]  # raw samples are stored, they are not clipped
            timeouts = data["is_last"] & ~data["is_terminal"]
            counts.append([x.sum().item() for x in (first, data["is_terminal"], timeouts, raw > 1)])
            return super().update(batch)

    args = args_of(env_id="test/Echo-v0", train_ratio=8, total_timesteps=200, buffer_size=80,
                   imagination_horizon=1)
    D.main(args, agent_class=Checked)  # the ring is overwritten
    assert len(counts) > 30 and np.min(np.sum(counts, 0)) > 50

def test_acting_and_training_give_the_same_state_for_the_same_inputs_and_noise():
    agent = make_agent(Echo.observation_space, Echo.action_space, perturb=0.5)
    drawn, uniform = [], agent.uniform
    agent.uniform = lambda rng, *shape: drawn.append(uniform(rng, *shape)) or drawn[-1]
    loop = Loop(agent, Echo, capacity=200, deter=torch.float32).fill(60)  # float32, to be exact
    noise = [x.view(2, 6, 1) for x in drawn if x.shape[-2:] == (6, 1)]
    noise = torch.stack(noise, 1)  # (environment, step, …)
    batch = loop.replay.sample(16)
    noise = noise[batch["env"], batch["row"][:, 1:]]
    states = agent.wm.observe(agent.training_data(batch), noise)
    close(states["deter"], batch["deter"][:, 1:], rtol=1e-4, atol=1e-5)
    equal(states["stoch"].argmax(-1), batch["stoch"][:, 1:].long())

def test_what_was_before_is_first_has_no_influence_on_acting():
    agent, obs = make_agent(perturb=0.5), np.ones((2, 3), np.float32)
    _, state = agent.act(obs, None, np.ones(2, bool))
    _, fresh = agent.act(obs, None, np.ones(2, bool), deterministic=True)
    _, reset = agent.act(obs, state, np.array([True, False]), deterministic=True)
    close(reset["deter"][0], fresh["deter"][0])
    assert not torch.allclose(reset["deter"][1], fresh["deter"][1])

def test_update_returns_the_latents_of_the_trained_steps_and_leaves_its_batch_as_it_was():
    agent, batch = make_agent(perturb=0.3), batch_of(make_agent(perturb=0.3))
    before = {name: x.clone() for name, x in batch.items()}
    data, noise = learning_inputs(agent, batch)
    states = agent.wm.observe(data, noise["posterior"])
    agent.learn_rng.manual_seed(5)  # as in learning_inputs
    _, latents = agent.update(batch)
    same(batch, before)
    close(latents["deter"], states["deter"])
    equal(latents["stoch"], states["stoch"].argmax(-1).byte())

# ---------------------------------------------------------------------------------------- replay

def integers(capacity=60, envs=3, length=4, steps=0, seed=0, device="cpu"):
    """A replay whose rows say where they come from: step t of environment e holds (e, t)."""
    specs = {"env_id": ((), torch.int64), "t": ((), torch.int64), "stoch": ((2,), torch.int64),
             "is_last": ((), torch.bool)}
    replay = D.ReplayBuffer(capacity, envs, length, specs, seed, device)
    for t in range(steps):
        add(replay, t)
    return replay

def add(replay, t):
    e = np.arange(replay.num_envs)
    stoch = np.stack([1000 * e + t] * 2, 1)
    replay.add({"env_id": e, "t": np.full(len(e), t), "stoch": stoch, "is_last": e < 0})

@pytest.mark.parametrize("steps", [5, 12, 20, 21, 33, 47])
def test_windows_are_consecutive_steps_of_one_environment_and_never_cross_the_write_head(steps):
    replay = integers(steps=steps)
    assert len(replay) == 3 * min(steps, 20)
    for _ in range(20):
        batch = replay.sample(16)
        equal(batch["t"].diff(dim=1), torch.ones(16, 4))
        assert (batch["env_id"] == batch["env"]).all()
        assert batch["t"].min() >= max(0, steps - 20) and batch["t"].max() < steps  # the last 20

def test_uniform_draws_cover_all_windows_of_all_environments_evenly():
    replay, n = integers(steps=33), 6400
    replay.sample(1000)  # empties the queue of new windows
    batch, counts = replay.sample(n), torch.zeros(3, 33)
    counts.index_put_((batch["env"][:, 0], batch["t"][:, 0]), torch.ones(n), accumulate=True)
    assert not counts[:, :13].any() and not counts[:, 29:].any()  # 33 steps, 20 rows, windows of 5
    expected = n / (3 * 16)
    chi_square = ((counts[:, 13:29] - expected) ** 2 / expected).sum()
    assert chi_square < 48 + 5 * (2 * 48) ** 0.5  # five standard deviations
    others = [integers(steps=33, seed=seed).sample(64)["t"] for seed in (1, 2)]
    assert not torch.equal(*others)

def test_the_online_queue_serves_every_fresh_step_once_before_uniform_draws():
    replay, waiting, served = integers(capacity=300), 0, []
    for t in range(50):
        add(replay, t)
        waiting += 3 * (t % 5 == 4)  # a window of every environment is complete
        if t % 7 == 6:
            batch = replay.sample(4)
            fresh = zip(batch["env"][:waiting], batch["t"][:waiting])
            served += [(int(e), int(t)) for e, row in fresh for t in row]
            waiting = max(0, waiting - 4)
    equal(replay.sample(1, online=False)["t"].shape, (1, 5))  # which takes nothing out of the queue
    batch = replay.sample(waiting)
    served += [(int(e), int(t)) for e, row in zip(batch["env"], batch["t"]) for t in row]
    for e in range(3):  # and in the order in which they came
        assert [t for environment, t in served if environment == e] == list(range(50))
    assert waiting > 0

def test_fresh_windows_that_were_overwritten_before_their_turn_are_not_served():
    replay = integers(steps=48)  # nine windows of each environment were queued, 20 rows are left
    assert replay.sample(30)["t"].min() >= 28

def test_write_back_changes_exactly_the_trained_rows_of_the_sampled_windows():
    replay = integers(steps=33)
    batch = replay.sample(6)
    replay.write_back(batch, stoch=-batch["stoch"][:, 1:])
    written = {(int(e), int(t)) for e, row in zip(batch["env"], batch["t"]) for t in row[1:]}
    for e, row in itertools.product(range(3), range(20)):
        t = int(replay.data["t"][e, row])
        sign = -1 if (e, t) in written else 1
        equal(replay.data["stoch"][e, row], torch.tensor([sign * (1000 * e + t)] * 2))

def test_steps_that_several_windows_share_get_all_their_latents_from_the_last_one():
    replay = integers(capacity=30, envs=1, steps=10)
    batch = {"env": torch.zeros(3, 1, dtype=torch.long), "row": torch.arange(5).repeat(3, 1)}
    batch["row"] += torch.tensor([[2], [0], [1]])
    number = torch.arange(1, 4)[:, None].expand(3, 4)
    replay.write_back(batch, stoch=-number[..., None].expand(3, 4, 2), t=-number)
    expected = [0, -2, -3, -3, -3, -3, -1, 7, 8, 9]
    equal(replay.data["t"][0, :10], expected)
    equal(replay.data["stoch"][0, 1:7, 1], expected[1:7])

def test_a_saved_replay_takes_the_space_of_what_it_holds_and_is_not_copied(tmp_path):
    for capacity, steps in ((300_000, 20), (60, 33)):
        replay = integers(capacity=capacity, steps=steps)
        torch.save(replay.state_dict(), tmp_path / "replay.pt")
        assert (tmp_path / "replay.pt").stat().st_size < 50_000
        for name, envs in replay.state_dict()["data"].items():
            assert [x.data_ptr() for x in envs] == [x.data_ptr() for x in replay.data[name]]

def test_free_memory_is_what_the_container_leaves_shared_by_the_processes(tmp_path, monkeypatch):
    for name, text in dict(max="4000", current="3000", stat="anon 1\ninactive_file 500\n").items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(D, "Path", lambda x: Path(x.replace("/sys/fs/cgroup", str(tmp_path))))
    assert D.free_bytes("cpu") == 1500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert D.free_bytes("cpu") == 750
    (tmp_path / "memory.max").write_text("max")
    assert 10**6 < D.free_bytes("cpu") < 10**13

def test_a_restored_replay_draws_what_the_saved_one_would_have_and_ends_broken_episodes(tmp_path):
    replay = integers(steps=33)
    replay.sample(2)
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    restored = integers(seed=9)
    restored.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    assert len(restored) == len(replay)
    assert restored.data["is_last"].sum() == 3 and restored.data["is_last"][:, 32 % 20].all()
    for t in range(33, 60):
        add(replay, t)
        add(restored, t)
        ours, theirs = (x.sample(3) for x in (restored, replay))
        same(ours | {"is_last": None}, theirs | {"is_last": None})

@pytest.mark.parametrize("capacity, newest", [(90, 20), (45, 15)])
def test_a_ring_of_another_capacity_is_unrolled_and_keeps_the_newest_steps(capacity, newest):
    saved = integers(steps=33).state_dict()  # 20 rows of each environment: steps 13 to 32
    restored = integers(capacity=capacity, seed=9)
    restored.load_state_dict(saved)
    assert len(restored) == 3 * newest
    for t in range(33, 40):
        add(restored, t)
    windows = torch.cat([restored.sample(8)["t"] for _ in range(100)])
    assert (windows.diff(dim=1) == 1).all()  # in the order of time, none crosses the seam
    kept = min(newest + 7, capacity // 3)
    assert windows.min() == 40 - kept and windows.max() == 39
    del saved["window"]  # as in earlier versions
    longer = integers(length=11)  # for which the newest windows of the queue have no end yet
    longer.load_state_dict(saved)
    assert (longer.sample(16)["t"].diff(dim=1) == 1).all()
    shorter = integers(length=2)  # of which those of the queue would begin too far apart
    shorter.load_state_dict(saved | {"window": 5})
    assert not shorter.online
    with pytest.raises(D.InputError, match="layout"):
        integers(envs=2).load_state_dict(saved)

@cuda
def test_a_replay_on_the_gpu_gives_the_windows_of_one_on_the_cpu():
    ours, theirs = (integers(steps=33, device=device).sample(16)["t"] for device in ("cuda", "cpu"))
    assert ours.is_cuda and torch.equal(ours.cpu(), theirs)

# ------------------------------------------------------------------ two-hot and other predictions

def test_symexp_inverts_symlog():
    x = torch.tensor([-1e6, -3.0, -0.1, 0.0, 1e-3, 1.0, 250.0, 1e8], dtype=torch.float64)
    close(D.symexp(D.symlog(x)), x, rtol=1e-9)
    close(D.symlog(torch.tensor([np.e - 1, 1 - np.e])), [1.0, -1.0])

def test_two_hot_bins_are_antisymmetric_and_evenly_spaced_in_symlog():
    bins = D.SymexpTwoHot(torch.zeros(255)).bins
    equal(bins, -bins.flip(0))
    assert bins[127] == 0 and (bins.diff() > 0).all()
    even = torch.linspace(-20, 20, 255, dtype=torch.float64)
    close(D.symlog(bins.double()), even, rtol=1e-5, atol=1e-5)

def two_hot(x, bins):
    """Target by a loop: linear in raw space between the neighbouring bins, clipped at the ends."""
    target, x = np.zeros(len(bins)), min(max(float(x), float(bins[0])), float(bins[-1]))
    for i in range(len(bins) - 1):
        if bins[i] <= x <= bins[i + 1]:
            target[:] = 0
            target[i] = (bins[i + 1] - x) / (bins[i + 1] - bins[i])
            target[i + 1] = 1 - target[i]
    return target

def test_two_hot_loss_is_cross_entropy_to_a_target_interpolated_in_raw_space():
    torch.manual_seed(0)
    x = torch.tensor([0, 0.01, -0.07, 1, -1, 3.7, -250, 12345.6, 4.8e8, -4.8e8, 1e12, -1e12])
    logits = torch.randn(len(x), 255, requires_grad=True)
    dist = D.SymexpTwoHot(logits)
    targets = torch.tensor(np.stack([two_hot(v, dist.bins.double().numpy()) for v in x]))
    loss = dist.loss(x)
    close(loss, -(targets * logits.double().log_softmax(-1)).sum(-1), rtol=1e-4)
    close(dist.loss(x, 2 * x, x.flip(0)), loss + dist.loss(2 * x) + dist.loss(x.flip(0)))
    loss.sum().backward()  # its gradient is p − target
    mass = logits.detach().softmax(-1) - logits.grad
    close(mass, targets, atol=1e-4)
    assert (mass.abs() > 1e-5).sum(-1).max() == 2
    inside = x.abs() < 1e8  # the mean of a target is the number that it stands for
    close((targets * dist.bins.double()).sum(-1)[inside], x[inside], rtol=1e-4)

def test_two_hot_mean_is_the_sum_over_bins_and_exactly_zero_for_zero_logits():
    torch.manual_seed(0)
    logits = torch.randn(7, 255) * 3
    logits[:, :64] -= 60  # without the outermost bins, whose size would hide all others
    logits[:, -64:] -= 60
    dist = D.SymexpTwoHot(logits)
    mean = (logits.double().softmax(-1) * dist.bins.double()).sum(-1)
    close(dist.pred(), mean, rtol=1e-4, atol=1e-2)
    equal(D.SymexpTwoHot(torch.zeros(5, 255)).pred(), torch.zeros(5))
    equal(D.SymexpTwoHot(torch.full((5, 255), 1.3)).pred(), torch.zeros(5))

def test_rewards_and_values_are_exactly_zero_before_learning():
    agent, feat = make_agent(), torch.randn(20, 94)
    for head in (agent.wm.reward, agent.critic, agent.slow_critic):
        equal(head(feat).pred(), torch.zeros(20))

def mixed(logits, unimix=0.01):
    """Categoricals with a hundredth of the uniform distribution, by torch.distributions."""
    probs = (1 - unimix) * logits.softmax(-1) + unimix / logits.shape[-1]
    return Independent(Categorical(probs=probs), 1)

@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.3])
def test_one_hot_samples_have_the_mixed_frequencies_and_a_straight_through_gradient(unimix):
    torch.manual_seed(0)
    logits = (2 * torch.randn(3, 5)).requires_grad_()
    reference, dist, n = mixed(logits, unimix).base_dist, D.OneHot(logits, unimix), 10_000
    grid = ((torch.arange(n) + 0.5) / n)[:, None, None].expand(n, 3, 1)  # exact to 1/n
    sample = D.OneHot(logits.expand(n, 3, 5), unimix).sample(grid)
    close(sample.mean(0), reference.probs, atol=2 / n)
    close(sample.sort(-1).values, torch.tensor([0.0, 0, 0, 0, 1]).expand(n, 3, 5), atol=1e-6)
    equal(dist.sample(None).argmax(-1), reference.probs.argmax(-1))
    equal(dist.sample(torch.zeros(3, 1)).argmax(-1), torch.zeros(3).long())
    equal(dist.sample(torch.full((3, 1), 1 - 2**-24)).argmax(-1), torch.full((3,), 4))
    factor, sample = torch.randn(3, 5), dist.sample(torch.rand(3, 1))
    ours, theirs = (torch.autograd.grad((factor * x).sum(), logits)[0]
                    for x in (sample, reference.probs))
    close(ours, theirs)
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
    assert ours.sample(torch.tensor([0.0, 0.5, 1.0]).expand(4, 3)).isfinite().all()

def test_an_action_samples_every_head_with_noise_of_its_own_and_sums_over_heads():
    space = Dict(a=Discrete(3), b=Box(-1, 1, (2,)), c=MultiDiscrete([2, 4]))
    agent, feat = make_agent(actions=space, perturb=0.5), torch.randn(5, 94)
    dist, noise = agent.actor(feat), torch.rand(5, agent.actions.noise_size)
    x = agent.actor.mlp(feat)
    out = [[layer(x) for layer in layers] for layers in agent.actor.outputs]
    std = 0.9 * (out[1][1] + 2).sigmoid() + 0.1
    normal = torch.distributions.Normal(out[1][0].tanh(), std)
    choices = [Categorical(logits=z) for z in (out[0][0], *out[2][0].split([2, 4], -1))]
    action = dist.sample(noise)
    a, b, *c = action.split([3, 2, 2, 4], -1)
    close(b, normal.icdf(noise[:, 1:3]), rtol=1e-4, atol=1e-5)
    logp, entropy = normal.log_prob(b).sum(-1), normal.entropy().sum(-1)
    for chosen, reference, u in zip((a, *c), choices, noise[:, [0, 3, 4]].unbind(1)):
        index = chosen.argmax(-1)
        equal(index, (reference.probs.cumsum(-1) < u[:, None]).sum(-1))
        logp, entropy = logp + reference.log_prob(index), entropy + reference.entropy()
    close(dist.log_prob(action), logp, atol=1e-5)
    close(dist.entropy(), entropy, atol=1e-5)

# ---------------------------------------------------------------------------------------- layers

def test_rms_norm_divides_by_the_root_mean_square_in_float32():
    torch.manual_seed(0)
    norm, x = D.RMSNorm(12), torch.randn(5, 12)
    norm.weight.data.uniform_(0.5, 2)
    close(norm(x), x / ((x**2).mean(-1, keepdim=True) + 1e-4).sqrt() * norm.weight)
    tiny = torch.full((1, 12), 1e-3)
    close(norm(tiny), 1e-3 / (1e-6 + 1e-4) ** 0.5 * norm.weight[None])  # eps lies inside the root
    low = x.bfloat16()
    assert norm(low).dtype == torch.bfloat16
    equal(norm(low), norm(low.float()).bfloat16())  # scales that bfloat16 would round are not

def test_block_linear_is_a_linear_layer_on_each_block_and_all_of_the_shared_inputs():
    torch.manual_seed(0)
    layer, x, shared = D.BlockLinear(24, 16, 8, shared=5), torch.randn(7, 24), torch.randn(7, 5)
    layer.bias.data.normal_()
    blocks = [torch.cat([own, shared], 1) @ weight + bias for own, weight, bias
              in zip(x.split(3, 1), layer.weight, layer.bias.split(2))]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(layer(x, shared), torch.stack(blocks, 1))
    plain = D.BlockLinear(24, 16, 8)
    close(plain(x).flatten(1), x @ torch.block_diag(*plain.weight), atol=1e-5)

def test_weights_start_as_truncated_normals_of_the_full_fan_in():
    torch.manual_seed(0)
    fans = {D.Linear(400, 300).weight: 400, D.BlockLinear(512, 512, 8, shared=192).weight: 2048,
            D.Conv(32, 64).conv.weight: 25 * 32}  # of a block layer those of all blocks count
    for weight, fan_in in fans.items():  # truncation leaves a standard deviation of 0.8796
        close(weight.std(), 1.1368 * 0.8796 / fan_in**0.5, rtol=1e-2)
        assert weight.abs().max() <= 2 * 1.1368 / fan_in**0.5 + 1e-7
    close(D.Linear(400, 300, outscale=0.01).weight.std(), 1e-2 / 20, rtol=2e-2)

def test_upsampling_repeats_every_pixel():
    x = torch.randn(2, 3, 4, 5)
    assert np.array_equal(D.upsample(x).numpy(), x.numpy().repeat(2, 1).repeat(2, 2))

def test_the_smallest_size_has_640867_trainable_parameters_on_walker():
    args = D.Args(size="1m", cuda=False, compile=False)
    agent = D.Dreamer(Box(-np.inf, np.inf, (24,)), Box(-1, 1, (6,)), args)
    assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == 640_867

@pytest.mark.parametrize("size,millions", [
    ("1m", 0.69), ("12m", 10.5), ("25m", 23.5), ("50m", 41.7), ("100m", 93.5), ("200m", 166.0),
    ("400m", 372.9)])
def test_every_size_has_the_published_number_of_parameters_for_images_and_18_actions(
        size, millions):
    dims = D.SIZES[size]
    specs, heads = {"obs": D.ObsSpec("image", (64, 64, 3), 3)}, {"a": ("discrete", (18,))}
    feat = dims.deter + dims.latents * dims.classes
    with torch.device("meta"):  # shapes without memory
        modules = (D.WorldModel(specs, 18, D.Args(size=size)), D.Actor(feat, heads, dims.units),
                   D.Critic(feat, dims.units))
    count = sum(p.numel() for module in modules for p in module.parameters())
    assert round(count / 1e6, 2 if millions < 1 else 1) == millions, count

# -------------------------------------------------------------------------------------------- KL

def test_kl_is_that_of_torch_distributions_with_free_nats_after_the_sum_over_latents():
    torch.manual_seed(0)
    rssm = D.RSSM(8, 3, TINY)
    scale = torch.tensor([0.05, 0.8, 1.0, 3.0, 30.0])[:, None, None]
    post, prior = scale * torch.randn(5, 6, 5), scale * torch.randn(5, 6, 5)
    kl = kl_divergence(mixed(post), mixed(prior))
    assert kl[0] < 1 < kl[1] < 6  # free nats before the sum would give another number
    for loss in rssm.kl_loss(post, prior):
        close(loss, kl.clamp(min=1), rtol=1e-4)
    close(rssm.kl_loss(post, prior, free=0.0)[0], kl, rtol=1e-4)
    assert rssm.kl_loss(1e4 * post, -1e4 * post)[0].isfinite().all()

def test_dyn_moves_only_the_prior_and_rep_only_the_posterior_and_neither_below_the_free_nats():
    torch.manual_seed(0)
    rssm = D.RSSM(8, 3, TINY)
    logits = [torch.randn(4, 6, 5, requires_grad=True) for _ in range(2)]
    post, prior = logits
    kl = kl_divergence(mixed(post), mixed(prior)).sum()
    want_post, want_prior = torch.autograd.grad(kl, logits)
    dyn, rep = (x.sum() for x in rssm.kl_loss(post, prior))
    nothing, prior_grad = torch.autograd.grad(dyn, logits, allow_unused=True)
    close(prior_grad, want_prior, atol=1e-5)
    assert nothing is None or not nothing.any()
    post_grad, nothing = torch.autograd.grad(rep, logits, allow_unused=True)
    close(post_grad, want_post, atol=1e-5)
    assert nothing is None or not nothing.any()
    dyn, rep = rssm.kl_loss(0.01 * post, 0.01 * prior)
    assert not any(x.any() for x in torch.autograd.grad((dyn + rep).sum(), logits))

# -------------------------------------------------------------------------- recurrence and dreams

def sequence(batch=3, length=9, tokens=8, actions=3):
    """An RSSM, a state (B, …) and inputs (B, T, …) for `observe`."""
    torch.manual_seed(0)
    rssm = D.RSSM(tokens, actions, TINY)
    state = {"deter": torch.randn(batch, 64), "stoch": onehots(5, batch, 6)}
    inputs = {"tokens": torch.randn(batch, length, tokens),
              "action": 2 * torch.randn(batch, length, actions),
              "is_first": torch.zeros(batch, length, dtype=torch.bool),
              "noise": torch.rand(batch, length, 6, 1)}
    return rssm, state, inputs

def block_gru(rssm, state, action):
    """deter (B, D) as the specification has it, block by block; biases are zero at first."""
    def normed(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt()

    deter, stoch, unit = state["deter"], state["stoch"].flatten(1), action.clamp(-1, 1)
    nets = (rssm.deter_in, deter), (rssm.stoch_in, stoch), (rssm.action_in, unit)
    inputs = torch.cat([F.silu(net[1].weight * normed(net[0](x))) for net, x in nets], 1)
    own = deter.split(8, 1)
    hidden = [torch.cat([own[g], inputs], 1) @ rssm.hidden.weight[g] for g in range(8)]
    hidden, new = F.silu(normed(torch.cat(hidden, 1))).split(8, 1), []
    for g in range(8):
        reset, candidate, update = (hidden[g] @ rssm.gates.weight[g]).split(8, -1)
        u = torch.sigmoid(update - 1)
        new.append(u * torch.tanh(reset.sigmoid() * candidate) + (1 - u) * own[g])
    return torch.cat(new, 1)

def dream_one_step(rssm, state, action, noise=None):
    """The state after one dreamed step."""
    noise = None if noise is None else noise[:, None]
    dream, _ = rssm.imagine(state, lambda state, t: action, 1, noise)
    return {name: x[:, 1] for name, x in dream.items()}

def test_dreaming_and_observing_share_one_recurrence_the_block_gru_of_the_specification():
    rssm, state, inputs = sequence()
    states = rssm.observe(state, **inputs)
    for t, action in enumerate(inputs["action"].unbind(1)):
        expected = block_gru(rssm, state, action)
        close(dream_one_step(rssm, state, action)["deter"], expected, atol=1e-5)
        close(states["deter"][:, t], expected, atol=1e-5)
        state = {name: x[:, t] for name, x in states.items()}

def test_an_action_outside_of_the_unit_interval_counts_as_its_sign_and_scales_its_gradient():
    rssm, state, _ = sequence(batch=1)
    action = torch.tensor([[0.3, -5.0, 7.0]], requires_grad=True)
    unit = torch.tensor([[0.3, -1.0, 1.0]], requires_grad=True)
    ours, theirs = (dream_one_step(rssm, state, a)["deter"] for a in (action, unit))
    close(ours, theirs)
    got, = torch.autograd.grad((state["deter"] * ours).sum(), action)
    want, = torch.autograd.grad((state["deter"] * theirs).sum(), unit)
    close(got, want / torch.tensor([[1.0, 5.0, 7.0]]))  # no gradient through the denominator

def test_two_episodes_joined_by_is_first_equal_two_separate_runs():
    rssm, state, inputs = sequence()
    inputs["is_first"][:, 5] = True
    joined = rssm.observe(state, **inputs)
    before = rssm.observe(state, **{name: x[:, :5] for name, x in inputs.items()})
    after = {name: x[:, 5:].clone() for name, x in inputs.items()}
    after["action"][:, 0] = 0  # nothing was done before the first step of an episode
    after["is_first"][:] = False
    after = rssm.observe(rssm.initial(3), **after)
    for name, x in joined.items():
        close(x, torch.cat([before[name], after[name]], 1))

def test_later_observations_actions_and_noise_cannot_change_earlier_states():
    rssm, state, inputs = sequence()
    base = rssm.observe(state, **inputs)
    for name in ("tokens", "action", "noise"):
        changed = {k: x.clone() for k, x in inputs.items()}
        changed[name][:, 6:] = torch.rand_like(changed[name][:, 6:])
        new = rssm.observe(state, **changed)
        same({k: x[:, :6] for k, x in new.items()}, {k: x[:, :6] for k, x in base.items()})
        assert not torch.equal(base["deter"], new["deter"])

def test_imagination_with_given_actions_is_the_prior_path():
    rssm, state, inputs = sequence()
    actions, noise = inputs["action"], inputs["noise"]
    dream, taken = rssm.imagine(state, lambda state, t: actions[:, t], 9, noise)
    equal(taken, actions)
    equal(dream["deter"][:, 0], state["deter"])
    for t in range(9):
        deter = block_gru(rssm, state, actions[:, t])
        probs = mixed(rssm.prior(deter).view(3, 6, 5)).base_dist.probs
        index = (probs.cumsum(-1) < noise[:, t]).sum(-1)
        state = {"deter": deter, "stoch": F.one_hot(index, 5).float()}
        close(dream["deter"][:, t + 1], deter, atol=1e-5)
        close(dream["stoch"][:, t + 1], state["stoch"])

def test_a_dream_reconstructs_its_context_and_then_sees_no_observation():
    agent = make_agent(perturb=0.1)
    data, noise = agent.training_data(batch_of(agent)), torch.rand(4, 8, 6, 1)
    data["is_first"] = torch.zeros_like(data["is_first"])
    dream = agent.wm.open_loop(data, 3, noise)["obs"]
    states = agent.wm.observe(data, noise)
    recon = agent.wm.decode(states)["obs"]
    close(dream[:, :3], recon[:, :3])
    assert not torch.allclose(dream[:, 3:], recon[:, 3:])
    state = {name: x[:, 2] for name, x in states.items()}
    for t in range(3, 8):
        state = dream_one_step(agent.wm.rssm, state, data["prev_action"][:, t], noise[:, t])
        close(dream[:, t], agent.wm.decoder(state["deter"], state["stoch"])["obs"])
    data["obs"]["obs"][:, 3:] = 7.0
    equal(agent.wm.open_loop(data, 3, noise)["obs"], dream)
    data["prev_action"][:, 5] = 1 - data["prev_action"][:, 5]
    changed = agent.wm.open_loop(data, 3, noise)["obs"]
    equal(changed[:, :5], dream[:, :5])
    assert not torch.equal(changed[:, 5], dream[:, 5])

# --------------------------------------------------------------------------------------- returns

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
        parts = [(1 - lam) * lam**n for n in range(steps - 1)] + [lam ** (steps - 1)]
        close(returns[b, t], sum(w * g for w, g in zip(parts, n_step)), rtol=1e-4, atol=1e-5)

def test_return_range_is_a_moving_average_of_numpy_percentiles():
    norm, low, high = D.ReturnNormalizer(), 0.0, 0.0
    for i in range(5):
        x = np.random.default_rng(i).normal(100 * i, 300, (16, 15)).astype(np.float32)
        low = 0.99 * low + 0.01 * np.percentile(x, 5)
        high = 0.99 * high + 0.01 * np.percentile(x, 95)
        close(norm(torch.from_numpy(x)), max(1.0, high - low), rtol=1e-4)
        close(norm.range, [low, high], rtol=1e-4, atol=1e-4)
    assert D.ReturnNormalizer()(torch.randn(9, 9)) == 1  # small returns are not blown up

# ---------------------------------------------------------------------------------------- losses

GRADIENTS = {  # loss: what it may move, through time and through the straight-through samples
    "rec": "encoder core posterior decoder", "rew": "encoder core posterior reward",
    "con": "encoder core posterior cont", "dyn": "encoder core posterior prior",
    "rep": "encoder core posterior", "policy": "actor", "value": "critic",
    "repval": "encoder core posterior critic"}

@pytest.mark.parametrize("name", GRADIENTS)
def test_each_loss_moves_its_modules_and_no_other(name):
    agent = make_agent(perturb=0.2, free_nats=0.0)
    agent.slow_critic.requires_grad_()  # so that a gradient that reaches it is seen
    agent.loss_scales = lambda: {other: float(other == name) for other in GRADIENTS}
    loss, report, _ = agent(*learning_inputs(agent, batch_of(agent)))
    assert {f"losses/{other}" for other in GRADIENTS} < report.keys()
    loss.backward()
    wm, rssm = agent.wm, agent.wm.rssm
    core = [rssm.deter_in, rssm.stoch_in, rssm.action_in, rssm.hidden, rssm.gates]
    modules = dict(encoder=wm.encoder, core=torch.nn.ModuleList(core), prior=rssm.prior,
                   posterior=rssm.posterior, decoder=wm.decoder, reward=wm.reward, cont=wm.cont,
                   actor=agent.actor, critic=agent.critic, slow_critic=agent.slow_critic)
    moved = {part for part, module in modules.items()
             if any(p.grad is not None and p.grad.any() for p in module.parameters())}
    assert moved == set(GRADIENTS[name].split())

@pytest.mark.parametrize("values", [
    {}, {"rec_scale": 7.0, "rep_scale": 0.2, "dyn_scale": 3.0, "repval_scale": 5.0}])
def test_the_total_is_the_sum_of_the_mean_losses_times_their_scales(values):
    agent = make_agent(perturb=0.1, **values)
    loss, report, _ = agent(*learning_inputs(agent, batch_of(agent)))
    scales = dict(rec=1, rew=1, con=1, dyn=1, rep=0.1, policy=1, value=1, repval=0.3)
    scales |= {name.removesuffix("_scale"): x for name, x in values.items()}
    close(loss, sum(x * report[f"losses/{name}"] for name, x in scales.items()))
    close(report["losses/total"], loss)

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
    _, report, _ = agent(*learning_inputs(agent, batch))
    close(report["losses/con"], (target * yes + (1 - target) * no).mean())

def test_reconstruction_losses_are_sums_over_pixels_numbers_and_choices():
    space = Dict(camera=Box(0, 255, (48, 48, 3), np.uint8), speed=Box(-9, 9, (3,)),
                 mode=MultiDiscrete([3, 4]))
    agent = make_agent(space)
    camera = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    speed, mode = np.float32([[5, -2, 0], [1, 2, 3]]), np.array([[2, 3], [0, 1]])
    obs = agent.observations({"camera": camera, "speed": speed, "mode": mode})
    obs = {name: torch.from_numpy(x) for name, x in obs.items()}
    recon = agent.wm.decoder(torch.randn(2, 64), torch.rand(2, 6, 5))
    losses = agent.wm.decoder.loss(recon, obs)
    squares = (recon["camera"] - torch.tensor(camera) / 255) ** 2
    close(losses["camera"], squares.sum((1, 2, 3)), rtol=1e-4)
    target = torch.tensor(np.sign(speed) * np.log(1 + np.abs(speed)))
    close(losses["speed"], ((recon["speed"] - target) ** 2).sum(-1))
    logits = recon["mode"].split([3, 4], -1)
    logps = [Categorical(logits=x).log_prob(torch.tensor(mode[:, i])) for i, x in enumerate(logits)]
    close(losses["mode"], -sum(logps))

@dataclasses.dataclass
class VariantArgs(D.Args):
    size_scale: float = 3.0  # weight of the loss on the size of the state

class VariantModel(D.WorldModel):
    def extra_losses(self, states, data):
        return {"size": states["deter"].square().mean(-1)}

class Variant(D.Dreamer):
    """Overrides what a variant overrides: a further loss, who acts, and what dreams pay."""
    def make_world_model(self):
        return VariantModel(self.observations.specs, self.actions.size, self.args)

    def policy(self, state, noise):
        return super().policy(state, noise).roll(1, -1)

    def dream_reward(self, dream):
        return torch.full(dream["deter"].shape[:2], 7.0)

    def choose_action(self, state, noise):
        return F.one_hot(torch.ones(len(state["deter"]), dtype=torch.long), 2).float()

def test_a_variant_overrides_losses_policy_reward_and_action_and_its_scale_is_an_argument(folder):
    flags = ["--env-id", "test/Lengths-v0", "--size-scale", "2.5"]
    given = D.parse_args(flags, args_class=VariantArgs)
    args = args_of(VariantArgs, size_scale=given.size_scale)
    agents = [kind(Lengths.observation_space, Lengths.action_space, args)
              for kind in (Variant, D.Dreamer)]
    agents[1].load_state_dict(agents[0].state_dict())
    batch = batch_of(agents[1], Lengths.observation_space, Lengths.action_space)
    data, noise = learning_inputs(agents[0], batch)
    (loss, ours, _), (plain, theirs, _) = (agent(data, noise) for agent in agents)
    size = agents[0].wm.observe(data, noise["posterior"])["deter"].square().mean()
    close(ours["losses/size"], size)
    scaled = sum(ours[f"losses/{k}"] - theirs[f"losses/{k}"] for k in ("policy", "value"))
    scaled += 0.3 * (ours["losses/repval"] - theirs["losses/repval"]) + 2.5 * size
    close(loss - plain, scaled, rtol=1e-4, atol=1e-5)
    assert ours["diagnostics/rew"] == 7
    start = {"deter": torch.zeros(5, 64), "stoch": torch.zeros(5, 6, 5)}
    noise = {"prior": torch.rand(5, 4, 6, 1), "action": torch.rand(5, 4, 1)}
    (dream, action), (_, other) = (agent.dream(start, noise) for agent in agents)
    equal(action[:, 0], other[:, 0].roll(1, -1))
    assert dream["deter"].shape == (5, 5, 64)
    del args.__dict__["size_scale"]  # a loss without a scale is a mistake
    with pytest.raises(AssertionError, match="size"):
        agents[0](*learning_inputs(agents[0], batch))
    summary = D.main(args_of(VariantArgs), agent_class=Variant)
    replay = D.load_file(run_of(folder), "replay.pt")
    assert summary["updates"] > 0 and summary["args"]["size_scale"] == 3.0
    assert all((env[:, 1] == 1).all() for env in replay["data"]["action"])

# ------------------------------------------ losses of actor and critic: the naive Dreamer

@pytest.mark.parametrize("gamma", [None, 0.9])  # in the continue prediction, or multiplied to it
def test_actor_and_critic_losses_are_those_of_a_naive_loop_over_dreams(gamma):
    values = {"contdisc": False, "gamma": gamma} if gamma else {}
    agent = make_agent(perturb=0.3, ent_coef=0.5, imagination_horizon=5, **values)
    torch.manual_seed(3)
    n, h = 4, 5
    start = {"deter": torch.randn(n, 64).tanh(), "stoch": onehots(5, n, 6)}
    noise = {"prior": torch.rand(n, h, 6, 1), "action": torch.rand(n, h, 1)}
    rssm, low, high = agent.wm.rssm, -300.0, 900.0
    agent.retnorm.range.copy_(torch.tensor([low, high]))
    losses, returns, _ = agent.judge(*agent.dream(start, noise))
    low = 0.99 * low + 0.01 * np.percentile(returns, 5)
    high = 0.99 * high + 0.01 * np.percentile(returns, 95)

    def mean(logits):
        return (logits.softmax(-1) * D.SymexpTwoHot(logits).bins).sum()

    with torch.no_grad():
        for i in range(n):
            state = {name: x[i : i + 1] for name, x in start.items()}
            feats, logps, entropies = [], [], []
            for t in range(h + 1):
                feats.append(torch.cat([state["deter"], state["stoch"].flatten(1)], -1))
                logits = agent.actor.outputs[0][0](agent.actor.mlp(feats[-1]))
                policy = Categorical(logits=logits)
                if t == h:
                    break
                a = (policy.probs.cumsum(-1) < noise["action"][i, t]).sum(-1)  # inverse CDF
                logps.append(policy.log_prob(a))
                entropies.append(policy.entropy())
                action = F.one_hot(a, 4).float()
                state = dream_one_step(rssm, state, action, noise["prior"][i : i + 1, t])
            reward = [mean(agent.wm.reward(f).logits) for f in feats]
            value = [mean(agent.critic(f).logits) for f in feats]
            cont = [float(agent.wm.cont(f).sigmoid()) for f in feats]
            # the bins of ±4.8e8 cancel in these means, and leave rounding
            size = 1 + max(abs(float(x)) for x in (*value, *reward))
            target, scale = value[h], high - low
            for t in reversed(range(h)):
                mixture = 0.05 * value[t + 1] + 0.95 * target
                target = reward[t + 1] + (gamma or 1) * cont[t + 1] * mixture
                weight = np.prod(cont[: t + 1]) * (gamma or 1) ** t
                advantage = (target - value[t]) / scale
                critic, slow_value = agent.critic(feats[t]), agent.slow_critic(feats[t]).pred()
                policy_loss = -weight * (logps[t] * advantage + 0.5 * entropies[t])
                value_loss = weight * (critic.loss(target[None]) + critic.loss(slow_value))
                close(returns[i, t], target, rtol=1e-3, atol=1e-4 * size)
                tolerance = dict(rtol=2e-3, atol=1e-4 + 1e-4 * size / scale)
                close(losses["policy"][i, t], policy_loss[0], **tolerance)
                close(losses["value"][i, t], value_loss[0], **tolerance)

def test_replay_value_loss_is_that_of_a_naive_loop_and_zero_where_an_episode_ends():
    agent = make_agent(perturb=0.1)
    torch.manual_seed(3)
    data = {"reward": torch.randn(2, 7), "is_last": torch.zeros(2, 7, dtype=torch.bool)}
    data["is_terminal"] = data["is_last"].clone()
    data["is_last"][0, 2] = data["is_last"][1, 4] = data["is_terminal"][1, 4] = True
    states = {"deter": torch.randn(2, 7, 64), "stoch": torch.randn(2, 7, 6, 5)}
    feat, dreams = torch.cat([states["deter"], states["stoch"].flatten(2)], -1), torch.randn(14, 3)
    loss, returns = agent.judge_replay(states, data, dreams)
    assert loss.shape == (2, 6) and loss[0, 2] == loss[1, 4] == 0
    for b in range(2):
        boot = dreams[7 * b : 7 * b + 7, 0]  # the return of the dream that began there
        target = boot[6]
        for t in reversed(range(6)):
            lam = 0.95 * (1 - float(data["is_last"][b, t + 1]))
            gamma = (1 - 1 / 333) * (1 - float(data["is_terminal"][b, t + 1]))
            target = data["reward"][b, t + 1] + gamma * ((1 - lam) * boot[t + 1] + lam * target)
            critic = agent.critic(feat[b, t])
            expected = critic.loss(target) + critic.loss(agent.slow_critic(feat[b, t]).pred())
            close(loss[b, t], 0.0 if data["is_last"][b, t] else expected, rtol=1e-4)
            close(returns[b, t], target)

# ------------------------------------------------------------------------------------- optimizer

def test_laprop_with_adaptive_clipping_and_warmup_is_that_of_a_naive_loop():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(3, 4)), 5 * rng.normal(size=5), np.zeros(2)]  # the last: pmin counts
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
                u = g[j] / (np.sqrt(v[i][j] / (1 - 0.999**t)) + 1e-20)
                m[i][j] = 0.9 * m[i][j] + 0.1 * u
            moves.append(0.01 * min(1, (t - 1) / 4) * m[i] / (1 - 0.9**t))
            values[i] = values[i] - moves[-1]
        metrics = optimizer.step()
        close(metrics["grad_norm"], np.sqrt(np.sum(np.square(norms))), rtol=1e-4)
        update_norm = np.sqrt(sum((x**2).sum() for x in moves))
        close(metrics["update_norm"], update_norm, rtol=1e-4)
        for p, value in zip(params, values):
            close(p, value, rtol=1e-4, atol=1e-5)
    equal(params[3], torch.ones(1))  # no gradient, no move

def test_the_slow_critic_follows_the_critic_of_after_the_step():
    agent = make_agent(perturb=0.1)
    old = [p.clone() for p in agent.slow_critic.parameters()]
    agent.update(batch_of(agent))
    for before, fast, slow in zip(old, agent.critic.parameters(), agent.slow_critic.parameters()):
        close(slow, 0.98 * before + 0.02 * fast, rtol=1e-5, atol=1e-7)
        assert not slow.requires_grad

def test_the_first_update_under_warmup_moves_nothing_and_the_second_does():
    agent = make_agent(perturb=0.1, warmup=10)
    before, batch = weights(agent), batch_of(agent)
    for moved in (False, True):
        agent.update(batch)
        assert all(torch.equal(p, before[name]) != moved for name, p in agent.named_parameters()
                   if "slow" not in name)

def test_the_step_size_is_constant_or_falls_linearly_to_zero_over_the_run():
    for anneal_lr, expected in ((False, [1e-3, 1e-3, 1e-3]), (True, [1e-3, 7.5e-4, 0.0])):
        agent, sizes = make_agent(anneal_lr=anneal_lr), []
        for progress in (0.0, 0.25, 1.0):
            agent.anneal(progress)
            sizes.append(float(agent.optimizer.param_groups[0]["lr"]))
        close(sizes, expected)

@pytest.mark.parametrize("anneal_ent, expected", [(False, [2, 2, 2]), (True, [2, 1.5, 0])])
def test_the_entropy_weighs_the_same_or_falls_linearly_to_zero_over_the_run(anneal_ent, expected):
    agent = make_agent(perturb=0.3, ent_coef=2, anneal_ent=anneal_ent)
    inputs = learning_inputs(agent, batch_of(agent))
    losses = []
    for weight in (2.0, *expected):
        if len(losses):
            agent.anneal((0.0, 0.25, 1.0)[len(losses) - 1])
        agent.retnorm.range.zero_()
        losses.append(agent(*inputs)[1]["losses/policy"])
    none = make_agent(perturb=0.3, ent_coef=0.0)
    zero = none(*inputs)[1]["losses/policy"]
    close([(x - zero) / (losses[0] - zero) for x in losses], [1.0] + [x / 2 for x in expected])

def test_evaluations_play_the_average_of_the_weights_and_put_the_learned_ones_back(script):
    agent = script.make_agent(perturb=0.1, average=0.25)
    plain = script.make_agent(perturb=0.1)
    mean = None
    for _ in range(3):
        for x in (agent, plain):
            x.update(script.batch(x))
        now = [p.detach().clone() for p in plain.learned]
        mean = mean or now
        mean = [0.75 * a + 0.25 * p for a, p in zip(mean, now)]
    same(weights(agent), weights(plain))  # learning does not see it
    loaded = script.make_agent(seed=7, average=0.25)
    loaded.load_state_dict(agent.state_dict())
    for x in (agent, loaded):
        before = weights(x)
        with x.evaluating():
            for p, expected in zip(x.learned, mean):
                close(p, expected)
        same(weights(x), before)
    at = [x.data_ptr() for x in loaded.averages]
    assert not {x.data_ptr() for x in agent.averages} & set(at)
    loaded.load_state_dict(agent.state_dict())  # in place: a CUDA graph would know the addresses
    assert at == [x.data_ptr() for x in loaded.averages]
    with pytest.raises(script.module.InputError, match="no averages"):  # that began none
        loaded.load_state_dict(plain.state_dict())
    with plain.evaluating():
        same(weights(plain), before)

def test_a_signal_while_averages_are_put_in_leaves_the_learned_weights(script):
    agent = script.make_agent(average=0.25)
    agent.update(script.batch(agent))
    before = weights(agent)

    class Late(list):
        def __iter__(self):
            yield from itertools.islice(super().__iter__(), 3)
            raise KeyboardInterrupt

    agent.averages = Late(x + 1 for x in agent.averages)
    with pytest.raises(KeyboardInterrupt), agent.evaluating():
        raise AssertionError("not reached")
    same(weights(agent), before)
    assert agent.training

def test_an_evaluation_plays_the_averaged_agent(script, monkeypatch):
    args = script.args_of(average=0.5)
    if script is Team:
        agent = M.SocialDreamer(*M.seat_spaces(args)[:2], args, 2)
    else:
        with contextlib.closing(D.make_vector_env(args, 2, "", [1, 2])) as envs:
            agent = D.Dreamer(envs.single_observation_space, envs.single_action_space, args)
    agent.averages = [torch.full_like(p, 0.125) for p in agent.learned]
    played = []

    def choose(*inputs):
        played.append(float(agent.learned[0].mean()))
        return agent.choose(*inputs)

    agent.fast_choose = choose
    script.module.evaluate(agent, args, 2)
    assert set(played) == {0.125} and agent.learned[0].mean() != 0.125

# ------------------------------------------------------------------- the agent, of either script

class Solo:
    """What the tests of both scripts need to know of dreamer.py."""
    module, args_class, agent_class = D, D.Args, D.Dreamer
    make_agent, args_of = staticmethod(make_agent), staticmethod(args_of)

    @staticmethod
    def batch(agent):
        return batch_of(make_agent(perturb=0.1))

class Team:
    """And of dreamer_marl.py."""
    module, args_class, agent_class = M, M.SocialArgs, M.SocialDreamer
    make_agent = staticmethod(make_team)

    @staticmethod
    def args_of(**values):
        return team_args(**{"partners": "scripted", "env_kwargs": '{"length": 4}', **values})

    @staticmethod
    def batch(agent):
        return team_batch(agent)

SCRIPTS = {"dreamer": Solo, "dreamer_marl": Team}

@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]

def test_update_is_a_function_of_state_and_batch_and_acting_does_not_change_it(script):
    ours, theirs = script.make_agent(perturb=0.1), script.make_agent(perturb=0.1)
    batch = script.batch(ours)
    for _ in range(2):
        results = [agent.update(batch)[0] for agent in (ours, theirs)]
        theirs.act(np.ones((7, 3), np.float32), None, np.ones(7, bool))
        same(*results)
    same(weights(ours), weights(theirs))

def test_a_saved_and_loaded_agent_makes_the_identical_next_update_and_action(script, tmp_path):
    agent, other = script.make_agent(perturb=0.1, warmup=5), script.make_agent(seed=7, warmup=5)
    batch, obs = script.batch(agent), np.ones((7, 3), np.float32)
    for _ in range(3):
        agent.update(batch)
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    other.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    for _ in range(2):
        same(agent.update(batch)[0], other.update(batch)[0])
    same(weights(agent), weights(other))
    equal(agent.retnorm.range, other.retnorm.range)
    actions = [x.act(obs, None, np.ones(7, bool))[0] for x in (agent, other)]
    assert np.array_equal(*actions)

@pytest.mark.parametrize("parts", [2, 4])
def test_an_update_in_parts_is_that_of_one_pass(script, parts):
    whole, divided = (calm(script.make_agent(perturb=0.1, accumulate=n)) for n in (1, parts))
    batch = script.batch(whole)
    for _ in range(2):
        (ours, latents), (theirs, parted) = whole.update(batch), divided.update(batch)
        for name in (x for x in ours if x.startswith("losses/")):
            close(theirs[name], ours[name], rtol=1e-4)
        for name, x in latents.items():
            close(parted[name].float(), x.float())
    close(divided.retnorm.range, whole.retnorm.range)
    for name, p in weights(whole).items():
        close(weights(divided)[name], p, rtol=1e-4)

def test_parts_in_which_seats_are_absent_count_as_much_as_in_one_pass():
    whole, divided = (make_team(perturb=0.1, accumulate=n) for n in (1, 2))
    batch = team_batch(whole)
    batch["valid"][1, 3:] = False
    ours, theirs = whole.update(batch)[0], divided.update(batch)[0]
    # not the policy's: a dream stands in for an absent seat's, of the same part, and has a return
    for name in ("rec", "rew", "con", "dyn", "rep", "tom", "value"):
        close(theirs[f"losses/{name}"], ours[f"losses/{name}"], rtol=1e-4)

def test_an_agent_saved_on_another_device_is_restored_but_for_its_generators():
    saved, agent = make_agent(perturb=0.1).state_dict(), make_agent(seed=7)
    state = agent.act_rng.get_state()
    saved["_extra_state"]["act_rng"] = torch.zeros(16, dtype=torch.uint8)  # so long is a GPU's
    agent.load_state_dict(saved)
    equal(agent.actor.outputs[0][0].weight, saved["actor.outputs.0.0.weight"])
    equal(agent.act_rng.get_state(), state)

def test_deterministic_acting_takes_the_modes_and_uses_up_no_randomness_of_learning():
    agent = make_agent(perturb=1.0)
    obs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    learn_rng, first = agent.learn_rng.get_state(), np.ones(50, bool)
    modes = [agent.act(obs, None, first, deterministic=True)[0] for _ in range(2)]
    assert np.array_equal(*modes)
    samples = [agent.act(obs, None, first)[0] for _ in range(2)]
    assert not np.array_equal(*samples)
    equal(agent.learn_rng.get_state(), learn_rng)

@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_part_of_learning_waits_for_the_device_or_has_a_shape_that_depends_on_data(
        script, precision):
    agent = script.make_agent(precision=precision, imagination_horizon=2)
    batch = {name: x[:, :4] for name, x in script.batch(agent).items()}
    inputs = learning_inputs(agent, batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # raises where a number is asked for
        loss, report, _ = agent(*tree_map(fake.from_tensor, inputs))
        assert loss.shape == () and all(x.shape == () for x in report.values())
        with pytest.raises(DataDependentOutputException):  # it does
            bool(loss > 0)

def test_bfloat16_losses_are_near_float32_and_every_parameter_gets_a_finite_gradient():
    space = Dict(image=Box(0, 255, (48, 48, 3), np.uint8), vector=VECTOR)
    high, low = (make_agent(space, precision=p, perturb=0.02) for p in ("float32", "bfloat16"))
    batch, reports = batch_of(high, observations=space), []
    for agent in (high, low):
        data, noise = learning_inputs(agent, batch)
        loss, report, _ = torch.func.functional_call(agent, agent.cast(), (data, noise))
        loss.backward()
        reports.append(report)
        assert loss.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in agent.parameters())
    for name in ("rec", "rew", "con", "dyn", "rep", "value", "repval"):
        close(reports[1][f"losses/{name}"], reports[0][f"losses/{name}"], rtol=0.1, atol=0.02)
    for (name, p), q in zip(high.named_parameters(), low.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert q.grad is None or q.grad.isfinite().all() and q.grad.dtype == torch.float32, name
    _, latents = low.update(batch)
    assert latents["deter"].dtype == torch.bfloat16
    assert all(p.isfinite().all() for p in low.parameters())

@pytest.mark.parametrize("size, faster, expected", [
    ("12m", True, True), ("12m", False, False), ("1m", True, False), ("1m", False, False)])
def test_by_default_a_cpu_uses_bfloat16_for_large_models_and_images_if_it_is_faster_in_it(
        script, size, faster, expected, monkeypatch):
    for module in (D, M):
        monkeypatch.setattr(module, "faster_in_bfloat16", lambda: faster)
    assert bool(script.make_agent(precision="auto", size=size).cast()) == expected
    images = make_agent(Box(0, 255, (48, 48, 3), np.uint8), precision="auto", size=size)
    assert bool(images.cast()) == faster

@pytest.mark.parametrize("low, expected", [(0.5, True), (0.95, False), (2.0, False)])
def test_a_cpu_is_faster_in_bfloat16_if_it_multiplies_matrices_clearly_faster_in_it(
        script, low, expected, monkeypatch):
    """Of several trials the fastest counts: another process may have disturbed the others."""
    times = {torch.bfloat16: [9.0, low, 5.0], torch.float32: [1.0, 2.0, 1.5]}
    monkeypatch.setattr(script.module.timeit, "repeat", lambda product, **_: times[product().dtype])
    assert script.module.faster_in_bfloat16.__wrapped__() == expected

def test_updates_in_bfloat16_use_the_scales_of_norms_in_float32(script):
    agent, seen = script.make_agent(precision="bfloat16"), {}
    for module in agent.wm.modules():
        if isinstance(module, (script.module.RMSNorm, torch.nn.Linear)):
            record = seen.setdefault(type(module).__name__, set())
            module.register_forward_pre_hook(lambda m, _, to=record: to.add(m.weight.dtype))
    agent.update(script.batch(agent))
    assert seen == {"RMSNorm": {torch.float32}, "Linear": {torch.bfloat16}}

def calm(agent):
    """`agent` with an optimizer in which rounding does not move idle weights by ± its step size."""
    agent.optimizer.param_groups[0]["eps"] = 1e-3
    return agent

@slow
def test_compiled_updates_are_the_eager_ones(script):
    eager, compiled = (calm(script.make_agent(perturb=0.1, compile=on)) for on in (False, True))
    batch = script.batch(eager)
    for _ in range(20):
        theirs, ours = (agent.update(batch)[0] for agent in (eager, compiled))
    for name, x in theirs.items():
        if x.isfinite():
            close(ours[name], x, rtol=1e-2, atol=1e-3)
    for a, b in zip(eager.parameters(), compiled.parameters()):
        close(b, a, rtol=1e-3, atol=1e-3)

Nothing = type("Nothing", (), dict.fromkeys(("__init__", "wait_stream", "replay"), lambda *_: None))

def stand_in_for_graphs(monkeypatch, graph):
    """Lets `Captured` work without a GPU; `graph` is the context in which it records."""
    for name, value in dict(graph=graph, CUDAGraph=Nothing, Stream=Nothing, current_stream=Nothing,
                            stream=lambda _: contextlib.nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)

def test_what_is_recorded_meets_the_tensors_that_it_was_warmed_up_with(monkeypatch):
    """Else torch.compile, which looks at strides, would compile while a graph is recorded."""
    stand_in_for_graphs(monkeypatch, lambda _: contextlib.nullcontext())
    seen = []
    function = D.Captured(lambda x: seen.append((x.data_ptr(), x.stride(), x.tolist())))
    for i in range(3):
        function(torch.arange(i, i + 6).view(2, 3)[:, 1:])  # a view, as in Dreamer.training_data
    assert [x for *_, x in seen] == [[[i + 1, i + 2], [i + 4, i + 5]] for i in range(3)]
    assert len({(address, stride) for address, stride, _ in seen}) == 1

def test_what_a_recording_fixes_is_recorded_for_each_mode(monkeypatch):
    stand_in_for_graphs(monkeypatch, lambda _: contextlib.nullcontext())
    agent, calls = make_agent(), []
    function = D.Captured(lambda x: calls.append(agent.training), lambda: agent.training)
    for training in (True, True, True, True, False, False, False, True, False):
        agent.train(training)
        function(torch.zeros(2))
    assert calls == 3 * [True] + 3 * [False]  # all others were replayed

@slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has none")
def test_a_compiler_does_not_get_the_signals_that_interrupt_the_run(script):
    got = []
    before = signal.signal(signal.SIGINT, lambda *_: got.append("signal"))
    program = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"

    def learn(data, noise):
        os.kill(os.getpid(), signal.SIGINT)
        got.append(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True))
        return {}, {}

    try:
        for compile, expected in ((True, "True\n"), (False, "False\n")):
            agent = script.make_agent(compile=compile)
            agent.fast_learn = learn
            agent.update(script.batch(agent))
            result, = (x for x in got if x != "signal")
            assert result.stdout == expected and "signal" in got  # which came in the end
            got.clear()
    finally:
        signal.signal(signal.SIGINT, before)

def test_compiled_code_is_not_compiled_anew_when_it_is_recorded(monkeypatch):
    agent = make_agent(perturb=0.1, compile=True, precision="bfloat16")
    stand_in_for_graphs(monkeypatch, lambda _: torch.compiler.set_stance("fail_on_recompile"))
    agent.fast_learn = D.Captured(agent.learn)
    for _ in range(3):
        metrics, _ = agent.update(batch_of(make_agent()))
    assert all(x.isfinite() for x in metrics.values())

@cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_updates_on_the_gpu_give_the_losses_of_the_cpu(precision):
    cpu = make_agent(perturb=0.02)
    gpu = make_agent(perturb=0.02, cuda=True, precision=precision)
    gpu.load_state_dict({k: x for k, x in cpu.state_dict().items() if k != "_extra_state"},
                        strict=False)
    batch, reports = batch_of(cpu), []
    _, noise = learning_inputs(cpu, batch)
    for agent in (cpu, gpu):
        moved = {name: x.to(agent.device) for name, x in noise.items()}
        inputs = agent.training_data(batch), moved
        reports.append(torch.func.functional_call(agent, agent.cast(), inputs)[1])
    rtol, atol = (1e-3, 1e-3) if precision == "float32" else (0.1, 0.02)
    for name in ("rec", "rew", "con", "dyn", "rep", "value", "repval"):
        close(reports[1][f"losses/{name}"], reports[0][f"losses/{name}"], rtol, atol)

def is_recorded(agent):
    return "outputs" in next(iter(agent.fast_learn.graphs.values()))

@cuda
def test_captured_updates_are_the_eager_ones_and_draw_new_noise_every_time(script):
    eager, captured = (calm(script.make_agent(perturb=0.1, cuda=True, cuda_graph=on))
                       for on in (False, True))
    batch = script.batch(eager)
    for _ in range(20):
        theirs, ours = (agent.update(batch)[0] for agent in (eager, captured))
    assert is_recorded(captured)
    for name, x in theirs.items():
        if x.isfinite():
            close(ours[name], x, rtol=1e-3, atol=1e-4)
    for a, b in zip(eager.parameters(), captured.parameters()):
        close(b, a, rtol=1e-3, atol=1e-3)
    obs, first = np.zeros((64, 3), np.float32), np.ones(64, bool)
    assert len({captured.act(obs, None, first)[0].tobytes() for _ in range(8)}) == 8

@cuda
@pytest.mark.parametrize("pixels", [False, True])
def test_compiled_updates_are_recorded_as_graphs_with_the_defaults_of_a_gpu(pixels):
    space = Box(0, 255, (48, 48, 3), np.uint8) if pixels else VECTOR
    agent = make_agent(space, cuda=True, compile=True, precision="bfloat16")
    for _ in range(4):
        metrics, _ = agent.update(batch_of(make_agent(space), observations=space))
    assert is_recorded(agent) and all(x.isfinite() for x in metrics.values())

# ------------------------------------------------------------------ parity with the official code

GOLDEN = Path(__file__).parent / "benchmark" / "golden"

@pytest.mark.parametrize("case", ["tiny_vec_cont", "tiny_img_vec_disc"])
def test_losses_states_and_two_updates_are_those_of_the_official_code(case):
    z = {k: torch.from_numpy(np.asarray(x)) for k, x in np.load(GOLDEN / f"{case}.npz").items()}
    image = "data/image" in z
    spaces = {"vector": Box(-np.inf, np.inf, (5,), np.float32)}
    if image:
        spaces["image"] = Box(0, 255, (64, 64, 3), np.uint8)
    agent = make_agent(Dict(spaces), Discrete(5) if image else Box(-1, 1, (3,)), image_size=64,
                       imagination_horizon=15)
    names, params = official_names(agent), dict(agent.named_parameters())

    def official(name, when):
        place, axes = names[name]
        return z[f"{when}/{place}"].permute(axes) if axes else z[f"{when}/{place}"]

    def range_of(when):
        return torch.stack([z[f"{when}/retnorm/lo/value"], z[f"{when}/retnorm/hi/value"]])

    # every recorded weight has its place, and every place its weight
    state = {f"param/{name}/value" for name in ("retnorm/lo", "retnorm/hi", "slowval_count")}
    recorded = {name for name in z if name.startswith("param/")} - state
    assert recorded == {f"param/{names[name][0]}" for name in params}
    with torch.no_grad():
        for name, p in params.items():
            assert p.shape == official(name, "param").shape, name
            p.copy_(official(name, "param"))
        agent.retnorm.range.copy_(range_of("param"))
    previous, flags = z["data/prevact"], ("is_first", "is_last", "is_terminal")
    data = {"obs": {name: z[f"data/{name}"] for name in spaces},
            "carry": {"deter": z["carry/deter"], "stoch": z["carry/stoch"]},
            "prev_action": F.one_hot(previous.long(), 5).float() if image else previous,
            **{name: z[f"data/{name}"] for name in ("reward", *flags)}}

    # states and every loss, element by element; modes stand for all random draws
    modes = dict.fromkeys(("posterior", "prior", "action"))
    states = agent.wm.observe(data, None)
    losses, _ = agent.wm.losses(states, data)
    dreamed, returns, _ = agent.judge(*agent.dream(agent.dream_starts(states, data), modes))
    agent.retnorm.range.copy_(range_of("param"))  # the first update comes below
    losses |= {name: x.mean(1).view(3, 8) for name, x in dreamed.items()}
    losses["repval"], _ = agent.judge_replay(states, data, returns)
    close(losses.pop("rec"), sum(z[f"out/losses/{name}"] for name in spaces), rtol=1e-4)
    recon = agent.wm.decoder(states["deter"].flatten(0, 1), states["stoch"].flatten(0, 1))
    obs = {name: x.flatten(0, 1) for name, x in data["obs"].items()}
    losses |= {name: x.view(3, 8) for name, x in agent.wm.decoder.loss(recon, obs).items()}
    assert losses.keys() == {name[11:] for name in z if name.startswith("out/losses/")}
    for name, x in losses.items():
        close(x, z[f"out/losses/{name}"], rtol=1e-3 if name == "policy" else 1e-4, atol=1e-5)
    for ours, name in (("deter", "deter"), ("stoch", "stoch"), ("logits", "logit"),
                       ("tokens", "tokens")):
        close(states[ours], z[f"out/{name}"], rtol=1e-4, atol=1e-5)

    # In tiny_vec_cont the loss does not depend on the mean head: actions are modes, and
    # d ln N(a|μ)/dμ = 0 at a = μ. The reference's first update of that head is hence lr times
    # the sign of its rounding noise, for LaProp scales the smallest gradient to ±1. We read the
    # sign from the recorded weights and make the same move; then everything else agrees. Of the
    # head itself we can only ask that our gradient be zero too.
    noise_only = () if image else ("actor.outputs.0.0.weight", "actor.outputs.0.0.bias")
    for step in (1, 2):
        loss, metrics, _ = agent(data, modes)
        if step == 1:
            close(agent.retnorm.range, range_of("out"), rtol=1e-4)
            for name in ("adv adv_std adv_mag rew con ret val tar weight slowval ret_min ret_max "
                         "ret_rate").split():
                theirs = z[f"out/metrics/{name}"]
                close(metrics[f"diagnostics/{name}"], theirs, rtol=1e-3, atol=1e-5)
            for ours, name in (("prior_entropy", "dyn_ent"), ("posterior_entropy", "rep_ent"),
                               ("policy_entropy", "ent/action")):
                close(metrics[f"diagnostics/{ours}"], z[f"out/metrics/{name}"], rtol=1e-3)
        agent.optimizer.zero_grad()
        loss.backward()
        assert all(params[name].grad.abs().max() < 1e-6 for name in noise_only)
        norms = agent.optimizer.step()
        close(loss, z[f"step{step}/loss"], rtol=1e-4)
        close(norms["grad_norm"], z[f"step{step}/grad_norm"], rtol=1e-4)
        with torch.no_grad():
            for name in noise_only if step == 1 else ():
                start = official(name, "param")
                params[name].copy_(start + 1e-3 * (official(name, "step2") - start).sign())
            for slow, fast in zip(agent.slow_critic.parameters(), agent.critic.parameters()):
                slow.lerp_(fast, agent.args.tau)
    close(agent.retnorm.range, range_of("step2"), rtol=1e-4)
    for name in params.keys() - set(noise_only):
        close(params[name], official(name, "step2"), rtol=0, atol=1e-4)

def official_names(agent):
    """Our parameter → (official parameter, order of its axes); see benchmark/golden/README.md."""
    names = {}

    def linear(ours, official):
        names[f"{ours}.weight"] = f"{official}/kernel", (1, 0)
        names[f"{ours}.bias"] = f"{official}/bias", None

    def blocks(ours, official):
        names[f"{ours}.weight"] = f"{official}/kernel", None
        names[f"{ours}.bias"] = f"{official}/bias", None

    def layer(ours, official, norm=None):
        linear(f"{ours}.0", official)
        names[f"{ours}.1.weight"] = f"{norm or official + 'norm'}/scale", None

    def mlp(ours, official, layers):
        for i in range(layers):
            layer(f"{ours}.{i}", f"{official}/mlp/linear{i}", f"{official}/mlp/norm{i}")

    def cnn(ours, i, official, norm):
        names[f"{ours}.convs.{i}.conv.weight"] = f"{official}/kernel", (3, 2, 0, 1)
        names[f"{ours}.convs.{i}.conv.bias"] = f"{official}/bias", None
        names[f"{ours}.norms.{i}.weight"] = f"{norm}/scale", None

    for i in range(3):
        layer(f"wm.encoder.mlp.{i}", f"enc/mlp{i}")
    for i in range(4):
        cnn("wm.encoder", i, f"enc/cnn{i}", f"enc/cnn{i}norm")
    for i, part in enumerate(("deter_in", "stoch_in", "action_in")):
        layer(f"wm.rssm.{part}", f"dyn/dynin{i}")
    blocks("wm.rssm.hidden", "dyn/dynhid0")
    names["wm.rssm.hidden_norm.weight"] = "dyn/dynhid0norm/scale", None
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
    for i, (conv, norm) in enumerate((("conv2", "spnorm"), ("conv1", "conv2norm"),
                                      ("conv0", "conv1norm"), ("imgout", "conv0norm"))):
        cnn("wm.decoder", i, f"dec/{conv}", f"dec/{norm}")
    for ours, official, layers, outputs in (
            ("wm.reward", "rew", 1, "logits"), ("wm.cont", "con", 1, "logit"),
            ("critic", "val", 3, "logits"), ("slow_critic", "slowval", 3, "logits")):
        mlp(ours, official, layers)
        linear(f"{ours}.{layers}", f"{official}/head/{outputs}")
    mlp("actor.mlp", "pol", 3)
    kind, _ = agent.actions.heads["action"]
    for i, output in enumerate(("mean", "stddev") if kind == "continuous" else ("logits",)):
        linear(f"actor.outputs.0.{i}", f"pol/head/action/{output}")
    return names

# ---------------------------------------------------------------------------------------- spaces

OBSERVATIONS = {
    "vector": VECTOR, "float of no dimension": Box(-1, 1, ()),
    "float64 matrix": Box(-5, 5, (2, 3), np.float64), "integers": Box(-10, 10, (4,), np.int64),
    "bytes": Box(0, 255, (7,), np.uint8), "discrete": Discrete(4, start=-1),
    "multidiscrete": MultiDiscrete([[2, 3], [4, 5]]), "multibinary": MultiBinary((2, 2)),
    "gray image": Box(0, 255, (40, 30), np.uint8),
    "gray image with a channel": Box(0, 255, (48, 48, 1), np.uint8),
    "colour image": Box(0, 255, (96, 50, 3), np.uint8), "bool image": Box(0, 1, (20, 20), np.bool_),
    "nested dict with images": Dict({
        "eyes": Dict(left=Box(0, 255, (48, 48, 3), np.uint8), right=Box(0, 255, (9, 9), np.uint8)),
        "joints.x": Box(-1, 1, (2,)), "mode": Tuple([Discrete(2), MultiBinary(3)])}),
    "tuple": Tuple([Box(-1, 1, (2,)), Discrete(3, start=2)])}
ACTIONS = {
    "discrete": Discrete(4), "discrete with a start": Discrete(3, start=-7),
    "box": Box(-1, 1, (3,)), "asymmetric box": Box(np.float32([-2, 5]), np.float32([1, 6])),
    "float of no dimension": Box(0, 3, ()), "float64 matrix": Box(-1, 1, (2, 2), np.float64),
    "integer box": Box(0, 9, (2,), np.int32), "multidiscrete": MultiDiscrete([3, 2, 4]),
    "matrix of choices": MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, -2]]),
    "multibinary": MultiBinary(3), "binary matrix": MultiBinary((2, 2)),
    "nested dict": Dict(hand=Dict(grip=Discrete(2), move=Box(-1, 1, (2,))),
                        legs=Tuple([MultiBinary(2), Discrete(3)])),
    "tuple": Tuple([Discrete(2, start=1), Box(-3, 0, (1,))])}
PAIRS = list(itertools.zip_longest(OBSERVATIONS, ACTIONS, fillvalue="discrete"))

@pytest.mark.parametrize("observations,actions", PAIRS)
def test_every_kind_of_space_acts_is_stored_and_learns(observations, actions):
    spaces = OBSERVATIONS[observations], ACTIONS[actions]
    agent = make_agent(*spaces)
    loop = Loop(agent, lambda: Random(*spaces), capacity=60).fill(20)  # it insists on valid actions
    before = weights(agent)
    loop.step(updates=2, batch_size=3)  # the first moves the heads that begin at zero, and no more
    for name, p in agent.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name

def test_keys_may_have_any_name():
    names = ["type", "values", "items", "training", "pop", "half", "a.b"]
    agent = make_agent(Dict({name: Box(-1, 1, (2,)) for name in names}))
    recon = agent.wm.decoder(torch.zeros(3, 64), torch.zeros(3, 6, 5))
    assert set(recon) == set(names) and all(x.shape == (3, 2) for x in recon.values())

@pytest.mark.parametrize("space", [Box(-1, 1, (84, 84, 3)), Box(0, 255, (2, 2, 84, 84), np.uint8)])
def test_what_looks_like_an_image_but_is_none_is_taken_for_a_vector_with_a_warning(space):
    with pytest.warns(UserWarning, match="taken for a vector"):
        assert D.ObservationCodec(space, 48).specs["obs"].kind == "vector"

@pytest.mark.parametrize("first", [False, True])  # where the channels are
@pytest.mark.parametrize("channels,high,dtype", [
    (3, 255, np.uint8), (10, 255, np.uint8), (7, 1, np.bool_), (3, 1, np.float32),
    (4, 255, np.float64)])
def test_images_come_with_channels_first_or_last_in_any_number_as_floats_too(
        first, channels, high, dtype):
    pixels = np.random.default_rng(0).integers(0, 2, (2, 48, 48, channels)) * high
    given = pixels.transpose(0, 3, 1, 2) if first else pixels
    codec = D.ObservationCodec(Box(0, high, given.shape[1:], dtype), 48)
    assert codec.specs["obs"] == ("image", (48, 48, channels), channels, ())
    assert np.array_equal(codec(given.astype(dtype))["obs"], pixels * (255 // high))

@pytest.mark.parametrize("shape,channels", [((7, 7, 20), 20), ((8, 8, 111), 111), ((5, 20, 20), 5)])
def test_a_square_board_of_many_channels_is_not_taken_for_one_with_channels_first(shape, channels):
    codec = D.ObservationCodec(Box(0, 1, shape, np.uint8), 80)
    assert codec.specs["obs"].shape == (80, 80, channels)
    board = np.random.default_rng(0).integers(0, 2, shape)
    seen = codec(board[None].astype(np.uint8))["obs"][0]
    last = board.transpose(1, 2, 0) if channels == shape[0] else board
    middles = (np.arange(len(last)) * 80 + 40) // len(last)
    assert np.array_equal(seen[np.ix_(middles, middles)], 255 * last)

@pytest.mark.parametrize("high", [1, 255])
def test_float_images_are_rounded_and_clipped_and_must_be_finite(high):
    codec = D.ObservationCodec(Box(0, high, (48, 48, 3), np.float32), 48)
    x = np.zeros((1, 48, 48, 3))
    x[0, 0, :4, 0] = np.array([254.9, 256.0, -2.0, 100.2]) * high / 255
    seen = codec(x)["obs"]
    assert seen.dtype == np.uint8 and seen[0, 0, :5, 0].tolist() == [255, 255, 0, 100, 0]
    x[0, 0, 0, 0] = np.nan
    with pytest.raises(D.InputError, match="'obs' holds nan"):
        codec(x)

def test_an_image_that_never_changes_may_have_equal_bounds():
    codec = D.ObservationCodec(Box(5, 5, (48, 48, 3), np.uint8), 48)
    assert not codec(np.full((1, 48, 48, 3), 5, np.uint8))["obs"].any()

def test_observations_are_encoded_without_loss():
    codec = D.ObservationCodec(Dict(
        a=Discrete(4, start=-1), b=MultiDiscrete([[5, 6], [7, 8]]),
        c=Box(-9, 9, (2, 2), np.float64), d=Box(-1, 1, ()), e=MultiBinary(2),
        f=Tuple([Box(0, 255, (3, 5), np.uint8)])), 48)
    square = np.arange(8).reshape(2, 2, 2)
    x = codec({"a": np.array([-1, 2]), "b": square, "c": square.astype(float),
               "d": np.float32([0.5, -1]), "e": np.int8([[0, 1], [1, 1]]),
               "f": (np.full((2, 3, 5), 7, np.uint8),)})
    kinds = {"a": "discrete", "b": "discrete", "c": "vector", "d": "vector", "e": "discrete",
             "f/0": "vector"}
    assert {name: spec.kind for name, spec in codec.specs.items()} == kinds
    flat = [[0, 1, 2, 3], [4, 5, 6, 7]]
    for name, values in {"a": [[0], [3]], "b": flat, "c": flat, "d": [[0.5], [-1]],
                         "e": [[0, 1], [1, 1]], "f/0": np.full((2, 15), 7)}.items():
        assert np.array_equal(x[name], values) and x[name].shape[1:] == codec.specs[name].shape

def test_large_images_shrink_to_the_means_of_their_blocks_and_small_ones_repeat_their_pixels():
    def resized(x, high=255):
        space = Box(0, high, x.shape[1:], x.dtype.type)
        return D.ObservationCodec(space, 48)(x)["obs"]

    x = np.random.default_rng(0).integers(0, 256, (2, 96, 144, 3), np.uint8)
    means = x.reshape(2, 48, 2, 48, 3, 3).mean((2, 4))
    assert np.abs(resized(x) - means).max() <= 0.5
    small = x[:, :24, :16, :1]
    assert np.array_equal(resized(small), small.repeat(2, 1).repeat(3, 2))
    assert np.array_equal(resized(x[:, :48, :48]), x[:, :48, :48])
    flags = resized(x[:, :24, :24, 0] > 99, high=1)
    assert np.array_equal(np.unique(flags), [0, 255]) and flags.shape == (2, 48, 48, 1)

def test_actions_fill_asymmetric_bounds_start_offsets_and_integer_boxes():
    codec = D.ActionCodec(Tuple([
        Box(np.float32([-2, 5]), np.float32([4, 6])), Discrete(3, start=5),
        Box(0, 10, (1,), np.int32), MultiDiscrete([2, 3], start=[0, -1])]))
    assert codec.size == 2 + 3 + 1 + 5 and codec.noise_size == 2 + 1 + 1 + 2
    box, choice, integer, several = codec.decode(np.float32([
        [-1, 1, 0, 0, 1, 0.5, 0, 1, 1, 0, 0],
        [0, -9, 1, 0, 0, 3, 1, 0, 0, 0, 1]]))
    assert np.array_equal(box, [[-2, 6], [1, 5]]) and box.dtype == np.float32
    assert np.array_equal(choice, [7, 5]) and np.array_equal(several, [[1, -1], [0, 1]])
    assert np.array_equal(integer, [[8], [10]]) and integer.dtype == np.int32  # 7.5 becomes even
    switches = D.ActionCodec(Box(0, 1, (4,), np.bool_)).decode(np.float32([[-0.9, -0.2, 0.3, 2]]))
    assert np.array_equal(switches, [[False, False, True, True]]) and switches.dtype == np.bool_

# --------------------------------------------------------------------- environments and their seeds

def make_env(env_id, **values):
    return D.make_env(args_of(env_id=env_id, **values), 0, False, "test")()

class Sized(Echo):
    def __init__(self, size, render_mode=None):
        super().__init__()
        self.size = size

class Words(Echo):
    observation_space = Dict(mission=gym.spaces.Text(5))

class WordsAndNumbers(Echo):
    observation_space = Dict(mission=gym.spaces.Text(5), obs=Echo.observation_space)

class Picture(Lengths):
    """Shows pixels of 200; `render_kwargs` are those of dm_control."""
    observation_space = Box(0, 255, (48, 48, 3), np.uint8)
    metadata = {"render_modes": ["rgb_array"]}

    def see(self):
        return np.full((48, 48, 3), 200, np.uint8)

    render = see

class Broken(Picture):
    def __init__(self, render_mode=None):
        raise ValueError("size must be odd")

class Blank(Picture):
    def render(self):
        return None

class Told(Lengths):
    """Tells of its episodes, in the words of Gymnasium and at every step."""
    def step(self, action):
        return *super().step(action)[:4], {"episode": 3}

for kind in (Sized, Words, WordsAndNumbers, Picture, Broken, Blank, Told):
    register(kind.__name__, kind)

def test_a_kl_that_stays_at_its_free_nats_is_warned_of_every_thousand_updates(script):
    run = object.__new__(script.module.Run)
    run.agent = script.make_agent(free_nats=0.5)
    run.args = run.agent.args
    run.step = run.rank = run.above_floor = 0
    run.ranks, run.episodes, run.announced = 1, [], True
    run.buffer, run.writer, written = integers(steps=1), None, []
    run.bar = types.SimpleNamespace(set_postfix=lambda **_: None, write=written.append)
    run.progress = lambda: {"sps": 1.0, "updates_per_second": 1.0}
    floor = 0.5 * run.agent.wm.rssm.kl_groups
    warned = []
    for run.updates in range(0, 4000, 250):
        dyn = floor + 0.1 * (run.updates == 1500)
        run.metrics = {"losses/dyn": torch.tensor(dyn), "losses/total": torch.tensor(1.0)}
        run.log_metrics()
        if written:
            assert f"{floor:g} free nats for 1,000 updates" in written.pop()
            warned.append(run.updates)
    assert warned == [1000, 2500, 3500]

def test_a_video_of_pixels_begins_with_the_first_episode(monkeypatch):
    class Filmed(gym.Wrapper):
        def __init__(self, env, folder, **_):
            super().__init__(env)
            films.append(0)

        def reset(self, **kwargs):
            films[0] += 1
            return super().reset(**kwargs)

    films = []
    monkeypatch.setattr(gym.wrappers, "RecordVideo", Filmed)
    args = args_of(env_id="test/Picture-v0", pixels=True)
    D.make_env(args, 0, True, "test")().reset()
    D.make_env(args, 1, True, "test")().reset()  # the first alone is filmed
    assert films == [1]

def test_how_long_a_run_takes_is_said_at_its_pace_after_compiling(script, monkeypatch):
    run = object.__new__(script.module.Run)
    run.args = script.args_of(total_timesteps=1000, batch_size=4, batch_length=8, train_ratio=16)
    run.step, run.ranks, run.announced, run.first_log, written = 100, 1, False, None, []
    run.bar = types.SimpleNamespace(write=written.append)
    for now, run.updates in ((9000, 5), (9100, 5), (9200, 15)):  # 10 updates in 200 s
        monkeypatch.setattr(script.module.time, "time", lambda: now)
        run.announce()
    assert written[0].startswith("450 updates to come, about 2.5 hours") and run.announced

def test_text_is_left_out_of_observations_with_one_warning_for_all_environments(recwarn):
    D.warn_once.cache_clear()
    args = args_of(env_id="test/WordsAndNumbers-v0")
    for _ in range(2):  # for training, and for an evaluation
        warnings.simplefilter("always")
        thunks = [D.make_env(args, i, False, "") for i in range(3)]
        assert all(list(thunk().observation_space) == ["obs"] for thunk in thunks)
    assert ["'obs'" in str(x.message) for x in recwarn if "numbers" in str(x.message)] == [True]

def test_arguments_of_the_environment_reach_it():
    assert make_env("test/Sized-v0", env_kwargs='{"size": 7}').unwrapped.size == 7

@pytest.mark.parametrize("task,camera", [("walker-walk", 0), ("quadruped-run", 2)])
def test_dm_control_is_filmed_by_camera_0_and_the_quadruped_by_camera_2(
        monkeypatch, task, camera):
    asked = []
    monkeypatch.setitem(sys.modules, "shimmy", types.SimpleNamespace())
    monkeypatch.setattr(gym, "make", lambda env_id, **kwargs: (
        asked.append(kwargs) or Picture("rgb_array")))
    env = make_env(f"dm_control/{task}-v0", pixels=True)
    render_kwargs = dict(height=48, width=48, camera_id=camera)
    assert asked == [{"render_mode": "rgb_array", "render_kwargs": render_kwargs}]
    make_env(f"dm_control/{task}-v0", pixels=True, env_kwargs='{"render_kwargs": {"camera_id": 1}}')
    assert asked[1]["render_kwargs"] == render_kwargs | {"camera_id": 1}
    assert np.array_equal(env.reset()[0], Picture().see())

def test_what_makes_an_environment_can_be_sent_to_a_process_that_is_not_forked(script):
    args = script.args_of()
    thunk = script.module.make_env(args, 0, False, "test")
    sent = pickle.loads(cloudpickle.dumps(functools.partial(script.module.in_worker, 0, thunk)))
    sent = sent.args[1]
    sent().reset(seed=1)

def test_atari_begins_with_0_to_30_steps_of_doing_nothing_that_the_seed_fixes(monkeypatch):
    class Counter(Lengths):
        def reset(self, seed=None, options=None):
            obs, info = super().reset(seed=seed)
            self.left, self.actions = 10**6, []
            return obs, info

        def step(self, action):
            self.actions.append(action)
            return super().step(action)

    asked = []
    monkeypatch.setitem(sys.modules, "ale_py", types.SimpleNamespace())
    monkeypatch.setattr(gym, "make", lambda env_id, **kwargs: asked.append(kwargs) or Counter())
    monkeypatch.setattr(gym.wrappers, "AtariPreprocessing",
                        lambda env, **kwargs: asked.append(kwargs) or env)
    env, counts = make_env("ALE/Pong-v5"), []
    for seed in [0, *range(400), 0]:
        env.reset(seed=seed)
        assert not any(env.unwrapped.actions)
        counts.append(len(env.unwrapped.actions))
    assert set(counts) == set(range(31)) and counts[0] == counts[-1]
    rules, looks = asked
    assert rules == dict(frameskip=1, repeat_action_probability=0.0, full_action_space=False)
    assert looks == dict(noop_max=0, screen_size=48, grayscale_obs=False)

def test_an_episode_of_atari_that_ends_while_nothing_is_done_begins_again():
    env = D.RandomNoops(Lengths())
    for seed in range(50):  # episodes have 1 to 11 steps, of which something must be left
        env.reset(seed=seed)
        assert env.unwrapped.left > 0

def test_workers_and_steps_in_two_calls_give_the_same_experience_as_steps_in_one():
    streams = []
    for mode, calls in (("sync", 1), ("sync", 2), ("async", 2)):
        args = args_of(env_id="CartPole-v1", vectorization=mode)
        envs = D.make_vector_env(args, 2, "test", [5, 6])
        obs, _ = envs.reset(seed=3)
        stream = [obs.copy()]
        for t in range(40):
            action = np.array([t % 2, 1])
            if calls == 2:
                envs.step_async(action)
            result = envs.step_wait() if calls == 2 else envs.step(action)
            stream += [np.array(x) for x in result[:4]]
        envs.close()
        streams.append(np.concatenate([x.ravel() for x in stream]))
    assert np.array_equal(streams[0], streams[1]) and np.array_equal(streams[0], streams[2])

@pytest.mark.parametrize("moment", ["reset", "step"])
def test_a_worker_that_died_while_it_waited_is_an_input_error_and_the_rest_is_closed(moment):
    args = args_of(env_id="CartPole-v1", vectorization="async")
    envs = D.make_vector_env(args, 2, "test", [5, 6])
    envs.reset(seed=3)
    envs.processes[1].kill()
    envs.processes[1].join()
    with pytest.raises(D.InputError, match=r"environments \[1\] died"):
        envs.reset() if moment == "reset" else envs.step(np.array([0, 1]))
    envs.close()
    envs = D.make_vector_env(args, 2, "test", [5, 6])
    envs.processes[0].kill()
    envs.processes[0].join()
    envs.close()  # even if nothing was asked of it

class Global(Lengths):
    """Draws what it shows from the global generators, as some environments do."""
    def see(self):
        return np.float32([np.random.random(), random.random()])

register("Global", Global)

def test_environments_in_workers_draw_different_numbers_that_their_seeds_fix():
    runs = []
    for seeds in ([5, 6], [5, 6], [7, 8]):
        args = args_of(env_id="test/Global-v0", vectorization="async")
        envs = D.make_vector_env(args, 2, "test", seeds)
        runs.append(np.concatenate([envs.reset(seed=0)[0], envs.step(np.array([0, 0]))[0]]))
        envs.close()
    assert np.array_equal(runs[0], runs[1]) and len(np.unique(np.stack(runs[1:]))) == 16

def test_every_seed_purpose_and_process_has_an_independent_stream():
    keys = itertools.product(range(1, 6), ("environments", "evaluation", "replay"), range(3))
    streams = np.array([D.derive_seeds(*key, count=200) for key in keys])
    assert len(np.unique(streams)) == streams.size  # no seed is shared, not even of neighbours
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 5 / 200**0.5  # five standard deviations
    assert D.derive_seeds(1, "evaluation", count=3) == streams[3, :3].tolist()  # and all is fixed
    assert 0 <= streams.min() and streams.max() < 2**32

class Witness(Lengths):
    """Remembers all seeds that it was reset with."""
    seeds: list[int] = []

    def reset(self, seed=None, options=None):
        self.seeds.extend([] if seed is None else [seed])
        return super().reset(seed=seed)

register("Witness", Witness)

def test_runs_of_neighbouring_seeds_share_no_environment_and_evaluate_on_starts_of_their_own(
        folder):
    used = {}
    for seed in (1, 2, 3):
        Witness.seeds.clear()
        D.main(args_of(env_id="test/Witness-v0", seed=seed, eval_every=60, total_timesteps=100))
        used[seed] = set(Witness.seeds)  # of training, and of evaluations before and at the end
        assert len(Witness.seeds) == len(used[seed]) == 2 + 3 + 3
    assert len(set.union(*used.values())) == 24

def test_evaluation_returns_are_the_first_episodes_of_environments_with_seeds_of_their_own():
    agent, expected = make_agent(Lengths.observation_space, Lengths.action_space), []
    for seed in D.derive_seeds(agent.args.seed, "evaluation", count=6):
        env = Lengths()
        env.reset(seed=seed)
        expected.append(float(env.left))
    assert D.evaluate(agent, agent.args, 6) == expected
    assert len(set(expected)) > 1  # else a second episode, or one for all, would not be seen

def test_an_evaluation_uses_up_none_of_the_trainers_random_numbers():
    agent = make_agent(Lengths.observation_space, Lengths.action_space, env_id="test/Global-v0")

    def states():
        generators = agent.act_rng, agent.learn_rng, torch.default_generator
        return (*(rng.get_state().tolist() for rng in generators), random.getstate(),
                np.random.get_state()[1].tolist(), np.random.get_state()[2])

    before = states()
    D.evaluate(agent, agent.args, 3)
    assert states() == before

# --------------------------------------------------------------------------- arguments and mistakes

def test_presets_are_those_of_the_reference_and_flags_override_them():
    walker, million = "dm_control/walker-walk-v0", 1_000_000
    dmc = dict(num_envs=16, total_timesteps=million)
    for env_id, pixels, values in (
            ("ALE/Pong-v5", False,
             dict(size="200m", num_envs=1, train_ratio=256, total_timesteps=100_000)),
            (walker, False, dict(size="1m", train_ratio=1024, **dmc)),
            (walker, True, dict(size="200m", train_ratio=256, **dmc)),
            ("CartPole-v1", False, D.PRESETS["classic_control"])):
        args = D.Args.preset(env_id, pixels)
        assert {name: getattr(args, name) for name in values} == values
        assert args.env_id == env_id and args.pixels == pixels
    args = D.Args.preset("ALE/Pong-v5", size="12m", seed=3)
    assert (args.size, args.seed, args.train_ratio) == ("12m", 3, 256)
    reference = dict(
        batch_size=16, batch_length=64, learning_rate=4e-5, warmup=1000, agc=0.3, gamma=1 - 1 / 333,
        imagination_horizon=15, return_lambda=0.95, ent_coef=3e-4, tau=0.02, free_nats=1.0,
        dyn_scale=1.0, rep_scale=0.1, repval_scale=0.3, buffer_size=5_000_000)
    assert {name: getattr(args, name) for name in reference} == reference

def test_every_preset_passes_the_check_and_has_names_of_arguments(script):
    for values in script.module.PRESETS.values():
        script.args_of(**{"size": "1m", **values}).check()

def test_the_command_line_takes_the_preset_of_the_environment_and_flags_on_top():
    assert D.parse_args([]) == D.Args.preset("CartPole-v1")
    flags = ["--env-id", "ALE/Pong-v5", "--size", "12m", "--compile"]
    assert D.parse_args(flags) == D.Args.preset("ALE/Pong-v5", size="12m", compile=True)
    assert D.parse_args(["--total-timesteps", "1e6"]).total_timesteps == 10**6
    flags = ["--env-id", "dm_control/walker-walk-v0", "--pixels", "--no-cuda", "--no-compile"]
    walker = D.Args.preset("dm_control/walker-walk-v0", True, cuda=False, compile=False)
    assert D.parse_args(flags) == walker

def test_long_runs_are_compiled_on_a_cpu_that_can_unless_a_flag_says_otherwise(
        script, tmp_path, monkeypatch):
    def compiled(*flags):
        flags = ["--batch-size", "16", "--batch-length", "64", "--train-ratio", "64", *flags]
        return script.module.parse_args(flags, script.args_class).compile

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: tmp_path)
    monkeypatch.setenv("CXX", sys.executable)
    short, long = ("--total-timesteps", "20000"), ("--total-timesteps", "50000")
    assert not compiled(*long)  # there are no headers
    (tmp_path / "Python.h").touch()
    assert compiled(*long) and not compiled(*short)
    assert compiled(*short, "--compile") and not compiled(*long, "--no-compile")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiled(*long)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compiled(*short) and not compiled(*short, "--no-cuda")

def call(script, monkeypatch, *flags, agent_class=None):
    """Runs the command line of a script in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    try:
        script.module.command_line(script.args_class, agent_class or script.agent_class)
        return 0
    except SystemExit as end:
        return end.code

def act_on(value, space=VECTOR):
    obs = np.full((1, *space.shape), value, np.float32)
    make_agent(space).act(obs, None, np.ones(1, bool))

MISTAKES = {  # what was done, and what the message must name
    "an unbounded action": (lambda: make_agent(actions=Box(-np.inf, 1, (2,))), "-inf"),
    "an unsupported action space": (lambda: make_agent(actions=gym.spaces.Text(5)), "Text"),
    "an empty action space": (lambda: make_agent(actions=Dict()), "empty"),
    "an unsupported observation": (
        lambda: make_agent(Dict(a=gym.spaces.Sequence(VECTOR))), "'a'.*Sequence"),
    "an empty observation": (lambda: make_agent(Dict(a=Box(-1, 1, (0,)))), r"\(0,\)"),
    "no observation": (lambda: make_agent(Dict()), "usable"),
    "only words to observe": (
        lambda: make_agent(make_env("test/Words-v0").observation_space), "Text"),
    "a NaN observation": (lambda: act_on(np.nan), "nan"),
    "an infinite observation": (lambda: act_on(np.inf), "inf"),
    "batch_length beyond the buffer": (
        lambda: args_of(buffer_size=100, num_envs=4, batch_length=25, batch_size=2).check(),
        "batch_length.*25.*104"),
    "a buffer in which no batch ever comes together": (
        lambda: D.Args.preset("CartPole-v1", num_envs=1, buffer_size=150).check(), "150.*153"),
    "a return that no evaluation looks for": (
        lambda: args_of(stop_at=5.0).check(), "stop_at 5.*eval_every"),
    "a name that leads elsewhere": (
        lambda: args_of(exp_name="../x").check(), "exp_name '../x'"),
    "parts of different size": (
        lambda: args_of(batch_size=4, accumulate=3).check(), "accumulate 3.*divisor.*4"),
    "to resume and to evaluate at once": (
        lambda: args_of(resume="a", evaluate="b").check(), "resume.*evaluate.*name a and b"),
    "a replay on a GPU that is not used": (
        lambda: args_of(buffer_device="cuda").check(), "buffer_device.*cuda"),
    "an environment that does not render": (
        lambda: make_env("test/Lengths-v0", pixels=True), "cannot be made or rendered"),
    "a replay of too few rows": (
        lambda: D.ReplayBuffer(100, 4, 25, {}), "batch_length 25.*25 steps"),
    "a replay that no memory holds": (
        lambda: D.ReplayBuffer(10**13, 4, 8, {"obs": ((64, 64, 3), torch.uint8)}), "GiB.*[0-9]+$"),
    "an early sample": (lambda: integers(steps=4).sample(1), "4 steps"),
    "an unknown size": (lambda: args_of(size="13m").check(), "13m.*12m"),
    "an image size that does not fit": (lambda: args_of(image_size=40).check(), "image_size.*40"),
    "an unknown environment": (lambda: make_env("NoSuchEnv-v0"), "NoSuchEnv-v0"),
    "an unknown module": (lambda: make_env("no_such_module:Env-v0"), "no_such_module"),
    "an id of a package that was not imported": (lambda: make_env("NoSuchEnv-v0"), "module:id"),
    "a module that does not register the id": (
        lambda: make_env("json:NoSuchEnv-v0"), "'json' was imported, and does not register"),
    "an argument that the environment does not take": (
        lambda: make_env("test/Sized-v0", env_kwargs='{"colour": 1}'), "env-kwargs.*colour"),
    "a missing argument of the environment": (
        lambda: make_env("test/Sized-v0"), "env-kwargs.*'size'"),
    "a path in place of a module": (lambda: make_env("./mine:Tiny-v0"), "'./mine'.*module:id"),
    "an environment with a mistake of its own, in pixels": (
        lambda: make_env("test/Broken-v0", pixels=True), "ValueError: size must be odd"),
    "arguments of the environment that are no text": (
        lambda: args_of(env_kwargs={"a": 1}).check(), "'a': 1.*JSON object"),
    "a module that is not there": (lambda: make_env("nothing_here:Tiny-v0"), "PYTHONPATH"),
    "a renderer that raises a TypeError": (
        lambda: make_env("test/Blank-v0", pixels=True), "rendered.*TypeError"),
    "a choice that its space has not": (
        lambda: D.ObservationCodec(Discrete(3, start=5), 64)(np.array([1])), "'obs' holds 1, .*start=5"),
    "a number format of another name": (lambda: args_of(precision="fp32").check(), "'fp32'.*auto"),
    "arguments of the environment that are no object": (
        lambda: args_of(env_kwargs="[1]").check(), r"\[1\].*JSON object")}

@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_an_input_error_that_names_it(mistake):
    do, named = MISTAKES[mistake]
    with pytest.raises(D.InputError, match=f"(?s){named}"):
        do()

@pytest.mark.parametrize("name,value", dict(
    threads=2000, imagination_horizon=5000, learning_rate=-1.0, gamma=1.5, return_lambda=3.0,
    tau=7.0, agc=0.0, seed=-1, average=5.0,
    free_nats=-1.0, train_ratio=float("nan"), eval_every=-5, batch_length=1, num_envs=0).items())
def test_a_number_outside_of_its_range_is_an_input_error_that_names_both(script, name, value):
    with pytest.raises(script.module.InputError, match=f"{name}.*{value:g}"):
        script.args_of(**{name: value}).check()

@pytest.mark.parametrize("env_id,module,package", [
    ("ALE/Pong-v5", "ale_py", "ale-py"), ("dm_control/walker-walk-v0", "shimmy", "dm-control"),
    ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"),
    ("MinAtar/Breakout-v1", "minatar.gym", "minatar")])
def test_a_missing_package_is_an_input_error_with_the_line_that_installs_it(
        monkeypatch, env_id, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(D.InputError, match=f"pip install .*{package}"):
        make_env(env_id)

WRONG = {  # flags, and what the answer must name
    "--size 13m": "13m", "--no-such-flag": "no-such-flag", "--seed one": "one", "--env-id=": "''",
    "--batch-length 999 --buffer-size 1000": "999", "--total-timesteps 1e": "1e",
    "--env-id no_such_module.env_v0": "no_such_module", "--agc 0": "agc 0",
    "--evaluate no/such/run": "no/such/run", "--resume no/such/run": "no/such/run",
    "--total-timesteps 0": "total_timesteps 0", "--gamma 1.5": "gamma 1.5",
    "--threads 100000": "threads 100000", "--imagination-horizon 1e9": "1e9",
    "--learning-rate 10": "learning_rate 10", "--num-envs -1": "num_envs -1",
    "--train-ratio nan": "train_ratio nan", "--precision float64": "float64",
    "--exp-name ../elsewhere": "../elsewhere", "--env-kwargs {": "env_kwargs",
    "--eval-every -5": "eval_every -5",
    "--total-timesteps 1e11 --buffer-size 100000000000": "GiB"}

@pytest.mark.parametrize("flags", WRONG)
def test_the_command_line_answers_a_mistake_with_status_2_and_writes_nothing(
        script, folder, monkeypatch, capsys, flags):
    assert call(script, monkeypatch, *flags.split()) == 2
    error = capsys.readouterr().err
    assert WRONG[flags] in error and "Traceback" not in error
    assert not list(folder.iterdir())

def test_help_explains_every_argument_with_its_comment(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # so that names are not broken
    assert call(script, monkeypatch, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(script.args_class):
        flag = field.name.replace("_", "-")
        assert f"--{flag} " in text or f"--no-{flag}" in text, flag
    fields = set(script.args_class.__annotations__)
    lines = inspect.getsource(script.args_class).splitlines()
    for above, line in zip(lines, lines[1:]):
        name = line.strip().split(":")[0]
        if name in fields:  # its comment stands behind it or above it
            fields.remove(name)
            comment = line.split("  # ")[1] if "  # " in line else above.strip().removeprefix("# ")
            assert comment and " ".join(comment.split()[:3]) in text, line
    assert not fields

# ------------------------------------------------------------------------------------- whole runs

def test_the_library_loop_that_readme_prints_trains_an_agent():
    text = (Path(__file__).parent / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "range(1000)" in code and "> 1000" in code
    scope = {}
    code = code.replace("range(1000)", "range(70)").replace("> 1000", "> 264")
    exec(code.replace('preset("CartPole-v1")', 'preset("CartPole-v1", size="tiny")'), scope)
    assert scope["metrics"]["losses/total"].isfinite()
    assert len(scope["buffer"]) == 280

class NaNReward(Lengths):
    def pay(self):
        return float("nan")

register("NaNReward", NaNReward)

def test_a_reward_that_is_not_finite_ends_the_run_with_an_input_error(folder):
    with pytest.raises(D.InputError, match="reward nan"):
        D.main(args_of(env_id="test/NaNReward-v0"))

def scalars(run):
    """tag → recorded values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = EventAccumulator(str(run)).Reload()
    return {tag: [x.value for x in log.Scalars(tag)] for tag in log.Tags()["scalars"]}

def test_a_run_trains_at_its_ratio_logs_saves_resumes_and_is_evaluated(folder):
    args = args_of()
    summary = D.main(args)
    run = run_of(folder)
    owed = updates = 0
    for step in range(2, 122, 2):  # of two environments; training begins at 4 · 8 stored steps
        owed += 2 * 4 / 32 if step >= 32 else 0
        updates, owed = updates + int(owed), owed - int(owed)
    assert (summary["global_step"], summary["updates"]) == (120, updates)
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["args"]["env_id"] == args.env_id and len(summary["eval_returns"]) == 3
    log = scalars(run)
    assert {"charts/SPS", "charts/updates_per_second", "eval/episodic_return",
            *(f"losses/{name}" for name in GRADIENTS)} < log.keys()
    returns = log["charts/episodic_return"]
    assert returns == log["charts/episodic_length"] and len(returns) > 5  # a reward of 1 a step

    evaluation = D.main(D.parse_args(["--evaluate", str(run), "--eval-episodes", "4"]))
    assert len(evaluation["eval_returns"]) == 4 and run_of(folder) == run  # and no other folder
    with pytest.raises(D.InputError, match="has made its 120 steps: raise --total-timesteps"):
        D.main(dataclasses.replace(args, resume=str(run)))
    longer = D.main(D.parse_args(["--resume", str(run), "--total-timesteps", "160"]))
    assert longer["global_step"] == 160 and longer["updates"] == updates + 5
    assert D.load_file(run, "replay.pt")["count"] == 80

def test_a_run_ends_when_an_evaluation_has_the_wanted_return_and_is_evaluated_anew(
        script, folder, monkeypatch):
    seeds, evaluate = [], script.module.evaluate

    def spy(*args, purpose="evaluation", **kwargs):
        seeds.append(purpose)
        return evaluate(*args, purpose=purpose, **kwargs)

    monkeypatch.setattr(script.module, "evaluate", spy)
    values = dict(total_timesteps=60, eval_every=20)
    for stop_at, step in ((None, 60), (1e6, 60), (-1e6, 20)):
        args = script.args_of(stop_at=stop_at, exp_name=f"until {stop_at}", **values)
        summary = script.module.main(args)
        assert summary["global_step"] == step and not summary["interrupted"]
        between = [f"evaluation at {at}" for at in range(20, min(60, step + 20), 20)]
        assert [x for x in seeds if " " in x] == between and seeds[len(between)] == "evaluation"
        seeds.clear()

def test_a_run_that_reached_its_return_is_finished_until_more_is_asked_for(script, folder):
    values = dict(total_timesteps=60, eval_every=20, stop_at=-1e6)
    assert script.module.main(script.args_of(**values))["global_step"] == 20
    run = str(run_of(folder))
    with pytest.raises(script.module.InputError, match="has reached -1000000.0: give --stop-at"):
        script.module.main(script.args_of(**values, resume=run))
    more = script.args_of(**values | {"total_timesteps": 80}, resume=run)
    assert script.module.main(more)["global_step"] == 40
    more = script.args_of(**values | {"stop_at": None}, resume=run)
    assert script.module.main(more)["global_step"] == 60

@pytest.mark.parametrize("lost", ["agent.pt", "replay.pt"])
def test_a_file_that_cannot_be_written_is_warned_of_and_costs_no_other(
        script, folder, monkeypatch, lost):
    save = torch.save

    def full(content, file):
        if file.name.endswith(f"{lost}.part"):
            file.write(b"the beginning")
            raise OSError(28, "No space left on device")
        save(content, file)

    with monkeypatch.context() as context, pytest.warns(UserWarning, match=f"{lost}.*No space"):
        context.setattr(torch, "save", full)
        script.module.main(script.args_of(total_timesteps=60))
    run = run_of(folder)
    left = {"agent.pt", "replay.pt"} - {lost}
    assert {x.name for x in run.iterdir() if ".pt" in x.name} == left
    assert (run / "summary.json").is_file()
    if lost == "replay.pt":
        with pytest.warns(UserWarning, match="holds no replay.pt"):
            longer = script.args_of(total_timesteps=110, resume=str(run))
            assert script.module.main(longer)["updates"] > 0

@pytest.mark.parametrize("num_envs, first", [(2, 4 * 8), (6, 6 * (8 + 1))])
def test_a_run_too_short_for_its_first_update_says_so(script, folder, num_envs, first):
    values = dict(num_envs=num_envs, batch_size=4, batch_length=8, train_ratio=32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "nothing will be learned")
        enough = script.args_of(**values, total_timesteps=first)
        assert script.module.main(enough)["updates"] > 0
    with pytest.warns(UserWarning, match=f"first update needs {first} steps"):
        less = script.args_of(**values, total_timesteps=first - num_envs, exp_name="less")
        assert script.module.main(less)["updates"] == 0

def test_a_replay_of_another_step_than_the_agent_is_warned_of(script, folder):
    script.module.main(script.args_of(total_timesteps=60))
    run = run_of(folder)
    replay = torch.load(run / "replay.pt")
    torch.save(replay | {"step": 40}, run / "replay.pt")
    with pytest.warns(UserWarning, match="agent is of step 60, its replay of step 40"):
        script.module.main(script.args_of(total_timesteps=80, resume=str(run)))
    replay = torch.load(run / "replay.pt")
    torch.save({name: x for name, x in replay.items() if name != "step"}, run / "replay.pt")
    longer = script.args_of(total_timesteps=100, resume=str(run))  # as of an earlier version
    assert script.module.main(longer)["global_step"] == 100

def test_a_folder_that_cannot_be_made_is_an_input_error(script, folder):
    (folder / "runs").touch()  # a file, where the folder should be
    with pytest.raises(script.module.InputError, match="cannot be made"):
        script.module.main(script.args_of(total_timesteps=60))

def test_evaluations_for_other_purposes_have_other_seeds(monkeypatch):
    asked = []
    make = D.make_vector_env
    monkeypatch.setattr(D, "make_vector_env", lambda *a: asked.append(tuple(a[3])) or make(*a))
    agent = make_agent(Lengths.observation_space, Lengths.action_space)
    for purpose in ("evaluation", "evaluation at 20", "evaluation"):
        D.evaluate(agent, agent.args, 2, purpose=purpose)
    assert asked[0] == asked[2] and not set(asked[0]) & set(asked[1])

def test_two_runs_that_begin_in_the_same_second_do_not_share_a_folder(folder, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(D.time, "time", lambda: 1 + 1e-6 * next(ticks))
    D.main(args_of(total_timesteps=8))
    with pytest.raises(D.InputError, match="another run"):
        D.main(args_of(total_timesteps=8))
    D.main(args_of(total_timesteps=8, exp_name="other"))
    assert len(list((folder / "runs").iterdir())) == 2

def interrupted_by(script, interrupt, at=5):
    """The agent of `script`, which calls `interrupt` before update number `at`."""
    calls = itertools.count(1)

    class Interrupted(script.agent_class):
        def update(self, batch):
            if next(calls) == at:
                interrupt()
            return super().update(batch)

    return Interrupted

def break_off():
    raise KeyboardInterrupt

def send(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)

def test_an_interrupted_run_saves_and_can_be_resumed(script, folder):
    agent_class = interrupted_by(script, break_off)
    summary = script.module.main(script.args_of(), agent_class)
    run = run_of(folder)
    assert summary["interrupted"] and summary["updates"] >= 4 and summary["eval_returns"] == []
    assert 0 < summary["global_step"] < 120
    saved = script.module.load_file(run)["counters"]
    assert saved["global_step"] == summary["global_step"]
    resumed = script.module.main(script.args_of(resume=str(run)))
    assert resumed["global_step"] >= 120 and not resumed["interrupted"]
    assert resumed["updates"] > summary["updates"]

@pytest.mark.parametrize("script,name", [
    ("dreamer", "SIGINT"), ("dreamer", "SIGTERM"), ("dreamer", "SIGHUP"), ("dreamer", "SIGQUIT"),
    ("dreamer_marl", "SIGTERM")], indirect=["script"])
def test_a_signal_ends_the_run_after_its_step_and_resuming_pays_the_updates_that_are_owed(
        script, folder, monkeypatch, capsys, request, name):
    number = getattr(signal, name)
    request.addfinalizer(lambda old=signal.getsignal(number): signal.signal(number, old))
    before = signal.default_int_handler
    signal.signal(number, before)  # under nohup, for example, it would be ignored
    args = script.args_of(train_ratio=6, total_timesteps=78)  # 3 updates in 8 steps of both
    whole = script.module.main(dataclasses.replace(args, save_model=False))
    agent_class = interrupted_by(script, lambda: send(number), at=7)
    args.run_dir = "mine"
    monkeypatch.setattr(script.module, "parse_args", lambda **kwargs: args)
    assert call(script, monkeypatch, agent_class=agent_class) == 128 + number
    assert signal.getsignal(number) == before
    summary = summary_of(folder / "mine")
    assert summary["interrupted"] and summary["signal"] == number and summary["updates"] == 7
    assert "go on with --resume mine" in capsys.readouterr().out
    resumed = script.module.main(dataclasses.replace(args, run_dir="", resume="mine"))
    assert resumed["updates"] == whole["updates"]

def test_a_second_signal_ends_the_run_at_once_but_never_its_saving(folder, monkeypatch):
    once, twice = (D.main(args_of(exp_name=str(times)), interrupted_by(
        Solo, lambda times=times: send(signal.SIGTERM, times))) for times in (1, 2))
    assert once["global_step"] - twice["global_step"] == 2  # a step of both environments
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: send(signal.SIGTERM, 2) or save(*args))
    D.main(args_of(exp_name="other", checkpoint_every=60))
    run = next((folder / "runs").glob("*__other__*"))
    assert D.load_file(run)["counters"]["global_step"] == 60
    assert D.load_file(run, "replay.pt")["step"] == 60

def test_a_signal_ends_an_evaluation_at_once_and_the_learned_weights_are_saved(folder):
    class Asked(D.Dreamer):
        asked = False

        def act(self, *args):
            if not self.training and not self.asked:
                self.asked = True
                send(signal.SIGTERM)
            return super().act(*args)

    summary = D.main(args_of(eval_every=60, average=0.9), Asked)
    assert summary["interrupted"] and summary["eval_returns"] == []
    assert D.load_file(run_of(folder))["counters"]["global_step"] == 60

class Fails(Lengths):
    """Fails in the way of its argument at the tenth step of its life."""
    def __init__(self, way, render_mode=None):
        super().__init__(render_mode)
        self.way, self.steps = way, 0

    def pay(self):
        self.steps += 1
        if self.steps == 10:
            {"hangs": lambda: time.sleep(60), "dies": lambda: os._exit(1),
             "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP)}[self.way]()
        return 1.0

register("Fails", Fails)

@pytest.mark.parametrize("way,named", [
    ("hangs", "did not answer for 2 s"), ("is stopped", "did not answer"), ("dies", "died")])
def test_an_environment_that_hangs_or_dies_in_its_process_ends_a_run_that_is_saved(
        folder, capfd, way, named):
    kwargs = json.dumps({"way": way})
    with pytest.raises(D.InputError, match=rf"environments \[.+\] {named}"):
        D.main(args_of(env_id="test/Fails-v0", env_kwargs=kwargs, vectorization="async",
                       env_timeout=2))
    assert ("in pay" in capfd.readouterr().err) == (way == "hangs")  # where it is
    assert D.load_file(run_of(folder))["counters"]["global_step"] == 20

def test_a_final_evaluation_that_is_interrupted_still_leaves_a_summary(folder, monkeypatch):
    monkeypatch.setattr(D, "evaluate", lambda *args, **kwargs: break_off())
    assert D.main(args_of())["eval_returns"] == []
    assert summary_of(run_of(folder))["updates"] > 5

def test_what_a_last_evaluation_has_found_is_in_the_summary_if_its_rest_is_interrupted(
        folder, monkeypatch):
    monkeypatch.setattr(M, "evaluate_partners", lambda *args: break_off())
    summary = M.main(team_args())
    returns = summary["eval_returns"]
    assert summary["eval_partners"] == {}
    assert summary["eval_team_return_mean"] == pytest.approx(2 * np.mean(returns))

def test_an_ideal_observer_that_fails_costs_neither_summary_nor_signal_handlers(
        folder, monkeypatch):
    monkeypatch.setattr(M, "bayes_return", lambda args: break_off())
    before = signal.getsignal(signal.SIGINT)
    assert M.main(team_args(partners="scripted"))["eval_returns"] == []
    assert signal.getsignal(signal.SIGINT) is before

def test_every_environment_is_reset_once_when_a_run_begins(script, folder, monkeypatch):
    asked = []

    class Counted(script.module.SyncVectorEnv):
        def reset(self, *, seed=None, options=None):
            asked.append((seed, options))
            return super().reset(seed=seed, options=options)

    monkeypatch.setattr(script.module, "SyncVectorEnv", Counted)
    script.module.main(script.args_of(total_timesteps=20, eval_episodes=1))
    (seeds, options), *_ = asked
    assert len(seeds) == 2 and options == ({"steps": 0} if script.module is M else None)
    assert len([x for x in asked if len(x[0]) == 2]) == 1

def test_environments_that_cannot_be_closed_cost_neither_evaluation_nor_summary(
        script, folder, monkeypatch):
    class Stuck(script.module.SyncVectorEnv):
        def close_extras(self, **kwargs):
            if not self.closed and len(self.envs) == 2:
                raise RuntimeError("window is gone")

    monkeypatch.setattr(script.module, "SyncVectorEnv", Stuck)
    with pytest.warns(UserWarning, match="not closed.*window is gone"):
        script.module.main(script.args_of(total_timesteps=20, eval_episodes=3))
    assert len(summary_of(run_of(folder))["eval_returns"]) == 3

def test_the_summary_of_an_interrupted_run_has_no_evaluation_of_an_earlier_agent(script, folder):
    agent_class = interrupted_by(script, lambda: send(signal.SIGINT), at=9)
    summary = script.module.main(script.args_of(eval_every=20), agent_class)
    assert summary["interrupted"] and summary["eval_returns"] == []
    assert summary["eval_return_mean"] is None and "eval_tom" not in summary

def test_a_signal_in_the_last_save_leaves_no_evaluation_of_an_earlier_agent(
        script, folder, monkeypatch):
    save = script.module.save_file

    def asked(path, content):
        if path.name == "agent.pt":
            send(signal.SIGINT)
        save(path, content)

    monkeypatch.setattr(script.module, "save_file", asked)
    summary = script.module.main(script.args_of(eval_every=20))
    assert summary["signal"] == signal.SIGINT and summary["eval_returns"] == []

def test_an_environment_may_tell_of_its_episodes_itself(folder):
    summary = D.main(args_of(env_id="test/Told-v0"))
    assert summary["global_step"] == 120 and len(summary["train_returns"]) > 5

def test_episodes_of_an_evaluation_that_do_not_end_are_warned_of(script):
    args = script.args_of()
    if script.module is M:
        agent = M.SocialDreamer(*M.seat_spaces(args)[:2], args)
    else:
        with D.closing(D.make_vector_env(args, 1, "", [0])) as envs:
            agent = D.Dreamer(envs.single_observation_space, envs.single_action_space, args)
    with pytest.warns(UserWarning, match="3 of 3 episodes did not end within 1 steps"):
        script.module.evaluate(agent, args, 3, max_steps=1)

@pytest.mark.parametrize("first", [np.zeros(2, int), np.ones(2, np.float32)])
def test_where_an_episode_begins_may_be_told_in_numbers(first):
    obs = np.ones((2, 3), np.float32)
    agent = make_agent(perturb=0.5)
    _, state = agent.act(obs, None, np.ones(2, bool))
    deters = [agent.act(obs, state, x, True)[1]["deter"] for x in (first, first.astype(bool))]
    equal(*deters)

def test_a_reward_too_large_for_the_replay_is_named(script):
    run = object.__new__(script.module.Run)
    run.step = 7
    with pytest.raises(script.module.InputError, match=r"reward 1e\+300 at step 7"):
        run.arrive({}, np.array([1.0, 1e300]), None, None)

def test_a_worker_begins_even_if_its_errors_cannot_be_printed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert D.in_worker(0, lambda: "made") == "made"

def test_a_run_whose_output_cannot_be_written_goes_on(script, folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("write", "update", "set_postfix", "close"):
        monkeypatch.setattr(tqdm.tqdm, name, fail)
    assert script.module.main(script.args_of(total_timesteps=60))["global_step"] == 60

def test_arguments_of_numpy_and_paths_are_saved_as_plain_ones(script, folder):
    values = dict(learning_rate=np.float64(1e-3), batch_size=np.int64(2), run_dir=folder / "mine")
    script.module.main(script.args_of(total_timesteps=60, **values))
    saved = script.module.load_file("mine")["args"]
    assert saved["run_dir"] == str(folder / "mine") and type(saved["batch_size"]) is int

def test_a_folder_to_begin_in_and_another_to_resume_are_not_mixed(script, folder):
    script.module.main(script.args_of(total_timesteps=60, run_dir="mine"))
    for flag in ("--resume", "--evaluate"):
        args = script.module.parse_args(["--run-dir", "mine", flag, "mine"], script.args_class)
        with pytest.raises(script.module.InputError, match="give one"):
            args.check()

def test_the_same_command_begins_a_run_and_goes_on_with_it(script, folder):
    flags = ["--run-dir", "mine", *FLAGS, "--total-timesteps"]
    for steps in (60, 80):
        args = script.module.parse_args([*flags, str(steps)], script.args_class)
        assert script.module.main(args)["global_step"] == steps
    assert script.module.load_file("mine", "replay.pt")["count"] * args.num_envs == 80
    assert not (folder / "runs").exists()

def test_a_folder_in_which_another_process_runs_is_refused(folder):
    refused = []

    def begin_again():
        D.main(args_of(total_timesteps=60, run_dir=str(run_of(folder))))

    def intrude():
        with pytest.raises(D.InputError, match="used by another process"):
            begin_again()
        refused.append(True)

    D.main(args_of(total_timesteps=60), interrupted_by(Solo, intrude, at=2))
    assert refused
    begin_again()  # now that the other has ended

def test_a_resumed_run_prints_what_its_arguments_were(folder, capsys, monkeypatch):
    D.main(args_of(total_timesteps=60))
    assert "× cpu, updates in float32; replay of" in capsys.readouterr().out
    monkeypatch.setattr(D, "worth_compiling", None)  # a resumed run keeps its --compile
    flags = ["--resume", str(run_of(folder)), "--total-timesteps", "80", "--seed", "2"]
    D.main(D.parse_args(flags))
    changed = [line for line in capsys.readouterr().out.splitlines() if "it was" in line]
    assert changed == ["seed = 2  (it was 1)", "total_timesteps = 80  (it was 60)"]

def test_annealing_goes_on_from_where_it_was_even_if_the_run_is_made_longer(folder):
    seen = []

    class Watched(interrupted_by(Solo, break_off, at=8)):
        def anneal(self, progress, step):
            seen.append(progress)
            super().anneal(progress, step)

    D.main(args_of(anneal_lr=True), Watched)
    at = len(seen) - 1  # steps of 2 environments, of 60; the last one was broken off
    np.testing.assert_allclose(seen, np.arange(at + 1) / 60)
    D.main(args_of(anneal_lr=True, total_timesteps=240, resume=str(run_of(folder))), Watched)
    left = 120 - at
    expected = at / 60 + (1 - at / 60) * np.arange(left) / left
    np.testing.assert_allclose(seen[at + 1 :], expected)

@pytest.mark.parametrize("flag", ["anneal_lr", "anneal_ent"])
def test_annealing_that_begins_when_a_run_is_continued_begins_at_its_full_value(folder, flag):
    D.main(args_of(total_timesteps=60))
    seen = []

    class Watched(Solo.agent_class):
        def anneal(self, progress, step):
            seen.append(progress)
            super().anneal(progress, step)

    D.main(args_of(total_timesteps=80, resume=str(run_of(folder)), **{flag: True}), Watched)
    np.testing.assert_allclose(seen, np.arange(10) / 10)

def test_a_last_evaluation_that_fails_costs_neither_summary_nor_lock(
        script, folder, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise script.module.InputError("a worker died")

    monkeypatch.setattr(script.module, "evaluate", fail)
    before = {number: signal.getsignal(number) for number in script.module.SIGNALS}
    with pytest.raises(script.module.InputError, match="a worker died"):
        script.module.main(script.args_of(total_timesteps=60))
    summary = json.loads((run_of(folder) / "summary.json").read_text())
    assert summary["global_step"] == 60 and not summary["interrupted"]
    assert not summary["eval_returns"] and summary["in_bfloat16"] is False
    assert f"play it with --evaluate runs/{run_of(folder).name}" in capsys.readouterr().out
    assert before == {number: signal.getsignal(number) for number in script.module.SIGNALS}
    monkeypatch.undo()
    os.chdir(folder)
    resumed = script.args_of(total_timesteps=80, resume=str(run_of(folder)))
    assert script.module.main(resumed)["global_step"] == 80  # the folder was unlocked

def test_a_resumed_run_counts_updates_at_the_free_nats_anew(script, folder, monkeypatch):
    script.module.main(script.args_of(total_timesteps=60))
    begin, at = script.module.Run.begin, []

    def watched(run, *args):
        buffer = begin(run, *args)
        at.append((run.above_floor, run.updates))
        return buffer

    monkeypatch.setattr(script.module.Run, "begin", watched)
    script.module.main(script.args_of(total_timesteps=80, resume=str(run_of(folder))))
    assert at[0][0] == at[0][1] > 0

@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_is_deleted_is_made_anew_and_what_comes_is_saved(folder, capsys):
    def delete():
        while (folder / "runs").exists():  # the run may write meanwhile
            shutil.rmtree(folder / "runs", ignore_errors=True)

    D.main(args_of(), interrupted_by(Solo, delete, at=8))
    assert "was deleted" in capsys.readouterr().out
    assert {"agent.pt", "replay.pt", "summary.json"} <= {x.name for x in run_of(folder).iterdir()}

@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_that_cannot_be_written_is_warned_of_and_begun_anew(folder, monkeypatch):
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    write, full = record_writer.write, OSError(errno.ENOSPC, "the disk is full")
    written = []

    def write_or_fail(self, data):
        if 50 < len(written) < 53:
            written.append(None)
            raise full
        write(self, data)
        written.append(data)

    monkeypatch.setattr(record_writer, "write", write_or_fail)
    with pytest.warns(UserWarning, match="log of step .* is lost.*disk is full"):
        summary = D.main(args_of())
    assert not summary["interrupted"] and summary["global_step"] == 120
    assert {"agent.pt", "replay.pt", "summary.json"} <= {x.name for x in run_of(folder).iterdir()}
    later = max(run_of(folder).glob("events*"), key=lambda x: int(x.name.rsplit(".", 1)[1]))
    assert b"losses/dyn" in later.read_bytes()

def test_what_a_killed_run_logged_after_its_checkpoint_is_hidden_by_what_is_made_again(
        script, folder, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    script.module.main(script.args_of(total_timesteps=60))
    run = run_of(folder)
    for name in ("agent.pt", "replay.pt"):
        shutil.copy(run / name, tmp_path / name)
    longer = script.args_of(total_timesteps=100, resume=str(run))
    script.module.main(longer)
    for name in ("agent.pt", "replay.pt"):  # as if that part had been killed before it saved
        os.replace(tmp_path / name, run / name)
    script.module.main(longer)
    log = accumulators.EventAccumulator(str(run)).Reload()
    for tag in log.Tags()["scalars"]:
        steps = [x.step for x in log.Scalars(tag)]
        assert steps == sorted(steps), tag
        if tag in ("charts/SPS", "losses/dyn", "eval/episodic_return"):
            assert len(set(steps)) == len(steps) and steps[-1] == 100, tag
    assert [x.step for x in log.Scalars("eval/episodic_return")] == [60, 100]

@pytest.mark.parametrize("at", [12, 25])  # 25 is the last
@beside
def test_weights_that_became_nan_never_replace_a_healthy_checkpoint(folder, at):
    calls = itertools.count(1)

    class Poisoned(D.Dreamer):
        def update(self, batch):
            if next(calls) == at:
                batch["reward"] *= float("nan")
            return super().update(batch)

    with pytest.raises(D.InputError, match="loss.*nan"):
        D.main(args_of(total_timesteps=80, train_ratio=16, checkpoint_every=2, log_every=1000),
               Poisoned)
    saved = D.load_file(run_of(folder))
    assert at - 10 < saved["counters"]["updates"] < at < next(calls)
    tensors = [x for x in saved["agent"].values() if isinstance(x, torch.Tensor)]
    assert all(x.isfinite().all() for x in tensors)

def test_evaluations_and_pictures_leave_the_run_as_it_would_have_been(folder):
    agents, summaries = [], []
    for every in (0, 20):
        args = args_of(env_id="test/Global-v0", exp_name=str(every), eval_every=every,
                       video_every=every)
        summaries.append(D.main(args))
        saved = D.load_file(next((folder / "runs").glob(f"*__{every}__*")))["agent"]
        agents.append({name: x for name, x in saved.items() if isinstance(x, torch.Tensor)})
    assert summaries[0]["train_returns"] == summaries[1]["train_returns"]
    assert summaries[0]["updates"] == summaries[1]["updates"] > 5
    same(*agents)

def test_pictures_show_truth_model_and_difference_while_it_sees_and_while_it_dreams(folder):
    image = pytest.importorskip("PIL.Image")
    D.main(args_of(env_id="test/Picture-v0", video_every=60))
    videos = list((run_of(folder) / "dreams").glob("obs*.gif"))
    assert len(videos) == 2
    with image.open(videos[0]) as video:
        assert video.n_frames == 8 and video.height == 3 * 48 and video.width % 48 == 0
        bars = set()
        for t in range(8):
            video.seek(t)
            frame = np.asarray(video.convert("RGB")).astype(int)
            truth, model, difference = frame[10:38], frame[58:86], frame[106:134]
            assert np.abs(truth - 200).max() < 20  # what was there to be seen
            assert np.abs((model - truth + 255) / 2 - difference).mean() < 20
            bars.add(tuple(np.argmax(frame[48:50].reshape(-1, 3).mean(0), keepdims=True)))
        assert bars == {(0,), (1,)}  # red and green

def test_a_file_that_cannot_be_read_is_an_input_error(folder):
    (folder / "damaged").mkdir()
    (folder / "damaged" / "agent.pt").write_bytes(b"nothing")
    with pytest.raises(D.InputError, match="damaged"):
        D.parse_args(["--resume", "damaged"])
    torch.save({"weights": torch.zeros(10_000)}, folder / "damaged" / "agent.pt")
    content = bytearray((folder / "damaged" / "agent.pt").read_bytes())
    content[len(content) // 2] ^= 1  # one bit, in the middle of the weights
    (folder / "damaged" / "agent.pt").write_bytes(content)
    with pytest.raises(D.InputError, match="damaged"):
        D.load_file("damaged")
    torch.save({"args": {"no_such_flag": 1}}, folder / "damaged" / "agent.pt")
    with pytest.raises(D.InputError, match="another script.*no_such_flag"):
        D.parse_args(["--evaluate", "damaged"])

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_byte_of_a_file_is_found_wherever_it_is(script, folder):
    draws = torch.Generator().manual_seed(1)
    content = {"data": {"image": [torch.randint(256, (9, 5), dtype=torch.uint8, generator=draws)],
                        "stoch": torch.rand(3, 4, generator=draws).bfloat16()},
               "count": 7, "online": [(0, 3), (1, 4)], "rate": 0.1, "none": None}
    script.module.save_file(folder / "replay.pt", content)
    whole = (folder / "replay.pt").read_bytes()
    found = 0
    for place in range(0, len(whole), 13):
        (folder / "replay.pt").write_bytes(
            whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:  # repr shows all elements of tensors as small as these
            loaded = repr(script.module.load_file(folder, "replay.pt"))
            assert loaded == repr(content), f"byte {place} of {len(whole)}"
        except script.module.InputError:
            found += 1
    assert found > 50  # others lie in padding, and in what the archive holds twice

@cuda
def test_a_run_on_the_gpu_ends_well(script, folder):
    summary = script.module.main(script.args_of(cuda=True))
    assert summary["global_step"] >= 120 and summary["device"] != "cpu"
    assert len(summary["eval_returns"]) > 0

# ======================================= dreamer_marl.py: the method for teams, and what it needs

OF_DREAMER_ALONE = {"OUR_SIZE", "PRESETS", "suite_of", "PACKAGES", "warn_once", "RandomNoops",
                    "make_env", "evaluate", "main"}

def definitions(module):
    """name → source, of everything that is defined at the top of a file, in its order."""
    source, found = Path(module.__file__).read_text(), {}
    for node in ast.parse(source).body:
        target = getattr(node, "target", None) or (getattr(node, "targets", None) or [None])[0]
        name = getattr(node, "name", None) or getattr(target, "id", None)
        if name:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            found[name] = source.splitlines()[first - 1 : node.end_lineno]
    return found

def test_shared_definitions_are_the_same_letter_for_letter_and_in_the_same_order():
    theirs, ours = definitions(D), definitions(M)
    shared = [name for name in theirs if name not in OF_DREAMER_ALONE]
    assert [name for name in shared if ours.get(name) != theirs[name]] == []
    assert [name for name in ours if name in shared] == shared
    text = Path(M.__file__).read_text()
    assert "import dreamer" not in text and "from dreamer" not in text
    assert len(shared) > 50 and OF_DREAMER_ALONE < theirs.keys()

# --------------------------------------------------------------------------- teams: the world model

def team_batch(agent, b=4, t=8):
    """A random batch: all are in the game, an episode ends inside, actions are discrete."""
    rng = torch.Generator().manual_seed(0)
    a, mates = agent.actions.size, agent.seats - 1

    def choices(*shape):
        return F.one_hot(torch.randint(a, shape, generator=rng), a).float()

    no = torch.zeros(b, t + 1, dtype=torch.bool)
    batch = {"obs/obs": torch.randn(b, t + 1, 3, generator=rng), "action": choices(b, t + 1),
             "teammates": choices(b, t + 1, mates), "reward": torch.randn(b, t + 1, generator=rng),
             "active": torch.ones(b, t + 1, mates, dtype=torch.bool), "valid": ~no,
             "is_first": no.clone(), "is_last": no.clone(), "is_terminal": no.clone(),
             "bayes": torch.full((b, t + 1, mates), float("nan")),
             "deter": torch.randn(b, t + 1, 64, generator=rng).tanh(),
             "stoch": torch.randint(5, (b, t + 1, 6), generator=rng).byte()}
    if t > 4:
        batch["is_last"][0, 4] = batch["is_terminal"][0, 4] = batch["is_first"][0, 5] = True
    return batch

def team_losses(agent, batch):
    """Every loss, and the gradient of their sum."""
    agent.retnorm.range.zero_()
    loss, report, _ = agent(*learning_inputs(agent, batch))
    agent.zero_grad()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}
    return {name: x for name, x in report.items() if name.startswith("losses/")}, grads

def dream_inputs(n=5, h=4):
    """Starts (N, …) and noise (N, H, …) of dreams of three seats, all active."""
    torch.manual_seed(3)
    start = {"deter": torch.randn(n, 64).tanh(), "stoch": onehots(5, n, 6),
             "active": torch.ones(n, 2, dtype=torch.bool)}
    return start, {"prior": torch.rand(n, h, 6, 1), "action": torch.rand(n, h, 3)}

def groups_of(stoch):
    """z_env and z_team of (…, S, C)."""
    return stoch[..., : 6 - TEAM, :], stoch[..., 6 - TEAM :, :]

@pytest.mark.parametrize("stop", [False, True])
def test_tom_gradient_reaches_h_z_team_and_the_head_but_neither_z_env_nor_the_actor(stop):
    agent = make_team(perturb=0.1, tom_stop_grad=stop)
    states = {"deter": torch.randn(2, 5, 64, requires_grad=True),
              "stoch": torch.rand(2, 5, 6, 5, requires_grad=True)}
    data = {"teammates": onehots(4, 2, 5, 2), "acts": torch.ones(2, 5, 2)}
    agent.wm.extra_losses(states, data)["tom"].sum().backward()
    moved = {name for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in agent.named_parameters() if name.startswith("wm.tom.")}
    if stop:
        assert states["deter"].grad is None and states["stoch"].grad is None
    else:
        env, team = groups_of(states["stoch"].grad)
        assert states["deter"].grad.abs().min() > 0 and team.abs().min() > 0 and not env.any()

def test_tom_gradient_of_a_single_step_reaches_the_posterior_of_z_team_but_not_that_of_z_env():
    agent = make_team(perturb=0.1)
    data, noise = learning_inputs(agent, team_batch(agent, t=2))
    data = {name: x if name == "carry" else tree_map(lambda y: y[:, :1], x)
            for name, x in data.items()}
    losses, _ = agent.wm.losses(agent.wm.observe(data, noise["posterior"][:, :1]), data)
    losses["tom"].sum().backward()
    env, team = agent.wm.rssm.posterior.nets
    assert all(p.grad.any() for p in (*team.parameters(), *agent.wm.encoder.parameters()))
    assert not any(p.grad is not None and p.grad.any() for p in env.parameters())

@pytest.mark.parametrize("arm", ["tom", "merged", "joint", "none"])
def test_kl_is_the_sum_over_groups_with_free_nats_for_each_or_over_one_merged_group(arm):
    torch.manual_seed(0)
    rssm = make_team(teammate_model=arm).wm.rssm
    scale = torch.tensor([0.05, 0.5, 1.0, 3.0])[:, None, None]
    post, prior = scale * torch.randn(4, 6, 5), scale * torch.randn(4, 6, 5)
    groups = list(zip(groups_of(post), groups_of(prior))) if arm == "tom" else [(post, prior)]
    expected = sum(kl_divergence(mixed(p), mixed(q)).clamp(min=1) for p, q in groups)
    assert expected[0] == len(groups)
    for loss in rssm.kl_loss(post, prior):
        close(loss, expected, rtol=1e-4)

def test_the_two_groups_have_priors_and_posteriors_of_their_own():
    rssm = M.FactorisedRSSM(8, 12, TINY, TEAM)
    for network, x in ((rssm.prior, torch.randn(2, 64)), (rssm.posterior, torch.randn(2, 72))):
        env, team = groups_of(rssm.logits(network, x))
        close(env.flatten(1), network.nets[0](x))
        close(team.flatten(1), network.nets[1](x))
        assert not set(network.nets[0].parameters()) & set(network.nets[1].parameters())

def test_the_tom_target_is_the_action_of_the_same_step_which_no_input_of_the_head_holds():
    agent, batch = make_team(perturb=0.2), team_batch(make_team())
    for name in ("is_last", "is_terminal", "is_first"):
        batch[name][:] = False
    noise = torch.rand(4, 8, 6, 1)

    def run(batch):
        data = agent.training_data(batch)
        states = agent.wm.observe(data, noise)
        return agent.wm.extra_losses(states, data)["tom"], M.expected(agent.wm.teammates(states))

    tom, probs = run(batch)
    close(tom, -(probs * batch["teammates"][:, 1:]).sum(-1).log().sum(-1), rtol=1e-4)
    changed = {name: x.clone() for name, x in batch.items()}
    for name in ("teammates", "action"):  # row 4 of the window is step 3 of the loss
        changed[name][:, 4] = changed[name][:, 4].roll(1, -1)
    tom2, probs2 = run(changed)
    equal(probs2[:, :4], probs[:, :4])
    assert (probs2[:, 4] != probs[:, 4]).any() and (tom2[:, 3] != tom[:, 3]).all()
    equal(tom2[:, :3], tom[:, :3])

def test_the_decoder_sees_h_and_z_env_only_and_reward_continue_actor_and_critic_see_all():
    agent, merged = (make_team(perturb=0.1, teammate_model=arm) for arm in ("tom", "merged"))
    states = {"deter": torch.randn(3, 1, 64), "stoch": torch.rand(3, 1, 6, 5, requires_grad=True)}
    feat = M.features(states)
    outputs = {"decoder": agent.wm.decode(states)["obs"], "merged": merged.wm.decode(states)["obs"],
               "reward": agent.wm.reward(feat).logits, "cont": agent.wm.cont(feat),
               "actor": agent.actor.mlp(feat), "critic": agent.critic(feat).logits}
    for name, x in outputs.items():
        x = (x * torch.randn(x.shape)).sum()
        env, team = groups_of(torch.autograd.grad(x, states["stoch"], retain_graph=True)[0])
        assert env.any() and team.any() == (name != "decoder"), name

def test_swapping_two_teammates_changes_the_state_and_renaming_them_renames_the_predictions():
    agent = make_team(perturb=0.2, seats=4)
    own, mates = F.one_hot(torch.tensor([1]), 4), F.one_hot(torch.tensor([[0, 2, 3]]), 4)
    joints = [agent.wm.joint(own, x).float() for x in (mates, mates[:, [1, 0, 2]])]
    equal(joints[0], torch.cat([own, mates[:, 0], mates[:, 1], mates[:, 2]], -1).float())
    state = {"deter": torch.randn(1, 64), "stoch": onehots(5, 1, 6)}
    ours, theirs = (dream_one_step(agent.wm.rssm, state, joint)["deter"] for joint in joints)
    assert (ours - theirs).abs().max() > 1e-3
    probs = M.expected(agent.wm.teammates(state))
    assert (probs[:, 0] - probs[:, 1]).abs().max() > 1e-3
    team = torch.cat([state["deter"], (state["stoch"] * agent.wm.team).flatten(1)], -1)
    for number in range(3):  # the prediction follows the number that the head is told
        told = torch.cat([team, torch.eye(3)[[number]]], -1)
        close(M.expected(agent.wm.tom(told)), probs[:, number])

def test_dreams_with_a_tom_head_forced_to_a_policy_are_that_policys_rollout():
    agent = make_team(perturb=0.1)
    start, noise = dream_inputs()
    start["active"][0, 1] = False  # who is away stays away

    def forced(state):  # teammate 0 always plays 2, teammate 1 always 3
        logits = 100 * F.one_hot(torch.tensor([2, 3]), 4).float()
        return M.Joint([M.OneHot(logits.expand(len(state["deter"]), 2, 4))])

    agent.wm.teammates = forced
    dream, actions = agent.dream(start, noise)
    mates = F.one_hot(torch.tensor([2, 3]), 4).float() * start["active"][..., None]
    equal(actions[..., 4:], mates.flatten(1)[:, None].expand(5, 4, 8))
    state = {name: start[name] for name in ("deter", "stoch")}
    with torch.no_grad():
        for t in range(4):  # a naive rollout with that policy
            feat = torch.cat([state["deter"], state["stoch"].flatten(1)], -1)
            probs = agent.actor(feat).parts[0].probs
            own = F.one_hot((probs.cumsum(-1) <= noise["action"][:, t, :1]).sum(-1), 4).float()
            joint = torch.cat([own, mates.flatten(1)], -1)
            state = dream_one_step(agent.wm.rssm, state, joint, noise["prior"][:, t])
            close(actions[:, t, :4], own)
            close(dream["deter"][:, t + 1], state["deter"], atol=1e-5)
            close(dream["stoch"][:, t + 1], state["stoch"])

def test_the_policy_loss_counts_the_own_action_alone():
    agent = make_team(perturb=0.3, ent_coef=0.5)
    start, noise = dream_inputs()
    losses, returns, _ = agent.judge(*agent.dream(start, noise))
    with torch.no_grad():  # the first step of each dream, by torch.distributions
        feat = torch.cat([start["deter"], start["stoch"].flatten(1)], -1)
        policy = Categorical(logits=agent.actor.outputs[0][0](agent.actor.mlp(feat)))
        own = (policy.probs.cumsum(-1) <= noise["action"][:, 0, :1]).sum(-1)
        low, high = agent.retnorm.range
        advantage = (returns[:, 0] - agent.critic(feat).pred()) / max(1.0, float(high - low))
        weight = agent.wm.cont(feat)[:, 0].sigmoid()
        expected = -weight * (policy.log_prob(own) * advantage + 0.5 * policy.entropy())
        close(losses["policy"][:, 0], expected, rtol=1e-3, atol=1e-3)

def test_agents_that_are_away_contribute_nothing_to_any_loss():
    agent, batch = make_team(perturb=0.2), team_batch(make_team())
    batch["is_last"][1, 3] = batch["is_first"][1, 7] = True
    batch["valid"][1, 4:7] = False  # ego left at 3 and comes back at 7
    batch["active"][2, 2:, 1] = False  # a teammate leaves: what stands in its place is no target
    losses, grads = team_losses(agent, batch)
    changed = {name: x.clone() for name, x in batch.items()}
    for name in ("obs/obs", "reward"):
        changed[name][1, 4:7] = 77.0
    for name in ("action", "teammates"):
        changed[name][1, 4:7] = changed[name][1, 4:7].roll(1, -1)
    changed["is_terminal"][1, 5] = True
    changed["bayes"][:] = 0.3  # for comparison only
    losses2, grads2 = team_losses(agent, changed)
    same(losses, losses2)
    same(grads, grads2)
    # means are over those who are there: the ToM loss is that of a naive loop
    data, noise = learning_inputs(agent, batch)
    probs = M.expected(agent.wm.teammates(agent.wm.observe(data, noise["posterior"])))
    total = 0.0
    for b, t, j in itertools.product(range(4), range(8), range(2)):
        row = t + 1
        acts = batch["valid"][b, row] and batch["active"][b, row, j]
        if acts and not batch["is_last"][b, row]:
            total -= float((probs[b, t, j] * batch["teammates"][b, row, j]).sum().log().detach())
    close(losses["losses/tom"], total / batch["valid"][:, 1:].sum(), rtol=1e-4)

def test_a_batch_in_which_nobody_is_there_teaches_nothing():
    agent, batch = make_team(perturb=0.2), team_batch(make_team())
    batch["valid"][:] = False
    losses, grads = team_losses(agent, batch)
    assert not any(x.any() for x in losses.values()) and not any(x.any() for x in grads.values())

def test_dreams_begin_where_ego_is_in_the_game_and_each_such_step_counts_once():
    agent, batch = make_team(perturb=0.2), team_batch(make_team())
    batch["valid"][1, 4:7] = batch["valid"][3, 2:] = False
    data, noise = learning_inputs(agent, batch)
    states = agent.wm.observe(data, noise["posterior"])
    start = agent.dream_starts(states, data)
    here = data["valid"].flatten()
    own = states["deter"].flatten(0, 1)
    equal(start["deter"][here], own[here])  # so that returns come back to these steps
    elsewhere = (start["deter"][~here, None] == own[here]).all(-1)
    assert elsewhere.any(1).all()  # in place of the others such a step stands
    losses, returns, _ = agent.judge(*agent.dream(start, noise))
    replayed, _ = agent.judge_replay(states, data, returns)
    agent.retnorm.range.zero_()
    _, report, _ = agent(data, noise)
    for name in ("policy", "value"):
        close(report[f"losses/{name}"], losses[name][here].mean(), rtol=1e-4)
    close(report["losses/repval"], replayed[data["valid"][:, :-1]].mean(), rtol=1e-4)

# ------------------------------------------------------------------------- teams: arms and measures

def test_all_arms_have_the_same_parameters_and_begin_with_the_same_weights():
    agents = {arm: make_team(teammate_model=arm) for arm in ("tom", "merged", "joint", "none")}
    start = weights(agents["tom"])
    for agent in agents.values():
        same(weights(agent), start)
        agent.update(team_batch(agent))
        moved = {name for name, p in agent.named_parameters() if not torch.equal(p, start[name])}
        assert {name for name in start if name.startswith("wm.tom.outputs")} <= moved

def test_plain_dreamer_sees_own_actions_alone_and_its_probe_teaches_it_nothing():
    agent, batch = make_team(perturb=0.2, teammate_model="none"), team_batch(make_team())
    changed = batch | {"teammates": batch["teammates"].roll(1, -1)}
    (losses, grads), (losses2, grads2) = (team_losses(agent, x) for x in (batch, changed))
    for name in losses:
        assert torch.equal(losses[name], losses2[name]) == (name[7:] not in ("tom", "total")), name
    for name in grads:
        assert torch.equal(grads[name], grads2[name]) == (not name.startswith("wm.tom.")), name

def test_the_joint_arm_imagines_teammates_by_their_marginal_whatever_the_state():
    agent = make_team(perturb=0.2, teammate_model="joint")
    states = {"deter": torch.randn(7, 64), "stoch": torch.rand(7, 6, 5)}
    probs = M.expected(agent.wm.teammates(states))
    close(probs, probs[:1].expand(7, -1, -1))
    assert (probs[0, 0] - probs[0, 1]).abs().max() > 1e-3  # one for each teammate
    batch = team_batch(agent)
    changed = batch | {"teammates": batch["teammates"].roll(1, -1)}
    ours, theirs = (team_losses(agent, x)[0]["losses/rew"] for x in (batch, changed))
    assert ours != theirs  # its dynamics take joint actions

def test_measures_of_a_batch_are_of_the_same_actions_as_the_loss():
    agent = make_team(perturb=0.3)
    batch = team_batch(agent)
    acts, metrics = agent.training_data(batch)["acts"], agent.update(batch)[0]
    share = acts.sum() / acts[..., 0].numel()
    close(metrics["diagnostics/tom_cross_entropy"] * share, metrics["losses/tom"], rtol=1e-4)

def test_measures_of_the_head_are_those_of_a_naive_loop():
    torch.manual_seed(0)
    heads, shape = {"a": ("discrete", (3,)), "b": ("discrete", (2,))}, (5, 6, 2)
    a, b = torch.randint(3, shape) * torch.randint(2, shape), torch.randint(2, shape)
    actions = torch.cat([F.one_hot(a, 3), F.one_hot(b, 2)], -1).float()
    guess, acts = torch.rand(*shape, 5), torch.rand(shape) < 0.7
    nats, bayes = torch.rand(shape) + 0.5, torch.rand(shape) / 2
    got = M.skill(heads, actions, acts, nats, bayes, guess)
    marginal = right = 0.0
    for j in range(2):
        for values, part, n in ((a, guess[..., :3], 3), (b, guess[..., 3:], 2)):
            x = values[..., j][acts[..., j]]
            p = np.bincount(x.numpy(), minlength=n) / len(x)
            marginal -= sum(np.log(p[int(v)]) for v in x) / acts.sum()
            right += (part.argmax(-1)[..., j][acts[..., j]] == x).float().sum() / 2 / acts.sum()
    ours, ideal = nats[acts].mean(), bayes[acts].mean()
    share = (marginal - ours) / (marginal - ideal)
    for name, value in dict(cross_entropy=ours, marginal=marginal, bayes=ideal, accuracy=right,
                            skill=share).items():
        close(got[name], value, rtol=1e-4)
    unknown = M.skill(heads, actions, acts, nats, torch.full(shape, float("nan")), guess)
    close(unknown["skill"], (marginal - ours) / marginal, rtol=1e-4)
    assert unknown["bayes"].isnan()
    nothing = M.skill(heads, actions, acts, nats, torch.full(shape, float(marginal) - 0.009), guess)
    assert nothing["skill"].isnan()  # where there is nothing to know
    x, zeros = torch.randn(4000, 1, 1, 2) * torch.tensor([1.0, 3.0]), torch.zeros(4000, 1, 1)
    normal = M.skill({"a": ("continuous", 2)}, x, zeros == 0, zeros, zeros, x)
    entropy = torch.distributions.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])).entropy().sum()
    close(normal["marginal"], entropy, rtol=2e-2)
    assert "skill" not in normal

# ---------------------------------------------------------------------- teams: seats and their rows

class Toy:
    """A ParallelEnv whose observation tells who sees it, when, and everyone's last action. Agent i
    leaves after `lives[i]` steps, by death if that is before the end. Rewards are 10 · time + i."""
    metadata, render_mode, scripts = {}, None, ()

    def __init__(self, lives=(6, 3, 6), truncate=False):
        self.lives, self.truncate = lives, truncate
        self.possible_agents = [f"agent_{i}" for i in range(len(lives))]

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (2 + len(self.lives),), np.float32)

    def action_space(self, agent):
        return Discrete(4)

    def see(self, agents, actions):
        last = [actions.get(name, -1) for name in self.possible_agents]
        return {a: np.float32([self.possible_agents.index(a), self.t, *last]) for a in agents}

    def reset(self, seed=None, options=None):
        self.t, self.agents = 0, list(self.possible_agents)
        return self.see(self.agents, {}), {a: {} for a in self.agents}

    def step(self, actions):
        assert set(actions) == set(self.agents), (actions, self.agents)
        self.t += 1
        acted, number = self.agents, self.possible_agents.index
        over = {a: self.t >= self.lives[number(a)] for a in acted}
        timeout = {a: self.truncate and over[a] and self.t >= max(self.lives) for a in acted}
        self.agents = [a for a in acted if not over[a]]
        rewards = {a: 10.0 * self.t + number(a) for a in acted}
        terminated = {a: over[a] and not timeout[a] for a in acted}
        return self.see(acted, actions), rewards, terminated, timeout, {a: {} for a in acted}

def play_team(make, steps, pool=None, num_envs=2, **values):
    """Plays as `main` does, with a new agent and the pool that `pool(agent)` makes. Returns the
    table, the replay and the agent."""
    args, seats = team_args(**values), M.Seats(make())
    envs = M.SyncVectorEnv([lambda: M.Seats(make(), M.scripts_of(args, make()))] * num_envs,
                           autoreset_mode=NEXT_STEP)
    space = Dict({**seats.seat_space.spaces, "seat": Discrete(len(seats.names))})
    agent = make_team(space, seats.seat_action, len(seats.names), **values)
    table = M.Table(agent, num_envs, pool and pool(agent))
    replay = M.ReplayBuffer(4000, len(table.env), args.batch_length, agent.replay_specs())
    obs, _ = envs.reset(seed=1)
    first, done = np.ones(num_envs, bool), np.zeros(num_envs, bool)
    for _ in range(steps):
        joint, rows = table.act(obs, first)
        replay.add(rows)
        obs, _, ended, _, info = envs.step(joint)
        first, done = done, ended
        for env in np.flatnonzero(info.get("_dreamer_episode", ())):
            table.finish(env, info["dreamer_episode"]["seats"][env])
    return table, replay, agent

@pytest.mark.parametrize("lives,truncate", [
    ((6, 3, 6), False), ((6, 6), True), ((2, 6, 3, 6), True), ((1, 2), False)])
def test_rows_hold_what_each_seat_saw_and_earned_and_all_did_until_it_left(lives, truncate):
    k, length = len(lives), max(lives)
    table, replay, agent = play_team(lambda: Toy(lives, truncate), 30)
    data = replay.data
    for stream, (env, seat) in enumerate(zip(table.env, table.seat)):
        mates = [j for j in range(k) if j != seat]
        for i in range(30):
            t = i % (length + 1)  # the step after the last is the reset
            row = {name: x[stream, i] for name, x in data.items()}
            here, last = t <= lives[seat], t == lives[seat]
            timeout = truncate and lives[seat] == length
            assert bool(row["valid"]) == here and bool(row["is_first"]) == (t == 0)
            assert int(row["obs/seat"]) == seat and bool(row["is_last"]) == last
            assert bool(row["is_terminal"]) == (last and not timeout)
            assert float(row["reward"]) == (10 * t + seat if here and t else 0)
            for slot, j in enumerate(mates):
                stays = t < lives[j] or (t == length == lives[j] and truncate)
                theirs = data["action"][env * k + j, i]
                assert bool(row["active"][slot]) == stays
                equal(row["teammates"][slot], theirs if stays else torch.zeros(4))
            if here and t:  # the last joint action is what the environment says it was
                before = data["action"][[env * k + j for j in range(k)], i - 1].argmax(-1).tolist()
                assert row["obs/obs"][:2].tolist() == [seat, t]
                said = [a if t <= lives[j] else -1 for j, a in enumerate(before)]
                assert row["obs/obs"][2:].tolist() == said
    batch = agent.training_data(replay.sample(8))
    assert not batch["acts"][batch["is_last"]].any()  # nobody acts after the end
    joint = torch.cat([batch["action"], batch["teammates"].flatten(-2)], -1)
    equal(batch["prev_action"][:, 1:], joint[:, :-1])
    assert agent.update(replay.sample(8))[0]["losses/total"].isfinite()

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
    equal(obs["obs/obs"], np.float32([[0.5, 0.5, 0, 0, 0], [0.5] * 5]))
    seats.step(np.eye(5, dtype=np.float32)[[3, 4]])
    assert seats.env.taken == {"agent_0": 0, "agent_1": 4}  # a choice that is not there wraps
    _, replay, agent = play_team(lambda: Uneven((6, 6)), 20)
    assert agent.update(replay.sample(4))[0]["losses/total"].isfinite()
    boxes = [Box(np.float32(-i - 1), np.float32(i + 2), (i + 1,), np.float32) for i in range(2)]
    merged = M.merge("action", boxes)
    assert merged.shape == (2,) and merged.low.min() == -2 and merged.high.max() == 3
    image = Box(0, 255, (4, 4, 3), np.uint8)
    for kinds in ([CHOICE, VECTOR], [VECTOR, image], [CHOICE, MultiDiscrete([2, 2])]):
        with pytest.raises(M.InputError, match="different kinds"):
            M.merge("obs", kinds)

@pytest.mark.parametrize("mask", [
    Box(0, 1, (4,), np.int8), Box(-9, 9, (4,), np.int32), Box(0, 1, (4,), np.bool_),
    Box(0, 255, (4,), np.uint8), MultiBinary(4)], ids=str)
def test_observations_of_any_number_format_are_seats_observations_such_as_an_action_mask(mask):
    class Masked(Toy):
        def observation_space(self, agent):
            return Dict(observation=Box(-9, 9, (2,)), action_mask=mask)

        def see(self, agents, actions):
            x = np.array([1, 0, 1, 1], mask.dtype)
            return {a: {"observation": np.ones(2, np.float32), "action_mask": x} for a in agents}

    _, replay, agent = play_team(Masked, 20)
    equal(replay.data["obs/action_mask"][0, 0].float(), torch.tensor([1.0, 0, 1, 1]))
    assert agent.update(replay.sample(4))[0]["losses/total"].isfinite()

@pytest.mark.parametrize("space", [
    Discrete(4, start=2), MultiDiscrete([2, 5]), Box(-3, 5, (2, 2)),
    Dict(a=Discrete(3), b=Box(-1, 1, (2,)))])
def test_an_encoded_action_is_decoded_to_itself(space):
    codec = M.ActionCodec(space)
    space.seed(0)
    for _ in range(5):
        action = space.sample()
        back = M.unbatch(codec.decode(M.encode_action(codec, action)[None]))
        ours, theirs = M.leaves(back, "action"), M.leaves(action, "action")
        for name, x in theirs.items():
            np.testing.assert_allclose(ours[name], x, atol=1e-5)

def test_the_learner_sits_in_random_seats_and_scripts_are_drawn_anew_for_every_episode():
    seats, learners, scripts = M.Seats(M.HiddenMatch(), ("0", "1", "2", "3")), set(), set()
    for i in range(40):
        obs, _ = seats.reset(seed=i)
        learner = int(obs["learner"])
        assert obs["script"][learner] == -1 and not obs["play"][learner].any()
        assert np.isnan(obs["bayes"][learner]).all() and obs["play"][1 - learner].sum() == 1
        learners.add(learner)
        scripts.add(int(obs["script"][1 - learner]))
    assert learners == {0, 1} and scripts == {0, 1, 2, 3}

def test_the_learner_is_one_of_those_who_are_there_when_the_episode_begins():
    class Late(Toy):
        def reset(self, seed=None, options=None):
            super().reset(seed, options)
            self.agents = self.possible_agents[1:]
            return self.see(self.agents, {}), {a: {} for a in self.agents}

    seats = M.Seats(Late())
    assert {int(seats.reset(seed=i)[0]["learner"]) for i in range(20)} == {1, 2}

def test_seat_script_and_noise_of_the_game_are_independent():
    seats, counts = M.Seats(M.HiddenMatch(0.3), ("0", "1", "2", "3")), np.zeros((2, 4, 4))
    for seed in range(4000):  # every episode with a seed of its own, as in an evaluation
        obs, _ = seats.reset(seed=seed)
        partner = 1 - int(obs["learner"])
        counts[partner, obs["script"][partner], obs["play"][partner].argmax()] += 1
    table = 0.3 / 4 + 0.7 * np.eye(4)
    expected = 4000 / 8 * np.stack([table, table])
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 31 + 5 * (2 * 31) ** 0.5  # five standard deviations
    favourite = counts[0].trace() / counts[0].sum()
    assert abs(favourite - 0.775) < 5 * (0.775 * 0.225 / counts[0].sum()) ** 0.5

def test_partners_of_one_name_keep_their_number_so_that_the_oracle_reads_it_right():
    args = team_args(partners="scripted", oracle=True)
    space, _, seats, _ = M.seat_spaces(args)
    assert seats == 2 and list(space["scripts"].nvec) == [6]  # five scripts, or none
    for number, name in enumerate(M.HiddenMatch().scripts):
        envs = M.make_vector_env(dataclasses.replace(args, scripted=(name,)), 3, "", [1, 2, 3])
        obs, _ = envs.reset(seed=0)
        view = M.seat_view(obs, np.arange(3), obs["learner"], oracle=True)
        assert (view["scripts"] == number + 1).all()
        assert space.contains({key: x[0] for key, x in view.items()})

def test_workers_in_other_processes_play_the_same_games_as_this_process():
    streams = []
    for mode in ("sync", "async"):
        args = team_args(partners="scripted", vectorization=mode)
        envs = M.make_vector_env(args, 2, "", [5, 6])
        obs, _ = envs.reset(seed=3)
        stream, joint = [obs], np.eye(4, dtype=np.float32)[[[0, 1], [2, 3]]]
        for _ in range(25):
            stream.append({name: x.copy() for name, x in envs.step(joint)[0].items()})
        envs.close()
        parts = [np.ravel(x[name]).astype(float) for x in stream for name in sorted(x)]
        streams.append(np.concatenate(parts))
    np.testing.assert_array_equal(*streams)

# -------------------------------------------------------------- HiddenMatch, whose optimum is known

def hidden_match_values(epsilon, actions, length):
    """Exact return and nats a step of who sees the partner's actions, by enumeration."""
    ret = nats = 0.0
    likelihood = epsilon / actions + (1 - epsilon) * np.eye(actions)  # favourite → action
    frontier = {(0,) * actions: 1.0}  # counts of actions so far → probability
    for _ in range(length):
        after = {}
        for counts, p in frontier.items():
            belief = np.prod(likelihood ** np.array(counts), 1)
            predicted = belief / belief.sum() @ likelihood
            ret += p * predicted.max()
            nats -= p * (predicted * np.log(predicted.clip(1e-300))).sum() / length
            for a in np.flatnonzero(predicted):
                key = tuple(c + (i == a) for i, c in enumerate(counts))
                after[key] = after.get(key, 0.0) + p * predicted[a]
        frontier = after
    return ret, nats

def rollout(env, choose, episodes=800):
    """Mean return of player_0 against favourites drawn at random, and nats a step of env.bayes."""
    rng, total, nats = np.random.default_rng(0), 0.0, []
    env.reset(seed=0)
    for _ in range(episodes):
        script = env.favourites[rng.integers(env.actions)]
        env.reset()
        while env.agents:
            belief = env.bayes("player_1", env.favourites)
            theirs = env.play("player_1", script)
            nats.append(-np.log(belief[theirs]))
            mine = choose(belief, script)
            total += env.step({"player_0": mine, "player_1": theirs})[1]["player_0"]
    return total / episodes, np.mean(nats)

@pytest.mark.parametrize("epsilon,actions,length,bayes,oracle,ignorant", [
    (0.0, 4, 10, 9.25, 10.0, 2.5), (0.3, 4, 10, 6.72458, 7.75, 2.5),
    (0.5, 3, 4, None, 8 / 3, 4 / 3)])
def test_hidden_match_has_its_known_values_and_its_bayes_value_is_that_of_a_simulation(
        epsilon, actions, length, bayes, oracle, ignorant):
    env = M.HiddenMatch(epsilon, actions=actions, length=length)
    ret, nats = hidden_match_values(epsilon, actions, length)
    close(env.bayes_return(env.favourites), ret)
    assert env.bayes_return(env.scripts) is None  # of "mixed" it says nothing
    assert M.HiddenMatch(length=200).bayes_return(env.favourites) is None  # it would take minutes
    many = M.HiddenMatch(actions=10, length=12)
    assert 7 < many.bayes_return(many.favourites) < 8
    if epsilon:  # after a very long game, too
        belief = env.predict([300] * (actions - 1) + [3000], env.favourites)
        close(belief, env.table[str(actions - 1)])
    if bayes:
        assert abs(ret - bayes) < 1e-5
    played, nats_played = rollout(env, lambda belief, script: belief.argmax())
    assert abs(played - ret) < 0.2 and abs(nats_played - nats) < 0.03
    assert abs(rollout(env, lambda belief, script: int(script))[0] - oracle) < 0.15
    assert abs(rollout(env, lambda belief, script: 1)[0] - ignorant) < 0.4

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

# ---------------------------------------------------------------------- teams: acting, and the pool

def test_act_equals_observe_on_the_joint_actions_of_the_rows():
    _, replay, agent = play_team(lambda: Toy((6, 4, 6)), 14)
    data = {name: x[:, :14] for name, x in replay.data.items()}
    tokens = agent.wm.encode({name[4:]: x for name, x in data.items() if name.startswith("obs/")})
    joint, stoch = agent.wm.joint(data["action"], data["teammates"]), data["stoch"].long()
    for t in range(1, 14):  # one step from each stored state reaches the next
        state = {"deter": data["deter"][:, t - 1].float(),
                 "stoch": F.one_hot(stoch[:, t - 1], 5).float()}
        now = slice(t, t + 1)
        states = agent.wm.rssm.observe(state, tokens[:, now], joint[:, t - 1 : t],
                                       data["is_first"][:, now])
        close(states["deter"][:, 0], data["deter"][:, t].float(), rtol=2e-2, atol=2e-2)  # bfloat16

@pytest.mark.parametrize("observed", [True, False])
def test_who_acts_knows_what_its_teammates_did_or_else_guesses_it_for_those_who_are_there(observed):
    table, _, agent = play_team(lambda: Toy((6, 2, 6)), 4, observe_teammates=observed)
    told = table.informed(agent, table.state, table.env, table.seat)["teammates"]
    assert table.active.any() and not table.active.all()
    for stream, (env, seat) in enumerate(zip(table.env, table.seat)):
        for slot, j in enumerate(j for j in range(3) if j != seat):
            guess = table.state["teammates"][stream, slot]
            assert guess.sum() == 1 and guess.max() == 1
            did = torch.tensor(table.joint[env, j])
            equal(told[stream, slot], (did if observed else guess) * bool(table.active[env, j]))
    obs = {"obs": np.ones((6, 5), np.float32), "seat": table.seat}
    states = [agent.act(obs, table.state | {"teammates": x}, np.zeros(6, bool))[1]["deter"]
              for x in (told, told.roll(1, -1))]
    assert not torch.equal(*states)

def test_a_loop_of_ten_lines_trains_both_seats_of_a_game_without_the_loop_of_the_file():
    env, agent = Toy((6, 6)), make_team(Box(-np.inf, np.inf, (4,), np.float32), seats=2)
    replay, no = M.ReplayBuffer(400, 2, 8, agent.replay_specs()), np.zeros(2, bool)
    begun = dict(reward=np.zeros(2), is_first=~no, is_last=no, is_terminal=no)
    always = dict(active=~no[:, None], valid=~no, bayes=np.full((2, 1), np.nan))
    (obs, _), arrived, state = env.reset(), begun, None
    for _ in range(30):
        seen = np.stack(list(obs.values()))
        actions, state = agent.act(seen, state, arrived["is_first"])
        state["teammates"] = state["action"].flip(0)[:, None]
        replay.add(agent.row(state) | arrived | always)
        if arrived["is_last"].all():
            (obs, _), arrived = env.reset(), begun
        else:
            obs, reward, ended, _, _ = env.step(dict(zip(env.possible_agents, actions)))
            end = np.array(list(ended.values()))
            arrived = dict(reward=np.array(list(reward.values())), is_first=no, is_last=end,
                           is_terminal=end)
    data = agent.training_data(replay.sample(8))
    said = data["obs"]["obs"][..., 2:].long()  # the joint action before, as the game tells it
    own, theirs = (x.argmax(-1) for x in data["prev_action"].chunk(2, -1))
    going = data["obs"]["obs"][..., 1] > 0
    ours = torch.stack([own, theirs], -1).sort(-1).values
    assert going.any() and (said.sort(-1).values == ours)[going].all()
    assert agent.update(replay.sample(8))[0]["losses/total"].isfinite()

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
    for weighting, share in (("hard", (1 - x) ** 2 + 1e-3), ("even", x * (1 - x) + 1e-3)):
        pool.weighting = weighting
        np.testing.assert_allclose(pool.weights(), share / share.sum())
    pool.report(77, 1.0)  # who is not there, or no longer
    pool.report(M.LIVE, 1.0)
    assert set(pool.wins) == {0, 1}

@pytest.mark.parametrize("weighting", ["uniform", "hard", "even"])
@pytest.mark.parametrize("won", [0.0, 1.0])
def test_extreme_scores_give_neither_nan_nor_a_member_that_is_never_met(weighting, won):
    pool = pool_of(members=3, weighting=weighting)
    for number in range(3):
        pool.wins[number], pool.games[number] = won * 1e12, 1e12
    chances = pool.weights()
    assert np.isfinite(chances).all() and (chances > 0.3).all() and abs(chances.sum() - 1) < 1e-9
    drawn = [pool.draw() for _ in range(2000)]
    assert abs(drawn.count(M.LIVE) / 2000 - 0.5) < 0.05
    assert all(abs(drawn.count(i) / 1000 - 1 / 3) < 0.07 for i in range(3))

def test_a_full_pool_keeps_the_oldest_and_the_newest_and_spreads_the_rest():
    pool, agent = pool_of(size=5), make_team(seats=2)
    for number in range(40):
        assert pool.add(agent) == number
        assert len(pool.members) <= 5 and 0 in pool.members and number in pool.members
        assert pool.members.keys() == pool.wins.keys() == pool.games.keys()
    gaps = np.diff(list(pool.members))
    assert gaps.max() <= 24 and sorted(pool.members) == list(pool.members)

def act_of(member, *shape, dtype=np.float32):
    """The state of a partner after a step of its own, in which it saw ones."""
    player = M.with_noise(member, torch.Generator().manual_seed(0))
    return player.act(np.ones((2, *(shape or (3,))), dtype), None, np.ones(2, bool))[1]

def test_members_of_the_pool_share_no_tensors_with_the_learner_and_do_not_change_with_it():
    agent = make_team(seats=2, perturb=0.2)
    for owner, name in agent.compiled():  # as torch.compile puts it: bound to the learner's weights
        setattr(owner, name, lambda *inputs, step=getattr(owner, name): step(*inputs))
    pool = pool_of(members=1, agent=agent)
    member, = pool.members.values()
    ours = {x.data_ptr() for x in (*agent.parameters(), *agent.buffers())}
    assert not ours & {x.data_ptr() for x in (*member.parameters(), *member.buffers())}
    assert member.optimizer is None and agent.optimizer is not None  # the learner has lost nothing
    before, acted = weights(member), act_of(member)
    agent.update(team_batch(agent))
    same(weights(member), before)
    same(act_of(member), acted)
    other = pool_of()
    other.load_state_dict(pool.state_dict(), agent)
    same(weights(other.members[0]), before)
    assert other.draw() == pool.draw() and other.next == pool.next

def test_members_of_the_pool_of_a_learner_on_a_gpu_do_not_use_its_compiled_encoder(monkeypatch):
    agent = make_team(Box(0, 255, (48, 48, 3), np.uint8), seats=2)
    agent.device = torch.device("cuda")  # where the CNN is compiled too
    for owner, name in agent.compiled():
        setattr(owner, name, None)
    member, = pool_of(members=1, agent=agent).members.values()
    assert member.device.type == "cpu"
    assert act_of(member, 48, 48, 3, dtype=np.uint8)["deter"].shape == (2, 64)

class Numbered(Toy):
    """Also tells which environment it is."""
    numbers = itertools.count()

    def __init__(self):
        super().__init__((4, 4))
        self.number = next(self.numbers)

    def see(self, agents, actions):
        number = self.possible_agents.index
        return {a: np.float32([number(a), self.t, self.number, 0]) for a in agents}

def test_a_partner_has_a_state_for_each_environment_that_begins_anew_with_each_episode(monkeypatch):
    last, kept, begun, learners, original = {}, [], [], [], M.SocialDreamer.act

    def two_members(agent):
        learners.append(agent)
        pool = pool_of(members=1, agent=agent)
        pool.add(perturbed(agent, 0.3))
        return pool

    def checked(self, obs, state, is_first, deterministic=False):
        out = original(self, obs, state, is_first, deterministic)
        seen = obs["obs"].tolist() if self is not learners[0] else ()
        for i, (seat, t, number, _) in enumerate(seen):
            key = id(self.actor), seat, number
            assert is_first[i] == (t == 0)
            begun.append(t == 0)
            if t > 0:  # what it knew after the step before, of this environment
                kept.append(last[key][0] == t - 1)
                same({name: state[name][i] for name in last[key][1]}, last[key][1])
            remembered = {name: out[1][name][i].clone() for name in ("deter", "stoch", "action")}
            last[key] = t, remembered
        return out

    monkeypatch.setattr(M.SocialDreamer, "act", checked)
    play_team(Numbered, 40, pool=two_members, partners="pool", num_envs=3)
    assert all(kept) and len(kept) > 60 and sum(begun) > 15
    assert len({who for who, _, _ in last}) == 3  # both members, and the live policy
    assert len({number for _, _, number in last}) == 3

def test_partners_do_not_touch_the_learners_state_or_generator():
    rows = []
    for partners in ("pool", "scripted"):
        space = Dict(obs=Box(-np.inf, np.inf, (4,), np.float32), seat=Discrete(2))
        agent = make_team(space, seats=2, perturb=0.2, partners=partners)
        pool = pool_of(members=1, agent=agent) if partners == "pool" else None
        rng, yes, no = np.random.default_rng(0), np.ones((3, 2), bool), np.zeros((3, 2), bool)
        obs = {"obs/obs": rng.normal(size=(3, 2, 4)).astype(np.float32), "here": yes, "active": yes,
               "learner": np.array([0, 1, 0]), "last": no, "terminal": no,
               "play": np.zeros((3, 2, 4), np.float32), "reward": np.zeros((3, 2)),
               "script": np.zeros((3, 2), int), "bayes": np.full((3, 2, 4), np.nan)}
        _, row = M.Table(agent, 3, pool).act(obs, np.ones(3, bool))
        state = {name: row[name] for name in ("deter", "stoch", "action")}
        state |= {"act": agent.act_rng.get_state(), "learn": agent.learn_rng.get_state()}
        rows.append(state)
    same(*rows)

def test_the_pool_counts_a_victory_for_who_earned_more_than_the_others():
    table, *_ = play_team(lambda: Toy((4, 4)), 3, partners="pool", num_envs=3,
                          pool=lambda agent: pool_of(members=1, agent=agent))
    table.seat, table.partners = np.array([0, 1, 0]), np.zeros(3, int)
    for env, (returns, won) in enumerate((([5.0, 1.0], 1.0), ([5.0, 1.0], 0.0), ([5.0, 5.0], 0.5))):
        table.pool.wins[0] = table.pool.games[0] = 0.0
        assert table.finish(env, np.array(returns)) == "pool_0"
        assert table.pool.wins[0] == won and table.pool.games[0] == 1

def test_a_game_is_one_with_a_script_only_if_that_played_all_seats_even_of_who_left():
    class Scripted(Toy):
        scripts = ("a", "b")

        def play(self, agent, script):
            return 0

    for chosen, played in ((("a",), "a"), (("a", "b"), None)):
        args = team_args(partners="scripted")
        seats = M.Seats(Scripted(), chosen)
        envs = M.SyncVectorEnv([lambda: M.Seats(Scripted(), chosen)])
        agent = make_team(Dict({**seats.seat_space.spaces, "seat": Discrete(3)}), Discrete(4), 3,
                          partners="scripted")
        table, seen = M.Table(agent, 1, scripts=seats.known, args=args), set()
        for seed in range(20):
            obs, _ = envs.reset(seed=seed)
            at_first = {int(x) for x in obs["script"][0]} - {-1}
            first = np.ones(1, bool)
            for _ in range(6):
                joint, _ = table.act(obs, first)
                obs, _, _, _, _ = envs.step(joint)
                first = np.zeros(1, bool)
            expected = seats.known[min(at_first)] if len(at_first) == 1 else None
            assert table.finish(0, np.zeros(3)) == expected
            seen.add(expected)
        assert played in seen

# ------------------------------------------------------------------------------- teams: whole runs

@pytest.mark.parametrize("partners", ["self", "pool", "scripted"])
def test_a_run_trains_logs_saves_resumes_and_is_evaluated_with_partners(folder, partners):
    held = dict(held_out=("mixed",)) if partners == "scripted" else {}
    args = team_args(partners=partners, pool_every=30, pool_size=3, video_every=60,
                     total_timesteps=120, **held)
    summary = M.main(args)
    run = run_of(folder)
    assert summary["global_step"] == 120 and summary["updates"] > 5
    assert len(summary["eval_returns"]) == 3
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    gain = "skill" if partners == "scripted" else "nats_saved"  # else nobody knows the ideal
    assert {"losses/tom", "losses/policy", "diagnostics/tom_accuracy", "diagnostics/tom_skill",
            "diagnostics/tom_cross_entropy", "diagnostics/tom_marginal", "charts/episodic_return",
            "charts/team_return", "eval/episodic_return", f"eval/tom_{gain}"} <= scalars(run).keys()
    assert list((run / "dreams").glob("teammates*"))
    names = {"self": set(), "scripted": {"0", "1", "2", "3", "mixed"},
             "pool": {"live", "pool_0", "pool_3", "pool_4"}}[partners]
    assert set(summary["eval_partners"]) == names
    value = summary["eval_bayes_return"]
    assert value is None if partners != "scripted" else abs(value - 6.72458) < 1e-5
    evaluation = M.main(parse_team(["--evaluate", str(run), "--eval-episodes", "4"]))
    assert len(evaluation["eval_returns"]) == 4 and set(evaluation["eval_partners"]) == names
    longer = M.main(parse_team(["--resume", str(run), "--total-timesteps", "150"]))
    assert longer["global_step"] == 150 and longer["updates"] > summary["updates"]
    saved = M.load_file(run)["pool"]
    assert (saved is not None) == (partners == "pool") and (not saved or saved["next"] == 6)

def test_returns_are_those_of_learner_and_team_and_lengths_those_of_episodes(folder, monkeypatch):
    monkeypatch.setattr(M, "make_parallel", lambda args, render=False: Toy((6, 3, 6)))
    each = [sum(10 * t + i for t in range(1, n + 1)) for i, n in enumerate((6, 3, 6))]
    summary = M.main(team_args(partners="self", total_timesteps=50))
    assert summary["eval_returns"] == [np.mean(each)] * 3
    assert summary["eval_team_return_mean"] == sum(each)
    assert summary["train_returns"] and set(summary["train_returns"]) == {np.mean(each)}
    log = scalars(run_of(folder))
    assert set(log["charts/team_return"]) == {sum(each)}
    assert set(log["charts/episodic_length"]) == {6}
    pool = M.main(team_args(partners="pool", exp_name="pool", total_timesteps=50,
                            pool_every=20))
    assert set(pool["eval_returns"]) | set(pool["train_returns"]) <= {float(x) for x in each}

class Steered(Toy):
    """Everyone's actions are two numbers, of which the first is seen."""
    def action_space(self, agent):
        return Box(-3, 5, (2,))

    def see(self, agents, actions):
        return super().see(agents, {name: float(x[0]) for name, x in actions.items()})

def test_teams_of_continuous_actions_train_on_what_all_did(folder, monkeypatch):
    monkeypatch.setattr(M, "make_parallel", lambda args, render=False: Steered((6, 6)))
    summary = M.main(team_args(partners="self", video_every=60, total_timesteps=80))
    assert summary["updates"] > 0 and "skill" not in summary["eval_tom"]
    data = M.load_file(run_of(folder), "replay.pt")["data"]
    raw = torch.cat([data["action"][0][:, :1], data["teammates"][0][:, 0, :1]], 1)  # of both seats
    said, first = data["obs/obs"][0][1:, 2:], data["is_first"][0][1:]
    close(said[~first], (raw.clamp(-1, 1) * 4 + 1)[:-1][~first], atol=1e-5)
    assert (raw.abs() > 1).any() and list((run_of(folder) / "dreams").glob("teammates*"))

def test_agents_of_other_runs_join_the_pool(folder):
    M.main(team_args(partners="pool", seed=7, total_timesteps=50))
    run = run_of(folder)
    args = team_args(partners="pool", pool_checkpoints=(str(run),))
    agent = M.SocialDreamer(*M.seat_spaces(args)[:2], args, 2)
    pool, saved = M.make_pool(agent, args, ""), M.load_file(run)["agent"]
    same(weights(pool.members[0]), {k: x for k, x in weights(agent).items()
                                    if k in weights(pool.members[0])})
    for name, p in pool.members[1].named_parameters():
        equal(p, saved[name])
    with pytest.raises(M.InputError, match="cannot join the pool"):
        M.make_pool(make_team(seats=2), args, "")
    plain = dataclasses.replace(args, teammate_model="none")
    with pytest.raises(M.InputError, match="trained with --teammate-model tom, .* play as none"):
        M.make_pool(M.SocialDreamer(*M.seat_spaces(plain)[:2], plain, 2), plain, "")
    resumed = M.make_pool(agent, args, run)  # the checkpoint is new to that run
    assert list(resumed.members) == [0, 1]
    for name, p in resumed.members[1].named_parameters():
        equal(p, saved[name])
    with pytest.raises(M.InputError, match="cannot join the pool"):  # of dreamer.py
        known = M.load_file(run)
        del known["args"]["teammate_model"]
        M.save_file(folder / "agent.pt", known)
        M.make_pool(agent, dataclasses.replace(args, pool_checkpoints=(str(folder),)), "")
    known = M.load_file(run)
    known["args"]["pool_checkpoints"] = (str(run),)
    M.save_file(run / "agent.pt", known)
    assert list(M.make_pool(agent, args, run).members) == [0]

def test_the_pool_of_a_run_that_had_none_begins_with_its_agent(folder):
    M.main(team_args(partners="scripted", seed=7, total_timesteps=50))
    args = team_args(partners="pool")
    agent = M.SocialDreamer(*M.seat_spaces(args)[:2], args, 2)
    saved = M.load_file(run_of(folder))["agent"]
    for name, p in M.make_pool(agent, args, run_of(folder)).members[0].named_parameters():
        equal(p, saved[name])

@pytest.mark.parametrize("values", [dict(size="12m"), dict(env_kwargs='{"actions": 5}')])
def test_a_pool_that_does_not_fit_the_run_that_is_resumed_is_an_input_error(folder, values):
    M.main(team_args(partners="pool", total_timesteps=50))
    with pytest.raises(M.InputError, match="does not fit"):
        M.main(team_args(partners="pool", total_timesteps=80, resume=str(run_of(folder)), **values))

def test_an_evaluation_has_the_partners_of_its_arguments():
    self_play = team_args(partners="self")
    agent = M.SocialDreamer(*M.seat_spaces(self_play)[:2], self_play, 2)
    other = dataclasses.replace(self_play, partners="scripted", scripted=("2",),
                                env_kwargs='{"epsilon": 0, "length": 4}')
    choose = agent.choose
    for mine, expected in ((2, 4.0), (1, 0.0)):  # matches with who always plays 2
        def play(*inputs, mine=mine):
            state = choose(*inputs)
            state["action"] = F.one_hot(torch.full((len(state["action"]),), mine), 4).float()
            return state

        agent.fast_choose = play
        assert M.evaluate(agent, other, 3)["returns"] == [expected] * 3
    with pytest.raises(M.InputError, match="need a pool"):
        M.evaluate(agent, dataclasses.replace(self_play, partners="pool"), 2)

def test_members_of_the_pool_hold_no_average_of_weights():
    agent = make_team(average=0.5)
    agent.update(team_batch(agent))
    pool = M.Pool(3, "uniform", 0)
    assert agent.averages and not pool.members[pool.add(agent)].averages

def test_pictures_show_what_the_head_expected_of_teammates_beside_what_they_did(monkeypatch):
    _, replay, agent = play_team(lambda: Toy((6, 3, 6)), 30)
    picture = M.draw_teammates(agent, replay, context=3)["teammates"]
    assert picture.shape == (12 * 5 * 14, 8 * 14, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
    drawn = Toy((6, 3, 6))
    drawn.render_mode = "rgb_array"
    drawn.render = lambda: np.full((40, 60, 3), 10 * drawn.t, np.uint8)
    monkeypatch.setattr(M, "make_parallel", lambda args, render: drawn)
    frames = M.draw_game(agent, None)["game"]
    assert frames[:, 5, 5, 0].tolist() == [10 * t for t in range(6)]  # six steps before the end
    assert frames.shape == (6, 40 + 2 * 14, 60, 3)
    framed = [[sum(not frame[40 + 14 * j + 1, 14 * a + 7].any() for a in range(4))
               for j in range(2)] for frame in frames]
    assert framed == [[1, 1]] * 3 + [[0, 1]] * 3  # one action each, none of who has left
    drawn.render_mode = None
    assert M.draw_game(agent, None) == {}

@pytest.mark.parametrize("flags", [
    ("--teammate-model", "none"), ("--teammate-model", "joint"), ("--teammate-model", "merged"),
    ("--tom-stop-grad",), ("--no-observe-teammates",), ("--oracle",),
    ("--env-id", "games.prisoners_dilemma")], ids="".join)
@beside
def test_every_arm_and_the_games_of_the_repository_run(folder, flags):
    small = SMALL | dict(team_latents=TEAM, eval_episodes=1, total_timesteps=44)
    args = dataclasses.replace(parse_team(list(flags)), **small)
    assert M.main(args)["updates"] > 0

def parse_team(flags):
    return M.parse_args(flags, M.SocialArgs)

def test_the_command_line_takes_the_preset_of_the_game_and_flags_on_top():
    assert parse_team([]) == M.SocialArgs.preset("hidden_match")
    mpe = parse_team(["--env-id", "mpe2.simple_spread_v3", "--num-envs", "3", "--compile"])
    assert mpe == M.SocialArgs.preset("mpe2.simple_spread_v3", num_envs=3, compile=True)
    assert mpe.partners == "self" and mpe.gamma == 0.95
    assert parse_team(["--scripted", "0", "1"]).scripted == ("0", "1")

@pytest.mark.parametrize("values,named", [
    (dict(env_id="no_such_module.env_v0"), "no_such_module"), (dict(env_id="json"), "parallel_env"),
    (dict(env_id=""), "''"), (dict(env_id="hidden_match/x"), "hidden_match/x"),
    (dict(env_id="overcooked/cramped_room"), 'games.overcooked.*"layout": "cramped_room"'),
    (dict(env_id="lbf/Foraging-8x8-2p-3f-v3"), 'games.foraging.*"env_id": "Foraging-8x8-2p-3f-v3"'),
    (dict(env_id="hockey"), "games.hockey$"),
    (dict(env_id="prisoners_dilemma"), "games.prisoners_dilemma$"),
    (dict(env_kwargs='{"epsilon": 1.5}'), "epsilon 1.5"), (dict(env_kwargs='{"q": -1}'), "q -1"),
    (dict(env_kwargs="{"), "env_kwargs"), (dict(env_kwargs="[1]"), "JSON object"),
    (dict(env_kwargs='{"colour": 1}'), "colour"), (dict(team_latents=6), "team_latents 6"),
    (dict(pool_size=2), "pool_size 2"), (dict(tom_scale=-1.0), "tom_scale -1"),
    (dict(pixels=True), "pixels"), (dict(partners="self", scripted=("0",)), "scripted"),
    (dict(scripted=("7",)), "'7'"), (dict(held_out=("nobody",)), "nobody"),
    (dict(capture_video=True), "hidden_match.*(render_mode|frames)"),
    (dict(held_out=("0", "1", "2", "3")), "all scripted partners are held out"),
    (dict(scripted=("3",), held_out=("3",)), "all scripted partners are held out"),
    (dict(pool_checkpoints=("x",)), "pool_checkpoints"),
    (dict(partners="pool", pool_checkpoints=("no/such/run",)), "no/such/run")])
def test_bad_input_about_teams_is_an_input_error_that_names_the_value(folder, values, named):
    with pytest.raises(M.InputError, match=f"(?s){named}"):
        M.main(team_args(**{"partners": "scripted", **values}))
    assert not list(folder.iterdir())

class Late(Toy):
    """The last agent comes with the second step; and again, if it left, with the fourth."""
    def __init__(self, there_at_first=False):
        super().__init__()
        self.there_at_first = there_at_first

    def reset(self, seed=None, options=None):
        obs, info = super().reset()
        if not self.there_at_first:
            self.agents = self.agents[:2]
        return obs, info

    def step(self, actions):
        result = super().step(actions)
        if self.t == 1 and self.there_at_first:
            self.agents = self.agents[:2]
        elif self.t in (2, 4):
            self.agents = self.agents + ["agent_2"]
        return result

@pytest.mark.parametrize("there_at_first", [False, True])
def test_an_agent_that_comes_late_or_returns_is_an_input_error(there_at_first):
    seats = M.Seats(Late(there_at_first))
    seats.reset(seed=0)
    seats.step(np.zeros((3, 4), np.float32))
    with pytest.raises(M.InputError, match="'agent_2' came after"):
        seats.step(np.zeros((3, 4), np.float32))

def test_without_an_ideal_observer_the_saved_nats_are_called_so(monkeypatch):
    monkeypatch.setattr(M, "make_parallel", lambda args, render=False: Toy())
    args = team_args(partners="self")
    agent = M.SocialDreamer(*M.seat_spaces(args)[:2], args, 3)
    tom = M.evaluate(agent, args, 2)["tom"]
    assert {"cross_entropy", "marginal", "accuracy", "nats_saved"} == tom.keys()
    close(tom["nats_saved"], 1 - tom["cross_entropy"] / tom["marginal"], rtol=1e-4)

def test_another_version_of_a_module_is_named(monkeypatch, tmp_path):
    (tmp_path / "zoo").mkdir()
    for name in ("__init__", "pistonball_v6", "other_v1"):
        (tmp_path / "zoo" / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(M.InputError, match=r"there are zoo.pistonball_v6$"):
        M.make_parallel(team_args(env_id="zoo.pistonball_v5"))
    (tmp_path / "zoo" / "other_v1.py").write_text("import no_such_package")
    with pytest.raises(M.InputError, match="no_such_package.*install its package"):
        M.make_parallel(team_args(env_id="zoo.other_v1"))  # it is there, but what it needs is not

def test_scripts_that_are_held_out_are_not_learned_with_even_if_both_name_them():
    args = team_args(partners="scripted", scripted=("0", "3"), held_out=("3",))
    assert M.scripts_of(args, M.HiddenMatch()) == ("0",)

def test_looking_at_a_game_leaves_the_global_generators_alone():
    args = team_args(partners="scripted")
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    M.seat_spaces(args)
    M.bayes_return(args)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())

@pytest.mark.parametrize("space,named", [
    (gym.spaces.Text(5), "Text"), (Dict(seat=Discrete(3), hand=Discrete(4)), "'seat'")])
def test_what_an_agent_of_a_team_cannot_observe_is_an_input_error(monkeypatch, space, named):
    class Other(Toy):
        def observation_space(self, agent):
            return space

    monkeypatch.setattr(M, "make_parallel", lambda args, render=False: Other())
    with pytest.raises(M.InputError, match=named):
        M.seat_spaces(team_args(partners="self"))

@pytest.mark.parametrize("kwargs", [{"length": 10.0}, {"length": 2.5}, {"actions": 1}])
def test_hidden_match_is_made_of_whole_numbers(kwargs):
    (name, value), = kwargs.items()
    with pytest.raises(M.InputError, match=f"{name} {value}.*whole"):
        M.HiddenMatch(**kwargs)

def test_one_seat_is_an_input_error():
    with pytest.raises(M.InputError, match="seats 1"):
        make_team(seats=1)

@pytest.mark.parametrize("env_id,module,package", [
    ("mpe2.simple_spread_v3", "mpe2", "mpe2==1.1.1"),
    ("pettingzoo.butterfly.pistonball_v6", "pettingzoo", "pettingzoo"),
    ("games.hockey", "hockey", "Box2D==2.3.10")])
def test_a_missing_game_is_an_input_error_with_the_line_that_installs_it(
        monkeypatch, env_id, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.hockey_env", None)
    with pytest.raises(M.InputError, match=f"pip install .*{package}"):
        M.make_parallel(team_args(env_id=env_id))

@pytest.mark.parametrize("kwargs,seats", [
    pytest.param("{}", 3, marks=slow), ('{"N": 4, "continuous_actions": true}', 4)])
def test_self_play_in_mpe2_trains_on_the_streams_of_all_seats(folder, kwargs, seats):
    pytest.importorskip("mpe2")
    summary = M.main(team_args(env_id="mpe2.simple_spread_v3", env_kwargs=kwargs))
    data = M.load_file(run_of(folder), "replay.pt")["data"]
    assert summary["updates"] > 0 and len(data["reward"]) == 2 * seats
    assert data["teammates"][0].shape[1] == seats - 1
    assert torch.stack(data["is_last"]).any() and not torch.stack(data["is_terminal"]).any()

# ------------------------------------------------------------------------------- teams: learning

@slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hidden_match_is_played_as_well_as_can_be_and_not_without_a_model_of_the_teammate(
        folder, seed):
    values = dict(seed=seed, cuda=False, compile=False)
    tom = M.main(M.SocialArgs.preset("hidden_match", **values))
    assert tom["eval_return_mean"] >= 6.3 and tom["eval_tom"]["skill"] >= 0.9
    plain = M.main(M.SocialArgs.preset("hidden_match", teammate_model="none", **values))
    assert plain["eval_return_mean"] <= 2.8

@slow
def test_where_the_partner_is_seen_plain_dreamer_does_as_well(folder):
    values = dict(env_kwargs='{"q": 1}', cuda=False, compile=False)
    tom, plain = (M.main(M.SocialArgs.preset("hidden_match", teammate_model=arm, **values))
                  for arm in ("tom", "none"))
    assert abs(tom["eval_return_mean"] - plain["eval_return_mean"]) <= 0.5

# =================================================== what takes long, beside the other tests

def train_on_a_share(rank, ranks, folder):
    """Twenty updates of one of `ranks` processes on its share of a batch; saves what it learned."""
    torch.set_num_threads(1)
    batch = batch_of(make_agent(perturb=0.1), size=8)  # before they meet and get noise of their own
    if ranks > 1:
        meeting = f"file://{folder}/meet"
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=ranks)
    agent, rng = calm(make_agent(imagination_horizon=5)), torch.Generator().manual_seed(3)
    share = slice(4 * rank, 4 * rank + 4) if ranks > 1 else slice(None)
    data = agent.training_data({name: x[share] for name, x in batch.items()})
    for _ in range(20):
        posterior = torch.rand(8, 8, 6, 1, generator=rng)[share]
        prior = torch.rand(8, 8, 5, 6, 1, generator=rng)[share].flatten(0, 1)
        action = torch.rand(8, 8, 5, 1, generator=rng)[share].flatten(0, 1)
        agent.learn(data, {"posterior": posterior, "prior": prior, "action": action})
    torch.save({**weights(agent), "range": agent.retnorm.range}, f"{folder}/{ranks}.{rank}.pt")
    if ranks > 1:  # a thread of gloo that outlives the interpreter can abort the process
        torch.distributed.destroy_process_group()

@beside
def test_two_processes_learn_what_one_learns_from_both_their_batches_and_stay_identical(tmp_path):
    torch.multiprocessing.spawn(train_on_a_share, (2, str(tmp_path)), nprocs=2)
    train_on_a_share(0, 1, str(tmp_path))
    first, second, whole = (torch.load(tmp_path / f"{name}.pt") for name in ("2.0", "2.1", "1.0"))
    same(first, second)
    for name, x in whole.items():
        close(first[name], x, rtol=1e-4, atol=1e-5)
    alone = weights(make_agent())
    assert max((whole[name] - x).abs().max() for name, x in alone.items()) > 5e-3  # it has learned

class Probe(gym.Env):
    """A task in a few lines: `cue` is drawn at reset; `pay(action, cue, t)` and `see(cue, t)` are
    the task."""
    def __init__(self, pay, see, length=1, actions=Discrete(2)):
        self.pay, self.see, self.length, self.action_space = pay, see, length, actions
        self.observation_space = Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(2))
        return np.float32(self.see(self.cue, 0)), {}

    def step(self, action):
        reward = float(self.pay(action, self.cue, self.t))
        self.t += 1
        return np.float32(self.see(self.cue, self.t)), reward, self.t == self.length, False, {}

class Delayed(Probe):
    """Action 1 at the first of three steps is paid at the last; it is not seen in between."""
    def __init__(self):
        super().__init__(lambda a, cue, t: t == 2 and self.done == 1, lambda cue, t: (0, t / 3), 3)

    def step(self, action):
        self.done = action if self.t == 0 else self.done
        return super().step(action)

def act_rightly():
    return Probe(lambda a, cue, t: a == 1, lambda cue, t: (0, 0))

def act_on_sight():
    return Probe(lambda a, cue, t: a == cue, lambda cue, t: (2 * cue - 1, 0))

def act_on_memory():  # at t = 1 nothing is seen
    return Probe(lambda a, cue, t: t == 1 and a == cue,
                 lambda cue, t: ((2 * cue - 1) * (t == 0), t), length=2)

def act_by_degrees():
    return Probe(lambda a, cue, t: 1 - abs(a[0] + 0.7), lambda cue, t: (0, 0),
                 actions=Box(-1, 1, (1,)))

PROBES = {  # the optimum is a return of 1, chance 0.5, or 0.1 where the action is continuous
    "one_action_is_right": act_rightly,
    "what_is_seen_tells_the_right_action": act_on_sight,
    "what_was_seen_a_step_before_tells_the_right_action": act_on_memory,
    "the_first_action_decides_and_the_third_step_pays": Delayed,
    "a_continuous_action_has_a_best_value": act_by_degrees}

@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=slow), pytest.param(3, marks=slow)])
@pytest.mark.parametrize("name", PROBES)
@beside
def test_the_optimum_is_learned_within_600_updates_when(name, seed):
    make = PROBES[name]
    agent = make_agent(make().observation_space, make().action_space, seed=seed, warmup=10,
                       learning_rate=3e-3, ent_coef=1e-3, batch_length=4, imagination_horizon=3)
    loop, rewards, ends, score = Loop(agent, make, num_envs=4), [], [], 0.0
    enough = 0.5 if "continuous" in name else 0.9  # of what it samples, exploration included
    for step in range(600):
        rewards.append(loop.step(updates=1, batch_size=16).sum())
        ends.append(loop.arrived["is_last"].sum())
        score = sum(rewards[-40:]) / max(1, sum(ends[-40:]))
        if step > 40 and score > enough:
            return
    raise AssertionError(f"return {score} after {step + 1} updates")

SLOW_IN_ONE_PROCESS = """
import os, time
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv
class Slow(CartPoleEnv):
    def step(self, action):
        time.sleep(0.3 * int(os.environ["RANK"]))
        return super().step(action)
gym.register("Slow-v0", Slow, max_episode_steps=100)
"""

@beside
def test_a_signal_to_processes_at_different_steps_ends_both_after_the_same_one(folder):
    (folder / "slow.py").write_text(SLOW_IN_ONE_PROCESS)
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", D.__file__, *FLAGS]
    flags = ["--env-id", "slow:Slow-v0", "--run-dir", "mine", "--total-timesteps", "1e5"]
    process = subprocess.Popen(
        [sys.executable, *start, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True, env=os.environ | {"PYTHONPATH": str(folder)})
    try:
        next(line for line in process.stdout if "episodic_return" in line)  # both learn by now
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert summary_of(folder / "mine")["signal"] == signal.SIGINT
    steps = [D.load_file("mine", name)["step"] for name in ("replay.pt", "replay1.pt")]
    assert steps == [D.load_file("mine")["counters"]["global_step"]] * 2

FLAGS = ["--size", "1m", "--num-envs", "2", "--batch-size", "2", "--batch-length", "8",
         "--train-ratio", "4", "--eval-episodes", "2", "--video-every", "0", "--threads", "1",
         "--no-cuda", "--no-compile", "--imagination-horizon", "3"]

def command(*parts):
    """Runs python with `parts` as a program of its own; returns what it printed."""
    done = subprocess.run([sys.executable, *parts], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout

@beside
def test_each_script_trains_by_itself_in_an_empty_folder(script, folder):
    path = folder / "alone.py"
    path.write_text(Path(script.module.__file__).read_text())
    printed = command(str(path), *FLAGS, "--total-timesteps", "80")
    summary = summary_of(run_of(folder))
    assert summary["global_step"] >= 80 and summary["updates"] > 0
    assert len(summary["eval_returns"]) == 2
    assert "global_step=" in printed and "episodic_return=" in printed

@pytest.mark.parametrize("script", ["dreamer", pytest.param("dreamer_marl", marks=slow)],
                         indirect=True)
@beside
def test_torchrun_spreads_a_run_over_processes_and_only_as_many_resume_it(script, folder):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", script.module.__file__, *FLAGS]
    for steps in (80, 120):
        command(*start, "--total-timesteps", str(steps))
        run = run_of(folder)
        start += ["--resume", str(run)]
        summary = summary_of(run)
        assert summary["global_step"] == steps and summary["ranks"] == 2
        assert summary["updates"] > 0
        replays = [script.module.load_file(run, name) for name in ("replay.pt", "replay1.pt")]
        assert [replay["count"] for replay in replays] == [steps // 4] * 2
        assert not torch.equal(*(torch.stack(replay["data"]["action"]) for replay in replays))
    (run / "replay1.pt").unlink()  # one that was lost delays the updates of both
    command(*start, "--total-timesteps", "240", "--eval-every", "20")
    after = summary_of(run)
    assert after["global_step"] == 240 and after["updates"] > summary["updates"]
    counts = [script.module.load_file(run, name)["count"] for name in ("replay.pt", "replay1.pt")]
    assert counts == [60, 30]
    flags = ["--resume", str(run), "--total-timesteps", "260"]
    args = script.module.parse_args(flags, script.args_class)
    with pytest.raises(script.module.InputError, match="2 processes"):
        script.module.main(args)
