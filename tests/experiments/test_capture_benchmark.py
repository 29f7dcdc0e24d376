"""What the capture benchmark compares, and how; no time is asserted."""

from collections import Counter

import pytest
import torch

from diffseg.attention import AttentionRecorder
from diffseg.experiments.speed.capture import (
    build,
    build_sd15,
    capture,
    compare,
    options_for,
    prompts_for,
    recorder_bytes,
    variants,
)


@pytest.fixture(scope="module")
def mini():
    return build("mini")


def test_the_sd15_shape_has_the_real_layers_and_head_sizes():
    pipeline = build_sd15(heads=1)
    layers = [m for name, m in pipeline.unet.named_modules() if name.endswith("attn2")]
    assert len(layers) == 16 and {m.to_q.out_features // m.heads for m in layers} == {40, 80, 160}
    assert all(m.heads == 1 and m.to_k.in_features == 768 for m in layers)
    rows, options = prompts_for(pipeline, 1), options_for(pipeline, 1)
    assert (options.height, options.width) == (512, 512)
    ids = pipeline.tokenizer(rows[0].prompt, padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 77)
    pipeline.scheduler.set_timesteps(1)
    pipeline._guidance_scale = 1.0  # as a call without guidance sets it
    with AttentionRecorder(pipeline, [[[4]]], [8, 16, 32, 64]) as recorder, torch.no_grad():
        pipeline.unet(torch.randn(1, 4, 64, 64), pipeline.scheduler.timesteps[0], torch.randn(1, 77, 768))
    assert Counter(key[1] for key in recorder.counts) == {64: 5, 32: 5, 16: 5, 8: 1}


def test_all_calls_take_turns_and_the_first_round_is_not_counted():
    called = []
    found = compare({name: lambda name=name: called.append(name) for name in "abc"}, pictures=2, repetitions=3)
    assert called == list("abc") * 4
    assert list(found) == ["a", "b", "c"]
    assert found["a"]["ratio"] == found["a"]["cpu_ratio"] == 1
    for values in found.values():
        assert values["images_per_second"] == pytest.approx(1 / values["seconds"])


def test_the_variants_are_plain_captured_and_refined(mini):
    rows, options = prompts_for(mini, 1), options_for(mini, 1)
    calls = variants(mini, rows, options, "", "vit_b")
    assert list(calls)[:3] == ["plain", "capture 16", "capture 16+8"]
    assert {"capture 16, none", "capture 16, pamr", "capture 16, self-attention"} <= set(calls)
    assert "capture 16, sam" not in calls  # without a checkpoint
    for call in calls.values():
        call()


def test_a_recorders_bytes_do_not_depend_on_the_steps(mini):
    rows = prompts_for(mini, 1)
    held = {}
    for steps in (1, 3):
        recorder = capture(mini, rows, options_for(mini, steps), resolutions=[8, 16], self_resolution=16)
        held[steps] = recorder_bytes(recorder)
    assert held[1] == held[3] == 4 * (20 + 3 * (64 + 256) + 256**2)  # token weights, three layers' maps, self-attention
