"""Other people's text made harmless: shown as it is, whatever it holds.

Names of recipes, domains, layers and files come from users and their data. Escaping for HTML is the template's
(autoescape), for JSON inside HTML its `tojson`; here is what those leave: characters that steer a terminal or the
direction of text, and the pseudo-HTML that plotly reads in labels.
"""

import unicodedata

_JOINERS = "\u200c\u200d"  # invisible but part of how Persian, Hindi and emoji are written


def visible(text: str) -> str:
    """`text` with every control, direction and surrogate character replaced by its number."""
    return "".join(_visible(character) for character in text)


def plotly_label(text: str) -> str:
    """`text` for a title, label or name in plotly, which would otherwise read `<b>`, `<a href>` and `&lt;` in it."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shortened(text: str, length: int) -> str:
    """`text`, or its beginning and an ellipsis where it has more than `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _visible(character: str) -> str:
    if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and character not in _JOINERS:
        return f"⟨U+{ord(character):04X}⟩"
    return character
