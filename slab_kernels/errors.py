"""Every exception that this library raises, under one base, each with its exit code.

Nothing here needs torch, so that a program can name an exception before it loads anything. Each
class also derives from the built-in exception that Python programmers expect for its kind.
"""

from __future__ import annotations

# The exit codes of `slab-kernels`. A kill by SIGINT or SIGTERM ends with 128 plus the signal's
# number.
DONE = 0
BUG = 1
BAD_INPUT = 2
BAD_FILE = 3
CANNOT_RUN = 4
NO_SPACE = 5
INTERRUPTED = 130
TERMINATED = 143


class SlabError(Exception):
    """The base of every exception of this library; `exit_code` is that of the command line."""

    exit_code = BAD_INPUT


class ArgumentError(SlabError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(SlabError, TypeError):
    """An argument has a type or dtype, or lies on a device, that cannot be used."""


class UnknownModuleError(SlabError, KeyError):
    """A module of that name is not in the model."""

    __str__ = Exception.__str__  # KeyError would put the sentence in quotes


class MissingPackageError(SlabError, ImportError):
    """An optional package is needed and cannot be imported."""

    exit_code = CANNOT_RUN


class UnsupportedError(SlabError, NotImplementedError):
    """An operation was asked for that packed layers do not have."""

    exit_code = CANNOT_RUN


class WeightlessError(SlabError, AttributeError):
    """The weight of a layer is asked for that keeps it in another form."""


# The packed format.


class FormatError(SlabError, ValueError):
    """A decomposition or packed weight breaks the format; the subclass names the defect."""


class PatternError(FormatError):
    """The kept positions are not 2:4, or signs are missing on pruned ones."""


class ValueTypeError(FormatError):
    """Unknown value type, factor type or group size."""


class RangeError(FormatError):
    """A number does not fit its stored type, or is NaN or infinite."""


class ShapeError(FormatError):
    """A tensor has the wrong shape, or a size is absurd."""


class DtypeError(FormatError):
    """A tensor has the wrong dtype."""


class MetadataError(FormatError):
    """A metadata nibble is not one of the six legal ones."""


class MissingTensorError(FormatError):
    """A tensor that the layout needs is absent."""


class UnknownTensorError(FormatError):
    """A tensor is present that the layout does not have."""


class PaddingError(FormatError):
    """Padding beyond in_features is not zero."""


class VersionError(FormatError):
    """The data were written by a newer format than this library reads."""

    exit_code = BAD_FILE


# Compressing a model.


class MethodError(SlabError, ValueError):
    """A method is unknown, or lacks an option, or a value of an option is not allowed."""


class CalibrationError(SlabError, ValueError):
    """Statistics are missing, of the wrong width, or built from NaN or infinite inputs."""


class BudgetError(SlabError, ValueError):
    """No choice of settings meets the budget of bits, or it contradicts other settings."""


class TeamError(SlabError, RuntimeError):
    """The processes of a run cannot find each other, or one of them has stopped."""

    exit_code = CANNOT_RUN


class ArchitectureError(SlabError, ValueError):
    """The model is not one that block-by-block compression can treat."""

    exit_code = BAD_FILE


class CheckpointError(SlabError, OSError):
    """A folder cannot be read or written as a checkpoint."""

    exit_code = BAD_FILE


class StdlibSourceError(SlabError, OSError):
    """The sources of Python's standard library are not on this machine."""

    exit_code = BAD_FILE


# Running a linear.


class BackendError(SlabError, RuntimeError):
    """A backend was asked for that cannot run this problem."""

    exit_code = CANNOT_RUN


class UnknownBackendError(BackendError):
    """A backend was asked for that does not exist on any machine."""

    exit_code = BAD_INPUT


class ConfigError(SlabError, ValueError):
    """A row or file of tile configurations is not usable; the message names it."""

    exit_code = BAD_FILE


class CudaError(SlabError, RuntimeError):
    """The CUDA driver refused a call; the message names the call, the error and what it was for."""

    exit_code = BUG


class CompileError(SlabError, RuntimeError):
    """NVRTC refused the source; the message holds its log."""

    exit_code = BUG


# Measuring and showing.


class BenchError(SlabError, RuntimeError):
    """A kernel failed its correctness gate, and nothing was timed."""

    exit_code = BUG


class PeerError(SlabError, RuntimeError):
    """Another library's result is not that of its own weight."""

    exit_code = BUG


class ReportError(SlabError, ValueError):
    """A path holds nothing that a report can show."""


class PlotsUnavailable(SlabError, RuntimeError):
    """matplotlib is not installed."""

    exit_code = CANNOT_RUN
