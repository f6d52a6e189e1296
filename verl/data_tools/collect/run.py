"""One run of collect, from files of prompts to files of answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from verl.data_tools.collect.asking import Collecting, Ending
from verl.data_tools.collect.cost import Account, Prices, counter, estimate
from verl.data_tools.collect.log import LOG, AnswerLog, only_one_in
from verl.data_tools.collect.options import check_options, system_prompt
from verl.data_tools.collect.output import Wanted, summarise, write_answers, write_summary
from verl.data_tools.collect.prompts import Asking, Prompt, Prompts, Request, read_prompts
from verl.data_tools.command_line import DONE, FOUND
from verl.data_tools.writing import check_columns
from verl.tools.chat_client import ChatClient, Pace
from verl.utils.console import printable, say
from verl.utils.signals import RunSignals

INTERRUPTED = "no more is asked; waiting for the answers under way, which are kept (a second signal ends it at once)"


def run(options: argparse.Namespace, signals: RunSignals) -> int:
    """Collect what is missing and write what there is; returns the exit code.

    Raises:
        OSError, ValueError: a user's error, as a sentence.
        EndedBySignal: at a second signal; after the first, what came is written as at any end.
    """
    out = Path(options.out).expanduser()
    folder = out.with_name(f"{out.stem}.collect")
    check_options(options, folder / LOG)
    asking, count, account = _asking(options), counter(options.tokenizer), _account(options)
    prompts = read_prompts(options.prompts, options.prompt_key, options.on_bad_row)
    check_columns(out, [prompt.columns for prompt in prompts.prompts])
    asked = _asked(asking, prompts.prompts[: options.max_prompts], options.n)
    if options.dry_run and not (folder / LOG).is_file():
        say(estimate([request for _, request in asked], count, account))
        return DONE
    with only_one_in(folder), closing(AnswerLog(folder, asking.settings)) as log:
        _take_in(log, account, options.retry_failed)
        missing = [request for _, request in asked if request.key not in log]
        if missing:
            print(printable(estimate(missing, count, account)), file=sys.stderr)
        if options.dry_run:
            return DONE
        if missing:
            log.make_room(min(options.concurrency, len(missing)))
        collecting = Collecting(_client(options), log, account, count, options.concurrency, signals)
        with signals.at_step_ends(True, INTERRUPTED):
            ending = collecting.run(missing)
        return _finish(options, collecting, ending, prompts, asked)


def _finish(
    options: argparse.Namespace,
    collecting: Collecting,
    ending: Ending,
    prompts: Prompts,
    asked: list[tuple[Prompt, Request]],
) -> int:
    """Write and say what there is; returns the exit code."""
    log, tally, out = collecting.log, collecting.tally, Path(options.out).expanduser()
    if ending.why == "full disk":
        lost = f", but for {tally.lost:,} that found no room" if tally.lost else ""
        raise OSError(
            f"{ending.said}; all answers that came are in {log.path}{lost}; make room and run the same command again"
        )
    wanted = Wanted(options.include, options.reasoning, options.system_in_rows == "yes")
    try:
        written = write_answers(out, log.path.parent, log, asked, wanted)
        text, record = summarise(prompts, len(asked), written, tally, collecting.account, ending, log)
        write_summary(log.path.with_name("summary.json"), record)
    except OSError as error:
        raise OSError(
            f"{out}: expected to write it, got {error}; all answers are in {log.path}: mend that and run the same "
            "command again"
        ) from None
    say(text)
    if ending.why == "endpoint":
        raise ValueError(ending.said)
    return FOUND if tally.unanswered else DONE


def _asked(asking: Asking, prompts: Sequence[Prompt], n: int) -> list[tuple[Prompt, Request]]:
    """All requests, each once: the system prompt may have made two prompts alike."""
    requests = ((prompt, asking.request(prompt, number)) for number in range(n) for prompt in prompts)
    found: dict[str, tuple[Prompt, Request]] = {}
    for prompt, request in requests:
        found.setdefault(request.key, (prompt, request))
    return list(found.values())


def _asking(options: argparse.Namespace) -> Asking:
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "max_tokens")}
    given = {name: value for name, value in sampling.items() if value is not None}
    return Asking(options.model, system_prompt(options.system_prompt), given | options.extra_body, options.seed)


def _account(options: argparse.Namespace) -> Account:
    return Account(
        Prices(*options.prices) if options.prices else None,
        options.budget,
        options.max_tokens_total,
        _asking(options).longest_answer,
        options.answer_tokens,
    )


def _client(options: argparse.Namespace) -> ChatClient:
    return ChatClient(
        options.endpoint,
        options.timeout,
        options.retries,
        connections=options.concurrency,
        key_name=options.api_key_env,
        retries_malformed=True,
        pace=Pace(options.requests_per_minute, options.tokens_per_minute),
    )


def _take_in(log: AnswerLog, account: Account, retry_failed: bool) -> None:
    """Count what the log has; forget what is to be asked again."""
    failed = []
    for record in log.records():
        if "error" not in record:
            account.add(*record["usage"].values())
        elif not record["error"]["filtered"]:
            failed.append(record["key"])
    if retry_failed:
        log.forget(failed)
