"""Ask experts without training: personas and scenes, biographies, or cold-start answers.

    python -m selfemo_jax.extract [--config FILE] [--what personas|biographies|cold_start|all] [--out DIR]
                                  [--a.b VALUE]

Writes ``personas.jsonl`` (one line for each piece of dialogue), ``biographies.json``, ``cold_start.jsonl``
(one line for each answer) and the cache ``experts.jsonl`` into ``--out``, by default the run folder. A run
with the same `expert.cache` asks nothing again. An endpoint of kind policy answers inside a training run
only.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from selfemo_jax.config_io import Flag, load_config
from selfemo_jax.data.codec import load_codec
from selfemo_jax.experts.ask import Interrupted
from selfemo_jax.experts.panel import Panel
from selfemo_jax.parts import bundled_tokenizer
from selfemo_jax.run_biographies import add_biographies
from selfemo_jax.run_data import load_data
from selfemo_jax.run_experts import add_examples, cache_path, stop_signal
from selfemo_jax.run_personas import add_personas

FLAGS = {
    "what": Flag(
        help="personas, biographies, cold_start, or all that the settings ask of experts", default="all"
    ),
    "out": Flag(help="folder of the results; default: the run folder"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Ask; returns the exit status (75 after a stop, which the same command goes on from)."""
    try:
        words = sys.argv[1:] if argv is None else argv
        config, command = load_config(
            words, prog="selfemo_jax.extract", description=__doc__ or "", flags=FLAGS
        )
        what = command.extra["what"]
        if what not in ("personas", "biographies", "cold_start", "all"):
            raise ValueError(f"--what is {what!r}; expected personas, biographies, cold_start or all")
        asks = {
            "personas": config.persona.source == "expert",
            "biographies": config.output.biography == "expert",
            "cold_start": config.cold_start.source in ("expert", "mixed"),
        }
        if not asks.get(what, any(asks.values())):
            raise ValueError(
                f"--what {what}: persona.source is {config.persona.source}, output.biography is "
                f"{config.output.biography} and cold_start.source is {config.cold_start.source}, so no "
                "expert is asked for it; set persona.source or output.biography to expert, or "
                "cold_start.source to expert or mixed"
            )
        folder = Path(command.extra["out"] or config.run_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        data = load_data(config)
        with (
            stop_signal() as stopping,
            Panel(config.expert, cache_path(config, folder), stopping=stopping) as panel,
        ):
            # Cold-start prompts hold the personas, so these come first.
            if what != "biographies":
                data = add_personas(config, data, panel, folder, print)
            if what in ("biographies", "all"):
                data = add_biographies(config, data, panel, folder)
            if what in ("cold_start", "all"):
                tokenizer = config.model.tokenizer or config.model.path
                codec = load_codec(Path(tokenizer) if tokenizer else bundled_tokenizer())
                add_examples(config, codec, data, panel, folder, print)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 75
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
