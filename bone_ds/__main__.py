"""`python -m bone_ds`, which is also how launchers start each rank."""

import sys

from bone_ds.cli import main

sys.exit(main())
