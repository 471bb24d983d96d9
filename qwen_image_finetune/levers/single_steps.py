"""An optimizer stepped for one weight at a time, and so weights that are float32 only while it is their turn.

Trained weights are usually kept in float32: in bfloat16, with 8 bits, a small step would be rounded away. Rounded up
or down by chance, with the probability of how near each neighbour is, a step is right in the mean, and weights and
gradients take half the memory (Gupta et al., "Deep learning with limited numerical precision", 2015, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qwen_image_finetune import flow

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by train.weight_precision


class SingleSteps:
    """Steps an optimizer that treats each weight by itself for one of them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}

    def holds(self, parameter: Tensor) -> bool:
        """Whether the optimizer updates it."""
        return id(parameter) in self._groups

    def __call__(self, parameter: Tensor) -> None:
        """Update a weight by its gradient."""
        self._step(parameter, parameter)

    def _step(self, parameter: Tensor, shown: Tensor) -> None:
        """Update `shown`, which the optimizer takes for `parameter`."""
        everything, group, state = self.optimizer.param_groups, self._groups[id(parameter)], self.optimizer.state
        members = group["params"]
        if shown is not parameter and parameter in state:
            state[shown] = state.pop(parameter)
        try:  # for this moment the optimizer has one weight
            group["params"] = [shown]
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        finally:
            group["params"], self.optimizer.param_groups = members, everything
            if shown is not parameter and shown in state:
                state[parameter] = state.pop(shown)


class RoundedSteps(SingleSteps):
    """The same for weights in bfloat16: each is widened, updated in float32, and rounded by chance.

    Attributes:
        number: of the step, which the chance is a function of, with the seed and the place of the weight.
    """

    def __init__(self, optimizer: Optimizer, seed: int) -> None:
        super().__init__(optimizer)
        self.seed, self.number = seed, 0
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}

    def step(self) -> None:
        """Update every weight that has a gradient."""
        for group in self.optimizer.param_groups:
            for parameter in list(group["params"]):
                if parameter.grad is not None:
                    self(parameter)

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        # Another tensor, not this one in another precision: torch would forget that DDP waits for its gradient.
        wide = nn.Parameter(parameter.float())
        wide.grad = parameter.grad.float()
        parameter.grad = None
        self._step(parameter, wide)
        seed = flow.seed_of("rounding", self.seed, self.number, self._places[id(parameter)])
        parameter.copy_(rounded(wide, torch.Generator(parameter.device).manual_seed(seed)))


def rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Finite float32 values as bfloat16: one of the two neighbours, with a mean that is the value.

    bfloat16 is the upper half of float32's bits. A random number of 16 bits is added to the lower half, and carried.
    """
    bits = values.contiguous().view(torch.int32)
    chance = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + chance) >> 16).to(torch.int16).view(torch.bfloat16)
