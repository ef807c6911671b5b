"""The Hessian of the mean loss: products, its diagonal, and its traces.

| function | gives | passes over the examples |
|---|---|---|
| `hvp` | `Hv`, exact | 1, of about four gradients' cost |
| `hutchinson_diagonal` | `diag(H)` of any loss, with a standard error | one `hvp` a probe |
| `hutchinson_trace` | `tr(H)` of each leaf and of all, with standard errors | one `hvp` a probe |
| `hutchinson_axis_traces` | `tr(H_cc)` of each channel `c` of each leaf, with standard errors | one `hvp` a probe |
| `hutchinson_sums` | any sums of `diag(H)`, with standard errors | one `hvp` a probe |
| `gauss_newton_diagonal` | the Gauss–Newton diagonal of softmax cross-entropy, exact | `C` backward passes an example |

In a network of ReLUs and max-pooling the second derivative by one weight alone is that of the Gauss–Newton matrix:
the diagonal of the last is then that of `H`, and has no variance.
"""

from woodjax.hessian._estimate import MINIMUM_PROBES
from woodjax.hessian.gauss_newton import gauss_newton_diagonal
from woodjax.hessian.hutchinson import DiagonalEstimate, hutchinson_diagonal
from woodjax.hessian.products import hvp
from woodjax.hessian.sums import SumEstimate, hutchinson_sums
from woodjax.hessian.traces import AxisTraceEstimate, TraceEstimate, hutchinson_axis_traces, hutchinson_trace

__all__ = [
    "MINIMUM_PROBES",
    "AxisTraceEstimate",
    "DiagonalEstimate",
    "SumEstimate",
    "TraceEstimate",
    "gauss_newton_diagonal",
    "hutchinson_axis_traces",
    "hutchinson_diagonal",
    "hutchinson_sums",
    "hutchinson_trace",
    "hvp",
]
