"""Draws recorded curves (needs matplotlib): each argument is a label and its seeds' CSV files, or a label and a level.

    python benchmark/plot.py --out cartpole.png --bins 30 --steps 24000 "return=benchmark/cartpole/seed1.csv"
    python benchmark/plot.py --out arms.png --bins 40 --steps 20000 "ToM=tom1.csv,tom2.csv" "plain=no1.csv" "Bayes=6.72"
    python benchmark/plot.py --out dmc.png --bins 3 --steps 30000 --repeat 2 "ours=s1.csv" "official=official.csv:TASK"

Line: the mean over seeds of the values of a tag, each first averaged over equal stretches of the run; shade: from the
lowest seed to the highest. file.csv:TASK is a task of a file of official curves (task, seed, frame, return); beside
these a stretch's mean stands at its end, as theirs do in the author's plots (embodied/scripts/plot.py).
"""
import argparse
import csv

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Curve = list[tuple[int, float]]  # (step, value) of one seed


def load(source: str, tag: str, steps: int, repeat: int) -> list[Curve]:
    """The curve of every seed in a file: one in ours, several in an official one."""
    path, _, task = source.partition(":")
    with open(path) as file:
        rows = list(csv.DictReader(file))
    if not task:
        curve = [(int(r["step"]) * repeat, float(r["value"])) for r in rows if r["tag"] == tag]
        return [[point for point in curve if point[0] <= (steps or float("inf"))]]
    rows = [r for r in rows if r["task"] == task and float(r["frame"]) <= (steps or float("inf"))]
    return [[(int(r["frame"]), float(r["return"])) for r in rows if r["seed"] == seed]
            for seed in sorted({r["seed"] for r in rows})]


def average(curve: Curve, bins: int, length: int, at_ends: bool) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a curve; with bins, their means over stretches of the run (bins,), NaN where nothing is."""
    steps, values = map(np.array, zip(*curve))
    if not bins:
        return steps, values
    edges = np.linspace(0, length or steps.max(), bins + 1)
    place = np.clip(np.searchsorted(edges, steps), 1, bins) - 1
    if at_ends:  # a stretch of which a run has not made half is left out
        made = edges[place] + edges[1] / 2 <= steps.max()
        place, values, steps = place[made], values[made], edges[1 + place[made]]
    return tuple(np.array([x[place == i].mean() if (place == i).any() else np.nan for i in range(bins)])
                 for x in (steps, values))


def draw(axes: plt.Axes, label: str, curves: list[Curve], bins: int, length: int, color: str | None = None,
         at_ends: bool = False) -> None:
    """The line and the shade of some seeds' curves."""
    seeds = [average(curve, bins, length, at_ends) for curve in curves]
    shared = min(len(steps) for steps, _ in seeds)
    steps, values = (np.array([x[:shared] for x in part]) for part in zip(*seeds))
    met = ~np.isnan(values).all(0)  # stretches in which some seed has a value
    x, values = np.nanmean(steps[:, met], 0), values[:, met]
    line, = axes.plot(x, np.nanmean(values, 0), marker="." if len(x) < 10 else "", label=label, color=color)
    if len(seeds) > 1:
        axes.fill_between(x, np.nanmin(values, 0), np.nanmax(values, 0), color=line.get_color(), alpha=0.2, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="+", metavar="LABEL=CSV,CSV… or LABEL=NUMBER")
    parser.add_argument("--out", required=True, help="the picture to write")
    parser.add_argument("--tag", default="charts/episodic_return", help="which scalar")
    parser.add_argument("--bins", type=int, default=0, help="stretches to average over; 0: every value as it is")
    parser.add_argument("--steps", type=int, default=0, help="length of the runs, where stretches must be the same")
    parser.add_argument("--repeat", type=int, default=1, help="frames of a step of ours, where frames are to be compared")
    parser.add_argument("--title", default="", help="what it shows")
    args = parser.parse_args()

    official = any(".csv:" in curve for curve in args.curves)
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for curve in args.curves:
        label, _, source = curve.rpartition("=")
        if ".csv" not in source:
            axes.axhline(float(source), color="gray", linestyle="--", linewidth=1)
            axes.annotate(label, (1, float(source)), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          color="gray")
            continue
        loaded = [load(part, args.tag, args.steps, args.repeat) for part in source.split(",")]
        draw(axes, label, sum(loaded, []), args.bins, args.steps, at_ends=official)
    axes.set(xlabel="frames" if args.repeat > 1 else "environment steps", ylabel=args.tag, title=args.title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
