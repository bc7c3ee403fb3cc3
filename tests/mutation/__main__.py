import os

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # before anything imports torch

from .command import main

raise SystemExit(main())
