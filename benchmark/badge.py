"""Badge in a crowd: what saved agents earn, and what their latents hold. A CSV line for each run; then the map.

    python benchmark/badge.py runs/RUN [runs/RUN …] > benchmark/marl/badge.csv
    python benchmark/badge.py --map benchmark/marl/badge.csv benchmark/marl/badge_map.png

return, its standard error, cross_entropy (nats) and skill of the ToM head: 200 episodes with seeds of their own.
rec: loss of the reconstruction. Who knows nothing loses ln K by the badge and ln² 11 = 5.75 by each number of a crowd.
badge_in_…, crowd_in_…: linear probes (see probe.py) of z_env, z_team (the last team_latents in the other arms) and h:
    how often the badge is read (chance 1/K), and a number's sign (chance 1/2; the mean over all numbers).
swap_tom, swap_donor, swap_rec: z_team is exchanged between episodes at every step. By how much the ToM head's
    probabilities change (total variation, 0 to 1), how often the likeliest action then is the badge of the other
    episode (chance 1/K), and the largest change of a reconstruction (exactly 0 in "tom").
"""
import contextlib
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer_marl as M  # noqa: E402
from probe import probe, regress  # noqa: E402

PLAYED, EPISODES = 200, 600  # for the return, for probes and swaps


@torch.no_grad()
def play(agent: M.SocialDreamer) -> dict[str, torch.Tensor]:
    """What EPISODES episodes were like to the learner: name → (T, E, …)."""
    length = json.loads(agent.args.env_kwargs).get("length", 10)
    table = M.Table(agent, EPISODES, purpose="probe")
    seeds = M.derive_seeds(agent.args.seed, "probe", count=EPISODES)
    first = np.ones(EPISODES, bool)
    steps = []
    with contextlib.closing(M.make_vector_env(agent.args, EPISODES, "", seeds)) as envs:
        obs, _ = envs.reset(seed=seeds)
        for _ in range(length):
            joint, _ = table.act(obs, first)
            seen = {name: x for name, x in table.state.items() if name.startswith("obs/")}
            steps.append({name: torch.as_tensor(x) for name, x in seen.items()}
                         | {name: table.state[name] for name in ("deter", "stoch")})
            obs, *_ = envs.step(joint)
            first = np.zeros(EPISODES, bool)
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def probes(agent: M.SocialDreamer, played: dict[str, torch.Tensor]) -> dict[str, float]:
    """Accuracies of linear classifiers of the badge and of the signs in the crowd."""
    env = agent.wm.size.latents - agent.args.team_latents
    parts = {"z_env": played["stoch"][..., :env, :].flatten(2),
             "z_team": played["stoch"][..., env:, :].flatten(2), "h": played["deter"]}
    found = {f"badge_in_{part}": probe(x, played["obs/badge"][..., 0]) for part, x in parts.items()}
    if "obs/crowd" in played:
        signs = torch.sign(played["obs/crowd"])
        right = {part: regress(x, signs) * signs[:, signs.shape[1] // 2 :] > 0 for part, x in parts.items()}
        found |= {f"crowd_in_{part}": float(x.double().mean()) for part, x in right.items()}
    return found


@torch.no_grad()
def swap(agent: M.SocialDreamer, played: dict[str, torch.Tensor]) -> dict[str, float]:
    """What z_team of the next episode, put in place of the own one, changes."""
    own = {name: played[name] for name in ("deter", "stoch")}
    stoch = torch.where(agent.wm.team > 0, own["stoch"].roll(1, dims=1), own["stoch"])
    other = own | {"stoch": stoch}
    before, after = (M.expected(agent.wm.teammates(state))[..., 0, :] for state in (own, other))
    donor = played["obs/badge"][..., 0].roll(1, dims=1)
    recons = zip(agent.wm.decode(own).values(), agent.wm.decode(other).values())
    obs = {name[4:]: x for name, x in played.items() if name.startswith("obs/")}
    return {"rec": float(agent.wm.reconstruction(own, {"obs": obs})["rec"].mean()),
            "swap_tom": float((after - before).abs().sum(-1).mean() / 2),
            "swap_donor": float((after.argmax(-1) == donor).float().mean()),
            "swap_rec": max(float((x - y).abs().max()) for x, y in recons)}


def line(run: str) -> dict[str, str]:
    """The columns of a run."""
    args = M.parse_args(["--evaluate", run, "--no-cuda", "--no-compile"], M.SocialArgs)
    observations, actions, seats, _ = M.seat_spaces(args)
    agent = M.SocialDreamer(observations, actions, args, seats)
    saved = M.restore(agent, run)
    result = M.evaluate(agent, args, PLAYED, purpose="badge")
    with agent.evaluating():
        played = play(agent)
        found = swap(agent, played) | probes(agent, played)
    arm = args.teammate_model + "+stop-grad" * args.tom_stop_grad
    numbers = {"return": np.mean(result["returns"]), "error": np.std(result["returns"]) / PLAYED**0.5,
               **{name: result["tom"][name] for name in ("cross_entropy", "skill")}, **found}
    return {"run": Path(run).name, "arm": arm, "seed": args.seed, "rec_scale": args.rec_scale,
            "tom_scale": args.tom_scale, "crowd": args.env_arguments().get("crowd", 96),
            "updates": saved["updates"]} | {name: f"{x:.4g}" for name, x in numbers.items()}


def draw_map(source: str, target: str) -> None:
    """Mean returns of "merged" and "tom" with the usual crowd over rec_scale and tom_scale, each in the place of its
    values, and the line above which "merged" should lose the badge."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells: dict[str, dict[tuple[float, float], list[float]]] = {arm: defaultdict(list) for arm in ("merged", "tom")}
    for row in csv.DictReader(Path(source).open()):
        if row["arm"] in cells and row["crowd"] == "96":
            cells[row["arm"]][float(row["tom_scale"]), float(row["rec_scale"])].append(float(row["return"]))
    if not all(cells.values()):
        sys.exit(f"{source} holds no runs of merged and tom with a crowd of 96: nothing to draw")
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.5), sharex=True, sharey=True, layout="constrained")
    for axes, (arm, found) in zip(panels, cells.items()):
        tom, rec = np.array(list(found)).T
        means = [np.mean(returns) for returns in found.values()]
        points = axes.scatter(tom, rec, c=means, s=900, marker="s", vmin=2.5, vmax=7.75)
        for x, y, mean in zip(tom, rec, means):
            axes.annotate(f"{mean:.1f}", (x, y), ha="center", va="center", color="tab:red")
        scale = np.geomspace(tom.min() / 2, tom.max() * 2)
        axes.plot(scale, 0.060 * scale + 0.023, "k--", label="above it merged should lose the badge")
        axes.set(xscale="log", yscale="log", xlabel="tom_scale", title=f"return of {arm}")
    panels[0].set(ylabel="rec_scale")
    panels[0].margins(0.2)
    panels[1].legend(loc="upper left")
    figure.colorbar(points, label="return: blind 2.5, ideal 7.75")
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--map"]:
        draw_map(*sys.argv[2:])
    else:
        lines = [line(run) for run in sys.argv[1:]]
        names = dict.fromkeys(name for row in lines for name in row)  # those of all runs, in order
        writer = csv.DictWriter(sys.stdout, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
