"""Every exception of Triode, named by who can do something about it.

    ValueError                     the call is wrong: it names the argument, the value and the constraint
    TriodeError
    ├── EngineBusy                 the queue is full: try again later
    ├── EngineClosed               the engine has ended: open another
    ├── EngineFault                a bug or a device fault ended the engine; `__cause__` tells which
    ├── RequestFailed              one request failed while it ran; the engine and its neighbours go on
    │   └── RequestUnsatisfiable   because it asks for what cannot be had
    ├── ServerUnreachable          a client's server does not answer, or its socket was lost
    ├── ProtocolError              a client's server says what no server of its kind would
    ├── AccessDenied               a client's key is missing or wrong
    ├── InsufficientMemory         weights or KV cache do not fit; the message says what to lower
    ├── MissingExtra               an optional dependency is not installed; the message names the extra
    └── ModelError                 the model's files are at fault
        ├── ModelNotFound          there is no such file, folder, alias or repository
        ├── CorruptModel           a file is truncated, or a tensor is missing or has the wrong shape
        └── UnsupportedModel       a feature that Triode does not have, by name

`triode.errors` imports nothing and may be imported from anywhere.
"""


class TriodeError(Exception):
    """Base of the errors that are not plain `ValueError`s."""


class EngineBusy(TriodeError):
    """The engine has as many unfinished requests, or guides of such, as it accepts; nothing was queued."""


class EngineClosed(TriodeError):
    """The engine's `async with` block has been left; it takes no more calls."""


class EngineFault(TriodeError):
    """A bug or a device fault ended the engine. `__cause__` is the original exception."""


class RequestFailed(TriodeError):
    """This request failed while it ran. Other requests are not affected."""


class RequestUnsatisfiable(RequestFailed):
    """It asks for what cannot be had: its guide takes more work than one may, or its parameters leave no token."""


class ServerUnreachable(TriodeError):
    """A client's server does not answer, or the socket was lost and with it what was unfinished."""


class ProtocolError(TriodeError):
    """A client's server sent what is no message of the bridge: it is of another version, or something else."""


class AccessDenied(TriodeError):
    """A client's server does not serve this key, or this origin."""


class InsufficientMemory(TriodeError):
    """The weights or the KV cache do not fit into the memory there is."""


class MissingExtra(TriodeError):
    """A feature needs an optional dependency that is not installed."""


class ModelError(TriodeError):
    """A model cannot be loaded."""


class ModelNotFound(ModelError):
    """No file, folder, alias or repository has this name."""


class CorruptModel(ModelError):
    """A file is truncated or unreadable, or a tensor is missing or has the wrong shape."""


class UnsupportedModel(ModelError):
    """The checkpoint uses a feature that Triode does not support."""
