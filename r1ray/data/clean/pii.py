"""Personal data in dialogues by rules, each value replaced by the same text wherever it occurs. Names only where annotated.

    id_card    18 characters of a Chinese resident identity card (GB 11643-1999): a real birth date and the right check character
    bank_card  13 to 19 digits of a bank's number range, blanks and hyphens allowed, that pass Luhn's check (ISO/IEC 7812)
    mobile     a mobile number of mainland China, with or without +86
    email      name@host.domain
    name       the values of entities that are names

A number that fails its check is left alone: it is an order number or an amount, and a model has to learn it.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from r1ray.data.prepare.config import PiiConfig
from r1ray.types import Annotations, Conversation, Message

__all__ = ["Masker", "is_bank_card", "is_id_card"]

_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"
_BANKS = re.compile(r"[3-6]|2[2-7]\d{14}$|9558|0{6}")  # 0: our own pseudonyms
_CUE = re.compile(r"@|\d(?:[ -]?\d){9}")  # nothing that is masked lacks it: most texts are left at once
_PATTERNS = {
    "email": re.compile(r"[A-Za-z0-9](?:[\w.+-]{0,63})@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])", re.ASCII),
    "id_card": re.compile(r"(?<![0-9A-Za-z])\d{17}[0-9Xx](?![0-9A-Za-z])"),
    "bank_card": re.compile(r"(?<![0-9A-Za-z])\d(?:[ -]?\d){12,18}(?![0-9A-Za-z])"),
    "mobile": re.compile(r"(?<![0-9A-Za-z])(?:\+?86[- ]?)?1[3-9]\d(?:[- ]?\d{4}){2}(?![0-9A-Za-z])"),
}


def is_id_card(text: str) -> bool:
    """17 digits with a possible birth date, and the check character that belongs to them."""
    if len(text) != 18 or not text[:17].isdecimal():
        return False
    try:
        datetime.date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    return _ID_CHECKS[_id_sum(text)] == text[17].upper()


def is_bank_card(text: str) -> bool:
    """13 to 19 digits that begin as banks' numbers do and pass Luhn's check, which one order number in ten would pass as well."""
    digits = [int(c) for c in text if c.isdecimal()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1 or not _BANKS.match("".join(map(str, digits))):
        return False
    return _luhn_sum(digits) % 10 == 0


class Masker:
    """Masks one dialogue at a time; `counts` adds up what was masked, a value once per dialogue."""

    def __init__(self, config: PiiConfig) -> None:
        self._config = config
        self._rules: dict[str, Callable[[str], bool]] = {
            "email": lambda _: True,
            "id_card": is_id_card,
            "bank_card": is_bank_card,
            "mobile": lambda _: True,
        }
        self.counts: Counter[str] = Counter()

    def mask(self, conversation: Conversation) -> Conversation:
        """The same dialogue without personal data; the very object where there is none."""
        found = self._found(conversation)
        if not found:
            return conversation
        self.counts.update(kind for kind, _ in found.values())
        replacements = {value: new for value, (_, new) in found.items()}
        pattern = re.compile("|".join(_bounded(value) for value in sorted(replacements, key=len, reverse=True)))
        return replace(conversation, messages=tuple(_masked(m, pattern, replacements) for m in conversation.messages))

    def _found(self, conversation: Conversation) -> dict[str, tuple[str, str]]:
        """Value as written -> (kind, replacement). Two spellings of one number share a replacement."""
        found: dict[str, tuple[str, str]] = {}
        tags: dict[tuple[str, str], str] = {}
        for kind, value in self._values(conversation):
            if value not in found:
                bare = value.casefold() if kind in ("email", "name") else re.sub(r"[^0-9Xx]", "", value).upper()
                bare = bare[-11:] if kind == "mobile" else bare
                if (kind, bare) not in tags:
                    number = 1 + sum(other == kind for other, _ in tags)
                    tags[kind, bare] = self._replacement(kind, bare, number)
                found[value] = kind, tags[kind, bare]
        return found

    def _values(self, conversation: Conversation) -> list[tuple[str, str]]:
        """(kind, value) in order of appearance; names first, since they are whole values."""
        values: list[tuple[str, str]] = []
        if "name" in self._config.kinds:
            annotated = [m.annotations for m in conversation.messages if m.annotations]
            wanted = (a.entities.get(name) for a in annotated for name in self._config.name_entities)
            values += [("name", value) for value in wanted if isinstance(value, str) and len(value.strip()) > 1]
        for message in conversation.messages:
            for text in (message.content, message.reasoning or "", *_entity_texts(message)):
                if _CUE.search(text):
                    values += self._matches(text)
        return values

    def _matches(self, text: str) -> list[tuple[str, str]]:
        matches: list[tuple[str, str]] = []
        for kind, pattern in _PATTERNS.items():
            if kind not in self._config.kinds:
                continue
            hits = [hit for hit in pattern.findall(text) if self._rules[kind](hit)]
            matches += [(kind, hit) for hit in hits]
            for hit in hits:  # an id card is no bank card as well
                text = text.replace(hit, " ")
        return matches

    def _replacement(self, kind: str, value: str, number: int) -> str:
        if self._config.style == "tag":
            return f"[{kind.upper()}_{number}]"
        digest = hmac.new(self._config.key.encode(), f"{kind}:{value}".encode(), hashlib.sha256).hexdigest()
        return _PSEUDONYMS[kind](digest)


def _bounded(value: str) -> str:
    """The value as a pattern that finds no part of a longer word or number."""
    before = r"(?<![0-9A-Za-z])" if value[0].isascii() and value[0].isalnum() else ""
    after = r"(?![0-9A-Za-z])" if value[-1].isascii() and value[-1].isalnum() else ""
    return before + re.escape(value) + after


def _masked(message: Message, pattern: re.Pattern[str], replacements: Mapping[str, str]) -> Message:
    def mask(text: str) -> str:
        return pattern.sub(lambda hit: replacements[hit[0]], text)

    annotations = message.annotations
    if annotations is not None:
        entities = {name: _entity(value, mask) for name, value in annotations.entities.items()}
        annotations = Annotations(intent=annotations.intent, entities=entities)
    reasoning = mask(message.reasoning) if message.reasoning is not None else None
    return replace(message, content=mask(message.content), reasoning=reasoning, annotations=annotations)


def _entity(value: str | int | float | bool, mask: Callable[[str], str]) -> str | int | float | bool:
    """Numbers stay numbers unless they are personal data."""
    if isinstance(value, bool | float):
        return value
    masked = mask(str(value))
    return value if masked == str(value) else masked


def _entity_texts(message: Message) -> list[str]:
    entities = message.annotations.entities if message.annotations else {}
    return [str(value) for value in entities.values() if isinstance(value, str | int) and not isinstance(value, bool)]


def _id_sum(text: str) -> int:
    return sum(int(digit) * weight for digit, weight in zip(text[:17], _ID_WEIGHTS, strict=True)) % 11


def _luhn_sum(digits: list[int]) -> int:
    doubled = [2 * digit for digit in digits[-2::-2]]
    return sum(digits[-1::-2]) + sum(digit - 9 if digit > 9 else digit for digit in doubled)


def _decimal(digest: str, num: int) -> str:
    return str(int(digest, 16))[:num]


def _false_id_card(digest: str) -> str:
    """No region has the number 000000, so that it can be nobody's; the check character is right."""
    body = f"000000{1950 + int(digest[:2], 16) % 50}{1 + int(digest[2:4], 16) % 12:02d}{1 + int(digest[4:6], 16) % 28:02d}"
    body += _decimal(digest, 3)
    return body + _ID_CHECKS[_id_sum(body + "0")]


def _false_bank_card(digest: str) -> str:
    """Begins with 000000, which no issuer does; passes Luhn's check."""
    body = "000000" + _decimal(digest, 9)
    digits = [int(c) for c in body]
    return body + str(-_luhn_sum([*digits, 0]) % 10)


_PSEUDONYMS: dict[str, Callable[[str], str]] = {
    "email": lambda digest: f"user{_decimal(digest, 6)}@example.com",
    "id_card": _false_id_card,
    "bank_card": _false_bank_card,
    "mobile": lambda digest: "100" + _decimal(digest, 8),  # 100 is no mobile prefix
    "name": lambda digest: f"N{digest[:6]}",
}
