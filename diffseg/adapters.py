"""Put a LoRA (Hu et al. 2022) into a pipeline: of any of the usual tools, and all of it or nothing.

diffusers converts the many names that tools give to the same layers, but it leaves out what it does not know, in some
cases without a word. So here a file is compared with the pipeline before it is loaded, and looked for afterwards.
Understood are files of diffusers (also its old attention processors), PEFT and kohya (also with SGM's block names).
"""

import json
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
    logging,
)
from huggingface_hub import snapshot_download
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from diffseg.errors import DiffsegError
from diffseg.families import denoiser_name
from diffseg.paths import locate
from diffseg.weight_files import PICKLES, check_file, get_online

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
# how the names of the two matrices end: A, "down", comes first and B, "up", second; a PEFT model's own state_dict()
# has the adapter's name in them, "default"
MATRIX = re.compile(r"[._]lora(?:_|\.|_linear_layer\.)(?P<half>A|B|down|up)(?:\.default)?\.weight$")
Weights = dict[str, torch.Tensor]
Layers = dict[str, dict[str, Weights]]  # component -> layer -> {"A": rank x inputs, "B": outputs x rank}


def load_adapter(pipeline, place: str | Path, scale: float = 1.0, name: str = "generator") -> None:
    """Put a LoRA into the pipeline under `name`, in place of one of that name; others stay at work beside it.

    place: a .safetensors file, a folder with one, a hub id, or owner/name/file.safetensors on the hub. scale: 0 is the
    base model, 1 the LoRA as it was trained; alpha over rank is obeyed as the file has it. Raises a DiffsegError, and
    leaves the pipeline as it was, when the file is missing or damaged, or not every tensor in it fits the pipeline.
    """
    path = find_lora(str(place))
    weights, settings, from_peft = read_lora(path, denoiser_name(pipeline))
    named = with_components(pipeline, weights)
    has_loader = hasattr(pipeline, "load_lora_weights")
    # as the file is, diffusers obeys the alphas in its metadata only, and those beside the tensors in some families
    as_it_is = has_loader and named.keys() == weights.keys() and not from_peft and not alphas_of(weights)
    if not as_it_is:
        named = fold_alphas(named, settings)
    layers = layers_of(pipeline, named, path)
    if wrong := misfit(pipeline, layers):
        raise DiffsegError(
            f"the LoRA {path} is of another base model ({wrong}); load the generator that it was made for."
        )
    if not has_loader and offloaded_in_parts(pipeline):
        raise DiffsegError(
            f"{type(pipeline).__name__} takes no LoRA while single layers are offloaded; "
            "set generator_offload to model or none."
        )
    remove_adapter(pipeline, name)
    try:
        if has_loader:
            with quiet_diffusers():
                pipeline.load_lora_weights(str(path) if as_it_is else named, adapter_name=name)
        else:
            for component, parts in layers.items():
                inject(getattr(pipeline, component), parts, name)
        expected = {(component, layer) for component, parts in layers.items() for layer in parts}
        if (loaded := {place[:2] for place in lora_layers(pipeline) if name in place[2].lora_A}) != expected:
            raise ValueError(f"{len(loaded & expected)} of {len(expected)} layers were loaded")
    except Exception as error:  # diffusers and peft raise many kinds
        remove_adapter(pipeline, name)
        raise unloadable(path, error) from error
    for _, _, layer in lora_layers(pipeline):
        layer.set_adapter(list(layer.lora_A), inference_mode=True)
        layer.set_scale(name, scale)


def offloaded_in_parts(pipeline) -> bool:
    """Whether generator_offload is group or sequential: a new matrix would lie outside its layer's hook."""
    layers = [layer for _, module in modules_of(pipeline) for layer in module.modules()]
    return any(hasattr(layer, "_diffusers_hook") or any(p.is_meta for p in layer.parameters(False)) for layer in layers)


def remove_adapter(pipeline, name: str) -> None:
    """Take out the LoRA of that name, if there is one."""
    for _, _, layer in lora_layers(pipeline):
        if name in layer.lora_A:
            layer.delete_adapter(name)
    for _, module in modules_of(pipeline):
        getattr(module, "peft_config", {}).pop(name, None)


# --------------------------------------------------------------------------------------------------- files


def find_lora(place: str) -> Path:
    """Return the .safetensors file that `place` means (see `load_adapter`); raise a DiffsegError when there is none."""
    path = locate("generator_lora", place)
    if path.is_file():
        if path.suffix in PICKLES:
            raise DiffsegError(f"the LoRA {path} is no .safetensors file; only these are read, choose another copy.")
        return path
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        known = [file for file in found if file.name in (DIFFUSERS_FILE, PEFT_FILE)] or found
        if len(known) != 1:
            names = ", ".join(file.name for file in known) or "none"
            raise DiffsegError(f"{path} must hold one LoRA in a .safetensors file, not {names}; give the file itself.")
        return known[0]
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+\.safetensors))?", place)
    if not on_hub:
        raise DiffsegError(f"there is no LoRA {path}; give a .safetensors file, its folder, or a hub id.")
    repository, file = on_hub.groups()
    try:
        folder = snapshot_download(repository, allow_patterns=[file or "*.safetensors", "adapter_config.json"])
    except Exception as error:
        raise DiffsegError(
            f"the LoRA {place} is neither a file or folder here nor to be had from the hub ({brief(error)}); "
            f"{get_online(error)}, or give a .safetensors file."
        ) from error
    return find_lora(str(Path(folder) / (file or "")))


def read_lora(path: Path, denoiser: str) -> tuple[Weights, dict, bool]:
    """Return a file's tensors, the settings of its LoraConfig as {"component.setting": value}, and whether these are
    PEFT's, which writes them to a file beside.

    Raises a DiffsegError for a damaged file, and for one that holds what is not of a LoRA.
    """
    check_file(path)
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}
        settings = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    beside = path.parent / "adapter_config.json"
    if from_peft := path.name == PEFT_FILE and beside.is_file():
        check_file(beside)
        settings = {f"{denoiser}.{key}": value for key, value in json.loads(beside.read_text("utf-8")).items()}
    strange = [key for key in weights if not (MATRIX.search(key) or key.endswith(".alpha"))]
    if strange or not weights:
        what = f"{strange[0]}, which is not of a LoRA" if strange else "nothing"
        raise DiffsegError(
            f"the LoRA {path} holds {what}; choose a file of a plain LoRA, without DoRA, LoHa, LoKr or trained biases."
        )
    return weights, settings, from_peft


# --------------------------------------------------------------------------------------------------- names


def modules_of(pipeline) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module))


def lora_layers(pipeline) -> Iterator[tuple[str, str, LoraLayer]]:
    """Yield (component, layer's name, layer) of all layers that can have a LoRA beside them."""
    for component, module in modules_of(pipeline):
        for name, layer in module.named_modules():
            if isinstance(layer, LoraLayer):
                yield component, name, layer


def layer_names(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers by name; a LoRA's wrapper comes before the layer in it, which counts."""
    return {name.removesuffix(".base_layer"): layer for name, layer in module.named_modules() if "lora_" not in name}


def with_components(pipeline, weights: Weights) -> Weights:
    """Name the component (the denoiser) where a file leaves it out, as PEFT does, leave the adapter's name out, and
    resolve kohya's underscores where diffusers has no loader that does."""
    denoiser = denoiser_name(pipeline)
    layers = layer_names(getattr(pipeline, denoiser))
    names = {name: name for name in layers}
    if not hasattr(pipeline, "load_lora_weights"):
        names |= {f"lora_{who}_{name.replace('.', '_')}": name for name in layers for who in ("unet", "transformer")}
    renamed = {}
    for key, value in weights.items():
        key = key.replace(".default.weight", ".weight")
        short = key.removeprefix("base_model.model.")
        matrix = MATRIX.search(short)
        layer = short[: matrix.start()] if matrix else short.removesuffix(".alpha")
        end = f"lora_{half_of(key)}.weight" if matrix else "alpha"
        renamed[f"{denoiser}.{names[layer]}.{end}" if layer in names else key] = value
    return renamed


def layers_of(pipeline, weights: Weights, path: Path) -> Layers:
    """Return the matrices by component and layer, after the conversion by diffusers."""
    try:
        converted = weights
        if hasattr(pipeline, "load_lora_weights"):
            is_xl = isinstance(pipeline, StableDiffusionXLLoraLoaderMixin)
            with quiet_diffusers():
                converted = pipeline.lora_state_dict(
                    dict(weights), **({"unet_config": pipeline.unet.config} if is_xl else {})
                )
            converted = converted[0] if isinstance(converted, tuple) else converted
        count = sum("A" == half_of(key) for key in weights)
        if sum("A" == half_of(key) for key in converted) < count:  # one may be split into more
            raise ValueError("some of its layers have no counterpart")
        layers: Layers = {}
        for component, module in modules_of(pipeline):
            parts = {k.removeprefix(f"{component}."): v for k, v in converted.items() if k.startswith(f"{component}.")}
            for key, value in peft_names(component, module, parts).items():
                layers.setdefault(component, {}).setdefault(key[: MATRIX.search(key).start()], {})[half_of(key)] = value
        known = tuple(f"{component}." for component, _ in modules_of(pipeline))
        if lost := [key for key in converted if not key.startswith(known)]:
            raise ValueError(f"there is no layer {lost[0]}")
    except Exception as error:
        raise unloadable(path, error) from error
    return layers


def half_of(key: str) -> str:
    """Return "A" for a matrix that comes first ("down"), "B" for one that comes second ("up"), "" for what is none."""
    matrix = MATRIX.search(key)
    return "" if not matrix else "A" if matrix["half"] in ("A", "down") else "B"


def peft_names(component: str, module: torch.nn.Module, weights: Weights) -> Weights:
    """Return one component's matrices under PEFT's names, as diffusers converts them when it loads."""
    if not weights or any(".lora_A." in key for key in weights):
        return weights
    if component.startswith("text_encoder"):
        weights = convert_state_dict_to_peft(convert_state_dict_to_diffusers(weights))
        prefix = "" if hasattr(module, "text_model") else "text_model."  # transformers 5 has none in CLIP
        return {key.removeprefix(prefix): value for key, value in weights.items()}
    return convert_unet_state_dict_to_peft(weights)


def misfit(pipeline, layers: Layers) -> str:
    """Say in a few words where matrices do not fit the pipeline's layers; "" where they do."""
    for component, parts in layers.items():
        known = layer_names(getattr(pipeline, component))
        for name, halves in parts.items():
            shape = getattr(getattr(known.get(name), "weight", None), "shape", None)
            if shape is None:
                return f"the {component} has no layer {name}"
            if halves.keys() != {"A", "B"}:
                return f"of {name} it holds one matrix of two"
            for side, found, expected in (
                ("inputs", halves["A"].shape[1], shape[1]),
                ("outputs", halves["B"].shape[0], shape[0]),
            ):
                if found != expected:
                    return f"{name} has {expected} {side}, the LoRA's {found}"
    return ""


# --------------------------------------------------------------------------------------------------- alpha, PEFT


def alphas_of(weights: Weights) -> dict[str, float]:
    return {key.removesuffix(".alpha"): float(value) for key, value in weights.items() if key.endswith(".alpha")}


def fold_alphas(weights: Weights, settings: dict) -> Weights:
    """Multiply each B by its alpha / rank, and leave alpha out: without one, every loader takes alpha = rank."""
    alphas, folded = alphas_of(weights), {}
    ranks = {key[: MATRIX.search(key).start()]: value.shape[0] for key, value in weights.items() if half_of(key) == "A"}
    for key, value in weights.items():
        if half_of(key) == "B":
            layer = key[: MATRIX.search(key).start()]
            component, _, short = layer.partition(".")
            patterns = settings.get(f"{component}.alpha_pattern") or {}
            alpha = patterns.get(get_pattern_key(patterns, short), settings.get(f"{component}.lora_alpha"))
            alpha, rank = alphas.get(layer, alpha), ranks.get(layer, value.shape[1])
            by = math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank
            value = value if alpha is None else value.float() * (alpha / by)  # half precision would round
        if half_of(key):
            folded[key] = value
    return folded


def inject(module: torch.nn.Module, layers: dict[str, Weights], name: str) -> None:
    """Put a LoRA whose alphas are folded into a model by PEFT alone, where diffusers has no loader."""
    ranks = {f"^{re.escape(layer)}": halves["A"].shape[0] for layer, halves in layers.items()}
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(layers), rank_pattern=ranks, alpha_pattern=ranks)
    inject_adapter_in_model(config, module, name)
    state = {f"{layer}.lora_{half}.weight": value for layer, halves in layers.items() for half, value in halves.items()}
    unexpected = set_peft_model_state_dict(module, state, name).unexpected_keys
    if unexpected:
        raise ValueError(f"there is no layer {unexpected[0]}")
    for layer in module.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            for matrix in (layer.lora_A[name], layer.lora_B[name]):
                matrix.to(layer.base_layer.weight.device, layer.base_layer.weight.dtype)


# --------------------------------------------------------------------------------------------------- messages


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without diffusers' warnings: that there is nothing for some component is no news, and errors are raised too."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def brief(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200).rstrip(".")


def unloadable(path: Path, error: Exception) -> DiffsegError:
    return DiffsegError(
        f"the LoRA {path} does not fit this generator ({brief(error)}); choose one that was made for its base model."
    )
