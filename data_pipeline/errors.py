"""Errors of the data pipeline."""


class DataError(ValueError):
    """The user's data is not as it should be; the message says what, where and the cure."""
