"""Programs besides the scripts, run by `python -m tools.NAME`. Only tests import them."""
