"""A policy as its own expert: the rollout engine answers chats in the policy's template."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selfemo_jax.data.codec import TextCodec
from selfemo_jax.experts.ask import Answer, ChatSampling, Question, Usage, question_key
from selfemo_jax.rollout.engine import Engine, Request, Sampling
from selfemo_jax.settings.experts import Endpoint

PART = 256
"""Questions handed to the engine in one call: what a stop in between loses at most."""


class PolicyExpert:
    """Answers of the policy in an engine. Its model name is a digest of the weights, so that another
    policy's answers are never taken for its own."""

    def __init__(
        self,
        endpoint: Endpoint,
        sampling: ChatSampling,
        engine: Engine,
        codec: TextCodec,
        params: Any,
        *,
        thinking: bool,
        max_prompt: int,
    ):
        """Gives the engine the weights; ``max_prompt`` is the longest prompt in tokens that it takes."""
        self.endpoint, self.sampling = endpoint, sampling
        self.model = f"policy-{params_digest(params)[:16]}"
        self._engine, self._codec, self._max_prompt = engine, codec, max_prompt
        self._frame = codec.chat_frame(thinking=thinking)
        engine.update_policy(params, version=0)

    def ask(
        self, questions: Sequence[Question], stopping: Callable[[], bool]
    ) -> Iterator[tuple[Question, Answer]]:
        """The answers as they come, part by part, until ``stopping``. A chat that does not fit is refused;
        RuntimeError when the engine loses one."""
        sampling = Sampling(
            max_tokens=self.sampling.max_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            stop_ids=self._codec.stop_ids,
        )
        for start in range(0, len(questions), PART):
            if stopping():
                return
            part = questions[start : start + PART]
            prompts = [self._encode(question) for question in part]
            requests = []
            for index, (question, ids) in enumerate(zip(part, prompts, strict=True)):
                key = question_key(self.model, question, self.sampling)
                if len(ids) > self._max_prompt:
                    words = f"the chat has {len(ids)} tokens, the policy reads {self._max_prompt}"
                    yield question, self._answer(key, "", "refused", len(ids), 0, refused=words)
                    continue
                seed = int(key[:16], 16)
                requests.append(Request(id=str(index), token_ids=tuple(ids), num=1, seed=seed))
            for group in self._engine.generate(requests, sampling):
                question, ids = part[int(group.request_id)], prompts[int(group.request_id)]
                if group.error is not None:
                    raise RuntimeError(f"expert {self.endpoint.name}: the engine lost a chat: {group.error}")
                said = group.completions[0]
                stopped = said.finish_reason == "stop"
                text = self._codec.decode(said.token_ids[:-1] if stopped else said.token_ids)
                key = question_key(self.model, question, self.sampling)
                finish = "stop" if stopped else "length"
                yield question, self._answer(key, text, finish, len(ids), len(said.token_ids))

    def _encode(self, question: Question) -> list[int]:
        frame, codec = self._frame, self._codec
        between = frame.between if frame.between is not None else "\n\n"
        return [
            *codec.encode_markup(frame.before),
            *codec.encode_data(question.system),
            *codec.encode_markup(between),
            *codec.encode_data(question.user),
            *codec.encode_markup(frame.after),
        ]

    def _answer(
        self, key: str, text: str, finish: str, num_in: int, num_out: int, refused: str | None = None
    ) -> Answer:
        return Answer(
            key=key,
            source=self.endpoint.name,
            model=self.model,
            text=text.encode("utf-8", "replace").decode("utf-8"),
            finish_reason=finish,
            usage=Usage(prompt_tokens=num_in, completion_tokens=num_out),
            refused=refused,
        )


def params_digest(params: Any) -> str:
    """Hexadecimal SHA-256 over names, shapes and two sums of the bits of each array.

    The sums are of whole numbers modulo 2**32, so they are the same on every mesh and in every order.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sums = np.asarray(_bit_sums(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {sums.tolist()}\n".encode())
    return digest.hexdigest()


@jax.jit
def _bit_sums(leaf: jax.Array) -> jax.Array:
    width = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for dim in range(leaf.ndim):
        step = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
        place = place * jnp.uint32(leaf.shape[dim]) + step
    odd = 2 * place + 1
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x9E3779B1)
    return jnp.stack([jnp.sum(bits * odd), jnp.sum((mixed ^ place) * odd)])
