"""A name alone: there are no image transforms here."""

from . import InterpolationMode as InterpolationMode
