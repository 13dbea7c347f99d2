"""Command lines: a table of settings, and the parser built from it.

A table is {section: {name: (default, allowed, help)}}. `allowed` is None for any text, a number for
the minimum, the choices, or a function that returns choices defined later. A default of True or
False makes a switch.
"""

import argparse
import os

from lib.errors import BadInput


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows all defaults except None, which the help text explains."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises BadInput for mistakes in a command line."""

    def __init__(self, description, **options):
        """description: a docstring; its first line is shown. None if Python drops docstrings."""
        first_line = (description or "").split("\n")[0]
        super().__init__(
            description=first_line, formatter_class=HelpFormatter, allow_abbrev=False, **options
        )

    def parse_args(self, arguments=None):
        """As argparse's, but `~` means home in every path, also in `--data=~/data`."""
        args = super().parse_args(arguments)
        for name, value in vars(args).items():
            if str(value)[:1] == "~":
                setattr(args, name, type(value)(os.path.expanduser(value)))
        return args

    def error(self, message):
        raise BadInput(f"{message} (--help lists the settings)")


def at_least(kind, least):
    """An argparse type: an int or float that is not below `least`."""

    def parse(text):
        value = kind(text)
        if not least <= value < 2**31:  # NaN fails, too
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it if `kind` rejects the text
    return parse


def dashed(name):
    return f"--{name.replace('_', '-')}"


def defaults_of(*sections):
    return {name: row[0] for rows in sections for name, row in rows.items()}


def given_settings(table, description, arguments=None, defaults=dict):
    """{setting: value} of what a command line gives, by a table of settings. arguments: a list of
    words, or None for the program's own. `--help` prints the settings and exits. defaults: a
    function of what is given that returns the defaults that follow from it. Raises BadInput."""
    parser = Parser(description, add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    for section, rows in table.items():
        add = parser.add_argument_group(section).add_argument
        for name, (default, allowed, text) in rows.items():
            options = {}
            if isinstance(default, bool):
                options["action"] = argparse.BooleanOptionalAction
            elif isinstance(allowed, (int, float)):
                options["type"] = at_least(type(allowed if default is None else default), allowed)
            elif allowed:
                options["choices"] = allowed() if callable(allowed) else allowed
            add(dashed(name), help=text, **options)
    given = vars(parser.parse_args(arguments))
    if given.pop("help", False):
        parser.set_defaults(**defaults_of(*table.values()) | defaults(given))
        parser.print_help()
        parser.exit()
    return given


def as_words(given):
    """The command line that gives these settings, as a list of words."""
    words = []
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(dashed(name if value else f"no_{name}"))
        elif value is not None:
            words += [dashed(name), str(value)]
    return words
