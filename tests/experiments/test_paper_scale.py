"""The estimate of the paper's scale: its arithmetic by hand, the factors behind it by torch's counter, its figures."""

import json
import re

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffseg.errors import DiffsegError
from diffseg.experiments.speed import paper_scale as scale
from diffseg.generator import load_generator
from diffseg.lora import TuningOptions, add_lora
from diffseg.paths import project_root
from diffseg.segmenters import Segmenter

RESULTS = project_root() / "results"
BY_HAND = {
    "training_mode": "cotrain", "train_real": True, "target_images": "", "height": 10, "width": 20, "images": 1000,
    "sampling_steps": 5, "generator_precision": "fp16", "refiner": "crf", "iterations": 100, "training_batch": 4,
    "crop": 8, "optimizer": "sgd", "mixing": 0.5, "warmup": 0.2, "training_precision": "bf16",
    "evaluation_scales": [1.0, 0.5], "evaluation_flip": True,
}  # fmt: skip
LORA = {
    "target_images": "mini", "lora_steps": 10, "lora_batch": 2, "lora_candidates": 3, "lora_pictures": 4,
    "lora_height": 8, "lora_width": 8, "lora_precision": "fp16", "lora_gradient_checkpointing": True,
}  # fmt: skip
COUNTED = {"text": 1, "unet": 10, "decoder": 7, "encoder": 3, "segmenter": 100, "whole": 200, "bytes": 10**9}


def test_operations_of_a_linear_layer_and_of_convolutions():
    assert scale.operations(nn.Linear(3, 5, device="meta"), torch.empty(2, 3, device="meta")) == 2 * 2 * 3 * 5
    for groups in (1, 2):
        convolution = nn.Conv2d(4, 6, 3, padding=1, groups=groups, device="meta")
        found = scale.operations(convolution, torch.empty(1, 4, 10, 10, device="meta"))
        assert found == 2 * 10 * 10 * 6 * (4 // groups) * 9


def test_hours_and_gigabytes_of_a_run_by_hand(monkeypatch):
    monkeypatch.setattr(scale, "PEAK", {"fp16": 10 / 3600, "bf16": 5 / 3600, "fp32": 1 / 3600})  # operations an hour
    monkeypatch.setattr(scale, "SUSTAINED", 0.5)
    rows = scale.stages(BY_HAND, COUNTED, 6, {"jpg": [1, 2], "png": [0.5, 3]}, [3600, 7200])
    found = {row["stage"]: row for row in rows}
    assert list(found) == ["03 images, masks", "03 dense CRF", "04 synthetic", "04 real", "05 evaluation"]
    picture = 2 * 1 + 2 * 5 * 10 + 7
    assert found["03 images, masks"]["gpu_hours"] == pytest.approx(1000 * picture / 10 / 0.5)
    assert found["03 images, masks"]["gigabytes"] == pytest.approx([1000 * 200 * 1.5e-9, 1000 * 200 * 5e-9])
    assert found["03 dense CRF"]["cpu_hours"] == pytest.approx([200_000, 400_000])
    assert found["04 synthetic"]["gpu_hours"] == pytest.approx(100 * 4 * 2 * 100 * (3 + 0.5 * 0.8) / 5 / 0.5)
    assert found["04 synthetic"]["gigabytes"] == pytest.approx([2, 2 + 4])  # and a checkpoint: weights and momentum
    assert found["04 real"]["gpu_hours"] == pytest.approx(100 * 4 * 100 * 3 / 5 / 0.5)
    assert found["05 evaluation"]["gpu_hours"] == pytest.approx(6 * 4 * 3 * 200 / 1 / 0.5)
    tuned = scale.stages(BY_HAND | LORA, COUNTED | {"lora": COUNTED}, 6, {"jpg": [1, 2]}, [0, 0])
    assert tuned[0]["gpu_hours"] == pytest.approx(10 * 2 * 3 * 10 / 10 / 0.5)
    assert tuned[0]["gigabytes"] == pytest.approx([4, 4])
    assert tuned[1]["gpu_hours"] == pytest.approx((10 * 2 * (1 + 3) + 4 * 4 * picture) / 1 / 0.5)


def test_a_training_step_costs_three_passes_and_one_of_lora_two():
    def step(network, *inputs):
        with FlopCounterMode(display=False) as counter:
            output = network(*inputs)
            getattr(output, "sample", output).sum().backward()
        return counter.get_total_flops()

    with torch.device("meta"):  # a U-Net: torch counts a grouped convolution's backward pass as ungrouped
        network, picture = Segmenter("unet-resnet18", ["a", "b"]), torch.empty(2, 3, 64, 64)
    assert step(network, picture) / scale.operations(network, picture) == pytest.approx(scale.TRAINING, rel=0.03)

    parts = load_generator("mini")
    for name in ("vae", "text_encoder", "unet"):
        getattr(parts, name).to("meta")
    with torch.device("meta"):
        size = parts.unet.config.sample_size, parts.unet.config.sample_size
        inputs = torch.empty(1, parts.unet.config.in_channels, *size), torch.tensor(1)
        inputs = *inputs, torch.empty(1, 8, parts.unet.config.cross_attention_dim)
        forward = scale.operations(parts.unet, *inputs)
        add_lora(parts, TuningOptions(height=64, width=64, rank=4), seed=0)
        assert step(parts.unet, *inputs) / forward == pytest.approx(scale.TUNING, rel=0.06)


def test_the_generator_has_the_published_numbers_of_weights():
    with torch.device("meta"):
        sizes = [sum(weight.numel() for weight in network.parameters()) for network in scale.sd15_networks()]
    assert sizes == [123_060_480, 859_520_964, 83_653_863]


def test_bytes_of_a_run_lie_between_an_enlarged_and_a_small_picture(tmp_path):
    with pytest.raises(DiffsegError, match="run `diffseg run mini-voc` first"):
        scale.bytes_per_pixel(tmp_path)
    torch.manual_seed(0)
    for kind, (suffix, _, options) in scale.KINDS.items():
        (tmp_path / kind).mkdir()
        noise = torch.randint(0, 256, (64, 64) if suffix == "png" else (64, 64, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / kind / f"0.{suffix}", **options)
    found = scale.bytes_per_pixel(tmp_path)
    assert all(0 < least < most for least, most in found.values())
    assert found["Reliability"][1] == pytest.approx(1, rel=0.05)  # noise of 8 bits cannot be packed


def test_few_digits_and_no_zero():
    assert [scale.bounds(0, 0), scale.bounds(0.01, 0.04), scale.bounds(2, 2)] == ["", "< 0.1", "2.0"]
    assert [scale.bounds(1.26, 58.9), scale.bounds(168.2, 168.2)] == ["1.3 to 59", "168"]


def test_the_published_estimate_is_of_todays_parameters_and_the_readme_quotes_it():
    report = json.loads((RESULTS / "benchmarks" / "paper_scale.json").read_text())
    assert report["assumed"]["peak"] == scale.PEAK and report["assumed"]["sustained"] == scale.SUSTAINED
    for run in scale.RUNS:
        validation, per_pixel = scale.VALIDATION[run][0], report["bytes_per_pixel"]
        p, counted, crf = scale.parameters(run), report["counted"][run], report["crf_seconds_per_pixel"]
        assert scale.stages(p, counted, validation, per_pixel, crf) == report["runs"][run]
    for check in report["checks"]:
        assert check["per_second"] == check["operations"] / check["seconds"] and (RESULTS / check["file"]).is_file()
    readme = re.sub(r"<!--.*?-->", "", (RESULTS / "README.md").read_text())
    assert scale.table(report) in readme and scale.check_table(report) in readme
    assert f"{report['generator_bytes'] / 1e9:.1f} GB" in readme
    assert f"{100 * scale.SUSTAINED:.0f} %" in readme
    assert f"{scale.PEAK['fp16'] / 1e12:.0f} (16 bit) or {scale.PEAK['fp32'] / 1e12:g} (fp32)" in readme
