"""The variants of LoRA: the judge's scenes and what it counts, own images with their captions, means over tunings."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from diffseg.benchmarks.classes import get_benchmark
from diffseg.experiments import lora_variants
from diffseg.experiments.lora_variants import (
    MEASURES,
    PRIOR,
    VARIANTS,
    LabelledScenes,
    judge_images,
    means,
    own_images,
)
from diffseg.experiments.paired import named_fields
from diffseg.generator import load_generator
from diffseg.lab.batch import resolve, step_parameters
from diffseg.lab.steps import notebook_of
from diffseg.lora import TuningOptions, check_options
from diffseg.miniworld.oracle import PICTURE_NAMES
from diffseg.prompts import Prompt
from diffseg.synthesis import SynthesisOptions
from diffseg.target_domain import own_captions

THINGS = get_benchmark("cityscapes-things")


def test_the_judge_s_scenes_are_labelled_as_the_domain_s_streets():
    scenes = LabelledScenes(THINGS, "judge", 60)
    name, image, label = scenes[45]
    assert name == "judge-45" and image.shape == (3, 64, 128) and label.shape == (64, 128)
    rider, bicycle = (label == THINGS.classes.index(name) for name in ("rider", "bicycle"))  # a cyclist and a boat
    assert rider.sum() > 100 and bicycle.sum() > 100
    assert rider.any(dim=1).nonzero().max() < bicycle.any(dim=1).nonzero().min()
    assert scenes.ids[PICTURE_NAMES.index("fire engine")] == THINGS.classes.index("truck")
    assert scenes.ids[PICTURE_NAMES.index("tram")] == THINGS.classes.index("train")
    assert scenes.ids[PICTURE_NAMES.index("poodle")] == scenes.ids[0] == 0


class Painter(torch.nn.Module):
    """A reference network that sees the same in every image: a truck in two parts, and a speck of motorcycle."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros(image.shape[2:], dtype=torch.int64)
        seen[:10, :10] = seen[20:30, 20:30] = THINGS.classes.index("truck")
        seen[40:43, 40:43] = THINGS.classes.index("motorcycle")
        return torch.nn.functional.one_hot(seen, len(THINGS.classes)).permute(2, 0, 1)[None].float()


def test_what_the_judge_sees_is_counted():
    first = Prompt(0, "a truck", ("truck",), ("truck",), ((2, 7),), ("plain",), (0,), "", 7)
    pair = ("truck", "motorcycle"), ("truck", "moped"), ((2, 7), (14, 19))
    second = Prompt(1, "a truck and a moped", *pair, ("plain", "hyponym"), (0, 1), "", 8)
    made = {"attention_resolutions": (16,), "attention_steps": "all", "beta": 0.4, "refiner": "none"}
    rows, options = [first, second], SynthesisOptions(64, 128, 2, 4.0, **made)
    images, found = judge_images(load_generator("mini"), rows, THINGS, options, Painter())
    assert [image.size for image in images] == [(128, 64)] * 2
    # three classes are named and the moped is too small; a truck has two parts; the second image is not complete
    assert found["present"] == pytest.approx(100 * 2 / 3) and found["objects"] == 2 and found["complete"] == 1
    assert 0 <= found["mask_miou"] <= 100


def test_every_variant_passes_the_checks():
    pipeline = load_generator("mini")
    for changes in VARIANTS.values():
        values, _ = resolve("mini-cityscapes", {k: v for k, v in changes.items() if k != PRIOR})
        values = step_parameters(notebook_of("02_lora_tuning"), values)
        check_options(pipeline, TuningOptions(**named_fields(TuningOptions, values, "lora_")))


def test_own_images_have_the_words_but_not_the_domain_in_their_captions(tmp_path):
    words, spans = ("fire engine", "moped"), ((22, 33), (40, 45))
    prompt = "a street scene with a fire engine and a moped"
    row = Prompt(0, prompt, ("truck", "motorcycle"), words, spans, ("hyponym",) * 2, (1, 2), "", 7)
    values = {"lora_height": 16, "lora_width": 32, "sampling_steps": 2, "guidance_scale": 4.0}
    pipeline = load_generator("mini")
    paths = own_images(pipeline, [row], 2, values, tmp_path)
    assert set(own_captions(paths).values()) == {"a photo of a fire engine and a moped"}
    first, second = (np.asarray(Image.open(path)) for path in paths)
    assert first.shape == (16, 32, 3) and not np.array_equal(first, second)
    paths[1].with_suffix(".txt").unlink()  # interrupted: the image of another try may be there
    paths[1].write_bytes(b"half")
    own_images(pipeline, [row], 2, values, tmp_path)
    assert np.array_equal(np.asarray(Image.open(paths[1])), second)


def test_means_are_over_the_tunings_of_a_variant():
    rows = [
        {"variant": name, "seed": seed, "distance": 0.5 + seed} | dict.fromkeys(MEASURES[1:], 50.0)
        for name, seeds in (("no LoRA", 1), ("self-attention", 3))
        for seed in range(seeds)
    ]
    table = means(pd.DataFrame(rows)).set_index("variant")
    assert table.tunings.tolist() == [1, 3]
    assert table.distance.tolist() == [0.5, 1.5] and table.distance_spread["self-attention"] == 1
    assert np.isnan(table.distance_spread["no LoRA"])


def test_rows_of_an_earlier_call_stay_until_what_no_variant_changes_is_other(tmp_path, monkeypatch):
    changes: dict = {}
    for name, value in {
        "resolve": lambda name, own: resolve(name, changes | own),
        "data_folder": lambda root: tmp_path,
        "judge_of": lambda *_: (None, {"domain": 80.0}),
        "read_manifest": lambda folder: {"key": "of the prompts"},
        "read_prompts": lambda path: [],
        "locate": lambda *_: tmp_path,
        "find_pictures": lambda folder: [],
        "named_files": lambda named: {},
        "tuned_pipeline": lambda *_: (None, []),
        "judge_images": lambda *_: ([], dict.fromkeys(MEASURES[2:], 50.0)),
        "draw_texts": lambda *_: [],
        "latent_features": lambda *_: None,
        "kernel_distance": lambda *_: 0.5,
        "picture_rows": lambda *_: None,
        "save_figure": lambda *_: None,
    }.items():
        monkeypatch.setattr(lora_variants, name, value)

    def call(variant: str, **values) -> list[str]:
        changes.clear()
        changes.update(values)
        lora_variants.main(["mini-cityscapes", "--variants", variant, "--out", str(tmp_path)])
        return pd.read_csv(tmp_path / "tables" / "lora_variants_seeds.csv").variant.tolist()

    assert call("no LoRA") == ["no LoRA"]
    assert call("self-attention", workers=7) == ["no LoRA", "self-attention"]  # which changes no result
    assert call("convolutions", generator_scheduler="own") == ["convolutions"]
    assert call("no LoRA", generator_scheduler="own", lora_rank=4) == ["no LoRA"]
    assert call("convolutions", generator_scheduler="own", lora_rank=4) == ["no LoRA", "convolutions"]
    assert call("self-attention", generator_scheduler="own", lora_rank=4, beta=0.3) == ["self-attention"]
