"""A small HTTP server on top of the engine, with FastAPI.

    python examples/custom_server.py [--model PATH] [--host 127.0.0.1] [--port 8000]

    curl localhost:8000/generate -H 'Content-Type: application/json' \
        -d '{"prompt": "The capital of France is", "sampling_params": {"max_new_tokens": 8}}'
    curl -N localhost:8000/generate_stream -H 'Content-Type: application/json' \
        -d '{"prompt": "The capital of France is", "sampling_params": {"max_new_tokens": 8}}'

A client that goes away ends its request: the engine frees its pages at once. A mistake in a
request is answered with status 400 and the engine's message.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import uvicorn
from demo_model import fetch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

import jaxserve
from jaxserve.errors import JaxserveError


class Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[str]
    sampling_params: dict[str, Any] = {}


def make_app(model_path: str, **options: Any) -> FastAPI:
    """The server's application. `options` go to the engine, which lives as long as the app."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # In the server's running loop, in whatever thread that is: the engine does not mind.
        with jaxserve.Engine(model_path=model_path, **options) as engine:
            app.state.engine = engine
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    async def generate(body: Body, request: Request) -> Response:
        """The result dict of one prompt, or a list of them."""
        engine = request.app.state.engine
        work = engine.async_generate(body.prompt, body.sampling_params)
        result = await _unless_disconnected(request, work)
        # Nobody is left to read an answer, whatever it says.
        return Response(status_code=499) if result is None else JSONResponse(result)

    @app.post("/generate_stream")
    async def generate_stream(body: Body, request: Request) -> Response:
        """Server-sent events: the chunks of the stream, then [DONE]."""
        engine = request.app.state.engine
        stream = await engine.async_generate(body.prompt, body.sampling_params, stream=True)
        return StreamingResponse(_events(stream), media_type="text/event-stream")

    @app.get("/get_server_info")
    def server_info(request: Request) -> Response:
        return JSONResponse(request.app.state.engine.get_server_info())

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> Response:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return JSONResponse({"error": "; ".join(problems)}, status_code=400)

    @app.exception_handler(JaxserveError)
    async def refused(request: Request, error: JaxserveError) -> Response:
        mistake = isinstance(error, ValueError | TypeError)
        return JSONResponse({"error": str(error)}, status_code=400 if mistake else 503)

    return app


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` returns; None, with `work` cancelled, when the client goes away before."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()  # cancelling a call aborts its requests
        gone.cancel()


async def _events(stream: Any) -> AsyncIterator[str]:
    """Starlette cancels this when the client goes away, and closing the stream aborts."""
    async with contextlib.aclosing(stream):
        try:
            async for chunk in stream:
                yield f"data: {json.dumps(chunk)}\n\n"
        except JaxserveError as error:  # the status line has been sent long ago
            yield f"data: {json.dumps({'error': str(error)})}\n\n"
    yield "data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="checkpoint folder, .gguf file or hub id")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    given = parser.parse_args()
    app = make_app(given.model or str(fetch()))
    uvicorn.run(app, host=given.host, port=given.port)


if __name__ == "__main__":
    main()
