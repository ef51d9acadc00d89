"""Errors of the data pipeline."""


class DataError(ValueError):
    """The user's data is not as it should be; the message says what, where and the cure."""


class StorageUnavailable(DataError):
    """A whole store cannot be reached, which is no fault of the sample that was to be read.

    Never skipped: that would replace one sample after the other for as long as the store is down.
    """
