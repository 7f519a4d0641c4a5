"""A small HTTP server on top of the engine, with FastAPI.

    python examples/custom_server.py [--model PATH] [--host 127.0.0.1] [--port 8000]

    curl localhost:8000/generate -H 'Content-Type: application/json' \
        -d '{"prompt": "The capital of France is", "sampling_params": {"max_new_tokens": 8}}'
    curl -N localhost:8000/generate_stream -H 'Content-Type: application/json' \
        -d '{"prompt": "The capital of France is", "sampling_params": {"max_new_tokens": 8}}'
    curl localhost:8000/chat -H 'Content-Type: application/json' \
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'

The page at / chats with the model, and shows it an image if it takes any: content is then a list
of parts as OpenAI's API has them. Images come inside the request, as data URLs: clients may not
have this machine open files and URLs for them.

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
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

import jaxserve
from jaxserve.errors import JaxserveError

IMAGES = {"allowed_local_media_path": "", "media_url_max_file_size_mb": 0}
"""Options of the engine: no files and no URLs."""
PAGE = """<!doctype html>
<title>Chat</title>
<form>
  <p><input type="file" accept="image/*"></p>
  <p><textarea rows="4" cols="60" placeholder="Ask" required></textarea> <button>Send</button></p>
</form>
<pre style="white-space: pre-wrap"></pre>
<script>
const [file, text, answer] = ["input", "textarea", "pre"].map(x => document.querySelector(x))
const url = blob => new Promise(done => {
  const reader = new FileReader()
  reader.onload = () => done(reader.result)
  reader.readAsDataURL(blob)
})
document.querySelector("form").onsubmit = async event => {
  event.preventDefault()
  answer.textContent = "..."
  let content = text.value
  if (file.files.length) content = [
    {type: "image_url", image_url: {url: await url(file.files[0])}},
    {type: "text", text: text.value},
  ]
  const messages = [{role: "user", content}]
  const headers = {"Content-Type": "application/json"}
  const body = JSON.stringify({messages, sampling_params: {max_new_tokens: 256}})
  const result = await (await fetch("chat", {method: "POST", headers, body})).json()
  answer.textContent = result.error ?? result.text
}
</script>
"""


class Body(BaseModel):
    """What /generate and /generate_stream take."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[str]
    sampling_params: dict[str, Any] = {}


class Chat(BaseModel):
    """What /chat takes."""

    model_config = ConfigDict(extra="forbid")

    messages: list[dict[str, Any]]
    sampling_params: dict[str, Any] = {}


def make_app(model_path: str, **options: Any) -> FastAPI:
    """The server's application. `options` go to the engine, which lives as long as the app."""
    options = {**IMAGES, **options}

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
        return await _answer(request, engine.async_generate(body.prompt, body.sampling_params))

    @app.post("/generate_stream")
    async def generate_stream(body: Body, request: Request) -> Response:
        """Server-sent events: the chunks of the stream, then [DONE]."""
        engine = request.app.state.engine
        stream = await engine.async_generate(body.prompt, body.sampling_params, stream=True)
        return StreamingResponse(_events(stream), media_type="text/event-stream")

    @app.post("/chat")
    async def chat(body: Chat, request: Request) -> Response:
        """The result dict of one conversation."""
        engine = request.app.state.engine
        return await _answer(request, engine.async_chat(body.messages, body.sampling_params))

    @app.get("/")
    def page() -> Response:
        return HTMLResponse(PAGE)

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


async def _answer(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """What `work` returns; `work` is cancelled when the client goes away before."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        # Nobody is left to read any other answer, whatever it says.
        return JSONResponse(task.result()) if task.done() else Response(status_code=499)
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
