"""The folder that `to-hf` writes is served by vLLM as it comes, with the README's line."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from selfemo_jax.checkpoint import save_weights
from selfemo_jax.model.decoder import Compute
from selfemo_jax.model.sharding import make_mesh
from selfemo_jax.parts import bundled_tokenizer
from selfemo_jax.rollout.supervisor import _free_port
from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs
from tests.rollout.served import TIED, sharp
from tests.rollout.sidecar.conftest import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
MODEL = dataclasses.replace(TIED, vocab_size=2048)
"""With as many rows as the bundled tokenizer has tokens."""
QUICK = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def readme_lines() -> tuple[list[str], list[str]]:
    """The conversion and the server, as the README has them."""
    text = (ROOT / "README.md").read_text()
    (convert,) = re.findall(r"^python (tools/convert_hf.py to-hf SRC DST)$", text, re.MULTILINE)
    (serve,) = re.findall(r"^(\.venv-vllm/bin/python -m vllm\S* --model DST[^#\n]*)", text, re.MULTILINE)
    return shlex.split(convert), shlex.split(serve)


def post(url: str, body: dict) -> dict:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(url, data=data, headers=headers), timeout=120
    ) as answer:
        return json.loads(answer.read())


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_stock_vllm_serves_a_converted_folder_by_the_line_of_the_readme(tmp_path, vllm_environment):
    params = sharp(MODEL)
    source, target = tmp_path / "flax", tmp_path / "hf"
    save_weights(source, params, MODEL, tokenizer=bundled_tokenizer(), certificate={})
    convert, serve = readme_lines()
    places = {"SRC": str(source), "DST": str(target)}
    subprocess.run([sys.executable, *(places.get(word, word) for word in convert)], check=True, cwd=ROOT)
    folder = Path(vllm_environment).parent
    command = [places.get(word, word.replace(".venv-vllm/bin", str(folder))) for word in serve]
    port = _free_port()
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"],
            env=os.environ | QUICK,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process, log)
        prompt = [int(token) for token in np.random.default_rng(3).integers(5, 1900, 40)]
        wanted = {"model": str(target), "prompt": prompt, "max_tokens": 8, "temperature": 0.0, "logprobs": 0}
        (choice,) = post(f"{url}/v1/completions", wanted | {"return_token_ids": True})["choices"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ids = choice["token_ids"]
    score = TrainerLogprobs(MODEL, Compute(), make_mesh({}))
    (expected,) = score(params, [(*prompt, *ids)], starts=[len(prompt)])
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], expected, rtol=0, atol=1e-4)
    assert len(ids) == 8
