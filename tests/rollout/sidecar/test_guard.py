"""The key before every route, without vLLM."""

import asyncio
import json

import pytest

from selfemo_jax.rollout.sidecar.guard import MAX_RPC_BYTES, Guard


async def app(scope, receive, send):
    """Says what it got: the body, as the routes behind the guard would read it."""
    if scope["type"] == "lifespan":
        return await send({"type": "lifespan.startup.complete"})
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.setenv("SELFEMO_SIDECAR_KEY", "secret")
    return Guard(app)


def call(guard, path, *, key=None, chunks=(b"",), kind="http", headers=None):
    """(status, body) of one request whose body arrives in these chunks."""
    sent, pending = [], list(chunks)

    async def receive():
        chunk = pending.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(pending)}

    async def send(message):
        sent.append(message)

    if headers is None:
        headers = [] if key is None else [(b"authorization", key)]
    asyncio.run(guard({"type": kind, "path": path, "headers": headers}, receive, send))
    return sent[0].get("status", sent[0]["type"]), sent[-1].get("body", b"")


ROUTES = ["/v1/completions", "/inference/v1/generate", "/pause", "/collective_rpc", "/metrics", "/docs", "/"]


@pytest.mark.parametrize("path", [*ROUTES, "/health/", "//health", "/HEALTH", "/health/../pause"])
def test_no_route_but_health_answers_without_the_key(guard, path):
    assert call(guard, path)[0] == 401


@pytest.mark.parametrize(
    "sent", [b"secret", b"Bearer", b"Bearer ", b"Bearer secre", b"Bearer secrets", b"bearer secret", b"\xff"]
)
def test_anything_but_the_whole_key_is_refused(guard, sent):
    assert call(guard, "/pause", key=sent)[0] == 401


def test_two_keys_are_refused_though_one_is_right(guard):
    headers = [(b"authorization", b"Bearer secret"), (b"authorization", b"Bearer other")]
    assert call(guard, "/pause", headers=headers)[0] == 401


def test_health_needs_no_key_and_the_key_opens_the_rest(guard):
    assert call(guard, "/health")[0] == 200
    assert call(guard, "/pause", key=b"Bearer secret")[0] == 200


def test_a_websocket_without_the_key_is_closed(guard):
    assert call(guard, "/v1/realtime", kind="websocket")[0] == "websocket.close"


def test_the_server_starts_up_behind_the_guard(guard):
    assert call(guard, "", kind="lifespan")[0] == "lifespan.startup.complete"


def test_a_guard_without_a_key_does_not_start(monkeypatch):
    monkeypatch.delenv("SELFEMO_SIDECAR_KEY", raising=False)
    with pytest.raises(ValueError, match="SELFEMO_SIDECAR_KEY"):
        Guard(app)


@pytest.mark.parametrize("path", ["/collective_rpc", "/collective_rpc/"])
@pytest.mark.parametrize(
    "method", ["save_sharded_state", "reload_weights", "load_model", "__init__", 7, None]
)
def test_the_key_does_not_open_every_method_of_a_worker(guard, path, method):
    body = json.dumps({"method": method}).encode()
    assert call(guard, path, key=b"Bearer secret", chunks=[body])[0] == 403


def test_a_method_of_the_refresh_gets_its_whole_body_through(guard):
    body = json.dumps({"method": "stage_weights", "kwargs": {"path": "/w/7"}}).encode()
    chunks = [body[:9], body[9:20], body[20:]]
    assert call(guard, "/collective_rpc", key=b"Bearer secret", chunks=chunks) == (200, body)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"not json", b"\xff"])
def test_a_malformed_call_is_an_answer_and_no_crash(guard, body):
    assert call(guard, "/collective_rpc", key=b"Bearer secret", chunks=[body])[0] == 400


def test_an_endless_call_is_cut_off(guard):
    chunks = [b" " * MAX_RPC_BYTES, b" ", b"never read"]
    assert call(guard, "/collective_rpc", key=b"Bearer secret", chunks=chunks)[0] == 413


@pytest.mark.parametrize("path", ["/update_weights", "/start_weight_update", "/finish_weight_update/"])
def test_vllms_own_update_route_is_closed_where_there_are_several_workers(monkeypatch, guard, path):
    assert call(guard, path, key=b"Bearer secret")[0] == 200
    monkeypatch.setenv("SELFEMO_NUM_WORKERS", "2")
    assert call(Guard(app), path, key=b"Bearer secret")[0] == 403
