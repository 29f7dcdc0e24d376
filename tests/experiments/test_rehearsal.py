"""The dress rehearsal: its networks have the published sizes, its data sets open with the readers, and it runs."""

import importlib.util

import pytest
import torch

from diffseg.benchmarks.classes import get_benchmark
from diffseg.benchmarks.readers import open_split
from diffseg.experiments import full_size, rehearsal
from diffseg.lab.batch import resolve
from diffseg.lab.combinations import check_together
from diffseg.segmenters import load_segmenter

needs_vocabulary = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="needs open_clip_torch")


def test_the_networks_have_the_published_numbers_of_weights():
    with torch.device("meta"):
        networks = [
            full_size.sdxl_unet(),
            full_size.sd35_transformer(),
            full_size.clip(full_size.CLIP_G, full_size.CLIPTextModelWithProjection),
        ]
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [
        2_567_463_684,
        2_243_171_520,
        694_659_840,
    ]


@needs_vocabulary
def test_clips_vocabulary_gives_the_published_ids():
    tokenizer = full_size.clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("run", ["voc", "imagenet-s", pytest.param("cityscapes", marks=pytest.mark.slow)])
def test_a_few_pictures_open_as_the_data_set_and_only_what_is_printed_changes(run, tmp_path):
    values, _ = resolve(run, {})
    benchmark = get_benchmark(values["benchmark"])
    rehearsal.write_data(tmp_path / "data", benchmark, 2)
    for split in (benchmark.training_split, benchmark.evaluation_split):
        opened = open_split(benchmark, tmp_path / "data", split)
        shapes = [tuple(image.shape[1:]) for _, image, _ in (opened[k] for k in range(len(opened)))]
        assert shapes == (rehearsal.SIZES[benchmark.protocol] * 2)[:2]
    changes = rehearsal.changed(values, "sd15", tmp_path, 2, 2)
    flat = {name: value for those in changes.values() for name, value in those.items()}
    check_together(values | flat, run)  # fits together, and on this machine
    assert set(changes) <= {"counts", "places", "no download", "this machine"}


@needs_vocabulary
@pytest.mark.slow
def test_stable_diffusion_at_its_size_goes_from_prompts_to_a_table(tmp_path):
    """Some ten minutes, 6 GB of memory and 3 GB of disk."""
    report = rehearsal.rehearse("voc", "sd15", tmp_path, pictures=2, steps=2)
    assert len(report["seconds"]) == 7 and report["changed"]["counts"]["images"] == 2
    table = (tmp_path / "runs" / "voc" / "06_report" / "table.txt").read_text()
    assert "synthetic" in table and "real" in table
    networks = load_segmenter(tmp_path / "runs" / "voc" / "04_robust_training" / "synthetic").networks
    assert len(networks) == 2 and all(p.isfinite().all() for n in networks for p in n.parameters())
