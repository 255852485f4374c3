"""``python -m hf_fusion.cli``: the same as the script ``hf-fusion``."""

import sys

from hf_fusion.cli.app import main

sys.exit(main())
