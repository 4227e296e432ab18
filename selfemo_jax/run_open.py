"""A run assembled from its settings, new or taken up again, and closed at the end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from selfemo_jax.config import Config
from selfemo_jax.config_io import Command
from selfemo_jax.parts import build_parts
from selfemo_jax.run import Run
from selfemo_jax.run_data import load_data
from selfemo_jax.run_experts import ask_experts
from selfemo_jax.run_resume import resumes, settings_of, settings_restored_on_error
from selfemo_jax.runlog import RunLog


@contextmanager
def open_run(config: Config, command: Command) -> Iterator[Run]:
    """Assemble a run, taking up an earlier one where the command says so; SIGTERM stops it at a step
    boundary."""
    parts = build_parts(config)
    data = load_data(config)
    resume = resumes(config.run_dir, command.resume)
    kept = settings_of(config.run_dir, resume=resume)
    with RunLog(config, resume=resume, data_hashes={"inputs": data.fingerprint}) as log:
        for notice in parts.notices:
            log.say(notice)
        with settings_restored_on_error(kept):
            data = ask_experts(config, parts, data, log.run_dir, log.say)
        run = Run(config, parts, data, log)
        previous = signal.signal(signal.SIGTERM, run.on_signal)
        try:
            if resume:
                with settings_restored_on_error(kept):
                    run.rewind()
            yield run
        finally:
            signal.signal(signal.SIGTERM, previous)
            run.close()
