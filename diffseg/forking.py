"""Where processes come from: a server that has imported the libraries forks kernels and workers in no time."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing.context import BaseContext

# what takes each process ten seconds to import; nothing of diffseg, whose code may change between two steps
LIBRARIES = (
    "torch",
    "torchvision.transforms.v2",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "segmentation_models_pytorch",
    "pandas",
    "pydantic",
    "matplotlib.pyplot",
)


def context() -> BaseContext:
    """Return how processes start: forked by a server that has imported LIBRARIES and knows nothing of this process's
    threads and GPU; anew where there are no such servers (Windows)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(LIBRARIES))
    return server


def prepare(variables: Mapping[str, str] = {}) -> None:
    """Let that server import its libraries beside what this process does until it starts others.

    variables: environment variables of the server, besides this process's.
    """
    if context().get_start_method() != "forkserver":
        return
    from multiprocessing.forkserver import ensure_running  # here: Windows has none

    # a file of the working directory must not take the place of a library
    variables = {**variables, "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    is_main = threading.current_thread() is threading.main_thread()  # another cannot say what a signal does
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None  # Ctrl-C is not for the server
    try:
        ensure_running()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        os.environ.update({name: value for name, value in before.items() if value is not None})
        for name in (name for name, value in before.items() if value is None):
            del os.environ[name]
