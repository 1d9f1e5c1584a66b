"""One line for each finished run of variants/decoder_free.py, from its summary.json and its log; and
a table of the arms, to standard error:

    python benchmark/grad_heads.py runs/* > benchmark/grad_heads.csv

An arm is a value of --grad-heads. "return@2500" is the evaluation after so many steps, "rec" the
loss of the decoder, mean of the last fifth of the run: where it is no grad head, and --probe is
given, it tells how much of the observation a state holds that was shaped without it.
"""
import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

rows = []
for folder in sys.argv[1:]:
    path = Path(folder) / "summary.json"
    if not path.exists():  # still running, or of another script
        continue
    summary = json.loads(path.read_text())
    args = summary["args"]
    if summary["interrupted"] or "grad_heads" not in args:
        continue
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    row = {"env_id": args["env_id"], "grad_heads": "+".join(args["grad_heads"]) or "none",
           "seed": args["seed"], "steps": summary["global_step"], "updates": summary["updates"],
           "seconds": round(summary["seconds"]), "episodes": len(summary["eval_returns"]),
           "return": round(summary["eval_return_mean"], 2),
           "return_std": round(summary["eval_return_std"], 2)}
    if "losses/rec" in events.Tags()["scalars"]:
        curve = [event.value for event in events.Scalars("losses/rec")]
        row["rec"] = round(statistics.mean(curve[-max(1, len(curve) // 5) :]), 5)
    if args["eval_every"]:
        for event in events.Scalars("eval/episodic_return"):
            row[f"return@{event.step // args['eval_every'] * args['eval_every']}"] = round(event.value, 2)
    rows.append(row)

rows.sort(key=lambda row: (row["env_id"], row["grad_heads"], row["seed"]))
columns = list(dict.fromkeys(name for row in rows for name in row))
writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
writer.writeheader()
writer.writerows(rows)

arms = defaultdict(list)
for row in rows:
    arms[row["env_id"], row["grad_heads"]].append(row)
print("| environment | grad heads | returns of the seeds | mean | decoder's loss |\n|---|---|---|---|---|",
      file=sys.stderr)
for (env_id, heads), group in arms.items():
    returns = [row["return"] for row in group]
    rec = [row["rec"] for row in group if "rec" in row]
    print(f"| {env_id} | {heads.replace('+', ' ')} | {', '.join(f'{x:.1f}' for x in returns)} | "
          f"{statistics.mean(returns):.1f} | {f'{statistics.mean(rec):.4f}' if rec else '–'} |",
          file=sys.stderr)
