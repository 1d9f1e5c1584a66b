"""Stand-ins for the packages behind the games, so that the adapters are tested anywhere."""
import importlib
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, Tuple

PACKAGES = {"overcooked": "overcooked_ai_py", "foraging": "lbforaging",
            "hockey": "hockey.hockey_env"}
FORAGING = "Foraging-8x8-2p-3f-v3"


class Kitchen:
    """What the adapter uses of overcooked-ai: soup in step 2, shaping 3 and 5 in every step."""
    num_players = 2
    start_all_orders = [{"ingredients": ["onion"] * 3}]
    mp = None
    mlam = None
    STAY = (0, 0)
    ALL_ACTIONS = [(0, -1), (0, 1), (1, 0), (-1, 0), (0, 0), "interact"]

    @classmethod
    def from_layout_name(cls, layout):
        kitchen = cls()
        kitchen.num_players = 4 if layout == "crowd" else 2
        if layout == "tomato":
            kitchen.start_all_orders = [{"ingredients": ["onion"] * 3}, {"ingredients": ["tomato"]}]
        return kitchen

    @staticmethod
    def from_mdp(mdp, start_state_fn=None, horizon=1e10, info_level=1):
        mdp.horizon = horizon
        mdp.state = 0
        return mdp

    def featurize_state_mdp(self, state):
        return np.full(4, state), np.full(4, -state)

    def lossless_state_encoding_mdp(self, state):
        return np.full((2, 3, 5), state), np.full((2, 3, 5), -state)

    def reset(self, regen_mdp=True):
        assert not regen_mdp, "this would compute the planners anew"
        self.state = 0

    def step(self, joint):
        self.state += 1
        soup = 20 * (self.state == 2)
        return self.state, soup, self.state >= self.horizon, {"shaped_r_by_agent": [3, 5]}


class Cook:
    """Greedy, with a memory: what it does depends on how often it was asked."""
    def __init__(self, planner):
        self.asked = 0

    def set_agent_index(self, index):
        self.index = index

    def action(self, state):
        self.asked += 1
        return Kitchen.ALL_ACTIONS[(np.random.choice(6) + self.asked) % 6], {}


class Forest:
    """What the adapter uses of lbforaging: food is eaten in step `eaten`; time is up in step 5."""
    eaten = 9
    action_space = Tuple((Discrete(6), Discrete(6)))
    observation_space = Tuple((Box(-9, 9, (3,)), Box(-9, 9, (3,))))

    def __init__(self, max_episode_steps, penalty=0.0):
        assert penalty >= 0, "penalty is negative"
        self.limit = max_episode_steps
        self.players = [types.SimpleNamespace(position=(0, 0)) for _ in range(2)]

    def look(self):
        return np.full(3, self.t, np.float32), np.full(3, -self.t, np.float32)

    def reset(self, seed=None):
        assert not any(player.position for player in self.players), "they stand in the way"
        self.t, self.field = 0, np.eye(2)
        return self.look(), {}

    def step(self, actions):
        self.t += 1
        self.field = np.eye(2) * (self.t < self.eaten)
        over = self.t >= min(self.eaten, self.limit)
        return self.look(), [0.25 * (actions[0] == 5), 0], over, False, {}

    def close(self):
        pass


class Rink:
    """What the adapter uses of hockey-env: 18 numbers, seen negated from the other side; in step 3
    `winner` wins, or time is up."""
    winner = 1

    def __init__(self, keep_mode=True):
        self.size = 18 if keep_mode else 16

    def reset(self, one_starting=None, seed=None):
        self.t, self.rng = 0, np.random.default_rng(seed)
        self.puck = self.rng.random() * (1 if one_starting else -1)
        return np.full(self.size, self.puck), {}

    def obs_agent_two(self):
        return np.full(self.size, -self.puck - self.t)

    def get_info_agent_two(self):
        return {"winner": -self.winner * (self.t == 3), "reward_closeness_to_puck": -0.5}

    def step(self, action):
        self.t, self.action = self.t + 1, action
        info = {"winner": self.winner * (self.t == 3), "reward_closeness_to_puck": -0.25}
        return np.full(self.size, self.puck + self.t), 99.0, self.t == 3, False, info

    def render(self, mode):
        assert mode == "rgb_array"
        return np.zeros((48, 60, 3), np.uint8)

    def close(self):
        pass


class Bot:
    def __init__(self, weak, keep_mode):
        self.weak, self.size = weak, 4 if keep_mode else 3

    def act(self, obs):
        return np.array([obs[1] / 10, 2.0, float(self.weak), np.random.uniform()])[: self.size]


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    (tmp_path / "cramped_room.layout").touch()
    for name in ("crowd", "tomato"):
        (tmp_path / f"{name}.layout").touch()
    space = types.SimpleNamespace
    mdp = space(actions=space(Action=Kitchen), overcooked_env=space(OvercookedEnv=Kitchen),
                overcooked_mdp=space(OvercookedGridworld=Kitchen))
    modules = {
        "overcooked_ai_py": space(static=space(LAYOUTS_DIR=tmp_path)),
        "overcooked_ai_py.agents": space(agent=space(GreedyHumanModel=Cook)),
        "overcooked_ai_py.mdp": mdp,
        "lbforaging": space(),
        "lbforaging.foraging": space(ForagingEnv=Forest),
        "hockey": space(),
        "hockey.hockey_env": space(HockeyEnv=Rink, BasicOpponent=Bot)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = gym.envs.registration.EnvSpec(FORAGING, "lbforaging.foraging:ForagingEnv",
                                         kwargs={"max_episode_steps": 5})
    monkeypatch.setitem(gym.registry, FORAGING, spec)


@pytest.fixture(params=["stand-in", "real"])
def packages(request):
    """A test with this fixture runs with the stand-ins and with the packages installed."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_ins")
    return request.param


def make(name, packages="stand-in", **kwargs):
    """The environment of games.{name}; the test is skipped if its package is wanted and missing."""
    if packages == "real" and name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return importlib.import_module(f"games.{name}").parallel_env(**kwargs)
