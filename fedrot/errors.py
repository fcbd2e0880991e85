"""The one exception that bad input raises."""


class UpdateError(ValueError):
    """An update, reference, weight or folder that cannot be aggregated; the message names it and says what to do."""
