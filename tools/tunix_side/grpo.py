"""tunix's GRPO learner, one step at a time: the whole step as its users run it, sampled in process.

What makes it strong: one model for sampling and training, so that nothing is copied; prompts padded to their
longest, not to a power of two; a cache of exactly the sequence; all rows sampled at once, and scored and
trained a group at a time, which takes a tenth less than all at once on a CPU.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from .feed import Gate, Words, check_example, check_rollout, reward

ENDLESS = 10**9
ROPE_THETA = 1_000_000
"""tunix's Qwen3 rotates by it, whatever its config says."""


class Cluster(rl_cluster.RLCluster):
    """The trainer's models; times the parts of a step and checks what they work on."""

    def __init__(self, prompts: list[list[int]], case: dict[str, Any], **parts: Any):
        self._asked, self._case = prompts, case
        self.parts: dict[str, float] = {}
        self.num_tokens = self.num_updated = self.num_rollouts = 0
        super().__init__(**parts)

    def begin(self) -> None:
        """Before each step."""
        self.parts = {"rollout_s": 0.0, "reference_s": 0.0, "update_s": 0.0}
        self.num_tokens = self.num_updated = 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.num_rollouts += 1
        # Left alone, it is the same for every step.
        self.cluster_config.rollout_config.seed = self.num_rollouts
        began = time.perf_counter()
        found = super().generate(*args, **kwargs)
        self.parts["rollout_s"] += time.perf_counter() - began
        self.num_tokens += check_rollout(
            found.tokens,
            found.left_padded_prompt_tokens,
            self._asked,
            num=self._case["group_size"],
            length=self._case["completion"],
            vocab_size=self.actor_trainer.model.config.vocab_size,
        )
        return found

    def get_ref_per_token_logps(self, *args: Any, **kwargs: Any) -> jax.Array:
        began = time.perf_counter()
        found = jax.block_until_ready(super().get_ref_per_token_logps(*args, **kwargs))
        self.parts["reference_s"] += time.perf_counter() - began
        return found

    def update_actor(self, train_ds: Any, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        super().update_actor(train_ds, *args, **kwargs)
        jax.block_until_ready(nnx.state(self.actor_trainer.model))
        self.parts["update_s"] += time.perf_counter() - began
        longest = max(map(len, self._asked))
        self.num_updated += sum(
            check_example(one, longest=longest, length=self._case["completion"]) for one in train_ds
        )


class Step:
    """A step of the learner for each call."""

    def __init__(self, case: dict[str, Any]):
        prompts = json.loads((Path(case["folder"]) / "prompts.json").read_text())
        config = model_config(case)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
        actor, reference = (
            qwen3_params.create_model_from_safe_tensors(case["model_folder"], config, mesh, dtype=jnp.float32)
            for _ in range(2)
        )
        self._num_rows = len(prompts) * case["group_size"]
        self._cluster = Cluster(
            prompts,
            case,
            actor=actor,
            reference=reference,
            tokenizer=Words(),
            cluster_config=_cluster_config(case, prompts, mesh),
        )
        self._first: dict[str, Any] = {"greedy": self._greedy(prompts, case)}
        learner = grpo_learner.GRPOLearner(self._cluster, _algorithm(case["loss"], case), reward)
        self._gate = Gate(prompts)
        self._gate.start(learner.train)

    def __call__(self) -> dict[str, Any]:
        self._cluster.begin()
        self._gate.step()
        if self._cluster.num_updated != self._num_rows:
            raise ValueError(f"tunix: updated on {self._cluster.num_updated} rows of {self._num_rows}")
        values, self._first = self._first, {}
        if values:
            self._check_weights()
        return values | self._cluster.parts | {"tokens": self._cluster.num_tokens}

    def close(self) -> None:
        self._gate.close()

    def _greedy(self, prompts: list[list[int]], case: dict[str, Any]) -> list[int]:
        """The first greedy tokens of each prompt, by which the sides know that their weights are the same."""
        config = base_rollout.RolloutConfig(
            max_tokens_to_generate=min(16, case["completion"]), temperature=1.0, top_p=None,
            max_prompt_length=max(map(len, prompts)),
        )  # fmt: skip
        words = Words()
        found = self._cluster.rollout.generate([words.decode(prompt) for prompt in prompts], config)
        return np.concatenate(found.tokens).tolist()

    def _check_weights(self) -> None:
        """The first step must have moved the policy, and the sampler with it."""
        policy, sampler, reference = (
            jax.tree.leaves(nnx.state(model))
            for model in (
                self._cluster.actor_trainer.model,
                self._cluster.rollout.model(),
                self._cluster.inference_worker.get_model("reference"),
            )
        )
        moved = [float(jnp.abs(new - old).max()) for new, old in zip(policy, reference, strict=True)]
        if not all(0.0 < one < 1.0 for one in moved):
            raise ValueError(
                f"tunix: its first update moved its arrays by at most {min(moved)} to {max(moved)}; expected "
                "each to move, and by less than 1"
            )
        if any(bool((new != used).any()) for new, used in zip(policy, sampler, strict=True)):
            raise ValueError("tunix: it samples with other weights than those of its newest update")


def model_config(case: dict[str, Any]) -> qwen3.ModelConfig:
    """The model of the case's folder; ValueError where tunix's Qwen3 is another, or cannot sample."""
    if case["remat"] == "full":
        raise ValueError("remat full: tunix's sampler cannot run a model that recomputes its layers")
    path = Path(case["model_folder"]) / "config.json"
    found = json.loads(path.read_text())
    if found["model_type"] != "qwen3" or found["rope_theta"] != ROPE_THETA:
        raise ValueError(
            f"{path}: {found['model_type']} with rope_theta {found['rope_theta']}; tunix's Qwen3 rotates by "
            f"{ROPE_THETA}"
        )
    return qwen3.ModelConfig(
        num_layers=found["num_hidden_layers"], vocab_size=found["vocab_size"],
        embed_dim=found["hidden_size"], hidden_dim=found["intermediate_size"],
        num_heads=found["num_attention_heads"], num_kv_heads=found["num_key_value_heads"],
        head_dim=found["head_dim"], rope_theta=ROPE_THETA, norm_eps=found["rms_norm_eps"],
        use_tied_embedding=found["tie_word_embeddings"], dtype=getattr(jnp, case["dtype"]),
        param_dtype=jnp.float32,
        remat_config=qwen3.RematConfig.DECODER if case["remat"] == "full" else qwen3.RematConfig.NONE,
    )  # fmt: skip


def _cluster_config(
    case: dict[str, Any], prompts: list[list[int]], mesh: jax.sharding.Mesh
) -> rl_cluster.ClusterConfig:
    optim, longest, num = case["optim"], max(map(len, prompts)), len(prompts)
    adamw = optax.adamw(
        optim["lr"], b1=optim["b1"], b2=optim["b2"], eps=optim["eps"], weight_decay=optim["weight_decay"]
    )
    # Sizes are counted in prompts.
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(optim["clip_norm"]), adamw),
        eval_every_n_steps=ENDLESS, max_steps=ENDLESS, mini_batch_size=num, train_micro_batch_size=1,
        rollout_micro_batch_size=num, compute_logps_micro_batch_size=1,
    )  # fmt: skip
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=case["completion"], temperature=1.0, top_p=1.0, top_k=None,
        max_prompt_length=longest, kv_cache_size=longest + case["completion"],
    )  # fmt: skip
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    return rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh), rollout_engine="vanilla", training_config=training,
        rollout_config=rollout,
    )  # fmt: skip


def _algorithm(loss: dict[str, Any], case: dict[str, Any]) -> grpo_learner.GRPOConfig:
    config = grpo_learner.GRPOConfig(
        num_generations=case["group_size"], num_iterations=1, beta=loss["kl_coef"],
        epsilon=loss["clip_low"], loss_agg_mode="token-mean", kl_loss_mode="low_var_kl",
        kl_clamp_value=10.0,
    )  # fmt: skip
    config.epsilon_high = loss["clip_high"]
    return config
