"""Which accepted inputs train: whole roots are held out, no label or data set takes over, the cap holds."""

from collections import Counter

from selfemo_jax.data.dialogues import EMORYNLP, IEMOCAP, MELD, heaviest_label
from selfemo_jax.data.inputs import Sample
from selfemo_jax.selfplay.selection import choose, label_shares
from tests.fabricated import sample, synthetic


def children(root: int, number: int, labels=MELD) -> list[Sample]:
    parent = sample(root, labels=labels, dialogue=f"d{root}", gold={labels.labels[0]: 1.0})
    return [synthetic(parent, iteration=n) for n in range(1, number + 1)]


def test_held_out_roots_are_whole_stable_and_disjoint():
    made = [child for root in range(400) for child in children(root, 2)]
    found = choose(made, n_syn=10**6, heldout=0.1, seed=3)
    training, held = found.training, found.heldout
    roots = {c.root_id for c in held}
    assert roots.isdisjoint(c.root_id for c in training)
    assert len(training) + len(held) == 800 and len(held) == 2 * len(roots)
    assert 0.06 < len(roots) / 400 < 0.14
    # A later harvest, with other inputs in another order, holds out the same dialogues.
    later = [child for root in range(500, 100, -1) for child in children(root, 1)]
    held_later = choose(later, n_syn=10**6, heldout=0.1, seed=3).heldout
    common = {f"meld/train/d{root}" for root in range(101, 400)}
    assert {c.root_id for c in held_later} & common == roots & common
    assert {c.root_id for c in choose(made, n_syn=10**6, heldout=0.1, seed=4).heldout} != roots


def test_nothing_or_everything_is_held_out_at_the_ends():
    made = children(1, 3) + children(2, 3)
    assert choose(made, n_syn=100, heldout=0.0, seed=0).heldout == ()
    assert choose(made, n_syn=100, heldout=1.0, seed=0).training == ()


def test_the_cap_takes_from_the_data_sets_in_turn():
    made = children(1, 50) + children(2, 4, EMORYNLP) + children(3, 9, IEMOCAP)
    found = choose(made, n_syn=18, heldout=0.0, seed=0)
    training = found.training
    assert len(found.left_out["cap"]) == 63 - 18 and "label_share" not in found.left_out
    # Four rounds of three, then the two sets that have any left.
    assert Counter(c.dataset for c in training) == {"meld": 7, "emorynlp": 4, "iemocap": 7}
    assert len({c.id for c in training}) == 18
    assert training == choose(made, n_syn=18, heldout=0.0, seed=0).training
    assert {c.id for c in training} != {c.id for c in choose(made, n_syn=18, heldout=0.0, seed=1).training}


def labelled(counts: dict[str, int], labels=MELD) -> list[Sample]:
    """Synthetic inputs with these numbers of gold labels, each of a root of its own."""
    found = []
    for label, count in counts.items():
        for number in range(count):
            root = sample(number, labels=labels, dialogue=f"{label}{number}", gold={label: 1.0})
            found.append(synthetic(root, iteration=1))
    return found


HUMAN = {"meld": {"neutral": 0.5, "joy": 0.2, "anger": 0.2, "fear": 0.1}}


def bounded(counts: dict[str, int], *, n_syn: int = 10**6, ratio: float = 2.0):
    found = choose(labelled(counts), n_syn=n_syn, heldout=0.0, seed=0, human=HUMAN, max_label_ratio=ratio)
    return found, Counter(heaviest_label(s.gold) for s in found.training)


def test_no_label_gets_more_than_its_multiple_of_the_human_share():
    found, counts = bounded({"joy": 300, "neutral": 90, "fear": 9})
    # 0.4 N + 90 + 9 >= N up to N = 165, of which joy may be 66.
    assert counts == {"joy": 66, "neutral": 90, "fear": 9}
    assert len(found.left_out["label_share"]) == 300 - 66 and "cap" not in found.left_out
    found, counts = bounded({"joy": 300, "neutral": 90, "fear": 9}, ratio=1.5)
    total = counts.total()
    assert all(count <= 1.5 * HUMAN["meld"][label] * total for label, count in counts.items())
    assert counts["joy"] == int(0.3 * total) and counts["neutral"] == 90


def test_the_bounds_hold_under_the_cap_too():
    found, counts = bounded({"joy": 300, "neutral": 300, "fear": 300}, n_syn=100)
    assert counts.total() == 100 and counts["joy"] <= 40 and counts["fear"] <= 20
    assert sum(map(len, found.left_out.values())) == 800


def test_a_cap_of_nothing_is_what_leaves_everything_out():
    found, counts = bounded({"joy": 4, "neutral": 3}, n_syn=0)
    assert not counts and {reason: len(left) for reason, left in found.left_out.items()} == {"cap": 7}
    # No human gave this label: it stays out whatever the cap.
    assert set(bounded({"surprise": 4}, n_syn=0)[0].left_out) == {"label_share"}


def test_a_label_that_no_human_gave_is_left_out_and_a_collapse_to_one_label_leaves_little():
    assert bounded({"surprise": 80, "neutral": 80})[1] == {"neutral": 80}
    assert bounded({"joy": 500})[1] == {"joy": 1}


def test_a_small_harvest_rounds_its_bounds_up():
    # 0.4 of 6 is 2.4; rounded down, five inputs would be the most.
    assert bounded({"joy": 4, "neutral": 3})[1] == {"joy": 3, "neutral": 3}


def test_every_input_has_one_place():
    made = labelled({"joy": 60, "neutral": 60, "fear": 60}) + children(7, 20, IEMOCAP)
    found = choose(made, n_syn=50, heldout=0.2, seed=1, human=HUMAN, max_label_ratio=2.0)
    places = [*found.training, *found.heldout, *(s for part in found.left_out.values() for s in part)]
    assert sorted(s.id for s in places) == sorted(s.id for s in made)


def test_label_shares_count_heaviest_labels_by_data_set():
    made = [sample(n, gold=g) for n, g in enumerate([{"joy": 0.2, "fear": 0.4}, {"joy": 1.0}, {"fear": 1.0}])]
    made.append(sample(9, labels=IEMOCAP, gold={"sad": 1.0}))
    assert label_shares(made) == {"iemocap": {"sad": 1.0}, "meld": {"fear": 2 / 3, "joy": 1 / 3}}
