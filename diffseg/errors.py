"""The exceptions that are meant for the user."""


class DiffsegError(Exception):
    """Bad input, said in one sentence that names the thing and the remedy."""


class Incomplete(DiffsegError):
    """Some of the work is another process's share and not there yet; what there is stays."""
