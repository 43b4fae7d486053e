"""The program every rank runs.

    deepspeed [--hostfile HOSTS] --module bst_dist.train RECIPE [section.field=value ...] [--run-dir DIR] [--resume]

`bst train` starts it on this machine's ranks.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from bst_base.arguments import at_least
from bst_base.errors import StorageError, UserError
from bst_base.files import FULL
from bst_base.host import allow_open_files
from bst_base.importing import uncollected
from bst_base.stopping import Stopped
from bst_dist.faults import signals, status
from bst_dist.faults.disks import Disks
from bst_dist.faults.ending import end
from bst_dist.faults.error_report import lost_peer, report_once
from bst_dist.faults.output import IgnoreWriteErrors

if TYPE_CHECKING:
    from bst_dist.train.start.request import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `bst train` shares with this program."""
    parser.add_argument(
        "recipe",
        type=Path,
        metavar="RECIPE",
        help="the run's YAML file, the name of one of launch/recipes/, or the directory of a run, with --resume",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="where the run writes (default: runs/<name>)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest valid checkpoint, if there is one"
    )
    parser.add_argument(
        "--from-zero",
        action="store_true",
        help=(
            "start at step 0 even if the run directory has steps but no checkpoint; its metrics move to "
            "metrics.dropped.jsonl"
        ),
    )
    parser.add_argument(
        "--replan-schedule",
        action="store_true",
        help=(
            "with --resume: apply a changed train.steps or schedule.* from the newest checkpoint on, even if the new "
            "schedule has other learning rates for the steps already taken"
        ),
    )
    parser.add_argument(
        "--until", type=at_least(1), metavar="STEP", help="stop with a checkpoint after STEP steps in total"
    )


def request(args: argparse.Namespace) -> Request:
    """Return the parsed arguments as a Request.

    Raises UserError when the recipe is a run's directory and --resume is missing.
    """
    # Imported here: importing torch takes seconds, in which no signal would be handled.
    from bst_dist.train.start.request import Request, of_run

    asked = Request(
        recipe=args.recipe,
        overrides=args.overrides,
        run_dir=args.run_dir,
        resume=args.resume,
        until=args.until,
        from_zero=args.from_zero,
        replan=args.replan_schedule,
    )
    return of_run(asked) if args.recipe.is_dir() else asked


def main(argv: list[str] | None = None) -> int:
    """Run one rank and return its exit status."""
    notice = signals.listen()
    allow_open_files()  # rank 0 holds several connections of every rank
    # A closed terminal must not cost the checkpoint.
    sys.stdout, sys.stderr = IgnoreWriteErrors(sys.stdout), IgnoreWriteErrors(sys.stderr)
    parser = argparse.ArgumentParser(
        prog="bst_dist.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by the launcher; LOCAL_RANK has the same value
    args = parser.parse_intermixed_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    threading.excepthook = _tell_of_thread
    _name_the_rank()
    try:
        with uncollected():
            from bst_dist.parallel.ranks import Ranks
            from bst_dist.parallel.rendezvous import GatheringError
            from bst_dist.train.run import train
            from bst_dist.train.start.request import load

        asked = request(args)
        disks = Disks()
        disks.add(written=[args.run_dir] if args.run_dir else [])
        signals.end_when_stuck(notice, disks)
        try:
            with notice.ending_at_once():
                ranks = Ranks(load(asked).watchdog.exchange_limit_s)
        except GatheringError as error:
            report_once(str(error), notice)
            return status.FAILED
        ended = train(asked, ranks, notice, disks)
        ranks.leave()
        return ended
    except Exception as error:
        return _reported(error, notice)


def _reported(error: Exception, notice: signals.Notice) -> int:
    """Print what ended this rank, once for all ranks, and return its exit status."""
    if isinstance(error, Stopped):
        by = notice.signal.name if notice.signal else "a signal to another rank"
        report_once(f"{error} by {by}, before the next step; start again with --resume", notice)
        return error.exit_status
    if isinstance(error, UserError):
        report_once(str(error), notice)
        return error.exit_status
    # Without a file and unless a disk is full, the cause is a socket or a process.
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        report_once(str(StorageError.of(error, error.filename or "a file of the run", doing="read or write")), notice)
        return status.UNREADABLE
    report_once(traceback.format_exc(), notice, lost_peer(error))
    return status.FAILED


def _name_the_rank() -> None:
    """Put the rank before the loader's warnings: several ranks may find the same damaged block, in different rows."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"rank {os.environ.get('RANK', 0)}: %(message)s"))
        logging.getLogger("data_pipeline").addHandler(handler)


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, except for an OSError of TensorBoard's thread: the main thread reports that."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


if __name__ == "__main__":
    exit_status = main()
    sys.stdout.flush()
    # Not sys.exit: after an error other ranks may be waiting in a collective, and destroying the group would wait too.
    end(exit_status)
