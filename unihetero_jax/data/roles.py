"""What a source's records are used for: the order of an image and its caption, and which segments carry a loss."""

import dataclasses
from typing import Literal

from unihetero_jax.data.records import ImageSegment, Record, TextSegment

Order = Literal["stored", "image_first", "text_first", "coin"]
DrawnOrder = Literal["stored", "image_first", "text_first", "captioned"]
TextLoss = Literal["stored", "none"]
VisualLoss = Literal["generated", "all", "none"]


@dataclasses.dataclass(frozen=True)
class Role:
    """How one sample is used.

    Attributes:
        order: of the image and the text of a pair; `stored` leaves every record as it is. `captioned` puts the image
            of a pair first and supervises its text, whatever the record says; other records are left as they are.
        text_loss: `stored`: text is supervised where its record says so; `none`: it is read only.
        visual_loss: the images that may carry the visual loss: those that come after text (`generated`), all, or none.
    """

    order: DrawnOrder = "stored"
    text_loss: TextLoss = "stored"
    visual_loss: VisualLoss = "generated"


def is_pair(record: Record) -> bool:
    """Whether a record is one image and one text without further turns: it takes the same room in either order."""
    kinds = sorted(type(segment).__name__ for segment in record.segments)
    texts = [segment for segment in record.segments if isinstance(segment, TextSegment)]
    return kinds == [ImageSegment.__name__, TextSegment.__name__] and texts[0].branch == 0


def in_order(record: Record, order: DrawnOrder) -> Record:
    """The record with its pair in an order; a record that is no pair comes back as it is."""
    if order == "stored" or not is_pair(record):
        return record
    text, image = sorted(record.segments, key=lambda segment: isinstance(segment, ImageSegment))
    if order == "captioned" and isinstance(text, TextSegment):
        text = dataclasses.replace(text, loss=True)
    return dataclasses.replace(record, segments=(text, image) if order == "text_first" else (image, text))
