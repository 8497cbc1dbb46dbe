"""What jobs/gate.py runs: measure the candidate and what it would replace, check, write the verdict, promote or leave production alone.

The verdict is put on the version before anything else happens, so that `Registry.promote` refuses a version that failed, whoever asks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from r1ray.data.read import read_conversations
from r1ray.engine.create import create_engine
from r1ray.engine.hardware import choose_device
from r1ray.engine.offline import generate_all
from r1ray.engine.protocol import Engine, GenerationRequest
from r1ray.errors import EvaluationError, PromotionRefused, RegistryError
from r1ray.evaluate.config import EvaluateConfig
from r1ray.evaluate.example import examples_of
from r1ray.evaluate.gate.checks import Check, limits, regressions
from r1ray.evaluate.gate.config import GateConfig, GateSet, SafetyGate
from r1ray.evaluate.gate.merge import can_be_merged, merge_agreement
from r1ray.evaluate.gate.safety import SafetyCase, judge, load_cases
from r1ray.evaluate.runner import evaluate
from r1ray.evaluate.scoring import allowed
from r1ray.evaluate.shares import Share, quotient
from r1ray.model.load import load_tokenizer
from r1ray.model.reasoning import split
from r1ray.model.template import prompt_ids, read
from r1ray.observe.tracking import Run
from r1ray.registry import Registry, Verdict
from r1ray.settings import Settings
from r1ray.types import Artifact, Conversation, Message, Report

__all__ = ["gate"]

EXPERIMENT = "gate"
log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


def gate(config: GateConfig, settings: Settings | None = None) -> Verdict:
    """The verdict; when it is good and `config.promote`, the alias points at the candidate.

    Raises:
        PromotionRefused: a check failed; the alias is where it was. The message names every failed check.
        EvaluationError: a set that cannot be scored, or a limit on a metric that it does not have.
    """
    settings = settings or Settings()
    registry = Registry(settings)
    candidate = registry.resolve(config.model)
    reference = _reference(config, candidate, registry)
    cases = load_cases(settings.locate(config.safety.cases) if config.safety and config.safety.cases else None) if config.safety else []
    sets = {name: _dialogues(chosen) for name, chosen in config.sets.items()}  # every file is read before the first model is loaded
    for name, chosen in config.sets.items():
        _check_metrics(name, chosen, sets[name])
    print(f"candidate {candidate.ref}, against {reference.ref if reference else 'nothing'}", flush=True)
    with Run(EXPERIMENT, candidate.ref, settings=settings) as run:
        run.log_params({"model": candidate.ref, "against": reference.ref if reference else "", **config.model_dump(mode="json")})
        checks = _checks(_Hearing(config, candidate, reference, registry, sets, cases))
        run.log_metrics({check.what.replace(" ", "_"): check.value for check in checks})
        verdict, path = _write(checks, candidate, reference, config, settings)
        run.log_artifact(path)
    registry.record_verdict(candidate.ref, verdict)
    _show(checks, candidate)
    print(f"verdict: {path}", flush=True)
    if not verdict.passed:
        failed = "; ".join(f"{check.what}: {check.said}" for check in checks if not check.passed)
        raise PromotionRefused(f"{candidate.ref} stays unpromoted, {config.alias} is unchanged. {failed}.")
    if config.promote:
        print(f"{config.alias} is now {registry.promote(candidate.ref, config.alias).ref}", flush=True)
    return verdict


@dataclass(frozen=True, slots=True)
class _Hearing:
    """Everything that the checks look at."""

    config: GateConfig
    candidate: Artifact
    reference: Artifact | None
    registry: Registry
    sets: Mapping[str, Sequence[Conversation]]
    cases: Sequence[SafetyCase]


def _reference(config: GateConfig, candidate: Artifact, registry: Registry) -> Artifact | None:
    """What it would replace; the candidate itself, when it is in production already, is compared with what it was made from."""
    if config.against is not None:
        return registry.resolve(config.against)
    for ref in (f"{candidate.manifest.name}@{config.alias}", *candidate.manifest.parents):
        try:
            found = registry.resolve(ref)
        except RegistryError:
            continue
        if found.ref != candidate.ref:
            return found
    return None


def _dialogues(chosen: GateSet) -> Sequence[Conversation]:
    limits_ = [n for n in (chosen.limit, chosen.data.limit) if n is not None]
    return read_conversations(chosen.data.model_copy(update={"limit": min(limits_, default=None)})).conversations


def _check_metrics(name: str, chosen: GateSet, dialogues: Sequence[Conversation]) -> None:
    """Raises EvaluationError for a limit on a metric that the set does not have, before minutes are spent on the others."""
    found = allowed(examples_of(dialogues))
    if missing := [metric for metric in chosen.metrics if metric not in found]:
        known = ", ".join(sorted(found))
        raise EvaluationError(f"The set {name} has no {missing[0]}: its gold answers do not allow it. It has {known}; name those.")


def _checks(hearing: _Hearing) -> list[Check]:
    checks: list[Check] = []
    for name, chosen in hearing.config.sets.items():
        checks += _set_checks(hearing, name, chosen)
    if hearing.config.safety is not None:
        checks += _safety_checks(hearing, hearing.config.safety)
    merge = hearing.config.merge
    if merge is not None and can_be_merged(hearing.candidate):
        first = next(iter(hearing.sets.values()))
        device = choose_device(hearing.config.engine.device)
        agreement = merge_agreement(hearing.candidate, first[: merge.num_prompts], hearing.registry, device=device)
        said = f"merged and unmerged choose the same token, up to rounding, {agreement:.4g} of the time, at least {merge.at_least:g} wanted"
        checks.append(Check(what="merge", passed=agreement >= merge.at_least, value=agreement, limit=merge.at_least, said=said))
    return checks


def _set_checks(hearing: _Hearing, name: str, chosen: GateSet) -> list[Check]:
    config = hearing.config
    settings = EvaluateConfig(
        data=chosen.data,
        sampling=config.sampling,
        metrics=chosen.metrics,
        engine=config.engine,
        perplexity_examples=None,
        num_bootstrap=0,
        seed=config.seed,
        progress_s=config.progress_s,
    )
    dialogues = hearing.sets[name]

    def measured(artifact: Artifact) -> Report:
        return evaluate(artifact, dialogues, settings, registry=hearing.registry)

    report = measured(hearing.candidate)
    is_first = name == next(iter(config.sets))
    found = {metric: report.metrics[metric] for metric in chosen.metrics if metric in report.metrics}
    hearing.registry.annotate(hearing.candidate.ref, {metric if is_first else f"{name}.{metric}": value for metric, value in found.items()})
    checks = limits(name, report.metrics, chosen.at_least, chosen.at_most)
    if chosen.max_drop and hearing.reference is not None:
        rows = measured(hearing.reference).examples
        checks += regressions(name, report.examples, rows, chosen.max_drop, num=config.num_bootstrap, seed=config.seed)
    return checks


def _safety_checks(hearing: _Hearing, chosen: SafetyGate) -> list[Check]:
    config = hearing.config
    rows = _safety_rows(hearing, hearing.candidate, chosen)
    metrics = {
        name: value for name in _names(rows) if (value := quotient([Share(*row["shares"].get(name, (0, 0))) for row in rows])) is not None
    }
    checks = limits("safety", metrics, chosen.at_least, chosen.at_most)
    if chosen.max_drop and hearing.reference is not None:
        before = _safety_rows(hearing, hearing.reference, chosen)
        checks += regressions("safety", rows, before, chosen.max_drop, num=config.num_bootstrap, seed=config.seed)
    return checks


def _names(rows: Rows) -> list[str]:
    return sorted({name for row in rows for name in row["shares"]})


def _safety_rows(hearing: _Hearing, artifact: Artifact, chosen: SafetyGate) -> Rows:
    engine: Engine = create_engine(artifact, hearing.config.engine, hearing.registry)
    try:
        tokenizer, system = load_tokenizer(artifact), artifact.manifest.system_prompt
        sampling = hearing.config.sampling.model_copy(update={"max_tokens": chosen.max_tokens})
        requests = [
            GenerationRequest(
                id=case.id,
                prompt_ids=tuple(prompt_ids(tokenizer, [Message(role="user", content=case.prompt)], system_prompt=system)),
                sampling=sampling,
            )
            for case in hearing.cases
        ]
        done = generate_all(engine, requests)
    finally:
        asyncio.run(engine.stop())
    thinks = read(artifact).thinks
    rows = []
    for case, one in zip(hearing.cases, done, strict=True):
        answer = split(tokenizer.decode(one.token_ids, skip_special_tokens=True), prefilled=thinks)[1]
        rows.append({"id": case.id, "answer": answer, "shares": judge(case, answer, system)})
    return rows


def _write(
    checks: Sequence[Check], candidate: Artifact, reference: Artifact | None, config: GateConfig, settings: Settings
) -> tuple[Verdict, Path]:
    """The verdict, and where its whole account is; the file is whole or not there."""
    now = datetime.now(UTC)
    path = settings.place(config.out or Path(f"reports/gate-{now:%Y%m%d-%H%M%S}-{os.getpid()}.json"))
    verdict = Verdict(
        passed=all(check.passed for check in checks),
        against=reference.ref if reference else None,
        failed=tuple(check.what for check in checks if not check.passed),
        at=now.isoformat(timespec="seconds"),
        report=str(path),
    )
    content = {
        "model": candidate.ref,
        **verdict.model_dump(mode="json"),
        "checks": [dataclasses.asdict(check) for check in checks],
        "config": config.model_dump(mode="json"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(path)
    return verdict, path


def _show(checks: Sequence[Check], candidate: Artifact) -> None:
    table = Table(title=f"Gate of {candidate.ref}", title_justify="left")
    table.add_column("check")
    table.add_column("")
    table.add_column("finding")
    for check in checks:
        table.add_row(check.what, "[green]passed[/green]" if check.passed else "[red]failed[/red]", check.said)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
