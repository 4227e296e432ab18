"""A small server that speaks the routes of the vLLM sidecar, in a process of its own, and can go wrong.

It holds real weights: published versions are read, checked and applied, rollouts come from `JaxEngine` and
scores of prompts from the trainer's forward pass, so that log-probs are exact. `POST /_fault` sets what goes
wrong; see `FAULTS`. Started by `FakeServers`.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_CACHE = tempfile.TemporaryDirectory(prefix="fake-vllm-")
"""Compiled programs, shared by all fakes of a test session."""
FAULTS = {
    "stale_head": "an applied version leaves the output head of a tied model as it was",
    "stale_layer": "an applied version leaves this layer as it was",
    "skip_apply": "an applied version changes nothing, and every answer says that it did",
    "keep_cache": "rollouts go on with the weights before: the cache of prompts is never reset",
    "refuse_stage": "staging answers with an error",
    "die_on_apply": "the process ends in the middle of this many applies",
    "die_on_generate": "the process ends in the middle of this many rollouts, with status 0",
    "hang": "this many rollouts are answered only after `hang_seconds`",
    "cut": "this many rollouts are cut off in the middle of the answer",
    "error": "this many rollouts are answered with status 500",
    "abort": "this many rollouts end with finish reason abort",
    "nan": "this many rollouts have a log-prob of -9999",
    "short": "this many rollouts lack a log-prob",
    "versions": "rollouts name these versions",
}


def serve(args: argparse.Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Most of the life of such a process would be compilation.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(args.cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import dataclasses

    import jax
    import numpy as np

    from selfemo_jax.model import orbax_io
    from selfemo_jax.model.config import ModelConfig
    from selfemo_jax.model.decoder import Compute, init_params
    from selfemo_jax.model.hf_table import unflatten
    from selfemo_jax.model.sharding import make_mesh
    from selfemo_jax.rollout.engine import Request, Sampling
    from selfemo_jax.rollout.jax_engine import JaxEngine
    from selfemo_jax.rollout.trainer_logprobs import TrainerLogprobs

    model = ModelConfig.from_hf(json.loads((args.model / "config.json").read_text()))
    boot = init_params(model, jax.random.key(987))
    # Untied, so that a stale head can be told from a stale embedding.
    model = dataclasses.replace(model, tie_embeddings=False)
    logprobs = TrainerLogprobs(model, Compute(), make_mesh({}))
    engine = JaxEngine(model, Compute(), max_rows=32)

    class State:
        params = dict(boot) if "head" in boot else boot | {"head": boot["embed"].T}
        cached = params
        staged = None
        applied: dict = {}
        version = "default"
        faults: dict = {}
        paused = False
        inside = 0
        served = 0

    state = State()
    changed = threading.Condition()
    one_at_a_time = threading.Lock()

    def take(name: str) -> bool:
        """Whether this fault hits now; counted faults are used up."""
        with changed:
            left = state.faults.get(name, 0)
            if isinstance(left, bool) or not isinstance(left, int):
                return bool(left)
            state.faults[name] = left - 1
            return left > 0

    def stage(path: str) -> dict:
        folder = Path(path)
        if folder.resolve().parent != args.root.resolve():
            raise ValueError(f"{path}: outside of {args.root}")
        manifest = json.loads((folder / "manifest.json").read_text())
        if str(manifest["version"]) != folder.name or state.faults.get("refuse_stage"):
            raise ValueError(f"{path}: refused")
        for name, entry in manifest["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["digest"]:
                raise ValueError(f"{name}: damaged")
        stores = orbax_io.open_arrays(folder / "params")
        params = unflatten({path: orbax_io.read_array(store) for path, store in stores.items()})
        if "head" not in params:
            params["head"] = np.ascontiguousarray(np.asarray(params["embed"]).T)
        digests = {name: row["digest"] for name, row in manifest["tensors"].items()}
        state.staged = (manifest["version"], params, digests)
        return {"version": manifest["version"], "seconds": {}, "num_tensors": len(digests)}

    def apply(version: int) -> dict:
        if state.staged is None or state.staged[0] != int(version):
            raise ValueError(f"version {version} is not staged")
        if not state.paused:
            raise ValueError("apply without a pause")
        if take("die_on_apply"):
            os._exit(0)
        _, params, digests = state.staged
        old = state.params
        if state.faults.get("stale_head"):
            params = params | {"head": old["head"]}
        if state.faults.get("stale_layer") is not None:
            index = state.faults["stale_layer"]
            layers = {name: np.array(leaf) for name, leaf in params["layers"].items()}
            for name, leaf in layers.items():
                leaf[index] = np.asarray(old["layers"][name])[index]
            params = params | {"layers": layers}
        if not state.faults.get("skip_apply"):
            state.params = params
        state.applied = {"version": int(version), "digests": digests}
        state.staged = None
        return {"version": int(version)}

    methods = {
        "stage_weights": stage,
        "apply_weights": apply,
        "applied_digest": lambda: state.applied,
        "drop_staged": lambda: setattr(state, "staged", None),
    }

    def generate(body: dict) -> dict:
        wanted = body["sampling_params"]
        prompt = tuple(body["token_ids"])
        if "prompt_logprobs" in wanted:
            with one_at_a_time:
                (row,) = logprobs(state.params, [prompt])
            rows = [None] + [
                {str(token): {"logprob": float(value)}} for token, value in zip(prompt[1:], row, strict=True)
            ]
            return {"choices": [], "prompt_logprobs": rows}
        if take("die_on_generate"):
            os._exit(0)
        if take("hang"):
            time.sleep(state.faults.get("hang_seconds", 60))
        if take("error"):
            raise RuntimeError("EngineCore encountered an issue")
        sampling = Sampling(
            max_tokens=wanted["max_tokens"],
            temperature=wanted["temperature"],
            stop_ids=tuple(wanted["stop_token_ids"]),
        )
        time.sleep(args.delay)
        with one_at_a_time:
            engine.update_policy(state.cached, version=0)
            seed = wanted.get("seed", time.time_ns() % 2**32)
            request = Request(id="x", token_ids=prompt, num=wanted["n"], seed=seed)
            (group,) = engine.generate([request], sampling)
        state.served += 1
        versions = state.faults.get("versions", [state.version])
        choices = []
        for index, found in enumerate(group.completions):
            content = [
                {"token_id": token, "logprob": value}
                for token, value in zip(found.token_ids, found.logprobs, strict=True)
            ]
            choices.append(
                {
                    "index": index,
                    "token_ids": list(found.token_ids),
                    "finish_reason": found.finish_reason,
                    "logprobs": {"content": content},
                    "weight_versions": [{"version": v, "start": 0, "end": 1} for v in versions],
                }
            )
        if take("abort"):
            choices[-1]["finish_reason"] = "abort"
        if take("nan"):
            choices[-1]["logprobs"]["content"][0]["logprob"] = -9999.0
        if take("short"):
            choices[-1]["logprobs"]["content"].pop()
        return {"choices": choices}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status: int, body: dict, *, cut: bool = False) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True

        def do_GET(self):
            if self.path == "/health":
                return self.answer(200, {})
            if self.headers.get("Authorization") != f"Bearer {args.key}":
                return self.answer(401, {"error": "no key"})
            if self.path == "/weight_info":
                return self.answer(200, {"weight_version": state.version})
            if self.path == "/is_paused":
                return self.answer(200, {"is_paused": state.paused})
            if self.path == "/_served":
                return self.answer(200, {"served": state.served})
            return self.answer(404, {"error": self.path})

        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}") or {}
            if self.headers.get("Authorization") != f"Bearer {args.key}":
                return self.answer(401, {"error": "no key"})
            try:
                found = self.handle_route(self.path, body)
            except ValueError as error:
                return self.answer(400, {"error": {"message": str(error)}})
            except RuntimeError as error:
                return self.answer(500, {"error": {"message": str(error)}})
            cut = self.path.startswith("/inference") and found.get("choices") and take("cut")
            return self.answer(200, found, cut=bool(cut))

        def handle_route(self, path: str, body: dict) -> dict:
            if path == "/_fault":
                state.faults = body
            elif path == "/pause?mode=wait":
                with changed:
                    state.paused = True
                    changed.wait_for(lambda: state.inside == 0)
            elif path == "/resume":
                with changed:
                    state.paused = False
                    changed.notify_all()
            elif path == "/reset_prefix_cache":
                if not state.faults.get("keep_cache"):
                    state.cached = state.params
            elif path == "/update_weight_version":
                state.version = body["new_version"]
            elif path == "/collective_rpc":
                return {"results": [methods[body["method"]](*body.get("args", []))]}
            elif path == "/inference/v1/generate":
                with changed:
                    changed.wait_for(lambda: not state.paused)
                    state.inside += 1
                try:
                    return generate(body)
                finally:
                    with changed:
                        state.inside -= 1
                        changed.notify_all()
            else:
                raise ValueError(f"no route {path}")
            return {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"PORT {server.server_address[1]}", flush=True)
    server.serve_forever()


class FakeServers:
    """Processes of the fake, as `rollout/supervisor.py` would hold those of vLLM."""

    def __init__(self, model: Path, root: Path, *, replicas: int = 1, delay: float = 0.0):
        self.key = "fake-key"
        self.restarts = 0
        self.max_restarts = 3
        self._command = [
            sys.executable, __file__, "--model", str(model), "--root", str(root), "--key", self.key,
            "--delay", str(delay), "--cache", _CACHE.name,
        ]  # fmt: skip
        self._processes: list[subprocess.Popen] = []
        self._ports: list[int] = []
        for _ in range(replicas):
            self._processes.append(self._start())
        self._ports = [self._port(process) for process in self._processes]

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{port}" for port in self._ports)

    def exit_reason(self) -> str | None:
        codes = [process.poll() for process in self._processes]
        ended = [str(code) for code in codes if code is not None]
        return f"a fake server ended with status {', '.join(ended)}" if ended else None

    def restart(self, which=None):
        if self.restarts >= self.max_restarts:
            raise RuntimeError(f"restarted {self.restarts} times in a row")
        self.restarts += 1
        for index in range(len(self._processes)) if which is None else which:
            self._processes[index].kill()
            self._processes[index].wait()
            self._processes[index] = self._start()
            self._ports[index] = self._port(self._processes[index])
        return which

    def kill(self, index: int = 0) -> None:
        self._processes[index].kill()
        self._processes[index].wait()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            process.stdout.close()

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def _port(self, process: subprocess.Popen) -> int:
        line = process.stdout.readline()
        assert line.startswith("PORT "), line
        return int(line.split()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--cache", type=Path, required=True)
    serve(parser.parse_args())
