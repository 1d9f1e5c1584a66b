"""Real faults on real runs: what survives them, and what is lost.

    python benchmark/drills.py --out drills.csv                              # of dreamer.py, 10 minutes
    python benchmark/drills.py --script dreamer_marl.py --only signal        # those whose name holds it
    python benchmark/drills.py --soak 200000 --out soak.csv                  # memory, threads, files

A drill starts a small run that saves every 200 steps, does the fault, resumes the run, and asks whether
all came out as it should. "lost" are the steps between the last one that was printed and the one
that the resumed run begins from. Needs Linux; torch with gloo for the last drill.
"""
import contextlib
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Callable, Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
EVERY = 200  # steps between checkpoints
FLAGS = ["--size", "1m", "--num-envs", "2", "--batch-size", "2", "--batch-length", "8", "--train-ratio", "0.5",
         "--imagination-horizon", "5", "--checkpoint-every", str(EVERY), "--eval-every", "0", "--stop-at", "None",
         "--eval-episodes", "2", "--video-every", "0", "--threads", "1", "--no-cuda", "--no-compile"]
FAULTY = '''
import gymnasium as gym
from pathlib import Path
from gymnasium.envs.classic_control import CartPoleEnv

class Faulty(CartPoleEnv):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        fault = Path("fault").read_text() if Path("fault").exists() else ""
        if fault == "raise":
            raise RuntimeError("a fault of the environment")
        return obs, float("nan") if fault == "nan" else reward, terminated, truncated, info

gym.register("Faulty-v0", Faulty)
'''


class Failed(Exception):
    """What did not come out as it should."""


def check(true: object, what: str) -> None:
    if not true:
        raise Failed(what)


class Drill:
    """A run in a folder of its own, and the processes that it is given to."""
    def __init__(self, folder: Path, script: Path):
        self.folder, self.script = folder, script
        self.run = folder / "run"
        self.output = folder / "output"
        self.processes: list[subprocess.Popen] = []
        self.seen = 0  # last step that was printed before the fault

    def start(self, *flags: str, ranks: int = 1) -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, str(self.script), *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder)}
        with open(self.output, "w") as file:
            self.processes.append(subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=file, stderr=file, start_new_session=True))
        return self.processes[-1]

    def clean(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def begin(self, *flags: str, steps: int = 1_000_000, ranks: int = 1) -> subprocess.Popen:
        """A run that has saved once."""
        process = self.start("--run-dir", "run", "--total-timesteps", str(steps), *FLAGS, *flags, ranks=ranks)
        self.wait(lambda: (self.run / "replay.pt").exists() or process.poll() is not None, "the first checkpoint")
        check(process.poll() is None or steps < 1_000_000, f"it ended by itself:\n{self.printed()}")
        return process

    def printed(self) -> str:
        return self.output.read_text()

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
        end = time.time() + seconds
        while not condition():
            check(time.time() < end, f"waited in vain for {what}")
            time.sleep(0.002)

    def end(self, process: subprocess.Popen, status: int | None, said: str = "") -> None:
        """Waits for the end of a process; `status`: that it must have, `said`: what it must have printed."""
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Failed("it hung") from None
        self.seen = self.step_printed()
        check(status in (None, process.returncode), f"status {process.returncode}, not {status}:\n{self.printed()[-2000:]}")
        check(said in self.printed(), f"{said!r} was not printed:\n{self.printed()[-2000:]}")
        check(not list(self.folder.rglob("*.part")) or process.returncode == -9, "a part file is left")

    def step_printed(self) -> int:
        steps = [line.split("=")[1].split(",")[0] for line in self.printed().splitlines() if "global_step=" in line]
        return int(steps[-1]) if steps else 0

    def step_saved(self) -> int:
        return torch.load(self.run / "agent.pt", weights_only=True)["counters"]["global_step"]

    def resume(self, ranks: int = 1) -> str:
        """Resumes the run for some steps. Returns what was lost."""
        saved, seen = self.step_saved(), self.seen
        self.end(self.start("--resume", "run", "--total-timesteps", str(saved + 100), ranks=ranks), 0)
        check(json.loads((self.run / "summary.json").read_text())["global_step"] == saved + 100, "it did not go on")
        lost = max(0, seen - saved)
        check(lost <= EVERY + 4, f"{lost} steps are lost")
        return f"{lost} steps" if lost else "nothing"


def workers(process: subprocess.Popen) -> list[int]:
    pids = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in pids if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def damage(path: Path) -> None:
    """Turns one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def killed(drill: Drill) -> str:
    process = drill.begin()
    time.sleep(random.uniform(0, 3))
    process.kill()
    drill.end(process, -9)
    return drill.resume()


def killed_inside(name: str) -> Callable[[Drill], str]:
    def inside(drill: Drill) -> str:
        process = drill.begin()
        drill.wait((drill.run / f"{name}.part").exists, "a save")
        process.kill()
        drill.end(process, -9)
        return drill.resume()
    return inside


def signalled(number: int, flags: list[str] = []) -> Callable[[Drill], str]:
    def send(drill: Drill) -> str:
        process = drill.begin(*flags)
        children = workers(process)
        process.send_signal(number)  # to the main process alone
        drill.end(process, 128 + number, "go on with --resume run")
        check(json.loads((drill.run / "summary.json").read_text())["interrupted"], "the summary does not say so")
        drill.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "the end of the workers", 10)
        return drill.resume()
    return send


def twice(drill: Drill) -> str:
    process = drill.begin()
    drill.wait((drill.run / "agent.pt.part").exists, "a save")
    for _ in range(2):
        process.terminate()
    drill.end(process, 143, "go on with --resume run")
    return drill.resume()


def evaluating(drill: Drill) -> str:
    process = drill.begin("--eval-episodes", "1000", steps=EVERY)
    drill.wait(lambda: "go on" in drill.printed() or drill.step_saved() == EVERY, "the last save")
    time.sleep(2)
    process.terminate()
    drill.end(process, 143)
    return drill.resume()


def worker_lost(number: int, said: str) -> Callable[[Drill], str]:
    def lose(drill: Drill) -> str:
        process = drill.begin("--vectorization", "async", "--env-timeout", "2")
        os.kill(workers(process)[0], number)
        drill.end(process, 2, said)
        return drill.resume()
    return lose


def faulty(fault: str, status: int, said: str) -> Callable[[Drill], str]:
    def fail(drill: Drill) -> str:
        (drill.folder / "faulty.py").write_text(FAULTY)
        process = drill.begin("--env-id", "faulty:Faulty-v0")
        (drill.folder / "fault").write_text(fault)
        drill.end(process, status, said)
        (drill.folder / "fault").unlink()
        return drill.resume()
    return fail


def disk_full(drill: Drill) -> str:
    process = drill.begin()
    saved = drill.step_saved()
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))  # the agent has more
    drill.wait(lambda: drill.step_printed() > saved + 3 * EVERY, "further steps")
    process.terminate()
    drill.end(process, 143, "is not saved")
    drill.seen = drill.step_saved()  # no later one could be written
    return drill.resume().replace("nothing", "what was not saved, and said so")


def replay_damaged(drill: Drill) -> str:
    signalled(signal.SIGTERM)(drill)
    damage(drill.run / "replay.pt")
    drill.end(drill.start("--resume", "run", "--total-timesteps", "1000000"), 2, "replay.pt is damaged")
    (drill.run / "replay.pt").unlink()
    drill.resume()
    return "the replay"


def agent_damaged(drill: Drill) -> str:
    signalled(signal.SIGTERM)(drill)
    damage(drill.run / "agent.pt")
    drill.end(drill.start("--resume", "run", "--total-timesteps", "1000000"), 2, "agent.pt is damaged")
    return "the agent, and it said so"


def folder_deleted(drill: Drill) -> str:
    process = drill.begin()
    while drill.run.exists():  # the run may write meanwhile
        shutil.rmtree(drill.run, ignore_errors=True)
    drill.wait((drill.run / "replay.pt").exists, "the next checkpoint")
    process.kill()
    drill.end(process, -9, "was deleted")
    return drill.resume().replace("nothing", "the earlier log")


def not_writable(drill: Drill) -> str:
    drill.run.touch()  # a file, where the folder should be
    drill.end(drill.start("--run-dir", "run", "--total-timesteps", "100", *FLAGS), 2, "cannot be made")
    return "nothing"


def restarted(drill: Drill) -> str:
    steps = []
    for _ in range(2):
        (drill.run / "replay.pt").unlink(missing_ok=True)
        process = drill.begin(steps=3 * EVERY)
        process.kill()
        drill.end(process, -9)
        steps.append(drill.step_saved())
    drill.begin(steps=3 * EVERY).wait(90)
    drill.end(drill.start("--run-dir", "run", "--total-timesteps", str(3 * EVERY), *FLAGS), 2, "has made its")
    check(steps[0] < steps[1] or steps[0] == 3 * EVERY, f"it began again: {steps}")
    return drill.resume()


def second_process(drill: Drill) -> str:
    process = drill.begin()
    output, drill.output = drill.output, drill.folder / "second"
    drill.end(drill.start("--resume", "run"), 2, "used by another process")
    drill.output = output
    process.terminate()
    drill.end(process, 143)
    return drill.resume()


def extended(drill: Drill) -> str:
    drill.begin(steps=EVERY).wait(90)
    drill.end(drill.start("--resume", "run"), 2, "has made its 200 steps")
    return drill.resume()


def rank_killed(drill: Drill) -> str:
    process = drill.begin(ranks=2)
    os.kill(workers(process)[1], signal.SIGKILL)
    drill.end(process, 1)
    check((drill.run / "replay1.pt").exists(), "the replay of the second process is not there")
    return drill.resume(ranks=2)


DRILLS: dict[str, Callable[[Drill], str]] = {
    **{f"kill -9, moment {i}": killed for i in range(1, 6)},
    "kill -9 while the agent is written": killed_inside("agent.pt"),
    "kill -9 while the replay is written": killed_inside("replay.pt"),
    **{f"signal {name}": signalled(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")},
    "signal SIGTERM, workers in processes": signalled(signal.SIGTERM, ["--vectorization", "async"]),
    "signal SIGTERM twice while it saves": twice,
    "signal SIGTERM in the last evaluation": evaluating,
    "worker: kill -9": worker_lost(signal.SIGKILL, "died"),
    "worker: stopped": worker_lost(signal.SIGSTOP, "did not answer for 2 s"),
    "environment: raises": faulty("raise", 1, "a fault of the environment"),
    "environment: pays NaN": faulty("nan", 2, "reward nan"),
    "disk full": disk_full,
    "replay.pt damaged": replay_damaged,
    "agent.pt damaged": agent_damaged,
    "folder deleted": folder_deleted,
    "folder not writable": not_writable,
    "same command again, after kill -9, twice": restarted,
    "second process in the same folder": second_process,
    "finished run, resumed and extended": extended,
    "torchrun: kill -9 of one of two processes": rank_killed,
}
ONE_AGENT = ("environment: raises", "environment: pays NaN")  # drills that dreamer_marl.py cannot be given


def soak(steps: int) -> list[list[object]]:
    """How much memory (MiB), how many threads and open files a run has, and their slopes per 100,000 steps after
    the replay was full for a while. Few updates, so that it takes minutes; one in 256 steps."""
    if steps < 100_000:
        raise SystemExit("error: --soak needs 100,000 steps or more")
    with tempfile.TemporaryDirectory() as name:
        drill = Drill(Path(name), ROOT / "dreamer.py")
        flags = [*FLAGS, "--num-envs", "16", "--buffer-size", "20000", "--train-ratio", "0.0625", "--checkpoint-every", "20000"]
        process = drill.start("--run-dir", "run", "--total-timesteps", str(steps), *flags)
        rows: list[list[object]] = []
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError, StopIteration):  # it ended just now, or begins
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                memory, threads = (next(int(x.split()[1]) for x in status if x.startswith(key)) for key in ("VmRSS", "Threads"))
                rows.append([drill.step_printed(), memory / 1024, threads, len(os.listdir(f"/proc/{process.pid}/fd"))])
            time.sleep(2)
    late = np.array([row for row in rows[:-5] if row[0] > 60_000], float)  # the last ones are of its end
    slopes = [f"{np.polyfit(late[:, 0], late[:, i], 1)[0] * 1e5:.4g}" for i in (1, 2, 3)]
    return [["step", "memory_mib", "threads", "files"], *rows, ["slope per 100,000 steps", *slopes]]


def main(script: Literal["dreamer.py", "dreamer_marl.py"] = "dreamer.py", only: str = "", out: str = "",
         soak_steps: Annotated[int, tyro.conf.arg(name="soak")] = 0) -> None:
    """Tries faults on real runs, and prints what survived and what was lost.

    Args:
        script: which one is tried
        only: drills whose name holds this
        out: a CSV to write
        soak_steps: steps of a long run that is watched, instead of the drills
    """
    if soak_steps:
        rows = soak(soak_steps)
        print(rows[-1])
    else:
        random.seed(1)
        # a shell has what it runs in the background ignore the first two, and nohup the third
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        rows = [["fault", "survived", "lost"]]
        for name, drill in DRILLS.items():
            if only not in name or (script == "dreamer_marl.py" and name in ONE_AGENT):
                continue
            with tempfile.TemporaryDirectory() as folder:
                tried = Drill(Path(folder), ROOT / script)
                try:
                    row = [name, "yes", drill(tried)]
                except Failed as problem:
                    row = [name, "no", str(problem)]
                finally:
                    tried.clean()
            rows.append(row)
            print(f"{row[0]:45} {row[1]:4} {row[2]}", flush=True)
    if out:
        with open(out, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    tyro.cli(main)
