"""CartPole-v1 with an entropy weight that falls to zero, and averages of the weights (README.md):

    PYTHONPATH=. python benchmark/cartpole/annealed_entropy.py SEED

Trains the default preset so, then plays the learned and the averaged weights in the same 100 episodes,
with samples and with modes, and prints the mean return and the lowest.
"""
import dataclasses
import sys

import numpy as np
import torch

import dreamer

seed = int(sys.argv[1])
agents = []


class Annealed(dreamer.Dreamer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.averages = {rate: [p.detach().clone() for p in self.learned] for rate in (0.01, 0.005)}
        agents.append(self)

    def accelerate(self):
        self.ent_coef = torch.tensor(self.args.ent_coef)  # a tensor: compiled code sees it change
        super().accelerate()

    def anneal(self, progress):
        super().anneal(progress)
        self.ent_coef.fill_(self.args.ent_coef * max(0.0, 1 - progress))

    def judge(self, dream, action):
        args, feat = self.args, dreamer.features(dream)
        with torch.no_grad():
            reward = self.dream_reward(dream)
            cont = self.wm.cont(feat)[..., 0].float().sigmoid()
            slow_value = self.slow_critic(feat).pred()
        discount = 1.0 if args.contdisc else args.gamma
        return dreamer.imagination_loss(
            self.actor(feat), action, self.critic(feat), slow_value, reward, cont, self.retnorm, discount,
            args.return_lambda, self.ent_coef)

    def update(self, batch):
        result = super().update(batch)
        with torch.no_grad():
            for rate, average in self.averages.items():
                torch._foreach_lerp_(average, self.learned, rate)
        return result


args = dreamer.Args.preset("CartPole-v1", seed=seed, threads=1, compile=True, video_every=0, eval_every=8000)
dreamer.main(args, Annealed)
agent, = agents
learned = [p.detach().clone() for p in agent.learned]
other = dataclasses.replace(args, seed=1000 + seed)  # other episodes than those of the run's evaluations
for name, weights in [("learned", learned), *agent.averages.items()]:
    with torch.no_grad():
        torch._foreach_copy_(agent.learned, weights)
    for deterministic in (False, True):
        returns = dreamer.evaluate(agent, other, 100, deterministic=deterministic)
        print(seed, name, "modes" if deterministic else "samples", round(np.mean(returns), 1), min(returns))
