"""The merger's command line: `verl merge`, `python -m verl.model_merger` and `scripts/legacy_model_merger.py`."""

from __future__ import annotations

import argparse
import sys

from verl.utils.command_line import called_as, wide_formatter
from verl.utils.console import printable

EXAMPLES = """\
examples:
  {called} --local_dir checkpoints/gad/gad/global_step_100/actor --target_dir student
  {called} test --local_dir checkpoints/gad/gad/global_step_100/actor --test_hf_dir student
"""


def build_parser() -> argparse.ArgumentParser:
    """Commands `merge` and `test` with verl's flags."""
    called = called_as("verl.model_merger")
    parser = argparse.ArgumentParser(prog=called, description="Merge a checkpoint folder, or test what was merged.")
    commands = parser.add_subparsers(dest="command", required=True)
    options = {"epilog": EXAMPLES.format(called=called), "formatter_class": wide_formatter}
    merge_command = commands.add_parser(
        "merge",
        help="write a Hugging Face folder",
        usage=f"{called} [merge] --local_dir DIR --target_dir DIR [flags]",
        description="A checkpoint's actor or critic folder becomes a Hugging Face folder.",
        **options,
    )
    test_command = commands.add_parser(
        "test",
        help="compare a Hugging Face folder with the checkpoint",
        usage=f"{called} test --local_dir DIR --test_hf_dir DIR [flags]",
        description="Whether a Hugging Face folder holds what the checkpoint does.",
        **options,
    )
    for command in (merge_command, test_command):
        command.add_argument("--backend", choices=["fsdp", "megatron"], default="fsdp", help="(default: fsdp)")
        command.add_argument("--local_dir", required=True, metavar="DIR", help="a checkpoint's actor or critic folder")
        command.add_argument(
            "--hf_model_path", metavar="DIR", help="config and tokenizer, where there are none beside it"
        )
        command.add_argument("--is-value-model", action="store_true", help="insist that it is a critic")
        command.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
        command.add_argument("--tie-word-embedding", action="store_true", help="not needed: the config says so")
        command.add_argument("--use_cpu_initialization", action="store_true", help="not needed: merging needs no GPU")
    merge_command.add_argument("--target_dir", default="tmp", metavar="DIR", help="folder to write (default: tmp)")
    merge_command.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights to write (default: what training computed in; for verl's classic files, bfloat16 "
        "in the place of fp32 master weights)",
    )
    merge_command.add_argument("--hf_upload_path", metavar="USER/NAME", help="repository on the hub to send it to")
    merge_command.add_argument("--private", action="store_true", help="make that repository private if it is new")
    test_command.add_argument("--test_hf_dir", required=True, metavar="DIR", help="Hugging Face folder to compare")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command, `merge` where none is named; exits with a sentence where something is wrong with the folders."""
    arguments = sys.argv[1:] if arguments is None else arguments
    named = arguments[:1] and not arguments[0].startswith("-")
    options = build_parser().parse_args(arguments if named else ["merge", *arguments])
    if options.backend != "fsdp":
        sys.exit("this trainer writes fsdp checkpoints only; use --backend fsdp")
    # Not above: help is wanted at once, and this reads torch.
    from verl.models.loading import quiet_transformers

    quiet_transformers()
    try:
        if options.command == "merge":
            _merge(options)
        else:
            _test(options)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        sys.exit(printable(f"error: {error}"))


def _merge(options: argparse.Namespace) -> None:
    import torch

    from verl.model_merger.merger import merge
    from verl.model_merger.upload import prepare_upload, upload

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


def _test(options: argparse.Namespace) -> None:
    from verl.model_merger.merger import compare

    count = compare(
        options.local_dir,
        options.test_hf_dir,
        options.is_value_model,
        options.trust_remote_code,
        options.hf_model_path,
    )
    print(f"{count} tensors are equal")
