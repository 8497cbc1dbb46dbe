"""The actor that holds vLLM. It runs in vLLM's environment, where r1ray is not installed: Ray carries this module's source there.

So it imports the standard library, and vLLM inside its methods; plain dictionaries and tuples cross the border. The results of all
requests leave together: one outstanding `poll` of the engine brings whatever came since the last one, so that a step costs one call,
however many streams run.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

__all__ = ["Event", "VllmWorker", "cpu_lists"]

log = logging.getLogger(__name__)

Event = tuple[str, tuple[int, ...], str | None, int, list[Any] | None, list[Any] | None, tuple[str, str] | None]
"""(request, tokens, finish_reason, cached prompt tokens, logprobs, prompt logprobs, error): a chunk, or (kind, text) of an error."""


def cpu_lists(num_workers: int, num_threads: int | None, cpus: list[int]) -> str:
    """vLLM's VLLM_CPU_OMP_THREADS_BIND: each worker's CPUs, as equal shares of those that this process may use.

    vLLM's own choice, which wants a NUMA node per worker and leaves a core to the other processes, is good for one worker only.
    """
    if num_workers == 1 and num_threads is None:
        return "auto"
    each = min(num_threads or len(cpus), len(cpus) // num_workers)
    if not each:
        return "nobind"
    return "|".join(",".join(str(cpu) for cpu in cpus[rank * each : (rank + 1) * each]) for rank in range(num_workers))


class Adapter:
    """A loaded adapter and how many streams use it; a retired one goes with the last of them, and then `gone` is set."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.num_streams = 0
        self.retired = False
        self.gone = asyncio.Event()


class VllmWorker:
    """One AsyncLLM. `start` loads; the other calls may run beside each other."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._adapters: dict[str | None, Adapter] = {}
        self._most_adapters: int | None = None
        self._places_taken = 0
        self._last_number = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._figures: dict[str, float] = {}

    async def start(self, model: str, arguments: dict[str, Any], adapter: str | None, num_threads: int | None) -> dict[str, Any]:
        """Load the model; what it turned out to be."""
        num_workers = arguments["tensor_parallel_size"] * arguments["pipeline_parallel_size"]
        cpus = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpu_lists(num_workers, num_threads, cpus))
        try:
            self._engine = _load(model, arguments, self._figures)
            if self._engine.vllm_config.device_config.device_type == "cpu":
                self._most_adapters = arguments.get("max_loras", 1) - 1  # the last place stays empty, see arguments.py
            if adapter is not None:
                await self.load_adapter(None, adapter)
        except Exception as error:
            log.exception("vLLM did not start")
            raise RuntimeError(f"{type(error).__name__}: {error}") from None  # vLLM's own classes exist on this side only
        config = self._engine.vllm_config
        return {
            "vocab_size": config.model_config.get_vocab_size(),
            "context": config.model_config.max_model_len,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "num_blocks": config.cache_config.num_gpu_blocks or 0,
            "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
            "pid": os.getpid(),
        }

    async def submit(self, request: dict[str, Any]) -> None:
        """Begin to generate; chunks come by `poll`."""
        id_, name = request["id"], request["adapter"]
        adapter = self._adapters.get(name)
        if adapter is None and name is not None:  # unloaded while the request was on its way
            self._post((id_, (), None, 0, None, None, ("unknown", name)))
            return
        if adapter is not None:
            adapter.num_streams += 1
        self._tasks[id_] = asyncio.create_task(self._generate(request, adapter))

    async def abort(self, request_id: str) -> None:
        await asyncio.sleep(0)  # a task that is cancelled before it has begun would end without a word
        if task := self._tasks.get(request_id):
            task.cancel()

    async def poll(self, seconds: float) -> tuple[list[Event], dict[str, float]]:
        """(events since the last poll, the scheduler's figures); waits for the first event, at most `seconds`.

        Raises:
            RuntimeError: vLLM's engine process is dead.
        """
        if not self._events:
            try:
                await asyncio.wait_for(self._news.wait(), seconds)
            except TimeoutError:
                await self._check()
        self._news.clear()
        events, self._events = self._events, []
        if self._engine.errored:
            await self._check()
        return events, self._figures

    async def load_adapter(self, name: str | None, path: str) -> None:
        """None is the adapter of requests that name none. One that is replaced stays until its last stream has ended."""
        from vllm.lora.request import LoRARequest

        if self._places_taken == self._most_adapters:
            raise RuntimeError(f"all {self._most_adapters} places for adapters are taken; raise engine.vllm.max_adapters")
        self._last_number += 1
        number = self._last_number  # in the name too: vLLM's prefix cache tells adapters apart by it
        loaded = Adapter(LoRARequest(f"{name or 'own'}#{number}", number, path))
        self._places_taken += 1
        try:
            await self._engine.add_lora(loaded.request)
        except Exception as error:
            self._places_taken -= 1
            log.exception("vLLM did not load the adapter at %s", path)
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        old, self._adapters[name] = self._adapters.get(name), loaded
        if old is not None:
            await self._retire(old)

    async def unload_adapter(self, name: str) -> None:
        """Returns when its last stream has ended and its place is free."""
        adapter = self._adapters.pop(name)
        await self._retire(adapter)
        await adapter.gone.wait()

    async def _retire(self, adapter: Adapter) -> None:
        adapter.retired = True
        await self._let_go(adapter)

    async def _let_go(self, adapter: Adapter) -> None:
        if adapter.retired and not adapter.num_streams:
            self._places_taken -= 1
            await self._engine.remove_lora(adapter.request.lora_int_id)
            adapter.gone.set()

    async def stop(self) -> None:
        if self._engine is not None:
            self._engine.shutdown(timeout=1.0)

    async def _check(self) -> None:
        try:
            await self._engine.check_health()
        except Exception as error:
            raise RuntimeError(f"vLLM's engine process is dead ({type(error).__name__})") from None

    async def _generate(self, request: dict[str, Any], adapter: Adapter | None) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        id_, num_cached = request["id"], 0
        lora = None if adapter is None else adapter.request
        try:
            params = SamplingParams(**request["sampling"], detokenize=False, output_kind=RequestOutputKind.DELTA)
            prompt = tokens_input(list(request["prompt_ids"]), cache_salt=request["cache_salt"] or None)
            async for output in self._engine.generate(prompt, params, id_, lora_request=lora, priority=request["priority"]):
                num_cached = output.num_cached_tokens or num_cached
                self._post(_event(request, output, num_cached))
        except asyncio.CancelledError:
            self._post((id_, (), "abort", num_cached, None, None, None))
        except EngineDeadError:
            self._news.set()  # poll says so for all requests
        except (ValueError, VLLMClientError) as error:
            self._post((id_, (), None, 0, None, None, ("invalid", str(error))))
        except Exception as error:  # of this request alone: the others run on
            log.exception("request %s failed", id_)
            cause = error.__cause__ or error
            self._post((id_, (), None, 0, None, None, ("failed", f"{type(cause).__name__}: {cause}")))
        finally:
            del self._tasks[id_]
            if adapter is not None:
                adapter.num_streams -= 1
                await self._let_go(adapter)

    def _post(self, event: Event) -> None:
        self._events.append(event)
        self._news.set()


def _load(model: str, arguments: dict[str, Any], figures: dict[str, float]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Figures(StatLoggerBase):
        """Keeps the scheduler's last figures where `poll` finds them."""

        def __init__(self, *_args: Any, **_more: Any) -> None:
            figures.update(running=0, usage=0.0, preempted=0, steps=0)

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_args: Any, **_more: Any) -> None:
            if scheduler_stats is not None:
                figures["running"] = scheduler_stats.num_running_reqs
                figures["usage"] = scheduler_stats.kv_cache_usage
                figures["steps"] += 1
            if iteration_stats is not None:
                figures["preempted"] += iteration_stats.num_preempted_reqs

        def log_engine_initialized(self) -> None: ...

    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **arguments), stat_loggers=[Figures])


def _event(request: dict[str, Any], output: Any, num_cached: int) -> Event:
    id_, num_logprobs, drawn = request["id"], request["sampling"]["logprobs"], output.outputs[0]
    tokens, logprobs = list(drawn.token_ids), drawn.logprobs
    if drawn.finish_reason == "stop" and not request["keep_stop"]:
        tokens = tokens[:-1]
    if drawn.finish_reason not in (None, "stop", "length", "abort"):
        return (id_, (), None, num_cached, None, None, ("failed", f"vLLM ended it with {drawn.finish_reason}"))
    found, of_prompt = None, None
    if num_logprobs is not None and logprobs:
        found = [_logprobs(token, of_token, num_logprobs) for token, of_token in zip(tokens, logprobs, strict=False)]
    if output.prompt_logprobs:
        pairs = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))
        num_likeliest = request["sampling"]["prompt_logprobs"]
        of_prompt = [_logprobs(token, of_token, num_likeliest)[1:] for token, of_token in pairs[1:]]
    return (id_, tuple(tokens), drawn.finish_reason, num_cached, found, of_prompt, None)


def _logprobs(token: int, of_token: Any, num: int) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    ranked = sorted(((other, found.logprob) for other, found in of_token.items()), key=lambda pair: -pair[1])
    return token, of_token[token].logprob, tuple(ranked[:num])
