"""What a file that torch pickled would build, followed without building it.

`torch.load(weights_only=True)` runs no code of a file, but it does build what the file asks for: memory of any declared
size, keys whose hash takes hours, and containers whose methods are replaced. The opcodes are therefore followed here
first, with stand-ins for all objects, and refused unless they are those of tensors in dictionaries.
"""

from __future__ import annotations

import io
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_MAX_OPCODES = 500_000  # a tensor takes 38 of them, and a checkpoint of SDXL has 2,500 tensors
_MAX_KEY_PARTS = 16  # of a tuple as a key
_REBUILDS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_OTHER_TENSORS = (
    *("_rebuild_sparse_tensor", "_rebuild_qtensor", "_rebuild_nested_tensor", "_rebuild_meta_tensor_no_storage"),
    "_rebuild_wrapper_subclass",
)
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
"""Class of the words in the files of the first textual inversions."""
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
"""Class of a trainer, which checkpoints have as a key beside their weights."""
_ELEMENT_BYTES = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool"), 1),
    "ComplexDouble": 16,
}
_STORAGES = {f"torch.{name}Storage": size for name, size in _ELEMENT_BYTES.items()}
_STORAGES["torch.storage.UntypedStorage"] = 1


_DTYPE = re.compile(r"torch\.(bool|bfloat16|float(16|32|64|8_\w+)|u?int(8|16|32|64)|complex(32|64|128))")


class RefusedPickleError(ValueError):
    """A pickled file that is not read.

    Attributes:
        runs_code: whether the file asks for code to be run.
    """

    def __init__(self, reason: str, runs_code: bool = False) -> None:
        super().__init__(reason)
        self.runs_code = runs_code


@dataclass(frozen=True)
class _Global:
    """A class or function, by its name."""

    name: str


@dataclass
class _Dict:
    """A dictionary, by its keys."""

    keys: list[Any] = field(default_factory=list)


@dataclass
class _List:
    """A list, by whether the hash of each item takes no time."""

    is_plain: bool = True


class _Other:
    """Any other object, such as a tensor or a storage."""


_PLAIN_KEYS = (str, int, float, type(None), _Global)
_CALLS: Mapping[str, Callable[[tuple[Any, ...]], bool]] = {  # function -> whether its arguments are those of torch.save
    **{f"torch._utils.{name}": bool for name in _REBUILDS},
    "torch.Size": bool,
    "torch.device": bool,
    "_codecs.encode": lambda arguments: arguments[1:] == ("latin1",),  # bytes
    "collections.OrderedDict": lambda arguments: not arguments,
    "collections.Counter": lambda arguments: isinstance(arguments[0], _Dict),
    "builtins.set": lambda arguments: isinstance(arguments[0], _List) and arguments[0].is_plain,
}
_NAMES = {*_CALLS, *_STORAGES, PARAMETER_DICT, CALLBACK}


class PickleOutline:
    """Follows the pickles of one file, which share their bounds.

    Args:
        num_bytes: of the file, which all storages together cannot exceed.
    """

    def __init__(self, num_bytes: int) -> None:
        self._bytes_left, self._opcodes_left = num_bytes, _MAX_OPCODES
        self._storages: set[Any] = set()
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stack below each mark
        self._memo: dict[int, Any] = {}

    def check(self, stream: io.BytesIO) -> None:
        """Follow one pickle to its end.

        Raises:
            RefusedPickleError: it calls something else than what torch writes for tensors, exceeds the bounds, or is
                damaged.
        """
        self._stack, self._below, self._memo = [], [], {}
        try:
            for opcode, argument in self._opcodes(stream):
                if opcode not in self._ACTIONS:
                    raise ValueError(f"the instruction {opcode}, which torch does not write")
                self._ACTIONS[opcode](self, argument)
        except RefusedPickleError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise RefusedPickleError(f"a damaged or unknown file ({error})") from error

    def _opcodes(self, stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
        for opcode, argument, _ in pickletools.genops(stream):
            self._opcodes_left -= 1
            if self._opcodes_left < 0:
                raise RefusedPickleError(f"more than {_MAX_OPCODES:,} instructions")
            yield opcode.name, argument

    # --------------------------------------------------------------------------- actions; most have no argument

    def _nothing(self, _: Any) -> None:
        pass

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _push_empty_tuple(self, _: Any) -> None:
        self._stack.append(())

    def _push_dict(self, _: Any) -> None:
        self._stack.append(_Dict())

    def _push_list(self, _: Any) -> None:
        self._stack.append(_List())

    def _push_global(self, text: str) -> None:
        module, _, name = text.partition(" ")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
        full_name = f"{module}.{name}"
        if name in _OTHER_TENSORS:
            raise RefusedPickleError("a sparse, quantized, nested or meta tensor")
        if full_name not in _NAMES and not _DTYPE.fullmatch(full_name):
            raise RefusedPickleError(f"a call of {full_name}", runs_code=True)
        self._stack.append(_Global(full_name))

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _tuple(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._stack.append(tuple(items))

    def _tuple1(self, _: Any) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self, _: Any) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self, _: Any) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _append(self, _: Any) -> None:
        item = self._stack.pop()
        self._append_all([item])

    def _appends(self, _: Any) -> None:
        self._append_all(self._pop_to_mark())

    def _append_all(self, items: list[Any]) -> None:
        target: _List = self._stack[-1]
        target.is_plain = target.is_plain and all(map(_is_quickly_hashed, items))

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_all([key, value])

    def _set_items(self, _: Any) -> None:
        self._set_all(self._pop_to_mark())

    def _set_all(self, items: list[Any]) -> None:
        target: _Dict = self._stack[-1]
        for key in items[::2]:
            if not _is_quickly_hashed(key):
                raise RefusedPickleError(f"a key of type {type(key).__name__.strip('_').lower()}")
            target.keys.append(key)

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _call(self, _: Any) -> None:
        """Replace a function and its arguments by the result."""
        arguments, function = self._stack.pop(), self._stack.pop()
        name = function.name if isinstance(function, _Global) else ""
        if name not in _CALLS or not isinstance(arguments, tuple) or not _CALLS[name](arguments):
            raise RefusedPickleError(f"a call of {name or 'an object'} that torch does not write", runs_code=True)
        self._stack.append(_Dict() if name == "collections.OrderedDict" else _Other())

    def _make(self, _: Any) -> None:
        """Replace a class and its arguments by an object."""
        self._stack.pop()
        if self._stack[-1] != _Global(PARAMETER_DICT):
            raise RefusedPickleError("an object of a class that torch does not write", runs_code=True)

    def _set_attributes(self, _: Any) -> None:
        """Give an object attributes, which could replace its methods."""
        state, target = self._stack.pop(), self._stack[-1]
        is_of_torch = isinstance(target, _Dict) and isinstance(state, _Dict) and set(state.keys) <= {"_metadata"}
        if not is_of_torch and target != _Global(PARAMETER_DICT):
            raise RefusedPickleError("an object with attributes of its own", runs_code=True)

    def _storage(self, _: Any) -> None:
        """Replace ("storage", type, key, location, number of elements), in old files with a None, by a storage."""
        kind, storage_type, key, _location, num_elements, *view = self._stack.pop()
        if kind != "storage" or storage_type.name not in _STORAGES or view not in ([], [None]):
            raise RefusedPickleError("a reference to something else than the numbers of a tensor")
        num_bytes = num_elements * _STORAGES[storage_type.name]
        if not _is_quickly_hashed(key) or num_bytes < 0:
            raise RefusedPickleError("a damaged or unknown file")
        if key not in self._storages:
            self._storages.add(key)
            self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise RefusedPickleError(f"a tensor of {num_bytes:,} bytes, more than the file has")
        self._stack.append(_Other())

    _ACTIONS: Mapping[str, Callable[[PickleOutline, Any], None]] = {
        **dict.fromkeys(("PROTO", "STOP"), _nothing),
        **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _push),
        "SHORT_BINSTRING": _push,
        "NONE": lambda outline, _: outline._push(None),
        "NEWTRUE": lambda outline, _: outline._push(True),
        "NEWFALSE": lambda outline, _: outline._push(False),
        "EMPTY_TUPLE": _push_empty_tuple,
        "EMPTY_DICT": _push_dict,
        "EMPTY_LIST": _push_list,
        "GLOBAL": _push_global,
        "MARK": _mark,
        "TUPLE": _tuple,
        "TUPLE1": _tuple1,
        "TUPLE2": _tuple2,
        "TUPLE3": _tuple3,
        "APPEND": _append,
        "APPENDS": _appends,
        "SETITEM": _set_item,
        "SETITEMS": _set_items,
        **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _remember),
        **dict.fromkeys(("BINGET", "LONG_BINGET"), _recall),
        "REDUCE": _call,
        "NEWOBJ": _make,
        "BUILD": _set_attributes,
        "BINPERSID": _storage,
    }


def _is_quickly_hashed(key: Any) -> bool:
    """Return whether the hash of a key takes no time: nested tuples can take hours."""
    parts = key if isinstance(key, tuple) and len(key) <= _MAX_KEY_PARTS else (key,)
    return all(isinstance(part, _PLAIN_KEYS) for part in parts)
