"""The one exception that means "the user can mend this": printed as a single line, without a traceback."""


class UserError(Exception):
    """Bad input. The message is one line: the flag or file, its value, what is wrong, and the mend."""
