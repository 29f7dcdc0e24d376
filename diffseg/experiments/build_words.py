"""Make the word tables words_*.csv from WordNet 3.0 and the hand-written rules in diffseg/data.

    python -m diffseg.experiments.build_words  # WordNet from NLTK (python -m nltk.downloader wordnet)
    python -m diffseg.experiments.build_words --wordnet /usr/share/wordnet  # its own files (Debian: wordnet-base)

It needs NLTK (pip install 'diffseg[wordnet]'). WordNet's licence is in LICENSE-wordnet.txt.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import yaml

from diffseg.words import TWO_CLASSES, Word, drop_shared, is_latin, open_wordnet, wordnet_words, write_words

# Tags that ImageNet-S-919 merges into another (its data preparation): their words are that class's too.
MERGED = {
    "n04355933": "n04356056", "n02808440": "n04493381", "n03832673": "n03642806", "n03773504": "n04008634",
    "n15075141": "n03887697",
}  # fmt: skip
HERE = Path(__file__).parents[1] / "data"
BY_HAND = "added by hand"
KEPT = "kept by hand"
SENSES = ("everyday sense is another thing", "not in use in captions")  # reasons that hold in every benchmark
_LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body "
    "noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location "
    "noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process "
    "noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change "
    "verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation "
    "verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather "
    "adj.ppl"
)


def install_wordnet(source: str | Path, nltk_data: str | Path) -> None:
    """Copy WordNet's own dictionary files to where NLTK looks, with two files that NLTK wants beside them.

    The caller adds `nltk_data` to nltk.data.path. index.sense stays empty: sense keys are never looked up.
    """
    folder = Path(nltk_data) / "corpora" / "wordnet"
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("data.*", "index.*", "*.exc", "cntlist.rev"):
        for file in sorted(Path(source).glob(pattern)):
            shutil.copyfile(file, folder / file.name)
    part = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
    rows = (f"{i:02d}\t{name}\t{part[name.split('.')[0]]}\n" for i, name in enumerate(_LEXNAMES.split()))
    (folder / "lexnames").write_text("".join(rows))
    if not (folder / "index.sense").exists():
        (folder / "index.sense").write_text("")


def curated(rules: dict[str, dict], against: dict[str, list[str]]) -> list[Word]:
    """Return the table of a benchmark: what WordNet lists below the classes, corrected by the rules."""
    asked = {name: (rule["word"], rule["synsets"]) for name, rule in rules.items() if rule.get("synsets")}
    found = wordnet_words(asked)
    table = []
    for name, rule in rules.items():
        rows = [row for row in found if row.class_name == name] or [Word(name, "", rule["word"], "plain")]
        table += curated_class(rows, rule, against.get(name, []))
    return drop_compounds(drop_shared(table))


def drop_compounds(table: list[Word]) -> list[Word]:
    """Drop kept compounds that contain a word of another class: "guard dog" may draw a guard too."""
    owner = {row.word.lower(): row.class_name for row in table if row.keep}
    result = []
    for row in table:
        parts = row.word.lower().replace("-", " ").split()
        runs = [" ".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
        others = sorted({owner[run] for run in runs if run in owner} - {row.class_name})
        if row.keep and others and row.relation != "plain" and not row.reason.startswith((KEPT, BY_HAND)):
            row = replace(row, keep=False, reason=f"{TWO_CLASSES} {', '.join(others)}")
        result.append(row)
    return result


def curated_class(rows: list[Word], rule: dict, against: list[str]) -> list[Word]:
    """Apply one class's rules; raise when a rule names a word that is not there, so that none goes stale."""
    name = rows[0].class_name
    drops = {word.lower(): reason for reason, words in rule.get("drop", {}).items() for word in words}
    keeps = {word.lower(): reason for reason, words in rule.get("keep", {}).items() for word in words}
    only = {word.lower() for word in rule.get("only", [])}
    below = below_synsets(rule.get("below", {}))
    present = {row.word.lower() for row in rows}
    by_hand = {word.lower() for word in rule.get("hyponyms", []) + rule.get("synonyms", [])}
    for word in sorted((set(drops) | set(keeps) | only) - present - by_hand):
        print(f"{name}: a rule names {word!r}, which WordNet does not list here", file=sys.stderr)
    result = []
    for row in rows:
        word = row.word.lower()
        if row.relation == "plain":
            pass
        elif word in drops:
            row = replace(row, keep=False, reason=drops[word])
        elif word in keeps:
            row = replace(row, keep=True, reason=f"{KEPT}: {keeps[word]}")
        elif row.keep and row.synset in below:
            row = replace(row, keep=False, reason=below[row.synset])
        elif row.keep and only and row.relation == "hyponym" and word not in only:
            row = replace(row, keep=False, reason="not on the hand-picked list")
        if word in by_hand and not row.keep:
            continue  # replaced by the row added by hand
        result.append(row)
    have = {row.word.lower() for row in result}
    for relation, depth in (("synonym", 0), ("hyponym", 1)):
        for word in rule.get(f"{relation}s", []):
            if word.lower() not in have:
                result.append(Word(name, "", word, relation, depth, True, BY_HAND))
    for word in against:
        reason = "kept against VOC's guidelines: its image is close to the class's"
        result = [row for row in result if row.word != word] + [
            next((replace(row, keep=True, reason=reason) for row in result if row.word == word),
                 Word(name, "", word, "hyponym", 1, True, f"{BY_HAND}; {reason}"))
        ]  # fmt: skip
    if only:
        result = merge_dropped_branches(result)
    return result + [Word(name, "", word, "other", 0, False, "means another thing") for word in rule.get("other", [])]


def below_synsets(below: dict[str, str]) -> dict[str, str]:
    """Return every synset name at or below the named ones -> reason."""
    wordnet = open_wordnet()
    result = {}
    for name, reason in below.items():
        top = wordnet.synset(name)
        for synset in [top, *top.closure(lambda s: s.hyponyms())]:
            result[synset.name()] = reason
    return result


def merge_dropped_branches(rows: list[Word]) -> list[Word]:
    """Write a branch of WordNet that holds no kept word as one row that says how many words it stands for.

    person has 11,000 words below it; listing each would say nothing more.
    """
    wordnet = open_wordnet()
    per_synset = Counter(row.synset for row in rows)
    alive = {row.synset for row in rows if row.keep}
    merged: dict[str, int] = {}  # top of a dead branch -> words in it
    inside: set[str] = set()
    for row in rows:  # breadth first: parents come before children
        if not row.synset or row.synset in inside or row.synset in merged:
            continue
        branch = {row.synset, *(s.name() for s in wordnet.synset(row.synset).closure(lambda s: s.hyponyms()))}
        if not branch & alive:
            merged[row.synset] = sum(per_synset[name] for name in branch - inside - set(merged))
            inside |= branch - {row.synset}
    result, written = [], set()
    for row in rows:
        if row.synset in merged and row.synset not in inside:
            if row.synset not in written:
                written.add(row.synset)
                more = merged[row.synset] - 1
                result.append(replace(row, reason=row.reason + (f" (and {more} more of its branch)" if more else "")))
        elif row.synset not in inside or row.keep:
            result.append(row)
    return result


def imagenet_s(rules: dict[str, dict[str, list[str]]], reviewed: list[Word]) -> list[Word]:
    """Return the table of ImageNet-S: a class is a tag, a tag is n + the offset of a noun synset in WordNet 3.0.

    rules: reason -> tag -> words that are dropped. reviewed: rows of other benchmarks; what was dropped there for one
    of SENSES is dropped here in the same sense, but for plain words.
    """
    wordnet = open_wordnet()
    plain = yaml.safe_load((HERE / "imagenet_s_words.yaml").read_text("utf-8"))
    tags = (HERE / "imagenet_s_919.txt").read_text("utf-8").split()
    synset_of = {tag: wordnet.synset_from_pos_and_offset("n", int(tag[1:])) for tag in [*tags, *MERGED.values()]}
    for tag in plain:
        if tag not in synset_of:
            raise SystemExit(f"imagenet_s_words.yaml: {tag} is no tag of ImageNet-S")
    for tag in tags:
        synset = synset_of[tag]
        tree = {synset, *synset.closure(lambda s: s.hyponyms())}
        names = [name for name in synset.lemma_names() if not is_latin(wordnet, name)] or synset.lemma_names()
        clear = [name for name in names if wordnet.synsets(name, "n")[0] in tree]
        plain.setdefault(tag, (clear or names)[0].replace("_", " "))
    for word, count in Counter(plain.values()).items():
        if count > 1:
            raise SystemExit(f"imagenet_s_words.yaml: {count} classes have the plain word {word!r}")
    merged = {tag: [synset_of[t].name() for t in (tag, MERGED.get(tag)) if t] for tag in tags}
    table = wordnet_words({tag: (plain[tag], merged[tag]) for tag in tags})
    drops = {(tag, word.lower()): why for why, of in rules.items() for tag, words in of.items() for word in words}
    for tag, word in sorted(drops.keys() - {(row.class_name, row.word.lower()) for row in table if row.keep}):
        print(f"imagenet_s: a rule names {word!r} of {tag}, which is not kept", file=sys.stderr)
    senses = {(row.synset, row.word.lower()): row.reason for row in reviewed if row.reason in SENSES}
    result = []
    for row in table:
        why = drops.get((row.class_name, row.word.lower())) or senses.get((row.synset, row.word.lower()))
        result.append(replace(row, keep=False, reason=why) if why and row.keep and row.relation != "plain" else row)
    return drop_shared(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", help="folder of WordNet 3.0's own files; without it NLTK's copy is read")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.wordnet:
            import nltk

            install_wordnet(arguments.wordnet, folder)
            nltk.data.path.insert(0, folder)
        if open_wordnet().get_version() != "3.0":
            raise SystemExit("ImageNet's tags are offsets of WordNet 3.0: this is another version.")
        rules = yaml.safe_load((HERE / "curation.yaml").read_text("utf-8"))
        voc, against = rules["voc"], rules["against_guidelines"]
        cityscapes = {name: {**voc.get(rule.get("like"), {}), **rule} for name, rule in rules["cityscapes"].items()}
        tables = {"voc": curated(voc, against), "cityscapes": curated(cityscapes, {})}
        tables["imagenet_s"] = imagenet_s(rules["imagenet_s"], [*tables["voc"], *tables["cityscapes"]])
    for name, table in tables.items():
        write_words(HERE / f"words_{name}.csv", table)
        kept = sum(row.keep for row in table)
        print(f"words_{name}.csv: {kept} words kept, {len(table) - kept} rows dropped")


if __name__ == "__main__":
    main()
