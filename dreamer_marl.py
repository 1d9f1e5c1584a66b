"""Dreaming of Others in one file: DreamerV3 with a world model that knows that others act too.

    python dreamer_marl.py                                  # HiddenMatch: what does a partner like?
    python dreamer_marl.py --teammate-model none            # plain Dreamer, as a comparison
    python dreamer_marl.py --env-id mpe2.simple_spread_v3   # self-play in a PettingZoo ParallelEnv
    python dreamer_marl.py --env-id games.overcooked --partners scripted --scripted greedy
    python dreamer_marl.py --evaluate runs/hidden_match__…  # play a saved agent, with each partner
    python dreamer_marl.py --resume runs/hidden_match__…    # continue a run where it stopped

The upper part of this file consists of definitions of dreamer.py, letter for letter and in the same
order; the lower part, from SocialArgs on, is the method and what it needs. It follows "Dreaming of
Others" (arXiv 2605.31361), a paper without experiments or code. To DreamerV3 it adds four things:

  1. z = [z_env, z_team]: two groups of latents, each with its own prior, posterior and free nats.
     The decoder sees (h, z_env), so that z_env describes the world and z_team need not; rewards,
     ends, actor and critic see everything.
  2. Dynamics of joint actions: h_t = f(h_{t-1}, z_{t-1}, a⁰_{t-1}, a¹_{t-1}, …).
  3. A Theory-of-Mind (ToM) head π̂ʲ(a | h_t, z_t^team, j) learns what teammate j does at the SAME
     step, by −log π̂ʲ(a_tʲ).
  4. Social imagination: in dreams the actor acts for ego, and the ToM head for all others.

Symbols   B batch · T time · H imagination horizon · N = B·T dreams · D deter size · A action size
          S latents of C classes each · U units · G = 8 blocks · E environments · K seats
          h deter · z stoch · feat = [h, z] · sg(·) stop-gradient · a⁰ ego's action, aʲ a teammate's

Time      Row t of the replay holds what arrived at t, and the actions chosen after seeing it:

            row               t-1                 t                  t+1
            arrived     x, r, flags ──┐     x, r, flags ──┐     x, r, flags
            chosen        a⁰, aʲ ─────┼──▶    a⁰, aʲ ─────┼──▶    a⁰, aʲ
            model       h, z ─────────┴──▶  h, z ─────────┴──▶  h, z
            ToM         └▶ π̂(aʲ_{t-1})      └▶ π̂(aʲ_t)          └▶ π̂(aʲ_{t+1})

Deviations from the paper: it decodes the teammate from z_team alone, and dreams z_team in place of
actions; here the ToM head also sees h, which remembers what teammates did, and dreams hold sampled
actions. Learning sees the teammates' actions; acting sees those of the last step or, with
--no-observe-teammates, the ToM head's guesses. All seats share one network, which is told the
number of its seat. Deviations from DreamerV3 are those of dreamer.py.
"""
import argparse
import collections
import contextlib
import copy
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
import pkgutil
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

# =============================================== Dreaming of Others: from here on, the method

MINUTES = dict(  # games of ten steps: minutes on two CPU cores
    size="1m", num_envs=8, total_timesteps=20_000, partners="scripted", batch_size=16,
    batch_length=10, train_ratio=12, imagination_horizon=5, learning_rate=1e-3, warmup=100,
    anneal_lr=True, gamma=0.9, ent_coef=0.01, log_every=1_000, eval_episodes=200)
THOUSANDS = dict(  # of updates, not millions: see classic_control in dreamer.py
    size="1m", num_envs=8, batch_size=16, learning_rate=1e-3, warmup=100, anneal_lr=True, tau=0.1,
    contdisc=False, ent_coef=0.01)
GENTLE = dict(  # smaller steps, for longer runs
    size="1m", num_envs=8, batch_size=16, train_ratio=64, learning_rate=3e-4, warmup=200,
    ent_coef=3e-3)
# What a family of games sets where no flag is given: all ours, for the paper has no experiments.
PRESETS: dict[str, dict[str, Any]] = {
    "hidden_match": MINUTES,
    "games.badge": MINUTES,
    "games.prisoners_dilemma": MINUTES | dict(imagination_horizon=10, gamma=0.98),
    "mpe2.": THOUSANDS | dict(
        train_ratio=20, total_timesteps=100_000, batch_length=25, imagination_horizon=10,
        gamma=0.95, rec_scale=100.0, eval_episodes=50),
    "games.overcooked": THOUSANDS | dict(
        train_ratio=32, total_timesteps=500_000, batch_length=32, gamma=0.99, rec_scale=10.0,
        shaping_steps=250_000, eval_episodes=8),
    "games.hockey": GENTLE | dict(
        total_timesteps=1_000_000, batch_length=32, gamma=0.99, partners="pool",
        pool_weighting="hard", pool_every=20_000, shaping_steps=500_000, eval_episodes=20,
        rec_scale=30.0,  # a collision is a matter of centimetres
        ent_coef=3e-4),
    "games.foraging": GENTLE | dict(
        total_timesteps=200_000, batch_length=25, gamma=0.98, eval_episodes=50),
    "": dict(num_envs=4, train_ratio=128, total_timesteps=500_000),
}
# The spellings of earlier versions: family → module, and the argument that stood after the slash.
RENAMED = {"overcooked": ("games.overcooked", "layout"), "lbf": ("games.foraging", "env_id"),
           "hockey": ("games.hockey", ""), "prisoners_dilemma": ("games.prisoners_dilemma", "")}

def suite_of(env_id: str, pixels: bool = False) -> str:
    """Name of the preset for an environment id: the beginning that it has."""
    return next(suite for suite in PRESETS if env_id.startswith(suite))

@dataclasses.dataclass
class SocialArgs(Args):
    """The comment at a field is its line in --help."""
    exp_name: str = "dreamer_marl"  # name of the experiment, part of the run's name
    # hidden_match, or the module of a PettingZoo ParallelEnv such as mpe2.simple_spread_v3, or of
    # games/ such as games.overcooked
    env_id: str = "hidden_match"
    # JSON object of arguments of the environment. hidden_match has
    # '{"epsilon": 0.3, "q": 0, "actions": 4, "length": 10}'
    env_kwargs: str = "{}"
    # overcooked and hockey: steps of the run over which the shaping part of the reward fades to
    # nothing; 0 leaves it out
    shaping_steps: int = 0

    # who plays the other seats. self: the policy itself, and all seats learn; pool: half of the
    # episodes itself, half past selves; scripted: policies that come with the environment. With the
    # last two the learner sits in a random seat
    partners: Literal["self", "pool", "scripted"] = "self"
    # names of the scripted partners to learn with; none: all usual ones that are not held out
    scripted: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()  # names of scripted partners that are met only in evaluations
    pool_size: int = 20  # past selves that the pool holds
    pool_every: int = 5_000  # steps between additions to the pool; 0: none after the first
    # which past selves are met; x: rate of victories over one; hard: (1 - x)^2, even: x(1 - x)
    pool_weighting: Literal["uniform", "hard", "even"] = "uniform"
    pool_checkpoints: tuple[str, ...] = ()  # folders of other runs whose agents join the pool

    # tom: the method; merged: z_team is part of one z, which decoder and ToM head both see; joint:
    # joint actions, but teammates are imagined by how often they do what; none: plain Dreamer, to
    # which teammates are a part of the world
    teammate_model: Literal["tom", "merged", "joint", "none"] = "tom"
    team_latents: int = 8  # latents of z_team, of the model's 32
    tom_scale: float = 1.0  # weight of the loss of the ToM head
    tom_stop_grad: bool = False  # keep that loss from reaching h and z_team
    observe_teammates: bool = True  # act on the teammates' last actions, not on guesses for them
    oracle: bool = False  # observe the name of the scripted partner too, as an upper bound

    def check(self) -> None:
        """Raises InputError for values that no run could use."""
        super().check()
        family, _, name = self.env_id.partition("/")
        if family in RENAMED:
            module, key = RENAMED[family]
            kwargs = f" --env-kwargs '{json.dumps({key: name})}'" if key and name else ""
            raise InputError(f"env_id {self.env_id!r} is now written --env-id {module}{kwargs}")
        if self.pixels:
            raise InputError("pixels is of dreamer.py alone: here the game decides what is seen")
        latents = SIZES[self.size].latents
        if not 0 < self.team_latents < latents:
            raise InputError(f"team_latents {self.team_latents}: take 1 to {latents - 1}, so that "
                             "both groups have some")
        if self.pool_size < 3:
            raise InputError(f"pool_size {self.pool_size}: take 3 or more, for the oldest and the "
                             "newest always stay")
        if (self.scripted or self.held_out or self.oracle) and self.partners != "scripted":
            raise InputError(f"partners {self.partners!r} have no names: use scripted, held_out "
                             "and oracle only with --partners scripted")
        if self.pool_checkpoints and self.partners != "pool":
            raise InputError(f"partners {self.partners!r} take no pool_checkpoints: add --partners "
                             "pool")

    def env_arguments(self) -> dict[str, Any]:
        """Those of env_kwargs, and the steps of one environment over which shaping fades."""
        kwargs = super().env_arguments()
        if self.shaping_steps:
            processes = int(os.environ.get("WORLD_SIZE", 1))
            kwargs.setdefault("shaping_steps", self.shaping_steps // (self.num_envs * processes))
        return kwargs

# ------------------------------------------------------------------------------------- the model

class Factors(nn.Module):
    """One network for each group of latents; their logits lie side by side."""
    def __init__(self, inputs: int, units: int, layers: int, outputs: tuple[int, ...]):
        super().__init__()
        self.nets = nn.ModuleList([MLP(inputs, units, layers, outputs=n) for n in outputs])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x) for net in self.nets], -1)

class FactorisedRSSM(RSSM):
    """z = [z_env, z_team]. Both groups have their own prior and posterior, from the same h:

        sequence   h_t = f(h_{t-1}, z_{t-1}, a⁰_{t-1}, a¹_{t-1}, …)   ego's action comes first
        posterior  z_t^env ~ q_env(z | h_t, x_t),   z_t^team ~ q_team(z | h_t, x_t)
        prior      z_t^env ~ p_env(z | h_t),        z_t^team ~ p_team(z | h_t)

    With `merged` the same networks make one group of latents."""
    def __init__(self, tokens: int, actions: int, size: Size, team_latents: int,
                 merged: bool = False):
        super().__init__(tokens, actions, size)
        latents = (size.latents - team_latents, team_latents)
        self.groups = (size.latents,) if merged else latents
        self.kl_groups = len(self.groups)
        outputs = tuple(n * size.classes for n in latents)
        self.prior = Factors(size.deter, size.hidden, 2, outputs)
        self.posterior = Factors(size.deter + tokens, size.hidden, 1, outputs)

    def kl_loss(self, post: Tensor, prior: Tensor, free: float = 1.0) -> tuple[Tensor, Tensor]:
        """Logits (…, S, C) → dyn (…) and rep (…), sums over the groups, each with its free nats."""
        pairs = zip(post.split(self.groups, -2), prior.split(self.groups, -2))
        losses = [RSSM.kl_loss(self, *pair, free) for pair in pairs]
        return sum(dyn for dyn, _ in losses), sum(rep for _, rep in losses)

class SocialWorldModel(WorldModel):
    """WorldModel that models the teammates too. The arms of --teammate-model have the same
    networks, and differ in what these may see; `tom` alone has two groups of free nats."""
    def __init__(self, specs: dict[str, ObsSpec], actions: ActionCodec, seats: int,
                 args: SocialArgs):
        self.heads = actions.heads
        self.mates = seats - 1
        super().__init__(specs, actions.size * seats, args)
        latents = self.size.latents
        team = torch.arange(latents) >= latents - args.team_latents
        self.register_buffer("team", team[:, None].float(), persistent=False)  # (S, 1)

    def make_rssm(self, tokens: int, actions: int) -> RSSM:
        merged = self.args.teammate_model != "tom"
        return FactorisedRSSM(tokens, actions, self.size, self.args.team_latents, merged)

    def make_heads(self, feat: int, units: int) -> None:
        super().make_heads(feat, units)
        # π̂ʲ has the shape of a policy. Teammates share its weights; j enters as a one-hot.
        self.tom = Actor(feat + self.mates, self.heads, units)

    def decode(self, states: Tensors) -> Tensors:
        """Reconstructions (B, T, …) from (h, z_env)."""
        stoch = states["stoch"]
        if self.args.teammate_model == "tom":
            stoch = stoch * (1 - self.team).to(stoch.dtype)
        return super().decode(states | {"stoch": stoch})

    def teammates(self, state: Tensors) -> Joint:
        """The ToM head π̂ʲ(a | h, z_team, j): a state (…) → distributions over actions (…, K-1, A).
        The arm "joint" sees nothing, and learns how often teammates do what; in the arm "none" the
        head learns without teaching the model anything."""
        deter = state["deter"]
        stoch = state["stoch"]
        arm = self.args.teammate_model
        if arm == "tom":
            stoch = stoch * self.team.to(stoch.dtype)
        if arm == "joint":
            deter = torch.zeros_like(deter)
            stoch = torch.zeros_like(stoch)
        if arm == "none" or self.args.tom_stop_grad:
            deter = deter.detach()
            stoch = stoch.detach()
        feat = features({"deter": deter, "stoch": stoch})
        feat = feat[..., None, :].expand(*feat.shape[:-1], self.mates, -1)  # (…, K-1, feat)
        number = torch.eye(self.mates, dtype=feat.dtype, device=feat.device)
        return self.tom(torch.cat([feat, number.expand(*feat.shape[:-1], -1)], -1))

    def extra_losses(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        """The loss "tom" (B, T): −Σⱼ log π̂ʲ(aʲ) over the teammates that act. The target is the
        action of the same step, which neither h nor z has seen."""
        logp = self.teammates(states).log_prob(data["teammates"])  # (B, T, K-1)
        return {"tom": -(logp * data["acts"]).sum(-1)}

    def losses(self, states: Tensors, data: dict[str, Any]) -> tuple[Tensors, Tensors]:
        """Losses (B, T), and metrics () with the measures of the ToM head."""
        losses, metrics = super().losses(states, data)
        with torch.no_grad():
            policy = self.teammates(states)
            nats = -policy.log_prob(data["teammates"])
            measures = skill(self.heads, data["teammates"], data["acts"] > 0, nats, data["bayes"],
                             expected(policy))
        return losses, metrics | {f"tom_{name}": x for name, x in measures.items()}

    def joint(self, own: Tensor, mates: Tensor) -> Tensor:
        """Ego's action (…, A) and the teammates' (…, K-1, A) → (…, K·A), what the dynamics take. To
        plain Dreamer the teammates' are hidden."""
        if self.args.teammate_model == "none":
            mates = torch.zeros_like(mates)
        return torch.cat([own, mates.flatten(-2)], -1)

    @torch.no_grad()
    def social_dream(self, data: dict[str, Any], context: int, noise: Tensor,
                     action_noise: Tensor) -> tuple[Tensor, Tensor]:
        """What teammates are expected to do, and samples of it, both (B, T, K-1, A). `context`
        steps are seen; the rest is a dream, where ego acts as it did, and the ToM head for all
        others. noise (B, T, S, 1), action_noise (B, T, K-1, …)."""
        states = self.observe(data, noise)

        def policy(state: Tensors, t: int) -> Tensor:
            step = context - 1 + t
            mates = self.teammates(state).sample(action_noise[:, step])
            return self.joint(data["action"][:, step], mates * data["active"][:, step, :, None])

        last = {name: states[name][:, context - 1] for name in ("deter", "stoch")}
        dream, _ = self.rssm.imagine(last, policy, noise.shape[1] - context, noise[:, context:])
        policies = self.teammates({name: torch.cat([states[name][:, :context], x[:, 1:]], 1)
                                   for name, x in dream.items()})
        return expected(policies), policies.sample(action_noise)

def expected(policy: Joint) -> Tensor:
    """Probabilities of choices and means of continuous actions (…, A)."""
    parts = [part.probs if isinstance(part, OneHot) else part.mean for part in policy.parts]
    return torch.cat(parts, -1)

def skill(heads: dict[str, tuple], actions: Tensor, acts: Tensor, nats: Tensor, bayes: Tensor,
          guess: Tensor) -> Tensors:
    """Measures of a ToM head over all (…, K-1) where `acts`. cross_entropy: the mean of `nats`, its
    −log π̂(a). marginal: that of who knows only how often the j-th of the others does what, whoever
    ego is. For choices also accuracy: how often the likeliest one in `guess` (…, K-1, A) was right;
    bayes: the mean nats of an ideal observer, NaN where there is none; skill: the share of the nats
    between marginal and bayes that the head saves, 1 is all that can be known, NaN where these are
    not 0.01 apart. No step of this waits for the device."""
    count = acts.sum().clamp(min=1)
    each = acts.flatten(0, -2).sum(0)  # (K-1,) steps at which each teammate acts

    def average(x: Tensor) -> Tensor:
        """(…, K-1, n) → (K-1, n), over those steps."""
        return (x * acts[..., None]).flatten(0, -3).sum(0) / each.clamp(min=1)[:, None]

    parts = [(kind, width) for kind, n in heads.values()
             for width in (n if kind == "discrete" else (n,))]
    widths = [width for _, width in parts]
    marginal = 0.0
    right = []
    for (kind, _), x, p in zip(parts, actions.split(widths, -1), guess.split(widths, -1)):
        mean = average(x)
        if kind == "discrete":
            entropy = -(mean * mean.clamp(min=1e-9).log()).sum(-1)
            right.append(x.argmax(-1) == p.argmax(-1))
        else:
            variance = average((x - mean) ** 2).clamp(min=1e-6)
            entropy = 0.5 * (2 * math.pi * math.e * variance).log().sum(-1)
        marginal = marginal + (entropy * each).sum() / count
    measures = {"cross_entropy": (nats * acts).sum() / count, "marginal": marginal}
    if len(right) == len(parts):
        known = acts & bayes.isfinite()
        ideal = torch.where(known, bayes, torch.zeros_like(bayes)).sum() / known.sum()
        saved = marginal - measures["cross_entropy"]
        measures["accuracy"] = (torch.stack(right).float().mean(0) * acts).sum() / count
        measures["bayes"] = ideal
        gap = marginal - ideal.nan_to_num(0.0)
        measures["skill"] = torch.where(gap > 0.01, saved / gap, torch.nan)
    return measures

# ------------------------------------------------------------------------------------- the agent

class SocialDreamer(Dreamer):
    """Dreamer in a team. Each row of a batch is one ego with `seats` - 1 teammates; the spaces are
    those of one seat. Beyond its own stream, ego knows what its teammates do: "teammates"
    (…, K-1, A), flat as encode_action makes it, zeros for who is away."""
    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: SocialArgs,
                 seats: int = 2):
        if seats < 2:
            raise InputError(f"seats {seats}: there must be 2 or more, or use dreamer.py")
        self.seats = seats
        super().__init__(observation_space, action_space, args)

    def make_world_model(self) -> WorldModel:
        return SocialWorldModel(self.observations.specs, self.actions, self.seats, self.args)

    def replay_specs(self) -> dict[str, tuple]:
        """Also: what teammates did, whether they are in the game, the nats of it to an ideal
        observer (NaN if unknown; for comparison only), and whether ego is in the game."""
        mates = self.seats - 1
        return super().replay_specs() | {
            "teammates": ((mates, self.actions.size), torch.float32),
            "active": ((mates,), torch.bool), "bayes": ((mates,), torch.float32),
            "valid": ((), torch.bool)}

    def initial_state(self, n: int) -> Tensors:
        """Also: "teammates" (N, K-1, A). In what `act` returns, these are the ToM head's guesses
        for this step; whoever sees the teammates puts their actions in place of them."""
        nobody = torch.zeros(n, self.seats - 1, self.actions.size, device=self.device)
        return super().initial_state(n) | {"teammates": nobody}

    def acting_noise(self, n: int) -> Tensors:
        size = self.actions.noise_size
        mates = self.uniform(self.act_rng, n, self.seats - 1, size)
        return super().acting_noise(n) | {"teammates": mates}

    def choose(self, obs: Tensors, state: Tensors, is_first: Tensor,
               noise: dict[str, Any]) -> Tensors:
        """The part of `act` that is only tensors (N, …)."""
        joint = self.wm.joint(state["action"], state["teammates"])
        new = super().choose(obs, state | {"action": joint}, is_first, noise)
        return new | {"teammates": self.wm.teammates(new).sample(noise["teammates"])}

    def training_data(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Also: the joint actions before each step, and the teammates' at it. "acts" (B, T, K-1) is
        1 where a teammate acts while ego is there to see it; after an end nobody acts. "share"
        (B, 2) says how much of the batch is valid, with and without the last step."""
        names = ("action", "teammates", "active", "valid", "bayes", "is_last")
        x = {name: self.upload(batch[name]) for name in names}
        x["acts"] = (x["active"] & (x["valid"] & ~x["is_last"])[..., None]).float()
        joint = self.wm.joint(x["action"], x["teammates"])
        now = {name: value[:, 1:] for name, value in x.items()}
        valid = now["valid"].float()
        share = torch.stack([valid.mean(), valid[:, :-1].mean()]).clamp(min=1e-9)
        return super().training_data(batch) | now | {
            "prev_action": joint[:, :-1], "share": share.expand(len(valid), 2)}

    def learning_noise(self, data: dict[str, Any]) -> Tensors:
        """The noise of an action (N, H, K·…): ego's numbers, then the teammates'."""
        noise = super().learning_noise(data)
        shape = noise["action"].shape[:2]
        size = (self.seats - 1) * self.actions.noise_size
        mates = self.uniform(self.learn_rng, *shape, size)
        return noise | {"action": torch.cat([noise["action"], mates], -1)}

    def policy(self, state: Tensors, noise: Tensor | None) -> Tensor:
        """Social imagination: joint actions (N, K·A) in dreamed states. All are drawn at the same
        time, a⁰ ~ π(a | h, z) and aʲ ~ π̂ʲ(a | h, z_team), zeros for who is not "active" (N, K-1).
        """
        own = mates = None
        if noise is not None:
            own, mates = noise.tensor_split([self.actions.noise_size], -1)
            mates = mates.unflatten(-1, (self.seats - 1, -1))
        others = self.wm.teammates(state).sample(mates) * state["active"][..., None]
        return self.wm.joint(super().policy(state, own), others)

    def judge(self, dream: Tensors, action: Tensor) -> tuple[Tensors, Tensor, Tensors]:
        """The policy answers for ego's part of the joint actions alone."""
        return super().judge(dream, action[..., : self.actions.size])

    def dream_starts(self, states: Tensors, data: dict[str, Any]) -> Tensors:
        """Dreams begin where ego is in the game. Any other step is replaced by one of those, so
        that shapes do not depend on data; `mask` leaves its dream out, but its returns count in
        their range, the only thing in which `accumulate` is not exact. Who is active stays so."""
        start = super().dream_starts(states, data) | {"active": data["active"].flatten(0, 1)}
        here = data["valid"].flatten()  # (N,)
        order = (~here).int().argsort(stable=True)  # the steps where ego is come first
        step = torch.arange(len(here), device=here.device)
        index = torch.where(here, step, order[step % here.sum().clamp(min=1)])
        return {name: x[index] for name, x in start.items()}

    def mask(self, losses: Tensors, data: dict[str, Any]) -> Tensors:
        """Losses whose means over all elements are means over the steps where ego is there."""
        valid = data["valid"].float()
        here = valid / data["share"][:, :1]  # (B, T)
        dreams = here.flatten()[:, None]  # (N, 1)
        masks = {"repval": valid[:, :-1] / data["share"][:, 1:], "policy": dreams, "value": dreams}
        return {name: x * masks.get(name, here) for name, x in losses.items()}

# ----------------------------------------------------------------------------- the game inside

class HiddenMatch:
    """A ParallelEnv in which a partner has to be understood. Two players act at the same time for
    `length` steps; both earn 1 when their actions match. The partner's script names its favourite
    of this episode, "0", "1", …, which it plays except with probability `epsilon`, when it plays
    any. With probability `q` a player's observation is the other's last action, else a number that
    says nothing. "mixed" draws one of the favourites 0 and 1 at every step, and is usually not
    learned with. Like the games of games/ it offers scripts, play and bayes."""
    possible_agents = ["player_0", "player_1"]
    unusual = ("mixed",)
    metadata: dict[str, Any] = {}
    render_mode = None

    def __init__(self, epsilon: float = 0.3, q: float = 0.0, actions: int = 4, length: int = 10):
        if not (0 <= epsilon <= 1 and 0 <= q <= 1):
            raise InputError(f"epsilon {epsilon} and q {q} must be probabilities from 0 to 1")
        for name, value, least in (("actions", actions, 2), ("length", length, 1)):
            if type(value) is not int or value < least:
                raise InputError(f"{name} {value!r} must be a whole number, {least} or more")
        self.q = q
        self.actions = actions
        self.length = length
        self.favourites = tuple(str(i) for i in range(actions))
        self.scripts = (*self.favourites, *self.unusual)
        noisy = epsilon / actions + (1 - epsilon) * np.eye(actions)
        self.table = dict(zip(self.scripts, [*noisy, noisy[:2].mean(0)]))  # script → (A,)
        self.agents: list[str] = []
        self.rng = np.random.default_rng()

    def observation_space(self, agent: str) -> gym.Space:
        return gym.spaces.Discrete(self.actions + 1)

    def action_space(self, agent: str) -> gym.Space:
        return gym.spaces.Discrete(self.actions)

    def reset(self, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.time = 0
        self.agents = list(self.possible_agents)
        self.counts = {agent: np.zeros(self.actions, int) for agent in self.agents}
        return {agent: self.actions for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]):
        first, second = self.possible_agents
        self.time += 1
        seen = {first: int(actions[second]), second: int(actions[first])}
        obs = {a: x if self.rng.random() < self.q else self.actions for a, x in seen.items()}
        for agent in seen:
            self.counts[agent][actions[agent]] += 1
        match = float(seen[first] == seen[second])
        over = self.time == self.length
        if over:
            self.agents = []
        return (obs, dict.fromkeys(seen, match), dict.fromkeys(seen, over),
                dict.fromkeys(seen, False), {agent: {} for agent in seen})

    def play(self, agent: str, script: str) -> int:
        return int(self.rng.choice(self.actions, p=self.table[script]))

    def predict(self, counts: Any, scripts: tuple[str, ...]) -> np.ndarray:
        """(A,) probabilities of the next action of who plays one of `scripts` and has played each
        action so often; every action is equally likely where no script explains that."""
        table = np.array([self.table[script] for script in scripts])
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.nansum(counts * np.log(table), 1)  # 0 · log 0 counts as 0
        if np.isneginf(log).all():
            return np.full(self.actions, 1 / self.actions)
        belief = np.exp(log - log.max())  # every script is equally likely at first
        return belief @ table / belief.sum()

    def bayes(self, agent: str, scripts: tuple[str, ...]) -> np.ndarray:
        """What an ideal observer of all actions expects of `agent`."""
        return self.predict(self.counts[agent], scripts)

    def bayes_return(self, scripts: tuple[str, ...]) -> float | None:
        """Exact expected return of an ideal observer, which plays what is likeliest at every step;
        the mean over all that a partner may do. None unless just all favourites are met, and
        for games so long that it would take minutes."""
        counts = math.comb(self.length + self.actions, self.actions) / math.factorial(self.actions)
        if set(scripts) != set(self.favourites) or counts > 200_000:  # about so many, but for order
            return None
        value = 0.0
        histories = {(0,) * self.actions: 1.0}  # counts → probability; their order does not matter
        for _ in range(self.length):
            later: dict[tuple[int, ...], float] = collections.defaultdict(float)
            for counts, probability in histories.items():
                expected_actions = self.predict(counts, self.favourites)
                value += probability * expected_actions.max()
                for action, p in enumerate(expected_actions):
                    more = list(counts)
                    more[action] += 1
                    later[tuple(sorted(more))] += probability * p
            histories = later
        return float(value)

# -------------------------------------------------------------------- games as seats of a table

def modules_like(name: str) -> list[str]:
    """Names of the modules in the package of `name` that begin alike, but for a version."""
    package, _, game = name.rpartition(".")
    try:
        paths = importlib.import_module(package).__path__
    except (ImportError, AttributeError, ValueError):
        return []
    stem = game.rstrip("0123456789")
    return [f"{package}.{found.name}" for found in pkgutil.iter_modules(paths)
            if found.name.startswith(stem)]

def make_parallel(args: SocialArgs, render: bool = False) -> Any:
    """The ParallelEnv of args.env_id. Raises InputError for unknown ids, missing packages and
    arguments that cannot be used."""
    kwargs = args.env_arguments()
    if render:
        kwargs["render_mode"] = "rgb_array"
    make = HiddenMatch
    if args.env_id != "hidden_match":
        hints = {"games.": "put the folder games/ beside this file",
                 "mpe2.": "pip install mpe2==1.1.1, or correct the name",
                 "simple_": "pip install mpe2==1.1.1, and write mpe2.simple_…",
                 "pettingzoo.mpe": "pip install mpe2==1.1.1, and write mpe2.simple_…",
                 "pettingzoo.": 'pip install "pettingzoo[butterfly,sisl]"',
                 "": "install its package, or correct the name"}
        hint = next(hint for start, hint in hints.items() if args.env_id.startswith(start))
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame must not look for a display
        try:
            module = importlib.import_module(args.env_id)
        except (ImportError, TypeError, ValueError) as error:  # the last two for names such as ""
            near = modules_like(args.env_id)
            if near and args.env_id not in near:
                hint = f"there are {', '.join(near)}"
            raise InputError(f"{args.env_id!r} cannot be imported ({error}): {hint}") from None
        if not hasattr(module, "parallel_env"):
            raise InputError(f"env_id {args.env_id!r} has no parallel_env: give the module of a "
                             "PettingZoo ParallelEnv")
        make = module.parallel_env
    try:
        return make(**kwargs)
    except (ImportError, TypeError, ValueError) as error:
        if render:
            error = f"{error}; it may draw no frames: leave out --capture-video"
        raise InputError(f"{args.env_id} cannot be made of {json.dumps(kwargs)}: {error}") from None

def merge(name: str, spaces: list[gym.Space]) -> gym.Space:
    """The smallest space that has room for all of `spaces`, which may differ in size, not in kind.
    """
    first = spaces[0]
    if all(space == first for space in spaces):
        return first
    boxes = all(isinstance(space, gym.spaces.Box) for space in spaces)
    if boxes and len({(space.dtype, len(space.shape)) for space in spaces}) == 1:
        shape = np.max([space.shape for space in spaces], 0)
        low = min(space.low.min() for space in spaces)
        high = max(space.high.max() for space in spaces)
        return gym.spaces.Box(low, high, tuple(shape.tolist()), first.dtype)
    if all(isinstance(space, gym.spaces.Discrete) and space.start == 0 for space in spaces):
        return gym.spaces.Discrete(max(space.n for space in spaces))
    kinds = ", ".join(sorted({str(space) for space in spaces}))
    raise InputError(f"the agents' spaces {name!r} are of different kinds ({kinds}): one network "
                     "plays all seats, so wrap the environment such that they are alike")

def encode_action(codec: ActionCodec, action: Any) -> np.ndarray:
    """One action of the environment → (A,), from which `codec.decode` makes it again."""
    found = leaves(action, "action")
    parts = []
    for (name, (kind, n)), space in zip(codec.heads.items(), codec.spaces.values()):
        x = np.asarray(found[name])
        if kind == "discrete":
            choices = np.ravel(x - getattr(space, "start", 0)).astype(int)
            parts += [np.eye(classes)[choice] for choice, classes in zip(choices, n)]
        else:  # [low, high] → [-1, 1]
            low = space.low.astype(np.float64)
            width = space.high.astype(np.float64) - low
            parts.append(np.ravel(2 * (x - low) / np.where(width > 0, width, 1) - 1))
    return np.concatenate(parts).astype(np.float32)

def unbatch(tree: Any) -> Any:
    """The only action of a batch of one."""
    if isinstance(tree, dict):
        return {name: unbatch(x) for name, x in tree.items()}
    return tuple(unbatch(x) for x in tree) if isinstance(tree, tuple) else tree[0]

class Seats(gym.Env):
    """A ParallelEnv as ONE Gymnasium environment, so that Gymnasium's vectorisation serves it.
    Agents are seats 0 … K-1, in the order of possible_agents. An action is (K, A), flat as
    ActionCodec has it; where a space was padded, the surplus numbers of a Box are ignored, and a
    surplus choice i means i modulo the number of choices. The observation is a Dict:

        obs/…     (K, …) what the agent sees, padded to the largest agent's; zeros while it is away
        reward    (K,) its reward
        here      (K,) whether it is in the game, up to and with its last observation
        active    (K,) whether it acts now; when time runs out, whether it would have
        last      (K,) whether this is its last observation
        terminal  (K,) whether it is, and not because time ran out
        learner   () the seat that learns if partners are others than the policy itself
        script    (K,) number of the script that plays the seat, or -1
        play      (K, A) what that script plays now
        bayes     (K, A) what an ideal observer expects of it, NaN where there is none

    Learner and scripts are drawn for every episode, the latter from `scripts`. Where `all_learn`,
    an episode's return is the mean of the seats', else the learner's. Agents may leave before the
    end; `step` raises InputError if one comes after the beginning."""
    def __init__(self, env: Any, scripts: tuple[str, ...] = (), all_learn: bool = False):
        self.env = env
        self.scripts = scripts
        self.all_learn = all_learn
        self.names = list(env.possible_agents)
        self.known = tuple(getattr(env, "scripts", ()))
        self.metadata = env.metadata
        self.render_mode = getattr(env, "render_mode", None)
        spaces = [leaves(env.observation_space(name), "obs") for name in self.names]
        if len({tuple(sorted(entries)) for entries in spaces}) > 1:
            entries = "; ".join(sorted({", ".join(sorted(entries)) for entries in spaces}))
            raise InputError(f"the agents' observations have different entries ({entries}): one "
                             "network plays all seats, so wrap the environment such that they are "
                             "alike")
        self.seat_space = gym.spaces.Dict(
            {name: merge(name, [entries[name] for entries in spaces]) for name in spaces[0]})
        ObservationCodec(self.seat_space, 64)  # raises InputError
        own = [env.action_space(name) for name in self.names]
        same = all(space == own[0] for space in own)
        self.seat_action = own[0] if same else merge("action", own)
        self.codecs = [ActionCodec(space) for space in own]
        self.size = ActionCodec(self.seat_action).size
        flags = {name: gym.spaces.MultiBinary(len(self.names))
                 for name in ("here", "active", "last", "terminal")}
        seen = {f"obs/{name}": self.rows(space.dtype or np.int64, *(space.shape or ()))
                for name, space in self.seat_space.items()}
        self.observation_space = gym.spaces.Dict(seen | flags | {
            "reward": self.rows(np.float64), "learner": gym.spaces.Discrete(len(self.names)),
            "script": self.rows(np.int64), "play": self.rows(np.float32, self.size),
            "bayes": self.rows(np.float32, self.size)})
        self.action_space = self.rows(np.float32, self.size)

    def rows(self, dtype: Any, *shape: int) -> gym.spaces.Box:
        """A row for every seat, of any numbers that `dtype` holds."""
        low, high = -np.inf, np.inf
        if dtype == np.bool_:
            low, high = 0, 1
        elif np.issubdtype(dtype, np.integer):
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        return gym.spaces.Box(low, high, (len(self.names), *shape), dtype)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        seats = len(self.names)
        self.learner = int(self.np_random.integers(seats))
        self.drawn = self.np_random.integers(max(1, len(self.scripts)), size=seats)
        # the game's stream must not be the one that seats and scripts are drawn from
        game_seed = None if seed is None else int(self.np_random.integers(2**31))
        obs, _ = self.env.reset(seed=game_seed, options=options)
        self.here = np.array([name in self.env.agents for name in self.names])
        if self.here.any() and not self.here[self.learner]:
            self.learner = int(self.np_random.choice(np.flatnonzero(self.here)))
        self.returns = np.zeros(seats)
        self.length = 0
        return self.view(obs, {}, {}, {}), {}

    def step(self, action: np.ndarray):
        chosen = {name: self.decode(seat, action[seat]) for seat, name in enumerate(self.names)
                  if name in self.env.agents}
        obs, rewards, terminated, truncated, _ = self.env.step(chosen)
        if late := [name for name in self.env.agents if name not in chosen]:
            raise InputError(f"agent {late[0]!r} came after the episode had begun: wrap the "
                             "environment such that all agents are there from the reset on, and "
                             "do nothing until they come")
        view = self.view(obs, rewards, terminated, truncated)
        self.returns += view["reward"]
        self.length += 1
        over = not self.env.agents
        own = self.returns.mean() if self.all_learn else self.returns[self.learner]
        episode = {"r": float(own), "l": self.length, "seats": self.returns.copy()}
        info = {"dreamer_episode": episode} if over else {}
        return view, float(sum(rewards.values())), over, False, info

    def decode(self, seat: int, flat: np.ndarray) -> Any:
        """(A,) → the action of the agent in `seat`."""
        codec = self.codecs[seat]
        if codec.size < self.size and isinstance(codec.space, gym.spaces.Discrete):
            flat = np.eye(codec.size)[flat.argmax() % codec.size]
        return unbatch(codec.decode(flat[None, : codec.size]))

    def view(self, obs: dict[str, Any], rewards: dict, terminated: dict, truncated: dict):
        """The observation of this environment, from what the game returned."""
        out = {name: np.zeros(space.shape, space.dtype)
               for name, space in self.observation_space.items()}
        for name, space in self.seat_space.items():
            out[f"obs/{name}"] += np.asarray(getattr(space, "start", 0), space.dtype)  # of choices
        out["bayes"][:] = np.nan
        out["script"][:] = -1
        out["learner"] = self.learner
        out["here"][:] = self.here
        over = not self.env.agents
        for seat in np.flatnonzero(self.here):
            name = self.names[seat]
            for key, x in leaves(obs[name], "obs").items() if name in obs else ():
                x = np.asarray(x)
                out[f"obs/{key}"][(seat, *(slice(n) for n in x.shape))] = x
            last = name not in self.env.agents
            terminal = last and bool(terminated.get(name))
            out["reward"][seat] = rewards.get(name, 0.0)
            out["last"][seat] = last
            out["terminal"][seat] = terminal
            out["active"][seat] = not last or (over and not terminal)
            if self.scripts and seat != self.learner:
                self.view_script(out, seat, last)
        self.here &= [name in self.env.agents for name in self.names]
        return out

    def view_script(self, out: dict[str, np.ndarray], seat: int, last: bool) -> None:
        """Which script plays `seat`, what it plays, and what is expected of it."""
        script = self.scripts[self.drawn[seat]]
        out["script"][seat] = self.known.index(script)
        if last:
            return
        codec = self.codecs[seat]
        action = encode_action(codec, self.env.play(self.names[seat], script))
        out["play"][seat, : codec.size] = action
        bayes = getattr(self.env, "bayes", lambda agent, scripts: None)
        expectation = bayes(self.names[seat], self.scripts)
        if expectation is not None:
            out["bayes"][seat, : codec.size] = expectation

    def render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        getattr(self.env, "close", lambda: None)()

def scripts_of(args: SocialArgs, env: Any) -> tuple[str, ...]:
    """Names of the scripted partners to learn with. Raises InputError for unknown names."""
    if args.partners != "scripted":
        return ()
    known = getattr(env, "scripts", ())
    if not known:
        raise InputError(f"{args.env_id} comes without scripted partners: use --partners self or "
                         "--partners pool")
    for name in (*args.scripted, *args.held_out):
        if name not in known:
            raise InputError(f"{args.env_id} has no scripted partner {name!r}: choose of "
                             f"{', '.join(known)}")
    usual = [name for name in known if name not in getattr(env, "unusual", ())]
    chosen = tuple(name for name in args.scripted or usual if name not in args.held_out)
    if not chosen:
        raise InputError("all scripted partners are held out: leave one to learn with")
    return chosen

def make_env(args: SocialArgs, idx: int, capture_video: bool, run_name: str, seed: int = 0):
    """CleanRL's thunk: a function without arguments that makes environment `idx` of a run. Number 0
    records its episodes under videos/{run_name} if `capture_video`."""
    record = capture_video and idx == 0

    def thunk() -> gym.Env:
        random.seed(seed)  # some environments draw from the global generators, whose state
        np.random.seed(seed)  # forked workers would share
        env = make_parallel(args, render=record)
        seats = Seats(env, scripts_of(args, env), all_learn=args.partners == "self")
        if record and seats.render_mode != "rgb_array":
            raise InputError(f"{args.env_id} draws no frames: leave out --capture-video")
        if record:  # under names of this moment, so that no earlier video is replaced
            return gym.wrappers.RecordVideo(seats, f"videos/{run_name}", disable_logger=True,
                                            name_prefix=f"{time.time():.0f}")
        return seats

    return thunk

@contextlib.contextmanager
def one_game(args: SocialArgs):
    """The game's Seats, to look at: making it leaves no trace in the global generators."""
    with preserve_randomness(), contextlib.closing(make_env(args, 0, False, "")()) as seats:
        yield seats

def seat_spaces(args: SocialArgs) -> tuple[gym.spaces.Dict, gym.Space, int, tuple[str, ...]]:
    """Observation and action space of one seat, as seat_view fills them, the number of seats, and
    the names of all scripts. Raises InputError for observations that have an entry of ours."""
    with one_game(args) as env:
        seats = len(env.names)
        ours = {"seat": gym.spaces.Discrete(seats)}
        if args.oracle:
            ours["scripts"] = gym.spaces.MultiDiscrete([len(env.known) + 1] * (seats - 1))
        for name in ours.keys() & env.seat_space.spaces:
            raise InputError(f"{args.env_id} has an observation {name!r}, a name that is needed "
                             "here: wrap the environment such that it has another")
        return gym.spaces.Dict(env.seat_space.spaces | ours), env.seat_action, seats, env.known

def seat_view(obs: dict[str, np.ndarray], env: np.ndarray, seat: np.ndarray,
              oracle: bool = False) -> dict[str, np.ndarray]:
    """What the seats (env, seat), both (N,), see: their own observation, the number of the seat
    and, where `oracle`, which scripts play the others, 0 for none."""
    view = {name[4:]: x[env, seat] for name, x in obs.items() if name.startswith("obs/")}
    view["seat"] = seat
    if oracle:
        view["scripts"] = obs["script"][env[:, None], others(seat, obs["script"].shape[1])] + 1
    return view

def others(seat: np.ndarray, seats: int) -> np.ndarray:
    """(N,) → (N, K-1): the other seats, in their order."""
    number = np.arange(seats - 1)
    return number + (number >= seat[:, None])

# ------------------------------------------------------------------------ partners and the pool

LIVE = -1  # the number of the partner that is the current policy; members of a pool count from 0

def with_noise(agent: SocialDreamer, rng: torch.Generator) -> SocialDreamer:
    """`agent`, with the same weights, drawing its actions from `rng`. It plays in as many
    environments as it happens to be drawn for: too many shapes to record a CUDA graph of each."""
    player = copy.copy(agent)
    player.act_rng = rng
    player.fast_choose = agent.choose
    return player

class Pool:
    """Frozen copies of past selves, and who is met next. x, the learner's rate of victories over a
    member, begins at 1/2 and decays towards it: (1 + wins) / (2 + games), in which each result
    counts 0.95 times as much as the next one. A victory is a higher return, shaping included."""
    decay = 0.95

    def __init__(self, size: int, weighting: str, seed: int):
        self.size = size
        self.weighting = weighting
        self.rng = np.random.default_rng(seed)
        self.members: dict[int, SocialDreamer] = {}  # by number, in the order of their coming
        self.wins: dict[int, float] = {}
        self.games: dict[int, float] = {}
        self.next = 0

    def add(self, agent: SocialDreamer, weights: Tensors | None = None) -> int:
        """A deep copy, on the CPU, of what acts: of `agent` or, with `weights`, of one like it.
        Returns its number."""
        unused = (agent.optimizer, agent.learned, agent.averages, agent.act_rng, agent.learn_rng,
                  agent.fast_learn, agent.fast_choose, agent.critic, agent.slow_critic,
                  agent.wm.decoder, agent.wm.reward, agent.wm.cont)
        member = copy.deepcopy(agent, {id(x): None for x in unused}).to("cpu").requires_grad_(False)
        for owner, name in member.compiled():  # compiled functions are bound to the learner, and
            vars(owner).pop(name, None)  # are those of its device
        member.device = torch.device("cpu")
        if weights:
            own = {name: weights[name] for name, _ in member.named_parameters()}
            member.load_state_dict(own, strict=False)
        if len(self.members) == self.size:
            self.evict()
        number = self.next
        self.next += 1
        self.members[number] = member
        self.wins[number] = self.games[number] = 0.0
        return number

    def evict(self) -> None:
        """Drops the member whose neighbours are closest together: it is missed least."""
        numbers = list(self.members)
        gaps = [after - before for before, after in zip(numbers, numbers[2:])]
        evicted = numbers[1 + int(np.argmin(gaps))]
        for table in (self.members, self.wins, self.games):
            del table[evicted]

    def weights(self) -> np.ndarray:
        """Probabilities of the members; never zero, however certain a result seems."""
        x = np.array([(1 + self.wins[i]) / (2 + self.games[i]) for i in self.members])
        choices = {"uniform": np.ones_like(x), "hard": (1 - x) ** 2, "even": x * (1 - x)}
        weights = choices[self.weighting] + 1e-3
        return weights / weights.sum()

    def draw(self) -> int:
        """Who plays the next episode: half of the time the live policy."""
        if not self.members or self.rng.random() < 0.5:
            return LIVE
        return int(self.rng.choice(list(self.members), p=self.weights()))

    def report(self, number: int, won: float) -> None:
        """1 for a victory of the learner, 0.5 for a tie, 0 for a defeat. Results against who is no
        longer a member are ignored."""
        if number in self.members:
            self.wins[number] = self.decay * self.wins[number] + won
            self.games[number] = self.decay * self.games[number] + 1

    def aside(self) -> "Pool":
        """The same members for an evaluation, whose draws leave those of the run as they are."""
        pool = copy.copy(self)
        pool.rng = copy.deepcopy(self.rng)
        return pool

    def state_dict(self) -> dict[str, Any]:
        weights = {number: {name: p.detach().clone() for name, p in member.named_parameters()}
                   for number, member in self.members.items()}
        return {"members": weights, "wins": dict(self.wins), "games": dict(self.games),
                "next": self.next, "rng": json.dumps(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict[str, Any], agent: SocialDreamer) -> None:
        """`agent`: any whose copies the saved weights fit."""
        self.members = {}
        for self.next, weights in state["members"].items():
            self.add(agent, weights)
        self.wins = dict(state["wins"])
        self.games = dict(state["games"])
        self.next = state["next"]
        self.rng.bit_generator.state = json.loads(state["rng"])

def make_pool(agent: SocialDreamer, args: SocialArgs, run_dir: str | Path, rank: int = 0) -> Pool:
    """The pool of the run in `run_dir` or else a new one, of the agent there or, if run_dir is "",
    of `agent`. Those in pool_checkpoints join it, unless they did before. Every process of torchrun
    has one; that of the first is saved."""
    pool = Pool(args.pool_size, args.pool_weighting, derive_seeds(args.seed, "pool", rank)[0])
    saved = load_file(run_dir) if run_dir else {}
    there = ()
    if state := saved.get("pool"):
        pool.load_state_dict(state, agent)
        there = saved["args"].get("pool_checkpoints", ())
        if rank:
            pool.rng = np.random.default_rng(derive_seeds(args.seed, f"pool {pool.next}", rank)[0])
    else:
        pool.add(agent, saved.get("agent"))
    for path in (x for x in args.pool_checkpoints if x not in there):
        member = load_file(path)
        try:
            if (arm := member["args"]["teammate_model"]) != args.teammate_model:
                raise InputError(f"the agent in {path} was trained with --teammate-model {arm}, "
                                 f"and would play as {args.teammate_model}: give its like")
            pool.add(agent, member["agent"])
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"the agent in {path} cannot join the pool, for it was trained with "
                             f"another env_id, size or observation: {reason}") from None
    return pool

class Table:
    """Who sits where in `num_envs` environments, and the game as the learning seats see it. With
    self-play every seat of every environment is a stream of the replay, a row of the batch; else
    each environment has one, the drawn learner's."""
    def __init__(self, agent: SocialDreamer, num_envs: int, pool: Pool | None = None,
                 partner: int | None = None, scripts: tuple[str, ...] = (),
                 purpose: str = "training", args: SocialArgs | None = None):
        """partner: the member of the pool, or LIVE, that plays all other seats; None: draw one for
        every episode. scripts: the names of all scripts. purpose: names the partners' noise. args:
        those of the game, if not the agent's."""
        self.agent = agent
        self.args = args or agent.args
        self.pool = pool
        self.partner = partner
        self.scripts = scripts
        self.seats = agent.seats
        self.all_learn = self.args.partners == "self"
        self.env = np.arange(num_envs)  # (S,) of the streams
        self.seat = np.zeros(num_envs, int)  # (S,)
        if self.all_learn:
            self.env = self.env.repeat(self.seats)
            self.seat = np.tile(np.arange(self.seats), num_envs)
        self.state: dict[str, Any] | None = None
        table = num_envs, self.seats
        self.joint = np.zeros((*table, agent.actions.size), np.float32)  # what all did last
        self.active = np.zeros(table, bool)  # and whether they did anything
        self.script = np.full(table, -1)
        self.partners = np.full(num_envs, LIVE)  # numbers of those who play the other seats
        self.players: dict[int, SocialDreamer] = {}  # who plays now, even if the pool dropped it
        self.memory: dict[int, Tensors] = {}  # a partner's states, for every seat (E, K, …)
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        live, members = derive_seeds(agent.args.seed, f"partners in {purpose}", rank, 2)
        self.live_rng = torch.Generator(agent.device).manual_seed(live)
        self.members_rng = torch.Generator().manual_seed(members)

    def act(self, obs: dict[str, np.ndarray], first: np.ndarray, deterministic: bool = False):
        """One step of all. obs: of the vector environment; first (E,): where an episode begins.
        Returns the joint actions (E, K, A), and the rows (S, …) of the replay, what arrived
        included."""
        if not self.all_learn:
            self.seat = obs["learner"]
        view = seat_view(obs, self.env, self.seat, self.args.oracle)
        state = self.informed(self.agent, self.state, self.env, self.seat)
        _, self.state = self.agent.act(view, state, first[self.env], deterministic)
        joint = obs["play"].copy()  # the scripts' actions, and zeros
        if self.pool is not None:
            self.play_others(obs, first, joint)
        joint[self.env, self.seat] = self.state["action"].cpu().numpy()
        self.active = obs["active"].astype(bool)
        self.joint = np.where(self.active[..., None], joint, np.float32(0))
        self.script = np.where(first[:, None], obs["script"], self.script)  # also of who left
        return self.joint, self.rows(obs, first)

    def informed(self, agent: SocialDreamer, state: Tensors | None, env: np.ndarray,
                 seat: np.ndarray) -> Tensors | None:
        """The state (N, …) of the seats (env, seat) with what they know of the last step of their
        teammates: what these did or, if that is not seen, the head's guess for those who acted."""
        if state is None:
            return None
        mates = env[:, None], others(seat, self.seats)
        known = torch.as_tensor(self.joint[mates], device=agent.device)
        if not self.args.observe_teammates:
            active = torch.as_tensor(self.active[mates], device=agent.device)
            known = state["teammates"] * active[..., None]
        return state | {"teammates": known}

    def rows(self, obs: dict[str, np.ndarray], first: np.ndarray) -> dict[str, Any]:
        """The step as each stream (S, …) stores it."""
        own = self.env, self.seat
        mates = self.env[:, None], others(self.seat, self.seats)
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN where there is no observer
            bayes = -np.log((obs["bayes"] * self.joint).sum(-1))
        return self.agent.row(self.state) | {
            "teammates": self.joint[mates], "active": self.active[mates], "bayes": bayes[mates],
            "valid": obs["here"][own].astype(bool), "reward": obs["reward"][own],
            "is_first": first[self.env], "is_last": obs["last"][own].astype(bool),
            "is_terminal": obs["terminal"][own].astype(bool)}

    def play_others(self, obs: dict[str, np.ndarray], first: np.ndarray, joint: np.ndarray) -> None:
        """Fills `joint` (E, K, A) for the partners' seats. A partner has one recurrent state for
        each seat and environment, and noise that is not the learner's."""
        for env in np.flatnonzero(first):
            self.partners[env] = self.pool.draw() if self.partner is None else self.partner
        sitting = set(self.partners.tolist())
        for number in self.players.keys() - sitting:
            del self.players[number], self.memory[number]
        for number in sorted(sitting):
            if number not in self.players:
                self.players[number] = (
                    with_noise(self.agent, self.live_rng) if number == LIVE
                    else with_noise(self.pool.members[number], self.members_rng))
            learner = self.seat[:, None] == np.arange(self.seats)  # (E, K)
            env, seat = np.nonzero((self.partners == number)[:, None] & ~learner)
            memory = self.memory.get(number)
            state = None if memory is None else {k: x[env, seat] for k, x in memory.items()}
            player = self.players[number]
            _, new = player.act(seat_view(obs, env, seat),
                                self.informed(player, state, env, seat), first[env])
            joint[env, seat] = new["action"].cpu().numpy()
            new = {name: x for name, x in new.items() if not name.startswith("obs/")}
            if memory is None:
                memory = {name: x.new_zeros(*self.active.shape, *x.shape[1:])
                          for name, x in new.items()}
                self.memory[number] = memory
            for name, x in new.items():
                memory[name][env, seat] = x

    def finish(self, env: int, returns: np.ndarray) -> str | None:
        """When an episode of `env` has ended with these returns (K,) of the seats: tells the pool
        who won, and returns the partner's name, None if several or no scripts play."""
        if self.pool is not None:
            learner = self.seat[env]
            rest = np.delete(returns, learner).mean()
            number = int(self.partners[env])
            self.pool.report(number, float(0.5 + 0.5 * np.sign(returns[learner] - rest)))
            return partner_name(number)
        numbers = set(self.script[env].tolist()) - {-1}
        return self.scripts[numbers.pop()] if len(numbers) == 1 and self.scripts else None

def partner_name(number: int) -> str:
    return "live" if number == LIVE else f"pool_{number}"

# ------------------------------------------------------------------------ evaluation and pictures

@torch.no_grad()
def evaluate(agent: SocialDreamer, args: SocialArgs, episodes: int, run_name: str = "eval",
             deterministic: bool = False, capture_video: bool = False, max_steps: int = 27_000,
             pool: Pool | None = None, partner: int | None = None,
             purpose: str = "evaluation") -> dict[str, Any]:
    """Plays `episodes` episodes, the first of as many environments, so that short ones are not
    favoured; of longer ones `max_steps` steps count. Partners are those of args, or `partner` of
    the pool. Another `purpose` has other seeds. Returns "returns", the learner's sums of reward
    (with self-play the mean of the seats'), "team_returns", the sums over all seats, and "tom", the
    measures of `skill`. Raises InputError without a pool where partners come from one."""
    if args.partners == "pool" and pool is None:
        raise InputError("partners 'pool' need a pool: give that of make_pool")
    seeds = derive_seeds(args.seed, purpose, count=episodes)
    table = Table(agent, episodes, pool and pool.aside(), partner, purpose=purpose, args=args)
    scores = np.zeros((episodes, agent.seats))
    done = np.zeros(episodes, bool)
    is_first = running = np.ones(episodes, bool)
    steps = []
    with preserve_randomness(agent.act_rng), agent.evaluating(), closing(
            make_vector_env(args, episodes, run_name, seeds, capture_video)) as envs:
        obs, _ = envs.reset(seed=seeds, options={"steps": np.inf})  # past all shaping of rewards
        learner = obs["learner"]
        for _ in range(max_steps):
            action, rows = table.act(obs, is_first, deterministic)
            policy = agent.wm.teammates(table.state)
            did = torch.as_tensor(rows["teammates"])
            acts = rows["valid"] & ~rows["is_last"] & running[table.env]  # while the episode counts
            acts = torch.as_tensor(acts[:, None] & rows["active"])
            nats = -policy.log_prob(did.to(agent.device)).cpu()
            steps.append((did, acts, nats, torch.as_tensor(rows["bayes"]), expected(policy).cpu()))
            obs, _, terminated, truncated, _ = envs.step(action)
            scores += np.where(running[:, None], obs["reward"], 0.0)
            is_first, done = done, terminated | truncated
            running = running & ~done
            if not running.any():
                break
    if running.any():
        warnings.warn(f"{running.sum()} of {episodes} episodes did not end within {max_steps:,} "
                      "steps: what they earned until then counts")
    own = scores.mean(1) if table.all_learn else scores[np.arange(episodes), learner]
    measures = skill(agent.actions.heads, *(torch.stack(x) for x in zip(*steps)))
    tom = {name: float(x) for name, x in measures.items() if not x.isnan()}
    if "skill" in tom and "bayes" not in tom:  # there is no ideal observer to compare with
        tom["nats_saved"] = tom.pop("skill")
    return {"returns": own.tolist(), "team_returns": scores.sum(1).tolist(), "tom": tom}

def evaluate_partners(agent: SocialDreamer, args: SocialArgs, pool: Pool | None,
                      run_name: str) -> dict[str, dict[str, float]]:
    """Evaluations with each partner alone, held-out ones included: name → mean returns and measures
    of the ToM head. {} for self-play."""
    each = {}
    if pool is not None:
        each = {partner_name(number): (args, number) for number in (LIVE, *pool.members)}
    with one_game(args) as seats:
        for name in (*seats.scripts, *args.held_out):
            each[name] = dataclasses.replace(args, scripted=(name,), held_out=()), None
    results = {}
    for name, (who, number) in each.items():
        result = evaluate(agent, who, args.eval_episodes, run_name, args.deterministic, pool=pool,
                          partner=number)
        told = {key: x for key, x in result["tom"].items()
                if key in ("cross_entropy", "marginal", "accuracy")}
        results[name] = {"return": float(np.mean(result["returns"])),
                         "team_return": float(np.mean(result["team_returns"]))} | told
    return results

def bayes_return(args: SocialArgs) -> float | None:
    """Expected return of an ideal observer of the partners, if the game knows it."""
    with one_game(args) as seats:
        known = seats.scripts and hasattr(seats.env, "bayes_return")
        return seats.env.bayes_return(seats.scripts) if known else None

CELL = 14  # pixels of a square in the pictures below

def draw_guess(choices: bool, guess: float, real: float, dreamed: float, acted: bool) -> np.ndarray:
    """One number of an action, (CELL, CELL, 3). Of a choice: the bluer the likelier it is to the
    ToM head, framed if it was made, with an orange spot if it was dreamed. Of a continuous action,
    up is 1: black what was done, orange what is expected. Struck out where nobody acted."""
    cell = np.full((CELL, CELL, 3), 255, np.uint8)
    if choices:
        cell[:] = (int(255 - 205 * guess), int(255 - 155 * guess), 255)
    if not acted:
        cell[np.arange(CELL), np.arange(CELL)] = 160
    elif choices and real > 0.5:
        cell[1:3] = cell[-2:] = cell[:, 1:3] = cell[:, -2:] = 0
    elif not choices:
        for value, color in ((real, (0, 0, 0)), (guess, (255, 140, 0))):
            height = int(CELL * (0.5 - 0.4 * np.clip(value, -1, 1)))
            cell[height : height + 2] = color
    if acted and choices and dreamed > 0.5:
        cell[5:-5, 5:-5] = (255, 140, 0)
    cell[0] = cell[:, 0] = 211  # the grid
    return cell

def draw_teammates(agent: SocialDreamer, buffer: ReplayBuffer, context: int = 4,
                   sequences: int = 6) -> dict[str, np.ndarray]:
    """What teammates did and what the model dreams of them, a block of rows for each, time to the
    right; left of the red line the model still sees. See `draw_guess`."""
    batch = buffer.sample(20 * sequences, online=False)
    context = min(context, batch["reward"].shape[1] - 2)
    # a dream knows nothing of another episode that begins in it: take those that last longest
    another = batch["is_first"][:, 1 + context :].cumsum(1) > 0
    longest = another.sum(1).argsort(stable=True)[:sequences]
    data = agent.training_data({name: x[longest] for name, x in batch.items()})
    b, length, mates, width = data["teammates"].shape
    latents = agent.wm.rssm.stoch_shape[0]
    noise = agent.uniform(agent.act_rng, b, length, latents, 1)
    action_noise = agent.uniform(agent.act_rng, b, length, mates, agent.actions.noise_size)
    pictured = (*agent.wm.social_dream(data, context, noise, action_noise), data["teammates"])
    guess, dreamed, real = (x.cpu().numpy() for x in pictured)
    acted = data["acts"].bool()
    acted[:, context:] &= (data["is_first"][:, context:].cumsum(1) == 0)[..., None]
    choices = all(kind == "discrete" for kind, _ in agent.actions.heads.values())
    panels = list(np.ndindex(b, mates))[:12]
    picture = np.full((len(panels), width + 1, CELL, length, CELL, 3), 255, np.uint8)
    for panel, (i, j) in enumerate(panels):
        for t, a in np.ndindex(length, width):
            numbers = [x[i, t, j, a] for x in (guess, real, dreamed)]
            picture[panel, a, :, t] = draw_guess(choices, *numbers, acted[i, t, j])
    picture = picture.reshape(len(panels) * (width + 1) * CELL, length * CELL, 3)
    picture[:, context * CELL : context * CELL + 2] = (255, 0, 0)
    return {"teammates": picture}

def draw_game(agent: SocialDreamer, pool: Pool | None, steps: int = 100) -> dict[str, np.ndarray]:
    """A video (T, H, W, 3) of an episode as the game draws it and, under each frame, what a learner
    expects of its teammates, a row for each: see `draw_guess`. {} if the game draws nothing."""
    from PIL import Image

    try:
        parallel = make_parallel(agent.args, render=True)
    except InputError:  # it knows no render_mode
        return {}
    if getattr(parallel, "render_mode", None) != "rgb_array":
        return {}
    choices = all(kind == "discrete" for kind, _ in agent.actions.heads.values())
    seats = Seats(parallel, scripts_of(agent.args, parallel))
    table = Table(agent, 1, pool and pool.aside(), purpose="pictures")
    is_first = np.ones(1, bool)
    frames = []
    with closing(SyncVectorEnv([lambda: seats])) as envs, torch.no_grad():
        seed = derive_seeds(agent.args.seed, "pictures")[0]
        obs, _ = envs.reset(seed=seed, options={"steps": np.inf})
        for _ in range(steps):
            action, rows = table.act(obs, is_first)
            guess = expected(agent.wm.teammates(table.state))[0].cpu().numpy()  # (K-1, A)
            image = Image.fromarray(np.asarray(seats.render()))
            image.thumbnail((320, 320))
            bar = np.full((len(guess), CELL, max(image.width, guess.shape[1] * CELL), 3), 255,
                          np.uint8)
            for j, a in np.ndindex(guess.shape):
                did = rows["teammates"][0, j, a]
                cell = draw_guess(choices, guess[j, a], did, 0.0, rows["active"][0, j])
                bar[j, :, a * CELL : (a + 1) * CELL] = cell
            frame = np.full((image.height, bar.shape[2], 3), 255, np.uint8)
            frame[:, : image.width] = np.asarray(image)[..., :3]
            frames.append(np.concatenate([frame, *bar]))
            obs, _, terminated, truncated, _ = envs.step(action)
            is_first = np.zeros(1, bool)
            if (terminated | truncated).any():
                break
    return {"game": np.stack(frames)}

# --------------------------------------------------------------------------------------- the run

class SocialRun(Run):
    """Run with a table at which all play, a pool of partners, and evaluations with each of them."""
    def __init__(self, args: SocialArgs):
        super().__init__(args)
        self.pool: Pool | None = None
        self.scripts: tuple[str, ...] = ()  # the names of all
        self.result: dict[str, Any] = {}  # of the last evaluation

    def make_buffer(self, streams: int) -> ReplayBuffer:
        """One row for each learning seat. Pool and table are made here, where `step` is known."""
        args = self.args
        if args.partners == "pool":
            self.pool = make_pool(self.agent, args, args.resume, self.rank)
        self.table = Table(self.agent, self.envs.num_envs, self.pool,
                           scripts=self.scripts, purpose=f"training from {self.step}")
        return super().make_buffer(len(self.table.env))

    def reset(self, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, np.ndarray]]:
        """Also tells games with shaped rewards how many steps each environment has made before."""
        made = self.step // (self.envs.num_envs * self.ranks)
        return super().reset((options or {}) | {"steps": made})

    def log(self, metrics: Tensors, info: dict[str, Any]) -> None:
        for i in np.flatnonzero(info.get("_dreamer_episode", ())):
            returns = info["dreamer_episode"]["seats"][i]
            self.record({"charts/team_return": returns.sum()})
            if partner := self.table.finish(i, returns):
                self.record({f"charts/return_with_{partner}": info["dreamer_episode"]["r"][i]})
        if self.pool is not None and self.crossed(self.args.pool_every):
            self.pool.add(self.agent)
        super().log(metrics, info)

    def record(self, values: dict[str, Any]) -> None:
        """Leaves out what `skill` does not know: that is NaN."""
        may_be_nan = ("diagnostics/tom_bayes", "diagnostics/tom_skill")
        super().record({tag: x for tag, x in values.items() if tag not in may_be_nan or x == x})

    def draw(self) -> dict[str, np.ndarray]:
        pictures = super().draw() | draw_teammates(self.agent, self.buffer)
        return pictures | draw_game(self.agent, self.pool)

    def saved(self) -> dict[str, Any]:
        return super().saved() | {"pool": self.pool and self.pool.state_dict()}

    def play_saved(self, agent: SocialDreamer) -> dict[str, Any]:
        """Evaluates the agent of a saved run, with each partner too. Writes nothing but videos."""
        restore(agent, self.dir)
        if self.args.partners == "pool":
            self.pool = make_pool(agent, self.args, self.dir)
        self.assess(agent, f"{self.dir.name}__evaluation", self.args.capture_video, each=True)
        print(f"{self.dir}: evaluation return {self.eval_sentence()}")
        for name, values in self.result["eval_partners"].items():
            print(f"  with {name}: " + ", ".join(f"{k} {x:.3f}" for k, x in values.items()))
        return self.eval_results()

    def evaluate(self, purpose: str = "evaluation") -> None:
        """At the end of the run with each partner alone, too."""
        if self.rank > 0:
            return
        self.assess(self.agent, self.dir.name, each=self.finished, purpose=purpose)
        result = self.result
        self.record({"eval/episodic_return": np.mean(self.eval_returns),
                     "eval/team_return": result["eval_team_return_mean"]})
        self.record({f"eval/tom_{name}": x for name, x in result["eval_tom"].items()})
        self.record({f"eval/return_with_{name}": x["return"]
                     for name, x in result["eval_partners"].items()})
        self.say(f"global_step={self.step}, eval_return={self.eval_sentence()}")

    def assess(self, agent: SocialDreamer, run_name: str, capture_video: bool = False,
               each: bool = False, purpose: str = "evaluation") -> None:
        """Evaluates with the partners of training and, if `each`, with each one alone."""
        args = self.args
        result = evaluate(agent, args, args.eval_episodes, run_name, args.deterministic,
                          capture_video, pool=self.pool, purpose=purpose)
        self.result = {
            "eval_team_return_mean": float(np.mean(result["team_returns"])),
            "eval_tom": result["tom"], "eval_bayes_return": self.ideal, "eval_partners": {}}
        self.eval_returns = result["returns"]  # from here on it counts, even if the rest fails
        if each:
            self.result["eval_partners"] = evaluate_partners(agent, args, self.pool, run_name)

    @functools.cached_property
    def ideal(self) -> float | None:
        return bayes_return(self.args)

    def eval_results(self) -> dict[str, Any]:
        return super().eval_results() | (self.result if self.eval_returns else {})

    def eval_sentence(self) -> str:
        if not self.eval_returns:
            return super().eval_sentence()
        ideal = self.result["eval_bayes_return"]
        known = f", ideal observer {ideal:.2f}" if ideal is not None else ""
        tom = "".join(f", {name} {x:.3f}" for name, x in self.result["eval_tom"].items())
        return (f"{super().eval_sentence()}{known}; team "
                f"{self.result['eval_team_return_mean']:.2f}; ToM{tom[1:]}")

def main(args: SocialArgs, agent_class: type[SocialDreamer] = SocialDreamer) -> dict[str, Any]:
    """Trains, and returns what summary.json holds; with args.evaluate plays a saved agent, and
    returns the evaluation. Raises InputError for bad input."""
    run = SocialRun(args)
    envs = run.make_envs()
    observation_space, action_space, seats, run.scripts = seat_spaces(args)
    agent = agent_class(observation_space, action_space, args, seats)
    if args.evaluate:
        close_envs(envs)
        return run.play_saved(agent)
    buffer = run.begin(envs, agent)
    metrics = {}
    with run:
        obs, arrived = run.reset()
        while not run.finished:
            # 1. act, in all seats
            action, rows = run.table.act(obs, arrived["is_first"])
            # 2. store what arrived, what was chosen, and what the others did
            buffer.add(rows)
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
    command_line(SocialArgs, SocialDreamer)
