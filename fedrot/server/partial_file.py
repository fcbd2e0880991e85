"""Partial aggregates in files. What another server sent is data, never code, and is checked before it takes memory."""

import json
import math
import os
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedrot_kernels import working_dtype

from ..adapters.config import check_lora
from ..adapters.files import check_new, replace_file
from ..adapters.fits import check_config
from ..adapters.keys import SAVED_DTYPES, TensorSpec, parse_key
from ..adapters.layout import Layout
from ..adapters.storage import Storage, find_parts
from ..adapters.update import Update, is_name
from ..adapters.values import is_finite
from ..errors import UpdateError
from ..report.sketch import part_shapes
from .stream import StreamedRound

_HEADER, _VERSION = "fedrot-partial", 5
_NAMES = {dtype: name for name, dtype in SAVED_DTYPES.items()}
_LONGEST = 200  # characters of a file's own words in an error


def write_stream(path: str | os.PathLike[str], stream: StreamedRound, options: Mapping[str, Any]) -> None:
    """Write one safetensors file, whole or not at all.

    Raises:
        FileExistsError: the path exists.
    """
    check_new(path)
    first = stream.first
    header = {
        "version": _VERSION,
        "options": dict(options),
        "tensors": [
            [key, first.storage.saved[key], list(spec.shape), _NAMES[spec.dtype]]
            for key, spec in first.storage.pack_specs(stream.layout.specs).items()
        ],
        "copies": first.storage.copies,
        "config": first.config,
        "clients": list(stream.weights),
        "dropped": stream.dropped,
        "frozen": list(stream.frozen),
        "counters": list(stream.counters),
        "unit": stream.mean.unit,
        "total_weight": stream.mean.total_weight,
        "sketch": stream.sketch is not None,
    }
    # Copies: the format refuses tensors that share memory.
    tensors = {name: x.detach().cpu().clone().contiguous() for name, x in _tensors(stream).items()}
    tensors["weights"] = torch.tensor([*stream.weights.values()], dtype=torch.float64, device="cpu")
    keys = [key_A for key_A, _ in stream.layout.factor_keys]
    tensors["angles"] = stream.angle_table(keys).contiguous()
    rotated = stream.counts()
    counts = [rotated.get(key, (0, 0)) for key in keys]
    tensors["undetermined"] = torch.tensor(counts, dtype=torch.float64, device="cpu")
    with replace_file(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


def read_stream(path: str | os.PathLike[str]) -> tuple[StreamedRound, dict[str, Any]]:
    """Read a stream and its options. Every name, shape and dtype is checked before a tensor is read.

    Raises:
        UpdateError: a file that ``write_stream`` did not write, a truncated one, or one that contradicts itself.
    """
    name = str(os.fspath(path))
    try:
        file: Any
        with safe_open(path, framework="pt") as file:
            header = _header(name, file.metadata())
            specs, keys_given = _specs(name, header["tensors"])
            config, whose = header["config"], f"{name}: its configuration"
            if config is not None:
                check_lora(config, whose)
            storage = Storage(keys_given, find_parts(specs, config, name), _copies(name, header["copies"], specs))
            specs = storage.unpack_specs(specs)
            if config is not None:
                check_config(config, specs, whose)
            layout = Layout(specs, name)
            _check_tensors(name, file, _expected(name, layout, header))
            here = {key: key for key in specs}
            first = Update(name, specs, here, {}, torch.device("cpu"), config, storage=storage)
            stream = StreamedRound(first, layout, None, 0 if header["sketch"] else None)
            return _read(name, file, header, stream), header["options"]
    except (SafetensorError, OSError) as error:
        raise UpdateError(f"{name} is not a whole safetensors file ({error}); send it again") from error


def _read(name: str, file: Any, header: Mapping[str, Any], stream: StreamedRound) -> StreamedRound:
    layout = stream.layout
    stream.frozen, stream.counters = (
        {key: torch.empty(layout.specs[key].shape, dtype=layout.specs[key].dtype, device="cpu") for key in header[of]}
        for of in ("frozen", "counters")
    )
    stream.dropped = header["dropped"]
    stream.mean.unit, stream.mean.total_weight = header["unit"], header["total_weight"]
    tables = {key: file.get_tensor(key) for key in ("weights", "angles", "undetermined")}
    for key, x in (tables | _tensors(stream)).items():
        if not is_finite([x if key in tables else x.copy_(file.get_tensor(key))]):
            raise UpdateError(f"{name}, {key} {tuple(x.shape)} holds NaN or Inf")
    weights, unit, total = tables["weights"], stream.mean.unit, stream.mean.total_weight
    told = float(weights.sum() if not unit else (weights / unit).sum())
    if bool((weights < 0).any()) or (not unit and told) or not math.isclose(told, total, rel_tol=1e-9):
        raise UpdateError(
            f"{name}: its weights sum to {told:.6g} units of {unit:.6g}, but its total is {total:.6g}; send it again"
        )
    stream.weights = dict(zip(header["clients"], weights.tolist(), strict=True))
    columns = {key_A: i for i, (key_A, _) in enumerate(layout.factor_keys)}
    in_groups = tables["angles"][:, [columns[a.key_A] for group in layout.groups for a in group.adapters]]
    stream.angles = array("d", in_groups.contiguous().numpy().tobytes())
    left, every = tables["undetermined"].T
    ranks = torch.tensor([a.rank for a in layout.adapters], device="cpu") * len(weights)
    if bool((left < 0).any() or (left > every).any() or (every > ranks).any() or (tables["undetermined"] % 1).any()):
        raise UpdateError(f"{name}: its numbers of directions are not ones of {len(weights)} clients; send it again")
    for i, a in enumerate(stream.adapters):
        stream.undetermined[i], stream.directions[i] = int(left[columns[a.key_A]]), int(every[columns[a.key_A]])
    return stream


def _tensors(stream: StreamedRound) -> dict[str, Tensor]:
    """The sums of a stream by their names in a file, in the stream's memory."""
    tensors = {f"sum/{key}": x for key, x in stream.mean.sums.items()}
    tensors |= {f"frozen/{key}": x for key, x in stream.frozen.items()}
    tensors |= {f"counter/{key}": x for key, x in stream.counters.items()}
    if stream.sketch is not None:
        tensors |= {f"sketch/{n}/{key}": x for key, of in stream.sketch.parts().items() for n, x in of.items()}
    return tensors


def _expected(name: str, layout: Layout, header: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The specs of all tensors that a file with this header holds."""
    N, double = len(header["clients"]), torch.float64
    L = len(layout.adapters)
    found = {"weights": TensorSpec((N,), double), "angles": TensorSpec((N, L), double)}
    found["undetermined"] = TensorSpec((L, 2), double)
    for a in layout.adapters:
        found[f"sum/{a.key_A}"] = TensorSpec((a.rank, a.d_in), working_dtype(a.dtype))
        found[f"sum/{a.key_B}"] = TensorSpec((a.d_out, a.rank), working_dtype(a.dtype))
        if header["sketch"]:
            found |= {f"sketch/{n}/{a.key_A}": TensorSpec(shape, double) for n, shape in part_shapes(a).items()}
    for key in layout.other_keys:
        found[f"sum/{key}"] = TensorSpec(layout.specs[key].shape, working_dtype(layout.specs[key].dtype))
    for key in header["frozen"]:
        if not any(key in keys for keys in layout.factor_keys):
            raise UpdateError(f"{name}: its header has {key[:_LONGEST]} frozen, which is no factor of it; send it again")
        found[f"frozen/{key}"] = layout.specs[key]
    if header["counters"] and set(header["counters"]) != set(layout.counters):
        raise UpdateError(f"{name}: the counters in its header are not those of its tensors; send it again")
    found |= {f"counter/{key}": layout.specs[key] for key in header["counters"]}
    return found


def _check_tensors(name: str, file: Any, expected: Mapping[str, TensorSpec]) -> None:
    if unlike := sorted(set(file.keys()) ^ expected.keys()):
        what = "is missing" if unlike[0] in expected else "is none of what its header describes"
        raise UpdateError(f"{name}: {unlike[0][:_LONGEST]} {what}; send it again")
    for key, spec in expected.items():
        view = file.get_slice(key)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if (shape, SAVED_DTYPES.get(dtype)) != (spec.shape, spec.dtype):
            raise UpdateError(
                f"{name}, {key}: shape {shape} of {dtype}, but by its header {spec.shape} of {_NAMES[spec.dtype]}; send it "
                "again"
            )


def _header(name: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_HEADER)
    if text is None:
        raise UpdateError(f"{name} is a safetensors file, but no partial aggregate; send what PartialAggregate.save wrote")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UpdateError(f"{name}: its header is not JSON ({error}); send it again") from error
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        raise UpdateError(f"{name}: not of version {_VERSION}; use the same version of fedrot on all servers")
    kinds: dict[str, Any] = {"options": dict, "tensors": list, "config": dict | None, "clients": list, "dropped": dict}
    kinds |= {"frozen": list, "counters": list, "copies": dict, "unit": float, "total_weight": float, "sketch": bool}
    wrong = next((field for field, kind in kinds.items() if not isinstance(header.get(field), kind)), None)
    if wrong is None:
        names = (*header["clients"], *header["dropped"])
        good = {
            "clients": all(map(is_name, names)) and len(set(names)) == len(names),
            "dropped": all(map(_is_text, header["dropped"].values())),
            "frozen": all(isinstance(x, str) for x in header["frozen"]),
            "counters": all(isinstance(x, str) for x in header["counters"]),
            "copies": all(isinstance(x, str) for x in header["copies"].values()),
            "unit": 0 <= header["unit"] < math.inf,
            "total_weight": 0 <= header["total_weight"] < math.inf,
        }
        wrong = next((field for field, fine in good.items() if not fine), None)
    if wrong is not None:
        raise UpdateError(f"{name}: {wrong} in its header is not what PartialAggregate.save writes; send it again")
    return header


def _is_text(x: Any) -> bool:
    """Whether a text can be written: no lone surrogate, which JSON lets through."""
    return isinstance(x, str) and x.encode("utf-8", "ignore").decode("utf-8") == x


def _copies(name: str, copies: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The copies of tied adapters in a header, which must be transposes of what they repeat."""
    for key, original in copies.items():
        pair = [specs[k] for k in (key, original) if k in specs and k not in copies.keys() - {key}]
        if len(pair) < 2 or pair[0] != replace(pair[1], shape=pair[1].shape[::-1]):
            raise UpdateError(f"{name}: its header has {key[:_LONGEST]} as a copy of another tensor; send it again")
    return dict(copies)


def _specs(name: str, tensors: list[Any]) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The mappings canonical key → spec and canonical key → the caller's key, from a header."""
    specs, keys_given = dict[str, TensorSpec](), dict[str, str]()
    for entry in tensors:
        try:
            key, given, shape, dtype = entry
            good = parse_key(given)[0] == key and key not in specs and all(type(n) is int and n >= 0 for n in shape)
            specs[key], keys_given[key] = TensorSpec(tuple(shape), SAVED_DTYPES[dtype]), given
        except (TypeError, ValueError, KeyError):
            good = False
        if not good:
            raise UpdateError(f"{name}: its header has a tensor {str(entry)[:_LONGEST]}; send it again")
    return specs, keys_given
