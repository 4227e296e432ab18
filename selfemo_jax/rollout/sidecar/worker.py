"""What runs inside the vLLM workers: stage a published version, apply it, say what was applied.

`WeightsExtension` adds the methods that `/collective_rpc` calls; `OrbaxDisk` is the weight-transfer backend
"orbax_disk", so that vLLM's own `/update_weights` works too. Both go through one `Weights`.

On the CPU vLLM packs every linear layer for oneDNN and forgets to do so again for a head that is tied to the
embedding: without `repack` the logits would keep using the old embedding while every check says all is well.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload.inplace import reload_weights

from .arrays import digest
from .manifest import ROOT_VARIABLE, TRANSPORT_VARIABLE, config_digest, confined
from .slices import worker_parts
from .staging import Expected, Staged, stage, to_numpy

BACKEND = "orbax_disk"
# Messages of modules outside vLLM's own names are not shown.
logger = init_logger("vllm.selfemo_sidecar")


class Weights:
    """The weights of one worker's model: at most one version staged, one applied."""

    def __init__(self, vllm_config: Any, model: torch.nn.Module) -> None:
        self._vllm_config = vllm_config
        self._model = model
        self._expected: Expected | None = None
        self._staged: Staged | None = None
        self._applied: Staged | None = None
        self._applied_digests: dict[str, Any] | None = None
        self._broken: str | None = None

    def stage(self, path: str) -> dict[str, Any]:
        """Read and check a version while the server goes on serving."""
        self._refuse_if_broken()
        folder = confined(path, os.environ.get(ROOT_VARIABLE))
        self._staged = None
        staged = stage(folder, self._expect(), transport=os.environ.get(TRANSPORT_VARIABLE, "orbax"))
        self._staged = staged
        logger.info("Staged weights version %d in %s s", staged.version, staged.seconds["all"])
        return {
            "version": staged.version,
            "seconds": dict(staged.seconds),
            "num_tensors": len(staged.tensors),
            "bytes": staged.num_bytes,
        }

    def apply(self, version: int) -> dict[str, Any]:
        """Put the staged tensors into the model; the caller has paused the server."""
        staged = self._staged
        ready = staged is not None and staged.version == int(version) and self._broken is None
        # Every worker votes, whatever its state: one that raised before would leave the others waiting.
        agreed = _all_agree(ready)
        self._refuse_if_broken()
        if not agreed:
            found = "nothing" if staged is None else f"version {staged.version}"
            raise ValueError(
                f"apply version {version}: {found} is staged on this worker"
                f"{', but not on another' if ready else ''}; nothing has changed"
            )
        assert staged is not None
        start = time.perf_counter()
        self._applied = self._applied_digests = None
        self._broken = f"applying version {version} failed half-way; restart the server"
        reload_weights(self._vllm_config, self._model, iter(staged.tensors.items()), None, True)
        loaded = time.perf_counter()
        repacked = repack(self._model)
        self._broken = None
        self._staged, self._applied = None, self._to_answer_for(staged)
        end = time.perf_counter()
        seconds = {"load": round(loaded - start, 4), "repack": round(end - loaded, 4)}
        logger.info("Applied weights version %d in %.3f s", staged.version, end - start)
        return {
            "version": staged.version,
            "seconds": seconds | {"all": round(end - start, 4)},
            "repacked": repacked,
        }

    def applied_digest(self) -> dict[str, Any]:
        """Digests of the tensors that were applied, by Hugging Face name.

        From the model's own parameters where they are still there as such, else from the memory that was
        handed to the model, which is kept until now. With tensor parallelism each worker answers for its
        share.
        """
        if self._applied is not None:
            digests, num_live = {}, 0
            for name in sorted(self._applied.checked):
                tensor = self._applied.tensors[name]
                live = self._live(name, tensor)
                num_live += live is not None
                digests[name] = digest(to_numpy(tensor if live is None else live))
            self._applied_digests = {
                "version": self._applied.version,
                "digests": digests,
                "num_live": num_live,
            }
            self._applied = None
        if self._applied_digests is None:
            raise ValueError("applied_digest: no version was applied since this server was started")
        return self._applied_digests

    def drop_staged(self) -> None:
        """Forget what was staged and free its memory."""
        self._staged = None

    def _refuse_if_broken(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def _expect(self) -> Expected:
        if self._expected is None:
            config = self._vllm_config.model_config.hf_config
            rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            shapes = model_shapes(config)
            self._expected = Expected(
                architecture=config.architectures[0],
                config_digest=_boot_config_digest(self._vllm_config.model_config.model),
                shapes=shapes,
                parts=worker_parts(shapes, config, rank=rank, num_ranks=num_ranks),
                rank=rank,
                num_ranks=num_ranks,
            )
        return self._expected

    def _to_answer_for(self, staged: Staged) -> Staged:
        """What `applied_digest` needs of it: no memory for a tensor that can be read back from the model."""
        kept = {name: staged.tensors[name] for name in staged.checked}
        bare = {
            n: tensor if self._live(n, tensor) is None else tensor.to("meta") for n, tensor in kept.items()
        }
        return replace(staged, tensors=bare)

    def _live(self, name: str, applied: torch.Tensor) -> torch.Tensor | None:
        """The tensor as it lies in the model, cut out of a fused parameter; None where it is packed."""
        if self._expect().num_ranks > 1:
            return None
        path, _, kind = name.rpartition(".")
        # The head of an untied model lies at the top: it has no prefix.
        prefix, _, module = path.rpartition(".")
        fused, offset = module, 0
        for whole, pieces in getattr(self._model, "packed_modules_mapping", {}).items():
            if module in pieces:
                before = pieces[: pieces.index(module)]
                fused = whole
                offset = sum(self._expect().shapes[f"{prefix}.{piece}.{kind}"][0] for piece in before)
        try:
            parameter = self._model.get_parameter(".".join(part for part in (prefix, fused, kind) if part))
        except AttributeError:
            return None
        rows = applied.shape[0]
        if parameter.is_meta or parameter.dtype != applied.dtype or parameter.shape[0] < offset + rows:
            return None
        live = parameter[offset : offset + rows]
        return live if live.shape == applied.shape else None


def model_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this Hugging Face config has; a tied head is not one."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def repack(model: torch.nn.Module) -> int:
    """Pack again every linear layer whose weight is still there beside its packed copy; how many those were.

    On the CPU that is the head: the reload packs the layers that received weights, and a tied head receives
    none. Elsewhere nothing is packed and nothing is done.
    """
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "cpu_linear") or not isinstance(weight, torch.Tensor):
            continue
        if weight.ndim == 2 and weight.numel() and not weight.is_meta:
            method: Any = module.quant_method
            method.process_weights_after_loading(module)
            count += 1
    return count


def _all_agree(ready: bool) -> bool:
    """Whether every tensor-parallel worker is ready, so that none applies alone."""
    if get_tensor_model_parallel_world_size() == 1:
        return ready
    votes = torch.tensor([int(ready)])
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return bool(votes.item())


def _boot_config_digest(folder: str) -> str | None:
    path = Path(folder) / "config.json"
    return config_digest(json.loads(path.read_text())) if path.is_file() else None


class WeightsExtension:
    """Methods of every worker, by name through `/collective_rpc`.

    What fails is answered as `{"error": reason}` and not raised: of several workers vLLM reads no further
    answer once one has raised, and takes the unread ones for those of the next call.
    """

    vllm_config: Any
    """The worker's, to whose class vLLM adds this one."""
    weight_transfer_engine: Any

    def stage_weights(self, path: str) -> dict[str, Any]:
        """See `Weights.stage`."""
        return self._answer(lambda weights: weights.stage(path))

    def apply_weights(self, version: int) -> dict[str, Any]:
        """See `Weights.apply`."""
        with set_current_vllm_config(self.vllm_config):
            return self._answer(lambda weights: weights.apply(version))

    def applied_digest(self) -> dict[str, Any]:
        """See `Weights.applied_digest`."""
        return self._answer(lambda weights: weights.applied_digest())

    def drop_staged(self) -> dict[str, Any]:
        """See `Weights.drop_staged`."""
        return self._answer(lambda weights: weights.drop_staged() or {})

    def _answer(self, ask: Callable[[Weights], dict[str, Any]]) -> dict[str, Any]:
        engine = self.weight_transfer_engine
        assert isinstance(engine, OrbaxDisk), f"the weight transfer backend is not {BACKEND}"
        try:
            return ask(engine.weights)
        # vLLM miscounts later answers once a worker raises: every reason goes back as an answer.
        except Exception as error:
            logger.exception("Refused a request of the trainer")
            return {"error": str(error) or type(error).__name__}


@dataclass
class OrbaxInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class OrbaxUpdate(WeightTransferUpdateInfo):
    """Which version to take."""

    path: str = field(default="")


class OrbaxDisk(WeightTransferEngine):
    """vLLM's own update route over the same files: an update is stage and apply in one. For one worker; the
    guard refuses that route where there are more."""

    init_info_cls = OrbaxInit
    update_info_cls = OrbaxUpdate
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.weights = Weights(vllm_config, model)

    def init_transfer_engine(self, init_info: OrbaxInit) -> None:
        """Nothing: the files are the connection."""

    def start_weight_update(self) -> None:
        """Nothing changes before a version is whole and checked."""

    def receive_weights(self, update_info: OrbaxUpdate) -> None:
        """Stage and apply the version at `update_info.path`."""
        version = self.weights.stage(update_info.path)["version"]
        self.weights.apply(version)

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Free what was staged."""
        self.weights.drop_staged()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, OrbaxDisk)
