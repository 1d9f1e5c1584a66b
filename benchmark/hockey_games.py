"""How a run of games.hockey with a pool learned: its past selves against the package's scripts, and the latest against
its past selves.

    python benchmark/hockey_games.py runs/RUN --every 2 --out benchmark/hockey/record_s1.csv
    python benchmark/hockey_games.py benchmark/hockey/record_s1.csv --picture benchmark/hockey/record_s1.png

The second needs matplotlib. One line for each pair: after how many steps a player was kept, its opponent (a script, or
the steps of a past self), games, wins, defeats, draws. Games are without shaping, the player in a random seat; all
pairs have the same seeds. Players sample their actions, as in training.
"""
import argparse
import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer_marl as M  # noqa: E402

SCRIPTS = ("weak", "strong")


def play(run: str, every: int, episodes: int, path: str) -> None:
    args = M.parse_args(["--evaluate", run, "--vectorization", "sync", "--no-compile"], M.SocialArgs)
    observations, actions, seats, _ = M.seat_spaces(args)
    agent = M.SocialDreamer(observations, actions, args, seats)
    latest = M.restore(agent, run)["global_step"]
    agent.averages = []  # with --average evaluations would take them for the weights of every player
    pool = M.make_pool(agent, args, run)
    weights = {number * args.pool_every: dict(member.named_parameters()) for number, member in pool.members.items()}
    numbers = dict(zip(weights, pool.members))
    chosen = list(weights)[::every]
    weights[latest] = {name: x.detach().clone() for name, x in agent.named_parameters()}
    pairs = [(steps, script) for steps in dict.fromkeys([*chosen, latest]) for script in SCRIPTS]
    pairs += [(latest, steps) for steps in chosen]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["steps", "opponent", "games", "wins", "defeats", "draws"])
        for steps, opponent in pairs:
            agent.load_state_dict(weights[steps], strict=False)
            if opponent in SCRIPTS:
                alone = dataclasses.replace(args, partners="scripted", scripted=(opponent,))
                result = M.evaluate(agent, alone, episodes)
            else:
                result = M.evaluate(agent, args, episodes, pool=pool, partner=numbers[opponent])
            x = np.sign(result["returns"])
            writer.writerow([steps, opponent, episodes, (x > 0).sum(), (x < 0).sum(), (x == 0).sum()])
            file.flush()


def draw(path: str, picture: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(path) as file:
        rows = list(csv.DictReader(file))
    groups = {f"against {script}": [(r["steps"], r) for r in rows if r["opponent"] == script] for script in SCRIPTS}
    groups["the latest against past selves"] = [(r["opponent"], r) for r in rows if r["opponent"] not in SCRIPTS]
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axes, (title, points) in zip(panels, groups.items()):
        steps = [int(x) for x, _ in points]
        for name, color in (("wins", "C2"), ("defeats", "C3"), ("draws", "C7")):
            share = np.array([int(r[name]) / int(r["games"]) for _, r in points])
            error = np.sqrt(share * (1 - share) / int(rows[0]["games"]))
            axes.plot(steps, share, ".-", label=name, color=color)
            axes.fill_between(steps, share - error, share + error, color=color, alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel="steps after which the past self was kept" if title.startswith("the")
                 else "environment steps", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of games")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a run, or the CSV file of one")
    parser.add_argument("--every", type=int, default=1, help="take every so many members of the pool")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", help="the CSV file to write")
    parser.add_argument("--picture", help="the picture to write")
    args = parser.parse_args()
    if bool(args.out) == bool(args.picture):
        parser.error("give --out with the folder of a run, or --picture with a CSV file")
    torch.set_num_threads(1)
    try:
        play(args.source, args.every, args.episodes, args.out) if args.out else draw(args.source, args.picture)
    except M.InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
