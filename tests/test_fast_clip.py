"""The image encoder and the blocks of both encoders: the numbers that clip's own compute."""

import pytest
import torch
import torch.nn.functional as F
from clip.model import CLIP
from test_prompts import largest_difference

from lib.errors import BadInput
from lib.fast_clip import encode_images
from lib.features import learnable_part


def vit(layers=3, width=128, patch=8):
    """A CLIP with a ViT of random weights, LayerNorms and biases included."""
    torch.manual_seed(0)
    model = CLIP(64, 32, layers, width, patch, 77, 49408, 64, 1, 1).float().eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name or "bias" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def pixels(size=32):
    return torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers, width, patch", [(1, 64, 16), (3, 128, 8)])
def test_features_are_clips_own_and_half_precision_moves_them_by_little(layers, width, patch):
    model, images = vit(layers, width, patch), pixels()
    expected, before = model.encode_image(images), images.clone()
    for _ in range(2):  # what is done in place touches neither weights nor images
        ours = encode_images(model, images, torch.float32)
        assert ours.shape == (5, 64) and largest_difference(ours, expected) < 1e-5
    assert torch.equal(images, before)
    assert torch.equal(model.encode_image(images), expected)
    rounded = encode_images(model, images, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 1e-5 < largest_difference(rounded, expected) < 0.05


def test_a_resnet_is_clips_own():
    torch.manual_seed(0)
    model = CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1).float().eval()
    images = pixels(size=64)
    expected = model.encode_image(images)
    assert largest_difference(encode_images(model, images, torch.float32), expected) < 1e-5
    rounded = encode_images(model, images, torch.bfloat16)
    assert 0 < largest_difference(rounded, expected) < 0.1
    with pytest.raises(BadInput, match="needs a CLIP with a ViT"):
        learnable_part(model, "prompts")


def test_layer_norms_get_the_gradients_that_clips_own_encoder_gives_them():
    model, images = vit(), pixels()
    norms = learnable_part(model, "layer-norms")
    gradients = []
    for encode in (model.encode_image, lambda x: encode_images(model, x, torch.float32)):
        norms.zero_grad()
        F.normalize(encode(images), dim=-1)[:, :3].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in norms.parameters()]))
    assert largest_difference(*gradients) < 1e-4
    norms[0].weight.data.mul_(1.5)  # a step of learning shows at once
    ours = encode_images(model, images, torch.float32)
    assert largest_difference(ours, model.encode_image(images)) < 1e-5
