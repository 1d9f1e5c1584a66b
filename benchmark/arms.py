"""One line for each finished run of dreamer_marl.py, from its summary.json:

    python benchmark/arms.py runs/* > benchmark/marl/arms.csv
"""
import csv
import json
import sys
from pathlib import Path

writer = csv.writer(sys.stdout, lineterminator="\n")
measures = ["cross_entropy", "marginal", "bayes", "accuracy", "skill"]
writer.writerow(["env_id", "arm", "q", "partners", "seed", "steps", "updates", "seconds", "episodes", "return",
                 "return_std", *measures])
rows = []
for folder in sys.argv[1:]:
    summary = Path(folder) / "summary.json"
    s = json.loads(summary.read_text()) if summary.is_file() else {}
    if not s.get("eval_returns") or "eval_tom" not in s:
        print(f"{folder} is left out: no run of dreamer_marl.py that has ended", file=sys.stderr)
        continue
    args, tom = s["args"], s["eval_tom"]
    arm = args["teammate_model"] + "+stop-grad" * args["tom_stop_grad"] + "+oracle" * args["oracle"]
    arm += "+bfloat16" * (args["precision"] == "bfloat16")
    q = json.loads(args["env_kwargs"]).get("q", 0.0)
    rows.append([args["env_id"], arm, q, args["partners"], args["seed"], s["global_step"], s["updates"],
                 round(s["seconds"]), len(s["eval_returns"]),
                 *(f"{s[f'eval_return_{k}']:.3f}" for k in ("mean", "std")),
                 *(f"{tom[k]:.4f}" if k in tom else "" for k in measures)])
writer.writerows(sorted(rows))
