"""Memory and time of one update in parts (--accumulate) at size 50m, 16 x 64 steps from vectors, on one thread:

    python benchmark/memory.py PARTS
"""
import resource
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer  # noqa: E402


def gib() -> float:
    """The most memory that this process has taken (ru_maxrss is in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


torch.set_num_threads(1)
torch.manual_seed(1)
args = dreamer.Args(size="50m", accumulate=int(sys.argv[1]), cuda=False, compile=False)
spaces = gym.spaces.Box(-np.inf, np.inf, (24,), np.float32), gym.spaces.Box(-1, 1, (6,), np.float32)
agent = dreamer.Dreamer(*spaces, args)
batch = {}
for name, (shape, dtype) in agent.replay_specs().items():
    x = torch.rand(args.batch_size, args.batch_length + 1, *shape)
    batch[name] = x < 0.02 if dtype == torch.bool else (4 * x).to(dtype)
before = gib()
start = time.process_time()
metrics, _ = agent.update(batch)
print(f"{args.accumulate} parts: {before:.2f} GiB before, {gib():.2f} GiB at the peak, "
      f"{time.process_time() - start:.0f} s of CPU time, loss {metrics['losses/total']:.4f}")
