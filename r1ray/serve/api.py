"""The HTTP face: OpenAI's routes over a ChatService. Knows no Ray: Serve runs this app inside the Router, tests run it under uvicorn.

Bodies are parsed by hand, so that a wrong one is an OpenAI error and never FastAPI's 422.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import r1ray
from r1ray.serve.answer import Answer
from r1ray.serve.chat import ChatService
from r1ray.serve.faults import fault_of
from r1ray.serve.protocol import Fault
from r1ray.serve.request import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from r1ray.serve.wire import ChatWire, CompletionWire, error_body, model_body

__all__ = ["create_api"]

REQUEST_ID = "x-request-id"
TASK = "x-task"
B = TypeVar("B", ChatBody, CompletionBody)


def create_api(service: ChatService, *, echo_request_id: bool = True) -> FastAPI:
    """The application, ready for any ASGI server. Serve echoes X-Request-Id itself; a second one would make "a, a" of it."""
    api = FastAPI(title="r1ray", version=r1ray.__version__, docs_url="/docs", redoc_url=None)
    api.state.service = service
    api.add_middleware(_RequestIds, echo=echo_request_id)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(Exception, _on_error)
    _add_generation_routes(api, service)
    _add_model_routes(api, service)
    _add_operator_routes(api, service)
    return api


def _add_generation_routes(api: FastAPI, service: ChatService) -> None:
    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        async def answer() -> Response:
            body = _with_task(parse(ChatBody, await request.body()), request)
            live = await service.chat(body, request.state.id)
            wire = ChatWire(
                id=f"chatcmpl-{uuid.uuid4().hex}",
                model=body.model,
                show_reasoning=body.include_reasoning is not False,
                with_logprobs=body.num_logprobs is not None,
            )
            return await _reply(Answer(live, wire, grounding=service.grounding, include_usage=body.include_usage), bool(body.stream))

        return await _guarded(request, answer)

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        async def answer() -> Response:
            body = _with_task(parse(CompletionBody, await request.body()), request)
            live = await service.complete(body, request.state.id)
            wire = CompletionWire(id=f"cmpl-{uuid.uuid4().hex}", model=body.model, with_logprobs=body.num_logprobs is not None)
            return await _reply(Answer(live, wire, include_usage=body.include_usage), bool(body.stream))

        return await _guarded(request, answer)


def _add_model_routes(api: FastAPI, service: ChatService) -> None:
    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_body(served.card) for served in service.models.values()]}

    @api.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> Response:
        async def answer() -> Response:
            return JSONResponse(model_body(service.find(model).card))

        return await _guarded(request, answer)

    @api.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        async def answer() -> Response:
            tokens, max_model_len = await service.tokenize(parse(TokenizeBody, await request.body()))
            return JSONResponse({"count": len(tokens), "max_model_len": max_model_len, "tokens": list(tokens)})

        return await _guarded(request, answer)

    @api.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        async def answer() -> Response:
            return JSONResponse({"prompt": await service.detokenize(parse(DetokenizeBody, await request.body()))})

        return await _guarded(request, answer)


def _add_operator_routes(api: FastAPI, service: ChatService) -> None:
    @api.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if await service.ready() else 503)

    @api.get("/version")
    async def version() -> dict[str, str]:
        return {"version": r1ray.__version__}

    @api.get("/load")
    async def load() -> dict[str, Any]:
        return {model: asdict(stats) for model, stats in (await service.stats()).items()}


class _EventStream(StreamingResponse):
    """Server-sent events that end the generation when they stop being read, even before the first byte."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.sse(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()
            await self._answer.live.aclose()


async def _reply(answer: Answer, stream: bool) -> Response:
    if stream:
        return _EventStream(answer)
    try:
        return JSONResponse(await answer.body())
    finally:
        await answer.live.aclose()


async def _guarded(request: Request, answer: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
    """Any failure as an OpenAI error; a client that leaves before the headers cancels the work."""
    try:
        return await _while_connected(request, answer())
    except Exception as error:  # fault_of logs what nobody foresaw
        return _error(fault_of(error))


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    await request.body()
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=499)
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(fault: Fault) -> JSONResponse:
    headers = {}
    if fault.retry_after_s is not None:
        headers = {"Retry-After": str(max(1, round(fault.retry_after_s))), "Retry-After-Ms": str(round(fault.retry_after_s * 1000))}
    return JSONResponse(error_body(fault), status_code=fault.status, headers=headers)


def _with_task(body: B, request: Request) -> B:
    """The X-Task header names the task where the body does not."""
    header = request.headers.get(TASK)
    return body.model_copy(update={"task": header}) if header and not body.task_name else body


class _RequestIds:
    """Takes X-Request-Id, or makes one. Plain ASGI: Starlette's own middleware would put a queue into every stream."""

    def __init__(self, app: ASGIApp, *, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID) or f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["id"] = request_id

        async def send_with_id(message: Message) -> None:
            if self._echo and message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return _error(Fault(status=error.status_code, code=code, type="invalid_request_error", message=str(error.detail)))


async def _on_error(_request: Request, error: Exception) -> Response:
    return _error(fault_of(error))
