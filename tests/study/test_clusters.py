"""Persona clusters: names play no part, groups are found and named, noise is counted."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import adjusted_rand_score

from selfemo_jax.checkpoint import save_weights
from selfemo_jax.model.config import ModelConfig
from selfemo_jax.model.decoder import Compute, forward, init_params
from selfemo_jax.parts import bundled_tokenizer
from selfemo_jax.study import __main__ as study
from selfemo_jax.study.clusters import (
    MASK,
    Persona,
    cluster,
    cluster_names,
    mask_names,
    policy_vectors,
    tfidf_vectors,
)
from tests.fabricated import codec

WORDS = {
    "calm": "gentle patient listener calm soothing quiet kindness slow tender reassuring",
    "loud": "brash shouting furious hotheaded quarrel temper slamming rage explosive bitter",
    "funny": "joking prankster teasing laughter witty clown mischief punchline grin silly",
}
KINDS = {kind: words.split() for kind, words in WORDS.items()}
PEOPLE = ("Ada Lund", "Bo", "Cy", "Dora")


def invented(number: int, seed: int = 0) -> tuple[list[Persona], list[str]]:
    """Personas of three kinds, five words of a kind each, two speakers a dialogue; and their kinds."""
    rng, found, kinds = random.Random(seed), [], []
    for place in range(number):
        kind = rng.choice(sorted(KINDS))
        root = f"meld/train/d{place // 2}"
        speaker = PEOPLE[place % 2]
        line = f"{speaker} seems {' and '.join(rng.sample(KINDS[kind], 5))}."
        found.append(Persona(root=root, speaker=speaker, sentence=line))
        kinds.append(kind)
    return found, kinds


def test_names_of_the_dialogue_and_their_parts_are_masked_and_nothing_else():
    found = [
        Persona(root="d1", speaker="Ada Lund", sentence="ADA LUND trusts Bo; Ada's boat, Bono, Adamant."),
        Persona(root="d1", speaker="Bo", sentence="Bo likes Cy."),
        Persona(root="d2", speaker="Cy", sentence="Cy is not Bo."),
    ]
    assert mask_names(found) == [
        f"{MASK} trusts {MASK}; {MASK}'s boat, Bono, Adamant.",
        f"{MASK} likes Cy.",
        f"{MASK} is not Bo.",
    ]


def test_groups_are_found_named_and_ordered_by_size():
    found, kinds = invented(240)
    masked = mask_names(found)
    result = cluster(masked, tfidf_vectors(masked), min_cluster_size=25, min_samples=5)
    assert len(result.names) == 3 and list(result.counts) == sorted(result.counts, reverse=True)
    assert sum(result.counts) + round(result.noise_share * 240) == 240
    inside = result.labels >= 0
    assert inside.mean() > 0.5
    assert adjusted_rand_score(np.array(kinds)[inside], result.labels[inside]) > 0.95
    for name in result.names:
        owners = {kind for kind, words in KINDS.items() if set(name.split("_")) & set(words)}
        assert len(owners) == 1 and MASK not in name
    assert result.points.shape == (240, 2)


def test_a_cluster_is_named_by_what_it_says_more_often_than_others():
    sentences = ["calm calm river boat"] * 4 + ["angry angry river boat"] * 3
    names = cluster_names(sentences, np.array([0] * 4 + [1] * 3))
    assert names[0].split("_")[0] == "calm" and names[1].split("_")[0] == "angry"
    assert cluster_names(sentences, np.full(7, -1)) == ()


def test_the_command_writes_counts_noise_and_a_picture(tmp_path, capsys):
    found, _ = invented(160)
    path = tmp_path / "personas.jsonl"
    records = [{"root": p.root, "speaker": p.speaker, "persona": p.sentence} for p in found]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["clusters", "--personas", str(path), "--min-cluster-size", "20", "--min-samples", "4"]
    assert study.main([*words, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "clusters.json").read_text())
    counted = sum(one["count"] for one in summary["clusters"])
    assert summary["personas"] == 160 and counted == round((1 - summary["noise_share"]) * 160)
    lines = (tmp_path / "out" / "persona_clusters.jsonl").read_text().splitlines()
    assert len(lines) == 160 and {"cluster", "point"} <= json.loads(lines[0]).keys()
    assert (tmp_path / "out" / "clusters.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "clusters" in capsys.readouterr().out


def test_too_few_personas_and_odd_lines_are_errors(tmp_path, capsys):
    path = tmp_path / "personas.jsonl"
    path.write_text('{"root": "d1", "speaker": "Ada", "persona": "Ada hums a lot."}\n' * 4)
    assert study.main(["clusters", "--personas", str(path)]) == 2
    assert "min-cluster-size" in capsys.readouterr().err
    path.write_text('{"root": "d1"}\n')
    assert study.main(["clusters", "--personas", str(path)]) == 2
    assert "line 1" in capsys.readouterr().err
    assert study.main(["clusters"]) == 2


def test_vectors_of_a_policy_do_not_depend_on_the_batch_or_the_padding(tmp_path):
    vocab_size = -(-codec().vocab_size // 128) * 128
    model = ModelConfig(
        architecture="qwen3", vocab_size=vocab_size, rope_theta=1e4, tie_embeddings=True, max_positions=256,
        num_layers=1, embed_dim=32, mlp_dim=64, num_heads=2, num_kv_heads=2, head_dim=16,
    )  # fmt: skip
    params = init_params(model, jax.random.key(0))
    save_weights(tmp_path / "policy", params, model, tokenizer=bundled_tokenizer(), certificate={})
    sentences = ["Row.", "A gentle, patient listener who seems to wait for the tide.", "A loud one."]
    alone = policy_vectors(sentences, str(tmp_path / "policy"), batch_size=1)
    assert alone.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1.0, atol=1e-5)
    together = policy_vectors(sentences, str(tmp_path / "policy"), batch_size=4)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    # By hand: the mean of the hidden states of one sentence, alone in its row.
    means = []
    for sentence in sentences:
        ids = jnp.array([codec().encode_data(sentence)], jnp.int32)
        hidden = forward(
            params, model, Compute(), tokens=ids, positions=jnp.arange(ids.shape[1])[None],
            segment_ids=jnp.ones_like(ids), prefix_ids=jnp.full_like(ids, -1),
        )  # fmt: skip
        means.append(np.asarray(hidden[0]).mean(axis=0))
    expected = np.array(means) - np.mean(means, axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(alone, expected, atol=1e-4)
