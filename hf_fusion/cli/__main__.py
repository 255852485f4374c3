"""``python -m hf_fusion.cli``, where the script ``hf-fusion`` is not on the PATH."""

import sys

from .app import main

sys.exit(main())
