"""The table of flags: what the command line says, what a method changes, what is refused."""

import pytest
from conftest import parse

import train
from lib import flags
from lib.errors import BadInput

TABLE = {
    "task": {"shots": (16, flags.number(int, 1), "images"), "method": ("plain", str, "which")},
    "method: size": {
        "size": (2.0, flags.number(float, 0), "how large"),
        "wide": (False, bool, "wider"),
        "kind": ("round", ("round", "flat"), "what kind"),
    },
}
METHODS = {"plain": {}, "large": {"size": 5.0, "wide": True, "kind": {1: "round", 4: "flat"}}}


def help_of(table, methods):
    words = flags.make_parser("", table, methods).format_help().split()
    return " ".join(words)


def test_help_shows_every_default_and_those_of_each_method():
    text = help_of(TABLE, METHODS)
    assert "images (default: 16)" in text
    assert "how large (default: 2; large: 5)" in text
    assert "wider (default: off; large: on)" in text
    assert "what kind (default: round; large: round, flat from 4 shots)" in text


def test_the_help_of_train_shows_a_default_for_every_flag():
    actions = flags.make_parser("", train.FLAGS, train.METHODS)._actions
    described = {action.dest: action.help for action in actions if action.dest != "help"}
    assert described.keys() == {flag for section in train.FLAGS.values() for flag in section}
    for flag, text in described.items():
        assert "(default: " in text, flag


@pytest.mark.parametrize("method", train.METHODS)
def test_a_method_changes_known_flags_only(method):
    assert train.METHODS[method].keys() <= {"classifier", *flags.method_defaults(train.FLAGS)}


def test_a_flag_that_is_given_wins_over_the_methods_own():
    defaults = {"size": 5.0, "wide": True, "kind": "flat"}
    config = {"method": "large", "shots": 4, "size": 3.0, "wide": None, "kind": None}
    complete = flags.complete(config, defaults, TABLE, {})
    assert complete == config | {"wide": True, "kind": "flat"}
    assert flags.changed(complete, defaults) == {"size": 3.0}
    assert flags.label("large", {"size": 3.0}) == "large-size3.0"
    assert flags.label("large", {"kind": "a b", "wide": False}) == "large-kinda-b-wideFalse"
    gone = "/home/me/my groups.txt"  # a run is called the same when its file is no longer there
    assert flags.label("plain", {"groups": gone}) == "plain-groupsmy-groups"


def test_a_flag_that_the_method_lacks_or_nobody_reads_is_refused():
    config = {"method": "plain", "shots": 4, "size": None, "wide": None, "kind": "flat"}
    with pytest.raises(BadInput, match="--method plain has no --kind: leave it out"):
        flags.complete(config, {"size": 2.0}, TABLE, {})
    unread = {"kind": (lambda c: c["size"] < 3, "a larger --size")}
    with pytest.raises(BadInput, match="--kind means nothing without a larger --size"):
        flags.complete(config, flags.method_defaults(TABLE), TABLE, unread)


def test_every_flag_of_train_is_in_the_configuration():
    config = train.resolve(parse([]))[0]
    names = {flag for section in train.FLAGS.values() for flag in section}
    assert config.keys() == names - {"resume"} | {"classifier"}


@pytest.mark.parametrize("method", ["zeroshot", "ensemble", "linear"])
def test_methods_without_prompts_have_no_value_for_the_flags_of_prompts(method):
    config = train.resolve(parse(["--method", method]))[0]
    assert {config[flag] for flag in flags.method_defaults(train.FLAGS)} == {None}
