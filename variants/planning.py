"""DreamerV3 that thinks before it acts: at every step it dreams many sequences of actions and takes
the first action of the best one.

    python variants/planning.py --evaluate runs/CartPole-v1__…   # any saved run of dreamer.py
    python variants/planning.py --env-id CartPole-v1             # acts by planning while it learns

The cross-entropy method, as in PlaNet (arXiv 1811.04551), seeded by the actor, as in TD-MPC
(arXiv 2203.04955). The first candidates are dreams of the actor. To the best of them a distribution
is fitted, from which the next ones are drawn, and so on. The best are kept all the time, so that in
the model a plan is never worse than the actor's dreams. A score is the return of L steps, as the
heads predict it, the mean over M dreams of the same actions:

          G = Σ_{t=1..L} γ^{t-1} c₁ ⋯ c_{t-1} r_t + γ^L c₁ ⋯ c_L V(s_L)      c continue, V critic

All candidates of a step are dreamed with the same noise: they differ by actions, not by luck.
Learning is that of dreamer.py. There are no further weights. All action spaces of dreamer.py are
served: choices made together are fitted independently of each other, like those of the actor.

Deviation from both papers: the first action of the best sequence is taken, without noise.

Measured, with plans of 10 steps and 32 candidates: agents of CartPole-v1 after 7,400 steps, seeds 6
and 7, over 10 episodes: the actor 259 and 234; the best of its dreams 294 and 251; two iterations
359 and 254. An action takes 5, 110 and at least 220 ms on one core of a busy CPU: a weak actor gains
a little, at 40 times the price. Pendulum-v1, planning while learning, seeds 1 and 2: it learns from
fewer steps, and ends at −115 and −156 after 24,000, the plain agent at −160 and −200.
"""
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
from dreamer import Tensors, features

@dataclasses.dataclass
class Args(dreamer.Args):
    exp_name: str = "planning"  # name of the experiment, part of the run's name
    plan_horizon: int = 10  # L, steps of a plan
    plan_candidates: int = 64  # P, dreams of the actor, and sequences drawn in each iteration
    plan_iterations: int = 2  # how often a distribution is fitted; 0: the best dream of the actor
    plan_elites: int = 8  # K, the best, to which it is fitted
    plan_dreams: int = 1  # M, dreams of every sequence

    def check(self) -> None:
        super().check()
        for name in ("plan_horizon", "plan_candidates", "plan_elites", "plan_dreams"):
            if not 1 <= getattr(self, name):
                raise dreamer.InputError(f"{name} {getattr(self, name)}: take 1 or more")
        if self.plan_elites > self.plan_candidates:
            raise dreamer.InputError(f"plan_elites {self.plan_elites} are more than "
                                     f"plan_candidates {self.plan_candidates}: take fewer")

class Planner(dreamer.Dreamer):
    def acting_noise(self, n: int) -> dict[str, Any]:
        return super().acting_noise(n) | {"action": self.planning_noise(n, self.act_rng)}

    def planning_noise(self, n: int, rng: torch.Generator) -> Tensors:
        """Uniform numbers for the plans of `n` streams."""
        args = self.args
        length = args.plan_horizon
        count = args.plan_candidates
        width = self.actions.noise_size
        return {"actor": self.uniform(rng, n * count, length, width),
                "drawn": self.uniform(rng, n, args.plan_iterations, count, length, width),
                "prior": self.uniform(rng, n, args.plan_dreams, length,
                                      self.wm.rssm.stoch_shape[0], 1)}

    def choose_action(self, state: Tensors, noise: Tensors | None) -> Tensor:
        """First action (N, A) of the best plan. Without noise, as for --deterministic, the plan is
        made with the same random numbers at every step."""
        if noise is None:
            rng = torch.Generator(self.device).manual_seed(0)
            noise = self.planning_noise(len(state["deter"]), rng)
        plans, _ = self.plan(state, noise)
        return plans[:, 0, 0]

    def plan(self, state: Tensors, noise: Tensors) -> tuple[Tensor, Tensor]:
        """From states (N, …) → the K best sequences (N, K, L, A), best first, and their scores
        (N, K)."""
        prior = noise["prior"]
        plans = self.actor_plans(state, noise)
        plans, scores = self.best(plans, self.score(state, plans, prior))
        for uniform in noise["drawn"].unbind(1):
            drawn = self.fit(plans).sample(uniform).clamp(-1, 1)
            plans = torch.cat([plans, drawn], 1)
            scores = torch.cat([scores, self.score(state, drawn, prior)], 1)
            plans, scores = self.best(plans, scores)
        return plans, scores

    def actor_plans(self, state: Tensors, noise: Tensors) -> Tensor:
        """What the actor does in P dreams from each state (N, P, L, A)."""
        args = self.args
        start = {name: x.repeat_interleave(args.plan_candidates, 0) for name, x in state.items()}
        prior = noise["prior"][:, 0].repeat_interleave(args.plan_candidates, 0)  # (N·P, L, S, 1)
        _, action = self.wm.rssm.imagine(
            start, lambda dreamed, t: self.policy(dreamed, noise["actor"][:, t]),
            args.plan_horizon, prior)
        # numbers beyond ±1 act like ±1
        return action.unflatten(0, (-1, args.plan_candidates)).clamp(-1, 1)

    def score(self, state: Tensors, plans: Tensor, prior: Tensor) -> Tensor:
        """Mean returns (N, P) of sequences (N, P, L, A) over M dreams with noise (N, M, L, S, 1).
        """
        count = plans.shape[1]
        dreams = prior.shape[1]
        start = {name: x.repeat_interleave(count * dreams, 0) for name, x in state.items()}
        action = plans.repeat_interleave(dreams, 1).flatten(0, 1)  # (N·P·M, L, A)
        noise = prior.repeat(1, count, 1, 1, 1).flatten(0, 1)  # (N·P·M, L, S, 1)
        dream, _ = self.wm.rssm.imagine(start, lambda _, t: action[:, t], action.shape[1], noise)
        return self.dream_return(dream).view(-1, count, dreams).mean(-1)

    def dream_return(self, dream: Tensors) -> Tensor:
        """G (N,) of dreamed states (N, L + 1, …)."""
        feat = features(dream)
        cont = self.wm.cont(feat[:, 1:])[..., 0].float().sigmoid()
        if not self.args.contdisc:  # else the continue prediction holds the discount
            cont = cont * self.args.gamma
        weight = F.pad(cont, (1, 0), value=1.0).cumprod(1)  # (N, L + 1)
        reward = self.dream_reward(dream)[:, 1:]
        return (weight[:, :-1] * reward).sum(1) + weight[:, -1] * self.critic(feat[:, -1]).pred()

    def best(self, plans: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The K best sequences and their scores, best first."""
        scores, index = scores.topk(self.args.plan_elites, 1)
        return plans.take_along_dim(index[..., None, None], 1), scores

    def fit(self, elites: Tensor) -> dreamer.Joint:
        """Distribution of P sequences with the frequencies, means and deviations of the elites
        (N, K, L, A). Each choice keeps 10% at random, each number a deviation of 0.1, the actor's
        least: what no elite does may still be right."""
        shape = -1, self.args.plan_candidates, -1, -1
        mean = elites.mean(1, keepdim=True).expand(shape)
        std = elites.std(1, keepdim=True, correction=0).clamp(min=0.1).expand(shape)
        kinds = [(kind, width) for kind, n in self.actor.heads
                 for width in (n if kind == "discrete" else (n,))]
        widths = [width for _, width in kinds]
        parts = zip(kinds, mean.split(widths, -1), std.split(widths, -1))
        return dreamer.Joint([
            dreamer.OneHot(m.log(), unimix=0.1) if kind == "discrete" else dreamer.Normal(m, s)
            for (kind, _), m, s in parts])

if __name__ == "__main__":
    dreamer.command_line(Args, Planner)
