"""Chinese, English or another language, by script and by function words. Knows no file and no row.

Good for keeping foreign rows out of a Chinese and English set, no more: it names no third language.
"""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["DetectedLanguage", "language_of"]

DetectedLanguage = Literal["zh", "en", "other"]

_LOOKED_AT = 2000
_HAN = re.compile(r"[\u3400-\u9fff]")
# kana, Hangul, Cyrillic, Greek, Arabic, Hebrew, Devanagari, Thai
_FOREIGN = re.compile(r"[\u3040-\u30ff\uac00-\ud7af\u0400-\u04ff\u0370-\u03ff\u0600-\u06ff\u0590-\u05ff\u0900-\u097f\u0e00-\u0e7f]")
_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_ENGLISH = frozenset(
    """the be to of and a in that have i it for not on with he as you do at this but his by from they we say her she or an will my one all
    would there their what so up out if about who get which go me when make can like no just him know take into your some could them see
    other than then now only its also after use how our is are was were has had been am did does please""".split()  # noqa: SIM905
)
_OTHER_LATIN = frozenset(
    """der das und ist nicht ich sie mit auf eine einen wie für von zu mein meine kann le la les est et une un je vous nous pas que qui dans
    avec mon ma mes el los las de del es una y por para mis cuando se il lo gli che di non sono mio della os uma não seu minha het een niet
    ik mijn waar""".split()  # noqa: SIM905
)


def language_of(text: str) -> DetectedLanguage:
    """The language of the first 2000 characters. Text without letters counts as English: figures are read by every model."""
    text = text[:_LOOKED_AT]
    words = _WORD.findall(text)
    if text.isascii():
        return _latin(words)
    num_han, num_foreign = len(_HAN.findall(text)), len(_FOREIGN.findall(text))
    if num_foreign > 0.1 * num_han and num_foreign > len(words):
        return "other"
    if num_han > len(words):
        return "zh"
    return _latin(words)


def _latin(words: list[str]) -> DetectedLanguage:
    """Function words decide; fewer than two of another language's are a name or a quotation."""
    lower = [word.lower() for word in words]
    num_other = sum(word in _OTHER_LATIN or not word.isascii() for word in lower)
    if num_other < 2:
        return "en"
    return "other" if num_other > sum(word in _ENGLISH for word in lower) else "en"
