"""Options as people type them who come from other tools: what they are called here.

A command line knows which options its command has; :func:`option_hint` tells which of them an unknown one means: by a
table of other names, by its spelling, or that another command takes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import click

_OTHER_NAMES: Mapping[tuple[str, ...], str] = {
    ("--learning-rate",): "lr learn-rate rate peak-lr max-lr",
    ("--batch-size",): "bs batch micro-batch micro-batch-size train-batch-size per-device-train-batch-size batchsize",
    ("--epochs", "--steps"): "epoch epochs num-epochs n-epochs num-train-epochs",
    ("--steps",): "max-steps num-steps n-steps iters iterations max-iters train-steps step",
    ("--output-dir", "--output"): "output output-dir out out-dir outdir save-dir save output-folder output-file dest o",
    ("--gpu-mem",): "gpu-memory gpumem gpu-ram vram mem memory device-mem device-memory max-gpu-memory",
    ("--host-mem",): "host-memory hostmem ram cpu-mem cpu-memory cpu-ram host-ram",
    ("--seq-len",): "max-length max-len max-seq-len max-seq-length seq-length sequence-length seqlen context "
    "context-length ctx ctx-len block-size cutoff-len model-max-length length",
    ("--rank", "--adapter-width"): "rank r lora-r lora-rank",
    ("--adapter-width",): "width adapter-size adapter-dim bottleneck bottleneck-size rows",
    ("--top-k",): "k topk",
    ("--grad-accum",): "accum gas gradient-accumulation gradient-accumulation-steps grad-accumulation "
    "grad-accum-steps grad-accumulation-steps accumulate",
    ("--weights-dtype",): "dtype torch-dtype precision bf16 fp16 load-in-4bit load-in-8bit 4bit quantization quant "
    "quantize bits weight-dtype",
    ("--activation-checkpointing",): "gradient-checkpointing grad-checkpointing checkpointing ac recompute",
    ("--attention",): "attn attn-implementation attn-impl flash flash-attn flash-attention sdpa",
    ("--model",): "model-name model-name-or-path model-path model-dir base-model base model-id m",
    ("--data",): "dataset dataset-path dataset-name train-data train-file training-data data-path data-file input "
    "input-file file train",
    ("--eval",): "eval-data eval-dataset eval-file eval-task validation validation-file test-data test",
    ("--eval-every",): "eval-steps eval-interval evaluation-steps",
    ("--save-every",): "save-steps save-interval checkpoint-every checkpoint-interval",
    ("--warmup",): "warmup-steps warmup-ratio warmup-fraction",
    ("--max-grad-norm",): "clip grad-clip clip-grad gradient-clipping max-norm clip-grad-norm",
    ("--weight-decay",): "wd decay",
    ("--resume",): "resume-from resume-from-checkpoint continue from-checkpoint",
    ("--device", "--gpu"): "cuda cpu gpu-id devices accelerator",
    ("--gpu",): "card gpu-name gpu-type",
    ("--seed",): "random-seed rng-seed data-seed",
    ("--adapter",): "adapter-path adapter-dir adapter-name lora lora-path peft checkpoint weights",
    ("--method",): "peft-method mode type",
    ("--target-modules",): "targets target lora-targets lora-target-modules modules",
    ("--optimizer",): "optim opt",
    ("--prefetch-depth",): "prefetch depth lookahead",
    ("--max-new-tokens",): "max-tokens new-tokens max-output-tokens num-predict",
    ("--rehearse", "--verify"): "dry-run dryrun simulate",
    ("--gpu-mem", "--host-mem"): "budget max-memory",
    ("--json",): "as-json output-json format",
    ("--verbose",): "v verbosity details all",
    ("--link",): "pcie bus",
}
"""Names of other tools, by what they are called here: the first that the command has is meant."""

_MEANT = {name: options for options, names in _OTHER_NAMES.items() for name in names.split()}

OF_THE_PLAN = (
    *("--gpu", "--host-mem", "--batch-size", "--seq-len", "--grad-accum", "--adapter-width", "--top-k"),
    *("--prefetch-depth", "--weights-dtype", "--adapter-dtype", "--attention", "--activation-checkpointing"),
    *("--routing", "--hot-rows", "--max-slowdown", "--host", "--link"),
)
"""What meft-plan decides and meft-run obeys."""
OF_THE_RUN = (
    *("--learning-rate", "--steps", "--data", "--output-dir", "--device", "--resume", "--rehearse", "--eval"),
    *("--eval-every", "--save-every", "--warmup", "--weight-decay", "--max-grad-norm", "--seed"),
)
"""What meft-run is told and no plan depends on."""


def one_line(error: click.ClickException, *, program: str, default_command: str, arguments: Iterable[str]) -> str:
    """Click's message, what an unknown option means, and where to read on; ``arguments`` are the command line's."""
    context = getattr(error, "ctx", None)
    path = context.command_path.removesuffix(f" {default_command}") if context is not None else program
    message = " ".join(error.format_message().split()).rstrip(".")
    if isinstance(error, click.NoSuchOption):
        known = [name for each in context.command.get_params(context) for name in each.opts] if context else []
        message = _no_such_option(as_typed(error.option_name, arguments), known, program)
    return f"{message}{'' if message.endswith('?') else ';'} {path} --help lists what there is"


def _no_such_option(option: str, known: list[str], program: str) -> str:
    hint = option_hint(option, known, program=program)
    return f"no such option {option}" + (f"; {hint}" if hint else "")


def option_hint(given: str, known: Iterable[str], *, program: str) -> str:
    """What an unknown option means, as the end of a sentence; empty when nothing is like it.

    >>> option_hint("--lr", ["--learning-rate", "--steps"], program="meft-run")
    'did you mean --learning-rate?'
    >>> option_hint("--bs", ["--learning-rate", "--steps"], program="meft-run")
    'the plan decides that: meft-plan --batch-size'
    """
    options = list(known)
    name = given.lstrip("-").partition("=")[0].replace("_", "-").lower()
    meant = [option for option in (f"--{name}", *_MEANT.get(name, ())) if option in options]
    if meant:
        return f"did you mean {meant[0]}?"
    if elsewhere := _elsewhere((f"--{name}", *_MEANT.get(name, ())), program):
        return elsewhere
    import difflib  # only mistakes need it, and it is slow to load

    near = difflib.get_close_matches(f"--{name}", options, n=3, cutoff=0.6)
    return f"did you mean {', '.join(near)}?" if near else ""


def _elsewhere(meant: tuple[str, ...], program: str) -> str:
    """An option of the other command."""
    for option in meant:
        if program != "meft-plan" and option in OF_THE_PLAN:
            return f"the plan decides that: meft-plan {option}"
        if program != "meft-run" and option in OF_THE_RUN:
            return f"that is told to the run: meft-run plan.json {option}"
    return ""


def as_typed(option: str, arguments: Iterable[str]) -> str:
    """The whole word of which a parser saw a short option: ``-l`` of ``-lr``."""
    if option.startswith("--"):
        return option
    return next((word for word in arguments if word.startswith(option) and not word.startswith("--")), option)


def torchrun_words(*, nodes: int, gpus: int) -> list[str]:
    """How ranks of several machines are begun, on each of them; what ``meft-run`` is given follows."""
    numbers = ["--nnodes", str(nodes), "--nproc-per-node", str(gpus)]
    return ["torchrun", *numbers, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29400", "-m", "meft.run"]
