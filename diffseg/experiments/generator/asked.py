"""Prompts that say what they ask for, to judge pictures by; and the scene that a perfect generator would draw."""

from dataclasses import dataclass

import numpy as np

from diffseg.miniworld.oracle import PICTURES
from diffseg.miniworld.scenes import PLACES, Scene, article, draw_scene
from diffseg.prompts import Prompt
from diffseg.seeds import derive_seed


@dataclass(frozen=True)
class Asked:
    """A prompt with what it asks for: picture ids (k of PICTURES[k - 1]) in the order of its words, and a place."""

    prompt: Prompt
    pictures: tuple[int, ...]
    place: str


def ask(index: int, named: list[tuple[int, str]], place: str, seed: int) -> Asked:
    """Make the prompt "a photo of a WORD [and a WORD] PLACE" of (picture id, word) pairs."""
    text, spans, relations = "a photo of ", [], []
    for number, (k, word) in enumerate(named):
        text += (" and " if number else "") + article(word)
        spans.append((len(text) - len(word), len(text)))
        picture = PICTURES[k - 1]
        plain = picture.typical and word == picture.word
        relations.append("plain" if plain else "synonym" if picture.typical else "hyponym")
    ids, words = zip(*named, strict=True)
    classes = tuple(PICTURES[k - 1].voc_class for k in ids)
    depths = tuple(int(relation == "hyponym") for relation in relations)
    text_seed = derive_seed(seed, "measure", *words, index)
    prompt = Prompt(index, f"{text} {place}", classes, words, tuple(spans), tuple(relations), depths, "", text_seed)
    return Asked(prompt, ids, place)


def class_words() -> list[tuple[int, str]]:
    """Return every word of every picture of a VOC class, as (picture id, word)."""
    return [(k, word) for k, picture in enumerate(PICTURES, 1) if picture.voc_class for word in picture.words]


def single_prompts(count: int, seed: int) -> list[Asked]:
    """Ask for one object each: every word in turn, each on another place in every round."""
    named, places = class_words(), list(PLACES)
    return [ask(k, [named[k % len(named)]], places[(k + k // len(named)) % len(places)], seed) for k in range(count)]


def pair_prompts(count: int, seed: int) -> list[Asked]:
    """Ask for two objects of different classes each, at random."""
    rng = np.random.default_rng(derive_seed(seed, "measure", "pairs"))
    named, places, asked = class_words(), list(PLACES), []
    while len(asked) < count:
        pair = [named[k] for k in rng.integers(len(named), size=2)]
        if PICTURES[pair[0][0] - 1].voc_class != PICTURES[pair[1][0] - 1].voc_class:
            asked.append(ask(len(asked), pair, places[len(asked) % len(places)], seed))
    return asked


def scene_of(asked: Asked, seed: int) -> Scene:
    """Draw what a prompt asks for: its pictures on its place."""
    rng = np.random.default_rng(derive_seed(seed, "measure", "real", asked.prompt.index, *asked.pictures))
    return draw_scene(rng, [PICTURES[k - 1] for k in asked.pictures], list(asked.prompt.words), asked.place)
