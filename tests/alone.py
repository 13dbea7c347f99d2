"""Two prompts and a router, trained on a CLIP of random weights: the method, with nothing else."""

import torch
import torch.nn.functional as F
from clip.model import CLIP

from losses import gate_loss, image_loss, text_loss
from prompts import SoftPrompts, hard_prototypes, template_features
from router import Router, gate_target, mixed_logits

torch.manual_seed(0)
clip_model = CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).requires_grad_(False)
labels = torch.arange(12) % 3
pixels = torch.randn(12, 3, 32, 32) + 2 * (labels - 1).view(12, 1, 1, 1)  # dark, grey, bright
f = F.normalize(clip_model.encode_image(pixels), dim=-1)  # (12, 64)

templates, names = ["a photo of a {}.", "{} texture."], ["cat", "sea star", "forest"]
p = hard_prototypes(template_features(clip_model, templates, names), [[t] for t in templates])
prompts, router = SoftPrompts(clip_model, templates, names), Router(64, n_prompts=2, top_k=1)
optimiser = torch.optim.Adam([*prompts.parameters(), *router.parameters()], lr=0.002)
for step in range(50):
    t = prompts.text_features()  # (2, 3, 64)
    gate_logits, weights = router(f)  # (12, 2)
    logits = mixed_logits(f, t, weights, clip_model.logit_scale.exp())  # (12, 3)
    image, text = image_loss(logits, labels), text_loss(t, p)
    gate = gate_loss(gate_logits, gate_target(f, p, labels, top_k=1))
    optimiser.zero_grad()
    (image + gate + 5 * text).backward()
    optimiser.step()
    if step % 7 == 0:
        print(f"image {image:.3f}  gate {gate:.3f}  text {text:.3f}")
