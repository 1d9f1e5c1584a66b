"""dm_control tasks whose actions last two frames, as in the published curves: importing this registers them, and
reacher-easy-scaled besides, in which the numbers that tell where the target is are not small.

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


class Scaled(gym.ObservationWrapper):
    """Multiplies the vector from finger to target, of at most 0.44 m, by 10."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        box = env.observation_space["to_target"]
        box = gym.spaces.Box(10 * box.low, 10 * box.high, box.shape, box.dtype)
        self.observation_space = gym.spaces.Dict(dict(env.observation_space.items()) | {"to_target": box})

    def observation(self, observation):
        return observation | {"to_target": 10 * observation["to_target"]}


def register(env_id: str) -> None:
    gym.register(env_id.replace("-v0", "-repeat2-v0"), entry_point=lambda **kwargs: Repeat(gym.make(env_id, **kwargs)))


for name in [name for name in gym.registry if name.startswith("dm_control/") and name.endswith("-v0")]:
    register(name)
gym.register("dm_control/reacher-easy-scaled-repeat2-v0",
             entry_point=lambda **kwargs: Scaled(gym.make("dm_control/reacher-easy-repeat2-v0", **kwargs)))
