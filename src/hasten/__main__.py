"""`python -m hasten` is `hasten`."""

from __future__ import annotations

import sys

from hasten.cli.main import main

sys.exit(main())
