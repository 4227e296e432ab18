"""Downloads against a server of another process: what arrives whole is kept, and nothing else leaves a
trace."""

import hashlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from selfemo_jax.data.fetch import FetchError, fetch_files, files_of
from selfemo_jax.data.manifest import SHA256, URLS
from tests.data.file_server import serving

FILES = ("own/a.csv", "own/b.csv")
TOOL = Path(__file__).resolve().parents[2] / "tools" / "data.py"


@pytest.fixture
def home(tmp_path) -> Path:
    folder = tmp_path / "home"
    (folder / "own").mkdir(parents=True)
    for number, name in enumerate(FILES):
        (folder / name).write_bytes(bytes(range(256)) * (2000 + number))
    return folder


def digests(home: Path) -> dict[str, str]:
    return {name: hashlib.sha256((home / name).read_bytes()).hexdigest() for name in FILES}


def fetch(home: Path, root: Path, base: str, **options) -> dict[str, str]:
    urls = {name: f"{base}/{name}" for name in FILES}
    quiet = {"say": lambda words: None, "first_wait": 0.01}
    return fetch_files(FILES, root, urls=urls, sha256=digests(home), **quiet, **options)


def asked(home: Path) -> list[str]:
    log = home / "requests.log"
    return log.read_text().splitlines() if log.exists() else []


def names_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_files_arrive_whole_and_are_not_asked_for_twice(home, tmp_path):
    root = tmp_path / "root"
    with serving(home) as base:
        assert fetch(home, root, base) == dict.fromkeys(FILES, "fetched")
        assert all((root / name).read_bytes() == (home / name).read_bytes() for name in FILES)
        assert fetch(home, root, base) == dict.fromkeys(FILES, "kept")
    assert asked(home) == list(FILES) and names_in(root) == list(FILES)


@pytest.mark.parametrize(
    ("fault", "words", "requests"),
    [
        ("cut", "broke off", 3),
        ("404", "HTTP 404", 1),
        ("500", r"HTTP 500 \(3 tries\)", 3),
        ("changed", "SHA-256", 1),
        ("empty", "SHA-256", 1),
    ],
)
def test_what_does_not_arrive_whole_leaves_nothing(home, tmp_path, fault, words, requests):
    root = tmp_path / "root"
    with serving(home, own__b_dot_csv=fault) as base, pytest.raises(FetchError, match=words) as error:
        fetch(home, root, base)
    assert names_in(root) == ["own/a.csv"], "the good one stays, of the other there is no trace"
    assert asked(home).count("own/b.csv") == requests
    said = str(error.value)
    assert f"{root / 'own/b.csv'}" in said and "own/a.csv" not in said, "what is still to get, by hand"


def test_a_passing_fault_is_tried_again(home, tmp_path):
    with serving(home, own__a_dot_csv="once") as base:
        assert fetch(home, tmp_path / "root", base) == dict.fromkeys(FILES, "fetched")
    assert asked(home) == ["own/a.csv", *FILES]


def test_offline_it_says_where_the_files_are_and_where_they_go(home, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{closed.getsockname()[1]}"
    root = tmp_path / "root"
    with pytest.raises(FetchError, match="no connection to 127.0.0.1") as error:
        fetch(home, root, base)
    assert all(f"{base}/{name}\n    -> {root / name}" in str(error.value) for name in FILES)
    assert names_in(root) == []


def test_a_file_of_other_bytes_is_left_unless_forced_and_survives_a_failure(home, tmp_path):
    root = tmp_path / "root"
    (root / "own").mkdir(parents=True)
    (root / FILES[0]).write_text("mine")
    with serving(home) as base:
        assert fetch(home, root, base) == {FILES[0]: "left", FILES[1]: "fetched"}
        assert (root / FILES[0]).read_text() == "mine"
    with serving(home, own__a_dot_csv="changed") as base, pytest.raises(FetchError):
        fetch(home, root, base, force=True)
    assert (root / FILES[0]).read_text() == "mine"
    with serving(home) as base:
        assert fetch(home, root, base, force=True) == {FILES[0]: "fetched", FILES[1]: "kept"}


def test_every_public_file_has_a_checksum_and_a_fixed_commit():
    assert set(URLS) == set(SHA256)
    assert all(len(url.split("/")[5]) == 40 for url in URLS.values()), "a branch's name would move"
    assert files_of(["meld"]) == tuple(f"meld/{split}_sent_emo.csv" for split in ("train", "dev", "test"))
    with pytest.raises(ValueError, match="iemocap cannot be downloaded: https://sail.usc.edu"):
        files_of(["iemocap"])
    with pytest.raises(ValueError, match="no data set 'mled'"):
        files_of(["mled"])


def tool(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOL), "fetch", *words],
        capture_output=True,
        text=True,
        cwd=TOOL.parents[1],
        timeout=60,
    )


def test_the_command_refuses_a_wrong_file_without_a_traceback(home, tmp_path):
    (home / "meld").mkdir()
    (home / "meld" / "train_sent_emo.csv").write_text("not the file")
    with serving(home) as base:
        result = tool("meld", "--mirror", base, "--root", str(tmp_path / "root"))
    assert result.returncode == 2 and "SHA-256" in result.stderr and "Traceback" not in result.stderr
    assert names_in(tmp_path / "root") == []


def test_real_files_are_the_pinned_ones(selfemo_data, tmp_path):
    (selfemo_data_copy := tmp_path / "home").mkdir()
    for name in ("meld", "emorynlp"):
        (selfemo_data_copy / name).symlink_to(selfemo_data / name)
    with serving(selfemo_data_copy) as base:
        result = tool("--mirror", base, "--root", str(tmp_path / "root"))
    assert result.returncode == 0, result.stderr
    assert "8 fetched, 0 kept, 0 left" in result.stdout
