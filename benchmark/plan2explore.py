"""One line for each finished run of ScaledMountainCar-v0 (mountain_car.py), from its replay.pt and summary.json:

    python benchmark/plan2explore.py runs/* > benchmark/plan2explore.csv

cells_N: of a 20 x 20 grid over position and velocity, those visited within N steps (all environments together).
first_success: the first step at which an environment reached the goal. successes: episodes that reached it.
return: of the evaluation at the end. A run must be shorter than its replay.
"""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch

MARKS = 1000, 2500, 5000, 10_000, 16_000


def arm(args: dict) -> str:
    if "intrinsic_weight" not in args:
        return "plain"
    noise = f" noise {args['action_noise']:g}" * (args["action_noise"] > 0)
    return f"disagreement{noise}" if args["intrinsic_weight"] else f"plain{noise}"


writer = csv.writer(sys.stdout, lineterminator="\n")
writer.writerow(["arm", "seed", "steps", "updates", "seconds", *(f"cells_{n}" for n in MARKS), "cells",
                 "first_success", "successes", "return", "return_std"])
rows = []
for folder in sys.argv[1:]:
    path = Path(folder) / "summary.json"
    if not path.exists():
        continue
    summary = json.loads(path.read_text())
    if not summary["eval_returns"] or "MountainCar" not in summary["args"]["env_id"]:  # interrupted, or another
        continue
    data = torch.load(Path(folder) / "replay.pt", weights_only=True)["data"]
    seen = torch.stack(data["obs/obs"], 1).numpy()  # (steps of each, environments, 2)
    width = seen.shape[1]
    cell = np.clip((seen + 1) * 10, 0, 19).astype(int) @ [20, 1]
    goal = torch.stack(data["is_terminal"], 1).numpy()
    counts = [len(np.unique(cell[: n // width])) for n in MARKS] + [len(np.unique(cell))]
    first = width * np.flatnonzero(goal.any(1))[0] if goal.any() else ""
    rows.append([arm(summary["args"]), summary["args"]["seed"], summary["global_step"], summary["updates"],
                 round(summary["seconds"]), *counts, first, int(goal.sum()),
                 f"{summary['eval_return_mean']:.1f}", f"{summary['eval_return_std']:.1f}"])
writer.writerows(sorted(rows))
