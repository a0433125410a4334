"""``python -m fused_resnet`` is ``fused-resnet``."""

import sys

from fused_resnet.cli import main

sys.exit(main())
