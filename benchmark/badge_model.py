"""Badge in a crowd, the world model alone: which weights of the two losses make a model forget the badge.

    python benchmark/badge_model.py --seed 1 --arm merged > merged_s1.csv  # benchmark/marl/badge_model.csv has all

What is learned comes from random play, nothing acts on it, and no critic shapes it. At first the reconstruction hardly
counts (rec_scale 0.001, tom_scale 30), so that the badge is learned; copies of that model then go on with other
weights, one for each cell. Further rows: "scratch", which has the weights of the first cell from the beginning, and
those with a crowd of 0, which go through both phases in the game without one. Columns as in badge.py.
"""
import copy
import csv
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer_marl as M  # noqa: E402
from badge import play, probes, swap  # noqa: E402


@dataclasses.dataclass
class Options:
    seed: int = 1
    arm: Literal["tom", "merged"] = "tom"
    rec: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03)  # values of rec_scale
    tom: tuple[float, ...] = (1.0, 10.0)  # values of tom_scale
    first: int = 1200  # updates of the first phase
    then: int = 800  # further updates in each cell
    steps: int = 20_000  # of random play


class ModelAlone(M.SocialDreamer):
    """An agent whose updates move the world model and nothing else."""

    def forward(self, data: dict[str, Any], noise: dict[str, Any]):
        states = self.wm.observe(data, noise["posterior"])
        losses, metrics = self.wm.losses(states, data)
        scales = self.loss_scales()
        means = {name: x.mean() for name, x in self.mask(losses, data).items()}
        loss = sum(scales[name] * x for name, x in means.items())
        outputs = {"deter": states["deter"].detach(), "returns": torch.zeros(1, 1),
                   "stoch": self.wm.rssm.pack(states["stoch"]).detach()}
        return loss, {name: x.detach() for name, x in (means | metrics).items()}, outputs


def make(options: Options, crowd: int) -> ModelAlone:
    args = M.SocialArgs.preset(
        "games.badge", seed=options.seed, teammate_model=options.arm, env_kwargs=f'{{"crowd": {crowd}}}',
        batch_size=64, batch_length=2, imagination_horizon=1, anneal_lr=False, cuda=False)
    observations, actions, seats, _ = M.seat_spaces(args)
    torch.manual_seed(M.derive_seeds(args.seed, "weights")[0])
    return ModelAlone(observations, actions, args, seats)


def collect(agent: ModelAlone, steps: int) -> M.ReplayBuffer:
    """Play of an agent that has not learned, and so hardly prefers any action."""
    args = agent.args
    envs = M.make_vector_env(args, args.num_envs, "", M.derive_seeds(args.seed, "environments", count=args.num_envs))
    table = M.Table(agent, args.num_envs)
    buffer = M.ReplayBuffer(steps, args.num_envs, args.batch_length, agent.replay_specs(),
                            M.derive_seeds(args.seed, "replay")[0])
    obs, _ = envs.reset(seed=M.derive_seeds(args.seed, "reset", count=args.num_envs))
    first = np.ones(args.num_envs, bool)
    while len(buffer) < buffer.num_envs * buffer.rows:
        joint, rows = table.act(obs, first)
        buffer.add(rows)
        obs, *_ = envs.step(joint)
        first = rows["is_last"]
    envs.close()
    return buffer


def learn(agent: ModelAlone, buffer: M.ReplayBuffer, updates: int, rec: float, tom: float) -> None:
    agent.args.rec_scale = rec
    agent.args.tom_scale = tom
    for _ in range(updates):
        _, latents = agent.update(batch := buffer.sample(agent.args.batch_size))
        buffer.write_back(batch, **latents)


def measure(agent: ModelAlone, phase: str, updates: int) -> dict[str, str]:
    """A line of the table."""
    args = agent.args
    result = M.evaluate(agent, args, 200, purpose="badge")
    with agent.evaluating():
        played = play(agent)
        found = swap(agent, played) | probes(agent, played)
    numbers = {name: result["tom"][name] for name in ("cross_entropy", "skill")} | found
    return {"arm": args.teammate_model, "seed": args.seed, "phase": phase, "rec_scale": args.rec_scale,
            "tom_scale": args.tom_scale, "crowd": args.env_arguments()["crowd"],
            "updates": updates} | {name: f"{x:.4g}" for name, x in numbers.items()}


def rows(options: Options) -> Iterator[dict[str, str]]:
    """The lines of the table, one after the other."""
    both = options.first + options.then
    for crowd in (96, 0):
        agent = make(options, crowd)
        buffer = collect(agent, options.steps)
        untaught = copy.deepcopy((agent.state_dict(), buffer.state_dict()))
        learn(agent, buffer, options.first, rec=0.001, tom=30.0)
        yield measure(agent, "first", options.first)
        taught = copy.deepcopy((agent.state_dict(), buffer.state_dict()))
        cells = list(itertools.product(options.rec, options.tom))
        for rec, tom in cells if crowd else cells[:1]:
            restore(agent, buffer, taught)
            learn(agent, buffer, options.then, rec, tom)
            yield measure(agent, "then", both)
        if crowd:
            restore(agent, buffer, untaught)
            learn(agent, buffer, both, *cells[0])
            yield measure(agent, "scratch", both)


def restore(agent: ModelAlone, buffer: M.ReplayBuffer, saved: tuple[dict, dict]) -> None:
    agent.load_state_dict(saved[0])
    buffer.load_state_dict(saved[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    M.keep_freed_memory()
    writer = None
    for row in rows(tyro.cli(Options)):
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()
