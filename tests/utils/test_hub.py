"""Names of the Hugging Face hub, fetched over HTTP from a hub on this machine, or found in a cache without it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub_server import Hub, serving
from verl.utils.hub import HubName, choose_split, hub_origin, parse_hub_name

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys, time
from verl.utils.hub import data_files, hub_origin, model_folder
for name in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        found = [model_folder(name[6:])] if name.startswith("model:") else data_files(name, "train")
        result = {"found": found, "origins": [hub_origin(path) and hub_origin(path).where for path in found]}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({**result, "seconds": time.monotonic() - start}), flush=True)
"""


def ask(home: Path, endpoint: str, *names: str, **variables: str) -> list[dict]:
    """What becomes of each name, in a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(names)], env={**kept, **settings, **variables}, cwd=home.parent,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(text: str) -> bytes:
    return json.dumps({"content": [{"role": "user", "content": "q"}], "teacher_response": text}).encode() + b"\n"


README = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: parts/*.jsonl
  - split: held_out
    path: ["more/**/last.jsonl"]
---
# rows
"""
CHAT = {
    "README.md": README,
    "parts/b.jsonl": rows("b"),
    "parts/a.jsonl": rows("a"),
    "parts/deeper/c.jsonl": rows("c"),
    "more/last.jsonl": rows("1"),
    "more/x/y/last.jsonl": rows("2"),
    "more/first.jsonl": rows("3"),
}
SHARDS = {"data/train-00000-of-00002.jsonl": rows("0"), "data/train-00001-of-00002.jsonl": rows("1"), "notes.txt": b"x",
          "data/test.jsonl": rows("t")}  # fmt: skip
MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "pytorch_model.bin": b"old",
         "onnx/model.safetensors": b"other", "flax.msgpack": b"x"}  # fmt: skip


@pytest.fixture
def hub():
    hub = Hub()
    hub.push("datasets", "org/chat", CHAT)
    hub.push("datasets", "org/shards", SHARDS)
    hub.push("models", "Qwen/tiny.3-8B", MODEL)
    return hub


def names_in(result: dict) -> list[str]:
    """The files within the snapshot."""
    return [path.split("/snapshots/")[1].partition("/")[2] for path in result["found"]]


def test_names_are_fetched_pinned_and_found_again_offline(hub, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "org").mkdir()
    (tmp_path / "org/local").mkdir()
    first = hub.branches["datasets", "org/chat"]["main"]
    hub.push("datasets", "org/chat", CHAT, "refs/convert/parquet")
    with serving(hub) as endpoint:
        asked = [
            "org/chat", "hf://org/chat@main/held_out", f"org/chat@{first}/train", "hf://org/chat/more/*.jsonl",
            "hf://org/chat@refs/convert/parquet/parts/a.jsonl", "org/shards", "org/shards/test", "model:Qwen/tiny.3-8B",
            "model:org/local", "data/train.parquet",
        ]  # fmt: skip
        online = ask(home, endpoint, *asked)
        assert not any("error" in result for result in online), online
        whole, held_out, pinned, starred, converted, shards, test, model, local, missing = online
        assert names_in(whole) == names_in(pinned) == ["parts/a.jsonl", "parts/b.jsonl"]
        assert whole["origins"][0] == f"hf://org/chat@{first}/parts/a.jsonl"
        assert names_in(held_out) == ["more/last.jsonl", "more/x/y/last.jsonl"]
        assert names_in(starred) == ["more/first.jsonl", "more/last.jsonl"]
        assert names_in(converted) == ["parts/a.jsonl"]
        assert names_in(shards) == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
        assert names_in(test) == ["data/test.jsonl"]
        assert Path(whole["found"][0]).read_bytes() == rows("a")
        (folder,) = map(Path, model["found"])
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert model["origins"] == [f"Qwen/tiny.3-8B@{folder.name}"]
        # What lies here is a path, and so is what ends as a file does.
        assert (local["found"], local["origins"]) == (["org/local"], [None])
        assert missing["found"] == ["data/train.parquet"]
        # The branch moves, and means what it means now; a commit that is kept is not asked for again.
        second = hub.push("datasets", "org/chat", CHAT | {"parts/a.jsonl": rows("new")})
        hub.asked.clear()
        moved = ask(home, endpoint, *asked)
        assert moved[0]["origins"][0] == f"hf://org/chat@{second}/parts/a.jsonl"
        assert Path(moved[0]["found"][0]).read_bytes() == rows("new")
        assert [moved[number]["found"] for number in (2, 4, 5, 6, 7)] == [
            online[number]["found"] for number in (2, 4, 5, 6, 7)
        ]
        assert not any(first in line for line in hub.asked)
        hub.asked.clear()
        offline = ask(home, endpoint, *asked, "org/other", "model:Qwen/tiny.3-8B@v2", HF_HUB_OFFLINE="1")
        assert hub.asked == []
    assert [result.get("found", result) for result in offline[:10]] == [result["found"] for result in moved]
    for result in offline[10:]:
        assert result["error"].startswith("FileNotFoundError: ")
        assert "HF_HUB_OFFLINE=1 forbids to fetch it: run `hf download" in result["error"]
        assert result["seconds"] < 5


def test_a_half_filled_cache_is_no_dataset(hub, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with serving(hub) as endpoint:
        (whole, model) = ask(home, endpoint, "org/shards", "model:Qwen/tiny.3-8B")
        Path(whole["found"][1]).unlink()
        Path(model["found"][0], "tokenizer.json").unlink()
        broken = ask(home, endpoint, "org/shards", "model:Qwen/tiny.3-8B", HF_HUB_OFFLINE="1")
        for folder in (home / "hub").glob("*/trees"):
            for file in folder.iterdir():
                file.unlink()
        (unlisted,) = ask(home, endpoint, "org/shards", HF_HUB_OFFLINE="1")
        mended = ask(home, endpoint, "org/shards", "model:Qwen/tiny.3-8B")
    assert all("FileNotFoundError" in result["error"] for result in broken)
    assert "expected 2 files like data/train-00000-of-00002.jsonl, got 1" in unlisted["error"]
    assert [result["found"] for result in mended] == [whole["found"], model["found"]]
    assert Path(model["found"][0], "tokenizer.json").is_file()


def test_names_that_the_hub_does_not_have(hub, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    hub.push("datasets", "org/csv", {"train.csv": b"a,b", "train.jsonl": rows("x")})
    hub.push("datasets", "org/several", {
        "README.md": b"---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: zh\n---\n",
        "en.jsonl": rows("x"),
    })  # fmt: skip
    hub.push("datasets", "org/bad", {"README.md": b"---\nconfigs: [3]\n---\n", "train.jsonl": rows("x")})
    hub.push("models", "org/gated", MODEL)
    hub.gated.add("org/gated")
    wanted = {
        "org/none": "ValueError: org/none: there is no such path here, and as the name of a dataset on",
        "model:models/base": "as the name of a model on http://127.0.0.1",
        "model:org/gated": "log in with `hf auth login` or HF_TOKEN",
        "org/chat@v9": "has no revision 'v9': name a branch, a tag or a commit of it",
        "org/chat/test": "expected one of the dataset's splits (train, held_out), got no split 'test'",
        "org/csv": "expected parquet or jsonl files, got train.csv, train.jsonl; the hub may have them as parquet",
        "org/several": "expected a dataset with a default configuration, got en, zh",
        "org/bad": "has a head that cannot be read",
        "hf://org/chat/no/*.parquet": "expected no/*.parquet in the dataset, got README.md, parts/b.jsonl",
        "hf://a b": "expected a dataset as hf://ORG/NAME[@REVISION][/SPLIT], got 'hf://a b'",
        "model:hf://org/x/y": "expected a model as hf://ORG/NAME[@REVISION], got 'hf://org/x/y'",
    }
    with serving(hub) as endpoint:
        results = ask(home, endpoint, *wanted)
    for (name, sentence), result in zip(wanted.items(), results, strict=True):
        assert sentence in result.get("error", result), name
        assert result["seconds"] < 5


def test_without_a_network_it_takes_seconds(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    names = ("org/chat", "model:Qwen/Qwen3-8B")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # One that takes connections and never answers, one that nobody listens at, and one that has no address.
        for endpoint, limit in (
            (f"http://127.0.0.1:{silent.getsockname()[1]}", 30),
            ("http://127.0.0.1:9", 5),
            ("https://hub.invalid", 30),
        ):
            start = time.monotonic()
            for result in ask(home, endpoint, *names):
                assert "error" in result, endpoint
                assert result["error"].startswith("ConnectionError: "), result
                assert "could not be fetched (" in result["error"]
                assert "set HF_HUB_OFFLINE=1" in result["error"]
                assert result["seconds"] < limit
            assert time.monotonic() - start < 120


def test_what_is_a_name():
    def of(text, kind="dataset"):
        name = parse_hub_name(text, kind)
        return name and (name.repo, name.revision, name.rest)

    assert of("hf://org/name") == of("org/name") == ("org/name", None, None)
    assert of("hf://org/name@v1/train") == of("org/name@v1/train") == ("org/name", "v1", "train")
    assert of("hf://org/name@refs/pr/3/a/b.jsonl") == ("org/name", "refs/pr/3", "a/b.jsonl")
    assert of("Qwen/Qwen3-8B", "model") == ("Qwen/Qwen3-8B", None, None)
    assert of("hf://gpt2", "model") == ("gpt2", None, None)
    for path in ("gpt2", "a/b.jsonl", "/org/name", "./org/name", "~/name", "../x", "", "a b/c"):
        assert of(path) is None
    for path in ("checkpoints/run/actor", "base", "tests/utils"):
        assert of(path, "model") is None


def test_splits_by_their_words():
    name = HubName("org/x", "dataset", "org/x", None, None)
    files = ["dev.jsonl", "x/train/0.parquet", "x/train/1.parquet", "eval-0.parquet", "constraint.txt", "README.md"]
    assert choose_split(name, files, [], "train") == ["x/train/0.parquet", "x/train/1.parquet"]
    assert choose_split(name._replace(rest="validation"), files, [], None) == ["dev.jsonl"]
    assert choose_split(name._replace(rest="test"), files, [], None) == ["eval-0.parquet"]
    assert choose_split(name, ["all.jsonl"], [], None) == ["all.jsonl"]
    with pytest.raises(ValueError, match=r"expected one of the dataset's splits \(train, validation, test\), got no"):
        choose_split(name, files, [], None)
    with pytest.raises(ValueError, match=r"\(it has none\)"):
        choose_split(name, ["README.md"], [], "train")


def test_where_a_path_is_from():
    commit = "0123456789" * 4
    folder = f"/home/user/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/{commit}"
    assert hub_origin(folder) == (f"Qwen/Qwen3-8B@{commit}", commit)
    data = f"/c/datasets--a--b/snapshots/{commit}/data/x.parquet"
    assert hub_origin(data) == (f"hf://a/b@{commit}/data/x.parquet", commit)
    assert hub_origin("/models/base") is None
