"""The one exception that is meant for the user's eyes."""


class UserError(ValueError):
    """Bad input, said in one sentence that names the field, the value and the mend.

    The application prints the sentence alone and exits with a non-zero status; nothing that was
    already computed is lost.
    """
