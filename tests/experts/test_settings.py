"""Settings of experts that cannot work are refused in words that say what to write."""

import pytest

from tests.fabricated import settings

OWL = {"name": "owl", "base_url": "http://127.0.0.1:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"persona": {"source": "expert"}}, "persona.source is expert, and expert.endpoints is empty"),
        ({"cold_start": {"source": "mixed"}}, "cold_start.source is mixed, and expert.endpoints is empty"),
        ({"expert": {"endpoints": [OWL, OWL]}}, "two named 'owl'"),
        ({"expert": {"endpoints": [OWL | {"name": "an owl"}]}}, r"endpoints\[0\].name is 'an owl'"),
        ({"expert": {"endpoints": [OWL | {"model": None}]}}, "model is missing, which kind http needs"),
        ({"expert": {"endpoints": [{"name": "t", "kind": "replay", "model": "m"}]}}, "record is missing"),
        ({"expert": {"endpoints": [OWL | {"base_url": "localhost:8000"}]}}, "expected http://HOST:PORT/v1"),
        ({"expert": {"endpoints": [OWL | {"base_url": "https://me:sk-1@h/v1"}]}}, "name the environment var"),
        (
            {"expert": {"endpoints": [OWL | {"base_url": "https://h/v1?key=sk-1"}]}},
            "name the environment var",
        ),
        ({"expert": {"endpoints": [OWL | {"extra_body": "[1]"}]}}, "expected a JSON object"),
        ({"expert": {"endpoints": [OWL | {"concurrency": 0}]}}, "concurrency is 0; expected 1 or more"),
        ({"expert": {"endpoints": [OWL | {"price_in": -1}]}}, "price_in is -1.0; expected 0 or more"),
        ({"expert": {"endpoints": [OWL | {"speed": 3}]}}, "a mapping with name, kind, base_url, model"),
        ({"expert": {"top_p": 0}}, "expert.top_p is 0"),
        ({"expert": {"deadline": 0}}, "expert.deadline is 0"),
        (
            {"persona": {"splits": ["train", "test"]}},
            "tells the policy what is said later; set persona.scope",
        ),
        ({"persona": {"splits": ["trian"]}}, "persona.splits names trian; expected any of train, dev, test"),
        (
            {"persona": {"source": "expert", "splits": []}, "expert": {"endpoints": [OWL]}},
            "nothing would be extracted",
        ),
    ],
)
def test_what_cannot_work_is_refused(sections, words):
    with pytest.raises(ValueError, match=words) as error:
        settings(**sections)
    if "environment" in words:
        # The address holds a key; the message must not.
        assert "sk-1" not in str(error.value)


def test_history_personas_of_any_split_are_allowed():
    asked = {"source": "expert", "scope": "history", "splits": ["train", "dev", "test"]}
    assert settings(persona=asked, expert={"endpoints": [OWL]}).persona.splits[-1] == "test"
