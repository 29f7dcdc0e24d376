"""The recorder on small pipelines of the real classes, against attention computed by hand beside it."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from tiny_pipelines import clip_encoder, clip_tokenizer
from torch.overrides import _len_torch_function_stack
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffseg import attention
from diffseg.attention import AttentionRecorder
from diffseg.errors import DiffsegError
from diffseg.experiments.generator.networks import build_tokenizer
from diffseg.sampling_steps import parse_steps
from diffseg.tokens import token_positions

CAT, DOG = [2], [5, 6]  # positions of "cat" and "dogs" in PROMPT
PROMPT = "a cat and dogs on grass"
OTHER = "a dogs and cat"


# ------------------------------------------------------------------------------------- small real pipelines


def make_pipeline(shape: str):
    """A pipeline with cross-attention at 16 x 16 and 8 x 8 (SDXL: 8 x 8 only), for 32 pixels a side.

    "sd1": eps-prediction, one number of heads; "sd2": v-prediction, heads per level, linear projections,
    upcast; "sdxl": two text encoders, two transformer layers at the lower level, none at the upper one.
    """
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    options = {
        "sd1": {"attention_head_dim": 2},
        "sd2": {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
        "sdxl": {
            "attention_head_dim": [2, 4],
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
    }[shape]
    down = ("DownBlock2D" if shape == "sdxl" else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up = ("CrossAttnUpBlock2D", "UpBlock2D" if shape == "sdxl" else "CrossAttnUpBlock2D")
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=32 if shape == "sdxl" else 16,
        **options,
    ).eval()
    with torch.no_grad():  # fresh weights read all tokens almost alike; sharpen them, so that an error would show
        for name, weight in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                weight.mul_(4)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    parts = {"vae": vae, "unet": unet, "tokenizer": tokenizer}
    parts["text_encoder"] = clip_encoder(CLIPTextModel, tokenizer)
    parts["scheduler"] = DDIMScheduler(prediction_type="v_prediction" if shape == "sd2" else "epsilon")
    if shape == "sdxl":
        second = clip_encoder(CLIPTextModelWithProjection, tokenizer)
        pipeline = StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, seeds=None, steps: int = 3, guidance: float = 4.0, **options) -> torch.Tensor:
    """Return the pictures, B x H x W x 3, unrounded."""
    seeds = range(len(prompts)) if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"} | options
    return torch.from_numpy(pipeline(list(prompts), generator=generators, **options).images)


@pytest.fixture(scope="module")
def pipelines():
    return {shape: make_pipeline(shape) for shape in ("sd1", "sd2", "sdxl")}


@pytest.fixture
def sd1(pipelines):
    return pipelines["sd1"]


class Reference:
    """Attention by hand, from the layers' inputs and weights; one entry an evaluation of the UNet."""

    def __init__(self, pipeline, guidance: bool = True):
        self.unet, self.guidance, self.layers, self.is_first = pipeline.unet, guidance, [], []
        self.scheduler = pipeline.scheduler

    def __enter__(self):
        self.hooks = [self.unet.register_forward_pre_hook(self.begin)]
        for name, module in self.unet.named_modules():
            if name.endswith(("attn1", "attn2")):
                hook = module.register_forward_pre_hook(self.look, with_kwargs=True)
                module.label = name
                self.hooks.append(hook)
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def begin(self, unet, args):
        self.layers.append([])
        # Heun's own word for whether this evaluation opens a step
        self.is_first.append(getattr(self.scheduler, "state_in_first_order", True))

    def weight(self, linear) -> torch.Tensor:
        if not hasattr(linear, "lora_A"):
            return linear.weight.double()
        low, high = linear.lora_A["default"].weight.double(), linear.lora_B["default"].weight.double()
        return linear.base_layer.weight.double() + linear.scaling["default"] * high @ low

    @torch.no_grad()
    def look(self, module, args, kwargs):
        states, context = args[0].double(), kwargs.get("encoder_hidden_states")
        kind = "self" if context is None else "cross"
        context = states if context is None else context.double()
        if self.guidance:
            states, context = states.chunk(2)[1], context.chunk(2)[1]
        query, key = states @ self.weight(module.to_q).T, context @ self.weight(module.to_k).T
        width = query.shape[-1] // module.heads
        total = 0
        for h in range(module.heads):
            q, k = query[..., h * width : (h + 1) * width], key[..., h * width : (h + 1) * width]
            logits = torch.einsum("bid,bjd->bij", q, k) / width**0.5
            total = total + logits.exp() / logits.exp().sum(-1, keepdim=True)
        self.layers[-1].append(SimpleNamespace(kind=kind, probabilities=total / module.heads))

    def mean(self, positions: int, evaluations=None, kind: str = "cross") -> torch.Tensor:
        """The mean over the layers with that many positions: picture x position x token."""
        chosen = self.layers if evaluations is None else [self.layers[e] for e in evaluations]
        found = [layer.probabilities for layers in chosen for layer in layers if layer.kind == kind]
        return torch.stack([p for p in found if p.shape[1] == positions]).mean(dim=0)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ------------------------------------------------------------------------- the numbers, and the same picture


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_maps_are_those_computed_by_hand(pipelines, shape, guidance):
    pipeline = pipelines[shape]
    resolution = 8 if shape == "sdxl" else 16
    with Reference(pipeline, guidance > 1) as reference:
        with AttentionRecorder(pipeline, [[CAT, DOG], [[4]]], [resolution]) as recorder:
            draw(pipeline, [PROMPT, OTHER], guidance=guidance)
    expected = reference.mean(resolution**2)
    cat_and_dog, single = recorder.maps()
    size = (resolution, resolution)
    assert_close(cat_and_dog[0], expected[0, :, 2].view(size))
    assert_close(cat_and_dog[1], expected[0, :, 5:7].mean(dim=-1).view(size))
    assert_close(single, expected[1:, :, 4].view(1, *size))
    assert cat_and_dog.std() > 1e-4  # the test would see something


def test_with_guidance_the_maps_are_the_prompts_and_not_the_negatives(sd1):
    maps = {}
    for prompt, options in (
        (PROMPT, {"guidance": 4.0, "negative_prompt": [OTHER]}),
        (PROMPT, {"guidance": 1.0}),
        (OTHER, {"guidance": 1.0}),
    ):
        with AttentionRecorder(sd1, [[CAT]], [16], steps=[0]) as recorder:  # before guidance acts on the latents
            draw(sd1, [prompt], **options)
        maps[prompt, options["guidance"]] = recorder.maps()[0]
    assert_close(maps[PROMPT, 4.0], maps[PROMPT, 1.0], 1e-4)
    assert (maps[PROMPT, 4.0] - maps[OTHER, 1.0]).abs().max() > 1e-2


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_the_picture_is_the_same_bit_for_bit(pipelines, shape, guidance):
    pipeline = pipelines[shape]
    plain = draw(pipeline, [PROMPT, OTHER], guidance=guidance)
    with AttentionRecorder(pipeline, [[CAT], [CAT]], [8], self_resolution=8):
        captured = draw(pipeline, [PROMPT, OTHER], guidance=guidance)
    assert torch.equal(plain, captured)
    assert torch.equal(plain, draw(pipeline, [PROMPT, OTHER], guidance=guidance))


@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_maps_do_not_depend_on_the_batch(pipelines, shape):
    pipeline = pipelines[shape]
    prompts, tokens = [PROMPT, OTHER, "a plant"], [[CAT, DOG], [[2, 3], [5]], [[2]]]
    with AttentionRecorder(pipeline, tokens, [8], self_resolution=8) as together:
        draw(pipeline, prompts)
    for b, (prompt, words) in enumerate(zip(prompts, tokens, strict=True)):
        with AttentionRecorder(pipeline, [words], [8], self_resolution=8) as alone:
            draw(pipeline, [prompt], seeds=[b])
        # another batch size takes other kernels, whose rounding the denoising steps amplify
        assert_close(together.maps()[b], alone.maps()[0], 1e-4)
        assert_close(together.self_attention()[b], alone.self_attention()[0], 1e-4)


def test_all_tokens_sum_to_one_and_resolutions_weigh_alike(sd1):
    everything = [[k] for k in range(sd1.tokenizer.model_max_length)]
    maps = {}
    for resolutions in ([16], [8], [16, 8], [8, 16, 8]):
        with AttentionRecorder(sd1, [everything], resolutions) as recorder:
            draw(sd1, [PROMPT])
        maps[tuple(resolutions)] = recorder.maps()[0]
        assert (maps[tuple(resolutions)].sum(dim=0) - 1).abs().max() < 1e-5
    low = torch.nn.functional.interpolate(maps[8,][None], scale_factor=2, mode="bilinear")[0]
    assert_close(maps[16, 8], (low + maps[16,]) / 2)
    assert torch.equal(maps[16, 8], maps[8, 16, 8])


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (40, 24)])
def test_pictures_that_are_not_square(sd1, height, width):
    with Reference(sd1) as reference, AttentionRecorder(sd1, [[CAT]], [min(height, width) // 2]) as recorder:
        draw(sd1, [PROMPT], height=height, width=width)
    (maps,) = recorder.maps()
    expected = reference.mean(height * width // 4)[0, :, 2]
    assert_close(maps, expected.view(1, height // 2, width // 2))
    with AttentionRecorder(sd1, [[CAT]], [min(height, width) // 4]) as recorder:
        draw(sd1, [PROMPT], height=height, width=width)
    assert recorder.maps()[0].shape == (1, height // 4, width // 4)


def test_latents_with_odd_sides(sd1):
    latents = torch.randn(1, 4, 15, 18, generator=torch.Generator().manual_seed(0))
    with Reference(sd1) as reference, AttentionRecorder(sd1, [[CAT]], [8]) as recorder:
        draw(sd1, [PROMPT], latents=latents)
    assert_close(recorder.maps()[0], reference.mean(8 * 9)[0, :, 2].view(1, 8, 9))


def test_half_precision_is_accumulated_in_float32(sd1):
    everything = [[k] for k in range(sd1.tokenizer.model_max_length)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 16, 16, generator=generator)  # in half precision torch 2.11 draws other noise
    with AttentionRecorder(sd1, [everything], [16]) as recorder:
        exact = draw(sd1, [PROMPT], latents=noise)
    for dtype in (torch.bfloat16, torch.float16):
        pipeline = make_pipeline("sd1").to(dtype=dtype)
        plain = draw(pipeline, [PROMPT], latents=noise.to(dtype))
        with Reference(pipeline) as reference, AttentionRecorder(pipeline, [everything], [16]) as halved:
            captured = draw(pipeline, [PROMPT], latents=noise.to(dtype))
        (maps,) = halved.maps()
        assert torch.equal(plain, captured) and maps.dtype == torch.float32
        assert (maps.sum(dim=0) - 1).abs().max() < 1e-5
        assert_close(maps, reference.mean(256)[0].T.reshape(maps.shape), 0.05)
        assert_close(maps, recorder.maps()[0], 0.3)
        assert (exact - captured).abs().max() < 0.2
    with torch.autocast("cpu", torch.bfloat16), AttentionRecorder(sd1, [everything], [16]) as mixed:
        draw(sd1, [PROMPT])
    assert mixed.maps()[0].dtype == torch.float32
    assert (mixed.maps()[0].sum(dim=0) - 1).abs().max() < 1e-5


def test_with_a_lora_loaded():
    pipeline = make_pipeline("sd1")
    with AttentionRecorder(pipeline, [[CAT]]) as without:
        draw(pipeline, [PROMPT])
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    plain = draw(pipeline, [PROMPT])
    with Reference(pipeline) as reference, AttentionRecorder(pipeline, [[CAT]]) as recorder:
        captured = draw(pipeline, [PROMPT])
    assert torch.equal(plain, captured)
    assert_close(recorder.maps()[0], reference.mean(256)[0, :, 2].view(1, 16, 16))
    assert (recorder.maps()[0] - without.maps()[0]).abs().max() > 1e-3


def test_self_attention_is_that_computed_by_hand(sd1):
    with Reference(sd1) as reference:
        with AttentionRecorder(sd1, [[CAT]], [16], steps=[1], self_resolution=8) as recorder:
            draw(sd1, [PROMPT], height=32, width=64)
    (attention,) = recorder.self_attention()
    assert_close(attention, reference.mean(128, [1], "self")[0].view(8, 16, 8, 16))
    assert (attention.sum(dim=(2, 3)) - 1).abs().max() < 1e-5
    with AttentionRecorder(sd1, [[CAT]]) as recorder:
        draw(sd1, [PROMPT])
    with pytest.raises(DiffsegError, match="no self-attention was asked for"):
        recorder.self_attention()


@pytest.mark.parametrize("at_once", [1, 40, 2 * 7 * 5 * 2, 2**20])  # one query, four, two heads, all
@pytest.mark.parametrize("masked", ["nothing", "bool", "float", "float for each query"])
def test_a_few_heads_and_queries_at_a_time_give_the_same(monkeypatch, at_once, masked):
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    torch.manual_seed(0)
    query, key, weights = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4), torch.rand(2, 5, 2)
    mask, bias = None, torch.zeros(2, 3, 7, 5)
    if masked == "bool":
        mask = (torch.arange(5) < 3).expand(2, 3, 1, 5)
        bias = torch.where(mask, 0.0, float("-inf"))
    elif masked != "nothing":
        mask = bias = torch.randn(2, 3, 1 if masked == "float" else 7, 5)
    expected = (query @ key.transpose(-1, -2) / 2 + bias).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(attention.attend(query, key, mask, None), expected)
    torch.testing.assert_close(attention.attend(query, key, mask, None, weights), expected @ weights)


def test_a_scale_of_the_layers_own_is_obeyed():
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4)
    expected = (0.3 * query @ key.mT).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(attention.attend(query, key, None, 0.3), expected)


# ------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("scheduler", "evaluations"),
    [
        (HeunDiscreteScheduler, [[0, 1], [2, 3], [4, 5], [6, 7], [8]]),
        (PNDMScheduler, [[0, 1], [2], [3], [4], [5]]),
        (DPMSolverMultistepScheduler, [[0], [1], [2], [3], [4]]),
        (DDIMScheduler, [[0], [1], [2], [3], [4]]),
    ],
)
def test_a_step_is_the_schedulers_and_not_a_count_of_calls(scheduler, evaluations):
    pipeline = make_pipeline("sd1")
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    for chosen in ("middle", "4", "0-1", "all"):
        steps = parse_steps(chosen, 5)
        with Reference(pipeline) as reference, AttentionRecorder(pipeline, [[CAT]], [16], steps) as recorder:
            draw(pipeline, [PROMPT], steps=5)
        expected = reference.mean(256, [e for step in steps for e in evaluations[step]])
        assert_close(recorder.maps()[0], expected[0, :, 2].view(1, 16, 16))
        assert len(reference.layers) == len(sum(evaluations, []))
    if scheduler is HeunDiscreteScheduler:
        first = [e for e, is_first in enumerate(reference.is_first) if is_first]
        assert first == [e[0] for e in evaluations]


def test_parse_steps():
    assert list(parse_steps("all", 3)) == [0, 1, 2]
    assert list(parse_steps("middle", 100)) == [50]  # the paper's
    assert list(parse_steps("middle", 1)) == [0]
    assert list(parse_steps("7", 8)) == [7]
    assert list(parse_steps("2-4", 8)) == [2, 3, 4]
    for text in ("", "first", "1.5", "-1", "3-", "1-2-3"):
        with pytest.raises(DiffsegError, match="attention_steps is"):
            parse_steps(text, 8)
    for text in ("8", "4-8", "4-2"):
        with pytest.raises(DiffsegError, match="outside the 8 denoising steps"):
            parse_steps(text, 8)


def kept(recorder) -> list[tuple[int, ...]]:
    """The shapes of all tensors that the recorder holds."""
    found = []
    for value in vars(recorder).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        found += [tuple(v.shape) for v in values if isinstance(v, torch.Tensor)]
    return sorted(found)


def test_memory_does_not_grow_with_the_steps(sd1):
    shapes = {}
    for steps in (1, 2, 8):
        with AttentionRecorder(sd1, [[CAT, DOG]] * 2, [8, 16], self_resolution=8) as recorder:
            draw(sd1, [PROMPT, PROMPT], steps=steps)
        shapes[steps] = kept(recorder)
        storage = sum(total.untyped_storage().nbytes() for total in recorder.sums.values())
        layers = Counter(resolution for kind, resolution, *_ in recorder.sums if kind == "cross")
        assert storage == 4 * (2 * 2 * 64 * layers[8] + 2 * 2 * 256 * layers[16] + 2 * 64 * 64)
    assert shapes[1] == shapes[2] == shapes[8]
    assert set(shapes[8]) == {(2, 2, 8, 8), (2, 2, 16, 16), (2, 8, 8, 8, 8), (2, 20, 2)}


# ---------------------------------------------------------------------------------- what can go wrong


def is_as_before(pipeline, processors) -> bool:
    """No processor was exchanged, no hook and no wrapped step is left, and no mode looks at torch's functions."""
    hooks = [h for m in pipeline.unet.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    step = "step" in vars(pipeline.scheduler)
    return pipeline.unet.attn_processors == processors and not hooks and not step and not _len_torch_function_stack()


def test_the_pipeline_is_as_before(sd1):
    before = dict(sd1.unet.attn_processors)
    with AttentionRecorder(sd1, [[CAT]], self_resolution=8):
        assert sd1.unet.attn_processors == before
        draw(sd1, [PROMPT], steps=1)
    assert is_as_before(sd1, before)

    def fail(*arguments):
        raise KeyError("inside the call")

    with pytest.raises(KeyError, match="inside the call"), AttentionRecorder(sd1, [[CAT]]):
        draw(sd1, [PROMPT], callback_on_step_end=fail)
    assert is_as_before(sd1, before)

    def interrupt(module, arguments):
        raise KeyboardInterrupt  # not an Exception: torch runs no hook after it

    hook = sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), AttentionRecorder(sd1, [[CAT]], None), AttentionRecorder(sd1, [[CAT]], [8]):
        draw(sd1, [PROMPT])
    hook.remove()
    assert is_as_before(sd1, before)


def test_recorders_inside_one_another_see_the_same(sd1):
    with AttentionRecorder(sd1, [[CAT]], [8]) as alone:
        draw(sd1, [PROMPT])
    with AttentionRecorder(sd1, [[CAT]], [8, 16]) as outer, AttentionRecorder(sd1, [[CAT]], [8]) as inner:
        draw(sd1, [PROMPT])
    assert torch.equal(outer.maps([8])[0], alone.maps()[0]) and torch.equal(inner.maps()[0], alone.maps()[0])


def test_a_layer_that_shows_nothing_raises():
    pipeline = make_pipeline("sd1")
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.processor.__class__ = type(
        "FastProcessor", (), {"__call__": lambda self, attn, states, *args, **rest: states}
    )
    with pytest.raises(DiffsegError, match="mid_block.*attn2 shows no attention map.*FastProcessor"):
        with AttentionRecorder(pipeline, [[CAT]], [8]):
            draw(pipeline, [PROMPT])
    assert is_as_before(pipeline, pipeline.unet.attn_processors)


def test_sliced_attention_gives_the_same_maps():
    pipeline = make_pipeline("sd1")
    with AttentionRecorder(pipeline, [[CAT]]) as whole:
        draw(pipeline, [PROMPT])
    pipeline.enable_attention_slicing(1)
    with AttentionRecorder(pipeline, [[CAT]]) as sliced:
        draw(pipeline, [PROMPT])
    assert_close(sliced.maps()[0], whole.maps()[0])


def test_nothing_recorded_raises(sd1, pipelines):
    with AttentionRecorder(sd1, [[CAT]]) as recorder:
        draw(pipelines["sd2"], [PROMPT])  # another pipeline
    with pytest.raises(DiffsegError, match="no attention was recorded"):
        recorder.maps()
    with AttentionRecorder(sd1, [[CAT]], [16, 64], self_resolution=64) as recorder:
        draw(sd1, [PROMPT])
    with pytest.raises(DiffsegError, match=r"resolution 64.*\[8, 16\]"):
        recorder.maps()
    with pytest.raises(DiffsegError, match=r"self-attention was recorded at resolution 64"):
        recorder.self_attention()
    with AttentionRecorder(sd1, [[CAT]], [16], steps=range(2, 6)) as recorder:
        draw(sd1, [PROMPT], steps=3)
    with pytest.raises(DiffsegError, match="step 3 .* made 3 steps"):
        recorder.maps()


def test_a_batch_of_another_size_raises(sd1):
    with pytest.raises(DiffsegError, match="words of 2 images and the call draws 1"):
        with AttentionRecorder(sd1, [[CAT], [CAT]]):
            draw(sd1, [PROMPT])  # with guidance a batch of two, but one picture
    with pytest.raises(DiffsegError, match="words of 1 images and the call draws 2"):
        with AttentionRecorder(sd1, [[CAT]]):
            draw(sd1, [PROMPT, PROMPT], guidance=1.0)
    with pytest.raises(DiffsegError, match="serves one call"):
        with AttentionRecorder(sd1, [[CAT]]):
            draw(sd1, [PROMPT])
            draw(sd1, [PROMPT])
    for tokens, resolutions in (([], [16]), ([[CAT], []], [16]), ([[CAT]], [])):
        with pytest.raises(DiffsegError, match="nothing to record"):
            AttentionRecorder(sd1, tokens, resolutions)


# --------------------------------------------------------------------------------------- token spans


def positions(tokenizer, prompt: str, *words: str) -> list[list[int]]:
    spans = [(prompt.index(word), prompt.index(word) + len(word)) for word in words]
    return token_positions(tokenizer, prompt, spans)


def test_token_positions_of_split_and_compound_words():
    tokenizer = clip_tokenizer()
    assert positions(tokenizer, PROMPT, "cat", "dogs") == [CAT, [4, 5]]
    assert positions(tokenizer, "A  CAT, and  Plant.", "CAT", "Plant") == [[2], [5]]
    assert positions(tokenizer, "a cat plant", "cat plant") == [[2, 3]]  # a compound
    assert token_positions(tokenizer, "cat and cat", [(8, 11), (0, 3)]) == [[3], [1]]  # a word twice
    ids = tokenizer("a cat-dog").input_ids
    assert positions(tokenizer, "a cat-dog", "cat-dog") == [list(range(2, len(ids) - 1))]


def test_token_positions_in_the_mini_world():
    tokenizer = build_tokenizer()
    prompt = "a photo of a potted plant and a police car"
    assert positions(tokenizer, prompt, "potted plant", "police car") == [[5, 6], [9, 10]]
    with pytest.raises(DiffsegError, match="does not know the word 'zebra'"):
        positions(tokenizer, "a photo of a zebra", "zebra")
    assert positions(tokenizer, "a zebra and a cat", "cat")  # an unknown word beside it does no harm


def test_a_word_beyond_the_longest_sequence_raises():
    tokenizer = clip_tokenizer(longest=8)  # six tokens between the marks
    assert positions(tokenizer, "a a a a a cat", "cat") == [[6]]
    with pytest.raises(DiffsegError, match="'cat' is cut off.*reads 8 tokens"):
        positions(tokenizer, "a a a a a a cat", "cat")
    assert positions(tokenizer, "a a a a dogs", "dogs") == [[5, 6]]
    with pytest.raises(DiffsegError, match="'dogs' is cut off"):  # its second half is
        positions(tokenizer, "a a a a a dogs", "dogs")
    for span in ((1, 1), (1, 2), (30, 33)):
        with pytest.raises(DiffsegError, match="holds no word"):
            token_positions(tokenizer, "a cat", [span])


# ---------------------------------------------------------------------------------------- full size


@pytest.mark.slow
def test_the_full_size_unet_of_sd15():
    """860 million random weights in bfloat16: layers, shapes and kept memory of one step at 512 pixels."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64).eval()
    finally:
        torch.set_default_dtype(before)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True)
    scheduler.set_timesteps(20)
    tokenizer = clip_tokenizer(longest=77)
    pipeline = make_pipeline("sd1")
    pipeline.register_modules(unet=unet, scheduler=scheduler, tokenizer=tokenizer)
    everything = [[k] for k in range(77)]
    latents, text = torch.randn(1, 4, 64, 64).bfloat16(), torch.randn(1, 77, 768).bfloat16()
    with AttentionRecorder(pipeline, [everything], [8, 16, 32, 64], [0], self_resolution=16) as recorder:
        with torch.no_grad():
            unet(latents, scheduler.timesteps[0], text)
    layers = Counter(resolution for kind, resolution, *_ in recorder.counts if kind == "cross")
    assert layers == {64: 5, 32: 5, 16: 5, 8: 1}
    assert {key[1]: tuple(t.shape) for key, t in recorder.sums.items() if key[0] == "cross"} == {
        r: (1, 77, r, r) for r in (8, 16, 32, 64)
    }
    assert recorder.counts["self", 16, "", -1] == 5
    assert (recorder.maps()[0].sum(dim=0) - 1).abs().max() < 1e-5
    kept_bytes = sum(t.untyped_storage().nbytes() for t in recorder.sums.values())
    assert kept_bytes == 4 * (77 * (5 * 64**2 + 5 * 32**2 + 5 * 16**2 + 8**2) + 256**2)
