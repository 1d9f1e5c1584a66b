"""popgym's RepeatPreviousEasy, which asks for the card of three steps ago, paying 1 for a right answer and −1 for
a wrong one. Its own ±1/48 lie so close together in the bins of the reward that the head hardly tells them
apart. Returns are 48 times popgym's: from −48 to 48.

    pip install popgym==1.0.7
    PYTHONPATH=benchmark python dreamer.py --env-id previous:RepeatPrevious-v0
"""
import gymnasium as gym
import popgym  # noqa: F401, which registers the game


def make(**kwargs: object) -> gym.Env:
    env = gym.make("popgym-RepeatPreviousEasy-v0", **kwargs)
    return gym.wrappers.TransformReward(env, lambda reward: float(round(48 * reward)))


gym.register("RepeatPrevious-v0", make)
