"""The run card: what a run was, on what it ran, what it cost."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Entry = tuple[str, str]


def card(
    config: Mapping[str, Any], env: Mapping[str, Any], times: Sequence[Mapping[str, Any]], **measured: Any
) -> list[dict[str, Any]]:
    """Titled lists of names and values.

    ``measured``: ``sampled`` tokens and the ``recorded`` steps they stand in, ``scoring`` seconds, ``best``
    (of final.json), ``rollouts`` in all, ``memory`` peaks in GiB by name.
    """
    return [
        {"title": "Run", "entries": list(_run(config, env, measured))},
        {"title": "Cost", "entries": list(_cost(times, measured))},
        {"title": "Hardware and software", "entries": list(_machine(env))},
        {"title": "Data", "entries": list(_data(config, env))},
    ]


def _run(config: Mapping[str, Any], env: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[Entry]:
    commit = env.get("commit")
    yield (
        "commit",
        f"{commit}{' with uncommitted changes' if env.get('dirty') else ''}" if commit else "unknown",
    )
    yield "command", " ".join(map(str, env.get("command") or [])) or "unknown"
    yield "started", str(env.get("time", "unknown"))
    for again in env.get("resumed") or ():
        yield "resumed", f"{again.get('time')} at commit {again.get('commit')}"
    yield "seed", str(config.get("seed", "unknown"))
    best = measured.get("best")
    if best:
        yield "scored policy", f"step {best['global_step']} ({best['phase']}), dev F1 {best['dev/wf1']:.4f}"


def _cost(times: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> Iterator[Entry]:
    seconds = sum(row["seconds"] for row in times)
    yield "steps", f"{sum(row['steps'] for row in times):,}"
    yield "wall time of steps", duration(seconds)
    yield "of it compiling", duration(sum(row["compile_seconds"] for row in times))
    yield "wall time of final scores", duration(measured.get("scoring", 0.0))
    yield "tokens trained on", f"{sum(row['tokens'] for row in times):,}"
    if measured.get("recorded"):
        yield "tokens sampled", f"{measured['sampled']:,} in {measured['recorded']:,} recorded steps"
    yield "rollouts recorded", f"{measured.get('rollouts', 0):,}"
    memory = measured.get("memory") or {}
    yield "peak memory of a device", gib(memory.get("memory/device_peak_gib"))
    yield "peak memory of the process", gib(memory.get("memory/host_peak_gib"))


def _machine(env: Mapping[str, Any]) -> Iterator[Entry]:
    devices = list(map(str, env.get("devices") or []))
    kinds = sorted({name.split(" ", 1)[-1] for name in devices})
    yield "devices", f"{len(devices)} x {', '.join(kinds)}" if devices else "unknown"
    yield "backend", str(env.get("backend", "unknown"))
    yield "processes", str(env.get("num_processes", "unknown"))
    yield "platform", str(env.get("platform", "unknown"))
    yield "python", str(env.get("python", "unknown"))
    for name, version in (env.get("versions") or {}).items():
        yield str(name), str(version)


def _data(config: Mapping[str, Any], env: Mapping[str, Any]) -> Iterator[Entry]:
    yield "sets", ", ".join(map(str, (config.get("data") or {}).get("sets") or [])) or "unknown"
    for name, digest in (env.get("data") or {}).items():
        yield f"sha256 of {name}", str(digest)


def gib(value: float | None) -> str:
    """A peak in words; a CPU does not tell that of its devices."""
    return "not told" if value is None else f"{value:.2f} GiB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds in words."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[Entry]:
    """Dotted names and values of nested settings."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "" if value is None else str(value)
