"""How long an update takes, and how far that is from what the machine can do: `python benchmark/speed.py`.

Prints a table and writes benchmark/speed_<device>.json. The yardstick that holds on any machine is "× ideal": the time
of an update divided by (its floating-point operations ÷ the machine's peak), where the peak is that of a large matrix
product in the same process, number format and number of threads. Eager, compiled and captured updates and the products
take turns, so that a busy machine slows all of them; what is printed is the median, and half of the range between the
quartiles. The products have the number format of the first mode. FLOPs are those of matrix products and convolutions,
counted by torch.utils.flop_counter.
"""
import dataclasses
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer as D  # noqa: E402

OBSERVATIONS = {"vector": gym.spaces.Box(-np.inf, np.inf, (24,), np.float32),
                "image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}


@dataclasses.dataclass
class Options:
    sizes: tuple[str, ...] = ()  # sizes to time; none: 1m and 12m, and on CUDA 25m, 50m and 200m as well
    observations: tuple[str, ...] = ("vector", "image")  # kinds of observation
    # of eager, captured (which compiles as well) and compiled, and eager-bfloat16 and so on; none: those of the device
    modes: tuple[str, ...] = ()
    repeats: int = 7  # timed updates of every mode, or 3 and as many as fit into so many
    seconds: float = 30.0
    threads: int = 2  # CPU threads
    batch_size: int = 16  # sequences in a batch
    batch_length: int = 64  # steps in a sequence
    end_to_end: bool = True  # also time whole runs on CartPole-v1 and CarRacing-v3
    cuda: bool = True  # use the GPU if there is one
    out: str = ""  # file for the results; empty: benchmark/speed_<device>.json


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of five large square matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(timed(lambda: a @ b) for _ in range(5))


def random_batch(agent: D.Dreamer) -> dict[str, torch.Tensor]:
    args, batch = agent.args, {}
    for name, (shape, dtype) in agent.replay_specs().items():
        shape = (args.batch_size, args.batch_length + 1, *shape)
        batch[name] = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    return {k: x.to(agent.device) for k, x in batch.items()}


def dtype_of(agent: D.Dreamer) -> torch.dtype:
    """Number format of the updates' matrix products."""
    return next(iter(agent.cast().values()), torch.empty(0)).dtype


def memory(device: torch.device) -> float:
    """Peak MiB so far: of the GPU's allocator, or of this process."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else kib / 1024


def count_flops(update) -> int:
    with FlopCounterMode(display=False) as counter:
        update()
    return counter.get_total_flops()


def count_kernels(update, cuda: bool) -> int:
    """Kernels of an update on CUDA; on the CPU its innermost operators, or the loops that they were fused to."""
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        update()
        synchronize()
    events = trace.events()
    innermost = [e for e in events if ("aten::" in e.name or "fused" in e.name) and not e.cpu_children]
    return sum(e.device_type == DeviceType.CUDA for e in events) if cuda else len(innermost)


def time_updates(options: Options, size: str, kind: str, modes: tuple[str, ...]) -> list[dict]:
    agents, rows, first, mebibytes = {}, [], {}, {}
    torch._dynamo.reset()
    for mode in modes:
        way, _, precision = mode.partition("-")
        args = D.Args(size=size, batch_size=options.batch_size, batch_length=options.batch_length, cuda=options.cuda,
                      compile=way != "eager", cuda_graph=way == "captured", precision=precision or "auto")
        agents[mode] = D.Dreamer(OBSERVATIONS[kind], gym.spaces.Box(-1, 1, (6,)), args)
        batch = random_batch(agents[mode])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        warm = 3 if way == "captured" else 1  # the third one captures
        first[mode] = sum(timed(lambda: agents[mode].update(dict(batch))) for _ in range(warm))
        mebibytes[mode] = memory(agents[mode].device)  # with the weights of the modes before it
    times, products = {mode: [] for mode in modes}, []
    for i in range(options.repeats):
        if i >= 3 and sum(map(sum, times.values())) > options.seconds:
            break
        for mode, agent in agents.items():
            times[mode].append(timed(lambda: agent.update(dict(batch))))
        products.append(peak_flops(agent.device, dtype_of(agents[modes[0]])))
    kernels = {mode: count_kernels(lambda: agent.update(dict(batch)), agent.device.type == "cuda")
               for mode, agent in agents.items()}
    eager = D.Dreamer(OBSERVATIONS[kind], gym.spaces.Box(-1, 1, (6,)), dataclasses.replace(
        agents[modes[0]].args, compile=False, cuda_graph=False))
    flops = count_flops(lambda: eager.update(dict(batch)))
    peak = float(np.median(products))
    for mode, agent in agents.items():
        low, median, high = np.percentile(times[mode], (25, 50, 75))
        obs = {n: np.zeros((n, *OBSERVATIONS[kind].shape), OBSERVATIONS[kind].dtype) for n in (1, 16)}
        acting = {}
        for n, x in obs.items():
            state, spans = None, []
            for _ in range(25):
                start = time.perf_counter()
                _, state = agent.act(x, state, np.zeros(n, bool))
                spans.append(time.perf_counter() - start)
            acting[n] = 1e3 * float(np.median(spans[5:]))
        rows.append(dict(
            size=size, observation=kind, mode=mode, dtype=str(dtype_of(agent)).removeprefix("torch."),
            update_ms=1e3 * median, spread_ms=1e3 * (high - low) / 2, first_updates_s=first[mode], gflop=flops / 1e9,
            peak_gflops=peak / 1e9, ideal_ms=1e3 * flops / peak, times_ideal=median * peak / flops,
            kernels=kernels[mode], act_1_ms=acting[1], act_16_ms=acting[16], peak_memory_mib=mebibytes[mode]))
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in rows[-1].values()) + " |",
              flush=True)
    return rows


def end_to_end(options: Options) -> list[dict]:
    """Steps and updates a second of whole runs in a scratch folder."""
    runs, here = [], os.getcwd()
    for env_id, values in (("CartPole-v1", dict(total_timesteps=2_000)),
                           ("CarRacing-v3", dict(size="1m", total_timesteps=1_500, train_ratio=32, num_envs=4))):
        args = D.Args.preset(env_id, **values, threads=options.threads, cuda=options.cuda, video_every=0,
                             eval_episodes=1, save_model=False)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.chdir(folder)
            stdout, sys.stdout = sys.stdout, open(os.devnull, "w")
            try:
                summary = D.main(args)
                runs.append({"env_id": env_id, **{k: summary[k] for k in ("global_step", "sps", "updates_per_second")}})
            except D.InputError as error:
                runs.append({"env_id": env_id, "left_out": str(error)})
            finally:
                sys.stdout = stdout
                os.chdir(here)
        print(runs[-1], flush=True)
    return runs


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    cuda = options.cuda and torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    sizes = options.sizes or (("1m", "12m", "25m", "50m", "200m") if cuda else ("1m", "12m"))
    modes = options.modes or (("eager", "captured", "compiled") if cuda else ("eager", "compiled"))
    known = {f"{way}{end}" for way in ("eager", "captured", "compiled") for end in ("", "-float32", "-bfloat16")}
    if unknown := set(modes) - known:
        raise SystemExit(f"error: modes {', '.join(sorted(unknown))} do not exist: take some of "
                         f"{', '.join(sorted(known))}")
    model = next((line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    about = dict(device=torch.cuda.get_device_name() if cuda else model.strip() or platform.processor(),
                 threads=options.threads, date=datetime.date.today().isoformat(), batch=[options.batch_size,
                 options.batch_length], load_at_start=os.getloadavg()[0],
                 versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__})
    print(about)
    print("| size | observation | mode | dtype | update ms | ± | first updates s | GFLOP "
          "| peak GFLOP/s | ideal ms | × ideal | kernels | act 1 ms | act 16 ms | peak MiB |\n|" + "-|" * 15)
    path, rows = Path(options.out or Path(__file__).parent / f"speed_{device}.json"), []

    def write(runs: list) -> None:
        path.write_text(json.dumps({**about, "updates": rows, "runs": runs}, indent=1) + "\n")

    for size in sizes:
        for kind in options.observations:
            if cuda or options.sizes or (size, kind) != ("12m", "image"):  # over ten seconds an update
                rows += time_updates(options, size, kind, modes)
                write([])
    write(end_to_end(options) if options.end_to_end else [])
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
