"""DreamerV3 in one file: learn a world model from experience, then learn to act inside its dreams.

    python dreamer.py                                             # CartPole-v1, solved in minutes on a laptop CPU
    python dreamer.py --env-id dm_control/walker-walk-v0          # values chosen for the suite, see PRESETS
    python dreamer.py --env-id ALE/Pong-v5 --size 12m --track     # any flag overrides the preset
    python dreamer.py --evaluate runs/CartPole-v1__dreamer__1__…  # play a saved agent
    python dreamer.py --resume   runs/CartPole-v1__dreamer__1__…  # go on where a run stopped

The algorithm is that of "Mastering Diverse Domains through World Models" (Hafner et al., Nature 2025,
arXiv 2301.04104v2) as its author's code runs it: danijar/dreamerv3 at e3f0224 (2026-05). Where paper and code differ,
the code is followed. test_dreamer.py checks losses, states and two optimizer steps against numbers recorded from it.

Symbols   B batch · T time · H imagination horizon · N = B·T dreams · D deter size · S latents of C classes each
          A action size · U units · G = 8 blocks       h deter · z stoch · feat = [h, z] · sg(·) stop-gradient

Time      Row t of the replay holds what *arrived* at t and the action chosen after seeing it:

            row                t-1                 t                  t+1
            arrived      x, r, flags ──┐     x, r, flags ──┐     x, r, flags      is_first: x begins an episode, r = 0
            chosen             a ──────┼──▶        a ──────┼──▶        a          is_last: x ends one; terminal or not
            model        h, z ─────────┴──▶  h, z ─────────┴──▶  h, z

          h_t = f(h_{t-1}, z_{t-1}, a_{t-1});  z_t ~ q(z | h_t, x_t) when x_t is seen (posterior), z_t ~ p(z | h_t) in
          dreams (prior). The heads at t predict r_t and whether x_t was terminal; the return at t begins with r_{t+1}.

Deviations from the reference: replay stores deter as bfloat16 and stoch as uint8 class indices, 2.5 times smaller than
deter and one-hots in float32; samples are drawn by inverse CDF from uniform noise made ahead, so that a run can be
replayed exactly; the presets of suites that the reference has none for (CartPole's above all) carry values of our own,
see PRESETS.
"""
import argparse
import collections
import contextlib
import dataclasses
import datetime
import gc
import importlib
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

# Values that a suite sets when its flags are not given. Reference: the author's configs.yaml at e3f0224. "ours" marks
# what the reference does not have; everything else, and every value not named here, is the reference's.
PRESETS: dict[str, dict[str, Any]] = {
    "atari": dict(size="200m", num_envs=1, train_ratio=256, total_timesteps=100_000),  # Atari 100k: 4 frames a step
    "dmc_vector": dict(size="1m", num_envs=16, train_ratio=1024, total_timesteps=1_000_000),
    "dmc_pixels": dict(size="200m", num_envs=16, train_ratio=256, total_timesteps=1_000_000),
    "box2d_pixels": dict(size="12m", num_envs=8, train_ratio=128, total_timesteps=500_000),  # ours
    "mujoco": dict(size="1m", num_envs=16, train_ratio=512, total_timesteps=1_000_000),  # ours, after dmc_vector
    "classic_control": dict(  # ours: minutes on two CPU cores, so all has to be learned from 1,900 small updates
        size="1m", num_envs=16, train_ratio=20, total_timesteps=24_000,  # steps cost nothing here, updates do
        batch_size=16, batch_length=16, learning_rate=1e-3, warmup=100, anneal_lr=True, tau=0.1,
        contdisc=False,  # 0 and 1 are learned in fewer updates than 0 and 0.997
        rec_scale=100.0,  # squared errors of angles within ±0.2 drown in the other losses, and the policy lives by them
        ent_coef=0.01,  # with less, all environments drift to one side and the model never sees the other one's end
        video_every=10_000, eval_episodes=20),
    "other": dict(size="12m", num_envs=4, train_ratio=128, total_timesteps=500_000),  # ours
}

def suite_of(env_id: str, pixels: bool = False) -> str:
    """Name of the preset for an environment id."""
    entry = "" if pixels or env_id not in gym.registry else str(gym.registry[env_id].entry_point)
    suites = {"atari": "ALE/" in env_id, "dmc_pixels": "dm_control/" in env_id and pixels,
              "dmc_vector": "dm_control/" in env_id, "box2d_pixels": "CarRacing" in env_id,
              "mujoco": "envs.mujoco" in entry, "classic_control": "envs.classic_control" in entry, "other": True}
    return next(name for name, applies in suites.items() if applies)

@dataclasses.dataclass
class Args:
    """The comment at a field is its line in --help."""
    exp_name: str = "dreamer"  # name of the experiment, part of the run's name
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

    env_id: str = "CartPole-v1"  # Gymnasium id of the environment; `module:id` imports the module first
    pixels: bool = False  # observe rendered frames instead of the environment's own observation
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
    def preset(cls, env_id: str, pixels: bool = False, **overrides: Any) -> "Args":
        """Arguments for an environment id: the reference's, its suite's on top, `overrides` on top of both."""
        return cls(**{"env_id": env_id, "pixels": pixels, **PRESETS[suite_of(env_id, pixels)], **overrides})

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
                 "dyn_scale rep_scale rec_scale repval_scale", 0, 1e12),
                ("agc", 1e-6, 1e12), ("gamma tau", 1e-6, 1), ("return_lambda", 0, 1), ("seed", 0, 2**31)):
            for name in names.split():
                if not least <= getattr(self, name) <= most:  # so is NaN, which is in no range
                    raise InputError(f"{name} {getattr(self, name)} cannot be used: take {least:g} to {most:g}")
        if self.resume and self.evaluate:
            raise InputError(f"resume {self.resume!r} and evaluate {self.evaluate!r} exclude each other: take one")
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

PACKAGES = {  # beginning of an id: module that registers it, and how to install it
    "ALE/": ("ale_py", "ale-py==0.12.1 opencv-python-headless"),
    "dm_control/": ("shimmy", '"shimmy[dm-control]" "mujoco<4" packaging'),
    "MiniGrid-": ("minigrid", '"minigrid>=3.1,<4"'), "BabyAI-": ("minigrid", '"minigrid>=3.1,<4"'),
    "MinAtar/": ("minatar.gym", "minatar==1.0.15"), "popgym-": ("popgym", "popgym==1.0.7"),
    "tetris_gymnasium/": ("tetris_gymnasium.envs", "opencv-python-headless && pip install --no-deps tetris-gymnasium"),
}
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

def make_env(env_id: str, idx: int, capture_video: bool, run_name: str, pixels: bool = False, image_size: int = 64):
    """CleanRL's thunk: a function without arguments that makes environment number `idx` of a run. Number 0 records its
    episodes under videos/{run_name} if `capture_video`. `pixels` replaces the observation by rendered frames. ALE ids
    get the preprocessing of Atari 100k, MiniGrid ids coloured tiles in place of object codes."""
    record, name = capture_video and idx == 0, env_id.rpartition(":")[2]  # module:id is imported by Gymnasium
    module, packages = next((v for k, v in PACKAGES.items() if name.startswith(k)), ("", "its package"))
    atari = name.startswith("ALE/")

    def thunk() -> gym.Env:
        kwargs: dict[str, Any] = {"render_mode": "rgb_array"} if pixels or record else {}
        if atari:  # no sticky actions, the game's own actions; the wrapper below repeats them
            kwargs |= dict(frameskip=1, repeat_action_probability=0.0, full_action_space=False)
        if name.startswith("dm_control/") and pixels:
            kwargs |= dict(render_kwargs=dict(height=image_size, width=image_size, camera_id=0))
        try:
            with explain_failure(env_id, packages):
                if module:  # MinAtar registers on request, the others when they are imported
                    getattr(importlib.import_module(module), "register_envs", lambda: None)()
                env = gym.make(env_id, **kwargs)
                if record:
                    env = gym.wrappers.RecordVideo(env, f"videos/{run_name}", disable_logger=True)
                if pixels:
                    env.reset()  # some environments render only after a reset
                    env = gym.wrappers.AddRenderObservation(env, render_only=True)
                elif module == "minigrid":
                    env = importlib.import_module("minigrid.wrappers").RGBImgPartialObsWrapper(env, tile_size=8)
                if atari:  # 30 no-ops, repeat 4 with the maximum of the last two frames, colour
                    env = gym.wrappers.AtariPreprocessing(env, screen_size=image_size, grayscale_obs=False)
        except Exception as error:  # whatever a renderer raises
            if isinstance(error, InputError) or not (pixels or record):
                raise
            raise InputError(f"{env_id} cannot be rendered here ({error}): without a display, MUJOCO_GL=egl may help, "
                             "else leave out --pixels and --capture-video") from None
        if isinstance(env.observation_space, gym.spaces.Dict):  # text is no observation for a CNN or an MLP
            keep = [k for k, v in env.observation_space.items() if isinstance(v, (gym.spaces.Box, *CHOICES, *TREES))]
            if 0 < len(keep) < len(env.observation_space):
                warnings.warn(f"{env_id}: only the observations {keep} are used, the others are not numbers")
                env = gym.wrappers.FilterObservation(env, keep)
        return env

    return thunk

def make_vector_env(args: Args, num_envs: int, run_name: str, capture_video: bool = False) -> gym.vector.VectorEnv:
    """`num_envs` environments that reset themselves: the step after the last of an episode ignores its action and
    returns the first observation of the next with reward 0 (NEXT_STEP), just what the replay wants to see."""
    thunks = [make_env(args.env_id, i, capture_video, run_name, args.pixels, args.image_size) for i in range(num_envs)]
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
    context = "spawn" if args.pixels and sys.platform != "win32" else None  # MuJoCo's GL contexts do not survive a fork
    return gym.vector.AsyncVectorEnv(thunks, context=context, autoreset_mode=mode)

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

def features(deter: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
    """What heads, actor and critic see: [h, flat z]."""
    return torch.cat([deter, stoch.flatten(-2)], -1)

class WorldModel(nn.Module):
    """Everything that learns from real experience alone: encoder, RSSM, decoder, reward and continue heads."""
    def __init__(self, obs: dict[str, Leaf], actions: int, size: Size):
        super().__init__()
        self.encoder, self.decoder = Encoder(obs, size), Decoder(obs, size)
        self.rssm = RSSM(self.encoder.size, actions, size)
        feat = size.deter + size.latents * size.classes
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
        recon = self.decoder(deter.flatten(0, 1), stoch.flatten(0, 1))
        parts = self.decoder.loss(recon, {k: x.flatten(0, 1) for k, x in batch["obs"].items()})
        feat, losses = features(deter, stoch), {}
        losses["dyn"], losses["rep"] = rssm.kl_loss(post, prior, free_nats)
        losses["rec"] = sum(parts.values()).unflatten(0, deter.shape[:2])
        losses["rew"] = SymexpTwoHot(self.reward(feat)).loss(batch["reward"])
        # the reference makes the discount part of the target, so that dreams need no γ of their own
        target = (~batch["is_terminal"]).float() * gamma
        losses["con"] = F.binary_cross_entropy_with_logits(self.cont(feat)[..., 0].float(), target, reduction="none")
        metrics = {f"rec_{k}": x.mean() for k, x in parts.items()} if len(parts) > 1 else {}
        for name, logits in (("prior_entropy", prior), ("posterior_entropy", post)):
            metrics[name] = rssm.dist(logits).entropy().sum(-1).mean()
        return losses, metrics

    @torch.no_grad()
    def dream(self, batch: dict[str, Any], context: int, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reconstructs `context` steps, then predicts the rest from actions alone: name → (B, T, …) as in Decoder."""
        seen = [x[:, :context] for x in (batch["prev_action"], batch["is_first"], noise)]
        tokens = self.encode({k: x[:, :context] for k, x in batch["obs"].items()})
        deter, stoch, _ = self.rssm.observe(*batch["carry"], tokens, *seen)
        actions, rest = batch["prev_action"][:, context:], noise[:, context:].transpose(0, 1)
        later = self.rssm.imagine(deter[:, -1], stoch[:, -1], lambda h, z, t: actions[:, t], actions.shape[1], rest)
        deter, stoch = (torch.cat([a, b[1:].transpose(0, 1)], 1) for a, b in zip((deter, stoch), later))
        recon = self.decoder(deter.flatten(0, 1), stoch.flatten(0, 1))
        return {k: x.unflatten(0, deter.shape[:2]) for k, x in recon.items()}

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
    Spaces are those of ONE environment, observations and actions batches of them. Raises InputError for spaces that
    cannot be used. See README for a short loop of use without this file's."""
    def __init__(self, observation_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        args.check()
        self.args, self.size = args, SIZES[args.size]
        self.observations = ObservationCodec(observation_space, args.image_size)
        self.actions = ActionCodec(action_space)
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        low = args.precision == "bfloat16" or (args.precision == "auto" and self.device.type == "cuda")
        self.compute_dtype = torch.bfloat16 if low else torch.float32
        feat, units = self.size.deter + self.size.latents * self.size.classes, self.size.units
        self.wm = WorldModel(self.observations.leaves, self.actions.size, self.size)
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
                "deter": ((self.size.deter,), torch.bfloat16), "stoch": ((self.size.latents,), torch.uint8)}

    def noise(self, rng: torch.Generator, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.rand(shape, generator=rng, device=self.device) for shape in shapes]

    def upload(self, x: np.ndarray) -> torch.Tensor:
        """Array → tensor on the device, without waiting for the copy."""
        x = torch.as_tensor(x)
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    @torch.no_grad()
    def act(self, obs: Any, state: dict[str, Any] | None, is_first: np.ndarray, deterministic: bool = False):
        """Chooses actions for a batch of observations.
        obs: batch (N, …) as a vector environment returns it; state: what the last call returned, None at the start;
        is_first: (N,) bool, where an episode begins; deterministic: modes of latents and actions in place of samples.
        Returns actions for the environment and the new state, which also is the agent's part of a replay step:
        obs/…, action, deter and stoch, see `replay_specs`."""
        encoded, n = self.observations(obs), len(is_first)
        if state is None:
            deter, stoch = self.wm.rssm.initial(n, self.device)
            state = {"deter": deter, "onehot": stoch, "action": torch.zeros(n, self.actions.size, device=self.device)}
        noise = self.noise(self.act_rng, (n, 1, self.size.latents, 1), (n, self.actions.noise))
        inputs = ({k: self.upload(x) for k, x in encoded.items()},
                  *(state[k] for k in ("deter", "onehot", "action")), self.upload(is_first))
        with torch.compiler.set_stance("force_eager"):  # what is compiled is compiled for the shapes of learning
            out = self.respond(*inputs) if deterministic else [x.clone() for x in self.fast_respond(*inputs, *noise)]
        fresh = dict(zip(("deter", "onehot", "stoch", "action"), out))
        return self.actions.decode(fresh["action"].cpu().numpy()), fresh | {f"obs/{k}": x for k, x in encoded.items()}

    def respond(self, obs: dict[str, torch.Tensor], deter, stoch, prev_action, is_first, z_noise=None, a_noise=None):
        """The part of `act` that is nothing but tensors (N, …): new deter, stoch, its class indices, and the action."""
        tokens = self.wm.encode({k: x[:, None] for k, x in obs.items()})
        deter, stoch, _ = self.wm.rssm.observe(deter, stoch, tokens, prev_action[:, None], is_first[:, None], z_noise)
        deter, stoch = deter[:, 0], stoch[:, 0]
        return deter, stoch, stoch.argmax(-1), self.actor(features(deter, stoch)).sample(a_noise)

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Lays a sampled batch (B, T + 1, …) out for learning: T steps with the actions before them, and the carry."""
        x = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if k not in ("env", "row")}
        onehot = F.one_hot(x["stoch"][:, 0].long(), self.size.classes).float()
        return {"obs": {k[4:]: v[:, 1:] for k, v in x.items() if k.startswith("obs/")},
                "prev_action": x["action"][:, :-1], "carry": (x["deter"][:, 0].float(), onehot),
                **{k: x[k][:, 1:] for k in ("reward", "is_first", "is_last", "is_terminal")}}

    def update(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One optimizer step on a batch of ReplayBuffer.sample: losses and diagnostics as 0-d tensors on the device.
        "deter" and "stoch" of `batch` then hold the fresh latents (B, T, …), for ReplayBuffer.write_back."""
        data, (b, t) = self.prepare(batch), batch["reward"][:, 1:].shape
        h, s, n = self.args.imagination_horizon, self.size.latents, b * min(self.args.imag_last or t, t)
        noise = self.noise(self.learn_rng, (b, t, s, 1), (h, n, s, 1), (h + 1, n, self.actions.noise))
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
        imag_losses, returns, imag_metrics = self.imagination_loss(*(x.flatten(0, 1) for x in starts), *noise[1:])
        losses |= {k: x.mean(1) for k, x in imag_losses.items()}
        losses["repval"], real_return = self.replay_value_loss(
            {k: data[k][:, end] for k in ("reward", "is_last", "is_terminal")}, features(*starts),
            returns[:, 0].view(starts[0].shape[:2]))
        scales = dict(dyn=args.dyn_scale, rep=args.rep_scale, rec=args.rec_scale, rew=1, con=1, policy=1, value=1,
                      repval=args.repval_scale)
        assert losses.keys() == scales.keys(), (losses.keys(), scales.keys())
        loss = sum(scales[k] * x.mean() for k, x in losses.items())
        metrics |= imag_metrics | {"real_reward": data["reward"].mean(), "real_return": real_return.mean()}
        report = {f"losses/{k}": x.mean().detach() for k, x in (losses | {"total": loss}).items()}
        report |= {f"diagnostics/{k}": x.detach().clone() for k, x in metrics.items()}
        return loss, report, (deter.detach(), stoch.detach().argmax(-1))

    def imagination_loss(self, deter: torch.Tensor, stoch: torch.Tensor, z_noise: Any, a_noise: Any):
        """Dreams from every state (N, …), with noise as in RSSM.imagine or Nones; returns losses of actor and critic
        (N, H), the λ-returns (N, H) and metrics."""
        def policy(h, z, t) -> torch.Tensor:
            return self.policy(h, z, None if a_noise is None else a_noise[t])

        with torch.no_grad():  # REINFORCE needs no gradient through the dream
            horizon = self.args.imagination_horizon
            deter, stoch, action = self.wm.rssm.imagine(deter.detach(), stoch.detach(), policy, horizon, z_noise)
        x = self.judge(deter, stoch, action)
        scale = self.retnorm(x["tar"])
        advantage = (x["tar"] - x["val"][:, :-1]) / scale
        losses = {
            # −w · (sg(A) · ln π(a) + η · H[π])
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

    def policy(self, deter: torch.Tensor, stoch: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Actions (N, A) in a dream."""
        return self.actor(features(deter, stoch)).sample(noise)

    def judge(self, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> dict[str, torch.Tensor]:
        """What heads, actor and critics say to dreams (H + 1, N, …). At all steps, (N, H + 1): rew, con, val, slowval,
        weight. At all but the last, (N, H): the λ-returns `tar`, logp of the actions, policy_entropy and value_loss."""
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
                    logp=dist.log_prob(action).t(), policy_entropy=dist.entropy().t(), value_loss=value_loss)

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

def evaluate(agent: Dreamer, args: Args, episodes: int, run_name: str = "eval", deterministic: bool = False,
             capture_video: bool = False, max_steps: int = 27_000) -> list[float]:
    """Returns (undiscounted sums of reward) of `episodes` episodes, played at once in as many environments: each gives
    its first, so that short episodes are not favoured. An episode longer than `max_steps` counts as far as that."""
    state, is_first, done = None, np.ones(episodes, bool), np.zeros(episodes, bool)
    returns, running = np.zeros(episodes), np.ones(episodes, bool)
    envs = make_vector_env(args, episodes, run_name, capture_video)
    with contextlib.closing(envs), leave_no_trace(agent.act_rng):
        obs, _ = envs.reset(seed=args.seed + 10_000)
        for _ in range(max_steps):
            action, state = agent.act(obs, state, is_first, deterministic)
            obs, reward, terminated, truncated, _ = envs.step(action)
            returns += np.where(running, reward, 0.0)
            is_first, done = done, terminated | truncated
            running &= ~done
            if not running.any():
                break
    return returns.tolist()

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

def save_dreams(agent: Dreamer, buffer: ReplayBuffer, writer: Any, run_dir: Path, step: int) -> None:
    """Writes the pictures to run_dir/dreams as GIF or PNG and to TensorBoard, whose own add_video needs moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    (run_dir / "dreams").mkdir(exist_ok=True)
    # not recompiled for the shapes of the pictures
    with leave_no_trace(agent.act_rng, buffer.generator), torch.compiler.set_stance("force_eager"):
        pictures = draw_dreams(agent, buffer)
    for key, (image, *later) in pictures.items():
        path = run_dir / "dreams" / f"{key.replace('/', '-')}_{step:09d}.{'gif' if later else 'png'}"
        image.save(path, **dict(save_all=True, append_images=later, duration=100, loop=0) if later else {})
        proto = Summary.Image(height=image.height, width=image.width, encoded_image_string=path.read_bytes())
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=f"dreams/{key}", image=proto)]), step)

def save_run(run_dir: Path, agent: Dreamer, buffer: ReplayBuffer, counters: dict[str, Any],
             replay_file: str = "replay.pt") -> None:
    """Writes the replay and, but for torchrun's later processes, agent.pt; each replaces the last one when complete."""
    agent_state = {"agent": agent.state_dict(), "args": dataclasses.asdict(agent.args), "counters": counters}
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

def parse_args(argv: list[str] | None = None) -> Args:
    """Command line on top of the preset of its --env-id, or of the arguments of the run to --resume or --evaluate."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # reads only what chooses the defaults
    for name in ("env-id", "resume", "evaluate"):
        first.add_argument(f"--{name}", f"--{name.replace('-', '_')}", default=getattr(Args, name.replace("-", "_")))
    first.add_argument("--pixels", action="store_true")
    known, _ = first.parse_known_args(argv)
    run_dir = known.resume or known.evaluate
    try:
        default = Args(**load_file(run_dir)["args"]) if run_dir else Args.preset(known.env_id, known.pixels)
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
    agent = Dreamer(envs.single_observation_space, envs.single_action_space, args)
    counters = dict(global_step=0, updates=0, seconds=0.0, ranks=ranks)
    if args.resume or args.evaluate:
        counters = restore(agent, run_dir, rank)
    if args.evaluate:
        envs.close()
        returns = evaluate(agent, args, args.eval_episodes, f"{run_dir.name}__evaluation", args.deterministic,
                           args.capture_video)
        print(f"{run_dir}: return {np.mean(returns):.2f} ± {np.std(returns):.2f} over {len(returns)} episodes")
        return {"eval_return_mean": np.mean(returns), "eval_return_std": np.std(returns), "eval_returns": returns}
    if counters["ranks"] != ranks:
        raise InputError(f"{run_dir} was run by {counters['ranks']} processes and not by {ranks}: resume it with "
                         f"torchrun --nproc-per-node {counters['ranks']}")
    capacity = max(min(args.buffer_size, args.total_timesteps) // ranks, (args.batch_length + 1) * n)
    where = args.buffer_device if agent.device.type == "cuda" else "cpu"
    buffer = ReplayBuffer(capacity, n, args.batch_length, agent.replay_specs(), args.seed + rank, where)
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
    episodes, eval_returns, metrics, no = [], [], {}, np.zeros(n, bool)
    arrived = dict(reward=np.zeros(n), is_first=~no, is_last=no, is_terminal=no)
    returns, lengths = np.zeros(n), np.zeros(n, int)  # of the episodes that are going on
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=rank > 0 or None, smoothing=0.05)

    def due(every: int) -> bool:  # did the last step of all environments cross a multiple of `every`?
        return every > 0 and step // every > (step - n * ranks) // every

    def log(values: dict[str, Any]) -> None:
        for tag, value in values.items() if writer else ():
            writer.add_scalar(tag, float(value), step)

    def play() -> list[float]:
        if rank > 0:
            return []
        scores = evaluate(agent, args, args.eval_episodes, run_dir.name, args.deterministic)
        log({"eval/episodic_return": np.mean(scores)})
        tqdm.write(f"global_step={step}, eval_return={np.mean(scores):.2f} ± {np.std(scores):.2f}")
        return scores

    def progress() -> dict[str, Any]:
        seconds = time.time() - start  # of this part of the run; speeds are of it alone
        return {"global_step": step, "updates": updates, "seconds": counters["seconds"] + seconds, "ranks": ranks,
                "sps": (step - first_step) / seconds, "updates_per_second": (updates - first_updates) / seconds}

    def save() -> None:
        if np.isfinite(float(metrics.get("diagnostics/update_norm", 0))):  # never in place of healthy weights
            save_run(run_dir, agent, buffer, progress(), replay_file)

    try:
        obs, _ = envs.reset(seed=args.seed + step + 1000 * rank)
        while step < args.total_timesteps:
            # 1. act
            action, state = agent.act(obs, state, arrived["is_first"])
            # 2. store what arrived and what was chosen
            buffer.add({k: arrived[k] if k in arrived else state[k] for k in buffer.data})
            # 3. step: workers do so during the updates, as does this process while a GPU with the replay computes them
            if workers := isinstance(envs, gym.vector.AsyncVectorEnv):
                envs.step_async(action)
            # 4. update train_ratio / (B·T) times for every environment step
            left = max(0.0, 1 - step / args.total_timesteps) if args.anneal_lr else 1.0
            agent.optimizer.param_groups[0]["lr"].fill_(args.learning_rate * left)
            if len(buffer) >= max(args.batch_size * args.batch_length, n * buffer.window):
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
            returns += reward
            arrived = dict(reward=reward, is_first=arrived["is_last"], is_last=terminated | truncated,
                           is_terminal=terminated)
            bar.update(n * ranks)
            for i in np.flatnonzero(arrived["is_last"]):
                episodes.append(float(returns[i]))
                if rank == 0:
                    tqdm.write(f"global_step={step}, episodic_return={episodes[-1]:.2f}")
                log({"charts/episodic_return": returns[i], "charts/episodic_length": lengths[i]})
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
                save_dreams(agent, buffer, writer, run_dir, step)
            if due(args.eval_every):
                eval_returns = play()
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
            eval_returns = play() if finished else eval_returns
        mean, std = (float(f(eval_returns)) if eval_returns else None for f in (np.mean, np.std))
        summary = end | {
            "interrupted": not finished, "train_returns": episodes[-20:], "eval_return_mean": mean,
            "eval_return_std": std, "eval_returns": eval_returns, "args": vars(args),
            "device": torch.cuda.get_device_name() if agent.device.type == "cuda" else platform.processor() or "cpu",
            "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, np, gym)}}}
        if writer:
            (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
            writer.close()
            result = f"evaluation return {mean:.2f} ± {std:.2f}" if eval_returns else "no evaluation"
            print(f"{run_dir}: {step:,} steps, {updates:,} updates, {end['seconds']:.0f} s, {result}")
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
