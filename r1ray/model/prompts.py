"""A question with retrieved passages as one user turn, in the layout that DeepSeek-R1 was trained to cite from.

The layout is that of DeepSeek-R1's README, "Official Prompts": passages as `[webpage X begin]...[webpage X end]`, the date, rules,
the question last, citations as `[citation:X]`. The rules are in our words. `compact` keeps marks and question only, for models that
were trained on it (the demo) and for short contexts. R1 wants no system prompt, so all of it is the user's turn.

Knows no index and no model.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Literal

from r1ray.types import Passage

__all__ = ["CITATION", "Language", "detect_language", "with_passages"]

Language = Literal["zh", "en"]

CITATION = re.compile(r"\[citation:(\d+)\]")

_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")

_OFFICIAL: dict[Language, str] = {
    "en": """# Search results for the user's message:
{results}
Each result stands between [webpage X begin] and [webpage X end], where X is its number. Where a sentence of your answer rests on \
a result, end that sentence with [citation:X]; where it rests on several, list each, such as [citation:3][citation:5]. Put citations \
where they belong in the answer, not all together at its end.
Please keep in mind:
- Today is {date}.
- Not every result concerns the question: judge them, and use only what does.
- Keep lists to 10 points and long answers structured, in at most 5 sections.
- Say what the results say; do not dwell on what they leave out.
- Combine several results where they help, instead of citing the same one again and again.
- Answer in the language of the question, unless the user asks for another.

# The user's message:
{question}""",
    "zh": """# 与用户消息相关的搜索结果：
{results}
每条结果都写在[webpage X begin]和[webpage X end]之间，X是它的编号。回答中的句子如果依据某条结果，请在句末标注[citation:X]；\
依据多条结果时逐一列出，例如[citation:3][citation:5]。引用要放在答案的对应位置，不要全部堆在末尾。
回答时请注意：
- 今天是{date}。
- 并非每条结果都与问题有关，请加以判断，只用相关的内容。
- 列举时不超过10项；较长的回答请分段，最多5个部分。
- 只说搜索结果中有的内容，不必强调其中没有什么。
- 尽量综合多条结果，不要反复引用同一条。
- 除非用户另有要求，请使用与提问相同的语言回答。

# 用户消息：
{question}""",
}


def with_passages(
    question: str,
    passages: Sequence[Passage],
    *,
    language: Language | None = None,
    style: Literal["official", "compact"] = "official",
    today: datetime.date | None = None,
) -> str:
    """The user turn; `question` unchanged when there are no passages. Passage k is `[citation:k]`, counted from 1.

    `language` defaults to the question's. `today` (the current date by default) appears in the official style only.
    """
    if not passages:
        return question
    results = "\n".join(f"[webpage {k} begin]{passage.text}[webpage {k} end]" for k, passage in enumerate(passages, start=1))
    if style == "compact":
        return f"{results}\n{question}"
    chosen = language or detect_language(question)
    return _OFFICIAL[chosen].format(results=results, date=_date(today or datetime.date.today(), chosen), question=question)


def detect_language(text: str) -> Language:
    """zh when Chinese characters outnumber Latin words: "ATM限额多少" is Chinese, "what does 你好 mean" is English."""
    return "zh" if len(_CHINESE.findall(text)) > len(_LATIN_WORD.findall(text)) else "en"


def _date(day: datetime.date, language: Language) -> str:
    return f"{day.year}年{day.month}月{day.day}日" if language == "zh" else day.isoformat()
