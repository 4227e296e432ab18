"""Whatever a model writes, the parser comes back, soon, with codes of its table."""

import random
import time

import pytest

from selfemo_jax.data.grammar import CODES, acceptable, parse, parse_lenient, predicted_label, serialise
from selfemo_jax.data.lenient import resolve_label

MELD = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
NUM_MUTATED = 100_000

SEEDS = [
    serialise(
        {"disgust": 0.85, "sadness": 0.4}, {"neutral": 0.6}, "Okay, let us sit down.", think="She sighs."
    ),
    serialise({"joy": 1.0}, {"joy": 0.7, "surprise": 0.35, "fear": 0.1}, "No way! When does it start?"),
    serialise({"anger": 0.05}, {"sadness": 1.0}, "I said: 7:30. " * 12, think="Long thought, " * 30),
]
INSERTS = [
    *("<think>", "</think>", "<emotion>", "</emotion>", "<self_emotion>", "</self_emotion>"),
    *("<response>", "</response>", "<", ">", ",", ":", "joy:0.5", "Sad:1", "-1", "nan", "1e9", "100%"),
    *("<|im_end|>", "\n", "\t", "\u00a0", "\ufffd", "\u202e", "\x00", "\ud800", "\u0130", "\u00df", "\u0663"),
    *("é", "漢", "🙂", "0." + "9" * 50, "<" * 20, "joy:" * 10, " " * 30),
]


def mutate(rng):
    text = rng.choice(SEEDS)
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(text))
        action = rng.random()
        if action < 0.45:
            text = text[:at] + rng.choice(INSERTS) + text[at:]
        elif action < 0.70:
            text = text[:at] + text[at + rng.randint(1, 25) :]
        elif action < 0.80:
            text = text[:at]
        elif action < 0.90:
            text = text[:at] + text[max(0, at - 60) :]
        else:
            text = (
                text[:at] + chr(rng.choice((rng.randint(0, 127), rng.randint(0, 0x10FFFF)))) + text[at + 1 :]
            )
    return text


def options(rng):
    return {
        "inventory": MELD,
        "max_labels": rng.choice((1, 3)),
        "thinking": rng.random() < 0.5,
        "think_open_in_prompt": rng.random() < 0.3,
        "finished": rng.random() < 0.9,
    }


def cpu_seconds(function, *, repeats=3):
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def test_no_mutated_answer_crashes_or_takes_five_milliseconds():
    rng = random.Random(20240229)
    known = set(CODES)
    slowest: list[tuple[float, str, dict]] = []
    num_valid = 0
    for _ in range(NUM_MUTATED):
        text, settings = mutate(rng), options(rng)
        start = time.process_time()
        parsed = parse(text, **settings)
        slowest.append((time.process_time() - start, text, settings))
        if len(slowest) > 1000:
            slowest = sorted(slowest, key=lambda item: -item[0])[:20]
        num_valid += parsed.valid
        assert known.issuperset(parsed.codes)
        if parsed.valid:
            assert predicted_label(parsed) in (*MELD, None)
            assert 1 <= len(parsed.emotion) <= settings["max_labels"] and parsed.response
            acceptable(parsed)
    # A fuzz that never, or always, leaves a valid answer tests one branch only.
    assert 0.01 * NUM_MUTATED < num_valid < 0.9 * NUM_MUTATED
    for _, text, settings in sorted(slowest, key=lambda item: -item[0])[:20]:
        assert cpu_seconds(lambda text=text, settings=settings: parse(text, **settings)) < 0.005, text


def test_no_mutated_answer_crashes_the_lenient_readings():
    rng = random.Random(3)
    for _ in range(5_000):
        text = mutate(rng)
        for scoring in ("lenient", "instructerc"):
            pairs = parse_lenient(text, dataset="meld", inventory=MELD, scoring=scoring)
            assert len(pairs) <= 3 and all(weight > 0 for _, weight in pairs)
        resolve_label(text, dataset="meld", inventory=MELD)


BODY = "<emotion>joy:0.5</emotion><self_emotion>joy:0.5</self_emotion><response>"
HOSTILE = {
    "angle brackets": lambda n: "<" * n,
    "angle brackets in the reply": lambda n: BODY + "<" * n + "</response>",
    "angle brackets and blanks in the reply": lambda n: BODY + "< / " * (n // 4) + "</response>",
    "blanks after an angle bracket": lambda n: BODY + "<" + " " * n + "x</response>",
    "unfinished tags in the reply": lambda n: BODY + "<self_emotio" * (n // 12) + "</response>",
    "unfinished markup in the reply": lambda n: BODY + ("<" + "a" * 29) * (n // 30) + "</response>",
    "unfinished chat tokens in the reply": lambda n: BODY + ("<|" + "a" * 39) * (n // 41) + "</response>",
    "opening tags": lambda n: "<emotion>" * (n // 9),
    "all tags": lambda n: (BODY + "</response>") * (n // 80),
    "think blocks": lambda n: "<think>a</think>" * (n // 16) + BODY + "x</response>",
    "opening think tags": lambda n: "<think>" * (n // 7),
    "commas": lambda n: "<emotion>" + "," * n + "</emotion>",
    "pairs": lambda n: "<emotion>" + "joy:0.5," * (n // 8) + "</emotion>",
    "colons": lambda n: "<emotion>" + ":" * n + "</emotion>",
    "digits": lambda n: "<emotion>joy:0." + "9" * n + "</emotion>",
    "zeros": lambda n: "<emotion>joy:1." + "0" * n + "</emotion>",
    "a long label": lambda n: "<emotion>" + "j" * n + ":0.5</emotion>",
    "a label of many words": lambda n: "<emotion>" + "a " * (n // 2) + ":0.5</emotion>",
    "blanks": lambda n: "<emotion>" + " " * n + "</emotion>" + " " * n,
    "labels without weight in the reply": lambda n: BODY + "joy: " * (n // 5) + "</response>",
    "label and blanks in the reply": lambda n: BODY + ("joy" + " " * 97) * (n // 100) + ":</response>",
    "numbers after colons in the reply": lambda n: BODY + ":1" * (n // 2) + "</response>",
    "unicode": lambda n: BODY + "İ🙂漢\u0301" * (n // 4) + "</response>",
    "words": lambda n: (
        "<think>" + "so sad " * (n // 7) + "</think>" + BODY + "so glad " * (n // 8) + "</response>"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("reader", ["strict", "lenient"])
def test_ten_times_the_text_takes_at_most_fifteen_times_as_long(name, reader):
    def seconds(num_chars):
        text = HOSTILE[name](num_chars)
        if reader == "strict":
            return cpu_seconds(lambda: parse(text, inventory=MELD, thinking=True), repeats=5)
        return cpu_seconds(lambda: parse_lenient(text, dataset="meld", inventory=MELD), repeats=5)

    seconds(1_000)
    short, long = seconds(40_000), seconds(400_000)
    # Below a tenth of a millisecond the clock, not the parser, is measured.
    assert long < 15 * max(short, 1e-4), (short, long)
    assert short < 0.005
