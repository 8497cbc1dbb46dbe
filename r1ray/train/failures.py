"""Ray Train's failure -> one of our errors: the first worker's own words, its rank, the step reached, what to do.

Knows exceptions only.
"""

from __future__ import annotations

from pathlib import Path

from r1ray.errors import OutOfMemory, R1RayError, TrainingError
from r1ray.train.progress import curve

__all__ = ["ran_out_of_memory", "unwrap", "worker_causes"]

_HINTS = {
    "connection reset by peer": "Another worker died: its own log in the Ray dashboard has the cause. Submit the job again: it resumes.",
    "connection closed by peer": "Another worker died: its own log in the Ray dashboard has the cause. Submit the job again: it resumes.",
}
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "running low on memory")
_DEAD = "Its process ended without a Python error, as when killed or out of memory. Submit the job again: it resumes."


def unwrap(error: BaseException, run_directory: Path) -> R1RayError:
    """The error to show for a `TrainingFailedError`; one of ours is passed on as it is."""
    failures: dict[int, BaseException] = dict(getattr(error, "worker_failures", None) or {})
    if not failures:
        controller = getattr(error, "controller_failure", None)
        return TrainingError(f"Training could not be run: {_words(controller or error)}. The Ray dashboard has the controller's log.")
    causes = worker_causes(error)
    for cause in causes.values():
        if isinstance(cause, R1RayError):
            return cause
    for rank, cause in causes.items():
        if ran_out_of_memory(cause):  # by Ray's memory monitor, which ends a worker from outside
            killed = OutOfMemory(f"Worker {rank} was ended because its node ran out of memory: {_words(cause)}.")
            killed.in_step = True  # type: ignore[attr-defined]
            return killed
    rank, cause = min(causes.items(), key=lambda item: (_is_echo(item[1]), item[0]))
    steps = curve(run_directory)
    reached = f"after step {steps[-1].step} of {steps[-1].total_steps}" if steps else "before the first step"
    return TrainingError(
        f"Worker {rank} of {len(failures)} that failed, {reached}: {_words(cause)}{_frame(failures[rank])}. {_hint(cause)}"
    )


def worker_causes(error: BaseException) -> dict[int, BaseException]:
    """By rank, what each worker of a `WorkerGroupError` really raised."""
    failures: dict[int, BaseException] = dict(getattr(error, "worker_failures", None) or {})
    return {rank: _cause(failure) for rank, failure in sorted(failures.items())}


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's on a GPU or CPU, Python's, or Ray saw the node run low."""
    if isinstance(error, OutOfMemory | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error).lower() for words in _NO_MEMORY)


def _cause(failure: BaseException) -> BaseException:
    """Ray wraps what a worker raised, several times."""
    for name in ("_base_exc", "health_check_failure", "cause"):
        inner = getattr(failure, name, None)
        if isinstance(inner, BaseException) and inner is not failure:
            return _cause(inner)
    return failure


def _is_echo(error: BaseException) -> bool:
    """A worker that only noticed another's death."""
    text = str(error).lower()
    return "by peer" in text or "gloo" in text


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[-1] if 'Traceback' in str(error) else lines[0] if lines else ''}"
    return text[:500].rstrip(".")


def _frame(failure: BaseException) -> str:
    """` (file:line in function)` of the innermost frame in a wrapped traceback text."""
    text = str(getattr(failure, "_traceback_str", ""))
    frames = [line.strip() for line in text.splitlines() if line.strip().startswith('File "')]
    return f" ({frames[-1]})" if frames else ""


def _hint(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "died" in text or "actor" in text:
        return _DEAD
    return next((hint for words, hint in _HINTS.items() if words in text), "The worker's log in the Ray dashboard has the whole traceback.")
