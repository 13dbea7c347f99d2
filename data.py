"""Datasets: splits, few-shot samples, transforms, and image features encoded once.

A dataset is a row of DATASETS and a folder in the layout of CoOp's DATASETS.md, so that the
field's own data folder works as it is:

    data/eurosat/2750/AnnualCrop/AnnualCrop_1.jpg
    data/eurosat/split_zhou_EuroSAT.json

What is absent is fetched into that same layout, where that is possible. The embedded world
(`shapes`, see shapes.py) is a dataset like the others, only that its images are drawn, not read.

Top to bottom: the table; loading and fetching a split; few-shot sampling; base and new classes;
transforms; the feature cache.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import urllib.error
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.utils import download_file_from_google_drive, download_url
from torchvision.transforms import v2
from tqdm import tqdm

import shapes
from backbone import BadInput, nearest

# ---------------------------------------------------------------------------------- the table
# folder: below the root. images: below the folder. split: the field's fixed split, with its
# Google Drive id and its train / val / test counts. archive: URL and MD5, torchvision's.
# names: readable class names by image folder, for the case that the split cannot be had.

DATASETS = {
    "eurosat": {
        "folder": "eurosat",
        "images": "2750",
        "split": "split_zhou_EuroSAT.json",
        "drive_id": "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
        "counts": (13500, 5400, 8100),
        "archive": torchvision_archive(torchvision.datasets.EuroSAT),
    },
}
