"""Studies on a project of five tiny notebooks: what is shared, continued, refused, and written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from test_runs import CELLS, REPOSITORY, SHARED, alive, make_project, pictures_in, wait_until, write_notebook

import diffseg
from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.labels import write_prediction
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.errors import DiffsegError
from diffseg.figures import as_array
from diffseg.files import sha256_file
from diffseg.lab import runs
from diffseg.lab.cli import main
from diffseg.lab.publishing import main as publish
from diffseg.lab.publishing import run_table
from diffseg.lab.sharing import claimed
from diffseg.lab.studies import load_study, study_files
from diffseg.lab.study_pictures import predictions_figure
from diffseg.lab.study_results import caption, class_table, table

MORE = {
    "04_robust_training": (
        "train_real = False  # the upper line\nmode = 'plain'  # how\n",
        '(step.folder / "network.txt").write_text(f"{seed} {mode}")\nstep.finish(["*.txt"], {"images": 20})',
    ),
    # scores that can be added by hand: 0.50 + 0.01 x seed + 0.20 for cotrain; real 0.75
    "05_evaluation": (
        "bonus = 0.0  # of every score\n",
        """
import json
_, mode = step.input("04_robust_training", "network.txt").read_text().split()
miou = 0.5 + 0.01 * seed + (0.2 if mode == "cotrain" else 0) + bonus
classes = {"iou/cat": miou + 0.1, "iou/dog": None if mode == "cotrain" else miou - 0.1}
made = {"synthetic": {"benchmark": "voc", "images": 600, "miou": miou, "group/Pet": miou / 2, **classes}}
if mode == "plain":
    made["real"] = {"benchmark": "voc", "images": 600, "miou": 0.75, "iou/cat": 0.8, "iou/dog": 0.7}
(step.folder / "evaluation.json").write_text(json.dumps(made))
step.finish(["evaluation.json"], made)
""",
    ),
}
STUDY = """# does it help?
base: tiny
only: 1-5
seeds: [0, 1, 2]
configurations:
  plain: {mode: plain}
  cotrain: {mode: cotrain}
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project with the study `robust`, without a run."""
    make_project(tmp_path)
    for step, (parameters, code) in MORE.items():
        write_notebook(tmp_path / "notebooks" / f"{step}.ipynb", SHARED + parameters, code)
    (tmp_path / "notebooks" / "studies").mkdir()
    (tmp_path / "notebooks" / "studies" / "robust.yaml").write_text(STUDY)
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    return tmp_path


def in_process(step: str, **values) -> None:
    """Run a tiny notebook's cells here, as JupyterLab would, without a kernel's seconds."""
    namespace = {}
    parameters, *cells = nbformat.read(Path(os.environ["DIFFSEG_ROOT"]) / "notebooks" / f"{step}.ipynb", 4).cells
    exec(parameters.source, namespace)
    namespace |= {name: value for name, value in values.items() if name in namespace}
    for cell in cells:
        exec(cell.source, namespace)


def make_runs_in_process(only: slice = slice(None)) -> None:
    for run in load_study("robust").runs[only]:
        for step in (*CELLS, *MORE):
            in_process(step, **run.values)


# what is refused, before anything runs


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("mode: cotrain", "mood: cotrain", "the configuration cotrain of robust.yaml gives the parameter mood"),
        ("mode: cotrain", "images: many", "parameter images must be a whole number"),
        ("mode: cotrain", "seed: 3", "must not set seed in the configuration cotrain"),
        ("mode: cotrain", "run: x", "must not set run"),
        ("cotrain: {", "../x: {", "the run's name must be made of letters"),
        ("base: tiny", "base: tinny", "no parameters named tinny .* did you mean tiny"),
        ("base: tiny", "base: 3", "robust.yaml needs base"),
        ("only: 1-5", "only: 1-9", "asks for a step that is not there"),
        ("only: 1-5", "onyl: 1-5", "robust.yaml has an unknown entry onyl"),
        ("[0, 1, 2]", "[0, 0]", "robust.yaml needs seeds"),
        ("[0, 1, 2]", "[true]", "robust.yaml needs seeds"),
        ("configurations:\n", "configurations: []\nx:\n", "unknown entry x"),
        ("# does it help?", "", "must begin with a comment"),
        ("plain: {mode: plain}", "plain: 7", "gives the configuration plain no parameters"),
    ],
)
def test_a_wrong_study_is_one_sentence_before_anything_runs(root, capsys, old, new, sentence):
    assert old in STUDY
    (root / "notebooks" / "studies" / "robust.yaml").write_text(STUDY.replace(old, new))
    assert main(["study", "robust"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(DiffsegError, match=sentence):
        raise DiffsegError(error)
    assert not (root / "results").exists()


def test_unknown_studies_jobs_and_a_run_of_the_same_name(root, capsys):
    assert main(["study", "robst"]) == 1
    assert "no study named robst in notebooks/studies; did you mean robust?" in capsys.readouterr().err
    assert main(["study", "robust", "--jobs", "0"]) == 1
    assert "--jobs must be 1 or more" in capsys.readouterr().err
    (root / "notebooks" / "params" / "robust.yaml").write_text("run: robust")
    assert main(["study", "robust"]) == 1
    assert "has the name of a parameter file" in capsys.readouterr().err


def test_every_study_of_this_repository_passes_the_check(monkeypatch):
    monkeypatch.delenv("DIFFSEG_ROOT", raising=False)
    assert {"augmentation", "lora", "robust", "scaling", "techniques"} <= {path.stem for path in study_files()}
    for path in study_files():
        study = load_study(path.stem)
        assert len(study.seeds) >= 3 and len(study.runs) == len(study.seeds) * len(study.configurations)


# what is shared


def test_a_finished_step_of_the_base_run_is_linked_and_an_altered_one_is_not(root, capsys):
    for step in ("01_prompt_augmentation", "02_lora_tuning"):
        in_process(step, rate=1e-4)
    base, folder = root / "results" / "runs" / "tiny", root / "results" / "runs" / "robust" / "plain-0"
    runs.run("tiny", "1-2", {"run": "plain-0"}, out=str(folder.parent), share=True)
    assert "01_prompt_augmentation: 1 of 5, shared with tiny" in capsys.readouterr().out
    for step in ("01_prompt_augmentation", "02_lora_tuning"):
        assert os.readlink(folder / step) == f"../../tiny/{step}"
    # a link holds as long as the other run's step does, and nothing of it is altered through the link
    runs.run("tiny", "1-2", {"run": "plain-0"}, out=str(folder.parent), share=True)
    assert capsys.readouterr().out.count("up to date") == 2
    in_process("02_lora_tuning", run="plain-0", out=str(folder.parent), rate=0.25)
    assert not (folder / "02_lora_tuning").is_symlink()
    assert (base / "02_lora_tuning" / "lora.txt").read_text() == "0.0001"
    assert (folder / "02_lora_tuning" / "lora.txt").read_text() == "0.25"
    (base / "01_prompt_augmentation" / "prompts.csv").write_text("altered")
    runs.run("tiny", "1", {"run": "plain-0"}, out=str(folder.parent), share=True)
    assert "again because its file prompts.csv is missing or altered" in capsys.readouterr().out
    assert not (folder / "01_prompt_augmentation").is_symlink()
    assert (base / "01_prompt_augmentation" / "prompts.csv").read_text() == "altered"
    shutil.rmtree(folder / "01_prompt_augmentation")
    (folder / "01_prompt_augmentation").symlink_to("../../gone/01_prompt_augmentation")
    in_process("01_prompt_augmentation", run="plain-0", out=str(folder.parent))  # in place of a link to nothing
    assert runs.read_manifest(folder / "01_prompt_augmentation")


def test_a_step_whose_earlier_step_changed_meanwhile_does_not_count(root):
    for step in ("01_prompt_augmentation", "02_lora_tuning"):
        in_process(step)
    code = CELLS["03_synthesis"][1] + '\n(step.folder.parent / "02_lora_tuning" / "manifest.json").unlink()'
    write_notebook(root / "notebooks" / "03_synthesis.ipynb", SHARED + CELLS["03_synthesis"][0], code)
    with pytest.raises(DiffsegError, match="a step before 03_synthesis changed while it ran"):
        runs.run("tiny", "3", {"rate": 0.5})
    assert runs.read_manifest(root / "results" / "runs" / "tiny" / "03_synthesis") is None


def test_the_right_to_make_a_step_is_one_at_a_time(root, capsys):
    order = []

    def second():
        with claimed("k", "03_synthesis"):
            order.append("second")

    with claimed("k", "03_synthesis"), claimed("other", "03_synthesis"):
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: "waits for another run" in capsys.readouterr().out)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_two_jobs_interrupted_and_continued_make_each_step_once(root):
    """Two configurations that differ in the number of pictures have prompts and LoRA in common."""
    (root / "notebooks" / "studies" / "robust.yaml").unlink()
    study = "# which?\nbase: tiny\nonly: 1-3\nseeds: [0]\nconfigurations: {few: {images: 6}, many: {images: 9}}\n"
    (root / "notebooks" / "studies" / "sizes.yaml").write_text(study)
    parameters, code = CELLS["01_prompt_augmentation"]
    count = 'open(step.folder.parents[1] / "prompts-made.txt", "a").write("x")\nimport os, time; time.sleep(1)\n'
    write_notebook(root / "notebooks" / "01_prompt_augmentation.ipynb", SHARED + parameters, count + code)
    folder = root / "results" / "runs" / "sizes"
    command = [sys.executable, "-m", "diffseg", "study", "sizes", "--jobs", "2"]
    options = dict(cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(
        command,
        env={**os.environ, "PAUSE": "0.3"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
    wait_until(lambda: all(len(pictures_in(folder / run)) >= 2 for run in ("few-0", "many-0")) or process.poll())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in error
    for run in ("few-0", "many-0"):
        wait_until(lambda: not alive(int((folder / run / "kernel.pid").read_text())))  # noqa: B023
    assert len(pictures_in(folder)) < 15

    done = subprocess.run(command, env=os.environ, **options)
    assert done.returncode == 0, done.stderr
    assert (folder / "prompts-made.txt").read_text() == "x"
    assert [(folder / run / "made.txt").read_text().split() for run in ("few-0", "many-0")] == [
        [str(i) for i in range(count)] for count in (6, 9)
    ]
    for step in ("01_prompt_augmentation", "02_lora_tuning"):
        assert sorted((folder / run / step).is_symlink() for run in ("few-0", "many-0")) == [False, True]
    assert not any((folder / run / "03_synthesis").is_symlink() for run in ("few-0", "many-0"))
    assert "up to date" in (folder / "few-0.log").read_text()
    threads = runs.read_manifest(folder / "few-0" / "03_synthesis")["hardware"]["threads"]
    assert threads == os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    rows = pd.read_csv(root / "results" / "tables" / "sizes.csv")
    assert list(rows.configuration) == ["few", "many"] and list(rows.seeds) == [1, 1]
    assert (rows.seconds_03 > 0).all() == False  # resumed: the first attempt's seconds are not known  # noqa: E712


def test_a_failing_run_is_named_and_the_others_are_kept(root, capfd):
    (root / "notebooks" / "studies" / "robust.yaml").unlink()
    study = "# which?\nbase: tiny\nonly: 1\nseeds: [0]\nconfigurations: {bad: {fail: true}, good: {}}\n"
    (root / "notebooks" / "studies" / "fails.yaml").write_text(study)
    in_process("01_prompt_augmentation")  # so that the good one is linked
    assert main(["study", "fails"]) == 1
    out, error = capfd.readouterr()
    assert "bad-0: failed" in out and "good-0: done" in out and "not finished: bad-0" in out
    assert "of the study fails, bad-0 failed" in error
    assert list(pd.read_csv(root / "results" / "tables" / "fails.csv").seeds) == [0, 1]


# what is written


def test_tables_record_and_figure_by_hand(root, capsys, monkeypatch):
    make_runs_in_process()
    assert main(["study"]) == 0
    assert "robust          6 of 6 runs     does it help?" in capsys.readouterr().out
    from diffseg.lab.study_results import write_results

    write_results(load_study("robust"))
    said = capsys.readouterr().out
    results = root / "results"
    rows = pd.read_csv(results / "tables" / "robust.csv").set_index("configuration")
    assert list(rows.index) == ["plain", "cotrain"] and list(rows.seeds) == [3, 3] and list(rows.images) == [20, 20]
    # 50, 51, 52 and 70, 71, 72: mean 51 and 71, sample standard deviation 1; groups are half of it
    assert list(rows.synthetic_miou) == [51, 71] and list(rows.synthetic_miou_spread) == [1, 1]
    assert list(rows.synthetic_Pet) == [25.5, 35.5] and list(rows.synthetic_Pet_spread) == [0.5, 0.5]
    assert rows.real_miou["plain"] == 75 and rows.real_miou_spread["plain"] == 0 and pd.isna(rows.real_miou["cotrain"])
    assert "51.0" in said and "not finished" not in said
    steps = [f"seconds_0{k}" for k in range(1, 6)]
    assert rows.loc["plain", "seconds"] == pytest.approx(rows.loc["plain", steps].sum(), abs=1e-9)

    classes = pd.read_csv(results / "tables" / "robust_classes.csv").set_index("class")
    assert list(classes.columns) == ["plain", "plain real", "cotrain"]
    assert list(classes.loc["cat"]) == [61, 80, 81]
    assert classes.loc["dog", "plain"] == 41 and pd.isna(classes.loc["dog", "cotrain"])

    record = json.loads((results / "studies" / "robust.json").read_text())
    assert record["missing"] == [] and list(record["runs"]) == [
        f"{name}-{seed}" for name in ("plain", "cotrain") for seed in range(3)
    ]
    run = record["runs"]["cotrain-2"]
    assert run["parameters"]["mode"] == "cotrain" and run["parameters"]["seed"] == 2
    manifest = results / "runs" / "robust" / "cotrain-2" / "05_evaluation" / "manifest.json"
    assert run["steps"]["05_evaluation"]["manifest"] == sha256_file(manifest)
    assert run["steps"]["05_evaluation"]["metrics"]["synthetic"]["miou"] == pytest.approx(0.72)
    assert record["versions"][0]["diffseg"] and record["hardware"][0]["cores"]
    # the tables can be made again from the record alone
    assert table(record).to_csv(index=False) == (results / "tables" / "robust.csv").read_text()
    assert class_table(record).to_csv(index=False) == (results / "tables" / "robust_classes.csv").read_text()

    words = " ".join((results / "figures" / "robust.txt").read_text().split())
    assert words.startswith("does it help? Means on 600 voc pictures") and "seeds 0, 1, 2" in words
    assert "20 synthetic pictures" in words and re.search(r"\d cores? of", words)
    (root / "README.md").write_text("<!-- table: results/tables/robust.csv -->\n<!-- /table -->\n")
    assert publish([]) == 0
    lines = (root / "README.md").read_text().splitlines()
    assert lines[1] == "| configuration | seeds | images | mIoU (%) | Pet (%) | seconds |"
    assert lines[3].startswith("| plain | 3 | 20 | 51.0 ± 1.0 | 25.5 ± 0.5 |")
    assert lines[4].startswith("| cotrain | 3 | 20 | 71.0 ± 1.0 | 35.5 ± 0.5 |")
    assert lines[5].startswith("| real pictures, true masks | 3 | | 75.0 ± 0.0 |") and lines[6] == "<!-- /table -->"
    monkeypatch.setattr(diffseg, "__version__", "99.0")  # a later version says who measured
    assert publish([]) == 0
    assert f"\n\nMeasured with diffseg {record['versions'][0]['diffseg']}.\n" in (root / "README.md").read_text()
    for suffix in (".png", ".pdf"):
        assert (results / "figures" / f"robust{suffix}").stat().st_size > 1000


def test_predictions_of_a_study_lie_side_by_side(tmp_path):
    """One network that is right everywhere and one that sees background only; the third has no predictions."""
    study = load_study("robust")
    study = replace(study, runs=[replace(run, folder=tmp_path / run.name) for run in study.runs])
    assert predictions_figure(study) is None
    validation = open_split(VOC, data_folder("mini"), VOC.evaluation_split)
    shown = [validation[0], validation[len(validation) - 1]]
    for run in study.runs:
        if run.configuration in ("plain", "cotrain"):
            for name, _, label in shown:
                seen = label.masked_fill(label == VOC.ignore, 0) if run.configuration == "plain" else 0 * label
                write_prediction(run.folder / "05_evaluation/predictions/synthetic", name, seen, VOC, label.shape)
    figure = predictions_figure(study, columns=2)
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    assert len(pictures) == 4 * 2 and {axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()} <= {
        "picture", "true mask", "plain", "cotrain"
    }  # fmt: skip
    for k, (_, image, label) in enumerate(shown):
        picture, true, plain, cotrain = pictures[k::2]
        assert (picture == as_array(image)).all() and (cotrain == picture).all()
        valid = label.numpy() != VOC.ignore
        assert (plain[valid] == true[valid]).all() and (plain[valid] != picture[valid]).any()


def test_an_incomplete_study_says_so(root, capsys):
    make_runs_in_process(slice(0, 4))
    from diffseg.lab.study_results import record

    found = record(load_study("robust"))
    rows = table(found).set_index("configuration")
    assert list(rows.seeds) == [3, 1] and pd.isna(rows.synthetic_miou_spread["cotrain"])
    assert rows.synthetic_miou["cotrain"] == 70
    assert found["missing"] == ["cotrain-1", "cotrain-2"]
    assert "Not finished: cotrain-1, cotrain-2." in " ".join(caption(found).split())
    assert main(["study"]) == 0
    assert "4 of 6 runs" in capsys.readouterr().out
    # a parameter that changes in the file makes the runs that were made with the old one count no more
    (root / "notebooks" / "studies" / "robust.yaml").write_text(STUDY.replace("mode: plain", "mode: plain, bonus: 0.1"))
    assert record(load_study("robust"))["missing"] == ["plain-0", "plain-1", "plain-2", "cotrain-1", "cotrain-2"]


def test_publish_is_one_sentence_for_studies_and_unfinished_runs(root, capsys):
    make_runs_in_process(slice(0, 1))
    for arguments, sentence in [
        (["results/runs/none"], "there is no run results/runs/none"),
        ([str(root / "results" / "runs" / "robust")], "is a study; diffseg study robust has written its results"),
        ([str(root / "results" / "runs" / "robust" / "plain-0")], "06_report is not finished or was altered"),
        (["a", "b"], "name one run"),
    ]:
        assert publish(arguments) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1


def test_the_table_of_a_run_without_the_real_network_has_one_row():
    summary = json.loads((REPOSITORY / "results" / "mini-voc" / "summary.json").read_text())
    lines = run_table(summary | {"miou_real": None, "miou_real_interval": None, "ratio": None}).splitlines()
    assert lines[:3] == run_table(summary).splitlines()[:3] and lines[3] == ""
