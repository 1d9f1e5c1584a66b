"""What simple_spread pays without learning (needs mpe2==1.1.1), for 1,000 games of the seeds 0 to 999:

    python benchmark/spread.py > benchmark/marl/spread_baselines.json

random: each of the five moves equally often. greedy: at every step the agents divide the landmarks so that the sum of
their distances is the least, and each pushes along the axis on which it would come to rest farthest from its own.
Returns are summed over the three agents.
"""
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer_marl as M  # noqa: E402

EPISODES, AGENTS = 1000, 3
COAST = 0.4  # an agent of velocity v comes to rest 0.4·v farther: steps of 0.1 s, each of which leaves 75% of v
ROOM = 0.05  # nearer than this it does not push


def random_play(seen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(5, size=AGENTS)


def greedy_play(seen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The move of every agent from what they see (3, 18): own velocity, own position, landmarks from there, others."""
    velocity, landmarks = seen[:, :2], seen[:, 4:10].reshape(AGENTS, AGENTS, 2)
    far = np.linalg.norm(landmarks, axis=-1)  # (agent, landmark)
    own = min(itertools.permutations(range(AGENTS)), key=lambda share: far[range(AGENTS), share].sum())
    ahead = landmarks[range(AGENTS), own] - COAST * velocity
    axis = np.abs(ahead).argmax(-1)  # 0: x, 1: y
    way = ahead[range(AGENTS), axis]
    return np.where(np.abs(way) < ROOM, 0, 1 + 2 * axis + (way > 0))  # 1 left, 2 right, 3 down, 4 up


def play(move: Callable) -> dict[str, float]:
    env, returns = M.make_parallel(M.SocialArgs(env_id="mpe2.simple_spread_v3")), []
    rng = np.random.default_rng(1)
    for episode in range(EPISODES):
        obs, total = env.reset(seed=episode)[0], 0.0
        while env.agents:
            moves = move(np.stack([obs[name] for name in env.agents]), rng)
            obs, rewards, *_ = env.step(dict(zip(env.agents, moves)))
            total += sum(rewards.values())
        returns.append(total)
    numbers = {"return": np.mean(returns), "standard_error": np.std(returns) / EPISODES**0.5}
    return {name: round(float(x), 3) for name, x in numbers.items()} | {"episodes": EPISODES}


if __name__ == "__main__":
    print(json.dumps({"random": play(random_play), "greedy": play(greedy_play)}, indent=2))
