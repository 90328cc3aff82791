"""Escape text from users for plotly, which interprets pseudo-HTML in labels.

Templates escape HTML (autoescape) and JSON inside HTML (`tojson`); this module does the rest.
"""

from moestro.gate.visible import visible


def plotly_label(text: str) -> str:
    """`text` for a title, label or name in plotly, which would otherwise read `<b>`, `<a href>` and `&lt;` in it."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
