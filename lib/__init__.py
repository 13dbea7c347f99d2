"""What serves the scripts of the top level. Nothing in here imports one of them."""

import os
import tempfile

if os.path.expanduser("~") == "~":  # no home, as in some containers: caches need another place
    os.environ["HOME"] = tempfile.gettempdir()
