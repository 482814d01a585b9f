"""A recaption folder as the table that the growth engine asks."""

from collections.abc import Iterator, Mapping

from infogrowth.data.features import FeatureStream
from infogrowth.growth.decisions import Recaption


class RecaptionTable(Mapping[str, Recaption]):
    """A recaption folder by sample id, rows read when asked for; of two rows the later counts."""

    def __init__(self, stream: FeatureStream):
        self._stream = stream
        self._rows: dict[str, int] = {}
        for batch in stream.batches(65536):
            self._rows.update(zip(batch.ids, batch.rows.tolist(), strict=True))

    def __getitem__(self, sample: str) -> Recaption:
        batch = self._stream.row(self._rows[sample])
        assert batch.text is not None
        return Recaption(batch.captions[0], batch.text[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
