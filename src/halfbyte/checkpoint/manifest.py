"""halfbyte.json: the numeric choices behind a checkpoint and a digest of every tensor, so that it can be proven."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, HalfbyteError
from ..formats import CONTRACT_VERSION, MXFP8, NVFP4, Format
from ..policy import FormatOverride, Policy
from ..version import __version__
from .options import Options
from .shards import read_json, write_json

FILE = "halfbyte.json"


def format_to_json(fmt: Format) -> dict[str, Any]:
    """A format as plain values."""
    if isinstance(fmt, MXFP8):
        return {"name": "mxfp8"}
    return {"name": "nvfp4", **asdict(fmt), "block": list(fmt.block)}


def format_from_json(data: Any) -> Format:
    """The inverse of `format_to_json`."""
    if not isinstance(data, dict):
        raise CheckpointError(f"format must be an object; got {data!r}")
    values = {key: value for key, value in data.items() if key != "name"}
    try:
        match data.get("name"):
            case "mxfp8":
                return MXFP8(**values)
            case "nvfp4":
                return NVFP4(**{**values, "block": tuple(values.get("block", (1, 16)))})
    except TypeError as error:
        raise CheckpointError(f"format {data!r}: {error}") from error
    raise CheckpointError(f"format {data.get('name')!r}: known are 'nvfp4' and 'mxfp8'")


def _overrides(data: Any) -> tuple[FormatOverride, ...]:
    keys = {"format", "match", "kinds"}
    if not isinstance(data, list) or not all(isinstance(entry, dict) and entry.keys() == keys for entry in data):
        raise CheckpointError(f"overrides must be a list of objects with {', '.join(sorted(keys))}; got {data!r}")
    lists = [entry[key] for entry in data for key in ("match", "kinds")]
    if not all(isinstance(value, list) and all(isinstance(v, str) for v in value) for value in lists):
        raise CheckpointError(f"overrides: match and kinds must be lists of strings; got {data!r}")
    return tuple(FormatOverride(format_from_json(o["format"]), tuple(o["match"]), tuple(o["kinds"])) for o in data)


def options_to_json(options: Options) -> dict[str, Any]:
    """Options as plain values."""
    return {
        "format": format_to_json(options.format),
        "layout": options.layout,
        "kv_cache": options.kv_cache,
        "activations": options.activations,
        "policy": options.policy.to_json(),
        "overrides": [
            {"format": format_to_json(o.format), "match": list(o.match), "kinds": list(o.kinds)}
            for o in options.overrides
        ],
        "recipe": options.recipe,
    }


def choices(options: Options, calibration: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything but the source that the bytes depend on."""
    return {
        "halfbyte_version": __version__,
        "contract_version": CONTRACT_VERSION,
        **options_to_json(options),
        **({} if calibration is None else {"calibration": calibration}),
    }


def write_manifest(
    directory: Path, options: Options, digests: dict[str, str], calibration: dict[str, Any] | None = None
) -> None:
    """Write halfbyte.json."""
    write_json(directory / FILE, {**choices(options, calibration), "sha256": dict(sorted(digests.items()))})


def is_calibrated(directory: Path) -> bool:
    """Whether halfbyte.json says that the bytes depend on calibration data."""
    path = directory / FILE
    return path.exists() and isinstance(read_json(path).get("calibration"), dict)


def read_manifest(directory: Path) -> tuple[Options, dict[str, str]] | None:
    """(options, digests) of halfbyte.json, or None where there is none.

    Raises:
        CheckpointError: the file is there but cannot be what halfbyte wrote.
    """
    path = directory / FILE
    if not path.exists():
        return None
    data = read_json(path)
    try:
        if data.get("contract_version") != CONTRACT_VERSION:
            raise CheckpointError(
                f"contract version {data.get('contract_version')!r}; this halfbyte implements {CONTRACT_VERSION}"
            )
        if not isinstance(data.get("policy"), dict):
            raise CheckpointError("policy is missing")
        options = Options(
            format=format_from_json(data.get("format")),
            layout=data.get("layout"),  # type: ignore[arg-type]  # Options checks these three
            policy=Policy.from_json(data["policy"]),
            kv_cache=data.get("kv_cache"),  # type: ignore[arg-type]
            activations=data.get("activations"),  # type: ignore[arg-type]
            overrides=_overrides(data.get("overrides", [])),
            recipe=data.get("recipe"),
        )
    except HalfbyteError as error:
        raise CheckpointError(f"{path}: {error}") from error
    digests = data.get("sha256")
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise CheckpointError(f"{path}: sha256 must map tensors to digests")
    return options, digests
