"""Studies on a project of five tiny notebooks: what is shared, continued, refused, and written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from helpers import release
from PIL.ImageColor import getrgb
from test_runs import CELLS, REPOSITORY, SHARED, alive, images_in, make_project, wait_until, write_notebook

import diffseg
from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.labels import write_prediction
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.errors import DiffsegError
from diffseg.figures import ERRORS, as_array, study_predictions
from diffseg.files import sha256_file
from diffseg.lab import runs, studies, study_results
from diffseg.lab.cli import main
from diffseg.lab.studies import load_study, study_files
from diffseg.lab.study_results import caption, class_table, study_record, study_table, write_results

MORE = {
    "04_robust_training": (
        "train_real = False  # the upper bound\nmode = 'baseline'  # how\n",
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
if mode == "baseline":
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
  baseline: {mode: baseline}
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
    release()


def make_runs_in_process(only: slice = slice(None)) -> None:
    for run in load_study("robust").runs[only]:
        for step in (*CELLS, *MORE):
            in_process(step, **run.values)


# what is refused, before anything runs


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("mode: cotrain", "mood: cotrain", "the configuration cotrain of robust.yaml gives the parameter mood"),
        (
            "mode: cotrain",
            "images: many",
            "`images` is .many. .the configuration cotrain of robust.yaml.; it must be a whole",
        ),
        ("mode: cotrain", "seed: 3", "must not set seed in the configuration cotrain"),
        ("mode: cotrain", "run: x", "must not set run"),
        ("cotrain: {", "../x: {", "must be made of letters"),
        ("base: tiny", "base: tinny", "no parameter file in .* named tinny; did you mean tiny"),
        ("base: tiny", "base: 3", "robust.yaml needs base"),
        ("only: 1-5", "only: 1-9", "asks for what is not there"),
        ("only: 1-5", "onyl: 1-5", "robust.yaml has an unknown entry onyl"),
        ("[0, 1, 2]", "[0, 0]", "robust.yaml needs seeds"),
        ("[0, 1, 2]", "[true]", "robust.yaml needs seeds"),
        ("configurations:\n", "configurations: []\nx:\n", "unknown entry x"),
        ("# does it help?", "", "must begin with a comment"),
        ("baseline: {mode: baseline}", "baseline: 7", "gives the configuration baseline no parameters"),
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


def test_a_studys_question_is_all_of_its_first_comment(root):
    (root / "notebooks" / "studies" / "robust.yaml").write_text(f"# Long questions\n{STUDY}# no part of it\n")
    assert load_study("robust").question == "Long questions does it help?"


def test_a_name_that_the_method_does_not_know_is_found_before_the_first_run(root, capsys):
    notebook = root / "notebooks" / "04_robust_training.ipynb"
    notebook.write_text(notebook.read_text().replace("mode", "training_mode"))
    study = root / "notebooks" / "studies" / "robust.yaml"
    study.write_text(STUDY.replace("{mode:", "{training_mode:").replace("cotrain}", "cotrian}"))
    assert main(["study", "robust"]) == 1
    error = capsys.readouterr().err
    assert "(the configuration cotrain of robust.yaml); it must be one of baseline, ensemble" in error
    assert not list(root.glob("results/steps/*"))


def test_a_study_finds_its_runs_where_its_base_has_them_written(root, tmp_path):
    (root / "notebooks" / "params" / "tiny.yaml").write_text(f"run: tiny\nout: {tmp_path / 'scratch'}\n")
    make_runs_in_process(slice(0, 1))
    found = study_record(load_study("robust"))
    assert list(found["runs"]) == ["baseline-0"] and not (root / "results" / "steps").exists()


def test_unknown_studies_jobs_and_a_run_of_the_same_name(root, capsys):
    assert main(["study", "robst"]) == 1
    assert "notebooks/studies named robst; did you mean robust?" in capsys.readouterr().err
    assert main(["study", "robust", "--jobs", "0"]) == 1
    assert "--jobs must be 1 or more" in capsys.readouterr().err
    (root / "notebooks" / "params" / "robust.yaml").write_text("run: robust")
    assert main(["study", "robust"]) == 1
    assert "has the name of a parameter file" in capsys.readouterr().err


def test_every_study_of_this_repository_passes_the_check(monkeypatch):
    monkeypatch.delenv("DIFFSEG_ROOT", raising=False)
    assert "scaling" in {path.stem for path in study_files()}
    for path in study_files():
        study = load_study(path.stem)
        assert len(study.seeds) >= 3 and len(study.runs) == len(study.seeds) * len(study.configurations)


# what is made


@pytest.mark.slow
def test_two_jobs_terminated_and_continued_make_each_step_once(root):
    """Two configurations that differ in the number of images have prompts and LoRA in common."""
    (root / "notebooks" / "studies" / "robust.yaml").unlink()
    study = "# which?\nbase: tiny\nonly: 1-3\nseeds: [0]\nconfigurations: {few: {images: 12}, many: {images: 15}}\n"
    (root / "notebooks" / "studies" / "sizes.yaml").write_text(study)
    parameters, cells = CELLS["01_prompt_augmentation"]
    count = 'open(step.run.parent / "prompts-made.txt", "a").write("x")\nimport time; time.sleep(1)\n'
    write_notebook(root / "notebooks" / "01_prompt_augmentation.ipynb", SHARED + parameters, count + cells[0])
    folder = root / "results" / "runs" / "sizes"
    command = [sys.executable, "-m", "diffseg", "study", "sizes", "--jobs", "2"]
    options = dict(cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, env={**os.environ, "PAUSE": "0.5"}, **options)
    wait_until(lambda: all(len(images_in(folder / run)) >= 2 for run in ("few-0", "many-0")) or process.poll())
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command continues" in error
    for run in ("few-0", "many-0"):
        wait_until(lambda: not alive(int((folder / run / "kernel.pid").read_text())))  # noqa: B023
    assert sum(len(images_in(folder / run)) for run in ("few-0", "many-0")) < 27

    done = subprocess.run(command, env=os.environ, **options)
    assert done.returncode == 0, done.stderr
    assert (folder / "prompts-made.txt").read_text() == "x"
    assert [(folder / run / "made.txt").read_text().split() for run in ("few-0", "many-0")] == [
        [str(i) for i in range(count)] for count in (12, 15)
    ]
    assert (folder / "few-0" / "02_lora_tuning").resolve() == (folder / "many-0" / "02_lora_tuning").resolve()
    assert "up to date" in (folder / "few-0.log").read_text()
    threads = runs.read_manifest(folder / "few-0" / "03_synthesis")["hardware"]["threads"]
    assert threads == os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    rows = pd.read_csv(root / "results" / "tables" / "sizes.csv")
    assert list(rows.configuration) == ["few", "many"] and list(rows.seeds) == [1, 1]
    assert rows.seconds_03.isna().all()  # resumed: the first attempt's seconds are not known


@pytest.mark.slow
def test_jobs_divide_the_gpus(root, monkeypatch):
    study = "# which?\nbase: tiny\nonly: 1\nseeds: [0, 1]\nconfigurations: {one: {}}\n"
    (root / "notebooks" / "studies" / "devices.yaml").write_text(study)
    parameters, cells = CELLS["01_prompt_augmentation"]
    note = 'import os\n(step.run / "device.txt").write_text(os.environ["CUDA_VISIBLE_DEVICES"])\n'
    write_notebook(root / "notebooks" / "01_prompt_augmentation.ipynb", SHARED + parameters, note + cells[0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert main(["study", "devices", "--jobs", "2"]) == 0
    folder = root / "results" / "runs" / "devices"
    assert [(folder / f"one-{seed}" / "device.txt").read_text() for seed in range(2)] == ["4", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert studies.visible_devices() == []


@pytest.mark.slow
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


def test_tables_record_and_figure_by_hand(root, capsys):
    make_runs_in_process()
    assert main(["study"]) == 0
    assert "robust          6 of 6 runs     does it help?" in capsys.readouterr().out
    write_results(load_study("robust"))
    said = capsys.readouterr().out
    results = root / "results"
    rows = pd.read_csv(results / "tables" / "robust.csv").set_index("configuration")
    assert list(rows.index) == ["baseline", "cotrain"] and list(rows.seeds) == [3, 3] and list(rows.images) == [20, 20]
    # 50, 51, 52 and 70, 71, 72: mean 51 and 71, sample standard deviation 1; groups are half of it
    assert list(rows.synthetic_miou) == [51, 71] and list(rows.synthetic_miou_spread) == [1, 1]
    assert list(rows.synthetic_Pet) == [25.5, 35.5] and list(rows.synthetic_Pet_spread) == [0.5, 0.5]
    assert rows.real_miou["baseline"] == 75 and rows.real_miou_spread["baseline"] == 0
    assert pd.isna(rows.real_miou["cotrain"])
    assert "51.0" in said and "not finished" not in said
    steps = [f"seconds_0{k}" for k in range(1, 6)]
    assert rows.loc["baseline", "seconds"] == pytest.approx(rows.loc["baseline", steps].sum(), abs=1e-9)

    # seeds 0, 1 and 2 each gain the same
    assert rows.loc["cotrain", ["gain", "gain_low", "gain_high"]].tolist() == [20, 20, 20]
    assert rows.loc["baseline", ["gain", "gain_low", "gain_high"]].isna().all()

    classes = pd.read_csv(results / "tables" / "robust_classes.csv").set_index("class")
    assert list(classes.columns) == ["baseline", "baseline real", "cotrain"]
    assert list(classes.loc["cat"]) == [61, 80, 81]
    assert classes.loc["dog", "baseline"] == 41 and pd.isna(classes.loc["dog", "cotrain"])

    record = json.loads((results / "studies" / "robust.json").read_text())
    assert record["missing"] == [] and list(record["runs"]) == [
        f"{name}-{seed}" for name in ("baseline", "cotrain") for seed in range(3)
    ]
    run = record["runs"]["cotrain-2"]
    assert run["parameters"]["mode"] == "cotrain" and run["parameters"]["seed"] == 2
    manifest = results / "runs" / "robust" / "cotrain-2" / "05_evaluation" / "manifest.json"
    assert run["steps"]["05_evaluation"]["manifest"] == sha256_file(manifest)
    assert run["steps"]["05_evaluation"]["metrics"]["synthetic"]["miou"] == pytest.approx(0.72)
    assert record["versions"][0]["diffseg"] and record["hardware"][0]["cores"]
    # the tables can be made again from the record alone
    assert study_table(record).to_csv(index=False) == (results / "tables" / "robust.csv").read_text()
    assert class_table(record).to_csv(index=False) == (results / "tables" / "robust_classes.csv").read_text()

    words = " ".join((results / "figures" / "robust.txt").read_text().split())
    assert words.startswith(
        "does it help? Means and 95 % intervals over seeds 0, 1, 2, one tick a seed; 600 voc images;"
    )
    assert "20 synthetic images" in words and re.search(r"\d cores? of", words)
    (root / "README.md").write_text("<!-- table: results/tables/robust.md -->\n<!-- /table -->\n")
    assert main(["publish"]) == 0
    lines = (root / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[1] == ["configuration", "seeds", "images", "mIoU (%)", "Pet (%)", "seconds"]
    assert cells[3][:-1] == ["baseline", "3", "20", "51.0 ± 1.0", "25.5 ± 0.5"]
    assert cells[4][:-1] == ["cotrain", "3", "20", "71.0 ± 1.0", "35.5 ± 0.5"]
    assert cells[5] == ["real images, ground-truth masks", "3", "", "75.0 ± 0.0", "", ""]
    assert lines[6:] == ["", f"Measured with diffseg {diffseg.__version__}.", "<!-- /table -->"]
    for suffix in (".png", ".pdf"):
        assert (results / "figures" / f"robust{suffix}").stat().st_size > 1000


def recorded_run(configuration: str, seed: int, miou: float) -> dict:
    """What a record holds of a run that trained on 20 synthetic images, and was interrupted when it has images-180."""

    def step(resumed: bool = False, **metrics) -> dict:
        return {"seconds": 10.0, "resumed": resumed, "metrics": metrics}

    made = {"03_synthesis": step(images=20), "04_robust_training": step(configuration == "images-180", images=50)}
    made["05_evaluation"] = step(synthetic={"miou": miou, "images": 600, "benchmark": "voc"})
    return {"configuration": configuration, "seed": seed, "steps": made}


def test_gains_are_over_the_configuration_before_images_the_synthetic_and_seconds_whole():
    scores = {"images-45": (0.5, 0.6), "images-180": (0.6, 0.9), "images-20": (0.7, 0.8)}  # in no alphabet's order
    found = {
        f"{name}-{seed}": recorded_run(name, seed, miou)
        for name, mious in scores.items()
        for seed, miou in enumerate(mious)
    }
    table = study_table({"configurations": dict.fromkeys(scores), "runs": found})
    assert list(table.configuration) == list(scores) and table.images.tolist() == [20] * 3
    assert table.gain.tolist()[1:] == [20, 0] and pd.isna(table.gain["images-45"])
    assert table.seconds.tolist()[::2] == [30, 30] and pd.isna(table.seconds["images-180"])
    assert table.seconds_03.tolist() == [10] * 3


def test_predictions_of_a_study_lie_side_by_side(tmp_path, monkeypatch):
    """One network that is right everywhere and one that sees background only; the others have no predictions."""
    study = load_study("scaling")
    monkeypatch.setattr(study_results, "finished_steps", lambda _, run: {"05_evaluation": tmp_path / run.name})
    assert study_results.prediction_folders(study) == {}
    validation = open_split(VOC, data_folder("mini"), VOC.evaluation_split)
    shown = [validation[0], validation[len(validation) - 1]]
    right, wrong = list(study.configurations)[:2]
    for configuration in (right, wrong):
        for name, _, label in shown:
            seen = label.masked_fill(label == VOC.ignore, 0) if configuration == right else 0 * label
            folder = tmp_path / f"{configuration}-{study.seeds[0]}" / "predictions" / "synthetic"
            write_prediction(folder, name, seen, VOC, label.shape)
    figure = study_predictions(study_results.prediction_folders(study), VOC, "mini", VOC.evaluation_split, columns=2)
    drawn = [axis.images[0].get_array() for axis in figure.axes]
    titles = [text.get_text() for text in figure.texts]
    assert len(drawn) == 4 * 2 and titles == ["image", "ground truth", right, wrong]
    notes = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert notes == [[]] * 4 + [["100 %"]] * 2 + [["0 %"]] * 2
    for k, (_, image, label) in enumerate(shown):
        shown_image, truth, first, second = drawn[k::2]
        assert (shown_image == as_array(image)).all()
        objects = (label.numpy() > 0) & (label.numpy() != VOC.ignore)
        assert (truth[objects] != shown_image[objects]).any()
        assert (first[objects] == getrgb(ERRORS["correct"])).all() and (
            second[objects] == getrgb(ERRORS["missed"])
        ).all()
        assert (first[~objects] == second[~objects]).all()


def test_an_incomplete_study_says_so(root, capsys):
    make_runs_in_process(slice(0, 4))
    found = study_record(load_study("robust"))
    rows = study_table(found).set_index("configuration")
    assert list(rows.seeds) == [3, 1] and pd.isna(rows.synthetic_miou_spread["cotrain"])
    assert rows.synthetic_miou["cotrain"] == 70 and rows.gain["cotrain"] == 20 and pd.isna(rows.gain_low["cotrain"])
    assert found["missing"] == ["cotrain-1", "cotrain-2"]
    assert "Not finished: cotrain-1, cotrain-2." in " ".join(caption(found, "Means").split())
    assert main(["study"]) == 0
    assert "4 of 6 runs" in capsys.readouterr().out
    # a parameter that changes in the file makes the runs that were made with the old one count no more
    changed = STUDY.replace("mode: baseline", "mode: baseline, bonus: 0.1")
    (root / "notebooks" / "studies" / "robust.yaml").write_text(changed)
    missing = study_record(load_study("robust"))["missing"]
    assert missing == ["baseline-0", "baseline-1", "baseline-2", "cotrain-1", "cotrain-2"]


def test_publish_is_one_sentence_for_studies_and_unfinished_runs(root, capsys):
    make_runs_in_process(slice(0, 1))
    for argument, sentence in [
        ("results/runs/none", "results/runs/none; `diffseg list` names those in results/runs"),
        (str(root / "results" / "runs" / "robust"), "is a study; diffseg study robust has written its results"),
        (str(root / "results" / "runs" / "robust" / "baseline-0"), "cannot be published: it is not finished"),
    ]:
        assert main(["publish", argument]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
