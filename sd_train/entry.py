"""What all entry points share: errors that users can mend end without a traceback, with an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sd_train.errors import UserError
from sd_train.terminal import plain_streams

if TYPE_CHECKING:
    from sd_train.config.options import RunConfig


def guarded(action: Callable[[], int]) -> int:
    """Run `action`; its exit code, or that of the error it ended in (130 after a second Ctrl-C)."""
    with plain_streams():
        try:
            return action()
        except UserError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return problem.exit_code
        except BrokenPipeError:
            # Whoever read our output (head, a pager) has gone; the interpreter's own flush at exit must not complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            # What is left is the interpreter's own end, which one more Ctrl-C would turn into a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("stopped", file=sys.stderr)
            return 130


def train_command(command: str, argv: Sequence[str]) -> int:
    """Read the options of `command` and train."""

    # Several OpenMP threads that spin while they wait become some ten times slower as soon as anything else runs on
    # the same processors, the preparation of our own batches included.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def action() -> int:
        config = load_config(command, argv)
        from sd_train.build import run

        return run(config)

    return guarded(action)


def load_config(command: str, argv: Sequence[str]) -> RunConfig:
    """The options of `command`; warnings about them go to standard error.

    Raises:
        UserError: with all problems.
    """
    # torch takes seconds to import: bad options and --help must not wait for it.
    from sd_train.config.parser import load_run_config
    from sd_train.optim.optimizers import check_optimizer
    from sd_train.optim.schedules import check_schedule

    # The libraries speak for themselves; what our modules log is for the user.
    logging.addLevelName(logging.WARNING, "warning")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    # It tells of kernels that only its 4-bit layers would use, whenever another library imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    loaded = load_run_config(command, argv, {"optimizer_type": check_optimizer, "lr_scheduler": check_schedule})
    # Of several processes that a launcher started only the first one speaks.
    for warning in loaded.warnings if os.environ.get("RANK", "0") == "0" else ():
        print(f"warning: {warning}", file=sys.stderr)
    return loaded.config
