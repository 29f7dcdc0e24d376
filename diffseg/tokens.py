"""From a word of the prompt to its tokens, and to the keys that attention reads them by.

A tokenizer may split a word. A generator may have several text encoders, lower the prompt, or write something before it
(`diffseg.families`).
"""

from collections.abc import Sequence

from diffseg.errors import DiffsegError
from diffseg.families import before_prompt, family_of, key_ranges


def token_positions(
    tokenizer, prompt: str, spans: Sequence[tuple[int, int]], longest: int | None = None, prefix: str = ""
) -> list[list[int]]:
    """Return, for each character span of `prompt`, the positions of its tokens in the padded sequence.

    A compound ("potted plant") or a word that is split has several positions; of a word that occurs twice,
    the span says which. longest: tokens that the text encoder reads, start and end marks among them (None: the
    tokenizer's own number). prefix: what is written before the prompt. Raises a DiffsegError when a span holds no
    word, or a word is unknown to the tokenizer, or reaches beyond the longest sequence.
    """
    encoded = tokenizer(prefix + prompt, return_offsets_mapping=True, verbose=False)
    offsets, ids, longest = encoded["offset_mapping"], encoded["input_ids"], longest or tokenizer.model_max_length
    positions = []
    for start, stop in spans:
        word, first, last = prompt[start:stop], start + len(prefix), stop + len(prefix)
        overlaps = [(max(left, first), min(right, last)) for left, right in offsets]
        # a blank inside a compound or before a word may have a token of its own, which says nothing; T5 gives it the
        # place of the letter behind it
        found = [k for k, (left, right) in enumerate(overlaps) if (prefix + prompt)[left:right].strip()]
        found = [k for k in found if tokenizer.decode(ids[k]).strip()]
        if not found:
            raise DiffsegError(f"the span {start}:{stop} holds no word of {prompt!r}; correct the span")
        if found[-1] > longest - 2:  # the last position is the end mark's
            raise DiffsegError(
                f"the word {word!r} is cut off: the generator reads {longest} tokens of a prompt, start "
                f"and end marks among them; shorten {prompt!r}"
            )
        # CLIP uses one token for the end and for the unknown; inside a word it can only mean the latter
        if any(ids[k] == tokenizer.unk_token_id for k in found):
            raise DiffsegError(
                f"the generator's tokenizer does not know the word {word!r}; use another word or generator"
            )
        positions.append(found)
    return positions


def key_positions(pipeline, prompt: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return, for each character span of `prompt`, the keys of its tokens in all text encoders of the generator.

    Raises a DiffsegError where `token_positions` does, for any of the encoders.
    """
    prefix, dropped = before_prompt(pipeline)
    if family_of(pipeline).lower:
        blanks = len(prompt) - len(prompt.lstrip())
        prompt, spans = prompt.lower().strip(), [(start - blanks, stop - blanks) for start, stop in spans]
    words: list[list[int]] = [[] for _ in spans]
    for name, keys in key_ranges(pipeline).items():
        found = token_positions(getattr(pipeline, name), prompt, spans, len(keys) + dropped, prefix)
        for word, positions in zip(words, found, strict=True):
            word += [keys[k - dropped] for k in positions]
    return words
