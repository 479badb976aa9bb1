"""The demonstration, on both architectures: RWKV6 first, which needs nothing fetched, then LLaMA.

Everything lies under .demo in the directory it is started in; what is fetched or converted is kept for the next time.
"""

from __future__ import annotations

import sys
import time

from bone_ds.demo import demonstration, rwkv6, smollm2
from bone_ds.errors import BoneError


def main() -> int:
    started = time.monotonic()
    for part in (rwkv6.PART, smollm2.PART):
        try:
            code = demonstration.run(part)
        except BoneError as error:
            print(f"demo: {error}", file=sys.stderr)
            code = 2
        if code:
            return code
    print(f"{time.monotonic() - started:.0f} s in all.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
