"""A module after a run that it is to forget is as it was before, hooks included."""

from __future__ import annotations

import torch
from modelport.checkpoints.forgetting import forgotten


class Hooked(torch.nn.Module):
    """Puts a hook on its layer in the first run, as recorders of hidden states do."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.seen = []

    def forward(self, x):
        if not getattr(self, "hooked", False):
            self.layer.register_forward_hook(lambda *given: self.seen.append(given[-1]))
            self.hooked = True
        return self.layer(x)


def test_hooks_of_a_forgotten_run_are_gone():
    model = Hooked()
    with forgotten(model):
        model(torch.ones(1, 2))
    assert not model.layer._forward_hooks
    assert not hasattr(model, "hooked")
    model.seen.clear()
    model(torch.ones(1, 2))
    assert len(model.seen) == 1, "one hook, not the forgotten run's besides"


def test_a_hook_from_before_stays_and_can_be_taken_off():
    model, seen = torch.nn.Linear(2, 2), []
    handle = model.register_forward_hook(lambda *given: seen.append(given[-1]))
    with forgotten(model):
        model(torch.ones(1, 2))
    model(torch.ones(1, 2))
    assert len(seen) == 2
    handle.remove()
    model(torch.ones(1, 2))
    assert len(seen) == 2
