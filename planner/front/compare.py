"""Every method side by side, for the same workload and budget."""

from __future__ import annotations

from meft.planner.base.dtypes import WeightsDtype
from meft.planner.base.errors import Infeasible, UsageError
from meft.planner.base.version import VERSION
from meft.planner.front.estimate import usual_meft
from meft.planner.front.request import Planning
from meft.planner.predict.comparison import (
    DENSE_NAMES,
    USUAL_SIZES,
    MethodComparison,
    MethodRow,
    compare_dense,
    first_that_fits,
)
from meft.planner.predict.estimates import estimate_meft
from meft.planner.search.search import make_plan


def compare_methods(planned: Planning) -> MethodComparison:
    """MEFT as it would be planned, and the dense methods."""
    request, profiles = planned.request, planned.profiles
    if request.ranks > 1:
        given = f"--gpus {request.gpus}" if request.nodes == 1 else f"--nodes {request.nodes}"
        raise UsageError(f"{given}: compare is about one card; meft-plan {given} says how a plan scales")
    if request.model.measured is not None:
        raise UsageError(
            f"compare: it weighs hundreds of simulated runs, and {request.model.model_type} has no closed form to "
            f"simulate; give meft-plan estimate --method METHOD, which traces one"
        )
    base: WeightsDtype = "bf16" if request.weights_dtype == "nf4" else request.weights_dtype
    names = [name for name in DENSE_NAMES if name != "qlora" or not profiles.gpu.shares_host_cores]
    dense = [
        compare_dense(
            name, request=request, gpu=profiles.gpu, link=profiles.link, host=profiles.host, weights_dtype=base
        )
        for name in names
    ]
    notes = [
        "device: peak reserved; traffic and step: per micro-batch, the optimizer's share included",
        f"dense methods: fp32 adapters, AdamW, {base} weights (QLoRA: nf4, double-quantized), no padding, outputs kept",
    ]
    if len(names) < len(DENSE_NAMES):
        notes.append("qlora: its kernels need a CUDA device")
    return MethodComparison(request=request, rows=(_meft_row(planned), *dense), notes=(*notes, *planned.notes))


def _meft_row(planned: Planning) -> MethodRow:
    found = make_plan(planned.request, planned.profiles, meft_version=VERSION)
    if isinstance(found, Infeasible):
        largest, because = None, found.message
    else:
        largest = estimate_meft(found.request, found.decision, found.prediction)
        because = f"what meft-plan chooses, K {found.decision.top_k}"
    configurations = usual_meft(planned)
    return MethodRow(
        method="meft",
        usual=first_that_fits(configurations),
        usual_because=f"{USUAL_SIZES['meft'].because}, no rows kept on the device",
        usual_configurations=configurations,
        largest=largest,
        largest_because=because,
    )
