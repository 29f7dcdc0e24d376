"""Mini Cityscapes: wide street scenes that the mini generator has never seen, in Cityscapes' own layout and codes.

What the generator was trained on is one or two large emoji on a plain ground, 64 x 64. Here a road runs to a
vanishing point between houses, trees, signs and lights; the colours are muted; several small people and vehicles
stand at different depths, hide each other, and are cut by the edges; the bonnet of the car that carries the camera
fills the bottom. As in the official files a rider's bicycle is labelled bicycle, and what is not evaluated (bonnet,
border, rubbish on the ground) has a labelId of its own.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from diffseg.miniworld.scenes import load_art
from diffseg.seeds import derive_seed

HEIGHT, WIDTH = 64, 128  # Cityscapes' 1024 x 2048, sixteen times smaller
FINE = 3  # drawn at this multiple of the size, for smooth edges; odd, so that a label is that of its pixel's centre
CITIES = {
    "train": ("ampelburg", "brezelheim", "dachstadt", "eschenau"),
    "val": ("gleisdorf", "hafenried"),
    "dev": ("inselstadt", "jochberg"),
}

# The official labelIds (cityscapesScripts, labels.py); 0 to 6, 9, 10, 14 to 16 and 18 are not evaluated.
LABEL_IDS = {
    "ego vehicle": 1, "out of roi": 3, "static": 4, "road": 7, "sidewalk": 8, "parking": 9, "building": 11, "wall": 12,
    "fence": 13, "pole": 17, "polegroup": 18, "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22,
    "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip

# Class -> (its turn among the objects, height in metres, the emoji's words). Cars and people lead as in Cityscapes,
# but rare classes come oftener than there (our choice: a few hundred pictures have to show them all).
THINGS = {
    "person": (5.0, 1.9, ("person", "man", "woman", "pedestrian", "runner", "dancer")),
    "rider": (2.5, 2.1, ("cyclist",)),
    "car": (5.0, 1.9, ("car", "taxi", "police car", "ambulance", "jeep", "sedan")),
    "truck": (1.8, 2.8, ("truck", "trailer truck", "fire engine", "pickup")),
    "bus": (1.8, 2.8, ("bus", "trolleybus", "minibus", "school bus")),
    "train": (1.2, 3.0, ("train", "passenger train", "subway train", "tram")),
    "motorcycle": (1.8, 1.7, ("motorbike", "moped")),
    "bicycle": (2.2, 1.7, ("bicycle",)),
}
BICYCLE_FROM = 0.55  # of a rider's height, from the top
ON_FOOT = ("person", "bicycle")  # these stand on the sidewalk, too

# Muted colours (RGB) and how much they vary; the light of a whole scene is drawn besides.
FACADES = ((124, 112, 100), (112, 104, 106), (134, 124, 112), (98, 98, 104), (128, 106, 92), (106, 112, 104))
GREENS = ((62, 80, 52), (74, 88, 56), (54, 70, 50))


class Canvas:
    """A picture and its labelIds, painted together: `float` coordinates in pixels of the final size."""

    def __init__(self):
        size = (WIDTH * FINE, HEIGHT * FINE)
        self.image, self.label = Image.new("RGB", size), Image.new("L", size)
        self._paint, self._mark = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)

    def polygon(self, points: Sequence[tuple[float, float]], colour: Sequence[float], name: str | None) -> None:
        """Fill a polygon; name: its class, or None to leave the labels as they are (windows, lane marks)."""
        fine = [(FINE * x, FINE * y) for x, y in points]
        self._paint.polygon(fine, tuple(int(c) for c in np.clip(colour, 0, 255)))
        if name:
            self._mark.polygon(fine, LABEL_IDS[name])

    def box(self, left: float, top: float, right: float, bottom: float, colour: Sequence[float], name: str) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, name)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Sequence[float], name: str | None) -> None:
        turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        self.polygon(list(zip(x + rx * np.cos(turn), y + ry * np.sin(turn), strict=True)), colour, name)

    def paste(self, art: Image.Image, outline: Image.Image, labels: np.ndarray, left: float, top: float) -> None:
        """Paste an RGBA picture of the fine size; labels: uint8 of its size, taken inside the outline (L, 0..255)."""
        corner = round(FINE * left), round(FINE * top)
        self.image.paste(art, corner, art)
        self.label.paste(Image.fromarray(labels), corner, outline.point(lambda a: 255 * (a > 127)))

    def finish(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the picture (uint8 H x W x 3), muted and a little noisy, and the labelIds (uint8 H x W)."""
        picture = np.asarray(self.image.resize((WIDTH, HEIGHT), Image.Resampling.BOX), np.float64)
        grey = picture.mean(axis=-1, keepdims=True)
        picture = grey + rng.uniform(0.5, 0.75) * (picture - grey)  # little colour
        picture = 90 + rng.uniform(0.7, 0.9) * (picture - 90)  # little contrast
        picture = picture * rng.uniform(0.85, 1.15) * (0.97, 1.03, 0.96)  # light of the hour, a green cast
        picture += rng.normal(0, 2, picture.shape)
        label = np.array(self.label.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))
        label[[0, -1]] = label[:, [0, -1]] = LABEL_IDS["out of roi"]
        return np.clip(picture, 0, 255).round().astype(np.uint8), label


def street_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return one scene: picture uint8 64 x 128 x 3, labelIds uint8 64 x 128."""
    canvas = Canvas()
    x0, y0 = rng.uniform(0.38, 0.62) * WIDTH, rng.uniform(0.36, 0.46) * HEIGHT  # the vanishing point
    reach = HEIGHT - y0

    def ground(side: float, nearness: float) -> tuple[float, float]:
        """A point of the ground: `side` in road half-widths, nearness 0 at the horizon, 1 at the lower edge."""
        return x0 + side * nearness * 0.62 * WIDTH, y0 + nearness * reach

    sky = np.array((176, 184, 188)) + rng.normal(0, 8, 3)
    for k in range(8):  # brighter towards the horizon
        top, bottom = k * y0 / 8, (k + 1) * y0 / 8 + 1
        canvas.box(0, top, WIDTH, bottom, sky + 4 * k - 12, "sky")
    paving = np.array((122, 116, 118)) + rng.normal(0, 5, 3)
    canvas.box(0, y0, WIDTH, HEIGHT, paving, "sidewalk")
    if rng.random() < 0.3:  # a verge along one side
        side = rng.choice((-1, 1))
        verge = [ground(side * 1.8, 0), ground(side * 2.2, 1), ground(side * 12, 1), ground(side * 12, 0.02)]
        canvas.polygon(verge, np.array((96, 104, 72)) + rng.normal(0, 5, 3), "terrain")
    asphalt = np.array((84, 82, 86)) + rng.normal(0, 5, 3)
    canvas.polygon([ground(-1, 0), ground(1, 0), ground(1, 1), ground(-1, 1)], asphalt, "road")
    if rng.random() < 0.25:
        side = rng.choice((-1, 1))
        bay = [ground(side * 0.8, 0.1), ground(side, 0.1), ground(side, 1), ground(side * 0.8, 1)]
        canvas.polygon(bay, asphalt - 8, "parking")
    for near in (0.06, 0.11, 0.2, 0.36, 0.65):  # lane marks
        line = [ground(-0.01, near), ground(0.01, near), ground(0.02, near * 1.35), ground(-0.02, near * 1.35)]
        canvas.polygon(line, (176, 176, 172), None)

    canvas.box(x0 - 12, y0 - rng.uniform(3, 8), x0 + 12, y0 + 1, FACADES[rng.integers(len(FACADES))], "building")
    for side in (-1, 1):
        draw_houses(canvas, rng, x0, y0, side)
    draw_things(canvas, rng, ground, y0)

    bonnet = np.array((44, 46, 50)) + rng.normal(0, 3, 3)
    canvas.ellipse(WIDTH / 2, HEIGHT + 4, 0.62 * WIDTH, rng.uniform(7, 10), bonnet, "ego vehicle")
    canvas.ellipse(WIDTH / 2, HEIGHT + 5, 0.5 * WIDTH, 7, bonnet + 14, None)
    return canvas.finish(rng)


def draw_houses(canvas: Canvas, rng: np.random.Generator, x0: float, y0: float, side: int) -> None:
    """Draw one side of the street from the far end to the near: houses with windows, here and there trees."""
    edge = 0 if side < 0 else WIDTH
    cuts = np.linspace(0.1, 1, rng.integers(3, 6)) ** 1.3
    for near, far in zip(cuts[:0:-1], cuts[-2::-1], strict=True):
        x = [x0 + share * (edge - x0) for share in (far, near)]
        foot = [y0 + share * 0.28 * HEIGHT for share in (far, near)]
        kind = rng.choice(("building", "vegetation", "wall", "fence"), p=(0.7, 0.2, 0.05, 0.05))
        storeys = {"building": rng.uniform(0.6, 1.1), "vegetation": 0.5, "wall": 0.12, "fence": 0.12}[kind]
        top = [y0 - share * storeys * HEIGHT for share in (far, near)]
        if kind == "vegetation":
            green = np.array(GREENS[rng.integers(len(GREENS))])
            for _ in range(7):
                at = rng.uniform(0.1, 0.9)
                middle = (1 - at) * (top[0] + foot[0]) / 2 + at * (top[1] + foot[1]) / 2
                size = 0.3 * ((1 - at) * (foot[0] - top[0]) + at * (foot[1] - top[1]))
                spot = x[0] + at * (x[1] - x[0]), middle + size * rng.uniform(-0.8, 0.8)
                canvas.ellipse(*spot, size * 1.1, size, green + rng.normal(0, 6), "vegetation")
            continue
        colour = np.array(FACADES[rng.integers(len(FACADES))]) + rng.normal(0, 5, 3)
        canvas.polygon([(x[0], top[0]), (x[1], top[1]), (x[1], foot[1]), (x[0], foot[0])], colour, kind)
        if kind == "building":
            draw_windows(canvas, x, top, foot, colour * 0.7)


def draw_windows(canvas: Canvas, x: list[float], top: list[float], foot: list[float], colour: np.ndarray) -> None:
    columns = max(1, round(abs(x[1] - x[0]) / 6))

    def on_wall(across: float, down: float) -> tuple[float, float]:
        high, low = ((1 - across) * ends[0] + across * ends[1] for ends in (top, foot))
        return x[0] + across * (x[1] - x[0]), high + down * (low - high)

    for column in range(columns):
        a, b = (column + 0.25) / columns, (column + 0.75) / columns
        for row in range(4):
            c, d = 0.08 + 0.22 * row, 0.2 + 0.22 * row
            canvas.polygon([on_wall(a, c), on_wall(b, c), on_wall(b, d), on_wall(a, d)], colour, None)


def draw_things(canvas: Canvas, rng: np.random.Generator, ground, y0: float) -> None:
    """Draw people, vehicles, lights and signs from far to near, so that the near ones hide the far ones."""
    turns = np.array([turn for turn, _, _ in THINGS.values()])
    names = rng.choice(list(THINGS), rng.integers(3, 7), p=turns / turns.sum()).tolist()
    names += ["traffic light"] * (rng.random() < 0.35) + ["traffic sign"] * (rng.random() < 0.5)
    nearness = np.sort(rng.uniform(0.28, 0.8, len(names)))
    rng.shuffle(names)
    for name, near in zip(names, nearness, strict=True):
        metre = near * 15  # pixels of the final size
        if name in ("traffic light", "traffic sign"):
            draw_post(canvas, rng, ground, near, metre, name)
            continue
        side = rng.choice((-1, 1)) * rng.uniform(1.1, 1.6) if name in ON_FOOT and rng.random() < 0.6 else None
        x, foot = ground(rng.uniform(-0.8, 0.8) if side is None else side, near)
        _, metres, words = THINGS[name]
        words = words[rng.integers(len(words))]
        art, outline = cut_out(words)
        height = metres * metre * rng.uniform(0.9, 1.1)
        width = height * art.width / art.height
        x = np.clip(x, 0.2 * width, WIDTH - 0.2 * width)  # at most a part is cut by the edge
        size = max(2, round(FINE * width)), max(2, round(FINE * height))
        art, outline = art.resize(size, Image.Resampling.LANCZOS), outline.resize(size, Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            art, outline = (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in (art, outline))
        labels = np.full(size[::-1], LABEL_IDS[name], np.uint8)
        if name == "rider":  # the lower part of the picture is the bicycle
            labels[round(BICYCLE_FROM * size[1]) :] = LABEL_IDS["bicycle"]
        canvas.ellipse(x, foot, 0.45 * width, 0.05 * height, (58, 57, 60), None)  # its shadow
        canvas.paste(art, outline, labels, x - width / 2, foot - height)
    if rng.random() < 0.2:
        x, foot = ground(rng.choice((-1, 1)) * 1.15, 0.4)
        canvas.box(x - 1, foot - 3, x + 1.5, foot, (70, 66, 62), "static")


def draw_post(canvas: Canvas, rng: np.random.Generator, ground, near: float, metre: float, name: str) -> None:
    x, foot = ground(rng.choice((-1, 1)) * rng.uniform(1.02, 1.12), near)
    top = foot - 3.4 * metre
    pole = "polegroup" if rng.random() < 0.1 else "pole"
    canvas.box(x - 0.08 * metre - 0.3, top, x + 0.08 * metre + 0.3, foot, (72, 74, 76), pole)
    half = 0.32 * metre
    if name == "traffic sign":
        colour = ((52, 76, 130), (150, 52, 50), (166, 150, 70))[rng.integers(3)]
        canvas.ellipse(x, top, half * 1.1, half * 1.1, colour, name)
        canvas.ellipse(x, top, half * 0.6, half * 0.6, (186, 186, 184), None)
        return
    canvas.box(x - half * 0.8, top - 2 * half, x + half * 0.8, top + 2 * half, (34, 36, 36), name)
    for k, colour in enumerate(((168, 54, 48), (176, 140, 60), (60, 140, 84))):
        canvas.ellipse(x, top + (k - 1) * 1.25 * half, half * 0.45, half * 0.45, colour, None)


@cache
def cut_out(word: str) -> tuple[Image.Image, Image.Image]:
    """Return an emoji without its transparent margin, so that it stands on the ground, and its outline (L, 0 or 255).

    What is seen through a thing, as through a wheel, is labelled as the thing: Cityscapes' own rule.
    """
    art = load_art(word)
    outside = art.getchannel("A").point(lambda a: 255 * (a > 127))
    box = outside.getbbox()
    outside = ImageOps.expand(outside, 1)  # so that the margin goes all around
    ImageDraw.floodfill(outside, (0, 0), 1)
    outline = ImageOps.crop(outside, 1).point(lambda a: 255 * (a != 1))
    return art.crop(box), outline.crop(box)


def write_cityscapes(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Write mini Cityscapes below `folder` as the official archives unpack: leftImg8bit and gtFine.

    sizes: pictures per split ("train", "val", "dev"); seed: of all scenes. Files are
    `leftImg8bit/<split>/<city>/<city>_<sequence>_<frame>_leftImg8bit.png` (RGB, 64 x 128) and
    `gtFine/<split>/<city>/..._gtFine_labelIds.png` (mode L, official labelIds). The same arguments give the same
    pictures; a scene follows from the seed, its split and its number alone. Raises a KeyError for another split.
    """
    for split, size in sizes.items():
        cities = CITIES[split]
        for k in tqdm(range(size), f"drawing mini Cityscapes {split}", unit="scene"):
            city = cities[k % len(cities)]
            name = f"{city}_{k // len(cities):06d}_000019"  # the frame that is labelled in the official sequences
            picture, label = street_scene(np.random.default_rng(derive_seed(seed, "cityscapes", split, k)))
            for kind, suffix, pixels in (
                ("leftImg8bit", "leftImg8bit", picture),
                ("gtFine", "gtFine_labelIds", label),
            ):
                path = folder / kind / split / city / f"{name}_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
