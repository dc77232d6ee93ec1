"""Methods of the runtime on a tiny model: which settings each type of peft needs there, setups and trainers."""

from __future__ import annotations

from sessions import random_examples
from sparse_setup import AMPLE_BYTES

from meft.planner.records.peft_methods import PeftMethod
from meft.planner.records.setup import TrainingSetup
from meft.runtime.device.device import EmulatedDevice
from meft.runtime.methods.opening import load_model, model_shape, open_method
from meft.runtime.methods.peft_methods import REFUSED, checked, known_types
from meft.runtime.methods.training import MethodTrainer
from meft.runtime.training.training import TrainingOptions

VIRTUAL = {"num_virtual_tokens": 4}
ARGUMENTS: dict[str, dict[str, object]] = {
    "adaption-prompt": {"adapter_len": 4, "adapter_layers": 2},
    "c3a": {"block_size": 32},
    "fourierft": {"n_frequency": 64},
    "miss": {"r": 8},
    "p-tuning": VIRTUAL | {"encoder_hidden_size": 32},
    "prefix-tuning": VIRTUAL,
    "prompt-tuning": VIRTUAL,
    "psoft": {"r": 8},
    "road": {"group_size": 32},
    "shira": {"r": 4},
    "trainable-tokens": {"token_indices": [5, 9, 12]},
    "vblora": {"vector_length": 32, "num_vectors": 32},
    "waveft": {"n_frequency": 64},
}
"""What a type cannot do without on a model of width 128."""
TYPES = [*(name for name in known_types() if PeftMethod(peft_type=name).enum_name not in REFUSED), "dora"]
"""Also the list of docs/methods.md."""
LEARNING_RATE, STEPS = 1e-2, 2


def peft_setup(folder, name: str, **changes: object) -> TrainingSetup:
    peft = checked(PeftMethod(peft_type=name, arguments=ARGUMENTS.get(name, {})))
    fields: dict[str, object] = {"method": "peft", "peft": peft}
    return small_setup(folder, **(fields | changes))


def small_setup(folder, **fields: object) -> TrainingSetup:
    usual = {"batch_size": 2, "seq_len": 12, "weights_dtype": "fp32", "outputs_kept": False, "emulated": True}
    return TrainingSetup.model_validate({"model": model_shape(folder)} | usual | fields)


def trainer_of(setup, folder, *, steps: int = STEPS, output=None, budget_bytes: int = AMPLE_BYTES) -> MethodTrainer:
    model = load_model(setup, folder, device_kind="emulated")
    session = open_method(setup, model, EmulatedDevice(budget_bytes), seed=0)
    examples = random_examples(6, length=setup.seq_len, vocab_size=setup.model.vocab_size)
    options = TrainingOptions(steps=steps, learning_rate=LEARNING_RATE, warmup_fraction=0.0)
    return MethodTrainer(session, examples, options, pad_id=0, meft_version="0.0.0", output=output, setup=setup)
