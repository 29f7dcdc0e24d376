"""`python -m diffseg`: the command line without its script."""

import sys

from diffseg.lab.cli import main

sys.exit(main())
