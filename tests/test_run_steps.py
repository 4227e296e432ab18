"""What a step measures of the machine."""

from types import SimpleNamespace

import jax

from selfemo_jax.run_steps import peak_memory


def test_the_peak_is_that_of_the_fullest_device_that_tells_it(monkeypatch):
    here = peak_memory()
    assert 0.05 < here["memory/host_peak_gib"] < 500
    devices = [
        SimpleNamespace(memory_stats=lambda stats=stats: stats)
        for stats in ({"peak_bytes_in_use": 3 * 2**30}, {"peak_bytes_in_use": 2**29}, None, {})
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory()["memory/device_peak_gib"] == 3.0
    monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
    assert set(peak_memory()) == {"memory/host_peak_gib"}
