"""The ablation's numbers on hand-made pictures, and its variants against the recorder and the product alone."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from diffseg.attention import AttentionRecorder
from diffseg.benchmarks.classes import VOC, get_benchmark
from diffseg.drawing import draw_rows
from diffseg.errors import DiffsegError
from diffseg.experiments.mask_ablation import (
    VARIED,
    Variant,
    ablate,
    along,
    cut,
    draw_variants,
    layer_choices,
    load_reference,
    one_at_a_time,
    options_of,
    publish,
    reference_label,
    step_choices,
    time_variants,
)
from diffseg.prompts import augment
from diffseg.refiners import get_refiner
from diffseg.sampling_steps import parse_steps
from diffseg.segmenters import Segmenter, save_segmenter
from diffseg.synthesis import SynthesisOptions, draw_with_masks
from diffseg.tokens import token_positions

OPTIONS = SynthesisOptions(64, 64, 4, 4.0, (16,), "all", 0.2, "none", inverted_above=0.3)  # turns some maps round
BASE = Variant((16,), "2-3", "none")
LAYERS = [(), ("down_blocks.*",), ("up_blocks.*",)]
VARIANTS = one_at_a_time(BASE, [(8,), (16,), (8, 16)], step_choices(4), ["none", "pamr", "self-attention"], LAYERS)
CAT, DOG = VOC.classes.index("cat"), VOC.classes.index("dog")


@pytest.fixture(scope="module")
def pipeline(mini_pipeline):
    return mini_pipeline


@pytest.fixture(scope="module")
def rows(mini_words):
    return augment(mini_words, 3, templates=["a photo of {} {place}"], places=["on the grass"], classes_per_prompt=2)


def test_step_choices():
    assert step_choices(4) == ["all", "middle", "0-1", "2-3", "0", "1", "3"]  # 2 is the middle
    assert step_choices(5) == ["all", "middle", "0-1", "2-4", "0", "1", "3", "4"]
    for count in (1, 2, 4, 5, 12):
        steps = [tuple(parse_steps(choice, count)) for choice in step_choices(count)]
        assert {(k,) for k in range(count)} <= set(steps)


def test_one_thing_at_a_time():
    assert VARIANTS[0] == BASE and len(set(VARIANTS)) == len(VARIANTS) == 1 + 2 + 6 + 2 + 2
    for variant in VARIANTS[1:]:
        assert sum(getattr(variant, name) != getattr(BASE, name) for name in VARIED) == 1


def test_choices_of_layers_are_patterns_and_one_that_matches_nothing_is_refused(pipeline, rows):
    assert layer_choices(pipeline, ["all", "down_blocks.*", "down_blocks.*+mid_block.*"]) == [
        (),
        ("down_blocks.*",),
        ("down_blocks.*", "mid_block.*"),
    ]
    with pytest.raises(DiffsegError, match=r"compared_layers has 'left.*', which matches no layer; choose among down_"):
        layer_choices(pipeline, ["all", "up_blocks.*+left.*"])
    with pytest.raises(DiffsegError, match=r"attention_layers has 'mid_block.*', which matches no layer; choose among"):
        draw_variants(pipeline, rows[:1], VOC, OPTIONS, [Variant((16,), "0", "none", ("mid_block.*",))])  # it has 4 x 4


def test_nested_recorders_change_neither_the_picture_nor_each_others_maps(pipeline, rows):
    rows = rows[:2]
    tokens = [token_positions(pipeline.tokenizer, row.prompt, row.spans) for row in rows]
    plain = draw_rows(pipeline, rows, OPTIONS)
    before = dict(pipeline.unet.attn_processors)
    settings = [((8, 16), range(4), None), ((16,), range(2, 4), 16), ((8,), [1], None)]
    alone = []
    for resolutions, steps, own in settings:
        with AttentionRecorder(pipeline, tokens, resolutions, steps, own) as recorder:
            draw_rows(pipeline, rows, OPTIONS)
        alone.append(recorder)
    a, b, c = (AttentionRecorder(pipeline, tokens, *setting) for setting in settings)
    with a, b, c:
        nested = draw_rows(pipeline, rows, OPTIONS)
    assert pipeline.unet.attn_processors == before
    for one, other in zip(plain, nested, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    for single, recorder in zip(alone, (a, b, c), strict=True):
        for one, other in zip(single.maps(), recorder.maps(), strict=True):
            assert torch.equal(one, other)
        if single.self_resolution:
            for one, other in zip(single.self_attention(), recorder.self_attention(), strict=True):
                assert torch.equal(one, other)
    for maps in a.maps([8]), a.maps([16]):  # a subset of the resolutions is what a recorder of that subset gives
        assert not torch.equal(maps[0], a.maps()[0])
    with AttentionRecorder(pipeline, tokens, (8,)) as coarse:
        draw_rows(pipeline, rows, OPTIONS)
    assert torch.equal(a.maps([8])[0], coarse.maps()[0])


def test_every_variant_is_what_it_gives_alone(pipeline, rows):
    rows = rows[:2]
    drawn = draw_variants(pipeline, rows, VOC, OPTIONS, VARIANTS)
    several = [Variant((8, 16), "2-3", "none"), Variant((16,), "1", "none"), Variant((16,), "2-3", "self-attention")]
    several += [dataclasses.replace(BASE, layers=patterns) for patterns in LAYERS[1:]]
    for variant in several:
        assert variant in VARIANTS
        alone = draw_with_masks(pipeline, rows, VOC, options_of(variant, 0.3, OPTIONS))
        for one, other in zip(drawn, alone, strict=True):
            assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
            assert torch.equal(one.scores[variant][1], other.scores)
            assert torch.equal(cut(one, variant, 0.3, get_refiner(variant.refiner)), other.label)
    down, up = (drawn[0].scores[variant][1] for variant in several[-2:])
    assert not torch.equal(down, up) and not torch.equal(down, drawn[0].scores[BASE][1])


def test_the_reference_names_only_the_prompts_classes():
    seen = torch.zeros(10, 10, dtype=torch.long)
    seen[:5], seen[5:7] = CAT, DOG
    label = reference_label(seen, [CAT], VOC.ignore)
    assert (label[:5] == CAT).all() and (label[5:7] == VOC.ignore).all() and (label[7:] == 0).all()
    assert torch.equal(reference_label(seen, [CAT, DOG], VOC.ignore), seen)
    assert reference_label(seen, [CAT, 3], VOC.ignore) is None  # one of the prompt's classes is not seen
    seen[:] = 0
    seen[0, 0] = CAT  # one pixel in a hundred suffices
    assert reference_label(seen, [CAT], VOC.ignore) is not None


class Told(torch.nn.Module):
    """A reference network that gives the label maps it was made with, one picture after the other."""

    classes = VOC.classes

    def __init__(self, labels: list[torch.Tensor]):
        super().__init__()
        self.labels = iter(labels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(next(self.labels), VOC.num_classes).permute(2, 0, 1)[None].float()


def test_miou_is_that_of_one_confusion_matrix_over_all_pictures(pipeline, rows):
    variants, betas = [BASE, Variant((8,), "all", "pamr")], [0.0, 0.4]
    drawn = draw_variants(pipeline, rows, VOC, OPTIONS, variants)
    named = [sorted(one.scores[BASE][0]) for one in drawn]
    absent = next(i for i in range(1, 21) if i not in sum(named, []))
    truths = []
    for k, ids in enumerate(named):
        truth = torch.zeros(64, 64, dtype=torch.long)
        truth[4 + k : 40, 4:30], truth[30:60, 32:60], truth[:3] = ids[0], ids[-1], absent
        truths.append(truth)
    truths[2][:] = absent  # the third picture failed: none of its classes is seen
    table, counts = ablate(pipeline, rows, VOC, Told(truths), OPTIONS, variants, betas, batch_size=3)
    assert counts == {"pictures": 3, "not_seen": 1, "ignored": pytest.approx(3 / 64)}
    assert len(table) == 4 and table.seconds_cut.gt(0).all()
    for _, row in table.iterrows():
        variant = next(v for v in variants if v.columns == row[[*VARIED]].to_dict())
        labels = [cut(one, variant, row.beta, get_refiner(variant.refiner)) for one in drawn[:2]]
        guess, truth = torch.stack(labels).long(), torch.stack(truths[:2])
        for column, counted in (("miou", truth != absent), ("miou_strict", truth >= 0)):
            expected = [
                ((guess == i) & (clean == i) & counted).sum() / (((guess == i) | (clean == i)) & counted).sum()
                for clean in [torch.where(truth == absent, 0, truth)]
                for i in sorted({0, *named[0], *named[1]})
            ]
            assert row[column] == pytest.approx(float(torch.stack(expected).mean()), abs=1e-6)
        assert row.low <= row.miou <= row.high or np.isclose(row.low, row.high)


def test_a_reference_that_sees_nothing_is_one_sentence(pipeline, rows):
    nothing = Told([torch.zeros(64, 64, dtype=torch.long)] * 3)
    with pytest.raises(DiffsegError, match="sees the prompt's class in none of the 3 pictures"):
        ablate(pipeline, rows, VOC, nothing, OPTIONS, [BASE], [0.2])


def test_the_time_table_has_each_variant_and_the_plain_pipeline(pipeline, rows):
    table = time_variants(pipeline, rows[:1], VOC, OPTIONS, [BASE, Variant((16,), "all", "pamr")], repetitions=1)
    assert table.resolutions.tolist() == ["-", "16", "16"] and table.refiner.tolist() == ["-", "none", "pamr"]
    assert table.layers.tolist() == ["-", "all", "all"]
    assert table.seconds.gt(0).all() and table.cpu_seconds.gt(0).all()


def test_along_gives_the_rows_that_differ_in_one_thing():
    table = pd.DataFrame([{**v.columns, "beta": beta} for v in VARIANTS for beta in (0.1, 0.2)])
    assert along(table, BASE, "resolutions").resolutions.tolist() == ["16", "16", "8", "8", "8+16", "8+16"]
    assert set(along(table, BASE, "refiner").refiner) == {"none", "pamr", "self-attention"}
    assert len(along(table, BASE, "steps")) == 2 * 7
    assert along(table, BASE, "layers").layers.tolist()[::2] == ["all", "down_blocks.*", "up_blocks.*"]


def test_a_reference_of_other_classes_is_one_sentence(tmp_path):
    save_segmenter(Segmenter("unet-resnet18", ("background", "cat")), tmp_path)
    with pytest.raises(DiffsegError, match="knows 2 classes and they are not voc's"):
        load_reference(str(tmp_path), VOC)
    with pytest.raises(DiffsegError, match="holds no usable segmenter"):
        load_reference(str(tmp_path / "absent"), VOC)


def test_the_mini_reference_is_the_oracle_by_class():
    reference = load_reference("mini", VOC)
    with torch.inference_mode():
        seen = reference(torch.rand(2, 3, 64, 64))
    assert seen.shape == (2, 21, 64, 64) and torch.allclose(seen.exp().sum(dim=1), torch.ones(2, 64, 64), atol=1e-4)
    with pytest.raises(DiffsegError, match="cityscapes has no background"):
        load_reference("mini", get_benchmark("cityscapes"))


def test_publish_copies_table_manifest_and_figures(tmp_path):
    step = tmp_path / "07_mask_ablation"
    step.mkdir()
    with pytest.raises(DiffsegError, match="run notebook 07 first"):
        publish(step, tmp_path / "results")
    (tmp_path / "figures").mkdir()
    for path in (step / "ablation.csv", step / "manifest.json", tmp_path / "figures" / "07_words.png"):
        path.write_text(path.name)
    publish(step, tmp_path / "results")
    assert (tmp_path / "results" / "tables" / "mask_ablation.csv").read_text() == "ablation.csv"
    assert (tmp_path / "results" / "figures" / "mask_ablation_words.png").read_text() == "07_words.png"
    assert (tmp_path / "results" / "tables" / "mask_ablation.manifest.json").is_file()


def test_the_options_of_a_variant_are_the_products_own():
    options = options_of(Variant((8, 16), "0-1", "pamr", ("up_blocks.*",)), 0.4, OPTIONS)
    assert (options.attention_resolutions, options.attention_steps) == ((8, 16), "0-1")
    assert options.attention_layers == ("up_blocks.*",)
    assert (options.refiner, options.beta, options.sampling_steps) == ("pamr", 0.4, 4)
    assert options_of(BASE, 0.2, OPTIONS).refine("cpu") is get_refiner("none")
