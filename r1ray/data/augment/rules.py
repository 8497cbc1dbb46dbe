"""Operations that need no model: synonyms, other entity values, other syntax. Each row has its own random numbers, by seed and id."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from r1ray.data.augment.config import EntitiesConfig, SynonymsConfig, SyntaxConfig
from r1ray.data.augment.provenance import Made, recorded
from r1ray.data.augment.spans import Span, bounded, edited, entities_of, intents_of, is_free, question_start
from r1ray.errors import InvalidValue
from r1ray.model.prompts import detect_language
from r1ray.settings import Settings
from r1ray.types import Annotations, Conversation, EntityValue, Message

__all__ = ["EntityPools", "Operator", "ReplaceEntities", "ReplaceSynonyms", "VarySyntax", "read_wording", "rng_of"]

_WORDING = Path(__file__).parent / "wording"
_LARGEST_POOL = 500


class Operator(Protocol):
    """Makes at most one row out of each given one; None where it has nothing to change."""

    @property
    def name(self) -> str: ...

    def apply(self, rows: Sequence[Conversation]) -> list[Made | None]: ...


def rng_of(seed: int, name: str, row: Conversation) -> random.Random:
    """The same numbers for a row whatever else is in the set."""
    return random.Random(f"{seed}/{name}/{row.id}")


def read_wording(path: Path | None, shipped: str) -> dict[str, Any]:
    """A YAML mapping: the user's, or the one of that name beside this module."""
    path = Settings().locate(path) if path else _WORDING / f"{shipped}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidValue(f"{path} is no readable YAML: {error}. See {_WORDING / shipped}.yaml for the form.") from error
    if not isinstance(tree, dict):
        raise InvalidValue(f"{path} holds no mapping. See {_WORDING / shipped}.yaml for the form.")
    return tree


class ReplaceSynonyms:
    """Words of the questions by others of their group."""

    name = "synonyms"

    def __init__(self, config: SynonymsConfig, seed: int) -> None:
        self._probability = config.probability
        self._seed = seed
        self._lexicons = {language: _lexicon(groups) for language, groups in read_wording(config.lexicon, "synonyms").items()}

    def apply(self, rows: Sequence[Conversation]) -> list[Made | None]:
        return [self._one(row) for row in rows]

    def _one(self, row: Conversation) -> Made | None:
        rng = rng_of(self._seed, self.name, row)
        return recorded(row, edited(row, lambda text, spans: self._replaced(text, spans, rng)), name=self.name, seed=self._seed)

    def _replaced(self, text: str, spans: list[Span], rng: random.Random) -> str:
        language = detect_language(text[question_start(text) :])
        if language not in self._lexicons:
            return text
        pattern, others = self._lexicons[language]

        def other(found: re.Match[str]) -> str:
            if not is_free(*found.span(), spans) or rng.random() >= self._probability:
                return found[0]
            word = rng.choice(others[found[0].lower()])
            return word[0].upper() + word[1:] if found[0][0].isupper() else word

        return pattern.sub(other, text)


class EntityPools:
    """Values of each entity that the set holds, by intent, name and language: an amount to pay back is none to withdraw.

    So many at most that the pools do not grow with the set.
    """

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str | None, str, str], dict[EntityValue, None]] = defaultdict(dict)
        self._by_intent = True

    @classmethod
    def of(cls, path: Path) -> EntityPools:
        """From a YAML file: entity -> values, for both languages."""
        pools = cls()
        pools._by_intent = False
        for name, values in read_wording(path, "synonyms").items():
            if not isinstance(values, list):
                raise InvalidValue(f"{path}: {name} is no list of values. Write e.g. `{name}: [a, b]`.")
            for language in ("zh", "en"):
                pools._values[None, name, language] = dict.fromkeys(values)
        return pools

    def add(self, row: Conversation) -> None:
        entities = entities_of(row)
        if not entities:
            return
        language, intents = detect_language(_questions(row)), intents_of(row)
        for name, value in entities.items():
            pool = self._values[intents[name], name, language]
            if len(pool) < _LARGEST_POOL and not isinstance(value, bool):
                pool[value] = None

    def other(self, row: Conversation, name: str, rng: random.Random) -> EntityValue | None:
        """Another value of the row's entity, of the same type; masks stay masks."""
        value, language = entities_of(row)[name], detect_language(_questions(row))
        if isinstance(value, str) and value.startswith("["):
            return None
        pool = self._values.get((intents_of(row)[name] if self._by_intent else None, name, language), {})
        choices = [other for other in pool if other != value and type(other) is type(value) and not str(other).startswith("[")]
        return rng.choice(choices) if choices else None


class ReplaceEntities:
    """Every annotated value that the customer names, by another one, wherever it stands in the dialogue."""

    name = "entities"

    def __init__(self, config: EntitiesConfig, seed: int, pools: EntityPools) -> None:
        self._pools = EntityPools.of(config.values) if config.values is not None else pools
        self._seed = seed

    def apply(self, rows: Sequence[Conversation]) -> list[Made | None]:
        return [self._one(row) for row in rows]

    def _one(self, row: Conversation) -> Made | None:
        rng = rng_of(self._seed, self.name, row)
        swaps: dict[str, tuple[EntityValue, EntityValue]] = {}
        for name, value in entities_of(row).items():
            other = self._pools.other(row, name, rng) if replaceable(row, value) else None
            if other is not None:
                swaps[name] = value, other
        if not swaps:
            return None
        return recorded(row, [_swapped(m, swaps) for m in row.messages], name=self.name, seed=self._seed)


class VarySyntax:
    """The last question in another grammatical form."""

    name = "syntax"

    def __init__(self, config: SyntaxConfig, seed: int) -> None:
        self._seed = seed
        self._rules: dict[str, list[tuple[re.Pattern[str], list[str]]]] = {}
        for language, rules in read_wording(config.rules, "syntax").items():
            try:
                self._rules[language] = [(re.compile(pattern, re.I | re.S), list(forms)) for pattern, forms in rules]
            except (re.error, ValueError, TypeError) as error:
                raise InvalidValue(f"Syntax rules of {language} are not [pattern, [form, ...]]: {error}.") from error

    def apply(self, rows: Sequence[Conversation]) -> list[Made | None]:
        return [self._one(row) for row in rows]

    def _one(self, row: Conversation) -> Made | None:
        turn = max((place for place, m in enumerate(row.messages) if m.role == "user"), default=None)
        if turn is None:
            return None
        text = row.messages[turn].content
        start = question_start(text)
        start += len(text[start:]) - len(text[start:].lstrip())
        varied = self._varied(text[start:].rstrip(), rng_of(self._seed, self.name, row))
        if varied is None:
            return None
        messages = list(row.messages)
        messages[turn] = replace(messages[turn], content=text[:start] + varied)
        return recorded(row, messages, name=self.name, seed=self._seed)

    def _varied(self, question: str, rng: random.Random) -> str | None:
        """A single sentence only: rules see one request, not two."""
        if len(re.findall(r"[.!?。！？](?:\s|$)|[。！？]", question)) > 1 or len(question) > 200:
            return None
        matching = [
            (found, forms) for pattern, forms in self._rules.get(detect_language(question), ()) if (found := pattern.fullmatch(question))
        ]
        if not matching:
            return None
        found, forms = rng.choice(matching[:3])
        varied = rng.choice(forms)
        for number, group in enumerate(found.groups(), start=1):
            varied = varied.replace(f"{{{number}}}", group)
        return varied[0].upper() + varied[1:]


def replaceable(row: Conversation, value: EntityValue) -> bool:
    """Whether a value can be swapped without touching what is not it: named by the customer, in no passage, and, if it is a small
    number, nowhere in a reply, where it may be somebody else's 10."""
    if isinstance(value, bool) or not str(value).strip():
        return False
    pattern = bounded(value)
    users = [m.content for m in row.messages if m.role == "user"]
    if not any(pattern.search(text, question_start(text)) for text in users):
        return False
    if any(pattern.search(text[: question_start(text)]) for text in users):
        return False
    if any(str(value) != str(other) and str(value) in str(other) for other in entities_of(row).values()):
        return False
    small = str(value).isdecimal() and len(str(value)) < 3
    return not small or not any(pattern.search(_reply(m.content)) for m in row.messages if m.role == "assistant")


def _swapped(message: Message, swaps: Mapping[str, tuple[EntityValue, EntityValue]]) -> Message:
    def swap(text: str) -> str:
        patterns = [(bounded(old), str(new)) for old, new in swaps.values()]
        both = re.compile("|".join(f"({pattern.pattern})" for pattern, _ in patterns))
        return both.sub(lambda found: patterns[(found.lastindex or 1) - 1][1], text)

    annotations = message.annotations
    if annotations is not None:
        entities = {name: swaps[name][1] if name in swaps and swaps[name][0] == v else v for name, v in annotations.entities.items()}
        annotations = Annotations(intent=annotations.intent, entities=entities)
    start = question_start(message.content) if message.role == "user" else 0
    reasoning = swap(message.reasoning) if message.reasoning else message.reasoning
    return replace(message, content=message.content[:start] + swap(message.content[start:]), reasoning=reasoning, annotations=annotations)


def _reply(content: str) -> str:
    """An answer without its first line of JSON."""
    head, _, reply = content.partition("\n")
    try:
        return reply if isinstance(json.loads(head), dict) else content
    except ValueError:
        return content


def _questions(row: Conversation) -> str:
    return "\n".join(m.content[question_start(m.content) :] for m in row.messages if m.role == "user")


def _lexicon(groups: object) -> tuple[re.Pattern[str], dict[str, list[str]]]:
    if not isinstance(groups, list) or not all(isinstance(group, list) and len(group) > 1 for group in groups):
        raise InvalidValue("A lexicon's language holds lists of at least two synonyms, e.g. `en: [[lost, misplaced]]`.")
    others: dict[str, list[str]] = {}
    for group in groups:
        for word in group:
            others.setdefault(word.lower(), []).extend(other for other in group if other != word)
    words = sorted(others, key=len, reverse=True)
    return re.compile("|".join(bounded(word).pattern for word in words), re.I), others
