"""What a section of the configuration says of a value that cannot be.

A section knows its fields only: its messages start with the field's name, and the loader puts the path before it.
"""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot be: the message names the key, the value found, what is wanted and the remedy."""


def at_least(section: object, least: float, *names: str) -> None:
    """Each named field is at least `least`; one that is None is left alone."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}: wanted at least {least}")


def above(section: object, bound: float, *names: str) -> None:
    """Each named field is more than `bound`; one that is None is left alone."""
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= bound:
            raise ConfigError(f"{name} is {value}: wanted more than {bound}")


def at_most(section: object, most: float, *names: str) -> None:
    """Each named field is at most `most`."""
    for name in names:
        value = getattr(section, name)
        if value > most:
            raise ConfigError(f"{name} is {value}: wanted at most {most}")
