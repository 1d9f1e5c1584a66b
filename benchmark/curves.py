"""Writes the scalars of a run as CSV (tag, step, value), all of them or those of the tags named:

    python benchmark/curves.py runs/RUN [TAG …] > benchmark/RUN.csv
"""
import csv
import sys
from typing import TextIO

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(run: str, tags: list[str]) -> list[tuple[str, int, float]]:
    """(tag, step, value) of the scalars of a run's folder, all of them if no tag is named."""
    events = EventAccumulator(run, size_guidance={"scalars": 0}).Reload()
    tags = sorted(tags or events.Tags()["scalars"])
    return [(tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)]


def write(rows: list[tuple[str, int, float]], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["tag", "step", "value"])
    writer.writerows([tag, step, f"{value:.6g}"] for tag, step, value in rows)


if __name__ == "__main__":
    write(scalars(sys.argv[1], sys.argv[2:]), sys.stdout)
