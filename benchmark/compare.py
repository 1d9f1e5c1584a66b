"""Agents side by side on Pendulum-v1 and CartPole-v1, and beside a model-free one:

    python benchmark/compare.py model-free --env-id CartPole-v1 --seed 1 --out curves
    python benchmark/compare.py plot --out benchmark/comparison runs/* curves/*

`model-free` (needs stable-baselines3) trains SAC where actions are continuous and PPO where they are discrete, with
the default values of CleanRL's sac_continuous_action.py and ppo.py, and writes curves/ENV__AGENT__SEED.csv.

`plot` (needs matplotlib) reads such files, and folders of runs that have finished. A source with another name is given
as ENV__AGENT__SEED=SOURCE. It writes comparison.csv, all returns while training and the last evaluation of every run,
and comparison.png, the mean and the range over seeds; and prints a table. comparison.csv can be plotted again.

A return while training is that of an episode with all noise of exploration. It stands at the step, over all
environments, at which the episode ended. An evaluation is that of the agent's own script, over 20 episodes: dreamer.py
and decoder_free.py sample from an average of their weights, planning.py plans with it, the others play modes.
"""
import argparse
import csv
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import curves

RETURN = "charts/episodic_return"
EVALUATION = "eval/episodic_return"
LABELS = {"dreamer": "DreamerV3", "planning": "DreamerV3, planning", "decoder_free": "decoder-free",
          "dreamer_v1": "DreamerV1", "hockey_agent": "hockey settings", "ppo": "PPO", "sac": "SAC"}

# CleanRL's values, where they are not the defaults of stable-baselines3. CleanRL halves the squared error of values.
PPO = dict(learning_rate=lambda left: 2.5e-4 * max(left, 0.0), n_steps=128, batch_size=128, n_epochs=4,
           clip_range_vf=0.2, ent_coef=0.01, vf_coef=0.25)
PPO_ENVS = 4
SAC = dict(learning_rate=1e-3, learning_starts=5_000)  # the rate of critics and temperature
SAC_ACTOR_RATE = 3e-4

Row = tuple[str, int, float]  # tag, step, value
Name = tuple[str, str, str]  # environment, agent, seed


def make_model(env_id: str, seed: int) -> tuple[str, Any]:
    """Name of the model-free agent for a task, and its model with the environments that it trains in."""
    import gymnasium as gym
    import stable_baselines3 as sb3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.utils import update_learning_rate

    class TwoRates(sb3.SAC):
        def _update_learning_rate(self, optimizers: Any) -> None:
            super()._update_learning_rate(optimizers)
            update_learning_rate(self.actor.optimizer, SAC_ACTOR_RATE)

    if isinstance(gym.make(env_id).action_space, gym.spaces.Box):
        return "sac", TwoRates("MlpPolicy", make_vec_env(env_id, 1), **SAC, seed=seed, device="cpu")
    return "ppo", sb3.PPO("MlpPolicy", make_vec_env(env_id, PPO_ENVS), **PPO, seed=seed, device="cpu")


def train_model_free(args: argparse.Namespace) -> None:
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    seed = 1000 * args.seed  # environment i has seed + i, which no other run should have
    agent, model = make_model(args.env_id, seed)
    rows: list[Row] = []

    def log(local: dict[str, Any], _: dict[str, Any]) -> bool:
        """Is called after each step of all environments, which num_timesteps has counted. True: go on."""
        rows.extend((RETURN, model.num_timesteps, info["episode"]["r"]) for info in local["infos"] if "episode" in info)
        return True

    start = time.process_time()
    model.learn(args.steps, callback=log)
    seconds = time.process_time() - start
    fresh = make_vec_env(args.env_id, 1, seed=seed + 500)
    mean, deviation = evaluate_policy(model, fresh, n_eval_episodes=20)
    rows.append((EVALUATION, model.num_timesteps, mean))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.env_id}__{agent}__{args.seed}.csv"
    with open(path, "w", newline="") as file:
        curves.write(rows, file)
    print(f"{path}: {model.num_timesteps} steps, {len(rows) - 1} episodes, {seconds:.0f} s of CPU time, "
          f"evaluation {mean:.2f} ± {deviation:.2f}")


def read(source: str) -> dict[Name, list[Row]]:
    """The rows of each run in a source: none of a folder whose run has not finished."""
    given, _, path = source.rpartition("=")
    path = Path(path)
    name = tuple((given or path.stem).split("__")[:3])
    if path.is_dir():
        summary = path / "summary.json"
        if not summary.is_file() or json.loads(summary.read_text())["interrupted"]:
            print(f"{path} is left out: it has not finished")
            return {}
        return {name: curves.scalars(str(path), [RETURN, EVALUATION])}
    runs = defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            own = (row["env_id"], row["agent"], row["seed"]) if "agent" in row else name
            runs[own].append((row["tag"], int(row["step"]), float(row["value"])))
    return runs


def write_csv(runs: dict[Name, list[Row]], path: str) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["env_id", "agent", "seed", "tag", "step", "value"])
        for name, rows in runs.items():
            last = [row for row in rows if row[0] == EVALUATION][-1:]
            kept = [row for row in rows if row[0] == RETURN] + last
            writer.writerows([*name, tag, step, f"{value:.6g}"] for tag, step, value in kept)


def draw(runs: dict[Name, list[Row]], args: argparse.Namespace) -> None:
    """A panel for each environment. Both model-free agents have the same colour."""
    import matplotlib.pyplot as plt
    import plot

    tasks = sorted({env_id for env_id, _, _ in runs})
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.8), squeeze=False)
    for axes, task in zip(panels[0], tasks):
        for i, (agent, label) in enumerate(LABELS.items()):
            seeds = [[(step, value) for tag, step, value in rows if tag == RETURN and step <= args.steps]
                     for name, rows in runs.items() if name[:2] == (task, agent)]
            if seeds:
                plot.draw(axes, label, seeds, args.bins, args.steps, color=f"C{min(i, 5)}")
        axes.set(title=task, xlabel="environment steps", ylabel="return of episodes while training")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(f"{args.out}.png", dpi=110)


def print_table(runs: dict[Name, list[Row]], args: argparse.Namespace) -> None:
    """A line for each agent and task, with a number for each seed."""
    print(f"| task | agent | seeds | training returns, last {args.last:,} steps | evaluation at the end |")
    print("|---|---|---|---|---|")
    for task in sorted({env_id for env_id, _, _ in runs}):
        for agent, label in LABELS.items():
            own = {name[2]: rows for name, rows in sorted(runs.items()) if name[:2] == (task, agent)}
            late = [[x for tag, step, x in rows if tag == RETURN and 0 <= args.steps - step < args.last]
                    for rows in own.values()]
            means = ", ".join(f"{sum(x) / len(x):.0f}" if x else "–" for x in late)
            last = [[x for tag, _, x in rows if tag == EVALUATION][-1:] for rows in own.values()]
            ends = ", ".join(f"{x[0]:.0f}" if x else "–" for x in last)
            if own:
                print(f"| {task} | {label} | {', '.join(own)} | {means} | {ends} |")


def compare(args: argparse.Namespace) -> None:
    runs = {}
    for source in args.sources:
        new = read(source)
        if clash := runs.keys() & new.keys():
            raise SystemExit(f"error: {source} holds {'__'.join(sorted(clash)[0])} once more: leave one out")
        runs |= new
    for name in runs:
        if len(name) < 3 or name[1] not in LABELS:
            raise SystemExit(f"error: {'__'.join(name)} names no run: give ENV__AGENT__SEED=SOURCE, the "
                             f"agent one of {', '.join(LABELS)}")
    runs = dict(sorted(runs.items()))
    write_csv(runs, f"{args.out}.csv")
    draw(runs, args)
    print_table(runs, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    model_free = commands.add_parser("model-free", help="train a model-free agent")
    model_free.add_argument("--env-id", required=True, help="Gymnasium id")
    model_free.add_argument("--seed", type=int, required=True)
    model_free.add_argument("--out", type=Path, default=Path("curves"), help="folder of the curve")
    model_free.set_defaults(run=train_model_free)
    picture = commands.add_parser("plot", help="put runs together")
    picture.add_argument("sources", nargs="+", metavar="FOLDER, CSV or ENV__AGENT__SEED=SOURCE")
    picture.add_argument("--out", required=True, help="where to write, without .csv")
    picture.add_argument("--bins", type=int, default=12, help="stretches of a run to average over")
    picture.add_argument("--last", type=int, default=4_000, help="steps at the end to average over in the table")
    picture.set_defaults(run=compare)
    for command in (model_free, picture):
        command.add_argument("--steps", type=int, default=24_000, help="length of the runs, over all environments")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
