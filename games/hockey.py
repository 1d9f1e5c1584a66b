"""Air hockey for two. An adapter of martius-lab's hockey-env, which is not on PyPI.

    pip install Box2D==2.3.10 pygame
    git clone https://github.com/martius-lab/hockey-env
    export PYTHONPATH=$PWD/hockey-env

The winner earns 10 and the loser −10. Shaping takes away something from a player while the puck
lies or comes nearer in its own half and is far from it: up to about 60 an episode.

Scripts: "weak" and "strong", the two strengths of the package's BasicOpponent. The protocol is that
of games/__init__.py. BasicOpponent draws from NumPy's global generator; while it plays, that is the
generator of `reset(seed)`. Measured: in 300,000 steps dreamer_marl.py did not win more than it
lost; repeat=4 came closer in 75,000 (benchmark/README.md).
"""
import importlib
from typing import Any

import gymnasium as gym
import numpy as np


class Hockey:
    """A ParallelEnv. Actions: Box(−1, 1, (4,)), forces in x and y, torque, and above 0.5 to shoot.
    Observations: Box of float32, (18,), positions, angles and velocities of oneself, the opponent
    and the puck, and how long each may keep it; each player sees the field from its own side. A
    goal terminates the episode; without one it is truncated when time is up, after 251 frames.

    shaping_steps: steps over which shaping fades linearly to nothing; 0 leaves it out.
    repeat: frames, 50 a second, for which a learner's action is held; scripts act at every frame.
    keep_mode: players hold the puck that they catch; if not, actions are (3,), observations (16,).
    kwargs: further arguments of hockey.hockey_env.HockeyEnv, such as mode.
    render_mode: None or "rgb_array"; `render` returns (480, 600, 3) uint8 in both cases.
    Raises ImportError if the package is missing, ValueError for values that cannot be used."""

    metadata = {"name": "hockey", "render_modes": ["rgb_array"], "render_fps": 50}
    possible_agents = ["player_0", "player_1"]
    scripts = ("weak", "strong")

    def __init__(self, shaping_steps: int = 0, repeat: int = 1, keep_mode: bool = True,
                 render_mode: str | None = None, **kwargs: Any):
        if shaping_steps < 0 or type(repeat) is not int or repeat < 1:
            raise ValueError(f"games.hockey: shaping_steps {shaping_steps} must be at least 0, "
                             f"repeat {repeat} a whole number of at least 1")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"games.hockey: render_mode {render_mode!r} must be rgb_array or None")
        try:
            self.library = importlib.import_module("hockey.hockey_env")
        except ImportError as error:
            raise ImportError(f"games.hockey needs hockey-env ({error}): pip install Box2D==2.3.10 "
                              "pygame, and put the folder of a clone of "
                              "github.com/martius-lab/hockey-env on PYTHONPATH") from error
        self.game = self.library.HockeyEnv(keep_mode=keep_mode, **kwargs)
        self.shaping_steps = shaping_steps
        self.repeat = repeat
        self.scripted: dict[str, str] = {}  # whose next action a script has chosen, and which
        self.keep_mode = keep_mode
        self.render_mode = render_mode
        self.steps = 0.0  # of this environment, over all its episodes
        self.first_starts = True  # whether the next episode begins with the puck at player_0
        self.agents: list[str] = []
        self.rng = np.random.default_rng()
        first, _ = self.game.reset()  # the package's own space says 18 numbers where there are 16
        box = gym.spaces.Box(-np.inf, np.inf, first.shape, np.float32)
        self.observation_spaces = {agent: box for agent in self.possible_agents}
        self.action_spaces = {agent: gym.spaces.Box(-1, 1, (4 if keep_mode else 3,), np.float32)
                              for agent in self.possible_agents}

    @property
    def unwrapped(self) -> "Hockey":
        return self

    def observation_space(self, agent: str) -> gym.spaces.Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.spaces.Box:
        return self.action_spaces[agent]

    def observe(self, first: np.ndarray) -> dict[str, np.ndarray]:
        self.views = {"player_0": np.asarray(first, np.float32),
                      "player_1": np.asarray(self.game.obs_agent_two(), np.float32)}
        return dict(self.views)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None):
        """Returns (observations, infos). options["steps"]: steps made so far. Who starts is drawn
        if there is a seed, and alternates from then on."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
            self.first_starts = bool(self.rng.integers(2))
        self.steps = (options or {}).get("steps", self.steps)
        # The package forgets to take the puck from who held it when the last episode ended, and
        # draws a new seed from the operating system unless it is given one.
        self.game.player1_has_puck = self.game.player2_has_puck = 0
        first, _ = self.game.reset(self.first_starts, seed=int(self.rng.integers(2**31)))
        self.first_starts = not self.first_starts
        self.agents = list(self.possible_agents)
        self.scripted = {}
        self.players: dict[tuple[str, str], Any] = {}
        return self.observe(first), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, np.ndarray]):
        """Returns (observations, rewards, terminations, truncations, infos), each by agent."""
        weight = max(0.0, 1 - self.steps / self.shaping_steps) if self.shaping_steps else 0.0
        self.steps += 1
        rewards = dict.fromkeys(self.possible_agents, 0.0)
        for frame in range(self.repeat):
            if frame:
                actions = actions | {name: self.play(name, x) for name, x in self.scripted.items()}
            joint = np.concatenate([actions[agent] for agent in self.possible_agents])
            first, _, over, _, info = self.game.step(joint)
            obs = self.observe(first)
            for agent, own in zip(self.possible_agents, (info, self.game.get_info_agent_two())):
                victory = 10 * own["winner"] if over else 0  # 1 oneself, −1 the other, 0 nobody
                rewards[agent] += float(victory + weight * own["reward_closeness_to_puck"])
            if over:
                break
        self.scripted = {}
        if over:
            self.agents = []
        goal = bool(over and info["winner"])
        terminations = dict.fromkeys(self.possible_agents, goal)
        truncations = dict.fromkeys(self.possible_agents, bool(over) and not goal)
        return obs, rewards, terminations, truncations, {name: {} for name in self.possible_agents}

    def play(self, agent: str, script: str) -> np.ndarray:
        """The action that `script` takes now for `agent`. Raises KeyError for unknown names."""
        weak = {"weak": True, "strong": False}[script]
        self.scripted[agent] = script
        # All environments of a process share NumPy's global generator, from which the package
        # draws, and forked processes repeat it. For this call it is the environment's own.
        shared = np.random.get_bit_generator()
        np.random.set_bit_generator(self.rng.bit_generator)
        try:
            if (agent, script) not in self.players:
                player = self.library.BasicOpponent(weak=weak, keep_mode=self.keep_mode)
                self.players[agent, script] = player
            action = self.players[agent, script].act(self.views[agent])
        finally:
            np.random.set_bit_generator(shared)
        return np.clip(action, -1, 1).astype(np.float32)

    def render(self) -> np.ndarray:
        return self.game.render(mode="rgb_array")

    def close(self) -> None:
        self.game.close()


def parallel_env(**kwargs: Any) -> Hockey:
    """The environment; arguments and errors are those of Hockey."""
    return Hockey(**kwargs)
