"""The command line: ``python -m infogrowth VERB``, each verb a module of infogrowth.commands.

A command module has ``Config`` (a frozen dataclass of options) and ``run(config)``; the first line
of its docstring is its help. The programs in ``scripts/`` and ``train/`` go through the same entry,
:func:`run_script`.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from infogrowth import __version__
from infogrowth.commands import SHARED_WORK
from infogrowth.config import add_flags, load_config
from infogrowth.errors import exit_status, sentence
from infogrowth.remote import retry_summary

VERBS = (
    *("run", "pack", "embed", "recaption", "score", "grow", "select"),
    *("report", "explain", "sweep", "compare", "convert"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for bad input, reported in one sentence)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser(arguments).parse_args(arguments)
    if args.verb not in SHARED_WORK and not _on_rank_zero():
        return 0
    command = import_module(f"infogrowth.commands.{args.verb}")
    return _run(command.Config, command.run, args)


def run_script(
    config_class: type, run: Callable[[Any], int | None], arguments: Sequence[str] | None = None
) -> int:
    """What a program in scripts/ or train/ does: its flags and --config in, its exit status out.

    ``run``'s own docstring becomes the program's ``--help`` text.
    """
    parser = argparse.ArgumentParser(description=run.__doc__)
    return _run(config_class, run, add_flags(parser, config_class).parse_args(arguments))


def _run(config_class: type, run: Callable[[Any], int | None], args: argparse.Namespace) -> int:
    # Messages go to stderr, from rank 0 only unless they are warnings.
    level = logging.WARNING if args.quiet or not _on_rank_zero() else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", force=True)
    for library in ("httpx", "aiobotocore", "botocore", "werkzeug"):  # chatty at INFO
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        status = run(load_config(config_class, args.config, vars(args))) or 0
        if again := retry_summary():
            logging.getLogger(__name__).warning("%s", again)
        return status
    except BrokenPipeError:  # `infogrowth explain … | head` is not an error
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the process ends
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if sentence(error) is None and not isinstance(error, KeyboardInterrupt):
            raise
        return exit_status(error)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the verb that was asked for is imported, all of them for a bare --help."""
    parser = argparse.ArgumentParser(
        prog="infogrowth", description="Grow clean, diverse image–caption datasets."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    asked = [verb for verb in VERBS if verb in arguments[:1]] or VERBS
    for verb in asked:
        command = import_module(f"infogrowth.commands.{verb}")
        _, _, summary = (command.__doc__ or "").partition("\n")[0].rstrip(".").partition(": ")
        sub = verbs.add_parser(verb, help=summary, description=summary)
        add_flags(sub, command.Config)
    return parser


def _on_rank_zero() -> bool:
    """As distributed.is_main, without importing torch for it."""
    return os.environ.get("RANK", "0") == "0"
