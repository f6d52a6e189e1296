"""Models and datasets named as on the Hugging Face hub, as files of a fixed revision in huggingface_hub's cache.

A name is resolved once, when a run starts, to a commit; from then on there are paths, which tell the commit
(`hub_origin`). A path that exists is never a name. Nothing is asked of the hub with HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import glob
import logging
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from huggingface_hub import HfApi, constants, metadata_load, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
SCHEME = "hf://"
# Seconds for the hub's first answer.
TIMEOUT = 10
DATA_SUFFIXES = (".parquet", ".jsonl")
# Of a model's own folder, what it is read from; files in folders within it are other formats.
MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken", ".py")
# A dataset that does not name the files of its splits has them by these words in their paths.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NAME = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?(?:/(?P<rest>.+))?"
)
_SHARD = re.compile(r"-(\d+)-of-(\d+)\b")
_SNAPSHOT = re.compile(
    r"(?P<kind>models|datasets)--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<file>.+))?$"
)


class HubName(NamedTuple):
    """What was typed, and what it names: a repository, a branch, tag or commit of it, a split or files."""

    typed: str
    kind: Kind
    repo: str
    revision: str | None
    rest: str | None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


class HubOrigin(NamedTuple):
    """Where a path in huggingface_hub's cache comes from."""

    where: str  # a name that says the commit
    commit: str


def parse_hub_name(text: str, kind: Kind) -> HubName | None:
    """The name that a setting holds; None of a path. `hf://ORG/NAME[@REVISION]`, for datasets with a /SPLIT or /FILE
    behind it; without hf://, ORG/NAME has to look like one, and nothing may lie at such a path.

    Raises:
        ValueError: it begins with hf:// and is no name.
    """
    plain = text.removeprefix(SCHEME)
    named = plain != text
    if not named and (Path(text).expanduser().exists() or text.endswith(DATA_SUFFIXES) or text[:1] in "./~"):
        return None
    found = _NAME.fullmatch(plain)
    whole = found is not None and (kind == "dataset" or found["rest"] is None)
    if not whole or (not named and "/" not in found["repo"]):
        if named:
            form = "hf://ORG/NAME[@REVISION]" + ("[/SPLIT]" if kind == "dataset" else "")
            raise ValueError(f"expected a {kind} as {form}, got {text!r}")
        return None
    return HubName(text, kind, found["repo"], found["revision"], found["rest"])


def hub_origin(path: str | Path) -> HubOrigin | None:
    """Where a path comes from if it lies in huggingface_hub's cache."""
    found = _SNAPSHOT.search(Path(path).as_posix())
    if found is None:
        return None
    repo = found["repo"].replace("--", "/")
    if found["kind"] == "models":
        return HubOrigin(f"{repo}@{found['commit']}", found["commit"])
    return HubOrigin(f"{SCHEME}{repo}@{found['commit']}/{found['file'] or ''}".rstrip("/"), found["commit"])


# ---------------------------------------------------------------------------------------------------------------------
# What is fetched


def model_folder(text: str) -> str:
    """The folder of a model named on the hub, fetched; a path as it is. Errors: see `_explained`."""
    name = parse_hub_name(text, "model")
    return text if name is None else str(_model_folder(name))


def data_files(text: str, default_split: str | None = None) -> list[str]:
    """The files of a dataset's split named on the hub, fetched, in order; a path as it is.

    Args:
        default_split: what a name without a split means, if the dataset has several.

    Raises:
        ValueError: the dataset has no such split or not all of its files. More errors: see `_explained`.
    """
    name = parse_hub_name(text, "dataset")
    return [text] if name is None else list(_data_files(name, default_split))


@lru_cache
def _model_folder(name: HubName) -> Path:
    commit, files = _listing(name)
    top = [file for file in files if "/" not in file]
    suffixes = MODEL_SUFFIXES if any(file.endswith(".safetensors") for file in top) else (*MODEL_SUFFIXES, ".bin")
    folder = _fetched(name, commit, [file for file in top if file.endswith(suffixes)])
    _note_branch(name, commit)
    return folder


@lru_cache
def _data_files(name: HubName, default_split: str | None) -> tuple[str, ...]:
    commit, files = _listing(name)
    if name.rest and name.rest.endswith(DATA_SUFFIXES):
        chosen = sorted(file for file in files if _matches(file, name.rest))
        if not chosen:
            raise ValueError(f"{name.typed}: expected {name.rest} in the dataset, got {_some(files)}; correct the path")
    else:
        readme = _fetched(name, commit, ["README.md"]) / "README.md" if "README.md" in files else None
        chosen = choose_split(name, files, _configs(readme) if readme else [], default_split)
    _check_shards(name, chosen)
    folder = _fetched(name, commit, chosen)
    _note_branch(name, commit)
    return tuple(str(folder / file) for file in chosen)


def _configs(readme: Path) -> list[dict[str, Any]]:
    """The configurations that the head of a dataset's README names."""
    try:
        configs = (metadata_load(readme) or {}).get("configs") or []
        return [config for config in configs if config["config_name"]]
    except Exception as error:
        raise ValueError(
            f"{readme} has a head that cannot be read ({type(error).__name__}: {_first_line(error)}): name files of "
            f"the dataset, {SCHEME}ORG/NAME/FOLDER/*.parquet"
        ) from error


def choose_split(
    name: HubName, files: Sequence[str], configs: Sequence[dict[str, Any]], default_split: str | None
) -> list[str]:
    """The parquet and jsonl files of the split that is named.

    Args:
        files: all files of the dataset.
        configs: `configs` of its README; without any, splits are told by words in the files' paths.

    Raises:
        ValueError: there is no such split, or none of its files can be read; says which splits there are.
    """
    splits = _splits_of_configs(name, files, configs) if configs else _splits_of_words(files)
    wanted = name.rest or (next(iter(splits)) if len(splits) == 1 else default_split)
    if wanted not in splits:
        got = f"no split {name.rest!r}" if name.rest else "no split"
        raise ValueError(
            f"{name.typed}: expected one of the dataset's splits ({', '.join(splits) or 'it has none'}), got {got}; "
            f"name one as {SCHEME}{name}/SPLIT, or files as {SCHEME}{name}/FOLDER/*.parquet"
        )
    readable = [file for file in splits[wanted] if file.endswith(DATA_SUFFIXES)]
    if not readable or len(readable) < len(splits[wanted]):
        raise ValueError(
            f"{name.typed}: expected parquet or jsonl files, got {_some(splits[wanted])}; the hub may have them as "
            f"parquet: {SCHEME}{name.repo}@refs/convert/parquet/default/{wanted}/*.parquet"
        )
    return readable


def _splits_of_configs(name: HubName, files: Sequence[str], configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    defaults = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
    if len(configs) > 1 and not defaults:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        raise ValueError(
            f"{name.typed}: expected a dataset with a default configuration, got {names}; name files instead: "
            f"{SCHEME}{name}/FOLDER/*.parquet"
        )
    config = (defaults or list(configs))[0]
    entries = config.get("data_files") or []
    if isinstance(entries, str) or (isinstance(entries, list) and not any(isinstance(e, dict) for e in entries)):
        entries = [{"split": "train", "path": entries}] if entries else []
    base = config.get("data_dir") or ""
    if not entries:
        return _splits_of_words([file for file in files if file.startswith(base)])
    splits = {}
    for entry in entries:
        paths = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
        patterns = [str(PurePosixPath(base, path)) for path in paths]
        splits[str(entry["split"])] = sorted(f for f in files if any(_matches(f, pattern) for pattern in patterns))
    return splits


def _splits_of_words(files: Sequence[str]) -> dict[str, list[str]]:
    data = sorted(file for file in files if file.endswith((*DATA_SUFFIXES, ".json", ".csv", ".arrow", ".json.gz")))
    splits: dict[str, list[str]] = {}
    for split, words in SPLIT_WORDS.items():
        word = re.compile(rf"(?:^|[-._ /\d])(?:{'|'.join(words)})(?:[-._ /\d]|$)")
        found = [file for file in data if word.search(file)]
        if found:
            splits[split] = found
    return splits or ({"train": data} if data else {})


def _matches(file: str, pattern: str) -> bool:
    """As shells match: `*` within a folder, `**/` in any."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern)
    form = "".join(meanings.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
    return re.fullmatch(form, file) is not None


def _check_shards(name: HubName, files: Sequence[str]) -> None:
    """ValueError if a file's name says that there are more like it than there are."""
    for file in files:
        shard = _SHARD.search(file)
        if shard:
            like = [other for other in files if _SHARD.sub("", other) == _SHARD.sub("", file)]
            if len(like) != int(shard[2]):
                raise ValueError(
                    f"{name.typed}: expected {int(shard[2])} files like {file}, got {len(like)}: fetch them all"
                )


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "") or "no file"


# ---------------------------------------------------------------------------------------------------------------------
# The hub and its cache


def _listing(name: HubName) -> tuple[str, list[str]]:
    """The commit that is named, and all files of it."""
    try:
        return _ask(name.kind, name.repo, name.revision)
    except (HTTPError, OSError, HFValidationError) as error:
        raise _explained(name, error) from error


@lru_cache
def _ask(kind: Kind, repo: str, revision: str | None) -> tuple[str, list[str]]:
    """Asked once in a process, so that all names of a repository mean the same commit."""
    commit = revision if re.fullmatch("[0-9a-f]{40}", revision or "") else None
    kept = _kept_listing(kind, repo, commit) if commit else []
    if kept:
        return commit, kept
    if constants.HF_HUB_OFFLINE:
        folder = Path(
            snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=[], local_files_only=True)
        )
        files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
        return folder.name, _kept_listing(kind, repo, folder.name) or files
    info = HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=TIMEOUT)
    logger.info("%s %s on %s is at %s", kind, repo, constants.ENDPOINT, info.sha)
    return info.sha, [sibling.rfilename for sibling in info.siblings]


def _kept_listing(kind: Kind, repo: str, commit: str) -> list[str]:
    """All files of a commit, as huggingface_hub has noted them; older versions of it do not."""
    with suppress(ImportError):
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        with suppress(CachedRepoTreeNotFoundError):
            return [file.path for file in get_cached_repo_tree(repo, repo_type=kind, revision=commit)]
    return []


def _fetched(name: HubName, commit: str, files: Sequence[str]) -> Path:
    """The folder of a commit with these files in it."""
    options = {"repo_type": name.kind, "revision": commit, "allow_patterns": [glob.escape(file) for file in files]}
    try:
        with suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(name.repo, local_files_only=True, **options))
            if all((folder / file).is_file() for file in files):
                return folder
        folder = Path(snapshot_download(name.repo, **options))
    except (HTTPError, OSError) as error:
        raise _explained(name, error) from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name.typed}: expected {len(files)} files of {name.repo} at {commit} in {constants.HF_HUB_CACHE}, got "
            f"all but {_some(missing)}: fetch them where the hub can be reached, without HF_HUB_OFFLINE"
        )
    return folder


def _note_branch(name: HubName, commit: str) -> None:
    """Have the cache say what a branch or tag meant, as huggingface_hub does when it is asked for one: what is fetched
    by commit would not be found by it offline."""
    revision = name.revision or constants.DEFAULT_REVISION
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name.repo, repo_type=name.kind))
    if revision != commit:
        file = folder / "refs" / revision
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
        part.write_text(commit)
        part.replace(file)


def _explained(name: HubName, error: Exception) -> Exception:
    """What to raise for an error of huggingface_hub: ValueError for a name or revision that there is not,
    FileNotFoundError for what is not kept while offline, ConnectionError where the hub does not answer."""
    head = f"{name.typed}: there is no such path here, and as the name of a {name.kind} on {constants.ENDPOINT} it"
    command = f"hf download {name.repo}" + (f" --revision {name.revision}" if name.revision else "")
    command += " --repo-type dataset" if name.kind == "dataset" else ""
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{head} has no revision {name.revision!r}: name a branch, a tag or a commit of it")
    if isinstance(error, RepositoryNotFoundError | HFValidationError | EntryNotFoundError) and not isinstance(
        error, LocalEntryNotFoundError
    ):
        return ValueError(
            f"{head} was not found, or may not be read ({_first_line(error)}): correct the path or the name, or log in "
            "with `hf auth login` or HF_TOKEN if it is private or gated"
        )
    if constants.HF_HUB_OFFLINE:
        return FileNotFoundError(
            f"{head} is not, or not wholly, in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 forbids to fetch it: run "
            f"`{command}` where the hub can be reached, copy that cache here, or name a local path"
        )
    return ConnectionError(
        f"{head} could not be fetched ({type(error).__name__}: {_first_line(error)}): name a local path; or set "
        f"HF_ENDPOINT to a mirror that can be reached; or, if {constants.HF_HUB_CACHE} has it already (`{command}` "
        "fills it on a machine that reaches the hub), set HF_HUB_OFFLINE=1"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
