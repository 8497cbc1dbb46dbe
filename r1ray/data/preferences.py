"""Files in, pairs of a better and a worse answer out, with each row that was left out and why. Knows no tokenizer.

    pairs           {"prompt", "chosen", "rejected"}                                    TRL: texts, or lists of messages
                    {"chosen", "rejected"}                                              lists of messages that begin with the same prompt
    sharegpt_pairs  {"conversations": [{"from", "value"}], "chosen", "rejected"}        LLaMA-Factory
    alpaca_pairs    {"instruction", "input", "chosen", "rejected"}                      or "output": [better, worse]
    labelled        {"text", "label"} or {"text", "category"}                          the label in words, against another label of the set

An answer is a text, one message, or a list with one message. `system` and `id` columns count as in dialogues. Labelled rows are pairs
only where `data.format` says so.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from r1ray.data.config import DataConfig, Format
from r1ray.data.formats import alpaca_prompt, listed, message_of, named, openai_message, row_id, text_of, turns_of, with_system
from r1ray.data.read import read_conversations
from r1ray.data.reading import Ids, gather
from r1ray.data.records import BadRow, RawRow, Reject
from r1ray.data.schema import canonical
from r1ray.data.split import stem
from r1ray.data.turns import check_order, repair
from r1ray.errors import MissingColumn, NothingToTrain, UnknownFormat
from r1ray.types import Conversation, Message, Preference

__all__ = ["LoadedPairs", "hold_out_pairs", "read_preferences"]

Parsed = tuple[list[Message], Message, Message]
"""Prompt, better answer, worse answer."""

_NEEDS: dict[Format, tuple[tuple[str, ...], ...]] = {
    "sharegpt_pairs": (("conversations", "chosen", "rejected"),),
    "alpaca_pairs": (("instruction", "chosen", "rejected"), ("instruction", "output")),
    "pairs": (("chosen", "rejected"),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPairs:
    """A set in memory: with no limit, `len(pairs) + len(rejects) == num_rows`."""

    pairs: tuple[Preference, ...]
    rejects: tuple[Reject, ...]
    data_hash: str
    formats: tuple[Format, ...]
    num_rows: int


def read_preferences(config: DataConfig) -> LoadedPairs:
    """Every valid pair of `config.path`, in order, and a Reject for every other row.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
        TooManyBadRows: more than `max_bad_share` of the rows are invalid; `config.rejects` is written before.
    """
    if config.format == "labelled":
        return _contrasted(config)
    found = gather(config, _opening)
    return LoadedPairs(
        pairs=found.items, rejects=found.rejects, data_hash=_data_hash(found.items), formats=found.formats, num_rows=found.num_rows
    )


def hold_out_pairs(
    pairs: Sequence[Preference], share: float, *, most: int | None = None, seed: int = 0
) -> tuple[tuple[Preference, ...], tuple[Preference, ...]]:
    """(training, held-out), each in the given order. Pairs with the same prompt stay on one side, and so do those whose ids share a `stem`.

    `share` of the prompts, or groups of them, but no more of them than hold `most` pairs; at least one where there are two. Which ones
    depends on their text and the seed alone.
    """
    groups = _groups(pairs)
    sizes = Counter(groups)
    drawn: dict[str, bytes] = {}
    for pair, group in zip(pairs, groups, strict=True):
        drawn[group] = min(drawn.get(group, b"\xff" * 32), _draw(seed, _prompt_key(pair)))
    num_held = round(share * len(drawn))
    if share > 0 and len(drawn) > 1:
        num_held = min(max(num_held, 1), len(drawn) - 1)
    ordered = sorted(drawn, key=drawn.__getitem__)[:num_held]
    if most is not None:
        room = sum(total <= most for total in accumulate(sizes[group] for group in ordered))
        ordered = ordered[: max(room, 1)]
    held = set(ordered)
    sides = tuple(zip(pairs, groups, strict=True))
    return tuple(pair for pair, group in sides if group not in held), tuple(pair for pair, group in sides if group in held)


def _groups(pairs: Sequence[Preference]) -> list[str]:
    """A name for each pair, equal where a chain of equal prompts and equal stems leads from one to the other."""
    leaders: dict[str, str] = {}

    def leader(key: str) -> str:
        while leaders.setdefault(key, key) != key:
            leaders[key] = key = leaders[leaders[key]]
        return key

    for pair in pairs:
        leaders[leader(f"id:{stem(pair.id)}")] = leader(_prompt_key(pair))
    return [leader(_prompt_key(pair)) for pair in pairs]


def _contrasted(config: DataConfig) -> LoadedPairs:
    """Each row of a table of texts and labels: its own label is better than another one of the set, drawn by `seed` and the row."""
    loaded = read_conversations(config)
    answers = {row.messages[-1].content: row.messages[-1] for row in loaded.conversations}
    labels = sorted(answers)
    if len(labels) < 2:
        raise NothingToTrain(f"{config.path} has one label only, {labels[0]!r}, and nothing to prefer it to. Give rows of two or more.")
    pairs = tuple(_against(row, answers[_another(row, labels, config.seed)]) for row in loaded.conversations)
    return LoadedPairs(pairs=pairs, rejects=loaded.rejects, data_hash=_data_hash(pairs), formats=loaded.formats, num_rows=loaded.num_rows)


def _another(row: Conversation, labels: Sequence[str], seed: int) -> str:
    own = bisect.bisect_left(labels, row.messages[-1].content)
    digest = hashlib.sha256(f"another label:{seed}:{row.id}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8]) % (len(labels) - 1)
    return labels[place + (place >= own)]


def _against(row: Conversation, worse: Message) -> Preference:
    *prompt, better = row.messages
    return Preference(id=row.id, prompt=tuple(prompt), chosen=better, rejected=worse, source=row.source)


def _opening(columns: Sequence[str], config: DataConfig, file: str) -> tuple[Format, Callable[[RawRow, Ids], Preference]]:
    name = _detect(columns, config, file)
    parse = _PARSERS[name]
    return name, lambda raw, ids: _pair(raw, parse, config, ids)


def _detect(columns: Sequence[str], config: DataConfig, file: str) -> Format:
    """The configured format, or the first whose columns are there."""
    if config.format != "auto" and config.format not in _NEEDS:
        raise UnknownFormat(
            f"data.format={config.format} holds dialogues, and train.objective wants pairs of answers. "
            f"Set data.format to auto or one of {', '.join(_NEEDS)}, or to labelled for a table of texts and labels."
        )
    for name, choices in _NEEDS.items():
        if config.format in ("auto", name) and any(set(needs) <= set(columns) for needs in choices):
            return name
    wanted = _NEEDS if config.format == "auto" else {config.format: _NEEDS[config.format]}
    forms = "; ".join(f"{name}: {' or '.join(', '.join(needs) for needs in choices)}" for name, choices in wanted.items())
    raise MissingColumn(
        f"{file} has the columns {listed(columns)}, which are not those of pairs of answers ({forms}). Rename its columns, or set "
        "data.path to a file with a better and a worse answer in each row; data.format=labelled makes pairs of a table of texts and labels."
    )


def _pair(raw: RawRow, parse: Callable[[Mapping[str, Any]], Parsed], config: DataConfig, ids: Ids) -> Preference:
    turns, chosen, rejected = parse(raw.values)
    if turns and turns[-1].role == "assistant":
        raise BadRow("the prompt ends with an assistant turn; end it with the user turn that the two answers reply to")
    messages = [*turns, chosen]
    prompt = tuple(repair(messages) if config.role_order == "repair" else messages)[:-1]
    if not prompt:
        raise BadRow("no prompt before the answers")
    check_order((*prompt, chosen))
    if (chosen.content.strip(), chosen.reasoning) == (rejected.content.strip(), rejected.reasoning):
        raise BadRow("chosen and rejected are the same; nothing can be learnt from the pair")
    name = ids.unique(row_id(raw.values), lambda: _content_id(prompt, chosen, rejected), raw)
    return Preference(id=name, prompt=prompt, chosen=chosen, rejected=rejected, source=f"{raw.file}:{raw.row}")


def _pairs(values: Mapping[str, Any]) -> Parsed:
    given = values.get("prompt")
    before, chosen = _answer(values, "chosen")
    before_rejected, rejected = _answer(values, "rejected")
    if before != before_rejected:
        raise BadRow("chosen and rejected do not begin with the same turns; both must answer one prompt")
    listed_turns = _messages(given)
    if before:
        if listed_turns is not None and listed_turns != before:
            raise BadRow("chosen and rejected repeat another prompt than the column prompt holds")
        return with_system(values, before), chosen, rejected
    if given is None:
        raise BadRow("no prompt: fill the column prompt, or give chosen and rejected as lists of messages that begin with it")
    prompt = listed_turns if listed_turns is not None else [message_of("user", text_of(given, "prompt"), None, None)]
    return with_system(values, prompt), chosen, rejected


def _sharegpt(values: Mapping[str, Any]) -> Parsed:
    prompt = [_message(turn) for turn in turns_of(values, "conversations")]
    return with_system(values, prompt), _only(values, "chosen"), _only(values, "rejected")


def _alpaca(values: Mapping[str, Any]) -> Parsed:
    prompt = with_system(values, alpaca_prompt(values))
    if "chosen" in values and "rejected" in values:
        return prompt, _only(values, "chosen"), _only(values, "rejected")
    answers = values.get("output")
    answers = _cell(answers, lambda item: isinstance(item, str | dict))
    if not isinstance(answers, list) or len(answers) != 2:
        raise BadRow(f"output is {named(answers)}, not a list of two answers, the better one first")
    both = {"chosen": answers[0], "rejected": answers[1]}
    return prompt, _only(both, "chosen"), _only(both, "rejected")


_PARSERS: dict[Format, Callable[[Mapping[str, Any]], Parsed]] = {"pairs": _pairs, "sharegpt_pairs": _sharegpt, "alpaca_pairs": _alpaca}


def _only(values: Mapping[str, Any], column: str) -> Message:
    before, answer = _answer(values, column)
    if before:
        raise BadRow(f"{column} holds {len(before) + 1} turns; it must be one answer")
    return answer


def _answer(values: Mapping[str, Any], column: str) -> tuple[list[Message], Message]:
    """(turns before it, the answer)."""
    value = values.get(column)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and not value:
        raise BadRow(f"{column} is empty")
    turns = _messages(value)
    if turns is None:
        return [], message_of("assistant", text_of(value, column), None, None)
    *before, answer = turns
    if answer.role != "assistant":
        raise BadRow(f"{column} ends with a {answer.role} turn; it must end with the assistant's answer")
    return before, answer


def _messages(value: object) -> list[Message] | None:
    """A list of turns, also as JSON in a cell of a CSV; None for anything else."""
    value = _cell(value, lambda item: isinstance(item, dict) and ("role" in item or "from" in item))
    if not isinstance(value, list):
        return None
    return [_message(turn) for turn in turns_of({"messages": value}, "messages")]


def _cell(value: object, wanted: Callable[[object], bool]) -> object:
    """A text that is a JSON list of what is wanted, as in a CSV's cell, parsed; an answer may well be some other JSON."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) and found and all(wanted(item) for item in found) else value


def _message(turn: Mapping[str, Any]) -> Message:
    """OpenAI's or ShareGPT's names."""
    if "from" in turn or "value" in turn:
        return message_of(turn.get("from", turn.get("role")), turn.get("value", turn.get("content")), None, None)
    return openai_message(turn)


def _content_id(prompt: tuple[Message, ...], chosen: Message, rejected: Message) -> str:
    return hashlib.sha256(_canonical(prompt, chosen, rejected)).hexdigest()[:16]


def _canonical(prompt: tuple[Message, ...], chosen: Message, rejected: Message) -> bytes:
    parts = [canonical(Conversation(id="", messages=messages)) for messages in (prompt, (chosen,), (rejected,))]
    return json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _data_hash(pairs: Iterable[Preference]) -> str:
    """sha256 over the pairs' content in order, whatever file, format or id they came with."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(_canonical(pair.prompt, pair.chosen, pair.rejected) + b"\n")
    return digest.hexdigest()


def _prompt_key(pair: Preference) -> str:
    return canonical(Conversation(id="", messages=pair.prompt))


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"hold out:{seed}:{key}".encode("utf-8", "surrogatepass")).digest()
