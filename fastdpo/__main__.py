"""python -m fastdpo"""

import sys

from fastdpo.cli import main

sys.exit(main())
