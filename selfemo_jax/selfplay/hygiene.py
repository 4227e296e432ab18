"""What the text of a reply must be to enter the store: length, language, one turn, no copy, no label, no
near-duplicate.

Near-duplicates are found by MinHash over the word 3-grams of a reply; the few candidates that its bands name
are compared exactly, so that a verdict never rests on a hash.
"""

import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np
from lingua import Language, LanguageDetector, LanguageDetectorBuilder
from rensa import RMinHash, RMinHashLSH  # pyrefly: ignore[missing-module-attribute]
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer

from selfemo_jax.data.diversity import words
from selfemo_jax.data.grammar import BLOCKS
from selfemo_jax.data.inputs import Sample
from selfemo_jax.settings.selfplay import Hygiene

NUM_HASHES = 128
LETTERS, ALIKE = 5, 0.6
"""Of MELD's and EmoryNLP's turns, equal ones left out, 0.6 % of 500 and 2.3 % of 8,000 are so like one
before."""
BLOCK = 512
"""Replies that are compared with all before them at once."""
MIN_LANGUAGE_WORDS = 4
FOREIGN = 0.05
"""Confidence in the expected language below which a reply counts as foreign."""
COMPARED = (
    *("arabic", "chinese", "dutch", "english", "french", "german", "greek", "hindi", "italian", "japanese"),
    *("korean", "polish", "portuguese", "russian", "spanish", "swedish", "turkish", "ukrainian"),
    "vietnamese",
)
"""Languages that the expected one is told from; more of them make verdicts on short replies worse."""

# The grammar refuses its own tags; a policy that half knows them also writes [response] and the like.
_MARKUP = re.compile(r"[\[({{]\s*/?\s*(?:{})\s*[\])}}]".format("|".join(BLOCKS)), re.IGNORECASE)


class ReplyIndex:
    """The accepted replies, to find near-duplicates; the same order of calls gives the same answers.

    ``threshold`` is the Jaccard similarity of word 3-grams from which two replies are near-duplicates; a
    reply of fewer than three words is one gram.
    """

    def __init__(self, replies: Iterable[str] = (), *, threshold: float = 0.8):
        self._threshold = threshold
        self._replies: list[str] = []
        bands = _num_bands(threshold)
        self._bands = RMinHashLSH(threshold=max(threshold, 0.01), num_perm=NUM_HASHES, num_bands=bands)
        for reply in replies:
            self.add(reply)

    def __len__(self) -> int:
        return len(self._replies)

    def add(self, reply: str) -> None:
        """Remember an accepted reply."""
        self._bands.insert(len(self._replies), _minhash(trigrams(reply)))
        self._replies.append(reply)

    def near(self, reply: str) -> bool:
        """Whether an accepted reply is the same but for a few words."""
        grams = trigrams(reply)
        return any(
            jaccard(grams, trigrams(self._replies[place])) >= self._threshold
            for place in self._bands.query(_minhash(grams))
        )


def text_problem(reply: str, parent: Sample, declared: Iterable[str], rules: Hygiene) -> str | None:
    """Why a reply to ``parent`` may not become a turn, as a reason of rejection; None when it may.

    ``declared`` are the labels of the emotions that the reply declares. Near-duplicates are not looked for.
    """
    if not rules.min_words <= len(reply.split()) <= rules.max_words:
        return "length"
    if not any(character.isalpha() for character in reply):
        return "no_letters"
    if _names_a_speaker(reply, parent):
        return "several_turns"
    if _MARKUP.search(reply):
        return "markup"
    if words(reply) == words(parent.history[-1][1]):
        return "copy"
    named = {"declared": set(declared), "any": set(parent.inventory), "keep": set()}[rules.label_words]
    if named & set(words(reply)):
        return "label_word"
    if rules.language is not None and is_foreign(reply, rules.language):
        return "language"
    return None


def is_foreign(text: str, language: str) -> bool:
    """Whether a text of at least four words is almost surely not in ``language``; a shorter one is never."""
    if len(text.split()) < MIN_LANGUAGE_WORDS:
        return False
    expected = _language(language)
    return _detector(language).compute_language_confidence(text, expected) < FOREIGN


def trigrams(text: str) -> frozenset[str]:
    """Its runs of three words; of fewer words the whole."""
    found = words(text)
    runs = zip(found, found[1:], found[2:], strict=False)
    return frozenset(" ".join(run) for run in runs) or frozenset({" ".join(found)})


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of the intersection over that of the union."""
    return len(one & other) / len(one | other)


def repeats(replies: Sequence[str]) -> list[bool]:
    """Which replies are nearly an earlier one: Jaccard similarity of their runs of five letters from `ALIKE`
    on, over all pairs.

    Another measure than that of acceptance, which can be held against it: one changed word in seven is seen.
    """
    if not replies:
        return []
    counted = CountVectorizer(analyzer=_letters, binary=True, dtype=np.float32).fit_transform(replies)
    found = csr_matrix(counted)
    sizes, seen = np.asarray(found.sum(axis=1)).ravel(), []
    for start in range(0, len(replies), BLOCK):
        earlier = csr_matrix(found[: start + BLOCK])
        both = csr_matrix(earlier[start:] @ earlier.T).toarray()
        alike = both >= ALIKE * (sizes[start : start + BLOCK, None] + sizes[None, : start + BLOCK] - both)
        seen += [bool(row[: start + place].any()) for place, row in enumerate(alike)]
    return seen


def _letters(reply: str) -> set[str]:
    text = " ".join(words(reply))
    return {text[place : place + LETTERS] for place in range(max(1, len(text) - LETTERS + 1))}


def _minhash(grams: frozenset[str]) -> RMinHash:
    found = RMinHash(num_perm=NUM_HASHES, seed=0)
    found.update(sorted(grams))
    return found


def _num_bands(threshold: float) -> int:
    """Bands with which a pair at the threshold is missed less often than once in 10,000 times."""
    for rows in (8, 4, 2):
        if (1 - threshold**rows) ** (NUM_HASHES // rows) < 1e-4:
            return NUM_HASHES // rows
    return NUM_HASHES


def _names_a_speaker(reply: str, parent: Sample) -> bool:
    """Whether the reply writes ``Name:`` of somebody in the dialogue, as a script of several turns does."""
    names = {parent.responder, *(speaker for speaker, _ in parent.history)}
    pattern = "|".join(re.escape(name) for name in sorted(names))
    return re.search(rf"(?<!\w)(?:{pattern})\s*:", reply, re.IGNORECASE) is not None


def _language(name: str) -> Language:
    found = getattr(Language, name.upper(), None)
    if not isinstance(found, Language):
        raise ValueError(
            f"flywheel.hygiene.language is {name!r}, which the language detector does not know; expected an "
            "English name such as english or german, or null"
        )
    return found


@functools.cache
def _detector(expected: str) -> LanguageDetector:
    languages = {_language(name) for name in (*COMPARED, expected)}
    # Its small models: 40 MB and a tenth of a second to load; the large ones take 270 MB and 2.4 s.
    ordered = sorted(languages, key=lambda language: language.name)
    return LanguageDetectorBuilder.from_languages(*ordered).with_low_accuracy_mode().build()
