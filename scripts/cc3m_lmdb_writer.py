"""Pack downloaded image–caption pairs into LMDBs and annotation files, for `infogrowth embed`.

    python scripts/cc3m_lmdb_writer.py --image_root DIR

The same as `python -m infogrowth pack`.
"""

import sys

from infogrowth.cli import run_script
from infogrowth.commands.pack import Config, run

if __name__ == "__main__":
    sys.exit(run_script(Config, run))
