"""The exception for bad input, and what other exceptions say."""


class UserError(ValueError):
    """Bad input. The message is one sentence that names the field, the value and the fix.

    The application prints this sentence without a traceback and exits with a non-zero status. Results that were
    already computed stay in the store.
    """


def in_one_line(error: BaseException) -> str:
    """The message of an error without line breaks; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
