"""The operators of a decoder as torch runs them on CUDA: what each makes, keeps for backward, and makes there.

Sizes are elements; ``T`` tokens, ``S`` sequence length, ``H`` heads, ``G`` key-value heads, ``d`` head size, ``V``
vocabulary. The rules were read from torch 2.13's derivative formulas and CUDA kernels;
``tests/planner/simulation/test_run.py`` holds them against traces of real models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meft.planner.simulation.autograd import (
    GRADIENTS,
    TEMPORARIES,
    Backward,
    Gradients,
    Leaf,
    Tape,
    Tensor,
    as_outputs,
    as_view,
)
from meft.planner.terms.formats import BOOL, FP16, FP32, promoted


@dataclass(frozen=True)
class Weights:
    """A linear layer ``inputs -> outputs``: its weight, and its bias if it has one."""

    inputs: int
    outputs: int
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class QuantizedWeights:
    """A linear layer in 4 bits, written out in ``compute_bytes`` a weight whenever it is multiplied."""

    inputs: int
    outputs: int
    stored: tuple[Tensor, ...]
    compute_bytes: int
    bias: Tensor | None = None


@dataclass
class Operators:
    """Operators on one tape. ``autocast_bytes``: the item size to which autocast casts the inputs of products."""

    tape: Tape
    autocast_bytes: int | None = None
    workspace_bytes: int = 0
    cpu_kernels: bool = False
    """As the emulated device runs: attention is one kernel for every type and for grouped heads."""
    _casts: dict[int, Tensor] = field(default_factory=dict)
    _workspaces: dict[bool, Tensor] = field(default_factory=dict)

    # --- elementwise ------------------------------------------------------------------------------------------------

    def cast(self, x: Tensor, itemsize: int, category: str) -> Tensor:
        """``x.to(dtype)``: nothing when it is of that dtype already."""
        if x.itemsize == itemsize:
            return x
        out = self.tape.new(x.numel, itemsize, category)
        return self.tape.connect(out, (x,), self._gradient_like(x))

    def scale(self, x: Tensor, category: str) -> Tensor:
        """A product with a number."""
        return self.tape.unary(x, category)

    def shift(self, x: Tensor, category: str) -> Tensor:
        """A sum with a number, whose gradient passes."""
        return self.tape.connect(self.tape.like(x, category), (x,), lambda grad: (grad.detached(),))

    def add(self, a: Tensor, b: Tensor, category: str) -> Tensor:
        """A sum, in the wider dtype; the gradient is one and the same for both."""
        out = self.tape.new(max(a.numel, b.numel), promoted(a.itemsize, b.itemsize), category)
        return self.tape.connect(out, (a, b), lambda grad: (grad.detached(), grad.detached()))

    def multiply(self, a: Tensor, b: Tensor, category: str) -> Tensor:
        """A product: each factor is kept if the other needs a gradient."""
        tape = self.tape
        numel, itemsize = max(a.numel, b.numel), promoted(a.itemsize, b.itemsize)
        if not tape.differentiates(a, b):
            return tape.new(numel, itemsize, category)
        kept_b = tape.save(b) if a.requires_grad else None
        kept_a = tape.save(a) if b.requires_grad else None
        out = tape.new(numel, itemsize, category)

        def backward(grad: Tensor) -> Gradients:
            of_b = None if kept_a is None else tape.like(grad, TEMPORARIES)  # the second factor's first, as in torch
            of_a = None if kept_b is None else tape.like(grad, TEMPORARIES)
            return of_a, of_b

        return tape.connect(out, (a, b), backward)

    def power(self, x: Tensor, category: str) -> Tensor:
        """``x ** n``: its backward raises, scales and multiplies anew. Autocast runs it in fp32."""
        tape = self.tape
        if self.autocast_bytes is not None:
            x = self.cast(x, FP32, category)
        out = tape.like(x, category)
        kept = tape.save(x)

        def backward(_grad: Tensor) -> Gradients:
            raised = tape.like(kept, TEMPORARIES)
            scaled = tape.like(raised, TEMPORARIES)
            product = tape.like(scaled, TEMPORARIES)
            del raised, scaled  # C++ holds what an expression made until its end
            return (product,)

        return tape.connect(out, (x,), backward)

    def keeps_input(self, x: Tensor, category: str) -> Tensor:
        """A kernel of its own whose backward needs the input (silu, gelu)."""
        return self.tape.unary(x, category, saves=x)

    def keeps_output(self, x: Tensor, category: str) -> Tensor:
        """A kernel whose backward needs the output (tanh, relu, sigmoid, rsqrt, softmax)."""
        out = self.tape.like(x, category)
        return self.tape.connect(out, (x,), self.tape.one_gradient(self.tape.save(out)))

    def softmax_in_fp32(self, x: Tensor, category: str) -> Tensor:
        """Probabilities in fp32; CUDA's kernel takes fp16 scores as they are, others are cast first."""
        if x.itemsize != FP16:
            return self.keeps_output(self.cast(x, FP32, category), category)
        out = self.tape.new(x.numel, FP32, category)
        return self.tape.connect(out, (x,), self.tape.one_gradient(self.tape.save(out), itemsize=FP16))

    def safe_softmax(self, x: Tensor, category: str) -> Tensor:
        """Softmax whose rows may be all masked: it is computed, such rows are found, and zeros written over them."""
        out = self.keeps_output(x, category)
        masked = self.tape.new(x.numel, BOOL, category)
        del masked
        return out

    def dropout(self, x: Tensor, category: str, *, active: bool) -> Tensor:
        """Dropout with a mask of one byte an element, on the CPU with factors like its input; nothing at rate 0."""
        if not active:
            return x
        if self.cpu_kernels:
            factors = self.tape.like(x, category)
            return self.tape.connect(self.tape.like(x, category), (x,), self.tape.one_gradient(self.tape.save(factors)))
        out = self.tape.like(x, category)
        mask = self.tape.new(x.numel, BOOL, category)
        return self.tape.connect(out, (x,), self.tape.one_gradient(self.tape.save(mask)))

    def concatenate(self, parts: tuple[Tensor, ...], category: str) -> Tensor:
        """A copy that holds all parts; their gradients are views of its own."""
        out = self.tape.new(sum(part.numel for part in parts), parts[0].itemsize, category)
        sizes = tuple(part.numel for part in parts)
        return self.tape.connect(
            out, parts, lambda grad: tuple(Tensor(grad.storage, size, grad.itemsize) for size in sizes)
        )

    def slice(self, x: Tensor, numel: int) -> Tensor:
        """A view of some of the elements; its gradient is as large as the whole."""
        out = Tensor(x.storage, numel, x.itemsize)
        return self.tape.connect(out, (x,), self.tape.one_gradient(numel=x.numel))

    def heads_first(self, x: Tensor, num_heads: int) -> Tensor:
        """A view ``[B, H, S, d]`` of ``[B, S, H d]`` whose gradient comes with the heads outermost: to be that of a
        product it is copied."""
        if num_heads == 1:
            return x
        view = Tensor(x.storage, x.numel, x.itemsize)
        return self.tape.connect(view, (x,), self.tape.one_gradient())

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Views of all elements; their gradients are put together."""
        parts = [Tensor(x.storage, size, x.itemsize) for size in sizes]
        tape, numel, itemsize = self.tape, x.numel, x.itemsize
        as_outputs(tape, parts, (x,), lambda *_grads: (tape.new(numel, itemsize, TEMPORARIES),))
        return tuple(parts)

    def copy(self, x: Tensor, category: str) -> Tensor:
        """``contiguous`` where the layout asks for it: the gradient passes."""
        return self.tape.connect(self.tape.like(x, category), (x,), lambda grad: (grad.detached(),))

    def additive_mask(self, _mask: Tensor, numel: int, itemsize: int) -> Tensor:
        """A mask of bytes as ``numel`` numbers to add."""
        return self.tape.new(numel, itemsize, "attention")

    # --- products ---------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, layer: Weights | QuantizedWeights, category: str) -> Tensor:
        """``x W^T + b``."""
        if isinstance(layer, QuantizedWeights):
            return self._quantized_linear(x, layer, category)
        tape = self.tape
        x, weight = self._autocast(x, category), self.autocast_weight(layer.weight)
        bias = None if layer.bias is None else self.autocast_weight(layer.bias)
        self.use_workspace()
        numel = x.numel // layer.inputs * layer.outputs
        if not tape.differentiates(x, weight, bias):
            return tape.new(numel, x.itemsize, category)
        kept_weight = tape.save(weight) if x.requires_grad else None
        kept_x = tape.save(x) if weight.requires_grad else None
        out = tape.new(numel, x.itemsize, category)
        of_x, of_weight = _category(x), _category(weight)
        size_x, size_weight = x.numel, weight.numel
        bias_size = bias.numel if bias is not None and bias.requires_grad else 0

        def backward(grad: Tensor) -> Gradients:
            self.use_workspace(backward=True)
            of_bias = tape.new(bias_size, grad.itemsize, GRADIENTS) if bias_size else None
            gradient_x = None if kept_weight is None else as_view(tape.new(size_x, grad.itemsize, of_x))
            gradient_weight = None if kept_x is None else as_view(tape.new(size_weight, grad.itemsize, of_weight))
            return gradient_x, gradient_weight, of_bias

        return tape.connect(out, (x, weight, bias), backward)

    def _quantized_linear(self, x: Tensor, layer: QuantizedWeights, category: str) -> Tensor:
        """bitsandbytes' 4-bit layer: input cast, weight written out and multiplied both ways, output cast back."""
        tape, outer = self.tape, x.itemsize
        x = self.cast(x, layer.compute_bytes, category)
        numel = layer.inputs * layer.outputs
        self.use_workspace()
        written = tape.new(numel, layer.compute_bytes, "dequantized_weight")
        with tape.no_grad():  # autocast still holds inside of the layer's own function
            multiplied = (self._autocast(x, category), self._autocast(written, "dequantized_weight"))
        out = tape.new(x.numel // layer.inputs * layer.outputs, multiplied[0].itemsize, category)
        del written, multiplied
        if tape.differentiates(x):
            kept = tuple(tape.save(part, hooked=False) for part in layer.stored[:1])
            size_x = x.numel

            def backward(grad: Tensor) -> Gradients:
                _ = kept
                self.use_workspace(backward=True)
                again = tape.new(numel, grad.itemsize, "dequantized_weight")
                gradient = tape.new(size_x, grad.itemsize, TEMPORARIES)
                del again
                return (gradient,)

            out = tape.connect(out, (x,), backward)
        del x
        return self.cast(out, outer, category)

    def batched_product(self, a: Tensor, b: Tensor, numel: int, category: str) -> Tensor:
        """``bmm``: each factor is kept if the other needs a gradient."""
        tape = self.tape
        a, b = self._autocast(a, category), self._autocast(b, category)
        self.use_workspace()
        out = tape.new(numel, a.itemsize, category)
        if not tape.differentiates(a, b):
            return out
        kept_a = tape.save(a) if b.requires_grad else None
        kept_b = tape.save(b) if a.requires_grad else None
        size_a, size_b = a.numel, b.numel

        def backward(grad: Tensor) -> Gradients:
            self.use_workspace(backward=True)
            of_b = None if kept_a is None else tape.new(size_b, grad.itemsize, TEMPORARIES)
            of_a = None if kept_b is None else tape.new(size_a, grad.itemsize, TEMPORARIES)
            return of_a, of_b

        return tape.connect(out, (a, b), backward)

    def _autocast(self, x: Tensor, category: str) -> Tensor:
        return x if self.autocast_bytes is None else self.cast(x, self.autocast_bytes, category)

    def autocast_weight(self, weight: Tensor) -> Tensor:
        """Autocast's copy of an fp32 weight: kept until the forward ends if the weight is trained, else made anew."""
        if self.autocast_bytes is None or weight.itemsize == self.autocast_bytes:
            return weight
        if not isinstance(weight.node, Leaf):
            return self.cast(weight, self.autocast_bytes, "autocast_weights")
        key = weight.storage.number
        if key not in self._casts:
            self._casts[key] = self.cast(weight, self.autocast_bytes, "autocast_weights")
        return self._casts[key]

    def leave_autocast(self) -> None:
        """The forward is over: autocast forgets its copies of weights (nodes may keep them)."""
        self._casts.clear()

    def use_workspace(self, *, backward: bool = False) -> None:
        """cuBLAS takes its workspace at a thread's first product; autograd's thread has its own."""
        in_autograd = backward or self.tape.phase == "backward"
        if self.workspace_bytes and in_autograd not in self._workspaces:
            self._workspaces[in_autograd] = self.tape.new(self.workspace_bytes, 1, "cublas_workspaces")

    # --- norms ------------------------------------------------------------------------------------------------------

    def rms_norm(
        self, x: Tensor, weight: Tensor, width: int, *, weight_in_fp32: bool = False, weight_before_cast: bool = False
    ) -> Tensor:
        """RMSNorm as transformers writes it, in fp32; Gemma also multiplies by its weight there, OLMo 2 as it is."""
        outer = x.itemsize
        wide = self.cast(x, FP32, "norms")
        variance = self._mean_square(wide, x.numel // width)  # a name of the module's, there until it returns
        root = self._inverse_root(self.shift(variance, "norms"))
        normalised = self.multiply(wide, root, "norms")
        del wide, root
        if weight_before_cast:
            normalised = self.multiply(weight, normalised, "norms")
            return self.cast(normalised, outer, "norms")
        if not weight_in_fp32:
            return self.multiply(weight, self.cast(normalised, outer, "norms"), "norms")
        scale = self.shift(self.cast(weight, FP32, "norms"), "norms")
        normalised = self.multiply(normalised, scale, "norms")
        return self.cast(normalised, outer, "norms")

    def fused_rms_norm(self, x: Tensor, weight: Tensor, width: int, *, in_place: bool) -> Tensor:
        """One kernel: keeps its input and a factor per row; its gradient is written over the incoming one."""
        tape = self.tape
        out, factors = tape.like(x, "norms"), tape.new(x.numel // width, FP32, "norms")
        if not tape.differentiates(x, weight):
            return out
        kept = (tape.save(x), tape.save(factors))
        trained, parameter = weight.requires_grad, weight.detached()

        def backward(grad: Tensor) -> Gradients:
            _ = kept
            of_weight = tape.like(parameter, GRADIENTS) if trained else None
            return (grad.detached() if in_place else tape.like(grad, TEMPORARIES)), of_weight

        return tape.connect(out, (x, weight), backward)

    def fused_gate(self, gate: Tensor, up: Tensor, category: str) -> Tensor:
        """Activation and product in one kernel, whose gradients are written over gate and up."""
        tape = self.tape
        out = tape.like(gate, category)
        kept = (tape.save(gate), tape.save(up))
        return tape.connect(out, (gate, up), lambda _grad: tuple(each.detached() for each in kept))

    def rotated_in_place(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated where it lies, and its gradient where that lies; the tables are kept."""
        view = Tensor(x.storage, x.numel, x.itemsize)
        kept = tuple(self.tape.save(table) for table in tables)

        def backward(grad: Tensor) -> Gradients:
            _ = kept
            return (grad.detached(),)

        return self.tape.connect(view, (x,), backward)

    def _mean_square(self, wide: Tensor, rows: int) -> Tensor:
        """One number a row."""
        squares = self.power(wide, "norms")
        mean = self.tape.new(rows, FP32, "norms")
        return self.tape.connect(mean, (squares,), self._gradient_like(squares))

    def _inverse_root(self, x: Tensor) -> Tensor:
        """``rsqrt``, whose backward raises and multiplies twice."""
        tape = self.tape
        out = tape.like(x, "norms")
        kept = tape.save(out)

        def backward(_grad: Tensor) -> Gradients:
            raised, scaled = tape.like(kept, TEMPORARIES), tape.like(kept, TEMPORARIES)
            product = tape.like(kept, TEMPORARIES)
            del raised, scaled
            return (product,)

        return tape.connect(out, (x,), backward)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, width: int) -> Tensor:
        """One kernel: keeps its input, a mean and a factor per row. Autocast runs it in fp32."""
        tape = self.tape
        if self.autocast_bytes is not None:
            x = self.cast(x, FP32, "norms")
        rows = x.numel // width
        out = tape.like(x, "norms")
        mean, factor = tape.new(rows, FP32, "norms"), tape.new(rows, FP32, "norms")
        if not tape.differentiates(x, weight, bias):
            return out
        kept = (tape.save(x), tape.save(mean), tape.save(factor))
        of_x, trained, parameter = x.requires_grad, weight.requires_grad, weight.detached()

        def backward(grad: Tensor) -> Gradients:
            _ = kept
            gradient = tape.like(grad, TEMPORARIES) if of_x else None
            of_weight = tape.like(parameter, GRADIENTS) if trained else None
            of_bias = tape.like(parameter, GRADIENTS) if trained else None
            return gradient, of_weight, of_bias

        return tape.connect(out, (x, weight, bias), backward)

    # --- ends -------------------------------------------------------------------------------------------------------

    def embedding(self, weight: Tensor, tokens: int, width: int) -> Tensor:
        """Rows of a table; a trained one gets a dense gradient."""
        tape = self.tape
        out = tape.new(tokens * width, weight.itemsize, "embeddings")
        numel = weight.numel

        def backward(grad: Tensor) -> Gradients:
            return (tape.new(numel, grad.itemsize, GRADIENTS),)

        return tape.connect(out, (weight,), backward)

    def cross_entropy(self, logits: Tensor, *also_kept: Tensor) -> Tensor:
        """As torch runs it: the log-probabilities are kept, and their gradient is as large. ``also_kept``: the targets,
        where they are counted."""
        tape = self.tape
        log_probabilities = tape.like(logits, "loss_chain")
        kept = tape.save(log_probabilities)
        log_probabilities = tape.connect(log_probabilities, (logits,), self._gradient_like(kept, "loss_chain"))
        loss = tape.new(1, FP32, "loss_chain")
        of_loss = self._gradient_like(tape.save(log_probabilities), "loss_chain")
        if not also_kept:
            return tape.connect(loss, (log_probabilities,), of_loss)
        held = (*also_kept, tape.new(1, FP32, "loss_chain"))  # and the sum of the targets' weights

        def backward(grad: Tensor) -> Gradients:
            _ = held
            return of_loss(grad)

        return tape.connect(loss, (log_probabilities,), backward)

    def _gradient_like(self, x: Tensor, category: str | None = None) -> Backward:
        """A backward that makes one gradient of the shape of ``x``, and holds ``x`` only if it is detached."""
        numel, itemsize, made = x.numel, x.itemsize, category or _category(x)
        kept = None if x.requires_grad else x

        def backward(_grad: Tensor) -> Gradients:
            _ = kept
            return (self.tape.new(numel, itemsize, made),)

        return backward


def _category(tensor: Tensor) -> str:
    return GRADIENTS if isinstance(tensor.node, Leaf) else TEMPORARIES
