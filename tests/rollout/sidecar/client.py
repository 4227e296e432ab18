"""The few calls that the tests make, with the standard library alone."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NUM_PROBES = 3
PROBE_TOKENS = 150
"""More than a block of the prefix cache, which holds 128 tokens on the CPU."""


@dataclass(frozen=True)
class Client:
    """A server and its key."""

    url: str
    key: str | None

    def call(self, path: str, body: Any = None, *, method: str | None = None, timeout: float = 60) -> tuple:
        """(status, parsed answer)."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content

    def rpc(self, name: str, **kwargs: Any) -> tuple[int, Any]:
        """(200, the first worker's result), or (another status, the reason) where any worker refuses."""
        status, answer = self.call("/collective_rpc", {"method": name, "kwargs": kwargs}, timeout=120)
        if status != 200:
            return status, answer["error"]["message"]
        errors = [result["error"] for result in answer["results"] if "error" in result]
        return (500, "; ".join(errors)) if errors else (200, answer["results"][0])

    def refresh(self, folder: Path) -> dict[str, Any]:
        """Stage, pause, apply, name the version, forget the prefix cache, resume; what was applied."""
        version = int(folder.name)
        status, staged = self.rpc("stage_weights", path=str(folder))
        assert status == 200, staged
        assert self.call("/pause?mode=wait", method="POST")[0] == 200
        try:
            status, applied = self.rpc("apply_weights", version=version)
            assert status == 200, applied
            assert self.call("/update_weight_version", {"new_version": str(version)})[0] == 200
            assert self.call("/reset_prefix_cache", method="POST")[0] == 200
        finally:
            assert self.call("/resume", method="POST")[0] == 200
        return {"staged": staged, "applied": applied}

    def answers(self, *, max_tokens: int = 12) -> list[tuple[list[int], list[float]]]:
        """Greedy tokens and their log-probs after fixed prompts."""
        return [self.answer(prompt, max_tokens=max_tokens) for prompt in probes()]

    def answer(self, prompt: list[int], *, max_tokens: int = 12) -> tuple[list[int], list[float]]:
        sampling = {"n": 1, "max_tokens": max_tokens, "temperature": 0.0, "logprobs": 0, "ignore_eos": True}
        body = {"model": "policy", "token_ids": prompt, "sampling_params": sampling}
        status, answer = self.call("/inference/v1/generate", body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        return choice["token_ids"], [item["logprob"] for item in choice["logprobs"]["content"]]

    def version(self) -> str:
        """The version the server says it serves."""
        return self.call("/weight_info")[1]["weight_version"]


def probes() -> list[list[int]]:
    """Fixed prompts."""
    rng = np.random.default_rng(5)
    return [[int(token) for token in rng.integers(5, 1900, PROBE_TOKENS)] for _ in range(NUM_PROBES)]
