"""The merger's command line: `verl merge`, `python -m verl.model_merger` and `scripts/legacy_model_merger.py`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from verl.utils.command_line import called_as, wide_formatter
from verl.utils.console import printable
from verl.utils.refusals import Ended

DEFAULT_DTYPE, ADAPTER_DTYPE = "bfloat16", "float32"
DTYPES = (DEFAULT_DTYPE, "float16", "float32")

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
        # verl's scripts give it; others than this one are refused.
        command.add_argument("--backend", metavar="fsdp", default="fsdp", help="the only one (default: fsdp)")
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
        choices=DTYPES,
        help=f"of the weights to write (default: {DEFAULT_DTYPE}, with --adapter {ADAPTER_DTYPE}); trained in float32",
    )
    merge_command.add_argument(
        "--adapter", action="store_true", help="write the trained adapters alone, as a PEFT folder, without their base"
    )
    test_command.add_argument("--dtype", choices=DTYPES, help="that the folder must have (default: whichever it has)")
    _add_publishing(merge_command.add_argument_group("the hub"))
    test_command.add_argument("--test_hf_dir", required=True, metavar="DIR", help="Hugging Face folder to compare")
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
    """Run the command, `merge` where none is named; ends with a sentence and exit code 2 where something is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    named = arguments[:1] and not arguments[0].startswith("-")
    options = build_parser().parse_args(arguments if named else ["merge", *arguments])
    if options.backend != "fsdp":
        raise Ended(ValueError("this trainer writes fsdp checkpoints only; use --backend fsdp"))
    # Not above: help is wanted at once, and this reads torch.
    from verl.models.loading import quiet_transformers

    quiet_transformers()
    try:
        if options.command == "merge":
            _merge(options)
        else:
            _test(options)
    except (OSError, ValueError) as error:
        raise Ended(error) from error


def _merge(options: argparse.Namespace) -> None:
    import torch

    from verl.model_merger.adapters import refuse_local_base, write_adapters
    from verl.model_merger.card import find_judge, read_judge
    from verl.model_merger.merger import merge
    from verl.model_merger.upload import prepare_upload, upload
    from verl.model_merger.written import weights_in
    from verl.models.finding import is_discriminator
    from verl.utils.checkpoint.best_link import behind_best

    repository, target = options.hf_upload_path, Path(options.target_dir)
    # Once: a run that goes on may have another best when the card is written.
    options.local_dir = behind_best(Path(options.local_dir).expanduser().absolute())
    if repository is not None or options.card_only:
        # All that may be wrong with it is found before the work.
        options.judge = options.judge or find_judge(options.local_dir)
    read_judge(options.judge)
    if options.card_only:
        return _write_card(options, target)
    if repository is not None:
        if options.adapter:
            refuse_local_base(options.local_dir)
        prepare_upload(repository, options.private)
    if options.adapter:
        written = write_adapters(
            options.local_dir, target, options.trust_remote_code, getattr(torch, options.dtype or ADAPTER_DTYPE)
        )
        _say(f"wrote {target}: {written}")
    else:
        merge(
            options.local_dir,
            target,
            options.is_value_model,
            options.trust_remote_code,
            options.hf_model_path,
            getattr(torch, options.dtype or DEFAULT_DTYPE),
        )
        _say(f"wrote {target}: {weights_in(target)}")
    if repository is not None:
        _write_card(options, target)
        _say(f"uploaded to {upload(target, repository)}")
    elif not options.adapter and not is_discriminator(target):
        _say(f"for llama.cpp, with its own converter: python convert_hf_to_gguf.py {shlex.quote(str(target))}")


def _write_card(options: argparse.Namespace, target: Path) -> None:
    from verl.model_merger.card import CARD, write_card

    written = write_card(target, options.local_dir, options.hf_upload_path, options.judge)
    _say(f"wrote {target / CARD}" if written else f"{target / CARD} is somebody's own and stays as it is")


def _test(options: argparse.Namespace) -> None:
    import torch

    from verl.model_merger.adapters import adapter_dtype
    from verl.model_merger.merger import compare
    from verl.model_merger.written import name_of, stored_dtype
    from verl.utils.checkpoint.whole import ADAPTER_CONFIG

    count = compare(
        options.local_dir,
        options.test_hf_dir,
        options.is_value_model,
        options.trust_remote_code,
        options.hf_model_path,
        None if options.dtype is None else getattr(torch, options.dtype),
    )
    folder = Path(options.test_hf_dir)
    stored = name_of(adapter_dtype(folder) if (folder / ADAPTER_CONFIG).is_file() else stored_dtype(folder))
    _say(f"{count} tensors are equal in {stored}, to the bit: those of training, rounded once")


def _say(line: str) -> None:
    print(printable(line))
