"""The verbs of the command line, each a module with its ``Config`` and ``run``."""

# Under the launcher all ranks take part; rank 0 does the others alone.
SHARED_WORK = ("run", "embed", "recaption", "score", "grow")
