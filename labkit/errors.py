"""The exception whose message is meant for the person at the keyboard. How it is shown is decided in __main__.py."""


class UserError(Exception):
    """Something that only the user can put right; the message is one sentence that names the fix."""
