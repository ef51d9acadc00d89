"""Errors of the data pipeline."""


class DataError(ValueError):
    """Something in the user's data is not as it should be; the message says what, where and the cure."""
