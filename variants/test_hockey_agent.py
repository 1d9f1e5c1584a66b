"""hockey_agent.py: what the game for one player passes on, and the file's values."""
import importlib
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import dreamer_v1
import hockey_agent
from test_variants import batch_of

import dreamer

class Game:
    """A game for two in place of games.hockey: player_0 wins at step 3 if it plays ones."""
    metadata = {"render_modes": []}
    scripts = ("weak", "strong")

    def __init__(self, **kwargs):
        self.kwargs = kwargs
        self.seen = []

    def observation_space(self, agent):
        return gym.spaces.Box(-np.inf, np.inf, (18,), np.float32)

    def action_space(self, agent):
        return gym.spaces.Box(-1, 1, (4,), np.float32)

    def both(self, mine, others):
        return {"player_0": mine, "player_1": others}

    def reset(self, seed=None):
        self.seed = seed
        self.t = 0
        return self.both(np.zeros(18, np.float32), np.full(18, 9, np.float32)), self.both({}, {})

    def play(self, agent, script):
        self.asked = agent, script
        return np.full(4, 0.5, np.float32)

    def step(self, actions):
        self.seen.append(actions)
        self.t += 1
        over = self.t == 3
        won = over and bool((actions["player_0"] == 1).all())
        reward = (10.0 if won else -10.0) if over else 0.0
        obs = self.both(np.full(18, self.t, np.float32), np.full(18, -1, np.float32))
        ends = self.both(over, over)
        return obs, self.both(reward, -reward), ends, self.both(False, False), self.both({}, {})

    def close(self):
        pass

@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(importlib.import_module("games.hockey"), "parallel_env", Game)

@pytest.mark.parametrize("script, action, reward", [("weak", 1, 10), ("strong", 0, -10)])
def test_player_0_is_the_agent_and_player_1_the_script(script, action, reward, fake):
    env = gym.make("HockeyDuel-v0", script=script)
    obs, _ = env.reset(seed=5)
    game = env.unwrapped.game
    assert game.seed == 5 and not obs.any()
    assert game.kwargs["shaping_steps"] == 0  # no reward but victory and defeat
    mine = np.full(4, action, np.float32)
    results = [env.step(mine) for _ in range(3)]
    assert [r for _, r, *_ in results] == [0, 0, reward]
    assert [ended for _, _, ended, _, _ in results] == [False, False, True]
    assert not any(cut for _, _, _, cut, _ in results)
    assert [int(obs[0]) for obs, *_ in results] == [1, 2, 3]
    assert game.asked == ("player_1", script)
    assert all((x["player_0"] == mine).all() and (x["player_1"] == 0.5).all() for x in game.seen)

def test_an_unknown_script_is_refused_in_a_sentence(fake):
    with pytest.raises(dreamer.InputError, match="script 'lazy' does not exist: choose one of"):
        dreamer.main(hockey_agent.Args.preset("HockeyDuel-v0", cuda=False,
                                              env_kwargs='{"script": "lazy"}'))

def test_in_the_real_game_only_the_end_of_an_episode_pays():
    pytest.importorskip("hockey", reason="hockey-env is not installed")
    env = gym.make("HockeyDuel-v0")
    outcomes = set()
    for seed in range(20):
        env.reset(seed=seed)
        env.action_space.seed(seed)
        ended = cut = False
        while not (ended or cut):
            obs, reward, ended, cut, _ = env.step(env.action_space.sample())
            assert reward in ((10, -10) if ended else (0,))
        outcomes.add(reward)
    assert len(outcomes) > 1 and obs.shape == (18,)

def test_the_files_values_come_first_and_all_others_are_those_of_dreamer_v1():
    args = dreamer.parse_args(["--actor-lr", "1e-3"], hockey_agent.Args)
    assert args.env_id == "HockeyDuel-v0" and args.actor_lr == 1e-3
    assert hockey_agent.Args.preset("HockeyDuel-v0", gamma=0.8).gamma == 0.8
    args = dreamer.parse_args([], hockey_agent.Args)
    assert (args.learning_rate, args.actor_lr, args.critic_lr) == (3e-4, 3e-5, 3e-5)
    assert (args.dyn_scale, args.rep_scale, args.free_nats) == (0.5, 0.1, 1.0)
    assert args.gamma == 0.997 and args.normalize_returns and not args.contdisc
    assert (args.batch_size, args.batch_length, args.repval_scale) == (50, 50, 0.0)
    size = dreamer.SIZES[args.size]
    assert (size.latents, size.deter, size.hidden, size.units) == (64, 256, 256, 256)

def test_an_update_at_full_size_reports_finite_losses_and_measures_the_range_of_returns(fake):
    args = hockey_agent.Args.preset("HockeyDuel-v0", cuda=False, batch_size=2, batch_length=4)
    spaces = Game().observation_space("player_0"), Game().action_space("player_0")
    agent = dreamer_v1.DreamerV1(*spaces, args)
    assert agent.wm.rssm.cell.hidden_size == 256 and agent.wm.rssm.stoch_shape == (64, 1)
    agent.update(batch_of(agent, 2))
    metrics, _ = agent.update(batch_of(agent, 2))
    assert all(math.isfinite(x) for x in metrics.values())
    assert agent.retnorm.range.abs().sum() > 0
