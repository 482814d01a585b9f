"""Runs commands in forked children that can be killed (SIGKILL) at a chosen moment.

A fresh interpreter would spend seconds on importing torch for every run; this one imports it once
and forks. It reads one JSON object per line and answers one per line:

    {"args": [...], "kill_at_step": n}   SIGKILL at the n-th durable step: before it, or, when
                                         "after_step" is true, right after it
    {"args": [...], "kill_after": s}     SIGKILL after that many seconds, wherever it is then
    {"args": [...], "file_limit": bytes} no file may grow beyond this size (as on a full disk)

Steps are fsync and rename, which is where what is on disk changes. The answer has the exit
status (negative: the signal), the steps made, the seconds it took, and what it printed.
"""

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time

import pandas  # noqa: F401 - pyarrow would import it in every child

import infogrowth.commands.grow_session  # noqa: F401 - torch, before the first fork
from infogrowth.cli import main


def watch_steps(request: dict, steps_file: str) -> None:
    """Count the durable steps of this process, and die at the chosen one."""
    made = 0

    def watched(step):
        def call(*arguments, **options):
            nonlocal made
            made += 1
            due = made == request.get("kill_at_step")
            if due and not request.get("after_step"):
                os.kill(os.getpid(), signal.SIGKILL)
            result = step(*arguments, **options)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
            with open(steps_file, "w") as file:
                file.write(str(made))
            return result

        return call

    os.fsync, os.replace = watched(os.fsync), watched(os.replace)


def child(request: dict, output: int, steps_file: str) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if limit := request.get("file_limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    watch_steps(request, steps_file)
    status = 70
    try:
        status = main(request["args"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(request: dict) -> dict:
    started = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.NamedTemporaryFile("r") as steps:
        process = os.fork()
        if process == 0:
            child(request, output.fileno(), steps.name)
        descriptor = os.pidfd_open(process)
        ended, _, _ = select.select([descriptor], [], [], request.get("kill_after"))
        if not ended:
            os.kill(process, signal.SIGKILL)
        os.close(descriptor)
        _, status = os.waitpid(process, 0)
        output.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(status),
            "steps": int(steps.read() or 0),
            "seconds": time.monotonic() - started,
            "printed": output.read().decode(errors="replace"),
        }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
