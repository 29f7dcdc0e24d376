"""The recorder and `draw` on every family: small pipelines of the real classes with random weights."""

import dataclasses
import functools
import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.embeddings import ImageProjection
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tiny_pipelines import BUILDERS, build
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _len_torch_function_stack

from diffseg.attention import AttentionRecorder
from diffseg.drawing import DrawingOptions, check_prompts, draw_rows, draw_with_maps
from diffseg.errors import DiffsegError
from diffseg.families import FAMILIES, denoiser_of, family_of, image_size, key_ranges, latent_noise, layer_names
from diffseg.generator import draw, offload_pipeline
from diffseg.prompts import Prompt
from diffseg.tokens import key_positions

PROMPT, OTHER = "a cat and dogs", "dogs on a plant"
WORDS = {PROMPT: ("cat", "dogs"), OTHER: ("dogs", "plant")}
JOINT = [name for name in BUILDERS if name.startswith(("sd3", "flux", "z-", "qwen"))]
TRANSFORMERS = ["pixart-alpha", "pixart-sigma", "sana", "sana-1.5", "sana-sprint", "hunyuan", *JOINT]
ONE_OF_EACH = ["sdxl", "pixart-sigma", "sana", "hunyuan", "sd3", "flux-dev", "z-image", "qwen-image"]
every_family = pytest.mark.parametrize("name", BUILDERS)

shared = functools.cache(build)  # for tests that leave the pipeline as it is


def spans_of(prompt: str, words=None) -> tuple[tuple[int, int], ...]:
    return tuple((prompt.index(word), prompt.index(word) + len(word)) for word in words or WORDS[prompt])


def tokens_of(pipeline, *prompts: str) -> list[list[list[int]]]:
    return [key_positions(pipeline, prompt, spans_of(prompt)) for prompt in prompts]


def size_of(pipeline) -> tuple[int, int]:
    """Pixels at 1:2: 8 x 16 latents; 16 x 32 for Sana, whose sides are multiples of 32 pixels; 12 x 24 for Z-Image,
    whose 72 positions are then filled up to 96."""
    kind = type(pipeline).__name__
    height = 32 if kind.startswith("Sana") else (12 if kind == "ZImagePipeline" else 8) * pipeline.vae_scale_factor
    return height, 2 * height


def images_of(pipeline, prompts=(PROMPT,), seeds=(0, 1, 2), steps: int = 2, **options):
    return draw(pipeline, prompts, seeds[: len(prompts)], None, *size_of(pipeline), steps, **options)


def record(pipeline, prompts=(PROMPT,), seeds=(0, 1, 2), draws=images_of, **how) -> AttentionRecorder:
    with AttentionRecorder(pipeline, tokens_of(pipeline, *prompts), None, **how) as recorder:
        draws(pipeline, prompts, seeds)
    return recorder


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def is_as_before(pipeline) -> bool:
    """No hook and no wrapped step is left, and no mode looks at torch's functions."""
    hooks = [h for m in denoiser_of(pipeline).modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return not hooks and "step" not in vars(pipeline.scheduler) and not _len_torch_function_stack()


# -------------------------------------------------------------------------- from prompts to images and maps


@every_family
def test_images_are_bit_identical_with_and_without_maps(name):
    pipeline = shared(name)
    rows = [
        Prompt(k, prompt, WORDS[prompt], WORDS[prompt], spans_of(prompt), ("plain",) * 2, (0, 0), "", seed=k)
        for k, prompt in enumerate([PROMPT, OTHER])
    ]
    options = DrawingOptions(*size_of(pipeline), sampling_steps=2, guidance_scale=4.0)
    plain = draw_rows(pipeline, rows, options)
    images, maps = draw_with_maps(pipeline, rows, options)
    again = draw_rows(pipeline, rows, options)
    assert len({image.tobytes() for image in images}) == 2 and images[0].size == size_of(pipeline)[::-1]
    for one, two, three in zip(plain, images, again, strict=True):
        assert one.tobytes() == two.tobytes() == three.tobytes()
    for one in maps:
        assert one.steps == [[0], [1]]
        assert all(
            layer.shape[:2] == (2, 2) and layer.shape[-1] == 2 * layer.shape[-2] for layer in one.layers.values()
        )
        assert all(layer.std() > 1e-4 * layer.mean() for layer in one.layers.values())
        assert set(one.layers) == set(layer_names(pipeline))
    assert is_as_before(pipeline)


def test_the_softmax_of_joint_attention_is_chosen_when_drawing():
    pipeline = shared("sd3")
    row = Prompt(0, PROMPT, WORDS[PROMPT], WORDS[PROMPT], spans_of(PROMPT), ("plain",) * 2, (0, 0), "", seed=0)
    options = DrawingOptions(*size_of(pipeline), 2, 4.0, kept_steps="all")
    _, (joint,) = draw_with_maps(pipeline, [row], options)
    _, (text,) = draw_with_maps(pipeline, [row], dataclasses.replace(options, attention_softmax="text"))
    for layer in joint.layers:  # the same, over fewer keys
        assert (text.layers[layer] > joint.layers[layer]).all()


@every_family
def test_the_noise_is_the_pipelines_own(name):
    pipeline = shared(name)
    height, width = size_of(pipeline)
    options = {
        "use_resolution_binning": False,
        "clean_caption": False,
        "intermediate_timesteps": None,
    }
    if name == "flux-schnell":  # the class's own number is the other Flux's
        options["max_sequence_length"] = 256
    if name == "qwen-image":
        options |= {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}
    accepted = inspect.signature(pipeline.__call__).parameters
    own = pipeline(
        prompt=[PROMPT, OTHER],
        height=height,
        width=width,
        num_inference_steps=3,
        guidance_scale=3.0 if name == "z-image" else 4.0,  # Z-Image's counts from 0
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        **{key: value for key, value in options.items() if key in accepted},
    )
    for found, expected in zip(images_of(pipeline, (PROMPT, OTHER), steps=3), own.images, strict=True):
        assert found.tobytes() == expected.tobytes()


class Spy(TorchFunctionMode):
    """Q K^T of all attention in the denoiser's first evaluation, by hand and in float64: B x head x query x key."""

    def __init__(self, pipeline):
        super().__init__()
        self.calls, self.evaluation, self.inside = [], 0, False
        denoiser_of(pipeline).register_forward_pre_hook(self.begin)
        denoiser_of(pipeline).register_forward_hook(self.end)

    def begin(self, *args):
        self.evaluation, self.inside = self.evaluation + 1, self.evaluation == 0

    def end(self, *args):
        self.inside = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and self.inside:
            given = dict(zip(("query", "key"), args[:2], strict=False)) | (kwargs or {})
            query, key = given["query"].double(), given["key"].double()
            logits = query @ key.mT / query.shape[-1] ** 0.5
            if (mask := given.get("attn_mask")) is not None:
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
            self.calls.append(logits)
        return function(*args, **(kwargs or {}))


def calls_with_text(name: str, calls: list) -> list:
    """Of the denoiser's calls, in their order, those between image and text."""
    if name == "sd3.5":  # its first two blocks have a second attention, of the image alone
        return [calls[k] for k in (0, 2, 4)]
    if name == "z-image":  # refiners of image and text come first
        return calls[2:]
    return calls if name in JOINT or name.startswith("sana") else calls[1::2]


@pytest.mark.parametrize(("name", "softmax"), [*((n, "joint") for n in BUILDERS), *((n, "text") for n in JOINT)])
def test_maps_are_those_computed_by_hand(name, softmax):
    pipeline = build(name)
    [words] = tokens_of(pipeline, PROMPT)
    with Spy(pipeline) as spy, AttentionRecorder(pipeline, [words], None, [0], softmax=softmax) as recorder:
        images_of(pipeline)
    calls = calls_with_text(name, spy.calls)
    layers = recorder.word_maps()[0].layers
    ordered = [key for key, _ in denoiser_of(pipeline).named_modules() if key in layers]
    if name.startswith(("sdxl", "lcm")) or name == "sd":  # the middle is listed last and computed between
        ordered.sort(key=lambda key: ("down", "mid", "up").index(key.split("_")[0]))
    assert len(calls) == len(layers) > 1
    for key, logits in zip(ordered, calls, strict=True):
        if name in JOINT:
            count = layers[key][0, 0].numel()
            first = name.startswith(("sd3", "z-"))
            text = slice(96 if name == "z-image" else count, None) if first else slice(-count)
            logits = logits[:, :, slice(count) if first else slice(-count, None)]
            logits = logits[..., text] if softmax == "text" else logits
        probabilities = logits.softmax(dim=-1).mean(dim=1)[0 if name == "z-image" else -1]  # its prompts come first
        if name in JOINT and softmax == "joint":
            probabilities = probabilities[:, text]
        for w, positions in enumerate(words):
            parts = [[k for k in positions if k in keys] for keys in key_ranges(pipeline).values()]
            expected = torch.stack([probabilities[:, part].mean(dim=-1) for part in parts]).mean(dim=0)
            assert_close(layers[key][0, w], expected.view(layers[key].shape[-2:]).float(), 1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "z-image", "qwen-image"])
def test_self_attention_in_joint_attention_is_that_computed_by_hand(name):
    pipeline, (side, count) = build(name), (6, 72) if name == "z-image" else (4, 32)
    recorder = AttentionRecorder(pipeline, tokens_of(pipeline, PROMPT), None, [0], self_resolution=side)
    with Spy(pipeline) as spy, recorder:
        images_of(pipeline)
    image = slice(count) if name in ("sd3", "z-image") else slice(-count, None)
    calls = [c[0 if name == "z-image" else -1, :, image, image] for c in calls_with_text(name, spy.calls)]
    expected = torch.stack([logits.softmax(dim=-1).mean(dim=0) for logits in calls]).mean(dim=0)
    [found] = recorder.self_attention()
    assert_close(found.reshape(count, count), expected.float(), 1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_map_shows_the_place_where_the_image_is(name):
    """One position's latents change: before any layer mixes positions, the map changes there and nowhere else."""
    pipeline = build(name)
    for key, module in denoiser_of(pipeline).named_modules():
        if key.endswith("attn1.to_out.0") or key.startswith("noise_refiner") and key.endswith("to_out.0"):
            module.weight.data.zero_()
    [tokens] = tokens_of(pipeline, PROMPT)
    patch = 1 if name.startswith("sana") else 2
    y, x, grid = 1, 5, (16, 32) if patch == 1 else (6, 12) if name == "z-image" else (4, 8)

    def moved(denoiser, args, kwargs):
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for state in states:
            if state.ndim == 2:
                state[y * grid[1] + x] += 1
            else:
                state[..., y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] += 1

    maps = []
    for hook in (None, moved):
        handle = denoiser_of(pipeline).register_forward_pre_hook(hook, with_kwargs=True) if hook else None
        with AttentionRecorder(pipeline, [tokens], None, [0], softmax="text") as recorder:
            images_of(pipeline)
        layers = recorder.word_maps()[0].layers
        first = next(key for key in layers if key.startswith(("blocks.0", "transformer_blocks.0", "layers.0")))
        maps.append(layers[first][0])
        if handle:
            handle.remove()
    before, after = maps
    assert before.shape[-2:] == grid
    changed = ((after - before).abs() > 1e-4 * before.max()).any(dim=0)
    assert changed.nonzero().tolist() == [[y, x]]


# ------------------------------------------------------------------------------------------ words to tokens


@pytest.mark.parametrize("prompt", [PROMPT, "  a cat-cat, and Potted  plants "])
@every_family
def test_keys_are_those_of_the_embeddings_that_the_denoiser_gets(name, prompt):
    """Text encoders that answer with their input ids show which token stands at which key."""
    pipeline = build(name)

    def answer_ids(encoder, args, kwargs, output):
        ids = (args[0] if args else kwargs["input_ids"])[..., None]
        for key in ("last_hidden_state", "hidden_states"):
            if (value := output.get(key)) is not None:
                same = tuple(ids.expand_as(v).float() for v in (value if isinstance(value, tuple) else [value]))
                output[key] = same if isinstance(value, tuple) else same[0]
        return output

    for key, part in pipeline.components.items():
        if key.startswith("text_encoder") and part is not None:
            part.register_forward_hook(answer_ids, with_kwargs=True)
    evaluations = []
    denoiser_of(pipeline).register_forward_pre_hook(
        lambda m, args, kwargs: evaluations.append((args, kwargs)), with_kwargs=True
    )
    words = WORDS.get(prompt) or ("cat-cat", "Potted  plants")
    images_of(pipeline, [prompt])
    args, got = evaluations[0]
    ids = args[2][0][:, 0] if name == "z-image" else got["encoder_hidden_states"][-1, :, 0]
    if name == "hunyuan":
        ids = torch.cat([ids, got["encoder_hidden_states_t5"][-1, :, 0]])
    found = key_positions(pipeline, prompt, spans_of(prompt, words))
    if name not in ("z-image", "qwen-image"):  # which give no more keys than the prompt has
        assert len(ids) >= max(keys.stop for keys in key_ranges(pipeline).values())
    for word, positions in zip(words, found, strict=True):
        for key, keys in key_ranges(pipeline).items():
            tokens = getattr(pipeline, key).convert_ids_to_tokens([int(ids[k]) for k in positions if k in keys])
            assert not {"▁", "Ġ"} & set(tokens)  # a blank alone
            text = "".join(tokens).replace("</w>", "").replace("##", "").replace("Ġ", "").replace("▁", "")
            assert text.lower() == word.lower().replace(" ", "")


def test_a_word_that_one_encoder_does_not_read_raises():
    pipeline = shared("hunyuan")
    rows = [Prompt(0, "a ß", ("dog",), ("ß",), ((2, 3),), ("plain",), (0,), "", seed=0)]
    with pytest.raises(DiffsegError, match="1 of 1 prompts cannot be drawn; prompt 0: .* does not know the word 'ß'"):
        check_prompts(pipeline, rows)
    with pytest.raises(DiffsegError, match="does not know the word 'ß'"):
        key_positions(pipeline, "a ß", [(2, 3)])
    with pytest.raises(DiffsegError, match="'cat' is cut off: the generator reads 77 tokens"):
        key_positions(pipeline, "a " * 80 + "cat", [(160, 163)])
    pipeline = shared("sana")
    assert key_positions(pipeline, "a " * 100 + "cat", [(200, 203)])
    with pytest.raises(DiffsegError, match="'cat' is cut off"):
        key_positions(pipeline, "a " * 200 + "cat", [(400, 403)])


def test_a_shorter_text_than_the_words_raises():
    pipeline = shared("sd3")
    with pytest.raises(DiffsegError, match="a word is cut off: the call reads 23 tokens"):
        with AttentionRecorder(pipeline, tokens_of(pipeline, PROMPT), None):
            pipeline([PROMPT], height=16, width=32, num_inference_steps=1, max_sequence_length=3)
    assert is_as_before(pipeline)


# ------------------------------------------------------------------------------- batches, guidance, precision


@every_family
def test_maps_do_not_depend_on_the_batch(name):
    pipeline = shared(name)
    together = record(pipeline, [PROMPT, OTHER, PROMPT])
    for k, prompt in enumerate([PROMPT, OTHER, PROMPT]):
        alone = record(pipeline, [prompt], seeds=[k])
        assert_close(together.maps()[k], alone.maps()[0], 1e-4)


@pytest.mark.parametrize("name", [n for n in BUILDERS if n not in ("sd", "lcm") and not n.startswith("flux")])
def test_with_guidance_the_maps_are_the_prompts(name):
    """At the first step the latents are the same with and without guidance, and with any negative prompt."""
    pipeline = shared(name)
    negative = [OTHER] if family_of(pipeline).negative else None
    maps = {}
    for prompt, guidance, against in ((PROMPT, 4.0, negative), (PROMPT, 1.0, None), (OTHER, 1.0, None)):
        with AttentionRecorder(pipeline, tokens_of(pipeline, PROMPT), None, [0]) as recorder:
            draw(pipeline, [prompt], [0], against, *size_of(pipeline), 2, guidance)
        maps[prompt, guidance] = recorder.maps()[0]
    if name != "sana-sprint":  # its guidance is an input of the network
        assert_close(maps[PROMPT, 4.0], maps[PROMPT, 1.0], 1e-4)
    assert (maps[PROMPT, 4.0] - maps[OTHER, 1.0]).abs().max() > 1e-3 * maps[PROMPT, 1.0].max()


def test_true_guidance_of_flux_evaluates_twice_and_the_prompt_first():
    pipeline = shared("flux-dev")
    evaluations = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *args: evaluations.append(1))

    def guided(scale):
        def call(pipeline, prompts, seeds):
            return pipeline(
                list(prompts),
                negative_prompt=[OTHER],
                true_cfg_scale=scale,
                height=16,
                width=32,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images

        return call

    plain = guided(3.0)(pipeline, [PROMPT], None)
    recorder = record(pipeline, draws=guided(3.0), separately=True)
    assert len(evaluations) == 12 and set(recorder.counts.values()) == {1}
    evaluations.clear()
    nearly, without = record(pipeline, draws=guided(1 + 1e-7)), record(pipeline, draws=guided(1.0))
    assert len(evaluations) == 6 + 3
    assert_close(nearly.maps()[0], without.maps()[0], 1e-5)
    with AttentionRecorder(pipeline, tokens_of(pipeline, PROMPT), None):
        captured = guided(3.0)(pipeline, [PROMPT], None)
    hook.remove()
    assert (plain == captured).all()


def test_evaluations_with_skipped_layers_do_not_count():
    pipeline = shared("sd3.5")

    def call(pipeline, prompts, seeds, **options):
        generator = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 32, "num_inference_steps": 3}
        return pipeline(list(prompts), generator=generator, **size, **options)

    skipping = functools.partial(
        call, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    )
    first, second = record(pipeline, draws=skipping, steps=[0]), record(pipeline, draws=call, steps=[0])
    assert_close(first.maps()[0], second.maps()[0], 1e-5)
    assert set(record(pipeline, draws=skipping).counts.values()) == {3}


@every_family
def test_half_precision(name):
    pipeline = build(name)
    exact = record(pipeline, steps=[0])
    pipeline.to(dtype=torch.bfloat16)
    plain, captured = images_of(pipeline), []
    halved = record(pipeline, draws=lambda *args: captured.extend(images_of(*args)), steps=[0])
    assert plain[0].tobytes() == captured[0].tobytes()
    assert_close(halved.maps()[0], exact.maps()[0], 0.1)
    assert plain[0].getextrema() != ((0, 0),) * 3


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_with_a_lora_the_maps_are_those_of_the_merged_weights(name):
    pipeline = build(name)
    without = record(pipeline)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    denoiser = inject_adapter_in_model(config, denoiser_of(pipeline))
    plain, captured = images_of(pipeline), []
    beside = record(pipeline, draws=lambda *args: captured.extend(images_of(*args)))
    assert plain[0].tobytes() == captured[0].tobytes()
    for module in denoiser.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    merged = record(pipeline)
    assert_close(beside.maps()[0], merged.maps()[0], 1e-3)
    assert (beside.maps()[0] - without.maps()[0]).abs().max() > 1e-2 * without.maps()[0].max()


# -------------------------------------------------------------------------------------- steps, memory, errors


@pytest.mark.parametrize(
    ("name", "steps", "scheduler"),
    [
        ("sdxl-turbo", 1, None),
        ("lcm", 4, None),
        ("sana-sprint", 2, None),
        ("sana-sprint", 4, None),
        ("flux-schnell", 1, None),
        ("sd3", 3, "FlowMatchHeunDiscreteScheduler"),
        ("sdxl", 3, "HeunDiscreteScheduler"),
        ("pixart-sigma", 3, None),
        ("hunyuan", 3, None),
    ],
)
def test_steps_are_the_schedulers(name, steps, scheduler):
    pipeline = build(name)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    recorder = record(pipeline, draws=lambda *args: images_of(*args, steps=steps), separately=True)
    assert recorder.word_maps()[0].steps == [[step] for step in range(steps)]
    expected = {step: 2 if scheduler and step < steps - 1 else 1 for step in range(steps)}
    assert {place[3]: count for place, count in recorder.counts.items()} == expected


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_memory_does_not_grow_with_the_steps(name):
    pipeline = shared(name)
    sizes = [
        {place: tensor.untyped_storage().nbytes() for place, tensor in recorder.sums.items()}
        for recorder in (record(pipeline, draws=lambda *args, n=n: images_of(*args, steps=n)) for n in (1, 4))
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["pixart-sigma", "hunyuan", "sd3", "flux-dev", "qwen-image"])
def test_self_attention_sums_to_one(name):
    recorder = record(shared(name), self_resolution=4)
    (attention,) = recorder.self_attention()
    assert attention.shape == (4, 8, 4, 8) and (attention.sum(dim=(2, 3)) - 1).abs().max() < 1e-5


def test_a_layer_that_shows_nothing_raises():
    """Sana's self-attention is linear: it never has a map."""
    pipeline = shared("sana")
    with pytest.raises(DiffsegError, match=r"transformer_blocks.0.attn1 shows no attention map .*Linear"):
        record(pipeline, self_resolution=16)
    assert is_as_before(pipeline)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_after_an_exception_in_a_layer_all_is_as_before(name):
    pipeline = build(name)
    layer = next(
        m
        for key, m in denoiser_of(pipeline).named_modules()
        if key.endswith(("attn2.to_k", "attn.to_k", "attention.to_k"))
    )

    def fail(*arguments):
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        record(pipeline)
    hook.remove()
    assert is_as_before(pipeline)


def test_a_batch_of_another_size_raises():
    for name in ("pixart-alpha", "flux-dev"):  # neither says whether it is guided
        pipeline = shared(name)
        with pytest.raises(DiffsegError, match="words of 2 images and the call draws 1"):
            record(pipeline, [PROMPT, OTHER], draws=lambda p, *args: images_of(p))
        with pytest.raises(DiffsegError, match="words of 1 images and the call draws 2"):
            record(pipeline, draws=lambda p, *args: images_of(p, [PROMPT, OTHER]))
        assert is_as_before(pipeline)


@pytest.mark.parametrize("name", ["sdxl", "z-image"])
def test_a_strength_of_one_is_no_guidance(name):
    pipeline, counts = shared(name), []
    hook = denoiser_of(pipeline).register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    images_of(pipeline, guidance_scale=1.0)
    hook.remove()
    assert set(counts) == {1}


def test_a_size_that_the_positions_do_not_fill_is_refused(monkeypatch):
    packed = ("flux-dev", "flux2-klein", "qwen-image")
    for name in packed:
        monkeypatch.setattr(shared(name), "vae_scale_factor", 8)  # that of the real ones
        assert image_size(shared(name), 32, 48) == (32, 48)
    for name, side, multiple in (("hunyuan", 72, 16), ("sd", 20, 8), *((name, 24, 16) for name in packed)):
        with pytest.raises(DiffsegError, match=f"height is {side}; .* draws multiples of {multiple} here"):
            draw(shared(name), [PROMPT], [0], None, side, 64)


def test_a_batch_has_negative_prompts_for_all_or_for_none():
    with pytest.raises(DiffsegError, match="give all of them one, or none"):
        draw(shared("sdxl"), [PROMPT, OTHER], [0, 1], ["", "plant"])


def test_what_a_family_has_not_is_one_sentence():
    with pytest.raises(DiffsegError, match="no attention capture for SimpleNamespace; use .*FluxPipeline"):
        family_of(SimpleNamespace())
    for name in ("lcm", "flux-dev", "sana-sprint"):
        assert draw(shared(name), [PROMPT], [0], [""])  # nothing to avoid
        with pytest.raises(DiffsegError, match="takes no negative prompt"):
            draw(shared(name), [PROMPT], [0], [OTHER])
    with pytest.raises(DiffsegError, match="attention_softmax is \"all\"|attention_softmax is 'all'"):
        AttentionRecorder(shared("sd3"), [[[1]]], softmax="all")
    assert {type(shared(name)).__name__ for name in BUILDERS} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "offload"),
    [
        *((name, "model") for name in ("sd", "sd3", "z-image")),
        *((name, "group") for name in ("sd", "pixart-sigma", "sd3", "flux-dev", "qwen-image")),
        *((name, "sequential") for name in ("sd", "pixart-sigma", "sd3", "flux-dev", "z-image")),
    ],
)
def test_maps_under_offload(name, offload):
    """Without a GPU: diffusers' hooks then move weights from the CPU to the CPU."""
    whole, pipeline = record(shared(name)), build(name)
    if offload == "sequential":  # on a CPU accelerate fails to do it with a text encoder
        cpu_offload(denoiser_of(pipeline), torch.device("cpu"))
    else:
        offload_pipeline(pipeline, "cpu", offload)
    assert_close(record(pipeline).maps()[0], whole.maps()[0], 1e-4)


def test_a_family_that_cannot_be_offloaded_by_groups():
    with pytest.raises(DiffsegError, match="HunyuanDiTPipeline cannot .* by groups; .* generator_offload=model"):
        offload_pipeline(build("hunyuan"), "cpu", "group")


def test_with_an_ip_adapter():
    """Its attention to a picture comes second in each layer: only that to the words is recorded."""
    pipeline, without = build("sd"), record(shared("sd"), steps=[0])
    unet = pipeline.unet
    weights, k = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for half in ("to_k_ip", "to_v_ip"):
                weights[f"{k}.{half}.weight"] = torch.randn(width, 16, generator=torch.Generator().manual_seed(k))
            k += 2
    projection = ImageProjection(image_embed_dim=16, cross_attention_dim=16, num_image_text_embeds=4).state_dict()
    projection = {key.replace("image_embeds", "proj"): weight for key, weight in projection.items()}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))

    def adapted(pipeline, prompts, seeds):
        noise = latent_noise(pipeline, [torch.Generator().manual_seed(0)], *size_of(pipeline))
        height, width = size_of(pipeline)
        size = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "np"}
        return pipeline(list(prompts), latents=noise, ip_adapter_image_embeds=[embeds], **size).images

    plain, captured = adapted(pipeline, [PROMPT], None), []
    recorder = record(pipeline, draws=lambda *args: captured.append(adapted(*args)), steps=[0])
    assert (plain == captured[0]).all()
    before, after = without.word_maps()[0].layers, recorder.word_maps()[0].layers
    first, *_, last = layer_names(pipeline)
    assert_close(after[first], before[first], 1e-5)
    assert (after[last] - before[last]).abs().max() > 1e-3 * before[last].max()
    assert is_as_before(pipeline)
