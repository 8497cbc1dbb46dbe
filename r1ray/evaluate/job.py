"""What jobs/evaluate.py runs: every model in turn, a table, a JSON report, an MLflow run and registry tags per model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1ray.data.read import read_conversations
from r1ray.errors import EvaluationError
from r1ray.evaluate.config import EvaluateConfig
from r1ray.evaluate.runner import evaluate
from r1ray.evaluate.scoring import check_metrics
from r1ray.evaluate.summary import METRICS, by_group
from r1ray.evaluate.table import show
from r1ray.observe.tracking import Run
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.types import Artifact, Conversation, Report

__all__ = ["evaluate_models"]

EXPERIMENT = "evaluate"

log = logging.getLogger(__name__)


def evaluate_models(config: EvaluateConfig, settings: Settings | None = None) -> list[Report]:
    """One report per model of `config.models`, in that order.

    Raises:
        EvaluationError: no model is named, or the data cannot be scored.
    """
    if not config.models:
        raise EvaluationError("No model to evaluate. Name at least one, e.g. 'models=[smollm2-135m-instruct]'.")
    settings = settings or Settings()
    registry = Registry(settings)
    artifacts = [registry.resolve(ref) for ref in config.models]  # a wrong name fails before the first model is loaded
    conversations = _conversations(config)
    wanted = config.metrics
    if wanted is not None and (missing := check_metrics(wanted, conversations, where="metrics", of=str(config.data.path))):
        log.warning("metrics: %s left out, since the gold answers of %s do not allow it", ", ".join(missing), config.data.path)
    reports = [_one(artifact, conversations, config, registry, settings) for artifact in artifacts]
    show(reports)
    named = config.out or Path(f"reports/evaluate-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}.json")
    path = _write(reports, config, settings.place(named))
    print(f"report: {path}", flush=True)
    return reports


def _conversations(config: EvaluateConfig) -> Sequence[Conversation]:
    limits = [n for n in (config.limit, config.data.limit) if n is not None]
    loaded = read_conversations(config.data.model_copy(update={"limit": min(limits, default=None)}))
    for reject in loaded.rejects[:5]:
        log.warning("left out %s row %s: %s", reject.file, reject.row, reject.reason)
    return loaded.conversations


def _one(
    artifact: Artifact, conversations: Sequence[Conversation], config: EvaluateConfig, registry: Registry, settings: Settings
) -> Report:
    with Run(EXPERIMENT, artifact.ref, settings=settings) as run:
        run.log_params({"model": artifact.ref, **config.model_dump(mode="json", exclude={"models"})})
        report = evaluate(artifact, conversations, config, registry=registry)
        run.log_metrics(report.metrics)
        run.log_dict(_plain(report), "report.json")
    if config.annotate:
        registry.annotate(artifact.ref, {name: report.metrics[name] for name in METRICS if name in report.metrics})
    return report


def _plain(report: Report) -> dict[str, Any]:
    """What a reader of the file wants first comes first."""
    fields = asdict(report)
    examples = fields.pop("examples")
    return {**fields, "by_intent": by_group(examples, "intent"), "by_language": by_group(examples, "language"), "examples": examples}


def _write(reports: Sequence[Report], config: EvaluateConfig, path: Path) -> Path:
    """Whole or not at all."""
    content: Mapping[str, Any] = {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "reports": [_plain(report) for report in reports],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(path)
    return path
