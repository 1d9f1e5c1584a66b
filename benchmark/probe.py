"""What a trained agent's latents know of its partner in HiddenMatch: python benchmark/probe.py runs/RUN [runs/RUN …]

Probe: a ridge regression reads the partner's favourite from z_env, z_team or h, fitted on half of the episodes and
tested on the other half, steps 5 to 9. Open loop: three actions of the partner are seen; from the state then reached,
the model dreams on with its ego's real actions and sampled teammates, and the probabilities of 16 dreams are averaged;
the cross-entropy to what the partner really did k steps later, beside that of an ideal observer of the same three
actions.
"""
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer_marl as M  # noqa: E402

EPISODES, SEEN, FORESEEN, DREAMS = 600, 3, 7, 16


@torch.no_grad()
def play(agent: M.SocialDreamer) -> dict[str, torch.Tensor]:
    """What happened in EPISODES episodes: name → (T, E, …)."""
    table, steps, first = M.Table(agent, EPISODES, purpose="probe"), [], np.ones(EPISODES, bool)
    seeds, episode = M.derive_seeds(agent.args.seed, "probe", count=EPISODES), np.arange(EPISODES)
    with contextlib.closing(M.make_vector_env(agent.args, EPISODES, "", seeds)) as envs:
        obs, _ = envs.reset(seed=seeds)
        for _ in range(SEEN + FORESEEN):
            joint, rows = table.act(obs, first)
            mate = 1 - obs["learner"]
            steps.append({"deter": table.state["deter"], "stoch": table.state["stoch"],
                          "own": table.state["action"], "mate": torch.as_tensor(rows["teammates"])[:, 0],
                          "type": torch.as_tensor(obs["script"][episode, mate]),
                          "bayes": torch.as_tensor(obs["bayes"][episode, mate])})
            obs, *_ = envs.step(joint)
            first = np.zeros(EPISODES, bool)
    return {k: torch.stack([step[k] for step in steps]) for k in steps[0]}


def regress(x: torch.Tensor, targets: torch.Tensor, ridge: float = 10.0) -> torch.Tensor:
    """What a ridge regression of targets (T, E, k) on features (T, E, n), fitted on the first half of the episodes,
    says of the second half (T, E/2, k)."""
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1).double()
    half = x.shape[1] // 2
    a, b = x[:, :half].flatten(0, 1), targets[:, :half].flatten(0, 1).double()
    return x[:, half:] @ torch.linalg.solve(a.T @ a + ridge * torch.eye(a.shape[1]), a.T @ b)


def probe(x: torch.Tensor, types: torch.Tensor) -> float:
    """Accuracy of a linear classifier of (T, E) types from (T, E, n) features, on the second half of the episodes."""
    guess = regress(x, torch.nn.functional.one_hot(types)).argmax(-1)
    return float((guess == types[:, types.shape[1] // 2 :]).double().mean())


@torch.no_grad()
def open_loop(agent: M.SocialDreamer, played: dict[str, torch.Tensor]) -> list[tuple[int, float, float]]:
    """(k, cross-entropy, that of the ideal observer), nats a step."""
    rng, out = torch.Generator().manual_seed(0), []
    state = {k: played[k][SEEN].repeat_interleave(DREAMS, 0) for k in ("deter", "stoch")}
    for k in range(FORESEEN):
        policy = agent.wm.teammates(state)  # (E · DREAMS, 1, A)
        chances = M.expected(policy)[:, 0].unflatten(0, (EPISODES, DREAMS)).mean(1)
        real = played["mate"][SEEN + k]
        out.append((k, *(float(-(p * real).sum(-1).log().mean()) for p in (chances, played["bayes"][SEEN]))))
        n = len(state["deter"])
        guess, own = policy.sample(torch.rand(n, 1, 1, generator=rng)), played["own"][SEEN + k]
        action = agent.wm.rssm.embed(agent.wm.joint(own.repeat_interleave(DREAMS, 0), guess))
        state = agent.wm.rssm.img_step(state, action, torch.rand(n, agent.wm.size.latents, 1, generator=rng))
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in sys.argv[1:]:
        args = M.parse_args(["--evaluate", run, "--no-cuda", "--no-compile"], M.SocialArgs)
        observations, actions, seats, _ = M.seat_spaces(args)
        agent = M.SocialDreamer(observations, actions, args, seats)
        M.restore(agent, run)
        played, env = play(agent), agent.wm.size.latents - args.team_latents
        late = {k: x[5:] for k, x in played.items()}
        parts = {"z_env": late["stoch"][..., :env, :].flatten(2), "z_team": late["stoch"][..., env:, :].flatten(2),
                 "h": late["deter"]}
        result = dict(run=Path(run).name, arm=args.teammate_model, env_kwargs=args.env_kwargs, seed=args.seed,
                      probe={k: probe(x, late["type"]) for k, x in parts.items()},
                      open_loop=open_loop(agent, played))
        print(json.dumps(result), flush=True)
