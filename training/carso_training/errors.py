"""The errors that end a command of `carso-train` with one line. They import nothing of ours."""

from __future__ import annotations


class TrainingError(Exception):
    """Work that cannot go on. The message names what is wrong, with the value or the file, and how to mend it."""


class DataUnavailableError(TrainingError):
    """A data file was found nowhere, or what was found is not the canonical file."""


class RecipeError(TrainingError):
    """A recipe that does not exist or is not valid."""


class RunError(TrainingError):
    """A run folder that does not fit the recipe, is not finished, or holds a damaged file."""


class DeviceUnavailableError(TrainingError):
    """The accelerator that was asked for is not there."""
