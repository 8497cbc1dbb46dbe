"""The demo's wording and knowledge as records: `en.yaml` and `zh.yaml` beside this file, the Markdown in `r1ray/data/knowledge`.

Knows no dialogue: which phrase meets which value is the generator's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from r1ray.model.prompts import Language
from r1ray.types import Passage

__all__ = ["KNOWLEDGE", "Intent", "Split", "Wording", "load_wording"]

Split = Literal["train", "test"]
KNOWLEDGE = Path(__file__).parent.parent / "knowledge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """One thing that customers want. `phrases` hold every slot, `vague` none, `answers` give them when the bank asked."""

    name: str
    slots: Mapping[str, str]
    section: str
    fact: str
    reply: str
    ask: str
    phrases: Mapping[Split, tuple[str, ...]]
    vague: Mapping[Split, tuple[str, ...]]
    answers: Mapping[Split, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """One language. `before`, `after` and `next` are politeness around a phrase; `sections` are the passages by `file#heading`."""

    language: Language
    intents: Mapping[str, Intent]
    pools: Mapping[str, Mapping[Split, tuple[str | int, ...]]]
    before: Mapping[Split, tuple[str, ...]]
    after: Mapping[Split, tuple[str, ...]]
    next: Mapping[Split, tuple[str, ...]]
    sections: Mapping[str, Passage]


def load_wording(language: Language) -> Wording:
    """Read one language's file and its half of the knowledge base."""
    tree = yaml.safe_load((Path(__file__).parent / f"{language}.yaml").read_text(encoding="utf-8"))
    return Wording(
        language=language,
        intents={name: _intent(name, fields) for name, fields in tree["intents"].items()},
        pools={name: _splits(pool) for name, pool in tree["pools"].items()},
        before=_splits(tree["before"]),
        after=_splits(tree["after"]),
        next=_splits(tree["next"]),
        sections=_sections(KNOWLEDGE / language),
    )


def _intent(name: str, fields: Mapping[str, Any]) -> Intent:
    return Intent(
        name=name,
        slots=fields["slots"],
        section=fields["section"],
        fact=fields["fact"],
        reply=fields["reply"],
        ask=fields.get("ask", ""),
        phrases=_splits(fields),
        vague=_splits(fields.get("vague", {})),
        answers=_splits(fields.get("answer", {})),
    )


def _splits(fields: Mapping[str, Any]) -> dict[Split, tuple[Any, ...]]:
    return {"train": tuple(fields.get("train", ())), "test": tuple(fields.get("test", ()))}


def _sections(directory: Path) -> dict[str, Passage]:
    """Every `##` section as the passage that indexing the file gives: its body without the headings."""
    found: dict[str, Passage] = {}
    for path in sorted(directory.glob("*.md")):
        title, *parts = path.read_text(encoding="utf-8").split("\n## ")
        for part in parts:
            heading, _, body = part.partition("\n")
            name = f"{path.name}#{heading.strip()}"
            place = f"{directory.name}/{path.name}"
            headings = f"{title.removeprefix('# ').strip()} > {heading.strip()}"
            found[name] = Passage(id=f"{place}#{heading.strip()}", text=body.strip(), source=place, heading=headings)
    return found
