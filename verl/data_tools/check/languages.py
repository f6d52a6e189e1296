"""Which language texts are in, by their script and, where many share it, by py3langid if that is installed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

# Letters that a character stands for: a Chinese word has two, a Latin one about six.
_WEIGHTS = {"CJK": 3, "HIRAGANA": 2, "KATAKANA": 2, "HANGUL": 2}
_KANA = ("HIRAGANA", "KATAKANA")
_NAMES = {"CJK": "Chinese", "HANGUL": "Korean", "GREEK": "Greek", "HEBREW": "Hebrew", "THAI": "Thai"}
# Of Chinese characters and kana together, from which on a text is Japanese.
_KANA_SHARE = 0.05
_SHARED = ("LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI")
# Fewer letters say too little of the language, and fewer yet of the script.
_LETTERS_OF_LANGUAGE, _LETTERS_OF_SCRIPT = 60, 12
_SURE = 0.9
# What ISO 639 calls text of no language, and of none that is known.
_NO_LANGUAGE = ("zxx", "und")
_CODE = re.compile(r"(```|~~~).*?(?:\1|\Z)|`[^`\n]*`|https?://\S+|<[^>\n]{1,80}>|\$\$.*?\$\$", re.DOTALL)
# Enough to tell.
_LOOKED_AT = 2000


class Language(NamedTuple):
    """A text's script and, if it is known, its language."""

    script: str
    language: str | None = None

    def __str__(self) -> str:
        return self.language or self.script

    def differs(self, other: Language) -> bool:
        """Whether they are certainly not the same."""
        if NONE in (self, other):
            return False
        return self.script != other.script or bool(self.language and other.language and self.language != other.language)


NONE = Language("no words")


def language_of(text: str) -> Language:
    """The language of most of a text's letters, code and addresses aside; NONE where there are too few."""
    text = _CODE.sub(" ", text[:_LOOKED_AT])
    counts: Counter[str] = Counter()
    for character in text:
        script = _script(character)
        if script:
            counts[script] += _WEIGHTS.get(script, 1)
    kana = sum(counts[name] for name in _KANA)
    if counts.total() < _LETTERS_OF_SCRIPT:
        return NONE
    if kana and kana > _KANA_SHARE * (kana + counts["CJK"]) and kana + counts["CJK"] > counts.total() / 2:
        return Language("Japanese")
    ((script, count),) = counts.most_common(1)
    name = _NAMES.get(script, f"{script.capitalize()} letters")
    identify = identifier() if script in _SHARED and count >= _LETTERS_OF_LANGUAGE else None
    return Language(name, identify(text) if identify else None)


@lru_cache(maxsize=65536)
def _script(character: str) -> str | None:
    """The first word of a letter's name, which is its script."""
    return unicodedata.name(character, "").split(" ")[0].split("-")[0] or None if character.isalpha() else None


@cache
def identifier() -> Callable[[str], str | None] | None:
    """What tells the language of a text (its ISO 639-1 code) or None, if py3langid is installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def identify(text: str) -> str | None:
        language, probability = model.classify(text)
        return language if probability >= _SURE and language not in _NO_LANGUAGE else None

    return identify
