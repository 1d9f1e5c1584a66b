"""Writes the scalars of a run as CSV (tag, step, value), all of them or those of the tags named:

    python benchmark/curves.py runs/RUN [TAG …] > benchmark/RUN.csv
"""
import csv
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
writer = csv.writer(sys.stdout, lineterminator="\n")
writer.writerow(["tag", "step", "value"])
for tag in sorted(sys.argv[2:] or events.Tags()["scalars"]):
    writer.writerows([tag, event.step, f"{event.value:.6g}"] for event in events.Scalars(tag))
