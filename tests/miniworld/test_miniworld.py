"""The mini world: seeded scenes with exact masks, official folders, and a vocabulary that covers its pictures."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import TINY_GENERATOR as TINY
from PIL import Image

from diffseg.benchmarks.classes import CITYSCAPES, DEVELOPMENT, MINI_IMAGENET_S, VOC
from diffseg.benchmarks.readers import data_folder, open_split
from diffseg.errors import DiffsegError
from diffseg.experiments.generator import networks, pretrain
from diffseg.files import sha256_file
from diffseg.generator import load_generator, load_tokenizer
from diffseg.miniworld import disk, scenes
from diffseg.paths import locate
from diffseg.words import with_article

CLASS_IDS = {name: k for k, name in enumerate(VOC.classes)}


def test_every_voc_class_has_a_typical_picture_and_most_have_kinds():
    pictures = scenes.load_pictures()
    typical = [picture.voc_class for picture in pictures if picture.typical]
    assert sorted(typical) == sorted(VOC.classes[1:])
    kinds = [picture for picture in pictures if picture.voc_class and not picture.typical]
    assert len({picture.voc_class for picture in kinds}) >= 15 and len(kinds) >= 50


def test_every_picture_is_there_and_is_72_pixels_with_transparency():
    for picture in scenes.load_pictures():
        art = scenes.load_art(picture.word)
        assert art.size == (72, 72) and art.getextrema()[3] == (0, 255), picture.word


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_scene():
    first, again, other = (scenes.sample_scene(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.image.tobytes() == again.image.tobytes() and first.caption == again.caption
    assert first.image.tobytes() != other.image.tobytes()


def test_the_mask_is_exactly_where_the_picture_differs_from_its_background():
    """The same scene without the object: every pixel of the mask has changed, no pixel far from it has."""
    ball = next(picture for picture in scenes.load_pictures() if picture.word == "bus")
    scene = scenes.draw_scene(np.random.default_rng(5), [ball], ["bus"], "on the grass")
    background = scenes.paint_background(np.random.default_rng(5), "on the grass", 64, 64)
    changed = np.abs(scene.image - background).max(axis=-1) > 2
    mask = scene.label(CLASS_IDS) == CLASS_IDS["bus"]
    assert mask.sum() > 300
    assert changed[mask].all()
    # outside the mask only the half-transparent edge has changed
    assert (changed & ~mask).sum() < 0.25 * mask.sum()


def test_labels_name_the_objects_of_the_caption_which_stand_side_by_side():
    pictures = {picture.word: picture for picture in scenes.load_pictures()}
    pair = [pictures["poodle"], pictures["taxi"]]
    scene = scenes.draw_scene(np.random.default_rng(0), pair, ["poodle", "taxi"], "in the snow")
    assert "a poodle" in scene.caption and "a taxi" in scene.caption
    label = scene.label(CLASS_IDS)
    columns = {k: np.where(label == CLASS_IDS[k])[1].mean() for k in ("dog", "car")}
    assert set(np.unique(label)) == {0, CLASS_IDS["dog"], CLASS_IDS["car"]}
    assert columns["dog"] < columns["car"]


def test_benchmarks_draw_all_pictures_of_a_class_evenly_and_captions_prefer_the_typical_one(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(scenes, "draw_scene", lambda rng, pictures, words, place: pictures)
    even = [picture for k in range(4000) for picture in disk.voc_scene(0, "train", k)]
    corpus = [scenes.choose_picture(rng, even=False, classes_only=False) for _ in range(4000)]
    dogs = [p for p in scenes.load_pictures() if p.voc_class == "dog"]

    def share(sample):
        return np.mean([p.typical for p in sample if p.voc_class == "dog"])

    assert abs(share(even) - 1 / len(dogs)) < 0.08 and share(corpus) > share(even) + 0.15
    assert all(picture.voc_class for picture in even)
    assert any(not picture.voc_class for picture in corpus)


def test_the_tokenizer_knows_every_word_of_a_caption_as_one_token_and_no_other_word():
    tokenizer = networks.build_tokenizer()
    for k in range(200):
        caption = scenes.sample_scene(np.random.default_rng(k)).caption
        tokens = tokenizer(caption).input_ids
        assert len(tokens) == len(caption.split()) + 2 <= networks.MAX_TOKENS
        assert tokenizer.unk_token_id not in tokens[1:-1], caption
    assert tokenizer.unk_token_id in tokenizer("a photo of a zebra").input_ids[1:-1]


def test_the_shipped_tokenizer_is_the_one_that_is_built():
    built, shipped = networks.build_tokenizer(), load_tokenizer("mini")
    text = "a photo of a potted plant and a police car in front of a brick wall"
    assert built.get_vocab() == shipped.get_vocab()
    assert built(text).input_ids == shipped(text).input_ids


def test_captions_take_the_articles_of_english_but_for_cattle():
    words = {word for picture in scenes.load_pictures() for word in picture.words}
    assert {word for word in words if scenes.article(word) != with_article(word)} == {"cattle"}


def test_mini_voc_is_read_by_the_voc_reader_and_repeats_byte_for_byte(tmp_path):
    sizes = {"version": 1, "seed": 0, "voc": {"train": 3, "val": 4}}
    for name in ("a", "b"):
        disk.write_benchmarks(tmp_path / name, sizes)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 7 + 7 + 2 + 1  # pictures, masks, lists, world.json
    for file in files:
        assert sha256_file(tmp_path / "a" / file) == sha256_file(tmp_path / "b" / file)
    split = open_split(VOC, tmp_path / "a", "val")
    assert len(split) == 4
    for k, (name, image, label) in enumerate(split):
        scene = disk.voc_scene(0, "val", k)
        assert name == f"val_{k:06d}"
        assert torch.equal(label, torch.from_numpy(scene.label(CLASS_IDS)).long())
        error = np.abs(image.permute(1, 2, 0).numpy().astype(int) - scene.image).mean()
        assert error < 4, "JPEG at quality 95 changes a picture by a few levels only"
    assert json.loads((tmp_path / "a" / "world.json").read_text()) == sizes


def test_the_development_split_is_read_as_the_others_and_shares_no_scene_with_them(tmp_path):
    """As many scenes as the validation split, drawn alike, and none of them is in the other splits."""
    for name, benchmark in (("voc", VOC), ("imagenet-s", MINI_IMAGENET_S), ("cityscapes", CITYSCAPES)):
        others = {benchmark.training_split, benchmark.evaluation_split}
        assert disk.MINI_BENCHMARKS[name].keys() == others | {DEVELOPMENT}
        assert disk.MINI_BENCHMARKS[name][DEVELOPMENT] == disk.MINI_BENCHMARKS[name][benchmark.evaluation_split]
        sizes = dict.fromkeys(disk.MINI_BENCHMARKS[name], 12)
        disk.write_benchmarks(tmp_path / name, {"version": 1, "seed": 0, name: sizes})
        splits = {split: open_split(benchmark, tmp_path / name, split) for split in sizes}
        images = [image.numpy().tobytes() for split in splits.values() for _, image, _ in split]
        assert [len(split) for split in splits.values()] == [12, 12, 12] and len(set(images)) == 36


def test_a_data_root_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DiffsegError, match="nowhere"):
        data_folder(str(tmp_path / "nowhere"))


def test_the_mini_world_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiffsegError, match="cannot be written"):
        disk.write_benchmarks(tmp_path / "file" / "world", {"version": 1, "seed": 0, "voc": {"train": 1, "val": 1}})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_half_a_copy_of_the_mini_world_is_replaced_whichever_process_is_first(tmp_path):
    sizes = {"version": 1, "seed": 0, "voc": {"train": 1, "val": 1}}
    with ThreadPoolExecutor(4) as processes:
        for world in [tmp_path / str(number) for number in range(5)]:
            (world / "VOCdevkit").mkdir(parents=True)
            list(processes.map(lambda _, root=world: disk.write_benchmarks(root, sizes), range(4)))
            assert json.loads((world / "world.json").read_text()) == sizes and len(open_split(VOC, world, "val")) == 1
    assert len(list(tmp_path.iterdir())) == 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of 64 scenes with its latents, made by the real stages in two steps of training."""
    folder = tmp_path_factory.mktemp("pretrain")
    pretrain.make_corpus(folder, scenes=64, pair_share=0.6, seed=0, workers=1)
    options = pretrain.parse_options(["vae", "--steps", "2", "--batch", "8", "--device", "cpu"])
    pretrain.train_vae(folder / "vae", folder, options)
    return folder


def test_the_corpus_holds_pictures_and_captions_and_no_mask(corpus):
    images = np.load(corpus / "images.npy")
    captions = json.loads((corpus / "captions.json").read_text())
    assert images.shape == (64, 64, 64, 3) and images.dtype == np.uint8 and len(captions) == 64
    scene = scenes.sample_scene(np.random.default_rng(pretrain.derive_seed(0, "corpus", 7)), pair_share=0.6)
    assert captions[7] == scene.caption and np.array_equal(images[7], scene.image)
    assert {path.name for path in corpus.iterdir()} == {"images.npy", "captions.json", "latents.npy", "vae"}


def test_the_order_of_a_caption_says_nothing_about_the_places():
    """Else a generator could tell which word goes left without attending to any place."""
    firsts = []
    for k in range(200):
        pictures = [picture for picture in scenes.load_pictures() if picture.typical][:2]
        words = [picture.word for picture in pictures]
        scene = scenes.draw_scene(np.random.default_rng(k), pictures, words, "in the snow")
        firsts.append(scene.caption.index(words[0]) < scene.caption.index(words[1]))
    assert 70 < sum(firsts) < 130


def test_tuning_the_decoder_leaves_the_encoder_as_it_is(corpus, tmp_path):
    (tmp_path / "vae").symlink_to(corpus / "vae")
    options = pretrain.parse_options(["decoder", "--steps", "3", "--batch", "8", "--device", "cpu", "--every", "3"])
    pretrain.train_decoder(tmp_path / "decoder", corpus, options)
    before, after = (
        pretrain.AutoencoderKL.from_pretrained(place).state_dict()
        for place in (tmp_path / "vae" / "vae", tmp_path / "decoder" / "vae")
    )
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_training_goes_on_from_the_shipped_generator(corpus, tmp_path, monkeypatch):
    """At rate 0 the weights that come out are those that went in, and the note tells of both trainings."""
    monkeypatch.setattr(pretrain, "draw_sheet", lambda *_: None)  # 40 pictures; the test below draws them
    for name in ("images.npy", "captions.json"):
        (tmp_path / name).symlink_to(corpus / name)
    initial = ["--initial", "mini", "--device", "cpu"]
    pretrain.encode_corpus(tmp_path, pretrain.parse_options(["latents", *initial]))
    assert json.loads((tmp_path / "vae" / "vae.json").read_text())["psnr"] > 24
    options = ["diffusion", *initial, "--steps", "2", "--batch", "4", "--rate", "0"]
    pretrain.train_diffusion(tmp_path / "diffusion", tmp_path, pretrain.parse_options(options))
    pretrain.export(tmp_path / "diffusion", tmp_path, tmp_path / "weights", initial="mini")
    before, after = (load_generator(name) for name in ("mini", str(tmp_path / "weights")))
    for part in ("unet", "text_encoder", "vae"):
        state = getattr(after, part).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in getattr(before, part).state_dict().items()), part
    note, shipped = (
        json.loads((f / "training.json").read_text()) for f in (tmp_path / "weights", locate("generator", "mini"))
    )
    assert note["initial"] == shipped and note["samples_seen"] == 8


def train_some(folder, corpus, steps, changes):
    arguments = ["diffusion", "--steps", str(steps), "--batch", "4", "--device", "cpu", "--every", "3"]
    pretrain.train_diffusion(folder, corpus, pretrain.parse_options(arguments), changes)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("changes", [TINY, pytest.param({}, marks=pytest.mark.slow)], ids=["tiny", "as shipped"])
def test_a_resumed_training_equals_an_uninterrupted_one(corpus, tmp_path, monkeypatch, changes):
    """Cut after 3 of 6 steps and resumed: the same weights, bit for bit, as without the cut."""
    vae = tmp_path / "vae"
    vae.symlink_to(corpus / "vae")
    whole = train_some(tmp_path / "whole", corpus, 6, changes)
    options = pretrain.parse_options(["diffusion", "--steps", "6", "--batch", "4", "--every", "3", "--sheet", "3"])
    options.device = "cpu"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "draw_sheet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        pretrain.train_diffusion(tmp_path / "cut", corpus, options, changes)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 3
    resumed = train_some(tmp_path / "cut", corpus, 6, changes)
    for name in ("text_encoder", "unet"):
        for key, value in whole["modules"][name].items():
            assert torch.equal(value, resumed["modules"][name][key]), key
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6] and all(np.isfinite(row["loss"]) for row in rows)
    sheet = Image.open(next((tmp_path / "whole").glob("sheet_*.png")))
    assert sheet.size == (640, 256)
