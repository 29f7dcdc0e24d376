"""The pretrained encoder: scenes of its own, a training that resumes, and weights that the segmenter reads."""

import json

import numpy as np
import torch
from safetensors.torch import load_file

from diffseg.experiments import encoder
from diffseg.experiments.encoder import NAMES, NamedScenes, Namer
from diffseg.miniworld.disk import MINI_BENCHMARKS, WRITERS, write_benchmarks
from diffseg.paths import locate
from diffseg.segmenters import load_encoder


def test_scenes_name_what_they_show_and_are_no_benchmarks(tmp_path, monkeypatch):
    """No scene has a benchmark's seed; the images would differ even then, as a benchmark samples otherwise."""
    seeds, generator = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or generator(seed))
    scenes = [NamedScenes(0, name)[k] for name in ("encoder", "encoder-test") for k in range(60)]
    counts = [int(shown.sum()) for _, shown in scenes[:60]]
    assert set(counts) == {1, 2} and 15 < counts.count(2) < 45
    own = set(seeds)
    assert len(own) == len({image.numpy().tobytes() for image, _ in scenes}) == 120
    seeds.clear()
    splits = {name: dict.fromkeys(MINI_BENCHMARKS[name], 8) for name in WRITERS}
    write_benchmarks(tmp_path / "world", MINI_BENCHMARKS | splits)
    assert len(set(seeds)) == 3 * 3 * 8 and not own & set(seeds)


def train(folder, steps):
    encoder.main(f"train --folder {folder} --steps {steps} --every 2 --batch 4 --device cpu".split())
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_training_resumes_and_its_weights_are_the_segmenters(tmp_path, monkeypatch):
    """A training of four steps in two parts; then half precision, its card, and the encoder in another network."""
    train(tmp_path / "run", 2)
    state = train(tmp_path / "run", 4)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all(np.isfinite(row["loss"]) for row in rows)
    monkeypatch.setattr(encoder, "HELD_OUT", 8)
    encoder.main(["export", "--folder", str(tmp_path / "run"), "--weights", str(tmp_path / "encoder")])
    namer = Namer()
    load_encoder(namer.encoder, tmp_path / "encoder", encoder.SEGMENTER)
    for key, value in namer.encoder.state_dict().items():
        trained = state["average"]["namer"][f"encoder.{key}"]
        assert torch.allclose(value, trained, rtol=1e-3, atol=1e-4), key
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "16 scenes, 4 steps of 4," in " ".join(card.split())


def test_the_shipped_encoder_is_small_and_names_pictures():
    folder = locate("encoder_weights", "mini")
    assert (folder / "model.safetensors").stat().st_size < 5e6
    weights = load_file(folder / "model.safetensors")
    assert all(value.dtype == torch.float16 for value in weights.values() if value.is_floating_point())
    note = json.loads((folder / "training.json").read_text())
    assert json.loads((folder / "config.json").read_text())["names"] == list(NAMES)
    assert note["held_out"]["one"] > 0.9 and note["held_out"]["two"] > 0.8
