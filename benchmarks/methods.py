"""Every method on SmolLM2-135M: airport facts (IATA code to city) by ``meft-run compare``, with forgetting on prose.

    python benchmarks/methods.py --output-dir benchmarks/methods_results [--facts 300] [--seeds 2]

Writes the facts as statements to complete ("Airport JFK is in" ... " New York"; the question with the chat template
would take five times the tokens) and prose of the factbook, prunes the model to 2:4 on other prose of it (once, into
its own folder), then runs ``meft-run compare``, which goes on where it was stopped. What is committed was made so.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import click

from meft.runtime.cli.compare import DEFAULT_METHODS, compare_command
from meft.runtime.cli.prune import prune_command
from meft.runtime.data.task_sources import factbook_prose, load_task

QUESTION, STATEMENT = "Which city does the airport with IATA code {} serve?", "Airport {} is in"
CANDIDATES = 4
"""So many times the facts are looked at for short ones."""
FURTHER = (
    "peft:p-tuning", "peft:shira", "bitfit", "meft:weights_dtype=nf4", "meft:tokens_see=own",
    "meft:routing=key-experts", "meft:routing=centroid", "meft:routing=switch", "meft:routing=stable",
)  # fmt: skip
"""Beside what is compared by default; and MEFT over a pruned base."""
SPARSITY, CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = "2:4", 64, 256


@click.command(context_settings={"show_default": True})
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--model", type=click.Path(path_type=Path), help="[default: the embedded SmolLM2-135M]")
@click.option("--facts", type=int, default=300)
@click.option("--seeds", type=int, default=2)
@click.option("--epochs", type=float, default=6.0)
@click.option("--seq-len", type=int, default=11, help="Facts that are longer are left out.")
@click.option("--texts", type=int, default=16, help="Of prose.")
@click.option("--gpu-mem", default="4GiB")
@click.option(
    "--weights-dtype", default="bf16", help="Several times as fast as fp32 where the processor has products of it."
)
@click.option("--attention", default="eager", help="sdpa's backward in bf16 takes a CPU eight times as long.")
@click.option("--methods", help="[default: those of meft-run compare, nine more and MEFT over a pruned base]")
def main(
    output_dir: Path, model: Path | None, facts: int, seq_len: int, texts: int, methods: str | None, **given: object
) -> None:
    """Make the data and compare."""
    from meft.runtime.cli.use import base_folder
    from meft.runtime.session.model_loading import load_tokenizer

    folder = base_folder(model)
    tokenizer = load_tokenizer(folder)
    output_dir.mkdir(parents=True, exist_ok=True)
    data, prose = output_dir / "facts.jsonl", output_dir / "prose.jsonl"
    lines = []
    for item in load_task("airports", limit=CANDIDATES * facts).items:
        about = re.fullmatch(re.escape(QUESTION).replace(r"\{\}", "(.+)"), item.prompt)
        assert about is not None
        prompt, completion = STATEMENT.format(about[1]), f" {item.completion}"
        if len(tokenizer.encode(prompt + completion)) < seq_len:
            lines.append({"prompt": prompt, "completion": completion, "answers": list(item.answers)})
    data.write_text("".join(json.dumps(line) + "\n" for line in lines[:facts]))
    prose.write_text("".join(json.dumps({"text": text}) + "\n" for text in factbook_prose(texts)))
    if methods is None:
        base = pruned(folder, output_dir / "pruned", leave_out=texts)
        methods = ",".join((*DEFAULT_METHODS, *FURTHER, f"meft:model={base}"))
    options = ["--model", folder, "--data", data, "--eval", data, "--prose", prose, "--output-dir", output_dir, "--raw"]
    options += ["--seq-len", seq_len, "--max-new-tokens", 6, "--methods", methods]
    for name, value in given.items():
        options += [f"--{name.replace('_', '-')}", value]
    compare_command.main([str(each) for each in options], standalone_mode=False)


def pruned(folder: Path, output: Path, *, leave_out: int) -> Path:
    """The model pruned by SparseGPT, calibrated on the factbook without the texts whose loss is told."""
    if not output.exists():
        with tempfile.TemporaryDirectory() as scratch:
            calibration = Path(scratch) / "calibration.jsonl"
            texts = factbook_prose()[leave_out:]
            calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            options = ["--model", folder, "--data", calibration, "--sparsity", SPARSITY, "--output", output]
            options += ["--sequences", CALIBRATION_SEQUENCES, "--seq-len", CALIBRATION_TOKENS, "--device", "cpu"]
            prune_command.main([str(each) for each in options], standalone_mode=False)
    return output


if __name__ == "__main__":
    main()
