"""An image and its caption to a record: what all caption layouts share."""

from unihetero_jax.data import records
from unihetero_jax.data.records import ImageSegment, Record, RecordError, TextSegment


def pair_record(source: str, image: bytes, caption: object, meta: dict[str, str | int | float], where: str) -> Record:
    """One image-text pair, without a prompt: image, then caption, both in the shared prefix.

    The order of a pair is not decided here: it takes the same tokens either way, so the loader may turn it around
    (`data.sources.*.order`).

    Raises:
        RecordError: `empty_caption`, or what `records.probe_image` says of the image.
    """
    if not isinstance(caption, str) or not caption.strip():
        raise RecordError("empty_caption", f"caption is {caption!r:.80}")
    segment = ImageSegment(image, *records.probe_image(image))
    return Record(source, "caption", (segment, TextSegment(caption.strip(), True)), meta, where)
