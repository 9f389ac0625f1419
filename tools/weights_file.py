"""Named tensors in a file, ``model.pt`` or ``.safetensors``: read by byte ranges, written in one go.

Neither torch nor a whole file in memory is needed, and nothing that a file holds is executed. A ``model.pt`` is a zip archive
of raw storages beside a pickle that says which tensor lies where; the pickle is read by an unpickler that knows three harmless
names (https://docs.python.org/3/library/pickle.html#restricting-globals) and written as plain opcodes.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import struct
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zlib import crc32

import numpy as np
from safetensors import SafetensorError, safe_open

from tools.errors import UserError

# what tensors are called in torch and what their bytes are in NumPy, which has no bfloat16
DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "float64": "<f8",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "|i1",
    "uint8": "|u1",
    "bool": "|b1",
}
STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
SAFETENSORS = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
BLOCK = 2**18  # elements that are read, merged and written at a time: 1 MiB of float32 stays in a processor's cache
KNOWN_FLAGS = 0x0808  # of zip records: sizes after the data, names in UTF-8
LONGEST_INDEX = 2**26  # bytes of the pickle of a model.pt; real ones have some kilobytes


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        dtype: as torch calls it, "float32".
        shape: its sizes.
        offset: of its first byte in the file.
        strides: elements from one index to the next, for each axis; None for a contiguous tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return self.dtype in ("float32", "float16", "bfloat16", "float64")


class WeightsFile:
    """The tensors of a file.

    Args:
        path: a ``.safetensors`` file, or else a ``model.pt`` as ``torch.save`` writes it: named tensors, or a dictionary
            that has them under "model" (MONAI's CheckpointSaver).

    Attributes:
        entries: by name, in the file's order.
        metadata: the strings in the header of a safetensors file.

    Raises:
        UserError: no such file, truncated, damaged, or it holds something else than named tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._records: dict[
            int, tuple[str, int, int]
        ] = {}  # by its place: the first tensor in it, its length, its CRC-32
        if not self.path.is_file():
            raise UserError(f"{path} not found")
        self._file = open(self.path, "rb")  # noqa: SIM115 - read as long as this object lives
        weakref.finalize(self, self._file.close)
        try:
            self.entries = self._safetensors() if self.path.suffix == ".safetensors" else self._torch()
        except UserError:
            raise
        except Exception as error:  # a hostile file can make the libraries raise nearly anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path} is not a readable file of weights ({reason})") from None

    def verify(self) -> None:
        """Read all of a ``model.pt`` once and compare its checksums; a safetensors file has none.

        Raises:
            UserError: a tensor is not what was written.
        """
        for offset, (name, size, expected) in self._records.items():
            found = 0
            for start in range(offset, offset + size, 4 * BLOCK):
                found = crc32(self._pread(start, min(4 * BLOCK, offset + size - start)), found)
            if found != expected:
                raise UserError(f"{self.path} is damaged: tensor {name} is not what was written")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements ``start`` to ``stop`` of a tensor, flat; half precision comes as float32.

        Raises:
            UserError: a value is NaN or infinite.
        """
        entry = self.entries[name]
        stop = entry.size if stop is None else min(stop, entry.size)
        if entry.strides is not None:
            return self._strided(name).reshape(-1)[start:stop]
        values = self._values(entry, self.bytes(name, start, stop))
        if entry.is_floating:
            check_finite(values, self.path, name)
        return values

    def array(self, name: str) -> np.ndarray:
        """A whole tensor in its shape; half precision comes as float32.

        Raises:
            UserError: a value is NaN or infinite.
        """
        return self.read(name).reshape(self.entries[name].shape)

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The bytes of the same elements, as the file has them.

        Raises:
            UserError: the file has become shorter since it was opened.
        """
        entry = self.entries[name]
        stop = entry.size if stop is None else min(stop, entry.size)
        if entry.strides is not None:
            return np.ascontiguousarray(self._strided(name, raw=True).reshape(-1)[start:stop]).view(np.uint8)
        width = np.dtype(DTYPES[entry.dtype]).itemsize
        return self._pread(entry.offset + start * width, (stop - start) * width)

    def _pread(self, offset: int, count: int) -> np.ndarray:
        buffer = np.empty(count, np.uint8)
        done = 0
        while done < count:
            got = os.preadv(self._file.fileno(), [memoryview(buffer)[done:]], offset + done)
            if not got:
                raise UserError(f"{self.path} is truncated")
            done += got
        return buffer

    def _strided(self, name: str, raw: bool = False) -> np.ndarray:
        entry = self.entries[name]
        width = np.dtype(DTYPES[entry.dtype]).itemsize
        extent = 1 + sum((size - 1) * stride for size, stride in zip(entry.shape, entry.strides)) if entry.size else 0
        flat = self._pread(entry.offset, extent * width)
        values = flat.view(DTYPES[entry.dtype]) if raw else self._values(entry, flat)
        if entry.is_floating and not raw:
            check_finite(values, self.path, name)
        strides = [stride * values.itemsize for stride in entry.strides]
        return np.lib.stride_tricks.as_strided(values, entry.shape, strides)

    @staticmethod
    def _values(entry: Entry, data: np.ndarray) -> np.ndarray:
        values = data.view(DTYPES[entry.dtype])
        if entry.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if entry.dtype == "float16" else values

    def _safetensors(self) -> dict[str, Entry]:
        try:
            with safe_open(self.path, framework="numpy"):  # the library checks header, offsets and file size
                pass
        except SafetensorError as error:
            raise UserError(f"{self.path} is damaged ({str(error).splitlines()[0]})") from None
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        self.metadata = header.pop("__metadata__", {}) or {}
        entries = {}
        for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if facts["dtype"] not in SAFETENSORS:
                raise UserError(f"{self.path}: tensor {name} is of the type {facts['dtype']}, which is not supported")
            dtype, shape = SAFETENSORS[facts["dtype"]], tuple(facts["shape"])
            entries[name] = Entry(dtype, shape, 8 + length + facts["data_offsets"][0])
        return entries

    def _torch(self) -> dict[str, Entry]:
        archive = zipfile.ZipFile(self._file)
        records: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if info.filename in records:
                raise UserError(f"{self.path} has two records {info.filename}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise UserError(f"{self.path}: record {info.filename} is compressed; torch.save does not compress")
            if info.flag_bits & ~KNOWN_FLAGS:
                raise UserError(f"{self.path}: record {info.filename} is encrypted or damaged")
            records[info.filename] = info
        index = [name for name in records if name.endswith("data.pkl") and name.count("/") == 1]
        if len(index) != 1:
            raise UserError(f"{self.path} is a zip archive, but not a file of weights that torch.save wrote")
        root = index[0].removesuffix("data.pkl")
        if records[index[0]].file_size > LONGEST_INDEX:
            raise UserError(f"{self.path}: its index of tensors is longer than {LONGEST_INDEX >> 20} MiB")
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{self.path} was written on a big-endian machine")
        content = _unpickled(archive.read(index[0]))
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content = content["model"]
        if not isinstance(content, dict) or not content:
            raise UserError(f"{self.path} holds something else than named tensors")
        entries = {}
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise UserError(f"{self.path} holds something else than named tensors")
            entries[name] = self._entry(name, tensor, records.get(f"{root}data/{tensor.storage.key}"))
        return entries

    def _entry(self, name: str, tensor: _Tensor, record: zipfile.ZipInfo | None) -> Entry:
        """Where in the file a tensor lies, after checking that all of it lies in its record."""
        dtype, shape, strides = tensor.storage.dtype, tensor.shape, tensor.strides
        width = np.dtype(DTYPES[dtype]).itemsize
        numbers = (tensor.offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise UserError(f"{self.path}: tensor {name} has impossible sizes")
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides)) if prod(shape) else 0
        expanded = prod(shape) > max(record.file_size, BLOCK) if record else False  # by strides of 0, a kind of bomb
        if record is not None and tensor.storage.size * width != record.file_size:
            raise UserError(f"{self.path}: the data of tensor {name} are of another size than it says")
        if record is None or (tensor.offset + extent) * width > record.file_size or expanded:
            raise UserError(f"{self.path}: tensor {name} is larger than its data")
        self._file.seek(record.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UserError(f"{self.path}: the record of tensor {name} is damaged")
        data = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if data + record.file_size > os.fstat(self._file.fileno()).st_size:
            raise UserError(f"{self.path} is truncated")
        self._records.setdefault(data, (name, record.file_size, record.CRC))
        dense = all(n == 1 or s == d for n, s, d in zip(shape, strides, _contiguous(shape)))
        return Entry(dtype, shape, data + tensor.offset * width, None if dense or not prod(shape) else strides)


def check_finite(values: np.ndarray, path: Path, name: str) -> None:
    """Refuse NaN and infinite values.

    Raises:
        UserError: names file and tensor.
    """
    if not is_finite(values):
        raise UserError(f"{path}: tensor {name} has NaN or infinite values")


def is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.dot(flat, flat)  # the fastest pass there is; finite only if all values are
    return bool(np.isfinite(square) or np.isfinite(flat).all())


def to_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as the bytes of a dtype, rounded to nearest even where it is narrower."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, DTYPES[dtype]).reshape(-1).view(np.uint8)


def write_torch(
    path: str | Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Iterable[tuple[str, Iterable[np.ndarray]]],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Write a ``model.pt`` that ``torch.load(path, weights_only=True)`` reads. The same content gives the same bytes.

    Args:
        path: the file.
        tensors: dtype and shape by name, in the order of the state dict, aliases included.
        data: for each tensor that is no alias, its name and its bytes in pieces.
        aliases: names of tensors that share their memory with another one, and that one's name.
    """
    aliases = aliases or {}
    keys = {name: str(position) for position, name in enumerate(n for n in tensors if n not in aliases)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, "model/data.pkl", [_pickled(tensors, {n: keys[aliases.get(n, n)] for n in tensors})])
        _record(archive, "model/byteorder", [b"little"])
        for name, pieces in data:
            dtype, shape = tensors[name]
            _record(archive, f"model/data/{keys.pop(name)}", pieces, prod(shape) * np.dtype(DTYPES[dtype]).itemsize)
        _record(archive, "model/version", [b"3\n"])
    if keys:
        raise ValueError(f"no data for {', '.join(keys)}")


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    data: Iterable[tuple[str, Iterable[np.ndarray]]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file piece by piece, for what does not fit into memory; else there is ``safetensors.save_file``.

    Args:
        path: the file.
        tensors: dtype and shape by name, in the order of the data.
        data: for each tensor its name and its bytes in pieces.
        metadata: for the header.
    """
    names = {dtype: name for name, dtype in SAFETENSORS.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for expected, (name, pieces) in zip(tensors, data, strict=True):
            written = sum(file.write(memoryview(piece)) for piece in pieces)
            start, end = header[expected]["data_offsets"]
            if (name, written) != (expected, end - start):
                raise ValueError(f"{name} has {written} bytes; {end - start} of {expected} were expected")


def _record(archive: zipfile.ZipFile, name: str, pieces: Iterable, size: int = 0) -> None:
    """One record of a zip archive, its data at a multiple of 64 bytes as torch wants it for mapping."""
    info = zipfile.ZipInfo(name)
    info.file_size = size
    padding = -(archive.fp.tell() + 30 + len(name) + 4) % 64
    info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    written = 0
    with archive.open(info, "w") as record:
        for piece in pieces:
            record.write(memoryview(piece))
            written += len(piece)
    if size and written != size:
        raise ValueError(f"{name} has {written} bytes instead of {size}")


@dataclass
class _Storage:
    dtype: str
    key: str
    size: int


@dataclass
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise pickle.UnpicklingError("a tensor of an unknown kind")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


# what torch.save writes, and for tensors alone; any other opcode is refused before the unpickler sees it
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK GLOBAL REDUCE BUILD BINPERSID BINUNICODE SHORT_BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "NONE NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE STACK_GLOBAL".split()
)
_MEMORISED = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
_TUPLES = {
    "TUPLE": None,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
}  # and how many items they take; None: those from the mark on
_TAKEN = {"BUILD": 1, "APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None}
LARGEST_TUPLE = 10_000
_HARMLESS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


def _unpickled(data: bytes) -> object:
    _check_instructions(data)
    return _Unpickler(io.BytesIO(data)).load()


def _check_instructions(data: bytes) -> None:
    """Refuse a pickle that tensors do not need, before the unpickler sees it: other instructions, numbers, and large tuples.

    A few bytes can make a tuple of tuples larger than any memory; hashing it, as a key, would take for ever. The sizes of what
    an unpickler would have on its stack are followed; all but tuples count as one.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}

    def popped(count: int | None) -> list[int]:
        start = marks.pop() if count is None else len(stack) - count
        items = stack[start:]
        if start < 0 or (count and len(items) < count):
            raise pickle.UnpicklingError("it takes more from its stack than there is")
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name not in _OPCODES:
            raise pickle.UnpicklingError(f"it has an instruction {name}, which tensors do not need")
        if name == "LONG_BINPUT" and argument > len(data):  # the unpickler would make a table of that many entries
            raise pickle.UnpicklingError("it numbers more things than it has")
        if name == "MARK":
            marks.append(len(stack))
        elif name in _MEMORISED:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES:
            stack.append(1 + sum(popped(_TUPLES[name])))
            if stack[-1] > LARGEST_TUPLE:
                raise pickle.UnpicklingError("it has a tuple larger than tensors need")
        elif name in _TAKEN:
            popped(_TAKEN[name])
        else:
            if name in ("REDUCE", "STACK_GLOBAL"):
                popped(2)
            elif name == "BINPERSID":
                popped(1)
            if name not in ("PROTO", "FRAME", "STOP"):
                stack.append(1)


class _Unpickler(pickle.Unpickler):
    """Knows the names that a file of tensors needs; any other is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a tensor")
        return _HARMLESS[module, name]

    def persistent_load(self, identity: object) -> _Storage:
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        dtype, key, _, size = identity[1:]
        if not (isinstance(dtype, str) and dtype in DTYPES and isinstance(key, str) and type(size) is int):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        return _Storage(dtype, key, size)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides[: len(shape)]))


def _pickled(tensors: Mapping[str, tuple[str, tuple[int, ...]]], keys: Mapping[str, str]) -> bytes:
    """The pickle (protocol 2) of an ordinary dictionary of tensors, opcode by opcode."""

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    def text(value: str) -> bytes:
        encoded = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded

    def number(value: int) -> bytes:
        if value < 2**31:
            return pickle.BININT + struct.pack("<i", value)
        return pickle.LONG1 + b"\x08" + struct.pack("<q", value)

    def several(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    no_hooks = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    classes = {dtype: storage for storage, dtype in STORAGES.items()}
    items = []
    sizes: dict[str, int] = {}
    for tensor, (_, shape) in tensors.items():
        sizes.setdefault(keys[tensor], prod(shape))
    for tensor, (dtype, shape) in tensors.items():
        key = keys[tensor]
        storage = several(text("storage"), name("torch", classes[dtype]), text(key), text("cpu"), number(sizes[key]))
        arguments = several(
            storage + pickle.BINPERSID,
            number(0),
            several(*map(number, shape)),
            several(*map(number, _contiguous(shape))),
            pickle.NEWFALSE,
            no_hooks,
        )
        items.append(text(tensor) + name("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE)
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS + pickle.STOP
