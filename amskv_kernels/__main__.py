"""`python -m amskv_kernels` is the `amskv` command."""

import sys

from amskv_kernels.cli import main

sys.exit(main())
