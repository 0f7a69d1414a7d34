"""`python -m comfyui_pcpo.trainers` is the command `pcpo`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
