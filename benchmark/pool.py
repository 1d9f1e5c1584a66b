"""Plays the first and the latest member of a run's pool against each other:

    python benchmark/pool.py runs/RUN [episodes]

One of them takes one seat, the other all the rest; then the mean return of that seat and its standard error, by seat.
The environments are seeded alike, so that all four pairs meet the same games in the same seats.
"""
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer_marl as M  # noqa: E402

run, episodes = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 400
torch.set_num_threads(1)
args = M.parse_args(["--evaluate", run, "--vectorization", "sync"], M.SocialArgs)
observations, actions, seats, _ = M.seat_spaces(args)
agent = M.SocialDreamer(observations, actions, args, seats)
M.restore(agent, run)
agent.averages = []  # with --average evaluations would take them for the weights of every player
pool = M.make_pool(agent, args, run)
ids = {"first": min(pool.members), "latest": pool.add(agent)}
seeds = M.derive_seeds(args.seed, "evaluation", count=episodes)  # as M.evaluate does
with contextlib.closing(M.make_vector_env(args, episodes, "", seeds)) as envs:
    obs, _ = envs.reset(seed=seeds, options={"steps": np.inf})
    seat, names = obs["learner"], envs.envs[0].unwrapped.names
results = []
for who, number in ids.items():
    agent.load_state_dict(dict(pool.members[number].named_parameters()), strict=False)
    for others, partner in ids.items():
        returns = np.array(M.evaluate(agent, args, episodes, pool=pool, partner=partner)["returns"])
        for i, name in enumerate(names):
            x = returns[seat == i]
            results.append(dict(seat=name, who=who, others=others, episodes=len(x), mean=float(x.mean()),
                                standard_error=float(x.std() / len(x) ** 0.5)))
            print(f"{name:12s} {who:6s} among {others:6s} {x.mean():8.2f} ± {results[-1]['standard_error']:.2f}")
Path(run, "pool.json").write_text(json.dumps(results, indent=1))
