"""Runs that ended at a return (--stop-at): a table, their evaluations, and a picture of these (needs matplotlib).

    python benchmark/confirm.py --out benchmark/cartpole/confirm runs/CartPole-v1__dreamer__*

writes confirm.csv, a line for each run that finished; confirm_curves.csv, its evaluations; and confirm.png.
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+")
parser.add_argument("--out", required=True, help="where to write, without .csv")
args = parser.parse_args()

table = []
curves = []
for run in map(Path, args.runs):
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else None
    if not summary or not summary["eval_returns"]:  # broken off
        continue
    seed = summary["args"]["seed"]
    returns = summary["eval_returns"]
    table.append(dict(
        seed=seed, steps=summary["global_step"], updates=summary["updates"], seconds=round(summary["seconds"]),
        evaluation=round(summary["eval_return_mean"], 2), std=round(summary["eval_return_std"], 2),
        lowest=min(returns), episodes=len(returns)))
    scalars = EventAccumulator(str(run)).Reload().Scalars("eval/episodic_return")
    # the last one is that of the end, in fresh episodes
    curves += [dict(seed=seed, step=x.step, evaluation=round(x.value, 2)) for x in scalars[:-1]]
if not table or not curves:
    sys.exit("error: none of these runs has ended, or none was evaluated while it learned: give --eval-every")
table.sort(key=lambda row: row["seed"])
curves.sort(key=lambda row: (row["seed"], row["step"]))
for name, rows in {".csv": table, "_curves.csv": curves}.items():
    with open(f"{args.out}{name}", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

figure, axes = plt.subplots(figsize=(7, 3.5))
for row in table:
    own = [x for x in curves if x["seed"] == row["seed"]]
    line, = axes.plot([x["step"] for x in own], [x["evaluation"] for x in own], linewidth=1, alpha=0.6)
    axes.plot(row["steps"], row["evaluation"], "o", color=line.get_color(), markersize=4)
axes.set_xlabel("environment steps")
axes.set_ylabel("mean return of 20 episodes")
axes.set_title(f"CartPole-v1, {len(table)} seeds; dots: fresh episodes at the end")
figure.tight_layout()
figure.savefig(f"{args.out}.png", dpi=120)
