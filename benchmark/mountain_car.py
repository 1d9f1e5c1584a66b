"""MountainCar-v0 with position and velocity scaled to [−1, 1]: `--env-id mountain_car:ScaledMountainCar-v0`, with this
folder on PYTHONPATH. The velocity is at most 0.07, which networks that also see the position hardly notice."""
import gymnasium as gym


def make(**kwargs):
    return gym.wrappers.RescaleObservation(gym.make("MountainCar-v0", **kwargs), -1, 1)


gym.register("ScaledMountainCar-v0", make)
