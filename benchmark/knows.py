"""What the world model of a saved run reconstructs of each vector it observes, in windows of the run's replay, as CSV;
and what it would with further updates on the same data, in which nothing but the world model learns.

    python benchmark/knows.py --run runs/RUN --updates 6000 --every 1000

R² is the explained share of a component's variance (under symlog, as the model sees it): 1 is all, 0 what its mean
explains. reward: correlation of the predicted and the real one. Steps after the 16th of each window count.
"""
import csv
import dataclasses
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import badge_model  # noqa: E402
import dreamer  # noqa: E402

SEEN, WINDOWS = 16, 64  # steps before those that count, and windows


@dataclasses.dataclass
class Options:
    run: str  # folder of a run of dreamer.py with agent.pt and replay.pt
    updates: int = 0  # further ones
    every: int = 1000  # updates between lines


class ModelAlone(dreamer.Dreamer):
    """An agent whose updates move the world model and nothing else."""
    forward = badge_model.ModelAlone.forward


def load(run: str) -> tuple[ModelAlone, dreamer.ReplayBuffer]:
    args = dreamer.parse_args(["--evaluate", run, "--no-compile"])
    args.imagination_horizon = 1
    envs = dreamer.make_vector_env(args, 1, "", [0])
    agent = ModelAlone(envs.single_observation_space, envs.single_action_space, args)
    envs.close()
    dreamer.restore(agent, run)
    saved = dreamer.load_file(run, "replay.pt")
    buffer = dreamer.ReplayBuffer(saved["rows"] * args.num_envs, args.num_envs, args.batch_length,
                                  agent.replay_specs())
    buffer.load_state_dict(saved)
    return agent, buffer


@torch.no_grad()
def known(agent: ModelAlone, data: dict, noise: dict) -> dict[str, float]:
    """R² of each component of each vector, and the correlation of rewards."""
    states = agent.wm.observe(data, noise["posterior"])
    recons = agent.wm.decode(states)
    found = {}
    for name, x in data["obs"].items():
        if agent.observations.specs[name].kind == "vector":
            seen = dreamer.symlog(x)[:, SEEN:].flatten(0, 1)
            wrong = seen - recons[name].float()[:, SEEN:].flatten(0, 1)
            shares = 1 - (wrong**2).mean(0) / seen.var(0, correction=0)
            found |= {f"{name}{i}": float(share) for i, share in enumerate(shares)}
    paid = agent.wm.reward(dreamer.features(states)).pred()[:, SEEN:].flatten()
    pair = torch.stack([paid, data["reward"][:, SEEN:].flatten()])
    return found | {"reward": float(torch.corrcoef(pair)[0, 1])}


def main(options: Options) -> None:
    torch.set_num_threads(1)
    agent, buffer = load(options.run)
    if agent.args.batch_length <= SEEN:
        sys.exit(f"error: the run has windows of {agent.args.batch_length} steps, and more than {SEEN} are needed")
    data = agent.training_data(buffer.sample(WINDOWS, online=False))
    noise = agent.learning_noise(data)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for update in range(options.updates + 1):
        if update % options.every == 0:
            found = known(agent, data, noise)
            if update == 0:
                writer.writerow(["updates", *found])
            writer.writerow([update, *(f"{x:.3f}" for x in found.values())])
            sys.stdout.flush()
        if update == options.updates:
            break
        _, latents = agent.update(batch := buffer.sample(agent.args.batch_size))
        buffer.write_back(batch, **latents)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
