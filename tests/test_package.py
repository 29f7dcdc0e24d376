"""The files around the package tell one story: versions, commands, licences, and the README's figures."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import diffseg
from diffseg.manifest import STEPS

ROOT = Path(diffseg.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMED_BY_THE_USER = (
    "jupyterlab papermill torch diffusers transformers peft matplotlib numpy segment-anything pytest".split()
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> dict[str, Requirement]:
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    return {normal(Requirement(line).name): Requirement(line) for line in lines}


def test_pyproject_holds_ranges_and_constraints_hold_pins_inside_them():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line)
        assert pin, f"constraints.txt holds exact pins only: {line!r}"
        pins[normal(pin[1])] = pin[2]
    for name, requirement in requirements().items():
        assert str(requirement.specifier).startswith(">="), f"{name}: pyproject.toml holds ranges"
        assert requirement.specifier.contains(pins[name]), name
    assert requirements()["torch"].specifier.contains("2.6.0")


@pytest.mark.parametrize("name", NAMED_BY_THE_USER)
def test_the_packages_that_the_project_names_are_required_and_used(name):
    assert name in requirements()
    module = {"segment-anything": "segment_anything", "jupyterlab": "jupyter"}.get(name, name)
    files = [*ROOT.glob("diffseg/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("notebooks/*"), ROOT / "README.md"]
    assert any(module in path.read_text(encoding="utf-8") for path in files if path.is_file())


def test_environment_yml_has_no_second_list_of_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert [re.split(r"[<>=]", entry)[0] for entry in conda] == ["python", "pip"]
    assert conda[0] == f"python{PROJECT['project']['requires-python']}"
    assert pip == ["-c constraints.txt", "-e .[test]"]


def test_ci_runs_the_readmes_own_test_command():
    readme = (ROOT / "README.md").read_text()
    assert "make reproduce" in readme and "make test" in readme
    assert (ROOT / ".ci" / "run").read_text().strip().endswith("make test")


def test_every_step_has_its_notebook_and_every_licence_is_there():
    assert [path.stem for path in sorted((ROOT / "notebooks").glob("0[1-6]_*.ipynb"))] == list(STEPS)
    for file in [*PROJECT["project"]["license-files"], "CITATION.cff"]:
        assert (ROOT / file).stat().st_size > 0
    art = (ROOT / "diffseg" / "miniworld" / "art" / "LICENSE-art.txt").read_text()
    assert "CC-BY 4.0" in art and "Twemoji" in art and "Twemoji" in (ROOT / "README.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == diffseg.__version__
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2309.01369"


def test_weights_are_safetensors_below_twenty_megabytes():
    weights = [path for path in (ROOT / "diffseg" / "miniworld" / "weights").rglob("*") if path.is_file()]
    assert {path.suffix for path in weights} <= {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in weights) < 20e6
