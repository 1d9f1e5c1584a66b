"""A small agent for air hockey: DreamerV1 with other sizes, for victory and defeat alone.

    python variants/hockey_agent.py                         # needs hockey-env, see games/hockey.py
    python variants/hockey_agent.py --env-kwargs '{"script": "strong"}'
    python variants/hockey_agent.py --evaluate runs/HockeyDuel-v0__…

Differences from dreamer_v1.py: 64 Gaussian latents, a
GRU and layers of 256; Adam with 3e-4 for the world model, 3e-5 for actor and critic; two KL losses,
dyn and rep, weighted 0.5 and 0.1, above 1 free nat; γ 0.997; returns divided by their range. The
reward is sparse: 10 for a victory, −10 for a defeat, nothing else. The mean return of episodes is
therefore 10 · (share of victories − share of defeats). What is not named here is that of
dreamer_v1.py: batches of 50 × 50, horizon, action noise. --env-id takes other tasks too.

Measured: that games are played, and that the settings are as above (test_hockey_agent.py). Hockey
itself was not learned. With the flags of dreamer_v1.py's example: CartPole-v1: 500 in one seed of
three; Pendulum-v1: nothing in three.
"""
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
import dreamer_v1

dreamer.SIZES["hockey"] = dreamer.Size(
    deter=256, hidden=256, classes=1, depth=16, units=256, latents=64)
HOCKEY: dict[str, Any] = dict(
    size="hockey", learning_rate=3e-4, actor_lr=3e-5, critic_lr=3e-5, gamma=0.997, free_nats=1.0,
    dyn_scale=0.5, rep_scale=0.1, normalize_returns=True)

@dataclasses.dataclass
class Args(dreamer_v1.Args):
    exp_name: str = "hockey_agent"  # name of the experiment, part of the run's name
    env_id: str = "HockeyDuel-v0"  # Gymnasium id; `module:id` imports the module first
    size: Literal["hockey"] = "hockey"  # of the model

    @classmethod
    def preset(cls, env_id: str, pixels: bool = False, **overrides: Any) -> "Args":
        """The values for hockey come before those of dreamer_v1.py."""
        return super().preset(env_id, pixels, **(HOCKEY | overrides))

class Duel(gym.Env):
    """Wraps games.hockey, the game for two, into one for player_0. player_1 is played by `script`,
    "weak" or "strong". Of the rewards only victory and defeat are left."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, script: str = "weak", render_mode: str | None = None):
        hockey = importlib.import_module("games.hockey")
        self.game = hockey.parallel_env(shaping_steps=0, render_mode=render_mode)
        if script not in self.game.scripts:
            raise dreamer.InputError(f"script {script!r} does not exist: choose one of "
                                     f"{', '.join(self.game.scripts)}")
        self.script = script
        self.render_mode = render_mode
        self.observation_space = self.game.observation_space("player_0")
        self.action_space = self.game.action_space("player_0")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        obs, _ = self.game.reset(seed)
        return obs["player_0"], {}

    def step(self, action: np.ndarray):
        other = self.game.play("player_1", self.script)
        results = self.game.step({"player_0": action, "player_1": other})
        return tuple(of_all["player_0"] for of_all in results)

    def render(self) -> np.ndarray:
        return self.game.render()

    def close(self) -> None:
        self.game.close()

gym.register("HockeyDuel-v0", entry_point=Duel)

if __name__ == "__main__":
    dreamer.command_line(Args, dreamer_v1.DreamerV1)
