"""A case as the installed Triton wants it, specialised as its JIT would specialise the launch.

Pointers to 16 bytes, and numbers that 16 divides, are known to be so; a 1 is a constant. How sources are
described changed in Triton 3.2 and in 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import triton
from triton.compiler import ASTSource

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass
class Specialised:
    """Arguments of a kernel, sorted into what its code knows of them."""

    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    divisible: list[str] = field(default_factory=list)


def source_of(case: dict[str, Any]) -> Any:
    """Return the `ASTSource` of a case that has been read from JSON."""
    kernel = kernel_of(case["kernel"])
    known = specialised(kernel.params, case["arguments"])
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    if VERSION >= (3, 3):
        signature = {name: known.signature.get(name, "constexpr") for name in places}
        attributes = {(places[name],): [["tt.divisibility", 16]] for name in known.divisible}
        return ASTSource(fn=kernel, signature=signature, constexprs=known.constants, attrs=attributes)
    divisible = [places[name] for name in known.divisible]
    if VERSION == (3, 2):
        from triton.backends.compiler import AttrsDescriptor

        properties = {"tt.divisibility": divisible, "tt.equal_to": []}
        described = AttrsDescriptor.from_dict({"arg_properties": properties, "cls": "AttrsDescriptor"})
        return ASTSource(fn=kernel, signature=known.signature, constants=known.constants, attrs=described)
    from triton.compiler.compiler import AttrsDescriptor  # 3.1 and older

    return ASTSource(
        fn=kernel,
        signature={places[name]: kind for name, kind in known.signature.items()},
        constants={places[name]: value for name, value in known.constants.items()},
        attrs=AttrsDescriptor(divisible_by_16=set(divisible), equal_to_1=set()),
    )


def kernel_of(name: str) -> Any:
    """Return what `triton.jit` has made of the kernel `module:name`."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def specialised(parameters: list[Any], arguments: dict[str, dict[str, Any]]) -> Specialised:
    """Sort the arguments of a launch by what `triton.jit` declares of the parameters."""
    known = Specialised()
    for parameter in parameters:
        name, free = parameter.name, parameter.do_not_specialize
        argument = arguments[name]
        if "pointer" in argument:
            known.signature[name] = f"*{argument['pointer']}"
            divisible = argument["aligned"]
        else:
            value = argument["value"]
            number = type(value) is int and not free
            if parameter.is_constexpr or value is None or (number and value == 1):
                known.constants[name] = value
                continue
            known.signature[name] = type_of(value)
            divisible = number and value % 16 == 0
        if divisible and not free:
            known.divisible.append(name)
    return known


def type_of(value: Any) -> str:
    """Return how signatures name the type of a number. Raises TypeError for anything else."""
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel cannot take a {type(value).__name__}.")
