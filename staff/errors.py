"""The exception for bad input."""


class UserError(ValueError):
    """Bad input. The message is one sentence that names the field, the value and the fix.

    The application prints this sentence without a traceback and exits with a non-zero status. Results that were
    already computed stay in the store.
    """
