"""A corpus that does not fit into memory -> the token set that training reads, by a Ray Data pipeline over the cluster.

    slices of files --read, check--> dialogues --tokenise--> token rows --this process, in order--> shards

Reading and tokenising are tasks on any node; blocks of a few MiB go from one to the other, and Ray holds back readers that run ahead.
Rows arrive here in the order of the files: ids are judged, rows counted and shards written as if one process had read them, so the token
set is that of `tokens.tokenise`. It runs before any worker of the training starts, once per files, tokenizer and template.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import pickle
import shutil
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from r1ray import cluster
from r1ray.data.config import DataConfig
from r1ray.data.lines import MIB
from r1ray.data.prepare.plan import MIX_KEY
from r1ray.data.read import read_slice, survey_conversations
from r1ray.data.reading import NUM_SHOWN, Ids, check_share
from r1ray.data.records import BadRow, RawRow, Reject, SlicedRow
from r1ray.data.schema import canonical, content_digest, from_canonical
from r1ray.data.slices import SLICE_BYTES, Slice, Survey
from r1ray.data.split import stem_hash
from r1ray.errors import InvalidValue, R1RayError
from r1ray.model.load import training_tokenizer
from r1ray.settings import Settings
from r1ray.train import shards
from r1ray.train.tokens import FORMAT, Encoder, TokenSet, check_tokens, described, remove_damaged, tokenizer_hash
from r1ray.types import Artifact

if TYPE_CHECKING:
    from ray.data import DataContext

__all__ = ["Corpus", "Recipe", "read_corpus"]

REJECTS = "rejects.jsonl"
BLOCK_BYTES = 4 * MIB
"""Of text between reading and tokenising: some thousand dialogues, a few seconds of one core."""
_READ_CPUS, _TOKENISE_CPUS = 0.5, 1.0  # different, so that Ray Data does not make one task of both: one large CSV is read by one task
_SHOWN_REFUSALS = 3
_TELL_EVERY_S = 10.0
_READING = {"format", "text_column", "label_column", "question_column", "answer_column", "labels", "role_order"}  # of DataConfig
_ROW = (
    pa.field("slice", pa.int32()),
    pa.field("file", pa.string()),
    pa.field("row", pa.int64()),
    pa.field("id", pa.string()),
    pa.field("names_itself", pa.bool_()),
    shards.ORIGIN,
    pa.field("source", pa.string()),
    pa.field("reason", pa.string()),  # why it is no dialogue
    pa.field("role", pa.string()),
    pa.field("chars", pa.int64()),
    pa.field("failure", pa.binary()),  # a pickled error that ends the job: raised in a task, Ray would hide it in its own
)
_DIALOGUES = pa.schema([*_ROW, pa.field("turns", pa.binary())])
_TOKENISED = pa.schema(
    [
        *_ROW,
        *shards.TOKENS,
        pa.field("length", pa.int32()),  # 0: no assistant turn ends within the limit
        pa.field("num_tokens", pa.int32()),  # before the cut
        pa.field("digest", pa.binary()),
    ]
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A corpus that was read; `data_hash` is that of the same rows in memory, and `origins` their `split.origins_digest`."""

    tokens: TokenSet
    data_hash: str
    origins: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How rows become tokens. `mix` is the plan stored in a prepared file, whose rows then say what they count as."""

    data: DataConfig
    base: Artifact
    max_length: int
    mix: str | None

    def key(self, digest: str) -> str:
        """Of the token set of the files with that digest."""
        reading = self.data.model_dump(mode="json", include=_READING)
        made = [tokenizer_hash(self.base), self.base.manifest.template.sha256, self.data.system_prompt, self.max_length, self.mix]
        return hashlib.sha256(json.dumps(["corpus", FORMAT, digest, reading, *made]).encode()).hexdigest()[:24]

    def encoder(self) -> Encoder:
        return Encoder(tokenizer=training_tokenizer(self.base), system_prompt=self.data.system_prompt, max_length=self.max_length)


def read_corpus(recipe: Recipe, settings: Settings, *, slice_bytes: int = SLICE_BYTES) -> Corpus:
    """The corpus of `recipe.data`, from the cache or tokenised now.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
        TooManyBadRows: more than `data.max_bad_share` of the rows are invalid or too long; `data.rejects` is written before.
        ClusterTooSmall: the cluster can never run a reader beside a tokeniser.
        DiskFull: the cache has no room for the tokens.
    """
    data = recipe.data
    surveyed = survey_conversations(data, slice_bytes)
    place = settings.cache / "tokens" / recipe.key(surveyed.digest)
    if shards.counts(place) is not None:
        _log.info("tokens from the cache: %s", place)
    else:
        remove_damaged(place)
        _tokenise(surveyed, recipe, place, settings)
    counted = shards.counts(place)
    assert counted is not None, "written or found whole"
    if data.rejects is not None:
        _copy(place / REJECTS, settings.place(data.rejects))
    num_read, num_invalid, tokens = counted["read"], counted["invalid"], described(place)
    check_share(num_read, num_invalid, [Reject(**reject) for reject in counted["first"]], data)
    check_tokens(tokens, num_rows=num_read, num_invalid=num_invalid, data=data, max_length=recipe.max_length)
    return Corpus(tokens=tokens, data_hash=counted["data_hash"], origins=counted["origins"])


def _tokenise(surveyed: Survey, recipe: Recipe, place: Path, settings: Settings) -> None:
    metadata = {} if recipe.mix is None else {MIX_KEY: recipe.mix}
    with (
        shards.replacing(place) as unfinished,
        (unfinished / REJECTS).open("w", encoding="utf-8") as rejects,
        shards.ShardWriter(unfinished, is_mixed=recipe.mix is not None) as writer,
    ):
        collector = _Collector(writer, rejects, surveyed, recipe)
        with closing(_blocks(surveyed, recipe, settings)) as blocks:
            for block in blocks:
                collector.take(block)
        writer.close(collector.counted(), metadata)
    collector.tell("done")


def _blocks(surveyed: Survey, recipe: Recipe, settings: Settings) -> Generator[pa.Table, None, None]:
    """Tables of `_TOKENISED` in the order of the files."""
    found = cluster.connect(settings, num_cpus=max(4, os.cpu_count() or 1))
    cluster.check_placement(found, [{"CPU": 1.0}] * 2, wanted_by="data.backend=ray", remedy="Set data.backend=arrow")
    import ray.data

    stored = pickle.dumps(recipe)
    with ray.data.DataContext.current(_context()):
        slices = [{"number": number, "slice": pickle.dumps(piece)} for number, piece in enumerate(surveyed.slices)]
        tokenised = (
            ray.data.from_items(slices, override_num_blocks=len(slices))
            .map_batches(_read, batch_size=1, batch_format="pyarrow", num_cpus=_READ_CPUS, fn_kwargs={"stored": stored})
            .map_batches(_encode, batch_size=None, batch_format="pyarrow", num_cpus=_TOKENISE_CPUS, fn_kwargs={"stored": stored})
        )
        yield from tokenised.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _context() -> DataContext:
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False  # a line for every redraw in a job's log; the collector tells instead
    context.print_on_execution_start = False
    return context


# --- on any node


def _read(slices: pa.Table, stored: bytes) -> Iterator[pa.Table]:
    """Tables of `_DIALOGUES`: every row of the slices, in order."""
    recipe = _recipe(stored)
    for given in slices.to_pylist():
        rows: list[dict[str, Any]] = []
        num_bytes = 0
        piece: Slice = pickle.loads(given["slice"])
        try:
            for row in read_slice(piece, recipe.data):
                rows.append({"slice": given["number"], **_dialogue(row, recipe.mix is not None)})
                num_bytes += len(rows[-1].get("turns") or b"")
                if num_bytes > BLOCK_BYTES // 4:
                    yield pa.Table.from_pylist(rows, schema=_DIALOGUES)
                    rows, num_bytes = [], 0
        except R1RayError as error:
            rows.append({"failure": pickle.dumps(error)})
        except OSError as error:
            told = f"{piece.path} cannot be read on {socket.gethostname()}: {error}. Put data.path where all nodes find it under one name."
            rows.append({"failure": pickle.dumps(InvalidValue(told))})
        if rows:
            yield pa.Table.from_pylist(rows, schema=_DIALOGUES)


def _dialogue(row: SlicedRow, is_mixed: bool) -> dict[str, Any]:
    place = {"file": row.raw.file, "row": row.raw.row}
    if isinstance(row.found, BadRow):
        return {**place, "reason": str(row.found)}
    found = row.found
    counts_as = {"role": str(row.raw.values["role"]), "chars": int(row.raw.values["chars"])} if is_mixed else {}
    turns = canonical(found).encode("utf-8", "surrogatepass")
    named = {"id": found.id, "names_itself": row.names_itself, "origin": stem_hash(found.id)}
    return {**place, **counts_as, **named, "source": found.source, "turns": turns}


def _encode(dialogues: pa.Table, stored: bytes) -> pa.Table:
    """`_TOKENISED` rows, one for each row."""
    try:
        encoder = _encoder(stored)
        rows = [_encoded(encoder, turns) for turns in dialogues["turns"].to_pylist()]
    except R1RayError as error:
        return pa.Table.from_pylist([{"failure": pickle.dumps(error)}], schema=_TOKENISED)
    added = pa.Table.from_pylist(rows, schema=pa.schema(list(_TOKENISED)[len(_ROW) :]))
    return pa.table([*(dialogues[field.name] for field in _ROW), *added.columns], schema=_TOKENISED)


def _encoded(encoder: Encoder, turns: bytes | None) -> dict[str, Any]:
    if turns is None:
        return {}
    text = turns.decode("utf-8", "surrogatepass")
    ids, mask, num_tokens = encoder.encode(from_canonical(text))
    return {"input_ids": ids, "mask": mask, "length": len(ids), "num_tokens": num_tokens, "digest": content_digest(text)}


@functools.lru_cache(maxsize=4)
def _recipe(stored: bytes) -> Recipe:
    recipe: Recipe = pickle.loads(stored)
    return recipe


@functools.lru_cache(maxsize=4)
def _encoder(stored: bytes) -> Encoder:
    """A process' tasks share the tokenizer."""
    return _recipe(stored).encoder()


# --- in the driver


class _Collector:
    """Sees every row in order: judges ids, counts, passes on what is to be trained on."""

    def __init__(self, writer: shards.ShardWriter, rejects: IO[str], surveyed: Survey, recipe: Recipe) -> None:
        self._writer, self._rejects, self._recipe = writer, rejects, recipe
        self._ends = [0]  # bytes before each slice
        for piece in surveyed.slices:
            self._ends.append(self._ends[-1] + piece.num_bytes)
        self._ids, self._digest, self._origins = Ids(), hashlib.sha256(), hashlib.sha256()
        self._first: list[Reject] = []
        self._num_read = self._num_invalid = self._num_shortened = self._num_refused = self._slice = 0
        self._began = self._told = time.monotonic()

    def take(self, block: pa.Table) -> None:
        light = block.drop_columns(shards.TOKENS.names).to_pylist()
        is_kept = pa.array([self._judge(row) for row in light], type=pa.bool_())
        self._slice = light[-1]["slice"] if light else self._slice
        self._writer.append(block.filter(is_kept))
        if time.monotonic() - self._told > _TELL_EVERY_S:
            self._told = time.monotonic()
            self.tell(f"{self._ends[self._slice] / max(1, self._ends[-1]):.0%} of {self._ends[-1] / MIB:,.0f} MiB")

    def counted(self) -> dict[str, Any]:
        """For the set's metadata, from which a later job judges the corpus without reading it."""
        return {
            "read": self._num_read,
            "invalid": self._num_invalid,
            "first": [asdict(reject) for reject in self._first],
            "shortened": self._num_shortened,
            "rejected": self._num_refused,
            "data_hash": self._digest.hexdigest(),
            "origins": self._origins.hexdigest(),
        }

    def tell(self, how_far: str) -> None:
        seconds = time.monotonic() - self._began
        speed = f"{self._num_read / max(seconds, 1e-9):,.0f} rows/s"
        bad = f", {self._num_invalid} invalid" if self._num_invalid else ""
        _log.info("tokenising by Ray Data: %s, %s rows in %.0f s (%s)%s", how_far, f"{self._num_read:,}", seconds, speed, bad)

    def _judge(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is to be trained on."""
        if row["failure"] is not None:
            error: R1RayError = pickle.loads(row["failure"])
            raise error
        self._num_read += 1
        reason = row["reason"] or self._clash(row)
        if reason is not None:
            self._reject(Reject(file=row["file"], row=row["row"], reason=reason))
            return False
        self._digest.update(row["digest"])
        self._origins.update(row["origin"].to_bytes(8, "little"))
        if not row["length"]:
            self._num_refused += 1
            if self._num_refused <= _SHOWN_REFUSALS:
                _log.warning("%s", self._recipe.encoder().refusal(row["source"] or row["id"], row["num_tokens"]))
            return False
        self._num_shortened += row["length"] < row["num_tokens"]
        return True

    def _clash(self, row: Mapping[str, Any]) -> str | None:
        """Why the row's id cannot be its own."""
        raw = RawRow(file=row["file"], row=row["row"], values={})
        try:
            self._ids.unique(row["id"] if row["names_itself"] else None, lambda: str(row["id"]), raw)
        except BadRow as bad:
            return str(bad)
        return None

    def _reject(self, reject: Reject) -> None:
        self._num_invalid += 1
        self._rejects.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")
        if len(self._first) < NUM_SHOWN:
            self._first.append(reject)


def _copy(file: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.copyfile(file, unfinished)
    unfinished.replace(out)
