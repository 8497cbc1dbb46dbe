"""The second pass: the spool through selection and augmentation into the set, batch by batch."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1ray.data.augment.augmenter import Augmenter
from r1ray.data.augment.provenance import Made
from r1ray.data.augment.rules import EntityPools
from r1ray.data.clean.language import language_of
from r1ray.data.diversity import Embedder, diversity
from r1ray.data.prepare.cleaning import Cleaner
from r1ray.data.prepare.config import PrepareConfig
from r1ray.data.prepare.plan import Walk, coverage, mix_plan
from r1ray.data.prepare.progress import Progress
from r1ray.data.prepare.rows import KeptRow, Ledger, made_table, rejected
from r1ray.data.prepare.sample import QuestionSample
from r1ray.data.prepare.selection import Columns, Selection
from r1ray.data.reading import SourceIds
from r1ray.data.schema import PREPARED, SCHEMA, canonical, from_table

__all__ = ["SecondPass"]

_LEAST_OUT_OF_DOMAIN = 0.1  # seed 004: 10-15 %
_log = logging.getLogger(__name__)


class SecondPass:
    """Takes what the first pass knows; `run` writes the set."""

    def __init__(
        self, config: PrepareConfig, cleaner: Cleaner, columns: Columns, pools: EntityPools, ledger: Ledger, ids: SourceIds
    ) -> None:
        self._config = config
        self._cleaner = cleaner
        self._columns = columns
        self._ledger = ledger
        self._ids = ids
        self._augmenter = Augmenter(config.augment, seed=config.seed, pools=pools)
        self._selection = self._selected()
        self._sample = QuestionSample(config.diversity.sample, config.seed)
        self._roles: Counter[str] = Counter()
        self._languages: Counter[str] = Counter()
        self._chars = array("I")
        self._made_texts: set[int] = set()
        self._num_repeated = 0
        self._drawn_from = hashlib.sha256()

    def run(self, spool: Path, out: Path, progress: Progress) -> dict[str, Any]:
        """The set at `out`, the rejects in the ledger; the figures about the set."""
        size = self._config.batch_rows
        with pq.ParquetWriter(out, PREPARED, compression="zstd") as writer:
            offset = 0
            for batch in pq.ParquetFile(spool).iter_batches(batch_size=size):
                table = pa.Table.from_batches([batch])
                alive = self._selection.alive[offset : offset + len(table)]
                self._reject(table, np.flatnonzero(~alive), offset)
                kept = table.filter(pa.array(alive))
                self._write(writer, kept)
                self._write(writer, self._made(kept))
                offset += len(table)
                progress.at(self._ledger.num_in.total(), self._ledger.num_dropped, f"writing {offset:,} of {len(self._columns):,}")
            self._write(writer, self._taken(self._augmenter.grown()))
            writer.add_key_value_metadata(mix_plan(self._config.mix, self._drawn_from.hexdigest()).metadata())
        self._warn()
        return {
            "rows_made": self._augmenter.made.total(),
            "rows_out": self._roles.total(),
            "made": dict(self._augmenter.made),
            "not_made": {**self._augmenter.failed, **({"repeats_a_row": self._num_repeated} if self._num_repeated else {})},
            "roles": dict(self._roles),
            "languages": dict(self._languages),
            "num_intents": len(self._columns.intents),
            "median_chars": int(np.median(self._chars)) if self._chars else 0,
            **self._epoch(out),
        }

    def diversity(self, embed: Embedder | None) -> dict[str, float]:
        """Of the questions that were written."""
        return diversity(self._sample.questions, embed)

    def _selected(self) -> Selection:
        config = self._config
        selection = Selection(self._columns)
        selection.settle(self._cleaner.conflicts())
        selection.balance(config.balance)
        num_domain = selection.num("domain")
        num_made = self._augmenter.plan(num_domain, int(selection.alive.sum()) - num_domain)
        selection.mix(config.mix, num_made)
        return selection

    def _reject(self, table: pa.Table, gone: Iterable[int], offset: int) -> None:
        gone = list(gone)
        dialogues = from_table(table.select(SCHEMA.names).take(pa.array(gone, pa.int64())))
        for place, conversation in zip(gone, dialogues, strict=True):
            number = offset + int(place)
            file, line = self._columns.places.at(number)
            row = KeptRow(conversation=conversation, role="domain", language="", badness=None, file=file, row=line)
            self._ledger.drop(self._columns.source(number), rejected(row, *self._selection.reasons[number]))

    def _made(self, kept: pa.Table) -> pa.Table:
        if not self._config.augment.operations:
            return PREPARED.empty_table()
        domain = from_table(kept.filter(pc.equal(kept["role"], "domain")).select(SCHEMA.names))
        return self._taken(self._augmenter.augment(domain))

    def _taken(self, made: Iterable[Made]) -> pa.Table:
        """The made rows that repeat no row of the set and no other made row."""
        taken = []
        for row in made:
            key = hash(canonical(row.conversation))
            if key in self._made_texts or self._cleaner.seen([row.conversation])[0]:
                self._num_repeated += 1
                continue
            self._made_texts.add(key)
            self._augmenter.count(row)
            taken.append(replace(row, conversation=replace(row.conversation, id=self._ids.made(row.conversation.id))))
        return made_table(taken, [language_of("\n".join(m.content for m in row.conversation.messages)) for row in taken])

    def _write(self, writer: pq.ParquetWriter, table: pa.Table) -> None:
        if not len(table):
            return
        writer.write_table(table)
        roles = table["role"].to_pylist()
        self._roles.update(roles)
        self._drawn_from.update("".join(f"{role}\n" for role in roles).encode())
        self._languages.update(table["language"].to_pylist())
        self._chars.extend(table["chars"].to_pylist())
        self._sample.add_table(table)

    def _epoch(self, out: Path) -> dict[str, Any]:
        """What one epoch by the mix plan draws; with stages of its own that depends on the size of a batch, which is the training's."""
        if not self._roles or self._config.mix.stages is not None:
            return {}
        walk = Walk(out, batch_size=self._roles.total(), seed=self._config.seed)
        found = coverage(walk.take(self._roles.total()), self._roles.total())
        if found.num_missed:
            _log.warning("mix: in an epoch %s", found.told)
        return {"short_chars": walk.short_chars, "epoch": {"rows_not_drawn": found.num_missed, "rows_drawn_again": found.num_repeated}}

    def _warn(self) -> None:
        """What the seeds ask for and the data cannot give."""
        total, others = self._roles.total(), self._roles["out_of_domain"]
        if others and others < _LEAST_OUT_OF_DOMAIN * total:
            _log.warning("out-of-domain rows are %.1f %% of the set, less than 10 %%: their source is too small", 100 * others / total)
        if total and self._roles["domain"] < self._config.mix.domain_share * total:
            _log.warning(
                "domain rows are %.0f %% of the file, less than mix.domain_share=%g; the mix plan draws them as often as that all the same",
                100 * self._roles["domain"] / total,
                self._config.mix.domain_share,
            )
