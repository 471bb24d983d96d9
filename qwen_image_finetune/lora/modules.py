"""The layers of LoKr, LoHa and OFT as they run: peft's, with passes that ask of the base only its output.

peft's own read the shape and the numbers of the base's weight, which a quantised one has not, and draw dropout on the
CPU in a way that compilers cannot follow. Configurations, matching of names, shapes of weights and their first values
are peft's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import peft
import torch
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.loha.layer import make_weight
from peft.tuners.loha.model import LoHaModel
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lokr.model import LoKrModel
from peft.tuners.oft.layer import Linear as OFTLinear
from peft.tuners.oft.model import OFTModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional


class Pass(ABC):
    """Output of the base plus strength times the change of each active adapter.

    Attributes:
        strengths: of adapters, by name; 0 is the base, 1 what was trained.
        dropouts: by name, shares of outputs (rank_dropout) and of passes (module_dropout) left out while training.
    """

    strengths: dict[str, float]
    dropouts: dict[str, tuple[float, float]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.strengths, self.dropouts = {}, {}

    def set_scale(self, adapter: str, scale: float) -> None:
        """Strength of an adapter."""
        self.strengths[adapter] = scale

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the base's output."""
        layer = cast(Any, self)
        base: Tensor = layer.base_layer(x, *arguments, **options)
        result = base
        for name in layer.active_adapters if not layer.disable_adapters else ():
            if name in layer.r:
                change = self.dropped(name, self.added(name, x, base))
                result = result + self.strengths.get(name, 1.0) * change
        return result.to(base.dtype)

    def dropped(self, name: str, change: Tensor) -> Tensor:
        """A change with dropout. What stays of the outputs grows by 1 / (1 - rank_dropout)."""
        of_outputs, of_passes = self.dropouts.get(name, (0.0, 0.0))
        if not cast(nn.Module, self).training:
            return change
        if of_outputs:
            kept = torch.rand(change.shape[-1], device=change.device) >= of_outputs
            change = change * kept / (1 - of_outputs)
        if of_passes:
            change = change * (torch.rand((), device=change.device) >= of_passes)
        return change

    @abstractmethod
    def added(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        """The change of the output (..., out)."""


class KroneckerLinear(Pass, LoKrLinear):
    """A LoKr without its matrix: x (c d) times (w1 (x) w2)^T is w1 X w2^T, of x laid out as X (c, d)."""

    def added(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        """See `Pass`."""
        x = self._cast_input_dtype(x, torch.float32)
        first, second = (_factors(self, f"lokr_w{number}", name) for number in (1, 2))
        laid = x.unflatten(-1, (first[-1].shape[1], second[-1].shape[1]))
        for factor in reversed(second):
            laid = functional.linear(laid, factor)
        laid = laid.transpose(-1, -2)
        for factor in reversed(first):
            laid = functional.linear(laid, factor)
        return laid.transpose(-1, -2).flatten(-2) * self.scaling[name]


class HadamardLinear(Pass, LoHaLinear):
    """A LoHa; its matrix is made for each pass, and made again for the backward pass rather than kept."""

    def create_adapter_parameters(self, adapter_name: str, r: int, shape: tuple[int, ...]) -> None:
        """peft's, of the shape that the layer has and not that of the codes it is stored in."""
        super().create_adapter_parameters(adapter_name, r, (self.out_features, self.in_features))

    def added(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        """See `Pass`."""
        x = self._cast_input_dtype(x, torch.float32)
        factors = (*_factors(self, "hada_w1", name), *_factors(self, "hada_w2", name))
        with torch.autocast(x.device.type, enabled=False):
            matrix = make_weight(*factors, torch.tensor(self.scaling[name]))
        return functional.linear(x, matrix)


class RotationLinear(Pass, OFTLinear):
    """An OFT: the base sees turned inputs. Beside others, the change is that output less the plain one."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """See `Pass`; alone and at its full strength in one pass through the base."""
        [*active] = (name for name in self.active_adapters if name in self.r and not self.disable_adapters)
        whole = len(active) == 1 and self.strengths.get(active[0], 1.0) == 1.0
        if whole and not (self.training and any(self.dropouts.get(active[0], ()))):
            return cast(Tensor, self.base_layer(self.oft_R[active[0]](x), *arguments, **options))
        return super().forward(x, *arguments, **options)

    def added(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        """See `Pass`."""
        return cast(Tensor, self.base_layer(self.oft_R[name](x))) - base


class KroneckerModel(LoKrModel):
    """peft's, with the layer above."""

    layers_mapping = {nn.Linear: KroneckerLinear}  # noqa: RUF012 (as declared there)


class HadamardModel(LoHaModel):
    """peft's, with the layer above."""

    layers_mapping = {nn.Linear: HadamardLinear}  # noqa: RUF012


class RotationModel(OFTModel):
    """peft's, with the layer above."""

    @staticmethod
    def _create_new_module(oft_config: peft.OFTConfig, adapter_name: str, target: Any, **options: Any) -> nn.Module:
        return RotationLinear(target, adapter_name, config=oft_config, **options)


def _factors(layer: BaseTunerLayer, part: str, name: str) -> tuple[Tensor, ...]:
    """A matrix, or the two that it is the product of."""
    parts = [part] if name in getattr(layer, part, ()) else [f"{part}_a", f"{part}_b"]
    return tuple(getattr(layer, each)[name] for each in parts)
