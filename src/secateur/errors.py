"""The errors a user can cause or meet; nothing here is for our own bugs (those are ``assert``).

Every message has three parts: what is wrong, what was received, and what to do.

    SecateurError
    |-- ConfigError        a recipe or an option that cannot be right
    |-- FamilyError        a model family that is unknown, or used outside what it can express
    |-- CorpusError        text that is missing, unreadable, or too little
    |-- TokenizerError     a tokenizer that cannot be rebuilt, or does not do what the plan needs
    |-- CheckpointError    weights that are missing, unsafe, broken, or not finite
    |-- PlanError          a budget that cannot be met, or a plan that does not fit its model
    |-- RecoveryError      a training that diverged or does not fit in memory
    |-- ProcessError       several processes of one run, of which one failed or is gone
    |-- ExportError        an artefact that could not be written, or that reloads differently
    |   `-- VerificationError   an artefact that an engine refuses, or runs as another model; nothing to mend
    `-- UnavailableError   something from outside (a hub, a package registry) that could not be had
"""

from __future__ import annotations


class SecateurError(Exception):
    """Base of all errors that secateur raises on purpose.

    Attributes:
        exit_code: of a command that ends with it; 2 is what the user can mend.
    """

    exit_code = 2


class ConfigError(SecateurError):
    """A recipe, option or name that cannot be right."""


class FamilyError(SecateurError):
    """A model family that is unknown, or asked for something its configuration cannot express."""


class CorpusError(SecateurError):
    """Text that is missing, unreadable, or too little for the job."""


class TokenizerError(SecateurError):
    """A tokenizer that cannot be rebuilt smaller, or that does not do what a plan needs of it."""


class CheckpointError(SecateurError):
    """Weights that are missing, unsafe to load, broken, or not finite."""


class PlanError(SecateurError):
    """A budget that cannot be met, or a plan that does not fit the model it is applied to."""


class RecoveryError(SecateurError):
    """A training that diverged, or that does not fit in memory."""


class ProcessError(SecateurError):
    """Several processes of one run, of which one failed, is gone, or does not see the same files."""


class ExportError(SecateurError):
    """An artefact that could not be written, or that differs after reloading."""


class VerificationError(ExportError):
    """An artefact that was written, but that an engine does not run, or runs as another model than was exported."""

    exit_code = 1


class UnavailableError(SecateurError):
    """Something from outside this machine that could not be had."""
