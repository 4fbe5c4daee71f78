"""Triton's interpreter with less work around each call; what a kernel computes, and every check of it, stays as it is.

The interpreter replaces the functions of triton.language for as long as a kernel runs. It does so again at every call of one jitted
function by another, and reads all members of the language each time: a third of the time that our kernels take. Here the outermost
launch replaces them, from a list that is read once. The test is in test_interpreter.py.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType


def quicken() -> bool:
    """Make the interpreter of this process quick; False, and nothing changed, where Triton is missing or is built otherwise."""
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return False
    names = ("_LangPatchScope", "_patch_lang", "_patch_builtin", "_patch_attr", "_get_np_dtype", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in names):
        return False
    interpreter._patch_builtin = _listed_once(interpreter, tl)
    interpreter._patch_lang = _outermost_only(interpreter, tl)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        # It computes every sum and product again in 64 bits for assertions that only debug=True evaluates.
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    return True


def _listed_once(interpreter: ModuleType, tl: ModuleType) -> Callable:
    """_patch_builtin that lists the built-in functions of a module or class once."""
    lists: dict[object, list] = {}

    def patch_builtin(owner: object, builder: object, scope: object) -> None:
        if owner not in lists:
            members = ((name, getattr(owner, name, None)) for name in dir(owner))
            lists[owner] = [(name, member) for name, member in members if tl.core.is_builtin(member)]
        for name, member in lists[owner]:
            interpreter._patch_attr(owner, name, member, builder, scope)

    return patch_builtin


def _outermost_only(interpreter: ModuleType, tl: ModuleType) -> Callable:
    """_patch_lang that replaces the functions of a module once in a launch; the end of the launch puts all of them back."""
    patch_lang, empty = interpreter._patch_lang, interpreter._LangPatchScope
    modules_of: dict[Callable, frozenset] = {}
    replaced: set[ModuleType] = set()

    class Launch(empty):
        def restore(self) -> None:
            super().restore()
            replaced.clear()

    launch = Launch()

    def patch(fn: Callable) -> object:
        outermost = not replaced
        if fn not in modules_of:
            modules_of[fn] = frozenset(v for v in fn.__globals__.values() if v is tl or v is tl.core)
        if outermost or not modules_of[fn] <= replaced:
            launch._changes += patch_lang(fn)._changes
            replaced.update(modules_of[fn])
        return launch if outermost else empty()

    return patch


def _by_name(np_dtype: Callable) -> Callable:
    """_get_np_dtype that makes its table of types once."""
    known: dict[str, object] = {}

    def lookup(dtype: object) -> object:
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    return lookup
