"""The iterated prisoner's dilemma against an opponent of unknown type.

Two players choose at the same time, for `length` rounds, to cooperate (0) or to defect (1):

                        the other cooperates    the other defects
        I cooperate              3                      0
        I defect                 5                      1

The opponent may be one of four scripts: "cooperate" always cooperates, "defect" always defects,
"tit_for_tat" begins with cooperation and then repeats what the player did last, "alternate"
cooperates in even rounds and defects in odd ones. If each is equally likely, the best expected
returns of ten rounds are 30.5 for a player who knows the type, 29.25 for one who infers it, and 26
for one without memory, who always defects.

The protocol is that of games/__init__.py; all randomness comes from the generator of `reset(seed)`.
"""
from typing import Any

import gymnasium as gym
import numpy as np

COOPERATE, DEFECT = 0, 1
PAYOFFS = ((3.0, 0.0), (5.0, 1.0))  # [my action][the other's action]


class PrisonersDilemma:
    """A ParallelEnv. Actions: Discrete(2). Observations: Discrete(3), the other's last action if it
    is shown, else 2, which is also the first observation. The last round terminates the episode.

    q: probability with which a player is shown the other's last action, drawn for each player and
        round; `bayes` always sees all actions.
    length: rounds of an episode, at least 1.

    Raises ValueError for other values."""

    metadata = {"name": "prisoners_dilemma", "render_modes": []}
    render_mode = None
    possible_agents = ["player_0", "player_1"]
    scripts = ("cooperate", "defect", "tit_for_tat", "alternate")

    def __init__(self, q: float = 0.0, length: int = 10, render_mode: str | None = None):
        if type(q) not in (int, float) or not 0 <= q <= 1:
            raise ValueError(f"games.prisoners_dilemma: q {q!r} must be a probability from 0 to 1")
        if type(length) is not int or length < 1:
            raise ValueError(f"games.prisoners_dilemma: length {length!r} must be at least 1")
        if render_mode is not None:
            raise ValueError("games.prisoners_dilemma draws no frames: leave out render_mode")
        self.q = q
        self.length = length
        self.agents: list[str] = []
        self.rng = np.random.default_rng()
        self.observation_spaces = {agent: gym.spaces.Discrete(3) for agent in self.possible_agents}
        self.action_spaces = {agent: gym.spaces.Discrete(2) for agent in self.possible_agents}

    @property
    def unwrapped(self) -> "PrisonersDilemma":
        return self

    def observation_space(self, agent: str) -> gym.spaces.Discrete:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> gym.spaces.Discrete:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None):
        """Returns (observations, infos). There is nothing that options could change."""
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.history: dict[str, list[int]] = {agent: [] for agent in self.agents}
        # whether all actions of the agent so far are those of the script
        self.consistent = {(agent, name): True for agent in self.agents for name in self.scripts}
        return {agent: 2 for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]):
        """Returns (observations, rewards, terminations, truncations, infos), each by agent."""
        chosen = {agent: int(actions[agent]) for agent in self.possible_agents}
        for agent, script in self.consistent:
            self.consistent[agent, script] &= chosen[agent] == self.play(agent, script)
        observations, rewards = {}, {}
        for agent in self.possible_agents:
            others = chosen[self.other(agent)]
            observations[agent] = others if self.rng.random() < self.q else 2
            rewards[agent] = PAYOFFS[chosen[agent]][others]
        for agent, action in chosen.items():
            self.history[agent].append(action)
        over = len(self.history["player_0"]) >= self.length
        if over:
            self.agents = []
        terminations = {agent: over for agent in chosen}
        truncations = {agent: False for agent in chosen}
        return observations, rewards, terminations, truncations, {agent: {} for agent in chosen}

    def other(self, agent: str) -> str:
        """Name of the player whom `agent` plays against."""
        return "player_1" if agent == "player_0" else "player_0"

    def play(self, agent: str, script: str) -> int:
        """The action that `script` takes now for `agent`. Raises KeyError for unknown names."""
        t = len(self.history[agent])
        last = self.history[self.other(agent)][-1] if t else COOPERATE
        return {"cooperate": COOPERATE, "defect": DEFECT, "tit_for_tat": last,
                "alternate": DEFECT if t % 2 else COOPERATE}[script]

    def bayes(self, agent: str, scripts: tuple[str, ...]) -> np.ndarray | None:
        """(2,) probabilities of the next action of `agent` to who knows that it plays one of
        `scripts` and saw all actions so far; None if none of them would have played like that."""
        possible = [script for script in scripts if self.consistent[agent, script]]
        if not possible:
            return None
        return np.eye(2)[[self.play(agent, script) for script in possible]].mean(0)

    def close(self) -> None:
        pass


def parallel_env(**kwargs: Any) -> PrisonersDilemma:
    """The environment; arguments and errors are those of PrisonersDilemma."""
    return PrisonersDilemma(**kwargs)
