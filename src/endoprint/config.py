"""What a value means: its unit, default and range, each said once, beside its owner.

Every room defines its own `Config` subclass; `params.yaml` of a workspace chooses the values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

ConfigT = TypeVar("ConfigT", bound="Config")


class Refusal(ValueError):
    """One line that says the rule, what was found instead, and the remedy."""

    def __init__(self, rule: str, got: str, remedy: str) -> None:
        self.rule, self.got, self.remedy = rule, got, remedy
        line = f"{rule}; got {got}; {remedy}"
        super().__init__(" ".join(line.split()))

    def __reduce__(self) -> tuple[type[Refusal], tuple[str, str, str]]:
        """Come back whole from a worker in another process."""
        return type(self), (self.rule, self.got, self.remedy)


class Away(Refusal):
    """A store, a database or a remote that does not answer now: later it may."""


class Config(BaseModel):
    """Typed, frozen values that refuse a typo; search ranges stand in the annotations.

    A field annotated `Annotated[float, FloatDistribution(1e-5, 1e-2, log=True)]` may be
    searched within that range and set nowhere outside it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def search_space(cls) -> dict[str, BaseDistribution]:
        """Return field name -> Optuna distribution, for every field that carries one."""
        from optuna.distributions import BaseDistribution  # 0.4 s that most commands never need

        return {
            name: annotation
            for name, field in cls.model_fields.items()
            for annotation in field.metadata
            if isinstance(annotation, BaseDistribution)
        }

    @model_validator(mode="after")
    def _stay_in_range(self) -> Self:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value is None:  # "not chosen here": the owner says what happens then
                continue
            for annotation in field.metadata:
                low, high = getattr(annotation, "low", None), getattr(annotation, "high", None)
                if low is not None and high is not None and not low <= value <= high:
                    raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
                choices = getattr(annotation, "choices", None)
                if choices is not None and value not in choices:
                    raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
        return self

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> Self:
        """Build from plain values, refusing in one line; `where` names the section read."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            said = first.get("ctx", {}).get("error")
            if isinstance(said, Refusal):  # of fields that contradict each other
                raise Refusal(f"{where}: {said.rule}", said.got, said.remedy) from None
            field = ".".join(str(part) for part in first["loc"]) or "value"
            known = ", ".join(cls.model_fields)
            raise Refusal(
                f"{where}.{field}: {first['msg']}",
                repr(first.get("input")),
                f"fields here are: {known}",
            ) from None


class Params(Config):
    """What `params.yaml` of a workspace chose; each section is validated by its owner's Config."""

    # names what is asked of the data; experiment and registered model carry it
    task: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    seed: int = 0
    score: str | None = None  # unlabelled cells (a file or a folder) that `endoprint run` scores
    checkpoint: str | None = None  # encoder: a folder or published name; none: the pool's, if any
    cells: dict[str, Any] = {}
    design: dict[str, Any] = {}
    tokens: dict[str, Any] = {}
    simulate: dict[str, Any] = {}  # the demo's atlas; absent where the cells are one's own
    pretrain: dict[str, Any] = {}  # empty: no pre-training
    search: dict[str, Any] = {}
    models: dict[str, dict[str, Any]] = {"logistic": {}}  # the field to compare, in this order

    def section(self, name: str, kind: type[ConfigT]) -> ConfigT:
        """Return one section as its owner's Config."""
        return kind.of(getattr(self, name), where=name)


def read_params(path: Path) -> Params:
    """Read a workspace's `params.yaml`; every mistake in it is one line."""
    if not path.is_file():
        raise Refusal(
            "a workspace holds a params.yaml",
            f"none at {path}",
            "make one with `endoprint init FILE DIR`",
        )
    return Params.of(read_yaml(path), where=path.name)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections; what is none is refused in one line."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"{path.name} must be YAML", str(error), "mend the line it names") from None
    if not isinstance(values, dict):
        raise Refusal(f"{path.name} must hold sections", type(values).__name__, "see README")
    return values
