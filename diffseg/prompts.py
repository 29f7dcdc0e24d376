"""From a word table to prompts: class words replaced by synonyms and hyponyms, each with its place in the
text.

Whatever word a prompt uses, its row says which class it stands for and at which characters, so that the
attention of "poodle" can be read as the attention of the class dog.
"""

import csv
import math
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffseg.errors import DiffsegError
from diffseg.files import atomic_path
from diffseg.paths import locate
from diffseg.pictures import read_text
from diffseg.seeds import derive_seed
from diffseg.words import TWO_CLASSES, Word, nfc, plural, with_article

_TOKEN = re.compile(r"(?:[^\W_][\u0300-\u036f]*)+")  # with the accents of the decomposed form
# "a ", "a small black ", "a grazing ": an article with up to three words that may be adjectives, before a class's word
_ARTICLE = re.compile(
    r"(?<!\w)an?\s+((?:\w+ing\s+)?(?:(?!(?:an?|and|behind|by|couple|dozen|few|for|hundred|near|of|some|the"
    r"|two|where|with|\w+ing)\s)[\w-]+\s+){0,2})$",
    re.IGNORECASE,
)
_COLUMNS = ("index", "prompt", "classes", "words", "spans", "relations", "depths", "negative", "seed")


@dataclass(frozen=True)
class Match:
    """A class's word found in a caption at characters start..end (end excluded), possibly in the plural."""

    start: int
    end: int
    word: Word
    plural: bool


@dataclass(frozen=True)
class Prompt:
    """One row of prompts.csv. The tuples have one entry per class word, in the order of the text.

    A class that a caption names twice occurs twice. spans: characters (start, end), end excluded, so that
    prompt[start:end] is the word. relations: plain, synonym or hyponym. seed: 63 bits, of the image; of
    these PyTorch's generator on a CPU reads the lower 32.
    """

    index: int
    prompt: str
    classes: tuple[str, ...]
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    relations: tuple[str, ...]
    depths: tuple[int, ...]
    negative: str
    seed: int


def read_captions(path: str | os.PathLike) -> list[str]:
    """Return the non-empty lines of a UTF-8 text file in NFC; a relative path counts from the project's root.

    Raises DiffsegError for a file that is missing, empty or not UTF-8.
    """
    path = locate("caption_file", str(path))
    if not path.is_file():
        raise DiffsegError(f"The caption file {path} does not exist: give a text file with one caption a line.")
    captions = [nfc(line.strip()) for line in read_text(path).splitlines() if line.strip()]
    if not captions:
        raise DiffsegError(f"The caption file {path} is empty: write one caption a line.")
    return captions


def _tokens(text: str) -> tuple[str, ...]:
    return tuple(nfc(token.lower()) for token in _TOKEN.findall(text))


def _inflected(words: Sequence[Word]) -> dict[tuple[str, ...], tuple[Word, bool]]:
    """Return singular and plural forms, as lower-case tokens -> (row, is plural); the singular wins."""
    forms = {_tokens(plural(word.word)): (word, True) for word in words}
    return forms | {_tokens(word.word): (word, False) for word in words}


def _forms(words: Sequence[Word]) -> dict[tuple[str, ...], tuple[Word, bool]]:
    """Return the forms that `find_words` looks for, "baby horse" and "adult horse" beside every "horse"."""
    others = _inflected([word for word in words if word.relation == "other"])
    shown = _inflected([word for word in words if word.keep or word.reason.startswith(TWO_CLASSES)])
    aged = {(age, *form): row for form, row in (others | shown).items() for age in ("baby", "adult")}
    return others | aged | shown  # the later wins: "baby sheep" is another thing only where no class is sheep


def find_words(caption: str, words: Sequence[Word]) -> list[Match]:
    """Return the class words in a caption, left to right: kept words, singular or plural, whatever the case.

    The longest word wins ("police car", not "car"); compounds of the table's relation "other" ("hot dog") and
    parts of hyphenated words ("dog-friendly") are no match. A compound that is never drawn because it contains
    another class's word ("guard dog") is a match of its own class, as are "baby horse" and "adult horse" of horse's.
    "é" is the same composed and decomposed; the places are those in the caption as it is given.
    """
    return _find(caption, _forms(words))


def _find(caption: str, forms: dict[tuple[str, ...], tuple[Word, bool]]) -> list[Match]:
    longest = max(map(len, forms), default=0)
    tokens = list(_TOKEN.finditer(caption))
    low = [nfc(token[0].lower()) for token in tokens]
    matches, i = [], 0
    while i < len(tokens):
        for n in range(min(longest, len(tokens) - i), 0, -1):
            start, end = tokens[i].start(), tokens[i + n - 1].end()
            together = all(
                caption[a.end() : b.start()] in (" ", "-", "'", "’")
                for a, b in zip(tokens[i : i + n], tokens[i + 1 : i + n], strict=False)
            )
            part_of_longer = caption[end : end + 1] == "-" or caption[max(start - 1, 0) : start] == "-"
            word, is_plural = forms.get(tuple(low[i : i + n]), (None, False))
            # a word of one's own may hold other signs, such as a comma, and end in one: "7-up (can)"
            whole = word is not None and nfc(caption[start : start + len(word.word)].lower()) == nfc(word.word.lower())
            is_written = whole or word and (together or nfc(caption[start:end].lower()) == nfc(word.word.lower()))
            end = max(end, start + len(word.word)) if whole else end
            if is_written and not part_of_longer:
                if word.relation != "other":
                    matches.append(Match(start, end, word, is_plural))
                i += n
                break
        else:
            i += 1
    return matches


def _deal(items: Sequence, rng: random.Random) -> Iterator:
    """Yield the items for ever in shuffled rounds: at any time all have come equally often, within one."""
    while True:
        yield from rng.sample(items, len(items))


class _Chooser:
    """Which word stands for a class this time.

    In every class the share of plain words is exact within one, and the other words take turns.
    """

    def __init__(self, words: Sequence[Word], plain_share: float, rng: random.Random):
        self.share = plain_share
        self.plain = {word.class_name: word for word in words if word.relation == "plain"}
        self.others = {
            name: [w for w in words if w.class_name == name and w.keep and w.relation in ("synonym", "hyponym")]
            for name in self.plain
        }
        self.turns = {name: _deal(others, rng) for name, others in self.others.items()}
        # a random phase each, below one request: at shares such as 1/2 or 1/3 all turn plain in the same round still
        self.asked = {name: rng.random() for name in self.plain}

    def choose(self, name: str) -> Word:
        before = self.asked[name]
        self.asked[name] += 1
        stays = math.floor((before + 1) * self.share) > math.floor(before * self.share)
        return self.plain[name] if stays or not self.others[name] else next(self.turns[name])


def augment(
    words: Sequence[Word],
    images: int,
    *,
    templates: Sequence[str] = ("a photo of {}",),
    places: Sequence[str] = (),
    captions: Sequence[str] = (),
    plain_share: float = 0.5,
    classes_per_prompt: int = 1,
    balance: bool = True,
    negative_prompt: str = "",
    seed: int = 0,
) -> list[Prompt]:
    """Return exactly `images` prompts; the same arguments give the same list on every machine.

    words: a word table (see diffseg.words). templates: `{}` is the object phrase ("a poodle and a taxi"), an
    optional `{place}` one of `places`. captions: when given, they take the templates' place, and their class
    words are replaced; captions without a class word are left out. plain_share: share in 0..1 of class words
    that stay plain (in captions: stay as written); whatever it is, classes, places and seeds are the same, so
    that two lists can be compared pair by pair. classes_per_prompt: classes in a template's prompt; a caption
    has the classes that it names. balance: every class equally often (within one; with captions: a caption is
    drawn for each class in turn); otherwise a class in proportion to its words (every caption equally often), so that
    one with 190 hyponyms comes more often than one with four. Prompts and spans are in Unicode's composed form
    (NFC). Raises DiffsegError for values out of range.
    """
    templates, places, captions = (tuple(map(nfc, texts)) for texts in (templates, places, captions))
    rng = random.Random(derive_seed(seed, "prompts"))
    # a lot of their own, so that plain_share does not change which classes and places come
    chooser = _Chooser(words, plain_share, random.Random(derive_seed(seed, "words")))
    classes = list(chooser.plain)
    if not classes:
        raise DiffsegError("The word table holds no class: give a benchmark, or a class list that is not empty.")
    if images < 1:
        raise DiffsegError(f"images = {images}: ask for at least one prompt.")
    if not 0 <= plain_share <= 1:
        raise DiffsegError(f"plain_share = {plain_share}: give a share between 0 and 1.")
    if not captions and not 1 <= classes_per_prompt <= len(classes):
        raise DiffsegError(f"classes_per_prompt = {classes_per_prompt}: give 1 to {len(classes)}, the list's classes.")
    if captions:
        texts = _captioned(captions, words, classes, chooser, balance, rng)
    else:
        texts = _templated(templates, places, words, classes, chooser, classes_per_prompt, balance, rng)
    prompts = []
    for index in range(images):
        text, uses = next(texts)
        names = tuple(word.class_name for word, _ in uses)
        spans = tuple(span for _, span in uses)
        prompts.append(
            Prompt(
                index=index,
                prompt=text,
                classes=names,
                words=tuple(text[start:end] for start, end in spans),
                spans=spans,
                relations=tuple(word.relation for word, _ in uses),
                depths=tuple(word.depth for word, _ in uses),
                negative=negative_prompt,
                seed=derive_seed(seed, ";".join(names), index),
            )
        )
    return prompts


def _templated(templates, places, words, classes, chooser, classes_per_prompt, balance, rng):
    """Yield (prompt, [(word, span), ...]) for ever, made from templates."""
    for template in templates:
        if template.count("{}") != 1 or re.search(r"[{}]", template.replace("{}", "").replace("{place}", "")):
            raise DiffsegError(f"The template {template!r} must hold one {{}} and no braces besides {{place}}.")
    if not templates:
        raise DiffsegError("templates is empty: give at least one, such as 'a photo of {}'.")
    weighted = classes if balance else [word.class_name for word in words if word.keep and word.class_name in classes]
    deck: list[str] = []
    while True:
        chosen: list[str] = []
        while len(chosen) < classes_per_prompt:
            name = next((name for name in deck if name not in chosen), None)
            if name is None:
                deck += rng.sample(weighted, len(weighted))
                continue
            deck.remove(name)
            chosen.append(name)
        place = rng.choice(places) if places else ""
        head, tail = rng.choice(templates).replace("{place}", place).split("{}")
        text, uses = head.lstrip(), []
        for k, name in enumerate(chosen):
            word = chooser.choose(name)
            phrase = with_article(word.word)
            text += (" and " if k else "") + phrase
            uses.append((word, (len(text) - len(word.word), len(text))))
        yield (text + tail).rstrip(), uses


def _captioned(captions, words, classes, chooser, balance, rng):
    """Yield (prompt, [(word, span), ...]) for ever, made from captions that name a class."""
    forms = _forms(words)
    found = [(caption, matches) for caption in captions if (matches := _find(caption, forms))]
    if not found:
        raise DiffsegError(
            f"None of the {len(captions)} captions names a class: give captions with the classes' words."
        )
    if balance:
        naming = {name: [c for c in found if any(m.word.class_name == name for m in c[1])] for name in classes}
        decks = {name: _deal(group, rng) for name, group in naming.items() if group}
        drawn = (next(decks[name]) for name in _deal(list(decks), rng))
    else:
        drawn = _deal(found, rng)
    for caption, matches in drawn:
        text, done, uses = "", 0, []
        for match in matches:
            word, before = chooser.choose(match.word.class_name), caption[done : match.start]
            written = caption[match.start : match.end]
            if word.relation == "plain":  # the caption's own word stays
                word = match.word
            else:
                article = _ARTICLE.search(before)
                own = match.word.word.lower()
                many = match.plural or (not article and plural(own) == own)  # "three sheep": several, most likely
                new = plural(word.word) if many else word.word
                if article and not many:
                    phrase = with_article(article[1] + new)
                    phrase = phrase[0].upper() + phrase[1:] if article[0][0].isupper() else phrase
                    before, new = before[: article.start()] + phrase[: -len(new)], phrase[-len(new) :]
                elif written[0].isupper() and match.start == 0:
                    new = new[0].upper() + new[1:]
                written = new
            text += before
            uses.append((word, (len(text), len(text) + len(written))))
            text += written
            done = match.end
        yield text + caption[done:], uses


def write_prompts(path: str | os.PathLike, prompts: Sequence[Prompt]) -> None:
    """Write prompts.csv (UTF-8): one row a prompt, lists joined by `;`, spans as `start:end`."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for p in prompts:
            row = (
                p.index,
                p.prompt,
                ";".join(p.classes),
                ";".join(p.words),
                ";".join(f"{start}:{end}" for start, end in p.spans),
                ";".join(p.relations),
                ";".join(map(str, p.depths)),
                p.negative,
                p.seed,
            )
            writer.writerow(row)


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """Read prompts.csv as `write_prompts` writes it. Raises DiffsegError for another file."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise DiffsegError(f"{path} is no prompts.csv: its columns must be {', '.join(_COLUMNS)}.")
        return [
            Prompt(
                index=int(row["index"]),
                prompt=row["prompt"],
                classes=tuple(row["classes"].split(";")),
                words=tuple(row["words"].split(";")),
                spans=tuple(tuple(map(int, span.split(":"))) for span in row["spans"].split(";")),
                relations=tuple(row["relations"].split(";")),
                depths=tuple(map(int, row["depths"].split(";"))),
                negative=row["negative"],
                seed=int(row["seed"]),
            )
            for row in reader
        ]
