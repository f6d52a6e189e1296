"""The command: flags in, a conversation out."""

from __future__ import annotations

from collections.abc import Sequence

from verl.tools.command import CommandParser, add_template_flag, command_parser
from verl.tools.flags import number, whole
from verl.utils.console import nobody_reads
from verl.utils.refusals import USAGE, tell

DESCRIPTION = "Talk to a student: a checkpoint's actor folder as it is, or a Hugging Face folder."
EXAMPLE = """\
examples:
  %(prog)s checkpoints/gad/seqkd/global_step_200/actor --system "You are a helpful assistant."
  printf '%%s\\n' '你好' 'And in English?' | %(prog)s student --temperature 0

A line is a message. /reset begins a new conversation, /quit ends (Ctrl-D too), /help lists them; Ctrl-C ends an answer.
"""
MORE = """\
Answers are drawn as in training, from the whole distribution at --temperature; the model's own top_k, top_p and
repetition_penalty do not count. Answers go to standard output and everything else to standard error.

exit codes: 0 all messages were answered; 1 one could not be; 2 wrong usage, or there is no such model
"""


def build_parser() -> CommandParser:
    """The flags; names are those of the judge and of requests to endpoints."""
    parser = command_parser("chat", "MODEL", DESCRIPTION, EXAMPLE, MORE)
    add = parser.add_argument
    add("model", metavar="MODEL_DIR", help="actor folder, or merged")
    add("--system", metavar="TEXT", help="system message (default: what the chat template has by itself)")
    add("--temperature", type=number(0.0), default=0.8, metavar="T", help="0 is greedy (default: 0.8)")
    add("--max_tokens", type=whole(1), default=1024, metavar="N", help="of an answer (default: 1024)")
    add("--seed", type=whole(0), metavar="N", help="draw the same answers every time")
    add_template_flag(parser)
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: bfloat16 on cuda, float32 on cpu)")
    add("--trust_remote_code", action="store_true", help="run the model folder's own code")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    # Not above: help is wanted at once, and this reads torch.
    from verl.tools.chat.run import run

    try:
        return run(options)
    except BrokenPipeError:
        nobody_reads()
        return 0
    except (OSError, ValueError) as error:
        tell(error)
        return USAGE
