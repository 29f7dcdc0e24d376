"""What the capture benchmark compares, and how; no time is asserted."""

import dataclasses
from collections import Counter

import pytest
import torch

from diffseg.attention import AttentionRecorder
from diffseg.experiments.full_size import sdxl_unet
from diffseg.experiments.speed.capture import (
    PIPELINES,
    build,
    build_flux,
    build_sd15,
    capture,
    captures,
    compare,
    options_for,
    prompts_for,
    recorder_bytes,
    refinements,
)

MINI = PIPELINES["mini"]


@pytest.fixture(scope="module")
def mini():
    return build("mini")


def test_the_sd15_shape_has_the_real_layers_and_head_sizes():
    pipeline = build_sd15(heads=1)
    layers = [m for name, m in pipeline.unet.named_modules() if name.endswith("attn2")]
    assert len(layers) == 16 and {m.to_q.out_features // m.heads for m in layers} == {40, 80, 160}
    assert all(m.heads == 1 and m.to_k.in_features == 768 for m in layers)
    rows, options = prompts_for(pipeline, 1), options_for(PIPELINES["sd15-quarter"])
    assert (options.height, options.width) == (512, 512) == 2 * (8 * pipeline.unet.config.sample_size,)
    ids = pipeline.tokenizer(rows[0].prompt, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    pipeline.scheduler.set_timesteps(1)
    pipeline._guidance_scale = 1.0  # as a call without guidance sets it
    with AttentionRecorder(pipeline, [[[4]]], [8, 16, 32, 64]) as recorder, torch.no_grad():
        pipeline.unet(torch.randn(1, 4, 64, 64), pipeline.scheduler.timesteps[0], torch.randn(1, 77, 768))
    assert Counter(key[1] for key in recorder.counts) == {64: 5, 32: 5, 16: 5, 8: 1}


def test_the_sdxl_shape_has_the_real_layers_and_head_sizes():
    with torch.device("meta"):
        unet = sdxl_unet(heads=2)
    layers = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    assert len(layers) == 70 and {m.to_q.out_features // m.heads for m in layers} == {64}
    assert {m.heads for m in layers} == {2, 4} and {m.to_k.in_features for m in layers} == {2048}
    assert PIPELINES["sdxl-fifth"].side == 8 * unet.config.sample_size


def test_the_flux_shape_has_the_real_head_size_and_number_of_tokens():
    pipeline = build_flux(heads=1, double=1, single=1)
    rows, options = prompts_for(pipeline, 1), options_for(PIPELINES["flux-quarter"], 1)
    recorder = capture(pipeline, rows, dataclasses.replace(options, height=64, width=64), resolutions=[4])
    assert len(recorder.sums) == 2 and len(recorder.maps()) == 1
    assert pipeline.transformer.config.attention_head_dim == 128 and recorder.weights.shape[1] == 256


def test_all_calls_take_turns_and_the_first_round_is_not_counted():
    called = []
    found = compare({name: lambda name=name: called.append(name) for name in "abc"}, pictures=2, repetitions=3)
    assert called == list("abc") * 4
    assert list(found) == ["a", "b", "c"]
    assert found["a"]["ratio"] == found["a"]["cpu_ratio"] == 1
    for values in found.values():
        assert values["images_per_second"] == pytest.approx(1 / values["seconds"])


def test_the_variants_are_plain_captured_and_refined(mini):
    rows, options = prompts_for(mini, 1), options_for(MINI, 1)
    calls = captures(mini, rows, options, MINI)
    assert list(calls)[:3] == ["plain", "capture 16", "capture 16+8+4"]
    calls |= refinements(mini, rows, options, "", "vit_b")
    assert {"capture 16, none", "capture 16, pamr", "capture 16, self-attention"} <= set(calls)
    assert "capture 16, sam" not in calls  # without a checkpoint
    for call in calls.values():
        call()
    assert capture(mini, rows, options, resolutions=None).met["cross"] == set(MINI.resolutions)


def test_a_recorders_bytes_do_not_depend_on_the_steps(mini):
    rows = prompts_for(mini, 1)
    held = {}
    for steps in (1, 3):
        recorder = capture(mini, rows, options_for(MINI, steps), resolutions=[8, 16], self_resolution=16)
        held[steps] = recorder_bytes(recorder)
    assert held[1] == held[3] == 4 * (20 + 3 * (64 + 256) + 256**2)  # token weights, three layers' maps, self-attention
