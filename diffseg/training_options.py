"""The constants of a training, and the names that they may have."""

from dataclasses import dataclass

import torch

from diffseg.errors import DiffsegError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NETWORKS = {"baseline": 1, "ensemble": 2, "cotrain": 2, "selftrain": 1, "urn": 1}  # training mode -> number of networks
OPTIMIZERS = ("adamw", "sgd")
# of cotrain and selftrain
RULES = ("picture", "set")  # of what the reliable share is taken
WARMUP_PIXELS = ("reliable", "all")  # which pixels' labels teach until the warm-up is over
PEER_CLASSES = ("all", "image")  # which classes a network may name to the other, or to itself
PEER_REFINERS = ("none", "pamr")  # what refines its answer
PEER_TARGETS = ("hard", "soft")  # its best class, or its probabilities


@dataclass(frozen=True)
class TrainingOptions:
    """The constants of the training; the notebook's parameters of the same names explain each."""

    iterations: int
    training_batch: int
    crop: int
    scale_jitter: tuple[float, float]
    colour_jitter: float
    learning_rate: float
    weight_decay: float
    precision: str
    workers: int
    training_mode: str = "baseline"
    optimizer: str = "adamw"
    blur: float = 0.0
    ema: float = 0.0
    reliable_share: float = 0.5
    reliable_rule: str = "picture"
    warmup: float = 0.25
    warmup_pixels: str = "reliable"
    peer_classes: str = "all"
    peer_refiner: str = "none"
    peer_target: str = "hard"
    mixing: float = 0.5
    mixing_confidence: float = 0.95
    band_weight: float = 0.2
    urn_powers: tuple[float, ...] = (0.5, 0.6, 0.75, 1.33, 1.67, 2.0)
    uncertain_weight: float = 0.05
    beta: float = 0.2
    checkpoint_every: int = 100
    threads: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("precision", PRECISIONS),
            ("training_mode", NETWORKS),
            ("optimizer", OPTIMIZERS),
            ("reliable_rule", RULES),
            ("warmup_pixels", WARMUP_PIXELS),
            ("peer_classes", PEER_CLASSES),
            ("peer_refiner", PEER_REFINERS),
            ("peer_target", PEER_TARGETS),
        ):
            if getattr(self, name) not in known:
                raise DiffsegError(f"there is no {name} {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name in ("blur", "warmup", "mixing", "mixing_confidence", "uncertain_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise DiffsegError(f"{name} is {getattr(self, name)}; give a number from 0 to 1")
        if not 0 <= self.ema < 1:
            raise DiffsegError(f"ema is {self.ema}; give a decay from 0 (no average) to below 1")
