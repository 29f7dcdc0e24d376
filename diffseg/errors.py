"""The one exception that is meant for the user."""


class DiffsegError(Exception):
    """Bad input, said in one sentence that names the thing and the remedy."""
