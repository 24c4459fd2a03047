"""What a decomposition method may know of a layer's inputs: mean squares, the Gram matrix, the drift from the dense model.

Statistics are plain means over tokens, whatever the sequence they came from (a running mean, so neither the number of
tokens nor their scale can overflow fp32). A layer's inputs should come from the model whose earlier layers are already
compressed. Layers that read the same input (q/k/v, gate/up) can share one Gram matrix: see `with_drift`.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CalibrationError

NEEDS = ("none", "diagonal", "gram")


@dataclass
class InputStats:
    """Running input statistics of one linear layer, y = x W^T.

    in_features: K.  needs: "none" (tokens are only counted), "diagonal" (mean squares), "gram" (the K x K matrix).
    gram [K,K]: mean over tokens of x x^T, `dtype`.  mean_square [K]: its diagonal, `dtype`.
    drift [N,K], optional: mean over tokens of (y_dense - W x) x^T, where y_dense is what the layer put out in the dense
        model and x is what reaches it in the compressed one; lets a method correct errors made before this layer.
    dtype: of the accumulators; products of one update are always fp32 unless this is float64.
    """

    in_features: int
    needs: str = "gram"
    tokens: int = 0
    gram: Tensor | None = None
    mean_square: Tensor | None = None
    drift: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.needs not in NEEDS:
            raise CalibrationError(
                f"needs={self.needs!r} is unknown; choose one of {', '.join(NEEDS)}"
            )

    @classmethod
    def from_inputs(cls, x: Tensor, needs: str = "gram", drift: Tensor | None = None) -> InputStats:
        """Statistics of one batch x [..., K]. Raises: CalibrationError."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise CalibrationError(
                f"calibration inputs are {reprlib.repr(x)}, expected a tensor [..., in_features]"
            )
        stats = cls(x.shape[-1], needs)
        stats.update(x, drift)
        return stats

    @classmethod
    def from_gram(cls, gram: Tensor, tokens: int = 1, drift: Tensor | None = None) -> InputStats:
        """Statistics from a mean Gram matrix [K,K] computed elsewhere."""
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
            raise CalibrationError(
                f"a Gram matrix is square [in_features, in_features], got {tuple(gram.shape)}"
            )
        if bad := int((~gram.isfinite()).sum()):
            raise CalibrationError(
                f"the Gram matrix has {bad} NaN or infinite entries of {gram.numel()}"
            )
        return cls(gram.shape[0], "gram", tokens, gram, gram.diagonal().clone(), drift, gram.dtype)

    @property
    def diagonal(self) -> Tensor:
        """[K] mean of x_j^2."""
        if self.mean_square is None:
            raise CalibrationError(
                "no mean squares were collected: build InputStats with needs='diagonal' or 'gram' and update() it"
            )
        return self.mean_square

    @torch.no_grad()
    def update(self, x: Tensor, drift: Tensor | None = None) -> None:
        """Add the tokens of x [..., K], any float dtype; `drift` [..., N] is y_dense - W x of the same tokens.

        Raises: CalibrationError for the wrong width, NaN, Inf, or squares that overflow fp32. The statistics are
        unchanged then.
        """
        if x.shape[-1] != self.in_features:
            raise CalibrationError(
                f"inputs of width {x.shape[-1]} {tuple(x.shape)} do not fit statistics of in_features={self.in_features}"
            )
        x = x.reshape(-1, self.in_features)
        count = x.shape[0]
        if count == 0:
            return
        if self.needs == "none" and drift is None:
            self._check(x, x.float().sum())
            self.tokens += count
            return
        x = x.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        square = (x / count * x).sum(0)
        self._check(x, square)
        share = count / (self.tokens + count)
        shift = None
        if drift is not None:
            drift = drift.reshape(count, -1).to(x.dtype)
            self._check(drift, drift.sum(), "drift")
            shift = (drift / count).T @ x
        gram = (x / count).T @ x if self.needs == "gram" else None
        if self.tokens and (drift is None) != (self.drift is None):
            raise CalibrationError("drift must be given with every update or with none")
        if self.needs != "none":
            self.mean_square = self._mix(self.mean_square, square, share)
            self.gram = self._mix(self.gram, gram, share)
        self.drift = self._mix(self.drift, shift, share)
        self.tokens += count

    def merge(self, other: InputStats) -> InputStats:
        """The statistics of both token sets together; both stay as they are.

        Raises: CalibrationError when widths, needs or the presence of drift differ.
        """
        if (self.in_features, self.needs) != (other.in_features, other.needs):
            raise CalibrationError(
                f"cannot merge statistics of in_features={self.in_features}, needs={self.needs!r} with "
                f"in_features={other.in_features}, needs={other.needs!r}"
            )
        if not other.tokens or not self.tokens:
            return replace(self if self.tokens else other)
        if (self.drift is None) != (other.drift is None):
            raise CalibrationError("cannot merge statistics with drift and statistics without")
        share = other.tokens / (self.tokens + other.tokens)
        parts = {
            name: self._mix(getattr(self, name), getattr(other, name), share)
            for name in ("gram", "mean_square", "drift")
        }
        return replace(self, tokens=self.tokens + other.tokens, **parts)

    def with_drift(self, drift: Tensor | None) -> InputStats:
        """A view that shares the Gram matrix and has this `drift` [N,K]: one per layer that reads the same input."""
        return replace(self, drift=drift)

    def to(self, device: torch.device | str) -> InputStats:
        parts = {name: getattr(self, name) for name in ("gram", "mean_square", "drift")}
        return replace(
            self, **{name: None if t is None else t.to(device) for name, t in parts.items()}
        )

    def dead_inputs(self) -> Tensor:
        """[K] bool: inputs that were zero for every token."""
        return self.diagonal <= 0

    def _mix(self, mean: Tensor | None, new: Tensor | None, share: float) -> Tensor | None:
        if new is None:
            return mean
        new = new.to(self.dtype)
        return new if mean is None else mean.lerp(new.to(mean.device), share)

    def _check(self, values: Tensor, total: Tensor, what: str = "calibration inputs") -> None:
        if bool(total.isfinite().all()):
            return
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        if nan or inf:
            raise CalibrationError(
                f"{what} have {nan} NaN and {inf} infinite values of {values.numel()}; the model overflows on this "
                "text: load it in bfloat16 or float32, or leave that text out"
            )
        raise CalibrationError(
            f"{what} as large as {values.abs().max():.3g} overflow when squared; use dtype=float64"
        )
