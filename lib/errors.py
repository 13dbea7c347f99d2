"""Bad input: one line that names it and says the way out, exit status 2, no traceback."""

import difflib
import os
import sys

import torch.distributed as dist


class BadInput(ValueError):
    """Something the user gave cannot be used. The message is one line: what, and the way out."""


def nearest(word, words):
    """A hint for a mistyped word: " (did you mean 'x'?)" or nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def complain(message):
    """Prints an error once: what all processes of `torchrun` find, the first one says. Before they
    have joined, each speaks for itself, by its number, as it may be the only one to have failed."""
    number = os.environ.get("RANK", "0")
    if number == "0":
        print(message, file=sys.stderr)
    elif not dist.is_initialized():
        print(f"process {number}: {message}", file=sys.stderr)


def exit_on_bad_input(main):
    """Runs a command line: bad input ends it with one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # file names may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (BadInput, OSError) as error:  # OSError: no permission, a full disk, a name too long
        complain(error)
        sys.exit(2)
    except KeyboardInterrupt:
        complain("stopped")
        sys.exit(130)
