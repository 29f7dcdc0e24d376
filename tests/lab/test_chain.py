"""The notebooks with tiny numbers on the mini world: from words to a table, killed and resumed, opened again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
from helpers import release

from diffseg.files import sha256_file
from diffseg.lab.batch import run, step_notebooks, step_parameters
from diffseg.lab.kernel import execute
from diffseg.lab.manifests import damage, read_listing, read_manifest
from diffseg.lab.parameters import is_parameters, read_cells
from diffseg.lab.steps import STEPS
from diffseg.paths import project_root

SOLUTIONS = sorted((project_root() / "notebooks" / "solutions").glob("*.ipynb"))
SMALL = {"count": 2, "images": 8, "iterations": 2, "scored": 8, "steps": 2}  # parameters of the solutions
CHANGES = {"sampling_steps": 3, "images": 24, "synthesis_batch": 4}


def diffseg(out: Path, *arguments: str) -> list[str]:
    changes = [f"{name}={value}" for name, value in CHANGES.items()]
    return [sys.executable, "-m", "diffseg", "run", "smoke", "--out", str(out), "--set", *changes, *arguments]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run's folder and what was printed."""
    out = tmp_path_factory.mktemp("chain")
    done = subprocess.run(diffseg(out), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "runs" / "smoke", done.stdout


def test_the_chain_ends_with_a_table_and_a_summary(finished):
    folder, printed = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == 24 and summary["validation_images"] >= 500
    assert 0 < summary["miou"] < 1 and summary["ratio"] == pytest.approx(summary["miou"] / summary["miou_real"])
    assert list(summary["seconds"]) == list(STEPS)[:6]
    table = (folder / "06_report" / "table.txt").read_text()
    assert printed.count(table.strip()) == 1 and f"{100 * summary['miou']:.1f}" in table
    assert "06_overview.png" in printed and str(folder / "summary.json") in printed


def test_every_step_has_a_manifest_of_what_it_made(finished):
    folder, _ = finished
    for step in STEPS:
        manifest = read_manifest(folder / step)
        assert damage(folder / step, manifest, verify=True) == ([], []) and manifest["versions"]["torch"]
        for name, read in manifest["inputs"].items():
            assert read == {
                "key": (folder / name).resolve().name,
                "sha256": read_manifest(folder / name)["outputs"]["sha256"],
            }
    assert json.loads((folder / "02_lora_tuning" / "tuning.json").read_text())["tuned"] is False
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"01_words", "03_closely", "04_losses", "05_predictions", "06_overview"} <= figures


def test_a_second_run_has_nothing_to_do_and_another_name_shares_all(finished, capsys):
    folder, _ = finished
    run("smoke", changes=CHANGES, out=str(folder.parents[1]))
    assert capsys.readouterr().out.count("up to date") == 6
    run("smoke", changes=CHANGES | {"run": "other"}, out=str(folder.parents[1]))
    assert capsys.readouterr().out.count("shared with smoke") == 6
    other = folder.with_name("other")
    assert (other / "summary.json").read_text() == (folder / "summary.json").read_text()


@pytest.mark.slow
def test_opening_the_finished_steps_and_running_all_cells_changes_nothing(finished, monkeypatch):
    """As in Jupyter, cell by cell in this process: nothing is trained, nothing on disk changes but locks."""
    folder, _ = finished
    root = folder.parents[1]

    def state() -> dict[str, tuple]:
        found = [p for p in root.rglob("*") if p.is_file() and "lock" not in str(p.relative_to(root))]
        return {str(p.relative_to(root)): (p.stat().st_mtime_ns, sha256_file(p)) for p in found}

    matplotlib.use("Agg")
    monkeypatch.setattr("diffseg.training.train", None)  # who calls it fails
    before = state()
    from diffseg.lab.batch import resolve

    values, _ = resolve("smoke", CHANGES, str(root))
    for notebook in step_notebooks().values():
        namespace = {"__name__": "__main__"} | step_parameters(notebook, values)
        for cell in read_cells(notebook):
            if cell["cell_type"] == "code" and not is_parameters(cell):
                exec(cell["source"], namespace)
    release()
    after = state()
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == set()


@pytest.mark.slow
def test_a_killed_synthesis_goes_on_to_the_same_bytes(finished, tmp_path):
    """SIGKILL to runner and kernel in the middle of the images, then the same command again."""
    undisturbed, run_folder = finished[0], tmp_path / "runs" / "smoke"
    for step in ("01_prompt_augmentation", "02_lora_tuning"):
        shutil.copytree(undisturbed.parents[1] / "steps" / step, tmp_path / "steps" / step)
    process = subprocess.Popen(diffseg(tmp_path, "--only", "1-3"), stdout=subprocess.DEVNULL, start_new_session=True)

    def made() -> int:
        return len(list((run_folder / "03_drawing").resolve().glob("JPEGImages/[0-9]*.jpg")))

    while process.poll() is None and made() < 5:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # a kernel notices within a second that its runner is gone
    assert 5 <= made() < 24 and read_manifest(run_folder / "03_drawing") is None
    subprocess.run(diffseg(tmp_path, "--only", "1-3"), check=True, capture_output=True)
    for step, count in (("03_drawing", 48), ("03_synthesis", 3 * 24 + 3)):
        again, whole = read_manifest(run_folder / step), read_manifest(undisturbed / step)
        assert (
            again["outputs"] == whole["outputs"] and again["outputs"]["count"] == count and again["key"] == whole["key"]
        )
        assert len(read_listing(run_folder / step, again)) == count
    assert (
        read_manifest(run_folder / "03_drawing")["resumed"] and not read_manifest(undisturbed / "03_drawing")["resumed"]
    )


@pytest.mark.slow
def test_the_notebook_of_the_mini_world_runs(tmp_path):
    notebook = project_root() / "notebooks" / "00_mini_world.ipynb"
    run_folder = tmp_path / "runs" / "mini-world"
    run_folder.mkdir(parents=True)
    execute(notebook, tmp_path / "executed.ipynb", {"out": str(tmp_path), "sampling_steps": 2}, run_folder)
    figures = {path.stem for path in (run_folder / "figures").glob("*.png")}
    assert {"00_scenes", "00_contact_sheet", "00_drawn", "00_training", "00_words"} <= figures
    assert read_manifest(run_folder / "00_mini_world")["metrics"]["development"] == 600


@pytest.mark.slow
@pytest.mark.parametrize("notebook", SOLUTIONS, ids=lambda path: path.stem)
def test_starters_and_solutions_run(finished, notebook):
    folder, _ = finished
    matplotlib.use("Agg")
    namespace = {"__name__": "__main__"}
    for cell in read_cells(notebook):
        if cell["cell_type"] == "code":
            exec(cell["source"], namespace)
        if is_parameters(cell):
            given = SMALL | {"run": folder.name, "out": str(folder.parents[1])}
            namespace |= {name: value for name, value in given.items() if name in namespace}
