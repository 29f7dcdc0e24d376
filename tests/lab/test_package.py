"""The files around the package tell one story: versions, commands, licences, and the README's figures."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import diffseg
from diffseg.experiments.generator.measure import quality_tables
from diffseg.lab.publishing import benchmarks_table, readme_with_tables
from diffseg.lab.report import summarise
from diffseg.lab.steps import STEPS, notebook_of
from diffseg.lab.study_results import readable_table

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


def test_what_a_segmenter_imports_on_demand_comes_with_the_package():
    """transformers asks for scipy when it builds a Mask2Former, and does not require it."""
    assert "scipy" in [normal(Requirement(line).name) for line in PROJECT["project"]["dependencies"]]


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
    assert [path.stem for path in sorted((ROOT / "notebooks").glob("0[1-6]_*.ipynb"))] == list(
        dict.fromkeys(notebook_of(step).stem for step in STEPS)
    )
    for file in [*PROJECT["project"]["license-files"], "CITATION.cff"]:
        assert (ROOT / file).stat().st_size > 0
    art = (ROOT / "diffseg" / "miniworld" / "art" / "LICENSE-art.txt").read_text()
    assert "CC-BY 4.0" in art and "Twemoji" in art and "Twemoji" in (ROOT / "README.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == diffseg.__version__
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2309.01369"


def test_weights_are_safetensors_below_forty_megabytes():
    weights = [path for path in (ROOT / "diffseg" / "miniworld" / "weights").rglob("*") if path.is_file()]
    assert {path.suffix for path in weights} <= {".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in weights) < 40e6


def test_every_number_of_the_readme_comes_from_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- table: (\S+) -->", readme)
    assert {"results/tables/benchmarks.md", "results/tables/mini_generator.md"} <= set(tables)
    assert readme_with_tables(readme, ROOT) == readme, "run diffseg publish"
    results = ROOT / "results"
    made = {
        "benchmarks": benchmarks_table(sorted(results.glob("*/summary.json"))),
        "mini_generator": quality_tables(json.loads((results / "mini_generator.json").read_text())),
    } | {path.stem: readable_table(json.loads(path.read_text())) for path in results.glob("studies/*.json")}
    assert {f"results/tables/{name}.md" for name in made} == set(tables)
    for name, table in made.items():
        assert (results / "tables" / f"{name}.md").read_text(encoding="utf-8") == table, name
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme):
        assert picture.startswith("results/") and (ROOT / picture).is_file()


def test_the_numbers_in_the_readmes_sentences_stand_in_the_files_beside_them():
    """A paragraph that names a CSV or JSON file of results/ has its decimals from there."""
    readme = re.sub(r"<!-- table:.*?<!-- /table -->", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    checked = 0
    for paragraph in readme.split("\n\n"):
        files = re.findall(r"\]\((results/[^)]+\.(?:csv|json))\)", paragraph)
        measured = [float(n) for file in files for n in re.findall(r"\d+\.\d+", (ROOT / file).read_text())]
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", paragraph) if files else ():
            digits = len(number.partition(".")[2])
            found = {f"{scale * value:.{digits}f}" for value in measured for scale in (1, 100)}  # shares are told in %
            assert number in found, (number, files)
            checked += 1
    assert checked >= 5


def test_the_readmes_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


def test_published_manifests_belong_to_the_published_summary():
    folder = ROOT / "results" / "mini-voc"
    summary = json.loads((folder / "summary.json").read_text())
    manifests = {step: json.loads((folder / "manifests" / f"{step}.json").read_text()) for step in STEPS}
    assert summary == summarise({step: manifest for step, manifest in manifests.items() if step != "06_report"})
    assert manifests["06_report"]["metrics"] == summary
    assert {"miou", "miou_real", "ratio", "images", "seconds"} <= summary.keys()


def test_the_generators_numbers_are_of_the_shipped_weights():
    report = json.loads((ROOT / "results" / "mini_generator.json").read_text())
    training = json.loads((ROOT / "diffseg" / "miniworld" / "weights" / "generator" / "training.json").read_text())
    assert report["training"] == training
    assert {"class_present", "mask_iou"} <= report.keys() and training["samples_seen"] > 0


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_code_and_notebooks_pass_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
