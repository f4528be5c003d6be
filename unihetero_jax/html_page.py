"""HTML pages: one file each that needs nothing else, readable without colours and without scripts.

Whatever comes from data is escaped (`escaped`), and a page forbids the browser to load or run anything.
"""

import html
import re
from collections.abc import Mapping, Sequence


def escaped(text: object) -> str:
    """Any text as HTML that shows it; half surrogate pairs are shown as their escapes."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode(), quote=True)


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, anchor: str, content: str) -> str:
    return f'<section id="{anchor}"><h2>{escaped(title)}</h2>\n{content}</section>'


def definitions(rows: Mapping[str, object]) -> str:
    """Names and what they stand for; those that stand for an empty text are left out."""
    lines = (f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in rows.items() if value != "")
    return f"<dl>{''.join(lines)}</dl>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], html_cells: bool = False) -> str:
    """A table that scrolls by itself on a narrow screen; columns of numbers stand right.

    `html_cells`: cells are HTML already, and all but the first of each row are numbers.
    """
    numeric = [False, *(html_cells or all(map(_is_number, column)) for column in list(zip(*rows, strict=True))[1:])]
    head = "".join(cell("th", escaped(name), number, "col") for name, number in zip(header, numeric, strict=True))
    body = []
    for row in rows:
        first, *rest = row if html_cells else map(escaped, row)
        cells = (cell("td", text, number) for text, number in zip(rest, numeric[1:], strict=True))
        body.append(f"<tr>{cell('th', first, scope='row')}{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escaped(caption)}"><table>'
        f"<caption>{escaped(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def cell(tag: str, content: str, is_number: bool = False, scope: str = "") -> str:
    attributes = (' class="number"' if is_number else "") + (f' scope="{scope}"' if scope else "")
    return f"<{tag}{attributes}>{content}</{tag}>"


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[\d.,%± ]+|–", text) is not None


_STYLE = """
:root { --ink: #1f2430; --muted: #59616f; --line: #d6dae1; --accent: #2f5f9e; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem; }
a { color: var(--accent); }
nav ul, .legend { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: .9rem; } dd { margin: 0; }
dt, .note, footer, caption, figcaption { color: var(--muted); } .note, footer { font-size: .85rem; }
.scroll { overflow-x: auto; margin: .8rem 0; } table { border-collapse: collapse; font-size: .88rem; }
caption { text-align: left; white-space: nowrap; padding-bottom: .2rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  max-width: 30rem; overflow-wrap: break-word; }
thead th { white-space: nowrap; } tbody th { font-weight: 600; }
th.number, .number { text-align: right; white-space: nowrap; }
.shade { display: inline-block; padding: 0 .35rem; background: rgb(47 95 158 / calc(var(--share) * .35)); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figure p { margin: 0; }
svg text { font: 12px system-ui, sans-serif; fill: var(--muted); } svg line { stroke: var(--muted); }
.charts rect { fill: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; }
article figcaption { font-size: .8rem; } .text { white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line); display: block; }
mark { background: #ffe9c7; color: inherit; border-bottom: 2px solid #c2570c; }
footer { margin-top: .6rem; overflow-wrap: anywhere; }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
"""
