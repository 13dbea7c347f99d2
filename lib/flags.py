"""A command line from a table, and what its flags say of a run.

The table is {section: {flag: (default, what it may be, help)}}. What it may be: a type, a tuple
of choices, `bool` (a switch, --flag and --no-flag), or `number(...)`. Flags of sections called
"method: ..." belong to the method: its row may bring another default, and from the command line
they come as None unless given.
"""

import argparse
import re
from pathlib import Path

from lib.errors import BadInput, complain


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage in front
        complain(f"{self.prog}: {message} (--help lists the flags)")
        self.exit(2)


def number(kind, least, most=2**31):
    """An argparse type: an int or float between two bounds."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` refuses the text
    return parse


def make_parser(description, table, methods):
    """The parser of a table of flags. methods: {name: {flag: its own default}}, for the help."""
    parser = Parser(description=description)
    for section, flags in table.items():
        group = parser.add_argument_group(section)
        for flag, (default, kind, text) in flags.items():
            options = {"type": kind}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif isinstance(kind, tuple):
                options = {"choices": kind}
            elif flag == "method":
                options = {"choices": tuple(methods)}
            own = {method: row[flag] for method, row in methods.items() if flag in row}
            group.add_argument(
                _dashed(flag),
                default=None if section.startswith("method: ") else default,
                help=f"{text}{_defaults(default, own)}".replace("%", "%%"),
                **options,
            )
    return parser


def method_defaults(table):
    """{flag: default} of all flags that belong to the method."""
    sections = [flags for section, flags in table.items() if section.startswith("method: ")]
    return {flag: row[0] for flags in sections for flag, row in flags.items()}


def _defaults(default, own):
    """The default of a flag in words, and those of the methods that have another. A flag whose
    default is None has it explained in its help."""

    def shown(value):
        if isinstance(value, dict):  # {from so many shots on: value}
            return ", ".join(f"{v} from {n} shots" if n > 1 else str(v) for n, v in value.items())
        if isinstance(value, bool):
            return "on" if value else "off"
        return f"{value:g}" if isinstance(value, float) else value

    if default is None:
        return ""
    methods = "".join(f"; {method}: {shown(value)}" for method, value in own.items())
    return f" (default: {shown(default)}{methods})"


def complete(config, defaults, table, unread):
    """The configuration with a value for every flag: given, the method's default, or None where the
    method has no such flag.

    defaults: {flag: value} of the flags that the method has. unread: {flag: (function of the
    configuration that says whether nothing reads the flag, what the flag would need)}.
    Raises BadInput for a flag that was given in vain.
    """
    given = {flag for flag in method_defaults(table) if config[flag] is not None}
    for flag in sorted(given - defaults.keys()):
        raise BadInput(f"--method {config['method']} has no {_dashed(flag)}: leave it out")
    config = config | {k: v for k, v in defaults.items() if config.get(k) is None}
    for flag, (is_unread, needed) in unread.items():
        if flag in given and is_unread(config):
            raise BadInput(f"{_dashed(flag)} means nothing without {needed}")
    return config


def _dashed(flag):
    return f"--{flag.replace('_', '-')}"


def changed(config, defaults):
    """{flag: value} of the flags that differ from their defaults, sorted."""
    return {k: config[k] for k, v in sorted(defaults.items()) if config.get(k, v) != v}


def label(method, changed_flags):
    """A method's name with every flag that was changed: `mocoop-top_k1`."""
    parts = [f"{k}{_slug(v)}" if v is not True else k for k, v in changed_flags.items()]
    return "-".join([method, *parts])


def _slug(value):
    """A flag's value as part of a folder name; of a file, which has its full path, its name."""
    path = Path(str(value))
    return re.sub(r"[^\w.]+", "-", path.stem if path.is_absolute() else str(value))
