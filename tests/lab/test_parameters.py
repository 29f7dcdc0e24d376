"""Parameters: what a cell declares, what each value may be, and that a bad one is one sentence before anything runs."""

import itertools
import re
import subprocess
import sys
import typing
from pathlib import Path

import nbformat
import pytest
import yaml

from diffseg.errors import DiffsegError
from diffseg.lab import combinations
from diffseg.lab.cli import main
from diffseg.lab.combinations import check_together
from diffseg.lab.declarations import FILES, INERT, Parameters, check
from diffseg.lab.parameters import declared, parse_assignments, read_yaml

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("0[0-7]_*.ipynb"))
PARAMS = sorted((REPOSITORY / "notebooks" / "params").glob("*.yaml"))
STUDIES = sorted((REPOSITORY / "notebooks" / "studies").glob("*.yaml"))
# what a parameter file speaks to; notebooks 00 and 07 stand alone
CHAIN = {name: default for path in NOTEBOOKS[1:7] for name, default in declared(path).items()}


@pytest.fixture
def capable(monkeypatch):
    """As on a machine that has the extra package and a GPU."""
    monkeypatch.setattr(combinations, "lacks", lambda parameters: ())


def write_notebook(path, parameters):
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


# declarations


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_is_declared_and_its_default_passes(notebook, capable):
    parameters = declared(notebook)
    for name, default in parameters.items():
        annotation = Parameters.model_fields[name].annotation
        assert (typing.get_origin(annotation) or annotation) is type(default), name
    assert check(parameters, parameters, notebook.name) == parameters
    check_together(parameters, notebook.name)


def test_nothing_is_declared_that_no_notebook_has():
    assert set(Parameters.model_fields) == set().union(*map(declared, NOTEBOOKS))


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_every_parameter_file_passes(path, capable):
    values = CHAIN | check(read_yaml(path), CHAIN, path.name)
    if values["class_list"] and values["benchmark"] != "folder":  # run with --only 1-4, as there is nothing to score
        values = {name: values[name] for name in values.keys() - {"evaluation_split"}}
    check_together(values, path.name)


def test_the_lines_for_labelled_images_are_named_one_by_one_and_fit_together(tmp_path, capable):
    text = (REPOSITORY / "notebooks" / "params" / "own-words-sdxl.yaml").read_text(encoding="utf-8")
    *names, last = re.findall(r"^# ([a-z]\w+):", text, flags=re.MULTILINE)
    assert f"remove the # before {', '.join(names)} and {last}, and" in text.replace("\n#", "")
    path = tmp_path / "own.yaml"
    path.write_text(re.sub(r"^# (?=[a-z]\w+:)", "", text, flags=re.MULTILINE), encoding="utf-8")
    check_together(CHAIN | check(read_yaml(path), CHAIN, path.name), path.name)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_configuration_of_a_study_passes(path, capable):
    study = read_yaml(path)
    base = CHAIN | read_yaml(REPOSITORY / "notebooks" / "params" / f"{study['base']}.yaml")
    for name, changes in study["configurations"].items():
        check_together(base | check(changes, CHAIN, name), name)


def test_flags_are_of_parameters_that_hold_what_they_say():
    assert FILES == set(
        "caption_file encoder_weights generator generator_lora initial_network reference_network sam_checkpoint "
        "target_images".split()
    )
    assert INERT == set(
        "checkpoint_every evaluation_batch failed_share grid_pictures lora_checkpoint_every out run tensorboard_every "
        "workers".split()
    )
    assert all(Parameters.model_fields[name].annotation is str for name in FILES)


def test_checking_needs_neither_torch_nor_papermill():
    code = (
        "import sys, diffseg.lab.cli; from pathlib import Path\n"
        "from diffseg.lab.declarations import check; from diffseg.lab.parameters import declared\n"
        "known = declared(Path('notebooks/03_synthesis.ipynb'))\n"
        "check(known, known, 'x')\n"
        "assert not {'torch', 'papermill'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


# the cell


def test_declared_parameters_and_their_defaults(tmp_path):
    cell = "# the base\nimages = 20  # pictures\nsizes = [8, 8]  # height, width\n"
    assert declared(write_notebook(tmp_path / "a.ipynb", cell)) == {"images": 20, "sizes": [8, 8]}


@pytest.mark.parametrize("line", ["a: int = 1", "a = b = 1", "a = None", "a = 2 * 3", "import os", "a = (1, 2)"])
def test_parameters_cell_holds_plain_assignments_only(tmp_path, line):
    with pytest.raises(DiffsegError, match="may only hold lines"):
        declared(write_notebook(tmp_path / "a.ipynb", line))


# types


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
        ("cat", "", "cat"),
    ],
)
def test_values_take_the_type_of_the_default(value, default, expected):
    result = check({"name": value}, {"name": default}, "x.yaml")["name"]
    assert result == expected and type(result) is type(expected)


def test_the_elements_of_a_list_take_their_declared_type():
    assert check({"urn_powers": (1, "1e-2")}, CHAIN, "x.yaml") == {"urn_powers": [1.0, 0.01]}
    for name, value in (("urn_powers", [True]), ("attention_resolutions", [1.5]), ("places", [["a"]])):
        with pytest.raises(DiffsegError, match=rf"^`{name}\[0\]` is .* \(x.yaml\); it must be "):
            check({name: value}, CHAIN, "x.yaml")


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
        ("nan", 1.0),
        (float("inf"), 1.0),
        ("one", 1),
    ],
)
def test_lossy_values_are_refused_by_name(value, default):
    with pytest.raises(DiffsegError, match=r"^`speed` is .* \(x.yaml\); it must be .*\. (Set|Put)"):
        check({"speed": value}, {"speed": default}, "x.yaml")


def test_an_undeclared_name_is_checked_by_its_type_alone(tmp_path):
    parameters = declared(write_notebook(tmp_path / "a.ipynb", "count = 3\nrate = 0.5"))
    assert check({"count": -7, "rate": "1e-4"}, parameters, "x.yaml") == {"count": -7, "rate": 1e-4}
    check_together({"count": -7, "rate": 1e-4}, "x.yaml")
    with pytest.raises(DiffsegError, match="x.yaml gives the parameter cuont, .* did you mean count"):
        check({"cuont": 1}, parameters, "x.yaml")


def test_who_edits_the_cell_is_not_told_to_set_the_same_value_again(tmp_path):
    parameters = declared(write_notebook(tmp_path / "a.ipynb", "height = 63"))
    with pytest.raises(DiffsegError, match=r"must be a multiple of 8\. Correct the parameters cell\.$"):
        check({"height": 63}, parameters, "a.ipynb")


# values: each as one writes it in YAML, the rule in the sentence, and the remedy

BAD_VALUES = """
seed                  | -1                    | greater than or equal to 0  | Set `seed=0`
seed                  | 9223372036854775808   | less than                   | Set `seed=0`
seed                  | 2020-01-01            | a whole number              | Set `seed=0`
run                   |                       | be a valid string               | Set `run=
run                   | ../x                  | letters, digits             | Set `run=
run                   | a/b/c                 | letters, digits             | Set `run=
run                   | .hidden               | letters, digits             | Set `run=
run                   | 2020-01-01            | be a valid string               | Put it in quotes
out                   | "a\\0b"               | one line                    | Set `out=
images                | 0                     | equal to 1                  | Set `images=
images                | 100000000000          | less than or equal          | Set `images=
images                | many                  | a whole number              | Set `images=
images                | .inf                  | a whole number              | Set `images=
height                | 63                    | a multiple of 8             | Set `height=64`
height                | 0                     | equal to 8                  | Set `height=64`
width                 | 1000001               | a multiple of 8             | Set `width=8192`
lora_width            | 4                     | a multiple of 8             | Set `lora_width=8`
sampling_steps        | 0                     | equal to 1                  | Set `sampling_steps=8`
guidance_scale        | .nan                  | a finite number             | Set `guidance_scale=4.0`
guidance_scale        | -1                    | equal to 0                  | Set `guidance_scale=4.0`
class_list            | dragon                | be a valid list             | Set `class_list=["dragon"]`
class_list            | [1]                   | a valid string              | Put it in quotes
data_root             | ""                    | at least 1 character        | Set `data_root=mini`
templates             | []                    | at least 1 item             | Set `templates=
templates             | [a photo]             | hold one {}                 | Set `templates=
templates             | ["{} and {}"]         | hold one {}                 | Set `templates=
templates             | ["{} {where}"]        | hold one {}                 | Set `templates=
places                | at home               | be a valid list              | Set `places=
places                | ["near {}"]           | hold no braces              | Set `places=
plain_share           | 1.5                   | less than or equal to 1     | Set `plain_share=0.3`
hyponym_depth         | -1                    | equal to 0                  | Set `hyponym_depth=9`
classes_per_prompt    | 0                     | equal to 1                  | Set `classes_per_prompt=1`
balance_classes       | 1                     | be a valid boolean          | Set `balance_classes=true`
negative_prompt       | "a\\nb"               | one line                    | Set `negative_prompt=
lora_captions         | []                    | at least 1 item             | Set `lora_captions=
lora_caption_dropout  | 1                     | less than 1                 | Set `lora_caption_dropout=0.1`
lora_rank             | 0                     | equal to 1                  | Set `lora_rank=8`
lora_learning_rate    | 0                     | greater than 0              | Set `lora_learning_rate=0.001`
lora_held_out         | 1.0                   | less than 1                 | Set `lora_held_out=0.25`
lora_pictures         | 1                     | equal to 2                  | Set `lora_pictures=32`
attention_resolutions | []                    | at least 1 item             | Set `attention_resolutions=[16]`
attention_resolutions | [16, 0]               | equal to 1                  | Set `attention_resolutions=[16]`
inverted_above        | 1.1                   | less than or equal to 1     | Set `inverted_above=
beta                  | 1                     | less than 1                 | Set `beta=
jpeg_quality          | 500                   | equal to 100                | Set `jpeg_quality=95`
synthesis_batch       | 0                     | equal to 1                  | Set `synthesis_batch=8`
failed_share          | -0.1                  | equal to 0                  | Set `failed_share=
self_attention        | -16                   | equal to 0                  | Set `self_attention=
crop                  | 0                     | equal to 8                  | Set `crop=64`
scale_jitter          | [1]                   | two numbers                 | Set `scale_jitter=[0.9, 1.1]`
scale_jitter          | [2, 1]                | the smaller first           | Set `scale_jitter=[0.9, 1.1]`
scale_jitter          | [0, 1]                | greater than 0              | Set `scale_jitter=[0.9, 1.1]`
colour_jitter         | 3                     | less than or equal to 2     | Set `colour_jitter=0.1`
ema                   | 1                     | less than 1                 | Set `ema=0.0`
reliable_share        | 0                     | greater than 0              | Set `reliable_share=0.8`
urn_powers            | []                    | at least 1 item             | Set `urn_powers=
urn_powers            | [1, -2]               | greater than 0              | Set `urn_powers=
iterations            | 0                     | equal to 1                  | Set `iterations=400`
workers               | -1                    | equal to 0                  | Set `workers=0`
evaluation_scales     | []                    | at least 1 item             | Set `evaluation_scales=[1.0]`
evaluation_scales     | [-1]                  | greater than 0              | Set `evaluation_scales=[1.0]`
bootstrap             | 0                     | equal to 1                  | Set `bootstrap=1000`
compared_resolutions  | ["8+"]                | map sizes                   | Set `compared_resolutions=
compared_layers       | ["up_blocks.*+"]      | patterns joined             | Set `compared_layers=
compared_betas        | [0.2, 1.0]            | less than 1                 | Set `compared_betas=
timing_repetitions    | 0                     | equal to 1                  | Set `timing_repetitions=3`
"""
BAD = [tuple(cell.strip() for cell in line.split("|")) for line in BAD_VALUES.strip().splitlines()]


@pytest.mark.parametrize(("name", "text", "rule", "remedy"), BAD, ids=[f"{row[0]}={row[1]}" for row in BAD])
def test_a_value_out_of_range_is_refused_by_name_with_its_remedy(name, text, rule, remedy):
    known = CHAIN | declared(NOTEBOOKS[7]) if name not in CHAIN else CHAIN
    with pytest.raises(DiffsegError) as refused:
        check({name: yaml.safe_load(text)}, known, "bad.yaml")
    sentence = str(refused.value)
    assert re.match(rf"`{name}(\[\d\])?` is .+ \(bad\.yaml\); it must ", sentence) and "\n" not in sentence
    assert rule in sentence.partition("it must ")[2] and remedy in sentence


@pytest.mark.parametrize(
    "value", ["9" * 5000, 10**5000, -(10**400), "x" * 10**6], ids=["text", "beyond str", "number", "long"]
)
def test_long_values_make_short_sentences(value):
    names = ["images", "seed", "run", "beta"] if not isinstance(value, str) else ["images", "run"]
    for name in names:
        with pytest.raises(DiffsegError) as refused:
            check({name: value}, CHAIN, "bad.yaml")
        assert name in str(refused.value) and len(str(refused.value)) < 300


def test_a_list_that_holds_itself_is_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(DiffsegError, match=r"`places(\[0\])?` is something of type list"):
        check({"places": endless}, CHAIN, "01_prompt_augmentation.ipynb")


# parameters together

HUB = {"generator": "owner/model", "height": 512, "width": 512}
TOGETHER = [
    ({"benchmark": "coco"}, "`benchmark` is \"coco\" .* one of voc, imagenet-s-50"),
    ({"generator_precision": "int8"}, "`generator_precision` .* one of fp32, fp16, bf16"),
    ({"refiner": "crff"}, "`refiner` is \"crff\" .* one of none, pamr.* such as crf"),
    ({"sam_model": "vit_x"}, "`sam_model` .* vit_b"),
    ({"segmenter": "deeplab"}, "`segmenter` .* deeplabv3plus-resnet101"),
    ({"training_mode": "robust"}, "`training_mode` .* cotrain, selftrain, urn"),
    ({"optimizer": "adam"}, "`optimizer` .* adamw, sgd"),
    ({"training_precision": "fp8"}, "`training_precision` .* bf16"),
    ({"lora_precision": ""}, "`lora_precision` is \"\" .* fp32"),
    ({"reliable_rule": "half"}, "`reliable_rule` is \"half\""),
    ({"attention_steps": "often"}, "`attention_steps` is \"often\" .* of the 8 .* Set `attention_steps=all`"),
    ({"attention_steps": "4-8"}, "`attention_steps` .* 0 to 7"),
    ({"attention_steps": "6-4"}, "`attention_steps` .* 0 to 7"),
    ({"attention_steps": "9" * 3000}, "`attention_steps` .* 0 to 7"),
    ({"sampling_steps": 4}, "`attention_steps` .* of the 4 denoising steps 0 to 3"),
    ({"kept_steps": "2-3"}, "`kept_steps` .* each, or 4-7 as attention_steps"),
    ({"kept_steps": "each", "refiner": "self-attention", "self_attention": 0}, "`self_attention` is 0 .*=16`"),
    ({"refiner": "self-attention", "self_attention": 16}, "`kept_steps` is \"each\" .* Set `kept_steps=4-7`"),
    ({"benchmark": "cityscapes"}, "`benchmark` is \"cityscapes\" .* Set `benchmark=cityscapes-things`"),
    ({"refiner": "sam"}, "`sam_checkpoint` is \"\" .* the refiner sam needs one. Set it to a file"),
    ({"class_list": ["fox", "Fox"], "train_real": False}, "'fox' of the class list is there twice"),
    ({"class_list": ["fox"]}, "`train_real` is true .* Set `train_real=false`"),
    ({"class_list": ["fox"], "train_real": False, "mix_real": True}, "`mix_real` is true"),
    ({"evaluation_split": "validation"}, "`evaluation_split` is \"validation\" .* splits train, val"),
    ({"training_split": "train-semi"}, "`training_split` is \"train-semi\" .* splits train, val"),
    ({"training_split": "val"}, "`training_split` is \"val\" .* share no image with the split val, .* Leave it empty"),
    ({"training_split": "trainval"}, "`training_split` is \"trainval\" .* no image with the split val"),
    ({"evaluation_split": "train"}, "`evaluation_split` is \"train\" .* no image with the split train"),
    ({"classes_per_prompt": 21}, "`classes_per_prompt` is 21 .* at most 20, the number of classes"),
    ({"benchmark": "cityscapes-things", "classes_per_prompt": 9}, "`classes_per_prompt` .* at most 8"),
    ({"class_list": ["fox"], "train_real": False, "classes_per_prompt": 2}, "`classes_per_prompt` .* at most 1"),
    ({"lora_candidates": 301}, "`lora_candidates` .* at most lora_steps, 300"),
    ({"lora_words": []}, "`lora_words` .* hold a word"),
    ({"target_images": "mini", "lora_held_out": 0}, "`lora_held_out` is 0.* judge the 3 candidates"),
    ({"target_images": "mini", "generator_lora": "a.safetensors"}, "`generator_lora` .* tunes .* without it"),
    (HUB | {"target_images": "mini"}, "`lora_height` is 64 .* 256 for a generator of the hub"),
    ({"segmenter": "fpn-resnet18"}, "`encoder_weights` .* made for resunet-resnet10t. Set `encoder_weights=\"\"`"),
    ({"segmenter": "deeplabv3plus-resnet18", "training_batch": 1}, "`training_batch` .* Set `training_batch=2`"),
    ({"mixing": 0.5, "training_batch": 1}, "`training_batch` is 1 .* pasted from one image .*, or `mixing=0`"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), TOGETHER, ids=[str(changes)[:60] for changes, _ in TOGETHER])
def test_what_does_not_fit_together_is_refused(changes, sentence, capable):
    values = CHAIN | check(changes, CHAIN, "bad.yaml")
    with pytest.raises(DiffsegError, match=sentence) as refused:
        check_together(values, "bad.yaml")
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_steps": "0"},
        {"attention_steps": "middle", "kept_steps": "middle"},
        {"caption_file": "captions.txt", "classes_per_prompt": 30},
        {"segmenter": "segformer-b0", "encoder_weights": "", "training_batch": 1},
        {"refiner": "sam", "sam_checkpoint": "mini"},
        {"kept_steps": "each"},
        {"training_split": "val", "train_real": False},
        HUB,  # nothing is tuned
    ],
)
def test_what_fits_together_passes(changes, capable):
    check_together(CHAIN | check(changes, CHAIN, "good.yaml"), "good.yaml")


def test_the_compared_lists_of_the_ablation():
    values = declared(NOTEBOOKS[7])
    for changes, name in (({"compared_steps": ["all", "13"]}, "compared_steps"), ({"compared_refiners": ["x"]}, "x")):
        with pytest.raises(DiffsegError, match=name):
            check_together(values | changes, "bad.yaml")


def test_what_this_machine_lacks_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(combinations, "find_spec", lambda name: None)
    for changes, sentence in [
        ({"refiner": "crf"}, "needs the package pydensecrf2. Set `refiner=pamr`, or run pip install pydensecrf2"),
        ({"evaluation_crf": True}, "Set `evaluation_crf=false`, or run pip install"),
    ]:
        with pytest.raises(DiffsegError, match=sentence):
            check_together(CHAIN | changes, "x.yaml")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for changes in (
        {"lora_precision": "fp16", "target_images": "mini"},
        {"lora_precision": "bf16", "target_images": "mini"},
        {"training_precision": "bf16"},
    ):
        [(name, value), *_] = changes.items()
        sentence = rf'`{name}` is "{value}" \(x.yaml\); it must be fp32 here, as there is no GPU.* Set `{name}=fp32`.'
        with pytest.raises(DiffsegError, match=sentence):
            check_together(CHAIN | changes, "x.yaml")
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
        check_together(CHAIN | changes, "x.yaml")
        monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    check_together(CHAIN | {"lora_precision": "fp16", "target_images": ""}, "x.yaml")


# YAML and the command line

BAD_YAML = {
    "seed: 1\nseed: 2": "in line 2: seed is given twice; keep one",
    "configurations:\n  a: {beta: 0.1}\n  a: {beta: 0.2}": "in line 3: a is given twice",
    "places: &a [*a]": "in line 1: an alias",
    "a: &x {beta: 1}\nb:\n  <<: *x": "an alias",
    "b:\n  <<: {beta: 1}": "in line 2: a merge key",
    "seed: " + "9" * 5000: "a number of thousands of digits",
    "seed: 2020-13-45": "an impossible date",
    "seed: !!bool x": "not valid YAML",
    "seed: !!python/object/apply:os.system [ls]": "not valid YAML",
    "places: " + "[" * 20_000: "nested too deeply",
    "run: [": "not valid YAML",
    "a: b: c": "not valid YAML in line 1: a text with",
    "run: a\x07": "not valid YAML",
    "- a\n- b": "must hold lines `name: value`",
    "just a text": "must hold lines `name: value`",
}


@pytest.mark.parametrize("text", BAD_YAML, ids=lambda text: text[:20])
def test_bad_yaml_is_one_sentence_with_the_file(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DiffsegError, match="bad.yaml") as refused:
        read_yaml(path)
    assert BAD_YAML[text] in str(refused.value) and len(str(refused.value)) < 300 + len(str(path))
    assert "\n" not in str(refused.value)


def test_what_is_no_text_file_is_one_sentence(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for path, sentence in [
        (tmp_path, "cannot read the parameter file .*Is a directory"),
        (tmp_path / "binary.yaml", "is not a text in UTF-8"),
        (tmp_path / "absent.yaml", "cannot read the parameter file .*No such file"),
        (Path("a\0.yaml"), "cannot read the parameter file"),
        (Path("a" * 5000 + ".yaml"), "cannot read the parameter file"),
    ]:
        with pytest.raises(DiffsegError, match=sentence):
            read_yaml(path)


def test_an_empty_file_and_equal_names_apart_are_fine(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
    path.write_text("a: {beta: 1}\nb: {beta: 1}\n")
    assert read_yaml(path) == {"a": {"beta": 1}, "b": {"beta": 1}}


def test_set_reads_yaml():
    assert parse_assignments(["a=1", "b=[x, y]", "c=", "d=u=v"]) == {"a": 1, "b": ["x", "y"], "c": "", "d": "u=v"}


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["a"], "--set takes name=value, not \"a\""),
        (["=1"], "--set takes name=value"),
        (["a=[1"], "--set a is not valid YAML"),
        (["a=1", "b=2", "a=2"], "--set gives a twice; keep one"),
        (["a=*b"], "--set a is not valid YAML"),
        (["a=" + "9" * 5000], "--set a is not valid YAML"),
        (["a=" + "{" * 5000], "--set a is not valid YAML"),
        (["a" * 5000], "5002 characters"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_bad_assignments_are_one_sentence(assignments, sentence):
    with pytest.raises(DiffsegError, match=sentence) as refused:
        parse_assignments(assignments)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("imagse=3", "--set gives the parameter imagse, which no notebook declares; did you mean images?"),
        ("height=63", "`height` is 63 (--set); it must be a multiple of 8. Set `height=64`."),
        ("bootstrap=0", "`bootstrap` is 0 (--set)"),
        ("run=../x", '`run` is "../x" (--set)'),
        ("training_mode=robust", '`training_mode` is "robust"'),
    ],
)
def test_the_command_refuses_before_anything_runs(assignment, sentence, tmp_path, capsys):
    assert main(["run", "smoke", "--out", str(tmp_path / "out"), "--set", assignment]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not list(itertools.chain(tmp_path.rglob("*.ipynb"), tmp_path.rglob("*.csv")))


def test_what_was_trained_on_is_not_scored_by_a_later_command(tmp_path, capsys):
    command = ["run", "smoke", "--out", str(tmp_path / "out"), "--set", "train_real=true", "training_split=val"]
    assert main([*command, "--only", "5"]) == 1
    assert "share no image with the split val" in capsys.readouterr().err


def test_a_data_set_that_is_not_there_is_found_before_anything_runs(tmp_path):
    values = {"benchmark": "voc", "class_list": [], "data_root": str(tmp_path), "train_real": True}
    with pytest.raises(DiffsegError, match="JPEGImages is missing: get"):
        check_together(values, "voc.yaml")
    with pytest.raises(DiffsegError, match="SegmentationClassAug"):
        check_together(values | {"training_split": "trainaug"}, "voc.yaml")
    check_together(values | {"train_real": False}, "voc.yaml")  # nothing is going to be read
    check_together(values | {"data_root": "mini"}, "voc.yaml")  # made when it is first read
    own = values | {"class_list": ["fox"], "train_real": False}
    check_together(own, "voc.yaml")
    for split in ("", "dev"):  # nor are own classes scored on a benchmark's images, which is found out now
        with pytest.raises(DiffsegError, match="`benchmark` is .voc. .*be folder, .* Set `benchmark=folder`"):
            check_together(own | {"evaluation_split": split}, "voc.yaml")
