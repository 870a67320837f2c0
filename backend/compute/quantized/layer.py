"""PackedLinear: a linear layer whose weight is packed, whole or split among ranks as DeepSpeed splits it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from backend.compute.quantized.packed import Packed
from backend.compute.quantized.product import product
from backend.compute.weights import WHOLE, Span

Join = Callable[[Tensor], object]


class PackedLinear(nn.Module):
    """Takes the place of torch's Linear and of DeepSpeed's split ones."""

    def __init__(
        self, weight: Packed, bias: nn.Parameter | None, kind: str, spans: dict[str, Span], join: Join | None
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.kind = kind
        """Of sharding.kind_of."""
        self.spans = {"weight": WHOLE} | spans
        """This rank's part of what the checkpoint holds."""
        self.join = join
        """Sums the ranks' products in place, where each has some columns."""
        self.out_features, self.in_features = weight.shape

    def forward(self, source: Tensor) -> Tensor:
        """# [..., input] -> [..., rows]"""
        if self.join is None:
            return product(source, self.weight, self.bias)
        found = product(source, self.weight, None)
        self.join(found)
        return found if self.bias is None else found.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight.scheme}, {self.kind}"


def packed_weights(model: nn.Module) -> dict[str, Packed]:
    """By the names that full weights would have: what state_dict does not list."""
    named = ((path, getattr(module, "weight", None)) for path, module in model.named_modules())
    return {f"{path}.weight": weight for path, weight in named if isinstance(weight, Packed)}
