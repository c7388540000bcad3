"""Hooks that always detach: they hand a module's inputs or outputs to a function while a block of code runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

OnTensor = Callable[[Tensor], None]
OnPair = Callable[[Tensor, Tensor], None]
OnModule = Callable[[nn.Module, Tensor], None]
Instead = Callable[..., Tensor]
"""(module, its positional arguments...) -> its output."""


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


@contextmanager
def tapped(
    model: nn.Module,
    *,
    inputs: Mapping[str, OnTensor],
    outputs: Mapping[str, OnTensor],
    through: Mapping[str, OnPair],
    instead: Mapping[str, Instead] = MappingProxyType({}),
    modules: Mapping[str, OnModule] = MappingProxyType({}),
) -> Iterator[None]:
    """Call the given functions whenever the named modules run, for as long as the context lasts.

    Args:
        model: the module that holds the named ones.
        inputs: module name -> function of its first input.
        outputs: module name -> function of its output.
        through: module name -> function of its first input and its (first) output.
        instead: module name -> what runs in place of its own forward; hooks run as ever.
        modules: module name -> function of the module itself and its first input.
    """
    with ExitStack() as stack:
        for name, on_input in inputs.items():
            stack.callback(_hook_input(model.get_submodule(name), on_input).remove)
        for name, on_output in outputs.items():
            stack.callback(_hook_output(model.get_submodule(name), on_output).remove)
        for name, on_pair in through.items():
            stack.callback(_hook_through(model.get_submodule(name), on_pair).remove)
        for name, forward in instead.items():
            stack.enter_context(_forward_replaced(model.get_submodule(name), forward))
        for name, on_module in modules.items():
            module = model.get_submodule(name)
            stack.callback(_hook_input(module, partial(on_module, module)).remove)
        yield


@contextmanager
def _forward_replaced(module: nn.Module, forward: Instead) -> Iterator[None]:
    own = module.__dict__.get("forward")  # whoever moves weights about puts one there
    module.forward = partial(forward, module)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _hook_input(module: nn.Module, call: OnTensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call(_first_tensor(args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _hook_output(module: nn.Module, call: OnTensor) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        call(output)

    return module.register_forward_hook(hook)


def _hook_through(module: nn.Module, call: OnPair) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call(_first_tensor(args, kwargs), output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook, with_kwargs=True)
