"""Ray Train's failure -> one of our errors: the first worker's own words, its rank, the step reached, what to do.

Knows exceptions only.
"""

from __future__ import annotations

import re
from pathlib import Path

from r1ray.errors import ClusterUnreachable, EngineError, OutOfMemory, R1RayError, RegistryError, ServerUnreachable, TrainingError
from r1ray.train.progress import curve

__all__ = ["ran_out_of_memory", "unwrap", "worker_causes", "would_repeat"]

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "running low on memory")
_MOST_CHARACTERS = 500

_DEAD = "Its process ended without a Python error, as when killed or out of memory. Submit the job again: it resumes."
_PEER = "Another worker died: its own log in the Ray dashboard has the cause. Submit the job again: it resumes."
_SHARED_MEMORY = (
    "The node's /dev/shm is too small, which NCCL and data loaders need: start its container with --shm-size=8g (docker), or with an "
    "emptyDir of medium Memory at /dev/shm (Kubernetes)."
)
_INTERFACE = (
    "The nodes do not reach each other over the network interface that was chosen: export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME with "
    "the right one's name before `ray start` on every node, and NCCL_DEBUG=INFO to see which it took."
)
_TIMEOUT = (
    "A worker did not come to the same exchange in time; its log in the Ray dashboard says where it was. Where it was only slow, raise "
    "train.collective_timeout_s."
)
_HINTS = {
    "/dev/shm": _SHARED_MEMORY,
    "bus error": _SHARED_MEMORY,
    "no socket interface": _INTERFACE,
    "no route to host": _INTERFACE,
    "connection refused": _INTERFACE,
    "socketstartconnect": _INTERFACE,
    "socketpollconnect": _INTERFACE,
    "before timing out": _TIMEOUT,
    "collective operation timeout": _TIMEOUT,
    "connection reset": _PEER,
    "closed by peer": _PEER,
    "broken pipe": _PEER,
    "connection was likely closed": _PEER,
    "communicator was aborted": _PEER,
    "remote process exit": _PEER,
}
"""What a failed worker's words, in lower case, call for; the first that fits."""

_OWN_REASONS = ("/dev/shm", "no socket interface", "unhandled cuda error", "invalid usage", "invalid argument", "out of memory")
"""In words of an exchange between workers: why it failed on this very one."""
_EXCHANGE_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
_EXCHANGE = (
    "by peer",
    "gloo",
    "nccl error",
    "nccl communicator",
    "worknccl",
    "watchdog",
    "broken pipe",
    "connection was likely closed",
    "collective operation timeout",
)
_DEATH = re.compile(r"\bdied\b|actor(died|unavailable)?error|\bactor\b", re.IGNORECASE)


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
    rank, cause = min(causes.items(), key=lambda item: (_distance(item[1]), item[0]))
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


def would_repeat(error: BaseException) -> bool:
    """Whether another attempt would see it again: a user's mistake, and nothing that was merely out of reach."""
    is_passing = isinstance(error, ClusterUnreachable | EngineError | ServerUnreachable | TrainingError) or type(error) is RegistryError
    return isinstance(error, R1RayError) and not is_passing


def _cause(failure: BaseException) -> BaseException:
    """Ray wraps what a worker raised, several times."""
    for name in ("_base_exc", "health_check_failure", "cause"):
        inner = getattr(failure, name, None)
        if isinstance(inner, BaseException) and inner is not failure:
            return _cause(inner)
    return failure


def _distance(error: BaseException) -> int:
    """From the cause: 0, its own error; 1, an exchange's, for a reason on this worker; 2, it was ended; 3, it noticed another's end."""
    text = str(error).lower()
    if type(error).__name__ in _EXCHANGE_ERRORS or any(words in text for words in _EXCHANGE):
        return 1 if any(words in text for words in _OWN_REASONS) else 3
    return 2 if _DEATH.search(f"{type(error).__name__} {error}") else 0


def _words(error: BaseException) -> str:
    """`Kind: first line`, and what NCCL says was its last error, which it puts at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[-1] if "Traceback" in str(error) else lines[0] if lines else ""
    text = f"{type(error).__name__}: {first[:_MOST_CHARACTERS]}".rstrip(".")
    last = re.search(r"Last error:\s*(\S.*)", str(error))
    return f"{text}; last error: {last[1].strip()[:_MOST_CHARACTERS]}".rstrip(".") if last and last[0] not in first else text


def _frame(failure: BaseException) -> str:
    """` (file:line in function)` of the innermost frame in a wrapped traceback text."""
    text = str(getattr(failure, "_traceback_str", ""))
    frames = [line.strip() for line in text.splitlines() if line.strip().startswith('File "')]
    return f" ({frames[-1]})" if frames else ""


def _hint(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if _DEATH.search(text):
        return _DEAD
    return next((hint for words, hint in _HINTS.items() if words in text), "The worker's log in the Ray dashboard has the whole traceback.")
