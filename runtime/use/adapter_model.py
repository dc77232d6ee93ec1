"""A Hugging Face model with its adapter, for people's own scripts: to generate with, or to train in their own loop.

    model = AdapterModel.from_pretrained("base-folder", "out/adapter")     # a trained adapter, ready to generate
    model = AdapterModel.from_plan(base, "plan.json")                      # a new adapter, ready to train
    optimizer = model.optimizer(learning_rate=1e-3)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained("out/adapter")
    base = model.detach()                                                  # the base as it was

In training mode with gradients on, a forward fetches the rows that its batch activates, as in ``meft-run``; otherwise
it is inference (see :mod:`meft.runtime.use.inference`). Gradients accumulate over backwards until the optimizer steps.
Each training forward is followed by its backward before the next; under autocast the adapter computes in the plan's
dtypes. What would train nothing or leave the plan is refused: see :mod:`meft.runtime.use.guards`.

``meft-run``'s own loop also runs inside the device's books; a loop of one's own does not, so on the emulated device its
activations are neither counted nor limited.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from meft.planner.base.errors import MeftError, UsageError
from meft.planner.base.version import VERSION
from meft.planner.models.shapes import shape_of
from meft.planner.records.plan import Plan
from meft.runtime.adapter.blocks import decoder
from meft.runtime.adapter.initialise import KeyInit
from meft.runtime.device.device import CudaDevice, Device, EmulatedDevice
from meft.runtime.device.lanes import Overlapped, Sequential
from meft.runtime.host.optimizer import AdamWSettings
from meft.runtime.session import checkpoint
from meft.runtime.session.known_tokens import known_tokens_weighed
from meft.runtime.session.model_loading import check_token_ids
from meft.runtime.session.session import Session, open_session
from meft.runtime.session.stages import set_stage
from meft.runtime.use.guards import (
    BackwardOrder,
    RowNorm,
    carry,
    differentiable,
    refuse_bypass,
    refuse_method,
    require_placed,
    require_planned_dtype,
    require_planned_size,
    watch_foreign_steps,
)
from meft.runtime.use.inference import AS_TRAINED, Serving, Speaking, attach_rows, rows_met, serving
from meft.runtime.use.row_optimizer import RowOptimizer
from meft.runtime.use.saved import (
    EXTRA_STATE,
    copy_adapter,
    described,
    description,
    layer_rows,
    load_base,
    saved_adapter,
)

DeviceName = Literal["auto", "cuda", "emulated"]


class AdapterModel(nn.Module):
    """``base`` with an adapter beside every FFN; attributes it does not have are the base's."""

    def __init__(
        self,
        base: nn.Module,
        session: Session | None,
        detach: Callable[[], None],
        *,
        how: Serving = AS_TRAINED,
        speaking: Speaking | None = None,
    ) -> None:
        super().__init__()
        self._how = how
        self._source: Path | None = None
        self._speaking = speaking
        self.base = base
        self.routers = nn.ParameterList(session.router_weights if session is not None else [])
        self._session = [] if session is None else [session]  # in a list, so that no module registers it
        self._detach: Callable[[], None] | None = detach
        self._ends: list[Callable[[], None]] = []
        self._in_backward = self._guided = False
        self.known_token_weight = 1.0
        self._order = BackwardOrder()
        if session is not None:
            norm = weakref.WeakMethod(self._row_gradient_norm)
            self.row_norm = RowNorm.of(lambda: None if (ask := norm()) is None else ask())
            self._ends.append(watch_foreign_steps(self, session.router_optimizer))
            self._ends.append(refuse_bypass(self, decoder(base)))
        # If nobody detached before, hooks and threads end with the model.
        self._abandoned = weakref.finalize(self, _abandon, session, detach, self._ends)

    # --- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module | str | Path,
        adapter: str | Path,
        *,
        rows_per_token: int | None = None,
        min_score: float | None = None,
        adapter_name: str | None = None,
    ) -> AdapterModel:
        """A trained adapter beside its base model, a loaded one or a folder: for inference.

        ``adapter`` is an adapter's folder, or one that ``trainer.save_model`` wrote. A token meets the rows that it met
        in training, or its best ``rows_per_token``, and none that it scores below ``min_score``
        (:mod:`meft.runtime.use.inference`). Without a name, the adapter is the base's only one, and active in calls of
        the base itself too. With an ``adapter_name`` each, several share one base, and each is active in calls through
        its own :class:`AdapterModel` alone. Warns where ``rows_per_token`` is above what training had.

        Raises:
            UsageError: the folder holds no adapter, the base is another model than it was trained beside, or carries
                an adapter already.
        """
        folder, how = Path(adapter), Serving(rows_per_token, min_score)
        config, tensors, source = saved_adapter(folder)
        met = rows_met(config.tokens_see, config.top_k, config.active_rows_per_layer)
        if (warning := how.warning(met)) is not None:
            warnings.warn(warning, stacklevel=2)
        model = base if isinstance(base, nn.Module) else load_base(Path(base))
        _require_base(model, config, folder)
        put_down = carry(model, adapter_name)
        speaking = None if adapter_name is None else Speaking()
        try:
            off = attach_rows(model, layer_rows(config, tensors, source, how), speaking)
        except UsageError:
            put_down()
            raise
        made = cls(model, None, off, speaking=speaking)
        made._ends.append(put_down)
        made._source = folder.resolve()
        return made.eval()

    @classmethod
    def from_plan(
        cls,
        base: nn.Module,
        plan: Plan | str | Path,
        *,
        device: DeviceName = "auto",
        seed: int = 0,
        settings: AdamWSettings | None = None,
        key_init: KeyInit = "random",
        adapter: str | Path | None = None,
        schedule: Literal["overlapped", "sequential"] = "overlapped",
        rows_per_token: int | None = None,
        min_score: float | None = None,
        known_token_weight: float = 1.0,
    ) -> AdapterModel:
        """A new adapter beside ``base`` as the plan decides, on the device, in training mode.

        ``adapter`` is a folder to start from instead of a fresh one. ``rows_per_token`` and ``min_score`` are
        what evaluation and generation take, as in :meth:`from_pretrained`. ``known_token_weight`` is that of
        :mod:`meft.runtime.session.known_tokens`, in the losses that the model itself makes in training. Overlapped,
        transfers and host work go on beside the device's, with the same results; the threads end in :meth:`detach`,
        or with the model.

        Raises:
            UsageError: the plan was made for another model or another dtype of it, ``base`` carries an adapter
                already, or known tokens cannot be weighed in its loss.
            MachineError: there is no such device.
        """
        how = Serving(rows_per_token, min_score)
        loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
        _require_planned_model(loaded, base)
        put_down = carry(base, None)
        restore, weighing = _restorer(base), ExitStack()
        try:
            weighing.enter_context(known_tokens_weighed(base, known_token_weight))
            session = open_session(
                loaded,
                base,
                _device(device, loaded, base),
                seed=seed,
                settings=settings,
                schedule=Overlapped() if schedule == "overlapped" else Sequential(),
                key_init=key_init,
            )
        except BaseException:
            weighing.close()
            put_down()
            restore()
            raise
        made = cls(base, session, partial(_take_off, session, restore), how=how)
        made.known_token_weight = known_token_weight
        made._ends += [put_down, weighing.close]
        if adapter is not None:
            try:
                checkpoint.load_adapter(session, Path(adapter))
            except UsageError:
                made.detach()
                raise
        return made

    # --- using it --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        """The base's forward with the adapter active; arguments and result are the base's."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **others}
        given = {name: value for name, value in given.items() if value is not None}
        return self._guide(given, lambda: self.base(**given))

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As :meth:`forward`, or whatever a library has put in its place (TRL's trainers do)."""
        given = dict(zip(("input_ids", "attention_mask", "labels"), args, strict=False)) | options
        return self._guide(given, lambda: super(AdapterModel, self).__call__(*args, **options))

    def _guide(self, given: Mapping[str, Any], forward: Callable[[], Any]) -> Any:
        """Run a forward of the base with the adapter active; in training, its backward will find what it needs."""
        if self._guided:
            return forward()
        self._guided = True
        try:
            if not (self.training and torch.is_grad_enabled() and self._session):
                with self._inference():
                    return forward()
            self.finish_backward()
            self._check_inputs(given)
            self._expect_tokens(given.get("attention_mask"))
            number = self._order.forward()
            outputs = forward()
            self._add_balance(outputs)
        finally:
            self._guided = False
        for name, anchor in differentiable(outputs):  # whichever the caller goes backward from
            anchor.register_hook(partial(self._begin_backward, number, name))
        return outputs

    def _add_balance(self, outputs: Any) -> None:
        """What the routing adds to the loss (``routing`` switch, stable); a caller with a loss of its own finds it with
        ``session.exchange.take_balance()``."""
        if getattr(outputs, "loss", None) is None:
            return
        balance = self.session.exchange.take_balance()
        if balance is not None:
            outputs.loss = outputs.loss + balance

    def generate(self, *args: Any, **options: Any) -> Any:
        """The base's ``generate`` with the adapter active."""
        with self._inference():
            return self.base.generate(*args, **options)  # type: ignore[operator]

    def detach(self) -> nn.Module:
        """Take the adapter off; returns the base exactly as it was."""
        if self._detach is None:
            raise MeftError("the adapter was detached already")
        self._abandoned.detach()
        for end in self._ends:
            end()
        self._detach()
        self._detach = None
        self._session = []
        return self.base

    # --- training it -----------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """What trains; a :class:`UsageError` for a model that only infers."""
        if not self._session:
            raise UsageError("this adapter is for inference: AdapterModel.from_plan(..., adapter=folder) trains one")
        return self._session[0]

    def optimizer(self, *, learning_rate: float, max_norm: float | None = 1.0) -> RowOptimizer:
        """AdamW over rows and routers, clipping both by their common norm; see :class:`RowOptimizer`."""
        return RowOptimizer(self.session, self.finish_backward, learning_rate=learning_rate, max_norm=max_norm)

    def freeze_routing(self) -> None:
        """Routing ``stable``, in a loop of one's own, between optimizer steps: its second stage begins. A Trainer does
        it after the plan's share of its steps."""
        self.finish_backward()
        set_stage(self.session, 2)

    @property
    def bypassed(self) -> bool:
        """Whether a forward of the base that runs now is one for training that was not asked of this model."""
        training = self.training and torch.is_grad_enabled() and bool(self._session)
        return training and not self._guided and self.session.adapter.serving is None

    def finish_backward(self) -> None:
        """Bring in the gradients that the last backward left on their way; the optimizer does it."""
        if self._in_backward:
            self._in_backward = False
            self.session.exchange.finish_backward()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that no step has used. Routers keep their buffers, whatever ``set_to_none`` says."""
        del set_to_none
        self.finish_backward()
        if self._session:
            self.session.forget_gradients()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter folder, whole or not at all; :meth:`from_pretrained` reads it.

        One that only infers is as the folder has it that it came from, which is read again and copied.
        """
        if self._source is not None:
            copy_adapter(self._source, Path(folder))
            return
        checkpoint.save_adapter(self.session, Path(folder), meft_version=VERSION)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter alone, under the names of an adapter folder: the base is frozen and has files of its own.

        What the folder's config says is there too, as bytes under ``_extra_state``: what a Trainer saves of a model is
        its state, and :meth:`from_pretrained` reads that.
        """
        del args, options
        return checkpoint.adapter_tensors(self.session) | {
            EXTRA_STATE: described(checkpoint.adapter_config(self.session, VERSION))
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The inverse of :meth:`state_dict`, in place."""
        del strict, assign
        self.finish_backward()
        if EXTRA_STATE in state_dict:
            config = description(state_dict[EXTRA_STATE], Path("state_dict"))
            _require_base(self.base, config, Path("state_dict"))
        checkpoint.restore_adapter(self.session, dict(state_dict), Path("state_dict"))
        return _IncompatibleKeys([], [])

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Nothing to do where the plan decided for checkpointing, and a :class:`UsageError` where it did not."""
        del args, options
        if self._session and not self.session.plan.decision.activation_checkpointing:
            raise UsageError(
                "activation checkpointing: the plan decided against it; plan with --activation-checkpointing"
            )

    gradient_checkpointing_enable = activation_checkpointing_enable

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # before __init__ has set it
                raise
            if hasattr(self.base, name):
                refuse_method(name)
            return getattr(self.base, name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What moves or casts every parameter: nothing that leaves a training model where it is."""
        if self._session:
            require_placed([each for each in self.base.parameters() if each.is_floating_point()], fn)
            return self
        return super()._apply(fn, recurse)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        if self._speaking is not None:
            with self._speaking.on():
                yield
            return
        if not self._session or self.session.adapter.serving is not None:
            yield
            return
        self.finish_backward()
        with serving(self.session, self._how):
            yield

    def _check_inputs(self, given: Mapping[str, Any]) -> None:
        """A training batch within the plan's size and, where asking costs nothing, within the vocabulary."""
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if tokens is None or tokens.dim() < 2:
            return
        require_planned_size(self.session.plan, tokens.shape)
        if "input_ids" in given and tokens.device.type == "cpu":
            check_token_ids(tokens.tolist(), self.session.plan.request.model.vocab_size, where="input_ids")

    def _row_gradient_norm(self) -> torch.Tensor | None:
        """Of the rows' gradients that no step has used, on the host; None where there are none, or none yet."""
        if not self._session or not self.session.exchange.window_open or self._order.awaited:
            return None
        self.finish_backward()
        return torch.tensor(self.session.row_gradient_norm())

    def _expect_tokens(self, attention_mask: torch.Tensor | None) -> None:
        """Leave padding out of the choice of rows."""
        if attention_mask is None or attention_mask.dim() != 2:
            return
        mask = attention_mask.flatten().bool()
        if mask.device.type != "cpu":
            host = self.session.engine.host_empty(*mask.shape, dtype=mask.dtype)
            self.session.engine.to_host(mask, host, category="inputs").wait_on_host()
            mask = host
        self.session.exchange.expect_tokens(mask)

    def _begin_backward(self, number: int, anchor: str, grad: torch.Tensor) -> torch.Tensor:
        if self._order.backward(number, anchor):
            self._in_backward = True
            self.session.exchange.begin_backward()
        return grad


def _device(name: DeviceName, plan: Plan, base: nn.Module) -> Device:
    """The device, on CUDA the one that the base lies on, if it does lie on one."""
    budget = plan.prediction.device_memory.allocator_budget_bytes
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        places = {parameter.device.index for parameter in base.parameters() if parameter.device.type == "cuda"}
        return CudaDevice(budget, next(iter(places)) if len(places) == 1 else None)
    return EmulatedDevice(budget)


def _take_off(session: Session, restore: Callable[[], None]) -> None:
    """Give the base back, even if a lane has failed."""
    try:
        session.drain()
    finally:
        session.close()
        session.adapter.detach()
        restore()


def _abandon(session: Session | None, detach: Callable[[], None], ends: list[Callable[[], None]]) -> None:
    """What is left of a model that nobody has any more: without waiting, as this runs wherever memory is freed."""
    for end in ends:
        end()
    if session is None:
        detach()
    else:
        session.close()
        session.adapter.detach()


def _restorer(base: nn.Module) -> Callable[[], None]:
    """Puts back what opening a session changes besides hooks and ``requires_grad``: modes and checkpointing."""
    modes = [(module, module.training) for module in base.modules()]
    checkpointing = bool(getattr(base, "is_activation_checkpointing", False))

    def restore() -> None:
        if not checkpointing and getattr(base, "is_activation_checkpointing", False):
            base.activation_checkpointing_disable()  # type: ignore[operator]
        for module, training in modes:
            module.training = training

    return restore


def _require_planned_model(plan: Plan, base: nn.Module) -> None:
    """Raise :class:`UsageError` where ``base`` is not what the plan was made for."""
    differences = plan.request.model.differences(_shape(base))
    if differences:
        listed = ", ".join(f"{name} {mine} in the plan, {here} here" for name, (mine, here) in differences.items())
        raise UsageError(f"the plan was made for {plan.request.model.name}, which this model is not: {listed}")
    require_planned_dtype(plan, base)


def _shape(model: Any) -> Any:
    config = model.config.to_dict()
    return shape_of(config, name=str(config.get("_name_or_path") or type(model).__name__))


def _require_base(model: nn.Module, config: checkpoint.AdapterConfig, folder: Path) -> None:
    checkpoint.require_base(config, _shape(model), checkpoint.base_digest(model), folder=folder)
