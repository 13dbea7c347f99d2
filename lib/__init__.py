"""Support code for the top-level scripts. Nothing in here imports any of them."""

import os
import tempfile

if os.path.expanduser("~") == "~":  # no home, as in some containers: caches need another place
    os.environ["HOME"] = tempfile.gettempdir()
