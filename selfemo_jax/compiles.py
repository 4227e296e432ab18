"""How often and how long XLA compiles, from JAX's own monitoring events."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts compilations from its making on; `close` ends that."""

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        self._open = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        if self._open and event == _EVENT:
            self.count += 1
            self.seconds += duration

    def take(self) -> dict[str, float]:
        """Compilations since the last call, as metrics."""
        metrics = {"compile/count": float(self.count), "compile/seconds": self.seconds}
        self.count, self.seconds = 0, 0.0
        return metrics

    def close(self) -> None:
        """Stop counting (a listener cannot be taken back, only silenced)."""
        self._open = False
