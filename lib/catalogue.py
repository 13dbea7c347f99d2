"""What is known about each dataset: its folder, split, archive and templates.

One row per dataset. A row of your own needs `folder`, `images` and `split`; the rest is optional.
"""

import re
from dataclasses import dataclass

from lib import world
from lib.download import hub_url
from lib.errors import BadInput
from lib.files import read_text

# -------------------------------------------------------------------- hand-written templates
# The first template of a group initialises its soft prompt. The groups for the field's datasets
# are the published ones (arXiv 2409.12011 and its code).

PHOTO = ["a photo of a {}."]
MANY = ["a photo of many {}."]
LARGE = ["a photo of the large {}.", "a photo of a large {}."]
SMALL = ["a photo of the small {}.", "a photo of a small {}."]
GOOD = ["a good photo of the {}.", "a good photo of a {}."]
LOW_RESOLUTION = [
    "a low resolution photo of the {}.",
    "a low resolution photo of a {}.",
    "a pixelated photo of the {}.",
    "a pixelated photo of a {}.",
]
FLOWER = ["a photo of a {}, a type of flower."]
AIRCRAFT = ["a photo of a {}, a type of aircraft."]
ACTION = ["a photo of a person doing {}."]
SATELLITE = ["a centered satellite photo of {}."]
TEXTURE = ["{} texture."]
VIDEO_GAME = ["a {} in a video game."]
MY_PHOTO = ["itap of a {}.", "itap of the {}."]  # "I took a picture"
ART = ["art of the {}.", "a rendering of a {}.", "a rendering of the {}."]
ORIGAMI = ["a origami {}."]
HARD_TO_SEE = ["a photo of the hard to see {}."]
GENERAL = [PHOTO, MANY, LOW_RESOLUTION, GOOD]  # SUN397's; for datasets without templates

IMAGENET_VARIANT = [
    *(FLOWER, ACTION, SATELLITE, AIRCRAFT, MY_PHOTO, LARGE, ART),
    *(SMALL[:1], PHOTO, MANY),
    ["a low resolution photo of the {}.", "a pixelated photo of a {}."],
    *(GOOD, VIDEO_GAME, HARD_TO_SEE, ORIGAMI, TEXTURE),
]
IMAGENET = [
    *IMAGENET_VARIANT[:10],
    [
        *LOW_RESOLUTION,
        "a jpeg corrupted photo of the {}.",
        "a blurry photo of a {}.",
        "a bad photo of the {}.",
    ],
    ["a cropped photo of the {}.", "a cropped photo of a {}."],
    ["a bright photo of the {}."],
    GOOD,
    ["a close-up photo of the {}."],
    ["a photo of the clean {}."],
    *(VIDEO_GAME, HARD_TO_SEE, ORIGAMI, TEXTURE),
]
WORLD = [  # one group per style, in the order of world.STYLES
    ["a photo of a {}.", "a good photo of a {}.", "a good photo of the {}."],
    ["a photo of a large {}.", "a photo of the large {}."],
    ["a photo of a small {}.", "a photo of the small {}."],
    ["a photo of many {}."],
    ["a sketch of a {}.", "a sketch of the {}.", "a drawing of a {}.", "a drawing of the {}."],
    LOW_RESOLUTION,
    ["a blurry photo of a {}.", "a blurry photo of the {}."],
    ["a dark photo of a {}.", "a dark photo of the {}."],
]

# -------------------------------------------------------------------------------- the datasets


@dataclass(frozen=True)
class Row:
    """One dataset. Paths are below `folder`, which is below the folder of all datasets."""

    folder: str = ""
    images: str = ""
    layout: str = "split"  # or aircraft, imagenet, synsets, numbers (lib/readers.py), world
    split: str = ""  # the field's fixed split file
    counts: tuple = ()  # train, val and test images in the split; None: any number
    archive: str = ""  # its zip file on the hub
    sha256: str = ""  # of the archive, if known
    templates: tuple | list = ()  # groups of templates; if empty, the general ones are used
    zero_shot: str = "a photo of a {}."  # CoOp's one template
    clip: str = "ViT-B/16"


# The field's mirror on the Hugging Face hub, maintained by the authors of PromptKD and ATPrompt: a
# zip file per dataset, with its images and lists in the layout of CoOp's DATASETS.md.
HUB = "zhengli97/prompt_learning_dataset"
REVISION = "ceb3112337fb6e1bf71534e355ca5569b63f19a6"
DATASETS = {
    name: Row(layout="world", templates=WORLD, clip="bundled") for name in world.DATASETS
} | {
    "caltech101": Row(
        "caltech-101",
        "101_ObjectCategories",
        split="split_zhou_Caltech101.json",
        counts=(4128, 1649, 2465),
        archive="caltech-101.zip",
        templates=[TEXTURE, *GENERAL],
    ),
    "oxford_pets": Row(
        "oxford_pets",
        "images",
        split="split_zhou_OxfordPets.json",
        counts=(2944, 736, 3669),
        archive="oxford_pets.zip",
        templates=[SMALL[:1], LARGE, *GENERAL],
        zero_shot="a photo of a {}, a type of pet.",
    ),
    "stanford_cars": Row(
        "stanford_cars",
        split="split_zhou_StanfordCars.json",
        counts=(6509, 1635, 8041),
        archive="stanford_cars.zip",
        templates=[
            [
                "A photo of the high-performance {}.",
                "A photo of the modern {}.",
                "A photo of the fast {}.",
            ],
            *GENERAL,
        ],
    ),
    "oxford_flowers": Row(
        "oxford_flowers",
        "jpg",
        split="split_zhou_OxfordFlowers.json",
        counts=(4093, 1633, 2463),
        archive="oxford_flowers.zip",
        templates=[FLOWER, *GENERAL],
        zero_shot=FLOWER[0],
    ),
    "food101": Row(
        "food-101",
        "images",
        split="split_zhou_Food101.json",
        counts=(50500, 20200, 30300),
        archive="food101.zip",
        templates=[
            ["a photo of a  {}."],  # two spaces as published; the tokenizer reads one
            ["a photo of the delicious {}.", "a photo of the tasty {}.", "A dish of the {}."],
            LOW_RESOLUTION,
            GOOD,
        ],
        zero_shot="a photo of {}, a type of food.",
    ),
    "fgvc_aircraft": Row(
        "fgvc_aircraft",
        "images",
        layout="aircraft",
        split="variants.txt",
        counts=(3334, 3333, 3333),
        archive="fgvc_aircraft.zip",
        templates=[AIRCRAFT, *GENERAL],
        zero_shot=AIRCRAFT[0],
    ),
    "sun397": Row(
        "sun397",
        "SUN397",
        split="split_zhou_SUN397.json",
        counts=(15880, 3970, 19850),
        archive="sun397.zip",
        sha256="ce6dee6685c9f1d592c8297e193dde885aa9c50d008fd998a38ccc57a3dda722",
        templates=GENERAL,
    ),
    "dtd": Row(
        "dtd",
        "images",
        split="split_zhou_DescribableTextures.json",
        counts=(2820, 1128, 1692),
        archive="dtd.zip",
        sha256="5ba4d3000e60f5541ba15a082033ca0696eee68125e9c28edff3dbe22f04313b",
        templates=[TEXTURE, *GENERAL],
        zero_shot=TEXTURE[0],
    ),
    "eurosat": Row(
        "eurosat",
        "2750",
        split="split_zhou_EuroSAT.json",
        counts=(13500, 5400, 8100),
        archive="eurosat.zip",
        sha256="cedceda1690cad47bc3b41eb6bf2d0a134ec7413558128409928829f06c74613",
        templates=[SATELLITE, PHOTO, LARGE, SMALL, LOW_RESOLUTION, GOOD],
        zero_shot=SATELLITE[0],
    ),
    "ucf101": Row(
        "ucf101",
        "UCF-101-midframes",
        split="split_zhou_UCF101.json",
        counts=(7639, 1898, 3783),
        archive="ucf101.zip",
        templates=[ACTION, VIDEO_GAME, *GENERAL],
        zero_shot=ACTION[0],
    ),
    "imagenet": Row(
        "imagenet",
        "images",
        layout="imagenet",
        counts=(None, 0, 50000),
        templates=IMAGENET,
    ),
    "imagenetv2": Row(
        "imagenetv2",
        "imagenetv2-matched-frequency-format-val",
        layout="numbers",
        counts=(0, 0, 10000),
        archive="imagenetv2.zip",
        templates=IMAGENET_VARIANT,
    ),
    "imagenet_sketch": Row(
        "imagenet-sketch",
        "images",
        layout="synsets",
        counts=(0, 0, 50889),
        archive="imagenet-sketch.zip",
        templates=IMAGENET_VARIANT,
    ),
    "imagenet_a": Row(
        "imagenet-adversarial",
        "imagenet-a",
        layout="synsets",
        counts=(0, 0, 7500),
        archive="imagenet-adversarial.zip",
        templates=IMAGENET_VARIANT,
    ),
    "imagenet_r": Row(
        "imagenet-rendition",
        "imagenet-r",
        layout="synsets",
        counts=(0, 0, 30000),
        archive="imagenet-rendition.zip",
        templates=IMAGENET_VARIANT,
    ),
}


def row_of(dataset):
    """The row of a dataset; for your own folder, a row of defaults."""
    return DATASETS.get(dataset, Row())


def template_groups(dataset):
    """The template groups of a dataset; SUN397's general ones if it has none of its own."""
    return list(row_of(dataset).templates or GENERAL)


def archive_url(row):
    """The address of a row's archive."""
    return hub_url(f"{HUB}/resolve/{REVISION}/{row.archive}")


def all_templates(groups):
    """The templates of all groups in one list."""
    return [template for group in groups for template in group]


def named_groups(config):
    """The groups that a run starts from: the dataset's, also for `--groups auto`, or a file's. With
    `--one-group` they are merged. Raises BadInput as `read_groups` does."""
    name, dataset = config["groups"], config["dataset"]
    groups = template_groups(dataset) if name in ("dataset", "auto") else read_groups(name)
    return [all_templates(groups)] if config["one_group"] else groups


def read_groups(file):
    """Template groups of your own: one template per line, a blank line between groups.

    Returns lists of strings. Raises BadInput if the file cannot be read, is empty, has a line that
    is not a valid template, or has two groups with the same first template.
    """
    groups = [[]]
    for number, line in enumerate(read_text(file).splitlines(), 1):
        template = line.strip()
        if not template:
            groups.append([])
        elif template.count("{}") == 1 and not re.match(r"[-–+*#>•`\"'“‘]|\(?\d+[.)]", template):
            groups[-1].append(template)
        else:
            raise BadInput(
                f"{file}, line {number}: {template!r} needs one {{}} for the class name, and no"
                " number, bullet or quotation marks"
            )
    groups = [group for group in groups if group]
    if not groups:
        raise BadInput(f"{file} holds no template")
    firsts = [group[0] for group in groups]
    for template in firsts:  # it names the group's prompt
        if firsts.count(template) > 1:
            raise BadInput(f"{file}: two groups start with {template!r}")
    return groups
