"""Asking a real server in another process that is late, busy, broken or rude."""

import asyncio
import json
import logging
import random
import time

import httpx
import pytest

from selfemo_jax.experts import http_client
from selfemo_jax.experts.ask import ChatSampling, ExpertError, Interrupted, Question
from selfemo_jax.experts.http_client import HttpExpert
from selfemo_jax.experts.limits import Gate
from selfemo_jax.experts.panel import Panel
from selfemo_jax.settings.experts import Endpoint, Expert
from tests.experts.chat_server import RETRY_AFTER, answered, requests, serving

KEY = "sk-very-secret-0123456789"
SAMPLING = ChatSampling(temperature=0.7, top_p=1.0, max_tokens=64)


def questions(number: int, word: str = "owl") -> list[Question]:
    user = "Emotion labels: joy, anger\nnumber {} of {}"
    return [Question(id=f"{word}{n}", system="You answer.", user=user.format(n, word)) for n in range(number)]


def endpoint(url: str, **changes) -> Endpoint:
    return Endpoint(**({"name": "owl", "base_url": url, "model": "m"} | changes))


def panel(tmp_path, *endpoints: Endpoint, say=lambda text: None, stopping=lambda: False, **settings) -> Panel:
    fast = {"timeout": 5.0, "deadline": 20.0, "tries": 3} | settings
    return Panel(
        Expert(endpoints=list(endpoints), **fast), tmp_path / "cache.jsonl", say=say, stopping=stopping
    )


def _body(finish: str, text: str, **usage) -> bytes:
    choice = {"finish_reason": finish, "message": {"content": text}}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(http_client, "FIRST_WAIT", 0.05)


BROKEN = ("html", "empty", "nested", "infinite", "negative")


@pytest.mark.parametrize("fault", ["429", "busy", "500", "cut", *BROKEN])
def test_what_may_pass_is_tried_again_until_it_does(tmp_path, fault):
    log, said = tmp_path / "log", []
    with serving(log, "--faults", fault) as url, panel(tmp_path, endpoint(url), say=said.append) as experts:
        answers = experts.ask(questions(4), what="test")
    assert [len(given) for given in answers] == [1, 1, 1, 1]
    assert all("<emotion>" in given[0].text and given[0].source == "owl" for given in answers)
    asked = requests(log)
    assert len(asked) == 8 and sorted(r["fault"] for r in asked) == sorted([fault] * 4 + ["ok"] * 4)
    kind = {"busy": "429", "cut": "body"} | dict.fromkeys(BROKEN, "json")
    assert f"4 x {kind.get(fault, fault)}" in said[-1]


@pytest.mark.parametrize("fault", ["429", "busy"])
def test_nobody_asks_before_the_moment_the_server_named(tmp_path, fault):
    log = tmp_path / "log"
    words = ("--faults", ",".join([fault] + ["ok"] * 9), "--delay", "0.3")
    with serving(log, *words) as url, panel(tmp_path, endpoint(url, concurrency=2)) as experts:
        experts.ask(questions(6), what="test")
    # Two were under way; the one that was answered found the gate closed, like the one that was sent back.
    held = [request["time"] for request in requests(log)]
    assert len(held) == 7 and min(held[2:]) >= held[0] + RETRY_AFTER


def test_a_server_that_never_answers_runs_into_the_time_limit(tmp_path):
    with (
        serving(tmp_path / "log", "--faults", "slow") as url,
        panel(tmp_path, endpoint(url), timeout=0.5) as experts,
    ):
        started = time.monotonic()
        (given,) = experts.ask(questions(1), what="test")
        assert given[0].text and 0.5 <= time.monotonic() - started < 4


def test_a_server_that_drips_bytes_runs_into_the_same_limit(tmp_path):
    import socket
    import threading

    server = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        while True:
            try:
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
                for _ in range(30):
                    connection.sendall(b"x")
                    time.sleep(0.1)
            except OSError:
                return

    threading.Thread(target=drip, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    with panel(tmp_path, endpoint(url), timeout=0.5, tries=1) as experts:
        started = time.monotonic()
        with pytest.raises(ExpertError, match="no answer within 0.5 s"):
            experts.ask(questions(1), what="test")
        assert time.monotonic() - started < 2
    server.close()


def test_tries_are_bounded_and_what_was_answered_is_kept(tmp_path):
    log = tmp_path / "log"
    with (
        serving(log, "--faults", "ok,500", "--stubborn") as url,
        panel(tmp_path, endpoint(url, concurrency=2)) as experts,
    ):
        with pytest.raises(ExpertError, match=r"2 questions without an answer: 2 failed .*HTTP 500: it b"):
            experts.ask(questions(4), what="test")
        assert len(experts.cache) == 2
    assert len(requests(log)) == 2 + 2 * 3


def test_a_dead_server_stops_after_a_few_questions(tmp_path):
    with (
        panel(tmp_path, endpoint("http://127.0.0.1:9/v1", concurrency=2)) as experts,
        pytest.raises(ExpertError, match="3 questions failed one after the other.*no connection"),
    ):
        experts.ask(questions(500), what="test")


def test_a_wait_beyond_the_deadline_ends_at_once(tmp_path):
    with (
        serving(tmp_path / "log", "--faults", "429") as url,
        panel(tmp_path, endpoint(url), deadline=0.3) as experts,
        pytest.raises(ExpertError, match="asks to wait 0.8 s, more than expert.deadline 0.3"),
    ):
        experts.ask(questions(1), what="test")


@pytest.mark.parametrize("fault", ["429", "spent"])
def test_a_stop_while_the_server_asks_to_wait_is_a_stop_at_once(tmp_path, fault):
    log, said = tmp_path / "log", []
    words = ("--faults", fault, "--retry_after", "60")
    with (
        serving(log, *words) as url,
        panel(
            tmp_path, endpoint(url, concurrency=2), deadline=90.0, say=said.append,
            stopping=lambda: bool(said[1:]),
        ) as experts,
    ):  # fmt: skip
        started = time.monotonic()
        with pytest.raises(Interrupted, match="questions without an answer: stopped"):
            experts.ask(questions(5), what="test")
        assert time.monotonic() - started < 20
        assert len(experts.cache) == (0 if fault == "429" else 2)
    # Two requests were told to wait, the person who waits is told once.
    assert len(requests(log)) == 2
    assert [words for words in said if "wait" in words] == [
        "expert owl: the server asks to wait 60 s; nothing is asked until then"
    ]


def test_limits_spent_beyond_the_deadline_end_the_asking_and_keep_what_was_answered(tmp_path):
    said = []
    with (
        serving(tmp_path / "log", "--faults", "spent", "--retry_after", "21600") as url,
        panel(tmp_path, endpoint(url, concurrency=2), say=said.append) as experts,
    ):
        assert experts.ask(questions(2), what="test")
        with pytest.raises(ExpertError, match="asks to wait 21600.0 s, more than expert.deadline 20"):
            experts.ask(questions(9, "elk"), what="test")
        assert len(experts.cache) == 4
    assert not any("wait" in words for words in said)


def test_one_that_is_sent_away_does_not_cost_the_answers_that_are_being_written(tmp_path):
    log = tmp_path / "log"
    with (
        serving(log, "--faults", "403,ok,ok,ok,ok,ok,ok,ok", "--stubborn", "--delay", "0.7") as url,
        panel(tmp_path, endpoint(url, concurrency=4)) as experts,
    ):
        with pytest.raises(ExpertError, match="HTTP 403: no more money"):
            experts.ask(questions(8), what="test")
        assert len(experts.cache) == len(answered(log)) == 3
    # No other was begun.
    assert len(requests(log)) == 4


def test_waits_grow_from_try_to_try_and_differ_among_questions(tmp_path, monkeypatch):
    waits: dict[asyncio.Task, list[float]] = {}

    async def wait(gate: Gate, seconds: float) -> None:
        waits.setdefault(asyncio.current_task(), []).append(seconds)

    random.seed(0)
    monkeypatch.setattr(Gate, "wait", wait)
    dead = endpoint("http://127.0.0.1:9/v1", concurrency=40)
    with panel(tmp_path, dead, tries=5) as experts, pytest.raises(ExpertError, match="40 questions failed"):
        experts.ask(questions(40), what="test")
    by_try = list(zip(*waits.values(), strict=True))
    assert len(by_try) == 4 and len(by_try[0]) == 40
    for number, found in enumerate(by_try):
        bound = http_client.FIRST_WAIT * 2**number
        assert bound / 2 < max(found) <= bound
        assert len(set(found)) == 40 and min(found) < bound / 5


def test_requests_that_were_held_back_do_not_start_at_the_same_moment():
    gate, passed = Gate("owl", longest=9.0), []

    async def one() -> None:
        assert await gate.passed()
        passed.append(time.monotonic())

    async def held() -> None:
        gate.block(0.8)
        await asyncio.gather(*(one() for _ in range(20)))

    random.seed(0)
    began = time.monotonic()
    asyncio.run(held())
    assert len(passed) == 20 and min(passed) >= began + 0.8
    # They spread over a quarter of the wait.
    assert max(passed) - min(passed) > 0.1


def test_the_key_is_sent_and_is_in_no_file_or_message(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OWL_KEY", KEY)
    said = []
    with (
        serving(tmp_path / "log", "--key", KEY) as url,
        panel(tmp_path, endpoint(url, key_env="OWL_KEY"), say=said.append) as experts,
    ):
        assert experts.ask(questions(2), what="test")
        shown = repr(vars(experts)) + repr(experts) + "".join(said)
    with (
        serving(tmp_path / "log", "--key", "sk-another") as url,
        panel(tmp_path, endpoint(url, key_env="OWL_KEY")) as experts,
        pytest.raises(ExpertError, match=r"HTTP 401.*\[key\].*look at the key in OWL_KEY") as error,
    ):
        experts.ask(questions(1, "elk"), what="test")
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    for text in (shown, str(error.value), written, caplog.text):
        assert "very-secret" not in text


def test_no_part_of_the_key_is_left_where_words_are_cut(monkeypatch):
    key = KEY + "/x"
    monkeypatch.setenv("OWL_KEY", key)
    expert = HttpExpert(endpoint("http://127.0.0.1:9/v1", key_env="OWL_KEY"), Expert(), SAMPLING)
    (question,) = questions(1)
    gate = Gate("owl", longest=9.0)
    said = [expert._read(_body("stop", f"your key is {key}"), question).text]
    for offset in (*range(80, 125), *range(260, 305)):
        words = "y" * offset + key + "z" * 300
        plain = [words, json.dumps(words), json.dumps({"error": {"message": words}})]
        for body in (*plain, plain[2].replace("/", r"\/"), plain[2].replace("-", r"\u002D")):
            answer = httpx.Response(400, content=body.encode())
            refused = expert._not_ok(answer, answer.content, question, gate, 0.0).refused
            with pytest.raises(http_client.Temporary) as broken:
                expert._read(body.encode(), question)
            said += [refused, str(broken.value), expert._safe(ValueError(words))]
    assert len(said) == 1 + 90 * 15 and all(len(words) < 400 for words in said)
    # Cut words may hold the beginning of "[key]", never one of the key.
    assert not [words for words in said if "sk" in words or "very" in words]


def test_a_placeholder_for_a_key_takes_no_word_out_of_an_answer(monkeypatch):
    monkeypatch.setenv("OWL_KEY", "none")
    expert = HttpExpert(endpoint("http://127.0.0.1:9/v1", key_env="OWL_KEY"), Expert(), SAMPLING)
    said = expert._read(_body("stop", "There is none."), questions(1)[0])
    assert said.text == "There is none."


def test_a_missing_key_is_named_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("OWL_KEY", raising=False)
    with pytest.raises(ValueError, match="the environment variable OWL_KEY .key_env. is not set"):
        panel(tmp_path, endpoint("http://127.0.0.1:9/v1", key_env="OWL_KEY"))
    monkeypatch.setenv("OWL_KEY", "two words")
    with pytest.raises(ValueError, match="blanks or letters outside ASCII") as error:
        panel(tmp_path, endpoint("http://127.0.0.1:9/v1", key_env="OWL_KEY"))
    assert "two words" not in str(error.value)


def test_a_wrong_address_stops_at_once(tmp_path):
    with (
        serving(tmp_path / "log") as url,
        panel(tmp_path, endpoint(url + "/chat")) as experts,
        pytest.raises(ExpertError, match="HTTP 404.*look at base_url and model 'm'"),
    ):
        experts.ask(questions(50), what="test")
    assert len(requests(tmp_path / "log")) <= 8


def test_a_refusal_is_an_answer_that_is_not_asked_for_again(tmp_path):
    log = tmp_path / "log"
    with serving(log, "--faults", "ok,400,ok,ok", "--stubborn") as url:
        for _ in range(2):
            with panel(tmp_path, endpoint(url, concurrency=1)) as experts:
                answers = experts.ask(questions(4), what="test")
                assert [given[0].refused is None for given in answers] == [True, False, True, True]
        assert answers[1][0].refused == "HTTP 400: this prompt breaks a rule"
    assert len(requests(log)) == 4


def test_a_server_that_refuses_everything_is_an_error_and_leaves_no_refusals(tmp_path):
    with (
        serving(tmp_path / "log", "--faults", "400", "--stubborn") as url,
        panel(tmp_path, endpoint(url, concurrency=2)) as experts,
    ):
        with pytest.raises(ExpertError, match="all of the first 3 questions were refused"):
            experts.ask(questions(9), what="test")
        assert len(experts.cache) == 0


def test_no_more_requests_are_under_way_than_allowed(tmp_path):
    log = tmp_path / "log"
    with serving(log, "--delay", "0.1") as url, panel(tmp_path, endpoint(url, concurrency=3)) as experts:
        experts.ask(questions(12), what="test")
    lines = list(map(json.loads, log.read_text().splitlines()))
    under_way = most = 0
    for line in lines:
        under_way += 1 if "start" in line else -1
        most = max(most, under_way)
    assert most == 3


def test_a_stop_lets_the_requests_under_way_end_and_begins_no_other(tmp_path):
    log, said = tmp_path / "log", []

    def stopping():
        return len(requests(log)) >= 4

    with (
        serving(log, "--delay", "0.2") as url,
        panel(tmp_path, endpoint(url, concurrency=2), stopping=stopping, say=said.append) as experts,
    ):
        with pytest.raises(ExpertError, match="questions without an answer: stopped"):
            experts.ask(questions(20), what="test")
        num = len(experts.cache)
        assert num == len(answered(log)) == len(requests(log)) < 8
    assert said[-1].startswith(f"test: {num} answers in ")


def test_a_stop_after_a_first_refusal_is_a_stop(tmp_path):
    log = tmp_path / "log"
    with (
        serving(log, "--faults", "400", "--stubborn") as url,
        panel(tmp_path, endpoint(url, concurrency=1), stopping=lambda: len(requests(log)) >= 1) as experts,
    ):
        with pytest.raises(Interrupted, match="3 questions without an answer: stopped"):
            experts.ask(questions(3), what="test")
        # Whether the server refuses this question or every one is not known yet.
        assert len(experts.cache) == 0


def test_own_fields_are_sent_and_are_part_of_the_key(tmp_path):
    with serving(tmp_path / "log") as url:
        for extra in (None, '{"top_k": 20}', '{"seed": null}'):
            with panel(tmp_path, endpoint(url, extra_body=extra)) as experts:
                experts.ask(questions(1), what="test")
                assert experts.asked == 1
                body = experts._experts["owl"]._body(questions(1)[0])
                assert body.get("top_k") == (20 if extra and "top_k" in extra else None)
                assert ("seed" in body) == (extra is None or "seed" not in extra)
