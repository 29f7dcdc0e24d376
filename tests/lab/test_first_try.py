"""The ways to try the package without installing it here: a notebook for Colab, and a Dockerfile."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from diffseg.lab.kernel import execute
from diffseg.lab.parameters import declared, is_parameters, read_cells

sys.path.insert(0, str(Path(__file__).parents[1] / "method"))
REPOSITORY = Path(__file__).parents[2]
COLAB = REPOSITORY / "notebooks" / "colab.ipynb"


def test_the_notebook_for_colab_is_stripped_and_says_that_it_was_not_run_there():
    notebook = nbformat.read(COLAB, 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert "could not run this notebook on Colab" in notebook.cells[0].source
    code = "\n".join(cell["source"] for cell in read_cells(COLAB) if not is_parameters(cell))
    assert all(f"{name}" in code for name in declared(COLAB))


@pytest.mark.slow
def test_the_notebook_for_colab_runs_with_a_small_generator_of_the_hubs_class(tmp_path):
    from tiny_pipelines import build

    build("sdxl-turbo").save_pretrained(tmp_path / "generator")
    small = {
        "generator": str(tmp_path / "generator"),
        "generator_variant": "",
        "out": str(tmp_path / "out"),
        "words": ["cat, none", "dog, none"],
        "images": 3,
        "templates": ["{}"],
        "height": 32,
        "width": 32,
        "attention_resolutions": [8],
    }
    (tmp_path / "work").mkdir()
    execute(COLAB, tmp_path / "executed.ipynb", small, tmp_path / "work")
    outputs = [
        output for cell in nbformat.read(tmp_path / "executed.ipynb", 4).cells for output in cell.get("outputs", [])
    ]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "out" / "runs" / "smoke" / "summary.json").is_file()


def has_docker() -> bool:
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_dockerfile_builds_and_its_command_is_known():
    if not has_docker():
        pytest.skip("there is no Docker daemon")
    subprocess.run(["docker", "build", "-t", "diffseg-test", str(REPOSITORY)], check=True)
    subprocess.run(["docker", "run", "--rm", "diffseg-test", ".venv/bin/diffseg", "run", "smoke"], check=True)
