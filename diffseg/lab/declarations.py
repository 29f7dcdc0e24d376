"""What each parameter of the notebooks may be: its type, its range, and what it means for a step's key.

A parameter is declared once, whichever notebooks have it. Its default and its meaning stand in their parameters cells.
`check` applies these declarations to single values, without torch; `diffseg.lab.combinations` compares them with one
another.
"""

import difflib
import functools
import importlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError, WrapValidator

from diffseg.errors import DiffsegError


class Flag(Enum):
    FILE = "the value may name a file or folder, whose bytes decide the result"
    INERT = "the value cannot change the bytes of a result"


@dataclass(frozen=True)
class OneOf:
    """The value, or each element of it, is one of the names that the method lists in `module`."""

    module: str
    attribute: str

    def names(self) -> list[str]:
        return list(getattr(importlib.import_module(self.module), self.attribute))


def matches(test: Callable[[Any], Any], rule: str) -> AfterValidator:
    """Require `test` of a value; `rule` completes the sentence "it must ..."."""

    def validate(value: Any) -> Any:
        if not test(value):
            raise ValueError(rule)
        return value

    return AfterValidator(validate)


def number(rule: str) -> WrapValidator:
    """Read what pydantic reads as a number, but no truth value; `rule` completes the sentence "it must ..."."""

    def validate(value: Any, read: Callable[[Any], Any]) -> Any:
        try:
            return read(None if isinstance(value, bool) else value)
        except ValidationError:
            raise ValueError(rule) from None

    return WrapValidator(validate)


def is_template(text: str) -> bool:
    return text.count("{}") == 1 and not re.search(r"[{}]", text.replace("{}", "").replace("{place}", ""))


# Surrogates cannot be written as UTF-8; a line break would end a row or a comment.
one_line = matches(lambda text: not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text), "be one line of Unicode text")

# YAML 1.1 reads 1e-4 as a text and papermill's `-p` hands over 'true': both are understood. A number is never taken for
# a truth value nor a truth value for a number; 3.0 is a whole number, 3.5 is not.
Truth = Annotated[bool, BeforeValidator(lambda value: {"true": True, "false": False}.get(str(value).lower()))]
Whole = Annotated[int, number("be a whole number")]
Number = Annotated[float, Field(allow_inf_nan=False), number("be a finite number")]
TYPES = {bool: Truth, int: Whole, float: Number, str: str, list: list, dict: dict}

# Upper bounds are far beyond use. They keep a slip of the keyboard from filling the disk.
Text = Annotated[str, Field(max_length=4000), one_line]
Name = Annotated[str, Field(min_length=1, max_length=4000), one_line]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Count = Annotated[Whole, Field(ge=1, le=10**9)]
CountOrNone = Annotated[Whole, Field(ge=0, le=10**9)]
LONGEST = 8192  # pixels
Side = Annotated[Whole, Field(multiple_of=8), Field(ge=8, le=LONGEST)]  # Stable Diffusion's VAE halves three times
Share = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Positive = Annotated[Number, Field(gt=0, le=1e6)]
NotNegative = Annotated[Number, Field(ge=0, le=1e6)]
Filled = Field(min_length=1, max_length=1000)
Captions = Annotated[list[Name], Filled]
RunName = Annotated[
    str,
    Field(max_length=200),  # a file's name may have 255 bytes
    matches(
        lambda text: re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text),
        "be made of letters, digits, '.', '_' and '-', as in voc, or study/run",
    ),
]
Precision = Annotated[Text, OneOf("diffseg.generator", "PRECISIONS")]
Refiner = Annotated[Text, OneOf("diffseg.refiners", "REFINERS")]


class Parameters(BaseModel):
    """The parameters of all notebooks."""

    # of every notebook
    run: Annotated[RunName, Flag.INERT]
    out: Annotated[Text, Flag.INERT]
    seed: Seed
    benchmark: Annotated[Text, OneOf("diffseg.benchmarks.classes", "NAMES")]
    class_list: Annotated[list[Name], Field(max_length=999)]  # id 1000 means ignored
    data_root: Name  # no FILE: a benchmark is a fixed thing of many gigabytes; one's own counts (`lab.steps`)
    data_names: Annotated[dict[Name, Name], Field(max_length=10_000)]
    generator: Annotated[Name, Flag.FILE]
    generator_precision: Precision
    generator_variant: Text
    generator_offload: Annotated[Text, OneOf("diffseg.generator", "OFFLOADS")]
    generator_scheduler: Annotated[Text, OneOf("diffseg.generator", "SCHEDULERS")]
    height: Side
    width: Side
    sampling_steps: Annotated[Whole, Field(ge=1, le=1000)]  # Stable Diffusion has 1,000 timesteps
    guidance_scale: NotNegative
    workers: Annotated[Whole, Field(ge=0, le=1000), Flag.INERT]
    # 00
    retrain_steps: CountOrNone
    retrain_scenes: Count
    # 01
    images: Count
    templates: Annotated[
        list[Annotated[Name, matches(is_template, "hold one {} and no other braces but {place}")]], Filled
    ]
    places: Annotated[
        list[Annotated[Name, matches(lambda text: not re.search(r"[{}]", text), "hold no braces")]],
        Field(max_length=1000),
    ]
    caption_file: Annotated[Text, Flag.FILE]
    plain_share: Share
    hyponym_depth: CountOrNone
    minimum_frequency: CountOrNone
    classes_per_prompt: Count
    balance_classes: Truth
    negative_prompt: Text
    grid_pictures: Annotated[Whole, Field(ge=0, le=1000), Flag.INERT]
    # 02
    target_images: Annotated[Text, Flag.FILE]
    lora_captions: Captions
    lora_words: list[Name]
    lora_caption_dropout: BelowOne
    lora_rank: Annotated[Whole, Field(ge=1, le=10_000)]
    lora_alpha: Positive
    lora_targets: Captions
    lora_learning_rate: Annotated[Number, Field(gt=0, le=100)]
    lora_warmup: CountOrNone
    lora_steps: Count
    lora_candidates: Count
    lora_held_out: BelowOne
    lora_batch: Count
    lora_height: Side
    lora_width: Side
    lora_snr_gamma: NotNegative
    lora_ema: BelowOne
    lora_precision: Precision
    lora_gradient_checkpointing: Truth
    lora_checkpoint_every: Annotated[Count, Flag.INERT]
    lora_pictures: Annotated[Whole, Field(ge=2, le=10**6)]  # a distance between sets needs two
    # 03
    generator_lora: Annotated[Text, Flag.FILE]
    lora_scale: Annotated[Number, Field(ge=0, le=100)]
    attention_resolutions: Annotated[list[Annotated[Whole, Field(ge=1, le=1024)]], Filled]
    attention_steps: Name
    attention_layers: Annotated[list[Name], Field(max_length=1000)]
    inverted_above: Share
    attention_softmax: Annotated[Text, OneOf("diffseg.attention", "SOFTMAXES")]
    kept_steps: Name
    self_attention: Annotated[Whole, Field(ge=0, le=1024)]
    beta: BelowOne
    refiner: Refiner
    sam_checkpoint: Annotated[Text, Flag.FILE]
    sam_model: Annotated[Text, OneOf("segment_anything", "sam_model_registry")]
    synthesis_batch: Annotated[Whole, Field(ge=1, le=10_000)]
    jpeg_quality: Annotated[Whole, Field(ge=1, le=100)]
    failed_share: Annotated[Share, Flag.INERT]  # whether an error is raised, not what was made
    # 04
    train_real: Truth
    training_split: Text
    mix_real: Truth
    segmenter: Annotated[Text, OneOf("diffseg.segmenters", "SEGMENTERS")]
    encoder_weights: Annotated[Text, Flag.FILE]
    initial_network: Annotated[Text, Flag.FILE]
    training_mode: Annotated[Text, OneOf("diffseg.training_options", "NETWORKS")]
    iterations: Count
    training_batch: Annotated[Whole, Field(ge=1, le=10_000)]
    crop: Annotated[Whole, Field(ge=8, le=LONGEST)]  # networks pad to a multiple of 32 themselves
    scale_jitter: Annotated[
        list[Annotated[Number, Field(gt=0, le=100)]],
        matches(lambda pair: len(pair) == 2 and pair[0] <= pair[1], "be two numbers, the smaller first"),
    ]
    colour_jitter: Annotated[Number, Field(ge=0, le=2)]  # a quarter of it for hue, which torchvision takes up to 0.5
    blur: Share
    optimizer: Annotated[Text, OneOf("diffseg.training_options", "OPTIMIZERS")]
    learning_rate: Annotated[Number, Field(gt=0, le=100)]
    weight_decay: Annotated[Number, Field(ge=0, le=100)]
    ema: BelowOne
    reliable_share: Annotated[Number, Field(gt=0, le=1)]
    reliable_rule: Annotated[Text, OneOf("diffseg.training_options", "RULES")]
    warmup: Share
    warmup_pixels: Annotated[Text, OneOf("diffseg.training_options", "WARMUP_PIXELS")]
    peer_classes: Annotated[Text, OneOf("diffseg.training_options", "PEER_CLASSES")]
    peer_refiner: Annotated[Text, OneOf("diffseg.training_options", "PEER_REFINERS")]
    peer_target: Annotated[Text, OneOf("diffseg.training_options", "PEER_TARGETS")]
    mixing: Share
    mixing_confidence: Share
    band_weight: NotNegative
    urn_powers: Annotated[list[Positive], Filled]
    uncertain_weight: Share
    training_precision: Annotated[Text, OneOf("diffseg.training_options", "PRECISIONS")]
    checkpoint_every: Annotated[Count, Flag.INERT]
    threads: Annotated[Whole, Field(ge=0, le=1000)]
    tensorboard_every: Annotated[CountOrNone, Flag.INERT]
    # 05
    evaluation_split: Text
    evaluation_batch: Annotated[Whole, Field(ge=1, le=10_000), Flag.INERT]
    evaluation_scales: Annotated[list[Annotated[Number, Field(gt=0, le=100)]], Filled]
    evaluation_flip: Truth
    evaluation_crf: Truth
    bootstrap: Annotated[Whole, Field(ge=1, le=10**7)]
    # 07; the timing options are not inert, as the seconds are a result there
    reference_network: Annotated[Name, Flag.FILE]
    compared_resolutions: Annotated[
        list[
            Annotated[
                Text,
                matches(lambda t: re.fullmatch(r"[1-9]\d{0,3}(\+[1-9]\d{0,3})*", t), "be map sizes joined by +"),
            ]
        ],
        Filled,
    ]
    compared_steps: list[Name]
    compared_layers: Annotated[
        list[
            Annotated[
                Text, matches(lambda t: re.fullmatch(r"[^+\s]+(\+[^+\s]+)*", t), "be all, or patterns joined by +")
            ]
        ],
        Filled,
    ]
    compared_betas: Annotated[list[BelowOne], Filled]
    compared_refiners: Annotated[list[Text], Filled, OneOf("diffseg.refiners", "REFINERS")]
    timed_pictures: Annotated[Whole, Field(ge=1, le=10_000)]
    timing_repetitions: Annotated[Whole, Field(ge=1, le=10_000)]


def flagged(flag: Flag) -> frozenset[str]:
    return frozenset(name for name, field in Parameters.model_fields.items() if flag in field.metadata)


FILES = flagged(Flag.FILE)
INERT = flagged(Flag.INERT)


def shown(value: Any) -> str:
    """Return a value for a sentence, as JSON writes it where JSON can, at most 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    except (TypeError, ValueError, RecursionError):  # a date; a number of 5,000 digits; a list that holds itself
        text = f"{value}" if hasattr(value, "isoformat") else f"something of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def refusal(name: str, value: Any, source: str, rule: str, remedy: str) -> DiffsegError:
    """Return the error of a parameter's value; `rule` completes "it must ...", `remedy` is a sentence."""
    return DiffsegError(f"`{name}` is {shown(value)} ({source}); it must {rule}. {remedy}")


def assign(name: str, value: Any) -> str:
    """Return the remedy that sets a parameter to `value`."""
    value = value[:1] if isinstance(value, list) and len(json.dumps(value)) > 70 else value
    text = value if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./+-]*", value) else shown(value)
    return f"Set `{name}={text}`."


def hint(name: Any, names: Iterable[str]) -> str:
    """Return the end of a sentence about a name that is none of `names`: the nearest one, else all of them."""
    close = difflib.get_close_matches(str(name)[:80], names, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(names)) or 'none'}."


@functools.cache
def adapter(name: str, kind: type) -> TypeAdapter:
    """Return what reads and checks a parameter's values: by its declaration, without one by its default's type."""
    field = Parameters.model_fields.get(name)
    return TypeAdapter(field.rebuild_annotation() if field else TYPES[kind])


def check(values: dict[str, Any], defaults: dict[str, Any], source: str) -> dict[str, Any]:
    """Return values in their declared types and ranges; raise DiffsegError for the first that is not.

    defaults: of all parameters that there are. `source` says in an error where the values come from. What depends on
    other parameters, and on names that the method lists, is `combinations.check_together`'s.
    """
    checked = {}
    for name, value in values.items():
        if name not in defaults:
            problem = f"{source} gives the parameter {str(name)[:80]}, which no notebook declares"
            raise DiffsegError(f"{problem}; {hint(name, defaults)}")
        try:
            checked[name] = adapter(name, type(defaults[name])).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]
            rule = re.sub(r"^(Value error, |\w+ should )| after validation.*", "", problem["msg"])
            remedy = assign(name, defaults[name])
            is_text = isinstance(defaults[name], str) or (problem["type"] == "string_type" and problem["loc"])
            if is_text and not isinstance(problem["input"], str | None):
                remedy = "Put it in quotes."
            elif type(value) is type(defaults[name]) and value == defaults[name]:
                remedy = "Correct the parameters cell."  # somebody works in the cell itself
            elif problem["type"] == "list_type" and isinstance(value, str):
                remedy = assign(name, [value])
            elif multiple := problem.get("ctx", {}).get("multiple_of"):
                nearest = min(max(1, round(problem["input"] / multiple)) * multiple, LONGEST)
                remedy = assign(name, nearest)
            where = name + "".join(f"[{index}]" for index in problem["loc"])
            raise refusal(where, problem["input"], source, rule, remedy) from None
    return checked
