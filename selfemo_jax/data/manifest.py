"""Where the corpora's files come from, and the SHA-256 of the published versions."""

from __future__ import annotations

from selfemo_jax.data.checks import Notes

SOURCES = {
    "meld": "https://github.com/declare-lab/MELD, data/MELD (GPL-3.0)",
    "emorynlp": "https://github.com/declare-lab/MELD, data/emorynlp (GPL-3.0); the JSON files, which only "
    "context='json' reads: https://github.com/emorynlp/emotion-detection, json (Apache-2.0)",
    "iemocap": "https://sail.usc.edu/iemocap, by its release form; not to be passed on",
}

SHA256 = {
    "meld/train_sent_emo.csv": "d2fa2d6529cf03cac2989efec05c9b27d8fd2f4c8fc5974c7ae88aa537fa02db",
    "meld/dev_sent_emo.csv": "2e89c6f8aa182d6f62f8c6331aece905ac7273ca4999660bfb5213e1d0370c1c",
    "meld/test_sent_emo.csv": "8d37103938f7067600839fe29d5a114a6cd1bcdafb75bec101e06464c5006888",
    "emorynlp/emorynlp_train_final.csv": "462c66c333783adb801836d12d1424f48489bef4fb8ddfec7fbb2f08ce8211d5",
    "emorynlp/emorynlp_dev_final.csv": "20edc9d5917fe705b17b849f7f288e495d4132a60353a6247c3800445bdf8734",
    "emorynlp/emorynlp_test_final.csv": "dbc4b5638acd12c92a5f48def829e04f1c765cddffb4eedbe34216312e0d2d78",
    "emorynlp/emotion-detection-dev.json": "177f0b8ae5442045ea60e6f7940e14b1a8c15c704201f01da1ba74943f99086e",
    "emorynlp/emotion-detection-tst.json": "2da84b0bffbc9da2f3b9de8016c2d3ae5478e6ccb26d473313368373b427dedc",
}

_MELD = "https://raw.githubusercontent.com/declare-lab/MELD/2d2011b409d3ca2d7e94460cd007d434b1d0a102/data"
_EMORY = "https://raw.githubusercontent.com/emorynlp/emotion-detection/289b967a34556f0d86b52ea36571c2a0c90740ae/json"
URLS = {
    **{
        f"meld/{split}_sent_emo.csv": f"{_MELD}/MELD/{split}_sent_emo.csv"
        for split in ("train", "dev", "test")
    },
    **{
        f"emorynlp/emorynlp_{split}_final.csv": f"{_MELD}/emorynlp/emorynlp_{split}_final.csv"
        for split in ("train", "dev", "test")
    },
    **{
        f"emorynlp/emotion-detection-{split}.json": f"{_EMORY}/emotion-detection-{split}.json"
        for split in ("dev", "tst")
    },
}
"""File under the root -> where it is public, at the commit whose bytes `SHA256` pins."""


def note_digests(notes: Notes) -> None:
    """Warn about each file whose bytes are not the published ones. Files are known by folder and name."""
    for name, digest in notes.files.items():
        if SHA256.get(name, digest) != digest:
            notes.warnings.append(
                f"{name}: SHA-256 {digest[:12]}... is not the published file's ({SHA256[name][:12]}...); "
                f"every row was checked all the same."
            )
