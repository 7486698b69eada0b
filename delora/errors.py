"""The one exception whose message is written for people."""


class UserError(Exception):
    """Something that the person at the keyboard can mend: the message says what is wrong, where, and what to do.

    `delora-run` prints the message without a traceback and exits with `status`.
    """

    status = 2
