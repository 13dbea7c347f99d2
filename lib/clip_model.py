"""The frozen CLIP: finds it by name or file, checks it and loads it.

`clip.load` does most of this, but fails on plain state dicts with current PyTorch and rounds fp32
weights to fp16 on the way. Here the weights stay unchanged.
"""

import hashlib
import warnings
from pathlib import Path
from zipfile import ZipFile

import torch

from lib.download import alone, download, file_sha256, hub_url
from lib.errors import BadInput, finite, nearest, one_line, out_of_memory, say
from lib.files import read_torch_file, writable_folder

TINY_CLIP = Path(__file__).parents[1] / "assets" / "tiny_clip.pt"  # the built-in world's
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels, for every CLIP
STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_CACHE = Path("~/.cache/clip").expanduser()  # where `clip` itself keeps its downloads
BUCKET = "https://clip-as-service.s3.us-east-2.amazonaws.com/models/torch"
VOCABULARY = 49408
READABLE = (
    "expected a file of OpenAI's, or a state dict with OpenAI's names, saved by torch.save in"
    " PyTorch 1.6 or newer"
)


def load_clip(name, device):
    """A CLIP by OpenAI's name (`ViT-B/16`, `RN50`, ...), `bundled`, or from a file; frozen, fp32.

    A file may be one of OpenAI's TorchScript archives, a state dict, plain or as a part of a
    checkpoint (see `_state_dict`), or a state dict with embeddings for only some tokens. In the
    last case `token_ids` lists these tokens; the rows of all others become NaN, so that an unknown
    word is noticed instead of mistaken for a known one.

    Returns (`clip.model.CLIP`, fingerprint): the fingerprint is a hash of all weights, which
    identifies this CLIP in feature caches and checkpoints.
    Raises BadInput for an unknown name, a file that is not a CLIP, or a failed download.
    """
    import clip  # here: it imports torchvision, which --help need not wait for
    from clip.model import build_model

    names = ["bundled", *clip.available_models()]
    path = TINY_CLIP if name == "bundled" else Path(name)
    trusted = name in clip.available_models()
    if trusted:
        path = _fetch(name)
    if not path.is_file():
        hint = nearest(str(name), names)
        raise BadInput(
            f"no CLIP file {path}, and no CLIP of that name{hint}; names are {', '.join(names)}"
        )
    content = _read_weights(path, trusted)
    try:
        state = _state_dict(content)
        if "token_ids" in state:
            ids, rows = state.pop("token_ids"), state["token_embedding.weight"].float()
            table = torch.full((VOCABULARY, rows.shape[1]), torch.nan)
            table[ids] = rows
            state["token_embedding.weight"] = table
        if len(state["token_embedding.weight"]) != VOCABULARY:
            raise ValueError("it has a vocabulary of its own")
        if "visual.proj" in state and len(state["visual.proj"]) > 1024:  # OpenAI has none
            raise ValueError("its vision transformer is wider than 1,024: its heads are unknown")
        # Built without memory, because clip would draw random weights first and round the file's to
        # fp16. Only the attention's mask is not among the weights.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this loads nothing
            clip_model = build_model(dict(state))
        names = clip_model.state_dict()
        weights = {k: v.detach().float() for k, v in state.items() if k in names}
        clip_model.load_state_dict(weights, assign=True)
        for block in clip_model.transformer.resblocks:
            block.attn_mask = clip_model.build_attention_mask()
    except Exception as error:  # another model's weights may raise anything
        if out_of_memory(error):
            raise
        message = f"{path} is not a CLIP checkpoint ({one_line(error)}): {READABLE}"
        raise BadInput(message) from error
    finite(clip_model.logit_scale.exp(), f"{path}: the scale of the logits")
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode())
        digest.update(weights[key].contiguous().numpy())
    return clip_model.requires_grad_(False).to(device), digest.hexdigest()


def _read_weights(path, trusted):
    """The content of one of OpenAI's archives or of a file of `torch.save`, a dictionary. trusted:
    whether the file is known to be OpenAI's. Raises BadInput for any other TorchScript archive."""
    import clip

    try:
        with ZipFile(path) as archive:
            script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # damaged bytes may raise anything
        script = False
    if not script:
        return read_torch_file(path, f"CLIP checkpoint ({READABLE})", {})
    # To open a TorchScript archive is to run the code in it.
    if not trusted and file_sha256(path) not in map(_sha256, clip.clip._MODELS.values()):
        raise BadInput(
            f"{path} is a TorchScript archive, which may run any code, and not one of OpenAI's: if"
            " you trust it, torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE) and use that"
        )
    with warnings.catch_warnings():  # TorchScript is deprecated, but it is what OpenAI ships
        warnings.simplefilter("ignore", FutureWarning)
        return dict(torch.jit.load(path, map_location="cpu").state_dict())


def _state_dict(content):
    """The state dict of a CLIP in a checkpoint: all of it, or its `state_dict` or `model`, under
    names that may share a prefix (`module.`). Raises ValueError if it holds no CLIP, or several."""
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    token_embedding = "token_embedding.weight"
    found = [name for name in content if str(name).endswith(token_embedding)]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} parameters named {token_embedding}, not one")
    prefix = found[0].removesuffix(token_embedding)
    return {k.removeprefix(prefix): v for k, v in content.items() if str(k).startswith(prefix)}


def _sha256(url):
    """The SHA-256 in one of OpenAI's addresses: .../<sha256>/<file>."""
    return url.split("/")[-2]


def _fetch(name):
    """The path of OpenAI's archive, downloaded if it is absent or damaged."""
    import clip

    url = clip.clip._MODELS[name]
    path, sha256 = CLIP_CACHE / Path(url).name, _sha256(url)
    # OpenAI's addresses are reported to be gone. The SHA-256 makes any copy as good as theirs.
    copies = hub_url(f"jinaai/clip-models/resolve/main/{path.name}"), f"{BUCKET}/{path.name}"

    def is_complete():
        return path.is_file() and file_sha256(path) == sha256

    if is_complete():
        return path
    with (
        writable_folder(CLIP_CACHE, "name a CLIP with --clip FILE"),
        alone(path.with_suffix(".lock")),
    ):
        if not is_complete():  # no other process has just downloaded it
            if path.is_file():
                say(f"{path} is damaged (its SHA-256 is wrong): downloading it again")
            way_out = f"put that file at {path} or name another with --clip FILE"
            download((url, *copies), path, way_out, sha256)
    return path
