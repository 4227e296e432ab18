"""A run assembled from its settings, new or taken up again, and closed at the end."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from selfemo_jax.appendlog import atomic_write
from selfemo_jax.config import Config
from selfemo_jax.config_io import Command
from selfemo_jax.distributed import is_first, joined, launch_of, tell_others
from selfemo_jax.parts import build_parts
from selfemo_jax.run import Run
from selfemo_jax.run_checks import check_prompts, check_run
from selfemo_jax.run_data import doubts, load_data
from selfemo_jax.run_experts import ask_experts, needs_experts
from selfemo_jax.run_hosts import check_hosts
from selfemo_jax.run_resume import Stopped, resumes, settings_of, settings_restored_on_error
from selfemo_jax.runlog import RunLog


@contextmanager
def open_run(config: Config, command: Command) -> Iterator[Run]:
    """Assemble a run, taking up an earlier one where the command says so; SIGTERM stops it at a step
    boundary. With `--coordinator` it is one of several processes (`distributed.py`)."""
    with joined(launch_of(command.extra), together=(Stopped,)):
        yield from _opened(config, command)


def _opened(config: Config, command: Command) -> Iterator[Run]:
    parts = build_parts(config)
    data = load_data(config)
    check_hosts(config, data)
    check_run(config, parts, data)
    resume = resumes(config.run_dir, command.resume)
    kept = settings_of(config.run_dir)
    hashes = {"inputs": data.fingerprint}
    with RunLog(config, resume=resume, data_hashes=hashes, primary=is_first()) as log:
        for notice in (*parts.notices, *doubts(data, config)):
            log.say(notice)
        if is_first():
            atomic_write(
                log.run_dir / "data.json", json.dumps(data.report, indent=1, ensure_ascii=False) + "\n"
            )
        with settings_restored_on_error(kept):
            data = ask_experts(config, parts, data, log.run_dir, log.say)
            if needs_experts(config):
                # What they wrote stands in the prompts too.
                check_prompts(config, parts.codec, data)
            run = Run(config, parts, data, log)
        previous = signal.signal(signal.SIGTERM, run.on_signal)
        try:
            if resume:
                with settings_restored_on_error(kept):
                    run.rewind()
            yield run
        except Stopped:
            raise
        except BaseException as error:
            # Before anything below waits for them.
            tell_others(error)
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
            run.close()
