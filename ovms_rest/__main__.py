"""`python -m ovms_rest` is the command `ovms-rest`."""

import sys

from ovms_rest.cli import main

sys.exit(main())
