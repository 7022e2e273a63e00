"""Errors that the user can act on."""


class ConfigError(ValueError):
    """Something the user must change: the message holds the value, the rule and the remedy."""


class MeshError(ConfigError):
    """A size that does not divide over the axes of a mesh."""
