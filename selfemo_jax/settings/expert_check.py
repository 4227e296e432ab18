"""What the settings of experts and personas say together, explained in words."""

import json
from collections.abc import Iterator
from urllib.parse import urlsplit

from selfemo_jax.settings.experts import Endpoint, Expert, Persona
from selfemo_jax.settings.selfplay import ColdStart

SPLITS = ("train", "dev", "test")


def expert_problems(expert: Expert, persona: Persona, cold_start: ColdStart) -> Iterator[str]:
    """One sentence for each thing that cannot work."""
    asked = [
        f"{key} is {value}"
        for key, value in (("persona.source", persona.source), ("cold_start.source", cold_start.source))
        if value in ("expert", "mixed")
    ]
    if asked and not expert.endpoints:
        yield (
            f"{' and '.join(asked)}, and expert.endpoints is empty: name at least one, as "
            "[{name: mine, base_url: http://127.0.0.1:8000/v1, model: NAME}]"
        )
    names = [endpoint.name for endpoint in expert.endpoints]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"expert.endpoints has two named {name!r}: the name says who wrote a sample; give each its own"
    for number, endpoint in enumerate(expert.endpoints):
        yield from _endpoint(endpoint, f"expert.endpoints[{number}]")
    if expert.top_p == 0:
        yield "expert.top_p is 0: no token would be left; set 1 for all, and expert.temperature 0 for greedy"
    yield from _persona(persona)


def _endpoint(endpoint: Endpoint, where: str) -> Iterator[str]:
    if not endpoint.name or not endpoint.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        yield f"{where}.name is {endpoint.name!r}; expected letters, digits, '-', '_' and '.'"
    for key in ("price_in", "price_out"):
        if not 0 <= getattr(endpoint, key) < float("inf"):
            yield f"{where}.{key} is {getattr(endpoint, key)}; expected 0 or more"
    if endpoint.concurrency < 1:
        yield f"{where}.concurrency is {endpoint.concurrency}; expected 1 or more"
    needed = {"http": ("base_url", "model"), "replay": ("record", "model"), "policy": ()}[endpoint.kind]
    for key in needed:
        if not getattr(endpoint, key):
            yield f"{where}.{key} is missing, which kind {endpoint.kind} needs"
    if endpoint.base_url is not None:
        url = urlsplit(endpoint.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            yield f"{where}.base_url is {endpoint.base_url!r}; expected http://HOST:PORT/v1 or https://HOST/v1"
        elif url.username or url.password or url.query or url.fragment:
            # The settings are written into the run folder, so a key must not stand in the address.
            yield (
                f"{where}.base_url holds a user, password or query: name the environment variable of the key "
                "in key_env instead"
            )
    if endpoint.extra_body is not None:
        try:
            fits = isinstance(json.loads(endpoint.extra_body), dict)
        except ValueError:
            fits = False
        if not fits:
            yield f'{where}.extra_body is {endpoint.extra_body!r}; expected a JSON object, as {{"top_k": 20}}'


def _persona(persona: Persona) -> Iterator[str]:
    unknown = [split for split in persona.splits if split not in SPLITS]
    if unknown:
        yield f"persona.splits names {', '.join(unknown)}; expected any of {', '.join(SPLITS)}"
    others = [split for split in persona.splits if split in SPLITS and split != "train"]
    if others and persona.scope != "history":
        yield (
            f"persona.splits names {', '.join(others)} and persona.scope is {persona.scope}: a persona made "
            "of a whole dialogue tells the policy what is said later; set persona.scope to history"
        )
    if persona.source == "expert" and not persona.splits:
        yield "persona.source is expert and persona.splits is empty: nothing would be extracted"
