"""DreamerV3 in one file: learn a world model from experience, then learn to act in its dreams.

    python dreamer.py                                     # CartPole-v1, minutes on a laptop's CPU
    python dreamer.py --env-id dm_control/walker-walk-v0  # with its suite's values, see PRESETS
    python dreamer.py --env-id ALE/Pong-v5 --size 12m     # flags override the preset
    python dreamer.py --evaluate runs/CartPole-v1__…      # play a saved agent
    python dreamer.py --resume runs/CartPole-v1__…        # continue a run where it stopped

The algorithm is that of "Mastering diverse control tasks through world models" (Hafner et al.,
Nature 2025; arXiv 2301.04104v2) as its author's code runs it: danijar/dreamerv3 at e3f0224. Where
paper and code differ, this file follows the code. test_dreamer.py compares losses, states and two
optimizer steps with numbers recorded from that code.

Symbols   B batch · T time · H imagination horizon · N any batch, mostly B·T dreams · A action size
          D deter size · S latents of C classes each · E token size · U units · G = 8 blocks
          h deter · z stoch · feat = [h, z] · sg(·) stop-gradient

Time      Row t of the replay holds what arrived at t, and the action chosen after seeing it:

            row               t-1                 t                  t+1
            arrived     x, r, flags ──┐     x, r, flags ──┐     x, r, flags
            chosen            a ──────┼──▶        a ──────┼──▶        a
            model       h, z ─────────┴──▶  h, z ─────────┴──▶  h, z

          h_t = f(h_{t-1}, z_{t-1}, a_{t-1}). Where x_t is seen, z_t ~ q(z | h_t, x_t), which is
          the posterior; in dreams z_t ~ p(z | h_t), the prior. The heads at t predict r_t and
          whether x_t is terminal; the return at t begins with r_{t+1}. Flags: is_first marks the x
          that begins an episode (its r is 0), is_last the x that ends one, is_terminal an end that
          is no timeout.

Learning  One update replays B sequences. The world model turns them into states (h, z), and learns
          to predict observations, rewards and ends; two KL losses make the prior predict the
          posterior (strongly) and the posterior predictable (weakly). From every state the actor
          dreams H steps with the prior. In dreams the critic learns the λ-returns, and the actor
          learns by REINFORCE from returns minus critic; dreams come from the present policy, so no
          importance ratio is needed. The critic also learns on the replayed steps. One optimizer
          steps on the sum of the losses. Then new states replace the stale ones in the replay.

Variants  override methods: what z is (RSSM.latent and around it), WorldModel.extra_losses, and of
          Dreamer policy, dream_reward, choose_action, judge, make_…; `main` takes their class.

Deviations from the reference: the replay stores deter in bfloat16 and stoch as class indices;
samples are drawn by inverse CDF from uniform noise that is made ahead, so that an update is a
function of its inputs; acting is in float32, whatever updates are in; presets marked "ours" carry
values of our own, CartPole's above all.
"""
import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import faulthandler
import functools
import gc
import importlib
import itertools
import json
import math
import multiprocessing.connection
import os
import random
import shutil
import signal
import sys
import sysconfig
import threading
import time
import timeit
import warnings
import zipfile
from pathlib import Path
from typing import Annotated, Any, Callable, Literal, NamedTuple, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor, distributed
from torch.utils._pytree import tree_flatten, tree_unflatten

Tensors = dict[str, Tensor]  # by name; a state has "deter" (…, D) and "stoch" (…, S, C)

class InputError(ValueError):
    """The user gave something unusable. The message says what it was, and what to do instead."""

# --------------------------------------------------------------------------- sizes and arguments

class Size(NamedTuple):
    """Widths of the networks, chosen together by --size."""
    deter: int  # D, the recurrent state
    hidden: int  # layers inside the RSSM
    classes: int  # C, classes of each latent
    depth: int  # channels of the CNN are multiples of it
    units: int  # U, width of the MLPs
    latents: int = 32  # S
    blocks: int = 8  # G

DEPTHS = {"1m": 4, "12m": 16, "25m": 24, "50m": 32, "100m": 48, "200m": 64, "400m": 96}
SIZES = {name: Size(128 * d, 16 * d, d, d, 16 * d) for name, d in DEPTHS.items()}
OUR_SIZE = "12m" if torch.cuda.is_available() else "1m"  # on a CPU 12m takes days

# What a suite sets where no flag is given. Unmarked values, like the defaults of Args, are those of
# the author's configs.yaml at e3f0224, but for total_timesteps, which are the paper's, and the size
# of Args; "ours" marks what the reference does not have.
PRESETS: dict[str, dict[str, Any]] = {
    "atari": dict(size="200m", num_envs=1, train_ratio=256, total_timesteps=100_000),  # 100k
    "dmc_vector": dict(num_envs=16, train_ratio=1024, size="1m", vectorization="async"),
    "dmc_pixels": dict(num_envs=16, train_ratio=256, size="200m", vectorization="async"),
    "car_racing": dict(  # ours
        size=OUR_SIZE, num_envs=8, train_ratio=128, total_timesteps=500_000),
    "mujoco": dict(num_envs=16, train_ratio=512, size="1m"),  # ours, after dmc_vector
    "classic_control": dict(  # ours: few and small updates, so that minutes on a CPU suffice
        size="1m", num_envs=16, train_ratio=10, total_timesteps=48_000, eval_episodes=20,
        batch_size=8, batch_length=16, learning_rate=1e-3, warmup=100, anneal_lr=True, tau=0.1,
        contdisc=False,  # 0 and 1 are learned in fewer updates than 0 and 0.997
        rec_scale=100.0,  # the errors of angles within ±0.2 would drown in the other losses
        # with less entropy the carts drift to one side and the model forgets the other; at the
        # end, beside advantages that have become small, it would loosen a policy that is learned
        ent_coef=0.01, anneal_ent=True, average=0.005,
        eval_every=2_000, stop_at=495),  # of CartPole's 500; reached after 14,000 to 28,000 steps
    "other": dict(size=OUR_SIZE, num_envs=4, train_ratio=128, total_timesteps=500_000),  # ours
}

def suite_of(env_id: str, pixels: bool = False) -> str:
    """Name of the preset for an environment id."""
    registered = str(gym.registry[env_id].entry_point) if env_id in gym.registry else ""
    applies = {"atari": "ALE/" in env_id, "dmc_pixels": "dm_control/" in env_id and pixels,
               "dmc_vector": "dm_control/" in env_id, "car_racing": "CarRacing" in env_id,
               "mujoco": "envs.mujoco" in registered and not pixels,
               "classic_control": "envs.classic_control" in registered and not pixels,
               "other": True}
    return next(suite for suite, true in applies.items() if true)

def whole(texts: list[str]) -> int:
    """Also 1e6. Raises ValueError for a fraction."""
    if not float(texts[0]).is_integer():
        raise ValueError(f"{texts[0]} is no whole number")
    return int(float(texts[0]))

Steps = Annotated[int, tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="INT", instance_from_str=whole, is_instance=lambda x: isinstance(x, int),
    str_from_instance=lambda x: [str(x)])]

@dataclasses.dataclass
class Args:
    """The comment at a field is its line in --help."""
    exp_name: str = "dreamer"  # name of the experiment, part of the run's name
    seed: int = 1  # seed of everything random, see `derive_seeds`
    cuda: bool = True  # use a GPU if there is one
    # number format of updates; auto: bfloat16 on CUDA and, for images and for models larger than
    # 1m, on a CPU that is faster in it; else float32
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0  # CPU threads of PyTorch; 0: half of the cores
    # fuse operations with torch.compile, which takes minutes on a CPU; by default where it pays
    compile: bool = dataclasses.field(default_factory=torch.cuda.is_available)
    cuda_graph: bool = True  # on CUDA, record acting and learning once, and replay them
    # where the replay lies; auto: on the GPU if it takes less than half of its free memory
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    track: bool = False  # log to Weights & Biases too (WANDB_PROJECT and WANDB_ENTITY say where)
    capture_video: bool = False  # record the first environment to videos/ (needs moviepy)
    video_every: int = 10_000  # steps between pictures of dreams; 0: none
    log_every: int = 500  # steps between records of losses and speeds
    save_model: bool = True  # save agent.pt and replay.pt when the run ends or is interrupted
    checkpoint_every: int = 0  # steps between further saves; 0: none
    run_dir: str = ""  # folder of the run, in place of runs/…; a run that it holds is continued
    resume: str = ""  # folder of a run to continue; flags override its saved arguments
    evaluate: str = ""  # folder of a run whose agent is played, not trained
    eval_episodes: int = 10  # episodes of an evaluation
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    stop_at: float | None = None  # end the run when an evaluation has this mean return (ours)
    deterministic: bool = False  # evaluate with modes in place of samples, unlike the reference

    env_id: str = "CartPole-v1"  # Gymnasium id; `module:id` imports the module first
    env_kwargs: str = "{}"  # arguments of the environment, a JSON object
    pixels: bool = False  # observe rendered frames
    image_size: int = 64  # side to which images are resized: a multiple of 16, 48 to 256
    num_envs: int = 16  # environments stepped together
    # environments in this process, or each in its own, which pays above a millisecond a step
    vectorization: Literal["sync", "async"] = "sync"
    env_timeout: float = 600.0  # seconds that one in its own process may take to answer; 0: any
    total_timesteps: Steps = 1_000_000  # environment steps, over all environments

    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "12m"  # of the model
    buffer_size: Steps = 5_000_000  # steps in the replay, over all environments
    batch_size: int = 16  # sequences in a batch
    batch_length: int = 64  # steps in a sequence
    accumulate: int = 1  # parts of a batch that take turns, to save memory; the update is the same
    train_ratio: float = 32.0  # steps replayed for each environment step
    learning_rate: float = 4e-5  # step size of LaProp
    warmup: int = 1000  # updates over which the step size rises linearly from zero
    anneal_lr: bool = False  # lower the step size linearly to zero over the run (ours)
    agc: float = 0.3  # largest gradient norm, as a fraction of its tensor's norm
    imagination_horizon: int = 15  # steps of a dream
    gamma: float = 1 - 1 / 333  # discount
    contdisc: bool = True  # learn the discount inside the continue prediction
    return_lambda: float = 0.95  # lambda of the returns
    ent_coef: float = 3e-4  # weight of the policy's entropy
    anneal_ent: bool = False  # lower that weight linearly to zero over the run (ours)
    # rate at which an average of the weights follows them; evaluations play it; 0: none (ours)
    average: float = 0.0
    tau: float = 0.02  # fraction by which the slow critic follows the critic
    free_nats: float = 1.0  # nats of KL, summed over the latents, that cost nothing
    dyn_scale: float = 1.0  # weight of the loss that moves the prior to the posterior
    rep_scale: float = 0.1  # weight of the loss that moves the posterior to the prior
    rec_scale: float = 1.0  # weight of the reconstruction loss
    repval_scale: float = 0.3  # weight of the critic's loss on replayed steps

    def __post_init__(self) -> None:
        """Numbers of NumPy and paths become plain values: no others can be loaded again."""
        for name, x in list(vars(self).items()):
            if isinstance(x, np.generic):
                setattr(self, name, x.item())
            elif isinstance(x, os.PathLike):
                setattr(self, name, os.fspath(x))

    @classmethod
    def preset(cls, env_id: str, pixels: bool = False, **overrides: Any) -> "Args":
        """Defaults, then the values of the id's suite, then `overrides`."""
        return cls(**{"env_id": env_id, "pixels": pixels} | PRESETS[suite_of(env_id, pixels)]
                   | overrides)

    def check(self) -> None:
        """Raises InputError for values that no run could use."""
        literals = [x for x in dataclasses.fields(self) if get_origin(x.type) is Literal]
        choices = {x.name: get_args(x.type) for x in literals} | {"size": SIZES}
        for name, allowed in choices.items():
            if (x := getattr(self, name)) not in allowed:
                raise InputError(f"{name} {x!r} does not exist: choose one of {', '.join(allowed)}")
        if self.image_size % 16 or not 48 <= self.image_size <= 256:
            raise InputError(f"image_size {self.image_size}: take a multiple of 16 from 48 to 256")
        if Path(self.exp_name).name != self.exp_name:
            raise InputError(f"exp_name {self.exp_name!r} is no name: it may not lead elsewhere")
        if len(folders := [x for x in (self.run_dir, self.resume, self.evaluate) if x]) > 1:
            raise InputError(f"run_dir, resume and evaluate name {' and '.join(folders)}: give one")
        ranges = {name: (0, 1e12) for name, x in vars(self).items() if type(x) in (int, float)}
        positive = "num_envs total_timesteps batch_size log_every eval_episodes"
        ranges |= dict.fromkeys(positive.split(), (1, 1e12))
        ranges |= dict(batch_length=(2, 1e12), agc=(1e-6, 1e12), gamma=(1e-6, 1), tau=(1e-6, 1),
                       return_lambda=(0, 1), seed=(0, 2**31), stop_at=(-1e12, 1e12),
                       threads=(0, 1024), imagination_horizon=(1, 1000), learning_rate=(0, 0.1),
                       average=(0, 1))
        if self.stop_at is None:
            del ranges["stop_at"]
        elif not self.eval_every:
            raise InputError(f"stop_at {self.stop_at:g} is never looked at: give eval_every too, "
                             "or stop_at None")
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:  # NaN is in no range
                raise InputError(f"{name} {getattr(self, name)}: take {least:g} to {most:g}")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise InputError(f"accumulate {self.accumulate}: take a divisor of batch_size "
                             f"{self.batch_size}")
        self.env_arguments()
        gpu = self.cuda and torch.cuda.is_available()
        if self.buffer_device == "cuda" and not (gpu or self.evaluate):
            raise InputError("buffer_device 'cuda' needs a GPU that the run may use: take auto")
        # a window of every environment, and a batch; + 1, since rows are divided evenly
        needed = (self.batch_length + 1) * max(self.num_envs, self.batch_size + 1)
        needed *= int(os.environ.get("WORLD_SIZE", 1))
        if self.buffer_size < needed:
            raise InputError(f"buffer_size {self.buffer_size} is less than batch_size "
                             f"{self.batch_size} of batch_length {self.batch_length} need: "
                             f"take {needed} or more")

    def env_arguments(self) -> dict[str, Any]:
        """Arguments of the environment. Raises InputError where env_kwargs is no JSON object."""
        try:
            kwargs = json.loads(self.env_kwargs)
        except (TypeError, json.JSONDecodeError) as error:
            kwargs = error
        if not isinstance(kwargs, dict):
            raise InputError(f"env_kwargs {self.env_kwargs!r} is no JSON object ({kwargs}): write "
                             "it like '{\"N\": 4}'")
        return kwargs

def derive_seeds(seed: int, purpose: str, rank: int = 0, count: int = 1) -> list[int]:
    """`count` seeds of 32 bits: other seeds, purposes or processes get independent streams."""
    key = (seed, int.from_bytes(purpose.encode(), "big"), rank)
    return np.random.SeedSequence(key).generate_state(count).tolist()

# ----------------------------------------------------------------------------------- predictions

def symlog(x: Tensor) -> Tensor:
    """sign(x) · ln(1 + |x|), which squashes large values of either sign."""
    return torch.sign(x) * torch.log1p(torch.abs(x))

def symexp(x: Tensor) -> Tensor:
    """sign(x) · (exp(|x|) − 1), the inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))

class SymexpTwoHot:
    """A number, predicted as a categorical over exponentially spaced values: logits (…, 255).
    It fits rewards of any scale, and a large target does not make a large gradient."""
    def __init__(self, logits: Tensor):
        self.logits = logits.float()
        half = symexp(torch.linspace(-20, 0, (logits.shape[-1] + 1) // 2, device=logits.device))
        self.bins = torch.cat([half, -half[:-1].flip(0)])  # exactly antisymmetric

    def pred(self) -> Tensor:
        """Mean (…). Mirrored bins are summed in pairs, so that zero logits give exactly 0."""
        probs = self.logits.softmax(-1)
        middle = self.bins.shape[0] // 2
        return (probs[..., middle + 1 :] - probs[..., :middle].flip(-1)) @ self.bins[middle + 1 :]

    def loss(self, *targets: Tensor) -> Tensor:
        """Sum of the cross-entropies to each of `targets` (…). A target is split between its two
        neighbouring bins, linearly in raw space and not in symlog space."""
        target = torch.stack(targets, -1).float().clamp(self.bins[0], self.bins[-1])
        below = torch.searchsorted(self.bins, target, right=True) - 1
        below = below.clamp(0, self.bins.shape[0] - 2)
        weight = (target - self.bins[below]) / (self.bins[below + 1] - self.bins[below])
        logp = self.logits.log_softmax(-1).gather(-1, torch.cat([below, below + 1], -1))
        return -(torch.cat([1 - weight, weight], -1) * logp).sum(-1)

class OneHot:
    """Categorical over one-hot vectors (…, C), with a fraction `unimix` of the uniform mixed in."""
    noise_size = 1  # uniform numbers that a sample needs

    def __init__(self, logits: Tensor, unimix: float = 0.0):
        self.logits = logits.float()
        self.unimix = unimix
        self.size = logits.shape[-1]
        # softmax in two steps: with few classes it is 3 times as fast as torch's on a CPU
        exp = (self.logits - self.logits.amax(-1, keepdim=True).detach()).exp()
        self.probs = exp / exp.sum(-1, keepdim=True)
        if unimix:  # no probability is 0, so logarithms and the KL stay bounded
            self.probs = (1 - unimix) * self.probs + unimix / self.size

    @property
    def logp(self) -> Tensor:
        return self.probs.log() if self.unimix else self.logits.log_softmax(-1)

    def sample(self, noise: Tensor | None) -> Tensor:
        """One-hot sample by inverse CDF from uniform noise (…, 1), or the mode for None. The
        gradient is straight-through: that of the probabilities."""
        if noise is None:
            index = self.probs.argmax(-1, keepdim=True)
        else:  # the number of classes below the noise; a CDF may round to less than 1
            index = (self.probs.detach().cumsum(-1) <= noise).sum(-1, keepdim=True)
            index = index.clamp(max=self.size - 1)
        onehot = torch.zeros_like(self.probs).scatter_(-1, index, 1.0)
        return onehot + self.probs - self.probs.detach() if self.probs.requires_grad else onehot

    def log_prob(self, onehot: Tensor) -> Tensor:
        return (onehot * self.logp).sum(-1)

    def entropy(self) -> Tensor:
        return -(self.probs * self.logp).sum(-1)

    def kl(self, other: "OneHot") -> Tensor:
        """KL(self ‖ other) = Σ p · (ln p − ln q), in nats (…)."""
        return (self.probs * (self.logp - other.logp)).sum(-1)

class Normal:
    """Gaussian over independent dimensions (…, n)."""
    def __init__(self, mean: Tensor, std: Tensor):
        self.mean = mean.float()
        self.std = std.float()
        self.size = self.noise_size = mean.shape[-1]

    def sample(self, noise: Tensor | None) -> Tensor:
        """Sample by inverse CDF from uniform noise (…, n) in [0, 1), or the mean for None."""
        if noise is None:
            return self.mean
        return self.mean + self.std * torch.special.ndtri(noise.clamp(1e-6, 1 - 1e-6))

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x - self.mean) / self.std
        return (-0.5 * z**2 - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

class Joint:
    """Independent distributions side by side: samples are concatenated, log-probabilities added."""
    def __init__(self, parts: list[OneHot | Normal]):
        self.parts = parts

    def sample(self, noise: Tensor | None) -> Tensor:
        """Uniform noise (…, sum of noise_size), or None for the modes → (…, A)."""
        sizes = [part.noise_size for part in self.parts]
        noises = [None] * len(sizes) if noise is None else noise.split(sizes, -1)
        return torch.cat([part.sample(n) for part, n in zip(self.parts, noises)], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        pieces = x.split([part.size for part in self.parts], -1)
        return sum(part.log_prob(piece) for part, piece in zip(self.parts, pieces))

    def entropy(self) -> Tensor:
        return sum(part.entropy() for part in self.parts)

# ---------------------------------------------------------------------------------------- layers

def init_weight(weight: Tensor, fan_in: int, outscale: float = 1.0) -> None:
    """Truncated normal (±2σ) of variance outscale² / fan_in. 1.1368 undoes what truncation does."""
    nn.init.trunc_normal_(weight, std=1.0, a=-2.0, b=2.0)
    weight.data.mul_(1.1368 * outscale / fan_in**0.5)

class RMSNorm(nn.RMSNorm):
    """x / rms(x) over the last axis, with a learned scale and no shift, computed in float32."""
    def __init__(self, size: int):
        super().__init__(size, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)

class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0):
        super().__init__(inputs, outputs)
        init_weight(self.weight, inputs, outscale)
        nn.init.zeros_(self.bias)

class BlockLinear(nn.Module):
    """`blocks` linear layers. Block g maps its slice of x (N, inputs) and all of `shared`."""
    def __init__(self, inputs: int, outputs: int, blocks: int, shared: int = 0):
        super().__init__()
        self.blocks = blocks
        width = inputs // blocks + shared
        self.weight = nn.Parameter(torch.empty(blocks, width, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        init_weight(self.weight, blocks * width)  # the reference counts the inputs of all blocks

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        """(N, inputs), (N, shared) → (N, G, outputs / G)."""
        x = x.unflatten(-1, (self.blocks, -1)).transpose(0, 1)  # (G, N, inputs / G)
        if shared is None:
            x = torch.bmm(x, self.weight)
        elif torch.is_grad_enabled():
            x = torch.bmm(torch.cat([x, shared.expand(self.blocks, -1, -1)], -1), self.weight)
        else:  # in dreams, slices of the weight save 2% of an update; with gradients they cost more
            own = x.shape[-1]
            x = torch.baddbmm(torch.bmm(x, self.weight[:, :own]),
                              shared.expand(self.blocks, -1, -1), self.weight[:, own:])
        return x.add_(self.bias.view(self.blocks, 1, -1)).transpose(0, 1)

class Layer(nn.Sequential):
    """Linear → RMSNorm → SiLU, the unit of most networks."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__(Linear(inputs, outputs), RMSNorm(outputs), nn.SiLU())

class MLP(nn.Sequential):
    """`layers` layers of `units` and, if `outputs` is given, a linear one scaled by `outscale`."""
    def __init__(self, inputs: int, units: int, layers: int, outputs: int = 0, outscale=1.0):
        modules = [Layer(inputs if i == 0 else units, units) for i in range(layers)]
        super().__init__(*modules)
        if outputs:
            self.append(Linear(units, outputs, outscale))

class TwoHotHead(MLP):
    """feat → SymexpTwoHot. It begins by predicting exactly 0."""
    def __init__(self, inputs: int, units: int, layers: int):
        super().__init__(inputs, units, layers, 255, outscale=0.0)

    def forward(self, feat: Tensor) -> SymexpTwoHot:
        return SymexpTwoHot(super().forward(feat))

class Conv(nn.Module):
    """5×5 convolution of images (N, H, W, C) that keeps the resolution."""
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 5, padding=2)
        init_weight(self.conv.weight, 25 * inputs)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:  # channels last, for RMSNorm; permutations are views
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

def upsample(x: Tensor) -> Tensor:
    """(N, H, W, C) → (N, 2H, 2W, C): every pixel becomes 2×2."""
    # compiled, the largest layer takes 62 ms by views and 406 ms by interpolation;
    # eager, interpolation saves 11% of an update
    if torch.compiler.is_compiling():
        x = x[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # (N, H, 2, W, 2, C)
        return x.flatten(3, 4).flatten(1, 2)
    return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2).permute(0, 2, 3, 1)

# ----------------------------------------------------------------------------------- world model

class ObsSpec(NamedTuple):
    """One observation key as the networks see it."""
    kind: str  # "image" (H, W, C) uint8 · "vector" (n,) float32 · "discrete" (n,) int64
    shape: tuple[int, ...]
    width: int  # channels of an image, numbers of a vector, one-hot columns of choices
    classes: tuple[int, ...] = ()  # of choices

class Encoder(nn.Module):
    """Observations (N, …) → tokens (N, size): vectors through one MLP, images through one CNN."""
    def __init__(self, specs: dict[str, ObsSpec], size: Size):
        super().__init__()
        self.specs = specs
        self.size = 0
        self.images = [name for name in specs if specs[name].kind == "image"]
        self.vectors = [name for name in specs if specs[name].kind != "image"]
        if self.vectors:
            self.mlp = MLP(sum(specs[k].width for k in self.vectors), size.units, layers=3)
            self.size += size.units
        if self.images:
            channels = [sum(specs[k].width for k in self.images)]
            channels += [size.depth * m for m in (2, 3, 4, 4)]
            self.convs = nn.ModuleList([Conv(i, o) for i, o in zip(channels, channels[1:])])
            self.norms = nn.ModuleList([RMSNorm(o) for o in channels[1:]])
            self.size += (specs[self.images[0]].shape[0] // 16) ** 2 * channels[-1]

    def forward(self, obs: Tensors, dtype: torch.dtype = torch.float32) -> Tensor:
        tokens = []
        inputs = []
        for name in self.vectors:
            if classes := self.specs[name].classes:
                choices = zip(obs[name].long().unbind(-1), classes)
                inputs += [F.one_hot(choice, n).float() for choice, n in choices]
            else:
                inputs.append(symlog(obs[name]))
        if self.vectors:
            tokens.append(self.mlp(torch.cat(inputs, -1).to(dtype)))
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -1).to(dtype) / 255 - 0.5  # (N, H, W, C)
            for conv, norm in zip(self.convs, self.norms):
                x = F.max_pool2d(conv(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
                x = F.silu(norm(x))
            tokens.append(x.flatten(1))
        return torch.cat(tokens, -1)

class Decoder(nn.Module):
    """State → a reconstruction of every key: image in [0, 1], vector in symlog space, or logits."""
    def __init__(self, encoder: Encoder, stoch: int, size: Size):
        super().__init__()
        self.specs = encoder.specs
        self.images = encoder.images
        self.vectors = encoder.vectors
        if self.vectors:
            self.mlp = MLP(size.deter + stoch, size.units, layers=3)
            widths = [self.specs[k].width for k in self.vectors]
            self.outputs = nn.ModuleList([Linear(size.units, width) for width in widths])
        if self.images:
            self.widths = [self.specs[k].width for k in self.images]
            self.side = self.specs[self.images[0]].shape[0] // 16
            channels = [size.depth * m for m in (4, 4, 3, 2)] + [sum(self.widths)]
            cells = self.side**2 * channels[0]
            self.from_deter = BlockLinear(size.deter, cells, size.blocks)
            self.from_stoch = MLP(stoch, 2 * size.units, 1, outputs=cells)
            self.convs = nn.ModuleList([Conv(i, o) for i, o in zip(channels, channels[1:])])
            self.norms = nn.ModuleList([RMSNorm(i) for i in channels[:-1]])

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensors:
        """(N, D), (N, S, C) → name → (N, H, W, C), (N, n), or logits (N, sum of classes)."""
        recon = {}
        stoch = stoch.flatten(1)
        if self.vectors:
            x = self.mlp(torch.cat([stoch, deter], -1))  # here, and only here, stoch comes first
            recon |= {k: layer(x).float() for k, layer in zip(self.vectors, self.outputs)}
        if self.images:
            x = self.from_deter(deter).unflatten(-1, (self.side, self.side, -1))  # (N, G, h, w, c)
            x = x.permute(0, 2, 3, 1, 4).flatten(3)  # block g makes the g-th group of channels
            x = x + self.from_stoch(stoch).unflatten(-1, x.shape[1:])
            for norm, conv in zip(self.norms, self.convs):
                x = conv(upsample(F.silu(norm(x))))
            recon |= dict(zip(self.images, x.float().sigmoid().split(self.widths, -1)))
        return recon

    def loss(self, recon: Tensors, obs: Tensors) -> Tensors:
        """name → loss (N,), summed over pixels, numbers or choices."""
        losses = {}
        for name, x in recon.items():
            if classes := self.specs[name].classes:
                choices = zip(x.split(classes, -1), obs[name].long().unbind(-1))
                losses[name] = sum(F.cross_entropy(y, i, reduction="none") for y, i in choices)
            else:
                target = obs[name] / 255 if name in self.images else symlog(obs[name])
                losses[name] = (x - target).square().flatten(1).sum(1)
        return losses

class RSSM(nn.Module):
    """Recurrent state-space model: h is deterministic and remembers, z is random and holds what h
    does not foresee.

        sequence   h_t = f(h_{t-1}, z_{t-1}, a_{t-1})      block GRU
        posterior  z_t ~ q(z_t | h_t, x_t)                 where x_t is seen
        prior      z_t ~ p(z_t | h_t)                      in dreams"""
    kl_groups = 1  # groups of latents whose KL has free nats of its own

    def __init__(self, tokens: int, actions: int, size: Size):
        super().__init__()
        self.size = size
        self.stoch_shape, self.logits_shape = self.latent_shapes()
        stoch = math.prod(self.stoch_shape)
        logits = math.prod(self.logits_shape)
        self.feat_size = size.deter + stoch
        self.deter_in = Layer(size.deter, size.hidden)
        self.stoch_in = Layer(stoch, size.hidden)
        self.action_in = Layer(actions, size.hidden)
        self.hidden = BlockLinear(size.deter, size.deter, size.blocks, shared=3 * size.hidden)
        self.hidden_norm = RMSNorm(size.deter)
        self.gates = BlockLinear(size.deter, 3 * size.deter, size.blocks)
        self.prior = MLP(size.deter, size.hidden, 2, outputs=logits)
        self.posterior = MLP(size.deter + tokens, size.hidden, 1, outputs=logits)

    # The next five methods are all that knows which kind of distribution z has.

    def latent_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of z, (S, C), and of what the networks predict for it."""
        return (self.size.latents, self.size.classes), (self.size.latents, self.size.classes)

    def latent(self, logits: Tensor) -> OneHot:
        """Distribution of z. 1% uniform is mixed in, for samples and for the KL."""
        return OneHot(logits, unimix=0.01)

    def latent_spec(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of z in the replay."""
        return (self.size.latents,), torch.uint8

    def pack(self, stoch: Tensor) -> Tensor:
        """(…, S, C) → class indices (…, S), for the replay."""
        return stoch.argmax(-1).to(torch.uint8)

    def unpack(self, stored: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return F.one_hot(stored.long(), self.size.classes).float()

    def initial(self, batch: int, device: torch.device | None = None) -> Tensors:
        """Zeros, not learned: deter (B, D), stoch (B, S, C)."""
        return {"deter": torch.zeros(batch, self.size.deter, device=device),
                "stoch": torch.zeros(batch, *self.stoch_shape, device=device)}

    def embed(self, action: Tensor) -> Tensor:
        """(…, A) → (…, hidden). Raw Gaussian samples have any size: each is scaled into [-1, 1]."""
        action = action / action.abs().clamp(min=1).detach()
        return self.action_in(action.to(self.action_in[0].weight.dtype))

    def sequence(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """(B, D), (B, S, C) and embedded action (B, hidden) at t-1 → deter (B, D) at t."""
        x = torch.cat([self.deter_in(deter), self.stoch_in(stoch.flatten(1)), action], -1)
        x = self.hidden(deter, shared=x).flatten(1)  # (B, D)
        reset, cand, update = self.gates(F.silu(self.hidden_norm(x))).chunk(3, -1)  # (B, G, D / G)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)  # the −1: at first, h changes slowly
        # hₜ = (1 − uₜ) · hₜ₋₁ + uₜ · cₜ
        return torch.lerp(deter.view_as(cand), cand, update).flatten(1)

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        return network(x).unflatten(-1, self.logits_shape).float()

    def img_step(self, state: Tensors, action: Tensor, noise: Tensor | None) -> Tensors:
        """A dreamed step: state and embedded action at t-1, noise (B, S, 1) → state at t."""
        deter = self.sequence(state["deter"], state["stoch"], action)
        stoch = self.latent(self.logits(self.prior, deter)).sample(noise)
        return {"deter": deter, "stoch": stoch.to(deter.dtype)}

    def obs_step(self, state: Tensors, action: Tensor, tokens: Tensor,
                 noise: Tensor | None) -> Tensors:
        """An observed step: state and embedded action at t-1, tokens (B, E) at t, noise (B, S, 1)
        → state at t, with the posterior's logits (B, S, C)."""
        deter = self.sequence(state["deter"], state["stoch"], action)
        logits = self.logits(self.posterior, torch.cat([deter, tokens], -1))
        stoch = self.latent(logits).sample(noise)
        return {"deter": deter, "stoch": stoch.to(deter.dtype), "logits": logits}

    def observe(self, state: Tensors, tokens: Tensor, action: Tensor, is_first: Tensor,
                noise: Tensor | None = None) -> Tensors:
        """Infers the states of a sequence from the state before it, tokens (B, T, E), the action
        before each step (B, T, A), is_first (B, T), and uniform noise (B, T, S, 1), None for modes.
        Returns deter (B, T, D), stoch (B, T, S, C) and posterior logits (B, T, S, C)."""
        # where an episode begins, the action and the state before belong to another one
        keep = (~is_first)[..., None].to(tokens.dtype)  # (B, T, 1)
        actions = self.embed(action * keep).unbind(1)
        noises = [None] * len(actions) if noise is None else noise.unbind(1)
        deter = state["deter"].to(tokens.dtype)
        stoch = state["stoch"].to(tokens.dtype)
        states = []
        for a, x, u, k in zip(actions, tokens.unbind(1), noises, keep.unbind(1)):
            state = {"deter": deter * k, "stoch": stoch * k[..., None]}
            states.append(self.obs_step(state, a, x, u))
            deter = states[-1]["deter"]
            stoch = states[-1]["stoch"]
        return {name: torch.stack([s[name] for s in states], 1) for name in states[0]}

    def imagine(self, state: Tensors, policy: Callable[[Tensors, int], Tensor], horizon: int,
                noise: Tensor | None = None) -> tuple[Tensors, Tensor]:
        """Dreams from deter (N, D) and stoch (N, S, C): policy(state, t) gives the action (N, A) of
        step t; noise (N, H, S, 1) or None for modes. Returns the states (N, H + 1, …), the start in
        front, and the actions (N, H, A)."""
        states = [{name: state[name] for name in ("deter", "stoch")}]
        actions = []
        for t in range(horizon):
            actions.append(policy(states[-1], t))
            step_noise = None if noise is None else noise[:, t]
            states.append(self.img_step(states[-1], self.embed(actions[-1]), step_noise))
        dream = {name: torch.stack([state[name] for state in states], 1) for name in states[0]}
        return dream, torch.stack(actions, 1)

    def kl_loss(self, post: Tensor, prior: Tensor, free: float = 1.0) -> tuple[Tensor, Tensor]:
        """Logits (…, S, C) → dyn (…), which moves only the prior, and rep (…), only the posterior.
        Both are summed over the latents first, and have no gradient below the free nats."""
        dyn = self.latent(post.detach()).kl(self.latent(prior)).sum(-1)
        rep = self.latent(post).kl(self.latent(prior.detach())).sum(-1)
        return dyn.clamp(min=free), rep.clamp(min=free)

def features(state: Tensors) -> Tensor:
    """What heads, actor and critic see: [h, flat z] (…, D + S·C)."""
    return torch.cat([state["deter"], state["stoch"].flatten(-2)], -1)

class WorldModel(nn.Module):
    """All that learns from experience alone: encoder, RSSM, decoder, reward and continue heads."""
    def __init__(self, specs: dict[str, ObsSpec], actions: int, args: Args):
        super().__init__()
        self.args = args
        self.size = SIZES[args.size]
        self.encoder = Encoder(specs, self.size)
        self.rssm = self.make_rssm(self.encoder.size, actions)
        self.make_heads(self.rssm.feat_size, self.size.units)

    def make_rssm(self, tokens: int, actions: int) -> RSSM:
        return RSSM(tokens, actions, self.size)

    def make_heads(self, feat: int, units: int) -> None:
        self.decoder = Decoder(self.encoder, math.prod(self.rssm.stoch_shape), self.size)
        self.reward = TwoHotHead(feat, units, layers=1)
        self.cont = MLP(feat, units, 1, outputs=1)

    def encode(self, obs: Tensors) -> Tensor:
        """name → (B, T, …) to tokens (B, T, E), in the number format of the weights."""
        shape = next(iter(obs.values())).shape[:2]
        flat = {name: x.flatten(0, 1) for name, x in obs.items()}  # (B·T, …)
        dtype = next(self.encoder.parameters()).dtype
        return self.encoder(flat, dtype).unflatten(0, shape)

    def observe(self, data: dict[str, Any], noise: Tensor | None) -> Tensors:
        """Posterior states (B, T, …) and tokens of a batch, as Dreamer.training_data makes it."""
        tokens = self.encode(data["obs"])
        states = self.rssm.observe(data["carry"], tokens, data["prev_action"], data["is_first"],
                                   noise)
        return states | {"tokens": tokens}

    def losses(self, states: Tensors, data: dict[str, Any]) -> tuple[Tensors, Tensors]:
        """Losses (B, T) of posterior states (B, T, …), and metrics ()."""
        args = self.args
        feat = features(states)
        prior = self.rssm.logits(self.rssm.prior, states["deter"])
        dyn, rep = self.rssm.kl_loss(states["logits"], prior, args.free_nats)
        rew = self.reward(feat).loss(data["reward"])
        # the discount is part of the target, so that dreams need none of their own
        target = (~data["is_terminal"]).float() * (args.gamma if args.contdisc else 1.0)
        cont = self.cont(feat)[..., 0].float()
        con = F.binary_cross_entropy_with_logits(cont, target, reduction="none")
        losses = {"dyn": dyn, "rep": rep, "rew": rew, "con": con}
        losses |= self.reconstruction(states, data) | self.extra_losses(states, data)
        logits = {"prior_entropy": prior, "posterior_entropy": states["logits"]}
        return losses, {k: self.rssm.latent(x).entropy().sum(-1).mean() for k, x in logits.items()}

    def reconstruction(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        """The loss "rec" (B, T), summed over the keys."""
        recon = {name: x.flatten(0, 1) for name, x in self.decode(states).items()}
        obs = {name: x.flatten(0, 1) for name, x in data["obs"].items()}
        parts = self.decoder.loss(recon, obs)
        return {"rec": sum(parts.values()).unflatten(0, states["deter"].shape[:2])}

    def extra_losses(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        """Further losses (B, T) or (), each weighted by the argument {name}_scale. None here."""
        return {}

    def decode(self, states: Tensors) -> Tensors:
        """Reconstructions (B, T, …) of states (B, T, …)."""
        recon = self.decoder(states["deter"].flatten(0, 1), states["stoch"].flatten(0, 1))
        return {name: x.unflatten(0, states["deter"].shape[:2]) for name, x in recon.items()}

    @torch.no_grad()
    def open_loop(self, data: dict[str, Any], context: int, noise: Tensor) -> Tensors:
        """Reconstructs `context` steps of (B, T), and predicts the others from actions alone."""
        states = self.observe(data, noise)
        last = {name: states[name][:, context - 1] for name in ("deter", "stoch")}
        actions = data["prev_action"][:, context:]
        dream, _ = self.rssm.imagine(last, lambda state, t: actions[:, t], actions.shape[1],
                                     noise[:, context:])
        return self.decode({name: torch.cat([states[name][:, :context], x[:, 1:]], 1)
                            for name, x in dream.items()})

# ---------------------------------------------------------------------------------------- replay

def free_bytes(device: str) -> float:
    """Free memory of "cuda" or, for each process and as far as the system tells, of "cpu"."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = [math.inf]
    if (meminfo := Path("/proc/meminfo")).exists():
        lines = meminfo.read_text().splitlines()
        free += [1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")]
    if (group := Path("/sys/fs/cgroup/memory.max")).exists() and group.read_text().strip() != "max":
        used = int(group.with_name("memory.current").read_text())  # of a container, files included
        stat = dict(x.split() for x in group.with_name("memory.stat").read_text().splitlines())
        free.append(float(group.read_text()) - used + int(stat["inactive_file"]))
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))

def alone(x: Tensor) -> Tensor:
    """`x`, the first rows of another tensor, without the rest, which torch.save would write too. It
    is no copy, for which there may be no room."""
    begin = x.storage_offset() * x.itemsize
    storage = x.untyped_storage()[begin : begin + x.nbytes]
    return torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape)

class ReplayBuffer:
    """A ring of the last `capacity` steps, divided over the environments. It yields windows of
    T + 1 steps: the stored latent and action of the first start the recurrence, T are trained.
    Windows start anywhere, may cross the end of an episode, and never the place that is written.
    Each environment's new windows, one after the other, are served once before uniform draws."""
    def __init__(self, capacity: int, num_envs: int, batch_length: int, specs: dict[str, tuple],
                 seed: int = 0, device: str = "cpu"):
        """specs: name → (shape, dtype) of a step. device: "cpu", "cuda", or "auto", the GPU if half
        of its free memory suffices. Raises InputError if the steps do not fit."""
        self.rows = capacity // num_envs
        self.num_envs = num_envs
        self.window = batch_length + 1
        if self.window > self.rows:
            raise InputError(f"batch_length {batch_length} does not fit the buffer's {self.rows} "
                             "steps of each environment")
        self.bytes_per_step = sum(math.prod(shape) * x.itemsize for shape, x in specs.values())
        need = num_envs * self.rows * self.bytes_per_step
        if device == "auto":
            on_gpu = torch.cuda.is_available() and need < free_bytes("cuda") / 2
            device = "cuda" if on_gpu else "cpu"
        if need > (free := free_bytes(device)):
            fitting = int(0.9 * free / self.bytes_per_step)
            raise InputError(f"a replay of {capacity:,} steps takes {need / 2**30:.1f} GiB, and "
                             f"{free / 2**30:.1f} are free on {device}: lower --buffer-size to "
                             f"{fitting}")
        # on a CPU, torch.empty takes memory only as rows are written
        self.data = {name: torch.empty((num_envs, self.rows, *shape), dtype=dtype, device=device)
                     for name, (shape, dtype) in specs.items()}
        self.device = device
        self.count = 0  # steps ever added for each environment; step i lies in row i % rows
        self.online: collections.deque[tuple[int, int]] = collections.deque()  # environment, step
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.num_envs * min(self.count, self.rows)

    def add(self, step: dict[str, Any]) -> None:
        """Writes one step of every environment: name → (num_envs, …)."""
        assert step.keys() == self.data.keys(), (sorted(step), sorted(self.data))
        for name, column in self.data.items():
            value = torch.as_tensor(step[name]).to(self.device, column.dtype)
            column[:, self.count % self.rows] = value
        self.count += 1
        if self.count % self.window == 0:
            self.online.extend((env, self.count - self.window) for env in range(self.num_envs))

    def sample(self, batch_size: int, online: bool = True) -> dict[str, Tensor]:
        """name → (B, T + 1, …), with the places that write_back fills: "env" (B, 1), "row"
        (B, T + 1). Without `online` the queue stays as it is. Raises InputError if no window is
        complete."""
        oldest = max(0, self.count - self.rows)
        newest = self.count - self.window
        if newest < oldest:
            raise InputError(f"the replay holds {self.count} steps of each environment: a window "
                             f"needs {self.window}")
        env = torch.randint(self.num_envs, (batch_size, 1), generator=self.generator)
        start = torch.randint(oldest, newest + 1, (batch_size, 1), generator=self.generator)
        while self.online and self.online[0][1] < oldest:
            self.online.popleft()  # overwritten before its turn
        for i in range(min(batch_size, len(self.online)) if online else 0):
            env[i], start[i] = self.online.popleft()
        row = (start + torch.arange(self.window)) % self.rows
        if self.device != "cpu":  # copies of pinned memory do not wait for the update before
            env = env.pin_memory().to(self.device, non_blocking=True)
            row = row.pin_memory().to(self.device, non_blocking=True)
        batch = {name: column[env, row] for name, column in self.data.items()}
        return batch | {"env": env, "row": row}

    def write_back(self, batch: dict[str, Tensor], **latents: Tensor) -> None:
        """Replaces the T trained steps of a sampled batch by `latents` (B, T, …) of new weights. Of
        a step that several windows share, all latents are those of the last one."""
        for name, value in latents.items():
            column = self.data[name]
            value = value.to(self.device, column.dtype)
            for env, row, x in zip(batch["env"], batch["row"][:, 1:], value):
                column[env, row] = x

    def state_dict(self) -> dict[str, Any]:
        size = min(self.count, self.rows)
        data = {name: [alone(env[:size].cpu()) for env in column]
                for name, column in self.data.items()}
        return {"data": data, "count": self.count, "rows": self.rows, "online": list(self.online),
                "window": self.window, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved ring; one of another capacity is unrolled, and its newest steps are
        kept. Raises InputError if this one has another layout."""
        ours = {name: (len(x), *x[0].shape[1:]) for name, x in self.data.items()}
        saved = {name: (len(x), *x[0].shape[1:]) for name, x in state["data"].items()}
        if ours != saved:
            raise InputError("the saved replay has another layout: keep what shapes it, as env_id, "
                             "size and num_envs do")
        kept = min(state["count"], state["rows"], self.rows)
        earlier = 0 if state["rows"] == self.rows else state["count"] - kept  # steps given up
        steps = torch.arange(state["count"] - kept, state["count"])
        for name, envs in state["data"].items():
            for column, env in zip(self.data[name], envs):
                for some in steps.split(1000):  # there may be no room for all at once
                    column[(some - earlier) % self.rows] = env[some % state["rows"]].to(self.device)
        self.count = state["count"] - earlier
        same = state.get("window", self.window) == self.window  # else they would overlap
        queue = [(env, step - earlier) for env, step in state["online"] if same]
        self.online = collections.deque(
            (env, step) for env, step in queue if 0 <= step <= self.count - self.window)
        self.generator.set_state(state["generator"])
        if self.count:  # environments start anew, so the streams break off here
            self.data["is_last"][:, (self.count - 1) % self.rows] = True

# ---------------------------------------------------------------------------------- actor-critic

class Actor(nn.Module):
    """Policy π(a | feat), with an independent head for every entry of the action space."""
    def __init__(self, feat: int, heads: dict[str, tuple[str, Any]], units: int):
        """heads: name → ("discrete", classes) or ("continuous", dimensions)."""
        super().__init__()
        self.heads = list(heads.values())
        self.mlp = MLP(feat, units, layers=3)
        self.outputs = nn.ModuleList()
        for kind, n in self.heads:
            widths = [sum(n)] if kind == "discrete" else [n, n]  # logits, or mean and deviation
            layers = [Linear(units, width, outscale=0.01) for width in widths]
            self.outputs.append(nn.ModuleList(layers))

    def forward(self, feat: Tensor) -> Joint:
        x = self.mlp(feat)
        parts = []
        for (kind, n), layers in zip(self.heads, self.outputs):
            out = [layer(x).float() for layer in layers]
            if kind == "discrete":
                parts += [OneHot(logits) for logits in out[0].split(n, -1)]
            else:  # deviation in [0.1, 1], 0.89 at first; samples may lie outside of [-1, 1]
                parts.append(Normal(torch.tanh(out[0]), 0.9 * torch.sigmoid(out[1] + 2) + 0.1))
        return Joint(parts)

class Critic(TwoHotHead):
    """Distribution over the return that follows feat."""
    def __init__(self, feat: int, units: int):
        super().__init__(feat, units, layers=3)

def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lam: Any) -> Tensor:
    """λ-returns (B, T - 1) of steps 0 … T-2, from (B, T) tensors; `lam` is a number or a tensor.
    All that belongs to the step from t to t+1 is read at t+1: reward, discount, λ and value."""
    # Rₜ = rₜ₊₁ + γₜ₊₁ · ((1 − λₜ₊₁) · Vₜ₊₁ + λₜ₊₁ · Rₜ₊₁),   R_{T-1} = V_{T-1}
    base = (reward + discount * (1 - lam) * value).unbind(1)
    decay = (discount * lam).unbind(1)
    returns = [value[:, -1]]
    for t in reversed(range(1, value.shape[1])):
        returns.append(base[t] + decay[t] * returns[-1])
    return torch.stack(returns[:0:-1], 1)  # in order of time, without the last value

class ReturnNormalizer(nn.Module):
    """Scale of the returns: the distance of their 5th and 95th percentile (moving averages), and at
    least 1. Large returns are scaled down; small ones, which may be noise, are not scaled up."""
    def __init__(self, rate: float = 0.01):
        super().__init__()
        self.rate = rate
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)

    @torch.no_grad()
    def forward(self, returns: Tensor) -> Tensor:
        """Moves the range towards that of `returns`, of any shape, and gives the scale (). Under
        torchrun it is the range of all processes' returns together. In eval mode it stays."""
        returns = returns.flatten().float()
        if self.training and distributed.is_initialized():
            parts = [torch.empty_like(returns) for _ in range(distributed.get_world_size())]
            distributed.all_gather(parts, returns)
            returns = torch.cat(parts)
        if self.training:
            self.range.lerp_(torch.quantile(returns, self.percentiles), self.rate)
        return (self.range[1] - self.range[0]).clamp(min=1)

def imagination_loss(policy: Joint, action: Tensor, critic: SymexpTwoHot, slow_value: Tensor,
                     reward: Tensor, cont: Tensor, retnorm: ReturnNormalizer, discount: float,
                     lam: float, ent_coef: float | Tensor) -> tuple[Tensors, Tensor, Tensors]:
    """Losses of actor and critic in dreams (reference: imag_loss). policy, critic, slow_value,
    reward and cont are of all states (N, H + 1), action (N, H, A) is of all but the last. discount
    is 1 where cont holds it already. Only policy and critic carry gradients.
    Returns the losses "policy" and "value" (N, H), the λ-returns (N, H), and metrics ()."""
    value = critic.pred().detach()
    cont = discount * cont
    weight = cont.cumprod(1) / discount  # discounted probability that the dream still goes on
    returns = lambda_return(reward, value, cont, lam)  # (N, H)
    scale = retnorm(returns)
    advantage = (returns - value[:, :-1]) / scale
    # the last state has neither action nor return: zeros stand for them, and are cut off
    logp = policy.log_prob(F.pad(action, (0, 0, 0, 1)))[:, :-1]
    entropy = policy.entropy()[:, :-1]
    value_loss = critic.loss(F.pad(returns, (0, 1)), slow_value)[:, :-1]
    losses = {  # −w · (sg(A) · ln π(a) + η · H[π])   and   w · (−ln p(sg(R)) − ln p(V_slow))
        "policy": -weight[:, :-1] * (advantage * logp + ent_coef * entropy),
        "value": weight[:, :-1] * value_loss}
    ret = (returns - retnorm.range[0]) / scale
    # names of the reference: tar is the return, ret the return divided by its scale
    means = dict(rew=reward, con=cont, val=value, tar=returns, weight=weight, slowval=slow_value,
                 policy_entropy=entropy, adv=advantage, adv_mag=advantage.abs(), ret=ret,
                 ret_rate=(ret.abs() >= 1).float())
    metrics = {name: x.mean() for name, x in means.items()}
    return losses, returns, metrics | dict(
        adv_std=advantage.std(correction=0), ret_min=ret.min(), ret_max=ret.max(),
        ret_low=retnorm.range[0], ret_high=retnorm.range[1])

def replay_value_loss(critic: SymexpTwoHot, slow_value: Tensor, bootstrap: Tensor, reward: Tensor,
                      is_last: Tensor, is_terminal: Tensor, gamma: float, lam: float):
    """Loss of the critic on replayed steps (reference: repl_loss), from (B, T) tensors. bootstrap,
    the return of the dream that began at a step, stands for its value.
    Returns the loss and the λ-returns, both (B, T - 1)."""
    discount = (~is_terminal).float() * gamma
    lam = (~is_last).float() * lam  # the step after an episode's last belongs to another one
    returns = lambda_return(reward, bootstrap, discount, lam)
    loss = critic.loss(F.pad(returns, (0, 1)), slow_value)[:, :-1]
    return (~is_last[:, :-1]).float() * loss, returns

# ------------------------------------------------------------------------------------- optimizer

class LaProp(torch.optim.Optimizer):
    """LaProp (arXiv 2002.04839), adaptive gradient clipping (arXiv 2102.06171), linear warm-up.
    Unlike Adam it normalises first and averages afterwards."""
    def __init__(self, params, lr=4e-5, betas=(0.9, 0.999), eps=1e-20, agc=0.3, pmin=1e-3,
                 warmup=1000):
        defaults = dict(lr=lr, betas=betas, eps=eps, agc=agc, pmin=pmin, warmup=warmup)
        super().__init__(params, defaults)
        for group in self.param_groups:
            device = group["params"][0].device
            group["lr"] = torch.tensor(lr, device=device)  # tensors: a CUDA graph sees them change
            group["updates"] = torch.zeros((), device=device)
            for p in group["params"]:
                self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in place, for a CUDA graph knows the addresses."""
        group = self.param_groups[0]
        group["updates"].copy_(state["param_groups"][0]["updates"])
        for p, averages in zip(group["params"], state["state"].values()):
            for name, value in averages.items():
                self.state[p][name].copy_(value)

    @torch.no_grad()
    def step(self, closure: None = None) -> Tensors:
        """Updates every parameter that has a gradient. Returns norms of gradient and update ()."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            m = [self.state[p]["m"] for p in params]
            v = [self.state[p]["v"] for p in params]
            beta1, beta2 = group["betas"]
            t = group["updates"]
            warmup = group["warmup"]
            lr = group["lr"] * (t / warmup).clamp(max=1) if warmup else group["lr"]  # 0 at first
            t += 1
            # g ← g / max(1, ‖g‖ / (agc · max(pmin, ‖p‖))), tensor by tensor
            norms = torch._foreach_norm(grads)
            limits = torch._foreach_maximum(torch._foreach_norm(params), group["pmin"])
            ratios = torch._foreach_div(norms, torch._foreach_mul(limits, group["agc"]))
            grads = torch._foreach_div(grads, torch._foreach_maximum(ratios, 1.0))
            # v ← β₂·v + (1−β₂)·g²,   u = g / (√(v / (1−β₂ᵗ)) + ε)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            scale = torch._foreach_sqrt(torch._foreach_div(v, 1 - beta2**t))
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_div_(grads, scale)
            # m ← β₁·m + (1−β₁)·u,   p ← p − lr · m / (1−β₁ᵗ)
            torch._foreach_lerp_(m, grads, 1 - beta1)
            update = torch._foreach_mul(m, lr / (1 - beta1**t))
            torch._foreach_sub_(params, update)
        update_norm = torch.stack(torch._foreach_norm(update)).norm()
        return {"grad_norm": torch.stack(norms).norm(), "update_norm": update_norm}

# ------------------------------------------------------------------------------------- the agent

class Dreamer(nn.Module):
    """The agent: `act` on observations, `update` on batches of a ReplayBuffer, `state_dict` for all
    that learning needs. The spaces are those of one environment, observations and actions are
    batches. Raises InputError for spaces that cannot be used."""
    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        args.check()
        self.args = args
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.observations = ObservationCodec(observation_space, args.image_size)
        self.actions = ActionCodec(action_space)
        self.wm = self.make_world_model()
        self.make_actor_critic(self.wm.rssm.feat_size, self.wm.size.units)
        self.retnorm = ReturnNormalizer()
        self.register_buffer("ent_coef", torch.tensor(float(args.ent_coef)), persistent=False)
        self.to(self.device)
        self.learned = [p for p in self.parameters() if p.requires_grad]
        self.averages: list[Tensor] = []  # of `learned`, with args.average
        self.optimizer = self.make_optimizer()
        # acting has noise of its own, so that an evaluation does not change what is learned
        self.act_rng = torch.Generator(self.device)
        self.learn_rng = torch.Generator(self.device)
        self.seed_noise(distributed.get_rank() if distributed.is_initialized() else 0)
        self.accelerate()

    def make_world_model(self) -> WorldModel:
        return WorldModel(self.observations.specs, self.actions.size, self.args)

    def make_actor_critic(self, feat: int, units: int) -> None:
        self.actor = Actor(feat, self.actions.heads, units)
        self.critic = Critic(feat, units)
        self.slow_critic = Critic(feat, units).requires_grad_(False)
        self.slow_critic.load_state_dict(self.critic.state_dict())

    def make_optimizer(self) -> LaProp:
        args = self.args
        return LaProp(self.learned, args.learning_rate, agc=args.agc, warmup=args.warmup)

    def replay_specs(self) -> dict[str, tuple]:
        """Rows of a ReplayBuffer: name → (shape, dtype) of one step."""
        dtypes = {"image": torch.uint8, "vector": torch.float32, "discrete": torch.int64}
        specs = {f"obs/{name}": (spec.shape, dtypes[spec.kind])
                 for name, spec in self.observations.specs.items()}
        specs |= dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), torch.bool))
        return specs | {
            "reward": ((), torch.float32), "action": ((self.actions.size,), torch.float32),
            "deter": ((self.wm.size.deter,), torch.bfloat16), "stoch": self.wm.rssm.latent_spec()}

    @torch.no_grad()
    def act(self, obs: Any, state: dict[str, Any] | None, is_first: np.ndarray,
            deterministic: bool = False) -> tuple[Any, dict[str, Any]]:
        """Chooses actions. obs: batch of N observations as a vector environment returns it; state:
        what the last call returned, None at the start; is_first (N,): where an episode begins;
        deterministic: modes of latents and actions in place of samples.
        Returns actions for the environment, and the state: deter, stoch and action (N, …)."""
        encoded = self.observations(obs)
        n = len(is_first)
        if state is None:
            state = self.initial_state(n)
        noise = self.acting_noise(n)
        inputs = ({name: self.upload(x) for name, x in encoded.items()},
                  {name: x for name, x in state.items() if not name.startswith("obs/")},
                  self.upload(np.asarray(is_first, bool)))
        with self.uncompiled():
            new = (self.choose(*inputs, dict.fromkeys(noise)) if deterministic
                   else self.fast_choose(*inputs, noise))
        new = {name: x.clone() for name, x in new.items()}  # a CUDA graph will overwrite its own
        action = self.actions.decode(new["action"].cpu().numpy())
        return action, new | {f"obs/{name}": x for name, x in encoded.items()}

    def initial_state(self, n: int) -> Tensors:
        """What `act` remembers before the first of `n` streams' steps: zeros."""
        action = torch.zeros(n, self.actions.size, device=self.device)
        return self.wm.rssm.initial(n, self.device) | {"action": action}

    def acting_noise(self, n: int) -> Tensors:
        """Uniform numbers for one step of `n` streams."""
        return {"posterior": self.uniform(self.act_rng, n, 1, self.wm.rssm.stoch_shape[0], 1),
                "action": self.uniform(self.act_rng, n, self.actions.noise_size)}

    def choose(self, obs: Tensors, state: Tensors, is_first: Tensor,
               noise: dict[str, Any]) -> Tensors:
        """The part of `act` that is only tensors (N, …)."""
        tokens = self.wm.encode({name: x[:, None] for name, x in obs.items()})  # (N, 1, E)
        states = self.wm.rssm.observe(state, tokens, state["action"][:, None], is_first[:, None],
                                      noise["posterior"])
        new = {name: states[name][:, 0] for name in ("deter", "stoch")}
        return new | {"action": self.choose_action(new, noise["action"])}

    def choose_action(self, state: Tensors, noise: Tensor | None) -> Tensor:
        """What to do in a state (N, …) of the real environment → (N, A)."""
        return self.actor(features(state)).sample(noise)

    def row(self, state: dict[str, Any]) -> dict[str, Any]:
        """The agent's part of a replay step, from the state that `act` returned."""
        return state | {"stoch": self.wm.rssm.pack(state["stoch"])}

    def update(self, batch: dict[str, Tensor]) -> tuple[Tensors, Tensors]:
        """One optimizer step on a batch of ReplayBuffer.sample. Returns losses and diagnostics, 0-d
        tensors on the device, and the new latents (B, T, …) for ReplayBuffer.write_back. On a GPU
        they last until the next update."""
        data = self.training_data(batch)
        with signals_held() if self.args.compile else contextlib.nullcontext():
            return self.fast_learn(data, self.learning_noise(data))

    def training_data(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """A sampled batch (B, T + 1, …) on the device: T steps, the actions before them, and the
        carry, which is the state before the first one."""
        x = {k: self.upload(v) for k, v in batch.items()}
        return {"obs": {k[4:]: v[:, 1:] for k, v in x.items() if k.startswith("obs/")},
                **{k: x[k][:, 1:] for k in ("reward", "is_first", "is_last", "is_terminal")},
                "prev_action": x["action"][:, :-1],
                "carry": {"deter": x["deter"][:, 0].float(),
                          "stoch": self.wm.rssm.unpack(x["stoch"][:, 0])}}

    def learning_noise(self, data: dict[str, Any]) -> Tensors:
        """Uniform numbers for one update: all randomness of `learn`, drawn ahead."""
        b, t = data["reward"].shape
        h = self.args.imagination_horizon
        latents = self.wm.rssm.stoch_shape[0]
        rng = self.learn_rng
        return {"posterior": self.uniform(rng, b, t, latents, 1),
                "prior": self.uniform(rng, b * t, h, latents, 1),
                "action": self.uniform(rng, b * t, h, self.actions.noise_size)}

    def learn(self, data: dict[str, Any], noise: Tensors) -> tuple[Tensors, Tensors]:
        """The part of `update` that is only tensors, of shapes that do not change."""
        self.optimizer.zero_grad()
        metrics, latents = self.backward(data, noise)
        average_over_processes([p.grad for p in self.learned])
        norms = self.optimizer.step()
        with torch.no_grad():  # the slow critic follows the updated critic
            slow = list(self.slow_critic.parameters())
            fast = list(self.critic.parameters())
            torch._foreach_lerp_(slow, fast, self.args.tau)
            if self.args.average:
                self.averages = self.averages or [p.clone() for p in self.learned]
                torch._foreach_lerp_(self.averages, self.learned, self.args.average)
        return metrics | {f"diagnostics/{name}": x for name, x in norms.items()}, latents

    def backward(self, data: dict[str, Any], noise: Tensors) -> tuple[Tensors, Tensors]:
        """Gradients of a batch; returns means of metrics, and latents. Parts of the batch follow
        each other, and the gradients are those of one pass."""
        flat, spec = tree_flatten((data, noise))
        pieces = zip(*(x.chunk(self.args.accumulate) for x in flat))  # noise (B·T, …) has B outside
        parts = [tree_unflatten(list(piece), spec) for piece in pieces]
        run = functools.partial(torch.func.functional_call, self)  # of `forward`
        if len(parts) > 1:  # the range of returns must be that of all parts
            self.retnorm.eval()
            with torch.no_grad():
                weights = self.cast()
                returns = [run(weights, part)[2]["returns"] for part in parts]
            self.retnorm.train()(torch.cat(returns))
            self.retnorm.eval()
        results = []
        for part in parts:
            loss, metrics, outputs = run(self.cast(), part)  # in the number format of updates
            (loss / len(parts)).backward()
            results.append((metrics, outputs))
        self.retnorm.train()
        names = results[0][0]
        metrics = {name: torch.stack([m[name] for m, _ in results]).mean(0) for name in names}
        latents = {name: torch.cat([x[name] for _, x in results]) for name in ("deter", "stoch")}
        return metrics, latents

    def forward(self, data: dict[str, Any],
                noise: dict[str, Any]) -> tuple[Tensor, Tensors, Tensors]:
        """The whole objective. noise: uniform numbers as learning_noise draws them, or Nones for
        modes. Returns the loss (), metrics (), and "deter", "stoch" (B, T, …), the new latents as
        the replay stores them, and "returns" (N, H), the λ-returns of dreams."""
        # observe: hₜ and zₜ from what was seen
        states = self.wm.observe(data, noise["posterior"])
        # predict: observations, rewards, ends, and the latents themselves
        losses, metrics = self.wm.losses(states, data)
        # dream: from every one of these states; REINFORCE needs no gradient through it
        with torch.no_grad():
            dream, action = self.dream(self.dream_starts(states, data), noise)
        # judge: the dreams, then the replayed steps, with the dreams' returns as their values
        dream_losses, returns, dream_metrics = self.judge(dream, action)
        losses |= dream_losses
        losses["repval"], real_returns = self.judge_replay(states, data, returns)
        # add up
        scales = self.loss_scales()
        assert losses.keys() <= scales.keys(), (losses.keys(), scales.keys())
        means = {name: x.mean() for name, x in self.mask(losses, data).items()}
        means["total"] = sum(scales[name] * x for name, x in means.items())
        metrics |= dream_metrics | {"real_reward": data["reward"].mean(),
                                    "real_return": real_returns.mean()}
        report = {f"losses/{name}": x.detach() for name, x in means.items()}
        # copies, since some are views of buffers that later updates change
        report |= {f"diagnostics/{name}": x.detach().clone() for name, x in metrics.items()}
        outputs = {"deter": states["deter"].detach(), "returns": returns,
                   "stoch": self.wm.rssm.pack(states["stoch"]).detach()}
        return means["total"], report, outputs

    def loss_scales(self) -> dict[str, float]:
        """Weight of every loss: the argument {name}_scale, or 1."""
        given = {name[:-6]: x for name, x in vars(self.args).items() if name.endswith("_scale")}
        return {"rew": 1.0, "con": 1.0, "policy": 1.0, "value": 1.0} | given

    def mask(self, losses: Tensors, data: dict[str, Any]) -> Tensors:
        """Losses before their means are taken. Here all their elements count."""
        return losses

    def dream_starts(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        """The states (N, …) that dreams begin from: every posterior state."""
        return {name: states[name].flatten(0, 1).detach() for name in ("deter", "stoch")}

    def dream(self, start: Tensors, noise: dict[str, Any]) -> tuple[Tensors, Tensor]:
        """States (N, H + 1, …) and actions (N, H, …) of dreams from `start` (N, …)."""
        def policy(state: Tensors, t: int) -> Tensor:
            step_noise = None if noise["action"] is None else noise["action"][:, t]
            return self.policy(start | state, step_noise)

        return self.wm.rssm.imagine(start, policy, self.args.imagination_horizon, noise["prior"])

    def policy(self, state: Tensors, noise: Tensor | None) -> Tensor:
        """Action of the dynamics in a dreamed state (N, …)."""
        return self.actor(features(state)).sample(noise)

    def dream_reward(self, dream: Tensors) -> Tensor:
        """What dreamed states (N, H + 1, …) pay (N, H + 1)."""
        return self.wm.reward(features(dream)).pred()

    def judge(self, dream: Tensors, action: Tensor) -> tuple[Tensors, Tensor, Tensors]:
        """Losses, λ-returns (N, H) and metrics of dreams, see `imagination_loss`."""
        args = self.args
        feat = features(dream)
        with torch.no_grad():
            reward = self.dream_reward(dream)
            cont = self.wm.cont(feat)[..., 0].float().sigmoid()
            slow_value = self.slow_critic(feat).pred()
        discount = 1.0 if args.contdisc else args.gamma  # with contdisc, cont holds it already
        return imagination_loss(
            self.actor(feat), action, self.critic(feat), slow_value, reward, cont,
            self.retnorm, discount, args.return_lambda, self.ent_coef)

    def judge_replay(self, states: Tensors, data: dict[str, Any], returns: Tensor):
        """Loss and λ-returns (B, T - 1) of replayed steps, whose gradient reaches the world model;
        returns (N, H) are those of the dreams that began at them."""
        feat = features(states)
        with torch.no_grad():
            slow_value = self.slow_critic(feat).pred()
        return replay_value_loss(
            self.critic(feat), slow_value, returns[:, 0].view_as(slow_value), data["reward"],
            data["is_last"], data["is_terminal"], self.args.gamma, self.args.return_lambda)

    def anneal(self, progress: float, step: int = 0) -> None:
        """Sets what is annealed for a run of which the fraction `progress` is done. Variants also
        use `step`, of all environments."""
        args = self.args
        left = max(0.0, 1 - progress)
        lr = args.learning_rate * (left if args.anneal_lr else 1.0)
        self.optimizer.param_groups[0]["lr"].fill_(lr)
        self.ent_coef.fill_(args.ent_coef * (left if args.anneal_ent else 1.0))

    @contextlib.contextmanager
    def evaluating(self):
        """Within it the agent is in eval mode, and has the average of its weights if args.average
        keeps one."""
        own = [p.detach().clone() for p in self.learned] if self.averages else []
        training = self.training
        with torch.no_grad():
            try:  # a signal may end this from `eval` on
                self.eval()
                for p, x in zip(self.learned, self.averages):
                    p.copy_(x)
                yield
            finally:
                self.train(training)
                for p, x in zip(self.learned, own):
                    p.copy_(x)

    # From here on: what is saved, noise, number formats, and what makes the above fast.

    def get_extra_state(self) -> dict[str, Any]:
        """What state_dict holds beside weights and buffers."""
        return {"optimizer": self.optimizer.state_dict(), "act_rng": self.act_rng.get_state(),
                "learn_rng": self.learn_rng.get_state(), "averages": self.averages}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.averages and not state["averages"]:
            raise InputError("what is loaded has no averages of the weights, which this agent has "
                             "begun: load it into a new one")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.args.average:  # else the learned weights are played
            fresh = [x.to(self.device, copy=True) for x in state["averages"]]
            if self.averages:  # in place, for a CUDA graph knows the addresses
                torch._foreach_copy_(self.averages, fresh)
            else:
                self.averages = fresh
        for name in ("act_rng", "learn_rng"):
            rng = getattr(self, name)
            saved_rng = state[name].cpu()
            if len(saved_rng) == len(rng.get_state()):  # else it was another kind of device's
                rng.set_state(saved_rng)

    def seed_noise(self, rank: int, updates: int = 0) -> None:
        self.act_rng.manual_seed(derive_seeds(self.args.seed, f"act {updates}", rank)[0])
        self.learn_rng.manual_seed(derive_seeds(self.args.seed, f"learn {updates}", rank)[0])

    def uniform(self, rng: torch.Generator, *shape: int) -> Tensor:
        return torch.rand(shape, generator=rng, device=self.device)

    def upload(self, x: np.ndarray | Tensor) -> Tensor:
        """Array or tensor → tensor on the device, without waiting for the copy."""
        x = torch.as_tensor(x)
        if x.is_cuda or self.device.type == "cpu":
            return x
        return x.pin_memory().to(self.device, non_blocking=True)

    @functools.cached_property
    def in_bfloat16(self) -> bool:
        """Are updates in bfloat16?"""
        if self.args.precision != "auto" or self.device.type == "cuda":
            return self.args.precision != "float32"
        large = self.wm.size.deter > 512 or self.wm.encoder.images  # small ones do not repay it
        return bool(large) and faster_in_bfloat16()

    def cast(self) -> Tensors:
        """Weights in bfloat16 where updates use it; gradients reach the float32 originals. The
        scales of norms stay float32, as in the reference."""
        if not self.in_bfloat16:
            return {}
        norms = {f"{name}.weight" for name, x in self.named_modules() if isinstance(x, RMSNorm)}
        return {k: p.to(torch.bfloat16) for k, p in self.named_parameters() if k not in norms}

    def accelerate(self) -> None:
        """Captures and compiles what lies above, which computes the same without."""
        capture = self.device.type == "cuda" and self.args.cuda_graph
        self.fast_choose = Captured(self.choose, lambda: self.training) if capture else self.choose
        self.fast_learn = Captured(self.learn) if capture else self.learn
        for owner, name in self.compiled() if self.args.compile else ():
            setattr(owner, name, torch.compile(getattr(owner, name)))

    def compiled(self) -> list[tuple[nn.Module, str]]:
        """What torch.compile fuses: single steps of the loops over time, and what lies between. It
        leaves out the CNN on a CPU, where max-pooling would get a slower backward pass."""
        wm = self.wm
        cnn_on_cpu = wm.encoder.images and self.device.type == "cpu"
        return [(wm.rssm, "obs_step"), (wm.rssm, "img_step"), (self, "policy"), (self, "judge"),
                (wm, "losses")] + ([] if cnn_on_cpu else [(wm, "encode")])

    def uncompiled(self) -> contextlib.AbstractContextManager:
        """Runs compiled functions eagerly: for other shapes they would be compiled anew."""
        compiled = self.args.compile
        return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()

@functools.cache
def faster_in_bfloat16() -> bool:
    """Does this CPU multiply matrices clearly faster in bfloat16 than in float32? Its flags do not
    tell: with the same instructions one is faster, another takes twice as long."""
    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(256, 256, dtype=dtype)
        return min(timeit.repeat(lambda: x @ x, number=1, repeat=50))  # some are not disturbed
    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)

@contextlib.contextmanager
def signals_held():
    """Within it this thread takes no signals, and programs begun in it get none: a C++ compiler
    that Ctrl-C ended would leave a broken file in the cache of all compiled runs."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

def average_over_processes(tensors: list[Tensor]) -> None:
    """Replaces tensors by their means over the processes of torchrun, in place."""
    if distributed.is_initialized():
        flat = torch.cat([x.flatten() for x in tensors])
        distributed.all_reduce(flat)
        parts = (flat / distributed.get_world_size()).split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view_as(x) for part, x in zip(parts, tensors)])

class Captured:
    """A function of trees of tensors, recorded as a CUDA graph: one launch in place of thousands.
    For each new shape two calls warm up, and the third records; so it is for each value of
    `mode()`, which tells apart what a recording fixes. A result lasts until the next call."""
    def __init__(self, function: Callable, mode: Callable[[], Any] = lambda: None):
        self.function = function
        self.mode = mode
        self.graphs = {}

    def __call__(self, *inputs: Any) -> Any:
        flat, spec = tree_flatten(inputs)
        key = (self.mode(), *(x.shape for x in flat))
        entry = self.graphs.setdefault(key, {"calls": 0, "inputs": [x.clone() for x in flat]})
        entry["calls"] += 1
        torch._foreach_copy_(entry["inputs"], flat)
        inputs = tree_unflatten(entry["inputs"], spec)
        if entry["calls"] <= 2:  # on a stream of its own, as recording will be
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if entry["calls"] == 3:
            entry["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(entry["graph"]):
                entry["outputs"] = self.function(*inputs)
        entry["graph"].replay()
        return entry["outputs"]

# ---------------------------------------------------------------------------------- environments

PACKAGES = {  # beginning of an id: module that registers it, and how to install it
    "ALE/": ("ale_py", "ale-py==0.12.1 opencv-python-headless"),
    "dm_control/": ("shimmy", '"shimmy[dm-control]" "mujoco<4" packaging'),
    "MiniGrid-": ("minigrid", '"minigrid>=3.1,<4"'),
    "BabyAI-": ("minigrid", '"minigrid>=3.1,<4"'),
    "MinAtar/": ("minatar.gym", "minatar==1.0.15"),
    "popgym-": ("popgym", "popgym==1.0.7"),
    "tetris_gymnasium/": ("tetris_gymnasium.envs",
                          "opencv-python-headless && pip install --no-deps tetris-gymnasium"),
}
CHOICES = gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary
TREES = gym.spaces.Dict, gym.spaces.Tuple

@contextlib.contextmanager
def explain_failure(name: str, remedy: str, rendering: bool = False):
    """Turns a missing package, an unknown id `name`, arguments that it does not take, and a
    renderer that fails into InputErrors."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{name} cannot be imported ({error}): {remedy}") from None
    except gym.error.Error as error:
        reason = str(error).strip().rstrip(".")
        module = name.rpartition(":")[0]
        if isinstance(error, gym.error.UnregisteredEnv):
            reason += (f"; module {module!r} was imported, and does not register it" if module else
                       ". If a package brings it, name the module too: --env-id module:id")
        raise InputError(f"env_id {name!r} cannot be made: {reason}") from None
    except Exception as error:  # renderers raise anything
        if isinstance(error, TypeError) and "environment creator" in str(error):  # by Gymnasium
            raise InputError(f"env_id {name!r} cannot be made, give its arguments like "
                             f"--env-kwargs '{{\"N\": 4}}': {error}") from None
        if not rendering or isinstance(error, InputError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{name} cannot be made or rendered here ({reason}): if it is the "
                         "renderer, MUJOCO_GL=egl may help, else leave out --pixels and "
                         "--capture-video") from error

@functools.cache
def warn_once(text: str) -> None:
    """For what every evaluation makes anew: Gymnasium makes Python forget what it warned of."""
    warnings.warn(text)

class RandomNoops(gym.Wrapper):
    """Begins an episode of Atari with 0 to 30 steps of doing nothing (Gymnasium: 1 to 30)."""
    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(31)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info

def make_env(args: Args, idx: int, capture_video: bool, run_name: str, seed: int = 0):
    """CleanRL's thunk: a function without arguments that makes environment `idx` of a run. Number 0
    records its episodes under videos/{run_name} if `capture_video`."""
    own, colon, name = args.env_id.rpartition(":")
    if colon and not all(part.isidentifier() for part in own.split(".")):
        raise InputError(f"env_id {args.env_id!r}: {own!r} is no module's name, write module:id "
                         "without a path")
    record = capture_video and idx == 0
    module, packages = next((x for start, x in PACKAGES.items() if name.startswith(start)),
                            ("", ""))
    remedy = f"pip install {packages}" if packages else (
        "install its package; the folder of a file of yours belongs on PYTHONPATH, its name is "
        "given without .py")
    kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if args.pixels or record else {}
    kwargs |= args.env_arguments()
    if atari := name.startswith("ALE/"):  # no sticky actions, and the game's own actions alone
        kwargs = dict(frameskip=1, repeat_action_probability=0.0, full_action_space=False) | kwargs
    if name.startswith("dm_control/") and args.pixels:
        frame = dict(height=args.image_size, width=args.image_size,
                     camera_id=2 if "quadruped" in name else 0)
        kwargs["render_kwargs"] = frame | kwargs.get("render_kwargs", {})

    def thunk() -> gym.Env:
        random.seed(seed)  # some environments draw from the global generators, whose state
        np.random.seed(seed)  # forked workers would share
        with explain_failure(args.env_id, remedy, rendering=args.pixels or record):
            if module and name not in gym.registry:  # MinAtar's asks for a call, the others do not
                getattr(importlib.import_module(module), "register_envs", lambda: None)()
            env = gym.make(args.env_id, **kwargs)
            if args.pixels:  # before videos: it resets, and that would be an episode
                env = gym.wrappers.AddRenderObservation(env, render_only=True)
            elif module == "minigrid":  # coloured tiles in place of object codes
                wrappers = importlib.import_module("minigrid.wrappers")
                env = wrappers.RGBImgPartialObsWrapper(env, tile_size=8)
            if record:  # under names of this moment, so that no earlier video is replaced
                env = gym.wrappers.RecordVideo(env, f"videos/{run_name}", disable_logger=True,
                                               name_prefix=f"{time.time():.0f}")
            if atari:  # an action lasts four frames; the brighter of the last two is seen
                env = gym.wrappers.AtariPreprocessing(
                    RandomNoops(env), noop_max=0, screen_size=args.image_size, grayscale_obs=False)
        if isinstance(space := env.observation_space, gym.spaces.Dict):  # text is left out
            usable = (gym.spaces.Box, *CHOICES, *TREES)
            keep = [key for key, sub in space.items() if isinstance(sub, usable)]
            if 0 < len(keep) < len(space):
                if idx == 0:
                    warn_once(f"{name}: only {keep} are observed, the rest are not numbers; if one "
                              "names the goal, as in BabyAI, the task cannot be solved")
                env = gym.wrappers.FilterObservation(env, keep)
        # under a name of its own, for the environment may tell of its episodes too
        return gym.wrappers.RecordEpisodeStatistics(env, stats_key="dreamer_episode")

    return thunk

class SyncVectorEnv(gym.vector.SyncVectorEnv):
    """Steps in this process, with the two calls of AsyncVectorEnv."""
    def step_async(self, actions: Any) -> None:
        self.pending = actions

    def step_wait(self) -> tuple:  # by now a GPU has its updates queued, and works beside the CPU
        return self.step(self.pending)

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
           if hasattr(signal, name)]  # that interrupt a run

def in_worker(main_process: int, thunk: Callable[[], gym.Env]) -> gym.Env:
    """Makes an environment. In a process of its own it ignores what a terminal sends to all, which
    is for the main process to answer, and SIGUSR1 prints where it is."""
    if os.getpid() != main_process:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        # there may be no such function, on Windows, or no file that it could print to
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):
            faulthandler.register(signal.SIGUSR1)
    return thunk()

class AsyncVectorEnv(gym.vector.AsyncVectorEnv):
    """Steps in processes of their own. Raises InputError if one dies, or hangs for more than
    `timeout` seconds (0: waits for ever); then it prints where."""
    def __init__(self, thunks: list[Callable], timeout: float, **kwargs: Any):
        self.timeout = timeout or None
        self.healthy = False
        thunks = [functools.partial(in_worker, os.getpid(), thunk) for thunk in thunks]
        super().__init__(thunks, **kwargs)

    @contextlib.contextmanager
    def watched(self, advice: str = "see what ended them, memory for example"):
        self.healthy = False
        try:
            yield
            self.healthy = True
        except multiprocessing.TimeoutError:
            pairs = zip(self.processes, self.parent_pipes)
            late = [i for i, (process, pipe) in enumerate(pairs) if not pipe.poll()]
            for i in late if hasattr(signal, "SIGUSR1") else ():
                os.kill(self.processes[i].pid, signal.SIGUSR1)
                time.sleep(0.5)  # two that print at once would mix their lines
            raise InputError(f"environments {late} did not answer for {self.timeout:g} s (where "
                             "they are stands above): mend them, or raise --env-timeout") from None
        except (EOFError, ConnectionError):
            sentinels = [process.sentinel for process in self.processes]
            ended = multiprocessing.connection.wait(sentinels, timeout=5)
            dead = [i for i, sentinel in enumerate(sentinels) if sentinel in ended]
            raise InputError(f"the processes of environments {dead} died: {advice}") from None

    def _check_spaces(self) -> None:
        with self.watched("what they printed stands above; a script of yours that begins a run "
                          "must be a file, and do so under if __name__ == \"__main__\""):
            super()._check_spaces()

    def reset_async(self, *args: Any, **kwargs: Any) -> None:
        with self.watched():
            super().reset_async(*args, **kwargs)

    def step_async(self, actions: Any) -> None:
        with self.watched():
            super().step_async(actions)

    def reset_wait(self, timeout: float | None = None) -> tuple:
        with self.watched():
            return super().reset_wait(self.timeout)

    def step_wait(self, timeout: float | None = None) -> tuple:
        with self.watched():
            return super().step_wait(self.timeout)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Does not wait for environments that may never answer."""
        if terminate := terminate or not self.healthy or not all(
                process.is_alive() for process in self.processes):
            for process in self.processes:
                process.kill()
            self._state = gym.vector.async_vector_env.AsyncState.DEFAULT
        super().close_extras(timeout, terminate)

def close_envs(envs: gym.vector.VectorEnv, terminate: bool = False) -> None:
    """Closes them. What they raise is warned of: it says nothing about the agent."""
    try:
        envs.close(terminate=terminate)
    except Exception as problem:  # of their own kinds
        warnings.warn(f"the environments were not closed: {problem!r}")

@contextlib.contextmanager
def closing(envs: gym.vector.VectorEnv):
    try:
        yield envs
    finally:
        close_envs(envs)

def make_vector_env(args: Args, num_envs: int, run_name: str, seeds: list[int],
                    capture_video: bool = False) -> gym.vector.VectorEnv:
    """`num_envs` environments that reset themselves: the step after an episode's last one ignores
    its action and returns the next episode's first observation, with reward 0."""
    thunks = [make_env(args, i, capture_video, run_name, seeds[i]) for i in range(num_envs)]
    mode = gym.vector.AutoresetMode.NEXT_STEP
    if args.vectorization == "sync":
        return SyncVectorEnv(thunks, autoreset_mode=mode)
    context = "spawn" if args.pixels and sys.platform != "win32" else None  # GL dies in a fork
    return AsyncVectorEnv(thunks, args.env_timeout, context=context, autoreset_mode=mode)

def leaves(tree: Any, root: str, path: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and tuples, spaces or batches, by path: {"a": (x, y)} → {"a/0": x,
    "a/1": y}. A tree that is a leaf itself is called `root`."""
    if not isinstance(tree, (dict, tuple, *TREES)):
        return {path or root: tree}
    found: dict[str, Any] = {}
    for name, branch in tree.items() if hasattr(tree, "items") else enumerate(tree):
        found |= leaves(branch, root, f"{path}/{name}".lstrip("/"))
    return found

def nest(space: gym.Space, values: Any) -> Any:
    """The inverse of `leaves`: a batch of `space` from an iterator over its leaves."""
    if isinstance(space, gym.spaces.Dict):
        return {name: nest(sub, values) for name, sub in space.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(nest(sub, values) for sub in space)
    return next(values)

def classes_of(space: gym.Space) -> tuple[int, ...]:
    """Numbers of choices of a Discrete, MultiDiscrete or MultiBinary space; () for any other."""
    if isinstance(space, gym.spaces.MultiBinary):
        return (2,) * math.prod(space.shape)
    numbers = getattr(space, "nvec", getattr(space, "n", 0))
    return tuple(np.ravel(numbers).tolist()) if isinstance(space, CHOICES) else ()

class ObservationCodec:
    """Turns batches of observations into dicts of arrays (B, *spec.shape). Images have more than 4
    pixels a side: boxes H×W, H×W×C or C×H×W of uint8 or bool, and H×W×C or C×H×W of floats in
    [0, 1] or [0, 255]. They are resized, and what leaves its range is clipped. All other boxes are
    vectors. Raises InputError for spaces that cannot be used, and for numbers that are not
    finite."""
    remedy = ("provide non-empty Box, Discrete, MultiDiscrete or MultiBinary entries of finite "
              "numbers, for example with gymnasium.wrappers.TransformObservation")

    def __init__(self, space: gym.Space, image_size: int):
        self.spaces = leaves(space, "obs")
        self.image_size = image_size
        self.specs = {name: self.spec(name, sub) for name, sub in sorted(self.spaces.items())}
        if not self.specs:
            raise InputError(f"observation space {space} has no usable key: {self.remedy}")

    def spec(self, name: str, space: gym.Space) -> ObsSpec:
        if classes := classes_of(space):
            return ObsSpec("discrete", (len(classes),), sum(classes), classes)
        if not isinstance(space, gym.spaces.Box) or 0 in space.shape:
            raise InputError(f"observation {name!r} of {space} is not supported: {self.remedy}")
        shape = space.shape + (1,) * (len(space.shape) == 2)
        pixels = space.dtype in (np.uint8, np.bool_) or (
            len(space.shape) == 3 and space.low.min() == 0 and space.high.max() in (1, 255))
        if len(shape) == 3 and pixels and sorted(shape)[1] > 4:
            channels = shape[0] if self.channels_first(shape) else shape[2]
            return ObsSpec("image", (self.image_size, self.image_size, channels), channels)
        if (n := math.prod(space.shape)) > 4096:
            warnings.warn(f"observation {name!r} {space.shape} of {space.dtype} is taken for a "
                          "vector; an image would be uint8, height × width × channels")
        return ObsSpec("vector", (n,), n)

    @staticmethod
    def channels_first(shape: tuple[int, ...]) -> bool:
        return shape[0] < shape[2] and shape[0] != shape[1]  # a square board may have many channels

    def __call__(self, obs: Any) -> dict[str, np.ndarray]:
        found = leaves(obs, "obs")
        out = {}
        for name, spec in self.specs.items():
            x = np.asarray(found[name])
            space = self.spaces[name]
            if x.dtype.kind == "f" and not np.isfinite(x := x.astype(np.float32)).all():
                bad = x[~np.isfinite(x)][0]
                raise InputError(f"observation {name!r} holds {bad}: {self.remedy}")
            if spec.kind == "image":
                if x.ndim == 4 and self.channels_first(x.shape[1:]):
                    x = x.transpose(0, 2, 3, 1)
                out[name] = self.resize(x.reshape(*x.shape[:3], -1), spec, space)
            elif spec.kind == "discrete":
                start = np.ravel(getattr(space, "start", 0))
                out[name] = choices = x.reshape(len(x), -1).astype(np.int64) - start
                wrong = ((choices < 0) | (choices >= spec.classes)).any(-1)
                if wrong.any():
                    raise InputError(f"observation {name!r} holds {x[wrong][0].tolist()}, and its "
                                     f"space is {space}: correct either")
            else:
                out[name] = x.reshape(len(x), -1).astype(np.float32, copy=False)
        return out

    def resize(self, x: np.ndarray, spec: ObsSpec, space: gym.spaces.Box) -> np.ndarray:
        low = float(space.low.min())
        high = float(space.high.max())
        if x.shape[1:] == spec.shape and x.dtype == np.uint8 and (low, high) == (0.0, 255.0):
            return x
        pixels = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float()
        pixels = (pixels - low) * (255 / max(high - low, 1e-6))
        enlarge = max(x.shape[1:3]) <= self.image_size
        pixels = F.interpolate(pixels, spec.shape[:2], mode="nearest" if enlarge else "area")
        return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()

class ActionCodec:
    """Turns the networks' flat actions (one-hots and raw Gaussian samples) into those of a space.
    heads: name → ("discrete", classes) or ("continuous", n); size: A; noise_size: uniform numbers
    that a sample needs. Raises InputError for spaces that are unbounded or not supported."""
    def __init__(self, space: gym.Space):
        self.space = space
        self.spaces = leaves(space, "action")
        self.heads = {name: self.head(sub) for name, sub in self.spaces.items()}
        if not self.heads:
            raise InputError(f"action space {space} is empty: the agent has nothing to choose")
        heads = self.heads.values()
        self.widths = [sum(n) if kind == "discrete" else n for kind, n in heads]
        self.size = sum(self.widths)
        self.noise_size = sum(len(n) if kind == "discrete" else n for kind, n in heads)

    def head(self, space: gym.Space) -> tuple[str, Any]:
        if classes := classes_of(space):
            return "discrete", classes
        if not isinstance(space, gym.spaces.Box) or 0 in space.shape:
            raise InputError(f"action space {space} is not supported: use Box, Discrete, "
                             "MultiDiscrete or MultiBinary")
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise InputError(f"action space {space} is unbounded: give it bounds, for example with "
                             "gymnasium.wrappers.TransformAction(env, lambda a: a, "
                             f"gymnasium.spaces.Box(-1, 1, {space.shape}))")
        return "continuous", math.prod(space.shape)

    def decode(self, flat: np.ndarray) -> Any:
        """(B, A) → a batch of actions as a vector environment expects it."""
        pieces = np.split(flat, np.cumsum(self.widths)[:-1], axis=1)
        values = zip(pieces, self.heads.values(), self.spaces.values())
        return nest(self.space, (self.decode_leaf(x, *head, sub) for x, head, sub in values))

    def decode_leaf(self, x: np.ndarray, kind: str, n: Any, space: gym.Space) -> np.ndarray:
        if kind == "discrete":
            choices = [c.argmax(-1) for c in np.split(x, np.cumsum(n)[:-1], axis=1)]
            value = np.stack(choices, -1).reshape(-1, *space.shape) + getattr(space, "start", 0)
        else:  # [-1, 1] → [low, high]; the raw sample may lie outside
            unit = (np.clip(x, -1, 1).astype(np.float64).reshape(-1, *space.shape) + 1) / 2
            value = space.low + unit * (space.high.astype(np.float64) - space.low)
            value = value.round() if space.dtype.kind in "iub" else value
        return value.astype(space.dtype)

# --------------------------------------------------------- evaluation, pictures and checkpoints

@contextlib.contextmanager
def preserve_randomness(*generators: torch.Generator):
    """Puts Python's, NumPy's and the given generators back where they were: looking at a run does
    not change it."""
    states = [rng.get_state() for rng in generators]
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for rng, state in zip(generators, states):
            rng.set_state(state)

def evaluate(agent: Dreamer, args: Args, episodes: int, run_name: str = "eval",
             deterministic: bool = False, capture_video: bool = False, max_steps: int = 27_000,
             purpose: str = "evaluation"):
    """Returns (sums of reward) of `episodes` episodes, the first of as many environments, so that
    short episodes are not favoured. At most `max_steps` steps (30 minutes of Atari) count. Another
    `purpose` has other seeds."""
    seeds = derive_seeds(args.seed, purpose, count=episodes)
    state = None
    done = np.zeros(episodes, bool)
    returns = np.zeros(episodes)
    is_first = ~done
    running = ~done
    with preserve_randomness(agent.act_rng), agent.evaluating(), closing(
            make_vector_env(args, episodes, run_name, seeds, capture_video)) as envs:
        obs, _ = envs.reset(seed=seeds)
        for _ in range(max_steps):
            action, state = agent.act(obs, state, is_first, deterministic)
            obs, reward, terminated, truncated, _ = envs.step(action)
            returns += np.where(running, reward, 0.0)
            is_first = done  # the step after an episode's last begins the next one
            done = terminated | truncated
            running &= ~done
            if not running.any():
                break
    if running.any():
        warnings.warn(f"{running.sum()} of {episodes} episodes did not end within {max_steps:,} "
                      "steps: what they earned until then counts")
    return returns.tolist()

def draw_dreams(agent: Dreamer, buffer: ReplayBuffer, context: int = 5, sequences: int = 6):
    """What the model predicts beside what happened, by key. Images: a video (T, 3H, B·W, 3) of
    truth, model and difference; its bar is green while the model sees and red while it dreams.
    Vectors: a picture (H, W, 3) of one sequence, black the truth and orange the model."""
    data = agent.training_data(buffer.sample(sequences, online=False))
    length = data["reward"].shape[1]
    pictures = {}
    context = min(context, length - 1)
    noise = agent.uniform(agent.act_rng, sequences, length, agent.wm.rssm.stoch_shape[0], 1)
    for name, model in agent.wm.open_loop(data, context, noise).items():
        true = data["obs"][name].float().cpu()
        model = model.cpu()
        kind = agent.observations.specs[name].kind
        if kind == "image":
            true = true / 255
            side = true.shape[2]
            video = torch.cat([true, model, (model - true + 1) / 2], 2)  # (B, T, 3H, W, C)
            video = video.permute(1, 2, 0, 3, 4).flatten(2, 3)  # (T, 3H, B·W, C)
            video = video[..., [0, 1, 2] if video.shape[-1] >= 3 else [0, 0, 0]]
            pictures[name] = video = (video * 255).byte().numpy()
            video[:context, side : side + 2] = (0, 200, 0)
            video[context:, side : side + 2] = (200, 0, 0)
        elif kind == "vector":
            curves = torch.stack([symlog(true[0]), model[0]])[..., :6].permute(2, 0, 1)  # (n, 2, T)
            low = curves.amin((1, 2), True)
            high = curves.amax((1, 2), True)
            heights = (75 - 70 * (curves - low) / (high - low).clamp(min=1e-6)).round().int()
            picture = np.full((len(curves), 80, length, 6, 3), 255, np.uint8)  # 6 pixels a step
            picture[:, :, context, 0] = 128  # here the dream begins
            for component, t in itertools.product(range(len(curves)), range(length)):
                for height, color in zip(heights[component, :, t], ((0, 0, 0), (255, 140, 0))):
                    picture[component, height : height + 2, t] = color
            pictures[name] = picture.reshape(-1, 6 * length, 3)
    return pictures

def save_pictures(pictures: dict[str, np.ndarray], writer: Any, run_dir: Path, step: int) -> None:
    """Writes videos (T, H, W, 3) as GIF and pictures (H, W, 3) as PNG to run_dir/dreams, and to
    TensorBoard, which shows four frames of a video, one below the other."""
    from PIL import Image

    (run_dir / "dreams").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        path = run_dir / "dreams" / f"{name.replace('/', '-')}_{step:09d}"
        if picture.ndim == 4:
            first, *later = [Image.fromarray(frame) for frame in picture]
            first.save(f"{path}.gif", save_all=True, append_images=later, duration=100, loop=0)
            picture = np.concatenate(picture[np.linspace(0, len(picture) - 1, 4).astype(int)])
        else:
            Image.fromarray(picture).save(f"{path}.png")
        writer.add_image(f"dreams/{name}", picture, step, dataformats="HWC")

def save_file(path: Path, content: dict[str, Any]) -> None:
    """Writes beside the old file, and replaces it only when the new one is on the disk."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def load_file(run_dir: str | Path, name: str = "agent.pt") -> dict[str, Any]:
    """What save_file wrote: tensors and plain values, no code. Raises InputError without one."""
    path = Path(run_dir) / name
    if not path.is_file():
        raise InputError(f"{run_dir} holds no {name}: give the folder of a run that ended, was "
                         "interrupted, or was started with --checkpoint-every")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # compares checksums, which torch.load does not
                raise zipfile.BadZipFile(damaged)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds
        remedy = "take a copy, or " + ("start anew" if name == "agent.pt" else "delete it")
        raise InputError(f"{path} is damaged or of another program ({type(error).__name__}): "
                         f"{remedy}") from None

def restore(agent: Dreamer, run_dir: str | Path, rank: int = 0) -> dict[str, Any]:
    """Loads a saved agent into `agent`, and returns the run's counters. Raises InputError if it
    does not fit. Saved noise is that of the first process; the others begin new streams."""
    saved = load_file(run_dir)
    try:
        agent.load_state_dict(saved["agent"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"the agent in {run_dir} does not fit these arguments, resume it with its "
                         f"own env_id, size and image_size: {reason}") from None
    if rank:
        agent.seed_noise(rank, saved["counters"]["updates"])
    return saved["counters"]

def parse_args(argv: list[str] | None = None, args_class: type[Args] = Args) -> Args:
    """The command line, on top of the preset of its --env-id or of a saved run's arguments."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what chooses the defaults
    for name in ("env_id", "run_dir", "resume", "evaluate"):
        flags = f"--{name}", f"--{name.replace('_', '-')}"
        first.add_argument(*dict.fromkeys(flags), default=getattr(args_class, name))
    first.add_argument("--pixels", action="store_true")
    first.add_argument("--compile", action=argparse.BooleanOptionalAction)
    known, _ = first.parse_known_args(argv)
    restarted = (bool(known.run_dir) and not (known.resume or known.evaluate)
                 and Path(known.run_dir, "agent.pt").is_file())
    run_dir = known.resume or known.evaluate or (known.run_dir if restarted else "")
    try:
        default = (args_class(**load_file(run_dir)["args"]) if run_dir
                   else args_class.preset(known.env_id, known.pixels))
    except (TypeError, KeyError) as error:
        raise InputError(f"{run_dir} is of another script or another version ({error})") from None
    default = dataclasses.replace(default, run_dir="", resume="", evaluate="")
    description = sys.modules[args_class.__module__].__doc__.split("\n\n")[0]
    args = tyro.cli(args_class, args=argv, default=default, description=description)
    if known.compile is None and not run_dir:
        args.compile = worth_compiling(args)
    return dataclasses.replace(args, run_dir="", resume=args.run_dir) if restarted else args

def worth_compiling(args: Args) -> bool:
    """On a GPU, and on a CPU in long runs: there it pays after some 75,000 to 120,000 steps of the
    loops over time (benchmark/README.md), if there are a C++ compiler and Python's headers."""
    if args.cuda and torch.cuda.is_available():
        return True
    updates = args.total_timesteps * args.train_ratio / (args.batch_size * args.batch_length)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return (updates * (args.batch_length + args.imagination_horizon) > 150_000
            and shutil.which(os.environ.get("CXX", "g++")) is not None and headers.is_file())

# --------------------------------------------------------------------------------------- the run

def keep_freed_memory() -> None:
    """Tells glibc not to give large blocks back to the system, only to ask for them again: 4 to 6%
    of an update on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems, other libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped alone
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is kept

class Run:
    """What surrounds the loop of `main`: processes, seeds, folder, log, checkpoints, interruption
    and summary. As a context it saves and summarises, however the loop ends.
    Under torchrun every process has environments and a replay of its own; the first one logs,
    evaluates and saves the agent, and each saves its replay."""
    def __init__(self, args: Args):
        args.check()
        self.args = args
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        gpu = args.cuda and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.backends.cudnn.deterministic = True
        if self.ranks > 1 and not distributed.is_initialized():
            patience = datetime.timedelta(hours=2)  # while the first process evaluates
            distributed.init_process_group("nccl" if gpu else "gloo", timeout=patience)
        torch.manual_seed(derive_seeds(args.seed, "weights")[0])  # the same in every process
        keep_freed_memory()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # half of them: with all, any other process would stall every layer
        torch.set_num_threads(args.threads or max(1, cores // 2 // self.ranks))
        env = args.env_id.replace("/", "-").replace(":", "-")
        name = [f"runs/{env}__{args.exp_name}__{args.seed}__{int(time.time())}"]
        if self.ranks > 1:
            distributed.broadcast_object_list(name)
        self.dir = Path(args.resume or args.evaluate or args.run_dir or name[0])
        self.saved_args = {}
        if args.resume or args.evaluate:
            self.saved_args = load_file(self.dir)["args"]  # fails before anything is made
        self.replay_file = f"replay{self.rank or ''}.pt"
        self.counters = {"global_step": 0, "updates": 0, "updates_owed": 0.0, "annealed": 0.0,
                         "seconds": 0.0, "ranks": self.ranks, "solved": None}  # as this part begins
        self.step = 0
        self.updates = 0
        self.updates_owed = 0.0
        self.signal: int | None = None  # that interrupted the run
        self.ending = False  # after this step, as all processes know
        self.handlers = {}  # of signals, before the run
        self.saving = False
        self.lock: int | None = None  # descriptor of the folder
        self.episodes = []
        self.eval_returns = []
        self.metrics = {}
        self.solved = False  # has an evaluation reached stop_at?
        self.first_log: tuple[float, int] | None = None  # when it was, and after how many updates
        self.announced = False  # how long it will take
        self.above_floor = 0  # last update at which the KL was known to be above its free nats

    def make_envs(self) -> gym.vector.VectorEnv:
        args = self.args
        num_envs = 1 if self.args.evaluate else self.args.num_envs
        record = args.capture_video and self.rank == 0 and not args.evaluate
        seeds = derive_seeds(args.seed, "environments", self.rank, num_envs)
        return make_vector_env(args, num_envs, self.dir.name, seeds, record)

    def play_saved(self, agent: Dreamer) -> dict[str, Any]:
        """Evaluates the agent of a saved run. Writes nothing but videos."""
        restore(agent, self.dir)
        args = self.args
        name = f"{self.dir.name}__evaluation"
        self.eval_returns = evaluate(agent, args, args.eval_episodes, name, args.deterministic,
                                     args.capture_video)
        print(f"{self.dir}: evaluation return {self.eval_sentence()}")
        return self.eval_results()

    def begin(self, envs: gym.vector.VectorEnv, agent: Dreamer) -> ReplayBuffer:
        """Makes the replay, restores what is resumed, and only then the folder and the log."""
        args = self.args
        self.envs = envs
        self.agent = agent
        if args.resume:
            self.counters |= restore(agent, self.dir, self.rank)
        if self.counters["ranks"] != self.ranks:
            before = self.counters["ranks"]
            raise InputError(f"{self.dir} was run by {before} processes, not by {self.ranks}: "
                             f"resume it with torchrun --nproc-per-node {before}")
        self.step = self.counters["global_step"]
        self.updates = self.above_floor = self.counters["updates"]
        self.updates_owed = self.counters["updates_owed"]
        self.solved = self.counters["solved"] == (args.stop_at, args.total_timesteps)
        if self.finished:
            done = (f"reached {args.stop_at}: give --stop-at None, or a higher one" if self.solved
                    else f"made its {self.step:,} steps: raise --total-timesteps")
            raise InputError(f"{self.dir} has {done}, or play it with --evaluate")
        if args.anneal_lr and self.annealed >= 1:
            warnings.warn("the step size was annealed to zero: add --no-anneal-lr to learn on, and "
                          "--no-anneal-ent if the entropy's weight was")
        self.buffer = self.make_buffer(envs.num_envs)
        if args.resume:
            self.load_replay()
        held = self.buffer.count
        batch_rows = math.ceil(args.batch_size * args.batch_length / self.buffer.num_envs)
        self.enough = max(batch_rows, self.buffer.window)
        first = self.enough * envs.num_envs * self.ranks
        if self.ranks > 1:  # all begin to learn when the least filled replay lets them
            distributed.all_gather_object(counts := [0] * self.ranks, held)
            self.enough += held - min(counts)
        if args.total_timesteps < first:
            warnings.warn(f"nothing will be learned: the first update needs {first:,} steps in the "
                          f"replay, and total_timesteps are {args.total_timesteps:,}")
        self.writer = self.open_log() if self.rank == 0 else None
        if self.ranks > 1:
            distributed.barrier()  # no process saves before there is a folder
        from tqdm import tqdm
        self.bar = tqdm(total=args.total_timesteps, initial=self.step, unit="step",
                        disable=self.rank > 0 or None, smoothing=0.05)
        self.start = time.time()
        return self.buffer

    def make_buffer(self, streams: int) -> ReplayBuffer:
        """This process's replay, to which every step of all environments adds `streams` rows."""
        args = self.args
        rows = min(args.buffer_size, args.total_timesteps * streams // self.envs.num_envs)
        capacity = max(rows // self.ranks, (args.batch_length + 1) * streams)
        device = args.buffer_device if self.agent.device.type == "cuda" else "cpu"
        seed = derive_seeds(args.seed, "replay", self.rank)[0]
        return ReplayBuffer(capacity, streams, args.batch_length, self.agent.replay_specs(), seed,
                            device)

    def load_replay(self) -> None:
        if not (self.dir / self.replay_file).is_file():
            warnings.warn(f"{self.dir} holds no {self.replay_file}: learning goes on when a new "
                          "one is filled")
            return
        saved = load_file(self.dir, self.replay_file)
        step = saved.get("step", self.step)  # replays of earlier versions do not tell
        if step != self.step:
            warnings.warn(f"the agent is of step {self.step:,}, its replay of step {step:,}")
        self.buffer.load_state_dict(saved)

    def open_log(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        args = self.args
        buffer = self.buffer
        if args.track:
            with explain_failure("wandb", "pip install wandb, or leave out --track"):
                import wandb
            wandb.init(name=self.dir.name, config=vars(args), sync_tensorboard=True, save_code=True)
        try:
            self.dir.mkdir(parents=True, exist_ok=bool(args.resume or args.run_dir))
        except OSError as error:
            if self.dir.is_dir():
                raise InputError(f"{self.dir} is another run's, begun in the same second: start "
                                 "again, or give this one an --exp-name") from None
            raise InputError(f"{self.dir} cannot be made ({error.strerror}): start where you may "
                             "write") from None
        self.lock_folder()
        # of a run that was killed, what it logged after its last checkpoint is made again
        writer = SummaryWriter(str(self.dir), purge_step=self.step + 1)
        pair = ["diagnostics/tar", "diagnostics/real_return"]  # λ-returns of dreams, of the replay
        writer.add_custom_scalars({"returns": {"dreamed and real": ["Multiline", pair]}})
        rows = [f"|{name}|{value}|" for name, value in vars(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|param|value|", "|-|-|", *rows]))
        for name, value in vars(args).items():
            before = self.saved_args.get(name, value)
            changed = before != value and name not in ("resume", "run_dir")
            print(f"{name} = {value}" + (f"  (it was {before})" if changed else ""))
        for name, spec in self.agent.observations.specs.items():
            print(f"observation {name}: {spec.kind} {spec.shape}")
        steps = buffer.num_envs * buffer.rows
        number_format = "bfloat16" if self.agent.in_bfloat16 else "float32"
        print(f"{self.dir}: {sum(p.numel() for p in self.agent.learned):,} parameters on "
              f"{self.ranks} × {self.agent.device}, updates in {number_format}; replay of "
              f"{steps:,} steps on {buffer.device}, "
              f"{steps * buffer.bytes_per_step / 2**30:.2f} GiB when full")
        if args.compile:
            print("the first updates are compiled, which takes minutes; Ctrl-C waits for them")
        return writer

    def lock_folder(self) -> None:
        """Raises InputError if another process runs in this folder, as far as the system tells."""
        with contextlib.suppress(ImportError, OSError):  # there is no fcntl on Windows
            import fcntl

            self.lock = os.open(self.dir, os.O_RDONLY)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.dir} is used by another process: let it end") from None

    def reset(self, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, np.ndarray]]:
        """The first observations, and what arrives with them."""
        n = self.envs.num_envs
        seeds = derive_seeds(self.args.seed, f"reset {self.step}", self.rank, n)
        obs, _ = self.envs.reset(seed=seeds, options=options)
        no = np.zeros(n, bool)
        return obs, {"reward": np.zeros(n), "is_first": ~no, "is_last": no, "is_terminal": no}

    def updates_due(self) -> int:
        """Updates to make after this step: train_ratio / (B·T) for each environment step, once the
        replay holds a batch of different steps and a window of every environment."""
        batch_steps = self.args.batch_size * self.args.batch_length
        if self.buffer.count >= self.enough:
            self.updates_owed += self.envs.num_envs * self.args.train_ratio / batch_steps
        due = int(self.updates_owed)
        self.updates_owed -= due
        self.updates += due
        return due

    def arrive(self, before: dict[str, np.ndarray], reward: np.ndarray, terminated: np.ndarray,
               truncated: np.ndarray) -> dict[str, np.ndarray]:
        """What arrived with a step of the environments, for the replay. Counts the step."""
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(reward, np.float32))  # as the replay has them
        if not finite.all():
            raise InputError(f"reward {reward[~finite][0]} at step {self.step}: make all rewards "
                             "finite, for example with gymnasium.wrappers.TransformReward")
        self.step += self.envs.num_envs * self.ranks
        if self.ranks > 1:  # a signal reaches them in different steps, and all must end after one
            number = torch.tensor(self.signal or 0, device=self.agent.device)
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
            self.end_with(int(number))
        return {"reward": reward, "is_first": before["is_last"], "is_last": terminated | truncated,
                "is_terminal": terminated}

    @property
    def finished(self) -> bool:
        return self.solved or self.ending or self.step >= self.args.total_timesteps

    @property
    def annealed(self) -> float:
        """What fraction of the way to zero is gone by what is annealed. Where a run is continued
        it does not jump, even if its length has changed."""
        before = self.counters
        steps = max(1, self.args.total_timesteps - before["global_step"])
        left = (1 - before["annealed"]) * (1 - (self.step - before["global_step"]) / steps)
        return 1 - left

    def end_with(self, number: int) -> None:
        """Ends the run after this step if `number` is that of a signal, and not 0."""
        if number:
            self.signal = number
            self.ending = True

    def interrupt(self, number: int, frame: Any) -> None:
        """Handles a signal: the run ends after this step, or at once if it is evaluating or asked
        for the second time. Saving goes on. Of several processes none ends before the others are
        told, see `arrive`; torchrun sends a signal once more."""
        again = self.signal is not None and self.ranks == 1
        self.signal = number
        if self.ranks == 1:
            self.ending = True
        if not self.agent.training or (again and not self.saving):
            raise KeyboardInterrupt

    def crossed(self, every: int) -> bool:
        """Did the last step of all environments cross a multiple of `every`?"""
        before = self.step - self.envs.num_envs * self.ranks
        return every > 0 and self.step // every > before // every

    def log(self, metrics: Tensors, info: dict[str, Any]) -> None:
        """Records episodes that ended and, when due, losses, pictures, evaluations, checkpoints."""
        args = self.args
        self.metrics = metrics
        with contextlib.suppress(OSError):
            self.bar.update(self.envs.num_envs * self.ranks)
        if self.writer and not self.dir.is_dir():
            self.dir.mkdir(parents=True)
            self.say(f"warning: {self.dir} was deleted; what comes now is saved in a new one")
        for i in np.flatnonzero(info.get("_dreamer_episode", ())):
            self.episodes.append(float(info["dreamer_episode"]["r"][i]))
            if self.rank == 0:
                self.say(f"global_step={self.step}, episodic_return={self.episodes[-1]:.2f}")
            self.record({"charts/episodic_return": self.episodes[-1],
                         "charts/episodic_length": info["dreamer_episode"]["l"][i]})
        if metrics and (self.crossed(args.log_every) or self.finished):
            self.log_metrics()
        if metrics and self.writer and self.crossed(args.video_every):
            with self.logging(), self.agent.uncompiled(), \
                    preserve_randomness(self.agent.act_rng, self.buffer.generator):
                save_pictures(self.draw(), self.writer, self.dir, self.step)
        if self.crossed(args.eval_every) and not self.finished:  # else it is evaluated anyway
            solved = False
            try:
                self.evaluate(f"evaluation at {self.step}")
                solved = (args.stop_at is not None and self.rank == 0
                          and float(np.mean(self.eval_returns)) >= args.stop_at)
            finally:  # for the others wait
                told = [solved, self.signal or 0]
                if self.ranks > 1:
                    distributed.broadcast_object_list(told)
                    self.end_with(told[1])
            self.solved = told[0]
        if self.crossed(args.checkpoint_every):
            self.save()

    def log_metrics(self) -> None:
        """Raises InputError if losses or gradients are no longer finite."""
        means = torch.stack([x.float() for x in self.metrics.values()])
        average_over_processes([means])
        values = dict(zip(self.metrics, means.tolist()))
        progress = self.progress()
        speed = progress["updates_per_second"]
        steps = len(self.buffer)
        self.record(values | {"charts/SPS": progress["sps"], "charts/updates_per_second": speed,
                              "charts/replay_size": steps,
                              "charts/replay_bytes": steps * self.buffer.bytes_per_step})
        with contextlib.suppress(OSError):
            self.bar.set_postfix(updates_s=f"{speed:.1f}", returns=np.round(self.episodes[-3:], 1))
        if self.rank == 0 and not self.announced and not self.finished:
            self.announce()
        floor = self.args.free_nats * self.agent.wm.rssm.kl_groups
        if values["losses/dyn"] > 1.00001 * floor:
            self.above_floor = self.updates
        elif self.updates >= self.above_floor + 1000 and self.rank == 0:
            self.say(f"warning: the KL was at its {floor:g} free nats for "
                     f"{self.updates - self.above_floor:,} updates, so latents say next to "
                     "nothing: raise --rec-scale, or lower --free-nats")
            self.above_floor = self.updates
        for name, value in values.items():
            watched = name.startswith("losses/") or name == "diagnostics/grad_norm"
            if watched and not math.isfinite(value):
                raise InputError(f"{name} became {value} by step {self.step}: lower "
                                 "--learning-rate, or --resume from what --checkpoint-every saved")

    def announce(self) -> None:
        """Says how long the run will take, at its pace since the first record: what came before
        was slower where it was compiled."""
        if self.first_log is None:
            self.first_log = time.time(), self.updates
        elif made := self.updates - self.first_log[1]:
            self.announced = True
            batch_steps = self.args.batch_size * self.args.batch_length * self.ranks
            left = (self.args.total_timesteps - self.step) * self.args.train_ratio / batch_steps
            hours = left / made * (time.time() - self.first_log[0]) / 3600
            self.say(f"{left:,.0f} updates to come, about {hours:.1f} hours; a smaller "
                     "--size, --train-ratio or --total-timesteps takes less")

    def say(self, text: str) -> None:
        """Prints above the progress bar. A full disk or a closed terminal costs no more than it."""
        with contextlib.suppress(OSError):
            self.bar.write(text)

    def record(self, values: dict[str, Any]) -> None:
        with self.logging():
            for tag, value in values.items() if self.writer else ():
                self.writer.add_scalar(tag, float(value), self.step)

    @contextlib.contextmanager
    def logging(self):
        """What cannot be written, as the disk is full or the folder gone, is warned of and lost.
        The thread of TensorBoard that met it has ended: what comes next goes to a new file."""
        try:
            yield
        except OSError as problem:
            warnings.warn(f"some of the log of step {self.step:,} is lost: {problem}")
            with contextlib.suppress(OSError):
                self.writer = type(self.writer)(str(self.dir))

    def draw(self) -> dict[str, np.ndarray]:
        return draw_dreams(self.agent, self.buffer)

    def evaluate(self, purpose: str = "evaluation") -> None:
        if self.rank == 0:
            self.eval_returns = evaluate(self.agent, self.args, self.args.eval_episodes,
                                         self.dir.name, self.args.deterministic, purpose=purpose)
            self.record({"eval/episodic_return": np.mean(self.eval_returns)})
            self.say(f"global_step={self.step}, eval_return={self.eval_sentence()}")

    def eval_results(self) -> dict[str, Any]:
        x = self.eval_returns
        return {"eval_return_mean": float(np.mean(x)) if x else None,
                "eval_return_std": float(np.std(x)) if x else None, "eval_returns": x}

    def eval_sentence(self) -> str:
        x = self.eval_returns
        return f"{np.mean(x):.2f} ± {np.std(x):.2f} over {len(x)} episodes" if x else "none"

    def progress(self) -> dict[str, Any]:
        """Counters of the whole run, and the speeds of this part of it."""
        seconds = time.time() - self.start
        before = self.counters
        annealing = self.args.anneal_lr or self.args.anneal_ent
        return {"global_step": self.step, "updates": self.updates, "ranks": self.ranks,
                "updates_owed": self.updates_owed, "annealed": self.annealed if annealing else 0.0,
                "solved": (self.args.stop_at, self.args.total_timesteps) if self.solved else None,
                "seconds": before["seconds"] + seconds,
                "sps": (self.step - before["global_step"]) / seconds,
                "updates_per_second": (self.updates - before["updates"]) / seconds}

    def save(self) -> None:
        """Writes agent and replay, unless the weights are no longer finite. What cannot be written
        is warned of, and skips nothing else."""
        if not all(p.isfinite().all() for p in self.agent.learned):
            warnings.warn("the weights are no longer finite, and are not saved")
            return
        self.saving = True
        files = {"agent.pt": self.saved} if self.rank == 0 else {}
        files[self.replay_file] = lambda: self.buffer.state_dict() | {"step": self.step}
        for name, content in files.items():
            try:
                save_file(self.dir / name, content())
            except (OSError, RuntimeError) as error:  # the disk is full, for example
                warnings.warn(f"{self.dir / name} of step {self.step:,} is not saved: {error}")
        self.saving = False

    def saved(self) -> dict[str, Any]:
        return {"agent": self.agent.state_dict(), "args": vars(self.args),
                "counters": self.progress()}

    def __enter__(self) -> "Run":
        """From here on, signals are handled by `interrupt`."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    self.handlers[number] = signal.signal(number, self.interrupt)
        return self

    def __exit__(self, kind: type | None, error: Any, trace: Any) -> bool:
        interrupted = kind is not None or self.signal is not None
        progress = self.progress()
        with contextlib.suppress(OSError):
            self.bar.close()
        if self.args.save_model:
            self.save()
        self.eval_returns = []  # those there are were of an earlier agent
        failure = None  # of what comes now: the summary is written anyway
        try:
            close_envs(self.envs, terminate=interrupted)
            if not interrupted and self.signal is None:
                self.evaluate()
        except KeyboardInterrupt:
            pass
        except Exception as problem:
            failure = problem
        self.saving = True
        gpu = self.agent.device.type == "cuda"
        self.summary = progress | self.eval_results() | {
            "interrupted": interrupted, "signal": self.signal,
            "train_returns": self.episodes[-20:], "args": vars(self.args),
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "in_bfloat16": self.agent.in_bfloat16,
            "versions": {x.__name__: x.__version__ for x in (torch, np, gym)}}
        if self.writer:
            try:
                (self.dir / "summary.json").write_text(json.dumps(self.summary, indent=2))
                self.writer.close()
            except OSError as problem:
                warnings.warn(f"the summary is not saved: {problem}")
            self.say(f"{self.dir}: {self.step:,} steps, {self.updates:,} updates, "
                     f"{progress['seconds']:.0f} s, evaluation return {self.eval_sentence()}")
            if (self.dir / "agent.pt").is_file():
                if interrupted:
                    self.say(f"go on with --resume {self.dir}")
                elif not self.eval_returns:
                    self.say(f"play it with --evaluate {self.dir}")
        if self.lock is not None:
            os.close(self.lock)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if failure:
            raise failure
        # an interrupted run ends well, even if the signal ended an environment too
        return kind is KeyboardInterrupt or (self.signal is not None and kind is InputError)

def main(args: Args, agent_class: type[Dreamer] = Dreamer) -> dict[str, Any]:
    """Trains, and returns what summary.json holds; with args.evaluate plays a saved agent, and
    returns the evaluation. Raises InputError for bad input."""
    run = Run(args)
    envs = run.make_envs()
    agent = agent_class(envs.single_observation_space, envs.single_action_space, args)
    if args.evaluate:
        close_envs(envs)
        return run.play_saved(agent)
    buffer = run.begin(envs, agent)
    state = None
    metrics = {}
    with run:
        obs, arrived = run.reset()
        while not run.finished:
            # 1. act
            action, state = agent.act(obs, state, arrived["is_first"])
            # 2. store what arrived and what was chosen
            buffer.add(arrived | agent.row(state))
            # 3. step, and in the meantime
            envs.step_async(action)
            # 4. learn
            agent.anneal(run.annealed, run.step)
            for _ in range(run.updates_due()):
                metrics, latents = agent.update(batch := buffer.sample(args.batch_size))
                buffer.write_back(batch, **latents)
            obs, reward, terminated, truncated, info = envs.step_wait()
            arrived = run.arrive(arrived, reward, terminated, truncated)
            # 5. log
            run.log(metrics, info)
    return run.summary

def command_line(args_class: type[Args] = Args, agent_class: type[Dreamer] = Dreamer) -> None:
    """`main` as a program. Its status is 2 after bad input, 128 and the signal's number after an
    interruption."""
    summary = {"interrupted": True}  # before the run began
    try:
        summary = main(parse_args(args_class=args_class), agent_class)
        if distributed.is_initialized():
            gc.collect()  # NCCL does not end before the CUDA graphs that hold its messages
            distributed.destroy_process_group()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        pass
    if summary.get("signal") or summary.get("interrupted"):
        sys.exit(128 + (summary.get("signal") or signal.SIGINT))

if __name__ == "__main__":
    command_line()
