"""Which synsets of WordNet a benchmark's words come from, and how many words are kept and dropped.

python -m diffseg.experiments.synsets voc --csv results/tables/voc_synsets.csv    print and write the table
"""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from diffseg.files import write_text
from diffseg.words import Word, load_words


def synset_table(words: Sequence[Word]) -> list[dict[str, str | int]]:
    """Return one row a class: its synsets, how many words are kept and dropped, and the commonest reasons.

    A row of the word table that stands for a dropped branch of WordNet counts with all its words; the
    compounds that are only there to read captions ("hot dog") do not count. The last row is the sum.
    """
    table = []
    for plain in (word for word in words if word.relation == "plain"):
        rows = [word for word in words if word.class_name == plain.class_name and word.relation != "other"]
        reasons: Counter[str] = Counter()
        for row in rows:
            if not row.keep:
                more = re.search(r"\(and (\d+) more of its branch\)", row.reason)
                reasons[re.sub(r" \(.*", "", row.reason)] += 1 + int(more[1] if more else 0)
        kept = Counter(row.relation for row in rows if row.keep)
        tops = dict.fromkeys(row.synset for row in rows if row.synset and row.depth == 0)
        table.append({
            "class": plain.class_name,
            "word": plain.word,
            "synsets": "; ".join(tops),
            "kept": kept.total(),
            "synonyms": kept["synonym"],
            "hyponyms": kept["hyponym"],
            "dropped": reasons.total(),
            "commonest_reasons": "; ".join(
                f"{reason} {count}" for reason, count in sorted(reasons.items(), key=lambda r: (-r[1], r[0]))[:3]
            ),
        })  # fmt: skip
    sums = {name: sum(row[name] for row in table) for name in ("kept", "synonyms", "hyponyms", "dropped")}
    return [*table, {"class": "all", "word": "", "synsets": "", **sums, "commonest_reasons": ""}]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print which synsets a benchmark's words come from.")
    parser.add_argument("benchmark", help="voc, imagenet-s-50, imagenet-s-300, imagenet-s-919 or cityscapes")
    parser.add_argument("--csv", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    table = synset_table(load_words(options.benchmark))
    lines = [list(table[0]), ["---"] * len(table[0]), *(row.values() for row in table)]
    print("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))
    if options.csv:
        write_text(options.csv, pd.DataFrame(table).to_csv(index=False))


if __name__ == "__main__":
    main()
