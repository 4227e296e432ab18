"""The panel: what is asked of whom, what is paid for once, what a killed process leaves."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest
from rich.console import Console

from selfemo_jax.experts import panel as panel_module
from selfemo_jax.experts.ask import Answer, ChatSampling, ExpertError, Question, Usage, question_key
from selfemo_jax.experts.cache import AnswerCache
from selfemo_jax.experts.panel import Panel
from selfemo_jax.settings.experts import Expert
from tests.experts.chat_server import answered, requests, serving
from tests.experts.test_http_client import endpoint, panel, questions

SAMPLING = ChatSampling(temperature=0.7, top_p=1.0, max_tokens=1024)


def test_the_key_is_the_model_the_prompt_and_the_sampling():
    base = Question(id="a", system="s", user="u")
    same = question_key("m", Question(id="b", system="s", user="u"), SAMPLING)
    assert question_key("m", base, SAMPLING) == same
    others = [
        question_key("n", base, SAMPLING),
        question_key("m", base.again(), SAMPLING),
        question_key("m", Question(id="a", system="su", user=""), SAMPLING),
        question_key("m", base, ChatSampling(temperature=0.0, top_p=1.0, max_tokens=1024)),
    ]
    assert len({same, *others}) == 5


def test_nothing_is_asked_twice(tmp_path):
    log = tmp_path / "log"
    with serving(log) as url:
        with panel(tmp_path, endpoint(url)) as experts:
            # Two dialogues with the same words are one question.
            first = experts.ask([*questions(3), *questions(3)], what="test")
        with panel(tmp_path, endpoint(url)) as experts:
            again = experts.ask(questions(4), what="test")
            assert experts.asked == 1
            assert experts.num_open(questions(6)) == 2
    assert first[:3] == first[3:] == again[:3]
    assert len(requests(log)) == 4


def test_questions_are_split_among_the_experts_and_marked(tmp_path):
    log = tmp_path / "log"
    with serving(log) as url:
        both = [endpoint(url, name="owl"), endpoint(url, name="elk", model="n")]
        with panel(tmp_path, *both) as experts:
            whole = [given[0].source for given in experts.ask(questions(40), what="test")]
        (tmp_path / "cache.jsonl").unlink()
        with panel(tmp_path, *both) as experts:
            part = [given[0].source for given in experts.ask(questions(40)[5:], what="test")]
    assert min(Counter(whole).values()) >= 10 and set(whole) == {"owl", "elk"}
    # Who answers does not depend on what else is asked, nor on the name of the question.
    assert part == whole[5:]
    renamed = [Question(id="x", system=q.system, user=q.user) for q in questions(40)]
    with panel(tmp_path, *both) as experts:
        assert [given[0].source for given in experts.ask(renamed[5:], what="test")] == part
        assert experts.asked == 0
    asked_models = Counter(request["model"] for request in requests(log)[:40])
    assert asked_models == {"m": whole.count("owl"), "n": whole.count("elk")}


def test_all_experts_answer_every_question_when_asked_to(tmp_path):
    with serving(tmp_path / "log") as url:
        both = [endpoint(url, name="owl"), endpoint(url, name="elk", model="n")]
        with panel(tmp_path, *both, assign="all") as experts:
            answers = experts.ask(questions(3), what="test")
    assert [[answer.source for answer in given] for given in answers] == [["owl", "elk"]] * 3
    assert {answer.model for given in answers for answer in given} == {"m", "n"}


def test_two_servers_of_one_model_are_not_both_paid_for_an_answer(tmp_path):
    log = tmp_path / "log"
    with serving(log) as url:
        both = [endpoint(url, name="owl"), endpoint(url, name="elk")]
        with panel(tmp_path, *both, assign="all") as experts:
            answers = experts.ask(questions(3), what="test")
            assert experts.asked == 3
    assert [[answer.source for answer in given] for given in answers] == [["owl"]] * 3
    assert len(requests(log)) == 3


def test_one_broken_server_does_not_cost_what_another_writes(tmp_path):
    with serving(tmp_path / "log", "--delay", "0.3") as url:
        dead = endpoint("http://127.0.0.1:9/v1", name="dead", model="n", concurrency=2)
        experts = panel(tmp_path, dead, endpoint(url, name="owl"), assign="all")
        with experts, pytest.raises(ExpertError, match="expert dead: 3 questions failed"):
            experts.ask(questions(4), what="test")
    with AnswerCache(tmp_path / "cache.jsonl") as cache:
        assert len(cache) == 4


def test_costs_are_added_up_and_bounded(tmp_path):
    log, said = tmp_path / "log", []
    with serving(log) as url:
        priced = endpoint(url, price_in=1e6, price_out=2e6, concurrency=1)
        with panel(tmp_path, priced, say=said.append) as experts:
            (given,) = experts.ask(questions(1), what="test")
            usage = given[0].usage
            assert given[0].cost == usage.prompt_tokens + 2 * usage.completion_tokens > 0
            assert experts.cost == experts.cache.cost == given[0].cost
            one = given[0].cost
        assert f"cost {one:.4f}, {usage.prompt_tokens} + {usage.completion_tokens} tokens" in said[-1]
        with (
            panel(tmp_path, priced, max_cost=2.5 * one) as experts,
            pytest.raises(ExpertError, match=r"max_cost .* is reached \(.* spent\); raise it"),
        ):
            experts.ask(questions(9), what="test")
    # What the cache already held counts too: one before, two more.
    assert len(requests(log)) == 3


def test_progress_says_how_many_how_long_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setattr(panel_module, "SAY_EVERY", 0.0)
    said = []
    with serving(tmp_path / "log") as url:
        priced = endpoint(url, price_in=1e6, price_out=2e6, concurrency=1)
        with panel(tmp_path, priced, say=said.append) as experts:
            answers = experts.ask(questions(3), what="test")
    usages = [given[0].usage for given in answers]
    assert [line.split(",")[0] for line in said[1:4]] == ["test: 1/3", "test: 2/3", "test: 3/3"]
    for number, line in enumerate(said[1:4], start=1):
        num_in = sum(usage.prompt_tokens for usage in usages[:number])
        num_out = sum(usage.completion_tokens for usage in usages[:number])
        assert re.search(r", eta \d+\.\d min, ", line)
        assert f"cost {num_in + 2 * num_out:.4f}, {num_in:,} + {num_out:,} tokens" in line
    assert ", eta 0.0 min, " in said[3]


def test_the_time_left_is_that_of_the_rest_at_the_speed_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(panel_module, "SAY_EVERY", 0.0)
    now, said = [100.0], []
    monkeypatch.setattr(panel_module.time, "monotonic", lambda: now[0])
    owl = endpoint("http://127.0.0.1:9/v1")
    with panel(tmp_path, owl, say=said.append) as experts, experts._progress("test", 10) as advance:
        for seconds in (160.0, 190.0):
            now[0] = seconds
            advance()
    # One in 60 s leaves nine minutes; two in 90 s leave eight times 45 s.
    assert [line.split(",")[1] for line in said] == [" eta 9.0 min", " eta 6.0 min"]


def test_a_terminal_has_a_bar_with_the_time_left_and_the_cost(tmp_path):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    with serving(tmp_path / "log") as url:
        settings = Expert(endpoints=[endpoint(url, price_in=1e6, concurrency=1)])
        said = []
        with Panel(settings, tmp_path / "cache.jsonl", say=said.append, console=console) as experts:
            experts.ask(questions(3), what="test")
            cost = experts.cost
    words = shown.getvalue()
    assert "3/3" in words and "eta" in words and f"cost {cost:.4f}" in words and len(said) == 2


def test_a_recording_answers_in_the_servers_place_and_at_no_cost(tmp_path):
    with serving(tmp_path / "log") as url, panel(tmp_path, endpoint(url, price_out=1.0)) as experts:
        live = experts.ask(questions(3), what="test")
    recording = tmp_path / "recorded.jsonl"
    (tmp_path / "cache.jsonl").rename(recording)
    replay = endpoint(None, name="tape", kind="replay", record=str(recording))
    with panel(tmp_path, replay) as experts:
        played = experts.ask(questions(3), what="test")
        assert [given[0].text for given in played] == [given[0].text for given in live]
        assert {(given[0].source, given[0].cost) for given in played} == {("tape", 0.0)}
        with pytest.raises(ExpertError, match="2 questions .* the recording .* does not hold it"):
            experts.ask(questions(5), what="test")
    with panel(tmp_path / "other", replay, max_tokens=7) as experts, pytest.raises(ExpertError):
        experts.ask(questions(1), what="test")


def answer(key: str, **changes) -> Answer:
    return Answer(key=key, source="owl", model="m", text="Ja – „gut“ \U0001f642", **changes)


def test_a_cache_gives_back_what_it_was_given(tmp_path):
    path, question = tmp_path / "cache.jsonl", Question(id="a", system="s", user="\ud800 u")
    given = answer("k", usage=Usage(prompt_tokens=3, completion_tokens=4), cost=0.25, finish_reason="length")
    with AnswerCache(path) as cache:
        cache.add(given, question, SAMPLING)
        cache.add(answer("l", refused="no"), question, SAMPLING)
    with AnswerCache(path) as cache:
        assert cache.get("k") == given and cache.get("l").refused == "no" and cache.get("x") is None
        assert (len(cache), cache.cost) == (2, 0.25)
    assert json.loads(path.read_text().splitlines()[0])["user"] == "? u"


def test_a_line_that_a_crash_cut_off_is_dropped_and_the_rest_kept(tmp_path):
    path, question = tmp_path / "cache.jsonl", Question(id="a", system="s", user="u" * 200_000)
    with AnswerCache(path) as cache:
        for key in "abc":
            cache.add(answer(key), question, SAMPLING)
    whole = path.read_bytes()
    for cut in (1, 100, 150_000):
        path.write_bytes(whole[:-cut])
        with AnswerCache(path) as cache:
            assert (len(cache), cache.get("c")) == (2, None)
            cache.add(answer("c"), question, SAMPLING)
        assert path.read_bytes() == whole
    path.write_bytes(b'{"key": "a"')
    with AnswerCache(path) as cache:
        assert len(cache) == 0 and path.read_bytes() == b""


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "cache.jsonl"
    path.write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match=r"cache.jsonl:1: not a recorded expert answer \(KeyError"):
        AnswerCache(path)


def test_two_writers_are_refused(tmp_path):
    with (
        AnswerCache(tmp_path / "cache.jsonl"),
        pytest.raises(ValueError, match="another process is writing this expert cache"),
    ):
        AnswerCache(tmp_path / "cache.jsonl")
    AnswerCache(tmp_path / "cache.jsonl").close()


def test_a_cache_may_grow_but_not_change_or_shrink(tmp_path):
    path, question = tmp_path / "cache.jsonl", Question(id="a", system="s", user="u")
    with AnswerCache(path) as cache:
        cache.add(answer("a"), question, SAMPLING)
        recorded = cache.length_and_digest()
        cache.add(answer("b"), question, SAMPLING)
        cache.check_prefix(*recorded)
    with AnswerCache(path) as cache:
        cache.check_prefix(*recorded)
        with pytest.raises(ValueError, match="the expert cache was changed"):
            cache.check_prefix(recorded[0], "0" * 64)
        with pytest.raises(ValueError, match="lost answers that the run rests on"):
            cache.check_prefix(recorded[0] * 9, recorded[1])


ASK_ALL = """
import sys
from tests.experts.test_http_client import endpoint, panel, questions
from pathlib import Path
more = {"timeout": 60.0, "tries": int(sys.argv[4]) if len(sys.argv) > 4 else 3}
with panel(Path(sys.argv[1]), endpoint(sys.argv[2], concurrency=4), **more) as experts:
    print(len(experts.ask(questions(int(sys.argv[3])), what="test")), experts.asked)
"""


def test_a_killed_process_goes_on_where_it_was_and_pays_for_nothing_twice(tmp_path):
    log, number = tmp_path / "log", 30
    faults = "ok,ok,500,ok,cut,ok,html"
    with serving(log, "--delay", "0.1", "--faults", faults) as url:
        command = [sys.executable, "-c", ASK_ALL, str(tmp_path), url, str(number)]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()})
        try:
            deadline = time.monotonic() + 60
            while not log.exists() or len(answered(log)) < 10:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = (tmp_path / "cache.jsonl").read_bytes()
        time.sleep(0.5)  # What was under way reaches its end at the server.
        before = Counter(answered(log))
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    num_kept = kept.count(b"\n")
    assert done.stdout.split()[-2:] == [str(number), str(number - num_kept)]
    assert (tmp_path / "cache.jsonl").read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    # Only the answers that were on their way to a dead process are given again.
    assert 5 <= num_kept < number and sum(before.values()) - num_kept <= 4
    assert sum(Counter(answered(log)).values()) == number + sum(before.values()) - num_kept


def killed_after(number: int, log, process) -> None:
    """Leaves when the server has answered that many questions, or the process that asks has ended."""
    deadline = time.monotonic() + 60
    while not log.exists() or len(answered(log)) < number:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def asking(tmp_path, url: str, number: int, tries: int) -> subprocess.Popen:
    command = [sys.executable, "-c", ASK_ALL, str(tmp_path), url, str(number), str(tries)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_server_that_dies_and_comes_back_is_asked_only_for_the_rest(tmp_path):
    log, number, port = tmp_path / "log", 30, str(free_port())
    with serving(log, "--delay", "0.1", "--port", port) as url:
        process = asking(tmp_path, url, number, tries=60)
        killed_after(8, log, process)
    # The server is dead now, with some requests in its hands; who asks does not know.
    time.sleep(0.5)
    assert process.poll() is None
    before = answered(log)
    with serving(log, "--delay", "0.1", "--port", port):
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said.split()[-2:] == [str(number), str(number)]
    cached = [json.loads(line)["key"] for line in (tmp_path / "cache.jsonl").read_text().splitlines()]
    assert len(cached) == len(set(cached)) == number
    # Given twice can only be what was on its way when the server died.
    assert 8 <= len(before) < number
    assert len(answered(log)) - number <= 4 and len(set(answered(log))) == number


def test_a_server_that_stays_dead_costs_only_what_it_did_not_answer(tmp_path):
    log, number, port = tmp_path / "log", 30, str(free_port())
    with serving(log, "--delay", "0.1", "--port", port) as url:
        process = asking(tmp_path, url, number, tries=2)
        killed_after(8, log, process)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "questions failed one after the other" in errors
    kept = (tmp_path / "cache.jsonl").read_bytes()
    num_kept, before = kept.count(b"\n"), len(answered(log))
    assert 8 <= before < number and before - num_kept <= 4
    with serving(log, "--port", port):
        again = asking(tmp_path, url, number, tries=2)
        said, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert said.split()[-2:] == [str(number), str(number - num_kept)]
    assert (tmp_path / "cache.jsonl").read_bytes().startswith(kept)
    assert len(answered(log)) == before + number - num_kept and len(set(answered(log))) == number
