"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow; imported when named."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

__all__ = ["Sink", "open_sink"]


class Sink(Protocol):
    """Takes the numbers of a step; closed at the end of the run."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sink(name: str, run_dir: Path, settings: Mapping[str, Any]) -> Sink:
    """The sink of that name, writing under `run_dir` unless its own environment variables say otherwise.

    ValueError with the pip command when its library is missing.
    """
    return _SINKS[name](run_dir, settings)


def _library(module: str, package: str, sink: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"log.sinks names {sink}, which needs {package} ({error}); run: pip install {package}"
        ) from None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class _TensorBoard:
    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        library = _library("tensorboardX", "tensorboardX", "tensorboard")
        self._writer = library.SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        library = _library("wandb", "wandb", "wandb")
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", "selfemo-jax"),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(settings),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._library = _library("mlflow", "mlflow", "mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._library.set_tracking_uri(f"sqlite:///{(run_dir / 'mlflow.db').resolve()}")
        self._library.set_experiment("selfemo-jax")
        self._library.start_run(run_name=run_dir.name)
        # As parameters, since they lie in the database: files would go to a folder of the working directory.
        self._library.log_params(dict(_flat(settings)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._library.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._library.end_run()


_SINKS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
