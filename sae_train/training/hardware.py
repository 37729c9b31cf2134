"""Machines: how fast they are and what they cost, from the table `conf/hardware.yaml` or from a file of the user."""

import math
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sae_train.errors import ConfigError, suggest
from sae_train.training.work import Work

KINDS = ("cpu", "gpu")
PRECISIONS = ("bf16", "float32")
SHARES = ("matrix_share", "memory_share")
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device of a kind, in rates that turn counted work into seconds. `load_hardware` creates it.

    `conf/hardware.yaml` has the unit of each field. A prediction reads it.
    """

    name: str
    kind: str
    matrix_bf16: float
    matrix_fp32: float
    matrix_share: float
    memory: float
    memory_share: float
    scan: float
    gather: float
    order: float
    list: float
    fresh: float
    call: float
    link: float
    memory_bytes: float
    price: float
    auto_precision: str

    @property
    def overlaps(self) -> bool:
        """Whether a batch is harvested while a step runs, and the host starts operations ahead of the device."""
        return self.kind == "gpu"

    def resolved(self, precision: str) -> str:
        """Return a run's precision with `auto` replaced by its choice on this hardware."""
        return self.auto_precision if precision == "auto" else precision

    def seconds(self, work: Work, *, precision: str) -> float:
        """Return the seconds of one device for some work.

        Args:
            work: counts.
            precision: of the factors of matrix products: 'bf16', else fp32. float64 takes twice as long.
        """
        matrix = self.matrix_bf16 if precision == "bf16" else self.matrix_fp32
        twice = 2 if precision == "float64" else 1
        device = twice * (
            work.operations / (matrix * self.matrix_share)
            + work.streamed / (self.memory * self.memory_share)
            + work.scanned / self.scan
            + work.gathered / self.gather
            + work.ordered / self.order
            + work.listed / self.list
            + work.fresh / self.fresh
            + work.sent / self.link
        )
        return max(device, work.calls * self.call) if self.overlaps else device + work.calls * self.call


def load_hardware(given: str) -> Hardware:
    """Return the hardware that `plan.hardware` names: an entry of the table, or a YAML file of one machine.

    Raises:
        ConfigError: no such name or file, or the file lacks fields or has values without sense.
    """
    if Path(given).suffix in SUFFIXES:
        return _of_file(given)
    table = hardware_table()
    if given not in table:
        raise ConfigError(
            f"plan.hardware={given}: no such hardware.{suggest(given, table)} A file of your own, FILE.yaml, works, "
            "too: scripts/measure_hardware.py writes one for this machine's CPU."
        )
    return table[given]


def hardware_table() -> dict[str, Hardware]:
    """Return the machines of the table that comes with the package, by name."""
    text = (files("sae_train.conf") / "hardware.yaml").read_text(encoding="utf-8")
    return {name: _built(name, values, where="conf/hardware.yaml") for name, values in yaml.safe_load(text).items()}


def _of_file(given: str) -> Hardware:
    path = Path(given).expanduser()
    where = f"plan.hardware={given}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}). Give the path of a YAML file.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{where}: is not YAML ({said}). {_example()}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: holds no keys with values. {_example()}")
    return _built(path.stem, values, where=where)


def _built(name: str, values: dict[Any, Any], *, where: str) -> Hardware:
    """Return the hardware with these values.

    Raises:
        ConfigError: with every missing, unknown or senseless field, one a line.
    """
    needed = [field.name for field in fields(Hardware) if field.name != "name"]
    found: dict[str, Any] = {}
    problems = [f"{key}: no such field.{suggest(str(key), needed)}" for key in values if key not in needed]
    missing = [key for key in needed if key not in values]
    if missing:
        problems.append(f"{', '.join(missing)}: missing.")
    for key in needed:
        if key in values:
            found[key], problem = _value(key, values[key])
            problems += [problem] if problem else []
    if problems:
        lines = "\n".join(f"{where}: {problem}" for problem in problems)
        raise ConfigError(f"{lines}\n{_example()}")
    return Hardware(name=name, **found)


def _value(key: str, value: Any) -> tuple[Any, str]:
    """Return a field's value and the problem with it, empty where there is none."""
    words = {"kind": KINDS, "auto_precision": PRECISIONS}.get(key)
    if words is not None:
        return value, "" if value in words else f"{key}={value}: no such value. Choose {' or '.join(words)}."
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e9 as text
    except (TypeError, ValueError):
        number = math.nan
    largest = 1.0 if key in SHARES else math.inf
    if 0 < number <= largest and number < math.inf:
        return number, ""
    if key == "price" and number == 0:
        return number, ""
    return number, f"{key}={value}: must be a number above 0{' and at most 1' if key in SHARES else ''}."


def _example() -> str:
    return "conf/hardware.yaml has the fields and units; scripts/measure_hardware.py writes such a file for a CPU."
