"""Further programs, run as `python -m tools.NAME`. Only tests import them."""
