"""What is run beside the scripts: `python -m tools.NAME`. Only tests import it."""
