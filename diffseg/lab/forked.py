"""A kernel that is forked from a server which has imported the libraries: each of a run's notebooks begins at once.

Environment variables that a library reads when it is imported (OMP_NUM_THREADS, HF_HOME) have the values of the
runner's start.
"""

import atexit
import gc
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner

import diffseg
from diffseg.forking import context, prepare
from diffseg.lab.locks import RUNNER
from diffseg.paths import project_root

# glibc gives the memory of every large tensor back to the system and asks for it anew; kept, a CPU trains and draws 1.1
# to 1.5 times as fast. Other C libraries ignore the variable.
MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (("trim_threshold", 2**32), ("mmap_threshold", 2**32), ("mmap_max", 0), ("top_pad", 2**26))
)


def environment() -> dict[str, str]:
    """Return what a kernel gets besides this process's environment variables."""
    here = str(Path(diffseg.__file__).parents[1])  # the kernel imports this very package
    return {
        RUNNER: "1",  # the runner holds the locks
        "DIFFSEG_ROOT": str(project_root()),  # a kernel works in the run's folder, which may lie anywhere
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC),
        "MPLBACKEND": os.environ.get("MPLBACKEND", "module://matplotlib_inline.backend_inline"),
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences a debugger's warning at every start
        "TQDM_NCOLS": str(shutil.get_terminal_size().columns),
        "TQDM_MININTERVAL": os.environ.get("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "30"),
    }


def forks() -> bool:
    """Return whether kernels are forked: on Linux without an accelerator. CUDA does not work in a process that was
    forked from one which has asked for it, as some libraries do when they are imported."""
    devices = "nvidia[0-9]*", "nvhost*", "nvgpu*", "kfd", "dxg", "accel*", "davinci*"  # dxg: the GPU of Windows, in WSL
    return sys.platform == "linux" and not any(list(Path("/dev").glob(name)) for name in devices)


def warm() -> None:
    """Let the server import its libraries while the runner reads parameters and notebooks."""
    if forks():
        prepare(environment())


class Forked(LocalProvisioner):
    """Starts and ends such a kernel for jupyter_client."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        warm()
        self.cwd = kwargs.get("cwd", os.getcwd())
        process = context().Process(target=serve, args=(cmd[cmd.index("-m") + 2 :], kwargs["env"], self.cwd))
        own = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # a kernel has one of its own: a script is not run again in it
        try:
            process.start()
        except (EOFError, ConnectionError):  # a library ended the server: started anew, the cell that needs it says why
            return await super().launch_kernel(cmd, **kwargs)
        finally:
            sys.modules["__main__"] = own
        self.process, self.pid, self.pgid = AsPopen(process), process.pid, process.pid
        return self.connection_info

    async def send_signal(self, signum: int) -> None:
        if await self.poll() is None:  # else its number may be another process's by now
            await super().send_signal(signum)


class AsPopen:
    """A process of multiprocessing with the methods of subprocess.Popen that LocalProvisioner calls."""

    stdin = stdout = stderr = None

    def __init__(self, process: multiprocessing.Process):
        self.process = process

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def serve(arguments: list[str], variables: dict[str, str], folder: str) -> None:
    """In the forked process: be a kernel with these arguments, environment variables and working directory."""
    os.setsid()  # Ctrl-C is for the runner
    multiprocessing.set_start_method(None, force=True)  # the system's, for what does not ask for a server
    Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv[1:] = arguments
    from ipykernel.kernelapp import IPKernelApp  # here: the runner needs none

    try:
        IPKernelApp.launch_instance(argv=arguments)
    finally:  # what the end of an interpreter does, and that of a forked process does not
        IPKernelApp.instance().shell.user_ns.clear()
        gc.collect()
        atexit._run_exitfuncs()
