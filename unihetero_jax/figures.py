"""Figures of HTML pages: drawn without a screen, and held by the page itself."""

import base64
import io
from typing import Any

from unihetero_jax.html_page import escaped


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes; sizes in inches."""
    from matplotlib.figure import Figure  # only who draws needs it; a figure of its own keeps no global state

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def image_of(figure: Any, description: str) -> str:
    """The figure as HTML; who cannot see it reads the description."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return image_of_png(buffer.getvalue(), description)


def image_of_png(data: bytes, description: str) -> str:
    """A stored picture as HTML."""
    source = base64.b64encode(data).decode()
    return f'<p><img style="max-width: 100%" alt="{escaped(description)}" src="data:image/png;base64,{source}"></p>'
