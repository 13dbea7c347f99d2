"""What is known of each dataset: where it lies, its split, where it is from, its templates.

One row per dataset. One of your own needs `folder`, `images` and `split`; all else may be left out.
"""

from dataclasses import dataclass

from lib import world

# -------------------------------------------------------------------- hand-written templates
# In groups, whose first template starts the soft prompt. Those of the field's datasets are the
# published ones (arXiv 2409.12011 and its code).

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
GENERAL = [PHOTO, MANY, LOW_RESOLUTION, GOOD]  # SUN397's; they serve whoever has none

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
    """One dataset. Paths are below `folder`, which is below the root of all datasets."""

    folder: str = ""
    images: str = ""
    layout: str = "split"  # aircraft, imagenet, synsets, numbers: lib/readers.py; or world
    split: str = ""  # the field's fixed split file
    drive_id: str = ""  # of the split file (of classnames.txt for ImageNet) on Google Drive
    counts: tuple = ()  # train, val and test images in the split; None: any number
    archive: tuple = ()  # URL and MD5, torchvision's where it has one
    origin: str = ""  # where to get it by hand, if it cannot be downloaded
    # Where each class has an image folder: readable names that differ from the folder's, None for
    # a folder that is no class. A seeded split can then stand in for one that cannot be had.
    folder_names: dict | None = None
    templates: tuple | list = ()  # groups of templates; the general ones serve if there are none
    zero_shot: str = "a photo of a {}."  # CoOp's one template
    clip: str = "ViT-B/16"


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
DATASETS = {
    name: Row(layout="world", templates=WORLD, clip="bundled") for name in world.DATASETS
} | {
    "caltech101": Row(
        "caltech-101",
        "101_ObjectCategories",
        split="split_zhou_Caltech101.json",
        drive_id="1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
        counts=(4128, 1649, 2465),
        archive=(
            "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
            "3138e1922a9193bfa496528edbbc45d0",
        ),
        folder_names={
            "BACKGROUND_Google": None,
            "Faces_easy": None,
            "Faces": "face",
            "Leopards": "leopard",
            "Motorbikes": "motorbike",
            "airplanes": "airplane",
        },
        templates=[TEXTURE, *GENERAL],
    ),
    "oxford_pets": Row(
        "oxford_pets",
        "images",
        split="split_zhou_OxfordPets.json",
        drive_id="1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
        counts=(2944, 736, 3669),
        archive=(f"{OXFORD}/pets/data/images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
        templates=[SMALL[:1], LARGE, *GENERAL],
        zero_shot="a photo of a {}, a type of pet.",
    ),
    "stanford_cars": Row(
        "stanford_cars",
        split="split_zhou_StanfordCars.json",
        drive_id="1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
        counts=(6509, 1635, 8041),
        origin="cars_train/*.jpg and cars_test/*.jpg, whose first home"
        " (ai.stanford.edu/~jkrause/cars) is closed: see CoOp's DATASETS.md",
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
        drive_id="1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
        counts=(4093, 1633, 2463),
        archive=(f"{OXFORD}/flowers/102/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
        templates=[FLOWER, *GENERAL],
        zero_shot=FLOWER[0],
    ),
    "food101": Row(
        "food-101",
        "images",
        split="split_zhou_Food101.json",
        drive_id="1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
        counts=(50500, 20200, 30300),
        archive=(
            "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
            "85eeb15f3717b99a5da872d97d918f87",
        ),
        folder_names={},
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
        counts=(3334, 3333, 3333),
        archive=(f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz", None),
        templates=[AIRCRAFT, *GENERAL],
        zero_shot=AIRCRAFT[0],
    ),
    "sun397": Row(
        "sun397",
        "SUN397",
        split="split_zhou_SUN397.json",
        drive_id="1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
        counts=(15880, 3970, 19850),
        archive=(
            "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
            "8ca2778205c41d23104230ba66911c7a",
        ),
        templates=GENERAL,
    ),
    "dtd": Row(
        "dtd",
        "images",
        split="split_zhou_DescribableTextures.json",
        drive_id="1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
        counts=(2820, 1128, 1692),
        archive=(f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "fff73e5086ae6bdbea199a49dfb8a4c1"),
        folder_names={},
        templates=[TEXTURE, *GENERAL],
        zero_shot=TEXTURE[0],
    ),
    "eurosat": Row(
        "eurosat",
        "2750",
        split="split_zhou_EuroSAT.json",
        drive_id="1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
        counts=(13500, 5400, 8100),
        archive=(
            "https://huggingface.co/datasets/torchgeo/eurosat/resolve/"
            "c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            "c8fa014336c82ac7804f0398fcb19387",
        ),
        folder_names={
            "AnnualCrop": "Annual Crop Land",
            "HerbaceousVegetation": "Herbaceous Vegetation Land",
            "Highway": "Highway or Road",
            "Industrial": "Industrial Buildings",
            "Pasture": "Pasture Land",
            "PermanentCrop": "Permanent Crop Land",
            "Residential": "Residential Buildings",
            "SeaLake": "Sea or Lake",
        },
        templates=[SATELLITE, PHOTO, LARGE, SMALL, LOW_RESOLUTION, GOOD],
        zero_shot=SATELLITE[0],
    ),
    "ucf101": Row(
        "ucf101",
        "UCF-101-midframes",
        split="split_zhou_UCF101.json",
        drive_id="1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
        counts=(7639, 1898, 3783),
        archive=("https://drive.google.com/file/d/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O", None),
        folder_names={},
        templates=[ACTION, VIDEO_GAME, *GENERAL],
        zero_shot=ACTION[0],
    ),
    "imagenet": Row(
        "imagenet",
        "images",
        layout="imagenet",
        drive_id="1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF",
        counts=(None, 0, 50000),
        origin="train/<synset>/*.JPEG and val/<synset>/*.JPEG from https://image-net.org",
        templates=IMAGENET,
    ),
    "imagenetv2": Row(
        "imagenetv2",
        "imagenetv2-matched-frequency-format-val",
        layout="numbers",
        counts=(0, 0, 10000),
        origin="{0 ... 999}/*.jpeg from https://github.com/modestyachts/ImageNetV2",
        templates=IMAGENET_VARIANT,
    ),
    "imagenet_sketch": Row(
        "imagenet-sketch",
        "images",
        layout="synsets",
        counts=(0, 0, 50889),
        origin="<synset>/*.JPEG from https://github.com/HaohanWang/ImageNet-Sketch",
        templates=IMAGENET_VARIANT,
    ),
    "imagenet_a": Row(
        "imagenet-adversarial",
        "imagenet-a",
        layout="synsets",
        counts=(0, 0, 7500),
        origin="<synset>/*.jpg from https://github.com/hendrycks/natural-adv-examples",
        templates=IMAGENET_VARIANT,
    ),
    "imagenet_r": Row(
        "imagenet-rendition",
        "imagenet-r",
        layout="synsets",
        counts=(0, 0, 30000),
        origin="<synset>/*.jpg from https://github.com/hendrycks/imagenet-r",
        templates=IMAGENET_VARIANT,
    ),
}


def row_of(dataset):
    """The row of a dataset; for a folder of one's own, a row of nothing but defaults."""
    return DATASETS.get(dataset, Row())


def template_groups(dataset):
    """The template groups of a dataset; SUN397's general ones if it has none of its own."""
    return list(row_of(dataset).templates or GENERAL)
