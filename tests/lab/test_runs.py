"""The batch runner on a tiny project of three real notebooks, driven by the real papermill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest

from diffseg.errors import DiffsegError
from diffseg.files import sha256_file
from diffseg.lab import kernel, runs
from diffseg.lab.cli import main
from diffseg.lab.manifests import STEPS, named_files, trouble
from diffseg.lab.parameters import coerce, declared, merge, parse_assignments

REPOSITORY = Path(runs.__file__).parents[2]
SHARED = 'run = "tiny"  # name of the run\nout = ""  # where it goes\nseed = 0  # of all random numbers\n'

CELLS = {
    "01_prompt_augmentation": (
        "count = 3  # prompts\nfail = False  # raise an error\n",
        """
(step.folder / "prompts.csv").write_text("".join(f"a cat {seed + i}\\n" for i in range(count)))
if fail:
    raise ValueError("the second line\\nof an error")
step.finish(["prompts.csv"], {"prompts": count})
""",
    ),
    "02_lora_tuning": (
        "rate = 0.5  # learning rate\n",
        '(step.folder / "lora.txt").write_text(repr(rate))\nstep.finish(["*.txt"])\n',
    ),
    # slow on request, and every picture made is counted in a file outside the step's folder
    "03_synthesis": (
        "images = 20  # pictures\nsizes = [8, 8]  # height, width\n",
        """
import os, time
from diffseg.files import atomic_path
prompts = step.input("01_prompt_augmentation", "prompts.csv").read_text()
(step.folder.parent / "kernel.pid").write_text(str(os.getpid()))
for i in range(images):
    path = step.folder / "JPEGImages" / f"{i:02}.jpg"
    if not path.exists():
        time.sleep(float(os.environ.get("PAUSE", 0)))
        with atomic_path(path) as temporary:
            temporary.write_text(f"{prompts} {i} {sizes}")
        with open(step.folder.parent / "made.txt", "a") as made:
            print(i, file=made)
step.finish(["JPEGImages/*.jpg"])
""",
    ),
}


def write_notebook(path: Path, parameters: str, code: str) -> None:
    begin = f'from diffseg import runs\nstep = runs.begin("{path.stem}", globals())'
    new = nbformat.v4.new_code_cell
    cells = [new(parameters.strip(), metadata={"tags": ["parameters"]}), new(begin), new(code.strip())]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def make_project(root: Path) -> None:
    for step, (parameters, code) in CELLS.items():
        write_notebook(root / "notebooks" / f"{step}.ipynb", SHARED + parameters, code)
    (root / "notebooks" / "params").mkdir()
    (root / "notebooks" / "params" / "tiny.yaml").write_text("# three tiny steps\nrun: tiny\nrate: 1e-4\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose run went through once, undisturbed; tests work on copies of it."""
    root = tmp_path_factory.mktemp("finished")
    make_project(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSEG_ROOT", str(root))
        patch.chdir(root)
        runs.run("tiny")
    return root


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A project without a run; returns the folder its run will have."""
    make_project(tmp_path)
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    return tmp_path / "results" / "runs" / "tiny"


@pytest.fixture
def project(finished, tmp_path, monkeypatch):
    """A copy of the finished project, somewhere else on disk; returns its run's folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    return tmp_path / "results" / "runs" / "tiny"


def pictures_in(folder: Path) -> list[Path]:
    """The finished pictures; a hidden name is one that is being written, and may be gone a moment later."""
    return [path for path in folder.rglob("*.jpg") if not path.name.startswith(".")]


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in pictures_in(folder)}


def values(**changes) -> dict:
    """The name space of notebook 01 after its parameters cell."""
    return {"run": "tiny", "out": "", "seed": 0, "count": 3, "fail": False, **changes}


# parameters


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        (1, 0.5, 1.0),
        ("1e-4", 0.5, 1e-4),
        ("1.0e-4", 0.5, 1e-4),
        (3.0, 1, 3),
        ("12", 1, 12),
        (2**60 + 1, 1, 2**60 + 1),
        ("true", False, True),
        ("False", True, False),
        ([1], [], [1]),
        (("a", "b"), [], ["a", "b"]),
        ([1, "1e-2"], [0.5], [1.0, 0.01]),
        ("cat", "", "cat"),
    ],
)
def test_values_take_the_type_of_the_default(value, default, expected):
    result = coerce("name", value, default)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "default"),
    [
        (3.5, 1),
        (True, 1),
        (True, 1.0),
        (1, True),
        ("yes", True),
        (None, 1),
        (None, ""),
        (None, []),
        (False, ""),
        (5, ""),
        ("cat", []),
        ([1.5], [1]),
        ([[1]], []),
        ("nan", 1.0),
        (float("inf"), 1.0),
        (2**60 + 1, 1.0),
        ("one", 1),
    ],
)
def test_lossy_values_are_refused_by_name(value, default):
    with pytest.raises(DiffsegError, match=r"parameter speed(\[0\])? must be"):
        coerce("speed", value, default)


def test_declared_parameters_and_their_help(fresh):
    found = declared(Path(os.environ["DIFFSEG_ROOT"]) / "notebooks" / "03_synthesis.ipynb")
    assert [(p.name, p.default, p.help) for p in found.values()][-2:] == [
        ("images", 20, "pictures"),
        ("sizes", [8, 8], "height, width"),
    ]


@pytest.mark.parametrize("line", ["a: int = 1", "a = b = 1", "a = None", "a = 2 * 3", "import os", "a = (1, 2)"])
def test_parameters_cell_holds_plain_assignments_only(tmp_path, line):
    write_notebook(tmp_path / "01_prompt_augmentation.ipynb", line, "")
    with pytest.raises(DiffsegError, match="may only hold lines"):
        declared(tmp_path / "01_prompt_augmentation.ipynb")


def test_one_name_has_one_type(tmp_path):
    write_notebook(tmp_path / "a.ipynb", "steps = 1", "")
    write_notebook(tmp_path / "b.ipynb", "steps = 1.5", "")
    with pytest.raises(DiffsegError, match="a.ipynb and b.ipynb declare the parameter steps"):
        merge([tmp_path / "a.ipynb", tmp_path / "b.ipynb"])


def test_set_reads_yaml():
    assert parse_assignments(["a=1", "b=[x, y]", "c=", "d=u=v"]) == {
        "a": 1,
        "b": ["x", "y"],
        "c": "",
        "d": "u=v",
    }
    for wrong in ("a", "=1", "a=[1"):
        with pytest.raises(DiffsegError, match="--set"):
            parse_assignments([wrong])


# bad input: one sentence, exit code 1, and nothing has run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tiny", "--set", "imagse=3"], "--set gives the parameter imagse.* did you mean images?"),
        (["tiny", "--set", "images=many"], "parameter images must be a whole number such as 20, not 'many'"),
        (["tiny", "--set", "images=3.5"], "parameter images must be a whole number"),
        (["tiny", "--set", "run=../x"], "the run's name must be made of letters"),
        (["tinny"], "no parameters named tinny .*did you mean tiny?"),
        (["tiny", "--only", "7"], "asks for a step that is not there"),
        (["tiny", "--only", "a-b"], "--only takes step numbers"),
        (["tiny", "--only", "3"], "run 01_prompt_augmentation first, with --only 1: it is not finished"),
        (["absent.yaml"], "cannot read the parameter file absent.yaml"),
    ],
)
def test_bad_input_is_one_sentence(fresh, capsys, arguments, sentence):
    assert main(["run", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(sentence.replace("?", "[?]"), error)
    assert not list(fresh.parents[2].rglob("*_*/notebook.ipynb"))


@pytest.mark.parametrize("text", ["run: [", "- a\n- b", "count: 3"])
def test_bad_parameter_file(fresh, tmp_path, capsys, text):
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["run", str(tmp_path / "bad.yaml")]) == 1
    assert "bad.yaml" in capsys.readouterr().err


def test_unwritable_and_full_folders(fresh, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["run", "tiny", "--out", str(tmp_path / "file")]) == 1
    assert "cannot write to" in capsys.readouterr().err
    with pytest.raises(DiffsegError, match="cannot write to"):
        runs.begin("01_prompt_augmentation", values(out=str(tmp_path / "file")))
    monkeypatch.setattr(runs, "MINIMUM_FREE", 1e18)
    assert main(["run", "tiny"]) == 1
    assert "MB are free in" in capsys.readouterr().err


def test_only_selects_by_number():
    steps = list(STEPS)
    assert runs.select(None, steps) == steps and runs.select("3", steps) == ["03_synthesis"]
    assert runs.select("5,1-2,1", steps) == [steps[0], steps[1], steps[4]]


def test_the_report_is_printed(tmp_path, capsys):
    report = tmp_path / "06_report"
    report.mkdir()
    (report / "table.txt").write_text("network  mIoU\nplain    0.33\n")
    (report / "sheet.png").write_text("png")
    (tmp_path / "summary.json").write_text("{}")
    manifest = {"key": "", "outputs": {}, "parameters": {}, "metrics": {"figures": ["sheet.png"]}}
    (report / "manifest.json").write_text(json.dumps(manifest))
    runs.print_results(tmp_path)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[1] == "plain    0.33" and lines[-2:] == [
        str(report / "sheet.png"),
        str(tmp_path / "summary.json"),
    ]


def test_one_runner_a_run(fresh, capsys):
    with runs.locked(fresh):
        assert main(["run", "tiny"]) == 1
    assert "another diffseg run" in capsys.readouterr().err


# a step from inside: begin, input, finish


def test_begin_converts_the_name_space(fresh):
    namespace = values(count="4", seed=1.0, other="kept")
    step = runs.begin("01_prompt_augmentation", namespace)
    assert namespace == values(count=4, seed=1, other="kept")
    assert step.folder == fresh / "01_prompt_augmentation" and step.folder.is_absolute()
    assert step.parameters["count"] == 4 and not step.resumed
    with pytest.raises(DiffsegError, match="misses the parameter count"):
        runs.begin("01_prompt_augmentation", {"run": "tiny", "out": "", "seed": 0})


def test_a_step_keeps_its_files_while_its_key_is_the_same(fresh):
    step = runs.begin("01_prompt_augmentation", values())
    (step.folder / "part").mkdir()
    (step.folder / "part" / "a.txt").write_text("a")
    (step.folder / "part" / ".b.123.tmp.txt").write_text("half")
    (step.folder / "notebook.ipynb").write_text("{}")
    again = runs.begin("01_prompt_augmentation", values())
    assert again.resumed and again.key == step.key
    assert [p.name for p in (step.folder / "part").iterdir()] == ["a.txt"]
    again.finish(["part/*"])
    assert not (step.folder / "in-progress.json").exists()
    # begun again, a finished step does not look done, but has all its files
    assert runs.begin("01_prompt_augmentation", values()).resumed
    assert runs.read_manifest(step.folder) is None and (step.folder / "part" / "a.txt").exists()
    assert not runs.begin("01_prompt_augmentation", values(seed=1)).resumed
    assert sorted(p.name for p in step.folder.iterdir()) == ["in-progress.json", "notebook.ipynb"]


def test_the_key_ignores_where_a_run_lies_and_nothing_else(fresh, tmp_path):
    keys = [
        runs.begin("01_prompt_augmentation", values(**changes)).key
        for changes in ({}, {"run": "other"}, {"out": str(tmp_path / "x")}, {"count": 4}, {"fail": True})
    ]
    assert keys[0] == keys[1] == keys[2] and len(set(keys)) == 3
    parameters, code = CELLS["01_prompt_augmentation"]
    notebook = tmp_path / "notebooks" / "01_prompt_augmentation.ipynb"
    write_notebook(notebook, "# other words\n" + SHARED + parameters.replace("3", "7"), code)
    assert runs.begin("01_prompt_augmentation", values()).key == keys[0]
    write_notebook(notebook, SHARED + parameters, code + "1 + 1")
    assert runs.begin("01_prompt_augmentation", values()).key != keys[0]


def test_finish_checks_the_outputs(fresh):
    step = runs.begin("01_prompt_augmentation", values())
    (step.folder / "a.txt").write_text("a")
    (step.folder / "empty.txt").write_text("")
    for outputs, sentence in [
        (["b.txt"], "has not written it"),
        (["*.png"], "has not written it"),
        (["a.txt", "empty.txt"], "empty file"),
        (["../a.txt"], "outside"),
    ]:
        with pytest.raises(DiffsegError, match=sentence):
            step.finish(outputs)
        assert runs.read_manifest(step.folder) is None
    metrics = {"iou": np.float32(0.5), "list": np.array([1.0, np.nan]), "path": Path("a"), "n": 3, "ok": True}
    step.finish([step.folder / "a.txt"], metrics)
    manifest = runs.read_manifest(step.folder)
    assert manifest["metrics"] == {"iou": 0.5, "list": [1.0, None], "path": "a", "n": 3, "ok": True}
    assert manifest["outputs"] == {"a.txt": sha256_file(step.folder / "a.txt")}


def test_a_file_that_a_parameter_names_makes_its_step_stale_when_it_is_edited(fresh):
    notebook = fresh.parents[2] / "notebooks" / "01_prompt_augmentation.ipynb"
    write_notebook(notebook, SHARED + 'caption_file = ""  # captions\ntarget_images = ""  # a folder\n', "1 + 1")
    names = {"run": "tiny", "out": "", "seed": 0, "caption_file": "", "target_images": ""}

    def make(**changes) -> runs.Step:
        step = runs.begin("01_prompt_augmentation", {**names, **changes})
        (step.folder / "a.txt").write_text("a")
        step.finish(["a.txt"])
        return step

    captions, pictures = fresh.parents[2] / "captions.txt", fresh.parents[2] / "pictures"
    none = make()
    assert none.inputs == {} == named_files({"caption_file": "absent.txt", "generator": "mini", "seed": 0})
    (pictures / "far").mkdir(parents=True)
    (pictures / ".hidden").write_text("of no step")
    captions.write_text("a cat")
    (pictures / "far" / "1.png").write_text("1")
    changes = {"caption_file": "captions.txt", "target_images": str(pictures)}
    first = make(**changes)
    read = {"captions.txt": captions, str(pictures / "far" / "1.png"): pictures / "far" / "1.png"}
    assert first.inputs == {name: sha256_file(path) for name, path in read.items()}
    assert runs.read_manifest(first.folder)["inputs"] == first.inputs
    assert make(**changes).resumed and make(**changes).key == first.key
    for name, path in read.items():
        path.write_text("another cat")
        stale = runs.step_key("01_prompt_augmentation", first.parameters, fresh)
        assert trouble(first.folder, stale, first.parameters) == f"{name} changed"
        again = make(**changes)
        assert not again.resumed and again.key == stale != first.key
        assert trouble(again.folder, again.key, again.parameters) == ""
    (pictures / "far" / "2.png").write_text("2")
    assert not make(**changes).resumed and make().key == none.key


def test_inputs_are_outputs_of_upstream_steps(project):
    names = {"run": "tiny", "out": "", "seed": 0, "images": 20, "sizes": [8, 8]}
    step = runs.begin("03_synthesis", names)
    assert step.input("02_lora_tuning") == project / "02_lora_tuning"
    assert step.inputs == {"02_lora_tuning/lora.txt": sha256_file(project / "02_lora_tuning" / "lora.txt")}
    for name, file, sentence in [
        ("01_prompt_augmentation", "words.csv", "has no output words.csv; it has prompts.csv"),
        ("04_robust_training", ".", "does not stand on"),
    ]:
        with pytest.raises(DiffsegError, match=sentence):
            step.input(name, file)
    (project / "01_prompt_augmentation" / "prompts.csv").write_text("other")
    with pytest.raises(DiffsegError, match="altered since 01_prompt_augmentation finished"):
        step.input("01_prompt_augmentation", "prompts.csv")
    (project / "01_prompt_augmentation" / "manifest.json").write_text('{"key": ')
    with pytest.raises(DiffsegError, match="needs 01_prompt_augmentation, which is not finished"):
        step.input("01_prompt_augmentation", "prompts.csv")


# whole runs


def test_a_finished_run_has_manifests(project):
    manifest = json.loads((project / "03_synthesis" / "manifest.json").read_text())
    assert list(manifest) == [
        *("step", "run", "key", "parameters", "versions", "git", "hardware", "started", "seconds", "resumed"),
        *("inputs", "outputs", "metrics"),
    ]
    assert manifest["parameters"] == {"seed": 0, "images": 20, "sizes": [8, 8]}
    assert manifest["versions"]["papermill"] and manifest["git"] is None and manifest["hardware"]["cores"] >= 1
    assert manifest["started"].endswith("+00:00") and not manifest["resumed"]
    prompts = project / "01_prompt_augmentation" / "prompts.csv"
    assert manifest["inputs"] == {"01_prompt_augmentation/prompts.csv": sha256_file(prompts)}
    assert manifest["outputs"] == hashes(project / "03_synthesis") and len(manifest["outputs"]) == 20
    assert runs.read_manifest(project / "02_lora_tuning")["parameters"]["rate"] == 1e-4
    executed = nbformat.read(project / "03_synthesis" / "notebook.ipynb", 4)
    assert executed.cells[-1].execution_count


def test_what_is_up_to_date_is_skipped_even_in_another_place(project, capsys):
    assert main(["run", "tiny"]) == 0
    assert capsys.readouterr().out.count("up to date") == 3
    assert main(["run", "tiny", "--only", "2-3", "--set", "rate=1.0e-4"]) == 0
    assert capsys.readouterr().out.count("up to date") == 2
    assert main(["run", "tiny", "--only", "3", "--set", "count=9"]) == 1
    assert "run 01_prompt_augmentation first, with --only 1: count changed" in capsys.readouterr().err
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert "three tiny steps" in listed and listed.count("done, ") == 3 and listed.count("absent") == 3


def test_a_changed_parameter_remakes_its_step_and_those_after_it(project, capsys):
    (project / "02_lora_tuning" / "stale.txt").write_text("of the old rate")
    assert main(["run", "tiny", "--set", "rate=0.25"]) == 0
    said = capsys.readouterr().out
    assert "01_prompt_augmentation: 1 of 3, up to date" in said
    assert "02_lora_tuning: 2 of 3, again because rate changed" in said and "03_synthesis: 3 of 3, done" in said
    assert list(runs.read_manifest(project / "02_lora_tuning")["outputs"]) == ["lora.txt"]
    assert len((project / "made.txt").read_text().split()) == 40


def test_an_altered_picture_is_noticed_and_only_it_is_remade(project, capsys):
    before = hashes(project)
    (project / "03_synthesis" / "JPEGImages" / "07.jpg").write_text("damaged")
    assert main(["run", "tiny"]) == 0
    assert "again because its file JPEGImages/07.jpg is missing or altered" in capsys.readouterr().out
    assert hashes(project) == before
    assert (project / "made.txt").read_text().split()[20:] == ["7"]


def test_a_failing_cell_is_one_sentence(project, capsys):
    assert main(["run", "tiny", "--set", "fail=true"]) == 1
    error = capsys.readouterr().err
    executed = project / "01_prompt_augmentation" / "notebook.ipynb"
    assert f"ValueError: the second line of an error (executed notebook: {executed})." in error
    assert runs.read_manifest(executed.parent) is None and executed.is_file()
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count("unfinished") == 1


def test_a_step_that_does_not_finish_and_a_dead_kernel(fresh, capsys):
    notebook = Path(os.environ["DIFFSEG_ROOT"]) / "notebooks" / "01_prompt_augmentation.ipynb"
    write_notebook(notebook, SHARED, "print('no finish')")
    with pytest.raises(DiffsegError, match="ended but it is not finished"):
        runs.run("tiny", only="1")
    assert "no finish" in capsys.readouterr().out
    write_notebook(notebook, SHARED, "import os\nos._exit(1)")
    with pytest.raises(DiffsegError, match="its kernel died"):
        kernel.execute(notebook, fresh / "x" / "notebook.ipynb", {"run": "tiny"}, fresh)


def test_interrupted_and_killed_runs_continue_with_the_same_bytes(project):
    expected = hashes(project)
    shutil.rmtree(project / "03_synthesis")
    (project / "made.txt").unlink()
    made_at = {}
    for number, code in [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]:
        pictures = len(hashes(project))
        (project / "kernel.pid").unlink()
        environment = {**os.environ, "PAUSE": "0.1"}
        command = [sys.executable, "-m", "diffseg", "run", "tiny"]
        runner = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            # what a shell starts in the background ignores Ctrl-C, and its children would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        wait_until(lambda: len(pictures_in(project)) >= pictures + 4)  # noqa: B023
        runner.send_signal(number)
        _, error = runner.communicate(timeout=60)
        assert runner.returncode == code
        assert number == signal.SIGKILL or "the same command continues" in error
        wait_until(lambda: not alive(int((project / "kernel.pid").read_text())))
        assert 0 < len(hashes(project)) < 20 and runs.read_manifest(project / "03_synthesis") is None
        for path in pictures_in(project / "03_synthesis"):
            assert made_at.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    runs.run("tiny")
    assert hashes(project) == expected
    assert (project / "made.txt").read_text().split() == [str(i) for i in range(20)]
    assert runs.read_manifest(project / "03_synthesis")["resumed"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120  # so that a defect fails instead of hanging
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_papermill_and_jupyter_from_other_folders_make_the_same(project, tmp_path, monkeypatch):
    expected = hashes(project), runs.read_manifest(project / "03_synthesis")["key"]
    notebook, parameters = (
        tmp_path / "notebooks" / "03_synthesis.ipynb",
        tmp_path / "notebooks/params/tiny.yaml",
    )
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(project / "03_synthesis")
    command = [
        sys.executable,
        "-m",
        "papermill",
        notebook,
        "out.ipynb",
        "-f",
        parameters,
        "--no-progress-bar",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, check=True, capture_output=True)
    assert (hashes(project), runs.read_manifest(project / "03_synthesis")["key"]) == expected

    shutil.rmtree(project / "03_synthesis")
    monkeypatch.chdir(notebook.parent)  # as JupyterLab runs it, cell by cell
    namespace = {}
    for cell in nbformat.read(notebook, 4).cells:
        exec(cell.source, namespace)
    assert (hashes(project), runs.read_manifest(project / "03_synthesis")["key"]) == expected


def test_the_command_line_needs_no_torch():
    code = "import sys, diffseg.lab.cli; assert not {'torch', 'papermill'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
