"""DreamerV1 over dreamer.py: the actor follows the gradient of the return through the dream.

    python variants/dreamer_v1.py --env-id Pendulum-v1 --size v1_small --gamma 0.95 --num-envs 4 \
        --learning-rate 1e-3 --actor-lr 1e-3 --critic-lr 3e-3 --batch-size 8 --batch-length 16 \
        --train-ratio 10 --total-timesteps 24000       # as measured, 18 minutes

Takes every flag of dreamer.py. Without them, values are the paper's or its code's, but for
train_ratio and rec_scale, which are those of the id's suite, and untried.

Follows "Dream to Control" (arXiv 1912.01603). Differences from DreamerV3: the world model is that
of gaussian_model.py, where one KL, above 3 free nats, moves prior and posterior alike. A value is
the mean of a Gaussian too. The actor's loss is minus the mean λ-return of a dream, whose gradient
passes through values, rewards and every step to a policy that is the tanh of a Gaussian. Adam has
a step size for each of world model, actor and critic. There is no slow critic, no loss on replayed
values, no entropy bonus. Training adds noise to actions, evaluation does not. Where an action has
choices there is no noise, and their gradient is straight-through, which is biased.

Deviations: layers, encoder, decoder, continue head, replay and the bounds of the policy's deviation
are those of dreamer.py; updates come every few steps; free nats count for each state, not for the
mean of a batch; gradients also reach the states that actions answer to, as the paper has it and its
code has not. agc, warmup, ent-coef, anneal-ent and tau do nothing; anneal-lr is the model's alone.

Measured: Pendulum-v1 after 24,000 steps: −172 (seed 1, tuned on), −202 and −150.
"""
import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
import gaussian_model
from dreamer import Tensors

dreamer.SIZES["v1"] = dreamer.Size(
    deter=200, hidden=200, classes=1, depth=16, units=400, latents=30)
dreamer.SIZES["v1_small"] = dreamer.Size(  # ours, for a CPU
    deter=128, hidden=64, classes=1, depth=8, units=128, latents=30)
PAPER: dict[str, Any] = dict(
    size="v1", batch_size=50, batch_length=50, learning_rate=6e-4, gamma=0.99, deterministic=True,
    contdisc=False, free_nats=3.0, rep_scale=1.0, repval_scale=0.0, average=0.0, anneal_lr=False)

@dataclasses.dataclass
class Args(gaussian_model.Args):
    exp_name: str = "dreamer_v1"  # name of the experiment, part of the run's name
    size: Literal["v1", "v1_small"] = "v1"  # of the model
    actor_lr: float = 8e-5  # step size of the actor; --learning-rate is that of the world model
    critic_lr: float = 8e-5  # step size of the critic
    action_noise: float = 0.3  # deviation of the noise that training adds to actions
    normalize_returns: bool = False  # divide the actor's returns by their range, as DreamerV3 does

    @classmethod
    def preset(cls, env_id: str, pixels: bool = False, **overrides: Any) -> "Args":
        """The values of the paper come before those of the id's suite."""
        return super().preset(env_id, pixels, **(PAPER | overrides))

class TanhNormal(dreamer.Normal):
    """A Gaussian whose samples are squashed into (−1, 1). Its density is not needed."""
    def sample(self, noise: Tensor | None) -> Tensor:
        return torch.tanh(super().sample(noise))

class Actor(dreamer.Actor):
    def forward(self, feat: Tensor) -> dreamer.Joint:
        """The base's means lie in (−1, 1). 5 times as large they reach the ends of tanh."""
        return dreamer.Joint([
            TanhNormal(5 * part.mean, part.std) if isinstance(part, dreamer.Normal) else part
            for part in super().forward(feat).parts])

class Adam(torch.optim.Adam):
    """Adam, which first scales the gradient of every group down to a norm of at most 100."""
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies averages and counts alone: step sizes are those of the flags."""
        pairs = zip(self.param_groups, state["param_groups"])
        groups = [own | {"params": saved["params"]} for own, saved in pairs]
        super().load_state_dict(copy.deepcopy(state) | {"param_groups": groups})

    def step(self, closure: None = None) -> Tensors:
        """Returns the norm () of the gradient as it came."""
        norms = [nn.utils.clip_grad_norm_(group["params"], 100) for group in self.param_groups]
        super().step()
        return {"grad_norm": torch.stack(norms).norm()}

class DreamerV1(gaussian_model.GaussianDreamer):
    def make_actor_critic(self, feat: int, units: int) -> None:
        self.actor = Actor(feat, self.actions.heads, units)
        self.critic = gaussian_model.NumberHead(feat, units, layers=3)
        self.slow_critic = self.critic  # there is none: following itself changes nothing

    def make_optimizer(self) -> Adam:
        parts = [(self.wm, self.args.learning_rate), (self.actor, self.args.actor_lr),
                 (self.critic, self.args.critic_lr)]
        groups = [{"params": list(part.parameters()), "lr": torch.tensor(lr, device=self.device)}
                  for part, lr in parts]
        return Adam(groups, capturable=self.device.type == "cuda")  # can be in a CUDA graph

    @torch.enable_grad()
    def dream(self, start: Tensors, noise: dict[str, Any]) -> tuple[Tensors, Tensor]:
        """The dream of the base, which here keeps its graph."""
        return super().dream(start, noise)

    def judge(self, dream: Tensors, action: Tensor) -> tuple[Tensors, Tensor, Tensors]:
        """Losses, λ-returns (N, H) and metrics of dreamed states (N, H + 1, …)."""
        args = self.args
        feat = dreamer.features(dream)
        reward, value = self.dream_reward(dream), self.critic(feat).pred()
        gamma = 1.0 if args.contdisc else args.gamma  # with contdisc, cont holds it already
        discount = gamma * self.wm.cont(feat)[..., 0].float().sigmoid()
        returns = dreamer.lambda_return(reward, value, discount, args.return_lambda)
        weight = (discount.cumprod(1) / gamma)[:, :-1].detach()  # of what still happens
        scale = self.retnorm(returns) if args.normalize_returns else 1.0
        critic = self.critic(feat[:, :-1].detach())  # to the critic, a dream is data
        losses = {"policy": self.for_the_actor(-(weight * returns / scale).mean()),
                  "value": weight * critic.loss(returns.detach())}
        metrics = {"rew": reward.mean(), "val": value.mean(), "tar": returns.mean()}
        return losses, returns.detach(), metrics

    def for_the_actor(self, loss: Tensor) -> Tensor:
        """The loss () with a gradient for the actor alone, not for what it passes through."""
        if not loss.requires_grad:  # with --accumulate returns are asked for first
            return loss
        params = list(self.actor.parameters())
        grads = torch.autograd.grad(loss, params)
        linear = sum((grad * p).sum() for grad, p in zip(grads, params))  # its gradient: `grads`
        return loss.detach() + (linear - linear.detach())

    def acting_noise(self, n: int) -> Tensors:
        """Here with "exploration" (n, A), which `choose` adds to actions."""
        kinds = [kind for kind, _ in self.actions.heads.values()]
        level = self.args.action_noise if self.training and "discrete" not in kinds else 0.0
        normal = torch.randn(n, self.actions.size, generator=self.act_rng, device=self.device)
        return super().acting_noise(n) | {"exploration": level * normal}

    def choose(self, obs: Tensors, state: Tensors, is_first: Tensor,
               noise: dict[str, Any]) -> Tensors:
        new = super().choose(obs, state, is_first, noise)
        if noise["exploration"] is not None:
            new["action"] = (new["action"] + noise["exploration"]).clamp(-1, 1)
        return new

    def compiled(self) -> list[tuple[nn.Module, str]]:
        """Without `judge`: compiled, both losses are one graph, which `for_the_actor` frees."""
        return [(owner, name) for owner, name in super().compiled() if name != "judge"]

if __name__ == "__main__":
    dreamer.command_line(Args, DreamerV1)
