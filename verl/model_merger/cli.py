"""The merger's command line, shared by `python -m verl.model_merger` and `scripts/legacy_model_merger.py`."""

from __future__ import annotations

import argparse
import sys

import torch

from verl.model_merger.merger import compare, merge
from verl.model_merger.upload import prepare_upload, upload
from verl.models.loading import quiet_transformers
from verl.utils.console import printable
from verl.utils.refusals import text_of


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
    merge_command.add_argument("--target_dir", default="tmp", help="folder to write (default: tmp)")
    merge_command.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights to write (default: what training computed in; for verl's classic files, bfloat16 "
        "in the place of fp32 master weights)",
    )
    merge_command.add_argument("--hf_upload_path", metavar="USER/NAME", help="repository on the hub to send it to")
    merge_command.add_argument("--private", action="store_true", help="make that repository private if it is new")
    test_command.add_argument("--test_hf_dir", required=True, help="Hugging Face folder to compare")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exits with a sentence where something is wrong with the folders."""
    options = build_parser().parse_args(arguments)
    if options.backend != "fsdp":
        sys.exit("this trainer writes fsdp checkpoints only; use --backend fsdp")
    quiet_transformers()
    try:
        if options.command == "merge":
            if options.hf_upload_path:
                prepare_upload(options.hf_upload_path, options.private)
            dtype = None if options.dtype is None else getattr(torch, options.dtype)
            target = merge(
                options.local_dir,
                options.target_dir,
                options.is_value_model,
                options.trust_remote_code,
                options.hf_model_path,
                dtype,
            )
            print(printable(f"wrote {target}"))
            if options.hf_upload_path:
                print(printable(f"uploaded to {upload(target, options.hf_upload_path)}"))
        else:
            count = compare(
                options.local_dir,
                options.test_hf_dir,
                options.is_value_model,
                options.trust_remote_code,
                options.hf_model_path,
            )
            print(f"{count} tensors are equal")
    except (OSError, ValueError) as error:
        sys.exit(text_of(error))
