"""Who takes part in a phase: JAX with each layout, PyTorch in all ways that might be fastest, TRL, tunix."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfemo_jax.bench.settings import BenchSettings
from selfemo_jax.bench.task import PACKED_WORK, micro_batch_rows
from selfemo_jax.settings.model import Optim
from selfemo_jax.settings.objective import Loss

LOSS = Loss(kl_coef=0.001, clip_dual=None)
OPTIM = Optim(lr=1e-5)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do a phase's work. Of those with one ``seat`` only the fastest is measured."""

    side: str
    """jax, torch, trl or tunix: the process it runs in."""
    phase: str
    layout: str
    """Empty where the phase has no rows."""
    label: str
    compile: bool = False
    attention: str = "sdpa"
    cache: str = "dynamic"
    micro_cut: int = 1

    @property
    def seat(self) -> tuple[str, str]:
        """What it competes for."""
        return self.side, self.layout

    def case(self, settings: BenchSettings, folder: Path, model_folder: Path) -> dict[str, Any]:
        """Everything its process has to know."""
        group_tokens = settings.prompt + settings.group_size * settings.completion
        return {
            "phase": self.phase,
            "layout": self.layout,
            "compile": self.compile,
            "attention": self.attention,
            "cache": self.cache,
            "trl": self.side == "trl",
            # tunix scores no rows of ours: what it samples greedily shows whether its model is the same.
            "greedy": self.phase == "rl_step" and settings.tunix_python is not None,
            "folder": str(folder.resolve()),
            "model_folder": str(model_folder.resolve()),
            "dtype": settings.dtype,
            "remat": settings.remat,
            "logits_budget_mib": settings.logits_budget_mib,
            "group_size": settings.group_size,
            "completion": settings.completion,
            "micro_cut": self.micro_cut,
            "micro_rows": micro_batch_rows(settings, group_tokens),
            "loss": asdict(LOSS),
            "optim": asdict(OPTIM),
        }


def contestants(
    phase: str, settings: BenchSettings, *, attentions: tuple[str, ...], trl: bool
) -> list[Contestant]:
    """All of a phase; ``attentions`` are the kernels that the PyTorch side says it has."""
    found = []
    layouts = settings.layouts if phase in PACKED_WORK else ("",)
    if settings.backend in ("jax", "both"):
        found += [
            Contestant(
                side="jax", phase=phase, layout=layout, attention=attention, micro_cut=cut,
                label=_label("jax", layout, "" if attention == "auto" else attention, cut_label),
            )
            for layout in layouts
            for cut, cut_label in _cuts(layout, settings)
            for attention in (settings.jax_attention[:1] if phase == "refresh" else settings.jax_attention)
        ]  # fmt: skip
    if settings.backend in ("torch", "both"):
        found += _torch(phase, settings, layouts, attentions)
        if phase == "rl_step" and trl and settings.devices == 1:
            found += [
                Contestant(side="trl", phase=phase, layout="", label=f"TRL {cache}", cache=cache)
                for cache in ("dynamic", "static")
            ]
            if settings.torch_compile != "off":
                found.append(
                    Contestant(side="trl", phase=phase, layout="", label="TRL dynamic compiled", compile=True)
                )
    if phase == "rl_step" and settings.tunix_python is not None and settings.devices == 1:
        found.append(Contestant(side="tunix", phase=phase, layout="", label="tunix"))
    return found


def _torch(
    phase: str, settings: BenchSettings, layouts: tuple[str, ...], attentions: tuple[str, ...]
) -> list[Contestant]:
    if phase == "refresh":
        return [Contestant(side="torch", phase=phase, layout="", label="torch copy")]
    compiles = {"off": (False,), "on": (True,), "best": (False, True)}[settings.torch_compile]
    if phase in PACKED_WORK:
        return [
            Contestant(
                side="torch", phase=phase, layout=layout, compile=compiled, attention=attention,
                micro_cut=cut,
                label=_label("torch", layout, "compiled" if compiled else "eager", attention, cut_label),
            )
            for layout in layouts
            for cut, cut_label in _cuts(layout, settings)
            for compiled in compiles
            for attention in attentions
            if _understands(attention, layout, settings.dtype)
        ]  # fmt: skip
    if settings.devices > 1:
        return []
    # `generate` compiles its steps itself where the cache is static and there is a GPU.
    caches = [("dynamic", False), ("static", False)]
    if settings.platform != "cpu" and len(attentions) > 1:
        caches.append(("static", True))
    if phase == "rl_step":
        # Its scores and updates compile anywhere.
        caches.append(("dynamic", True))
    caches = [(cache, compiled) for cache, compiled in caches if compiled in compiles or not compiled]
    return [
        Contestant(
            side="torch", phase=phase, layout="", compile=compiled, cache=cache,
            label=f"torch generate {cache}{' compiled' if compiled else ''}",
        )
        for cache, compiled in caches
    ]  # fmt: skip


def _label(*words: str) -> str:
    return " ".join(filter(None, words))


def _cuts(layout: str, settings: BenchSettings) -> list[tuple[int, str]]:
    """Ways to cut its micro-batches, and what they add to a label."""
    cuts = settings.micro_cuts if layout == "separate" else (1,)
    return [(cut, "" if cut == 1 else f"micro/{cut}") for cut in cuts]


def _understands(attention: str, layout: str, dtype: str) -> bool:
    if attention == "flash_attention_2":
        return layout != "shared_prefix" and dtype == "bfloat16"
    return attention != "flex_attention" or layout != "separate"
