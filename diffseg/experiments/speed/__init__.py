"""Benchmarks of speed, each a command that writes results/benchmarks/; nothing here is asserted in a test."""

import time
from collections.abc import Callable, Hashable
from typing import TypeVar

from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)


def time_in_turn(calls: dict[Name, Callable], repetitions: int) -> dict[Name, list[tuple[float, float]]]:
    """Time calls in turn, so that a change in the machine's load meets all: (wall, CPU) seconds of each repetition."""
    times: dict[Name, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in tqdm(range(repetitions), "timing", unit="repetition"):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times
