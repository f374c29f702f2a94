"""The one exception that reaches people: what is wrong, where, and what to do about it."""


class DydiffError(Exception):
    """A mistake in the input or on the machine, told in one paragraph that names the culprit and the remedy.

    Entry points print the message and exit with status 1; anything else that escapes is a defect of dydiff.
    """


class Interrupted(DydiffError):
    """The work was stopped by a signal after saving its state."""


class NotFinite(DydiffError):
    """A loss, a weight or a rollout holds a NaN or an infinity: training stops, and what was saved before it stays."""


class NotForNetwork(DydiffError):
    """A backend that this machine has cannot compute this network."""
