"""Tables of icons and of the words that their makers gave them, for `prepare --source=tables`.

    npm pack @mdi/svg && tar xzf mdi-svg-*.tgz            # Material Design Icons, Apache 2.0
    pip install resvg-py
    python tools/build_icons.py --data=package --out=tables/icons
    python -m gcl_jax.prepare --out=stores/icons --documents=tables/icons/documents.parquet \\
        --pairs=tables/icons/pairs.parquet --query_fields=query \\
        --document_fields=image:image,title --id_column=id --score_column=score --split=paper

Documents are the icons, black on white, 48 x 48 pixels, and their names ("account box outline").
Keywords are the words of an icon's name, of its aliases and of its tags; what is a query, and how
its icons are ranked, is the rule of build_clipart.py. A data set of drawings to measure on: no
setting of this repository was chosen by it.
"""

import argparse
import json
import re
from pathlib import Path

from build_clipart import Drawing, write_tables

SIDE = 48


def read_icons(data: Path) -> dict[str, Drawing]:
    """{name: icon}, in order of the names, without those that the package gives up."""
    icons = {}
    for icon in sorted(json.loads((data / "meta.json").read_text()), key=lambda icon: icon["name"]):
        said = " ".join((icon["name"], *icon["aliases"], *icon["tags"])).lower()
        if not icon["deprecated"]:
            title = icon["name"].replace("-", " ")
            keywords = frozenset(re.findall("[a-z]{2,}", said))
            icons[icon["name"]] = Drawing(data / "svg" / f"{icon['name']}.svg", title, keywords)
    return icons


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the unpacked package")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not (args.data / "meta.json").exists():
        parser.error(f"{args.data} holds no meta.json: unpack the npm package @mdi/svg there")
    try:
        import resvg_py
    except ImportError:
        parser.error("drawings in SVG need resvg-py: pip install resvg-py")

    def drawn(file: Path) -> bytes:
        return bytes(resvg_py.svg_to_bytes(svg_path=str(file), width=SIDE, background="white"))

    write_tables(read_icons(args.data), drawn, args.out)


if __name__ == "__main__":
    main()
