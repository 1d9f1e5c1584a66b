"""Level-based foraging: players gather food together. An adapter of lbforaging.

    pip install lbforaging==2.0.0

Players move on a grid and load food beside them. Food of a level above one player's needs several
who load it in the same step. Each is paid its share of all the food there is, 1 for all players and
the whole episode together at most (unless `normalize_reward` is False).

The package has a Gymnasium environment with tuples of observations and lists of rewards. Its own
`terminated` is also True when time is up; here that is a truncation. The protocol is that of
games/__init__.py; there are no scripts. The package draws from the generator of `reset(seed)` only.
"""
import importlib
from typing import Any

import gymnasium as gym


class Foraging:
    """A ParallelEnv. Actions: Discrete(6), that is nothing, north, south, west, east, load.
    Observations: Box of float32, row, column and level of each food, then of each player, oneself
    first; −1, −1, 0 for what is not seen or gone. The episode terminates when all food is gone, and
    is truncated after `max_episode_steps` steps if there is some left.

    env_id: Foraging[-2s]-{size}x{size}-{players}p-{foods}f[-coop]-v3; with -2s players see two
        cells far, with -coop all food needs several players.
    kwargs: replace what the id says, such as max_episode_steps=100 or penalty=0.1; all of them are
        arguments of lbforaging.foraging.ForagingEnv. Its grid_observation does not work in 2.0.0.

    Raises ImportError if the package is missing, ValueError for unknown ids and unusable values."""

    metadata = {"name": "foraging", "render_modes": []}
    render_mode = None

    def __init__(self, env_id: str = "Foraging-8x8-2p-3f-v3", render_mode: str | None = None,
                 **kwargs: Any):
        if render_mode is not None:
            raise ValueError("games.foraging draws no frames: leave out render_mode")
        try:
            importlib.import_module("lbforaging")  # registers the ids
            library = importlib.import_module("lbforaging.foraging")
        except ImportError as error:
            raise ImportError(f"games.foraging needs lbforaging ({error}): "
                              "pip install lbforaging==2.0.0") from error
        try:
            spec = gym.spec(env_id)
        except gym.error.Error as error:
            raise ValueError(f"games.foraging: env_id {env_id!r} is unknown, take one such as "
                             f"Foraging-8x8-2p-3f-v3 ({error})") from None
        if spec.entry_point != "lbforaging.foraging:ForagingEnv":
            raise ValueError(f"games.foraging: env_id {env_id!r} is another game, take one such as "
                             "Foraging-8x8-2p-3f-v3")
        try:
            # gym.make would keep max_episode_steps for itself and leave the game's own limit at 50.
            self.game = library.ForagingEnv(**{**spec.kwargs, **kwargs})
        except AssertionError as error:
            raise ValueError(f"games.foraging: {error}") from None
        self.possible_agents = [f"player_{i}" for i in range(len(self.game.action_space))]
        self.agents: list[str] = []
        self.observation_spaces = self.by_agent(self.game.observation_space)
        self.action_spaces = self.by_agent(self.game.action_space)

    @property
    def unwrapped(self) -> "Foraging":
        return self

    def observation_space(self, agent: str) -> gym.spaces.Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.spaces.Discrete:
        return self.action_spaces[agent]

    def by_agent(self, values: Any) -> dict[str, Any]:
        return dict(zip(self.possible_agents, values))

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None):
        """Returns (observations, infos). There is nothing that options could change."""
        for player in self.game.players:  # who stands there still would change what is drawn
            player.position = None
        observations, _ = self.game.reset(seed=seed)
        self.agents = list(self.possible_agents)
        return self.by_agent(observations), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]):
        """Returns (observations, rewards, terminations, truncations, infos), each by agent."""
        joint = tuple(int(actions[agent]) for agent in self.possible_agents)
        observations, gains, over, _, _ = self.game.step(joint)
        eaten = not self.game.field.any()
        rewards = {agent: float(gain) for agent, gain in zip(self.possible_agents, gains)}
        if over:
            self.agents = []
        terminations = {agent: eaten for agent in self.possible_agents}
        truncations = {agent: bool(over) and not eaten for agent in self.possible_agents}
        infos = {agent: {} for agent in self.possible_agents}
        return self.by_agent(observations), rewards, terminations, truncations, infos

    def close(self) -> None:
        self.game.close()


def parallel_env(**kwargs: Any) -> Foraging:
    """The environment; arguments and errors are those of Foraging."""
    return Foraging(**kwargs)
