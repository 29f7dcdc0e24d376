"""LoRA files of every format change the picture as weights merged by hand do; what does not fit changes nothing."""

import json
import re

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_loading import build, picture

from diffseg.adapters import DIFFUSERS_FILE, PEFT_FILE, load_adapter, remove_adapter
from diffseg.errors import DiffsegError
from diffseg.families import denoiser_name

RANK, ALPHA = 4, 8.0  # their quotient is exact in floating point


def make_lora(module) -> dict:
    """Return {layer: (A, B)} for the attention of a denoiser, or for the layers of CLIP."""
    ending = r"to_[qkv]|to_out\.0" if hasattr(module, "attn_processors") else r"[qkv]_proj|out_proj|fc[12]"
    random = torch.Generator().manual_seed(5)
    return {
        name: (
            torch.randn(RANK, layer.in_features, generator=random) / layer.in_features**0.5,
            torch.randn(layer.out_features, RANK, generator=random) / RANK**0.5,
        )
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and re.search(rf"\.({ending})$", name)
    }


def merged(family: str, loras: dict[str, dict], alpha: float, dtype: torch.dtype = torch.float32):
    """Build the pipeline with W + alpha / rank B A in place of W, which is what a LoRA means."""
    pipeline = build(family).to(dtype)
    for component, layers in loras.items():
        for name, (a, b) in layers.items():
            getattr(pipeline, component).get_submodule(name).weight.data += alpha / RANK * b.to(dtype) @ a.to(dtype)
    return pipeline


def settings(component: str) -> dict:
    targets = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    return {f"{component}.r": RANK, f"{component}.lora_alpha": ALPHA, f"{component}.target_modules": targets}


# each format writes {component: {layer: (A, B)}} to a folder, and returns the alpha that it could express


def write_diffusers(folder, loras):
    weights, metadata = {}, {}
    for component, layers in loras.items():
        metadata |= settings(component)
        for name, (a, b) in layers.items():
            weights |= {f"{component}.{name}.lora_A.weight": a, f"{component}.{name}.lora_B.weight": b}
    save_file(weights, folder / DIFFUSERS_FILE, {"lora_adapter_metadata": json.dumps(metadata)})
    return ALPHA


def write_diffusers_without_metadata(folder, loras):
    write_diffusers(folder, loras)
    save_file(load_file(folder / DIFFUSERS_FILE), folder / DIFFUSERS_FILE)
    return RANK  # which every loader takes it for


def write_alpha_keys(folder, loras):
    write_diffusers(folder, loras)
    weights = load_file(folder / DIFFUSERS_FILE)
    layers = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith("lora_A.weight")]
    save_file(weights | {f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}, folder / DIFFUSERS_FILE)
    return ALPHA


def write_peft(folder, loras):
    [layers] = loras.values()
    weights = {}
    for name, (a, b) in layers.items():
        weights |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(weights, folder / PEFT_FILE)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * ALPHA, "alpha_pattern": {"to_.*": ALPHA}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return ALPHA


def write_bare(folder, loras):
    """As get_peft_model_state_dict returns the weights of one model."""
    [layers] = loras.values()
    weights = {}
    for name, (a, b) in layers.items():
        weights |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(weights, folder / "own.safetensors")
    return RANK


def with_adapter_name(write):
    """As a PEFT model's own state_dict() names the matrices."""

    def write_named(folder, loras):
        alpha = write(folder, loras)
        [file] = folder.glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        weights = {key.replace(".weight", ".default.weight"): value for key, value in load_file(file).items()}
        save_file(weights, file, metadata)
        return alpha

    return write_named


def write_attention_processors(folder, loras):
    [layers] = loras.values()
    weights = {}
    for name, (a, b) in layers.items():
        block, projection = re.fullmatch(r"(.*attn\d)\.(to_\w+)(?:\.0)?", name).groups()
        key = f"unet.{block}.processor.{projection}_lora"
        weights |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
    save_file(weights, folder / DIFFUSERS_FILE)
    return RANK


def kohya(folder, loras, rename=lambda name: name.replace(".", "_")):
    two = "text_encoder_2" in loras
    prefixes = {"text_encoder": "lora_te1" if two else "lora_te", "text_encoder_2": "lora_te2"}
    weights = {}
    for component, layers in loras.items():
        for name, (a, b) in layers.items():
            name = name if "text" not in component else "text_model." + name.removeprefix("text_model.")
            key = f"{prefixes.get(component, 'lora_unet')}_{rename(name)}"
            weights |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(ALPHA)}
    save_file(weights, folder / "style.safetensors")
    return ALPHA


def kohya_sgm(folder, loras):
    """Names of the blocks as in the first SDXL code: numbered through, a resnet before each attention."""

    def rename(name: str) -> str:
        found = re.fullmatch(r"(down|up)_blocks\.(\d)\.attentions\.(\d)\.(.*)", name)
        if found:
            side, block, layer, rest = found[1], int(found[2]), int(found[3]), found[4]
            number = 2 * block + layer  # layers_per_block is 1, to which up blocks add one, down blocks a downsampler
            name = f"input_blocks.{number + 1}.1.{rest}" if side == "down" else f"output_blocks.{number}.1.{rest}"
        name = re.sub(r"mid_block\.attentions\.0", "middle_block.1", name)
        return name.replace(".", "_")

    return kohya(folder, loras, rename)


def kohya_flux(folder, loras):
    """Names of Flux's first code, where query, key and value are one layer with one A."""
    [layers] = loras.values()
    weights = {}
    for name in [name for name in layers if name.endswith("attn.to_q")]:
        block = name.removesuffix(".to_q")
        a = layers[name][0]
        parts = [layers[f"{block}.to_{part}"] for part in "qkv"]
        for part in "qkv":
            layers[f"{block}.to_{part}"] = (a, layers[f"{block}.to_{part}"][1])
        if not name.startswith("transformer_blocks"):
            continue
        key = f"lora_unet_double_blocks_{name.split('.')[1]}_img_attn_qkv"
        weights |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": torch.cat([b for _, b in parts])}
        weights[f"{key}.alpha"] = torch.tensor(ALPHA)
    for name in [name for name in layers if not re.match(r"transformer_blocks.*\.to_[qkv]$", name)]:
        del layers[name]
    save_file(weights, folder / "flux.safetensors")
    return ALPHA


BOTH, ALL = ("unet", "text_encoder"), ("unet", "text_encoder", "text_encoder_2")
FORMATS = {
    "sd1 diffusers": ("sd1", write_diffusers, BOTH),
    "sd1 diffusers, no metadata": ("sd1", write_diffusers_without_metadata, BOTH),
    "sd1 alpha keys": ("sd1", write_alpha_keys, ["unet"]),
    "sd1 peft folder": ("sd1", write_peft, ["unet"]),
    "sd1 without prefix": ("sd1", write_bare, ["unet"]),
    "sd1 with the adapter's name": ("sd1", with_adapter_name(write_diffusers), BOTH),
    "sd1 without prefix, with the adapter's name": ("sd1", with_adapter_name(write_bare), ["unet"]),
    "sd1 old attention processors": ("sd1", write_attention_processors, ["unet"]),
    "sd1 kohya": ("sd1", kohya, ["unet"]),
    "sd1 kohya, text encoder": ("sd1", kohya, BOTH),
    "sd1 kohya, text encoder only": ("sd1", kohya, ["text_encoder"]),
    "lcm kohya": ("lcm", kohya, BOTH),
    "sdxl diffusers": ("sdxl", write_diffusers, ALL),
    "sdxl kohya, te1 and te2": ("sdxl", kohya, ALL),
    "sdxl kohya, SGM names": ("sdxl", kohya_sgm, ALL),
    "sd3 diffusers": ("sd3", write_diffusers, ["transformer"]),
    "sd3 alpha keys": ("sd3", write_alpha_keys, ["transformer"]),
    "sd3 peft folder": ("sd3", write_peft, ["transformer"]),
    "flux diffusers": ("flux", write_diffusers, ["transformer"]),
    "flux alpha keys": ("flux", write_alpha_keys, ["transformer"]),
    "flux kohya": ("flux", kohya_flux, ["transformer"]),
    "pixart diffusers": ("pixart", write_diffusers, ["transformer"]),
    "pixart alpha keys": ("pixart", write_alpha_keys, ["transformer"]),
    "pixart peft folder": ("pixart", write_peft, ["transformer"]),
    "pixart with the adapter's name": ("pixart", with_adapter_name(write_diffusers), ["transformer"]),
    "pixart kohya": ("pixart", kohya, ["transformer"]),
    "hunyuan diffusers": ("hunyuan", write_diffusers, ["transformer"]),
    "hunyuan peft folder": ("hunyuan", write_peft, ["transformer"]),
    "hunyuan kohya": ("hunyuan", kohya, ["transformer"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_changes_the_picture_as_merged_weights_do(tmp_path, name):
    family, write, components = FORMATS[name]
    pipeline = build(family)
    if family == "sdxl":
        pipeline.to(torch.float64)  # in float32 rounding alone moves its random weights' picture by a hundredth
    loras = {component: make_lora(getattr(pipeline, component)) for component in components}
    alpha = write(tmp_path, loras)
    base, expected = picture(pipeline), picture(merged(family, loras, alpha, pipeline.dtype))
    load_adapter(pipeline, tmp_path)
    drawn = picture(pipeline)
    moved, error = np.abs(drawn - base).max(), np.abs(drawn - expected).max()
    print(f"| {name} | {moved:.3f} | {error:.0e} |")
    assert moved > 0.02 and error < 1e-4 * moved
    load_adapter(pipeline, tmp_path, scale=0)
    assert (picture(pipeline) == base).all()
    load_adapter(pipeline, tmp_path)
    remove_adapter(pipeline, "generator")
    assert (picture(pipeline) == base).all()


def test_two_loras_at_once_and_each_with_its_own_strength(tmp_path):
    for name, component in (("one", "unet"), ("two", "text_encoder")):
        (tmp_path / name).mkdir()
        write_diffusers(tmp_path / name, {component: make_lora(getattr(build("sd1"), component))})
    pipeline = build("sd1")
    load_adapter(pipeline, tmp_path / "one", name="one")
    one = picture(pipeline)
    load_adapter(pipeline, tmp_path / "two", name="two")
    assert (picture(pipeline) != one).any()
    load_adapter(pipeline, tmp_path / "two", 0, name="two")
    assert (picture(pipeline) == one).all()
    assert not any(weight.requires_grad for weight in pipeline.unet.parameters())


@pytest.mark.parametrize("family", ["sd1", "pixart"])
def test_half_the_strength_is_half_the_change(tmp_path, family):
    pipeline = build(family)
    component = denoiser_name(pipeline)
    loras = {component: make_lora(getattr(pipeline, component))}
    expected = picture(merged(family, loras, write_diffusers(tmp_path, loras) / 2))
    load_adapter(pipeline, tmp_path, scale=0.5)
    assert np.abs(picture(pipeline) - expected).max() < 1e-4


def test_a_rank_stabilised_alpha_counts_over_the_root_of_each_layers_rank(tmp_path):
    pipeline, expected = build("pixart"), build("pixart")
    layers = make_lora(pipeline.transformer)
    wide = next(iter(layers))
    a, b = layers[wide]
    layers[wide] = a.repeat(4, 1), b.repeat(1, 4)  # rank 16, and four times the product
    write_diffusers(tmp_path, {"transformer": layers})
    metadata = settings("transformer") | {"transformer.use_rslora": True}
    file = tmp_path / DIFFUSERS_FILE
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(metadata)})
    for name, (a, b) in layers.items():
        expected.transformer.get_submodule(name).weight.data += ALPHA / len(a) ** 0.5 * b @ a
    load_adapter(pipeline, tmp_path)
    assert np.abs(picture(pipeline) - picture(expected)).max() < 1e-4


def test_in_half_precision(tmp_path):
    pipeline = build("pixart").to(torch.bfloat16)
    loras = {"transformer": make_lora(pipeline.transformer)}
    write_diffusers(tmp_path, loras)
    load_adapter(pipeline, tmp_path)
    assert {weight.dtype for weight in pipeline.transformer.parameters()} == {torch.bfloat16}


def by_groups(pipeline):
    pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def by_layers(pipeline):  # as sequential offload, which accelerate fails to do on a CPU with a text encoder
    cpu_offload(getattr(pipeline, denoiser_name(pipeline)), torch.device("cpu"))


@pytest.mark.parametrize("offload", [by_groups, by_layers])
def test_under_offload(tmp_path, offload):
    """Diffusers' loaders renew their hooks; a matrix that PEFT alone puts in would have none, and stay off the GPU."""
    pipeline = build("pixart")
    write_diffusers(tmp_path, {"transformer": make_lora(pipeline.transformer)})
    offload(pipeline)
    with pytest.raises(DiffsegError, match="takes no LoRA while .*; set generator_offload to model or none"):
        load_adapter(pipeline, tmp_path)
    assert np.isfinite(picture(pipeline)).all()
    pipeline = build("sd3")
    loras = {"transformer": make_lora(pipeline.transformer)}
    write_diffusers(tmp_path, loras)
    by_groups(pipeline)
    load_adapter(pipeline, tmp_path)
    assert np.abs(picture(pipeline) - picture(merged("sd3", loras, ALPHA))).max() < 1e-3


# ---------------------------------------------------------------------------------------------------- what is refused


def sd1_file(folder, change=lambda weights: weights, name="style.safetensors"):
    kohya(folder, {"unet": make_lora(build("sd1").unet)})
    save_file(change(load_file(folder / "style.safetensors")), folder / name)
    return folder / name


FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
LAYER = f"{FIRST}.lora_down.weight"
ODD = {f"{FIRST.replace('0_attn1', '7_attn1')}.{half}.weight": torch.zeros(4, 4) for half in ("lora_down", "lora_up")}


@pytest.mark.parametrize(
    ("family", "change", "sentence"),
    [
        ("sdxl", lambda w: w, "is of another base model"),
        ("sd3", lambda w: w, "does not fit this generator .*; choose one that was made for its base model"),
        ("flux", lambda w: w, "does not fit this generator"),
        ("pixart", lambda w: w, "does not fit this generator"),
        ("hunyuan", lambda w: w, "does not fit this generator"),
        (
            "sd1",
            lambda w: w | ODD,
            "is of another base model .the unet has no layer down_blocks.0.*blocks.7.attn1.to_q",
        ),
        ("sd1", lambda w: w | {LAYER: torch.zeros(4, 9)}, "attn1.to_q has 16 inputs, the LoRA's 9"),
        ("sd1", lambda w: {k: v for k, v in w.items() if k != LAYER}, "does not fit|holds one matrix of two"),
        ("sd1", lambda w: w | {f"{FIRST}.dora_scale": torch.ones(16)}, "holds .*dora_scale, which is not of a LoRA"),
        ("sd1", lambda w: {"lora_unet_x.hada_w1_a": torch.ones(1)}, "holds .*hada_w1_a, which is not of a LoRA"),
        ("sd1", lambda w: {}, "holds nothing"),
        ("sd1", lambda w: w | {"something.else.lora_A.weight": torch.ones(1, 1)}, "does not fit this generator"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, family, change, sentence):
    pipeline = build(family)
    base = picture(pipeline)
    with pytest.raises(DiffsegError, match=sentence) as caught:
        load_adapter(pipeline, sd1_file(tmp_path, change))
    print(caught.value)
    assert "\n" not in str(caught.value)
    assert (picture(pipeline) == base).all()


def test_a_refused_lora_leaves_the_one_that_was_there(tmp_path):
    pipeline = build("sd1")
    good = sd1_file(tmp_path)
    load_adapter(pipeline, good)
    drawn = picture(pipeline)
    with pytest.raises(DiffsegError, match="the unet has no layer"):
        load_adapter(pipeline, sd1_file(tmp_path, lambda w: w | ODD, "odd.safetensors"))
    assert (picture(pipeline) == drawn).all()


def test_files_that_are_no_lora(tmp_path):
    pipeline = build("sd1")
    file = sd1_file(tmp_path)
    whole = file.read_bytes()
    for content, sentence in (
        (whole[: len(whole) // 2], "style.safetensors is damaged"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, not the file itself; run git lfs pull",
        ),
    ):
        file.write_bytes(content)
        with pytest.raises(DiffsegError, match=sentence):
            load_adapter(pipeline, file)
    (tmp_path / "other.safetensors").write_bytes(whole)
    with pytest.raises(
        DiffsegError, match=r"must hold one LoRA .*, not other.safetensors, style.safetensors; give the"
    ):
        load_adapter(pipeline, tmp_path)
    (tmp_path / "old.bin").write_bytes(b"pickled")
    with pytest.raises(DiffsegError, match="old.bin is no .safetensors file"):
        load_adapter(pipeline, tmp_path / "old.bin")
    with pytest.raises(
        DiffsegError, match="there is no LoRA .*nowhere; give a .safetensors file, its folder, or a hub id"
    ):
        load_adapter(pipeline, "nowhere")


def test_a_lora_of_the_hub(tmp_path, monkeypatch):
    sd1_file(tmp_path)
    monkeypatch.setattr("diffseg.adapters.snapshot_download", lambda repository, allow_patterns: str(tmp_path))
    for place in ("owner/style", "owner/style/style.safetensors"):
        load_adapter(build("sd1"), place)

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("diffseg.adapters.snapshot_download", offline)
    with pytest.raises(DiffsegError, match=r"neither a file or folder here nor to be had from the hub \(no network\)"):
        load_adapter(build("sd1"), "owner/style")
