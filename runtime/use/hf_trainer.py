"""Training an :class:`AdapterModel` with ``transformers.Trainer``.

    model = AdapterModel.from_plan(base, "plan.json")
    trainer = Trainer(model=model, args=args, train_dataset=data, **trainer_arguments(model, args))
    trainer.train()                                # trainer.train(resume_from_checkpoint=True) goes on bit for bit
    model.save_pretrained("out/adapter")

The optimizer takes its learning rate and clipping norm from ``args``, and clips rows and routers together; the
Trainer's own clipping, which would see the routers alone, is switched off while it trains; the ``grad_norm`` that it
logs is that of rows and routers. Each checkpoint of the Trainer holds the adapter and the optimizer's state, not the
frozen base, and a folder ``adapter`` that :meth:`AdapterModel.from_pretrained` reads; so it does the folder that
``trainer.save_model(folder)`` writes. ``bf16=True`` goes with a plan for a base in bf16 or nf4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from meft.planner.base.errors import UsageError
from meft.runtime.session.stages import begin_second_stage_if_due
from meft.runtime.use.adapter_model import AdapterModel
from meft.runtime.use.row_optimizer import RowOptimizer


def trainer_arguments(model: AdapterModel, args: TrainingArguments) -> dict[str, Any]:
    """``optimizers`` and ``callbacks`` for ``transformers.Trainer(model=model, args=args, ...)``.

    Raises:
        UsageError: ``args`` asks for what an adapter on the host cannot do, or contradicts the plan.
    """
    _check(model, args)
    optimizer = model.optimizer(learning_rate=args.learning_rate, max_norm=args.max_grad_norm or None)
    return {"optimizers": (optimizer, None), "callbacks": [AdapterCallback(model, optimizer)]}


class AdapterCallback(TrainerCallback):
    """Moves clipping into the optimizer while training, and adds the adapter's folder to each checkpoint."""

    def __init__(self, model: AdapterModel, optimizer: RowOptimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self._max_norm = 0.0

    def on_train_begin(self, args: TrainingArguments, *others: Any, **more: Any) -> None:
        """Keep the Trainer from clipping the routers by themselves."""
        del others, more
        self._max_norm, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Routing ``stable``: begin its second stage if it is time."""
        del args, control, more
        begin_second_stage_if_due(self.model.session, state.global_step / state.max_steps)

    def on_train_end(self, args: TrainingArguments, *others: Any, **more: Any) -> None:
        """Give the arguments back as they were."""
        del others, more
        args.max_grad_norm = self._max_norm

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Write the adapter beside the Trainer's own files."""
        del control, more
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.model.save_pretrained(folder / "adapter")


def _check(model: AdapterModel, args: TrainingArguments) -> None:
    request = model.session.plan.request
    problems = [
        (args.fp16, "fp16: a loss scale does not reach the rows; plan with --weights-dtype bf16 and use bf16=True"),
        (
            args.bf16 and request.weights_dtype not in ("bf16", "nf4"),
            f"bf16: the plan's memory is for computing in {request.weights_dtype}; plan with --weights-dtype bf16 and "
            f"load the base with dtype=torch.bfloat16",
        ),
        (
            args.n_gpu > 1 or args.world_size > 1,
            "an adapter on the host serves one device; show one (CUDA_VISIBLE_DEVICES)",
        ),
        (
            args.per_device_train_batch_size > request.batch_size,
            f"per_device_train_batch_size {args.per_device_train_batch_size}: the plan's memory is for batches of "
            f"{request.batch_size}; lower it, or plan again",
        ),
        (
            _checkpointing(args) and not model.session.plan.decision.activation_checkpointing,
            "activation_checkpointing: the plan decided against it; plan with --activation-checkpointing instead",
        ),
        (
            args.label_smoothing_factor and model.known_token_weight != 1,
            f"label_smoothing_factor {args.label_smoothing_factor:g}: the Trainer then makes the loss, in which "
            f"known_token_weight {model.known_token_weight:g} does not count; leave one of them out",
        ),
        (args.weight_decay != model.session.settings.weight_decay, _differs("weight_decay", args, model)),
    ]
    found = [text for wrong, text in problems if wrong]
    if found:
        raise UsageError("TrainingArguments: " + "; ".join(found))


def _checkpointing(args: TrainingArguments) -> bool:
    """Under its name in this version of transformers."""
    name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    return bool(getattr(args, name))


def _differs(name: str, args: TrainingArguments, model: AdapterModel) -> str:
    mine = getattr(model.session.settings, name)
    return (
        f"{name} {getattr(args, name)}: the model was opened with {mine}; AdapterModel.from_plan(settings=...) sets it"
    )
