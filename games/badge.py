"""Badge in a crowd: what a partner will do can be seen, among many things that say nothing.

At every step a badge θ is drawn, one of `actions`, each equally likely. Both players see it, and
each sees a crowd of its own: numbers of −10 or 10, drawn anew at every step, which nothing else
depends on. Then both choose one of `actions` at the same time; if they match, each earns 1. The
only script, "badge", plays θ with probability 1 − ε, else any of the K actions, θ among them.

Beside it, exact values of an episode of T steps (for K = 4, T = 10 and ε = 0.3):

    play the badge, which is also the best that an ideal observer can do   T (1 − ε + ε/K)    7.75
    never look at it                                                       T / K              2.50

and of the nats −log p(the partner's action) of a step, where p = ε/K and q = 1 − ε + ε/K:

    to who sees the badge, −q ln q − (K − 1) p ln p    0.780
    to who does not, ln K                              1.386

The game asks what a model keeps if its latents cannot hold all that it sees, such as the 32 latents
of 4 classes, 64 bits, of the smallest model. A bit of the crowd is worth much to a reconstruction
(ln² 11 = 5.75 in symlog space) and nothing to who plays; the badge, two bits, is worth 2 ln 2 nats
to the reconstruction, 0.606 to the prediction of the partner, and decides the return.

The badge is a choice (`Discrete`) and no vector, so that its reconstruction costs nats of its own,
however large the numbers beside it are. The protocol is that of games/__init__.py; all randomness
comes from the generator of `reset(seed)`.
"""
from typing import Any

import gymnasium as gym
import numpy as np

LOUD = 10.0  # size of the crowd's numbers


class Badge:
    """A ParallelEnv. Actions: Discrete(K). Observations: a Dict of "badge", Discrete(K), which is
    θ of the step to come, and, unless `crowd` is 0, "crowd", a Box (crowd,) of −10 and 10. The last
    step terminates the episode.

    actions: number K of actions and badges, at least 2.
    length: steps T of an episode, at least 1.
    epsilon: probability with which the script draws its action instead of playing the badge.
    crowd: numbers that say nothing; 0 is the control, a game in which the badge stands alone.

    Raises ValueError for values outside these ranges."""

    metadata = {"name": "badge", "render_modes": []}
    render_mode = None
    possible_agents = ["player_0", "player_1"]
    scripts = ("badge",)

    def __init__(self, actions: int = 4, length: int = 10, epsilon: float = 0.3, crowd: int = 96,
                 render_mode: str | None = None):
        for name, value, least in (("actions", actions, 2), ("length", length, 1),
                                   ("crowd", crowd, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"games.badge: {name} {value!r} must be a whole number, {least} "
                                 "or more")
        if type(epsilon) not in (int, float) or not 0 <= epsilon <= 1:
            raise ValueError(f"games.badge: epsilon {epsilon!r} must be a probability from 0 to 1")
        if render_mode is not None:
            raise ValueError("games.badge draws no frames: leave out render_mode")
        self.actions = actions
        self.length = length
        self.epsilon = epsilon
        self.crowd = crowd
        self.agents: list[str] = []
        self.rng = np.random.default_rng()
        seen: dict[str, gym.Space] = {"badge": gym.spaces.Discrete(actions)}
        if crowd:
            seen["crowd"] = gym.spaces.Box(-LOUD, LOUD, (crowd,), np.float32)
        self.observation_spaces = {agent: gym.spaces.Dict(seen) for agent in self.possible_agents}
        self.action_spaces = {agent: gym.spaces.Discrete(actions) for agent in self.possible_agents}

    @property
    def unwrapped(self) -> "Badge":
        return self

    def observation_space(self, agent: str) -> gym.spaces.Dict:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.spaces.Discrete:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None):
        """Returns (observations, infos). There is nothing that options could change."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.time = 0
        return self.look(), {agent: {} for agent in self.possible_agents}

    def step(self, actions: dict[str, int]):
        """Returns (observations, rewards, terminations, truncations, infos), each by agent."""
        first, second = (int(actions[agent]) for agent in self.possible_agents)
        self.time += 1
        over = self.time >= self.length
        if over:
            self.agents = []
        players = self.possible_agents
        return (self.look(), dict.fromkeys(players, float(first == second)),
                dict.fromkeys(players, over), dict.fromkeys(players, False),
                {agent: {} for agent in players})

    def look(self) -> dict[str, dict[str, Any]]:
        """Draws the badge of the next step and each player's crowd, and shows them."""
        self.badge = int(self.rng.integers(self.actions))
        observations: dict[str, dict[str, Any]] = {}
        for agent in self.possible_agents:
            observations[agent] = {"badge": self.badge}
            if self.crowd:
                signs = 2 * self.rng.integers(2, size=self.crowd) - 1
                observations[agent]["crowd"] = (LOUD * signs).astype(np.float32)
        return observations

    def play(self, agent: str, script: str) -> int:
        """The action that `script` takes now for `agent`. Raises KeyError for unknown names."""
        if script not in self.scripts:
            raise KeyError(script)
        if self.rng.random() < self.epsilon:
            return int(self.rng.integers(self.actions))
        return self.badge

    def bayes(self, agent: str, scripts: tuple[str, ...]) -> np.ndarray:
        """(K,) probabilities of the next action of `agent` to who sees the badge: its chances do
        not depend on what was played before."""
        noise = self.epsilon / self.actions
        return noise + (1 - self.epsilon) * np.eye(self.actions)[self.badge]

    def bayes_return(self, scripts: tuple[str, ...]) -> float:
        """Exact expected return of an ideal observer, who plays the badge."""
        return self.length * (1 - self.epsilon + self.epsilon / self.actions)

    def close(self) -> None:
        pass


def parallel_env(**kwargs: Any) -> Badge:
    """The environment; arguments and errors are those of Badge."""
    return Badge(**kwargs)
