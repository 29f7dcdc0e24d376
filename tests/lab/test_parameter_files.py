"""The paper-scale parameter files: each notebook runs with them up to where weights or data are missing, and says so.

The notebooks' cells are executed here, in this process and offline. What comes before a notebook is made by hand with
the package's own functions, since the real thing takes GPUs.
"""

import json
import re
import shutil

import huggingface_hub.constants
import matplotlib
import numpy as np
import papermill
import pytest
from helpers import release
from PIL import Image

from diffseg.benchmarks.classes import BENCHMARKS, get_benchmark
from diffseg.benchmarks.labels import write_picture_label
from diffseg.errors import DiffsegError
from diffseg.lab import combinations, runs
from diffseg.lab.manifests import read_manifest
from diffseg.lab.parameters import declared, is_parameters, read_cells, read_yaml
from diffseg.lab.steps import STEPS
from diffseg.lab.steps import notebook_of as notebook_path
from diffseg.paths import project_root
from diffseg.prompts import augment, find_words, write_prompts
from diffseg.words import load_words

PAPER = ("voc", "imagenet-s", "cityscapes")
PARAMS = project_root() / "notebooks" / "params"
each_paper = pytest.mark.parametrize("name", PAPER)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to run in, without a network, a cache of models or a window, on a machine that lacks no package
    and no GPU, so that the notebooks themselves come to speak."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(combinations, "lacks", lambda parameters: ())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "models"))
    matplotlib.use("Agg")
    yield tmp_path
    release()


def values_of(name, step, place):
    """The step's parameters with the file's values; data is looked for below `place`, where there is none."""
    values = declared(notebook_path(step))
    values |= {n: value for n, value in read_yaml(PARAMS / f"{name}.yaml").items() if n in values}
    below = {n: str(place / values[n]) for n in ("data_root", "target_images") if str(values.get(n)).startswith("data")}
    return values | below | {"out": str(place)}


def execute(name, step, place):
    """Execute a notebook's cells; return the DiffsegError's sentence, or "" when it ends."""
    namespace = {"__name__": "__main__"} | values_of(name, step, place)
    try:
        for cell in read_cells(notebook_path(step)):
            if cell["cell_type"] == "code" and not is_parameters(cell):
                exec(cell["source"], namespace)
    except DiffsegError as error:
        return str(error)
    return ""


def make_upstream(name, place):
    """Finish steps 1 to 4 by hand: two prompts, no LoRA, two pictures, and no network."""
    benchmark = get_benchmark(read_yaml(PARAMS / f"{name}.yaml")["benchmark"])
    words = runs.begin("01_prompt_augmentation", values_of(name, "01_prompt_augmentation", place))
    write_prompts(words.folder / "prompts.csv", augment(load_words(benchmark.name), 2))
    words.finish(["prompts.csv"])
    tuning = runs.begin("02_lora_tuning", values_of(name, "02_lora_tuning", place))
    (tuning.folder / "tuning.json").write_text(json.dumps({"tuned": False}))
    tuning.finish(["tuning.json"])
    values = values_of(name, "03_synthesis", place)
    drawn = runs.begin("03_drawing", values)
    (drawn.folder / "drawn.txt").write_text("by hand")
    drawn.finish(["drawn.txt"])
    made = runs.begin("03_synthesis", values)
    for folder in ("JPEGImages", "Reliability", "ImageSets/Segmentation"):
        (made.folder / folder).mkdir(parents=True, exist_ok=True)
    for k in range(2):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(made.folder / "JPEGImages" / f"{k}.jpg")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(made.folder / "Reliability" / f"{k}.png")
        label = np.full((8, 8), benchmark.num_classes - 1)
        write_picture_label(made.folder / "SegmentationClass" / f"{k}.png", label, benchmark)
    (made.folder / "ImageSets" / "Segmentation" / "train.txt").write_text("0\n1\n")
    made.finish(["JPEGImages/*", "SegmentationClass/*", "Reliability/*", "ImageSets/Segmentation/train.txt"])
    trained = runs.begin("04_robust_training", values_of(name, "04_robust_training", place))
    (trained.folder / "losses.csv").write_text("iteration\n")
    trained.finish(["losses.csv"])


# Whose constant it is, as a comment or a text may say it.
SOURCE = r"\bpaper\b|OVAM|BECO|URN\b|[Oo]ur choice|Stable Diffusion's|diffusers|min-SNR|notebook 07"
# What a file may mark as the paper's (by OVAM's account, or in its figures) or as BECO's; every other value is our own.
KNOWN = {
    "paper": {
        "images": 168679,
        "sampling_steps": 100,
        "attention_resolutions": [16, 32, 64],
        "attention_steps": "middle",
        "beta": 0.2,
        "refiner": "crf",
        "training_mode": "cotrain",
    },
    "BECO": {
        "segmenter": "deeplabv3plus-resnet101",
        "encoder_weights": "imagenet",
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "weight_decay": 1e-4,
        "training_batch": 16,
        "crop": 512,
        "reliable_share": 0.5,
        "warmup_pixels": "reliable",
        "peer_classes": "all",
        "peer_refiner": "none",
        "mixing": 0.5,
        "iterations": 80 * 10582 // 16,
    },
}
# What is run, on which files and machine, and how much of it is shown: no part of the method.
SETTINGS = """
    run out seed benchmark class_list generator data_root target_images caption_file initial_network sam_checkpoint
    sam_model images grid_pictures lora_pictures train_real mix_real height width synthesis_batch evaluation_batch
    generator_precision generator_offload training_precision checkpoint_every workers kept_steps failed_share
""".split()


def comments(name: str) -> dict[str, tuple[str, str]]:
    """Each key of a parameter file -> the comment at its line, or else the line above it, and the block's comment."""
    found, block, above = {}, "", ""
    for line in (PARAMS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            block = above = f"{above} {line.lstrip('# ')}".strip()
        else:
            if key := re.match(r"(\w+):(.*)", line):
                found[key[1]] = key[2].partition("  # ")[2] or above, block
            above = ""
    return found


@each_paper
def test_every_constant_has_its_source_or_says_that_it_is_our_choice(name):
    values, said = read_yaml(PARAMS / f"{name}.yaml"), comments(name)
    assert values["benchmark"] in BENCHMARKS and values["generator"] != "mini" and values["data_root"] != "mini"
    for constant in ("sampling_steps", "beta", "refiner", "attention_steps", "generator_precision", "segmenter"):
        assert constant in values, f"{constant} would be mini's"
    head = " ".join(said["run"])
    assert "everything else is our choice, with the reason" in head.lower() and "[paper]" in head
    marks = {key: re.match(r"(?:\d\d )?\[(paper|BECO)[],]", own) for key, (own, _) in said.items()}
    marked = {(mark[1], key) for key, mark in marks.items() if mark}
    for source, key in marked:
        assert values[key] == KNOWN[source][key], f"{key} is not what is known of {source}"
    known = {(source, key) for source, constants in KNOWN.items() for key in constants if key in values}
    for _, key in known - marked:  # another value than theirs, or theirs by the block's comment
        assert re.search(SOURCE, " ".join(said[key])) or "AdamW" in said[key][0], f"{key} does not say whose it is"
    if name == "voc":  # the file of the published number follows its sources throughout
        assert marked == known and len(known) == sum(map(len, KNOWN.values()))


@pytest.mark.parametrize("name", [*PAPER, "mini-voc", "mini-imagenet-s", "mini-cityscapes"])
def test_no_template_or_place_names_a_class_word_that_no_span_would_label(name):
    values = declared(notebook_path("01_prompt_augmentation")) | read_yaml(PARAMS / f"{name}.yaml")
    words = load_words(values["benchmark"])
    assert not [text for text in values["templates"] + values["places"] if find_words(text, words)]


def test_every_constant_of_the_method_names_its_source_in_a_comment_or_a_text():
    """Once for each name, as a name means the same in every notebook; what is off by default is no constant."""
    said, texts, constants = {}, [], set()
    for name in PAPER:
        for key, words in comments(name).items():
            said[key] = said.get(key, "") + " ".join(words)
    for step in list(STEPS)[:5]:
        below = ""  # "this and all below: our choice"
        defaults = declared(notebook_path(step))
        for key, parameter in papermill.inspect_notebook(notebook_path(step)).items():
            assert len(parameter["help"].split()) > 1 or key == "seed", f"{key} does not say what it is"
            below = below or (parameter["help"] if "and all below" in parameter["help"] else "")
            said[key] = f"{said.get(key, '')} {parameter['help']} {below}"
            constants |= {key} if defaults[key] else set()
        cells = [cell["source"] for cell in read_cells(notebook_path(step)) if cell["cell_type"] == "markdown"]
        texts += [text for cell in cells for text in cell.split("\n\n")]
    without = {
        key
        for key in constants.difference(SETTINGS)
        if not re.search(SOURCE, said[key])
        and not any(f"`{key}`" in text and re.search(SOURCE, text) for text in texts)
    }
    assert not without


def check_generator_sentence(sentence):
    assert "the generator 'stable-diffusion-v1-5/stable-diffusion-v1-5' cannot be loaded" in sentence
    assert "go online once, or give a local folder in diffusers' layout or a .safetensors file" in sentence
    assert "\n" not in sentence


@each_paper
def test_without_the_generators_tokenizer_its_name_and_the_remedy_are_said(name, place):
    check_generator_sentence(execute(name, "01_prompt_augmentation", place))


@each_paper
def test_without_the_generators_weights_its_name_and_the_remedy_are_said(name, place):
    make_upstream(name, place)
    shutil.rmtree(place / "steps" / "03_drawing")
    check_generator_sentence(execute(name, "03_synthesis", place))


@each_paper
def test_without_the_target_domains_pictures_their_folder_is_said(name, place):
    sentence = execute(name, "02_lora_tuning", place)
    if read_yaml(PARAMS / f"{name}.yaml").get("target_images"):
        assert str(place / "data" / "leftImg8bit" / "train") in sentence and "give a folder" in sentence
    else:  # nothing is tuned, so nothing is missing
        assert sentence == "" and read_manifest(place / "runs" / name / "02_lora_tuning")


@each_paper
def test_without_the_data_the_official_place_and_the_tree_are_said(name, place):
    benchmark = get_benchmark(read_yaml(PARAMS / f"{name}.yaml")["benchmark"])
    for step in ("04_robust_training", "05_evaluation"):
        make_upstream(name, place)
        sentence = execute(name, step, place)
        assert f"there is no data root {place / 'data'}" in sentence and "data_root" in sentence, step
    (place / "data").mkdir()
    make_upstream(name, place)
    sentence = execute(name, "05_evaluation", place)
    assert str(place / "data" / benchmark.folder) in sentence and "is missing: get" in sentence
    assert benchmark.source in sentence and "unpack" in sentence


@each_paper
def test_a_report_without_its_steps_names_the_one_to_run_first(name, place):
    sentence = execute(name, "06_report", place)
    assert "06_report needs 01_prompt_augmentation, which this run has not made" in sentence
    for step in ("03_synthesis", "04_robust_training", "05_evaluation"):
        assert "which this run has not made; run that step first" in execute(name, step, place), step
