"""dreamer.py with the continuous actor of the algorithm of 2023: its gradient is that of the λ-returns, followed back
through the dream's states and actions, where the later algorithm uses REINFORCE. Flags are those of dreamer.py.

    PYTHONPATH=benchmark python benchmark/pathwise.py --env-id repeat2:dm_control/reacher-easy-repeat2-v0 …
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer  # noqa: E402


class Pathwise(dreamer.Dreamer):
    @torch.enable_grad()
    def dream(self, start, noise):
        return super().dream(start, noise)

    def policy(self, state, noise):
        """An action is followed into what comes after it, and not into the state that it answers to."""
        return super().policy({name: x.detach() for name, x in state.items()}, noise)

    def judge(self, dream, action):
        args = self.args
        discount = 1.0 if args.contdisc else args.gamma  # with contdisc, cont holds it already
        seen = {name: x.detach() for name, x in dream.items()}
        losses, target, metrics = super().judge(seen, action.detach())
        feat = dreamer.features(dream)
        cont = self.wm.cont(feat)[..., 0].float().sigmoid() * discount
        returns = dreamer.lambda_return(self.dream_reward(dream), self.critic(feat).pred(), cont, args.return_lambda)
        weight = (cont.detach().cumprod(1) / discount)[:, :-1]
        low, high = self.retnorm.range
        entropy = self.actor(dreamer.features(seen)).entropy()[:, :-1]
        losses["policy"] = (self.for_the_actor(-(weight * returns / (high - low).clamp(min=1.0)).mean())
                            - (weight * self.ent_coef * entropy).mean())
        return losses, target, metrics

    def for_the_actor(self, loss):
        """`loss`, of which world model and critic, which it came through, get no gradient."""
        if not loss.requires_grad:  # in the pass of `accumulate` that only collects returns
            return loss
        params = list(self.actor.parameters())
        grads = torch.autograd.grad(loss, params)
        linear = sum((grad.detach() * p).sum() for grad, p in zip(grads, params))
        return loss.detach() + linear - linear.detach()

    def compiled(self):
        return [(owner, name) for owner, name in super().compiled() if name != "judge"]


if __name__ == "__main__":
    dreamer.command_line(dreamer.Args, Pathwise)
