"""A forked kernel is as fresh as one that is started anew; only the libraries are there already."""

import asyncio
import json
import multiprocessing
import sys
from pathlib import Path

import nbformat
import pytest

from diffseg.errors import DiffsegError
from diffseg.lab import forked, kernel

REPOSITORY = Path(__file__).parents[2]
STARTING = "errors files forking lab lab.ending lab.forked lab.locks miniworld paths"
ASKED = """
import json, multiprocessing, os, sys
from pathlib import Path
loaded = [name for name in sys.modules if name.startswith("diffseg.")]
libraries = "diffusers" in sys.modules
import matplotlib
from matplotlib import pyplot as plt
plt.plot([1, 2])
answer = dict(loaded=loaded, libraries=libraries, folder=os.getcwd(), session=os.getsid(0) == os.getpid(), run=run,
              runner=os.environ["DIFFSEG_RUNNER"], mine=os.environ["MINE"], name=__name__, arguments=sys.argv[1:2],
              workers=multiprocessing.get_start_method(), root=os.environ["DIFFSEG_ROOT"],
              kernel=type(get_ipython().kernel).__name__)
unfinished = open("unfinished.txt", "w")
unfinished.write("is flushed")
import atexit
atexit.register(Path("end.txt").write_text, "is called")
Path("answer.json").write_text(json.dumps(answer))
plt.show()
"""


def write_notebook(path, source):
    cells = [
        nbformat.v4.new_code_cell("run = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), path)


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
@pytest.mark.parametrize("is_forked", [True, False])
def test_a_kernel_is_fresh_forked_or_not(tmp_path, monkeypatch, is_forked):
    monkeypatch.setattr(kernel, "forks", lambda: is_forked)
    monkeypatch.setenv("MINE", "set after the server was started")
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("DIFFSEG_ROOT", ".")  # where the command was given; the notebook works in another folder
    forked.warm()
    write_notebook(tmp_path / "a.ipynb", ASKED)

    async def execute():  # as in a cell of Jupyter, where an event loop runs and kernels are started by another thread
        kernel.execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {"run": "this"}, tmp_path)

    asyncio.run(execute())
    answer = json.loads((tmp_path / "answer.json").read_text())
    # what starts it, and no code of a step: that may have changed since the server was started
    assert set(answer.pop("loaded")) <= {f"diffseg.{name}" for name in STARTING.split()}
    assert answer == {
        "libraries": is_forked,
        "folder": str(tmp_path),
        "session": True,
        "run": "this",
        "runner": "1",
        "mine": "set after the server was started",
        "name": "__main__",
        "arguments": ["-f"],
        "workers": multiprocessing.get_start_method(),
        "root": str(REPOSITORY),
        "kernel": "Ending",  # ends a failed cell's processes, for which ipykernel's would wait half a minute
    }
    assert [(tmp_path / name).read_text() for name in ("unfinished.txt", "end.txt")] == ["is flushed", "is called"]
    shown = nbformat.read(tmp_path / "b.ipynb", 4).cells[-1].outputs
    assert [output.output_type for output in shown if "image/png" in output.get("data", {})] == ["display_data"]


@pytest.mark.parametrize(("error", "is_forked"), [("DiffsegError", True), ("OSError", False)])
def test_an_error_in_a_process_that_loads_images_is_its_own_sentence(tmp_path, monkeypatch, error, is_forked):
    monkeypatch.setattr(kernel, "forks", lambda: is_forked and sys.platform == "linux")
    source = f"""
from torch.utils.data import DataLoader
from diffseg.errors import DiffsegError
class Broken:
    def __len__(self):
        return 1
    def __getitem__(self, index):
        raise {error}("a.jpg is damaged; get it again.")
next(iter(DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")))
"""
    write_notebook(tmp_path / "a.ipynb", source)
    with pytest.raises(DiffsegError) as raised:
        kernel.execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {}, tmp_path)
    kind = "" if error == "DiffsegError" else f"{error}: "
    assert str(raised.value).startswith(f"a failed: {kind}a.jpg is damaged; get it again (executed notebook: ")
