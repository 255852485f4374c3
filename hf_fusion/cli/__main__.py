"""``python -m hf_fusion.cli``, where the script ``hf-fusion`` is not on the PATH."""

import sys

from hf_fusion.cli.app import main

sys.exit(main())
