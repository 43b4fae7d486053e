"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Something the user gave is wrong: the message says what, where, and what to do about it.

    Commands print the message without a traceback and exit with status 2; every project exception that a user
    can cause derives from it.
    """
