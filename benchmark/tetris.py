"""What a saved Tetris agent plays, beside random play, and how far its model foresees the board.

    python benchmark/tetris.py runs/RUN                        # writes RUN/tetris.csv, .json, .png
    python benchmark/tetris.py runs/RUN --play-episodes 100 --sequences 512

Play: pieces and lines of `play_episodes` episodes each, as mean ± standard error. The agent samples
its actions, as in training; random play draws from the allowed placements, or presses every button
with probability ½.

Open loop: the agent plays. Its model sees five steps of a sequence, and dreams on with the actions
that were really taken. Counted are the board's 200 cells k steps later to which it gives the right
value, the likelier of full and empty; beside them those of a board that stays as last seen, and
of the same model that goes on seeing. Most cells are empty, so all three are near one; "changed"
counts only cells that differ from the board last seen. Sequences in which an episode ends within
the dream are left out.
"""
import contextlib
import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "variants")]
import dreamer
import masked

CONTEXT, HORIZON = 5, 15

@dataclasses.dataclass
class Options:
    run: tyro.conf.Positional[str]  # folder of a run of games.tetris
    play_episodes: int = 50  # episodes of the agent, and of random play
    sequences: int = 256  # sequences that the model continues
    random: bool = True  # play randomly too

def load(run: str) -> dreamer.Dreamer:
    """The agent of a saved run: a masked one where its observations have a mask."""
    saved = dreamer.load_file(run)["args"]
    variant = "TetrisPlacements" in saved["env_id"]
    args_class, agent_class = ((masked.Args, masked.Masked) if variant
                               else (dreamer.Args, dreamer.Dreamer))
    args = args_class(**saved | dict(cuda=False, compile=False))
    env = dreamer.make_env(args, 0, False, "")()
    agent = agent_class(env.observation_space, env.action_space, args)
    dreamer.restore(agent, run)
    return agent

def random_action(obs: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """One action for each of N observations."""
    if "action_mask" in obs:  # of the placements
        return np.array([rng.choice(np.flatnonzero(row)) for row in obs["action_mask"]])
    return rng.integers(0, 2, (len(obs["board"]), 8)).astype(np.int8)

def play(agent: dreamer.Dreamer, episodes: int, rng: np.random.Generator | None = None):
    """Plays the first episode of as many environments, with the agent or, given `rng`, at random.
    Returns name → (episodes,): "pieces", "lines", "return"."""
    args = agent.args
    seeds = dreamer.derive_seeds(args.seed, "tetris", count=episodes)
    results = {name: np.zeros(episodes) for name in ("pieces", "lines", "return")}
    running = np.ones(episodes, bool)
    done = ~running
    is_first = ~done
    state = None
    with contextlib.closing(dreamer.make_vector_env(args, episodes, "", seeds)) as envs, \
            agent.evaluating():
        obs, _ = envs.reset(seed=seeds)
        while running.any():
            if rng is None:
                action, state = agent.act(obs, state, is_first)
            else:
                action = random_action(obs, rng)
            obs, reward, terminated, truncated, info = envs.step(action)
            results["return"] += np.where(running, reward, 0)
            for name in ("pieces", "lines"):
                results[name] = np.where(running, info[name], results[name])
            is_first = done
            done = terminated | truncated
            running &= ~done
    return results

def collect(agent: dreamer.Dreamer, sequences: int, envs_count: int = 32) -> dreamer.Tensors:
    """A batch of `sequences` windows of CONTEXT + HORIZON steps, none of which crosses an episode's
    end after its context, as ReplayBuffer.sample gives it."""
    args = dataclasses.replace(agent.args, num_envs=envs_count)
    seeds = dreamer.derive_seeds(args.seed, "open loop", count=envs_count)
    no = np.zeros(envs_count, bool)
    arrived = {"reward": np.zeros(envs_count), "is_first": ~no, "is_last": no, "is_terminal": no}
    length = CONTEXT + HORIZON + 1
    rows, kept, found = [], [], 0
    state = None
    with contextlib.closing(dreamer.make_vector_env(args, envs_count, "", seeds)) as envs:
        obs, _ = envs.reset(seed=seeds)
        for _ in range(20_000):
            action, state = agent.act(obs, state, arrived["is_first"])
            row = {name: torch.as_tensor(x) for name, x in (arrived | agent.row(state)).items()}
            rows.append(row)
            if len(rows) == length:
                window = {name: torch.stack([r[name] for r in rows], 1) for name in rows[0]}
                whole = ~window["is_first"][:, CONTEXT + 1 :].any(1)
                kept.append({name: x[whole] for name, x in window.items()})
                found += int(whole.sum())
                rows = rows[length // 2 :]  # windows overlap by half
            if found >= sequences:
                break
            obs, reward, terminated, truncated, _ = envs.step(action)
            arrived = {"reward": reward, "is_first": arrived["is_last"],
                       "is_last": terminated | truncated, "is_terminal": terminated}
    if not found:
        raise dreamer.InputError(f"no episode of this agent lasts {length} steps")
    return {name: torch.cat([x[name] for x in kept])[:sequences] for name in kept[0]}

@torch.no_grad()
def open_loop(agent: dreamer.Dreamer, batch: dreamer.Tensors) -> list[dict[str, float]]:
    """One row for every k from 1 to HORIZON: fractions of right cells."""
    data = agent.training_data(batch)
    n = len(data["reward"])
    noise = agent.uniform(agent.act_rng, n, CONTEXT + HORIZON, agent.wm.rssm.stoch_shape[0], 1)
    boards = {"model": agent.wm.open_loop(data, CONTEXT, noise),
              "seeing": agent.wm.decode(agent.wm.observe(data, noise))}
    boards = {name: x["board"].unflatten(-1, (200, 2)).argmax(-1) for name, x in boards.items()}
    true = data["obs"]["board"].long()  # (B, T, 200)
    boards["no change"] = true[:, CONTEXT - 1 : CONTEXT].expand_as(true)
    rows = []
    for k in range(1, HORIZON + 1):
        t = CONTEXT - 1 + k
        changed = true[:, t] != true[:, CONTEXT - 1]
        row = {"k": k, "sequences": n, "changed cells": float(changed.float().mean())}
        for name, board in boards.items():
            right = board[:, t] == true[:, t]
            row[name] = float(right.float().mean())
            row[f"{name}, changed"] = float(right[changed].float().mean())
        rows.append(row)
    return rows

def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, suffix, title in zip(axes, ("", ", changed"), ("all cells", "cells that changed")):
        for name in ("seeing", "model", "no change"):
            axis.plot([row["k"] for row in rows], [row[name + suffix] for row in rows], label=name)
        axis.set(title=title, xlabel="steps dreamed", ylabel="fraction of cells right")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)

def main(options: Options) -> None:
    torch.set_num_threads(1)
    folder = Path(options.run)
    agent = load(options.run)
    players = {"agent": None} | ({"random": np.random.default_rng(0)} if options.random else {})
    summary = {}
    for player, rng in players.items():
        results = play(agent, options.play_episodes, rng)
        for name, x in results.items():
            error = x.std(ddof=1) / len(x) ** 0.5
            summary[f"{player} {name}"] = {"mean": x.mean(), "standard error": error}
            print(f"{player}: {x.mean():.2f} ± {error:.2f} {name} per episode, {len(x)} episodes")
    rows = open_loop(agent, collect(agent, options.sequences))
    with open(folder / "tetris.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        if row["k"] in (1, 5, 15):
            print(", ".join(f"{name} {x:.4g}" for name, x in row.items()))
    (folder / "tetris.json").write_text(json.dumps(summary, indent=2))
    plot(rows, folder / "tetris.png")

if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
    except dreamer.InputError as error:
        sys.exit(f"error: {error}")
