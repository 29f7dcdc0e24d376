"""Pictures and masks on disk, drawn with the shipped generator: resumable, repeatable, and in VOC's layout."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from diffseg.attention import AttentionRecorder, token_positions
from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.readers import pictures_set
from diffseg.errors import DiffsegError
from diffseg.files import sha256_file
from diffseg.generator import draw, load_generator, load_tokenizer, locate_generator
from diffseg.prompts import augment
from diffseg.synthesis import SynthesisOptions, draw_with_masks, synthesise

OPTIONS = SynthesisOptions(64, 64, 3, 4.0, (16,), "all", 0.2, "none")


@pytest.fixture(scope="module")
def pipeline(mini_pipeline):
    return mini_pipeline


@pytest.fixture(scope="module")
def rows(mini_words):
    return augment(mini_words, 10, templates=["a photo of {} {place}"], places=["on the grass", "at night"], seed=0)


def fingerprints(folder):
    return {path.relative_to(folder): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_cut_run_goes_on_to_the_same_bytes(pipeline, rows, tmp_path):
    synthesise(pipeline, rows, tmp_path / "whole", VOC, OPTIONS, batch_size=4)
    whole = fingerprints(tmp_path / "whole")
    assert len(whole) == 3 * 10 + 2
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for file in (
        "JPEGImages/000005.jpg",
        "Reliability/000009.png",
        "SegmentationClass/000002.png",
        "index.csv",
    ):
        (tmp_path / "cut" / file).unlink()
    kept = (tmp_path / "cut" / "JPEGImages" / "000000.jpg").stat().st_mtime_ns
    synthesise(pipeline, rows, tmp_path / "cut", VOC, OPTIONS, batch_size=4)
    assert fingerprints(tmp_path / "cut") == whole
    # the batch 0..3 lost a mask and was drawn again whole; 4..7 and 8..9 too; nothing else is needed
    assert kept != (tmp_path / "cut" / "JPEGImages" / "000000.jpg").stat().st_mtime_ns


def test_nothing_is_drawn_when_everything_is_there(pipeline, rows, tmp_path):
    synthesise(pipeline, rows[:4], tmp_path, VOC, OPTIONS, batch_size=2)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "JPEGImages").iterdir()}
    synthesise(pipeline, rows[:4], tmp_path, VOC, OPTIONS, batch_size=2)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "JPEGImages").iterdir()}


def test_a_picture_hardly_depends_on_its_batch(pipeline, rows):
    """One of 255 levels at most: matrix products of another size round the last bit differently."""
    together = draw(pipeline, [r.prompt for r in rows[:4]], [r.seed for r in rows[:4]], sampling_steps=3)
    for row, image in zip(rows, together, strict=False):
        [alone] = draw(pipeline, [row.prompt], [row.seed], sampling_steps=3)
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(image)).max() <= 1


def test_half_precision_draws_the_same_picture(pipeline, rows):
    """From the same noise, which is drawn in float32 and then rounded; other noise differs by some 20 levels."""
    prompts, seeds = [row.prompt for row in rows[:2]], [row.seed for row in rows[:2]]
    exact = draw(pipeline, prompts, seeds, sampling_steps=3)
    half = draw(load_generator("mini", precision="bf16"), prompts, seeds, sampling_steps=3)
    other = draw(pipeline, prompts, [seed + 1 for seed in seeds], sampling_steps=3)

    def difference(images) -> float:
        return np.abs(np.stack(exact).astype(int) - np.stack(images)).mean()

    assert 0 < difference(half) < 2 < 10 < difference(other)


def test_the_set_is_read_back_with_labels_of_the_prompts_classes_only(pipeline, rows, tmp_path):
    means = synthesise(pipeline, rows, tmp_path, VOC, OPTIONS, batch_size=5)
    made = pictures_set(tmp_path, VOC)
    assert len(made) == len(rows)
    for row, (name, image, label, margin) in zip(rows, made, strict=True):
        allowed = {0, *(VOC.classes.index(class_name) for class_name in row.classes)}
        assert name == f"{row.index:06d}" and image.shape == (3, 64, 64)
        assert set(label.unique().tolist()) <= allowed
        assert margin.shape == label.shape and margin.dtype == torch.uint8
    index = pd.read_csv(tmp_path / "index.csv")
    assert index.seed.tolist() == [row.seed for row in rows] and index.prompt[0] == rows[0].prompt
    assert index.foreground.mean() == pytest.approx(means["foreground"], abs=1e-3)


def test_the_picture_is_the_same_with_and_without_the_recorder(pipeline, rows):
    prompts, seeds = [row.prompt for row in rows[:2]], [row.seed for row in rows[:2]]
    plain = draw(pipeline, prompts, seeds, sampling_steps=3)
    tokens = [token_positions(pipeline.tokenizer, row.prompt, row.spans) for row in rows[:2]]
    with AttentionRecorder(pipeline, tokens) as recorder:
        recorded = draw(pipeline, prompts, seeds, sampling_steps=3)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(plain, recorded, strict=True))
    assert recorder.maps()[0].shape == (1, 16, 16)


def test_two_to_one_pictures_have_two_to_one_masks(pipeline, rows):
    options = SynthesisOptions(32, 64, 2, 4.0, (8,), "all", 0.2, "pamr")
    for one in draw_with_masks(pipeline, rows[:2], VOC, options):
        assert one.image.size == (64, 32) and one.label.shape == one.margin.shape == (32, 64)


def test_a_resolution_that_the_generator_does_not_have_is_named(pipeline, rows):
    options = SynthesisOptions(64, 64, 2, 4.0, (64,), "all", 0.2, "none")
    with pytest.raises(DiffsegError, match="64"):
        draw_with_masks(pipeline, rows[:1], VOC, options)


def test_a_missing_generator_is_one_sentence(tmp_path):
    for load in (load_generator, load_tokenizer):
        with pytest.raises(DiffsegError, match="cannot be loaded"):
            load(str(tmp_path / "nowhere"))


def test_truncated_weights_are_one_sentence_that_names_the_folder(tmp_path):
    shutil.copytree(locate_generator("mini"), tmp_path / "generator")
    weights = tmp_path / "generator" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(DiffsegError, match="cannot be loaded") as error:
        load_generator(str(tmp_path / "generator"))
    assert str(tmp_path / "generator") in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_precision_is_named():
    with pytest.raises(DiffsegError, match="fp8"):
        load_generator("mini", precision="fp8")
