"""Other people's text in plotly, which reads pseudo-HTML in labels.

Escaping for HTML is the template's (autoescape), for JSON inside HTML its `tojson`; here is what those leave.
"""

from moestro.gate.visible import visible


def plotly_label(text: str) -> str:
    """`text` for a title, label or name in plotly, which would otherwise read `<b>`, `<a href>` and `&lt;` in it."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
