"""How an agent of games.hockey learned: kept players against the package's scripts, and the latest against the others.

    python benchmark/hockey_games.py play runs/RUN [FOLDER…] --out benchmark/hockey/games.csv
    python benchmark/hockey_games.py draw benchmark/hockey/games.csv… --out benchmark/hockey/games.png

`play` takes folders that hold an agent.pt of one agent at different steps; its players are these and, where there is a
pool, the members of it. One line for each pair: after how many steps a player was kept, its opponent (a script, or the
steps of another player), games, wins, defeats, draws. Games are without shaping, the player in a random seat; all pairs
have the same seeds. Actions are sampled, with --deterministic modes for the first of the two. `draw` needs matplotlib.
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


def play(options: argparse.Namespace) -> None:
    players = {}  # steps → weights
    for folder in options.sources:
        args = M.parse_args(["--evaluate", folder, "--vectorization", "sync", "--no-compile"], M.SocialArgs)
        observations, actions, seats, _ = M.seat_spaces(args)
        agent = M.SocialDreamer(observations, actions, args, seats)
        latest = M.restore(agent, folder)["global_step"]
        agent.averages = []  # with --average evaluations would take them for the weights of every player
        if args.partners == "pool":
            for number, member in M.make_pool(agent, args, folder).members.items():
                players[number * args.pool_every] = dict(member.named_parameters())
        players[latest] = {name: x.detach().clone() for name, x in agent.named_parameters()}
    latest = max(players)
    pool = M.Pool(len(players) + 3, "uniform", 0)
    numbers = {steps: pool.add(agent, weights) for steps, weights in sorted(players.items())}
    pairs = [(steps, script) for steps in numbers for script in SCRIPTS if script in options.against]
    pairs += [(latest, steps) for steps in numbers if steps < latest and "players" in options.against]
    with open(options.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["steps", "opponent", "games", "wins", "defeats", "draws"])
        for steps, opponent in pairs:
            agent.load_state_dict(players[steps], strict=False)
            script = opponent in SCRIPTS
            values = dict(partners="scripted", scripted=(opponent,)) if script else dict(partners="pool", scripted=())
            result = M.evaluate(agent, dataclasses.replace(args, held_out=(), **values), options.games,
                                deterministic=options.deterministic, pool=None if script else pool,
                                partner=None if script else numbers[opponent])
            x = np.sign(result["returns"])
            writer.writerow([steps, opponent, options.games, (x > 0).sum(), (x < 0).sum(), (x == 0).sum()])
            file.flush()


def draw(options: argparse.Namespace) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = []
    for path in options.sources:
        with open(path) as file:
            rows += csv.DictReader(file)
    groups = {f"against {script}": [(r["steps"], r) for r in rows if r["opponent"] == script] for script in SCRIPTS}
    groups["the latest against earlier ones"] = [(r["opponent"], r) for r in rows if r["opponent"] not in SCRIPTS]
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axes, (title, points) in zip(panels, groups.items()):
        steps = [int(x) for x, _ in points]
        for name, color in (("wins", "C2"), ("defeats", "C3"), ("draws", "C7")):
            games = np.array([int(r["games"]) for _, r in points])
            share = np.array([int(r[name]) for _, r in points]) / games
            error = np.sqrt(share * (1 - share) / games)
            axes.plot(steps, share, ".-", label=name, color=color)
            axes.fill_between(steps, share - error, share + error, color=color, alpha=0.2, linewidth=0)
        label = "steps of the earlier one" if title.startswith("the") else "environment steps"
        axes.set(title=title, xlabel=label, ylim=(0, 1))
        axes.locator_params(axis="x", nbins=4)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of games, ± standard error")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    playing = commands.add_parser("play", help="play and write the results")
    playing.add_argument("sources", nargs="+", metavar="FOLDER")
    playing.add_argument("--games", type=int, default=100)
    playing.add_argument("--against", nargs="+", default=[*SCRIPTS, "players"], choices=[*SCRIPTS, "players"])
    playing.add_argument("--deterministic", action="store_true", help="the player's actions are modes")
    playing.set_defaults(run=play)
    drawing = commands.add_parser("draw", help="draw what was written")
    drawing.add_argument("sources", nargs="+", metavar="CSV")
    drawing.set_defaults(run=draw)
    for command in (playing, drawing):
        command.add_argument("--out", required=True, help="the file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        options.run(options)
    except M.InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
