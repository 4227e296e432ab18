"""TRL's GRPOTrainer, one step at a time: the whole step as its users run it."""

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def trl_run(case: dict[str, Any], device: torch.device) -> Callable[[], dict[str, float]]:
    """A step of the trainer for each call. ImportError where trl is not installed."""
    import trl

    folder = tempfile.TemporaryDirectory(prefix="bench_trl")
    prompts = json.loads((Path(case["folder"]) / "prompts.json").read_text())
    gate = Gate()
    trainer = _trainer(trl, case, prompts, folder.name, device, gate)
    trainer.add_callback(gate.callback())
    thread = threading.Thread(target=gate.train, args=(trainer,), daemon=True)
    thread.start()

    def run() -> dict[str, float]:
        # Held here, the folder lives as long as the trainer needs it.
        assert folder.name
        return gate.step()

    return run


def _trainer(
    trl: Any, case: dict[str, Any], prompts: list[list[int]], folder: str, device: torch.device, gate: "Gate"
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case["model_folder"], dtype=torch.float32)
    words = tokenizer(model.config.vocab_size)
    optim, rows = case["optim"], len(prompts) * case["group_size"]
    config = trl.GRPOConfig(
        output_dir=folder, max_steps=1_000_000, report_to="none", save_strategy="no", logging_steps=10**6,
        per_device_train_batch_size=case["group_size"], gradient_accumulation_steps=len(prompts),
        num_generations=case["group_size"], generation_batch_size=rows,
        max_completion_length=case["completion"], temperature=1.0, top_p=1.0, top_k=0,
        generation_kwargs={"min_new_tokens": case["completion"], "cache_implementation": case["cache"]},
        beta=case["loss"]["kl_coef"], learning_rate=optim["lr"], adam_beta1=optim["b1"],
        adam_beta2=optim["b2"], adam_epsilon=optim["eps"], weight_decay=optim["weight_decay"],
        max_grad_norm=optim["clip_norm"], lr_scheduler_type="constant", optim="adamw_torch_fused",
        bf16=case["dtype"] == "bfloat16", use_cpu=device.type == "cpu", torch_compile=case["compile"],
        gradient_checkpointing=case["remat"] == "full", disable_tqdm=True, shuffle_dataset=False, seed=0,
    )  # fmt: skip
    texts = [{"prompt": " ".join(f"t{token}" for token in prompt)} for prompt in prompts]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        gate.num_tokens = sum(map(len, completion_ids))
        return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]

    return trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(texts),
        processing_class=words,
    )  # fmt: skip


def tokenizer(vocab_size: int) -> Any:
    """Words t0 t1 ...: a prompt's text becomes its own ids again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="t0", eos_token="t0", unk_token="t0")


class Gate:
    """Lets the trainer take one step for each call and times it."""

    def __init__(self):
        self._go: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[Any] = queue.Queue()
        self.num_tokens = 0
        """Tokens sampled in the newest step."""

    def callback(self) -> Any:
        """Waits before each step, answers after it."""
        from transformers import TrainerCallback

        gate = self

        class Waits(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                gate._go.get()

            def on_step_end(self, args, state, control, **_):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                gate._done.put(None)

        return Waits()

    def train(self, trainer: Any) -> None:
        """To be run in a thread; a failure is handed to the waiting call."""
        try:
            trainer.train()
        except BaseException as error:
            self._done.put(error)

    def step(self) -> dict[str, float]:
        """One whole step."""
        began = time.perf_counter()
        self._go.put(True)
        failed = self._done.get()
        if failed is not None:
            raise failed
        return {"step_s": time.perf_counter() - began, "tokens": self.num_tokens}
