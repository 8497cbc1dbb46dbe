"""The training twin of a chat template: renders every turn in full and marks the assistant's tokens.

A shipped template is made for generation. R1's deletes the reasoning from assistant turns, so training on it would delete the
target; and none marks which tokens the assistant said. Three ways to a twin, each checked by rendering both templates:
edit DeepSeek's shipped text (keeps its tool turns), or find the pieces around each turn by rendering probes and write a template
of the same pieces (ChatML, Llama-3 and every template that only joins turns). Otherwise there is none and training says so.
Works on template text only; knows no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1ray.errors import UnsupportedModel

__all__ = ["has_marks", "prefills_think", "training_twin"]

Turn = Mapping[str, str]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PREFILL = re.compile(r"<think>\s*$")

# Private-use characters stand for what a template inserts, so that they cannot be mistaken for its own text.
_BOS, _EOS = "\ue000", "\ue001"
_SYSTEM, _USER1, _ANSWER1, _USER2, _ANSWER2 = "\ue010\ue011\ue012\ue013\ue014"

_DEEPSEEK_EDITS = (
    (
        "{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}",
        "{{'<｜Assistant｜>'}}{% generation %}{{message['content'] + '<｜end▁of▁sentence｜>'}}{% endgeneration %}",
    ),
    (
        "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}",
        "{{'<｜tool▁outputs▁end｜>'}}{% generation %}{{message['content'] + '<｜end▁of▁sentence｜>'}}{% endgeneration %}",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """The text around the turns. `lead` opens a conversation without a system message."""

    lead: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    header: str
    end: str
    prompt: str
    trimmed: frozenset[str]


def has_marks(template: str) -> bool:
    """Whether the template says which tokens are the assistant's."""
    return bool(_MARKS.search(template))


def prefills_think(template: str) -> bool:
    """Whether the generation prompt ends with an opening `<think>`, so that the output starts inside the reasoning.

    Raises:
        UnsupportedModel: the template cannot be rendered at all.
    """
    text = _render(template, [_turn("user", "Hi")], generate=True)
    if text is None:
        raise UnsupportedModel("The chat template renders no conversation of one user message. Give a working one: chat_template=FILE.")
    return bool(_PREFILL.search(text))


def training_twin(infer: str) -> str | None:
    """The twin of `infer`, or None when none can be derived that renders the same conversations the same way."""
    if has_marks(infer):
        return infer
    candidates = (_edited(infer), _assembled(infer))
    return next((twin for twin in candidates if twin is not None and _agrees(infer, twin)), None)


def _edited(infer: str) -> str | None:
    if _DEEPSEEK_EDITS[0][0] not in infer:
        return None
    for shipped, marked in _DEEPSEEK_EDITS:
        infer = infer.replace(shipped, marked)
    return infer


def _assembled(infer: str) -> str | None:
    pieces = _pieces(infer)
    return None if pieces is None else _written(pieces)


def _pieces(infer: str) -> _Pieces | None:
    """Take two exchanges apart at their contents; None when the same piece is not the same text everywhere."""
    parts = _around(infer, "user assistant user assistant", _USER1, _ANSWER1, _USER2, _ANSWER2)
    prompt = _around(infer, "user", _USER1, generate=True)
    if parts is None or prompt is None or parts[1] != parts[3] or not parts[2].startswith(parts[4]):
        return None
    end, opening = parts[4], parts[2].removeprefix(parts[4])
    closing = _user_closing(infer, opening)
    if not parts[0].endswith(opening) or not parts[1].startswith(closing) or not prompt[1].startswith(parts[1]) or not end.strip():
        return None
    return _Pieces(
        lead=parts[0][: len(parts[0]) - len(opening)],
        system=_system(infer, opening),
        user=(opening, closing),
        header=parts[1].removeprefix(closing),
        end=end,
        prompt=prompt[1].removeprefix(closing),
        trimmed=frozenset(role for role in ("system", "user", "assistant") if _trims(infer, role)),
    )


def _user_closing(infer: str, opening: str) -> str:
    """What ends a user turn; empty where it cannot be told from the assistant's header (turns must alternate)."""
    parts = _around(infer, "user user", _USER1, _USER2)
    return parts[2] if parts is not None and parts[1] == parts[2] + opening else ""


def _system(infer: str, opening: str) -> tuple[str, str] | None:
    parts = _around(infer, "system user", _SYSTEM, _USER1)
    return (parts[0], parts[1].removesuffix(opening)) if parts is not None and parts[1].endswith(opening) else None


def _trims(infer: str, role: str) -> bool:
    roles = {"system": ["system", "user"], "user": ["user"], "assistant": ["user", "assistant"]}[role]
    text = _render(infer, [_turn(each, f"  {_SYSTEM}  " if each == role else "Hi") for each in roles])
    return text is not None and f"  {_SYSTEM}  " not in text


def _around(infer: str, roles: str, *contents: str, generate: bool = False) -> list[str] | None:
    """The texts before, between and after `contents`; None when a content is missing, doubled or out of order."""
    turns = [_turn(role, content) for role, content in zip(roles.split(), contents, strict=True)]
    text = _render(infer, turns, generate=generate)
    if text is None or any(text.count(content) != 1 for content in contents):
        return None
    parts = re.split("|".join(contents), text)
    return parts if [char for char in text if char in contents] == list(contents) else None


def _written(pieces: _Pieces) -> str:
    """A template of the pieces. White space after the end-of-turn token is outside the marks: generation stops at the token."""
    spoken = pieces.end.rstrip()
    tail = pieces.end[len(spoken) :]
    refuse = "{{- raise_exception('The training template has no place for a message of role ' ~ message['role']) }}"
    system = f"{{{{- {_join(pieces, 'system', *pieces.system)} }}}}" if pieces.system is not None else refuse
    return "".join(
        (
            "{#- Training twin: the same turns as chat_template.jinja, in full, with the assistant's tokens marked. -#}\n",
            "{%- if not messages or messages[0]['role'] != 'system' %}{{- " + _literal(pieces.lead) + " }}{%- endif -%}\n",
            "{%- for message in messages -%}\n",
            "{%- if message['role'] == 'system' and loop.first -%}" + system + "\n",
            "{%- elif message['role'] == 'user' -%}{{- " + _join(pieces, "user", *pieces.user) + " }}\n",
            "{%- elif message['role'] == 'assistant' -%}{{- " + _literal(pieces.header) + " }}",
            "{%- generation -%}{{- " + _join(pieces, "assistant", "", spoken) + " }}{%- endgeneration -%}{{- " + _literal(tail) + " }}\n",
            "{%- else -%}" + refuse + "\n",
            "{%- endif -%}\n{%- endfor -%}\n",
            "{%- if add_generation_prompt -%}{{- " + _literal(pieces.prompt) + " }}{%- endif -%}",
        )
    )


def _join(pieces: _Pieces, role: str, before: str, after: str) -> str:
    content = "message['content'] | trim" if role in pieces.trimmed else "message['content']"
    return f"{_literal(before)} ~ ({content}) ~ {_literal(after)}"


def _literal(text: str) -> str:
    """A Jinja expression that gives `text`, with the tokenizer's own begin and end tokens as variables."""
    names = {_BOS: "bos_token", _EOS: "eos_token"}
    parts = [part for part in re.split(f"([{_BOS}{_EOS}])", text) if part]
    return " ~ ".join(names.get(part) or json.dumps(part, ensure_ascii=False) for part in parts) or '""'


def _agrees(infer: str, twin: str) -> bool:
    """Whether both render the same text for conversations without reasoning, and each prompt begins its full conversation."""
    plain = [_turn("user", "Lost my card!"), _turn("assistant", '{"intent": "card_lost"}\n好的。'), _turn("user", "  Ok\n\nthen? ")]
    plain.append(_turn("assistant", " Done.\n"))
    conversations: list[Sequence[Turn]] = [plain[:2], plain]
    if _render(infer, [_turn("system", "Be brief."), *plain]) is not None:
        conversations.append([_turn("system", "Be brief.\n"), *plain])
    return all(_same(infer, twin, turns) for turns in conversations)


def _same(infer: str, twin: str, turns: Sequence[Turn]) -> bool:
    whole, trained = _render(infer, turns), _render(twin, turns)
    prompt = _render(infer, turns[:-1], generate=True)
    if whole is None or whole != trained or prompt is None:
        return False
    return trained.startswith(_PREFILL.sub("", prompt))


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _render(template: str, turns: Sequence[Turn], *, generate: bool = False) -> str | None:
    """What transformers would render; None when the template refuses these turns or is no template."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            [list(turns)], chat_template=template, add_generation_prompt=generate, bos_token=_BOS, eos_token=_EOS
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None  # templates are programs from elsewhere: whatever they raise, they do not render this
    return str(texts[0])
