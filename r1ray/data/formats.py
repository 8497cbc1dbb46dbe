"""The six row formats of dialogues: which one a row is in, and the dialogue it holds. Knows no file and no sampling.

    annotated  {"conversation_id", "utterances": [{"role", "text", "annotations": {"intent", "entities"}}]}   (seed 004)
    messages   {"messages": [{"role", "content"}]}            OpenAI, content parts and reasoning_content included
    alpaca     {"instruction", "input", "output"}             optional system and history
    sharegpt   {"conversations": [{"from", "value"}]}         optional system
    labelled   {"text", "label"} or {"text", "category"}      the answer is the label in words
    faq        {"question", "answer"}, {"问题", "答案"}, ...   a table of questions and answers, as spreadsheets hold them

`preferences` has the formats of pairs of answers, made of the same parts.

A parser takes a row's values and gives the id (None: take it from the content) and the turns, or raises BadRow with the reason.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1ray.data.config import DataConfig, Format
from r1ray.data.records import BadRow
from r1ray.errors import MissingColumn, UnknownFormat
from r1ray.model.reasoning import split
from r1ray.types import Annotations, EntityValue, Message, Role

__all__ = [
    "Parser",
    "alpaca_prompt",
    "detect",
    "listed",
    "message_of",
    "named",
    "openai_message",
    "parser",
    "row_id",
    "text_of",
    "turns_of",
    "with_system",
]

Parser = Callable[[Mapping[str, Any]], tuple[str | None, list[Message]]]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "customer": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "agent": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_NEEDS: dict[Format, tuple[str, ...]] = {
    "annotated": ("utterances",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
}
_PAIRED: tuple[Format, ...] = ("pairs", "sharegpt_pairs", "alpaca_pairs")
_LABEL_COLUMNS = ("label", "category")
_QUESTION_COLUMNS = ("question", "prompt", "query", "问题", "提问", "问")
_ANSWER_COLUMNS = ("answer", "completion", "response", "答案", "回答", "答")


def detect(columns: Sequence[str], config: DataConfig, file: str) -> Format:
    """The configured format, or the first whose columns are there.

    Raises:
        MissingColumn: the columns its format needs are not there; names what was found and the keys to set.
        UnknownFormat: the format, or the file, holds pairs of answers and no dialogues.
    """
    if config.format in _PAIRED or (config.format == "auto" and {"chosen", "rejected"} <= set(columns)):
        raise UnknownFormat(
            f"{file} has the columns {listed(columns)}: pairs of a better and a worse answer, where dialogues are wanted. Train on "
            "pairs with train.objective=dpo or reward, or set data.format to the dialogues' format."
        )
    if config.format != "auto":
        return _checked(config.format, columns, config, file)
    for name, needs in _NEEDS.items():
        if all(need in columns for need in needs):
            return name
    if config.text_column in columns and _label_column(columns, config) is not None:
        return "labelled"
    if all(_faq_columns(columns, config)):
        return "faq"
    forms = "; ".join(f"{name}: {', '.join(needs)}" for name, needs in _NEEDS.items())
    raise MissingColumn(
        f"{file} has the columns {listed(columns)}, which fit no format ({forms}; labelled: {_wanted(config)}; faq: question, answer). "
        "For a table of labels set data.text_column and data.label_column to two of its columns, for one of questions and answers "
        "data.question_column and data.answer_column; else rename the columns."
    )


def parser(name: Format, columns: Sequence[str], config: DataConfig) -> Parser:
    """The parser of a detected format, bound to its columns."""
    if name == "faq":
        question, answer = _faq_columns(columns, config)
        return lambda values: _faq(values, question or _QUESTION_COLUMNS[0], answer or _ANSWER_COLUMNS[0])
    if name != "labelled":
        return _PARSERS[name]
    label_column = _label_column(columns, config) or _LABEL_COLUMNS[0]
    return lambda values: _labelled(values, label_column, config)


def _checked(name: Format, columns: Sequence[str], config: DataConfig, file: str) -> Format:
    if name == "labelled":
        missing = [] if config.text_column in columns else [config.text_column]
        missing += [] if _label_column(columns, config) else [config.label_column or " or ".join(_LABEL_COLUMNS)]
        advice = "Set data.text_column and data.label_column to two of its columns."
    elif name == "faq":
        known = ((config.question_column, _QUESTION_COLUMNS), (config.answer_column, _ANSWER_COLUMNS))
        missing = [
            given or " or ".join(names) for (given, names), found in zip(known, _faq_columns(columns, config), strict=True) if not found
        ]
        advice = "Set data.question_column and data.answer_column to two of its columns."
    else:
        missing = [need for need in _NEEDS[name] if need not in columns]
        advice = "Set data.format to the file's format, or rename its columns."
    if missing:
        raise MissingColumn(f"{file} has no column {', '.join(missing)} for format {name}; it has {listed(columns)}. {advice}")
    return name


def _label_column(columns: Sequence[str], config: DataConfig) -> str | None:
    wanted = (config.label_column,) if config.label_column else _LABEL_COLUMNS
    return next((name for name in wanted if name in columns), None)


def _faq_columns(columns: Sequence[str], config: DataConfig) -> tuple[str | None, str | None]:
    """Of the question and of the answer: the configured ones, or known names in any case."""
    folded = {name.strip().casefold(): name for name in reversed(columns)}

    def find(given: str | None, known: Sequence[str]) -> str | None:
        return (given if given in columns else None) if given else next((folded[name] for name in known if name in folded), None)

    return find(config.question_column, _QUESTION_COLUMNS), find(config.answer_column, _ANSWER_COLUMNS)


def _wanted(config: DataConfig) -> str:
    return f"{config.text_column}, {config.label_column or ' or '.join(_LABEL_COLUMNS)}"


def listed(columns: Sequence[str]) -> str:
    return ", ".join(columns[:20]) if columns else "none"


def _annotated(values: Mapping[str, Any]) -> tuple[str | None, list[Message]]:
    turns = turns_of(values, "utterances")
    return row_id(values), [
        message_of(turn.get("role"), turn.get("text"), turn.get("reasoning"), _annotations(turn.get("annotations"))) for turn in turns
    ]


def _messages(values: Mapping[str, Any]) -> tuple[str | None, list[Message]]:
    return row_id(values), [openai_message(turn) for turn in turns_of(values, "messages")]


def openai_message(turn: Mapping[str, Any]) -> Message:
    if turn.get("tool_calls") and not turn.get("content"):
        raise BadRow("an assistant turn holds only tool_calls; write the call into its content")
    reasoning = turn.get("reasoning_content") or turn.get("reasoning")
    return message_of(turn.get("role"), _joined(turn.get("content")), reasoning, _annotations(turn.get("annotations")))


def _joined(content: object) -> object:
    """OpenAI content parts as one text; anything else is passed on for `text_of` to judge."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "input_text", "output_text"):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow(f"content part of type {kind!r}; only text parts can be trained on")
        texts.append(text_of(part.get("text"), "content part"))
    return "".join(texts)


def _sharegpt(values: Mapping[str, Any]) -> tuple[str | None, list[Message]]:
    turns = turns_of(values, "conversations")
    messages = [message_of(turn.get("from", turn.get("role")), turn.get("value", turn.get("content")), None, None) for turn in turns]
    return row_id(values), with_system(values, messages)


def _alpaca(values: Mapping[str, Any]) -> tuple[str | None, list[Message]]:
    messages = [*alpaca_prompt(values), message_of("assistant", values.get("output"), None, None)]
    return row_id(values), with_system(values, messages)


def alpaca_prompt(values: Mapping[str, Any]) -> list[Message]:
    """History and question of a row, without its system message."""
    messages: list[Message] = []
    history = values.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("history is no list of [question, answer] pairs")
        messages += [message_of("user", pair[0], None, None), message_of("assistant", pair[1], None, None)]
    question = text_of(values.get("instruction"), "instruction")
    extra = values.get("input") or ""
    question = f"{question}\n\n{text_of(extra, 'input')}" if extra else question
    return [*messages, message_of("user", question, None, None)]


def _labelled(values: Mapping[str, Any], label_column: str, config: DataConfig) -> tuple[str | None, list[Message]]:
    text = text_of(values.get(config.text_column), config.text_column)
    raw = values.get(label_column)
    label = text_of(str(raw) if isinstance(raw, int) and not isinstance(raw, bool) else raw, label_column).strip()
    if config.labels is not None and label not in config.labels:
        near = difflib.get_close_matches(label, config.labels, n=1, cutoff=0.0)
        raise BadRow(f"unknown label {label!r}; the nearest of the {len(config.labels)} allowed is {near[0]!r}")
    answer = Message(role="assistant", content=label.replace("_", " "), annotations=Annotations(intent=label))
    return row_id(values), [Message(role="user", content=text.strip()), answer]


def _faq(values: Mapping[str, Any], question: str, answer: str) -> tuple[str | None, list[Message]]:
    asked, said = (message_of(role, values.get(column), None, None) for role, column in (("user", question), ("assistant", answer)))
    return row_id(values), with_system(values, [asked, said])


_PARSERS: dict[Format, Parser] = {"annotated": _annotated, "messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca}


def row_id(values: Mapping[str, Any]) -> str | None:
    for name in ("conversation_id", "id"):
        if isinstance(values.get(name), str | int) and str(values[name]).strip():
            return text_of(str(values[name]), name)
    return None


def turns_of(values: Mapping[str, Any], column: str) -> list[Mapping[str, Any]]:
    turns = values.get(column)
    if isinstance(turns, str):  # a CSV cell
        turns = _json(turns, column)
    if not isinstance(turns, list):
        raise BadRow(f"{column} is {named(turns)}, not a list of turns")
    if not turns:
        raise BadRow(f"{column} is empty")
    for position, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise BadRow(f"turn {position} is {named(turn)}, not an object")
    return turns


def _json(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} is no JSON: {error}") from error


def with_system(values: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = values.get("system") or values.get("system_prompt")
    return [message_of("system", system, None, None), *messages] if system else messages


def message_of(role: object, text: object, reasoning: object, annotations: Annotations | None) -> Message:
    """One turn. In assistant text `<think>...</think>` becomes the reasoning; R1's outputs often lack the opening tag."""
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise BadRow(f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    content = text_of(text, f"{known} turn")
    thought = text_of(reasoning, "reasoning") if reasoning else None
    if known == "assistant" and thought is None and "</think>" in content:
        thought, content = split(content, "<think>" not in content)
        if not content.strip():
            raise BadRow("assistant turn with nothing after its reasoning")
    return Message(role=known, content=content, reasoning=thought, annotations=annotations)


def text_of(value: object, what: str) -> str:
    if value is None:
        raise BadRow(f"{what} without text")
    if not isinstance(value, str):
        raise BadRow(f"{what} is {named(value)}, not text")
    if not value.strip():
        raise BadRow(f"{what} with empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} holds half a surrogate pair at character {error.start}") from error
    return value


def _annotations(value: object) -> Annotations | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise BadRow(f"annotations is {named(value)}, not an object")
    intent = value.get("intent")
    if intent is not None:
        intent = text_of(intent, "intent")
    entities = value.get("entities")
    if isinstance(entities, str):  # our own Parquet schema stores them as JSON
        entities = _json(entities, "entities")
    if entities is not None and not isinstance(entities, Mapping):
        raise BadRow(f"entities is {named(entities)}, not an object")
    kept = {str(name): _entity(str(name), entity) for name, entity in (entities or {}).items() if entity is not None}
    return None if intent is None and entities is None else Annotations(intent=intent, entities=kept)


def _entity(name: str, value: object) -> EntityValue:
    if isinstance(value, str):
        return text_of(value, f"entity {name}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"entity {name} is {value}, no number")
    if not isinstance(value, bool | int | float):
        raise BadRow(f"entity {name} is {named(value)}; give text, a number or true/false")
    return value


def named(value: object) -> str:
    name = type(value).__name__
    return "missing" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
