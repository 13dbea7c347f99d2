"""How bad input is reported: one line on standard error, exit status 2, no traceback."""

import difflib
import os
import re
import signal
import sys

from lib import start


class BadInput(ValueError):
    """The user's input cannot be used. The message is one line: the problem, and what to do."""


CONTROLS = {c: repr(chr(c))[1:-1] for c in (*range(32), *range(127, 160), 0x2028, 0x2029)}


def shown(text):
    """A text on one line, in which control characters are visible: names of files may hold some."""
    return str(text).translate(CONTROLS)


def say(text):
    """Prints a line that may hold names."""
    print(shown(text), flush=True)


def warn(text):
    print(shown(text), file=sys.stderr)


def exit_on_bad_input(main, *kinds):
    """Runs a command line. Bad input prints one line and exits with status 2, without a traceback.

    kinds: exceptions that count as bad input, besides BadInput, operating-system errors (no
    permission, a full disk, a name that is too long) and running out of memory.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, but progress bars write there
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):  # a terminal may not show all names
            getattr(sys, name).reconfigure(errors="backslashreplace")
    os.environ.pop("MPLBACKEND", None)  # from a notebook: matplotlib fails if it is missing
    start.importing = False
    try:
        main()
    except BrokenPipeError:  # the reader of the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (BadInput, OSError, *kinds) as error:
        for line in error.args if isinstance(error, BadInput) else [error]:
            warn(line)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        warn("out of memory: try a smaller --chunk or --batch-size, or another --device")
        sys.exit(2)
    except KeyboardInterrupt as error:
        warn("stopped")
        sys.exit(128 + (error.args[0] if error.args else signal.SIGINT))


def one_line(error):
    """What an exception says, on one line, not longer than what a reader would read."""
    return " ".join((str(error) or repr(error)).strip("<>").split())[:200]


def out_of_memory(error):
    """Whether an exception means that a GPU or the computer has run out of memory. torch has an
    exception class for one case; the others only show in the message."""
    words = "out of memory|not enough memory|allocate memory|bad_alloc|ALLOC_FAILED"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def finite(x, what):
    """Returns the tensor x. Raises BadInput unless it is finite and not all zeros."""
    if not (x.isfinite().all() and x.any()):
        raise BadInput(f"{what} should be finite and not 0: are the weights damaged?")
    return x


def nearest(word, words):
    """A hint for a mistyped word: " (did you mean 'x'?)" or nothing."""
    words = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return f" (did you mean {words[close[0]]!r}?)" if close else ""
