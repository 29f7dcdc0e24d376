"""Attention to words of another prompt, on the small pipelines of every family."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from test_families import (
    BUILDERS,
    OTHER,
    PROMPT,
    assert_close,
    build,
    images_of,
    is_as_before,
    record,
    shared,
    size_of,
    tokens_of,
)

from diffseg.attention import AttentionRecorder
from diffseg.errors import DiffsegError
from diffseg.families import denoiser_of
from diffseg.generator import draw, offload_pipeline
from diffseg.other_words import OtherWords, conditioning


def others(pipeline, *prompts: str, steps=None) -> OtherWords:
    return OtherWords(
        pipeline, prompts, tokens_of(pipeline, *prompts), *size_of(pipeline), 2, resolutions=None, steps=steps
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_maps_of_the_own_prompt_are_the_ordinary_ones_and_the_image_is_the_same(name):
    """Two images with guidance; recorders on every side of one another, another prompt's among them."""
    pipeline, prompts = shared(name), (PROMPT, OTHER)
    plain = images_of(pipeline, prompts)
    with others(pipeline, OTHER, PROMPT) as swapped, others(pipeline, *prompts) as own:
        with AttentionRecorder(pipeline, tokens_of(pipeline, *prompts), None) as ordinary:
            captured = images_of(pipeline, prompts)
    for one, two in zip(plain, captured, strict=True):
        assert one.tobytes() == two.tobytes()
    assert is_as_before(pipeline)
    for found, other, expected in zip(own.maps(), swapped.maps(), ordinary.maps(), strict=True):
        assert_close(found, expected, 1e-5)
        assert (other - expected).abs().max() > 0.01 * expected.max()


@pytest.mark.parametrize("name", ["sd", "pixart-sigma", "sd3", "flux-dev"])
def test_maps_of_another_prompt_are_its_own_at_the_same_latents(name):
    """In the first step both prompts see the same noise, whatever the guidance and the batch."""
    pipeline = shared(name)
    expected = record(pipeline, [OTHER], steps=[0])
    for guidance in (1.0, 4.0):
        with others(pipeline, OTHER, OTHER, steps=[0]) as recorder:
            draw(pipeline, [PROMPT, OTHER], [0, 1], None, *size_of(pipeline), 2, guidance)
        if name != "flux-dev" or guidance == 4.0:  # its guidance is an input of the network
            assert_close(recorder.maps()[0], expected.maps()[0], 1e-4)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_only_the_steps_asked_for_are_evaluated_again(name):
    pipeline, runs = build(name), []
    layer = next(m for key, m in denoiser_of(pipeline).named_modules() if key.endswith(("attn2.to_k", "attn.to_k")))
    layer.register_forward_hook(lambda module, args, output: runs.append(len(args[0])))
    with others(pipeline, OTHER, steps=[1]) as recorder:
        images_of(pipeline)
    assert runs == [2, 2, 1]  # guided, guided, and again without the negative prompt
    assert recorder.word_maps()[0].steps == [[1]]


def test_with_a_lora():
    pipeline = build("sd")
    targets = ["to_q", "to_k", "to_v"]
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets), pipeline.unet
    )
    without = record(shared("sd"), [OTHER])
    ordinary = record(pipeline, [OTHER])
    with others(pipeline, OTHER) as recorder:
        images_of(pipeline, [OTHER])
    assert_close(recorder.maps()[0], ordinary.maps()[0], 1e-5)
    assert (recorder.maps()[0] - without.maps()[0]).abs().max() > 1e-2 * without.maps()[0].max()


@pytest.mark.parametrize(("name", "offload"), [("sd", "model"), ("sd3", "group"), ("flux-dev", "sequential")])
def test_under_offload(name, offload):
    """Without a GPU: diffusers' hooks then move weights from the CPU to the CPU."""
    pipeline = build(name)
    if offload == "sequential":  # on a CPU accelerate fails to do it with a text encoder
        cpu_offload(denoiser_of(pipeline), torch.device("cpu"))
    else:
        offload_pipeline(pipeline, "cpu", offload)
    with others(pipeline, PROMPT) as recorder:
        images_of(pipeline)
    assert_close(recorder.maps()[0], record(shared(name)).maps()[0], 1e-4)


def test_half_precision():
    pipeline = build("sd").to(dtype=torch.bfloat16)
    plain = images_of(pipeline)
    with others(pipeline, PROMPT) as recorder:
        captured = images_of(pipeline)
    assert plain[0].tobytes() == captured[0].tobytes()
    assert_close(recorder.maps()[0], record(pipeline).maps()[0], 0.02)


@pytest.mark.parametrize("name", ["sd", "z-image"])
def test_after_an_exception_all_is_as_before(name):
    """In the second evaluation, in the call that encodes, and for a batch of another size."""
    pipeline, runs = build(name), []
    layer = next(
        m for key, m in denoiser_of(pipeline).named_modules() if key.endswith(("attn2.to_k", "layers.0.attention.to_k"))
    )

    def fail(*arguments):
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), others(pipeline, OTHER), others(pipeline, PROMPT):
        images_of(pipeline)
    hook.remove()
    assert is_as_before(pipeline)
    with pytest.raises(DiffsegError, match="words of 1 images and the call draws 2"), others(pipeline, OTHER):
        images_of(pipeline, [PROMPT, OTHER])
    assert is_as_before(pipeline)
    with pytest.raises(DiffsegError, match="2 other prompts and words of 1 images"):
        OtherWords(pipeline, [PROMPT, OTHER], tokens_of(pipeline, PROMPT), *size_of(pipeline), 2)
    encoder = next(part for key, part in pipeline.components.items() if key.startswith("text_encoder"))
    hook = encoder.register_forward_pre_hook(lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conditioning(pipeline, [PROMPT], *size_of(pipeline), 2)
    hook.remove()
    assert is_as_before(pipeline)
