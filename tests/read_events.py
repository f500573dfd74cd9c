"""Compares what TensorBoard reads in a run directory with its metrics.jsonl: tags, steps and values."""

import json
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run = Path(sys.argv[1])
want = {}
for line in (run / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    gap = f"_gap_{record['gap']:g}" if "gap" in record else ""
    numbers = {name: record[name] for name in record if name not in ("step", "samples", "split", "gap", "seconds")}
    for group, shares in numbers.pop("accuracy_by", {}).items():
        numbers |= {f"accuracy_by_{group}/{name}": share for name, share in shares.items()}
    for name, value in numbers.items():
        want.setdefault(f"{record['split']}{gap}/{name}", []).append((record["step"], np.float32(value)))

events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
events.Reload()
tags = set(events.Tags()["scalars"])
if missing := set(want) ^ tags:
    sys.exit(f"tags that only one of them has: {sorted(missing)}")
for tag, values in want.items():
    got = [(event.step, np.float32(event.value)) for event in events.Scalars(tag)]
    if got != values:
        sys.exit(f"{tag}: TensorBoard reads {got[:3]} ({len(got)}), metrics.jsonl holds {values[:3]} ({len(values)})")
times = [event.wall_time for event in events.Scalars("train/loss")]
if times != sorted(times):
    sys.exit("the times of train/loss go back")
print(f"{sum(map(len, want.values()))} scalars under {len(want)} tags")
