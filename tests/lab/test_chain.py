"""The seven notebooks with tiny numbers on the shipped mini world: from words to a table, cut and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffseg.files import sha256_file
from diffseg.lab.kernel import execute
from diffseg.lab.manifests import STEPS, altered, read_manifest
from diffseg.lab.runs import run
from diffseg.paths import project_root

SET = ["sampling_steps=3", "images=24", "synthesis_batch=4"]


def diffseg(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "diffseg", "run", "smoke", "--out", str(out), "--set", *SET, *arguments]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run's folder and what was printed."""
    out = tmp_path_factory.mktemp("chain")
    done = subprocess.run(diffseg(out), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "smoke", done.stdout


def test_the_chain_ends_with_a_table_and_a_summary(finished):
    folder, printed = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == 24 and summary["validation_images"] >= 500
    assert 0 < summary["miou"] < 1 and summary["ratio"] == pytest.approx(summary["miou"] / summary["miou_real"])
    assert list(summary["seconds"]) == list(STEPS)[:5]
    table = (folder / "06_report" / "table.txt").read_text()
    assert printed.count(table.strip()) == 1 and f"{100 * summary['miou']:.1f}" in table
    assert "overview.png" in printed and str(folder / "summary.json") in printed


def test_every_step_has_a_manifest_of_what_it_made(finished):
    folder, _ = finished
    for step in STEPS:
        manifest = read_manifest(folder / step)
        assert not altered(folder / step, manifest) and manifest["versions"]["torch"]
        for name, fingerprint in manifest["inputs"].items():
            assert sha256_file(folder / name) == fingerprint
    assert json.loads((folder / "02_lora_tuning" / "tuning.json").read_text())["tuned"] is False


def test_a_second_run_has_nothing_to_do(finished, capsys):
    folder, _ = finished
    values = {"sampling_steps": 3, "images": 24, "synthesis_batch": 4}
    run("smoke", set=values, out=str(folder.parent))
    assert capsys.readouterr().out.count("up to date") == len(STEPS)


def test_a_killed_synthesis_goes_on_to_the_same_bytes(finished, tmp_path):
    """SIGKILL to runner and kernel in the middle of the pictures, then the same command again."""
    undisturbed = finished[0] / "03_synthesis"
    pictures = tmp_path / "smoke" / "03_synthesis" / "JPEGImages"
    process = subprocess.Popen(diffseg(tmp_path, "--only", "1-3"), stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(list(pictures.glob("[0-9]*.jpg"))) < 5:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # a kernel notices within a second that its runner is gone
    made = len(list(pictures.glob("[0-9]*.jpg")))
    assert 5 <= made < 24 and read_manifest(pictures.parent) is None
    subprocess.run(diffseg(tmp_path, "--only", "1-3"), check=True, capture_output=True)
    again, whole = read_manifest(pictures.parent), read_manifest(undisturbed)
    assert again["resumed"] and not whole["resumed"]
    names = [name for name in whole["outputs"] if "/" in name]
    assert len(names) == 3 * 24 + 1
    assert {name: again["outputs"][name] for name in names} == {name: whole["outputs"][name] for name in names}


def test_the_notebook_of_the_mini_world_runs(tmp_path):
    notebook = project_root() / "notebooks" / "00_mini_world.ipynb"
    execute(notebook, tmp_path / "executed.ipynb", {"out": str(tmp_path), "sampling_steps": 2}, tmp_path)
    outputs = read_manifest(tmp_path / "mini-world" / "00_mini_world")["outputs"]
    assert {"scenes.png", "contact_sheet.png", "drawn.png", "training.png", "words.png"} <= outputs.keys()
