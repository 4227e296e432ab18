"""What is written for resuming, and weights for use.

`StateStore` keeps the newest training states with Orbax: parameters and optimizer as sharded arrays,
everything else (position, iterator, lengths and digests of the logs, best score) as one JSON beside them.
Orbax commits a state by a rename, so the newest is whole or not there; the oldest it removes file by file, so
that a kill may leave half of it until the next one is removed. `save_weights` writes a converted folder
that `evaluate`, `predict`, a later phase and `tools/convert_hf.py` read.
"""

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from selfemo_jax.checksums import array_checksums, check_arrays
from selfemo_jax.config import Config
from selfemo_jax.config_io import config_folder, read_config
from selfemo_jax.distributed import barrier, is_first
from selfemo_jax.model.adapters import is_adapted, split
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Params
from selfemo_jax.model.digests import file_digests
from selfemo_jax.model.weights import PARAMS_NAME
from selfemo_jax.train_step import TrainState

# Orbax warns that a checkpoint written without OCDBT has no OCDBT files to merge.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in str(record.msg))

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class StateStore:
    """The newest states under ``folder``; close it so that the last one is on disk and its errors are
    seen."""

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=asynchronous, create=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, global_step: int, state: TrainState | None, meta: dict[str, Any]) -> None:
        """Write a state; errors of the write before surface here. ``state`` is None where no weights
        change."""
        items: dict[str, Any] = {"meta": ocp.args.JsonSave(meta)}
        if state is not None:
            saved = _without_base(state)
            items["state"] = ocp.args.StandardSave(saved)
            items["checksums"] = ocp.args.JsonSave(array_checksums(saved))
        self._manager.save(global_step, args=ocp.args.Composite(**items))

    def steps(self) -> list[int]:
        """Global steps that have a state, ascending."""
        return sorted(self._manager.all_steps())

    def meta(self, global_step: int) -> dict[str, Any]:
        """The JSON part of a state."""
        return self._read(global_step, meta=ocp.args.JsonRestore())["meta"]

    def restore(self, global_step: int, like: TrainState) -> TrainState:
        """The arrays of a state, laid out as ``like`` (arrays or `jax.ShapeDtypeStruct` with shardings); the
        frozen base of adapters is that of ``like``. ValueError where an array is not as it was saved."""
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            _without_base(like),
        )
        found = self._read(
            global_step, state=ocp.args.StandardRestore(abstract), checksums=ocp.args.JsonRestore()
        )
        restored = found["state"]
        check_arrays(restored, found["checksums"], where=str(self._folder / str(global_step)))
        return replace(restored, params={**like.params, **restored.params})

    def _read(self, global_step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(global_step, args=ocp.args.Composite(**items))
        # Orbax and tensorstore have many words for a file that is missing, cut or overwritten.
        except Exception as error:
            raise ValueError(
                f"{self._folder / str(global_step)}: the state cannot be read: {error!s:.300}; copy it anew, "
                "or remove the folder to go on from an older one"
            ) from error

    def wait(self) -> None:
        """Until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the last write; its error, if any, is raised."""
        self._manager.wait_until_finished()
        self._manager.close()


def _without_base(state: TrainState) -> TrainState:
    """The state as it is saved: of a policy with adapters those alone, as the base never changes."""
    return replace(state, params=split(state.params)[0]) if is_adapted(state.params) else state


def save_weights(
    folder: Path, params: Params, model: ModelConfig, *, tokenizer: Path, certificate: dict[str, Any]
) -> None:
    """Write a converted folder: ``config.json``, the tokenizer's files, the parameters in Orbax's layout.

    Written aside and renamed; an existing folder is replaced only when the new one is whole. Of several
    processes each writes the arrays that its devices hold, the first one everything else.
    """
    folder = folder.absolute()
    part = folder.parent / f".{folder.name}.partial"
    if is_first():
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
    barrier("weights")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
        checkpointer.save(part / PARAMS_NAME, args=ocp.args.PyTreeSave(params))
    if is_first():
        _complete(part, model, params, tokenizer=tokenizer, certificate=certificate)
        _put_in_place(part, folder)
    barrier("weights")


def _complete(
    part: Path, model: ModelConfig, params: Params, *, tokenizer: Path, certificate: dict[str, Any]
) -> None:
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, part / name)
    config = model.to_hf()
    key = "dtype" if "dtype" in config else "torch_dtype"
    leaf = jax.tree.leaves(params)[0]
    (part / "config.json").write_text(json.dumps(config | {key: str(leaf.dtype)}, indent=1) + "\n")
    whole = {"format": 1} | certificate | {"files": file_digests(part / PARAMS_NAME)}
    (part / "certificate.json").write_text(json.dumps(whole, indent=1) + "\n")


def _put_in_place(part: Path, folder: Path) -> None:
    # A process killed between the renames leaves the old folder behind.
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a folder given as ``--checkpoint`` holds."""

    weights: Path
    """Converted or Hugging Face folder."""
    config_file: Path
    """The settings it was trained with, where it lies in a run; else those of ``configs/evaluate.yaml``."""
    out: Path
    """Where its scores under its own settings go unless told otherwise."""
    tokenizer: str | None = None
    """Folder of the tokenizer where it is another than that of the weights."""

    def settings(self, config: Config) -> Config:
        """The settings with this checkpoint as the model, on its own tokenizer."""
        section = replace(config.model, path=str(self.weights), tokenizer=self.tokenizer)
        return replace(config, model=section, rollout=replace(config.rollout, replay=None))


def find_checkpoint(folder: str | Path) -> Found:
    """The weights in a run's folder (the best by dev score, else those of its last finished phase with
    weights; of a run that trains nothing those of its base), in a phase's folder, or in a converted or
    Hugging Face folder. ValueError says what was looked for."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--checkpoint {folder}: no such folder")
    if (folder / "config.json").exists():
        return Found(weights=folder, config_file=_config_above(folder), out=folder / "eval")
    if (folder / "weights" / "config.json").exists():
        return Found(weights=folder / "weights", config_file=_config_above(folder), out=folder / "eval")
    phases = sorted(
        path.parent for path in folder.glob("phases/*/DONE") if (path.parent / "weights").is_dir()
    )
    candidates = [folder / "checkpoints" / "best", *(phase / "weights" for phase in reversed(phases))]
    weights = next((path for path in candidates if (path / "config.json").exists()), None)
    if weights is None and (base := _base_of_untrained(folder)) is not None:
        return base
    if weights is None:
        raise ValueError(
            f"--checkpoint {folder}: found no config.json, no checkpoints/best and no finished phase with "
            "weights; expected a run, a converted or a Hugging Face folder"
        )
    return Found(weights=weights, config_file=folder / "config.yaml", out=folder / "eval")


def _base_of_untrained(folder: Path) -> Found | None:
    """The base model of a run that trains nothing (`phases: none`); None for any other folder."""
    config_file = folder / "config.yaml"
    config = read_config(config_file) if config_file.exists() else None
    if config is None or config.phases != "none":
        return None
    if config.model.path is None:
        raise ValueError(
            f"--checkpoint {folder}: this run trains nothing (phases none) and its base has random weights "
            "(model.path null), which are in no folder; its scores are in eval/. Name a run that trained, or "
            "start a run with model.path"
        )
    weights, tokenizer = Path(config.model.path), config.model.tokenizer
    return Found(weights=weights, config_file=config_file, out=folder / "eval", tokenizer=tokenizer)


def _config_above(folder: Path) -> Path:
    """The settings of the run that a folder lies in, else those for a checkpoint without any."""
    inside = [parent / "config.yaml" for parent in folder.resolve().parents]
    runs = (path for path in inside if path.exists() and (path.parent / "metrics.jsonl").exists())
    return next(runs, config_folder() / "evaluate.yaml")
