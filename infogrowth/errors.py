"""The one error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input, told in one sentence that names the file, key or sample and what to do.

    Commands print it as ``error: …`` and exit with status 2; it never carries a traceback.
    """
