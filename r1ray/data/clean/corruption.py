"""Sound dialogues made bad, each in one of the ways that exports and crawlers make them: what the shipped quality model learnt from."""

from __future__ import annotations

import functools
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import replace

from r1ray.data.bank.wording import Split, load_wording
from r1ray.data.demo import demo_conversations
from r1ray.types import Conversation, Message

__all__ = ["CORRUPTIONS", "corrupted", "marked_dialogues"]


_ABBREVIATIONS = ("HTML", "ATM", "App", "SMS", "PIN", "IBAN", "VIP", "APR", "GDP", "CPU")
_SHORT = ("Yes.", "No.", "OK", "Done.", "42", "好的。", "可以。", "不可以。", "是的", "x = 3", "Paris", "北京")


def marked_dialogues(split: Split, *, seed: int = 0) -> tuple[list[Conversation], list[bool]]:
    """Dialogues of the demo's `split`, in the forms that other sets have, and for each whether it is bad; half and half."""
    rng = random.Random(f"{seed}/{split}")
    good = [form for c in demo_conversations(split, seed=seed) for form in _forms(c, rng)]
    bad = [corrupted(c, rng.choice(list(CORRUPTIONS)), rng) for c in good]
    pairs = [(c, False) for c in good] + [(c, True) for c in bad if c is not None]
    rng.shuffle(pairs)
    return [c for c, _ in pairs], [is_bad for _, is_bad in pairs]


def corrupted(conversation: Conversation, kind: str, rng: random.Random) -> Conversation | None:
    """The last answer broken; None where that kind of damage does not show, as in a label of two words."""
    question, answer = conversation.messages[-2:]
    text = CORRUPTIONS[kind](answer.content, question.content, rng)
    if text is None or text.strip() == answer.content.strip() or not text.strip():
        return None
    return replace(conversation, id=f"{conversation.id}#{kind}", messages=(*conversation.messages[:-1], replace(answer, content=text)))


def _forms(conversation: Conversation, rng: random.Random) -> list[Conversation]:
    """The dialogue as it is, and with other sound answers: a plain reply, a long text, a list, a table, a word, a label."""
    *_, question, answer = conversation.messages
    head, _, reply = answer.content.partition("\n")
    intent = answer.annotations.intent if answer.annotations and answer.annotations.intent else "other"
    replies = [m.content.partition("\n")[2] for m in conversation.messages if m.role == "assistant"]
    others = rng.sample(_passages(), 3)
    forms = {
        "": answer.content,
        "plain": reply,
        "long": "\n\n".join([*replies, *others]),
        "list": "\n".join(f"{number}. {text}".rstrip(".。") for number, text in enumerate([*replies, *others], start=1)),
        "table": "\n".join(["| # | x |", "|---|---|", *(f"| {number} | {text} |" for number, text in enumerate(replies, start=1))]),
        "short": re.split(r"(?<=[，,。.])", reply)[0],
        "mixed": f"{rng.choice(_ABBREVIATIONS)}{'' if rng.random() < 0.5 else ' '}{reply}",
        "yes": rng.choice(_SHORT),
        "label": intent.replace("_", " "),
    }
    turns = (*conversation.messages[:-2], question)
    return [
        Conversation(id=f"{conversation.id}#{name}", messages=(*turns, Message(role="assistant", content=text)))
        for name, text in forms.items()
        if text.strip() and head
    ]


@functools.cache
def _passages() -> list[str]:
    """The knowledge base, section by section, in both languages."""
    return [passage.text for language in ("en", "zh") for passage in load_wording(language).sections.values()]


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _cut(text: str, _: str, rng: random.Random) -> str | None:
    """In the middle of a sentence, as a token limit cuts."""
    if len(text) < 50:
        return None
    return text[: rng.randint(45, max(46, int(0.9 * len(text))))].rstrip("。！？.!?} \n")


def _repeated(text: str, _: str, rng: random.Random) -> str:
    """A model in a loop."""
    piece = text[-rng.randint(6, 30) :]
    return text + piece * rng.randint(4, 30)


def _one_character(text: str, _: str, rng: random.Random) -> str:
    return text[: rng.randint(0, 12)] + rng.choice("。.!啊哈a-=*~") * rng.randint(8, 60)


def _keys(text: str, _: str, rng: random.Random) -> str:
    """A hand on the keyboard."""
    letters = string.ascii_lowercase + ";,/ "
    return "".join(rng.choices(letters, k=rng.randint(8, max(len(text), 12))))


def _shuffled(text: str, _: str, rng: random.Random) -> str | None:
    """Letters or characters in random order."""
    if len(text) < 12:
        return None
    return "".join(rng.sample(text, len(text)))


def _echo(_: str, question: str, rng: random.Random) -> str | None:
    last = _last_line(question)
    return last * rng.randint(1, 2) if len(last) > 12 else None


def _marks(_: str, __: str, rng: random.Random) -> str:
    return "".join(rng.choices("?!.,…。？！、*#_-|/\\<> ", k=rng.randint(3, 60)))


def _mojibake(text: str, _: str, rng: random.Random) -> str | None:
    if rng.random() < 0.5 or text.isascii():
        return "".join(c if rng.random() < 0.7 else "\ufffd" for c in text)
    return text.encode("utf-8").decode("cp1252", "replace")


def _markup(text: str, _: str, rng: random.Random) -> str:
    """The page around the answer instead of the answer."""
    tags = ("<div>", "</div>", "<br/>", "&nbsp;", "<span class=x>", "{{ }}", "null", "NaN", "undefined")
    return text[: rng.randint(0, 10)] + "".join(rng.choices(tags, k=rng.randint(4, 20)))


CORRUPTIONS: dict[str, Callable[[str, str, random.Random], str | None]] = {
    "cut": _cut,
    "repeated": _repeated,
    "one_character": _one_character,
    "keys": _keys,
    "shuffled": _shuffled,
    "echo": _echo,
    "marks": _marks,
    "mojibake": _mojibake,
    "markup": _markup,
}


def sample_of(kinds: Sequence[str], conversations: Sequence[Conversation], *, seed: int) -> list[Conversation]:
    """One corrupted dialogue for each of `conversations`, the kinds in turn; those that cannot be damaged are left out."""
    rng = random.Random(seed)
    made = (corrupted(c, kinds[place % len(kinds)], rng) for place, c in enumerate(conversations))
    return [c for c in made if c is not None]
