"""A node of a run, head or worker, from the cluster's token to the exit code."""

from __future__ import annotations

import argparse
import logging
import os

from verl.launch import cluster_token
from verl.launch.board import UNANSWERED, WrongToken
from verl.launch.head import LaunchFault, run_head
from verl.launch.orders import Orders
from verl.launch.worker import run_worker
from verl.utils.console import printable
from verl.utils.run_log import log_to_terminal
from verl.utils.signals import EndedBySignal

logger = logging.getLogger(__name__)

FAILED = 1


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: the run's, 128 and the number of a signal, or 1 where the nodes did not come together."""
    log_to_terminal()
    # Another cluster's.
    os.environ.pop("RAY_ADDRESS", None)
    orders, made = Orders(), None
    with orders.noted():
        try:
            made = cluster_token.take(options.token_file, 0 if options.head else options.wait, orders.stop_if_any)
            return run_head(options, orders) if options.head else run_worker(options, orders)
        except (LaunchFault, cluster_token.TokenFault, WrongToken) as fault:
            logger.error("%s", printable(str(fault)))
            return FAILED
        except UNANSWERED as error:
            logger.error("the head's Ray does not answer: %s", printable(str(error)))
            return FAILED
        except EndedBySignal as end:
            return end.exit_code
        finally:
            cluster_token.remove(made)
