"""What surrounds a training loop: the bar, a line per epoch, and stopping and going on."""

import sys
import time

import torch
from tqdm import tqdm

from lib import processes
from lib.errors import BadInput


class NotFinite(BadInput):
    """Training has diverged."""


class Progress:
    """Counts the epochs of a training, prints and remembers what happened in each, and saves all
    that is needed to go on from there. How it is used: `train.fit`."""

    def __init__(self, parts, epochs, steps, save, state=None):
        """parts: {name: anything with state_dict and load_state_dict, or a torch.Generator}.
        steps: per epoch. save: called in the first process after each epoch, with a dictionary of
        plain values and tensors. state: one of these, to go on from there, or None.
        """
        self.parts, self.n_epochs, self.steps, self.save = parts, epochs, steps, save
        self.done, self.seconds, self.usage = 0, 0.0, []
        if state:
            self._go_on_from(state)

    def _go_on_from(self, state):
        try:
            for name, part in self.parts.items():
                if isinstance(part, torch.Generator):
                    part.set_state(state[name])
                elif state[name] or name == "model":  # a loss scaler may have no state
                    part.load_state_dict(state[name])
            torch.set_rng_state(state["torch_rng"])
            if torch.cuda.is_initialized() and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"])
            self.done, self.seconds = int(state["epoch"]), float(state["seconds"])
            self.usage = list(state["usage"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise BadInput("the state to resume from does not fit the run: remove it") from error

    def epochs(self):
        """The numbers of the epochs that are not done yet, counted from 0."""
        self.start = time.time() - self.seconds  # as if it had never been stopped
        total, done = self.n_epochs * self.steps, self.done * self.steps
        quiet = processes.rank() > 0 or None
        with tqdm(total=total, initial=done, leave=False, disable=quiet) as self.bar:
            for epoch in range(self.done, self.n_epochs):
                self.losses, self.weights = {}, 0
                yield epoch
        self.seconds = time.time() - self.start

    def step(self, losses, weights):
        """Counts one step. losses: {name: (weight, value)}; weights: of the router, (B, G)."""
        for name, (weight, value) in losses.items():
            _, so_far = self.losses.get(name, (weight, 0))
            self.losses[name] = weight, so_far + value.detach() / self.steps
        self.weights += weights.detach().sum(dim=0)
        self.bar.update()

    def end_epoch(self, lr):
        """Prints the epoch's line and saves the state. Raises NotFinite if a parameter is not."""
        self.done += 1
        if not all(p.isfinite().all() for p in self.parts["model"].parameters()):
            raise NotFinite(f"training has diverged in epoch {self.done}: try a smaller --lr")
        losses = {name: (w, value.item()) for name, (w, value) in self.losses.items()}
        total = sum(w * value for w, value in losses.values())
        terms = " + ".join(f"{name} {w:g} x {value:.3f}" for name, (w, value) in losses.items())
        share = (self.weights / self.weights.sum()).tolist()
        self.usage.append([round(s, 4) for s in share])
        self.bar.write(
            f"epoch {self.done:3d}/{self.n_epochs}  lr {lr:.5f}  loss {total:.3f} = {terms}"
            f"  prompts {' '.join(f'{100 * s:2.0f}' for s in share)} %",
            file=sys.stdout,
        )
        if processes.rank() == 0:
            self.save(self.state())

    def state(self):
        """All that is needed to go on from here."""
        state = {"epoch": self.done, "seconds": time.time() - self.start, "usage": self.usage}
        for name, part in self.parts.items():
            is_rng = isinstance(part, torch.Generator)
            state[name] = part.get_state() if is_rng else part.state_dict()
        state["torch_rng"] = torch.get_rng_state()
        on_gpu = torch.cuda.is_initialized()
        state["cuda_rng"] = torch.cuda.get_rng_state() if on_gpu else None
        return state
