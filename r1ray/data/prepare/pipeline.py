"""A whole preparation: files once through the cleaner into a spool, the spool through selection and augmentation into the set.

    result = prepare(config, settings)

Rows are held in batches; what grows with the set are the indexes (`Cleaner`) and 43 bytes a row (`Columns`). All files take their
places together at the end, or none does. Counts always add up: rows read + rows made = rows written + rows rejected.
"""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from r1ray.data.augment.rules import EntityPools
from r1ray.data.clean.quality import QualityModel, load, shipped
from r1ray.data.diversity import Embedder, diversity
from r1ray.data.prepare.cleaning import Cleaner
from r1ray.data.prepare.config import PrepareConfig, Role
from r1ray.data.prepare.documents import parse_documents, section_rows
from r1ray.data.prepare.marks import train_on_marks
from r1ray.data.prepare.progress import Progress
from r1ray.data.prepare.rows import KeptRow, Ledger, kept_table
from r1ray.data.prepare.sample import QuestionSample
from r1ray.data.prepare.selection import Columns
from r1ray.data.prepare.writing import SecondPass
from r1ray.data.read import stream
from r1ray.data.reading import SourceIds
from r1ray.data.records import ReadRow
from r1ray.data.schema import PREPARED
from r1ray.data.write import staging
from r1ray.errors import InvalidValue, NothingToTrain, TooManyBadRows
from r1ray.settings import Settings

__all__ = ["Prepared", "prepare"]

Source = tuple[str, Role, Iterator[ReadRow]]
"""Name, role, rows."""
_BY_DESIGN = ("balance", "mix")  # sound rows that are left out say nothing against the data


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Where everything is, and the figures of the report. `out` is None where only documents were parsed."""

    out: Path | None
    rejects: Path
    report: dict[str, Any]


def prepare(config: PrepareConfig, settings: Settings, *, embed: Embedder | None = None) -> Prepared:
    """Run it. `embed` turns questions into vectors for the diversity report; hashed n-grams without it.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a source as a whole cannot be read.
        TooManyBadRows: more than `max_reject_share` of the rows are bad; the rejects file is written all the same.
        DiskFull: no room; nothing is written.
    """
    out = _destination(config, settings)
    rejects = out.with_name(f"{out.stem}.rejects.jsonl")
    begin = time.monotonic()
    with staging(out.parent) as staged:
        with (staged / rejects.name).open("w", encoding="utf-8") as file:
            ledger = Ledger(file)
            report = _run(config, settings, staged / out.name, ledger, embed)
        failure = _failure(config, ledger, report, rejects)
        if failure is not None:
            (staged / out.name).unlink(missing_ok=True)
    if failure is not None:
        raise failure
    seconds = time.monotonic() - begin
    report |= {"seconds": round(seconds, 2), "rows_per_s": round(ledger.num_in.total() / seconds, 1), "peak_mb": _peak_mb()}
    return Prepared(out=out if "rows_out" in report else None, rejects=rejects, report=report)


def _destination(config: PrepareConfig, settings: Settings) -> Path:
    if not config.sources and not config.documents.sources:
        raise InvalidValue("Nothing to prepare. Set sources to dialogue files, documents.sources to documents, or both.")
    out = settings.place(config.out)
    if out.is_dir():
        raise InvalidValue(f"out={out} is a directory. Set it to the Parquet file to write.")
    read = [settings.locate(source.path).absolute() for source in config.sources]
    if out.absolute() in read:
        raise InvalidValue(f"out={out} is one of the sources. Set it to another file.")
    return out


def _run(config: PrepareConfig, settings: Settings, out: Path, ledger: Ledger, embed: Embedder | None) -> dict[str, Any]:
    """Write the set at `out` and the Markdown beside it; the figures."""
    documents = parse_documents(config.documents, out.parent / "documents", ledger, settings)
    figures: dict[str, Any] = {"documents": documents.summary()}
    sections = list(section_rows(documents)) if config.documents.dialogues else []
    if not config.sources and not sections:
        return {**figures, "sources": ledger.summary()}
    quality, marks = _quality(config, settings, out.parent / "quality.json")
    cleaner, columns, pools = Cleaner(config.clean, quality), Columns(config.seed), EntityPools()
    before = QuestionSample(config.diversity.sample, config.seed)
    ids, progress = SourceIds(), Progress(config.progress_s)
    spool = out.with_name(".spool.parquet")
    with pq.ParquetWriter(spool, PREPARED, compression="lz4") as writer:
        for kept, name in _cleaned(_sources(config, sections, ids), config.batch_rows, cleaner, ledger, progress):
            columns.add(kept, name)
            for row in kept:
                pools.add(row.conversation)
                before.add(row.conversation)
            if kept:
                writer.write_table(kept_table(kept))
    second = SecondPass(config, cleaner, columns, pools, ledger, ids)
    figures |= second.run(spool, out, progress)
    spool.unlink()
    return {
        "rows_in": ledger.num_in.total(),
        **figures,
        "rows_rejected": ledger.num_dropped,
        "sources": ledger.summary(),
        "diversity": {"cleaned": diversity(before.questions, embed), "written": second.diversity(embed)},
        "pii": dict(cleaner.masker.counts) if cleaner.masker else {},
        "quality": marks,
        "index_mb": round(cleaner.index_bytes / 2**20, 1),
    }


def _quality(config: PrepareConfig, settings: Settings, path: Path) -> tuple[QualityModel | None, dict[str, float]]:
    quality = config.clean.quality
    if quality is None:
        return None, {}
    if quality.marks is not None:
        return train_on_marks(quality, settings, path, seed=config.seed)
    return load(settings.locate(quality.model)) if quality.model is not None else shipped(), {}


def _cleaned(
    sources: Iterator[Source], batch_rows: int, cleaner: Cleaner, ledger: Ledger, progress: Progress
) -> Iterator[tuple[list[KeptRow], str]]:
    """(kept rows, source) batch by batch over every source; the dropped rows go into the ledger."""
    for name, role, rows in sources:
        while batch := list(itertools.islice(rows, batch_rows)):
            ledger.read(name, len(batch))
            kept, dropped = cleaner.clean(batch, role)
            for row in dropped:
                ledger.drop(name, row)
            yield kept, name
            progress.at(ledger.num_in.total(), ledger.num_dropped, "cleaning")


def _sources(config: PrepareConfig, sections: list[ReadRow], ids: SourceIds) -> Iterator[Source]:
    """Ids are unique over all of them; so each is to be read to its end before the next."""
    for source in config.sources:
        ids.begin()
        yield str(source.path), source.role, stream(source.data(), ids)
    if sections:
        yield "documents", "domain", (_named(row, ids) for row in sections)


def _named(row: ReadRow, ids: SourceIds) -> ReadRow:
    """A section, whose id another document of the same name may have used."""
    assert row.conversation is not None, "sections are dialogues"
    return replace(row, conversation=replace(row.conversation, id=ids.made(row.conversation.id)))


def _failure(config: PrepareConfig, ledger: Ledger, report: dict[str, Any], rejects: Path) -> TooManyBadRows | NothingToTrain | None:
    num_in, num_dropped = ledger.num_in.total(), ledger.num_dropped
    if "rows_out" not in report:
        return None
    steps = {step: sum(counts[step] for counts in ledger.dropped.values()) for counts in ledger.dropped.values() for step in counts}
    shown = ", ".join(f"{number} {step}" for step, number in sorted(steps.items(), key=lambda pair: -pair[1]))
    num_bad = num_dropped - sum(counts[step] for counts in ledger.dropped.values() for step in _BY_DESIGN)
    if num_bad > config.max_reject_share * num_in:
        return TooManyBadRows(
            f"{num_bad} of {num_in} rows are bad ({shown}), more than max_reject_share={config.max_reject_share:g} allows. "
            f"Each is in {rejects} with its reason. Mend them, loosen the rule, or raise the share."
        )
    if not report["rows_out"]:
        return NothingToTrain(f"No row is left of {num_in} ({shown}). Each is in {rejects} with its reason.")
    return None


def _peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
