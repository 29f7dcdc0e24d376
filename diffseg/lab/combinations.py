"""Which values of parameters fit together, and this machine: what `declarations` cannot say of a single value."""

import difflib
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from diffseg.errors import DiffsegError
from diffseg.lab import processes
from diffseg.lab.declarations import OneOf, Parameters, refusal
from diffseg.paths import is_short_name, locate


def check_together(parameters: dict[str, Any], source: str, defaults: Mapping[str, Any] = {}) -> None:
    """Compare parameters with one another and with the names that the method knows; raise DiffsegError for the first
    that does not fit.

    parameters: checked values of one or more notebooks, defaults among them. A rule is applied where all its
    parameters are there. `source` says in an error where the values come from. defaults: values that are taken for
    known names, because to look one up loads a part of the method, which takes seconds. Looks for the extra package
    and the GPU that some values need, so it belongs on the machine that is to run.
    """
    for name, field in Parameters.model_fields.items():
        for choice in (mark for mark in field.metadata if isinstance(mark, OneOf) and name in parameters):
            value = parameters[name]
            if value == defaults.get(name):
                continue
            for element in value if isinstance(value, list) else [value]:
                if element not in (names := choice.names()):
                    [close] = difflib.get_close_matches(element[:80], names, n=1, cutoff=0)
                    raise refusal(
                        name, element, source, f"be one of {', '.join(names)}", f"Choose one, such as {close}."
                    )
    rules = drawing_conflicts, data_conflicts, tuning_conflicts, training_conflicts, lacks
    # (name, what it must be, remedy) of each parameter that does not fit the others or this machine
    for name, rule, remedy in [found for each in rules for found in each(parameters)]:
        raise refusal(name, parameters[name], source, rule, remedy)


def given(parameters: Mapping[str, Any], *names: str) -> bool:
    return all(name in parameters for name in names)


def drawing_conflicts(parameters: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Of the generator, the steps and maps that are kept, and the masks (notebooks 03 and 07)."""
    from diffseg.sampling_steps import parse_steps

    get = parameters.get
    for name in ("attention_steps", "kept_steps", "compared_steps"):
        value = get(name, [])
        for text in [value] if isinstance(value, str) else value:
            if "sampling_steps" in parameters and not (name == "kept_steps" and text == "each"):
                count = get("sampling_steps")
                try:
                    parse_steps(text, count)
                except DiffsegError:
                    rule = f"be all, middle, one step or first-last, of the {count} denoising steps 0 to {count - 1}"
                    yield name, rule, f"Set `{name}={'[all]' if name == 'compared_steps' else 'all'}`."
    both = given(parameters, "kept_steps", "attention_steps")
    if both and get("kept_steps") not in ("each", get("attention_steps")):
        yield "kept_steps", f"be each, or {get('attention_steps')} as attention_steps", "Set `kept_steps=each`."
    if get("refiner") == "self-attention" and get("self_attention") == 0:
        rule = "be the size of a map, as the refiner self-attention reads it"
        yield "self_attention", rule, f"Set `self_attention={max(get('attention_resolutions'))}`."
    if get("refiner") == "self-attention" and both:
        if get("kept_steps") != (read := get("attention_steps")):
            rule = f"be {read} as attention_steps, as self-attention is kept as the mean of these steps"
            yield "kept_steps", rule, f"Set `kept_steps={read}`."
    if get("refiner") == "sam" and get("sam_checkpoint") == "":
        remedy = "Set it to a file of Segment Anything's weights, or to mini for the mini world's."
        yield "sam_checkpoint", "name a checkpoint, as the refiner sam needs one", remedy
    if "generator" in parameters and not is_short_name("generator", get("generator")):
        is_hub_id = not locate("generator", get("generator")).exists()
        rule = "be at least 256 for a generator of the hub, as the defaults are those of mini"
        for name in ("height", "width"):
            if is_hub_id and get(name, 256) < 256:
                yield name, rule, "Set `height=512` and `width=512`, or start from own-words-sdxl.yaml."
        for name in ("lora_height", "lora_width"):
            if is_hub_id and get("target_images") and get(name, 256) < 256:
                yield name, rule, "Set `lora_height=512`, `lora_width=512` and `lora_learning_rate=1.0e-4`."


def data_conflicts(parameters: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Of classes, prompts and labelled images (notebooks 01, 04 and 05)."""
    from diffseg.words import load_words

    get, is_folder = parameters.get, parameters.get("benchmark") == "folder"
    if get("class_list") or get("evaluation_split") or get("training_split"):
        from diffseg.benchmarks.classes import get_benchmark  # loads torch, which the usual run need not wait for

    if given(parameters, "class_list", "benchmark"):
        if is_folder and not get("class_list"):
            yield "class_list", "name your classes, as the benchmark is folder", "Set `class_list=[fox, wind turbine]`."
        if own := get("class_list"):
            get_benchmark(get("benchmark"), own)  # raises its own sentence for an entry that is no class
            for name in ("train_real", "mix_real"):
                if get(name) and not is_folder:
                    yield (
                        name,
                        "be false, as one's own classes have no labelled images",
                        (f"Set `{name}=false`, or `benchmark=folder` and data_root to labelled images of your own."),
                    )
    synthetic = {"images", "beta", "training_mode"} & parameters.keys()
    if get("benchmark") == "cityscapes" and not get("class_list") and synthetic:
        rule = "be cityscapes-things, as what is no object in a synthetic image is background and cityscapes has none"
        yield "benchmark", rule, "Set `benchmark=cityscapes-things`."
    if get("data_names") and "benchmark" in parameters and not is_folder:
        yield "data_names", "be empty, as the benchmark is not folder", "Set `data_names={}`, or `benchmark=folder`."
    for name in ("training_split", "evaluation_split"):
        if get(name) and "benchmark" in parameters and not is_folder:
            splits = get_benchmark(get("benchmark")).splits
            if get(name) not in splits:
                rule = f"be empty, or one of {get('benchmark')}'s splits {', '.join(splits)}"
                yield name, rule, "Leave it empty for the benchmark's own."
    # a caption has the classes that it names
    if given(parameters, "classes_per_prompt", "benchmark") and not get("caption_file"):
        own = get("class_list")
        classes = len(own) if own else len({word.class_name for word in load_words(get("benchmark"))})
        if get("classes_per_prompt") > classes:
            rule = f"be at most {classes}, the number of classes"
            yield "classes_per_prompt", rule, f"Set `classes_per_prompt={classes}` or less."
    chosen = given(parameters, "training_split", "evaluation_split", "benchmark") and (
        get("training_split") or get("evaluation_split")
    )
    if chosen and (get("train_real") or get("mix_real")):
        bench = get_benchmark(get("benchmark"), get("class_list", []), get("data_names"))
        trained, scored = splits_of(bench, parameters)
        # VOC's trainval is train and val; lists of one's own are compared image by image (`open_data`)
        if trained == scored or (not is_folder and "trainval" in (trained, scored)):
            name, other = ("training_split", scored) if get("training_split") else ("evaluation_split", trained)
            rule = f"share no image with the split {other}, as a network is not scored on images that it has seen"
            yield name, rule, "Leave it empty for the benchmark's own, or list other images in a split of their own."
    if given(parameters, "evaluation_split", "benchmark") and get("class_list") and not is_folder:
        rule = "be folder, as one's own classes are scored on labelled images of one's own"
        remedy = "Set `benchmark=folder` and data_root to them, or stop before the score (`--only 1-4`)."
        yield "benchmark", rule, remedy


def tuning_conflicts(parameters: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Of LoRA (notebook 02)."""
    get = parameters.get
    if given(parameters, "lora_candidates", "lora_steps") and get("lora_candidates") > get("lora_steps"):
        rule = f"be at most lora_steps, {get('lora_steps')}, as each candidate has a number of steps"
        yield "lora_candidates", rule, "Lower lora_candidates or raise lora_steps."
    if any("{}" in caption for caption in get("lora_captions", [])) and get("lora_words") == []:
        rule = "hold a word at least, as lora_captions has {} in place of one"
        yield "lora_words", rule, "Set `lora_words=[car]`, or take {} out of lora_captions."
    if get("target_images"):
        if get("lora_candidates", 1) > 1 and get("lora_held_out") == 0:
            rule = f"be above 0, as images held out judge the {get('lora_candidates')} candidates"
            yield "lora_held_out", rule, "Set `lora_held_out=0.25`, or `lora_candidates=1`: lora_steps, unjudged."
        if get("generator_lora"):
            rule = "be empty, as notebook 02 tunes the generator to target_images without it"
            yield "generator_lora", rule, 'Set `generator_lora=""`, or `target_images=""`.'


def training_conflicts(parameters: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Of the network (notebook 04), also with the number of processes."""
    get = parameters.get
    normalises = get("segmenter", "").startswith(("deeplabv3plus", "upernet"))
    count = processes.count()
    least = (2 if normalises else 1) * count
    if given(parameters, "segmenter", "training_batch") and get("training_batch") < least:
        why = ", as this segmenter normalises each image's average over the batch" if normalises else ""
        each = f" for {count} processes" if count > 1 else ""
        yield "training_batch", f"be at least {least}{each}{why}", f"Set `training_batch={least}`."
    pastes = False
    if get("mixing"):
        from diffseg.reliability import TAUGHT

        pastes = get("training_mode") in TAUGHT
    if pastes and get("training_batch") == 1:
        rule = "be at least 2, as objects are pasted from one image of a batch into another"
        yield "training_batch", rule, "Set `training_batch=2`, or `mixing=0`."
    if count > 1:
        # else an image would count by its process's part; an image is pasted into another of its process
        batch, multiple = get("training_batch", 0), 2 * count if pastes else count
        if batch % multiple:
            rule = f"be a multiple of {multiple} for {count} processes{' that paste' if pastes else ''}"
            yield "training_batch", rule, f"Set `training_batch={batch + multiple - batch % multiple}`."
    if "segmenter" in parameters and is_short_name("encoder_weights", get("encoder_weights", "")):
        folder = locate("encoder_weights", get("encoder_weights"))
        segmenter = json.loads((folder / "config.json").read_text("utf-8"))["segmenter"]
        if get("segmenter") != segmenter:
            rule = f"be empty or another encoder's, as these weights are made for {segmenter}"
            yield "encoder_weights", rule, f'Set `encoder_weights=""` or `segmenter={segmenter}`.'


def lacks(parameters: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (name, what it must be, remedy) of each parameter that needs what this machine does not have."""
    if find_spec("pydensecrf") is None:
        install = "run pip install pydensecrf2"
        if parameters.get("refiner") == "crf":
            rule = "be another refiner here, as crf needs the package pydensecrf2"
            yield "refiner", rule, f"Set `refiner=pamr`, or {install}."
        if parameters.get("evaluation_crf"):
            rule = "be false here, as the dense CRF needs the package pydensecrf2"
            yield "evaluation_crf", rule, f"Set `evaluation_crf=false`, or {install}."
    if parameters.get("tensorboard_every") and find_spec("tensorboard") is None:
        rule = "be 0 here, as TensorBoard is not installed"
        yield "tensorboard_every", rule, "Set `tensorboard_every=0`, or run pip install tensorboard."
    if given(parameters, "benchmark", "data_root"):
        is_folder, is_short = parameters["benchmark"] == "folder", is_short_name("data_root", parameters["data_root"])
        # own classes have no official data, and a folder has no classes of its own; mini need not be opened
        if is_folder == bool(parameters.get("class_list")) and (is_folder or not is_short):
            open_data(parameters)
    trained = ["training_precision"] + (["lora_precision"] if parameters.get("target_images") else [])
    for name in trained:
        if parameters.get(name, "fp32") != "fp32":
            import torch

            if not torch.accelerator.is_available():
                rule = "be fp32 here, as there is no GPU and a CPU is many times slower in half precision"
                yield name, rule, f"Set `{name}=fp32`."


def open_data(parameters: dict[str, Any]) -> None:
    """Open the splits that are going to be read; what is missing raises a DiffsegError."""
    from diffseg.benchmarks.classes import get_benchmark
    from diffseg.benchmarks.readers import data_folder, open_split

    get = parameters.get
    bench = get_benchmark(get("benchmark"), get("class_list", []), get("data_names"))
    trained, scored = splits_of(bench, parameters)
    splits = [trained] if get("train_real") or get("mix_real") else []
    splits += [scored] if "evaluation_split" in parameters else []
    if splits and get("benchmark") == "folder" and is_short_name("data_root", get("data_root")):
        raise DiffsegError(
            f"data_root is {get('data_root')}, where no images of your own lie; set it to the folder of your "
            "export, or train on synthetic images only and stop before the score (`--only 1-4`)."
        )
    opened = [open_split(bench, data_folder(get("data_root")), split).items for split in splits]
    images = [{image for _, image, *_ in items} for items in opened]
    if len(images) == 2 and (both := images[0] & images[1]):
        raise DiffsegError(
            f"{len(both)} images are in both the training split {trained} and the scored split {scored} of "
            f"{get('data_root')}, the first is {min(both)}; list each image in one of the two."
        )


def splits_of(bench, parameters: Mapping[str, Any]) -> tuple[str, str]:
    """Return the split of a Benchmark whose real images are trained on, if any are, and the split that is scored."""
    named = parameters.get("training_split"), parameters.get("evaluation_split")
    return named[0] or bench.training_split, named[1] or bench.evaluation_split
