"""dm_control tasks whose actions last two frames, as in the published curves: importing this registers them.

    PYTHONPATH=benchmark python dreamer.py --env-id repeat2:dm_control/cartpole-swingup-repeat2-v0
"""
import gymnasium as gym
import shimmy  # noqa: F401  (registers dm_control/…)


class Repeat(gym.Wrapper):
    """Applies every action `times` frames long, or to the end of the episode, and sums the rewards."""

    def __init__(self, env: gym.Env, times: int = 2):
        super().__init__(env)
        self.times = times

    def step(self, action):
        total = 0.0
        for _ in range(self.times):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def register(env_id: str) -> None:
    gym.register(env_id.replace("-v0", "-repeat2-v0"), entry_point=lambda **kwargs: Repeat(gym.make(env_id, **kwargs)))


for name in [name for name in gym.registry if name.startswith("dm_control/") and name.endswith("-v0")]:
    register(name)
