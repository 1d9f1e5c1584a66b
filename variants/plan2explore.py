"""DreamerV3 that explores in its dreams: it goes where an ensemble of predictors disagrees.

    export PYTHONPATH=benchmark                       # where mountain_car.py scales observations
    python variants/plan2explore.py --env-id mountain_car:ScaledMountainCar-v0
    python variants/plan2explore.py --intrinsic-weight 0 --action-noise 0.3  # cheaper: noise alone

Follows Plan2Explore (arXiv 2005.05960). Each member predicts the encoder's tokens of the next step
from state and action. Where much was learned the members agree, elsewhere they differ: the variance
of their predictions rewards finding out. Since dreams know it, the actor can plan to go where it
has never been. It is paid one step after the action, like the task's reward, but has a critic and a
return normaliser of its own. After --explore-steps the task alone counts.

Deviations from the paper: one actor explores, then learns the task; the paper has two. It learns by
REINFORCE. Returns are divided by their range. The ensemble's critic learns in dreams only.

Measured: MountainCar-v0 with scaled observations, three seeds. The goal is first reached after 2,200
to 3,200 steps and then 31 times and more; by the plain agent and with noise after 13,300 at the
earliest, or never in 14,000. The task itself was hardly learned (flags: benchmark/README.md).
"""
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
from dreamer import Tensors, features

@dataclasses.dataclass
class Args(dreamer.Args):
    exp_name: str = "plan2explore"  # name of the experiment, part of the run's name
    explore_steps: int = 10_000  # environment steps after which only the task counts
    intrinsic_weight: float = 1.0  # of the ensemble's returns while exploring; 0: no ensemble
    task_weight: float = 0.0  # of the task's returns while exploring
    members: int = 5  # of the ensemble
    ensemble_scale: float = 1.0  # weight of the ensemble's loss, which moves nothing else
    intrinsic_value_scale: float = 1.0  # weight of the loss of the ensemble's critic
    action_noise: float = 0.0  # while exploring: chance of a random choice, deviation of numbers

    def check(self) -> None:
        super().check()
        if self.members < 2:
            raise dreamer.InputError(f"members {self.members} cannot disagree: take 2 or more")

class WorldModel(dreamer.WorldModel):
    def make_heads(self, feat: int, units: int) -> None:
        super().make_heads(feat, units)
        self.ensemble = nn.ModuleList([
            dreamer.MLP(feat + self.rssm.action_in[0].in_features, units, 2, self.encoder.size)
            for _ in range(self.args.members)])

    def predictions(self, states: Tensors, action: Tensor) -> Tensor:
        """States (N, T, …), actions in all but the last (N, T - 1, A) → the tokens that each of K
        members expects next (K, N, T - 1, E)."""
        feat = features(states)[:, :-1]
        action = (action / action.abs().clamp(min=1)).to(feat.dtype)  # as the dynamics see it
        x = torch.cat([feat, action], -1).detach()
        return torch.stack([member(x) for member in self.ensemble]).float()

    def disagreement(self, states: Tensors, action: Tensor) -> Tensor:
        """Variance of the members' predictions, the mean over the tokens' numbers (N, T - 1)."""
        x = self.predictions(states, action)
        x = x - x[0]  # which leaves exactly 0 where members are equal
        return (x - x.mean(0)).square().mean((0, -1))

    def extra_losses(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        """The loss "ensemble" (B, T - 1): squared errors of the next tokens, the mean over members
        and numbers, or 0 where the next step begins another episode."""
        action = data["prev_action"][:, 1:]  # the one before t+1 was chosen at t
        error = self.predictions(states, action) - states["tokens"][:, 1:].detach().float()
        return {"ensemble": ~data["is_first"][:, 1:] * error.square().mean((0, -1))}

class RangeNormalizer(dreamer.ReturnNormalizer):
    """Range of the present returns (with --accumulate: of the part), however small they become."""
    def forward(self, returns: Tensor) -> Tensor:
        super().forward(returns)
        return (self.range[1] - self.range[0]).clamp(min=1e-8)

class Explorer(dreamer.Dreamer):
    """The plain agent. While it explores, its actions are noisy, but for those of evaluations."""
    def make_actor_critic(self, feat: int, units: int) -> None:
        level = self.args.action_noise
        if level > 1 and "discrete" in [kind for kind, _ in self.actions.heads.values()]:
            raise dreamer.InputError(f"action_noise {level} is a chance here: take 0 to 1")
        super().make_actor_critic(feat, units)
        self.register_buffer("exploring", torch.ones(()), persistent=False)

    def anneal(self, progress: float, step: int = 0) -> None:
        super().anneal(progress, step)
        self.exploring.fill_(step < self.args.explore_steps)

    def choose_action(self, state: Tensors, noise: Tensor | None) -> Tensor:
        level = self.args.action_noise * self.exploring * self.training
        parts = self.actor(features(state)).parts
        for i, part in enumerate(parts):
            if isinstance(part, dreamer.OneHot):  # (1 − ε) · π + ε / C
                parts[i] = dreamer.OneHot(((1 - level) * part.probs + level / part.size).log())
            else:  # independent deviations add up as squares
                parts[i] = dreamer.Normal(part.mean, (part.std**2 + level**2).sqrt())
        return dreamer.Joint(parts).sample(noise)

class Plan2Explore(Explorer):
    def make_world_model(self) -> WorldModel:
        return WorldModel(self.observations.specs, self.actions.size, self.args)

    def make_actor_critic(self, feat: int, units: int) -> None:
        super().make_actor_critic(feat, units)
        self.intrinsic_critic = dreamer.Critic(feat, units)
        self.slow_intrinsic = dreamer.Critic(feat, units).requires_grad_(False)
        self.slow_intrinsic.load_state_dict(self.intrinsic_critic.state_dict())
        self.intrinsic_norm = RangeNormalizer(rate=1.0)

    def judge(self, dream: Tensors, action: Tensor) -> tuple[Tensors, Tensor, Tensors]:
        """Both policy losses hold the same entropy term, and so does their weighted mean."""
        args = self.args
        losses, returns, metrics = super().judge(dream, action)
        feat = features(dream)
        with torch.no_grad():
            reward = F.pad(self.wm.disagreement(dream, action), (1, 0))  # (N, H + 1)
            cont = self.wm.cont(feat)[..., 0].float().sigmoid()
            slow_value = self.slow_intrinsic(feat).pred()
        intrinsic, _, more = dreamer.imagination_loss(
            self.actor(feat), action, self.intrinsic_critic(feat), slow_value, reward, cont,
            self.intrinsic_norm, 1.0 if args.contdisc else args.gamma, args.return_lambda,
            self.ent_coef)
        share = self.exploring * args.intrinsic_weight / (args.intrinsic_weight + args.task_weight)
        losses["policy"] = torch.lerp(losses["policy"], intrinsic["policy"], share)
        losses["intrinsic_value"] = intrinsic["value"]
        metrics |= {f"intrinsic_{name}": more[name] for name in ("rew", "val", "tar", "adv_mag")}
        return losses, returns, metrics

    def learn(self, data: dict[str, Any], noise: Tensors) -> tuple[Tensors, Tensors]:
        result = super().learn(data, noise)
        for slow, fast in zip(self.slow_intrinsic.parameters(), self.intrinsic_critic.parameters()):
            slow.lerp_(fast.detach(), self.args.tau)
        return result

def make_agent(observations: Any, actions: Any, args: Args) -> Explorer:
    return (Plan2Explore if args.intrinsic_weight else Explorer)(observations, actions, args)

if __name__ == "__main__":
    dreamer.command_line(Args, make_agent)
