"""`python -m resnet_triton` is the command `resnet-triton`."""

import sys

from .cli import main

sys.exit(main())
