"""Brings what pages link to outside docs/ into the site: their links are those of a checkout.

`../benchmarks/results/memory.png` becomes a file of the site, `../bdia_jax/scan.py` a page with its
source. A link that leads nowhere is left as it is, and `mkdocs build --strict` refuses it.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)")
_PICTURES = (".png", ".svg")
_SOURCE = """---
search:
  exclude: true
---
# {name}

`````{kind}
{text}
`````
"""


def on_files(files, config):
    """Adds every file below the repository's root that a page names."""
    pages = [file for file in files if file.is_documentation_page()]
    names = {name for page in pages for name in _LINK.findall(page.content_string)}
    for name in sorted(names):
        path = ROOT / name
        if path.suffix in _PICTURES and path.exists():
            files.append(File.generated(config, _place(name), abs_src_path=str(path)))
        elif path.is_file():
            kind = path.suffix.removeprefix(".") or "text"
            text = _SOURCE.format(name=name, kind=kind, text=path.read_text("utf-8"))
            files.append(File.generated(config, _place(name), content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns the links to where those files now are."""
    if page.file.generated_by:
        return markdown
    return _LINK.sub(lambda m: f"]({_place(m[1])}" if (ROOT / m[1]).is_file() else m[0], markdown)


def _place(name: str) -> str:
    return f"files/{name}" + ("" if name.endswith(_PICTURES) else ".md")
