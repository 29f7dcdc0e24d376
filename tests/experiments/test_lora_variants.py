"""The variants of LoRA: the judge's scenes, own images with their captions, means over tunings, and the whole once."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diffseg.benchmarks.classes import get_benchmark
from diffseg.experiments.lora_variants import PRIOR, VARIANTS, LabelledScenes, means, own_images
from diffseg.generator import load_generator
from diffseg.lab.batch import resolve, step_parameters
from diffseg.lab.steps import notebook_of
from diffseg.lora import target_layers
from diffseg.miniworld.oracle import PICTURE_NAMES, classes_of_pictures
from diffseg.prompts import Prompt
from diffseg.target_domain import own_captions

THINGS = get_benchmark("cityscapes-things")


def test_the_judge_is_shown_scenes_of_the_domain_s_classes():
    name, image, label = LabelledScenes(THINGS, "judge", 5)[3]
    assert name == "judge-3" and image.shape == (3, 64, 128) and label.shape == (64, 128)
    ids = classes_of_pictures(THINGS)
    assert ids[PICTURE_NAMES.index("fire engine")] == THINGS.classes.index("truck")
    assert ids[PICTURE_NAMES.index("cyclist")] == THINGS.classes.index("rider")
    assert ids[PICTURE_NAMES.index("poodle")] == ids[0] == 0
    seen = {int(k) for n in range(20) for k in LabelledScenes(THINGS, "judge", 20)[n][2].unique()}
    assert 0 in seen and len(seen) > 4 and max(seen) < len(THINGS.classes)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_its_layers_and_passes_the_checks(name):
    values, _ = resolve("mini-cityscapes", {k: v for k, v in VARIANTS[name].items() if k != PRIOR})
    values = step_parameters(notebook_of("02_lora_tuning"), values)
    layers = target_layers(load_generator("mini").unet, values["lora_targets"])
    assert values["lora_rank"] <= min(map(min, layers.values()))
    assert any(".attn2." in layer for layer in layers) == (name == "both attentions")


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
        {"run": "r", "variant": name, "images": 4, "seed": seed}
        | {"distance": 0.5 + seed, "distance_caption": 0.1, "present": 50.0, "objects": 1.0, "mask_miou": 60.0}
        for name, seeds in (("no LoRA", 1), ("self-attention", 3))
        for seed in range(seeds)
    ]
    table = means(pd.DataFrame(rows)).set_index("variant")
    assert table.seeds.tolist() == [1, 3]
    assert table.distance.tolist() == [0.5, 1.5] and table.distance_spread["self-attention"] == 1
    assert np.isnan(table.distance_spread["no LoRA"])
