"""Kernels of which some outputs are low-rank: neural implants.

An implant is a convolution of one place in the stead of one of k×k places: the same stride, the same inputs, a k²-th
of the cost. It is what is left of a kernel of which only the centre is not zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


@partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "implant", "mix"], meta_fields=["outputs", "places", "at"]
)
@dataclass(frozen=True)
class ImplantedKernel:
    """The kernel of a convolution with implants for some of its outputs. Made by `PrunePlan.shrink`.

    Attributes:
        kernel: `[k, k, inputs, full]`, the outputs that are left as they were, with axes as the network has them.
        implant: `[1, 1, inputs, implanted]`; with a mix, the first `r` outputs that the others are made of, which
            have the places of the kernel.
        mix: `[1, 1, r, implanted]`, or None.
        outputs: Axis of the outputs.
        places: Axes of the places.
        at: Which of the outputs are implants, in rising order.
    """

    kernel: Float[Array, "..."]
    implant: Float[Array, "..."]
    mix: Float[Array, "..."] | None
    outputs: int
    places: tuple[int, ...]
    at: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that it stands for."""
        shape = list(self.kernel.shape)
        shape[self.outputs] += len(self.at)
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Of its arrays."""
        return self.kernel.dtype

    @property
    def order(self) -> np.ndarray:
        """Where each output stands among the full ones and, behind them, the implants."""
        implants = np.isin(np.arange(self.shape[self.outputs]), self.at)
        return np.argsort(np.argsort(implants, kind="stable"), kind="stable")

    def fits(self, equation: Any) -> bool:
        """Does a convolution use the axes of the kernel as the one does that it was made for?

        Args:
            equation: Of a program, a `conv_general_dilated`.

        Returns:
            Whether it does.
        """
        outputs, _, *places = equation.params["dimension_numbers"].rhs_spec
        return (outputs, tuple(places)) == (self.outputs, self.places)

    def dense(self) -> Float[Array, "..."]:
        """The kernel that it stands for, with zeros around the centre of implants."""
        implant = self.implant
        if self.mix is not None:
            implant = jnp.moveaxis(jnp.tensordot(implant, self._mixed(), (self.outputs, 0)), -1, self.outputs)
        else:
            sizes = [(self.kernel.shape[i], i in self.places) for i in range(implant.ndim)]
            centre = [((n - 1) // 2, n - 1 - (n - 1) // 2, 0) if place else (0, 0, 0) for n, place in sizes]
            implant = lax.pad(implant, jnp.zeros((), implant.dtype), centre)
        return jnp.take(jnp.concatenate([self.kernel, implant], self.outputs), self.order, self.outputs)

    def _mixed(self) -> Float[Array, "r implanted"]:
        assert self.mix is not None
        return self.mix.reshape(-1, self.mix.shape[self.outputs])

    def map_outer(self, function: Callable[[Array], Array]) -> "ImplantedKernel":
        """Apply a function to the arrays that read the inputs.

        Args:
            function: Of an array, along the axis of the inputs.

        Returns:
            The kernel of the results.
        """
        return replace(self, kernel=function(self.kernel), implant=function(self.implant))


def is_implanted(node: Any) -> bool:
    """Is a node of a tree a kernel with implants?

    Args:
        node: Of any tree.

    Returns:
        Whether it is, for `is_leaf` of JAX.
    """
    return isinstance(node, ImplantedKernel)


def split_kernel(
    kernel: Float[Array, "..."], outputs: int, places: tuple[int, ...], at: tuple[int, ...]
) -> ImplantedKernel:
    """Leave only the centre of some outputs of a kernel.

    Args:
        kernel: The kernel; or masks or moments of it.
        outputs: Axis of the outputs.
        places: Axes of the places.
        at: Outputs that become implants.

    Returns:
        The kernel with implants.
    """
    rest = np.setdiff1d(np.arange(kernel.shape[outputs]), at)
    implant = jnp.take(kernel, np.array(at, int), outputs)
    for axis in places:
        middle = (kernel.shape[axis] - 1) // 2
        implant = lax.slice_in_dim(implant, middle, middle + 1, axis=axis)
    return ImplantedKernel(jnp.take(kernel, rest, outputs), implant, None, outputs, places, tuple(at))


def centre_padding(equation: Any) -> tuple[tuple[int, int], ...]:
    """Padding with which a kernel of one place reads what the centre of the whole one reads.

    Args:
        equation: The convolution of the network.

    Returns:
        Low and high, negative where the input is cut.
    """
    params, shape = equation.params, equation.invars[1].aval.shape
    found = []
    for (low, high), axis, dilation in zip(
        params["padding"], params["dimension_numbers"].rhs_spec[2:], params["rhs_dilation"], strict=True
    ):
        before = dilation * ((shape[axis] - 1) // 2)
        found.append((low - before, high - (dilation * (shape[axis] - 1) - before)))
    return tuple(found)


def convolve(equation: Any, inputs: Array, kernel: ImplantedKernel) -> Array:
    """A convolution with a kernel that has implants.

    Args:
        equation: The convolution of the network.
        inputs: What it convolves.
        kernel: By what.

    Returns:
        The result of the convolution with the kernel that it stands for.
    """
    params = dict(equation.params) | {"feature_group_count": 1}
    convolution = equation.primitive.bind
    numbers = params["dimension_numbers"]
    full = convolution(inputs, kernel.kernel, **params)
    if kernel.mix is None:
        parts = [full, convolution(inputs, kernel.implant, **params | {"padding": centre_padding(equation)})]
    else:
        inner = convolution(inputs, kernel.implant, **params)
        ones = (1,) * len(numbers.rhs_spec[2:])
        plain = {"window_strides": ones, "padding": ((0, 0),) * len(ones), "lhs_dilation": ones, "rhs_dilation": ones}
        lhs = numbers.out_spec
        numbers = lax.ConvDimensionNumbers(lhs, numbers.rhs_spec, lhs)
        parts = [full, convolution(inner, kernel.mix, **params | plain | {"dimension_numbers": numbers})]
    feature = equation.params["dimension_numbers"].out_spec[1]
    return jnp.take(jnp.concatenate(parts, feature), kernel.order, feature)
