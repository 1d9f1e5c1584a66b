"""Returns and times of planning beside the plain actor, for saved runs of dreamer.py, as CSV:

    python benchmark/planning.py runs/RUN [runs/RUN …] > benchmark/planning.csv
    python benchmark/planning.py runs/RUN --plans 1x64x0 10x64x2 --episodes 20

A plan is HORIZON x CANDIDATES x ITERATIONS [x DREAMS]. All lines of a run play the same episodes, on one thread.
milliseconds: one action of one environment, the mean over 50 after 5 that warm up.
"""
import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "variants")]
import dreamer  # noqa: E402
import planning  # noqa: E402


def milliseconds(agent: dreamer.Dreamer, envs) -> float:
    obs, _ = envs.reset(seed=0)
    state = None
    for step in range(55):
        if step == 5:
            start = time.perf_counter()
        _, state = agent.act(obs, state, np.array([step == 0]))
    return (time.perf_counter() - start) / 50 * 1000


def play(run: str, plan: str, episodes: int) -> list:
    args = dreamer.parse_args(["--evaluate", run, "--no-cuda", "--no-compile"], planning.Args)
    agent_class = dreamer.Dreamer
    if plan:
        agent_class = planning.Planner
        names = ("plan_horizon", "plan_candidates", "plan_iterations", "plan_dreams")
        for name, value in zip(names, plan.split("x")):
            setattr(args, name, int(value))
    envs = dreamer.make_vector_env(args, 1, "", [0])
    agent = agent_class(envs.single_observation_space, envs.single_action_space, args)
    steps = dreamer.restore(agent, run)["global_step"]
    with agent.evaluating():
        cost = milliseconds(agent, envs)
    envs.close()
    returns = dreamer.evaluate(agent, args, episodes)
    return [Path(run).name, args.env_id, args.seed, steps, plan or "actor", episodes, f"{np.mean(returns):.2f}",
            f"{np.std(returns):.2f}", f"{min(returns):.2f}", f"{max(returns):.2f}", f"{cost:.2f}"]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+")
parser.add_argument("--plans", nargs="*", default=["10x64x0", "10x64x2", "10x64x2x4"])
parser.add_argument("--episodes", type=int, default=20)
options = parser.parse_args()
torch.set_num_threads(1)
writer = csv.writer(sys.stdout, lineterminator="\n")
writer.writerow(["run", "env_id", "seed", "steps", "plan", "episodes", "return", "std", "lowest", "highest",
                 "milliseconds"])
try:
    for run in options.runs:
        for plan in ["", *options.plans]:
            writer.writerow(play(run, plan, options.episodes))
            sys.stdout.flush()
except dreamer.InputError as error:
    sys.exit(f"error: {error}")
