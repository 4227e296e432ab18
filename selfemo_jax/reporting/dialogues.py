"""Self-play as conversations: chains of accepted replies from the flywheel's store, each with its end."""

from collections.abc import Iterable, Mapping
from typing import Any

from selfemo_jax.reporting.reading import number
from selfemo_jax.reporting.rollouts import weights

Record = Mapping[str, Any]


def conversations(records: Iterable[Record], *, most: int) -> tuple[list[dict[str, Any]], int]:
    """Dialogues of the store that hold at least one accepted reply, evenly chosen up to ``most``; and their
    number.

    A dialogue is the original context, then one turn for each accepted reply with the emotions that were
    declared for it, what was recognised in the turn before, and its rewards; a rejected reply is its end.
    """
    accepted: dict[str, Record] = {}
    rejected: dict[tuple[Any, str], Record] = {}
    for record in records:
        sample = record.get("sample")
        if record.get("accepted") and isinstance(sample, Mapping):
            accepted[str(sample.get("id"))] = record
        elif record.get("reply"):
            rejected[record.get("iteration"), str(record.get("parent_id"))] = record
    parents = {str(record.get("parent_id")) for record in accepted.values()}
    ends = [name for name in accepted if name not in parents]
    chosen = [ends[int(place * len(ends) / most)] for place in range(most)] if len(ends) > most else ends
    return [
        _conversation(name, accepted, rejected.get((accepted[name].get("iteration"), name)))
        for name in chosen
    ], len(ends)


def _conversation(end: str, accepted: Mapping[str, Record], rejection: Record | None) -> dict[str, Any]:
    chain: list[Record] = []
    name = end
    while name in accepted and len(chain) < len(accepted):
        chain.append(accepted[name])
        name = str(accepted[name].get("parent_id"))
    chain.reverse()
    last = chain[-1]["sample"]
    history = [tuple(map(str, turn)) for turn in last.get("history") or [] if len(turn) == 2]
    context = history[: max(0, len(history) - len(chain))]
    turns = []
    for record, (speaker, text) in zip(chain, history[len(context) :], strict=False):
        turns.append(_turn(record, speaker, text))
    ending = None
    if rejection is not None:
        ending = _turn(rejection, str(last.get("responder", "")), str(rejection.get("reply")))
        ending["reason"] = str(rejection.get("reason", ""))
    return {
        "id": end,
        "iteration": chain[-1].get("iteration"),
        "dataset": str(last.get("dataset", "")),
        "theme": last.get("theme"),
        "context": context,
        "turns": turns,
        "ending": ending,
    }


def _turn(record: Record, speaker: str, text: str) -> dict[str, Any]:
    """One generated turn: its declared emotions are the gold of the child where the record has no own."""
    sample, select = record.get("sample") or {}, record.get("select") or {}
    return {
        "speaker": speaker,
        "text": text,
        "declared": weights(record.get("declared") or sample.get("gold")),
        "recognised": weights(record.get("emotion")),
        "rewards": {name: number(value) for name, value in select.items()},
        "version": record.get("policy_version", sample.get("policy_version")),
    }
