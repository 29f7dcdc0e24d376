"""The generator's recipe at tiny size: precision, compilation, growing budgets, and what a checkpoint says of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY_GENERATOR as TINY

from diffseg.experiments.generator import networks, pretrain
from diffseg.experiments.trainer import Trainer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Random latents with captions, and an untrained VAE."""
    folder = tmp_path_factory.mktemp("pretrain")
    np.save(folder / "latents.npy", np.random.default_rng(0).normal(size=(16, 8, 16, 16)).astype(np.float16))
    (folder / "captions.json").write_text(json.dumps(["a photo of a cat", "a dog and a bus in the snow"] * 8))
    networks.build_vae().save_pretrained(folder / "vae" / "vae")
    return folder


@pytest.fixture
def train(corpus, tmp_path, monkeypatch):
    """Return a function that trains tiny networks with options and returns the checkpoint; no sheets are drawn."""
    monkeypatch.setattr(pretrain, "draw_sheet", lambda *_: None)

    def call(name: str, *options: str, changes: dict | None = None) -> dict:
        arguments = ["diffusion", "--batch", "4", "--device", "cpu", "--every", "1", *options]
        pretrain.train_diffusion(tmp_path / name, corpus, pretrain.parse_options(arguments), TINY | (changes or {}))
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)

    return call


def tensors(state: dict) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, part in state["modules"].items() for key, value in part.items()}


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_cpu_computes_in_float32_and_a_gpu_in_bfloat16_unless_told():
    of = lambda *arguments: pretrain.parse_options(["diffusion", *arguments]).precision  # noqa: E731
    assert of("--device", "cpu") == "fp32" and of("--device", "cuda:1") == "bf16"
    assert of("--device", "cpu", "--precision", "bf16") == "bf16"


def test_the_note_lists_what_was_computed_how(train, corpus, tmp_path):
    train("a", "--steps", "2")
    state = train("a", "--steps", "3", "--precision", "bf16")
    train("a", "--steps", "3", "--precision", "fp32")  # nothing is left to do, so it is no phase
    state = train("a", "--steps", "5", "--precision", "bf16", "--batch", "2")
    told = [
        [phase[key] for key in ("device", "precision", "compiled", "batch", "samples")] for phase in state["phases"]
    ]
    assert told == [["cpu", "fp32", False, 4, 8], ["cpu", "bf16", False, 4, 4], ["cpu", "bf16", False, 2, 4]]
    assert sum(phase["seconds"] for phase in state["phases"]) == pytest.approx(state["seconds"])
    pretrain.export(tmp_path / "a", corpus, tmp_path / "weights", TINY)
    note = json.loads((tmp_path / "weights" / "training.json").read_text())
    assert [phase["samples"] for phase in note["phases"]] == [8, 4, 4] and note["samples_seen"] == 16


def test_mixed_precision_keeps_all_state_in_float32_and_learns_alike(train, tmp_path):
    states = [train(name, "--steps", "3", "--precision", name) for name in ("fp32", "bf16")]
    for state in states:
        kept = [*tensors(state).values(), *(v for part in state["average"].values() for v in part.values())]
        kept += [v for part in state["optimizer"]["state"].values() for v in part.values()]
        assert all(value.dtype == torch.float32 for value in kept if value.is_floating_point())
    one, other = (log_of(tmp_path / name) for name in ("fp32", "bf16"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=0.02)
    before, after = (torch.cat([v.flatten() for v in tensors(state).values()]) for state in states)
    assert not torch.equal(before, after)  # it did compute otherwise


def test_a_larger_budget_takes_the_rate_back_to_the_schedule(train, tmp_path):
    train("a", "--steps", "5")
    train("a", "--steps", "10")
    rates = [row["rate"] for row in log_of(tmp_path / "a")]
    warm = [1.5e-3 * step / 200 for step in range(1, 11)]
    shares = [k / 5 for k in range(5)] + [k / 10 for k in range(5, 10)]  # of the budget that are used before a step
    expected = [w * min(1, 1 - 0.98 * (used - 0.6) / 0.4) for w, used in zip(warm, shares, strict=True)]
    assert rates == pytest.approx(expected, abs=1e-7) and rates[5] > 1.5 * rates[4]


def test_compiled_modules_have_plain_keys(train):
    """Their graphs run eagerly here, so even the numbers are the same; the slow test compiles in earnest."""
    plain = train("plain", "--steps", "2")
    with torch.compiler.set_stance("force_eager"):
        compiled = train("compiled", "--steps", "2", "--compile")
    assert compiled["phases"][0]["compiled"] and not plain["phases"][0]["compiled"]
    assert tensors(plain).keys() == tensors(compiled).keys()
    assert all(torch.equal(value, tensors(compiled)[key]) for key, value in tensors(plain).items())
    assert compiled["average"]["unet"].keys() == compiled["modules"]["unet"].keys()


def test_a_training_repeats_from_its_seed_and_only_from_it(train):
    first, again, other = (
        train(name, "--steps", "3", "--seed", seed) for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))
    )
    assert all(torch.equal(value, tensors(again)[key]) for key, value in tensors(first).items())
    assert not all(torch.equal(value, tensors(other)[key]) for key, value in tensors(first).items())


@pytest.mark.slow
def test_a_compiled_training_goes_on_uncompiled(train, tmp_path):
    train("plain", "--steps", "4")
    train("compiled", "--steps", "2", "--compile", "--precision", "bf16")
    state = train("compiled", "--steps", "4")
    assert not any("_orig_mod" in key for key in tensors(state))
    assert [phase["compiled"] for phase in state["phases"]] == [True, False]
    one, other = (log_of(tmp_path / name) for name in ("plain", "compiled"))
    assert [row["loss"] for row in one[:2]] == pytest.approx([row["loss"] for row in other[:2]], rel=0.02)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_both_kinds_of_prediction_weigh_an_error_of_the_picture_alike(kind, train, tmp_path, monkeypatch):
    """A network that always answers zero is wrong by a known error of the picture, and its loss min(SNR, 5) times it.

    By epsilon = 0 the picture is x / alpha, wrong by sigma / alpha of noise; by v = 0 it is alpha x, wrong by
    sigma^2 of the picture and alpha sigma of noise; both of variance 1.
    """
    monkeypatch.setattr(networks.UNet2DConditionModel, "forward", answer_zero)
    train("zero", "--steps", "1", "--batch", "1024", changes={"scheduler": {"prediction_type": kind}})
    alphas = networks.build_scheduler().alphas_cumprod.double()
    snr = alphas / (1 - alphas)
    error = 1 / snr if kind == "epsilon" else (1 - alphas) ** 2 + alphas * (1 - alphas)
    expected = (snr.clamp(max=5) * error).mean().item()
    assert log_of(tmp_path / "zero")[0]["loss"] == pytest.approx(expected, rel=0.1)


def answer_zero(self, sample, t, text):
    return SimpleNamespace(sample=0 * sample + 0 * self.conv_in.bias.sum() + 0 * text.sum())


def test_a_logged_loss_is_the_mean_of_its_steps_also_after_a_budget_that_ended_between_two_rows(tmp_path):
    line = torch.nn.Linear(1, 1)
    for steps in (7, 12):
        trainer = Trainer(tmp_path, {"line": line}, rate=1e-3, decay=0.9)
        trainer.run(lambda _: 1 + 0 * line.weight.sum(), steps, seconds=0, batch=1, every=5)
        trainer.save()
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(5, 1.0), (10, 1.0)]
