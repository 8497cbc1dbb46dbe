"""A teacher's answers to the questions of a data set, written once through the engine and kept as Parquet with their provenance.

Runs in the driver. Each answer is kept as soon as it is there, so a job that is submitted again asks only what is missing.
The last answer of each dialogue is replaced by the teacher's; its reasoning comes with it. They are kept by text and place, not by id: the
same questions under other ids need no second answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from r1ray.data.read import Loaded
from r1ray.data.schema import data_hash
from r1ray.engine.config import EngineConfig
from r1ray.engine.create import create_engine
from r1ray.engine.offline import Completion, generate_all
from r1ray.engine.protocol import GenerationRequest
from r1ray.errors import NothingToTrain
from r1ray.model.load import load_tokenizer
from r1ray.model.reasoning import split
from r1ray.model.template import prompt_ids, read
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train.config import FinetuneConfig
from r1ray.train.prompts import last_answer
from r1ray.types import Artifact, Conversation, Message, Sampling

__all__ = ["taught_by"]

_FORMAT = 2  # of the cache; raise it when the meaning of a column changes
_NUM_SLOTS = 32
_SCHEMA = pa.schema([("number", pa.int64()), ("answer", pa.string()), ("reasoning", pa.string()), ("finish_reason", pa.string())])
_log = logging.getLogger(__name__)

Row = dict[str, str | int | None]
"""`number` counts the dialogues that ask something."""


def taught_by(teacher: Artifact, loaded: Loaded, config: FinetuneConfig, settings: Settings) -> Loaded:
    """The dialogues with the teacher's last answer; those that it did not finish within `max_new_tokens` are left out, counted.

    Raises:
        NothingToTrain: no answer is left.
    """
    asked = [conversation for conversation in loaded.conversations if last_answer(conversation)]
    path = settings.cache / "answers" / f"{_key(teacher, loaded, config)}.parquet"
    if path.exists():
        _log.info("answers of %s from the cache: %s", teacher.ref, path)
    else:
        _write(asked, teacher, config, settings, path)
    rows = zip(asked, pq.read_table(path).to_pylist(), strict=True)
    taught = tuple(_answered(one, row) for one, row in rows if row["finish_reason"] == "stop" and row["answer"].strip())
    if not taught:
        raise NothingToTrain(
            f"{teacher.ref} finished none of {len(asked)} answers within train.distill.max_new_tokens="
            f"{config.train.distill.max_new_tokens}. Raise that, or choose another teacher."
        )
    if len(taught) < len(loaded.conversations):
        _log.warning("%d of %d questions have no finished answer of %s", len(loaded.conversations) - len(taught), len(asked), teacher.ref)
    return replace(loaded, conversations=taught, data_hash=data_hash(taught))  # the tokens are of these very texts


def _write(asked: list[Conversation], teacher: Artifact, config: FinetuneConfig, settings: Settings, path: Path) -> None:
    unfinished = path.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _kept(unfinished)
    _log.info("%s answers %d questions%s", teacher.ref, len(asked) - len(done), f" ({len(done)} are answered)" if done else "")
    with unfinished.open("a", encoding="utf-8") as file:
        _answer(asked, done, teacher, config, settings, file)
    provenance = {
        "teacher": teacher.ref,
        "weights_sha256": teacher.manifest.weights_sha256,
        "sampling": _sampling(config).model_dump(mode="json"),
        "system_prompt": config.data.system_prompt,
        "data": str(config.data.path),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows = [done[number] for number in range(len(asked))]
    table = pa.Table.from_pylist(rows, _SCHEMA.with_metadata({"r1ray": json.dumps(provenance, ensure_ascii=False)}))
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, hidden, compression="zstd")
    hidden.rename(path)
    unfinished.unlink()


def _kept(unfinished: Path) -> dict[int, Row]:
    """Number -> row, of the whole lines that an ended job has left; a line that it was killed in is cut off."""
    if not unfinished.exists():
        return {}
    written = unfinished.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    os.truncate(unfinished, len(whole))
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["number"]: row for row in rows}


def _answer(
    asked: list[Conversation], done: dict[int, Row], teacher: Artifact, config: FinetuneConfig, settings: Settings, file: TextIO
) -> None:
    """Put what is missing into `done` and into the file, answer by answer."""
    engine = create_engine(teacher, EngineConfig(num_slots=_NUM_SLOTS), Registry(settings))
    tokenizer, sampling, thinks = load_tokenizer(teacher), _sampling(config), read(teacher).thinks
    requests = [
        GenerationRequest(
            id=str(number),
            prompt_ids=tuple(
                prompt_ids(tokenizer, conversation.messages[: last_answer(conversation)], system_prompt=config.data.system_prompt)
            ),
            sampling=sampling.model_copy(update={"seed": config.train.seed + number}),
        )
        for number, conversation in enumerate(asked)
        if number not in done
    ]

    def on_done(one: Completion) -> None:
        reasoning, answer = split(tokenizer.decode(one.token_ids, skip_special_tokens=True), thinks)
        number = int(one.request_id)
        done[number] = {"number": number, "answer": answer, "reasoning": reasoning, "finish_reason": one.finish_reason}
        file.write(json.dumps(done[number], ensure_ascii=False) + "\n")
        file.flush()
        if len(done) % 100 == 0:
            _log.info("%d of %d questions answered", len(done), len(asked))

    try:
        generate_all(engine, requests, on_done)
    finally:
        asyncio.run(engine.stop())


def _sampling(config: FinetuneConfig) -> Sampling:
    settings = config.train.distill
    return Sampling(temperature=settings.sample_temperature, max_tokens=settings.max_new_tokens, seed=config.train.seed)


def _answered(conversation: Conversation, row: dict[str, str]) -> Conversation:
    end = last_answer(conversation)
    said = Message(role="assistant", content=row["answer"], reasoning=row["reasoning"])
    return replace(conversation, messages=(*conversation.messages[:end], said))


def _key(teacher: Artifact, loaded: Loaded, config: FinetuneConfig) -> str:
    asked = [_FORMAT, data_hash(loaded.conversations), config.data.system_prompt, _sampling(config).model_dump(mode="json")]
    parts = [*asked, teacher.manifest.weights_sha256, teacher.manifest.template.sha256]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
