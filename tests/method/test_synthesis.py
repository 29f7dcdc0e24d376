"""Synthesis on the mini generator: two passes over files, resumed and divided, and one bad image that stops nothing."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close_images, assert_equal_images
from PIL import Image

from diffseg.attention import AttentionRecorder
from diffseg.benchmarks.classes import VOC
from diffseg.benchmarks.readers import pictures_set
from diffseg.drawing import (
    DrawingOptions,
    check_prompts,
    draw_rows,
    draw_set,
    draw_with_maps,
    is_drawn,
    name_of,
    read_drawn,
    write_batch,
)
from diffseg.errors import DiffsegError, Incomplete
from diffseg.families import layer_names
from diffseg.files import read_rows, sha256_file
from diffseg.generator import draw, load_generator, load_tokenizer, locate_generator
from diffseg.masks import add_background
from diffseg.prompts import augment, write_prompts
from diffseg.refiners import SATURATED, refiners_at_hand
from diffseg.reliability import rank_within_class
from diffseg.synthesis import SynthesisOptions, cut, cut_beside, cut_set, draw_with_masks, is_cut, write_lists
from diffseg.tokens import token_positions
from diffseg.word_maps import WordMaps

OPTIONS = SynthesisOptions(64, 64, 3, 4.0, (16,), "all", 0.2, "none")


@pytest.fixture(scope="module")
def pipeline(mini_pipeline):
    return mini_pipeline


@pytest.fixture(scope="module")
def rows(mini_words):
    return augment(mini_words, 10, places=["on the grass", "at night"], seed=3)


@pytest.fixture(scope="module")
def whole(pipeline, rows, tmp_path_factory):
    """A set that was made undisturbed: its two folders, and the means."""
    root = tmp_path_factory.mktemp("whole")
    assert draw_set(pipeline, rows, root / "drawn", OPTIONS, 4) == 10
    cut_set(rows, root / "drawn", root / "cut", VOC, OPTIONS)
    return root, write_lists(rows, root / "cut")


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_interrupted_or_divided_synthesis_makes_the_same_files(pipeline, rows, whole, tmp_path):
    root, _ = whole
    shutil.copytree(root, tmp_path / "again", symlinks=True)
    drawn, masks = tmp_path / "again" / "drawn", tmp_path / "again" / "cut"
    for path in (drawn / "JPEGImages" / "000002.jpg", drawn / "WordMaps" / "000007.safetensors"):
        path.unlink()
    (masks / "Reliability" / "000005.png").unlink()
    kept = (drawn / "JPEGImages" / "000009.jpg").stat().st_mtime_ns
    assert draw_set(pipeline, rows, drawn, OPTIONS, 4) == 8  # two batches of four
    cut_set(rows, drawn, masks, VOC, OPTIONS)
    assert hashes(drawn) == hashes(root / "drawn") and hashes(masks) == hashes(root / "cut")
    assert (drawn / "JPEGImages" / "000009.jpg").stat().st_mtime_ns == kept
    shares = tmp_path / "shares"
    for k in (1, 0):
        draw_set(pipeline, rows, shares / "drawn", OPTIONS, 4, share=(k, 2))
        cut_set(rows, shares / "drawn", shares / "cut", VOC, OPTIONS, batch_size=4, share=(k, 2))
        if k:
            with pytest.raises(Incomplete, match="6 of 10 masks are not made yet"):
                write_lists(rows, shares / "cut")
    write_lists(rows, shares / "cut")
    assert hashes(shares) == hashes(root)


def test_each_image_is_handed_on_when_its_files_are_there(pipeline, rows, whole, tmp_path):
    shutil.copytree(whole[0] / "drawn", tmp_path / "drawn")
    (tmp_path / "drawn" / "JPEGImages" / "000005.jpg").unlink()
    taken, left = [], []

    @contextmanager
    def beside():
        try:
            yield lambda row: taken.append((row, is_drawn(tmp_path / "drawn", row)))
        finally:
            left.append(True)

    assert draw_set(pipeline, rows, tmp_path / "drawn", OPTIONS, 4, beside=beside()) == 4
    assert sorted(row.index for row, _ in taken) == list(range(10)) and all(there for _, there in taken) and left
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "WordMaps").write_text("a file where a folder belongs")
    with pytest.raises(OSError):
        draw_set(pipeline, rows, tmp_path / "full", OPTIONS, 4, beside=beside())
    assert len(taken) == 10 and len(left) == 2


def test_a_negative_prompt_reaches_the_generator(pipeline, rows):
    avoided = replace(rows[0], negative="a dog on the grass")
    [plain], [other] = draw_rows(pipeline, rows[:1], OPTIONS), draw_rows(pipeline, [avoided], OPTIONS)
    assert plain.tobytes() != other.tobytes()
    [drawn] = draw(pipeline, [rows[0].prompt], [rows[0].seed], ["a dog on the grass"], 64, 64, 3, 4.0)
    assert drawn.tobytes() == other.tobytes()


def test_an_inverted_map_is_turned_round_before_it_is_cut(pipeline, rows):
    """The word attends to the image's rim: its object is the rest, if the rule is on."""
    ring = torch.ones(1, 1, 16, 16)
    ring[..., 4:12, 4:12] = 0.1
    [picture] = draw_rows(pipeline, rows[:1], OPTIONS)
    maps = WordMaps({"layer": ring}, [[0, 1, 2]])
    off, on = (
        cut(picture, maps, rows[0], VOC, replace(OPTIONS, inverted_above=above), OPTIONS.refine("cpu")).label
        for above in (1.0, 0.5)
    )
    assert off[0, 0] > 0 and off[32, 32] == 0 and on[0, 0] == 0 and on[32, 32] > 0


def test_what_fails_for_the_machines_sake_is_no_images_fault(pipeline, rows, tmp_path):
    """A refiner that cannot be made stops the cutting; an image that failed is tried again by the next call."""
    draw_set(pipeline, rows[:2], tmp_path / "drawn", OPTIONS, 2)
    whole = (tmp_path / "drawn" / "JPEGImages" / "000001.jpg").read_bytes()
    with pytest.raises(DiffsegError):
        cut_set(
            rows[:2], tmp_path / "drawn", tmp_path / "cut", VOC, replace(OPTIONS, refiner="sam", sam_checkpoint="x")
        )
    assert not (tmp_path / "cut" / "Failed").exists()
    Image.new("RGB", (64, 64)).save(tmp_path / "drawn" / "JPEGImages" / "000001.jpg")
    cut_set(rows[:2], tmp_path / "drawn", tmp_path / "cut", VOC, OPTIONS)
    assert (tmp_path / "cut" / "Failed" / "000001.txt").is_file()
    (tmp_path / "drawn" / "JPEGImages" / "000001.jpg").write_bytes(whole)
    cut_set(rows[:2], tmp_path / "drawn", tmp_path / "cut", VOC, OPTIONS)
    assert not (tmp_path / "cut" / "Failed" / "000001.txt").exists() and all(
        is_cut(tmp_path / "cut", r) for r in rows[:2]
    )


@pytest.mark.parametrize("refiner", refiners_at_hand(SATURATED, "mini"))
def test_margins_of_a_refiner_that_is_sure_everywhere_still_rank_pixels(rows, whole, refiner):
    options = replace(OPTIONS, refiner=refiner, sam_checkpoint="mini")
    for row in rows:
        image, maps = read_drawn(whole[0] / "drawn", row)
        plain, refined = (cut(image, maps, row, VOC, each, each.refine("cpu")) for each in (OPTIONS, options))
        assert torch.equal(refined.margin, plain.margin.where(refined.label == plain.label, torch.tensor(0)))
        _, counts = refined.margin[refined.margin > 0].unique(return_counts=True)
        assert counts.max() < 0.2 * counts.sum()


@pytest.mark.slow  # worker processes import the package
def test_masks_do_not_depend_on_workers(pipeline, rows, tmp_path):
    """Cut beside the drawing by two workers, and afterwards by this process with two threads: the same files."""
    options = replace(OPTIONS, refiner="pamr")
    beside, after = tmp_path / "beside", tmp_path / "after"
    draw_set(pipeline, rows[:4], tmp_path / "drawn", options, 4)
    Image.new("RGB", (64, 64)).save(tmp_path / "drawn" / "JPEGImages" / "000001.jpg")
    workers = cut_beside(tmp_path / "drawn", beside, VOC, options, workers=2)
    assert draw_set(pipeline, rows, tmp_path / "drawn", options, 4, beside=workers) == 6
    assert all(is_cut(beside, row) for row in rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cut_set(rows, tmp_path / "drawn", after, VOC, options)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    found = hashes(after)
    assert len(found) == 9 * 3 + 1 and "Failed/000001.txt" in found
    assert hashes(beside) == found
    (beside / "Reliability" / "000004.png").unlink()
    cut_set(rows, tmp_path / "drawn", beside, VOC, options, workers=1)
    assert hashes(beside) == found


KILLED = """
import os, signal, sys
from pathlib import Path
from diffseg.benchmarks.classes import VOC
from diffseg.prompts import read_prompts
from diffseg.synthesis import SynthesisOptions, cut_beside, is_cut
if __name__ == "__main__":
    root, rows = Path(sys.argv[1]), read_prompts(Path(sys.argv[2]))
    options = SynthesisOptions(64, 64, 3, 4.0, (16,), "all", 0.2, "none")
    with cut_beside(root / "drawn", root / "cut", VOC, options, workers=2) as take:
        take(rows[0])
        while not is_cut(root / "cut", rows[0]):
            pass
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(rows, whole, tmp_path):
    """All of them hold the pipe's end, so that reading it comes to an end; what they wrote is whole."""
    shutil.copytree(whole[0] / "drawn", tmp_path / "drawn")
    write_prompts(tmp_path / "prompts.csv", rows)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path), str(tmp_path / "prompts.csv")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.read()  # ends when the last process that holds it has ended
    assert process.wait() == -signal.SIGKILL
    cut_set(rows, tmp_path / "drawn", tmp_path / "cut", VOC, OPTIONS)
    write_lists(rows, tmp_path / "cut")
    assert hashes(tmp_path / "cut") == hashes(whole[0] / "cut")


def test_the_set_is_vocs_layout(rows, whole):
    root, means = whole
    made = pictures_set(root / "cut", VOC)
    index = read_rows(root / "cut" / "index.csv")
    assert len(made) == len(index) == 10 and means["failed"] == 0
    for k, row in enumerate(rows):
        name, image, label, reliability = made[k]
        assert name == index[k]["name"] == name_of(row) and image.shape == (3, 64, 64)
        assert {VOC.classes[i] for i in label.unique().tolist()} <= {"background", *row.classes}
        assert torch.equal(reliability[1], rank_within_class(label, reliability[0]))
        assert index[k]["prompt"] == row.prompt and index[k]["seed"] == str(row.seed)
        assert all(json.loads(index[k][key]) == list(getattr(row, key)) for key in ("classes", "words"))
        assert float(index[k]["foreground"]) == pytest.approx(float((label > 0).float().mean()), abs=1e-4)
        assert float(index[k]["margin"]) == pytest.approx(float((reliability[0] / 255).mean()), abs=1e-4)
    assert 0 < means["foreground"] < 1 and 0 < means["margin"] < 1
    assert not read_rows(root / "cut" / "failed.csv")


def test_word_maps_on_disk_give_the_masks_that_memory_gives(pipeline, rows, tmp_path):
    """Half precision and JPEG move few pixels; the mini generator's maps take at most 40 kB a word."""
    options = replace(OPTIONS, jpeg_quality=100)
    draw_set(pipeline, rows[:4], tmp_path, options, 4)
    refine = options.refine("cpu")
    for row, one in zip(rows[:4], draw_with_masks(pipeline, rows[:4], VOC, options), strict=True):
        image, maps = read_drawn(tmp_path, row)
        made = cut(image, maps, row, VOC, options, refine)
        assert (made.label != one.label).float().mean() < 0.002
        assert (made.scores - one.scores).abs().max() < 2e-3
        assert (tmp_path / "WordMaps" / f"{name_of(row)}.safetensors").stat().st_size < 40_000 * len(row.words)
        assert np.abs(np.asarray(image, float) - np.asarray(one.image, float)).mean() < 2


def test_an_image_is_written_in_the_quality_asked_for_with_all_its_colour(rows, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (tmp_path / "WordMaps").mkdir()
    maps = WordMaps({"layer": torch.rand(1, 1, 4, 4)}, [[0]])
    write_batch(tmp_path, replace(OPTIONS, jpeg_quality=30), rows[:1], [image], [maps])
    image.save(tmp_path / "expected.jpg", quality=30, subsampling=0)
    assert sha256_file(tmp_path / "JPEGImages" / "000000.jpg") == sha256_file(tmp_path / "expected.jpg")


def test_kept_maps_choose_layers_and_steps_as_recorders_do(pipeline, rows, tmp_path):
    draw_set(pipeline, rows[:2], tmp_path, OPTIONS, 2)
    tokens = [token_positions(pipeline.tokenizer, row.prompt, row.spans) for row in rows[:2]]
    for resolutions, steps in [((16,), [0, 1, 2]), ((8,), [2]), ((8, 16), [1, 2])]:
        with AttentionRecorder(pipeline, tokens, resolutions, steps) as recorder:
            draw_rows(pipeline, rows[:2], OPTIONS)
        for row, expected in zip(rows[:2], recorder.maps(), strict=True):
            found = read_drawn(tmp_path, row)[1].mean(resolutions, steps)
            torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.max()), rtol=1e-3)
    maps = read_drawn(tmp_path, rows[0])[1]
    with pytest.raises(DiffsegError, match=r"no cross-attention is kept at resolution 64.* there is \[4, 8, 16\]"):
        maps.mean((64,), [0])
    only = WordMaps(maps.layers, [[0, 1]])
    with pytest.raises(DiffsegError, match="the steps 1 to 1 of attention_steps are not kept by themselves"):
        only.mean((16,), [1])


def test_layers_are_chosen_after_drawing(pipeline, rows):
    names = layer_names(pipeline)
    images, (maps,) = draw_with_maps(pipeline, rows[:1], OPTIONS)
    assert sorted(names) == sorted(maps.layers) and len(names) > 2
    of_16 = [name for name in names if maps.layers[name].shape[-1] == 16]
    up = [name for name in of_16 if name.startswith("up_blocks.")]
    expected = torch.stack([maps.layers[name][1] for name in up]).mean(dim=0)
    assert len(of_16) > len(up) > 0
    torch.testing.assert_close(maps.mean((16,), [1], ["up_blocks.*"]), expected)
    torch.testing.assert_close(maps.mean((16,), [1], of_16), maps.mean((16,), [1]))
    chosen = replace(OPTIONS, attention_layers=("up_blocks.*",))
    refine = OPTIONS.refine("cpu")
    some, every = (cut(images[0], maps, rows[0], VOC, options, refine).scores for options in (chosen, OPTIONS))
    assert not torch.equal(some, every)
    with pytest.raises(DiffsegError, match=r"attention_layers has '\*.attn3', which matches no layer; .*attn2"):
        maps.mean((16,), [1], ["up_blocks.*", "*.attn3"])
    with pytest.raises(DiffsegError, match=r"at this image size there is \[4\] in attention_layers"):
        maps.mean((16,), [1], ["mid_block.*"])


def test_faint_maps_survive_half_precision(tmp_path):
    faint = torch.rand(1, 2, 4, 4) * torch.tensor([1e-9, 1.0]).view(1, 2, 1, 1)
    faint[0, 1] = 0
    WordMaps({"layer": faint}, [[0]], torch.full((2, 2, 2, 2), 0.25)).save(tmp_path / "a.safetensors")
    read = WordMaps.load(tmp_path / "a.safetensors")
    torch.testing.assert_close(read.layers["layer"], faint, rtol=1e-3, atol=0)
    assert read.steps == [[0]] and read.attention.unique().tolist() == [0.25]
    (tmp_path / "a.safetensors").write_bytes(b"half")
    with pytest.raises(DiffsegError, match="a.safetensors cannot be read"):
        WordMaps.load(tmp_path / "a.safetensors")


def test_one_bad_image_does_not_stop_the_set(rows, whole, tmp_path):
    """A black image, a flat map and one that is no number are left out and listed; too many are an error."""
    shutil.copytree(whole[0] / "drawn", tmp_path / "drawn")
    Image.new("RGB", (64, 64)).save(tmp_path / "drawn" / "JPEGImages" / "000001.jpg")
    for name, value in (("000003", 0.5), ("000004", float("nan"))):
        path = tmp_path / "drawn" / "WordMaps" / f"{name}.safetensors"
        maps = WordMaps.load(path)
        WordMaps({k: torch.full_like(v, value) for k, v in maps.layers.items()}, maps.steps).save(path)
    cut_set(rows, tmp_path / "drawn", tmp_path / "cut", VOC, OPTIONS)
    with pytest.raises(DiffsegError, match="3 of 10 images failed, more than failed_share = 0.2.*one colour only"):
        write_lists(rows, tmp_path / "cut", 0.2)
    assert write_lists(rows, tmp_path / "cut", 0.3)["failed"] == 3
    failed = read_rows(tmp_path / "cut" / "failed.csv")
    assert [row["name"] for row in failed] == ["000001", "000003", "000004"]
    assert "one colour" in failed[0]["reason"] and "flat or not a number" in failed[2]["reason"]
    made = pictures_set(tmp_path / "cut", VOC)
    assert len(made) == 7 and made[1][0] == "000002"


def test_pixels_that_are_no_numbers_come_out_black(mini_pipeline, monkeypatch):
    decode = mini_pipeline.vae.decode

    def broken(latents, *args, **kwargs):
        output = decode(latents, *args, **kwargs)
        output[0][0, 0, 5, 5] = float("nan")
        return output

    plain = draw(mini_pipeline, ["a cat", "a dog"], [1, 2], sampling_steps=2)
    monkeypatch.setattr(mini_pipeline.vae, "decode", broken)
    first, second = draw(mini_pipeline, ["a cat", "a dog"], [1, 2], sampling_steps=2)
    assert first.getextrema() == ((0, 0),) * 3 and np.array_equal(second, plain[1])


def test_all_prompts_are_checked_before_the_first_is_drawn(pipeline, rows):
    check_prompts(pipeline, rows)
    bad = [*rows, replace(rows[0], index=10, prompt="a photo of a zyzzyva", spans=((13, 20),))]
    bad.append(replace(rows[0], index=11, prompt="a cat " * 30 + "a dog", spans=((182, 185),)))
    with pytest.raises(DiffsegError, match="2 of 12 prompts cannot be drawn; prompt 10: .*does not know the word"):
        check_prompts(pipeline, bad)


def test_a_refiner_and_wide_images(pipeline, rows):
    options = SynthesisOptions(32, 64, 2, 4.0, (8,), "all", 0.2, "pamr")
    for one in draw_with_masks(pipeline, rows[:2], VOC, options):
        assert one.image.size == (64, 32) and one.label.shape == one.margin.shape == (32, 64)
    own = SynthesisOptions(64, 64, 2, 4.0, (8,), "all", 0.2, "self-attention")
    assert draw_with_masks(pipeline, rows[:1], VOC, own)[0].label.shape == (64, 64)


def test_a_refiner_gets_levels_from_0_to_1_beta_and_the_finest_self_attention(pipeline, rows, monkeypatch):
    given = []

    def refine(pixels, scores, beta, self_attention):
        given.append((pixels, beta, self_attention))
        return add_background(scores, beta)

    monkeypatch.setattr("diffseg.synthesis.get_refiner", lambda *_: refine)
    options = replace(OPTIONS, attention_resolutions=(8, 16), refiner="self-attention", beta=0.3)
    [drawn] = draw_with_masks(pipeline, rows[:1], VOC, options)
    [(pixels, beta, self_attention)] = given
    assert beta == 0.3 and self_attention.shape == (16, 16, 16, 16)
    np.testing.assert_allclose(pixels.permute(1, 2, 0), np.asarray(drawn.image) / 255, atol=1e-6)


def test_a_resolution_that_the_generator_has_not(pipeline, rows):
    options = SynthesisOptions(64, 64, 2, 4.0, (64,), "all", 0.2, "none")
    with pytest.raises(DiffsegError, match="no cross-attention was recorded at resolution 64"):
        draw_with_masks(pipeline, rows[:1], VOC, options)


def test_a_recorder_needs_the_words_of_every_image(pipeline, rows):
    tokens = [token_positions(pipeline.tokenizer, rows[0].prompt, rows[0].spans)]
    with AttentionRecorder(pipeline, tokens) as recorder:
        with pytest.raises(DiffsegError, match="give it the words of every image"):
            draw_rows(pipeline, rows[:2], DrawingOptions(64, 64, 1, 4.0))
    assert not recorder.sums


def test_damaged_generators_are_one_sentence(tmp_path):
    shutil.copytree(locate_generator("mini"), tmp_path / "generator")
    (tmp_path / "generator" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"truncated")
    with pytest.raises(DiffsegError, match="cannot be loaded from"):
        load_generator(str(tmp_path / "generator"))
    for load in (load_generator, load_tokenizer):
        with pytest.raises(DiffsegError, match="cannot be loaded from"):
            load(str(tmp_path / "nowhere"))
    with pytest.raises(DiffsegError, match="no precision"):
        load_generator("mini", precision="fp8")


def test_a_picture_hardly_depends_on_its_batch(pipeline, rows):
    """One of 255 levels at most: matrix products of another size round the last bit differently."""
    together = draw(pipeline, [r.prompt for r in rows[:4]], [r.seed for r in rows[:4]], sampling_steps=3)
    alone = [draw(pipeline, [row.prompt], [row.seed], sampling_steps=3)[0] for row in rows[:4]]
    assert_close_images(alone, together)


def test_half_precision_draws_the_same_picture(pipeline, rows):
    """From the same noise, which is drawn in float32 and then rounded; other noise differs by some 20 levels."""
    prompts, seeds = [row.prompt for row in rows[:2]], [row.seed for row in rows[:2]]
    exact = draw(pipeline, prompts, seeds, sampling_steps=3)
    half = draw(load_generator("mini").to(torch.bfloat16), prompts, seeds, sampling_steps=3)
    other = draw(pipeline, prompts, [seed + 1 for seed in seeds], sampling_steps=3)

    def difference(images) -> float:
        return np.abs(np.stack(exact).astype(int) - np.stack(images)).mean()

    assert 0 < difference(half) < 2 < 10 < difference(other)


def test_the_picture_is_the_same_with_and_without_the_recorder(pipeline, rows):
    prompts, seeds = [row.prompt for row in rows[:2]], [row.seed for row in rows[:2]]
    plain = draw(pipeline, prompts, seeds, sampling_steps=3)
    tokens = [token_positions(pipeline.tokenizer, row.prompt, row.spans) for row in rows[:2]]
    with AttentionRecorder(pipeline, tokens) as recorder:
        recorded = draw(pipeline, prompts, seeds, sampling_steps=3)
    assert_equal_images(recorded, plain)
    assert recorder.maps()[0].shape == (1, 16, 16)


@pytest.mark.slow  # worker processes import the package
def test_images_and_maps_do_not_depend_on_workers(pipeline, rows, whole, tmp_path):
    drawn = tmp_path / "drawn"
    assert draw_set(pipeline, rows[:4], drawn, OPTIONS, 4, workers=2) == 4
    assert draw_set(pipeline, rows, drawn, OPTIONS, 4, workers=2) == 6
    assert hashes(drawn) == hashes(whole[0] / "drawn")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "WordMaps").write_text("a file where a folder belongs")
    with pytest.raises(OSError):
        draw_set(pipeline, rows, tmp_path / "full", OPTIONS, 4, workers=2)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_guidance_reaches_the_generator(mini_pipeline, rows, scale):
    found = draw_rows(mini_pipeline, rows[:1], replace(OPTIONS, guidance_scale=scale))
    assert_equal_images(found, draw(mini_pipeline, [rows[0].prompt], [rows[0].seed], None, 64, 64, 3, scale))


def test_a_mask_is_cut_from_the_steps_asked_for(mini_pipeline, rows):
    [picture] = draw_rows(mini_pipeline, rows[:1], OPTIONS)
    maps, refine = torch.rand(3, 1, 16, 16), OPTIONS.refine("cpu")
    made, alone = (
        cut(picture, kept, rows[0], VOC, replace(OPTIONS, attention_steps="1"), refine)
        for kept in (WordMaps({"layer": maps}, [[0], [1], [2]]), WordMaps({"layer": maps[1:2]}, [[1]]))
    )
    assert torch.equal(made.scores, alone.scores)
