"""The merger's command line, shared by `python -m verl.model_merger` and `scripts/legacy_model_merger.py`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from verl.model_merger.card import CARD, read_judge, write_card
from verl.model_merger.merger import compare, merge
from verl.model_merger.upload import prepare_upload, upload
from verl.model_merger.written import name_of, stored_dtype, weights_in
from verl.models.loading import is_discriminator, quiet_transformers
from verl.utils.console import printable
from verl.utils.refusals import text_of

DTYPES = ("bfloat16", "float16", "float32")


def build_parser() -> argparse.ArgumentParser:
    """Commands `merge` and `test` with verl's flags."""
    parser = argparse.ArgumentParser(description="Merge a checkpoint folder into a Hugging Face folder, or test one.")
    commands = parser.add_subparsers(dest="command", required=True)
    merge_command = commands.add_parser("merge", help="write a Hugging Face folder")
    test_command = commands.add_parser("test", help="compare a Hugging Face folder with the checkpoint")
    for command in (merge_command, test_command):
        command.add_argument("--backend", choices=["fsdp", "megatron"], required=True)
        command.add_argument("--local_dir", required=True, help="a checkpoint's actor or critic folder")
        command.add_argument("--hf_model_path", help="config and tokenizer, where the checkpoint has none with it")
        command.add_argument("--is-value-model", action="store_true", help="insist that it is a critic")
        command.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
        command.add_argument("--tie-word-embedding", action="store_true", help="not needed: the config says so")
        command.add_argument("--use_cpu_initialization", action="store_true", help="not needed: merging needs no GPU")
    merge_command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the weights to write (default: bfloat16); training keeps float32",
    )
    test_command.add_argument("--dtype", choices=DTYPES, help="that the folder must have (default: whichever it has)")
    merge_command.add_argument("--target_dir", default="tmp", help="folder to write (default: tmp)")
    _add_publishing(merge_command.add_argument_group("the hub"))
    test_command.add_argument("--test_hf_dir", required=True, help="Hugging Face folder to compare")
    return parser


def _add_publishing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hf_upload_path", metavar="OWNER/NAME", help="send the merged folder there, a model card (README.md) with it"
    )
    group.add_argument("--private", action="store_true", help="make that repository private if it is new")
    group.add_argument(
        "--card_only", action="store_true", help="write the model card into --target_dir, and neither merge nor send"
    )
    group.add_argument(
        "--judge", type=Path, metavar="FILE", help="judge.json for the card (default: that in the run's judge folder)"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exits with a sentence where something is wrong with the folders."""
    options = build_parser().parse_args(arguments)
    if options.backend != "fsdp":
        sys.exit("this trainer writes fsdp checkpoints only; use --backend fsdp")
    quiet_transformers()
    try:
        if options.command == "merge":
            _merge(options)
        else:
            _test(options)
    except (OSError, ValueError) as error:
        sys.exit(text_of(error))


def _merge(options: argparse.Namespace) -> None:
    repository, target = options.hf_upload_path, Path(options.target_dir)
    # All that may be wrong with it is found before the work.
    read_judge(options.judge)
    if options.card_only:
        return _write_card(options, target)
    if repository is not None:
        prepare_upload(repository, options.private)
    merge(
        options.local_dir,
        target,
        options.is_value_model,
        options.trust_remote_code,
        options.hf_model_path,
        getattr(torch, options.dtype),
    )
    _say(f"wrote {target}: {weights_in(target)}")
    if repository is not None:
        _write_card(options, target)
        _say(f"uploaded to {upload(target, repository)}")
    elif not is_discriminator(target):
        _say(f"for llama.cpp, with its own converter: python convert_hf_to_gguf.py {shlex.quote(str(target))}")


def _write_card(options: argparse.Namespace, target: Path) -> None:
    written = write_card(target, Path(options.local_dir), options.hf_upload_path, options.judge)
    _say(f"wrote {target / CARD}" if written else f"{target / CARD} is somebody's own and stays as it is")


def _test(options: argparse.Namespace) -> None:
    count = compare(
        options.local_dir,
        options.test_hf_dir,
        options.is_value_model,
        options.trust_remote_code,
        options.hf_model_path,
        None if options.dtype is None else getattr(torch, options.dtype),
    )
    stored = name_of(stored_dtype(Path(options.test_hf_dir)))
    _say(f"{count} tensors are equal in {stored}, to the bit: those of training, rounded once")


def _say(line: str) -> None:
    print(printable(line))
