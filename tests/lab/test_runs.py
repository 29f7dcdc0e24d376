"""Steps by content, and the batch runner, on a tiny project of three real notebooks, driven by the real papermill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from helpers import release

from diffseg import files
from diffseg.errors import DiffsegError
from diffseg.files import atomic_path, sha256_file
from diffseg.lab import batch, cleaning, kernel, locks, processes, runs
from diffseg.lab.cli import main
from diffseg.lab.manifests import damage, read_listing, write_manifest
from diffseg.lab.steps import STEPS, linked_keys, step_key

REPOSITORY = Path(runs.__file__).parents[2]
SHARED = 'run = "tiny"  # name of the run\nout = ""  # where it goes\nseed = 0  # of all random numbers\n'
BEGIN = 'from diffseg.lab import runs\nstep = runs.begin("{step}", globals())'

# step -> parameters, and cells: a source, or a source with the cell's tag
CELLS = {
    "01_prompt_augmentation": (
        "count = 3  # prompts\nfail = False  # raise an error\n",
        [
            """
text = "".join(f"a cat {seed + i}\\n" for i in range(count))
with atomic_path(step.folder / "prompts.csv") as path:
    path.write_text(text)
if fail:
    raise ValueError("the second line\\nof an error")
step.finish(["prompts.csv"], {"prompts": count})
"""
        ],
    ),
    "02_lora_tuning": (
        "rate = 0.5  # learning rate\n",
        [
            """
with atomic_path(step.folder / "lora.txt") as path:
    path.write_text(repr(rate))
step.finish(["*.txt"])
"""
        ],
    ),
    # slow on request, and every image drawn is counted in a file outside the step's folder
    "03_synthesis": (
        "images = 20  # images\nsizes = [8, 8]  # height, width\nbeta = 0.2  # threshold\nworkers = 0  # processes\n",
        [
            (
                """
import os, time
drawing = runs.begin("03_drawing", globals())
prompts = drawing.input("01_prompt_augmentation", "prompts.csv").read_text()
(step.run / "kernel.pid").write_text(str(os.getpid()))
for i in range(images):
    path = drawing.folder / "JPEGImages" / f"{i:02}.jpg"
    if not path.exists():
        time.sleep(float(os.environ.get("PAUSE", 0)))
        with atomic_path(path) as temporary:
            temporary.write_text(f"{prompts} {i} {sizes}")
        with open(step.run / "made.txt", "a") as made:
            print(i, file=made)
drawing.finish(["JPEGImages/*.jpg"])
""",
                "drawing",
            ),
            """
for i in range(images):
    with atomic_path(step.folder / "SegmentationClass" / f"{i:02}.png") as path:
        path.write_text((drawing.folder / "JPEGImages" / f"{i:02}.jpg").read_text() + f" {beta}")
""",
            ("shown = 1", "figure"),
            'step.finish(["SegmentationClass/*.png"])',
        ],
    ),
}


def write_notebook(path: Path, parameters: str, cells: str | list) -> None:
    """Write a notebook of a parameters cell, one that begins the step, and cells with a tag or without."""
    new = nbformat.v4.new_code_cell
    made = [new(parameters.strip(), metadata={"tags": ["parameters"]})]
    begin = BEGIN.format(step=path.stem)
    if "03_" in path.stem and "03_drawing" in str(cells):  # the part that is drawn comes first, and cuts stand on it
        begin = begin.split("\n")[0]
        cells = [(cells[0][0].replace("step.run", "drawing.run"), "drawing"),
                 'step = runs.begin("03_synthesis", globals())', *cells[1:]]  # fmt: skip
    made.append(new(f"{begin}\nfrom diffseg.files import atomic_path"))
    for cell in [cells] if isinstance(cells, str) else cells:
        source, *tags = [cell] if isinstance(cell, str) else cell
        made.append(new(source.strip(), metadata={"tags": tags} if tags else {}))
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernelspec})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def make_project(root: Path) -> None:
    for step, (parameters, cells) in CELLS.items():
        write_notebook(root / "notebooks" / f"{step}.ipynb", SHARED + parameters, cells)
    (root / "notebooks" / "params").mkdir()
    (root / "notebooks" / "params" / "tiny.yaml").write_text("# three tiny steps\nrun: tiny\nrate: 1e-4\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose run went through once, undisturbed; tests work on copies of it."""
    root = tmp_path_factory.mktemp("finished")
    make_project(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSEG_ROOT", str(root))
        patch.chdir(root)
        batch.run("tiny")
    return root


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A project without a run; returns the folder its run will have."""
    make_project(tmp_path)
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    yield tmp_path / "results" / "runs" / "tiny"
    release()


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of the finished project, somewhere else on disk; returns its run's folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    yield tmp_path / "results" / "runs" / "tiny"
    release()


def everything(root: Path) -> dict[str, tuple]:
    """Name -> size, time of modification and sha256 of every file below results, links and locks apart."""
    paths = [p for p in (root / "results").rglob("*") if p.is_file() and "lock" not in str(p.relative_to(root))]
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns, sha256_file(p)) for p in paths}


def images_in(folder: Path) -> list[Path]:
    """The drawn images; a hidden name is one that is being written, and may be gone a moment later."""
    return [path for path in (folder / "03_drawing").resolve().rglob("*.jpg") if not path.name.startswith(".")]


def hashes(folder: Path) -> dict[str, str]:
    folders = [(folder / step).resolve() for step in ("03_drawing", "03_synthesis")]
    paths = [path for place in folders for path in place.rglob("[0-9]*.*g")]
    return {f"{path.parent.name}/{path.name}": sha256_file(path) for path in paths}


def values(**changes) -> dict:
    """The name space of notebook 01 after its parameters cell."""
    return {"run": "tiny", "out": "", "seed": 0, "count": 3, "fail": False, **changes}


def values_of_03() -> dict:
    return {"run": "tiny", "out": "", "seed": 0, "images": 20, "sizes": [8, 8], "beta": 0.2, "workers": 0}


def execute_cells(notebook: Path, **changes) -> None:
    """Run a notebook's cells in this process, as JupyterLab runs them one by one."""
    namespace = {}
    parameters, *cells = nbformat.read(notebook, 4).cells
    exec(parameters.source, namespace)
    namespace |= changes
    for cell in cells:
        exec(cell.source, namespace)


def make(root: Path, *steps: str, **changes) -> None:
    """Make steps in this process, as one kernel after another would."""
    for step in steps:
        execute_cells(root / "notebooks" / f"{step}.ipynb", **changes)
        release()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 400  # so that a defect fails instead of hanging
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# bad input: one sentence, exit code 1, and nothing has run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tiny", "--set", "imagse=3"], "imagse.* did you mean images?"),
        (["tiny", "--set", "images=many"], "images"),
        (["tiny", "--set", "run=../x"], "run"),
        (["tinny"], "no parameter file .* named tinny; did you mean tiny?"),
        (["tiny", "--only", "7"], "asks for what is not there"),
        (["tiny", "--only", "1-9999999999"], "asks for what is not there"),
        (["tiny", "--only", "3-1"], "asks for what is not there"),
        (["tiny", "--only", "a-b"], "--only takes numbers"),
        (["tiny", "--only", "3"], "run 01_prompt_augmentation first, with --only 1: it is not finished"),
        (["tiny", "--only", "3", "--shard", "4/3"], "--shard is '4/3'"),
        (["tiny", "--shard", "1/3"], "--shard divides notebook 3 only"),
        (["absent.yaml"], "cannot read .*absent.yaml"),
    ],
)
def test_bad_input_is_one_sentence(fresh, capsys, arguments, sentence):
    assert main(["run", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(sentence.replace("?", "[?]"), error), error
    assert not list((fresh.parents[1] / "steps").rglob("manifest.json"))


def test_unwritable_and_full_folders(fresh, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["run", "tiny", "--out", str(tmp_path / "file")]) == 1
    assert "cannot write to" in capsys.readouterr().err
    with pytest.raises(DiffsegError, match="cannot write to"):
        runs.begin("01_prompt_augmentation", values(out=str(tmp_path / "file")))
    monkeypatch.setattr(batch, "MINIMUM_FREE", 1e18)
    assert main(["run", "tiny"]) == 1
    assert "MB are free in" in capsys.readouterr().err


def test_only_selects_by_number():
    names = [step for step in STEPS if step != "03_drawing"]
    assert batch.select(None, names) == names and batch.select("3", names) == ["03_synthesis"]
    assert batch.select("5,1-2,1", names) == [names[0], names[1], names[4]]


def test_one_runner_a_run_and_notebooks_take_its_lock_too(fresh, capsys):
    with batch.working_in(fresh):
        assert main(["run", "tiny"]) == 1
        with pytest.raises(DiffsegError, match="another diffseg run, or a notebook"):
            runs.begin("01_prompt_augmentation", values())
    assert "another diffseg run" in capsys.readouterr().err
    runs.begin("01_prompt_augmentation", values())
    assert main(["run", "tiny"]) == 1  # the notebook holds it until its kernel ends
    runs.begin("01_prompt_augmentation", values(count=5))  # which may begin again


def test_a_notebook_holds_its_step_too(fresh):
    """So that neither the notebook of another run nor `diffseg clean` works in the same folder."""
    step = runs.begin("01_prompt_augmentation", values())
    with pytest.raises(DiffsegError, match="another process is making"):
        locks.acquire(*locks.step_lock(step.folder))
    release()
    with locks.acquire(*locks.step_lock(step.folder)), pytest.raises(DiffsegError, match="another process is making"):
        runs.begin("01_prompt_augmentation", values(run="other"))
    locks.acquire(*locks.run_lock(fresh.with_name("other"))).close()  # what is refused holds nothing


def test_a_kernel_that_stays_open_keeps_no_finished_step(fresh):
    make_01 = fresh.parents[2] / "notebooks" / "01_prompt_augmentation.ipynb"
    for _ in range(2):  # makes it, and finds it
        execute_cells(make_01)
        step = runs.begin("01_prompt_augmentation", values())
        for place in (locks.run_lock(fresh), locks.step_lock(step.folder)):
            locks.acquire(*place).close()
    drawing = runs.begin("01_prompt_augmentation", values(count=4))
    with pytest.raises(DiffsegError, match="stop it \\(of a notebook its kernel\\)"):
        locks.acquire(*locks.run_lock(fresh))
    runs.begin("01_prompt_augmentation", values())  # the same notebook with other parameters is at that no more
    for place in (locks.run_lock(fresh), locks.step_lock(drawing.folder)):
        locks.acquire(*place).close()


def test_an_edit_while_a_step_is_at_work_is_no_result_of_either(fresh):
    step = runs.begin("01_prompt_augmentation", values())
    (step.folder / "prompts.csv").write_text("a cat\n")
    notebook = fresh.parents[2] / "notebooks" / "01_prompt_augmentation.ipynb"
    before = notebook.read_text()
    notebook.write_text(before.replace("a cat", "a dog"))
    with pytest.raises(DiffsegError, match="its notebook's cells changed while 01_prompt_augmentation was at work"):
        step.finish(["prompts.csv"])
    notebook.write_text(before)
    assert step.finish(["prompts.csv"])["key"] == step.key


def test_code_edited_since_it_was_imported_asks_for_a_new_kernel(fresh, monkeypatch):
    monkeypatch.setattr(runs, "_started", 0.0)
    with pytest.raises(DiffsegError, match="diffseg.files was edited since .* restart the kernel"):
        runs.begin("01_prompt_augmentation", values())


def test_shares_lock_a_step_together_and_keep_out_who_wants_it_alone(tmp_path):
    with locks.acquire(tmp_path / "lock", "busy", shared=True), locks.acquire(tmp_path / "lock", "busy", shared=True):
        with pytest.raises(DiffsegError, match="busy"):
            locks.acquire(tmp_path / "lock", "busy")
    with locks.acquire(tmp_path / "lock", "busy"), pytest.raises(DiffsegError, match="busy"):
        locks.acquire(tmp_path / "lock", "busy", shared=True)


# a step from inside: begin, input, finish


def test_begin_converts_the_name_space_and_links_the_step(fresh):
    namespace = values(count="4", seed=1.0, other="kept")
    step = runs.begin("01_prompt_augmentation", namespace)
    assert namespace == values(count=4, seed=1, other="kept")
    assert step.folder == fresh.parents[1] / "steps" / "01_prompt_augmentation" / step.key and step.folder.is_dir()
    assert os.readlink(fresh / step.name) == f"../../steps/{step.name}/{step.key}"
    assert step.parameters["count"] == 4 and not step.resumed and not step.finished
    with pytest.raises(DiffsegError, match="misses the parameter count"):
        runs.begin("01_prompt_augmentation", {"run": "tiny", "out": "", "seed": 0})


def test_a_step_keeps_its_files_while_its_key_is_the_same_and_another_key_is_another_folder(fresh, monkeypatch):
    step = runs.begin("01_prompt_augmentation", values())
    (step.folder / "part").mkdir()
    (step.folder / "part" / "a.txt").write_text("a")
    (step.folder / "part" / ".b.123.tmp.txt").write_text("half")
    monkeypatch.setenv(processes.SHARD, "1/2")
    runs.begin("01_prompt_augmentation", values())
    assert len(list((step.folder / "part").iterdir())) == 2  # another share may be writing it
    monkeypatch.delenv(processes.SHARD)
    again = runs.begin("01_prompt_augmentation", values())
    assert again.resumed and again.key == step.key
    assert [p.name for p in (step.folder / "part").iterdir()] == ["a.txt"]
    again.finish(["part/*"])
    whole = everything(fresh.parents[2])
    once_more = runs.begin("01_prompt_augmentation", values())
    assert once_more.finished and not once_more.resumed
    assert once_more.finish(["part/*"])["key"] == step.key
    other = runs.begin("01_prompt_augmentation", values(seed=1))
    assert other.folder != step.folder and not other.resumed and not list(other.folder.iterdir())
    assert everything(fresh.parents[2]) == whole


def test_of_two_shares_that_finish_at_once_the_second_takes_the_firsts_manifest(fresh, monkeypatch):
    first, second = (runs.begin("01_prompt_augmentation", values()) for _ in range(2))
    (first.folder / "a.txt").write_text("a")
    write = runs.write_manifest

    def interleaved(*arguments):  # the second has found no manifest; now the first writes its own
        monkeypatch.setattr(runs, "write_manifest", write)
        first.finish(["a.txt"], {"share": 1})
        return write(*arguments)

    monkeypatch.setattr(runs, "write_manifest", interleaved)
    assert second.finish(["a.txt"], {"share": 2})["metrics"] == {"share": 1}
    assert runs.read_manifest(first.folder)["metrics"] == {"share": 1}


def test_the_seconds_of_two_steps_of_a_notebook_do_not_count_twice(fresh, tmp_path, monkeypatch):
    make(tmp_path, "01_prompt_augmentation", "02_lora_tuning")
    monkeypatch.setattr(runs, "_finished", [0.0])
    drawing, step = (runs.begin(name, values_of_03()) for name in ("03_drawing", "03_synthesis"))
    for each in (drawing, step):
        each.started -= 1000  # both began before anything was drawn
        (each.folder / "a.txt").write_text("a")
    assert drawing.finish(["a.txt"])["seconds"] >= 1000 and step.finish(["a.txt"])["seconds"] < 500


def test_finish_checks_the_outputs(fresh):
    step = runs.begin("01_prompt_augmentation", values())
    (step.folder / "a.txt").write_text("a")
    (step.folder / "empty.txt").write_text("")
    (step.folder / "link.txt").symlink_to(REPOSITORY / "README.md")
    for outputs, sentence in [
        (["b.txt"], "has not written it"),
        (["*.png"], "has not written it"),
        (["a.txt", "empty.txt"], "empty file"),
        (["../a.txt"], "outside"),
        (["link.txt"], "is a link to a place outside"),
    ]:
        with pytest.raises(DiffsegError, match=sentence):
            step.finish(outputs)
        assert runs.read_manifest(step.folder) is None
    (step.folder / "resume.pt").write_text("dropped in the end")
    metrics = {"iou": np.float32(0.5), "list": np.array([1.0, np.nan]), "path": Path("a"), "n": 3, "ok": True}
    step.finish([step.folder / "a.txt"], metrics, drop=["*.pt"])
    manifest = runs.read_manifest(step.folder)
    assert manifest["metrics"] == {"iou": 0.5, "list": [1.0, None], "path": "a", "n": 3, "ok": True}
    assert manifest["outputs"]["count"] == 1 and not (step.folder / "resume.pt").exists()
    listing = (step.folder / "outputs.csv").read_text().splitlines()
    assert len(listing) == 2 and listing[1].startswith("a.txt,1,") and sha256_file(step.folder / "a.txt") in listing[1]


def test_an_unreadable_manifest_is_an_error_that_names_it_and_deletes_nothing(project, capsys):
    folder = (project / "03_drawing").resolve()
    before = everything(project.parents[2])
    for name, text in [("manifest.json", ""), ("manifest.json", '{"key": '), ("manifest.json", "[1]"),
                       ("manifest.json", "{}"), ("outputs.csv", ""), ("outputs.csv", "n\n../x,1,1,0\n")]:  # fmt: skip
        kept = (folder / name).read_bytes()
        (folder / name).write_text(text)
        os.utime(folder / name, ns=(0, before[str((folder / name).relative_to(project.parents[2]))][1]))
        assert main(["run", "tiny"]) == 1
        assert str(folder / name) in capsys.readouterr().err
        with pytest.raises(DiffsegError, match=re.escape(str(folder / name))):
            execute_cells(project.parents[2] / "notebooks" / "03_synthesis.ipynb", rate=1e-4)
        assert len(images_in(project)) == 20
        (folder / name).write_bytes(kept)
        os.utime(folder / name, ns=(0, before[str((folder / name).relative_to(project.parents[2]))][1]))
        release()
    assert everything(project.parents[2]) == before


def test_inputs_are_outputs_of_upstream_steps(project):
    names = {"run": "tiny", "out": "", "seed": 0, "images": 20, "sizes": [8, 8], "beta": 0.2, "workers": 0}
    step = runs.begin("03_drawing", names)
    assert step.input("02_lora_tuning") == (project / "02_lora_tuning").resolve()
    manifest = runs.read_manifest(project / "02_lora_tuning")
    assert step.inputs == {"02_lora_tuning": {"key": manifest["key"], "sha256": manifest["outputs"]["sha256"]}}
    for name, file, sentence in [
        ("01_prompt_augmentation", "words.csv", "has no output words.csv"),
        ("04_robust_training", ".", "does not stand on"),
    ]:
        with pytest.raises(DiffsegError, match=sentence):
            step.input(name, file)
    (project / "01_prompt_augmentation" / "prompts.csv").write_text("other")
    step.inputs.clear()
    with pytest.raises(DiffsegError, match="was altered since its step finished"):
        step.input("01_prompt_augmentation", "prompts.csv")


# whole runs


def test_a_finished_run_has_small_manifests(project):
    manifest = json.loads((project / "03_drawing" / "manifest.json").read_text())
    assert list(manifest) == [
        *("step", "run", "key", "parameters", "recipe", "versions", "git", "hardware", "started", "seconds", "resumed"),
        *("inputs", "metrics", "outputs"),
    ]
    assert manifest["parameters"]["images"] == 20 and manifest["recipe"]["parameters"] == {
        "images": 20,
        "sizes": [8, 8],
    }
    assert manifest["versions"]["papermill"] and manifest["git"] is None and manifest["hardware"]["cores"] >= 1
    assert manifest["started"].endswith("+00:00") and not manifest["resumed"]
    assert manifest["outputs"]["count"] == 20 and set(manifest["inputs"]) == {"01_prompt_augmentation"}
    assert runs.read_manifest(project / "02_lora_tuning")["parameters"]["rate"] == 1e-4
    executed = nbformat.read(project / "notebooks" / "03_synthesis.ipynb", 4)
    assert executed.cells[-1].execution_count


def test_opening_a_finished_run_and_running_all_cells_changes_nothing(project):
    before = everything(project.parents[2])
    for step in CELLS:
        execute_cells(project.parents[2] / "notebooks" / f"{step}.ipynb", **({"rate": 1e-4} if "02" in step else {}))
    after = everything(project.parents[2])
    assert {name for name in before if after[name] != before[name]} == {"results/runs/tiny/kernel.pid"}
    assert len((project / "made.txt").read_text().split()) == 20


def test_what_is_up_to_date_is_skipped_even_in_another_place(project, capsys):
    assert main(["run", "tiny"]) == 0
    assert capsys.readouterr().out.count("up to date") == 3
    assert main(["run", "tiny", "--only", "2-3", "--set", "rate=1.0e-4", "--verify"]) == 0
    assert capsys.readouterr().out.count("up to date") == 3  # 01 is looked at, too
    assert main(["run", "tiny", "--only", "3", "--set", "count=9"]) == 1
    assert "run 01_prompt_augmentation first, with --only 1: it is not finished" in capsys.readouterr().err
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "three tiny steps" in listed and listed.count("done, ") == 4 and listed.count("absent") == 3


def test_a_file_may_have_the_longest_name_that_is_allowed(tmp_path):
    path = tmp_path / f"{'é' * 125}.png"  # 254 bytes
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"image")
    assert os.listdir(tmp_path) == [path.name]


def test_a_linked_results_folder_is_up_to_date_too(project, tmp_path, capsys):
    (tmp_path / "linked").symlink_to(project.parents[1])
    for _ in range(2):
        assert main(["run", "tiny", "--out", str(tmp_path / "linked")]) == 0
    assert capsys.readouterr().out.count("up to date") == 6


def test_a_changed_parameter_makes_other_steps_and_leaves_the_old_ones(project, capsys):
    before, old = everything(project.parents[2]), linked_keys(project)
    assert main(["run", "tiny", "--set", "rate=0.25"]) == 0
    said = capsys.readouterr().out
    assert "01_prompt_augmentation: 1 of 3, up to date" in said
    assert "02_lora_tuning: 2 of 3, anew because rate changed" in said and "03_synthesis: 3 of 3, done" in said
    assert len((project / "made.txt").read_text().split()) == 40
    new = linked_keys(project)
    assert [step for step in new if new[step] != old[step]] == ["02_lora_tuning", "03_drawing", "03_synthesis"]
    kept = {name: found for name, found in everything(project.parents[2]).items() if "/steps/" in name}
    assert all(kept[name] == found for name, found in before.items() if "/steps/" in name)
    made = (project / "made.txt").read_text()
    assert main(["run", "tiny"]) == 0  # back: all of it is still there
    assert linked_keys(project) == old and (project / "made.txt").read_text() == made
    # the run's own figures and notebooks are those of its present steps again
    assert capsys.readouterr().out.count("done in") == 2
    executed = json.loads((project / "notebooks" / "02_lora_tuning.ipynb").read_text())
    assert executed["metadata"]["papermill"]["parameters"]["rate"] == 1.0e-4


def test_another_beta_cuts_anew_and_draws_nothing(project, capsys):
    assert main(["run", "tiny", "--set", "beta=0.4"]) == 0
    assert "anew because beta changed" in capsys.readouterr().out
    assert len((project / "made.txt").read_text().split()) == 20
    assert (project / "03_synthesis" / "SegmentationClass" / "00.png").read_text().endswith("0.4")


def test_a_run_shares_what_another_has_made(project, capsys):
    assert main(["run", "tiny", "--set", "run=study/other", "images=3"]) == 0
    said = capsys.readouterr().out
    assert said.count("shared with tiny") == 2 and "03_synthesis: 3 of 3, done" in said
    other = project.parent / "study" / "other"
    assert (other / "01_prompt_augmentation").resolve() == (project / "01_prompt_augmentation").resolve()
    assert len(images_in(other)) == 3 and len(images_in(project)) == 20


def test_force_executes_the_notebooks_again_and_makes_nothing_anew(project, capsys):
    before = everything(project.parents[2])
    assert main(["run", "tiny", "--force"]) == 0
    assert capsys.readouterr().out.count("done in") == 3
    after = everything(project.parents[2])
    changed = {name for name in before if after[name] != before[name]}
    assert changed and all("/notebooks/" in name or "kernel.pid" in name for name in changed)
    assert len((project / "made.txt").read_text().split()) == 20


def test_a_notebook_that_was_killed_after_its_step_is_executed_again(project, capsys):
    """Its figures are missing, or half; and of a job array's shares nobody has drawn any."""
    executed = project / "notebooks" / "03_synthesis.ipynb"
    whole = executed.read_text()
    ended = json.loads(whole)
    del ended["metadata"]["diffseg"]
    for killed in (whole[:100], json.dumps(ended), None):
        executed.rename(executed.with_stem("03_synthesis.1-of-2")) if killed is None else executed.write_text(killed)
        assert main(["run", "tiny"]) == 0
        said = capsys.readouterr().out
        assert said.count("up to date") == 2 and "03_synthesis: 3 of 3, done in" in said
    assert len((project / "made.txt").read_text().split()) == 20


def test_figures_of_a_step_that_a_notebook_has_linked_since_are_drawn_again(project, capsys):
    make(project.parents[2], "03_synthesis", beta=0.7)  # in Jupyter: another step for the same run
    assert main(["run", "tiny"]) == 0
    assert "03_synthesis: 3 of 3, done in" in capsys.readouterr().out


def test_only_runs_are_listed(project, capsys):
    assert main(["run", "tiny", "--set", "run=study/other", "images=3"]) == 0
    (project.parent / "ladder" / "tiny").mkdir(parents=True)
    capsys.readouterr()
    assert main(["list"]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("/")]
    assert listed == [str(project.parent / "study" / "other"), str(project)]


def test_a_missing_image_is_made_again_and_an_altered_one_is_an_error(project, capsys):
    before = hashes(project)
    path = project / "03_drawing" / "JPEGImages" / "07.jpg"
    path.unlink()
    assert main(["run", "tiny"]) == 0
    assert "again because its file JPEGImages/07.jpg is missing" in capsys.readouterr().out
    assert hashes(project) == before and (project / "made.txt").read_text().split()[20:] == ["7"]
    path.write_text("damaged")
    assert main(["run", "tiny"]) == 1
    assert "07.jpg was altered since its step finished" in capsys.readouterr().err and path.read_text() == "damaged"
    text = (project / "03_drawing" / "JPEGImages" / "08.jpg").read_text()
    path.unlink()
    assert main(["run", "tiny"]) == 0
    stat = path.stat()
    path.write_text(text.replace(" 8 ", " 9 "))  # the same size and time: only --verify sees it
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert main(["run", "tiny"]) == 0 and main(["run", "tiny", "--verify"]) == 1


def test_a_file_counts_by_its_bytes_where_its_time_is_another_and_a_shortened_listing_is_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one")
    manifest = write_manifest(tmp_path, ["a.txt", "b.txt"], {"step": "s", "key": "k", "parameters": {}})
    os.utime(tmp_path / "a.txt", ns=(0, 1))  # a copy
    assert damage(tmp_path, manifest) == ([], [])
    (tmp_path / "a.txt").write_text("two")  # as many bytes
    os.utime(tmp_path / "a.txt", ns=(0, 2))
    assert damage(tmp_path, manifest) == ([], ["a.txt"])
    listing = tmp_path / "outputs.csv"
    listing.write_text("".join(listing.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DiffsegError, match="is not the listing of its manifest"):
        read_listing(tmp_path, manifest)


def test_a_file_of_a_finished_step_is_not_replaced(project):
    path = project / "02_lora_tuning" / "lora.txt"
    with pytest.warns(match="is finished and keeps its files"), atomic_path(path.resolve()) as temporary:
        temporary.write_text("another rate")
    assert path.read_text() == "0.0001" and len(list(path.parent.iterdir())) == 3


def test_a_failing_cell_is_one_sentence(project, capsys):
    assert main(["run", "tiny", "--set", "fail=true"]) == 1
    error = capsys.readouterr().err
    executed = project / "notebooks" / "01_prompt_augmentation.ipynb"
    assert f"ValueError: the second line of an error (executed notebook: {executed})." in error
    assert runs.read_manifest(project / "01_prompt_augmentation") is None and executed.is_file()
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count("unfinished") == 1


def test_a_step_that_does_not_finish_a_full_disk_and_a_dead_kernel(fresh, capsys):
    notebook = Path(os.environ["DIFFSEG_ROOT"]) / "notebooks" / "01_prompt_augmentation.ipynb"
    write_notebook(notebook, SHARED, "print('no finish')")
    with pytest.raises(DiffsegError, match="ended but it is not finished"):
        batch.run("tiny", only="1")
    assert "no finish" in capsys.readouterr().out
    write_notebook(notebook, SHARED, "import errno, os\nraise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))")
    with pytest.raises(DiffsegError, match="the disk of .* is full; free some space, and the same command continues"):
        batch.run("tiny", only="1")
    write_notebook(notebook, SHARED, "import os\nos._exit(1)")
    with pytest.raises(DiffsegError, match="its kernel died.*the same command continues"):
        kernel.execute(notebook, fresh / "x" / "notebook.ipynb", {"run": "tiny"}, fresh)


@pytest.mark.slow
def test_interrupted_terminated_and_killed_runs_continue_with_the_same_bytes(project):
    expected = hashes(project)
    for step in ("03_drawing", "03_synthesis"):
        shutil.rmtree((project / step).resolve())
    (project / "made.txt").unlink()
    made_at = {}
    for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]:
        count = len(images_in(project))
        (project / "kernel.pid").unlink()
        runner = subprocess.Popen(
            [sys.executable, "-m", "diffseg", "run", "tiny"],
            cwd=REPOSITORY,
            env={**os.environ, "PAUSE": "0.3"},
            stderr=subprocess.PIPE,
            text=True,
            # what a shell starts in the background ignores Ctrl-C, and its children would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        wait_until(lambda: len(images_in(project)) >= count + 3)  # noqa: B023
        runner.send_signal(number)
        _, error = runner.communicate(timeout=60)
        assert runner.returncode == code
        assert number == signal.SIGKILL or "the same command continues" in error
        wait_until(lambda: not alive(int((project / "kernel.pid").read_text())))
        assert 0 < len(images_in(project)) < 20 and runs.read_manifest(project / "03_drawing") is None
        for path in images_in(project):
            assert made_at.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    batch.run("tiny")
    assert hashes(project) == expected
    assert (project / "made.txt").read_text().split() == [str(i) for i in range(20)]
    assert runs.read_manifest(project / "03_drawing")["resumed"]


def test_papermill_and_jupyter_from_other_folders_make_the_same(project, tmp_path, monkeypatch):
    expected = hashes(project), linked_keys(project)
    notebook, parameters = tmp_path / "notebooks" / "03_synthesis.ipynb", tmp_path / "notebooks/params/tiny.yaml"
    (tmp_path / "elsewhere").mkdir()
    for step in ("03_drawing", "03_synthesis"):
        shutil.rmtree((project / step).resolve())
    command = [sys.executable, "-m", "papermill", notebook, "out.ipynb", "-f", parameters, "--no-progress-bar"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, check=True, capture_output=True)
    assert (hashes(project), linked_keys(project)) == expected
    for step in ("03_drawing", "03_synthesis"):
        shutil.rmtree((project / step).resolve())
    monkeypatch.chdir(notebook.parent)  # as JupyterLab runs it, cell by cell
    execute_cells(notebook)
    assert (hashes(project), linked_keys(project)) == expected


def test_steps_that_do_not_belong_together_are_not_mixed(project):
    """Other images are linked, while step 4 stands on the earlier ones."""
    last = "04_robust_training"
    place = project.parents[1] / "steps" / last / "k"
    place.mkdir(parents=True)
    (place / "a.txt").write_text("made from others")
    made = runs.read_manifest(project / "03_synthesis") | {"recipe": {"upstream": {"03_synthesis": "other"}}}
    runs.write_manifest(place, ["a.txt"], made)
    runs.link(project / last, place)
    assert runs.mixture(project, ["03_synthesis"]) == ""
    assert runs.mixture(project, STEPS).startswith(f"{last} in {project} was made from another 03_synthesis")


def test_a_notebook_is_not_begun_on_steps_of_different_images(fresh, tmp_path):
    make(tmp_path, *CELLS)
    make(tmp_path, "02_lora_tuning", rate=0.25)
    with pytest.raises(DiffsegError, match="03_drawing in .* was made from another 02_lora_tuning than the present"):
        runs.begin("03_synthesis", values_of_03())


def test_a_whole_number_in_the_parameters_cell_is_the_number_that_the_kernel_takes(project, capsys):
    notebook = project.parents[2] / "notebooks" / "03_synthesis.ipynb"
    notebook.write_text(notebook.read_text().replace("beta = 0.2", "beta = 0"))
    assert main(["run", "tiny"]) == 0, capsys.readouterr().err
    assert repr(runs.read_manifest(project / "03_synthesis")["parameters"]["beta"]) == "0.0"


def test_a_full_disk_and_an_unknown_home_end_in_a_sentence(project, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device", "results/x")

    monkeypatch.setattr(batch, "link", full)
    assert main(["run", "tiny"]) == 1
    assert capsys.readouterr().err == "diffseg: results/x: No space left on device.\n"
    assert main(["run", "tiny", "--out", "~nobody-here/x"]) == 1
    assert "~nobody-here/x names the home of a user who is not here" in capsys.readouterr().err


# cleaning


def test_clean_lists_what_no_run_refers_to_and_removes_it_when_told(project, tmp_path, capsys, monkeypatch):
    assert main(["clean"]) == 0
    assert "belongs to a run" in capsys.readouterr().out
    old = linked_keys(project)
    assert main(["run", "tiny", "--set", "beta=0.4"]) == 0
    unused = project.parents[1] / "steps" / "03_synthesis" / old["03_synthesis"]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    assert main(["clean"]) == 1 and unused.is_dir()
    said = capsys.readouterr()
    assert f"MB  steps/03_synthesis/{old['03_synthesis']}" in said.out and said.out.count("MB") == 1
    assert "give --yes" in said.err
    monkeypatch.chdir(tmp_path / "notebooks")  # as with `diffseg run`, --out is relative to the working directory
    assert main(["clean", "--out", "../results"]) == 1 and str(unused.name) in capsys.readouterr().out
    capsys.readouterr()
    with locks.acquire(*locks.step_lock(unused)):
        assert cleaning.clean(agreed=True) == [] and "another process is making" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: main(["run", "tiny"]) or "y")  # meanwhile a run takes it up
    new = linked_keys(project)
    assert [folder.name for folder in cleaning.clean()] == [] and unused.is_dir()
    assert main(["run", "tiny", "--set", "beta=0.4"]) == 0 and linked_keys(project) == new
    assert main(["clean", "--yes"]) == 0 and not unused.exists()
    assert (project / "03_synthesis").exists() and len(images_in(project)) == 20
    shutil.rmtree(project)
    assert main(["clean", "--yes"]) == 0 and not list((project.parents[1] / "steps").glob("*/[0-9a-f]*"))


def test_clean_keeps_a_studys_steps_and_what_they_were_made_from(fresh, tmp_path):
    make(tmp_path, *CELLS, run="study/one")
    run = fresh.parent / "study" / "one"
    made = [(run / step).resolve() for step in linked_keys(run)]
    for step in ("01_prompt_augmentation", "02_lora_tuning", "03_drawing"):
        (run / step).unlink()  # as when the run goes on with others of these
    assert cleaning.clean(agreed=True) == []
    assert len(made) == 4 and all((folder / "manifest.json").is_file() for folder in made)


def test_clean_removes_nothing_without_a_yes(fresh, tmp_path, monkeypatch):
    make(tmp_path, "02_lora_tuning", rate=0.5)
    unused = (fresh / "02_lora_tuning").resolve()
    make(tmp_path, "02_lora_tuning", rate=0.25)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    for answer in ("", "n", "no", "yesterday"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert cleaning.clean() == [] and (unused / "manifest.json").is_file(), answer
    monkeypatch.setattr("builtins.input", lambda question: " Y ")
    assert cleaning.clean() == [unused] and not unused.exists()


def test_a_folder_of_an_older_version_in_a_links_place_is_left_alone(fresh, capsys):
    (fresh / "01_prompt_augmentation").mkdir(parents=True)
    (fresh / "01_prompt_augmentation" / "prompts.csv").write_text("of 0.2")
    assert main(["run", "tiny"]) == 1
    assert "is a folder, where a link belongs" in capsys.readouterr().err
    assert (fresh / "01_prompt_augmentation" / "prompts.csv").read_text() == "of 0.2"


def test_the_command_line_needs_no_torch():
    code = "import sys, diffseg.lab.cli; assert not {'torch', 'papermill'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_keys_of_a_project_do_not_depend_on_where_it_lies(project):
    manifest = runs.read_manifest(project / "03_drawing")
    assert step_key("03_drawing", manifest["parameters"], linked_keys(project)) == manifest["key"]


def test_what_fails_leaves_neither_a_file_nor_a_half(tmp_path):
    path = tmp_path / "a.txt"
    for before in ("", "whole"):
        if before:
            path.write_text(before)
        with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
        assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_what_resumes_a_step_is_dropped_after_its_manifest(fresh, monkeypatch):
    step = runs.begin("01_prompt_augmentation", values())
    for name in ("a.txt", "resume.pt"):
        (step.folder / name).write_text("x")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_manifest", full)
    with pytest.raises(DiffsegError, match="cannot write to"):
        step.finish(["a.txt"], drop=["*.pt"])
    assert (step.folder / "resume.pt").is_file()


def test_the_manifest_is_the_last_file_and_both_are_on_the_disk(tmp_path, monkeypatch):
    synced, sync = [], files.sync
    monkeypatch.setattr("diffseg.files.sync", lambda path: synced.append(path) or sync(path))
    (tmp_path / "a.txt").write_text("a")
    write_manifest(tmp_path, ["a.txt"], {"step": "s", "key": "k", "parameters": {}})
    assert [path.suffix for path in synced if path != tmp_path] == [".csv", ".json"]
