"""What a method may know of a layer's inputs: mean squares, the Gram matrix, the drift.

With x the inputs and y = x W^T, over all tokens: mean_square = mean(x_j^2), gram = mean(x^T x) and
drift = mean((y_dense - W x)^T x). They are plain means, whatever the sequence a token came from,
kept as running means so that neither the number of tokens nor their scale can overflow fp32. A
layer's inputs should come from the model whose earlier layers are already compressed. Layers that
read the same input (q/k/v, gate/up) can share one Gram matrix: see `with_drift`.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CalibrationError

NEEDS = ("none", "diagonal", "gram")
# A Gram matrix is computed in so many strips, where each has enough rows to keep a CPU or GPU busy.
STRIPS, LEAST_STRIP = 4, 96


@dataclass
class InputStats:
    """Running input statistics of one linear layer, y = x W^T.

    in_features: K.
    needs: "none" (tokens are only counted), "diagonal" (mean squares) or "gram" (the K x K matrix).
    gram [K,K] of `dtype`: mean over tokens of x x^T. mean_square [K] of `dtype`: its diagonal.
    drift [N,K], optional: mean over tokens of (y_dense - W x) x^T, where y_dense is what the layer
        put out in the dense model and x is what reaches it in the compressed one. It lets a method
        correct errors made before this layer.
    held_back [K,K], optional: the Gram matrix of windows of the calibration text that are in no
        other statistic, by which a method may judge what it made of them.
    input_factor [K,R], optional: the V of a sign term that other rows of the same weight have,
        which `slab` then keeps.
    dtype: of the accumulators. Products of one update are fp32 unless this is float64.
    """

    in_features: int
    needs: str = "gram"
    tokens: int = 0
    gram: Tensor | None = None
    mean_square: Tensor | None = None
    drift: Tensor | None = None
    held_back: Tensor | None = None
    input_factor: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.needs not in NEEDS:
            raise CalibrationError(
                f"needs={self.needs!r} is unknown; choose one of {', '.join(NEEDS)}"
            )
        if self.in_features < 1:
            raise CalibrationError(f"in_features={self.in_features} of a layer must be at least 1")

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
        """Statistics from a mean Gram matrix [K,K] computed elsewhere.

        Raises: CalibrationError for one that is not square, or has NaN or infinite entries.
        """
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
            raise CalibrationError(
                f"a Gram matrix is square [in_features, in_features], got {tuple(gram.shape)}"
            )
        if bad := int((~gram.isfinite()).sum()):
            raise CalibrationError(
                f"the Gram matrix has {bad} NaN or infinite entries of {gram.numel()}"
            )
        return cls(
            gram.shape[0], "gram", tokens, gram, gram.diagonal().clone(), drift, dtype=gram.dtype
        )

    @property
    def matrix(self) -> Tensor:
        """[K,K] `gram` where it was collected.

        Raises: CalibrationError where it was not.
        """
        if self.gram is None:
            raise CalibrationError(
                "no Gram matrix was collected: build InputStats with needs='gram' and update() it"
            )
        return self.gram

    @property
    def diagonal(self) -> Tensor:
        """[K] mean of x_j^2.

        Raises: CalibrationError where it was not collected.
        """
        if self.mean_square is None:
            raise CalibrationError(
                "no mean squares were collected: build InputStats with needs='diagonal' or 'gram' "
                "and update() it"
            )
        return self.mean_square

    @torch.no_grad()
    def update(self, x: Tensor, drift: Tensor | None = None) -> None:
        """Add the tokens of x [..., K], any float dtype.

        drift [..., N]: y_dense - W x of the same tokens.

        Raises: CalibrationError for the wrong width, NaN, Inf, or squares that overflow fp32. The
        statistics are unchanged then.
        """
        if x.shape[-1] != self.in_features:
            raise CalibrationError(
                f"inputs of width {x.shape[-1]} {tuple(x.shape)} do not fit statistics of "
                f"in_features={self.in_features}"
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
        fraction = count / (self.tokens + count)
        new_drift = None
        if drift is not None:
            drift = drift.reshape(count, -1).to(x.dtype)
            self._check(drift, drift.sum(), "drift")
            new_drift = (drift / count).T @ x
        gram = _gram(x / count, x) if self.needs == "gram" else None
        if self.tokens and (drift is None) != (self.drift is None):
            raise CalibrationError("drift must be given with every update or with none")
        if self.needs != "none":
            self.mean_square = self._mix(self.mean_square, square, fraction)
            self.gram = self._mix(self.gram, gram, fraction)
        self.drift = self._mix(self.drift, new_drift, fraction)
        self.tokens += count

    def with_drift(self, drift: Tensor | None) -> InputStats:
        """A view that shares the Gram matrix and has this `drift` [N,K], for one of several layers
        that read the same input."""
        return replace(self, drift=drift)

    def to(self, device: torch.device | str) -> InputStats:
        """The same statistics on `device`."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            gram=moved(self.gram),
            mean_square=moved(self.mean_square),
            drift=moved(self.drift),
            held_back=moved(self.held_back),
            input_factor=moved(self.input_factor),
        )

    def _mix(self, mean: Tensor | None, new: Tensor | None, fraction: float) -> Tensor | None:
        """The mean of all tokens, where `new` is that of the `fraction` of them that came last."""
        if new is None:
            return mean
        new = new.to(self.dtype)
        return new if mean is None else mean.lerp(new.to(mean.device), fraction)

    def _check(self, values: Tensor, total: Tensor, what: str = "calibration inputs") -> None:
        """Refuse `values` whose `total` is not finite. Raises: CalibrationError."""
        if bool(total.isfinite().all()):
            return
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        if nan or inf:
            raise CalibrationError(
                f"{what} have {nan} NaN and {inf} infinite values of {values.numel()}; the model "
                "overflows on this text: load it in bfloat16 or float32, or leave that text out"
            )
        raise CalibrationError(
            f"{what} as large as {values.abs().max():.3g} overflow when squared; use dtype=float64"
        )


def _gram(scaled: Tensor, x: Tensor) -> Tensor:
    """[K,K] scaled^T x, where `scaled` [T,K] is a multiple of x and the product so symmetric.

    It is computed in strips of rows from the diagonal on, which is five eighths of the work.
    """
    K = x.shape[1]
    strip = -(-K // STRIPS)
    if strip < LEAST_STRIP:
        return scaled.T @ x
    gram = x.new_empty(K, K)
    for first in range(0, K, strip):
        last = min(first + strip, K)
        rows = scaled[:, first:last].T @ x[:, first:]
        gram[first:last, first:] = rows
        gram[last:, first:last] = rows[:, last - first :].T
    return gram
