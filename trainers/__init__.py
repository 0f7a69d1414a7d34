"""Training: configs, model families, the loop, and the command `pcpo`."""

import logging

# where it is installed, it tells every process on a CPU of kernels that nothing here calls
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
