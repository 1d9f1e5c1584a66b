"""Overcooked: two cooks make onion soup together in a narrow kitchen. Adapter of overcooked-ai.

    pip install overcooked-ai==1.1.0 scipy

Both cooks earn 20 (in tutorial_0, 63) for every soup of three onions that either delivers. Shaping
pays a single cook 3 for an onion in a pot, 3 for a dish for a soup, and 5 for a soup from the pot.

Scripts: "greedy" (the package's GreedyHumanModel), "stay" (never moves), "random" (any of the six
actions). The protocol is that of games/__init__.py. A greedy cook that is stuck draws from NumPy's
global generator; while it plays, that is the generator of `reset(seed)`.
"""
import contextlib
import io
import os
from typing import Any

import gymnasium as gym
import numpy as np


def load_package() -> tuple[Any, ...]:
    """The modules of overcooked-ai that are used here. Raises ImportError if it is missing."""
    np.Inf = np.inf  # the package is older than NumPy 2
    try:
        from overcooked_ai_py import static
        from overcooked_ai_py.agents import agent
        from overcooked_ai_py.mdp import actions, overcooked_env, overcooked_mdp
    except ImportError as error:
        raise ImportError(f"games.overcooked needs overcooked-ai ({error}): "
                          "pip install overcooked-ai==1.1.0 scipy") from error
    return static, agent, actions, overcooked_env, overcooked_mdp


class Overcooked:
    """A ParallelEnv. Actions: Discrete(6), that is north, south, east, west, stay, interact.
    Observations: Box of float32, flat. The episode is truncated after `horizon` steps.

    layout: name of a kitchen of the package for two cooks who make soups of three onions.
    encoding: "featurized", (96,), distances and states of things, or "lossless", (W·H·26,), planes.
    shaping_steps: steps over which shaping fades linearly to nothing; 0 leaves it out.
    horizon: steps of an episode, at least 1.

    Raises ImportError if the package is missing, ValueError for other values than these."""

    metadata = {"name": "overcooked", "render_modes": []}
    render_mode = None
    possible_agents = ["cook_0", "cook_1"]
    scripts = ("greedy", "stay", "random")

    def __init__(self, layout: str = "cramped_room", encoding: str = "featurized",
                 shaping_steps: int = 0, horizon: int = 400, render_mode: str | None = None):
        if encoding not in ("featurized", "lossless"):
            raise ValueError(f"games.overcooked: encoding {encoding!r}: use featurized or lossless")
        if shaping_steps < 0 or horizon < 1:
            raise ValueError(f"games.overcooked: shaping_steps {shaping_steps} must be at least 0, "
                             f"horizon {horizon} at least 1")
        if render_mode is not None:
            raise ValueError("games.overcooked draws no frames: leave out render_mode")
        # The package reports on its planners, and the old gym that it imports on its age.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            static, agent, actions, overcooked_env, overcooked_mdp = load_package()
            known = sorted(name.removesuffix(".layout") for name in os.listdir(static.LAYOUTS_DIR))
            if layout not in known:
                raise ValueError(f"games.overcooked: layout {layout!r} is unknown, "
                                 f"take one of {', '.join(known)}")
            mdp = overcooked_mdp.OvercookedGridworld.from_layout_name(layout)
            if mdp.num_players != 2 or mdp.start_all_orders != [{"ingredients": ["onion"] * 3}]:
                raise ValueError(f"games.overcooked: {layout!r} is not for two cooks of onion soup")
            self.game = overcooked_env.OvercookedEnv.from_mdp(mdp, horizon=horizon, info_level=0)
            self.encode = {"featurized": self.game.featurize_state_mdp,
                           "lossless": self.game.lossless_state_encoding_mdp}[encoding]
            box = gym.spaces.Box(-np.inf, np.inf, self.observe()["cook_0"].shape, np.float32)
            _ = self.game.mp  # the planner that steps use: made here, where output is silenced
        self.greedy_model = agent.GreedyHumanModel
        self.choices = actions.Action.ALL_ACTIONS
        self.stay = self.choices.index(actions.Action.STAY)
        self.shaping_steps = shaping_steps
        self.steps = 0.0  # of this environment, over all its episodes
        self.agents: list[str] = []
        self.rng = np.random.default_rng()
        self.observation_spaces = {name: box for name in self.possible_agents}
        self.action_spaces = {name: gym.spaces.Discrete(6) for name in self.possible_agents}

    @property
    def unwrapped(self) -> "Overcooked":
        return self

    def observation_space(self, agent: str) -> gym.spaces.Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.spaces.Discrete:
        return self.action_spaces[agent]

    def observe(self) -> dict[str, np.ndarray]:
        views = self.encode(self.game.state)
        return {name: np.ravel(view).astype(np.float32)
                for name, view in zip(self.possible_agents, views)}

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None):
        """Returns (observations, infos). options["steps"]: how many steps have been made so far."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.steps = (options or {}).get("steps", self.steps)
        self.game.reset(regen_mdp=False)  # the same kitchen, whose planners are kept
        self.agents = list(self.possible_agents)
        self.greedy: dict[str, Any] = {}  # greedy cooks remember what they saw in this episode
        return self.observe(), {name: {} for name in self.agents}

    def step(self, actions: dict[str, int]):
        """Returns (observations, rewards, terminations, truncations, infos), each by agent."""
        joint = tuple(self.choices[int(actions[name])] for name in self.possible_agents)
        _, soups, over, info = self.game.step(joint)
        weight = max(0.0, 1 - self.steps / self.shaping_steps) if self.shaping_steps else 0.0
        self.steps += 1
        rewards = {name: float(soups + weight * shaping)
                   for name, shaping in zip(self.possible_agents, info["shaped_r_by_agent"])}
        if over:
            self.agents = []
        terminations = {name: False for name in self.possible_agents}
        truncations = {name: bool(over) for name in self.possible_agents}
        infos = {name: {} for name in self.possible_agents}
        return self.observe(), rewards, terminations, truncations, infos

    def play(self, agent: str, script: str) -> int:
        """The action that `script` takes now for `agent`. Raises KeyError for unknown names."""
        if script == "random":
            return int(self.rng.integers(len(self.choices)))
        if script == "stay":
            return self.stay
        if script != "greedy":
            raise KeyError(script)
        if agent not in self.greedy:
            self.greedy[agent] = self.greedy_model(self.game.mlam)
            self.greedy[agent].set_agent_index(self.possible_agents.index(agent))
        # All environments share NumPy's global generator, and forked processes repeat its draws.
        shared = np.random.get_bit_generator()
        np.random.set_bit_generator(self.rng.bit_generator)
        try:
            action, _ = self.greedy[agent].action(self.game.state)
        finally:
            np.random.set_bit_generator(shared)
        return self.choices.index(action)

    def close(self) -> None:
        pass


def parallel_env(**kwargs: Any) -> Overcooked:
    """The environment; arguments and errors are those of Overcooked."""
    return Overcooked(**kwargs)
