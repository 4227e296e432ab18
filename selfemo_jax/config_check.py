"""What the settings say together: ranges, and arithmetic between fields, explained in words."""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_type_hints

from selfemo_jax.config import Config, num_devices, parse_mesh
from selfemo_jax.settings.expert_check import expert_problems
from selfemo_jax.settings.numbers import Bounds

__all__ = ["parse_keep", "parse_steps", "validate"]

SINKS = ("tensorboard", "wandb", "mlflow")
NAMED_SETS = ("sample", "meld", "emorynlp", "iemocap")


def validate(config: Config, *, where: str = "settings") -> None:
    """ValueError that lists every field out of range and all fields that do not fit together."""
    problems = [
        *_ranges(config),
        *_batches(config),
        *_data(config),
        *_objective(config),
        *_sampling(config),
        *_lora(config),
        *_cold_start(config),
        *_phases(config),
        *expert_problems(config.expert, config.persona, config.cold_start),
        *_flywheel(config),
        *_logging(config),
    ]
    if len(problems) == 1:
        raise ValueError(f"{where}: {problems[0]}")
    if problems:
        raise ValueError(f"{where}: {len(problems)} problems\n" + "\n".join(f"- {line}" for line in problems))


def _ranges(section: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if is_dataclass(value):
            yield from _ranges(value, f"{prefix}{name}.")
        for part in (hint, *get_args(hint)):
            bounds = next((b for b in getattr(part, "__metadata__", ()) if isinstance(b, Bounds)), None)
            if bounds and value is not None and value not in bounds:
                yield f"{prefix}{name} is {value}; expected {bounds.words}"


def _multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of `value`."""
    below = value // divisor * divisor
    return " or ".join(str(v) for v in (below, below + divisor) if v > 0)


def _divisors(value: int, of: int) -> str:
    """The divisors of `of` on both sides of `value`."""
    divisors = [d for d in range(1, of + 1) if of % d == 0]
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if d > value][:1]
    return " or ".join(str(d) for d in below + above)


def _batches(config: Config) -> Iterator[str]:
    rl, batch, shape = config.rl, config.batch, config.model.shape
    if min(rl.mini_prompts, rl.prompts_per_step, batch.micro_rows) < 1:
        return
    if rl.prompts_per_step % rl.mini_prompts:
        yield (
            f"rl.prompts_per_step is {rl.prompts_per_step} and rl.mini_prompts is {rl.mini_prompts}: a "
            "step's prompts are cut into mini-batches of mini_prompts, one optimizer update each, and "
            f"{rl.prompts_per_step} is not a multiple of {rl.mini_prompts}; set rl.mini_prompts to "
            f"{_divisors(rl.mini_prompts, rl.prompts_per_step)}, or rl.prompts_per_step to "
            f"{_multiples(rl.prompts_per_step, rl.mini_prompts)}"
        )
    try:
        axes = parse_mesh(config.mesh)
        data_axes = axes["data"] * axes["fsdp"]
    except ValueError as error:
        yield str(error)
    else:
        if batch.micro_rows % data_axes:
            yield (
                f"batch.micro_rows is {batch.micro_rows} and mesh {config.mesh!r} "
                f"({num_devices(config.mesh)} devices) splits the rows of a micro-batch over {data_axes}: "
                "each must get the same number; set batch.micro_rows to "
                f"{_multiples(batch.micro_rows, data_axes)}, or a mesh whose data axes divide it"
            )
    longest = config.data.max_prompt + config.rollout.max_tokens
    if batch.row_tokens < longest:
        yield (
            f"batch.row_tokens is {batch.row_tokens}: a row must hold the longest prompt and completion, "
            f"data.max_prompt {config.data.max_prompt} + rollout.max_tokens {config.rollout.max_tokens} = "
            f"{longest}; set batch.row_tokens to {longest} or more"
        )
    items = config.data.max_items
    if rl.steps is None and items is not None and 1 <= items < rl.prompts_per_step:
        yield (
            f"data.max_items is {items} and rl.prompts_per_step is {rl.prompts_per_step}: one pass over "
            "the inputs does not fill a step; raise data.max_items, lower rl.prompts_per_step, or set "
            "rl.steps"
        )
    if config.model.path is None and min(shape.num_heads, shape.num_kv_heads) >= 1:
        if shape.num_heads % shape.num_kv_heads:
            yield (
                f"model.shape.num_heads is {shape.num_heads}, not a multiple of num_kv_heads "
                f"{shape.num_kv_heads}: each key-value head serves the same number of query heads; set "
                f"num_heads to {_multiples(shape.num_heads, shape.num_kv_heads)}"
            )
        if shape.head_dim % 2:
            yield f"model.shape.head_dim is {shape.head_dim}; expected an even number (rotary pairs)"


def _data(config: Config) -> Iterator[str]:
    data, mixture = config.data, config.data.mixture
    if config.output.biography != "none" and data.speaker_style == "index":
        yield (
            f"output.biography is {config.output.biography} and data.speaker_style is index: a biography is "
            "found by the speaker's name; set data.speaker_style to name"
        )
    if config.output.biography == "expert" and not config.expert.endpoints:
        yield (
            "output.biography is expert and expert.endpoints is empty: nobody would write it; name an "
            "endpoint, or set output.biography to train_lines"
        )
    if not data.sets:
        yield f"data.sets is empty; name at least one of {', '.join(NAMED_SETS)} or a folder"
    if len(set(data.sets)) < len(data.sets):
        yield f"data.sets is {data.sets}: a set is named twice; use data.mixture to draw it more often"
    if mixture.weights and mixture.kind != "weights":
        yield f"data.mixture.weights is given and data.mixture.kind is {mixture.kind}; set kind to weights"
    if mixture.kind == "weights" and not mixture.weights:
        yield "data.mixture.kind is weights and data.mixture.weights is empty; give each set a weight"
    for name, weight in mixture.weights.items():
        if not 0 < weight < float("inf"):
            yield f"data.mixture.weights.{name} is {weight}; expected a number above 0"
        if "sample" not in data.sets and name in NAMED_SETS and name not in data.sets:
            yield f"data.mixture.weights names {name}, which is not in data.sets {data.sets}"


def _objective(config: Config) -> Iterator[str]:
    reward, loss = config.reward, config.loss
    convex = "convex" in (reward.combine or reward.preset)
    if reward.lambda_max is not None and convex and reward.lambda_max > 1:
        yield f"reward.lambda_max is {reward.lambda_max}; expected 0 to 1 for a weighted mean"
    if reward.divide != "core" and reward.consensus != "count":
        yield (
            f"reward.divide is {reward.divide} and reward.consensus is {reward.consensus}, which counts "
            "nothing; set reward.consensus to count, or divide to core"
        )
    if reward.smoothing and reward.primary != "wiou":
        yield f"reward.smoothing is {reward.smoothing}: it smooths wiou, reward.primary is {reward.primary}"
    if reward.similarity and reward.primary != "similarity":
        yield (
            f"reward.similarity is given and reward.primary is {reward.primary}; set primary to similarity"
        )
    for pair, value in reward.similarity.items():
        one, _, other = pair.partition("/")
        if not re.fullmatch(r"[a-z]+/[a-z]+", pair) or one == other:
            yield f"reward.similarity names {pair!r}; expected two different lower-case labels as one/other"
        if not 0 <= value <= 1:
            yield f"reward.similarity.{pair} is {value}; expected 0 to 1"
    if reward.function is not None:
        module, colon, function = reward.function.partition(":")
        if not colon or not re.fullmatch(r"\w+(\.\w+)*", module) or not function.isidentifier():
            yield f"reward.function is {reward.function!r}; expected package.module:function"
    if config.rl.group_size == 1:
        yield "rl.group_size is 1: an advantage compares the answers of a group; set 2 or more"
    if loss.norm_constant is not None and loss.aggregation != "seq-mean-token-sum-norm":
        yield (
            f"loss.norm_constant is {loss.norm_constant} and loss.aggregation is {loss.aggregation}, which "
            "has no constant; set loss.aggregation to seq-mean-token-sum-norm, or norm_constant to null"
        )


def _sampling(config: Config) -> Iterator[str]:
    rollout = config.rollout
    reason = (
        "a truncated distribution is not the one whose log-probs are recorded, so the ratio of trainer and "
        "sampler would be biased"
    )
    if rollout.top_k != 0:
        yield f"rollout.top_k is {rollout.top_k}: training samples untruncated ({reason}); set it to 0"
    if rollout.top_p != 1:
        yield f"rollout.top_p is {rollout.top_p}: training samples untruncated ({reason}); set it to 1"
    penalty = config.eval.frequency_penalty
    if not -2 <= penalty <= 2:
        yield f"eval.frequency_penalty is {penalty}: expected from -2 to 2"
    if penalty and rollout.engine == "vllm":
        yield (
            f"eval.frequency_penalty is {penalty}: vLLM would report log-probs of the distribution that it "
            "changes; set it to 0, or score the finished run by `python -m selfemo_jax.evaluate "
            "--rollout.engine jax`"
        )
    yield from _sidecar(config)
    try:
        parse_keep(rollout.keep)
    except ValueError as error:
        yield str(error)


def _sidecar(config: Config) -> Iterator[str]:
    rollout, importance = config.rollout, config.loss.importance
    if rollout.overlap and rollout.engine == "jax":
        yield (
            f"rollout.overlap is {rollout.overlap} and rollout.engine is jax: the sampler shares the "
            "trainer's devices and cannot run beside it; set rollout.overlap to 0, or rollout.engine to vllm"
        )
    if rollout.overlap > 1:
        yield f"rollout.overlap is {rollout.overlap}: a sampler may run one step ahead; set it to 0 or 1"
    if rollout.overlap and importance == "off":
        yield (
            f"rollout.overlap is {rollout.overlap} and loss.importance is off: rollouts then come from a "
            "policy one update older, and nothing corrects for it; set loss.importance to token or sequence"
        )
    if rollout.engine == "vllm" and rollout.sidecar.on_unproven == "rollback":
        if rollout.sidecar.keep_versions < 2:
            yield (
                "rollout.sidecar.on_unproven is rollback and keep_versions is 1: there is no version to go "
                "back to; set rollout.sidecar.keep_versions to 2 or more"
            )
        if importance == "off":
            yield (
                "rollout.sidecar.on_unproven is rollback and loss.importance is off: after a rollback "
                "rollouts come from an older policy, and nothing corrects for it; set loss.importance to "
                "token or sequence"
            )


def _lora(config: Config) -> Iterator[str]:
    lora, freeze = config.lora, config.model.freeze
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        yield f"lora.targets is {lora.targets}; expected one or more matrices, each once"
    if lora.rank and (freeze.embeddings or freeze.layers):
        yield (
            f"lora.rank is {lora.rank} and model.freeze names weights: with adapters all of the base is "
            "frozen; leave model.freeze out, and name in lora.targets what has an adapter"
        )


def _cold_start(config: Config) -> Iterator[str]:
    cold = config.cold_start
    if cold.whole_answers < 1 and cold.rows != "dialogues":
        yield (
            f"cold_start.whole_answers is {cold.whole_answers} and cold_start.rows is {cold.rows}: examples "
            "are learned whole; set cold_start.rows to dialogues"
        )
    if cold.lines == "all" and cold.rows != "dialogues":
        yield (
            f"cold_start.lines is all and cold_start.rows is {cold.rows}: a line's label is learned in its "
            "dialogue's row; set cold_start.rows to dialogues"
        )
    if cold.whole_answers == 0 and cold.source != "none":
        yield "cold_start.whole_answers is 0: no answer would show its form; expected above 0"


def _phases(config: Config) -> Iterator[str]:
    retrain = config.flywheel.retrain
    if config.phases == "cold" and config.cold_start.source == "none" and not config.cold_start.labels.epochs:
        yield (
            "phases is cold and cold_start.source is none: there is nothing to train; set cold_start.source "
            "to human, or phases to none for a zero-shot score"
        )
    if config.phases != "all":
        return
    if config.model.path is None and retrain.init == "base":
        yield (
            "flywheel.retrain.init is base and model.path is null: a policy with random weights cannot "
            "write the answer grammar, so training from it has no reward to learn from; set "
            "flywheel.retrain.init to cold, or model.path to a checkpoint"
        )
    if config.model.path is None and retrain.init == "cold" and config.cold_start.source == "none":
        yield (
            "flywheel.retrain.init is cold and cold_start.source is none: there is no cold start to begin "
            "from; set cold_start.source to human"
        )


def _flywheel(config: Config) -> Iterator[str]:
    wheel = config.flywheel
    if wheel.hygiene.min_words > wheel.hygiene.max_words:
        yield (
            f"flywheel.hygiene.min_words is {wheel.hygiene.min_words} and max_words is "
            f"{wheel.hygiene.max_words}: no reply could be accepted"
        )
    if wheel.max_label_ratio is not None and wheel.max_label_ratio < 1:
        yield (
            f"flywheel.max_label_ratio is {wheel.max_label_ratio}: labels that may only have less than their "
            "human shares cannot fill a harvest; set 1 or more, or null"
        )
    if wheel.drift.stop is not None and wheel.drift.stop < wheel.drift.alarm:
        yield (
            f"flywheel.drift.stop is {wheel.drift.stop}, below flywheel.drift.alarm {wheel.drift.alarm}; an "
            "alarm comes before a stop"
        )
    relabelled = wheel.control in ("original_only", "shuffled_labels", "verifier_labels")
    if relabelled and wheel.retrain.method != "grpo":
        yield (
            f"flywheel.control is {wheel.control} and flywheel.retrain.method is {wheel.retrain.method}, "
            "which learns the harvest's answers, whatever its inputs are labelled; set "
            "flywheel.retrain.method to grpo"
        )
    if wheel.harvest == "replay":
        yield from _replayed_harvest(config)
    if wheel.tau_low is not None and config.rollout.keep != "all":
        yield (
            f"flywheel.tau_low is {wheel.tau_low} and rollout.keep is {config.rollout.keep}: what every step "
            "of RL earned must still be there; set rollout.keep to all, or flywheel.tau_low to null"
        )
    if wheel.verifier.weights == "base" and config.model.path is None:
        yield (
            "flywheel.verifier.weights is base and model.path is null: a policy with random weights "
            "recognises nothing; set flywheel.verifier.weights to cold or a folder"
        )
    if wheel.verifier.weights == "cold" and config.cold_start.source == "none":
        yield (
            "flywheel.verifier.weights is cold and cold_start.source is none: there is no cold start; set "
            "flywheel.verifier.weights to base or a folder"
        )


def _replayed_harvest(config: Config) -> Iterator[str]:
    wheel, keep = config.flywheel, config.rollout.keep
    try:
        kind, number = parse_keep(keep)
    except ValueError:
        return
    if (kind == "last" and number < wheel.max_age) or (kind == "every" and number > 1):
        yield (
            f"flywheel.harvest is replay and rollout.keep is {keep}: the rollouts of the last "
            f"flywheel.max_age {wheel.max_age} steps must still be there; set rollout.keep to all or to last "
            f"{wheel.max_age}"
        )
    if wheel.retrain.method == "sft" and wheel.iterations > 1:
        yield (
            "flywheel.harvest is replay and flywheel.retrain.method is sft: from the second iteration on "
            "there is no RL to take rollouts from; set flywheel.harvest to sample"
        )


def _logging(config: Config) -> Iterator[str]:
    for sink in config.log.sinks:
        if sink not in SINKS:
            yield f"log.sinks names {sink!r}; expected any of {', '.join(SINKS)}"
    if config.log.profile_steps is not None:
        try:
            parse_steps(config.log.profile_steps)
        except ValueError as error:
            yield str(error)


def parse_keep(text: str) -> tuple[Literal["all", "last", "every"], int]:
    """`rollout.keep` as `("all", 1)`, `("last", N)` or `("every", N)`; ValueError for other words."""
    match = re.fullmatch(r"(all)|(last|every) +([1-9][0-9]*)", text.strip())
    if match is None:
        raise ValueError(f"rollout.keep is {text!r}; expected all, last N or every N, as in last 20")
    if match[1]:
        return "all", 1
    return ("last" if match[2] == "last" else "every"), int(match[3])


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of `log.profile_steps`: `"5"` is (5, 5), `"5:7"` and `"5-7"` are (5, 7)."""
    match = re.fullmatch(r"\s*([0-9]+)(?:\s*[:-]\s*([0-9]+))?\s*", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ValueError(f"log.profile_steps is {text!r}; expected FIRST or FIRST:LAST, as in 10:12")
    return int(match[1]), int(match[2] or match[1])
