"""Passes that do not fit into the memory are computed in smaller ones, instead of ending every stream.

Halves the prompt tokens of a pass, then the streams that run together (the youngest give way and are computed again later); doubles
both again when many passes in a row have fitted. Only a stream that does not fit alone, twice, fails. Takes planned steps; knows no text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from r1ray.engine.backend import BLOCK_SIZE, OUT_OF_MEMORY, Backend
from r1ray.engine.passes import piece_of
from r1ray.engine.scheduler import Scheduler, Segment
from r1ray.errors import GenerationFailed

__all__ = ["Relief"]

log = logging.getLogger(__name__)

RECOVERY_STEPS = 256  # passes that must fit in a row before larger ones are tried
LEAST_TOKENS = BLOCK_SIZE


class Relief:
    """Stands between engine and backend where passes are submitted; sets the scheduler's `most_tokens` and `most_streams`."""

    def __init__(self, backend: Backend, scheduler: Scheduler) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._full = scheduler.most_tokens, scheduler.most_streams
        self._num_fitted = 0
        self._retried: set[str] = set()  # requests whose smallest pass did not fit once: what took the memory may be gone by now

    def submit(self, plan: Sequence[Segment]) -> object | None:
        """The submitted pass; None where it did not fit: then it was taken back, and the next plan is smaller.

        Raises:
            GenerationFailed: it is of one stream, whose smallest pass did not fit twice; it was taken back.
        """
        try:
            submitted = self._backend.submit([piece_of(segment) for segment in plan])
        except OUT_OF_MEMORY as error:
            why = f"{type(error).__name__}: {error}"  # the error itself would keep the pass's tensors alive
        else:
            self._fitted()
            return submitted
        torch.cuda.empty_cache()
        self._shrink(plan, why)
        return None

    def _fitted(self) -> None:
        self._num_fitted += 1
        scheduler = self._scheduler
        if self._num_fitted >= RECOVERY_STEPS and (scheduler.most_tokens, scheduler.most_streams) != self._full:
            self._num_fitted = 0
            most_tokens, most_streams = self._full
            scheduler.most_tokens = min(2 * scheduler.most_tokens, most_tokens)
            scheduler.most_streams = min(2 * scheduler.most_streams, most_streams)

    def _shrink(self, plan: Sequence[Segment], why: str) -> None:
        self._num_fitted = 0
        scheduler, num_tokens = self._scheduler, sum(segment.num for segment in plan if segment.num > 1)
        keep = len(plan)
        if num_tokens > LEAST_TOKENS:
            scheduler.most_tokens = max(LEAST_TOKENS, num_tokens // 2)
        elif len(plan) > 1:
            keep = scheduler.most_streams = len(plan) // 2
        scheduler.take_back(plan, keep)
        if num_tokens <= LEAST_TOKENS and len(plan) == 1:
            request, length = plan[0].stream.request, plan[0].start + plan[0].num
            if request.id not in self._retried:
                self._retried.add(request.id)
                return
            self._retried.remove(request.id)
            raise GenerationFailed(
                f"Request {request.id}: its {length} tokens do not fit into the memory, not even alone: {why} "
                "Lower engine.kv_cache_gb or max_context, or split the model over more processes."
            )
        most = f"{scheduler.most_tokens} prompt tokens, {scheduler.most_streams} streams"
        log.warning("a pass of %d streams and %d prompt tokens does not fit (%s); now at most %s", len(plan), num_tokens, why, most)
