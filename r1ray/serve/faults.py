"""From an exception to the error that a client sees: status, code and one sentence. The only place that decides this.

An unforeseen exception becomes a plain 500: its text goes to the log, never to the client.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from r1ray.errors import (
    DeadlineExceeded,
    EngineStopped,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    R1RayError,
    UnknownAdapter,
)
from r1ray.serve.protocol import Fault, Refused

__all__ = ["bad_request", "fault_of", "model_not_found", "replica_lost", "too_slow"]

INVALID = "invalid_request_error"
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one class of errors looks to a client."""

    status: int
    code: str
    type: str
    param: str | None = None
    retry_after_s: float | None = None


KINDS: dict[type[R1RayError], _Kind] = {
    PromptTooLong: _Kind(400, "context_length_exceeded", INVALID, param="messages"),
    InvalidRequest: _Kind(400, "invalid_value", INVALID, param="prompt"),
    UnknownAdapter: _Kind(404, "model_not_found", INVALID, param="model"),
    QueueFull: _Kind(429, "queue_full", "overloaded_error", retry_after_s=1.0),
    EngineStopped: _Kind(503, "engine_stopped", "server_error", retry_after_s=1.0),
    DeadlineExceeded: _Kind(504, "deadline_exceeded", "timeout"),
    GenerationFailed: _Kind(500, "generation_failed", "server_error"),
    R1RayError: _Kind(500, "internal_error", "server_error"),
}


def fault_of(error: BaseException) -> Fault:
    """The fault that tells a client about `error`."""
    if isinstance(error, Refused):
        return error.fault
    kind = next((kind for class_, kind in KINDS.items() if isinstance(error, class_)), None)
    if kind is None or kind.status == 500:
        logger.error("A request failed: %s: %s", type(error).__name__, error, exc_info=error if kind is None else None)
    if kind is None:
        return Fault(status=500, code="internal_error", type="server_error", message="The server failed; its log says why.")
    return Fault(status=kind.status, code=kind.code, type=kind.type, message=str(error), param=kind.param, retry_after_s=kind.retry_after_s)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> Refused:
    """A 400 for a body that cannot be served."""
    return Refused(Fault(status=400, code=code, type=INVALID, message=message, param=param))


def model_not_found(model: str, known: list[str]) -> Refused:
    """The 404 of an unknown model."""
    text = f"The model {model[:200]!r} is not served here. Served: {', '.join(known)}."
    return Refused(Fault(status=404, code="model_not_found", type=INVALID, message=text, param="model"))


def replica_lost() -> Fault:
    """The replica died or was taken away; a repeated request finds another."""
    text = "The model replica that ran this request was lost. Send the request again."
    return Fault(status=503, code="replica_lost", type="server_error", message=text, retry_after_s=1.0)


def too_slow(seconds: float) -> Refused:
    """No first token in time: the queue is too long or the model is still starting."""
    text = f"The request had not started after {seconds:g} s: the model is starting or overloaded. Send it again later."
    return Refused(Fault(status=503, code="start_timeout", type="overloaded_error", message=text, retry_after_s=5.0))
