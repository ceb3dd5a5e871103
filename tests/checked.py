"""Shapes and types checked at each call: what jaxtyping's import hook puts on every function, made cheap.

jaxtyping's own decorator makes two checks for each function as it is defined, closures each time anew, binds the
arguments a second time at each call and checks them again with what is returned: half of the suite's time. Here a check
is made when a function is first called, once for all closures of the same name and signature; arguments are checked
before the call, what is returned after it, in one scope of shapes, and a function that names no shape has no scope.
Nothing is checked in `as_users_run`, as tests of whole commands and pages do.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from types import FunctionType
from typing import Any, NamedTuple, Never, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError

T = TypeVar("T")


class Check(NamedTuple):
    """What is asked of a function's arguments and of what it returns."""

    parameters: Callable[..., None] | None
    returned: Callable[[Any], None]
    shaped: bool
    """Whether there are shapes, which mean the same in all of them."""
    plain: type | None
    """The class that is returned, where the annotation says no more: `type` alone then tells that it is right."""


_CHECKS: dict[Hashable, Check] = {}
_RETURNED: dict[Hashable, Callable[[Any], None]] = {}
"""What is asked of what is returned, by what it should be, whichever function returns it."""
_OFF: list[str] = []
_SCOPE = jaxtyping.jaxtyped("context")
_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
_check = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


def install() -> None:
    """From now on both packages are checked as they are imported."""
    jaxtyping.jaxtyped = jaxtyped  # the name by which the hook's decorators call it
    jaxtyping.install_import_hook(["circuitsae", "transcoders"], None)


@contextlib.contextmanager
def as_users_run() -> Iterator[None]:
    """While it lasts, functions are called as they are where nobody checks them."""
    _OFF.append("")
    try:
        yield
    finally:
        _OFF.pop()


def jaxtyped(*, typechecker: object) -> Callable[[T], T]:
    """The decorator of every function and class of the packages."""
    return checked


def checked(thing: Any) -> Any:
    """A function with its annotations checked at each call; of a dataclass, how it is made."""
    if isinstance(thing, FunctionType):
        return _checked(thing) if thing.__annotations__ else thing
    made: Any = vars(thing).get("__init__") if dataclasses.is_dataclass(thing) else None
    if made is not None and not hasattr(made, "__wrapped__"):
        thing.__init__ = _checked(made)
    return thing


def _checked(function: FunctionType) -> Callable[..., Any]:
    check: Check | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal check
        if _OFF:
            return function(*args, **kwargs)
        if check is None:
            check = _check_of(function)
        if check.shaped:
            with _SCOPE:
                return _in_scope(check, function, args, kwargs)
        return _in_scope(check, function, args, kwargs)

    return call


def _in_scope(check: Check, function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    __tracebackhide__ = True
    if check.parameters is not None:
        check.parameters(*args, **kwargs)
    found = function(*args, **kwargs)
    if type(found) is check.plain:
        return found
    try:
        check.returned(found)
    except TypeCheckError as error:
        error.add_note(f"It was returned by {function.__module__}.{function.__qualname__}.")
        raise
    return found


def _check_of(function: FunctionType) -> Check:
    code, hints = function.__code__, function.__annotations__
    arguments = (code.co_varnames, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    key = (function.__module__, function.__qualname__, arguments, *zip(hints, map(_form, hints.values()), strict=True))
    if key not in _CHECKS:
        named = {name: _resolved(hint, function) for name, hint in hints.items()}
        given = named.pop("return", Any)
        given = Any if given in (Never, NoReturn) else given  # which only raises
        if (form := _form(given)) not in _RETURNED:
            _RETURNED[form] = _returned_check(given)
        shaped = any(map(_has_shape, (given, *named.values())))
        parameters = _check(_silent(function, named)) if named else None
        plain: Any = type(None) if given is None else given
        _CHECKS[key] = Check(parameters, _RETURNED[form], shaped, plain if type(plain) is type else None)
    return _CHECKS[key]


def _returned_check(hint: Any) -> Callable[[Any], None]:
    def returned(return_value: Any) -> None: ...

    returned.__annotations__ = {"return_value": hint}
    return _check(returned)


def _nothing() -> None: ...


def _silent(function: FunctionType, hints: dict[str, Any]) -> FunctionType:
    """A function of the same name and parameters that does nothing."""
    own = function.__code__
    names = own.co_varnames[: own.co_argcount + own.co_kwonlyargcount + (own.co_flags & _VARIADIC).bit_count()]
    code = _nothing.__code__.replace(
        co_argcount=own.co_argcount, co_posonlyargcount=own.co_posonlyargcount, co_varnames=names,
        co_kwonlyargcount=own.co_kwonlyargcount, co_nlocals=len(names),
        co_flags=_nothing.__code__.co_flags | own.co_flags & _VARIADIC,
        co_name=own.co_name, co_qualname=own.co_qualname,
    )  # fmt: skip
    silent = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    silent.__kwdefaults__, silent.__annotations__ = function.__kwdefaults__, hints
    silent.__qualname__, silent.__module__ = function.__qualname__, function.__module__
    return silent


def _resolved(hint: Any, function: FunctionType) -> Any:
    """What a hint means that is text, or has text in it; anything, where a name is for type checkers only."""

    def holder() -> None: ...

    holder.__annotations__ = {"value": hint}
    try:
        return get_type_hints(holder, function.__globals__, include_extras=True)["value"]
    except Exception:
        return Any


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, list | tuple):
        return any(map(_has_shape, hint))
    if isinstance(hint, type) and get_origin(hint) is None:
        return issubclass(hint, AbstractArray)
    return _has_shape(get_args(hint)) or _has_shape(getattr(hint, "__value__", ()))


def _form(hint: Any) -> Hashable:
    """What makes two hints the same: shapes are equal to none but themselves, however often one is written."""
    if isinstance(hint, list):
        return tuple(map(_form, hint))
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return (hint.dtype, hint.array_type, hint.dim_str)
    return (get_origin(hint), *map(_form, get_args(hint))) if get_args(hint) else hint
