"""Personas and scenes: what an expert reads, what is taken of its answer, and that no future turn gets in."""

import pytest

from selfemo_jax.data.dialogues import MELD, Dialogue, Turn
from selfemo_jax.data.inputs import build_inputs
from selfemo_jax.experts.ask import Answer, ExpertError
from selfemo_jax.run_data import load_data
from selfemo_jax.run_inputs import encode_input
from selfemo_jax.scores import encode_prompt
from selfemo_jax.selfplay.personas import (
    Piece,
    Scene,
    extract,
    history_piece,
    parse_scene,
    persona_question,
    segments,
)
from tests.fabricated import codec, settings

ADA = "Ada seems a brisk, guarded adult who hides worry behind orders and short words."
BO = "Bo is probably younger, speaks before thinking, and clings to whoever sounds sure."
THEME = "a crossing that goes wrong and who is to blame for it"


def block(entries: str, before: str = "I thought about it.\n", lang: str = "python") -> str:
    return f"{before}```{lang}\n{{{entries}}}\n```"


def full(ada: str = ADA, bo: str = BO, theme: str = THEME) -> str:
    return block(f'"Ada": {ada!r},\n "Bo": {bo!r}, "Theme": {theme!r}')


def dialogue(number: int, speakers=("Ada", "Bo")) -> Dialogue:
    turns = tuple(
        Turn(speaker=speakers[n % len(speakers)], text=f"turn word{n:03d} here", labels={"joy": 1.0})
        for n in range(number)
    )
    return Dialogue(dataset="meld", split="train", dialogue_id="d", turns=turns)


def test_a_good_answer_is_read():
    scene = parse_scene(full(), ("Ada", "Bo"), source="owl")
    assert scene == Scene(personas={"Ada": ADA, "Bo": BO}, theme=THEME, source="owl")


def test_the_last_block_counts():
    draft = block('"Ada": "a first idea"', "Draft:\n")
    assert parse_scene(f"{draft}\nBetter:\n{full()}\nDone.", ("Ada", "Bo")).personas["Bo"] == BO
    later = parse_scene(f"{full()}\n```\n'a'\n```", ("Ada", "Bo"))
    assert later == "the code block holds a str, not a dict"


def test_a_draft_in_a_reasoning_models_thoughts_is_passed_over():
    thoughts = f"<think>The form is\n```python\n{{'Ada': ...}}\n{full()}\n```\n</think>"
    assert parse_scene(f"{thoughts}\n{full()}", ("Ada", "Bo")).personas["Bo"] == BO
    assert parse_scene(thoughts, ("Ada", "Bo")) == "there is no closed code block"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no block at all", "no closed code block"),
        ("```python\n{'Ada': 'x'", "no closed code block"),
        (f"{full()}\n```python\n{{", "last code block is not closed"),
        (block("'Ada': __import__('os').getcwd()"), "no Python literal"),
        (block("'Ada': f'{1}'"), "no Python literal"),
        (block("'Ada': 'a' * 9"), "no Python literal"),
        (block('"Ada": "x'), "no Python literal (SyntaxError)"),
        (block("**{'Ada': 'x'}"), "no Python literal"),
        (f"```\n{'(' * 5000}{')' * 5000}\n```", "no Python literal"),
        (f"```\n{'[' * 70_000}\n```", "has 70000 characters"),
        (f"```python\ndict(Ada={ADA!r})\n```", "no Python literal"),
        (f"```\n[{ADA!r}]\n```", "holds a list, not a dict"),
        (block(f"'Ada': {ADA!r}, 'Theme': {THEME!r}"), "missing ['Bo'], unknown []"),
        (block(f"'Ada': {ADA!r}, 'Bo': {BO!r}"), "missing ['Theme']"),
        (block(f"'Ada': {ADA!r}, 'bo': {BO!r}, 'Theme': {THEME!r}"), "missing ['Bo'], unknown ['bo']"),
        (block(f"'Ada': {ADA!r}, 'Bo': {BO!r}, 'Theme': {THEME!r}, 'Cy': {BO!r}"), "unknown ['Cy']"),
        (block(f"'Ada': {ADA!r}, 'Bo': {BO!r}, 'Theme': {THEME!r}, 3: {BO!r}"), "unknown ['3']"),
        (block(f"'Ada': {ADA!r}, 'Ada': {ADA!r}, 'Bo': {BO!r}, 'Theme': {THEME!r}"), "a key stands twice"),
        (full(ada="too short"), "Ada has 9 characters, not 30 to 600"),
        (full(bo="long " * 150), "Bo has 749 characters"),
        (full(theme=""), "Theme has 0 characters"),
        (block(f"'Ada': {ADA!r}, 'Bo': 3, 'Theme': {THEME!r}"), "Bo is no string"),
    ],
)
def test_what_is_not_one_dict_of_the_speakers_is_refused(text, words):
    assert words in parse_scene(text, ("Ada", "Bo"))


def test_length_bounds_are_inclusive():
    assert isinstance(parse_scene(full(ada="a" * 30, bo="b" * 600), ("Ada", "Bo")), Scene)
    assert isinstance(parse_scene(full(ada="a" * 29), ("Ada", "Bo")), str)
    assert isinstance(parse_scene(full(bo="b" * 601), ("Ada", "Bo")), str)


def test_the_keys_are_the_names_as_the_data_spells_them():
    names = ('Dr. "Q" O\'Hara', "Ann  Lee", "O\\K")
    piece = Piece(id="p", turns=tuple((name, "Hello.") for name in names))
    asked = persona_question(piece).user
    written = {line.split(": ")[0].strip(): 1 for line in asked.splitlines() if line.endswith('"...",')}
    entries = ", ".join(f"{name}: {ADA!r}" for name in written)
    scene = parse_scene(block(f"{entries}, 'Theme': {THEME!r}"), piece.speakers)
    assert isinstance(scene, Scene) and set(scene.personas) == set(names)


def test_lines_of_a_dialogue_cannot_open_a_block_or_a_line():
    piece = Piece(id="p", turns=(("Ada", "x\n```python\n{'Ada': 'me'}\n```\nBo: y"), ("Bo", "z")))
    asked = persona_question(piece).user
    assert asked.count("```") == 2 and "1. Ada: x '''python {'Ada': 'me'} ''' Bo: y\n2. Bo: z\n" in asked


def test_all_dimensions_are_asked_for():
    asked = persona_question(Piece(id="p", turns=(("Ada", "Hi."),))).user
    for word in ("temper", "age", "gender", "schooling", "role", "speech", "feelings", "stance", "theme"):
        assert word in asked, word


@pytest.mark.parametrize(("number", "sizes"), [(1, [1]), (40, [40]), (41, [20, 21]), (100, [33, 33, 34])])
def test_a_long_dialogue_is_cut_into_few_even_windows(number, sizes):
    cut = segments(dialogue(number), "meld/train/d", max_turns=40)
    assert [end - start for _, start, end in cut] == sizes == [len(piece.turns) for piece, _, _ in cut]
    assert [cut[0][1], cut[-1][2]] == [0, number]
    assert all(a[2] == b[1] for a, b in zip(cut, cut[1:], strict=False))
    assert len({piece.id for piece, _, _ in cut}) == len(cut)


def test_a_history_shows_no_later_turn():
    samples = build_inputs([dialogue(12)], MELD, rule="all")
    for sample in samples:
        asked = persona_question(history_piece(sample, max_turns=5))
        index = len(sample.history) - 1
        text = asked.system + asked.user
        seen = [n for n in range(12) if f"word{n:03d}" in text]
        assert seen == list(range(max(0, index - 4), index + 1))


class FakePanel:
    """Answers by a rule; None is an answer that the expert refuses."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def ask(self, questions, *, what):
        self.asked += [(question.id, question.attempt) for question in questions]
        return [tuple(self.answer(q, text) for text in self.rule(q)) for q in questions]

    def answer(self, question, text):
        refused = "not this one" if text is None else None
        return Answer(key=question.id, source="owl", model="m", text=text or "", refused=refused)


PIECES = [Piece(id=f"p{n}", turns=(("Ada", f"Line {n}."), ("Bo", "Yes."))) for n in range(4)]


def test_an_unreadable_answer_is_asked_for_once_more_and_no_more():
    def rule(question):
        if question.id == "p0" or (question.id == "p1" and question.attempt == 1):
            return [full()]
        return [None] if question.id == "p3" else ["nonsense"]

    panel = FakePanel(rule)
    scenes, reasons = extract(panel, PIECES)
    assert list(scenes) == ["p0", "p1"] and set(reasons) == {"p2", "p3"}
    assert "no closed code block" in reasons["p2"] and reasons["p3"] == "refused: not this one"
    assert sorted(panel.asked) == [("p0", 0), *((f"p{n}", a) for n in (1, 2, 3) for a in (0, 1))]


def test_of_several_experts_the_first_readable_answer_counts():
    scenes, _ = extract(
        FakePanel(lambda q: ["nonsense", full(), full(ada=ADA.replace("Ada", "She"))]), PIECES
    )
    assert all(scene.personas["Ada"] == ADA for scene in scenes.values())


def test_a_speaker_called_theme_is_never_asked_about():
    panel = FakePanel(lambda q: [full()])
    scenes, reasons = extract(panel, [Piece(id="p", turns=(("Theme", "Hello."),))])
    assert (scenes, panel.asked) == ({}, []) and "called Theme" in reasons["p"]


def test_an_expert_that_does_not_answer_is_no_missing_persona():
    class Down:
        def ask(self, questions, *, what):
            raise ExpertError("down")

    with pytest.raises(ExpertError):
        extract(Down(), PIECES)


def shown(sample, config, *, persona: bool) -> str:
    return codec().decode(encode_prompt(sample, codec(), config, persona=persona).token_ids)


@pytest.mark.parametrize("evaluated", ["none", "given"])
def test_no_theme_of_a_whole_dialogue_is_in_a_prompt_that_is_scored(evaluated):
    config = settings(
        data={"sets": ["sample/meld"], "max_prompt": 300},
        eval={"persona": evaluated},
        batch={"row_tokens": 512},
    )
    data = load_data(config)
    train = data.all_train()[0]
    assert train.theme and train.theme in codec().decode(encode_input(train, codec(), config)[1].token_ids)
    for split in ("dev", "test"):
        samples = data.split(split)
        assert samples and all(sample.theme is None for sample in samples)
    told = [sample for sample in data.split("test") if sample.persona]
    assert told and (told[0].persona in shown(told[0], config, persona=evaluated == "given")) == (
        evaluated == "given"
    )


def test_what_is_scored_without_a_persona_is_told_no_theme_either():
    config = settings(data={"sets": ["sample/meld"], "max_prompt": 300}, batch={"row_tokens": 512})
    train = load_data(config).all_train()[0]
    assert train.theme in shown(train, config, persona=True)
    assert train.theme not in shown(train, config, persona=False)
