"""`python -m resnet_triton` is the command `resnet-triton`."""

import sys

from .tools.cli import main

sys.exit(main())
