"""One notebook in one fresh kernel of this interpreter, over papermill."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from diffseg.errors import DiffsegError, Incomplete
from diffseg.lab.forked import Forked, environment, forks


class Kernel(AsyncKernelManager):
    """A kernel of this interpreter; a kernelspec `python3` in the user's home may name another one."""

    @property
    def kernel_spec(self) -> KernelSpec:
        specification = get_kernel_dict()  # ipykernel's own, with sys.executable
        quiet = "--IPKernelApp.log_level=50"  # a message at each shutdown; errors of cells come another way
        options = quiet, "--IPKernelApp.kernel_class=diffseg.lab.ending.Ending"
        return KernelSpec(**specification | {"argv": [*specification["argv"], *options], "env": environment()})

    def __init__(self, **options: Any):
        # TCP ports are chosen some time before they are bound, and ranks that begin together would choose the same ones
        sockets = TemporaryDirectory(prefix="diffseg-", dir="/tmp")  # the path of a socket must be short
        # a minute to end: of jupyter's 5 s a loaded machine may need more, and a kernel that is killed flushes no file
        super().__init__(transport="ipc", ip=f"{sockets.name}/kernel", shutdown_wait_time=60.0, **options)
        self.sockets = sockets
        if forks():
            self.provisioner = Forked(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)


class Live:
    """A stream for papermill that shows progress bars in place on a terminal and line by line in a log."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        self.stream.write(text if self.stream.isatty() else text.replace("\r", "\n"))

    def flush(self) -> None:
        self.stream.flush()


def execute(notebook: Path, executed: Path, parameters: dict[str, Any], folder: Path) -> None:
    """Run a notebook with `folder` as working directory and write it, with its outputs, to `executed`.

    What its cells print is shown live. A cell that fails or a kernel that dies raises DiffsegError: one sentence with
    the notebook's name, the cell's error and the path of the executed notebook. A cell that misses other shares' work
    raises Incomplete.
    """
    executed.parent.mkdir(parents=True, exist_ok=True)
    # papermill takes braces in a path for parameters
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed))
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters,
            kernel_name="python3",
            kernel_manager_class=Kernel,
            progress_bar=False,
            stdout_file=Live(sys.stdout),
            stderr_file=Live(sys.stderr),
            start_timeout=300,
            resources={"metadata": {"path": str(folder)}},  # not cwd, which would move this process, too
        )
        return
    except papermill.PapermillExecutionError as error:
        if error.ename == "Incomplete":
            raise Incomplete(error.evalue) from None
        reason = error.evalue if error.ename == "DiffsegError" else f"{error.ename}: {error.evalue}"
        if "Original Traceback" in reason:  # of a process that loads images: its last line is the error
            reason = reason.strip().splitlines()[-1].removeprefix("diffseg.errors.DiffsegError: ")
        if error.ename == "OSError" and "No space left" in error.evalue:
            reason = f"the disk of {folder} is full; free some space, and the same command continues"
    except RuntimeError:  # nbclient's, also of a kernel that does not start
        reason = "its kernel died, most likely for want of memory; the same command continues where it stopped"
    sentence = " ".join(reason.split())[:500].rstrip(". ")
    raise DiffsegError(f"{notebook.stem} failed: {sentence} (executed notebook: {executed}).")
