"""One run in several processes: who does what, who writes what, and the same bytes as of one process."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg import lora
from diffseg.errors import DiffsegError
from diffseg.lab import manifests as manifest
from diffseg.lab import processes
from diffseg.lab.cli import main
from diffseg.lab.manifests import STEPS, notebook_path, read_manifest
from diffseg.lab.parameters import read_cells
from diffseg.synthesis import batches

DIVIDED = re.compile(r"\b(synthesise|train|train_network|tune|evaluate)\(")  # what several processes do together


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 8))
def test_each_batch_is_one_processs(rows, batch_size, count):
    shares = [list(batches(rows, batch_size, process, count)) for process in range(count)]
    assert sorted(start for share in shares for start in share) == list(batches(rows, batch_size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("step", STEPS)
def test_the_others_leave_after_the_last_cell_that_divides_its_work(step):
    cells = [cell for cell in read_cells(notebook_path(step)) if cell["cell_type"] == "code"]
    dividing = [cell["id"] for cell in cells if DIVIDED.search(cell["source"].replace("def train_network(", ""))]
    if step not in processes.TOGETHER:
        assert not dividing
        return
    last, _ = processes.TOGETHER[step]
    assert dividing[-1] == last
    kept = processes.first_cells(notebook_path(step))["cells"]
    assert kept[-1]["id"] == last and "step.finish" not in json.dumps(kept)


def test_a_notebook_without_its_last_cell_is_one_sentence(tmp_path):
    path = tmp_path / "03_synthesis.ipynb"
    path.write_text(json.dumps({"cells": [{"id": "begin"}]}))
    with pytest.raises(DiffsegError, match="has no cell 'all'"):
        processes.first_cells(path)


def test_tuning_shares_the_files_that_it_goes_on_from():
    assert {lora.CHECKPOINT, lora.LOSSES, lora.WEIGHTS} <= set(processes.TOGETHER["02_lora_tuning"][1])


def test_only_what_is_shared_reaches_the_steps_folder(tmp_path, second_of_two):
    folder = tmp_path / "02_lora_tuning"
    (folder / "candidates" / "000100").mkdir(parents=True)
    (folder / "candidates" / "000100" / lora.WEIGHTS).write_text("an earlier candidate")
    own = processes.own_folder(folder)
    assert (own / "candidates" / "000100" / lora.WEIGHTS).read_text() == "an earlier candidate"
    assert not (own / lora.CHECKPOINT).is_file()
    (folder / lora.CHECKPOINT).write_text("written by the main process later")
    assert (own / lora.CHECKPOINT).is_file()
    (own / "figure.png").write_text("mine")
    assert not (folder / "figure.png").exists()
    (tmp_path / "03_synthesis").mkdir()
    pictures = processes.own_folder(tmp_path / "03_synthesis") / "JPEGImages"
    (pictures / "000000.jpg").write_text("ours")
    assert (tmp_path / "03_synthesis" / "JPEGImages" / "000000.jpg").read_text() == "ours"
    assert processes.own_folder(folder) == own and not (own / "figure.png").exists()
    assert (folder / lora.CHECKPOINT).is_file()


def test_the_manifest_says_how_many_processes(monkeypatch, second_of_two):
    assert processes.rank() == 1 and manifest.hardware()["processes"] == 2
    monkeypatch.delenv("LOCAL_RANK")  # WORLD_SIZE alone may be anybody's
    assert processes.rank() == 0 and manifest.hardware()["processes"] == 1


def test_a_command_that_is_one_process_says_so(capsys, second_of_two):
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "diffseg: diffseg list is one process; start it without a launcher.\n"


SET = ["sampling_steps=2", "images=10", "synthesis_batch=2", "iterations=3", "training_mode=cotrain"]
COMMAND = ["-m", "diffseg", "run", "smoke", "--set", *SET, "--out"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *COMMAND]
ALONE = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # other threads, other last bits


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the first three steps, made by one process."""
    out = tmp_path_factory.mktemp("one")
    done = subprocess.run([sys.executable, *COMMAND, out, "--only", "1-3"], env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "smoke"


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one_and_a_network(one, tmp_path):
    """Gloo on the CPU: pictures, masks, reliability and index are those of one process; training and evaluation run."""
    two = tmp_path / "smoke"
    for step in ("01_prompt_augmentation", "02_lora_tuning"):
        shutil.copytree(one / step, two / step)
    done = subprocess.run([*TWO, tmp_path, "--only", "1-5"], env=ALONE, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("up to date") == 2 and done.stdout.count(", done in") == 3
    made = {step: read_manifest(two / step) for step in list(STEPS)[2:5]}
    assert {step: found["hardware"]["processes"] for step, found in made.items()} == dict.fromkeys(made, 2)
    whole = read_manifest(one / "03_synthesis")
    assert whole["hardware"]["processes"] == 1
    names = [name for name in whole["outputs"] if not name.endswith(".pdf")]  # a PDF holds its date
    assert len(names) == 3 * 10 + 4
    assert {name: made["03_synthesis"]["outputs"][name] for name in names} == {n: whole["outputs"][n] for n in names}
    assert made["03_synthesis"]["key"] == whole["key"]
    assert made["04_robust_training"]["metrics"]["networks"] == 2
    assert made["05_evaluation"]["metrics"]["synthetic"]["images"] >= 500
    assert not (two / processes.SCRATCH).exists()


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_a_sentence(one, tmp_path):
    two = tmp_path / "smoke"
    for step in ("01_prompt_augmentation", "02_lora_tuning"):
        shutil.copytree(one / step, two / step)
    (two / processes.SCRATCH).write_text("a file in the place of the second process's folder")
    done = subprocess.run([*TWO, tmp_path, "--only", "3"], env=ALONE, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("diffseg: process 1 cannot write to") == 1
    assert read_manifest(two / "03_synthesis") is None
