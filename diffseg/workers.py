"""Processes beside this one, a thread each: on a CPU, jobs side by side outrun the same jobs on all cores in turn."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from threading import Thread

import torch

from diffseg.forking import context


def begin(worker: int = 0) -> None:
    """In a new worker: use one thread, and end when it is interrupted or the process that started it was killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use that many threads of the CPU; 0: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(calls: Iterable[Callable]) -> Iterator:
    """Make calls in a worker each, all at once; yield what they return, in their order.

    calls: without arguments, picklable. An error is raised when the others have ended.
    """
    calls = list(calls)
    with ProcessPoolExecutor(len(calls), context(), begin) as pool:
        for future in [pool.submit(call) for call in calls]:
            yield future.result()
