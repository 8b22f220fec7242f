"""How long a computation takes on a core, counted instead of measured: the same on every machine, busy or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CALL = 5e-6  # seconds of a tensor operation, however small
ELEMENT = 5e-10  # of each number that one writes
OPERATION = 5e-11  # of a floating-point operation of a matrix product or a convolution


def _recurrent(x: Tensor, inputs: Tensor, states: Tensor, *rest: Any, **more: Any) -> int:
    return 2 * x.shape[0] * x.shape[1] * (inputs.numel() + states.numel())  # every step and example, each weight


# PyTorch's own table and what it lacks: attention and recurrent layers as a CPU has them.
FORMULAS: dict[Any, Any] = dict(flop_registry) | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
}


class Effort(TorchDispatchMode):
    """Counts the tensor operations of a block: ``fixed`` seconds, whatever its batch, and those ``growing`` with it.

    Rough, within a factor of three or so; but what it depends on is the computation alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fixed = self.growing = 0.0
        self._whole = set(FORMULAS)  # operations that have no parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, func._overloadpacket
        if kind not in self._whole:
            with self:  # without gradients a layer comes here in one piece: its parts are counted
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._whole.add(kind)
        result = func(*args, **kwargs)
        self.fixed += CALL
        if not func.is_view:
            written = (result,) if isinstance(result, Tensor) else tree_leaves(result)
            self.growing += ELEMENT * sum(part.numel() for part in written if isinstance(part, Tensor))
        if kind in FORMULAS:
            self.growing += OPERATION * FORMULAS[kind](*args, **kwargs, out_val=result)
        return result
