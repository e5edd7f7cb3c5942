"""Pages with pictures, in one file that any browser shows."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;background:#fff;color:#222}}
main{{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}}
figure{{margin:0;padding:.6rem;border:1px solid #bbb;border-radius:.4rem;overflow-wrap:anywhere}}
img{{width:100%;image-rendering:pixelated}}b{{font-weight:600}}i{{font-style:normal;padding:0 .15em;margin:0 1px;background:#e6eef8}}
pre{{white-space:pre-wrap}}small{{color:#666}}
@media(prefers-color-scheme:dark){{body{{background:#181818;color:#ddd}}i{{background:#2b3d55}}small{{color:#aaa}}}}
</style>"""


def page(title: str, said: str, cards: Sequence[str]) -> str:
    """A page of cards under a sentence (HTML), which is text of ours."""
    figures = "".join(f"<figure>{card}</figure>" for card in cards)
    name = html.escape(title)
    return f"{HEAD.format(title=name)}<h1>{name}</h1>{said}<main>{figures}</main></html>\n"


def picture(pixels: np.ndarray) -> str:
    """uint8 [h, w, 3] as an element of a page."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
