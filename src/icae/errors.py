"""The one exception that users are meant to read.

Whatever a user can cause and mend (a bad file, a bad number, a foreign checkpoint) is raised as `ICAEError` with a message of
one line that names the field and the mend. The command line prints it and exits with code 2; anything else is a defect of ours
and keeps its traceback.
"""


class ICAEError(Exception):
    """Something in the input, a file or a setting is wrong, and the message says how to mend it."""


class StorageError(ICAEError):
    """What is kept, or where it is kept, is damaged, missing or full: who owns it can mend that, a server's clients cannot."""


def reason(error: BaseException) -> str:
    """Return what another library's error says, in one line of 200 characters at most; where it says nothing, what it is."""
    return " ".join(str(error).split())[:200] or type(error).__name__
