"""What moves a step's key, and what does not: one change of each kind, on the project's own notebooks."""

import json
import os
import shutil
from pathlib import Path

import pytest

import diffseg
from diffseg.files import sha256_file
from diffseg.lab import steps
from diffseg.lab.parameters import declared
from diffseg.lab.steps import STEPS, named_files, notebook_of, step_recipe
from diffseg.paths import project_root

REPOSITORY = Path(diffseg.__file__).parents[1]
ALL = list(STEPS)
FROM = {step: {step, *(later for later in STEPS if step in steps.upstream(later))} for step in STEPS}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A copy of the notebooks and of the package's code, whose keys can be changed by editing it."""
    shutil.copytree(REPOSITORY / "notebooks", tmp_path / "notebooks")
    shutil.copytree(REPOSITORY / "diffseg", tmp_path / "diffseg", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("DIFFSEG_ROOT", str(tmp_path))
    monkeypatch.setattr(steps, "PACKAGE", tmp_path / "diffseg")
    return tmp_path


def keys(**changes) -> dict[str, str]:
    """The keys of all steps of a run with the notebooks' defaults but for the changes."""
    found: dict[str, str] = {}
    for step in STEPS:
        values = declared(notebook_of(step))
        values |= {name: value for name, value in changes.items() if name in values}
        found[step] = steps.key_of(step_recipe(step, values, found))
    return found


def moved(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {step for step in STEPS if before[step] != after[step]}


def edit_cell(notebook: Path, cell_id: str, old: str, new: str) -> None:
    content = json.loads(notebook.read_text())
    cell = next(cell for cell in content["cells"] if cell["id"] == cell_id)
    source = "".join(cell["source"])
    assert old in source
    cell["source"] = source.replace(old, new)
    notebook.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"images": 7}, "01_prompt_augmentation"),
        ({"seed": 1}, "01_prompt_augmentation"),  # and 02, 04, 05 of their own
        ({"lora_rank": 4}, "02_lora_tuning"),
        ({"guidance_scale": 2.0}, None),  # 02's and 03's
        ({"jpeg_quality": 90}, "03_drawing"),
        ({"synthesis_batch": 4}, "03_drawing"),
        ({"beta": 0.3}, "03_synthesis"),
        ({"refiner": "none"}, "03_synthesis"),
        ({"attention_steps": "all"}, "03_synthesis"),
        ({"attention_resolutions": [8]}, "03_synthesis"),
        ({"attention_layers": ["up_blocks.*"]}, "03_synthesis"),
        ({"attention_softmax": "text"}, "03_drawing"),
        ({"iterations": 7}, "04_robust_training"),
        ({"bootstrap": 7}, "05_evaluation"),
        ({"workers": 3}, ""),
        ({"checkpoint_every": 7}, ""),
        ({"tensorboard_every": 7}, ""),
        ({"lora_checkpoint_every": 7}, ""),
        ({"evaluation_batch": 3}, ""),
        ({"grid_pictures": 0}, ""),
        ({"failed_share": 0.5}, ""),  # finished masks are not cut anew
        ({"run": "other", "out": "/tmp/x"}, ""),
    ],
)
def test_parameters(changes, first):
    found = moved(keys(), keys(**changes))
    if first is None:
        assert found == FROM["02_lora_tuning"]
    elif changes == {"seed": 1}:
        assert found == set(ALL)
    else:
        assert found == (FROM[first] if first else set())


def test_a_score_on_own_images_makes_nothing_before_it_anew(tmp_path):
    own = {"class_list": ["fox, none"], "train_real": False}
    folder = own | {"benchmark": "folder", "data_root": str(tmp_path), "data_names": {"red fox": "fox"}}
    assert moved(keys(**own), keys(**folder)) == FROM["05_evaluation"]
    before = keys(**folder)
    (tmp_path / "1.png").write_bytes(b"a labelled image")
    assert moved(before, keys(**folder)) == FROM["05_evaluation"]
    for real in ("train_real", "mix_real"):  # which reads the labelled images
        assert moved(before, keys(**folder | {real: True})) == FROM["04_robust_training"]
        for changes in ({"data_names": {}}, {"training_split": "val"}):
            assert moved(keys(**folder | {real: True}), keys(**folder | {real: True} | changes))
    assert keys(**folder | {"training_split": "val"}) == keys(**folder)  # no real image is trained on


@pytest.mark.parametrize(
    ("module", "old", "new", "first"),
    [
        ("masks.py", "scores.argmax(dim=0", "scores.argmin(dim=0", "03_synthesis"),
        ("masks.py", '"""From attention maps', '"""Out of attention maps', ""),  # a docstring
        ("masks.py", "import torch\n", "import torch  # tensors\n\n\n", ""),  # a comment and blank lines
        ("prompts.py", "rng.choice(templates)", "rng.choice([*templates])", "01_prompt_augmentation"),
        ("lora.py", "weight_decay=0.01", "weight_decay=0.02", "02_lora_tuning"),  # 03 loads LoRA with this module, too
        ("cotraining.py", "best <= confidence", "best < confidence", "04_robust_training"),
        ("benchmarks/metrics.py", "round(0.03 *", "round(0.04 *", "05_evaluation"),
        ("lab/runs.py", "time.time()", "time.time() + 0", ""),
        ("figures.py", "dpi=150", "dpi=200", ""),
        ("charts.py", 'xlabel="iteration"', 'xlabel="step"', ""),
        ("lab/report.py", "percent(", "percent (", ""),
        ("lab/report.py", 'synthetic["miou"] / real["miou"]', 'real["miou"] / synthetic["miou"]', "06_report"),
        ("small_sam.py", "return sam.eval()", "return sam.train()", "03_synthesis"),  # imported in a function
    ],
)
def test_code_of_the_package(root, module, old, new, first):
    before, path = keys(), root / "diffseg" / module
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    found = moved(before, keys())
    assert found == (FROM[first] if first else set())


def test_cells(root):
    before = keys()
    notebook = root / "notebooks" / "03_synthesis.ipynb"
    edit_cell(notebook, "closely", "picture_rows(", "picture_rows  (")
    edit_cell(notebook, "closely", "plt.show()", "plt.show()\nplt.close()")  # a figure
    edit_cell(notebook, "all", "cut_set(prompts", "# all of it\ncut_set(prompts")  # a comment
    edit_cell(notebook, "prompts-text", "prompt", "caption")  # prose
    assert not moved(before, keys())
    edit_cell(notebook, "all", "runs.meet()", "runs.meet(); 1 + 1")
    cut = keys()
    assert moved(before, cut) == FROM["03_synthesis"]
    edit_cell(notebook, "draw", "draw_set(pipeline", "1 + 1\n    draw_set(pipeline")
    assert moved(cut, keys()) == FROM["03_drawing"]


def test_files_that_parameters_name(root):
    (root / "captions.txt").write_text("a cat")
    pictures = root / "pictures"
    (pictures / "far").mkdir(parents=True)
    (pictures / ".ipynb_checkpoints").mkdir()
    (pictures / "far" / "1.png").write_text("1")
    network = root / "network"
    network.mkdir()
    (network / "model.safetensors").write_text("w")
    named = {
        "caption_file": "captions.txt",
        "target_images": "pictures",
        "initial_network": "network",
        "encoder_weights": "network",
    }
    before = keys(**named)
    assert moved(before, keys()) == set(ALL)
    shutil.copytree(network, root / "copy")
    assert not moved(before, keys(**named | {"initial_network": "copy", "encoder_weights": "copy"}))
    (pictures / ".ipynb_checkpoints" / "1.png").write_text("hidden")
    (root / "other.txt").write_text("named by none")
    assert not moved(before, keys(**named))
    for path, first in [
        (root / "captions.txt", "01_prompt_augmentation"),
        (pictures / "far" / "1.png", "02_lora_tuning"),
        (network / "model.safetensors", "04_robust_training"),
    ]:
        path.write_text(path.read_text() + " more")
        after = keys(**named)
        assert moved(before, after) == FROM[first]
        before = after


def test_the_miniature_is_known_by_its_bytes():
    named = steps.named_files({"generator": "mini", "data_root": "mini", "benchmark": "voc", "seed": 0})
    assert set(named) == {"generator", "data_root", "benchmark"}
    [weights] = [name for name in named["generator"] if name.endswith("unet/diffusion_pytorch_model.safetensors")]
    [found] = REPOSITORY.glob("diffseg/miniworld/weights/generator/unet/diffusion_pytorch_model.safetensors")
    assert named["generator"][weights] == sha256_file(found)
    assert "scenes.py" in named["data_root"] and "words_voc.csv" in named["benchmark"]


def test_each_benchmark_has_its_word_table_and_class_list():
    expected = {
        "voc": {"words_voc.csv"},
        "cityscapes-things": {"words_cityscapes.csv"},
        "imagenet-s-50": {"words_imagenet_s.csv", "imagenet_s_50.txt"},
        "imagenet-s-919": {"words_imagenet_s.csv", "imagenet_s_919.txt"},
        "mini-imagenet-s": {"words_mini-imagenet-s.csv", "imagenet_s_mini.txt"},
    }
    assert {name: set(named_files({"benchmark": name})["benchmark"]) for name in expected} == expected


def test_two_benchmarks_of_the_same_files_have_keys_of_their_own():
    both = "cityscapes", "cityscapes-things"
    assert len({str(named_files({"benchmark": name})) for name in both}) == 1
    assert moved(*(keys(benchmark=name) for name in both)) >= FROM["03_synthesis"]


def test_weights_below_a_hidden_folder_and_new_ones_of_the_same_size_count(tmp_path):
    path = tmp_path / ".cache" / "network" / "model.safetensors"
    path.parent.mkdir(parents=True)
    found = []
    for time, weights in enumerate(("old weights", "new weights")):
        path.write_text(weights)
        os.utime(path, ns=(0, time))
        found.append(named_files({"encoder_weights": str(path.parent)})["encoder_weights"])
    assert set(found[0]) == set(found[1]) == {"model.safetensors"} and found[0] != found[1]


def test_the_package_is_found_at_its_root():
    assert project_root() == REPOSITORY and steps.module_path("diffseg.masks") == REPOSITORY / "diffseg" / "masks.py"


def test_captions_above_the_target_images_count(tmp_path):
    folder = tmp_path / "streets" / "day"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"an image")
    before = named_files({"target_images": str(folder)})
    (tmp_path / "streets" / "metadata.jsonl").write_text('{"file_name": "day/0.png", "text": "a street"}\n')
    after = named_files({"target_images": str(folder)})
    assert set(after["target_images"]) - set(before["target_images"]) == {"../metadata.jsonl"}
    (tmp_path / "streets" / "metadata.jsonl").write_text('{"file_name": "day/0.png", "text": "a road"}\n')
    assert named_files({"target_images": str(folder)}) != after


def test_files_in_linked_folders_count_once_and_a_users_scripts_by_their_bytes(tmp_path):
    data, labels = tmp_path / "data", tmp_path / "labels"
    data.mkdir()
    labels.mkdir()
    (labels / "0.png").write_bytes(b"a label")
    (data / "old.py").write_text("print 'Python 2'")
    (data / "SegmentationClass").symlink_to(labels, target_is_directory=True)
    (labels / "back").symlink_to(data, target_is_directory=True)
    wanted = {"benchmark": "folder", "data_root": str(data)}
    before = named_files(wanted)["data_root"]
    assert set(before) == {"old.py", "SegmentationClass/0.png"}
    (labels / "0.png").write_bytes(b"a corrected label")
    assert named_files(wanted)["data_root"] != before


def test_the_wording_of_a_card_makes_nothing_anew(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = named_files({"encoder_weights": str(tmp_path)})
    (tmp_path / "README.md").write_text("# An encoder\n")
    assert before["encoder_weights"] and named_files({"encoder_weights": str(tmp_path)}) == before
