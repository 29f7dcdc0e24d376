"""The files around the package tell one story: versions, commands, licences, and the README's figures."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

import diffseg
from diffseg.errors import DiffsegError
from diffseg.experiments.generator.measure import quality_tables
from diffseg.lab.publishing import benchmarks_table, readme_with_tables
from diffseg.lab.quoted import QUOTED, with_numbers
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


def test_what_transformers_imports_on_demand_comes_with_the_package():
    """It asks for scipy for a Mask2Former, and for the others for a spiece.model; it requires none."""
    names = {normal(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    assert {"scipy", "sentencepiece", "protobuf"} <= names


@pytest.mark.parametrize("name", NAMED_BY_THE_USER)
def test_the_packages_that_the_project_names_are_required_and_used(name):
    assert name in requirements()
    module = {"segment-anything": "segment_anything", "jupyterlab": "jupyter"}.get(name, name)
    files = [*ROOT.glob("diffseg/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("notebooks/*"), ROOT / "README.md"]
    assert any(module in path.read_text(encoding="utf-8") for path in files if path.is_file())


def test_environment_yml_has_no_second_list_of_versions_and_takes_the_makefiles_pythons():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert [re.split(r"[<>=]", entry)[0] for entry in conda] == ["python", "pip"]
    makefile = (ROOT / "Makefile").read_text()
    [(first, end)] = re.findall(r"\(3, (\d+)\) <= sys.version_info\[:2\] < \(3, (\d+)\)", makefile)
    assert PROJECT["project"]["requires-python"] == f">=3.{first}" and conda[0] == f"python>=3.{first},<3.{end}"
    for text in (makefile, (ROOT / "README.md").read_text()):
        assert f"Python 3.{first} to 3.{int(end) - 1}" in text
    assert pip == ["-c constraints.txt", "-e .[test]"]


def test_ci_runs_the_readmes_own_test_command():
    readme = (ROOT / "README.md").read_text()
    assert "make reproduce" in readme and "make test" in readme
    assert (ROOT / ".ci" / "run").read_text().splitlines().count("make test") == 1


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


PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted(ROOT.glob("notebooks/**/README.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = "arXiv|CC-BY|Python|Stable Diffusion|WordNet|diffseg|torch|version"  # before decimals that measure nothing


def unquoted(text: str) -> list[str]:
    """Return decimals and seconds of a page's sentences that name no cell, and do not say that they were noted by hand.

    Tables, code, formulas and addresses are no sentences.
    """
    text = re.sub(r"<!-- table:.*?<!-- /table -->|^```.*?^```|\$\$.*?\$\$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = QUOTED.sub("", re.sub(r"^\|.*?$|`[^`\n]*`|\$[^$\n]+\$|\]\([^)]*\)", "", text, flags=re.MULTILINE))
    text = re.sub(rf"[\d.]+<!-- by hand: [^>]+ -->|\b({NAMES})\s[\d.]+(?: to [\d.]+)?|doi \S+", "", text)
    return re.findall(r"(?<![\w.])\d+\.\d+(?!\.?\w)|\b\d+(?= seconds)", text)


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_and_numbers_of_pages_and_notebooks_are_those_of_results(page):
    text = page.read_text(encoding="utf-8")
    assert with_numbers(readme_with_tables(text, ROOT), ROOT / "results") == text, "run diffseg publish"
    if page.suffix == ".ipynb":
        cells = nbformat.read(page, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert not unquoted(text), "write `1.2<!-- FILE; ROW; COLUMN -->`, as diffseg/lab/quoted.py says"


def test_a_wrong_number_planted_on_a_page_is_found_wherever_it_stands():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    quoted = list(QUOTED.finditer(text))
    assert len(quoted) >= 20
    for match in quoted:
        for last in [match.end(part) - match.start() - 1 for part in ("mean", "spread") if match[part]]:
            planted = f"{match[0][:last]}{(int(match[0][last]) + 1) % 10}{match[0][last + 1 :]}"
            assert with_numbers(planted, ROOT / "results") == match[0]
    for planted in (
        "It reaches 84.1 mIoU.",
        "Its mIoU is 84.1.",
        "It reaches 84.1<!-- by heart --> mIoU ([table.csv](table.csv)).",
        "(0.5)",
        "It took 47 seconds.",
    ):
        assert unquoted(planted), planted
    assert not unquoted("diffseg 0.2.0 and SD1.5, `beta=0.4`, 1.4<!-- by hand: a trial -->\n| a | 0.3 |\n")


@pytest.mark.parametrize(
    "comment, problem",
    [
        ("ladder.csv; rung=ours; miou", "2 rows fit"),
        ("ladder.csv; rung=theirs; miou", "0 rows fit"),
        ("ladder.csv; rung=real; width", "'width'"),
        ("ladder.csv; rung=real; rung", "could not convert"),
        ("absent.csv; rung=real; miou", "No such file"),
        ("a.json; runs; 3", "out of range"),
    ],
)
def test_a_comment_without_its_cell_is_named(comment, problem, tmp_path):
    (tmp_path / "ladder.csv").write_text("rung,seed,miou,miou_spread\nreal,0,84.04,0.21\nours,0,71,2\nours,1,72.16,2\n")
    (tmp_path / "a.json").write_text(
        '{"runs": [{"name": "a", "share": 0.8412}, {"name": "b", "share": 1234.5}, {"name": "c", "share": -3.26}]}'
    )
    good = {
        "84.0 ± 0.2": "ladder.csv; rung=real; miou",
        "72": "ladder.csv; rung=ours; seed=1; miou",
        "84.1": "a.json; runs; name=a; share * 100",
        "1.23": "a.json; runs; 1; share / 1e3",
        "1,234": "a.json; runs; name=b; share",
        "-3.3": "a.json; runs; 2; share",
    }
    page = "".join(f"{number}<!-- {cell} --> % " for number, cell in good.items())
    wrong = (
        page.replace("84.0 ± 0.2<", "11.1 ± 9.9<")
        .replace("72<", "99<")
        .replace("84.1<", "0.1<")
        .replace("1,234<", "9,999<")
        .replace("-3.3<", "3.4<")
    )
    assert with_numbers(wrong, tmp_path) == page
    with pytest.raises(DiffsegError, match=f"{re.escape(comment)}`.*{problem}"):
        with_numbers(f"1.0<!-- {comment} -->", tmp_path)


def test_the_tables_of_the_pages_are_all_of_results_made_anew():
    results = ROOT / "results"
    tables = {name for page in PAGES for name in re.findall(r"<!-- table: (\S+) -->", page.read_text(encoding="utf-8"))}
    made = {
        "benchmarks": benchmarks_table(sorted(results.glob("*/summary.json"))),
        "mini_generator": quality_tables(json.loads((results / "mini_generator.json").read_text())),
    } | {path.stem: readable_table(json.loads(path.read_text())) for path in results.glob("studies/*.json")}
    assert {f"results/tables/{name}.md" for name in made} == tables
    assert "results/tables/benchmarks.md" in PAGES[0].read_text(encoding="utf-8")
    for name, table in made.items():
        assert (results / "tables" / f"{name}.md").read_text(encoding="utf-8") == table, name


@pytest.mark.parametrize("page", [*PAGES, ROOT / "diffseg" / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_and_images_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link, heading in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading[1:] in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], heading


def test_the_readme_is_short_and_cites_what_citation_cff_cites():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.encode()) <= 9000
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper, bibtex = citation["preferred-citation"], readme.partition("```bibtex")[2]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for value in (paper["title"], authors, str(paper["year"]), citation["title"], citation["version"]):
        assert f"{{{value}}}" in bibtex, value
    assert paper["identifiers"][0]["value"] in bibtex


def test_the_readmes_python_records_attention():
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith("from")]) <= 8
    code = code.replace("pipeline(prompt)", "pipeline(prompt, num_inference_steps=2)")  # 50 take long
    exec(code, names := {})
    assert names["maps"].shape == (1, 16, 16) and names["image"].size == (64, 64)


def test_the_map_of_the_code_names_all_modules_and_rooms():
    named = re.findall(
        r"^\| (`[^|]*) \|", (ROOT / "diffseg" / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    named = {name for cell in named for name in re.findall(r"`([^`]+)`", cell)}
    package = ROOT / "diffseg"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert named == rooms | {path.stem for path in package.glob("*.py") if not path.stem.startswith("__")}


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
