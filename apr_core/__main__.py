"""``python -m apr_core``: the same as ``apr``, for scripts that choose their own Python."""

from __future__ import annotations

import sys

from apr_core.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
