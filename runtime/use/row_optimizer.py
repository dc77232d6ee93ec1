"""A torch optimizer over what lives on the host: for loops and trainers that expect one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meft.runtime.session.checkpoint import optimizer_tensors, restore_optimizer
from meft.runtime.session.session import Session


class HostState(Mapping[str, torch.Tensor]):
    """An optimizer's tensors by name, which stay on the host.

    When a Trainer is made, accelerate moves whatever lists, dicts and tensors an optimizer's state consists of to the
    model's device: moments of many GiB. This is none of these, and is saved as a dict.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = OrderedDict(tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        """As an ordered dict: ``torch.load`` knows that one without being told to trust it."""
        return OrderedDict, (), None, None, iter(self._tensors.items())


class RowOptimizer(torch.optim.Optimizer):
    """AdamW over the adapter's rows on the host and its routers on the device, in one step.

    Clips rows and routers by their common norm before each step (``max_norm``; None for no clipping), so nothing else
    should clip. A learning-rate scheduler finds the rate where it always is, in ``param_groups``.

    ``state_dict`` holds moments and step counts by name, and is empty before the first step, like torch's own.
    """

    def __init__(
        self, session: Session, finish_backward: Callable[[], None], *, learning_rate: float, max_norm: float | None
    ) -> None:
        handle = nn.Parameter(torch.zeros(0))  # torch wants a parameter; with exact routing there is none of its kind
        super().__init__([handle, *session.router_weights], {"lr": learning_rate})
        self.session = session
        self.max_norm = max_norm
        self.last_gradient_norm: float | None = None
        """Global norm before clipping, of the last step."""
        self._finish_backward = finish_backward

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every touched row and the routers, and open a new accumulation window."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._finish_backward()
        result = self.session.optimizer_step(learning_rate=self.param_groups[0]["lr"], max_norm=self.max_norm)
        self.last_gradient_norm = result.gradient_norm
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that no step has used."""
        del set_to_none
        self._finish_backward()
        self.session.forget_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts of rows and routers, and the groups."""
        self.session.bring_home()
        counts = [tables.step_counts for tables in self.session.store.layers]
        stepped = any(bool(count.any()) for count in counts)
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return {"state": HostState(optimizer_tensors(self.session)) if stepped else {}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, in place."""
        if state_dict["state"]:
            restore_optimizer(self.session, state_dict["state"], Path("optimizer state"))
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
