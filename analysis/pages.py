"""Static HTML pages: one file each, without server or network, equal for equal inputs.

Templates are in analysis/templates. Text is escaped by jinja2, and data are JSON inside script elements that no
browser runs. The page's Content-Security-Policy allows its own scripts by their SHA-256 and nothing else, so that what
a class, tag or file is called never runs, and nothing is loaded from anywhere.
"""

import base64
import gzip
import hashlib
import io
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, scripts: list[str], styles: list[str], **values: object) -> str:
    """The page that `template` makes of `values`, with the files `scripts` and `styles` of templates/ inside.

    The template has `policy`, `scripts` and `styles`, which it must place itself.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sources = [_source(name) for name in scripts]
    hashes = " ".join(f"'sha256-{_sha256(source)}'" for source in sources) or "'none'"
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {hashes}; base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(template).render(
        policy=policy,
        scripts=[Markup(source) for source in sources],
        styles=Markup("\n".join(_source(name) for name in styles)),
        **values,
    )


def _source(name: str) -> str:
    source = (TEMPLATES / name).read_text(encoding="utf-8")
    assert "</script" not in source, f"{name} would end its own element"
    return source


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def pack(content: bytes) -> str:
    """`content` as gzip in base64; the page reads it with DecompressionStream."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def picture(pixels: np.ndarray, quality: int = 88) -> str:
    """Pixels (H, W, 3) uint8 as the data URI of a JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
