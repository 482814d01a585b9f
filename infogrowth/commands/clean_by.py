"""What `grow --clean-by` judges captions by: the cosine, negclip, or a column of a score table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from infogrowth.data.features import FeatureStream
from infogrowth.errors import UserError
from infogrowth.growth.scores import (
    Measure,
    NegClip,
    Score,
    ScoreColumn,
    cosine,
    draw_reference,
    measure_by,
    reference_path,
)
from infogrowth.neighbors.rows import row_products

if TYPE_CHECKING:
    from infogrowth.commands.grow import Config


@dataclass(frozen=True)
class CleanBy:
    """A score of features, the measure of cleaning, and how growth.json names it (the cosine it
    does not name)."""

    score: Score = row_products
    measure: Measure = cosine
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, growth: str) -> None:
        """Put negclip's reference into the growth folder, which has it from then on."""
        if isinstance(self.score, NegClip):
            self.score.save(reference_path(growth))


def clean_by(
    config: "Config",
    features: FeatureStream,
    recaptions: Mapping[str, Any] | None,
    continued: bool,
) -> CleanBy:
    """What the options ask for.

    Args:
        continued: the growth folder has begun: its reference counts, not a new one.

    Raises:
        UserError: no such column in --scores, or none for the recaptions.
    """
    name = config.clean_by
    if name == "cosine":
        return CleanBy()
    if name != "negclip":
        column = ScoreColumn(config.scores, name)
        if recaptions and not column.has_recaptions:
            raise UserError(
                f"--recaptions with --clean-by {name} needs the column recaption_{name} in "
                "--scores (score --recaptions)"
            )
        return CleanBy(measure=column, settings={"clean_by": {"score": name}})
    path = reference_path(config.growth)
    negclip = NegClip.load(path) if continued and path.is_file() else draw_reference(features)
    about = {"score": name, "temperature": negclip.temperature, "reference": negclip.digest()}
    return CleanBy(negclip, measure_by(negclip), {"clean_by": about})
