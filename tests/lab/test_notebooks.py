"""Every committed notebook and parameter file keeps the house rules; none of them is executed here."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import torch

from diffseg.drawing import DrawingOptions
from diffseg.lab.declarations import check
from diffseg.lab.parameters import declared, is_parameters, read_cells, read_yaml
from diffseg.lab.steps import STEPS, notebook_of
from diffseg.lora import TuningOptions
from diffseg.synthesis import SynthesisOptions
from diffseg.training_options import TrainingOptions

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("0*.ipynb"))  # that for Colab is no step: test_first_try.py
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))
CHAIN = {name: default for path in NOTEBOOKS[1:7] for name, default in declared(path).items()}
PARAMETERS = sorted((FOLDER / "params").glob("*.yaml"))

specification = importlib.util.spec_from_file_location("strip", FOLDER / "strip.py")
strip = importlib.util.module_from_spec(specification)
specification.loader.exec_module(strip)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_of_all = pytest.mark.parametrize("path", [*NOTEBOOKS, *SOLUTIONS], ids=lambda p: str(p.relative_to(FOLDER)))


def test_the_notebooks_folder_is_there():
    assert FOLDER.is_dir() and (FOLDER / "params").is_dir()


@each_of_all
def test_notebook_is_valid_and_stripped(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(nbformat.from_dict(notebook))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "papermill" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert "papermill" not in cell["metadata"] and "execution" not in cell["metadata"]
    assert notebook["cells"] == strip.strip(notebook)["cells"], "run make strip"


@each_notebook
def test_notebook_has_stable_cell_ids_and_a_readable_length(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    ids = [cell.get("id") for cell in cells]
    assert all(ids) and len(set(ids)) == len(ids)
    assert 15 <= len(cells) <= 25
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")


@each_notebook
def test_parameters_cell(path):
    parameters = declared(path)  # raises unless there is exactly one, of plain assignments
    assert {"run", "out", "seed"} <= parameters.keys()
    [source] = [cell["source"] for cell in read_cells(path) if is_parameters(cell)]
    assert len([line for line in source.splitlines() if re.match(r"\w+ = .*  # .+", line)]) == len(parameters)
    # plain papermill must read the same names and help; a `#` in a text would garble it
    seen = papermill.inspect_notebook(path)
    assert list(seen) == list(parameters) and all(entry["help"] for entry in seen.values())
    assert all(f"# {entry['help']}\n" in f"{source}\n" for entry in seen.values())


@each_notebook
def test_every_exercise_has_a_starter_and_a_solution(path):
    """test_chain.py executes them."""
    [text] = [cell["source"] for cell in read_cells(path) if cell["id"] == "exercises"]
    exercises = re.findall(r"^(\d+)\. \*\*(.+?)\.?\*\*", text, flags=re.M)
    assert len(exercises) >= 4 and f"(solutions/{path.name})" in text
    cells = read_cells(FOLDER / "solutions" / path.name)[3:]  # after title, parameters and what all solutions share
    headings, starters, solutions = cells[::3], cells[1::3], cells[2::3]
    assert [cell["source"] for cell in headings] == [f"## Exercise {number}: {title}" for number, title in exercises]
    assert len(starters) == len(solutions) == len(exercises)
    assert all("# your turn" in cell["source"] for cell in starters)
    assert all(cell["metadata"]["jupyter"]["source_hidden"] for cell in solutions)


def test_the_instructors_slides_show_figures_that_are_there():
    folder = FOLDER / "instructors"
    page, slides = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "slides.ipynb"))
    named = re.findall(r"\]\((\S+\.png)\)", page)
    assert len(named) > 9 and named == re.findall(r"!\[\]\((\S+\.png)\)", slides)
    assert all((folder / name).is_file() for name in named)


@each_notebook
def test_no_absolute_path_and_the_right_name(path):
    sources = [cell["source"] for cell in read_cells(path)]
    for source in sources:
        assert not re.search(r"""["'`(\s](/(home|root|tmp|work|usr|mnt|data|content)/|[A-Z]:\\|~/)""", source)
    if path.stem in STEPS:
        assert any(f'begin("{path.stem}", globals())' in source for source in sources)
        assert any("step.finish(" in source for source in sources)


@each_of_all
def test_what_it_imports_from_the_package_is_there(path):
    """A name that the package lost is seen here in a second, not after the cells before it have run."""
    code = [cell["source"] for cell in read_cells(path) if cell["cell_type"] == "code"]
    for node in (node for source in code for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "diffseg":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), name


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda path: path.stem)
def test_parameter_file_fits_the_notebooks(path):
    if not NOTEBOOKS:
        pytest.skip("there are no notebooks yet")
    values = read_yaml(path)
    check(values, CHAIN, path.name)
    assert values["run"] == path.stem  # two files that share a run's folder would undo each other
    assert path.read_text(encoding="utf-8").startswith("# "), "`diffseg list` shows the first comment"


def test_strip_keeps_sources_ids_and_tags_only():
    code = nbformat.v4.new_code_cell("a = 1  # number", metadata={"tags": ["parameters"], "papermill": {"x": 1}})
    code.execution_count = 3
    code.outputs = [nbformat.v4.new_output("stream", text="out")]
    injected = nbformat.v4.new_code_cell("a = 2", metadata={"tags": ["injected-parameters"]})
    text = nbformat.v4.new_markdown_cell("# Title")
    metadata = {
        "papermill": {"input_path": "/somewhere"},
        "language_info": {"name": "python", "version": "3.11"},
    }
    stripped = strip.strip(nbformat.v4.new_notebook(cells=[text, code, injected], metadata=metadata))
    nbformat.validate(nbformat.from_dict(stripped))
    assert [cell["source"] for cell in stripped["cells"]] == ["# Title", "a = 1  # number"]
    assert [cell["id"] for cell in stripped["cells"]] == [text.id, code.id]
    assert stripped["cells"][1]["metadata"] == {"tags": ["parameters"]}
    assert "papermill" not in json.dumps(stripped) and "out" not in stripped["cells"][1]["outputs"]
    assert strip.strip(stripped) == stripped


def test_the_defaults_are_those_of_mini_voc():
    """So that Jupyter, plain papermill and `diffseg run mini-voc` make the same steps."""
    for path in NOTEBOOKS[1:7]:
        values = declared(path)
        given = check(read_yaml(FOLDER / "params" / "mini-voc.yaml"), CHAIN, "mini-voc.yaml")
        assert {n: v for n, v in given.items() if n in values and values[n] != v} == {}, path.stem


@each_notebook
def test_no_method_cell_uses_what_a_figure_cell_makes(path):
    """Cells tagged `figure` do not count in a step's key, so nothing that counts may come from them."""
    made: dict[str, bool] = {}  # name -> whether a figure cell assigned it last
    for cell in read_cells(path):
        if cell["cell_type"] != "code":
            continue
        names = [node for node in ast.walk(ast.parse(cell["source"])) if isinstance(node, ast.Name)]
        is_figure = "figure" in cell["metadata"].get("tags", [])
        stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        for node in ast.walk(ast.parse(cell["source"])):
            if isinstance(node, ast.Import | ast.ImportFrom):
                stored |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            if isinstance(node, ast.FunctionDef):
                stored.add(node.name)
        if not is_figure:
            loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)} - stored
            assert not {name for name in loaded if made.get(name)}, cell["id"]
        made |= dict.fromkeys(stored, is_figure)


def test_what_a_notebook_reads_of_another_step_is_an_output_of_that_step():
    """The report of a tuned run once asked a step for a figure, which is the run's."""
    finished = {
        path.stem: "".join(cell["source"] for cell in read_cells(path) if ".finish(" in cell["source"])
        for path in NOTEBOOKS
    }
    finished["03_drawing"] = finished["03_synthesis"]
    read = [
        (step, name)
        for path in NOTEBOOKS
        for cell in read_cells(path)
        for step, name in re.findall(r'\.input\("(\d\d_\w+)", "([^"{]+)"\)', cell["source"])
    ]
    assert len(read) > 2
    assert [(step, name) for step, name in read if f'"{name}"' not in finished[step]] == []


@pytest.mark.parametrize(
    ("step", "options", "prefix"),
    [("02_lora_tuning", TuningOptions, "lora_"), ("03_drawing", DrawingOptions, ""),
     ("03_synthesis", SynthesisOptions, ""), ("04_robust_training", TrainingOptions, "")],
)  # fmt: skip
def test_a_notebook_hands_every_parameter_on_by_its_own_name(step, options, prefix):
    """A line that is lost or crossed would leave a parameter without effect."""
    code = [cell["source"] for cell in read_cells(notebook_of(step)) if cell["cell_type"] == "code"]
    calls = [n for source in code for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    [given] = [
        c.keywords
        for c in calls
        if isinstance(c.func, ast.Name) and c.func.id == options.__name__ and len(c.keywords) > 6
    ]
    named = {k.arg: ast.unparse(k.value).removeprefix("tuple(").removesuffix(")") for k in given if k.arg}
    other = {"precision": "training_precision"} if options is TrainingOptions else {}
    inherited = {f.name for f in dataclasses.fields(DrawingOptions)} if options is SynthesisOptions else set()
    names = {field.name for field in dataclasses.fields(options)} - inherited
    assert named == {name: other.get(name, prefix + name) for name in names}


def cell_of(step: str, cell_id: str) -> str:
    [source] = [cell["source"] for cell in read_cells(notebook_of(step)) if cell["id"] == cell_id]
    return source


def test_networks_train_on_the_training_split_and_are_scored_on_the_evaluation_split(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "diffseg.benchmarks.readers.open_split", lambda bench, root, split: asked.append(split) or [0] * 9
    )
    monkeypatch.setattr("diffseg.benchmarks.readers.data_folder", Path)
    monkeypatch.setattr("diffseg.benchmarks.readers.pictures_set", lambda *_: [0] * 4)
    for step, given in (
        ("04_robust_training", {}),
        ("05_evaluation", {}),
        ("05_evaluation", {"evaluation_split": "dev"}),
    ):
        names = declared(notebook_of(step)) | {"step": SimpleNamespace(input=lambda *_: None)} | given
        exec(cell_of(step, "data"), names)
    assert asked == ["train", "val", "dev"]


def test_step_3_draws_with_the_lora_of_step_2_at_its_strength(tmp_path, monkeypatch):
    (tmp_path / "tuning.json").write_text('{"tuned": true}')
    loaded = []
    monkeypatch.setattr("diffseg.generator.load_generator", lambda *_: SimpleNamespace(unet=torch.nn.Linear(1, 1)))
    monkeypatch.setattr("diffseg.lora.load_lora", lambda pipeline, *given: loaded.append(given))
    drawing = SimpleNamespace(finished=False, input=lambda step, name=".": tmp_path / name)
    exec(
        cell_of("03_synthesis", "load"), declared(notebook_of("03_synthesis")) | {"lora_scale": 0.7, "drawing": drawing}
    )
    assert loaded == [(tmp_path, 0.7)]
