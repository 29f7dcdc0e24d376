"""One run in several processes, by Accelerate or by shares: who does what, and the same bytes as of one process."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffseg.drawing import batches_of
from diffseg.errors import DiffsegError
from diffseg.lab import processes, provenance
from diffseg.lab.cli import main
from diffseg.lab.combinations import check_together
from diffseg.lab.manifests import read_listing, read_manifest
from diffseg.lab.parameters import read_cells
from diffseg.lab.steps import STEPS, notebook_of

DIVIDED = re.compile(r"\b(draw_set|cut_set|train|side_by_side|train_or_load|tune|evaluate)\(")


@pytest.fixture
def second_of_two(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 8))
def test_each_batch_is_one_processs(count, batch_size, parts):
    rows = list(range(count))
    shares = [batches_of(rows, batch_size, (part, parts)) for part in range(parts)]
    assert sorted(batch for share in shares for batch in share) == batches_of(rows, batch_size)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shards_and_ranks_together_are_one_division(monkeypatch, second_of_two):
    assert processes.share() == (1, 2)
    monkeypatch.setenv(processes.SHARD, "3/16")
    assert processes.share() == (5, 32) and processes.suffix("3/16") == ".3-of-16"
    assert provenance.hardware()["processes"] == 32
    for wrong in ("0/3", "4/3", "3", "1/1000000000", "a/b"):
        with pytest.raises(DiffsegError, match=f"--shard is '{wrong}'"):
            processes.parse_shard(wrong)


def test_a_batch_is_the_same_for_every_process_and_even_where_images_are_pasted(second_of_two):
    values = {"segmenter": "segformer-b0", "encoder_weights": "", "training_mode": "cotrain", "mixing": 0.5}
    check_together(values | {"training_batch": 8}, "x.yaml")
    check_together(values | {"training_batch": 6, "mixing": 0.0}, "x.yaml")
    for wrong, changes, right in ((6, {}, 8), (5, {"mixing": 0.0}, 6), (5, {"training_mode": "baseline"}, 6)):
        with pytest.raises(DiffsegError, match=f"be a multiple of .* Set `training_batch={right}`"):
            check_together(values | changes | {"training_batch": wrong}, "x.yaml")


@pytest.mark.parametrize("step", [step for step in STEPS if step != "03_drawing"])
def test_the_others_leave_after_the_last_cell_that_divides_its_work(step):
    cells = [cell for cell in read_cells(notebook_of(step)) if cell["cell_type"] == "code"]
    dividing = [cell["id"] for cell in cells if DIVIDED.search(cell["source"])]
    part = processes.divided(notebook_of(step))
    assert bool(part) == bool(dividing)
    if part:
        assert part["cells"][-1]["id"] == dividing[-1]
        assert step == "03_synthesis" or "step.finish" not in json.dumps(part["cells"])


def test_the_manifest_says_how_many_processes(monkeypatch, second_of_two):
    assert processes.rank() == 1 and provenance.hardware()["processes"] == 2
    monkeypatch.delenv("LOCAL_RANK")  # WORLD_SIZE alone may be anybody's
    assert processes.rank() == 0 and provenance.hardware()["processes"] == 1


def test_a_command_that_is_one_process_says_so(capsys, second_of_two):
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "diffseg: diffseg list is one process; start it without a launcher.\n"


SET = ["sampling_steps=2", "images=10", "synthesis_batch=2", "iterations=3", "training_mode=cotrain"]
COMMAND = ["-m", "diffseg", "run", "smoke", "--set", *SET, "--out"]
ALONE = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # other threads, other last bits


def launcher(*how: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *how, *COMMAND]


TWO = launcher("--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the first three notebooks' steps, made by one process."""
    out = tmp_path_factory.mktemp("one")
    done = subprocess.run([sys.executable, *COMMAND, out, "--only", "1-3"], env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def copy_first_steps(one: Path, out: Path) -> Path:
    """Copy steps 1 and 2 with the run's links to them, and return the run's folder."""
    for step in ("01_prompt_augmentation", "02_lora_tuning"):
        shutil.copytree(one / "steps" / step, out / "steps" / step)
    shutil.copytree(one / "runs", out / "runs", symlinks=True)
    for step in ("03_drawing", "03_synthesis"):
        (out / "runs" / "smoke" / step).unlink()
    return out / "runs" / "smoke"


def files(folder: Path) -> dict[str, str]:
    return {name: sha for name, (_, _, sha) in read_listing(folder, read_manifest(folder)).items()}


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one_and_a_network(one, tmp_path):
    """Gloo on the CPU: images, masks, reliability and index are those of one process; training and evaluation run."""
    run = copy_first_steps(one, tmp_path)
    done = subprocess.run([*TWO, tmp_path, "--only", "1-5"], env=ALONE, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("up to date") == 2 and done.stdout.count(", done in") == 3
    made = {step: read_manifest(run / step) for step in list(STEPS)[2:6]}
    assert {step: found["hardware"]["processes"] for step, found in made.items()} == dict.fromkeys(made, 2)
    for step, count in (("03_drawing", 20), ("03_synthesis", 3 * 10 + 3)):
        assert len(files(run / step)) == count
        assert files(run / step) == files(one / "runs" / "smoke" / step)
        assert made[step]["key"] == read_manifest(one / "runs" / "smoke" / step)["key"]
    assert made["04_robust_training"]["metrics"]["networks"] == 2
    assert made["05_evaluation"]["metrics"]["synthetic"]["images"] >= 500
    assert not list(run.glob("notebooks/*rank*"))


@pytest.mark.slow
def test_two_machines_of_two_processes_make_the_bytes_of_one(one, tmp_path):
    """Two launchers on loopback, as on two machines with a common disk."""
    run = copy_first_steps(one, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = ["--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    machines = [
        subprocess.Popen([*launcher(*both, f"--node_rank={k}"), tmp_path, "--only", "3"], env=ALONE,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for k in range(2)
    ]  # fmt: skip
    said = [machine.communicate(timeout=600) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    for step in ("03_drawing", "03_synthesis"):
        assert files(run / step) == files(one / "runs" / "smoke" / step)
    assert read_manifest(run / "03_synthesis")["hardware"]["processes"] == 4


@pytest.mark.slow
def test_a_job_array_with_a_killed_share_makes_the_bytes_of_one(one, tmp_path):
    """Three shares with no barrier; the second is killed and given again, and the last to end finishes the step."""
    run = copy_first_steps(one, tmp_path)

    def share(k: int) -> subprocess.Popen:
        command = [sys.executable, *COMMAND, tmp_path, "--only", "3", "--shard", f"{k}/3"]
        return subprocess.Popen(command, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first, second = share(1), share(2)
    drawn = (run.parents[1] / "steps" / "03_drawing").glob
    while second.poll() is None and not list(drawn("*/JPEGImages/00000[23].jpg")):
        pass
    second.kill()
    out, error = first.communicate(timeout=300)
    assert first.returncode == 0, error[-2000:]
    assert "share 1/3 is done" in out and "masks are not made yet" in out
    assert not (run / "03_synthesis" / "manifest.json").exists()
    last = [share(3), share(2)]
    said = [process.communicate(timeout=300) for process in last]
    assert [process.returncode for process in last] == [0, 0], said
    assert any("done in" in out for out, _ in said)
    for step in ("03_drawing", "03_synthesis"):
        assert files(run / step) == files(one / "runs" / "smoke" / step)
    again = subprocess.run(
        [sys.executable, *COMMAND, tmp_path, "--only", "1-3"], env=ALONE, capture_output=True, text=True
    )
    assert again.stdout.count("up to date") == 3, again.stderr


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_a_sentence(one, tmp_path):
    run = copy_first_steps(one, tmp_path)
    (run / "notebooks" / "03_synthesis.rank-1.ipynb").mkdir()  # in the place of the second process's notebook
    done = subprocess.run([*TWO, tmp_path, "--only", "3"], env=ALONE, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("diffseg: process.rank-1 cannot write") == 1
    assert read_manifest(run / "03_synthesis") is None
