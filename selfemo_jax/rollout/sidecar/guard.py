"""One key for every route but /health.

vLLM's own key leaves its control routes open, and `/collective_rpc` runs any method of a worker. This guard
stands before all routes and lets through only the methods that a refresh needs.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY_VARIABLE = "SELFEMO_SIDECAR_KEY"
OPEN_PATHS = frozenset({"/health"})
RPC_PATH = "/collective_rpc"
RPC_METHODS = frozenset({"stage_weights", "apply_weights", "applied_digest", "drop_staged"})
MAX_RPC_BYTES = 2**16
WORKERS_VARIABLE = "SELFEMO_NUM_WORKERS"
UPDATE_PATHS = frozenset(
    {"/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update"}
)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware; reads the key once, from SELFEMO_SIDECAR_KEY; a server without one does not start."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise ValueError(f"{KEY_VARIABLE} is not set: the server does not run without a key")
        self._app = app
        self._several = int(os.environ.get(WORKERS_VARIABLE, "1")) > 1
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or hand over to the app."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] == "http" and scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        if not self._has_key(scope):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await _refuse(send, 401, "no or wrong key; send it as Authorization: Bearer KEY")
        if scope["type"] == "http" and scope["path"].rstrip("/") == RPC_PATH:
            return await self._call_method(scope, receive, send)
        if self._several and scope["path"].rstrip("/") in UPDATE_PATHS:
            # A worker that raises there leaves vLLM one answer behind for every later call.
            return await _refuse(send, 403, "with several workers use stage_weights and apply_weights")
        return await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        # Both are compared whole whatever they are, so that the time taken tells nothing of the key.
        return len(sent) == 1 and hmac.compare_digest(sent[0], self._expected)

    async def _call_method(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            if len(body) > MAX_RPC_BYTES:
                return await _refuse(send, 413, f"a call has at most {MAX_RPC_BYTES} bytes")
            if not message.get("more_body"):
                break
        try:
            method = json.loads(body)["method"]
        except (ValueError, KeyError, TypeError):
            return await _refuse(send, 400, "expected a JSON object with a method")
        if method not in RPC_METHODS:
            allowed = ", ".join(sorted(RPC_METHODS))
            return await _refuse(send, 403, f"method {method!r} may not be called; only {allowed}")
        given = False

        async def again() -> dict[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": {"message": reason, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
