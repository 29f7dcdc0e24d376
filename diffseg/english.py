"""Articles and plurals, as far as names of things need them."""

import re

_IRREGULAR = {
    "person": "people", "child": "children", "grandchild": "grandchildren", "goose": "geese", "ox": "oxen",
    "mouse": "mice", "foot": "feet", "tooth": "teeth", "calf": "calves", "wolf": "wolves", "knife": "knives",
    "loaf": "loaves", "leaf": "leaves", "shelf": "shelves", "housewife": "housewives", "midwife": "midwives",
    "scarf": "scarves", "buffalo": "buffaloes", "mosquito": "mosquitoes",
}  # fmt: skip
_SAME_IN_PLURAL = (
    "sheep",
    "fish",
    "aircraft",
    "cattle",
    "deer",
    "bison",
    "moose",
    "grouse",
    "swine",
    "people",
)
_MAN_BUT_NOT_MEN = ("human", "german", "roman", "ottoman", "talisman", "caiman")
_S_BUT_SINGULAR = ("ss", "us", "is", "os", "as", "lens", "flandres", "series", "species")


def with_article(word: str) -> str:
    """Return "an owl", "a unicycle", "an hourglass", "an SUV"; plurals and "cattle" get no article."""
    last = word.split()[-1].lower()
    if last in ("cattle", "people") or (last.endswith("s") and not last.endswith(_S_BUT_SINGULAR)):
        return word
    first = re.split(r"[ '’-]", word)[0]
    if len(first) > 1 and first.isupper() or len(first) == 1:  # letters that are spelled out
        vowel = first[0] in "AEFHILMNORSXaefhilmnorsx"
    else:
        sounds_like_you = re.match(r"(uni(?!n)|use|usu|ut[ei]|uku|ura|uri|eu|ewe|one$|once)", first.lower())
        vowel = first[0].lower() in "aeiouáàâäåéèêëíïóöøúü" and not sounds_like_you
        vowel = vowel or bool(re.match(r"(hour|heir|honest|honou?r)", first.lower()))
    return f"{'an' if vowel else 'a'} {word}"


def plural(word: str) -> str:
    """Return the plural of a noun or compound: "dining tables", "geese", "policemen", "sheep"."""
    head, last = word[: word.rfind(" ") + 1], word[word.rfind(" ") + 1 :]
    low = last.lower()
    if low in _IRREGULAR:
        return head + last[0] + _IRREGULAR[low][1:]
    if low.endswith(_SAME_IN_PLURAL) or (low.endswith("s") and not low.endswith(_S_BUT_SINGULAR)):
        return word
    if low.endswith("man") and not low.endswith(_MAN_BUT_NOT_MEN):
        return word[:-2] + "en"
    if re.search(r"[^aeiou]y$", low):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", low) else "s")
