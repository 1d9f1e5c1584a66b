"""Dreaming of Others in one file: DreamerV3 whose world model knows that there are other agents in it.

    python dreamer_marl.py                                        # HiddenMatch: find out what your partner likes
    python dreamer_marl.py --teammate-model none                  # plain Dreamer, to which the partner is weather
    python dreamer_marl.py --env-id mpe2.simple_spread_v3         # self-play in any PettingZoo ParallelEnv
    python dreamer_marl.py --env-id overcooked/cramped_room --partners scripted --scripted greedy
    python dreamer_marl.py --evaluate runs/hidden_match__dreamer_marl__1__…   # play a saved agent, with each partner
    python dreamer_marl.py --resume   runs/hidden_match__dreamer_marl__1__…   # go on where a run stopped

The algorithm follows "Dreaming of Others" (arXiv 2605.31361), a paper of a method without experiments or code, on top
of dreamer.py. Both files stand alone; what is the same in both is named in SHARED and is the same letter for letter,
so `diff dreamer.py dreamer_marl.py` shows the method, and `# MARL` marks where it enters. What is new:

  1. z = [z_env, z_team], with a prior and a posterior each; the KL is the sum of both, with free nats for each. The
     decoder sees (h, z_env), so that the factors mean what they say; reward, continue, actor and critic see all.
  2. Dynamics of joint actions: h_t = f(h_{t-1}, z_{t-1}, a⁰_{t-1}, a¹_{t-1}, …).
  3. A Theory-of-Mind (ToM) head π̂ʲ(a | h_t, z_t^team, j) learns by −log π̂ʲ(a_tʲ) what teammate j does at the SAME
     step.
  4. Social imagination: in dreams the actor acts for ego, the ToM head for all others.

Symbols   B batch · T time · H imagination horizon · N dreams · D deter size · S latents of C classes · A action size
          E environments · K seats · streams: rows of the learning seats, E·K with self-play, else E
          U units · G = 8 blocks       h deter · z stoch · feat = [h, z] · sg(·) stop-gradient

Time      Row t of a stream holds what *arrived* at t and the actions, ego's and the others', chosen after seeing it:

            row                t-1                 t                  t+1
            arrived      x, r, flags ──┐     x, r, flags ──┐     x, r, flags      is_first: x begins an episode, r = 0
            chosen         a⁰, aʲ ─────┼──▶    a⁰, aʲ ─────┼──▶    a⁰, aʲ         is_last: x ends one; terminal or not
            model        h, z ─────────┴──▶  h, z ─────────┴──▶  h, z
            ToM           ↳ π̂(aʲ_{t-1})      ↳ π̂(aʲ_t)          ↳ π̂(aʲ_{t+1})     an agent that is away is masked

Deviations from the paper: it decodes the teammate from z_team alone and dreams z_team in place of actions; here the ToM
head also sees h, which remembers what teammates did, and dreams hold sampled actions. Learning sees the teammates'
actions; acting sees those of the last step, or with --no-observe-teammates the ToM head's guesses for them. Every seat
plays with the same network, which is told the number of its seat. Deviations from DreamerV3 are those of dreamer.py.
"""
import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import gc
import importlib
import io
import json
import math
import os
import platform
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils._pytree import tree_flatten, tree_unflatten

# MARL: what is the same, letter for letter and in the same order, in dreamer.py; test_dreamer.py compares the source
SHARED = (
    "InputError", "Size", "DEPTHS", "SIZES", "TREES", "CHOICES", "explain_failure", "leaves", "classes_of", "Leaf",
    "ObservationCodec", "ActionCodec", "free_bytes", "ReplayBuffer", "symlog", "symexp", "SymexpTwoHot", "OneHot",
    "Normal", "Joint", "init_weight", "RMSNorm", "Linear", "BlockLinear", "Layer", "MLP", "Conv", "upsample", "Encoder",
    "Decoder", "RSSM", "features", "WorldModel.encode", "Actor", "Critic", "lambda_return", "ReturnNormalizer",
    "LaProp", "average_over_processes", "Captured", "Dreamer.compiled", "Dreamer.noise", "Dreamer.upload",
    "Dreamer.learn", "Dreamer.loss", "Dreamer.replay_value_loss", "Dreamer.get_extra_state", "Dreamer.set_extra_state",
    "leave_no_trace", "draw_dreams", "load_file", "restore")

class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what it was and what to do instead."""

# ------------------------------------------------------------------------------------------------- arguments and sizes

class Size(NamedTuple):
    """Widths of the networks; one dial, `--size`, turns them all."""
    deter: int  # D, recurrent state
    hidden: int  # width of the layers inside the RSSM
    classes: int  # C, classes of each latent
    depth: int  # channels of the CNN are multiples of it
    units: int  # U, width of the MLPs
    latents: int = 32  # S
    blocks: int = 8  # G

DEPTHS = {"1m": 4, "12m": 16, "25m": 24, "50m": 32, "100m": 48, "200m": 64, "400m": 96}
SIZES = {name: Size(128 * depth, 16 * depth, depth, depth, 16 * depth) for name, depth in DEPTHS.items()}

# MARL: values that a suite sets when its flags are not given, all of them ours: the method paper has no experiments.
MINUTES = dict(  # games of ten steps: minutes on two CPU cores
    size="1m", num_envs=8, vectorization="sync", total_timesteps=20_000, partners="scripted",
    batch_size=16, batch_length=10, train_ratio=12, imagination_horizon=5,
    learning_rate=1e-3, warmup=100, anneal_lr=True, gamma=0.9, ent_coef=0.01, log_every=1_000,
    video_every=10_000, eval_episodes=200)
THOUSANDS = dict(  # of updates, not millions: what these values are for is told at classic_control in dreamer.py
    size="1m", num_envs=8, batch_size=16, learning_rate=1e-3, warmup=100, anneal_lr=True, tau=0.1, contdisc=False,
    ent_coef=0.01)
PRESETS: dict[str, dict[str, Any]] = {
    "hidden_match": MINUTES,
    "prisoners_dilemma": MINUTES | dict(imagination_horizon=10, gamma=0.98),
    "mpe": THOUSANDS | dict(train_ratio=20, total_timesteps=100_000, batch_length=25, imagination_horizon=10,
                            gamma=0.95, rec_scale=100.0, eval_episodes=50),
    "overcooked": THOUSANDS | dict(train_ratio=32, total_timesteps=500_000, batch_length=32, gamma=0.99,
                                   rec_scale=10.0, shaping_steps=250_000, eval_episodes=8),
    "hockey": dict(size="1m", num_envs=8, train_ratio=64, total_timesteps=1_000_000, partners="pool", batch_size=16,
                   batch_length=32, learning_rate=3e-4, warmup=200, gamma=0.99, ent_coef=3e-3, pool_weighting="hard",
                   pool_every=20_000, shaping_steps=500_000, eval_episodes=20),
    "lbf": dict(size="1m", num_envs=8, train_ratio=64, total_timesteps=200_000, batch_size=16, batch_length=25,
                learning_rate=3e-4, warmup=200, gamma=0.98, ent_coef=3e-3, eval_episodes=50),
    "other": dict(size="12m", num_envs=4, train_ratio=128, total_timesteps=500_000),
}

def suite_of(env_id: str) -> str:  # MARL: so many families as the adapters below know
    """Name of the preset for an environment id."""
    beginnings = {"hidden_match": "hidden_match", "prisoners_dilemma": "prisoners_dilemma", "mpe2.": "mpe",
                  "overcooked/": "overcooked", "hockey": "hockey", "lbf/": "lbf", "": "other"}
    return next(suite for beginning, suite in beginnings.items() if env_id.startswith(beginning))

@dataclasses.dataclass
class Args:
    """The comment at a field is its line in --help."""
    exp_name: str = "dreamer_marl"  # name of the experiment, part of the run's name
    seed: int = 1  # seed of the environments, the networks, the replay and the noise
    cuda: bool = True  # use the GPU if there is one
    # number format of updates (parameters and losses stay float32); auto: bfloat16 on CUDA, float32 on CPU
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # CPU threads of PyTorch; 0 takes half of the cores, since with all of them any other process stalls every layer
    threads: int = 0
    # fuse operations with torch.compile, which takes a minute at first; by default where there is a GPU
    compile: bool = dataclasses.field(default_factory=torch.cuda.is_available)
    cuda_graph: bool = True  # on CUDA, record update and act once and replay them as one launch
    # where the replay lies; auto: on the GPU if it takes less than half of what is free there
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "dreamer"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    # record episodes 0, 1, 8, 27, …, 1000, 2000, … of the first environment as videos/{run_name}/*.mp4 (needs moviepy)
    capture_video: bool = False
    video_every: int = 10_000  # steps between pictures of what the model dreams against what happened; 0: none
    log_every: int = 500  # steps between records of losses and speeds
    save_model: bool = True  # save agent.pt and replay.pt in the run's folder at the end and on interruption
    checkpoint_every: int = 0  # steps between further saves during the run; 0 saves only at the end
    resume: str = ""  # folder of a run to go on with; flags given beside it override the saved ones
    evaluate: str = ""  # folder of a run whose saved agent is played for eval_episodes and not trained
    eval_episodes: int = 10  # episodes of an evaluation
    eval_every: int = 0  # steps between evaluations during the run; 0 evaluates only at the end
    deterministic: bool = False  # evaluate with the most likely latents and actions; the reference samples both

    # MARL: the game

    # hidden_match, prisoners_dilemma, overcooked/<layout>, lbf/<id>, hockey, or the module of a PettingZoo
    # ParallelEnv, such as mpe2.simple_spread_v3
    env_id: str = "hidden_match"
    env_kwargs: str = "{}"  # JSON object of arguments for the environment, such as '{"continuous_actions": true}'
    epsilon: float = 0.3  # hidden_match: how often the partner plays anything at all instead of its favourite
    q: float = 0.0  # hidden_match and prisoners_dilemma: how often the observation shows the partner's last action
    overcooked_obs: Literal["featurized", "lossless"] = "featurized"  # overcooked: encoding of the observation
    # overcooked and hockey: steps over which the shaping part of the reward fades to nothing; 0 leaves it out
    shaping_steps: int = 0

    # MARL: the method, and whom it meets

    # who plays the other seats. self: the policy itself, and all seats learn; pool: half of the episodes itself,
    # half past selves; scripted: policies that come with the environment. The learner sits in a random seat
    partners: Literal["self", "pool", "scripted"] = "self"
    # names of the scripted partners to learn with; none: all that are not held out, without HiddenMatch's "mixed"
    scripted: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()  # names of further scripted partners that are met only in evaluations
    pool_size: int = 20  # past selves that the pool holds
    pool_every: int = 5_000  # steps between additions to the pool; 0: none after the first
    # which past selves are met; x is the rate of victories over one. hard: (1 - x)^2, even: x(1 - x)
    pool_weighting: Literal["uniform", "hard", "even"] = "uniform"
    pool_checkpoints: tuple[str, ...] = ()  # folders of further runs, of other seeds, whose agents join the pool
    # tom: the method; merged: z_team is part of one z that decoder and ToM head both read; joint: joint actions,
    # but teammates are imagined by how often they play what; none: plain Dreamer, teammates are part of the world
    teammate_model: Literal["tom", "merged", "joint", "none"] = "tom"
    team_latents: int = 8  # latents of z_team, of the model's 32
    tom_scale: float = 1.0  # weight of the loss of the ToM head
    tom_stop_grad: bool = False  # keep that loss from reaching h and z_team
    observe_teammates: bool = True  # act on the teammates' last actions; if not, on what the ToM head guesses for them
    oracle: bool = False  # add the hidden name of the scripted partner to the observation, as an upper bound

    image_size: int = 64  # side in pixels to which images are resized: a multiple of 16 from 48 to 256
    num_envs: int = 16  # environments stepped together
    # step environments in this process or in one process each; auto: async if a step takes over a millisecond
    vectorization: Literal["auto", "sync", "async"] = "auto"
    total_timesteps: int = 1_000_000  # environment steps of the run, over all environments

    # size of the model, named by its parameters
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "12m"
    buffer_size: int = 5_000_000  # steps that the replay holds over all environments (it takes memory as it fills)
    batch_size: int = 16  # sequences in a batch
    batch_length: int = 64  # steps in a sequence
    # steps replayed for every environment step; updates per step are train_ratio / (batch_size * batch_length)
    train_ratio: float = 32.0
    learning_rate: float = 4e-5  # step size of LaProp
    warmup: int = 1000  # updates over which the step size rises linearly from zero
    contdisc: bool = True  # learn the discount as part of the continue prediction; else it multiplies the prediction
    anneal_lr: bool = False  # lower the step size linearly to zero over total_timesteps, which the reference does not
    agc: float = 0.3  # adaptive gradient clipping: a tensor's gradient may have this fraction of the tensor's own norm
    imagination_horizon: int = 15  # steps of a dream
    imag_last: int = 0  # dreams start from so many last steps of every sequence; 0: from all
    gamma: float = 1 - 1 / 333  # discount of what comes one step later
    return_lambda: float = 0.95  # lambda of the returns: 0 trusts the critic after one step, 1 only at the horizon
    ent_coef: float = 3e-4  # weight of the policy's entropy
    tau: float = 0.02  # fraction by which the slow critic follows the critic after every update
    # nats of KL, summed over the latents, below which dynamics and representation are not pushed
    free_nats: float = 1.0
    dyn_scale: float = 1.0  # weight of the loss that moves the prior to the posterior
    rep_scale: float = 0.1  # weight of the loss that moves the posterior to the prior
    rec_scale: float = 1.0  # weight of the reconstruction loss
    repval_scale: float = 0.3  # weight of the critic's loss on replayed sequences

    @classmethod
    def preset(cls, env_id: str, **overrides: Any) -> "Args":  # MARL: frames are an environment's business here
        """Arguments for an environment id: the reference's, its suite's on top, `overrides` on top of both."""
        return cls(**{"env_id": env_id, **PRESETS[suite_of(env_id)], **overrides})

    def check(self) -> None:
        """Raises InputError for values that no run could use."""
        if self.size not in SIZES:
            raise InputError(f"size {self.size!r} does not exist: choose one of {', '.join(SIZES)}")
        if self.image_size % 16 or not 48 <= self.image_size <= 256:
            raise InputError(f"image_size {self.image_size} does not fit the CNN: take a multiple of 16 from 48 to 256")
        for names, least, most in (
                ("num_envs total_timesteps batch_size imagination_horizon eval_episodes log_every", 1, 1e12),
                ("batch_length", 2, 1e12),  # the replay loss needs a next step
                ("threads warmup video_every eval_every checkpoint_every train_ratio learning_rate ent_coef free_nats "
                 "dyn_scale rep_scale rec_scale repval_scale tom_scale pool_every shaping_steps", 0, 1e12),
                ("agc", 1e-6, 1e12), ("gamma tau", 1e-6, 1), ("return_lambda", 0, 1), ("seed", 0, 2**31)):
            for name in names.split():
                if not least <= getattr(self, name) <= most:  # so is NaN, which is in no range
                    raise InputError(f"{name} {getattr(self, name)} cannot be used: take {least:g} to {most:g}")
        if self.resume and self.evaluate:
            raise InputError(f"resume {self.resume!r} and evaluate {self.evaluate!r} exclude each other: take one")
        if not 0 < self.team_latents < SIZES[self.size].latents:
            raise InputError(f"team_latents {self.team_latents} leaves nothing for a group: take a number from 1 to "
                             f"{SIZES[self.size].latents - 1}")
        if self.pool_size < 3:
            raise InputError(f"pool_size {self.pool_size} must be at least 3: the oldest and the newest always stay")
        if (self.scripted or self.held_out or self.oracle) and self.partners != "scripted":
            raise InputError(f"partners {self.partners!r} have no names: use scripted, held_out and oracle only with "
                             "--partners scripted")
        if self.pool_checkpoints and self.partners != "pool":
            raise InputError(f"partners {self.partners!r} take no pool_checkpoints: add --partners pool")
        if self.imag_last < 0 or self.imag_last == 1:
            raise InputError(f"imag_last {self.imag_last} must be 0 or at least 2: the replay loss needs a next step")
        if self.buffer_device == "cuda" and not (self.evaluate or self.cuda and torch.cuda.is_available()):
            raise InputError("buffer_device 'cuda' needs a GPU that the run may use: take auto or cpu")
        # a window of every environment, and as much as a batch before the first update; rows are divided evenly
        needed = max((self.batch_length + 1) * self.num_envs, self.batch_size * self.batch_length + self.num_envs)
        if self.buffer_size < (needed := needed * int(os.environ.get("WORLD_SIZE", 1))):
            raise InputError(f"batch_length {self.batch_length} and batch_size {self.batch_size} need a longer buffer: "
                             f"raise buffer_size {self.buffer_size} to {needed} or more")

# --------------------------------------------------------------------------------------------------------- environments

TREES = gym.spaces.Dict, gym.spaces.Tuple
CHOICES = gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary

@contextlib.contextmanager
def explain_failure(name: str, packages: str):
    """Turns a missing package into an InputError with the line that installs it, an unknown id `name` into another."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{name} cannot be imported ({error}): pip install {packages}") from None
    except gym.error.Error as error:  # where a package of Gymnasium's own is missing, the message says how to get it
        raise InputError(f"env_id {name!r} cannot be made: {str(error).strip().rstrip('.')}") from None

# MARL: an environment is a PettingZoo ParallelEnv: possible_agents, agents, observation_space(agent),
# action_space(agent), reset(seed, options) and step({agent: action}). Those below may know more, all of it optional:
#   scripts                names of policies that come with the environment
#   play(agent, script)    the action that such a policy takes now, for `agent`
#   bayes(agent, scripts)  probabilities of the next action of `agent` to an ideal observer of all actions so far who
#                          knows only that it plays one of `scripts`, or None

class RepeatedGame:
    """Two players act at the same time for `length` steps. An observation is the other's last action, shown with
    probability `q`, or one more number that says nothing."""
    possible_agents, length, actions, scripts = ("player_0", "player_1"), 10, 0, ()
    metadata, render_mode = {}, None

    def __init__(self, q: float = 0.0):
        if not 0 <= q <= 1:
            raise InputError(f"q {q} is no probability: take a number from 0 to 1")
        self.q, self.rng = q, np.random.default_rng()

    def observation_space(self, agent: str) -> gym.Space:
        return gym.spaces.Discrete(self.actions + 1)

    def action_space(self, agent: str) -> gym.Space:
        return gym.spaces.Discrete(self.actions)

    def reset(self, seed: int | None = None, options: dict | None = None):
        self.rng = self.rng if seed is None else np.random.default_rng(seed)
        self.agents, self.history = list(self.possible_agents), {agent: [] for agent in self.possible_agents}
        self.likelihood = {(agent, script): 1.0 for agent in self.possible_agents for script in self.scripts}
        return {agent: self.actions for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]):
        for agent, script in self.likelihood:
            self.likelihood[agent, script] *= float(self.probabilities(agent, script)[actions[agent]])
        for agent in self.possible_agents:
            self.history[agent].append(int(actions[agent]))
        shown = {a: self.rng.random() < self.q for a in self.possible_agents}
        obs = {a: self.history[self.other(a)][-1] if shown[a] else self.actions for a in self.possible_agents}
        over = len(self.history[self.possible_agents[0]]) == self.length
        self.agents = [] if over else list(self.possible_agents)
        last = {a: self.history[a][-1] for a in self.possible_agents}
        rewards = {a: float(self.payoff(last[a], last[self.other(a)])) for a in self.possible_agents}
        return (obs, rewards, *({a: x for a in self.possible_agents} for x in (over, False, {})))

    def other(self, agent: str) -> str:
        return self.possible_agents[agent == self.possible_agents[0]]

    def probabilities(self, agent: str, script: str) -> np.ndarray:
        """Distribution of a scripted agent's next action, given all actions so far."""
        raise NotImplementedError

    def play(self, agent: str, script: str) -> int:
        return min(int((self.probabilities(agent, script).cumsum() <= self.rng.random()).sum()), self.actions - 1)

    def bayes(self, agent: str, scripts: tuple[str, ...]) -> np.ndarray:
        belief = np.array([self.likelihood[agent, script] for script in scripts])  # all equally likely at first
        belief = belief / belief.sum() if belief.any() else np.full(len(scripts), 1 / len(scripts))
        return belief @ np.array([self.probabilities(agent, script) for script in scripts])

class HiddenMatch(RepeatedGame):
    """Both earn 1 when their actions match. Script "0" … "3": the partner's favourite action of this episode, which it
    plays except with probability `epsilon`, when it plays any. Who never sees it (q = 0) has to infer it from its
    actions. "mixed" draws one of the favourites 0 and 1 at every step: new to who learned with those four."""
    actions, scripts = 4, ("0", "1", "2", "3", "mixed")
    unusual = ("mixed",)  # not learned with unless asked for

    def __init__(self, epsilon: float = 0.3, q: float = 0.0):
        super().__init__(q)
        if not 0 <= epsilon <= 1:
            raise InputError(f"epsilon {epsilon} is no probability: take a number from 0 to 1")
        liked = {script: [0, 1] if script == "mixed" else [int(script)] for script in self.scripts}
        self.table = {script: epsilon / 4 + (1 - epsilon) * np.eye(4)[liked[script]].mean(0) for script in self.scripts}

    def payoff(self, mine: int, others: int) -> float:
        return mine == others

    def probabilities(self, agent: str, script: str) -> np.ndarray:
        return self.table[script]

class PrisonersDilemma(RepeatedGame):
    """Ten rounds of the prisoner's dilemma (0 cooperate, 1 defect) against an unknown type: always cooperates, always
    defects, tit for tat, or alternates beginning with cooperation. Oracle 30.5, ideal observer 29.25, always to defect,
    which is best for who remembers nothing, 26."""
    actions, scripts = 2, ("cooperate", "defect", "tit_for_tat", "alternate")

    def payoff(self, mine: int, others: int) -> float:
        return [[3, 0], [5, 1]][mine][others]

    def probabilities(self, agent: str, script: str) -> np.ndarray:
        t = len(self.history[agent])
        last = self.history[self.other(agent)][-1] if t else 0
        action = {"cooperate": 0, "defect": 1, "tit_for_tat": last, "alternate": t % 2}[script]
        return np.eye(2)[action]

class Shaped:
    """A game whose reward has a part that only shows the way, and fades to nothing over `shaping_steps` steps."""
    def __init__(self, shaping_steps: int):
        self.shaping_steps, self.steps = shaping_steps, 0

    def began(self, options: dict | None) -> None:
        self.steps = (options or {}).get("steps", self.steps)  # where a run that is gone on with had come to

    def fade(self) -> float:
        """Weight of that part at this step, from 1 to 0."""
        weight = max(0.0, 1 - self.steps / self.shaping_steps) if self.shaping_steps else 0.0
        self.steps += 1
        return weight

class Overcooked(Shaped):
    """Two cooks of overcooked-ai, both paid 20 for a soup delivered. Shaping pays 3 for an onion in a pot, 3 for a dish
    taken and 5 for a soup taken, to the cook who did it. The episode is truncated after 400 steps."""
    possible_agents, scripts = ("cook_0", "cook_1"), ("greedy", "stay", "random")
    metadata, render_mode = {}, None

    def __init__(self, layout: str, encoding: str = "featurized", shaping_steps: int = 0, horizon: int = 400):
        super().__init__(shaping_steps)
        np.Inf = np.inf  # the package is older than NumPy 2
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from overcooked_ai_py.agents import agent
            from overcooked_ai_py.mdp import actions, overcooked_env, overcooked_mdp
            try:
                self.mdp = overcooked_mdp.OvercookedGridworld.from_layout_name(layout)
            except FileNotFoundError:
                raise InputError(f"overcooked has no layout {layout!r}: use one such as cramped_room, coord_ring, "
                                 "asymm_advantages, forced_coord or counter_circuit") from None
            self.game = overcooked_env.OvercookedEnv.from_mdp(self.mdp, horizon=horizon, info_level=0)
        self.library, self.choices, self.encoding, self.players = agent, actions.Action.ALL_ACTIONS, encoding, {}

    def observation_space(self, agent: str) -> gym.Space:
        return gym.spaces.Box(-np.inf, np.inf, self.observe()[agent].shape, np.float32)

    def action_space(self, agent: str) -> gym.Space:
        return gym.spaces.Discrete(len(self.choices))

    def observe(self) -> dict[str, np.ndarray]:
        with contextlib.redirect_stdout(io.StringIO()):  # the planner reports on itself
            encode = getattr(self.game, f"{'featurize' if self.encoding == 'featurized' else 'lossless'}_state"
                                        f"{'_encoding' if self.encoding == 'lossless' else ''}_mdp")
            return {a: np.ravel(x).astype(np.float32) for a, x in zip(self.possible_agents, encode(self.game.state))}

    def reset(self, seed: int | None = None, options: dict | None = None):
        self.began(options)
        self.game.reset()
        self.agents, self.players = list(self.possible_agents), {}
        return self.observe(), {a: {} for a in self.agents}

    def step(self, actions: dict[str, int]):
        joint = tuple(self.choices[int(actions[a])] for a in self.possible_agents)
        _, reward, over, info = self.game.step(joint)
        self.agents = [] if over else list(self.possible_agents)
        weight, shaped = self.fade(), info["shaped_r_by_agent"]
        rewards = {a: float(reward + weight * shaped[i]) for i, a in enumerate(self.possible_agents)}
        return (self.observe(), rewards, *({a: x for a in self.possible_agents} for x in (False, over, {})))

    def play(self, agent: str, script: str) -> int:
        if agent not in self.players:
            make = {"greedy": lambda: self.library.GreedyHumanModel(self.game.mlam), "stay": self.library.StayAgent,
                    "random": lambda: self.library.RandomAgent(all_actions=True)}
            with contextlib.redirect_stdout(io.StringIO()):
                self.players[agent] = make[script]()
            self.players[agent].set_agent_index(self.possible_agents.index(agent))
            self.players[agent].set_mdp(self.mdp)
        return self.choices.index(self.players[agent].action(self.game.state)[0])

class Hockey(Shaped):
    """Air hockey of martius-lab for two, each of whom sees the field from its own side: 10 for a victory, −10 for a
    defeat. Shaping takes away something while the puck comes and one is far from it. When time is up, the game is
    truncated without a winner."""
    possible_agents, scripts = ("player_0", "player_1"), ("weak", "strong")
    metadata, render_mode = {"render_modes": ["rgb_array"], "render_fps": 50}, "rgb_array"

    def __init__(self, shaping_steps: int = 0, **kwargs: Any):
        super().__init__(shaping_steps)
        self.library = importlib.import_module("hockey.hockey_env")
        self.game, self.players = self.library.HockeyEnv(**kwargs), {}

    def observation_space(self, agent: str) -> gym.Space:
        return gym.spaces.Box(-np.inf, np.inf, self.game.observation_space.shape, np.float32)

    def action_space(self, agent: str) -> gym.Space:
        return gym.spaces.Box(-1, 1, (self.game.action_space.shape[0] // 2,), np.float32)

    def look(self, first: np.ndarray) -> dict[str, np.ndarray]:
        views = first, self.game.obs_agent_two()
        self.views = {a: np.asarray(x, np.float32) for a, x in zip(self.possible_agents, views)}
        return self.views

    def reset(self, seed: int | None = None, options: dict | None = None):
        self.began(options)
        obs, _ = self.game.reset(seed=seed)
        self.agents, self.players = list(self.possible_agents), {}
        return self.look(obs), {a: {} for a in self.agents}

    def step(self, actions: dict[str, np.ndarray]):
        obs, _, over, _, info = self.game.step(np.hstack([actions[a] for a in self.possible_agents]))
        infos, weight = (info, self.game.get_info_agent_two()), self.fade()
        self.agents = [] if over else list(self.possible_agents)
        rewards = {a: float(10 * i["winner"] * over + weight * i["reward_closeness_to_puck"])
                   for a, i in zip(self.possible_agents, infos)}
        ends = bool(over and info["winner"]), bool(over and not info["winner"]), {}
        return (self.look(obs), rewards, *({a: x for a in self.possible_agents} for x in ends))

    def play(self, agent: str, script: str) -> np.ndarray:
        if agent not in self.players:
            self.players[agent] = self.library.BasicOpponent(weak=script == "weak")
        return np.clip(self.players[agent].act(self.views[agent]), -1, 1).astype(np.float32)

    def render(self) -> np.ndarray:
        return self.game.render(mode="rgb_array")

class Foraging:
    """Level-based foraging: players gather food together. The package has a Gymnasium environment with a tuple of
    observations and a list of rewards; a player is paid its share of all the food there is, at most 1 for all."""
    metadata, render_mode = {}, None

    def __init__(self, env_id: str, **kwargs: Any):
        with explain_failure(f"lbf/{env_id}", "lbforaging==2.0.0"):
            importlib.import_module("lbforaging")
            self.game = gym.make(env_id, disable_env_checker=True, **kwargs)
        self.possible_agents = tuple(f"player_{i}" for i in range(len(self.game.action_space)))

    def observation_space(self, agent: str) -> gym.Space:
        return self.game.observation_space[self.possible_agents.index(agent)]

    def action_space(self, agent: str) -> gym.Space:
        return self.game.action_space[self.possible_agents.index(agent)]

    def by_agent(self, values: Any) -> dict[str, Any]:
        return dict(zip(self.possible_agents, values))

    def reset(self, seed: int | None = None, options: dict | None = None):
        obs, _ = self.game.reset(seed=seed)
        self.agents = list(self.possible_agents)
        return self.by_agent(obs), self.by_agent([{}] * len(obs))

    def step(self, actions: dict[str, int]):
        obs, reward, over, truncated, _ = self.game.step(tuple(int(actions[a]) for a in self.possible_agents))
        self.agents = [] if over or truncated else self.agents
        n = len(obs)
        return (self.by_agent(obs), self.by_agent(map(float, np.broadcast_to(reward, n))),
                *(self.by_agent([x] * n) for x in (bool(over), bool(truncated), {})))

def make_parallel(args: Args, render: bool = False) -> Any:
    """The ParallelEnv of args.env_id. Raises InputError for unknown ids, missing packages and unusable arguments."""
    family, _, name = args.env_id.partition("/")
    if not family:
        raise InputError(f"env_id {args.env_id!r} names no game: take hidden_match, or see --help for others")
    try:
        kwargs = json.loads(args.env_kwargs)
    except json.JSONDecodeError as error:
        raise InputError(f"env_kwargs {args.env_kwargs!r} is no JSON object ({error})") from None
    if not isinstance(kwargs, dict):
        raise InputError(f"env_kwargs {args.env_kwargs!r} is no JSON object: write it like '{{\"N\": 4}}'")
    try:
        if args.env_id == "hidden_match":
            return HiddenMatch(**{"epsilon": args.epsilon, "q": args.q} | kwargs)
        if args.env_id == "prisoners_dilemma":
            return PrisonersDilemma(**{"q": args.q} | kwargs)
        shaping = {"shaping_steps": args.shaping_steps // (args.num_envs * int(os.environ.get("WORLD_SIZE", 1)))}
        if family == "overcooked":
            with explain_failure(args.env_id, "overcooked-ai==1.1.0 scipy"):
                return Overcooked(name, **{"encoding": args.overcooked_obs} | shaping | kwargs)
        if family == "hockey":
            with explain_failure(args.env_id, "Box2D==2.3.10 pygame, and put the folder of a clone of "
                                              "github.com/martius-lab/hockey-env on PYTHONPATH"):
                return Hockey(**shaping | kwargs)
        if family == "lbf":
            return Foraging(name, **kwargs)
        hints = {"mpe": "mpe2==1.1.1, or correct the name", "simple_": "mpe2==1.1.1, and write mpe2.simple_…",
                 "pettingzoo.": '"pettingzoo[butterfly,sisl]"', "": "its package, or correct the name"}
        packages = next(hint for part, hint in hints.items() if part in family)
        with explain_failure(args.env_id, packages):
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame must not look for a display
            module = importlib.import_module(args.env_id)
        if not hasattr(module, "parallel_env"):
            raise InputError(f"env_id {args.env_id!r} has no parallel_env: give the module of a PettingZoo ParallelEnv")
        return module.parallel_env(**({"render_mode": "rgb_array"} if render else {}) | kwargs)
    except TypeError as error:
        raise InputError(f"env_kwargs {args.env_kwargs} do not suit {args.env_id}: {error}") from None

def merge(name: str, spaces: list[gym.Space]) -> gym.Space:
    """The smallest space that has room for all of `spaces`: agents may differ in sizes, not in kinds."""
    first, boxes = spaces[0], all(isinstance(space, gym.spaces.Box) for space in spaces)
    if all(space == first for space in spaces):
        return first
    if boxes and len({(space.dtype, len(space.shape)) for space in spaces}) == 1:
        shape = np.max([space.shape for space in spaces], 0)
        low, high = (f([f(x) for x in bounds]) for f, bounds in (
            (min, [s.low.ravel() for s in spaces]), (max, [s.high.ravel() for s in spaces])))
        return gym.spaces.Box(low, high, tuple(shape.tolist()), first.dtype)
    if all(isinstance(space, gym.spaces.Discrete) and space.start == 0 for space in spaces):
        return gym.spaces.Discrete(max(space.n for space in spaces))
    kinds = ", ".join(sorted({str(space) for space in spaces}))
    raise InputError(f"the agents' spaces {name!r} are of different kinds ({kinds}): one network plays all seats, so "
                     "wrap the environment such that they are alike")

class Seats(gym.Env):
    """MARL: a ParallelEnv as ONE Gymnasium environment, so that Gymnasium's vectorisation and autoreset serve it.
    Agents are seats 0 … K-1, in the order of possible_agents. An action is (K, A), flat as ActionCodec has it; of a
    space that was padded the surplus numbers of a Box are ignored, and a surplus choice i means i modulo the number of
    choices.
    The observation is a Dict with a row for every seat:

        obs/…     (K, …) what the agent sees, padded with zeros to the largest agent's; zeros while it is away
        reward    (K,) its reward · here (K,) whether the row is one of its, that is until and with its last observation
        active    (K,) whether it acts now, or at the end of the episode whether it would, had time not run out
        last, terminal (K,) whether this is its last observation, and whether it is so for more reasons than time
        learner   () the seat that learns where partners are not the policy itself, drawn for every episode
        script    (K,) which of the environment's scripts plays the seat, drawn from `scripts` for every episode, or -1
        play      (K, A) what it plays now · bayes (K, A) what an ideal observer expects, NaN where there is none"""
    metadata: dict[str, Any] = {}

    def __init__(self, env: Any, scripts: tuple[str, ...] = ()):
        self.env, self.names, self.scripts = env, list(env.possible_agents), scripts
        self.known = tuple(getattr(env, "scripts", ()))
        self.metadata, self.render_mode = env.metadata, getattr(env, "render_mode", None)
        k, spaces = len(self.names), [leaves(env.observation_space(name)) for name in self.names]
        if len({tuple(sorted(leaf)) for leaf in spaces}) > 1:
            entries = "; ".join(sorted({", ".join(sorted(leaf)) for leaf in spaces}))
            raise InputError(f"the agents' observations have different entries ({entries}): one network plays all "
                             "seats, so wrap the environment such that they are alike")
        self.seat_space = gym.spaces.Dict({name: merge(name, [leaf[name] for leaf in spaces]) for name in spaces[0]})
        own = [env.action_space(name) for name in self.names]
        self.seat_action = own[0] if all(x == own[0] for x in own) else merge("action", own)
        self.codecs, self.size = [ActionCodec(x) for x in own], ActionCodec(self.seat_action).size

        def rows(dtype: Any, *shape: int) -> gym.spaces.Box:  # of these the bounds do not matter
            low, high = (-2**62, 2**62) if np.issubdtype(dtype, np.integer) else (-np.inf, np.inf)
            return gym.spaces.Box(*((0, 255) if dtype == np.uint8 else (low, high)), (k, *shape), dtype)

        self.observation_space = gym.spaces.Dict({
            **{f"obs/{name}": rows(sub.dtype or np.int64, *(sub.shape or ())) for name, sub in self.seat_space.items()},
            "reward": rows(np.float64),
            **{name: gym.spaces.MultiBinary(k) for name in ("here", "active", "last", "terminal")},
            "learner": gym.spaces.Discrete(k), "script": rows(np.int64), "play": rows(np.float32, self.size),
            "bayes": rows(np.float32, self.size)})
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (k, self.size), np.float32)

    def decode(self, seat: int, flat: np.ndarray) -> Any:
        """(A,) → the action of the agent in `seat`."""
        codec = self.codecs[seat]
        if codec.size < self.size and isinstance(codec.space, gym.spaces.Discrete):
            flat = np.eye(codec.size)[flat.argmax() % codec.size]
        action = codec.decode(flat[None, : codec.size])
        return unbatch(action)

    def view(self, obs: dict[str, Any], rewards: dict, terminated: dict, truncated: dict) -> dict[str, np.ndarray]:
        space, over = self.observation_space, not self.env.agents
        out = {name: np.zeros(sub.shape, sub.dtype) for name, sub in space.items()}
        for key, sub in self.seat_space.items():
            out[f"obs/{key}"] += np.asarray(getattr(sub, "start", 0), sub.dtype)  # 0 need not be a choice
        out["bayes"][:], out["script"][:], out["learner"] = np.nan, -1, self.learner
        for seat, name in enumerate(self.names):
            if not self.here[seat]:
                continue
            for key, x in leaves(obs[name]).items() if name in obs else ():
                x = np.asarray(x)
                out[f"obs/{key}"][(seat, *(slice(n) for n in x.shape))] = x
            out["reward"][seat], out["here"][seat] = rewards.get(name, 0.0), True
            out["last"][seat] = name not in self.env.agents
            out["terminal"][seat] = out["last"][seat] and bool(terminated.get(name))
            out["active"][seat] = not out["last"][seat] or (over and not out["terminal"][seat])
            if self.scripts and seat != self.learner:
                out["script"][seat] = self.known.index(script := self.scripts[self.script[seat]])
                if not out["last"][seat]:
                    action = self.env.play(name, script)
                    out["play"][seat, : self.codecs[seat].size] = encode_action(self.codecs[seat], action)
                    if hasattr(self.env, "bayes"):
                        out["bayes"][seat] = self.env.bayes(name, self.scripts)
        self.here &= [name in self.env.agents for name in self.names]
        return out

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.learner = int(self.np_random.integers(len(self.names)))
        self.script = self.np_random.integers(max(1, len(self.scripts)), size=len(self.names))
        obs, _ = self.env.reset(seed=seed, options=options)
        self.here = np.array([name in self.env.agents for name in self.names])
        return self.view(obs, {}, {}, {}), {}

    def step(self, action: np.ndarray):
        chosen = {name: self.decode(i, action[i]) for i, name in enumerate(self.names) if name in self.env.agents}
        obs, rewards, terminated, truncated, _ = self.env.step(chosen)
        view = self.view(obs, rewards, terminated, truncated)
        return view, float(sum(rewards.values())), not self.env.agents, False, {}

    def render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        getattr(self.env, "close", lambda: None)()

def scripts_of(args: Args, env: Any) -> tuple[str, ...]:
    """Names of the scripted partners to learn with. Raises InputError for names that the environment does not have."""
    if args.partners != "scripted":
        return ()
    known = getattr(env, "scripts", ())
    if not known:
        raise InputError(f"{args.env_id} comes without scripted partners: use --partners self or --partners pool")
    for name in (*args.scripted, *args.held_out):
        if name not in known:
            raise InputError(f"{args.env_id} has no scripted partner {name!r}: choose from {', '.join(known)}")
    usual = [name for name in known if name not in (*args.held_out, *getattr(env, "unusual", ()))]
    if not (chosen := args.scripted or tuple(usual)):
        raise InputError("all scripted partners are held out: leave one to learn with")
    return tuple(chosen)

def make_env(args: Args, idx: int, capture_video: bool, run_name: str, scripts: tuple[str, ...] | None = None):
    """CleanRL's thunk: a function without arguments that makes environment number `idx` of a run. Number 0 records its
    episodes under videos/{run_name} if `capture_video`. `scripts` names other scripted partners than the arguments."""
    record = capture_video and idx == 0

    def thunk() -> gym.Env:
        env = make_parallel(args, record)
        if record and getattr(env, "render_mode", None) != "rgb_array":
            raise InputError(f"{args.env_id} draws no frames: leave out --capture-video")
        seats = Seats(env, scripts_of(args, env) if scripts is None else scripts)
        return gym.wrappers.RecordVideo(seats, f"videos/{run_name}", disable_logger=True) if record else seats

    return thunk

def make_vector_env(args: Args, num_envs: int, run_name: str, capture_video: bool = False,
                    scripts: tuple[str, ...] | None = None) -> gym.vector.VectorEnv:
    """`num_envs` environments that reset themselves: the step after the last of an episode ignores its action and
    returns the first observation of the next with reward 0 (NEXT_STEP), just what the replay wants to see."""
    thunks = [make_env(args, i, capture_video, run_name, scripts) for i in range(num_envs)]  # MARL
    kind, mode, times = args.vectorization, gym.vector.AutoresetMode.NEXT_STEP, [time.perf_counter()]
    if kind == "auto" and num_envs > 1:  # other processes are worth their cost if a step takes over a millisecond
        with contextlib.closing(gym.wrappers.Autoreset(thunks[-1]())) as env:
            env.reset(seed=0)
            for _ in range(20):
                env.step(env.action_space.sample())
                times.append(time.perf_counter())
        kind = "async" if np.median(np.diff(times)) > 1e-3 else "sync"
    if kind != "async":
        return gym.vector.SyncVectorEnv(thunks, autoreset_mode=mode)
    return gym.vector.AsyncVectorEnv(thunks, autoreset_mode=mode)  # MARL: nothing here renders with OpenGL

# ------------------------------------------------------------------------------------------------ observations, actions

def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and tuples by path, of spaces and of batches: {"a": (x, y)} → {"a/0": x, "a/1": y}. A tree
    that is a leaf itself is called "obs"."""
    if not isinstance(tree, (dict, tuple, *TREES)):
        return {path or "obs": tree}
    items = tree.items() if hasattr(tree, "items") else enumerate(tree)
    return {k: v for name, branch in items for k, v in leaves(branch, f"{path}/{name}".lstrip("/")).items()}

def classes_of(space: gym.Space) -> tuple[int, ...] | None:
    """Numbers of choices of a Discrete, MultiDiscrete or MultiBinary space; None for any other."""
    if isinstance(space, gym.spaces.MultiBinary):
        return (2,) * int(np.prod(space.shape))
    numbers = getattr(space, "nvec", getattr(space, "n", 0))
    return tuple(np.ravel(numbers).tolist()) if isinstance(space, CHOICES) else None

class Leaf(NamedTuple):
    """One observation key as the networks see it."""
    kind: str  # "image" (H, W, C) uint8 · "vector" (n,) float32 · "discrete" (n,) int64 with `classes`
    shape: tuple[int, ...]
    width: int  # channels of an image, numbers of a vector, one-hot columns of a choice
    classes: tuple[int, ...] = ()

class ObservationCodec:
    """Turns batches of any supported Gymnasium observation into dicts of arrays (B, *leaf.shape).
    Images are uint8 or bool boxes H×W or H×W×1..4 with more than 4 pixels a side; they become image_size × image_size
    pixels of 0..255. All other boxes are vectors. Raises InputError for spaces that it cannot use."""
    REMEDY = ("provide non-empty Box, Discrete, MultiDiscrete or MultiBinary entries of finite numbers, "
              "for example with gymnasium.wrappers.TransformObservation")

    def __init__(self, space: gym.Space, image_size: int):
        self.spaces, self.image_size = leaves(space), image_size
        self.leaves = {name: self.leaf(name, sub) for name, sub in sorted(self.spaces.items())}
        if not self.leaves:
            raise InputError(f"observation space {space} has no usable key: " + self.REMEDY)

    def leaf(self, name: str, space: gym.Space) -> Leaf:
        if classes := classes_of(space):
            return Leaf("discrete", (len(classes),), sum(classes), classes)
        if not isinstance(space, gym.spaces.Box) or 0 in space.shape:
            raise InputError(f"observation {name!r} is {space}, which is not supported: " + self.REMEDY)
        pixels = space.dtype in (np.uint8, np.bool_) and len(space.shape) in (2, 3) and min(space.shape[:2]) > 4
        if pixels and (len(space.shape) == 2 or space.shape[2] <= 4):
            channels = (*space.shape, 1)[2]
            return Leaf("image", (self.image_size, self.image_size, channels), channels)
        if (n := int(np.prod(space.shape))) > 4096:
            warnings.warn(f"observation {name!r} {space.shape} of {space.dtype} is taken for a vector; an image would "
                          "be uint8, height × width × 1 to 4 channels")
        return Leaf("vector", (n,), n)

    def __call__(self, obs: Any) -> dict[str, np.ndarray]:
        flat, out = leaves(obs), {}
        for name, leaf in self.leaves.items():
            x, space = np.asarray(flat[name]), self.spaces[name]
            if leaf.kind == "image":
                out[name] = self.resize(x.reshape(*x.shape[:3], -1), leaf, space)
            elif leaf.kind == "discrete":
                out[name] = x.reshape(len(x), -1).astype(np.int64) - np.ravel(getattr(space, "start", 0))
            else:
                out[name] = x = x.reshape(len(x), -1).astype(np.float32)
                if not np.isfinite(x).all():
                    raise InputError(f"observation {name!r} holds {x[~np.isfinite(x)][0]}: " + self.REMEDY)
        return out

    def resize(self, x: np.ndarray, leaf: Leaf, space: gym.spaces.Box) -> np.ndarray:
        low, high = float(space.low.min()), float(space.high.max())
        if x.shape[1:] == leaf.shape and (low, high) == (0.0, 255.0):
            return x
        pixels = (torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() - low) * (255 / (high - low))
        mode = "nearest" if max(x.shape[1:3]) <= self.image_size else "area"  # the average of the pixels it covers
        return F.interpolate(pixels, leaf.shape[:2], mode=mode).round().byte().permute(0, 2, 3, 1).numpy()

class ActionCodec:
    """Maps the flat vectors of the networks (one-hots and raw Gaussian samples) to actions of any supported space.
    `heads` lists ("discrete", classes) or ("continuous", n) by path; `size` is the width A of the flat vector, `noise`
    the uniform numbers that a sample needs. Raises InputError for unbounded and unsupported spaces."""
    def __init__(self, space: gym.Space):
        self.space, self.heads, self.start, self.size, self.noise = space, {}, {}, 0, 0
        for name, sub in leaves(space).items():
            classes, n = classes_of(sub), int(np.prod(sub.shape or 1))
            if not classes and (not isinstance(sub, gym.spaces.Box) or n == 0):
                raise InputError(f"action space {sub} is not supported: use Box, Discrete, MultiDiscrete, MultiBinary")
            if not classes and not (np.isfinite(sub.low).all() and np.isfinite(sub.high).all()):
                raise InputError(f"action space {sub} is unbounded: give it finite bounds, for example with "
                                 "gymnasium.wrappers.TransformAction(env, lambda a: a, "
                                 f"gymnasium.spaces.Box(-1, 1, {sub.shape}))")
            self.heads[name], self.start[name] = ("discrete", classes) if classes else ("continuous", n), self.size
            self.size += sum(classes) if classes else n
            self.noise += n  # one number for every choice or dimension
        if not self.heads:
            raise InputError(f"action space {space} is empty: the agent has nothing to choose")

    def decode(self, flat: np.ndarray, space: gym.Space | None = None, path: str = "") -> Any:
        """(B, A) → a batch of actions as the vector environment expects it."""
        space = self.space if space is None else space
        if isinstance(space, gym.spaces.Dict):
            return {k: self.decode(flat, sub, f"{path}/{k}".lstrip("/")) for k, sub in space.items()}
        if isinstance(space, gym.spaces.Tuple):
            return tuple(self.decode(flat, sub, f"{path}/{i}".lstrip("/")) for i, sub in enumerate(space))
        (kind, n), i = self.heads[path or "obs"], self.start[path or "obs"]
        if kind == "discrete":
            choices = np.split(flat[:, i : i + sum(n)], np.cumsum(n)[:-1], axis=1)
            value = np.stack([c.argmax(-1) for c in choices], -1).reshape(-1, *space.shape) + getattr(space, "start", 0)
        else:  # [-1, 1] → [low, high]; the raw sample may lie outside
            unit = (np.clip(flat[:, i : i + n], -1, 1).astype(np.float64).reshape(-1, *space.shape) + 1) / 2
            value = space.low + unit * (space.high.astype(np.float64) - space.low)
            value = value.round() if np.issubdtype(space.dtype, np.integer) else value
        return value.astype(space.dtype)

# MARL: teammates act in the environment's terms, and the networks need theirs too
def encode_action(codec: ActionCodec, action: Any) -> np.ndarray:
    """One action of the environment → (A,), what `codec.decode` makes it of: one-hots, and boxes scaled to [-1, 1]."""
    flat = np.zeros(codec.size, np.float32)
    for (path, x), space in zip(leaves(action).items(), leaves(codec.space).values()):
        (kind, n), i = codec.heads[path], codec.start[path]
        if kind == "discrete":
            choices = np.ravel(np.asarray(x) - getattr(space, "start", 0)).astype(int)
            flat[i + np.concatenate([[0], np.cumsum(n)[:-1]]).astype(int) + choices] = 1
        else:
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            flat[i : i + n] = np.ravel(2 * (np.asarray(x) - low) / np.where(high > low, high - low, 1) - 1)
    return flat

def unbatch(tree: Any) -> Any:
    """The only action of a batch of one."""
    if isinstance(tree, dict):
        return {k: unbatch(x) for k, x in tree.items()}
    return tuple(unbatch(x) for x in tree) if isinstance(tree, tuple) else tree[0]

# --------------------------------------------------------------------------------------------------------------- replay

def free_bytes(device: str) -> float:
    """Memory that is free on "cuda" or, as far as the system tells, on "cpu"."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))

class ReplayBuffer:
    """A ring of the last `capacity` steps, split evenly over the environments, that yields windows of T + 1 steps.
    The first step of a window is context: its stored latent and action start the recurrence, the other T are trained.
    Windows start anywhere, cross episode boundaries and never the write head. Fresh windows, each environment's one
    after the other without overlap, are served once before uniform draws (the online queue)."""
    def __init__(self, capacity: int, num_envs: int, batch_length: int, specs: dict[str, tuple], seed: int = 0,
                 device: str = "cpu"):
        """specs: name → (shape, dtype) of one step. device: "cpu", "cuda", or "auto" for the GPU if half of its free
        memory is enough. Raises InputError if the memory is not."""
        self.rows, self.num_envs, self.window = capacity // num_envs, num_envs, batch_length + 1
        if self.window > self.rows:
            raise InputError(f"batch_length {batch_length} is longer than the buffer ({self.rows} steps each)")
        self.bytes_per_step = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in specs.values())
        need = num_envs * self.rows * self.bytes_per_step
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() and need < free_bytes("cuda") / 2 else "cpu"
        if need > (free := free_bytes(device)):
            raise InputError(f"a replay of {capacity:,} steps takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
                             f" on {device}: lower --buffer-size to {int(0.9 * free / self.bytes_per_step)}")
        # on the CPU torch.empty takes memory only as rows are written
        self.data = {k: torch.empty((num_envs, self.rows, *shape), dtype=dtype, device=device)
                     for k, (shape, dtype) in specs.items()}
        self.device = device
        self.count = 0  # steps ever added to each environment's stream; step i lives in row i % rows
        self.online: collections.deque[tuple[int, int]] = collections.deque()  # (environment, first step)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.num_envs * min(self.count, self.rows)

    def add(self, step: dict[str, Any]) -> None:
        """Writes one step of every environment: name → (num_envs, …)."""
        assert step.keys() == self.data.keys(), (sorted(step), sorted(self.data))
        for name, value in step.items():
            self.data[name][:, self.count % self.rows] = torch.as_tensor(value).to(self.device, self.data[name].dtype)
        self.count += 1
        if self.count % self.window == 0:
            self.online.extend((env, self.count - self.window) for env in range(self.num_envs))

    def sample(self, batch_size: int, online: bool = True) -> dict[str, torch.Tensor]:
        """name → (B, T + 1, …), plus "env" (B, 1) and "row" (B, T + 1), the places that write_back fills. Not `online`
        leaves the queue alone. Raises InputError while no environment has a whole window."""
        oldest, newest = max(0, self.count - self.rows), self.count - self.window
        if newest < oldest:
            raise InputError(f"the replay holds {self.count} steps an environment, a window needs {self.window}")
        env = torch.randint(self.num_envs, (batch_size, 1), generator=self.generator)
        start = torch.randint(oldest, newest + 1, (batch_size, 1), generator=self.generator)
        while self.online and self.online[0][1] < oldest:
            self.online.popleft()  # overwritten before its turn
        for i in range(min(batch_size, len(self.online)) if online else 0):
            env[i], start[i] = self.online.popleft()
        row = (start + torch.arange(self.window)) % self.rows
        if self.device != "cpu":  # pinned, so that the copy does not wait for the update that goes on
            env, row = (x.pin_memory().to(self.device, non_blocking=True) for x in (env, row))
        batch = {k: x[env, row] for k, x in self.data.items()}
        if self.device == "cpu" and torch.cuda.is_available():
            batch = {k: x.pin_memory() for k, x in batch.items()}  # so that the copy to the GPU does not wait for it
        return {**batch, "env": env, "row": row}

    def write_back(self, batch: dict[str, torch.Tensor], **fresh: torch.Tensor) -> None:
        """Replaces the T trained steps of a sampled batch by `fresh` values (B, T, …), the latents of newer weights."""
        for name, value in fresh.items():
            self.data[name][batch["env"], batch["row"][:, 1:]] = value.to(self.device, self.data[name].dtype)

    def state_dict(self) -> dict[str, Any]:
        size = min(self.count, self.rows)
        # one environment after the other, and a full ring on the CPU not at all, for there may be no room for a copy
        return {"data": {k: [env[:size].to("cpu", copy=size < self.rows) for env in x] for k, x in self.data.items()},
                "count": self.count, "online": list(self.online), "rows": self.rows,
                "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved ring; raises InputError if it was saved with another capacity or number of environments."""
        ours, saved = ({k: (len(x), *x[0].shape[1:]) for k, x in data.items()} for data in (self.data, state["data"]))
        fits = state["rows"] == self.rows or state["count"] <= min(self.rows, state["rows"])  # or has not wrapped yet
        if not fits or ours != saved:
            raise InputError("the saved replay has another layout: keep its env_id, size, num_envs and buffer_size, "
                             "and total_timesteps no smaller")
        for name, value in state["data"].items():
            for env, saved_env in zip(self.data[name], value):
                env[: len(saved_env)] = saved_env
        self.count, self.online = state["count"], collections.deque(tuple(x) for x in state["online"])
        self.generator.set_state(state["generator"])
        if self.count:  # the environments start anew, so the streams break off here
            self.data["is_last"][:, (self.count - 1) % self.rows] = True

# --------------------------------------------------------------------------------------------------- robust predictions

def symlog(x: torch.Tensor) -> torch.Tensor:
    """sign(x) · ln(1 + |x|): squashes large values of either sign (paper, section "Robust predictions")."""
    return torch.sign(x) * torch.log1p(torch.abs(x))

def symexp(x: torch.Tensor) -> torch.Tensor:
    """sign(x) · (exp(|x|) − 1), the inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))

class SymexpTwoHot:
    """A number predicted as a categorical over 255 exponentially spaced values: logits (…, 255).
    Any scale of rewards and returns fits, and the size of the gradient does not depend on the size of the target."""
    def __init__(self, logits: torch.Tensor):
        self.logits = logits.float()
        half = symexp(torch.linspace(-20, 0, (logits.shape[-1] + 1) // 2, device=logits.device))
        self.bins = torch.cat([half, -half[:-1].flip(0)])  # exactly antisymmetric

    def pred(self) -> torch.Tensor:
        """Mean (…). Bins of opposite sign are summed in pairs, so that zero logits give exactly 0."""
        probs, middle = self.logits.softmax(-1), self.bins.shape[0] // 2
        return (probs[..., middle + 1 :] - probs[..., :middle].flip(-1)) @ self.bins[middle + 1 :]

    def loss(self, *targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (…) to `targets`, (…) each, summed over them: one pass through the logits serves all. A target
        is split between its neighbouring bins linearly in raw (not symlog) space."""
        target = torch.stack(targets, -1).float().clamp(self.bins[0], self.bins[-1])
        below = (torch.searchsorted(self.bins, target, right=True) - 1).clamp(0, self.bins.shape[0] - 2)
        weight = (target - self.bins[below]) / (self.bins[below + 1] - self.bins[below])
        logp = self.logits.log_softmax(-1).gather(-1, torch.cat([below, below + 1], -1))
        return -(torch.cat([1 - weight, weight], -1) * logp).sum(-1)

class OneHot:
    """Categorical over one-hot vectors (…, C), mixed with `unimix` of the uniform distribution; see RSSM and Actor."""
    def __init__(self, logits: torch.Tensor, unimix: float = 0.0):
        self.logits, self.unimix, self.size, self.draws = logits.float(), unimix, logits.shape[-1], 1
        exp = (self.logits - self.logits.amax(-1, keepdim=True).detach()).exp()
        self.probs = exp / exp.sum(-1, keepdim=True)  # for few classes on a CPU 3 times as fast as softmax
        if unimix:  # keeps every class possible, so that log-probabilities and KL stay bounded
            self.probs = (1 - unimix) * self.probs + unimix / self.size

    @property
    def logp(self) -> torch.Tensor:
        return self.probs.log() if self.unimix else self.logits.log_softmax(-1)

    def sample(self, uniform: torch.Tensor | None) -> torch.Tensor:
        """One-hot sample by inverse CDF from `uniform` (…, 1), the mode for None; straight-through gradient."""
        if uniform is None:
            index = self.probs.argmax(-1, keepdim=True)
        else:  # the number of classes that lie wholly below the noise; the clamp is for a CDF that rounds below 1
            index = (self.probs.detach().cumsum(-1) <= uniform).sum(-1, keepdim=True).clamp_(max=self.size - 1)
        onehot = torch.zeros_like(self.probs).scatter_(-1, index, 1.0)
        return onehot + self.probs - self.probs.detach() if self.probs.requires_grad else onehot

    def log_prob(self, onehot: torch.Tensor) -> torch.Tensor:
        return (onehot * self.logp).sum(-1)

    def entropy(self) -> torch.Tensor:
        return -(self.probs * self.logp).sum(-1)

class Normal:
    """Gaussian over independent dimensions (…, n)."""
    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.mean, self.std, self.size, self.draws = mean.float(), std.float(), mean.shape[-1], mean.shape[-1]

    def sample(self, uniform: torch.Tensor | None) -> torch.Tensor:
        """Sample by inverse CDF from `uniform` (…, n) in [0, 1), the mean for None."""
        z = 0 if uniform is None else torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
        return self.mean + self.std * z

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return (-0.5 * ((x - self.mean) / self.std) ** 2 - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> torch.Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

class Joint:
    """Independent distributions side by side: their samples concatenated, log-probabilities and entropies summed."""
    def __init__(self, dists: list[OneHot | Normal]):
        self.dists = dists

    def sample(self, uniform: torch.Tensor | None) -> torch.Tensor:
        """uniform (…, ActionCodec.noise) → (…, A); modes for None."""
        draws = [d.draws for d in self.dists]
        parts = [None] * len(draws) if uniform is None else uniform.split(draws, -1)
        return torch.cat([d.sample(u) for d, u in zip(self.dists, parts)], -1)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return sum(d.log_prob(part) for d, part in zip(self.dists, x.split([d.size for d in self.dists], -1)))

    def entropy(self) -> torch.Tensor:
        return sum(d.entropy() for d in self.dists)

# --------------------------------------------------------------------------------------------------------------- layers

def init_weight(weight: torch.Tensor, fan_in: int, outscale: float = 1.0) -> None:
    """Truncated normal (±2σ) of variance outscale² / fan_in; 1.1368 makes up for what the truncation takes away."""
    nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0)
    weight.data.mul_(1.1368 * outscale / fan_in**0.5)

class RMSNorm(nn.Module):
    """x / rms(x) over the last axis, in float32, with a learned scale and no shift."""
    def __init__(self, size: int, eps: float = 1e-4):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)

class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0):
        super().__init__(inputs, outputs)
        init_weight(self.weight, inputs, outscale)
        nn.init.zeros_(self.bias)

class BlockLinear(nn.Module):
    """`blocks` independent linear layers: block g maps its slice of x (N, inputs) and all of `shared` (N, shared).
    Passing `shared` equals repeating it to every block and concatenating, in dreams without the copies."""
    def __init__(self, inputs: int, outputs: int, blocks: int, shared: int = 0):
        super().__init__()
        self.blocks, self.own = blocks, inputs // blocks
        self.weight = nn.Parameter(torch.empty(blocks, self.own + shared, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        init_weight(self.weight, inputs + blocks * shared)  # the reference counts the inputs of all blocks

    def forward(self, x: torch.Tensor, shared: torch.Tensor | None = None) -> torch.Tensor:
        """(N, inputs), (N, shared) → (N, outputs)."""
        return self.blockwise(x, shared).flatten(1)

    def blockwise(self, x: torch.Tensor, shared: torch.Tensor | None = None) -> torch.Tensor:
        """The same as (N, G, outputs / G), a view of memory that holds block after block: flattening it is a copy."""
        x = x.unflatten(-1, (self.blocks, self.own)).transpose(0, 1)  # (G, N, inputs / G)
        if shared is None:
            y = torch.bmm(x, self.weight)
        elif torch.is_grad_enabled():  # slices of the weight would each cost a gradient of its size, step by step
            y = torch.bmm(torch.cat([x, shared.expand(self.blocks, -1, -1)], -1), self.weight)
        else:
            y = torch.bmm(x, self.weight[:, : self.own])
            y = torch.baddbmm(y, shared.expand(self.blocks, -1, -1), self.weight[:, self.own :])
        return y.add_(self.bias.view(self.blocks, 1, -1)).transpose(0, 1)

class Layer(nn.Sequential):
    """Linear → RMSNorm → SiLU, the unit that most of the networks consist of."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__(Linear(inputs, outputs), RMSNorm(outputs), nn.SiLU())

class MLP(nn.Sequential):
    """`layers` layers of `units`, then, if `outputs` is given, a linear layer scaled by `outscale`."""
    def __init__(self, inputs: int, units: int, layers: int, outputs: int | None = None, outscale: float = 1.0):
        modules = [Layer(inputs if i == 0 else units, units) for i in range(layers)]
        super().__init__(*modules, *([Linear(units, outputs, outscale)] if outputs else []))

class Conv(nn.Module):
    """5×5 convolution that keeps the resolution of images (N, H, W, C)."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 5, padding=2)
        init_weight(self.conv.weight, 25 * inputs)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # views only: the memory stays channels-last

def upsample(x: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) → (N, 2H, 2W, C): every pixel becomes 2×2."""
    if torch.compiler.is_compiling():  # it would add the gradients of interpolate one by one, those of views at once
        return x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2)
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest").permute(0, 2, 3, 1)

# ---------------------------------------------------------------------------------------------------------- world model

class Encoder(nn.Module):
    """Observation dict (N, …) → tokens (N, size): all vectors through one MLP, all images through one CNN."""
    def __init__(self, obs: dict[str, Leaf], size: Size):
        super().__init__()
        self.obs, self.size = obs, 0
        self.images, self.vectors = ([k for k in obs if (obs[k].kind == "image") == image] for image in (True, False))
        if self.vectors:
            self.mlp = MLP(sum(obs[k].width for k in self.vectors), size.units, layers=3)
            self.size += size.units
        if self.images:
            depths = [sum(obs[k].width for k in self.images), *(size.depth * m for m in (2, 3, 4, 4))]
            self.convs = nn.ModuleList([Conv(i, o) for i, o in zip(depths, depths[1:])])
            self.norms = nn.ModuleList([RMSNorm(o) for o in depths[1:]])
            self.size += (obs[self.images[0]].shape[0] // 16) ** 2 * depths[-1]

    def forward(self, obs: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        tokens, inputs = [], []
        for k in self.vectors:
            choices = zip(obs[k].long().unbind(-1), self.obs[k].classes)  # one-hots side by side
            inputs += [F.one_hot(i, n).float() for i, n in choices] if self.obs[k].classes else [symlog(obs[k])]
        if self.vectors:
            tokens.append(self.mlp(torch.cat(inputs, -1).to(dtype)))
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -1).to(dtype) / 255 - 0.5  # (N, H, W, C)
            for conv, norm in zip(self.convs, self.norms):  # each halves the resolution by 2×2 max-pooling
                x = F.silu(norm(F.max_pool2d(conv(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)))
            tokens.append(x.flatten(1))
        return torch.cat(tokens, -1)

class Decoder(nn.Module):
    """(deter, stoch) → a reconstruction of every observation key, images in [0, 1], vectors in symlog space."""
    def __init__(self, obs: dict[str, Leaf], size: Size):
        super().__init__()
        self.obs, stoch = obs, size.latents * size.classes
        self.images, self.vectors = ([k for k in obs if (obs[k].kind == "image") == image] for image in (True, False))
        if self.vectors:
            self.mlp = MLP(size.deter + stoch, size.units, layers=3)
            self.outputs = nn.ModuleList([Linear(size.units, obs[k].width) for k in self.vectors])
        if self.images:
            self.side = obs[self.images[0]].shape[0] // 16
            depths = [size.depth * m for m in (4, 4, 3, 2)] + [sum(obs[k].width for k in self.images)]
            cells = self.side**2 * depths[0]
            self.from_deter = BlockLinear(size.deter, cells, size.blocks)
            self.from_stoch = nn.Sequential(Layer(stoch, 2 * size.units), Linear(2 * size.units, cells))
            self.convs = nn.ModuleList([Conv(i, o) for i, o in zip(depths, depths[1:])])
            self.norms = nn.ModuleList([RMSNorm(o) for o in depths[:-1]])

    def forward(self, deter: torch.Tensor, stoch: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, D), (N, S, C) → name → image (N, H, W, C), vector (N, n) or logits (N, sum of classes)."""
        recon, stoch = {}, stoch.flatten(1)
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))  # the order of the reference, here alone
            recon = {k: layer(x).float() for k, layer in zip(self.vectors, self.outputs)}
        if self.images:
            groups = self.from_deter(deter).unflatten(-1, (self.from_deter.blocks, self.side, self.side, -1))
            x = groups.permute(0, 2, 3, 1, 4).flatten(3)  # block g makes the g-th group of channels
            x = x + self.from_stoch(stoch).unflatten(-1, x.shape[1:])
            for norm, conv in zip(self.norms, self.convs):
                x = conv(upsample(F.silu(norm(x))))
            recon |= dict(zip(self.images, x.float().sigmoid().split([self.obs[k].width for k in self.images], -1)))
        return recon

    def loss(self, recon: dict[str, torch.Tensor], obs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Reconstruction loss of every key, (N,) each: summed over pixels, components or categories."""
        losses = {}
        for k, x in recon.items():
            if self.obs[k].kind == "discrete":
                parts = zip(x.split(self.obs[k].classes, -1), obs[k].long().unbind(-1))
                losses[k] = sum(F.cross_entropy(logits, index, reduction="none") for logits, index in parts)
            else:
                target = obs[k].float() / 255 if self.obs[k].kind == "image" else symlog(obs[k])
                losses[k] = (x - target).square().flatten(1).sum(1)
        return losses

class RSSM(nn.Module):
    """Recurrent state-space model: a deterministic path h that remembers, a stochastic z that says what is new.

        sequence   h_t = f(h_{t-1}, z_{t-1}, a_{t-1})        block GRU
        posterior  z_t ~ q(z_t | h_t, x_t)                   when x_t is seen
        prior      z_t ~ p(z_t | h_t)                        in dreams"""
    def __init__(self, tokens: int, actions: int, size: Size, unimix: float = 0.01):
        super().__init__()
        self.size, self.unimix = size, unimix
        deter, hidden, stoch = size.deter, size.hidden, size.latents * size.classes
        self.deter_in, self.stoch_in, self.action_in = (Layer(n, hidden) for n in (deter, stoch, actions))
        self.hidden = BlockLinear(deter, deter, size.blocks, shared=3 * hidden)
        self.hidden_norm = RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter, size.blocks)
        self.prior = MLP(deter, hidden, 2, stoch)
        self.posterior = MLP(deter + tokens, hidden, 1, stoch)

    def initial(self, batch: int, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros, not learned: deter (B, D), stoch (B, S, C)."""
        return (torch.zeros(batch, self.size.deter, device=device),
                torch.zeros(batch, self.size.latents, self.size.classes, device=device))

    def dist(self, logits: torch.Tensor) -> OneHot:
        return OneHot(logits, self.unimix)

    def logits(self, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net(x).unflatten(-1, (self.size.latents, self.size.classes)).float()

    def embed(self, action: torch.Tensor) -> torch.Tensor:
        """Actions (…, A), of any size for raw Gaussian samples, scaled into [-1, 1] elementwise → (…, hidden)."""
        return self.action_in((action / action.abs().clamp(min=1).detach()).to(self.gates.weight.dtype))

    def core(self, deter, stoch, action) -> torch.Tensor:
        """(B, D), (B, S, C), embedded action (B, hidden) → next deter (B, D)."""
        x = torch.cat([self.deter_in(deter), self.stoch_in(stoch.flatten(1)), action], -1)
        x = F.silu(self.hidden_norm(self.hidden(deter, x)))
        blocks = deter.unflatten(-1, (self.size.blocks, -1))
        reset, cand, update = self.gates.blockwise(x).chunk(3, -1)  # (B, G, D / G): every block has its own three gates
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        # hₜ = uₜ · cₜ + (1 − uₜ) · hₜ₋₁; the −1 makes forgetting slow at the start
        return torch.lerp(blocks, cand, torch.sigmoid(update - 1)).flatten(1)

    def img_step(self, deter, stoch, action, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """One dreamed step: state and action (B, A) at t-1, noise (B, S, 1) or None for modes → state at t."""
        deter = self.core(deter, stoch, self.embed(action))
        return deter, self.dist(self.logits(self.prior, deter)).sample(noise).to(deter.dtype)

    def obs_step(self, deter, stoch, action, tokens, keep, noise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One observed step: state at t-1, embedded action, tokens at t, keep (B, 1) = not is_first → state, logits."""
        deter = self.core(deter * keep, stoch * keep[..., None], action)
        logits = self.logits(self.posterior, torch.cat([deter, tokens], -1))
        return deter, self.dist(logits).sample(noise).to(deter.dtype), logits

    def observe(self, deter, stoch, tokens, prev_action, is_first, noise=None) -> tuple[torch.Tensor, ...]:
        """Filters a sequence: state before it, tokens (B, T, E), prev_action (B, T, A), is_first (B, T), uniform noise
        (B, T, S, 1) or None. Where is_first, state and action are zeroed: what came before was another episode.
        Returns deter (B, T, D), stoch (B, T, S, C), posterior logits (B, T, S, C)."""
        keep = (~is_first)[..., None].to(tokens.dtype)
        actions = self.embed(prev_action * keep).unbind(1)
        noises = [None] * len(actions) if noise is None else noise.unbind(1)
        deter, stoch, states = deter.to(tokens.dtype), stoch.to(tokens.dtype), []
        for inputs in zip(actions, tokens.unbind(1), keep.unbind(1), noises):
            deter, stoch, logits = self.obs_step(deter, stoch, *inputs)
            states.append((deter, stoch, logits))
        return tuple(torch.stack(x, 1) for x in zip(*states))

    def imagine(self, deter, stoch, policy, horizon, noise=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Dreams from states (N, …): `policy(deter, stoch, t)` gives the action (N, A) at step t; noise (H, N, S, 1).
        Returns deter (H + 1, N, D) and stoch (H + 1, N, S, C) with the start in front, and actions (H, N, A): dreams
        are time first, so that all but the last of their steps are a view and not a copy."""
        deters, stochs, actions = [deter], [stoch], []
        for t in range(horizon):
            actions.append(policy(deters[-1], stochs[-1], t))
            deter, stoch = self.img_step(deters[-1], stochs[-1], actions[-1], None if noise is None else noise[t])
            deters.append(deter)
            stochs.append(stoch)
        return torch.stack(deters), torch.stack(stochs), torch.stack(actions)

    def kl_loss(self, post: torch.Tensor, prior: torch.Tensor, free: float = 1.0) -> list[torch.Tensor]:
        """Logits (…, S, C) of both → dyn (…), which moves only the prior, and rep (…), only the posterior."""
        pairs = (self.dist(post.detach()), self.dist(prior)), (self.dist(post), self.dist(prior.detach()))
        # KL(p‖q) = Σ p · (ln p − ln q), over all latents; below the free nats it has no gradient
        return [(p.probs * (p.logp - q.logp)).sum((-2, -1)).clamp(min=free) for p, q in pairs]

class Factors(nn.Module):
    """One network for each group of latents, their logits side by side."""
    def __init__(self, inputs: int, units: int, layers: int, outputs: tuple[int, ...]):
        super().__init__()
        self.nets = nn.ModuleList([MLP(inputs, units, layers, n) for n in outputs])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([net(x) for net in self.nets], -1)

class FactorisedRSSM(RSSM):
    """MARL: z = [z_env, z_team]. Both groups have a prior and a posterior of their own, from the same h:

        sequence   h_t = f(h_{t-1}, z_{t-1}, a⁰_{t-1}, a¹_{t-1}, …)      actions side by side, in the order of the seats
        posterior  z_t^env ~ q_env(h_t, x_t),  z_t^team ~ q_team(h_t, x_t)
        prior      z_t^env ~ p_env(h_t),       z_t^team ~ p_team(h_t)

    Where `merged`, the same networks make one group of them."""
    def __init__(self, tokens: int, actions: int, size: Size, team_latents: int, merged: bool = False):
        super().__init__(tokens, actions, size)
        env, team = size.latents - team_latents, team_latents
        self.groups = (env + team,) if merged else (env, team)
        outputs = (env * size.classes, team * size.classes)
        self.prior = Factors(size.deter, size.hidden, 2, outputs)
        self.posterior = Factors(size.deter + tokens, size.hidden, 1, outputs)

    def kl_loss(self, post: torch.Tensor, prior: torch.Tensor, free: float = 1.0) -> list[torch.Tensor]:
        """The sum of the groups' KL, each with free nats of its own."""
        pairs = zip(post.split(self.groups, -2), prior.split(self.groups, -2))
        return [sum(kl) for kl in zip(*[RSSM.kl_loss(self, p, q, free) for p, q in pairs])]

def features(deter: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
    """What heads, actor and critic see: [h, flat z]."""
    return torch.cat([deter, stoch.flatten(-2)], -1)

class WorldModel(nn.Module):
    """Everything that learns from real experience alone: encoder, RSSM, decoder, reward and continue heads.
    MARL: and the ToM head. The arms (`teammate_model`) have the same networks and differ in what these may see."""
    def __init__(self, obs: dict[str, Leaf], actions: int, size: Size, heads: dict[str, tuple], seats: int, args: Args):
        super().__init__()
        self.encoder, self.decoder = Encoder(obs, size), Decoder(obs, size)
        # MARL: actions of all seats enter the dynamics
        self.arm, self.stop_grad, self.mates = args.teammate_model, args.tom_stop_grad, seats - 1
        self.rssm = FactorisedRSSM(self.encoder.size, actions * seats, size, args.team_latents, self.arm != "tom")
        feat = size.deter + size.latents * size.classes
        # MARL: π̂ʲ(a | h, z_team, j) has the shape of a policy; teammates share its weights, j comes as a one-hot
        self.tom = Actor(feat + self.mates, heads, size.units)
        team = torch.arange(size.latents) >= size.latents - args.team_latents
        self.register_buffer("team", team[:, None].float(), persistent=False)  # (S, 1): which latents are z_team
        self.reward = MLP(feat, size.units, 1, 255, outscale=0.0)  # starts by predicting 0
        self.cont = MLP(feat, size.units, 1, 1)

    def encode(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
        """name → (B, T, …) to tokens (B, T, E), computed in the number format of the weights."""
        shape, flat = next(iter(obs.values())).shape[:2], {k: x.flatten(0, 1) for k, x in obs.items()}
        return self.encoder(flat, self.rssm.gates.weight.dtype).unflatten(0, shape)

    def loss(self, batch: dict[str, Any], noise: torch.Tensor | None, gamma: float, free_nats: float):
        """Losses (B, T) of a batch as Dreamer.prepare lays it out; also the states, and scalar metrics."""
        tokens, rssm = self.encode(batch["obs"]), self.rssm
        deter, stoch, post = rssm.observe(*batch["carry"], tokens, batch["prev_action"], batch["is_first"], noise)
        losses, metrics = self.head_losses(batch, deter, stoch, post, gamma, free_nats)
        return losses, (deter, stoch, post), metrics

    def head_losses(self, batch: dict[str, Any], deter, stoch, post, gamma: float, free_nats: float):
        """The part of `loss` after the recurrence, whole tensors (B, T, …) at once: losses (B, T) and metrics."""
        rssm = self.rssm
        prior = rssm.logits(rssm.prior, deter)
        recon = self.decoder(deter.flatten(0, 1), self.env_part(stoch).flatten(0, 1))  # MARL
        parts = self.decoder.loss(recon, {k: x.flatten(0, 1) for k, x in batch["obs"].items()})
        feat, losses = features(deter, stoch), {}
        losses["dyn"], losses["rep"] = rssm.kl_loss(post, prior, free_nats)
        losses["rec"] = sum(parts.values()).unflatten(0, deter.shape[:2])
        losses["rew"] = SymexpTwoHot(self.reward(feat)).loss(batch["reward"])
        # the reference makes the discount part of the target, so that dreams need no γ of their own
        target = (~batch["is_terminal"]).float() * gamma
        losses["con"] = F.binary_cross_entropy_with_logits(self.cont(feat)[..., 0].float(), target, reduction="none")
        # MARL: the target is the action of the SAME step, which neither h_t nor z_t has seen
        losses["tom"] = self.tom_loss(deter, stoch, batch["teammates"], batch["acts"])
        metrics = {f"rec_{k}": x.mean() for k, x in parts.items()} if len(parts) > 1 else {}
        for name, logits in (("prior_entropy", prior), ("posterior_entropy", post)):
            metrics[name] = rssm.dist(logits).entropy().sum(-1).mean()
        return losses, metrics

    # MARL: what each network may see of z
    def env_part(self, stoch: torch.Tensor) -> torch.Tensor:
        """(…, S, C) for the decoder: without z_team, so that z_env describes the world and z_team need not."""
        return stoch * (1 - self.team).to(stoch.dtype) if self.arm == "tom" else stoch

    def teammates(self, deter: torch.Tensor, stoch: torch.Tensor) -> Joint:
        """ToM head: distributions over the actions of all teammates (…, K - 1, A) from (…, D) and (…, S, C). The arm
        "joint" sees nothing and learns how often they play what; "none" listens without teaching the model."""
        if self.arm == "tom":
            stoch = stoch * self.team.to(stoch.dtype)
        if self.arm == "joint":
            deter, stoch = torch.zeros_like(deter), torch.zeros_like(stoch)
        if self.stop_grad or self.arm == "none":
            deter, stoch = deter.detach(), stoch.detach()
        feat = features(deter, stoch)[..., None, :].expand(*deter.shape[:-1], self.mates, -1)
        ids = torch.eye(self.mates, dtype=feat.dtype, device=feat.device).expand(*feat.shape[:-1], -1)
        return self.tom(torch.cat([feat, ids], -1))

    def tom_loss(self, deter, stoch, actions: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        """−Σⱼ log π̂ʲ(aʲ) (B, T) over the teammates that act: actions (B, T, K - 1, A), acts (B, T, K - 1)."""
        return -(self.teammates(deter, stoch).log_prob(actions) * acts).sum(-1)

    def joint(self, own: torch.Tensor, mates: torch.Tensor) -> torch.Tensor:
        """(…, A), (…, K - 1, A) → (…, K·A), what enters the dynamics; for plain Dreamer the own action alone."""
        return torch.cat([own, (mates * 0 if self.arm == "none" else mates).flatten(-2)], -1)

    @torch.no_grad()
    def social_dream(self, batch: dict[str, Any], context: int, z_noise: Any, a_noise: torch.Tensor):
        """Probabilities (or means) of the teammates' actions and samples of them, both (B, T, K - 1, A): `context`
        steps from observations, the rest in a dream in which ego acts as it did and the ToM head acts for the others.
        a_noise (B, T, K - 1, …)."""
        seen = [x[:, :context] for x in (batch["prev_action"], batch["is_first"], z_noise)]
        tokens = self.encode({k: x[:, :context] for k, x in batch["obs"].items()})
        deters, stochs, _ = self.rssm.observe(*batch["carry"], tokens, *seen)
        dists = [self.teammates(deters[:, t], stochs[:, t]) for t in range(context)]
        samples, deter, stoch = [d.sample(a_noise[:, t]) for t, d in enumerate(dists)], deters[:, -1], stochs[:, -1]
        for t in range(context, z_noise.shape[1]):
            action = self.joint(batch["action"][:, t - 1], samples[-1] * batch["active"][:, t - 1, :, None])
            deter, stoch = self.rssm.img_step(deter, stoch, action, z_noise[:, t])
            dists.append(self.teammates(deter, stoch))
            samples.append(dists[-1].sample(a_noise[:, t]))
        return torch.stack([expected(d) for d in dists], 1), torch.stack(samples, 1)

    @torch.no_grad()
    def dream(self, batch: dict[str, Any], context: int, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstructs `context` steps, then predicts the rest from actions alone: name → (B, T, …) as in Decoder."""
        seen = [x[:, :context] for x in (batch["prev_action"], batch["is_first"], noise)]
        tokens = self.encode({k: x[:, :context] for k, x in batch["obs"].items()})
        deter, stoch, _ = self.rssm.observe(*batch["carry"], tokens, *seen)
        actions, rest = batch["prev_action"][:, context:], noise[:, context:].transpose(0, 1)
        later = self.rssm.imagine(deter[:, -1], stoch[:, -1], lambda h, z, t: actions[:, t], actions.shape[1], rest)
        deter, stoch = (torch.cat([a, b[1:].transpose(0, 1)], 1) for a, b in zip((deter, stoch), later))
        recon = self.decoder(deter.flatten(0, 1), self.env_part(stoch).flatten(0, 1))  # MARL
        return {k: x.unflatten(0, deter.shape[:2]) for k, x in recon.items()}

def expected(dist: Joint) -> torch.Tensor:
    """Probabilities of choices and means of continuous actions (…, A)."""
    return torch.cat([getattr(d, "probs", getattr(d, "mean", None)) for d in dist.dists], -1)

# --------------------------------------------------------------------------------------------------------- actor-critic

class Actor(nn.Module):
    """Policy π(a | feat), one independent head for every path of the action space."""
    def __init__(self, feat: int, heads: dict[str, tuple[str, Any]], units: int):
        super().__init__()
        self.heads, self.mlp, self.outputs = list(heads.values()), MLP(feat, units, 3), nn.ModuleList()
        for kind, n in self.heads:
            sizes = [sum(n)] if kind == "discrete" else [n, n]  # logits, or mean and standard deviation
            self.outputs.append(nn.ModuleList([Linear(units, size, outscale=0.01) for size in sizes]))

    def forward(self, feat: torch.Tensor) -> Joint:
        x, dists = self.mlp(feat), []
        for (kind, n), layers in zip(self.heads, self.outputs):
            out = [layer(x).float() for layer in layers]
            if kind == "discrete":
                dists += [OneHot(logits) for logits in out[0].split(n, -1)]
            else:
                dists.append(Normal(torch.tanh(out[0]), 0.9 * torch.sigmoid(out[1] + 2) + 0.1))
        return Joint(dists)

class Critic(MLP):
    """Distribution over the return from feat; starts by predicting 0."""
    def __init__(self, feat: int, units: int, layers: int = 3):
        super().__init__(feat, units, layers, 255, outscale=0.0)

    def forward(self, feat: torch.Tensor) -> SymexpTwoHot:
        return SymexpTwoHot(super().forward(feat))

def lambda_return(reward: torch.Tensor, value: torch.Tensor, discount: torch.Tensor, lam: Any) -> torch.Tensor:
    """λ-returns (B, T - 1) of steps 0 … T-2 from (B, T) tensors; `lam` a number or a tensor (paper, eq. 7).
    Everything about the step from t to t+1 is read at t+1: its reward, its discount (0 if terminal), its λ and value.
    """
    # Rₜ = rₜ₊₁ + γₜ₊₁ · ((1 − λₜ₊₁) · Vₜ₊₁ + λₜ₊₁ · Rₜ₊₁),   R_{T-1} = V_{T-1}
    interim, decay = (reward + discount * (1 - lam) * value).unbind(1), (discount * lam).unbind(1)
    returns = [value[:, -1]]
    for t in reversed(range(1, value.shape[1])):
        returns.append(interim[t] + decay[t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)

class ReturnNormalizer(nn.Module):
    """Scale of the returns: a moving range between their 5th and 95th percentile, and never less than 1, so that large
    returns are scaled down but small ones, noise perhaps, are not blown up."""
    def __init__(self, rate: float = 0.01):
        super().__init__()
        self.rate = rate
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)

    @torch.no_grad()
    def forward(self, returns: torch.Tensor) -> torch.Tensor:
        """Moves the range towards that of `returns`, of any shape and over all processes, and gives the scale ()."""
        returns = returns.flatten().float()
        if dist.is_initialized():
            parts = [torch.empty_like(returns) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, returns)
            returns = torch.cat(parts)
        self.range.lerp_(torch.quantile(returns, self.percentiles), self.rate)
        return (self.range[1] - self.range[0]).clamp(min=1)

class LaProp(torch.optim.Optimizer):
    """LaProp (arXiv 2002.04839) with adaptive gradient clipping (arXiv 2102.06171) and linear warm-up.
    Unlike Adam it normalises first and averages after: momentum is a mean of steps of the same size."""
    def __init__(self, params, lr=4e-5, betas=(0.9, 0.999), eps=1e-20, agc=0.3, pmin=1e-3, warmup=1000):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, agc=agc, pmin=pmin, warmup=warmup))
        for group in self.param_groups:  # tensors, so that a CUDA graph sees them change
            device = group["params"][0].device
            group["lr"], group["updates"] = torch.tensor(lr, device=device), torch.zeros((), device=device)
            self.state |= {p: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: None = None) -> dict[str, torch.Tensor]:
        """Updates every parameter that has a gradient; returns global norms of gradient and update."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads, (beta1, beta2), t = [p.grad for p in params], group["betas"], group["updates"]
            m, v = ([self.state[p][name] for p in params] for name in "mv")
            # g ← g / max(1, ‖g‖ / (agc · max(pmin, ‖p‖))), tensor by tensor
            norms = torch._foreach_norm(grads)
            limits = torch._foreach_maximum(torch._foreach_norm(params), group["pmin"])
            torch._foreach_mul_(limits, group["agc"])
            grads = torch._foreach_div(grads, torch._foreach_maximum(torch._foreach_div(norms, limits), 1.0))
            lr = group["lr"] * (t / group["warmup"]).clamp(max=1) if group["warmup"] else group["lr"]  # first one is 0
            t += 1
            # v ← β₂·v + (1−β₂)·g²;  u = g / (√(v / (1−β₂ᵗ)) + ε)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            scale = torch._foreach_sqrt(torch._foreach_div(v, 1 - beta2**t))
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_div_(grads, scale)
            # m ← β₁·m + (1−β₁)·u;  p ← p − lr · m / (1−β₁ᵗ)
            torch._foreach_lerp_(m, grads, 1 - beta1)
            update = torch._foreach_mul(m, lr / (1 - beta1**t))
            torch._foreach_sub_(params, update)
        return {"grad_norm": torch.stack(norms).norm(), "update_norm": torch.stack(torch._foreach_norm(update)).norm()}

# ------------------------------------------------------------------------------------------------------------ the agent

def average_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replaces tensors by their means over the processes that torchrun started, in place and in one message."""
    if dist.is_initialized():
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors)])

class Captured:
    """A function of trees of tensors that CUDA replays as one graph: one launch in place of thousands. With inputs of
    new shapes the first two calls run as they are, which warms everything up, and the third is recorded. All calls work
    on the same copies of the inputs, whose strides are what is compiled for. What a replay returns is overwritten by
    the next one."""
    def __init__(self, function: Any, on: bool):
        self.function, self.on, self.graphs = function, on, {}

    def __call__(self, *inputs: Any) -> Any:
        if not self.on:
            return self.function(*inputs)
        flat, spec = tree_flatten(inputs)
        shapes = tuple(x.shape for x in flat)
        if shapes not in self.graphs:
            self.graphs[shapes] = {"calls": 0, "inputs": [x.clone() for x in flat]}
        known = self.graphs[shapes]
        known["calls"] += 1
        torch._foreach_copy_(known["inputs"], flat)
        inputs = tree_unflatten(known["inputs"], spec)
        if known["calls"] <= 2:
            stream, now = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                outputs = self.function(*inputs)
            now.wait_stream(stream)
            return outputs
        if "outputs" not in known:
            known["graph"] = torch.cuda.CUDAGraph()
            try:  # the outer context brings the stream back where the recording breaks off
                with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(known["graph"]):
                    known["outputs"] = self.function(*inputs)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph, going on without: {str(error).splitlines()[0]}")
                self.on = False
                self.graphs.clear()  # gives its memory back
                return self.function(*inputs)
        known["graph"].replay()
        return known["outputs"]

class Dreamer(nn.Module):
    """The agent: `act` on observations, `update` on batches of a ReplayBuffer, `state_dict` for what learning needs.
    Spaces are those of ONE seat, observations and actions batches of them. Raises InputError for spaces that
    cannot be used. See README for a short loop of use without this file's.
    MARL: every row of a batch is one ego with `seats` - 1 teammates. What an agent of a team has to know beyond its own
    stream is `teammates`, their flat actions, zeros where they are away."""
    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args, seats: int = 2):
        super().__init__()
        args.check()
        self.args, self.size = args, SIZES[args.size]
        self.observations = ObservationCodec(observation_space, args.image_size)
        self.actions = ActionCodec(action_space)
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        low = args.precision == "bfloat16" or (args.precision == "auto" and self.device.type == "cuda")
        self.compute_dtype = torch.bfloat16 if low else torch.float32
        feat, units = self.size.deter + self.size.latents * self.size.classes, self.size.units
        if seats < 2:  # MARL
            raise InputError(f"seats {seats} leaves nobody to predict: there must be at least 2, or use dreamer.py")
        self.seats = seats
        self.wm = WorldModel(self.observations.leaves, self.actions.size, self.size, self.actions.heads, seats, args)
        self.actor = Actor(feat, self.actions.heads, units)
        self.critic, self.slow_critic = Critic(feat, units), Critic(feat, units).requires_grad_(False)
        self.slow_critic.load_state_dict(self.critic.state_dict())
        self.retnorm = ReturnNormalizer()
        self.to(self.device)
        self.learned = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = LaProp(self.learned, args.learning_rate, agc=args.agc, warmup=args.warmup)
        # acting has noise of its own: playing an evaluation does not change what is learned
        seed = args.seed + (2 * dist.get_rank() if dist.is_initialized() else 0)
        self.act_rng, self.learn_rng = (torch.Generator(self.device).manual_seed(seed + i) for i in (0, 1))
        cuda = self.device.type == "cuda"
        if args.compile:
            for owner, name in self.compiled():
                setattr(owner, name, torch.compile(getattr(owner, name)))
        self.fast_learn, self.fast_respond = (
            Captured(function, cuda and args.cuda_graph) for function in (self.learn, self.respond))

    def compiled(self) -> list[tuple[nn.Module, str]]:
        """What torch.compile makes a few kernels of: single steps of the loops over time and what lies between them.
        Not replay_value_loss: its loop over time takes 20 s more to compile and saves a hundredth of an update. Nor, on
        a CPU, the CNN, whose max-pooling would get a backward several times slower than PyTorch's own."""
        wm = self.wm
        encode = [] if wm.encoder.images and self.device.type == "cpu" else [(wm, "encode")]
        return [*encode, (wm.rssm, "obs_step"), (wm, "head_losses"),
                (self, "policy"), (wm.rssm, "img_step"), (self, "judge")]

    def replay_specs(self) -> dict[str, tuple]:
        """Rows for a ReplayBuffer: name → (shape, dtype) of what act and the environment yield at one step."""
        dtypes = {"image": torch.uint8, "vector": torch.float32, "discrete": torch.int64}
        return {**{f"obs/{k}": (leaf.shape, dtypes[leaf.kind]) for k, leaf in self.observations.leaves.items()},
                "action": ((self.actions.size,), torch.float32), "reward": ((), torch.float32),
                **{k: ((), torch.bool) for k in ("is_first", "is_last", "is_terminal")},
                # MARL: what teammates did, whether they are in the game, the nats of it to an ideal observer (NaN where
                # unknown, for comparison only), and whether ego itself is in the game
                "teammates": ((self.seats - 1, self.actions.size), torch.float32),
                "active": ((self.seats - 1,), torch.bool), "bayes": ((self.seats - 1,), torch.float32),
                "valid": ((), torch.bool),
                "deter": ((self.size.deter,), torch.bfloat16), "stoch": ((self.size.latents,), torch.uint8)}

    def noise(self, rng: torch.Generator, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.rand(shape, generator=rng, device=self.device) for shape in shapes]

    def upload(self, x: np.ndarray) -> torch.Tensor:
        """Array → tensor on the device, without waiting for the copy."""
        x = torch.as_tensor(x)
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    @torch.no_grad()
    def act(self, obs: Any, state: dict[str, Any] | None, is_first: np.ndarray, deterministic: bool = False,
            teammates: Any = None, rng: torch.Generator | None = None):
        """Chooses actions for a batch of observations.
        obs: batch (N, …) as a vector environment returns it; state: what the last call returned, None at the start;
        is_first: (N,) bool, where an episode begins; deterministic: modes of latents and actions in place of samples.
        Returns actions for the environment and the new state, which also is the agent's part of a replay step:
        obs/…, action, deter and stoch, see `replay_specs`.
        MARL: teammates: (N, K - 1, A) what they did at the last step, as encode_action gives it, zeros where they were
        away; None stands for what the ToM head guessed at that step. rng: noise of another source than the agent's."""
        encoded, n = self.observations(obs), len(is_first)
        if state is None:
            deter, stoch = self.wm.rssm.initial(n, self.device)
            state = {"deter": deter, "onehot": stoch, "action": torch.zeros(n, self.actions.size, device=self.device)}
            state["guess"] = torch.zeros(n, self.seats - 1, self.actions.size, device=self.device)  # MARL
        noise = self.noise(rng or self.act_rng, (n, 1, self.size.latents, 1), (n, self.actions.noise),
                           (n, self.seats - 1, self.actions.noise))
        # MARL: the joint action of the last step; where teammates are not seen, the guess of that step
        mates = state["guess"] if teammates is None else self.upload(np.asarray(teammates, np.float32))
        inputs = ({k: self.upload(x) for k, x in encoded.items()}, state["deter"], state["onehot"],
                  self.wm.joint(state["action"], mates), self.upload(is_first))
        # MARL: a partner plays in as many environments as it was drawn for, too many shapes to record a graph of each
        respond = self.respond if rng else self.fast_respond
        with torch.compiler.set_stance("force_eager"):  # what is compiled is compiled for the shapes of learning
            out = self.respond(*inputs) if deterministic else [x.clone() for x in respond(*inputs, *noise)]  # MARL
        fresh = dict(zip(("deter", "onehot", "stoch", "action", "guess"), out))
        return self.actions.decode(fresh["action"].cpu().numpy()), fresh | {f"obs/{k}": x for k, x in encoded.items()}

    def respond(self, obs: dict[str, torch.Tensor], deter, stoch, prev_action, is_first, z_noise=None, a_noise=None,
                t_noise=None):
        """The part of `act` that is nothing but tensors (N, …): new deter, stoch, its class indices, and the action.
        MARL: prev_action is the joint one, t_noise (N, K - 1, …) for the guess of the teammates' actions at the end."""
        tokens = self.wm.encode({k: x[:, None] for k, x in obs.items()})
        deter, stoch, _ = self.wm.rssm.observe(deter, stoch, tokens, prev_action[:, None], is_first[:, None], z_noise)
        deter, stoch = deter[:, 0], stoch[:, 0]
        action, guess = self.actor(features(deter, stoch)).sample(a_noise), self.wm.teammates(deter, stoch)  # MARL
        return deter, stoch, stoch.argmax(-1), action, guess.sample(t_noise)

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Lays a sampled batch (B, T + 1, …) out for learning: T steps with the actions before them, and the carry."""
        x = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if k not in ("env", "row")}
        onehot = F.one_hot(x["stoch"][:, 0].long(), self.size.classes).float()
        return {"obs": {k[4:]: v[:, 1:] for k, v in x.items() if k.startswith("obs/")},
                "carry": (x["deter"][:, 0].float(), onehot),
                **{k: x[k][:, 1:] for k in ("reward", "is_first", "is_last", "is_terminal")},
                # MARL: the joint action before each step, and the teammates' at it; at an end nobody acts any more
                "prev_action": self.wm.joint(x["action"], x["teammates"])[:, :-1],
                **{k: x[k][:, 1:] for k in ("action", "teammates", "active", "valid", "bayes")},
                "acts": (x["active"] & (x["valid"] & ~x["is_last"])[..., None])[:, 1:].float()}

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One optimizer step on a batch of ReplayBuffer.sample: losses and diagnostics as 0-d tensors on the device.
        "deter" and "stoch" of `batch` then hold the fresh latents (B, T, …), for ReplayBuffer.write_back."""
        data, (b, t) = self.prepare(batch), batch["reward"][:, 1:].shape
        h, s, n = self.args.imagination_horizon, self.size.latents, b * min(self.args.imag_last or t, t)
        actions = self.seats * self.actions.noise  # MARL: the actor's numbers, then the teammates'
        noise = self.noise(self.learn_rng, (b, t, s, 1), (h, n, s, 1), (h + 1, n, actions))
        metrics, (batch["deter"], batch["stoch"]) = self.fast_learn(data, noise)
        return metrics

    def learn(self, data: dict[str, Any], noise: list[torch.Tensor]):
        """The part of `update` that is nothing but tensors of fixed shapes, never waited for by the CPU."""
        loss, metrics, latents = self.loss(data, noise)
        self.optimizer.zero_grad()
        loss.backward()
        average_over_processes([p.grad for p in self.learned])
        metrics |= {f"diagnostics/{k}": x for k, x in self.optimizer.step().items()}
        with torch.no_grad():  # or the slow critic would become part of an autograd graph that grows with every update
            torch._foreach_lerp_(list(self.slow_critic.parameters()), list(self.critic.parameters()), self.args.tau)
        return metrics, latents

    def loss(self, data: dict[str, Any], noise: list[torch.Tensor] | tuple[None, None, None]):
        """forward() in the number format of the computation: weights are cast once, gradients reach the originals."""
        if self.compute_dtype == torch.float32:
            return self(data, noise)
        low = {k: p.to(self.compute_dtype) for k, p in self.named_parameters()}
        return torch.func.functional_call(self, low, (data, noise))

    def forward(self, data: dict[str, Any], noise: list[torch.Tensor] | tuple[None, None, None]):
        """The whole objective. noise: uniform numbers for posterior, dreams and actions, or Nones for modes.
        Returns the loss (), metrics (0-d tensors, no gradient) and the posterior (deter, class indices)."""
        args = self.args
        gamma = args.gamma if args.contdisc else 1.0  # the discount of the continue target
        losses, (deter, stoch, _), metrics = self.wm.loss(data, noise[0], gamma, args.free_nats)
        end = slice(-args.imag_last or None, None)  # the steps that dreams start from
        starts = deter[:, end], stoch[:, end]
        # MARL: nothing is learned where ego is not in the game. There are as many dreams as ever, for shapes must not
        # change: they `begin` at the steps where it is, again and again, and the first `count` of them are learned from
        valid, here = data["valid"], data["valid"][:, end]
        order, count = (~here).flatten().int().argsort(stable=True), here.sum()
        slots = torch.arange(here.numel(), device=here.device)
        begin, first = order[slots % count.clamp(min=1)], (slots < count)[:, None]
        imag_losses, returns, imag_metrics = self.imagination_loss(
            *(x.flatten(0, 1)[begin] for x in (*starts, data["active"][:, end])), *noise[1:])
        losses["repval"], real_return = self.replay_value_loss(
            {k: data[k][:, end] for k in ("reward", "is_last", "is_terminal")}, features(*starts),
            returns[:, 0][order.argsort()].view(here.shape))
        # MARL: means over the steps where ego is, as means over all of the masked losses
        masks = {k: valid for k in losses} | {"repval": here[:, :-1]} | {k: first for k in imag_losses}
        losses = {k: x * masks[k] / masks[k].float().mean().clamp(min=1e-9) for k, x in (losses | imag_losses).items()}
        scales = dict(dyn=args.dyn_scale, rep=args.rep_scale, rec=args.rec_scale, rew=1, con=1, policy=1, value=1,
                      repval=args.repval_scale, tom=args.tom_scale)  # MARL
        assert losses.keys() == scales.keys(), (losses.keys(), scales.keys())
        loss = sum(scales[k] * x.mean() for k, x in losses.items())
        metrics |= imag_metrics | {"real_reward": data["reward"].mean(), "real_return": real_return.mean()}
        report = {f"losses/{k}": x.mean().detach() for k, x in (losses | {"total": loss}).items()}
        report |= {f"diagnostics/{k}": x.detach().clone() for k, x in metrics.items()}
        report |= {f"tom/{k}": x for k, x in self.tom_metrics(data, deter, stoch).items()}  # MARL
        return loss, report, (deter.detach(), stoch.detach().argmax(-1))

    @torch.no_grad()
    def tom_metrics(self, data: dict[str, Any], deter: torch.Tensor, stoch: torch.Tensor) -> dict[str, torch.Tensor]:
        """How well the ToM head knows the teammates, on a batch; see `skill`."""
        dist, actions = self.wm.teammates(deter, stoch), data["teammates"]
        nats = -dist.log_prob(actions)
        return skill(self.actions.heads, actions, data["acts"] > 0, nats, data["bayes"], expected(dist))

    def imagination_loss(self, deter: torch.Tensor, stoch: torch.Tensor, active: torch.Tensor, z_noise: Any,
                         a_noise: Any):
        """Dreams from every state (N, …), with noise as in RSSM.imagine or Nones; returns losses of actor and critic
        (N, H), the λ-returns (N, H) and metrics. MARL: teammates who are `active` (N, K - 1) stay so to a dream's end.
        """
        def policy(h, z, t) -> torch.Tensor:
            return self.policy(h, z, active, None if a_noise is None else a_noise[t])

        with torch.no_grad():  # REINFORCE needs no gradient through the dream
            horizon = self.args.imagination_horizon
            deter, stoch, action = self.wm.rssm.imagine(deter.detach(), stoch.detach(), policy, horizon, z_noise)
        x = self.judge(deter, stoch, action)
        scale = self.retnorm(x["tar"])
        advantage = (x["tar"] - x["val"][:, :-1]) / scale
        losses = {
            # −w · (sg(A) · ln π(a) + η · H[π]); MARL: a is ego's own
            "policy": -x["weight"][:, :-1] * (x["logp"] * advantage + self.args.ent_coef * x["policy_entropy"]),
            "value": x["weight"][:, :-1] * x["value_loss"],
        }
        low, high = self.retnorm.range
        normed = (x["tar"] - low) / scale
        means = {k: x[k] for k in ("rew", "con", "val", "tar", "weight", "slowval", "policy_entropy")} | dict(
            adv=advantage, adv_mag=advantage.abs(), ret=normed, ret_rate=(normed.abs() >= 1).float())
        metrics = {k: v.mean() for k, v in means.items()} | dict(
            adv_std=advantage.std(correction=0), ret_min=normed.min(), ret_max=normed.max(), ret_low=low, ret_high=high)
        return losses, x["tar"], metrics

    def policy(self, deter: torch.Tensor, stoch: torch.Tensor, active: torch.Tensor, noise: torch.Tensor | None):
        """MARL: social imagination. Joint actions (N, K·A) in a dream, drawn at the same time: the actor acts for ego,
        a⁰ ~ π(h, z), and the ToM head for the teammates that are `active`, aʲ ~ π̂ʲ(h, z_team)."""
        own, mates = (None, None) if noise is None else noise.tensor_split([self.actions.noise], -1)
        mates = None if mates is None else mates.unflatten(-1, (self.seats - 1, -1))
        guess = self.wm.teammates(deter, stoch).sample(mates) * active[..., None]
        return self.wm.joint(self.actor(features(deter, stoch)).sample(own), guess)

    def judge(self, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> dict[str, torch.Tensor]:
        """What heads, actor and critics say to dreams (H + 1, N, …). At all steps, (N, H + 1): rew, con, val, slowval,
        weight. At all but the last, (N, H): the λ-returns `tar`, logp of the actions, policy_entropy and value_loss."""
        own = action[..., : self.actions.size]  # MARL: ego's part of the joint action, that the policy answers for
        with torch.no_grad():
            feat = features(deter, stoch)
            reward = SymexpTwoHot(self.wm.reward(feat)).pred().t()
            gamma = 1.0 if self.args.contdisc else self.args.gamma  # with contdisc the prediction holds it already
            cont = self.wm.cont(feat)[..., 0].float().sigmoid().t() * gamma
            slow_value = self.slow_critic(feat).pred().t()
            weight = cont.cumprod(1) / gamma  # how likely the dream still goes on; at first, whether x was terminal
        critic, dist = self.critic(feat), self.actor(feat[:-1])
        value = critic.pred().detach().t()
        returns = lambda_return(reward, value, cont, self.args.return_lambda)
        # −ln p(sg(R)) − ln p(sg(V_slow))
        value_loss = SymexpTwoHot(critic.logits[:-1]).loss(returns.t(), slow_value[:, :-1].t()).t()
        return dict(rew=reward, con=cont, val=value, slowval=slow_value, weight=weight, tar=returns,
                    logp=dist.log_prob(own).t(), policy_entropy=dist.entropy().t(), value_loss=value_loss)

    def replay_value_loss(self, data: dict[str, Any], feat: torch.Tensor, bootstrap: torch.Tensor):
        """Critic loss and λ-returns (B, T - 1) on real rewards, with gradient into the world model. bootstrap (B, T):
        the return of the dream that began at each step stands for its value."""
        discount = (~data["is_terminal"]).float() * self.args.gamma
        lam = (~data["is_last"]).float() * self.args.return_lambda  # what follows an episode's end is another's
        returns = lambda_return(data["reward"], bootstrap, discount, lam)
        with torch.no_grad():
            slow_value = self.slow_critic(feat[:, :-1].detach()).pred()
        critic = self.critic(feat[:, :-1])
        return (~data["is_last"][:, :-1]).float() * critic.loss(returns, slow_value), returns

    def get_extra_state(self) -> dict[str, Any]:
        """What state_dict holds beside weights and buffers: the optimizer's averages and the generators."""
        return {"optimizer": self.optimizer.state_dict(), "act_rng": self.act_rng.get_state(),
                "learn_rng": self.learn_rng.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        group, saved = self.optimizer.param_groups[0], state["optimizer"]
        for p, averages in zip(group["params"], saved["state"].values()):  # in place: a CUDA graph knows the addresses
            for name, value in averages.items():
                self.optimizer.state[p][name].copy_(value)
        group["updates"].copy_(saved["param_groups"][0]["updates"])
        for name in ("act_rng", "learn_rng"):
            rng, rng_state = getattr(self, name), state[name].cpu()
            if len(rng_state) == len(rng.get_state()):  # a GPU's generator cannot go on where a CPU's stopped
                rng.set_state(rng_state)

def skill(heads: dict[str, tuple], actions: torch.Tensor, acts: torch.Tensor, nats: torch.Tensor, bayes: torch.Tensor,
          guess: torch.Tensor) -> dict[str, torch.Tensor]:
    """Measures of a ToM head over all (…, K - 1) where `acts`. cross_entropy: the mean of `nats`, its −log π̂(a).
    marginal: that of who knows only how often each teammate does what. For choices also accuracy, of the most likely
    one in `guess`; bayes, that of an ideal observer, and 0 where none is known; and skill, (marginal − cross_entropy) /
    (marginal − bayes): 1 is all that can be known, 0 nothing. No step of this waits for the device."""
    count, marginal, right, start = acts.sum().clamp(min=1), torch.zeros((), device=nats.device), [], 0
    mask = acts[..., None].float()
    weights = acts.flatten(0, -2).sum(0).float()  # (K - 1,)
    for kind, n in heads.values():
        for width in n if kind == "discrete" else (n,):
            x, start = actions[..., start : start + width], start + width
            mean = (x * mask).flatten(0, -3).sum(0) / weights.clamp(min=1)[:, None]  # (K - 1, width)
            if kind == "discrete":
                own = -(mean * mean.clamp(min=1e-9).log()).sum(-1)
                right.append(x.argmax(-1) == guess[..., start - width : start].argmax(-1))
            else:
                var = (((x - mean) * mask) ** 2).flatten(0, -3).sum(0) / weights.clamp(min=1)[:, None]
                own = 0.5 * (2 * np.pi * np.e * var.clamp(min=1e-6)).log().sum(-1)
            marginal = marginal + (own * weights).sum() / count
    out = {"cross_entropy": (nats * acts).sum() / count, "marginal": marginal}
    if right and len(right) == sum(len(n) if kind == "discrete" else 1 for kind, n in heads.values()):
        out["bayes"] = torch.where(acts & bayes.isfinite(), bayes, torch.zeros_like(bayes)).sum() / count
        out["accuracy"] = (torch.stack(right).float().mean(0) * acts).sum() / count
        out["skill"] = (marginal - out["cross_entropy"]) / (marginal - out["bayes"]).clamp(min=1e-6)
    return out

# -------------------------------------------------------------------------------------------- MARL: who plays the seats

def seat_spaces(args: Args) -> tuple[gym.spaces.Dict, gym.Space, int, tuple[str, ...]]:
    """Observation and action space of a seat, as seat_view fills them, the number of seats, and all scripts."""
    with contextlib.closing(make_env(args, 0, False, "")()) as env:
        k, spaces = len(env.names), {**env.seat_space.spaces, "seat": gym.spaces.Discrete(len(env.names))}
        if args.oracle:
            spaces["scripts"] = gym.spaces.MultiDiscrete([len(env.known) + 1] * (k - 1))
        return gym.spaces.Dict(spaces), env.seat_action, k, env.known

def seat_view(obs: dict[str, np.ndarray], env: np.ndarray, seat: np.ndarray, oracle: bool = False) -> dict[str, Any]:
    """What the seats (env, seat) see, as rows of one batch: their own observation and the number of the seat. Where
    `oracle`, also which scripts play the others, 0 for none."""
    view = {k[4:]: x[env, seat] for k, x in obs.items() if k.startswith("obs/")} | {"seat": seat}
    if oracle:
        view["scripts"] = obs["script"][env[:, None], others(seat, obs["script"].shape[1])] + 1
    return view

def others(seat: np.ndarray, seats: int) -> np.ndarray:
    """(N,) → (N, K - 1): the other seats, in their order."""
    table = np.array([[j for j in range(seats) if j != i] for i in range(seats)]).reshape(seats, seats - 1)
    return table[seat]

class Pool:
    """Frozen copies of past selves, and who is met next. x, the rate of victories of the learner over a member, decays
    towards 1/2 and begins there: (1 + wins) / (2 + games), each victory worth 0.95 of the next."""
    decay = 0.95

    def __init__(self, size: int, weighting: str, seed: int):
        self.size, self.weighting, self.rng = size, weighting, np.random.default_rng(seed)
        self.members: dict[int, Dreamer] = {}  # by id, in the order of their coming
        self.wins: dict[int, float] = {}
        self.games: dict[int, float] = {}
        self.next = 0

    def add(self, agent: "Dreamer", weights: dict[str, torch.Tensor] | None = None) -> int:
        """A deep copy on the CPU of what acts; of `agent` or, given `weights`, of one like it. Returns its id."""
        unused = (agent.optimizer, agent.learned, agent.act_rng, agent.learn_rng, agent.fast_learn, agent.fast_respond,
                  agent.critic, agent.slow_critic, agent.wm.decoder, agent.wm.reward, agent.wm.cont)
        member = copy.deepcopy(agent, {id(x): None for x in unused}).to("cpu").requires_grad_(False)
        member.device = torch.device("cpu")
        for owner, name in member.compiled():  # compiled ones are bound to the learner's weights
            vars(owner).pop(name, None)
        if weights:
            member.load_state_dict({k: weights[k] for k in dict(member.named_parameters())}, strict=False)
        if len(self.members) == self.size:  # whose neighbours are closest together is missed least
            ids = list(self.members)
            gaps = [ids[i + 1] - ids[i - 1] for i in range(1, len(ids) - 1)]
            evicted = ids[1 + int(np.argmin(gaps))]
            for table in (self.members, self.wins, self.games):
                del table[evicted]
        number, self.next = self.next, self.next + 1
        self.members[number], self.wins[number], self.games[number] = member, 0.0, 0.0
        return number

    def weights(self) -> np.ndarray:
        """Probabilities of the members; never zero, however certain a result seems."""
        x = np.array([(1 + self.wins[i]) / (2 + self.games[i]) for i in self.members])
        w = {"uniform": np.ones_like(x), "hard": (1 - x) ** 2, "even": x * (1 - x)}[self.weighting] + 1e-3
        return w / w.sum()

    def draw(self) -> int | None:
        """Who plays the next episode: half of the time None, the live policy."""
        if not self.members or self.rng.random() < 0.5:
            return None
        return int(self.rng.choice(list(self.members), p=self.weights()))

    def aside(self) -> "Pool":
        """The same members for an evaluation or a picture, whose draws leave those of the run as they are."""
        other = copy.copy(self)
        other.rng = copy.deepcopy(self.rng)
        return other

    def report(self, number: int | None, won: float) -> None:
        """1 for a victory of the learner, 0.5 for a tie, 0 for a defeat; of who has left, nothing is kept."""
        if number in self.members:
            self.wins[number] = self.decay * self.wins[number] + float(won)
            self.games[number] = self.decay * self.games[number] + 1

    def state_dict(self) -> dict[str, Any]:
        weights = {i: {k: p.detach().clone() for k, p in m.named_parameters()} for i, m in self.members.items()}
        return {"members": weights, "wins": dict(self.wins), "games": dict(self.games), "next": self.next,
                "rng": json.dumps(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any], agent: "Dreamer") -> None:
        self.members, self.wins, self.games = {}, {}, {}
        for number, weights in state["members"].items():
            self.next = number
            self.add(agent, weights)
        self.wins, self.games, self.next = dict(state["wins"]), dict(state["games"]), state["next"]
        self.rng.bit_generator.state = json.loads(state["rng"])

class Table:
    """Who sits where in `num_envs` environments, and the game from the learner's seats: fold agents into the batch.
    With self-play every seat of every environment is a row (a stream of the replay), else the drawn one of each."""
    def __init__(self, agent: "Dreamer", num_envs: int, pool: Pool | None = None, partner: int | str | None = None,
                 scripts: tuple[str, ...] = ()):
        """partner: a member of the pool (number) to play all the other seats, "live" for the agent itself, None to
        draw; only with `pool`. scripts: their names, for reports."""
        self.agent, self.args, self.pool, self.partner, self.scripts = agent, agent.args, pool, partner, scripts
        n, k = num_envs, agent.seats
        self.k, self.all = k, agent.args.partners == "self"
        self.env = np.repeat(np.arange(n), k) if self.all else np.arange(n)  # (S,) environment of each row
        self.seat = np.tile(np.arange(k), n) if self.all else np.zeros(n, int)
        seed = agent.args.seed + 10_000 + (2 * dist.get_rank() if dist.is_initialized() else 0)
        self.rng = torch.Generator().manual_seed(seed)  # of the partners alone
        self.live_rng = torch.Generator(agent.device).manual_seed(seed + 1)
        self.state: dict[str, Any] | None = None
        self.joint = np.zeros((n, k, agent.actions.size), np.float32)  # what all did at the last step
        self.active = np.zeros((n, k), bool)
        self.partners: list[int | None] = [None] * n  # who plays the other seats of an environment
        self.members: dict[int, Dreamer] = {}  # those who play now, for the pool may drop them in the meantime
        self.memory: dict[int | None, dict[str, torch.Tensor]] = {}  # recurrent states (n·K, …) of a partner
        self.score = np.zeros((n, k))  # rewards of the running episodes, by seat

    def rows(self, x: np.ndarray) -> np.ndarray:
        """(E, K, …) → (S, …) of the learner's seats."""
        return x[self.env, self.seat]

    def mates(self, x: np.ndarray) -> np.ndarray:
        """(E, K, …) → (S, K - 1, …) of their teammates."""
        return x[self.env[:, None], others(self.seat, self.k)]

    def seen(self, env: np.ndarray, seat: np.ndarray) -> np.ndarray | None:
        """What the seats saw their teammates do at the last step, (N, K - 1, A)."""
        if not self.args.observe_teammates:
            return None
        return self.joint[env[:, None], others(seat, self.k)]

    def act(self, obs: dict[str, np.ndarray], first: np.ndarray, deterministic: bool = False):
        """One step of everyone. obs: of the vector environment; first: (E,) bool, where an episode begins. Returns the
        actions of all (E, K, A), for the environment, and the rows (S, …) of a replay step, what arrived included."""
        self.seat = self.seat if self.all else obs["learner"]
        view = seat_view(obs, self.env, self.seat, self.args.oracle)
        _, self.state = self.agent.act(view, self.state, first[self.env], deterministic, self.seen(self.env, self.seat))
        joint = obs["play"].copy() if self.args.partners == "scripted" else np.zeros_like(self.joint)
        if self.pool is not None:
            self.play_others(obs, first, joint)
        joint[self.env, self.seat] = self.state["action"].cpu().numpy()
        self.score = np.where(first[:, None], 0, self.score) + obs["reward"]
        self.active = obs["active"].astype(bool)
        self.joint = np.where(self.active[..., None], joint, 0)
        self.state["guess"] *= torch.as_tensor(self.mates(self.active), device=self.agent.device)[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN where there is no ideal observer
            bayes = -np.log((obs["bayes"] * self.joint).sum(-1))
        flags = {name: self.rows(obs[name]).astype(bool) for name in ("last", "terminal", "here")}
        return self.joint, {
            **self.state, "teammates": self.mates(self.joint), "active": self.mates(self.active),
            "bayes": self.mates(bayes), "valid": flags["here"], "reward": self.rows(obs["reward"]),
            "is_first": first[self.env], "is_last": flags["last"], "is_terminal": flags["terminal"]}

    def finish(self, obs: dict[str, np.ndarray], e: int) -> tuple[float, str | None]:
        """What is to be said of environment `e` when its episode ends with `obs`: the learner's return (with self-play
        the mean of the seats') and the name of its partner, to whom the pool counts the result."""
        score = self.score[e] + obs["reward"][e]
        own = float(score.mean() if self.all else score[obs["learner"][e]])
        if self.pool is not None:
            rest = (score.sum() - own) / (self.k - 1)
            self.pool.report(self.partners[e], 0.5 + 0.5 * np.sign(own - rest))
            return own, "live" if self.partners[e] is None else f"pool_{self.partners[e]}"
        names = {int(i) for i in obs["script"][e]} - {-1}
        return own, self.scripts[names.pop()] if len(names) == 1 and self.scripts else None

    def play_others(self, obs: dict[str, np.ndarray], first: np.ndarray, joint: np.ndarray) -> None:
        """Fills `joint` for the seats of the partners. Each partner keeps one recurrent state for every seat of every
        environment, and has noise of its own, so that the learner's state and generator are not touched."""
        for e in np.flatnonzero(first):
            drawn = self.pool.draw() if self.partner is None else self.partner
            self.partners[e] = None if drawn == "live" else drawn
        present = set(self.partners)
        self.members = {i: self.members[i] if i in self.members else self.pool.members[i] for i in present - {None}}
        self.memory = {i: x for i, x in self.memory.items() if i in self.members or i is None}
        env, seat = (x.ravel() for x in np.indices(joint.shape[:2]))
        for who in sorted(present, key=str):
            mine = np.flatnonzero((np.array([self.partners[e] == who for e in env])) & (seat != self.seat[env]))
            member, rng = (self.agent, self.live_rng) if who is None else (self.members[who], self.rng)
            e, k = env[mine], seat[mine]
            state = None if who not in self.memory else {name: x[mine] for name, x in self.memory[who].items()}
            _, new = member.act(seat_view(obs, e, k), state, first[e], False, self.seen(e, k), rng)
            joint[e, k] = new["action"].cpu().numpy()
            new = {name: new[name] for name in ("deter", "onehot", "action", "guess")}
            there = obs["active"].astype(bool)[e[:, None], others(k, self.k)]
            new["guess"] *= torch.as_tensor(there, device=new["guess"].device)[..., None]
            if who not in self.memory:
                self.memory[who] = {name: x.new_zeros(len(env), *x.shape[1:]) for name, x in new.items()}
            for name, x in new.items():
                self.memory[who][name][mine] = x

# --------------------------------------------------------------------------------- evaluation, pictures and checkpoints

@contextlib.contextmanager
def leave_no_trace(*generators: torch.Generator):
    """Puts the generators back where they were: to look at a run must not change it."""
    states = [rng.get_state() for rng in generators]
    try:
        yield
    finally:
        for rng, state in zip(generators, states):
            rng.set_state(state)

@torch.no_grad()
def evaluate(agent: Dreamer, args: Args, episodes: int, run_name: str = "eval", deterministic: bool = False,
             capture_video: bool = False, max_steps: int = 27_000, scripts: tuple[str, ...] | None = None,
             pool: Pool | None = None, partner: int | str | None = None) -> dict[str, Any]:
    """Plays `episodes` episodes at once in as many environments: each gives its first, so that short episodes are not
    favoured. An episode longer than `max_steps` counts as far as that. Returns "returns", the learner's undiscounted
    sums of reward (with self-play the mean of the seats'), "team_returns", the sums over all seats, and "tom", the
    measures of `skill`. MARL: the partners are those of training, or named by `scripts` or `partner` (see Table)."""
    first, done, running = np.ones(episodes, bool), np.zeros(episodes, bool), np.ones(episodes, bool)
    table, log = Table(agent, episodes, pool and pool.aside(), partner), []
    envs = make_vector_env(args, episodes, run_name, capture_video, scripts)
    with contextlib.closing(envs), leave_no_trace(agent.act_rng):
        obs, _ = envs.reset(seed=args.seed + 10_000, options={"steps": np.inf})  # past all shaping of rewards
        learner, scores = obs["learner"], np.zeros((episodes, table.k))
        for _ in range(max_steps):
            action, rows = table.act(obs, first, deterministic)
            # MARL: what the ToM head says of this step, while the episode counts and where somebody acts
            dist, actions = agent.wm.teammates(rows["deter"], rows["onehot"]), torch.as_tensor(rows["teammates"])
            acts = rows["active"] & (rows["valid"] & ~rows["is_last"] & running[table.env])[:, None]
            nats = -dist.log_prob(actions.to(agent.device)).cpu()
            log.append((actions, torch.as_tensor(acts), nats, torch.as_tensor(rows["bayes"]), expected(dist).cpu()))
            obs, _, ended, _, _ = envs.step(action)
            scores += np.where(running[:, None], obs["reward"], 0.0)
            first, done = done, ended
            running &= ~done
            if not running.any():
                break
    returns = scores.mean(1) if table.all else scores[np.arange(episodes), learner]
    measures = skill(agent.actions.heads, *(torch.stack(x) for x in zip(*log)))
    return {"returns": returns.tolist(), "team_returns": scores.sum(1).tolist(),
            "tom": {k: float(x) for k, x in measures.items()}}

def evaluate_partners(agent: Dreamer, args: Args, pool: Pool | None, run_name: str) -> dict[str, dict[str, float]]:
    """Mean return against each partner alone, held-out ones included: scripts by name, or the live policy and every
    member of the pool ("pool_7"). {} for self-play."""
    each: list[tuple[str, dict[str, Any]]] = []
    if args.partners == "scripted":
        with contextlib.closing(make_env(args, 0, False, run_name)()) as env:
            each = [(name, {"scripts": (name,)}) for name in (*env.scripts, *args.held_out)]
    if pool is not None:
        each = [("live", {"pool": pool, "partner": "live"})]
        each += [(f"pool_{number}", {"pool": pool, "partner": number}) for number in pool.members]
    out = {}
    for name, who in each:
        result = evaluate(agent, args, args.eval_episodes, run_name, args.deterministic, **who)
        out[name] = {"return": float(np.mean(result["returns"])), "team_return": float(np.mean(result["team_returns"])),
                     **{k: x for k, x in result["tom"].items() if k in ("cross_entropy", "marginal", "accuracy")}}
    return out

def assess(agent: Dreamer, args: Args, pool: Pool | None, run_name: str, each: bool = False,
           capture_video: bool = False) -> dict[str, Any]:
    """What summary.json says of an evaluation: with the partners of training and, if `each`, with each one alone."""
    result = evaluate(agent, args, args.eval_episodes, run_name, args.deterministic, capture_video, pool=pool)
    returns, team = result["returns"], result["team_returns"]
    return {"eval_return_mean": float(np.mean(returns)), "eval_return_std": float(np.std(returns)),
            "eval_team_return_mean": float(np.mean(team)), "eval_tom": result["tom"], "eval_returns": returns,
            **({"eval_partners": evaluate_partners(agent, args, pool, run_name)} if each else {})}

def sentence(result: dict[str, Any]) -> str:
    """The same in a line."""
    tom = ", ".join(f"{k} {x:.3f}" for k, x in result["eval_tom"].items())
    return (f"return {result['eval_return_mean']:.2f} ± {result['eval_return_std']:.2f} (team "
            f"{result['eval_team_return_mean']:.2f}), ToM {tom}")

def draw_dreams(agent: Dreamer, buffer: ReplayBuffer, context: int = 5, sequences: int = 6) -> dict[str, Any]:
    """What the model predicts against what happened: key → frames of six sequences (rows: true, model, difference; the
    bar is green while the model sees, red while it dreams), or for vectors one of curves (black: true, orange: model).
    """
    from PIL import Image, ImageDraw

    data, pictures = agent.prepare(buffer.sample(sequences, online=False)), {}
    length = data["reward"].shape[1]
    context = min(context, length - 1)
    noise, = agent.noise(agent.act_rng, (sequences, length, agent.size.latents, 1))
    for key, model in agent.wm.dream(data, context, noise).items():
        true, model, kind = data["obs"][key].float().cpu(), model.cpu(), agent.observations.leaves[key].kind
        if kind == "image":
            true, side = true / 255, true.shape[2]
            rows = torch.cat([true, model, (model - true + 1) / 2], 2)  # (B, T, 3H, W, C)
            video = (rows.permute(1, 2, 0, 3, 4).flatten(2, 3) * 255).byte()  # (T, 3H, B·W, C)
            video = video[..., :3] if video.shape[-1] >= 3 else video[..., :1].repeat(1, 1, 1, 3)
            video[:context, side : side + 2] = torch.tensor([0, 200, 0], dtype=torch.uint8)
            video[context:, side : side + 2] = torch.tensor([200, 0, 0], dtype=torch.uint8)
            pictures[key] = [Image.fromarray(frame.numpy()) for frame in video]
        elif kind == "vector":
            curves = torch.stack([symlog(true[0]), model[0]])[..., :6]  # (2, T, n): components of one sequence
            low, high, (n, x) = curves.amin((0, 1)), curves.amax((0, 1)), (curves.shape[-1], 400 / length)
            curves = 75 - 70 * (curves - low) / (high - low).clamp(min=1e-6) + 80 * torch.arange(n)  # from the top
            pictures[key] = [Image.new("RGB", (400, 80 * n), "white")]
            draw = ImageDraw.Draw(pictures[key][0])
            draw.line([(x * context, 0), (x * context, 80 * n)], "gray")
            for color, lines in zip(("black", "darkorange"), curves.transpose(1, 2).tolist()):
                for line in lines:
                    draw.line([(x * t, y) for t, y in enumerate(line)], color, 2)
    return pictures

def draw_teammates(agent: Dreamer, buffer: ReplayBuffer, context: int = 4, sequences: int = 6) -> dict[str, Any]:
    """What teammates did against what the model dreams of them, time to the right; to the left of the red line it still
    sees. Choices: a row each, the darker the likelier to the ToM head, framed what was done, dotted what was dreamed,
    struck out where nobody acted or another episode has begun. Numbers: black what was done, orange the mean and dots
    the samples of the ToM head."""
    from PIL import Image, ImageDraw

    batch, cell = buffer.sample(20 * sequences, online=False), 14
    context = min(context, batch["reward"].shape[1] - 2)
    another = batch["is_first"][:, 1 + context :].cumsum(1) > 0  # an episode that the dream knows nothing of
    batch = {k: x[another.sum(1).argsort(stable=True)[:sequences]] for k, x in batch.items()}
    data, (b, length) = agent.prepare(batch), (sequences, batch["reward"].shape[1] - 1)
    z_noise, a_noise = agent.noise(agent.act_rng, (b, length, agent.size.latents, 1),
                                   (b, length, agent.seats - 1, agent.actions.noise))
    probs, samples = (x.cpu() for x in agent.wm.social_dream(data, context, z_noise, a_noise))
    real, acts, width = data["teammates"].cpu(), data["acts"].cpu(), agent.actions.size
    acts[:, context:] *= (data["is_first"][:, context:].cumsum(1) == 0)[..., None].cpu()
    panels = [(i, j) for i in range(b) for j in range(agent.seats - 1)][:12]
    choices = all(kind == "discrete" for kind, _ in agent.actions.heads.values())
    image = Image.new("RGB", (length * cell + 1, len(panels) * (width + 1) * cell), "white")
    draw = ImageDraw.Draw(image)
    for panel, (i, j) in enumerate(panels):
        top = panel * (width + 1) * cell
        for t, a in np.ndindex(length, width):
            x, y, did = t * cell, top + a * cell, bool(acts[i, t, j])
            draw_guess(draw, x, y, choices, *(float(v[i, t, j, a]) for v in (probs, real, samples)), did, cell)
    draw.line([context * cell, 0, context * cell, image.height], "red", 2)
    return {"teammates": [image]}

def draw_guess(draw: Any, x: int, y: int, choices: bool, guess: float, real: float, sample: float, did: bool,
               cell: int = 14) -> None:
    """One cell of such a picture: what the ToM head says of a choice or number, what was done and what was dreamed."""
    shade = (int(255 - 205 * guess), int(255 - 155 * guess), 255) if choices else "white"
    draw.rectangle([x, y, x + cell, y + cell], shade, "lightgray")
    if not did:
        draw.line([x, y, x + cell, y + cell], "lightgray")
    elif choices:
        if real > 0.5:
            draw.rectangle([x + 1, y + 1, x + cell - 1, y + cell - 1], None, "black", 2)
        if sample > 0.5:
            draw.ellipse([x + 5, y + 5, x + cell - 5, y + cell - 5], "darkorange")
    else:
        levels = [y + cell * (0.5 - 0.45 * max(-1, min(1, v))) for v in (real, guess, sample)]
        draw.line([x, levels[0], x + cell, levels[0]], "black", 2)
        draw.line([x, levels[1], x + cell, levels[1]], "darkorange", 2)
        draw.point([(x + cell // 2, levels[2])], "darkorange")

def draw_game(agent: Dreamer, pool: Pool | None, steps: int = 100, cell: int = 14) -> dict[str, Any]:
    """An episode as the environment draws it and, under each frame, what a learner expects its teammates to do now: a
    row for each, framed (or black) what they do. {} where the environment draws nothing."""
    from PIL import Image, ImageDraw

    frames, first = [], np.ones(1, bool)
    try:
        parallel = make_parallel(agent.args, render=True)
    except InputError:  # it knows no render_mode
        return {}
    if getattr(parallel, "render_mode", None) != "rgb_array":
        return {}
    choices = all(kind == "discrete" for kind, _ in agent.actions.heads.values())
    table, seats = Table(agent, 1, pool and pool.aside()), Seats(parallel, scripts_of(agent.args, parallel))
    with contextlib.closing(gym.vector.SyncVectorEnv([lambda: seats])) as envs:
        obs, _ = envs.reset(seed=agent.args.seed, options={"steps": np.inf})
        for _ in range(steps):
            action, rows = table.act(obs, first)
            with torch.no_grad():  # of the first learning seat alone
                probs = expected(agent.wm.teammates(rows["deter"][:1], rows["onehot"][:1]))[0].tolist()
            frame = Image.fromarray(np.asarray(seats.render()))
            frame.thumbnail((320, 320))
            frames.append(Image.new("RGB", (frame.width, frame.height + cell * len(probs) + 1), "white"))
            frames[-1].paste(frame)
            for j, row in enumerate(probs):
                for a, p in enumerate(row):
                    real, at = rows["teammates"][0, j, a], (a * cell, frame.height + j * cell)
                    draw_guess(ImageDraw.Draw(frames[-1]), *at, choices, p, real, 0.0, rows["active"][0, j], cell)
            obs, _, ended, _, _ = envs.step(action)
            first = np.zeros(1, bool)
            if ended.any():
                break
    return {"game": frames}

def save_dreams(agent: Dreamer, buffer: ReplayBuffer, writer: Any, run_dir: Path, step: int,
                pool: Pool | None = None) -> None:  # MARL
    """Writes the pictures to run_dir/dreams as GIF or PNG and to TensorBoard, whose own add_video needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    (run_dir / "dreams").mkdir(exist_ok=True)
    # not recompiled for the shapes of the pictures
    with leave_no_trace(agent.act_rng, buffer.generator), torch.compiler.set_stance("force_eager"):
        pictures = draw_dreams(agent, buffer) | draw_teammates(agent, buffer) | draw_game(agent, pool)  # MARL
    for key, (image, *later) in pictures.items():
        path = run_dir / "dreams" / f"{key.replace('/', '-')}_{step:09d}.{'gif' if later else 'png'}"
        image.save(path, **dict(save_all=True, append_images=later, duration=100, loop=0) if later else {})
        proto = Summary.Image(height=image.height, width=image.width, encoded_image_string=path.read_bytes())
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=f"dreams/{key}", image=proto)]), step)

def save_run(run_dir: Path, agent: Dreamer, buffer: ReplayBuffer, counters: dict[str, Any],
             replay_file: str = "replay.pt", pool: Pool | None = None) -> None:  # MARL
    """Writes the replay and, but for torchrun's later processes, agent.pt; each replaces the last one when complete."""
    agent_state = {"agent": agent.state_dict(), "args": dataclasses.asdict(agent.args), "counters": counters,
                   "pool": pool and pool.state_dict()}  # MARL
    contents = {replay_file: buffer.state_dict()} | ({"agent.pt": agent_state} if replay_file == "replay.pt" else {})
    for name, content in contents.items():
        torch.save(content, run_dir / f"{name}.part")
        os.replace(run_dir / f"{name}.part", run_dir / name)

def load_file(run_dir: str | Path, name: str = "agent.pt") -> dict[str, Any]:
    """What save_run wrote; raises InputError where there is none. Nothing but tensors and plain values is unpickled."""
    if not (path := Path(run_dir) / name).is_file():
        raise InputError(f"{run_dir} holds no {name}: give the folder of a run that ended, was interrupted, or was "
                         "started with --checkpoint-every")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise InputError(f"{path} is damaged or of another program ({type(error).__name__}): take a copy, or start "
                         "anew") from None

def restore(agent: Dreamer, run_dir: str | Path, rank: int = 0) -> dict[str, Any]:
    """Loads a saved agent into `agent`; returns the run's counters. Raises InputError if it does not fit.
    The generators saved are those of the first process; the others begin new ones."""
    saved = load_file(run_dir)
    try:
        agent.load_state_dict(saved["agent"])
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the agent in {run_dir} does not fit these arguments, resume it with its own env_id, size "
                         f"and image_size: {str(error).splitlines()[-1].strip()}") from None
    for i, rng in enumerate((agent.act_rng, agent.learn_rng) if rank else ()):
        rng.manual_seed(agent.args.seed + 2 * rank + i + saved["counters"]["updates"])
    return saved["counters"]

def make_pool(agent: Dreamer, args: Args, run_dir: str | Path | None, rank: int = 0) -> Pool:
    """The pool of a run that is gone on with, or a new one of the agent as it is and of those in pool_checkpoints.
    Every process of torchrun has one, with draws and scores of its own; that of the first is saved."""
    pool = Pool(args.pool_size, args.pool_weighting, args.seed + 20_000 + rank)
    if run_dir and (state := load_file(run_dir).get("pool")):
        pool.load_state_dict(state, agent)
        if rank:
            pool.rng = np.random.default_rng((args.seed, rank, pool.next))
        return pool
    pool.add(agent)
    for path in args.pool_checkpoints:
        try:
            pool.add(agent, load_file(path)["agent"])
        except (RuntimeError, KeyError) as error:
            raise InputError(f"the agent in {path} cannot join the pool, it was trained with another env_id, size or "
                             f"observation: {str(error).splitlines()[-1].strip()}") from None
    return pool

def parse_args(argv: list[str] | None = None) -> Args:
    """Command line on top of the preset of its --env-id, or of the arguments of the run to --resume or --evaluate."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # reads only what chooses the defaults
    for name in ("env-id", "resume", "evaluate"):
        first.add_argument(f"--{name}", f"--{name.replace('-', '_')}", default=getattr(Args, name.replace("-", "_")))
    known, _ = first.parse_known_args(argv)
    run_dir = known.resume or known.evaluate
    try:
        default = Args(**load_file(run_dir)["args"]) if run_dir else Args.preset(known.env_id)  # MARL
    except (TypeError, KeyError) as error:
        raise InputError(f"{run_dir} was saved by another script or another version of it ({error})") from None
    return tyro.cli(Args, args=argv, default=dataclasses.replace(default, resume="", evaluate=""),
                    description=__doc__[: __doc__.index("The algorithm")])

# ----------------------------------------------------------------------------------------------------------------- main

def main(args: Args) -> dict[str, Any]:
    """Trains and returns what summary.json holds; with args.evaluate plays and returns the evaluation, without a file.
    Raises InputError for bad input.
    Under torchrun every process has its own environments and replay; all take the same steps, the first one logs."""
    args.check()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.cuda and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if args.cuda and torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(hours=2))  # the others wait while the first one evaluates
    random.seed(args.seed + rank)
    np.random.seed(args.seed + rank)
    torch.manual_seed(args.seed)  # the same weights in every process
    torch.backends.cudnn.deterministic = True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    torch.set_num_threads(args.threads or max(1, cores // 2 // ranks))
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    names = [args.resume or args.evaluate or f"runs/{name}"]
    if ranks > 1:
        dist.broadcast_object_list(names)
    run_dir, replay_file = Path(names[0]), f"replay{rank or ''}.pt"
    if args.resume or args.evaluate:
        load_file(run_dir)  # fails before anything is made

    n, record = (1, False) if args.evaluate else (args.num_envs, args.capture_video and rank == 0)
    envs = make_vector_env(args, n, run_dir.name, record)
    observation_space, action_space, seats, scripts = seat_spaces(args)  # MARL
    agent = Dreamer(observation_space, action_space, args, seats)
    counters = dict(global_step=0, updates=0, seconds=0.0, ranks=ranks)
    if args.resume or args.evaluate:
        counters = restore(agent, run_dir, rank)
    pool = make_pool(agent, args, args.resume or args.evaluate, rank) if args.partners == "pool" else None  # MARL
    if args.evaluate:
        envs.close()
        # MARL: with the partners of training, and with each alone
        result = assess(agent, args, pool, f"{run_dir.name}__evaluation", True, args.capture_video)
        print(f"{run_dir}: {sentence(result)}, over {args.eval_episodes} episodes")
        for partner, values in result["eval_partners"].items():
            print(f"  with {partner}: " + ", ".join(f"{k} {x:.3f}" for k, x in values.items()))
        return result
    if counters["ranks"] != ranks:
        raise InputError(f"{run_dir} was run by {counters['ranks']} processes and not by {ranks}: resume it with "
                         f"torchrun --nproc-per-node {counters['ranks']}")
    players = Table(agent, n, pool, scripts=scripts)
    streams = len(players.env)  # MARL: rows of the replay, one for each learning seat
    capacity = max(min(args.buffer_size, args.total_timesteps * streams // n) // ranks,
                   (args.batch_length + 1) * streams)
    where = args.buffer_device if agent.device.type == "cuda" else "cpu"
    buffer = ReplayBuffer(capacity, streams, args.batch_length, agent.replay_specs(), args.seed + rank, where)
    if args.resume:
        buffer.load_state_dict(load_file(run_dir, replay_file))

    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm
    if args.track and rank == 0:
        with explain_failure("wandb", "wandb, or leave out --track"):
            import wandb
        try:
            wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True,
                       config=vars(args), name=run_dir.name, save_code=True)  # monitor_gym knows only the old Gym
        except Exception as error:
            raise InputError(f"Weights & Biases cannot be reached ({error}): log in, set WANDB_MODE=offline, or leave "
                             "out --track") from None
    writer = None
    if rank == 0:  # after all that can complain, so that nothing is left over
        try:
            run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        except FileExistsError:  # two runs in one folder would overwrite each other
            raise InputError(f"{run_dir} is another run's, begun in the same second: start again, or give this one an "
                             "--exp-name of its own") from None
        writer = SummaryWriter(str(run_dir))
        table = "".join(f"\n|{k}|{v}|" for k, v in vars(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|{table}")
        print(*(f"{k} = {v}" for k, v in vars(args).items()), sep="\n")
        print(f"{run_dir}: {sum(p.numel() for p in agent.learned):,} parameters on {ranks} × {agent.device}; replay of "
              f"{capacity:,} steps on {buffer.device}, {buffer.bytes_per_step:,} bytes each, "
              f"{capacity * buffer.bytes_per_step / 2**30:.2f} GiB when full")
    if ranks > 1:
        dist.barrier()  # no process saves before the folder is there

    first_step, first_updates, credit, start = counters["global_step"], counters["updates"], 0.0, time.time()
    step, updates, finished, state = first_step, first_updates, False, None
    episodes, metrics, no = [], {}, np.zeros(n, bool)
    result: dict[str, Any] = dict(eval_return_mean=None, eval_return_std=None, eval_returns=[])  # MARL: of `assess`
    arrived = dict(reward=np.zeros(n), is_first=~no, is_last=no, is_terminal=no)
    returns, lengths = np.zeros(n), np.zeros(n, int)  # of the episodes that are going on
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=rank > 0 or None, smoothing=0.05)

    def due(every: int) -> bool:  # did the last step of all environments cross a multiple of `every`?
        return every > 0 and step // every > (step - n * ranks) // every

    def log(values: dict[str, Any]) -> None:
        for tag, value in values.items() if writer else ():
            writer.add_scalar(tag, float(value), step)

    def play(each: bool = False) -> dict[str, Any]:  # MARL: `each`: also with each partner alone
        if rank > 0:
            return {}
        scores = assess(agent, args, pool, run_dir.name, each)
        log({"eval/episodic_return": scores["eval_return_mean"], "eval/team_return": scores["eval_team_return_mean"],
             **{f"eval/tom_{k}": x for k, x in scores["eval_tom"].items()},
             **{f"eval/return_with_{k}": x["return"] for k, x in scores.get("eval_partners", {}).items()}})
        tqdm.write(f"global_step={step}, evaluation {sentence(scores)}")
        return scores

    def progress() -> dict[str, Any]:
        seconds = time.time() - start  # of this part of the run; speeds are of it alone
        return {"global_step": step, "updates": updates, "seconds": counters["seconds"] + seconds, "ranks": ranks,
                "sps": (step - first_step) / seconds, "updates_per_second": (updates - first_updates) / seconds}

    def save() -> None:
        if np.isfinite(float(metrics.get("diagnostics/update_norm", 0))):  # never in place of healthy weights
            save_run(run_dir, agent, buffer, progress(), replay_file, pool)

    try:
        # MARL: "steps" tells an environment whose shaped rewards fade how far they have
        obs, _ = envs.reset(seed=args.seed + step + 1000 * rank, options={"steps": step // (n * ranks)})
        while step < args.total_timesteps:
            # 1. act, MARL: in all seats
            action, state = players.act(obs, arrived["is_first"])
            # 2. store what arrived and what was chosen
            buffer.add({k: state[k] for k in buffer.data})  # MARL: what arrived at every seat is in the state
            # 3. step: workers do so during the updates, as does this process while a GPU with the replay computes them
            if workers := isinstance(envs, gym.vector.AsyncVectorEnv):
                envs.step_async(action)
            # 4. update train_ratio / (B·T) times for every environment step
            left = max(0.0, 1 - step / args.total_timesteps) if args.anneal_lr else 1.0
            agent.optimizer.param_groups[0]["lr"].fill_(args.learning_rate * left)
            if len(buffer) >= max(args.batch_size * args.batch_length, streams * buffer.window):  # MARL
                credit += n * args.train_ratio / (args.batch_size * args.batch_length)
            for _ in range(int(credit)):
                batch = buffer.sample(args.batch_size)
                metrics = agent.update(batch)
                buffer.write_back(batch, deter=batch["deter"], stoch=batch["stoch"])
                updates += 1
            credit -= int(credit)
            obs, reward, terminated, truncated, _ = envs.step_wait() if workers else envs.step(action)
            if not np.isfinite(reward).all():
                raise InputError(f"reward {reward[~np.isfinite(reward)][0]} at step {step}: make the environment "
                                 "return finite rewards, for example with gymnasium.wrappers.TransformReward")
            step += n * ranks
            # 5. log
            lengths += ~arrived["is_last"]  # the step after an episode's last only resets
            returns += reward  # MARL: of all seats together
            arrived = dict(reward=reward, is_first=arrived["is_last"], is_last=terminated | truncated,
                           is_terminal=terminated)
            bar.update(n * ranks)
            for i in np.flatnonzero(arrived["is_last"]):
                own, partner = players.finish(obs, i)  # MARL
                episodes.append(own)
                if rank == 0:
                    tqdm.write(f"global_step={step}, episodic_return={episodes[-1]:.2f}")
                log({"charts/episodic_return": own, "charts/episodic_length": lengths[i],
                     "charts/team_return": returns[i]} | ({f"charts/return_with_{partner}": own} if partner else {}))
                returns[i] = lengths[i] = 0
            if due(args.log_every) and metrics:
                means = torch.stack([x.float() for x in metrics.values()])
                average_over_processes([means])
                now, values = progress(), dict(zip(metrics, means.tolist()))
                log({**values, "charts/SPS": now["sps"], "charts/updates_per_second": now["updates_per_second"],
                     "charts/replay_size": len(buffer), "charts/replay_bytes": len(buffer) * buffer.bytes_per_step})
                bar.set_postfix(updates_s=f"{now['updates_per_second']:.1f}", returns=np.round(episodes[-3:], 1))
                if not np.isfinite(total := values["losses/total"]):
                    raise InputError(f"the loss became {total} at step {step}: lower --learning-rate and start anew, "
                                     "or --resume from what --checkpoint-every saved")
            if due(args.video_every) and metrics and writer:
                save_dreams(agent, buffer, writer, run_dir, step, pool)
            if pool is not None and due(args.pool_every):  # MARL
                pool.add(agent)
            if due(args.eval_every):
                result = play()
            if due(args.checkpoint_every):
                save()
        finished = True
    except KeyboardInterrupt:
        tqdm.write("interrupted: saving")
    finally:
        bar.close()
        end = progress()
        if args.save_model:
            save()
        envs.close(**({"terminate": not finished} if isinstance(envs, gym.vector.AsyncVectorEnv) else {}))
        with contextlib.suppress(KeyboardInterrupt):  # what has been learned is told in any case
            result = play(each=True) if finished else result
        summary = end | {
            "interrupted": not finished, "train_returns": episodes[-20:], **result, "args": vars(args),
            "device": torch.cuda.get_device_name() if agent.device.type == "cuda" else platform.processor() or "cpu",
            "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, np, gym)}}}
        if writer:
            (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
            writer.close()
            told = f"evaluation {sentence(result)}" if result["eval_returns"] else "no evaluation"
            print(f"{run_dir}: {step:,} steps, {updates:,} updates, {end['seconds']:.0f} s, {told}")
    return summary

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's way to say Ctrl-C
    if hasattr(os, "register_at_fork"):  # workers, which a run that breaks off ends so, go without a word
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        main(parse_args())
        if dist.is_initialized():
            gc.collect()  # NCCL does not end before CUDA graphs do that hold its messages
            dist.destroy_process_group()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
