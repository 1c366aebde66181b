"""A name alone: there are no image transforms here."""

from torchvision.transforms import InterpolationMode as InterpolationMode
