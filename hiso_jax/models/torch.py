"""Torch modules as pure functions of JAX: any ``torch.nn.Module``, among them the models of ``transformers``.

torchax runs a module's own ``forward`` with arrays of JAX in the place of its tensors, so that JAX traces every
operation: the function can be jitted, vmapped and differentiated, and torch is not called once it is compiled. It needs
the extra ``torch``.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from hiso_jax.checks import ParameterError, kind_of
from hiso_jax.models.functional import Model


def from_torch(module: Any, *, output: Callable[[Any], Any] | None = None) -> Model:
    """The pure functions of a torch module, which is set to evaluation mode.

    Parameters are a dict of arrays by their dotted names in torch, each of a tied pair once; the module's buffers are
    constants. :func:`hiso_jax.tasks.train_only` trains some of them.

    Args:
      module: the module. Models of ``transformers`` compute attention by products (``eager``) and keep no cache.
      output: what ``forward`` returns → the value that the function returns; by default its ``logits``, or all of it if
        it has none.

    Returns:
      The functions: ``init`` returns the module's own parameters, whatever the key, and ``apply(parameters, inputs)``
      takes an array, a tuple of arrays, or a dict of arrays by the names of the arguments of ``forward``; integers
      of Python stay what they are.

    Raises:
      ParameterError: the extra is not installed; ``module`` is not a module, or is on a device of torch's; or, where
        the function is traced, the module has an operator that torchax does not translate, or computes by the values
        of its inputs.

    Example:
      >>> import torch, jax  # doctest: +SKIP
      >>> from hiso_jax.models.torch import from_torch  # doctest: +SKIP
      >>> model = from_torch(torch.nn.Linear(4, 2))  # doctest: +SKIP
      >>> sorted(model.init(jax.random.key(0)))  # doctest: +SKIP
      ['bias', 'weight']
    """
    torch, torchax = libraries()
    if not isinstance(module, torch.nn.Module):
        raise ParameterError("module", f"must be a torch.nn.Module, got {kind_of(module)}")
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    elsewhere = next((name for name, each in tensors.items() if each.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ParameterError(
            "module",
            f"must be on the CPU, from where JAX takes its numbers; {elsewhere} is on {tensors[elsewhere].device}",
        )
    module.eval()
    for each in module.modules():
        if hasattr(each, "set_attn_implementation"):
            each.set_attn_implementation("eager")
        if hasattr(getattr(each, "config", None), "use_cache"):
            each.config.use_cache = False
    with warnings.catch_warnings(action="ignore"):  # it looks at every attribute, also at deprecated ones
        states, function = torchax.extract_jax(module)
    own = {name for name, each in tensors.items() if isinstance(each, torch.nn.Parameter) and each.is_floating_point()}
    # Copies of NumPy: a program takes them as arguments, and does not hold them.
    params = {name: np.array(each) for name, each in states.items() if name in own}
    buffers = {name: each for name, each in states.items() if name not in own}
    take = output or _logits

    def init(key: Key[Array, ""]) -> PyTree:
        return dict(params)

    def apply(params: Mapping[str, Array], inputs: Any) -> Any:
        named, placed = (inputs, ()) if isinstance(inputs, Mapping) else ({}, inputs)
        placed = placed if isinstance(placed, tuple) else (placed,)
        try:
            given = jax.tree.map(_as_given, ({**buffers, **params}, placed, dict(named)))
            return take(function(*given))
        except torchax.tensor.OperatorNotFound as error:
            raise ParameterError("module", f"has an operator that torchax does not translate: {error}") from error
        except jax.errors.JAXTypeError as error:
            raise ParameterError(
                "module",
                "must compute alike whatever the values of its inputs, without .item(), .numpy(), branches on values "
                f"or shapes that depend on them{_place(error)}",
            ) from error

    return Model(init, apply, lambda name: None)


def _as_given(value: Any) -> Any:
    return value if isinstance(value, int) else jnp.asarray(value)


def _place(error: BaseException) -> str:
    """The last line outside of libraries that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if "site-packages" not in each.filename and each.filename != __file__]
    return f"; {own[-1].filename}:{own[-1].lineno} does not: {own[-1].line}" if own else ""


def _logits(returned: Any) -> Any:
    return getattr(returned, "logits", returned)


def libraries() -> tuple[Any, Any]:
    """Torch and torchax, ready for use.

    Raises:
      ParameterError: one is not installed.
    """
    try:
        import torch

        with _overloads_of_names(torch):
            import torchax

            torchax.default_env()
    except ImportError as error:
        raise ParameterError(
            "module",
            f"needs torch and torchax, and {error.name} is not installed; pip install '.[torch]' installs them",
        ) from error
    return torch, torchax


@contextmanager
def _overloads_of_names(torch: Any) -> Iterator[None]:
    """While it lasts, overloads for tensors with named axes have stand-ins.

    torchax 0.0.13 lists such overloads, and torch 2.13 has them no longer; no call can reach them.
    """
    packet = torch._ops.OpOverloadPacket
    original = packet.__getattr__

    def found(self: Any, name: str) -> Any:
        try:
            return original(self, name)
        except AttributeError:
            if "name" not in name.lower():
                raise
            return f"{self}.{name}"

    packet.__getattr__ = found
    try:
        yield
    finally:
        packet.__getattr__ = original
