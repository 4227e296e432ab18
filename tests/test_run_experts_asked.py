"""Whether experts are asked at all, a stop while they make a run wait, and the policy as one of them."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.parts import Parts
from selfemo_jax.run_data import load_data
from selfemo_jax.run_experts import ask_experts, needs_experts
from selfemo_jax.run_resume import Stopped
from tests.experts.chat_server import requests, serving
from tests.fabricated import codec
from tests.model.tiny import TINY
from tests.test_run_experts import asked, config


def test_a_stop_signal_ends_the_wait_that_a_server_asks_for(tmp_path):
    log = tmp_path / "log"
    with serving(log, "--faults", "429", "--retry_after", "60") as url:
        settings_ = config(url, persona={"source": "expert"})
        data = load_data(settings_)

        def stop() -> None:
            until = time.monotonic() + 30
            while not requests(log) and time.monotonic() < until:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        stopper = threading.Thread(target=stop)
        stopper.start()
        began = time.monotonic()
        with pytest.raises(Stopped, match="stopped.*start again .a training run with --resume"):
            asked(settings_, data, tmp_path)
        assert time.monotonic() - began < 50
        stopper.join()


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ({"phases": "none", "cold_start": {"source": "expert"}, "persona": {"source": "expert"}}, False),
        ({"phases": "none", "persona": {"source": "expert", "scope": "history", "splits": ["test"]},
          "eval": {"persona": "given"}}, True),
        ({"phases": "cold", "cold_start": {"source": "mixed"}}, True),
        ({"phases": "cold", "persona": {"source": "expert"}}, True),
        ({"cold_start": {"source": "expert"}}, True),
        # No phase of this arm starts from the cold start.
        ({"cold_start": {"source": "expert"}, "model": {"path": "x"},
          "flywheel": {"control": "all_original", "retrain": {"init": "base"}}}, False),
    ],
)  # fmt: skip
def test_nobody_is_paid_for_what_no_phase_uses(sections, needed):
    assert needs_experts(config(**sections)) is needed


def test_cold_start_answers_that_no_phase_learns_are_not_asked_beside_personas(tmp_path):
    log = tmp_path / "log"
    with serving(log) as url:
        settings_ = config(
            url, persona={"source": "expert"}, cold_start={"source": "mixed"}, model={"path": "x"},
            flywheel={"control": "all_original", "retrain": {"init": "base"}},
        )  # fmt: skip
        data = asked(settings_, load_data(settings_), tmp_path)
    assert len(requests(log)) == len({sample.root_id for sample in data.all_train()})
    assert not (tmp_path / "cold_start.jsonl").exists()


def policy_parts(config_, model) -> Parts:
    mesh = make_mesh({"data": 1, "fsdp": 1, "tp": 1})
    return Parts(
        config=config_, mesh=mesh, codec=codec(), tokenizer_folder=Path(), model=model, compute=Compute(),
        note="", notices=(),
    )  # fmt: skip


def test_a_policy_without_room_for_a_question_is_refused_before_it_is_asked(tmp_path):
    settings_ = config(persona={"source": "expert"}, expert={"endpoints": [{"name": "me", "kind": "policy"}]})
    parts = policy_parts(settings_, replace(TINY, max_positions=768))
    with pytest.raises(ValueError, match=r"expert me: .*768 tokens .*max_tokens is 1024, which leaves -256"):
        ask_experts(settings_, parts, load_data(settings_), tmp_path, lambda text: None)


def test_the_policy_answers_though_training_replays_recorded_rollouts(tmp_path):
    mine = {"endpoints": [{"name": "me", "kind": "policy"}], "max_tokens": 4}
    settings_ = config(
        persona={"source": "expert"},
        expert=mine,
        rollout={"replay": str(tmp_path / "elsewhere")},
        data={"max_items": 4},
    )
    vocab = -(-codec().vocab_size // 128) * 128
    parts = policy_parts(settings_, replace(TINY, vocab_size=vocab, num_layers=1))
    # Four tokens of random weights are no persona: it was asked, and said something.
    with pytest.raises(ValueError, match="no answer could be read; .*there is no closed code block"):
        ask_experts(settings_, parts, load_data(settings_), tmp_path, lambda text: None)
    lines = list(map(json.loads, (tmp_path / "experts.jsonl").read_text().splitlines()))
    assert lines and all(line["usage"]["completion_tokens"] >= 1 and not line["refused"] for line in lines)
