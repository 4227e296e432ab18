"""Plan a run before there is a machine for it: memory, collectives and time of a step, and what to change.

    python tools/plan.py --config configs/qwen3_4b.yaml --mesh 8 --device h100

The real step is lowered and compiled on shapes alone, no weights are made: for this machine's GPUs where they
are enough for the mesh, else on simulated CPU devices. Figures for a device that is not here come from the
formulas of `selfemo_jax/plan/formulas.py`; every figure says which it is, and how far the formulas are from
what was compiled.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from selfemo_jax.accelerators import platform_of, visible_gpus
from selfemo_jax.config import Config, num_devices, parse_mesh
from selfemo_jax.config_io import Flag, load_config
from selfemo_jax.data.codec import load_codec
from selfemo_jax.devices import prepare
from selfemo_jax.parts import VOCAB_MULTIPLE, bundled_tokenizer, taken_by_servers
from selfemo_jax.plan.compiled import CompiledStep, compile_step
from selfemo_jax.plan.devices import Efficiency, plan_device
from selfemo_jax.plan.figures import Workload
from selfemo_jax.plan.planning import make_plan
from selfemo_jax.plan.shapes import planned_model
from selfemo_jax.plan.show import compile_words, show

FLAGS = {
    "device": Flag(default="cpu", help="h200, h100, h100-pcie, a100, l40s, l4, or cpu: this machine"),
    "model": Flag(help="config.json, its folder, or a published shape as qwen3-4b; else the settings' model"),
    "prompt_tokens": Flag(type=int, help="expected prompt, tokens; else half of data.max_prompt"),
    "completion_tokens": Flag(type=int, help="expected completion; else half of rollout.max_tokens"),
    "mfu": Flag(type=float, default=0.40, help="share of the peak that the update reaches (default 0.40)"),
    "no_compile": Flag(switch=True, help="formulas alone, in a moment"),
    "json": Flag(help="write the plan to this file too"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit status is 0 where it fits by formula, 3 where it does not, 2 for an error."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    try:
        config, command = load_config(
            sys.argv[1:] if argv is None else argv, prog="tools/plan.py", flags=FLAGS, description=__doc__
        )
        flags = command.extra
        if flags["json"]:
            Path(flags["json"]).parent.mkdir(parents=True, exist_ok=True)
        number = num_devices(config.mesh)
        taken = taken_by_servers(config, tuple(map(str, range(number))))
        device = plan_device(flags["device"], num_devices=number, taken=taken)
        model, shape_from = planned_model(config, flags["model"], vocab_size=_vocab_size(config))
        workload = None
        if flags["prompt_tokens"] or flags["completion_tokens"]:
            workload = Workload(
                prompt_tokens=flags["prompt_tokens"] or max(2, config.data.max_prompt // 2),
                completion_tokens=flags["completion_tokens"] or max(1, config.rollout.max_tokens // 2),
            )
        compiled: CompiledStep | None = None
        if config.lora.rank:
            console.print(
                "adapters (lora.rank): by formula alone, their step is not compiled here", markup=False
            )
        elif config.model.attention == "pallas" and _platform(config) == "cpu":
            console.print(
                "model.attention pallas: by formula alone, its kernel compiles for a GPU that is here",
                markup=False,
            )
        elif not flags["no_compile"]:
            mesh, words = prepare(parse_mesh(config.mesh), platform=_platform(config))
            console.print(f"compiling on {words}", markup=False)
            compiled = compile_step(model, config, mesh)
            console.print(compile_words(compiled), markup=False)
        plan = make_plan(
            model, config, device, shape_from=shape_from, workload=workload,
            efficiency=Efficiency(train=flags["mfu"]), compiled=compiled,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(plan, console)
    if flags["json"]:
        Path(flags["json"]).write_text(json.dumps(plan.to_json(), indent=1) + "\n")
    return 0 if plan.fits else 3


def _platform(config: Config) -> str:
    """This machine's GPUs where they are enough for the mesh, else simulated devices."""
    usual = platform_of("cpu" if config.platform == "cpu" else "auto")
    return "gpu" if usual == "gpu" and len(visible_gpus()) >= num_devices(config.mesh) else "cpu"


def _vocab_size(config: Config) -> int:
    """Rows of a random model's embedding, as the run would make it."""
    folder = Path(config.model.tokenizer) if config.model.tokenizer else bundled_tokenizer()
    return -(-load_codec(folder).vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


if __name__ == "__main__":
    sys.exit(main())
