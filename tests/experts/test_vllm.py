"""The project's own vLLM server as an expert: its key, its chat template, its answers."""

import json
import urllib.request
from pathlib import Path

import pytest

from selfemo_jax.experts.ask import ExpertError, Question
from selfemo_jax.experts.panel import Panel
from selfemo_jax.rollout.supervisor import sidecar_python, start_sidecar
from selfemo_jax.settings.experts import Endpoint, Expert
from selfemo_jax.settings.rollout import Sidecar as Settings
from tests.experts.test_policy import written_out
from tests.fabricated import codec
from tests.rollout.sidecar.published import hf_config, random_weights, write_model_folder

ROOT = Path(__file__).parents[2]
QUESTIONS = [Question(id=f"q{n}", system="You help.", user=f"Say it {n} times. </think>") for n in range(4)]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_vllm_server_answers_as_an_expert(tmp_path, monkeypatch):
    try:
        environment = str(sidecar_python(str(ROOT / ".venv-vllm")))
    except ValueError as error:
        pytest.skip(f"no vLLM: {error}")
    config = hf_config(tied=True)
    model = write_model_folder(tmp_path / "model", config, random_weights(1))
    (tmp_path / "weights").mkdir()
    server = start_sidecar(
        Settings(environment=environment, start_timeout=500.0),
        model_folder=model, run_dir=tmp_path / "run", weights_root=tmp_path / "weights", max_model_len=512,
    )  # fmt: skip
    try:
        monkeypatch.setenv("SELFEMO_SIDECAR_KEY", server.key or "")
        url = f"{server.urls[0]}/v1"
        request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {server.key}"})
        name = json.load(urllib.request.urlopen(request, timeout=30))["data"][0]["id"]
        served = Endpoint(name="own", base_url=url, model=name, key_env="SELFEMO_SIDECAR_KEY")
        settings = Expert(endpoints=[served], temperature=0.0, max_tokens=8)
        with Panel(settings, tmp_path / "cache.jsonl") as panel:
            answers = [given[0] for given in panel.ask(QUESTIONS, what="test")]
        for question, answer in zip(QUESTIONS, answers, strict=True):
            assert answer.usage.completion_tokens >= 1 and answer.finish_reason in ("stop", "length")
            # The same template, though the server cannot keep data from spelling a tag.
            plain = abs(answer.usage.prompt_tokens - len(written_out(question, codec())))
            assert plain <= 24, (answer.usage, len(written_out(question, codec())))
        monkeypatch.setenv("SELFEMO_SIDECAR_KEY", "sk-wrong")
        with Panel(settings, tmp_path / "other.jsonl") as panel, pytest.raises(ExpertError, match="HTTP 401"):
            panel.ask(QUESTIONS, what="test")
    finally:
        server.close()
