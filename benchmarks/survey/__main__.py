"""``python -m benchmarks.survey``."""

import sys

from benchmarks.survey.measure import main

if __name__ == "__main__":
    sys.exit(main())
