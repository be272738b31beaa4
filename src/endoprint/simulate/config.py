"""The values of a simulated atlas: sizes, design, difficulty, and the spread of each effect."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from endoprint.config import Config

PositiveInt = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Spread = Annotated[float, Field(ge=0.0, le=2.0)]


class SimulateConfig(Config):
    """What atlas to draw; the seed comes separately, so that one design gives many atlases.

    The spreads (dispersion, library, line, replicate, run) follow the prototype that the project's
    first recipes were measured on: NB dispersion .3, run and replicate effects of .15 log each.
    """

    cells: PositiveInt = 6000  # labelled cells, all samples together
    genes: PositiveInt = 1500  # size of the panel, response genes included
    lines: PositiveInt = 2  # donors: CTL04E, CTL08A, CTL01A, CTL02A, then numbered ones
    replicates: PositiveInt = 3  # cultures per line; a unit is line x replicate
    confounding: Literal["none", "partial", "complete"] = "none"  # of exposure with run
    runs: PositiveInt = 3  # technical runs that hold the crossed exposures (none, partial)
    as_published: bool = False  # the source's runs (confounding: complete) and its flaws
    difficulty: Literal["easy", "middle", "hard"] = "easy"  # scale of every effect, see `law`
    responses: Literal["measured", "textbook"] = "measured"  # which named genes answer
    effects: str = ""  # path of a CSV of measured effects that replaces all drawn ones; "": none
    effects_names: str = (
        ""  # path of a JSON of symbol: Ensembl id, where that CSV has symbols only
    )
    pool_cells: CountOrNone = 3000  # unlabelled cells for vocabulary and pre-training; 0: none
    pool_units: PositiveInt = 4  # units of the pool, each a line of its own
    new_cells: CountOrNone = 0  # unlabelled cells of new units, to be scored; 0: none
    new_units: PositiveInt = 2  # new units, each a line of its own; EDC samples included
    median_umi: Annotated[float, Field(gt=0.0)] = 1500.0  # counts per cell over the panel
    library_sd: Spread = 0.35  # spread of the library size, sd of its natural log
    dispersion: Annotated[float, Field(gt=0.0, le=10.0)] = 0.3  # NB: variance = m + dispersion m^2
    line_sd: Spread = 0.15  # line effect per gene, sd of the natural log
    replicate_sd: Spread = 0.15  # effect of one culture per gene, sd of the natural log
    run_sd: Spread = 0.15  # run effect per gene, sd of the natural log

    @model_validator(mode="after")
    def _one_source_of_effects(self) -> Self:
        if self.effects and self.responses == "textbook":
            raise ValueError("textbook responses never mix with measured effects")
        if self.effects_names and not self.effects:
            raise ValueError("effects_names says what the genes of effects are: give both")
        return self

    @model_validator(mode="after")
    def _the_source_has_one_design(self) -> Self:
        if not self.as_published:
            return self
        if (self.lines, self.replicates) != (2, 3):
            raise ValueError("as_published means 2 lines x 3 replicates, as in the source atlas")
        # "none" is the default and gives way; only a chosen contradiction is refused
        if self.confounding == "partial":
            raise ValueError("as_published means confounding: complete, as in the source atlas")
        return self
