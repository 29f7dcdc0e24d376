"""The words that stand for a class: the plain word, its synonyms and its hyponyms, each kept or dropped for a
reason.

For the three benchmarks they come from curated tables in `diffseg/data` (made by
`diffseg.experiments.build_words`); for a list of one's own they are read from WordNet with the same rules, but no
hand has gone over them.
"""

import csv
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

from diffseg.errors import DiffsegError
from diffseg.files import atomic_path

DATA = Path(__file__).parent / "data"
NO_SYNSET = "none"  # in a class list: this class has its plain word only, WordNet is not asked
_COLUMNS = ("class", "synset", "word", "relation", "depth", "keep", "reason", "frequency", "parent")

TWO_CLASSES = "contains a word of the class"  # the reason why "guard dog" is dropped: it may draw a guard

nfc = partial(unicodedata.normalize, "NFC")  # "é" is one character, however it was typed

# inflect takes every noun for a singular one, and gets some of the tables' wrong.
_SAME = "aurochs|bison|caerulescens|cerastes|flandres|grouse|migrans|pyrenees|series|species|triceratops"
_PLURAL = re.compile(
    rf"(?!.*(?:{_SAME}|lens)$).*(?:[^aious]s|cattle|khakis|levis|pajamas|people|pyjamas)", re.IGNORECASE
)
_PLURALS = {  # of two that fit the later one counts
    "(.*[^aeiou]o)": "$1s",
    "(.*(?:buffal|ding|her|mang|mosquit|potat|tomat|torped)o)": "$1es",
    "(.*(?:[ao]s|egis|indris|pavis|spiralis|tabis|tennis|kuvasz|tz))": "$1es",
    "(.*gentlem)an": "$1en",
    "(.*(?:doberm|pullm)an)": "$1s",
    f"(.*(?:{_SAME}))": "$1",
    "eau( .*)": "eaux$1",
    "(.*-(?:for|of|on|to)-.*)": "$1s",
    "hen(-of-.*)": "hens$1",
    "old-man(-of-.*)": "old-men$1",
}


@cache
def _english():
    """Return inflect's engine with the additions above."""
    import inflect  # here: its decorators take two seconds, and most readers of this module inflect nothing

    engine = inflect.engine()
    engine.defan("SUV.*")
    for singular, plural in _PLURALS.items():
        engine.defnoun(singular, plural)
    return engine


@dataclass(frozen=True)
class Word:
    """One row of a word table.

    class_name: the benchmark's name of the class. synset: WordNet's name such as "poodle.n.01", or "".
    relation: "plain" (the word that stands for the class when nothing is replaced), "synonym", "hyponym", or
    "other": a compound that contains a class's word and means another thing ("hot dog"), never kept and only
    used to read captions. depth: steps below the class's synset, 0 for plain and synonyms. reason: why it is
    dropped, or why a hand kept it. frequency: how often WordNet's sense-tagged texts use the word in this
    sense (0 for most words). parent: the synset above, "" for the class's own and for words added by hand.
    class_name and word are in Unicode's composed form (NFC).
    """

    class_name: str
    synset: str
    word: str
    relation: str
    depth: int = 0
    keep: bool = True
    reason: str = ""
    frequency: int = 0
    parent: str = ""

    def __post_init__(self):
        for name in ("class_name", "word"):
            object.__setattr__(self, name, nfc(getattr(self, name)))


@cache
def with_article(word: str) -> str:
    """Return "an owl", "a unicycle", "an hourglass", "an SUV"; a plural and "cattle" get no article."""
    head = re.split("[ -]of[ -]", word)[0]
    spelled = unicodedata.normalize("NFD", word)  # inflect hears "école" by its first letter
    return word if _PLURAL.fullmatch(head) else f"{_english().a(spelled).split()[0]} {word}"


@cache
def plural(word: str) -> str:
    """Return the plural of a noun or compound: "dining tables", "geese", "SUVs", "birds of prey", "sunglasses"."""
    if _PLURAL.fullmatch(re.split("[ -]of[ -]", word)[0]):
        return word
    return _english().plural_noun(word) if word[-1:].islower() else word + "s"


def load_words(benchmark: str) -> list[Word]:
    """Return the table of "voc", "imagenet-s-50", "imagenet-s-300", "imagenet-s-919", "cityscapes" or
    "mini-imagenet-s".

    Rows stand in the order of the benchmark's classes, of which Cityscapes has its eight things here. The
    classes of ImageNet-S are called by their tags (n01443537). Raises DiffsegError for another name.
    """
    benchmark = benchmark.removesuffix("-things")  # Cityscapes' table holds its things only
    size = re.fullmatch(r"imagenet-s-(50|300|919)", benchmark)
    if not size and benchmark not in ("voc", "cityscapes", "mini-imagenet-s"):
        raise DiffsegError(
            f"No word table for the benchmark {benchmark!r}: choose voc, imagenet-s-50, imagenet-s-300, "
            "imagenet-s-919, cityscapes or mini-imagenet-s, or give a class list of your own."
        )
    if not size:
        return read_words(DATA / f"words_{benchmark}.csv")
    tags = set((DATA / f"imagenet_s_{size[1]}.txt").read_text("utf-8").split())
    return [word for word in read_words(DATA / "words_imagenet_s.csv") if word.class_name in tags]


def read_words(path: str | os.PathLike) -> list[Word]:
    """Read a word table (CSV, UTF-8) as `write_words` writes it."""
    with open(path, encoding="utf-8", newline="") as file:
        return [
            Word(row["class"], row["synset"], row["word"], row["relation"], int(row["depth"]),
                 row["keep"] == "yes", row["reason"], int(row["frequency"]), row["parent"])
            for row in csv.DictReader(file)
        ]  # fmt: skip


def write_words(path: str | os.PathLike, words: Iterable[Word]) -> None:
    """Write a word table as CSV, UTF-8, one row a word; `keep` is yes or no."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for word in words:
            writer.writerow(
                "yes" if value is True else "no" if value is False else value for value in asdict(word).values()
            )


def load_class_list(class_list: Sequence[str]) -> list[Word]:
    """Return the word table of one's own classes, read from WordNet where a class has a synset there.

    class_list: an entry a class, "fox", "fox, red_fox.n.01" or "fox, none". Without a synset WordNet's first
    noun sense is taken; `none` keeps the plain word alone and needs no WordNet. Raises DiffsegError for an
    empty list, a duplicate, a word that has no synset, and missing WordNet data.
    """
    pairs = _read_entries(class_list)
    asked = {word: (word, [synset] if synset else []) for word, synset in pairs if synset != NO_SYNSET}
    found = wordnet_words(asked) if asked else []
    plain = [Word(word, "", word, "plain") for word, synset in pairs if synset == NO_SYNSET]
    return drop_shared([row for word, _ in pairs for row in found + plain if row.class_name == word])


def class_names(class_list: Sequence[str]) -> tuple[str, ...]:
    """Return the classes of one's own list in its order, without asking WordNet; errors as `load_class_list`."""
    return tuple(word for word, _ in _read_entries(class_list))


def _read_entries(class_list: Sequence[str]) -> list[tuple[str, str]]:
    """Return (word, synset or "") of the entries; the last comma separates, so that a word may hold commas."""
    pairs = []
    for entry in (nfc(str(entry)) for entry in class_list):
        word, _, synset = entry.rpartition(",") if "," in entry else (entry, "", "")
        pairs.append((" ".join(word.split()), synset.strip()))
    if not pairs:
        raise DiffsegError("The class list is empty: write one entry a class, such as 'fox' or 'fox, none'.")
    counts = Counter(word.lower() for word, _ in pairs)
    for word, _ in pairs:
        why = (
            "is empty" if not word
            else "has no letter or digit" if not any(map(str.isalnum, word))
            else "holds a semicolon, which separates the classes in prompts.csv" if ";" in word
            else "stands for what no class covers" if word.lower() == "background"
            else "is there twice" if counts[word.lower()] > 1
            else ""
        )  # fmt: skip
        if why:
            raise DiffsegError(f"The class {word!r} of the class list {why}: give every class a word of its own.")
    return pairs


def open_wordnet():
    """Return NLTK's WordNet reader. Raises DiffsegError when NLTK or its WordNet data is missing."""
    try:
        from nltk.corpus import wordnet
    except ImportError as error:
        raise DiffsegError(
            "WordNet is read by NLTK, which is not installed: pip install 'diffseg[wordnet]', or write "
            "'none' behind the classes of your list to use their plain words."
        ) from error
    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError) as error:
        raise DiffsegError(
            "NLTK has no WordNet data: run `python -m nltk.downloader wordnet` once (needs the internet), or "
            "write 'none' behind the classes of your list to use their plain words."
        ) from error
    return wordnet


def wordnet_words(classes: Mapping[str, tuple[str, Sequence[str]]]) -> list[Word]:
    """Return all synonyms and hyponyms of the classes, with automatic reasons for those that are dropped.

    classes: class name -> (plain word, synset names); no synset name means the word's first noun sense. The
    rules (our choice): a word is dropped when it is a Latin name, no ordinary word, below another class of
    the list, or when the first (commonest) sense of it lies outside its class: "boxer" draws a man. Words
    that WordNet itself marks as slurs or obscene do not even get a row.
    """
    wordnet = open_wordnet()
    trees = {name: _tree(wordnet, plain, synsets) for name, (plain, synsets) in classes.items()}
    roots = {synset: name for name, tree in trees.items() for synset, (depth, _) in tree.items() if depth == 0}
    words = []
    for name, (plain, _) in classes.items():
        tree = trees[name]
        # what hangs below another class's synset is that class's: a rider is not drawn for the class person
        others = {
            synset: roots[root] for root in tree if roots.get(root, name) != name for synset in trees[roots[root]]
        }
        root = next(iter(tree))
        count = sum(lemma.count() for lemma in root.lemmas() if _spoken(lemma.name()) == plain)
        words.append(Word(name, root.name(), plain, "plain", frequency=count))
        seen = {plain.lower()}
        for synset, (depth, parent) in tree.items():
            for lemma in synset.lemmas():
                word = _spoken(lemma.name())
                if word.lower() in seen or _offensive(lemma):
                    continue
                seen.add(word.lower())
                first = wordnet.synsets(lemma.name(), "n")[0]
                if is_latin(wordnet, lemma.name()):
                    reason = "Latin name"
                elif not re.fullmatch(r"[^\W\d_]+(?:[ '’-][^\W\d_]+)*", word.replace("'s ", " ")):
                    reason = "no ordinary word"
                elif synset in others:
                    reason = f"belongs to the class {others[synset]}"
                elif first not in tree and not _same_animal(first, synset):
                    reason = f"first sense is another thing ({first.lexname().split('.')[1]})"
                else:
                    reason = ""
                relation = "hyponym" if depth else "synonym"
                row = Word(name, synset.name(), word, relation, depth, not reason, reason, lemma.count(), parent)
                words.append(row)
    return words


def _tree(wordnet, plain: str, names: Sequence[str]) -> dict:
    """Return every synset at or below the named ones -> (smallest depth, parent's name), breadth first."""
    senses = wordnet.synsets(plain.replace(" ", "_"), "n")
    if not names and not senses:
        raise DiffsegError(
            f"WordNet has no noun {plain!r}: write a synset behind it, such as '{plain}, fox.n.01', or "
            f"'{plain}, {NO_SYNSET}' to use the plain word alone."
        )
    from nltk.corpus.reader.wordnet import WordNetError

    try:
        roots = [wordnet.synset(name) for name in names] or senses[:1]
        if any(root.pos() != "n" for root in roots):
            raise ValueError("no noun")
    except (WordNetError, ValueError) as error:
        raise DiffsegError(
            f"WordNet has no noun synset {', '.join(names)!r} for the class {plain!r}: write one of "
            f"{', '.join(s.name() for s in senses) or 'its synsets (form: fox.n.01)'}, or '{NO_SYNSET}'."
        ) from error
    tree = dict.fromkeys(roots, (0, ""))
    queue = list(roots)
    for synset in queue:  # grows while it is read: breadth first
        children = sorted(synset.hyponyms(), key=lambda s: s.offset())  # NLTK's order changes from run to run
        for child in children:
            if child not in tree:
                tree[child] = (tree[synset][0] + 1, synset.name())
                queue.append(child)
    return tree


def is_latin(wordnet, lemma: str) -> bool:
    """Return whether a lemma is a species' or larger group's Latin name: "Felis_catus", "Accipitriformes"."""
    genus = lemma.split("_")[0]
    known = any(wordnet.synsets(f"{rank}_{genus}", "n") for rank in ("genus", "family", "order"))
    return lemma[0].isupper() and known


def _same_animal(a, b) -> bool:
    """Return whether two senses are close kinds: WordNet lists some animals twice (tarantula, robin)."""
    common = a.lowest_common_hypernyms(b) if a.lexname() == b.lexname() == "noun.animal" else []
    return any(synset.min_depth() >= 9 for synset in common)  # mammal, bird, insect stand 9 below entity


def _offensive(lemma) -> bool:
    usage = {domain.name() for domain in lemma.synset().usage_domains() + lemma.usage_domains()}
    marked = re.search(r"offensive|slur|derogatory|disparag|obscen|vulgar|contempt|insult", lemma.synset().definition())
    return bool(marked or usage & {"ethnic_slur.n.01", "disparagement.n.01", "obscenity.n.02", "vulgarism.n.01"})


def _spoken(lemma: str) -> str:
    return lemma.replace("_", " ")


def drop_shared(words: Sequence[Word]) -> list[Word]:
    """Drop every kept word that two classes share, whatever its hyphens; a class keeps its own plain word."""

    def letters(row: Word) -> str:
        return re.sub(r"[\W_]+", " ", row.word.lower().replace("'", ""))

    plain = {(letters(row), row.class_name) for row in words if row.relation == "plain"}
    owners: dict[str, set[str]] = {}
    for row in words:
        if row.keep:
            owners.setdefault(letters(row), set()).add(row.class_name)
    result = []
    for row in words:
        others = owners.get(letters(row), set()) - {row.class_name}
        mine = (letters(row), row.class_name) in plain
        if row.keep and others and not mine:
            row = replace(row, keep=False, reason=f"also a word of the class {', '.join(sorted(others))}")
        result.append(row)
    return result


def known_words(words: Iterable[str], tokenizer) -> set[str]:
    """Return those of `words` that a generator with this transformers tokenizer can draw, as far as it says.

    Its tokenizer must know every token (none is its unknown one). A byte-level vocabulary such as Stable
    Diffusion's knows every word; a small one may not. A tokenizer_config.json may also list the `phrases` of the
    captions that the generator learnt from: then a compound must be one of them, for knowing "racing" and
    "boat" is not knowing a racing boat.
    """
    words = list(words)
    if not words:
        return set()
    tokens = tokenizer(list(map(nfc, words)), add_special_tokens=False, verbose=False)["input_ids"]
    known = {word for word, ids in zip(words, tokens, strict=True) if ids and tokenizer.unk_token_id not in ids}
    phrases = tokenizer.init_kwargs.get("phrases")
    if phrases is None:
        return known
    phrases = set(map(nfc, phrases))
    return {word for word in known if " " not in word or nfc(word) in phrases}


def select_words(
    words: Sequence[Word],
    tokenizer=None,
    hyponym_depth: int | None = None,
    minimum_frequency: int = 0,
) -> list[Word]:
    """Return the table with more words dropped: unknown to the generator, too deep below the class, too rare.

    tokenizer: the generator's (None: every word is known). hyponym_depth: largest depth kept; 0 leaves
    synonyms only. minimum_frequency: smallest WordNet frequency of a synonym or hyponym. Plain words always
    stay; raises DiffsegError when the generator does not know one, because the class could then not be drawn
    at all.
    """
    known = known_words({row.word for row in words}, tokenizer) if tokenizer else {row.word for row in words}
    missing = [row.word for row in words if row.relation == "plain" and row.word not in known]
    if missing:
        some = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DiffsegError(
            f"The generator does not know the class word {some}, by its tokenizer: choose one that knows every word, "
            "such as generator=stabilityai/sdxl-turbo (`diffseg run own-words-sdxl`), or words that this one knows."
        )
    result = []
    for row in words:
        reason = ""
        if row.word not in known:
            reason = "unknown to the generator's tokenizer or captions"
        elif hyponym_depth is not None and row.depth > hyponym_depth:
            reason = f"deeper than hyponym_depth = {hyponym_depth}"
        elif row.frequency < minimum_frequency and row.relation != "plain":
            reason = f"rarer than minimum_frequency = {minimum_frequency}"
        result.append(replace(row, keep=False, reason=reason) if row.keep and reason else row)
    return result
