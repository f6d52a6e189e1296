"""The flags of collect, and what can be said of them without looking at data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from verl.data_tools.command_line import tool_parser
from verl.data_tools.writing import check_target
from verl.tools.chat_client import SHORTEST_KEY
from verl.tools.flags import json_object, number, whole

KEPT = ("refused", "cut")
REQUIRED = "PROMPTS... --out FILE --endpoint URL --model NAME"
DESCRIPTION = "The teacher's answers to prompts, as rows to train on. Run again, it goes on."
EPILOG = """\
PROMPTS are .txt (a prompt a line), .jsonl and .parquet files, or folders of datasets.
example: OPENAI_API_KEY=... %(prog)s prompts.txt --out data/teacher.parquet --max_tokens 512 \\
           --endpoint https://api.openai.com/v1 --model gpt-5-chat --prices 1.25 10 --budget 20 --dry_run
"""


def build_parser() -> argparse.ArgumentParser:
    """Flags named as in requests, where they go into these."""
    parser = tool_parser("collect", REQUIRED, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPTS", help=argparse.SUPPRESS)
    add("--out", required=True, metavar="FILE", help=".parquet or .jsonl, to train on; the rest goes to NAME.collect/")
    add("--endpoint", required=True, metavar="URL", help="up to and without /chat/completions")
    add("--model", required=True, metavar="NAME", help="the teacher's name there")
    add("--api_key_env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key (%(default)s)")
    add("--prompt_key", metavar="KEY", help="column of prompts: a text, or chat messages (the first known one)")
    add("--max_prompts", type=whole(1), metavar="N", help="only the first so many different ones")
    add("--on_bad_row", choices=("error", "skip"), default="error", help="rows that cannot be asked (error)")
    _add_asking(add)
    _add_limits(add)
    add("--reasoning", choices=("drop", "think"), default="drop", help="left out, or in front in <think> tags (drop)")
    add("--include", nargs="+", choices=KEPT, default=[], metavar="KIND", help="train on answers refused, cut as well")
    add("--system_in_rows", choices=("yes", "no"), default="yes", help="whether rows have the system prompt (yes)")
    add("--retry_failed", action="store_true", help="ask again what was refused for good, such as too long prompts")
    add("--dry_run", action="store_true", help="print the estimate and ask nothing")
    add("--overwrite", action="store_true", help="replace an --out that is not of collect")
    return parser


def _add_asking(add: Any) -> None:
    add("--n", type=whole(1), default=1, metavar="N", help="answers to each prompt, each a row (1)")
    add("--system_prompt", metavar="TEXT", help="TEXT, or @FILE; for prompts without a system message")
    add("--temperature", type=number(0), metavar="T", help="sampling; what is not given is left to the server")
    add("--top_p", type=number(0), metavar="P")
    add("--max_tokens", type=whole(1), metavar="N")
    add("--seed", type=whole(0), metavar="N", help="answer number i of a prompt gets N+i")
    add("--extra_body", type=json_object, default={}, metavar="JSON", help="into every request")
    add("--concurrency", type=whole(1), default=16, metavar="N", help="requests at once (16)")
    add("--timeout", type=number(1e-3), default=300.0, metavar="S", help="seconds for a whole answer (300)")
    add("--retries", type=whole(0), default=8, metavar="N", help="after 429, 5xx, timeouts, no JSON (8)")


def _add_limits(add: Any) -> None:
    add("--requests_per_minute", type=number(1e-3), metavar="N", help="as the teacher's account allows")
    add("--tokens_per_minute", type=number(1), metavar="N", help="of prompts and answers together")
    add("--prices", nargs=2, type=number(0), metavar="X", help="money per million tokens of prompts, and of answers")
    add("--budget", type=number(0), metavar="X", help="money for all of the log; it ends before more is spent")
    add("--max_tokens_total", type=whole(1), metavar="N", help="tokens for all of the log")
    add("--answer_tokens", type=whole(1), default=500, metavar="N", help="of an answer, to estimate with (500)")
    add("--tokenizer", metavar="DIR", help="counts prompts for the estimate (by their characters)")


def check_options(options: argparse.Namespace, log: Path) -> None:
    """ValueError for flags that cannot be, or not together. `log`: where the log is or will be."""
    check_target("--out", options.out, options.overwrite or log.is_file(), options.prompts)
    address = urlsplit(options.endpoint)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(
            f"--endpoint: expected a URL such as https://api.openai.com/v1, got {options.endpoint!r}; correct it"
        )
    key = os.environ.get(options.api_key_env, "").strip()
    if (
        address.username
        or address.password
        or (len(key) >= SHORTEST_KEY and key in " ".join(map(str, vars(options).values())))
    ):
        raise ValueError(
            f"expected the key in the environment alone ({options.api_key_env}), got one on the command line, which "
            "others can see; take it out, and get a new one"
        )
    if options.temperature == 0 and options.n > 1:
        raise ValueError(
            f"--n: expected 1 with --temperature 0, whose answers are all alike, got {options.n}; pass --n 1, or a "
            "temperature"
        )
    if options.budget is not None and options.prices is None:
        raise ValueError("--budget: expected --prices with it, got none; pass both")
    taken = sorted({"messages", "model", "stream", "n"} & options.extra_body.keys())
    if taken:
        raise ValueError(f"--extra_body: expected settings of one whole answer, got {', '.join(taken)}; leave them out")


def system_prompt(text: str | None) -> str | None:
    """The text, or that of the file it names."""
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--system_prompt: expected a text file, got {text[1:]} ({error}); correct it") from None
