"""One run in several processes: `torchrun --nproc_per_node N train.py ...`.

Every process holds the same prompts and router, sees the same batches and computes the same losses.
Only the work of the frozen encoders is split: images before training, sentences during it. In a
step, each process encodes its share of the sentences, and all processes get all features
(`sum_over_processes`). In the backward pass, each process computes the gradient of its own share
with respect to the prompts, and these gradients are summed (`sum_gradients`). After that, all
processes hold the same numbers again, so nothing else needs to be sent. (With --image-side, each
process computes all gradients of the image encoder itself.)

Without torchrun, all of this does nothing. The processes share one disk. Every process writes the
files of a run, under its own temporary names, and renames them; only the first one uses the feature
cache. When a process fails, torchrun stops the others.
"""

import os
import sys

import torch
import torch.distributed as dist

from lib.errors import BadInput


def choose_device(name):
    """The `torch.device` of this name, or the best available one for None; under torchrun with
    CUDA, the GPU of this process. Raises BadInput for a missing or unsupported device."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device == torch.device("cuda"):  # one for each process of torchrun
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        elif device.type == "cuda" and processes() > 1:
            raise BadInput("torchrun gives each process a GPU of its own: --device cuda, no number")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"no device {name!r}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"no device {name!r}: only cpu and cuda are supported")
    return device


def mixed_dtype(device):
    """The dtype of the frozen encoders' products in training: bf16 on a GPU that supports it, else
    fp32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def processes():
    """How many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device):
    """Joins the processes of torchrun, if there are any. From then on only the first prints."""
    if processes() == 1 or dist.is_initialized():
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"WORLD_SIZE is set, but not by torchrun ({reason}): unset it") from error
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):  # the same in all processes, as all compute the same losses
        return gradient


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def sum_over_processes(x):
    """The sum of x over all processes. Its gradient is passed to each of them unchanged."""
    return _Sum.apply(x) if world() > 1 else x


def sum_gradients(x):
    """x itself; its gradient is summed over all processes."""
    return _SumGradients.apply(x) if world() > 1 else x


def gather(thing):
    """The list of every process's thing, by rank, in every process."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things
