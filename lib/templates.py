"""Templates: sentences with a place for the class name. Which ones a run has, and their checks."""

from lib.catalogue import template_groups
from lib.errors import BadInput
from lib.files import read_text


def check_template(template):
    """The template; raises BadInput unless it has one place for the class name."""
    if template.count("{}") != 1:
        raise BadInput(f"the template {template!r} needs one {{}} where the class name goes")
    return template


def check_init(init):
    """Raises BadInput unless `--init` is `template`, `random`, a template, or None."""
    if init not in ("template", "random", None):
        try:
            check_template(init)
        except BadInput as error:
            raise BadInput(f"--init: {error}; or template, or random") from error


def check_auto(config, asked_for_one_group):
    """Raises BadInput where `--groups auto` makes no sense. config: of the run."""
    method = f"--method {config['method']}"
    if config["classifier"] != "prompts":
        raise BadInput(f"{method} has no prompts, so no use for --groups auto")
    if config["one_group"]:
        whose = "--one-group" if asked_for_one_group else method
        raise BadInput(f"--groups auto makes several groups, and {whose} has one")


def named_groups(name, dataset, one_group=False):
    """The groups that `--groups` names: `dataset` or `auto` for the dataset's own, else a file's.

    one_group: all of them in one. Raises BadInput as `read_groups` does.
    """
    groups = template_groups(dataset) if name in ("dataset", "auto") else read_groups(name)
    return [all_templates(groups)] if one_group else groups


def read_groups(file):
    """Template groups of one's own: one template per line, a blank line between groups.

    Returns lists of strings. Raises BadInput if the file cannot be read, is empty, has a template
    without {}, or two groups that start alike.
    """
    groups = [[]]
    for line in map(str.strip, read_text(file).splitlines()):
        if line:
            groups[-1].append(check_template(line))
        else:
            groups.append([])
    groups = [group for group in groups if group]
    if not groups:
        raise BadInput(f"{file} holds no template")
    firsts = [group[0] for group in groups]
    for template in firsts:  # it names the group's prompt
        if firsts.count(template) > 1:
            raise BadInput(f"{file}: two groups start with {template!r}")
    return groups


def all_templates(groups):
    """The templates of all groups in one list."""
    return [template for group in groups for template in group]
