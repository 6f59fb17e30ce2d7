"""Errors that a person can act on: what was asked, what was found, what to do."""

from __future__ import annotations


class TinyFTError(Exception):
    """Base of every error that TinyFT raises on purpose; the command line prints just its text."""

    exit_code = 1


class InputError(TinyFTError, ValueError):
    """Bad input or usage: a file, a row, a model or a flag. Exit code 2."""

    exit_code = 2


class TransientError(InputError):
    """Nothing is wrong with what was asked: a full disk, a hub or registry that does not answer.
    The same again may work. Exit code 4."""

    exit_code = 4


class BudgetError(TinyFTError):
    """The job does not fit the memory, FLOPs or time at hand. Exit code 3."""

    exit_code = 3
