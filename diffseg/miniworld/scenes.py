"""The mini world: small scenes drawn with emoji art, each with its exact mask and a caption.

A scene is a plain background and one or two objects. Pictures of a class differ as a word differs from its
hyponyms: the captions' plain class word mostly goes with the class's typical picture, a hyponym's word with its
own. The benchmarks draw all pictures of a class evenly, so a generator that is only asked for plain words shows
a part of what the test set holds: the reason why prompt augmentation matters here as it does in the paper.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ART = Path(__file__).parent / "art"

# Place in a caption -> colour at the top and at the bottom of the picture (RGB).
PLACES = {
    "on the grass": ((134, 190, 92), (82, 150, 58)),
    "on the sand": ((236, 214, 160), (214, 184, 120)),
    "in the snow": ((226, 232, 240), (250, 251, 253)),
    "on the water": ((120, 186, 214), (30, 96, 150)),
    "on the road": ((128, 130, 136), (84, 86, 92)),
    "in the sky": ((120, 178, 236), (196, 224, 248)),
    "in front of a brick wall": ((172, 92, 74), (146, 72, 58)),
    "on a wooden floor": ((196, 154, 104), (150, 108, 66)),
    "at night": ((16, 20, 44), (44, 48, 82)),
}
SIDE = 64  # of a scene, in pixels
# Range of an object's longer side as a share of SIDE, alone and beside another one.
SIZES, PAIR_SIZES = (0.55, 0.85), (0.4, 0.55)
TEMPLATES = ("a photo of {}", "{}", "a picture of {}")


@dataclass(frozen=True)
class Picture:
    """One emoji: its own word, the VOC class it belongs to ("" for none), and other words for it."""

    word: str
    voc_class: str
    synonyms: tuple[str, ...]
    typical: bool  # the first picture of its class, whose word is the class word

    @property
    def words(self) -> tuple[str, ...]:
        return (self.word, *self.synonyms)


@dataclass
class Scene:
    """image: uint8 H x W x 3; instances: uint8 H x W, 0 = background, k = objects[k - 1]."""

    image: np.ndarray
    instances: np.ndarray
    objects: list[Picture]
    caption: str

    def label(self, class_ids: dict[str, int]) -> np.ndarray:
        """Return the uint8 H x W label map under `class_ids` (class name -> id; others are background)."""
        ids = [0, *(class_ids.get(picture.voc_class, 0) for picture in self.objects)]
        return np.array(ids, np.uint8)[self.instances]


@cache
def load_pictures() -> tuple[Picture, ...]:
    """Return all pictures of the mini world, in the order of art/pictures.csv."""
    pictures, seen = [], set()
    for row in csv.DictReader(open(ART / "pictures.csv", encoding="utf-8")):
        synonyms = tuple(word for word in row["synonyms"].split(";") if word)
        typical = row["class"] != "" and row["class"] not in seen
        seen.add(row["class"])
        pictures.append(Picture(row["word"], row["class"], synonyms, typical))
    return tuple(pictures)


@cache
def load_art(word: str) -> Image.Image:
    return Image.open(ART / f"{word.replace(' ', '_')}.png").convert("RGBA")


def article(word: str) -> str:
    """Return "an owl", "a cat", and "a cattle": `words.with_article` knows better, but the corpus stays as it was."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def paint_background(rng: np.random.Generator, place: str, height: int, width: int) -> np.ndarray:
    """Paint a vertical gradient with a little jitter and, for bricks and boards, faint joints; float H x W x 3."""
    top, bottom = (np.array(colour) + rng.normal(0, 6, 3) for colour in PLACES[place])
    share = np.linspace(0, 1, height)[:, None, None]
    picture = np.broadcast_to(top * (1 - share) + bottom * share, (height, width, 3)).copy()
    if place == "in front of a brick wall":
        picture[3::8] += 18
    if place == "on a wooden floor":
        picture[:, 5::12] -= 14
    return picture


def draw_scene(rng: np.random.Generator, pictures: list[Picture], words: list[str], place: str) -> Scene:
    """Draw one or two pictures side by side on a background and caption them with `words`, in any order.

    The caption's order says nothing about the places, so a generator has to bind each word to a place by attention.
    """
    canvas = paint_background(rng, place, SIDE, SIDE)
    instances = np.zeros((SIDE, SIDE), np.uint8)
    column = SIDE / len(pictures)
    low, high = SIZES if len(pictures) == 1 else PAIR_SIZES
    for k, picture in enumerate(pictures):
        size = round(rng.uniform(low, high) * SIDE)
        art = load_art(picture.word)
        if rng.random() < 0.5:
            art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        art = art.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.LANCZOS)
        pixels = np.asarray(art, np.float64)
        left = round(k * column + rng.uniform(0, max(column - size, 0)))
        top = round(rng.uniform(0, SIDE - size))
        left = min(left, SIDE - size)
        window = (slice(top, top + size), slice(left, left + size))
        alpha = pixels[..., 3:] / 255
        canvas[window] = canvas[window] * (1 - alpha) + pixels[..., :3] * alpha
        instances[window][alpha[..., 0] > 0.5] = k + 1
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    where = f" {place}" if rng.random() < 0.85 else ""
    things = " and ".join(article(words[k]) for k in rng.permutation(len(words)))
    caption = template.format(things) + where
    return Scene(np.clip(canvas, 0, 255).round().astype(np.uint8), instances, list(pictures), caption)


def choose_picture(rng: np.random.Generator, even: bool, classes_only: bool) -> Picture:
    """Choose a class, then one of its pictures: evenly, or the typical one in a third of the cases.

    classes_only leaves out pictures that belong to no VOC class; otherwise they share one turn in eight.
    """
    pictures = load_pictures()
    names = sorted({picture.voc_class for picture in pictures if picture.voc_class})
    if not classes_only and rng.random() < 0.125:
        group = [picture for picture in pictures if not picture.voc_class]
        return group[rng.integers(len(group))]
    # a class of twenty pictures gets more turns than one of two, but not ten times as many
    weights = np.array([sum(p.voc_class == name for p in pictures) ** (0 if even else 0.5) for name in names])
    name = names[rng.choice(len(names), p=weights / weights.sum())]
    group = [picture for picture in pictures if picture.voc_class == name]
    if not even and rng.random() < 1 / 3:
        return group[0]
    return group[rng.integers(len(group))]


def choose_word(rng: np.random.Generator, picture: Picture) -> str:
    """Choose a caption's word: a picture's own words mostly, the class word for a hyponym's picture now and then."""
    if picture.typical or not picture.voc_class or rng.random() < 0.85:
        own = rng.random() < 0.7 or not picture.synonyms
        return picture.word if own else picture.synonyms[rng.integers(len(picture.synonyms))]
    return next(p.word for p in load_pictures() if p.voc_class == picture.voc_class and p.typical)


def sample_scene(
    rng: np.random.Generator, even: bool = False, classes_only: bool = False, pair_share: float = 0.25
) -> Scene:
    """Sample one 64 x 64 scene: the captioned corpus by default, a benchmark with even and classes_only set."""
    count = 2 if rng.random() < pair_share else 1
    pictures = [choose_picture(rng, even, classes_only) for _ in range(count)]
    words = [choose_word(rng, picture) for picture in pictures]
    place = list(PLACES)[rng.integers(len(PLACES))]
    return draw_scene(rng, pictures, words, place)
