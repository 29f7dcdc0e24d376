"""The package without its clone: a folder to work in, and the wheel in a fresh environment."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import diffseg
from diffseg.errors import DiffsegError
from diffseg.lab import publishing
from diffseg.lab.cli import main
from diffseg.paths import base_folder, project_root

REPOSITORY = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_init_writes_the_notebooks_once(tmp_path, capsys):
    assert main(["init", str(tmp_path / "my work")]) == 0
    assert files(tmp_path / "my work" / "notebooks") == files(REPOSITORY / "notebooks")
    assert (tmp_path / "my work" / "results" / "published.csv").is_file()
    assert main(["init", str(tmp_path / "my work")]) == 1 and "is there already" in capsys.readouterr().err


def test_what_init_prints_makes_diffseg_take_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DIFFSEG_ROOT", raising=False)
    monkeypatch.chdir(REPOSITORY)
    assert main(["init", str(tmp_path / "a b")]) == 0
    assert f"cd '{tmp_path / 'a b'}', export DIFFSEG_ROOT=\"$PWD\" and run diffseg there" in capsys.readouterr().out
    monkeypatch.setattr("diffseg.paths.__file__", str(tmp_path / "site-packages" / "diffseg" / "paths.py"))
    assert main(["init", str(tmp_path / "c")]) == 0
    assert f"cd {tmp_path / 'c'} and run diffseg there" in capsys.readouterr().out


def test_without_a_clone_the_root_is_the_nearest_working_copy(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFSEG_ROOT", raising=False)
    monkeypatch.setattr("diffseg.paths.__file__", str(tmp_path / "site-packages" / "diffseg" / "paths.py"))
    (tmp_path / "work" / "notebooks" / "params").mkdir(parents=True)
    (tmp_path / "work" / "results" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "results" / "runs")
    assert project_root() == base_folder() == tmp_path / "work"
    monkeypatch.chdir(tmp_path)
    assert base_folder() == tmp_path
    with pytest.raises(DiffsegError, match="diffseg init FOLDER"):
        project_root()


@pytest.mark.slow
def test_the_wheel_runs_in_a_fresh_environment_outside_the_clone(tmp_path):
    """Its dependencies are this environment's, so it needs no network; the package itself is the wheel's."""
    source = tmp_path / "source"  # a build leaves its folders beside pyproject.toml
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "steps", "data")
    for name in ("diffseg", "notebooks"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    shutil.copytree(REPOSITORY / "results", source / "results", ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DIFFSEG_ROOT")}
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run([*pip, *build], check=True, env=clean)
    [wheel] = tmp_path.glob("diffseg-*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    assert wheel.stat().st_size < 60e6  # below the 100 MB that a package index takes

    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True, env=clean)
    [packages] = (tmp_path / "venv").glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(
        "\n".join(
            {sysconfig.get_path(name) for name in ("purelib", "platlib")} | {str(Path(pytest.__file__).parents[1])}
        )
    )

    def command(*arguments: str, cwd: Path) -> str:
        done = subprocess.run([*arguments], cwd=cwd, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = command(python, "-c", "import diffseg; print(diffseg.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(packages) and diffseg.__file__ not in where
    script = str(python.with_name("diffseg"))
    assert "DIFFSEG_ROOT" not in command(script, "init", "work", cwd=tmp_path)
    assert files(tmp_path / "work" / "notebooks") == files(REPOSITORY / "notebooks")
    made = tmp_path / "elsewhere" / "runs" / "smoke"  # no working copy lies above it
    printed = command(script, "run", "smoke", "--out", str(tmp_path / "elsewhere"), cwd=tmp_path / "work")
    summary = json.loads((made / "summary.json").read_text())
    assert summary["images"] == 24 and "06_overview.png" in printed
    manifest = json.loads((made / "06_report" / "manifest.json").read_text())
    assert manifest["git"] is None and manifest["versions"]["diffseg"] == diffseg.__version__
    assert "smoke" in command(script, "list", cwd=tmp_path / "work" / "notebooks")
    network, image = made / "04_robust_training" / "synthetic", made / "03_synthesis" / "JPEGImages" / "000000.jpg"
    command(script, "predict", str(network), str(image), "--out", "predicted", cwd=tmp_path)
    assert (tmp_path / "predicted" / "masks" / "000000.png").is_file()


def test_pages_of_a_working_copy_keep_the_numbers_of_the_repository(tmp_path, monkeypatch):
    page = tmp_path / "notebooks" / "README.md"
    page.parent.mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "published.csv").touch()
    page.write_text("12<!-- mini-voc/summary.json; images -->")
    monkeypatch.setattr(publishing, "project_root", lambda: tmp_path)
    publishing.fill_readme()
    assert page.read_text() == "12<!-- mini-voc/summary.json; images -->"
